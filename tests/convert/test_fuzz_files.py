"""Whatever bytes lie in a folder, opening it works or raises UserError, and allocates in proportion to those bytes."""

import json
import struct
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptoss_jax.convert.files import INDEX_NAME, TensorFolder
from gptoss_jax.errors import UserError

# A Python object per JSON token: the densest header, one of "[],", makes 72 bytes out of 3.
ALLOCATION_PER_BYTE = 40
ALLOCATION_ALWAYS = 200_000  # messages, path objects, what the machinery of errors imports

VALID = safetensors.numpy.save(
    {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.arange(3, dtype=np.uint8)}, {"format": "pt"}
)

MARKS = [b'"', b"{", b"[", b"9", b","]

sizes = st.one_of(
    st.integers(0, 9), st.integers(-3, 2**70), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64])
)
json_values = st.recursive(
    st.none() | st.booleans() | sizes | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
dtypes = st.sampled_from(["U8", "BF16", "F32", "F4", "F8_E8M0", "X9", "u8", ""])
tensors = st.fixed_dictionaries(
    {
        "dtype": dtypes | json_values,
        "shape": st.lists(sizes, max_size=4) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
    },
    optional={"extra": json_values},
)
headers = st.dictionaries(st.sampled_from(["a", "b", "ü", "__metadata__"]), tensors | json_values, max_size=4)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file with a few bytes changed, removed, put in or cut off."""
    content = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content) - 1))
        match draw(st.sampled_from(["change", "remove", "insert", "cut"])):
            case "change":
                content[at] = draw(st.integers(0, 255))
            case "remove":
                del content[at : at + draw(st.integers(1, 5))]
            case "insert":
                content[at:at] = draw(
                    st.binary(min_size=1, max_size=5) | st.sampled_from([b'"', b"{", b"[", b"9", b","])
                )
            case "cut":
                del content[max(at, 1) :]
        content = content or bytearray(b"\0")
    return bytes(content)


def opened(path: Path, *, nbytes: int) -> TensorFolder | None:
    """The folder, or None if it is refused; `nbytes` bytes are there to be read."""
    tracemalloc.start()
    try:
        folder, message = TensorFolder.open(path), ""
    except UserError as error:
        folder, message = None, str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= ALLOCATION_PER_BYTE * nbytes + ALLOCATION_ALWAYS
    assert "\n" not in message
    assert len(message) < 1000
    return folder


def check_file(content: bytes) -> None:
    """What we open the library opens too, with the same names, shapes and bytes. It accepts more than we do."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.safetensors"
        path.write_bytes(content)
        folder = opened(path, nbytes=len(content))
        if folder is None or b"-0" in content:  # Python reads -0 as 0, the library as a fraction
            return
        expected = dict(safetensors.deserialize(content))
        assert folder.tensors.keys() == expected.keys()
        for name, info in folder.tensors.items():
            assert list(info.shape) == expected[name]["shape"]
            assert info.code == expected[name]["dtype"]
            assert b"".join(folder.bytes_of(name, chunk=3)) == expected[name]["data"]


@given(st.binary(max_size=200))
@example(struct.pack("<Q", 99_999_999) + b"{" * 90)
def test_any_bytes(content: bytes):
    check_file(content)


@given(mutated())
@settings(max_examples=300)
@example(VALID)
def test_a_damaged_file(content: bytes):
    check_file(content)


@given(header=headers, data=st.binary(max_size=40), length=st.none() | sizes.map(lambda size: abs(size) % 2**64))
@settings(max_examples=300)
@example(header={"a": {"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}}, data=b"", length=None)
@example(header={"a": {"dtype": "U8", "shape": [0] * 30_000, "data_offsets": [0, 0]}}, data=b"", length=None)
def test_any_header(header: dict[str, Any], data: bytes, length: int | None):
    text = json.dumps(header).encode()
    check_file(struct.pack("<Q", len(text) if length is None else length) + text + data)


def test_dense_nesting_and_many_small_objects():
    for text in (b'{"a":[' + b"[]," * 30_000, b'{"a":' * 900 + b"1" + b"}" * 900, b"{" + b'"":{},' * 30_000):
        check_file(struct.pack("<Q", len(text)) + text)


def test_every_truncation_is_noticed(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    for length in range(len(VALID)):
        path.write_bytes(VALID[:length])
        assert opened(path, nbytes=length) is None


file_names = st.sampled_from(["model.safetensors", "other.safetensors", "../model.safetensors", "", ".", "\0", "x.bin"])
indices = st.one_of(
    json_values,
    st.fixed_dictionaries(
        {
            "weight_map": json_values
            | st.dictionaries(
                st.sampled_from(["weight", "bias", "x"]) | st.text(max_size=3), file_names | st.text(max_size=300)
            )
        }
    ),
)


@given(indices.map(lambda index: json.dumps(index).encode()) | st.binary(max_size=100))
@settings(max_examples=200)
@example(b'{"weight_map": {"weight": "model.safetensors", "bias": "model.safetensors"}}')
@example(b'{"weight_map": {"weight": "\\ud800.safetensors"}}')
def test_any_index(index: bytes):
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "model.safetensors").write_bytes(VALID)
        (Path(place) / INDEX_NAME).write_bytes(index)
        folder = opened(Path(place), nbytes=len(index) + len(VALID))
        if folder is not None:
            assert json.loads(index)["weight_map"] == dict.fromkeys(("weight", "bias"), "model.safetensors")
