"""Group Relative Policy Optimization, https://arxiv.org/abs/2402.03300, equation 3, and the losses that grew from it.

Several completions of one prompt make a group; what a completion's reward has over its group's mean is its advantage. With ratio =
pi / pi_old, each function below takes `Tokens` and gives one loss per token (or per row, where the ratio is the sequence's):
grpo, bnpo, dr_grpo, dapo, luspo share the clipped surrogate and differ in what they divide by (see `denominators`).

Departs from the paper, as TRL does: `dapo` is the default, without a KL term; the KL term, where there is one, is weighted by the ratio
(`use_bias_correction_kl`).
Departs from TRL: what a loss divides by, the entropy quantile and the entropy bonus are of the whole optimizer step, never of a
micro-batch, a rank or an expected number of tokens (so bnpo equals dapo); cispo's `epsilon_high` is the cap of the ratio, as there, but 5
by default; metrics that are extremes over rows (clip_ratio/low_min, high_max) are left out.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

ROWS = "prompts"
REFERENCE = True  # where beta is not 0
SUMMARY_OF = ("entropy",)


class Tokens(NamedTuple):
    """R rows of T tokens; only those of `mask` count."""

    logps: torch.Tensor  # (R, T) nats, of the policy
    logratio: torch.Tensor  # (R, T) nats, policy over the policy that wrote the tokens
    ratio: torch.Tensor  # (R, T), or (R, 1) at the sequence level
    advantages: torch.Tensor  # (R, 1)
    mask: torch.Tensor  # (R, T)
    correction: torch.Tensor | float  # (R, T) or (R, 1): old policy over a foreign sampler; 1.0 where the policy sampled itself


def clipped(x, cfg):
    """GRPO equation 3, PPO's surrogate; `delta` also bounds the ratio from above (INTELLECT-2, https://arxiv.org/abs/2505.07291)."""
    low, high = cfg.epsilon, cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high
    bounded = x.ratio if cfg.delta is None else x.ratio.clamp(max=cfg.delta)
    return -torch.min(bounded * x.advantages, x.ratio.clamp(1 - low, 1 + high) * x.advantages)


def cispo(x, cfg):
    """CISPO (MiniMax-M1, https://arxiv.org/abs/2506.13585): the capped ratio weighs the policy gradient of every token."""
    return -x.ratio.clamp(max=cfg.cispo_cap).detach() * x.advantages * x.logps


def sapo(x, cfg):
    """SAPO, https://arxiv.org/abs/2511.20347: a sigmoid gate in place of the clip."""
    temperature = torch.where(x.advantages > 0, cfg.sapo_temperature_pos, cfg.sapo_temperature_neg)  # (R, 1)
    return -(temperature * (x.ratio - 1)).sigmoid() * 4 / temperature * x.advantages


def vespo(x, cfg):
    """VESPO, https://arxiv.org/abs/2602.10693: the sequence's ratio W weighs it by phi = e^lambda W^k e^(-lambda W), held constant."""
    lowest, good = math.log(1e-8), x.advantages >= 0
    with torch.no_grad():
        log_w = (x.logratio.clamp(-20, 20) * x.mask).sum(-1, keepdim=True)  # (R, 1)
        if isinstance(x.correction, torch.Tensor):
            log_w = log_w + x.correction.log().clamp(lowest, 20).sum(-1, keepdim=True)
        log_w = log_w.clamp(lowest, 20)
        k = torch.where(good, cfg.vespo_k_pos, cfg.vespo_k_neg)
        rate = torch.where(good, cfg.vespo_lambda_pos, cfg.vespo_lambda_neg).clamp(min=1e-4)
        phi = (rate + k * log_w - rate * log_w.exp()).exp()  # (R, 1)
    return -phi * x.advantages * x.logps


LOSSES = dict.fromkeys(("dapo", "grpo", "bnpo", "dr_grpo", "luspo"), clipped) | {"cispo": cispo, "sapo": sapo, "vespo": vespo}
LossType = Literal[tuple(LOSSES)]
Correction = Literal["sequence_mask", "sequence_truncate", "token_mask", "token_truncate"]


@dataclass(frozen=True)
class Config:
    reward_funcs: list[str] = field(default_factory=lambda: ["accuracy"])
    """Functions of algorithms/rewards.py, by name, or one of your own as `./rewards.py:name`."""
    reward_weights: list[float] | None = None
    """One weight per reward function; null: ones."""
    num_generations: int = 8
    """Completions of each prompt."""
    max_completion_length: int = 512
    """Tokens at which a completion is cut off."""
    temperature: float = 1.0
    """Of sampling; log-probs are the policy's at this temperature."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0: all."""
    min_p: float = 0.0
    """Sample among tokens at least this likely relative to the likeliest."""
    steps_per_generation: int = 1
    """Optimizer steps that share out one rollout."""
    num_iterations: int = 1
    """Passes over one rollout."""
    loss_type: LossType = "dapo"
    """One of the losses of algorithms/grpo.py."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What an advantage is divided by: its group's standard deviation, the rollout's, or nothing (Dr. GRPO)."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """How several rewards become one advantage; normalize_then_sum: GDPO, https://arxiv.org/abs/2601.05242."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """sequence: one ratio per completion, GSPO, https://arxiv.org/abs/2507.18071, equation 7."""
    epsilon: float = 0.2
    """The ratio is clipped from below at 1 - epsilon."""
    epsilon_high: float | None = None
    """The ratio is clipped from above at 1 + epsilon_high (null: epsilon; DAPO: 0.28); for cispo the cap itself (null: 5)."""
    delta: float | None = None
    """Two-sided clipping: the ratio of tokens with a negative advantage is bounded by this; above 1 + epsilon_high."""
    beta: float = 0.0
    """Weight of the KL divergence from the reference; 0: no reference is kept."""
    use_bias_correction_kl: bool = True
    """Weigh the KL estimate by the ratio (DeepSeek-V3.2, https://arxiv.org/abs/2512.02556)."""
    top_entropy_quantile: float = 1.0
    """Share of tokens, those of highest entropy, that the policy's loss acts on, https://arxiv.org/abs/2506.01939."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    off_policy_mask_threshold: float | None = None
    """Leave out completions with a negative advantage and a mean log-ratio, old over new, above this, nats (DeepSeek-V3.2)."""
    mask_truncated_completions: bool = False
    """Completions that were cut off train nothing."""
    dynamic_sampling: int = 0
    """Draw up to this many more rounds of prompts to replace groups whose rewards are all equal (DAPO, equation 11); 0: keep them."""
    sapo_temperature_pos: float = 1.0
    """sapo's temperature for advantages above 0."""
    sapo_temperature_neg: float = 1.05
    """sapo's temperature for the others."""
    vespo_k_pos: float = 2.0
    """vespo's k for advantages from 0 up."""
    vespo_lambda_pos: float = 3.0
    """vespo's lambda for advantages from 0 up."""
    vespo_k_neg: float = 3.0
    """vespo's k for the others."""
    vespo_lambda_neg: float = 2.0
    """vespo's lambda for the others."""
    vllm_importance_sampling_correction: bool = True
    """Weigh the loss by old policy over sampler where another engine sampled."""
    vllm_importance_sampling_mode: Correction = "sequence_mask"
    """Of that weight: per sequence or token; truncate: clamped into its bounds; mask: 0 outside of them."""
    vllm_importance_sampling_clip_min: float | None = None
    """Lower bound of that weight."""
    vllm_importance_sampling_clip_max: float | None = 3.0
    """Upper bound of that weight."""

    @property
    def cispo_cap(self):
        return 5.0 if self.epsilon_high is None else self.epsilon_high

    def __post_init__(self):
        def need(name, ok, expected):
            if not ok:
                raise ValueError(f"grpo.{name}: got {getattr(self, name)}, expected {expected}")

        need("reward_funcs", self.reward_funcs and len(set(self.reward_funcs)) == len(self.reward_funcs), "different reward functions")
        weights = self.reward_weights
        need("reward_weights", weights is None or len(weights) == len(self.reward_funcs), f"{len(self.reward_funcs)} weights, one each")
        need("reward_weights", all(map(math.isfinite, weights or [])), "finite numbers")
        need("num_generations", self.num_generations >= 2, "2 or more: an advantage is relative to the group")
        for name in ("max_completion_length", "steps_per_generation", "num_iterations"):
            need(name, getattr(self, name) >= 1, "a number from 1 up")
        for name in ("top_k", "dynamic_sampling"):
            need(name, getattr(self, name) >= 0, "a number from 0 up")
        for name in ("temperature", "sapo_temperature_pos", "sapo_temperature_neg"):
            need(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in ("top_p", "top_entropy_quantile"):
            need(name, 0 < getattr(self, name) <= 1, "a number above 0 and up to 1")
        need("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1")
        need("epsilon", 0 <= self.epsilon < 1, "a number from 0 up to, not including, 1")
        for name in ("beta", "entropy_coef", "epsilon_high", "off_policy_mask_threshold"):
            need(name, 0 <= (getattr(self, name) or 0.0) < math.inf, "a number from 0 up")
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        need("delta", self.delta is None or 1 + high < self.delta < math.inf, f"a number above 1 + epsilon_high = {1 + high}")
        need("delta", self.delta is None or LOSSES[self.loss_type] is clipped, f"null, as {self.loss_type} does not clip")
        sequence = self.importance_sampling_level == "sequence"
        need("importance_sampling_level", not (sequence and self.loss_type == "vespo"), "token, as vespo sums over the sequence itself")
        masked = self.vllm_importance_sampling_mode.startswith("sequence") and self.loss_type == "vespo"
        need(
            "vllm_importance_sampling_mode",
            not masked or not self.vllm_importance_sampling_correction,
            "token_mask or token_truncate for vespo",
        )
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        need(
            "vllm_importance_sampling_clip_min",
            low is None or 0 <= low < (math.inf if high is None else high),
            "null, or below the upper bound",
        )
        need("vllm_importance_sampling_clip_max", high is None or 0 < high < math.inf, "null, or a number above 0")


def byproducts(cfg):
    return ("live_entropy",) if cfg.entropy_coef else ("entropy",)


def counts(batch):
    tokens = batch["loss_mask"].sum(-1)  # (R,)
    return {"rows": len(tokens), "tokens": tokens.sum()}


def denominators(mask, totals, cfg):
    """(R, 1): what each row's token losses are divided by. grpo and sapo give rows equal weight, luspo by length, the others tokens."""
    rows, tokens = totals["rows"], max(totals["tokens"], 1)
    if cfg.loss_type in ("grpo", "sapo"):
        return rows * mask.sum(-1, keepdim=True).clamp(min=1)  # GRPO equation 3
    if cfg.loss_type == "dr_grpo":
        return torch.full_like(mask[:, :1], rows * cfg.max_completion_length, dtype=torch.float32)  # https://arxiv.org/abs/2503.20783
    if cfg.loss_type == "luspo":
        return torch.full_like(mask[:, :1], rows, dtype=torch.float32)  # LUSPO, https://arxiv.org/abs/2602.05261
    return torch.full_like(mask[:, :1], tokens, dtype=torch.float32)  # DAPO, https://arxiv.org/abs/2503.14476, equation 8


def loss(logps, batch, totals, cfg):
    """This micro-batch's share of the step's loss and metrics.

    logps: (R, T) float32, nats; batch: `loss_mask` (R, T), `advantages` (R,), `old_logps` (R, T) unless the step is the first after its
    rollout (then old = new), `sampling_logps` (R, T) as the sampler gave them, `ref_logps` (R, T) where beta is not 0.
    Worked by hand: a token with advantage 2 whose ratio is 1.5 loses -min(1.5 * 2, 1.2 * 2) = -2.4, with advantage -2 it loses 3.
    """
    mask, n = batch["loss_mask"], batch["loss_mask"].sum(-1, keepdim=True).clamp(min=1)  # (R, T), (R, 1)
    old = batch.get("old_logps", logps.detach())
    advantages = batch["advantages"][:, None].to(logps.dtype)  # (R, 1)
    logratio = logps - old
    ratio = logratio.exp() if cfg.importance_sampling_level == "token" else ((logratio * mask).sum(-1, keepdim=True) / n).exp()
    x = Tokens(logps, logratio, ratio, advantages, mask, correction(old, batch, cfg))
    losses = LOSSES[cfg.loss_type](x, cfg)  # (R, T) or (R, 1)
    if cfg.off_policy_mask_threshold is not None:
        written = batch["sampling_logps"] if "foreign_sampler" in batch else old
        drift = ((written - logps.detach()) * mask).sum(-1, keepdim=True) / n  # (R, 1)
        losses = losses * ((advantages >= 0) | (drift <= cfg.off_policy_mask_threshold))
    entropy = batch["live_entropy"] if cfg.entropy_coef else batch["entropy"]  # (R, T)
    lively = entropy >= batch["entropy_threshold"][:, None] if cfg.top_entropy_quantile < 1 else torch.ones_like(mask)  # (R, T)
    losses = losses * lively
    if cfg.loss_type != "vespo":
        losses = losses * x.correction
    metrics = measured(x, batch, entropy.detach(), totals, cfg)
    if cfg.beta:
        behind = batch["ref_logps"] - logps
        kl = behind.exp() - behind - 1  # (R, T) k3, http://joschu.net/blog/kl-approx.html
        kl = kl * ratio if cfg.use_bias_correction_kl else kl
        losses = losses + cfg.beta * kl
        metrics["kl"] = (kl.detach() * mask).sum() / max(totals["tokens"], 1)
    value = (losses * mask / denominators(mask, totals, cfg)).sum()
    if cfg.entropy_coef:
        among = batch["lively_tokens"][0] if cfg.top_entropy_quantile < 1 else totals["tokens"]
        metrics["policy_loss"] = value.detach()
        value = value - cfg.entropy_coef * (entropy * mask * lively).sum() / max(among, 1)
    return value, metrics


def correction(old, batch, cfg):
    """How much likelier the policy was to write each token, or row, than the foreign sampler that wrote it; 1.0 without one."""
    if "foreign_sampler" not in batch or not cfg.vllm_importance_sampling_correction:
        return 1.0
    difference = (old - batch["sampling_logps"]) * batch["loss_mask"]  # (R, T)
    level, _, kind = cfg.vllm_importance_sampling_mode.partition("_")
    ratio = (difference.sum(-1, keepdim=True) if level == "sequence" else difference).exp()
    low, high = cfg.vllm_importance_sampling_clip_min or 0.0, cfg.vllm_importance_sampling_clip_max or math.inf
    return ratio.clamp(low, high) if kind == "truncate" else ratio * ((ratio >= low) & (ratio <= high))


def measured(x, batch, entropy, totals, cfg):
    """TRL's metrics of a GRPO step, and how far the sampler's log-probs are from the trainer's."""
    rows, tokens = totals["rows"], max(totals["tokens"], 1)

    def mean(value):  # of tokens, or of rows where there is one value per row
        return (value * x.mask).sum() / tokens if value.shape[1] > 1 else value.sum() / rows

    old = batch.get("old_logps", x.logps.detach())
    metrics = {
        "entropy": mean(entropy),
        "sampling/sampling_logp_difference/mean": mean((old - batch["sampling_logps"]).abs()),
    }
    if LOSSES[cfg.loss_type] is clipped:
        high = cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high
        low_clipped = ((x.ratio < 1 - cfg.epsilon) & (x.advantages < 0)).float()
        high_clipped = ((x.ratio > 1 + high) & (x.advantages > 0)).float()
        metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"] = mean(low_clipped), mean(high_clipped)
        metrics["clip_ratio/region_mean"] = mean(low_clipped + high_clipped)
    if cfg.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = mean(((x.ratio > cfg.cispo_cap) & (x.advantages > 0)).float())
    if isinstance(x.correction, torch.Tensor):
        metrics["sampling/importance_sampling_ratio/mean"] = mean(x.correction)
    return metrics


def needs_step(cfg):
    """Whether the loss of a completion depends on the other completions of the step."""
    return cfg.top_entropy_quantile < 1


def summary(logps, batch, cfg):
    """Entropies of a row's completion (R, max_completion_length), NaN beyond it: what `spread` needs of the whole step."""
    entropy, mask = batch["entropy"], batch["loss_mask"]
    table = torch.full((len(mask), cfg.max_completion_length), math.nan)
    table[torch.arange(cfg.max_completion_length) < mask.sum(-1, keepdim=True)] = entropy[mask]
    return table


def spread(step, cfg):
    """From the entropies (B, L) of a whole step: the entropy from which a token counts, and how many do, one copy per completion."""
    known = step[~step.isnan()].float()
    threshold = torch.quantile(known, 1 - cfg.top_entropy_quantile)
    return {"entropy_threshold": threshold.expand(len(step)), "lively_tokens": (known >= threshold).sum().expand(len(step))}


def advantages(rewards, cfg):
    """(advantages (N,), which groups' rewards do not differ (N / G,) bool) of rewards (N, K); NaN where a function does not apply.

    Groups of G = num_generations rows stand together. Worked by hand: rewards 1, 0, 0, 0 of one group have mean 0.25 and standard
    deviation 0.5, so the advantages are 0.75 / 0.5001 = 1.4997 and -0.4999 three times.
    """
    weights = torch.tensor(cfg.reward_weights or [1.0] * rewards.shape[1], dtype=rewards.dtype)  # (K,)
    grouped, unknown = rewards.view(-1, cfg.num_generations, rewards.shape[1]), rewards.isnan().all(-1)  # (P, G, K), (N,)
    total = (rewards * weights).nansum(-1).masked_fill(unknown, math.nan)  # (N,)
    groups = total.view(-1, cfg.num_generations)  # (P, G)
    flat = torch.isclose(nanstd(groups, -1)[:, 0].nan_to_num(0.0), torch.zeros((), dtype=rewards.dtype))  # (P,)
    if cfg.multi_objective_aggregation == "normalize_then_sum":
        scaled = (grouped - grouped.nanmean(1, keepdim=True)) / (nanstd(grouped, 1) + 1e-4)  # (P, G, K)
        total = (scaled.view(rewards.shape) * weights).nansum(-1).masked_fill(unknown, math.nan)
        return ((total - total.nanmean()) / (nanstd(total, 0) + 1e-4)).nan_to_num(0.0), flat
    centred = groups - groups.nanmean(-1, keepdim=True)
    if cfg.scale_rewards != "none":
        centred = centred / ((nanstd(groups, -1) if cfg.scale_rewards == "group" else nanstd(total, 0)) + 1e-4)
    return centred.flatten().nan_to_num(0.0), flat


def nanstd(x, dim):
    """Standard deviation with Bessel's correction over the numbers of one dimension, which is kept; NaN where there are fewer than two."""
    count = (~x.isnan()).sum(dim, keepdim=True)
    return ((x - x.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True) / (count - 1)).sqrt().masked_fill(count < 2, math.nan)
