"""`plot`: the folder of a run in, a picture out. Draws nothing itself."""

import argparse
from pathlib import Path

from gptoss_jax.train.plot import plot as plot_run


def plot(options: argparse.Namespace) -> int:
    run = Path(options.run_folder)
    path = run / "plot.png" if options.out is None else Path(options.out)
    plot_run(run, path)
    print(path)
    return 0
