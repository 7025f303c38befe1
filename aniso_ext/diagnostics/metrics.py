"""Every reported number in words: what it is, what is good and what is bad."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number of a report.

    Attributes:
        field: its name in :class:`GapReport` or :class:`AlignmentReport`.
        symbol: its name for people.
        digits: decimals that are shown.
        meaning: one plain sentence.
        good: what a good value is, and of what it speaks.
        bad: the same of a bad value.
        best: ``high``, ``low`` or ``one`` (near 1); empty where no value is better than another.
    """

    field: str
    symbol: str
    digits: int
    meaning: str
    good: str
    bad: str
    best: str = ""


GAP_METRICS = (
    Metric(
        "g_mu", "G_mu", 3, "The distance between the mean source and the mean target embedding.",
        "near 0: the two clouds have the same centre", "large: a constant offset lies between the modalities", "low",
    ),
    Metric(
        "g_sigma", "G_Sigma", 3, "How far the two covariance matrices are apart, as a share of the target's.",
        "near 0: both clouds have the same shape", "near 1 or above: they spread in different directions", "low",
    ),
    Metric(
        "c_lambda", "C_lambda", 3, "Whether both clouds share out their energy alike from the strongest direction on.",
        "near 1: the spectra fall off alike", "near 0: they fall off in unrelated ways", "high",
    ),
    Metric(
        "o_q", "O_q", 3, "How much of the q strongest directions of one cloud lies in those of the other.",
        "near 1: the strong directions are shared", "near q/D: they are as unrelated as random ones", "high",
    ),
    Metric(
        "d_center", "D_center", 3, "The mean squared distance that pairs keep once both means agree.",
        "near 0: pairs coincide when the offset is gone", "large: pairs stay apart whatever is shifted", "low",
    ),
    Metric(
        "residual_norm", "E‖r‖", 3, "The mean distance that pairs keep once both means agree.",
        "near 0: pairs coincide when the offset is gone", "large: pairs stay apart whatever is shifted", "low",
    ),
    Metric(
        "r_res", "R_res", 3, "The share of the squared distance of pairs that a shift of the mean cannot remove.",
        "near 0: a shift of the mean closes the gap", "near 1: a shift of the mean changes next to nothing",
    ),
    Metric(
        "r_res_distance", "R_res (distance)", 3, "The same share, of distances that are not squared.",
        "near 0: a shift of the mean closes the gap", "near 1: a shift of the mean changes next to nothing",
    ),
    Metric(
        "a_r", "A_r", 1, "How much stronger the residual's strongest direction is than its average direction.",
        "well above its isotropic value: few directions carry the residual, and correcting them pays",
        "at its isotropic value: the residual has no direction to correct",
    ),
    Metric(
        "d_eff_ratio", "d_eff/D", 3, "The share of all directions over which the residual is spread.",
        "well below its isotropic value: the residual is concentrated", "at its isotropic value: all directions alike",
    ),
    Metric(
        "eta_u", "eta_U", 3, "The share of the residual in the dominant subspace, which a frame can reach.",
        "near 1: the frame reaches nearly all of it", "near R/D: no more than random directions hold",
    ),
)  # fmt: skip

METHOD_METRICS = (
    Metric(
        "delta_mu", "Delta_mu", 3, "The distance between the mean stand-in and the mean target.",
        "near 0: stand-ins have the centre of the targets", "as large as identity's: the offset is left", "low",
    ),
    Metric(
        "phi", "Phi", 3, "The mean cosine between a row and its stand-in.",
        "near 1: rows were hardly moved", "low: rows were moved far; Delta_mu = 0 bounds it", "high",
    ),
    Metric(
        "psi", "Psi", 3, "Whether two rows that were similar before are as similar after.",
        "near 1: all similarities are kept", "near 0: the relations of the source are lost", "high",
    ),
    Metric(
        "omega", "Omega", 3, "The share of each row's nearest neighbours that are still its neighbours after.",
        "near 1: neighbourhoods are kept", "near k/(n − 1): neighbours are as by chance", "high",
    ),
    Metric(
        "m_z", "M_Z", 3, "Penetration: how evenly targets and stand-ins are mixed around the stand-ins.",
        "near 1: as well mixed as shuffled labels", "near 0: stand-ins have only stand-ins around them", "one",
    ),
    Metric(
        "m_x", "M_X", 3, "Coverage: how evenly targets and stand-ins are mixed around the targets.",
        "near 1: stand-ins are found wherever targets are", "near 0: targets have only targets around them", "one",
    ),
    Metric(
        "a_r", "A_r", 1, "How uneven target minus stand-in is over all directions, the mean included.",
        "near its isotropic value: no direction is left to correct", "large: one direction, often the mean, dominates",
        "low",
    ),
    Metric(
        "paired_cosine", "cosine", 3, "The mean cosine between a stand-in and its own target.",
        "near 1: stand-ins are where their targets are", "below identity's: it led away from the targets", "high",
    ),
    Metric(
        "recall_at_1", "R@1", 3, "How often the target nearest to a stand-in is its own.",
        "near 1: a stand-in still says which target is meant", "near 1/n: stand-ins have forgotten it", "high",
    ),
    Metric(
        "recall_at_10", "R@10", 3, "How often its own target is among the ten nearest to a stand-in.",
        "near 1: a stand-in still says which target is meant", "near 10/n: stand-ins have forgotten it", "high",
    ),
)  # fmt: skip
