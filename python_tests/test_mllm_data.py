"""Samples, index, packs and batches: what they hold, and every sample that cannot be used by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mllm_worlds import World

from aniso_ext.data import open_embeddings, write_clip_retrieval
from aniso_ext.errors import DataError, InputError
from aniso_ext.mllm import open_index
from aniso_ext.mllm.data import Batcher, Samples, plan_packs, prepare_samples, read_conversations
from aniso_ext.mllm.data.packing import OPEN_PACKS

WORLD = World()
IMAGE = WORLD.tokenizer.convert_tokens_to_ids("<image>")


def prepared(records: Any = None, **options: Any) -> Samples:
    records = WORLD.captions if records is None else records
    return prepare_samples(
        read_conversations(records), WORLD.tokenizer, open_index(WORLD.ids), image_token_id=IMAGE, **options
    )


def talk(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"id": "s3", "conversations": [{"from": who, "value": text} for who, text in turns], **more}


def test_llava_records_and_captions_become_the_same_messages() -> None:
    caption = {"id": "s3", "caption": "a red star"}
    written = talk(("human", "<image>\nDescribe the image."), ("gpt", "a red star"))
    without = talk(("human", "Describe the image."), ("gpt", "a red star"), image="s4")
    messages = [next(read_conversations([record])) for record in (caption, written, without)]
    assert messages[0].messages == messages[1].messages == messages[2].messages
    assert [sample.embedding for sample in messages] == ["s3", "s3", "s4"]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_files_of_both_forms_are_read(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"samples.{form}"
    text = json.dumps(WORLD.captions) if form == "json" else "\n\n".join(map(json.dumps, WORLD.captions))
    path.write_text(text)
    assert [sample.id for sample in read_conversations(path)] == WORLD.ids


Refusals = list[tuple[Any, str]]
REFUSED: Refusals = [
    (talk(), r"sample 's3' \(conversations: record 1\) has no turns"),
    ({"conversations": []}, "record 1 has no id"),
    (talk(("human", "What?"), ("gpt", " ")), "'s3'.*turn 2 is empty: write a text or remove the sample"),
    (talk(("robot", "What?"), ("gpt", "a")), "'s3'.*turn 1 must be .*assistant, gpt, human"),
    (talk(("human", "What?")), "'s3'.*does not end with a turn of the assistant"),
    (talk(("gpt", "a star")), "'s3'.*no turn of the user"),
    (talk(("human", "<image> <image>"), ("gpt", "a")), r"'s3'.*has <image> 2 time\(s\)"),
    (talk(("human", "a"), ("gpt", "<image>")), r"'s3'.*not once in its first turn"),
    (talk(("human", "a"), ("gpt", "b"), image="gone"), "'s3' has no embedding: the index has no id 'gone' among"),
]


@pytest.mark.parametrize(("record", "message"), REFUSED, ids=[message[:24] for _, message in REFUSED])
def test_a_sample_that_cannot_be_used_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared([record])


def test_bad_files_are_named(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"id": "s0", "caption": "a"}\n{"id": \n')
    with pytest.raises(DataError, match=r"line 2 is not JSON.*mend or remove it"):
        list(read_conversations(lines))
    listed = tmp_path / "listed.json"
    listed.write_text('{"id": "s0"}')
    with pytest.raises(DataError, match="is not a list of conversations"):
        list(read_conversations(listed))
    with pytest.raises(DataError, match="is not a file: pass"):
        list(read_conversations(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match="there are no samples"):
        prepared([])


def test_a_template_that_drops_the_user_is_named_with_the_sample() -> None:
    tokenizer = World(rows=4).tokenizer
    template = "{% for m in messages %}{% if m['role'] != 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="'s0' has 0 image tokens where one is due: the chat template drops"):
        prepare_samples(read_conversations(WORLD.captions), tokenizer, open_index(WORLD.ids), image_token_id=IMAGE)


def test_samples_hold_tokens_targets_and_rows() -> None:
    samples = prepared(visual_tokens=2)
    tokens, targets = samples.sample(5)
    text = WORLD.tokenizer.decode(tokens, skip_special_tokens=False)
    assert text == "<|user|>\n<image><image>\nDescribe the image.<|end|>\n<|assistant|>\na blue star<|end|>\n"
    assert WORLD.tokenizer.decode(tokens[targets], skip_special_tokens=False) == "a blue star<|end|>"
    assert samples.rows.tolist() == list(range(48))
    assert samples.lengths.sum() == len(samples.tokens) == len(samples.targets)


def test_long_samples_fail_or_are_truncated_or_skipped_by_name() -> None:
    long = talk(("human", "What?"), ("gpt", "star " * 40))
    records = [*WORLD.captions[:3], long]
    size = len(prepared([long]).tokens)
    with pytest.raises(DataError, match=rf"sample 's3' has {size} tokens, more than 40: raise --max-length"):
        prepared(records, max_length=40)
    cut = prepared(records, max_length=40, on_long="truncate")
    assert cut.truncated == ("s3",) and cut.lengths[-1] == 40
    assert np.array_equal(cut.sample(3)[0], prepared([long]).tokens[:40])
    skipped = prepared(records, max_length=40, on_long="skip")
    assert skipped.skipped == ("s3",) and len(skipped) == 3
    lost = talk(("human", "What? " * 40), ("gpt", "a star"))
    with pytest.raises(DataError, match=r"sample 's3' has nothing to learn from.*beyond its first 40"):
        prepared([lost], max_length=40, on_long="truncate")
    with pytest.raises(InputError, match="on_long must be one of"):
        prepared(on_long="ignore")


def _parquet(folder: Path) -> Path:
    path = folder / "ids.parquet"
    pq.write_table(pa.table({"id": WORLD.ids}), path)
    return path


def _lines(folder: Path) -> Path:
    path = folder / "ids.jsonl"
    path.write_text("\n".join(json.dumps({"id": name}) for name in WORLD.ids))
    return path


def _clip_retrieval(folder: Path) -> Path:
    write_clip_retrieval(folder, text=WORLD.embeddings, metadata={"id": WORLD.ids}, rows_per_shard=20)
    return folder / "text_emb"


@pytest.mark.parametrize("write", [_parquet, _lines, _clip_retrieval])
def test_an_index_from_every_kind_of_file(write: Callable[[Path], Path], tmp_path: Path) -> None:
    index = open_index(write(tmp_path))
    order = np.random.default_rng(0).permutation(48)
    assert np.array_equal(index.rows([WORLD.ids[row] for row in order]), order)
    assert index.rows(["gone", "s1"]).tolist() == [-1, 1]
    assert index.fingerprint() == open_index(WORLD.ids).fingerprint()


def test_an_index_refuses_an_id_twice_and_files_without_ids(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rows 1 and 3 have the same id"):
        open_index(["a", "b", "c", "b"])
    (tmp_path / "lines.jsonl").write_text('{"caption": "a"}')
    with pytest.raises(DataError, match="line 1 has no id"):
        open_index(tmp_path / "lines.jsonl")
    with pytest.raises(DataError, match="has no metadata with ids: pass an index"):
        open_index(tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=400), st.integers(0, 5))
def test_packs_hold_every_sample_once_within_their_room(lengths: list[int], seed: int) -> None:
    sizes = np.array(lengths)
    packs = plan_packs(sizes, 30, seed=seed)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    assert all(sizes[pack].sum() <= 30 for pack in packs)
    # two open packs that both fit into one would have been one
    half_empty = sum(int(sizes[pack].sum() * 2 <= 30) for pack in packs)
    assert half_empty <= 1 + len(packs) // OPEN_PACKS


def test_batches_have_labels_where_targets_are_and_the_rows_of_their_samples() -> None:
    samples = prepared()
    batcher = Batcher(samples, open_embeddings(WORLD.embeddings), pad_token_id=0)
    batch = batcher([np.array([7]), np.array([2])])
    for place, number in enumerate((7, 2)):
        tokens, targets = samples.sample(number)
        count = len(tokens)
        assert batch["input_ids"][place, :count].tolist() == tokens.tolist()
        assert batch["labels"][place, :count].tolist() == np.where(targets, tokens, -100).tolist()
        assert batch["attention_mask"][place].tolist() == [1] * count + [0] * (batch["input_ids"].shape[1] - count)
    assert torch.equal(batch["embeddings"], torch.from_numpy(WORLD.embeddings[[7, 2]]))


def test_packed_batches_count_positions_anew_and_repeat_no_row() -> None:
    records = [*WORLD.captions[:3], {"id": "again", "caption": "a red star", "image": "s1"}]
    samples = prepared(records)
    batcher = Batcher(samples, open_embeddings(WORLD.embeddings), pad_token_id=0, packed=True)
    batch = batcher([np.array([3, 0]), np.array([1])])
    first, second = samples.lengths[3], samples.lengths[0]
    assert batch["position_ids"][0].tolist() == [*range(first), *range(second)]
    assert (batch["position_ids"][1, samples.lengths[1] :] == 0).all()
    assert "attention_mask" not in batch
    assert torch.equal(batch["embeddings"], torch.from_numpy(WORLD.embeddings[[1, 0, 1]]))
    assert (batch["labels"][0, [0, first]] == -100).all()


def test_saved_samples_are_mapped(tmp_path: Path) -> None:
    samples = prepared()
    samples.save(tmp_path)
    again = Samples.load(tmp_path)
    assert isinstance(again.tokens, np.memmap)
    assert all(np.array_equal(getattr(again, name), getattr(samples, name)) for name in ("tokens", "targets", "ends"))
