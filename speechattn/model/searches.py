"""Which searches the heads of a model allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from speechattn.errors import InputError, ModelError
from speechattn.multimodal.scorer import SpeechLLMBeam, SpeechLLMScorer
from speechattn.search import Search
from speechattn.search.aligned import AlignedGreedy
from speechattn.search.attention import AttentionScorer
from speechattn.search.cass_nat import CassNat
from speechattn.search.ctc import CTCGreedy, CTCPrefixBeam
from speechattn.search.ctc_prefix import CTCPrefixScorer
from speechattn.search.headed import Headed
from speechattn.search.joint import JointBeam
from speechattn.search.length import LengthBonus
from speechattn.search.monotonic import MonotonicBeam
from speechattn.search.phrases import Phrases, PhraseScorer
from speechattn.search.rescoring import Rescored
from speechattn.search.segmental import SegmentalBeam, TimeSynchronousBeam
from speechattn.search.transducer import TransducerBeam, TransducerGreedy
from speechattn.search.triggered import TriggeredBeam
from speechattn.search.turns import Turns
from speechattn.text.pieces import Pieces

__all__ = ["BONUS", "HEARING", "LETTERS", "SEARCHES", "SOURCE", "Kind", "possible"]

LETTERS = "letters"  # a CTC head of letters, which no search says: it hears where nobody speaks
SOURCE = "source"  # a translator's CTC head of what was said: no search says its text
HEARING = (LETTERS, SOURCE, "ctc", "transducer")  # heads that hear where nobody speaks, the best first
CTC_WEIGHT = 0.3
LENGTH_WEIGHT = 0.1  # of a reward for each token, in a beam of more than one; with 0.5 a text may never end
MOST = 2.0  # tokens for each frame; a translation may be longer than what was said
SAMPLES = 50
SUBWORDS = 1000  # pieces of a vocabulary of which at most 8 are said in a second


class Kind(Protocol):
    """One way to search."""

    needs: tuple[str, ...]  # heads

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """The search over encoder frames."""


class ByCTC:
    """Prefixes of the CTC head alone."""

    needs: tuple[str, ...] = ("ctc",)

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """Greedy where there is one hypothesis and nothing to prefer."""
        head = heads["ctc"]
        greedy = size == 1 and phrases is None
        search = CTCGreedy(blank=head.blank) if greedy else CTCPrefixBeam(size, blank=head.blank, phrases=phrases)
        return Headed(head, search)


class ByTransducer:
    """Frame by frame with the label encoder."""

    needs: tuple[str, ...] = ("transducer",)

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """Greedy where there is one hypothesis and nothing to prefer."""
        head = heads["transducer"]
        if size == 1 and phrases is None:
            return TransducerGreedy(head)
        return TransducerBeam(head, size, phrases=phrases)


class Jointly:
    """Label by label with attention and the prefixes of CTC, block by block."""

    needs: tuple[str, ...] = ("ctc", "attention")

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """With CTC's usual weight."""
        end = ending(tokenizer)
        scorers: list[Any] = [
            (1 - CTC_WEIGHT, AttentionScorer(heads["attention"], end, end)),
            (CTC_WEIGHT, CTCPrefixScorer(heads["ctc"], end)),
        ]
        if phrases is not None:
            scorers.append((1.0, PhraseScorer(phrases)))
        return JointBeam(scorers, size, eos=end, block=16)


class InTwoPasses:
    """Prefixes of CTC live; at the end of an utterance attention chooses among them (U2, arXiv 2012.05481)."""

    needs: tuple[str, ...] = ("ctc", "attention")

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """Both weigh alike."""
        end = ending(tokenizer)
        first = CTCPrefixBeam(size, blank=heads["ctc"].blank, phrases=phrases)
        return Rescored(Headed(heads["ctc"], first), heads["attention"], sos=end, eos=end, weight=1.0)


class ByAttention:
    """Label by label with attention alone, whole utterances: heard live, it waits for the end of each."""

    needs: tuple[str, ...] = ("attention",)

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """With a reward for each token, because sums of log-probabilities prefer short texts."""
        end = ending(tokenizer)
        scorers: list[Any] = [(1.0, AttentionScorer(heads["attention"], end, end))]
        if size > 1:
            scorers.append((LENGTH_WEIGHT, LengthBonus(tokenizer.size)))
        if phrases is not None:
            scorers.append((1.0, PhraseScorer(phrases)))
        return JointBeam(scorers, size, eos=end, most=MOST, never=sorted(tokenizer.special - {end}))


class ByAlignment:
    """Greedily with attention alone, while it is heard; where attention looks tells what is certain."""

    needs: tuple[str, ...] = ("attention",)

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """One hypothesis, whatever the size; behind committed words a word begins, where marks say so."""
        end = ending(tokenizer)
        next_ = [i for i, begins in enumerate(tokenizer.begins) if not begins] if tokenizer.space else []
        return AlignedGreedy(
            heads["attention"], sos=end, eos=end, never=sorted(tokenizer.special - {end}), never_next=next_,
            most=0.16 if tokenizer.size >= SUBWORDS else 1.0, phrases=phrases,
        )  # fmt: skip


class ByMonotonicHeads:
    """Label by label, each as soon as monotonic heads have heard enough of it."""

    needs: tuple[str, ...] = ("monotonic",)

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """With a reward for each token in a beam of more than one."""
        if phrases is not None:
            raise InputError("search monotonic takes no phrases")
        end, bonus = ending(tokenizer), LENGTH_WEIGHT if size > 1 else 0.0
        never, hears = sorted(tokenizer.special - {end}), not any(name in heads for name in HEARING)
        return MonotonicBeam(heads["monotonic"], size, sos=end, eos=end, bonus=bonus, never=never, hears=hears)


class BySegments:
    """Segment by segment: hypotheses compete where they have just ended one (arXiv 2210.14742)."""

    needs: tuple[str, ...] = ("segmental",)

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """Length model and labels weigh alike."""
        if phrases is not None:
            raise InputError("search segmental takes no phrases")
        end = ending(tokenizer)
        return SegmentalBeam(heads["segmental"], size, sos=end, eos=end, never=tuple(tokenizer.special - {end}))


class InTime:
    """The same head, frame by frame: hypotheses compete whether a segment goes on or ends."""

    needs: tuple[str, ...] = ("segmental",)

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """Length model and labels weigh alike."""
        if phrases is not None:
            raise InputError("search time_synchronous takes no phrases")
        end = ending(tokenizer)
        return TimeSynchronousBeam(heads["segmental"], size, sos=end, eos=end, never=tuple(tokenizer.special - {end}))


class ByTriggers:
    """Frame by frame: CTC says when, and attention hears little further (arXiv 2001.02674)."""

    needs: tuple[str, ...] = ("ctc", "attention")

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """With CTC's usual weight."""
        if phrases is not None:
            raise InputError("search triggered takes no phrases")
        end = ending(tokenizer)
        return TriggeredBeam(heads["ctc"], heads["attention"], size, sos=end, eos=end, weight=CTC_WEIGHT)


class AtOnce:
    """All tokens in parallel where CTC hears them (CASS-NAT); whole utterances."""

    needs: tuple[str, ...] = ("ctc", "cass_nat")

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """The best of 50 alignments, or of the beam size."""
        if phrases is not None:
            raise InputError("search cass_nat takes no phrases")
        head, end = heads["ctc"], ending(tokenizer)
        return CassNat(head, heads["cass_nat"], size, eos=end, blank=head.blank, samples=max(size, SAMPLES))


class ByTurns:
    """Greedily with source and target in one Transformer, as soon as its schedule lets it."""

    needs: tuple[str, ...] = ("decoder_only",)

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """One hypothesis, whatever the size."""
        if phrases is not None:
            raise InputError("search turns takes no phrases")
        end = ending(tokenizer)
        return Turns(heads["decoder_only"], sos=end, eos=end, never=sorted(tokenizer.special - {end}), most=MOST)


class ByLanguageModel:
    """Label by label with a language model that reads the whole utterance first."""

    needs: tuple[str, ...] = ("llm",)

    def make(self, heads: Any, tokenizer: Pieces, size: int, phrases: Phrases | None) -> Search:
        """With a reward for each token in a beam of more than one."""
        end = ending(tokenizer)
        scorers: list[Any] = [(1.0, SpeechLLMScorer(heads["llm"]))]
        if size > 1:
            scorers.append((LENGTH_WEIGHT, LengthBonus(tokenizer.size)))
        if phrases is not None:
            scorers.append((1.0, PhraseScorer(phrases)))
        kind = JointBeam if any(name in heads for name in HEARING) else SpeechLLMBeam
        return kind(scorers, size, eos=end, most=MOST, never=sorted(tokenizer.special - {end}))


def ending(tokenizer: Pieces) -> int:
    """The token that ends a text."""
    if tokenizer.end is None:
        raise ModelError("a model with such a head needs <sos/eos> as the last of its tokens")
    return tokenizer.end


SEARCHES: Mapping[str, Kind] = {
    "llm": ByLanguageModel(), "transducer": ByTransducer(), "joint": Jointly(), "monotonic": ByMonotonicHeads(),
    "segmental": BySegments(), "ctc": ByCTC(), "rescored": InTwoPasses(), "triggered": ByTriggers(),
    "time_synchronous": InTime(),
    "cass_nat": AtOnce(), "attention": ByAttention(), "aligned": ByAlignment(),
    "turns": ByTurns(),
}  # fmt: skip


BONUS = {"aligned": 4.0}  # of a token in a phrase, where it is not 1.5


def possible(heads: nn.ModuleDict, *, streams: bool = True) -> Sequence[str]:
    """The names of those that the heads allow, the best first.

    Attention alone follows an encoder that `streams` where a head of letters hears the ends of utterances.
    """
    names = [name for name, kind in SEARCHES.items() if all(head in heads for head in kind.needs)]
    live = streams and LETTERS in heads and names[:1] == ["attention"]
    return ["aligned", *(name for name in names if name != "aligned")] if live else names
