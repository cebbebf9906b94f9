"""One batch of packed rows, as a training step takes it. Knows arrays; knows no text and no files.

Several examples lie in one row of T tokens, each a segment, and none sees another:

    tokens      a b c d | x y z | .        what follows     b c d . | y z . | .
    starts      0 0 0 0 | 4 4 4 | 7        is real          1 1 1 1 | 1 1 1 | 0
"""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of tokens and what is to follow them. NumPy arrays too, until they lie on devices.

    Attributes:
        tokens: what the model reads.
        targets: the id behind each token in its segment; 0 where none is.
        weights: how much the loss of each target counts; 0 is not at all.
        starts: where in the row the token's segment begins; a token of padding begins its own.
        is_real: which tokens are no padding.
    """

    __no_type_check__ = True  # jax rebuilds it with whatever the leaves became

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    starts: Int[Array, "B T"]
    is_real: Bool[Array, "B T"]
