"""The dump of what is trained, in a pipe and in a terminal."""

import io
import json

import pytest
from rich.console import Console

from gptoss_jax.cli.train_dump import run, show
from gptoss_jax.harmony.messages import System
from gptoss_jax.harmony.tokenizer import write_byte_tokenizer
from gptoss_jax.train.config import DataSettings, LoopSettings, ModelSettings, TrainConfig
from gptoss_jax.train.data import Dataset, Settings
from gptoss_jax.train.masks import LossWeights
from tests.tiny import TINY

BARE = System(identity="", knowledge_cutoff=None, channels=())
PROMPT = (
    "<|start|>system<|message|>Reasoning: medium<|end|><|start|>user<|message|>\u241b[2J 東?<|end|><|start|>assistant"
)


@pytest.fixture
def dataset(tmp_path, letters):
    path = tmp_path / "a.jsonl"
    entry = {"messages": [{"role": "user", "content": "\x1b[2J 東?"}, {"role": "assistant", "content": "京"}]}
    path.write_text(f'{json.dumps(entry)}\n{{"text": ""}}\n')
    settings = Settings(row_length=128, system=BARE, loss=LossWeights(header=0.5, stop=2.0))
    return Dataset.open([path], letters, settings)


def shown(dataset, tokenizer, **console) -> str:
    out = io.StringIO()
    show(dataset, tokenizer, number=3, console=Console(file=out, width=40, **console))
    return out.getvalue()


def test_in_a_pipe_marks_stand_for_colours(dataset, letters):
    text = shown(dataset, letters)
    assert text.startswith("read: 2 lines, 1 to train\ntokens: 63, of the longest 63\n")
    assert "trained: 11 tokens, header 7, final 3, stop 1\n" in text
    assert "packed: 1 rows, 49.2% of them tokens\n" in text
    assert "dropped: 1 empty (" in text
    assert text.endswith(f"{PROMPT}⟦0.5|<|channel|>final<|message|>⟧⟦京⟧⟦2|<|return|>⟧\n")


def test_in_a_terminal_there_are_colours(dataset, letters):
    text = shown(dataset, letters, force_terminal=True, color_system="standard", no_color=False)
    assert f"\x1b[2m{PROMPT}\x1b[0m" in text
    assert "\x1b[33m<|channel|>final<|message|>\x1b[0m\x1b[32m京\x1b[0m\x1b[35m<|return|>\x1b[0m" in text
    assert "⟦" not in text


def test_a_terminal_without_colours_has_marks(dataset, letters):
    assert "⟦京⟧" in shown(dataset, letters, force_terminal=True, no_color=True)


def test_of_a_configuration_the_data_are_read_and_no_model(tmp_path, capsys):
    write_byte_tokenizer(tmp_path / "tokenizer.json", TINY.vocab_size)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "abc"}))
    config = TrainConfig(
        model=ModelSettings(checkpoint=str(tmp_path)),
        data=DataSettings(files=(str(tmp_path / "a.jsonl"),)),
        loop=LoopSettings(steps=1),
    )
    assert run(config, number=1) == 0
    assert "<|startoftext|>⟦abc<|endoftext|>⟧\n" in capsys.readouterr().out


def test_pairs(tmp_path, letters):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "yes", "rejected": "no"}))
    text = shown(Dataset.open([path], letters, Settings(row_length=128, system=BARE)), letters)
    chosen, rejected = text.index("chosen, "), text.index("rejected, ")
    assert chosen < text.index("⟦yes<|return|>⟧") < rejected < text.index("⟦no<|return|>⟧")
