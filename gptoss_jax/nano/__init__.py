"""gpt-oss-nano, the small model that comes with the package. Knows where it lies; the README beside it says more."""

import importlib.resources
from pathlib import Path

NAME = "nano"


def find(path: str | Path) -> Path:
    """`path`, or where the package has nano if "nano" is all that is said and no file here is called so."""
    if str(path) == NAME and not Path(path).exists():
        return Path(str(importlib.resources.files(__name__)))
    return Path(path)
