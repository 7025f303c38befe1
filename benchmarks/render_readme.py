"""Write measured tables into README.md.

    python benchmarks/render_readme.py build/benchmark.json   the record of `make bench`: its CSV and the CPU table
    python benchmarks/render_readme.py                        all other tables, from the CSV files in benchmarks/results

The GPU tables come from h100_kernels.csv and h100_latency.csv of `aniso bench kernels`, those of conversions and the
estimate from cpu_convert.csv and h100_convert.csv of `aniso bench convert`, that of faults from convert_faults.csv of
benchmarks/convert_faults.py, as far as these files are there.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aniso_ext.bench.suite import Goal

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "cpu_closed_form.csv"
GPU_KERNELS, GPU_LATENCY = HERE / "results" / "h100_kernels.csv", HERE / "results" / "h100_latency.csv"
CONVERSIONS = (HERE / "results" / "cpu_convert.csv", HERE / "results" / "h100_convert.csv")
FAULTS = HERE / "results" / "convert_faults.csv"
ESTIMATED_ROWS = 10**9
README = HERE.parent / "README.md"
COMMAND = "make bench"
NO_GPU_RESULTS = "`aniso bench kernels` prints this table for the GPU at hand."


def read_record(path: Path) -> tuple[str, list[dict[str, object]]]:
    """The header line and one row for each case and variant, in nanoseconds for each embedding."""
    record = json.loads(path.read_text())
    machine, commit = record["machine_info"], record["commit_info"]
    changed = " with changes" if commit.get("dirty") else ""
    header = (
        f"{machine['cpu']} ({machine['instruction_set']}), 1 thread, torch {machine['torch']}, "
        f"Python {machine['python']}, {record['datetime'][:10]}, commit {commit['id'][:10]}{changed}, `{COMMAND}`"
    )
    rows = []
    for benchmark in record["benchmarks"]:
        facts = benchmark["extra_info"]
        times = [seconds / facts["rows"] * 1e9 for seconds in benchmark["stats"]["data"]]
        fifths = quantiles(times, n=5)
        rows.append(
            {
                **{name: facts[name] for name in ("dtype", "D", "R", "variant")},
                "ns_per_row": round(benchmark["stats"]["median"] / facts["rows"] * 1e9),
                "p20": round(fifths[0]),
                "p80": round(fifths[3]),
            }
        )
    return header, rows


def cpu_table(header: str, rows: list[dict[str, object]]) -> str:
    """Markdown: one line a case, times in ns for each row; ours as a multiple of the products, the others of ours."""
    cases: dict[tuple[object, ...], dict[str, int]] = {}
    for row in rows:
        cases.setdefault((row["dtype"], row["D"], row["R"]), {})[str(row["variant"])] = int(str(row["ns_per_row"]))
    lines = [
        "| dtype | D | R | two products alone | aniso_ext | eager | eager, folded | torch.compile, folded |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (dtype, width, rank), times in sorted(cases.items(), key=lambda item: (item[0][0] != "float32", item[0][1])):
        products = min(times["products, chunked"], times["products, whole"])
        ours = times["aniso_ext"]
        others = " | ".join(
            f"{times[name]} ({times[name] / ours:.1f} ×)" for name in ("eager", "eager, folded", "compiled, folded")
        )
        lines.append(f"| {dtype} | {width} | {rank} | {products} | **{ours}** ({ours / products:.2f} ×) | {others} |")
    return f"Nanoseconds for each row, median; {header}.\n\n" + "\n".join(lines)


def gpu_tables(kernels: Path, latency: Path) -> str:
    """Markdown of the tables that are there: kernels against stock PyTorch, and single calls of small batches."""
    if not kernels.is_file():
        return NO_GPU_RESULTS
    parts = [kernel_table(kernels)]
    if latency.is_file():
        parts.append(latency_table(latency))
    return "\n\n".join(parts)


def kernel_table(path: Path) -> str:
    """One line a case: ours as a multiple of the floor, stock PyTorch as a multiple of the better of ours."""
    from aniso_ext.bench.records import read_table
    from aniso_ext.bench.suite import CASES

    goals = {case.name: case.goal for case in CASES}

    header, rows = read_table(path)
    facts = [f"{name} {header[name]}" for name in ("driver", "cuda", "torch", "triton", "python") if name in header]
    copy = float(header["ceiling copy GB/s"])
    products = [
        f"{name.split()[1]} {float(value):.0f} TFLOP/s" for name, value in header.items() if name.endswith("TFLOP/s")
    ]
    lines = [
        f"Nanoseconds for each row, median; {header['device']}, {', '.join(facts)}, {header['date']}, "
        f"commit {header['commit']}, `aniso bench kernels`, {int(rows[0]['rows']):,} rows. "
        f"Ceilings in the same run: copy {copy:,.0f} GB/s, products {', '.join(products)}. "
        "Behind a time of ours its multiple of the floor; behind one of PyTorch its multiple of our better one.",
        "",
        "| case | floor | CUDA | Triton | torch.compile | torch.compile, diagonal | eager | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["variant"]: row for row in rows if row["case"] == case}
        lines.append(f"| {case} | {' | '.join(_kernel_cells(found, goals[case]))} |")
    return "\n".join(lines)


def _kernel_cells(found: dict[str, dict[str, str]], goal: Goal) -> list[str]:
    times = {name: float(row["ns_per_row"]) for name, row in found.items() if row["ns_per_row"]}
    ours = [time for name, time in times.items() if found[name]["ours"] == "yes"]
    best = min(ours, default=None)
    floor = next((float(row["floor_ns"]) for row in found.values() if row["floor_ns"]), None)

    def cell(name: str) -> str:
        if name not in found:
            return ""
        if name not in times:
            return "failed"
        if found[name]["ours"] == "yes":
            text = f"{times[name]:.2f} ({times[name] / floor:.2f} ×)" if floor else f"{times[name]:.2f}"
            return f"**{text}**" if times[name] == best else text
        return f"{times[name]:.2f} ({times[name] / best:.1f} ×)" if best else f"{times[name]:.2f}"

    text = ""
    if ours and floor:
        reached = sum(goal.met(time, floor, times.get("compiled")) is True for time in ours)
        by = {0: "missed", len(ours): "met"}.get(reached) or "met by one"
        text = f"≤ {goal.floors:.2f} ×, ≥ {goal.over_compiled:g} × torch.compile: {by}"
    stock = [cell(name) for name in ("compiled", "compiled diagonal", "eager")]
    return ["" if floor is None else f"{floor:.2f}", cell("cuda"), cell("triton"), *stock, text]


def latency_table(path: Path) -> str:
    """One line a way to call, one column a number of rows."""
    from aniso_ext.bench.records import read_table

    _, rows = read_table(path)
    sizes = list(dict.fromkeys(row["rows"] for row in rows))
    lines = [
        f"Microseconds from the call to the result, median; {rows[0]['case']}, `auto` is our default.",
        "",
        f"| | {' | '.join(f'N = {int(size):,}' for size in sizes)} |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        found = {row["rows"]: float(row["us"]) for row in rows if row["variant"] == variant}
        cells = [f"{found[size]:.1f}" if size in found else "" for size in sizes]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def conversion_tables(paths: Sequence[Path]) -> str:
    """The tables of the machines whose results are there."""
    return "\n\n".join(conversion_table(path) for path in paths if path.is_file())


def conversion_table(path: Path) -> str:
    """One line a variant at each number of rows, and what a large corpus would take at the last rate."""
    from aniso_ext.bench.convert import CONVERT, PICKLED, REALIGN, REALIGN_FIT
    from aniso_ext.bench.records import read_table

    header, rows = read_table(path)
    threads = f"{header['threads']} threads, " if "threads" in header else ""
    passes = (
        f" The four passes of NumPy fit and map; `{REALIGN}` maps with an aligner that was fitted before, "
        f"`{REALIGN_FIT}` fits it on the same rows first."
    )
    lines = [
        f"Whole runs, median of {header['rounds']}; D = {rows[0]['D']}, R = {rows[0]['R']}, "
        f"float16 `.npy`, `--calibration fitted`; {header['device']}, {threads}"
        f"{header['memory']} of memory, load {header['load before']} before the run, "
        f"torch {header['torch']}, {header['date']}, commit {header['commit']}, `aniso bench convert`. "
        "GB/s counts float16 rows in and out; every output was brought to disk."
        + (passes if any(row["variant"] == PICKLED for row in rows) else ""),
        "",
        "| rows | | rows/s | GB/s | of `cp` | of the map in memory | of the bus | against NumPy | peak RSS |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        shares = [f"{float(row[name]):.0%}" if row[name] else "" for name in ("of_copy", "of_op", "of_bus")]
        faster = f"{float(row['times_pickled']):.1f} ×" if row["times_pickled"] else ""
        peak = f"{float(row['peak_mb']):,.0f} MB" if row["peak_mb"] else ""
        rates = [f"{float(row['rows_per_s']):,.0f}", f"{float(row['gb_per_s']):.2f}"]
        measured = int(row["measured_rows"])
        name = row["variant"] if measured == int(row["rows"]) else f"{row['variant']} ({measured:,} rows)"
        cells = [f"{int(row['rows']):,}", name, *rates, *shares, faster, peak]
        lines.append(f"| {' | '.join(cells)} |")
    converted = [row for row in rows if row["variant"] == CONVERT]
    return "\n".join((*lines, "", estimate(max(converted, key=lambda row: int(row["rows"])))))


def spell(minutes: float) -> str:
    whole = max(1, round(minutes))
    return f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{whole} minute{'s' if whole > 1 else ''}"


def estimate(measured: dict[str, str]) -> str:
    """What a corpus of ESTIMATED_ROWS takes at a measured rate."""
    minutes = ESTIMATED_ROWS / float(measured["rows_per_s"]) / 60
    terabytes = ESTIMATED_ROWS * int(measured["D"]) * 2 / 1e12
    return (
        f"So {ESTIMATED_ROWS:,} rows of this kind, {terabytes:.2f} TB and as much for the stand-ins, take one such "
        f"machine {spell(minutes)} at the rate of the {int(measured['rows']):,} rows above, and sixteen of them "
        f"{spell(minutes / 16)} if the storage keeps up. `--calibration corpus` reads and maps all rows once more."
    )


def fault_table(path: Path) -> str:
    """One line a kind of fault and engine, over all formats and calibrations."""
    if not path.is_file():
        return ""
    from aniso_ext.bench.records import read_table

    header, rows = read_table(path)
    sums: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        counts = [int(row[name]) for name in ("runs", "in_the_conversion", "identical")]
        found = sums.setdefault((row["fault"], row["engine"]), [0, 0, 0])
        found[:] = [one + other for one, other in zip(found, counts, strict=True)]
    formats = ", ".join(dict.fromkeys(row["format"] for row in rows))
    lines = [
        f"Formats {formats}; both calibrations; {header['device']}, {header['date']}, commit {header['commit']}, "
        f"`python benchmarks/convert_faults.py`, seed {header['seed']}.",
        "",
        "| fault | engine | runs | hit the conversion before its end | ended with the bytes of an unbroken run |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(map(str, (*key, *counts)))} |" for key, counts in sums.items()]
    return "\n".join(lines)


def replaced(page: str, name: str, text: str) -> str:
    """The page with what stands between the markers ``bench:NAME`` replaced."""
    opening, closing = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    before, rest = page.split(opening)
    _, after = rest.split(closing)
    return f"{before}{opening}\n{text}\n{closing}{after}"


def write_cpu_results(record: Path) -> str:
    header, rows = read_record(record)
    with RESULTS.open("w", newline="") as file:
        file.write(f"# {header}\n")
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return cpu_table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, nargs="?", help="file written by pytest --benchmark-json")
    record = parser.parse_args(arguments).record
    page = README.read_text()
    if record is not None:
        page = replaced(page, "cpu", write_cpu_results(record))
    page = replaced(page, "gpu", gpu_tables(GPU_KERNELS, GPU_LATENCY))
    page = replaced(page, "convert", conversion_tables(CONVERSIONS))
    README.write_text(replaced(page, "faults", fault_table(FAULTS)))


if __name__ == "__main__":
    main()
