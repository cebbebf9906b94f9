"""Asks a model what no training saw, and counts the right answers. Knows the engine and lessons; knows no training.

python -m examples.nano.score [FOLDER] [--sums 500 --calls 100 --extractions 100 --others 50]
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import gptoss_jax
from examples.nano.calls import call_lesson
from examples.nano.conversations import held_out
from examples.nano.extraction import extraction_lesson
from examples.nano.lessons import Lesson, Maker, Setting, prompt
from examples.nano.measures import date_lesson, unit_lesson
from examples.nano.sums import sum_lesson
from gptoss_jax import nano
from gptoss_jax.chat import Chat, TurnFinished, TurnSettings
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.engine.settings import EngineSettings
from gptoss_jax.harmony.messages import Assistant, Message, ToolResult
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.model.transformer import GptOss

_SEED = 20_000  # the problems are the first that it draws
_MOST_TOKENS = 400
_AT_ONCE = 16
_GREEDY = TurnSettings(sampling=SamplingParams(temperature=0.0), max_new_tokens=_MOST_TOKENS)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A problem, what was said to it, and whether that is right."""

    lesson: Lesson
    setting: Setting
    said: tuple[Message, ...]

    @property
    def is_right(self) -> bool:
        """Calls with the same arguments; then the same number, the same JSON or the same words."""
        if _calls(self.said) != _calls(self.lesson.said):
            return False
        if self.lesson.kind == "call":
            return True
        expected, found = _final(self.lesson.said), _final(self.said)
        match self.lesson.kind:
            case "sum":
                return _last_number(found) == _last_number(expected)
            case "extraction":
                return _json(found) == _json(expected)
        return found == expected


def main() -> None:
    parser = argparse.ArgumentParser(description="Asks a model what no training saw.")
    parser.add_argument("checkpoint", type=nano.find, nargs="?", default=nano.NAME)
    parser.add_argument("--sums", type=int, default=500)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--extractions", type=int, default=100)
    parser.add_argument("--others", type=int, default=50)
    parser.add_argument("--wrong", type=int, default=0, help="shows so many wrong answers")
    options = parser.parse_args()
    numbers: dict[Maker, int] = {sum_lesson: options.sums, call_lesson: options.calls}
    numbers |= {extraction_lesson: options.extractions, unit_lesson: options.others, date_lesson: options.others}
    model, tokenizer = gptoss_jax.load(options.checkpoint), load_tokenizer(options.checkpoint)
    with opened(model, tokenizer) as chat:
        print("What no training saw, of words from its lists:")
        report(asyncio.run(ask_all(chat, problems(numbers))), num_wrong=options.wrong)
        print("and of any words:")
        any_words = {maker: numbers[maker] for maker in (call_lesson, extraction_lesson)}
        report(asyncio.run(ask_all(chat, problems(any_words, of_known_words=False))), num_wrong=options.wrong)


def problems(numbers: dict[Maker, int], *, of_known_words: bool = True) -> list[tuple[Lesson, Setting]]:
    """So many of each kind, none of which any training saw."""
    return [
        one
        for maker, number in numbers.items()
        for one in islice(held_out(_SEED, maker, of_known_words=of_known_words), number)
    ]


@contextlib.contextmanager
def opened(model: GptOss, tokenizer: Tokenizer) -> Iterator[Chat]:
    """The engine, as chat and servers have it."""
    with gptoss_jax.Engine(model, settings=EngineSettings(max_rows=_AT_ONCE, max_context=1024)) as engine:
        yield Chat(engine, tokenizer)


async def ask_all(chat: Chat, wanted: Sequence[tuple[Lesson, Setting]]) -> list[Asked]:
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(lesson: Lesson, setting: Setting) -> Asked:
        async with gate:
            return Asked(lesson, setting, await answered(chat, lesson, setting))

    return await asyncio.gather(*(one(lesson, setting) for lesson, setting in wanted))


async def answered(chat: Chat, lesson: Lesson, setting: Setting) -> tuple[Message, ...]:
    """What is said to a lesson's question. A call that is right gets the lesson's result, and the model goes on."""
    results = [message for message in lesson.said if isinstance(message, ToolResult)]
    conversation, said = list(prompt(lesson, setting)), list[Message]()
    for result in [*results, None]:
        async with contextlib.aclosing(chat.stream([*conversation, *said], settings=_GREEDY)) as events:
            async for event in events:
                if isinstance(event, TurnFinished):
                    said += event.messages
        number = len(_calls(said))
        if result is None or not number or _calls(said) != _calls(lesson.said)[:number]:
            break
        said.append(result)
    return tuple(said)


def report(asked: Sequence[Asked], *, num_wrong: int) -> None:
    """Right answers by kind, of sums by effort too."""
    right, number = Counter[str](), Counter[str]()
    for one in asked:
        kinds = [one.lesson.kind, *([f"sum, {one.setting.effort}"] if one.lesson.kind == "sum" else [])]
        number.update(kinds)
        right.update(kinds if one.is_right else [])
    for kind, count in number.items():
        print(f"{kind:14} {right[kind]:4} of {count:4}   {100 * right[kind] / count:5.1f} %")
    for one in [one for one in asked if not one.is_right][:num_wrong]:
        print(f"\n{one.lesson.problem} ({one.setting.effort})")
        for message in one.said:
            print(f"    {message}")


# --- what is compared -------------------------------------------------------------------------------------------------


def _calls(said: Sequence[Message]) -> list[tuple[str, object]]:
    return [
        (message.recipient, _json(message.text))
        for message in said
        if isinstance(message, Assistant) and message.recipient is not None
    ]


def _final(said: Sequence[Message]) -> str:
    return next((m.text for m in reversed(said) if isinstance(m, Assistant) and m.channel == "final"), "")


def _last_number(text: str) -> str | None:
    found = re.findall(r"-?\d+", text)
    return found[-1] if found else None


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
