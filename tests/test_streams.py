"""Every stream of the package obeys the laws."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from streams import BASES, CASES, MAKERS, D, lively

import speechattn
from speechattn.analysis.weights import StandIn
from speechattn.attention.based import Based, TaylorAttention
from speechattn.attention.duo import Divided, DuoAttention, Rolling
from speechattn.attention.echo import EchoAttention, Gated, Scale, Together
from speechattn.attention.gates import GatedSelfAttention
from speechattn.attention.linear import LightningAttention
from speechattn.attention.mega import Mega
from speechattn.attention.moba import MoBA
from speechattn.attention.prefill import FlexPrefill, SampleAttention
from speechattn.attention.quest import Quest
from speechattn.attention.sparse import SparseSelfAttention
from speechattn.audio.clip import AudioVisual
from speechattn.audio.lips import Grey, LipNet
from speechattn.audio.lips3d import Conv3d, LipResNet3D
from speechattn.audio.spectrum import CentredLogMel, KaldiFbank, LogMel
from speechattn.audio.waves import Conv1d, Mean, WaveResNet
from speechattn.decoder.ctc import CTC, SelfConditioned
from speechattn.decoder.letters import Letters, OwnTokens
from speechattn.encoder import (
    LabelEncoder,
    layers,
)  # fmt: skip
from speechattn.encoder.revising import Revising
from speechattn.encoder.senses import Altered, Dropped, Ears, Eyes, Fusion, Part, Senses, Sides, Unstack
from speechattn.frames import Frames
from speechattn.model.pruning import GatedEncoder, PrunedEncoder, SplitEncoder
from speechattn.multimodal.speech_llm import Pool
from speechattn.pretrained.espnet.legacy import Whole
from speechattn.pretrained.whisper import model as whisper
from speechattn.pretrained.whisper.features import FrontEnd
from speechattn.pretrained.whisper.streaming import Convolution, Floored, Flow, StreamingEncoder, Turning
from speechattn.stream import (
    Delay,
    Stream,
)  # fmt: skip
from speechattn.terms import Hearing
from speechattn.testing import (
    check_export,
    check_stream,
    measure,
    needed_delay,
    oracle,
    random_frames,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("precise")


# These import ESPnet or SimulEval itself.
OTHERS = ("__main__", "espnet.task", "espnet.encoders", "evaluators.simuleval", "evaluators.simulstream")


def subclasses(kind: type) -> set[type]:
    return {kind} | {inner for sub in kind.__subclasses__() for inner in subclasses(sub)}


def test_no_stream_is_forgotten() -> None:
    for module in pkgutil.walk_packages(speechattn.__path__, "speechattn."):
        if not module.name.endswith(OTHERS):
            importlib.import_module(module.name)
    mine = {kind for kind in subclasses(Stream) if kind.__module__.startswith("speechattn.")}
    assert mine - BASES == {*MAKERS, *ELSEWHERE}
    for kind, file in ELSEWHERE.items():
        assert kind.__name__ in (Path(__file__).parent / file).read_text(encoding="utf-8"), f"{kind} is not in {file}"


# Whisper's front-end is a CentredLogMel with its numbers; the first three are no streams that could be cut (and the
# length of what `Whole` gives depends on the data). `StandIn`
# answers for another stream in an analysis. The others have the laws, and an oracle, in a file of their own.
ELSEWHERE: dict[type, str] = {
    FrontEnd: "test_whisper.py", whisper.Encoder: "test_whisper.py", Whole: "test_espnet_model.py",
    StandIn: "test_streams.py", SparseSelfAttention: "test_entmax.py", GatedSelfAttention: "test_gates.py",
    DuoAttention: "test_duo.py", Rolling: "test_duo.py", Divided: "test_duo.py", GatedEncoder: "test_pruning.py",
    PrunedEncoder: "test_pruning.py", SplitEncoder: "test_pruning.py", LightningAttention: "test_linear_attention.py",
    TaylorAttention: "test_linear_attention.py", Based: "test_linear_attention.py", Mega: "test_mega.py",
    MoBA: "test_selection.py", Quest: "test_selection.py", SampleAttention: "test_prefill.py",
    FlexPrefill: "test_prefill.py", EchoAttention: "test_echo.py", Scale: "test_echo.py", Together: "test_echo.py",
    Gated: "test_echo.py", Convolution: "test_embedded.py", Flow: "test_embedded.py",
    StreamingEncoder: "test_embedded.py", Turning: "test_embedded.py", Floored: "test_embedded.py",
    Letters: "test_embedded.py", OwnTokens: "test_espnet_st.py", Revising: "test_revising.py", Hearing: "test_terms.py",
    Grey: "test_lips.py", LipNet: "test_lips.py", Conv1d: "test_lips.py", Mean: "test_lips.py",
    WaveResNet: "test_lips.py", Conv3d: "test_lips.py", LipResNet3D: "test_lips.py",
    AudioVisual: "test_audio_visual.py", Senses: "test_audio_visual.py",
    Part: "test_audio_visual.py", Dropped: "test_audio_visual.py", Sides: "test_audio_visual.py",
    Unstack: "test_audio_visual.py", Altered: "test_audio_visual.py", Ears: "test_audio_visual.py",
    Eyes: "test_audio_visual.py", Fusion: "test_audio_visual.py", Pool: "test_speech_llm.py",
}  # fmt: skip


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
