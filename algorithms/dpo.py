"""Direct Preference Optimization, https://arxiv.org/abs/2305.18290, equation 7, and the losses that grew from it.

With pi and ref the token sums of a response's log-probs, l = pi - ref is its log-ratio, and h = l_chosen - l_rejected the margin. Each
function below takes `Pairs` and gives one loss per pair; `loss_type` may list several, summed with `loss_weights` (MPO,
https://arxiv.org/abs/2411.10442, equation 1).

Departs from TRL:
- label_smoothing also acts on `sigmoid` (cDPO), where TRL ignores it;
- aot and aot_unpaired sort over the whole step, TRL over one micro-batch of one rank;
- `sft` divides by the chosen tokens of the whole step, TRL averages the means of micro-batches;
- `dpop` (Smaug) is not in TRL.
Departs from the papers: ipo divides log-ratios by the response's length, as TRL does after asking its authors.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from algorithms import pairs
from algorithms.pairs import counts  # noqa: F401  part of an algorithm's interface

ROWS = "pairs"
REFERENCE = True


class Pairs(NamedTuple):
    """P pairs: nats, and tokens. `scores` are f'(ratio) of the f-divergence, the log-ratios themselves for reverse_kl."""

    chosen: torch.Tensor  # (P,) log-ratios
    rejected: torch.Tensor
    chosen_scores: torch.Tensor
    rejected_scores: torch.Tensor
    chosen_length: torch.Tensor
    rejected_length: torch.Tensor
    chosen_nll: torch.Tensor  # (P,) -log-probs of the chosen response, plain sum
    margin: torch.Tensor  # (P,) pi_chosen - pi_rejected, without the reference
    partners: torch.Tensor | None  # (P, 3): see `spread`
    pairs_per_chosen_token: float  # of the step

    @property
    def delta(self):
        return self.chosen_scores - self.rejected_scores  # (P,)


def sigmoid(x, cfg):
    """DPO equation 7; with label_smoothing conservative DPO, https://ericmitchell.ai/cdpo.pdf."""
    h, eps = cfg.beta * x.delta, cfg.label_smoothing
    return -(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(-h)


def hinge(x, cfg):
    """SLiC-HF, https://arxiv.org/abs/2305.10425, as normalised by RSO, https://arxiv.org/abs/2309.06657."""
    return (1 - cfg.beta * x.delta).relu()


def ipo(x, cfg):
    """IPO, https://arxiv.org/abs/2310.12036, equation 17."""
    return (x.chosen_scores / x.chosen_length - x.rejected_scores / x.rejected_length - 1 / (2 * cfg.beta)) ** 2


def exo_pair(x, cfg):
    """EXO, https://arxiv.org/abs/2402.00856, equation 16: the reverse KL from the policy's choice to the smoothed label."""
    h, eps = cfg.beta * x.delta, cfg.label_smoothing
    return h.sigmoid() * (F.logsigmoid(h) - math.log1p(-eps)) + (-h).sigmoid() * (F.logsigmoid(-h) - math.log(eps))


def nca_pair(x, cfg):
    """NCA, https://arxiv.org/abs/2402.05369, for pairs."""
    chosen, rejected = cfg.beta * x.chosen, cfg.beta * x.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(x, cfg):
    """Robust DPO, https://arxiv.org/abs/2403.00409: unbiased under a share label_smoothing of flipped labels."""
    h, eps = cfg.beta * x.delta, cfg.label_smoothing
    return (-(1 - eps) * F.logsigmoid(h) + eps * F.logsigmoid(-h)) / (1 - 2 * eps)


def bco_pair(x, cfg):
    """BCO, https://arxiv.org/abs/2404.04656, on pairs, without its running reward shift."""
    return -F.logsigmoid(cfg.beta * x.chosen) - F.logsigmoid(-cfg.beta * x.rejected)


def sppo_hard(x, cfg):
    """SPPO, https://arxiv.org/abs/2405.00675, equation 4.7, with win probabilities 1 and 0."""
    return (x.chosen - 0.5 / cfg.beta) ** 2 + (x.rejected + 0.5 / cfg.beta) ** 2


def aot(x, cfg):
    """AOT, https://arxiv.org/abs/2406.05882: sorted policy margins against sorted reference margins."""
    return smoothed(x.margin - x.partners[:, 0], cfg)


def aot_unpaired(x, cfg):
    """AOT for unpaired data: sorted chosen log-ratios against sorted rejected ones.

    A chosen and a rejected response of equal rank make one term. Its value is counted with the chosen one, whose partner is a constant
    here; the second line adds no value, only the gradient that the same term has in the rejected response.
    """
    mirrored = smoothed(x.partners[:, 2] - x.rejected, cfg)
    return smoothed(x.chosen - x.partners[:, 1], cfg) + mirrored - mirrored.detach()


def smoothed(delta, cfg):
    h, eps = cfg.beta * delta, cfg.label_smoothing
    return -(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(-h)


def apo_zero(x, cfg):
    """APO, https://arxiv.org/abs/2408.06266, equation 7."""
    return 1 - (cfg.beta * x.chosen).sigmoid() + (cfg.beta * x.rejected).sigmoid()


def apo_down(x, cfg):
    """APO, equation 8."""
    return (cfg.beta * x.chosen).sigmoid() + 1 - (cfg.beta * (x.chosen - x.rejected)).sigmoid()


def discopop(x, cfg):
    """DiscoPOP, https://arxiv.org/abs/2406.08414, equation 5: a logistic and an exponential loss, blended by the margin."""
    h = cfg.beta * x.delta
    blend = (h / cfg.discopop_tau).sigmoid()
    return -F.logsigmoid(h) * (1 - blend) + (-h).exp() * blend


def sft(x, cfg):
    """Cross-entropy of the chosen tokens (RPO, https://arxiv.org/abs/2404.19733, equation 1, second term), to be listed with others."""
    return x.chosen_nll * x.pairs_per_chosen_token


def sigmoid_norm(x, cfg):
    """DPO on log-ratios per token, as in Tulu 3, https://arxiv.org/abs/2411.15124, equation 6."""
    return -F.logsigmoid(cfg.beta * (x.chosen_scores / x.chosen_length - x.rejected_scores / x.rejected_length))


def dpop(x, cfg):
    """DPO-Positive (Smaug), https://arxiv.org/abs/2402.13228, equation 3."""
    return -F.logsigmoid(cfg.beta * (x.chosen - x.rejected - cfg.dpop_lambda * (-x.chosen).relu()))


LOSSES = {
    f.__name__: f
    for f in (
        *(sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired),
        *(apo_zero, apo_down, discopop, sft, sigmoid_norm, dpop),
    )
}
LossType = Literal[tuple(LOSSES)]
ANY_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
SORTED = {"aot", "aot_unpaired"}
SMOOTHED = {"sigmoid", "robust", "exo_pair", *SORTED}


@dataclass(frozen=True)
class Config:
    loss_type: list[LossType] = field(default_factory=lambda: ["sigmoid"])
    """One or several of the losses of algorithms/dpo.py."""
    loss_weights: list[float] | None = None
    """One weight per loss_type; null: ones."""
    beta: float = 0.1
    """How closely the policy is held to the reference, 1/nats."""
    label_smoothing: float = 0.0
    """Share of labels taken to be flipped, below 1/2: sigmoid, robust, exo_pair, aot, aot_unpaired."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """What holds the policy to the reference, https://arxiv.org/abs/2309.16240."""
    f_alpha_divergence_coef: float = 0.5
    """The alpha of alpha_divergence."""
    ld_alpha: float | None = None
    """LD-DPO, https://arxiv.org/abs/2409.06411: weight of tokens beyond the length that both responses have; null: 1."""
    use_weighting: bool = False
    """WPO, https://arxiv.org/abs/2406.11827: weigh pairs by how likely the policy is to write them."""
    discopop_tau: float = 0.05
    """Temperature of discopop's blend."""
    dpop_lambda: float = 50.0
    """dpop's penalty on a chosen response that the policy likes less than the reference does."""

    def __post_init__(self):
        kinds = set(self.loss_type)
        if not kinds or len(kinds) < len(self.loss_type):
            raise ValueError(f"dpo.loss_type: got {self.loss_type}, expected one or more different losses")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"dpo.loss_weights: got {len(self.loss_weights)}, expected {len(self.loss_type)}, one per loss_type")
        if not all(map(math.isfinite, self.loss_weights or [])):
            raise ValueError(f"dpo.loss_weights: got {self.loss_weights}, expected finite numbers")
        for name in ("beta", "discopop_tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"dpo.{name}: got {getattr(self, name)}, expected a number above 0")
        for name in ("ld_alpha", "dpop_lambda"):
            if not 0 <= (getattr(self, name) or 0.0) < math.inf:
                raise ValueError(f"dpo.{name}: got {getattr(self, name)}, expected a number from 0 up")
        if not math.isfinite(self.f_alpha_divergence_coef):
            raise ValueError(f"dpo.f_alpha_divergence_coef: got {self.f_alpha_divergence_coef}, expected a number")
        if self.label_smoothing and not kinds & SMOOTHED:
            raise ValueError(f"dpo.label_smoothing: got {self.label_smoothing}, expected 0, as {', '.join(self.loss_type)} reads none")
        if not 0 <= self.label_smoothing < 0.5 or ("exo_pair" in kinds and self.label_smoothing == 0):
            raise ValueError(f"dpo.label_smoothing: got {self.label_smoothing}, expected 0 up to 0.5, and above 0 for exo_pair")
        if self.f_divergence_type != "reverse_kl" and (plain := sorted(kinds - ANY_DIVERGENCE)):
            raise ValueError(f"dpo.f_divergence_type: got {self.f_divergence_type}, but {plain[0]} is defined for reverse_kl alone")
        if self.use_weighting and kinds & SORTED:
            raise ValueError("dpo.use_weighting: got true, but aot compares sorted responses, which belong to no pair; set it to false")


def byproducts(cfg):
    return ("entropy", "is_top1", "mean_logits", *(("log_sum_sq",) if cfg.use_weighting else ()))


def summed(logps, batch, cfg):
    """Token sums (2P,) of per-token log-probs (2P, T), with LD-DPO's weight on tokens beyond the shorter response's length."""
    mask = batch["loss_mask"]
    if cfg.ld_alpha is None:
        return (logps * mask).sum(-1)
    shared = mask.sum(-1).view(-1, 2).amin(-1).repeat_interleave(2)  # (2P,)
    beyond = mask.cumsum(-1) > shared[:, None]  # (2P, T)
    return (logps * mask * torch.where(beyond, cfg.ld_alpha, 1.0)).sum(-1)


def scores(logratios, cfg):
    """f'(ratio) of log-ratios, f-DPO equation 6; ratios are exponentials, so alpha_divergence's is capped at e^80."""
    alpha = cfg.f_alpha_divergence_coef - 1
    if cfg.f_divergence_type == "forward_kl":
        return 1 - (-logratios).exp()
    if cfg.f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if cfg.f_divergence_type == "alpha_divergence" and abs(alpha) >= 1e-6:
        return ((alpha * logratios).clamp(max=80).exp() - 1) / alpha
    return logratios


def loss(logps, batch, totals, cfg):
    """This micro-batch's share of the step's loss and metrics.

    logps: (2P, T) float32, nats; batch: `loss_mask`, `ref_logps` (2P, T), the by-products, and `partners` (P, 3) for aot.
    Worked by hand: log-ratios +1 and -1 at beta 0.1 give sigmoid -log sigmoid(0.2) = 0.5981, hinge 0.8 and nca_pair
    0.6444 + 0.3722 + 0.3222 = 1.3388.
    """
    policy, reference = summed(logps, batch, cfg), summed(batch["ref_logps"], batch, cfg)  # (2P,)
    logratios, n = policy - reference, pairs.lengths(batch)  # (2P,)
    s = scores(logratios, cfg)
    x = Pairs(
        *(logratios[0::2], logratios[1::2], s[0::2], s[1::2], n[0::2], n[1::2]),
        chosen_nll=-(logps * batch["loss_mask"])[0::2].sum(-1),
        margin=policy[0::2] - policy[1::2],
        partners=batch.get("partners"),
        pairs_per_chosen_token=totals["pairs"] / max(totals["chosen_tokens"], 1),
    )
    losses = sum(w * LOSSES[name](x, cfg) for name, w in zip(cfg.loss_type, cfg.loss_weights or [1.0] * len(cfg.loss_type)))  # (P,)
    if cfg.use_weighting:
        aligned = (logps.detach() - batch["log_sum_sq"]) * batch["loss_mask"]  # (2P, T)
        weights = (aligned.sum(-1) / n).exp()  # (2P,) WPO equation 2
        losses = losses * weights[0::2] * weights[1::2]
    return losses.sum() / totals["pairs"], pairs.metrics(cfg.beta * logratios, policy, batch, totals)


def needs_step(cfg):
    """Whether the loss of a pair depends on the other pairs of the step."""
    return bool(SORTED & set(cfg.loss_type))


def summary(logps, batch, cfg):
    """Per pair (P, 4): log-probs of chosen and rejected, policy's and reference's; what `spread` needs of the whole step."""
    policy, reference = summed(logps, batch, cfg), summed(batch["ref_logps"], batch, cfg)  # (2P,)
    return torch.stack([policy[0::2], policy[1::2], reference[0::2], reference[1::2]], -1)


def spread(step, cfg):
    """From the summaries (B, 4) of a whole step, what each pair is compared with: {"partners": (B, 3)}.

    Columns, each the value of equal rank: of its policy margin among reference margins; of its chosen log-ratio among the rejected; of its
    rejected log-ratio among the chosen.
    """
    chosen, rejected, ref_chosen, ref_rejected = step.unbind(-1)  # (B,)
    lc, lr = chosen - ref_chosen, rejected - ref_rejected
    matched = [(chosen - rejected, ref_chosen - ref_rejected), (lc, lr), (lr, lc)]
    return {"partners": torch.stack([other.sort().values[mine.argsort().argsort()] for mine, other in matched], -1)}
