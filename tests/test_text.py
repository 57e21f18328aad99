"""Tokens and words."""

import pytest
from test_whisper import package_folder

from speechattn.errors import ModelError
from speechattn.search.loops import loop_start
from speechattn.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(package_folder() / "tokenizer.json")


@pytest.mark.parametrize("text", [" Hello, world! It's 5 o'clock.", " na\u00efve \u4f60\u597d \U0001f600"])
def test_text_survives_tokens(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_keep_their_punctuation_and_add_up(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(" Hello, flyboy! It's me.")
    sizes, at, words = tokenizer.words(tokens), 0, []
    for size in sizes:
        words.append(tokenizer.decode(tokens[at : at + size]))
        at += size
    assert words == [" Hello,", " flyboy!", " It's", " me."]
    assert at == len(tokens)


def test_without_spaces_every_whole_character_stands_alone(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("\u4f60\u597d\u4e16\u754c")
    sizes, at, words = tokenizer.words(tokens, spaceless=True), 0, []
    for size in sizes:
        words.append(tokenizer.decode(tokens[at : at + size]))
        at += size
    assert "".join(words) == "\u4f60\u597d\u4e16\u754c"
    assert all("\ufffd" not in word for word in words)
    assert len(words) > 1


def test_tokens_that_would_continue_a_word(tokenizer: Tokenizer) -> None:
    continuing = set(tokenizer.continuing())
    assert set(tokenizer.encode("ions")) <= continuing
    assert not continuing & set(tokenizer.encode(" ions"))
    assert not continuing & set(tokenizer.encode(","))


def test_a_broken_vocabulary_is_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("tokens", "start"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], None),
        ([1, 2, 2, 2, 2], None),  # people do say no, no, no, no
        ([9, 8, *[5] * 8], 3),
        ([7, *[1, 2] * 4], 3),
        ([7, *[1, 2] * 3], None),
        ([*range(6)] * 3, 6),
        ([0, *[1, 2, 3, 4, 5] * 2], None),
        ([], None),
    ],
)
def test_loops(tokens: list[int], start: int | None) -> None:
    assert loop_start(tokens) == start
