"""Figures, from made-up results and from the lack of them."""

from __future__ import annotations

import pytest
from report_data import MACHINE, source

from fusedres.benchmarking.report.figures import FIGURES, draw
from fusedres.benchmarking.report.source import Source
from fusedres.benchmarking.results import Results

pytest.importorskip("matplotlib")

by_name = pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)


@by_name
def test_a_figure_says_where_it_comes_from(figure, tmp_path):
    path = tmp_path / "figure.svg"
    assert draw(figure, [source()], path, "0123abcd")
    text = path.read_text()
    for part in (figure.title, MACHINE.cpu, MACHINE.torch, MACHINE.commit, MACHINE.date, "full.json", "0123abcd"):
        assert part in text
    again = tmp_path / "again.svg"
    draw(figure, [source()], again, "0123abcd")
    assert again.read_text() == text


@by_name
def test_without_data_there_is_none(figure, tmp_path):
    path = tmp_path / "figure.svg"
    assert not draw(figure, [Source("empty.json", Results(MACHINE, {}))], path, "")
    assert not path.exists()


def points(axis):
    return {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}


def test_lines_are_what_was_measured():
    figures = {figure.name: figure for figure in FIGURES}
    grown = figures["growth"].draw([source()])
    time_by_batch, bytes_by_batch, time_by_depth, _ = grown.axes
    assert points(time_by_batch)["eager"] == pytest.approx([20, 40, 80])
    assert points(time_by_depth)["fusedres"] == pytest.approx([120, 210, 300])
    assert points(bytes_by_batch)["fusedres"] == pytest.approx([10, 20, 40])
    shapes = figures["speedup"].draw([source()]).axes[0]
    assert points(shapes)["join"] == [0.9, 1.3, 1.6]


def test_a_red_check_is_in_no_figure():
    throughput = next(figure for figure in FIGURES if figure.name == "throughput").draw([source()])
    labels = [label.get_text() for label in throughput.axes[0].get_xticklabels()]
    assert len(labels) == 1 and "resnet50" in labels[0]
