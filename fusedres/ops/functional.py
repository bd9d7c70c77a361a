"""The public functions: a fused chain, or a whole residual block, as one call and one autograd node.

Each is the composition of stock PyTorch functions that its docstring states, run by the one engine
(:mod:`fusedres.engine`) as data: the forward keeps raw tensors and four numbers per channel, the backward recomputes
the rest. All of them

* take ``[N, C, H, W]`` in float32, bfloat16, float16 (float64 runs as reference), on one device, channels_last or
  contiguous (anything else is copied once), with zero-size batches;
* are differentiable once in every floating-point argument except the running statistics, which are updated in place
  when ``training``, as ``F.batch_norm`` does (``momentum`` is a number; a cumulative average is the module's business);
* keep per-channel vectors in the dtype of ``x`` or in float32, and statistics in float32 (float64 for float64);
* follow autocast: convolutions run in its dtype, statistics stay in float32;
* raise, before any kernel runs, TypeError for a wrong type or dtype and ValueError for shapes, channels, devices or
  values that do not fit, naming the argument and the shapes; and, as stock PyTorch, ValueError for a training batch
  with one value per channel.

``act`` is a name from :data:`fusedres.ops.activations.ACTIVATIONS` or an :class:`~fusedres.ops.activations.Activation`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..block import Act, Block, Conv, Norm, link_plans
from ..engine import IDENTITY_SHORTCUT, ConvSlot, Link, NormSlot, Program, execute, execute_stock
from .activations import IDENTITY, RELU, Activation, activation
from .checks import Checked, check_input

__all__ = [
    "ConvParams",
    "NormParams",
    "bn_act",
    "bn_act_conv",
    "conv_affine_act",
    "conv_bn_act",
    "join",
    "residual_block",
]

Pair = int | tuple[int, int]
Padding = int | tuple[int, int] | str
_PLAIN = Link(None, IDENTITY, None)


def _run(program: Program, x: Tensor, residual: Tensor | None, tensors: list[Tensor | None]) -> Tensor:
    """The engine, or stock PyTorch for subclasses of Tensor, which may mean something else by an op."""
    runner = execute if type(x) in (Tensor, torch.nn.Parameter) else execute_stock
    return runner(program, x, residual, tensors)


def _joined(branch: tuple[Link, ...], residual: Tensor | None, act: Activation) -> Program:
    """``act(branch + residual)``; without a residual the activation belongs to the branch's last link."""
    if residual is None:
        return Program((*branch[:-1], branch[-1]._replace(act=act)), None, IDENTITY)
    return Program(branch, IDENTITY_SHORTCUT, act)


# ---------------------------------------------------------------------------------------------------------------------
# Chains of one convolution or none
# ---------------------------------------------------------------------------------------------------------------------


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str | Activation = RELU,
) -> Tensor:
    """Convolution, batch norm, residual and activation: ``act(batch_norm(conv2d(x, weight, bias)) + residual)``.

    With ``training=False`` and no gradients wanted, the norm, the residual and the activation run inside the
    convolution. Post-activation order of He et al. (2016, "Deep Residual Learning for Image Recognition", figure 2);
    the norm is Ioffe and Szegedy's (2015).

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[K, C / groups, R, S]``, of ``x``'s dtype.
        bias: ``[K]``, of ``x``'s dtype, or ``None``.
        gamma, beta: ``[K]`` or ``None`` for one and zero.
        running_mean, running_var: ``[K]``; updated in place when ``training``, and may then be ``None``.
        residual: of the result's shape and of ``x``'s dtype, or ``None``.
        stride, padding, dilation, groups: as in ``F.conv2d``; ``padding="same"`` only where it is even.
        training: normalise with the statistics of this batch, not with the running ones.
        momentum: the weight of this batch in the running statistics.

    Returns:
        ``[N, K, H', W']`` of ``x``'s dtype (under autocast, of the dtype that stock PyTorch's sum has).

    Raises:
        TypeError, ValueError: see :mod:`fusedres.ops.functional`.
    """
    checked, g = check_input("conv_bn_act", x).conv(weight, bias, stride, padding, dilation, groups)
    checked.norm(gamma, beta, running_mean, running_var, training, momentum)
    if residual is not None:
        checked.residual(residual)
    links = Link(None, IDENTITY, ConvSlot(0, g)), Link(NormSlot(2, training, momentum, eps), IDENTITY, None)
    tensors = [weight, bias, gamma, beta, running_mean, running_var]
    return _run(_joined(links, residual, activation(act)), x, residual, tensors)


def bn_act_conv(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str | Activation = RELU,
) -> Tensor:
    """Pre-activation: ``conv2d(act(batch_norm(x)), weight, bias) + residual``.

    The order of He et al. (2016, "Identity Mappings in Deep Residual Networks", figure 1b). The normalised input is
    never stored; nothing follows the addition.

    Args:
        x: ``[N, C, H, W]``.
        gamma, beta: ``[C]`` or ``None`` for one and zero.
        running_mean, running_var: ``[C]``; updated in place when ``training``, and may then be ``None``.
        weight: ``[K, C / groups, R, S]``, of ``x``'s dtype.
        bias: ``[K]``, of ``x``'s dtype, or ``None``.
        residual: of the result's shape and of ``x``'s dtype, or ``None``.
        stride, padding, dilation, groups, training, momentum, eps, act: as in :func:`conv_bn_act`.

    Returns:
        ``[N, K, H', W']``.

    Raises:
        TypeError, ValueError: see :mod:`fusedres.ops.functional`.
    """
    checked = check_input("bn_act_conv", x)
    checked.norm(gamma, beta, running_mean, running_var, training, momentum)
    checked, g = checked.conv(weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        checked.residual(residual)
    links = Link(NormSlot(0, training, momentum, eps), activation(act), ConvSlot(4, g)), _PLAIN
    tensors = [gamma, beta, running_mean, running_var, weight, bias]
    return _run(_joined(links, residual, IDENTITY), x, residual, tensors)


def bn_act(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str | Activation = RELU,
) -> Tensor:
    """Batch norm, residual and activation: ``act(batch_norm(x) + residual)``.

    Two passes over the tensor in training (statistics, then everything else), one in inference. Autograd keeps ``x``,
    the residual and four numbers per channel.

    Args:
        x: ``[N, C, H, W]``.
        gamma, beta: ``[C]`` or ``None`` for one and zero.
        running_mean, running_var: ``[C]``; updated in place when ``training``, and may then be ``None``.
        residual: of ``x``'s shape and dtype, or ``None``.
        training, momentum, eps, act: as in :func:`conv_bn_act`.

    Returns:
        a tensor like ``x``.

    Raises:
        TypeError, ValueError: see :mod:`fusedres.ops.functional`.
    """
    checked = check_input("bn_act", x)
    checked.norm(gamma, beta, running_mean, running_var, training, momentum)
    if residual is not None:
        checked.residual(residual)
    links = (Link(NormSlot(0, training, momentum, eps), IDENTITY, None),)
    program = _joined(links, residual, activation(act))
    return _run(program, x, residual, [gamma, beta, running_mean, running_var])


# ---------------------------------------------------------------------------------------------------------------------
# Affines instead of norms
# ---------------------------------------------------------------------------------------------------------------------


def _affine(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, channels: int, first: int
) -> tuple[NormSlot | None, list[Tensor | None]]:
    """An affine as the norm of a tensor whose mean is 0 and whose variance is 1, and the four operands of its slot."""
    if scale is None and shift is None:
        return None, []
    given = shift if scale is None else scale
    dtype = torch.float64 if x.dtype == torch.float64 else given.dtype
    constants = [
        torch.zeros(channels, dtype=dtype, device=x.device),
        torch.ones(channels, dtype=dtype, device=x.device),
    ]
    return NormSlot(first, False, 0.0, 0.0), [scale, shift, *constants]


def join(
    y: Tensor,
    residual: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    act: str | Activation = RELU,
) -> Tensor:
    """One pass: ``act((scale * y + shift) + (residual_scale * residual + residual_shift))``.

    The junction of a residual block; with an affine on both sides, the projection shortcut of He et al. (2016, "Deep
    Residual Learning for Image Recognition", eq. 2). The backward writes both gradients in one pass too.

    Args:
        y: ``[N, C, H, W]``.
        residual: of ``y``'s shape and dtype, or ``None``.
        scale, shift, residual_scale, residual_shift: ``[C]`` each, or ``None`` for one and zero.

    Returns:
        a tensor like ``y``.

    Raises:
        TypeError, ValueError: see :mod:`fusedres.ops.functional`; ValueError also for an affine without its residual.
    """
    checked = check_input("join", y, "y")
    affines = {"scale": scale, "shift": shift, "residual_scale": residual_scale, "residual_shift": residual_shift}
    for name, value in affines.items():
        if value is not None:
            checked.vector(name, value)
    if residual is not None:
        checked.residual(residual)
    elif residual_scale is not None or residual_shift is not None:
        raise ValueError("join: residual_scale and residual_shift need a residual")
    norm, tensors = _affine(y, scale, shift, y.shape[1], 0)
    side, side_tensors = _affine(y, residual_scale, residual_shift, y.shape[1], len(tensors))
    program = _joined((Link(norm, IDENTITY, None),), residual, activation(act))
    if side is not None:
        program = program._replace(shortcut=(Link(side, IDENTITY, None),))
    return _run(program, y, residual, tensors + side_tensors)


def conv_affine_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    act: str | Activation = RELU,
) -> Tensor:
    """Convolution with an affine per channel: ``act(scale * conv2d(x, weight) + shift + residual)``.

    Made for inference: where no gradient is wanted, all of it runs inside the convolution. Where one is, the same
    numbers come from the training path, which is differentiable in every argument.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[K, C / groups, R, S]``, of ``x``'s dtype.
        scale, shift: ``[K]`` or ``None`` for one and zero.
        residual: of the result's shape and of ``x``'s dtype, or ``None``.
        stride, padding, dilation, groups, act: as in :func:`conv_bn_act`.

    Returns:
        ``[N, K, H', W']``.

    Raises:
        TypeError, ValueError: see :mod:`fusedres.ops.functional`.
    """
    checked, g = check_input("conv_affine_act", x).conv(weight, None, stride, padding, dilation, groups)
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None:
            checked.vector(name, value)
    if residual is not None:
        checked.residual(residual)
    norm, tensors = _affine(x, scale, shift, weight.shape[0], 2)
    links = Link(None, IDENTITY, ConvSlot(0, g)), Link(norm, IDENTITY, None)
    return _run(_joined(links, residual, activation(act)), x, residual, [weight, None, *tensors])


# ---------------------------------------------------------------------------------------------------------------------
# A whole block
# ---------------------------------------------------------------------------------------------------------------------


class ConvParams(NamedTuple):
    """A convolution as a step of :func:`residual_block`; the fields are the arguments of ``F.conv2d``."""

    weight: Tensor
    bias: Tensor | None = None
    stride: Pair = 1
    padding: Padding = 0
    dilation: Pair = 1
    groups: int = 1


class NormParams(NamedTuple):
    """A batch norm as a step of :func:`residual_block`; the fields are the arguments of ``F.batch_norm``."""

    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


Step = ConvParams | NormParams | Activation | str


def residual_block(
    x: Tensor,
    branch: tuple[Step, ...],
    shortcut: tuple[Step, ...] | None = (),
    *,
    act: str | Activation = RELU,
    memory: str = "auto",
) -> Tensor:
    """A whole residual block as one autograd node: ``act(branch(x) + shortcut(x))``.

    He et al. (2016, "Deep Residual Learning for Image Recognition"), eq. 1 with ``shortcut=()`` and eq. 2 with a
    projection. A basic block with a projection is ::

        residual_block(x, (ConvParams(w1, padding=1, stride=2), NormParams(*bn1), "relu",
                           ConvParams(w2, padding=1), NormParams(*bn2)),
                       (ConvParams(w3, stride=2), NormParams(*bn3)))

    Args:
        x: ``[N, C, H, W]``.
        branch: the steps from the input to the addition: convolutions, batch norms and activations. An activation
            follows a norm or a convolution; between two norms there is a convolution.
        shortcut: the projection's steps, ``()`` for the identity, ``None`` for no addition at all.
        act: behind the addition.
        memory: ``"low"`` recomputes in backward the last raw tensor of a chain that ends in a 1x1 convolution.

    Returns:
        ``[N, K, H', W']``.

    Raises:
        TypeError, ValueError: see :mod:`fusedres.ops.functional`; ValueError also for steps in an order that the
            engine does not know.
    """
    if memory not in ("auto", "low"):
        raise ValueError(f"residual_block: memory must be 'auto' or 'low', got {memory!r}")
    plan = _planned(
        tuple(map(_kind, branch)), None if shortcut is None else tuple(map(_kind, shortcut)), activation(act)
    )
    binder = _Binder(check_input("residual_block", x))
    links, shape = binder.chain("branch", branch, plan.branch)
    if shortcut is None:
        return _run(Program(links, None, IDENTITY, memory=memory), x, None, binder.tensors)
    side, side_shape = binder.chain("shortcut", shortcut, plan.shortcut)
    if shape != side_shape:
        made = f"the branch makes {shape} of x of shape {tuple(x.shape)}, the shortcut {side_shape}"
        raise ValueError(f"residual_block: {made}")
    return _run(Program(links, side, plan.act, memory=memory), x, None, binder.tensors)


def _kind(step: Step) -> type | Activation:
    """A step without its operands."""
    if isinstance(step, (ConvParams, NormParams)):
        return type(step)
    if isinstance(step, (str, Activation)):
        return activation(step)
    expected = "ConvParams, NormParams or an activation"
    raise TypeError(f"residual_block: a step must be {expected}, got {type(step).__name__}")


class _Planned(NamedTuple):
    """Links whose norms and convolutions are indices into the steps."""

    branch: tuple[Any, ...]
    shortcut: tuple[Any, ...]
    act: Activation


@cache
def _planned(
    branch: tuple[type | Activation, ...], shortcut: tuple[type | Activation, ...] | None, act: Activation
) -> _Planned:
    """Groups the steps into links as :mod:`fusedres.block` does, with a step's index in the place of a path."""
    if shortcut is None and act != IDENTITY:  # nothing is added: the activation is the branch's last step
        branch, act = (*branch, act), IDENTITY
    described = Block(_described(branch), None if shortcut is None else _described(shortcut), act)
    plan = link_plans(described)
    return _Planned(plan.branch, plan.shortcut or (), act)


def _described(kinds: tuple[type | Activation, ...]) -> tuple[Any, ...]:
    of_type = {ConvParams: Conv, NormParams: Norm}
    return tuple(Act(k) if isinstance(k, Activation) else of_type[k](str(i)) for i, k in enumerate(kinds))


class _Binder:
    """Checks the operands of a block along its chains and collects them in one flat list."""

    def __init__(self, start: Checked) -> None:
        self.start = start
        self.tensors: list[Tensor | None] = []

    def chain(
        self, name: str, steps: tuple[Step, ...], plans: tuple[Any, ...]
    ) -> tuple[tuple[Link, ...], tuple[int, ...]]:
        """The links of a chain, and the shape that it makes of the input."""
        links, value = [], self.start
        for plan in plans:
            norm = conv = None
            if plan.norm is not None:
                norm = self._norm(value, steps[int(plan.norm[0])], f"{name}[{plan.norm[0]}].")
            if plan.conv is not None:
                conv, value = self._conv(value, steps[int(plan.conv[0])], f"{name}[{plan.conv[0]}].")
            links.append(Link(norm, plan.act, conv))
        return tuple(links), value.shape

    def _norm(self, value: Checked, step: NormParams, prefix: str) -> NormSlot:
        value.norm(*step[:6], prefix)
        self.tensors += step[:4]
        return NormSlot(len(self.tensors) - 4, step.training, step.momentum, step.eps)

    def _conv(self, value: Checked, step: ConvParams, prefix: str) -> tuple[ConvSlot, Checked]:
        value, g = value.conv(*step, prefix)
        self.tensors += step[:2]
        return ConvSlot(len(self.tensors) - 2, g), value
