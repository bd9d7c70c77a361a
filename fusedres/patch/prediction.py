"""The bytes that a training step moves per image, stock and patched, before anything has run."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from ..select import use_backend

__all__ = ["Predictor", "by"]

_BATCH = 32
_SIZES = (224, 320)  # some networks refuse the first


class Predictor:
    """Counts for one model, which it does not keep alive, and with the selection and the memory it was patched with."""

    def __init__(self, model: nn.Module, only: Any, skip: Any, memory: str) -> None:
        self._model = weakref.ref(model)
        self._options = {"only": only, "skip": skip, "memory": memory}

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": _gone, "_options": self._options}  # a file has the report, not the model

    def default_shapes(self) -> list[tuple[int, ...]]:
        """Batches of images with the channels that the model's first convolution reads, the usual size first."""
        convolutions = (m for m in self._living().modules() if isinstance(m, nn.Conv2d))
        first = next(convolutions, None)
        return [(_BATCH, 3 if first is None else first.in_channels, size, size) for size in _SIZES]

    def bytes_per_image(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """As stock and as fused; see :meth:`fusedres.patch.PatchReport.bytes_per_image`."""
        # The analyses import this package.
        from ..analysis.phantom import phantom_input, phantom_model
        from ..analysis.schedules import eager
        from ..analysis.traffic import record_step
        from . import patch, unpatch

        dtype = next((p.dtype for p in self._living().parameters() if p.is_floating_point()), torch.float32)
        with torch.random.fork_rng(devices=()):
            try:
                stock = phantom_model(self._living()).train()
                unpatch(stock)
                fused = phantom_model(stock).train()
                patch(fused, **self._options)
                moved = [
                    sum(k.nbytes for k in eager(record_step(model, phantom_input(shape, dtype), use_backend(name))))
                    for model, name in ((stock, "stock"), (fused, "reference"))
                ]
            except Exception as error:  # a model may refuse an image in any way
                said = next(iter(str(error).splitlines()), type(error).__name__)
                raise ValueError(f"the model does not run on {by(shape)}: {said[:80]}") from error
        return moved[0] / shape[0], moved[1] / shape[0]

    def _living(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ValueError("the model is gone")
        return model


def _gone() -> None:
    """In the place of a reference to a model."""


def by(shape: tuple[int, ...]) -> str:
    """``3 x 224 x 224``"""
    return " x ".join(map(str, shape))
