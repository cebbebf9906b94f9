"""Requests of stated lengths and the times at which they come, all drawn from one seed. Knows ids; knows no engine."""

import dataclasses
from typing import Literal

import numpy as np

from gptoss_jax.engine.request import Request, SamplingParams
from gptoss_jax.errors import UserError

Spread = Literal["even", "none"]

SPREADS: dict[Spread, str] = {
    "even": "lengths from half of the mean to one and a half of it at equal distances, shuffled",
    "none": "all alike",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long prompts and continuations are.

    Attributes:
        prompt_tokens: of a prompt, on average.
        new_tokens: of a continuation, on average.
        spread: see SPREADS.
    """

    prompt_tokens: int
    new_tokens: int
    spread: Spread = "even"

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1")

    @property
    def longest(self) -> int:
        """Tokens of one request at most, prompt and continuation."""
        return _bounds(self.prompt_tokens, self.spread)[1] + _bounds(self.new_tokens, self.spread)[1]


def requests(lengths: Lengths, number: int, *, vocab_size: int, rng: np.random.Generator) -> list[Request]:
    """Prompts of random ids, which have no prefix in common. Nothing ends a continuation before its length.

    They sample at temperature 1, each with a seed of its own: greedy text of random weights may repeat itself, and
    would read few experts.
    """

    def draw(mean: int) -> np.ndarray:
        """The middles of `number` equal slices of the range, shuffled: their mean is the same for any number."""
        low, high = _bounds(mean, lengths.spread)
        return np.floor(low + (high - low + 1) * (rng.permutation(number) + 0.5) / number).astype(int)

    sizes = zip(draw(lengths.prompt_tokens).tolist(), draw(lengths.new_tokens).tolist(), strict=True)
    seeds = rng.integers(2**32, size=number).tolist()
    return [
        Request(
            prompt=rng.integers(vocab_size, size=prompt_tokens).tolist(),
            max_new_tokens=new_tokens,
            sampling=SamplingParams(seed=seed),
            stop_ids=(),
        )
        for (prompt_tokens, new_tokens), seed in zip(sizes, seeds, strict=True)
    ]


def poisson_arrivals(rate: float, number: int, *, rng: np.random.Generator) -> list[float]:
    """Seconds after the start at which requests come, `rate` in a second on average: independent of each other, so the
    time from one to the next is exponentially distributed."""
    return np.cumsum(rng.exponential(1 / rate, size=number)).tolist()


def _bounds(mean: int, spread: Spread) -> tuple[int, int]:
    """The shortest and the longest; their middle is the mean."""
    half = mean // 2 if spread == "even" else 0
    return mean - half, mean + half
