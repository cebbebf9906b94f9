"""The whole step that `generate` compiles, sampling included, on simulated devices: what travels, and nothing else."""

import dataclasses
import math
import re
from typing import NamedTuple

import jax.numpy as jnp
import pytest
from flax import nnx

from gptoss_jax.engine.generate import step
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.engine.sampling import RowSettings
from gptoss_jax.model.config import alternating_layers
from gptoss_jax.model.dispatch import Way
from gptoss_jax.model.transformer import GptOss, parameters, split
from gptoss_jax.sharding import MeshShape, make_mesh, place
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, layer_kinds=alternating_layers(2))
ROWS = 4
slow = pytest.mark.slow


class Collective(NamedTuple):
    kind: str
    dtype: str
    sizes: tuple[int, ...]  # elements of each array that one device gets


def collectives(program: str) -> list[Collective]:
    found = []
    kinds = r"all-[\w-]+|collective-[\w-]+|reduce-scatter[\w-]*|ragged-[\w-]+"
    for shapes, kind in re.findall(rf" = (.*?) ({kinds})\(", program):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        sizes = tuple(math.prod(map(int, filter(None, dims.split(",")))) for _, dims in arrays)
        found.append(Collective(kind, arrays[0][0], sizes))
    return found


def compiled(shape: MeshShape, *, num_tokens: int, dispatch: Way) -> list[Collective]:
    mesh = make_mesh(**dataclasses.asdict(shape))
    model = GptOss(CONFIG, dtype=jnp.bfloat16, mesh=mesh, dispatch=dispatch, rngs=nnx.Rngs(0))
    tokens, count = jnp.zeros((ROWS, num_tokens), jnp.int32), jnp.full(ROWS, num_tokens, jnp.int32)
    settings = RowSettings.of([SamplingParams(temperature=0.7, top_k=20, top_p=0.9)] * ROWS)
    cache = model.empty_cache(rows=ROWS, capacity=30)
    lowered = step.lower(*split(model), tokens, count, cache, settings, jnp.zeros(ROWS, jnp.int32))
    return collectives(lowered.compile().as_text())


@pytest.mark.parametrize(
    ("shape", "num_tokens"),
    [
        (MeshShape(1, 4, 2), 1),
        pytest.param(MeshShape(2, 1, 3), 1, marks=slow),  # 352 ids are padded to 354, 4 key heads to 6
        pytest.param(MeshShape(1, 1, 6), 11, marks=slow),
        pytest.param(MeshShape(1, 1, 8), 1, marks=slow),
        pytest.param(MeshShape(2, 2, 2), 11, marks=slow),
        pytest.param(MeshShape(1, 8, 1), 1, marks=slow),
    ],
    ids=str,
)
def test_a_step_sends_hidden_sums_and_next_to_nothing_for_the_ids(shape: MeshShape, num_tokens: int):
    """No weight, no cache and no score travels.

    In full width there is one sum for the embedding, whose rows lie apart, and two for each layer: of heads, and of
    experts and width. Of sampling only the sums of a pass over the scores of a row travel, what is best, and at the end
    the ids of the rows of other data shards.
    """
    found = compiled(shape, num_tokens=num_tokens, dispatch="reduce")
    rows = ROWS // shape.data
    hidden = rows * num_tokens * CONFIG.width
    wide = [each for each in found if max(each.sizes) >= hidden]
    sums = (1 + CONFIG.num_layers) * (shape.tensor > 1) + CONFIG.num_layers * (shape.expert * shape.tensor > 1)
    assert wide == [Collective("all-reduce", "f32", (hidden,))] * sums
    narrow = [each for each in found if each not in wide]
    assert {each.kind for each in narrow} <= {"all-reduce", "all-gather"}
    gathered = [each.sizes for each in narrow if each.kind == "all-gather"]
    reduced = [each.sizes for each in narrow if each.kind == "all-reduce"]
    # The best score and the lowest id that has it, when greedy and when drawn; four searches (top_k, top_p and, where
    # scores are equal, their ids) and the sums around them; and whether any row, of other data shards too, asks for it.
    assert len(reduced) <= 18 * (shape.num_devices > shape.expert)
    assert all(sum(sizes) <= 2 * rows for sizes in reduced)
    assert gathered == [(ROWS,), (ROWS,)] * (shape.data > 1)  # the ids, and whether one was possible


@pytest.mark.slow
def test_a_step_that_exchanges_sends_visits_and_one_gather_a_layer():
    """Of experts only: heads and ids travel as they do above."""
    shape, num_tokens = MeshShape(1, 4, 2), 11
    found = compiled(shape, num_tokens=num_tokens, dispatch="exchange")
    hidden = ROWS * num_tokens * CONFIG.width
    wide = [each.kind for each in found if sum(each.sizes) >= hidden]
    assert wide.count("all-reduce") == 1 + CONFIG.num_layers  # embedding and heads
    assert wide.count("all-gather") == CONFIG.num_layers  # the tokens come together
    visits = [each for each in found if each.kind == "all-to-all"]
    assert len(visits) == 2 * CONFIG.num_layers  # there and back


@pytest.mark.parametrize("impl", ["xla", "tpu-interpret"])
def test_a_model_made_on_a_mesh_lies_there(impl: str):
    """In either layout of the experts; 8 experts and 7 blocks of width are padded."""
    mesh = make_mesh(expert=3, tensor=2)
    for path, value in parameters(GptOss(CONFIG, mesh=mesh, impl=impl, rngs=nnx.Rngs(0))).items():
        wanted = place(path, value.shape, value.get_metadata()["axes"], mesh)
        assert value[...].sharding.is_equivalent_to(wanted, value.ndim), path
