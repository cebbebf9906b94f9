"""`serve` as a user starts it: a process, its address, its signals. What it answers is tested in tests/server."""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gptoss_jax.cli import main

SMALL = ("--dtype", "float32", "--max-rows", "2", "--max-context", "256", "--cache-tokens", "600")
WORKING = ("--prefill-tokens", "32", "--port", "0")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]):
    """Runs a command that must fail, and gives its complaint."""

    def run(*arguments: object) -> str:
        assert main(["serve", *map(str, arguments)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(say, tiny_hf: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        complaint = say(tiny_hf, "--port", port)
    assert f"no server on 127.0.0.1 port {port}" in complaint
    assert "choose another --host or --port" in complaint


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--port", "70000"], "--port is 70000; expected 0 (any that is free) to 65535"),
        (["--host", "no.such.host.invalid"], "no server on no.such.host.invalid"),
        (["--tools", "python,shell"], "--tools names 'shell'; expected python or browser=DIR"),
        (["--date", "yesterday"], "--date is 'yesterday'"),
        (["--api-key", "two words"], "an API key is empty or has a character that a header cannot"),
        (["--shutdown-seconds", "-1"], "shutdown_s is -1.0; expected 0 or more"),
        (["--max-body-bytes", "0"], "max_body_bytes is 0; expected more than 0"),
    ],
)
def test_options_that_make_no_sense(say, tiny_hf: Path, options, complaint):
    assert complaint in say(tiny_hf, *options)


def test_a_file_without_keys_is_no_server_without_keys(say, tiny_hf: Path, tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text("\n \n")
    assert f"{path} is empty; expected an API key in each line" in say(tiny_hf, "--api-key-file", path)
    assert "nothing" in say(tiny_hf, "--api-key-file", tmp_path / "nothing")


def test_no_checkpoint(say, tmp_path: Path):
    assert str(tmp_path / "nothing") in say(tmp_path / "nothing")


@dataclasses.dataclass
class Server:
    """A server's process, and what it has said so far."""

    process: subprocess.Popen[str]
    lines: list[str]

    def wait_for(self, pattern: str, *, seconds: float = 120) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in list(self.lines):
                found = re.search(pattern, line)
                if found:
                    return found
            assert self.process.poll() is None, self.lines
            time.sleep(0.02)
        raise AssertionError(f"{pattern} was not said in {seconds} s: {self.lines}")

    def end(self, *, seconds: float = 60) -> int:
        return self.process.wait(timeout=seconds)


@contextlib.contextmanager
def serving(*arguments: object) -> Iterator[Server]:
    command = [sys.executable, "-c", "import sys; from gptoss_jax.cli import main; sys.exit(main())", "serve"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "GPTOSS_JAX_API_KEYS": ""}
    with subprocess.Popen(
        [*command, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        lines: list[str] = []
        reader = threading.Thread(target=lambda pipe: lines.extend(pipe), args=[process.stderr])
        server = Server(process, lines)
        reader.start()
        try:
            yield server
        finally:
            process.kill()
            reader.join()


@pytest.mark.slow
def test_a_server_from_its_start_to_its_end(tiny_hf: Path, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("the-key\nanother-key\n")
    with serving(tiny_hf, *SMALL, *WORKING, "--api-key-file", keys, "--model-name", "tiny") as server:
        address = server.wait_for(r"(http://127\.0\.0\.1:\d+): 2 API keys")[1]
        early = httpx.get(f"{address}/ready")  # it answers while the model loads
        assert (early.status_code, early.json()["error"]["code"]) == (503, "model_loading")
        server.wait_for(r"ready after .* s: tiny, 256 tokens of context")
        body = {"prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0, "logit_bias": {"257": -100, "258": -100}}
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 401
        with httpx.Client(base_url=address, headers={"Authorization": "Bearer another-key"}, timeout=60) as client:
            answer = client.post("/v1/completions", json=body).json()
            assert answer["usage"]["completion_tokens"] == 5
            with client.stream("POST", "/v1/completions", json=body | {"max_tokens": 200, "stream": True}) as stream:
                lines = stream.iter_lines()
                next(lines)
                server.process.send_signal(signal.SIGTERM)
                events = [line for line in lines if line.startswith("data: ")]
        # What ran when the signal came has run to its end.
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
        assert server.end() == 0
    text = "".join(server.lines)
    assert "ending: 1 answers may take 30 s more" in text
    assert text.endswith("gptoss-jax serve: ended\n")
    assert "Traceback" not in text
    assert "the-key" not in text


@pytest.mark.slow
def test_streams_that_are_cut_give_their_pages_back_and_the_others_are_right(tiny_hf: Path):
    """More streams than the engine has rows, a third of them cut; the others say what they say alone."""
    body = {"max_tokens": 40, "temperature": 0, "stream": True, "logit_bias": {"257": -100, "256": -100, "258": -100}}
    prompts = [[number + 1, 7, 2 * number + 3] for number in range(30)]
    exact = ("--impl", "xla", "--batch-invariant")  # so that company does not matter to the last bit

    async def read(client: httpx.AsyncClient, number: int, *, cut: int | None = None) -> list[str]:
        async with client.stream("POST", "/v1/completions", json=body | {"prompt": prompts[number]}) as response:
            texts: list[str] = []
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    texts.append(json.loads(line[6:])["choices"][0]["text"])
                if len(texts) == cut:
                    break
            return texts

    async def run(address: str) -> tuple[list[list[str]], list[list[str]], str]:
        async with httpx.AsyncClient(base_url=address, timeout=100) as client:
            cuts = [1 + number % 17 if number % 3 == 0 else None for number in range(30)]
            together = await asyncio.gather(*[read(client, number, cut=cut) for number, cut in enumerate(cuts)])
            for _ in range(200):
                metrics = (await client.get("/metrics")).text
                if "gptoss_engine_running 0.0" in metrics and "gptoss_engine_waiting 0.0" in metrics:
                    break
                await asyncio.sleep(0.05)
            alone = [await read(client, number) for number in range(30) if cuts[number] is None]
            return [texts for texts, cut in zip(together, cuts, strict=True) if cut is None], alone, metrics

    with serving(tiny_hf, *SMALL, *WORKING, *exact) as server:
        address = server.wait_for(r"(http://127\.0\.0\.1:\d+)")[1]
        server.wait_for("ready after")
        together, alone, metrics = asyncio.run(run(address))
    assert together == alone
    assert {len(texts) for texts in alone} != {0}
    for pool in ("full", "sliding"):
        assert f"gptoss_engine_held_{pool}_pages 0.0" in metrics


@pytest.mark.slow
def test_a_second_signal_ends_what_runs(tiny_hf: Path):
    sizes = ("--dtype", "float32", "--max-rows", "1", "--max-context", "60000", "--cache-tokens", "60000")
    body = {
        "prompt": [1, 2],
        "max_tokens": 50_000,
        "stream": True,
        "logit_bias": {"256": -100, "257": -100, "258": -100},
    }
    with serving(tiny_hf, *sizes, *WORKING) as server:
        address = server.wait_for(r"(http://127\.0\.0\.1:\d+)")[1]
        server.wait_for("ready after")
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("a second signal ends them now")
            server.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            error, _ = [line for line in lines if line][-2:]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert server.end(seconds=20) == 0
        assert time.monotonic() - began < 15
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.slow
def test_a_signal_while_the_model_loads_ends_it_at_once(tiny_hf: Path):
    with serving(tiny_hf, *SMALL, *WORKING) as server:
        server.wait_for("no API key, for programs on this machine")
        server.process.send_signal(signal.SIGINT)
        assert server.end(seconds=10) == 130
    assert "ended while the model was loading" in "".join(server.lines)


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_server(tiny_hf: Path):
    with serving(tiny_hf, *WORKING, "--max-rows", 0) as server:
        assert server.end() == 2
    assert "max_rows is 0" in server.lines[-1]
    assert "Traceback" not in "".join(server.lines)
