"""Word error rate of each head on the held-out splits: `python evaluate.py CACHE FOLDER`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from corpus import RATE, Corpus, padded
from tqdm import tqdm

from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer, load_model
from speechattn.score.wer import word_errors

SPLITS = {
    "seen": "voices and speeds of training",
    "speed": "faster and slower than in training",
    "voice": "voices that training never hears",
    "rare": "rare names that sound like frequent ones",
}
SIZE = 20


def by_attention(model: Recognizer, y: Frames, longest: int = 120) -> list[list[int]]:
    """The most probable token of the attention head, again and again, until the end."""
    decoder, end = model.heads["attention"], model.tokenizer.end
    state, said = decoder.start(Memory.of(y)), [torch.full((len(y.mask), 1), end)]
    for _ in range(longest):
        hidden, _, state = decoder.step(said[-1], state)
        said.append(decoder.logits(hidden).argmax(-1))
        if bool((torch.cat(said[1:], 1) == end).any(1).all()):
            break
    rows = torch.cat(said[1:], 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def recognised(model: Recognizer, y: Frames) -> dict[str, list[list[int]]]:
    """Tokens of each utterance by each head alone, greedily, and by CTC and attention together."""
    found = {"attention greedy": by_attention(model, y)}
    for kind, size in (("ctc", 1), ("transducer", 1), ("joint", 5)):
        best = [row[0].tokens if row else () for row in model.search(kind, beam_size=size).decode(y)]
        found[f"{kind} {'greedy' if size == 1 else f'beam {size}'}"] = [list(tokens) for tokens in best]
    return found


def batches(corpus: Corpus) -> Iterator[list[int]]:
    """Utterances of about the same length."""
    order = sorted(range(len(corpus)), key=lambda i: len(corpus.sound(i)))
    yield from (order[at : at + SIZE] for at in range(0, len(order), SIZE))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    model = load_model(args.folder)
    silence = np.zeros(RATE // 5, np.float32)
    for split, about in SPLITS.items():
        corpus = Corpus(args.cache, split)
        texts, said = list[str](), dict[str, list[str]]()
        for rows in tqdm(list(batches(corpus)), desc=split, leave=False):
            y = model.listening(padded([np.concatenate([corpus.sound(i), silence]) for i in rows]))
            texts += [corpus.text(i) for i in rows]
            for name, tokens in recognised(model, y).items():
                said.setdefault(name, []).extend(model.tokenizer.decode(row) for row in tokens)
        print(f"{split}: {about}")
        for name, answers in said.items():
            print(f"  {name:17} {word_errors(texts, answers, normalise='none')}")


if __name__ == "__main__":
    main()
