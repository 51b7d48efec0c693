"""NF4 weights (QLoRA, https://arxiv.org/abs/2305.14314) that FSDP2 shards: bitsandbytes' arithmetic, a linear layer of our own.

The packed bytes are kept as rows of bfloat16, a dtype that FSDP shards on every torch and that mixed precision leaves alone, as it is the
compute dtype or none is set. Their scales, themselves in 8 bits, are whole on every rank: one byte for 64 weights. bitsandbytes' own
Linear4bit is not used: in eval mode it repacks its weights on some CPUs, which under FSDP breaks every later pass in silence.
"""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from models import sharding


def library():
    try:
        import bitsandbytes.functional
    except ImportError as e:
        raise ValueError("model.quantization: nf4 needs bitsandbytes: pip install -e '.[bnb]'") from e
    return bitsandbytes.functional


def swap(model):
    """Put an `NF4Linear` in the place of each linear layer of the decoder layers of a model on the meta device."""
    library()
    places = [
        (parent, name, child)
        for layer in sharding.decoder_layers(model)
        for parent in layer.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    for parent, name, child in places:
        parent._modules[name] = NF4Linear(child)
    rest = sum(p.numel() for layer in sharding.decoder_layers(model) for p in layer.parameters() if p.ndim > 1)
    packed = sum(m.packed.numel() for m in model.modules() if isinstance(m, NF4Linear))
    if rest > 2 * packed:
        kind = type(model).__name__
        raise ValueError(
            f"model.quantization: most weights of {kind} are in no linear layer (fused experts?), so nf4 would not shrink them"
        )


@contextmanager
def taken_out(model):
    """Inside, the model's tree is without its quantised layers; gives {name: layer}, which are put back after."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer) for name, layer in found.items()]
    for parent, name, _ in places:
        parent._modules[name] = nn.Identity()  # keeps the place, and so the order of all parameters
    try:
        yield found
    finally:
        for parent, name, layer in places:
            parent._modules[name] = layer


class NF4Linear(nn.Linear):
    """A frozen linear layer in 4 bits; `weight` is made from them when it is read."""

    def __init__(self, linear):
        """linear: the layer on the meta device whose place this takes."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        if self.in_features % 4:
            raise ValueError(
                f"model.quantization: a linear layer of {self.in_features} inputs does not pack into nf4, which needs a multiple of 4"
            )
        packed = torch.empty(self.out_features, self.in_features // 4, dtype=torch.bfloat16, device="meta")
        self.packed = nn.Parameter(packed, requires_grad=False)  # four 4-bit weights an element
        self.bias = linear.bias
        self.state = None  # bitsandbytes' scales

    def fill(self, weight, bias, device):
        """Quantise a whole weight (out, in) and keep this rank's rows of it."""
        whole = weight.to(device, self.dtype).contiguous()
        packed, self.state = library().quantize_4bit(whole, quant_type="nf4", compress_statistics=True)
        sharding.place(self, "packed", packed.view(self.out_features, -1).view(torch.bfloat16), device)
        if bias is not None:
            sharding.place(self, "bias", bias.to(self.dtype), device)

    def scales_bytes(self):
        return self.state.absmax.nbytes + self.state.state2.absmax.nbytes

    @property
    def weight(self):
        """(out, in), whole."""
        if self.packed.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return dequantize(sharding.whole(self.packed), self.state)

    def forward(self, x):
        return Product.apply(x, self.packed, self.bias, self.state)


def reading(model):
    """{name of a weight: function that gives it whole}, of the quantised layers."""
    return {f"{name}.weight": partial(getattr, m, "weight") for name, m in model.named_modules() if isinstance(m, NF4Linear)}


def dequantize(packed, state):
    return library().dequantize_4bit(packed.view(torch.uint8).view(-1, 1), state)


class Product(torch.autograd.Function):
    """x W^T + b, which keeps only the packed bytes for the backward pass."""

    @staticmethod
    def forward(ctx, x, packed, bias, state):
        ctx.save_for_backward(packed)
        ctx.state = state
        return F.linear(x, dequantize(packed, state), bias)

    @staticmethod
    def backward(ctx, grad):
        (packed,) = ctx.saved_tensors
        return grad @ dequantize(packed, ctx.state), None, None, None
