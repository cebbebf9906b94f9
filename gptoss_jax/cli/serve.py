"""`serve`: a server on a socket, up at once, ready when the model is loaded. Knows options and signals; no route."""

import argparse
import asyncio
import contextlib
import gc
import ipaddress
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from gptoss_jax import checkpoint
from gptoss_jax.cli import adapters, exit_codes, serving
from gptoss_jax.cli.chat_session import read_date
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.hosts import Hosts
from gptoss_jax.server.app import create_app
from gptoss_jax.server.service import Service
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.tools.base import Tool
from gptoss_jax.tools.browser import BrowserTool
from gptoss_jax.tools.folder import FolderBackend
from gptoss_jax.tools.python import PythonTool

KEYS_VARIABLE = "GPTOSS_JAX_API_KEYS"  # one or several, with commas between
_LAST_WORDS_S = 5.0  # for answers that were ended to reach their clients


def run(options: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM."""
    settings = _settings(options)
    _log(options.log_level.upper())
    with serving.joined(options) as hosts:
        if hosts.process_id:
            serving.follow(options, hosts, folders=adapters.named(options.adapter))
            return 0
        return _serve(options, hosts, settings)


def _serve(options: argparse.Namespace, hosts: Hosts, settings: ServerSettings) -> int:
    path = Path(options.checkpoint)
    name = options.model_name or path.resolve().name
    folders = adapters.named(options.adapter)
    checkpoint.sizes(path)  # a folder that is none is told before anybody is told an address
    with contextlib.closing(_listen(options.host, options.port)) as listener:
        app = create_app(
            None,
            tokenizer=load_tokenizer(path),
            model_name=name,
            settings=settings,
            adapters=adapters.names(folders),
        )
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=options.access_log,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(settings.shutdown_s + _LAST_WORDS_S),
        )
        server = _Server(config, service=app.state.service)
        _say(f"{_address(listener)}: {_who_may_ask(settings, listener)}")
        _say(f"loading {path}; until then requests for the model are answered by 503")
        with _Loading(options, hosts, server, folders):
            server.run(sockets=[listener])
    _say("ended")
    return 0


class _Server(uvicorn.Server):
    """uvicorn, which waits for what runs as long as the settings say, and ends by itself and not by its signal."""

    def __init__(self, config: uvicorn.Config, *, service: Service):
        super().__init__(config)
        self.service = service
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets finish what runs, the second ends it, the third waits for nothing."""
        self._signals += 1
        self.should_exit = True
        if self._signals == 2:
            self.service.stop(within_s=0)
        self.force_exit = self._signals > 2

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more requests, lets those that run finish, ends those that do not."""
        self.service.stop()
        if len(self.service.running):
            seconds = f"{self.service.settings.shutdown_s:g}"
            _say(
                f"ending: {len(self.service.running)} answers may take {seconds} s more; a second signal ends them now"
            )
        closing = asyncio.create_task(self.service.close())
        await super().shutdown(sockets)
        if self.force_exit:
            closing.cancel()


class _Loading:
    """The model's way into the server, in a thread beside it. Ends the server where there is no way."""

    def __init__(self, options: argparse.Namespace, hosts: Hosts, server: _Server, folders: Sequence[adapters.Folder]):
        self._folders = folders
        self._options = options
        self._hosts = hosts
        self._server = server
        self._served = threading.Event()  # the server has ended; the engine may be closed
        self._loaded = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="loading", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._served.set()
        if self._thread.is_alive() and not self._loaded.is_set():
            # A compiler that is interrupted midway would end the process by a crash a moment later.
            _say("ended while the model was loading")
            sys.stderr.flush()
            os._exit(exit_codes.INTERRUPTED)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            with serving.open_engine(self._options, self._hosts, folders=self._folders) as opened:
                self._server.service.open(opened.engine)
                _keep_what_is_loaded()
                self._loaded.set()
                name, *names = self._server.service.models
                trained = f", with {' or '.join(names)}" if names else ""
                context = f"{opened.engine.max_context} tokens of context"
                _say(f"ready after {time.perf_counter() - began:.1f} s: {name}{trained}, {context}")
                self._served.wait()
        except BaseException as error:
            self._error = error
            self._loaded.set()
            self._server.should_exit = True


def _keep_what_is_loaded() -> None:
    """What is there by now stays. To look for garbage among it again and again would keep all answers waiting."""
    gc.collect()
    gc.freeze()


def _settings(options: argparse.Namespace) -> ServerSettings:
    keys = _keys(options)
    hosts = tuple(options.trusted_host)
    if not hosts and not keys and _is_loopback(options.host):
        hosts = ("127.0.0.1", "localhost", "[::1]", options.host)
    return ServerSettings(
        api_keys=keys,
        cors_origins=tuple(options.cors_origin),
        trusted_hosts=() if "*" in hosts else hosts,
        store="none" if options.store == "none" else None if options.store is None else Path(options.store),
        tools=_tools(options.tools),
        today=read_date(options.date),
        default_effort=options.effort,
        shutdown_s=options.shutdown_seconds,
        max_new_tokens=options.max_new_tokens,
        max_body_bytes=options.max_body_bytes,
        lenient_schemas=options.lenient_schemas,
        page=options.page,
    )


def _keys(options: argparse.Namespace) -> tuple[str, ...]:
    """Those of the options, the file's, one in each line, and the environment's."""
    keys = list(options.api_key)
    if options.api_key_file is not None:
        keys += options.api_key_file.read_text(encoding="utf-8").split()
        if not keys:
            raise UserError(f"{options.api_key_file} is empty; expected an API key in each line")
    keys += [key for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key]
    return tuple(keys)


def _tools(words: str | None) -> list[Tool]:
    """What `--tools python,browser=DIR` offers; each conversation gets a session of its own."""
    found: list[Tool] = []
    for word in filter(None, (word.strip() for word in (words or "").split(","))):
        name, _, value = word.partition("=")
        if word == "python":
            found.append(PythonTool())
        elif name == "browser" and value:
            found.append(BrowserTool(FolderBackend(Path(value).expanduser())))
        else:
            raise UserError(f"--tools names {word!r}; expected python or browser=DIR, with commas between")
    return found


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is taken before anything is loaded: a port that is not free is said at once."""
    if not 0 <= port < 2**16:  # getaddrinfo would take the rest of it
        raise UserError(f"--port is {port}; expected 0 (any that is free) to {2**16 - 1}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"no server on {host} port {port}: {error}; choose another --host or --port") from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _who_may_ask(settings: ServerSettings, listener: socket.socket) -> str:
    if settings.api_keys:
        return f"{len(settings.api_keys)} API keys" if len(settings.api_keys) > 1 else "with an API key"
    if _is_loopback(listener.getsockname()[0]):
        return "no API key, for programs on this machine"
    return "NO API KEY, and whoever reaches this address may use it: give --api-key-file"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _log(level: str) -> None:
    """Our own messages and a request's line, to stderr; of others what is wrong."""
    # By force: a library that is imported before may have given the root a handler of its own.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    for name in ("gptoss_jax", "uvicorn.access"):
        logging.getLogger(name).setLevel(level)


def _say(text: str) -> None:
    print(f"gptoss-jax serve: {text}", file=sys.stderr, flush=True)
