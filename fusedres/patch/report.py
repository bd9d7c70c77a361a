"""What :func:`fusedres.patch` did and why: data first, a table for people second."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
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
    """

    path: str
    pattern: str
    backend: str
    convolutions: tuple[str, ...]
    already: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Declined:
    """A convolution, or a module with all below it, that stays as it is."""

    path: str
    reason: str


@dataclass(frozen=True)
class PatchReport:
    """What was fused and what was not.

    Args:
        fused: the sites, outermost first.
        declined: what was left alone.
        total: how many convolutions the model has.
        notes: what else the caller should know.
        dry_run: whether the model was left unchanged.
        predictor: counts bytes per image, where there is a model to count for.
    """

    fused: tuple[Fused, ...]
    declined: tuple[Declined, ...]
    total: int
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    sources: dict[str, str] = field(default_factory=dict, repr=False)
    predictor: Predictor | None = field(default=None, repr=False, compare=False)

    @property
    def covered(self) -> int:
        """How many convolutions are inside fused sites."""
        return len({path for site in self.fused for path in site.convolutions})

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

        Predicted, for the model as it is now, in its dtype: both run forward and backward on tensors without memory,
        and what their passes read and write is added up, as :func:`fusedres.analysis.traffic` does. It takes about as
        long as patching.

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
            rows = [(_span(paths), pattern, backend) for paths, (pattern, backend) in _runs(_fused_rows(self.fused))]
            lines += ["", *_table(("fused", "pattern", "backend"), rows)]
        if any(site.remark for site in self.fused):
            rows = _runs((site.path, (site.remark,)) for site in self.fused if site.remark)
            lines += ["", *_table(("fused in part", "reason"), [(_span(paths), reason) for paths, (reason,) in rows])]
        if self.declined:
            rows = [(_span(paths), reason) for paths, (reason,) in _runs((d.path, (d.reason,)) for d in self.declined)]
            lines += ["", *_table(("left as it is", "reason"), rows)]
        lines += ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)

    def _summary(self) -> str:
        verb = "would be fused" if self.dry_run else "fused"
        return f"{self.covered} of {self.total} convolutions {verb} ({self.coverage:.0%}), in {len(self.fused)} sites"

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


def _fused_rows(sites: Iterable[Fused]) -> Iterator[tuple[str, tuple[str, str]]]:
    for site in sites:
        yield site.path, (site.pattern + (" [already]" if site.already else ""), site.backend)


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
