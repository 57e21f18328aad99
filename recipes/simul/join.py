"""Clips to streams: `python join.py data/fotaq/fotaq_cuts_test.jsonl.gz data/fotaq/fotaq_streams_test.jsonl.gz`.

Clips of one speaker in the order of the manifest, 10 to 20 to a stream, with silent pauses of 0.3 to 0.8 s behind each.
The same seed gives the same streams. Ends of words are kept where they are known (FOTAQ's dev and test).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from speechattn.data.prepare.joined import Joining, write_streams
from speechattn.data.streams import read_word_ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cuts", type=Path, help="manifest of clips")
    parser.add_argument("out", type=Path, help="manifest of the streams (.jsonl.gz); their sounds lie beside it")
    parser.add_argument("--clips", type=int, nargs=2, default=(10, 20), metavar="N", help="of a stream (default 10 20)")
    parser.add_argument("--pause", type=float, nargs=2, default=(0.3, 0.8), metavar="S", help="default 0.3 0.8")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = write_streams(
        args.cuts, args.out, Joining(*args.clips, *args.pause, seed=args.seed), word_ends=read_word_ends()
    )
    sizes = [len(row["supervisions"]) for row in rows]  # type: ignore[arg-type]
    minutes = sum(float(row["duration"]) for row in rows) / 60  # type: ignore[arg-type]
    print(
        f"{args.out}: {len(rows)} streams of {min(sizes)} to {max(sizes)} clips, {sum(sizes)} in all, {minutes:.1f} min"
    )


if __name__ == "__main__":
    main()
