"""Which rows of a batch a process reads, and how all of them make one array. Knows meshes; knows no data."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.errors import UserError
from gptoss_jax.train.batch import Batch
from gptoss_jax.train.order import Share


def share_of(mesh: Mesh | None, num_rows: int) -> Share:
    """The rows that this process reads of batches of so many, which `data` divides.

    Processes whose devices hold the same rows, since another mesh axis runs through them, have the same share.

    Raises:
        UserError: its devices hold rows that are no such part: the mesh goes through the processes crosswise.
    """
    if mesh is None or jax.process_count() == 1:
        return Share()
    held = NamedSharding(mesh, P("data")).addressable_devices_indices_map((num_rows,)).values()
    cuts = {index[0].indices(num_rows)[:2] for index in held if index is not None}
    start, stop = min(cut[0] for cut in cuts), max(cut[1] for cut in cuts)
    size = sum(end - begin for begin, end in cuts)
    if size != stop - start or num_rows % size or start % size:
        raise UserError(
            f"process {jax.process_index()} holds {size} of {num_rows} rows, which are no neighbours: "
            "choose mesh sizes so that the devices of a process are whole parts of `data`, or the other way round"
        )
    return Share(host=start // size, num_hosts=num_rows // size)


def to_devices(batch: Batch, mesh: Mesh | None) -> Batch:
    """This process's rows among those of all processes, on the mesh; an axis before them, accumulation, is whole."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)

    def place(rows: np.ndarray) -> jax.Array:
        spec = P(*[None] * (rows.ndim - 2), "data")
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), rows)

    return jax.tree.map(place, batch)


def anywhere(flag: bool) -> bool:
    """Whether the flag is up in any process; all of them ask at once, and all get the same answer."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))
