"""`chat`: a conversation in the terminal, or one answer for a script. Knows options and turns; paints nothing."""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import os
import secrets
import sys
import time
from collections.abc import Iterator

from gptoss_jax.chat import Chat, TurnSettings
from gptoss_jax.cli import adapters, chat_commands, chat_session, serving
from gptoss_jax.cli.chat_answer import Answer
from gptoss_jax.cli.chat_input import LineReader, Reader, is_typed
from gptoss_jax.cli.chat_screen import Screen
from gptoss_jax.cli.chat_session import ChatSession
from gptoss_jax.cli.serving import Opened
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import User
from gptoss_jax.harmony.render import render

_SEEDS = 2**32


def run(options: argparse.Namespace) -> int:
    """Talks until the user leaves, or answers --prompt."""
    _decode_anything()
    folders = adapters.only(options.adapter)
    with serving.joined(options) as hosts:
        if hosts.process_id:
            serving.follow(options, hosts, folders=folders)
            return 0
        session, settings = _session(options), _settings(options)  # mistakes are told before weights are read
        prompt = _text(sys.stdin.read()) if options.prompt == "-" else options.prompt
        started = time.perf_counter()
        _say(f"loading {options.checkpoint} …")
        with serving.open_engine(options, hosts, folders=folders) as opened, asyncio.Runner() as runner:
            _say(f"ready after {time.perf_counter() - started:.1f} s")
            talk = Talk(opened, session, settings, screen(is_conversation=prompt is None), runner)
            return talk.answer_once(prompt) if prompt is not None else talk.go_on()


@dataclasses.dataclass
class Talk:
    """A session, and who answers it."""

    opened: Opened
    session: ChatSession
    settings: TurnSettings
    screen: Screen
    runner: asyncio.Runner

    def __post_init__(self) -> None:
        self._chat = Chat(self.opened.engine, self.opened.tokenizer)

    def answer_once(self, prompt: str) -> int:
        """For scripts: the answer goes to stdout, and the exit code is 1 where the engine broke it off."""
        self.session.messages.append(User(text=prompt))
        answer = Answer()
        self.runner.run(self._answer(answer))
        self.screen.note(answer.pace.describe())
        assert answer.finished is not None, "a turn that was not stopped ends"
        return 0 if answer.finished.reason in ("stop", "length") else 1

    def go_on(self) -> int:
        """Reads, answers, and reads again."""
        self.screen.note(self._greeting())
        for line in _lines(_reader(), self.screen):
            with _mishaps_told(self.screen):
                next_step = self._take(line)
                if next_step == "quit":
                    break
                if next_step == "answer":
                    self._answer_last()
        return 0

    def _take(self, line: str) -> chat_commands.Next:
        if line.startswith("/"):
            return chat_commands.run(line, self.session, self.screen)
        if not line.strip():
            return "read"
        self.session.messages.append(User(text=line))
        return "answer"

    def _answer_last(self) -> None:
        """Answers what the user said last. What cannot be answered at all is taken back."""
        answer = Answer()
        try:
            self.runner.run(self._answer(answer))
        except KeyboardInterrupt:
            if not is_typed():
                raise
            self.screen.note("stopped")
        except UserError:
            self.session.take_back()
            raise
        self.session.messages += answer.kept()
        self.screen.note(f"{answer.pace.describe()} · {self._room()}")

    async def _answer(self, answer: Answer) -> None:
        settings = self._next_settings()
        stream = self._chat.stream(self.session.conversation(), settings=settings, tools=self.session.runnable_tools())
        async with contextlib.aclosing(stream) as events:
            async for event in events:
                answer.take(event)
                self.screen.show(event)

    def _next_settings(self) -> TurnSettings:
        """Each answer has a seed of its own: /retry is to give another one."""
        now = self.settings
        seed = (now.sampling.seed + 1) % _SEEDS
        self.settings = dataclasses.replace(now, sampling=dataclasses.replace(now.sampling, seed=seed))
        return now

    def _room(self) -> str:
        most = self.opened.engine.max_context
        taken = len(render(self.session.conversation(), self.opened.tokenizer))
        return f"{max(most - taken, 0):,} of {most:,} tokens left"

    def _greeting(self) -> str:
        session = self.session
        tools = f" · tools: {', '.join(session.tools)}" if session.tools else ""
        return f"{self.opened.model_name} · effort: {session.effort}{tools} · {self._room()} · /help"


def _session(options: argparse.Namespace) -> ChatSession:
    session = ChatSession(
        instructions="" if options.system is None else chat_session.read_instructions(options.system),
        effort=options.effort,
        date=chat_session.read_date(options.date),
        tools=chat_session.read_tools(options.tools),
    )
    if options.load is not None:
        chat_session.load(session, options.load)
    return session


def _settings(options: argparse.Namespace) -> TurnSettings:
    sampling = SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=secrets.randbelow(_SEEDS) if options.seed is None else options.seed,
    )
    sampling.check(vocab_size=1)  # no id is named
    return TurnSettings(sampling=sampling, max_new_tokens=options.max_new_tokens)


def _lines(reader: Reader, screen: Screen) -> Iterator[str]:
    """What the user types, until the end, or Ctrl-C twice with nothing between."""
    interrupted = False
    while True:
        try:
            if interrupted:
                screen.note("Ctrl-C again leaves, and so does /quit")
            line = _text(reader.read())
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
        else:
            interrupted = False
            yield line


@contextlib.contextmanager
def _mishaps_told(screen: Screen) -> Iterator[None]:
    """A mistake ends what was asked for, not the program; so does a Ctrl-C that comes a moment too late."""
    try:
        yield
    except KeyboardInterrupt:
        if not is_typed():  # a script is ended
            raise
    except UserError as error:
        screen.error(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        screen.error(f"{error.filename}: {error.strerror}")


def _reader() -> Reader:
    if not is_typed():
        return LineReader(shows_prompt=False)
    if importlib.util.find_spec("prompt_toolkit") is not None:
        prompt = importlib.import_module("gptoss_jax.cli.chat_prompt")
        return prompt.PromptReader([*chat_commands.COMMANDS])
    if importlib.util.find_spec("readline") is not None:
        importlib.import_module("readline")  # input() asks it from here on
    return LineReader(shows_prompt=True)


def screen(*, is_conversation: bool) -> Screen:
    """In a pipe, and of one answer, stdout has the answer alone."""
    alone = not (is_conversation and sys.stdout.isatty())
    notes = sys.stderr if alone else sys.stdout
    colours = notes.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return Screen(sys.stdout, notes, colours=colours, reasoning=not alone)


def _decode_anything() -> None:
    """Bytes that are typed and characters that are said, and that the terminal does not know, become question marks."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _text(typed: str) -> str:
    """Without the halves of characters that some terminals send."""
    return typed.encode("utf-8", errors="replace").decode("utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
