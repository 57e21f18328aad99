"""CTC with tokens of its own: of another language, or letters, which hear when somebody speaks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from speechattn.decoder.ctc import CTC
from speechattn.text.pieces import BLANK, Pieces

__all__ = ["ALPHABET", "Letters", "OwnTokens"]

ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"


class OwnTokens(CTC):
    """CTC over `pieces` of its own, whatever tokens the other heads say: [B, T, D] -> [B, T, V], id 0 blank."""

    def __init__(self, dim: int, pieces: Pieces) -> None:
        super().__init__(dim, pieces.size)
        self.pieces = pieces


class Letters(OwnTokens):
    """CTC over the letters of an `alphabet`, whatever tokens the other heads say: [B, T, D] -> [B, T, V], id 0 blank.

    Texts are lowered; what is not in the alphabet is a space, and spaces become one.
    """

    def __init__(self, dim: int, alphabet: str = ALPHABET) -> None:
        if len({*alphabet}) < len(alphabet) or " " not in alphabet:
            raise ValueError(f"alphabet {alphabet!r}: wanted a space and letters, each once")
        super().__init__(dim, Pieces([BLANK, *alphabet]))
        self.alphabet = alphabet

    def spell(self, text: str) -> list[int]:
        """Text -> ids."""
        known = "".join(letter if letter in self.alphabet else " " for letter in text.lower())
        return [1 + self.alphabet.index(letter) for letter in " ".join(known.split())]

    def spelled(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> ids [B, U] and their numbers [B], where the weights are."""
        rows = [torch.tensor(self.spell(text), dtype=torch.long) for text in texts]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0, dtype=torch.long)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        place = self.head.weight.device
        return padded.to(place), lengths.to(place)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids without blanks -> text."""
        return "".join(self.alphabet[i - 1] for i in ids)
