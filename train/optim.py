"""The optimizer and its learning rate, which is a pure function of the step."""

import math
import re

import torch
from torch import nn

from models import sharding

UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")  # the names that transformers' Trainer exempts

STATE_BYTES = {"adamw": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}  # of a trained weight


def make_optimizer(model, train):
    """AdamW over the trainable parameters, by the name in `train.optim`; norms and biases are not decayed."""
    decayed, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (rest if UNDECAYED.search(name.lower()) else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    settings = {"lr": train.learning_rate, "betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_epsilon}
    if train.optim == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=True)
    return OnShards(groups, train.optim, settings)


class OnShards:
    """bitsandbytes' AdamW, which knows no DTensor: it gets this rank's part of each parameter, in the same memory.

    Its 8-bit state is kept in blocks of 256 elements. What has 4096 elements or more over all ranks has such a state, so that the number
    of ranks does not decide it; where the ranks' parts are whole blocks, as in any real model's large weights, it changes nothing at all.
    """

    def __init__(self, groups, name, settings):
        try:
            import bitsandbytes.optim as library
        except ImportError as e:
            raise ValueError(f"train.optim: {name} needs bitsandbytes: pip install -e '.[bnb]'") from e
        make = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit"}[name]
        manager = library.GlobalOptimManager.get_instance()
        self.parts = {}  # parameter -> this rank's part of it, a plain one
        for p in (p for group in groups for p in group["params"]):
            self.parts[p] = part = nn.Parameter(sharding.local(p.detach()))
            manager.override_config(part, "min_8bit_size", 0 if p.numel() >= 4096 else part.numel() + 1)
        parts = [group | {"params": [self.parts[p] for p in group["params"] if self.parts[p].numel()]} for group in groups]
        self.inner = getattr(library, make)([group for group in parts if group["params"]], **settings)
        self.param_groups = self.inner.param_groups

    def zero_grad(self):
        for p in self.parts:
            p.grad = None

    def step(self):
        for p, part in self.parts.items():
            part.data = sharding.local(p.detach())  # FSDP may have moved it
            part.grad = None if p.grad is None else sharding.local(p.grad)
        self.inner.step()
        for part in self.parts.values():
            part.grad = None

    @property
    def state(self):
        """{parameter: {name: tensor of this rank's part, or number}}; without the code books, which are constants."""
        states = {p: self.inner.state.get(part, {}) for p, part in self.parts.items()}
        return {p: {k: v for k, v in state.items() if not k.startswith("qmap")} for p, state in states.items()}

    def restore(self, p, state):
        """Take over a state like those of `state`."""
        part = self.parts[p]
        for g, group in enumerate(self.param_groups):
            for i, candidate in enumerate(group["params"]):
                if candidate is part:
                    self.inner.init_state(group, part, g, i)  # memory of the right kind
        mine = self.inner.state[part]
        mine |= {"step": int(state["step"])}
        for name, value in state.items():
            if name != "step":
                mine[name].copy_(value)


def restore(optimizer, p, state):
    """Give the optimizer the state of one parameter; on a rank that has no part of it, none."""
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer.state[p] = state
    elif sharding.local(p).numel():
        optimizer.restore(p, {k: sharding.local(v) if isinstance(v, torch.Tensor) else v for k, v in state.items()})


def to_floats(codes, scales, name):
    """A bitsandbytes state ("state1", the mean, or "state2") of 8 bits as float32."""
    from bitsandbytes import functional

    code = functional.create_dynamic_map(signed=name == "state1")
    return functional.dequantize_blockwise(codes.contiguous(), absmax=scales, code=code, blocksize=256)


def to_codes(values, name):
    """float32 as (codes, scales) of 8 bits."""
    from bitsandbytes import functional

    code = functional.create_dynamic_map(signed=name == "state1")
    codes, state = functional.quantize_blockwise(values.contiguous(), code=code, blocksize=256)
    return codes, state.absmax


def count(value, total):
    """A number of steps that may be given as a fraction below 1 of all steps."""
    return math.ceil(value * total) if value < 1 else int(value)


def learning_rate(train, total, step):
    """The learning rate used in step `step` (from 1) of `total`; the curves of transformers' get_scheduler."""
    done, warmup = step - 1, count(train.warmup_steps, total)
    if done < warmup:
        return train.learning_rate * done / warmup
    if train.lr_scheduler_type == "constant":
        return train.learning_rate
    if train.lr_scheduler_type == "warmup_stable_decay":
        decay = count(train.decay_steps, total)
        progress = 1 - min(decay, total - done) / decay if decay else 0.0  # of the decay
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    progress = (done - warmup) / max(1, total - warmup)
    if train.lr_scheduler_type == "cosine":
        return train.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return train.learning_rate * max(0.0, 1 - progress)
