"""Makes the seeds of the fuzz target `quantized` from the goldens beside this script.

    python make_quantized_corpus.py

A seed is one module of a golden with its configuration under `config`.
"""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent
CORPUS = HERE.parents[3] / "fuzz" / "corpus" / "quantized"
CORPUS.mkdir(parents=True, exist_ok=True)

for file, modules in {
    "gptq": ["act_order", "three"],
    "awq": ["groups"],
    "compressed_tensors": ["asymmetric", "whole_words", "int8_asymmetric", "float8_block", "nvfp4", "mxfp4"],
    "bitsandbytes": ["across_rows", "fp4_nested", "int8"],
    "fp8": ["blocks"],
    "mlx": ["three", "nvfp4"],
}.items():
    with safe_open(HERE / "quantized" / f"{file}.safetensors", "pt") as golden:
        for module in modules:
            mine = [name for name in golden.keys() if name.split(".")[0] == module]
            mine = [name for name in mine if name.split(".")[1] not in ("expected", "original")]
            config = json.loads(golden.metadata()[f"config.{module}"])
            save_file({name: golden.get_tensor(name) for name in mine},
                      CORPUS / f"{file}_{module}.safetensors",
                      {"config": json.dumps(config, separators=(",", ":"))})
