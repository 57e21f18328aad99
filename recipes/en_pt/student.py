"""What the training of the translator begins with, as a model folder: an English recogniser that says Portuguese words.

    python recipes/en_pt/student.py runs/en_pt/student data/en_pt/unigram3000 data/en_pt/*_cuts_train.jsonl.gz

Front-end, encoder, head of letters and the layers of the decoder are those of the recogniser; `--more` layers behind
them change nothing yet. The row of a Portuguese piece is the mean of those of the English pieces that it translates,
by the probabilities of IBM model 1 (Brown et al. 1993, section 4.1) of the translations in the manifests. So the
decoder, which would say "morning", says what "morning" is translated by, and the training begins with word for word.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechattn import load_model
from speechattn.cli.tokenizer import read_lines
from speechattn.model import Recognizer
from speechattn.model.folder import from_config, save_model
from speechattn.text.pieces import Pieces

ROUNDS = 8  # of expectation and maximisation
UNSAID = ("cross.out", "self_attention.out", "ff.2")  # what a layer adds comes through these

Pair = tuple[list[int], list[int]]


def translated_by(pairs: Sequence[Pair], sizes: tuple[int, int], rounds: int = ROUNDS) -> Tensor:
    """Of pairs of tokens (source, target): of what a target [V'] was made, shares of the sources [V]; sparse [V', V].

    Each source token of a pair is spread over the targets in it, in proportion to how often these make it.
    """
    both = [(torch.tensor(a), torch.tensor(b)) for a, b in pairs if a and b]
    links = torch.cat([torch.cartesian_prod(b, a) for a, b in both])
    spread = torch.cat([torch.arange(len(a)).repeat(len(b)) + n for (a, b), n in zip(both, starts(both), strict=True)])
    keys, link = (links[:, 0] * sizes[0] + links[:, 1]).unique(return_inverse=True)
    target, source = keys // sizes[0], keys % sizes[0]
    count = torch.ones(len(keys), dtype=torch.float64)
    for _ in range(rounds):
        each = count[link]  # the probability of the target, but for a factor of the source alone
        count = summed(each / summed(each, spread)[spread], link)
    shares = count / summed(count, target)[target]
    return torch.sparse_coo_tensor(torch.stack([target, source]), shares, (sizes[1], sizes[0]), check_invariants=True)


def starts(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    """How many source tokens come before each pair."""
    return [0, *accumulate(len(a) for a, _ in pairs)][:-1]


def summed(values: Tensor, at: Tensor) -> Tensor:
    """The sums of those that belong together."""
    return torch.zeros(int(at.max()) + 1, dtype=values.dtype).index_add(0, at, values)


def table(old: Tensor, said: Tensor, ends: tuple[Any, Any]) -> Tensor:
    """Rows of the new pieces [V', D] from those of the old ones [V, D], of which each is `said` [V', V] sparse."""
    made = torch.sparse.mm(said, old.double()).to(old.dtype)
    seen = torch.sparse.sum(said, 1).to_dense() > 0
    made = torch.where(seen[:, None], made, old.mean(0))
    made[ends[1]] = old[ends[0]]
    return made


def config(old: dict[str, Any], vocab: int, more: int, heads: list[list[int]], language: str) -> dict[str, Any]:
    """That of the recogniser, with another decoder."""
    new = deepcopy(old) | {"target_language": language}
    decoder = new["heads"]["attention"]["init_args"]
    depth = decoder["depth"] + more
    decoder |= {"vocab": vocab, "depth": depth, "dropout": 0.1, "alignment_heads": heads}
    return new


def student(
    recognizer: Recognizer, tokenizer: Pieces, pairs: Sequence[tuple[str, str]], *, more: int,
    heads: list[list[int]], language: str,
) -> Recognizer:  # fmt: skip
    """A model that says the translations of `pairs`."""
    ends = recognizer.tokenizer.end, tokenizer.end
    assert recognizer.config is not None
    assert None not in ends
    old, depth = recognizer.state_dict(), recognizer.config["heads"]["attention"]["init_args"]["depth"]
    made = from_config(config(recognizer.config, tokenizer.size, more, heads, language), tokenizer)
    name = "heads.attention.embed.weight"
    spelled = [(recognizer.tokenizer.encode(a), tokenizer.encode(b)) for a, b in pairs]
    said = translated_by(spelled, (recognizer.tokenizer.size, tokenizer.size))
    new = made.state_dict() | {key: tensor for key, tensor in old.items() if key != name}
    new[name] = table(old[name], said, ends)
    for layer in range(depth, depth + more):
        for part in UNSAID:
            for kind in ("weight", "bias"):
                new[f"heads.attention.layers.{layer}.{part}.{kind}"].zero_()
    made.load_state_dict(new)
    return made


def pairs_of(manifest: str) -> list[tuple[str, str]]:
    """Texts and translations."""
    both = (read_lines(manifest, text=said, translations=not said) for said in (True, False))
    return list(zip(*both, strict=True))


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write")
    parser.add_argument("tokenizer", type=Path, help="of the translations")
    parser.add_argument("manifests", nargs="+", help="cuts with translations")
    parser.add_argument("--model", default="speechattn/en-tiny-stream", help="the recogniser")
    parser.add_argument("--more", type=int, default=2, help="layers behind its decoder's")
    given = parser.parse_args()
    pairs = [pair for manifest in given.manifests for pair in pairs_of(manifest)]
    torch.manual_seed(0)
    made = student(
        load_model(given.model), Pieces.load(given.tokenizer), pairs, more=given.more, language="pt",
        heads=[[2, 1], [2, 4], [3, 2], [3, 5]],
    )  # fmt: skip
    save_model(made, given.folder)
    print(f"{given.folder}: {made.tokenizer.size} tokens, {sum(p.numel() for p in made.parameters()):,} parameters, "
          f"from {len(pairs)} pairs")  # fmt: skip


if __name__ == "__main__":
    main()
