"""The chosen mesh is the best of those that fit, by a search of its own over all of them."""

import pytest

from gptoss_jax.configs import model_config
from gptoss_jax.errors import UserError
from gptoss_jax.model.footprint import footprint, reads
from gptoss_jax.model.mesh_choice import choose_mesh
from gptoss_jax.sharding import MeshShape

LARGE = model_config("gpt-oss-120b")
V5E = 16_911_433_728


def every(num_devices: int) -> list[MeshShape]:
    sizes = range(1, num_devices + 1)
    return [MeshShape(d, e, t) for d in sizes for e in sizes for t in sizes if d * e * t == num_devices]


@pytest.mark.parametrize("num_devices", [1, 6, 8, 16])
@pytest.mark.parametrize(("batch", "context"), [(1, 131072), (8, 131072), (64, 2048)])
def test_no_mesh_that_fits_reads_less(num_devices: int, batch: int, context: int) -> None:
    job = {"rows": batch, "capacity": context}
    held = {shape: footprint(LARGE, shape, **job) for shape in every(num_devices)}
    chosen, _ = choose_mesh(LARGE, num_devices, batch=batch, context=context, bytes_per_device=V5E)
    fitting = [shape for shape in held if held[shape].total <= V5E and shape.tensor <= LARGE.num_kv_heads]
    if not fitting:
        assert held[chosen].total == min(each.total for each in held.values())
        return
    assert chosen in fitting
    least = min(reads(LARGE, shape, held[shape], rows=batch).total for shape in fitting)
    assert reads(LARGE, chosen, held[chosen], rows=batch).total == least


def test_the_reason_names_the_runner_up_and_what_does_not_fit() -> None:
    chosen, why = choose_mesh(LARGE, 8, batch=1, context=131072, bytes_per_device=V5E)
    assert chosen == MeshShape(tensor=8)
    assert "next is data=1,expert=2,tensor=4 with" in why
    assert "more would not fit" in why


def test_where_nothing_fits_the_reason_says_so() -> None:
    chosen, why = choose_mesh(LARGE, 4, batch=1, context=131072, bytes_per_device=V5E)
    assert chosen.num_devices == 4
    assert "no mesh of 6 keeps weights and cache within 16.91 GB" in why


def test_a_number_of_devices_that_divides_nothing_has_a_mesh() -> None:
    chosen, _ = choose_mesh(LARGE, 7, batch=1, context=1024)
    assert chosen.num_devices == 7


def test_no_devices_are_an_error() -> None:
    with pytest.raises(UserError, match="a mesh of 0 devices"):
        choose_mesh(LARGE, 0, batch=1, context=1024)
