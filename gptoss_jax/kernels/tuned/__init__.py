"""Block sizes that were found fast on a kind of device: data, in <op>.<implementation>.json. Knows files, no kernel.

    {"NVIDIA H100 80GB HBM3": {"decode": {"rows": 64, …}, "prefill": {…}, …}, …}      a kernel with several forms
    {"TPU v6 lite": {"rows": 512, …}, …}                                               a kernel with one

Kinds are jax's `device_kind`. Under "default" stand the sizes that a kernel takes by itself, on all other kinds; a kind
that has only some of the forms takes the others from there. `gptoss-jax bench kernels --tune` makes the entries.
"""

import functools
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.errors import UserError

Sizes = Mapping[str, int]
Entry = Mapping[str, Any]  # Sizes, or Sizes by form

_DEFAULT = "default"
_FOLDER = importlib.resources.files(__name__)


def find(op: str, impl: str, *, device_kind: str | None) -> Entry | None:
    """The sizes, or those of every form, for this kind of device; None where nobody has looked for them."""
    found = _table(op, impl).get(device_kind or _DEFAULT)
    if found is None or device_kind in (None, _DEFAULT):
        return None
    return found if is_one_form(found) else {**default(op, impl), **found}


def default(op: str, impl: str) -> Entry:
    """What the kernel takes by itself; empty where it has nothing to choose."""
    return _table(op, impl).get(_DEFAULT, {})


def is_one_form(entry: Entry) -> bool:
    return any(isinstance(size, int) for size in entry.values())


def save(op: str, impl: str, found: Entry, *, device_kind: str, folder: Path | None = None) -> Path:
    """Puts what was found for a kind of device into the file, beside the forms that it has; gives the file.

    Raises:
        UserError: the package lies where no files can be written.
    """
    path = (folder or Path(str(_FOLDER))) / _file(op, impl)
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    table[device_kind] = dict(found) if is_one_form(found) else {**table.get(device_kind, {}), **found}
    try:
        path.write_text(_written(table), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): name a folder of yours with --tuned-folder"
        ) from error
    _table.cache_clear()
    return path


@functools.cache
def _table(op: str, impl: str) -> Mapping[str, Any]:
    file = _FOLDER / _file(op, impl)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _file(op: str, impl: str) -> str:
    return f"{op}.{impl}.json"


def _written(table: Mapping[str, Any]) -> str:
    """One line for each set of sizes, so that a change of one is a change of one line."""
    kinds = []
    for kind, entry in table.items():
        if is_one_form(entry):
            kinds.append(f"  {json.dumps(kind)}: {json.dumps(entry)}")
            continue
        forms = ",\n".join(f"    {json.dumps(form)}: {json.dumps(sizes)}" for form, sizes in entry.items())
        kinds.append(f"  {json.dumps(kind)}: {{\n{forms}\n  }}")
    return "{\n" + ",\n".join(kinds) + "\n}\n"
