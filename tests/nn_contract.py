"""What every block of ``fusedres.nn`` promises; a test file derives a class for each of its blocks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torchvision_shim import torchvision_ops

from fusedres.testing import channels_last, compare

__all__ = ["RUNS", "SHAPES", "BlockContract", "ResidualContract"]

SHAPES: dict[str, dict[str, int]] = {
    "identity": {"in_channels": 24, "out_channels": 24},
    "projection": {"in_channels": 16, "out_channels": 32, "stride": 2},
}
RUNS = [{}, {"dtype": torch.bfloat16}, {"autocast": torch.bfloat16}]


class BlockContract:
    """A fused block is the plain one: numbers, keys, copies.

    Attributes:
        plain, fused: the two classes, whose constructors agree.
        shapes: arguments for both, by name.
        options: more arguments for the fused class alone.
        has_bias: whether they take ``bias``.
    """

    plain: ClassVar[Callable[..., nn.Module]]
    fused: ClassVar[Callable[..., nn.Module]]
    shapes: ClassVar[dict[str, dict[str, Any]]] = SHAPES
    options: ClassVar[dict[str, Any]] = {}
    has_bias: ClassVar[bool] = True

    def fuse(self, arguments: dict[str, Any], **options: Any) -> Callable[[nn.Module], nn.Module]:
        """Makes the fused block with a plain one's state."""

        def make(plain: nn.Module) -> nn.Module:
            block = self.fused(**arguments, **self.options, **options).train(plain.training)
            block.load_state_dict(plain.state_dict())
            return block.to(next(plain.parameters()).dtype)

        return make

    def inputs(self, arguments: dict[str, Any], size: int = 12, **run: torch.dtype) -> Callable[[int], list[Tensor]]:
        """From a seed, the input; in bfloat16 a larger one, for the kinks of ReLU to even out."""
        channels = arguments.get("in_channels", arguments.get("channels"))
        n, size = (8, 24) if run else (4, size)
        return lambda seed: [channels_last((n, channels, size, size), seed=seed)]

    @pytest.mark.parametrize("run", RUNS, ids=str)
    @pytest.mark.parametrize("mode", ["train", "infer"])
    def test_numbers(self, shape, mode, run):
        plain = self.plain(**shape).train(mode == "train")
        compare(plain, self.fuse(shape), self.inputs(shape, **run), backward=mode != "infer", **run).check()

    def test_frozen_statistics(self, shape):
        compare(self.plain(**shape).eval(), self.fuse(shape), self.inputs(shape)).check()

    def test_low_memory_and_no_bias(self, shape):
        arguments = {**shape, "bias": False} if self.has_bias else shape
        compare(self.plain(**arguments).train(), self.fuse(arguments, memory="low"), self.inputs(shape)).check()

    def test_odd_sizes_and_contiguous_layout(self, shape):
        plain = self.plain(**shape).train()
        inputs = self.inputs(shape, 13)
        compare(plain, self.fuse(shape), lambda seed: [x.contiguous() for x in inputs(seed)]).check()

    def test_empty_batch(self, shape):
        block = self.fused(**shape, **self.options).eval()
        x = self.inputs(shape)(0)[0]
        assert block(x[:0]).shape == (0, *block(x).shape[1:])

    def test_keys_both_ways(self, shape):
        plain, fused = self.plain(**shape), self.fused(**shape, **self.options)
        assert list(fused.state_dict()) == list(plain.state_dict())
        plain.load_state_dict(fused.state_dict())
        fused.load_state_dict(plain.state_dict())

    def test_copies_and_files(self, shape):
        block = self.fused(**shape, **self.options).eval()
        x = self.inputs(shape)(0)[0]
        with torch.no_grad():
            expected = block(x)
            file = io.BytesIO()
            torch.save(block, file)
            file.seek(0)
            for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
                assert torch.equal(other(x), expected)

    def test_unknown_memory_is_refused(self, shape):
        with pytest.raises(ValueError, match="memory must be 'auto' or 'low', got 'high'"):
            self.fused(**shape, memory="high")


class ResidualContract(BlockContract):
    """A block with a join.

    Attributes:
        last: the module with which the branch ends.
    """

    last: ClassVar[str]

    @pytest.mark.parametrize("run", [{}, {"autocast": torch.bfloat16}], ids=str)
    def test_drop_path(self, shape, run):
        drop = torchvision_ops().StochasticDepth(0.4, "row")
        plain = self.plain(**shape).train()
        plain.get_submodule(self.last).register_forward_hook(lambda module, args, out: drop(out))
        plain.register_forward_pre_hook(_seed)

        def fuse(stock: nn.Module) -> nn.Module:
            block = self.fuse(shape, drop_path=0.4)(stock)
            block.register_forward_pre_hook(_seed)
            return block

        compare(plain, fuse, self.inputs(shape, **run), **run).check()

    def test_drop_path_is_for_training_and_has_no_keys(self, shape):
        plain = self.plain(**shape).eval()
        fused = self.fuse(shape, drop_path=0.4)(plain)
        assert list(fused.state_dict()) == list(plain.state_dict())
        compare(plain, self.fuse(shape, drop_path=0.4), self.inputs(shape), backward=False).check()

    def test_a_branch_that_is_always_dropped(self, shape):
        block = self.fused(**shape, **self.options, drop_path=1.0).train()
        x = self.inputs(shape)(0)[0].requires_grad_()
        block(x).sum().backward()
        for name, parameter in block.named_parameters():
            if name.startswith("conv"):
                assert not parameter.grad.any(), name

    @pytest.mark.parametrize("p", [-0.1, 1.1])
    def test_other_probabilities_are_refused(self, shape, p):
        with pytest.raises(ValueError, match=f"drop_path must be between 0 and 1, got {p}"):
            self.fused(**shape, drop_path=p)


def _seed(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
