"""`--adapter`: which trained adapters a command takes, and their way into its model. Knows options; knows no format."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from gptoss_jax.convert.adapters import ADAPTER_NAME, base_digest, load_adapter, sniff_adapter
from gptoss_jax.convert.export import open_base
from gptoss_jax.convert.peft_config import CONFIG_NAME
from gptoss_jax.errors import UserError
from gptoss_jax.hosts import agree
from gptoss_jax.model.adapter import Adapter, with_adapters
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.transformer import GptOss

_SAMPLE = 1 << 16  # bytes of each file; ours says the checksums of all others at its beginning


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder with an adapter.

    Attributes:
        name: by which requests ask for it; None for one that answers them all.
    """

    path: Path
    name: str | None = None


def only(path: Path | None) -> tuple[Folder, ...]:
    """What `--adapter DIR` says, for a command that takes one at most."""
    return () if path is None else (Folder(path=path.expanduser()),)


def named(words: Sequence[str]) -> tuple[Folder, ...]:
    """What `--adapter [NAME=]DIR`, once or several times, says; the name is the folder's where there is none.

    Raises:
        UserError: a folder has no adapter.
    """
    return tuple(map(_named, words))


def _named(words: str) -> Folder:
    name, separator, rest = words.partition("=")
    if not separator or Path(words).is_dir():  # a folder's name may have the character too
        name, rest = "", words
    path = Path(rest).expanduser()
    if sniff_adapter(path) is None:
        raise UserError(
            f"--adapter is {words!r}, and in {path} is no adapter; expected [NAME=]DIR, and in DIR {ADAPTER_NAME} "
            f"(ours) or {CONFIG_NAME} (PEFT's)"
        )
    return Folder(path=path, name=name or path.resolve().name)


def names(folders: Sequence[Folder]) -> list[str]:
    """By which requests choose."""
    return [folder.name for folder in folders if folder.name is not None]


def read(folders: Sequence[Folder], *, checkpoint: Path, config: ModelConfig) -> list[Adapter]:
    """The adapters, in the host's memory; comes before the checkpoint's weights are read.

    Raises:
        UserError: one is not there, is damaged, or is another base's; or other processes have another one.
    """
    if not folders:
        return []
    digest = base_digest(open_base(checkpoint))
    found = [load_adapter(folder.path, config, base_digest=digest) for folder in folders]
    for folder in folders:
        agree(f"the adapter {folder.path}", _fingerprint(folder.path))
    return found


def attached(model: GptOss, adapters: Sequence[Adapter]) -> GptOss:
    """The model with these adapters at work."""
    return with_adapters(model, adapters) if adapters else model


def _fingerprint(path: Path) -> str:
    """Names, sizes and beginnings of all files speak for what is in them."""
    digest = hashlib.sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        with file.open("rb") as stream:
            digest.update(repr((str(file.relative_to(path)), file.stat().st_size, stream.read(_SAMPLE))).encode())
    return digest.hexdigest()
