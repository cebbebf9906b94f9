"""The public names, each imported when it is first used: `import gptoss_jax` alone loads neither jax nor flax."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Each name and the module it lives in; __init__.pyi says the same to type checkers.
_HOMES = {
    "Chat": "gptoss_jax.chat",
    "Engine": "gptoss_jax.engine.engine",
    "EngineSettings": "gptoss_jax.engine.settings",
    "GptOss": "gptoss_jax.model.transformer",
    "ModelConfig": "gptoss_jax.model.config",
    "Request": "gptoss_jax.engine.request",
    "SamplingParams": "gptoss_jax.engine.request",
    "TurnSettings": "gptoss_jax.chat",
    "generate": "gptoss_jax.engine.generate",
    "load": "gptoss_jax.checkpoint",
    "load_tokenizer": "gptoss_jax.harmony.tokenizer",
    "make_mesh": "gptoss_jax.sharding",
    "moderate": "gptoss_jax.moderation",
    "tool": "gptoss_jax.tools.functions",
}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]  (it reads the stub)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
