"""Sound and lips in one model: the clock, the senses, what is missing."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from torch import Tensor, nn

from speechattn.attention import Span
from speechattn.audio.augment import SpecAugment
from speechattn.audio.clip import EVERY, AudioVisual, Clip
from speechattn.audio.lips import Grey, LipAugment, LipNet
from speechattn.audio.spectrum import LogMel
from speechattn.encoder import Conformer, EBranchformer
from speechattn.encoder.layers import Stack
from speechattn.encoder.senses import Altered, Dropped, Ears, Eyes, Fusion, Part, Senses, Sides, Unstack
from speechattn.frames import Frames
from speechattn.stream import Delay, Pointwise, Serial, Stream
from speechattn.stream.packing import packed
from speechattn.testing import check_stream, oracle, random_frames, stepped

pytestmark = pytest.mark.usefixtures("precise")

SIZE, MELS = 16, 20
HEARD, SEEN = 4 * MELS, SIZE * SIZE


def front_end() -> AudioVisual:
    spectrum = LogMel(mels=MELS, low=20.0, floor=1e-6, right=159)
    return AudioVisual(Serial(spectrum, Stack(4, 4)), size=SIZE)


def senses(*, size: int = SIZE, **options: float) -> Senses:
    ears = Conformer(subsample=Ears(MELS, 8, channels=4), dim=8, depth=1, heads=2, inner=12, span=Span(4, 2), kernel=3)
    eyes = Eyes(LipNet(channels=(4, 8), blocks=(1, 1), activation=nn.Softplus), 8, 6)
    return Senses(ears, eyes, heard=HEARD, size=size, **options)


def smooth(stream: nn.Module) -> None:
    for part in stream.modules():
        if isinstance(part, Pointwise) and isinstance(part.f, nn.ReLU):
            part.f = nn.Softplus()


def clip(samples: list[int], pictures: list[int], *, seed: int = 0, holes: bool = False) -> Clip:
    maker = torch.Generator().manual_seed(seed)
    sound = random_frames(samples, seed=seed)
    seen = torch.randint(256, (len(pictures), max(pictures), SIZE, SIZE), generator=maker, dtype=torch.uint8)
    mask = torch.arange(max(pictures)) < torch.tensor(pictures)[:, None]
    if holes:
        mask &= torch.rand(mask.shape, generator=maker) < 0.7
    return Clip.together(sound, Frames.of(seen, mask))


@oracle.register
def by_flag(stream: Part, x: Frames) -> Frames:
    values = torch.stack([x.values[..., i] for i in range(stream.first, stream.last)], -1)
    there = x.mask & (x.values[..., stream.last] > 0.5)
    return Frames.of(values.view(*values.shape[:2], *stream.shape), there)


@oracle.register
def either(stream: Sides, x: Frames) -> Frames:
    a, b = oracle(stream.first, x), oracle(stream.second, x)
    wide = torch.cat([a.values.where(a.mask[..., None], 0), b.values.where(b.mask[..., None], 0)], -1)
    return Frames(wide, a.mask | b.mask)


@oracle.register
def same(stream: Dropped, x: Frames) -> Frames:
    return x


@oracle.register
def unaltered(stream: Altered, x: Frames) -> Frames:
    return x


@oracle.register
def row_by_row(stream: Unstack, x: Frames) -> Frames:
    width = x.values.shape[2] // stream.n
    pieces = [x.values[:, t, i * width : (i + 1) * width] for t in range(x.mask.shape[1]) for i in range(stream.n)]
    masks = [x.mask[:, t] for t in range(x.mask.shape[1]) for _ in range(stream.n)]
    if not pieces:
        return Frames(x.values.new_zeros(len(x.mask), 0, width), x.mask)
    return Frames.of(torch.stack(pieces, 1), torch.stack(masks, 1))


def marked(frames: int, *, seed: int = 0) -> Frames:
    """What a front-end gives: marks are ones and zeros, each side zero where its mark is; lips end before the sound."""
    x = random_frames([frames, 0, frames - 3], HEARD + SEEN + 2, seed=seed)
    marks = (torch.rand(3, frames, 2, generator=torch.Generator().manual_seed(seed)) < 0.7) & x.mask[..., None]
    marks[..., 1] = x.mask & (torch.arange(frames) < frames - 5)
    marks[..., 0] |= x.mask & ~marks[..., 1]
    values = x.values.clone()
    values[..., : HEARD + 1] *= marks[..., :1]
    values[..., HEARD + 1 :] *= marks[..., 1:]
    values[..., HEARD], values[..., -1] = marks[..., 0].double(), marks[..., 1].double()
    return Frames.of(values, x.mask & marks.any(-1))


def test_branches_are_streams() -> None:
    check_stream(Unstack(4), random_frames([9, 0, 5], 12))
    check_stream(Ears(MELS, 8, channels=4).eval(), random_frames([9, 0, 5], HEARD))
    check_stream(Altered(SpecAugment()), random_frames([9, 0, 5], HEARD))
    check_stream(Part(2, 8, (2, 3), 9), random_frames([9, 0, 5], 9))
    check_stream(Dropped(3, 0.5, 0.5), random_frames([9, 0, 5], 9))
    both = senses(deaf=0.5, blind=0.5)
    smooth(both)
    check_stream(both, marked(12))


def test_a_sense_is_what_its_branch_makes_of_it_alone() -> None:
    both = senses().eval()
    x = marked(12, seed=3)
    heard = Frames.of(x.values[..., :HEARD], x.mask & (x.values[..., HEARD] == 1))
    seen = Frames.of(x.values[..., HEARD + 1 : -1].view(3, 12, SIZE, SIZE), x.mask & (x.values[..., -1] == 1))
    ears, eyes = (side.branch for side in (both.sides.first, both.sides.second))
    y, a, b = both(x), ears(heard), eyes(seen)
    assert torch.allclose(y.values, torch.cat([a.values, b.values], -1), atol=1e-12)
    assert torch.equal(y.mask, a.mask | b.mask)
    for one, other, mine, theirs in ((a, b, slice(8), slice(8, 14)), (b, a, slice(8, 14), slice(8))):
        lonely = one.mask & ~other.mask
        assert lonely.any()
        assert not y.values[..., theirs][lonely].any()
        assert (y.values[..., mine][lonely] != 0).any(-1).all()


def test_a_clip_is_cut_and_padded_on_both_clocks() -> None:
    x = clip([5 * EVERY + 7, 900], [3, 8])
    assert x.mask.shape == (2, 8 * EVERY)
    assert x.lips.mask.sum(1).tolist() == [3, 8]
    assert x.lengths.tolist() == [5 * EVERY + 7, 900]
    piece = x[2 * EVERY : 4 * EVERY + 5]
    assert torch.equal(piece.lips.values, x.lips.values[:, 2:5])
    assert torch.equal(piece.values, x.values[:, 2 * EVERY : 4 * EVERY + 5])
    longer = x.pad(1)
    assert longer.lips.mask.shape == (2, 9)
    assert not longer.lips.mask[:, 8].any()
    assert Clip.blind(x.sound).lips.mask.any().item() is False
    with pytest.raises(ValueError, match="within a picture"):
        x[5:]


@pytest.mark.parametrize("holes", [False, True])
def test_a_front_end_puts_both_on_one_clock(holes: bool) -> None:
    stream, x = front_end(), clip([7 * EVERY + 100, 900], [5, 9], holes=holes)
    y = stream(x)
    heard = Serial(LogMel(mels=MELS, low=20.0, floor=1e-6, right=159), Stack(4, 4))(x.sound)
    seen = Grey()(x.lips)
    assert torch.allclose(y.values[..., :HEARD], heard.values, atol=1e-12)
    assert torch.equal(y.values[..., HEARD], heard.mask.double())
    assert torch.equal(y.values[..., HEARD + 1 : -1], seen.values.flatten(2))
    assert torch.equal(y.values[..., -1], seen.mask.double())
    assert torch.equal(y.mask, heard.mask | seen.mask)
    assert y.mask.sum(1).tolist() == [8 if not holes else int((heard.mask | seen.mask)[0].sum()), int(y.mask[1].sum())]
    for seed in range(3):
        z = stepped(stream, x, seed=seed)
        assert torch.equal(z.mask, y.mask)
        assert torch.allclose(z.values, y.values, atol=1e-12)


def test_sound_alone_is_a_clip_without_pictures() -> None:
    stream, x = front_end(), clip([7 * EVERY + 100, 900], [5, 9])
    blind = stream(x.sound)
    assert not blind.values[..., HEARD + 1 :].any()
    assert torch.equal(blind.values[..., : HEARD + 1], stream(x).values[..., : HEARD + 1])


def test_every_duration_meets() -> None:
    """The number of frames is that of the longer side, whatever the two lengths are."""
    stream = front_end()
    for samples in (1, EVERY - 1, EVERY, EVERY + 1, 3 * EVERY - 1, 3 * EVERY + 1):
        for pictures in (1, 2, 3, 4):
            y = stream(clip([samples], [pictures]))
            assert y.mask.sum().item() == y.mask.shape[1] == max(ceil(samples / EVERY), pictures)


class Whole(Serial):
    """A model in the small: front-end, senses, MLP, encoder."""

    def __init__(self, kind: type) -> None:
        fused = Serial.of({"senses": senses(), "fusion": Fusion(14, 8, 16)})
        encoder = kind(dim=8, depth=1, heads=2, inner=12, span=Span(4, 2), kernel=3, subsample=fused)
        super().__init__(front_end(), encoder)


@pytest.mark.parametrize("kind", [Conformer, EBranchformer])
def test_streaming_is_offline_and_a_row_alone(kind: type) -> None:
    stream: Stream = Whole(kind)
    smooth(stream)
    stream.eval()
    x = clip([9 * EVERY + 50, 5 * EVERY], [8, 6], holes=True)
    y = stream(x)
    assert y.values.abs().sum() > 0
    for seed in range(3):
        z = stepped(stream, x, seed=seed)
        assert torch.equal(z.mask, y.mask)
        assert torch.allclose(z.values, y.values, atol=1e-9)
    for row, (samples, pictures) in enumerate([(9 * EVERY + 50, 8), (5 * EVERY, 6)]):
        one = Clip.together(
            Frames(x.values[row : row + 1, :samples], x.mask[row : row + 1, :samples]),
            Frames(x.lips.values[row : row + 1, :pictures], x.lips.mask[row : row + 1, :pictures]),
        )
        alone = stream(one)
        n = alone.mask.shape[1]
        assert torch.allclose(alone.values[0], y.values[row, :n], atol=1e-9)
        assert not y.mask[row, n:].any()


def test_gradients_reach_both_branches_and_a_missing_one_gets_none() -> None:
    stream = Whole(Conformer)
    x = clip([6 * EVERY], [6])
    eyes = stream.members[1].subsample.members[0].sides.second  # type: ignore[attr-defined]
    ears = stream.members[1].subsample.members[0].sides.first  # type: ignore[attr-defined]
    stream.eval()(x).values.square().sum().backward()
    assert gradient(eyes) > 0
    assert gradient(ears) > 0
    stream.zero_grad()
    stream(x.sound).values.square().sum().backward()
    assert gradient(eyes) == 0
    assert gradient(ears) > 0


def gradient(part: nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None)


def test_modality_dropout() -> None:
    x = marked(6, seed=1)
    x = Frames(x.values[:1].repeat(4000, 1, 1), x.mask[:1].repeat(4000, 1))
    drop = Dropped(HEARD, 0.3, 0.2).train()
    torch.manual_seed(0)
    y, _ = drop.step(x, ())
    deaf = ~(y.values[..., HEARD] > 0).any(1)
    blind = ~(y.values[..., -1] > 0).any(1)
    assert not (deaf & blind).any()
    assert deaf.double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert blind.double().mean().item() == pytest.approx(0.2, abs=0.03)
    kept = ~(deaf | blind)
    assert torch.equal(y.values[kept], x.values[kept])
    assert torch.equal(y.mask[deaf], x.mask[deaf] & (x.values[deaf][..., -1] > 0))
    assert drop.eval().step(x, ())[0] is x


def test_one_that_has_one_sense_keeps_it() -> None:
    x = front_end()(clip([4 * EVERY] * 50, [4] * 50).sound)
    y, _ = Dropped(HEARD, 0.5, 0.5).train().step(x, ())
    assert torch.equal(y.values, x.values)


def test_augmentation_acts_in_training_alone() -> None:
    eyes = Eyes(LipNet(channels=(4,), blocks=(1,)), 4, 6, augment=LipAugment(size=SIZE))
    x = random_frames([9], SIZE, SIZE)

    def change(train: bool) -> float:
        eyes.train(train)
        torch.manual_seed(0)
        a: Tensor = eyes(x).values
        return (eyes(x).values - a).abs().max().item()

    assert change(False) == 0
    assert change(True) > 0


def test_wrong_probabilities_are_named() -> None:
    with pytest.raises(ValueError, match="at most 1 together"):
        Dropped(3, 0.6, 0.5)


def test_a_side_that_waits_is_flushed() -> None:
    """Pictures that come two frames late (as behind a net that looks ahead) push everything by as much."""
    spectrum = Serial(LogMel(mels=MELS, low=20.0, floor=1e-6, right=159), Stack(4, 4))
    stream, x = AudioVisual(spectrum, Serial(Grey(), Delay(2)), size=SIZE), clip([5 * EVERY], [5])
    y, plain = stream(x), front_end()(x)
    assert stream.plan().latency == 2 * EVERY
    assert torch.allclose(y.values, plain.values, atol=1e-12)
    assert torch.equal(y.mask, plain.mask)
    assert torch.allclose(stepped(stream, x).values, plain.values, atol=1e-12)


def test_utterances_packed_into_a_batch_keep_their_lips() -> None:
    stream = Whole(Conformer).eval()
    clips = [clip([5 * EVERY], [5], seed=1), clip([9 * EVERY], [7], seed=2)]
    for one, found in zip(clips, packed(stream, clips, rows=2), strict=True):
        assert torch.allclose(found.values, stream(one).values, atol=1e-9)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="16 x 16 pixels: this model sees 88 x 88"):
        AudioVisual(Stack(640, 640))(clip([EVERY], [1]))
    with pytest.raises(ValueError, match="338 features: sound, lips and their marks are 226"):
        senses(size=22 - 10)(front_end()(clip([EVERY], [1])))
