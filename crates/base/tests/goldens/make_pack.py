#!/usr/bin/env python3
"""Makes the golden files of the packed layouts in `pack/`, beside this script.

    pip install gguf==0.19.0 llama-cpp-python==0.3.36 numpy
    python crates/base/tests/goldens/make_pack.py

`pack/TYPE.bin`  packed blocks, then the f32 values `gguf.quants.dequantize` makes of them: random
                 bytes with finite scales, and weights that llama.cpp packed.
`pack/rows.f32`  row sets of 1280 values, one set after another.
`pack/weights.f32`  the importance of 256 columns for each set; it repeats along the set.
`pack/rivals.json`  the names of the sets and, for each type and set, the squared error that the
                 quantizers of the `gguf` package and of llama.cpp leave, without importance and,
                 importance-weighted, with it.
"""

import ctypes
import importlib.util
import json
import pathlib
import struct

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as T

HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE / "pack"
MODEL = HERE.parents[3] / "assets" / "tiny-austen" / "model.safetensors"
COLUMNS, SET = 256, 1280

# Where each layout keeps its half-precision scales.
HALVES = {
    T.BF16: [], T.F16: [],
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0],
    T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
    T.IQ2_XXS: [0], T.IQ2_XS: [0], T.IQ2_S: [0], T.IQ3_XXS: [0], T.IQ3_S: [0],
    T.IQ4_NL: [0], T.IQ4_XS: [0], T.TQ1_0: [52], T.TQ2_0: [64], T.MXFP4: [],
}
WRITTEN = [
    T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K,
    T.Q6_K, T.IQ4_NL, T.IQ4_XS, T.TQ1_0, T.TQ2_0, T.MXFP4,
    T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S,
]
# llama.cpp wants importance for these.
WEIGHTED_ONLY = [T.IQ2_XXS, T.IQ2_XS]

package = pathlib.Path(importlib.util.find_spec("llama_cpp").origin).parent
ggml = ctypes.CDLL(str(package / "lib" / "libggml-base.so"))
FLOATS = ctypes.POINTER(ctypes.c_float)
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_quantize_chunk.argtypes = [
    ctypes.c_int, FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, FLOATS,
]


def llama_cpp(rows, qtype, importance=None):
    ggml.ggml_quantize_init(qtype)
    if importance is None and qtype in WEIGHTED_ONLY:
        importance = np.ones(rows.shape[1])
    rows = np.ascontiguousarray(rows, np.float32)
    block, size = GGML_QUANT_SIZES[qtype]
    out = np.zeros((rows.shape[0], rows.shape[1] // block * size), np.uint8)
    weights = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        weights = importance.ctypes.data_as(FLOATS)
    ggml.ggml_quantize_chunk(
        qtype, rows.ctypes.data_as(FLOATS), out.ctypes.data, 0, *rows.shape, weights)
    return out


def tensor(name):
    with MODEL.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        start = file.tell()
        first, last = header[name]["data_offsets"]
        file.seek(start + first)
        halves = np.frombuffer(file.read(last - first), np.uint16)
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(header[name]["shape"])


def row_sets(rng):
    layer = "model.layers.1."
    normal = rng.standard_normal(SET)
    outliers = rng.standard_normal(SET)
    outliers[rng.integers(0, SET, 24)] *= 30
    constant = np.repeat([0.37, -1.5, 3e-3, 1.0, -7e-4], COLUMNS)
    sets = {
        "embeddings": tensor("model.embed_tokens.weight")[100:105],
        "attention": tensor(layer + "self_attn.q_proj.weight")[:5],
        "gate": tensor(layer + "mlp.gate_proj.weight")[40:45],
        "down": tensor(layer + "mlp.down_proj.weight").ravel()[:SET],
        "gaussian": 0.02 * normal,
        "heavy tails": 0.01 * rng.standard_t(2.5, SET),
        "outliers": 0.02 * outliers,
        "uniform": rng.uniform(-1, 1, SET),
        "one-sided": np.abs(0.05 * rng.standard_normal(SET)) + 0.01,
        "offset": 0.01 * rng.standard_normal(SET) + 0.5,
        "sparse": 0.05 * rng.standard_normal(SET) * (rng.random(SET) < 0.2),
        "ternary": 0.031 * rng.integers(-1, 2, SET),
        "constant": constant,
        "zero": np.zeros(SET),
        "tiny": 3e-7 * rng.standard_normal(SET),
        "subnormal": 1e-40 * rng.standard_normal(SET),
        "large": 3e3 * rng.standard_normal(SET),
        "mixed scales": rng.standard_normal(SET) * np.repeat(10.0 ** rng.uniform(-4, 0, SET // 32), 32),
    }
    return {name: np.asarray(x, np.float32).reshape(-1, COLUMNS) for name, x in sets.items()}


def random_blocks(qtype, count, rng):
    size = GGML_QUANT_SIZES[qtype][1]
    if qtype in (T.F16, T.BF16):
        values = np.concatenate([rng.standard_normal(count - 8), [0, -0.0, 1e-6, -6e-8, 6e4, 1, -1e-5, 0.1]])
        halves = values.astype(np.float16).view(np.uint16)
        if qtype == T.BF16:
            halves = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return halves.reshape(-1, 1).view(np.uint8)
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in HALVES[qtype]:
        scales = rng.standard_normal(count) * 10.0 ** rng.uniform(-8, 3, count)
        blocks[:, at:at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks


def error(rows, packed, qtype, weights=None):
    back = quants.dequantize(packed, qtype).astype(np.float64)
    squares = (rows.astype(np.float64) - back) ** 2
    return float(np.sum(squares if weights is None else squares * weights.astype(np.float64)))


def main():
    OUT.mkdir(exist_ok=True)
    rng = np.random.default_rng(20261122)
    sets = row_sets(rng)
    weights = {name: rng.lognormal(0, 1.5, COLUMNS).astype(np.float32) for name in sets}
    np.concatenate([x.ravel() for x in sets.values()]).tofile(OUT / "rows.f32")
    np.concatenate(list(weights.values())).tofile(OUT / "weights.f32")

    for qtype in HALVES:
        block, size = GGML_QUANT_SIZES[qtype]
        count = {1: 64, 32: 24, 256: 6}[block]
        blocks = random_blocks(qtype, count, rng)
        if block > 1:
            rows = np.concatenate([sets["embeddings"][:2], sets["gate"][:1], sets["outliers"][:1]])
            real = llama_cpp(rows, qtype, weights["gate"]).reshape(-1, size)
            blocks = np.concatenate([blocks, real[::max(1, 256 // block // 2)]])
        values = quants.dequantize(blocks, qtype)
        (OUT / f"{qtype.name}.bin").write_bytes(blocks.tobytes() + values.astype("<f4").tobytes())

    rivals = {}
    for qtype in WRITTEN:
        rivals[qtype.name] = {}
        for name, rows in sets.items():
            plain, weighted = [], []
            with np.errstate(over="ignore"):
                plain.append(error(rows, llama_cpp(rows, qtype), qtype))
                weighted.append(
                    error(rows, llama_cpp(rows, qtype, weights[name]), qtype, weights[name]))
            try:
                with np.errstate(all="ignore"):
                    packed = quants.quantize(rows, qtype)
                plain.append(error(rows, packed, qtype))
                weighted.append(error(rows, packed, qtype, weights[name]))
            except NotImplementedError:
                pass
            rivals[qtype.name][name] = {
                "plain": np.nanmin(plain), "weighted": np.nanmin(weighted)}
    text = json.dumps({"sets": list(sets), "errors": rivals}, indent=1, allow_nan=False)
    (OUT / "rivals.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
