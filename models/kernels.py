"""Liger's kernels (https://github.com/linkedin/Liger-Kernel) in the place of a family's own operations, by name; swaps are printed.

The only file that puts other functions into transformers' modules. Under torch.compile they would only get in the compiler's way, so the
config refuses the two together. Liger's fused linear cross-entropy is not among them: it gives neither the entropy nor the likeliest token,
and per-token losses with gradients only by a second pass, which `chunked` of models/logprobs.py does as well.
"""

import dataclasses
import os
import sys
from types import MethodType

import torch
import torch.distributed as dist
from torch import nn

from models.sharding import decoder_layers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # root-mean-square norms without an offset, gated SiLU, rotation by halves


def swap(model, names, device):
    """Swap the operations `names` (of the config's `model.kernels`) in a model that is not sharded yet."""
    if not names:
        return
    family = model.config.model_type
    if family not in FAMILIES:
        raise ValueError(f"model.kernels: no swaps are known for {family}, only for {', '.join(FAMILIES)}; leave it empty")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("model.kernels: Liger's kernels need a GPU; leave it empty")
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError as e:
        raise ValueError("model.kernels: Liger is not installed: pip install -e '.[liger]'") from e
    for name in dict.fromkeys(names):
        line = {"rms_norm": swap_norms, "swiglu": swap_gates, "rope": swap_rotation}[name](model)
        if dist.get_rank() == 0:
            print(f"swapped {line}", flush=True)


def swap_norms(model):
    from liger_kernel.ops import LigerRMSNormFunction

    def forward(self, x):
        # not in place: that writes over the gradient that comes in
        return LigerRMSNormFunction.apply(x, self.weight, self.variance_epsilon, 0.0, "llama", False, None)

    return replace(model, "RMSNorm", forward, "LigerRMSNorm")


def swap_gates(model):
    from liger_kernel.transformers import LigerSwiGLUMLP

    if model.config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"model.kernels: swiglu has silu inside, this model {model.config.hidden_act}; leave it out")
    return replace(model, "MLP", LigerSwiGLUMLP.forward, "LigerSwiGLUMLP")


def replace(model, kind, forward, theirs):
    """Give the modules whose class's name ends with `kind` another forward."""
    found = [m for m in model.modules() if type(m).__name__.endswith(kind)]
    for module in found:
        module.forward = MethodType(forward, module)
    return f"{len(found)} {type(found[0]).__name__} -> {theirs}"


def swap_rotation(model):
    from liger_kernel.transformers import liger_rotary_pos_emb

    source = sys.modules[type(model).__module__]
    source.apply_rotary_pos_emb = liger_rotary_pos_emb  # of every model of the family in this process
    return f"{source.__name__.rpartition('.')[2]}.apply_rotary_pos_emb -> liger_rotary_pos_emb"


def to_float8(model, recipe, device, emulate=False):
    """Let the decoder's linear layers multiply in 8-bit floating point, by torchao, before the model is sharded. Weights and names stay.

    recipe: "tensorwise" or "rowwise", what a scale is of. A layer with a side that 16 does not divide is left as it is. emulate: without
    the matrix units for it.
    """
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise ValueError(f"model.float8: {recipe} needs a GPU of compute capability 8.9 or later; leave it out")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as e:
        raise ValueError("model.float8: torchao is not installed: pip install -e '.[float8]'") from e
    inside = {m for layer in decoder_layers(model) for m in layer.modules() if type(m) is nn.Linear}
    chosen = {m for m in inside if m.in_features % 16 == 0 and m.out_features % 16 == 0}
    # padded inside: a micro-batch has any number of tokens, and the matrix units take multiples of 16
    how = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=lambda module, _: module in chosen, config=how)
    if dist.get_rank() == 0:
        print(f"swapped {len(chosen)} of {len(inside)} Linear -> Float8Linear ({recipe})", flush=True)
