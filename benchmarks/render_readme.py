"""Turn the record of ``make bench`` into benchmarks/results/cpu_closed_form.csv and the table in README.md."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from statistics import quantiles

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "cpu_closed_form.csv"
README = HERE.parent / "README.md"
OPENING, CLOSING = "<!-- bench:cpu -->", "<!-- /bench:cpu -->"
COMMAND = "make bench"


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


def table(header: str, rows: list[dict[str, object]]) -> str:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path, help="file written by pytest --benchmark-json")
    header, rows = read_record(parser.parse_args().record)
    with RESULTS.open("w", newline="") as file:
        file.write(f"# {header}\n")
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    before, rest = README.read_text().split(OPENING)
    _, after = rest.split(CLOSING)
    README.write_text(f"{before}{OPENING}\n{table(header, rows)}\n{CLOSING}{after}")


if __name__ == "__main__":
    main()
