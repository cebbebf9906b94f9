"""How a model's heads, experts, widths and vocabulary are fitted to a mesh. Knows sizes; knows no arrays."""

from gptoss_jax.errors import UserError
from gptoss_jax.kernels.mxfp4 import BLOCK
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.sharding import WHOLE, AnyMesh, Fit, Placement


def place_model(config: ModelConfig, mesh: AnyMesh | None) -> Placement:
    """The placement of a model of these sizes.

    The expert width is cut between MXFP4 blocks, so that a shard holds whole blocks; experts and vocabulary are padded
    to a multiple of their axis. A padded expert is never routed to, a padded id scores -inf, a padded head has no
    weights, and a padded width has neither weights nor bias, which the swiglu leaves at exactly zero.

    Raises:
        UserError: more devices on `tensor` than there are heads.
    """
    if mesh is None:
        return WHOLE
    tensor = mesh.shape["tensor"]
    heads, kv_heads = fit_heads(config.num_heads, config.num_kv_heads, tensor)
    fits = {
        "heads": heads,
        "kv_heads": kv_heads,
        "vocab": Fit.padded(config.vocab_size, tensor),
        "experts": Fit.padded(config.num_experts, mesh.shape["expert"]),
    }
    return Placement(mesh, fits | _fit_expert_width(config.expert_width, tensor))


def fit_heads(num_heads: int, num_kv_heads: int, tensor: int) -> tuple[Fit, Fit]:
    """The fits of query heads and key/value heads: every device gets whole groups of query heads with their key head.

    Key heads are repeated where there are fewer than devices, each copy with a part of its query heads, and no more
    often than gives every device one: each copy costs its own KV cache. What misses to a full grid is padded.

    Raises:
        UserError: tensor exceeds the query heads: some devices would have none.
    """
    if tensor > num_heads:
        raise UserError(
            f"mesh axis tensor={tensor} exceeds the model's {num_heads} query heads: "
            f"choose tensor up to {num_heads}, and spread further devices over data or expert"
        )
    group = num_heads // num_kv_heads
    copies = next(n for n in range(1, group + 1) if group % n == 0 and num_kv_heads * n >= tensor)
    keys = Fit.padded(num_kv_heads * copies, tensor).fitted
    return Fit(num_heads, keys * group // copies), Fit(num_kv_heads, keys, repeat=copies)


def _fit_expert_width(expert_width: int, tensor: int) -> dict[str, Fit]:
    """Whole blocks; a width that is none (which only plain experts can have) is cut anywhere it has to be."""
    if expert_width % BLOCK:
        return {"expert_width": Fit.padded(expert_width, tensor)}
    blocks = Fit.padded(expert_width // BLOCK, tensor)
    return {"expert_width": Fit(expert_width, blocks.fitted * BLOCK), "expert_width_blocks": blocks}
