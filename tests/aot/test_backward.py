"""Gradients at the release's sizes, compiled for GPUs and TPUs: kernels forward, XLA backward, nothing held whole."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.aot import topology_devices
from gptoss_jax.kernels import attention
from gptoss_jax.kernels.choose import layout
from gptoss_jax.kernels.columns import Columns
from gptoss_jax.kernels.moe_matmul import moe_matmul
from gptoss_jax.kernels.mxfp4 import MXFP4

pytestmark = [
    pytest.mark.aot,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),  # jax 0.12
]

COMPILERS = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}
EXPERTS, WIDTH, VISITS = 32, 2880, 4 * 2048
ONE_EXPERT = WIDTH * 2 * WIDTH * 4  # in float32
MIB = 1 << 20


@pytest.fixture(params=[("h100-1", "gpu"), ("v5e-1", "tpu")], ids=lambda param: param[0])
def target(request: pytest.FixtureRequest) -> tuple[str, NamedSharding]:
    """The implementation, and where its operands lie."""
    name, impl = request.param
    if importlib.util.find_spec(COMPILERS[impl]) is None:
        pytest.skip(f"needs {COMPILERS[impl]}")
    return impl, NamedSharding(Mesh(np.array(topology_devices(name)[:1]), ("x",)), P())


def test_moe_matmul_unpacks_one_expert_at_a_time(target: tuple[str, NamedSharding]):
    impl, sharding = target

    def shape(dtype: str, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    blocks = WIDTH // 32
    if layout(impl) == "rows":
        codes, scales = shape("uint8", EXPERTS, WIDTH, 2, blocks, 16), shape("uint8", EXPERTS, WIDTH, 2, blocks)
        weight = MXFP4(codes, scales)
    else:
        codes, scales = shape("uint8", EXPERTS, 2, 16 * blocks, WIDTH), shape("uint8", EXPERTS, 2, blocks, WIDTH)
        weight = Columns(codes, scales)
    x, bias = shape("bfloat16", VISITS, WIDTH), shape("bfloat16", EXPERTS, WIDTH, 2)

    def gradients(
        x: jax.Array, weight: MXFP4 | Columns, bias: jax.Array, sizes: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def loss(x: jax.Array, bias: jax.Array) -> jax.Array:
            out = moe_matmul(x, weight, bias, sizes, swiglu_limit=7.0, impl=impl)
            return (out.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(x, bias)

    compiled = jax.jit(gradients).lower(x, weight, bias, shape("int32", EXPERTS)).compile()
    assert "moe_matmul" in compiled.as_text(), "the kernel is not found: the test reads the program wrongly"
    memory = compiled.memory_analysis()
    assert memory is not None
    around = 2 * VISITS * WIDTH * 2  # what went forward, and its gradient
    assert memory.temp_size_in_bytes < ONE_EXPERT + around  # all experts would be 1 GiB in bfloat16


@pytest.mark.parametrize("window", [None, 128])
def test_attention_never_holds_all_scores(target: tuple[str, NamedSharding], window: int | None):
    impl, sharding = target
    queries, heads, kv_heads, head_dim = 4096, 64, 8, 64
    num_keys = 32768 if window is None else window + queries

    def shape(dtype: str, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array, first: jax.Array) -> jax.Array:
        if window is None:
            out = attention.full(q, k, v, sinks, first_query=first, impl=impl)
        else:
            out = attention.sliding(q, k, v, sinks, first_query=first, window=window, impl=impl)
        return (out.astype(jnp.float32) ** 2).sum()

    q, k = shape("bfloat16", 1, queries, heads, head_dim), shape("bfloat16", 1, num_keys, kv_heads, head_dim)
    operands = (q, k, k, shape("float32", heads), shape("int32", 1))
    memory = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*operands).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 1536 * MIB < 4 * queries * heads * num_keys
