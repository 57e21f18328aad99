"""Word error rate of Whisper's own decoder over encoders that stream, on the test part of FOTAQ.

    python recipes/embedded/evaluate.py data/fotaq --chunks 32 --checkpoint runs/embedded/distil/checkpoints/last.ckpt

The rows: `teacher` hears each clip whole, as unmodified Whisper does. `mask CHUNK` is the same weights, which were not
trained for it, streamed in chunks; `student CHUNK` those of a checkpoint of `EncoderDistillation`. Streamed means: the
clip and 1.5 s of silence pass through `listening.step` in blocks of one chunk; the decoder then reads all frames and,
behind them, what Whisper's encoder says of silence. So the figures are of the encoder alone: no policy, no delay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from speechattn.attention import Span, set_span
from speechattn.audio.hearing import hear
from speechattn.audio.resample import Samples
from speechattn.data.fotaq import Line, read_split
from speechattn.frames import Frames, Memory
from speechattn.pretrained.whisper import WhisperModel, load
from speechattn.pretrained.whisper.streaming import front_end, streaming
from speechattn.score.wer import word_errors
from speechattn.stream import Stream, flush
from speechattn.task.checkpoint import weights_of

Listener = Callable[[Samples], Memory]


def whole(model: WhisperModel) -> Listener:
    """Unmodified: the encoder hears everything."""
    return lambda x: model.encode(hear(model.front_end, x), samples=len(x), finished=True)


@torch.inference_mode()
def streamed(stream: Stream, sound: Frames) -> Frames:
    """Frames [1, T, D] of samples [1, N], one block after the other."""
    plan, state, said = stream.plan(), stream.init_state(sound), list[Frames]()
    frames, sound = plan.outputs(sound.mask.shape[1]), flush(sound, stream)
    assert plan.block is not None
    for at in range(0, sound.mask.shape[1], plan.block):
        y, state = stream.step(sound[at : at + plan.block], state)
        said.append(y)
    return Frames.cat(said)[plan.delay : plan.delay + frames]


def chunked(model: WhisperModel, checkpoint: Path | None, span: Span) -> Listener:
    """The encoder as a stream; without a checkpoint with the weights that it has."""
    encoder = streaming(model.network)
    if checkpoint is not None:
        encoder.load_state_dict(weights_of(checkpoint))
    set_span(encoder.eval().requires_grad_(False), span)
    listening = encoder.listening(front_end(model.network.config.mels))

    def listen(x: Samples) -> Memory:
        sound = torch.from_numpy(np.pad(x, [0, round(model.pad_s * model.sample_rate)]))[None]
        return Memory.of(streamed(listening, Frames(sound, torch.ones_like(sound, dtype=torch.bool))), finished=True)

    return listen


def texts(model: WhisperModel, listen: Listener, lines: Sequence[Line], name: str) -> list[str]:
    """What the decoder makes of each clip."""
    said = []
    for line in tqdm(lines, desc=name, unit=" clips", disable=None):
        draft = model.draft(listen(soundfile.read(line.path, dtype="float32")[0]), [])
        said.append(model.tokenizer.decode(draft.tokens.tolist()))
    return said


def main() -> None:
    """Print a line for each encoder; with `--texts` write what was heard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="prepared corpus FOTAQ")
    parser.add_argument("--model", default="tiny.en", help="the Whisper that teaches and decodes")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="of the distillation; several")
    parser.add_argument("--chunks", type=int, nargs="*", default=[32], help="frames of 20 ms")
    parser.add_argument("--left", type=int, default=400, help="frames of 20 ms before each chunk")
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    parser.add_argument("--clips", type=int, help="so many, spread over the part; by default all")
    parser.add_argument("--only-checkpoints", action="store_true", help="neither the teacher nor the mask alone")
    parser.add_argument("--texts", type=Path, help="file of JSON lines: what each encoder made of each clip")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, lines = load(given.model), read_split(given.folder, given.split)
    if given.clips is not None:
        lines = [lines[i * len(lines) // given.clips] for i in range(min(given.clips, len(lines)))]
    encoders: dict[str, Listener] = {} if given.only_checkpoints else {"teacher": whole(model)}
    for chunk in given.chunks:
        span = Span.chunked(given.left, chunk)
        for path in given.checkpoint:
            encoders[f"student {chunk} ({path.name})"] = chunked(model, path, span)
        if not given.only_checkpoints:
            encoders[f"mask {chunk}"] = chunked(model, None, span)
    for name, listen in encoders.items():
        said = texts(model, listen, lines, name)
        print(f"{name}: {word_errors([line.text for line in lines], said)}", flush=True)
        if given.texts is not None:
            with given.texts.open("a", encoding="utf-8") as file:
                rows = (
                    {"id": line.name, "encoder": name, "text": text} for line, text in zip(lines, said, strict=True)
                )
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()
