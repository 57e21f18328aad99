"""Who may be trained on, and what is retrieved from: `python -m recipes.terms.banks WORDNET FOLDER --train CUTS ...`.

Training manifests without the utterances that hold a rare word of the test or dev part (`sentences.py` has the rule) go
to FOLDER under their own names, those with a word of dev and none of test to `held_cuts_dev.jsonl.gz`: words that were
never trained on, in voices that were. Term lists, one term a line:

- `train_terms.txt`: rare words of the training manifests,
- `dev_bank.txt` and `test_bank.txt`: 1,000 and 10,000 terms. First the rare words of that part that are said in
  `held_cuts_dev.jsonl.gz` or in the test sentences, then for each of them two lemmas of WordNet that are near in sound,
  then lemmas in the order of their hashes; none of these is said in that part. The first 1,000 are a bank, too.
- `fotaq_bank.txt`: the same for FOTAQ's test lines. Its terms are rare words and names: a word of five letters or more
  that stands at most ten times in the glosses, and in less than three of the other dialogue's lines (--ordinary).
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from recipes.fotaq.sentences import FILES
from recipes.terms.sentences import counted, digest, part, part_of, rare, words

NEAR = 2  # lemmas near in sound for each term
COMMON = 3  # lines of other dialogue in which an ordinary word stands
ALIKE = (
    ("ph", "f"), ("gh", "g"), ("ck", "k"), ("qu", "kw"), ("x", "ks"), ("c(?=[eiy])", "s"), ("c(?!h)", "k"), ("q", "k"),
    ("z", "s"), ("y", "i"), ("[aeiou]+", "a"), (r"(.)\1", r"\1"),
)  # fmt: skip


def sound(word: str) -> str:
    """How a word is said, roughly: one letter for each consonant, one for every run of vowels."""
    for letters, said in ALIKE:
        word = re.sub(letters, said, word)
    return word


def lemmas(wordnet: Path) -> list[str]:
    """Words of one part and five letters or more, in the order of their hashes."""
    found: set[str] = set()
    for name in FILES:
        for line in (wordnet / name).read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                fields = line.split(" ")
                found |= {fields[4 + 2 * i].split("(")[0].lower() for i in range(int(fields[3], 16))}
    return sorted((word for word in found if re.fullmatch("[a-z]{5,}", word)), key=digest)


def bank(terms: Sequence[str], said: Iterable[str], others: Sequence[str], size: int) -> list[str]:
    """Terms, lemmas near in sound, and other lemmas, none of which is said."""
    taken = {*terms, *said}
    free = [word for word in others if word not in taken]
    keys = [sound(word) for word in free]
    near: list[str] = []
    for term in terms:
        hits = process.extract(sound(term), keys, scorer=Levenshtein.distance, limit=4 * NEAR)
        fresh = [free[i] for _, _, i in hits if free[i] not in near]
        near += fresh[:NEAR]
    return [*terms, *near, *(word for word in free if word not in {*near})][:size]


def rows_of(path: Path) -> list[str]:
    """The lines of a cuts manifest."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.readlines()


def text_of(row: str) -> str:
    """What is said in a cut."""
    return " ".join(supervision["text"] for supervision in json.loads(row)["supervisions"])


def rare_of(texts: Iterable[str], counts: Counter[str], wanted: str) -> list[str]:
    """Rare words of a part, sorted."""
    return sorted({w for text in texts for w in words(text) if rare(w, counts) and part(w) == wanted})


def write(path: Path, lines: Sequence[str], end: str = "\n") -> None:
    """A text file, or one that is packed."""
    text = "".join(f"{line}{end}" for line in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(lines)}")


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--fotaq", type=Path, required=True, help="cuts of FOTAQ's test part")
    parser.add_argument("--ordinary", type=Path, required=True, help="lines of other dialogue, a text file")
    given = parser.parse_args()
    counts, others = counted(given.wordnet), lemmas(given.wordnet)
    held: list[str] = []
    trained: list[str] = []
    for path in given.train:
        kept: list[str] = []
        for row in rows_of(path):
            which = part_of(text_of(row), counts)
            (kept if which == "train" else held if which == "dev" else []).append(row)
        trained += [text_of(row) for row in kept]
        write(given.folder / f"kept_{path.name}", kept, end="")
    write(given.folder / "held_cuts_dev.jsonl.gz", held, end="")
    write(given.folder / "train_terms.txt", rare_of(trained, counts, "train"))
    dev, test = [text_of(row) for row in held], (given.folder / "test.txt").read_text(encoding="utf-8").splitlines()
    for name, texts, size in (("dev", dev, 1000), ("test", test, 10000)):
        said = {word for text in texts for word in words(text)}
        write(given.folder / f"{name}_bank.txt", bank(rare_of(texts, counts, name), said, others, size))
    lines = [text_of(row) for row in rows_of(given.fotaq)]
    usual = Counter(w for line in given.ordinary.read_text(encoding="utf-8").splitlines() for w in {*words(line)})
    said = {word for line in lines for word in words(line)}
    names = sorted(word for word in said if rare(word, counts) and usual[word] < COMMON)
    write(given.folder / "fotaq_bank.txt", bank(names, said, others, 10000))


if __name__ == "__main__":
    main()
