"""What a model of random weights does with a constraint: any allowed id, each as likely as the others."""

from collections.abc import Callable

import numpy as np

from gptoss_jax.constrain.grammars import Held
from gptoss_jax.harmony.tokenizer import Tokenizer


def allowed_ids(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def choose_blindly(
    make: Callable[[], Held], tokenizer: Tokenizer, rng: np.random.Generator, *, most: int, hurry: float = 0.0
) -> tuple[list[int], str]:
    """Ids up to a stop id, or `most` of them; and which of the two it was.

    `hurry` is how often a special token is taken where one is allowed: of 200,000 ids it would hardly ever come.
    """
    constraint = make()
    first = tokenizer.special("<|return|>")
    ids: list[int] = []
    while len(ids) < most:
        allowed = allowed_ids(constraint.mask())
        specials = allowed[allowed >= first]
        if specials.size and rng.random() < hurry:
            allowed = specials
        ids.append(int(rng.choice(allowed)))
        if ids[-1] in tokenizer.stop_ids:
            return ids, "stop"
        constraint.accept(ids[-1])
    return ids, "length"
