"""Priors and likelihoods as JSON: a class name from a fixed table and its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from bayesdl.errors import FileError, ModelRequired


def encode(value: Any, table: Mapping[str, type]) -> Any:
    """A frozen dataclass of the table, with the values in its fields, as JSON.

    Raises:
        ModelRequired: a class that is not in the table (a subclass of a listed one neither): it is the user's code.
    """
    if is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        if table.get(name) is not type(value):
            raise ModelRequired(
                f"{type(value).__qualname__} is not one of bayesdl's own ({', '.join(sorted(table))}), so a file "
                "cannot hold it; pass model=... to load."
            )
        return {"class": name, **{field.name: encode(getattr(value, field.name), table) for field in fields(value)}}
    if isinstance(value, tuple):
        return [encode(item, table) for item in value]
    return value


def decode(config: Any, table: Mapping[str, type]) -> Any:
    """The inverse of ``encode``; names are looked up in the table, never imported.

    Raises:
        ModelRequired: a class name that is not in the table.
        FileError: the fields do not fit the class.
    """
    if isinstance(config, list):
        return tuple(decode(item, table) for item in config)
    if not isinstance(config, dict):
        return config
    name = config.get("class")
    if not isinstance(name, str) or name not in table:
        raise ModelRequired(f"The file asks for {name!r}, which this version of bayesdl does not know; pass model=...")
    arguments = {key: decode(item, table) for key, item in config.items() if key != "class"}
    try:
        return table[name](**arguments)
    except (TypeError, ValueError) as error:
        raise FileError(f"The file's description of {name} is damaged: {error}.") from error
