"""The models that have a name, each a config.json beside this file. Knows no weights and no other settings."""

import difflib
import importlib.resources
import json

from gptoss_jax.errors import UserError
from gptoss_jax.model.config import ModelConfig

_MODELS = importlib.resources.files(__name__) / "models"


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
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"no model is named {name!r}: {hint}expected one of {', '.join(names)}")
    return ModelConfig.from_json(json.loads((_MODELS / f"{name}.json").read_text(encoding="utf-8")))
