"""`merge`, and adapters between our folders and PEFT's: arguments in, a bar or a table out. Knows no format itself."""

import argparse
import json
import sys
import time
from pathlib import Path

from gptoss_jax.cli import devices
from gptoss_jax.cli.terminal import progress, table
from gptoss_jax.convert.adapters import adapter_kind, base_config, base_digest, load_adapter, save_adapter
from gptoss_jax.convert.export import Base, open_base
from gptoss_jax.convert.merge import Report, Survival
from gptoss_jax.convert.merge import merge as merge_folders
from gptoss_jax.convert.peft import write_peft
from gptoss_jax.errors import UserError

_WARNING = 0.5  # of an update: what is less is mostly gone


def merge(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    with progress("merging") as show:
        report = merge_folders(
            Path(options.checkpoint),
            Path(options.adapter),
            Path(options.destination),
            layout=options.format,
            experts=options.experts,
            rule=options.scale_rule,
            on_progress=show,
        )
    if options.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        _print_report(report)
    print(f"{options.destination}: written in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return 0


def _print_report(report: Report) -> None:
    """Layers down, matrices across; and what to do where much is lost."""
    rows: dict[str, dict[str, str]] = {}
    for path, survival in report.matrices.items():
        _, layer, _, target = path.split(".")
        rows.setdefault(layer, {})[target] = _cell(survival)
    targets = list(dict.fromkeys(target for row in rows.values() for target in row))
    stored = report.experts if report.rule is None else f"{report.experts}, scales by {report.rule}"
    print(f"Retained of each update ± the noise of rounding; experts {stored}:")
    table(
        "",
        ["layer", *targets],
        [[layer, *(row.get(target, "") for target in targets)] for layer, row in rows.items()],
    )
    lost = [path for path, survival in report.matrices.items() if survival.retained < _WARNING]
    if lost:
        print(
            f"{len(lost)} of {len(report.matrices)} matrices keep less than half of their update, the first is "
            f"{lost[0]}: merge with --experts bf16, serve the adapter beside its base, or train it merged",
            file=sys.stderr,
        )


def _cell(survival: Survival) -> str:
    return f"{survival.retained:.1%} ± {survival.noise:.1%}" if survival.update else "no update"


def export_adapter(options: argparse.Namespace) -> int:
    """`export ADAPTER DST --format peft`: ours, or one of PEFT's made uniform for vLLM."""
    devices.simulate(1)
    source, destination = Path(options.checkpoint), Path(options.destination)
    if adapter_kind(source) == "peft" and options.base is None:
        raise UserError(f"{source} is a PEFT adapter, which does not say the sizes of its base: name it with --base")
    base = None if options.base is None else open_base(Path(options.base))
    config = base_config(source) if base is None else base.config
    adapter = load_adapter(source, config, base_digest=_digest(base))
    write_peft(destination, adapter, config=config, dtype=options.dtype, base_model=options.base_name)
    print(f"{destination}: written; rank {adapter.spec.rank}, {_described(adapter.spec.targets)}", file=sys.stderr)
    return 0


def convert_adapter(options: argparse.Namespace) -> int:
    """`convert PEFT DST --base CKPT`: into a folder of ours."""
    devices.simulate(1)
    source, destination = Path(options.source), Path(options.destination)
    if options.base is None:
        raise UserError(f"{source} is an adapter; ours say for which base: name it with --base")
    base = open_base(Path(options.base))
    digest = base_digest(base)
    adapter = load_adapter(source, base.config, base_digest=digest)
    save_adapter(destination, adapter, config=base.config, base_digest=digest)
    print(f"{destination}: written; rank {adapter.spec.rank}, {_described(adapter.spec.targets)}", file=sys.stderr)
    return 0


def _digest(base: Base | None) -> str | None:
    return None if base is None else base_digest(base)


def _described(targets: tuple[str, ...]) -> str:
    return f"of {', '.join(targets)}"
