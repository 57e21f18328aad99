"""Features of lips and of waveforms stream, and meet in length."""

from __future__ import annotations

import re
from math import ceil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.audio import lips
from speechattn.audio.lips import Grey, LipNet
from speechattn.audio.lips3d import Conv3d, LipResNet3D
from speechattn.audio.waves import Conv1d, Mean, WaveResNet
from speechattn.frames import Frames
from speechattn.stream import Delay, Join, Pair, Residual, Stream
from speechattn.testing import check_export, check_stream, measure, needed_delay, oracle, random_frames


def rows(x: Frames) -> list[Tensor]:
    """Each row without its padding."""
    return [values[: int(n)] for values, n in zip(x.values, x.lengths, strict=True)]


def padded(ys: list[Tensor], mask: Tensor) -> Frames:
    return Frames(torch.stack([F.pad(y, [0, 0, 0, mask.shape[1] - len(y)]) for y in ys]), mask)


@oracle.register
def grey(stream: Grey, x: Frames) -> Frames:
    return Frames.of((x.values.double() / 255 - 0.421) / 0.165, x.mask)


@oracle.register
def seen(stream: LipNet, x: Frames) -> Frames:
    """Row by row: one convolution over the whole video between zeros, then picture by picture."""
    outs = []
    for row in rows(x):
        if not len(row):
            outs.append(row.new_zeros(0, features(stream)))
            continue
        video = F.pad(row[None, None], [3, 3, 3, 3, 4 - stream.right, stream.right])
        y = F.conv3d(video, stream.stem.weight, stride=(1, 2, 2))[0].transpose(0, 1)
        outs.append(torch.stack([picture(stream, one) for one in y]))
    return padded(outs, x.mask)


def features(stream: LipNet) -> int:
    return [part.out_channels for part in stream.modules() if isinstance(part, nn.Conv2d)][-1]


def picture(stream: LipNet, x: Tensor) -> Tensor:
    """One picture [C, H, W] through the layers, spelled out."""
    y = stream.opening(x[None])
    for block in stream.trunk:
        a, norm, act, b, other = block.body
        z = F.conv2d(act(norm(F.conv2d(y, a.weight, stride=a.stride, padding=1))), b.weight, padding=1)
        skip = y if isinstance(block.skip, nn.Identity) else block.skip[1](
            F.conv2d(y, block.skip[0].weight, stride=a.stride)
        )  # fmt: skip
        y = act(other(z) + skip)
    return y[0].flatten(1).sum(1) / y[0, 0].numel()


def small(**options: object) -> LipNet:
    net = LipNet(channels=(4, 8), blocks=(1, 2), activation=nn.Softplus, **options)  # type: ignore[arg-type]
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()  # type: ignore[union-attr, operator]
            part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return net.eval()


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize(("right", "norm"), [(2, lips.grouped), (0, lips.grouped), (4, lips.grouped),
                                             (2, nn.BatchNorm2d)])  # fmt: skip
def test_lips_are_a_stream(right: int, norm: lips.Norm) -> None:
    net = small(right=right, norm=norm)
    check_stream(net, random_frames([11, 0, 6], 17, 16))
    check_export(net, random_frames([9, 6], 17, 16))
    x = random_frames([40], 16, 16)
    assert measure(net, x) == net.plan()
    assert needed_delay(net, x) == net.plan().latency == right


@pytest.mark.usefixtures("precise")
def test_grey_and_waves_are_streams() -> None:
    check_stream(Grey(), random_frames([11, 0, 6], 5, 4, vocab=256))
    check_stream(Grey(), random_frames([11, 0, 6], 5, 4))
    check_stream(Conv1d(3, 4, 4, 2), random_frames([11, 0, 6], 3))
    check_stream(Mean(3), random_frames([11, 0, 6], 3))
    net = WaveResNet(channels=(2, 3, 3, 4), blocks=(1, 2, 1, 1), activation=nn.Softplus)
    check_stream(net, random_frames([1500, 0, 700]), reference=heard)
    check_export(net, random_frames([1920, 1280]))


def heard(net: WaveResNet, x: Frames) -> Frames:  # type: ignore[override]
    """Row by row, convolutions of torch with zeros around the whole."""

    def conv(layer: Conv1d, y: Tensor, left: int) -> Tensor:
        step = layer.conv.stride[0]
        z = F.conv1d(F.pad(y, [left, 80]), layer.conv.weight, stride=step)
        return z[..., : ceil(y.shape[-1] / step)]

    def norm(layer: nn.Module, y: Tensor) -> Tensor:
        return layer(y.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]

    outs = []
    for row in rows(x):
        y = row[None, None]
        for member in net.members:
            if isinstance(member, Conv1d):
                y = conv(member, y, 40)
            elif isinstance(member, Residual):
                a, first, b, second = member.first.members  # type: ignore[attr-defined]
                z = norm(second.f, conv(b, norm(first.f, conv(a, y, 1)), 1))
                if hasattr(member.second, "members"):
                    c, third = member.second.members
                    y = norm(third.f, conv(c, y, 0))
                y = y + z
            elif isinstance(member, Mean):
                y = F.pad(y, [0, -y.shape[-1] % 20]).unflatten(-1, (-1, 20)).mean(-1)
            else:
                y = norm(member.f, y)  # type: ignore[attr-defined]
        outs.append(y[0].T)
    return padded(outs, x.mask[:, ::640])


def test_the_published_sizes() -> None:
    """ResNet-18's stages have 11,166,976 weights, the 3D convolution 15,680, and its norm 128."""
    net = LipNet()
    assert sum(p.numel() for p in net.parameters()) == 11_166_976 + 15_680 + 128
    assert net(Frames.from_lengths(torch.zeros(1, 3, 88, 88), torch.tensor([3]))).values.shape == (1, 3, 512)
    assert [stage.skip for stage in net.trunk if isinstance(stage.skip, nn.Sequential)].__len__() == 3
    with pytest.raises(ValueError, match="as many positive numbers"):
        LipNet(channels=(4, 8), blocks=(1,))
    with pytest.raises(ValueError, match="four positive numbers"):
        WaveResNet(channels=(4,), blocks=(1,))


@pytest.mark.usefixtures("precise")
def test_long_videos_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, sizes = small(shrink=2), random_frames([23, 20], 24, 24), list[int]()
    whole, look = net(x), net.seen
    monkeypatch.setattr(lips, "PIECE", 8)
    monkeypatch.setattr(net, "seen", lambda z: (sizes.append(z.shape[1]), look(z))[1])
    with torch.no_grad():
        torch.testing.assert_close(net(x).values, whole.values.detach(), rtol=0, atol=1e-12)
    assert max(sizes) == 12
    with torch.no_grad():
        halves = small(right=2)
        halves.load_state_dict(net.state_dict())
        means = Frames(x.values.unflatten(3, (12, 2)).unflatten(2, (12, 2)).mean((3, 5)), x.mask)
        torch.testing.assert_close(halves(means).values, whole.values.detach(), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("precise")
def test_a_row_does_not_know_its_batch_in_training_either() -> None:
    net, x = small().train(), random_frames([9, 6], 16, 16)
    alone = net(Frames(x.values[1:, :6], x.mask[1:, :6]))
    torch.testing.assert_close(net(x).values[1:, :6], alone.values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [640, 641, 1279, 1600, 15999, 16000, 16001])
def test_sound_and_lips_meet_in_length(samples: int) -> None:
    sound = WaveResNet(channels=(2, 2, 2, 2), blocks=(1, 1, 1, 1)).eval()
    join = Join(sound, small(), rates=(16000, 25))
    frames = ceil(samples * 25 / 16000)
    a = Frames.from_lengths(torch.randn(1, samples), torch.tensor([samples]))
    b = Frames.from_lengths(torch.randn(1, frames, 16, 16), torch.tensor([frames]))
    with torch.no_grad():
        y = join(Pair(a, b))
        assert y.mask.shape == (1, frames)
        assert y.mask.all()
        torch.testing.assert_close(y.values[..., :2], sound(a).values, atol=1e-5, rtol=0)
        missing = join(Pair(a, Frames(b.values * 0, ~b.mask)))
    assert missing.mask.all()
    assert not missing.values[..., 2:].any()


def test_the_how_to_runs() -> None:
    names: dict[str, object] = {}
    text = (Path(__file__).parents[1] / "docs" / "audio-visual.md").read_text(encoding="utf-8")
    exec(compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1], "docs/audio-visual.md", "exec"), names)
    features, blind = names["features"], names["blind"]
    assert isinstance(features, Frames)
    assert isinstance(blind, Frames)
    assert features.values.shape == blind.values.shape == (1, 50, 128)
    assert torch.equal(features.values[..., :64], blind.values[..., :64])
    assert features.values[..., 64:].any()
    assert not blind.values[..., 64:].any()


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("right", [0, 1])
def test_convolutions_of_time_are_a_stream(right: int) -> None:
    net = LipResNet3D(channels=(4, 8), blocks=(1, 2), right=right, activation=nn.Softplus).eval()
    check_stream(net, random_frames([11, 0, 6], 12, 10), reference=as_one_video)
    check_export(net, random_frames([9, 6], 12, 10))
    assert net.plan().latency == (7 if right else 0)
    assert net.plan().left == (7 if right else 14)


def as_one_video(net: LipResNet3D, x: Frames) -> Frames:
    """Row by row: torch's convolutions over the whole video, zeros before it and, where it looks ahead, behind it."""

    def conv(layer: Conv3d, y: Tensor) -> Tensor:
        weight, stride = layer.conv.weight, layer.conv.stride
        edge, ahead = weight.shape[-1] // 2, layer.right
        padded = F.pad(y, [edge, edge, edge, edge, weight.shape[2] - 1 - ahead, ahead])
        return F.conv3d(padded[None], weight, stride=stride)[0]

    def norm(layer: Stream, y: Tensor) -> Tensor:
        for part in layer.f.f:
            y = part(y.transpose(0, 1)).transpose(0, 1)
        return y

    outs = []
    for row in rows(x):
        if not len(row):
            outs.append(row.new_zeros(0, 8))
            continue
        first, opening, *blocks, _ = net.members
        y = norm(opening, conv(first, row[None]))
        for block, after in zip(blocks[::2], blocks[1::2], strict=True):
            a, b, c, d = block.first.members
            z = norm(d, conv(c, norm(b, conv(a, y))))
            skip = (
                y
                if isinstance(block.second, Delay)
                else norm(block.second.members[1], conv(block.second.members[0], y))
            )
            y = norm(after, z + skip)
        outs.append(y.mean((2, 3)).T)
    return padded(outs, x.mask)


def test_the_published_size_of_three_dimensions() -> None:
    net = LipResNet3D()
    assert sum(p.numel() for name, p in net.named_parameters() if p.dim() == 5) == 33_137_856
    with pytest.raises(ValueError, match="0 or 1"):
        LipResNet3D(right=2)
