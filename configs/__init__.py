"""The models and training runs that have a name, each a file beside this one. Knows no weights and no arrays."""

import difflib
import importlib.resources
import json
from pathlib import Path

from gptoss_jax.errors import UserError
from gptoss_jax.model.config import ModelConfig

_HERE = importlib.resources.files(__name__)
_MODELS, _TRAIN = _HERE / "models", _HERE / "train"


def model_names() -> tuple[str, ...]:
    """The names that `model_config` takes, in alphabetical order."""
    files = (entry.name for entry in _MODELS.iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in files if name.endswith(".json")))


def model_config(name: str) -> ModelConfig:
    """The sizes of the released model of that name, or of `tiny`, whose sizes all differ.

    Raises:
        UserError: no model has that name.
    """
    names = model_names()
    if name not in names:
        raise UserError(f"no model is named {name!r}: {_hint(name, names)}expected one of {', '.join(names)}")
    return ModelConfig.from_json(json.loads((_MODELS / f"{name}.json").read_text(encoding="utf-8")))


def train_config_names() -> tuple[str, ...]:
    """The names that `train_config_file` takes, in alphabetical order."""
    files = (entry.name for entry in _TRAIN.iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


def train_config_file(name: str) -> Path:
    """The training configuration of that name; or the file, if there is one at this path.

    Raises:
        UserError: neither is there.
    """
    if Path(name).is_file():
        return Path(name)
    names = train_config_names()
    if name not in names:
        raise UserError(
            f"{name} is no file, and no training configuration is named so: {_hint(name, names)}"
            f"expected a .toml file or one of {', '.join(names)}"
        )
    return Path(str(_TRAIN / f"{name}.toml"))


def _hint(name: str, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}? " if close else ""
