"""GGUF files by llama.cpp: an importance matrix of the calibration sequences, then every type with it.

    bevel convert MODEL -o FULL.gguf --dtype f32
    python benches/rivals/imatrix_files.py FULL.gguf MODEL OUT --tools DIR --texts CALIBRATION.txt... \\
        --types Q4_K_M Q3_K_M Q2_K

MODEL is the Hugging Face directory that FULL.gguf was made of: its tokenizer cuts the texts. DIR holds
llama-imatrix and llama-quantize, from the source inside `llama-cpp-python==0.3.36`. llama-imatrix reads
text, so it is given the sequences as text, one after another.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from calibration import begins_with, sequences
from transformers import AutoTokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("full", type=Path)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", nargs="+", required=True)
    parser.add_argument("--without-imatrix", action="store_true", help="plain rounding, for comparison")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    imatrix = args.out / "imatrix.gguf"
    times = {}
    if not args.without_imatrix and not imatrix.exists():
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        marks = len(begins_with(tokenizer))
        shown = sequences(tokenizer, args.texts, args.samples, args.length)
        text = args.out / "calibration.txt"
        text.write_text("".join(tokenizer.decode(s[marks:], clean_up_tokenization_spaces=False) for s in shown))
        times["imatrix"] = call(args.tools / "llama-imatrix", "-m", args.full, "-f", text, "-o", imatrix,
                                "-c", args.length, "--chunks", args.samples, "-t", args.threads, "--no-ppl")
    for name in args.types:
        target = args.out / f"{name}.gguf"
        weights = [] if args.without_imatrix else ["--imatrix", imatrix]
        times[name] = call(args.tools / "llama-quantize", *weights, args.full, target, name, args.threads)
        print(name, target.stat().st_size, f"{times[name]:.1f} s", flush=True)
    with open(args.out / "run.json", "w") as f:
        json.dump({"wall_seconds": times}, f, indent=1)


def call(*command):
    """Seconds that a command takes."""
    start = time.perf_counter()
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return time.perf_counter() - start


main()
