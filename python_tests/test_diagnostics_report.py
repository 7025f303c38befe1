"""What reports look like: text, notebook tables, pandas; and the overlap curve of the gap."""

from __future__ import annotations

import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from test_diagnostics_alignment import three_sides

from aniso_ext import diagnostics
from aniso_ext.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")


class Cells(HTMLParser):
    """Texts of the cells of a table, and a check that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def test_overlap_of_every_rank_against_the_projectors() -> None:
    y, x, _ = three_sides(width=20)
    report = diagnostics.gap(y, x, q=5)
    assert [point.q for point in report.overlap] == [1, 2, 4, 5, 8, 16]
    u_y, u_x = (np.linalg.eigh(np.cov(side.T, bias=True))[1][:, ::-1] for side in (y, x))
    for point in report.overlap:
        expected = np.trace(u_x[:, : point.q] @ u_x[:, : point.q].T @ u_y[:, : point.q] @ u_y[:, : point.q].T) / point.q
        assert point.overlap == pytest.approx(expected, rel=1e-9) and point.baseline == point.q / 20
    assert report.overlap[3].overlap == pytest.approx(report.o_q, rel=1e-12)
    assert diagnostics.gap(y[:, :16], x[:, :16]).overlap[-1].overlap == pytest.approx(1)


def test_text_has_aligned_columns_and_intervals_when_there_are_any() -> None:
    y, x, z = three_sides()
    for plain, bounded in (
        (diagnostics.gap(y, x), diagnostics.gap(y, x, bootstrap=40)),
        (diagnostics.alignment(y, x, z), diagnostics.alignment(y, x, z, bootstrap=40)),
    ):
        assert "[" not in str(plain)
        name = "a_r"
        low, high = bounded.intervals[name]
        line = next(line for line in str(bounded).splitlines() if line.startswith("  A_r"))
        assert line.split()[1] == f"{getattr(bounded, name):.3f}" and f"[{low:.3f}, {high:.3f}]" in line
        ends = {line.index("]") for line in str(bounded).splitlines() if "]" in line}
        assert len(ends) == 1


def test_notebooks_show_the_same_cells() -> None:
    y, x, z = three_sides(n=40)
    report = diagnostics.alignment(y, x, z, bootstrap=40)
    parser = Cells()
    parser.feed(report._repr_html_())
    assert parser.open == [] and len(parser.cells) == 10 * 4
    text = str(report)
    assert all(cell in text for cell in parser.cells)
    assert all(f"warning: {part}" in report._repr_html_().replace("&#x27;", "'") for part in report.warnings)
    path = diagnostics.oracle_path(y, x, k=3, alphas=(0.0,))
    assert path._repr_html_().startswith("<pre>oracle path of 40 pairs")


def test_pandas_has_a_row_for_each_report_and_each_step() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is optional")
    y, x, z = three_sides()
    report = diagnostics.alignment(y, x, z, bootstrap=40)
    table = report.to_pandas()
    assert table.shape[0] == 1 and table["psi"][0] == report.psi
    assert (table["psi_low"][0], table["psi_high"][0]) == report.intervals["psi"]
    assert not {"spectrum", "intervals", "warnings"} & set(table.columns)
    assert pandas.concat([table, diagnostics.alignment(y, x, y).to_pandas()]).shape[0] == 2
    assert diagnostics.gap(y, x).to_pandas()["g_mu"][0] == diagnostics.gap(y, x).g_mu
    path = diagnostics.oracle_path(y, x, top_k=(2, 4), alphas=(0.0, 0.5, 1.0), k=5)
    steps = path.to_pandas()
    assert list(steps["top_k"]) == [2, 2, 2, 4, 4, 4] and list(steps["alpha"]) == [0, 0.5, 1] * 2
    assert list(steps["m_z"]) == [point.alignment.m_z for point in path.points]


def test_without_pandas_the_command_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        diagnostics.gap(*three_sides()[:2]).to_pandas()
