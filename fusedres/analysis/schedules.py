"""From recorded ops to the kernels that a schedule would launch for them: eager, or like Inductor's.

The second is a model of ``torch.compile``, not a run of it: convolutions and matrix products are calls into libraries;
what is elementwise is written to memory only where such a call, or too many readers, need it, and is otherwise computed
again inside its readers; a batch norm is one reduction, then elementwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .phantom import Call, Touch

__all__ = ["Kernel", "eager", "inductor_like"]


@dataclass
class Kernel:
    """What a launch reads and writes, by value, in bytes.

    Attributes:
        block: the path of the block that it belongs to, ``None`` outside of all blocks.
        again: bytes read beyond one touch per tensor.
        kind: only kernels of one kind and phase are ever launched as one.
    """

    block: str | None
    backward: bool
    kind: str
    reads: dict[int, int]
    writes: dict[int, int] = field(default_factory=dict)
    again: int = 0
    flops: int = 0

    @property
    def nbytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values()) + self.again


def eager(calls: Iterable[Call]) -> list[Kernel]:
    """Every op on its own, with the passes over its operands that its kernels make."""
    return [_extern(call) for call in calls]


def _extern(call: Call) -> Kernel:
    return Kernel(
        call.block, call.backward, "extern", _by_value(call.reads), _by_value(call.writes), call.again, call.flops
    )


def _by_value(touches: Sequence[Touch]) -> dict[int, int]:
    return {touch.value: touch.nbytes for touch in touches}


# ---------------------------------------------------------------------------------------------------------------------
# Like Inductor
# ---------------------------------------------------------------------------------------------------------------------

_POINTWISE = {
    f"aten.{name}{suffix}"
    for name in (
        *(
            "add",
            "sub",
            "mul",
            "div",
            "neg",
            "rsub",
            "pow",
            "sqrt",
            "rsqrt",
            "exp",
            "lerp",
            "where",
            "clamp",
            "clamp_min",
        ),
        *("relu", "sigmoid", "silu", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "gelu", "tanh", "gt", "lt"),
        *("threshold_backward", "sigmoid_backward", "silu_backward", "hardtanh_backward", "hardswish_backward"),
        *("hardsigmoid_backward", "leaky_relu_backward", "gelu_backward", "tanh_backward", "native_dropout"),
        *(
            "native_dropout_backward",
            "clone",
            "copy",
            "_to_copy",
            "cat",
            "bernoulli",
            "zero",
            "fill",
            "constant_pad_nd",
        ),
        *("zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros", "slice_backward"),
    )
    for suffix in ("", "_")
}
_REDUCTIONS = {"aten.sum", "aten.mean", "aten.var_mean"}

# From torch._inductor.config (realize_reads_threshold and realize_acc_reads_threshold): operands of an elementwise
# expression above which it is stored if it has several readers, and if it has any.
_READS_IF_SHARED = 4
_READS = 8


def inductor_like(calls: Sequence[Call]) -> list[Kernel]:
    """The kernels of a fusing compiler that leaves convolutions, matrix products and pooling to libraries."""
    return _Fuser(calls).kernels


class _Fuser:
    """Goes through the calls once; an elementwise value is an expression over stored values until it is stored."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.kernels: list[Kernel] = []
        self._operands: dict[int, dict[int, int]] = {}  # of what is not stored: the stored values it is computed from
        self._nbytes: dict[int, int] = {}
        self._homes: dict[int, Call] = {}
        self._inside: dict[int, int] = {}  # the kernel that computes a value which is not stored
        self._made_by: dict[int, int] = {}
        self._readers = Counter(touch.value for call in calls for touch in call.reads)
        self._temporaries = 0
        for call in calls:
            self._add(call)
        for value in [value for value in self._operands if not self._readers[value]]:
            self._store(value)  # what nobody reads is a result

    def _add(self, call: Call) -> None:
        if call.op == "aten.native_batch_norm":
            self._norm(call)
        elif call.op == "aten.native_batch_norm_backward":
            self._norm_backward(call)
        elif call.op in _POINTWISE:
            self._express(call, call.writes, call.reads)
        elif call.op in _REDUCTIONS:
            self._reduce(call, call.reads, call.writes)
        else:
            for touch in call.reads:
                self._store(touch.value)
            self.kernels.append(_extern(call))
            self._stored(call.writes, len(self.kernels) - 1)

    def _norm(self, call: Call) -> None:
        out, *statistics = call.writes
        if not call.again:  # running statistics, which are there already
            self._express(call, (out,), call.reads)
            return
        self._reduce(call, call.reads[:1], statistics)
        # Mean and rstd are read again; what of the running statistics was updated comes last on both sides.
        updated = len(statistics) - 2
        self._express(call, (out,), (*call.reads[: len(call.reads) - updated], *statistics[:2]))

    def _norm_backward(self, call: Call) -> None:
        sums = call.writes[1:] or (self._temporary(call),)
        self._reduce(call, call.reads, sums)
        self._express(call, call.writes[:1], (*call.reads, *sums))

    def _temporary(self, call: Call) -> Touch:
        self._temporaries -= 1
        return Touch(self._temporaries, 0)

    def _express(self, call: Call, made: Sequence[Touch], reads: Sequence[Touch]) -> None:
        operands: dict[int, int] = {}
        for touch in reads:
            operands.update(self._expression(touch))
        for touch in made:
            self._operands[touch.value] = operands
            self._nbytes[touch.value] = touch.nbytes
            self._homes[touch.value] = call
            shared = self._readers[touch.value] > 1
            if len(operands) > (_READS_IF_SHARED if shared else _READS):
                self._store(touch.value)

    def _expression(self, touch: Touch) -> dict[int, int]:
        return self._operands.get(touch.value) or {touch.value: touch.nbytes}

    def _reduce(self, call: Call, reads: Sequence[Touch], writes: Sequence[Touch]) -> None:
        operands: dict[int, int] = {}
        for touch in reads:
            operands.update(self._expression(touch))
        index = self._launch(call, "reduction", operands, _by_value(writes))
        self._stored(writes, index)
        for touch in reads:
            if touch.value in self._operands:
                self._inside.setdefault(touch.value, index)

    def _store(self, value: int) -> None:
        """Writes an expression's value to memory: in a kernel that computes it anyway, or in one of its own."""
        operands = self._operands.pop(value, None)
        if operands is None:
            return
        home, nbytes = self._homes[value], self._nbytes[value]
        index = self._inside.get(value)
        if index is not None and self.kernels[index].backward == home.backward:
            self.kernels[index].writes[value] = nbytes
        else:
            index = self._launch(home, "pointwise", operands, {value: nbytes})
        self._made_by[value] = index

    def _stored(self, writes: Sequence[Touch], index: int) -> None:
        for touch in writes:
            self._operands.pop(touch.value, None)
            self._made_by[touch.value] = index

    def _launch(self, call: Call, kind: str, reads: dict[int, int], writes: dict[int, int]) -> int:
        """A new kernel, or an earlier one that reads some of the same and has what this one needs."""
        needs = max((self._made_by.get(value, -1) for value in reads), default=-1)
        largest = max(reads.values(), default=0)
        for index in range(len(self.kernels) - 1, needs, -1):
            kernel = self.kernels[index]
            same = (kernel.kind, kernel.block, kernel.backward) == (kind, call.block, call.backward)
            if same and any(kernel.reads.get(value) == largest == nbytes for value, nbytes in reads.items()):
                kernel.reads.update(reads)
                kernel.writes.update(writes)
                return index
        self.kernels.append(Kernel(call.block, call.backward, kind, dict(reads), dict(writes)))
        return len(self.kernels) - 1
