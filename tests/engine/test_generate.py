"""The readable loop against whole forwards, and what it must not do: compile again, keep two caches."""

import dataclasses
import importlib
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.engine.generate import generate, step
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.engine.sampling import RowSettings
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import GptOss, parameters, split
from tests.engine.twin import judge, words
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2), max_context=300)
NUM_NEW = 12
GREEDY = SamplingParams(temperature=0)
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


def by_whole_forwards(
    model: GptOss, prompt: list[int], count: int, choose: Callable[[np.ndarray, list[int]], int]
) -> list[int]:
    """Chooses by the logits of the whole sequence, again and again. Later ids cannot matter, so all have one length."""
    logits_of = jax.jit(lambda model, tokens: model(tokens))
    ids = list(prompt)
    for _ in range(count):
        padded = np.pad(np.array(ids), (0, 64 - len(ids)))[None]
        ids.append(choose(np.asarray(logits_of(model, jnp.asarray(padded)))[0, len(ids) - 1], ids[len(prompt) :]))
    return ids[len(prompt) :]


def greedy_by_whole_forwards(model: GptOss, prompt: list[int], count: int) -> list[int]:
    return by_whole_forwards(model, prompt, count, lambda logits, _: int(logits.argmax()))


class OnlyMultiples:
    """Allows the multiples of 3, or of 5 after an even one; nothing after `most` ids."""

    def __init__(self, most: int = 1000):
        self.most = most
        self.ids: list[int] = []

    def possible(self, ids: list[int]) -> range:
        return range(0, CONFIG.vocab_size, 5 if ids and ids[-1] % 2 == 0 else 3) if len(ids) < self.most else range(0)

    def mask(self) -> np.ndarray:
        return words(self.possible(self.ids), vocab_size=CONFIG.vocab_size)

    def accept(self, token_id: int, /) -> None:
        self.ids.append(token_id)


SETTINGS = [
    SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.01, seed=7),
    SamplingParams(temperature=1.2, presence_penalty=1.5, logit_bias={5: 4.0, 30: 6.0}, seed=2**32 - 1),
]


@pytest.mark.parametrize("length", [1, 2, 9, 37])
def test_greedy_is_the_best_id_of_a_whole_forward_each_time(model: GptOss, prompt: list[int], length: int):
    expected = greedy_by_whole_forwards(model, prompt[:length], NUM_NEW)
    assert list(generate(model, prompt[:length], max_new_tokens=NUM_NEW, sampling=GREEDY)) == expected


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_every_setting_is_followed(model: GptOss, prompt: list[int], sampling: SamplingParams, constrained: bool):
    """The twin chooses of whole forwards, with the noise of the seed and of how many ids there are."""

    def choose(logits: np.ndarray, found: list[int]) -> int:
        allowed = OnlyMultiples().possible(found) if constrained else None
        judged = judge(logits, sampling, prompt=prompt, generated=found, allowed=allowed)
        key = jax.random.fold_in(jax.random.key(np.uint32(sampling.seed), impl="threefry2x32"), len(found))
        noise = np.asarray(jax.random.gumbel(key, logits.shape))
        return int(np.where(judged.kept, judged.scaled + noise, -np.inf).argmax())

    expected = by_whole_forwards(model, prompt, NUM_NEW, choose)
    settings = {"sampling": sampling, "constraint": OnlyMultiples if constrained else None}
    assert list(generate(model, prompt, max_new_tokens=NUM_NEW, stop_ids=(), **settings)) == expected


def test_a_constraint_that_allows_nothing_is_refused(model: GptOss, prompt: list[int]):
    """When it comes to that: the ids before are told."""
    ids = generate(model, prompt, max_new_tokens=NUM_NEW, stop_ids=(), constraint=lambda: OnlyMultiples(most=3))
    assert len(list(itertools.islice(ids, 3))) == 3
    with pytest.raises(UserError, match="the constraint allows no id after 3 generated ones"):
        next(ids)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("length", [8, 9, 37])
def test_a_prompt_may_be_longer_than_a_chunk(model: GptOss, prompt: list[int], length: int):
    expected = greedy_by_whole_forwards(model, prompt[:length], NUM_NEW)
    assert list(generate(model, prompt[:length], max_new_tokens=NUM_NEW, sampling=GREEDY)) == expected


def test_a_seed_decides_the_ids(model: GptOss, prompt: list[int]):
    def ids(seed: int) -> list[int]:
        return list(
            generate(model, prompt, max_new_tokens=NUM_NEW, sampling=SamplingParams(temperature=1.5, seed=seed))
        )

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
    ids = list(generate(model, prompt, max_new_tokens=NUM_NEW, sampling=GREEDY))
    stop = ids[5]
    until_stop = ids[: ids.index(stop) + 1]
    settings = {"max_new_tokens": NUM_NEW, "sampling": GREEDY}
    assert list(generate(model, prompt, **settings, stop_ids=(351, stop))) == until_stop
    assert list(generate(model, prompt, **settings, stop_ids=[])) == ids


def test_one_new_token(model: GptOss, prompt: list[int]):
    (only,) = generate(model, prompt, max_new_tokens=1, sampling=GREEDY)
    assert type(only) is int
    assert [only] == greedy_by_whole_forwards(model, prompt, 1)


def test_nothing_is_compiled_again(model: GptOss, prompt: list[int]):
    """Other settings, seeds, stops and prompts of a like length run what one prompt compiled."""
    list(generate(model, prompt[:37], max_new_tokens=5))
    compiled = step._cache_size()
    for temperature, top_k, top_p in itertools.product((0.0, 0.8), (0, 7), (1.0, 0.4)):
        settings = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=0.1, seed=9)
        list(generate(model, prompt[:33], max_new_tokens=40, stop_ids=(3,), sampling=settings))
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
    arguments = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), cache, RowSettings.of([GREEDY]), jnp.zeros(1, int)
    _, grown = step(*split(model), *arguments)
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
        ([1], {"sampling": SamplingParams(temperature=-1.0)}, "temperature is -1.0"),
        ([1], {"sampling": SamplingParams(logit_bias={352: 1.0})}, "logit_bias holds id 352; expected 0 to 351"),
    ],
)
def test_errors_come_with_the_call(model: GptOss, prompt_ids: list[int], settings: dict, complaint: str):
    """Not with the first id: a caller who streams has promised an answer by then."""
    with pytest.raises(UserError, match=complaint):
        generate(model, prompt_ids, **({"max_new_tokens": 5} | settings))


def test_the_context_may_be_filled_to_the_last_token(model: GptOss):
    assert len(list(generate(model, [1] * 295, max_new_tokens=5))) == 5
