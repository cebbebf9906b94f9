"""The grammar of one assistant turn, behind `<|start|>assistant`. Knows headers; knows no tokenizer and no schema.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant to=functions.f<|channel|>commentary<|message|>{…}<|call|>
    └───────── header ───────────┘text                     └──────────────── header ──────────────────────┘body

A turn is any number of messages that end by <|end|>, then a final message that ends by <|return|>, or a call that ends
by <|call|>. One grammar says all of it, so that the matcher's state is the turn's only state.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from gptoss_jax.errors import UserError

SPECIALS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")

# A namespace and a function in it, or a tool alone: what may be called where nobody says who may. Readers of headers
# take a few hundred characters for one at most, and these names for people.
_ANYBODY = r"/[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64})?/"
_NOBODY = ("all", "assistant", "developer", "system", "user")
_RECIPIENT = re.compile(r"[A-Za-z0-9_.-]{1,160}")

# Terminals are in capitals. Text is any UTF-8 without special tokens. Only calls have a type: behind another channel
# OpenAI's reader takes such a word for a recipient.
_ASIDE = r"""
aside: <|channel|> ASIDE <|message|> TEXT
ASIDE: "analysis" | "commentary"
TEXT: /(?s:.*)/
"""
_TYPE = r"""
type: (" " | " "? <|constrain|>) TYPE
TYPE: "json" | "code"
"""


def turn_grammar(
    *,
    final: Mapping[str, Any] | None,
    calls: Mapping[str, Mapping[str, Any] | None],
    choice: Literal["auto", "none", "required"] | str,
    recipients: Collection[str] | None,
    parallel: bool,
) -> str:
    """A turn in the grammar library's JSON; see Grammars.turn. Bodies are entries of its list of grammars."""
    if choice not in ("auto", "none", "required"):
        recipients, choice = (choice,), "required"
    for name in (*calls, *(recipients or ())):
        if not _RECIPIENT.fullmatch(name):
            raise UserError(f"a recipient is {name!r}; expected at most 160 letters, digits, _, - or dots")
    bodies = {name: body for name, body in calls.items() if body is not None}
    known = None if recipients is None else (*dict.fromkeys(recipients),)
    if choice == "required" and known == ():
        raise UserError("a call is required and no recipient may be called; name at least one, or require none")
    rules = [_ASIDE]
    ways = [] if choice == "required" else ["final"]
    if choice != "none" and known != ():
        rules += _call_rules(bodies, known)
        ways.append('call (<|start|> "assistant" call)*' if parallel else "call")
    if choice != "required":
        body = "TEXT" if final is None else "@final"
        rules.append(f'final: <|channel|> "final" <|message|> {body} <|return|>')
    start = f'start: (aside <|end|> <|start|> "assistant")* ({" | ".join(ways)})'
    entries = [{"lark_grammar": "\n".join((start, *rules))}]
    entries += [{**body, "name": f"call_{i}"} for i, body in enumerate(bodies.values())]
    entries += [] if final is None else [{**final, "name": "final"}]
    return json.dumps({"grammars": entries})


def _call_rules(bodies: Mapping[str, Any], known: Collection[str] | None) -> list[str]:
    """`call`: with the grammar of its recipient, in the commentary channel; to others with any text, in any channel."""
    own = [(f"NAME_{i}", f"call_{i}", name) for i, name in enumerate(bodies) if known is None or name in known]
    rules = [f"{terminal}: {json.dumps(name)}" for terminal, _, name in own]
    ways = [_call(terminal, "COMMENTARY", f"@{body}") for terminal, body, _ in own]
    if known is None:
        rules.append(f"OTHER: {_ANYBODY} & ~({_one_of((*_NOBODY, *bodies))})")
    elif others := [name for name in known if name not in bodies]:
        rules.append(f"OTHER: {_one_of(others)}")
    if len(rules) > len(own):
        ways.append(_call("OTHER", "ASIDE", "TEXT"))
    return ["call: " + " | ".join(ways), 'COMMENTARY: "commentary"', *rules, _TYPE]


def _one_of(names: Collection[str]) -> str:
    return " | ".join(map(json.dumps, names))


def _call(name: str, channel: str, body: str) -> str:
    """The recipient stands before the channel, as messages are rendered, or behind it, as the model often writes."""
    end = f"type? <|message|> {body} <|call|>"
    return f'" to=" {name} <|channel|> {channel} {end} | <|channel|> {channel} " to=" {name} {end}'
