"""What llama.cpp makes of each tensor in each mix, for small models of telling shapes.

Writes mixes.json: for each model and mix, the types of each kind of tensor layer by layer, equal
neighbours joined (`2xQ5_K 6xQ4_K`). Needs the packages `gguf`, `numpy` and `llama-cpp-python`;
made with llama-cpp-python 0.3.36. Nothing is quantized: llama.cpp tells its plan in a dry run.
"""

import ctypes
import itertools
import json
import pathlib
import re
import tempfile

import gguf
import llama_cpp
import numpy as np

MIXES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q5_K_S": 16, "Q5_1": 9,
    "Q5_0": 8, "Q4_K_M": 15, "Q4_K_S": 14, "IQ4_NL": 25, "IQ4_XS": 30, "Q4_1": 3, "Q4_0": 2,
    "MXFP4_MOE": 38, "Q3_K_L": 13, "Q3_K_M": 12, "Q3_K_S": 11, "Q2_K": 10, "Q2_K_S": 21,
    "TQ2_0": 37, "TQ1_0": 36,
}
# arch, layers, dim, heads, kv_heads, experts, tied
MODELS = {
    "plain": ("llama", 32, 256, 8, 8, 0, False),
    "shared": ("llama", 19, 256, 8, 2, 0, True),
    "70b": ("llama", 80, 256, 8, 1, 0, False),
    "qwen-72b": ("qwen2", 80, 256, 8, 1, 0, False),
    "experts": ("llama", 16, 256, 8, 4, 8, False),
    "many-experts": ("qwen3moe", 9, 256, 8, 2, 16, False),
    "narrow": ("llama", 16, 288, 9, 3, 0, True),
    "odd": ("llama", 4, 240, 6, 6, 0, False),
    "fused": ("phi3", 32, 256, 8, 8, 0, False),
}
VOCABULARY = 64


def tensors(arch, layers, dim, heads, kv_heads, experts, tied):
    """Names and shapes, outermost dimension first."""
    kv = dim // heads * kv_heads
    yield "token_embd.weight", (VOCABULARY, dim)
    yield "output_norm.weight", (dim,)
    if not tied:
        yield "output.weight", (VOCABULARY, dim)
    for layer in range(layers):
        of_layer = {
            "attn_norm": (dim,), "ffn_norm": (dim,), "attn_q": (dim, dim), "attn_k": (kv, dim),
            "attn_v": (kv, dim), "attn_output": (dim, dim), "ffn_gate": (dim, dim),
            "ffn_up": (dim, dim), "ffn_down": (dim, dim),
        }
        if arch == "phi3":
            for name in ("attn_q", "attn_k", "attn_v", "ffn_gate"):
                del of_layer[name]
            of_layer |= {"attn_qkv": (dim + 2 * kv, dim), "ffn_up": (2 * dim, dim)}
        if arch == "qwen3moe":
            of_layer |= {"attn_q_norm": (dim // heads,), "attn_k_norm": (dim // heads,)}
        if experts:
            for name in ("ffn_gate", "ffn_up", "ffn_down"):
                of_layer[name + "_exps"] = (experts, *of_layer.pop(name))
            of_layer["ffn_gate_inp"] = (experts, dim)
        for name, shape in of_layer.items():
            yield f"blk.{layer}.{name}.weight", shape


def write(path, arch, layers, dim, heads, kv_heads, experts, tied):
    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(layers)
    w.add_context_length(128)
    w.add_embedding_length(dim)
    w.add_feed_forward_length(dim)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(VOCABULARY)
    w.add_rope_dimension_count(dim // heads)
    if arch == "phi3":
        w.add_sliding_window(0)
    if experts:
        w.add_expert_count(experts)
        w.add_expert_used_count(2)
        w.add_expert_feed_forward_length(dim)
    for name, shape in tensors(arch, layers, dim, heads, kv_heads, experts, tied):
        matrix = len(shape) > 1
        w.add_tensor(name, np.zeros(shape, np.float16 if matrix else np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


LINES = []


@llama_cpp.llama_log_callback
def log(level, text, data):
    LINES.append(text.decode())


def planned(path, file_type):
    """Types by tensor name."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.dry_run, params.nthread = file_type, True, 1
    LINES.clear()
    code = llama_cpp.llama_model_quantize(str(path).encode(), b"/dev/null", ctypes.byref(params))
    text = "".join(LINES)
    assert code == 0, text
    found = {}
    # The warnings about fallbacks lie between the name and the size.
    for line in re.findall(r"\[ *\d+/ *\d+\] .*", text):
        name = re.search(r"\] (\S+)", line).group(1)
        was = re.search(r"type = +(\S+),", line).group(1)
        new = re.search(r"-> .* MiB \((\S+)\)", line)
        found[name] = (new.group(1) if new else was).upper()
    return found


def joined(types):
    """`2xQ5_K 6xQ4_K`"""
    return " ".join(f"{len(list(run))}x{t}" for t, run in itertools.groupby(types))


def main():
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    result = {}
    with tempfile.TemporaryDirectory() as directory:
        for model, shape in MODELS.items():
            path = pathlib.Path(directory) / f"{model}.gguf"
            write(path, *shape)
            keys = ("architecture", "layers", "dim", "heads", "kv_heads", "experts", "tied")
            mixes = {}
            for mix, file_type in MIXES.items():
                kinds = {}
                types = planned(path, file_type)
                for name, dims in tensors(*shape):
                    if len(dims) > 1:
                        kinds.setdefault(re.sub(r"blk\.\d+\.", "", name), []).append(types[name])
                mixes[mix] = {kind: joined(types) for kind, types in kinds.items()}
            result[model] = dict(zip(keys, shape)) | {"mixes": mixes}
            path.unlink()
    out = pathlib.Path(__file__).with_name("mixes.json")
    out.write_text(json.dumps(result, indent=1) + "\n")


main()
