"""Every stream of the package obeys the laws."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import pytest
import torch
from streams import BASES, CASES, MAKERS, D, lively

import speechattn
from speechattn.audio.spectrum import CentredLogMel, KaldiFbank, LogMel
from speechattn.decoder.ctc import CTC, SelfConditioned
from speechattn.encoder import (
    LabelEncoder,
    layers,
)  # fmt: skip
from speechattn.frames import Frames
from speechattn.pretrained.espnet.legacy import Whole
from speechattn.pretrained.whisper import model as whisper
from speechattn.pretrained.whisper.features import FrontEnd
from speechattn.stream import (
    Delay,
    Stream,
)  # fmt: skip
from speechattn.testing import (
    check_export,
    check_stream,
    measure,
    needed_delay,
    oracle,
    random_frames,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("precise")


def subclasses(kind: type) -> set[type]:
    return {kind} | {inner for sub in kind.__subclasses__() for inner in subclasses(sub)}


def test_no_stream_is_forgotten() -> None:
    for module in pkgutil.walk_packages(speechattn.__path__, "speechattn."):
        if not module.name.endswith(("__main__", "espnet.task", "espnet.encoders")):  # these import ESPnet itself
            importlib.import_module(module.name)
    mine = {kind for kind in subclasses(Stream) if kind.__module__.startswith("speechattn.")}
    assert mine - BASES - ELSEWHERE == set(MAKERS)


# Whisper's front-end is a CentredLogMel with its numbers; the two others are checked beside their models, because they
# are no stream that could be cut (and the length of what `Whole` gives depends on the data).
ELSEWHERE = {FrontEnd, whisper.Encoder, Whole}


@oracle.register
def posterior(stream: CTC, x: Frames) -> Frames:
    """Scores less the logarithm of the sum of their exponentials, frame by frame."""
    scores = x.values.where(x.mask[..., None], 0.0) @ stream.head.weight.T + stream.head.bias
    return Frames.of(scores - scores.exp().sum(-1, keepdim=True).log(), x.mask)


@oracle.register
def conditioned(stream: SelfConditioned, x: Frames) -> Frames:
    """The frames, and what the posteriors of their normalised selves are projected to."""
    values, norm = x.values.where(x.mask[..., None], 0.0), stream.inner.norm
    centred = values - values.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    posteriors = posterior(stream.inner.ctc, Frames(normal, x.mask)).values.exp()
    return Frames.of(values + posteriors @ stream.project.weight.T + stream.project.bias, x.mask)


@oracle.register
def mirrored(stream: CentredLogMel, x: Frames) -> Frames:
    """Each row with its mirror image in front and zeros behind."""
    side, hop = stream.kernel - 1 - stream.right, stream.block or 1
    outs, rows = -(-x.mask.shape[1] // hop), []
    for values, length in zip(x.values, x.lengths.tolist(), strict=True):
        row = values[:length]
        image = torch.stack([row[i] if i < length else row.new_zeros(()) for i in range(side, 0, -1)])
        row = torch.cat([image, row, row.new_zeros(stream.kernel + outs * hop)])
        rows.append(stream.windows(row[None])[0, :outs])
    return Frames.of(torch.stack(rows), x.mask[:, ::hop])


def features(stream: Stream) -> tuple[tuple[int, ...], int | None]:
    """Shape of one frame of its input, and the vocabulary if it reads labels."""
    if isinstance(stream, LogMel | KaldiFbank):
        return (), None
    if isinstance(stream, LabelEncoder):
        return (), 7
    for part in stream.modules():
        if isinstance(part, layers.Conv2d):
            linear = [m for m in stream.modules() if isinstance(m, layers.Subsample)]
            return ({2: 8, 4: 8, 6: 11, 8: 15}[int(1 / linear[0].ratio)] if linear else 8,), None
    return (D,), None


@pytest.mark.parametrize("make", CASES)
def test_laws(make: Callable[[], Stream]) -> None:
    stream = lively(make())
    shape, vocab = features(stream)
    check_stream(stream, random_frames([26, 0, 19], *shape, vocab=vocab), seed=1)


@pytest.mark.parametrize("make", CASES)
def test_every_step_is_exported(make: Callable[[], Stream]) -> None:
    stream = lively(make())
    shape, vocab = features(stream)
    block = stream.plan().block or 9
    check_export(stream, random_frames([3 * block, 2 * block], *shape, vocab=vocab))


@pytest.mark.parametrize("make", CASES)
def test_declared_numbers_are_the_measured_ones(make: Callable[[], Stream]) -> None:
    stream = lively(make())
    plan = stream.plan()
    if plan.block is None or not list(stream.children()):
        return
    shape, vocab = features(stream)
    frames = plan.block * (16 + (2 * (plan.left or 30) + 5 * plan.latency) // plan.block)
    x = random_frames([frames], *shape, vocab=vocab)
    assert measure(stream, x) == plan
    least = needed_delay(stream, x)
    parts = [part for part in stream.modules() if isinstance(part, Stream) and part.plan().latency]
    assert least == plan.delay if len(parts) <= 1 and type(stream) is not Delay else least <= plan.delay
