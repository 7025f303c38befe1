"""Whether the input is of the kind that the aligner was fitted on: norms and encoder."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

import aniso_ext as aniso
from aniso_ext.errors import DataError

RNG = np.random.default_rng(0)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


ROWS = unit(RNG.standard_normal((40, 6)) + 0.5).astype(np.float32)


def fit(source: np.ndarray = ROWS) -> aniso.Aligner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return aniso.make_aligner("mean_shift").fit(source, unit(-ROWS[::-1]))


def make_shards(folder: Path, parts: list[np.ndarray]) -> Path:
    folder.mkdir()
    for number, part in enumerate(parts):
        np.save(folder / f"part_{number}.npy", part)
    return folder


def test_rows_like_those_of_the_fit_raise_no_warning(tmp_path: Path) -> None:
    with_bad = ROWS.copy()
    with_bad[3], with_bad[5, 0] = 0, np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, (aligner, rows) in enumerate(((fit(), ROWS * 1.009), (fit(3 * ROWS), ROWS * 2), (fit(), with_bad))):
            aniso.convert_embeddings(aligner, rows, tmp_path / f"{number}.npy", on_bad="drop")


def test_other_norms_are_warned_of_once_with_share_and_example(tmp_path: Path) -> None:
    parts = [ROWS[:20], ROWS[20:30], ROWS[30:].copy()]
    parts[2][2] *= 1.5
    parts[2][7] *= 0.5
    folder = make_shards(tmp_path / "in", parts)
    with pytest.warns(UserWarning) as caught:
        aniso.convert_embeddings(fit(), folder, tmp_path / "out", batch_rows=3)
    (warning,) = caught
    # the first 16 rows of the first shard, 10 of each other
    want = "6% of 36 sampled input rows have another norm .* row 2 of part_2.npy has norm 1.5, .* rows of norm 1: L2-"
    assert re.search(want, str(warning.message))
    with pytest.warns(UserWarning, match=r"100% of 16 sampled input rows .* fitted on other rows: do not normalise"):
        aniso.convert_embeddings(fit(3 * ROWS), ROWS, tmp_path / "z.npy")


def test_the_artefact_says_whether_rows_were_normalised(tmp_path: Path) -> None:
    for rows, unit_rows, normalisation in ((ROWS, True, "l2"), (3 * ROWS, False, "none")):
        folder = fit(rows).save_pretrained(tmp_path / normalisation)
        config = json.loads((folder / "config.json").read_text())
        assert config["normalisation"] == normalisation
        assert aniso.load_aligner(folder).corpora_["source"]["unit_rows"] is unit_rows
        assert aniso.load_aligner(folder).corpora_["target"]["unit_rows"] is True


def test_an_input_of_another_encoder_is_refused(tmp_path: Path) -> None:
    aligner = aniso.load_aligner(fit().save_pretrained(tmp_path / "aligner", encoder="ViT-B-32"))
    column = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.reshape(-1)), 6)
    for encoder in ("ViT-B-32", "ViT-L-14", None):
        named = {} if encoder is None else {"encoder": encoder}
        save_file({"embeddings": ROWS}, tmp_path / "in.safetensors", metadata=named or None)
        pq.write_table(pa.table({"embedding": column}).replace_schema_metadata(named), tmp_path / "in.parquet")
        for suffix in (".safetensors", ".parquet"):
            place, output = tmp_path / f"in{suffix}", tmp_path / f"out{encoder}{suffix}"
            if encoder == "ViT-L-14":
                reason = "holds embeddings of ViT-L-14, but the aligner was fitted on ViT-B-32: use embeddings of that"
                with pytest.raises(DataError, match=f"in{suffix}: {reason}"):
                    aniso.convert_embeddings(aligner, place, output)
                assert not output.exists()
                aniso.convert_embeddings(fit(), place, output)  # an aligner that names no encoder takes any
            else:
                aniso.convert_embeddings(aligner, place, output)


def test_a_loaded_aligner_keeps_its_encoder_when_it_is_saved_again(tmp_path: Path) -> None:
    first = aniso.load_aligner(fit().save_pretrained(tmp_path / "a", encoder="ViT-B-32"))
    assert aniso.load_aligner(first.save_pretrained(tmp_path / "b")).encoder_ == "ViT-B-32"
    assert aniso.load_aligner(first.save_pretrained(tmp_path / "c", encoder="other")).encoder_ == "other"
