"""Which devices and processes a command runs on, said before jax looks. Knows jax's settings; knows no model."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptoss_jax.cli.exit_codes import exit_code
from gptoss_jax.errors import UserError
from gptoss_jax.hosts import EXIT_LOST, Hosts, start_hosts
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.mesh_choice import choose_mesh
from gptoss_jax.model.transformer import Experts
from gptoss_jax.sharding import MeshShape


def simulate(num_devices: int) -> None:
    """Makes the CPU look like `num_devices` devices."""
    if num_devices < 1:
        raise UserError(f"--host-devices is {num_devices}; expected at least 1")
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError as error:  # jax has looked already: `main` was called in a program that uses it
        if len(jax.devices("cpu")) < num_devices:
            raise UserError(
                f"{num_devices} CPU devices are wanted and jax has started with {len(jax.devices('cpu'))}: "
                "run the command in a process of its own"
            ) from error


def memory() -> int | None:
    """Bytes that a program may use on each device; None where the platform does not say, as on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def choose(
    options: argparse.Namespace, config: ModelConfig, experts: Experts, *, batch: int, context: int, first: bool
) -> MeshShape:
    """What `--mesh auto` means for so many rows of so many tokens; the first process says why."""
    shape, why = choose_mesh(
        config,
        jax.device_count(),
        batch=batch,
        context=context,
        bytes_per_device=memory(),
        dtype=jnp.dtype(options.dtype),
        experts=experts,
        embedding=options.embedding,
    )
    if first:
        print(f"mesh {shape}: {why}", file=sys.stderr)
    return shape


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Where a device runs out of memory, says what to do about it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first_line = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
        raise UserError(
            f"a device has too little memory ({first_line}): spread the model over more devices with --mesh, "
            "or ask for a shorter text"
        ) from error


def check_all_take_part(mesh: Mesh | None, hosts: Hosts) -> None:
    """Raises UserError where a process would hold no part of the model."""
    if hosts.num_processes == 1:
        return
    if mesh is None:
        raise UserError(
            f"--mesh is missing: it lays the model over the devices of the {hosts.num_processes} processes; "
            f"choose sizes whose product is {jax.device_count()}, as in --mesh expert={jax.device_count()}"
        )
    if mesh.size != jax.device_count():
        raise UserError(
            f"the mesh has {mesh.size} devices, the {hosts.num_processes} processes have {jax.device_count()}; "
            "all of them have to take part: choose sizes with that product, or start fewer processes"
        )


def simulate_mesh(mesh: MeshShape, *, num_processes: int) -> None:
    """As many simulated devices here as this process has of the mesh."""
    if mesh.num_devices % num_processes:
        raise UserError(
            f"mesh {mesh} has {mesh.num_devices} devices, which {num_processes} processes do not divide: "
            "choose sizes whose product they divide"
        )
    simulate(mesh.num_devices // num_processes)


@contextlib.contextmanager
def joined(options: argparse.Namespace) -> Iterator[Hosts]:
    """The command among its other processes where there are any: process 0 prints, and an error here ends them all."""
    given = [value is not None for value in (options.coordinator, options.num_processes, options.process_id)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num-processes and --process-id belong together: give all three, or none")
    hosts = start_hosts(
        options.coordinator,
        num_processes=options.num_processes,
        process_id=options.process_id,
        join_timeout=options.join_timeout,
        silence_timeout=options.silence_timeout,
        on_loss=lambda sentence: _end(options.command, sentence),
    )
    if hosts.num_processes == 1:
        yield hosts
        return
    with _printing_alone(hosts):
        try:
            yield hosts
        except BaseException as error:
            hosts.fail(error, exit_code=exit_code(error))
            raise


@contextlib.contextmanager
def _printing_alone(hosts: Hosts) -> Iterator[None]:
    """Keeps stdout for process 0, and there for what Python prints: gloo and NCCL write to it from C++.

    NCCL speaks when NCCL_DEBUG asks it to, and is heard on stderr. Gloo, which connects CPUs, always announces itself.
    """
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    where = os.dup(1 if hosts.process_id == 0 else nowhere)
    os.dup2(nowhere if jax.config.values["jax_platforms"] == "cpu" else 2, 1)
    os.close(nowhere)
    text = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
    with open(where, "w", **text) as own, contextlib.redirect_stdout(own):
        yield


def _end(command: str, sentence: str) -> None:
    """From the watching thread: the main one may hold any lock for ever, so nothing is used that has one."""
    os.write(2, f"gptoss-jax {command}: {sentence}\n".encode())
    os._exit(EXIT_LOST)
