"""`bench`: measures kernels, steps and an engine on the devices here, tunes block sizes. Knows options and tables."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax import checkpoint
from gptoss_jax.bench import kernels, report, serving_plot, steps
from gptoss_jax.bench.ceilings import Ceilings, measure_ceilings
from gptoss_jax.bench.tune import Trial, tune
from gptoss_jax.cli import bench_engine, devices
from gptoss_jax.cli.terminal import size, table
from gptoss_jax.configs import model_config
from gptoss_jax.errors import UserError
from gptoss_jax.kernels import tuned
from gptoss_jax.kernels.choose import has_blocks
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.implementations import Implementations, platform_of
from gptoss_jax.model.layers import check_dense
from gptoss_jax.model.transformer import Experts, GptOss
from gptoss_jax.sharding import MeshShape, make_mesh

_STANDARD = ("kernels", "decode", "prefill")
_PARTS = (*_STANDARD, *bench_engine.PARTS)
_MATRIX_SIZE, _CPU_MATRIX_SIZE = 8192, 2048  # few cores are full with less: 8192 took two of them ten minutes
_PROMPT, _REQUEST_PROMPT = 2048, 256  # tokens, where nothing is said: of a prompt alone, and of a request's


def run(options: argparse.Namespace) -> int:
    options = argparse.Namespace(**vars(options) | _parsed(options))
    parts = _check(options)
    for_engine = [part for part in parts if part in bench_engine.PARTS]
    if options.host_devices is not None:
        devices.simulate(options.host_devices)
    config, options.expert_format = _sizes(options)
    if for_engine:
        bench_engine.check(options, for_engine, config)
    shape = MeshShape() if options.mesh is None else MeshShape.parse(options.mesh)
    check_dense(options.dense, num_devices=shape.num_devices)
    implementations = Implementations.parse(options.impl, platform=platform_of(None), num_devices=shape.num_devices)
    result = report.frame() | {"benchmark": "bench", "model": _name(options), "layers": config.num_layers}
    result |= {"dtype": options.dtype, "experts": options.expert_format, "dense": options.dense, "mesh": options.mesh}
    result["impl"] = dataclasses.asdict(implementations)
    _say(f"{result['device']['kind']}: measuring its memory and arithmetic")
    ceilings = measure_ceilings(
        buffer_bytes=options.buffer_bytes,
        matrix_size=options.matrix_size or (_CPU_MATRIX_SIZE if platform_of(None) == "cpu" else _MATRIX_SIZE),
        dtype=options.dtype,
        budget=options.seconds,
    )
    result["ceilings"] = dataclasses.asdict(ceilings)
    if options.tune:
        result["tuned"] = _tune(options, config, implementations)
    if "kernels" in parts:
        result["kernels"] = list(_kernels(options, config, implementations, ceilings))
    if set(parts) - {"kernels"}:
        model = _model(options, config)
        result |= _steps(options, model, ceilings, parts)
        if for_engine:
            result |= bench_engine.measure(options, for_engine, model, ceilings, say=_say)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        serving_plot.plot(result, options.plot)
    if options.json:
        print(json.dumps(result))
    else:
        _print(result)
    return 0


def _check(options: argparse.Namespace) -> Sequence[str]:
    parts = options.parts or _STANDARD
    for part in parts:
        if part not in _PARTS:
            raise UserError(f"bench knows no {part!r}; expected one or more of {', '.join(_PARTS)}")
    if options.tune and "kernels" not in parts:
        raise UserError("--tune looks for block sizes of kernels, which are not measured: add `kernels`")
    for name in ("context", "prompt", "seconds", "buffer_bytes", "matrix_size", "trials"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected more than 0")
    if options.tuned_folder is not None and not options.tuned_folder.is_dir():
        raise UserError(f"--tuned-folder {options.tuned_folder} is no folder; create it, or name another")
    if options.plot is not None:
        serving_plot.check_plot(options.plot)
        if not set(parts) & set(serving_plot.PLOTTED):
            raise UserError(
                f"--plot draws {' and '.join(serving_plot.PLOTTED)}, which are not measured: add one of them"
            )
    return parts


def _parsed(options: argparse.Namespace) -> dict[str, Any]:
    """Options that mean more than they say."""
    return {
        "rows": _counts("--rows", options.rows),
        "concurrency": _counts("--concurrency", options.concurrency),
        "rates": None if options.rates is None else _rates(options.rates),
        "prompt": _PROMPT if options.prompt is None else options.prompt,
        "request_prompt": _REQUEST_PROMPT if options.prompt is None else options.prompt,
    }


def _rates(text: str) -> list[float]:
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise UserError(f"--rates is {text!r}; expected requests per second separated by commas, as in 0.5,1,2")
    return rates


def _counts(name: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"{name} is {text!r}; expected counts separated by commas, as in 1,8,64")
    return [int(word) for word in words]


def _sizes(options: argparse.Namespace) -> tuple[ModelConfig, Experts]:
    """Of the model, and how its experts are stored."""
    if options.checkpoint is not None:
        if options.layers is not None:
            raise UserError("--layers cuts a model with random weights; give it without --checkpoint")
        return checkpoint.sizes(options.checkpoint)
    config = model_config(options.model)
    if options.layers is None:
        return config, options.expert_format
    if options.layers > config.num_layers:
        raise UserError(f"--layers is {options.layers}; {options.model} has {config.num_layers}")
    return dataclasses.replace(config, layer_kinds=config.layer_kinds[: options.layers]), options.expert_format


def _name(options: argparse.Namespace) -> str:
    return options.model if options.checkpoint is None else options.checkpoint.resolve().name


def _model(options: argparse.Namespace, config: ModelConfig) -> GptOss:
    mesh = None if options.mesh is None else make_mesh(**dataclasses.asdict(MeshShape.parse(options.mesh)))
    settings = {"mesh": mesh, "dtype": jnp.dtype(options.dtype), "dense": options.dense, "impl": options.impl}
    if options.checkpoint is not None:
        _say(f"{_name(options)}, {config.num_layers} layers: loading")
        return checkpoint.load(options.checkpoint, **settings)
    _say(f"{options.model}, {config.num_layers} layers: making random weights")
    return steps.random_model(config, experts=options.expert_format, **settings)


def _cases(options: argparse.Namespace, config: ModelConfig, impl: Implementations) -> list[kernels.Case]:
    return list(
        kernels.cases(
            config,
            impls=dataclasses.asdict(impl),
            rows=options.rows,
            context=options.context,
            prompt=options.prompt,
            dtype=options.dtype,
            packed=options.expert_format == "mxfp4",
            dense=options.dense,
        )
    )


def _kernels(
    options: argparse.Namespace, config: ModelConfig, impl: Implementations, ceilings: Ceilings
) -> list[dict[str, Any]]:
    found = []
    for case in _cases(options, config, impl):
        name = getattr(impl, case.op)
        _say(f"{case.op} ({name}): {case.name}")
        door = kernels.door(case, name, jax.devices()[0].device_kind)
        seconds = case.seconds(door, budget=options.seconds)
        least = ceilings.seconds(nbytes=case.nbytes, flops=case.flops)
        found.append(
            {
                "op": case.op,
                "impl": name,
                "case": case.name,
                "seconds": seconds,
                "bytes": case.nbytes,
                "flops": case.flops,
                "bytes_per_second": case.nbytes / seconds,
                "flops_per_second": case.flops / seconds,
                "share_of_roof": least / seconds,
            }
        )
    return found


def _tune(options: argparse.Namespace, config: ModelConfig, impl: Implementations) -> list[dict[str, Any]]:
    device_kind = jax.devices()[0].device_kind
    found = []
    for op, name in dataclasses.asdict(impl).items():
        if not has_blocks(name):
            _say(f"{op}: {name!r} has no block sizes; nothing to tune")
            continue
        _say(f"{op} ({name}): tuning")
        trials: list[Trial] = []
        best = tune(
            [case for case in _cases(options, config, impl) if case.op == op],
            name,
            device_kind=device_kind,
            dtype=options.dtype,
            budget=options.seconds / 4,
            most_trials=options.trials,
            on_trial=lambda trial, trials=trials: _note(trial, trials),
        )
        base = name.removesuffix("-interpret")
        path = tuned.save(op, base, best, device_kind=device_kind, folder=options.tuned_folder)
        _say(f"{op} ({name}): {json.dumps(best)}, filed in {path.name}")
        tried = [dataclasses.asdict(trial) for trial in trials]
        found.append({"op": op, "impl": name, "best": best, "trials": tried})
    return found


def _note(trial: Trial, trials: list[Trial]) -> None:
    trials.append(trial)
    time = "cannot be had" if trial.seconds is None else f"{trial.seconds * 1e6:.1f} µs"
    _say(f"  {trial.form} {dict(trial.sizes)}: {time}")


def _steps(
    options: argparse.Namespace, model: GptOss, ceilings: Ceilings, parts: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    num_devices = 1 if model.mesh is None else model.mesh.size

    def entry(step: steps.Step) -> dict[str, Any]:
        least = ceilings.seconds(nbytes=step.nbytes, flops=step.flops / num_devices)
        return dataclasses.asdict(step) | {
            "tokens_per_second": step.tokens_per_second,
            "roof_tokens_per_second": step.rows * step.tokens / least,
            "share_of_roof": least / step.seconds,
        }

    found: dict[str, list[dict[str, Any]]] = {}
    if "decode" in parts:
        found["decode"] = []
        for rows in options.rows:
            _say(f"decoding {rows} rows after {options.context} tokens")
            found["decode"].append(
                entry(steps.decode(model, rows=rows, context=options.context, budget=options.seconds))
            )
    if "prefill" in parts:
        _say(f"a prompt of {options.prompt} tokens")
        found["prefill"] = [entry(steps.prefill(model, tokens=options.prompt, budget=options.seconds))]
    return found


def _print(result: dict[str, Any]) -> None:
    found, ceilings = result["device"], result["ceilings"]
    print(f"{found['count']} × {found['kind']}, {result['model']}, {result['layers']} layers, {result['dtype']}")
    print(
        f"at best, measured: {size(max(ceilings['copied'], ceilings['read']))}/s, "
        f"{ceilings['flops'] / 1e12:.4g} TFLOP/s in {result['dtype']}\n"
    )
    if "kernels" in result:
        rows = [
            [
                f"{entry['op']} ({entry['impl']}): {entry['case']}",
                f"{entry['seconds'] * 1e6:.1f} µs",
                f"{size(entry['bytes_per_second'])}/s",
                f"{entry['flops_per_second'] / 1e12:.4g}",
                f"{entry['share_of_roof']:.1%}",
            ]
            for entry in result["kernels"]
        ]
        table("kernels", ("call", "time", "memory", "TFLOP/s", "of the roof"), rows)
    for part in ("decode", "prefill"):
        rows = [
            [
                f"{entry['rows']} × {entry['tokens']} after {entry['context']}",
                f"{entry['seconds'] * 1e3:.3f} ms",
                f"{entry['tokens_per_second']:.1f}",
                f"{entry['roof_tokens_per_second']:.1f}",
                f"{entry['share_of_roof']:.1%}",
            ]
            for entry in result.get(part, [])
        ]
        if rows:
            table(part, ("rows × tokens", "a step", "tokens/s", "at best", "of the roof"), rows)
    bench_engine.show(result)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
