"""Tries what a paper claims, small but real: `python recipes/claims.py NAME`.

Trains the points of the claim on synthetic strings of digits, one CPU core each, and writes table and picture into
docs/claims.md. What is done already is not done again: it lies in `--runs`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CLAIMS = ("segmental", "latent", "monotonic", "sparse", "contexts", "restricted", "sinks", "efficient")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CLAIMS, metavar="NAME", help=", ".join(CLAIMS))
    parser.add_argument("--data", type=Path, default=HERE.parent / "data/strings", help="of the synthetic speech")
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs/claims", help="of what was measured")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs/claims.md")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="trainings at once")
    parser.add_argument("--quick", action="store_true", help="ten steps on little data, to see that it runs")
    parser.add_argument("--point", nargs=2, metavar=("POINT", "SEED"), help="only this one, without a report")
    args = parser.parse_args()
    claim: Any = import_module(f"claim.{args.name}")
    from claim.strings import synthesise

    synthesise(args.data, jobs=args.jobs)
    runs = args.runs / ("quick" if args.quick else "") / getattr(claim, "FOLDER", args.name)
    runs.mkdir(parents=True, exist_ok=True)
    if args.point:
        measure(claim, args.point[0], int(args.point[1]), args, runs)
        return
    wanted = [(point, seed) for point, seeds in claim.POINTS.items() for seed in range(1 if args.quick else seeds)]
    missing = [(point, seed) for point, seed in wanted if not path_of(runs, point, seed).exists()]
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(lambda at: start(at[0], at[1], sys.argv[1:]), missing))
    if any(codes):
        raise SystemExit(f"{sum(map(bool, codes))} of {len(missing)} points failed")
    results: dict[str, list[Any]] = {point: [] for point in claim.POINTS}
    for point, seed in wanted:
        results[point].append(json.loads(path_of(runs, point, seed).read_text()))
    for point, (folder, other) in getattr(claim, "BORROWED", {}).items():
        found = sorted((runs.parent / folder).glob(f"{other}-*.json"))
        results[point] = [json.loads(path.read_text()) for path in found]
    from claim.report import write

    section = claim.report(results)
    write(args.page, args.name, section, claim.VERDICT, results, f"python recipes/claims.py {args.name}")
    print(section.text)


def path_of(runs: Path, point: str, seed: int) -> Path:
    """Where the figures of a point are kept."""
    return runs / f"{point}-{seed}.json"


def start(point: str, seed: int, arguments: list[str]) -> int:
    """A process of its own, with one thread."""
    command = [sys.executable, str(HERE / "claims.py"), *arguments, "--point", point, str(seed)]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


def measure(claim: Any, point: str, seed: int, args: argparse.Namespace, runs: Path) -> None:
    """Train and measure one point."""
    import torch
    from claim.training import Data

    torch.set_num_threads(1)
    began, busy = time.perf_counter(), time.process_time()
    found = claim.run(point, seed, Data(args.data, quick=args.quick))
    found |= {"point": point, "seed": seed, "torch": torch.__version__}
    found |= {"total_s": time.perf_counter() - began, "processor_s": time.process_time() - busy}
    unfinished = path_of(runs, point, seed).with_suffix(".part")
    unfinished.write_text(json.dumps(found, indent=1))
    unfinished.replace(path_of(runs, point, seed))


if __name__ == "__main__":
    main()
