"""Makes the importance matrices in `imatrix/` and the values that the `gguf` package reads in them.

    make_imatrix.py LLAMA_IMATRIX TINY_AUSTEN.gguf TOUR.txt

LLAMA_IMATRIX is llama.cpp's tool (made with version 0.5.0). TINY_AUSTEN.gguf is `assets/tiny-austen`
converted to F32, TOUR.txt is `assets/tour.txt`.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import gguf
import numpy as np

HERE = pathlib.Path(__file__).parent / "imatrix"


def run_llama_imatrix(tool, model, text):
    """The same chunks in both of llama.cpp's formats."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(text, pathlib.Path(directory) / "tour.txt")
        for suffix in ["gguf", "dat"]:
            out = HERE / f"austen.{suffix}"
            subprocess.run(
                [tool, "-m", model, "-f", "tour.txt", "-o", out, "--output-format", suffix]
                + ["-c", "64", "-b", "64", "--chunks", "3", "-t", "1", "--process-output"],
                cwd=directory, check=True, capture_output=True,
            )


def write_experts():
    """Three experts of four columns, the last one never chosen, and a dense tensor."""
    writer = gguf.GGUFWriter(HERE / "experts.gguf", arch="none")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["first.txt", "second.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    sums = np.array([[1, 2, 3, 4], [10, 20, 30, 40], [0, 0, 0, 0]], np.float32)
    counts = np.array([[2], [5], [0]], np.float32)
    for name, values, number in [
        ("blk.0.ffn_up_exps.weight", sums, counts),
        ("blk.0.attn_q.weight", sums[:1], counts[1:2]),
    ]:
        writer.add_tensor(f"{name}.in_sum2", values)
        writer.add_tensor(f"{name}.counts", number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def expected():
    """Sum over all columns of `in_sum2`, the first value and the count of each tensor."""
    reader = gguf.GGUFReader(HERE / "austen.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    out = {}
    for name in sorted(name for name in tensors if name.endswith(".in_sum2")):
        name = name.removesuffix(".in_sum2")
        values, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        out[name] = {
            "columns": int(values.size),
            "sum": float(np.sum(values, dtype=np.float64)),
            "first": float(values.reshape(-1)[0]),
            "count": int(counts.reshape(-1)[0]),
        }
    text = json.dumps(out, indent=1)
    (HERE / "austen.json").write_text(text + "\n")


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    run_llama_imatrix(*[str(pathlib.Path(path).resolve()) for path in sys.argv[1:4]])
    write_experts()
    expected()
