"""The options that several commands share, and what a command's parser is. Knows words and help; imports no jax."""

import argparse
from pathlib import Path
from typing import TypeAlias

from gptoss_jax import nano

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Arguments: TypeAlias = argparse.ArgumentParser | argparse._ArgumentGroup


def command(
    commands: Commands, name: str, run: str, *, help: str, description: str | None = None
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=description or f"{help[0].upper()}{help[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def checkpoint(parser: Arguments, *, default: str | None = None) -> None:
    """The model of a command; "nano" is the one in this package, and commands may have it as their default."""
    shown = f"; default: {default}" if default else f"; {nano.NAME} is the one that comes with this package"
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        type=nano.find,
        nargs="?" if default else None,
        default=default,
        help="a converted checkpoint, or a released folder" + shown,
    )


def engine(parser: argparse.ArgumentParser, *, max_rows: int) -> None:
    """What cli/serving.py opens."""
    model = parser.add_argument_group("the model")
    model.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    dense(model)
    mesh(model, default=None, help="shard over this mesh; auto chooses one and says why")
    impl(model)
    dispatch(model)
    embedding(model)
    model.add_argument("--host-devices", type=int, metavar="N", help="simulate N devices on the CPU, in each process")
    engine = parser.add_argument_group("the engine")
    engine.add_argument(
        "--max-rows", type=int, default=max_rows, metavar="N", help="requests that run at a time; default: %(default)s"
    )
    engine.add_argument(
        "--max-context", type=int, metavar="N", help="tokens of a conversation; default: what model and cache allow"
    )
    engine.add_argument(
        "--cache-tokens", type=int, metavar="N", help="of all conversations; default: --max-context, or 32768 or more"
    )
    engine.add_argument("--cache-bytes", type=int, metavar="N", help="on each device, instead of --cache-tokens")
    engine.add_argument("--kv-dtype", choices=("int8",), help="of keys and values; default: the model's")
    engine.add_argument(
        "--prefill-tokens", type=int, default=512, metavar="N", help="of prompts in a step; default: %(default)s"
    )
    engine.add_argument(
        "--draft-tokens", type=int, default=0, metavar="N", help="ids that a step guesses and checks; default: none"
    )
    engine.add_argument(
        "--batch-invariant", action="store_true", help="scores are the same to the bit whatever runs beside"
    )


def processes(parser: argparse.ArgumentParser, *, shared: str) -> None:
    group = parser.add_argument_group(
        "several processes",
        f"Each has {shared}; process 0 prints.\n"
        "SLURM, Open MPI, indexed Kubernetes jobs and TPU pods say who is who; elsewhere the first three do:",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="I", help="0 to N-1")
    group.add_argument(
        "--join-timeout", type=float, default=300.0, metavar="SECONDS", help="for all to come; default: %(default)g"
    )
    group.add_argument(
        "--silence-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="after which a process that gives no sign of life is lost, and the others end; default: %(default)g",
    )


def adapter(parser: Arguments) -> None:
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="put a trained adapter, ours or PEFT's, to work")


def mesh(parser: Arguments, *, default: str | None, help: str) -> None:
    shown = f"; default: {default}" if default else ""
    parser.add_argument("--mesh", metavar="data=1,expert=4,tensor=2", default=default, help=help + shown)


def drawing(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; default: %(default)s")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K best ids; default: all")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="only the best ids that add up to P; default: all"
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="only ids P times as likely as the best; default: all"
    )


def sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    drawing(group)
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="divides scores of ids in the prompt or generated; default: 1, none",
    )
    group.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="is taken from scores of generated ids; default: 0, none",
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="is taken as often as an id was generated; default: 0, none",
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        metavar="ID=VALUE",
        help="is added to the score of an id; may be given several times",
    )
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def impl(parser: Arguments) -> None:
    parser.add_argument(
        "--impl",
        metavar="NAME",
        help="which kernels run: xla, cpu, gpu, tpu, or moe_matmul=gpu,linear=xla; default: the best for the devices",
    )


def dense(parser: Arguments) -> None:
    parser.add_argument(
        "--dense",
        choices=("bf16", "int8"),
        default="bf16",
        help="weights of attention and unembedding: int8 rounds them to 8 bits, on one device; default: %(default)s",
    )


def embedding(parser: Arguments) -> None:
    parser.add_argument(
        "--embedding",
        choices=("device", "host"),
        default="device",
        help="the memory its table lies in: host leaves 1.16 GB more on a device; default: %(default)s",
    )


def dispatch(parser: Arguments) -> None:
    parser.add_argument(
        "--dispatch",
        metavar="WAY",
        help="how tokens reach their experts on a mesh: reduce, exchange or ragged; default: by their number",
    )


def scale_rule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scale-rule",
        choices=("even", "floor", "up"),
        default="even",
        help="block scales where bf16 experts are packed; default: %(default)s",
    )
