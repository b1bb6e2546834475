"""The weights that a quantized model stands for, as f32 tensors with their Hugging Face names.

`weights(path)` reads a GGUF file (llama and qwen2 families) or a Hugging Face directory: full precision,
GPTQ, AWQ (gemm), compressed-tensors (pack-quantized), bitsandbytes, MLX. What is read is what the file
says exactly, in f32, not what some kernel makes of it, so that models differ in their weights alone.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open


def weights(path):
    """(name, tensor) pairs, one at a time."""
    path = Path(path)
    return from_gguf(path) if path.suffix == ".gguf" else from_directory(path)


def size_in_bytes(path):
    """What the weights take on disk: the GGUF file, or the directory's safetensors files."""
    path = Path(path)
    files = [path] if path.suffix == ".gguf" else list(path.glob("*.safetensors"))
    return sum(f.stat().st_size for f in files)


def bits_per_weight(path):
    """Of the block matrices: packed codes, scales, minima and everything else that is stored for them."""
    path = Path(path)
    stored, count = 0, 0
    if path.suffix == ".gguf":
        from gguf import GGUFReader
        for tensor in GGUFReader(path).tensors:
            if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
                stored += int(tensor.n_bytes)
                count += int(tensor.n_elements)
        return 8 * stored / count
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                if ".layers." in name and "norm" not in name and not name.endswith(".bias"):
                    tensor = f.get_tensor(name)
                    stored += tensor.numel() * tensor.element_size()
    for name, tensor in from_directory(path):
        if ".layers." in name and tensor.dim() == 2:
            count += tensor.numel()
    return 8 * stored / count


# GGUF

BLOCK = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def from_gguf(path):
    from gguf import GGUFReader
    from gguf.quants import dequantize
    reader = GGUFReader(path)
    architecture = reader.get_field("general.architecture").contents()
    heads = reader.get_field(f"{architecture}.attention.head_count").contents()
    kv_heads = reader.get_field(f"{architecture}.attention.head_count_kv").contents()
    for tensor in reader.tensors:
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        stem, kind = tensor.name.rsplit(".", 1)
        if stem == "rope_freqs":
            continue
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if not block:
            yield f"{WHOLE[stem]}.{kind}", values
            continue
        layer, part = block.groups()
        if architecture == "llama" and part in ("attn_q", "attn_k"):
            values = unpaired(values, heads if part == "attn_q" else kv_heads)
        yield f"model.layers.{layer}.{BLOCK[part]}.{kind}", values


def unpaired(values, heads):
    """llama.cpp keeps the two halves of each head's rows interleaved; back to one after the other."""
    rows = values.shape[0]
    return values.reshape(heads, rows // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


# Hugging Face directories

def from_directory(path):
    files = {}
    for file in sorted(path.glob("*.safetensors")):
        opened = safe_open(file, "pt")
        files.update(dict.fromkeys(opened.keys(), opened))
    config = json.loads((path / "config.json").read_text())
    how = config.get("quantization_config") or config.get("compression_config") or {}
    method = how.get("quant_method", "")
    if not method and "quantization" in config:
        method, how = "mlx", config["quantization"]
    if method == "auto-round" and "awq" in how.get("packing_format", ""):
        method = "awq"
    elif method == "auto-round":
        method = "gptq"
    take = lambda name: files[name].get_tensor(name)
    readers = {"": plain, "gptq": gptq, "awq": awq, "compressed-tensors": compressed, "bitsandbytes": nf4,
               "mlx": mlx}
    if method not in readers:
        raise SystemExit(f"{path}: quantization `{method}` is not known here")
    for name in files:
        found = readers[method](name, take, files, how)
        if found is not None:
            yield found[0], found[1].float()


def plain(name, take, files, how):
    return name, take(name)


def unpacked(words, bits, count):
    """Codes out of u32 words along the last axis, least significant first; `count` of each row."""
    data = words.numpy().astype(np.int64) & 0xFFFFFFFF
    places = np.arange(data.shape[-1] * 32 // bits) * bits
    low, shift = places // 32, places % 32
    high = np.minimum(low + 1, data.shape[-1] - 1)
    codes = (data[..., low] | (data[..., high] << 32)) >> shift
    return torch.from_numpy((codes & ((1 << bits) - 1))[..., :count])


def gptq(name, take, files, how):
    """qweight [in·bits/32, out], scales [groups, out], qzeros [groups, out·bits/32], g_idx [in]."""
    stem, kind = name.rsplit(".", 1)
    if f"{stem}.qweight" not in files:
        return name, take(name)
    if kind == "bias":
        return name, take(name)
    if kind != "qweight":
        return None
    scales = take(f"{stem}.scales").float()
    words = take(name)
    bits = how["bits"]
    inputs = words.shape[0] * 32 // bits
    codes = unpacked(words.T.contiguous(), bits, inputs).T  # [in, out]
    zeros = unpacked(take(f"{stem}.qzeros"), bits, scales.shape[1])
    if how.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & ((1 << bits) - 1)  # version 1 stores them less one
    group = how["group_size"] if how["group_size"] > 0 else inputs
    index = take(f"{stem}.g_idx").long() if f"{stem}.g_idx" in files else torch.arange(inputs) // group
    return f"{stem}.weight", (scales[index] * (codes - zeros[index])).T


def awq(name, take, files, how):
    """qweight [in, out/8] and qzeros [groups, out/8] with columns in the order 0 2 4 6 1 3 5 7."""
    stem, kind = name.rsplit(".", 1)
    if f"{stem}.qweight" not in files or kind == "bias":
        return name, take(name)
    if kind != "qweight":
        return None
    scales = take(f"{stem}.scales").float()
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])

    def columns(words):
        codes = unpacked(words, 4, words.shape[1] * 8)
        return codes.reshape(len(codes), -1, 8)[:, :, order].reshape(len(codes), -1)

    codes, zeros = columns(take(name)), columns(take(f"{stem}.qzeros"))
    each = codes.shape[0] // scales.shape[0]
    spread = lambda t: t.repeat_interleave(each, 0)
    return f"{stem}.weight", (spread(scales) * (codes - spread(zeros))).T


def compressed(name, take, files, how):
    """weight_packed [out, in·bits/32], weight_scale [out, groups], weight_zero_point packed along out."""
    stem, kind = name.rsplit(".", 1)
    if f"{stem}.weight_packed" not in files or kind == "bias":
        return name, take(name)
    if kind != "weight_packed":
        return None
    options = next(iter(how["config_groups"].values()))["weights"]
    bits = options["num_bits"]
    rows, inputs = take(f"{stem}.weight_shape").tolist()
    scale = take(f"{stem}.weight_scale").float()
    codes = fields(take(name), bits, inputs)
    if f"{stem}.weight_zero_point" in files:
        zeros = fields(take(f"{stem}.weight_zero_point").T.contiguous(), bits, rows).T
    else:
        zeros = torch.full_like(scale, 1 << (bits - 1))
    spread = lambda t: t.repeat_interleave(inputs // scale.shape[1], 1)
    return f"{stem}.weight", spread(scale) * (codes - spread(zeros))


def fields(words, bits, count):
    """Like `unpacked`, of words that hold 32/bits whole codes each."""
    data = words.numpy().astype(np.int64) & 0xFFFFFFFF
    each = 32 // bits
    codes = (data[..., None] >> (np.arange(each) * bits)) & ((1 << bits) - 1)
    return torch.from_numpy(codes.reshape(*data.shape[:-1], -1)[..., :count])


def nf4(name, take, files, how):
    """Packed codes with their block maxima, by bitsandbytes itself."""
    from bitsandbytes.functional import QuantState, dequantize_4bit
    parts = {k: files[k] for k in files if k.startswith(f"{name}.")}
    if parts:
        found = {k[len(name) + 1:]: take(k) for k in parts}
        state = QuantState.from_dict(found, device=torch.device("cpu"))
        state.dtype = torch.float32
        return name, dequantize_4bit(take(name), state)
    if any(part in name for part in (".absmax", ".quant_map", ".nested_", ".quant_state")):
        return None
    return name, take(name)


def mlx(name, take, files, how):
    """weight u32 [out, in·bits/32], scales and biases [out, groups]: scale·code + bias."""
    stem, kind = name.rsplit(".", 1)
    if f"{stem}.scales" not in files or kind == "bias":
        return name, take(name)
    if kind != "weight":
        return None
    scales, biases = take(f"{stem}.scales").float(), take(f"{stem}.biases").float()
    own = how.get(stem, how)
    words, bits = take(name), own["bits"]
    codes = unpacked(words.view(torch.int32), bits, words.shape[-1] * 32 // bits)
    spread = lambda t: t.repeat_interleave(own["group_size"], 1)
    return f"{stem}.weight", spread(scales) * codes + spread(biases)
