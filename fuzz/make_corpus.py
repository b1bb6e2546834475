"""Writes the seeds of the model's targets: tiny tokenizers, templates, configurations and models.

    pip install gguf numpy
    python make_corpus.py

Weights are random and of many types; a seed is a few kilobytes at most.
"""

import json
import pathlib

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

CORPUS = pathlib.Path(__file__).parent / "corpus"
RNG = np.random.default_rng(0)


def put(target: str, name: str, data) -> None:
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(data, str):
        data = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    path.write_text(data, encoding="utf-8")


# --- tokenizer.json -----------------------------------------------------------------------------

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def added(id: int, content: str, **flags) -> dict:
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {"id": id, "content": content, **plain, **flags}


def bpe(vocab: list[str], merges: list, **rest) -> dict:
    return {"type": "BPE", "vocab": {text: id for id, text in enumerate(vocab)}, "merges": merges, **rest}


LETTERS = ["a", "b", "c", "e", "h", "l", "o", "t", "Ġ", "Ċ", "1"]
put("tokenizer_json", "byte_level.json", {
    "added_tokens": [added(14, "<|end|>"), added(15, "<x>", special=False, rstrip=True)],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": BYTE_LEVEL,
    "post_processor": {"type": "TemplateProcessing",
                       "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}},
                                  {"Sequence": {"id": "A", "type_id": 0}}]},
    "decoder": BYTE_LEVEL,
    "model": bpe(LETTERS + ["he", "ll", "hell"], ["h e", ["l", "l"], "he ll"], ignore_merges=True)})
put("tokenizer_json", "split.json", {
    "added_tokens": [],
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
        {"type": "Digits", "individual_digits": True},
        {**BYTE_LEVEL, "use_regex": False}]},
    "model": bpe(LETTERS, [])})
put("tokenizer_json", "sentence_piece.json", {
    "added_tokens": [added(0, "<unk>"), added(1, "<s>")],
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "model": bpe(["<unk>", "<s>", "<0x0A>", "<0xE2>", "▁", "h", "e", "▁h", "he"], ["▁ h", "h e"],
                 unk_token="<unk>", fuse_unk=True, byte_fallback=True)})

# --- chat templates -----------------------------------------------------------------------------

put("chat_template", "chatml.jinja",
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
put("chat_template", "macro.jinja",
    "{%- macro line(name, text) %}{{- name | upper }}: {{ text | trim | indent(2) }}\n{%- endmacro %}\n"
    "{%- set ns = namespace(system='', count=0) %}\n"
    "{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}\n{{- bos_token ~ ns.system }}\n"
    "{%- for m in messages if m.role != 'tool' %}\n{%- set ns.count = ns.count + loop.index0 %}\n"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\n"
    "{{ line(m.role, m.content) }}{% if loop.last %}{% break %}{% endif %}\n{%- endfor %}\n"
    "{%- generation %}{{ ns.count }}{% endgeneration %}")
put("chat_template", "tools.jinja",
    "{%- if tools is defined and tools is iterable %}{% for tool in tools %}"
    "{{ tool | tojson(indent=2) }}{{ tool.function.name.split('_')[-1].startswith('x') }}{% endfor %}{% endif %}"
    "{% for i in range(3) | reverse %}{{ 'a' * i ~ '%02d' | format(i) }}{% endfor %}"
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | length }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | batch(2, 'x') | list }}"
    "{{ [1, 2, 3] | slice(2) | list }}{{ strftime_now('%Y-%m-%d') }}{{ {'a': [none, 1.5e3, true]} | tojson }}")

# --- config.json --------------------------------------------------------------------------------

COMMON = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=64)
put("config_json", "llama3.json", dict(
    model_type="llama", **COMMON, rms_norm_eps=1e-5, rope_theta=500000.0, hidden_act="silu",
    tie_word_embeddings=True, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)))
put("config_json", "gemma3.json", dict(
    model_type="gemma3_text", **COMMON, head_dim=4, sliding_window=6, query_pre_attn_scalar=16,
    hidden_activation="gelu_pytorch_tanh", final_logit_softcapping=30.0,
    layer_types=["sliding_attention", "full_attention"], rope_parameters=dict(
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        sliding_attention=dict(rope_type="default", rope_theta=1e4))))
put("config_json", "phi3.json", dict(
    model_type="phi3", **COMMON, partial_rotary_factor=0.5, sliding_window=11,
    original_max_position_embeddings=32, rope_scaling=dict(
        type="longrope", short_factor=[1.0], long_factor=[2.0])))
put("config_json", "qwen3_moe.json", dict(
    model_type="qwen3_moe", **COMMON, head_dim=4, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=8, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    use_sliding_window=True, sliding_window=4, max_window_layers=1,
    rope_scaling=dict(type="yarn", factor=4.0, beta_fast=32, beta_slow=1)))

# --- GGUF ---------------------------------------------------------------------------------------


def write(target: str, name: str, architecture: str, build) -> None:
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    build(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gpt2(writer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(LETTERS + ["he", "<|end|>", "<x>", ""])
    writer.add_token_types([1] * 12 + [3, 4, 5])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(12)
    writer.add_eos_token_id(12)
    writer.add_chat_template("{{ messages }}")


def sentence_piece(writer) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "<0x0A>", "▁", "h", "e", "▁h", "he"])
    writer.add_token_scores([0, 0, 0, 0, -1, -2, -3, -4, -5])
    writer.add_token_types([2, 3, 3, 6, 1, 1, 1, 1, 1])
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


write("tokenizer_gguf", "gpt2.gguf", "llama", gpt2)
write("tokenizer_gguf", "sentence_piece.gguf", "llama", sentence_piece)


def model(name: str, architecture: str, *, dim: int, head_dim: int, ffn: int, vocab: int, layers: int,
          types: dict[str, Type], experts: int = 0, qk_norm: bool = False, gemma: bool = False,
          fused: bool = False, tied: bool = True, keys=lambda writer: None) -> None:
    """A model of two query heads and one key-value head; `types` are by tensor, the rest is F32."""

    def build(writer) -> None:
        def add(tensor: str, *shape: int) -> None:
            kind = types.get(tensor.removeprefix("blk.0."), Type.F32)
            if kind == Type.F32:
                values = RNG.normal(1.0 if "norm" in tensor else 0.0, 0.3, shape).astype(np.float32)
                writer.add_tensor(tensor + ".weight", values)
                return
            block, size = gguf.GGML_QUANT_SIZES[kind]
            # Random codes with small scales wherever a half-precision scale may lie.
            data = RNG.integers(0, 48, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)
            writer.add_tensor(tensor + ".weight", data, raw_dtype=kind)

        writer.add_block_count(layers)
        writer.add_context_length(64)
        writer.add_embedding_length(dim)
        writer.add_feed_forward_length(ffn)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(1e-5)
        keys(writer)
        add("token_embd", vocab, dim)
        add("output_norm", dim)
        if not tied:
            add("output", vocab, dim)
        q, kv = 2 * head_dim, head_dim
        for layer in range(layers):
            b = f"blk.{layer}."
            add(b + "attn_norm", dim)
            add(b + "ffn_norm", dim)
            if fused:
                add(b + "attn_qkv", q + 2 * kv, dim)
            else:
                add(b + "attn_q", q, dim)
                add(b + "attn_k", kv, dim)
                add(b + "attn_v", kv, dim)
            add(b + "attn_output", dim, q)
            if qk_norm:
                add(b + "attn_q_norm", head_dim)
                add(b + "attn_k_norm", head_dim)
            if gemma:
                add(b + "post_attention_norm", dim)
                add(b + "post_ffw_norm", dim)
            if experts:
                add(b + "ffn_gate_inp", experts, dim)
                add(b + "ffn_gate_exps", experts, ffn, dim)
                add(b + "ffn_up_exps", experts, ffn, dim)
                add(b + "ffn_down_exps", experts, dim, ffn)
            else:
                if not fused:
                    add(b + "ffn_gate", ffn, dim)
                add(b + "ffn_up", 2 * ffn if fused else ffn, dim)
                add(b + "ffn_down", dim, ffn)

    write("model_gguf", name, architecture, build)


def moe(writer) -> None:
    writer.add_expert_count(3)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(4)


def windows(writer) -> None:
    writer.add_sliding_window(3)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


def long_rope(writer) -> None:
    writer.add_rope_scaling_orig_ctx_len(16)
    writer.add_rope_scaling_attn_factors(1.1)
    writer.add_tensor("rope_factors_long.weight", np.array([2, 3], np.float32))
    writer.add_tensor("rope_factors_short.weight", np.array([1, 1], np.float32))


model("llama.gguf", "llama", dim=32, head_dim=16, ffn=32, vocab=6, layers=1, tied=False, types={
    "token_embd": Type.Q8_0, "output": Type.Q5_1, "attn_q": Type.Q4_0,
    "attn_k": Type.Q4_1, "attn_v": Type.Q5_0, "attn_output": Type.Q8_0, "ffn_gate": Type.IQ4_NL,
    "ffn_up": Type.MXFP4, "ffn_down": Type.BF16})
model("super_blocks.gguf", "qwen3", dim=256, head_dim=2, ffn=2, vocab=2, layers=1, qk_norm=True, types={
    "token_embd": Type.Q6_K, "attn_q": Type.Q4_K, "attn_k": Type.Q2_K, "attn_v": Type.Q3_K,
    "ffn_gate": Type.Q5_K, "ffn_up": Type.IQ4_XS})
model("codebooks.gguf", "qwen3", dim=256, head_dim=2, ffn=2, vocab=2, layers=1, qk_norm=True, types={
    "token_embd": Type.IQ2_XXS, "attn_q": Type.IQ2_XS, "attn_k": Type.IQ2_S, "attn_v": Type.IQ3_XXS,
    "attn_output": Type.F16, "ffn_gate": Type.IQ3_S, "ffn_up": Type.TQ1_0, "ffn_down": Type.F16})
model("experts.gguf", "qwen3moe", dim=8, head_dim=4, ffn=4, vocab=5, layers=1, experts=3, qk_norm=True,
      types={}, keys=moe)
model("gemma3.gguf", "gemma3", dim=8, head_dim=4, ffn=8, vocab=5, layers=2, qk_norm=True, gemma=True,
      types={}, keys=windows)
model("phi3.gguf", "phi3", dim=8, head_dim=4, ffn=4, vocab=5, layers=1, fused=True, types={}, keys=long_rope)
