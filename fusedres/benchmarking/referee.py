"""Judges contestants: stock PyTorch's results and float64's are computed once, and every contestant is held to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..testing import Comparison, run_and_collect

__all__ = ["Referee"]

Collected = dict[str, Tensor | None]

DRAWS = (3, 9)
"""As in :mod:`fusedres.testing`, and fewer: few tensors of a network have few values, and a draw takes seconds."""


class Referee:
    """Holds the outputs, gradients and buffers of contestants to the error budget of :mod:`fusedres.testing`.

    As :func:`fusedres.testing.compare` does, but for any callable, and with what it is measured by kept.

    Args:
        stock: the stock network in the mode and dtype that is wanted; not changed.
        inputs: from a seed, what it is called with, in that dtype.
        autocast: run stock and contestants under autocast to this dtype.
        backward: whether gradients are compared too.
        input_gradients: whether those of the input are among them.
    """

    def __init__(
        self,
        stock: nn.Module,
        inputs: Callable[[int], Tensor],
        *,
        autocast: torch.dtype | None = None,
        backward: bool = True,
        input_gradients: bool = False,
    ) -> None:
        self._stock = stock
        self._state = copy.deepcopy(stock.state_dict())
        self._inputs = inputs
        self._autocast = autocast
        self._backward = backward
        self._input_gradients = input_gradients and backward
        self._known: dict[int, tuple[Collected, Collected]] = {}

    def judge(self, model: nn.Module, call: Callable[[Tensor], Tensor]) -> Comparison:
        """The errors of ``call``, whose gradients arrive at the parameters of ``model``.

        Both are left with the stock network's parameters and buffers, and without gradients.
        """
        drawn = [judged := self._draw(0, model, call)]
        for count in DRAWS:
            if judged.ok:
                break
            drawn += [self._draw(seed, model, call) for seed in range(len(drawn), count)]
            judged = Comparison.median(drawn)
        return judged

    def _draw(self, seed: int, model: nn.Module, call: Callable[[Tensor], Tensor]) -> Comparison:
        stock, exact = self._measures(seed)
        with torch.no_grad():
            model.load_state_dict(self._state)
        ours = self._collected(_Called(model, call), self._input(seed))
        with torch.no_grad():
            model.load_state_dict(self._state)
        model.zero_grad()
        return Comparison.of(ours, stock, exact)

    def _measures(self, seed: int) -> tuple[Collected, Collected]:
        if seed not in self._known:
            x = self._input(seed)
            stock = self._collected(copy.deepcopy(self._stock), x)
            wide = x.detach().double().requires_grad_(x.requires_grad)
            exact = run_and_collect(
                copy.deepcopy(self._stock).double(), [wide], None, self._backward, like=stock["output"]
            )
            self._known[seed] = stock, exact
        return self._known[seed]

    def _input(self, seed: int) -> Tensor:
        return self._inputs(seed).detach().requires_grad_(self._input_gradients)

    def _collected(self, module: nn.Module, x: Tensor) -> Collected:
        with torch.autocast(x.device.type, self._autocast) if self._autocast else nullcontext():
            return run_and_collect(module, [x], None, self._backward)


class _Called(nn.Module):
    """A callable in the place of a module: the parameters and buffers are the module's, the results the callable's."""

    def __init__(self, model: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._call = (call,)  # a module of its own must not become part of this one

    def forward(self, x: Tensor) -> Tensor:
        return self._call[0](x)

    def named_parameters(self, *args, **kwargs):
        return self.model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args, **kwargs):
        return self.model.named_buffers(*args, **kwargs)
