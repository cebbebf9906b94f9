"""A call that blocks, beside the event loop. Knows nothing of what is called.

Not `asyncio.to_thread`: its few threads are also those that look up addresses, a call that never returns holds one of
them for ever, and the program cannot end before it. Each call here has a thread of its own, which a program's end ends.
"""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


async def in_thread(call: Callable[[], Result]) -> Result:
    """What the call returns or raises. Cancelling stops the waiting; the call runs on, and nobody hears of it."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[Result] = loop.create_future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            tell: tuple[Callable[[Any], None], Any] = (answered.set_result, context.run(call))
        except StopIteration as error:  # of a bare `next`; no future takes one, and the caller would wait for ever
            tell = (answered.set_exception, RuntimeError(f"the call raised StopIteration({error})"))
        except BaseException as error:
            tell = (answered.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            loop.call_soon_threadsafe(_tell, answered, *tell)

    threading.Thread(target=run, name="gptoss_jax tool", daemon=True).start()
    return await answered


def _tell(answered: asyncio.Future[Any], setter: Callable[[Any], None], value: Any) -> None:
    if not answered.done():  # a cancelled caller waits no longer
        setter(value)
