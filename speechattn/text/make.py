"""Vocabularies made of text. All begin with `<blank>`, `<unk>` and end with `<sos/eos>`; `size` counts these too."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from speechattn.errors import InputError
from speechattn.text.lexicon import JOINT, Lexicon
from speechattn.text.pieces import BACKEND, BLANK, BYTES, END, MARK, UNKNOWN, Pieces, plain

__all__ = ["make_bytes", "make_characters", "make_phones", "make_subwords", "unspelled"]

TOO_LARGE = re.compile(r"set it to a value <= (\d+)")
TOO_SMALL = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
USUAL = 4192  # bytes of a sentence: SentencePiece drops those that are longer
BESIDE = 2  # ids that SentencePiece does not know: <blank> and <sos/eos>


def layout(pieces: Iterable[str]) -> list[str]:
    """All pieces of a vocabulary, from those of its text."""
    return [BLANK, UNKNOWN, *pieces, END]


def make_subwords(
    lines: Iterable[str], folder: Path, kind: Literal["unigram", "bpe"], size: int, *, coverage: float = 1.0,
    byte_fallback: bool = False,
) -> Pieces:  # fmt: skip
    """SentencePiece's pieces of a text, unigram (arXiv 1804.10959) or BPE (arXiv 1508.07909), written to `folder`.

    The text is taken as it is, not normalised. The rarest letters, a share of 1 - `coverage` of the text, are `<unk>`,
    or bytes with `byte_fallback`. InputError where the text does not allow `size` pieces.
    """
    model = trained(lines, kind, size - BESIDE, coverage, byte_fallback)
    import sentencepiece

    backend = sentencepiece.SentencePieceProcessor(model_proto=model)
    listed = [backend.id_to_piece(i) for i in range(backend.vocab_size())]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BACKEND).write_bytes(model)
    pieces = Pieces(layout(piece for piece in listed if piece != UNKNOWN), model=folder / BACKEND)
    pieces.save(folder)
    return pieces


def trained(lines: Iterable[str], kind: str, size: int, coverage: float, byte_fallback: bool) -> bytes:
    """A SentencePiece model of `size` pieces, `<unk>` among them."""
    try:
        from sentencepiece import SentencePieceTrainer
    except ImportError as error:
        raise InputError("subwords need sentencepiece: pip install 'speechattn[sentencepiece]'") from error
    sentences = [plain(line) for line in lines]
    made = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=made, model_type=kind, vocab_size=size,
            character_coverage=coverage, byte_fallback=byte_fallback, normalization_rule_name="identity",
            unk_piece=UNKNOWN, unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1, num_threads=1, minloglevel=2,
            max_sentence_length=max([USUAL, *(len(line.encode()) + 1 for line in sentences)]),
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        raise InputError(explained(str(error), size, bool(sentences))) from error
    return made.getvalue()


def explained(error: str, size: int, any_text: bool) -> str:
    """What SentencePiece complains of, for the user."""
    asked = f"a vocabulary of {size + BESIDE}"
    if not any_text:
        return "there is no text to make a vocabulary of"
    if found := TOO_LARGE.search(error):
        return f"{asked} is too large for this text: it gives at most {int(found[1]) + BESIDE}"
    if found := TOO_SMALL.search(error):
        least = int(found[1]) + BESIDE
        return f"{asked} is too small: the letters of this text alone need {least} (or a lower --coverage)"
    return f"{asked} cannot be made: {' '.join(error.split())[:200]}"


def make_characters(lines: Iterable[str], *, least: int = 1) -> Pieces:
    """The letters that occur at least `least` times, in the order of Unicode, and "▁", which begins every word."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update("".join(line.split()))
    kept = sorted(letter for letter, count in counts.items() if count >= least and letter != MARK)
    if not kept:
        raise InputError(f"no letter occurs {least} times" if counts else "there is no text to make a vocabulary of")
    return Pieces(layout([MARK, *kept]))


def make_bytes() -> Pieces:
    """The 256 bytes of UTF-8: spells every text in any language; a word begins with the byte of its space."""
    return Pieces(layout(BYTES))


def make_phones(lexicon: Lexicon) -> Pieces:
    """The phones of a lexicon, each at the beginning of a word ("▁HH") and inside of one ("-AH").

    Text becomes the first pronunciation of its words, and `<unk>` for a word that the lexicon lacks. What is decoded
    are phones, "HH-AH-L-OW W-ER-L-D", and not words.
    """
    phones = lexicon.phones
    return Pieces(layout([*(MARK + phone for phone in phones), *(JOINT + phone for phone in phones)]), lexicon=lexicon)


def unspelled(lines: Sequence[str], pieces: Pieces) -> Counter[str]:
    """Words with an `<unk>` in them, and how often each occurs."""
    words = Counter(word for line in lines for word in line.split())
    return Counter({word: n for word, n in words.items() if pieces.unknown in pieces.encode(word)})
