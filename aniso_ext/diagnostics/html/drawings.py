"""Which figures a study has, how to read each, and what each shows in words for those who cannot see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from aniso_ext.diagnostics import figures
from aniso_ext.diagnostics.alignment import AlignmentReport
from aniso_ext.diagnostics.choice import IDENTITY
from aniso_ext.diagnostics.corrections import CorrectionReport
from aniso_ext.diagnostics.findings import range_of
from aniso_ext.diagnostics.gap import GapReport
from aniso_ext.diagnostics.html.pictures import Picture, picture
from aniso_ext.diagnostics.oracle import OraclePathReport
from aniso_ext.diagnostics.phases import PhaseReport
from aniso_ext.diagnostics.projection import ProjectionReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _of(function: Callable[..., Figure], *reports: object) -> Callable[[str, float], Figure]:
    return lambda theme, width: function(*reports, theme=theme, width=width)


def gap_pictures(gap: GapReport) -> list[Picture]:
    """Spectra, subspaces, bias and residual of a gap."""
    c, o, r, a, d = (range_of(gap, name) for name in ("c_lambda", "o_q", "r_res", "a_r", "d_eff_ratio"))
    half = next((point for point in gap.energy if point.energy >= 0.5), None)
    reach = (
        ""
        if half is None
        else f" The {half.rank} strongest of {gap.width} directions hold {100 * half.energy:.0f} % of the residual "
        "energy."
    )
    return [
        picture(
            _of(figures.covariance_spectra, gap),
            alt=f"Spectra of both covariances fall off with correlation C_lambda {c} of their logarithms over "
            f"{gap.c_lambda_count} eigenvalues.",
            caption="Variances along the principal directions of each cloud. Lines that run side by side are a "
            "compatible "
            "fall-off.",
        ),
        picture(
            _of(figures.subspace_overlap, gap),
            alt=f"The {gap.q} strongest directions of both clouds overlap by {o}; unrelated ones would by "
            f"{gap.o_q_baseline:.3f}.",
            caption="How much of the q strongest directions both clouds share. Above the dashed line is more than "
            "chance.",
        ),
        picture(
            _of(figures.residual_spectrum, gap),
            alt=f"The residual's strongest direction is {a:.1f} times its average; an isotropic residual of this size "
            f"would read {gap.a_r_isotropic:.1f}.",
            caption="Energies of the residual's directions against the band that pure noise of the same energy would "
            "fill. Directions above the band can be corrected.",
        ),
        picture(
            _of(figures.cumulative_energy, gap),
            alt=f"The residual is spread over {d} of all directions (isotropic here: "
            f"{gap.d_eff_ratio_isotropic:.3f}).{reach}",
            caption="Share of the residual in its K strongest directions. The further above the diagonal, the fewer "
            "directions matter.",
        ),
        picture(
            _of(figures.bias_and_residual, gap),
            alt=f"Of the mean squared distance of pairs, {_percent(r.value)} is residual, which stays after a shift "
            f"of the mean, and {_percent(1 - r.value)} is bias.",
            caption="What a shift of the mean takes away (bias), and what it leaves (residual).",
        ),
    ]


def method_pictures(methods: Mapping[str, AlignmentReport], oracle: OraclePathReport | None) -> list[Picture]:
    """All methods against each other."""
    mixed = {name: min(report.m_z, report.m_x) for name, report in methods.items()}
    points = _each({name: f"mixing {mixed[name]:.3f}, Omega {report.omega:.3f}" for name, report in methods.items()})
    path = "" if oracle is None else " Dashed: the oracle path, which is given the pairs."
    bars = _each({name: f"M_Z {report.m_z:.3f}, M_X {report.m_x:.3f}" for name, report in methods.items()})
    kept = _each(
        {
            name: f"Phi {report.phi:.3f}, Psi {report.psi:.3f}, Omega {report.omega:.3f}"
            for name, report in methods.items()
        }
    )
    spectra = _each({name: f"A_r {report.a_r:.1f}" for name, report in methods.items()})
    apart = _each(
        {name: f"Delta_mu {report.delta_mu:.3f}, cosine {report.paired_cosine:.3f}" for name, report in methods.items()}
    )
    return [
        picture(
            lambda theme, width: figures.mixing_plane(methods, oracle, theme=theme, width=width),
            alt=f"Neighbours kept against mixing with the targets. {points}",
            caption="Up: the source's neighbourhoods are kept. Right: stand-ins and targets are mixed. Up and to the "
            f"right is better.{path}",
        ),
        picture(
            _of(figures.penetration_and_coverage, methods),
            alt=f"Penetration M_Z and coverage M_X, 1 being mixed as by chance. {bars}",
            caption="Mixing seen from the stand-ins and from the targets. A method that is high in one alone has "
            "piled up "
            "or spread out.",
        ),
        picture(
            _of(figures.relative_discrepancies, methods),
            alt=f"What is left of each discrepancy, relative to the source as it is. {apart}",
            caption="Distance from the ideal in every number, 0 being the best; Delta_mu and A_r relative to identity.",
        ),
        picture(
            _of(figures.residual_spectra, methods),
            alt=f"Spectra of what is left between targets and stand-ins. {spectra}",
            caption="Energies of target minus stand-in. A line whose first points are low has no dominant error left.",
        ),
        picture(
            _of(figures.consistency, methods),
            alt=f"How much each method keeps of the source. {kept}",
            caption="Phi, Psi and Omega: what stays of rows, of their similarities and of their neighbours.",
            wide=True,
        ),
    ]


def phase_pictures(phases: PhaseReport) -> list[Picture]:
    """Phases and radii in the blocks of a frame."""
    target = phases.clouds["target"]
    shown = range(len(phases.blocks))
    off = {
        name: max((abs(cloud.concentration[i] - target.concentration[i]) for i in shown), default=math.nan)
        for name, cloud in phases.clouds.items()
        if name != "target"
    }
    furthest = _each({name: f"{value:.3f}" for name, value in off.items()})
    maps = ", ".join(str(one.block) for one in phases.radius_maps)
    return [
        picture(
            _of(figures.phase_marginals, phases),
            dense=True,
            alt=f"Phase histograms in the {len(phases.blocks)} strongest blocks. Largest difference of concentration "
            f"to the target: {furthest}",
            caption="Angles in the strongest blocks of the frame; filled are the targets. Lines should follow the "
            "filled "
            "shape.",
            wide=True,
        ),
        picture(
            _of(figures.phase_couplings, phases),
            dense=True,
            alt=f"Phase couplings between {len(phases.coupled_blocks)} blocks, for each cloud; above "
            f"{phases.coupling_threshold:.3f} they are more than chance.",
            caption="How firmly the angles of two blocks go together. Each panel should look like the target's.",
            wide=True,
        ),
        picture(
            _of(figures.radius_maps, phases),
            alt=f"Radius maps of blocks {maps}: target radius at each source radius.",
            caption="Target radius at each source radius of a block. On the diagonal a radius is left as it is.",
            wide=True,
        ),
    ]


def row_pictures(projection: ProjectionReport | None, corrections: CorrectionReport | None) -> list[Picture]:
    """Where rows lie, and how far they were moved."""
    found = []
    if projection is not None:
        first, second = projection.explained
        centres = _each({name: _centre(points) for name, points in projection.coordinates.items()})
        found.append(
            picture(
                _of(figures.joint_projection, projection),
                dense=True,
                alt=f"Clouds in the plane of the two leading principal axes of all of them, with {_percent(first)} "
                f"and {_percent(second)} of the variance. Centres: {centres}",
                caption=f"{projection.n:,} rows of each cloud over the targets. The plane shows "
                f"{_percent(first + second)} of the pooled variance, and nothing of the rest.",
                wide=True,
            )
        )
    if corrections is not None:
        sizes = _each({name: f"{one.mean:.3f} on average" for name, one in corrections.lengths.items()})
        found.append(
            picture(
                _of(figures.correction_sizes, corrections),
                dense=True,
                alt=f"Lengths by which rows were moved. {sizes}",
                caption="How far each method moved its rows, and, for a refined one, how much of that is the "
                "refinement and its bound.",
                wide=True,
            )
        )
    return found


def _percent(value: float) -> str:
    return "an undefined share" if math.isnan(value) else f"{100 * value:.1f} %"


def _each(texts: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in texts.items()) + "." if texts else f"{IDENTITY} alone."


def _centre(points: tuple[tuple[float, float], ...]) -> str:
    across, up = (math.fsum(point[axis] for point in points) / max(1, len(points)) for axis in (0, 1))
    return f"{across:.2f}, {up:.2f}"
