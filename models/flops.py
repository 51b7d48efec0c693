"""Model FLOPs of a micro-batch: what its matrix products and its attention need, whatever is recomputed, padded or wasted besides.

The convention of Megatron-Bridge and prime-rl: 2 for each weight and token forward, 2 for the gradient of the input and, if it is trained,
2 for the weight's; the embedding's look-up costs nothing, the head works where a target follows. Attention over a row of n tokens needs
12 x heads x head size x n^2 in each layer, or half of it where pairs that the causal mask hides are left out (torchtitan counts them).
"""

import torch

from models.quantize import NF4Linear
from models.sharding import decoder_layers

PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # FLOP/s of dense bfloat16 products, SXM cards


def peak(device, dtype):
    """FLOP/s that the device can do at most in `dtype`; None where it is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for card, flops in PEAKS.items() if card in name and "PCIe" not in name and "NVL" not in name), None)


class Work:
    """What a model costs."""

    def __init__(self, model):
        config = model.config.get_text_config()
        layers = decoder_layers(model)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.token = sum(products(layer, config) for layer in layers)  # of one token in all layers
        self.scored = products(model.lm_head, config)  # of one token in the head
        self.pair = 12 * config.num_attention_heads * width  # of one layer and pair of tokens
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
        window = getattr(config, "sliding_window", None)
        self.windows = [window if kind == "sliding_attention" else None for kind in kinds]

    def of(self, batch):
        """{"flops": without hidden pairs, "flops_noncausal": with them} of a training pass over a batch of rows."""
        lengths = batch["attention_mask"].sum(-1).double()  # (R,)
        scored = batch.get("score_mask", batch["loss_mask"]).sum()
        rest = float(self.token * lengths.sum() + self.scored * scored)
        attention = self.pair * sum(float(pairs(lengths, window)) for window in self.windows)
        return {"flops": rest + attention / 2, "flops_noncausal": rest + attention}


def products(module, config):
    """FLOPs of one token's products with a module's matrices; of experts (E, out, in), with those that it is sent to."""
    total = 0
    for name, part in module.named_modules():
        for p in part.parameters(recurse=False) if "original_module" not in name else ():  # beside it is its trained copy
            used = getattr(config, "num_experts_per_tok", 1) / p.shape[0] if p.ndim == 3 else 1
            stored = 4 if isinstance(part, NF4Linear) and p.ndim == 2 else 1  # weights to an element
            total += (6 if p.requires_grad else 4) * p.numel() * used * stored * (p.ndim > 1)
    return total


def pairs(lengths, window):
    """Twice the pairs of tokens that a causal mask leaves in rows of these lengths, about n^2 each; of a window, those in it."""
    near = lengths.clamp(max=window or lengths.max())
    return (near * (2 * lengths - near)).sum()
