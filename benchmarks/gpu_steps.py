"""`gptoss-jax bench` as scripts/gpu runs it: kernels, decoding and a prompt at a model's sizes. Knows which models fit.

It needs no installed command, only the checkout and a Python with jax and flax.
"""

import argparse
import sys

import jax

from benchmarks import report
from gptoss_jax.cli import main as gptoss_jax
from gptoss_jax.configs import model_config
from gptoss_jax.errors import UserError
from gptoss_jax.model.footprint import footprint
from gptoss_jax.sharding import MeshShape

_HEADROOM = 1.08  # over weights and cache: activations of a prompt, and what is freed late


def main() -> int:
    parser = report.parser(
        "gpu_steps",
        "Runs `gptoss-jax bench` on this machine's GPU where the model fits, and says so where it does not.\n"
        "All other options go to that command.",
    )
    parser.add_argument("--model", default="gpt-oss-20b", help="default: %(default)s")
    parser.add_argument("--rows", default="1,8,64", help="default: %(default)s")
    parser.add_argument("--context", type=report.positive, default=1024, help="default: %(default)s")
    parser.add_argument("--layers", type=report.positive, help="keep only the first ones")
    options, others = parser.parse_known_args()
    options.others = others
    return report.main(_benchmark, options)


def _benchmark(options: argparse.Namespace) -> None:
    if not _fits(options):
        print(f"{options.model} does not fit {jax.devices()[0].device_kind}: not measured")
        return
    arguments = ["--model", options.model, "--rows", options.rows, "--context", str(options.context)]
    if options.layers is not None:
        arguments += ["--layers", str(options.layers)]
    if gptoss_jax(["bench", *arguments, "--out", str(options.out), *options.others]):
        raise UserError("gptoss-jax bench failed: see above")


def _fits(options: argparse.Namespace) -> bool:
    """Rows are taken one number after the other: the largest needs the most."""
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if memory is None or options.layers is not None:
        return True
    rows = max(int(word) for word in options.rows.split(","))
    held = footprint(model_config(options.model), MeshShape(), rows=rows, capacity=options.context)
    return held.total * _HEADROOM < memory


if __name__ == "__main__":
    sys.exit(main())
