"""Sentences and the JSON that says the same. Knows texts and schemas; knows no ids."""

import dataclasses
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from examples.nano.lessons import Lesson, Setting, answer, compact
from examples.nano.words import CITIES, DAYS, city, made_up, person, thing
from gptoss_jax.harmony.messages import ResponseFormat, User


@dataclasses.dataclass(frozen=True)
class Field:
    """One thing that a record holds: how it is drawn, and its type in JSON."""

    draw: Callable[[Random], Any]
    kind: str = "string"


@dataclasses.dataclass(frozen=True)
class Record:
    name: str
    fields: Mapping[str, Field]
    sentences: tuple[str, ...]


def _amount(most: int) -> Field:
    return Field(lambda rng: rng.randint(1, most), "integer")


def _email(rng: Random) -> str:
    return f"{made_up(rng)}@{made_up(rng)}.{rng.choice(('com', 'org', 'net'))}"


def _year(rng: Random) -> int:
    return rng.randint(1900, 2026)


def _title(rng: Random) -> str:
    return " ".join(made_up(rng).capitalize() for _ in range(rng.randint(1, 3)))


def _time(rng: Random) -> str:
    return f"{rng.randrange(24):02}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02}"


_RECORDS = (
    Record(
        "person",
        {"name": Field(person), "age": _amount(99), "city": Field(city)},
        (
            "{name} is {age} years old and lives in {city}.",
            "{name}, {age}, comes from {city}.",
            "In {city} lives {name}, who is {age}.",
            "My name is {name}, I am {age} and I live in {city}.",
            "{name} from {city} is {age}.",
        ),
    ),
    Record(
        "order",
        {"item": Field(thing), "quantity": _amount(200), "price": _amount(999)},
        (
            "I would like {quantity} {item} at {price} euros.",
            "Please send {quantity} {item} for {price} euros each.",
            "We ordered {quantity} {item}, price {price}.",
            "{quantity} {item} cost {price} each.",
        ),
    ),
    Record(
        "meeting",
        {"person": Field(person), "day": Field(lambda rng: rng.choice(DAYS)), "time": Field(_time)},
        (
            "Meet {person} on {day} at {time}.",
            "On {day} at {time} we see {person}.",
            "The talk with {person} is on {day}, {time}.",
            "{person} comes on {day} at {time}.",
        ),
    ),
    Record(
        "book",
        {
            "title": Field(_title),
            "author": Field(person),
            "year": Field(lambda rng: rng.randint(1900, 2026), "integer"),
        },
        (
            "{author} wrote {title} in {year}.",
            "{title} by {author} appeared in {year}.",
            "In {year} {author} published {title}.",
        ),
    ),
    Record(
        "trip",
        {"from": Field(lambda rng: rng.choice(CITIES)), "to": Field(city), "day": Field(lambda rng: rng.choice(DAYS))},
        (
            "A ticket from {from} to {to} on {day}.",
            "On {day} I go from {from} to {to}.",
            "I travel to {to} from {from} on {day}.",
        ),
    ),
    Record(
        "contact",
        {"name": Field(person), "email": Field(_email)},
        (
            "You can write to {name} at {email}.",
            "{name} has the address {email}.",
            "Mail {email} to reach {name}.",
        ),
    ),
)


def extraction_lesson(rng: Random, setting: Setting) -> Lesson:
    """All or some of a record's fields, asked for by a schema or in words."""
    del setting
    record = rng.choice(_RECORDS)
    values = {name: field.draw(rng) for name, field in record.fields.items()}
    wanted = list(values)
    if rng.random() < 0.4:
        rng.shuffle(wanted)
        wanted = wanted[: rng.randint(1, len(wanted))]
    sentence = rng.choice(record.sentences).format(**values)
    text = compact({name: values[name] for name in wanted})
    by_schema = rng.random() < 0.5
    return Lesson(
        kind="extraction",
        problem=f"{sentence} {','.join(wanted)}",
        said=(
            User(text=_asked_by_schema(rng, sentence) if by_schema else _asked_in_words(rng, sentence, wanted)),
            *answer(f"JSON: {', '.join(wanted)}", text),
        ),
        formats=(_format(rng, record, wanted),) if by_schema else (),
    )


def _asked_by_schema(rng: Random, sentence: str) -> str:
    return rng.choice(("{}", "{}", "Extract: {}", "Extract the data. {}", "{} Answer in JSON.")).format(sentence)


def _asked_in_words(rng: Random, sentence: str, wanted: list[str]) -> str:
    listed = ", ".join(wanted[:-1]) + (" and " if len(wanted) > 1 else "") + wanted[-1]
    if rng.random() < 0.3:
        listed = ", ".join(wanted)
    return rng.choice(
        (
            "Extract {keys} as JSON: {text}",
            "Give {keys} as JSON. {text}",
            "{text} Give {keys} as JSON.",
            "JSON with {keys}: {text}",
            "Extract the {keys} as JSON from: {text}",
        )
    ).format(keys=listed, text=sentence)


def _format(rng: Random, record: Record, wanted: list[str]) -> ResponseFormat:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: {"type": record.fields[name].kind} for name in wanted},
        "required": wanted,
    }
    if rng.random() < 0.7:
        schema["additionalProperties"] = False
    name = rng.choice((record.name, record.name, "answer", "data", "result"))
    return ResponseFormat(name=name, schema=schema)
