"""Which pages a sequence holds, in both groups, and which prefix of it is cached. Knows ids and pages; plans no step.

    window 5, pages of 4, 11 positions computed, the next query at 11 sees 7 .. 11 in a sliding layer

      page number      0         1         2
      position       0 1 2 3   4 5 6 7   8 9 10 _
      full           held      held      held
      sliding        released  held      held

A prefix of b whole pages is usable when all its full pages are cached and the sliding pages that a query at b * Z sees.
"""

from collections.abc import Iterable

from gptoss_jax.engine.limits import Limits
from gptoss_jax.engine.pages import PagePool, content_key, root_key
from gptoss_jax.engine.sequence import Sequence


class Ledger:
    """The pools of both groups, and the only one who touches a sequence's pages."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self.full = PagePool(limits.num_full_pages)
        self.sliding = PagePool(limits.num_sliding_pages)
        widths = [program.prefill_width for program in limits.programs if program.prefill_rows]
        self._alignment = widths[0] if limits.aligned_chunks else 1

    @property
    def available(self) -> int:
        """Page numbers by which sequences can grow: each takes a page of both groups."""
        return min(self.full.available, self.sliding.available)

    def missing(self, sequence: Sequence, *, end: int) -> int:
        """Page numbers that the sequence lacks to hold positions before `end`."""
        return self._limits.num_pages(end) - len(sequence.full_pages)

    def cached_pages(self, sequence: Sequence, *, end: int) -> int:
        """Leading whole pages that are usable from the cache, so that at least one position before `end` is left."""
        if sequence.prompt_logprobs is not None:  # what is not computed has no score
            return 0
        size, best, run = self._limits.page_size, 0, 0
        for number in range((end - 1) // size):
            key = self._key(sequence, number)
            if key not in self.full:
                break
            run = run + 1 if key in self.sliding else 0  # sliding pages cached in a row, up to this one
            stop = (number + 1) * size
            if run > number - self._limits.first_visible_page(stop) and not stop % self._alignment:
                best = number + 1
        return best

    def attach(self, sequence: Sequence, *, end: int) -> None:
        """Gives a sequence without pages those of its longest usable prefix, and counts them as computed."""
        number = self.cached_pages(sequence, end=end)
        sequence.computed = number * self._limits.page_size
        sequence.keyed = number
        sequence.first_sliding = first = self._limits.first_visible_page(sequence.computed)
        keys = sequence.keys[:number]
        sequence.full_pages = [self.full.retain(key) for key in keys]
        sequence.sliding_pages = [None] * first + [self.sliding.retain(key) for key in keys[first:]]

    def grow(self, sequence: Sequence, *, end: int) -> None:
        """Gives the pages that it lacks to hold positions before `end`; `available` is to be asked before."""
        for _ in range(self.missing(sequence, end=end)):
            sequence.full_pages.append(self.full.allocate())
            sequence.sliding_pages.append(self.sliding.allocate())

    def settle(self, sequence: Sequence) -> None:
        """After more was computed: names the pages that became whole, and lets go of those behind the window."""
        while (sequence.keyed + 1) * self._limits.page_size <= self._sharable(sequence):
            self._register(sequence, sequence.keyed)
            sequence.keyed += 1
        first = self._limits.first_visible_page(sequence.computed)
        self._release_sliding(sequence, range(sequence.first_sliding, first))
        sequence.first_sliding = first

    def release(self, sequence: Sequence) -> None:
        """Takes all pages away. The last ones are released first, so that no cached page outlives those before it."""
        for number in reversed(range(len(sequence.full_pages))):
            if number < sequence.keyed:
                # Where another's page has the name, that one was in use all the time; it may also be gone by now.
                self._register(sequence, number)
                self.full.touch(sequence.keys[number])
            self.full.release(sequence.full_pages[number])
        self._release_sliding(sequence, range(sequence.first_sliding, len(sequence.sliding_pages)))
        sequence.full_pages, sequence.sliding_pages = [], []
        sequence.computed = sequence.keyed = sequence.first_sliding = 0

    def forget(self) -> None:
        """Drops the cache: what the pages hold is lost."""
        self.full.forget()
        self.sliding.forget()

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Asserts that exactly these sequences hold pages, and each exactly those that its positions ask for."""
        holders = list(sequences)
        for sequence in holders:
            first = self._limits.first_visible_page(sequence.computed)
            assert len(sequence.full_pages) == len(sequence.sliding_pages) >= self._limits.num_pages(sequence.computed)
            held = [number for number, page in enumerate(sequence.sliding_pages) if page is not None]
            assert held == list(range(first, len(sequence.sliding_pages))), f"{sequence} holds {held}, not {first} on"
        self.full.check(page for sequence in holders for page in sequence.full_pages)
        self.sliding.check(page for sequence in holders for page in sequence.sliding_pages if page is not None)

    def _sharable(self, sequence: Sequence) -> int:
        """Positions, from the first on, whose pages may have a name."""
        if self._limits.aligned_chunks:  # generated ids were computed by another shape of step
            return min(sequence.computed, sequence.num_prompt)
        return sequence.computed

    def _register(self, sequence: Sequence, number: int) -> None:
        key = self._key(sequence, number)
        self.full.register(sequence.full_pages[number], key)
        page = sequence.sliding_pages[number]
        if page is not None:
            self.sliding.register(page, key)

    def _release_sliding(self, sequence: Sequence, numbers: range) -> None:
        for number in reversed(numbers):
            page = sequence.sliding_pages[number]
            assert page is not None
            self.sliding.release(page)
            sequence.sliding_pages[number] = None

    def _key(self, sequence: Sequence, number: int) -> bytes:
        """The name of a whole page; those before it are named first."""
        size, keys = self._limits.page_size, sequence.keys
        while len(keys) <= number:
            start = len(keys) * size
            before = keys[-1] if keys else root_key(sequence.adapter)
            keys.append(content_key(before, sequence.ids[start : start + size]))
        return keys[number]
