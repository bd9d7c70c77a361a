"""Tuning on a GPU: the tables decide what "auto" runs, and the numbers stay within the budget."""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres import triton as backend
from fusedres.engine import verdict
from fusedres.testing import channels_last, compare
from fusedres.triton import tuning

pytestmark = pytest.mark.skipif(backend.missing() is not None, reason=str(backend.missing()))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path))
    tuning._table.cache_clear(), tuning._looked_up.cache_clear(), verdict.forget()
    yield
    tuning._table.cache_clear(), tuning._looked_up.cache_clear(), verdict.forget()


def test_what_won_runs_and_has_stocks_numbers():
    block = fusedres.nn.BottleneckBlock(64, 64).cuda().to(memory_format=torch.channels_last)

    def draw(seed: int) -> list[torch.Tensor]:
        return [channels_last((8, 64, 28, 28), seed=seed).cuda()]

    report = fusedres.tune(block, draw(0)[0])
    assert not any(v.wrong for v in report.verdicts.values()), str(report)
    (training,) = (v for key, v in report.verdicts.items() if key.startswith("training"))
    assert (type(block.train()(draw(0)[0]).grad_fn).__name__ == "BlockFunctionBackward") is (
        training.backend != "stock"
    )

    def automatic(module: torch.nn.Module) -> None:
        forward = module.forward

        def call(x: torch.Tensor) -> torch.Tensor:
            with fusedres.use_backend("auto"):
                return forward(x)

        module.forward = call

    with fusedres.use_backend("stock"):
        compare(block, automatic, draw).check()
