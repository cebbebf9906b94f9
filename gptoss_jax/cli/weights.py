"""`init`, `convert`, `export`, `verify`, `inspect`: arguments in, a bar or a table out. Knows no format itself."""

import argparse
import dataclasses
import json
import sys
import time
from itertools import starmap
from pathlib import Path

from gptoss_jax.cli import devices, memory, merge
from gptoss_jax.cli.agreement import agree_on_command
from gptoss_jax.cli.terminal import progress, size, table
from gptoss_jax.configs import model_config
from gptoss_jax.convert import conversion, names, synthetic
from gptoss_jax.convert.adapters import sniff_adapter
from gptoss_jax.convert.export import export as export_folder
from gptoss_jax.convert.inspection import Group, Inspection, Total, inspect_folder
from gptoss_jax.convert.verification import verify as verify_checkpoint
from gptoss_jax.errors import UserError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.sharding import MeshShape


def init(options: argparse.Namespace) -> int:
    config = _cut(model_config(options.model), layers=options.layers, num_experts=options.experts)
    tensors = names.file_tensors(config, layout=options.layout, experts=options.expert_format)
    total, done, start = sum(tensor.nbytes for tensor in tensors), 0, time.perf_counter()
    with progress("writing") as show:

        def on_bytes(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            show(done, total)

        synthetic.write_checkpoint(
            Path(options.out),
            config,
            seed=options.seed,
            layout=options.layout,
            experts=options.expert_format,
            on_bytes=on_bytes,
        )
    _report(f"{options.out}: ", total, start)
    return 0


def convert(options: argparse.Namespace) -> int:
    if sniff_adapter(Path(options.source)):
        return merge.convert_adapter(options)
    memory.share_one_arena()
    mesh = MeshShape.parse(options.mesh)
    with devices.joined(options) as hosts:
        devices.simulate_mesh(mesh, num_processes=hosts.num_processes)
        agree_on_command(options)
        _convert(options, mesh, first=hosts.process_id == 0)
    return 0


def _convert(options: argparse.Namespace, mesh: MeshShape, *, first: bool) -> None:
    start = time.perf_counter()
    stored: list[int] = []  # the first is what an earlier run has left
    with progress("converting", shown=first) as show:

        def on_progress(done: int, total: int) -> None:
            stored.append(done)
            show(done, total)

        conversion.convert(
            Path(options.source),
            Path(options.destination),
            mesh=mesh,
            experts=options.experts,
            scale_rule=options.scale_rule,
            on_progress=on_progress,
        )
    if first:
        _report_conversion(options.destination, stored, start)


def _report_conversion(destination: str, stored: list[int], start: float) -> None:
    new = stored[-1] - stored[0] if stored else 0
    if not new:
        print(f"{destination}: whole; all of it had been stored before", file=sys.stderr)
        return
    _report(f"{destination}: " + (f"{size(stored[-1])}, the last " if stored[0] else ""), new, start)


def export(options: argparse.Namespace) -> int:
    if options.format == "peft":
        return merge.export_adapter(options)
    devices.simulate(1)
    start = time.perf_counter()
    with progress("exporting") as show:
        export_folder(
            Path(options.checkpoint),
            Path(options.destination),
            layout=options.format,
            experts=options.experts,
            scale_rule=options.scale_rule,
            on_progress=show,
        )
    print(f"{options.destination}: written in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return 0


def verify(options: argparse.Namespace) -> int:
    devices.simulate(1)
    against = None if options.against is None else Path(options.against)
    with progress("verifying") as show:
        faults = verify_checkpoint(Path(options.checkpoint), against=against, on_progress=show)
    for fault in faults:
        print(fault)
    if faults:
        print(f"{options.checkpoint}: {len(faults)} faults; convert or copy it again", file=sys.stderr)
        return 1
    print(f"{options.checkpoint}: whole" + (f", and equal to {options.against}" if options.against else ""))
    return 0


def inspect(options: argparse.Namespace) -> int:
    found = inspect_folder(Path(options.path), mesh=None if options.mesh is None else MeshShape.parse(options.mesh))
    if options.json:
        print(json.dumps(found.to_json(), indent=1))
        return 0
    _print_inspection(found)
    return 0


def _print_inspection(found: Inspection) -> None:
    """Sizes, then one row for the tensors that are alike in all layers, then the sums."""
    total = found.total
    print(f"{found.path}: {found.format}" + (f", {found.experts} experts" if found.experts else ""))
    if found.unfinished is not None:
        stored = size(found.unfinished.stored_nbytes)
        print(f"The conversion has not finished: {stored} are stored. The same convert command goes on with it.")
        return
    if found.config is not None:
        print(_describe(found.config))
    if found.origin is not None:
        print(f"converted from {found.origin.layout} ({found.origin.experts} experts) for mesh {found.origin.mesh}")
    columns = ["tensor", "dtype", "shape", "number", "bytes"]
    rows = [
        [group.name, group.tensors[0].dtype, _shape(group.tensors[0].shape), *_counted(group.total), *_placed(group)]
        for group in found.grouped()
    ]
    sums = [[kind, "", "", *_counted(of_kind), *_per_device(of_kind)] for kind, of_kind in found.totals.items()]
    if found.mesh is not None:
        columns += [f"cut on {found.mesh}", "bytes per device"]
        sums = [[*row[:5], "", *row[5:]] for row in sums]
    table("", columns, [*rows, [""] * len(columns), *sums])
    print(f"{_number(total.num_values)} parameters in {size(total.nbytes)}", end="")
    if found.mesh is not None and total.device_nbytes is not None:
        print(f", {size(total.device_nbytes)} on each of {found.mesh.num_devices} devices", end="")
    print()


def _describe(config: ModelConfig) -> str:
    heads = f"{config.num_heads} query and {config.num_kv_heads} key/value heads of {config.head_dim}"
    experts = f"{config.experts_per_token} of {config.num_experts} experts of {config.expert_width}"
    context = f"context {config.max_context}, window {config.sliding_window}"
    return f"{config.num_layers} layers of {config.width}, {heads}, {experts}, {config.vocab_size} ids, {context}"


def _number(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count / 1e6:.2f} million"


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _counted(total: Total) -> list[str]:
    return [str(total.num_tensors), size(total.nbytes)]


def _placed(group: Group) -> list[str]:
    """Where the mesh cuts it, dimension by dimension, and what it is padded to for that; nothing without a mesh."""
    tensor = group.tensors[0]
    if tensor.sharding is None or tensor.fitted_shape is None:
        return []
    dimensions = zip(tensor.sharding, tensor.shape, tensor.fitted_shape, strict=True)
    return [", ".join(starmap(_dimension, dimensions)), *_per_device(group.total)]


def _dimension(cut: str | None, size: int, fitted: int) -> str:
    """ "·" whole, "tensor" cut, "tensor 90→96" padded from 90 to 96 and then cut."""
    return (cut or "·") + ("" if fitted == size else f" {size}→{fitted}")


def _per_device(total: Total) -> list[str]:
    return [] if total.device_nbytes is None else [size(total.device_nbytes)]


def _cut(config: ModelConfig, *, layers: int | None, num_experts: int | None) -> ModelConfig:
    if layers is not None:
        if not 1 <= layers <= config.num_layers:
            raise UserError(f"--layers is {layers}; the model has 1 to {config.num_layers} to keep")
        config = dataclasses.replace(config, layer_kinds=config.layer_kinds[:layers])
    if num_experts is not None:
        config = dataclasses.replace(config, num_experts=num_experts)
    return config


def _report(what: str, nbytes: int, start: float) -> None:
    seconds = time.perf_counter() - start
    print(f"{what}{size(nbytes)} in {seconds:.1f} s, {size(nbytes / seconds)}/s", file=sys.stderr)
