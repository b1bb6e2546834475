"""What llama.cpp makes of each tensor in each mix, for small models of telling shapes.

    make_mixes.py LLAMA_QUANTIZE

Writes mixes.json: for each model and mix, the types of each kind of tensor layer by layer, equal
neighbours joined (`2xQ5_K 6xQ4_K`); `with_importance` has the kinds that become something else where
there is an importance matrix. Needs the packages `gguf` and `numpy`. LLAMA_QUANTIZE is llama.cpp's
tool (made with the source inside llama-cpp-python 0.3.36). Nothing is quantized: llama.cpp tells its
plan in a dry run.
"""

import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import gguf
import numpy as np

MIXES = [
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S",
    "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_0", "MXFP4_MOE", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S",
    "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "TQ2_0", "TQ1_0",
]
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


def write_imatrix(path):
    """An importance matrix of one entry: the plan depends on there being one."""
    w = gguf.GGUFWriter(path, "none")
    w.add_string("general.type", "imatrix")
    w.add_array("imatrix.datasets", ["none"])
    w.add_uint32("imatrix.chunk_count", 1)
    w.add_uint32("imatrix.chunk_size", 1)
    w.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 256), np.float32))
    w.add_tensor("blk.0.attn_q.weight.counts", np.ones((1, 1), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def planned(tool, path, mix, imatrix):
    """Types by tensor name."""
    command = [tool, "--dry-run", *(["--imatrix", imatrix] if imatrix else []), path, mix]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    text = run.stdout + run.stderr
    assert run.returncode == 0, text
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


def by_kind(types, shape):
    """Types of each kind of tensor, layer by layer."""
    kinds = {}
    for name, dims in tensors(*shape):
        if len(dims) > 1:
            kinds.setdefault(re.sub(r"blk\.\d+\.", "", name), []).append(types[name])
    return {kind: joined(types) for kind, types in kinds.items()}


def main():
    tool, result = sys.argv[1], {}
    with tempfile.TemporaryDirectory() as directory:
        imatrix = pathlib.Path(directory) / "imatrix.gguf"
        write_imatrix(imatrix)
        for model, shape in MODELS.items():
            path = pathlib.Path(directory) / f"{model}.gguf"
            write(path, *shape)
            keys = ("architecture", "layers", "dim", "heads", "kv_heads", "experts", "tied")
            mixes, with_importance = {}, {}
            for mix in MIXES:
                mixes[mix] = by_kind(planned(tool, path, mix, None), shape)
                weighed = by_kind(planned(tool, path, mix, imatrix), shape)
                others = {k: t for k, t in weighed.items() if t != mixes[mix][k]}
                with_importance |= {mix: others} if others else {}
            figures = {"mixes": mixes, "with_importance": with_importance}
            result[model] = dict(zip(keys, shape)) | figures
            path.unlink()
    out = pathlib.Path(__file__).with_name("mixes.json")
    out.write_text(json.dumps(result, indent=1) + "\n")


main()
