"""Whether a patched network computes what its stock twin computes, to float64's last digits.

Both run in float64 on the reference backend, whose rounding is float64's as well: any other number than stock's is a
mistake in the rewriting, not in a kernel. Compared are the outputs in training and in inference, every gradient and
every buffer behind the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..frozen import has_frozen_name
from ..patch import PatchReport, explain, patch
from ..select import use_backend
from ..testing import rms
from .networks import build

__all__ = ["Agreement", "agreement", "fitting_input", "judged"]

_RELATIVE = 1e-7
"""The difference that is taken for rounding, which a deep network in training amplifies, over a tensor's root mean
square; and over that of the largest of its kind, for gradients that cancel to nothing, such as a bias's before a batch
norm."""
_OF_THE_LARGEST = 1e-11

_OF_THE_SWING = 4.0
"""The difference that is taken for rounding, over what stock's own number moves by when its input changes in the last
digit: some networks amplify rounding, through norms over a few values that are all but equal."""

_SIZES = (64, 96, 224, 256, 384)


@dataclass(frozen=True)
class Agreement:
    """What a comparison found.

    Attributes:
        report: of the patch.
        differences: the tensors that differ, with their errors over their root mean squares, the worst first.
        unproven: why nothing could be compared, where nothing could.
    """

    report: PatchReport
    differences: tuple[tuple[str, float], ...] = ()
    unproven: str = ""

    @property
    def ok(self) -> bool:
        return not self.differences and not self.unproven


def agreement(model: nn.Module, fuse: Callable[[nn.Module], PatchReport] = patch, seed: int = 0) -> Agreement:
    """Patches ``model`` with ``fuse``, which changes it for good, and compares it with a stock copy of it."""
    runnable = getattr(model, "backbone", model) if _is_detector(model) else model
    _unsettle(runnable.double(), seed)
    x = fitting_input(runnable)
    stock = copy.deepcopy(runnable)
    report = fuse(model)
    if x is None:
        return Agreement(report, unproven="the stock network runs on no image of sizes " + ", ".join(map(str, _SIZES)))
    for dropout in (m for twin in (runnable, stock) for m in twin.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0  # its masks are of the same distribution as stock's, but not the same masks
    with use_backend("reference"):
        return Agreement(report, tuple(_differences(runnable, stock, x)))


def judged(name: str, largest: float) -> tuple[str, str]:
    """``"agrees"``, ``"differs"`` or ``"not run"`` for a network, and what there is to say of it.

    A network that :func:`fusedres.patch` raises on differs.

    Args:
        largest: how many parameters a network may have to be run; larger ones are only looked at.
    """
    try:
        model = build(name)
    except ValueError as error:
        return "not run", str(error).splitlines()[0]
    try:
        report = explain(model)
        covered = f"{report.covered} of {report.total} convolutions"
        parameters = sum(p.numel() for p in model.parameters())
        if not report.fused or parameters > largest:
            return "not run", f"{covered}, {parameters / 1e6:.0f} million parameters"
        found = agreement(model)
    except Exception as error:  # patch must not raise, and a patched network no more than the stock one
        return "differs", f"{type(error).__name__}: {error}"
    if found.unproven:
        return "not run", f"{covered}, {found.unproven}"
    worst = ", ".join(f"{where} by {error:.1e}" for where, error in found.differences[:3])
    return ("differs", f"{covered}; {worst}") if found.differences else ("agrees", covered)


def _is_detector(model: nn.Module) -> bool:
    """Whether a network of torchvision takes lists of images, whose number of boxes depends on them."""
    return type(model).__module__.startswith("torchvision.models.detection")


def fitting_input(model: nn.Module, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """Random images of the smallest size that the network takes; ``None`` where it takes none."""
    # timm's networks say which image they are made for.
    own = (getattr(model, "default_cfg", None) or {}).get("input_size", (3,))
    sizes = [*_SIZES, *(s for s in own[1:2] if s not in _SIZES)]
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        x = torch.randn(batch, own[0], size, size, generator=generator, dtype=dtype)
        try:
            with torch.no_grad():
                trial = copy.deepcopy(model)
                trial.eval()(x)
                trial.train()(x)
        except Exception:  # what a network raises on an image that it was not made for is its own affair
            continue
        return x
    return None


def _unsettle(model: nn.Module, seed: int) -> None:
    """Takes every parameter and statistic away from zeros and ones, which would hide that something is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                noise = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise - 0.5, alpha=0.4)
        for norm in model.modules():
            if (isinstance(norm, _NormBase) and norm.running_mean is not None) or has_frozen_name(norm):
                norm.running_mean.uniform_(-0.2, 0.2, generator=generator)
                norm.running_var.uniform_(0.5, 1.5, generator=generator)


def _differences(ours: nn.Module, stock: nn.Module, x: Tensor) -> Iterator[tuple[str, float]]:
    found = []
    for observe in (_inference, _training):
        a, b = observe(ours, x), observe(stock, x)
        largest = {kind: max((rms(t) for n, t in b.items() if n.startswith(kind)), default=0.0) for kind in _KINDS}
        for name, theirs in b.items():
            error = _error(a.get(name), theirs)
            kind = next(k for k in _KINDS if name.startswith(k))
            # Written so that NaN counts as a difference.
            if not error <= _RELATIVE * rms(theirs) + _OF_THE_LARGEST * largest[kind]:
                found.append((name, error / max(rms(theirs), 1e-300)))
        if found and observe is _training:
            found = _beyond_rounding(found, stock, x)
        found += [(f"{name} that stock PyTorch has not", float("inf")) for name in a.keys() - b.keys()]
    return iter(sorted(found, key=lambda pair: -pair[1] if pair[1] == pair[1] else float("-inf")))


def _beyond_rounding(found: list[tuple[str, float]], stock: nn.Module, x: Tensor) -> list[tuple[str, float]]:
    """The differences that are larger than what stock's own numbers move by."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    a, b = (_training(copy.deepcopy(stock), images) for images in (x, x * (1 + torch.finfo(x.dtype).eps * noise)))
    swing = {name: _error(a[name], b.get(name)) / max(rms(a[name]), 1e-300) for name in a}
    return [(name, error) for name, error in found if not error <= _OF_THE_SWING * swing.get(name, 0.0)]


def _error(ours: Tensor | None, theirs: Tensor | None) -> float:
    if ours is None or theirs is None or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("nan")
    return rms(ours.double() - theirs.double())


_KINDS = ("output", "gradient", "buffer")


def _inference(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {f"output in inference {name}": t for name, t in _tensors(_seeded(model.eval(), x))}


def _training(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.train().zero_grad()
    leaf = x.clone().requires_grad_()
    outputs = dict(_tensors(_seeded(model, leaf)))
    weights = torch.Generator().manual_seed(7)
    terms = [
        (o * torch.randn(o.shape, generator=weights, dtype=o.dtype)).mean() for o in outputs.values() if o.requires_grad
    ]
    if terms:
        sum(terms).backward()
    seen = {f"output in training {name}": o.detach() for name, o in outputs.items()}
    gradients = {"the input": leaf.grad, **{n: p.grad for n, p in model.named_parameters()}}
    seen.update({f"gradient of {n}": g for n, g in gradients.items() if g is not None})
    seen.update({f"buffer {n}": b.clone() for n, b in model.named_buffers() if b is not None})
    return seen


def _seeded(model: nn.Module, x: Tensor) -> Any:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        return model(x)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in a result of any structure, by where they are in it."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
        return
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    else:
        parts = ()
    for key, part in parts:
        yield from _tensors(part, f"{name}[{key}]")
