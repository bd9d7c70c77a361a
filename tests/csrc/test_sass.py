"""The machine code of the CUDA kernels: no spills, wide loads, matrix instructions, and the recorded resources."""

from __future__ import annotations

import json

import pytest
import sass

if sass.cuobjdump() is None:
    pytest.skip("needs cuobjdump, from CUDA or from Triton", allow_module_level=True)
if sass.nvcc_version() is None or not sass.objects():
    pytest.skip("needs a finished build with nvcc", allow_module_level=True)

BUILT = {path.name.partition(".")[0]: sass.kernels(sass.cuobjdump(), path) for path in sass.objects()}
RECORDED = json.loads(sass.TABLE.read_text())
VECTOR_WIDTHS = ("Li4", "Li8")  # float's and the narrower types' elements in 16 bytes


@pytest.mark.parametrize("stem", BUILT)
def test_nothing_is_spilled(stem):
    """Registers that do not fit go to the stack; so do arrays that are indexed at run time."""
    assert {name for name, kernel in BUILT[stem].items() if kernel["stack"]} == set()


@pytest.mark.parametrize("stem", [stem for stem in BUILT if stem != "bn_norm"])
def test_vector_kernels_load_16_bytes(stem):
    vectors = {name for name in BUILT[stem] if any(width in name for width in VECTOR_WIDTHS)}
    assert vectors
    assert {name for name in vectors if not BUILT[stem][name]["loads_128_bits"]} == set()


# A thread's 128-bit loads under way at once: with the hundreds of threads of a processor, more than a memory's latency.
IN_FLIGHT = {"bn_stats_rows": 8, "bn_stats_planes": 8, "bn_join": 8, "join_fwd": 2, "join_stats": 2}
IN_FLIGHT |= {"join_reduce": 3, "join_apply": 4, "join_backward": 4, "join_pool_fwd": 3, "join_pool_bwd": 2}


@pytest.mark.parametrize("prefix", IN_FLIGHT)
def test_enough_loads_are_in_flight(prefix):
    kernels = {name: k for stem in BUILT for name, k in BUILT[stem].items() if name.startswith(prefix)}
    vectors = {name: k["loads_in_flight"] for name, k in kernels.items() if any(w in name for w in VECTOR_WIDTHS)}
    assert vectors
    assert {name: count for name, count in vectors.items() if count < IN_FLIGHT[prefix]} == {}


@pytest.mark.parametrize("stem", [stem for stem in BUILT if stem.startswith("conv_fused")])
def test_convolutions_load_16_bytes_and_multiply_matrices(stem):
    convolutions = {n: k for n, k in BUILT[stem].items() if n.startswith(("conv_grouped", "conv_wgrad_kernel"))}
    assert convolutions
    assert {name for name, kernel in convolutions.items() if not kernel["loads_128_bits"]} == set()
    assert {name for name, kernel in convolutions.items() if kernel["hmma"] != ("Matrix" in name)} == set()


@pytest.mark.skipif(
    sass.nvcc_version() != RECORDED["nvcc"],
    reason=f"the table is of nvcc {RECORDED['nvcc']}, not {sass.nvcc_version()}",
)
@pytest.mark.parametrize("stem", BUILT)
def test_resources_are_those_recorded(stem):
    """Where this fails and the change is meant: ``python tests/sass.py``."""
    assert BUILT[stem] == RECORDED["kernels"][stem]
