"""What all processes of a command must have in common, checked before they wait for each other. Loads no weights."""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptoss_jax.checkpoint import sniff
from gptoss_jax.convert.files import TensorFolder
from gptoss_jax.convert.manifest import MANIFEST_NAME
from gptoss_jax.convert.source import CONFIG_NAME
from gptoss_jax.hosts import agree

_SAMPLE = 4096

# Arguments that may differ; and those that are compared by what they lead to, here or by the conversion itself.
_OWN = ("coordinator", "process_id", "join_timeout", "silence_timeout")
_COMPARED = ("checkpoint", "source", "destination", "text", "tokens")


def agree_on_command(
    options: argparse.Namespace, *, checkpoint: Path | None = None, prompt: Sequence[int] = ()
) -> None:
    """Checks that all processes were given the same command. Paths may differ: what they lead to may not.

    Raises:
        UserError: they have other weights, arguments or prompts; on all of them, with what differs and where.
    """
    if checkpoint is not None:
        agree(f"the checkpoint {checkpoint}", fingerprint(checkpoint))
    for name, value in sorted(vars(options).items()):
        if name not in _OWN + _COMPARED:
            agree(f"--{name.replace('_', '-')}", str(value))
    agree("the prompt", ",".join(map(str, prompt)))


def fingerprint(path: Path) -> str:
    """Changes with any weight of a converted checkpoint, whose manifest holds checksums.

    A released folder has none: names, sizes and the beginning of each of its tensors speak for it.
    """
    digest = hashlib.sha256()
    for piece in [(path / MANIFEST_NAME).read_bytes()] if sniff(path) == "checkpoint" else _samples(path):
        digest.update(piece)
    return digest.hexdigest()


def _samples(path: Path) -> Iterator[bytes]:
    yield (path / CONFIG_NAME).read_bytes()
    folder = TensorFolder.open(path)
    for name, info in sorted(folder.tensors.items()):
        yield repr((name, info.code, info.shape)).encode()
        yield next(folder.bytes_of(name, chunk=_SAMPLE), b"")
