"""From logits to the next id, wherever the vocabulary lies. Knows scores; knows no model, no mesh and no text.

Nothing is sorted. The cut of top_k or top_p is the score of the last id that is kept, and is found digit by digit: its
bits are a number, and sums over the ids from fifteen candidates up tell its next four bits. So of a vocabulary that is
cut over devices only such sums travel, never the scores: XLA makes them of plain reductions over the last axis.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from gptoss_jax.errors import UserError

_DIGIT = 4  # bits that one pass over the scores decides


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

    The key gives each row and id its own noise, however many ids pad the vocabulary and wherever they lie: the same
    logits and key give the same ids on any mesh. (But for top_p, whose sums of float32 shards differ in the last bit,
    an id that is within about 1e-6 of top_p may fall on either side of the cut.)

    Args:
        logits: float32 scores; an id with -inf, as padding has, is never drawn.
        key: consumed; give a new one to each call.
        temperature: 0 takes the best id, ties to the lower id.
        top_k: only the k best ids, 0 for all.
        top_p: of those only the best ids whose probabilities, at this temperature and among those, add up to top_p;
            the one that crosses it is included.
    """

    def draw() -> Int[Array, " B"]:
        best = jnp.max(logits, axis=-1, keepdims=True)
        # The best is 0 by decree: at a temperature that is a denormal the quotient may be 0/0.
        scaled = jnp.where(logits == best, 0.0, (logits - best) / temperature)
        kept = keep(logits, jnp.exp(scaled), top_k=top_k, top_p=top_p)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(jax.random.split(key, len(logits)))
        return jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)

    def greedy() -> Int[Array, " B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return lax.cond(temperature > 0, draw, greedy)


def keep(
    logits: Float[Array, "B V"], odds: Float[Array, "B V"], *, top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Bool[Array, "B V"]:
    """Which ids top_k and then top_p leave; odds are probabilities up to a factor, and grow with the logits."""
    order = _order(logits)

    def best_k() -> Bool[Array, "B V"]:
        return _first(order, jnp.ones_like(odds), jnp.broadcast_to(top_k.astype(jnp.float32), order.shape[:1]))

    def best_p() -> Bool[Array, "B V"]:
        left = jnp.where(among, odds, 0.0)
        return among & _first(order, left, top_p * jnp.sum(left, axis=-1))

    everything = jnp.ones_like(logits, bool)
    among = lax.cond((top_k > 0) & (top_k < logits.shape[1]), best_k, lambda: everything)
    return lax.cond(top_p < 1, best_p, lambda: among)


def _order(logits: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Numbers that compare as the scores do: of float bits those of negatives descend, and the zeros are two."""
    bits = lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _first(order: UInt32[Array, "B V"], weights: Float[Array, "B V"], budget: Float[Array, " B"]) -> Bool[Array, "B V"]:
    """The ids before which, highest number first and of equals lower id first, weights have not used the budget up."""
    cut, above = _cut(order, weights, budget, bits=32)
    higher, equal = order > cut[:, None], order == cut[:, None]

    def lower_ids() -> Bool[Array, "B V"]:
        """As many of the equals as the budget has room for, by the same search among ids that count down."""
        size = order.shape[1]
        countdown = jnp.broadcast_to(size - 1 - lax.iota(jnp.uint32, size), order.shape)
        last, _ = _cut(countdown, jnp.where(equal, weights, 0.0), budget - above, bits=size.bit_length())
        return equal & (countdown >= last[:, None])

    is_shared = jnp.any(jnp.sum(equal, axis=-1) > 1)  # seldom, and costs half as many passes again
    return higher | lax.cond(is_shared, lower_ids, lambda: equal)


def _cut(
    numbers: UInt32[Array, "B V"], weights: Float[Array, "B V"], budget: Float[Array, " B"], *, bits: int
) -> tuple[UInt32[Array, " B"], Float[Array, " B"]]:
    """The least number above which weights sum to less than the budget, and that sum. A sum above all numbers is 0."""
    num_digits = -(-bits // _DIGIT)

    def sum_from(bound: UInt32[Array, " B"]) -> Float[Array, " B"]:
        return jnp.sum(jnp.where(numbers >= bound[:, None], weights, 0.0), axis=-1)

    def next_digit(
        i: Int[Array, ""], found: tuple[UInt32[Array, " B"], Float[Array, " B"]]
    ) -> tuple[UInt32[Array, " B"], Float[Array, " B"]]:
        low, above = found
        shift = (_DIGIT * (num_digits - 1 - i)).astype(jnp.uint32)
        sums = jnp.stack([sum_from(low + (jnp.uint32(digit) << shift)) for digit in range(1, 1 << _DIGIT)], axis=1)
        enough = sums >= budget[:, None]  # ids from here on use the budget up, so the cut is not below
        digit = jnp.sum(enough, axis=1, dtype=jnp.uint32)
        above = jnp.maximum(above, jnp.max(jnp.where(enough, 0.0, sums), axis=1))  # of the least bound above the cut
        return low + (digit << shift), above

    return lax.fori_loop(0, num_digits, next_digit, (jnp.zeros_like(budget, jnp.uint32), jnp.zeros_like(budget)))
