"""Opens the engine of `chat` and `serve` as their options say. Knows options, devices and loading; knows no answer.

with serving.joined(options) as hosts:
    if hosts.process_id:
        serving.follow(options, hosts)  # until process 0 closes its engine
    else:
        with serving.open_engine(options, hosts) as opened:
            ...
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp

from gptoss_jax import checkpoint
from gptoss_jax.cli import adapters, devices, programs
from gptoss_jax.cli.agreement import agree_on_command
from gptoss_jax.engine import engine as engines
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.protocol import AnyEngine
from gptoss_jax.engine.settings import EngineSettings
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.hosts import Hosts
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.dispatch import check_way
from gptoss_jax.model.transformer import GptOss, abstract_model
from gptoss_jax.sharding import MeshShape, make_mesh

_CONTEXT = 32_768  # tokens of a conversation, where neither options nor the model say less
_TOKENS_PER_ROW = 4096  # of the cache, where several share it


@dataclasses.dataclass(frozen=True)
class Opened:
    """An engine that takes requests, and what belongs to it."""

    engine: AnyEngine
    tokenizer: Tokenizer
    model_name: str


@contextlib.contextmanager
def joined(options: argparse.Namespace) -> Iterator[Hosts]:
    """This process among its others, where there are any; process 0 answers. Comes before anything looks at devices."""
    if options.host_devices is not None:
        devices.simulate(options.host_devices)
    programs.keep()
    with devices.joined(options) as hosts:
        yield hosts


@contextlib.contextmanager
def open_engine(
    options: argparse.Namespace, hosts: Hosts, *, folders: Sequence[adapters.Folder] = ()
) -> Iterator[Opened]:
    """Loads the model and compiles its programs, which takes a while; closes the engine when the block ends.

    Args:
        folders: adapters, by whose names requests choose; or one without a name, which all take.

    Raises:
        UserError: a checkpoint, an adapter, a tokenizer or options that cannot be used; weights are read after all that
            is checked.
    """
    path = Path(options.checkpoint)
    tokenizer = load_tokenizer(path)
    model, settings = _model(options, hosts, tokenizer, folders)
    with contextlib.ExitStack() as stack:
        with devices.enough_memory():
            engine = Engine(
                model,
                settings=settings,
                token_bytes=lambda token_id: tokenizer.decode_bytes([token_id]),
                adapters=adapters.names(folders),
            )
            stack.callback(engine.close)
        yield Opened(engine, tokenizer, path.resolve().name)


def follow(options: argparse.Namespace, hosts: Hosts, *, folders: Sequence[adapters.Folder] = ()) -> None:
    """What a process other than 0 does: its part of every step, until process 0 closes its engine."""
    model, settings = _model(options, hosts, None, folders)
    with devices.enough_memory():
        engines.follow(model, settings=settings, adapters=adapters.names(folders))


def engine_settings(options: argparse.Namespace, config: ModelConfig) -> EngineSettings:
    """As the options say; the cache has room for one long conversation or for several of moderate length."""
    settings = EngineSettings(
        max_rows=options.max_rows,
        max_context=options.max_context,
        cache_tokens=options.cache_tokens,
        cache_bytes=options.cache_bytes,
        kv_dtype=options.kv_dtype,
        prefill_tokens=options.prefill_tokens,
        draft_tokens=options.draft_tokens,
        batch_invariant=options.batch_invariant,
    )
    if settings.cache_tokens is not None or settings.cache_bytes is not None:
        return settings
    longest = min(_CONTEXT, config.max_context) if settings.max_context is None else settings.max_context
    return dataclasses.replace(settings, cache_tokens=max(longest, settings.max_rows * _TOKENS_PER_ROW))


def _model(
    options: argparse.Namespace, hosts: Hosts, tokenizer: Tokenizer | None, folders: Sequence[adapters.Folder]
) -> tuple[GptOss, EngineSettings]:
    """The model where it is to lie; whatever loading would refuse is refused before weights are read."""
    path = Path(options.checkpoint)
    config, experts = checkpoint.sizes(path)
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} ids and the model {config.vocab_size}; "
            "take the tokenizer.json of the release that the checkpoint comes from"
        )
    settings = engine_settings(options, config)
    limits = settings.limits(config)
    shape = None if options.mesh in (None, "auto") else MeshShape.parse(options.mesh)
    if options.mesh == "auto":
        shape = devices.choose(
            options, config, experts, batch=options.max_rows, context=limits.max_context, first=hosts.process_id == 0
        )
    mesh = None if shape is None else make_mesh(**dataclasses.asdict(shape))
    devices.check_all_take_part(mesh, hosts)
    placed = {"mesh": mesh, "dtype": jnp.dtype(options.dtype), "impl": options.impl, "dispatch": options.dispatch}
    placed |= {"dense": options.dense, "embedding": options.embedding}
    check_way(options.dispatch, mesh=mesh)
    one_layer = dataclasses.replace(config, layer_kinds=config.layer_kinds[:1])
    abstract_model(one_layer, experts=experts, **placed)
    agree_on_command(options, checkpoint=path)
    trained = adapters.read(folders, checkpoint=path, config=config)
    with devices.enough_memory():
        return adapters.attached(checkpoint.load(path, **placed), trained), settings
