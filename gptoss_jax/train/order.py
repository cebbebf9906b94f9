"""Which comes when: a shuffle per epoch, a place in it, the share of each host. Knows numbers; knows no examples.

    units       0 1 2 3 4 5 6 …          examples, or pairs of them
    epoch 1     5 0 6 | 2 4 1 | 3 …      shuffled anew, by the seed and the epoch alone
                window 0  window 1       packed each by itself, its rows shuffled once more

A place is three numbers, and what comes after it depends on nothing else: a run that goes on sees what it would have
seen. To find a place again one window is packed, from lengths alone, and nothing before it is read.

Grain is not used. It shuffles and shares out as well, but it packs the examples themselves: every host would render
every line to have its own rows, and a dependency would stand in for the few lines below.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

from gptoss_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Position:
    """A place in the stream: what comes next. Without arguments, the beginning.

    Attributes:
        epoch: how often all examples have been seen.
        window: of the epoch.
        row: of the window; a pair counts as one.
    """

    epoch: int = 0
    window: int = 0
    row: int = 0

    def as_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Position":
        """The inverse of as_json. Raises UserError for anything else."""
        names = [field.name for field in dataclasses.fields(cls)]
        if sorted(found) != sorted(names):
            raise UserError(f"the position in the data has {', '.join(sorted(found))}; expected {', '.join(names)}")
        for name, value in found.items():
            if type(value) is not int or value < 0:
                raise UserError(f"the position in the data has {name} {value!r}; expected a number from 0")
        return cls(**found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """The rows of a batch that a host has: the batch cut into equal parts, in order. By default all of them."""

    host: int = 0
    num_hosts: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.host < self.num_hosts:
            raise UserError(f"host {self.host} of {self.num_hosts}: expected a number from 0 to {self.num_hosts - 1}")

    def of(self, count: int, *, at_once: int = 1) -> slice:
        """Which of `count` rows; `at_once` of them stay together."""
        if count % (self.num_hosts * at_once):
            raise UserError(
                f"a batch has {count} rows, for {self.num_hosts} hosts; "
                f"expected a multiple of {self.num_hosts * at_once}, so that each has as many"
            )
        size = count // self.num_hosts
        return slice(self.host * size, (self.host + 1) * size)


def shuffled(count: int, *, seed: int, epoch: int, window: int | None = None) -> Int64[np.ndarray, " n"]:
    """The numbers from 0 to count in an order that depends on the arguments alone.

    NumPy keeps the bits of its generators from version to version, but not what it makes of them: so the bits
    themselves are sorted.
    """
    key = (epoch, 0 if window is None else window + 1)
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.int64)
