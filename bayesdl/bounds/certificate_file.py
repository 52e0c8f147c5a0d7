"""Certificates as JSON files."""

from __future__ import annotations

import dataclasses
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from bayesdl._files import read_json, write_atomic
from bayesdl.bounds.certificate import PREDICTORS, Certificate
from bayesdl.bounds.ledger import Ledger
from bayesdl.bounds.theorems import THEOREMS
from bayesdl.errors import FileError

FORMAT = "bayesdl certificate 1"
SOFTWARE = ("bayesdl", "torch", "numpy", "scipy", "pyro-ppl", "gpytorch")


def save(certificate: Certificate, path: Path) -> Path:
    """Write the file; one line for each field, so that it can be read, compared and searched."""
    software = {"python": platform.python_version()} | {name: _version(name) for name in SOFTWARE}
    value = {"format": FORMAT, "software": software, **_to_json(certificate)}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(item, allow_nan=False)}" for name, item in value.items())
    write_atomic(path, f"{{\n{lines}\n}}\n".encode())
    return path


def load(path: Path) -> Certificate:
    """Read what ``save`` wrote.

    Raises:
        FileError: The file is missing or is no certificate.
    """
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise FileError(f"{path} is not a certificate that bayesdl wrote (format {FORMAT!r}).")
    try:
        return _from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{path} is a damaged certificate ({error!r}).") from None


def _to_json(certificate: Certificate, above: Ledger | None = None) -> dict[str, Any]:
    """JSON values; a certificate that stands beside one with the same row ledger has none of its own."""
    mine = certificate.ledger
    beside = [_to_json(other, mine) for other in certificate.beside]
    return {**certificate.to_dict(), "beside": beside, "ledger": None if mine in (None, above) else mine.to_json()}


def _from_json(value: dict[str, Any], above: Ledger | None = None) -> Certificate:
    fields = {entry.name: value[entry.name] for entry in dataclasses.fields(Certificate)}
    if fields["theorem"] not in THEOREMS or fields["predictor"] not in PREDICTORS:
        raise ValueError(f"unknown theorem {fields['theorem']!r} or predictor {fields['predictor']!r}")
    ledger = above if fields["ledger"] is None else Ledger.from_json(fields["ledger"])
    beside = tuple(_from_json(other, ledger) for other in fields["beside"])
    return Certificate(**fields | {"assumptions": tuple(fields["assumptions"]), "beside": beside, "ledger": ledger})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from its sources
        return None
