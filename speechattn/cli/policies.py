"""`--policy NAME` and what belongs to it: one table for models that read windows and for those that stream."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from speechattn.decoder.attention import Head
from speechattn.errors import InputError
from speechattn.live.listener import WindowModel
from speechattn.live.suited import THRESHOLD, TRANSLATING, suited
from speechattn.model import Recognizer
from speechattn.model.window import WindowRecognizer
from speechattn.policy import Policy
from speechattn.policy.adaptive import CTCWaitK, WordCounter
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.ed_att import EDAtt
from speechattn.policy.hold import Hold, WaitK
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.policy.monotonic import Stopped
from speechattn.policy.retranslation import Retranslation
from speechattn.pretrained.whisper.load import FRAME_THRESHOLD
from speechattn.search import Search
from speechattn.search.monotonic import MonotonicBeam

__all__ = ["POLICIES", "SETTINGS", "add_policy_options", "build_policy", "build_streaming_policy"]

SETTINGS = ("frame_threshold", "doubt", "attn_threshold", "attn_layer", "agreement", "hold_n", "wait_k", "mask_k")
WAIT = 3  # words, of wait-k


@dataclass(frozen=True)
class Looks:
    """What a model offers to a policy.

    `usual` is the policy that it has by default, `heads` those that align sound and text, `layer` all of a layer of the
    decoder, `words` the sizes of words. `counter` counts the words that were said, and `stops` says that its monotonic
    heads stop at frames.
    """

    usual: Policy | None
    heads: tuple[Head, ...]
    layer: Callable[[int | None], tuple[Head, ...]]
    words: Callable[[Sequence[int]], list[int]]
    counter: WordCounter | None
    stops: bool


def align_att(options: argparse.Namespace, looks: Looks) -> Policy | None:
    """The model's own policy, or AlignAtt if it is asked for and that is another, with what was asked for."""
    given = {
        name: getattr(options, name) for name in ("frame_threshold", "doubt") if getattr(options, name) is not None
    }
    usual = looks.usual
    if options.policy is None and not given:
        return usual
    mine = usual if isinstance(usual, AlignAtt) else replace(AlignAtt.fbk(0, 1), heads=looks.heads)
    return replace(mine, **given)


def align_att_fbk(options: argparse.Namespace, looks: Looks) -> Policy:
    """All heads of one layer."""
    threshold = {} if options.frame_threshold is None else {"frame_threshold": options.frame_threshold}
    layer, heads = options.attn_layer, looks.layer(options.attn_layer)
    return replace(AlignAtt.fbk(layer or 0, len(heads), **threshold), heads=heads)


def ed_att(options: argparse.Namespace, looks: Looks) -> Policy:
    """The heads that align, or all of a layer that is asked for."""
    heads = looks.heads if options.attn_layer is None else looks.layer(options.attn_layer)
    return EDAtt(heads) if options.attn_threshold is None else EDAtt(heads, options.attn_threshold)


def wait_k(options: argparse.Namespace, looks: Looks) -> Policy:
    """Of words by the clock."""
    return WaitK(WAIT if options.wait_k is None else options.wait_k, looks.words)


def ctc_wait_k(options: argparse.Namespace, looks: Looks) -> Policy:
    """Of words that a CTC head hears."""
    if looks.counter is None:
        raise InputError(f"--policy wait-k-ctc: no CTC head of {options.model} hears the words; wait-k counts by time")
    return CTCWaitK(WAIT if options.wait_k is None else options.wait_k, looks.words, counter=looks.counter)


def stopped(options: argparse.Namespace, looks: Looks) -> Policy:
    """Of heads that stop."""
    if not looks.stops:
        raise InputError(f"--policy monotonic: no monotonic heads speak in {options.model}, which could stop")
    return Stopped()


class Choice(NamedTuple):
    """A policy by name: the settings that it has, and how it is made."""

    settings: tuple[str, ...]
    make: Callable[[argparse.Namespace, Looks], Policy | None]
    looks: bool = False  # it needs attention


def counted(kind: Callable[..., Policy], name: str) -> Callable[[argparse.Namespace, Looks], Policy]:
    """Of a kind that has one number."""
    return lambda options, looks: kind() if getattr(options, name) is None else kind(getattr(options, name))


POLICIES = {
    "alignatt": Choice(("frame_threshold", "doubt"), align_att, looks=True),
    "alignatt-fbk": Choice(("frame_threshold", "attn_layer"), align_att_fbk, looks=True),
    "edatt": Choice(("attn_threshold", "attn_layer"), ed_att, looks=True),
    "local-agreement": Choice(("agreement",), counted(LocalAgreement, "agreement")),
    "hold-n": Choice(("hold_n",), counted(Hold, "hold_n")),
    "wait-k": Choice(("wait_k",), wait_k),
    "wait-k-ctc": Choice(("wait_k",), ctc_wait_k),
    "monotonic": Choice((), stopped),
    "retranslation": Choice(("mask_k",), counted(Retranslation, "mask_k")),
}  # fmt: skip


def add_policy_options(group: Any) -> None:
    """Which policy, and what it may be told."""
    group.add_argument("--policy", choices=tuple(POLICIES), help="default alignatt")
    group.add_argument(
        "--frame-threshold", type=int, metavar="N",
        help=f"alignatt: commit a word N frames (of 20 ms) behind the newest sound (default {FRAME_THRESHOLD}; "
        f"{THRESHOLD} where a model streams, {TRANSLATING} where it translates so)",
    )  # fmt: skip
    group.add_argument(
        "--doubt", type=float, metavar="P",
        help="alignatt: a token with a probability below P waits three times as long (default 0: none does)",
    )  # fmt: skip
    group.add_argument(
        "--attn-threshold", type=float, metavar="X",
        help="edatt: commit a word with less than X of its attention on the newest two frames (default 0.1)",
    )  # fmt: skip
    group.add_argument("--attn-layer", type=int, metavar="N", help="alignatt-fbk, edatt: the decoder layer to look at")
    group.add_argument("--agreement", type=int, metavar="N", help="local-agreement: drafts that must agree (default 2)")
    group.add_argument("--hold-n", type=int, metavar="N", help="hold-n: tokens that are held back (default 6)")
    group.add_argument(
        "--wait-k", type=int, metavar="K", help=f"wait-k, wait-k-ctc: words that are waited for (default {WAIT})"
    )
    group.add_argument(
        "--mask-k", type=int, metavar="K", help="retranslation: the last K tokens are not shown (default 0)"
    )


def chosen(options: argparse.Namespace, looks: Looks) -> Policy | None:
    """The policy that the options name; InputError for a setting that it does not have."""
    name = options.policy or "alignatt"
    choice = POLICIES[name]
    for setting in SETTINGS:
        if getattr(options, setting) is not None and setting not in choice.settings:
            owners = ", ".join(other for other, its in POLICIES.items() if setting in its.settings)
            raise InputError(f"--{setting.replace('_', '-')} belongs to {owners}; {name} has no such setting")
    if options.frame_threshold is not None and options.frame_threshold < 0:
        raise InputError(f"--frame-threshold {options.frame_threshold}: 0 or more frames")
    if options.doubt is not None and not 0 <= options.doubt <= 1:
        raise InputError(f"--doubt {options.doubt}: a probability from 0 to 1")
    try:
        return choice.make(options, looks)
    except ValueError as error:
        raise InputError(f"--policy {name}: {error}") from error


def build_policy(options: argparse.Namespace, model: WindowModel) -> Policy:
    """Of a model that reads windows."""
    layers, heads = model.decoder_size

    def layer(n: int | None) -> tuple[Head, ...]:
        n = layers // 2 if n is None else n
        if not 0 <= n < layers:
            raise InputError(f"--attn-layer {n}: this model has decoder layers 0 to {layers - 1}")
        return tuple((n, head) for head in range(heads))

    words, usual = partial(model.tokenizer.words, spaceless=model.spaceless), model.policy()
    counter = model.counter if isinstance(model, WindowRecognizer) else None
    looks = Looks(usual, model.alignment_heads, layer, words, counter, isinstance(usual, Stopped))
    return chosen(options, looks) or model.policy()


def build_streaming_policy(options: argparse.Namespace, model: Recognizer, search: Search) -> Policy | None:
    """Of a model that streams; None: the one that the search is used to. InputError for one that it cannot."""
    given = [f"--{name.replace('_', '-')}" for name in ("policy", *SETTINGS) if getattr(options, name) is not None]
    if not given and not search.heads:
        return None
    if given and not search.prompt:
        raise InputError(f"{given[0]} does nothing with {options.model}, whose search lags behind the sound")
    if options.attn_layer is not None:
        raise InputError(f"--attn-layer does nothing with {options.model}, which streams: it gives its alignment heads")
    if options.policy == "alignatt-fbk":
        raise InputError(f"--policy alignatt-fbk is for models that read windows; {options.model} streams: alignatt")
    words, stops = partial(model.tokenizer.words, spaceless=model.spaceless), isinstance(search, MonotonicBeam)
    looks = Looks(suited(None, search), search.heads, lambda _: search.heads, words, model.counter, stops)
    policy = chosen(options, looks)
    if POLICIES[options.policy or "alignatt"].looks and not search.heads:
        raise InputError(
            f"{given[0]} does nothing with {options.model}: its search gives no attention, as --search aligned would"
        )
    return policy
