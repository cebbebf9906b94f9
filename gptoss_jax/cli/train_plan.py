"""`train --plan`: bytes on each device before anything runs. Knows how to print; computes nothing itself."""

import argparse
from pathlib import Path

import jax

from gptoss_jax import checkpoint
from gptoss_jax.aot import Topology, quiet_libtpu
from gptoss_jax.cli.terminal import size, table
from gptoss_jax.configs import model_config, model_names
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.footprint import bytes_on_host
from gptoss_jax.model.transformer import Experts
from gptoss_jax.plan.chips import CHIPS, Chip
from gptoss_jax.plan.compiled import Compiled, NoRoom, compile_lowered, mesh_of
from gptoss_jax.train.config import TrainConfig
from gptoss_jax.train.plan import StepMemory, lower, step_memory


def run(config: TrainConfig, options: argparse.Namespace) -> int:
    """Prints what a step holds, and with `--chip` whether that fits: 0 if it does or none is named, else 1.

    Raises:
        UserError: the model does not go with the method or the mesh, or there is no such chip.
    """
    topology = _topology(options, config)
    sizes, experts = _sizes(config)
    found = step_memory(config, sizes, experts)
    compiled = _compile(config, sizes, experts, topology) if topology and options.compile else None
    chip = CHIPS[topology.chip] if topology else None
    print(_sentence(config, found, chip))
    table("Memory of one device", ("", "bytes", "of memory")[: 3 if chip else 2], _rows(found, chip))
    if isinstance(compiled, Compiled):
        title = f"The step as its compiler sees it ({compiled.seconds:.0f} s to compile)"
        table(title, ("", "estimate", "compiler"), _compared(found, compiled))
    elif compiled:
        print(compiled)
    peak = compiled.peak if isinstance(compiled, Compiled) else found.total
    return 1 if isinstance(compiled, str) or (chip and peak > chip.memory) else 0


def _topology(options: argparse.Namespace, config: TrainConfig) -> Topology | None:
    if options.chip is None:
        if options.compile:
            raise UserError(f"--compile needs to know for which devices: name one with --chip, of {', '.join(CHIPS)}")
        return None
    return Topology.parse(f"{options.chip}-{config.mesh.shape.num_devices}")


def _sizes(config: TrainConfig) -> tuple[ModelConfig, Experts]:
    """Of the checkpoint, or of the model that has its name where it is not here yet."""
    if config.model.scratch is not None:
        return model_config(config.model.scratch), "bf16"
    path = config.model.folder
    assert path is not None
    if not path.exists() and path.name in model_names():
        return model_config(path.name), "bf16" if config.method.kind == "full" else "mxfp4"
    return checkpoint.sizes(path)


def _compile(config: TrainConfig, sizes: ModelConfig, experts: Experts, topology: Topology) -> Compiled | str:
    """The compiler's figures, or its words where it finds no room."""
    quiet_libtpu()
    jax.config.update("jax_platforms", "cpu")  # those that are here may be busy
    mesh = mesh_of(str(topology), config.mesh.shape)
    try:
        lowered = lower(config, sizes, experts, mesh=mesh)
        on_host = bytes_on_host(sizes, dtype=config.model.dtype, embedding=config.model.embedding)
        return compile_lowered(lowered, str(topology), on_host=on_host)
    except NoRoom as error:
        return str(error)


def _sentence(config: TrainConfig, found: StepMemory, chip: Chip | None) -> str:
    model = Path(config.model.checkpoint or config.model.scratch or "").name
    shape, rows = config.mesh.shape, config.loop.rows
    each = "the device" if shape.num_devices == 1 else f"each of {shape.num_devices} devices, mesh {shape}"
    said = f"{model}, {rows} x {config.data.row_length:,} tokens: a step holds {size(found.total)} on {each}"
    if chip is None:
        return f"{said}."
    spare = chip.memory - found.total
    fits = f"fits, with {size(spare)} to spare" if spare >= 0 else f"does not fit: {size(-spare)} are missing"
    return f"{said}; {chip.name} has {size(chip.memory)}: {fits}."


def _rows(found: StepMemory, chip: Chip | None) -> list[list[str]]:
    lines = [*found.parts().items(), ("at the fullest moment", found.total)]
    if chip is not None:
        lines += [("memory", chip.memory)]
    return [[name, size(n), *([f"{n / chip.memory:.1%}"] if chip else [])] for name, n in lines]


def _compared(found: StepMemory, compiled: Compiled) -> list[list[str]]:
    compared = (
        ("lasting: parameters, masters, optimizer", found.lasting, compiled.arguments),
        ("passing", found.passing, compiled.temporaries + compiled.outputs),
        ("in all", found.total, compiled.peak),
    )
    rows = [[name, size(ours), size(theirs)] for name, ours, theirs in compared]
    return rows + [[f"{each.count} x {each.name}", "", size(each.nbytes)] for each in compiled.collectives[:8]]
