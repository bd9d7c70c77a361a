"""Which backend runs, and why another does not."""

from __future__ import annotations

import threading

import pytest
import torch
from described import basic, fuse

import fusedres
from fusedres import env, select
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

needs_library = pytest.mark.skipif(env.library_missing() is not None, reason=str(env.library_missing()))


@pytest.fixture(autouse=True)
def fresh():
    """The choices are remembered, also those made with a library that a test takes away."""
    caches = [f for f in vars(select).values() if hasattr(f, "cache_clear")]
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@needs_library
def test_the_cpus_kernels_come_first():
    assert select.backend_for("cpu", torch.float32) == "cpu"
    assert select.backend_for(torch.device("cpu"), torch.bfloat16) == "cpu"


def test_float64_and_a_missing_library_leave_the_reference(monkeypatch):
    assert select.backend_for("cpu", torch.float64) == "reference"
    select._resolve.cache_clear()
    monkeypatch.setattr(env, "library_missing", lambda: "it is not built")
    assert select.backend_for("cpu", torch.float32) == "reference"
    assert select.why_not("cpu", "cpu", torch.float32) == "it is not built"


def test_every_backend_says_yes_or_why_not():
    for name in select.BACKENDS:
        for device in ("cpu", "cuda", "mps"):
            for dtype in (torch.float32, torch.float64, torch.int64):
                reason = select.why_not(name, device, dtype)
                assert reason is None or len(reason) > 10
    assert "cuda" in select.why_not("cpu", "cuda", torch.float32)
    assert "torch.float64" in select.why_not("cpu", "cpu", torch.float64)
    assert select.why_not("reference", "mps", torch.float64) is None


def test_an_unknown_backend_raises():
    with (
        pytest.raises(ValueError, match=r"'auto' or one of 'cpu', .*'reference', got 'tpu'"),
        fusedres.use_backend("tpu"),
    ):
        pass
    with pytest.raises(ValueError, match="got 'tpu'"):
        select.why_not("tpu", "cpu", torch.float32)


def test_a_forced_backend_that_cannot_run_raises_with_the_reason():
    with fusedres.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' was asked for, but .*float64"):
        select.backend_for("cpu", torch.float64)
    block = basic().double().train()
    fuse(block)
    with fusedres.use_backend("cpu"), pytest.raises(RuntimeError, match="was asked for"):
        block(channels_last((2, 24, 4, 4), torch.float64))


def test_forcing_nests_and_ends_with_its_block():
    assert select.forced_backend() == "auto"
    with fusedres.use_backend("reference"):
        with fusedres.use_backend("auto"):
            assert select.forced_backend() == "auto"
        assert select.backend_for("cpu", torch.float32) == "reference"
        with pytest.raises(KeyError), fusedres.use_backend("stock"):
            raise KeyError
        assert select.forced_backend() == "reference"
    assert select.forced_backend() == "auto"


def test_a_calls_backend_comes_before_the_threads():
    with fusedres.use_backend("stock"):
        assert select.backend_for("cpu", torch.float32, "reference") == "reference"


def test_forcing_concerns_this_thread_alone():
    seen = []
    with fusedres.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(select.forced_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_library)])
def test_kernels_of_a_backend(backend):
    chosen = select.kernels("cpu", torch.float32, backend)
    assert chosen.backend == backend
    for name, op in OPS.items():
        assert getattr(chosen, name) is op.overload(backend if backend in op.kernels else "reference")


def test_fused_references_are_forced_and_lifted():
    answer = object()
    with select.fused_references(lambda *args: answer):
        found = select.kernels("cpu", torch.float32)
        assert found.backend == "reference" and found.fuses() is answer and not found.folds
        with select.use_backend("stock"):
            assert select.forced_backend() == "stock"
    found = select.kernels("cpu", torch.float32, "reference")
    assert found.fuses is None and found.folds and select.forced_backend() == "auto"


@pytest.mark.parametrize(("device_type", "expected"), [("cpu", False), ("cuda", True)])
def test_measurements_decide_where_nothing_is_known_beforehand(device_type, expected):
    assert select.by_measurement(device_type) is expected
    assert not select.by_measurement(device_type, "reference")
    with select.use_backend("reference"):
        assert not select.by_measurement(device_type)
