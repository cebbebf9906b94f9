"""How long a device takes for something small, or for steps in a row. Knows clocks and loops; knows no model."""

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax
from jaxtyping import Array, Int

Carry = TypeVar("Carry")

ROUNDS = 5
_FIRST_GUESS = 8
_MOST_REPEATS = 10_000


def seconds_inside(
    step: Callable[[Carry, Any, Int[Array, ""]], Carry], carry: Carry, operands: Any, *, budget: float
) -> float:
    """The median time of one step among rounds of many, which the device repeats by itself: no launch is in it.

    Each step must depend on the carry of the one before, or the compiler would make it once. `budget` is in seconds,
    for all rounds together; a step that takes longer is timed once.
    """
    guess = _rounds(step, carry, operands, 1, rounds=1)[0]
    if guess > budget:  # once is all that there is time for
        return guess
    if guess < budget / _FIRST_GUESS:  # else a launch is nothing beside the step
        guess = min(_rounds(step, carry, operands, _FIRST_GUESS, rounds=2)) / _FIRST_GUESS
    repeats = max(1, min(_MOST_REPEATS, int(budget / ROUNDS / max(guess, 1e-9))))
    return statistics.median(_rounds(step, carry, operands, repeats)) / repeats


def _rounds(
    step: Callable[..., Carry], carry: Carry, operands: Any, repeats: int, *, rounds: int = ROUNDS
) -> list[float]:
    """The number of repeats is part of the program: XLA on GPUs asks the host before each turn of any other loop."""

    @jax.jit
    def repeat(carry: Carry, operands: Any) -> Carry:
        return lax.fori_loop(0, repeats, lambda i, carry: step(carry, operands, i), carry)

    jax.block_until_ready(repeat(carry, operands))  # compiled, and warm
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(repeat(carry, operands))
        found.append(time.perf_counter() - start)
    return found


def seconds_outside(
    run: Callable[[Carry], Carry], carry: Carry, *, budget: float, most: int = _MOST_REPEATS
) -> tuple[float, Carry]:
    """The median time of a call among rounds of calls in a row, as a program makes them, and the last carry.

    The host runs ahead of the device: a launch takes time only where it takes longer than the work.
    """
    for _ in range(2):  # compiled: the second time for a carry that lies where the program itself puts it
        carry = jax.block_until_ready(run(carry))
    start = time.perf_counter()
    carry = jax.block_until_ready(run(carry))
    guess = time.perf_counter() - start
    repeats = max(1, min(most, int(budget / ROUNDS / max(guess, 1e-9))))
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(repeats):
            carry = run(carry)
        jax.block_until_ready(carry)
        found.append((time.perf_counter() - start) / repeats)
    return statistics.median(found), carry
