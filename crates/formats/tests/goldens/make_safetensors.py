"""Writes the safetensors golden with the `safetensors` package (made with version 0.8.0).

    python make_safetensors.py

`every.safetensors` has a tensor of each type, an empty one and a scalar. Byte i of tensor t,
counted from 0 in the order below, is (7 i + t) mod 256, or i mod 2 for Booleans.
"""

from pathlib import Path

import numpy as np
from safetensors import TensorSpec, serialize_file

HERE = Path(__file__).parent

TENSORS = [  # name, type, bytes per value, shape
    ("f64", "float64", 8, [2]),
    ("f32", "float32", 4, [3, 5]),
    ("f16", "float16", 2, [7]),
    ("bf16", "bfloat16", 2, [2, 2]),
    ("f8_e4m3", "float8_e4m3fn", 1, [5]),
    ("f8_e5m2", "float8_e5m2", 1, [3]),
    ("i64", "int64", 8, [1]),
    ("u64", "uint64", 8, [1]),
    ("i32", "int32", 4, [1, 2, 3]),
    ("u32", "uint32", 4, [2]),
    ("i16", "int16", 2, [3]),
    ("u16", "uint16", 2, [3]),
    ("i8", "int8", 1, [5]),
    ("u8", "uint8", 1, [5]),
    ("bool", "bool", 1, [4]),
    ("empty", "float32", 4, [0, 4]),
    ("scalar", "float32", 4, []),
]

arrays = []  # keeps the bytes alive that the specs point to
specs = {}
for t, (name, dtype, size, shape) in enumerate(TENSORS):
    i = np.arange(size * np.prod(shape, dtype=int))
    arrays.append((i % 2 if dtype == "bool" else 7 * i + t).astype(np.uint8))
    specs[name] = TensorSpec(
        dtype=dtype, shape=shape, data_ptr=arrays[-1].ctypes.data, data_len=arrays[-1].nbytes
    )

serialize_file(specs, HERE / "every.safetensors", metadata={"format": "pt", "edge": "刃"})
