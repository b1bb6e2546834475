"""Round-to-nearest files by bevel and by llama.cpp, of the same model and type: size and perplexity.

    cargo build --release
    pip install llama-cpp-python==0.3.36
    python benches/round_to_nearest.py MODEL TEXT.txt --out benches/runs/NAME.json

MODEL should be in full precision: one that was quantized before lies on its old grid. Both files are
evaluated by bevel, on the same tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import llama_cpp

TYPES = ["Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
         "Q3_K_M", "Q2_K", "TQ2_0"]


def bevel(args, *words):
    done = subprocess.run([args.bevel, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def evaluate(args, path):
    out = json.loads(bevel(args, "eval", path, "--text", args.text, "--json"))
    return {"bytes": path.stat().st_size, "perplexity": out["perplexity"],
            "perplexity_error": out["perplexity_error"]}


def llama_quantize(source, target, name):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.nthread = 2
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0


@llama_cpp.llama_log_callback
def silent(level, text, data):
    pass


def main():
    llama_cpp.llama_log_set(silent, None)
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--bevel", default=Path(__file__).parent.parent / "target/release/bevel")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as temp:
        full = Path(temp) / "full.gguf"
        bevel(args, "convert", args.model, "-o", full)
        rows["full precision"] = {"bevel": evaluate(args, full)}
        for name in TYPES:
            ours, theirs = Path(temp) / "ours.gguf", Path(temp) / "theirs.gguf"
            bevel(args, "quantize", full, name, "-o", ours, "--force")
            llama_quantize(full, theirs, name)
            rows[name] = {"bevel": evaluate(args, ours), "llama.cpp": evaluate(args, theirs)}
            print(name, *(f"{r['bytes']} {r['perplexity']:.3f}" for r in rows[name].values()), file=sys.stderr)
    args.out.write_text(json.dumps({
        "command": f"python benches/round_to_nearest.py {Path(args.model).name} {Path(args.text).name}",
        "llama-cpp-python": llama_cpp.__version__,
        "results": rows,
    }, indent=1) + "\n")


main()
