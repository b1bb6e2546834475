"""Writes the goldens of quantized checkpoints with the programs that define the formats.

    python make_quantized.py

`quantized/FORMAT.safetensors` holds small matrices, each as a module `NAME` in one variant of the
format, packed by the real package, and `NAME.expected`: the same weights as that package
unpacks them. `config.NAME` in the metadata is what `config.json` says of it.

Made with GPTQModel 7.7.0 (GPTQ, AWQ), compressed-tensors 0.19.0, bitsandbytes 0.50.2,
mlx 0.32.4 and torch 2.14.0 (FP8).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent / "quantized"
HERE.mkdir(exist_ok=True)


def weights(rows, cols, dtype=torch.float32):
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols))
    return (values * 0.05).to(dtype)


class File:
    def __init__(self):
        self.tensors, self.configs = {}, {}

    def add(self, name, config, tensors, expected):
        """`config` may grow afterwards: it is written by `save`."""
        for part, tensor in tensors.items():
            self.tensors[f"{name}.{part}"] = tensor.detach().contiguous().clone()
        self.tensors[f"{name}.expected"] = expected.detach().contiguous().clone()
        self.configs[f"config.{name}"] = config

    def save(self, name):
        metadata = {name: json.dumps(config) for name, config in self.configs.items()}
        save_file(self.tensors, HERE / f"{name}.safetensors", {"format": "pt"} | metadata)


def grid(values, bits, group, symmetric):
    """Scales and zero points [rows, groups], by minima and maxima."""
    rows, cols = values.shape
    padded = torch.nn.functional.pad(values, (0, -cols % group)).view(rows, -1, group)
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) * 2 / (2**bits - 1)
        return scale.half().float(), torch.full_like(scale, 2 ** (bits - 1))
    scale = ((high - low) / (2**bits - 1)).half().float()
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


def on_grid(values, scale, zero, bits, g_idx):
    s, z = scale[:, g_idx], zero[:, g_idx]
    return s * ((torch.round(values / s) + z).clamp(0, 2**bits - 1) - z)


def gptq():
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    file = File()
    for name, bits, group, symmetric, act_order, version, rows, cols in [
        ("four", 4, 32, True, False, "gptq", 32, 96),
        ("asymmetric", 4, 32, False, False, "gptq", 32, 96),
        ("act_order", 4, 32, False, True, "gptq", 32, 96),
        ("second", 4, 32, False, False, "gptq_v2", 32, 96),
        ("two", 2, 32, False, False, "gptq", 32, 64),
        ("three", 3, 32, False, False, "gptq", 32, 64),
        ("three_second", 3, 32, False, True, "gptq_v2", 32, 64),
        ("eight", 8, 32, False, False, "gptq", 32, 64),
        ("row", 4, -1, False, False, "gptq", 32, 64),
    ]:
        values = weights(rows, cols)
        size = cols if group == -1 else group
        g_idx = torch.arange(cols) // size
        if act_order:
            g_idx = g_idx[torch.randperm(cols, generator=torch.Generator().manual_seed(1))]
        scale, zero = grid(values, bits, size, symmetric)
        linear = torch.nn.Linear(cols, rows, bias=False)
        linear.weight.data = on_grid(values, scale, zero, bits, g_idx)
        layer = TorchLinear(bits=bits, group_size=size, sym=symmetric, desc_act=act_order,
                            in_features=cols, out_features=rows, bias=False)
        layer.pack(linear, scale, zero, g_idx.int())
        layer.post_init()
        expected = layer.dequantize_weight().T
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=group))
        # "three" is a module of 3 bits in a checkpoint of 4, as `dynamic` allows.
        config = {"quant_method": "gptq", "bits": 4 if name == "three" else bits,
                  "group_size": group, "desc_act": act_order, "sym": symmetric,
                  "checkpoint_format": version, "pack_dtype": "int32"}
        if name == "three":
            config["dynamic"] = {r"+:.*three": {"bits": 3}}
        parts = {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
        file.add(name, {"quantization_config": config}, parts, expected)
    file.save("gptq")


def awq():
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    file = File()
    rows, cols = 32, 96
    values = weights(rows, cols)
    for name, group in [("groups", 32), ("row", -1)]:
        size = cols if group == -1 else group
        scale, zero = grid(values, 4, size, False)
        linear = torch.nn.Linear(cols, rows, bias=False)
        linear.weight.data = on_grid(values, scale, zero, 4, torch.arange(cols) // size)
        layer = AwqTorchLinear(bits=4, group_size=size, sym=False, desc_act=False,
                               in_features=cols, out_features=rows, bias=False)
        layer.pack(linear, scale, zero)
        expected = layer._dequantize_weight_for_inference(torch.zeros(1, cols), dtype=torch.float16).T
        config = {"quant_method": "awq", "zero_point": True, "group_size": group, "bits": 4,
                  "version": "gemm", "modules_to_not_convert": None}
        parts = {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales")}
        file.add(name, {"quantization_config": config}, parts, expected)
    file.save("awq")


def compressed_tensors():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    file = File()
    int4 = dict(num_bits=4, type="int", strategy="group", group_size=32)
    for name, format, args, rows, cols in [
        ("symmetric", "pack-quantized", int4, 16, 96),
        ("asymmetric", "pack-quantized", dict(int4, symmetric=False), 16, 96),
        ("channel", "pack-quantized", dict(num_bits=8, type="int", strategy="channel"), 16, 96),
        ("three", "pack-quantized", dict(int4, num_bits=3, symmetric=False), 24, 96),
        ("five", "pack-quantized", dict(int4, num_bits=5, symmetric=False), 24, 96),
        ("int8", "int-quantized", dict(num_bits=8, type="int", strategy="channel"), 16, 96),
        ("int8_asymmetric", "int-quantized",
         dict(num_bits=8, type="int", strategy="channel", symmetric=False), 16, 96),
        ("float8", "float-quantized", dict(num_bits=8, type="float", strategy="channel"), 16, 96),
        ("float8_tensor", "float-quantized", dict(num_bits=8, type="float", strategy="tensor"), 16, 96),
        ("float8_block", "float-quantized",
         dict(num_bits=8, type="float", strategy="block", block_structure=[8, 64]), 20, 96),
        ("nvfp4", "nvfp4-pack-quantized",
         dict(num_bits=4, type="float", strategy="tensor_group", group_size=16,
              scale_dtype=torch.float8_e4m3fn), 16, 96),
        ("mxfp4", "mxfp4-pack-quantized",
         dict(num_bits=4, type="float", strategy="group", group_size=32,
              scale_dtype=torch.uint8, zp_dtype=torch.uint8), 16, 96),
    ]:
        # These three are compared with our own rounding, which is that of single precision.
        ours = name in ("nvfp4", "mxfp4", "float8")
        values = weights(rows, cols, torch.float32 if ours else torch.bfloat16)
        args = QuantizationArgs(**args)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
        state = {"weight": values}
        if args.strategy == "tensor":
            low, high = values.amin().view(1), values.amax().view(1)
        elif args.strategy == "channel":
            low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        elif args.strategy == "block":
            tall, wide = args.block_structure
            padded = torch.nn.functional.pad(values, (0, -cols % wide, 0, -rows % tall))
            blocks = padded.view(padded.shape[0] // tall, tall, -1, wide)
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        else:
            groups = values.view(rows, -1, args.group_size)
            low, high = groups.amin(-1), groups.amax(-1)
        if args.strategy == "tensor_group":
            state["weight_global_scale"] = generate_gparam(values.amin(), values.amax()).view(1)
        scale, zero = calculate_qparams(
            low, high, args, global_scale=state.get("weight_global_scale"))
        state |= {"weight_scale": scale, "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(format)
        packed = compressor.compress(state, scheme)
        expected = compressor.decompress(dict(packed), scheme)["weight"]
        config = QuantizationConfig(config_groups={"group_0": scheme}, format=format,
                                    quantization_status="compressed", ignore=["lm_head"])
        config = {"quantization_config": config.model_dump(mode="json")}
        if ours:
            packed["original"] = values
        file.add(name, config, packed, expected)
    # As releases before dense packing wrote 3 bits: ten codes a word, two bits left over.
    codes = torch.randint(0, 8, (8, 96), generator=torch.Generator().manual_seed(2))
    scale = torch.full((8, 1), 0.125, dtype=torch.bfloat16)
    words = torch.nn.functional.pad(codes, (0, -96 % 10)).view(8, -1, 10) << torch.arange(0, 30, 3)
    state = {"weight_packed": words.sum(-1).int(), "weight_scale": scale,
             "weight_shape": torch.tensor([8, 96])}
    args = QuantizationArgs(num_bits=3, type="int", strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    config = QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized")
    file.add("whole_words", {"quantization_config": config.model_dump(mode="json")}, state,
             (codes - 4) * scale)
    file.save("compressed_tensors")


def bitsandbytes():
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant

    file, large = File(), File()
    for name, kind, nested, rows, cols, dtype in [
        ("nf4", "nf4", False, 16, 128, torch.bfloat16),
        ("across_rows", "nf4", False, 16, 96, torch.float32),
        ("fp4", "fp4", False, 16, 64, torch.float16),
        ("fp4_nested", "fp4", True, 16, 64, torch.float32),
        ("nf4_nested", "nf4", True, 34, 512, torch.bfloat16),
    ]:
        values = weights(rows, cols, dtype)
        layer = bnb.nn.Linear4bit(cols, rows, bias=False, quant_type=kind,
                                  compress_statistics=nested, compute_dtype=dtype)
        layer.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type=kind,
                                         compress_statistics=nested, blocksize=64)
        layer = layer.to("cpu")
        parts = layer.state_dict()
        expected = dequantize_4bit(layer.weight, layer.weight.quant_state)
        if cols % 64:
            # The processor's own routine of this release takes every row to begin a block.
            state = layer.weight.quant_state
            codes = torch.stack([layer.weight >> 4, layer.weight & 15], -1).flatten().long()
            expected = (state.code[codes].view(-1, 64) * state.absmax[:, None]).view(rows, cols)
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
                  "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": "bfloat16"}
        parts["original"] = values
        (large if name == "nf4_nested" else file).add(
            name, {"quantization_config": config}, parts, expected)
    codes, maxima, _ = int8_vectorwise_quant(weights(16, 64, torch.float16))
    parts = {"weight": codes, "SCB": maxima, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    file.add("int8", {"quantization_config": config}, parts,
             int8_vectorwise_dequant(codes, maxima).half())
    file.save("bitsandbytes")
    large.save("bitsandbytes_nested")


def fp8():
    file = File()
    e4m3 = torch.float8_e4m3fn
    values = weights(20, 96)
    tall, wide = 8, 64
    padded = torch.nn.functional.pad(values, (0, -96 % wide, 0, -20 % tall))
    blocks = padded.view(-1, tall, padded.shape[1] // wide, wide)
    scale = blocks.abs().amax((1, 3)) / 448
    large = scale.repeat_interleave(tall, 0)[:20].repeat_interleave(wide, 1)[:, :96]
    codes = (values / large).to(e4m3)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [tall, wide]}
    file.add("blocks", {"quantization_config": config},
             {"weight": codes, "weight_scale_inv": scale}, codes.float() * large)
    scale = values.abs().amax(1, keepdim=True) / 448
    codes = (values / scale).to(e4m3)
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    file.add("rows", {"quantization_config": config},
             {"weight": codes, "weight_scale": scale}, codes.float() * scale)
    file.save("fp8")


def mlx():
    import mlx.core as mx
    import numpy as np

    to_torch = lambda array: torch.from_numpy(np.array(array).copy())

    def float_to_torch(array):
        return to_torch(array.astype(mx.float32)).to(
            {mx.bfloat16: torch.bfloat16, mx.float16: torch.float16}.get(array.dtype, torch.float32))

    file, config = File(), {}
    for name, mode, bits, group, dtype in [
        ("two", "affine", 2, 32, mx.float16),
        ("three", "affine", 3, 32, mx.bfloat16),
        ("four", "affine", 4, 64, mx.bfloat16),
        ("five", "affine", 5, 32, mx.float16),
        ("six", "affine", 6, 64, mx.bfloat16),
        ("eight", "affine", 8, 128, mx.float32),
        ("mxfp4", "mxfp4", 4, 32, mx.bfloat16),
        ("nvfp4", "nvfp4", 4, 16, mx.bfloat16),
        ("mxfp8", "mxfp8", 8, 32, mx.bfloat16),
    ]:
        values = mx.array(weights(8, 128).numpy()).astype(dtype)
        # A group of one value, whose scale is the least allowed, and one of negative values only.
        values[3, :group], values[5, :group] = 0.25, -mx.abs(values[5, :group])
        packed, scales, *biases = mx.quantize(values, group_size=group, bits=bits, mode=mode)
        exact = [parameter.astype(mx.float32) for parameter in (scales, *biases)]
        exact = exact if mode == "affine" else [scales]
        expected = mx.dequantize(packed, *exact, group_size=group, bits=bits, mode=mode,
                                 dtype=mx.float32)
        parts = {"weight": to_torch(packed), "original": float_to_torch(values)}
        parts["scales"] = to_torch(scales) if mode != "affine" else float_to_torch(scales)
        if biases:
            parts["biases"] = float_to_torch(biases[0])
        own = {"group_size": group, "bits": bits, "mode": mode}
        config |= own if name == "four" else {name: own}
        file.add(name, {"quantization": config, "quantization_config": config}, parts,
                 float_to_torch(expected))
    file.save("mlx")


for make in (gptq, awq, compressed_tensors, bitsandbytes, fp8, mlx):
    make()
