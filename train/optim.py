"""The optimizer and its learning rate, which is a pure function of the step."""

import math
import re

import torch

UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")  # the names that transformers' Trainer exempts


def make_optimizer(model, train):
    """AdamW over the trainable parameters; norms and biases are not decayed."""
    decayed, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (rest if UNDECAYED.search(name.lower()) else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,
    )


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
