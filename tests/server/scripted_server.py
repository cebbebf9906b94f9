"""A server's process for other people's programs: what it answers hangs on what it is asked. Knows no model.

    with scripted_server({"Hi": [says("Hello!")]}) as address: ...

A script is for the last text of a user, one turn of it for each result of a tool that stands behind that text; a prompt
that is no conversation is such a text itself. Turns are written in the words of tests/server/responses/fake.py.
"""

import contextlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import uvicorn

from gptoss_jax.engine.request import Request
from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.testing import ScriptedEngine
from tests.server.responses.fake import MODEL, VOCAB, ids, tokenizer

ROOT = Path(__file__).parents[2]
_USER = "<|start|>user<|message|>"
_RESULT = re.compile(r"<\|start\|>[\w.]+ to=assistant<\|channel\|>")


@contextlib.contextmanager
def scripted_server(scripts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Runs the process while the block runs, and gives its address; it has to end well, with nothing left running."""
    command = [sys.executable, "-m", "tests.server.scripted_server", json.dumps(scripts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()
            last_words = process.stdout.read()
    assert (last_words, process.returncode) == ("0 streams are open\n", 0)


def turn_of(prompt: str, scripts: Mapping[str, Sequence[str]]) -> str:
    """What the model says next."""
    question, _, since = prompt.rpartition(_USER)[2].partition("<|end|>")
    return scripts[question][len(_RESULT.findall(since))]


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: object) -> None:
        """Ends without raising the signal again: what is left running is yet to be told."""
        self.should_exit = True


def main() -> None:
    scripts = json.loads(sys.argv[1])

    def script(request: Request) -> list[int]:
        return ids(turn_of(tokenizer().decode(request.prompt), scripts))

    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    with ScriptedEngine(script, vocab_size=VOCAB, seconds_per_token=0.001) as engine:
        app = create_app(engine, tokenizer=tokenizer(), model_name=MODEL, settings=ServerSettings(shutdown_s=0.5))
        _Server(uvicorn.Config(app, log_level="warning", lifespan="on")).run(sockets=[listener])
        print(f"{engine.num_open} streams are open", flush=True)


if __name__ == "__main__":
    main()
