"""`eval`: how likely a model finds texts, and which answers it would choose. Knows options and sums; no arrays."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax.numpy as jnp
from jax.sharding import Mesh

from gptoss_jax import checkpoint
from gptoss_jax.bench import report
from gptoss_jax.cli import adapters, devices, programs
from gptoss_jax.cli.agreement import agree_on_command
from gptoss_jax.cli.eval_lines import Line, Passage, Question, Reader, kind_of, named, read_entries
from gptoss_jax.cli.terminal import table
from gptoss_jax.engine.score import Scored, Text, rows_are_apart, score_choices
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.hosts import agree
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.dispatch import check_way
from gptoss_jax.model.transformer import GptOss, abstract_model
from gptoss_jax.sharding import MeshShape, make_mesh

_SECONDS_BETWEEN_SIGNS = 5.0
_LONG = ("ids", "logprobs")  # as many as tokens: written, and not kept
_RULES = ("", "_per_character", "_per_token", "_per_byte")  # by what a choice's log-likelihood is divided


def run(options: argparse.Namespace) -> int:
    shape = None if options.mesh is None else MeshShape.parse(options.mesh)
    if options.host_devices is not None:
        devices.simulate(options.host_devices)
    programs.keep()
    with devices.joined(options) as hosts:
        path = Path(options.checkpoint)
        config, experts = checkpoint.sizes(path)
        lines = _lines(options, config)
        mesh = None if shape is None else make_mesh(**dataclasses.asdict(shape))
        devices.check_all_take_part(mesh, hosts)
        settings = {"mesh": mesh, "dtype": jnp.dtype(options.dtype), "impl": options.impl, "dispatch": options.dispatch}
        settings |= {"dense": options.dense, "embedding": options.embedding}
        _rehearse(config, experts=experts, **settings)
        agree_on_command(options, checkpoint=path)
        agree(f"the file {options.file}", hashlib.sha256(options.file.read_bytes()).hexdigest())
        trained = adapters.read(adapters.only(options.adapter), checkpoint=path, config=config)
        with devices.enough_memory():
            model = adapters.attached(checkpoint.load(path, **settings), trained)
            _score(model, lines, options, first=hosts.process_id == 0)
    return 0


def _lines(options: argparse.Namespace, config: ModelConfig) -> list[Line]:
    """Every mistake in the file is found before weights are read."""
    path, context = options.file, config.max_context if options.context is None else options.context
    if not 2 <= context <= config.max_context:
        raise UserError(f"--context is {context}; expected 2 to {config.max_context}, the model's")
    if options.batch_tokens < 1:
        raise UserError(f"--batch-tokens is {options.batch_tokens}; expected at least 1")
    for out in (options.out, options.lines_out):
        if out is not None and not out.parent.is_dir():
            raise UserError(f"{out} is to be written into {out.parent}, which is no folder: create it, or name another")
    entries = list(read_entries(path))
    if not entries:
        raise UserError(f'{path} has no lines to score; expected objects as in {{"text": "…"}}')
    has_text = any(kind_of(entry) != "tokens" for _, entry in entries)
    tokenizer = load_tokenizer(Path(options.checkpoint)) if has_text else None
    reader = Reader(tokenizer=tokenizer, vocab_size=config.vocab_size, context=context)
    found = []
    for number, entry in entries:
        with named(path, number):
            found.append(reader.line(number, entry))
    return found


def _rehearse(config: ModelConfig, *, mesh: Mesh | None, **settings: Any) -> None:
    """Raises whatever loading would refuse: one layer speaks for all, and shapes for its weights."""
    check_way(settings["dispatch"], mesh=mesh)
    abstract_model(dataclasses.replace(config, layer_kinds=config.layer_kinds[:1]), mesh=mesh, **settings)


def _score(model: GptOss, lines: Sequence[Line], options: argparse.Namespace, *, first: bool) -> None:
    exact = options.batch_exact or rows_are_apart(model)
    # A window is a question with one choice: nothing is shared, and all lines go one way, in their order.
    groups = (group for line in lines for group in _groups(line))
    found = score_choices(model, groups, batch_tokens=options.batch_tokens, batch_exact=options.batch_exact)
    results = []
    with contextlib.ExitStack() as stack:
        out = (
            stack.enter_context(options.lines_out.open("w", encoding="utf-8")) if options.lines_out and first else None
        )
        for result in _with_signs(_results(lines, found), len(lines), shown=first):
            _write(result, out)
            results.append({key: value for key, value in result.items() if key not in _LONG})
    if not first:
        return
    document = {**report.frame(), "benchmark": "eval", "checkpoint": str(options.checkpoint), "file": str(options.file)}
    document |= {"adapter": None if options.adapter is None else str(options.adapter)}
    document |= {"dtype": options.dtype, "dense": options.dense, "impl": dataclasses.asdict(model.impl)}
    document |= {"mesh": options.mesh, "batch_exact": exact, "texts": _texts(results), "choices": _choices(results)}
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(document))
    else:
        _print(document)


def _groups(line: Line) -> list[Sequence[Text]]:
    return [line.texts] if isinstance(line, Question) else [[window] for window in line.windows]


def _with_signs(results: Iterable[dict[str, Any]], total: int, *, shown: bool) -> Iterator[dict[str, Any]]:
    """The results, with a sign of life on stderr now and then."""
    last = time.monotonic()
    for number, result in enumerate(results, start=1):
        if shown and time.monotonic() - last > _SECONDS_BETWEEN_SIGNS:
            last = time.monotonic()
            print(f"{number} of {total} lines", file=sys.stderr, flush=True)
        yield result


def _write(result: dict[str, Any], out: TextIO | None) -> None:
    if out is not None:
        out.write(json.dumps(result) + "\n")


# ---- of one line -----------------------------------------------------------------------------------------------------


def _results(lines: Iterable[Line], found: Iterator[tuple[Scored, ...]]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if isinstance(line, Question):
            yield _of_question(line, next(found))
        else:
            yield _of_passage(line, [next(found)[0] for _ in line.windows])


def _of_passage(line: Passage, scored: Sequence[Scored]) -> dict[str, Any]:
    total, ids = sum(each.total for each in scored), line.ids
    return {
        "line": line.line,
        "kind": "text",
        "tokens": len(ids),
        "bytes": line.num_bytes,
        "log_likelihood": total,
        "perplexity": _perplexity(total, len(ids)),
        "bits_per_byte": _bits_per_byte(total, line.num_bytes),
        "is_greedy": all(each.is_greedy for each in scored),
        "ids": ids,
        "logprobs": [float(logprob) for each in scored for logprob in each.logprobs],
    }


def _of_question(line: Question, scored: Sequence[Scored]) -> dict[str, Any]:
    totals, num_tokens = [each.total for each in scored], [len(each.logprobs) for each in scored]
    lengths = {
        "": [1] * len(totals),
        "_per_character": [len(choice) for choice in line.choices],
        "_per_token": num_tokens,
        "_per_byte": [len(choice.encode()) for choice in line.choices],
    }
    chosen = {f"chosen{rule}": _best(totals, lengths[rule]) for rule in _RULES}
    return {
        "line": line.line,
        "kind": "choices",
        "answer": line.answer,
        **chosen,
        "log_likelihoods": totals,
        "tokens": num_tokens,
        "is_greedy": [each.is_greedy for each in scored],
    }


def _best(totals: Sequence[float], lengths: Sequence[int]) -> int:
    """Of equals the first, as NumPy's argmax has it."""
    return max(range(len(totals)), key=lambda i: totals[i] / lengths[i])


# ---- of all ----------------------------------------------------------------------------------------------------------


def _texts(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Sums over all lines of text; bits per byte over those whose bytes are known."""
    found = [result for result in results if result["kind"] == "text"]
    if not found:
        return None
    total, num_tokens = (
        math.fsum(result["log_likelihood"] for result in found),
        sum(result["tokens"] for result in found),
    )
    measured = [result for result in found if result["bytes"] is not None]
    num_bytes = sum(result["bytes"] for result in measured)
    return {
        "lines": len(found),
        "tokens": num_tokens,
        "bytes": num_bytes or None,
        "log_likelihood": total,
        "perplexity": _perplexity(total, num_tokens),
        "bits_per_byte": _bits_per_byte(math.fsum(result["log_likelihood"] for result in measured), num_bytes or None),
    }


def _choices(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    found = [result for result in results if result["kind"] == "choices"]
    if not found:
        return None
    shares = {f"accuracy{rule}": _share([each[f"chosen{rule}"] == each["answer"] for each in found]) for rule in _RULES}
    return {"lines": len(found), **shares}


def _share(right: Sequence[bool]) -> dict[str, float | None]:
    """With the standard error of the mean, whose variance is the sample's: one line alone has none."""
    share, number = sum(right) / len(right), len(right)
    return {"value": share, "standard_error": math.sqrt(share * (1 - share) / (number - 1)) if number > 1 else None}


def _perplexity(total: float, num_tokens: int) -> float:
    return math.exp(-total / num_tokens)


def _bits_per_byte(total: float, num_bytes: int | None) -> float | None:
    return None if num_bytes is None else -total / math.log(2) / num_bytes


def _print(document: dict[str, Any]) -> None:
    texts, choices = document["texts"], document["choices"]
    if texts:
        bits = "" if texts["bits_per_byte"] is None else f"{texts['bits_per_byte']:.4f}"
        row = [
            str(texts["lines"]),
            str(texts["tokens"]),
            f"{texts['log_likelihood']:.2f}",
            f"{texts['perplexity']:.4f}",
        ]
        table("texts", ("lines", "tokens", "log-likelihood", "perplexity", "bits per byte"), [[*row, bits]])
    if choices:
        rows = []
        for rule in _RULES:
            share = choices[f"accuracy{rule}"]
            error = "" if share["standard_error"] is None else f"± {share['standard_error']:.4f}"
            rows.append([rule.replace("_", " ").strip() or "as it is", f"{share['value']:.4f}", error])
        title = f"choices, {choices['lines']} lines"
        table(title, ("by log-likelihood", "accuracy", "standard error"), rows)
