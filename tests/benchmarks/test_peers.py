"""The comparison with other engines: what is written for llama.cpp is what the release says; the table is right."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from benchmarks import engines, gguf
from gptoss_jax.errors import UserError
from tests.oracle import mxfp4_decode
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]

_FP4_DOUBLED = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]  # as in ggml-common.h


class Reader:
    """Takes a GGUF file apart, from the format's description: little-endian numbers, strings with their length."""

    def __init__(self, path: Path):
        self._bytes, self._at = path.read_bytes(), 0
        assert self._take("4s") == b"GGUF"
        assert self._take("I") == 3
        num_tensors, num_settings = self._take("Q"), self._take("Q")
        self.settings = {self._string(): self._value() for _ in range(num_settings)}
        self._heads = {self._string(): self._tensor() for _ in range(num_tensors)}
        self._start = -(-self._at // 32) * 32

    def names(self) -> set[str]:
        return set(self._heads)

    def end(self) -> int:
        """Where the last tensor ends, padded."""
        _, _, offset = (kind, shape, offset) = list(self._heads.values())[-1]
        return self._start + -(-(offset + self._nbytes(kind, shape)) // 32) * 32

    def tensor(self, name: str) -> np.ndarray:
        """The values that llama.cpp computes with."""
        kind, shape, offset = self._heads[name]
        assert offset % 32 == 0
        nbytes = self._nbytes(kind, shape)
        raw = np.frombuffer(self._bytes, np.uint8, nbytes, self._start + offset)
        decode = {0: _float32, 8: _q8_0, 30: _bfloat16, 39: _mxfp4}[kind]
        return decode(raw).reshape(shape)

    def _nbytes(self, kind: int, shape: tuple[int, ...]) -> int:
        elements, nbytes = {0: (1, 4), 8: (32, 34), 30: (1, 2), 39: (32, 17)}[kind]
        return math.prod(shape) // elements * nbytes

    def _tensor(self) -> tuple[int, tuple[int, ...], int]:
        axes = [self._take("Q") for _ in range(self._take("I"))]
        return self._take("I"), tuple(reversed(axes)), self._take("Q")

    def _value(self) -> Any:
        kind = self._take("I")
        return self._string() if kind == 8 else self._take({4: "I", 6: "f"}[kind])

    def _string(self) -> str:
        return self._take(f"{self._take('Q')}s").decode()

    def _take(self, kind: str) -> Any:
        (found,) = struct.unpack_from(f"<{kind}", self._bytes, self._at)
        self._at += struct.calcsize(f"<{kind}")
        return found


def _float32(raw: np.ndarray) -> np.ndarray:
    return raw.view(np.float32)


def _bfloat16(raw: np.ndarray) -> np.ndarray:
    return raw.view(ml_dtypes.bfloat16).astype(np.float64)


def _q8_0(raw: np.ndarray) -> np.ndarray:
    blocks = raw.reshape(-1, 34)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    return blocks[:, 2:].copy().view(np.int8) * scales


def _mxfp4(raw: np.ndarray) -> np.ndarray:
    """As dequantize_row_mxfp4 of ggml-quants.c: the low halves of 16 bytes, then the high ones."""
    blocks = raw.reshape(-1, 17)
    codes = np.concatenate([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], axis=1)
    return np.ldexp(np.array(_FP4_DOUBLED)[codes].astype(np.float64), blocks[:, :1].astype(np.int32) - 128)


def released(folder: Path) -> dict[str, np.ndarray]:
    safetensors = pytest.importorskip("safetensors.numpy")
    return {name: array for file in folder.glob("*.safetensors") for name, array in safetensors.load_file(file).items()}


@pytest.fixture(scope="module")
def written(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    out = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf.write(tiny_hf, out, dense="bf16")
    found = Reader(out)
    assert found.end() == out.stat().st_size
    return found


def test_gguf_holds_the_sizes(written: Reader) -> None:
    settings = {key.removeprefix("gpt-oss."): value for key, value in written.settings.items()}
    assert settings["general.architecture"] == "gpt-oss"
    assert settings["vocab_size"] == TINY.vocab_size
    assert settings["embedding_length"] == TINY.width
    assert (settings["attention.head_count"], settings["attention.head_count_kv"]) == (12, 4)
    assert (settings["attention.key_length"], settings["attention.sliding_window"]) == (16, 9)
    assert (settings["expert_count"], settings["expert_used_count"]) == (8, 2)
    assert (settings["expert_feed_forward_length"], settings["block_count"]) == (224, 6)
    assert settings["rope.scaling.type"] == "yarn"
    assert (settings["rope.freq_base"], settings["rope.scaling.original_context_length"]) == (150000.0, 4096)


def test_gguf_holds_the_experts_exactly(tiny_hf: Path, written: Reader) -> None:
    release = released(tiny_hf)
    for n in range(TINY.num_layers):
        stem = f"model.layers.{n}.mlp.experts."
        gate_up = mxfp4_decode(release[f"{stem}gate_up_proj_blocks"], release[f"{stem}gate_up_proj_scales"])
        down = mxfp4_decode(release[f"{stem}down_proj_blocks"], release[f"{stem}down_proj_scales"])
        np.testing.assert_array_equal(written.tensor(f"blk.{n}.ffn_gate_exps.weight"), gate_up[:, 0::2])
        np.testing.assert_array_equal(written.tensor(f"blk.{n}.ffn_up_exps.weight"), gate_up[:, 1::2])
        np.testing.assert_array_equal(written.tensor(f"blk.{n}.ffn_down_exps.weight"), down)
        bias = release[f"{stem}gate_up_proj_bias"].astype(np.float32)
        np.testing.assert_array_equal(written.tensor(f"blk.{n}.ffn_gate_exps.bias"), bias[:, 0::2])
        np.testing.assert_array_equal(written.tensor(f"blk.{n}.ffn_up_exps.bias"), bias[:, 1::2])


def test_gguf_holds_the_rest_exactly(tiny_hf: Path, written: Reader) -> None:
    release = released(tiny_hf)
    names = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}
    names["output_norm.weight"] = "model.norm.weight"
    for n in range(TINY.num_layers):
        layer = {
            "attn_norm.weight": "input_layernorm.weight",
            "attn_q.weight": "self_attn.q_proj.weight",
            "attn_k.bias": "self_attn.k_proj.bias",
            "attn_v.weight": "self_attn.v_proj.weight",
            "attn_output.weight": "self_attn.o_proj.weight",
            "attn_output.bias": "self_attn.o_proj.bias",
            "attn_sinks.weight": "self_attn.sinks",
            "post_attention_norm.weight": "post_attention_layernorm.weight",
            "ffn_gate_inp.weight": "mlp.router.weight",
            "ffn_gate_inp.bias": "mlp.router.bias",
            "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
        }
        names |= {f"blk.{n}.{ours}": f"model.layers.{n}.{theirs}" for ours, theirs in layer.items()}
    for ours, theirs in names.items():
        np.testing.assert_array_equal(written.tensor(ours), release[theirs].astype(np.float64), err_msg=ours)
    assert len(written.names()) == 3 + 19 * TINY.num_layers  # nothing else


def test_gguf_in_8_bits_is_half_a_step_away(tiny_hf: Path, tmp_path: Path) -> None:
    gguf.write(tiny_hf, tmp_path / "model.gguf", dense="q8_0")
    found = Reader(tmp_path / "model.gguf").tensor("blk.1.attn_k.weight").reshape(-1, 32)
    exact = released(tiny_hf)["model.layers.1.self_attn.k_proj.weight"].astype(np.float64).reshape(-1, 32)
    step = np.abs(exact).max(axis=1, keepdims=True) / 127
    # Half a step by rounding, and 127 steps by as much as float16 moved the scale: 2^-11 of it.
    assert np.all(np.abs(found - exact) <= step * (0.5 + 127 * 2.0**-11) * 1.001)
    assert np.any(found != exact)


def test_8_bit_blocks_round_halves_away_from_zero() -> None:
    values = np.zeros((2, 32), np.float32)
    values[0, :5] = [127, 2.5, -2.5, 0.4, -127]
    blocks = gguf.q8_0_blocks(values)
    assert blocks[0, 0, :2].tobytes() == np.float16(1).tobytes()
    assert blocks[0, 0, 2:7].view(np.int8).tolist() == [127, 3, -3, 0, -127]
    assert not blocks[1].any()  # a block of zeros has the scale 0, and none of its codes is NaN


def test_gguf_is_not_overwritten_and_a_failed_one_goes(tiny_hf: Path, tiny_hf_bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(UserError, match="is there already"):
        gguf.write(tiny_hf, tmp_path / "there", dense="bf16")
    with pytest.raises(UserError, match="has no packed experts"):
        gguf.write(tiny_hf_bf16, tmp_path / "new", dense="bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_roofs_count_what_an_engine_reads() -> None:
    as_released = {"experts": 17_000, "attention": 640, "unembedding": 1280, "norms, routers, one embedding": 3}
    found = {key: engines.token_bytes(engine, as_released) for key, engine in engines.ENGINES.items()}
    assert found["llama"] == found["gptoss-jax"] == 17_000 + 1920 + 3
    assert found["llama-q8"] == 17_000 + 1020 + 3
    assert found["gptoss-jax-int8"] == 17_000 + 1080 + 3
    assert found["transformers"] == pytest.approx(64_000 + 1920 + 3)
    # By hand for TINY: q and o of 12 heads, k and v of 4; 2 of 8 experts of three matrices; the router.
    layer = 2 * 160 * 12 * 16 + 2 * 160 * 4 * 16 + 2 * 3 * 160 * 224 + 8 * 160
    assert engines.prompt_flops(TINY) == 2 * 6 * layer


def test_an_engine_that_does_not_fit_says_so() -> None:
    reason = engines.why_not(engines.ENGINES["transformers"], Path(sys.executable), TINY, available_bytes=1000)
    assert reason == "it needs about 0.0 GB of memory, 0.0 are available"
    reason = engines.why_not(engines.ENGINES["llama"], None, TINY, available_bytes=10**9)
    assert reason == "not installed: llama_cpp"


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_engines_are_timed_and_compared(tmp_path: Path) -> None:
    small = ["--model", "tiny", "--layers", "2", "--tokens", "3", "--prompt-tokens", "33", "--rounds", "1"]
    where = ["--buffer-bytes", "8000000", "--dir", tmp_path, "--out", tmp_path / "result.json"]
    done = run("cpu_peers", *small, *where, "--engines", "llama,gptoss-jax,gptoss-jax-int8")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    result = json.loads(text)
    entries = result["engines"]
    ours, rounded = entries["gptoss-jax"], entries["gptoss-jax-int8"]
    assert ours["kl_from_ours"] == {"mean": 0.0, "largest": 0.0}
    assert 0 < rounded["kl_from_ours"]["mean"] < 0.01  # 8 bits move the scores, and little
    for entry in (ours, rounded):
        assert entry["prefill_tokens_per_second"] > 0
        assert entry["decode_tokens_per_second"] == entry["rounds"][0]["decode_tokens_per_second"]
        assert entry["first_id_seconds"] >= entry["load_seconds"] > 0
    bandwidth = result["ceilings"]["bytes_per_second"]
    assert ours["decode_share_of_roof"] == pytest.approx(
        ours["decode_tokens_per_second"] * ours["token_bytes"] / bandwidth
    )
    if "skipped" in entries["llama"]:
        assert entries["llama"]["skipped"] == "not installed: llama_cpp"
        assert "llama is left out: not installed: llama_cpp" in done.stdout
        assert result["ratios"] == []


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    done = run("cpu_peers", "--model", "tiny", "--peers-python", tmp_path / "python", "--dir", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path / 'python'} is no file; expected the Python of an environment" in done.stderr


def test_an_engine_that_is_not_there_is_said() -> None:
    done = run("cpu_peers", "--engines", "llama,vllm")
    assert done.returncode == 2
    assert "'vllm' is no engine; expected some of llama, llama-q8, transformers" in done.stderr


@pytest.mark.parametrize("name", ["cpu_peers", "gguf"])
def test_help(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
