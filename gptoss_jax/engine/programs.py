"""A step as a compiled program: words in, sampled ids out, pages updated in place. Knows arrays; knows no request.

    words ─► parts ─► model.extend_paged ─► the places behind which ids are wanted ─► logits ─► sample_rows ─► results
                                                          └─ some are constrained ─► a program of its own: the same,
                                                                                     with masks that are made meanwhile
All is compiled before the first request, and calling a compiled program compiles nothing.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt32

from gptoss_jax.engine.limits import Limits, Program
from gptoss_jax.engine.logprobs import logprobs_of, top_logprobs
from gptoss_jax.engine.penalties import RowCounts, TokenCounts, count_tokens, reset_counts
from gptoss_jax.engine.request import MAX_LOGPROBS, SamplingParams, Token
from gptoss_jax.engine.sampling import RowSettings, Sampled, sample_rows
from gptoss_jax.engine.staging import NOT_ASKED, PartWords, StepLayout
from gptoss_jax.model.implementations import platform_of
from gptoss_jax.model.paged import PagedCache, Part
from gptoss_jax.model.transformer import GptOss, Graph, split
from gptoss_jax.sharding import AnyMesh, partition

Results: TypeAlias = Int32[Array, "R fields"]  # of each place: id, logprob, ids and logprobs of the best
Scores: TypeAlias = Int32[Array, "tokens fields"]  # of each token of the prefill part: the same, of its target
_NUM_FIELDS = 2 * (1 + MAX_LOGPROBS)
_SCORED_AT_ONCE = 64  # tokens of prompts: 51 MB of scores in the release


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What stays on the devices from step to step. Each step consumes it and gives the next one."""

    __no_type_check__ = True  # as in model/cache.py

    cache: PagedCache
    counts: TokenCounts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where in a step an id may be wanted: behind each token of the decode part, and the last of each prefill row.

    Attributes:
        hidden: of the model.
        slots: whose place it is.
        index: which generated id of its sequence would come here.
        is_wanted: where not, nothing of what comes out matters.
    """

    __no_type_check__ = True

    hidden: Float[Array, "R D"]
    slots: Int[Array, " R"]
    index: Int[Array, " R"]
    is_wanted: Bool[Array, " R"]


def num_places(program: Program) -> int:
    """The decode part's tokens, then the prefill part's rows."""
    return program.decode_rows * program.decode_width + program.prefill_rows


class Programs:
    """A model's compiled steps, and the small programs that make and change their state.

    Args:
        model: its parameters are held here as they are now.
        limits: sizes, and which steps there are.
        kv_dtype: of the pages; int8 is codes with scales.
    """

    def __init__(self, model: GptOss, limits: Limits, *, kv_dtype: DTypeLike):
        graph, self._parameters = split(model)
        self._limits, self._mesh = limits, model.mesh
        self._num_scores = model.num_scores
        self._step = functools.partial(_step, graph=graph)
        self._draw = functools.partial(_draw, graph=graph)
        self._steps: dict[Program, jax.stages.Compiled] = {}
        self._draws: dict[int, jax.stages.Compiled] = {}  # by the number of places
        self._compile_state(functools.partial(_empty_state, model, limits, kv_dtype=kv_dtype))

    @property
    def num_compiled(self) -> int:
        """The small ones included."""
        return 2 + len(self._steps) + len(self._draws)

    def compile(self, program: Program) -> None:
        """Makes a step callable, and the drawing of its constrained places."""
        layout = StepLayout.of(program, self._limits)
        settings = RowSettings.of([SamplingParams()] * (self._limits.max_rows + 1))
        inputs = self._whole((settings, np.zeros(layout.num_words, np.int32)))
        outputs = None if self._shardings is None else (*[_whole(self._mesh)] * 3, self._shardings)
        jitted = jax.jit(functools.partial(self._step, layout=layout), donate_argnums=1, out_shardings=outputs)
        lowered = jitted.lower(self._parameters, self._shapes, *inputs)
        self._steps[program] = lowered.compile()
        if num_places(program) not in self._draws:
            _, _, places, state = lowered.out_info
            self._compile_draw(self._whole(places), settings, state.counts)

    def _compile_draw(self, places: Places, settings: RowSettings, counts: TokenCounts) -> None:
        number = len(places.slots)
        masks = np.zeros((number, -(-self._num_scores // 32)), np.uint32)
        outputs = None if self._shardings is None else (_whole(self._mesh), self._shardings.counts)
        jitted = jax.jit(self._draw, donate_argnums=2, out_shardings=outputs)
        inputs = (places, self._shapes.counts, *self._whole((settings, masks)))
        self._draws[number] = jitted.lower(self._parameters, *inputs).compile()

    def step(
        self,
        program: Program,
        state: State,
        settings: RowSettings,
        words: Int32[np.ndarray, " words"],
    ) -> tuple[Results, Scores, Places, State]:
        """What `unpack` reads, of each place and of each token of the prefill part; the places; the state afterwards.

        Where masks are waited for, nothing was drawn yet, and `draw` is to be called.

        Args:
            settings: of each slot, and a last row for places where nothing is wanted; from `put`.
            words: of the program's layout.
        """
        return self._steps[program](self._parameters, state, settings, words)

    def draw(
        self, places: Places, state: State, settings: RowSettings, allowed: UInt32[np.ndarray, "R masks"]
    ) -> tuple[Results, State]:
        """The results of a step that waited for these masks, see sample_rows, and the state afterwards."""
        results, counts = self._draws[len(allowed)](self._parameters, places, state.counts, settings, allowed)
        return results, State(state.cache, counts)

    def empty_state(self) -> State:
        """Pages of zeros and no counts."""
        return self._empty()

    def remember(self, state: State, slot: int, ids: Int32[np.ndarray, " T"], *, num_prompt: int) -> State:
        """The slot's counts anew: these ids, of which the first are the prompt's. Other slots keep theirs."""
        padded = np.zeros((1, self._limits.max_context), np.int32)
        padded[0, : len(ids)] = ids
        numbers = np.array([slot, len(ids), num_prompt], np.int32)
        return State(state.cache, self._remember(state.counts, padded, numbers))

    def put(self, arrays: Any) -> Any:
        """A tree of NumPy arrays, whole on every device. They are copied: the caller may change them."""
        if self._mesh is None:
            return jax.tree.map(lambda x: jnp.array(x, copy=True), arrays)
        whole = NamedSharding(self._mesh, P())
        # Not device_put: among several processes that would compare what each of them has.
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, whole, x.copy().__getitem__), arrays)

    def memory(self, program: Program) -> Any:
        """What XLA says of the step's memory: see jax.stages.Compiled.memory_analysis."""
        return self._steps[program].memory_analysis()

    def _compile_state(self, empty: Any) -> None:
        shapes = jax.eval_shape(empty)
        self._shardings = _shardings(shapes, self._mesh)
        self._shapes = _with_shardings(shapes, self._shardings)
        self._empty = jax.jit(empty, out_shardings=self._shardings).lower().compile()
        history = self._whole((np.zeros((1, self._limits.max_context), np.int32), np.zeros(3, np.int32)))
        counts = None if self._shardings is None else self._shardings.counts
        remember = jax.jit(_remember, donate_argnums=0, out_shardings=counts)
        self._remember = remember.lower(self._shapes.counts, *history).compile()

    def _whole(self, arrays: Any) -> Any:
        """Shapes of arrays that lie whole on every device."""
        whole = None if self._mesh is None else NamedSharding(self._mesh, P())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arrays)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """`Sampled` on the host, and of the prefill part's prompts on the device: they are seldom asked for."""

    ids: Int32[np.ndarray, " R"]
    logprobs: Float32[np.ndarray, " R"]
    top_ids: Int32[np.ndarray, "R best"]
    top_logprobs: Float32[np.ndarray, "R best"]
    scores: Scores

    def prompt_scores(self) -> "Drawn":
        """The scores as if they had been drawn: a row for each token of the prefill part, row by row."""
        return unpack(np.asarray(self.scores), self.scores)

    def tokens(self, first: int, ids: Sequence[int], *, num_top: int) -> list[Token]:
        """These ids with what stands about them in the rows from `first` on."""
        found = []
        for row, token_id in enumerate(ids, first):
            top = zip(self.top_ids[row, :num_top].tolist(), self.top_logprobs[row, :num_top].tolist(), strict=True)
            best = tuple((other, logprob) for other, logprob in top if other >= 0)
            found.append(Token(0, token_id, float(self.logprobs[row]), best))
        return found


def unpack(results: Int32[np.ndarray, "R fields"], scores: Scores) -> Drawn:
    """Views of what `_pack` made."""
    ids, numbers = results[:, : 1 + MAX_LOGPROBS], results[:, 1 + MAX_LOGPROBS :].view(np.float32)
    return Drawn(ids[:, 0], numbers[:, 0], ids[:, 1:], numbers[:, 1:], scores)


def _pack(sampled: Sampled) -> Results:
    """In one array, so that all comes to the host in one transfer."""
    numbers = jnp.concatenate([sampled.logprobs[:, None], sampled.top_logprobs], axis=1)
    ids = [sampled.ids[:, None], sampled.top_ids]
    return jnp.concatenate([*ids, lax.bitcast_convert_type(numbers, jnp.int32)], axis=1)


def _empty_state(model: GptOss, limits: Limits, *, kv_dtype: DTypeLike) -> State:
    pages = model.empty_pages(
        num_full_pages=limits.num_full_pages,
        num_sliding_pages=limits.num_sliding_pages,
        page_size=limits.page_size,
        dtype=kv_dtype,
    )
    return State(pages, TokenCounts.empty(limits.max_rows, model.num_scores))


def _shardings(shapes: State, mesh: AnyMesh | None) -> State | None:
    """Keys and values lie with their heads, counts with the vocabulary. None: as they come, on one device.

    On a TPU pages are pinned to lie one after the other. XLA would choose 128 pages side by side, because heads of 64
    fill half a lane each; but then it copies all of them before and after each write.
    """
    is_tpu = platform_of(mesh) == "tpu"
    if mesh is None and not is_tpu:
        return None

    def pages(pool: jax.ShapeDtypeStruct) -> Any:
        heads = _whole(mesh) if mesh is None else NamedSharding(mesh, partition((None, None, "kv_heads")))
        return Format(Layout(tuple(range(pool.ndim))), heads) if is_tpu else heads

    ids = _whole(mesh) if mesh is None else NamedSharding(mesh, partition((None, "vocab")))
    return State(jax.tree.map(pages, shapes.cache), jax.tree.map(lambda _: ids, shapes.counts))


def _whole(mesh: AnyMesh | None) -> Sharding:
    """On every device."""
    return SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, P())


def _with_shardings(shapes: State, shardings: State | None) -> State:
    if shardings is None:
        return shapes
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings)


def _remember(counts: TokenCounts, ids: Int[Array, "1 T"], numbers: Int[Array, "3"]) -> TokenCounts:
    slot, count, num_prompt = numbers
    cleared = reset_counts(counts, slot)
    return count_tokens(cleared, slot[None], ids, count=count[None], num_prompt=num_prompt[None])


def _step(
    parameters: list[Array],
    state: State,
    settings: RowSettings,
    words: Int[Array, " words"],
    *,
    graph: Graph,
    layout: StepLayout,
) -> tuple[Results, Scores, Places, State]:
    model = graph.merge(parameters)
    fields = layout.fields(words)
    hidden, cache = model.extend_paged([_part(part) for part in fields], state.cache)
    places = _places(layout.program, fields, hidden)
    is_masked = words[-1] != 0
    results, counts = _sample(model, places, state.counts, settings, is_wanted=places.is_wanted & ~is_masked)
    if layout.program.prefill_rows:
        scores = _prompt_scores(model, fields[-1], hidden[-1], settings)
    else:
        scores = jnp.zeros((0, _NUM_FIELDS), jnp.int32)
    return results, scores, places, State(cache, counts)


def _draw(
    parameters: list[Array],
    places: Places,
    counts: TokenCounts,
    settings: RowSettings,
    allowed: UInt32[Array, "R masks"],
    *,
    graph: Graph,
) -> tuple[Results, TokenCounts]:
    """What a step does in its end, where masks were waited for."""
    model = graph.merge(parameters)
    return _sample(model, places, counts, settings, is_wanted=places.is_wanted, allowed=allowed)


def _sample(
    model: GptOss,
    places: Places,
    counts: TokenCounts,
    settings: RowSettings,
    *,
    is_wanted: Bool[Array, " R"],
    allowed: UInt32[Array, "R masks"] | None = None,
) -> tuple[Results, TokenCounts]:
    # The last row of the settings asks for nothing, so that what nobody wants costs nothing.
    own = settings.rows(jnp.where(is_wanted, places.slots, len(settings.seed) - 1))

    def sample() -> Sampled:
        none = jnp.zeros((len(places.slots), 0), jnp.int32)
        said = RowCounts(counts, places.slots, drafts=none)
        return sample_rows(model.logits(places.hidden), own, index=places.index, counts=said, allowed=allowed)

    def skip() -> Sampled:
        """Prompts that have further chunks: the unembedding, a quarter of a small step, is not read."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sample))

    sampled = lax.cond(jnp.any(is_wanted), sample, skip)
    return _pack(sampled), _count(counts, places, own, sampled)


def _prompt_scores(model: GptOss, part: PartWords, hidden: Float[Array, "B T D"], settings: RowSettings) -> Scores:
    """What `_pack` makes for each token whose target is asked for; zeros for the others, which cost nothing."""
    targets = part.targets.reshape(-1)
    wanted = jnp.broadcast_to(settings.num_logprobs[part.slots][:, None], part.targets.shape).reshape(-1)

    def score(piece: tuple[Array, Array, Array]) -> Results:
        hidden, ids, wanted = piece

        def ask() -> Results:
            logits = model.logits(hidden)
            return _pack(Sampled(ids, logprobs_of(logits, ids), *top_logprobs(logits, wanted)))

        return lax.cond(jnp.any(ids != NOT_ASKED), ask, lambda: jnp.zeros((len(ids), _NUM_FIELDS), jnp.int32))

    size = min(len(targets), _SCORED_AT_ONCE)
    flat = hidden.reshape(len(targets), -1)
    found = lax.map(score, (_cut(flat, size), _cut(targets, size, filler=NOT_ASKED), _cut(wanted, size)))
    return found.reshape(-1, _NUM_FIELDS)[: len(targets)]


def _cut(x: Array, size: int, *, filler: int = 0) -> Array:
    """[R, …] in pieces [R / size, size, …], the last one filled up."""
    padded = jnp.pad(x, ((0, -len(x) % size), *[(0, 0)] * (x.ndim - 1)), constant_values=filler)
    return padded.reshape(-1, size, *x.shape[1:])


def _part(fields: PartWords) -> Part:
    return Part(
        fields.tokens,
        fields.slots,
        fields.first,
        fields.count,
        fields.full_table,
        fields.sliding_table,
        fields.adapter,
    )


def _places(program: Program, fields: tuple[PartWords, ...], hidden: list[Float[Array, "_ _ D"]]) -> Places:
    found = []
    parts = iter(zip(fields, hidden, strict=True))
    if program.decode_rows:
        found.append(_all_places(*next(parts)))
    if program.prefill_rows:
        found.append(_last_places(*next(parts)))
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *found)


def _all_places(part: PartWords, hidden: Float[Array, "B T D"]) -> Places:
    rows, width, _ = hidden.shape
    t = jnp.arange(width)
    index = (part.first - part.num_prompt)[:, None] + t + 1
    is_wanted = (t < part.count[:, None]) & (t >= (part.count - part.num_sampled)[:, None])
    slots = jnp.broadcast_to(part.slots[:, None], (rows, width))
    return Places(*(x.reshape(rows * width, *x.shape[2:]) for x in (hidden, slots, index, is_wanted)))


def _last_places(part: PartWords, hidden: Float[Array, "B T D"]) -> Places:
    last = jnp.maximum(part.count - 1, 0)
    found = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return Places(found, part.slots, part.first + part.count - part.num_prompt, part.num_sampled > 0)


def _count(counts: TokenCounts, places: Places, own: RowSettings, sampled: Sampled) -> TokenCounts:
    """With the new ids of slots that penalise. Their rows check no drafts, so each id that is sampled stands."""
    is_counted = (own.repetition != 1) | (own.presence != 0) | (own.frequency != 0)
    is_counted &= sampled.ids >= 0

    def add() -> TokenCounts:
        ids, count = sampled.ids[:, None], is_counted.astype(jnp.int32)
        return count_tokens(counts, places.slots, ids, count=count, num_prompt=jnp.zeros_like(count))

    return lax.cond(jnp.any(is_counted), add, lambda: counts)
