"""`eval` from a file to its numbers, and what is wrong with a line."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gptoss_jax.cli import main
from gptoss_jax.cli.eval_lines import Question, Reader
from gptoss_jax.harmony.tokenizer import load_tokenizer
from tests import oracle
from tests.tiny import TINY

TEXT = "grüße, a text"
IDS = [5, 6, 7, 300, 9]
CONTEXT, CHOICES, ANSWER = "two and two ", ["are four", "is ß", "?"], 1
LINES = [
    {"text": TEXT},
    {"context": CONTEXT, "choices": CHOICES, "answer": ANSWER, "id": "kept out"},
    {"tokens": IDS},
]
WITHIN = 1e-4  # as in tests/engine/test_score.py


@pytest.fixture(autouse=True)
def _jax_has_started():
    """So that no command here changes how many devices the other tests have."""
    assert len(jax.devices()) == 8


@pytest.fixture(scope="module")
def logprobs(tiny_hf: Path) -> Callable[[list[int]], np.ndarray]:
    """Of each id but the first, by the oracle."""
    config, tensors = json.loads((tiny_hf / "config.json").read_text()), load_file(tiny_hf / "model.safetensors")

    def of(ids: list[int]) -> np.ndarray:
        logits = oracle.forward(config, tensors, np.array([ids]))[0, :-1]
        return np.log(oracle.softmax(logits))[np.arange(len(ids) - 1), ids[1:]]

    return of


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n\n")
    return path


def test_numbers_are_the_oracles(
    tiny_hf: Path, tmp_path: Path, logprobs: Callable[[list[int]], np.ndarray], capsys: pytest.CaptureFixture[str]
):
    """The synthetic tokenizer's ids are bytes, and 264 is what a text begins with."""
    path = write(tmp_path / "lines.jsonl", *LINES)
    outs = ("--out", tmp_path / "out.json", "--lines-out", tmp_path / "lines_out.jsonl")
    words = ("eval", tiny_hf, path, "--dtype", "float32", "--impl", "xla", *outs, "--json")
    assert main([*map(str, words)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "out.json").read_text())
    text, question, tokens = map(json.loads, (tmp_path / "lines_out.jsonl").read_text().splitlines())

    beginning = load_tokenizer(tiny_hf).special("<|startoftext|>")
    of_text, of_ids = logprobs([beginning, *TEXT.encode()]), logprobs(IDS)
    np.testing.assert_allclose(text["logprobs"], of_text, atol=WITHIN)
    np.testing.assert_allclose(tokens["logprobs"], of_ids, atol=WITHIN)
    assert (text["line"], question["line"], tokens["line"]) == (1, 2, 3)
    assert text["bytes"] == len(of_text) == len(TEXT) + 2
    assert (tokens["bytes"], tokens["bits_per_byte"], tokens["ids"]) == (None, None, IDS[1:])

    totals = document["texts"]
    assert totals["log_likelihood"] == pytest.approx(of_text.sum() + of_ids.sum(), abs=20 * WITHIN)
    assert totals["tokens"] == len(of_text) + len(of_ids)
    assert totals["perplexity"] == pytest.approx(math.exp(-totals["log_likelihood"] / totals["tokens"]))
    assert totals["bits_per_byte"] == pytest.approx(-of_text.sum() / math.log(2) / len(of_text), abs=WITHIN)

    kept = len("two and two")  # the space is the choices'
    of_choices = [logprobs([*(CONTEXT + choice).encode()])[kept - 1 :] for choice in CHOICES]
    np.testing.assert_allclose(question["log_likelihoods"], [each.sum() for each in of_choices], atol=10 * WITHIN)
    assert question["tokens"] == [len(" are four"), len(" is ß") + 1, 2]
    for rule, lengths in (
        ("", [1, 1, 1]),
        ("_per_character", [8, 4, 1]),
        ("_per_token", [9, 6, 2]),
        ("_per_byte", [8, 5, 1]),
    ):
        chosen = int(np.argmax([each.sum() / length for each, length in zip(of_choices, lengths, strict=True)]))
        assert question[f"chosen{rule}"] == chosen
        assert document["choices"][f"accuracy{rule}"] == {"value": float(chosen == ANSWER), "standard_error": None}


@pytest.mark.slow
def test_a_file_is_scored_by_a_process_of_its_own_on_a_mesh(tiny_hf: Path, tmp_path: Path):
    """With tables for people; windows of 8 ids score as many as one, behind less context."""
    path = write(tmp_path / "lines.jsonl", *LINES, *LINES)
    program = "import sys; from gptoss_jax.cli import main; sys.exit(main())"
    words = ("eval", tiny_hf, path, "--mesh", "data=2,tensor=2", "--host-devices", 4, "--lines-out", tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout
    assert "choices, 2 lines" in done.stdout
    results = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    for one, again in zip(results[:3], results[3:], strict=True):
        assert {**one, "line": 0} == {**again, "line": 0}  # the same bits, in other company


@pytest.mark.slow
def test_accuracy_has_a_standard_error_and_long_texts_have_windows(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The same question with each answer: one of three is right, whatever the model says."""
    questions = [{"context": "ab", "choices": CHOICES, "answer": answer} for answer in range(3)]
    path = write(tmp_path / "lines.jsonl", *questions, {"text": "a text of 20 letters"})
    assert main(["eval", str(tiny_hf), str(path), "--impl", "xla", "--json", "--context", "12"]) == 0
    document = json.loads(capsys.readouterr().out)
    deviation = np.std([1, 0, 0], ddof=1) / math.sqrt(3)
    for rule in ("", "_per_character", "_per_token", "_per_byte"):
        share = document["choices"][f"accuracy{rule}"]
        assert share["value"] == pytest.approx(1 / 3)
        assert share["standard_error"] == pytest.approx(deviation)
    assert document["texts"]["tokens"] == document["texts"]["bytes"] == 20


def test_a_choice_is_what_the_context_alone_does_not_take(tiny_hf: Path):
    reader = Reader(tokenizer=load_tokenizer(tiny_hf), vocab_size=TINY.vocab_size, context=100)
    line = reader.line(1, {"context": "a \n", "choices": ["b", "cd"], "answer": 0})
    assert isinstance(line, Question)
    assert [(bytes(text.tokens), text.from_token) for text in line.texts] == [(b"a \nb", 1), (b"a \ncd", 1)]
    line = reader.line(1, {"context": "", "choices": ["b", "cd"], "answer": 0})
    assert isinstance(line, Question)
    assert [(text.tokens[1:], text.from_token) for text in line.texts] == [([*b"b"], 1), ([*b"cd"], 1)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: expected JSON, but"),
        ("[1]", "line 2: expected a JSON object"),
        ({"txt": "a"}, "line 2: none of the keys 'text', 'tokens' and 'context' is there"),
        ({"text": "a", "tokens": [1]}, "line 2: 'text' and 'tokens' of the keys"),
        ({"text": ""}, "line 2: \"text\" holds ''; expected a text"),
        ({"text": 3}, "line 2: \"text\" holds '3'; expected a text"),
        ('{"text": "\\ud800"}', 'line 2: "text" holds half of a surrogate pair'),
        ({"tokens": [1]}, "line 2: a text of 1 ids is to be scored from id 1 on"),
        ({"tokens": [1, True]}, 'line 2: "tokens" is no list of ids'),
        ({"tokens": [1, 352]}, "line 2: a text holds id 352; expected 0 to 351"),
        ({"context": "a", "choices": ["b", "c"]}, "line 2: 'context' stands without 'answer'"),
        ({"context": "a", "choices": ["b"], "answer": 0}, 'line 2: "choices" is no list of two texts or more'),
        ({"context": "a", "choices": ["b", ""], "answer": 0}, "line 2: \"choices\" holds ''; expected a text"),
        (
            {"context": "a", "choices": ["b", "c"], "answer": 2},
            'line 2: "answer" is 2; expected the number of a choice, 0',
        ),
        ({"context": "a" * 20, "choices": ["b", "c"], "answer": 0}, "line 2: a text has 21 ids; the context has 20"),
    ],
)
def test_a_bad_line_is_named(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: Any, complaint: str
):
    path = write(tmp_path / "lines.jsonl", {"text": "good"}, line)
    assert main(["eval", str(tiny_hf), str(path), "--context", "20"]) == 2
    assert f"gptoss-jax eval: {path}, {complaint}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--context", "1"], "--context is 1; expected 2 to 131072"),
        (["--batch-tokens", "0"], "--batch-tokens is 0; expected at least 1"),
        (["--out", "nowhere/out.json"], "nowhere/out.json is to be written into nowhere, which is no folder"),
        (["--dispatch", "redu"], "dispatch 'redu' is unknown"),
        (["--mesh", "expert=two"], "gives expert the size 'two'"),
    ],
)
def test_options_that_make_no_sense(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
):
    path = write(tmp_path / "lines.jsonl", {"text": "good"})
    assert main(["eval", str(tiny_hf), str(path), *options]) == 2
    assert complaint in capsys.readouterr().err


def test_files_without_lines(tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(tiny_hf), str(write(tmp_path / "empty.jsonl"))]) == 2
    assert "has no lines to score" in capsys.readouterr().err
    assert main(["eval", str(tiny_hf), str(tmp_path / "nothing")]) == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
