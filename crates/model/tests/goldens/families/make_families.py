"""Makes one tiny random checkpoint for each decoder family and records transformers' logits.

    pip install torch transformers safetensors
    python make_families.py

Each case is a directory with `config.json`, `model.safetensors` (bf16, so that it is small and
exact in f32) and `expected.safetensors` (token ids and the f32 logits of every position).
"""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
TOKENS = 40

COMMON = dict(
    vocab_size=80,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(rope_type="longrope", rope_theta=10000.0,
                short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 3.0, 4.0],
                original_max_position_embeddings=32)

CASES = {
    "llama": ("LlamaConfig", dict()),
    "llama_biases_tied": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama3_rope": ("LlamaConfig", dict(rope_parameters=LLAMA3, head_dim=16)),
    "mistral_window": ("MistralConfig", dict(sliding_window=9)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24, sliding_window=None)),
    "qwen2": ("Qwen2Config", dict()),
    "qwen2_yarn_window": ("Qwen2Config", dict(rope_parameters=YARN, use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen3": ("Qwen3Config", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3moe": ("Qwen3MoeConfig", dict(head_dim=16, norm_topk_prob=True, **EXPERTS)),
    "gemma2": ("Gemma2Config", dict(head_dim=16, sliding_window=6, query_pre_attn_scalar=24, tie_word_embeddings=True)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=16, sliding_window=6, num_hidden_layers=3, tie_word_embeddings=True,
               layer_types=["sliding_attention", "full_attention", "sliding_attention"], query_pre_attn_scalar=16,
               rope_parameters={"full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                                "sliding_attention": dict(rope_type="default", rope_theta=10000.0)})),
    "phi3_short": ("Phi3Config", dict(rope_parameters=LONGROPE, original_max_position_embeddings=32, sliding_window=None)),
    "phi3_long": ("Phi3Config", dict(rope_parameters=LONGROPE, original_max_position_embeddings=32, sliding_window=11)),
    "phi3_partial": ("Phi3Config", dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))),
    "granite": ("GraniteConfig", dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.0625, logits_scaling=8.0)),
    "olmo2": ("Olmo2Config", dict()),
    "olmoe": ("OlmoeConfig", dict(intermediate_size=24, num_experts=4, num_experts_per_tok=2, norm_topk_prob=False)),
}


def randomize(model):
    """Weights large enough that every switch shows in the logits; norms near one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                gemma = "gemma" in model.config.model_type
                p.copy_((0.0 if gemma else 1.0) + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif "embed" in name:
                p.copy_(noise)
            else:
                p.copy_(noise * 1.5 / p.shape[-1] ** 0.5)
            p.copy_(p.to(torch.bfloat16).float())


def main():
    tokens = torch.randint(0, COMMON["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(1))
    for name, (config_class, extra) in CASES.items():
        config = getattr(transformers, config_class)(**{**COMMON, **extra})
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomize(model)
        # Up to the original context LongRoPE keeps its short divisors.
        ids = tokens[:, :30] if name == "phi3_short" else tokens
        with torch.no_grad():
            logits = model(ids).logits[0]
        directory = HERE / name
        shutil.rmtree(directory, ignore_errors=True)
        model.to(torch.bfloat16).save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        save_file({"tokens": ids[0].to(torch.int32), "logits": logits.contiguous()}, directory / "expected.safetensors")
        size = sum(f.stat().st_size for f in directory.iterdir())
        print(f"{name:20} {size:7} bytes, {len(load_file(directory / 'model.safetensors'))} tensors, "
              f"|logits| {logits.abs().mean():.2f}")


main()
