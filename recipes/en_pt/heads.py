"""Which heads of the decoder look at the word that they translate: `python heads.py MODEL DEV TRAIN...`.

A translated piece belongs to the English word of its sentence that most probably made it, by IBM model 1 of the
training manifests, where that is at least half of what the sentence could give. Ends of FOTAQ's words are known. A head
is right at a piece if the frame that it looks at most lies in the word, or up to 0.2 s before or behind it. Printed are
the share of the pieces at which each head is right, and that of the mean over each layer and over the best heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from student import pairs_of, translated_by
from torch import Tensor

from speechattn import load_model
from speechattn.data.cuts import Manifest, load_sound
from speechattn.data.streams import read_word_ends
from speechattn.decoder.attention import AttentionDecoder
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer

NEAR_S = 0.2
SURE = 0.5


class Looked(NamedTuple):
    """Where all heads look [heads, T] at a piece, and the first and last frame at which this is right."""

    weights: Tensor
    first: float
    last: float


def made_of(share: Tensor, target: int, words: Sequence[Sequence[int]]) -> int | None:
    """The number of the word, in pieces, that most probably made a target; None where no word is sure."""
    found = torch.stack([share[target, list(pieces)].sum() if pieces else share.new_zeros(()) for pieces in words])
    best = int(found.argmax())
    return best if found[best] > 0 and found[best] >= SURE * found.sum() else None


def looks(model: Recognizer, english: Recognizer, share: Tensor, dev: Path) -> Iterator[Looked]:
    """Of every piece of the manifest's translations whose word is sure and has a known time."""
    decoder, end = model.heads["attention"], model.tokenizer.end
    assert isinstance(decoder, AttentionDecoder)
    assert end is not None
    every = [(layer, head) for layer in range(len(decoder.layers)) for head in range(decoder.heads)]
    ends, manifest = read_word_ends(), Manifest.read([dev])
    for one in map(manifest.__getitem__, range(len(manifest))):
        words, times = one.text.split(), ends.get(one.id, [])
        if len(words) != len(times) or one.translation is None:
            continue
        spelled = [english.tokenizer.encode(word.strip(".,!?\"'")) for word in words]
        sound = model.sound(load_sound(one, model.sample_rate))
        frames = model.listening(Frames(sound, torch.ones_like(sound, dtype=torch.bool)))
        tokens = torch.tensor([model.tokenizer.encode(one.translation)])
        lengths = torch.tensor([tokens.shape[1]])
        memory = Memory.of(frames, finished=True)
        seen = decoder.forced(decoder.start(memory), tokens, lengths, sos=end, eos=end, heads=every).alignment[0]
        for at, token in enumerate(tokens[0].tolist()):
            if (word := made_of(share, token, spelled)) is not None:
                begins = times[word - 1] if word else 0.0
                yield Looked(seen[:, at], (begins - NEAR_S) / model.frame_s, (times[word] + NEAR_S) / model.frame_s)


def right(found: Sequence[Looked], heads: Sequence[int]) -> float:
    """The share of pieces at which the mean of these heads is right."""
    peaks = [float(one.weights[list(heads)].mean(0).argmax()) for one in found]
    return sum(one.first <= peak <= one.last for one, peak in zip(found, peaks, strict=True)) / len(found)


@torch.inference_mode()
def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder")
    parser.add_argument("dev", type=Path, help="cuts of FOTAQ's dev part, with translations")
    parser.add_argument("train", nargs="+", help="cuts with translations")
    given = parser.parse_args()
    model, english = load_model(given.model), load_model("speechattn/en-tiny-stream")
    pairs = [pair for manifest in given.train for pair in pairs_of(manifest)]
    spelled = [(english.tokenizer.encode(a), model.tokenizer.encode(b)) for a, b in pairs]
    share = translated_by(spelled, (english.tokenizer.size, model.tokenizer.size)).to_dense()
    found = list(looks(model, english, share, given.dev))
    count = model.heads["attention"].heads
    each = [right(found, [head]) for head in range(len(found[0].weights))]
    print(f"{len(found)} pieces")
    for layer in range(len(each) // count):
        mine = range(layer * count, (layer + 1) * count)
        shares = " ".join(f"{100 * each[head]:5.1f}" for head in mine)
        print(f"layer {layer}: {shares}; together {100 * right(found, mine):.1f} %")
    best = sorted(range(len(each)), key=lambda head: -each[head])
    for n in (1, 2, 3, 4, 6, 8, 10):
        names = [[head // count, head % count] for head in sorted(best[:n])]
        print(f"best {n}: {100 * right(found, best[:n]):.1f} % {names}")


if __name__ == "__main__":
    main()
