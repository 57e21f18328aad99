"""Streaming encoders: time and memory of a step, of hours, of training, beside their peers, all in one run.

    make bench-encoder         # the figures that are quoted (about 7 minutes, one thread)
    python benchmarks/encoder.py --quick

12 layers of 256 features, 4 heads, feed-forward of 2048, frames of 40 ms in chunks of 16 (640 ms), 64 frames of left
context, random weights. Peers: torchaudio's Emformer and ESPnet's contextual-block Conformer, whose steps alternate
with ours in the same process. A step of N streams is one batch of N rows; its "matrix multiplications alone" are the
same multiplications (shapes, type, as many different weights) and nothing else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median

import torch
from report import Report
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from speechattn import tree
from speechattn.attention import Relative, Rotary, SelfAttention, Span
from speechattn.encoder import Conformer, Encoder, Transformer
from speechattn.frames import Frames
from speechattn.linear import product
from speechattn.stream import Pointwise

DIM, HEADS, INNER, DEPTH, CHUNK, LEFT = 256, 4, 2048, 12, 16, 64
SPAN = Span(LEFT, CHUNK)
CHUNK_S = CHUNK * 0.04
Step = Callable[[], object]


def transformer() -> Encoder:
    """The Transformer-Transducer's encoder over frames that are there, as the peer's."""
    front = Pointwise(nn.Identity())
    return Transformer(DIM, DIM, DEPTH, HEADS, INNER, span=SPAN, subsample=front).eval()


def conformer(*, macaron: bool = False, frames: bool = False) -> Encoder:
    """The Conformer over log-mel, or over `frames` that are there."""
    front = Pointwise(nn.Identity()) if frames else None
    return Conformer(80, DIM, DEPTH, HEADS, INNER, span=SPAN, kernel=31, macaron=macaron, subsample=front).eval()


def millions(module: nn.Module) -> float:
    """Parameters."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def features(encoder: Encoder, batch: int, dtype: torch.dtype = torch.float32) -> Frames:
    """One chunk of input."""
    size = 80 if encoder.ratio == Fraction(1, 4) else DIM
    return Frames(
        torch.randn(batch, int(CHUNK / encoder.ratio), size).to(dtype),
        torch.ones(batch, int(CHUNK / encoder.ratio), dtype=torch.bool),
    )


class Live:
    """A stream that has run for a while; each call is the next step."""

    def __init__(self, encoder: Encoder, batch: int = 1, dtype: torch.dtype = torch.float32) -> None:
        self.encoder, self.x = encoder, features(encoder, batch, dtype)
        self.state = encoder.init_state(self.x)

    def __call__(self) -> Tensor:
        y, self.state = self.encoder.step(self.x, self.state)
        return y.values


def emformer() -> tuple[Step, float]:
    """torchaudio's Emformer: one chunk of 16 frames, 64 of left context."""
    from torchaudio.models import Emformer

    model = Emformer(DIM, HEADS, INNER, DEPTH, CHUNK, left_context_length=LEFT, right_context_length=0).eval()
    x, lengths, states = torch.randn(1, CHUNK, DIM), torch.tensor([CHUNK]), [None]

    def step() -> Tensor:
        y, _, states[0] = model.infer(x, lengths, states[0])
        return y

    return step, millions(model)


def contextual_block() -> tuple[Step, float]:
    """ESPnet's contextual-block Conformer: hops of 16 frames in blocks of 40, 16 of them look-ahead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from espnet2.asr.encoder.contextual_block_conformer_encoder import ContextualBlockConformerEncoder

    model = ContextualBlockConformerEncoder(
        80, DIM, HEADS, INNER, DEPTH, block_size=40, hop_size=CHUNK, look_ahead=16, macaron_style=False
    ).eval()
    x, states = torch.randn(1, 4 * CHUNK, 80), [None]

    def step() -> Tensor:
        y, _, states[0] = model.forward_infer(x, torch.tensor([4 * CHUNK]), states[0], is_final=False)
        return y

    while not step().shape[1]:  # it says nothing until it has a block
        pass
    return step, millions(model)


def alternate(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turn after a warm-up."""
    for step in steps.values():
        for _ in range(8):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    return {name: 1e3 * median(taken) for name, taken in times.items()}


class Multiplications(TorchDispatchMode):
    """Writes down the matrix multiplications of what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[Tensor]]] = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = f.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise"):
            self.seen.append((name, [x for x in args if isinstance(x, Tensor)]))
        elif "scaled_dot_product" in name:
            q, k, v = args[:3]
            self.seen += [("qk", [q, k]), ("qk", [torch.empty(*q.shape[:3], k.shape[2], dtype=q.dtype), v.mT])]
        elif name in ("linear", "matmul"):
            raise RuntimeError(f"{name} was not taken apart")
        return f(*args, **(kwargs or {}))


def multiplications(live: Live) -> Step:
    """The matrix multiplications of a step, alone: same shapes and type, the weights themselves."""
    with Multiplications() as found:
        live()
    rows: list[tuple[Callable[..., Tensor], list[Tensor]]] = []
    for name, inputs in found.seen:
        fresh = [x if x.dim() == 2 and x.shape[0] in (DIM, INNER) else torch.randn_like(x) for x in inputs]
        if name == "qk":
            q, k = (x.flatten(0, 1).contiguous() for x in fresh)
            rows.append((torch.bmm, [q, k.mT]))
        elif name == "_linear_pointwise":
            rows.append((partial(product, activation="none"), fresh))
        else:
            rows.append((getattr(torch, name), fresh))

    def run() -> None:
        for f, inputs in rows:
            f(*inputs)

    return run


def steps(report: Report, repeats: int) -> None:
    """One live stream, beside the peers."""
    ours, theirs = {"transformer": transformer()}, {}
    ours |= {"conformer": conformer(), "conformer_macaron": conformer(macaron=True)}
    theirs["emformer"], emformer_size = emformer()
    theirs["contextual_block"], block_size = contextual_block()
    found = alternate({**{name: Live(encoder) for name, encoder in ours.items()}, **theirs}, repeats)
    note = f"a step of 640 ms, batch 1, float32, median of {repeats}"
    report.row("emformer_step", found["emformer"], "ms", f"torchaudio, {emformer_size:.1f} M parameters; {note}")
    report.row("contextual_block_step", found["contextual_block"], "ms", f"ESPnet, {block_size:.1f} M; {note}")
    for name, encoder in ours.items():
        report.row(f"{name}_step", found[name], "ms", f"{millions(encoder):.1f} M; {note}")
    report.row("transformer_over_emformer", found["transformer"] / found["emformer"], "x", "same run", "at most 1.0",
               lambda v: v <= 1.0)  # fmt: skip
    for name in ("conformer", "conformer_macaron"):
        goal = ("at most 0.6", lambda v: v <= 0.6) if name == "conformer" else ("", None)
        report.row(f"{name}_over_contextual_block", found[name] / found["contextual_block"], "x", "same run", *goal)


def batches(report: Report, repeats: int) -> None:
    """Many live streams in one batch."""
    types = [torch.float32]
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        types.append(torch.bfloat16)
    for name, make in (("transformer", transformer), ("conformer", lambda: conformer(frames=True))):
        for dtype in types:
            encoder, short = make().to(dtype), str(dtype).removeprefix("torch.")
            for batch in (1, 4, 16, 64):
                live = Live(encoder, batch, dtype)
                live()
                turns = max(5, repeats // (1 + batch // 4))
                found = alternate({"step": live, "alone": multiplications(live)}, turns)
                report.row(f"{name}_{short}_streams_per_core_{batch}", 1e3 * CHUNK_S * batch / found["step"], "",
                           f"640 ms / step time per stream; a step of {batch}: {found['step']:.1f} ms")  # fmt: skip
                if batch == 16:
                    report.row(f"{name}_{short}_over_matmuls_16", found["step"] / found["alone"], "x",
                               f"a step of 16 streams over its multiplications alone ({found['alone']:.1f} ms)",
                               "at most 1.4", lambda v: v <= 1.4)  # fmt: skip
        report.row(f"{name}_alone_in_batch", apart(make()), "", "largest difference of a stream alone and among 16, "
                   "relative, float32", "below 1e-4", lambda v: v < 1e-4)  # fmt: skip


def apart(encoder: Encoder) -> float:
    """Streams in a batch and alone, over ten steps: the largest difference over the largest value."""
    states = encoder.init_state(features(encoder, 16))
    alone = tree.split(states)
    worst, largest = 0.0, 0.0
    for _ in range(10):
        x = features(encoder, 16)
        y, states = encoder.step(x, states)
        for row in (0, 7, 15):
            z, alone[row] = encoder.step(Frames(x.values[row : row + 1], x.mask[row : row + 1]), alone[row])
            worst = max(worst, (z.values[0] - y.values[row]).abs().max().item())
        largest = max(largest, y.values.abs().max().item())
        assert y.values.isfinite().all(), "a figure of NaN would look like equality"
    return worst / largest


def hour(report: Report, minutes: int, repeats: int) -> None:
    """A stream that has run for an hour beside one that has run for two minutes: time of a step, and state."""
    for name, encoder in (("transformer", transformer()), ("conformer", conformer(frames=True))):
        young, old = Live(encoder), Live(encoder)
        for live, length in ((young, 2), (old, minutes)):
            for _ in range(int(length * 60 / CHUNK_S)):
                live()
        found = alternate({"young": young, "old": old}, repeats)
        last, ratio, sizes = f"minute_{minutes}", found["old"] / found["young"], [held(x.state) for x in (young, old)]
        report.row(f"{name}_step_minute_2", found["young"], "ms", f"median of {repeats}, in turn with the next")
        report.row(f"{name}_step_{last}", found["old"], "ms", "")
        report.row(f"{name}_{last}_over_2", ratio, "x", "", "equal within noise", lambda v: 0.95 < v < 1.05)
        report.row(f"{name}_state_minute_2", sizes[0] / 1e6, "MB", "of memory, spare room included")
        report.row(f"{name}_state_{last}", sizes[1] / 1e6, "MB", "", "equal", lambda v, same=sizes[0]: v == same / 1e6)


def held(state: object) -> int:
    """Bytes of memory that a state keeps, spare room included."""
    return sum({leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
                for leaf in tree.leaves(state)}.values())  # fmt: skip


def whole(minutes: int) -> tuple[float, float]:
    """Seconds and MB of memory that `forward` takes for so many minutes of log-mel; in a process of its own."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    encoder, frames = conformer(), minutes * 6000
    x = Frames(torch.randn(1, frames, 80), torch.ones(1, frames, dtype=torch.bool))
    began = time.perf_counter()
    encoder(x)
    taken = time.perf_counter() - began
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return taken, int(peak.split()[1]) / 1024  # of this program alone: ru_maxrss knows its parent's too


def long(report: Report, minutes: tuple[int, ...]) -> None:
    """One utterance of many minutes through `forward`."""
    found = {}
    for length in minutes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[length] = pool.apply(whole, (length,))
        note = f"Conformer over log-mel; {found[length][1]:.0f} MB"
        report.row(f"forward_{length}_min", found[length][0], "s", note)
    first, last = minutes[0], minutes[-1]
    growth = found[last][0] / found[first][0] / (last / first)
    report.row("forward_linear", growth, "x", f"seconds per minute at {last} over those at {first} min",
               "linear (<= 1.1)", lambda v: v <= 1.1)  # fmt: skip
    report.row(f"forward_{last}_min_memory", found[last][1] / 1000, "GB", "peak of the process, torch included",
               "under 2 GB", lambda v: v < 2)  # fmt: skip


def training(report: Report, frames: int, repeats: int) -> None:
    """Forward and backward of one attention layer, and of the whole encoder, by windows and with a dense mask."""
    x = torch.randn(1, frames, DIM)
    mask = torch.ones(1, frames, dtype=torch.bool)

    def passes(module: nn.Module) -> Step:
        def run() -> None:
            leaf = x.clone().requires_grad_()
            module(Frames(leaf, mask)).values.square().mean().backward()

        return run

    for kind in (Relative, Rotary):
        layers = {
            name: SelfAttention(DIM, HEADS, SPAN, position=kind(DIM, HEADS), backend=name)
            for name in ("window", "fused", "reference")
        }
        found = alternate({name: passes(layer) for name, layer in layers.items()}, repeats)
        dense = min(found["fused"], found["reference"])
        goal = ("at least 4", lambda v: v >= 4) if kind is Relative else ("", None)
        report.row(f"attention_{kind.__name__.lower()}_dense_over_window", dense / found["window"], "x",
                   f"forward and backward, T = {frames}: {found['window']:.0f} ms; dense {found['fused']:.0f} (fused), "
                   f"{found['reference']:.0f} (reference); the faster one counts", *goal)  # fmt: skip
    encoders = {name: conformer(frames=True).train() for name in ("window", "fused")}
    for name, encoder in encoders.items():
        for module in encoder.modules():
            if isinstance(module, SelfAttention):
                module.backend = name
    found = {}
    for name, encoder in encoders.items():
        run = passes(encoder)
        run()
        taken = []
        for _ in range(2):
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
        found[name] = min(taken)
    report.row(
        "training_step_window", found["window"], "s", f"Conformer, 12 layers, forward and backward, T = {frames}"
    )
    report.row("training_step_dense_over_window", found["fused"] / found["window"], "x", "whole step")


def main() -> None:
    """Run everything; `--quick` repeats less and takes shorter utterances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute, for development")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = Report()
    with torch.no_grad():
        steps(report, 10 if quick else 100)
        batches(report, 5 if quick else 60)
        hour(report, 3 if quick else 60, 20 if quick else 300)
    long(report, (1, 2) if quick else (5, 15, 60))
    training(report, 500 if quick else 2000, 2 if quick else 5)
    report.print()


if __name__ == "__main__":
    main()
