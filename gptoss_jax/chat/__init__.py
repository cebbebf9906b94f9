"""A turn of a conversation: the model speaks, tools are run, the model goes on. See turn.py for how."""

from gptoss_jax.chat.calls import NoSuchTool
from gptoss_jax.chat.events import ChatEvent, Part, ToolFinished, ToolStarted, TurnFinished, TurnReason, Usage
from gptoss_jax.chat.settings import AnyGrammars, TurnSettings
from gptoss_jax.chat.turn import Chat

__all__ = [
    "AnyGrammars",
    "Chat",
    "ChatEvent",
    "NoSuchTool",
    "Part",
    "ToolFinished",
    "ToolStarted",
    "TurnFinished",
    "TurnReason",
    "TurnSettings",
    "Usage",
]
