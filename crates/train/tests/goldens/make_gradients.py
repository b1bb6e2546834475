"""Gradients of tiny models of every family, as PyTorch computes them: gradients.json.

    python crates/train/tests/goldens/make_gradients.py

Needs torch and transformers; the models lie beside the tests of `bevel-model`. The loss is the mean cross-entropy of each
token's next one. Of each tensor's gradient the file has the norm, and sums over its values, in their order in the
checkpoint, each times a number in [-1, 1) that depends on its place: enough to notice a value in the wrong place.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

HERE = Path(__file__).parent
FAMILIES = HERE / "../../../model/tests/goldens/families"
SUMS = 4


def mix(place):
    """SplitMix64's finalizer."""
    z = (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def summed(gradient):
    values = gradient.double().flatten().numpy()
    places = np.arange(values.size, dtype=np.uint64) * np.uint64(SUMS)
    factors = [(mix(places + np.uint64(k)) >> np.uint64(40)).astype(np.float64) / 2**23 - 1 for k in range(SUMS)]
    return [float(np.linalg.norm(values)), *(float(values @ factor) for factor in factors)]


def gradients(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    model.train()
    tokens = torch.tensor(load_file(directory / "expected.safetensors")["tokens"].astype(np.int64))[None]
    logits = model(input_ids=tokens).logits.double()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    loss.backward()
    found = {name: summed(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.item(), "gradients": found}


def main():
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    with np.errstate(over="ignore"):
        cases = sorted(path for path in FAMILIES.iterdir() if path.is_dir())
        found = {case.name: gradients(case) for case in cases}
    lines = [f"{json.dumps(case)}: {json.dumps(values)}" for case, values in found.items()]
    (HERE / "gradients.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
