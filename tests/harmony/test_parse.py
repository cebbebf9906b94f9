"""The parser: what openai-harmony reads is read as there, and of what it loses or mislabels nothing is lost."""

import dataclasses
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.errors import UserError
from gptoss_jax.harmony import parse as module
from gptoss_jax.harmony.events import Delta, End, Fault, Header, Start
from gptoss_jax.harmony.messages import Assistant
from gptoss_jax.harmony.parse import LONGEST_HEADER, Parser, parse
from gptoss_jax.harmony.render import render
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer
from tests.hosts.processes import ROOT

SPECIAL = re.compile(r"(<\|\w+\|>)")
CALL = "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>x<|return|>"


@pytest.fixture(scope="module")
def tokenizer(letters) -> Tokenizer:
    """An id for each byte, and the special tokens."""
    return letters


def ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """Names of special tokens in `text` become those tokens."""
    pieces = [piece for piece in SPECIAL.split(text) if piece]
    return [i for p in pieces for i in ([tokenizer.special(p)] if SPECIAL.fullmatch(p) else tokenizer.encode(p))]


def events_of(ids, tokenizer: Tokenizer, *, index: int = 0):
    parser = Parser(tokenizer, index=index)
    return [event for token_id in ids for event in parser.push(token_id)] + parser.finish()


def ends(events):
    return [event for event in events if isinstance(event, End)]


def faults(events):
    return [(event.kind, event.text) for event in events if isinstance(event, Fault)]


def assert_well_formed(events, *, index: int = 0):
    """Start, Deltas, End, and again; indices go up; an End holds what its Start and Deltas said."""
    header, texts = None, []
    for event in events:
        match event:
            case Start():
                assert header is None
                assert event.index == index
                header, texts = event.header, []
            case Delta():
                assert header is not None
                assert event.index == index
                assert event.text
                texts.append(event.text)
            case End(message=message):
                assert header is not None
                assert event.index == index
                assert message.text == "".join(texts)
                assert Header(message.channel, message.recipient, message.content_type) == header
                header, index = None, index + 1
    assert header is None


def visible(events) -> str:
    """What is told of an answer beside its headers."""
    return "".join(event.text for event in events if isinstance(event, Delta | Fault))


# Well-formed answers


def test_an_answer_with_reasoning_and_a_call(tokenizer):
    events = events_of(ids_of("<|channel|>analysis<|message|>hm<|end|>" + CALL, tokenizer), tokenizer)
    call = Header("commentary", "functions.f", "json")
    assert events == [
        Start(0, Header("analysis")),
        Delta(0, "h"),
        Delta(0, "m"),
        End(0, Assistant(text="hm", channel="analysis"), "end"),
        Start(1, call),
        Delta(1, "{"),
        Delta(1, "}"),
        End(1, Assistant(text="{}", channel="commentary", recipient="functions.f", content_type="json"), "call"),
    ]


def test_indices_go_on_where_they_are_told_to(tokenizer):
    events = events_of(ids_of(FINAL.removeprefix("<|start|>assistant"), tokenizer), tokenizer, index=7)
    assert_well_formed(events, index=7)
    assert ends(events)[0].index == 7


def test_the_header_is_told_while_content_is_open(tokenizer):
    parser = Parser(tokenizer)
    told = []
    for token_id in ids_of("<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>", tokenizer):
        parser.push(token_id)
        told.append(parser.header)
    begin = len("final") + 2
    assert told[begin - 1 : begin + 2] == [Header("final"), Header("final"), None]
    assert set(told[: begin - 1] + told[begin + 1 :]) == {None}


def test_text_comes_at_the_boundaries_of_characters(tokenizer):
    parser = Parser(tokenizer)
    head = ids_of("<|channel|>final<|message|>", tokenizer)
    texts = [parser.push(token_id) for token_id in head + tokenizer.encode("é東")]
    assert texts[len(head) :] == [[], [Delta(0, "é")], [], [], [Delta(0, "東")]]


def test_a_cut_character_is_replaced_before_the_message_ends(tokenizer):
    ids = [*ids_of("<|channel|>final<|message|>a", tokenizer), *tokenizer.encode("東")[:2]]
    for last in ([], [tokenizer.special("<|return|>")]):
        assert parse(ids + last, tokenizer) == [Assistant(text="a\ufffd")]


HEADERS = {
    " to=functions.f<|channel|>commentary <|constrain|>json": Header("commentary", "functions.f", "json"),
    "<|channel|>commentary to=functions.f <|constrain|>json": Header("commentary", "functions.f", "json"),
    "<|channel|>commentary to=functions.f<|constrain|>json": Header("commentary", "functions.f", "json"),
    "<|channel|>commentary to=functions.f json": Header("commentary", "functions.f", "json"),
    "<|channel|>commentaryto=functions.f": Header("commentary", "functions.f"),
    "to=functions.f<|channel|>commentary": Header("commentary", "functions.f"),
    "<|channel|>analysis to=python code": Header("analysis", "python", "code"),
    "<|channel|>analysis to=browser.search": Header("analysis", "browser.search"),
    "<|channel|> final": Header("final"),
    "<|channel|>final ": Header("final"),
    "final": Header("final"),
    " assistant<|channel|>final": Header("final"),
    "": Header(),
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_in_any_order(tokenizer, header):
    events = events_of(ids_of(header + "<|message|>x<|end|>", tokenizer), tokenizer)
    assert events[:2] == [Start(0, HEADERS[header]), Delta(0, "x")]
    assert faults(events) == []


# What models write otherwise: (answer, [(channel, recipient, text, by)], [(fault, text)])

ODD = {
    "bare text": ("I refuse.<|return|>", [(None, None, "I refuse.", "return")], [("no header", "")]),
    "bare text, then a message": (
        "I refuse<|end|>" + FINAL,
        [(None, None, "I refuse", "end"), ("final", None, "x", "return")],
        [("no header", "")],
    ),
    "bare text that looks like a header": (
        "final analysis: to=x assistant, json<|return|>",
        [(None, None, "final analysis: to=x assistant, json", "return")],
        [("no header", "")],
    ),
    "bare text that could be one": ("analysis<|return|>", [(None, None, "analysis", "return")], [("no header", "")]),
    "nothing": ("", [], []),
    "nothing but an end": ("<|return|>", [(None, None, "", "return")], [("no header", "")]),
    "nothing but padding": ("<|endoftext|>", [], [("special token", "<|endoftext|>")]),
    "words in a header": (
        "<|channel|>analysis?? commentary<|message|>x<|end|>",
        [("analysis", None, "x", "end")],
        [("unknown word", "??"), ("unknown word", "commentary")],
    ),
    "an unknown channel": (
        "<|channel|>finally<|message|>x<|end|>",
        [(None, None, "x", "end")],
        [("unknown channel", "finally")],
    ),
    "no channel": ("<|channel|><|message|>x<|return|>", [(None, None, "x", "return")], [("unknown channel", "")]),
    "two channels": (
        "<|channel|>analysis<|channel|>final<|message|>x<|return|>",
        [("final", None, "x", "return")],
        [("twice", "analysis")],
    ),
    "two recipients": (
        " to=functions.f<|channel|>commentary to=functions.g<|message|>x<|call|>",
        [("commentary", "functions.g", "x", "call")],
        [("twice", "functions.f")],
    ),
    "a recipient that is no name": (
        "<|channel|>commentary to=functions.f(x)<|message|>x<|call|>",
        [("commentary", None, "x", "call")],
        [("unknown recipient", "to=functions.f(x)")],
    ),
    "words behind the content type": (
        "<|channel|>commentary to=functions.f <|constrain|>json or so<|message|>x<|call|>",
        [("commentary", "functions.f", "x", "call")],
        [("unknown word", "or"), ("unknown word", "so")],
    ),
    "start doubled": ("<|start|>" + FINAL, [("final", None, "x", "return")], [("special token", "<|start|>")] * 2),
    "another role": (
        "<|channel|>final<|message|>a<|end|><|start|>user<|message|>b<|end|>",
        [("final", None, "a", "end"), (None, None, "b", "end")],
        [("other role", "user")],
    ),
    "a tool's result of its own making": (
        "<|channel|>final<|message|>a<|end|><|start|>functions.f to=assistant<|channel|>commentary<|message|>b<|end|>",
        [("final", None, "a", "end"), ("commentary", None, "b", "end")],
        [("other role", "functions.f"), ("nobody called", "to=assistant")],
    ),
    "text between messages": (
        "<|channel|>analysis<|message|>a<|end|>oops" + FINAL,
        [("analysis", None, "a", "end"), (None, None, "oops", "end"), ("final", None, "x", "return")],
        [("no header", ""), ("no end", "")],
    ),
    "blanks between messages": (
        "<|channel|>analysis<|message|>a<|end|>\n" + FINAL,
        [("analysis", None, "a", "end"), ("final", None, "x", "return")],
        [("blanks", "\n")],
    ),
    "a second stop token": (
        "<|channel|>final<|message|>x<|return|><|return|>",
        [("final", None, "x", "return")],
        [("special token", "<|return|>")],
    ),
    "no start": (
        "<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>x<|return|>",
        [("analysis", None, "a", "end"), ("final", None, "x", "return")],
        [("no start", "")],
    ),
    "no end": (
        "<|channel|>analysis<|message|>a" + FINAL,
        [("analysis", None, "a", "end"), ("final", None, "x", "return")],
        [("no end", "")],
    ),
    "neither end nor start": (
        "<|channel|>analysis<|message|>a<|channel|>final<|message|>x<|return|>",
        [("analysis", None, "a", "end"), ("final", None, "x", "return")],
        [("no end", "")],
    ),
    "a channel token that begins nothing": (
        "<|channel|>analysis<|message|>a<|channel|> b<|message|>c<|return|>",
        [("analysis", None, "a bc", "return")],
        [("special token", "<|channel|>"), ("special token", "<|message|>")],
    ),
    "no message token": (
        "<|channel|>final Hello world<|return|>",
        [("final", None, "Hello world", "return")],
        [("no message", "")],
    ),
    "no message token, no blank": (
        "<|channel|>finalHello world<|return|>",
        [("final", None, "Hello world", "return")],
        [("no message", "")],
    ),
    "a call without message token": (
        ' to=functions.f<|channel|>commentary <|constrain|>json{"a":1}<|call|>',
        [("commentary", "functions.f", '{"a":1}', "call")],
        [("no message", "")],
    ),
    "a call without message token or channel is text": (
        " to=functions.f do it<|return|>",
        [(None, None, " to=functions.f do it", "return")],
        [("no header", "")],
    ),
    "no message token behind an unknown channel": (
        "<|channel|>finally Hello<|return|>",
        [(None, None, "finally Hello", "return")],
        [("no header", ""), ("special token", "<|channel|>")],
    ),
    "cut within a header": ("<|channel|>ana", [], [("cut header", "<|channel|>ana")]),
    "cut behind a header": ("<|channel|>final", [], [("cut header", "<|channel|>final")]),
    "cut within a recipient": (" to=functions.", [], [("cut header", " to=functions.")]),
    "cut within a role": (
        "<|channel|>analysis<|message|>a<|end|><|start|>assi",
        [("analysis", None, "a", "end")],
        [("cut header", "assi")],
    ),
    "cut within what may be text": ("to", [(None, None, "to", "cut")], [("no header", "")]),
    "cut within content": ("<|channel|>final<|message|>x", [("final", None, "x", "cut")], []),
    "padding ends a message": (
        "<|channel|>final<|message|>x<|endoftext|><|endoftext|>",
        [("final", None, "x", "cut")],
        [("special token", "<|endoftext|>")] * 2,
    ),
    "special tokens in content": (
        "<|channel|>final<|message|>a<|message|>b<|constrain|>c<|reserved_351|>d<|return|>",
        [("final", None, "abcd", "return")],
        [("special token", f"<|{name}|>") for name in ("message", "constrain", "reserved_351")],
    ),
    "special tokens in a header": (
        "<|channel|>final<|constrain|><|reserved_351|><|message|>x<|return|>",
        [("final", None, "x", "return")],
        [("special token", "<|constrain|>"), ("special token", "<|reserved_351|>")],
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_models_write_otherwise(tokenizer, case):
    answer, messages, expected = ODD[case]
    events = events_of(ids_of(answer, tokenizer), tokenizer)
    assert_well_formed(events)
    assert [(e.message.channel, e.message.recipient, e.message.text, e.by) for e in ends(events)] == messages
    assert faults(events) == expected


def test_names_of_special_tokens_in_text_are_text(tokenizer):
    ids = [*ids_of("<|channel|>final<|message|>", tokenizer), *tokenizer.encode("say <|end|>")]
    assert parse(ids, tokenizer) == [Assistant(text="say <|end|>")]


def test_an_id_outside_the_vocabulary_is_the_callers_mistake(tokenizer):
    with pytest.raises(UserError, match="token id 352: expected 0 to 351"):
        Parser(tokenizer).push(352)


# Bare text is told early, and what is held back is bounded


def test_bare_text_is_told_as_soon_as_it_is_no_header(tokenizer):
    parser = Parser(tokenizer)
    told = ["".join(e.text for e in parser.push(i) if isinstance(e, Delta)) for i in tokenizer.encode(" to be, yes")]
    assert told == ["", "", "", " to ", "b", "e", ",", " ", "y", "e", "s"]


def test_what_is_held_back_is_bounded(tokenizer):
    """Also in the header that begins like one and never ends, and within content."""
    junk = tokenizer.encode("y" * 3 * LONGEST_HEADER)
    for begin in ("<|channel|>", "<|channel|>final<|message|><|channel|>final to=", "a<|end|><|start|>to="):
        parser, told = Parser(tokenizer), 0
        for token_id in ids_of(begin, tokenizer):
            parser.push(token_id)
        for pushed, token_id in enumerate(junk, 1):
            told += sum(len(event.text) for event in parser.push(token_id) if isinstance(event, Delta))
            assert told >= pushed - LONGEST_HEADER


def test_an_ids_cost_does_not_grow_with_the_ids_before_it(tokenizer, monkeypatch):
    """Work is characters looked at for a header: within content none, in a header of any length a bounded number."""
    work = 0

    def counting(text, **kwargs):
        nonlocal work
        work += len(text)
        return words(text, **kwargs)

    words = module._words
    monkeypatch.setattr(module, "_words", counting)
    parser = Parser(tokenizer)
    for token_id in ids_of("<|channel|>final<|message|>", tokenizer):
        parser.push(token_id)
    work = 0
    for token_id in tokenizer.encode("to=functions.f final " * 500):
        parser.push(token_id)
    assert work == 0
    assert len(parser.push(tokenizer.special("<|end|>"))) == 1
    most = 0
    for token_id in ids_of(("<|start|>" + "to=x " * 100) * 20, tokenizer):
        work = 0
        parser.push(token_id)
        most = max(most, work)
    assert 0 < most <= 12 * (LONGEST_HEADER + 8)


# Streams of all kinds: nothing is lost, doubled or moved

WORDS = ("assistant", "user", "analysis", "commentary", "final", "json", "code", "to=", " to=functions.f", " ", "\n")
MARKS = ("start", "end", "message", "channel", "constrain", "return", "call", "endoftext", "reserved_351")
WELL_FORMED = (
    "<|channel|>analysis<|message|>",
    "<|start|>assistant<|channel|>final<|message|>",
    "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>",
    "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
)


def piece_of(choose: random.Random, number: int) -> str:
    """Of a stream: a mark, a word of headers, or a marked text that can stand nowhere but in content or a Fault."""
    kind = choose.random()
    if kind < 0.3:
        return f"<|{choose.choice(MARKS)}|>"
    if kind < 0.5:
        return choose.choice(WORDS)
    if kind < 0.65:
        return choose.choice(WELL_FORMED)
    return f"«{number}é»" if kind < 0.99 else "«" + str(number) + "x" * choose.randrange(300) + "é»"


def check_stream(choose: random.Random, tokenizer: Tokenizer) -> None:
    pieces = [piece_of(choose, number) for number in range(choose.randrange(16))]
    ids = ids_of("".join(pieces), tokenizer)
    events = events_of(ids, tokenizer)
    assert_well_formed(events)
    told = visible(events)
    assert re.findall("«.*?»", told) == [piece for piece in pieces if piece.startswith("«")]
    assert not any("<|" in event.text for event in events if isinstance(event, Delta))
    assert is_subsequence(told, tokenizer.decode(ids))


def check_bytes(choose: random.Random, tokenizer: Tokenizer) -> None:
    """Any ids: bytes that are no UTF-8, ids without a token, a well-formed answer with some of its ids changed."""
    ids = [choose.randrange(tokenizer.vocab_size) for _ in range(choose.randrange(24))]
    if choose.random() < 0.6:
        ids = ids_of("".join(choose.choices(WELL_FORMED, k=4)) + "é", tokenizer)
        for _ in range(choose.randrange(6)):
            place = choose.randrange(len(ids))
            change = choose.choice(("drop", "double", "swap", "any"))
            any_id = choose.randrange(tokenizer.vocab_size)
            other = choose.choice(ids)
            ids[place : place + 1] = {"drop": [], "double": ids[place : place + 1] * 2, "swap": [other]}.get(
                change, [any_id]
            )
            ids = ids or [any_id]
    events = events_of(ids, tokenizer)
    assert_well_formed(events)
    assert is_subsequence(visible(events), decoded(ids, tokenizer))


def is_subsequence(text: str, of: str) -> bool:
    rest = iter(of)
    return all(character in rest for character in text)


def decoded(ids, tokenizer: Tokenizer) -> str:
    """The text, in which a special token ends a character."""
    parts, run = [], []
    for token_id in ids:
        if name := tokenizer.name_of(token_id):
            parts += [tokenizer.decode(run), name]
            run = []
        else:
            run.append(token_id)
    return "".join([*parts, tokenizer.decode(run)])


@settings(max_examples=200)
@given(st.randoms(use_true_random=False))
def test_streams_of_marked_texts(tokenizer, choose):
    check_stream(choose, tokenizer)


def test_thousands_of_streams(tokenizer):
    for seed in range(500):
        check_stream(random.Random(seed), tokenizer)
        check_bytes(random.Random(seed), tokenizer)


@pytest.mark.slow
def test_a_hundred_thousand_streams(tmp_path):
    """In a process of its own, where nobody checks the annotations of each call: that takes eight times as long."""
    write_byte_tokenizer(tmp_path / "tokenizer.json", 352)
    program = "import sys; from tests.harmony.test_parse import play; play(sys.argv[1])"
    ended = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "50000 twice\n"), ended.stderr


def play(folder: str) -> None:
    """Streams of marked texts, and of any ids."""
    tokenizer = load_tokenizer(Path(folder))
    for seed in range(50_000):
        check_stream(random.Random(seed), tokenizer)
        check_bytes(random.Random(seed), tokenizer)
    print("50000 twice")


@given(st.randoms(use_true_random=False), st.lists(st.sampled_from(WELL_FORMED + WORDS + ("é", "東")), max_size=12))
def test_a_text_is_read_the_same_in_other_tokens(o200k, tokenizer, choose, pieces):
    """A byte, a word, or what a tokenizer makes of it: where ids are cut does not matter."""

    def told(ids, tokenizer):
        events = events_of(ids, tokenizer)
        return [(end.message, end.by) for end in ends(events)], faults(events)

    text = "".join(pieces)
    assert told(ids_of(text, o200k), o200k) == told(ids_of(text, tokenizer), tokenizer)


# There and back

ASSISTANTS = st.builds(
    Assistant,
    text=st.text(max_size=30),
    channel=st.sampled_from(("analysis", "commentary", "final")),
    recipient=st.none() | st.from_regex(r"functions\.[A-Za-z0-9_-]{1,64}|python|browser\.search", fullmatch=True),
    content_type=st.none() | st.sampled_from(("json", "code")),
)


@given(st.lists(ASSISTANTS, max_size=5))
def test_what_render_writes_is_read_again(tokenizer, messages):
    for message in messages:  # one at a time: the history rule leaves out old analysis
        ids = render([message], tokenizer)[1 + len("assistant") :]
        assert parse(ids, tokenizer) == [message]
    each = [token_id for message in messages for token_id in render([message], tokenizer)]
    events = events_of(each[1 + len("assistant") :], tokenizer)
    assert [end.message for end in ends(events)] == messages
    assert faults(events) == []


# The judge: openai-harmony, on the real ranks


# It takes a content type for a recipient where there is none.
CALLS_HAVE_TYPES = ASSISTANTS.map(lambda m: m if m.recipient else dataclasses.replace(m, content_type=None))


@given(st.lists(CALLS_HAVE_TYPES, min_size=1, max_size=4))
def test_well_formed_answers_are_read_as_openai_harmony_reads_them(o200k, harmony, messages):
    from openai_harmony import Author, Conversation, Message, Role

    given_to_judge = [
        Message.from_author_and_content(Author(role=Role.ASSISTANT), message.text).with_channel(message.channel)
        for message in messages
    ]
    for theirs, ours in zip(given_to_judge, messages, strict=True):
        theirs.recipient = ours.recipient
        theirs.content_type = f"<|constrain|>{ours.content_type}" if ours.content_type else None
    ids = harmony.render_conversation_for_training(Conversation.from_messages(given_to_judge))
    ids = ids[len(ids_of("<|start|>assistant", o200k)) :]
    read = harmony.parse_messages_from_completion_tokens(ids, Role.ASSISTANT)
    mine = parse(ids, o200k)
    assert [message.text for message in mine] == [message.content[0].text for message in read]
    assert [(message.channel, message.recipient) for message in mine] == [(m.channel, m.recipient) for m in read]
    assert [message.content_type for message in mine] == [
        m.content_type and m.content_type.removeprefix("<|constrain|>") for m in read
    ]
