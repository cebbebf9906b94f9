"""What a run leaves behind for others: its adapter, or its model in the released layout. Knows formats by their doors.

The trained float32 masters are rounded once, as the model rounded them in its last step: an adapter keeps them as they
are, a model's weights become its dtype, and experts that were trained as MXFP4 are packed by the same rule.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8

from gptoss_jax.convert.adapters import base_digest, save_adapter
from gptoss_jax.convert.companions import TOKENIZER_NAME, companions
from gptoss_jax.convert.export import layout_tensors, open_base, tensor_bytes, write_release
from gptoss_jax.convert.names import Index
from gptoss_jax.convert.source import Parameters, Repacked
from gptoss_jax.convert.writer import write_folder
from gptoss_jax.hosts import barrier, is_first, together
from gptoss_jax.model.adapter import Adapter
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.experts import is_expert_matrix
from gptoss_jax.model.transformer import Experts, parameter_shapes, parameters
from gptoss_jax.train.leaves import Trained

ADAPTER, MODEL = "adapter", "model"


def write_outcome(
    run: Path, trained: Trained, leaves: Mapping[str, jax.Array], *, base: Path | None, tokenizer: Path
) -> Path:
    """Writes RUN/adapter or RUN/model, in place of what an earlier end of the run left there; gives its path.

    Args:
        run: its folder.
        trained: what was trained.
        leaves: the masters.
        base: what training began with; None for random weights.
        tokenizer: the folder that has it.

    Raises:
        UserError: the disk refuses.
    """
    adapter = trained.method.adapter
    if adapter is not None:
        assert base is not None, "an adapter of random weights"
        digest, made = base_digest(open_base(base)), Adapter(spec=adapter, leaves=dict(leaves))
        growing = _cleared(run / f"{ADAPTER}.new")
        save_adapter(growing, made, config=trained.model.config, base_digest=digest)
        return _put(growing, run / ADAPTER)
    whole = {name: _whole(leaf) for name, leaf in leaves.items()}
    growing = _cleared(run / f"{MODEL}.new")
    with together("writing the model"):
        if is_first():
            write_model(growing, trained, whole, base=base, tokenizer=tokenizer)
    return _put(growing, run / MODEL)


def write_model(
    path: Path, trained: Trained, leaves: Mapping[str, np.ndarray], *, base: Path | None, tokenizer: Path
) -> None:
    """The model with these masters as a folder of Hugging Face's layout, in the dtypes that it computes with.

    Args: as of `write_outcome`; `path` is a new folder, and one process writes it.
    """
    found: Parameters = TrainedParameters(trained, leaves, base=None if base is None else open_base(base))
    if trained.method.quantise:
        found = Repacked(found, "mxfp4", scale_rule="even")  # the rule of leaves.Trained.laid
    if base is not None:
        write_release(open_base(base), found, path, layout="hf")
        return
    tensors = {tensor.name: tensor for tensor in layout_tensors(found, "hf")}

    def chunks(name: str) -> Iterator[UInt8[np.ndarray, " bytes"]]:
        return tensor_bytes(found, tensors[name])

    text = (tokenizer / TOKENIZER_NAME).read_bytes()
    beside = companions(
        trained.model.config, tuple(tensors.values()), layout="hf", experts=found.experts, tokenizer=text
    )
    write_folder(path, tuple(tensors.values()), chunks, beside=beside)


class TrainedParameters:
    """The parameters of a model that was trained as a whole, in released shapes.

    Experts that are packed later are float32 until then, so that they are rounded once; all else has the dtype that the
    model computes with.

    Args:
        trained: what was trained.
        leaves: the masters.
        base: for parameters that were frozen; without it they are the model's own.
    """

    def __init__(self, trained: Trained, leaves: Mapping[str, np.ndarray], *, base: Parameters | None):
        self.config: ModelConfig = trained.model.config
        self.experts: Experts = "bf16"
        self._shapes = parameter_shapes(self.config, self.experts)
        self._leaves = leaves
        self._base = base
        self._quantised = trained.method.quantise
        self._own = parameters(trained.model)
        self._placement = trained.placement

    def shape(self, parameter: str) -> tuple[int, ...]:
        return self._shapes[parameter]

    def dtype(self, parameter: str) -> np.dtype:
        if self._quantised and is_expert_matrix(parameter):
            return np.dtype(np.float32)
        return np.dtype(self._own[parameter].dtype)

    def read(self, parameter: str, index: Index) -> np.ndarray:
        if parameter in self._leaves:
            found = self._leaves[parameter][index]
        elif self._base is not None:
            found = self._base.read(parameter, index)
        else:
            found = self._frozen(parameter)[index]
        return found.astype(self.dtype(parameter))

    def _frozen(self, parameter: str) -> np.ndarray:
        """Without what the mesh has added."""
        value = self._own[parameter]
        fits = self._placement.axis_fits(self._shapes[parameter], value.get_metadata()["axes"])
        return _whole(value.get_value())[tuple(slice(0, fit.size * fit.repeat, fit.repeat) for fit in fits)]


def _whole(leaf: jax.Array) -> np.ndarray:
    """The array of all processes; every one of them asks for it."""
    return np.asarray(leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True))


def _cleared(path: Path) -> Path:
    """Without what a run left there that was killed as it wrote."""
    if is_first():
        shutil.rmtree(path, ignore_errors=True)
    barrier("cleared")
    return path


def _put(growing: Path, path: Path) -> Path:
    if is_first():
        shutil.rmtree(path, ignore_errors=True)
        growing.rename(path)
    barrier("put")
    return path
