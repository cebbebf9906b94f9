"""The command line: `gptoss-jax COMMAND`. Knows arguments and exit codes; every command's work is done elsewhere."""

from gptoss_jax.cli.main import main

__all__ = ["main"]
