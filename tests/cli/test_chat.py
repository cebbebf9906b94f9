"""`chat` as people and scripts see it: what is shown, what is typed, what is kept. A script plays the model."""

import asyncio
import codecs
import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from gptoss_jax.chat import Part, ToolFinished, TurnSettings
from gptoss_jax.cli import chat_session, main
from gptoss_jax.cli.chat import Talk
from gptoss_jax.cli.chat_answer import Answer
from gptoss_jax.cli.chat_commands import COMMANDS
from gptoss_jax.cli.chat_input import message_of, needs_more
from gptoss_jax.cli.chat_screen import Screen, harmless
from gptoss_jax.cli.chat_session import ChatSession, settled
from gptoss_jax.cli.serving import Opened
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.engine.request import Token
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.events import Delta, End, Header, Start
from gptoss_jax.harmony.messages import Assistant, Namespace, ToolResult, User
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer
from gptoss_jax.testing import ScriptedEngine
from tests.hosts.processes import COMMAND, run_all, side_by_side
from tests.tiny import TINY

ROOT = Path(__file__).parents[2]
VOCAB = 352
SETTINGS = TurnSettings()
THOUGHT = "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant"


def final(text: str) -> str:
    return f"<|channel|>final<|message|>{text}<|return|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte of text is an id."""
    folder = tmp_path_factory.mktemp("letters")
    write_byte_tokenizer(folder / "tokenizer.json", VOCAB)
    return folder


@pytest.fixture(scope="module")
def letters(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


class Spoken:
    """What came of a conversation."""

    def __init__(self, engine: ScriptedEngine, session: ChatSession, out: str, notes: str, tokenizer: Tokenizer):
        self.engine, self.session, self.out, self.notes = engine, session, out, notes
        self.prompts = [tokenizer.decode(request.prompt) for request in engine.requests]


@pytest.fixture
def talk(letters: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Spoken]]:
    """Types lines, of which those that are no commands are answered by the texts in turn."""

    def ids(text: str) -> list[int]:
        found = []
        for piece in re.split(r"(<\|\w+\|>)", text):
            found += [letters.special(piece)] if piece.startswith("<|") else letters.encode(piece)
        return found

    def run(
        lines: Sequence[str],
        texts: Sequence[str] = (),
        *,
        session: ChatSession | None = None,
        in_terminal: bool = False,
        max_context: int = 4096,
        settings: TurnSettings = SETTINGS,
    ) -> Spoken:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        out = io.StringIO()
        notes = out if in_terminal else io.StringIO()
        screen = Screen(out, notes, colours=in_terminal, reasoning=in_terminal)
        session = ChatSession() if session is None else session
        engine = ScriptedEngine([ids(text) for text in texts], vocab_size=VOCAB, max_context=max_context)
        with contextlib.closing(engine), asyncio.Runner() as runner:
            assert Talk(Opened(engine, letters, "scripted"), session, settings, screen, runner).go_on() == 0
            assert engine.num_open == 0
        return Spoken(engine, session, out.getvalue(), notes.getvalue(), letters)

    return run


# What is shown


def test_in_a_pipe_the_answers_alone_go_to_stdout(talk):
    spoken = talk(["hello", "and you?"], [THOUGHT + final("Hi."), final("Well.")])
    assert spoken.out == "Hi.\nWell.\n"
    assert "I think." not in spoken.notes
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s · the first after \d", spoken.notes)
    assert "\x1b" not in spoken.out + spoken.notes


def test_in_a_terminal_all_is_shown_and_reasoning_is_dimmed(talk):
    shown = talk(["hello"], [THOUGHT + final("Hi.")], in_terminal=True).out
    assert "Hi.\n" in shown
    assert "".join(re.findall("\x1b\\[2m([^\x1b]*)\x1b\\[0m", shown)).count("I think.") == 1
    hidden = talk(["/reasoning off", "hello"], [THOUGHT + final("Hi.")], in_terminal=True).out
    assert "I think." not in hidden.replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert "thinking …" in hidden


def test_the_room_that_is_left_is_what_the_next_prompt_leaves(talk):
    spoken = talk(["hello", "again"], [final("Hi."), final("Hi.")])
    left = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) of 4,096 tokens left", spoken.notes)]
    assert left[0] > left[1] > left[2]
    num_question = len(["<|start|>", *"user", "<|message|>", *"again", "<|end|>"])
    num_beginning = len(["<|start|>", *"assistant"])
    assert 4096 - left[1] == len(spoken.engine.requests[1].prompt) - num_question - num_beginning


def test_control_characters_do_not_reach_the_terminal():
    everything = "".join(map(chr, range(0x110000)))
    passed = {char for char in harmless(everything) if unicodedata.category(char) == "Cc"}
    assert passed == {"\n", "\t"}
    assert not {unicodedata.lookup("RIGHT-TO-LEFT OVERRIDE"), unicodedata.lookup("LEFT-TO-RIGHT ISOLATE")} & set(
        harmless(everything)
    )
    assert harmless("naïve 日本 🎉\n\tx") == "naïve 日本 🎉\n\tx"
    assert harmless("\x1b]0;mine\x07\r\n") == "␛]0;mine␇\n"


class Painter:
    """A tool whose answers would clear the screen."""

    namespace = Namespace(name="painter")

    def session(self) -> "Painter":
        return self

    def handles(self, recipient: str) -> bool:
        return recipient == "painter"

    async def call(self, recipient: str, text: str) -> str:
        return "\x1b[2J painted\n" * 50


def test_what_a_model_and_a_tool_write_cannot_paint(talk):
    call = "<|channel|>analysis to=painter code<|message|>\x1b[1m red<|call|>"
    session = ChatSession(tools={"painter": Painter()})
    shown = talk(["paint"], [call, final("\x1b[2J\x9b2J done")], session=session, in_terminal=True).out
    assert set(re.findall("\x1b[^m]*m", shown)) <= {"\x1b[2m", "\x1b[36m", "\x1b[31m", "\x1b[0m"}
    assert not {char for char in shown if unicodedata.category(char) == "Cc"} - {"\n", "\x1b"}
    for text in ("␛[2J�2J done", "␛[1m red", "␛[2J painted"):
        assert text in re.sub("\x1b[^m]*m", "", shown)
    assert shown.count("painted") < 20, "a long result is cut"
    assert re.search(r"… \d+ more characters", shown)


def test_a_tool_that_is_not_there_is_answered(talk):
    spoken = talk(["look"], ["<|channel|>commentary to=container.exec<|message|>{}<|call|>", final("Sorry.")])
    assert spoken.out == "Sorry.\n"
    assert "▸ container.exec {}" in spoken.notes
    assert "there is no tool container.exec; there are no tools" in spoken.prompts[1]


def test_an_answer_that_is_cut_says_so_and_stays(talk):
    spoken = talk(["hello"], [final("Hi there.")], settings=TurnSettings(max_new_tokens=10))
    assert spoken.out == "Hi \n"
    assert "the answer is cut" in spoken.notes
    assert spoken.session.messages == [User(text="hello"), Assistant(text="Hi ")]


def test_what_cannot_be_answered_is_taken_back(talk):
    spoken = talk(["x" * 500, "hi"], [final("Hi.")], max_context=600)
    assert "context is 600" in spoken.notes
    assert spoken.session.messages == [User(text="hi"), Assistant(text="Hi.")]


# What is typed


def test_lines_are_joined():
    assert not needs_more("one")
    assert needs_more("one\\")
    assert needs_more('"""one')
    assert not needs_more('"""one\ntwo"""')
    assert message_of("one\\\ntwo") == "one\ntwo"
    assert message_of('"""\none\n\ntwo\n"""') == "one\n\ntwo"


def test_messages_of_several_lines(talk):
    spoken = talk(['"""', "one", "", "/two", '"""', "three\\", "four"], [final("a"), final("b")])
    questions = [message.text for message in spoken.session.messages if isinstance(message, User)]
    assert questions == ["one\n\n/two", "three\nfour"]


def test_effort_and_instructions_hold_from_the_next_answer_on(talk, tmp_path: Path):
    (tmp_path / "pirate.txt").write_text("Talk like a pirate.")
    lines = ["a", "/effort high", f"/system @{tmp_path}/pirate.txt", "b", "/system none", "/effort low", "c"]
    prompts = talk(lines, [final(text) for text in "123"]).prompts
    assert [re.findall(r"Reasoning: (\w+)", prompt) for prompt in prompts] == [["medium"], ["high"], ["low"]]
    assert ["pirate" in prompt for prompt in prompts] == [False, True, False]


def test_retry_asks_the_same_again_with_another_seed(talk):
    spoken = talk(["hello", "/retry"], [final("Hi."), final("Ho.")])
    assert spoken.prompts[0] == spoken.prompts[1]
    first, second = (request.sampling.seed for request in spoken.engine.requests)
    assert first != second
    assert spoken.session.messages == [User(text="hello"), Assistant(text="Ho.")]


def test_undo_and_new(talk):
    spoken = talk(["a", "b", "/undo"], [final("1"), final("2")])
    assert spoken.session.messages == [User(text="a"), Assistant(text="1")]
    assert "taken back: b" in spoken.notes
    assert talk(["a", "/new"], [final("1")]).session.messages == []


def test_a_conversation_is_saved_and_gone_on_with(talk, tmp_path: Path):
    path = tmp_path / "talk.json"
    call = "<|channel|>commentary to=x.y <|constrain|>json<|message|>{}<|call|>"
    first = talk(["/system Be brief.", "/effort high", "hé\\", "llo", f"/save {path}"], [THOUGHT + call, final("Hi.")])
    second = talk([f"/load {path}", "again"], [final("Ho.")])
    assert second.session.messages == [*first.session.messages, User(text="again"), Assistant(text="Ho.")]
    assert (second.session.instructions, second.session.effort) == ("Be brief.", "high")


def test_half_of_a_character_is_saved_as_a_question_mark(tmp_path: Path):
    session, path = ChatSession(messages=[ToolResult(name="x.y", text="a\ud800b")]), tmp_path / "talk.json"
    chat_session.save(session, path)
    chat_session.load(session, path)
    assert session.messages == [ToolResult(name="x.y", text="a?b")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "no JSON"),
        ("[]", "no conversation"),
        ({"version": 2}, "version 2"),
        ({"effort": "huge"}, "damaged"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] is dict without a text"),
        ({"messages": [{"role": "system", "text": "x"}]}, "role 'system'"),
        ({"messages": [{"role": "tool", "text": "x", "name": "a b", "channel": "final"}]}, "a tool's name is 'a b'"),
        ({"messages": [{"role": "assistant", "text": "x", "channel": "secret"}]}, "role 'assistant'"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(tmp_path: Path, content, expected: str):
    good = {"format": "gptoss_jax chat", "version": 1, "effort": "low", "system": "", "messages": []}
    path = tmp_path / "talk.json"
    path.write_text(content if isinstance(content, str) else json.dumps(good | content))
    session = ChatSession(messages=[User(text="before")])
    with pytest.raises(UserError, match=expected):
        chat_session.load(session, path)
    assert session == ChatSession(messages=[User(text="before")])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/nothing", "there is no /nothing"),
        ("/effort huge", "expected low, medium or high"),
        ("/reasoning maybe", "expected on or off"),
        ("/tools hammer", "there is no tool 'hammer'"),
        ("/tools browser=/no/such/folder", "/no/such/folder"),
        ("/save", "expected /save FILE"),
        ("/load /no/such/file", "/no/such/file: No such file"),
        ("/system @/no/such/file", "/no/such/file: No such file"),
        ("/retry", "nothing to answer"),
        ("/undo", "nothing to take back"),
    ],
)
def test_a_mistake_is_told_and_the_conversation_goes_on(talk, line: str, expected: str):
    spoken = talk([line, "hello"], [final("Hi.")])
    assert expected in spoken.notes
    assert spoken.out == "Hi.\n"


def test_help_tells_of_every_command_and_quit_leaves(talk):
    spoken = talk(["/help", "/quit", "never said"])
    assert all(name in spoken.notes for name in COMMANDS)
    assert not spoken.engine.requests


# What is kept of an answer that is stopped


def taken(*events) -> Answer:
    answer = Answer()
    for event in events:
        answer.take(event)
    return answer


def test_of_a_stopped_answer_stays_what_was_seen():
    token = (Token(0, 5, 0.0),)
    thought = Assistant(text="hm", channel="analysis")
    thinks = (Part(Start(0, Header("analysis")), token), Part(Delta(0, "hm"), token))
    speaks = (Part(Start(1, Header("final")), token), Part(Delta(1, "Hel"), token), Part(Delta(1, "lo"), token))
    assert taken(*thinks).kept() == []
    assert taken(*thinks, Part(End(0, thought, "end"), token)).kept() == []
    assert taken(*thinks, Part(End(0, thought, "end"), token), *speaks).kept() == [thought, Assistant(text="Hello")]
    assert taken(*thinks, *speaks).pace.num_tokens == 5


def test_of_a_stopped_answer_calls_stay_with_their_results_alone():
    calls = [Assistant(text=text, channel="commentary", recipient="python") for text in "ab"]
    result = ToolResult(name="python", text="1")
    parts = [Part(End(place, call, "end"), ()) for place, call in enumerate(calls)]
    assert taken(*parts).kept() == []
    assert taken(*parts, ToolFinished(calls[0], result, 0.1, False)).kept() == [calls[0], result]
    assert settled([*calls, result, result]) == [*calls, result, result]


class Terminal:
    """The other end of a terminal in which a chat runs."""

    def __init__(self, folder: Path, **environment: str):
        self.end, inside = pty.openpty()
        self.shown = ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.scripted_chat", str(folder)],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "JAX_PLATFORMS": "cpu", **environment},
            start_new_session=True,
        )
        os.close(inside)

    def wait_for(self, pattern: str, *, keys: str = "", seconds: float = 60) -> None:
        """Reads until what is new matches, and forgets it. Types keys, and a Ctrl-C again if nothing comes of it:
        between two reads of a line Python may swallow it. A line typed twice would be two messages."""
        until, typed = time.monotonic() + seconds, 0.0
        while (found := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < until, f"{pattern!r} is not in {self.shown!r}"
            if keys and (not typed or (keys == "\x03" and time.monotonic() > typed + 3)):
                with contextlib.suppress(OSError):  # it has ended
                    os.write(self.end, keys.encode())
                typed = time.monotonic()
            if select.select([self.end], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # it has ended
                    self.shown += self._utf8.decode(os.read(self.end, 65536))
        self.shown = self.shown[found.end() :]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.end)


@pytest.mark.parametrize("plain", [False, True])
def test_ctrl_c_stops_the_answer_and_twice_at_the_prompt_it_leaves(folder: Path, tmp_path: Path, plain: bool):
    """With prompt_toolkit, and with input() alone where it is not installed."""
    environment = {"XDG_STATE_HOME": str(tmp_path)}
    if plain:
        (tmp_path / "prompt_toolkit.py").write_text("raise ImportError")
        (tmp_path / "sitecustomize.py").write_text(
            "import importlib.util as u; find = u.find_spec\n"
            "u.find_spec = lambda name, *rest: None if name == 'prompt_toolkit' else find(name, *rest)\n"
        )
        environment["PYTHONPATH"] = str(tmp_path)
    with contextlib.closing(Terminal(folder, **environment)) as terminal:
        terminal.wait_for("/help")
        terminal.wait_for(">")
        terminal.wait_for("xxx", keys="hello\r")
        terminal.wait_for("stopped", keys="\x03")
        terminal.wait_for("tokens left(?s:.*)>")
        terminal.wait_for("Ctrl-C again leaves", keys="\x03")
        terminal.wait_for(r"open requests: 0, messages: 3", keys="\x03")
        assert terminal.process.wait(timeout=20) == 0
    history = tmp_path / "gptoss_jax" / "chat_history"
    assert history.exists() != plain
    if not plain:
        assert "hello" in history.read_text()
        assert history.stat().st_mode & 0o077 == 0


# The command


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of TINY, which compile quickly."""
    folder = tmp_path_factory.mktemp("release") / "tiny"
    write_checkpoint(folder, dataclasses.replace(TINY, layer_kinds=TINY.layer_kinds[:2]), seed=0)
    return folder


def test_one_answer_for_a_script(release: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--max-new-tokens", "12", "--max-context", "1024", "--prefill-tokens", "64", "--seed", "3"]
    assert main(["chat", str(release), "--prompt", "hello", "--date", "none", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out
    assert "12 tokens" in captured.err
    assert not {char for char in captured.out if unicodedata.category(char) == "Cc"} - {"\n", "\t"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--system", "@/no/such/file"], "/no/such/file"),
        (["--tools", "hammer"], "hammer"),
        (["--date", "today"], "--date is 'today'"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--max-rows", "0"], "max_rows is 0"),
        (["--cache-tokens", "64", "--cache-bytes", "64"], "expected one of them"),
        (["--load", "/no/such/file"], "/no/such/file"),
        (["--mesh", "expert=16"], "16 devices"),
    ],
)
def test_a_mistake_is_told_before_weights_are_read(release: Path, capsys, options: list[str], expected: str):
    assert main(["chat", str(release), "--prompt", "hello", *options]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""


@pytest.mark.slow
def test_two_processes_answer_as_one_does(release: Path):
    options = ("--prompt", "hello", "--date", "none", "--temperature", 0, "--dtype", "float32", "--seed", 1)
    options += ("--max-new-tokens", 12, "--max-context", 1024)
    command = ("chat", release, *options)
    (alone,) = run_all([(*COMMAND, *command)], cwd=ROOT)
    first, second = run_all(side_by_side(*[(*command, "--mesh", "expert=2", "--host-devices", 1)] * 2), cwd=ROOT)
    assert (alone.code, first.code, second.code) == (0, 0, 0), first.stderr + second.stderr
    assert (first.stdout, second.stdout) == (alone.stdout, "")
    assert alone.stdout
