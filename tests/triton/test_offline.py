"""Every kernel compiles for sm_80, sm_90 and sm_100 without a GPU: matrix instructions, no spills, shared memory.

``python -m fusedres.triton.shipped tests/triton/resources.json`` writes anew what is compared with here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusedres import triton as backend

pytestmark = pytest.mark.skipif(backend.missing() is not None, reason=str(backend.missing()))

RECORD = json.loads((Path(__file__).parent / "resources.json").read_text())
MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
FEW_ROWS = {"excite_kernel": "mma"}  # sixteen, where the wider instructions take 64
RECOMPILED = {"sm_90": None, "sm_80": ("dgrad 1x1", "join 1x1"), "sm_100": ("dgrad 1x1", "join 1x1")}
"""What is compiled again in every run, by architecture; ``None``: everything. The rest is in the record."""


def by_descriptor(name: str) -> bool:
    return " by descriptor" in name or " persistent" in name


@pytest.mark.parametrize("name", RECORD["kernels"])
def test_the_record_shows_no_spills_and_matrix_instructions(name):
    from fusedres.triton.offline import SHARED_MEMORY

    for arch, (registers, shared, local, matrix, bulk, step, _) in RECORD["kernels"][name].items():
        assert local == 0, f"{name} spills on {arch}"
        assert registers <= 255 and shared <= SHARED_MEMORY[int(arch[3:])]
        kernel = name.split(": ")[1]
        assert matrix == (MATRIX[arch] if kernel.startswith("conv_") else FEW_ROWS.get(kernel, ""))
        assert (bulk > 0) == by_descriptor(name), f"{name} on {arch}: {bulk} copies by tensor descriptor"
        assert (step > 0) == bool(matrix)


def test_the_record_is_complete():
    from fusedres.triton.shipped import launches

    found = launches()
    assert set(found) == set(RECORD["kernels"])
    for name in found:
        expected = {"sm_90"} if " persistent" in name else {"sm_90", "sm_100"} if by_descriptor(name) else set(MATRIX)
        assert set(RECORD["kernels"][name]) == expected, name


def test_descriptors_cost_no_register_and_persistent_programs_load_ahead():
    """On Hopper, of every kernel that has these forms."""
    hopper = {name: row["sm_90"] for name, row in RECORD["kernels"].items()}
    compared = 0
    for name, (registers, *_, ahead) in hopper.items():
        if " by descriptor" in name:
            assert registers <= hopper[name.replace(" by descriptor", "")][0], name
            compared += 1
        assert ahead == (" persistent" in name), name
    assert compared >= 12


@pytest.mark.parametrize("arch", RECOMPILED)
def test_kernels_still_need_what_is_recorded(arch):
    import triton

    from fusedres.triton.offline import compiled
    from fusedres.triton.shipped import launches

    if triton.__version__ != RECORD["triton"]:
        pytest.skip(f"recorded with Triton {RECORD['triton']}, this is {triton.__version__}")
    for name, launch in launches().items():
        if arch in RECORD["kernels"][name] and (RECOMPILED[arch] is None or name.startswith(RECOMPILED[arch])):
            assert list(compiled(launch, int(arch[3:]))) == RECORD["kernels"][name][arch], name
