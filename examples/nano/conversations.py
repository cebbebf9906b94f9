"""Draws the conversations that nano is trained on, and those for its score, from a seed. Knows no ids and no model.

python -m examples.nano.conversations FOLDER --number 100000 --seed 0
"""

import argparse
import dataclasses
import datetime
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from typing import get_args

from examples.nano.calls import call_lesson
from examples.nano.extraction import extraction_lesson
from examples.nano.lessons import Lesson, Maker, Setting, conversation, is_held_out
from examples.nano.lines import line_of
from examples.nano.measures import date_lesson, unit_lesson
from examples.nano.sums import sum_lesson
from examples.nano.talk import talk_lesson
from examples.nano.tokenizer import train_tokenizer
from examples.nano.words import Draws
from gptoss_jax.harmony.messages import Conversation, Effort


@dataclasses.dataclass(frozen=True)
class Mix:
    """What is drawn how often.

    Attributes:
        makers: of lessons.
        brief: the share of conversations with no more than the effort in their system message: half of the tokens of
            short ones.
    """

    makers: Mapping[Maker, int]
    brief: float


# Sums are learned before copying is, and then take the time of what is still to be learned.
FIRST = Mix(
    {sum_lesson: 46, unit_lesson: 4, date_lesson: 5, extraction_lesson: 16, call_lesson: 22, talk_lesson: 7}, brief=0.5
)
SECOND = Mix(
    {sum_lesson: 24, unit_lesson: 5, date_lesson: 6, extraction_lesson: 34, call_lesson: 27, talk_lesson: 4}, brief=0.7
)
_SHOWN_TO_TOKENIZER = 20_000
_FIRST_DAY, _LAST_DAY = datetime.date(2023, 1, 1), datetime.date(2032, 12, 31)
_INSTRUCTIONS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "Be brief.",
    "Answer in one sentence.",
    "You are nano, a helpful assistant.",
    "Help the user.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes first.jsonl, second.jsonl, evaluation.jsonl, tokenizer.json.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=int, default=100_000, help="conversations of each mix (default: %(default)s)")
    parser.add_argument("--evaluation", type=int, default=500, help="problems held out (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=1024, help="ids of the tokenizer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    _write(options.folder / "first.jsonl", islice(conversations(options.seed, FIRST), options.number))
    _write(options.folder / "second.jsonl", islice(conversations(options.seed + 2, SECOND), options.number))
    _write(options.folder / "evaluation.jsonl", islice(_evaluation(options.seed + 1), options.evaluation))
    shown = islice(conversations(options.seed, FIRST), _SHOWN_TO_TOKENIZER)
    train_tokenizer(shown, options.folder / "tokenizer.json", vocab_size=options.vocabulary)


def _write(path: Path, conversations: Iterable[Conversation]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{line_of(one)}\n" for one in conversations)


def _evaluation(seed: int) -> Iterator[Conversation]:
    """What is held out, of every kind in turn."""
    kinds = [held_out(seed, maker) for maker in FIRST.makers if maker is not talk_lesson]
    while True:
        for lessons in kinds:
            lesson, setting = next(lessons)
            yield conversation([lesson], setting)


def conversations(seed: int, mix: Mix) -> Iterator[Conversation]:
    """For training: without end, and without the problems that are held out."""
    rng = Random(seed)
    while True:
        setting = _random_setting(rng, brief=mix.brief)
        lessons = [_drawn(rng, setting, mix) for _ in range(rng.choices((1, 2, 4), (90, 7, 3))[0])]
        if any(lesson.formats for lesson in lessons[:-1]):  # a form would be the form of all answers
            lessons = lessons[-1:]
        yield conversation([*lessons[:-1], _with_instructions(rng, lessons[-1])], setting)


def held_out(seed: int, maker: Maker, *, of_known_words: bool = False) -> Iterator[tuple[Lesson, Setting]]:
    """For the score: without end, each problem once, and none that any training saw. The words may be known to be."""
    rng, seen = Draws(seed), set[str]()
    while True:
        rng.made_up.clear()
        setting = _random_setting(rng)
        lesson = maker(rng, setting)
        if lesson.problem is None or not is_held_out(lesson.problem) or lesson.problem in seen:
            continue
        if of_known_words and not rng.made_up.isdisjoint(re.findall(r"[a-z]+", lesson.problem.lower())):
            continue
        seen.add(lesson.problem)
        yield lesson, setting


def _drawn(rng: Random, setting: Setting, mix: Mix) -> Lesson:
    maker = rng.choices(tuple(mix.makers), tuple(mix.makers.values()))[0]
    while is_held_out((lesson := maker(rng, setting)).problem):
        pass
    return lesson


def _random_setting(rng: Random, *, brief: float = 0.0) -> Setting:
    """Efforts alike; chat tells the date, a server may leave it out; and a share of brief ones."""
    effort: Effort = rng.choice(get_args(Effort))
    days = (_LAST_DAY - _FIRST_DAY).days
    date = _FIRST_DAY + datetime.timedelta(days=rng.randrange(days)) if rng.random() < 0.75 else None
    if rng.random() < brief:
        return Setting(effort=effort, date=None, is_brief=True)
    return Setting(effort=effort, date=date)


def _with_instructions(rng: Random, lesson: Lesson) -> Lesson:
    """Some callers say what everybody says."""
    if rng.random() < 0.1:
        return dataclasses.replace(lesson, instructions=rng.choice(_INSTRUCTIONS))
    return lesson


if __name__ == "__main__":
    main()
