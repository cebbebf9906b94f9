"""How a parameter's bytes lie in a device's memory, beside where they lie on the mesh. Knows layouts; moves nothing.

A TPU keeps arrays in tiles of 8 x 128, and its compiler turns an array so that its tiles are full. That is not always
what reads it:

                        as the compiler lays it       as it is read                     padded to whole tiles
    embedding           2880, 25136 ids last          25136, 2880: rows are gathered    2.2 %, 2880 lanes to 2944
    codes of down       192, 2880, 128 experts last   128, 192, 2880: by the kernel     2.2 %

Left to itself it copies the first into the second in every step, all ids and all experts of every layer.
"""

from jax.experimental.layout import Format
from jax.sharding import Sharding

from gptoss_jax.kernels.columns import placed
from gptoss_jax.model.experts import is_expert_matrix
from gptoss_jax.model.layers import Memory


def in_memory(
    path: str, *, rank: int, sharding: Sharding, impl: str, embedding: Memory = "device"
) -> Format | Sharding:
    """To load a parameter with: on a TPU row by row where the table above says so, else as the compiler likes.

    Args:
        path: as `parameters` names it.
        rank: its number of dimensions.
        sharding: where it lies on the mesh.
        impl: of moe_matmul.
        embedding: the memory that its table lies in.
    """
    if path == "embedding.weight" and embedding == "host":
        return sharding.with_memory_kind("pinned_host")
    if impl == "tpu" and (path == "embedding.weight" or is_expert_matrix(path)):
        return placed(sharding, ndim=rank)
    return sharding
