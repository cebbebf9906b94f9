"""Chromium without a window, driven over its own protocol, and a small server for it to talk to. Knows no gptoss_jax.

The server answers as an OpenAI-compatible one does, by replies that a test lays ready; what it was asked it keeps.
"""

import base64
import contextlib
import dataclasses
import http.server
import itertools
import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import websockets.sync.client

PAGE = Path(__file__).parents[2] / "gptoss_jax" / "server" / "static" / "index.html"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
START_S = 60.0  # a cold browser on a busy machine


def find_chromium() -> str | None:
    """The browser's program, if one is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


# The server


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer to /v1/chat/completions.

    Attributes:
        chunks: what is streamed, each as a server-sent event.
        gap: seconds before each chunk, and before the end.
        whole: whether the stream ends as it should; otherwise the connection breaks off behind the chunks.
    """

    status: int = 200
    chunks: Sequence[Mapping[str, Any]] = ()
    error: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gap: float = 0.0
    whole: bool = True


def delta(**fields: Any) -> dict[str, Any]:
    """A chunk that adds to the answer."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def ending(reason: str = "stop", *, prompt: int = 90, answer: int = 12, reasoning: int = 0) -> list[dict[str, Any]]:
    """The last chunks: the reason, then the counts."""
    details = {"reasoning_tokens": reasoning}
    usage = {"prompt_tokens": prompt, "completion_tokens": answer, "completion_tokens_details": details}
    return [
        {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]},
        {"choices": [], "usage": usage | {"total_tokens": prompt + answer}},
    ]


def says(text: str, *, reasoning: str = "", gap: float = 0.0, width: int = 7) -> Reply:
    """An answer in pieces of `width` characters."""
    thoughts = [delta(reasoning=piece, reasoning_content=piece) for piece in _pieces(reasoning, width)]
    words = [delta(content=piece) for piece in _pieces(text, width)]
    end = ending(answer=len(thoughts) + len(words), reasoning=len(thoughts))
    return Reply(chunks=[*thoughts, *words, *end], gap=gap)


def refuses(status: int, message: str, **headers: str) -> Reply:
    """An error in OpenAI's envelope; `retry_after="1"` becomes the header Retry-After."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return Reply(status=status, error=error, headers={name.replace("_", "-"): text for name, text in headers.items()})


def _pieces(text: str, width: int) -> list[str]:
    return [text[at : at + width] for at in range(0, len(text), width)]


class FakeServer(http.server.ThreadingHTTPServer):
    """Serves the page and plays the replies, each once, in order.

    Attributes:
        policy: the Content-Security-Policy that comes with the page.
        loading: answers 503, as while a model loads.
        key: what a request must bring, if anything.
        asked: the bodies of all completions that were asked for.
        cut: how many streams their reader left early.
    """

    daemon_threads = True

    def __init__(self, policy: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.policy = policy
        self.replies: deque[Reply] = deque()
        self.asked: list[dict[str, Any]] = []
        self.loading = False
        self.key: str | None = None
        self.cut = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        if self.path == "/":
            policy = {"Content-Security-Policy": self.server.policy}
            self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8", policy)
        elif self.path == "/ready" and not self.server.loading:
            self._send(200, b"{}", "application/json")  # nobody is asked for a key
        elif self._may():
            model = {"id": "gpt-oss-20b", "object": "model", "max_context": 131072}
            self._send(200, json.dumps({"object": "list", "data": [model]}).encode(), "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._may():
            return
        self.server.asked.append(body)
        reply = self.server.replies.popleft() if self.server.replies else says("Yes.")
        if reply.error is not None:
            self._send(reply.status, json.dumps({"error": reply.error}).encode(), "application/json", reply.headers)
        else:
            self._stream(reply)

    def _may(self) -> bool:
        if self.server.key and self.headers.get("authorization") != f"Bearer {self.server.key}":
            self._send_error(401, "a key is needed")
        elif self.server.loading:
            self._send_error(503, "the model is loading", {"Retry-After": "0.2"})
        else:
            return True
        return False

    def _send(self, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, text in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def _send_error(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps({"error": {"message": message}}).encode(), "application/json", headers)

    def _stream(self, reply: Reply) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for chunk in reply.chunks:
                time.sleep(reply.gap)
                self._chunk(f"data: {json.dumps(chunk)}\n\n")
            time.sleep(reply.gap)
            if reply.whole:
                self._chunk("data: [DONE]\n\n")
                self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.server.cut += 1
        self.close_connection = True

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


@contextlib.contextmanager
def fake_server(policy: str) -> Iterator[FakeServer]:
    """Runs a server while the block runs."""
    server = FakeServer(policy)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# The browser


class PageError(Exception):
    """The page threw, or what was waited for did not come."""


class Connection:
    """Commands of the DevTools protocol to the browser or to one tab, one at a time."""

    def __init__(self, address: str) -> None:
        self._socket = websockets.sync.client.connect(address, max_size=64 << 20, open_timeout=START_S)
        self._numbers = itertools.count(1)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (message := json.loads(self._socket.recv(timeout=START_S))).get("id") != number:
            self.note(message)
        if "error" in message:
            raise PageError(f"{method}: {message['error']}")
        return message["result"]

    def note(self, event: Mapping[str, Any]) -> None:
        """Something happened in the browser."""

    def close(self) -> None:
        """Hangs up."""
        self._socket.close()


class Page(Connection):
    """One tab. Expressions run in the page; keys and clicks go through the browser's input, as a person's do.

    Attributes:
        problems: uncaught errors, and all that was logged as an error: what the page's policy refuses, too.
    """

    def __init__(self, address: str, *, context: str) -> None:
        super().__init__(address)
        self._context = context  # the profile that it is in
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def note(self, event: Mapping[str, Any]) -> None:
        """Keeps what went wrong."""
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(f"{params['entry']['source']}: {params['entry']['text']}")

    def run(self, expression: str) -> Any:
        """The value of an expression; a promise is waited for."""
        params = {"expression": expression, "returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", **params)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise PageError(f"{expression}: {details.get('exception', {}).get('description', details['text'])}")
        return answer["result"].get("value")

    def wait(self, expression: str, *, seconds: float = 20.0) -> Any:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(expression)):
            if time.monotonic() > end:
                told = f"problems: {self.problems}; page:\n{self.run('document.body.innerText')}"
                raise PageError(f"{expression} is {value!r} after {seconds} s; {told}")
            time.sleep(0.03)
        return value

    def wait_for(self, happened: Callable[[], bool], *, seconds: float = 20.0) -> None:
        """Waits for something outside the page."""
        end = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > end:
                raise PageError(f"what was waited for did not come in {seconds} s; problems: {self.problems}")
            time.sleep(0.03)

    def open(self, url: str) -> None:
        """Goes to an address and waits until the page has begun."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && typeof shelf === 'object' && shelf.db !== null")

    def texts(self, selector: str) -> list[str]:
        """The visible text of each element."""
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.innerText)")

    def text(self, selector: str) -> str:
        """The visible text of the last such element."""
        return self.texts(selector)[-1]

    def wait_text(self, selector: str, text: str) -> None:
        """Waits until the last such element shows a text."""
        chosen = f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)"
        self.wait(f"{chosen}?.innerText.includes({json.dumps(text)})")

    def click(self, selector: str) -> None:
        """Clicks the middle of the last such element, by the mouse: one that is covered or hidden is not hit."""
        chosen = f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)"
        self.wait(f"{chosen} !== undefined")
        where = f"""(() => {{
          const node = {chosen};
          node.scrollIntoView({{ block: "nearest" }});
          const box = node.getBoundingClientRect();
          const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
          const top = document.elementFromPoint(x, y);
          return {{ x, y, hit: top !== null && (node.contains(top) || top.contains(node)) }};
        }})()"""
        place = self.run(where)
        if not place["hit"]:
            raise PageError(f"{selector} is hidden or covered")
        at = {"x": place["x"], "y": place["y"], "button": "left", "clickCount": 1}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **at)

    def type(self, text: str, selector: str | None = None) -> None:
        """Types into an element, or where the cursor is."""
        if selector is not None:
            self.click(selector)
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, code: str = "", control: bool = False, shift: bool = False) -> None:
        """Presses a key, with Ctrl or Shift held."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 and not control else "")
        params = {"key": key, "code": code or key, "modifiers": 2 * control + 8 * shift}
        numbers = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "Tab": 9}
        if key in numbers:
            params["windowsVirtualKeyCode"] = numbers[key]
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **params)
        self.call("Input.dispatchKeyEvent", type="keyUp", **params)

    def resize(self, width: int, height: int, *, phone: bool = False, scale: float = 1.0) -> None:
        """The window's size in CSS pixels; a phone has touch."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def media(self, **features: str) -> None:
        """What the reader prefers: prefers_color_scheme="dark"."""
        chosen = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=chosen)

    def download(self, selector: str, folder: Path) -> Path:
        """Clicks what saves a file, and gives that file."""
        before = set(folder.iterdir())
        where = {"downloadPath": str(folder), "browserContextId": self._context}
        self.call("Browser.setDownloadBehavior", behavior="allow", **where)
        self.click(selector)
        end = time.monotonic() + START_S
        while not (files := {path for path in folder.iterdir() if path.suffix == ".json"} - before):
            if time.monotonic() > end:
                raise PageError(f"{selector} saved no file in {START_S} s")
            time.sleep(0.05)
        return files.pop()

    def screenshot(self, path: Path) -> None:
        """A PNG of the window."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def chromium(program: str) -> Iterator["Browser"]:
    """Runs a browser with a profile of its own."""
    with tempfile.TemporaryDirectory(prefix="page-test-", ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-extensions"]
        flags += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "--hide-scrollbars", "--lang=en"]
        process = subprocess.Popen(
            [program, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            browser = Browser(_address(Path(profile), process))
            yield browser
            browser.close()
        finally:
            process.terminate()
            process.wait(timeout=20)


def _address(profile: Path, process: subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ValueError):
            port, path = (profile / "DevToolsActivePort").read_text().split()
            return f"ws://127.0.0.1:{port}{path}"
        time.sleep(0.05)
    raise PageError(f"Chromium did not start in {START_S} s (exit status {process.poll()})")


class Browser:
    """Opens tabs; each has storage of its own."""

    def __init__(self, address: str) -> None:
        self._root = address.rsplit("/devtools/", 1)[0]
        self._control = Connection(address)

    @contextlib.contextmanager
    def page(self) -> Iterator[Page]:
        """A tab as of a new user."""
        context = self._control.call("Target.createBrowserContext")["browserContextId"]
        target = self._control.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        page = Page(f"{self._root}/devtools/page/{target}", context=context)
        try:
            yield page
        finally:
            page.close()
            self._control.call("Target.disposeBrowserContext", browserContextId=context)

    def close(self) -> None:
        """Hangs up; the browser goes on."""
        self._control.close()
