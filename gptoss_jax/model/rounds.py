"""Visits that travel to their experts and back in rounds of one size. Knows mesh axes; knows no experts.

A visit is a token at one of the experts of its choice; the device that has the expert is its owner. A round has room
for a fixed number of visits, so its memory is fixed too; there are as many rounds as the fullest device needs. Padded
and Ragged cut the same visits into rounds in two ways.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Round: TypeAlias = Callable[[Array, Any, Any], Array]


def count(numbers: Int[Array, " S"], size: int) -> Int[Array, " size"]:
    """How often each of 0, 1, … size - 1 occurs."""
    return jnp.sum(numbers[:, None] == jnp.arange(size), axis=0, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Visits:
    """Where the visits of this device's M tokens go and those of others come from, among e devices over `expert`.

    A device sorts its visits by expert, so by owner too: those to one owner lie together, its list.

    Attributes:
        token: [M X], for each sorted visit the token that makes it.
        rank: [M, X], where the token's visits are among the sorted.
        owner: [M, X], the device that has the expert; for padding any.
        counts: [e, e, experts of a device], visits of each device to each owner's experts.
        room: visits of one round.
    """

    __no_type_check__ = True  # jax rebuilds it with whatever the leaves became

    token: Array
    rank: Array
    owner: Array
    counts: Array
    room: int = dataclasses.field(metadata={"static": True})

    @property
    def lengths(self) -> Int[Array, "e e"]:
        """Of the list from each device to each owner."""
        return jnp.sum(self.counts, axis=2)

    @property
    def starts(self) -> Int[Array, "e e"]:
        """Of each owner's list among the sorted visits of each device."""
        return _sum_before(self.lengths, axis=1)

    def _agreed(self, num_rounds: Int[Array, ""]) -> Int[Array, ""]:
        """The most of any device: rounds are collectives, which all data shards are better off to make together."""
        return num_rounds if lax.axis_size("data") == 1 else lax.pmax(num_rounds, "data")


@jax.tree_util.register_dataclass
class Padded(Visits):
    """A round sends the next `room` visits of each list, empty slots where a list has ended.

    to owner      0        1        2             a round of room 3
    lists         a b c d  e        f g h
    round 0       a b c    e . .    f g h
    round 1       d . .    . . .    . . .
    """

    def num_rounds(self) -> Int[Array, ""]:
        """As many as the longest list needs."""
        return self._agreed(-(-jnp.max(self.lengths) // self.room))

    def send(self, x: Float[Array, "M D"], number: Int[Array, ""]) -> Float[Array, "R D"]:
        """What this device receives: `room` rows from each device, one after the other. Empty slots hold any row."""
        slots = self.starts[lax.axis_index("expert")][:, None] + self._positions(number)
        return self._travel(x[self.token[jnp.minimum(slots, len(self.token) - 1)]])

    def experts_of_received(self, number: Int[Array, ""]) -> Int[Array, " R"]:
        """Which of this device's experts each row is for; of an empty slot one more than there are."""
        ends = jnp.cumsum(self.counts[:, lax.axis_index("expert")], axis=1)
        return jnp.sum(ends[:, None] <= self._positions(number)[:, None], axis=2).reshape(-1)

    def send_back(self, out: Float[Array, "R D"], number: Int[Array, ""]) -> Float[Array, "R D"]:
        """A slot's result returns to the slot that it was sent from."""
        del number
        return self._travel(out.reshape(len(self.counts), self.room, -1))

    def place(self, number: Int[Array, ""]) -> tuple[Int[Array, "M X"], Bool[Array, "M X"]]:
        """Where the token's results are among those that came back, and whether they came in this round."""
        here = lax.axis_index("expert")
        position = self.rank - self.starts[here][self.owner]
        slot = position - number * self.room
        is_here = (slot >= 0) & (slot < self.room) & (position < self.lengths[here][self.owner])
        return self.owner * self.room + jnp.clip(slot, 0, self.room - 1), is_here

    def _positions(self, number: Int[Array, ""]) -> Int[Array, " room"]:
        return number * self.room + jnp.arange(self.room)

    def _travel(self, rows: Float[Array, "e room D"]) -> Float[Array, "R D"]:
        return lax.all_to_all(rows, "expert", split_axis=0, concat_axis=0).reshape(-1, rows.shape[-1])


@jax.tree_util.register_dataclass
class Ragged(Visits):
    """A round fills the `room` rows of each receiver, whose visits come in the order of their senders.

    sender        0        1        2             a receiver with room 5
    its lists     a b c d  e        f g h
    round 0       a b c d  e
    round 1                         f g h
    """

    def num_rounds(self) -> Int[Array, ""]:
        """As many as the fullest receiver needs."""
        return self._agreed(-(-jnp.max(jnp.sum(self.lengths, axis=0)) // self.room))

    def send(self, x: Float[Array, "M D"], number: Int[Array, ""]) -> Float[Array, "room D"]:
        """What this device receives; rows behind are zeros."""
        here = lax.axis_index("expert")
        first, last = self._window(number)
        sizes = last - first
        room = jnp.zeros((self.room, x.shape[1]), x.dtype)
        there = _sum_before(sizes, axis=0)[here]
        return lax.ragged_all_to_all(
            x[self.token], room, (self.starts + first)[here], sizes[here], there, sizes[:, here], axis_name="expert"
        )

    def experts_of_received(self, number: Int[Array, ""]) -> Int[Array, " room"]:
        """Which of this device's experts each row is for; of a row behind one more than there are."""
        counts = self.counts[:, lax.axis_index("expert")]
        ends = jnp.cumsum(counts.reshape(-1))
        positions = number * self.room + jnp.arange(self.room)
        passed = jnp.sum(ends <= positions[:, None], axis=1)
        return jnp.where(passed < len(ends), passed % counts.shape[1], counts.shape[1])

    def send_back(self, out: Float[Array, "room D"], number: Int[Array, ""]) -> Float[Array, "S D"]:
        """A visit's result returns to its place among the sorted."""
        here = lax.axis_index("expert")
        first, last = self._window(number)
        sizes = last - first
        results = jnp.zeros((len(self.token), out.shape[1]), out.dtype)
        from_here, there = _sum_before(sizes, axis=0)[:, here], (self.starts + first)[:, here]
        return lax.ragged_all_to_all(out, results, from_here, sizes[:, here], there, sizes[here], axis_name="expert")

    def place(self, number: Int[Array, ""]) -> tuple[Int[Array, "M X"], Bool[Array, "M X"]]:
        """Where the token's results are among those that came back, and whether they came in this round."""
        here = lax.axis_index("expert")
        first, last = (ends[here][self.owner] for ends in self._window(number))
        position = self.rank - self.starts[here][self.owner]
        return self.rank, (position >= first) & (position < last)

    def _window(self, number: Int[Array, ""]) -> tuple[Int[Array, "e e"], Int[Array, "e e"]]:
        """From which to which entry each list [from, to] goes in this round."""
        lengths = self.lengths
        begin = number * self.room - _sum_before(lengths, axis=0)
        return jnp.clip(begin, 0, lengths), jnp.clip(begin + self.room, 0, lengths)


def _sum_before(sizes: Int[Array, "e e"], *, axis: int) -> Int[Array, "e e"]:
    return jnp.cumsum(sizes, axis=axis) - sizes


def plan_rounds(
    chosen: Int[Array, "M X"], kind: type[Padded] | type[Ragged], *, num_experts: int, room: int
) -> Padded | Ragged:
    """The visits of all devices, of which each has chosen for its tokens; one collective tells everybody's counts.

    Args:
        chosen: the experts of each token; `num_experts` is none, for padding.
        kind: how visits are cut into rounds.
        num_experts: of all devices; each has as many.
        room: see `kind`.
    """
    shards = lax.axis_size("expert")
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    return kind(
        token=order // chosen.shape[1],
        rank=jnp.argsort(order).reshape(chosen.shape),
        owner=jnp.minimum(chosen // (num_experts // shards), shards - 1),
        counts=lax.all_gather(count(flat, num_experts).reshape(shards, -1), "expert"),
        room=room,
    )


def sum_of_rounds(
    one_round: Round, *, start: Float[Array, "M D"], num_rounds: Int[Array, ""], fixed: Any, moving: Any
) -> Float[Array, "M D"]:
    """start + one_round(0, fixed, moving) + one_round(1, fixed, moving) + …; gradients go to start and `moving`.

    jax cannot go back through a loop whose length the data decides. The loop back is as long and makes each round
    again, so nothing of a round is kept. Gradients add up in float32.
    """
    return _sum_of_rounds(one_round, start, num_rounds, fixed, moving)


# jax.custom_vjp takes no keyword-only arguments.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_rounds(one_round: Round, start: Array, num_rounds: Array, fixed: Any, moving: Any) -> Array:
    return lax.fori_loop(0, num_rounds, lambda number, total: total + one_round(number, fixed, moving), start)


def _forward(one_round: Round, *operands: Any) -> tuple[Array, tuple[Any, ...]]:
    return _sum_of_rounds(one_round, *operands), operands[1:]


def _backward(one_round: Round, saved: tuple[Any, ...], d_sum: Array) -> tuple[Array, None, None, Any]:
    num_rounds, fixed, moving = saved

    def add(number: Array, total: Any) -> Any:
        _, back = jax.vjp(lambda moving: one_round(number, fixed, moving), moving)
        return jax.tree.map(lambda total, part: total + part.astype(jnp.float32), total, back(d_sum)[0])

    zeros = jax.tree.map(lambda value: jnp.zeros(value.shape, jnp.float32), moving)
    total = lax.fori_loop(0, num_rounds, add, zeros)
    return d_sum, None, None, jax.tree.map(lambda total, value: total.astype(value.dtype), total, moving)


_sum_of_rounds.defvjp(_forward, _backward)
