"""One of several processes that meet, work together and are lost, as the tests order. Run as a script.

    worker.py PORT N I [--step STEP]...

Prints one JSON object a line.
"""

import argparse
import json
import os
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptoss_jax.errors import UserError
from gptoss_jax.hosts import agree, barrier, is_first, start_hosts, together


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port")
    parser.add_argument("num_processes", type=int)
    parser.add_argument("process_id", type=int)
    parser.add_argument("--step", action="append", default=[])
    parser.add_argument("--join-timeout", type=float, default=20)
    parser.add_argument("--silence-timeout", type=float, default=30)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    try:
        hosts = start_hosts(
            f"127.0.0.1:{options.port}",
            num_processes=options.num_processes,
            process_id=options.process_id,
            join_timeout=options.join_timeout,
            silence_timeout=options.silence_timeout,
        )
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    say(met=hosts.num_processes)
    for step in options.step:
        try:
            take(step, hosts.process_id)
        except UserError as error:
            print(error, file=sys.stderr)
            hosts.fail(error, exit_code=2)
            sys.exit(2)


def take(step: str, process_id: int) -> None:
    """A step is a name, for one process alone a name and its number: kill@1."""
    name, _, only = step.partition("@")
    if only and int(only) != process_id:
        return
    match name.split(":"):
        case ["gather"]:
            found = multihost_utils.process_allgather(np.array([process_id + 1]))
            say(gathered=np.ravel(found).tolist(), first=is_first(), devices=jax.device_count())
        case ["barrier"]:
            barrier("tests")
        case ["agree", value]:
            agree("the test's value", value)
        case ["agree-own"]:
            agree("the test's value", f"{process_id}" * 1000)
        case ["together"]:
            with together("thinking"):
                if process_id == 1:
                    raise UserError("this is wrong")
        case ["kill"]:
            say(killed=True)
            os.kill(os.getpid(), 9)
        case ["stop"]:
            say(stopped=True)
            os.kill(os.getpid(), 19)
        case ["mistake"]:
            raise UserError("the paper is empty; expected words")
        case ["bug"]:
            raise RuntimeError("a bug")
        case ["sleep", seconds]:
            time.sleep(float(seconds))


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
