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
        UserError: it is not one JSON object with distinct keys, or holds NaN or Infinity, which JSON does not have.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{name}: key {twice[:200]!r} stands twice; expected it once")
        return found

    def refuse(constant: str) -> Any:
        raise UserError(f"{name}: holds {constant}, which JSON does not have; expected finite numbers")

    try:
        found = json.loads(text, object_pairs_hook=distinct, parse_constant=refuse)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of thousands of digits, deep nesting
        raise UserError(f"{name}: is no valid JSON ({str(error)[:200]}); get the file again") from error
    if not isinstance(found, dict):
        raise UserError(f"{name}: holds a JSON {type(found).__name__}; expected an object")
    return found


def write_object(path: Path, document: Mapping[str, Any]) -> None:
    """Writes under another name and renames, so that the file is never half there."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
