"""What whoever runs a server decides about it. Knows no engine and no request."""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import Effort
from gptoss_jax.tools.base import Tool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server behaves.

    Attributes:
        api_keys: a request has to bring one of them; none: anybody may ask.
        cors_origins: origins whose pages a browser lets read answers, as "https://example.org"; "*" for all.
        trusted_hosts: names that a Host header may have, without port; none: any. It stops pages that make a browser
            believe that their own name is this machine.
        max_body_bytes: of a request.
        store: where responses are kept: a SQLite file; "none" for nowhere; None for memory, until the server ends.
        tools: run on the server, for requests that ask for them.
        today: the date in the system message; None leaves the line out, and the same prompt is the same for ever.
        default_effort: of reasoning, where a request does not say.
        shutdown_s: seconds for what runs to finish; then it is ended.
        retry_after_s: what a client is told to wait when the queue is full or the model still loads.
        heartbeat_s: seconds without an event after which a stream sends a comment, so that nobody thinks it dead.
        max_new_tokens: the most of any answer, over all its rounds; None for what the context leaves.
        lenient_schemas: keywords of a JSON schema that cannot be enforced are ignored and not refused.
        page: whether there is a chat page at `/`.
    """

    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    trusted_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    store: Path | Literal["none"] | None = None
    tools: Sequence[Tool] = ()
    today: datetime.date | None = None
    default_effort: Effort = "medium"
    shutdown_s: float = 30.0
    retry_after_s: int = 1
    heartbeat_s: float = 15.0
    max_new_tokens: int | None = None
    lenient_schemas: bool = False
    page: bool = True

    def __post_init__(self) -> None:
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise UserError("an API key is empty or has a character that a header cannot; expected visible ASCII")
        positive = ("max_body_bytes", "retry_after_s", "heartbeat_s", "max_new_tokens")
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} is {value}; expected more than 0")
        if self.shutdown_s < 0:
            raise UserError(f"shutdown_s is {self.shutdown_s}; expected 0 or more")
