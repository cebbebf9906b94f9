"""From logits to the next id. Knows scores; knows no model and no text."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from gptoss_jax.errors import UserError


def check_sampling(*, temperature: float, top_k: int, top_p: float) -> None:
    """Raises UserError for a setting outside its range."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; expected 0 (greedy) or more")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}; expected 0 (off) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; expected more than 0, at most 1 (off)")


def sample(
    logits: Float[Array, "B V"],
    key: Key[Array, ""],
    *,
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " B"]:
    """One id for each row.

    Args:
        logits: float32 scores.
        key: consumed; give a new one to each call.
        temperature: 0 takes the best id, ties to the lower id.
        top_k: only the k best ids, 0 for all.
        top_p: of those only the best ids whose probabilities, at this temperature and among those, add up to top_p;
            the one that crosses it is included.
    """

    def draw() -> Int[Array, " B"]:
        order = jnp.argsort(logits, axis=-1, descending=True)  # stable: of equals the lower id first
        scaled = jnp.take_along_axis(logits, order, axis=-1) / temperature
        rank = jnp.arange(logits.shape[-1])
        scaled = jnp.where((top_k == 0) | (rank < top_k), scaled, -jnp.inf)
        probabilities = jax.nn.softmax(scaled, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = (before < top_p) | (rank == 0)
        place = jax.random.categorical(key, jnp.where(kept, scaled, -jnp.inf), axis=-1)
        return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)

    def best() -> Int[Array, " B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return lax.cond(temperature > 0, draw, best)
