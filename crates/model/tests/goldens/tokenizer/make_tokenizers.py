"""Trains the small tokenizers of these tests and encodes the nasty text with them.

    python make_tokenizers.py ../../../../../assets/tiny-austen

needs `transformers`, `sentencepiece` and `protobuf`. For each tokenizer it writes NAME.json (a
tokenizer.json) and, in expected.json, what `tokenizers` makes of every line of nasty.json.
"""

import io
import json
import pathlib
import sys

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers.convert_slow_tokenizer import generate_merges

HERE = pathlib.Path(__file__).parent

NASTY = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "a  b   c    d     e      f       g        h" + " " * 40 + "i",
    "tabs\there\t\tand\t\t\tthere",
    "line\nbreaks\n\n\nand\r\nreturns\r\r\n \n  \n\t\n",
    "it's we'll they've I'M YOU'RE don't 'tis 'S 'ſ 'LL",
    "1 12 123 1234 12345 3.14159 1,000,000 0x7f ¼ ² ٣٤٥ 一二三 Ⅷ",
    "😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷🇩🇪 ☃️ ✨",
    "你好，世界！日本語のテキスト 한국어 텍스트 中文English混排123",
    "Ünïcödé café naïve Straße ŒUVRE ǅ ǈ ﬁ ﬀ",
    "cafe\u0301 n\u0303 a\u030a Å \u212b \u1100\u1161\u11a8",
    "Здравствуй мир. Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[31mred\x1b[0m\x7f\x80\x85\xa0",
    "\u200b\u200d\ufeff\u2028\u2029\u202e\u00ad\u3000\u2003x\u180e",
    "def f(x: int) -> int:\n    if x <= 1:\n        return 1\n    return x * f(x - 1)  # factorial\n",
    "for(int i=0;i<n;++i){a[i]+=b[i]&0xFF;}//done/*x*/#include <stdio.h>",
    "https://example.org/a_b-c?d=e&f=%20#g user@example.org C:\\dir\\file.txt",
    "<|endoftext|><|im_start|>user\nhi<|im_end|>\n<s>[INST] x [/INST]</s><unk><pad>",
    "a<|im_end|>b <|im_end|> c  <|im_end|>  d<|im_end|><|im_end|>",
    "<tool_call>{\"a\": 1}</tool_call> not special but whole",
    "<0x0A> <0x41> ▁ ▁▁ Ġ Ċ ĠĠ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "𝒳𝓎𝔃 𐍈 𠜎 \U0001f9ff \U0010ffff",
    "!!!???...,,,;;;:::--- -- - __ ** ~~ `` $$ ^^ || \\\\ // (()) [[]] {{}} «» “” ‘’ …",
    "HTTPServerError XMLHttpRequest camelCase snake_case SCREAMING_CASE iPhone McDonald",
    " \u00a0 \u2009 \u3000 mixed   spaces \t \n \r ",
    "end with newline\n",
    "\n",
    "'",
]

CORPUS = NASTY * 3 + [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.",
    "However little known the feelings or views of such a man may be on his first entering a neighbourhood,",
    "this truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property",
    "of some one or other of their daughters. \"My dear Mr. Bennet,\" said his lady to him one day,",
    "    return self.value if self.value is not None else default\n        for key, value in items.items():\n",
    "the 12 and 345 6789 of them they're there's we've",
] * 4

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK3 = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]


def split(regexes):
    steps = [pre_tokenizers.Split(Regex(regex), "isolated", invert=False) for regex in regexes]
    return pre_tokenizers.Sequence(steps + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(pre_tokenizer, normalizer=None, ignore_merges=False, bos=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ["<tool_call>", "</tool_call>"]])
    if bos:
        bos = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]
        )
    return tokenizer


def sentence_piece(space_prefix, user_defined):
    """Llama 2's (and without a space prefix Gemma's) tokenizer.json, as `transformers` converts it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS * 4 + NASTY for line in text.replace("\x00", "").split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.98,
        add_dummy_prefix=space_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=user_defined,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(processor.id_to_piece(id), processor.get_score(id)) for id in range(processor.get_piece_size())]
    vocab = {piece: id for id, (piece, _) in enumerate(pieces)}
    special = {"<unk>", "<s>", "</s>", *user_defined}
    merges = generate_merges(vocab, dict(pieces), skip_tokens=special)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prepend = [normalizers.Prepend("▁")] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence(prepend + [normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ["<unk>", "<s>", "</s>"]])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in user_defined])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer, [score for _, score in pieces]


def expected(tokenizer):
    rows = []
    for text in NASTY:
        tokenizer.encode_special_tokens = False
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        added = tokenizer.encode(text, add_special_tokens=True).ids
        tokenizer.encode_special_tokens = True
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.encode_special_tokens = False
        rows.append(
            {
                "added": added,
                "ids": ids,
                "plain": plain,
                "decoded": tokenizer.decode(ids, skip_special_tokens=False),
                "skipped": tokenizer.decode(ids, skip_special_tokens=True),
            }
        )
    return rows


def main():
    llama, llama_scores = sentence_piece(True, [])
    gemma, gemma_scores = sentence_piece(False, ["<start_of_turn>", "<tool_call>"])
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizers = {
        "gpt2": byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "smollm": byte_level(digits),
        "llama3": byte_level(split([LLAMA3]), ignore_merges=True, bos=True),
        "qwen2": byte_level(split([QWEN2]), normalizer=normalizers.NFC()),
        "deepseek3": byte_level(split(DEEPSEEK3)),
        "tekken": byte_level(split([TEKKEN]), ignore_merges=True, bos=True),
        "llama2": llama,
        "gemma": gemma,
    }
    for name, tokenizer in tokenizers.items():
        text = tokenizer.to_str(pretty=False)
        (HERE / f"{name}.json").write_text(text + "\n")
    tokenizers["tiny-austen"] = Tokenizer.from_file(str(pathlib.Path(sys.argv[1]) / "tokenizer.json"))
    write = lambda name, value: (HERE / name).write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")
    write("nasty.json", NASTY)
    for name, tokenizer in tokenizers.items():
        write(f"{name}.expected.json", expected(tokenizer))
    write("scores.json", {"llama2": llama_scores, "gemma": gemma_scores})


if __name__ == "__main__":
    main()
