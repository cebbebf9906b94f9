"""The readable loop against whole forwards, and what it must not do: compile again, keep two caches."""

import dataclasses
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.engine.generate import generate, step
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import GptOss, parameters
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2), max_context=300)
NUM_NEW = 12
loop = importlib.import_module("gptoss_jax.engine.generate")  # the module: the package may name the function so too


@pytest.fixture(scope="module")
def model() -> GptOss:
    model = GptOss(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    weight = parameters(model)["unembedding.weight"]
    weight[...] = 3 * weight[...]  # surer of its next token: sampling at temperature 1 then repeats some of them
    return model


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return np.random.default_rng(4).integers(CONFIG.vocab_size, size=37).tolist()


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_CHUNK", 8)


def greedy_by_whole_forwards(model: GptOss, prompt: list[int], count: int) -> list[int]:
    """The best next id of the whole sequence, again and again. Later tokens cannot matter, so all have one length."""
    logits_of = jax.jit(lambda model, tokens: model(tokens))
    ids = list(prompt)
    for _ in range(count):
        padded = np.pad(np.array(ids), (0, 64 - len(ids)))[None]
        ids.append(int(np.asarray(logits_of(model, jnp.asarray(padded)))[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 2, 9, 37])
def test_greedy_is_the_best_id_of_a_whole_forward_each_time(model: GptOss, prompt: list[int], length: int):
    expected = greedy_by_whole_forwards(model, prompt[:length], NUM_NEW)
    assert list(generate(model, prompt[:length], max_new_tokens=NUM_NEW, temperature=0.0)) == expected


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("length", [8, 9, 37])
def test_a_prompt_may_be_longer_than_a_chunk(model: GptOss, prompt: list[int], length: int):
    expected = greedy_by_whole_forwards(model, prompt[:length], NUM_NEW)
    assert list(generate(model, prompt[:length], max_new_tokens=NUM_NEW, temperature=0.0)) == expected


def test_a_seed_decides_the_ids(model: GptOss, prompt: list[int]):
    def ids(seed: int) -> list[int]:
        return list(generate(model, prompt, max_new_tokens=NUM_NEW, temperature=1.5, seed=seed))

    assert ids(3) == ids(3)
    assert len({tuple(ids(seed)) for seed in range(5)}) == 5
    assert all(0 <= i < CONFIG.vocab_size for i in ids(0))


def test_every_step_draws_anew(model: GptOss):
    """With logits all alike, one key for all steps would give one id for ever."""
    flat = nnx.clone(model)
    weight = parameters(flat)["unembedding.weight"]
    weight[...] = jnp.zeros_like(weight[...])
    assert len(set(generate(flat, [1], max_new_tokens=20))) > 15


def test_a_stop_id_is_the_last(model: GptOss, prompt: list[int]):
    ids = list(generate(model, prompt, max_new_tokens=NUM_NEW, temperature=0.0))
    stop = ids[5]
    until_stop = ids[: ids.index(stop) + 1]
    settings = {"max_new_tokens": NUM_NEW, "temperature": 0.0}
    assert list(generate(model, prompt, **settings, stop_ids=(351, stop))) == until_stop
    assert list(generate(model, prompt, **settings, stop_ids=[])) == ids


def test_one_new_token(model: GptOss, prompt: list[int]):
    (only,) = generate(model, prompt, max_new_tokens=1, temperature=0.0)
    assert type(only) is int
    assert [only] == greedy_by_whole_forwards(model, prompt, 1)


def test_nothing_is_compiled_again(model: GptOss, prompt: list[int]):
    """Other settings, seeds, stops and prompts of a like length run what one prompt compiled."""
    list(generate(model, prompt[:37], max_new_tokens=5))
    compiled = step._cache_size()
    for temperature, top_k, top_p in itertools.product((0.0, 0.8), (0, 7), (1.0, 0.4)):
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        list(generate(model, prompt[:33], max_new_tokens=40, seed=9, stop_ids=(3,), **settings))
    list(generate(model, (prompt + prompt)[:64], max_new_tokens=100))
    assert step._cache_size() == compiled


@pytest.mark.usefixtures("short_chunks")
def test_many_chunks_are_two_programs(model: GptOss, prompt: list[int]):
    before = step._cache_size()
    list(generate(model, prompt[:30], max_new_tokens=5))  # chunks of 8, four of them
    list(generate(model, (5 * prompt)[:100], max_new_tokens=5))
    assert step._cache_size() - before <= 2


def test_the_cache_is_given_away(model: GptOss):
    """The step writes into the memory of the cache it was given; a second cache would double the largest array."""
    cache = model.empty_cache(rows=1, capacity=256)
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)]
    settings = (jnp.float32(0), jnp.int32(0), jnp.float32(1))
    arguments = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), cache, jax.random.key(0), settings
    _, grown = step(*nnx.split(model), *arguments)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(grown.layers)] == before


@pytest.mark.parametrize(
    ("prompt_ids", "settings", "complaint"),
    [
        ([], {}, "the prompt has 0 ids; expected at least 1"),
        ([1, 352], {}, "the prompt holds id 352; expected 0 to 351"),
        ([1, -1], {}, "the prompt holds id -1; expected 0 to 351"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ([1] * 200, {"max_new_tokens": 101}, r"200 prompt ids and 101 new ones are 301; the model's context is 300"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"top_k": -1}, "top_k is -1"),
        ([1], {"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_errors_come_with_the_call(model: GptOss, prompt_ids: list[int], settings: dict, complaint: str):
    """Not with the first id: a caller who streams has promised an answer by then."""
    with pytest.raises(UserError, match=complaint):
        generate(model, prompt_ids, **({"max_new_tokens": 5} | settings))


def test_the_context_may_be_filled_to_the_last_token(model: GptOss):
    assert len(list(generate(model, [1] * 295, max_new_tokens=5))) == 5
