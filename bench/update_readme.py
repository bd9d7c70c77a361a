"""Writes the table of results into README.md, from the files committed under bench/results/.

``python bench/update_readme.py`` after ``python -m fusedres bench --json``, with and without ``--architectures``, on a
quiet machine.
"""

from __future__ import annotations

from pathlib import Path

from fusedres.benchmarking.report.source import load
from fusedres.benchmarking.report.tables import headline, result_files

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: written by bench/update_readme.py -->", "<!-- end of results -->"
NOTHING = "No results are committed yet; `make bench-quick` prints this table for your machine."


def updated(readme: str) -> str:
    """The text of the README with the tables that the committed files give.

    Raises:
        ValueError: where the markers are missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must contain {BEGIN!r} and {END!r}")
    body = "\n\n".join(headline(load(path, ROOT)) for path in result_files(ROOT)) or NOTHING
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{after}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))
