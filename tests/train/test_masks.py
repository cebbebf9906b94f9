"""Which tokens are trained, letter by letter; and that every answer is trained behind the prompt that it is given."""

import dataclasses
import itertools

import openai_harmony as theirs
import pytest
from hypothesis import given

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import Assistant, Conversation, Developer, Function, System, ToolResult, User
from gptoss_jax.harmony.render import render, still_read
from gptoss_jax.train.examples import Example, example
from gptoss_jax.train.masks import LossWeights, conversation_pieces, message_weights, spans, text_pieces
from tests.harmony.conversations import conversations
from tests.harmony.test_render import KEEP_ALL, as_theirs, read_again

EVERYTHING = LossWeights(header=1.0)
Q, Q2 = User(text="q"), User(text="r")
THINK, THINK2 = Assistant(text="hm", channel="analysis"), Assistant(text="ah", channel="analysis")
FINAL, FINAL2 = Assistant(text="a"), Assistant(text="b")
WORDS = Assistant(text="wait", channel="commentary")
CALL = Assistant(text="{}", channel="commentary", recipient="functions.f", content_type="json")
RESULT = ToolResult(name="functions.f", text="42")
PYTHON = Assistant(text="1", channel="analysis", recipient="python", content_type="code")
PRINTED = ToolResult(name="python", text="1", channel="analysis")

USER = "<|start|>user<|message|>q<|end|>"
USER2 = "<|start|>user<|message|>r<|end|>"
HEAD = "<|start|>assistant<|channel|>"
CALLED = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>42<|end|>"


def examples_of(
    conversation: Conversation, tokenizer, *, loss: LossWeights | None = None, counts: list[float] | None = None
) -> list[Example]:
    loss = loss or LossWeights()
    weights = message_weights(conversation, counts or [1.0] * len(conversation), loss)
    return [
        example(conversation_pieces(conversation, span, weights, tokenizer=tokenizer, loss=loss), source="")
        for span in spans(conversation, weights)
    ]


def marked(found: Example, tokenizer) -> str:
    """The text that is read, and in it what is trained, as it is said: between [ and ], with a weight that is not 1."""
    pieces, begin = [], 0
    for weight, run in itertools.groupby(found.weights.tolist()):
        end = begin + len(list(run))
        ids = (found.targets if weight else found.ids)[begin:end]
        text = tokenizer.decode(ids.tolist())
        pieces.append(text if not weight else f"[{text}]" if weight == 1 else f"[{weight:g}|{text}]")
        begin = end
    return "".join(pieces)


CASES: dict[str, tuple[list, LossWeights, list[str]]] = {
    "answer": ([Q, FINAL], LossWeights(), [f"{USER}{HEAD}final<|message|>[a<|return|>]"]),
    "answer, with its header": (
        [Q, FINAL],
        EVERYTHING,
        [f"{USER}<|start|>assistant[<|channel|>final<|message|>a<|return|>]"],
    ),
    "reasoning": (
        [Q, THINK, FINAL],
        LossWeights(),
        [f"{USER}{HEAD}analysis<|message|>[hm<|end|>]{HEAD}final<|message|>[a<|return|>]"],
    ),
    "reasoning, with headers: the second <|start|> is the model's own": (
        [Q, THINK, FINAL],
        EVERYTHING,
        [
            f"{USER}<|start|>assistant[<|channel|>analysis<|message|>hm<|end|>"
            "<|start|>assistant<|channel|>final<|message|>a<|return|>]"
        ],
    ),
    "reasoning that is not trained has no trained end": (
        [Q, THINK, FINAL],
        LossWeights(analysis=0.0, header=1.0),
        [f"{USER}{HEAD}analysis<|message|>hm<|end|>[<|start|>assistant<|channel|>final<|message|>a<|return|>]"],
    ),
    "weights": (
        [Q, THINK, WORDS, CALL, RESULT, FINAL],
        LossWeights(analysis=0.5, commentary=2.0, call=3.0, header=0.5, stop=0.25),
        [
            f"{USER}<|start|>assistant[0.25|<|channel|>analysis<|message|>][0.5|hm][0.125|<|end|>]"
            "[<|start|>assistant<|channel|>commentary<|message|>][2|wait][0.5|<|end|>]"
            "[1.5|<|start|>assistant][3| to=functions.f][1.5|<|channel|>commentary <|constrain|>json<|message|>]"
            f"[3|{{}}][0.75|<|call|>]{CALLED}"
            "<|start|>assistant[0.5|<|channel|>final<|message|>][a][0.25|<|return|>]"
        ],
    ),
    "a call: the name is trained, the rest of its header is not": (
        [Q, THINK, CALL, RESULT, THINK2, FINAL],
        LossWeights(),
        [
            f"{USER}{HEAD}analysis<|message|>[hm<|end|>]"
            "<|start|>assistant[ to=functions.f]<|channel|>commentary <|constrain|>json<|message|>[{}<|call|>]"
            f"{CALLED}{HEAD}analysis<|message|>[ah<|end|>]{HEAD}final<|message|>[a<|return|>]"
        ],
    ),
    "two calls, with headers: behind <|call|> the model is asked again": (
        [Q, CALL, CALL, RESULT, RESULT, FINAL],
        EVERYTHING,
        [
            f"{USER}<|start|>assistant[ to=functions.f<|channel|>commentary <|constrain|>json<|message|>{{}}<|call|>]"
            "<|start|>assistant[ to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>]"
            f"{CALLED}{CALLED}<|start|>assistant[<|channel|>final<|message|>a<|return|>]"
        ],
    ),
    "calls alone": (
        [Q, THINK, CALL, RESULT, FINAL],
        LossWeights(analysis=0, commentary=0, final=0),
        [
            f"{USER}{HEAD}analysis<|message|>hm<|end|>"
            "<|start|>assistant[ to=functions.f]<|channel|>commentary <|constrain|>json<|message|>[{}<|call|>]"
        ],
    ),
    "python in analysis": (
        [Q, PYTHON, PRINTED, FINAL],
        LossWeights(),
        [
            f"{USER}<|start|>assistant[ to=python]<|channel|>analysis code<|message|>[1<|call|>]"
            f"<|start|>python to=assistant<|channel|>analysis<|message|>1<|end|>{HEAD}final<|message|>[a<|return|>]"
        ],
    ),
    "turns without reasoning: one example, and both answers end as they are said": (
        [Q, FINAL, Q2, FINAL2],
        LossWeights(),
        [
            f"{USER}{HEAD}final<|message|>[a<|return|>]{USER2}{HEAD}final<|message|>[b<|return|>]",
        ],
    ),
    "turns with reasoning: an example each, history as it is read": (
        [Q, THINK, FINAL, Q2, THINK2, FINAL2],
        LossWeights(),
        [
            f"{USER}{HEAD}analysis<|message|>[hm<|end|>]{HEAD}final<|message|>[a<|return|>]",
            f"{USER}{HEAD}final<|message|>a<|end|>{USER2}"
            f"{HEAD}analysis<|message|>[ah<|end|>]{HEAD}final<|message|>[b<|return|>]",
        ],
    ),
    "reasoning in the last turn alone: one example": (
        [Q, FINAL, Q2, THINK2, FINAL2],
        LossWeights(),
        [
            f"{USER}{HEAD}final<|message|>[a<|return|>]{USER2}"
            f"{HEAD}analysis<|message|>[ah<|end|>]{HEAD}final<|message|>[b<|return|>]"
        ],
    ),
    "a call in the first turn keeps its thought": (
        [Q, THINK, CALL, RESULT, FINAL, Q2, FINAL2],
        LossWeights(),
        [
            f"{USER}{HEAD}analysis<|message|>[hm<|end|>]"
            "<|start|>assistant[ to=functions.f]<|channel|>commentary <|constrain|>json<|message|>[{}<|call|>]"
            f"{CALLED}{HEAD}final<|message|>[a<|return|>]",
            f"{USER}<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{{}}<|call|>"
            f"{CALLED}{HEAD}final<|message|>a<|end|>{USER2}{HEAD}final<|message|>[b<|return|>]",
        ],
    ),
    "it ends in a call": (
        [Q, FINAL, Q2, CALL],
        LossWeights(),
        [
            f"{USER}{HEAD}final<|message|>[a<|return|>]{USER2}"
            "<|start|>assistant[ to=functions.f]<|channel|>commentary <|constrain|>json<|message|>[{}<|call|>]"
        ],
    ),
    "what nobody answers is left out": ([Q, FINAL, Q2], LossWeights(), [f"{USER}{HEAD}final<|message|>[a<|return|>]"]),
    "nothing is answered": ([Q], LossWeights(), []),
}


@pytest.mark.parametrize(("conversation", "loss", "expected"), CASES.values(), ids=CASES)
def test_what_is_trained(letters, conversation, loss, expected):
    assert [marked(found, letters) for found in examples_of(conversation, letters, loss=loss)] == expected


def test_a_message_that_weighs_0_is_read_alone(letters):
    found = examples_of([Q, FINAL, Q2, FINAL2], letters, counts=[0, 0, 0, 0.5])
    assert [marked(one, letters) for one in found] == [
        f"{USER}{HEAD}final<|message|>a<|end|>{USER2}{HEAD}final<|message|>[0.5|b<|return|>]"
    ]
    assert examples_of([Q, THINK, FINAL], letters, counts=[0.0, 0.0, 0.0]) == []


def test_text_that_looks_like_a_mark_is_text(letters):
    answer = Assistant(text="<|message|>x<|return|><|channel|>")
    (found,) = examples_of([Q, answer], letters)
    assert marked(found, letters) == f"{USER}{HEAD}final<|message|>[{answer.text}<|return|>]"
    assert found.trained == {"final": len(answer.text), "stop": 1}


def test_plain_text(letters):
    loss = LossWeights(text=2.0, stop=0.5)
    whole = example(text_pieces("", "ab", tokenizer=letters, loss=loss), source="")
    assert marked(whole, letters) == "<|startoftext|>[2|ab][<|endoftext|>]"
    end = example(text_pieces("ab", "cd", tokenizer=letters, loss=LossWeights()), source="")
    assert marked(end, letters) == "<|startoftext|>ab[cd<|endoftext|>]"


def test_a_system_message_speaks_of_functions_in_every_example(o200k):
    """The system message says where calls go if there are functions, which stand in another message."""
    conversation = [System(), Developer(functions=(Function(name="f"),)), Q, THINK, FINAL, Q2, THINK2, FINAL2]
    texts = [o200k.decode(found.ids.tolist()) for found in examples_of(conversation, o200k)]
    assert len(texts) == 2
    assert all("Calls to these tools must go to the commentary channel" in text for text in texts)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LossWeights)])
@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_a_number_from_0(field, weight):
    with pytest.raises(UserError, match=f"the loss weight of {field} is {weight}; expected a number from 0"):
        LossWeights(**{field: weight})


# --- openai-harmony ---------------------------------------------------------------------------------------------------


def as_their_conversation(messages: Conversation) -> theirs.Conversation:
    return theirs.Conversation.from_messages([as_theirs(message) for message in messages])


@given(conversations())
def test_the_ids_are_openai_harmonys(harmony, o200k, conversation):
    """Of history as it is read again, and behind it the rest with all analysis; for training, <|return|> at its end."""
    counts = [float(isinstance(message, Assistant)) for message in conversation]
    for span, found in zip(spans(conversation, counts), examples_of(conversation, o200k), strict=True):
        kept = as_their_conversation([*read_again(conversation[: span.begin]), *conversation[span.begin : span.end]])
        wanted = harmony.render_conversation_for_training(kept, KEEP_ALL)
        if getattr(conversation[span.end - 1], "recipient", None) is not None:
            wanted[-1] = o200k.special("<|call|>")  # theirs returns from a call in the channel final
        assert found.ids.tolist() == wanted


@given(conversations(max_turns=12))
def test_every_answer_is_trained_once_behind_the_prompt_that_it_is_given(harmony, o200k, conversation):
    counts = [float(isinstance(message, Assistant)) for message in conversation]
    start, trained = o200k.special("<|start|>"), []
    for span, found in zip(spans(conversation, counts), examples_of(conversation, o200k), strict=True):
        begins = [i for i, token_id in enumerate(found.ids.tolist()) if token_id == start]
        first = len(still_read(conversation[: span.begin]))
        for i in range(span.begin, span.end):
            if isinstance(conversation[i], Assistant):
                trained.append(i)
                prompt = harmony.render_conversation_for_completion(
                    as_their_conversation(read_again(conversation[:i])), theirs.Role.ASSISTANT, KEEP_ALL
                )
                begin = begins[first + i - span.begin]
                assert found.ids.tolist()[:begin] + prompt[-2:] == prompt
                assert found.weights[begin + 2 : _end(begins, begin, found)].any()
        assert not found.weights[: begins[first] + 2].any()
    assert trained == [i for i, message in enumerate(conversation) if isinstance(message, Assistant)]


def _end(begins: list[int], begin: int, found: Example) -> int:
    return min((other for other in begins if other > begin), default=len(found))


@given(conversations())
def test_what_is_said_differs_from_what_is_read_by_the_end_of_an_answer_alone(o200k, conversation):
    end, back = o200k.special("<|end|>"), o200k.special("<|return|>")
    for found in examples_of(conversation, o200k):
        differs = found.targets != found.ids
        assert set(found.ids[differs].tolist()) <= {end}
        assert set(found.targets[differs].tolist()) <= {back}
        assert render(conversation, o200k)[:1] == found.ids[:1].tolist()
