"""``make fuzz``: random blocks with random lives against stock PyTorch, in slices that need not be run at one go.

A slice is a run of the two fuzz tests with a seed of its own, in a process of its own, on one thread and at a low
priority, within a time limit. What passed is kept under ``build/fuzz`` for as long as neither the library nor the tests
change, so a run that was stopped goes on where it was; a slice that failed is run again. Machines share the work by the
slices that each begins with (``--first``).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

__all__ = ["PER_SLICE", "main", "run", "state_of"]

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/engine/test_fuzz.py"
PER_SLICE = 1000
"""Cases: of each of the two tests as many as the profile ``fuzz`` has in ``tests/conftest.py``."""


def state_of(root: Path = ROOT) -> str:
    """Says in a word what is fuzzed: other sources, another word."""
    digest = hashlib.sha256()
    for folder, pattern in (("fusedres", "*.py"), ("csrc", "*"), ("tests", "*.py")):
        for path in sorted(p for p in (root / folder).rglob(pattern) if p.is_file() and not _derived(p)):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _derived(path: Path) -> bool:
    return "__pycache__" in path.parts


def slice_command(seed: int) -> list[str]:
    options = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}"]
    return [sys.executable, "-m", "pytest", *options, TESTS, "-k", "test_described_blocks or test_patched_models"]


def run(
    seeds: Sequence[int],
    folder: Path,
    limit: float,
    command: Callable[[int], list[str]] = slice_command,
) -> Iterator[tuple[int, str]]:
    """Runs the slices of these seeds that have not passed: each with ``"passed"``, ``"passed before"``, ``"failed"`` or
    ``"took too long"``; what it said is in ``folder``, by its seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for seed in seeds:
        passed, log = folder / f"{seed}.passed", folder / f"{seed}.log"
        if passed.exists():
            yield seed, "passed before"
            continue
        with log.open("w") as output:
            try:
                done = subprocess.run(
                    ["nice", "-n", "15", *command(seed)],
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                )
            except subprocess.TimeoutExpired:
                yield seed, "took too long"
                continue
        if done.returncode == 0:
            log.replace(passed)
        yield seed, "failed" if done.returncode else "passed"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a slice failed or took too long."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help=f"in slices of {PER_SLICE:,} (default %(default)s)")
    parser.add_argument("--first", type=int, default=1, metavar="N", help="the seed of the first slice (default 1)")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for a slice (default %(default)s)")
    args = parser.parse_args(argv)
    folder = ROOT / "build" / "fuzz" / state_of()
    seeds = range(args.first, args.first - (-args.cases // PER_SLICE))
    bad, began = 0, time.monotonic()
    for seed, outcome in run(seeds, folder, args.limit):
        print(f"slice {seed}, {seed - args.first + 1} of {len(seeds)}: {outcome}", flush=True)
        if "passed" not in outcome:
            bad += 1
            print("\n".join(_said(folder / f"{seed}.log")), flush=True)
    total = PER_SLICE * len(seeds)
    verdict = f"{bad} of {len(seeds)} slices failed" if bad else "no failure"
    print(f"{total:,} cases, {time.monotonic() - began:.0f} seconds, {verdict}; logs in {folder.relative_to(ROOT)}")
    return int(bad > 0)


def _said(log: Path) -> list[str]:
    """The failing case and what is wrong with it; the end of the log where there is none."""
    lines = log.read_text().splitlines()
    return [line for line in lines if line.startswith("E ")] or lines[-20:]


if __name__ == "__main__":
    sys.exit(main())
