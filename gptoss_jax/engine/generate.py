"""The readable loop: one prompt in, ids out, one jitted step. Knows ids; knows no text and no other request."""

import functools
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

from gptoss_jax.engine.sampling import check_sampling, sample
from gptoss_jax.errors import UserError
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.transformer import GptOss

STOP_IDS = (199999, 200002, 200012)  # <|endoftext|>, <|return|>, <|call|>: the release's generation_config.json
_CHUNK = 512  # tokens of a prompt in one step at most; shorter prompts are padded to a power of two
_CACHE_STEP = 256  # the cache grows by this, so that prompts of similar length share a compiled step


def generate(
    model: GptOss,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = STOP_IDS,
) -> Iterator[int]:
    """Yields up to `max_new_tokens` ids after the prompt; a stop id is yielded too, as the last.

    The prompt is fed in chunks, then each step feeds the id just sampled. At most two steps are compiled, one for
    chunks and one for single ids; temperature, top_k and top_p are arguments of the step, not part of it.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, more tokens than the model's context, or a sampling
            setting outside its range. Raised by this call, before the first id is asked for.
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    _check_prompt(model, prompt_ids, max_new_tokens)
    return _generate(model, prompt_ids, max_new_tokens, (temperature, top_k, top_p), seed, frozenset(stop_ids))


def _generate(
    model: GptOss,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: tuple[float, int, float],
    seed: int,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    graph, parameters = nnx.split(model)
    capacity = -(-(len(prompt_ids) + max_new_tokens) // _CACHE_STEP) * _CACHE_STEP
    cache = model.empty_cache(rows=1, capacity=capacity)
    settings = (jnp.float32(sampling[0]), jnp.int32(sampling[1]), jnp.float32(sampling[2]))
    key = jax.random.key(seed)

    next_id = None
    for tokens, count in _chunks(prompt_ids):
        next_id, cache = step(graph, parameters, tokens, count, cache, key, settings)
    for number in range(1, max_new_tokens + 1):
        assert next_id is not None
        found = int(np.asarray(next_id)[0])
        yield found
        if found in stop_ids or number == max_new_tokens:
            return
        next_id, cache = step(
            graph, parameters, next_id[:, None], np.ones(1, np.int32), cache, jax.random.fold_in(key, number), settings
        )


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def step(
    graph: nnx.GraphDef[GptOss],
    parameters: nnx.State,
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    cache: Cache,
    key: Key[Array, ""],
    settings: tuple[Array, Array, Array],
) -> tuple[Int[Array, " B"], Cache]:
    """Feeds `count` of the tokens of each row, samples the id that follows the last of them, consumes the cache."""
    model = nnx.merge(graph, parameters)
    hidden, cache = model.extend(tokens, cache, count=count)
    last = jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)[:, 0]
    temperature, top_k, top_p = settings
    ids = sample(model.logits(last), key, temperature=temperature, top_k=top_k, top_p=top_p)
    if model.mesh is not None:  # whole everywhere, so that each of several processes can read them
        ids = jax.lax.with_sharding_constraint(ids, NamedSharding(model.mesh, PartitionSpec()))
    return ids, cache


def _chunks(prompt_ids: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens [1, size], count [1]) pieces of one size each, the last one padded with zeros."""
    size = min(_CHUNK, 1 << (len(prompt_ids) - 1).bit_length())
    for start in range(0, len(prompt_ids), size):
        piece = np.asarray(prompt_ids[start : start + size], np.int32)
        yield np.pad(piece, (0, size - len(piece)))[None], np.array([len(piece)], np.int32)


def _check_prompt(model: GptOss, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
    config = model.config
    if not len(prompt_ids):
        raise UserError("the prompt has 0 ids; expected at least 1")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    outside = [i for i in prompt_ids if not 0 <= i < config.vocab_size]
    if outside:
        raise UserError(
            f"the prompt holds id {outside[0]}; expected 0 to {config.vocab_size - 1}, the model's vocabulary"
        )
    if len(prompt_ids) + max_new_tokens > config.max_context:
        raise UserError(
            f"{len(prompt_ids)} prompt ids and {max_new_tokens} new ones are {len(prompt_ids) + max_new_tokens}; "
            f"the model's context is {config.max_context}: shorten the prompt or ask for fewer"
        )
