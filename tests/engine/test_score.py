"""Scores of given texts, beside the float64 oracle; and the same bits alone and in any company."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.typing import DTypeLike
from safetensors.numpy import load_file

from gptoss_jax import checkpoint
from gptoss_jax.engine import score as score_module
from gptoss_jax.engine.generate import generate
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.engine.score import Scored, Text, rows_are_apart, score, score_choices, windows
from gptoss_jax.errors import UserError
from gptoss_jax.kernels import native
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.transformer import GptOss, abstract_model, parameters, split
from gptoss_jax.sharding import make_mesh
from tests import oracle
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2))
BATCH = 128  # tokens that share a step: four texts of 32, or two of 64
RELEASED_VOCAB = 201_088
WITHIN = 1e-4  # float32 sums of 160 products in six layers, against float64


def random_text(length: int, *, seed: int = 0, from_token: int = 1) -> Text:
    ids = np.random.default_rng((seed, length)).integers(TINY.vocab_size, size=length)
    return Text(tokens=ids.tolist(), from_token=from_token)


TEXTS = [random_text(length) for length in (2, 20, 33, 21, 61, 5, 32, 34, 150, 3)]
QUESTION = [Text(tokens=[*TEXTS[2].tokens, *tail], from_token=33) for tail in ([7], [8, 9, 10], [8, 11], [12] * 9)]


def make(dtype: DTypeLike = jnp.float32, **settings) -> GptOss:
    return GptOss(CONFIG, dtype=dtype, rngs=nnx.Rngs(0), **{"impl": "xla", **settings})


@pytest.fixture(scope="module")
def model() -> GptOss:
    return make()


def scores(model: GptOss, texts: Sequence[Text], **settings) -> list[Scored]:
    return list(score(model, texts, **{"batch_tokens": BATCH, **settings}))


def assert_same_bits(found: Sequence[Scored], expected: Sequence[Scored]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine.logprobs, theirs.logprobs)
        np.testing.assert_array_equal(mine.is_best, theirs.is_best)


# ---- right -----------------------------------------------------------------------------------------------------------


def test_scores_are_the_oracles(tiny_hf: Path):
    """In one chunk and in two, whole and from the middle on."""
    model = checkpoint.load(tiny_hf, dtype=jnp.float32, impl="xla")
    config, tensors = json.loads((tiny_hf / "config.json").read_text()), load_file(tiny_hf / "model.safetensors")
    texts = [random_text(23), random_text(40, from_token=11), random_text(540, from_token=500)]
    for text, found in zip(texts, scores(model, texts), strict=True):
        logits = oracle.forward(config, tensors, np.array([text.tokens]))[0, text.from_token - 1 : -1]
        ids = np.array(text.tokens[text.from_token :])
        expected = np.log(oracle.softmax(logits))[np.arange(len(ids)), ids]
        np.testing.assert_allclose(found.logprobs, expected, atol=WITHIN, rtol=0)
        np.testing.assert_array_equal(found.is_best, logits.argmax(axis=-1) == ids)
        assert found.total == pytest.approx(expected.sum(), abs=WITHIN * len(ids))


@pytest.mark.slow
def test_the_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary():
    model = make(jnp.bfloat16)
    weight = parameters(model)["unembedding.weight"]
    weight[...] = jnp.zeros_like(weight[...])
    (found,) = scores(model, [Text(tokens=[5, 0, 7, 0])])
    assert math.exp(-found.total / 3) == pytest.approx(TINY.vocab_size, rel=1e-6)  # float32 logarithms
    assert found.is_best.tolist() == [True, False, True]  # of equals the lowest id
    assert not found.is_greedy


@pytest.mark.slow
def test_what_the_model_says_itself_is_greedy(model: GptOss):
    greedy = SamplingParams(temperature=0)
    said = generate(model, [3, 4], max_new_tokens=5, sampling=greedy, stop_ids=())
    (found,) = scores(model, [Text(tokens=[3, 4, *said], from_token=2)])
    assert found.is_greedy


def test_choices_of_a_question_are_scored_as_whole_texts(model: GptOss):
    (found,) = score_choices(model, [QUESTION], batch_tokens=BATCH)
    for choice, whole in zip(found, scores(model, QUESTION), strict=True):
        np.testing.assert_allclose(choice.logprobs, whole.logprobs, atol=WITHIN, rtol=0)
        np.testing.assert_array_equal(choice.is_best, whole.is_best)


def test_choices_that_begin_differently_or_with_the_first_id(model: GptOss):
    different = [Text(tokens=[1, 2, 3], from_token=2), Text(tokens=[2, 2, 3], from_token=2)]
    at_once = [Text(tokens=[1, 2, 3]), Text(tokens=[1, 4])]
    for question in (different, at_once):
        (found,) = score_choices(model, [question], batch_tokens=BATCH)
        assert_same_bits(found, scores(model, question))  # nothing to share


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_text_has_the_same_bits_alone_in_company_and_in_any_order(dtype: DTypeLike):
    model = make(dtype)
    assert rows_are_apart(model)
    together = scores(model, TEXTS)
    assert_same_bits([scores(model, [text])[0] for text in TEXTS], together)
    assert_same_bits(scores(model, TEXTS[::-1])[::-1], together)
    others = [random_text(length, seed=1) for length in (8, 20, 31, 40, 55, 130)]
    assert_same_bits(scores(model, [*others, *TEXTS])[len(others) :], together)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_question_has_the_same_bits_whatever_others_are_asked(dtype: DTypeLike):
    model = make(dtype)
    other = [Text(tokens=[*TEXTS[7].tokens, *tail], from_token=34) for tail in ([5] * 8, [6], [7, 8])]
    (alone,) = score_choices(model, [QUESTION], batch_tokens=BATCH)
    _, behind, again = score_choices(model, [other, QUESTION, QUESTION], batch_tokens=BATCH)
    assert_same_bits(behind, alone)
    assert_same_bits(again, alone)


def test_texts_wait_for_others_of_their_shape_but_not_for_ever(model: GptOss, monkeypatch: pytest.MonkeyPatch):
    """And texts of known shapes compile nothing."""
    step: Any = score_module._step
    expected = scores(model, TEXTS)
    num_compiled = step._cache_size()
    monkeypatch.setattr(score_module, "_LOOKAHEAD", 2)
    taken: list[Text] = []
    stream = score(model, (taken.append(text) or text for text in TEXTS), batch_tokens=BATCH)
    found = [next(stream)]
    assert len(taken) <= 3
    assert_same_bits([*found, *stream], expected)
    assert step._cache_size() == num_compiled


@pytest.mark.skipif(not native.available(), reason="the C++ kernels are not compiled")
@pytest.mark.parametrize(
    ("impl", "apart"),
    [
        ("moe_matmul=cpu,linear=cpu,attention=xla", False),
        ("moe_matmul=cpu-invariant,linear=cpu,attention=xla", True),
        pytest.param("moe_matmul=cpu-invariant,linear=cpu-invariant,attention=xla", True, marks=pytest.mark.slow),
    ],
)
def test_the_native_kernels_give_the_same_bits_too(impl: str, apart: bool):
    """Where company would change a text's bits it has none."""
    model = make(jnp.bfloat16, impl=impl)
    assert rows_are_apart(model) == apart
    assert_same_bits([scores(model, [text])[0] for text in TEXTS[:6]], scores(model, TEXTS[:6]))


def test_steps_may_be_shared_where_that_costs_exactness(model: GptOss):
    """Here it costs nothing, but the flag must give the same texts' scores in the same order."""
    assert_same_bits(scores(model, TEXTS[:5], batch_exact=False), scores(model, TEXTS[:5]))


@pytest.mark.parametrize(
    ("axes", "settings"),
    [
        ({"data": 2, "tensor": 4}, {}),
        pytest.param({"data": 2, "expert": 2, "tensor": 2}, {}, marks=pytest.mark.slow),
        pytest.param({"expert": 4, "tensor": 2}, {"dispatch": "reduce"}, marks=pytest.mark.slow),
        pytest.param({"expert": 4}, {"dispatch": "exchange"}, marks=pytest.mark.slow),
        pytest.param({"data": 3, "tensor": 2}, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_on_a_mesh(model: GptOss, axes: dict[str, int], settings: dict[str, str]):
    """352 ids over 4 devices; one that pads them (tests of the model have those) is no different."""
    sharded = make(mesh=make_mesh(**axes), **settings)
    texts = TEXTS[:5]
    together = scores(sharded, texts)
    for mine, theirs in zip(together, scores(model, texts), strict=True):
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=WITHIN, rtol=0)
    assert_same_bits(scores(sharded, texts[::-1])[::-1], together)
    assert_same_bits(scores(sharded, texts[1:2]), together[1:2])
    (found,) = score_choices(sharded, [QUESTION], batch_tokens=BATCH)
    for choice, whole in zip(found, scores(model, QUESTION), strict=True):
        np.testing.assert_allclose(choice.logprobs, whole.logprobs, atol=WITHIN, rtol=0)


# ---- windows, and what is refused ------------------------------------------------------------------------------------


@given(length=st.integers(2, 60), size=st.integers(2, 20))
def test_windows_score_each_id_once_and_with_half_a_window_before_it(length: int, size: int):
    ids = list(range(length))
    found = windows(ids, size=size)
    assert [i for text in found for i in text.tokens[text.from_token :]] == ids[1:]
    assert all(len(text.tokens) == min(size, length) for text in found)
    assert all(text.from_token >= size // 2 for text in found[1:])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (Text(tokens=[1]), "a text of 1 ids is to be scored from id 1 on"),
        (Text(tokens=[1, 2], from_token=0), "from id 0 on; expected 1 or more"),
        (Text(tokens=[1, 352]), "holds id 352; expected 0 to 351"),
        (Text(tokens=[0] * 41), "has 41 ids; the context has 40"),
    ],
)
def test_texts_that_cannot_be_scored(text: Text, complaint: str):
    with pytest.raises(UserError, match=complaint):
        text.check(vocab_size=352, max_context=40)


def test_sizes_that_make_no_sense(model: GptOss):
    with pytest.raises(UserError, match="batch_tokens is 0; expected at least 1"):
        scores(model, TEXTS, batch_tokens=0)
    with pytest.raises(UserError, match="question 0 has no texts"):
        next(score_choices(model, [[]]))
    with pytest.raises(UserError, match="a window has 1 ids"):
        windows([1, 2, 3], size=1)


# ---- what a step holds and sends -------------------------------------------------------------------------------------


def compiled_step(*, vocab_size: int, **settings) -> Any:
    """A step of [4, 512] tokens, with shapes for its weights."""
    config = dataclasses.replace(CONFIG, vocab_size=vocab_size)
    model = abstract_model(config, impl="xla", **settings)
    tokens, count = jax.ShapeDtypeStruct((4, 512), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    cache = jax.eval_shape(lambda: model.empty_cache(rows=4, capacity=512))
    return score_module._step.lower(*split(model), tokens, tokens, count, cache).compile()


def test_scores_are_never_whole():
    """Of the release's vocabulary all scores of a step would be 1.6 GB."""
    whole = 4 * 4 * 512 * RELEASED_VOCAB
    temporaries = compiled_step(vocab_size=RELEASED_VOCAB).memory_analysis().temp_size_in_bytes
    # A sixteenth of them and what is made of it, and 0.1 GB for attention.
    assert temporaries < whole / 4


def test_no_score_travels():
    """Of a vocabulary over devices only sums over it: the largest thing sent is the layers' output."""
    found = compiled_step(vocab_size=20_008, mesh=make_mesh(tensor=4)).as_text()
    sent = re.findall(r" = (.*?) (?:all-[\w-]+|collective-[\w-]+|reduce-scatter[\w-]*)\(", found)
    sizes = [
        math.prod(map(int, filter(None, dims.split(","))))
        for each in sent
        for dims in re.findall(r"\[([\d,]*)\]", each)
    ]
    assert 0 < max(sizes) <= 4 * 512 * CONFIG.width < 128 * 20_008 // 4
