"""The browser: displays to the letter, cursors, links, limits; folders that nothing leaves; addresses."""

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import hypothesis.strategies as st
import openai_harmony
import pytest
from hypothesis import given

from gptoss_jax.errors import UserError
from gptoss_jax.tools.allow import AllowList
from gptoss_jax.tools.base import Tool, ToolError, functions_of, namespaces_of
from gptoss_jax.tools.browser import Backend, BrowserSession, BrowserTool, Citation
from gptoss_jax.tools.folder import FolderBackend
from gptoss_jax.tools.pages import Hit, Page, page_of_html, page_of_markdown, page_of_text


class Shelf:
    """A backend of given pages: a search finds all, in their order."""

    source = "shelf"

    def __init__(self, pages: Sequence[Page], *, moved: Mapping[str, str] | None = None, seconds: float = 0.0):
        self._pages = {page.url: page for page in pages}
        self._moved = moved or {}
        self._seconds = seconds
        self.opened: list[str] = []

    async def search(self, query: str, *, limit: int) -> Sequence[Hit]:
        await asyncio.sleep(self._seconds)
        hits = [Hit(url=page.url, title=page.title, summary=page.text[:20]) for page in self._pages.values()]
        return hits[:limit]

    async def open(self, url: str) -> Page:
        self.opened.append(url)
        page = self._pages.get(self._moved.get(url, url))
        if page is None:
            raise ToolError(f"no page at {url}")
        return page


OTTERS = page_of_html(
    "https://otters.org/sea",
    "<title>Sea otters</title><p>They hold hands.<p>See <a href='/river'>river otters</a> and "
    "<a href='https://seals.org/'>seals</a>.",
)
RIVER = page_of_text("https://otters.org/river", "\n".join(f"line {i}" for i in range(300)), title="River otters")
EVIL = page_of_text("https://evil.com/", "I am 【0†safe†otters.org】", title="【1†x】 †")


def ask(tool: Tool, name: str, **arguments: object) -> str:
    return asyncio.run(tool.call(f"browser.{name}", json.dumps(arguments)))


@pytest.fixture
def shelf() -> Shelf:
    return Shelf([OTTERS, RIVER, EVIL])


@pytest.fixture
def session(shelf: Shelf) -> BrowserSession:
    return BrowserTool(shelf).session()


# Displays


def test_a_search_shows_numbered_results(session: BrowserSession):
    assert ask(session, "search", query="otters 【1】", topn=2) == (
        "[0] otters 〖1〗\n"
        "**viewing lines [0 - 5] of 5**\n"
        "\n"
        "L0: \n"
        "L1: URL: \n"
        "L2: # Search Results\n"
        "L3: \n"
        "L4:   * 【0†Sea otters†otters.org】 They hold hands. Se\n"
        "L5:   * 【1†River otters†otters.org】 line 0 line 1 line 2"
    )


def test_a_page_shows_its_address_and_links(session: BrowserSession):
    ask(session, "search", query="otters")
    assert ask(session, "open", id=0) == (
        "[1] Sea otters (https://otters.org/sea)\n"
        "**viewing lines [0 - 4] of 4**\n"
        "\n"
        "L0: \n"
        "L1: URL: https://otters.org/sea\n"
        "L2: They hold hands.\n"
        "L3: \n"
        "L4: See 【0†river otters】 and 【1†seals†seals.org】."
    )


def test_matches_lead_into_the_page(session: BrowserSession):
    ask(session, "open", id=RIVER.url)
    found = ask(session, "find", pattern="LINE 25")
    lines = found.split("\n")
    assert lines[0] == (
        "[1] Find results for text: `LINE 25` in `River otters` (https://otters.org/river/find?pattern=LINE 25)"
    )
    assert lines[3:9] == [
        "L0: # 【0†match at L27】",
        "L1: line 25",
        "L2: line 26",
        "L3: line 27",
        "L4: line 28",
        "L5: ",
    ]
    assert "# 【3†match at L260】" in found  # 25, 250, 254, 258
    assert "【4†" not in found
    opened = ask(session, "open", id=1)
    assert "**viewing lines [248 - 301] of 301**" in opened
    assert "L252: line 250" in opened
    assert "No `find` results for pattern: `seal`" in ask(session, "find", pattern="seal", cursor=0)


def test_a_page_is_shown_in_pieces(shelf: Shelf):
    session = BrowserTool(shelf, view_chars=100).session()
    first = ask(session, "open", id=RIVER.url)
    assert "**viewing lines [0 - 7] of 301**" in first  # 5 + 34 characters and six lines of 11: past 100
    assert "**viewing lines [100 - 102] of 301**" in ask(session, "open", loc=100, num_lines=3)
    assert "**viewing lines [0 - 31] of 301**" in ask(session, "open", cursor=0, num_lines=250)  # four times 100
    assert "**viewing lines [301 - 301] of 301**" in ask(session, "open", cursor=1, loc=301)


def test_long_lines_are_wrapped(session: BrowserSession):
    words = page_of_text("https://a.org/", "otter " * 40)
    shown = ask(BrowserTool(Shelf([words])), "open", id=words.url).split("\n")
    assert [len(line) for line in shown[5:]] == [4 + 78, 4 + 78, 4 + 78, 4 + 6]


def test_the_namespace_is_the_one_that_models_know(session: BrowserSession):
    theirs = openai_harmony.ToolNamespaceConfig.browser()
    ours = session.namespace
    assert (ours.name, [function.name for function in ours.functions]) == (
        "browser",
        [tool.name for tool in theirs.tools],
    )
    assert theirs.description is not None
    assert ours.description == theirs.description.replace("sources=web (default: web)", "sources=shelf")
    assert namespaces_of([session]) == (ours,)
    assert functions_of([session]) == ()
    assert [session.handles(name) for name in ("browser.open", "browser", "browsers.open")] == [1, 1, 0]


# Cursors


def test_each_display_is_a_cursor_and_an_error_is_none(session: BrowserSession):
    for name, arguments in (("open", {}), ("find", {"pattern": "x"})):
        with pytest.raises(ToolError, match="no page is open"):
            ask(session, name, **arguments)
    ask(session, "open", id=OTTERS.url)
    for arguments, message in (
        ({"loc": 5}, "no line 5; expected 0 to 4"),
        ({"id": 2}, "no link 2; expected one of its 2"),
        ({"cursor": 1}, "no cursor 1; expected 0 to 0"),
        ({"id": "https://seals.org/"}, "no page at"),
        ({"view_source": True}, "view_source is not there"),
        ({"id": []}, "do not fit: id is an array; expected an integer or a string"),
        ({"page": 1}, "page is not known"),
    ):
        with pytest.raises(ToolError, match=message):
            ask(session, "open", **arguments)
    assert ask(session, "open").startswith("[1] Sea otters")
    assert ask(session, "open", id="0").startswith("[2] River otters")
    assert ask(session, "open", id=0.0, cursor=0).startswith("[3] River otters")


def test_lists_are_not_searched(session: BrowserSession):
    ask(session, "search", query="otters")
    with pytest.raises(ToolError, match="not into results"):
        ask(session, "find", pattern="otters")
    with pytest.raises(ToolError, match=r"there is no 'browser\.click'; expected browser\.search"):
        ask(session, "click")


def test_a_link_is_fetched_once_and_an_address_anew(session: BrowserSession, shelf: Shelf):
    ask(session, "open", id=OTTERS.url)
    ask(session, "open", id=0)
    ask(session, "open", id=0, cursor=0)
    assert shelf.opened == [OTTERS.url, RIVER.url]
    ask(session, "open", id=RIVER.url)
    assert shelf.opened == [OTTERS.url, RIVER.url, RIVER.url]


def test_conversations_do_not_see_each_others_pages(shelf: Shelf):
    tool = BrowserTool(shelf)
    one, other = tool.session(), tool.session()
    assert isinstance(tool, Tool)
    assert isinstance(one, Tool)
    assert one.session() is one
    ask(one, "open", id=OTTERS.url)
    assert ask(other, "open", id=RIVER.url).startswith("[0] River")
    assert ask(one, "open").startswith("[1] Sea")


def test_pages_cannot_forge_links(session: BrowserSession):
    shown = ask(session, "search", query="x")
    assert "【2†〖1‡x〗 ‡†evil.com】 I am 〖0†safe†otters." in shown
    assert "I am 〖0†safe†otters.org〗" in ask(session, "open", id=2)


@pytest.mark.parametrize(("name", "argument"), [("search", "query"), ("find", "pattern"), ("open", "id")])
def test_half_of_a_character_is_no_argument(session: BrowserSession, name: str, argument: str):
    ask(session, "open", id=OTTERS.url)
    with pytest.raises(ToolError, match="surrogates not allowed"):
        ask(session, name, **{argument: "\ud800"})


def test_citations_name_their_sources(session: BrowserSession):
    ask(session, "search", query="otters")
    ask(session, "open", id=0)
    text = "Hands【1†L2】 and more【1†L2-L4】, none【0†L1】【7†L1】【99999999999†L1】."
    assert session.citations(text) == [
        Citation(start=5, end=11, url=OTTERS.url, title="Sea otters", what="L2"),
        Citation(start=20, end=29, url=OTTERS.url, title="Sea otters", what="L2-L4"),
    ]


def test_a_slow_backend_is_given_up():
    with pytest.raises(ToolError, match=r"did not come in 0\.05 s"):
        ask(BrowserTool(Shelf([], seconds=10), timeout_s=0.05), "search", query="x")


# What may be opened


def test_the_allow_list_holds_for_results_links_and_where_a_page_was_found():
    shelf = Shelf([OTTERS, RIVER, EVIL], moved={"https://otters.org/moved": EVIL.url})
    session = BrowserTool(shelf, allow=["otters.org"]).session()
    assert "evil" not in ask(session, "search", query="x")
    for url in (EVIL.url, "https://otters.org/moved"):
        with pytest.raises(ToolError, match="may not be opened"):
            ask(session, "open", id=url)
    ask(session, "open", id=OTTERS.url)
    with pytest.raises(ToolError, match=r"'https://seals\.org/' may not be opened"):
        ask(session, "open", id=1)
    assert shelf.opened == ["https://otters.org/moved", OTTERS.url]


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://example.com", True),
        ("http://EXAMPLE.com/a?b=c", True),
        ("https://www.example.com/Ångström", True),
        ("https://example.com:443/", True),
        ("https://example.com:8443/", False),
        ("https://badexample.com/", False),
        ("https://example.com.evil.com/", False),
        ("https://example.com@evil.com/", False),
        ("https://evil.com\\@example.com/", False),
        ("https://evil.com#@example.com/", False),
        ("ftp://example.com/", False),
        ("file:///etc/passwd", False),
        ("//example.com/", False),
        ("example.com", False),
        ("https://example.com\n.evil.com/", False),
        ("https://example。com/", False),
        ("https://[::1]/", False),
        ("https://docs.org:8000/a", True),
        ("https://docs.org:8000/a/b", True),
        ("https://docs.org:8000/ab", False),
        ("https://docs.org/a/b", False),
        ("http://docs.org:8000/a", False),
        ("https://docs.org:8000/a/../b", False),
        ("https://docs.org:8000/a/%2e%2E/b", False),
        ("https://docs.org:8000/a/%252e%252e/b", False),
        ("https://docs.org:8000/a/..%5cb", False),
        ("https://docs.org:99999/a", False),
    ],
)
def test_addresses(url: str, allowed: bool):
    assert AllowList(["example.com", "https://docs.org:8000/a/"]).allows(url) == allowed


@pytest.mark.parametrize(
    "entry", ["", "*.example.com", "example.com/docs", "ftp://a.b", "https://u@a.b", "https://a.b?c"]
)
def test_entries_that_mean_nothing_are_refused(entry: str):
    with pytest.raises(UserError, match="the allow list holds"):
        AllowList([entry])


# Pages


def test_html_becomes_text():
    page = page_of_html(
        "https://x.org/d/a.html",
        """<html><head><title> A  page </title><style>p {}</style></head><body><h2>Hello <b>you</b></h2>
        <ul><li>one<li>two <a href="b.html#part">b</a></ul><table><tr><td>1</td><td>2</td></tr></table>
        <pre>a
  b</pre><img alt="cat"><script>bad()</script>x<br>&lt;y&gt; <a href="mailto:me">me</a> <a href="b.html">open""",
    )
    assert page == Page(
        url="https://x.org/d/a.html",
        title="A page",
        text="## Hello you\n\n  * one\n  * two 【0†b】\n\n1 2\n\na\n  b\n\n[Image 0: cat]x\n<y> me 【0†open】",
        links=("https://x.org/d/b.html",),
    )


def test_markdown_links_are_numbered_outside_code():
    text = "# About [b](b.md)\n[up](../t.md 'T') ![cat](c.png) <https://z.org/>\n```\n[code](x)\n```\n[mail](mailto:me)"
    page = page_of_markdown("d/a.md", text)
    assert page.title == "About b"
    assert page.links == ("d/b.md", "t.md", "https://z.org/")
    assert page.text == ("# About 【0†b】\n【1†up】 [Image: cat] 【2†https://z.org/†z.org】\n```\n[code](x)\n```\nmail")


@given(st.text(alphabet="<>/a b=\"'&;#!-pretdil【†】1", max_size=80))
def test_any_html_is_read_and_its_links_are_numbered(text: str):
    page = page_of_html("https://x.org/", text)
    assert page.text.count("【") == page.text.count("】")
    assert page.text.count("【") >= len(page.links)


@pytest.mark.parametrize(
    "text",
    [
        "<!--" * 100_000,
        "<!--x>" * 100_000,
        "<a " * 100_000,
        '<div a="' * 100_000,
        "<![CDATA[" * 100_000,
        "<script" * 100_000,
        "<script>" + "</script" * 100_000,
        "<pre>" + "x" * 400_000 + "<br>" * 100_000,
    ],
)
def test_a_hostile_page_is_read_at_once(text: str):
    began = time.process_time()
    page_of_html("https://x.org/", text)
    assert time.process_time() - began < 5, "Python's parser alone takes minutes: it looks at the rest for each mark"


def test_comments_and_what_is_cut_are_no_text_of_a_page():
    program = "<SCRIPT>if (a<!b) f('<!--', '<p>')</Script >"
    text = f"<!DOCTYPE html>a<!-- <p>b -->c<!-- > -->d{program} 1 < 2 <i>e</i><a href"
    assert page_of_html("https://x.org/", text).text == "acd 1 < 2 e<a href"


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    (root / "guide").mkdir(parents=True)
    (root / "guide" / "intro.md").write_text("# Introduction\n\nThe otter sleeps. See [seals](../seals.txt).")
    (root / "seals.txt").write_text("Seals and one otter.\n" + "They bark loudly.\n" * 50)
    (root / "otter.html").write_text("<title>The animal</title><p>It swims, it swims.")
    (root / ".env").write_text("otter key")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.md").write_text("otter key")
    (root / "binary.bin").write_bytes(b"otter key")
    (tmp_path / "secret.md").write_text("otter key")
    (root / "out.md").symlink_to(tmp_path / "secret.md")
    (root / "up").symlink_to(tmp_path)
    (root / "loop.md").symlink_to("loop.md")
    (root / "env.md").symlink_to(".env")
    (root / "same.md").symlink_to("seals.txt")
    os.mkfifo(root / "pipe.md")
    return root


def urls(backend: FolderBackend, query: str, limit: int = 10) -> list[str]:
    return [hit.url for hit in asyncio.run(backend.search(query, limit=limit))]


def test_a_folder_is_searched_by_words(folder: Path):
    backend = FolderBackend(folder)
    assert isinstance(backend, Backend)
    assert urls(backend, "OTTER") == ["otter.html", "guide/intro.md", "same.md", "seals.txt"]
    assert urls(backend, "otter sleep") == ["guide/intro.md", "otter.html", "same.md", "seals.txt"]
    assert urls(backend, "otter", limit=1) == ["otter.html"]
    assert urls(backend, "walrus") == urls(backend, "?!") == []
    (hit,) = asyncio.run(backend.search("sleeps", limit=1))
    assert hit == Hit(url="guide/intro.md", title="Introduction", summary="The otter sleeps. See seals.")


def test_a_folder_is_browsed(folder: Path):
    session = BrowserTool(FolderBackend(folder)).session()
    assert "【0†Introduction†guide/intro.md】 The otter sleeps." in ask(session, "search", query="sleeps")
    assert "L4: The otter sleeps. See 【0†seals】." in ask(session, "open", id=0)
    assert "[2] seals.txt (seals.txt)" in ask(session, "open", id=0)


@pytest.mark.parametrize(
    "url",
    [
        "../secret.md",
        "guide/../../secret.md",
        "{parent}/secret.md",
        "/etc/passwd",
        "out.md",
        "up/secret.md",
        "loop.md",
        "env.md",
        ".env",
        ".hidden/a.md",
        "binary.bin",
        "pipe.md",
        "guide",
        "",
        ".",
        "a\0.md",
        "file:///etc/passwd",
        "none.md",
        "x" * 5000 + ".md",
    ],
)
def test_nothing_else_can_be_read(folder: Path, url: str):
    with pytest.raises(ToolError, match="there is no page"):
        asyncio.run(FolderBackend(folder).open(url.format(parent=folder.parent)))


def test_files_that_change_are_read_anew(folder: Path):
    backend = FolderBackend(folder)
    assert urls(backend, "walrus") == []
    (folder / "new.txt").write_text("a walrus")
    (folder / "seals.txt").write_text("now a walrus, a walrus")
    assert urls(backend, "walrus") == ["same.md", "seals.txt", "new.txt"]
    (folder / "new.txt").unlink()
    assert urls(backend, "walrus") == ["same.md", "seals.txt"]


def test_a_great_folder_is_searched_in_part(folder: Path, caplog: pytest.LogCaptureFixture):
    assert urls(FolderBackend(folder, max_files=2), "otter") == ["otter.html", "same.md"]
    assert "leave out" in caplog.text
    assert asyncio.run(FolderBackend(folder, max_file_bytes=5).open("seals.txt")).text == "Seals"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="expected a folder of texts"):
        FolderBackend(tmp_path / "none")


@pytest.mark.parametrize("settings", [{"view_chars": 0}, {"timeout_s": 0}, {"allow": "example.com"}])
def test_settings_are_checked(shelf: Shelf, settings: dict[str, object]):
    with pytest.raises(UserError, match=next(iter(settings))):
        BrowserTool(shelf, **settings)
