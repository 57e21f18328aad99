"""A training step beside ESPnet's model of the same size, and the time that training waits for data; all in one run.

    make bench-train           # the figures that are quoted (about 15 minutes, two threads)
    python benchmarks/train.py --quick

Conformer of 12 layers of 256 features, 4 heads, feed-forwards of 2048, kernel 15, relative positions; CTC (0.3) and an
attention decoder of 6 layers (0.7, label smoothing 0.1); 500 tokens; dropout 0.1. A step is gradients to zero, forward
from log-mel features, backward, clipping, AdamW; the batch is 60 s in six utterances of 8 to 12 s, 4 tokens a second.
The two sides take turns, in the same process and on the same batch. Random features and tokens: only time is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import soundfile
import torch
from report import Report
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from speechattn.attention import Span
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.ctc import CTC
from speechattn.decoder.predictor import TransformerPredictor
from speechattn.decoder.transducer import Joint, Transducer
from speechattn.encoder import Conformer, Transformer
from speechattn.frames import Frames, Memory
from speechattn.task.command import keep_memory

DIM, HEADS, INNER, KERNEL, VOCAB, DROPOUT = 256, 4, 2048, 15, 500, 0.1
END = VOCAB - 1
CHUNKED = Span(64, 16)
SECONDS = (12.0, 11.0, 10.5, 9.5, 9.0, 8.0)
TOKENIZER = Path(__file__).parents[1] / "recipes" / "digits"
Features = tuple[Tensor, Tensor, Tensor, Tensor]  # log-mel [B, T, 80], frames [B], tokens [B, U], tokens [B]


class Hybrid(nn.Module):
    """Ours: CTC and attention over a Conformer."""

    def __init__(self, depth: int, span: Span) -> None:
        super().__init__()
        right = KERNEL // 2 if span.chunk is None else None  # centred, or centred inside the chunk
        self.encoder = Conformer(
            80, DIM, depth, HEADS, INNER, span=span, kernel=KERNEL, conv_right=right, dropout=DROPOUT
        )
        self.ctc = CTC(DIM, VOCAB)
        self.attention = AttentionDecoder.usual(VOCAB, DIM, HEADS, max(1, depth // 2), INNER, dropout=DROPOUT)

    def forward(self, x: Tensor, frames: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The loss."""
        y = self.encoder(Frames.from_lengths(x, frames))
        ctc = self.ctc.loss(y, tokens, lengths)
        return 0.3 * ctc + 0.7 * self.attention.loss(Memory.of(y, finished=True), tokens, lengths, sos=END, eos=END)


class TransformerTransducer(nn.Module):
    """Ours: a Transformer over stacked features, a label encoder of two layers, the exact loss."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.encoder = Transformer(80, DIM, depth, HEADS, INNER, span=CHUNKED, dropout=DROPOUT, stack=8, stride=4)
        predictor = TransformerPredictor(VOCAB, DIM, 2, HEADS, INNER, dropout=DROPOUT)
        self.head = Transducer(predictor, Joint(DIM, DIM, DIM, VOCAB))

    def forward(self, x: Tensor, frames: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The loss."""
        losses: Tensor = self.head.loss(self.encoder(Frames.from_lengths(x, frames)), tokens, lengths)
        return losses.mean()


def espnet(depth: int, *, block: bool) -> nn.Module:
    """ESPnet's model for the same loss: over its Conformer, or its contextual-block Conformer, which streams."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from espnet2.asr.ctc import CTC as Head
        from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
        from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
        from espnet2.asr.encoder.contextual_block_conformer_encoder import ContextualBlockConformerEncoder
        from espnet2.asr.espnet_model import ESPnetASRModel

    same = {"macaron_style": True, "cnn_module_kernel": KERNEL, "dropout_rate": DROPOUT}
    if block:
        encoder = ContextualBlockConformerEncoder(
            80, DIM, HEADS, INNER, depth, block_size=40, hop_size=16, look_ahead=16, **same
        )
    else:
        encoder = ConformerEncoder(80, DIM, HEADS, INNER, depth, rel_pos_type="latest", **same)
    decoder = TransformerDecoder(VOCAB, DIM, HEADS, INNER, max(1, depth // 2), dropout_rate=DROPOUT)
    names = ["<blank>", *(f"t{i}" for i in range(1, END)), "<sos/eos>"]
    return ESPnetASRModel(
        VOCAB, names, None, None, None, None, encoder, None, decoder, Head(VOCAB, DIM), None,
        ctc_weight=0.3, lsm_weight=0.1, report_cer=False, report_wer=False,
    )  # fmt: skip


def features(scale: float) -> Features:
    """One batch."""
    frames = torch.tensor([int(100 * s * scale) for s in SECONDS])
    lengths = torch.tensor([int(4 * s * scale) for s in SECONDS])
    return (
        torch.randn(len(frames), int(frames.max()), 80), frames,
        torch.randint(1, END, (len(frames), int(lengths.max()))), lengths,
    )  # fmt: skip


@dataclass
class Side:
    """A model in training; each call is a step."""

    model: nn.Module
    batch: Features
    half: bool = False  # bfloat16 by autocast
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)

    @property
    def size(self) -> float:
        """Millions of parameters."""
        return sum(p.numel() for p in self.model.parameters()) / 1e6

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            found = self.model(*(x.clone() for x in self.batch))  # ESPnet writes into its texts
        loss = found[0] if isinstance(found, tuple) else found
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        assert loss.isfinite(), "a step that learns nothing measures nothing"


def turns(sides: dict[str, Side], times: int) -> None:
    """Seconds of each, in turn after one step to warm up: on the wall, and of the processor."""
    for side in sides.values():
        side.wall, side.processor = [], []
    for turn in range(times + 1):
        for side in sides.values():
            wall, processor = time.perf_counter(), time.process_time()
            side()
            if turn:
                side.wall.append(time.perf_counter() - wall)
                side.processor.append(time.process_time() - processor)


def compared(
    report: Report, name: str, ours: Side, theirs: Side, what: str, ok: Callable[[float], bool] | None = None
) -> None:
    """Both, and how much longer theirs takes: the median of the ratios of neighbours."""
    for who, side in (("ours", ours), ("espnet", theirs)):
        note = f"{side.size:.1f} M parameters, {median(side.processor):.2f} s of the processor; {what}"
        report.row(f"{name}_{who}", median(side.wall), "s", note)
    ratio = median(b / a for a, b in zip(ours.wall, theirs.wall, strict=True))
    spent = median(b / a for a, b in zip(ours.processor, theirs.processor, strict=True))
    note = f"same run, {len(ours.wall)} turns; by time of the processor {spent:.2f}"
    report.row(f"{name}_espnet_over_ours", ratio, "x", note, "at least 1.3" if ok else "", ok)


def steps(report: Report, depth: int, scale: float, times: int) -> None:
    """Whole utterances and chunks; with memory that goes back to the system after each step, and with memory kept."""
    batch = features(scale)
    whole = {"ours": Side(Hybrid(depth, Span.full()), batch), "espnet": Side(espnet(depth, block=False), batch)}
    chunks = {"ours": Side(Hybrid(depth, CHUNKED), batch), "espnet": Side(espnet(depth, block=True), batch)}
    turns(whole, times)
    compared(report, "step", *whole.values(), "every frame sees every frame", lambda v: v >= 1.3)
    turns(chunks, max(1, times // 2))
    compared(report, "streaming_step", *chunks.values(), "ours: chunks of 16 and 64 before; ESPnet: blocks of 40")
    where(report, whole["ours"])
    transducer = {"": Side(TransformerTransducer(depth), batch)}
    turns(transducer, max(1, times // 2))
    for side in transducer.values():
        report.row("transducer_step", median(side.wall), "s", f"{side.size:.1f} M, exact loss by torchaudio's kernel")
    for side in whole.values():
        side.half = True
    turns(whole, max(1, times // 2))
    compared(report, "bfloat16_step", *whole.values(), "the same under torch.autocast")
    for side in whole.values():
        side.half = False
    if keep_memory():
        turns(whole, times)
        compared(report, "kept_memory_step", *whole.values(), "malloc keeps what is freed")


def where(report: Report, side: Side) -> None:
    """Where a step's time goes."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        side()
    rows = found.key_averages()
    total = sum(row.self_cpu_time_total for row in rows)
    for row in sorted(rows, key=lambda row: -row.self_cpu_time_total)[:6]:
        name = row.key.rpartition("::")[2].strip("_")
        report.row(f"profile_{name}", 100 * row.self_cpu_time_total / total, "%", f"of our step, {row.count} calls")


def manifest(folder: Path, count: int, scale: float) -> Path:
    """Synthetic sound (noise), FLAC of 16 kHz, in the lengths of the batch; texts of digits."""
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        name, n = f"u{i}", int(16000 * SECONDS[i % len(SECONDS)] * scale)
        soundfile.write(folder / f"{name}.flac", 0.1 * rng.standard_normal(n), 16000)
        text = " ".join(rng.choice(["one", "two", "three", "four"], max(1, n // 20000)))
        source = {"type": "file", "channels": [0], "source": f"{name}.flac"}
        whole = {"id": name, "start": 0, "duration": n / 16000, "channel": 0}
        rows.append({
            **whole, "type": "MonoCut", "supervisions": [{**whole, "recording_id": name, "text": text}],
            "recording": {"id": name, "sources": [source], "sampling_rate": 16000, "num_samples": n,
                          "duration": n / 16000, "channel_ids": [0]},
        })  # fmt: skip
    path = folder / "noise_cuts_train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def waiting(report: Report, depth: int, scale: float, count: int) -> None:
    """A training of the same model from FLAC files, with speed perturbation and noise, as `speechattn fit` runs it."""
    from lightning.pytorch import Trainer

    from speechattn.audio.spectrum import LogMel
    from speechattn.data.augment import ColouredNoise, Speed
    from speechattn.data.corpus import Corpus
    from speechattn.data.waiting import Waiting
    from speechattn.task.objectives import AttentionObjective, CTCObjective
    from speechattn.task.recognizer import Recognizer

    hybrid = Hybrid(depth, CHUNKED)
    tokens = len((TOKENIZER / "tokens.txt").read_text(encoding="utf-8").splitlines())
    heads = {
        "ctc": CTC(DIM, tokens),
        "attention": AttentionDecoder.usual(tokens, DIM, HEADS, max(1, depth // 2), INNER, dropout=DROPOUT),
    }
    task = Recognizer(
        LogMel(mels=80), hybrid.encoder, heads, str(TOKENIZER),
        objectives=[CTCObjective(0.3), AttentionObjective(0.7)],
    )  # fmt: skip
    watch = Waiting(steps=count)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = Corpus(
            [manifest(Path(folder), 60, scale)],
            max_seconds=72.0 * scale,
            longest_s=14.0 * scale,
            augment=[Speed(), ColouredNoise()],
            workers=2,
        )
        Trainer(
            accelerator="cpu", devices=1, max_steps=count + 2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[watch],
        ).fit(task, datamodule=data)  # fmt: skip
    step = sum(a + b for a, b in watch.times) / len(watch.times)
    note = f"{len(watch.times)} steps of {step:.2f} s after two to begin; 2 workers, FLAC, speed, coloured noise"
    report.row("waiting_for_data", 100 * watch.share, "%", note, "below 5", lambda v: v < 5)


def main() -> None:
    """Run everything; `--quick` takes a small model and short utterances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute, for development")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=r".*torch\.cuda\.amp\.autocast")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    report, depth, scale = Report(), 2 if args.quick else 12, 0.2 if args.quick else 1.0
    waiting(report, depth, scale, 3 if args.quick else 20)
    steps(report, depth, scale, 2 if args.quick else 8)
    report.print()


if __name__ == "__main__":
    main()
