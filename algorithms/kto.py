"""Kahneman-Tversky Optimization, https://arxiv.org/abs/2402.01306, equations 7 and 8: single responses, each labelled good or bad.

kto: a response's log-ratio against the baseline z0, the policy's mean log-ratio on mismatched pairs of prompt and response, without a
gradient and not below 0. apo_zero_unpaired: z0 is 0 (APO, https://arxiv.org/abs/2408.06266, equation 7).

Departs from the paper: z0 is the mean over the whole step, not one per micro-batch.
Departs from TRL: likewise, where TRL takes the mean of one micro-batch per rank; rows are shuffled and labels mixed, where TRL keeps the
file's order; a mismatched response is the one before it with another prompt, where TRL rotates within a batch, perhaps to the same prompt.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

ROWS = "labelled"
REFERENCE = True


@dataclass(frozen=True)
class Config:
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto, or APO-zero on single responses."""
    beta: float = 0.1
    """How closely the policy is held to the reference, 1/nats."""
    desirable_weight: float = 1.0
    """Weight of good responses."""
    undesirable_weight: float = 1.0
    """Weight of bad responses."""

    def __post_init__(self):
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"kto.{name}: got {getattr(self, name)}, expected a number above 0")


def byproducts(cfg):
    return ("entropy", "mean_logits")


def counts(batch):
    good, tokens = batch["desirable"], batch["loss_mask"].sum(-1)  # (R,)
    return {
        "examples": len(good),
        "tokens": tokens.sum(),
        "chosen": good.sum(),
        "rejected": (~good).sum(),
        "chosen_tokens": tokens[good].sum(),
        "rejected_tokens": tokens[~good].sum(),
    }


def loss(logps, batch, totals, cfg):
    """This micro-batch's share of the step's loss and metrics.

    logps: (R, T) float32, nats; batch: `loss_mask`, `ref_logps` (R, T), `desirable` (R,) bool, `kl` (R,) nats for kto.
    Worked by hand: log-ratio 2 and z0 1 at beta 1: good 1 - sigmoid(1) = 0.2689, bad 1 - sigmoid(-1) = 0.7311.
    """
    mask, good = batch["loss_mask"], batch["desirable"]
    seq_logps = (logps * mask).sum(-1)  # (R,)
    logratios = seq_logps - (batch["ref_logps"] * mask).sum(-1)  # (R,)
    gain = cfg.beta * (logratios - batch["kl"] if cfg.loss_type == "kto" else logratios)  # (R,)
    losses = torch.where(good, cfg.desirable_weight * (1 - gain.sigmoid()), cfg.undesirable_weight * (1 - (-gain).sigmoid()))  # (R,)
    metrics = {"entropy": (batch["entropy"] * mask).sum() / max(totals["tokens"], 1)}
    logits = (batch["mean_logits"] * mask).sum(-1)  # (R,)
    for side, which in (("chosen", good), ("rejected", ~good)):
        number, tokens = max(totals[side], 1), max(totals[f"{side}_tokens"], 1)
        metrics[f"rewards/{side}"] = (cfg.beta * logratios.detach() * which).sum() / number
        metrics[f"logps/{side}"] = (seq_logps.detach() * which).sum() / number
        metrics[f"logits/{side}"] = (logits * which).sum() / tokens
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if cfg.loss_type == "kto":
        metrics["kl"] = batch["kl"].sum() / totals["examples"]
    return losses.sum() / totals["examples"], metrics


def needs_step(cfg):
    """Whether the loss of a response depends on the other responses of the step."""
    return cfg.loss_type == "kto"


def summary(logps, batch, cfg):
    """Log-ratios (R, 1) of mismatched rows: what `spread` needs of the whole step."""
    return ((logps - batch["ref_logps"]) * batch["loss_mask"]).sum(-1, keepdim=True)


def spread(step, cfg):
    """The baseline z0 from the log-ratios (B, 1) of a whole step, one copy per response: {"kl": (B,)}."""
    return {"kl": (step.sum() / len(step)).clamp(min=0).expand(len(step))}
