"""How much an engine's cache takes, and how large one is that may take so much."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gptoss_jax.engine.pools import Pools
from gptoss_jax.engine.settings import EngineSettings
from gptoss_jax.errors import UserError
from gptoss_jax.model.transformer import GptOss
from gptoss_jax.sharding import make_mesh
from tests.tiny import TINY

SETTINGS = EngineSettings(max_rows=3, page_size=16, prefill_tokens=32)


@pytest.fixture(scope="module")
def model() -> GptOss:
    return GptOss(TINY, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kv_dtype", [jnp.bfloat16, jnp.float32, jnp.int8])
def test_pools_weigh_what_the_arrays_do(model: GptOss, kv_dtype: jnp.dtype):
    pages = model.empty_pages(num_full_pages=5, num_sliding_pages=7, page_size=16, dtype=kv_dtype)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(pages))
    assert Pools.of(model, kv_dtype=kv_dtype).nbytes(full=5, sliding=7, page_size=16) == held


def test_pools_of_a_mesh_are_those_of_one_device():
    model = GptOss(TINY, mesh=make_mesh(tensor=2), rngs=nnx.Rngs(0))
    pages = model.empty_pages(num_full_pages=5, num_sliding_pages=7, page_size=16)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(pages))
    assert Pools.of(model, kv_dtype=None).nbytes(full=5, sliding=7, page_size=16) == held


@pytest.mark.parametrize("cache_bytes", [300_000, 1_000_000, 1_234_567])
def test_a_cache_takes_no_more_and_nearly_all(model: GptOss, cache_bytes: int):
    pools = Pools.of(model, kv_dtype=None)
    settings = dataclasses.replace(SETTINGS, cache_bytes=cache_bytes)
    limits = settings.limits(TINY, pools)

    def nbytes(full: int) -> int:
        sized = dataclasses.replace(SETTINGS, cache_tokens=full * SETTINGS.page_size).limits(TINY)
        return pools.nbytes(full=full, sliding=sized.num_sliding_pages, page_size=16)

    assert nbytes(limits.num_full_pages) <= cache_bytes < nbytes(limits.num_full_pages + 1)


def test_what_no_sequence_could_use_is_not_taken(model: GptOss):
    settings = dataclasses.replace(SETTINGS, cache_bytes=1 << 40, max_context=160)
    assert settings.limits(TINY, Pools.of(model, kv_dtype=None)).num_full_pages == 3 * 10


def test_too_small_a_cache_is_told_with_what_it_needs(model: GptOss):
    pools = Pools.of(model, kv_dtype=None)
    with pytest.raises(UserError, match="cache_bytes is 1000; the first page of 16 positions") as caught:
        dataclasses.replace(SETTINGS, cache_bytes=1000).limits(TINY, pools)
    needed = int(str(caught.value).partition("takes ")[2].partition(":")[0])
    assert dataclasses.replace(SETTINGS, cache_bytes=needed).limits(TINY, pools).num_full_pages == 1
    with pytest.raises(UserError):
        dataclasses.replace(SETTINGS, cache_bytes=needed - 1).limits(TINY, pools)


def test_one_size_is_enough():
    with pytest.raises(UserError, match="cache_tokens is 64 and cache_bytes 1000000; expected one of them"):
        dataclasses.replace(SETTINGS, cache_bytes=1_000_000, cache_tokens=64).limits(TINY)
