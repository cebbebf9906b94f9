"""Questions about units, days and dates. Knows numbers and the calendar; knows no ids."""

import calendar
import datetime
from random import Random

from examples.nano.lessons import Lesson, Setting, answer, varied
from examples.nano.sums import Sum, worked
from examples.nano.words import DAYS, MONTHS
from gptoss_jax.harmony.messages import User

# The larger unit, the smaller, how many there are of it, and the longest number asked for.
_UNITS = (
    ("km", "m", 1000, 99),
    ("m", "cm", 100, 999),
    ("cm", "mm", 10, 999),
    ("kg", "g", 1000, 99),
    ("t", "kg", 1000, 99),
    ("l", "ml", 1000, 99),
    ("euros", "cents", 100, 999),
    ("hours", "minutes", 60, 99),
    ("minutes", "seconds", 60, 99),
    ("weeks", "days", 7, 99),
    ("days", "hours", 24, 9),
    ("years", "months", 12, 9),
)
_LONG_NAMES = {"km": "kilometres", "m": "metres", "cm": "centimetres", "mm": "millimetres", "kg": "kilograms"}
_LONG_NAMES |= {"g": "grams", "t": "tonnes", "l": "litres", "ml": "millilitres"}


def unit_lesson(rng: Random, setting: Setting) -> Lesson:
    """From a larger unit to a smaller one, or back where no division but by ten is needed."""
    large, small, factor, most = rng.choice(_UNITS)
    number = rng.randint(2, most)
    long, one = rng.random() < 0.3, large.removesuffix("s")
    names = {unit: _LONG_NAMES.get(unit, unit) if long else unit for unit in (large, small)}
    if factor % 100 == 0 and rng.random() < 0.35:
        asked, said = (number * factor, small), (number, large)
        thought = f"1 {one}={factor} {small}\n{number * factor}/{factor}={number}"
    else:
        asked, said = (number, large), (number * factor, small)
        thought = f"1 {one}={factor} {small}\n{_times(number, factor, setting)}"
    text = rng.choice(
        (
            "How many {said} are {n} {asked}?",
            "Convert {n} {asked} to {said}.",
            "{n} {asked} in {said}?",
            "What is {n} {asked} in {said}?",
        )
    ).format(n=asked[0], asked=names[asked[1]], said=names[said[1]])
    return Lesson(
        kind="units",
        problem=f"{asked[0]} {asked[1]} in {said[1]}",
        said=(
            User(text=varied(rng, text)),
            *answer(thought, f"{asked[0]} {names[asked[1]]} are {said[0]} {names[said[1]]}."),
        ),
    )


def _times(number: int, factor: int, setting: Setting) -> str:
    """Zeros are written behind; what is left of the factor is multiplied by columns."""
    digits = str(factor).rstrip("0")
    if digits == "1":
        return f"{number}*{factor}={number * factor}"
    small = int(digits)
    product = Sum(number, "*", small) if small < 10 else Sum(small, "*", number)
    effort = "low" if setting.effort == "low" else "medium"
    steps = worked(product, effort)
    return f"{steps}\n{number}*{factor}={number * factor}"


def date_lesson(rng: Random, setting: Setting) -> Lesson:
    """The date of the conversation, the calendar, days before and after."""
    return rng.choice((_today, _today, _from_today, _day_after, _neighbour, _length_of_month, _days_between))(
        rng, setting
    )


def _lesson(rng: Random, asked: str, thought: str, text: str, *, problem: str | None = None) -> Lesson:
    return Lesson(kind="dates", problem=problem, said=(User(text=varied(rng, asked)), *answer(thought, text)))


def _today(rng: Random, setting: Setting) -> Lesson:
    questions = {
        "date": ("What is the date today?", "What date is it?", "Today's date?", "What day is today?"),
        "year": ("What year is it?", "Which year do we have?"),
        "month": ("What month is it?", "Which month do we have?"),
    }
    what = rng.choices(tuple(questions), (6, 2, 2))[0]
    asked = rng.choice(questions[what])
    if setting.date is None:
        return _lesson(rng, asked, "No date given.", "I do not know: I was not told the date.")
    thought = f"Current date: {setting.date}"
    if what == "year":
        return _lesson(rng, asked, thought, f"It is {setting.date.year}.")
    if what == "month":
        return _lesson(rng, asked, thought, f"It is {MONTHS[setting.date.month - 1]}.")
    return _lesson(rng, asked, thought, f"Today is {setting.date}.")


def _from_today(rng: Random, setting: Setting) -> Lesson:
    days = rng.choice((1, 1, 1, -1, rng.randint(2, 20)))
    asked = {
        1: rng.choice(("What is the date tomorrow?", "What date is tomorrow?", "Tomorrow's date?")),
        -1: rng.choice(("What was the date yesterday?", "What date was yesterday?")),
    }.get(days, f"What is the date in {days} days?")
    if setting.date is None:
        return _lesson(rng, asked, "No date given.", "I do not know: I was not told the date.")
    text = {1: "Tomorrow is {}.", -1: "Yesterday was {}."}.get(days, f"In {days} days it is {{}}.")
    then = setting.date + datetime.timedelta(days=days)
    return _lesson(rng, asked, _moved(setting.date, days), text.format(then))


def _day_after(rng: Random, setting: Setting) -> Lesson:
    day, days = _random_date(rng), rng.randint(1, 25)
    asked = rng.choice(
        ("What date is {d} days after {t}?", "{t} plus {d} days?", "Which date comes {d} days after {t}?")
    )
    then = day + datetime.timedelta(days=days)
    return _lesson(rng, asked.format(d=days, t=day), _moved(day, days), f"It is {then}.", problem=f"{day}+{days}")


def _moved(day: datetime.date, days: int) -> str:
    """Days are added; where the month is over, its length is taken off."""
    length = calendar.monthrange(day.year, day.month)[1]
    then = day + datetime.timedelta(days=days)
    if days < 0:
        step = f"{day.day}-1={day.day - 1}"
        return f"{day}\n{step}\n{then}" if day.day > 1 else f"{day}\n{step}, month before\n{then}"
    step = f"{day.day}+{days}={day.day + days}"
    name = MONTHS[day.month - 1]
    if day.day + days <= length:
        return f"{day}\n{step}, {name} has {length}\n{then}"
    return f"{day}\n{step}, {name} has {length}\n{day.day + days}-{length}={then.day}\n{then}"


def _neighbour(rng: Random, setting: Setting) -> Lesson:
    del setting
    kind, names = rng.choice((("day", DAYS), ("month", MONTHS)))
    place, step = rng.randrange(len(names)), rng.choice((1, 1, -1))
    name, other = names[place], names[(place + step) % len(names)]
    word = "after" if step == 1 else "before"
    verb = "comes" if step == 1 or rng.random() < 0.5 else "is"
    return _lesson(
        rng, f"Which {kind} {verb} {word} {name}?", f"{word} {name}: {other}", f"{other} comes {word} {name}."
    )


def _length_of_month(rng: Random, setting: Setting) -> Lesson:
    del setting
    month = rng.randint(1, 12)
    name, length = MONTHS[month - 1], calendar.monthrange(2025, month)[1]
    asked = rng.choice(("How many days does {} have?", "How many days has {}?", "How long is {}?")).format(name)
    extra = " or 29" if month == 2 else ""
    return _lesson(rng, asked, f"{name}: {length}{extra}", f"{name} has {length}{extra} days.")


def _days_between(rng: Random, setting: Setting) -> Lesson:
    first = _random_date(rng)
    length = calendar.monthrange(first.year, first.month)[1]
    if first.day == length:
        first = first.replace(day=1)
    last = first.replace(day=rng.randint(first.day + 1, length))
    asked = rng.choice(("How many days are there from {} to {}?", "How many days from {} to {}?")).format(first, last)
    days = Sum(last.day, "-", first.day)
    effort = "low" if setting.effort == "low" else "medium"
    thought = f"{days}\n{worked(days, effort)}"
    return _lesson(rng, asked, thought, f"{days.value} days.", problem=f"{first} to {last}")


def _random_date(rng: Random) -> datetime.date:
    return datetime.date(2020, 1, 1) + datetime.timedelta(days=rng.randrange(366 * 12))
