"""Writes the table of results into README.md, from the files committed under bench/results/.

``python bench/update_readme.py`` after ``python -m fusedres bench --json``, with and without ``--architectures``, on a
quiet machine.
"""

from __future__ import annotations

from pathlib import Path

from fusedres.benchmarking import architectures
from fusedres.benchmarking.results import HEAD, Results, Row

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: written by bench/update_readme.py -->", "<!-- end of results -->"
NOTHING = "No results are committed yet; `make bench-quick` prints this table for your machine."


def result_files() -> list[Path]:
    """For each machine its full run, or the quick one where there is no other, and that of the architectures."""
    files = []
    for folder in sorted(path for path in (ROOT / "bench" / "results").glob("*") if path.is_dir()):
        files += [path for path in (folder / "full.json", folder / "quick.json") if path.exists()][:1]
        files += [path for path in (folder / "architectures.json",) if path.exists()]
    return files


def section(path: Path) -> str:
    """One machine's table, with the machine and the file named."""
    results = Results.load(path)
    source = path.relative_to(ROOT).as_posix()
    head, cells = (architectures.HEAD, architectures.cells) if path.stem == "architectures" else (HEAD, Row.cells)
    lines = [head, tuple("---" for _ in head), *map(cells, results.rows)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{results.machine} ([{source}]({source}))\n\n{table}"


def updated(readme: str) -> str:
    """The text of the README with the tables that the committed files give.

    Raises:
        ValueError: where the markers are missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must contain {BEGIN!r} and {END!r}")
    body = "\n\n".join(map(section, result_files())) or NOTHING
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{after}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))
