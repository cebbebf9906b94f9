"""A server's process for other people's programs: what it answers hangs on what it is asked. Knows no model.

    with scripted_server({"Hi": [says("Hello!")]}) as address: ...

A script is for the last text of a user, one turn of it for each result of a tool that stands behind that text. In
texts, special tokens stand by their names, as in tests/server/responses/fake.py, whose words for them are `says`,
`thinks` and `calls`.
"""

import contextlib
import json
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import uvicorn

from gptoss_jax.engine.request import Request
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer
from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.testing import ScriptedEngine

ROOT = Path(__file__).parents[2]
MODEL = "scripted"
_VOCAB_SIZE = 352
_USER = "<|start|>user<|message|>"
_RESULT = re.compile(r"<\|start\|>[\w.]+ to=assistant<\|channel\|>")


@contextlib.contextmanager
def scripted_server(scripts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Runs the process while the block runs, and gives its address. It has to end well."""
    command = [sys.executable, "-m", "tests.server.scripted_server", json.dumps(scripts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()
            last_words = process.stdout.read()
    assert (last_words, process.returncode) == ("0 streams are open\n", 0)


def answer_to(prompt: str, scripts: Mapping[str, Sequence[str]]) -> str:
    """What the model says next. A prompt that is no conversation is its own question."""
    asked = prompt.rpartition(_USER)[2]
    question, _, since = asked.partition("<|end|>")
    return scripts[question][len(_RESULT.findall(since))]


def ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """Text to ids, names of special tokens to theirs."""
    pieces = re.split(r"(<\|[a-z]+\|>)", text)
    return [
        token_id
        for index, piece in enumerate(pieces)
        for token_id in ([tokenizer.special(piece)] if index % 2 else tokenizer.encode(piece))
    ]


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: object) -> None:
        """Ends without raising the signal again: whether all has ended is yet to be told."""
        self.should_exit = True


def main() -> None:
    scripts = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(Path(folder, "tokenizer.json"), _VOCAB_SIZE)
        tokenizer = load_tokenizer(Path(folder))

    def script(request: Request) -> list[int]:
        return ids_of(answer_to(tokenizer.decode(request.prompt), scripts), tokenizer)

    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    with ScriptedEngine(
        script,
        vocab_size=_VOCAB_SIZE,
        seconds_per_token=0.001,
        token_bytes=lambda token_id: tokenizer.decode_bytes([token_id]),
    ) as engine:
        app = create_app(engine, tokenizer=tokenizer, model_name=MODEL, settings=ServerSettings(shutdown_s=0.5))
        _Server(uvicorn.Config(app, log_level="warning", lifespan="on")).run(sockets=[listener])
        print(f"{engine.num_open} streams are open", flush=True)


if __name__ == "__main__":
    main()
