"""Which devices jax shall see, said before it looks. Knows jax's settings; knows no model."""

import jax

from gptoss_jax.errors import UserError
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


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> int:
    """Joins the other processes where there are any; gives their number."""
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if not any(given):
        return 1
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError("--coordinator, --num-processes and --process-id belong together: give all three, or none")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process-id is {process_id}; expected 0 to {num_processes - 1} with --num-processes {num_processes}"
        )
    jax.distributed.initialize(coordinator, num_processes, process_id)
    return num_processes


def simulate_mesh(mesh: MeshShape, *, num_processes: int) -> None:
    """As many simulated devices here as this process has of the mesh."""
    if mesh.num_devices % num_processes:
        raise UserError(
            f"mesh {mesh} has {mesh.num_devices} devices, which {num_processes} processes do not divide: "
            "choose sizes whose product they divide"
        )
    simulate(mesh.num_devices // num_processes)
