"""A streaming recogniser made of a Whisper, as a model folder: what the joint training begins with, and its teacher.

    python recipes/embedded/student.py runs/embedded/student --encoder runs/embedded/distil/checkpoints/last.ckpt
    python recipes/embedded/student.py runs/embedded/teacher --whole

The vocabulary is cut to English: of the first `--tokens` entries of Whisper's, which stand in the order in which byte
pair encoding found them, those that spell words, numbers and punctuation. The decoder keeps its weights. What it finds
behind the sound, silence up to 30 s, becomes places of its own (`Resting`), a few for many frames; what it reads before
the text, an opening and a row of the table of positions. With `--whole` the encoder hears everything and has Whisper's
own weights. The head of letters is new.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechattn.model.folder import FORMAT, from_config, save_model
from speechattn.pretrained.whisper import Whisper, WhisperModel, load
from speechattn.pretrained.whisper.streaming import streaming
from speechattn.task.checkpoint import weights_of
from speechattn.text.pieces import BLANK, END, MARK, UNKNOWN, Pieces
from speechattn.text.tokenizer import Tokenizer

ENGLISH = re.compile(rf"{MARK}?([A-Za-zÀ-ÿ]+|[0-9]+|'[a-z]{{1,2}}|[.,!?;:'\"()&%$£€\-/]{{1,3}})?")


THIN = 15  # frames of silence for which one stands


def english(tokenizer: Tokenizer, most: int) -> Iterator[tuple[str, int]]:
    """Pieces and their numbers in Whisper's vocabulary, of its first `most`."""
    for i, spelled in enumerate(tokenizer.pieces[:most]):
        try:
            piece = spelled.decode()
        except UnicodeDecodeError:
            continue
        piece = piece.replace(" ", MARK)
        if piece and ENGLISH.fullmatch(piece):
            yield piece, i


def config(whisper: Whisper, vocab: int, *, left: int, chunk: int, revise: int, whole: bool) -> dict[str, Any]:
    """What `config.yaml` says; `left`, `chunk` and `revise` in frames of 20 ms."""
    sizes, dim = whisper.config, whisper.config.encoder_dim
    chunks = {"class_path": "speechattn.attention.Span", "init_args": {"left": left, "chunk": chunk + revise}}
    resting = {
        "class_path": "speechattn.cross.soft.Resting",
        "init_args": {"rest": sizes.audio_context // THIN, "weight": float(THIN), "key_bias": False},
    }
    here = "speechattn.pretrained.whisper"
    parts = {
        "mel": {"class_path": f"{here}.features.FrontEnd", "init_args": {"mels": sizes.mels}},
        "level": {"class_path": f"{here}.streaming.Floored"},
    }
    return {
        "format": FORMAT,
        "sample_rate": 16000,
        "language": "en",
        "front_end": {"class_path": "speechattn.stream.Serial.of", "init_args": {"members": parts}},
        "encoder": {
            "class_path": f"{here}.streaming.StreamingEncoder",
            "init_args": {
                "mels": sizes.mels, "dim": dim, "depth": sizes.encoder_layers, "heads": sizes.encoder_heads,
                "span": {"class_path": "speechattn.attention.Span.full"} if whole else chunks,
                **({} if whole else {"revise": revise}),
            },
        },
        "heads": {
            "attention": {
                "class_path": "speechattn.decoder.attention.AttentionDecoder",
                "init_args": {
                    "vocab": vocab, "context": sizes.text_context, "opening": 1, "dim": dim,
                    "heads": sizes.decoder_heads, "depth": sizes.decoder_layers,
                    "alignment_heads": [list(head) for head in sizes.alignment_heads],
                    "cross": resting,
                },
            },
            "letters": {"class_path": "speechattn.decoder.letters.Letters", "init_args": {"dim": dim}},
        },
    }  # fmt: skip


def decoder_weights(model: WhisperModel, kept: list[int]) -> dict[str, Tensor]:
    """Of Whisper's decoder, for the pieces `kept` between <blank>, <unk> and the end."""
    decoder, names = model.network.decoder, model.tokenizer
    said = dict(decoder.state_dict())
    table, end = said["embed.weight"], names.end_of_text
    start, untimed = names.id("<|startoftranscript|>"), names.id("<|notimestamps|>")
    unused = table[kept].mean(0, keepdim=True).expand(2, -1)
    positions = said["positions"].clone()
    positions[1] += table[untimed] - table[end]  # the token that begins a text is the one that ends it
    said |= {
        "embed.weight": torch.cat([unused, table[kept], table[end][None]]),
        "positions": positions,
        "opening": table[start][None],
    }
    for i, silence in enumerate(model.network.silence().cross):
        said[f"layers.{i}.cross.rest_key"] = silence.key[0, :, THIN // 2 :: THIN]
        said[f"layers.{i}.cross.rest_value"] = silence.value[0, :, THIN // 2 :: THIN]
    return said


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write")
    parser.add_argument("--model", default="tiny.en", help="the Whisper; one that knows English only")
    parser.add_argument("--encoder", type=Path, help="checkpoint of `EncoderDistillation`")
    parser.add_argument("--tokens", type=int, default=32_768, help="of Whisper's vocabulary")
    parser.add_argument("--left", type=int, default=400, help="frames of 20 ms before each chunk")
    parser.add_argument("--chunk", type=int, default=32, help="frames of 20 ms")
    parser.add_argument("--revise", type=int, default=16, help="of these, read again with the next chunk")
    parser.add_argument("--whole", action="store_true", help="the encoder hears everything")
    given = parser.parse_args()
    model = load(given.model)
    found = dict(english(model.tokenizer, given.tokens))
    tokenizer = Pieces([BLANK, UNKNOWN, *found, END], ranked=True)
    said = config(model.network, tokenizer.size, left=given.left, chunk=given.chunk, revise=given.revise,
                  whole=given.whole)  # fmt: skip
    torch.manual_seed(0)
    made = from_config(said, tokenizer)
    encoder = streaming(model.network).state_dict()
    if given.encoder is not None:
        encoder = weights_of(given.encoder)
    made.encoder.load_state_dict(encoder)
    made.heads["attention"].load_state_dict(decoder_weights(model, [*found.values()]))
    save_model(made, given.folder)
    size = sum(file.stat().st_size for file in given.folder.iterdir())
    print(f"{given.folder}: {tokenizer.size} tokens, {sum(p.numel() for p in made.parameters()):,} parameters, "
          f"{size / 1e6:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
