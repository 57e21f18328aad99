"""Where the attention family used to break: extremes of probability, precision, and what does not fit together."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from training import part

from speechattn.attention import Rotary, Span
from speechattn.attention.duo import DuoAttention
from speechattn.attention.mega import Mega
from speechattn.attention.moba import MoBA
from speechattn.cross.expected import matrix, ratio, scan, sequential
from speechattn.cross.location import MixtureAttention
from speechattn.cross.monotonic import HardMonotonic
from speechattn.cross.segmental import SegmentAttention, Within
from speechattn.cross.soft import Soft
from speechattn.cross.sources import Flat, Sources
from speechattn.decoder.attention import AttentionDecoder, sinusoids
from speechattn.decoder.segmental import NeuralLength, Segmental, StaticLength
from speechattn.encoder import Conformer
from speechattn.errors import InputError, ModelError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer
from speechattn.model.config import build
from speechattn.model.pruning import GatedEncoder, pruned
from speechattn.search.monotonic import MonotonicBeam
from speechattn.stream import Pointwise
from speechattn.task.checkpoint import plain
from speechattn.text.pieces import BLANK, END, Pieces

DIM = 8
DECODER = "speechattn.decoder.attention.AttentionDecoder.usual"


def decoder(**options: object) -> AttentionDecoder:
    return AttentionDecoder.usual(5, DIM, 2, 1, 8, dropout=0.0, **options)  # type: ignore[arg-type]


def heard(frames: int, rows: int = 1) -> Frames:
    values = torch.randn(rows, frames, DIM, generator=torch.Generator().manual_seed(0))
    return Frames(values, torch.ones(rows, frames, dtype=torch.bool))


@pytest.mark.parametrize("form", [sequential, ratio, matrix, scan])
def test_gradients_are_finite_at_certain_stops(form: object) -> None:
    energy = torch.tensor([[[30.0, -40.0, 60.0, 2.0], [-200.0, 40.0, 30.0, 60.0]]], requires_grad=True)
    alpha = form(energy.sigmoid())  # type: ignore[operator]
    (grad,) = torch.autograd.grad((alpha * torch.arange(4.0)).sum(), energy)
    assert torch.isfinite(alpha).all()
    assert torch.isfinite(grad).all()
    torch.testing.assert_close(alpha[0], torch.eye(4)[[0, 1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gaussians_move_on_for_thousands_of_frames_in_half_precision(dtype: torch.dtype) -> None:
    cross = MixtureAttention(DIM, 2).to(dtype)
    place = cross.place(torch.zeros(1, 1, DIM, dtype=dtype))
    read = cross.read(Memory.of(Frames(torch.zeros(1, 4, DIM, dtype=dtype), torch.ones(1, 4, dtype=torch.bool))))
    _, place = cross.attend(torch.zeros(1, 3000, DIM, dtype=dtype), read, place)
    torch.testing.assert_close(place.means, torch.full_like(place.means, 3000.0), rtol=0.1, atol=0)


def test_a_narrow_gaussian_still_gives_weights() -> None:
    cross = MixtureAttention(DIM, 1, components=1)
    with torch.no_grad():
        cross.last.weight.zero_()
        cross.last.bias.copy_(torch.tensor([0.0, 1.0, -110.0]))
    seen, _ = cross.attend(torch.zeros(1, 3, DIM), cross.read(Memory.of(heard(9))), cross.place(torch.zeros(1, 1)))
    assert torch.isfinite(seen.context).all()
    assert seen.weights.sum(-1).max() < 1.5


def test_mean_lengths_are_counted_exactly_in_any_precision() -> None:
    length = StaticLength(4).half()
    for _ in range(11):
        length.observe(torch.arange(4).repeat(1000), torch.full((4000,), 20))
    assert length.means().tolist() == [20.0] * 4
    length.count.fill_(2**24)
    length.total.fill_(20 * 2**24)
    length.observe(torch.zeros(1000, dtype=torch.long), torch.full((1000,), 20))
    assert length.means().tolist() == [20.0] * 4


@pytest.mark.parametrize("length", [StaticLength(2), StaticLength(9), NeuralLength(DIM, 2), NeuralLength(4, 5)])
def test_a_length_model_of_another_size_is_refused(length: StaticLength | NeuralLength) -> None:
    with pytest.raises(ValueError, match="the length model is of"):
        Segmental(decoder(cross=partial(SegmentAttention, boundary=Within(4))), length)


def test_who_has_said_all_has_no_room_left() -> None:
    net = decoder(cross=partial(HardMonotonic, offset=9.0))
    with torch.no_grad():
        net.output.bias[4] = 90.0  # the end, at once
    search = MonotonicBeam(net.eval(), 2, sos=4, eos=4)
    beam = search.start(heard(0))
    assert search.room(beam).item() == 1
    assert search.room(search.step(heard(12), beam)).item() == 0


def test_what_a_search_cannot_do_is_said_in_one_line() -> None:
    tokenizer = Pieces([BLANK, "▁a", "▁b", "▁c", END])
    whole = Segmental(decoder(cross=partial(SegmentAttention, boundary=Within())), NeuralLength(DIM, 5))
    model = Recognizer(Pointwise(), Pointwise(), {"segmental": whole, "monotonic": decoder(cross=Soft)}, tokenizer)
    with pytest.raises(InputError, match="search segmental: segments without a bound"):
        model.search("segmental")
    with pytest.raises(InputError, match=r"search monotonic: .* not monotonic"):
        model.search("monotonic")


def test_nothing_follows_a_whole_utterance() -> None:
    net = decoder(cross=partial(HardMonotonic, offset=-90.0, preserve=True)).eval()
    targets, lengths, x = torch.tensor([[1, 2]]), torch.tensor([2]), heard(6)
    last = net.losses(Memory.of(x, finished=True), targets, lengths, sos=4, eos=4)
    waits = net.losses(Memory.of(x), targets, lengths, sos=4, eos=4)
    assert abs(last - waits).item() > 1e-3
    from speechattn.task.objectives import AttentionObjective, Heard, Said

    model = Recognizer(Pointwise(), Pointwise(), {"attention": net}, Pieces([BLANK, "▁a", "▁b", "▁c", END]))
    found = AttentionObjective().losses(model.eval(), Heard(x, x, x), Said(targets, lengths))
    torch.testing.assert_close(found, last)


def test_memory_positions_are_of_one_source() -> None:
    net = decoder(cross=Flat, memory_positions=sinusoids)
    with pytest.raises(ValueError, match="one source"):
        net.start(Sources((Memory.of(heard(3)), Memory.of(heard(4)))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "name"),
    [("memory_positions", "speechattn.decoder.attention.sinusoids"), ("cross", "speechattn.cross.expected.matrix")],
)
def test_functions_are_written_and_built_by_name(option: str, name: str) -> None:
    said = part(DECODER, vocab=5, dim=DIM, heads=2, depth=1, inner=8, memory_positions=name)
    if option == "cross":
        said = part(DECODER, vocab=5, dim=DIM, heads=2, depth=1, inner=8,
                    cross=part("speechattn.cross.monotonic.MoChA", form=name))  # fmt: skip
    made = build(said, "here")
    assert made.memory_positions is not None if option == "memory_positions" else made.layers[0].cross.form is matrix
    assert plain({"f": [matrix, sinusoids]}) == {
        "f": ["speechattn.cross.expected.matrix", "speechattn.decoder.attention.sinusoids"]
    }
    with pytest.raises(ModelError, match="no module"):
        build("speechattn.cross.expected.begin", "here")


def test_rotary_positions_need_pairs_of_features_in_mega() -> None:
    with pytest.raises(ValueError, match="pairs of features"):
        Mega(DIM, 1, Span.chunked(0, 4), keys=3, position=Rotary(DIM, 2))


def conformer(**options: object) -> Conformer:
    return Conformer(8, 8, 1, 2, 12, kernel=3, position=None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [MoBA, partial(DuoAttention, left=4)])
def test_hidden_units_are_pruned_around_heads_that_cannot_be(kind: object) -> None:
    encoder = GatedEncoder(conformer(span=Span.causal(), attention=kind), heads=None).eval()
    for name, parameter in encoder.named_parameters():
        if name.endswith("gates.logits"):
            torch.nn.init.constant_(parameter.data[:5], -9.0)
    x = heard(9)
    small = pruned(encoder)
    torch.testing.assert_close(small(x).values, encoder(x).values, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in encoder.parameters()) - 80
