"""Sums with worked reasoning, column by column. Knows numbers; knows no ids.

347 + 85 at low effort       347+085                        place under place, whatever the lengths
                             7+5=12,4+8+1=13,3+0+1=4        each column once, from the right
at medium effort             347+085
                             ones 7+5=12                    the same with its place,
                             tens 4+8+1=13                  and the result
                             hundreds 3+0+1=4
                             432
at high effort               check 12-5=7, right            and then the last digits once more, the other way round

Of a difference, 347-85 is 7-5=2,4-8=6-10,3-0-1=2: first what is to be worked out, then its digit, then whether ten was
borrowed for it. So each sign follows from the few before it.
"""

import dataclasses
from collections.abc import Sequence
from random import Random
from typing import Literal

from examples.nano.lessons import Lesson, Setting, answer, varied
from examples.nano.words import FIRST_NAMES, THINGS
from gptoss_jax.harmony.messages import Effort, User

Sign = Literal["+", "-", "*"]
_PLACES = ("ones", "tens", "hundreds", "thousands")
_WIDTH = 3

_ASKED: dict[Sign, tuple[str, ...]] = {
    "+": (
        "What is {a} + {b}?",
        "{a} + {b}",
        "{a}+{b}",
        "{a}+{b}=",
        "{a} + {b} = ?",
        "Calculate {a} + {b}.",
        "How much is {a} + {b}?",
        "Add {a} and {b}.",
        "What is {a} plus {b}?",
        "{a} plus {b}",
        "What is the sum of {a} and {b}?",
        "What's {a}+{b}?",
    ),
    "-": (
        "What is {a} - {b}?",
        "{a} - {b}",
        "{a}-{b}",
        "{a}-{b}=",
        "{a} - {b} = ?",
        "Calculate {a} - {b}.",
        "How much is {a} - {b}?",
        "Subtract {b} from {a}.",
        "What is {a} minus {b}?",
        "{a} minus {b}",
        "What is the difference of {a} and {b}?",
        "What's {a}-{b}?",
    ),
    "*": (
        "What is {a} * {b}?",
        "{a} * {b}",
        "{a}*{b}",
        "{a}*{b}=",
        "{a} × {b} = ?",
        "Calculate {a} × {b}.",
        "How much is {a} x {b}?",
        "Multiply {a} by {b}.",
        "What is {a} times {b}?",
        "{a} times {b}",
        "What is the product of {a} and {b}?",
        "What's {a}*{b}?",
    ),
}
_STORIES: dict[Sign, tuple[tuple[str, str], ...]] = {
    "+": (
        ("{who} has {a} {things} and gets {b} more. How many {things} does {who} have now?", "{who} has {c} {things}."),
        ("There are {a} {things} in one box and {b} in another. How many are there?", "There are {c} {things}."),
        ("{who} buys {a} {things} today and {b} tomorrow. How many is that?", "That is {c} {things}."),
    ),
    "-": (
        ("{who} has {a} {things} and gives {b} away. How many {things} are left?", "{c} {things} are left."),
        ("There were {a} {things} and {b} were sold. How many are left?", "{c} {things} are left."),
        ("{who} needs {a} {things} and has {b}. How many are missing?", "{c} {things} are missing."),
    ),
    "*": (
        ("There are {b} boxes with {a} {things} each. How many {things} is that?", "That is {c} {things}."),
        ("{who} buys {a} {things} at {b} coins each. What does {who} pay?", "{who} pays {c} coins."),
    ),
}


@dataclasses.dataclass(frozen=True)
class Sum:
    a: int
    sign: Sign
    b: int

    @property
    def value(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.sign]

    def __str__(self) -> str:
        return f"{self.a}{self.sign}{self.b}"


def sum_lesson(rng: Random, setting: Setting) -> Lesson:
    """A sum or difference of numbers of up to three digits, or a product of one and one or two digits."""
    problem = _random_sum(rng)
    text = f"{problem.a} {problem.sign} {problem.b} = {problem.value}"
    if rng.random() < 0.12 and problem.value >= 0:
        asked, said = rng.choice(_STORIES[problem.sign])
        words = {"who": rng.choice(FIRST_NAMES), "things": rng.choice(THINGS)}
        asked = asked.format(a=problem.a, b=problem.b, **words)
        text = said.format(c=problem.value, **words)
    else:
        asked = rng.choice(_ASKED[problem.sign]).format(a=problem.a, b=problem.b)
    is_free = min(problem.a, problem.b) < 10 and (problem.sign != "*" or max(problem.a, problem.b) < 10)
    return Lesson(
        kind="sum",
        problem=None if is_free else str(problem),
        said=(User(text=varied(rng, asked)), *answer(worked(problem, setting.effort), text)),
    )


def _random_sum(rng: Random) -> Sum:
    sign: Sign = rng.choices(("+", "-", "*"), (43, 38, 19))[0]
    if sign == "*":
        a, b = _number(rng, (25, 75)), rng.randint(2, 9)
        return Sum(b, sign, a) if rng.random() < 0.3 else Sum(a, sign, b)
    a, b = _number(rng, (8, 32, 60)), _number(rng, (12, 36, 52))
    if sign == "-" and a < b and rng.random() < 0.9:
        a, b = b, a
    return Sum(a, sign, b)


def _number(rng: Random, weights: Sequence[int]) -> int:
    digits = rng.choices(range(1, len(weights) + 1), weights)[0]
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def worked(problem: Sum, effort: Effort) -> str:
    """The reasoning that leads to the value."""
    if problem.sign == "-" and problem.a < problem.b:
        turned = Sum(problem.b, "-", problem.a)
        return f"{problem.b}>{problem.a}, so {turned} and -\n{worked(turned, effort)}"
    columns, aligned = _columns(problem), _aligned(problem)
    if effort == "low":
        return "\n".join((aligned, ",".join(columns)))
    lines = [aligned, *(f"{place} {column}" for place, column in zip(_PLACES, columns, strict=False))]
    lines.append(str(problem.value))
    if effort == "high":
        lines += _check(problem)
    return "\n".join(lines)


def _check(problem: Sum) -> list[str]:
    """The last digits the other way round; of a product the factors."""
    first, second = problem.a % 10, problem.b % 10
    if problem.sign == "*":
        back = f"{second}*{first}={first * second}"
    elif problem.sign == "+":
        back = f"{first + second}-{second}={first}"
    else:
        back = f"{(first - second) % 10}+{second}={(first - second) % 10 + second}"
    return [f"check {back}, right"]


def _aligned(problem: Sum) -> str:
    """Both numbers with as many digits; of a product the longer one, and the digit that multiplies it."""
    if problem.sign == "*":
        return f"{max(problem.a, problem.b):0{_WIDTH}}*{min(problem.a, problem.b)}"
    return f"{problem.a:0{_WIDTH}}{problem.sign}{problem.b:0{_WIDTH}}"


def _columns(problem: Sum) -> list[str]:
    """Each column from the right, as 4+8+1=13; the last one may have two digits."""
    a, b = problem.a, problem.b
    if problem.sign == "*" and a < 10 <= b:
        a, b = b, a
    columns, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)) if problem.sign != "*" else 1)):
        x, y = a // 10**place % 10, b // 10**place % 10
        if problem.sign == "*":
            text, carry = _product_column(x, b, carry, is_first=place == 0)
        elif problem.sign == "+":
            text, carry = _plus_column(x, y, carry)
        else:
            text, carry = _minus_column(x, y, carry)
        columns.append(text)
    return columns


def _plus_column(x: int, y: int, carry: int) -> tuple[str, int]:
    total = x + y + carry
    return f"{x}+{y}{'+1' if carry else ''}={total}", total // 10


def _minus_column(x: int, y: int, borrow: int) -> tuple[str, int]:
    left = x - y - borrow
    return f"{x}-{y}{'-1' if borrow else ''}={left % 10}{'-10' if left < 0 else ''}", int(left < 0)


def _product_column(x: int, by: int, carry: int, *, is_first: bool) -> tuple[str, int]:
    total = x * by + carry
    return f"{x}*{by}={total}" if is_first else f"{x}*{by}+{carry}={x * by}+{carry}={total}", total // 10
