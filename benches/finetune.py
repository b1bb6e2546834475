"""Fine-tuning beside PEFT: losses step by step, tokens a second, and peak memory, in one run.

    python benches/finetune.py DIR --bevel target/release/bevel --text BOOK.txt --out benches/runs/finetune.json

DIR is a Hugging Face directory of a small model in 16 or 32 bits. The Python that runs this needs torch, transformers,
peft and bitsandbytes; nothing is fetched. Both sides learn the same pieces of the text in the same order from the same
first adapter (rank 8, all linear layers). Runs alternate, and figures are medians of steps after the first two. The
parity of losses is measured over 50 steps.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RANK, ALPHA, CTX, RATE = 8, 16, 256, 2e-4


def peft_side(args):
    """One run of PEFT: prints a line of JSON a step, and the peak memory."""
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    tokens = tokenizer(Path(args.text).read_text(), add_special_tokens=False)["input_ids"]
    options = {}
    if args.kind == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    dtype = torch.bfloat16 if args.kind == "bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, device_map="cpu", **options
    )
    if args.kind == "nf4":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if args.save_base:
            model.save_pretrained(args.save_base)
            tokenizer.save_pretrained(args.save_base)
    if (Path(args.init) / "adapter_config.json").exists():
        model = peft.PeftModel.from_pretrained(model, args.init, is_trainable=True)
    else:
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        model.save_pretrained(args.init)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    model.train()
    for step in range(args.steps):
        # The last token of a piece begins the next one.
        piece = torch.tensor([tokens[step * (CTX - 1) :][:CTX]])
        start = time.perf_counter()
        loss = model(input_ids=piece, labels=piece).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"loss": loss.item(), "tokens": CTX, "seconds": time.perf_counter() - start}), flush=True)
    if args.save:
        model.save_pretrained(args.save)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def figures(lines, peak):
    steps = lines[2:]
    return {
        "tokens_per_second": statistics.median(step["tokens"] / step["seconds"] for step in steps),
        "peak_memory": peak,
        "losses": [step["loss"] for step in lines],
    }


def run_peft(args, kind, steps, init, **more):
    command = [sys.executable, __file__, args.model, "--text", args.text, "--kind", kind]
    command += ["--steps", str(steps), "--init", init]
    for name, value in more.items():
        command += [f"--{name}", value]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode != 0:
        sys.exit(f"PEFT failed:\n{out.stderr[-2000:]}")
    lines = [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]
    return figures(lines[:-1], lines[-1]["peak"])


def run_bevel(args, model, steps, init, scratch, *more):
    out = os.path.join(scratch, "bevel")
    command = [args.bevel, "finetune", model, args.text, "-o", out, "--force", "--from", init]
    command += ["--steps", str(steps), "--ctx", str(CTX), "--batch", "1", "--in-order", "--held-out", "0"]
    command += ["--lr", str(RATE), "--schedule", "constant", "--warmup", "0", *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"bevel failed:\n{said}")
    lines = [json.loads(line) for line in Path(out, "training.jsonl").read_text().splitlines()]
    return figures(lines, usage.ru_maxrss * 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--bevel", default="target/release/bevel")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out")
    # One run of PEFT, in a process of its own.
    for name in ["kind", "init", "save", "save_base"]:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        return peft_side(args)

    with tempfile.TemporaryDirectory() as scratch:
        init, base = os.path.join(scratch, "init"), os.path.join(scratch, "nf4")
        contestants = {
            "peft f32": lambda n: run_peft(args, "f32", n, init),
            "bevel f32": lambda n: run_bevel(args, args.model, n, init, scratch, "--exact"),
            "peft bf16": lambda n: run_peft(args, "bf16", n, init),
            "bevel bf16": lambda n: run_bevel(args, args.model, n, init, scratch),
            "bevel bf16 --recompute": lambda n: run_bevel(args, args.model, n, init, scratch, "--recompute"),
            "peft nf4": lambda n: run_peft(args, "nf4", n, init, save_base=base),
            "bevel nf4": lambda n: run_bevel(args, base, n, init, scratch),
            "bevel nf4 --exact": lambda n: run_bevel(args, base, n, init, scratch, "--exact"),
        }
        rounds = [{name: run(args.steps) for name, run in contestants.items()} for _ in range(args.rounds)]
        results = {
            name: {
                key: statistics.median(one[name][key] for one in rounds)
                for key in ["tokens_per_second", "peak_memory"]
            }
            for name in contestants
        }
        fifty = {name: contestants[name](50)["losses"] for name in ["peft f32", "bevel f32", "bevel bf16", "peft nf4", "bevel nf4 --exact", "bevel nf4"]}
    apart = lambda a, b: max(abs(x - y) for x, y in zip(fifty[a], fifty[b]))
    speed = lambda name: results[name]["tokens_per_second"]
    torch_best = max(speed("peft f32"), speed("peft bf16"))
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "settings": {"rank": RANK, "alpha": ALPHA, "tokens": CTX, "batch": 1, "targets": "all-linear"},
        "results": results,
        "ratios": {
            "f32 of peft f32": speed("bevel f32") / speed("peft f32"),
            "bf16 of the faster of peft's": speed("bevel bf16") / torch_best,
            "nf4 of peft and bitsandbytes": speed("bevel nf4") / speed("peft nf4"),
            "memory, bf16 of peft f32": results["bevel bf16"]["peak_memory"] / results["peft f32"]["peak_memory"],
            "memory, bf16 of peft bf16": results["bevel bf16"]["peak_memory"] / results["peft bf16"]["peak_memory"],
            "memory, nf4": results["bevel nf4"]["peak_memory"] / results["peft nf4"]["peak_memory"],
        },
        "largest_difference_of_a_loss_in_50_steps": {
            "f32": apart("peft f32", "bevel f32"),
            "bf16 and peft f32": apart("peft f32", "bevel bf16"),
            "nf4, single precision": apart("peft nf4", "bevel nf4 --exact"),
            "nf4, bf16": apart("peft nf4", "bevel nf4"),
        },
        "losses": fifty,
    }
    text = json.dumps(report, indent=1)
    if args.out:
        Path(args.out).write_text(text + "\n")
    del report["losses"]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
