"""Vocabularies made of text: what is written, and that text comes back from it."""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from corpora import damaged
from hypothesis import given, settings
from hypothesis import strategies as st

from speechattn.cli import tokenizer as command
from speechattn.errors import InputError
from speechattn.search.phrases import Phrases
from speechattn.text import Pieces, spelled
from speechattn.text.lexicon import Lexicon
from speechattn.text.make import make_bytes, make_characters, make_phones, make_subwords
from speechattn.text.normal import NORMALISERS, normaliser

LINES = [
    "new york is a new town", "york is old", "the old town is new", "a town a day", "der tag ist schön",
    "müde bin ich und geh zur ruh", "наш новый город", "the day is long and the night is short",
]  # fmt: skip
BYTES = make_bytes()
words = st.text(st.characters(exclude_categories=["Z", "C"], exclude_characters="▁"), min_size=1, max_size=5)
texts = st.lists(words, max_size=4).map(" ".join)
LEXICON = Lexicon.read(["hello HH AH0 L OW1", "world W ER1 L D", "hello(2) HH EH0 L OW1", "K K EY1 # a letter"], "here")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pieces]:
    """A vocabulary of each kind, of the same text."""
    folder = tmp_path_factory.mktemp("vocabularies")
    return {
        "unigram": make_subwords(LINES, folder / "unigram", "unigram", 48),
        "bpe": make_subwords(LINES, folder / "bpe", "bpe", 70),
        "fallback": make_subwords(LINES, folder / "fallback", "bpe", 320, byte_fallback=True),
        "char": make_characters(LINES),
        "byte": BYTES,
    }


KINDS = ["unigram", "bpe", "fallback", "char", "byte"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_and_the_text_of_training(kind: str, made: dict[str, Pieces], tmp_path: Path) -> None:
    pieces = made[kind]
    assert pieces.pieces[:2] == ("<blank>", "<unk>")
    assert pieces.pieces[-1] == "<sos/eos>"
    assert (pieces.unknown, pieces.end) == (1, pieces.size - 1)
    pieces.save(tmp_path)
    again = Pieces.load(tmp_path)
    for line in LINES:
        ids = pieces.encode(line)
        assert pieces.decode(ids) == line
        assert pieces.unknown not in ids
        assert again.encode(line) == ids
        groups = [pieces.decode(ids[i:j]) for i, j in pairwise(accumulate(pieces.words(ids), initial=0))]
        assert groups == line.split()
    assert {"unigram": 48, "bpe": 70, "fallback": 320, "byte": 259}.get(kind, pieces.size) == pieces.size


@pytest.mark.parametrize("kind", ["byte", "fallback"])
@settings(deadline=None, max_examples=150)
@given(text=texts | st.text(max_size=8))
def test_bytes_spell_all_text(kind: str, text: str, made: dict[str, Pieces]) -> None:
    pieces = made[kind]
    expected = " ".join(text.split())
    if any("\ud800" <= c <= "\udfff" for c in text) or (kind == "fallback" and "▁" in text):
        pieces.decode(pieces.encode(text))  # no text that UTF-8 can spell, or one of SentencePiece's spaces
        return
    ids = pieces.encode(text)
    assert pieces.decode(ids) == expected
    assert not pieces.special & {*ids}
    assert pieces.decode(pieces.letters(text)) == expected
    sizes = pieces.words(ids)
    assert sum(sizes) == len(ids)
    assert [pieces.decode(ids[i:j]) for i, j in pairwise(accumulate(sizes, initial=0))] == expected.split()
    if kind == "byte":
        assert [i - 2 for i in ids] == [*"".join(f" {word}" for word in text.split()).encode()]
        assert pieces.letters(text) == ids


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_bytes_are_some_text(made: dict[str, Pieces], data: st.DataObject) -> None:
    pieces = made[data.draw(st.sampled_from(["byte", "fallback"]))]
    byte = st.integers(0, 255).map(lambda b: pieces.pieces.index(f"<0x{b:02X}>"))
    ids = data.draw(st.lists(byte | st.integers(0, pieces.size - 1), max_size=12))
    joined = pieces.decode(ids)
    for spaceless in (False, True):
        sizes = pieces.words(ids, spaceless=spaceless)
        groups = [pieces.decode(ids[i:j]) for i, j in pairwise(accumulate(sizes, initial=0))]
        assert sum(sizes) == len(ids)
        assert all(sizes)
        if not spaceless:
            assert " ".join(filter(None, groups)) == joined
    only = [i for i in ids if pieces.pieces[i].startswith("<0x")]
    sound = bytes(int(pieces.pieces[i][3:5], 16) for i in only)
    assert pieces.decode(only) == " ".join(sound.decode(errors="replace").split())


def test_bytes_that_are_no_character() -> None:
    def decode(text: bytes) -> str:
        return BYTES.decode([byte + 2 for byte in text])

    assert decode("ä▁".encode()) == "ä▁"  # a mark that was written is none of a word
    assert decode(b"a\xe4") == "a\ufffd"  # cut
    assert decode(b"\xa4b") == "\ufffdb"
    assert decode(b"\xe4 \xc3\xa4") == "\ufffd ä"
    assert BYTES.decode([0xC3 + 2, 0, 0xA4 + 2, BYTES.size - 1]) == "ä"
    assert BYTES.encode("<0x41>") == [ord(c) + 2 for c in " <0x41>"]
    assert BYTES.encode("\ud800") == [34, 1]
    mixed = Pieces([*BYTES.pieces[:-1], "▁", "▁abcdef", "<"])
    assert [mixed.pieces[i] for i in mixed.encode("abcdef <0")] == ["▁abcdef", "▁", "<", "<0x30>"]
    assert mixed.decode(mixed.encode("<0x41> abcdef")) == "<0x41> abcdef"
    with_own = Pieces(["<blank>", "<0x41>", "<", "0", "x", "4", "1", ">"])  # no bytes: not all are there
    assert with_own.decode(with_own.encode("<0x41>")) == "<0x41>"
    assert not with_own.bytewise


def test_without_spaces_a_word_is_a_whole_character() -> None:
    ids = BYTES.encode("你好 a😀")
    groups = [ids[i:j] for i, j in pairwise(accumulate(BYTES.words(ids, spaceless=True), initial=0))]
    assert [BYTES.decode(group) for group in groups] == ["你", "好", "a", "😀"]
    cut = BYTES.words(ids[:6], spaceless=True)  # in the midst of the second
    assert cut == [4, 2]
    marked = make_characters(["你好"])
    assert marked.words(marked.encode("你好"), spaceless=True) == [2, 1]
    assert marked.words(marked.encode("你好")) == [3]
    for pieces in (marked, BYTES):
        tokens = tuple(pieces.encode("你好"))
        assert spelled(["你好"], pieces)[0].spellings == (tokens,)
        assert spelled(["你好"], pieces, spaceless=True)[0].spellings == (tokens[1:],)


@pytest.mark.parametrize("kind", ["unigram", "bpe", "fallback"])
def test_pieces_are_those_of_sentencepiece(kind: str, made: dict[str, Pieces]) -> None:
    import sentencepiece

    pieces = made[kind]
    backend = sentencepiece.SentencePieceProcessor(model_file=str(pieces.model))
    assert [backend.id_to_piece(i) for i in range(backend.vocab_size())] == [*pieces.pieces[1:-1]]
    longest = Pieces(pieces.pieces)
    differ = 0
    others = ["a new night", "zürich is old", "<0x41> <blank> <sos/eos>", "\uff21 \ufb01 \u2026", "\tand\n  spaces "]
    for line in [*LINES, *others]:
        ids = pieces.encode(line)
        assert [i - 1 for i in ids] == backend.encode(" ".join(line.split()))
        if pieces.unknown not in ids:
            assert pieces.decode(ids) == backend.decode([i - 1 for i in ids]) == " ".join(line.split())
        differ += longest.encode(line) != ids
    assert differ or kind == "fallback"  # it is not the longest piece that is taken
    if kind == "fallback":
        for sound in (b"\xc3\xa4", b"\xe2\x82\xac!", b"\xf0\x9f\x98\x80", b"\xff", b"a\xc3"):
            listed = [f"<0x{byte:02X}>" for byte in sound]
            ids = [backend.piece_to_id(piece) for piece in listed]
            assert pieces.decode([i + 1 for i in ids]) == backend.decode(ids) == sound.decode(errors="replace")


def test_characters(made: dict[str, Pieces]) -> None:
    counts = Counter("".join(LINES).replace(" ", ""))
    assert [*made["char"].pieces[2:-1]] == ["▁", *sorted(counts)]
    few = make_characters(LINES, least=3)
    assert [*few.pieces[3:-1]] == sorted(c for c, n in counts.items() if n >= 3)
    assert few.decode(few.encode("zt")) == "<unk>t"
    assert make_characters(["a▁b c\td"]).pieces[2:-1] == ("▁", "a", "b", "c", "d")
    with pytest.raises(InputError, match="no letter occurs 99 times"):
        make_characters(LINES, least=99)
    with pytest.raises(InputError, match="there is no text"):
        make_characters([" "])


@settings(deadline=None, max_examples=100)
@given(texts)
def test_letters_give_their_text_back(text: str) -> None:
    if text:
        pieces = make_characters([text])
        assert pieces.decode(pieces.encode(text)) == text
        assert len(pieces.words(pieces.encode(text))) == len(text.split())


def test_a_vocabulary_that_the_text_does_not_allow(tmp_path: Path) -> None:
    for kind in ("unigram", "bpe"):
        with pytest.raises(
            InputError, match=r"^a vocabulary of 999 is too large for this text: it gives at most \d+$"
        ) as e:
            make_subwords(LINES, tmp_path, kind, 999)
        most = int(str(e.value).rpartition(" ")[2])
        assert make_subwords(LINES, tmp_path, kind, most).size == most
        with pytest.raises(InputError, match=f"gives at most {most}$"):
            make_subwords(LINES, tmp_path, kind, most + 1)
        with pytest.raises(InputError, match=r"^a vocabulary of 20 is too small: the letters .* alone need \d+ ") as e:
            make_subwords(LINES, tmp_path, kind, 20)
        least = int(str(e.value).split("need ")[1].split()[0])
        assert make_subwords(LINES, tmp_path, kind, least).size == least
    with pytest.raises(InputError, match="there is no text"):
        make_subwords([], tmp_path, "bpe", 50)


def test_the_same_text_gives_the_same_files(tmp_path: Path) -> None:
    for kind in ("unigram", "bpe"):
        for name in ("one", "two"):
            make_subwords(iter(LINES), tmp_path / name, kind, 48)
        for file in ("tokens.txt", "bpe.model"):
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    for coverage, lost in ((1.0, False), (0.98, True)):
        rare = make_subwords(LINES, tmp_path / "rare", "bpe", 40, coverage=coverage)
        assert any(rare.unknown in rare.encode(line) for line in LINES) == lost
    long = "ab " * 4000  # longer than what SentencePiece reads unless told
    assert make_subwords([long], tmp_path / "long", "bpe", 6).encode("ab")


def test_sampled_spellings(made: dict[str, Pieces]) -> None:
    import sentencepiece

    pieces, line = made["unigram"], "the new town"
    drawn = Counter(tuple(pieces.sample(line, f"7/{i}", alpha=0.5, best=3)) for i in range(600))
    assert all(pieces.decode(ids) == line for ids in drawn)
    assert pieces.sample(line, 3) == pieces.sample(f" {line}", 3)
    assert pieces.sample(line, 3, best=1) == pieces.encode(line)
    assert pieces.sample("", 3) == []
    backend = sentencepiece.SentencePieceProcessor(model_file=str(pieces.model))
    best = backend.nbest_encode_as_pieces(line, 3)
    scores = [sum(backend.get_score(backend.piece_to_id(p)) for p in one) for one in best]
    chances = [2.718281828 ** (0.5 * score) for score in scores]
    for one, chance in zip(best, chances, strict=True):
        share = drawn[tuple(pieces.pieces.index(p) for p in one)] / 600
        assert abs(share - chance / sum(chances)) < 0.07
    for other in (made["bpe"], made["char"], BYTES):
        with pytest.raises(InputError, match="only the pieces of a SentencePiece unigram model"):
            other.sample(line, 3)


def test_phones(tmp_path: Path) -> None:
    pieces = make_phones(LEXICON)
    ids = pieces.encode("Hello world k")
    assert pieces.decode(ids) == "HH-AH-L-OW W-ER-L-D K-EY"
    assert [pieces.pieces[i] for i in ids[:4]] == ["▁HH", "-AH", "-L", "-OW"]
    assert pieces.words(ids) == [4, 4, 2]
    assert pieces.size == 3 + 2 * len({"HH", "AH", "L", "OW", "W", "ER", "D", "K", "EY"})
    unknown = pieces.encode("hello HHX world")
    assert unknown == [*ids[:4], 1, *ids[4:8]]
    assert pieces.words(unknown) == [4, 1, 4]
    assert pieces.decode(unknown) == "HH-AH-L-OW <unk> W-ER-L-D"
    assert spelled(["hello"], pieces)[0].spellings == (tuple(ids[:4]),)
    pieces.save(tmp_path)
    again = Pieces.load(tmp_path)
    assert again.encode("Hello world k") == ids
    make_subwords(LINES, tmp_path, "bpe", 40)
    assert Pieces.load(tmp_path).lexicon is None
    make_characters(LINES).save(tmp_path)
    assert Pieces.load(tmp_path).model is None
    other = Lexicon.read(["hello X a1 ŋ"], "there")
    assert make_phones(LEXICON | other).decode(make_phones(LEXICON | other).encode("hello")) == "X-a1-ŋ"
    for line in ("word", "word A-B", "word ▁A"):
        with pytest.raises(InputError, match=r"here, line 2: .* is not a word and its phones"):
            Lexicon.read(["a A", line], "here")
    with pytest.raises(InputError, match="here: no word in it"):
        Lexicon.read([";;; nothing", ""], "here")


def test_the_dictionary_of_cmu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pocketsphinx")
    lexicon = Lexicon.cmu()
    assert len(lexicon.words) > 120_000
    pieces = make_phones(lexicon)
    assert pieces.size == 3 + 2 * 39
    assert pieces.decode(pieces.encode("Speech attention's")) == "S-P-IY-CH <unk>"
    assert pieces.decode(pieces.encode("one two three o'clock")) == "W-AH-N T-UW TH-R-IY AH-K-L-AA-K"
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(InputError, match=r"pip install 'speechattn\[phonemes\]'"):
        Lexicon.cmu()


@pytest.mark.parametrize("kind", KINDS)
def test_phrases_are_known_in_every_vocabulary(kind: str, made: dict[str, Pieces]) -> None:
    """A phrase gives its bonus where it was said as words, and only there."""
    import torch

    pieces = made[kind]
    book = Phrases.from_text(["New Town"], pieces, bonus=1.0, vocab=pieces.size)

    def bonus(text: str) -> float:
        node, total = book.start(1, 1), 0.0
        for i in pieces.encode(text):
            node, gained = book.step(node, torch.tensor([[i]]))
            total += float(gained)
        return total + float(book.finish(node))

    assert bonus("is a new town is") == len(pieces.encode("new town"))
    assert bonus("new town") == len(pieces.encode("new town"))
    assert bonus("new towns") == bonus("anew town") == bonus("new") == 0


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=12))
def test_normalised_text_is_left_as_it_is(text: str) -> None:
    for name in ("none", "lower", "letters"):
        clean = normaliser(name)
        assert clean(clean(text)) == clean(text)
    assert normaliser("none")(text) == " ".join(text.split())


def test_normalisers() -> None:
    said = "  It\u2019s 3 O'CLOCK\u2014in  Cafe\u0301 Stra\u00adße/weg, 'hier' ' नमस्ते "
    assert normaliser("letters")(said) == "it's o'clock in café straße weg 'hier' नमस्ते"
    assert normaliser("lower")(" The  END.") == "the end."
    assert normaliser("whisper-english")("Mr. Brown's colour") == "mister brown is color"
    assert [*NORMALISERS] == ["none", "lower", "letters", "written", "whisper-english"]
    with pytest.raises(InputError, match="text normaliser other: wanted one of none, lower"):
        normaliser("other")


def call(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    options = parser.parse_args(["tokenizer", *map(str, arguments)])
    code: int = options.run(options)
    return code


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{line.title()}.\n" for line in LINES) + "\n!\n", encoding="utf-8")
    for kind, options, size in (
        ("unigram", ["--vocab-size", 46], 46), ("bpe", ["--vocab-size", 320, "--byte-fallback"], 320),
        ("char", [], 36), ("byte", [], 259), ("phoneme", [], 81),
    ):  # fmt: skip
        if kind == "phoneme":
            pytest.importorskip("pocketsphinx")
        assert call(kind, text, tmp_path / kind, "--normalise", "letters", *options) == 0
        said = capsys.readouterr().out
        pieces = Pieces.load(tmp_path / kind)
        assert pieces.size == size
        assert f"{size} tokens; " in said
        assert "8 lines, 2 more are empty" in said
        assert ("have an <unk>: " in said) == (kind == "phoneme")
        assert pieces.encode(LINES[0]) == (
            pieces.encode(LINES[0].upper()) if kind == "phoneme" else pieces.encode(LINES[0])
        )
    assert "have an <unk>: " in said
    assert "schön" in said
    assert call("char", text, tmp_path / "few", "--least", 4) == 0
    assert Pieces.load(tmp_path / "few").size < 30
    assert call("byte", tmp_path / "alone") == 0
    assert capsys.readouterr().out.endswith("alone: 259 tokens\n")


def test_of_several_dictionaries_the_first_counts(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("a X\n", encoding="utf-8")
    (tmp_path / "two").write_text("a Y\nb Z\n", encoding="utf-8")
    (tmp_path / "text.txt").write_text("a b\n", encoding="utf-8")
    both = ["--lexicon", tmp_path / "one", "--lexicon", tmp_path / "two"]
    assert call("phoneme", tmp_path / "text.txt", tmp_path / "out", *both) == 0
    pieces = Pieces.load(tmp_path / "out")
    assert pieces.decode(pieces.encode("a b")) == "X Z"


def manifest(path: Path, rows: list[dict[str, object]]) -> Path:
    cuts = [
        {"id": f"{i}", "start": 0, "duration": 1.0, "channel": 0, "type": "MonoCut", "supervisions": [
            {"id": f"{i}", "recording_id": "r", "start": 0, "duration": 1.0, "channel": 0, **row}]}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(cut) + "\n" for cut in cuts)
    return path


def test_manifests(tmp_path: Path) -> None:
    pytest.importorskip("lhotse")
    cuts = manifest(
        tmp_path / "x_cuts_train.jsonl.gz",
        [{"text": "ab", "custom": {"translation": "xy"}}, {"text": "c", "custom": {"translation": "z"}}],
    )
    letters = {}
    for name, more in (("text", []), ("both", ["--translations"]), ("other", ["--translations-only"])):
        assert call("char", cuts, tmp_path / name, *more) == 0
        letters[name] = "".join(Pieces.load(tmp_path / name).pieces[3:-1])
    assert letters == {"text": "abc", "both": "abcxyz", "other": "xyz"}
    supervisions = tmp_path / "s.jsonl"
    row = {"id": "1", "recording_id": "r", "start": 0, "duration": 1.0, "text": "hi"}
    supervisions.write_text(json.dumps(row) + "\n")
    assert [*command.read_lines(str(supervisions))] == ["hi"]
    without = manifest(tmp_path / "y.jsonl.gz", [{"text": "ab"}])
    with pytest.raises(InputError, match=r"y.jsonl.gz: 0 has no translation"):
        call("char", without, tmp_path / "no", "--translations")
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, latin, broken = tmp_path / "text.txt", tmp_path / "latin.txt", tmp_path / "cuts.jsonl.gz"
    text.write_text("a b\n", encoding="utf-8")
    latin.write_bytes(b"\xe4\n")
    broken.write_bytes(b"nothing")
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(damaged(b'{"id": "a"}\n' * 99))
    for arguments, said in (
        (("char", tmp_path / "none.txt"), r"none.txt: No such file"),
        (("char", tmp_path / "none.jsonl.gz"), r"none.jsonl.gz: No such file"),
        (("char", tmp_path), "Is a directory"),
        (("char", latin), "latin.txt: not UTF-8 text"),
        (("char", torn), "torn.jsonl.gz: not a lhotse manifest"),
        (("char", broken), "cuts.jsonl.gz: not a lhotse manifest"),
        (("bpe", text, "--vocab-size", 3), "--vocab-size 3: wanted at least 4"),
        (("bpe", text, "--vocab-size", 30), "too large for this text: it gives at most"),
        (("bpe", text, "--vocab-size", 30, "--coverage", 0.5), "--coverage 0.5: wanted from 0.98 to 1"),
        (("phoneme", text, "--lexicon", tmp_path / "no"), "no: No such file"),
    ):  # fmt: skip
        kind, source, *more = arguments
        with pytest.raises(InputError, match=said):
            call(kind, source, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()
    text.write_text("1 2\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"text.txt: no text is left by --normalise"):
        call("char", text, tmp_path / "out", "--normalise", "letters")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"pip install 'speechattn\[sentencepiece\]'"):
        make_subwords(LINES, tmp_path, "bpe", 50)
    monkeypatch.setitem(sys.modules, "lhotse", None)
    with pytest.raises(InputError, match=r"manifests need lhotse"):
        call("char", broken, tmp_path / "out")


def test_the_how_to_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "tokenizers.md").read_text(encoding="utf-8")
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(example, "docs/tokenizers.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("two five one [3, 4, 4]")
    assert said[1] == "zwölf 十二"
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in commands.splitlines():
        assert parser.parse_args(line.split()[1:]).folder == "tokens"
