"""Which rows a process reads, where devices are those of one process; several are tried by tests/cli/test_train.py."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptoss_jax.sharding import make_mesh
from gptoss_jax.train.hosts import anywhere, share_of, to_devices
from gptoss_jax.train.order import Share
from tests.train.toy import draw


@pytest.mark.parametrize("mesh", [None, {"data": 2, "expert": 4}, {"tensor": 8}], ids=str)
def test_one_process_reads_all_rows(mesh: dict | None):
    assert share_of(None if mesh is None else make_mesh(**mesh), 4) == Share()


@pytest.mark.parametrize("rows", [(4,), (3, 4)], ids=str)
def test_rows_lie_over_data_and_whole_elsewhere(rows: tuple[int, ...]):
    batch = draw(0, rows)
    laid = to_devices(batch, make_mesh(data=2, tensor=2))
    assert laid.tokens.sharding.spec == P(*[None] * (len(rows) - 1), "data")
    assert laid.tokens.addressable_shards[0].data.shape == (*rows[:-1], 2, batch.tokens.shape[-1])
    np.testing.assert_array_equal(laid.weights, batch.weights)


def test_a_flag_of_one_process_is_its_own():
    assert anywhere(True)
    assert not anywhere(False)
