"""What sampling computes: transformers' processors one after another, in float64 behind float32 scores, with a sort."""

import torch

WEIGHT_BITS = 40
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def penalised(logits, seen, penalty):
    """logits (vocab,), float32; every id in `seen` once."""
    out = logits.clone()
    ids = torch.tensor(sorted(set(seen)), dtype=torch.int64)
    x = logits[ids]
    factor = torch.tensor(penalty, dtype=torch.float32)
    out[ids] = torch.where(x < 0, x * factor, x / factor)
    return out


def kept_by_top_k(scores, k):
    """(vocab,) bool: the k largest, and all that equal the last of them."""
    if k == 0 or k >= len(scores):
        return torch.ones_like(scores, dtype=torch.bool)
    return scores >= scores.sort(descending=True).values[k - 1]


def kept_by_top_p(weights, scores, p):
    """(vocab,) bool: in falling order, those before which less than p of all weights lies.

    Equal weights go by falling score, and then by rising id.
    """
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], -scores[i], i))
    limit = p * sum(weights)
    kept, before = torch.zeros(len(weights), dtype=torch.bool), 0
    for i in order:
        kept[i] = before < limit
        before += weights[i]
    return kept


def probabilities(logits, seen=(), *, temperature, top_k=0, top_p=1.0, penalty=1.0):
    """(vocab,) float64."""
    scores = penalised(logits, seen, penalty) / torch.tensor(temperature, dtype=torch.float32)
    scores = torch.where(kept_by_top_k(scores, top_k), scores, -torch.inf)
    p = scores.double().softmax(-1)
    if top_p < 1.0:
        p = torch.where(kept_by_top_p(p.tolist(), scores.tolist(), top_p), p, 0.0)
    return p / p.sum()


def mix(z):
    """SplitMix64's output function."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def random_bits(seed, sequence, step):
    """The number that sequence `sequence` draws with at step `step`."""
    start = mix((seed + (sequence + 1) * GOLDEN) & MASK)
    return mix((start + (step + 1) * GOLDEN) & MASK)


def draw(weights, bits):
    """The first id up to which the weights sum to more than bits / 2^64 of their sum."""
    target = bits * sum(weights) >> 64
    for i, weight in enumerate(weights):
        target -= weight
        if target < 0:
            return i
    raise AssertionError("the weights sum to more than target")
