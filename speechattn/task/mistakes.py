"""What is wrong with a configuration, in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from pydoc import locate
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer

from speechattn.errors import InputError, SpeechAttnError

__all__ = ["ghosts", "lightnings", "readable", "refused"]

KEY = re.compile(r'Parser key "(.+)":')
CLASS = re.compile(r"Problem with given class_path '(.+)':")
UNKNOWN = re.compile(r"[Oo]ption '(\w+)' is not accepted|does not accept option '(\w+)'")
SAID = re.compile(r"class_path='([\w.]+)'")
GIVEN = re.compile(r"Given value: (.*)")
FRAME = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")
WRAPPED = "Does not validate against any"


def readable(message: str) -> str:
    """A message of jsonargparse, of many lines -> the key, what is wrong there, and what may have been meant."""
    keys, owner, reasons = list[str](), "", list[str]()
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        if key := KEY.fullmatch(text):
            keys += [key[1]] if not reasons else []
        elif kind := CLASS.fullmatch(text):
            owner = owner if reasons else kind[1]
        elif text and not text.startswith(FRAME):
            reasons.append(text)
    where = ".".join(keys)
    for reason in reasons:
        if option := UNKNOWN.search(reason):
            name = option[1] or option[2]
            owner = kind[1] if (kind := SAID.search(reason)) else owner
            return f"{where and where + ': '}{owner and owner + ': '}unknown key {name}{meant(name, owner)}" \
                if where else f"{reason}{meant(name, '')}"  # fmt: skip
    plain = [re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", reason) for reason in dict.fromkeys(reasons)]
    value = next((found[1] for found in map(GIVEN.search, reversed(message.splitlines())) if found), "")
    said = " or ".join(plain) or message
    if value and "Got value" not in said and "<" not in value and "NestedArg" not in value:
        said = f"{said}. Got value: {value[:60]}"
    return f"{where and where + ': '}{said}"


def meant(name: str, owner: str) -> str:
    """What a name that is not known may have been."""
    try:
        known = list(signature(locate(owner) if owner else Trainer).parameters)  # type: ignore[arg-type]
    except (ValueError, TypeError, ImportError, AttributeError):
        return ""
    near = get_close_matches(name, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def ghosts(said: Mapping[str, Any], known: Any) -> str:
    """The first key of a file whose value is an empty mapping and of which nothing is left in what was parsed."""
    for key, value in said.items():
        there = key in known
        if value == {} and not there and key not in ("init_args", "dict_kwargs"):
            return key
        inner = known[key] if there else None
        if isinstance(value, Mapping) and isinstance(inner, Mapping | Namespace) and (name := ghosts(value, inner)):
            return f"{key}.{name}"
        rows = zip(value, inner, strict=False) if isinstance(value, list) and isinstance(inner, list) else ()
        for one, other in rows:
            if isinstance(one, Mapping) and isinstance(other, Mapping | Namespace) and (name := ghosts(one, other)):
                return f"{key}.{name}"
    return ""


def lightnings(error: BaseException) -> bool:
    """Lightning raised it: about an option, then, and not in what it calls."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and str(at.tb_frame.f_globals.get("__name__")).startswith("lightning.")


def refused(error: Exception) -> SpeechAttnError:
    """What a constructor raised -> one line that names its class."""
    while str(error).startswith(WRAPPED) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, SpeechAttnError):
        return error
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{constructor(error)}{said}")


def constructor(error: BaseException) -> str:
    """The class whose constructor raised an error."""
    found, at = "", error.__traceback__
    while at is not None:
        owner: Any = at.tb_frame.f_locals.get("self")
        if at.tb_frame.f_code.co_name == "__init__" and type(owner).__module__.split(".")[0] != "jsonargparse":
            found = f"{type(owner).__name__}: "
        at = at.tb_next
    return found
