"""Vocabularies of pieces: text to ids and back, words, and what is written to a folder."""

from __future__ import annotations

import io
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechattn.errors import InputError, ModelError
from speechattn.text import Pieces, spelled

END = "<sos/eos>"
MARKED = Pieces(["<blank>", "<unk>", "▁", "▁ab", "▁a", "a", "b", "bc", "c", "abca", END])
SPACED = Pieces(["<blank>", " ", "a", "b", "c"])
SPACELESS = Pieces(["<blank>", "a", "b", "c", "ab", END])
KINDS = {"marked": MARKED, "spaced": SPACED, "spaceless": SPACELESS}
words = st.lists(st.text("abc", min_size=1, max_size=6), max_size=5)
kinds = st.sampled_from(sorted(KINDS))


@settings(deadline=None, max_examples=150)
@given(kinds, words)
def test_text_comes_back(kind: str, said: list[str]) -> None:
    pieces = KINDS[kind]
    text = ("" if kind == "spaceless" else " ").join(said)
    ids = pieces.encode(f"  {text}\n")
    assert pieces.decode(ids) == text
    assert not pieces.special & {*ids}
    groups = [pieces.decode(ids[i:j]) for i, j in pairwise(accumulate(pieces.words(ids), initial=0))]
    if kind == "spaceless":
        assert groups == [pieces.pieces[i] for i in ids]
    else:
        assert groups == said


@settings(deadline=None, max_examples=150)
@given(kinds, st.data())
def test_words_are_those_of_the_text_for_any_ids(kind: str, data: st.DataObject) -> None:
    pieces = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, pieces.size - 1), max_size=12))
    sizes = pieces.words(ids)
    assert sum(sizes) == len(ids)
    assert all(sizes)
    groups = [pieces.decode(ids[i:j]) for i, j in pairwise(accumulate(sizes, initial=0))]
    joined = pieces.decode(ids)
    assert [group for group in groups if group] == (joined.split() if kind != "spaceless" else [*filter(None, groups)])
    if kind == "spaceless":
        assert "".join(groups) == joined


def test_the_longest_piece_is_taken() -> None:
    assert [MARKED.pieces[i] for i in MARKED.encode("abca abb c")] == ["▁ab", "c", "a", "▁ab", "b", "▁", "c"]
    assert [MARKED.pieces[i] for i in MARKED.encode("cabcab")] == ["▁", "c", "abca", "b"]
    assert SPACED.encode("ab c") == [2, 3, 1, 4]
    assert SPACELESS.encode("abab c") == [4, 4, 3]
    assert (MARKED.size, MARKED.unknown, MARKED.end, SPACED.unknown, SPACED.end) == (11, 1, 10, None, None)
    assert [i for i, begins in enumerate(MARKED.begins) if begins] == [2, 3, 4]
    assert [i for i, begins in enumerate(SPACELESS.begins) if begins] == [1, 2, 3, 4]


def test_phrases_are_spelled_by_long_pieces_and_by_letters() -> None:
    pieces = Pieces(["<blank>", "\u2581", "a", "n", "an", "\u2581n"])
    assert spelled(["Nan"], pieces) == [("Nan", ((1, 3, 2, 3), (5, 4)))]
    assert spelled(["a"], pieces)[0].spellings == ((1, 2),)
    without = Pieces(["<blank>", "\u2581an", "an"])
    assert spelled(["an"], without)[0].spellings == ((1,),)  # there are no letters


def test_what_cannot_be_spelled() -> None:
    assert MARKED.encode("axb") == [4, 1, 6]
    assert MARKED.decode([4, 1, 6]) == "a<unk>b"
    with pytest.raises(InputError, match="'x' of 'axb' is not in the vocabulary of 5 pieces"):
        SPACED.encode("axb")
    assert MARKED.encode(END)[-1] == 1  # written out, it is text
    assert Pieces(["<blank>", "<unk>", "<", "blank", ">"]).encode("<blank>") == [2, 3, 4]
    assert MARKED.encode(" ") == []
    assert MARKED.decode([0, 10]) == ""


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([], "the first of the 0 pieces is not <blank>"),
        (["a", "<blank>"], "the first of the 2 pieces is not <blank>"),
        (["<blank>", "a", "a"], "'a' is there twice"),
        (["<blank>", ""], "piece 1 is empty"),
        (["<blank>", "a\nb"], "piece 1 is empty or has a line break"),
        (["<blank>", END, "a"], f"{END} is piece 1, but must be the last"),
    ],
)
def test_a_vocabulary_that_is_none(pieces: list[str], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        Pieces(pieces)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_folder_gives_back_what_it_was_given(kind: str, tmp_path: Path) -> None:
    KINDS[kind].save(tmp_path / "new")
    assert Pieces.load(tmp_path / "new").pieces == KINDS[kind].pieces


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1, max_size=3), unique=True))
def test_any_pieces_can_be_written(tmp_path_factory: pytest.TempPathFactory, pieces: list[str]) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    vocabulary = Pieces(["<blank>", *pieces])
    vocabulary.save(folder)
    assert Pieces.load(folder).pieces == vocabulary.pieces


def test_other_lists(tmp_path: Path) -> None:
    path = tmp_path / "tokens.txt"
    path.write_bytes(b"<blank>\r\n1\r\n2\r\n")  # without ids
    assert Pieces.load(tmp_path).pieces == ("<blank>", "1", "2")
    path.write_text("<blank> 0\na 2\n", encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokens.txt, line 2: the id of 'a 2' is not 1"):
        Pieces.load(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"tokens.txt: cannot be read"):
        Pieces.load(tmp_path)
    with pytest.raises(ModelError, match=r"tokens.txt: cannot be read"):
        Pieces.load(tmp_path / "none")


def test_sentencepiece_says_how_text_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    lines = ["new york is a new town", "york is old", "the old town is new", "a town a day"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, vocab_size=30, model_type="unigram", minloglevel=2,
        bos_id=-1, eos_id=-1, hard_vocab_limit=False,
    )  # fmt: skip
    path = tmp_path / "some.model"
    path.write_bytes(made.getvalue())
    backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
    listed = [backend.id_to_piece(i) for i in range(backend.vocab_size())]
    assert listed[0] == "<unk>"
    vocabulary = Pieces(["<blank>", *listed, END], model=path)
    assert (vocabulary.unknown, vocabulary.end) == (1, len(listed) + 1)
    vocabulary.save(tmp_path / "folder")
    path.unlink()
    again = Pieces.load(tmp_path / "folder")
    again.save(tmp_path / "folder")  # onto itself
    for line in lines[:4]:
        ids = again.encode(line)
        assert [i - 1 for i in ids] == backend.encode(line)
        assert again.decode(ids) == line
        assert len(again.words(ids)) == len(line.split())
    assert vocabulary.unknown in again.encode("new Ω")
    with pytest.raises(ModelError, match=r"some.model: cannot be read as a SentencePiece model"):
        vocabulary.encode("new")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(ModelError, match="pip install sentencepiece"):
        Pieces.load(tmp_path / "folder").encode("new")
