"""The same sizes in `transformers` and OpenAI's Triton model, where they are installed: tokens per second. Knows both.

Weights are random and made on the device, as in `gptoss-jax bench`; no checkpoint is needed. transformers then holds
its experts in bfloat16: it packs them only when it loads a checkpoint, with kernels that it downloads.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import report
from gptoss_jax.bench.report import commit
from gptoss_jax.cli.terminal import table
from gptoss_jax.configs import model_config
from gptoss_jax.model.config import ModelConfig

_ROUNDS = 5
_SEED = 0


def main() -> int:
    parser = report.parser(
        "gpu_peers",
        "Decodes with, and feeds a prompt to, each of the other implementations that are installed here. Each step is\n"
        "timed as its authors run it: OpenAI's decoding as one captured CUDA graph, transformers' eagerly.",
    )
    parser.add_argument("--model", default="gpt-oss-20b", help="default: %(default)s")
    parser.add_argument("--layers", type=report.positive, metavar="N", help="keep only the first N layers")
    parser.add_argument("--rows", default="1,8,64", help="to decode at once; default: %(default)s")
    parser.add_argument("--context", type=report.positive, default=1024, help="tokens cached; default: %(default)s")
    parser.add_argument("--prompt", type=report.positive, default=2048, help="tokens; default: %(default)s")
    parser.add_argument("--tokens", type=report.positive, default=32, help="steps of a round; default: %(default)s")
    return report.main(_benchmark, parser.parse_args())


def _benchmark(options: argparse.Namespace) -> None:
    config = model_config(options.model)
    if options.layers is not None:
        config = dataclasses.replace(config, layer_kinds=config.layer_kinds[: options.layers])
    result: dict[str, Any] = {
        "benchmark": "gpu_peers",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "model": options.model,
        "layers": config.num_layers,
        "peers": [],
    }
    for name, needs, measure in (
        ("transformers", ("torch", "transformers"), _transformers),
        ("OpenAI Triton", ("torch", "triton", "triton_kernels", "gpt_oss"), _openai),
    ):
        missing = [module for module in needs if importlib.util.find_spec(module) is None]
        entry: dict[str, Any] = {"peer": name}
        if missing:
            entry["skipped"] = f"not installed: {', '.join(missing)}"
        else:
            report.step(f"{name}: making random weights")
            entry |= measure(config, options)
        result["peers"].append(entry)
    _print(result)
    report.write(options.out, result)


def _transformers(config: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    device = _device()
    settings = transformers.GptOssConfig(**config.to_hf(mxfp4=False))
    weights = config.num_layers * config.num_experts * 3 * config.width * config.expert_width * 2
    if skipped := _too_large(weights + 4 * config.vocab_size * config.width):
        return skipped
    torch.manual_seed(_SEED)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def feed(ids: Any, cache: Any) -> None:
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def new_cache() -> Any:
        return transformers.DynamicCache(config=settings)

    found = _versions() | {"transformers": transformers.__version__, "experts": "bf16", "decode": []}
    for rows in _rows(options):
        cache = new_cache()
        feed(_ids(config, 1, options.context), cache)
        cache.batch_repeat_interleave(rows)
        ids = _ids(config, rows, 1)
        seconds = _seconds(lambda ids=ids, cache=cache: feed(ids, cache), steps=options.tokens)
        found["decode"].append({"rows": rows, "context": options.context, "tokens_per_second": rows / seconds})
    ids = _ids(config, 1, options.prompt)
    seconds = _seconds(lambda: feed(ids, new_cache()), steps=1)
    found["prefill"] = {"tokens": options.prompt, "tokens_per_second": options.prompt / seconds}
    return found


def _openai(config: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from gpt_oss.torch.model import ModelConfig as OpenAIConfig
    from gpt_oss.triton.model import Cache, Transformer

    if not torch.cuda.is_available():
        return {"skipped": "it runs on CUDA only"}
    if skipped := _too_large(config.num_layers * config.num_experts * 2 * config.width * config.expert_width):
        return skipped
    known = {field.name for field in dataclasses.fields(OpenAIConfig)}
    settings = OpenAIConfig(**{key: value for key, value in config.to_openai().items() if key in known})
    torch.manual_seed(_SEED)
    model = Transformer(settings, device=torch.device("cuda")).eval()
    for parameter in model.parameters():  # of empty memory; packed experts are codes, and any are right
        if parameter.is_floating_point():
            parameter.data.normal_(std=config.width**-0.5)

    def new_caches(rows: int, capacity: int) -> list[Any]:
        heads = config.num_kv_heads
        return [Cache(rows, capacity, heads, config.head_dim, torch.device("cuda")) for _ in config.layer_kinds]

    found = _versions() | {"experts": "mxfp4", "decode": []}
    with torch.inference_mode():
        for rows in _rows(options):
            # Room for every step of every round; each moves the cache on by one.
            caches = new_caches(rows, options.context + (_ROUNDS + 1) * options.tokens + 8)
            for cache in caches:
                cache.k.normal_()
                cache.v.normal_()
                cache.offset.fill_(options.context)
            replay = _captured(model, _ids(config, rows, 1), caches)
            seconds = _seconds(replay, steps=options.tokens)
            found["decode"].append({"rows": rows, "context": options.context, "tokens_per_second": rows / seconds})
        ids, caches = _ids(config, 1, options.prompt), new_caches(1, options.prompt)

        def prefill() -> None:
            for cache in caches:
                cache.offset.zero_()
            model(ids, caches=caches)

        seconds = _seconds(prefill, steps=1)
    found["prefill"] = {"tokens": options.prompt, "tokens_per_second": options.prompt / seconds}
    return found


def _captured(model: Any, ids: Any, caches: list[Any]) -> Callable[[], None]:
    """One decoding step as a CUDA graph, as OpenAI's own generator has it."""
    import torch

    model(ids, caches=caches)  # its kernels are compiled outside of the graph
    model(ids, caches=caches)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(ids, caches=caches)
    return graph.replay


def _seconds(step: Callable[[], object], *, steps: int) -> float:
    """The median time of a step among rounds of several."""
    step()
    found = []
    for _ in range(_ROUNDS):
        _wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        _wait()
        found.append((time.perf_counter() - start) / steps)
    return statistics.median(found)


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _versions() -> dict[str, Any]:
    import torch

    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"torch": torch.__version__, "device": kind}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _too_large(nbytes: int) -> dict[str, str] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return {"skipped": f"its weights take {nbytes:,} bytes, {free:,} are free"} if 1.1 * nbytes > free else None


def _ids(config: ModelConfig, rows: int, tokens: int) -> Any:
    import torch

    return torch.randint(config.vocab_size, (rows, tokens), device=_device())


def _rows(options: argparse.Namespace) -> Iterator[int]:
    for word in options.rows.split(","):
        report.step(f"decoding {word} rows")
        yield int(word)


def _print(result: dict[str, Any]) -> None:
    rows = []
    for entry in result["peers"]:
        if "skipped" in entry:
            rows.append([entry["peer"], entry["skipped"], ""])
            continue
        for step in entry["decode"]:
            what = f"decode, {step['rows']} rows after {step['context']}"
            rows.append([f"{entry['peer']} ({entry['experts']})", what, f"{step['tokens_per_second']:.1f}"])
        what = f"a prompt of {entry['prefill']['tokens']}"
        rows.append([f"{entry['peer']} ({entry['experts']})", what, f"{entry['prefill']['tokens_per_second']:.1f}"])
    table(f"{result['model']}, {result['layers']} layers", ("peer", "step", "tokens/s"), rows)


if __name__ == "__main__":
    sys.exit(main())
