"""The readable loop: one prompt in, ids out, one jitted step. Knows ids; knows no text and no other request."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from gptoss_jax.engine.penalties import MOST_COUNTED, RowCounts, TokenCounts
from gptoss_jax.engine.request import STOP_IDS, Constraint, Request, SamplingParams
from gptoss_jax.engine.sampling import RowSettings, sample_rows
from gptoss_jax.errors import UserError
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.transformer import GptOss, Graph, split

_CHUNK = 512  # tokens of a prompt in one step at most; shorter prompts are padded to a power of two
_PLAIN = SamplingParams()  # the model's own probabilities
_CACHE_STEP = 256  # the cache grows by this, so that prompts of similar length share a compiled step


def generate(
    model: GptOss,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingParams = _PLAIN,
    stop_ids: Collection[int] = STOP_IDS,
    constraint: Callable[[], Constraint] | None = None,
) -> Iterator[int]:
    """Yields up to `max_new_tokens` ids after the prompt; a stop id is yielded too, as the last.

    The prompt is fed in chunks, then each step feeds the id just sampled. At most two steps are compiled, one for
    chunks and one for single ids. Settings are arguments of the step, not part of it; but steps that penalise or
    constrain are others.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, more tokens than the model's context, or a sampling
            setting outside its range. Raised by this call, before the first id is asked for. And, when it comes to
            that, a constraint that allows no id.
    """
    request = Request(
        prompt=prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=frozenset(stop_ids),
        constraint=constraint,
    )
    request.check(vocab_size=model.config.vocab_size, max_context=model.config.max_context)
    return _generate(model, request)


def _generate(model: GptOss, request: Request) -> Iterator[int]:
    graph, parameters = split(model)
    capacity = -(-(len(request.prompt) + request.max_new_tokens) // _CACHE_STEP) * _CACHE_STEP
    cache = model.empty_cache(rows=1, capacity=capacity)
    settings = RowSettings.of([request.sampling])
    constraint = request.constraint() if request.constraint else None

    found: list[int] = []
    feed: Iterable[tuple[np.ndarray, np.ndarray]] = _chunks(request.prompt)
    while True:
        seen = _counts(request, found, vocab_size=model.config.vocab_size)
        allowed = _mask(constraint, len(found))
        index, ids = np.array([len(found)], np.int32), None
        for tokens, count in feed:
            ids, cache = step(graph, parameters, tokens, count, cache, settings, index, counts=seen, allowed=allowed)
        assert ids is not None
        found.append(int(np.asarray(ids)[0]))
        yield found[-1]
        if found[-1] in request.stop_ids or len(found) == request.max_new_tokens:
            return
        if constraint:
            constraint.accept(found[-1])
        feed = [(np.array([found[-1:]], np.int32), np.ones(1, np.int32))]


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def step(
    graph: Graph,
    parameters: list[Array],
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    cache: Cache,
    settings: RowSettings,
    index: Int[Array, " B"],
    *,
    counts: RowCounts | None = None,
    allowed: UInt32[Array, "B words"] | None = None,
) -> tuple[Int[Array, " B"], Cache]:
    """Feeds `count` of the tokens of each row, samples the id that follows the last of them, consumes the cache."""
    model = graph.merge(parameters)
    hidden, cache = model.extend(tokens, cache, count=count)
    last = jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)[:, 0]
    ids = sample_rows(model.logits(last), settings, index=index, counts=counts, allowed=allowed).ids
    if model.mesh is not None:  # whole everywhere, so that each of several processes can read them
        ids = jax.lax.with_sharding_constraint(ids, NamedSharding(model.mesh, PartitionSpec()))
    return ids, cache


def _chunks(prompt_ids: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens [1, size], count [1]) pieces of one size each, the last one padded with zeros."""
    size = min(_CHUNK, 1 << (len(prompt_ids) - 1).bit_length())
    for start in range(0, len(prompt_ids), size):
        piece = np.asarray(prompt_ids[start : start + size], np.int32)
        yield np.pad(piece, (0, size - len(piece)))[None], np.array([len(piece)], np.int32)


def _counts(request: Request, found: Sequence[int], *, vocab_size: int) -> RowCounts | None:
    """Of the prompt and of what was found behind it, where penalties ask for it."""
    if not request.sampling.penalises:
        return None
    prompt, generated = (np.bincount(np.array(ids, int), minlength=vocab_size) for ids in (request.prompt, found))
    table = TokenCounts(jnp.asarray(prompt[None] > 0), jnp.asarray(generated[None].clip(max=MOST_COUNTED), jnp.uint16))
    return RowCounts(table, slots=jnp.zeros(1, jnp.int32), drafts=jnp.zeros((1, 0), jnp.int32))


def _mask(constraint: Constraint | None, num_found: int) -> np.ndarray | None:
    if constraint is None:
        return None
    mask = constraint.mask()
    if not mask.any():
        raise UserError(f"the constraint allows no id after {num_found} generated ones; expected at least one")
    return mask[None]
