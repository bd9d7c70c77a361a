"""Running a network without its memory and without its arithmetic: every op's shapes, reads and writes, nothing else.

A phantom tensor is a plain CPU tensor whose memory is never touched, so the operating system never provides it. Under
:class:`Recorder` no op that has arithmetic runs: its outputs' shapes, dtypes and strides come from PyTorch's meta
kernels. All Python code runs as ever, the engine's and autograd's too: what is recorded is what would run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from ..ops.activations import IDENTITY

__all__ = ["Call", "Recorder", "Touch", "phantom_input", "phantom_model"]


# ---------------------------------------------------------------------------------------------------------------------
# Phantoms
# ---------------------------------------------------------------------------------------------------------------------


def phantom_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of ``model`` on the CPU, convolutions in channels_last, whose tensors have no memory.

    Args:
        dtype: of its floating tensors; by default each keeps its own.
    """
    memo: dict[int, Any] = {}
    kept = []  # ids in the memo must stay those of living tensors
    for module in model.modules():
        for t in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(t, Tensor) and id(t) not in memo:
                memo[id(t)] = _phantom_of(t, dtype)
                kept.append(t)
    return copy.deepcopy(model, memo)


def _phantom_of(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype if dtype is not None and t.is_floating_point() else t.dtype
    phantom = torch.empty(t.shape, dtype=dtype, memory_format=_layout(t))
    return nn.Parameter(phantom, t.requires_grad) if isinstance(t, nn.Parameter) else phantom


def phantom_input(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """An input of this shape, in channels_last where it is four-dimensional, that asks for no gradient."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=layout)


# ---------------------------------------------------------------------------------------------------------------------
# What is recorded
# ---------------------------------------------------------------------------------------------------------------------


class Touch(NamedTuple):
    """A tensor that an op reads or writes: which value, and how many bytes. Views share their base's value."""

    value: int
    nbytes: int


class Call(NamedTuple):
    """One op as it was called.

    Attributes:
        op: its name with the namespace, ``"aten.relu_"``.
        block: the path of the block that it belongs to, ``None`` outside of all blocks.
        backward: whether the backward pass called it.
        reads, writes: the distinct tensors, results before what is updated in place, which is in both.
        again: bytes that its kernels read once more than one touch per tensor: batch norm in training passes over its
            operands twice, once for the sums; a convolution's dgrad and wgrad both read the gradient.
        flops: two per multiply-add of its matrix products, else 0.
    """

    op: str
    block: str | None
    backward: bool
    reads: tuple[Touch, ...]
    writes: tuple[Touch, ...]
    again: int
    flops: int

    @property
    def touched(self) -> int:
        """Bytes at one touch per tensor."""
        return sum(touch.nbytes for touch in (*self.reads, *self.writes))


class Recorder(TorchDispatchMode):
    """Inside, every op becomes a :class:`Call` in ``calls``, and, with ``phantom``, does not run.

    Args:
        blocks: the modules, by path, to which calls are attributed.
        phantom: whether ops pretend to run; otherwise they run.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], phantom: bool = True) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._blocks = blocks
        self._phantom = phantom
        self._inside: list[str] = []
        # Autograd numbers its nodes as the forward makes them: what a block made lies between two numbers.
        self._ranges: list[tuple[int, int, str]] = []
        self._values: dict[int, int] = {}
        self._count = 0

    @contextmanager
    def attributing(self) -> Iterator[Recorder]:
        """Enters the mode, and watches where the blocks begin and end."""
        hooks = []
        for path, module in self._blocks.items():
            hooks += [module.register_forward_pre_hook(self._begin(path)), module.register_forward_hook(self._end)]
        try:
            with self:
                yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, path: str) -> Any:
        def begin(module: nn.Module, args: Any) -> None:
            self._inside.append(path)
            self._starts = torch._C._autograd._get_sequence_nr()

        return begin

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._ranges.append((self._starts, torch._C._autograd._get_sequence_nr(), self._inside.pop()))

    def _where(self) -> tuple[str | None, bool]:
        node = torch._C._current_autograd_node()
        if node is None:
            return (self._inside[-1] if self._inside else None), False
        number = node._sequence_nr()
        return next((path for start, end, path in self._ranges if start <= number < end), None), True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # A view must be one, so that values can be followed; it touches no memory.
        samples = _name(func).startswith(_SAMPLES)
        free = func.is_view or func in _FREE or samples
        pretends = self._phantom and not func.is_view and not samples
        out = _pretend(func, args, kwargs) if pretends else func(*args, **kwargs)
        if free:
            for t in _tensors(out):
                if not func.is_view:
                    self._new_value(t)
            return out
        if _tensors((args, kwargs, out)):
            self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        read, written = _operands(func, args, kwargs)
        fresh = [t for t in _tensors(out) if not any(t is w for w in written)]
        reads = self._touches(read)
        again = sum(nbytes for t, nbytes in _again(func, args))
        for t in (*fresh, *written):
            self._new_value(t)
        block, backward = self._where()
        writes = self._touches([*fresh, *written])
        self.calls.append(Call(_name(func), block, backward, reads, writes, again, _flops(func, args, kwargs, out)))

    def _touches(self, tensors: list[Tensor]) -> tuple[Touch, ...]:
        touches: dict[int, int] = {}
        for t in tensors:
            value = self._value(t)
            touches[value] = max(_bytes(t), touches.get(value, 0))
        return tuple(Touch(value, nbytes) for value, nbytes in touches.items() if nbytes)

    def _value(self, t: Tensor) -> int:
        key = _storage(t)
        return self._values[key] if key in self._values else self._new_value(t)

    def _new_value(self, t: Tensor) -> int:
        self._count += 1
        self._values[_storage(t)] = self._count
        return self._count


def _storage(t: Tensor) -> int:
    """What identifies the memory of ``t``; weights in oneDNN's own layout are of no views."""
    return id(t) if t.layout is torch._mkldnn else t.untyped_storage()._cdata


def _bytes(t: Tensor) -> int:
    """The bytes that a pass over ``t`` touches: those of a broadcast once."""
    if t.layout is torch._mkldnn:
        return t.numel() * t.element_size()
    elements = 1
    for size, stride in zip(t.shape, t.stride()):
        elements *= size if stride or not size else 1
    return elements * t.element_size()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _name(func: Any) -> str:
    return f"{func.namespace}.{func._opname}"


# ---------------------------------------------------------------------------------------------------------------------
# What an op reads and writes
# ---------------------------------------------------------------------------------------------------------------------

_aten = torch.ops.aten

_FREE = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten._unsafe_view.default,
    _aten.detach.default,
}
"""Ops that touch no memory, besides views."""

_SAMPLES = "fusedres.fingerprint"
"""The stem of the op that reads a few values of each tensor: it runs, and counts for nothing."""


def _operands(func: Any, args: tuple, kwargs: dict) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a call reads, and those of its arguments that it writes to."""
    read: list[Tensor] = []
    written: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        tensors = _tensors(value)
        if argument.alias_info is not None and argument.alias_info.is_write and not _leaves_alone(func, args):
            written += tensors
            if argument.name in _ONLY_WRITTEN or func in _OVERWRITES:
                continue
        if func is _aten.native_batch_norm.default and args[5] and argument.name in ("running_mean", "running_var"):
            written += tensors  # its schema does not say so
        if not _only_its_shape(func, args, i):
            read += tensors
    return read, written


def _leaves_alone(func: Any, args: tuple) -> bool:
    """Whether what the schema says is written to is not: running statistics, where there is no batch of them."""
    return _name(func).startswith("fusedres.bn_norm") and args[0] is None


_ONLY_WRITTEN = {"out", "into"}
_OVERWRITES = {_aten.copy_.default, _aten.zero_.default, _aten.fill_.Scalar}


def _only_its_shape(func: Any, args: tuple, index: int) -> bool:
    """Whether this argument is there for its shape: dgrad reads no input but a pending one, wgrad no weight.

    Nor does a max pooling's backward read what was pooled.
    """
    if func is _aten.convolution_backward.default:
        needs_input, needs_weight, _ = args[10]
        return (index == 1 and not needs_weight) or (index == 2 and not needs_input)
    if _name(func).startswith("fusedres.conv_fused_dgrad"):
        return index == 4 and args[5] is None and args[6] == IDENTITY.code
    if func is _aten.max_pool2d_with_indices_backward.default:
        return index == 1
    if _name(func).startswith("fusedres.join_pool_backward"):
        return index == 2
    return func in _OVERWRITES and index == 0


def _again(func: Any, args: tuple) -> Iterator[tuple[Tensor, int]]:
    """The tensors that the op's kernels read a second time, with their bytes."""
    if func is _aten.native_batch_norm.default and args[5]:
        yield args[0], _bytes(args[0])
    if func is _aten.native_batch_norm_backward.default and args[7]:
        yield from ((t, _bytes(t)) for t in args[:2])
    if func is _aten.convolution_backward.default and args[10][0] and args[10][1]:
        yield args[0], _bytes(args[0])


def _flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    count = flop_registry.get(func._overloadpacket)
    if count is not None:
        return count(*args, **kwargs, out_val=out)
    stem = next((stem for stem in FLOPS if f"{_name(func)}_".startswith(f"{stem}_")), None)
    return 0 if stem is None else FLOPS[stem](args, out)


def _each_pixel(y: Tensor, weight: Tensor) -> int:
    """A product with the whole weight for every pixel of ``y``, the convolution's result or the gradient of it."""
    return 2 * (y.numel() // max(y.shape[1], 1)) * weight.numel()


def _written(out: Tensor, args: tuple, index: int) -> Tensor:
    """A result, or the argument that it was written into."""
    return out if len(args) <= index or args[index] is None else args[index]


_POINTWISE = "mkldnn._convolution_pointwise"
"""oneDNN's fused convolution; with a residual its result has the residual's size."""


def _weight_place(args: tuple) -> int:
    """Where oneDNN's fused convolution has its weight: behind the input, and the residual in the form with one."""
    return 2 if isinstance(args[2], Tensor) and args[2].dim() == 4 else 1


FLOPS = {
    "fusedres.conv_wgrad": lambda args, out: _each_pixel(args[0], args[-1]),
    "fusedres.conv_fused_wgrad": lambda args, out: _each_pixel(args[0], args[-1]),
    "fusedres.conv_fused_dgrad": lambda args, out: _each_pixel(args[0], args[3]),
    "fusedres.conv_fused_fprop": lambda args, out: _each_pixel(_written(out[0], args, 10), args[4]),
    "fusedres.conv_fused_join": lambda args, out: _each_pixel(_written(out, args, 14), args[4]),
    "fusedres.conv_epilogue": lambda args, out: _each_pixel(out, args[1]),
    "fusedres.conv_winograd_pack": lambda args, out: 0,
    "fusedres.conv_winograd": lambda args, out: 2 * out.numel() * args[0].shape[1] * 9,  # as the definition has them
    "mkldnn._convolution_pointwise_": lambda args, out: _each_pixel(args[0], args[2]),
    _POINTWISE: lambda args, out: _each_pixel(out, args[_weight_place(args)]),
}
"""Of convolutions that PyTorch does not know; ours by the op's stem, which the kernels of every backend share. Where
one stem begins another, the longer comes first."""


# ---------------------------------------------------------------------------------------------------------------------
# Pretending
# ---------------------------------------------------------------------------------------------------------------------


def _pretend(func: Any, args: tuple, kwargs: dict) -> Any:
    """What ``func`` would return, with no memory touched; what it would write to stays as it is."""
    if _name(func).startswith(_GUARD):
        return True
    if _name(func) == _POINTWISE and func._overloadname == "binary":  # PyTorch has no meta kernel for it
        return torch.empty_like(args[1])
    if func is _aten._local_scalar_dense.default:
        raise ValueError("the model reads a tensor's value in its forward, and phantom tensors have none")
    written = _written_by_alias(func, args, kwargs)
    returns = [
        None if r.alias_info is None else written.get(min(r.alias_info.before_set)) for r in func._schema.returns
    ]
    if any(r is None for r in returns):
        options = {**kwargs, **({"device": "meta"} if "device" in kwargs else {})}
        shapes, options = tree_map_only(Tensor, _to_meta, (args, options))
        out = func(*shapes, **options)
        if func in _CONVOLUTIONS:
            out = _in_layout_of(args, out)
        if func is _aten.native_batch_norm.default and not args[5]:  # nor statistics, where the running ones are used
            out = (out[0], *(t.new_empty(0) for t in out[1:]))
        if func is _aten.native_batch_norm_backward.default:  # its meta kernel makes what nobody asked for, too
            out = tuple(gradient if wanted else None for gradient, wanted in zip(out, args[9]))
        made = tree_map_only(Tensor, _from_meta, (out,) if len(returns) == 1 else out)
        returns = [m if r is None else r for m, r in zip(made, returns)]
    return None if not returns else returns[0] if len(returns) == 1 else tuple(returns)


_GUARD = "fusedres.all_finite"
"""The stem of the op that asks whether something is wrong with an input: of phantoms, nothing is."""


def _written_by_alias(func: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments that are written to, by the name that the schema gives their alias."""
    found = {}
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found[min(argument.alias_info.before_set)] = args[i] if i < len(args) else kwargs.get(argument.name)
    return found


_CONVOLUTIONS = {_aten.convolution.default, _aten.convolution_backward.default}


def _in_layout_of(args: tuple, out: Any) -> Any:
    """What a convolution returns, in channels_last where an operand is so: kernels do that, the meta kernel never."""
    if not any(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in _tensors(args[:3])):
        return out
    return tree_map_only(Tensor, lambda t: t.contiguous(memory_format=_layout(t)), out)


def _layout(t: Tensor) -> torch.memory_format:
    return torch.channels_last if t.dim() == 4 else torch.contiguous_format


def _to_meta(t: Tensor) -> Tensor:
    if t.layout is torch._mkldnn:
        return torch.empty(t.shape, dtype=t.dtype, device="meta")
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _from_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
