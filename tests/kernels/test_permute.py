"""Permuted rows and their gradient, beside a gather's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels.permute import permuted


@pytest.mark.parametrize("copies", [1, 3])
def test_rows_and_their_gradient_are_a_gathers(copies: int) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((5, 4)), jnp.float32)
    order = jnp.asarray(rng.permutation(5 * copies), jnp.int32)
    weights = jnp.asarray(rng.standard_normal((5 * copies, 4)), jnp.float32)

    def ours(x: jax.Array) -> jax.Array:
        return jnp.sum(permuted(x, order, jnp.argsort(order)) * weights)

    def gathered(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.repeat(x, copies, axis=0)[order] * weights)

    np.testing.assert_array_equal(ours(x), gathered(x))
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(gathered)(x), rtol=1e-6)
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(ours))(x))
