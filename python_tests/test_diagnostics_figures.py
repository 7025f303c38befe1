"""Figures of the diagnostics: what is drawn is what the report says, and every text can be read."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from aniso_ext import Frame, diagnostics
from aniso_ext.diagnostics import AlignmentReport, CorrectionReport, GapReport, OraclePathReport, PhaseReport
from aniso_ext.diagnostics import figures as f
from aniso_ext.diagnostics.figures import style
from aniso_ext.diagnostics.figures.labels import plain, spread, wrap
from aniso_ext.diagnostics.gap import OverlapPoint
from aniso_ext.diagnostics.intervals import Interval
from aniso_ext.errors import AnisoError, InputError

pytestmark = pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")

LONG_NAMES = (
    "identity",
    "anisoalign",
    "realign",
    "c3_code",
    "anisotropic alignment, balanced mixing, rank 128, corpus calibration with three steps",
    "runs/2026-11-26/fashion44k/aligner_without_refinement_seed_1",
    "anisoalign_closed_form",
    "a name with $ and _ and ^ signs in it",
    "averyveryverylongnamewithoutanyblankorsignatwhichonecouldbreakitintolines",
    "gaussian_monge",
)


@dataclass(frozen=True)
class Reports:
    """One report of each kind, of the same pairs."""

    gap: GapReport
    methods: dict[str, AlignmentReport]
    oracle: OraclePathReport
    phases: PhaseReport
    projection: diagnostics.ProjectionReport
    corrections: CorrectionReport


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def frame_of(width: int, rank: int) -> Frame:
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(width, rank)))[0]
    knots = np.sort(rng.uniform(0.01, 1, size=(2, rank // 2, 40)), axis=2)
    arrays = (np.full(width, 0.1), np.full(width, -0.1), basis, *knots, np.ones(1))
    return Frame(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def make_reports(names: tuple[str, ...], n: int = 240, width: int = 12, rank: int = 8, k: int = 5) -> Reports:
    rng = np.random.default_rng(0)
    scale = np.arange(1, width + 1) ** -0.5
    y = unit(rng.normal(size=(n, width)) * scale + 0.2)
    x = unit(y + 0.6 * rng.normal(size=(n, width)) * scale - 0.3)
    stand_ins = {name: unit(y + 0.04 * place * rng.normal(size=y.shape)) for place, name in enumerate(names)}
    others = {name: rows for name, rows in stand_ins.items() if name != "identity"}
    refined = next(iter(others), None)
    initial = {} if refined is None else {refined: unit(others[refined] + 0.01)}
    return Reports(
        gap=diagnostics.gap(y, x),
        methods={name: diagnostics.alignment(y, x, z, k=k) for name, z in stand_ins.items()},
        oracle=diagnostics.oracle_path(y, x, top_k=(1, width), alphas=(0.0, 0.5, 1.0), k=k),
        phases=diagnostics.phase_report(y, x, others, frame_of(width, rank)),
        projection=diagnostics.projection(y, x, others),
        corrections=diagnostics.corrections(y, stand_ins, initial=initial, bounds=dict.fromkeys(initial, 0.05)),
    )


CALLS: dict[str, Callable[..., Figure]] = {
    **{
        function.__name__: (lambda reports, function=function, **options: function(reports.gap, **options))
        for function in (
            f.covariance_spectra,
            f.subspace_overlap,
            f.bias_and_residual,
            f.residual_spectrum,
            f.cumulative_energy,
        )
    },
    **{
        function.__name__: (lambda reports, function=function, **options: function(reports.methods, **options))
        for function in (f.relative_discrepancies, f.penetration_and_coverage, f.residual_spectra, f.consistency)
    },
    **{
        function.__name__: (lambda reports, function=function, **options: function(reports.phases, **options))
        for function in (f.phase_marginals, f.phase_couplings, f.radius_maps)
    },
    "mixing_plane": lambda reports, **options: f.mixing_plane(reports.methods, reports.oracle, **options),
    "mixing_plane alone": lambda reports, **options: f.mixing_plane(reports.methods, **options),
    "joint_projection": lambda reports, **options: f.joint_projection(reports.projection, **options),
    "correction_sizes": lambda reports, **options: f.correction_sizes(reports.corrections, **options),
}


@pytest.fixture(scope="module")
def reports() -> Reports:
    """Three methods, with a curve of overlaps and with intervals."""
    made = make_reports(("identity", "realign", "mine"))
    gap = replace(
        made.gap,
        overlap=tuple(OverlapPoint(q, 0.3 + 0.05 * q, q / 12) for q in (1, 2, 4, 8, 12)),
        intervals={
            name: Interval(getattr(made.gap, name) - 0.1, getattr(made.gap, name) + 0.1) for name in ("c_lambda", "o_q")
        },
    )
    metrics = ("delta_mu", "phi", "psi", "omega", "m_z", "m_x", "a_r")
    methods = {
        name: replace(
            report, intervals={m: Interval(getattr(report, m) - 0.02, getattr(report, m) + 0.03) for m in metrics}
        )
        for name, report in made.methods.items()
    }
    return replace(made, gap=gap, methods=methods)


@pytest.fixture(scope="module")
def many() -> Reports:
    return make_reports(LONG_NAMES)


def texts(figure: Figure) -> Iterator[Text]:
    """Every text that is drawn and not empty."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-9 * (high - low)
            for minor in (False, True):
                places = axis.get_ticklocs(minor=minor)
                for place, label in zip(places, axis.get_ticklabels(minor=minor), strict=False):
                    if not low - slack <= place <= high + slack:
                        hidden.add(label)
            hidden.update(tick.label2 for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()))
        if not axes.get_visible():
            hidden.update(axes.findobj(Text))
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in hidden:
            yield text


def check_texts(figure: Figure) -> None:
    """All texts are inside the figure, apart from each other, and at least seven points high."""
    figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    boxes = []
    for text in texts(figure):
        box = Text.get_window_extent(text)  # of an annotation without its leader
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
        assert text.get_fontsize() >= 7, text
        assert text.get_fontfamily() == ["DejaVu Sans"], text
        boxes.append((text.get_text(), box))
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, (first, second)


@pytest.mark.parametrize("width", [3.4, 7.0])
@pytest.mark.parametrize("name", CALLS)
def test_ten_methods_with_long_names_are_read(name: str, width: float, many: Reports) -> None:
    figure = CALLS[name](many, width=width)
    check_texts(figure)
    assert figure.get_figwidth() == width


@pytest.mark.parametrize("width", [3.4, 7.0])
@pytest.mark.parametrize("name", CALLS)
def test_a_few_methods_with_intervals_are_read(name: str, width: float, reports: Reports) -> None:
    check_texts(CALLS[name](reports, width=width))


@pytest.mark.parametrize("name", CALLS)
def test_three_pairs_of_width_two_with_one_neighbour(name: str) -> None:
    # one method, M undefined for k = 1, one block, no overlap curve
    tiny = make_reports(("identity",), n=3, width=2, rank=2, k=1)
    assert math.isnan(tiny.methods["identity"].m_z)
    check_texts(CALLS[name](tiny, theme="dark"))


@pytest.mark.parametrize("name", CALLS)
def test_metrics_that_are_not_defined(name: str, reports: Reports) -> None:
    nan, zeros = math.nan, (0.0,) * 12
    undefined = {name: nan for name in ("psi", "m_z", "m_x", "a_r", "omega", "phi", "phi_bound", "phi_bound_output")}
    gap = replace(
        reports.gap, c_lambda=nan, a_r=nan, d_eff=nan, d_eff_ratio=nan, d_center=0.0, g_mu=0.0, residual_spectrum=zeros
    )
    methods = {
        "identity": replace(reports.methods["identity"], intervals={}, spectrum=zeros, **undefined),
        "mine": replace(reports.methods["mine"], delta_mu=0.0, intervals={}),
    }
    check_texts(CALLS[name](replace(reports, gap=gap, methods=methods), width=3.4))


def lines(axes: Any) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_gap_figures_draw_the_numbers_of_the_report(reports: Reports) -> None:
    gap = reports.gap
    drawn = lines(f.covariance_spectra(gap).axes[0])
    for name, spectrum in (("source", gap.source_spectrum), ("target", gap.target_spectrum)):
        np.testing.assert_array_equal(drawn[name], np.column_stack((np.arange(1, 13), spectrum)))
    axes = f.covariance_spectra(gap).axes[0]
    low, high = gap.intervals["c_lambda"]
    assert f"= {gap.c_lambda:.3f} [{low:.3f}, {high:.3f}] over 12 eigenvalues" in axes.get_title("left")

    drawn = lines(f.subspace_overlap(gap).axes[0])
    np.testing.assert_array_equal(drawn["measured"], [(p.q, p.overlap) for p in gap.overlap])
    np.testing.assert_array_equal(drawn["unrelated, q/D"], [(p.q, p.baseline) for p in gap.overlap])
    np.testing.assert_array_equal(drawn["interval"][:, 1], gap.intervals["o_q"])
    alone = lines(f.subspace_overlap(replace(gap, overlap=())).axes[0])
    np.testing.assert_array_equal(alone["measured"], [(gap.q, gap.o_q)])

    bars = [patch for patch in f.bias_and_residual(gap).axes[0].patches]
    whole = gap.g_mu**2 + gap.d_center
    widths = np.array([bar.get_width() for bar in bars]) * whole / 100
    np.testing.assert_allclose(widths, [gap.g_mu**2, 0, gap.d_center, gap.d_center], rtol=1e-12)
    assert bars[3].get_width() == pytest.approx(100 * gap.r_res) and bars[2].get_x() == bars[0].get_width()

    axes = f.residual_spectrum(gap).axes[0]
    np.testing.assert_array_equal(lines(axes)["measured"][:, 1], gap.residual_spectrum)
    flat, root = gap.d_center / 12, math.sqrt(12 / gap.n)
    assert set(lines(axes)["isotropic"][:, 1]) == {flat}
    band = axes.patches[0]
    edges = band.get_y(), band.get_y() + band.get_height()
    np.testing.assert_allclose(edges, [flat * (1 - root) ** 2, flat * (1 + root) ** 2], rtol=1e-12)

    drawn = lines(f.cumulative_energy(gap).axes[0])
    assert {point.rank: point.energy for point in gap.energy} == pytest.approx(
        {point.rank: drawn["E(K)"][point.rank, 1] for point in gap.energy}
    )
    np.testing.assert_array_equal(drawn["K/D"], [(0, 0), (12, 1)])
    assert set(drawn["d_eff"][:, 0]) == {gap.d_eff}


def test_the_band_holds_an_isotropic_residual() -> None:
    rng = np.random.default_rng(3)
    y = np.zeros((2000, 200))
    axes = f.residual_spectrum(diagnostics.gap(y, y + rng.normal(size=y.shape))).axes[0]
    band, measured = axes.patches[0], lines(axes)["measured"][:, 1]
    # the edges are asymptotic: the largest eigenvalue strays by O(n^(-2/3)), here about one part in a hundred
    assert measured.max() < 1.03 * (band.get_y() + band.get_height()) and measured.min() > 0.97 * band.get_y()
    assert measured.max() > 0.94 * (band.get_y() + band.get_height()) and measured.min() < 1.06 * band.get_y()


def test_the_mixing_plane_draws_points_and_the_path(reports: Reports) -> None:
    for preservation in ("omega", "psi", "phi"):
        drawn = lines(f.mixing_plane(reports.methods, reports.oracle, preservation=preservation).axes[0])
        for name, report in reports.methods.items():
            point = (min(report.m_z, report.m_x), getattr(report, preservation))
            np.testing.assert_array_equal(drawn[name], [point])
        for rank in (1, 12):
            steps = [point.alignment for point in reports.oracle.points if point.top_k == rank]
            expected = [(min(step.m_z, step.m_x), getattr(step, preservation)) for step in steps]
            np.testing.assert_array_equal(drawn[f"oracle K = {rank}"], expected)
    notes = {text.get_text() for text in f.mixing_plane(reports.methods, reports.oracle).axes[0].texts}
    assert {"0.5", "oracle, K = D, $\\alpha$ = 1", *reports.methods} <= notes


def test_discrepancies_are_over_those_of_the_identity(reports: Reports) -> None:
    base, mine = reports.methods["identity"], reports.methods["mine"]
    drawn = lines(f.relative_discrepancies(reports.methods).axes[0])["mine"][:, 0]
    ones = [1 - getattr(mine, name) for name in ("phi", "psi", "omega", "m_z", "m_x")]
    np.testing.assert_array_equal(drawn, [mine.delta_mu / base.delta_mu, *ones, mine.a_r / base.a_r])
    without = {name: report for name, report in reports.methods.items() if name != "identity"}
    drawn = lines(f.relative_discrepancies(without).axes[0])
    np.testing.assert_array_equal(drawn["realign"][[0, -1], 0], [1, 1])


def test_bars_spectra_and_consistency_draw_the_reports(reports: Reports) -> None:
    axes = f.penetration_and_coverage(reports.methods).axes[0]
    widths = {container.get_label(): container.patches[0].get_width() for container in axes.containers}
    assert widths == {f"{m} {name}": getattr(r, m) for name, r in reports.methods.items() for m in ("m_z", "m_x")}
    intervals = {tuple(line.get_xdata()) for line in axes.lines}
    assert {tuple(r.intervals[m]) for r in reports.methods.values() for m in ("m_z", "m_x")} <= intervals

    drawn = lines(f.residual_spectra(reports.methods).axes[0])
    for name, report in reports.methods.items():
        positive = np.array(report.spectrum) > 0
        np.testing.assert_array_equal(drawn[name][positive, 1], np.array(report.spectrum)[positive])

    for width in (3.4, 7.0):
        for axes, metric in zip(f.consistency(reports.methods, width=width).axes, ("phi", "psi", "omega"), strict=True):
            values = [getattr(report, metric) for report in reports.methods.values()]
            assert [lines(axes)[name][0, 0] for name in reports.methods] == values
            intervals = {tuple(line.get_xdata()) for line in axes.lines}
            assert {tuple(report.intervals[metric]) for report in reports.methods.values()} <= intervals
            if metric == "phi":
                bounds = [line.get_xdata()[0] for line in axes.lines if line.get_label() == "bound"]
                assert bounds == [report.phi_bound_output for report in reports.methods.values()]
                assert set(lines(axes)["cap"][:, 0]) == {reports.methods["mine"].phi_bound}


def test_phase_figures_draw_the_report(reports: Reports) -> None:
    phases = reports.phases
    figure = f.phase_marginals(phases)
    for place, axes in enumerate(figure.axes[:-1]):
        # 240 rows: four of the 64 bins are drawn as one
        for name, cloud in phases.clouds.items():
            density = np.array(cloud.histograms[place]).reshape(16, 4).sum(axis=1) * 16
            drawn = axes.patches[0].get_data().values if name == "target" else lines(axes)[name][:, 1]
            np.testing.assert_allclose(drawn, density, rtol=1e-12)
    for name, cloud in phases.clouds.items():
        np.testing.assert_array_equal(lines(figure.axes[-1])[name][:, 1], cloud.concentration)

    panels = f.phase_couplings(phases).axes
    for axes, cloud in zip(panels, phases.clouds.values(), strict=False):
        image, expected = axes.images[0].get_array(), np.array(cloud.coupling)
        np.fill_diagonal(expected, np.nan)
        np.testing.assert_array_equal(np.ma.filled(image, np.nan), expected)

    for axes, item in zip(f.radius_maps(phases).axes, phases.radius_maps, strict=False):
        np.testing.assert_array_equal(lines(axes)[f"block {item.block}"], np.column_stack((item.source, item.target)))


def test_row_figures_draw_the_report(reports: Reports) -> None:
    points = reports.projection.coordinates
    for axes, name in zip(f.joint_projection(reports.projection).axes, ("source", "realign", "mine"), strict=True):
        for collection, cloud in zip(axes.collections, ("target", name), strict=True):
            np.testing.assert_array_equal(collection.get_offsets(), points[cloud])

    report = reports.corrections
    panels = f.correction_sizes(report).axes
    for column, sizes, edges in ((0, report.lengths, report.length_edges), (3, report.angles, report.angle_edges)):
        for axes, found in zip(panels[column : column + 3], sizes.values(), strict=True):
            drawn = axes.patches[0].get_data()
            np.testing.assert_array_equal(drawn.values, found.shares)
            np.testing.assert_array_equal(drawn.edges, edges)
            assert set(lines(axes)["median"][:, 0]) == {found.median}
    assert set(lines(panels[6])["bound"][:, 0]) == {0.05}
    np.testing.assert_array_equal(panels[6].patches[0].get_data().values, report.realised["realign"].sizes.shares)


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance."""
    channels = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", style.THEMES.values(), ids=style.THEMES)
def test_texts_and_series_stand_out_from_the_background(theme: style.Theme) -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert min(contrast(colour, theme.background) for colour in theme.hues.values()) >= 3
    assert min(contrast(colour, theme.background) for colour in (theme.ink, theme.muted)) >= 4.5


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("theme", style.THEMES.values(), ids=style.THEMES)
def test_every_text_that_is_drawn_stands_out(theme: style.Theme, name: str, reports: Reports) -> None:
    figure = CALLS[name](reports, theme=theme.name)
    assert matplotlib.colors.to_hex(figure.get_facecolor()) == theme.background
    for text in texts(figure):
        on_bar = name == "bias_and_residual" and text.get_text().startswith("residual")
        background = theme.muted if on_bar else theme.background
        assert contrast(matplotlib.colors.to_hex(text.get_color()), background) >= 3, text


# no long or no middle cones: Machado et al. 2009, severity 1, on linear RGB
DEFICIENCIES = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def lab(colour: str, vision: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of a colour as it is seen, D65."""
    channels = np.array(matplotlib.colors.to_rgb(colour))
    linear = vision @ np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = to_xyz @ linear.clip(0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", DEFICIENCIES)
@pytest.mark.parametrize("theme", style.THEMES.values(), ids=style.THEMES)
def test_common_methods_are_told_apart_with_any_colour_vision(theme: style.Theme, vision: str) -> None:
    names = (
        "target",
        "source",
        "anisoalign",
        "realign",
        "mean_shift",
        "c3_code",
        "c3_paper",
        "gaussian_monge",
        "permuted",
    )
    seen = [lab(look.colour, DEFICIENCIES[vision]) for look in style.looks(names, theme).values()]
    # a difference of 10 is told apart at a glance; about 2.3 is the least that is noticed side by side
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 10


def test_a_method_looks_the_same_in_every_figure() -> None:
    theme = style.LIGHT
    together = style.looks(["mine", "yours", "identity", "realign"], theme)
    apart = style.looks(["target", "source", "realign", "yours", "mine"], theme)
    assert all(together[name] == apart[name] for name in ("mine", "yours", "realign"))
    assert together["identity"] == apart["source"]  # which it leaves as it is
    assert style.looks(["c3-code", "C3 code"], theme)["c3-code"] == style.looks(["c3_code"], theme)["c3_code"]
    ten = style.looks([f"method {number}" for number in range(10)], theme)
    assert len(set(ten.values())) == 10 and len({look.colour for look in ten.values()}) == 10
    assert all(look.colour for look in style.looks([str(number) for number in range(30)], theme).values())


def test_figures_depend_on_no_settings_and_change_none(reports: Reports) -> None:
    plain_settings = dict(matplotlib.rcParams)
    expected = {text.get_text(): text.get_fontsize() for text in texts(f.mixing_plane(reports.methods))}
    assert dict(matplotlib.rcParams) == plain_settings
    with matplotlib.rc_context({"font.size": 20, "font.family": "monospace", "text.color": "red"}):
        figure = f.mixing_plane(reports.methods)
        check_texts(figure)
        assert {text.get_text(): text.get_fontsize() for text in texts(figure)} == expected


def test_drawing_needs_no_display_and_importing_no_matplotlib(tmp_path: Path) -> None:
    program = (
        "import sys, aniso_ext.diagnostics.figures\n"
        "assert not any(name.startswith('matplotlib') for name in sys.modules)\n"
        "import numpy as np\n"
        "from aniso_ext import diagnostics\n"
        "rows = np.random.default_rng(0).normal(size=(40, 4))\n"
        "aniso_ext.diagnostics.figures.cumulative_energy(diagnostics.gap(rows, -rows)).savefig(sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "energy.png"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_names_the_extra(reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(AnisoError, match="need matplotlib: install the extra `plots`"):
        f.cumulative_energy(reports.gap)


def test_impossible_options_are_named(reports: Reports) -> None:
    with pytest.raises(InputError, match="theme must be one of light, dark, got 'blue'"):
        f.cumulative_energy(reports.gap, theme="blue")
    with pytest.raises(InputError, match=r"width = 1 inches must be at least 2\.5"):
        f.radius_maps(reports.phases, width=1)
    with pytest.raises(InputError, match="no methods"):
        f.consistency({})
    with pytest.raises(InputError, match="preservation must be one of omega, psi, phi, got 'a_r'"):
        f.mixing_plane(reports.methods, preservation="a_r")


def test_places_keep_their_distance_and_their_order() -> None:
    wanted = [0.9, 0.1, 0.11, 0.12, 0.95, 0.5]
    places = spread(wanted, 0.1, 0.05, 0.95)
    ordered = np.array(places)[np.argsort(wanted)]
    assert (np.diff(ordered) > 0.1 - 1e-12).all() and ordered[0] >= 0.05 and ordered[-1] <= 0.95 + 1e-12
    assert places[5] == 0.5  # it is in nobody's way
    np.testing.assert_allclose(spread([0.5] * 3, 0.2, 0, 1), [0.3, 0.5, 0.7])


def test_wrapped_names_lose_nothing() -> None:
    for name in LONG_NAMES:
        lines_ = wrap(name, 60).split("\n")
        assert "".join(lines_).replace(" ", "") == plain(name).replace(" ", "")
    assert wrap("one two", 1000) == "one two"


@pytest.mark.parametrize("module", ["style", "labels", "placement", "gap", "methods", "phases", "rows"])
def test_examples_run(module: str) -> None:
    found = importlib.import_module(f"aniso_ext.diagnostics.figures.{module}")
    assert doctest.testmod(found).failed == 0
