"""The alignment report against brute-force NumPy and closed forms."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_diagnostics_gap import paired_rows, unit

from aniso_ext import diagnostics
from aniso_ext.diagnostics import consistency, neighbours, rows, searches
from aniso_ext.errors import InputError


def sorted_neighbours(points: np.ndarray, k: int) -> np.ndarray:
    """Full sort of float64 cosines without self, equal ones in index order."""
    cosines = np.round(unit(points) @ unit(points).T, 9)
    np.fill_diagonal(cosines, -np.inf)
    return np.argsort(-cosines, axis=1, kind="stable")[:, :k]


def entropy(share: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(-share * np.log2(share)) + np.nan_to_num(-(1 - share) * np.log2(1 - share))


def exact_expectation(n: int, k: int) -> float:
    """E[H2(J/k)] with the hypergeometric law in exact integers."""
    law = {j: Fraction(math.comb(n, j) * math.comb(n - 1, k - j), math.comb(2 * n - 1, k)) for j in range(k + 1)}
    assert sum(law.values()) == 1
    return sum(float(weight) * float(entropy(np.array([j / k]))[0]) for j, weight in law.items())


def brute_force(y: np.ndarray, x: np.ndarray, z: np.ndarray, k: int) -> dict[str, float]:
    """METHOD section 1 written out with full similarity matrices."""
    n, width = x.shape
    off = ~np.eye(n, dtype=bool)
    before, after = sorted_neighbours(y, k), sorted_neighbours(z, k)
    union = sorted_neighbours(np.concatenate([x, z]), k)
    mixed = entropy((union < n).mean(1)) / exact_expectation(n, k)
    residual = x - z
    second, centred = residual.T @ residual / n, np.cov(residual.T, bias=True)
    scores = unit(z) @ unit(x).T
    rank = (scores > np.diag(scores)[:, None]).sum(1)
    mean_y, mean_x, mean_z = y.mean(0), x.mean(0), z.mean(0)

    def bound(mean: np.ndarray) -> float:
        return mean @ mean_y + math.sqrt((1 - mean @ mean) * (1 - mean_y @ mean_y))

    return {
        "delta_mu": np.linalg.norm(mean_z - mean_x),
        "phi": np.mean([a @ b for a, b in zip(y, z, strict=True)]),
        "phi_bound": bound(mean_x),
        "phi_bound_output": bound(mean_z),
        "psi": np.corrcoef((y @ y.T)[off], (z @ z.T)[off])[0, 1],
        "omega": np.mean([len(set(a) & set(b)) / k for a, b in zip(before, after, strict=True)]),
        "m_z": mixed[n:].mean(),
        "m_x": mixed[:n].mean(),
        "a_r": np.linalg.eigvalsh(second)[-1] * width / np.trace(second),
        "a_r_centred": np.linalg.eigvalsh(centred)[-1] * width / np.trace(centred),
        "paired_cosine": np.mean(np.sum(unit(x) * unit(z), 1)),
        "recall_at_1": np.mean(rank < 1),
        "recall_at_10": np.mean(rank < 10),
        "mixing_expectation": exact_expectation(n, k),
    }


def three_sides(n: int = 300, width: int = 16, seed: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y, x = paired_rows(n, width, seed)
    noise = np.random.default_rng(seed).normal(size=(n, width))
    return y, x, unit(y - y.mean(0) + x.mean(0) + 0.03 * noise)


pytestmark = pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")


@pytest.mark.parametrize("blocks", [None, (700, 640)], ids=["one block", "many blocks"])
@pytest.mark.parametrize("k", [2, 7, 20])
def test_every_number_equals_brute_force(monkeypatch, k: int, blocks) -> None:
    if blocks:
        monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", blocks[0])
        monkeypatch.setattr(neighbours, "EXACT_BLOCK_ELEMENTS", blocks[1])
    y, x, z = three_sides()
    report = diagnostics.alignment(y, x, z, k=k, exact_psi=True, device="cpu")
    for name, value in brute_force(y, x, z, k).items():
        assert getattr(report, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert (report.n, report.n_available, report.width, report.k) == (300, 300, 16, k)
    assert report.psi_pairs == 300 * 299 and report.omega_chance == k / 299
    residual = x - z
    np.testing.assert_allclose(report.spectrum, np.linalg.eigvalsh(residual.T @ residual / 300)[::-1], rtol=1e-9)


def test_identity_changes_nothing() -> None:
    y, x, _ = three_sides()
    for same in (y, torch.from_numpy(y), y.astype(np.float64).copy()):
        report = diagnostics.alignment(y, x, same)
        assert report.phi == pytest.approx(1, abs=1e-12) and report.psi == pytest.approx(1, abs=1e-12)
        assert report.omega == 1


def test_sampled_psi_is_within_its_standard_error_and_repeats() -> None:
    y, x, z = three_sides()
    exact = brute_force(y, x, z, 5)["psi"]
    report = diagnostics.alignment(y, x, z, n_random_pairs=40_000, seed=3)
    assert report.psi == diagnostics.alignment(y, x, z, n_random_pairs=40_000, seed=3).psi
    assert abs(report.psi - exact) < 4 * (1 - exact**2) / math.sqrt(40_000)
    assert report.psi_pairs == 40_000
    first, second = consistency.random_pairs(7, 50_000, 0)
    counts = np.bincount((first * 7 + second).numpy(), minlength=49).reshape(7, 7)
    assert np.diag(counts).sum() == 0
    expected = 50_000 / 42
    assert np.abs(counts[~np.eye(7, dtype=bool)] - expected).max() < 5 * math.sqrt(expected)


def test_single_precision_never_decides_what_it_cannot(monkeypatch) -> None:
    """Neighbours a few 1e-6 apart, and float32 scores off by almost the assumed bound: the answer stays exact."""
    rng = np.random.default_rng(0)
    width, k = 256, 5
    points = unit(np.ones(width) + 3e-3 * rng.normal(size=(400, width)))
    full = points @ points.T
    ranked = np.sort(full, axis=1)[:, ::-1]
    assert np.median(ranked[:, k] - ranked[:, k + 1]) < neighbours.score_error(width, 2.0**-24)
    np.fill_diagonal(full, -np.inf)
    expected = np.sort(np.argsort(-full, axis=1)[:, :k], axis=1)
    exact = neighbours.products

    def disturbed(queries: torch.Tensor, corpus: torch.Tensor) -> torch.Tensor:
        scores = exact(queries, corpus)
        noise = torch.from_numpy(rng.uniform(-0.8, 0.8, size=tuple(scores.shape))).float()
        return scores + noise * neighbours.score_error(width, 2.0**-24)

    def reduced(queries: torch.Tensor, corpus: torch.Tensor) -> torch.Tensor:
        return (queries.bfloat16() @ corpus.bfloat16().T).float()

    monkeypatch.setattr(neighbours, "TIE", 1e-12)
    for product in (exact, disturbed, reduced):
        monkeypatch.setattr(neighbours, "products", product)
        found = searches.nearest(torch.from_numpy(points), k)
        np.testing.assert_array_equal(found.indices.numpy(), expected)


def test_blocks_stay_small(monkeypatch) -> None:
    """No more than the block size of scores exists at once, however many rows there are."""
    sizes = []
    exact = neighbours.products

    def recorded(queries: torch.Tensor, corpus: torch.Tensor) -> torch.Tensor:
        sizes.append(queries.shape[0] * corpus.shape[0])
        return exact(queries, corpus)

    monkeypatch.setattr(neighbours, "products", recorded)
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", 20_000)
    diagnostics.alignment(*three_sides(n=1000), device="cpu")
    assert max(sizes) <= 20_000 and sum(sizes) == 1000 * 1000 + 2000 * 2000


def duplicated(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """600 rows of which each source row occurs three times, as captions do."""
    rng = np.random.default_rng(seed)
    y, x, z = three_sides(n=600)
    copy = rng.permutation(np.repeat(np.arange(200), 3))
    return y[copy], x, z[copy]


def test_duplicates_keep_their_neighbours() -> None:
    """Five places among groups of three always cut a group: ties resolve alike before and after, also when a
    transform rounded the copies differently, and by the same rule as a stable full sort."""
    y, x, z = duplicated()
    with pytest.warns(diagnostics.DiagnosticsWarning, match="have ties"):
        report = diagnostics.alignment(y, x, z, k=6)
        same = diagnostics.alignment(y, x, y, k=6)
        rounded = diagnostics.alignment(y, x, z + 1e-8 * np.random.default_rng(1).normal(size=z.shape), k=6)
    assert same.omega == 1 and same.omega_tied > 0.9
    assert report.omega == pytest.approx(brute_force(y, x, z, 6)["omega"], abs=1e-12)
    assert rounded.omega == report.omega
    assert rounded.recall_at_1 == pytest.approx(report.recall_at_1, abs=1e-12)


def test_ties_in_recall_count_at_their_chance() -> None:
    x = np.eye(12)[[0, 0, 0, 1, 1, *range(2, 9)]]
    report = diagnostics.alignment(x, x, x, k=2, n_random_pairs=10)
    assert report.recall_at_1 == pytest.approx((3 * (1 / 3) + 2 * (1 / 2) + 7) / 12)
    assert report.recall_at_10 == 1
    z = -x
    assert diagnostics.alignment(x, x, z, k=2, n_random_pairs=10).recall_at_1 == 0


def test_ties_in_mixing_favour_neither_cloud() -> None:
    """Every point of both clouds is the same: the k neighbours are all ties, n targets and n - 1 outputs around z."""
    n, k = 40, 5
    x = np.tile(np.eye(3)[0], (n, 1))
    report = diagnostics.alignment(unit(np.random.default_rng(0).normal(size=(n, 3))), x, x, k=k)
    share = n / (2 * n - 1)
    expected = float(entropy(np.array([share]))[0]) / exact_expectation(n, k)
    assert report.m_z == pytest.approx(expected) and report.m_x == pytest.approx(expected)


@pytest.mark.parametrize(("n", "k"), [(3, 5), (10, 3), (50, 20), (400, 20)])
def test_mixing_expectation_is_the_hypergeometric_one(n: int, k: int) -> None:
    assert diagnostics.mixing_expectation(n, k) == pytest.approx(exact_expectation(n, k), rel=1e-12)


def test_mixing_expectation_of_the_protocol() -> None:
    assert f"{diagnostics.mixing_expectation(10_000, 20):.5f}" == "0.96300"


@pytest.mark.parametrize(("n", "k"), [(0, 1), (5, 0), (5, 10)])
def test_mixing_expectation_needs_enough_rows(n: int, k: int) -> None:
    with pytest.raises(InputError, match="need n >= 1"):
        diagnostics.mixing_expectation(n, k)


def test_permuted_labels_mix_to_one_and_distant_clouds_to_zero() -> None:
    """The labels of one cloud drawn 40 times: the mean of M is 1 within four of its empirical standard errors."""
    rng = np.random.default_rng(7)
    n, k = 250, 20
    cloud = unit(rng.normal(size=(2 * n, 12)) * np.geomspace(1, 0.2, 12))
    values = []
    for _ in range(40):
        order = rng.permutation(2 * n)
        report = diagnostics.alignment(
            cloud[order[:n]], cloud[order[:n]], cloud[order[n:]], k=k, n_random_pairs=2, max_pairs=None
        )
        values.append((report.m_z, report.m_x))
    error = np.std(values, axis=0, ddof=1) / math.sqrt(len(values))
    assert (np.abs(np.mean(values, axis=0) - 1) < 4 * error).all() and (error < 0.01).all()
    far = unit(0.05 * cloud + np.eye(12)[3])
    apart = diagnostics.alignment(cloud, far, -far, k=k)
    assert apart.m_z == 0 and apart.m_x == 0


def test_one_neighbour_has_no_mixing() -> None:
    """With k = 1 the label entropy is always zero, and so is its expectation: undefined, not a division error."""
    report = diagnostics.alignment(*three_sides(), k=1)
    assert math.isnan(report.m_z) and math.isnan(report.m_x) and report.mixing_expectation == 0
    assert json.loads(report.to_json())["m_z"] is None


def test_permuted_outputs_keep_no_neighbours_beyond_chance() -> None:
    """Random pairing: omega k is hypergeometric with mean k^2/(n-1), its mean over n nearly independent rows."""
    n, k = 500, 10
    y, x, _ = three_sides(n=n)
    report = diagnostics.alignment(y, x, x[np.random.default_rng(0).permutation(n)], k=k)
    deviation = math.sqrt(k * (k / (n - 1)) * (1 - k / (n - 1))) / k
    assert abs(report.omega - k / (n - 1)) < 6 * deviation / math.sqrt(n)
    assert abs(report.psi) < 0.1 and report.recall_at_1 < 0.02
    assert report.phi < report.phi_bound == pytest.approx(report.phi_bound_output)


def test_phi_bound_is_reached_by_the_extremal_pair() -> None:
    """Rows spread as a circle around two axes, y = (a, c s_i), z = (b, d s_i): equality in Cauchy-Schwarz."""
    angle = np.linspace(0, 2 * np.pi, 50, endpoint=False)
    spread = np.stack([np.cos(angle), np.sin(angle)], 1)
    y = np.c_[np.full(50, 0.6), 0.8 * spread]
    z = np.c_[np.full(50, 0.28), 0.96 * spread]
    bound = diagnostics.phi_bound(torch.from_numpy(y.mean(0)), torch.from_numpy(z.mean(0)))
    assert bound == pytest.approx(np.sum(y * z, 1).mean(), rel=1e-12)
    assert diagnostics.alignment(y, z, z, k=3).phi == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_phi_never_exceeds_the_bound_of_its_output_mean(seed: int) -> None:
    y, x, z = three_sides(seed=seed)
    for output in (y, x, z, unit(y - y.mean(0) + x.mean(0))):
        report = diagnostics.alignment(y, x, output, k=2, n_random_pairs=10)
        assert report.phi <= report.phi_bound_output + 1e-12


def test_sampling_takes_a_seeded_subset_of_pairs() -> None:
    y, x, z = three_sides()
    chosen = rows.choose_rows(300, 120, seed=9)
    assert len(set(chosen)) == 120 and (np.diff(chosen) > 0).all()
    sampled = diagnostics.alignment(y, x, z, k=4, max_pairs=120, seed=9, exact_psi=True)
    direct = diagnostics.alignment(y[chosen], x[chosen], z[chosen], k=4, exact_psi=True)
    assert (sampled.n, sampled.n_available) == (120, 300)
    assert {**sampled.to_dict(), "n_available": 120} == direct.to_dict()
    assert "sampled from 300" in str(sampled)


def test_paths_tensors_and_half_precision(tmp_path) -> None:
    y, x, z = three_sides()
    np.save(tmp_path / "y.npy", y.astype(np.float16))
    held = y.astype(np.float16).astype(float)
    report = diagnostics.alignment(tmp_path / "y.npy", torch.from_numpy(x), z.astype(np.float32), exact_psi=True)
    for name, value in brute_force(held, x, z.astype(np.float32).astype(float), 20).items():
        assert getattr(report, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name
    brain = torch.from_numpy(y).bfloat16()
    report = diagnostics.alignment(brain, brain, brain)
    assert report.phi == pytest.approx(float(brain.double().square().sum(1).mean()))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda y, x, z: (y, x, z[:-1]), {}, "source has 300 rows but transformed has 299"),
        (lambda y, x, z: (y, x, z[:, :8]), {}, "source has width 16 but transformed has width 8"),
        (lambda y, x, z: (y[:20], x[:20], z[:20]), {}, "20 pairs are too few: at least 21"),
        (lambda y, x, z: (y, x, np.where(np.arange(300)[:, None] == 77, np.nan, z)), {}, "transformed .* row 77"),
        (lambda y, x, z: (y, x, z), {"k": 0}, "k must be at least 1"),
        (lambda y, x, z: (y, x, z), {"max_pairs": 20}, "max_pairs = 20 must exceed k = 20"),
        (lambda y, x, z: (y, x, z), {"n_random_pairs": 1}, "n_random_pairs must be at least 2"),
    ],
)
def test_unusable_input_is_named(change, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        diagnostics.alignment(*change(*three_sides()), **options)


def test_a_non_finite_row_is_named_by_its_place_in_the_input() -> None:
    y, x, z = three_sides()
    chosen = rows.choose_rows(300, 100, seed=0)
    x[chosen[40]] = np.inf
    with pytest.raises(InputError, match=rf"target has .* first in row {chosen[40]}:"):
        diagnostics.alignment(y, x, z, max_pairs=100)


def test_warnings_name_what_the_numbers_cannot_bear() -> None:
    y, x, z = three_sides(n=40)
    z[3] = 0
    with pytest.warns(diagnostics.DiagnosticsWarning) as caught:
        report = diagnostics.alignment(y, x, 2 * z)
    assert tuple(str(item.message) for item in caught) == report.warnings
    assert all(item.filename == __file__ for item in caught)
    for part in ("few for width 16", "many for 40 pairs", "1 zero rows", "39 rows that are not unit"):
        assert sum(part in text for text in report.warnings) == 1
    assert all(f"warning: {text}" in str(report) for text in report.warnings)


def test_lengths_do_not_move_neighbours() -> None:
    y, x, z = three_sides()
    lengths = np.random.default_rng(0).uniform(0.5, 2, size=(300, 1))
    plain = diagnostics.alignment(y, x, z)
    with pytest.warns(diagnostics.DiagnosticsWarning, match="not unit"):
        scaled = diagnostics.alignment(y, x, z * lengths)
    for name in ("omega", "m_z", "m_x", "paired_cosine", "recall_at_1", "recall_at_10"):
        assert getattr(scaled, name) == pytest.approx(getattr(plain, name), abs=1e-12)


def test_json_has_every_number() -> None:
    report = diagnostics.alignment(*three_sides())
    parsed = json.loads(report.to_json())
    assert parsed == report.to_dict() and len(parsed["spectrum"]) == 16
    assert json.loads(report.to_json(indent=None)) == parsed
    for shown in ("Delta_mu", "Phi", "Psi", "Omega_20", "M_Z", "M_X", "A_r", "R@10"):
        assert shown in str(report)


def test_oracle_path_runs_from_the_shift_to_the_target() -> None:
    y, x, _ = three_sides()
    path = diagnostics.oracle_path(y, x, top_k=(2, 16), alphas=(0.0, 0.5, 1.0), k=7)
    assert [(point.top_k, point.alpha) for point in path.points] == [(r, a) for r in (2, 16) for a in (0.0, 0.5, 1.0)]
    residual = (x - x.mean(0)) - (y - y.mean(0))
    values, vectors = np.linalg.eigh(residual.T @ residual / 300)
    for point in path.points:
        leading = vectors[:, -point.top_k :]
        z = unit(y - y.mean(0) + x.mean(0) + point.alpha * residual @ leading @ leading.T)
        assert point.energy == pytest.approx(values[-point.top_k :].sum() / values.sum())
        expected = brute_force(y, x, z, 7)
        undefined = {"a_r", "a_r_centred"} if point.top_k == 16 and point.alpha == 1 else set()
        for name in expected.keys() - undefined:
            assert getattr(point.alignment, name) == pytest.approx(expected[name], rel=1e-8, abs=1e-10), name
    last = path.points[-1].alignment
    assert last.paired_cosine == pytest.approx(1) and last.recall_at_1 == 1 and last.delta_mu < 1e-12
    assert json.loads(path.to_json())["points"][0]["alignment"]["k"] == 7
    assert len(str(path).splitlines()) == 8


def test_oracle_path_defaults_and_errors() -> None:
    y, x, _ = three_sides(n=200, width=20)
    assert sorted({point.top_k for point in diagnostics.oracle_path(y, x, alphas=(0.0,), k=3).points}) == [1, 16, 20]
    assert diagnostics.oracle_path(y, x, top_k=4, alphas=(0.5,), k=3, max_pairs=100).n == 100
    for options, message in [
        ({"top_k": 21}, "top_k must lie between 1 and the width 20"),
        ({"top_k": ()}, "top_k must lie"),
        ({"alphas": (1.5,)}, "alphas must be shares"),
        ({"alphas": ()}, "alphas must be shares"),
        ({"k": 0}, "need k >= 1"),
    ]:
        with pytest.raises(InputError, match=message):
            diagnostics.oracle_path(y, x, **options)
