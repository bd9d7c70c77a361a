"""Problems, the space, and the tables, without a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusedres import triton as backend
from fusedres.ops.activations import ACTIVATIONS
from fusedres.ops.conv import ConvGeometry
from fusedres.triton import tuning
from fusedres.triton.tuning import Entry, Problem, Tiles

pytestmark = pytest.mark.skipif(backend.missing() is not None, reason=str(backend.missing()))

ONE = ConvGeometry((1, 1), (0, 0), (1, 1), 1)
THREE = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
HALF = ConvGeometry((2, 2), (0, 0), (1, 1), 1)
CPU = torch.device("cpu")
ENTRY = Entry(Tiles(64, 32, 32, 4, 2, descriptors=True), 1.0, 2.0)


def problem(
    kind="fprop", shape=(8, 64, 56, 56), filters=256, kernel=(1, 1), g=ONE, dtype=torch.bfloat16, prologue=True
):
    return Problem(kind, dtype, shape, filters, kernel, g, prologue)


PROBLEMS = [
    problem(kind, kernel=kernel, g=g, dtype=dtype)
    for kind in ("fprop", "dgrad", "wgrad")
    for kernel, g in (((1, 1), ONE), ((3, 3), THREE), ((1, 1), HALF))
    for dtype in (torch.bfloat16, torch.float32)
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path))
    tuning._table.cache_clear()
    tuning._looked_up.cache_clear()
    yield
    tuning._table.cache_clear()
    tuning._looked_up.cache_clear()


@pytest.mark.parametrize("each", PROBLEMS, ids=lambda each: each.key)
def test_a_key_is_its_problem(each):
    assert tuning.problem_of(each.key) == each


@pytest.mark.parametrize("allowed", [False, True])
def test_tensorfloat_32_has_entries_of_its_own(allowed):
    float32 = problem(dtype=torch.float32)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
        now, half = (tuning.pose(*problem(dtype=dtype)[:7]) for dtype in (torch.float32, torch.bfloat16))
    assert half == problem()
    assert now == float32._replace(tf32=allowed) == tuning.problem_of(now.key)
    assert ("_tf32_" in now.key) == allowed
    tuning.record("cpu", {now.key: ENTRY})
    assert tuning.lookup(now, CPU) == ENTRY
    assert tuning.lookup(now._replace(tf32=not allowed), CPU) is None
    assert tuning.lookup(now._replace(tf32=not allowed, shape=(16, 64, 56, 56)), CPU) is None


def test_times_depend_on_all_that_a_convolution_launches_or_takes_its_tiles_from():
    folder = Path(tuning.__file__).parent
    needed = {"tuning.py"}
    for kernels in ("conv_fused.py", "conv_fused_backward.py"):
        needed |= {
            kernels,
            *(f"{name}.py" for name in re.findall(r"^from \.(\w+) import", (folder / kernels).read_text(), re.M)),
        }
    assert needed <= set(tuning._SOURCES)


@pytest.mark.parametrize("each", PROBLEMS, ids=lambda each: each.key)
def test_the_space_fits_the_device(each):
    found = tuning.space(each)
    assert found and len(set(found)) == len(found)
    for tiles in [*found, tuning.heuristic(each)]:
        assert tuning.shared_bytes(each, tiles) <= 227 * 1024
        assert tiles.rows * tiles.columns // (32 * tiles.warps) <= 128


@pytest.mark.parametrize(
    ("acts", "residual", "capability", "heavy"),
    [
        (("identity", "relu"), True, 9, False),
        (("leaky_relu", "identity"), False, 10, False),
        (("relu", "identity"), True, 10, True),
        (("identity", "relu6"), False, 8, True),
        (("gelu", "identity"), False, 9, True),
    ],
)
def test_what_needs_more_registers_takes_half_a_tile(acts, residual, capability, heavy):
    with tuning.assumed(capability):
        found = tuning.is_heavy(CPU, [ACTIVATIONS[act].code for act in acts], residual)
    assert found is heavy
    for each in PROBLEMS:
        whole, taken = tuning.heuristic(each), tuning.configuration(each, CPU, found)
        assert taken.rows * taken.columns * (2 if heavy else 1) == whole.rows * whole.columns
        assert (taken.warps, taken.registers) == ((4, 224) if heavy else (8, 128))


@pytest.mark.parametrize("each", PROBLEMS, ids=lambda each: each.key)
def test_other_ways_over_the_best_tiles(each):
    each = each._replace(shape=(64, *each.shape[1:]))
    tiles = tuning.heuristic(each)
    assert tuning.variants(each, tiles, 8) == []
    found = tuning.variants(each, tiles, 9)
    assert found[0] == tiles._replace(descriptors=True)
    assert all(way.descriptors and way._replace(descriptors=False, persistent=False) == tiles for way in found)
    short = each.kind != "wgrad" and each.gemm[2] <= 4 * tiles.depth
    assert [way.persistent for way in found] == [False, True][: 1 + short]
    assert tuning.variants(each, tiles, 10) == found[:1]
    for way in found:
        programs = tuning.resident(each, way)
        assert programs >= 1 and programs * tuning.shared_bytes(each, way) <= 227 * 1024


def test_few_tiles_are_not_walked_over():
    assert len(tuning.variants(problem(), tuning.heuristic(problem()))) == 2
    small = problem(shape=(1, 64, 7, 7))
    assert len(tuning.variants(small, tuning.heuristic(small))) == 1


def test_a_taps_columns_are_those_of_wgrad():
    narrow = problem("wgrad", shape=(64, 8, 32, 32), filters=64, kernel=(3, 3), g=THREE)
    assert narrow.product[1] == 8 and narrow.gemm[1] == 72
    assert tuning.heuristic(narrow).columns == 32 and {tiles.columns for tiles in tuning.space(narrow)} == {32}


@pytest.mark.parametrize("capability,bytes_of_it", [(8.6, 101376), (9.0, 232448)])
def test_a_device_says_how_much_shared_memory_it_has(monkeypatch, capability, bytes_of_it):
    properties = SimpleNamespace(shared_memory_per_block_optin=bytes_of_it)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert tuning.shared_memory(torch.device("cuda:0")) == bytes_of_it


def test_fixed_tiles_come_before_every_table():
    tuning.record("cpu", {problem().key: ENTRY})
    with tuning.fixed(Tiles(16, 16, 16, 4, 2)):
        assert tuning.configuration(problem(), CPU) == Tiles(16, 16, 16, 4, 2)
    assert tuning.configuration(problem(), CPU) == ENTRY.tiles


def test_products_and_traffic_of_a_pointwise_convolution():
    n, pixels = 8, 56 * 56
    assert problem().gemm == (n * pixels, 256, 64)
    assert problem("dgrad").gemm == (n * pixels, 64, 256)
    assert problem("wgrad").gemm == (256, 64, n * pixels)
    inputs, outputs, weights = n * 64 * pixels, n * 256 * pixels, 64 * 256
    flops = 2 * n * pixels * 64 * 256
    assert tuning.bytes_and_flops(problem()) == (2 * (inputs + outputs + weights), flops)
    assert tuning.bytes_and_flops(problem("dgrad")) == (2 * (2 * inputs + 2 * outputs + weights), flops)
    assert tuning.bytes_and_flops(problem("wgrad")) == (2 * (inputs + 2 * outputs + weights), flops)
    assert tuning.bytes_and_flops(problem(g=HALF))[0] == 2 * ((inputs + outputs) // 4 + weights)
    assert tuning.bytes_and_flops(problem("wgrad", g=HALF))[0] == 2 * (inputs // 4 + outputs // 2 + weights)
    whole_gradient = inputs + inputs // 4 + outputs // 2  # that of a pixel between is zero: its input is not read
    assert tuning.bytes_and_flops(problem("dgrad", g=HALF))[0] == 2 * (whole_gradient + weights)


def test_what_was_measured_is_taken_and_the_vendor_is_a_candidate():
    each = problem()
    assert tuning.configuration(each, CPU) == tuning.heuristic(each)
    assert tuning.vendor_is_faster(each, CPU) is None
    tuning.record("cpu", {each.key: ENTRY})
    assert tuning.configuration(each, CPU) == ENTRY.tiles
    assert tuning.vendor_is_faster(each, CPU) is False
    tuning.record("cpu", {each.key: ENTRY._replace(vendor_milliseconds=0.5)})
    assert tuning.vendor_is_faster(each, CPU) is True


def test_the_nearest_shape_of_the_same_family():
    tuning.record("cpu", {problem().key: ENTRY})
    assert tuning.lookup(problem(shape=(16, 64, 56, 56)), CPU) == ENTRY
    assert tuning.lookup(problem(shape=(16, 128, 56, 56), filters=512), CPU) is None  # too far
    for other in (problem("dgrad"), problem(dtype=torch.float16), problem(g=HALF), problem(prologue=False)):
        assert tuning.lookup(other, CPU) is None


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """The folder of the package's tables, empty."""
    monkeypatch.setattr(tuning, "_TABLES", tmp_path / "package" / "tables")
    return tuning._TABLES


def test_the_users_table_comes_before_the_packages_and_any_before_a_near_shape(shipped):
    each, near = problem(), problem(shape=(16, 64, 56, 56))
    theirs, mine = (ENTRY._replace(tiles=Tiles(128, 64, depth, 8, 3, 128)) for depth in (32, 64))
    tuning.record("cpu", {each.key: theirs})
    assert tuning.ship("cpu") == shipped / "cpu.json"
    tuning.cache_path("cpu").unlink()
    tuning._table.cache_clear(), tuning._looked_up.cache_clear()
    assert tuning.configuration(each, CPU) == theirs.tiles  # out of the box
    assert tuning.configuration(near, CPU) == theirs.tiles
    assert tuning.configuration(problem("dgrad"), CPU) == tuning.heuristic(problem("dgrad"))
    tuning.record("cpu", {near.key: mine})
    assert tuning.configuration(near, CPU) == mine.tiles
    assert tuning.configuration(each, CPU) == theirs.tiles  # the package's own shape before the user's near one
    tuning.record("cpu", {each.key: mine})
    assert tuning.configuration(each, CPU) == mine.tiles


def test_what_is_shipped_is_all_that_is_known(shipped):
    tuning.record("cpu", {problem().key: ENTRY})
    tuning.ship("cpu")
    tuning.cache_path("cpu").unlink()
    tuning._table.cache_clear()
    tuning.record("cpu", {problem("dgrad").key: ENTRY})
    text = json.loads(tuning.ship("cpu").read_text())
    assert set(text["entries"]) == {problem().key, problem("dgrad").key}
    assert text["source"] == tuning.source_hash()


def test_tables_of_other_kernels_and_damaged_ones_are_ignored():
    path = tuning.record("cpu", {problem().key: ENTRY})
    text = json.loads(path.read_text())
    for damaged in (json.dumps(text | {"source": "other"}), "{", json.dumps({"source": tuning.source_hash()})):
        path.write_text(damaged)
        tuning._table.cache_clear()
        tuning._looked_up.cache_clear()
        assert tuning.lookup(problem(), CPU) is None
    tuning.record("cpu", {problem().key: ENTRY})
    assert tuning.lookup(problem(), CPU) == ENTRY


def test_entries_are_added_to_those_that_are_there():
    tuning.record("cpu", {problem().key: ENTRY})
    tuning.record("cpu", {problem("dgrad").key: ENTRY})
    assert tuning.lookup(problem(), CPU) == tuning.lookup(problem("dgrad"), CPU) == ENTRY


def test_what_is_asked_for_is_observed():
    with tuning.observed() as problems:
        tuning.configuration(problem(), CPU)
    tuning.configuration(problem("dgrad"), CPU)
    assert problems == {problem()}
