"""Small JSON documents on disk: read with doubts, written whole or not at all. Knows no document's meaning."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.errors import UserError

_LARGEST = 100_000_000


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file.

    Raises:
        UserError: no such file, or not one JSON object of at most 100 MB with distinct keys.
    """
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise UserError(f"{path} has {size:,} bytes; expected a JSON document of at most {_LARGEST:,}")
        return parse_object(path.read_bytes(), name=str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_object(text: bytes, *, name: str) -> dict[str, Any]:
    """The JSON object in `text`; `name` is what errors call it.

    Raises:
        UserError: it is not one JSON object with distinct keys of valid Unicode, or holds NaN or Infinity.
    """
    try:
        found = json.loads(text.decode(), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # bad syntax, bad UTF-8, a number of thousands of digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise UserError(f"{name}: expected JSON, but {reason}; copy or download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{name}: expected a JSON object, found {text[:20]!r}; copy or download it again")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice[:80]!r} stands twice")
    for key in found:
        key.encode()  # half of a surrogate pair is no character: UnicodeEncodeError is a ValueError
    return found


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def write_object(path: Path, document: Mapping[str, Any]) -> None:
    """Writes under another name and renames, so that the file is never half there."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
