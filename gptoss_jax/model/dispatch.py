"""How tokens reach the experts of other devices and come back. Knows mesh axes and experts; knows no parameters.

A device has the tokens of its data shard and the experts of its expert shard. A visit is a token at one of the X
experts of its choice; the device that has the expert is the visit's owner. Three ways, one result, no visit dropped:

    reduce      Every device takes all tokens to its own experts; one sum over expert and tensor. For few tokens.
    exchange    Tokens are cut over expert; visits travel to their owners by all-to-all and their results come back, in
                rounds with room for a fixed number of visits between any two devices. For many tokens.
    ragged      The same by ragged all-to-all, which sends no empty slots: a round has a fixed room at each receiver.
                XLA has it for GPU and TPU, not for CPU.

Rounds bound the memory whatever the routing: a balanced load takes one, all tokens at one expert take more of the same
size. Gradients go back as they came, round by round.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.kernels.moe_matmul.adapted import adapted_matmul
from gptoss_jax.kernels.permute import permuted
from gptoss_jax.model.implementations import device_kind_of, platform_of
from gptoss_jax.model.rounds import Padded, Ragged, count, plan_rounds, sum_of_rounds
from gptoss_jax.sharding import AnyMesh, row_axis

Way = Literal["reduce", "exchange", "ragged"]
Leaves: TypeAlias = list[Array]
Experts: TypeAlias = tuple[Any, Array, Any, Array]  # gate_up and its bias, down and its bias; however matrices lie
Visit: TypeAlias = Callable[..., Array]  # `_visit` of one implementation

_START_BYTES = 1 << 20  # what a collective costs beside its bytes: a link of 100 GB/s moves this in 10 microseconds
_SLACK = 1.25  # of the mean load, or four deviations of a random one where that is more: so much room has a round
_ROOM_STEP = 8  # a room is whole sublanes of a TPU


@dataclasses.dataclass(frozen=True)
class Load:
    """The sizes that decide which way is cheaper, and how much room a round has.

    Attributes:
        num_tokens: of one data shard.
        itemsize: bytes of one activation.
        expert_shards: devices that share the experts.
        tensor_shards: devices that share the width of each expert.
        token_shards: devices that exchange cuts the tokens over; expert_shards, and those of `data` too where its rows
            are whole.
        sum_itemsize: bytes of one number of a sum over devices, which is of float32; but XLA for TPU moves the rounding
            of its result to bfloat16 before it, and sends bfloat16 (tests/aot/test_dispatch.py).
    """

    num_tokens: int
    width: int
    itemsize: int
    num_experts: int
    experts_per_token: int
    expert_shards: int
    tensor_shards: int
    token_shards: int
    sum_itemsize: int = 4

    @property
    def tokens_per_device(self) -> int:
        """Of exchange; the last ones may be padding."""
        return -(-self.num_tokens // self.token_shards)

    def own_visits(self, way: Way) -> int:
        """To the experts of one device, on average: of the rows that it has to look at fewer than all are."""
        if way == "reduce":
            return -(-self.num_tokens * self.experts_per_token // self.expert_shards)
        return self.tokens_per_device * self.experts_per_token

    def room(self, way: Way) -> int:
        """Visits of one round: from one device to another (exchange), or to one device from all (ragged)."""
        local_experts = -(-self.num_experts // self.expert_shards)
        senders = self.expert_shards if way == "ragged" else 1
        most = senders * self.tokens_per_device * min(self.experts_per_token, local_experts)
        mean = senders * self.tokens_per_device * self.experts_per_token * local_experts / self.num_experts
        room = max(_SLACK * mean, mean + 4 * math.sqrt(mean))
        return min(math.ceil(room / _ROOM_STEP) * _ROOM_STEP, most)

    def bytes_sent(self, way: Way) -> float:
        """By one device, if all goes in one round; sums and gathers go round a ring.

        With N tokens of width D, w and s bytes of an activation and of a number in a sum, e expert shards, t tensor
        shards, and r devices that tokens are cut over (r = e where data divides the rows):

            reduce      2 s (et-1)/et N D
            exchange    2 w (e-1) room D  +  w (r-1)/r N D  +  2 s (t-1)/t N/r D,    room = 1.25 X N/(r e), or some more
            ragged      2 w (e-1)/e X N/r D  and the same behind
        """
        e, t, r = self.expert_shards, self.tensor_shards, self.token_shards
        if way == "reduce":
            return 2 * self.sum_itemsize * (e * t - 1) / (e * t) * self.num_tokens * self.width
        rows = self.room(way) if way == "exchange" else self.tokens_per_device * self.experts_per_token / e
        visits = 2 * self.itemsize * (e - 1) * rows * self.width
        results = self.tokens_per_device * self.width
        return visits + self.itemsize * (r - 1) * results + 2 * self.sum_itemsize * (t - 1) / t * results

    def choose_way(self) -> Way:
        """reduce or exchange, whichever sends less; each collective counts as 1 MiB more.

        reduce has one collective, exchange four (counts, visits, results, tokens) and one more over tensor. So at the
        release's width in bfloat16, with 4 experts per token, tokens are exchanged from this many on:

            expert shards      2       4       8      16
            GPU            never   1,482     509     366
            TPU            never   never   never   3,148

        ragged is never chosen, only named.
        """
        exchange = self.bytes_sent("exchange") + (4 + (self.tensor_shards > 1)) * _START_BYTES
        return "exchange" if exchange < self.bytes_sent("reduce") + _START_BYTES else "reduce"


def mix(
    x: Float[Array, "B T D"],
    logits: Float[Array, "B T E"],
    experts: Experts,
    *,
    experts_per_token: int,
    limit: float,
    impl: str,
    is_real: Bool[Array, "B T"] | None = None,
    adapter: Int[Array, "B T"] | None = None,
    mesh: AnyMesh | None = None,
    way: Way | None = None,
    expert_specs: Any = None,
) -> Float[Array, "B T D"]:
    """The sum over each token's best experts, weighted by the softmax over their logits.

    Args:
        x: rows cut over `data` if it divides them, else whole there; whole over the other axes. So is the result.
        logits: of the real experts; those that pad `experts` at the end are never visited.
        experts: cut over `expert` by their first axis, over `tensor` by the expert width.
        experts_per_token: how many are best.
        limit: where swiglu cuts gate and up.
        impl: of moe_matmul, resolved.
        is_real: tokens that are not come out as zeros, and cost nothing; None is all.
        adapter: which of the adapters that `experts` have each token takes, -1 none; None is all of them.
        mesh: None is one device, which needs no way.
        way: None is `Load.choose_way`.
        expert_specs: a tree of PartitionSpecs for `experts`, which a mesh needs.

    Raises:
        UserError: no way has that name.
        Unsupported: the way cannot run on the mesh's devices.
    """
    check_way(way, mesh=mesh)
    if not x.size:  # a round would have no room
        return x
    visit = functools.partial(_visit, limit=limit, impl=impl, device_kind=device_kind_of(mesh))
    if mesh is None:
        rows, logits = x.reshape(-1, x.shape[-1]), logits.reshape(-1, logits.shape[-1])
        chosen, weights = route(logits, experts_per_token)
        chosen = _only_of_real(chosen, _flat(is_real), nobody=len(experts[-1]))
        mixed = _visit_own(rows, chosen, weights, experts, adapter=_flat(adapter), first_expert=0, visit=visit)
        return mixed.astype(x.dtype).reshape(x.shape)

    row_spec = P(row_axis(x.shape[0], mesh))
    cut = ("expert",) if row_spec[0] else ("data", "expert")
    load = _load(x, mesh, cut=cut, num_experts=logits.shape[-1], experts_per_token=experts_per_token)
    chosen_way = load.choose_way() if way is None else way
    visit = functools.partial(visit, expected_rows=load.own_visits(chosen_way))

    def local(x: Array, logits: Array, experts: Experts, is_real: Array | None, adapter: Array | None) -> Array:
        rows, logits = x.reshape(-1, x.shape[-1]), logits.reshape(-1, logits.shape[-1])
        tokens: dict[str, Any] = {"is_real": _flat(is_real), "adapter": _flat(adapter)}
        experts = _with_one_bias(experts)
        if chosen_way == "reduce":
            mixed = _reduce(rows, logits, experts, load=load, visit=visit, **tokens)
        else:
            mixed = _exchange(rows, logits, experts, load=load, cut=cut, way=chosen_way, visit=visit, **tokens)
        return mixed.reshape(x.shape)

    # Routing is inside: outside XLA gathers the rows of all devices before a top_k. The loops, whose number of steps
    # differs by device, have no replication rule to check.
    in_specs = (row_spec, row_spec, expert_specs, row_spec, row_spec)
    on_mesh = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=row_spec, check_vma=False)
    return on_mesh(x, logits, experts, is_real, adapter)


def _flat(x: Array | None) -> Array | None:
    return None if x is None else x.reshape(-1)


def _load(
    x: Float[Array, "B T D"], mesh: AnyMesh, *, cut: tuple[str, ...], num_experts: int, experts_per_token: int
) -> Load:
    """Of one device; exchange cuts the tokens over the axes `cut`."""
    return Load(
        num_tokens=x.shape[0] * x.shape[1] // (1 if "data" in cut else mesh.shape["data"]),
        width=x.shape[2],
        itemsize=x.dtype.itemsize,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_shards=mesh.shape["expert"],
        tensor_shards=mesh.shape["tensor"],
        token_shards=math.prod(mesh.shape[axis] for axis in cut),
        sum_itemsize=x.dtype.itemsize if platform_of(mesh) == "tpu" else 4,
    )


def route(
    logits: Float[Array, "*tokens E"], experts_per_token: int
) -> tuple[Int[Array, "*tokens X"], Float[Array, "*tokens X"]]:
    """The best experts of each token, and the softmax over their logits only (after the choice, not before)."""
    best, chosen = lax.top_k(logits, experts_per_token)
    return chosen, jax.nn.softmax(best, axis=-1)


def _only_of_real(chosen: Int[Array, "M X"], is_real: Bool[Array, " M"] | None, *, nobody: int) -> Int[Array, "M X"]:
    """Padding visits nobody: it would cost as much as a token, and have experts read that no token chose."""
    return chosen if is_real is None else jnp.where(is_real[:, None], chosen, nobody)


def check_way(way: str | None, *, mesh: AnyMesh | None) -> None:
    """Raises UserError for a name that no way has, Unsupported for a way that cannot run on the mesh's devices."""
    if way is not None and way not in get_args(Way):
        raise UserError(f"dispatch {way!r} is unknown; expected one of {', '.join(get_args(Way))}")
    if way == "ragged" and mesh is not None and platform_of(mesh) == "cpu":
        raise Unsupported(
            "dispatch 'ragged' needs ragged_all_to_all, which XLA has for GPU and TPU, and the mesh's devices are cpu: "
            "choose 'exchange', which sends the same visits with padding, or leave the choice open"
        )


def _with_one_bias(experts: Experts) -> Experts:
    """On each shard of the expert width down is a part of a sum: only the first adds the bias."""
    gate_up, gate_up_bias, down, down_bias = experts
    is_first = lax.axis_index("tensor") == 0
    return gate_up, gate_up_bias, down, jnp.where(is_first, down_bias, jnp.zeros_like(down_bias))


# ---- experts of this device ------------------------------------------------------------------------------------------


def _visit(
    x: Float[Array, "M D"],
    expert: Int[Array, " S"],
    experts: Experts,
    *,
    adapter: Int[Array, " M"] | None = None,
    expected_rows: int | None = None,
    limit: float,
    impl: str,
    device_kind: str | None,
) -> Float[Array, "S D"]:
    """For each visit what the expert makes of its token, in float32; zero where there is no such expert here.

    Tokens have S / M visits each, one after the other.
    """
    gate_up, gate_up_bias, down, down_bias = experts
    order = jnp.argsort(expert, stable=True)  # visits to nobody have the highest number, and sort behind
    place = jnp.argsort(order)
    group_sizes = count(expert, len(down_bias))
    settings: dict[str, Any] = {"expected_rows": expected_rows, "impl": impl, "device_kind": device_kind}
    settings["adapter"] = None if adapter is None else adapter[order // (len(order) // len(x))]
    visits = permuted(x, order, place)
    hidden = adapted_matmul(visits, gate_up, gate_up_bias, group_sizes, swiglu_limit=limit, **settings)
    return permuted(adapted_matmul(hidden, down, down_bias, group_sizes, **settings), place, order)


def _visit_own(
    x: Float[Array, "M D"],
    chosen: Int[Array, "M X"],
    weights: Float[Array, "M X"],
    experts: Experts,
    *,
    adapter: Int[Array, " M"] | None,
    first_expert: Int[Array, ""] | int,
    visit: Visit,
) -> Float[Array, "M D"]:
    """The weighted sum over the chosen among these experts, which are first_expert, first_expert + 1, …"""
    num_experts = len(experts[-1])
    own = chosen.reshape(-1) - first_expert
    own = jnp.where((own >= 0) & (own < num_experts), own, num_experts)
    out = visit(x, own, experts, adapter=adapter).reshape(*chosen.shape, -1)
    return _weighted_sum(weights, out)


def _weighted_sum(weights: Float[Array, "M X"], out: Float[Array, "M X D"]) -> Float[Array, "M D"]:
    """Written out, because a TPU rounds the float32 operands of a product."""
    return jnp.sum(weights[..., None] * out.astype(jnp.float32), axis=1)


# ---- ways ------------------------------------------------------------------------------------------------------------


def _reduce(
    x: Float[Array, "M D"],
    logits: Float[Array, "M E"],
    experts: Experts,
    *,
    is_real: Bool[Array, " M"] | None,
    adapter: Int[Array, " M"] | None,
    load: Load,
    visit: Visit,
) -> Float[Array, "M D"]:
    """All tokens at the experts of this device; one sum brings experts and width together."""
    first = lax.axis_index("expert") * len(experts[-1])
    chosen, weights = route(logits, load.experts_per_token)
    chosen = _only_of_real(chosen, is_real, nobody=load.expert_shards * len(experts[-1]))
    mixed = _visit_own(x, chosen, weights, experts, adapter=adapter, first_expert=first, visit=visit)
    return _sum_over(("expert", "tensor"), mixed).astype(x.dtype)


def _exchange(
    x: Float[Array, "N D"],
    logits: Float[Array, "N E"],
    experts: Experts,
    *,
    is_real: Bool[Array, " N"] | None,
    adapter: Int[Array, " N"] | None,
    load: Load,
    cut: tuple[str, ...],
    way: Way,
    visit: Visit,
) -> Float[Array, "N D"]:
    """This device's share of the tokens at everybody's experts; one gather brings the tokens together."""
    size = load.tokens_per_device
    first = lax.axis_index(cut) * size

    def share(rows: Array) -> Array:
        padded = jnp.pad(rows, ((0, size * load.token_shards - len(rows)), *[(0, 0)] * (rows.ndim - 1)))
        return lax.dynamic_slice_in_dim(padded, first, size)

    chosen, weights = route(share(logits), load.experts_per_token)
    num_experts = load.expert_shards * len(experts[-1])
    is_token = first + jnp.arange(size) < len(x)
    visits = plan_rounds(
        _only_of_real(chosen, is_token if is_real is None else share(is_real), nobody=num_experts),
        Ragged if way == "ragged" else Padded,
        num_experts=num_experts,
        room=load.room(way),
    )
    numbers, codes, join = _take_apart(experts)
    # Rows travel as floats, which hold such small numbers whole.
    own = None if adapter is None else share(adapter).astype(jnp.float32)[:, None]

    def one_round(
        number: Array, fixed: tuple[Padded | Ragged, Array | None, Leaves], moving: tuple[Array, Array, Leaves]
    ) -> Array:
        visits, own, codes = fixed
        x, weights, numbers = moving
        received = visits.send(x, number)
        adapter = None if own is None else visits.send(own, number)[:, 0].astype(jnp.int32)
        expert = visits.experts_of_received(number)
        out = visit(received, expert, join(numbers, codes), adapter=adapter)
        results = visits.send_back(out.astype(x.dtype), number)
        place, is_here = visits.place(number)
        return _weighted_sum(weights, jnp.where(is_here[..., None], results[place], 0))

    start = jnp.zeros((size, x.shape[1]), jnp.float32)
    mixed = sum_of_rounds(
        one_round,
        start=start,
        num_rounds=visits.num_rounds(),
        fixed=(visits, own, codes),
        moving=(share(x), weights, numbers),
    )
    mixed = _sum_over(("tensor",), mixed).astype(x.dtype)
    return lax.all_gather(mixed, cut, tiled=True)[: len(x)]


def _sum_over(axes: tuple[str, ...], x: Float[Array, "M D"]) -> Float[Array, "M D"]:
    """One device alone is its own sum; XLA would keep a collective for it."""
    shared = tuple(axis for axis in axes if lax.axis_size(axis) > 1)
    return lax.psum(x, shared) if shared else x


def _take_apart(experts: Experts) -> tuple[Leaves, Leaves, Callable[[Leaves, Leaves], Experts]]:
    """The arrays that have a gradient, the codes that have none, and what puts them together again."""
    leaves, tree = jax.tree.flatten(experts)
    is_number = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def only(wanted: bool) -> Leaves:
        return [leaf for leaf, found in zip(leaves, is_number, strict=True) if found == wanted]

    def join(numbers: Leaves, codes: Leaves) -> Experts:
        left = {True: iter(numbers), False: iter(codes)}
        return jax.tree.unflatten(tree, [next(left[found]) for found in is_number])

    return only(True), only(False), join
