"""Losses of a training step: those of the heads themselves, for each utterance, and their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.attention import Span, set_span
from speechattn.audio.spectrum import LogMel
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.cass_nat import Aligned, CassNatDecoder
from speechattn.decoder.ctc import CTC, IntermediateCTC
from speechattn.decoder.predictor import StatelessPredictor
from speechattn.decoder.transducer import FactoredJoint, Joint, PrunedLoss, Transducer
from speechattn.encoder import Conformer, EfficientConformer
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer, from_config, save_model
from speechattn.task.distillation import (
    AttentionDistillation,
    CTCDistillation,
    DualModeDistillation,
    divergence,
)  # fmt: skip
from speechattn.task.objectives import (
    AttentionObjective,
    CassNatObjective,
    CTCObjective,
    FusedTransducerObjective,
    Heard,
    IntermediateObjective,
    Objective,
    PrunedTransducerObjective,
    Said,
    TransducerObjective,
    crowded,
)  # fmt: skip
from speechattn.task.recognizer import Recognizer as Task
from speechattn.text.pieces import Pieces

RATE, DIM, VOCAB = 8000, 16, 9
PIECES = Pieces(["<blank>", "▁", *"abcdef", "<sos/eos>"])
END = VOCAB - 1
TEXTS = ("abba", "", "fade", "c")


def model_of(*names: str, span: Span | None = None) -> Recognizer:
    heads: dict[str, nn.Module] = {
        "ctc": CTC(DIM, VOCAB), "source": CTC(DIM, VOCAB),
        "attention": AttentionDecoder.usual(VOCAB, DIM, 2, 1, 24, context=40, dropout=0.0),
        "transducer": Transducer(StatelessPredictor(VOCAB, DIM), Joint(DIM, DIM, DIM, VOCAB)),
        "cass_nat": CassNatDecoder(VOCAB, DIM, 2, alone=1, both=1),
    }  # fmt: skip
    encoder = Conformer(8, DIM, 3, 2, 24, span=span or Span(16, 4), kernel=5, conv_right=None)
    front_end = LogMel(8, rate=RATE, window=200, hop=80)
    return Recognizer(front_end, encoder, {name: heads[name] for name in names}, PIECES, sample_rate=RATE)


def sound(rows: int = 4, seconds: float = 0.8) -> Frames:
    """Noise, the later rows shorter."""
    n = round(seconds * RATE)
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(3))
    return Frames.from_lengths(x, torch.tensor([n - 700 * i for i in range(rows)]))


def heard_by(model: Recognizer, layers: tuple[int, ...] = (), x: Frames | None = None) -> Heard:
    x = sound() if x is None else x
    features = model.front_end(x)
    frames, found = model.encoder.intermediate(features, layers)  # type: ignore[operator]
    return Heard(x, features, frames, dict(zip(layers, found, strict=True)))


def said_in(*texts: str, source: Said | None = None) -> Said:
    rows = [torch.tensor(PIECES.encode(text), dtype=torch.long) for text in texts]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=3)  # whatever pads says something
    return Said(padded, torch.tensor([len(row) for row in rows]), source)


def fitted(objective: Objective, model: Recognizer) -> Objective:
    objective.fit(model)
    return objective


def every(folder: str = "") -> dict[str, tuple[Objective, tuple[str, ...]]]:
    """Objectives and the heads that they train."""
    return {
        "ctc": (CTCObjective(), ("ctc",)),
        "source": (CTCObjective(head="source"), ("source",)),
        "attention": (AttentionObjective(smoothing=0.1), ("attention",)),
        "transducer": (TransducerObjective(), ("transducer",)),
        "fused": (FusedTransducerObjective(), ("transducer",)),
        "pruned": (PrunedTransducerObjective(width=3), ("transducer",)),
        "cass_nat": (CassNatObjective(), ("cass_nat",)),
        "intermediate": (IntermediateObjective(0.5, [0, 1]), ("ctc",)),
        "dual_mode": (DualModeDistillation(1.0), ("ctc",)),
    }


@pytest.fixture
def naive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused loss by its reference in plain torch: what it is in kernels is tested where they run."""
    from speechattn_kernels import rnnt
    from speechattn_kernels.rnnt.naive import rnnt_naive as reference

    monkeypatch.setattr(rnnt, "rnnt", reference)
    monkeypatch.setattr("speechattn.decoder.transducer.missing", lambda x: None)


ALL = ("ctc", "source", "attention", "transducer", "cass_nat")


@pytest.mark.usefixtures("naive")
@pytest.mark.parametrize("name", list(every()))
def test_gradients_reach_all_that_it_trains_and_nothing_else(name: str) -> None:
    model = model_of(*ALL)
    objective, trained = every()[name]
    assert objective.heads == trained
    fitted(objective, model)
    said = said_in("abba", "f", "fade", "c")
    said = Said(said.tokens, said.lengths, said)
    losses = objective.losses(model, heard_by(model, objective.layers), said)
    assert losses.shape == (4,)
    assert bool(losses.isfinite().all())
    losses.sum().backward()
    for head in ALL:
        grads = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.heads[head].parameters()]
        assert all(grads) if head in trained else not any(grads), head
    for n, p in [*model.encoder.named_parameters(), *objective.named_parameters()]:
        if objective.layers and n.startswith("layers.2"):
            assert p.grad is None or not p.grad.abs().sum(), n  # behind the layers that it asked for
        elif not n.endswith("qkv.bias"):  # a third of it, that of the keys, changes nothing
            assert p.grad is not None and bool(p.grad.isfinite().all()), n  # noqa: PT018
            assert bool(p.grad.abs().sum() > 0) or n.endswith("position.v"), n


@pytest.mark.usefixtures("naive")
@pytest.mark.parametrize("name", list(every()))
def test_an_utterance_costs_alone_what_it_costs_in_a_batch(name: str) -> None:
    model = model_of(*ALL).double().eval()
    objective = fitted(every()[name][0], model).double().eval()
    x = sound()
    x = Frames(x.values.double(), x.mask)
    said = said_in(*TEXTS)
    said = Said(said.tokens, said.lengths, said)
    together = objective.losses(model, heard_by(model, objective.layers, x), said)
    for i, text in enumerate(TEXTS):
        n = int(x.lengths[i])
        one = said_in(text)
        heard = heard_by(model, objective.layers, Frames(x.values[i : i + 1, :n], x.mask[i : i + 1, :n]))
        alone = objective.losses(model, heard, Said(one.tokens, one.lengths, one))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-8, atol=1e-9)


@pytest.mark.usefixtures("naive")
@pytest.mark.parametrize("name", list(every()))
def test_nobody_costs_nothing(name: str) -> None:
    model = model_of(*ALL)
    objective = fitted(every()[name][0], model)
    heard, said = heard_by(model, objective.layers), said_in(*TEXTS)
    none = Said(said.tokens[:0], said.lengths[:0])
    none = Said(none.tokens, none.lengths, none)

    def nobody(x: Frames) -> Frames:
        return Frames(x.values[:0], x.mask[:0])

    layers = {i: nobody(x) for i, x in heard.layers.items()}
    heard = Heard(nobody(heard.sound), nobody(heard.features), nobody(heard.frames), layers)
    assert objective.losses(model, heard, none).shape == (0,)
    assert objective.impossible(heard, none).shape == (0,)


@pytest.mark.usefixtures("naive")
def test_losses_are_those_of_the_heads() -> None:
    model = model_of(*ALL)
    heads: Any = dict(model.heads)
    heard, said = heard_by(model, (0, 2)), said_in(*TEXTS)
    x, tokens, lengths = heard.frames, said.tokens, said.lengths
    other = said_in("a", "b", "", "dd")
    told = Said(tokens, lengths, other)

    def check(objective: Objective, expected: Tensor) -> None:
        torch.testing.assert_close(fitted(objective, model).losses(model, heard, told), expected)

    check(CTCObjective(), heads["ctc"].losses(x, tokens, lengths))
    check(CTCObjective(head="source"), heads["source"].losses(x, other.tokens, other.lengths))
    memory = Memory.of(x)
    check(
        AttentionObjective(smoothing=0.2),
        heads["attention"].losses(memory, tokens, lengths, sos=END, eos=END, smoothing=0.2),
    )
    check(TransducerObjective(), heads["transducer"].loss(x, tokens, lengths))
    check(FusedTransducerObjective(), heads["transducer"].loss(x, tokens, lengths))
    judge = Aligned(heads["cass_nat"], heads["ctc"])
    check(CassNatObjective(smoothing=0.3), judge.losses(memory, tokens, lengths, sos=END, eos=END, smoothing=0.3))
    inner = IntermediateCTC(heads["ctc"])
    found = fitted(IntermediateObjective(0.5, [0, 2]), model).losses(model, heard, said)
    torch.testing.assert_close(found.mean(), inner.loss([heard.layers[0], heard.layers[2]], tokens, lengths))


def test_a_step_is_the_weighted_sum_for_each_token(tmp_path: Path) -> None:
    PIECES.save(tmp_path)
    objectives = [CTCObjective(0.3), AttentionObjective(0.7, smoothing=0.0), IntermediateObjective(0.5, [1])]
    made = model_of("ctc", "attention")
    task = Task(
        made.front_end, made.encoder, dict(made.heads), str(tmp_path), objectives, sample_rate=RATE  # type: ignore[arg-type]
    )  # fmt: skip
    losses = {"ctc": torch.tensor([2.0, 4.0]), "attention": torch.tensor([1.0, 0.0]), "more": torch.tensor([10.0, 0.0])}
    assert float(task.weighed(losses, torch.tensor(4.0))) == pytest.approx((0.3 * 6 + 0.7 * 1 + 0.5 * 10) / 4)


def test_pruned_is_the_whole_loss_where_the_band_is_wide_and_warms_up() -> None:
    model = model_of("transducer").double()
    heard, said = heard_by(model, x=Frames(sound().values.double(), sound().mask)), said_in(*TEXTS)
    objective = PrunedTransducerObjective(simple=0.25, width=20, warmup=4)
    fitted(objective, model).double()
    whole = TransducerObjective().losses(model, heard, said)
    pruned = objective.pruned
    assert isinstance(pruned, PrunedLoss)
    simple = pruned(model.heads["transducer"], heard.frames, said.tokens, said.lengths).simple
    for a, b in ((1.0, 0.1), (0.8125, 0.325), (0.625, 0.55), (0.4375, 0.775), (0.25, 1.0), (0.25, 1.0)):
        objective.eval()
        unseen = objective.losses(model, heard, said)
        objective.train()
        found = objective.losses(model, heard, said)
        torch.testing.assert_close(found, a * simple + b * whole)
        torch.testing.assert_close(unseen, found)  # a validation does not count
    again = fitted(PrunedTransducerObjective(simple=0.25, width=20, warmup=4), model).double()
    again.load_state_dict(objective.state_dict())
    torch.testing.assert_close(again.losses(model, heard, said), objective.losses(model, heard, said))


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_what_ctc_cannot_say_is_known_before(lengths: list[int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 3, (len(lengths), 6), generator=g)
    x = Frames.from_lengths(
        torch.randn(len(lengths), 7, DIM, generator=g), torch.randint(0, 8, (len(lengths),), generator=g)
    )
    said = Said(tokens, torch.tensor(lengths))
    scores = x.values[..., :3].log_softmax(-1).transpose(0, 1)
    costs = F.ctc_loss(scores, tokens, x.lengths, said.lengths, reduction="none")
    assert torch.equal(crowded(x, said), ~costs.isfinite())


@pytest.mark.usefixtures("naive")
@pytest.mark.parametrize("name", ["ctc", "transducer", "fused", "pruned", "cass_nat", "intermediate"])
def test_what_is_impossible_costs_nothing_and_is_told(name: str) -> None:
    model = model_of(*ALL)
    objective = fitted(every()[name][0], model)
    x = sound()
    x = Frames.from_lengths(x.values, torch.tensor([6400, 0, 1400, 6400]))
    said = said_in("abba", "a", "a" * 24, "b")
    heard = heard_by(model, objective.layers, x)
    losses = objective.losses(model, heard, Said(said.tokens, said.lengths, said))
    lost = objective.impossible(heard, said)
    crowds = name not in ("transducer", "fused")
    assert lost.tolist() == [False, True, crowds, False]
    assert bool((losses[lost] == 0).all())
    assert bool((losses[~lost] > 0).all())
    losses.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in [*model.parameters(), *objective.parameters()])


def test_mistakes_are_named() -> None:
    model = model_of("ctc")
    for objective, said in (
        (AttentionObjective(), r"needs the head attention \(AttentionDecoder\); there are ctc"),
        (TransducerObjective(), "needs the head transducer"),
        (PrunedTransducerObjective(), "needs the head transducer"),
        (FusedTransducerObjective(), "needs the head transducer"),
        (CassNatObjective(), "needs the head cass_nat"), (CTCObjective(head="source"), "needs the head source"),
        (IntermediateObjective(0.5, [1, 3]), r"ctc_intermediate: layers \[3\]: the encoder has 0 to 2"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=said):
            objective.fit(model)
    for wrong in (
        lambda: CTCObjective(-1.0), lambda: CTCObjective(float("nan")), lambda: IntermediateObjective(0.5, []),
        lambda: IntermediateObjective(0.5, [1, 1]), lambda: PrunedTransducerObjective(simple=2.0),
        lambda: PrunedTransducerObjective(width=1), lambda: CTCDistillation(1.0, "x", temperature=0.0),
        lambda: DualModeDistillation(1.0, temperature=-1.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="wanted"):
            wrong()
    without = model_of("attention")
    without.tokenizer = Pieces(["<blank>", *"abcdefgh"])
    with pytest.raises(ModelError, match="needs <sos/eos>"):
        AttentionObjective().fit(without)
    wide = EfficientConformer(8, (8, DIM), (2, 1), 2, span=Span(6, 3), kernel=3, widening=2, group=3)
    narrow = Recognizer(model.front_end, wide, {"ctc": CTC(DIM, VOCAB)}, PIECES, sample_rate=RATE)
    objective = fitted(IntermediateObjective(0.5, [0]), narrow)
    with pytest.raises(ModelError, match="layer 0 is 8 wide, not 16"):
        objective.losses(narrow, heard_by(narrow, (0,)), said_in(*TEXTS))


def test_a_fused_loss_without_a_gpu_says_what_to_do() -> None:
    model = model_of("transducer")
    objective = fitted(FusedTransducerObjective(), model)
    with pytest.raises(ModelError, match=r"needs CUDA.*TransducerObjective and PrunedTransducerObjective do without"):
        objective.losses(model, heard_by(model), said_in(*TEXTS))
    factored = Transducer(StatelessPredictor(VOCAB, DIM), FactoredJoint(DIM, DIM, DIM, VOCAB))
    other = Recognizer(model.front_end, model.encoder, {"transducer": factored}, PIECES, sample_rate=RATE)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"FactoredJoint are not those of one softmax.*do without"):
        FusedTransducerObjective().fit(other)


CONFIG: dict[str, Any] = {
    "format": 1, "sample_rate": RATE,
    "front_end": {
        "class_path": "speechattn.audio.spectrum.LogMel",
        "init_args": {"mels": 8, "rate": RATE, "window": 200, "hop": 80},
    },
    "encoder": {
        "class_path": "speechattn.encoder.Conformer",
        "init_args": {
            "mels": 8, "dim": DIM, "depth": 1, "heads": 2, "inner": 24, "kernel": 5,
            "span": {"class_path": "speechattn.attention.Span", "init_args": {"left": 16, "chunk": 4}},
        },
    },
    "heads": {
        "ctc": {"class_path": "speechattn.decoder.ctc.CTC", "init_args": {"dim": DIM, "vocab": VOCAB}},
        "attention": {
            "class_path": "speechattn.decoder.attention.AttentionDecoder.usual",
            "init_args": {
                "vocab": VOCAB, "dim": DIM, "heads": 2, "depth": 1, "inner": 24, "context": 40, "dropout": 0.0,
            },
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("teacher")
    save_model(from_config(CONFIG, PIECES), folder)
    return folder


@pytest.mark.parametrize("kind", [CTCDistillation, AttentionDistillation])
def test_a_teacher_teaches_what_it_says(teacher: Path, kind: Any) -> None:
    same = from_config(CONFIG, PIECES).eval()
    objective = fitted(kind(1.0, str(teacher)), same)
    assert isinstance(objective, CTCDistillation | AttentionDistillation)
    assert not list(objective.parameters())
    assert not objective.state_dict()
    assert not any(p.requires_grad for p in objective.teachers[0].parameters())
    said = said_in(*TEXTS)
    other = objective.losses(same, heard_by(same), said)
    assert bool((other > 0).all())
    frozen = {name: p.clone() for name, p in objective.teachers[0].state_dict().items()}
    optimizer = torch.optim.AdamW(same.parameters(), 1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        loss = objective.losses(same, heard_by(same), said).sum()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * float(other.detach().sum())
    assert all(torch.equal(p, frozen[name]) for name, p in objective.teachers[0].state_dict().items())
    same.load_state_dict(objective.teachers[0].state_dict())
    same.zero_grad()
    losses = objective.losses(same, heard_by(same), said)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.zeros(4), rtol=0, atol=1e-5)
    assert max(float(p.grad.abs().max()) for p in same.parameters() if p.grad is not None) < 1e-4


def test_divergence_is_the_formula() -> None:
    theirs, mine = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    p, q = (theirs / 2).softmax(-1), (mine / 2).softmax(-1)
    expected = 4 * ((p * (p / q).log()).sum(-1) * mask).sum(1)
    torch.testing.assert_close(divergence(theirs, mine, mask, 2.0), expected)


def test_a_teacher_that_does_not_fit_is_refused(teacher: Path, tmp_path: Path) -> None:
    model = model_of("ctc")
    with pytest.raises(ModelError, match="needs the head attention"):
        AttentionDistillation(1.0, str(teacher)).fit(model)
    model.tokenizer = Pieces(["<blank>", *"abcdefg", "<sos/eos>"])
    with pytest.raises(ModelError, match="the teacher has other tokens"):
        CTCDistillation(1.0, str(teacher)).fit(model)
    slower = from_config(CONFIG, PIECES)
    front_end = LogMel(8, rate=RATE, window=200, hop=100)
    model = Recognizer(front_end, slower.encoder, dict(slower.heads), PIECES, sample_rate=RATE)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="frames of the teacher last 40 ms, those of the model 50 ms"):
        CTCDistillation(1.0, str(teacher)).fit(model)
    with pytest.raises(ModelError):
        CTCDistillation(1.0, str(tmp_path / "nowhere")).fit(model)


def test_dual_mode_teaches_the_chunked_pass_by_the_whole_one() -> None:
    model = model_of("ctc").eval()
    objective = fitted(DualModeDistillation(1.0), model)
    said, head = said_in(*TEXTS), model.heads["ctc"]
    set_span(model.encoder, Span(4, 2))
    chunked = heard_by(model)
    losses = objective.losses(model, chunked, said)
    assert {m.span for m in model.encoder.modules() if hasattr(m, "span")} == {Span(4, 2)}  # as it was
    set_span(model.encoder, Span.full())
    whole = heard_by(model)
    expected = divergence(head(whole.frames).values, head(chunked.frames).values, chunked.frames.mask)
    torch.testing.assert_close(losses, expected)
    assert bool((losses > 0).all())
    assert objective.losses(model, whole, said).tolist() == [0.0] * 4
    losses.sum().backward()
    mine = [p.grad.clone() for p in model.encoder.parameters() if p.grad is not None]
    model.zero_grad()
    target = head(whole.frames).values.detach()
    set_span(model.encoder, Span(4, 2))
    chunked = heard_by(model)
    divergence(target, head(chunked.frames).values, chunked.frames.mask).sum().backward()
    torch.testing.assert_close(mine, [p.grad for p in model.encoder.parameters() if p.grad is not None])
