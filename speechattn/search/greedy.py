"""Greedy search of an attention decoder, with the last draft as a guess."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from speechattn.cross.monotonic import Place
from speechattn.decoder.attention import AttentionDecoder, DecoderState, Head
from speechattn.frames import Memory
from speechattn.search import Draft
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

    def _best(self, hidden: Tensor, never: Tensor) -> tuple[list[int], list[float]]:
        """Most probable token after each row of `hidden` [U, D], and its log-probability."""
        scores = self.decoder.logits(hidden).float()
        scores[:, self.end_of_text + 1 :] = -torch.inf  # special tokens
        scores[:, self.never] = -torch.inf
        scores[0, never] = -torch.inf
        best, token = scores.log_softmax(-1).max(-1)
        return token.tolist(), best.tolist()

    @torch.inference_mode()
    def draft(
        self, memory: Memory, prompt: Sequence[int], committed: Sequence[int], *,
        behind: DecoderState | None = None, guess: Sequence[int] = (), heads: tuple[Head, ...] = (),
        frames: int | None = None, max_tokens: int = 224, first: int = 0,
    ) -> Draft:  # fmt: skip
        """Continue `prompt` + `committed` (one row) over `memory`, and `behind` it what the decoder read before.

        Attention is kept to the first `frames` only.
        """
        state = self.decoder.start(memory, behind=behind)
        device = memory.frames.mask.device
        room = min(max_tokens, self.decoder.context - self.decoder.opened - len(prompt) - len(committed))
        walks = bool(leaves(state.place))
        guess = [] if walks else list(takewhile(lambda token: token < self.end_of_text, guess))
        known = [*prompt, *committed, *guess[: room - 1]]
        hidden, seen, state = self.decoder.step(torch.tensor([known], device=device), state, heads=heads)
        start = len(prompt) + len(committed)
        said, scores = self._best(hidden[0, start - 1 :], self.never_next if committed else self.never_first)
        kept = next(
            (i for i, (a, b) in enumerate(zip(said, known[start:], strict=False)) if a != b), len(known) - start
        )
        tokens, log_probs, rows = said[: kept + 1], scores[: kept + 1], [seen[0, :, : start + kept, :frames]]
        state = state if walks else state.truncate(self.decoder.opened + start + kept)
        waits = [waiting(state)] * (kept + 1)
        while tokens[-1] != self.end_of_text and len(tokens) < room and not waits[-1]:
            hidden, seen, state = self.decoder.step(torch.tensor([tokens[-1:]], device=device), state, heads=heads)
            rows.append(seen[0, :, :, :frames])
            token, score = self._best(hidden[0], self.never)
            tokens += token
            log_probs += score
            waits.append(waiting(state))
        ended = tokens[-1] == self.end_of_text
        if ended:
            tokens, log_probs = tokens[:-1], log_probs[:-1]
        else:  # the last token was chosen but not read: its row is missing
            _, seen, state = self.decoder.step(torch.tensor([tokens[-1:]], device=device), state, heads=heads)
            rows.append(seen[0, :, :, :frames])
        return Draft(
            torch.tensor(tokens, dtype=torch.long), torch.tensor(log_probs), torch.cat(rows, 1).float().cpu(),
            heads, first, ended and not waits[-1],
            torch.tensor(waits[: len(tokens)], dtype=torch.bool) if waits[-1] is not None else None,
        )  # fmt: skip


def waiting(state: DecoderState) -> bool | None:
    """A monotonic head of the only row ran out of frames for the newest token; None where no head ever does."""
    heads = [place.waiting for place in state.place if isinstance(place, Place)]
    return bool(torch.cat(heads, 1).any()) if heads else None
