"""CUDA graphs: a model's forward, or a whole training step, recorded once and replayed without Python.

A fused block launches several short kernels; replayed, they follow one another without a gap. Batch-norm statistics are
updated in place by kernels inside the graph, so every replay updates them as a call would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Captured", "capture"]

_WARM_UPS = 3  # calls before the capture: kernels compile, libraries choose and allocate


class Captured:
    """A recorded call. Calling it copies the arguments into the recorded inputs, replays, and returns the outputs.

    The outputs are the same tensors every time: clone what must outlive the next call.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: tuple[Tensor, ...], outputs: Any) -> None:
        self.graph, self.inputs, self.outputs = graph, inputs, outputs

    def __call__(self, *args: Tensor) -> Any:
        if len(args) != len(self.inputs):
            raise TypeError(f"captured with {len(self.inputs)} arguments, called with {len(args)}")
        for i, (recorded, given) in enumerate(zip(self.inputs, args)):
            if given.shape != recorded.shape or given.dtype != recorded.dtype:
                raise ValueError(
                    f"argument {i} of shape {tuple(given.shape)}, {given.dtype} differs from the captured one of shape "
                    f"{tuple(recorded.shape)}, {recorded.dtype}"
                )
            recorded.copy_(given)
        self.graph.replay()
        return self.outputs


def capture(model: nn.Module, example: Any, *, step: Callable[..., Any] | None = None) -> Captured:
    """Records a call of ``model`` as a CUDA graph.

    Without ``step``, its forward without gradients. With ``step``, a training step: a function of the inputs that runs
    forward, loss and backward and returns what is of interest, such as the loss. Each replay then *overwrites* the
    parameters' ``.grad``; the optimizer steps outside, on the same tensors, and must not set them to ``None``::

        replay = fusedres.capture(model, (images, labels), step=lambda x, t: loss_of(model(x), t))
        loss = replay(images, labels)
        optimizer.step()

    where ``loss_of`` also calls ``backward``. The calls that warm up leave parameters and buffers as they were.

    Args:
        model: on a GPU, in the mode that is wanted.
        example: the inputs, a tensor or a tuple of tensors, whose shapes, dtypes and strides every call will have.

    Raises:
        TypeError: where an input is no tensor.
        ValueError: where the model or an input is not on a GPU.
        RuntimeError: where the call cannot be captured: it waits for the GPU, or draws random numbers on the CPU, which
            would be the same in every replay.
    """
    inputs = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    _check(model, inputs)
    inputs = tuple(x.detach().clone() for x in inputs)
    call = step if step is not None else _forward_of(model)
    state = [*model.parameters(), *model.buffers()]
    before = [t.detach().clone() for t in state]
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        _warm_up(call, inputs)
        for p, _ in gradients:
            p.grad = None  # so that backward writes into memory of the graph, instead of adding to other
        graph, outputs = _record(call, inputs)
    except BaseException:
        for p, grad in gradients:
            p.grad = grad
        raise
    finally:
        with torch.no_grad():
            for tensor, saved in zip(state, before):
                tensor.copy_(saved)
    return Captured(graph, inputs, outputs)


def _check(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"capture: example[{i}] must be a tensor, got {type(x).__name__}")
        if x.device.type != "cuda":
            raise ValueError(
                f"capture: example[{i}] of shape {tuple(x.shape)} is on {x.device}, CUDA graphs need a GPU"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cuda":
            raise ValueError(f"capture: {name} is on {tensor.device}, CUDA graphs need a GPU")


def _forward_of(model: nn.Module) -> Callable[..., Any]:
    def forward(*inputs: Tensor) -> Any:
        with torch.no_grad():
            return model(*inputs)

    return forward


def _warm_up(call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            call(*inputs)
    torch.cuda.current_stream().wait_stream(stream)


def _record(call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    random = torch.get_rng_state()
    try:
        with torch.cuda.graph(graph):
            outputs = call(*inputs)
    except RuntimeError as error:
        raise RuntimeError(
            "capture: this call cannot be recorded as a CUDA graph: something in it waits for the GPU or moves data to "
            f"the CPU ({str(error).splitlines()[0]})"
        ) from error
    if not torch.equal(random, torch.get_rng_state()):
        raise RuntimeError(
            "capture: the call drew random numbers on the CPU, as the dropout and stochastic depth of fused blocks do "
            "for their seeds; every replay would use the same ones"
        )
    return graph, outputs
