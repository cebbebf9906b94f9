"""A conversation as ids: the harmony format written. Knows the layout; runs no model and reads none of its answers.

<|start|>{role}[:{name}][ to={recipient}][<|channel|>{channel}][ <|constrain|>{type}]<|message|>{text}<|end|>
         ─────────────────────────── header ───────────────────────────────         ─ plain ─ <|call|> after a call

Only the marks are special tokens, and only this file puts them there. Names, words and texts are encoded as ordinary
text, whatever they look like.
"""

import re
from collections.abc import Sequence

from gptoss_jax.harmony.messages import (
    Assistant,
    Conversation,
    Developer,
    Function,
    Message,
    Namespace,
    ResponseFormat,
    System,
    ToolResult,
    User,
)
from gptoss_jax.harmony.tokenizer import Tokenizer
from gptoss_jax.harmony.typescript import compact_json, typescript


def render(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """The ids of a conversation, every message closed, analysis that is no longer read left out."""
    writer = _Writer(tokenizer)
    has_functions = any(isinstance(message, Developer) and message.functions for message in conversation)
    for message in still_read(conversation):
        match message:
            case System():
                writer.message("system", text=system_text(message, has_functions=has_functions))
            case Developer():
                writer.message("developer", text=developer_text(message))
            case User():
                writer.message("user", name=message.name, text=message.text)
            case Assistant():
                writer.assistant(message)
            case ToolResult():
                writer.message(message.name, recipient="assistant", channel=message.channel, text=message.text)
    return writer.ids


def render_prompt(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """The ids of a conversation and the beginning of the assistant's answer, which the model goes on with."""
    return [*render(conversation, tokenizer), tokenizer.special("<|start|>"), *tokenizer.encode("assistant")]


def still_read(conversation: Conversation) -> list[Message]:
    """The messages that a model is shown again: all but the analysis before the last final message.

    What was thought before an answer was given is over. What was thought since is still needed: a model that gets a
    tool's result goes on with the thought that asked for it. Calls in the analysis channel and their results there
    (python, browser) go with the thoughts that they belong to.
    """
    finals = [
        i for i, message in enumerate(conversation) if isinstance(message, Assistant) and message.channel == "final"
    ]
    last_final = finals[-1] if finals else 0
    return [message for i, message in enumerate(conversation) if i >= last_final or not _is_analysis(message)]


def _is_analysis(message: Message) -> bool:
    return isinstance(message, Assistant | ToolResult) and message.channel == "analysis"


class _Writer:
    """The marks of a tokenizer, and the ids so far."""

    def __init__(self, tokenizer: Tokenizer):
        self.ids: list[int] = []
        self._encode = tokenizer.encode
        self._special = tokenizer.special

    def message(
        self,
        role: str,
        *,
        text: str,
        name: str | None = None,
        recipient: str | None = None,
        channel: str | None = None,
        content_type: str | None = None,
        end: str = "<|end|>",
    ) -> None:
        """Each part of the header is encoded by itself, so that ids do not run across their borders."""
        self._mark("<|start|>", role)
        if name is not None:
            self._text(f":{name}")
        if recipient is not None:
            self._text(f" to={recipient}")
        if channel is not None:
            self._mark("<|channel|>", channel)
        if content_type == "code":  # the one type that models write without a mark, for python
            self._text(" code")
        elif content_type is not None:
            self._text(" ")
            self._mark("<|constrain|>", content_type)
        self._mark("<|message|>", text)
        self._mark(end)

    def assistant(self, message: Assistant) -> None:
        self.message(
            "assistant",
            recipient=message.recipient,
            channel=message.channel,
            content_type=message.content_type,
            text=message.text,
            # Never <|return|>: it ends the ids that are sampled, and a message of the past ended long ago.
            end="<|end|>" if message.recipient is None else "<|call|>",
        )

    def _mark(self, name: str, text: str = "") -> None:
        self.ids.append(self._special(name))
        self._text(text)

    def _text(self, text: str) -> None:
        self.ids += self._encode(text)


# --- what stands in the first messages --------------------------------------------------------------------------------


def system_text(system: System, *, has_functions: bool) -> str:
    """The content of the system message; `has_functions`: a developer message of the conversation has some."""
    about = [system.identity] if system.identity else []
    about += [f"Knowledge cutoff: {system.knowledge_cutoff}"] if system.knowledge_cutoff is not None else []
    about += [f"Current date: {system.date.isoformat()}"] if system.date is not None else []
    sections = ["\n".join(about), f"Reasoning: {system.effort}", _tools_text(system.tools)]
    if system.channels:
        channels = ", ".join(system.channels)
        sections.append(f"# Valid channels: {channels}. Channel must be included for every message.")
        if has_functions:
            sections[-1] += "\nCalls to these tools must go to the commentary channel: 'functions'."
    return "\n\n".join(section for section in sections if section)


def developer_text(developer: Developer) -> str:
    """The content of a developer message."""
    sections = [f"# Instructions\n\n{developer.instructions}" if developer.instructions else ""]
    if developer.functions:
        sections.append(_tools_text((Namespace(name="functions", functions=developer.functions),)))
    if developer.formats:
        sections += ["# Response Formats", *map(_format_text, developer.formats)]
    return "\n\n".join(section for section in sections if section)


def _tools_text(namespaces: Sequence[Namespace]) -> str:
    """By name: the same tools in another order give the same ids."""
    if not namespaces:
        return ""
    return "\n\n".join(["# Tools", *map(_namespace_text, sorted(namespaces, key=lambda namespace: namespace.name))])


def _namespace_text(namespace: Namespace) -> str:
    lines = [f"## {namespace.name}\n"]
    if not namespace.functions:  # python: what it is sent is no call, so its description is no comment on types
        return "\n".join([*lines, *_lines(namespace.description)])
    lines += [f"// {line}" for line in _lines(namespace.description)]
    lines += [f"namespace {namespace.name} {{\n"]
    lines += [_function_text(function) for function in namespace.functions]
    return "\n".join([*lines, f"}} // namespace {namespace.name}"])


def _function_text(function: Function) -> str:
    comments = "".join(f"// {line}\n" for line in _lines(function.description))
    of = f"the parameters of function {function.name}"
    arguments = "" if function.parameters is None else f"_: {typescript(function.parameters, of=of)}"
    return f"{comments}type {function.name} = ({arguments}) => any;\n"


def _format_text(form: ResponseFormat) -> str:
    comments = "".join(f"// {line}\n" for line in _lines(form.description))
    of = f"the schema of response format {form.name}"
    return f"## {form.name}\n\n{comments}{compact_json(form.schema, of=of)}"


def _lines(text: str) -> list[str]:
    """Cut at line feeds alone, with or without a carriage return; one at the end begins no line."""
    lines = re.split(r"\r?\n", text)
    return lines if lines[-1] else lines[:-1]
