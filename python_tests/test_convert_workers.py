"""One conversion shared by several workers: the same bytes whatever their number, order and deaths."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_convert_embeddings import Affine, contents, make_input

from aniso_ext.convert import Worker, convert_embeddings, local_device, parse_worker, worker_from_environment
from aniso_ext.convert.workers import shares
from aniso_ext.errors import DataError, InputError


def convert(folder: Path, output: Path, worker: tuple[int, int] = (0, 1), aligner: Any = None, **options: Any) -> Any:
    return convert_embeddings(aligner or Affine(), folder, output, batch_rows=4, worker=worker, **options)


def shards_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part_*"))}


@pytest.mark.parametrize("calibration", ["fitted", "corpus"])
@pytest.mark.parametrize("world", [2, 3, 7])
def test_bytes_do_not_depend_on_the_workers_or_their_order(tmp_path: Path, world: int, calibration: str) -> None:
    make_input(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "whole", calibration=calibration)
    want = contents(tmp_path / "whole")
    for number, order in enumerate(itertools.islice(itertools.permutations(range(world)), 12)):
        output = tmp_path / f"out_{number}"
        missing = [convert(tmp_path / "in", output, (rank, world), calibration=calibration).missing_shards
                   for rank in order]
        assert missing == sorted(missing, reverse=True)
        assert missing[-1] == 0
        assert contents(output) == want


def test_a_worker_does_its_share_and_says_what_is_missing(tmp_path: Path) -> None:
    make_input(tmp_path / "in")  # 7, 5, 9 and 1 rows: worker 0 has the third and the last, worker 1 the first two
    seen: list[tuple[int, int]] = []
    report = convert(tmp_path / "in", tmp_path / "out", (0, 2), progress=lambda done, rows: seen.append((done, rows)))
    assert (report.worker, report.workers, report.shards, report.rows, report.missing_shards) == (0, 2, 2, 10, 2)
    assert [Path(path).name for path in report.outputs] == ["part_2.npy", "part_3.npy"]
    assert seen[-1] == (10, 10)
    lines = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line).get("shard") for line in lines] == [None]
    aligner = Affine()
    again = convert(tmp_path / "in", tmp_path / "out", (0, 2), aligner)
    assert (again.resumed_shards, aligner.calls) == (2, 0)
    assert convert(tmp_path / "in", tmp_path / "out", (1, 2)).rows == 22
    assert sorted(contents(tmp_path / "out")) == ["manifest.jsonl", *(f"part_{number}.npy" for number in range(4))]


def test_shares_are_balanced_and_cover_every_shard() -> None:
    rng = np.random.default_rng(0)
    for world in (1, 2, 5, 16):
        rows = rng.integers(1, 1000, 100).tolist()
        assigned = shares(rows, world)
        assert sorted(itertools.chain(*assigned)) == list(range(100))
        loads = [sum(rows[index] for index in indices) for indices in assigned]
        # the last shard that the fullest worker got went to it when it was the emptiest
        assert max(loads) - min(loads) <= max(rows)
        assert assigned == [Worker(rank, world).share(rows) for rank in range(world)]
    assert shares([3, 3], 4) == [[0], [1], [], []]


@pytest.mark.parametrize(
    "environment, want",
    [
        ({}, (0, 1, False)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8, True)),
        ({"RANK": "3"}, (0, 1, False)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, (2, 4, True)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "10"}, (5, 10, False)),
        (
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "3",
             "SLURM_ARRAY_TASK_STEP": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
            (2, 3, False),
        ),
        (
            {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            (3, 6, False),
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (0, 2, True)),
    ],
)  # fmt: skip
def test_the_environment_names_the_worker(environment: dict[str, str], want: tuple[int, int, bool]) -> None:
    worker = worker_from_environment(environment)
    assert (worker.rank, worker.world, worker.together) == want


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"RANK": "8", "WORLD_SIZE": "8"}, "worker 8 of 8 is impossible"),
        ({"RANK": "x", "WORLD_SIZE": "8"}, "RANK is 'x', not a number"),
        (
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3"},
            "is 7 in an array of 2 from 3",
        ),
    ],
)
def test_an_environment_that_cannot_be_is_refused(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        worker_from_environment(environment)


def test_workers_by_name(tmp_path: Path) -> None:
    assert (parse_worker("3/16").rank, parse_worker("3/16").world) == (3, 16)
    for text in ("3", "16/16", "-1/4", "0/0", "a/b", ""):
        with pytest.raises(InputError):
            parse_worker(text)
    for on_existing in ("overwrite", "fail"):
        with pytest.raises(InputError, match="would undo what other workers have finished"):
            convert(tmp_path, tmp_path / "out", (0, 2), on_existing=on_existing)


def test_who_may_work_beside_whom(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "whole")
    aligner, refusals = Affine(), []

    def others(call: int) -> None:
        for worker, other, reason in (
            ((0, 2), None, "is in use by another conversion (the worker 0 of 2 is at work already)"),
            ((0, 1), None, "is in use by another conversion: wait"),
            ((1, 3), None, "is in use by another conversion (2 workers share it, and this is the worker 1 of 3)"),
            ((1, 2), Affine(3.0), "is in use by another conversion: wait"),
        ):
            before = shards_in(tmp_path / "out")
            with pytest.raises(DataError) as caught:
                convert(tmp_path / "in", tmp_path / "out", worker, other)
            assert reason in str(caught.value)
            assert shards_in(tmp_path / "out") == before
            refusals.append(reason)
        if call == 2:
            convert(tmp_path / "in", tmp_path / "out", (1, 2))

    aligner.before = others
    assert convert(tmp_path / "in", tmp_path / "out", (0, 2), aligner).missing_shards == 0
    assert len(refusals) == 4 * 4
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_worker_that_fails_leaves_alone_what_others_have(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "whole")
    aligner = Affine()

    def fail_beside(call: int) -> None:
        failing = Affine()
        failing.before = lambda call: 1 / 0
        with pytest.raises(ZeroDivisionError):
            convert(tmp_path / "in", tmp_path / "out", (1, 2), failing)

    aligner.before = fail_beside
    convert(tmp_path / "in", tmp_path / "out", (0, 2), aligner)
    convert(tmp_path / "in", tmp_path / "out", (1, 2))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_temporary_files_are_removed_only_where_nobody_can_be_writing(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    names = [f".part_{number}.npy.0123456789ab.tmp" for number in range(4)]
    foreign = [".part_9.npy.0123456789ab.tmp", "part_0.npy.tmp", ".part_0.npy"]
    aligner = Affine()

    def others(call: int) -> None:
        if call > 1:
            return
        for name in (*names, *foreign):
            (tmp_path / "out" / name).write_bytes(b"left over")
        convert(tmp_path / "in", tmp_path / "out", (1, 2))  # has the first two shards
        assert [(tmp_path / "out" / name).exists() for name in names] == [False, False, True, True]

    aligner.before = others
    convert(tmp_path / "in", tmp_path / "out", (0, 2), aligner)
    convert(tmp_path / "in", tmp_path / "out")
    assert not any((tmp_path / "out" / name).exists() for name in names)
    assert all((tmp_path / "out" / name).exists() for name in foreign)


@pytest.mark.parametrize(
    "environment, device",
    [
        ({}, "cuda"),
        ({"LOCAL_RANK": "0"}, "cuda:0"),
        ({"LOCAL_RANK": "3", "RANK": "11", "WORLD_SIZE": "16"}, "cuda:3"),
        ({"LOCAL_RANK": "5"}, "cuda:1"),
        ({"SLURM_LOCALID": "2", "SLURM_PROCID": "9"}, "cuda:2"),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, "cuda:1"),
    ],
)
def test_each_process_takes_a_gpu_of_its_machine(
    environment: dict[str, str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert local_device("cuda", environment) == device
    for named in (None, "cpu", "cuda:2"):
        assert local_device(named, environment) == named


def test_a_gpu_without_a_machine_that_has_one_is_left_to_the_error_that_says_so(monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert local_device("cuda", {"LOCAL_RANK": "1"}) == "cuda"
    with pytest.raises(InputError, match="LOCAL_RANK is 'one', not a number"):
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        local_device("cuda", {"LOCAL_RANK": "one"})


def test_the_command_maps_on_the_gpu_of_its_local_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from aniso_ext.align import make_aligner
    from aniso_ext.cli.main import app

    rows = np.eye(4, dtype=np.float32)
    make_aligner("identity").fit(rows, rows).save_pretrained(tmp_path / "aligner")
    np.save(tmp_path / "in.npy", rows)
    asked: list[Any] = []

    def convert(*_: Any, **options: Any) -> Any:
        asked.append(options["device"])
        raise InputError("enough")

    monkeypatch.setattr("aniso_ext.convert.convert_embeddings", convert)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    words = ["--aligner", tmp_path / "aligner", "--input", tmp_path / "in.npy", "--output", tmp_path / "out.npy"]
    CliRunner().invoke(app, ["convert", *map(str, words), "--device", "cuda"])
    assert asked == ["cuda:1"]
