"""llama.cpp, through llama-cpp-python, doing what `bevel eval` and `bevel bench` do.

    pip install llama-cpp-python==0.3.36        # built on this machine: CMAKE_ARGS=-DGGML_NATIVE=ON
    python rival.py perplexity MODEL.gguf TEXT.txt [--tokens N] [--ctx 512] [--threads 2]
    python rival.py speed MODEL.gguf [--prompt 512] [--generate 128] [--repeat 3] [--threads 2]

Prints one JSON object. `compare.py` runs both programs in turn.
"""

import argparse
import json
import math
import statistics
import time

import llama_cpp
import numpy as np


def load(path, ctx, threads, flash):
    return llama_cpp.Llama(
        path, n_ctx=ctx, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
        logits_all=True, flash_attn=flash, verbose=False,
    )


def run(model, tokens, position, wanted):
    """One llama_decode over `tokens` from `position`; logits are computed where `wanted`."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i] = token
        batch.pos[i] = position + i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = wanted(i)
    assert llama_cpp.llama_decode(model.ctx, batch) == 0
    llama_cpp.llama_batch_free(batch)


def clear(model):
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)


def perplexity(args):
    """Chunks of `ctx` tokens, the second half of each scored: llama-perplexity's default."""
    model = load(args.model, args.ctx, args.threads, flash=False)
    text = open(args.text, "rb").read()
    add_bos = bool(llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(model.model)))
    tokens = model.tokenize(text, add_bos=add_bos, special=False)
    chunks = len(tokens) // args.ctx
    if args.tokens:
        chunks = min(chunks, args.tokens // args.ctx)
    vocab = model.n_vocab()
    first = args.ctx // 2
    nll = []
    for chunk in range(chunks):
        part = list(tokens[chunk * args.ctx:(chunk + 1) * args.ctx])
        targets = part[1:]
        if add_bos:
            part[0] = model.token_bos()
        clear(model)
        run(model, part, 0, lambda i: i >= first)
        for i in range(first, args.ctx - 1):
            row = llama_cpp.llama_get_logits_ith(model.ctx, i)
            row = np.ctypeslib.as_array(row, shape=(vocab,)).astype(np.float64)
            peak = row.max()
            nll.append(math.log(np.exp(row - peak).sum()) + peak - row[targets[i]])
    return {"perplexity": math.exp(statistics.fmean(nll)), "scored": len(nll), "tokens": len(tokens)}


def speed(args):
    model = load(args.model, args.prompt + args.generate, args.threads, args.flash)
    rng = np.random.default_rng(1)
    prompt = [int(t) for t in rng.integers(100, model.n_vocab() - 100, args.prompt)]
    prefill, decode = [], []
    for repeat in range(args.repeat + 1):
        clear(model)
        start = time.perf_counter()
        run(model, prompt, 0, lambda i: i == len(prompt) - 1)
        llama_cpp.llama_synchronize(model.ctx)
        middle = time.perf_counter()
        clear(model)
        start_decode = time.perf_counter()
        for i in range(args.generate):
            run(model, [prompt[i % len(prompt)]], i, lambda i: True)
            llama_cpp.llama_synchronize(model.ctx)
        end = time.perf_counter()
        if repeat:  # the first is a warm-up
            prefill.append(args.prompt / (middle - start))
            decode.append(args.generate / (end - start_decode))
    return {"prefill": statistics.median(prefill), "decode": statistics.median(decode)}


parser = argparse.ArgumentParser()
parser.add_argument("what", choices=["perplexity", "speed"])
parser.add_argument("model")
parser.add_argument("text", nargs="?")
parser.add_argument("--tokens", type=int)
parser.add_argument("--ctx", type=int, default=512)
parser.add_argument("--prompt", type=int, default=512)
parser.add_argument("--generate", type=int, default=128)
parser.add_argument("--repeat", type=int, default=3)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--flash", action="store_true")
args = parser.parse_args()
print(json.dumps({"perplexity": perplexity, "speed": speed}[args.what](args)))
