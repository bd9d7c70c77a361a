"""Patched models in PyTorch's own parallel engines, beside stock ones."""

from __future__ import annotations

import parallel
import pytest
import torch

from fusedres.testing import assert_within_budget

DDP = {
    "buckets": {"options": {"bucket_cap_mb": 0.002}},
    "bucket views": {"options": {"gradient_as_bucket_view": True}},
    "no_sync": {"accumulates": True},
    "unused parameters": {"options": {"find_unused_parameters": True}, "skips": True},
    "static graph": {"options": {"static_graph": True}},
}


@pytest.mark.parametrize(("order", "size"), [("before", 2), ("after", 3)])
@pytest.mark.parametrize("case", DDP)
def test_gradients_that_ddp_averages(gang, case, order, size):
    settings = [DDP[case].get(name, default) for name, default in (("options", {}), ("accumulates", 0), ("skips", 0))]

    def gradients(order: str, dtype: torch.dtype) -> list[dict]:
        return gang.run(parallel.ddp_gradients, [(order, dtype, *settings)] * size)

    ours, stock = gradients(order, torch.float32), gradients("stock", torch.float32)[0]
    exact = gradients("stock", torch.float64)[0]
    for name in exact:
        assert_within_budget(ours[0][name], stock[name], exact[name], name)
        assert all(torch.equal(ours[0][name], each[name]) for each in ours), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", ["before", "after"])
def test_fully_sharded(gang, order, dtype):
    ours, *others = gang.run(parallel.sharded_training, [(order, dtype)] * 2)
    stock = gang.run(parallel.sharded_training, [("stock", dtype)] * 2)[0]
    exact = gang.run(parallel.sharded_training, [("stock", torch.float64)] * 2)[0]
    assert (ours.pop("fused"), ours.pop("restored")) == (4, 4)
    assert (stock.pop("fused"), stock.pop("restored")) == (0, 0)
    assert ours.pop("classes") == stock.pop("classes") == ["FSDPNet", "FSDPResidual"]
    for name in stock:
        if dtype == torch.float64:
            torch.testing.assert_close(ours[name], stock[name], msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert_within_budget(ours[name], stock[name], exact[name], name)
    assert all(torch.equal(ours["head.weight"], other["head.weight"]) for other in others)


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_process_that_is_gone_is_an_error_in_time(gang, how):
    timeout = 3 if how == "hangs" else 30
    (kind, said), (other, _) = gang.outcomes(parallel.abandoned, [(how,)] * 2, timeout)
    assert kind == "value", said
    message, seconds = said
    assert "synchronised batch norm: could not" in message and "of the 2 processes" in message
    assert seconds < timeout + 2
    assert other == ("value" if how == "hangs" else "error")
