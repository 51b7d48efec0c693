"""Simple Preference Optimization, https://arxiv.org/abs/2405.14734, equation 6, and other losses without a reference.

simpo: log-probs per token, a target margin gamma. sigmoid, hinge: CPO, https://arxiv.org/abs/2401.08417, equation 3, on summed log-probs.
ipo: the square loss on log-probs per token. `cpo_alpha` adds the cross-entropy of the chosen response (CPO-SimPO); `alpha` bends the
reward (AlphaPO, https://arxiv.org/abs/2501.03884, equation 3).

beta and gamma are the paper's: the loss is -log sigmoid(beta z - gamma), as in TRL, whose `simpo_gamma` is the same number.
Departs from TRL: no cross-entropy by default (TRL's cpo_alpha is 1), beta 2 and gamma 1 as the paper's experiments, not 0.1 and 0.5; the
cross-entropy is divided by the chosen tokens of the whole step; rows are tokenised as DPO's, where TRL puts a first and
an end token around a template's text and looks back one token at most for the end of the prompt.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F

from algorithms import pairs
from algorithms.pairs import counts  # noqa: F401  part of an algorithm's interface

ROWS = "pairs"
REFERENCE = False


@dataclass(frozen=True)
class Config:
    loss_type: Literal["simpo", "sigmoid", "hinge", "ipo"] = "simpo"
    """simpo, or CPO's sigmoid, hinge and ipo."""
    beta: float = 2.0
    """Scale of the reward, 1/nats."""
    simpo_gamma: float = 1.0
    """Margin by which the chosen reward should exceed the rejected one; simpo only."""
    cpo_alpha: float = 0.0
    """Weight of the chosen response's cross-entropy."""
    alpha: float = 0.0
    """AlphaPO's bend of the reward; 0: the log-probability itself."""
    label_smoothing: float = 0.0
    """Share of labels taken to be flipped, below 1/2; simpo and sigmoid."""

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise ValueError(f"simpo.beta: got {self.beta}, expected a number above 0")
        for name in ("simpo_gamma", "cpo_alpha", "alpha"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"simpo.{name}: got {getattr(self, name)}, expected a number")
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.loss_type in ("hinge", "ipo")):
            raise ValueError(f"simpo.label_smoothing: got {self.label_smoothing}, expected 0 up to 0.5, and 0 for hinge and ipo")


def byproducts(cfg):
    return ("entropy", "is_top1", "mean_logits")


def loss(logps, batch, totals, cfg):
    """This micro-batch's share of the step's loss and metrics. logps: (2P, T) float32, nats.

    Worked by hand: log-probs -1 and -3 per token at beta 2, gamma 1 give -log sigmoid(2 * 2 - 1) = 0.0486.
    """
    sums = (logps * batch["loss_mask"]).sum(-1)  # (2P,)
    seq_logps = sums / pairs.lengths(batch) if cfg.loss_type in ("simpo", "ipo") else sums  # (2P,)
    rewards = (1 - (-cfg.alpha * seq_logps).exp()) / cfg.alpha if cfg.alpha else seq_logps  # (2P,)
    z, eps = rewards[0::2] - rewards[1::2], cfg.label_smoothing  # (P,)
    if cfg.loss_type == "hinge":
        losses = (1 - cfg.beta * z).relu()
    elif cfg.loss_type == "ipo":
        losses = (z - 1 / (2 * cfg.beta)) ** 2
    else:
        margin = cfg.beta * z - (cfg.simpo_gamma if cfg.loss_type == "simpo" else 0.0)
        losses = -(1 - eps) * F.logsigmoid(margin) - eps * F.logsigmoid(-margin)
    nll = -sums[0::2].sum() / max(totals["chosen_tokens"], 1)  # nats per chosen token
    metrics = pairs.metrics(cfg.beta * rewards, seq_logps, batch, totals) | {"nll_loss": nll.detach()}
    return losses.sum() / totals["pairs"] + cfg.cpo_alpha * nll, metrics
