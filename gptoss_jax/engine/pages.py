"""The pages of one group: free, held or cached under the name of their content. Knows page ids; knows no sequence.

                    allocate                register                  release
          free ──────────────► held, nameless ─────────► held, named ──────────► idle (cached, nobody holds it)
            ▲                       │ release               ▲  retain                │
            └───────────────────────┴───────────────────────┴────────────────────────┘ allocate, when nothing is free

Idle pages are taken least recently used first.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


def root_key(adapter: int) -> bytes:
    """What stands before the first page of all sequences with this adapter: no page of one is another's."""
    return hashlib.blake2b(array("q", [adapter]).tobytes(), digest_size=16, person=b"adapter").digest()


def content_key(before: bytes, ids: Sequence[int]) -> bytes:
    """The name of a page with these ids after the page named `before`, or, of the first, after its root.

    It stands for all ids from the first on: 128 bits of BLAKE2b, so that nobody has to compare ids.
    """
    return hashlib.blake2b(before + array("q", ids).tobytes(), digest_size=16).digest()


class PagePool:
    """`num_pages` pages with reference counts, and a cache of those whose content has a name."""

    def __init__(self, num_pages: int):
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._cached: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Cached pages that nobody holds."""
        return len(self._idle)

    @property
    def num_held(self) -> int:
        """Pages that somebody holds."""
        return len(self._references) - self.available

    def allocate(self) -> int:
        """A page to write into, held once; `available` is to be asked before."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._references[page] = 1
        return page

    def retain(self, key: bytes) -> int:
        """The page with this content, which must be in the cache, with one more holder."""
        page = self._cached[key]
        if not self._references[page]:
            del self._idle[page]
        self._references[page] += 1
        return page

    def release(self, page: int) -> None:
        """One holder less; after the last one a page with a name is idle, and one without is free."""
        assert self._references[page] > 0, f"page {page} is released more often than it was held"
        self._references[page] -= 1
        if self._references[page]:
            return
        if self._keys[page] is None:
            self._free.append(page)
        else:
            self._idle[page] = None

    def register(self, page: int, key: bytes) -> None:
        """Names the content of a held page, which nobody writes into from now on.

        Where another page has this content already, that one keeps the name and this one stays nameless.
        """
        if self._cached.setdefault(key, page) == page:
            self._keys[page] = key

    def touch(self, key: bytes) -> None:
        """Counts the page with this content, which must be in the cache, as just used."""
        page = self._cached[key]
        if page in self._idle:
            self._idle.move_to_end(page)

    def __contains__(self, key: bytes) -> bool:
        return key in self._cached

    def forget(self) -> None:
        """Drops all names: what the pages hold is lost."""
        for page in self._cached.values():
            self._keys[page] = None
        self._cached.clear()
        self._free.extend(reversed(self._idle))
        self._idle.clear()

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None
        del self._cached[key]
        self._keys[page] = None

    def check(self, holders: Iterable[int]) -> None:
        """Asserts that the pages are held exactly as `holders` says, a page once for each time it is named there."""
        counted = Counter(holders)
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a page is free twice"
        for page, references in enumerate(self._references):
            assert references == counted[page], f"page {page} has {references} references and {counted[page]} holders"
            is_named = self._keys[page] is not None
            assert (page in free) == (not references and not is_named), f"page {page}: free or not?"
            assert (page in idle) == (not references and is_named), f"page {page}: idle or not?"
            assert references < 2 or is_named, f"page {page} has no name and {references} holders"
        named = {page: key for page, key in enumerate(self._keys) if key is not None}
        assert named == {page: key for key, page in self._cached.items()}, "names and pages disagree"
