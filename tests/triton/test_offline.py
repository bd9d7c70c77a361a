"""Every kernel compiles for sm_80, sm_90 and sm_100 without a GPU: matrix instructions, no spills, shared memory.

``python -m fusedres.triton.shipped tests/triton/resources.json`` writes anew what is compared with here.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from fusedres import triton as backend
from fusedres.triton import tuning

pytestmark = pytest.mark.skipif(backend.missing() is not None, reason=str(backend.missing()))

RECORD = json.loads((Path(__file__).parent / "resources.json").read_text())
MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
FEW_ROWS = {"excite_kernel": "mma"}  # sixteen, where the wider instructions take 64


@cache
def launched(arch):
    from fusedres.triton.shipped import launches

    return launches(int(arch[3:]))


def by_descriptor(name: str) -> bool:
    return " by descriptor" in name or " persistent" in name


@pytest.mark.parametrize("name", RECORD["kernels"])
def test_the_record_shows_matrix_instructions_and_no_spills(name):
    from fusedres.triton.offline import SHARED_MEMORY

    for arch, (registers, shared, local, matrix, bulk, step, _) in RECORD["kernels"][name].items():
        assert local == 0, f"{name} spills on {arch}"
        assert registers <= 255 and shared <= SHARED_MEMORY[int(arch[3:])]
        kernel = name.split(": ")[1]
        if kernel.startswith("conv_"):
            assert matrix == ("" if "without TF32" in name else MATRIX[arch])
        else:
            assert matrix == FEW_ROWS.get(kernel, "")
        assert (bulk > 0) == by_descriptor(name), f"{name} on {arch}: {bulk} copies by tensor descriptor"
        assert (step > 0) == bool(matrix)


@pytest.mark.parametrize("arch", MATRIX)
def test_the_record_is_complete(arch):
    found = launched(arch)
    assert set(found) == {name for name, row in RECORD["kernels"].items() if arch in row}
    ways = {name.partition(":")[0].rpartition(",")[0].partition(" ")[2] for name in found if by_descriptor(name)}
    assert bool(ways) == (arch != "sm_80")
    assert any(" persistent" in way for way in ways) == (arch == "sm_90")


@pytest.mark.parametrize("arch", MATRIX)
def test_every_tile_of_the_heuristic_is_recorded(arch):
    """Of ResNet-50's convolutions, with ReLU and with what needs more registers, with and without TensorFloat-32."""
    from fusedres.triton.shipped import problems

    def key(kernel, meta, options):
        tiles = tuple(meta[name] for name in ("BM", "BN", "BK")), options["num_warps"], options["num_stages"]
        return kernel, meta["PRECISION"], *tiles, (meta["R"], meta["S"]), meta["STRIDE_H"]

    convolutions = [each for each in launched(arch).values() if each.kernel.__name__.startswith("conv_")]
    found = {
        (each.args["x"].dtype, *key(each.kernel.__name__, each.meta, each.options))
        for each in convolutions
        if not each.meta["DESCRIPTORS"]
    }
    for dtype, heavy, tf32 in (
        (torch.bfloat16, False, False),
        (torch.bfloat16, True, False),
        (torch.float32, False, True),
        (torch.float32, False, False),
    ):
        precision = "tf32" if tf32 else "ieee"
        for name, problem in problems(dtype):
            stride = problem.geometry.stride[0]
            if stride > 1 and (heavy or dtype == torch.float32):
                continue
            tiles = tuning.heuristic(problem._replace(tf32=tf32), heavy)
            expected = (tiles[:3], tiles.warps, tiles.stages, problem.kernel_size, stride)
            assert (dtype, f"conv_{problem.kind}_kernel", precision, *expected) in found, name


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


@pytest.mark.parametrize("name, arch", [(name, arch) for name, row in RECORD["kernels"].items() for arch in row])
def test_a_kernel_still_needs_what_is_recorded(name, arch):
    import triton

    from fusedres.triton.offline import compiled

    if triton.__version__ != RECORD["triton"]:
        pytest.skip(f"recorded with Triton {RECORD['triton']}, this is {triton.__version__}")
    assert list(compiled(launched(arch)[name], int(arch[3:]))) == RECORD["kernels"][name][arch]


def check_table(folder):
    """Every entry's launches compile for its device, with shared memory that it has; how many there are."""
    from fusedres.triton.offline import SHARED_MEMORY, compiled
    from fusedres.triton.shipped import tabled

    found = tabled(folder)
    for name, (launch, capability) in found.items():
        assert compiled(launch, capability).shared <= SHARED_MEMORY[capability], name
    return len(found)


@pytest.mark.parametrize("table", sorted(tuning._TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_what_the_tables_of_the_package_have_chosen_compiles(table, tmp_path):
    (tmp_path / table.name).write_bytes(table.read_bytes())
    check_table(tmp_path)


def test_what_a_table_has_chosen_is_compiled(tmp_path):
    from fusedres.triton.shipped import tabled

    geometry = tuning.ConvGeometry((1, 1), (0, 0), (1, 1), 1)
    shape, tiles = (256, 256, 56, 56), tuning.Tiles(64, 64, 32, 4, 2)
    keys = [
        tuning.Problem(kind, torch.bfloat16, shape, 64, (1, 1), geometry, pending).key
        for kind in ("fprop", "dgrad", "wgrad")
        for pending in (True, False)
    ]
    table = {"source": tuning.source_hash(), "verdict source": "", "verdicts": {}}
    table["entries"] = {key: [list(tiles), 1.0, 2.0] for key in keys}
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text(json.dumps(table))
    assert check_table(tmp_path) >= len(keys)
    for key in keys:
        kernel = f"conv_{key.split('_')[0]}_kernel"
        launch, capability = tabled(tmp_path)[f"nvidia-h100-80gb-hbm3, {key}: {kernel}"]
        assert capability == 90 and launch.options == {"num_warps": 4, "num_stages": 2}
        assert [launch.meta[name] for name in ("BM", "BN", "BK")] == [64, 64, 32]
        assert (launch.args["norm"] is not None or launch.args.get("grad_rows") is not None) == ("pending" in key)
    (tmp_path / "another.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="there is a table for another"):
        tabled(tmp_path)
