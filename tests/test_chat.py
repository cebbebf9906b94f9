"""A turn: rounds, tools, limits, stops, who leaves. What the model says is scripted, so all that follows is known."""

import asyncio
import contextlib
import dataclasses
import datetime
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from gptoss_jax.chat import (
    Chat,
    ChatEvent,
    NoSuchTool,
    Part,
    ToolFinished,
    ToolStarted,
    TurnFinished,
    TurnSettings,
    Usage,
)
from gptoss_jax.checkpoint import load
from gptoss_jax.constrain.grammars import Grammars
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.request import Request, SamplingParams
from gptoss_jax.engine.scheduler import QueueFull
from gptoss_jax.engine.settings import EngineSettings
from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.harmony.events import Delta, End, Fault, Start
from gptoss_jax.harmony.messages import Assistant, Developer, Function, Message, Namespace, System, ToolResult, User
from gptoss_jax.harmony.render import render_prompt
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.testing import ScriptedEngine
from gptoss_jax.tools.base import ToolError
from gptoss_jax.tools.functions import tool
from gptoss_jax.tools.python import PythonTool
from tests.tiny import TINY

VOCAB = 352
ASKED = (System(date=datetime.date(2026, 11, 23)), User(text="How warm is it?"))
FINAL = "<|channel|>final<|message|>12 degrees<|return|>"
THOUGHT = "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant"
WEATHER = Function(name="weather", parameters={"type": "object", "properties": {"city": {"type": "string"}}})
SETTINGS = TurnSettings()


def call(recipient: str, text: str, *, end: str = "<|call|>", channel: str = "commentary") -> str:
    return f"<|channel|>{channel} to={recipient} <|constrain|>json<|message|>{text}{end}"


class Table:
    """An engine that says the given texts, one each round, and a chat that listens."""

    def __init__(self, tokenizer: Tokenizer, *texts: str, **settings):
        self.tokenizer = tokenizer
        self.engine = ScriptedEngine([self.ids(text) for text in texts], vocab_size=VOCAB, **settings)
        self.chat = Chat(self.engine, tokenizer, grammars=None)

    def ids(self, text: str) -> list[int]:
        found = []
        for piece in re.split(r"(<\|\w+\|>)", text):
            found += [self.tokenizer.special(piece)] if piece.startswith("<|") else self.tokenizer.encode(piece)
        return found

    def events(self, *, conversation: Sequence[Message] = ASKED, settings=SETTINGS, tools=()) -> list[ChatEvent]:
        async def read() -> list[ChatEvent]:
            return [event async for event in self.chat.stream(conversation, settings=settings, tools=tools)]

        return asyncio.run(read())

    def prompts(self) -> list[str]:
        return [self.tokenizer.decode(request.prompt) for request in self.engine.requests]


@pytest.fixture
def table(letters: Tokenizer) -> Iterator[Callable[..., Table]]:
    with contextlib.ExitStack() as stack:

        def lay(*texts: str, **settings) -> Table:
            found = Table(letters, *texts, **settings)
            stack.callback(found.engine.close)
            return found

        yield lay


def turn(events: Sequence[ChatEvent]) -> TurnFinished:
    assert [event for event in events if isinstance(event, TurnFinished)] == [events[-1]]
    assert isinstance(events[-1], TurnFinished)
    return events[-1]


def said(events: Sequence[ChatEvent]) -> list:
    return [event.event for event in events if isinstance(event, Part)]


def text_of(events: Sequence[ChatEvent], index: int) -> str:
    return "".join(event.text for event in said(events) if isinstance(event, Delta) and event.index == index)


def results(events: Sequence[ChatEvent]) -> list[ToolResult]:
    return [message for message in turn(events).messages if isinstance(message, ToolResult)]


@tool
def weather(city: str) -> str:
    """The weather, now."""
    if city == "Atlantis":
        raise ToolError("there is no Atlantis")
    if city == "Utopia":
        raise LookupError("a secret of the tool's")
    return f"12 degrees in {city}"


# One round


def test_an_answer(table):
    laid = table(FINAL)
    events = laid.events()
    assert turn(events) == TurnFinished(
        "stop",
        (Assistant(text="12 degrees"),),
        Usage(prompt_tokens=len(laid.engine.requests[0].prompt), completion_tokens=len(laid.ids(FINAL))),
    )
    assert isinstance(said(events)[0], Start)
    assert text_of(events, 0) == "12 degrees"
    assert laid.prompts() == [laid.tokenizer.decode(render_prompt(ASKED, laid.tokenizer))]


def test_every_id_is_in_one_part_and_with_what_it_says(table):
    laid = table(THOUGHT + FINAL.replace("12", "zwölf"))
    events = laid.events(settings=TurnSettings(sampling=SamplingParams(logprobs=2)))
    parts = [event for event in events if isinstance(event, Part)]
    tokens = [token for part in parts for token in part.tokens]
    assert [token.id for token in tokens] == laid.ids(THOUGHT + FINAL.replace("12", "zwölf"))
    assert {len(token.top) for token in tokens} == {2}
    for part in parts:
        ids = [token.id for token in part.tokens]
        if isinstance(part.event, Delta):
            assert laid.tokenizer.decode(ids) == part.event.text
        elif isinstance(part.event, Start):
            assert laid.tokenizer.decode(ids[-1:]) == "<|message|>"
        elif isinstance(part.event, End):
            assert len(ids) == 1


def test_reasoning_is_counted_by_its_messages(table):
    laid = table(THOUGHT + FINAL)
    events = laid.events()
    reasoning = "<|channel|>analysis<|message|>I look.<|end|>"
    assert turn(events).usage.reasoning_tokens == len(laid.ids(reasoning))
    assert turn(events).messages == (Assistant(text="I look.", channel="analysis"), Assistant(text="12 degrees"))


def test_a_call_of_the_callers_ends_the_turn(table):
    laid = table(THOUGHT + call("functions.weather", '{"city": "Oslo"}'))
    events = laid.events(conversation=(*ASKED, Developer(functions=(WEATHER,))))
    asked = Assistant(text='{"city": "Oslo"}', channel="commentary", recipient="functions.weather", content_type="json")
    assert (turn(events).reason, turn(events).messages[1:]) == ("tool_calls", (asked,))
    assert not [event for event in events if isinstance(event, ToolStarted)]


def test_what_fits_no_format_is_a_fault_beside_the_text(table):
    laid = table("12 degrees<|return|>")
    events = laid.events()
    assert turn(events).reason == "stop"
    assert turn(events).messages == (Assistant(text="12 degrees", channel=None),)
    assert "no header" in {event.kind for event in said(events) if isinstance(event, Fault)}


# Tools that run here


def test_tools_are_run_until_the_model_answers(table):
    texts = (
        THOUGHT + call("functions.weather", '{"city": "Oslo"}'),
        call("functions.weather", '{"city": "Rome"}'),
        FINAL,
    )
    laid = table(*texts)
    events = laid.events(tools=(weather,))
    answer = turn(events)
    assert answer.reason == "stop"
    assert [type(message).__name__ for message in answer.messages] == [
        "Assistant", "Assistant", "ToolResult", "Assistant", "ToolResult", "Assistant",
    ]  # fmt: skip
    assert [result.text for result in results(events)] == ["12 degrees in Oslo", "12 degrees in Rome"]
    assert len({request.sampling.seed for request in laid.engine.requests}) == 3
    indices = [event.index for event in said(events) if isinstance(event, Start)]
    assert indices == [0, 1, 2, 3]
    requests = laid.engine.requests
    assert answer.usage == Usage(
        prompt_tokens=sum(len(request.prompt) for request in requests),
        cached_tokens=answer.usage.cached_tokens,
        completion_tokens=sum(len(laid.ids(text)) for text in texts),
        reasoning_tokens=len(laid.ids("<|channel|>analysis<|message|>I look.<|end|>")),
    )
    assert answer.usage.cached_tokens >= 2 * len(requests[0].prompt) - len(laid.ids("assistant"))


def test_every_round_asks_for_the_adapter_and_the_priority(table):
    laid = table(THOUGHT + call("functions.weather", '{"city": "Oslo"}'), FINAL)
    laid.events(tools=(weather,), settings=dataclasses.replace(SETTINGS, adapter="poems", priority=3))
    assert [(request.adapter, request.priority) for request in laid.engine.requests] == [("poems", 3)] * 2


def test_the_model_reads_the_result_and_its_own_reasoning(table):
    laid = table(THOUGHT + call("functions.weather", '{"city": "Oslo"}'), FINAL)
    events = laid.events(tools=(weather,))
    assert laid.prompts()[1] == laid.tokenizer.decode(
        render_prompt((*ASKED, *turn(events).messages[:3]), laid.tokenizer)
    )
    assert "I look." in laid.prompts()[1]
    assert laid.prompts()[1].endswith("12 degrees in Oslo<|end|><|start|>assistant")


def test_python_is_answered_in_the_channel_of_its_call(table):
    try:
        python = PythonTool()
    except Unsupported as error:
        pytest.skip(str(error))
    laid = table("<|channel|>analysis to=python code<|message|>6 * 7<|call|>", FINAL)
    (result,) = results(laid.events(tools=(python,)))
    assert (result.name, result.text.strip(), result.channel) == ("python", "42", "analysis")
    assert laid.prompts()[1].endswith(f"{result.text}<|end|><|start|>assistant")


def test_an_answer_that_is_no_text_is_a_mistake_of_the_tool(table):
    class Wrong:
        namespace = Namespace(name="wrong")

        def session(self) -> "Wrong":
            return self

        def handles(self, recipient: str) -> bool:
            return recipient == "wrong"

        async def call(self, recipient: str, text: str) -> int:
            return 42

    events = table("<|channel|>analysis to=wrong<|message|>?<|call|>", FINAL).events(tools=(Wrong(),))
    assert results(events) == [
        ToolResult(name="wrong", text="error: wrong failed, by a mistake of its own; do without it", channel="analysis")
    ]


@pytest.mark.parametrize(
    ("city", "expected"),
    [
        ('{"city": "Atlantis"}', "there is no Atlantis"),
        ('{"city": "Utopia"}', "functions.weather failed"),
        ('{"city": ', "functions.weather"),
        ('{"town": "Oslo"}', "town"),
        ("", "functions.weather"),
    ],
)
def test_a_call_that_fails_is_read_by_the_model(table, city: str, expected: str):
    events = table(call("functions.weather", city), FINAL).events(tools=(weather,))
    (finished,) = [event for event in events if isinstance(event, ToolFinished)]
    assert finished.failed
    assert expected in finished.result.text
    assert "secret" not in finished.result.text, "an exception's text is not the model's"
    assert turn(events).reason == "stop"


@pytest.mark.parametrize("ending", [SystemExit(3), asyncio.CancelledError(), StopIteration()])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_tool_that_ends_more_than_itself_has_only_failed(table, ending: BaseException, is_async: bool):
    def leave() -> str:
        raise ending

    async def leave_async() -> str:
        raise ending

    leaving = tool(name="leave")(leave_async if is_async else leave)
    events = table(call("functions.leave", "{}"), FINAL).events(tools=(leaving,))
    assert results(events)[0].text == "error: functions.leave failed, by a mistake of its own; do without it"
    assert turn(events).reason == "stop"


def test_a_tool_that_takes_too_long_has_failed(table):
    @tool(timeout_s=None)
    async def wait() -> str:
        await asyncio.sleep(60)
        return ""

    laid = table(call("functions.wait", "{}"), FINAL)
    events = laid.events(tools=(wait,), settings=TurnSettings(tool_timeout_s=0.05))
    assert "took too long" in results(events)[0].text
    assert turn(events).reason == "stop"


def test_calls_side_by_side_run_so_and_are_told_in_their_order(table):
    arrived = []

    @tool
    async def meet(name: str) -> str:
        arrived.append(name)
        while len(arrived) < 2:  # alone it would wait for ever
            await asyncio.sleep(0.001)
        if name == "a":
            await asyncio.sleep(0.02)  # the first to be called is the last to answer
        return f"met {name}"

    both = call("functions.meet", '{"name": "a"}', end="<|end|><|start|>assistant") + call(
        "functions.meet", '{"name": "b"}'
    )
    events = table(both, FINAL).events(tools=(meet,))
    assert [result.text for result in results(events)] == ["met a", "met b"]
    order = [event.result.text for event in events if isinstance(event, ToolFinished)]
    assert order == ["met b", "met a"]
    assert [type(message).__name__ for message in turn(events).messages[:4]] == ["Assistant"] * 2 + ["ToolResult"] * 2


def test_of_parallel_calls_only_the_first_where_they_are_not_wanted(table):
    laid = table(call("functions.weather", '{"city": "Oslo"}', end="<|end|><|start|>assistant") + "x" * 10_000, FINAL)
    events = laid.events(tools=(weather,), settings=TurnSettings(parallel_calls=False))
    assert [result.text for result in results(events)] == ["12 degrees in Oslo"]
    assert turn(events).usage.completion_tokens < 200


def test_ours_are_run_and_the_callers_are_left_to_the_caller(table):
    both = call("functions.weather", '{"city": "Oslo"}', end="<|end|><|start|>assistant") + call("functions.mail", "{}")
    events = table(both).events(tools=(weather,))
    assert turn(events).reason == "tool_calls"
    assert [result.name for result in results(events)] == ["functions.weather"]


def test_a_recipient_that_nobody_knows(table):
    laid = table(call("container.exec", "{}"), FINAL)
    assert turn(laid.events(tools=(weather,))).reason == "tool_calls"
    laid = table(call("container.exec", "{}"), FINAL)
    events = laid.events(tools=(weather, NoSuchTool(known=("functions.weather",))))
    assert turn(events).reason == "stop"
    assert results(events)[0].text == "error: there is no tool container.exec; there is functions.weather"


def test_each_turn_has_a_session_of_its_own(table):
    class Counter:
        """Remembers in a session how often it was called."""

        namespace = Namespace(name="counter")

        def __init__(self):
            self.count = 0

        def session(self) -> "Counter":
            return Counter()

        def handles(self, recipient: str) -> bool:
            return recipient == "counter"

        async def call(self, recipient: str, text: str) -> str:
            self.count += 1
            return str(self.count)

    counter = Counter()
    laid = table(*[call("counter", ""), call("counter", ""), FINAL] * 2)
    for _ in range(2):
        assert [result.text for result in results(laid.events(tools=(counter,)))] == ["1", "2"]


# Limits


def test_a_budget_holds_over_all_rounds(table):
    first = call("functions.weather", '{"city": "Oslo"}')
    laid = table(first, FINAL)
    budget = len(laid.ids(first)) + 15
    events = laid.events(tools=(weather,), settings=TurnSettings(max_new_tokens=budget))
    assert [request.max_new_tokens for request in laid.engine.requests] == [budget, 15]
    assert (turn(events).reason, turn(events).usage.completion_tokens) == ("length", budget)
    assert turn(events).messages[-1] == Assistant(
        text="12 degrees"[: 15 - len(laid.ids("<|channel|>final<|message|>"))]
    )


def test_a_budget_that_a_call_has_used_up(table):
    first = call("functions.weather", '{"city": "Oslo"}')
    laid = table(first, FINAL)
    events = laid.events(tools=(weather,), settings=TurnSettings(max_new_tokens=len(laid.ids(first))))
    assert turn(events).reason == "length"
    assert "max_new_tokens" in turn(events).message
    assert len(laid.engine.requests) == 1


def test_a_cut_call_is_not_run(table):
    laid = table(call("functions.weather", '{"city": "Oslo"}'))
    events = laid.events(tools=(weather,), settings=TurnSettings(max_new_tokens=45))
    assert turn(events).reason == "length"
    assert not results(events)


def test_the_context_bounds_an_answer_and_a_tool_may_fill_it(table, letters: Tokenizer):
    @tool
    def read() -> str:
        """Reads a book."""
        return "word " * 200

    num_prompt = len(render_prompt(ASKED, letters))
    laid = table(call("functions.read", "{}"), FINAL, max_context=num_prompt + 300)
    events = laid.events(tools=(read,), settings=TurnSettings(max_new_tokens=100_000))
    assert laid.engine.requests[0].max_new_tokens == 300
    assert (turn(events).reason, len(laid.engine.requests)) == ("length", 1)
    assert "the context has no room" in turn(events).message
    with pytest.raises(UserError, match="context"):
        table(FINAL, max_context=num_prompt).events()


def test_rounds_are_bounded(table):
    again = call("functions.weather", '{"city": "Oslo"}')
    laid = table(*[again] * 5)
    events = laid.events(tools=(weather,), settings=TurnSettings(max_rounds=3))
    assert (turn(events).reason, len(laid.engine.requests), len(results(events))) == ("length", 3, 2)
    assert "max_rounds is 3" in turn(events).message


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"max_rounds": 0},
        {"tool_timeout_s": 0},
        {"stop": ("",)},
        {"stop": ("\ud800",)},
        {"stop": "END"},
    ],
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        TurnSettings(**settings)


# Stop strings


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("deg",), "12 "),
        (("12",), ""),
        (("grees!",), "12 degrees"),
        (("s", "gr"), "12 de"),
        (("ees",), "12 degr"),
    ],
)
def test_a_stop_string_ends_the_answer(table, stop, expected):
    laid = table(THOUGHT + FINAL)
    events = laid.events(settings=TurnSettings(stop=stop))
    assert (turn(events).reason, turn(events).messages[-1]) == ("stop", Assistant(text=expected))
    assert text_of(events, 1) == expected
    assert [event.by for event in said(events) if isinstance(event, End)] == ["end", "return"]
    assert laid.engine.num_open == 0


def test_a_stop_string_in_reasoning_or_in_a_call_means_nothing(table):
    laid = table(THOUGHT + call("functions.weather", '{"city": "Oslo"}'), FINAL)
    events = laid.events(tools=(weather,), settings=TurnSettings(stop=("look", "Oslo")))
    assert turn(events).reason == "stop"
    assert turn(events).messages[-1] == Assistant(text="12 degrees")


def test_what_a_stop_string_might_have_swallowed_is_told_in_the_end(table):
    events = table(
        "<|channel|>final<|message|>EN<|end|><|start|>assistant<|channel|>final<|message|>D<|return|>"
    ).events(settings=TurnSettings(stop=("END",)))
    assert [text_of(events, index) for index in (0, 1)] == ["EN", "D"], "messages are looked through one by one"


# Who leaves, and what breaks


def test_leaving_frees_the_engine_at_once(table):
    laid = table("<|channel|>final<|message|>" + "x" * 10_000, seconds_per_token=0.001)

    async def leave() -> None:
        async with contextlib.aclosing(laid.chat.stream(ASKED, settings=SETTINGS)) as events:
            async for event in events:
                if isinstance(event, Part) and isinstance(event.event, Delta):
                    assert laid.engine.num_open == 1
                    break
        await wait_until(lambda: laid.engine.num_open == 0)

    asyncio.run(leave())


def test_cancelling_who_reads_frees_the_engine(table):
    laid = table("<|channel|>final<|message|>" + "x" * 10_000, seconds_per_token=60.0)

    async def cancel() -> None:
        async def read() -> None:
            async for _ in laid.chat.stream(ASKED, settings=SETTINGS):
                pass

        task = asyncio.create_task(read())
        await wait_until(lambda: laid.engine.num_open == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until(lambda: laid.engine.num_open == 0)

    asyncio.run(cancel())


def test_leaving_cancels_the_tools(table):
    ended = []

    @tool(timeout_s=None)
    async def wait() -> str:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)
        return ""

    async def leave() -> None:
        laid = table(call("functions.wait", "{}"))
        async with contextlib.aclosing(laid.chat.stream(ASKED, settings=SETTINGS, tools=(wait,))) as events:
            async for event in events:
                if isinstance(event, ToolStarted):
                    await asyncio.sleep(0.01)
                    break
        assert ended == [True]

    asyncio.run(leave())


async def wait_until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.001)


def test_an_engine_that_closes_ends_the_turn(table):
    laid = table("<|channel|>final<|message|>" + "x" * 10_000, seconds_per_token=0.001)

    async def read() -> list[ChatEvent]:
        found = []
        async for event in laid.chat.stream(ASKED, settings=SETTINGS):
            found.append(event)
            if isinstance(event, Part) and isinstance(event.event, Delta) and len(found) == 20:
                await asyncio.to_thread(laid.engine.close)
        return found

    events = asyncio.run(read())
    assert turn(events).reason == "abort"
    assert turn(events).messages[-1].text == text_of(events, 0) != ""
    with pytest.raises(UserError, match="closed"):
        laid.events()


class Forbids:
    """A constraint that allows one id alone."""

    def mask(self):
        mask = np.zeros(VOCAB // 32, np.uint32)
        mask[0] = 1
        return mask

    def accept(self, token_id: int, /) -> None:
        pass


def test_an_error_of_the_engine_is_told_with_what_was_said(table):
    class Forbidding:
        """An engine whose requests all fail at their first id."""

        def __init__(self, engine: ScriptedEngine):
            self.engine = engine
            self.vocab_size, self.max_context = engine.vocab_size, engine.max_context
            self.stats, self.close = engine.stats, engine.close

        def submit(self, request: Request):
            return self.engine.submit(dataclasses.replace(request, constraint=Forbids))

    laid = table(FINAL)
    laid.chat = Chat(Forbidding(laid.engine), laid.tokenizer)
    events = laid.events()
    assert turn(events).reason == "error"
    assert "the constraint forbids" in turn(events).message
    assert turn(events).usage.completion_tokens == 0


def test_a_full_queue_refuses_a_new_turn_and_lets_one_that_has_begun_wait(table):
    laid = table("<|channel|>final<|message|>" + "x" * 10_000, max_open=1, seconds_per_token=0.001)

    async def second() -> None:
        async with contextlib.aclosing(laid.chat.stream(ASKED, settings=SETTINGS)) as events:
            await anext(events)
            with pytest.raises(QueueFull):
                await anext(laid.chat.stream(ASKED, settings=SETTINGS))

    asyncio.run(second())
    others: list = []

    @tool
    def crowd() -> str:
        """Takes the only place, for a while."""
        others.append(laid.engine.submit(Request(prompt=[1], max_new_tokens=100)))
        return "crowded"

    laid = table(call("functions.crowd", "{}"), "x" * 20, FINAL, max_open=1, seconds_per_token=0.001)
    assert turn(laid.events(tools=(crowd,))).reason == "stop"


# Grammars


@pytest.fixture(scope="module")
def grammars(letters: Tokenizer) -> Grammars:
    return Grammars.of(letters)


@pytest.mark.parametrize(
    ("settings", "text", "reason"),
    [
        ({"tool_choice": "required"}, FINAL, "error"),
        ({"tool_choice": "required"}, call("functions.mail", "{}"), "error"),
        ({"tool_choice": "required"}, THOUGHT + call("functions.weather", "{}"), "tool_calls"),
        ({"tool_choice": "functions.weather"}, call("functions.weather", "{}"), "tool_calls"),
        ({"tool_choice": "none"}, call("functions.weather", "{}"), "error"),
        ({"tool_choice": "none"}, THOUGHT + FINAL, "stop"),
    ],
)
def test_a_choice_of_tools_is_held_to(table, grammars, settings, text, reason):
    laid = table(text)
    laid.chat = Chat(laid.engine, laid.tokenizer, grammars=grammars)
    events = laid.events(conversation=(*ASKED, Developer(functions=(WEATHER,))), settings=TurnSettings(**settings))
    assert turn(events).reason == reason


def test_who_had_to_call_and_has_called_may_answer(table, grammars):
    laid = table(call("functions.weather", '{"city": "Oslo"}'), FINAL)
    laid.chat = Chat(laid.engine, laid.tokenizer, grammars=grammars)
    events = laid.events(
        conversation=(*ASKED, Developer(functions=(weather.function,))),
        settings=TurnSettings(tool_choice="required"),
        tools=(weather,),
    )
    assert turn(events).reason == "stop"


def test_the_answer_and_strict_calls_are_held_to_their_grammars(table, grammars):
    number = grammars.json_schema({"type": "integer"})
    city = grammars.json_schema(WEATHER.parameters | {"required": ["city"]})
    conversation = (*ASKED, Developer(functions=(WEATHER,)))
    settings = TurnSettings(final=number, strict={"functions.weather": city})
    answers = {
        THOUGHT + "<|channel|>final<|message|>12<|return|>": "stop",
        THOUGHT + FINAL: "error",
        call("functions.weather", '{"city":"Oslo"}'): "tool_calls",
        call("functions.weather", '{"city":12}'): "error",
    }
    laid = table(*answers)
    laid.chat = Chat(laid.engine, laid.tokenizer, grammars=grammars)
    assert [turn(laid.events(conversation=conversation, settings=settings)).reason for _ in answers] == [
        *answers.values()
    ]


def test_grammars_are_asked_for_where_they_are_needed(table, grammars):
    with pytest.raises(UserError, match="Grammars"):
        table(FINAL).events(settings=TurnSettings(tool_choice="required"))
    laid = table(FINAL)
    laid.chat = Chat(laid.engine, laid.tokenizer, grammars=grammars)
    with pytest.raises(UserError, match=r"functions\.mail.*functions\.weather"):
        laid.events(
            conversation=(*ASKED, Developer(functions=(WEATHER,))), settings=TurnSettings(tool_choice="functions.mail")
        )


# A real engine


def test_a_model_with_random_weights_says_anything_and_under_a_grammar_what_it_must(tmp_path: Path):
    write_checkpoint(tmp_path / "tiny", dataclasses.replace(TINY, layer_kinds=TINY.layer_kinds[:2]), seed=0)
    tokenizer = load_tokenizer(tmp_path / "tiny")
    grammars = Grammars.of(tokenizer)
    free = TurnSettings(max_new_tokens=30, sampling=SamplingParams(seed=5))
    # Left alone it reasons for hundreds of ids: it is to end messages, and to begin the channel's name that has an f.
    hasty = SamplingParams(seed=5, logit_bias={tokenizer.special("<|end|>"): 100.0, ord("f"): 50.0})
    held = TurnSettings(max_new_tokens=100, sampling=hasty, final=grammars.json_schema({"enum": ["yes", "no"]}))
    settings = EngineSettings(max_rows=1, cache_tokens=2048, prefill_tokens=64)
    with Engine(load(tmp_path / "tiny"), settings=settings) as engine:
        chat = Chat(engine, tokenizer, grammars=grammars)

        async def turns() -> list[TurnFinished]:
            return [[event async for event in chat.stream(ASKED, settings=each)][-1] for each in (free, held)]

        anything, answer = asyncio.run(turns())
        assert engine.stats().queue.running == 0
    assert (anything.reason, anything.usage.completion_tokens) == ("length", 30)
    assert answer.reason == "stop"
    assert json.loads(answer.messages[-1].text) in ("yes", "no")
