"""The page of results: one list of parts, written as Markdown with figures beside it, and as one HTML file."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .figures import FIGURES, Figure, draw
from .source import Source, by_device
from .tables import headline, markdown, provenance, tables_of

__all__ = ["Page", "digest_of", "page"]

_INTRODUCTION = (
    "Written by `python -m fusedres report` (`make report`) from the files of results named below; nothing here is "
    "typed. Times are medians with their quartiles in parentheses; a speed-up is the median over turns of the ratio "
    "within a turn. Before anything of ours is timed, its outputs, gradients and running statistics are held to the "
    "error budget against float64: what is red there has no speed-up. `of roofline` is the time that the device's "
    "peaks allow over the time measured. A GPU's peaks are the published ones; a CPU's are measured with PyTorch's own "
    "kernels, so that kernels which are faster, or need fewer operations than are counted, come out above 100%."
)
_NOTHING = "There are no results yet: `make bench` and `make gpu` write them."


@dataclass(frozen=True)
class Part:
    """A heading, a paragraph, a table, or a figure, whose text is the title."""

    kind: str
    text: str
    lines: tuple[tuple[str, ...], ...] = ()
    level: int = 2
    figure: Figure | None = None
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Page:
    """What :func:`page` put together. ``folder`` is that of the figures, as the Markdown page names it."""

    parts: tuple[Part, ...]
    folder: str

    def markdown(self) -> str:
        """The page for ``docs/benchmarks.md``."""
        return "\n\n".join(map(self._in_markdown, self.parts)) + "\n"

    def _in_markdown(self, part: Part) -> str:
        if part.kind == "heading":
            return f"{'#' * part.level} {part.text}"
        if part.kind == "table":
            head, *lines = part.lines
            table = markdown(head, lines)
            return f"<details><summary>{part.text} ({len(lines)} lines)</summary>\n\n{table}\n\n</details>"
        if part.kind == "figure":
            return f"![{part.text}]({self.folder}/{_file_of(part)})"
        return part.text

    def figures(self) -> dict[str, Part]:
        """The figures by the names of their files."""
        return {_file_of(part): part for part in self.parts if part.kind == "figure"}

    def draw(self, folder: Path) -> None:
        """Writes the figures into a folder, and takes away those of pages before."""
        for old in folder.glob("*.svg"):
            old.unlink()
        for name, part in self.figures().items():
            draw(part.figure, part.sources, folder / name, digest_of(part.sources))

    def html(self, folder: Path) -> str:
        """The page in one file, with the figures of this folder inside."""
        body = "\n".join(self._in_html(part, folder) for part in self.parts)
        return _HTML.replace("BODY", body)

    def _in_html(self, part: Part, folder: Path) -> str:
        if part.kind == "heading":
            return f"<h{part.level}>{html.escape(part.text)}</h{part.level}>"
        if part.kind == "table":
            head, *lines = part.lines
            rows = [_row(head, "th"), *(_row(line, "td") for line in lines)]
            summary = f"<summary>{html.escape(part.text)} ({len(lines)} lines)</summary>"
            return f"<details>{summary}<table>{''.join(rows)}</table></details>"
        if part.kind == "figure":
            svg = (folder / _file_of(part)).read_text()
            # One document: no XML head of its own, and names that no other figure has.
            svg = _named_apart(svg[svg.index("<svg") :], _file_of(part).removesuffix(".svg"))
            return f"<figure>{svg}</figure>"
        return _paragraph(part.text)


def page(sources: Sequence[Source], folder: str = "benchmarks") -> Page:
    """The parts of the page: for each device its machine, figures, and tables."""
    parts = [Part("heading", "Benchmarks", level=1), Part("text", _INTRODUCTION if sources else _NOTHING)]
    for device, ours in by_device(list(sources)).items():
        parts += [Part("heading", device), *_of_device(ours)]
    return Page(tuple(parts), folder)


def _of_device(sources: Sequence[Source]) -> list[Part]:
    drawn, absent = [], []
    for figure in FIGURES:
        made = figure.draw(sources)
        if made is None:
            absent.append(f"{figure.title.lower()} (from {figure.wants})")
            continue
        _close(made)
        drawn.append(Part("heading", figure.title, level=3))
        if figure.note:
            drawn.append(Part("text", figure.note))
        drawn.append(Part("figure", figure.title, figure=figure, sources=tuple(sources)))
    if absent:
        drawn.append(Part("text", f"Without data, and so left out: {'; '.join(absent)}."))
    tables = []
    for source in sources:
        above = headline(source, "../") or provenance(source, "../")
        tables += [Part("heading", source.name, level=3), Part("text", above)]
        tables += [Part("text", text) for text in _left_out(source)]
        tables += [Part("table", title, (tuple(head), *lines)) for title, head, lines in tables_of(source)]
    return drawn + tables


def _left_out(source: Source) -> list[str]:
    """What was not measured, and apart what time has nothing to do with, such as that a process died."""
    found = source.results.settings.get("left_out", [])
    late = [what for what in found if "no time" in what or "needs about" in what]
    other = [what for what in found if what not in late]
    said = (("Left out for want of time", late), ("Left out", other))
    return [f"{why}: {'; '.join(what)}." for why, what in said if what]


def _close(figure: object) -> None:
    from matplotlib import pyplot

    pyplot.close(figure)


def digest_of(sources: Sequence[Source]) -> str:
    """A hash of what these files hold."""
    content = json.dumps([[source.name, asdict(source.results)] for source in sources], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _file_of(part: Part) -> str:
    return f"{part.sources[0].machine.slug}-{part.figure.name}.svg"


# ---------------------------------------------------------------------------------------------------------------------
# HTML
# ---------------------------------------------------------------------------------------------------------------------


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _paragraph(text: str) -> str:
    """The Markdown that our paragraphs use: code, bold type, links, and a table below the text."""
    before, separator, table = text.partition("\n\n| ")
    found = f"<p>{_inline(before)}</p>"
    if separator:
        head, _, *lines = f"| {table}".splitlines()
        rows = [_row(_cells(head), "th"), *(_row(_cells(line), "td") for line in lines)]
        found += f"<table>{''.join(rows)}</table>"
    return found


def _cells(line: str) -> list[str]:
    inner = line.removeprefix("| ").removesuffix(" |")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r" (?<!\\)\|(?: |$)", inner)]


def _inline(text: str) -> str:
    text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r"\1", text)  # files beside the page, which travels alone
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)


def _named_apart(svg: str, prefix: str) -> str:
    """The identifiers in a figure, and what refers to them, with a prefix."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)


_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fusedres benchmarks</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 12px; margin: .6rem 0; display: block; overflow-x: auto; }
th, td { border: 1px solid #ddd; padding: .25rem .5rem; text-align: right; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
summary { cursor: pointer; font-weight: 600; margin: .4rem 0; } code { background: #f3f3f3; padding: 0 .25em; }
</style>
</head>
<body>
BODY
</body>
</html>
"""
