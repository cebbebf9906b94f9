"""Whether a launcher (SLURM, Open MPI, Kubernetes, a TPU pod) started this process with others. Opens no connection.

jax knows the launchers; this adds when not to believe them. It is the one place below the command line that reads the
environment, since that is how launchers speak.
"""

import dataclasses
import os

from jax._src.clusters import ClusterEnv, K8sCluster, SlurmCluster

from gptoss_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seat:
    """This process among those of its job."""

    coordinator: str | None
    num_processes: int
    process_id: int


def find_seat(*, timeout: float) -> Seat | None:
    """What the launcher says; None for a process that was started alone.

    Raises:
        UserError: there is a launcher that does not say enough.
    """
    for launcher in ClusterEnv._cluster_types:  # what jax.distributed.initialize asks, in the same order
        if launcher.opt_in_only_method or _surely_alone(launcher) or not launcher.is_env_present():
            continue
        try:
            num_processes = launcher.get_process_count()
            if num_processes == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS") or launcher.get_coordinator_address(
                timeout_secs=int(timeout), override_coordinator_port=port
            )
            return Seat(coordinator=coordinator, num_processes=num_processes, process_id=launcher.get_process_id())
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"{launcher.__name__} is here and does not say who its processes are ({error}): "
                "give --coordinator, --num-processes and --process-id"
            ) from error
    return None


def own_devices(rank: int, neighbours: int) -> list[int] | None:
    """The GPUs of process `rank` among `neighbours` that a launcher put on one host; None for all that it sees.

    One each, unless the launcher has dealt them out already, so that each sees fewer than there are processes.
    """
    if neighbours == 1 or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("ROCR_VISIBLE_DEVICES"))
    if visible is not None and len(visible.split(",")) < neighbours:
        return None
    return [rank]


def _surely_alone(launcher: type[ClusterEnv]) -> bool:
    if launcher is SlurmCluster:
        # An interactive `salloc --ntasks 4` is itself a step, of one task, in a job of four.
        return os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1"
    if launcher is K8sCluster:
        # Every pod has a Kubernetes around it; only those of an Indexed Job have others of their kind.
        return "JOB_COMPLETION_INDEX" not in os.environ
    return False
