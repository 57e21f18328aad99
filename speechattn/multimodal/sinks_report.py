"""Sinks and massive activations of many sequences, summed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from speechattn.multimodal.causal import Inspected
from speechattn.multimodal.layout import BOS, KINDS, NOTHING, SINK
from speechattn.multimodal.sinks import GROUPS, Attention, Thresholds, attention, grouped, hidden

__all__ = ["Example", "Layer", "Report", "State", "Tally"]

BETWEEN = tuple(name for kind, name in enumerate(KINDS) if kind not in (NOTHING, BOS, SINK))
SUNK = GROUPS.index("sinks")
LISTED = 16  # features and places, the most frequent first
SHARED = 0.5  # of the largest features, from which two groups share them: with the usual 3, two are the same


@dataclass(frozen=True)
class Layer:
    """Attention of a layer, by kind of place: only kinds that are there.

    `sinks` in a sequence, by the mean of all heads; `head_sinks` likewise, of each head; `received`, the mean share of
    the attention of later queries; `share` of all attention that lies on sinks.
    """

    sinks: Mapping[str, float]
    head_sinks: tuple[Mapping[str, float], ...]
    received: Mapping[str, float]
    share: Mapping[str, float]


@dataclass(frozen=True)
class State:
    """States behind a layer. `cosine` with BOS and its square `cosine2`, by kind of place; `median` magnitude.

    By group (BOS, sinks between, others, dedicated): `ratio`, the largest activation in medians, mean over sequences;
    `features`, the largest ones there, mean over places. `largest` is the largest magnitude of all. `overlap`: of the
    features of BOS and of sinks, the share that is in both (Jaccard). `alike`: the share of sinks whose cosine with BOS
    is that large, `sink_cosine2` the mean of its square; all three None without sinks. `massive` activations in a
    sequence by kind; `massive_features`: in how many places; `massive_places`: where they stand, in how many sequences.
    """

    cosine: Mapping[str, float]
    cosine2: Mapping[str, float]
    median: float
    largest: float
    ratio: Mapping[str, float]
    features: Mapping[str, tuple[int, ...]]
    overlap: float | None
    alike: float | None
    sink_cosine2: float | None
    massive: Mapping[str, float]
    massive_features: Mapping[int, int]
    massive_places: Mapping[int, int]


@dataclass(frozen=True)
class Example:
    """The first sequence: names of its places' kinds, and what they get in each layer, mean over heads [N][S].

    None for a place with too few later queries.
    """

    kinds: tuple[str, ...]
    received: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Report:
    """What was found in `sequences`, of `dim` features; `places` of each kind in a sequence.

    `layers` are 1 to N, `states` 0 to N, of which 0 are the embeddings. `sink_places`: where sinks between BOS and the
    end stood, in any layer, and in how many sequences.
    """

    thresholds: Thresholds
    sequences: int
    dim: int
    places: Mapping[str, float]
    layers: tuple[Layer, ...]
    states: tuple[State, ...]
    sink_places: Mapping[int, int]
    example: Example

    def to_json(self) -> dict[str, Any]:
        """The numbers, to 6 digits, as JSON has them."""
        found: dict[str, Any] = plain(asdict(self))
        return found

    def between(self, figures: Mapping[str, float]) -> float:
        """The sum over kinds of places between BOS and the end, without tokens made to be sinks."""
        return sum(value for name, value in figures.items() if name in BETWEEN)

    def peak(self) -> int:
        """The number of the state in which BOS is largest, in medians."""
        return max(range(len(self.states)), key=lambda i: self.states[i].ratio.get("BOS", 0.0))

    def summary(self) -> str:
        """In a sentence or three: are there sinks and massive activations, where, and do they share features."""
        bos = max(layer.sinks.get("BOS", 0.0) for layer in self.layers)
        counts = [self.between(layer.sinks) for layer in self.layers]
        most = max(range(len(counts)), key=counts.__getitem__)
        said = [f"BOS is a sink in {100 * bos:.0f} % of {self.sequences} sequences"]
        kinds = [name for name in BETWEEN if any(layer.sinks.get(name) for layer in self.layers)]
        said.append(
            f"intermediate sinks: {', '.join(kinds)}, at most {counts[most]:.2f} a sequence (layer {most + 1})"
            if kinds else "no intermediate sinks"
        )  # fmt: skip
        heavy = [number for number, state in enumerate(self.states) if any(state.massive.values())]
        names = sorted({name for number in heavy for name, n in self.states[number].massive.items() if n})
        said.append(
            f"massive activations behind layers {heavy[0]} to {heavy[-1]} at {', '.join(names)}"
            if heavy else "no massive activations"
        )  # fmt: skip
        return f"{'; '.join(said)}. {self.shared()}"

    def shared(self) -> str:
        """Whether BOS and sinks have their largest features in common, where BOS is largest."""
        number = self.peak()
        state = self.states[number]
        ratios = ", ".join(f"{name} {value:.1f}" for name, value in state.ratio.items())
        said = f"Largest activation / median behind layer {number}: {ratios}."
        if state.overlap is None or state.alike is None:
            return said
        mine, theirs = (", ".join(map(str, state.features[group])) for group in ("BOS", "sinks"))
        verdict = "share" if state.overlap >= SHARED else "do not share"
        return (
            f"{said} BOS and intermediate sinks {verdict} feature indices there ({mine} and {theirs}, Jaccard "
            f"{state.overlap:.2f}); {100 * state.alike:.0f} % of these sinks have a cosine of at least "
            f"{self.thresholds.alike:g} with BOS."
        )


def plain(value: Any) -> Any:
    """Mappings, lists and numbers to 6 digits."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Sums(dict[str, Tensor]):
    """Tensors by name, added up in float64."""

    def add(self, name: str, value: Tensor) -> None:
        """Of the shape that all of this name have."""
        value = value.detach().double()
        self[name] = self[name] + value if name in self else value


class Tally:
    """Adds up what batches show: `add` each, then `result`. Law: batches of any size give the same report."""

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self.sums, self.largest = Sums(), dict[int, float]()
        self.at, self.heavy = Counter[int](), dict[int, Counter[int]]()
        self.example: Example | None = None

    @torch.no_grad()
    def add(self, inspected: Inspected, kinds: Tensor) -> None:
        """Sequences and the kinds of their places [B, S]. ValueError for kinds that do not fit."""
        if kinds.shape != inspected.mask.shape or not torch.equal(kinds != NOTHING, inspected.mask):
            raise ValueError("kinds of places: wanted one for each place that is there, and NOTHING elsewhere")
        if not (kinds[:, :1] == BOS).all():
            raise ValueError("every sequence begins with BOS")
        kinds = kinds.cpu()
        seen = attention(inspected, self.thresholds)
        places = torch.nn.functional.one_hot(kinds, len(KINDS)).double()  # [B, S, K]
        groups = grouped(seen.sinks, kinds)
        self.count(seen, groups, places)
        self.measure(inspected, groups, places)
        if self.example is None:
            self.example = example(seen, kinds)

    def count(self, seen: Attention, groups: Tensor, places: Tensor) -> None:
        """Sinks."""
        add, got = self.sums.add, seen.received.mean(2).double()
        add("rows", torch.tensor(len(places)))
        add("places", places.sum((0, 1)))
        add("judged", torch.einsum("bs,bsk->k", seen.judged.double(), places))
        add("sinks", torch.einsum("nbs,bsk->nk", seen.sinks.double(), places))
        add("head_sinks", torch.einsum("nbhs,bsk->nhk", seen.head_sinks.double(), places))
        add("received", torch.einsum("nbs,bsk->nk", got, places))
        add("share", torch.einsum("nbs,bsk->nk", seen.share.double(), places))
        self.at.update(groups[SUNK].nonzero()[:, 1].tolist())

    def measure(self, inspected: Inspected, groups: Tensor, places: Tensor) -> None:
        """States, one after the other."""
        weights, found = groups.double(), list[dict[str, Tensor]]()
        self.sums.add("in_group", weights.sum((1, 2)))
        self.sums.add("with_group", groups.any(2).sum(1))
        for number, state in enumerate(inspected.states):
            inside = hidden(state, inspected.mask, self.thresholds)
            cosine, relative, heavy = inside.cosine.double(), inside.relative.double(), inside.massive
            found.append({
                "cosine": torch.einsum("bs,bsk->k", cosine, places),
                "cosine2": torch.einsum("bs,bsk->k", cosine.square(), places),
                "median": inside.median.sum(),
                "massive": torch.einsum("bsd,bsk->k", heavy.double(), places),
                "massive_features": heavy.sum((0, 1)),
                "ratio": relative.amax(2).masked_fill(~groups, 0).amax(2).sum(1),  # [G, B, S] -> [G]
                "profile": torch.einsum("bsd,gbs->gd", relative, weights),
                "alike": ((cosine >= self.thresholds.alike) & groups[SUNK]).sum(),
                "sink_cosine2": (cosine.square() * groups[SUNK]).sum(),
            })  # fmt: skip
            self.largest[number] = max(self.largest.get(number, 0.0), float(inside.largest.max()))
            self.heavy.setdefault(number, Counter()).update(heavy.any(2).nonzero()[:, 1].tolist())
        for name in found[0]:
            self.sums.add(name, torch.stack([one[name].double() for one in found]))

    def result(self) -> Report:
        """The report. ValueError where nothing was added."""
        if self.example is None:
            raise ValueError("nothing was added")
        sums, there = self.sums, self.sums["places"] > 0
        rows = float(sums["rows"])

        def by_kind(values: Tensor, over: Tensor | float = rows, *, among: Tensor = there) -> dict[str, float]:
            means = (values / over).tolist()
            return {KINDS[k]: means[k] for k in range(1, len(KINDS)) if among[k]}

        layers = tuple(
            Layer(
                by_kind(sums["sinks"][n]), tuple(by_kind(head) for head in sums["head_sinks"][n]),
                by_kind(sums["received"][n], sums["judged"], among=sums["judged"] > 0), by_kind(sums["share"][n]),
            ) for n in range(len(sums["sinks"]))
        )  # fmt: skip
        states = tuple(
            State(
                by_kind(sums["cosine"][n], sums["places"]), by_kind(sums["cosine2"][n], sums["places"]),
                float(sums["median"][n]) / rows, self.largest[n], massive=by_kind(sums["massive"][n]),
                massive_features=frequent(dict(enumerate(sums["massive_features"][n].long().tolist()))),
                massive_places=frequent(self.heavy[n]), **self.compared(n),
            ) for n in range(len(sums["median"]))
        )  # fmt: skip
        dim = sums["massive_features"].shape[1]
        places = by_kind(sums["places"])
        return Report(self.thresholds, int(rows), dim, places, layers, states, frequent(self.at), self.example)

    def compared(self, n: int) -> dict[str, Any]:
        """Groups of places behind layer n."""
        sums, top = self.sums, self.thresholds.top
        there = [g for g in range(len(GROUPS)) if sums["in_group"][g] > 0]
        features = {GROUPS[g]: tuple(sums["profile"][n, g].topk(min(top, sums["profile"].shape[2])).indices.tolist())
                    for g in there}  # fmt: skip
        means = {name: float(sums[name][n] / sums["in_group"][SUNK]) if SUNK in there else None
                 for name in ("alike", "sink_cosine2")}  # fmt: skip
        return {
            "ratio": {GROUPS[g]: float(sums["ratio"][n, g] / sums["with_group"][g]) for g in there},
            "features": features,
            "overlap": jaccard(features["BOS"], features["sinks"]) if SUNK in there else None,
            **means,
        }


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of what is in either that is in both."""
    return len({*one} & {*other}) / len({*one} | {*other})


def frequent(counts: Mapping[int, int]) -> dict[int, int]:
    """Those that are not 0, the most frequent first, so many as are listed."""
    return dict(sorted(((i, n) for i, n in counts.items() if n), key=lambda one: (-one[1], one[0]))[:LISTED])


def example(seen: Attention, kinds: Tensor) -> Example:
    """Of the first row."""
    n = int((kinds[0] != NOTHING).sum())
    got, judged = seen.received[:, 0, :, :n].mean(1).tolist(), seen.judged[0, :n].tolist()
    rows = tuple(tuple(x if ok else None for x, ok in zip(row, judged, strict=True)) for row in got)
    return Example(tuple(KINDS[kind] for kind in kinds[0, :n].tolist()), rows)
