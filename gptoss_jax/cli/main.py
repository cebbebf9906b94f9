"""The parser of every command, and what an error looks like. Imports no jax: `--help` answers at once."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import gptoss_jax
from gptoss_jax import nano
from gptoss_jax.cli import exit_codes, options
from gptoss_jax.cli.options import Commands
from gptoss_jax.errors import UserError

# What `serve` imports that the package itself does not depend on; the other commands do without their extras.
_OF_SERVE = frozenset({"fastapi", "jsonschema", "llguidance", "prometheus_client", "pydantic", "starlette", "uvicorn"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code.

    0 is success, 1 a check that failed (`verify`), 2 input that cannot be used, 3 another process that was lost,
    130 Ctrl-C, 141 a closed pipe.
    """
    parsed = _parsed(_parser(), arguments)
    module, function = parsed.run.split(":")
    try:
        return getattr(importlib.import_module(f"gptoss_jax.cli.{module}"), function)(parsed)
    except UserError as error:
        print(f"gptoss-jax {parsed.command}: {error}", file=sys.stderr)
        return exit_codes.USER_ERROR
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _OF_SERVE:
            raise  # a mistake of ours, or half an installation: the traceback says more
        how = 'pip install "gptoss-jax[serve]"'
        print(f"gptoss-jax {parsed.command}: {missing} is not installed; {how} brings it", file=sys.stderr)
        return exit_codes.USER_ERROR
    except BrokenPipeError:  # the reader, `head` say, has seen enough; and Python would complain again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.BROKEN_PIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"gptoss-jax {parsed.command}: {where}{error.strerror or error}", file=sys.stderr)
        return exit_codes.USER_ERROR
    except KeyboardInterrupt:
        hint = "; the same command goes on from here" if parsed.command in ("convert", "train") else ""
        print(f"\ngptoss-jax {parsed.command}: interrupted{hint}", file=sys.stderr)
        return exit_codes.INTERRUPTED


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """KEY=VALUE may stand behind options too, where argparse, for a command of commands, no longer expects it."""
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (parsed.command != "train" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptoss-jax",
        description="Convert, check and run OpenAI's gpt-oss models in JAX.",
        epilog="gptoss-jax COMMAND --help says more. First time: gptoss-jax demo",
    )
    parser.add_argument("--version", action="version", version=f"gptoss-jax {gptoss_jax.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        _demo,
        _init,
        _convert,
        _export,
        _verify,
        _merge,
        _inspect,
        _plan,
        _generate,
        _chat,
        _serve,
        _eval,
        _train,
        _plot,
        _bench,
    ):
        add(commands)
    return parser


def _demo(commands: Commands) -> None:
    parser = options.command(
        commands,
        "demo",
        "demo:run",
        help="convert the small model onto simulated devices, and ask it something",
        description="Takes gpt-oss-nano, which comes with the package in the released layout, converts it onto a mesh\n"
        "of simulated CPU devices with its experts sharded, asks it a few things, and shows what lies where.",
    )
    parser.add_argument(
        "--model",
        default=nano.NAME,
        help="or another model's name: its sizes with random weights; default: %(default)s",
    )
    parser.add_argument("--mesh", default="data=1,expert=4,tensor=2", help="default: %(default)s")
    parser.add_argument("--keep", metavar="DIR", help="keep the folders it makes in DIR")
    parser.add_argument("--max-new-tokens", type=int, default=150, metavar="N", help="default: %(default)s")


def _init(commands: Commands) -> None:
    parser = options.command(
        commands,
        "init",
        "weights:init",
        help="write a synthetic checkpoint of the released layout",
        description="Writes a checkpoint in the exact released layout with random, numerically sane weights and a\n"
        "byte tokenizer: a stand-in of any size where the real one cannot be downloaded.",
    )
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument("--model", required=True, help="gpt-oss-20b, gpt-oss-120b, tiny, …")
    parser.add_argument("--layers", type=int, metavar="N", help="keep only the first N layers")
    parser.add_argument("--experts", type=int, metavar="N", help="give every layer N experts")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--layout", choices=("hf", "original"), default="hf", help="default: %(default)s")
    parser.add_argument("--expert-format", choices=("mxfp4", "bf16"), default="mxfp4", help="default: %(default)s")


def _convert(commands: Commands) -> None:
    parser = options.command(
        commands,
        "convert",
        "weights:convert",
        help="convert a release (Hugging Face or original/) into a sharded Orbax checkpoint",
        description="Converts a Hugging Face folder or OpenAI's original/ folder into a sharded Orbax checkpoint.\n"
        "Memory stays bounded, and every tensor byte for byte. Interrupted, the same command goes on where it was;\n"
        "meanwhile the work is in DST.unfinished. No accelerator is used. A folder of PEFT's with an adapter becomes\n"
        "one of ours.",
    )
    parser.add_argument("source", metavar="SRC", type=nano.find, help="a folder with config.json and *.safetensors")
    parser.add_argument("destination", metavar="DST", help="a folder that does not exist yet")
    options.mesh(
        parser, default="data=1,expert=1,tensor=1", help="cut files for this mesh (any other can load them too)"
    )
    parser.add_argument("--experts", choices=("mxfp4", "bf16"), help="how to store experts; default: as they are")
    options.scale_rule(parser)
    parser.add_argument("--base", metavar="CKPT", type=nano.find, help="of an adapter: the model that it belongs to")
    options.processes(parser, shared="SRC and DST on a shared disk")


def _export(commands: Commands) -> None:
    parser = options.command(
        commands,
        "export",
        "weights:export",
        help="write a checkpoint back as a Hugging Face or original/ folder",
        description="Writes a converted checkpoint back as a folder that transformers (hf) or OpenAI's loader\n"
        "(original) takes. MXFP4 checkpoints come back byte for byte. An adapter becomes a folder that PEFT,\n"
        "transformers and vLLM take (peft).",
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=nano.find, help="a converted checkpoint, or an adapter")
    parser.add_argument("destination", metavar="DST", help="a folder that does not exist yet")
    parser.add_argument("--format", choices=("hf", "original", "peft"), required=True)
    parser.add_argument("--experts", choices=("mxfp4", "bf16"), help="how to store experts; default: as they are")
    options.scale_rule(parser)
    adapter = parser.add_argument_group("of an adapter")
    adapter.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    adapter.add_argument(
        "--base", metavar="CKPT", type=nano.find, help="the model that it belongs to, to be compared with"
    )
    adapter.add_argument("--base-name", metavar="NAME", help="what PEFT's file calls that model")


def _merge(commands: Commands) -> None:
    parser = options.command(
        commands,
        "merge",
        "merge:merge",
        help="add an adapter to its model, as a Hugging Face or original/ folder",
        description="Writes a release in which the adapter has been added to the weights, and says how much of each\n"
        "update is left after rounding. What the adapter does not change comes out byte for byte.",
    )
    options.checkpoint(parser)
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder of ours, or of PEFT's")
    parser.add_argument("destination", metavar="DST", help="a folder that does not exist yet")
    parser.add_argument("--format", choices=("hf", "original"), default="hf", help="default: %(default)s")
    parser.add_argument(
        "--experts", choices=("mxfp4", "bf16"), help="default: as they are, or bf16 if the adapter changes them"
    )
    parser.add_argument(
        "--scale-rule",
        choices=("reuse", "even", "floor", "up"),
        help="of experts that become MXFP4; default: the base's own scales (reuse), even where it has none",
    )
    parser.add_argument("--json", action="store_true", help="what is left of the adapter, for machines")


def _verify(commands: Commands) -> None:
    parser = options.command(
        commands,
        "verify",
        "weights:verify",
        help="find damage in a checkpoint, down to one bit",
        description="Reads every file of a checkpoint and compares it with the manifest. A fault names the tensor,\n"
        "and the exit code is 1.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a converted checkpoint")
    parser.add_argument("--against", metavar="SRC", help="compare with the release it came from too, by SHA-256")


def _inspect(commands: Commands) -> None:
    parser = options.command(
        commands, "inspect", "weights:inspect", help="show config, tensors, sizes and shardings of a folder"
    )
    parser.add_argument(
        "path", metavar="PATH", type=nano.find, help="a converted checkpoint, a Hugging Face or an original/ folder"
    )
    options.mesh(parser, default=None, help="show where each parameter would lie on this mesh")
    parser.add_argument("--json", action="store_true", help="for machines")


def _generate(commands: Commands) -> None:
    parser = options.command(
        commands,
        "generate",
        "text:generate",
        help="continue a text",
        description="Continues a text, streaming to stdout; time to first token and tokens per second go to stderr.\n"
        "The text is taken as it is: no chat format is put around it.",
    )
    options.checkpoint(parser)
    parser.add_argument("text", metavar="TEXT", nargs="?", help="the prompt; - reads it from stdin")
    parser.add_argument("--tokens", metavar="IDS", help="the prompt as ids: 1,2,3")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    options.adapter(parser)
    options.sampling(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    options.dense(parser)
    options.mesh(parser, default=None, help="shard over this mesh; auto chooses one and says why")
    options.impl(parser)
    options.dispatch(parser)
    options.embedding(parser)
    parser.add_argument("--host-devices", type=int, metavar="N", help="simulate N devices on the CPU, in each process")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end, for machines")
    options.processes(parser, shared="the same arguments and the same checkpoint")


def _chat(commands: Commands) -> None:
    parser = options.command(
        commands,
        "chat",
        "chat:run",
        help="talk with a model in the terminal",
        description="A conversation in the harmony format: the answer streams, reasoning is dimmed, Ctrl-C stops the\n"
        "answer. /help says what can be typed. With --prompt, or where stdout is no terminal, only the answer goes to\n"
        "stdout.",
    )
    options.checkpoint(parser, default=nano.NAME)
    parser.add_argument("--prompt", metavar="TEXT", help="print the answer to this, and leave; - reads it from stdin")
    parser.add_argument("--system", metavar="TEXT|@FILE", help="instructions that stand before the conversation")
    parser.add_argument("--effort", choices=("low", "medium", "high"), default="medium", help="default: %(default)s")
    parser.add_argument(
        "--tools", metavar="TOOL,…", help="what the model may use: python, browser=DIR (a folder that it searches)"
    )
    parser.add_argument("--date", metavar="YYYY-MM-DD", help="what the model is told; none for no date; default: today")
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a conversation that /save wrote")
    options.adapter(parser)
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer; default: as the context leaves")
    sampling = parser.add_argument_group("sampling")
    options.drawing(sampling)
    sampling.add_argument("--seed", type=int, help="of the first answer; default: another one each time")
    options.engine(parser, max_rows=1)
    options.processes(parser, shared="the same arguments and the same checkpoint")


def _serve(commands: Commands) -> None:
    parser = options.command(
        commands,
        "serve",
        "serve:run",
        help="serve a model to OpenAI's clients, with a page to chat",
        description="Serves /v1/responses, /v1/chat/completions, /v1/completions and more (docs/server.md), and a\n"
        "page at /. It listens at once; /ready is 200 when the model is loaded. SIGINT or SIGTERM lets answers finish.",
    )
    options.checkpoint(parser, default=nano.NAME)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all networks; default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free; default: %(default)s")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call the model; default: CKPT's last part")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="a trained adapter, ours or PEFT's, which requests choose as the model NAME, by default DIR's last part; "
        "may be given several times",
    )
    _serve_answers(parser)
    _serve_clients(parser)
    server = parser.add_argument_group("the server")
    server.add_argument("--no-page", dest="page", action="store_false", help="no page at /")
    server.add_argument(
        "--shutdown-seconds", type=float, default=30.0, metavar="S", help="for answers to finish; default: %(default)g"
    )
    server.add_argument(
        "--max-body-bytes", type=int, default=8 << 20, metavar="N", help="of a request; default: %(default)s"
    )
    server.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="default: info"
    )
    server.add_argument("--access-log", action="store_true", help="a line for each request: address, path, status")
    options.engine(parser, max_rows=16)
    options.processes(parser, shared="the same arguments and the same checkpoint")


def _serve_answers(parser: argparse.ArgumentParser) -> None:
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--effort", choices=("low", "medium", "high"), default="medium", help="where none is asked for; default: medium"
    )
    answers.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="of any answer; default: what the context leaves"
    )
    answers.add_argument(
        "--tools", metavar="TOOL,…", help="what requests may have run here: python, browser=DIR (a folder it searches)"
    )
    answers.add_argument(
        "--date", metavar="YYYY-MM-DD", help="what the model is told; none for no date; default: today, when it starts"
    )
    answers.add_argument(
        "--store", metavar="FILE|none", help="where responses are kept; default: in memory, until the server ends"
    )
    answers.add_argument(
        "--lenient-schemas", action="store_true", help="keywords that cannot be enforced are left out, not refused"
    )


def _serve_clients(parser: argparse.ArgumentParser) -> None:
    who = parser.add_argument_group(
        "who may ask", "Keys also come from the environment: GPTOSS_JAX_API_KEYS, with commas between them."
    )
    who.add_argument("--api-key", action="append", default=[], metavar="KEY", help="may be given several times")
    who.add_argument("--api-key-file", type=Path, metavar="FILE", help="a key in each line; others do not see it in ps")
    who.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN", help="whose pages may ask from a browser; * all"
    )
    who.add_argument(
        "--trusted-host",
        action="append",
        default=[],
        metavar="NAME",
        help="of this server in requests; * any; default: any, or on a loopback address without a key that address",
    )


def _eval(commands: Commands) -> None:
    parser = options.command(
        commands,
        "eval",
        "evaluate:run",
        help="score texts and multiple choice by log-likelihood",
        description="Scores each line of a file of JSON objects. Of a text, how likely the model finds it:\n"
        '  {"text": "…"}  or  {"tokens": [1, 2, 3]}\n'
        "Of a question, which choice it finds the likeliest continuation of the context:\n"
        '  {"context": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}\n'
        "Progress goes to stderr. docs/evaluation.md says what the numbers are.",
    )
    options.checkpoint(parser)
    parser.add_argument("file", metavar="FILE", type=Path, help="one JSON object in each line")
    options.adapter(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, as JSON")
    parser.add_argument("--lines-out", type=Path, metavar="FILE", help="write each line's result there, as JSONL")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens seen at once; a longer text is scored in windows that overlap by half; default: the model's most",
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=2048, metavar="N", help="positions of one step; default: %(default)s"
    )
    parser.add_argument(
        "--no-batch-exact",
        dest="batch_exact",
        action="store_false",
        help="let texts share steps also where a text's last bits then depend on the others; short texts are faster so",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    options.dense(parser)
    options.mesh(parser, default=None, help="shard over this mesh")
    options.impl(parser)
    options.dispatch(parser)
    options.embedding(parser)
    parser.add_argument("--host-devices", type=int, metavar="N", help="simulate N devices on the CPU, in each process")
    options.processes(parser, shared="the same arguments, file and checkpoint")


def _train(commands: Commands) -> None:
    parser = options.command(
        commands,
        "train",
        "train:train",
        help="fine-tune a model: an adapter over packed weights, or all of it",
        description="Trains as a configuration says, a TOML file or the name of one of ours; KEY=VALUE behind it\n"
        "replaces a setting, as in loop.steps=200. Interrupted or killed, the same command goes on from the newest\n"
        "save. What comes of it is RUN/adapter or RUN/model; RUN/log.jsonl has a line for every step.",
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="a .toml file, or one of our names: lora-20b, qlora-120b, dpo, …"
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="settings in place of the file's")
    parser.add_argument("--run", dest="run_folder", metavar="DIR", help="the run's folder; default: runs/ and the name")
    parser.add_argument(
        "--show-data", type=int, metavar="N", help="print N examples, coloured by which tokens count; trains nothing"
    )
    plan = parser.add_argument_group("what it would take")
    plan.add_argument("--plan", action="store_true", help="print what each device would hold; trains nothing")
    plan.add_argument("--chip", metavar="CHIP", help="and whether that fits: v5e, h100, …")
    plan.add_argument("--compile", action="store_true", help="and what the chip's compiler says of the step")
    parser.add_argument("--host-devices", type=int, metavar="N", help="simulate N devices on the CPU, in each process")
    options.processes(parser, shared="the same arguments, and RUN on a disk that all see")


def _plot(commands: Commands) -> None:
    parser = options.command(
        commands,
        "plot",
        "train_plot:plot",
        help="draw what a training run says of itself",
        description="Draws losses, gradient norm, speed, learning rate and the load of experts, layer by layer, also\n"
        "of a run that still goes on.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", metavar="FILE", help="a .png or .svg; default: RUN/plot.png")


def _plan(commands: Commands) -> None:
    parser = options.command(
        commands,
        "plan",
        "plan:plan",
        help="say whether a model fits devices that are not here, and how fast they could be",
        description="Says before anything is downloaded or rented: bytes per device for weights, KV cache and\n"
        "activations, whether they fit, what a token moves, and the tokens per second that memory and arithmetic\n"
        "allow at most. The exit code is 1 if it does not fit.",
    )
    parser.add_argument("--model", required=True, help="gpt-oss-20b, gpt-oss-120b, …")
    parser.add_argument("--devices", required=True, metavar="CHIP-COUNT", help="v5e-8, v6e-4, h100-8, rtx4090-1, …")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of each row; default: the model's most")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows at once; default: %(default)s")
    options.mesh(parser, default="auto", help="where it lies on the devices; auto chooses and says why")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--experts", choices=("mxfp4", "bf16"), default="mxfp4", help="default: %(default)s")
    options.dense(parser)
    options.embedding(parser)
    parser.add_argument(
        "--compile", action="store_true", help="ask the devices' own compiler too; it has to be installed (extra aot)"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--plot", metavar="FILE", help="draw it, as .png or .svg (extra plot)")


def _bench(commands: Commands) -> None:
    parser = options.command(
        commands,
        "bench",
        "bench:run",
        help="measure kernels, steps and an engine under load on the devices that are here",
        description="Measures a model with random weights beside what the device can do at most, which the same run\n"
        "measures. No checkpoint is needed. The parts are:\n\n"
        "  kernels     single calls of the ops\n"
        "  decode      the next token of rows that go on together\n"
        "  prefill     a prompt in one step\n"
        "  throughput  an engine with 1, 2, 4, ... requests at a time: tokens per second\n"
        "  latency     an engine to which requests come at random: seconds to the first token and between tokens\n"
        "  prefix      an engine that gets the same prompt again\n"
        "  overhead    what the engine's Python takes of a step\n"
        "  start       seconds until an engine takes requests, with and without its programs on disk",
    )
    parser.add_argument("parts", metavar="PART", nargs="*", help="default: kernels decode prefill")
    parser.add_argument("--model", default="gpt-oss-20b", help="whose sizes; default: %(default)s")
    parser.add_argument(
        "--checkpoint", type=nano.find, metavar="CKPT", help="measure this checkpoint or release, no random weights"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="keep only the first N layers")
    parser.add_argument(
        "--rows", default="1,8,64", metavar="N,…", help="rows to decode, or requests to run; default: %(default)s"
    )
    parser.add_argument(
        "--context", type=int, default=1024, metavar="N", help="tokens cached before decoding; default: %(default)s"
    )
    parser.add_argument(
        "--prompt", type=int, metavar="N", help="tokens; default: 2048, of a request to an engine 256 on average"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--expert-format", choices=("mxfp4", "bf16"), default="mxfp4", help="default: %(default)s")
    options.dense(parser)
    options.impl(parser)
    options.mesh(parser, default=None, help="shard the model over this mesh")
    parser.add_argument("--host-devices", type=int, metavar="N", help="simulate N devices on the CPU")
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="for each number, about; default: %(default)s"
    )
    parser.add_argument(
        "--buffer-bytes", type=int, default=1 << 30, metavar="N", help="for the bandwidth; default: %(default)s"
    )
    parser.add_argument("--matrix-size", type=int, metavar="N", help="for the arithmetic; default: 8192, on CPUs 2048")
    parser.add_argument("--tune", action="store_true", help="look for the best block sizes first, and file them")
    parser.add_argument(
        "--trials", type=int, default=100, metavar="N", help="sizes to try at most; default: %(default)s"
    )
    parser.add_argument(
        "--tuned-folder", type=Path, metavar="DIR", help="where to file them; default: the package, kernels/tuned"
    )
    _bench_engine(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, as JSON")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw throughput and latency, as .png or .svg (extra plot)"
    )


def _bench_engine(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("requests to an engine")
    load.add_argument("--new", type=int, default=64, metavar="N", help="tokens of a continuation; default: %(default)s")
    load.add_argument(
        "--spread",
        choices=("even", "none"),
        default="even",
        help="lengths of prompts and continuations: evenly from half to one and a half of what is said, or all alike; "
        "default: %(default)s",
    )
    load.add_argument("--seed", type=int, default=0, help="of lengths, ids and arrivals; default: %(default)s")
    load.add_argument(
        "--concurrency", default="1,2,4,8,16,32,64", metavar="N,…", help="requests at a time; default: %(default)s"
    )
    load.add_argument(
        "--rounds", type=int, default=2, metavar="N", help="as many requests for each at a time; default: %(default)s"
    )
    load.add_argument(
        "--rates",
        metavar="R,…",
        help="requests per second; default: 0.25 to 1.25 times what it does when all are there at once",
    )
    load.add_argument("--requests", type=int, default=64, metavar="N", help="at each rate; default: %(default)s")
    load.add_argument(
        "--first-within", type=float, default=2.0, metavar="S", help="of a good request; default: %(default)s"
    )
    load.add_argument(
        "--between-within",
        type=float,
        default=0.2,
        metavar="S",
        help="between tokens of a good request, on average; default: %(default)s",
    )
    load.add_argument(
        "--prefix-tokens",
        type=int,
        default=2000,
        metavar="N",
        help="of a prompt that comes again; default: %(default)s",
    )
    engine = parser.add_argument_group("the engine")
    engine.add_argument(
        "--max-rows", type=int, metavar="N", help="requests that run at a time; default: the most that is asked for"
    )
    engine.add_argument("--max-context", type=int, metavar="N", help="default: of the longest request")
    engine.add_argument("--cache-tokens", type=int, metavar="N", help="default: enough for all that run")
    engine.add_argument(
        "--prefill-tokens", type=int, default=512, metavar="N", help="of prompts in a step; default: %(default)s"
    )
    engine.add_argument("--kv-dtype", choices=("int8",), help="of keys and values; default: the model's")
    engine.add_argument(
        "--batch-invariant", action="store_true", help="scores are the same to the bit whatever runs beside"
    )
