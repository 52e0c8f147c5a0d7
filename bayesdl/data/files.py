"""Reading data files, packed by gzip or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from bayesdl.errors import FileError


def read_bytes(path: str | Path) -> bytes:
    """The content of a file; gzip files, known by their first two bytes, are unpacked.

    Raises:
        FileError: the file is missing, cannot be opened, or its gzip stream is damaged.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileError(f"{path} does not exist; check the path (from {Path.cwd()}).") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path} is a damaged gzip file ({error}); fetch it again.") from None
