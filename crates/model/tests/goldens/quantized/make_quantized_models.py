"""Quantizes tiny random decoders with the programs that define the formats, and records
transformers' logits with the weights as those programs unpack them: GPTQModel and compressed-tensors
round them to half precision.

    python make_quantized_models.py

Each case is a directory with `config.json`, `model.safetensors` and `expected.safetensors` (token ids
and the f32 logits of every position). Made with transformers 5.17.0, GPTQModel 7.7.0 (GPTQ, AWQ),
compressed-tensors 0.19.0, bitsandbytes 0.50.2 and mlx 0.32.4.
"""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
TOKENS = 40
GROUP = 32

COMMON = dict(
    vocab_size=80,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
EXPERTS = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, norm_topk_prob=True)
PARTIAL = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)


def grid(values, symmetric):
    """4-bit scales and zero points [rows, groups], by minima and maxima."""
    groups = values.view(values.shape[0], -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        scale = (torch.maximum(-low, high) * 2 / 15).half().float()
        return scale, torch.full_like(scale, 8)
    scale = ((high - low) / 15).half().float()
    return scale, torch.round(-low / scale).clamp(0, 15)


def on_grid(values, scale, zero, g_idx):
    s, z = scale[:, g_idx], zero[:, g_idx]
    return s * ((torch.round(values / s) + z).clamp(0, 15) - z)


def gptq(name, values):
    """Each module's columns in an order of their own."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    rows, cols = values.shape
    seed = sum(name.encode())
    g_idx = torch.arange(cols) // GROUP
    g_idx = g_idx[torch.randperm(cols, generator=torch.Generator().manual_seed(seed))]
    scale, zero = grid(values, False)
    zero = zero.clamp(min=1)
    linear = torch.nn.Linear(cols, rows, bias=False)
    linear.weight.data = on_grid(values, scale, zero, g_idx)
    layer = TorchLinear(bits=4, group_size=GROUP, sym=False, desc_act=True,
                        in_features=cols, out_features=rows, bias=False)
    layer.pack(linear, scale, zero, g_idx.int())
    layer.post_init()
    expected = layer.dequantize_weight().T
    convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=4, group_size=GROUP))
    return {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales", "g_idx")}, expected


def awq(name, values):
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    rows, cols = values.shape
    scale, zero = grid(values, False)
    linear = torch.nn.Linear(cols, rows, bias=False)
    linear.weight.data = on_grid(values, scale, zero, torch.arange(cols) // GROUP)
    layer = AwqTorchLinear(bits=4, group_size=GROUP, sym=False, desc_act=False,
                           in_features=cols, out_features=rows, bias=False)
    layer.pack(linear, scale, zero)
    expected = layer._dequantize_weight_for_inference(torch.zeros(1, cols), dtype=torch.float16).T
    return {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales")}, expected


def compressed(format, **arguments):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=format,
                                quantization_status="compressed", ignore=["lm_head"])

    def pack(name, values):
        values = values.to(torch.bfloat16)
        state = {"weight": values}
        groups = values.view(values.shape[0], -1, args.group_size or values.shape[1])
        if args.strategy == "tensor_group":
            state["weight_global_scale"] = generate_gparam(values.amin(), values.amax()).view(1)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args,
                                        global_scale=state.get("weight_global_scale"))
        state |= {"weight_scale": scale, "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(format)
        packed = compressor.compress(state, scheme)
        return packed, compressor.decompress(dict(packed), scheme)["weight"]

    return {"quantization_config": config.model_dump(mode="json")}, pack


def bitsandbytes(name, values):
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    layer = bnb.nn.Linear4bit(values.shape[1], values.shape[0], bias=False, quant_type="nf4",
                              compress_statistics=True, compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4",
                                     compress_statistics=True, blocksize=64)
    layer = layer.to("cpu")
    state = layer.weight.quant_state
    expected = dequantize_4bit(layer.weight, state)
    if values.shape[1] % 64:
        # The processor's own routine of this release takes every row to begin a block.
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        codes = torch.stack([layer.weight >> 4, layer.weight & 15], -1).flatten().long()
        expected = (state.code[codes].view(-1, 64) * absmax[:, None]).view(values.shape)
    return layer.state_dict(), expected


def mlx(name, values):
    import mlx.core as mx
    import numpy as np

    to_torch = lambda array: torch.from_numpy(np.array(array).copy())
    packed, scales, biases = mx.quantize(mx.array(values.numpy()), group_size=GROUP, bits=4)
    expected = mx.dequantize(packed, scales, biases, group_size=GROUP, bits=4)
    parts = {"weight": packed, "scales": scales, "biases": biases}
    return {part: to_torch(array) for part, array in parts.items()}, to_torch(expected)


GPTQ = dict(quant_method="gptq", bits=4, group_size=GROUP, desc_act=True, sym=False,
            checkpoint_format="gptq", pack_dtype="int32")
AWQ = dict(quant_method="awq", zero_point=True, group_size=GROUP, bits=4, version="gemm",
           modules_to_not_convert=None)
NF4 = dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4",
           bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32")
MLX = dict(group_size=GROUP, bits=4, mode="affine")
INT4 = dict(num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=False)
NVFP4 = dict(num_bits=4, type="float", strategy="tensor_group", group_size=16)
FP8 = dict(num_bits=8, type="float", strategy="channel")

# Case: the model, whether the embedding is quantized, what `config.json` says, the packing.
CASES = {
    "llama_gptq_act_order": ("LlamaConfig", dict(), False, {"quantization_config": GPTQ}, gptq),
    "qwen2_awq": ("Qwen2Config", dict(), False, {"quantization_config": AWQ}, awq),
    "qwen3moe_pack_quantized": (
        "Qwen3MoeConfig", dict(head_dim=16, **EXPERTS), False, *compressed("pack-quantized", **INT4)),
    "llama_nvfp4": ("LlamaConfig", dict(), False, *compressed("nvfp4-pack-quantized", **NVFP4)),
    "phi3_float8": ("Phi3Config", dict(rope_parameters=PARTIAL), False,
                    *compressed("float-quantized", **FP8)),
    "llama_nf4": ("LlamaConfig", dict(), False, {"quantization_config": NF4}, bitsandbytes),
    "llama_mlx_tied": ("LlamaConfig", dict(tie_word_embeddings=True), True,
                       {"quantization": MLX, "quantization_config": MLX}, mlx),
    "phi3_mlx": ("Phi3Config", dict(rope_parameters=PARTIAL), True,
                 {"quantization": MLX, "quantization_config": MLX}, mlx),
}


def randomize(model):
    """Weights large enough that every layer shows in the logits; norms near one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif "embed" in name:
                p.copy_(noise)
            else:
                p.copy_(noise * 1.5 / p.shape[-1] ** 0.5)
            p.copy_(p.to(torch.bfloat16).float())


def main():
    ids = torch.randint(0, COMMON["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(1))
    for name, (config_class, extra, embedding, quantization, pack) in CASES.items():
        config = getattr(transformers, config_class)(**{**COMMON, **extra})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomize(model)
        directory = HERE / name
        shutil.rmtree(directory, ignore_errors=True)
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)

        stored, unpacked = {}, {}
        for key, values in load_file(directory / "model.safetensors").items():
            is_linear = values.dim() == 2 and "layers" in key and "mlp.gate.weight" not in key
            is_outer = key.endswith(("embed_tokens.weight", "lm_head.weight"))
            if is_linear or (is_outer and embedding):
                module = key.removesuffix(".weight")
                parts, expected = pack(module, values)
                stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
                unpacked[key] = expected.float()
            else:
                stored[key] = values.to(torch.bfloat16)
                unpacked[key] = values
        contiguous = lambda tensors: {k: t.detach().contiguous().clone() for k, t in tensors.items()}
        save_file(contiguous(unpacked), directory / "model.safetensors", {"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = model(ids).logits[0]
        save_file(contiguous(stored), directory / "model.safetensors", {"format": "pt"})
        save_file({"tokens": ids[0].to(torch.int32), "logits": logits.contiguous()},
                  directory / "expected.safetensors")
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | quantization, indent=1) + "\n")
        size = max(f.stat().st_size for f in directory.iterdir())
        print(f"{name:24} {size:7} bytes, |logits| {logits.abs().mean():.2f}")


main()
