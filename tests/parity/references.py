"""The two PyTorch references, run on whole prompts on the CPU. Knows torch; knows nothing of gptoss_jax."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gpt_oss.torch.model import Transformer as OpenAiModel
from transformers import GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter


class TransformersModel:
    """GptOssForCausalLM from a folder in Hugging Face's layout; MXFP4 experts are dequantised on loading."""

    def __init__(self, folder: Path, *, dtype: Literal["float32", "bfloat16"]) -> None:
        self._model = GptOssForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            experts_implementation="eager",
            pad_token_id=None,  # the released id lies outside a toy vocabulary, which torch refuses
            eos_token_id=None,
        ).eval()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """float32[B, T, V] for int[B, T]."""
        with torch.inference_mode():
            return self._model(torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()

    def router_margins(self, tokens: np.ndarray) -> np.ndarray:
        """float32[B, T]: by how much the last chosen expert leads the first one left out, in the closest layer."""
        layers: list[torch.Tensor] = []
        active = self._model.config.num_experts_per_tok

        def keep(_module: torch.nn.Module, _inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
            best = torch.topk(outputs[0].float(), active + 1, dim=-1).values
            layers.append(best[:, active - 1] - best[:, active])

        routers = [module for module in self._model.modules() if isinstance(module, GptOssTopKRouter)]
        hooks = [router.register_forward_hook(keep) for router in routers]
        self.logits(tokens)
        for hook in hooks:
            hook.remove()
        return torch.stack(layers).amin(dim=0).reshape(tokens.shape).numpy()

    def greedy(self, prompt: np.ndarray, *, num_tokens: int) -> tuple[np.ndarray, float]:
        """The likeliest continuation of one prompt, and the smallest lead that any chosen token had over the next."""
        chosen: list[int] = []
        closest = np.inf
        step, cache = torch.from_numpy(prompt).long()[None], None
        with torch.inference_mode():
            for _ in range(num_tokens):
                out = self._model(step, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                best = torch.topk(out.logits[0, -1].float(), 2)
                closest = min(closest, float(best.values[0] - best.values[1]))
                step = best.indices[:1][None]
                chosen.append(int(step))
        return np.array(chosen, np.int32), closest

    def save(self, folder: Path) -> None:
        """A bf16 checkpoint as transformers writes it, config.json in its present form.

        It goes through a new model because transformers 5.23, saving one that was loaded from MXFP4, names the
        dequantised experts `_blocks`: it then finds no experts in that folder itself, and draws them at random.
        """
        unquantised = GptOssForCausalLM(self._model.config).bfloat16()
        unquantised.load_state_dict(self._model.state_dict())
        unquantised.save_pretrained(folder)


def openai_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """float32[B, T, V] of OpenAI's model, from a folder in its own layout.

    It is written in bf16 throughout; widened after loading, the same code computes in float32 from the same weights.
    """
    model = OpenAiModel.from_checkpoint(str(folder), device="cpu").float()
    with torch.inference_mode():
        return np.stack([model(torch.from_numpy(row)).numpy() for row in tokens])
