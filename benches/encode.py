"""Packing with importance weights by bevel and by llama.cpp, in turn, on one thread: time and error.

    cargo build --release -p bevel-base --example encode
    pip install llama-cpp-python==0.3.36 gguf==0.19.0 numpy   # CMAKE_ARGS=-DGGML_NATIVE=ON
    python benches/encode.py --out benches/runs/NAME.json [--types Q4_K ...] [--rounds 7]

Rows are weights of a transformer as they come (a Gaussian, and heavier tails) and, of a model in the
repository, as they are; importance is drawn from the spread that activations show. Times are
processor time of the thread that packs, without reading and writing; the figure is the median.
`ratio` is llama.cpp's time over bevel's and bevel's error over llama.cpp's, the error being
`sum importance * (weight - unpacked)^2`, of both unpacked by the `gguf` package.
"""

import argparse
import ctypes
import importlib.util
import json
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

HERE = Path(__file__).parent
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
         "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"]
ROWS, COLUMNS = 64, 1024
FLOATS = ctypes.POINTER(ctypes.c_float)


def load_ggml():
    package = Path(importlib.util.find_spec("llama_cpp").origin).parent
    ggml = ctypes.CDLL(str(package / "lib" / "libggml-base.so"))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, FLOATS]
    return ggml


def row_sets(model):
    rng = np.random.default_rng(3)
    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    matrices = [header[name]["data_offsets"] for name in sorted(header) if ".layers." in name
                and len(header[name]["shape"]) == 2]
    real = np.concatenate([np.frombuffer(data[a:b], np.uint16) for a, b in matrices])
    real = (real.astype(np.uint32) << 16).view(np.float32)
    sets = {
        "gaussian": 0.02 * rng.standard_normal((ROWS, COLUMNS)),
        "heavy tails": 0.02 * rng.standard_t(4, (ROWS, COLUMNS)),
        model.name: real[:ROWS * COLUMNS].reshape(-1, COLUMNS),
    }
    return {name: (np.ascontiguousarray(rows, np.float32),
                   rng.lognormal(0, 1.5, COLUMNS).astype(np.float32)) for name, rows in sets.items()}


def llama_pack(ggml, qtype, rows, weights):
    ggml.ggml_quantize_init(qtype)
    block, size = GGML_QUANT_SIZES[qtype]
    packed = np.zeros((rows.shape[0], COLUMNS // block * size), np.uint8)
    start = time.thread_time()
    ggml.ggml_quantize_chunk(qtype, rows.ctypes.data_as(FLOATS), packed.ctypes.data, 0, *rows.shape,
                             weights.ctypes.data_as(FLOATS))
    return time.thread_time() - start, packed


def bevel_pack(encode, qtype, folder, shape):
    files = [str(folder / name) for name in ("rows.f32", "weights.f32", "packed.bin")]
    done = subprocess.run([str(encode), qtype.name, str(COLUMNS), *files], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout), np.fromfile(files[2], np.uint8).reshape(shape[0], -1)


def error(rows, weights, packed, qtype):
    found = quants.dequantize(packed, qtype).astype(np.float64)
    return float(((found - rows) ** 2 * weights).sum())


def compare(ggml, args, qtype, rows, weights):
    seconds = {"bevel": [], "llama.cpp": []}
    with tempfile.TemporaryDirectory() as folder:
        rows.tofile(Path(folder) / "rows.f32")
        weights.tofile(Path(folder) / "weights.f32")
        for _ in range(args.rounds):
            ours, mine = bevel_pack(args.encode, qtype, Path(folder), rows.shape)
            theirs, its = llama_pack(ggml, qtype, rows, weights)
            seconds["bevel"].append(ours)
            seconds["llama.cpp"].append(theirs)
    errors = {"bevel": error(rows, weights, mine, qtype), "llama.cpp": error(rows, weights, its, qtype)}
    medians = {who: statistics.median(s) for who, s in seconds.items()}
    return {
        "ratio": {"speed": medians["llama.cpp"] / medians["bevel"],
                  "error": errors["bevel"] / errors["llama.cpp"]},
        "microseconds per 256 weights": {who: m / rows.size * 256e6 for who, m in medians.items()},
        "error": errors,
        "seconds": seconds,
    }


def cpu():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path, default=HERE.parent / "assets" / "tiny-austen")
    parser.add_argument("--encode", type=Path,
                        default=HERE.parent / "target" / "release" / "examples" / "encode")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    ggml, results = load_ggml(), {}
    for name, (rows, weights) in row_sets(args.model).items():
        for qtype in (GGMLQuantizationType[name] for name in args.types):
            result = compare(ggml, args, qtype, rows, weights)
            results.setdefault(qtype.name, {})[name] = result
            print(name, qtype.name, {k: round(v, 3) for k, v in result["ratio"].items()},
                  file=sys.stderr, flush=True)
    args.out.write_text(json.dumps({
        "command": f"python benches/encode.py --rounds {args.rounds} --types {' '.join(args.types)}",
        "machine": {"cpu": cpu(), "kernel": platform.release(), "threads": 1},
        "llama-cpp-python": llama_cpp.__version__,
        "results": results,
    }, indent=1) + "\n")


main()
