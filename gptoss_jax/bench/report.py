"""What stands around measured numbers: date, commit, device, versions. Knows no measurement."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

import gptoss_jax

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_ROOT = Path(gptoss_jax.__file__).resolve().parents[1]


def frame() -> dict[str, Any]:
    """The head of a result."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device(),
        "versions": {
            "python": platform.python_version(),
            "gptoss-jax": gptoss_jax.__version__,
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
            "platform": jax.devices()[0].client.platform_version.strip(),
        },
    }


def device() -> dict[str, Any]:
    """The first device; the others are taken to be like it."""
    first = jax.devices()[0]
    memory = first.memory_stats() or {}
    return {
        "kind": first.device_kind,
        "platform": first.platform,
        "count": jax.device_count(),
        "memory_bytes": memory.get("bytes_limit"),
    }


def commit() -> dict[str, Any]:
    """Results of an earlier run do not make the tree dirty: they change no measurement."""
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"id": _git("rev-parse", "HEAD") or "unknown", "dirty": status is None or bool(status)}


def _git(*arguments: str) -> str | None:
    """None where gptoss_jax is installed and no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
