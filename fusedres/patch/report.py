"""What :func:`fusedres.patch` did and why: data first, a table for people second."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from .prediction import Predictor, by

__all__ = ["Declined", "Fused", "PatchReport"]


@dataclass(frozen=True)
class Fused:
    """One fused site.

    Args:
        path: of the module whose forward holds the site; ``""`` for the model itself.
        pattern: what was recognised.
        backend: what runs its fused passes; on a GPU what its measurements say, ``"triton or stock"`` where that is by
            shape.
        convolutions: the paths of the convolutions inside.
        already: whether an earlier ``patch`` had fused it.
        remark: why the addition behind a chain is not part of it, where there is one.
        norms: the paths of the norms inside.
        formula: what became one call, ``relu(x -> conv1 -> bn1  +  x)``, in the names of the module's own layers.
    """

    path: str
    pattern: str
    backend: str
    convolutions: tuple[str, ...]
    already: bool = False
    remark: str = ""
    norms: tuple[str, ...] = ()
    formula: str = ""


@dataclass(frozen=True)
class Declined:
    """A convolution or norm, or a module with all below it, that stays as it is.

    Args:
        kind: ``"convolution"`` for an ``nn.Conv2d``, ``"other convolution"``, ``"norm"`` or ``"module"``.
    """

    path: str
    reason: str
    kind: str = "convolution"


@dataclass(frozen=True)
class PatchReport:
    """What was fused and what was not.

    Args:
        fused: the sites, outermost first.
        declined: what was left alone.
        total: how many convolutions (``nn.Conv2d``) the model has.
        notes: what else the caller should know.
        dry_run: whether the model was left unchanged.
        predictor: counts bytes per image, where there is a model to count for.
        total_norms: how many norms of any kind the model has.
    """

    fused: tuple[Fused, ...]
    declined: tuple[Declined, ...]
    total: int
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    sources: dict[str, str] = field(default_factory=dict, repr=False)
    predictor: Predictor | None = field(default=None, repr=False, compare=False)
    total_norms: int = 0

    @property
    def covered(self) -> int:
        """How many convolutions are inside fused sites."""
        return len({path for site in self.fused for path in site.convolutions})

    @property
    def covered_norms(self) -> int:
        """How many norms are inside fused sites."""
        return len({path for site in self.fused for path in site.norms})

    @property
    def coverage(self) -> float:
        """The share of the model's convolutions that are inside fused sites; 0 for a model that has none."""
        return self.covered / self.total if self.total else 0.0

    def source(self, path: str) -> str:
        """The generated forward of the module at ``path``.

        Raises:
            KeyError: where no module was fused at ``path``.
        """
        if path not in self.sources:
            raise KeyError(f"no module was fused at {path!r}; fused: {', '.join(map(_shown, self.sources)) or 'none'}")
        return self.sources[path]

    def bytes_per_image(self, shape: Sequence[int] | None = None) -> tuple[float, float]:
        """The bytes that a training step moves per image: by the stock model, and by the patched one.

        Predicted when asked for, of the model as it is then, in its dtype, patched as this report was: both run forward
        and backward on tensors without memory, and what their passes read and write is added up, as
        :func:`fusedres.analysis.traffic` does. It takes about as long as patching. A report does not keep its model
        alive: keep it until the report has been printed.

        Args:
            shape: of the input, ``[N, C, H, W]``; by default 32 images of 224 x 224, or 320 x 320 where those are too
                small.

        Raises:
            ValueError: where the model does not run on such an input, or no longer exists.
        """
        if self.predictor is None:
            raise ValueError("the report is of no model")
        return self._predicted([tuple(shape)] if shape else self.predictor.default_shapes())[1:]

    def _predicted(self, shapes: list[tuple[int, ...]]) -> tuple[tuple[int, ...], float, float]:
        """The first of the shapes that the model takes, and the bytes for it."""
        *others, last = shapes
        for shape in others:
            with suppress(ValueError):
                return shape, *self.predictor.bytes_per_image(shape)
        return last, *self.predictor.bytes_per_image(last)

    def to_json(self) -> str:
        """The report as a JSON object, with :meth:`bytes_per_image` where that can be predicted."""
        content = {
            "fused": [asdict(site) for site in self.fused],
            "declined": [asdict(site) for site in self.declined],
            "coverage": self.coverage,
            "convolutions": self.total,
            "norms": self.total_norms,
            "notes": list(self.notes),
            "dry_run": self.dry_run,
            "bytes_per_image": None,
        }
        if self.predictor is not None:
            with suppress(ValueError):
                names = ("shape", "stock", "fused")
                content["bytes_per_image"] = dict(zip(names, self._predicted(self.predictor.default_shapes())))
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        lines = [self._summary(), *self._prediction()]
        if self.fused:
            lines += ["", *_fused_table(self.fused)]
        remarks = _grouped((site.path, site.remark) for site in self.fused if site.remark)
        if remarks:
            lines += ["", *_table(("fused in part", "reason"), remarks)]
        if self.declined:
            rows = _grouped((site.path, site.reason) for site in self.declined)
            lines += ["", *_table(("left as it is", "reason"), rows)]
        lines += ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)

    def _summary(self) -> str:
        verb = "would be fused" if self.dry_run else "fused"
        norms = f"; {self.covered_norms} of {self.total_norms} norms" if self.total_norms else ""
        convolutions = f"{self.covered} of {self.total} convolutions {verb} ({self.coverage:.0%})"
        return f"{convolutions}, in {len(self.fused)} sites{norms}"

    def _prediction(self) -> list[str]:
        if self.predictor is None or not self.fused:
            return []
        try:
            shape, stock, fused = self._predicted(self.predictor.default_shapes())
        except ValueError as error:
            return [f"bytes per image: not predicted, {error}"]
        share = f"{fused / stock:.2f} of it" if stock else "the same"
        return [f"a training step on {by(shape[1:])} moves {_mb(stock)} MB per image; patched {_mb(fused)} MB, {share}"]


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.3g}" if nbytes < 1e9 else f"{nbytes / 1e6:.0f}"


def _fused_table(sites: Sequence[Fused]) -> list[str]:
    """A row for each run of like sites, and below it what became one call, unless it is as in the last such row."""
    rows, below, told = [], [], {}
    remaining = iter(sites)
    for paths, said in _runs((site.path, (_pattern(site), site.backend)) for site in sites):
        rows.append((_span(paths), *said))
        formulas = list(dict.fromkeys(f for f in (next(remaining).formula for _ in paths) if f))
        below.append(formulas if told.get(said[0]) != formulas else [])
        told[said[0]] = formulas
    head, rule, *lines = _table(("fused", "pattern", "backend"), rows)
    return [head, rule, *(line for row, formulas in zip(lines, below) for line in (row, *_told(formulas)))]


def _pattern(site: Fused) -> str:
    return site.pattern + (" [already]" if site.already else "")


_WIDTH, _MOST = 120, 3


def _told(formulas: list[str]) -> list[str]:
    """Formulas as lines below their row: the first few, each on one line."""
    more = [f"    ... and {len(formulas) - _MOST} more such"] if len(formulas) > _MOST else []
    return [f"    {_one_line(f)}" for f in formulas[:_MOST]] + more


def _one_line(formula: str) -> str:
    line, *layers = formula.splitlines()
    if layers:  # of a dense block, which differ in their names
        line = layers[0].strip() + (f", and {len(layers) - 1} more" if len(layers) > 1 else "")
    room = _WIDTH - 4
    # The end tells of the sum and of what it adds.
    return line if len(line) <= room else f"{line[: room - 45]} ... {line[-40:]}"


def _grouped(entries: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows of paths and reasons, where those that differ in numbers alone share one."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for path, reason in entries:
        groups.setdefault((re.sub(r"\d+", "*", path), _general(path, reason)), []).append((path, reason))
    rows = []
    for (_, general), members in groups.items():
        paths, reasons = zip(*members)
        runs = _runs((path, ("",)) for path in paths)
        shown = _span(runs[0][0]) if len(runs) == 1 else f"{_common(paths)} (x {len(paths)})"
        rows.append((shown, reasons[0] if len(set(reasons)) == 1 else general))
    return rows


def _general(path: str, reason: str) -> str:
    """A reason that names its own layer by the last part of its path, and other paths with ``*`` for their indices."""

    def shorter(named: re.Match) -> str:
        if f".{path}".endswith(f".{named[0]}"):
            return path.rpartition(".")[2]
        return re.sub(r"(?<![^.])\d+(?![^.])", "*", named[0])

    return re.sub(r"\w+(?:\.\w+)+", shorter, reason)


def _common(paths: Sequence[str]) -> str:
    """Paths that differ in numbers alone as one, with ``*`` where they do."""
    parts = [re.split(r"(\d+)", path) for path in paths]
    return "".join(same[0] if len(set(same)) == 1 else "*" for same in zip(*parts))


def _runs(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[list[str], tuple[str, ...]]]:
    """Neighbours that say the same of ``stage.0``, ``stage.1``, ... or of one path several times, as one row."""
    runs: list[tuple[list[str], tuple[str, ...]]] = []
    for path, said in rows:
        if runs and runs[-1][1] == said and (path == runs[-1][0][-1] or _follows(runs[-1][0][-1], path)):
            runs[-1][0].append(path)
        else:
            runs.append(([path], said))
    return runs


def _follows(before: str, path: str) -> bool:
    (stem, _, last), (other, _, index) = before.rpartition("."), path.rpartition(".")
    return stem == other and last.isdigit() and index.isdigit() and int(index) == int(last) + 1


def _span(paths: list[str]) -> str:
    if paths[0] == paths[-1]:
        return _shown(paths[0]) + (f" (x {len(paths)})" if len(paths) > 1 else "")
    return f"{paths[0]} .. {paths[-1]}"


def _shown(path: str) -> str:
    return path or "(the model)"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their widest cell, the last one ragged."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    widths[-1] = 0
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
