"""Which settings of which policies `speechattn curves` goes through: `--policies` and `--sweep`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from speechattn.cli.options import STREAMS, WINDOWS, add_session_options
from speechattn.cli.policies import POLICIES, SETTINGS
from speechattn.errors import InputError
from speechattn.score.curves import Setting

__all__ = ["USUAL", "at", "parse_sweeps", "settings_of"]

LOOKS = {"min_chunk_size": (0.5, 1.0, 1.5, 2.0, 3.0), "chunk_ms": (160, 320, 640, 1280)}  # windows, streams
USUAL: dict[str, tuple[str, tuple[float, ...]]] = {
    "alignatt": ("frame_threshold", (2, 5, 10, 20, 40, 80)),
    "alignatt-fbk": ("frame_threshold", (2, 5, 10, 20, 40, 80)),
    "edatt": ("attn_threshold", (0.6, 0.4, 0.2, 0.1, 0.05, 0.03)),
    "hold-n": ("hold_n", (2, 4, 6, 8, 12)),
    "wait-k": ("wait_k", (1, 3, 5, 7, 9)),
    "wait-k-ctc": ("wait_k", (1, 3, 5, 7, 9)),
    "retranslation": ("mask_k", (0,)),
}
POLICIES_OF_A_PICTURE = ("alignatt", "edatt", "local-agreement", "hold-n", "wait-k")
Sweep = tuple[str, str, tuple[float, ...]]


def session_actions() -> dict[str, argparse.Action]:
    """Options of a session by their names."""
    parser = argparse.ArgumentParser()
    add_session_options(parser)
    return {action.dest: action for action in parser._actions}


def parse_sweeps(texts: Sequence[str]) -> list[Sweep]:
    """`POLICY=V,V` (its usual option) or `POLICY:OPTION=V,V`; InputError for what is none."""
    actions, found = session_actions(), []
    for text in texts:
        left, equals, values = text.partition("=")
        policy, _, option = left.partition(":")
        if not equals or policy not in POLICIES:
            raise InputError(f"--sweep {text}: wanted POLICY[:OPTION]=VALUE,VALUE of {', '.join(POLICIES)}")
        name = option.replace("-", "_") if option else USUAL.get(policy, ("", ()))[0]
        if not name:
            raise InputError(
                f"--sweep {text}: {policy} has no usual option; say which, as in {policy}:min-chunk-size=1,2"
            )
        if name not in actions or actions[name].type not in (int, float):
            raise InputError(f"--sweep {text}: --{option} is no option of a session with a number")
        try:
            kind: Any = actions[name].type
            found.append((policy, name, tuple(kind(value) for value in values.split(","))))
        except ValueError as error:
            raise InputError(f"--sweep {text}: {error}") from error
    return found


def settings_of(policies: Sequence[str], sweeps: Sequence[Sweep], *, windows: bool) -> list[Setting]:
    """Every point: the sweeps that are given, and the usual one of each policy without. InputError where two agree.

    A policy without an option of its own looks more or less often at the sound.
    """
    if unknown := [name for name in policies if name not in POLICIES]:
        raise InputError(f"--policies {unknown[0]}: wanted some of {', '.join(POLICIES)}")
    if homeless := [policy for policy, _, _ in sweeps if policy not in policies]:
        raise InputError(f"--sweep {homeless[0]}: --policies has no {homeless[0]}")
    looks = "min_chunk_size" if windows else "chunk_ms"
    found = list[Setting]()
    for policy in policies:
        mine = [sweep for sweep in sweeps if sweep[0] == policy]
        for _, option, values in mine or [(policy, *USUAL.get(policy, (looks, LOOKS[looks])))]:
            foreign = STREAMS if windows else WINDOWS
            if option in foreign:
                raise InputError(f"--sweep {policy}:{option.replace('_', '-')}: this model has no such option")
            found += [Setting(policy, option, value) for value in values]
    if len(set(found)) < len(found):
        raise InputError("--sweep: a point is there twice")
    return found


def at(options: argparse.Namespace, setting: Setting | None) -> argparse.Namespace:
    """The options of a session at one point (None: offline).

    Settings of policies that are given as options hold for those policies that have them.
    """
    said = {name: value for name, value in vars(options).items() if name not in ("policies", "sweep", "range", "unit")}
    own = () if setting is None else POLICIES[setting.policy].settings
    said |= {name: None for name in SETTINGS if name not in own}
    if setting is not None:
        said["policy"] = setting.policy
        if setting.option is not None:
            said[setting.option] = setting.value
    return argparse.Namespace(**said)
