"""Steps of LoRA by gptoss_jax and by peft on transformers, on the CPU: the same weights, in the same run. Knows
commands."""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.process import module, run
from gptoss_jax.cli.terminal import table
from gptoss_jax.configs import model_config
from gptoss_jax.convert.synthetic import write_checkpoint
from gptoss_jax.model.config import ModelConfig, alternating_layers
from gptoss_jax.train.flops import step_flops

# Which trainer, on experts that lie how, in which dtype.
_ENGINES = {
    f"{engine}-{experts}-{dtype}": (engine, experts, dtype)
    for dtype in ("bfloat16", "float32")
    for engine, experts in (("ours", "mxfp4"), ("ours", "bf16"), ("peft", "bf16"))
}
_SAME_LOSS = 1e-3  # of the first step, which bfloat16 changes by 6e-5 of itself


def main() -> int:
    parser = report.parser(
        "train_cpu",
        "Writes a synthetic release of middle size, with packed experts and with the same ones unpacked, and trains\n"
        "adapters of rank 8 on attention and all experts of it, each trainer in a process of its own, in turn. Their\n"
        "first losses, of the base, must agree. The ceiling is torch's product of matrices in the same dtype.",
    )
    parser.add_argument("--rows", type=report.positive, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("--length", type=report.positive, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--steps", type=report.positive, default=3, metavar="N", help="in a round; default: %(default)s"
    )
    parser.add_argument("--rounds", type=report.positive, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--layers", type=report.positive, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--engines", type=_keys, default=tuple(_ENGINES), metavar="A,B", help=", ".join(_ENGINES))
    return report.main(_benchmark, parser.parse_args())


def _keys(text: str) -> tuple[str, ...]:
    """The type of --engines."""
    found = tuple(text.split(","))
    for key in found:
        if key not in _ENGINES:
            raise argparse.ArgumentTypeError(f"{key!r} is no engine; expected some of {', '.join(_ENGINES)}")
    return found


def _sizes(layers: int) -> ModelConfig:
    """Of 150 million parameters, whose sizes differ."""
    return dataclasses.replace(
        model_config("gpt-oss-20b"),
        layer_kinds=alternating_layers(layers),
        vocab_size=8192,
        width=640,
        expert_width=512,
        num_heads=16,
        num_kv_heads=4,
        num_experts=16,
    )


def _benchmark(options: argparse.Namespace) -> None:
    result = report.document("train_cpu", options)
    config = _sizes(options.layers)
    job = {"rows": options.rows, "length": options.length, "steps": options.steps, "rank": 8}
    result |= {"model": dataclasses.asdict(config), "job": job, "rounds": options.rounds}
    with tempfile.TemporaryDirectory(prefix="gptoss-jax-benchmark-") as scratch:
        for experts in ("mxfp4", "bf16"):
            write_checkpoint(Path(scratch, experts), config, experts=experts)
        before = _ceilings(Path(scratch), job)
        result["engines"] = _time(Path(scratch), job, options)
        after = _ceilings(Path(scratch), job)
    result["flops_per_second"] = {dtype: max(before[dtype], after[dtype]) for dtype in before}
    result["flops_per_second_before_and_after"] = [before, after]
    _stand_beside(result, _flops(config, rows=options.rows, length=options.length))
    _print(result)
    report.write(options.out, result)


def _flops(config: ModelConfig, *, rows: int, length: int) -> float:
    window = min(config.sliding_window, length)
    seen = rows * length * (length + 1) // 2
    sliding = rows * (window * (window + 1) // 2 + (length - window) * window)
    return step_flops(config, tokens=rows * length, full_keys=seen, sliding_keys=sliding, trains_all=False)


def _time(scratch: Path, job: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """In turn, so that a minute in which the machine is slow is slow for all."""
    found: dict[str, dict[str, Any]] = {key: {"rounds": []} for key in options.engines}
    for number in range(1, options.rounds + 1):
        for key, entry in found.items():
            engine, experts, dtype = _ENGINES[key]
            answer = _run(scratch, engine, job | {"model": str(scratch / experts), "dtype": dtype})
            entry |= {"first_loss": answer["losses"][0], "versions": answer["versions"]}
            entry["rounds"].append({name: answer[name] for name in ("losses", "first_seconds", "seconds")})
            report.step(f"round {number}, {key}: {statistics.median(answer['seconds']):.2f} s, {answer['losses']}")
    return found


def _run(scratch: Path, engine: str, job: dict[str, Any]) -> dict[str, Any]:
    path = scratch / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return json.loads(run(module("train_steps", engine, path)).output.splitlines()[-1])


def _ceilings(scratch: Path, job: dict[str, Any]) -> dict[str, float]:
    return {
        dtype: _run(scratch, "products", job | {"model": "", "dtype": dtype})["flops_per_second"]
        for dtype in ("bfloat16", "float32")
    }


def _stand_beside(result: dict[str, Any], flops: float) -> None:
    """Rates beside the ceiling, ratios beside peft's of the same dtype; MFU counts no product that is made anew."""
    engines, job = result["engines"], result["job"]
    result["flops_per_step"] = flops
    for key, entry in engines.items():
        seconds = statistics.median(min(each["seconds"]) for each in entry["rounds"])
        entry["tokens_per_second"] = job["rows"] * job["length"] / seconds
        entry["mfu"] = flops / seconds / result["flops_per_second"][_ENGINES[key][2]]
    losses = [entry["first_loss"] for entry in engines.values()]
    result["first_losses_agree"] = max(losses) - min(losses) < _SAME_LOSS * max(losses)
    result["ratios"] = {
        key: entry["tokens_per_second"] / engines[peer]["tokens_per_second"]
        for key, entry in engines.items()
        if key.startswith("ours") and (peer := f"peft-bf16-{_ENGINES[key][2]}") in engines
    }


def _print(result: dict[str, Any]) -> None:
    report.describe(result)
    rows = [
        (
            key,
            f"{entry['tokens_per_second']:.0f}",
            f"{entry['mfu']:.1%}",
            f"{result['ratios'][key]:.2f}" if key in result["ratios"] else "-",
            f"{entry['first_loss']:.4f}",
        )
        for key, entry in result["engines"].items()
    ]
    job = result["job"]
    columns = ("trainer, experts, dtype", "tokens/s", "MFU", "over peft", "first loss")
    table(f"LoRA of rank {job['rank']}, {job['rows']} rows of {job['length']} tokens", columns, rows)
    ceilings = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in result["flops_per_second"].items())
    print(f"Products: {ceilings}. The first losses {'agree' if result['first_losses_agree'] else 'DIFFER'}.")


if __name__ == "__main__":
    sys.exit(main())
