"""Runs models in one program; `run.py` starts it with a task to read, and takes answers, a line each.

An answer has the negative log-probability of every token but the first of each window.
"""

import json
import os
import sys
import time
from pathlib import Path

# GPTQModel would compile its unpacking, which takes longer than to run it.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

# What begins a line that is an answer.
ANSWER = "answer: "


def losses_of(logits, window: list[int]) -> list[float]:
    """`logits` are [tokens, vocabulary], for the token after each."""
    import numpy as np

    logits = logits[:-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    normal = np.log(np.exp(logits).sum(-1))
    return (normal - logits[np.arange(len(window) - 1), window[1:]]).tolist()


def transformers(model):
    """Plain models, and those of compressed-tensors and bitsandbytes."""
    import torch
    from transformers import AutoModelForCausalLM

    config = json.loads((Path(model) / "config.json").read_text())
    # compressed-tensors unpacks 4-bit floats into BF16, so all has to be.
    half = "fp4" in (config.get("quantization_config") or {}).get("format", "")
    dtype = torch.bfloat16 if half else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map="cpu")
    loaded.eval()

    def logits(window):
        with torch.inference_mode():
            return loaded(torch.tensor([window])).logits[0].float().numpy()

    return logits


def gptqmodel(model):
    """GPTQ and AWQ, by the kernels of GPTQModel that are written in PyTorch. They compute in 16 bits."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(model, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)

    def logits(window):
        with torch.inference_mode():
            return loaded.model(torch.tensor([window])).logits[0].float().numpy()

    return logits


def mlx(model):
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    loaded, _ = load_model(Path(model))
    loaded.set_dtype(mx.float32, lambda dtype: mx.issubdtype(dtype, mx.floating))

    def logits(window):
        return np.array(loaded(mx.array([window]))[0].astype(mx.float32))

    return logits


def llama_cpp(model):
    import numpy as np
    from llama_cpp import Llama

    loaded = Llama(model, n_ctx=4096, logits_all=True, verbose=False)

    def logits(window):
        loaded.reset()
        loaded.eval(window)
        return np.array(loaded.scores[: len(window)])

    return logits


PROGRAMS = {
    "transformers": transformers,
    "compressed-tensors": transformers,
    "bitsandbytes": transformers,
    "fp8": transformers,
    "gptqmodel": gptqmodel,
    "mlx": mlx,
    "llama.cpp": llama_cpp,
}


def main() -> None:
    with open(sys.argv[1]) as file:
        task = json.load(file)
    for one in task["models"]:
        started = time.monotonic()
        try:
            logits = PROGRAMS[task["program"]](one["model"])
            answer = {"losses": [
                loss for window in one["tokens"] for loss in losses_of(logits(window), window)]}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["seconds"] = time.monotonic() - started
        print("\n" + ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
