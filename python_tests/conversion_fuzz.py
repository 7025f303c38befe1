"""Random conversions against NumPy in float64: format, layout, order, split, batches, blocks, bad rows, dtype, place.

Inputs are written and outputs are read by NumPy, pyarrow and safetensors alone. The map is the closed form of
``oracle.correct`` with the arrays of a fitted aligner.
"""

from __future__ import annotations

import json
import tempfile
import uuid
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file

import aniso_ext as aniso
from aniso_ext.convert import convert_embeddings
from aniso_ext.data import direct_file
from aniso_ext.data.direct_file import BLOCK_BYTES

WIDTHS = (2, 3, 5, 8, 16, 33)
SUFFIXES = {"npy": ".npy", "parquet": ".parquet", "safetensors": ".safetensors", "arrow": ".arrow"}
CODES = {"float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16"}
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
SHORT = 4.0
"""What division by the lengths before both normalisations may do to an error: their product stays above 1/4 here."""
LEAST = {"float16": 2.0**-25, "bfloat16": 0.0, "float32": 0.0, "float64": 0.0}
"""Half the smallest number of a format, where that matters."""


@dataclass(frozen=True)
class Conversion:
    """One random case."""

    width: int
    sizes: tuple[int, ...]
    dtype: str
    format: str
    fortran: bool
    clip: bool
    remote: bool
    columns: bool
    group: int
    bad: tuple[tuple[int, ...], ...]
    on_bad: str
    batch_rows: int
    output_format: str | None
    output_dtype: str | None
    one_file: bool
    seed: int
    block_bytes: int

    @property
    def stored(self) -> str:
        """Dtype of the output."""
        return self.output_dtype or self.dtype

    @property
    def suffix(self) -> str:
        """Suffix of the output files."""
        return SUFFIXES[self.output_format or self.format]

    @property
    def input_columns(self) -> bool:
        """Whether the input files are tables with other columns."""
        return self.columns and self.format in ("parquet", "arrow")

    @property
    def carries(self) -> bool:
        """Whether columns of the input belong in the output."""
        return self.input_columns and self.suffix in (".parquet", ".arrow")


def draw(rng: np.random.Generator) -> Conversion:
    """A case that can be converted."""

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    sizes = tuple(int(size) for size in rng.integers(1, pick(2, 12, 60), rng.integers(1, 5)))
    format = pick("npy", "parquet", "safetensors", "arrow")
    dtype = pick("float16", "float32", "float64", *(("bfloat16",) if format == "safetensors" else ()))
    output_format = pick(None, "npy", "parquet", "safetensors", "arrow")
    holds_bfloat16 = (output_format or format) == "safetensors"
    output_dtype = pick(None, "float16", "float32", "float64", *(("bfloat16",) if holds_bfloat16 else ()))
    if dtype == "bfloat16" and output_dtype is None and not holds_bfloat16:
        output_dtype = "float32"
    clip = bool(rng.integers(4) == 0)
    on_bad = pick("fail", "zero") if clip else pick("fail", "drop", "zero")
    bad = tuple(
        tuple(sorted(int(row) for row in rng.permutation(size)[: rng.integers(0, size)])) if on_bad != "fail" else ()
        for size in sizes
    )
    return Conversion(
        width=int(pick(*WIDTHS)),
        sizes=sizes,
        dtype=dtype,
        format=format,
        fortran=bool(rng.integers(2)),
        clip=clip,
        remote=bool(rng.integers(3) == 0),
        columns=bool(rng.integers(2)),
        group=int(rng.integers(1, 20)),
        bad=bad,
        on_bad=on_bad,
        batch_rows=int(rng.integers(1, pick(3, 20, 100))),
        output_format=output_format,
        output_dtype=output_dtype,
        one_file=bool(len(sizes) == 1 and rng.integers(2)),
        seed=int(rng.integers(2**31)),
        block_bytes=int(pick(4096, 8192, BLOCK_BYTES)),
    )


@lru_cache(maxsize=len(WIDTHS))
def fitted(width: int) -> tuple[Any, dict[str, np.ndarray], float]:
    """A fitted aligner, its arrays, and by how much it may enlarge an error: the steepest radius map over a length."""
    rng = np.random.default_rng(width)
    source, target = (_unit(rng.standard_normal((400, width)) + sign) for sign in (0.4, -0.4))
    aligner = aniso.AnisoAlign(rank=2 * (width // 4) or 2, refine=False, seed=width).fit(source, target)
    with tempfile.TemporaryDirectory() as folder:
        arrays = load_file(aligner.save_pretrained(folder) / "model.safetensors")
    rises = [np.diff(arrays[f"radius_{side}_knots"], axis=1) for side in ("source", "target")]
    ratios = arrays["radius_target_knots"][:, [0, -1]] / arrays["radius_source_knots"][:, [0, -1]]
    slope = max((rises[1] / np.maximum(rises[0], 1e-300)).max(), ratios.max(), float(arrays["complement_scale"].max()))
    return aligner, arrays, float(slope)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_of(case: Conversion) -> list[np.ndarray]:
    """The rows of each shard as stored: bfloat16 as float32 values that are exact in it."""
    rng = np.random.default_rng(case.seed)
    parts = []
    for size, bad in zip(case.sizes, case.bad, strict=True):
        rows = _unit(rng.standard_normal((size, case.width)) + 0.4)
        rows = rows.astype(np.float32 if case.dtype == "bfloat16" else case.dtype)
        for row in bad:
            rows[row] = 0
            if rng.integers(2):
                rows[row, rng.integers(case.width)] = rng.choice([np.nan, np.inf, -np.inf])
        if case.dtype == "bfloat16":
            rows = (rows.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        parts.append(rows)
    return parts


def columns_of(case: Conversion, shard: int) -> dict[str, pa.Array]:
    size = case.sizes[shard]
    texts = [None if (shard + row) % 5 == 0 else f"{shard}/{row}" for row in range(size)]
    return {"id": pa.array(range(size), pa.int32()), "caption": pa.array(texts), "tags": pa.array([[t] for t in texts])}


def store(case: Conversion, folder: Path, parts: list[np.ndarray]) -> Path:
    """Write the input; what to convert."""
    shards = folder / "in" / "text_emb" if case.clip else folder / "in"
    shards.mkdir(parents=True)
    for number, rows in enumerate(parts):
        path = shards / f"e_{number}{SUFFIXES[case.format]}"
        if case.format == "npy":
            np.save(path, np.asfortranarray(rows) if case.fortran else rows)
        elif case.format == "safetensors":
            numbers = (rows.view(np.uint32) >> 16).astype(np.uint16) if case.dtype == "bfloat16" else rows
            entry = {"dtype": CODES[case.dtype], "shape": list(rows.shape), "data_offsets": [0, numbers.nbytes]}
            header = json.dumps({"embeddings": entry}).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + numbers.tobytes())
        else:
            lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), case.width)
            others = columns_of(case, number) if case.columns else {}
            table = pa.table({**dict(list(others.items())[:1]), "embedding": lists, **dict(list(others.items())[1:])})
            if case.format == "parquet":
                pq.write_table(table, path, row_group_size=case.group)
            else:
                with pa.ipc.new_file(path, table.schema) as file:
                    file.write_table(table, max_chunksize=case.group)
    if case.clip:
        (folder / "in" / "metadata").mkdir()
        for number in range(len(parts)):
            path = folder / "in" / "metadata" / f"metadata_{number}.parquet"
            pq.write_table(pa.table(columns_of(case, number)), path)
    return shards / f"e_0{SUFFIXES[case.format]}" if case.one_file and not case.clip else folder / "in"


def read(path: Path) -> tuple[np.ndarray, str, pa.Table | None]:
    """Rows in float64, stored dtype and table of an output file."""
    if path.suffix == ".npy":
        rows = np.load(path, allow_pickle=False)
        return rows.astype(np.float64), rows.dtype.name, None
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        entry = json.loads(content[8 : 8 + length])["embeddings"]
        (dtype,) = (name for name, code in CODES.items() if code == entry["dtype"])
        numbers = np.frombuffer(content[8 + length :], np.uint16 if dtype == "bfloat16" else dtype)
        if dtype == "bfloat16":
            numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers.reshape(entry["shape"]).astype(np.float64), dtype, None
    table = pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(path).read_all()
    rows = np.stack(table.column("embedding").to_numpy())
    return rows.astype(np.float64), rows.dtype.name, table


def check(case: Conversion, folder: Path) -> None:
    """Convert one case in an empty folder and compare all that came out.

    Raises:
        AssertionError: something differs; the message begins with the case.
    """
    parts = rows_of(case)
    source: Any = store(case, folder, parts)
    aligner, arrays, slope = fitted(case.width)
    memory = fsspec.filesystem("memory")
    if case.remote:
        base = f"/{uuid.uuid4().hex}"
        memory.put(str(folder / "in"), f"{base}/in", recursive=True)
        source = f"memory://{base}/{source.relative_to(folder)}"
    output = folder / f"out{case.suffix}" if case.one_file else folder / "out"
    try:
        blocks = patch.object(direct_file, "BLOCK_BYTES", case.block_bytes)  # files are smaller than one of the usual
        with blocks, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not carried along")
            report = convert_embeddings(
                aligner, source, output, batch_rows=case.batch_rows, on_bad=case.on_bad,
                dtype=case.output_dtype, format=None if case.one_file else case.output_format,
            )  # fmt: skip
    finally:
        if case.remote:
            memory.rm(base, recursive=True)
    shards = folder / "out" / "text_emb" if case.clip and not case.one_file else folder / "out"
    names = [output] if case.one_file else [shards / f"e_{n}{case.suffix}" for n in range(len(parts))]
    assert list(report.outputs) == [str(name) for name in names], f"{case}: {report.outputs}"
    for number, (rows, name) in enumerate(zip(parts, names, strict=True)):
        _compare(case, number, rows, name, arrays, slope)
    if case.clip and not case.one_file:
        for path in (folder / "in" / "metadata").iterdir():
            assert (folder / "out" / "metadata" / path.name).read_bytes() == path.read_bytes(), f"{case}: {path.name}"


def _compare(
    case: Conversion, number: int, rows: np.ndarray, name: Path, arrays: dict[str, np.ndarray], slope: float
) -> None:
    got, dtype, table = read(name)
    bad = list(case.bad[number])
    good = np.setdiff1d(np.arange(len(rows)), bad)
    want = np.zeros(rows.shape)
    want[good] = oracle.correct(rows[good].astype(np.float64), arrays, "scalar")
    if case.on_bad == "drop":
        want = want[good]
    assert dtype == case.stored and got.shape == want.shape, f"{case}: {name.name} is {dtype} {got.shape}"
    # four products of D terms on rows of about unit length, enlarged by the radius maps; the sum before each of the two
    # normalisations may be short; then one rounding to the stored format
    computed = "float64" if "float64" in (case.dtype, case.stored) else "float32"
    allowed = ROUNDOFF[case.stored] * np.abs(want) + LEAST[case.stored]
    allowed += 4 * case.width * ROUNDOFF[computed] * slope * SHORT
    error = np.abs(got - want)
    assert (error <= allowed).all(), f"{case}: {name.name} is off by {error.max():.3g} in row {error.max(1).argmax()}"
    if case.on_bad == "zero":
        assert not got[bad].any(), f"{case}: bad rows of {name.name} are not zero"
    if case.carries:
        assert table is not None
        kept = good if case.on_bad == "drop" else np.arange(len(rows))
        wanted = pa.table(columns_of(case, number)).take(kept)
        assert table.column_names == ["id", "embedding", "caption", "tags"], f"{case}: {table.column_names}"
        assert table.drop_columns(["embedding"]).equals(wanted), f"{case}: other columns of {name.name} differ"

