"""Training under a limit of memory that is smaller than what the optimizer's state asks for.

    sudo python3 benches/paged_optimizer.py MODEL --bevel target/release/bevel --text BOOK.txt --limit 1600 --out benches/runs/paged-optimizer.json

A whole model is trained with AdamW for a few steps: without a limit with the state in memory and in a file
(--page-optimizer), and within a cgroup of so many megabytes without swap, where the first of the two is killed. Needs the
right to make a cgroup. The file lies on the disk of the output directory.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class Limit:
    """A cgroup of so many bytes."""

    def __init__(self, limit):
        self.v2 = not V1.is_dir()
        self.path = (V2 if self.v2 else V1) / f"bevel-{os.getpid()}"
        self.path.mkdir()
        if self.v2:
            (self.path / "memory.swap.max").write_text("0")
            (self.path / "memory.max").write_text(str(limit))
        else:
            (self.path / "memory.limit_in_bytes").write_text(str(limit))
            try:
                (self.path / "memory.memsw.limit_in_bytes").write_text(str(limit))
            except OSError:
                pass  # Without swap accounting there is no swap to account for.

    def enter(self):
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def close(self):
        self.path.rmdir()


def run(args, name, more, limit=None):
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        out = os.path.join(scratch, "out")
        command = [args.bevel, "finetune", args.model, args.text, "-o", out, "--full", "--recompute"]
        command += ["--steps", str(args.steps), "--ctx", "256", "--batch", "2", "--in-order", "--held-out", "0"]
        command += ["--checkpoint-every", "1000", *more]
        group = Limit(limit * 1_000_000) if limit else None
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=group.enter if group else None,
        )
        said = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        if group:
            group.close()
        log = Path(out, "training.jsonl")
        steps = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        killed = os.WIFSIGNALED(status)
        if status != 0 and not killed:
            sys.exit(f"{name}: {said}")
        result = {
            "killed": killed,
            "steps": len(steps),
            "seconds_a_step": statistics.median(step["seconds"] for step in steps[1:]) if len(steps) > 1 else None,
            "peak_memory": usage.ru_maxrss * 1024,
            "losses": [step["loss"] for step in steps],
        }
    print(name, json.dumps(result), flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--bevel", default="target/release/bevel")
    parser.add_argument("--limit", type=int, default=1600, help="megabytes")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--scratch", help="a directory on the disk to be used")
    parser.add_argument("--out")
    args = parser.parse_args()
    plan = [args.bevel, "finetune", args.model, args.text, "-o", "x", "--full", "--recompute"]
    plan += ["--ctx", "256", "--batch", "2", "--dry-run", "--json"]
    expected = json.loads(subprocess.run(plan, capture_output=True, text=True, check=True).stdout)
    results = {
        "in memory": run(args, "in memory", []),
        "in a file": run(args, "in a file", ["--page-optimizer"]),
        "in a file, within the limit": run(args, "in a file, within the limit", ["--page-optimizer"], args.limit),
        "in memory, within the limit": run(args, "in memory, within the limit", [], args.limit),
    }
    free, paged = results["in memory"], results["in a file, within the limit"]
    report = {
        "command": " ".join(["python3", *sys.argv]),
        "machine": platform.processor() or platform.machine(),
        "limit": args.limit * 1_000_000,
        "optimizer_state": expected["memory"]["optimizer"],
        "expected_in_memory": expected["expected_memory_bytes"],
        "slow_down": paged["seconds_a_step"] / free["seconds_a_step"],
        "same_losses": paged["losses"] == free["losses"],
        "results": results,
    }
    print(json.dumps({key: value for key, value in report.items() if key != "results"}, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
