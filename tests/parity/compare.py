"""How logits are made and compared in the parity tests. Knows arrays; knows no case and no reference."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import gptoss_jax


@nnx.jit
def _forward(model: gptoss_jax.GptOss, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def logits(model: gptoss_jax.GptOss, tokens: np.ndarray) -> np.ndarray:
    """float32[B, T, V] of our model for int[B, T]; compiled, which costs less here than one pass op by op."""
    return np.asarray(_forward(model, jnp.asarray(tokens)))


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference as a share of the reference logits' spread."""
    return float(np.abs(ours.astype(np.float64) - reference).max() / reference.astype(np.float64).std())


def mean_kl(reference: np.ndarray, approximation: np.ndarray) -> float:
    """KL(reference ‖ approximation) of the next-token distributions, in nats, the mean over positions."""
    log_p, log_q = _log_softmax(reference), _log_softmax(approximation)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
