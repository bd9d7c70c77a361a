"""CUDA graphs: a model's forward, or a whole training step, recorded once and replayed without Python.

A fused block launches several short kernels; replayed, they follow one another without a gap. Batch-norm statistics are
updated in place by kernels inside the graph, so every replay updates them as a call would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Captured", "capture"]

_WARM_UPS = 3  # calls before the capture: kernels compile, libraries choose and allocate


class Captured:
    """A recorded call. Calling it copies the arguments into the recorded inputs, replays, and returns the outputs.

    The outputs are the same tensors every time: clone what must outlive the next call. A replay reads the memory that
    the recorded call read, so everything that it belongs to is ``kept`` for as long as this.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: tuple[Tensor, ...], outputs: Any, kept: Any = ()) -> None:
        self.graph, self.inputs, self.outputs, self._kept = graph, inputs, outputs, kept

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

    where ``loss_of`` also calls ``backward``. The calls that warm up leave parameters and buffers as they were, and
    without ``step`` gradients too.

    Args:
        model: on a GPU, in the mode that is wanted.
        example: the inputs, a tensor or a tuple of tensors, whose shapes, dtypes and strides every call will have.

    Raises:
        TypeError: where an input is no tensor.
        ValueError: where the model and the inputs are not all on the same GPU.
        RuntimeError: where the call cannot be captured: it waits for the GPU, or draws random numbers on the CPU, which
            would be the same in every replay.
    """
    inputs = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    device = _device_of(model, inputs)
    inputs = tuple(x.detach().clone() for x in inputs)
    call = step if step is not None else _forward_of(model)
    state = [t.detach() for t in (*model.parameters(), *model.buffers())]
    before = [t.clone() for t in state]
    gradients = [(p, p.grad) for p in model.parameters()]
    recorded = False
    try:
        with _side_stream(device) as stream:
            _without_gradients(model)  # that are there already: the warm-up would add to them
            _warm_up(call, inputs)
            _without_gradients(model)  # so that backward writes into memory of the graph, instead of adding to other
            graph, outputs = _record(call, inputs, stream)
        recorded = True
    finally:
        if step is None or not recorded:
            for p, grad in gradients:
                p.grad = grad
        for tensor, saved in zip(state, before):
            tensor.copy_(saved)
    return Captured(graph, inputs, outputs, (model, call, state))


def _device_of(model: nn.Module, inputs: Sequence[Any]) -> torch.device:
    """The one GPU on which the model and the inputs are."""
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"capture: example[{i}] must be a tensor, got {type(x).__name__}")
        if x.device.type != "cuda":
            raise ValueError(
                f"capture: example[{i}] of shape {tuple(x.shape)} is on {x.device}, CUDA graphs need a GPU"
            )
    tensors = [(f"example[{i}]", x) for i, x in enumerate(inputs)]
    tensors += [*model.named_parameters(), *model.named_buffers()]
    if not tensors:
        raise ValueError("capture: there is no input and no parameter to say which GPU is meant")
    first, lead = tensors[0]
    for name, tensor in tensors:
        if tensor.device.type != "cuda":
            raise ValueError(f"capture: {name} is on {tensor.device}, CUDA graphs need a GPU")
        if tensor.device != lead.device:
            raise ValueError(
                f"capture: {first} is on {lead.device} but {name} on {tensor.device}, a CUDA graph is of one GPU"
            )
    return lead.device


def _forward_of(model: nn.Module) -> Callable[..., Any]:
    def forward(*inputs: Tensor) -> Any:
        with torch.no_grad():
            return model(*inputs)

    return forward


def _without_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


@contextmanager
def _side_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A stream of this device, whichever is current, as the current one."""
    with torch.cuda.device(device):
        outer, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        stream.wait_stream(outer)
        try:
            with torch.cuda.stream(stream):
                yield stream
        finally:
            outer.wait_stream(stream)


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Autocast's cache of cast weights, empty at the beginning and at the end.

    Where autocast was entered before the call, its cache outlives that. A cast from before the recording would then be
    missing in it, and in the memory of one from the recording there is nothing until a replay.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def _warm_up(call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    for _ in range(_WARM_UPS):
        with _without_cached_casts():
            call(*inputs)


def _record(
    call: Callable[..., Any], inputs: tuple[Tensor, ...], stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    random = torch.get_rng_state()
    failed = None
    try:
        with torch.cuda.graph(graph, stream=stream), _without_cached_casts():
            try:
                outputs = call(*inputs)
            except BaseException as error:  # of the errors that this one brings about, the last would be seen
                failed = error
                raise
    except Exception as ended:
        error = failed or ended
        if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
            raise error  # noqa: B904  it is what the ending came of
        raise RuntimeError(_explanation(error)) from error
    finally:
        del failed  # a cycle, which would keep what the frames of the traceback hold
    if not torch.equal(random, torch.get_rng_state()):
        raise RuntimeError(
            "capture: the call drew random numbers on the CPU, as the dropout of fused blocks does for its seed; every "
            "replay would use the same ones"
        )
    return graph, outputs


def _explanation(error: BaseException) -> str:
    message = str(error).partition("\n")[0]
    why = "; what waits for the GPU or moves data to the CPU cannot be" if "captur" in message else ""
    return f"capture: this call cannot be recorded as a CUDA graph{why} ({message})"
