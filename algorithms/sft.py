"""Supervised fine-tuning: the cross-entropy of the trained tokens, averaged over the tokens of the whole step.

nll: maximum likelihood. dft: Dynamic Fine-Tuning, https://arxiv.org/abs/2508.05629, equation 9: each token's loss is weighted by
its own probability, held constant, which takes the inverse-probability weight out of the gradient.

Departs from TRL: dropout of the model is off, and mixture-of-experts models train without their router's loss. Otherwise equal: its
SFTTrainer divides by the trained tokens of all ranks and micro-batches too.
"""

from dataclasses import dataclass
from typing import Literal

ROWS = "completions"
REFERENCE = False


@dataclass(frozen=True)
class Config:
    loss_type: Literal["nll", "dft"] = "nll"
    """nll: cross-entropy; dft: weighted by the token's own probability."""


def byproducts(cfg):
    """What beside the log-probs the loss wants of the head."""
    return ("entropy", "is_top1")


def counts(batch):
    """What the loss divides by: `tokens`, the trained tokens of `loss_mask` (R, T)."""
    return {"tokens": batch["loss_mask"].sum()}


def loss(logps, batch, totals, cfg):
    """This micro-batch's share of the step's loss and metrics.

    logps: (R, T) float32, nats; batch: `loss_mask` (R, T) bool, `entropy` (R, T) nats, `is_top1` (R, T).
    Worked by hand: probabilities 1/2 and 1/4 on the two trained tokens of a step give nll (ln 2 + ln 4) / 2 = 1.0397 and
    dft (ln 2 / 2 + ln 4 / 4) / 2 = 0.3466.
    """
    mask = batch["loss_mask"]  # (R, T)
    nll = -(logps * mask)  # (R, T) nats
    losses = nll * logps.detach().exp() if cfg.loss_type == "dft" else nll  # (R, T)
    metrics = {
        "entropy": (batch["entropy"] * mask).sum() / totals["tokens"],
        "mean_token_accuracy": (batch["is_top1"] * mask).sum() / totals["tokens"],
    }
    return losses.sum() / totals["tokens"], metrics
