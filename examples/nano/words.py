"""Names and things that conversations are about, and made-up words. Knows text alone."""

from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Anna Ben Carla David Emma Felix Greta Hugo Ida Jonas Karin Leo Maria Nils Olga Paul Rosa Sam Tina Uwe Vera Will "
    "Yara Zoe Amir Bella Chen Dora Elias Fatima Gina Hassan Ines Juan Kenji Lucia Mira Noah Omar Priya Ravi Sara "
    "Tomas Wei Zara Ali Eva Max Lena Tom"
)
LAST_NAMES = _words(
    "Silva Meyer Smith Jones Garcia Rossi Novak Khan Lee Kim Tanaka Costa Berg Lund Weber Moreau Singh Ortiz Brown "
    "Kowalski Haas Petrov Nagy Diaz Fischer Olsen"
)
CITIES = _words(
    "Lima Oslo Paris Rome Berlin Madrid Cairo Tokyo Delhi Boston Vienna Prague Dublin Athens Lagos Quito Seoul Hanoi "
    "Zurich Porto Turin Bern Graz Milan Lyon Osaka Denver Austin Perth Accra Tunis Riga Vilnius Helsinki Warsaw London "
    "Munich Chicago Toronto Sydney"
)
THINGS = _words(
    "apples books pens stamps coins cards shells eggs bottles lamps chairs shoes tickets oranges cups plates balls "
    "stones flowers boxes keys hats toys cakes"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = _words("January February March April May June July August September October November December")
_ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "st", "tr", "sh", "ch")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ee", "ou")
_CODAS = ("", "", "", "n", "r", "s", "l", "m", "t", "ck")


class Draws(Random):
    """Remembers the words that were made up with it."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.made_up: set[str] = set()


def made_up(rng: Random) -> str:
    """A word that nobody knows: what is copied must not have to be known."""
    word = "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((1, 2, 2, 3)))
    )
    if isinstance(rng, Draws):
        rng.made_up.add(word)
    return word


def first_name(rng: Random) -> str:
    return made_up(rng).capitalize() if rng.random() < 0.15 else rng.choice(FIRST_NAMES)


def person(rng: Random) -> str:
    if rng.random() < 0.5:
        return first_name(rng)
    last = made_up(rng).capitalize() if rng.random() < 0.2 else rng.choice(LAST_NAMES)
    return f"{first_name(rng)} {last}"


def city(rng: Random) -> str:
    return made_up(rng).capitalize() if rng.random() < 0.2 else rng.choice(CITIES)


def thing(rng: Random) -> str:
    return made_up(rng) if rng.random() < 0.15 else rng.choice(THINGS)
