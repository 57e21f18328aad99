"""Greedy search of an attention decoder, with the last draft as a guess."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor

from speechattn.cross.monotonic import Place
from speechattn.decoder.attention import AttentionDecoder, DecoderState, Head
from speechattn.frames import Memory
from speechattn.search import Draft
from speechattn.search.leaning import Leaning
from speechattn.tree import leaves

__all__ = ["Greedy"]


class Greedy:
    """The most probable token, again and again, until end-of-text or `max_tokens`.

    A guess (what the last draft proposed) is read together with the prompt in one pass; it is kept as far as the
    search itself would have said it. Law: a guess changes the time a search takes, never its result. It is not read
    where cross attention remembers where it stands: there a token cannot be taken back. Where that is monotonic, the
    draft ends with the first token for which a head is waiting.

    `suppress` ids are never said, `suppress_first` not at the start of the text, `suppress_next` not directly behind
    committed text (ids that would go on with a word that was committed as whole).
    """

    def __init__(
        self, decoder: AttentionDecoder, end_of_text: int, *,
        suppress: Sequence[int] = (), suppress_first: Sequence[int] = (), suppress_next: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.decoder, self.end_of_text = decoder, end_of_text
        self.never, self.never_first, self.never_next = (
            torch.tensor(sorted({*ids}), dtype=torch.long) for ids in (suppress, suppress_first, suppress_next)
        )

    def _log_probs(self, hidden: Tensor, never: Tensor) -> Tensor:
        """Of every token [U, V] after each row of `hidden` [U, D]."""
        scores = self.decoder.logits(hidden).float()
        scores[:, self.end_of_text + 1 :] = -torch.inf  # special tokens
        scores[:, self.never] = -torch.inf
        scores[0, never] = -torch.inf
        return scores.log_softmax(-1)

    @torch.inference_mode()
    def draft(
        self, memory: Memory, prompt: Sequence[int], committed: Sequence[int], *,
        behind: DecoderState | None = None, guess: Sequence[int] = (), heads: tuple[Head, ...] = (),
        frames: int | None = None, max_tokens: int = 224, first: int = 0, leaning: Leaning | None = None,
    ) -> Draft:  # fmt: skip
        """Continue `prompt` + `committed` (one row) over `memory`, and `behind` it what the decoder read before.

        Attention is kept to the first `frames` only. The text may be `leaning` towards phrases: where one is not said
        whole it is taken back. ValueError where cross attention remembers where it stands.
        """
        state = self.decoder.start(memory, behind=behind)
        device = memory.frames.mask.device
        room = min(max_tokens, self.decoder.context - self.decoder.opened - len(prompt) - len(committed))
        walks = bool(leaves(state.place))
        if walks and leaning is not None:
            raise ValueError("a text that cannot be taken back prefers no phrases")
        guess = [] if walks else list(takewhile(lambda token: token < self.end_of_text, guess))[: room - 1]
        before, start = [*prompt, *committed], len(prompt) + len(committed)
        hidden, seen, state = self.decoder.step(torch.tensor([[*before, *guess]], device=device), state, heads=heads)
        log_probs = self._log_probs(hidden[0, start - 1 :], self.never_next if committed else self.never_first)
        begins, rows = log_probs[0], [seen[0, :, :, :frames]]
        tokens, scores, waits = list[int](), list[float](), list[bool | None]()
        while True:
            for at, (probable, token) in enumerate(zip(*(x.tolist() for x in log_probs.max(-1)), strict=True)):
                said, score = token, probable
                if leaning is not None:
                    if token != self.end_of_text:  # nothing is said instead of the end
                        said, score = leaning.choose(token, probable, partial(some, log_probs[at]))
                    if leaning.fails(said, said == self.end_of_text):
                        place = leaning.take_back()
                        del tokens[place:], scores[place:], waits[place:]
                        break
                    leaning.say(said, probable - score)
                tokens.append(said)
                scores.append(score)
                waits.append(waiting(state))
                if at >= len(guess) or said != guess[at]:
                    break
            guess, right = [], start + len(tokens) - 1
            if sum(row.shape[1] for row in rows) > right:  # what was guessed wrongly, or taken back
                rows, state = [torch.cat(rows, 1)[:, :right]], state.truncate(self.decoder.opened + right)
            ended = bool(tokens) and tokens[-1] == self.end_of_text
            if ended or len(tokens) >= room or (waits and waits[-1]):
                break
            last = tokens[-1] if tokens else before[-1]
            hidden, seen, state = self.decoder.step(torch.tensor([[last]], device=device), state, heads=heads)
            rows.append(seen[0, :, :, :frames])
            log_probs = self._log_probs(hidden[0], self.never) if tokens else begins[None]
        if ended:
            tokens, scores = tokens[:-1], scores[:-1]
        else:  # the last token was chosen but not read: its row is missing
            _, seen, state = self.decoder.step(torch.tensor([tokens[-1:]], device=device), state, heads=heads)
            rows.append(seen[0, :, :, :frames])
        return Draft(
            torch.tensor(tokens, dtype=torch.long), torch.tensor(scores), torch.cat(rows, 1).float().cpu(),
            heads, first, ended and not waits[-1],
            torch.tensor(waits[: len(tokens)], dtype=torch.bool) if waits[-1] is not None else None,
        )  # fmt: skip


def some(log_probs: Tensor, tokens: list[int]) -> list[float]:
    """The log-probabilities [V] of some tokens."""
    return log_probs[tokens].tolist()


def waiting(state: DecoderState) -> bool | None:
    """A monotonic head of the only row ran out of frames for the newest token; None where no head ever does."""
    heads = [place.waiting for place in state.place if isinstance(place, Place)]
    return bool(torch.cat(heads, 1).any()) if heads else None
