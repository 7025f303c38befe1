"""Neighbours of sampled queries: each as exact as in a full search, the means unbiased, their errors as stated."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_diagnostics_alignment import duplicated, entropy, exact_expectation, sorted_neighbours, three_sides
from test_diagnostics_gap import unit
from test_diagnostics_intervals import Z, half_width, population
from typer.testing import CliRunner

from aniso_ext import diagnostics
from aniso_ext.cli.main import app
from aniso_ext.diagnostics import sampled, streams
from aniso_ext.diagnostics.alignment import AlignmentReport, measure
from aniso_ext.diagnostics.alignment_intervals import Settings
from aniso_ext.diagnostics.choice import score
from aniso_ext.diagnostics.neighbours import LabelShare, UnitRows, run
from aniso_ext.diagnostics.rows import open_rows
from aniso_ext.diagnostics.sampled import Sizes, choose_queries, query_count
from aniso_ext.diagnostics.searches import Owed, mixing_owed, nearest, overlap_owed
from aniso_ext.diagnostics.streams import Stream
from aniso_ext.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")
CPU = torch.device("cpu")
SMALL = Sizes(tile=2_000, scores=6_000, settled_rows=64, settled_scores=6_000, kept=1_500)
SAMPLED = ("omega", "omega_tied", "m_z", "m_x", "recall_at_1", "recall_at_10")

WORLDS = {
    "random rows": (three_sides(n=500), 20),
    "every row three times": (duplicated(), 6),
    "half of the rows are one": (
        tuple(np.where(np.arange(300)[:, None] % 2 == 0, side[0], side) for side in three_sides()), 5,
    ),
    "zero rows": (tuple(np.where(np.arange(400)[:, None] % 50 == 7, 0, side) for side in three_sides(n=400)), 7),
    "close rows": (
        tuple(unit(np.ones(16) + 3e-3 * np.random.default_rng(seed).normal(size=(300, 16))) for seed in range(3)), 5,
    ),
    "fewer rows than a list": (three_sides(n=24, width=5), 20),
    "all others are neighbours": (three_sides(n=12), 11),
    "one neighbour": (three_sides(n=90, width=13), 1),
}  # fmt: skip


def passing(sides: tuple[Any, ...], device: torch.device = CPU) -> list[Stream]:
    return [Stream(open_rows("rows", side), None, device) for side in sides]


def numbers(report: AlignmentReport) -> dict[str, Any]:
    return replace(report, intervals={}, query_errors={}).to_dict()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("sizes", [None, SMALL], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("world", WORLDS)
def test_every_row_as_a_query_is_the_full_search_to_the_bit(monkeypatch, world: str, sizes, half: bool) -> None:
    if sizes is not None:
        monkeypatch.setitem(sampled.SIZES, "cpu", sizes)
        monkeypatch.setattr(streams, "READ_ELEMENTS", 900)
    sides, k = WORLDS[world]
    full = diagnostics.alignment(*sides, k=k, exact_psi=True, device="cpu")
    found = measure(*passing(sides), Settings(k, None, queries=len(sides[0]), half=half))
    np.testing.assert_equal(numbers(found), numbers(full))
    assert all(error == 0 for error in found.query_errors.values())


def test_copies_that_a_merged_list_has_no_room_for_are_settled(monkeypatch) -> None:
    """Tiles of 12 rows are listed whole, so that only the merging of lists leaves copies out."""
    monkeypatch.setitem(sampled.SIZES, "cpu", replace(SMALL, tile=200))
    sides, k = WORLDS["half of the rows are one"]
    full = diagnostics.alignment(*sides, k=k, exact_psi=True, device="cpu")
    found = measure(*passing(sides), Settings(k, None, queries=300))
    assert numbers(found) == numbers(full) and full.omega_tied >= 0.5


def test_as_many_queries_as_pairs_are_the_full_report_to_the_bit() -> None:
    sides = three_sides()
    options: dict[str, Any] = {"k": 7, "bootstrap": 40, "n_random_pairs": 5_000}
    full = diagnostics.alignment(*sides, **options)
    for queries in (300, 301, 10**12):
        assert diagnostics.alignment(*sides, max_queries=queries, **options) == full
    assert full.queries == full.n == 300 and full.query_errors == {}
    assert "sampl" not in str(full)


def by_row(y: np.ndarray, x: np.ndarray, z: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """What each row adds to the numbers that are means over rows, by full sorts in NumPy."""
    n = len(x)
    before, after = sorted_neighbours(y, k), sorted_neighbours(z, k)
    mixed = entropy((sorted_neighbours(np.concatenate([x, z]), k) < n).mean(1)) / exact_expectation(n, k)
    scores = unit(z) @ unit(x).T
    rank = (scores > np.diag(scores)[:, None]).sum(1)
    return {
        "omega": np.array([len(set(a) & set(b)) / k for a, b in zip(before, after, strict=True)]),
        "m_z": mixed[n:],
        "m_x": mixed[:n],
        "recall_at_1": (rank < 1).astype(float),
        "recall_at_10": (rank < 10).astype(float),
    }


def test_sampled_queries_have_the_values_of_brute_force() -> None:
    sides = three_sides()
    rows = by_row(*sides, k=7)
    report = diagnostics.alignment(*sides, k=7, max_queries=80, seed=3, exact_psi=True)
    chosen = choose_queries(300, 80, 3).numpy()
    assert len(set(chosen)) == 80 and (np.diff(chosen) > 0).all() and report.queries == 80
    for name, values in rows.items():
        assert getattr(report, name) == pytest.approx(values[chosen].mean(), abs=1e-12), name
        error = values[chosen].std(ddof=1) * math.sqrt((1 - 80 / 300) / 80)
        assert report.query_errors[name] == pytest.approx(error, abs=1e-12), name
    full = diagnostics.alignment(*sides, k=7, exact_psi=True)
    for name in set(full.to_dict()) - {*SAMPLED, "queries", "query_errors"}:
        assert getattr(report, name) == getattr(full, name), name
    few: dict[str, Any] = {"k": 7, "n_random_pairs": 3_000, "seed": 3}
    assert diagnostics.alignment(*sides, **few, max_queries=80).psi == diagnostics.alignment(*sides, **few).psi


def test_samples_are_unbiased_and_their_errors_are_those_stated() -> None:
    """Of 400 samples: means within four standard errors, variances within four of a chi-square law's (any q: CLT)."""
    sides = three_sides()
    rows, q, draws = by_row(*sides, k=7), 60, 400
    samples = [choose_queries(300, q, seed).numpy() for seed in range(draws)]
    often = np.bincount(np.concatenate(samples), minlength=300)
    assert np.abs(often - draws * q / 300).max() < 4.5 * math.sqrt(draws * q / 300 * (1 - q / 300))
    for name, values in rows.items():
        means = np.array([values[one].mean() for one in samples])
        variance = (1 - q / 300) * values.var(ddof=1) / q
        assert abs(means.mean() - values.mean()) <= 4 * math.sqrt(variance / draws), name
        assert abs(means.var() - variance) <= 4 * variance * math.sqrt(2 / draws), name
        stated = np.array([values[one].var(ddof=1) for one in samples]) * (1 - q / 300) / q
        assert abs(stated.mean() - variance) <= 4 * stated.std() / math.sqrt(draws), name


def test_seeds_repeat_and_differ() -> None:
    sides = three_sides()
    first, again, other = (
        diagnostics.alignment(*sides, k=7, max_queries=50, seed=seed, bootstrap=40, n_random_pairs=100)
        for seed in (1, 1, 2)
    )
    assert first == again and first.omega != other.omega and first.m_z != other.m_z
    assert not np.array_equal(choose_queries(300, 50, 1), np.sort(np.random.default_rng(1).choice(300, 50, False)))


def owed_by_all() -> tuple[dict[str, Owed], int]:
    """Source and output neighbours, and outputs whose own targets are among their neighbours."""
    y, _, z = three_sides(n=600, width=8)
    k, n = 12, 600
    x = unit(z + 0.02 * np.random.default_rng(0).normal(size=z.shape))
    units = UnitRows.of(torch.from_numpy(np.concatenate([x, z])))
    around = LabelShare(slice(0, 2 * n), k, n, n)
    run(units.part(slice(n, 2 * n)), units, [around], own=n)
    overlap = overlap_owed(nearest(torch.from_numpy(y), k), nearest(torch.from_numpy(z), k))
    return {"omega": overlap, "m_z": mixing_owed(around, 1.0)}, n


def test_variance_of_influences_is_estimated_without_bias() -> None:
    """From all queries it is the variance itself; from 300 samples of 200 it is so on average."""
    owed, n = owed_by_all()
    for name, one in owed.items():
        truth = float(one.influence().var(correction=0))
        assert one.influence_variance(torch.arange(n), n) == pytest.approx(truth, rel=1e-10), name
        assert not 0.8 < truth / float(one.own.var()) < 1.25, "rows owe each other something"
        estimates = []
        for seed in range(300):
            chosen = choose_queries(n, 200, seed)
            part = Owed(one.own[chosen], one.pairs[chosen], one.change[chosen])
            estimates.append(part.influence_variance(chosen, n))
        assert abs(np.mean(estimates) - truth) < 4 * np.std(estimates) / math.sqrt(300) + 0.01 * truth, name


@pytest.mark.parametrize("queries", [40, 200])
def test_intervals_match_the_spread_over_independent_pairs_and_samples(queries: int) -> None:
    """As for full searches: 60 samples tell a deviation within 9 %. Without the sample's part 40 would read .4."""
    reports = [
        diagnostics.alignment(
            *population(np.random.default_rng(seed), 300), k=12, n_random_pairs=50, bootstrap=100,
            max_queries=queries, seed=seed,
        )
        for seed in range(60)
    ]  # fmt: skip
    for name in ("omega", "m_z", "m_x", "recall_at_1", "recall_at_10"):
        deviation = np.std([getattr(report, name) for report in reports], ddof=1)
        estimated = np.mean([half_width(report.intervals[name]) for report in reports]) / Z
        assert 0.75 < estimated / deviation < 1.5, (name, estimated / deviation)


def test_intervals_cover_what_all_pairs_read() -> None:
    """Of 80 samples of one set of pairs, whose intervals are for other pairs too: 95 % at the least."""
    sides = three_sides(n=400)
    full = diagnostics.alignment(*sides, k=7, n_random_pairs=50)
    options: dict[str, Any] = {"k": 7, "n_random_pairs": 50, "bootstrap": 60, "max_queries": 60}
    reports = [diagnostics.alignment(*sides, seed=seed, **options) for seed in range(80)]
    for name in ("omega", "m_z", "m_x", "recall_at_10"):
        inside = sum(low <= getattr(full, name) <= high for low, high in (one.intervals[name] for one in reports))
        assert inside >= 80 * 0.95 - 4 * math.sqrt(80 * 0.95 * 0.05), (name, inside)


def test_default_keeps_the_cost_of_a_million_pairs() -> None:
    assert query_count(10_000, None) == 10_000 and query_count(1_000_000, None) == 1_000_000
    for pairs in (1_000_001, 2_000_000, 10_000_000, 100_000_000):
        assert 0.999 * 10**12 < query_count(pairs, None) * pairs <= 10**12
    assert query_count(10_000_000, 5) == 5 and query_count(100, 500) == 100


@pytest.mark.parametrize("queries", [1, 0, -5])
def test_too_few_queries_are_refused(queries: int) -> None:
    sides = three_sides()
    with pytest.raises(InputError, match=f"max_queries must be at least 2, got {queries}: a standard error needs two"):
        diagnostics.alignment(*sides, max_queries=queries)
    with pytest.raises(InputError, match="max_queries must be at least 2"):
        diagnostics.study(*sides[:2], options=diagnostics.StudyOptions(max_queries=queries))


def test_neighbours_are_counted_against_all_pairs() -> None:
    """k may exceed the queries, but not the other pairs."""
    sides = three_sides(n=30)
    assert diagnostics.alignment(*sides, k=29, max_queries=2, n_random_pairs=100).omega == 1
    with pytest.raises(InputError, match="30 pairs are too few: at least 31"):
        diagnostics.alignment(*sides, k=30, max_queries=5)


def test_the_sample_is_said_wherever_the_numbers_are() -> None:
    report = diagnostics.alignment(*three_sides(), k=7, max_queries=50, bootstrap=40, n_random_pairs=100)
    text = str(report)
    assert "alignment of 300 pairs, neighbours of 50 sampled ones, width 16" in text
    assert text.count(" of the sample") == 5 and f"s.e. {report.query_errors['omega']:.1g} of the sample" in text
    values = json.loads(report.to_json())
    assert values["queries"] == 50 and values["query_errors"] == report.query_errors
    frame = report.to_pandas()
    assert frame["queries"][0] == 50 and frame["omega_query_error"][0] == report.query_errors["omega"]
    assert report.intervals["omega"].low < report.omega - report.query_errors["omega"]


def test_without_intervals_a_verdict_knows_what_the_sample_leaves() -> None:
    """Twenty queries tell no method from another whose score is a few hundredths away; all queries do."""
    y, x, z = three_sides()
    methods = {"one": z, "other": unit(z + 0.05 * np.random.default_rng(1).normal(size=z.shape))}
    outcomes = {}
    for queries in (None, 20):
        options = diagnostics.StudyOptions(k=7, bootstrap=0, oracle=False, rows=False, max_queries=queries)
        found = diagnostics.study(y, x, methods=methods, options=options)
        scores = {name: score(found.methods[name]) for name in methods}
        outcomes[queries] = found.verdict["method"].outcome, scores
    (full, exact), (few, rough) = outcomes[None], outcomes[20]
    assert exact["one"].value - exact["other"].value > 0.02 and full == "favoured"
    assert few == "tied" and rough["one"].high - rough["one"].low > 0.05 > exact["one"].high - exact["one"].low


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {}
    for name, side in zip(("source", "target", "made"), three_sides(), strict=True):
        paths[name] = tmp_path / f"{name}.npy"
        np.save(paths[name], side.astype(np.float16))
    return paths


def test_rows_of_every_kind_pass_by_alike(files: dict[str, Path], monkeypatch) -> None:
    monkeypatch.setattr(streams, "READ_ELEMENTS", 700)
    arrays = tuple(np.load(path) for path in files.values())
    mapped = tuple(np.load(path, mmap_mode="r") for path in files.values())
    options: dict[str, Any] = {"k": 7, "max_queries": 90, "bootstrap": 20, "device": "cpu", "n_random_pairs": 5_000}
    for draws in ({}, {"max_pairs": 200}, {"exact_psi": True}):
        expected = diagnostics.alignment(*(side.astype(np.float64) for side in arrays), **options, **draws)
        for sides in (
            tuple(files.values()), arrays, mapped, tuple(torch.from_numpy(side) for side in arrays),
            tuple(np.asfortranarray(side) for side in arrays), tuple(side.astype(">f4") for side in arrays),
        ):  # fmt: skip
            assert diagnostics.alignment(*sides, **options, **draws) == expected
    brain = [torch.from_numpy(side).bfloat16() for side in arrays]
    expected = diagnostics.alignment(*(side.double() for side in brain), **options)
    assert diagnostics.alignment(*(side.T.contiguous().T for side in brain), **options) == expected


def test_no_more_than_a_piece_is_read_at_once(monkeypatch) -> None:
    """300 rows of width 16 in pieces of 1 000 numbers: nothing but the queries and partners of psi is picked out."""
    monkeypatch.setattr(streams, "READ_ELEMENTS", 1_000)
    monkeypatch.setitem(sampled.SIZES, "cpu", replace(SMALL, tile=1_000))
    monkeypatch.setattr("aniso_ext.diagnostics.alignment_intervals.BATCH_ROWS", 50)
    monkeypatch.setattr("aniso_ext.diagnostics.rows.BATCH_ROWS", 50)
    most: list[int] = []

    class OnDisk:
        def __init__(self, values: np.ndarray) -> None:
            self.values = values
            self.rows, self.width = values.shape

        def read(self, rows: slice | np.ndarray) -> np.ndarray:
            most.append(len(self.values[rows]))
            return self.values[rows]

    sides = three_sides()
    options: dict[str, Any] = {"k": 7, "max_queries": 30, "exact_psi": True, "bootstrap": 40}
    report = diagnostics.alignment(*map(OnDisk, sides), **options)
    assert max(most) <= 62 and report == diagnostics.alignment(*sides, **options)


def test_a_stream_gives_rows_in_order_and_names_a_bad_one(monkeypatch) -> None:
    monkeypatch.setattr(streams, "READ_ELEMENTS", 300)
    monkeypatch.setattr(streams, "BATCH_ROWS", 7)
    rows = np.random.default_rng(0).normal(size=(101, 6)).astype(np.float32)
    chosen = np.arange(3, 90, 2)
    for wanted, expected in ((None, rows), (chosen, rows[chosen])):
        stream = Stream(open_rows("target", rows), wanted, CPU)
        for size in (1, 10, 64, 500):
            parts = list(stream.split(size))
            assert all(len(part) == size for part in parts[:-1])
            np.testing.assert_array_equal(torch.cat(parts), expected)
        places = torch.tensor([9, 0, 40, 9])
        np.testing.assert_array_equal(stream.take(places), expected[places])
    rows[77, 2] = np.inf
    for wanted in (None, chosen):
        with pytest.raises(InputError, match=r"target has non-finite .* first in row 77"):
            list(Stream(open_rows("target", rows), wanted, CPU).split(20))
    with pytest.raises(InputError, match=r"source has non-finite .* first in row 77"):
        diagnostics.alignment(np.where(np.arange(300)[:, None] == 77, np.nan, three_sides()[0]), *three_sides()[1:],
                              max_queries=20)  # fmt: skip


def test_copies_need_no_more_memory_than_is_kept(monkeypatch) -> None:
    """Every row is one: each of 60 queries ties with all 300 or 600 columns, and no settling holds more than a few."""
    monkeypatch.setitem(sampled.SIZES, "cpu", SMALL)
    padded, held = sampled._padded, []

    def recorded(entries: Any, queries: int) -> Any:
        held.append(entries[0].numel())
        return padded(entries, queries)

    monkeypatch.setattr(sampled, "_padded", recorded)
    same = np.tile(np.eye(16)[0], (300, 1))
    report = diagnostics.alignment(same, same, same, k=5, max_queries=60, n_random_pairs=100)
    assert max(held) <= SMALL.kept and sum(held) >= 60 * (300 + 300 + 300 + 600 + 600) - 60 * 5
    assert report.omega == 1 and report.omega_tied == 1
    assert report.recall_at_1 == pytest.approx(1 / 300) and report.recall_at_10 == pytest.approx(10 / 300)


def test_the_command_samples_says_so_and_repeats(files: dict[str, Path], tmp_path: Path) -> None:
    words = ["diagnose", "--source", files["source"], "--target", files["target"], "--transformed", files["made"]]
    words += ["--k", "7", "--bootstrap", "40", "--no-oracle", "--no-figures", "--max-queries", "60"]
    result = CliRunner().invoke(app, [*map(str, words), "--out", str(tmp_path / "report")])
    assert result.exit_code == 0, result.output
    study = diagnostics.Study.from_json(tmp_path / "report")
    assert study.measured.queries == 60 and study.measured.judged == 300 and study.measured.options.max_queries == 60
    report = study.methods["made.npy"]
    sides = tuple(np.load(path) for path in files.values())
    assert report == diagnostics.alignment(*sides, k=7, bootstrap=40, max_queries=60)
    assert "--max-queries 60" in study.origin.command
    said = "means over 60 pairs, drawn at random from the 300, whose neighbours are exact among all of them"
    page = (tmp_path / "report" / "report.html").read_text()
    for text in (page, (tmp_path / "report" / "report.md").read_text(), " ".join(result.stdout.split()), str(study)):
        assert said in text
    refused = CliRunner().invoke(app, [*map(str, words[:-1]), "1", "--out", str(tmp_path / "other")])
    assert refused.exit_code == 2 and "--max-queries" in refused.stderr


def test_reports_without_the_number_of_queries_are_of_all_pairs(tmp_path: Path) -> None:
    study = diagnostics.study(*three_sides()[:2], options=diagnostics.StudyOptions(bootstrap=0, oracle=False))
    values = study.to_dict()
    for one in (*values["methods"], values["measured"]):
        one.pop("queries")
    for one in values["methods"]:
        one.pop("query_errors")
    values["measured"]["options"].pop("max_queries")
    again = diagnostics.Study.from_dict(json.loads(json.dumps(values)))
    assert again.methods == study.methods and again.measured == study.measured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sizes", [None, SMALL], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_gpu_samples_as_the_cpu_does(monkeypatch, world: str, sizes) -> None:
    """From the host or from the device; tolerances are those of float64 sums in another order."""
    if sizes is not None:
        monkeypatch.setitem(sampled.SIZES, "cuda", sizes)
        monkeypatch.setattr(streams, "READ_ELEMENTS", 900)
    sides, k = WORLDS[world]
    sides = tuple(side.astype(np.float16) for side in sides)
    queries = max(2, len(sides[0]) // 3)
    options: dict[str, Any] = {"k": k, "exact_psi": True, "bootstrap": 40, "max_queries": queries}
    expected = diagnostics.alignment(*sides, device="cpu", **options)
    # psi is a covariance of similarities near 1 over their variance: what their squares round to comes with that factor
    similarities = [side.astype(np.float64) @ side.T.astype(np.float64) for side in sides]
    variances = [np.var(each[~np.eye(len(each), dtype=bool)]) for each in similarities]
    allowed = {"psi": 2.0**-53 / max(min(variances), 2.0**-53)}
    for given in (sides, tuple(torch.from_numpy(side).cuda() for side in sides)):
        found = diagnostics.alignment(*given, device="cuda", **options)
        for name, value in vars(expected).items():
            if isinstance(value, (int, float)):
                near = pytest.approx(value, rel=1e-9, abs=max(allowed.get(name, 0.0), 1e-11), nan_ok=True)
                assert getattr(found, name) == near, name
        assert found.query_errors == pytest.approx(expected.query_errors, rel=1e-9, abs=1e-11)
        assert found.intervals.keys() == expected.intervals.keys()
        sampled_psi = {**options, "exact_psi": False, "n_random_pairs": 5_000, "bootstrap": 0}
        one, other = (diagnostics.alignment(*given, device=place, **sampled_psi) for place in ("cuda", "cpu"))
        assert one.psi == pytest.approx(other.psi, abs=1e-5, nan_ok=True)
