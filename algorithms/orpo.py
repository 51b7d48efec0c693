"""Odds Ratio Preference Optimization, https://arxiv.org/abs/2403.07691, equations 4 to 7: cross-entropy plus a preference for the odds.

Departs from the paper: nothing; beta is its lambda. The cross-entropy covers prompt and chosen response, as TRL's.
Departs from TRL: both denominators, pairs and tokens, are the whole step's, where TRL averages means of micro-batches; rows are tokenised
as DPO's, where TRL puts a first and an end token around a template's text and looks back one token at most for the end of the prompt.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from algorithms import pairs

ROWS = "pairs"
REFERENCE = False
SCORES_PROMPT = True  # of chosen rows, for the cross-entropy


@dataclass(frozen=True)
class Config:
    beta: float = 0.1
    """Weight of the odds ratio's loss, the paper's lambda."""

    def __post_init__(self):
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"orpo.beta: got {self.beta}, expected a number from 0 up")


def byproducts(cfg):
    return ("entropy", "is_top1", "mean_logits")


def counts(batch):
    return pairs.counts(batch) | {"nll_tokens": batch["score_mask"][0::2].sum()}


def log1mexp(x):
    """log(1 - exp(x)) for x < 0, by whichever form keeps its digits; constant from -1e-7 up, where float32 takes exp(x) for 1."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def loss(logps, batch, totals, cfg):
    """This micro-batch's share of the step's loss and metrics. logps: (2P, T) float32, nats, prompts of chosen rows included.

    Worked by hand: mean probabilities 1/2 and 1/4 have odds 1 and 1/3, so the log odds ratio is ln 3 and its loss
    -log sigmoid(ln 3) = ln(4/3) = 0.2877, times beta, beside the cross-entropy.
    """
    mask = batch["loss_mask"]
    mean_logps = (logps * mask).sum(-1) / pairs.lengths(batch)  # (2P,)
    mean_logps = mean_logps.where(mask.any(-1), -1.0)  # a row without tokens has no odds; any finite value will do, it weighs nothing
    log_odds = mean_logps - log1mexp(mean_logps)  # (2P,)
    log_odds_ratio = log_odds[0::2] - log_odds[1::2]  # (P,)
    preference = F.logsigmoid(log_odds_ratio)  # (P,)
    nll = -(logps * batch["score_mask"])[0::2].sum() / max(totals["nll_tokens"], 1)
    metrics = pairs.metrics(cfg.beta * mean_logps, mean_logps, batch, totals) | {
        "nll_loss": nll.detach(),
        "log_odds_ratio": preference.detach().sum() / totals["pairs"],
        "log_odds_chosen": log_odds_ratio.detach().sum() / totals["pairs"],
    }
    return nll - cfg.beta * preference.sum() / totals["pairs"], metrics
