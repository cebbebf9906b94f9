"""Direct preference optimisation (arXiv:2305.18290). Knows log-probabilities of rows; knows no model.

The better of two answers is to gain on the other, measured from where training began.

Rows come in pairs, 2k the chosen answer and 2k + 1 the rejected one, each behind the same prompt. A pair without any
target is padding.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.train.batch import Batch
from gptoss_jax.train.loss import Sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceBatch(Batch):
    """Pairs, with what the model that training began with says of each row: see `Trainer.row_log_probabilities`.

    Full training needs it, an adapter does not: its base is at hand.

    Attributes:
        reference: the sum of each row's log-probabilities.
    """

    reference: Float[Array, "B 1"]


def row_sums(log_probabilities: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Float[Array, " B"]:
    """The log-probability of each row's targets together, weighted."""
    return jnp.sum(log_probabilities * weights, axis=-1)


def dpo_loss(
    policy: Float[Array, " B"], reference: Float[Array, " B"], weights: Float[Array, "B T"], *, beta: float
) -> Sums:
    """-log sigmoid(beta · margin), summed over the pairs; the weight is their number, correct those with a margin.

    The margin is how much more the chosen answer has gained on the reference than the rejected one.
    """
    gain = (policy - reference).reshape(-1, 2)
    margin = gain[:, 0] - gain[:, 1]
    is_pair = jnp.any(weights.reshape(len(margin), -1) > 0, axis=-1)
    losses = jnp.where(is_pair, -jax.nn.log_sigmoid(beta * margin), 0)
    return Sums(
        loss=jnp.sum(losses),
        weight=jnp.sum(is_pair, dtype=jnp.float32),
        correct=jnp.sum(is_pair & (margin > 0), dtype=jnp.float32),
    )
