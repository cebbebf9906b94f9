"""Looks for the block sizes that a device is fastest with. Knows sizes as numbers; what they mean, the kernel knows."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax

from gptoss_jax.bench.kernels import Case
from gptoss_jax.errors import Unsupported
from gptoss_jax.kernels import choose, tuned

# How a kernel says that it cannot have these sizes: while it is traced, or when it is compiled and does not fit.
_REFUSALS = (ValueError, NotImplementedError, jax.errors.JaxRuntimeError)
_WORTH_IT = 0.98  # of the time before: less is noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One set of sizes and its seconds for all cases together; None where the kernel cannot have them."""

    form: str
    sizes: tuned.Sizes
    seconds: float | None


def tune(
    cases: list[Case],
    impl: str,
    *,
    device_kind: str,
    dtype: str,
    budget: float,
    most_trials: int,
    on_trial: Callable[[Trial], None],
) -> tuned.Entry:
    """The best sizes of one op's implementation, for each form on those cases that take it.

    From the sizes so far each number is halved and doubled in turn; what is faster is kept, until nothing is, or until
    `most_trials` sets of sizes were tried for a form.

    Raises:
        Unsupported: the implementation has no sizes to choose.
    """
    op, base = cases[0].op, impl.removesuffix("-interpret")
    start = tuned.find(op, base, device_kind=device_kind) or tuned.default(op, base)
    if not start:
        raise Unsupported(f"{op}'s implementation {impl!r} has no block sizes: there is nothing to tune")
    if tuned.is_one_form(start):
        one_form = functools.partial(_seconds, cases, impl, budget=budget)
        return _climb(start, one_form, form="", most=most_trials, on_trial=on_trial)
    best = dict(start)
    for form, concerned in _by_form(cases, start, dtype).items():

        def seconds(sizes: tuned.Sizes, form: str = form, concerned: list[Case] = concerned) -> float | None:
            return _seconds(concerned, impl, {**best, form: sizes}, budget=budget)

        best[form] = _climb(best[form], seconds, form=form, most=most_trials, on_trial=on_trial)
    return {form: best[form] for form in _by_form(cases, start, dtype)}


def _by_form(cases: list[Case], table: tuned.Entry, dtype: str) -> dict[str, list[Case]]:
    """By the kernel's names: float32 may have forms of its own, or one for everything."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        both = f"{case.form}_{dtype}"
        form = case.form if dtype == "bfloat16" else both if both in table else dtype
        found.setdefault(form, []).append(case)
    return found


def _climb(
    start: tuned.Sizes,
    seconds_of: Callable[[tuned.Sizes], float | None],
    *,
    form: str,
    most: int,
    on_trial: Callable[[Trial], None],
) -> tuned.Sizes:
    known: dict[tuple[int, ...], float] = {}

    def seconds(sizes: tuned.Sizes) -> float:
        key = tuple(sizes.values())
        if key not in known and len(known) == most:
            return float("inf")
        if key not in known:
            found = seconds_of(sizes)
            on_trial(Trial(form=form, sizes=sizes, seconds=found))
            known[key] = float("inf") if found is None else found
        return known[key]

    best, improved = start, True
    while improved:
        enough = seconds(best) * _WORTH_IT
        better = next((sizes for sizes in _neighbours(best) if seconds(sizes) < enough), None)
        best, improved = better or best, better is not None
    return best


def _neighbours(sizes: tuned.Sizes) -> Iterator[tuned.Sizes]:
    for name, size in sizes.items():
        for other in (size * 2, size // 2):
            if other >= 1:
                yield {**sizes, name: other}


def _seconds(cases: list[Case], impl: str, sizes: tuned.Entry, *, budget: float) -> float | None:
    module = choose.kernel_module(cases[0].op, impl)
    settings = {"blocks": choose.blocks(module, sizes), "interpret": impl.endswith("-interpret")}
    total = 0.0
    for case in cases:
        try:
            total += case.seconds(functools.partial(getattr(module, case.function), **settings), budget=budget)
        except _REFUSALS:
            return None
    return total
