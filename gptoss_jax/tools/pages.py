"""Pages as a model reads them: text with numbered links. Knows HTML and Markdown; knows no network, no files.

    <a href="/b.html">more</a>   in https://x.org/a.html    ─►   【0†more】          links[0] = https://x.org/b.html
    <a href="https://y.org/">y</a>                          ─►   【1†y†y.org】       links[1] = https://y.org/

The signs 【 and 】 stand for nothing else: where a page has them itself, it gets 〖 and 〗.
"""

import dataclasses
import html.parser
import posixpath
import re
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

_SIGNS = str.maketrans({"【": "〖", "】": "〗", "\u200b": None, "\r": None, "\0": None})
_LINK = re.compile(r"【\d+†([^†】]*)(?:†[^†】]*)?】")
_MARKDOWN_LINK = re.compile(
    r"(!?)\[([^\[\]\n]*)\]\(\s*<?([^()<>\s]+)>?(?:\s+[\"'][^\"'\n]*[\"'])?\s*\)|<(https?://[^<>\s]+)>"
)
_FENCE = re.compile(r"\s*(```|~~~)")
_SCHEMES = ("http", "https", "")
# fmt: off
_BLOCKS = frozenset((
    "address", "article", "aside", "blockquote", "dd", "div", "dl", "dt", "fieldset", "figure", "footer", "form",
    "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "main", "nav", "ol", "p", "pre", "section", "table", "tr",
    "ul",
))
# fmt: on
_UNREAD = frozenset(("script", "style", "template", "noscript", "svg", "math"))
_HEADING = re.compile(r"h[1-6]")
_BLANKS = re.compile(r"\s+")
# Comments, programs and declarations, in which a mark is none.
_UNSEEN = re.compile(
    r"<!--.*?(?:-->|\Z) | <(script|style)\b.*?(?:</\1\b[^>]*>?|\Z) | <![^>]*>?", re.DOTALL | re.IGNORECASE | re.VERBOSE
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """What stands at an address.

    Attributes:
        text: a link in it is 【n†its text】 or 【n†its text†its domain】, where links[n] is its address.
    """

    url: str
    title: str
    text: str
    links: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hit:
    """What a search found: an address, and what to expect there."""

    url: str
    title: str
    summary: str = ""


def page_of_text(url: str, text: str, *, title: str = "") -> Page:
    """Plain text as it is."""
    return Page(url=url, title=title or url, text=without_signs(text))


def page_of_markdown(url: str, text: str, *, title: str = "") -> Page:
    """Markdown with its links numbered, those in blocks of code left alone; its first heading is the title."""
    links = _Links(url)
    lines, fenced, heading = [], False, ""
    for line in without_signs(text).split("\n"):
        fenced ^= _FENCE.match(line) is not None
        if not fenced:
            line = _MARKDOWN_LINK.sub(links.markdown, line)
            heading = heading or (without_links(line).lstrip("#").strip() if line.startswith("#") else "")
        lines.append(line)
    return Page(url=url, title=title or heading or url, text="\n".join(lines), links=links.urls)


def page_of_html(url: str, text: str, *, title: str = "") -> Page:
    """The text of an HTML document with its links numbered."""
    reader = _HtmlReader(_Links(url))
    # Python's parser looks for the end of each comment and tag anew: a page of 60 KB that ends none took it 30 s.
    whole, end, rest = _UNSEEN.sub("", without_signs(text)).rpartition(">")
    reader.feed(whole + end + rest.replace("<", "&lt;"))
    reader.close()
    lines = [line.rstrip() for line in "".join(reader.pieces).split("\n")]
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    found = _BLANKS.sub(" ", "".join(reader.title)).strip()
    return Page(url=url, title=title or found or url, text=body, links=reader.links.urls)


def domain_of(url: str) -> str:
    """The host of an address; an address without one is named whole."""
    try:
        return urlsplit(url).hostname or url
    except ValueError:
        return url


def without_signs(text: str) -> str:
    """Text of others, in which nothing looks like a link of ours."""
    return text.translate(_SIGNS)


def without_links(text: str) -> str:
    """Text with the words of its links in their place, as many lines as before."""
    return _LINK.sub(lambda link: link[1] + "\n" * (link[0].count("\n") - link[1].count("\n")), text)


class _Links:
    """The addresses that a page points to, each once."""

    def __init__(self, base: str):
        self._base = base
        self._numbers: dict[str, int] = {}

    @property
    def urls(self) -> tuple[str, ...]:
        """By their numbers."""
        return tuple(self._numbers)

    def mark(self, target: str, words: str) -> str:
        """The link as the model reads it; words alone, where there is nothing to follow."""
        words = _BLANKS.sub(" ", words).strip().replace("†", "‡")
        url = self._absolute(target)
        if url is None or not words:
            return words
        number = self._numbers.setdefault(url, len(self._numbers))
        elsewhere = domain_of(url) != domain_of(self._base) and "://" in url
        return f"【{number}†{words}{f'†{domain_of(url)}' if elsewhere else ''}】"

    def markdown(self, found: re.Match[str]) -> str:
        image, words, target, bare = found.groups()
        if image:
            return f"[Image: {words}]" if words else "[Image]"
        return self.mark(bare or target, bare or words)

    def _absolute(self, target: str) -> str | None:
        try:
            target, _ = urldefrag(target.strip())
            if not target or urlsplit(target).scheme not in _SCHEMES:
                return None
            if "://" in self._base or "://" in target:
                return urljoin(self._base, target)
        except ValueError:
            return None
        # Pages of a folder: their addresses are paths from its root, in plain letters.
        inside = posixpath.join("/", posixpath.dirname(self._base), unquote(target))
        return posixpath.normpath(inside).lstrip("/") or None


class _HtmlReader(html.parser.HTMLParser):
    """Collects the readable text of a document, in pieces."""

    def __init__(self, links: _Links):
        super().__init__(convert_charrefs=True)
        self.links = links
        self.pieces: list[str] = []
        self.title: list[str] = []
        self._unread = 0  # elements around this place that are not for reading
        self._in_title = False
        self._preformatted = 0
        self._link: tuple[str, list[str]] | None = None  # the open one: its target, its words
        self._images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._unread += tag in _UNREAD
        self._in_title = self._in_title or tag == "title"
        if tag in _BLOCKS or tag == "br":
            self._break(2 if tag in _BLOCKS and tag != "tr" else 1)
        self._preformatted += tag == "pre"
        match tag:
            case "a":
                self._close_link()
                self._link = (dict(attrs).get("href") or "", [])
            case "li":
                self._break(1)
                self._say("  * ")
            case "td" | "th":
                self._say(" ")
            case "img":
                named = dict(attrs).get("alt") or dict(attrs).get("title")
                self._say(f"[Image {self._images}{f': {named}' if named else ''}]")
                self._images += 1
        if _HEADING.fullmatch(tag):
            self._say("#" * int(tag[1]) + " ")

    def handle_endtag(self, tag: str) -> None:
        self._unread = max(0, self._unread - (tag in _UNREAD))
        self._in_title = self._in_title and tag not in ("title", "head")
        if tag == "a":
            self._close_link()
        if tag in _BLOCKS:
            self._break(1 if tag == "tr" else 2)
        self._preformatted = max(0, self._preformatted - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title.append(data)
        elif self._preformatted:
            self._say(data)
        else:
            self._say(_BLANKS.sub(" ", data))

    def close(self) -> None:
        super().close()
        self._close_link()

    def _say(self, text: str) -> None:
        if self._unread:
            return
        if self._link is not None:
            self._link[1].append(text)
        elif text != " " or self._ends_a_word():
            at_start = not self._preformatted and not text.startswith("  * ") and not self._ends_a_word()
            self.pieces.append(text.lstrip(" ") if at_start else text)

    def _ends_a_word(self) -> bool:
        return bool(self.pieces) and not self.pieces[-1].endswith(("\n", " "))

    def _break(self, lines: int) -> None:
        """So many line ends at least, before what comes."""
        if self._link is None and not self._unread and self.pieces:
            last = self.pieces[-1]
            there = len(last[-2:]) - len(last[-2:].rstrip("\n"))  # two are the most that are asked for
            self.pieces[-1] = last + "\n" * max(0, lines - there)

    def _close_link(self) -> None:
        if self._link is not None:
            target, words = self._link
            self._link = None
            self._say(self.links.mark(target, "".join(words)))
