"""`speechattn score terms REF HYP --terms FILE [--retrieved LISTS]`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from speechattn.errors import InputError
from speechattn.score.terms import recognised, retrieved
from speechattn.score.wer import NORMALISERS
from speechattn.terms.text import read_terms

__all__ = ["add_terms"]


def add_terms(kinds: Any) -> None:
    """Options of `score terms`."""
    parser = kinds.add_parser("terms", help="terms retrieved and recognised, with 95 %% intervals", allow_abbrev=False)
    parser.add_argument("reference", metavar="REF", help="text file, one utterance a line")
    parser.add_argument("hypothesis", metavar="HYP", nargs="?", help="text file of as many lines")
    parser.add_argument("--terms", metavar="FILE", required=True, help="one a line: source, or source => target")
    parser.add_argument("--retrieved", metavar="FILE", help="JSONL, for each utterance a list of terms, the best first")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 10], help="of recall@k (default 1 5 10)")
    parser.add_argument("--normaliser", default="whisper-english", choices=NORMALISERS)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the rates. InputError where files do not pair up, or where there is nothing to score."""
    from speechattn.cli.score import lines_of, paired, read_text

    if options.hypothesis is None and options.retrieved is None:
        raise InputError("score terms needs HYP, or lists of terms (--retrieved)")
    if min(options.k) < 1:
        raise InputError(f"--k {min(options.k)}: wanted 1 or more")
    terms = [term.source for term in read_terms(options.terms)]
    wanted, rates = lines_of(read_text(options.reference)), []
    if options.retrieved is not None:
        wanted, lists = paired(options.reference, wanted, options.retrieved, lines_of(read_text(options.retrieved)))
        ranked = [listed(line, options.retrieved) for line in lists]
        rates += retrieved(wanted, ranked, terms, options.k, normalise=options.normaliser)
    if options.hypothesis is not None:
        wanted, said = paired(options.reference, wanted, options.hypothesis, lines_of(read_text(options.hypothesis)))
        rates += recognised(wanted, said, terms, normalise=options.normaliser)
    if options.json:
        print(json.dumps([asdict(rate) for rate in rates]))
    else:
        print("\n".join(map(str, rates)))
    return 0


def listed(line: str, where: str) -> list[str]:
    """A list of texts in JSON."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(found, list) or not all(isinstance(term, str) for term in found):
        raise InputError(f"{where}: wanted a list of terms in each line, got {line[:60]!r}")
    return found
