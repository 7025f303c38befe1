"""What every aligner promises, whatever its method: parameters, kinds of input, determinism, unpaired fitting."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import aniso_ext as aniso
from aniso_ext.align import Aligner, register
from aniso_ext.errors import InputError, NotFittedError

WIDTH = 24
OPTIONS = {"anisoalign": {"rank": 8, "refine": False, "knots": 64}, "permuted": {"kept_rows": 50}}
METHODS = aniso.list_aligners()
CORPUS_METHODS = ("c3_code", "unicorn", "realign", "anisoalign")


def unit_rows(count: int, seed: int, shift: float = 0.3) -> np.ndarray:
    """Anisotropic unit rows off the origin, float64."""
    rng = np.random.default_rng(seed)
    rows = (
        rng.standard_normal((count, WIDTH)) * np.geomspace(1, 0.1, WIDTH) @ np.linalg.qr(rng.random((WIDTH, WIDTH)))[0]
    )
    rows[:, seed % WIDTH] += shift * WIDTH**0.5
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


SOURCE, TARGET = unit_rows(400, 1), unit_rows(330, 2)


def make(method: str) -> Aligner:
    return aniso.make_aligner(method, **OPTIONS.get(method, {}))


@pytest.fixture(scope="module", params=METHODS)
def fitted(request: pytest.FixtureRequest) -> Aligner:
    return make(request.param).fit(SOURCE, TARGET)


def test_every_method_of_the_contract_is_registered() -> None:
    expected = "identity mean_shift c3_paper c3_code unicorn realign gaussian_monge per_dim_std permuted anisoalign"
    assert expected.split() == METHODS


def test_unknown_names_and_options_list_what_there_is() -> None:
    with pytest.raises(InputError, match=r"unknown aligner 'realing'.*realign"):
        aniso.make_aligner("realing")
    with pytest.raises(InputError, match="mean_shift has no option rank: it takes none"):
        aniso.make_aligner("mean_shift", rank=4)
    with pytest.raises(InputError, match="AnisoAlign has no option ranks: it takes rank, mixing"):
        aniso.AnisoAlign().set_params(ranks=4)


def test_a_name_cannot_be_taken_twice() -> None:
    with pytest.raises(InputError, match="'realign' belongs to ReAlign"):
        register("realign")(type("Other", (Aligner,), {}))


@pytest.mark.parametrize("method", METHODS)
def test_clone_copies_options_and_no_fitted_state(method: str) -> None:
    aligner = make(method).fit(SOURCE, TARGET)
    given = aligner.get_params(deep=False)
    clone = type(aligner)(**given)
    assert all(clone.get_params()[name] is value for name, value in given.items())
    assert not any(name.endswith("_") for name in vars(clone))
    assert clone.set_params(**given) is clone
    assert clone.fit(SOURCE, TARGET).fingerprint() == aligner.fingerprint()


def test_repr_shows_what_differs_from_the_defaults() -> None:
    assert repr(aniso.AnisoAlign(rank=64, refine=False)) == "AnisoAlign(rank=64, refine=False)"
    assert repr(aniso.make_aligner("realign")) == "ReAlign()"


@pytest.mark.parametrize("method", METHODS)
def test_unfitted_use_is_refused(method: str) -> None:
    for use in (lambda a: a.transform(SOURCE), lambda a: a.width, lambda a: a.fingerprint(), lambda a: a.summary()):
        with pytest.raises(NotFittedError, match="is not fitted: call fit"):
            use(make(method))


def test_fit_returns_self_and_counts_features(fitted: Aligner) -> None:
    again = type(fitted)(**fitted.get_params())
    assert again.fit(SOURCE, TARGET) is again
    assert (again.width, again.n_features_in_) == (WIDTH, WIDTH)
    assert again.corpora_["source"]["rows"] == 400
    assert again.corpora_["target"]["rows"] == 330
    gap = np.linalg.norm(SOURCE.mean(0) - TARGET.mean(0))
    assert again.summary_["centroid_gap"] == pytest.approx(gap, abs=1e-12)
    assert f"{gap:.6g}" in again.summary()


def test_both_widths_are_named(fitted: Aligner) -> None:
    with pytest.raises(InputError, match=f"width 7, but this {type(fitted).__name__} was fitted at width {WIDTH}"):
        fitted.transform(SOURCE[:, :7])
    with pytest.raises(InputError, match=f"source has width {WIDTH} and target 7"):
        type(fitted)(**fitted.get_params()).fit(SOURCE, TARGET[:, :7])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_keeps_dtype_and_agrees_with_float64(fitted: Aligner, dtype: type) -> None:
    rows = SOURCE[:50].astype(dtype)
    result = fitted.transform(rows)
    assert isinstance(result, np.ndarray)
    assert result.dtype == dtype
    # The rounded rows are the input, so only rounding of the computation (float32) and of the result may differ.
    exact = fitted.transform(rows.astype(np.float64))
    epsilon = {np.float16: 2.0**-11, np.float32: 32 * 2.0**-24, np.float64: 0}[dtype]
    assert np.abs(result - exact).max() <= epsilon


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_keep_kind_dtype_and_device(fitted: Aligner, dtype: torch.dtype) -> None:
    rows = torch.from_numpy(SOURCE[:50]).to(dtype)
    result = fitted.transform(rows)
    assert (result.dtype, result.device, tuple(result.shape)) == (dtype, rows.device, (50, WIDTH))
    if dtype != torch.bfloat16:
        assert torch.equal(result, torch.from_numpy(fitted.transform(rows.numpy())))


def test_odd_layouts_give_the_same_rows(fitted: Aligner) -> None:
    plain = fitted.transform(SOURCE)
    wide = np.repeat(SOURCE, 2, axis=1)[:, ::2]
    read_only = np.asfortranarray(SOURCE)
    read_only.setflags(write=False)
    for rows in (wide, read_only):
        assert np.abs(fitted.transform(rows) - plain).max() <= 1e-14
    assert fitted.transform(SOURCE[:0]).shape == (0, WIDTH)
    assert tuple(fitted.transform(torch.from_numpy(SOURCE[:0])).shape) == (0, WIDTH)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (SOURCE[0], r"must be \[N, D\], got shape \[24\]"),
        (SOURCE[None], r"must be \[N, D\], got shape \[1, 400, 24\]"),
        (SOURCE.astype(">f4"), "is >f4: convert it"),
        ((SOURCE * 100).astype(np.int32), "is <i4: convert it"),
        (torch.zeros(3, WIDTH, dtype=torch.int64), "is torch.int64: convert it"),
        (SOURCE.tolist(), "is a list: pass a NumPy array"),
    ],
    ids=["1-D", "3-D", "byte order", "integers", "integer tensor", "list"],
)
def test_unusable_inputs_are_refused(fitted: Aligner, rows: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fitted.transform(rows)


def test_results_do_not_depend_on_the_batches(fitted: Aligner) -> None:
    rows = SOURCE.astype(np.float32)
    whole = fitted.transform(rows)
    pieces = np.concatenate([fitted.transform(part) for part in np.split(rows, [1, 8, 9, 200])])
    backwards = fitted.transform(rows[::-1])[::-1]
    # Only the order of sums within a row may differ: a misplaced draw of noise would show at 1e-2.
    assert np.abs(pieces - whole).max() <= 32 * 2.0**-24
    assert np.abs(backwards - whole).max() <= 32 * 2.0**-24


def test_inputs_are_left_alone(fitted: Aligner) -> None:
    rows = SOURCE.copy()
    result = fitted.transform(rows)
    result += 1
    assert np.array_equal(rows, SOURCE)


@pytest.mark.parametrize("method", METHODS)
def test_fit_is_deterministic_and_blind_to_pairing(method: str) -> None:
    first = make(method).fit(SOURCE, TARGET)
    assert make(method).fit(SOURCE.copy(), TARGET.copy()).fingerprint() == first.fingerprint()
    if method == "permuted":
        return  # which target rows it keeps depends on their order
    rng = np.random.default_rng(5)
    shuffled = make(method).fit(rng.permutation(SOURCE), rng.permutation(TARGET))
    assert np.abs(shuffled.transform(SOURCE) - first.transform(SOURCE)).max() <= 1e-9


@pytest.mark.parametrize("method", ["c3_paper", "c3_code", "permuted", "anisoalign"])
def test_the_seed_matters(method: str) -> None:
    one, two = make(method), make(method).set_params(seed=1)
    for aligner in (one, two):
        if method == "anisoalign":
            aligner.set_params(mixing="haar")
        aligner.fit(SOURCE, TARGET)
    assert one.fingerprint() != two.fingerprint()
    assert np.abs(one.transform(SOURCE) - two.transform(SOURCE)).max() > 1e-3


def test_pickling_keeps_everything(fitted: Aligner) -> None:
    fitted.transform(SOURCE[:3])
    again = pickle.loads(pickle.dumps(fitted))
    assert again.fingerprint() == fitted.fingerprint()
    assert np.array_equal(again.transform(SOURCE), fitted.transform(SOURCE))


def test_saving_keeps_everything(fitted: Aligner, tmp_path: object) -> None:
    again = aniso.load_aligner(fitted.save_pretrained(tmp_path))
    assert type(again) is type(fitted)
    assert again.get_params() == fitted.get_params()
    assert again.summary() == fitted.summary()
    assert again.corpora_ == fitted.corpora_
    assert again.fingerprint() == fitted.fingerprint()
    assert np.array_equal(again.transform(SOURCE), fitted.transform(SOURCE))


@pytest.mark.parametrize("method", METHODS)
def test_paths_stream_to_the_same_fit(method: str, tmp_path: object) -> None:
    source, target = tmp_path / "source", tmp_path / "target.npy"
    source.mkdir()
    for number, part in enumerate(np.split(SOURCE.astype(np.float32), [90, 300])):
        np.save(source / f"part_{number}.npy", part)
    np.save(target, TARGET.astype(np.float32))
    streamed = make(method).fit(source, target)
    in_memory = make(method).fit(SOURCE.astype(np.float32), torch.from_numpy(TARGET).float())
    result = streamed.transform(source)
    assert result.dtype == np.float32
    assert np.abs(result - in_memory.transform(SOURCE.astype(np.float32))).max() <= 32 * 2.0**-24


@pytest.mark.parametrize("method", METHODS)
def test_bad_fits_are_refused(method: str) -> None:
    poisoned = SOURCE.copy()
    poisoned[[17, 60], 3] = np.nan
    with pytest.raises(InputError, match=r"source has 2 non-finite rows .*the first is row 17"):
        make(method).fit(poisoned, TARGET)
    with pytest.raises(InputError, match=r"target is \[1, 24\]: fitting needs at least 2 rows"):
        make(method).fit(SOURCE, TARGET[:1])
    with pytest.warns(UserWarning, match="target rows are not unit vectors"):
        make(method).fit(SOURCE, 3 * TARGET)


@pytest.mark.parametrize("method", CORPUS_METHODS)
def test_corpus_calibration_is_calibrate_on_then_batches(method: str) -> None:
    aligner = make(method).fit(SOURCE, TARGET)
    corpus = unit_rows(200, 1, shift=0.5)
    at_once = aligner.transform(corpus, calibration="corpus")
    twin = aligner.calibrate_on(corpus)
    assert np.abs(np.concatenate([twin.transform(part) for part in np.split(corpus, [3, 70])]) - at_once).max() <= 1e-13
    assert np.abs(at_once - aligner.transform(corpus)).max() > 1e-3
    # A corpus that is the fitted source itself changes nothing.
    assert np.abs(aligner.transform(SOURCE, calibration="corpus") - aligner.transform(SOURCE)).max() <= 1e-13


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(CORPUS_METHODS)))
def test_methods_without_a_corpus_mean_ignore_the_calibration(method: str) -> None:
    aligner = make(method).fit(SOURCE, TARGET)
    assert aligner.calibrate_on(SOURCE) is aligner
    for calibration in ("corpus", None):
        assert np.array_equal(aligner.transform(SOURCE, calibration=calibration), aligner.transform(SOURCE))
    with pytest.raises(InputError, match="calibration must be 'auto', 'fitted', 'corpus' or None, got 'corpsu'"):
        aligner.transform(SOURCE, calibration="corpsu")
