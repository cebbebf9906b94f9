"""The losses of one run of 50 steps, here or as one of two processes of four devices. Script: curve.py PORT I KIND."""

import json
import sys

import jax
from jax.sharding import Mesh

from gptoss_jax.hosts import start_hosts

STEPS = 50


def losses(kind: str, mesh: Mesh | None) -> list[float]:
    """Of an "adapter" of packed experts, or of "full" training, its state cut over `data` too."""
    from gptoss_jax.train.config import OptimizerSettings
    from gptoss_jax.train.hosts import share_of
    from gptoss_jax.train.optimizer import make_optimizer
    from tests.train import cases

    config, adapter = cases.sizes(2), cases.ADAPTER if kind == "adapter" else None
    values = cases.make_values(config, experts="mxfp4" if adapter else "bf16")
    settings = OptimizerSettings(learning_rate=3e-3 if adapter else 3e-4, warmup=5, weight_decay=0.01)
    trainer = cases.make_trainer(
        cases.make_model(config, values, mesh=mesh),
        adapter=adapter,
        optimizer=make_optimizer(settings, steps=STEPS),
        fully=adapter is None,
    )
    state, share, found = trainer.start(0), share_of(mesh, len(cases.ROWS)), []
    size = len(cases.ROWS) // share.num_hosts
    for step in range(STEPS):
        rows = cases.stacked(*[cases.packed(cases.texts(seed=2 * (step % 4) + i)) for i in range(2)])
        own = jax.tree.map(lambda x: x[:, share.host * size :][:, :size], rows)
        state, metrics = trainer.step(state, cases.on_devices(own, mesh))
        found.append(float(metrics.loss))
    return found


def main() -> None:
    port, process_id, kind = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    start_hosts(f"127.0.0.1:{port}", num_processes=2, process_id=int(process_id))

    from gptoss_jax.sharding import make_mesh

    print(json.dumps(losses(kind, make_mesh(data=2, expert=2, tensor=2))))


if __name__ == "__main__":
    main()
