"""The page, and that the committed one is what the committed results give."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_data import MACHINE, source

from fusedres.benchmarking.report.page import digest_of, page
from fusedres.benchmarking.report.source import Source, load
from fusedres.benchmarking.results import Goal, Results, Row
from fusedres.cli import main

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"


def test_the_committed_page_is_up_to_date():
    sources = [load(path, ROOT) for path in sorted((ROOT / "bench" / "results").glob("*/*.json"))]
    expected = page(sources)
    assert (DOCS / "benchmarks.md").read_text() == expected.markdown(), "run make report"
    names = expected.figures()
    assert {path.name for path in (DOCS / "benchmarks").glob("*")} == set(names), "run make report"
    for name, part in names.items():
        assert digest_of(part.sources) in (DOCS / "benchmarks" / name).read_text(), f"{name} is stale: run make report"


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*/*.json")), ids=lambda path: path.stem)
def test_every_committed_file_names_its_commit(path):
    commit = Results.load(path).machine.commit
    assert re.fullmatch(r"[0-9a-f]{7,40}\+?", commit), f"{commit}: set FUSEDRES_COMMIT where there is no git"


def test_what_was_measured_with_changes_is_marked():
    clean, dirty = (Results(replace(MACHINE, commit=commit), {}) for commit in ("abc1234", "def5678+"))
    text = page([Source("clean.json", clean), Source("dirty.json", dirty)]).markdown()
    assert "(../dirty.json)). **def5678+**: measured with changes that were not committed" in text
    assert text.count("not committed") == 1


def test_a_digest_is_of_what_the_files_hold():
    other = replace(source(), results=replace(source().results, settings={}))
    assert digest_of([source()]) == digest_of([source()]) != digest_of([other])


def test_what_has_no_data_is_named():
    text = page([Source("few.json", Results(MACHINE, {}))]).markdown()
    assert "![" not in text
    assert "Without data, and so left out: throughput by network (from measurements of whole networks)" in text
    assert "There are no results yet" in page([]).markdown()


def test_tables():
    text = page([source()]).markdown()
    assert "| resnet50, train step, float32, 8x3x224x224 | fusedres | 500 ms (-4%, +4%) | 16.0 | 1.40x |" in text
    assert "| TensorRT | not installed |" in text and "RED: output" in text
    assert "579 MB | 0.84 |" in text and "Left out for want of time: OpenVINO: no time." in text
    assert "| torch.compile | 60 s |" in text and ", depth 14 | eager |" in text


def test_what_the_roofline_is_made_of_is_said():
    text = page([source()]).markdown()
    assert "a CPU's are measured with PyTorch's own kernels" in text and "above 100%" in text


def test_what_a_peak_has_in_it_is_said_above_its_figure():
    text = page([source()]).markdown()
    _, note, figure = text[text.index("### Memory of a training step") :].split("\n\n")[:3]
    assert "torch.compile's has its compiler in it" in note and figure.startswith("![Memory")


def test_every_file_is_linked_to():
    """Those without headline rows, too."""
    names = [f"bench/results/a-cpu/{name}.json" for name in ("engines", "growth", "memory")]
    text = page([Source(name, Results(MACHINE, {})) for name in names]).markdown()
    assert all(f"([{name}](../{name}))" in text for name in names)


class Counted(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.ids, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)

    def handle_data(self, data):
        self.text.append(data)


def test_one_file_of_html_has_everything(tmp_path):
    row = Row("train | fp32", "ms", Goal(1.2), 2.0, ours=1.0, ratio=2.0)
    both = [source(), Source("rows.json", Results(replace(MACHINE, gpu="A <GPU>"), {"batch": 8}, (row,)))]
    made = page(both)
    made.draw(tmp_path)
    found = Counted()
    found.feed(made.html(tmp_path))
    assert found.tags.count("svg") == len(made.figures()) == 6
    assert len(set(found.ids)) == len(found.ids)
    assert all(link.startswith("#") for link in found.links), "it must not need another file"
    assert {link[1:] for link in found.links} <= set(found.ids)
    text = " ".join(found.text)
    assert "A <GPU>" in text and "train | fp32" in text and "2.00x" in text


def test_the_command(tmp_path, capsys):
    file = tmp_path / "bench" / "results" / "a-cpu" / "full.json"
    source().results.save(file)
    out = tmp_path / "docs" / "benchmarks.md"
    stale = out.parent / "benchmarks" / "old.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    assert main(["report", str(file), "--out", str(out)]) == 0
    assert not stale.exists() and len(list(stale.parent.glob("*.svg"))) == 6
    text = out.read_text()
    assert "bench/results/a-cpu/full.json" in text and "](benchmarks/a-cpu-2-threads-growth.svg)" in text
    assert out.with_suffix(".html").exists()


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"machine": {"cpu": "x"}}'])
def test_what_is_no_file_of_results(tmp_path, capsys, content):
    file = tmp_path / "other.json"
    file.write_text(content)
    assert main(["report", str(file), "--out", str(tmp_path / "docs" / "page.md")]) == 2
    assert "is no file of results" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent.json")]) == 2
