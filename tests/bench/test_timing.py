"""How often a step is repeated: by the time that it takes, which is given here."""

import pytest

from gptoss_jax.bench import timing


@pytest.mark.parametrize(
    ("seconds", "repeats"),
    [
        (0.001, [1, 8, 400]),  # 2 seconds over five rounds
        (0.3, [1, 1]),  # eight in a row would take longer than all rounds may
        (1.5, [1, 1]),
        (3.0, [1]),
        (1e-7, [1, 8, 10_000]),
    ],
)
def test_a_step_is_repeated_for_as_long_as_is_asked(
    monkeypatch: pytest.MonkeyPatch, seconds: float, repeats: list[int]
):
    found = []

    def rounds(step: object, carry: object, operands: object, repeats: int, *, rounds: int = 5) -> list[float]:
        found.append(repeats)
        return [seconds * repeats] * rounds

    monkeypatch.setattr(timing, "_rounds", rounds)
    assert timing.seconds_inside(lambda carry, _, i: carry, 0, None, budget=2.0) == pytest.approx(seconds)
    assert found == repeats
