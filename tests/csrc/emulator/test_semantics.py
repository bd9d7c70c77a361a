"""Built-in functions, instructions and the report on memory traffic, against what they are defined to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from emulated import needs_emulator, program, run

pytestmark = needs_emulator

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("mode", ["fast", "check", "asan", "tsan"])
@pytest.mark.parametrize("seed", [1, 2])
def test_instructions(mode, seed):
    result = run(program(FOLDER / "semantics.cu", mode), EMU_SEED=seed, EMU_COPIES=seed)
    assert result.stdout == "OK\n" and not result.stderr, result.stdout + result.stderr


def test_traffic():
    """Sectors and passes over the banks, by line."""
    source = FOLDER / "traffic.cu"
    first, *lines = run(program(source, "check")).stdout.splitlines()
    assert first == "no error"
    text = source.read_text().splitlines()
    expected = {}
    for number, line in enumerate(text, 1):
        if comment := re.search(r"// (\d+) (sectors|pass)", line):
            expected[f"traffic.cu:{number}"] = int(comment[1])
    counted = {entry["at"]: entry.get("sectors", entry.get("passes")) for entry in map(json.loads, lines)}
    assert len(expected) == 5
    assert expected == {at: counted[at] for at in expected}
    assert all(entry["requests"] == 1 for entry in map(json.loads, lines))
