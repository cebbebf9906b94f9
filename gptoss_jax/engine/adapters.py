"""Which of a model's adapters a request takes, by name. Knows names and their order; knows no weights, no request."""

from collections.abc import Sequence

from flax import nnx

from gptoss_jax.engine.sequence import NO_ADAPTER
from gptoss_jax.errors import UserError
from gptoss_jax.model.layers import LowRank
from gptoss_jax.model.transformer import GptOss


def number_of(name: str | None, names: Sequence[str]) -> int:
    """Where the name stands among the model's adapters; no name is the model without any.

    Raises:
        UserError: it is none of them.
    """
    if name is None:
        return NO_ADAPTER
    if name not in names:
        known = ", ".join(map(repr, names)) or "none: it was opened without adapters"
        raise UserError(f"there is no adapter {name[:100]!r}; the engine has {known}")
    return names.index(name)


def check_names(names: Sequence[str], model: GptOss) -> None:
    """A name for each of the model's adapters; or none, where there is one and all requests are to take it.

    Raises:
        UserError: there are more names than adapters, or fewer, or one of them twice.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two adapters are named {twice!r}; expected a name of its own for each")
    attached = num_attached(model)
    if len(names) != attached and (names or attached > 1):
        raise UserError(
            f"the model has {attached} adapters and the engine was told {len(names)} names of them; expected a name "
            "for each, in the order in which they were attached"
        )


def num_attached(model: GptOss) -> int:
    """How many adapters the model has."""
    added = (module for _, module in nnx.iter_modules(model) if isinstance(module, LowRank))
    return next((len(module.ranks) for module in added), 0)
