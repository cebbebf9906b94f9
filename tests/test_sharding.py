"""Meshes and the table of axes: what parses, what lies where, and what the errors say."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.errors import UserError
from gptoss_jax.sharding import (
    MESH_AXES,
    RULES,
    MeshShape,
    abstract_mesh,
    constrain,
    make_mesh,
    partition,
    place,
    row_axis,
)

shapes = st.builds(MeshShape, st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**6))


# ---- mesh shapes -----------------------------------------------------------------------------------------------------


@given(shapes)
def test_a_shape_parses_from_what_it_prints(shape: MeshShape):
    assert MeshShape.parse(str(shape)) == shape
    assert shape.num_devices == shape.data * shape.expert * shape.tensor


@given(st.permutations(MESH_AXES), st.integers(1, 3), st.sampled_from(["", " ", "  "]))
def test_axes_come_in_any_order_and_may_be_left_out(axes: list[str], count: int, space: str):
    named = dict(zip(axes[:count], (2, 3, 5), strict=False))
    text = ",".join(f"{space}{axis}{space}={space}{size}{space}" for axis, size in named.items())
    assert MeshShape.parse(text) == MeshShape(**named)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model=2", "names axis 'model'; expected data, expert, tensor, as in expert=4,tensor=2"),
        ("", "names axis ''"),
        ("expert=2,", "names axis ''"),
        ("4", "names axis '4'"),
        ("expert=2,expert=2", "names axis 'expert' twice; name it once"),
        ("expert", "gives expert the size ''; expected a positive integer"),
        ("expert=0", "gives expert the size '0'"),
        ("expert=-2", "gives expert the size '-2'"),
        ("expert=2.0", "gives expert the size '2.0'"),
        ("expert=²", "gives expert the size '²'"),
        ("expert=2=3", "gives expert the size '2=3'"),
        ("expert=two", "gives expert the size 'two'"),
    ],
)
def test_a_bad_shape_is_one_sentence(text: str, complaint: str):
    with pytest.raises(UserError) as raised:
        MeshShape.parse(text)
    assert str(raised.value).startswith(f"mesh {text!r} ")
    assert complaint in str(raised.value)


@given(st.text(max_size=40))
def test_any_text_is_a_shape_or_a_user_error(text: str):
    try:
        shape = MeshShape.parse(text)
    except UserError:
        return
    assert shape.num_devices >= 1


# ---- meshes ----------------------------------------------------------------------------------------------------------


def test_a_mesh_has_the_first_devices_in_order():
    mesh = make_mesh(data=1, expert=3, tensor=2)
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 1, "expert": 3, "tensor": 2}
    assert mesh.devices.ravel().tolist() == jax.devices()[:6]


def test_a_mesh_without_devices_is_of_the_same_kind():
    """Sharding is the compiler's there too: jax, left to itself, takes other axis types for it from 0.12 on."""
    mesh, without = make_mesh(expert=3, tensor=2), abstract_mesh(MeshShape(expert=3, tensor=2))
    assert (without.shape, without.axis_types) == (mesh.shape, mesh.axis_types)


def test_a_mesh_larger_than_the_machine_names_both_numbers():
    with pytest.raises(
        UserError, match=r"mesh data=2,expert=3,tensor=2 needs 12 devices, there are 8 \(cpu\).*smaller"
    ):
        make_mesh(data=2, expert=3, tensor=2)


# ---- places ----------------------------------------------------------------------------------------------------------


def test_the_table_names_mesh_axes():
    assert set(RULES.values()) == set(MESH_AXES)


def test_partition_follows_the_table():
    axes = ("experts", "expert_width", "gate_up", "width", None)
    assert partition(axes) == P("expert", "tensor", None, None, None)


@pytest.mark.parametrize("axes", [("heads", "kv_heads"), ("vocab", "width", "heads"), ("experts", "experts")])
def test_two_axes_on_one_mesh_axis_clash(axes: tuple[str, ...]):
    with pytest.raises(UserError, match=r"lie on mesh axis '(tensor|expert)' 2 times; once is possible"):
        partition(axes)


def test_place_puts_each_dimension_on_its_mesh_axis():
    mesh = make_mesh(expert=2, tensor=4)
    sharding = place("x", (6, 20, 3), ("experts", "expert_width", None), mesh)
    assert sharding == NamedSharding(mesh, P("expert", "tensor", None))
    assert sharding.shard_shape((6, 20, 3)) == (3, 5, 3)


def test_an_uneven_cut_names_both_numbers_and_the_ones_that_fit():
    mesh = make_mesh(tensor=8)
    with pytest.raises(UserError) as raised:
        place("layers.0.moe.down.blocks", (32, 2880, 90, 16), ("experts", "width", "expert_width_blocks", None), mesh)
    assert str(raised.value) == (
        "layers.0.moe.down.blocks has expert_width_blocks=90, which mesh axis tensor=8 does not divide: "
        "choose tensor among 1, 2, 3, 5, 6"
    )


def test_rows_are_split_where_they_divide():
    mesh = make_mesh(data=4, tensor=2)
    assert row_axis(8, mesh) == "data"
    assert row_axis(6, mesh) is None


def test_constrain_lays_out_rows_and_heads():
    mesh = make_mesh(data=2, tensor=4)
    axes = ("rows", None, "kv_heads", "head_dim")
    laid = constrain(jax.numpy.zeros((6, 3, 4, 5)), axes, mesh)
    assert laid.sharding.shard_shape(laid.shape) == (3, 3, 1, 5)
    whole_rows = constrain(jax.numpy.zeros((7, 3, 4, 5)), axes, mesh)
    assert whole_rows.sharding.shard_shape(whole_rows.shape) == (7, 3, 1, 5)


def test_constrain_without_a_mesh_does_nothing():
    x = jax.numpy.zeros((2, 3))
    assert constrain(x, ("rows", "width"), None) is x
