"""Grouped convolutions of ResNeXt-50 on a GPU, with what surrounds them, against cuDNN's with the same passes around.

``pytest bench/ops/test_conv_grouped.py`` on a GPU measures; elsewhere the vendor's run once on small shapes, as a smoke
test, with the formulas in plain PyTorch in the kernel's place.
"""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import Contest, group_of
from bench.ops.gpu import DEVICE, graphed, repeats
from bench.shapes import DEPTHWISE, GROUPED, SMOKE_MOST
from fusedres import select
from fusedres.benchmarking.grouped import CONTESTANTS, KINDS, Convolved, check

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("conv", [*GROUPED, DEPTHWISE], ids=str)
def test_conv_grouped(race, smoke, conv, dtype, kind, contestant):
    if DEVICE == "cpu" and not smoke:
        pytest.skip("needs a GPU")
    conv = conv.within(SMOKE_MOST) if smoke else conv
    group = group_of(f"conv_fused_{kind}", dtype, conv.shape, f"3x3, {conv.groups} groups, stride {conv.stride}")
    here = "reference" if DEVICE == "cpu" else "cuda"

    def contest():
        convolved = Convolved(conv.shape, conv.stride, conv.groups, dtype, DEVICE)
        assert convolved.flops == conv.flops

        def made(name):
            return lambda _: graphed([convolved.call(kind, here if name == "cuda" else name)])

        return Contest(
            group,
            (),
            {name: made(name) for name in CONTESTANTS},
            {"cuda": lambda: judged(convolved, kind, here)},
            repeats() * convolved.moved(kind),
            repeats() * convolved.flops,
            absent={"cuda": None if smoke else select.why_not("cuda", DEVICE, dtype)},
            memory=False,
        )

    race(group, contestant, contest, DEVICE)


def judged(convolved, kind, backend):
    found = check(convolved, kind, backend)
    assert found == "ok", found
