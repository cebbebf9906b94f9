"""The `browser` tool: search, open, find, as gpt-oss models learnt them. Knows pages; a backend knows where they are.

search("otters")        [0] otters                          each display is a cursor: [0], [1], …
                        **viewing lines [0 - 4] of 4**      a link is opened by the number in front of its †
                        …
                        L4:   * 【0†Sea otters†otters.org】 They hold hands.

open(id=0)              [1] Sea otters (https://otters.org/sea)
                        **viewing lines [0 - 40] of 310**
                        …
answer                  They sleep holding hands【1†L12-L14】.
"""

import asyncio
import dataclasses
import re
import textwrap
from collections.abc import Awaitable, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable
from urllib.parse import quote, unquote

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.builtin import BROWSER
from gptoss_jax.harmony.messages import Namespace
from gptoss_jax.tools.allow import AllowList
from gptoss_jax.tools.base import ToolError
from gptoss_jax.tools.functions import read_arguments
from gptoss_jax.tools.hints import Hint, hint_of
from gptoss_jax.tools.pages import Hit, Page, domain_of, without_links, without_signs
from gptoss_jax.tools.thread import in_thread

_Answer = TypeVar("_Answer")

_LINE = 80  # characters; what is longer is wrapped, so that line numbers mean little pieces
_MOST_RESULTS = 20
_MOST_MATCHES = 50
_MATCH_LINES = 4  # shown of each
_MOST_PAGE_CHARS = 1 << 20
_MOST_TITLE_CHARS = 1024
_CITATION = re.compile(r"【(\d+)†([^†】]+)(?:†[^†】]+)?】")


@runtime_checkable
class Backend(Protocol):
    """Where pages come from. It may be asked by many conversations at once.

    What it raises as ToolError is told to the model; for instance that there is no such page.
    """

    @property
    def source(self) -> str:
        """A word for it, "web" or "files", that the model is told."""
        ...

    async def search(self, query: str, *, limit: int) -> Sequence[Hit]:
        """What fits best, best first, at most `limit`."""
        ...

    async def open(self, url: str) -> Page:
        """The page at an address; its `url` is where it was found in the end."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Citation:
    """A place of an answer that names its source: text[start:end] is 【cursor†what】."""

    start: int
    end: int
    url: str
    title: str
    what: str


@dataclasses.dataclass(frozen=True)
class _Display:
    """A page as it was shown.

    Attributes:
        lines: of its text, wrapped.
        places: on which line of its target a link opens; only matches of `find` know one.
        is_list: of results or matches, not a page from the backend.
    """

    page: Page
    lines: tuple[str, ...]
    places: Mapping[int, int] = dataclasses.field(default_factory=dict)
    is_list: bool = False


@dataclasses.dataclass(frozen=True)
class _Search:
    query: str
    topn: int = 10
    top_n: int | None = None  # as the models sometimes write it
    source: str | None = None


@dataclasses.dataclass(frozen=True)
class _Open:
    id: int | str = -1
    cursor: int = -1
    loc: int = -1
    num_lines: int = -1
    view_source: bool = False
    source: str | None = None


@dataclasses.dataclass(frozen=True)
class _Find:
    pattern: str
    cursor: int = -1


_ARGUMENTS: Mapping[str, Hint] = {
    f"{BROWSER.name}.{name}": hint_of(arguments, place=name)
    for name, arguments in {"search": _Search, "open": _Open, "find": _Find}.items()
}


class BrowserTool:
    """Lets the model search and read what a backend has. Each turn has its own pages and cursors.

    A conversation whose later turns are to know the pages of earlier ones is given one `session()` as its tool.

    Args:
        allow: domains and beginnings of addresses (see AllowList); None for all that the backend opens. It holds for
            results, for what is opened, and for where a page was found in the end. A backend that follows redirects
            or looks at more than one address on its way must see to those itself.
        view_chars: how much is shown where the model does not ask for a number of lines; it gets four times that at
            most.
        timeout_s: for one answer of the backend.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        allow: Sequence[str] | None = None,
        view_chars: int = 4096,
        timeout_s: float = 30.0,
    ):
        if isinstance(allow, str):
            raise UserError(f"allow of the browser tool is {allow!r}; expected a list of domains and addresses")
        for name, value in (("view_chars", view_chars), ("timeout_s", timeout_s)):
            if not value > 0:
                raise UserError(f"{name} of the browser tool is {value}; expected more than 0")
        self._backend = backend
        self._allow = None if allow is None else AllowList(allow)
        self._view_chars = view_chars
        self._timeout_s = timeout_s

    @property
    def namespace(self) -> Namespace:
        """The words of the release, with the backend's source."""
        words, _, _ = BROWSER.description.partition("sources=")
        return dataclasses.replace(BROWSER, description=f"{words}sources={self._backend.source}")

    def handles(self, recipient: str) -> bool:
        """Whether the recipient is of this namespace; a function that it has not is answered by an error."""
        return recipient.partition(".")[0] == BROWSER.name

    def session(self) -> "BrowserSession":
        """No pages yet."""
        return BrowserSession(self, view_chars=self._view_chars)

    async def call(self, recipient: str, text: str) -> str:
        """A call without memory."""
        return await self.session().call(recipient, text)

    async def find_pages(self, query: str, *, limit: int) -> list[Hit]:
        """What the backend finds and the list allows.

        Raises:
            ToolError: the backend said so, or took too long.
        """
        hits = await self._in_time(self._backend.search(query, limit=limit), f"the search for {query!r}")
        return [hit for hit in hits if self._may_open(hit.url)][:limit]

    async def fetch(self, url: str) -> Page:
        """The page at an address, if the list allows it.

        Raises:
            ToolError: it does not; or the backend said so, or took too long.
        """
        self._check(url)
        page = await self._in_time(self._backend.open(url), f"the page {url!r}")
        self._check(page.url)
        return page

    def _check(self, url: str) -> None:
        if not self._may_open(url):
            raise ToolError(f"{url!r} may not be opened here; open a result of a search")

    def _may_open(self, url: str) -> bool:
        return self._allow is None or self._allow.allows(url)

    async def _in_time(self, answer: Awaitable[_Answer], what: str) -> _Answer:
        deadline = asyncio.timeout(self._timeout_s)
        try:
            async with deadline:
                return await answer
        except TimeoutError:
            if not deadline.expired():
                raise
            raise ToolError(f"{what} did not come in {self._timeout_s:g} s; try another") from None


class BrowserSession:
    """The browser of one conversation: what was shown so far, by cursor."""

    def __init__(self, tool: BrowserTool, *, view_chars: int):
        self._tool = tool
        self._view_chars = view_chars
        self._displays: list[_Display] = []

    @property
    def namespace(self) -> Namespace:
        """The tool's."""
        return self._tool.namespace

    def handles(self, recipient: str) -> bool:
        """As the tool does."""
        return self._tool.handles(recipient)

    def session(self) -> "BrowserSession":
        """Itself, so that it can serve several turns."""
        return self

    async def call(self, recipient: str, text: str) -> str:
        """Answers browser.search, browser.open or browser.find.

        Raises:
            ToolError: there is nothing to show; the cursors stay as they were.
        """
        if recipient not in _ARGUMENTS:
            raise ToolError(f"there is no {recipient!r}; expected {', '.join(_ARGUMENTS)}")
        match read_arguments(text, _ARGUMENTS[recipient], called=recipient):
            case _Search() as search:
                return await self._search(search)
            case _Open() as opening:
                return await self._open(opening)
            case find:
                return await self._find(find)

    def citations(self, text: str) -> list[Citation]:
        """The places of an answer that name a page which was shown, in their order."""
        found = []
        for match in _CITATION.finditer(text):
            cursor = int(match[1]) if len(match[1]) < 9 else len(self._displays)
            if cursor < len(self._displays) and (page := self._displays[cursor].page).url:
                start, end = match.span()
                found.append(Citation(start=start, end=end, url=page.url, title=page.title, what=match[2]))
        return found

    async def _search(self, search: _Search) -> str:
        limit = min(max(search.top_n or search.topn, 1), _MOST_RESULTS)
        hits = await self._tool.find_pages(search.query, limit=limit)
        found = "\n".join(f"  * {_result(i, hit)}" for i, hit in enumerate(hits)) or "Nothing was found."
        text = f"\nURL: \n# Search Results\n\n{found}"
        page = Page(url="", title=without_signs(search.query), text=text, links=tuple(hit.url for hit in hits))
        return self._show(await _display(page, is_list=True), at=0)

    async def _open(self, opening: _Open) -> str:
        if opening.view_source:
            raise ToolError("view_source is not there in this browser; open the page without it")
        target, place = opening.id, None
        if isinstance(target, str) and target.isascii() and target.isdigit() and len(target) < 9:
            target = int(target)  # no address is a number alone
        if isinstance(target, str):
            display = await self._fetched(target)
        elif target < 0:
            display = self._at(opening.cursor)
        else:
            display, place = await self._follow(self._at(opening.cursor), target)
        # A match stands a little below the top.
        start = opening.loc if opening.loc >= 0 else 0 if place is None else place - 4 if place > 4 else place
        return self._show(display, at=start, num_lines=opening.num_lines)

    async def _find(self, find: _Find) -> str:
        display = self._at(find.cursor)
        if display.is_list:
            raise ToolError("`find` looks into pages, not into results of a search or matches; open one first")
        if not find.pattern.strip():
            raise ToolError("the pattern is empty; give the words to look for")
        places = await in_thread(lambda: _matches(find.pattern, display.lines))
        lines = without_links("\n".join(display.lines)).split("\n")
        shown = [
            f"# 【{i}†match at L{place}】\n" + "\n".join(lines[place : place + _MATCH_LINES])
            for i, place in enumerate(places)
        ]
        pattern = without_signs(find.pattern)
        page = Page(
            url=f"{display.page.url}/find?pattern={quote(pattern)}",
            title=f"Find results for text: `{pattern}` in `{display.page.title}`",
            text="\n\n".join(shown) or f"No `find` results for pattern: `{pattern}`",
            links=(display.page.url,) * len(places),
        )
        return self._show(await _display(page, places=dict(enumerate(places)), is_list=True), at=0)

    async def _follow(self, display: _Display, link: int) -> tuple[_Display, int | None]:
        """What a link leads to, and the line there that it means."""
        if link >= len(display.page.links):
            raise ToolError(
                f"the page has no link {link}; expected one of its {len(display.page.links)}, or an address"
            )
        url = display.page.links[link]
        known = next((one for one in self._displays if one.page.url == url and not one.is_list), None)
        return known or await self._fetched(url), display.places.get(link)

    async def _fetched(self, url: str) -> _Display:
        page = await self._tool.fetch(url)
        text = page.text[:_MOST_PAGE_CHARS]
        return await _display(dataclasses.replace(page, text=f"\nURL: {page.url}\n{text}"))

    def _at(self, cursor: int) -> _Display:
        if not self._displays:
            raise ToolError("no page is open; search, or open an address")
        if cursor >= len(self._displays):
            raise ToolError(f"there is no cursor {cursor}; expected 0 to {len(self._displays) - 1}")
        return self._displays[max(cursor, -1)]

    def _show(self, display: _Display, *, at: int, num_lines: int = -1) -> str:
        """Some lines of a page, which becomes the newest cursor."""
        last = len(display.lines) - 1
        if at > last:
            raise ToolError(f"the page has no line {at}; expected 0 to {last}")
        chars = self._view_chars if num_lines <= 0 else 4 * self._view_chars
        shown: list[str] = []
        for number, line in enumerate(display.lines[at : at + num_lines if num_lines > 0 else None], start=at):
            shown.append(f"L{number}: {line}")
            chars -= len(shown[-1]) + 1
            if chars <= 0:
                break
        self._displays.append(display)
        cursor, page = len(self._displays) - 1, display.page
        address = f" ({unquote(page.url)[:_MOST_TITLE_CHARS]})" if page.url else ""
        viewing = f"**viewing lines [{at} - {at + len(shown) - 1}] of {last}**"
        return f"[{cursor}] {page.title[:_MOST_TITLE_CHARS]}{address}\n{viewing}\n\n" + "\n".join(shown)


async def _display(page: Page, *, places: Mapping[int, int] | None = None, is_list: bool = False) -> _Display:
    lines = await in_thread(lambda: _wrapped(page.text))
    return _Display(page, lines, places or {}, is_list)


def _wrapped(text: str) -> tuple[str, ...]:
    wrap = textwrap.TextWrapper(width=_LINE, replace_whitespace=False, drop_whitespace=False).wrap
    return tuple(piece for line in text.split("\n") for piece in (wrap(line) or [""]))


def _matches(pattern: str, lines: Sequence[str]) -> list[int]:
    """The lines where the pattern stands, whatever its case; not those that an earlier match shows already."""
    wanted = pattern.casefold()
    places: list[int] = []
    for number, line in enumerate(without_links("\n".join(lines)).split("\n")):
        if wanted in line.casefold() and (not places or number >= places[-1] + _MATCH_LINES):
            places.append(number)
            if len(places) == _MOST_MATCHES:
                break
    return places


def _result(number: int, hit: Hit) -> str:
    title = " ".join(without_signs(hit.title or hit.url).replace("†", "‡").split())
    summary = " ".join(without_signs(without_links(hit.summary)).split())
    return f"【{number}†{title}†{domain_of(hit.url)}】 {summary}".rstrip()
