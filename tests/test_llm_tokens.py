"""Tokens of language models of others, where `Pieces` would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import changed
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from speechattn.errors import InputError, ModelError
from speechattn.frames import Frames
from speechattn.model import from_config
from speechattn.multimodal.tokens import HuggingFaceTokens
from speechattn.text.pieces import BYTES, MARK

TEXT = ["the cat sat on the mat", "a cat is a cat is a cat", "that hat, that mat: naïve 日本"] * 20
END = "</s>"


def bytewise() -> Any:
    """As GPT-2 and Llama 3 spell."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(["<s>", END])
    return made


def metaspace() -> Any:
    """As Llama 2 and TinyLlama do: "▁" before words, bytes of what has no token."""
    special = ["<unk>", "<s>", END]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always")
    made.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=[MARK, *"abcdefghijklmnopqrstuvwxyz"],
        limit_alphabet=30, show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(TEXT, trainer)
    said = json.loads(made.to_str())
    vocabulary = said["model"]["vocab"]
    for byte in BYTES:
        vocabulary[byte] = len(vocabulary)
    return Tokenizer.from_str(json.dumps(said))


@pytest.fixture(params=[bytewise, metaspace])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    request.param().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_text_comes_back_and_words_are_words(path: Path) -> None:
    tokens = HuggingFaceTokens(path, END)
    assert tokens.bytewise
    for text in ("the cat sat", " that  naïve mat ", "日本 hats", "zzz!"):
        ids = tokens.encode(text)
        assert not {*ids} & tokens.special
        assert tokens.decode([*ids, tokens.end]) == " ".join(text.split())
        sizes = tokens.words(ids)
        assert sum(sizes) == len(ids)
        at, words = 0, []
        for size in sizes:
            words.append(tokens.decode(ids[at : at + size]))
            at += size
        assert words == text.split()
    assert tokens.pieces[tokens.end] == END
    assert tokens.end in tokens.special
    space = {MARK: "▁", "Ġ": "Ġ"}[tokens.space]
    assert tokens.begins == tuple(piece.startswith(space) for piece in tokens.pieces)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[HuggingFaceTokens]:
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    found = []
    for make in (bytewise, metaspace):
        make().save(str(path))
        found.append(HuggingFaceTokens(path, END))
    return found


@given(text=st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_letters_stay_whole_where_text_has_no_spaces(both: list[HuggingFaceTokens], text: str) -> None:
    for tokens in both:
        ids = tokens.encode(text)
        sizes = tokens.words(ids, spaceless=True)
        assert (sum(sizes), min(sizes, default=1) > 0) == (len(ids), True)
        at, parts = 0, []
        for size in sizes:
            parts.append(tokens.decode(ids[at : at + size]))
            at += size
        assert "".join(parts) == tokens.decode(ids) == text


def test_folders(path: Path, tmp_path: Path) -> None:
    tokens = HuggingFaceTokens(path, END, size=600)
    tokens.save(tmp_path / "model")
    again = HuggingFaceTokens.load(tmp_path / "model")
    assert (again.size, again.end, again.pieces, again.special) == (600, tokens.end, tokens.pieces, tokens.special)
    assert again.encode("the naïve cat") == tokens.encode("the naïve cat")
    assert tokens.special >= {*range(HuggingFaceTokens(path, END).size, 600)}
    assert tokens.decode([599, *tokens.encode("cat")]) == "cat"
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"eos_token": {"content": "<s>"}}')
    assert HuggingFaceTokens.load(tmp_path / "model").end == tokens.pieces.index("<s>")
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="eos_token"):
        HuggingFaceTokens.load(tmp_path / "model")
    with pytest.raises(ModelError, match="cannot be read"):
        HuggingFaceTokens.load(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        HuggingFaceTokens(tmp_path / "none.json", END)
    with pytest.raises(InputError, match="'<end>'"):
        HuggingFaceTokens(path, "<end>")
    with pytest.raises(InputError, match="no part of 7"):
        HuggingFaceTokens(path, END, size=7)


def test_what_has_no_token_is_unknown_and_text_may_have_no_spaces(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"<unk>": 0, END: 1, "a": 2, "b": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens([AddedToken(END, special=True)])
    made.decoder = decoders.Fuse()
    made.save(str(tmp_path / "tokenizer.json"))
    tokens = HuggingFaceTokens(tmp_path / "tokenizer.json", END)
    assert tokens.encode("abc") == [2, 3, 0]
    assert (tokens.unknown, tokens.special, tokens.space, tokens.bytewise) == (0, {0, 1}, "", False)
    assert tokens.words([2, 3, 2]) == [1, 1, 1]
    assert tokens.words([2, 3, 0, 1]) == [1, 3]
    assert tokens.decode([2, 0, 3, 1]) == "ab"


def test_a_recogniser_searches_and_writes_with_them(path: Path) -> None:
    tokens = HuggingFaceTokens(path, END)
    heads = {"attention": {
        "class_path": "speechattn.decoder.attention.AttentionDecoder",
        "init_args": {"vocab": tokens.size, "context": 300, "dim": 16, "heads": 2, "depth": 1, "inner": 16},
    }}  # fmt: skip
    torch.manual_seed(2)
    model = from_config(changed(heads=heads), tokens)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    sound = 0.1 * torch.randn(1, 8000)
    search = model.eval().search("attention", beam_size=2)
    best = search.decode(model.listening(Frames(sound, torch.ones_like(sound, dtype=torch.bool))))[0][0]
    assert tokens.decode(best.tokens)
    assert not {*best.tokens} & tokens.special
