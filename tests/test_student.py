"""A student of Whisper: its vocabulary, its head of letters, and what the teacher says token by token."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_whisper
from hypothesis import given, settings
from hypothesis import strategies as st
from test_embedded import hum
from torch import nn

from speechattn.attention import Span
from speechattn.attention.self_attention import set_span
from speechattn.data.cuts import Utterance
from speechattn.data.join import Join
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.ctc import CTC
from speechattn.decoder.letters import ALPHABET, Letters
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer, load_model
from speechattn.model.folder import from_config, save_model
from speechattn.pretrained.whisper.features import FrontEnd
from speechattn.pretrained.whisper.streaming import StreamingEncoder, front_end, streaming
from speechattn.task.objectives import CTCObjective
from speechattn.text.normal import normaliser
from speechattn.text.pieces import BLANK, END, UNKNOWN, Pieces

ROOT = Path(__file__).parent.parent
WORDS = [b"", b" a", b" b", b"c", b"!", b" d"]


# Letters


def test_letters_spell_what_is_in_the_alphabet() -> None:
    head = Letters(4)
    assert head.decode(head.spell("Don't  STOP: it's 5 o'clock!")) == "don't stop it's o'clock"
    assert head.head.out_features == 1 + len(ALPHABET)
    assert head.blank == 0 not in head.spell("any text")
    ids, lengths = head.spelled(["ab", "", "b a"])
    assert lengths.tolist() == [2, 0, 3]
    assert [head.decode(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)] == ["ab", "", "b a"]
    assert head.spelled([])[0].shape == (0, 0)
    with pytest.raises(ValueError, match="each once"):
        Letters(4, " aa")
    with pytest.raises(ValueError, match="a space"):
        Letters(4, "ab")


@given(st.text(ALPHABET + "?Ä1.", max_size=30))
def test_letters_give_back_the_words(text: str) -> None:
    head = Letters(2)
    known = "".join(letter if letter in ALPHABET else " " for letter in text)
    assert head.decode(head.spell(text)) == " ".join(known.split())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("he is the best one", "He is the best one."),
        ("that's ONE good reason...", "That's one good reason..."),
        ("WE HAVE NO TELEPHONE!", "We have no telephone!"),
        ("'tis I", "'Tis I."),
        ('I said "no"', 'I said "no"'),
        ("  in 1999 ", "In 1999."),
        ("...", "..."),
        ("", ""),
    ],
)
def test_what_is_written(text: str, wanted: str) -> None:
    assert normaliser("written")(text) == wanted
    assert normaliser("written")(wanted) == wanted


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=8), st.integers(0, 2**32 - 1), st.integers(60, 400))
def test_silence_behind_the_last_part(sizes: list[int], seed: int, limit: int) -> None:
    sounds = [(np.ones(n, np.float32), Utterance(str(i), f"t{i}", None, n / 10, None)) for i, n in enumerate(sizes)]
    join = Join(most_s=20.0, p=1.0, shortest_gap_s=0.1, longest_gap_s=0.5, end_s=3.0)
    heard = join(sounds, 10, limit=limit, generator=np.random.default_rng(seed))
    assert sorted("+".join(said.id for _, said in heard).split("+")) == sorted(map(str, range(len(sizes))))
    assert sum(int(x.sum()) for x, _ in heard) == sum(sizes)
    if len(heard) == len(sizes):
        return
    assert max(len(x) for x, _ in heard) * len(heard) <= max(limit, 0)
    tails = [len(x) - 1 - int(np.flatnonzero(x)[-1]) for x, _ in heard]
    assert max(tails) <= 30


def test_silence_behind_is_drawn() -> None:
    sounds = [(np.ones(10, np.float32), Utterance(str(i), "", None, 1.0, None)) for i in (0, 1)]
    join, tails = Join(most_s=20.0, p=1.0, end_s=3.0), set()
    for seed in range(20):
        ((x, _),) = join(sounds, 10, limit=400, generator=np.random.default_rng(seed))
        tails.add(len(x) - 1 - int(np.flatnonzero(x)[-1]))
    assert min(tails) < 8
    assert max(tails) > 20


def test_letters_are_tokens_of_their_own() -> None:
    head = Letters(4)
    assert head.pieces.encode("it's a dog") == head.spell("It's a dog")
    assert head.pieces.decode(head.spell("a b")) == "a b"
    assert head.pieces.words(head.spell("it's a dog")) == [4, 2, 4]


# The model


def tokenizer() -> Pieces:
    return Pieces([BLANK, UNKNOWN, "▁a", "▁b", "c", END])


def model(span: Span | None = None) -> Recognizer:
    """A small student of a random Whisper."""
    whisper = random_whisper(audio_context=500)
    decoder = AttentionDecoder.soft(6, 40, 16, 2, 2)
    return Recognizer(
        front_end(), streaming(whisper, span or Span.chunked(20, 5)),
        {"attention": decoder, "letters": Letters(16)}, tokenizer(),
    ).eval()  # fmt: skip


def test_the_head_of_letters_hears_where_nobody_speaks() -> None:
    one = model()
    with torch.no_grad():
        one.heads["letters"].head.weight.zero_()
        one.heads["letters"].head.bias.copy_(torch.tensor([5.0] + [0.0] * len(ALPHABET)))
        frames = one.listening(hum(16000))
        assert one.blank(frames).all()
        one.heads["letters"].head.bias[3] = 9.0
        assert not one.blank(frames).any()


def test_a_head_of_letters_needs_not_the_tokens_of_the_model(tmp_path: Path) -> None:
    student = import_student()
    whisper = random_whisper(audio_context=500)
    said = student.config(whisper, 6, left=20, chunk=5, revise=0, whole=False)
    made = from_config(said, tokenizer())
    save_model(made, tmp_path / "one")
    again = load_model(tmp_path / "one")
    sound = hum(16000)
    assert isinstance(again, Recognizer)
    assert torch.equal(again.listening(sound).values, made.eval().listening(sound).values)
    assert made.listening.plan().block == 2 * 160 * 5
    assert again.heads["attention"].alignment_heads == tuple(whisper.config.alignment_heads)


def import_student() -> Any:
    """By its path: another recipe has a student, too."""
    spec = spec_from_file_location("embedded_student", ROOT / "recipes" / "embedded" / "student.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_vocabulary_is_english() -> None:
    spelled = [b"a", b" the", b" \xc3\xa9t\xc3\xa9", b"\xe2\x80", b"12", b"'ll", b" {", b"...", b"\n", b"=", b"?", b" "]
    found = dict(import_student().english(SimpleNamespace(pieces=spelled), 11))
    assert found == {"a": 0, "▁the": 1, "▁été": 2, "12": 4, "'ll": 5, "...": 7, "?": 10}
    assert "▁" in dict(import_student().english(SimpleNamespace(pieces=spelled), 12))


def test_the_decoder_keeps_what_whisper_says() -> None:
    """Of its own tokens, where it hears what it heard, but for what is thinned out and the opening, which is deaf."""
    whisper = random_whisper(vocab=16)
    with torch.no_grad():
        for layer in whisper.decoder.layers:
            layer.cross.out.weight.mul_(0.02)  # little is heard
    fake = SimpleNamespace(
        network=whisper,
        tokenizer=SimpleNamespace(end_of_text=12, id={"<|startoftranscript|>": 13, "<|notimestamps|>": 14}.get),
    )
    kept, student = [2, 5, 7], import_student()
    config = student.config(whisper, 6, left=20, chunk=5, revise=0, whole=True)
    made = from_config(config, Pieces([BLANK, UNKNOWN, "x", "y", "z", END])).heads["attention"].eval()
    made.load_state_dict(student.decoder_weights(fake, kept))
    memory = Memory.of(Frames(torch.randn(1, 20, 16), torch.ones(1, 20, dtype=torch.bool)))
    state = whisper.decoder.start(memory, behind=whisper.silence())
    hidden, _, _ = whisper.decoder.step(torch.tensor([[13, 14, 5, 7]]), state)
    wanted = whisper.decoder.logits(hidden)[0, 1:, [*kept, 12]]
    hidden, _, _ = made.step(torch.tensor([[5, 3, 4]]), made.start(memory))
    found = made.logits(hidden)[0, :, 2:]
    assert (found - wanted).abs().max() < 0.05 * wanted.std()
    assert made.layers[0].cross.rest_key.shape == (2, 100, 8)
    assert torch.equal(made.embed.weight[:2], whisper.decoder.embed.weight[kept].mean(0).expand(2, -1))


# What it is told


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The objective with a small random Whisper as its teacher."""
    pytest.importorskip("lightning")
    from speechattn.task import distillation

    teacher = random_whisper(audio_context=500, vocab=16)
    vocab = teacher.config.vocab
    names = {"<|startoftranscript|>": vocab - 2, "<|notimestamps|>": vocab - 1}
    pieces = [*WORDS, *[bytes([200 + i]) for i in range(vocab - 4 - len(WORDS))]]
    whisper = SimpleNamespace(
        network=teacher, front_end=FrontEnd(), pad_s=0.5,
        tokenizer=SimpleNamespace(pieces=pieces, end_of_text=vocab - 4, id=names.__getitem__),
    )  # fmt: skip
    monkeypatch.setattr(distillation, "load", lambda name: whisper)
    return distillation.WhisperDistillation(1.0)


def heard(one: Recognizer, sound: Frames) -> Any:
    from speechattn.task.objectives import Heard

    features = one.front_end(sound)
    return Heard(sound, features, one.encoder(features))


def said(*rows: list[int]) -> Any:
    from speechattn.task.objectives import Said

    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    return Said(tokens, torch.tensor([len(row) for row in rows]))


def test_the_teacher_says_what_whisper_says_of_the_same_tokens(taught: Any) -> None:
    one = model()
    taught.fit(one)
    assert taught.same.tolist() == [-1, -1, 1, 2, 3, taught.whispers[0].tokenizer.end_of_text]
    whisper, sound, text = taught.whispers[0], hum(16000, rows=2), said([2, 4], [3])
    with torch.no_grad():
        got = taught.taught(sound, text)
        for row, tokens in ((0, [1, 3]), (1, [2])):
            x = Frames(sound.values[row : row + 1], sound.mask[row : row + 1])
            frames = whisper.network.encode(FrontEnd()(x).values, samples=16000, pad=8000)
            state = whisper.network.decoder.start(Memory.of(frames), behind=whisper.network.silence())
            vocab = whisper.network.config.vocab
            hidden, _, _ = whisper.network.decoder.step(torch.tensor([[vocab - 2, vocab - 1, *tokens]]), state)
            alone = whisper.network.decoder.logits(hidden)[0, 1:]
            assert torch.allclose(got[row, : len(tokens) + 1], alone, atol=1e-4)


def test_the_loss_is_the_divergence_on_the_tokens_that_both_have(taught: Any) -> None:
    from speechattn.task.distillation import forced

    one, sound, text = model(), hum(16000, rows=2), said([2, 4], [3])
    taught.fit(one)
    x = heard(one, sound)
    loss = taught.losses(one, x, text)
    mine, counts = forced(one, x.frames, text)
    p = taught.taught(sound, text)[..., taught.same[2:]].softmax(-1)
    q = mine[..., 2:].softmax(-1)
    each = (p * (p.log() - q.log())).sum(-1) * counts
    assert torch.allclose(loss, each.sum(1), atol=1e-4)
    assert (loss > 0).all()
    loss.sum().backward()
    assert one.encoder.layers.members[0].attention.first.qkv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in taught.whispers[0].network.parameters())
    assert not list(taught.parameters())


def test_whisper_is_no_teacher_of_silence(taught: Any) -> None:
    one, sound = model(), hum(16000, rows=2)
    taught.fit(one)
    loss = taught.losses(one, heard(one, sound), said([2, 4], []))
    alone = taught.losses(one, heard(one, sound), said([2, 4], [2, 4]))
    assert loss[1] == 0
    assert torch.allclose(loss[0], alone[0], atol=1e-5)
    assert alone[1] > 0


def test_a_token_that_whisper_lacks_is_named(taught: Any) -> None:
    one = model()
    one.tokenizer = Pieces([BLANK, UNKNOWN, "▁a", "▁zebra", "c", END])
    with pytest.raises(ModelError, match="zebra"):
        taught.fit(one)


def test_letters_are_learnt_without_a_word_to_the_encoder() -> None:
    pytest.importorskip("lightning")
    from speechattn.task.objectives import LettersObjective

    one, objective = model(), LettersObjective(0.5)
    objective.fit(one)
    x, text = heard(one, hum(16000, rows=2)), said([2, 4, 3], [3])
    spelled = objective.spelled(one, text)
    head = one.heads["letters"]
    assert [head.decode(row[:n]) for row, n in zip(spelled.tokens.tolist(), spelled.lengths.tolist(), strict=True)] == [
        "ac b", "b",
    ]  # fmt: skip
    loss = objective.losses(one, x, text)
    assert torch.allclose(loss, head.losses(x.frames, spelled.tokens, spelled.lengths))
    loss.sum().backward()
    assert head.head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in one.encoder.parameters())


def test_the_joint_recipe_is_that_of_the_student() -> None:
    """Its parts are the same, so that a student's weights fit."""
    yaml = pytest.importorskip("yaml")
    recipe = yaml.safe_load((ROOT / "recipes/embedded/encoder/joint.yaml").read_text())["model"]["init_args"]
    whisper = random_whisper()
    made = import_student().config(whisper, 31944, left=400, chunk=32, revise=16, whole=False)
    for part in ("front_end", "encoder"):
        assert recipe[part]["class_path"] == made[part]["class_path"]
    mine, theirs = recipe["heads"]["attention"]["init_args"], made["heads"]["attention"]["init_args"]
    assert mine.keys() == theirs.keys()
    assert mine["cross"] == theirs["cross"]
    assert json.dumps(recipe["front_end"]) == json.dumps(made["front_end"])


def test_a_whole_student_hears_everything() -> None:
    whisper = random_whisper(audio_context=500)
    made = from_config(import_student().config(whisper, 6, left=20, chunk=5, revise=0, whole=True), tokenizer())
    assert made.listening.plan().block is None
    set_span(made.encoder, Span.chunked(20, 5))
    assert made.listening.plan().block == 1600


@pytest.mark.parametrize("name", ["joint", "letters"])
def test_every_chunk_of_a_recipe_brings_new_frames(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    folder = ROOT / "recipes/embedded/encoder"
    joint, recipe = (yaml.safe_load((folder / f"{each}.yaml").read_text()) for each in ("joint", name))
    revise = joint["model"]["init_args"]["encoder"]["init_args"]["revise"]
    assert min(recipe["model"]["init_args"]["spans"]["init_args"]["chunks"]) > revise


def test_a_chunk_without_new_frames_is_refused_before_training(tmp_path: Path) -> None:
    task, chunks = pytest.importorskip("speechattn.task.recognizer"), pytest.importorskip("speechattn.task.chunks")
    Pieces([BLANK, UNKNOWN, "a"]).save(tmp_path)
    parts = {"ctc": CTC(8, 3)}

    def made(chunk: int) -> Any:
        encoder = StreamingEncoder(80, 8, 1, 2, span=Span.chunked(20, 8), revise=4)
        return task.Recognizer(front_end(), encoder, parts, str(tmp_path), [CTCObjective()],
                               spans=chunks.DynamicChunks([chunk], [20], 0.0))  # fmt: skip

    assert made(5).model.encoder.revise == 4
    with pytest.raises(ValueError, match="nothing is new"):
        made(4)
