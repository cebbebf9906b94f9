"""Questions that functions answer: calls of one or two, and what is made of their results. Knows schemas, no ids."""

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

from examples.nano.lessons import Lesson, Setting, answer, call, compact, result, varied
from examples.nano.talk import talk_lesson
from examples.nano.words import DAYS, city, first_name, made_up, thing
from gptoss_jax.harmony.messages import Assistant, Function, Message, User


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a function: what is asked, the call, the result and the words for it."""

    function: Function
    asked: str
    arguments: dict[str, Any]
    result: dict[str, Any]
    told: str


def call_lesson(rng: Random, setting: Setting) -> Lesson:
    """One call as a rule, sometimes two, sometimes none because nothing that is offered fits."""
    maker = rng.choice(_MAKERS)
    uses = [maker(rng)]
    if rng.random() < 0.2:
        uses += _another(rng, maker, uses[0])
    functions = _offered(rng, uses[0].function)
    if rng.random() < 0.12:  # nobody asks here for what can be looked up
        unfit = tuple(function for function in functions if function.name not in ("get_weather", "get_time"))
        return dataclasses.replace(talk_lesson(rng, setting), functions=unfit)
    return Lesson(
        kind="call",
        problem=" ".join(f"{use.function.name}{compact(use.arguments)}" for use in uses),
        said=(User(text=varied(rng, _joined(uses))), *_turn(uses)),
        functions=functions,
    )


def _turn(uses: list[Use]) -> list[Message]:
    said: list[Message] = []
    for number, use in enumerate(uses):
        word = "Call" if number == 0 else "Next, call"
        said += [
            Assistant(text=f"{word} {use.function.name}.", channel="analysis"),
            call(use.function.name, use.arguments),
            result(use.function.name, use.result),
        ]
    return [*said, *answer("The result is here.", " ".join(use.told for use in uses))]


def _another(rng: Random, maker: Callable[[Random], Use], first: Use) -> list[Use]:
    """A second use of the same function, with other arguments."""
    if maker is _made_up_function:
        return []
    second = maker(rng)
    return [second] if second.arguments != first.arguments else []


def _joined(uses: list[Use]) -> str:
    texts = [use.asked for use in uses]
    return texts[0] if len(texts) == 1 else f"{texts[0]} {texts[1]}"


def _offered(rng: Random, needed: Function) -> tuple[Function, ...]:
    """The function that is needed, and often one or two others, in any order."""
    found = {needed.name: needed}
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        other = rng.choice(_MAKERS)(rng).function
        found.setdefault(other.name, other)
    functions = list(found.values())
    rng.shuffle(functions)
    return tuple(functions)


def _function(
    rng: Random, name: str, description: str, kinds: dict[str, Any], *, optional: tuple[str, ...] = ()
) -> Function:
    """A description and marks for optional arguments stand there or do not, as callers like it."""
    properties = {key: {"type": kind} if isinstance(kind, str) else kind for key, kind in kinds.items()}
    required = [key for key in properties if key not in optional]
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    schema |= {"required": required} if required else {}
    return Function(name=name, description=description if rng.random() < 0.7 else "", parameters=schema)


# --- what there is ----------------------------------------------------------------------------------------------------


def _weather(rng: Random) -> Use:
    place, sky, degrees = city(rng), rng.choice(("clear", "cloudy", "rainy", "windy")), rng.randint(0, 35)
    unit = rng.choice((None, None, "celsius", "fahrenheit"))
    asked = rng.choice(
        ("What is the weather in {}?", "How is the weather in {}?", "Weather in {}?", "Tell me the weather in {}.")
    ).format(place if unit is None else f"{place} in {unit}")
    units = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    has_units = unit is not None or rng.random() < 0.5
    kinds: dict[str, Any] = {"city": "string", **({"unit": units} if has_units else {})}
    return Use(
        _function(rng, "get_weather", "Gets the weather of a city.", kinds, optional=("unit",)),
        asked,
        {"city": place} if unit is None else {"city": place, "unit": unit},
        {"temperature": degrees, "sky": sky},
        f"In {place} it is {sky} at {degrees} degrees.",
    )


def _clock(rng: Random) -> Use:
    place, time = city(rng), f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    asked = rng.choice(("What time is it in {}?", "Time in {}?", "Tell me the time in {}.")).format(place)
    function = _function(rng, "get_time", "Gets the time in a city.", {"city": "string"})
    return Use(function, asked, {"city": place}, {"time": time}, f"In {place} it is {time}.")


def _timer(rng: Random) -> Use:
    minutes = rng.randint(2, 120)
    asked = rng.choice(("Set a timer for {} minutes.", "Wake me in {} minutes.", "Timer for {} minutes, please."))
    function = _function(rng, "set_timer", "Sets a timer.", {"minutes": "integer"})
    return Use(
        function, asked.format(minutes), {"minutes": minutes}, {"ok": True}, f"The timer runs for {minutes} minutes."
    )


def _message(rng: Random) -> Use:
    who = first_name(rng)
    text = rng.choice(
        (
            "the train is late",
            "I am on my way",
            f"dinner is at {rng.randint(5, 9)}",
            f"the {thing(rng)} are here",
            f"we meet on {rng.choice(DAYS)}",
            f"I need {rng.randint(2, 50)} {thing(rng)}",
            f"I am in {city(rng)}",
        )
    )
    asked = rng.choice(("Tell {} that {}.", "Send {} a message: {}", "Write to {}: {}")).format(who, text)
    function = _function(rng, "send_message", "Sends a message to somebody.", {"to": "string", "text": "string"})
    return Use(function, asked, {"to": who, "text": text}, {"ok": True}, f"The message to {who} is sent.")


def _stock(rng: Random) -> Use:
    item, count = thing(rng), rng.randrange(500)
    asked = rng.choice(("How many {} are in stock?", "How many {} do we have?", "Are there {} in stock?"))
    function = _function(rng, "get_stock", "Counts what is in stock.", {"item": "string"})
    return Use(function, asked.format(item), {"item": item}, {"count": count}, f"There are {count} {item} in stock.")


def _money(rng: Random) -> Use:
    codes = {"euros": "EUR", "dollars": "USD", "pounds": "GBP", "yen": "JPY", "francs": "CHF"}
    source, target = rng.sample(tuple(codes), 2)
    amount, value = rng.randint(2, 999), rng.randint(2, 999)
    asked = rng.choice(("Convert {} {} to {}.", "What are {} {} in {}?", "How much are {} {} in {}?"))
    function = _function(rng, "convert_money", "", {"amount": "number", "from": "string", "to": "string"})
    return Use(
        function,
        asked.format(amount, source, target),
        {"amount": amount, "from": codes[source], "to": codes[target]},
        {"value": value},
        f"{amount} {source} are {value} {target}.",
    )


def _calculator(rng: Random) -> Use:
    a, b, sign = rng.randint(2, 99999), rng.randint(2, 99999), rng.choice("+-*/")
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    asked = rng.choice(("Use the calculator: {e}", "Calculate {e} with the tool.", "What is {e}? Use the tool."))
    function = _function(rng, "calculate", "Works out an expression.", {"expression": "string"})
    expression = f"{a}{sign}{b}"
    return Use(
        function, asked.format(e=expression), {"expression": expression}, {"value": value}, f"{expression} = {value}"
    )


def _search(rng: Random) -> Use:
    words = " ".join(rng.choice((made_up, thing))(rng) for _ in range(rng.randint(1, 3)))
    page = f"{made_up(rng)}.com"
    asked = rng.choice(("Search for {}.", "Look up {}.", "Find {} on the web.")).format(words)
    function = _function(rng, "search", "Searches the web.", {"query": "string"})
    return Use(function, asked, {"query": words}, {"page": page}, f"I found {page}.")


def _event(rng: Random) -> Use:
    title, day = f"{rng.choice(('lunch', 'a call', 'tennis', 'a talk'))} with {first_name(rng)}", rng.choice(DAYS)
    asked = rng.choice(("Put {} on {} into my calendar.", "Plan {} on {}.", "Add {} on {} to the calendar."))
    function = _function(rng, "add_event", "Adds an event to the calendar.", {"title": "string", "day": "string"})
    return Use(
        function, asked.format(title, day), {"title": title, "day": day}, {"ok": True}, f"Planned {title} on {day}."
    )


_NOUNS, _OBJECTS = (
    text.split()
    for text in (
        "price color size weight height name status owner address phone score level rank distance speed population "
        "capital language author rating balance temperature length age",
        "city country user product book team order planet river animal song game car account",
    )
)


def _made_up_function(rng: Random) -> Use:
    """A function that no other conversation has to know: its names are copied."""
    noun, key = rng.choice((*_NOUNS, made_up(rng))), rng.choice((*_OBJECTS, made_up(rng)))
    name = rng.choice(("get_{}", "find_{}", "read_{}", "lookup_{}")).format(noun)
    is_number = rng.random() < 0.3
    value = rng.randint(2, 999) if is_number else rng.choice((city, thing, first_name))(rng)
    answered = rng.choice((rng.randint(2, 9999), made_up(rng)))
    asked = rng.choice(("What is the {noun} of {key} {value}?", "Find the {noun} of the {key} {value}.")).format(
        noun=noun, key=key, value=value
    )
    function = _function(rng, name, f"Gets the {noun} of a {key}.", {key: "integer" if is_number else "string"})
    return Use(function, asked, {key: value}, {noun: answered}, f"The {noun} of {value} is {answered}.")


_MAKERS = (
    _weather,
    _weather,
    _clock,
    _timer,
    _message,
    _stock,
    _money,
    _calculator,
    _search,
    _event,
    _made_up_function,
    _made_up_function,
    _made_up_function,
)
