"""Which addresses may be opened. Knows addresses; knows no network, no pages."""

from collections.abc import Sequence
from urllib.parse import SplitResult, unquote, urlsplit

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import is_name

_PORTS = {"http": 80, "https": 443}


class AllowList:
    """Domains and beginnings of addresses.

    "example.com"                    that host and those below it, by http or https at their usual ports
    "https://example.com/docs"       that address and those below it: /docs, /docs/a, not /docs2

    Raises:
        UserError: an entry that is neither.
    """

    def __init__(self, entries: Sequence[str]):
        self._hosts: list[str] = []
        self._prefixes: list[tuple[str, str, int | None, str]] = []
        for entry in entries:
            if "://" in entry:
                self._prefixes.append(self._prefix(entry))
            elif is_name(entry, dotted=True):
                self._hosts.append(entry.lower())
            else:
                raise UserError(
                    f"the allow list holds {entry!r}; expected a domain, as 'example.com', or the beginning of an "
                    "address, as 'https://example.com/docs'"
                )

    def allows(self, url: str) -> bool:
        """Whether the address is one of these. One that programs may read in two ways is none."""
        parts = _parts(url)
        if parts is None:
            return False
        host, port = parts.hostname or "", _port(parts)
        if port == _PORTS[parts.scheme] and any(host == one or host.endswith(f".{one}") for one in self._hosts):
            return True
        return any(
            (parts.scheme, host, port) == (scheme, its_host, its_port) and _is_below(parts.path, path)
            for scheme, its_host, its_port, path in self._prefixes
        )

    def _prefix(self, entry: str) -> tuple[str, str, int | None, str]:
        parts = _parts(entry)
        if parts is None or parts.query or parts.fragment:
            raise UserError(
                f"the allow list holds {entry!r}; expected the beginning of an http or https address without user, "
                "query or fragment"
            )
        return parts.scheme, parts.hostname or "", _port(parts), parts.path.rstrip("/")


def _parts(url: str) -> SplitResult | None:
    """The parts of an address that everybody splits in the same way; None for another."""
    if any(sign.isspace() or not sign.isprintable() or sign == "\\" for sign in url):
        return None
    try:
        parts = urlsplit(url)
        good = parts.scheme in _PORTS and bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        return None
    # Names of hosts in other letters than ASCII's stand for others, which who opens them works out.
    return parts if good and is_name(parts.hostname or "", dotted=True) else None


def _port(parts: SplitResult) -> int | None:
    return parts.port or _PORTS[parts.scheme]


def _is_below(path: str, top: str) -> bool:
    # A server may take a path that climbs, written plainly or with signs in numbers, out of the folder.
    plain = unquote(unquote(path))
    if ".." in plain.replace("\\", "/").split("/") or "\\" in plain:
        return False
    return path == top or path.startswith(f"{top}/")
