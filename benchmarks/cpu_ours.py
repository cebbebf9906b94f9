"""gptoss_jax as an engine of a comparison: `load` and `generate`, as a user calls them. Knows a checkpoint.

Runs in this environment: `python -m benchmarks.cpu_ours JOB`.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import gptoss_jax
from benchmarks import contest
from gptoss_jax.engine.request import SamplingParams
from gptoss_jax.model.transformer import Graph, split

_GREEDY = SamplingParams(temperature=0)


class Ours:
    """A checkpoint loaded by gptoss_jax; XLA and our own kernels take every core that the process may use."""

    def __init__(self, job: contest.Job):
        jax.config.update("jax_platforms", "cpu")
        self._model = gptoss_jax.load(job.model, dense="int8" if job.dense == "int8" else "bf16")
        self.versions = {"gptoss-jax": gptoss_jax.__version__, "jax": jax.__version__}

    def generate(self, prompt: Sequence[int], tokens: int) -> Iterator[int]:
        return gptoss_jax.generate(self._model, prompt, max_new_tokens=tokens, sampling=_GREEDY, stop_ids=())

    def scores(self, text: Sequence[int]) -> np.ndarray:
        graph, parameters = split(self._model)
        return np.asarray(_scores(graph, parameters, jnp.asarray([text], jnp.int32)))


@functools.partial(jax.jit, static_argnames="graph")
def _scores(graph: Graph, parameters: list[jax.Array], tokens: jax.Array) -> jax.Array:
    model = graph.merge(parameters)
    rows, num_tokens = tokens.shape
    cache = model.empty_cache(rows=rows, capacity=num_tokens)
    hidden, _ = model.extend(tokens, cache, count=jnp.full(rows, num_tokens, jnp.int32))
    return model.logits(hidden[0, -1])[: model.config.vocab_size]


if __name__ == "__main__":
    contest.main(Ours)
