"""Training of a speech translator: sound, what is said and its translation -> weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from speechattn.data.batch import Batch
from speechattn.data.loader import Check
from speechattn.decoder.letters import OwnTokens
from speechattn.errors import InputError
from speechattn.model.searches import SOURCE
from speechattn.task.base import Spells
from speechattn.task.objectives import Said
from speechattn.task.recognizer import Recognizer
from speechattn.task.tally import Tally, TranslationTally
from speechattn.text.pieces import Pieces

__all__ = ["Translator"]


@dataclass(frozen=True)
class SpellsBoth(Spells):
    """Asks whether there is a translation that can be spelled; with pieces of the `source`, the text, too."""

    source: Pieces | None

    def __call__(self, text: str, translation: str | None) -> None:
        if translation is None:
            raise InputError("has no translation")
        self.tokenizer.encode(translation)
        if self.source is not None:
            self.source.encode(text)


class Translator(Recognizer):
    """A `Recognizer` whose heads say the translation, but for the CTC head `source`, which says what was said.

    One tokenizer spells both languages, unless the head `source` has `OwnTokens`. That head is trained by
    `CTCObjective(head="source")` or by `IntermediateObjective(head="source")` and never gives the output text; a live
    session hears by it where nobody speaks, and policies count the words that were said. Validation computes `bleu` and
    `chrf`, and both `_streamed`.
    """

    def tally(self) -> Tally:
        """BLEU and chrF."""
        return TranslationTally()

    def spells(self) -> Check:
        """Of translations, and of what was said if a head says it."""
        return SpellsBoth(self.spelling, self.heard)

    @property
    def heard(self) -> Pieces | None:
        """The tokens of the head `source`; None where there is none."""
        head = dict(self.model.heads).get(SOURCE)
        return head.pieces if isinstance(head, OwnTokens) else self.spelling if head is not None else None

    def said(self, batch: Batch) -> Said:
        """The translation, and what was said if a head wants to know it."""
        said, heard = self.tokens(self.references(batch)), self.heard
        return said if heard is None else replace(said, source=self.tokens(batch.texts, heard))

    def references(self, batch: Batch) -> tuple[str, ...]:
        """Translations; InputError where there are none."""
        if batch.translations is None:
            names = ", ".join(batch.ids[:3])
            raise InputError(f"a translator learns from translations; not all of {names}, ... have one")
        return batch.translations
