"""The chat page in Chromium: what is said, kept, sent and refused, and that no text of a model becomes a part of it."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("websockets", reason="the browser's protocol is spoken over websockets")
pytest.importorskip("uvicorn", reason="the page comes from the server")

import uvicorn

from gptoss_jax.server.page import policy
from tests.server.page_driver import (  # behind the skip: the driver cannot be imported without websockets
    PAGE,
    Reply,
    chromium,
    delta,
    ending,
    fake_server,
    find_chromium,
    refuses,
    says,
)

CHROMIUM = find_chromium()
HTML = PAGE.read_text(encoding="utf-8")
CALL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}
WEATHER = {"name": "weather", "description": "Now.", "parameters": {"type": "object", "properties": {}}}
LAST_ANSWER = ".message.assistant:last-child"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with chromium(CHROMIUM) as browser:
        yield browser


@pytest.fixture
def server():
    with fake_server(policy(HTML)) as server:
        yield server


@pytest.fixture(scope="module")
def tab(browser):
    with browser.page() as page:
        yield page


@pytest.fixture
def page(tab, server):
    """The page of a server at a port of its own: to a browser that is another site, with nothing stored yet."""
    tab.problems.clear()
    tab.resize(1200, 800)
    tab.media(prefers_color_scheme="light")
    tab.open(server.url)
    yield tab
    # A refused request is written into the log by the browser itself; anything else is a fault of the page.
    assert [line for line in tab.problems if not line.startswith("network:")] == []


@pytest.fixture(scope="module")
def paper(browser):
    """A page for what needs no server: one for all tests, since opening one takes longer than they do."""
    with fake_server(policy(HTML)) as server, browser.page() as page:
        page.open(server.url)
        yield page
        assert page.problems == []


def send(page, text: str) -> None:
    page.type(text, "#prompt")
    page.press("Enter")


def done(page) -> None:
    page.wait("runs.size === 0")


def ask(page, text: str) -> None:
    send(page, text)
    done(page)


def set_text(page, field: str, text: str) -> None:
    page.run("openSettings()")
    page.run(f"byId({json.dumps(field)}).value = ''")
    page.type(text, f"#{field}")
    page.press("Escape")
    page.wait("!byId('settings').open")


# The file


def test_the_page_asks_nobody_else_for_anything():
    assert re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"", HTML) == []
    assert re.findall(r"@import|url\(|import\s*\(|fetch\(\"http", HTML) == []


def test_the_page_parses_no_string_as_html_and_needs_no_inline_style():
    script = HTML.split("<script>")[1]
    parsers = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setHTML"
    assert re.findall(parsers, script) == []
    assert re.findall(r"<[a-z][^>]*\s(?:style|on[a-z]+)=", HTML.split("<script>")[0].split("</style>")[1]) == []


def test_the_file_is_small_and_its_policy_names_its_own_two_parts():
    assert len(HTML) < 128 * 1024
    assert len(HTML.splitlines()) < 2000
    assert policy(HTML).count("'sha256-") == 2


# Asking


def test_an_answer_is_streamed_with_its_reasoning_closed(page, server):
    server.replies.append(says("It is **four**.", reasoning="Two and two.", gap=0.02))
    send(page, "2+2?")
    page.wait("document.querySelector('.reasoning summary')?.innerText.startsWith('Thinking')")
    done(page)
    assert page.text(".bubble") == "2+2?"
    assert page.text(".answer") == "It is four."
    assert page.texts(".answer strong") == ["four"]
    assert page.text(".reasoning summary").startswith("Thought for")
    assert not page.run("document.querySelector('.reasoning').open")
    page.click(".reasoning summary")
    page.wait_text(".reasoning .text", "Two and two.")
    assert re.fullmatch(r"5 tokens · [\d.]+ tokens/s", page.text(".stats"))
    assert page.text("#context") == "131K left"
    assert page.run("byId('context').title") == "95 of 131,072 tokens of context are used"


def test_what_is_sent_is_the_conversation_and_its_settings(page, server):
    set_text(page, "developer", "Be brief.")
    for field, value in (("temperature", "0.5"), ("top_k", "40"), ("seed", "7"), ("max_completion_tokens", "99")):
        set_text(page, field, value)
    page.click("#effort label:last-of-type")
    ask(page, "One?")
    ask(page, "Two?")
    assert server.asked[-1] == {
        "model": "gpt-oss-20b",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Two?"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "reasoning_effort": "high",
        "temperature": 0.5,
        "top_k": 40,
        "seed": 7,
        "max_completion_tokens": 99,
    }


def test_a_setting_outside_its_range_is_marked_and_not_sent(page, server):
    set_text(page, "top_p", "7")
    page.run("openSettings()")
    page.run("takeSettings()")
    ask_with = page.run("requestOptions(shown.chat.settings)")
    assert "top_p" not in ask_with


def test_escape_stops_and_keeps_what_came(page, server):
    server.replies.append(says("word " * 400, gap=0.02))
    send(page, "Talk.")
    page.wait("document.querySelector('.answer')?.innerText.length > 20")
    page.press("Escape")
    done(page)
    assert page.text(".note") == "Stopped."
    assert page.text(".answer").startswith("word word")
    assert page.run("byId('stop').hidden")
    ask(page, "Go on.")
    assert server.asked[-1]["messages"][1]["content"].startswith("word word")
    page.wait_for(lambda: server.cut == 1)  # the server learns of it by the next piece that nobody takes


def test_the_stop_button_stops(page, server):
    server.replies.append(says("word " * 400, gap=0.02))
    send(page, "Talk.")
    page.wait("document.querySelector('.answer')?.innerText.length > 20")
    page.click("#stop")
    done(page)
    assert page.text(".note") == "Stopped."


def test_shift_enter_is_a_new_line(page, server):
    page.type("a", "#prompt")
    page.press("Enter", shift=True)
    assert page.run("runs.size + pathOf(shown.chat).length") == 0


# Versions


def test_answering_again_keeps_the_earlier_answer(page, server):
    server.replies += [says("First."), says("Second.")]
    ask(page, "Hello")
    page.click("[title='Answer again']")
    page.wait_text(".answer", "Second.")
    done(page)
    assert page.text(f"{LAST_ANSWER} .place") == "2/2"
    page.click("[title='Earlier version']")
    page.wait_text(".answer", "First.")
    assert server.asked[0]["messages"] == server.asked[1]["messages"]


def test_an_edited_message_begins_a_branch(page, server):
    server.replies += [says("One."), says("Two."), says("Three.")]
    ask(page, "a")
    ask(page, "b")
    page.run("viewOf(pathOf(shown.chat)[0]).edit()")
    page.type("c")
    page.press("Enter")
    page.wait_text(".answer", "Three.")
    done(page)
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "ac"}]
    assert page.texts(".bubble") == ["ac"]
    page.click(".message.user [title='Earlier version']")
    page.wait("document.querySelectorAll('.bubble').length === 2")
    assert page.texts(".answer") == ["One.", "Two."]


def test_a_chat_that_is_deleted_while_it_is_answered_stays_deleted(page, server):
    server.replies.append(says("word " * 400, gap=0.02))
    send(page, "Talk.")
    page.wait("document.querySelector('.answer')?.innerText.length > 20")
    page.run("removeChat(shown.chat)")
    done(page)
    page.run("new Promise((done) => setTimeout(done, 500))")
    page.open(server.url)
    assert page.text("#chat-list") == "No chats yet"


def test_a_failed_answer_makes_no_version(page, server):
    server.replies += [refuses(400, "no"), says("Fine.")]
    ask(page, "Hello")
    page.click(".note button")
    page.wait_text(".answer", "Fine.")
    assert page.texts(".place") == []


# Schemas and functions


def test_a_schema_is_sent_and_its_answer_shown_as_data(page, server):
    server.replies.append(says('{"n":4}'))
    set_text(page, "schema", '{"type": "object"}')
    ask(page, "Count.")
    form = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    assert server.asked[0]["response_format"] == {"type": "json_schema", "json_schema": form}
    assert page.text(".answer pre") == '{\n  "n": 4\n}'


WRONG = [("schema", '{"type":'), ("schema", "[1]"), ("functions", '[{"name": "a b"}]'), ("functions", "[7]")]


@pytest.mark.parametrize(("field", "text"), WRONG)
def test_a_text_that_is_no_schema_is_not_sent(page, server, field, text):
    set_text(page, field, text)
    send(page, "Count.")
    page.wait("byId('settings').open")
    assert page.run("document.activeElement.id") == field
    assert page.text(f"#{field}-wrong") != ""
    assert server.asked == []


def test_a_call_is_shown_and_its_result_sent(page, server):
    arguments = [delta(tool_calls=[{"index": 0, "function": {"arguments": part}}]) for part in ('{"city":', '"Oslo"}')]
    chunks = [delta(reasoning="Ask first."), delta(tool_calls=[CALL]), *arguments, *ending("tool_calls")]
    server.replies += [Reply(chunks=chunks), says("Cold.")]
    set_text(page, "functions", json.dumps([WEATHER]))
    ask(page, "Weather?")
    assert server.asked[0]["tools"] == [{"type": "function", "function": WEATHER}]
    assert page.text(".call h3").startswith("weather")
    assert page.text(".call pre") == '{\n  "city": "Oslo"\n}'
    page.type('{"celsius": -4}', ".call textarea")
    page.click(".call .solid")
    page.wait_text(".answer", "Cold.")
    done(page)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    assert server.asked[1]["messages"][1:] == [
        {"role": "assistant", "content": None, "reasoning": "Ask first.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"celsius": -4}'},
    ]


def test_a_call_that_nobody_answered_is_not_sent_back(page, server):
    server.replies.append(Reply(chunks=[delta(tool_calls=[CALL]), *ending("tool_calls")]))
    set_text(page, "functions", json.dumps([WEATHER]))
    ask(page, "Weather?")
    ask(page, "Never mind.")
    assert [message["role"] for message in server.asked[-1]["messages"]] == ["user", "user"]


# Failures


def test_a_model_that_loads_is_waited_for(page, server):
    server.loading = True
    send(page, "Hello")
    page.wait_text(".note", "The model is loading")
    server.loading = False
    page.wait_text(".answer", "Yes.")
    done(page)
    assert page.run("document.querySelector('.note').hidden")


def test_the_page_says_at_once_that_the_model_loads(browser, server):
    server.loading = True
    with browser.page() as page:
        page.open(server.url)
        page.wait_text("#banner", "The model is loading")
        server.loading = False
        page.wait("byId('banner').hidden && byId('model').textContent === 'gpt-oss-20b'")


def test_a_missing_key_is_asked_for_and_used(browser, server):
    server.key = "secret"
    with browser.page() as page:
        page.open(server.url)
        page.wait_text("#banner", "asks for an API key")
        send(page, "Hello")
        page.wait_text(".note", "asks for an API key")
        page.type("secret", "#banner input")
        page.click("#banner .solid")
        page.wait_text(".answer", "Yes.")
        assert page.run("sessionStorage.getItem('gptoss-jax.key')") == "secret"
        assert page.run("localStorage.getItem('gptoss-jax.key')") is None


def test_a_full_queue_is_tried_again_when_the_server_says(page, server):
    server.replies += [refuses(429, "the queue is full", retry_after="1"), says("Now.")]
    send(page, "Hello")
    page.wait_text(".note", "The server is busy. Trying again in 1 s")
    page.wait_text(".answer", "Now.")
    assert len(server.asked) == 2


def test_a_wait_can_be_stopped(page, server):
    server.replies.append(refuses(429, "the queue is full", retry_after="60"))
    send(page, "Hello")
    page.wait_text(".note", "Trying again in")
    page.press("Escape")
    done(page)
    assert page.text(".note") == "Stopped."


def test_a_refusal_is_shown_and_can_be_tried_again(page, server):
    server.replies += [refuses(400, "the schema has keywords that are not supported: not"), says("Fine.")]
    ask(page, "Hello")
    assert page.text(".note span") == "The schema has keywords that are not supported: not"
    page.click(".note button")
    page.wait_text(".answer", "Fine.")


def test_a_lost_connection_keeps_what_came(page, server):
    server.replies.append(Reply(chunks=[delta(content="The first half")], gap=0.1, whole=False))
    ask(page, "Hello")
    assert page.text(".answer") == "The first half"
    assert "What came is kept." in page.text(".note.bad")


def test_an_error_within_the_stream_is_shown(page, server):
    server.replies.append(Reply(chunks=[delta(content="Half"), {"error": {"message": "the engine was closed"}}]))
    ask(page, "Hello")
    assert page.text(".answer") == "Half"
    assert "The engine was closed. What came is kept." in page.text(".note.bad")


def test_an_answer_that_reasoning_used_up_says_so(page, server):
    server.replies.append(Reply(chunks=[delta(reasoning="Hm."), *ending("length")]))
    ask(page, "Hello")
    assert "The reasoning used all tokens" in page.text(".note")


# History


def test_chats_are_kept_found_renamed_and_deleted(page, server):
    ask(page, "Apples and pears")
    page.click("#new-chat")
    ask(page, "Oranges")
    page.wait("shelf.all().then((chats) => chats.length === 2 && chats.every((chat) => chat.nodes[1]?.end))")
    page.open(server.url)
    page.wait("document.querySelectorAll('.chat-row').length === 2")
    page.type("pear", "#search")
    assert page.texts(".chat-row .open") == ["Apples and pears"]
    page.click(".chat-row .open")
    assert page.text(".answer") == "Yes."
    page.run("document.querySelector('[aria-label^=Rename]').click()")
    page.type("Pear fruit")
    page.press("Enter")
    page.wait_text("#title", "Pear fruit")
    page.run("document.querySelector('[aria-label^=Delete]').click()")
    assert page.text("#chat-list") == "Nothing found"
    page.click("#toast button")
    assert page.texts(".chat-row .open") == ["Pear fruit"]


def test_a_chat_that_was_exported_is_imported_as_it_was(browser, server, page, tmp_path):
    ask(page, "Apples")
    exported = page.download("#export", tmp_path).read_text(encoding="utf-8")
    assert [chat["settings"]["effort"] for chat in json.loads(exported)["chats"]] == ["medium"]
    with browser.page() as other:
        other.resize(1200, 800)
        other.open(server.url)
        other.run(f"importChats({json.dumps(exported)})")
        other.click(".chat-row .open")
        assert (other.text(".bubble"), other.text(".answer")) == ("Apples", "Yes.")
        assert json.loads(exported)["chats"][0]["nodes"] == other.run("shown.chat.nodes")


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"format": "gptoss-jax-chats", "chats": 7}'])
def test_a_file_that_holds_no_chats_is_refused(paper, text):
    paper.run(f"importChats({json.dumps(text)})")
    assert "no file of chats" in paper.text("#toast")


def test_an_imported_file_is_taken_apart_by_types(page):
    nodes = [
        {"id": "a", "parent": None, "role": "user", "text": {"not": "text"}},
        {"id": "b", "parent": "a", "role": "assistant", "text": "<b>x</b>", "calls": 5, "end": 3, "tokens": "x"},
        {"id": "b", "parent": "b", "role": "user", "text": "its own parent"},
        {"id": "c", "parent": "nobody", "role": "user", "text": "an orphan"},
        {"id": "d", "parent": "b", "role": "owner", "text": "an unknown role"},
        None,
    ]
    chat = {"id": "x", "nodes": nodes, "leaf": "zzz", "settings": {"effort": "infinite", "sampling": {"seed": "NaN"}}}
    page.run(f"importChats({json.dumps(json.dumps({'format': 'gptoss-jax-chats', 'chats': [chat, 7, None]}))})")
    page.click(".chat-row .open")
    assert page.texts(".bubble") == [""]
    assert page.text(".answer") == "<b>x</b>"
    assert page.run("shown.chat.settings.effort") == "medium"


def test_a_tab_that_was_closed_leaves_what_had_come(page, server):
    server.replies.append(says("word " * 400, gap=0.02))
    send(page, "Talk.")
    page.wait("document.querySelector('.answer')?.innerText.length > 20")
    page.wait("shelf.one(shown.chat.id).then((chat) => Boolean(chat?.nodes.at(-1)?.text))")
    page.open(server.url)
    page.wait("document.querySelectorAll('.chat-row').length === 1")
    page.click(".chat-row .open")
    assert page.text(".answer").startswith("word")
    assert "The page was closed while this came" in page.text(".note")


def test_what_another_tab_does_to_a_chat_is_taken_over(page, server):
    ask(page, "Apples")
    page.wait("shelf.one(shown.chat.id).then((chat) => Boolean(chat?.nodes[1]?.end))")
    change = """(async (write) => {
      const chat = await shelf.one(shown.chat.id);
      await settled(write(shelf.table("readwrite"), chat));
      new BroadcastChannel("gptoss-jax").postMessage([chat.id]);
    })"""
    page.run(f"{change}((table, chat) => table.put({{ ...chat, title: 'Pears' }}))")
    page.wait_text("#title", "Pears")
    assert page.texts(".chat-row .open") == ["Pears"]
    page.run(f"{change}((table, chat) => table.delete(chat.id))")
    page.wait_text("#chat-list", "No chats yet")


# Keyboard, looks, sizes


def test_the_keyboard_reaches_everything(page, server):
    page.press("/", code="Slash", control=True)
    page.wait("byId('shortcuts').open")
    page.press("Escape")
    page.press(",", code="Comma", control=True)
    page.wait("byId('settings').open")
    page.press("Escape")
    page.press("k", code="KeyK", control=True)
    assert page.run("document.activeElement.id") == "search"
    page.press("b", code="KeyB", control=True)
    assert page.run("byId('side').offsetWidth") == 0
    page.run("byId('prompt').focus()")
    ask(page, "Hello")
    page.press("ArrowUp")
    assert page.run("document.activeElement.ariaLabel") == "Edit the message"
    page.press("O", code="KeyO", control=True, shift=True)
    assert page.run("pathOf(shown.chat).length") == 0


def test_dark_and_light_follow_the_system_or_the_choice(page):
    colour = "getComputedStyle(document.body).backgroundColor"
    page.media(prefers_color_scheme="light")
    light = page.run(colour)
    page.media(prefers_color_scheme="dark")
    assert page.run(colour) != light
    page.run("openSettings()")
    page.click("#theme label:nth-of-type(2)")
    assert page.run(colour) == light


def test_a_phone_shows_no_sideways_scrolling(browser, server):
    wide = "| a | b |\n|---|---|\n| " + "x" * 300 + " | y |\n\n```\n" + "z" * 300 + "\n```\n\n" + "w" * 300
    server.replies.append(says(wide, width=50))
    with browser.page() as page:
        page.resize(360, 700, phone=True)
        page.open(server.url)
        page.type("Hello " * 40, "#prompt")
        page.click("#send")
        page.wait_text(".answer", "www")
        done(page)
        assert page.run("document.documentElement.scrollWidth") == 360
        assert page.run("byId('log').scrollWidth <= byId('log').clientWidth")
        page.click("#open-side")
        page.click("#new-chat")
        assert page.run("byId('side').offsetWidth") == 0


NAMELESS = """[...document.querySelectorAll('button, input, select, textarea')].filter((node) =>
  !(node.ariaLabel || node.labels?.length || node.innerText?.trim() || node.title)).map((node) => node.outerHTML)"""


def test_every_control_has_a_name(page, server):
    ask(page, "Hello")
    page.run("openSettings()")
    assert page.run(NAMELESS) == []


CONTRAST = """((pairs) => {
  const box = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (name) => {
    box.fillStyle = getComputedStyle(byId("probe"))[name];
    box.fillRect(0, 0, 1, 1);
    const parts = [...box.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255);
    const linear = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  document.body.append(el("div", { id: "probe" }));
  return pairs.map(([front, back]) => {
    byId("probe").style.color = `var(--${front})`;
    byId("probe").style.backgroundColor = `var(--${back})`;
    const [less, more] = [light("color"), light("backgroundColor")].sort((a, b) => a - b);
    return [front, back, (more + 0.05) / (less + 0.05)];
  });
})"""
PAIRS = [("text", "bg"), ("muted", "bg"), ("muted", "side"), ("muted", "soft"), ("accent", "notice-bg")]
PAIRS += [("on-accent", "accent"), ("danger", "danger-bg"), ("accent", "bg")]
PAIRS += [(f"t-{kind}", "code") for kind in ("comment", "string", "number", "keyword", "name")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(paper, scheme):
    paper.media(prefers_color_scheme=scheme)
    weak = [row for row in paper.run(f"{CONTRAST}({json.dumps(PAIRS)})") if row[2] < 4.5]  # WCAG 2.2, level AA
    assert weak == []


# The server of this package


@contextlib.contextmanager
def serving(app) -> Iterator[str]:
    """An application on a port of its own, and its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def ids_of(tokenizer, text: str) -> list[int]:
    """Ids of a text in which special tokens stand by their names."""
    parts = re.split(r"(<\|\w+\|>)", text)
    ids = [[tokenizer.special(part)] if part.startswith("<|") else tokenizer.encode(part) for part in parts]
    return [each for some in ids for each in some]


SCRIPTS = [
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello, **you**.<|return|>",
    ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
    "<|channel|>final<|message|>Cold.<|return|>",
    "<|channel|>final<|message|>" + "word " * 500 + "<|return|>",
]


def test_the_page_and_the_server_understand_each_other(tab, app, scripted, tokenizer):
    engine = scripted([ids_of(tokenizer, text) for text in SCRIPTS], max_context=4000, seconds_per_token=0.002)
    application = app(None)
    with serving(application) as url:
        tab.problems.clear()
        tab.open(url)
        tab.wait_text("#banner", "The model is loading")
        send(tab, "Hi")
        application.state.service.open(engine)
        tab.wait_text(".answer", "Hello, you.")
        done(tab)
        assert tab.text("#model") == "scripted"
        tab.wait("byId('banner').hidden && byId('context').innerText.endsWith('left')")
        set_text(tab, "functions", json.dumps([WEATHER]))
        ask(tab, "Weather?")
        assert tab.text(".call pre") == '{\n  "city": "Oslo"\n}'
        tab.type("-4", ".call textarea")
        tab.click(".call .solid")
        tab.wait_text(".answer", "Cold.")
        done(tab)
        assert "-4" in tokenizer.decode(engine.requests[-1].prompt)
        send(tab, "Talk.")
        tab.wait_text(".answer", "word word")
        tab.press("Escape")
        done(tab)
        tab.wait_for(lambda: engine.num_open == 0)
        tab.run("shown.chat.settings.schema = JSON.stringify({ not: {} })")
        ask(tab, "JSON?")
        assert "keywords" in tab.text(".note.bad")
        assert [line for line in tab.problems if not line.startswith("network:")] == []


def test_the_server_takes_its_key_from_the_page(tab, app, scripted, tokenizer):
    engine = scripted([ids_of(tokenizer, SCRIPTS[2])])
    with serving(app(engine, api_keys=("secret",))) as url:
        tab.open(url)
        tab.wait_text("#banner", "asks for an API key")
        tab.type("wrong", "#banner input")
        tab.press("Enter")
        tab.wait_text("#banner", "does not accept this API key")
        tab.type("secret", "#banner input")
        tab.press("Enter")
        tab.wait("byId('banner').hidden")
        ask(tab, "Hi")
        assert tab.text(".answer") == "Cold."


# Markdown

HOSTILE = [
    "<script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 1'>",
    "[click](javascript:window.broken=1)",
    "[click](JaVaScRiPt:window.broken=1)",
    "[click](java\tscript:window.broken=1)",
    "[click](data:text/html,<script>window.broken=1</script>)",
    "[click](vbscript:x) [click](//evil.example) [click](/v1/models)",
    "![x](https://evil.example/pixel.png)",
    "<javascript:window.broken=1> <a href='javascript:window.broken=1'>x</a>",
    "```<script>\nwindow.broken = 1\n</script>\n```",
    "```html\n<script>window.broken = 1</script><style>*{display:none}</style>\n```",
    "| <img src=x onerror=window.broken=1> |\n|---|\n| <script>window.broken=1</script> |",
    "# <svg onload=window.broken=1>\n\n- <iframe src=javascript:window.broken=1>\n\n> <b>x</b>",
    "`<script>window.broken=1</script>` \\<img src=x onerror=window.broken=1\\>",
    '[<img src=x onerror=window.broken=1>](https://example.com/"onmouseover=window.broken=1)',
    'https://example.com/"onmouseover="window.broken=1',
]


def test_nothing_in_an_answer_becomes_a_part_of_the_page(page, server):
    text = "\n\n".join(HOSTILE)
    server.replies.append(says(text, reasoning=text, width=11))
    ask(page, HOSTILE[0])
    page.click(".reasoning summary")
    page.wait("document.querySelector('.reasoning .text').children.length > 5")
    page.run("new Promise((done) => setTimeout(done, 100))")
    assert page.run("window.broken") is None
    inside = "#messages :is(script, img, iframe, style, object, embed, form, base, link, meta, svg [onload])"
    assert page.texts(inside) == []
    hrefs = page.run("[...document.querySelectorAll('#messages a')].map((a) => [a.protocol, a.rel, a.target])")
    assert hrefs
    assert all(href == ["https:", "noopener noreferrer nofollow", "_blank"] for href in hrefs)
    handlers = "[...document.querySelectorAll('#messages *')].flatMap((node) => node.getAttributeNames())"
    assert [name for name in page.run(handlers) if name.startswith("on") or name in ("style", "src", "srcdoc")] == []
    assert "<script>window.broken = 1</script>" in page.text(".answer")


def test_hostile_names_of_tools_errors_and_languages_are_text(page, server):
    evil = "<img src=x onerror=window.broken=1>"
    call = {"index": 0, "id": evil, "function": {"name": evil, "arguments": evil}}
    server.replies += [Reply(chunks=[delta(tool_calls=[call]), *ending("tool_calls")]), refuses(400, evil)]
    ask(page, evil)
    assert page.text(".call pre") == evil
    ask(page, evil)
    assert evil in page.text(".note.bad")
    page.run("renderBlock(parseBlocks(['```__proto__', 'x', '```', ''])[0]).innerText")
    assert page.run("document.querySelectorAll('#messages img').length") == 0
    assert page.run("window.broken") is None


MARKDOWN = [
    ("**a** *b* ~~c~~ `d`", "<p><strong>a</strong> <em>b</em> <s>c</s> <code>d</code></p>"),
    ("***e*** **f *g* h**", "<p><strong><em>e</em></strong> <strong>f <em>g</em> h</strong></p>"),
    ("2 * 3 * 4, a_b_c, __init__", "<p>2 * 3 * 4, a_b_c, <strong>init</strong></p>"),
    ("`` a`b `` and ` unclosed", "<p><code>a`b</code> and ` unclosed</p>"),
    ("a\n\nb\nc  \nd", "<p>a</p><p>b\nc<br>d</p>"),
    ("## T ##\n---\ntext", "<h2>T</h2><hr><p>text</p>"),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    ("3. a\n\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
    ("- [ ] a\n- [x] b", '<ul><li class="task">☐ a</li><li class="task">☑ b</li></ul>'),
    ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    ("|a|b|\n|:-:|-:|\n|1|2 \\| 3|",
     '<div class="sheet"><table><thead><tr><th class="center">a</th><th class="end">b</th></tr></thead>'
     '<tbody><tr><td class="center">1</td><td class="end">2 | 3</td></tr></tbody></table></div>'),
    ("\\*a\\* \\(x_1*y\\)", '<p>*a* <span class="math">x_1*y</span></p>'),
    ("\\[\nx^2\n\\]\nend", '<span class="math own">x^2</span><p>end</p>'),
    ("[`a` https://b.example](https://c.example)", '<p><a href="https://c.example/" target="_blank" '
     'rel="noopener noreferrer nofollow"><code>a</code> https://b.example</a></p>'),
    ("a <b>c</b><br>d & e", "<p>a &lt;b&gt;c&lt;/b&gt;<br>d &amp; e</p>"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "html"), MARKDOWN, ids=[text[:12] for text, _ in MARKDOWN])
def test_markdown(paper, text, html):
    built = "(text) => el('div', {}, ...parseBlocks(text.split('\\n')).map(renderBlock)).innerHTML"
    found = paper.run(f"({built})({json.dumps(text)})")
    assert re.sub(r' class=""', "", found) == html


def test_a_growing_text_ends_as_the_whole_one(paper):
    text = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")[:9000]
    grow = """((text) => {
      const [piecewise, whole] = [new MarkdownView(el("div")), new MarkdownView(el("div"))];
      for (let end = 1; end <= text.length; end += 7) piecewise.update(text.slice(0, end));
      piecewise.update(text);
      whole.update(text);
      return [piecewise.root.innerHTML, whole.root.innerHTML];
    })"""
    piecewise, whole = paper.run(f"{grow}({json.dumps(text)})")
    assert piecewise == whole
    assert len(whole) > len(text)


PIECES = [
    "[",
    "*a ",
    "_a ",
    "`a",
    "![](",
    "> ",
    "- ",
    "|",
    "\\(",
    "<",
    "**",
    "http://",
    "a](",
    "  - ",
    "``",
    "\\",
    "\\[ ",
]


@pytest.mark.parametrize("piece", PIECES)
def test_a_hostile_text_takes_no_long_time(paper, piece):
    took = paper.run(f"""((text) => {{
      const before = performance.now();
      parseBlocks(text.split("\\n")).map(renderBlock);
      parseBlocks(text.replaceAll(" ", " \\n").split("\\n")).map(renderBlock);
      return performance.now() - before;
    }})({json.dumps(piece)}.repeat(6000))""")
    assert took < 2500  # milliseconds; a square of 6,000 steps of the renderer takes minutes


COLOURED = [
    ("python", 'def f(x):  # why\n    return "a" + 1', "kfcksn"),
    ("json", '{"a": "b", "c": [1, true]}', "fsfnn"),
    ("js", "const a = `x`; // y", "ksc"),
    ("html", '<a href="x">y</a><!-- z -->', "kfskkkc"),
    ("sql", "SELECT 1 -- x", "knc"),
    ("bash", 'if [ "$a" ]; then echo 1; fi # x', "ksknkc"),
    ("diff", "+a\n-b\n c", "sn"),
]


@pytest.mark.parametrize(("language", "code", "kinds"), COLOURED, ids=[language for language, _, _ in COLOURED])
def test_code_is_coloured_and_no_character_lost(paper, language, code, kinds):
    built = paper.run(f"""((code, language) => {{
      const node = el("code");
      colour(node, code, language);
      return [node.textContent, [...node.children].map((span) => span.className.at(-1)).join("")];
    }})({json.dumps(code)}, {json.dumps(language)})""")
    assert built == [code, kinds]


def test_a_block_of_code_is_copied(page, server):
    server.replies.append(says("```python\nprint(1)\n```"))
    ask(page, "Code?")
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click(".block .copy")
    page.wait("window.copied === 'print(1)'")
    page.wait_text(".block .copy", "Copied")
