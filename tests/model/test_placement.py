"""How a model is fitted to a mesh: which device holds which heads, blocks and experts, and what is padding."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.errors import UserError
from gptoss_jax.model.placement import fit_heads, place_model
from gptoss_jax.sharding import Fit, MeshShape, Placement, abstract_mesh, make_mesh
from tests.tiny import TINY


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.data())
def test_a_cut_of_a_fitted_axis_is_read_from_the_stored_one(size: int, repeat: int, parts: int, data: st.DataObject):
    """What a shard reads is the slice of the array that `fit` makes whole."""
    fit = Fit(size, -(-size * repeat // parts) * parts, repeat)
    whole = Placement(None, {"heads": fit}).fit(jnp.arange(1, size + 1), ("heads",))
    assert whole.shape == (fit.fitted,)
    start = data.draw(st.integers(0, fit.fitted - 1))
    stop = data.draw(st.integers(start + 1, fit.fitted))
    box, entries, padding = fit.stored(slice(start, stop))
    read = np.pad(np.arange(1, size + 1)[box][entries], (0, padding))
    assert read.tolist() == whole[start:stop].tolist()


@pytest.mark.parametrize(
    ("heads", "tensor", "queries", "keys", "copies"),
    [
        ((64, 8), 1, 64, 8, 1),
        ((64, 8), 8, 64, 8, 1),
        ((64, 8), 16, 64, 16, 2),  # each key head twice, with half of its query heads
        ((64, 8), 64, 64, 64, 8),
        ((64, 8), 3, 72, 9, 1),  # three key heads on each device, one of nine is padding
        ((12, 4), 3, 18, 6, 1),
        ((12, 4), 6, 12, 12, 3),
        ((12, 4), 8, 16, 16, 3),  # two copies on each of six devices, padding on two
    ],
)
def test_heads_of_known_models(heads: tuple[int, int], tensor: int, queries: int, keys: int, copies: int):
    assert fit_heads(*heads, tensor) == (Fit(heads[0], queries), Fit(heads[1], keys, copies))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64))
def test_every_query_head_lies_with_its_own_key_head(kv_heads: int, group: int, tensor: int):
    num_heads = kv_heads * group
    if tensor > num_heads:
        return
    queries, keys = fit_heads(num_heads, kv_heads, tensor)
    assert queries.fitted % tensor == 0
    assert keys.fitted % tensor == 0
    assert queries.fitted % keys.fitted == 0
    per_key = queries.fitted // keys.fitted
    key_of = np.repeat(np.arange(kv_heads), keys.repeat)  # the released key head of each fitted one
    for query in range(num_heads):
        assert key_of[query // per_key] == query // group


def test_more_devices_than_heads_are_refused():
    with pytest.raises(UserError, match=r"tensor=65 exceeds the model's 64 query heads: choose tensor up to 64"):
        fit_heads(64, 8, 65)


@pytest.mark.parametrize("tensor", range(1, 17))
def test_the_expert_width_of_the_release_is_cut_between_blocks(tensor: int):
    blocks = math.ceil(90 / tensor)
    mesh = abstract_mesh(MeshShape(tensor=tensor))
    fits = place_model(dataclasses.replace(TINY, expert_width=2880, num_heads=64, num_kv_heads=8), mesh).fits
    assert fits["expert_width_blocks"] == Fit(90, blocks * tensor)
    assert fits["expert_width"] == Fit(2880, 32 * blocks * tensor)


def test_experts_and_vocabulary_are_padded_to_their_axes():
    fits = place_model(TINY, make_mesh(expert=3, tensor=2)).fits
    assert fits["experts"] == Fit(8, 9)
    assert fits["vocab"] == Fit(352, 352)
    assert place_model(TINY, make_mesh(tensor=6)).fits["vocab"] == Fit(352, 354)


def test_padding_is_zeros_behind_and_copies_stand_together():
    placement = Placement(None, {"kv_heads": Fit(2, 6, 2), "vocab": Fit(3, 3)})
    fitted = placement.fit(jax.numpy.array([[1, 2], [3, 4], [5, 6]]), ("vocab", "kv_heads"))
    assert fitted.tolist() == [[1, 1, 2, 2, 0, 0], [3, 3, 4, 4, 0, 0], [5, 5, 6, 6, 0, 0]]
