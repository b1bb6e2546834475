"""A model of random weights in another's shape, for speed and memory: its words mean nothing.

    bevel convert smollm2 -o smollm2-hf
    python benches/random_model.py smollm2-hf OUT --hidden 2048 --layers 24 --heads 32 --kv-heads 32 --ffn 8192
    bevel quantize OUT Q4_0 -o random-1.7b-Q4_0.gguf

Configuration and tokenizer are those of a Llama-like directory with tied embeddings; the numbers given here (as
they stand: SmolLM2-1.7B) replace its own. Weights are bf16, normal, small enough to keep activations finite.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("source", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--hidden", type=int, default=2048)
parser.add_argument("--layers", type=int, default=24)
parser.add_argument("--heads", type=int, default=32)
parser.add_argument("--kv-heads", type=int, default=32)
parser.add_argument("--ffn", type=int, default=8192)
args = parser.parse_args()

args.out.mkdir(parents=True, exist_ok=True)
for file in args.source.iterdir():
    if file.suffix != ".safetensors" and file.name != "config.json":
        shutil.copy(file, args.out)
config = json.loads((args.source / "config.json").read_text())
config |= {"hidden_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": args.heads,
           "num_key_value_heads": args.kv_heads, "intermediate_size": args.ffn, "torch_dtype": "bfloat16"}
config.pop("head_dim", None)
(args.out / "config.json").write_text(json.dumps(config, indent=1))

head = args.hidden // args.heads
shapes = {"model.embed_tokens.weight": [config["vocab_size"], args.hidden], "model.norm.weight": [args.hidden]}
for i in range(args.layers):
    layer = {
        "input_layernorm": [args.hidden],
        "post_attention_layernorm": [args.hidden],
        "self_attn.q_proj": [args.hidden, args.hidden],
        "self_attn.k_proj": [args.kv_heads * head, args.hidden],
        "self_attn.v_proj": [args.kv_heads * head, args.hidden],
        "self_attn.o_proj": [args.hidden, args.hidden],
        "mlp.gate_proj": [args.ffn, args.hidden],
        "mlp.up_proj": [args.ffn, args.hidden],
        "mlp.down_proj": [args.hidden, args.ffn],
    }
    shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}

header, offset = {}, 0
for name, shape in shapes.items():
    end = offset + 2 * math.prod(shape)
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
    offset = end
random = np.random.default_rng(1)
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open(args.out / "model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in shapes.items():
        if len(shape) == 1:
            values = np.ones(shape, np.float32)
        else:
            values = random.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
        file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
