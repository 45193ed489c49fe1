"""Tiny random transformers.MambaForCausalLM models with uneven channels, their caches and their tokens."""

import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

VOCAB = 61  # no multiple of a vector or of a tile
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def tiny_model(seed=0, **changes):
    """Two layers, hidden 48 (12 x 4), dim 96, dstate 16, dt_rank 12, unless changed."""
    sizes = {"hidden_size": 48, "state_size": 16, "time_step_rank": 12, "num_hidden_layers": 2}
    config = MambaConfig(
        **{"vocab_size": VOCAB, "conv_kernel": 4, **SPECIAL_TOKENS, **sizes, **changes}
    )
    torch.manual_seed(seed)
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        _spread(model)
    return model


def _spread(model):
    """Log-normal channels, as trained models have them: what transforms and scales must cope with."""

    def uneven(parameter, strength):
        parameter.mul_(torch.exp(strength * torch.randn_like(parameter)))

    model.backbone.embeddings.weight.normal_(0, 1)
    uneven(model.backbone.norm_f.weight, 0.3)
    if not model.config.tie_word_embeddings:
        model.lm_head.weight.normal_(0, 0.3)
    for block in model.backbone.layers:
        mixer = block.mixer
        uneven(block.norm.weight, 0.5)
        for linear in (mixer.in_proj, mixer.x_proj, mixer.out_proj):
            linear.weight.normal_(0, 0.7 * linear.in_features**-0.5)
            linear.weight.mul_(torch.exp(0.4 * torch.randn(linear.out_features, 1)))
            if linear.bias is not None:
                linear.bias.normal_(0, 0.2)
        mixer.conv1d.weight.normal_(0, 0.6)
        if mixer.conv1d.bias is not None:
            mixer.conv1d.bias.normal_(0, 0.3)
        uneven(mixer.D, 0.5)


def tokens(batch, seqlen, seed=0, vocab=VOCAB):
    """(batch, seqlen), int64."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, vocab, (batch, seqlen), generator=generator)


def calibration(count=4, batch=2, seqlen=40, vocab=VOCAB):
    """Enough tokens for a KLT of 48 channels."""
    return [tokens(batch, seqlen, seed, vocab) for seed in range(100, 100 + count)]


def new_cache(model):
    return DynamicCache(config=model.config)


@torch.no_grad()
def logits(model, ids, **kwargs):
    """(batch, seqlen, vocab) from one call without a cache."""
    return model(ids, use_cache=False, **kwargs).logits


def in_pieces(model, ids, lengths, cache=None):
    """Logits of ids, fed in pieces of the given lengths through one cache."""
    cache = new_cache(model) if cache is None else cache
    parts = [
        model(part, cache_params=cache, use_cache=True).logits
        for part in ids.split([n for n in lengths if n], 1)
    ]
    return torch.cat(parts, 1)
