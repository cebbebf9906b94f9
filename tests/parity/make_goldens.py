"""Writes tests/data/goldens: what transformers and OpenAI's model say in float32 about the models of cases.py.

    python -m tests.parity.make_goldens [CASE ...]

Needs torch, transformers and gpt-oss; the tests that read the goldens need none of them.
"""

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.parity import cases
from tests.parity.compare import mean_kl, relative_error
from tests.parity.references import TransformersModel, openai_logits

# Both references call the same matrix routines, so at many shapes they agree to the last bit: a wrong formula would
# show between them, a rounding error of both would not (tests/oracle.py judges that). Every eighth position is enough.
OPENAI_STRIDE = 8
# A golden nearer to a tie than these would judge rounding, not the model: choose another seed. Logits may be off by
# 2e-4 of a spread of 3, and router logits of order one by some 1e-6.
SMALLEST_ROUTER_MARGIN = 1e-5
SMALLEST_GREEDY_LEAD = 1e-3


def main(names: list[str]) -> None:
    cases.GOLDENS.mkdir(parents=True, exist_ok=True)
    for case in cases.CASES:
        if not names or case.name in names:
            with tempfile.TemporaryDirectory() as scratch:
                golden = make(case, Path(scratch))
            np.savez_compressed(case.golden, allow_pickle=False, **golden)
            print(case.name, case.golden.stat().st_size, "bytes", str(golden["about"]))


def make(case: cases.Case, scratch: Path) -> dict[str, np.ndarray]:
    case.write(scratch / "hf")
    prompts, positions = case.prompts, np.array(case.positions, np.int32)
    prompt = prompts[0]
    model = TransformersModel(scratch / "hf", dtype="float32")
    all_logits = model.logits(prompts)
    logits = all_logits[0, positions]
    margins = model.router_margins(prompt[None])[0]
    greedy, lead = model.greedy(prompt, num_tokens=cases.NUM_GREEDY)
    half = TransformersModel(scratch / "hf", dtype="bfloat16").logits(prompts)
    about = {
        "weights_sha256": cases.weights_sha256(scratch / "hf"),
        "transformers_bf16_kl": mean_kl(all_logits, half),
        "smallest_router_margin": float(margins.min()),
        "smallest_greedy_lead": lead,
        "spread": float(logits.std()),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gpt-oss", "numpy")},
    }
    golden = {
        "prompts": prompts,
        "positions": positions,
        "logits": logits,
        "near_tie": margins[positions] < cases.SAFE_MARGIN,
        "greedy": greedy,
    }
    if case.openai_can_say_it:
        case.write(scratch / "original", layout="original")
        theirs = openai_logits(scratch / "original", prompt[None])[0, positions[::OPENAI_STRIDE]]
        golden["openai_logits"] = theirs
        about["openai_against_transformers"] = relative_error(theirs, logits[::OPENAI_STRIDE])
    if about["smallest_router_margin"] < SMALLEST_ROUTER_MARGIN or lead < SMALLEST_GREEDY_LEAD:
        raise SystemExit(f"{case.name}: too near to a tie, choose another seed: {about}")
    return golden | {"about": np.array(json.dumps(about))}


if __name__ == "__main__":
    main(sys.argv[1:])
