"""Writes the table of results into README.md, from the files committed under bench/results/.

``python bench/update_readme.py`` after a ``python -m fusedres bench --json`` on a quiet machine.
"""

from __future__ import annotations

from pathlib import Path

from fusedres.benchmarking.results import HEAD, Results

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: written by bench/update_readme.py -->", "<!-- end of results -->"
NOTHING = "No results are committed yet; `make bench-quick` prints this table for your machine."


def result_files() -> list[Path]:
    """For each machine its full run, or the quick one where there is no other."""
    folders = sorted(path for path in (ROOT / "bench" / "results").glob("*") if path.is_dir())
    candidates = ([folder / "full.json", folder / "quick.json"] for folder in folders)
    return [next(path for path in pair if path.exists()) for pair in candidates if any(map(Path.exists, pair))]


def section(path: Path) -> str:
    """One machine's table, with the machine and the file named."""
    results = Results.load(path)
    source = path.relative_to(ROOT).as_posix()
    lines = [HEAD, tuple("---" for _ in HEAD), *(row.cells() for row in results.rows)]
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
