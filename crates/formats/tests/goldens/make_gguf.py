"""Writes the GGUF goldens with the `gguf` package (made with version 0.19.0).

    python make_gguf.py

`every.gguf` has all 13 metadata types, alone and in arrays, an alignment of 64, and tensors of
plain and packed types. `split-0000?-of-00003.gguf` is a model in three shards. Byte i of tensor t,
counted from 0, is (7 i + t) mod 256; `tests/it/gguf.rs` spells out the rest.
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

HERE = Path(__file__).parent

# Extremes of each type.
SCALARS = [
    ("u8", V.UINT8, 255),
    ("i8", V.INT8, -128),
    ("u16", V.UINT16, 65535),
    ("i16", V.INT16, -32768),
    ("u32", V.UINT32, 4294967295),
    ("i32", V.INT32, -2147483648),
    ("f32", V.FLOAT32, 1.5),
    ("bool", V.BOOL, True),
    ("string", V.STRING, "édge \n 刃 \U0001f52a"),
    ("u64", V.UINT64, 18446744073709551615),
    ("i64", V.INT64, -9223372036854775808),
    ("f64", V.FLOAT64, 0.1),
]
ARRAYS = [
    ("u8s", V.UINT8, [0, 1, 255]),
    ("i8s", V.INT8, [-128, 0, 127]),
    ("u16s", V.UINT16, [0, 65535]),
    ("i16s", V.INT16, [-32768, 32767]),
    ("u32s", V.UINT32, [0, 4294967295]),
    ("i32s", V.INT32, [-2147483648, 2147483647]),
    ("f32s", V.FLOAT32, [0.0, -0.5, float("inf")]),
    ("bools", V.BOOL, [True, False, True]),
    ("strings", V.STRING, ["", "a", "刃"]),
    ("u64s", V.UINT64, [0, 18446744073709551615]),
    ("i64s", V.INT64, [-9223372036854775808, 9223372036854775807]),
    ("f64s", V.FLOAT64, [0.1, -2.5]),
]
TENSORS = [  # shapes as in numpy, outermost first
    ("plain.f32", T.F32, (3, 5)),
    ("plain.f16", T.F16, (7,)),
    ("plain.bf16", T.BF16, (2, 2)),
    ("plain.f64", T.F64, (2,)),
    ("plain.i8", T.I8, (5,)),
    ("plain.i16", T.I16, (3,)),
    ("plain.i32", T.I32, (1, 2, 3, 4)),
    ("plain.i64", T.I64, (1,)),
    ("packed.q8_0", T.Q8_0, (2, 64)),
    ("packed.q4_k", T.Q4_K, (2, 256)),
    ("packed.mxfp4", T.MXFP4, (1, 32)),
]


def byte_shape(dtype, shape):
    block, size = GGML_QUANT_SIZES[dtype]
    return (*shape[:-1], shape[-1] // block * size)


def add_tensors(writer, tensors):
    for t, (name, dtype, shape) in enumerate(tensors):
        shape = byte_shape(dtype, shape)
        data = (np.arange(np.prod(shape)) * 7 + t).astype(np.uint8).reshape(shape)
        writer.add_tensor(name, data, raw_dtype=dtype)


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def every():
    writer = GGUFWriter(HERE / "every.gguf", "test")
    writer.add_custom_alignment(64)
    for name, kind, value in SCALARS:
        writer.add_key_value(f"test.{name}", value, kind)
    for name, kind, values in ARRAYS:
        writer.add_key_value(f"test.{name}", values, V.ARRAY, sub_type=kind)
    # The package derives the inner types: i32 and strings.
    writer.add_key_value("test.nested", [[1, 2], [3]], V.ARRAY)
    writer.add_key_value("test.nested_strings", [["a"], ["b", "c"]], V.ARRAY)
    add_tensors(writer, TENSORS)
    close(writer)


def split():
    writer = GGUFWriter(HERE / "split.gguf", "test", split_max_tensors=2)
    writer.add_string("general.name", "split")
    add_tensors(writer, [(f"tensor.{t}", T.F32, (t + 1, 3)) for t in range(5)])
    close(writer)


every()
split()
