"""Random conversions compared with NumPy in float64, row for row; prints what was covered, ends with 1 if any differs.

    python benchmarks/fuzz_convert.py --count 10000 --seed 0
"""

from __future__ import annotations

import argparse
import collections
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python_tests"))

from conversion_fuzz import check, draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; by default the folder for temporary files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, rows, failures = time.perf_counter(), 0, 0
    covered: collections.Counter[str] = collections.Counter()
    for number in range(options.count):
        case = draw(np.random.default_rng((options.seed, number)))
        folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=options.folder))
        try:
            check(case, folder)
        except Exception as error:  # a crash is a finding like a wrong number
            failures += 1
            print(f"case {number}: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            shutil.rmtree(folder)
        rows += sum(case.sizes)
        covered[f"{case.format} to {case.output_format or case.format}"] += 1
        covered[f"{case.dtype} to {case.stored}"] += 1
        covered[f"on_bad {case.on_bad}"] += 1
        for name in ("clip", "remote", "carries", "one_file"):
            covered[name] += getattr(case, name)
    seconds = time.perf_counter() - started
    for name, count in sorted(covered.items()):
        print(f"{count:6} {name}")
    print(f"{options.count} conversions of {rows} rows in {seconds:.0f} s, {failures} differ")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
