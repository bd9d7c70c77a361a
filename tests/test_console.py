"""What the command line prints, with rich and without."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fusedres import console

WITHOUT_RICH = """
import sys
sys.modules["rich"] = None
import fusedres
from fusedres.console import console, make_table, stages

assert not console.is_terminal
with stages(2, "tune") as begin:
    begin("conv [64]")
console.print(make_table("title", ("block", "ms"), [("basic", "1.5"), ("bottleneck", "12")], "caption"))
console.print("fusedres[demo]")
"""


def test_a_machine_without_rich_reads_the_same():
    result = subprocess.run([sys.executable, "-c", WITHOUT_RICH], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told = ["tune: conv [64]", "title", "block        ms", "basic       1.5", "bottleneck   12", "caption"]
    assert result.stdout.splitlines() == [*told, "fusedres[demo]"]


def test_importing_the_package_imports_no_rich():
    code = "import sys, fusedres; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_table_of_rich_has_every_cell(capsys):
    pytest.importorskip("rich")
    console.console.print(console.make_table("", ("block", "ms"), [("basic [1]", "1.5")], "caption"))
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in ("block", "ms", "basic [1]", "1.5", "caption"))
