"""Neighbours found by half-precision candidates: the same as those of float64, whatever the products are worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_diagnostics_alignment import duplicated, three_sides
from test_diagnostics_gap import paired_rows, unit

from aniso_ext import diagnostics
from aniso_ext.diagnostics import candidates, consistency
from aniso_ext.diagnostics import rows as rows_module
from aniso_ext.diagnostics.alignment import measure
from aniso_ext.diagnostics.alignment_intervals import Settings
from aniso_ext.diagnostics.neighbours import Search
from aniso_ext.diagnostics.searches import nearest
from aniso_ext.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")

WORLDS = {
    "more rows than a list": (three_sides(n=700), 20),
    "every row three times": (duplicated(), 6),
    "fewer rows than a list": (three_sides(n=30), 20),
    "odd width": (three_sides(n=333, width=13), 5),
    "zero rows": (tuple(np.where(np.arange(400)[:, None] % 50 == 7, 0, side) for side in three_sides(n=400)), 7),
    "one neighbour": (three_sides(n=300), 1),
}


def both_ways(sides: tuple[np.ndarray, ...], **options: object) -> list[dict[str, object]]:
    rows = [torch.from_numpy(side) for side in sides]
    return [measure(*rows, Settings(psi_pairs=None, half=half, **options)).to_dict() for half in (False, True)]


@pytest.fixture
def settled(monkeypatch) -> dict[str, int]:
    """How many answers were settled on full rows of float64 scores instead of candidates."""
    counted = {"full": 0, "considered": 0}
    consider, exact = Search.consider, candidates._exact_parts

    def counting(self, queries, scores, columns, limit) -> None:
        counted["considered"] += queries.numel()
        consider(self, queries, scores, columns, limit)

    def parts(cloud):
        counted["full"] += 1
        return exact(cloud)

    monkeypatch.setattr(Search, "consider", counting)
    monkeypatch.setattr(candidates, "_exact_parts", parts)
    return counted


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("blocks", [None, (40_000, 5_000, 3_000)], ids=["one block", "many blocks"])
def test_reports_are_those_of_single_precision_to_the_last_digit(monkeypatch, world: str, blocks) -> None:
    if blocks:
        for name, size in zip(("BLOCK_ELEMENTS", "EXACT_BLOCK_ELEMENTS", "SETTLE_ELEMENTS"), blocks, strict=True):
            monkeypatch.setattr(candidates, name, size)
    sides, k = WORLDS[world]
    single, half = both_ways(sides, k=k, bootstrap=40)
    np.testing.assert_equal(half, single)


def test_candidates_decide_nearly_all_queries(settled: dict[str, int]) -> None:
    sides = three_sides(n=1500, width=48)
    single, half = both_ways(sides, k=10)
    assert half == single
    assert settled["considered"] < 5 * 1500 * 1.02 and settled["full"] == 0


def test_copies_that_fill_every_list_are_settled_on_all_scores(settled: dict[str, int], monkeypatch) -> None:
    monkeypatch.setattr(candidates, "LONGER", 1)
    y, x, z = three_sides(n=300)
    copies = np.where(np.arange(300)[:, None] < 150, y[0], y)
    single, half = both_ways((copies, x, np.where(np.arange(300)[:, None] < 150, z[0], z)), k=4)
    assert half == single and settled["full"] > 0


def test_close_neighbours_are_found_beyond_half_precision() -> None:
    """Neighbours a few 1e-6 apart, far below the rounding of float16: lists are too short, all scores are compared."""
    rng = np.random.default_rng(0)
    points = unit(np.ones(64) + 3e-3 * rng.normal(size=(1200, 64)))
    cosines = points @ points.T
    np.fill_diagonal(cosines, -np.inf)
    ranked = np.sort(cosines, axis=1)[:, ::-1]
    assert np.median(ranked[:, 0] - ranked[:, 600]) < 2.0**-11
    found = nearest(torch.from_numpy(points), 5, half=True)
    expected = nearest(torch.from_numpy(points), 5)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.tied, expected.tied)
    clear = ranked[:, 4] - ranked[:, 5] > 2e-6
    best = np.sort(np.argsort(-cosines, axis=1)[:, :5], axis=1)
    np.testing.assert_array_equal(found.indices.numpy()[clear], best[clear])


def test_products_that_break_their_bound_are_noticed(monkeypatch) -> None:
    """Every score is off by far more than float16 explains, so that wrong columns become candidates."""
    y, _ = paired_rows(n=500)
    rows = torch.from_numpy(y)
    expected = nearest(rows, 6)
    honest = candidates.RoundedRows(rows)
    monkeypatch.setattr(candidates.RoundedRows, "__init__", lambda self, rows: self.__dict__.update(honest.__dict__))
    noise = 0.2 * torch.from_numpy(np.random.default_rng(0).normal(size=honest.rounded.shape)).half()
    honest.rounded = honest.rounded + noise
    assert torch.equal(nearest(rows, 6, half=True).indices, expected.indices)


def test_bound_holds_for_products_in_half_precision() -> None:
    """Also for rows with all their weight on few coordinates, whose roundings do not average out."""
    rng = np.random.default_rng(1)
    rows = unit(rng.normal(size=(400, 96)) * np.geomspace(1, 1e-6, 96))
    half = candidates.RoundedRows(torch.from_numpy(rows))
    scores = (half.rounded @ half.rounded.T)[:400, :400].double().numpy()
    error = half.error(torch.arange(400), half).numpy()[:, None]
    assert (np.abs(scores - rows @ rows.T) <= error).all() and error.max() < 2e-3


def test_no_more_scores_than_a_block_exist(monkeypatch) -> None:
    sizes = []
    honest = candidates._exact_scores
    monkeypatch.setattr(candidates, "BLOCK_ELEMENTS", 50_000)

    def recorded(queries, rows, corpus, columns):
        sizes.append(rows.numel() * corpus.rounded.shape[0])
        return honest(queries, rows, corpus, columns)

    monkeypatch.setattr(candidates, "_exact_scores", recorded)
    both_ways(three_sides(n=600), k=5)
    assert max(sizes) <= 50_000 and sum(sizes) >= 5 * 600 * 600


def test_rows_for_a_device_keep_their_dtype_and_are_checked(tmp_path, monkeypatch) -> None:
    y, _ = paired_rows(n=500)
    monkeypatch.setattr(rows_module, "BATCH_ROWS", 64)
    np.save(tmp_path / "y.npy", y.astype(np.float16))
    tensor = torch.from_numpy(y).float()
    chosen = np.array([3, 77, 400])
    place = torch.device("cpu")
    for given in (tmp_path / "y.npy", y.astype(np.float16), y.astype(">f4"), tensor, tensor.T.contiguous().T):
        opened = rows_module.open_rows("source", given)
        for wanted in (None, chosen):
            loaded = rows_module.load_stored(opened, wanted, place)
            assert loaded.element_size() < 8 and torch.equal(loaded.double(), rows_module.load(opened, wanted))
    assert rows_module.load_stored(rows_module.open_rows("y", tensor), None, place).data_ptr() == tensor.data_ptr()
    tensor[321, 2] = torch.nan
    for wanted in (None, np.arange(500)):
        with pytest.raises(InputError, match=r"y has non-finite .* first in row 321"):
            rows_module.load_stored(rows_module.open_rows("y", tensor), wanted, place)


def test_products_of_random_pairs_are_the_same_gathered_or_grouped() -> None:
    y, _ = (torch.from_numpy(side) for side in paired_rows(n=300))
    first, second = consistency.random_pairs(300, 5000, 1)
    order = first.argsort(stable=True)
    partners = second[order].split(first.bincount(minlength=300).tolist())
    gathered = consistency._pair_products(y, first, second)[order]
    torch.testing.assert_close(gathered, consistency._partner_products(y, partners), rtol=0, atol=24 * 2.0**-24)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("world", WORLDS)
def test_a_gpu_reports_what_the_cpu_reports(world: str, dtype: torch.dtype) -> None:
    sides, k = WORLDS[world]
    rows = [torch.from_numpy(side).to(dtype) for side in sides]

    def reports(device: str, *given: torch.Tensor) -> tuple[diagnostics.AlignmentReport, diagnostics.GapReport]:
        return (
            diagnostics.alignment(*given, k=k, exact_psi=True, bootstrap=40, device=device),
            diagnostics.gap(*given[:2], bootstrap=40, device=device),
        )

    expected = reports("cpu", *rows)
    for placed in (rows, [side.cuda() for side in rows]):
        for gpu, cpu in zip(reports("cuda", *placed), expected, strict=True):
            for name, value in vars(cpu).items():
                if isinstance(value, (int, float)):
                    assert getattr(gpu, name) == pytest.approx(value, rel=1e-9, abs=1e-11, nan_ok=True), name
            assert gpu.intervals.keys() == cpu.intervals.keys()
