"""Methods from the command line: a name in lower case and ``--set name=value`` for its settings."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from typing import Any

from bayesdl._registry import method_class
from bayesdl.errors import MethodError
from bayesdl.infer.method import Method


def build_method(name: str, overrides: Sequence[str] = ()) -> Method:
    """A method with its defaults, but for the settings that were given.

    Args:
        name: a method's name in any case.
        overrides: texts such as "warmup=500"; a value is a number, true, false, none, a list [1, 2], or a word.

    Raises:
        MethodError: unknown method or setting, or a value that the method refuses.
    """
    chosen = method_class(name)
    known = [field.name for field in dataclasses.fields(chosen) if field.init]
    settings: dict[str, Any] = {}
    for override in overrides:
        setting, equals, text = override.partition("=")
        if not equals:
            raise MethodError(f"--set {override}: write a setting and its value, as in --set {known[0]}=1.")
        if setting not in known:
            near = difflib.get_close_matches(setting, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise MethodError(f"{chosen.name} has no setting {setting!r}.{hint} There are: {', '.join(known)}.")
        if setting in settings:
            raise MethodError(f"--set {override}: {setting} is given twice.")
        settings[setting] = parse(text)
    try:
        built: Method = chosen(**settings)
    except TypeError as error:  # a missing or incomparable value; the methods' own checks raise MethodError
        raise MethodError(f"{chosen.name}({', '.join(overrides)}): {error}.") from None
    return built


def parse(text: str) -> Any:
    """The value that a text stands for: JSON where it is JSON, None for "none", else the text itself."""
    if text.lower() == "none":
        return None
    try:
        value = json.loads(text.lower() if text.lower() in {"true", "false"} else text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value
