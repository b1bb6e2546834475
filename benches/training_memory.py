"""The memory that `bevel finetune` takes beside what it says it will take.

    python3 benches/training_memory.py MODEL --bevel target/release/bevel --text BOOK.txt --out benches/runs/training-memory.json

Each setting is a run of three steps; the peak is that of the process.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = {
    "rank 8, 256 tokens": [],
    "rank 64": ["--rank", "64"],
    "rank 256": ["--rank", "256"],
    "128 tokens": ["--ctx", "128"],
    "512 tokens": ["--ctx", "512"],
    "1024 tokens": ["--ctx", "1024"],
    "batch 4": ["--batch", "4"],
    "512 tokens, recompute": ["--ctx", "512", "--recompute"],
    "1024 tokens, recompute every 5": ["--ctx", "1024", "--recompute", "5"],
    "exact": ["--exact"],
    "exact, 512 tokens": ["--exact", "--ctx", "512"],
    "DoRA": ["--dora"],
    "embedding whole": ["--modules-to-save", "embeddings"],
    "whole model, AdamW": ["--full"],
    "whole model, 8-bit AdamW": ["--full", "--optimizer", "adamw8bit"],
    "whole model, Lion": ["--full", "--optimizer", "lion"],
    "whole model, Lion, 512 tokens, recompute": ["--full", "--optimizer", "lion", "--ctx", "512", "--recompute"],
}


def run(args, name, options, scratch):
    ours = [*options] if "--ctx" in options else [*options, "--ctx", "256"]
    ours = ours if "--batch" in ours else [*ours, "--batch", "1"]
    command = [args.bevel, "finetune", args.model, args.text, "-o", os.path.join(scratch, "out"), "--force", *ours]
    command += ["--steps", "3", "--in-order", "--held-out", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{name}: {done.stderr}")
    found = json.loads(done.stdout)
    expected, peak = found["expected_memory_bytes"], found["training_memory_bytes"]
    print(f"{name:45} {expected / 1e6:8.0f} MB expected {peak / 1e6:8.0f} MB taken  {expected / peak:6.3f}", flush=True)
    return {"expected": expected, "taken": peak, "ratio": round(expected / peak, 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--bevel", default="target/release/bevel")
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = {name: run(args, name, options, scratch) for name, options in SETTINGS.items()}
    off = max(abs(result["ratio"] - 1) for result in results.values())
    print(f"at most {100 * off:.1f} % off")
    report = {
        "command": " ".join(["python3", *sys.argv]),
        "machine": platform.processor() or platform.machine(),
        "largest_error": round(off, 3),
        "results": results,
    }
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
