"""A folder of texts as a browser's backend. Knows files; knows no model, no network.

Addresses are paths from the folder, "guide/intro.md". What lies outside it, is hidden (".git", ".env") or is no text is
not there, however it is asked for.
"""

import dataclasses
import functools
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from gptoss_jax.errors import UserError
from gptoss_jax.tools.base import ToolError
from gptoss_jax.tools.pages import Hit, Page, page_of_html, page_of_markdown, page_of_text, without_links
from gptoss_jax.tools.thread import in_thread

_logger = logging.getLogger(__name__)

_READERS: Mapping[str, Callable[[str, str], Page]] = {
    ".txt": page_of_text,
    ".rst": page_of_text,
    ".md": page_of_markdown,
    ".markdown": page_of_markdown,
    ".html": page_of_html,
    ".htm": page_of_html,
}
_WORD = re.compile(r"\w+")
_MOST_WORDS = 32  # of a query
_SUMMARY_CHARS = 240
_K1, _B = 1.2, 0.75  # BM25's usual constants
_TITLE_WEIGHT = 2.0


@dataclasses.dataclass(frozen=True)
class _Document:
    """A file as it was when it was read."""

    page: Page
    stamp: tuple[int, int]  # its time and size
    folded: str  # its text, to search in
    folded_title: str


class FolderBackend:
    """Searches and opens the .txt, .rst, .md and .html files of a folder. Files that change are read anew.

    A search counts the query's words in each text, as parts of longer words too, and ranks by BM25; a title or a path
    that holds a word counts more.

    Args:
        path: the folder.
        max_files: more are left out of searches, in the order of their names, and a warning is logged.
        max_file_bytes: of a longer file only the beginning is read.
        max_total_bytes: of all files together, which are kept in memory, and once more in lower case to search in.

    Raises:
        UserError: no folder there.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_files: int = 5_000,
        max_file_bytes: int = 1 << 20,
        max_total_bytes: int = 64 << 20,
    ):
        self._root = Path(path).resolve()
        if not self._root.is_dir():
            raise UserError(f"the browser's folder is {str(path)!r}; expected a folder of texts")
        self._max_files = max_files
        self._max_file_bytes = max_file_bytes
        self._max_total_bytes = max_total_bytes
        self._documents: dict[str, _Document] = {}
        self._lock = threading.Lock()  # one search reads what changed, the others wait for it

    @property
    def source(self) -> str:
        """Files, not the web."""
        return "files"

    async def search(self, query: str, *, limit: int) -> Sequence[Hit]:
        """The files that hold most of the query's words, best first."""
        return await in_thread(functools.partial(self._search, query, limit))

    async def open(self, url: str) -> Page:
        """The text of a file.

        Raises:
            ToolError: there is no such file in the folder.
        """
        return await in_thread(functools.partial(self._open, url))

    def _search(self, query: str, limit: int) -> list[Hit]:
        words = list(dict.fromkeys(_WORD.findall(query.casefold())))[:_MOST_WORDS]
        with self._lock:
            self._documents = self._refreshed()
            documents = list(self._documents.values())
        scores = _scores(documents, words)
        best = sorted((i for i, score in enumerate(scores) if score > 0), key=lambda i: -scores[i])[:limit]
        return [_hit(documents[i], words) for i in best]

    def _open(self, url: str) -> Page:
        path = self._file(url)
        if path is None:
            raise ToolError(f"there is no page {url!r} in this folder; search for one")
        return self._read(path, self._url(path)).page

    def _refreshed(self) -> dict[str, _Document]:
        """All documents, those that did not change as they were."""
        documents: dict[str, _Document] = {}
        left = self._max_total_bytes
        for path in self._files():
            if len(documents) == self._max_files or left <= 0:
                _logger.warning(
                    "searches in %s leave out %s and what follows: they look at %d files and %d bytes at most",
                    self._root,
                    path,
                    self._max_files,
                    self._max_total_bytes,
                )
                break
            try:
                document = self._read(path, self._url(path))
            except ToolError:  # it went away
                continue
            documents[document.page.url] = document
            left -= len(document.folded)
        return documents

    def _files(self) -> Iterator[Path]:
        for folder, folders, names in os.walk(self._root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                is_text = path.suffix.lower() in _READERS and not name.startswith(".")
                if is_text and (self._file(self._url(path)) is not None if path.is_symlink() else path.is_file()):
                    yield path

    def _file(self, url: str) -> Path | None:
        """The file at an address, if it is in the folder, a text and not hidden; links are followed before that."""
        relative = PurePosixPath(url.partition("#")[0])
        if "\0" in url or relative.is_absolute() or ".." in relative.parts:
            return None
        try:
            path = (self._root / relative).resolve(strict=True)
            inside = path.relative_to(self._root)
            good = path.is_file() and path.suffix.lower() in _READERS
        except (OSError, ValueError, RuntimeError):  # not there, outside, a circle of links
            return None
        hidden = any(part.startswith(".") for part in (*relative.parts, *inside.parts))
        return path if good and not hidden else None

    def _url(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _read(self, path: Path, url: str) -> _Document:
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            known = self._documents.get(url)
            if known is not None and known.stamp == stamp:
                return known
            with path.open("rb") as file:
                data = file.read(self._max_file_bytes)
        except OSError as error:
            raise ToolError(f"the page {url!r} cannot be read ({error.strerror}); open another") from error
        page = _READERS[path.suffix.lower()](url, data.decode("utf-8", "replace"))
        return _Document(page, stamp, page.text.casefold(), f"{page.title} {url}".casefold())


def _scores(documents: Sequence[_Document], words: Sequence[str]) -> list[float]:
    """BM25 of each document, where a word's frequency is how often its letters stand in the text."""
    scores = [0.0] * len(documents)
    mean = sum(len(document.folded) for document in documents) / max(len(documents), 1) or 1.0
    for word in words:
        counts = [document.folded.count(word) for document in documents]
        having = sum(
            count > 0 or word in document.folded_title for count, document in zip(counts, documents, strict=True)
        )
        rarity = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
        for i, (count, document) in enumerate(zip(counts, documents, strict=True)):
            length = 1 - _B + _B * len(document.folded) / mean
            scores[i] += rarity * (count * (_K1 + 1) / (count + _K1 * length) if count else 0.0)
            scores[i] += rarity * _TITLE_WEIGHT * (word in document.folded_title)
    return scores


def _hit(document: _Document, words: Sequence[str]) -> Hit:
    """With the line that holds most of the words."""
    lines = without_links(document.page.text).split("\n")
    best = max(lines, key=lambda line: sum(word in line.casefold() for word in words)).strip()
    first = min((place for word in words if (place := best.casefold().find(word)) >= 0), default=0)
    start = max(0, first - _SUMMARY_CHARS // 4)
    return Hit(url=document.page.url, title=document.page.title, summary=best[start : start + _SUMMARY_CHARS])
