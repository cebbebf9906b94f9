"""A Python function that the model calls, and Python that it runs: one turn of a chat. Shows the API; knows no server.

python examples/tools.py                                      what a model says is played from a script: no checkpoint
python examples/tools.py CKPT --ask "Is it warm in Oslo?"     your model says it
"""

import argparse
import asyncio
import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import gptoss_jax
from gptoss_jax.chat import Chat, Part, ToolFinished, ToolStarted, TurnSettings
from gptoss_jax.engine.protocol import AnyEngine
from gptoss_jax.engine.settings import EngineSettings
from gptoss_jax.errors import Unsupported
from gptoss_jax.harmony.events import Delta, Start
from gptoss_jax.harmony.messages import Developer, System, User
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer
from gptoss_jax.testing import ScriptedEngine
from gptoss_jax.tools.base import Tool, functions_of, namespaces_of
from gptoss_jax.tools.functions import tool
from gptoss_jax.tools.python import PythonTool

DEGREES = {"oslo": 12.0, "cairo": 31.0}
SCRIPT = (
    "<|channel|>analysis<|message|>I look it up.<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>',
    "<|channel|>final<|message|>It is 12 degrees in Oslo.<|return|>",
)


@tool
def weather(city: str, unit: Literal["C", "F"] = "C") -> str:
    """The temperature of a city, now.

    Args:
        city: its name, in English.
    """
    celsius = DEGREES.get(city.lower())
    if celsius is None:
        return f"nothing is known of {city}; there are {', '.join(DEGREES)}"
    return f"{celsius if unit == 'C' else celsius * 9 / 5 + 32:.0f} °{unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Asks a model that has tools.")
    parser.add_argument("checkpoint", nargs="?", help="a converted checkpoint or a release; default: a script")
    parser.add_argument("--ask", default="How warm is it in Oslo?", help="default: %(default)r")
    options = parser.parse_args()
    opened = scripted() if options.checkpoint is None else loaded(Path(options.checkpoint))
    with opened as (engine, tokenizer):
        asyncio.run(answer(Chat(engine, tokenizer), options.ask))


async def answer(chat: Chat, question: str) -> None:
    tools: list[Tool] = [weather, *python()]
    conversation = [
        System(tools=namespaces_of(tools)),
        Developer(functions=functions_of(tools)),
        User(text=question),
    ]
    async with contextlib.aclosing(chat.stream(conversation, settings=TurnSettings(), tools=tools)) as events:
        async for event in events:
            match event:
                case Part(event=Start(header=header)):
                    print(f"\n[{header.recipient or header.channel}] ", end="")
                case Part(event=Delta(text=text)):
                    print(text, end="", flush=True)
                case ToolStarted(call=call):
                    print(f"\n… {call.recipient} runs", end="")
                case ToolFinished(result=result):
                    print(f"\n[{result.name} answers] {result.text}", end="")
    print()


def python() -> list[Tool]:
    """The python tool, where its programs can be shut in."""
    try:
        return [PythonTool()]
    except Unsupported as error:
        print(f"without python: {error}")
        return []


@contextlib.contextmanager
def scripted() -> Iterator[tuple[AnyEngine, Tokenizer]]:
    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(Path(folder) / "tokenizer.json", 352)
        tokenizer = load_tokenizer(Path(folder))
    with ScriptedEngine([ids_of(text, tokenizer) for text in SCRIPT], vocab_size=352) as engine:
        yield engine, tokenizer


def ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """What a model says, marks like <|end|> as the special tokens that they are."""
    pieces = re.split(r"(<\|\w+\|>)", text)
    return [one for p in pieces for one in ([tokenizer.special(p)] if p.startswith("<|") else tokenizer.encode(p))]


@contextlib.contextmanager
def loaded(checkpoint: Path) -> Iterator[tuple[AnyEngine, Tokenizer]]:
    tokenizer = load_tokenizer(checkpoint)
    settings = EngineSettings(max_rows=1, cache_tokens=8192)
    with gptoss_jax.Engine(
        gptoss_jax.load(checkpoint), settings=settings, token_bytes=lambda one: tokenizer.decode_bytes([one])
    ) as engine:
        yield engine, tokenizer


if __name__ == "__main__":
    main()
