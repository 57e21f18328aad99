"""Breaks the arithmetic of streams on purpose, one place at a time, and prints which breaks no law noticed.

    python tests/mutants.py

The first line of output is a run with nothing broken. Each mutant is a copy of the package with one text replaced.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1] / "speechattn"
MUTANTS = {
    "no delay onto the grid": ("stream/serial.py", "gap = -delay % (plan.block or 1)", "gap = 0"),
    "latency not rounded to the stride": (
        "stream/simple.py", "ceil(max(0, right - (stride - 1)) / stride) * stride", "max(0, right - (stride - 1))"),
    "validity read one frame late": (
        "stream/simple.py", "mask = z.mask[:, left : left", "mask = z.mask[:, left + 1 : left + 1"),
    "padding not masked behind the pointwise convolution": (
        "stream/simple.py", "Frames.finite(run(self.f, x.values), x.mask)", "Frames(run(self.f, x.values), x.mask)"),
    "left context one frame short": ("attention/pattern.py", "k >= begin - self.left", "k > begin - self.left"),
    "chunk one frame long": ("attention/pattern.py", "k < begin + self.chunk", "k <= begin + self.chunk"),
    "positions one frame off": (
        "attention/window.py", "range(-left - sinks, chunk + pattern.right)",
        "range(1 - left - sinks, chunk + pattern.right + 1)"),
    "distance with the wrong sign": (
        "attention/position.py", "range(queries.stop - 1 - keys.start, queries.start - keys.stop, -1)",
        "range(1 + keys.start - queries.stop, keys.stop - queries.start)"),
    "history without the waiting frames": ("attention/self_attention.py", "past.last(left + late)", "past.last(left)"),
    "a sink that is still in its window": (
        "attention/window.py", "places(which)[:, None] < begin", "places(which)[:, None] <= begin"),
    "NaN times zero": ("frames.py", "torch.where(wide, values, 0)", "values * wide"),
    "residual not delayed": (
        "stream/parallel.py", "Buffer.empty(y.values, late - member.delay)", "Buffer.empty(y.values, 0)"),
    "tail not flushed": (
        "stream/contract.py", "ceil((frames + plan.latency) / plan.block)", "ceil(frames / plan.block)"),
    "history declared one frame short": (
        "stream/contract.py", "* plan.block - plan.left", "* plan.block - plan.left + 1"),
    "room given away twice": ("stream/contract.py", 'vars(old).pop("spare", 0)', 'vars(old).get("spare", 0)'),
    "chunks filtered into each other": ("encoder/layers.py", "[0, 0, 0, side])", "[0, 0, 0, side]).roll(1, 1)"),
}  # fmt: skip


def check() -> None:
    """Laws on a few streams that between them use everything; raises where one is broken."""
    import speechattn.testing as laws
    from speechattn.attention import Relative, SelfAttention, Span
    from speechattn.encoder import Conformer
    from speechattn.encoder.layers import ChunkDepthwise, Depthwise
    from speechattn.stream import Serial

    torch.manual_seed(0)
    streams = [
        Conformer(8, 8, 1, 2, 12, span=Span(5, 4, 1), kernel=5, conv_right=1),
        Serial(Depthwise(8, 4, right=3, stride=3), SelfAttention(8, 2, Span(3, 4, 2), position=Relative(8, 2))),
        SelfAttention(8, 2, Span(3, 2, 0, 1, 2), position=Relative(8, 2)),
        SelfAttention(8, 2, Span(None, 3)),
        ChunkDepthwise(8, 3, Span(0, 4)),
    ]
    for stream in streams:
        for parameter in stream.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        laws.check_stream(stream, laws.random_frames([44, 13], 8))
        plan = stream.plan()
        frames = (plan.block or 1) * (16 + (2 * (plan.left or 30) + 5 * plan.latency) // (plan.block or 1))
        if not isinstance(stream, Conformer):  # whose activations may hide a frame
            assert laws.measure(stream, laws.random_frames([frames], 8)) == plan
    stream, x, other = streams[0], laws.random_frames([96], 8), laws.random_frames([96], 8, seed=1)
    with torch.no_grad():
        _, begun = stream.step(x[:16], stream.init_state(x))
        _, first = stream.step(x[16:32], begun)
        stream.step(other[16:32], begun)
        y, _ = stream.step(x[32:48], first)
        expected, _ = stream.step(x[:48], stream.init_state(x))
        assert torch.allclose(y.values, expected.values[:, 8:12])


def run(folder: Path) -> str:
    """What the copy of the package in `folder` breaks; nothing for an empty string."""
    for name in [name for name in sys.modules if name.split(".")[0] == "speechattn"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:90]
    finally:
        sys.path.pop(0)
    return ""


def main() -> None:
    """One line a mutant, `ALIVE` where nothing noticed."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    for name, (file, old, new) in {"nothing": ("frames.py", "", ""), **MUTANTS}.items():
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(PACKAGE, Path(folder) / "speechattn")
            path = Path(folder) / "speechattn" / file
            text = path.read_text(encoding="utf-8")
            if text.count(old) != 1 and old:
                raise SystemExit(f"{name}: {old!r} stands {text.count(old)} times in {file}")
            path.write_text(text.replace(old, new), encoding="utf-8")
            noticed = run(Path(folder))
        print(f"{'noticed' if noticed else 'ALIVE':<8} {name:<55} {noticed}", flush=True)


if __name__ == "__main__":
    main()
