"""The calibration sequences that every tool is shown: the ones that bevel takes from text files.

All texts are one stream of tokens, cut into sequences of equal length, and of these as many as are
wanted are taken from all over it: one from each of as many equal parts, by SplitMix64.
"""

MASK = (1 << 64) - 1


class Random:
    """SplitMix64, stream 0 of a seed."""

    def __init__(self, seed):
        self.state = seed
        self.state = self.next()

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def below(self, limit):
        return (self.next() * limit) >> 64


def sequences(tokenizer, texts, samples, length, seed=0):
    """`samples` lists of `length` token ids."""
    stream = [t for path in texts for t in tokens_of(tokenizer, path)]
    bos = begins_with(tokenizer)
    inner = length - len(bos)
    count = len(stream) // inner
    if count <= samples:
        chosen = range(count)
    else:
        random = Random(seed)
        edges = [i * count // samples for i in range(samples + 1)]
        chosen = [low + random.below(high - low) for low, high in zip(edges, edges[1:])]
    return [bos + stream[i * inner:(i + 1) * inner] for i in chosen]


def tokens_of(tokenizer, path):
    """A text's tokens, without marks of beginning and end."""
    text = open(path, encoding="utf-8-sig").read()
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def begins_with(tokenizer):
    """The mark that the tokenizer puts before a text: one id or none."""
    bos = tokenizer.bos_token_id
    marked = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and marked[:1] == [bos] else []
