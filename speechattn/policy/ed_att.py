"""EDAtt (Papi, Negri, Turchi, arXiv 2212.07850): a token is safe when it hardly looks at the newest frames."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from speechattn.decoder.attention import Head
from speechattn.policy import Source
from speechattn.search import Draft

__all__ = ["EDAtt"]


@dataclass(frozen=True)
class EDAtt:
    """Commit tokens up to the first that gives `alpha` or more of its attention to the last `frames` frames.

    The attention is the mean over `heads`, without the last `drop_last` frames, which attract attention whatever they
    hold, divided by its norm: with `power` 1 what is left of it are shares, as the paper says; 2, the default, is what
    its published thresholds (0.6, 0.4, 0.2, 0.1, 0.05, 0.03) were measured with. A larger `alpha` commits sooner.
    """

    heads: tuple[Head, ...]
    alpha: float = 0.1
    frames: int = 2
    drop_last: int = 1
    power: int = 2

    def __post_init__(self) -> None:
        if not self.alpha > 0 or self.frames < 1 or self.drop_last < 0 or self.power not in (1, 2):
            raise ValueError(
                f"alpha {self.alpha}, frames {self.frames}, drop_last {self.drop_last}, power {self.power}: wanted "
                "more than 0, 1 or more, 0 or more, 1 or 2"
            )

    @classmethod
    def fbk(cls, layer: int, heads: int, alpha: float = 0.1) -> EDAtt:
        """All heads of one layer; frames of 40 ms in the paper, which looks at the fourth layer of six."""
        return cls(tuple((layer, head) for head in range(heads)), alpha)

    def initial(self) -> None:
        """Nothing to remember."""

    def accept(self, draft: Draft, source: Source, state: None) -> tuple[int, None]:
        """Tokens before the first whose newest frames weigh too much."""
        n = len(draft.tokens)
        if source.finished or not n:
            return n, None
        unsafe = self._newest(draft) >= self.alpha
        return int(unsafe.nonzero()[0, 0]) if unsafe.any() else n, None

    def why(self, draft: Draft, source: Source, state: None, n: int) -> str:
        """How much of its attention the newest frames have."""
        newest = self._newest(draft)[n]
        if newest < self.alpha:
            return ""
        return f"attention {float(newest):.2f} on the last {self.frames} frames, {self.alpha:g} or more"

    def _newest(self, draft: Draft) -> Tensor:
        """The attention of each token on the newest frames [U]."""
        weights = draft.alignment(self.heads).mean(0)[-len(draft.tokens) - 1 : -1]
        weights = weights[:, : max(weights.shape[1] - self.drop_last, 1)]
        return F.normalize(weights, p=self.power, dim=1)[:, -self.frames :].sum(1)
