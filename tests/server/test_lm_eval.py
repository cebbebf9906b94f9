"""lm-eval's `local-completions` against a real server process over the tiny model: the log-likelihoods of `score`."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import pytest

from gptoss_jax.checkpoint import load
from gptoss_jax.engine.score import Text, score
from gptoss_jax.harmony.tokenizer import load_tokenizer

pytest.importorskip("lm_eval", reason="needs lm-eval[api], which the extra `parity` brings")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.openai_completions import LocalCompletionsAPI

pytestmark = pytest.mark.slow  # test_completions.py has the form, the engine's tests have the numbers

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " a question"),
    ("2 + 2 =", " 4"),
    ("Ä·", "ö and é"),
    ("a", "b"),
    ("x" * 90, "y" * 40),
]


@pytest.fixture(scope="module")
def server(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `gptoss-jax serve` on the tiny model, in float32 so that batches do not matter to 1e-3."""
    command = [sys.executable, "-c", "import sys; from gptoss_jax.cli import main; sys.exit(main())", "serve", tiny_hf]
    command += [
        "--port",
        "0",
        "--model-name",
        "tiny",
        "--dtype",
        "float32",
        "--max-rows",
        "2",
        "--cache-tokens",
        "2048",
    ]
    command += ["--max-context", "512", "--prefill-tokens", "64"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            address = None
            for line in process.stderr:
                found = re.search(r"http://\S+:\d+", line)
                address = found[0] if found else address
                if " ready after " in line:
                    break
            assert address is not None
            yield address
        finally:
            process.terminate()
            process.stderr.read()
    assert process.returncode == 0


@pytest.fixture(scope="module")
def likelihoods(tiny_hf: Path) -> Callable[[Sequence[tuple[str, str]]], list[float]]:
    """How likely continuations are, by our own scoring of ids."""
    model, tokenizer = load(tiny_hf, dtype=jnp.float32), load_tokenizer(tiny_hf)

    def of(pairs: Sequence[tuple[str, str]]) -> list[float]:
        texts = [
            Text(tokens=tokenizer.encode(context + continuation), from_token=len(tokenizer.encode(context)))
            for context, continuation in pairs
        ]
        return [math.fsum(scored.logprobs) for scored in score(model, texts)]

    return of


@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_are_those_of_score(server, likelihoods, batch_size):
    """With the server's own tokenizer, so that nothing is downloaded; prompts are ids."""
    model = LocalCompletionsAPI(
        base_url=f"{server}/v1/completions", model="tiny", batch_size=batch_size, max_length=500, num_concurrent=1
    )
    assert model.tokenizer_backend == "remote"
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number) for number, pair in enumerate(PAIRS)
    ]
    found = model.loglikelihood(requests, disable_tqdm=True)
    assert [likelihood for likelihood, _ in found] == pytest.approx(likelihoods(PAIRS), abs=1e-3)
    assert all(isinstance(is_greedy, bool) for _, is_greedy in found)


def test_a_task_of_one_s_own_is_scored_as_here(server, likelihoods, tmp_path, monkeypatch):
    """Multiple choice from a file; the answers that lm-eval counts as right are those that `score` finds likeliest."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    questions = [
        {"question": f"{number} + {number} =", "choices": [str(number), str(2 * number), "no"], "answer": number % 3}
        for number in range(7)
    ]
    path = tmp_path / "sums.json"
    path.write_text("\n".join(map(json.dumps, questions)))
    task = ConfigurableTask(
        config={
            "task": "sums",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        }
    )
    model = LocalCompletionsAPI(base_url=f"{server}/v1/completions", model="tiny", batch_size=3, max_length=500)
    result = simple_evaluate(model=model, tasks=[task], log_samples=True, bootstrap_iters=0)
    assert result is not None
    right = 0
    for question, sample in zip(questions, result["samples"]["sums"], strict=True):
        ours = likelihoods([(question["question"], f" {choice}") for choice in question["choices"]])
        assert [likelihood for (likelihood, _) in sample["filtered_resps"]] == pytest.approx(ours, abs=1e-3)
        right += ours.index(max(ours)) == question["answer"]
    assert result["results"]["sums"]["acc,none"] == pytest.approx(right / len(questions))
