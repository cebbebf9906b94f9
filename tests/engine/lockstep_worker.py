"""One of two processes with two devices each that share an engine. Run as a script: lockstep_worker.py PORT I.

Process 0 prints the ids of its requests, and both how many steps they executed.
"""

import json
import sys

import jax

from gptoss_jax.hosts import is_first, start_hosts


def main() -> None:
    port, process_id = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    start_hosts(f"127.0.0.1:{port}", num_processes=2, process_id=int(process_id))

    from gptoss_jax.engine import runner
    from gptoss_jax.engine.engine import Engine, follow
    from gptoss_jax.sharding import make_mesh
    from tests.engine.lockstep_model import ADAPTERS, REQUESTS, SETTINGS, make_model

    steps = []
    execute = runner.Runner.execute
    runner.Runner.execute = lambda self, step, *masks: (steps.append(step.program), execute(self, step, *masks))[1]
    model = make_model(*ADAPTERS, mesh=make_mesh(expert=2, tensor=2))
    ids = None
    if is_first():
        with Engine(model, settings=SETTINGS, adapters=tuple(ADAPTERS)) as engine:
            streams = [engine.submit(request) for request in REQUESTS]
            ids = [[answer.ids for answer in stream.result()] for stream in streams]
    else:
        follow(model, settings=SETTINGS, adapters=tuple(ADAPTERS))
    print(json.dumps({"ids": ids, "steps": len(steps)}))


if __name__ == "__main__":
    main()
