"""What a tool is to a conversation: a name, a description, answers to calls. Knows messages; knows no model, no loop.

Whoever runs a turn asks each tool once for its `session`, and that for the answers:

    model ──"functions.weather", '{"city": "Oslo"}'──► session.call ──► "12 °C"
                                                            └─ ToolError: its text is what the model reads instead
"""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import Function, Namespace

FUNCTIONS = "functions"  # the namespace of all functions of the caller's own, which stand in the developer message


class ToolError(UserError):
    """A call that failed; the model reads the text in place of a result, so it says what to do otherwise.

    Any other exception of a tool is a mistake in the tool, and its text is nothing that a model should be shown.
    """


@runtime_checkable
class Tool(Protocol):
    """Something that is run where the turn runs, when the model calls it.

    One tool serves any number of conversations at the same time. What it remembers of one of them lives in a session.
    """

    @property
    def namespace(self) -> Namespace:
        """How the model is told of it. Functions of the caller's own are all in the namespace "functions"."""
        ...

    def handles(self, recipient: str) -> bool:
        """Whether a call to this recipient, as "functions.weather" or "python", is this tool's."""
        ...

    def session(self) -> "Tool":
        """The tool for one turn of one conversation. A tool without memory is its own session, and so is a session."""
        ...

    async def call(self, recipient: str, text: str) -> str:
        """Answers a call that it handles; `text` is what the model sent. Cancelling ends the work.

        Raises:
            ToolError: for the model to read.
        """
        ...


def functions_of(tools: Iterable[Tool]) -> tuple[Function, ...]:
    """The functions of these tools for `Developer.functions`."""
    return tuple(
        function for tool in tools if tool.namespace.name == FUNCTIONS for function in tool.namespace.functions
    )


def namespaces_of(tools: Iterable[Tool]) -> tuple[Namespace, ...]:
    """The namespaces of these tools for `System.tools`, as browser and python; functions are not among them."""
    return tuple(tool.namespace for tool in tools if tool.namespace.name != FUNCTIONS)
