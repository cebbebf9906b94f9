"""Which implementations an op has, where each runs and how it wants its weights. Knows names; imports no kernel itself.

    name              is                                          runs on
    xla               the readable reference                      anything
    tpu, gpu          Pallas kernels, through Mosaic and Triton   that platform
    tpu-interpret,    the same kernels, step by step in Pallas'   anything, slowly
    gpu-interpret     interpreter, for tests

A name is chosen once, when a model is built; kernels are called with the name that was found. Nothing falls back.
"""

import difflib
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxtyping import Array

from gptoss_jax.errors import Unsupported, UserError
from gptoss_jax.kernels import tuned

Layout = Literal["rows", "columns"]

PLATFORMS = ("cpu", "gpu", "tpu")  # as jax.Device.platform names them; CUDA and ROCm are both "gpu"

_IMPLEMENTATIONS: Mapping[str, tuple[str, ...]] = {
    "xla": PLATFORMS,
    "tpu": ("tpu",),
    "gpu": ("gpu",),
    "tpu-interpret": PLATFORMS,
    "gpu-interpret": PLATFORMS,
}
# op -> implementation -> platforms
_TABLE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "attention": _IMPLEMENTATIONS,
    "moe_matmul": _IMPLEMENTATIONS,
}
_PREFERRED = {"cpu": "xla", "gpu": "gpu", "tpu": "tpu"}
_INTERPRETED = "-interpret"


def choose(op: str, impl: str | None, *, platform: str) -> str:
    """The implementation of that name, or for None the one that is preferred on the platform.

    Raises:
        UserError: the op has no implementation of that name.
        Unsupported: it has, but not for this platform.
    """
    table = _TABLE[op]
    if impl is None:
        return _PREFERRED.get(platform, "xla")
    if impl not in table:
        close = difflib.get_close_matches(impl, table, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"{op} has no implementation {impl!r}: {hint}expected one of {', '.join(table)}")
    if not _runs(op, impl, platform):
        there = ", ".join(implementations(op, platform=platform))
        raise Unsupported(
            f"{op}'s implementation {impl!r} runs on {', '.join(table[impl])}, the devices here are {platform}: "
            f"choose one of {there}"
        )
    return impl


def implementations(op: str, *, platform: str) -> tuple[str, ...]:
    """The names that run on the platform, the reference first."""
    return tuple(impl for impl in _TABLE[op] if _runs(op, impl, platform))


def layout(impl: str) -> Layout:
    """How packed weights lie for the implementation: rows as released, or inputs over outputs in columns."""
    return "columns" if _base(impl) == "tpu" else "rows"


def function(op: str, name: str, impl: str, *, device_kind: str | None = None) -> Callable[..., Array]:
    """The function `name` of the op's implementation, with the block sizes that are known for the kind of device.

    Modules are found by name, at the first use: what a platform's kernels import need not be there on another (jaxlib
    for macOS has no Triton).
    """
    module = kernel_module(op, impl)
    found = getattr(module, name)
    if impl == "xla":
        return found
    if impl.endswith(_INTERPRETED):
        return functools.partial(found, interpret=True)
    sizes = tuned.find(op, impl, device_kind=device_kind)
    return found if sizes is None else functools.partial(found, blocks=blocks(module, sizes))


def kernel_module(op: str, impl: str) -> Any:
    """Where the implementation is, interpreted or not."""
    return importlib.import_module(f"gptoss_jax.kernels.{op}.{_base(impl)}")


def blocks(module: Any, sizes: tuned.Entry) -> Any:
    """As a kernel's functions take them: its Blocks, or for several forms a mapping of them."""
    if tuned.is_one_form(sizes):
        return module.Blocks(**sizes)
    return {form: module.Blocks(**each) for form, each in sizes.items()}


def _runs(op: str, impl: str, platform: str) -> bool:
    """XLA also where nobody has tried it."""
    return impl == "xla" or platform in _TABLE[op][impl]


def _base(impl: str) -> str:
    return impl.removesuffix(_INTERPRETED)
