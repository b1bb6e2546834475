"""Training beside PEFT and transformers, kind by kind: the losses of every step, and what the other program makes of the
adapter that was written.

    python benches/parity.py DIR --bevel target/release/bevel --text BOOK.txt --out benches/runs/parity.json

DIR is a Hugging Face directory of a small model in 16 or 32 bits. The Python that runs this needs torch, transformers,
peft and bitsandbytes; nothing is fetched. Both sides learn the same pieces of the text in the same order, in single
precision, with AdamW, and begin with the same adapter. Then PEFT loads bevel's adapter, and its loss on a piece that nobody
learnt is held against bevel's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CTX, RATE = 256, 2e-4
ATTENTION = ["q_proj", "v_proj"]

# PEFT's settings, bevel's options.
KINDS = {
    "LoRA, q and v": ({"target_modules": ATTENTION}, ["--targets", "q,v"]),
    "LoRA, all linear": ({"target_modules": "all-linear"}, []),
    "rsLoRA, all linear": ({"target_modules": "all-linear", "use_rslora": True}, ["--rslora"]),
    "DoRA, all linear": ({"target_modules": "all-linear", "use_dora": True}, ["--dora"]),
    "LoRA, q and v, and the embedding": (
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ["--targets", "q,v", "--modules-to-save", "embeddings"],
    ),
    "QLoRA on NF4, q and v": ({"target_modules": ATTENTION, "nf4": True}, ["--targets", "q,v"]),
    "the whole model": (None, ["--full", "--type", "F32"]),
}
WHOLE_RATE = 2e-5


def pieces(args, tokenizer, torch):
    tokens = tokenizer(Path(args.text).read_text(), add_special_tokens=False)["input_ids"]
    # The last token of a piece begins the next one.
    return lambda step: torch.tensor([tokens[step * (CTX - 1) :][:CTX]])


def load(args, quantized=False):
    import torch
    import transformers

    options = {}
    if quantized:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, device_map="cpu", **options
    )


def train(args):
    """One run of PEFT or transformers: the losses of its steps, and after bevel's run the loss of bevel's adapter."""
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    settings, _ = KINDS[args.kind]
    settings = dict(settings) if settings is not None else None
    quantized = settings is not None and settings.pop("nf4", False)
    model = load(args, quantized)
    piece = pieces(args, tokenizer, torch)
    if args.check:
        if settings is None:
            model = transformers.AutoModelForCausalLM.from_pretrained(args.check, dtype=torch.float32)
        else:
            model = peft.PeftModel.from_pretrained(model, args.check)
        model.eval()
        with torch.no_grad():
            print(json.dumps(model(input_ids=piece(args.steps), labels=piece(args.steps)).loss.item()))
        return
    if quantized:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model.save_pretrained(args.base)
        tokenizer.save_pretrained(args.base)
    if settings is not None:
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **settings)
        )
        model.save_pretrained(args.init)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = RATE if settings is not None else WHOLE_RATE
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    model.train()
    losses = []
    for step in range(args.steps):
        loss = model(input_ids=piece(step), labels=piece(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(json.dumps(losses))


def ours(args, model, out, kind, steps, begin):
    settings, options = KINDS[kind]
    rate = RATE if settings is not None else WHOLE_RATE
    command = [args.bevel, "finetune", model, args.text, "-o", out, "--force", "--exact", *options]
    command += ["--steps", str(steps), "--ctx", str(CTX), "--batch", "1", "--in-order", "--held-out", "0"]
    command += ["--lr", str(rate), "--schedule", "constant", "--warmup", "0"]
    if begin and settings is not None:
        command += ["--from", begin]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"bevel failed:\n{done.stderr}")
    lines = Path(out, "training.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def theirs(args, kind, scratch, **more):
    command = [sys.executable, __file__, args.model, "--text", args.text, "--kind", kind]
    command += ["--steps", str(args.steps), "--init", f"{scratch}/init", "--base", f"{scratch}/base"]
    for name, value in more.items():
        command += [f"--{name}", value]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{kind}: PEFT failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args, kind):
    settings, _ = KINDS[kind]
    with tempfile.TemporaryDirectory() as scratch:
        expected = theirs(args, kind, scratch)
        base = os.path.join(scratch, "base")
        model = base if os.path.exists(base) else args.model
        out = os.path.join(scratch, "bevel")
        found = ours(args, model, out, kind, args.steps, os.path.join(scratch, "init"))
        result = {
            "largest_difference_of_a_loss": max(abs(a - b) for a, b in zip(expected, found)),
            "first_and_last_loss": [found[0], found[-1]],
        }
        # The piece after the last one, of which no step is learnt before its loss is told.
        if settings is not None:
            after = ours(args, model, os.path.join(scratch, "after"), kind, args.steps + 1, os.path.join(scratch, "init"))
            result["loss_of_the_next_piece"] = {
                "bevel": after[args.steps],
                "the adapter in PEFT": theirs(args, kind, scratch, check=out),
            }
        else:
            directory = os.path.join(scratch, "hf")
            subprocess.run([args.bevel, "convert", f"{out}/model.gguf", "-o", directory], check=True, capture_output=True)
            after = ours(args, model, os.path.join(scratch, "after"), kind, args.steps + 1, None)
            result["loss_of_the_next_piece"] = {
                "bevel": after[args.steps],
                "the model in transformers": theirs(args, kind, scratch, check=directory),
            }
    print(kind, json.dumps(result), flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--bevel", default="target/release/bevel")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", help="a kind")
    parser.add_argument("--out")
    # One run of the other program, in a process of its own.
    for name in ["kind", "init", "base", "check"]:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        return train(args)
    kinds = [args.only] if args.only else list(KINDS)
    results = {kind: compare(args, kind) for kind in kinds}
    report = {
        "command": " ".join(["python", *sys.argv]),
        "settings": {"rank": 8, "alpha": 16, "tokens": CTX, "batch": 1, "steps": args.steps},
        "results": results,
    }
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
