"""What the parts of a model are told in training: one loss for each utterance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.cass_nat import Aligned, CassNatDecoder
from speechattn.decoder.ctc import CTC
from speechattn.decoder.letters import Letters
from speechattn.decoder.transducer import FusedLoss, PrunedLoss, Transducer, unfit
from speechattn.encoder import Encoder
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer
from speechattn.model.searches import LETTERS, SOURCE
from speechattn.text.pieces import END

__all__ = [
    "AttentionObjective", "CTCObjective", "CassNatObjective", "FusedTransducerObjective", "Heard",
    "IntermediateObjective", "LettersObjective", "Objective", "PrunedTransducerObjective", "Said",
    "TransducerObjective", "crowded", "ending", "head_of", "wanted",
]  # fmt: skip

Head = TypeVar("Head", bound=nn.Module)


@dataclass(frozen=True)
class Heard:
    """What the model made of a batch: `sound` [B, N], `features` [B, T', F], encoder `frames` [B, T, D].

    `layers` are the encoder layers that an objective asked for, each [B, T'', D].
    """

    sound: Frames
    features: Frames
    frames: Frames
    layers: Mapping[int, Frames] = field(default_factory=dict)


@dataclass(frozen=True)
class Said:
    """What should come out: `tokens` [B, U], of which the first `lengths` [B] count.

    `source` is the same of what was said in the language of the sound, where `tokens` are a translation.
    """

    tokens: Tensor
    lengths: Tensor
    source: Said | None = None


class Objective(nn.Module, ABC):
    """A loss for each utterance, `weight` times in the sum. `layers` names the encoder layers it wants to see.

    `heads` are those that it trains, by default the one called as itself. Its own parameters, if it has any, are
    trained and are no part of the model that is exported.
    """

    def __init__(
        self, name: str, weight: float, layers: tuple[int, ...] = (), *, heads: tuple[str, ...] | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight {weight} of {name}: wanted 0 or more")
        self.name, self.weight, self.layers = name, weight, layers
        self.heads = (name,) if heads is None else heads

    def fit(self, model: Recognizer) -> None:
        """Called once, before training: ModelError where the model lacks what is needed."""
        return

    @abstractmethod
    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        """Loss of each utterance [B]; 0 without gradient for those that are `impossible`."""

    def impossible(self, heard: Heard, said: Said) -> Tensor:
        """Which utterances [B] have too few frames for their text, so that nothing can be learnt from them here."""
        return torch.zeros_like(said.lengths, dtype=torch.bool)


def head_of(model: Recognizer, name: str, kind: type[Head]) -> Head:
    """That head of the model; ModelError where there is none of this kind."""
    head = dict(model.heads).get(name)
    if not isinstance(head, kind):
        raise ModelError(f"an objective needs the head {name} ({kind.__name__}); there are {', '.join(model.heads)}")
    return head


def wanted(head: str, said: Said) -> Said:
    """What a CTC head should say: what was said for `source`, else what should come out."""
    if head != SOURCE:
        return said
    if said.source is None:
        raise ModelError("the head source is trained on what was said beside its translation: use the task Translator")
    return said.source


def crowded(x: Frames, said: Said) -> Tensor:
    """Which utterances [B] have too few frames for CTC: one for each token, one more between equal ones."""
    tokens, at = said.tokens, torch.arange(said.tokens.shape[1], device=said.tokens.device)
    again = (tokens[:, 1:] == tokens[:, :-1]) & (at[1:] < said.lengths[:, None])
    return said.lengths + again.sum(1) > x.lengths


def ending(model: Recognizer) -> int:
    """The token that ends a text; ModelError where there is none."""
    if model.tokenizer.end is None:
        raise ModelError(f"such a head needs {END} as the last of the tokens")
    return model.tokenizer.end


class CTCObjective(Objective):
    """-log p(text) by the head `ctc`; by the head `source` of a translator, that of what was said."""

    def __init__(self, weight: float = 1.0, head: str = "ctc") -> None:
        super().__init__(head, weight)

    def fit(self, model: Recognizer) -> None:
        head_of(model, self.name, CTC)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        said = wanted(self.name, said)
        return head_of(model, self.name, CTC).losses(heard.frames, said.tokens, said.lengths)

    def impossible(self, heard: Heard, said: Said) -> Tensor:
        return crowded(heard.frames, wanted(self.name, said))


class LettersObjective(Objective):
    """-log p(letters of the text) by the head `letters`, which learns to read the frames as they are: no gradient."""

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__(LETTERS, weight)

    def fit(self, model: Recognizer) -> None:
        head_of(model, self.name, Letters)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        spelled = self.spelled(model, said)
        frames = Frames(heard.frames.values.detach(), heard.frames.mask)
        return head_of(model, self.name, Letters).losses(frames, spelled.tokens, spelled.lengths)

    def spelled(self, model: Recognizer, said: Said) -> Said:
        """The letters of the texts."""
        rows = zip(said.tokens.tolist(), said.lengths.tolist(), strict=True)
        texts = [model.tokenizer.decode(row[:n]) for row, n in rows]
        return Said(*head_of(model, self.name, Letters).spelled(texts))

    def impossible(self, heard: Heard, said: Said) -> Tensor:
        return torch.zeros_like(said.lengths, dtype=torch.bool)


class IntermediateObjective(Objective):
    """-log p(text) by a CTC head, of what encoder `layers` (from 0) say behind a norm of its own (arXiv 2102.03216).

    The mean over the layers. As in the paper with 1/2: `weight` here, 1 - `weight` for the head itself.
    """

    def __init__(self, weight: float, layers: list[int], head: str = "ctc") -> None:
        if not layers or len({*layers}) < len(layers):
            raise ValueError(f"layers {layers}: wanted some, each once")
        super().__init__(f"{head}_intermediate", weight, tuple(layers), heads=(head,))
        self.head = head
        self.norm: nn.Module = nn.Identity()  # until the width is known

    def fit(self, model: Recognizer) -> None:
        encoder, head = cast(Encoder, model.encoder), head_of(model, self.head, CTC)
        depth = len(encoder.layers.members)
        if wrong := [layer for layer in self.layers if not 0 <= layer < depth]:
            raise ModelError(f"{self.name}: layers {wrong}: the encoder has 0 to {depth - 1}")
        self.norm = nn.LayerNorm(head.head.in_features)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        said, head = wanted(self.head, said), head_of(model, self.head, CTC)
        found = []
        for layer in self.layers:
            x = heard.layers[layer]
            if x.values.shape[2] != head.head.in_features:
                raise ModelError(f"{self.name}: layer {layer} is {x.values.shape[2]} wide, not {head.head.in_features}")
            x = Frames.of(self.norm(x.values), x.mask)
            found.append(head.losses(x, said.tokens, said.lengths))
        return torch.stack(found).mean(0)

    def impossible(self, heard: Heard, said: Said) -> Tensor:
        said = wanted(self.head, said)
        return torch.stack([crowded(heard.layers[layer], said) for layer in self.layers]).all(0)


class AttentionObjective(Objective):
    """Cross entropy of the next token by the head `attention`, with label smoothing (arXiv 1512.00567, section 7)."""

    def __init__(self, weight: float = 1.0, smoothing: float = 0.1) -> None:
        super().__init__("attention", weight)
        self.smoothing = smoothing

    def fit(self, model: Recognizer) -> None:
        head_of(model, self.name, AttentionDecoder)
        ending(model)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        end = ending(model)
        return head_of(model, self.name, AttentionDecoder).losses(
            Memory.of(heard.frames, finished=True),
            said.tokens,
            said.lengths,
            sos=end,
            eos=end,
            smoothing=self.smoothing,
        )


class CassNatObjective(Objective):
    """Cross entropy of all tokens at once by the head `cass_nat`, at the frames where the head `ctc` now says them.

    It trains neither the head `ctc`, which wants a `CTCObjective`, nor alignments (arXiv 2304.07611).
    """

    def __init__(self, weight: float = 1.0, smoothing: float = 0.1) -> None:
        super().__init__("cass_nat", weight)
        self.smoothing = smoothing

    def fit(self, model: Recognizer) -> None:
        head_of(model, self.name, CassNatDecoder)
        head_of(model, "ctc", CTC)
        ending(model)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        end, memory = ending(model), Memory.of(heard.frames, finished=True)
        judge = Aligned(head_of(model, self.name, CassNatDecoder), head_of(model, "ctc", CTC))
        return judge.losses(memory, said.tokens, said.lengths, sos=end, eos=end, smoothing=self.smoothing)

    def impossible(self, heard: Heard, said: Said) -> Tensor:
        return crowded(heard.frames, said)


class TransducerObjective(Objective):
    """-log p(text) by the head `transducer`, over the whole lattice."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__("transducer", weight)

    def fit(self, model: Recognizer) -> None:
        head_of(model, self.name, Transducer)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        lengths = said.lengths.masked_fill(self.impossible(heard, said), 0)
        return head_of(model, self.name, Transducer).loss(heard.frames, said.tokens, lengths)

    def impossible(self, heard: Heard, said: Said) -> Tensor:
        return (heard.frames.lengths == 0) & (said.lengths > 0)


class FusedTransducerObjective(TransducerObjective):
    """The same in kernels that never hold all scores: memory for long texts and large vocabularies, on a GPU."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.fused = FusedLoss()

    def fit(self, model: Recognizer) -> None:
        if reason := self.fused.unable(head_of(model, self.name, Transducer).joint):
            raise unfit(reason)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        lengths = said.lengths.masked_fill(self.impossible(heard, said), 0)
        loss: Tensor = self.fused(head_of(model, self.name, Transducer), heard.frames, said.tokens, lengths)
        return loss


class PrunedTransducerObjective(Objective):
    """The same in bands of `width` labels at each frame alone, which a `simple` lattice finds (arXiv 2206.13236).

    Memory for long texts and large vocabularies. As long as the bands mean little, in the first `warmup` training
    batches, the weight of the simple loss sinks from 1 to `simple`, and that of the pruned one grows from 0.1 to 1.
    """

    seen: Tensor  # training batches so far: a part of the checkpoint

    def __init__(self, weight: float = 1.0, simple: float = 0.5, width: int = 5, warmup: int = 2000) -> None:
        super().__init__("transducer_pruned", weight, heads=("transducer",))
        if not 0 <= simple <= 1 or width < 2 or warmup < 0:
            raise ValueError(f"simple {simple}, width {width}, warmup {warmup}: wanted 0 to 1, 2 or more, 0 or more")
        self.simple, self.width, self.warmup = simple, width, warmup
        self.pruned: nn.Module = nn.Identity()  # until the widths are known
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def fit(self, model: Recognizer) -> None:
        joint = head_of(model, "transducer", Transducer).joint
        frames, labels = joint.frames.in_features, joint.labels.in_features
        self.pruned = PrunedLoss(frames, labels, joint.out.out_features, width=self.width)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        lost = self.impossible(heard, said)
        lengths = said.lengths.masked_fill(lost, 0)
        head = head_of(model, "transducer", Transducer)
        found = self.pruned(head, heard.frames, said.tokens, lengths)
        done = (self.seen / max(self.warmup, 1)).clamp(max=1.0) if self.warmup else torch.ones_like(self.seen)
        if self.training:
            self.seen += 1
        each: Tensor = (1 - done * (1 - self.simple)) * found.simple + (0.1 + 0.9 * done) * found.loss
        return each.masked_fill(lost, 0.0)

    def impossible(self, heard: Heard, said: Said) -> Tensor:
        return said.lengths > heard.frames.lengths * (self.width - 1)
