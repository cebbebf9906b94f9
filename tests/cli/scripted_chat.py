"""`chat` in a terminal of its own, answered by a script: started by test_chat.py on the other end of a pty."""

import asyncio
import fcntl
import signal
import sys
import termios
from pathlib import Path

from gptoss_jax.chat import TurnSettings
from gptoss_jax.cli.chat import Talk, screen
from gptoss_jax.cli.chat_session import ChatSession
from gptoss_jax.cli.serving import Opened
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.testing import ScriptedEngine

SAID = (
    ("analysis", "hm", "<|end|>"),
    ("final", "x" * 5_000, "<|return|>"),
)


def main(folder: str) -> int:
    """Says what it thinks, then x for a minute or more, again and again."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C is a key of this terminal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job begins without
    tokenizer = load_tokenizer(Path(folder))
    ids: list[int] = []
    for channel, text, end in SAID:
        ids += [tokenizer.special("<|channel|>"), *tokenizer.encode(channel)]
        ids += [tokenizer.special("<|message|>"), *tokenizer.encode(text), tokenizer.special(end)]
        if end == "<|end|>":
            ids += [tokenizer.special("<|start|>"), *tokenizer.encode("assistant")]
    engine = ScriptedEngine(lambda request: ids, vocab_size=tokenizer.vocab_size, seconds_per_token=0.02)
    with asyncio.Runner() as runner:
        talk = Talk(
            Opened(engine, tokenizer, "scripted"), ChatSession(), TurnSettings(), screen(is_conversation=True), runner
        )
        code = talk.go_on()
    print(f"\nopen requests: {engine.num_open}, messages: {len(talk.session.messages)}")
    engine.close()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
