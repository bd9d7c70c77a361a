"""The emulator finds bugs: each kernel of ``planted.cu`` is right, and has variants with one bug each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from emulated import needs_emulator, program, run

pytestmark = needs_emulator

SOURCE = Path(__file__).with_name("planted.cu")
RIGHT = ("pipeline", "simple", "warps", "blocks", "barriers", "grids", "many grids", "much shared")

# By name, what "check" mode says.
BUGS = {
    "missing barrier": r"race|uninitialised read",
    "missing wait": r"missing wait",
    "write after read": r"race: (write after read|missing wait).* planted\.cu:\d+",  # the wait is another thread's
    "global out of bounds": r"out of bounds: 4 bytes .* global memory, 4 past the end of an allocation of 256",
    "shared out of bounds": r"out of bounds: 4 bytes at shared address",
    "divergent barrier": r"divergence: .* 32 wait at __syncthreads .* 32 have exited",
    "exited at barrier": r"divergence: .* 63 wait at __syncthreads .* 1 have exited",
    "uninitialised shared": r"uninitialised read: shared address .* thread 7 ",
    "uninitialised global": r"uninitialised read: .* in global memory",
    "misaligned": r"misaligned: 8 bytes",
    "missing warp sync": r"race|uninitialised read",
    "mask without caller": r"lane 0 calls with mask 0xfffffffe, which does not name it",
    "mask of exited": r"names lane 3, which has exited",
    "reads unnamed lane": r"reads lane 20, which mask 0x0000ffff does not name",
    "blocks race": r"write after write at global address",
    "missing arrival": r"divergence: .* an mbarrier",
    "missing grid sync": r"race|uninitialised read",
    "too large a block": r"at most 1024 threads",
    "too deep a block": r"64 of them in z",
    "too tall a grid": r"at most 2\^31-1, 65535 and 65535 blocks",
    "empty grid": r"an empty grid or block",
    "too many cooperative blocks": r"65 cooperative blocks, but only 64 run at once",
    "too much static shared": r"49156 bytes of static shared memory; the limit is 48 KiB",
    "static and dynamic shared": r"10240 bytes of static and 40960 of dynamic shared memory; .* 48 KiB",
    "more shared than there is": r"refused: .*invalid",
    "too many threads": r"64 threads per block, but __launch_bounds__ allows 32",
    "too much shared": r"65536 bytes of dynamic shared memory, 49152 are allowed",
}
# Without instrumentation a bug shows in the numbers, with cp.async completing as late or as early as it may.
WRONG_NUMBERS = {"missing barrier": 0, "missing wait": 0, "write after read": 1, "missing warp sync": 0}
WRONG_NUMBERS |= {"uninitialised shared": 0, "missing grid sync": 0}
STRUCTURAL = ("divergent barrier", "exited at barrier", "mask without caller", "mask of exited", "reads unnamed lane")
LIMITS = ("too large a block", "too deep a block", "too tall a grid", "empty grid", "too many cooperative blocks")
LIMITS += (
    "too much static shared",
    "static and dynamic shared",
    "more shared than there is",
    "too many threads",
    "too much shared",
)
STRUCTURAL += ("missing arrival", *LIMITS)
OVERFLOWS = ("global out of bounds", "shared out of bounds")
RACES = ("missing barrier", "write after read", "missing warp sync", "missing grid sync")


def assert_says(text: str, pattern: str) -> None:
    assert re.search(pattern, text), f"{pattern!r} is not in: {text}"


@pytest.mark.parametrize("mode", ["fast", "check", "asan", "tsan"])
def test_right_kernels_are_right(mode):
    for name in RIGHT:
        for copies in range(3):
            result = run(program(SOURCE, mode), name, EMU_COPIES=copies, EMU_SEED=copies + 1)
            assert result.stdout == "no error\nOK\n" and not result.stderr, f"{name}: {result.stdout}{result.stderr}"


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("copies", [0, 1], ids=["late", "early"])
def test_check_mode_finds(bug, copies):
    result = run(program(SOURCE, "check"), bug, EMU_SEED=copies + 1, EMU_COPIES=copies)
    assert_says(result.stdout, BUGS[bug])


@pytest.mark.parametrize("bug", WRONG_NUMBERS)
def test_bugs_make_wrong_numbers(bug):
    found = [run(program(SOURCE, "fast"), bug, EMU_SEED=s, EMU_COPIES=WRONG_NUMBERS[bug]).stdout for s in range(1, 4)]
    assert any("WRONG" in text for text in found)


@pytest.mark.parametrize("bug", STRUCTURAL)
def test_every_mode_finds_what_needs_no_instrumentation(bug):
    assert_says(run(program(SOURCE, "fast"), bug).stdout, BUGS[bug])


@pytest.mark.parametrize("bug", OVERFLOWS)
def test_address_sanitizer_finds(bug):
    assert_says(run(program(SOURCE, "asan"), bug).stderr, "AddressSanitizer: (heap-buffer-overflow|use-after-poison)")


@pytest.mark.parametrize("bug", RACES)
def test_thread_sanitizer_finds(bug):
    found = [run(program(SOURCE, "tsan"), bug, EMU_SEED=seed).stderr for seed in range(1, 4)]
    assert any("ThreadSanitizer: data race" in text for text in found)


def test_a_failed_launch_leaves_the_next_one_checked():
    """The threads of one launch lie where those of the one before lay."""
    result = run(program(SOURCE, "check"), "misaligned twice")
    assert len(re.findall("misaligned: 8 bytes", result.stdout)) == 2
