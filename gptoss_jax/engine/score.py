"""How likely a model finds given texts, id by id. Knows ids and logits; knows no characters and no files.

    texts ─► by shape ─► chunks [rows, width] ─► cache ─► outputs ─► scores of a few tokens ─► logprob of each next id

A shape says how long the chunks of a text are, how much room its cache has and how many rows share a step. It follows
from the text's length alone, so there are few of them, and each is compiled once: texts of 32 tokens at most, of 64,
of 128, …; from 512 on in chunks of 512. Rows that nobody needs are padding.

    choices       context c c c c c ┬ a a         the context is fed once, its last token with each choice: behind that
    of a question                   └ b b b       stands the choice's first

Batch-exact: a text's numbers have the same bits alone, in any company and in any order. The chunks of a text always
begin at the same places and run through the same program, whose rows know nothing of each other. That holds where a
row of a product comes out the same whatever its place and whatever the other rows are. `cpu-invariant` is made so;
XLA's products on CPUs and the dense ones of `cpu` were found so. Elsewhere a text has its step to itself (on a mesh,
one row of each data shard), and the same program with the same input gives the same bits: the experts of `cpu` sum many
rows in another order than few, experts on several devices exchange visits in rounds that company fills, and GPUs and
TPUs have not been tried.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from gptoss_jax.engine.logprobs import best_ids, logprobs_of
from gptoss_jax.errors import UserError
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.implementations import platform_of
from gptoss_jax.model.transformer import GptOss, Graph, split
from gptoss_jax.sharding import AnyMesh, constrain

BATCH_TOKENS = 2048
_CHUNK = 512  # tokens of a row in one step at most
_SHORTEST, _SHORTEST_BRANCH = 32, 8  # shapes below these would save less than compiling them costs
_LOGITS_AT_ONCE = 128  # tokens: 103 MB of scores in the release, in each data shard
_LOOKAHEAD = 1024  # texts that may wait for others of their shape
_NOT_ASKED = -1
# Implementations whose rows do not depend on those beside them: see above.
_ROWS_APART = {
    "attention": ("xla", "cpu", "cpu-invariant"),
    "linear": ("xla", "cpu", "cpu-invariant"),
    "moe_matmul": ("xla", "cpu-invariant"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Ids to be scored, each given all before it.

    Attributes:
        from_token: the first that counts; those before are only read. The very first has nothing before it.
    """

    tokens: Sequence[int]
    from_token: int = 1

    def check(self, *, vocab_size: int, max_context: int) -> None:
        """Raises UserError for what no model of these sizes can score."""
        if not 1 <= self.from_token < len(self.tokens):
            raise UserError(
                f"a text of {len(self.tokens)} ids is to be scored from id {self.from_token} on; expected 1 or more, "
                "and an id there: add ids, or begin earlier"
            )
        outside = next((i for i in self.tokens if not 0 <= i < vocab_size), None)
        if outside is not None:
            raise UserError(f"a text holds id {outside}; expected 0 to {vocab_size - 1}, the model's vocabulary")
        if len(self.tokens) > max_context:
            raise UserError(
                f"a text has {len(self.tokens)} ids; the context has {max_context}: shorten it, or cut it with windows"
            )


@dataclasses.dataclass(frozen=True)
class Scored:
    """What the model thinks of each id that counts.

    Attributes:
        logprobs: natural logarithms; a log-softmax in float32.
        is_best: whether no other id was likelier; of equals the lowest is the best.
    """

    logprobs: Float32[np.ndarray, " T"]
    is_best: Bool[np.ndarray, " T"]

    @property
    def total(self) -> float:
        """Log-likelihood of all ids, added up in float64."""
        return float(np.sum(self.logprobs, dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would say just this."""
        return bool(np.all(self.is_best))


def windows(tokens: Sequence[int], *, size: int) -> list[Text]:
    """A text in pieces of at most `size` ids that overlap by half or more: together they score each id but the first.

    Behind the first window each id is scored with size / 2 or more before it.
    """
    if size < 2:
        raise UserError(f"a window has {size} ids; expected at least 2, an id and the one behind it")
    found = [Text(tokens=tokens[:size])]
    done = size
    while done < len(tokens):
        end = min(done + size - size // 2, len(tokens))
        found.append(Text(tokens=tokens[end - size : end], from_token=done - (end - size)))
        done = end
    return found


def score(
    model: GptOss, texts: Iterable[Text], *, batch_tokens: int = BATCH_TOKENS, batch_exact: bool = True
) -> Iterator[Scored]:
    """The texts' scores, in the order given; texts are taken as they are needed.

    Args:
        model: on one device or a mesh; of several processes all are given the same texts.
        texts: see Text.
        batch_tokens: positions in the cache of one step, over all its rows; a longer text has a step to itself.
        batch_exact: False lets texts share steps also where a text's last bits then depend on its company: many short
            texts are faster so.

    Raises:
        UserError: a text that the model cannot score, when its turn comes.
    """
    for (only,) in score_choices(model, ([text] for text in texts), batch_tokens=batch_tokens, batch_exact=batch_exact):
        yield only


def score_choices(
    model: GptOss, questions: Iterable[Sequence[Text]], *, batch_tokens: int = BATCH_TOKENS, batch_exact: bool = True
) -> Iterator[tuple[Scored, ...]]:
    """As `score`, for texts that begin alike, such as a question with each of its answers.

    What all texts of a question have in common before the first id that counts is computed once. So the bits of its
    numbers depend on the question, not on which others are asked; the same text by itself may differ in the last ones.
    """
    scorer = _Scorer(model, batch_tokens=batch_tokens, batch_exact=batch_exact)
    waiting: collections.defaultdict[_Shape, list[tuple[int, _Tree]]] = collections.defaultdict(list)
    done: dict[int, tuple[Scored, ...]] = {}
    told = 0

    def run(shape: _Shape) -> None:
        numbers, trees = zip(*waiting.pop(shape), strict=True)
        done.update(zip(numbers, scorer.run(shape, trees), strict=True))

    for number, question in enumerate(questions):
        if not question:
            raise UserError(f"question {number} has no texts; expected at least 1")
        for text in question:
            text.check(vocab_size=model.config.vocab_size, max_context=model.config.max_context)
        tree = _Tree.of(question)
        shape = scorer.shape_of(tree)
        waiting[shape].append((number, tree))
        if len(waiting[shape]) == shape.rows:
            run(shape)
        elif number - told >= _LOOKAHEAD:
            run(next(shape for shape, trees in waiting.items() if trees[0][0] == told))
        while told in done:
            yield done.pop(told)
            told += 1
    for shape in list(waiting):
        run(shape)
    yield from (done[number] for number in sorted(done))


# ---- what is fed -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Line:
    """Ids of one row, and what is asked behind each of them: the id that comes next, or nothing."""

    tokens: Int32[np.ndarray, " T"]
    targets: Int32[np.ndarray, " T"]

    @classmethod
    def of(cls, text: Text, *, start: int) -> "_Line":
        """The text from `start` on; its last id is only asked for."""
        ids = np.asarray(text.tokens[start:], np.int32)
        is_asked = np.arange(start + 1, len(text.tokens)) >= text.from_token
        return cls(ids[:-1], np.where(is_asked, ids[1:], _NOT_ASKED).astype(np.int32))

    @classmethod
    def unasked(cls, tokens: Sequence[int]) -> "_Line":
        return cls(np.asarray(tokens, np.int32), np.full(len(tokens), _NOT_ASKED, np.int32))


@dataclasses.dataclass(frozen=True)
class _Tree:
    """A stem that branches go on from; the stem of a single text is empty."""

    stem: _Line
    branches: tuple[_Line, ...]

    @classmethod
    def of(cls, texts: Sequence[Text]) -> "_Tree":
        start = max(_num_shared(texts) - 1, 0) if len(texts) > 1 else 0
        stem = _Line.unasked(texts[0].tokens[:start])
        return cls(stem, tuple(_Line.of(text, start=start) for text in texts))

    @property
    def longest_branch(self) -> int:
        return max(len(branch.tokens) for branch in self.branches)


def _num_shared(texts: Sequence[Text]) -> int:
    """Ids that all have in common before the first that counts."""
    most = min(text.from_token for text in texts)
    heads = np.array([text.tokens[:most] for text in texts])
    return int(np.argmin(np.append((heads == heads[0]).all(axis=0), False)))


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The sizes of a tree's programs.

    Attributes:
        rows: trees, and then branches, of one step.
        capacity: of the cache, in tokens of a row.
        stem_width: tokens of a stem's row in one step; 0 where there is no stem.
        branch_width: tokens of a branch's.
    """

    rows: int
    capacity: int
    stem_width: int
    branch_width: int


class _Scorer:
    """A model ready to be fed."""

    def __init__(self, model: GptOss, *, batch_tokens: int, batch_exact: bool):
        if batch_tokens < 1:
            raise UserError(f"batch_tokens is {batch_tokens}; expected at least 1")
        self._model = model
        self._graph, self._parameters = split(model)
        self._data_shards = 1 if model.mesh is None else model.mesh.shape["data"]
        self._shared_tokens = batch_tokens if rows_are_apart(model) or not batch_exact else 0

    def shape_of(self, tree: _Tree) -> _Shape:
        stem, branch = len(tree.stem.tokens), tree.longest_branch
        capacity = _power_of_two(stem + branch, least=_SHORTEST)
        whole = min(capacity, _CHUNK)
        return _Shape(
            rows=self._data_shards * max(1, self._shared_tokens // capacity // self._data_shards),
            capacity=capacity,
            stem_width=whole if stem else 0,
            branch_width=min(_power_of_two(branch, least=_SHORTEST_BRANCH), _CHUNK) if stem else whole,
        )

    def run(self, shape: _Shape, trees: Sequence[_Tree]) -> list[tuple[Scored, ...]]:
        """The scores of each tree's branches; there are at most as many trees as rows."""
        stems = None
        if shape.stem_width:
            _, stems = self._feed(self._empty(shape), [tree.stem for tree in trees], width=shape.stem_width)
        lines = [(row, line) for row, tree in enumerate(trees) for line in tree.branches]
        found: list[list[Scored]] = [[] for _ in trees]
        for first in range(0, len(lines), shape.rows):
            rows, some = zip(*lines[first : first + shape.rows], strict=True)
            cache = self._empty(shape) if stems is None else self._copies(stems, rows)
            scores, _ = self._feed(cache, some, width=shape.branch_width)
            for row, scored in zip(rows, scores, strict=True):
                found[row].append(scored)
        return [tuple(scores) for scores in found]

    def _empty(self, shape: _Shape) -> Cache:
        return self._model.empty_cache(rows=shape.rows, capacity=shape.capacity)

    def _copies(self, stems: Cache, rows: Sequence[int]) -> Cache:
        """A cache of as many rows, which go on from those of the stems; more of them are copies that nobody needs."""
        return _copy_rows(stems, np.array(_filled(rows, len(stems.length)), np.int32), mesh=self._model.mesh)

    def _feed(self, cache: Cache, lines: Sequence[_Line], *, width: int) -> tuple[list[Scored], Cache]:
        """Chunk by chunk, each line in its row; consumes the cache."""
        num_rows, lengths = len(cache.length), [len(line.tokens) for line in lines]
        size = -(-max(lengths) // width) * width
        tokens, targets = np.zeros((num_rows, size), np.int32), np.full((num_rows, size), _NOT_ASKED, np.int32)
        for row, line in enumerate(lines):
            tokens[row, : lengths[row]], targets[row, : lengths[row]] = line.tokens, line.targets
        chunks = []
        for start in range(0, size, width):
            cut = slice(start, start + width)
            count = np.clip(np.array(_filled(lengths, num_rows)) - start, 0, width).astype(np.int32)
            found, cache = _step(self._graph, self._parameters, tokens[:, cut], targets[:, cut], count, cache)
            chunks.append(found)
        logprobs, is_best = (
            np.concatenate([np.asarray(x) for x in each], axis=1) for each in zip(*chunks, strict=True)
        )
        asked = [(row, targets[row] != _NOT_ASKED) for row in range(len(lines))]
        return [Scored(logprobs[row, which], is_best[row, which]) for row, which in asked], cache


def rows_are_apart(model: GptOss) -> bool:
    """Whether it is known that no row of a step changes a bit of another: see above."""
    mesh, dispatch = model.mesh, model.layers[0].moe.dispatch
    exchanges = mesh is not None and mesh.shape["expert"] > 1 and dispatch != "reduce"
    names = dataclasses.asdict(model.impl)
    return platform_of(mesh) == "cpu" and not exchanges and all(names[op] in known for op, known in _ROWS_APART.items())


def _power_of_two(number: int, *, least: int) -> int:
    return max(1 << (number - 1).bit_length(), least)


def _filled(values: Sequence[int], size: int) -> list[int]:
    """With zeros behind."""
    return [*values, *[0] * (size - len(values))]


# ---- what is compiled ------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _step(
    graph: Graph,
    parameters: list[Array],
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    count: Int[Array, " B"],
    cache: Cache,
) -> tuple[tuple[Float[Array, "B T"], Bool[Array, "B T"]], Cache]:
    """Feeds `count` tokens of each row; of each target, if there is one, its logprob and whether it is the best id."""
    model = graph.merge(parameters)
    hidden, cache = model.extend(tokens, cache, count=count)
    rows, width = tokens.shape
    few = min(width, _floor_power_of_two(_LOGITS_AT_ONCE // rows))

    def read(piece: tuple[Float[Array, "B few D"], Int[Array, "B few"]]) -> tuple[Array, Array]:
        hidden, ids = piece[0].reshape(rows * few, -1), piece[1].reshape(-1)

        def ask() -> tuple[Array, Array]:
            logits = model.logits(hidden)
            return logprobs_of(logits, ids), best_ids(logits) == ids

        def skip() -> tuple[Array, Array]:
            return jnp.zeros(ids.shape, jnp.float32), jnp.zeros(ids.shape, bool)

        return lax.cond(jnp.any(ids != _NOT_ASKED), ask, skip)

    # Pieces are cut across time: a data shard keeps its rows.
    pieces = (_apart(hidden, few), _apart(targets, few))
    found = [_together(x, rows) for x in lax.map(read, pieces)]
    if model.mesh is not None:  # whole everywhere, so that each of several processes can read them
        found = lax.with_sharding_constraint(found, NamedSharding(model.mesh, PartitionSpec()))
    return (found[0], found[1]), cache


def _apart(x: Array, few: int) -> Array:
    """[B, T, …] in pieces [T / few, B, few, …]."""
    return jnp.swapaxes(x.reshape(x.shape[0], -1, few, *x.shape[2:]), 0, 1)


def _together(pieces: Array, rows: int) -> Array:
    """[T / few, B * few] as [B, T]."""
    return jnp.swapaxes(pieces.reshape(len(pieces), rows, -1), 0, 1).reshape(rows, -1)


def _floor_power_of_two(number: int) -> int:
    return 1 << (max(number, 1).bit_length() - 1)


@functools.partial(jax.jit, static_argnames="mesh")
def _copy_rows(cache: Cache, rows: Int[Array, " B"], *, mesh: AnyMesh | None) -> Cache:
    """Row i of the copy is row rows[i]."""
    axes = ("rows", None, "kv_heads", "head_dim")
    layers = jax.tree.map(lambda x: constrain(x[rows], axes, mesh), cache.layers)
    return Cache(layers, constrain(cache.length[rows], ("rows",), mesh))
