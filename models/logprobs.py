"""The seam: a model and a batch of rows in, per-token log-probs out, float32 and aligned with `input_ids`.

Below it, rows are packed end to end (no padding is computed), the head runs only where a target follows, and the table of
(tokens x vocabulary) is made slice by slice, in the forward pass and again in the backward pass, so it never exists whole.
"""

from types import MethodType

import torch
from torch import nn

from models.attention import Rows
from models.dropout import token_keys
from models.sharding import reshard

SLICE = 2**26  # elements of one slice of (tokens x vocabulary): 256 MiB in float32


def token_logps(model, batch, byproducts=()):
    """Log-probs of the batch's targets, nats: `out["logps"]` (R, T) float32 with a graph, 0 where nothing is scored.

    batch: `input_ids` (R, T) int64, `attention_mask` (R, T) bool right-padded, `loss_mask` or the wider `score_mask` (R, T) bool,
    all on the CPU, so that shapes are known without waiting for the device; `temperature`, one number, where logits are divided by one.
    byproducts, each (R, T) float32 without a graph: `entropy` of the predicted distribution (nats), `is_top1` (1 where the target is
    the likeliest token), `mean_logits` (over the vocabulary), `log_sum_sq` (log of the sum of squared probabilities); `live_entropy` is
    the entropy with a graph.
    """
    packed, (rows, columns) = pack(batch)
    device = model.lm_head.weight.device
    packed = {k: v.to(device, non_blocking=True) for k, v in packed.items()}
    values = model.score(**packed, byproducts=tuple(byproducts), temperature=float(batch.get("temperature", 1.0)))
    if not torch.is_grad_enabled():
        reshard(model)  # the groups that stay whole for the backward pass, which does not come
    where = (rows.to(device), columns.to(device))
    blank = torch.zeros(batch["input_ids"].shape, device=device)  # (R, T)
    return {name: blank.index_put(where, v) for name, v in values.items()}


def pack(batch):
    """Rows end to end, and where their targets are: ((1, N) tensors and row bounds for the model), ((M,) rows, (M,) columns)."""
    real, scored = batch["attention_mask"], batch.get("score_mask", batch["loss_mask"])  # (R, T)
    lengths = real.sum(-1)  # (R,)
    ends = lengths.cumsum(0)  # (R,)
    rows, columns = scored.nonzero(as_tuple=True)  # (M,)
    keys = {"keys": token_keys(batch["row_keys"], real.shape[1])[real]} if "row_keys" in batch else {}  # (N,)
    packed = keys | {
        "input_ids": batch["input_ids"][real][None],  # (1, N)
        "position_ids": torch.arange(real.shape[1]).expand_as(real)[real][None],  # (1, N), from 0 in each row
        "predictors": (ends - lengths)[rows] + columns - 1,  # (M,): the shift by one, here and nowhere else
        "labels": batch["input_ids"][rows, columns],  # (M,)
        "rows": Rows(lengths.tolist()),
    }
    return packed, (rows, columns)


def add_seam(model, implementation):
    """Give the model a `score` method and a head that can return log-probs.

    The head keeps its weight and its class's behaviour; called with labels it scores inside its own forward, so its weight is whole
    there under FSDP, in the root's group and in one of its own.
    """
    head = model.get_output_embeddings()
    if head is None or type(head) is not nn.Linear or head is not getattr(model, "lm_head", None):
        raise ValueError(f"{type(model).__name__}: expected a causal language model whose head is a linear layer named lm_head")
    head.__class__ = ScoringHead
    cfg = model.config
    head.logit_scale = getattr(cfg, "logit_scale", None) or 1.0  # Cohere
    head.logit_scale *= getattr(cfg, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    head.logit_scale /= getattr(cfg, "logits_scaling", None) or 1.0  # Granite
    head.softcap = getattr(cfg, "final_logit_softcapping", None)  # Gemma
    head.score_with = {"chunked": chunked, "eager": eager}[implementation]
    model.score = MethodType(score, model)
    model.dropouts = {}  # by the name of the layer that they are of


def score(self, input_ids, position_ids, predictors, labels, rows, byproducts, temperature, keys=None):
    """The model's forward pass as the seam needs it: backbone over N packed tokens, head over M of them. Returns (M,) tensors."""
    for name, dropout in self.dropouts.items():
        dropout.expect(keys[predictors] if name == "lm_head" and keys is not None else keys)
    # use_cache and a mask would both make transformers forget that position_ids restart
    hidden = self.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False, rows=rows
    ).last_hidden_state[0]  # (N, H)
    return self.lm_head(hidden[predictors], labels, byproducts, temperature)


class ScoringHead(nn.Linear):
    """A linear head that returns logits, or the log-probs of given labels."""

    def forward(self, hidden, labels=None, byproducts=(), temperature=1.0):
        if labels is None:
            return super().forward(hidden)
        return self.score(hidden, self.weight, labels, byproducts, temperature)

    def logits(self, hidden, weight=None):
        """float32 logits (M, V)."""
        weight = self.weight if weight is None else weight
        return logits(hidden, weight, self.bias, (self.logit_scale, self.softcap, 1.0))

    def score(self, hidden, weight, labels, byproducts, temperature):
        return self.score_with(hidden, weight, self.bias, labels, (self.logit_scale, self.softcap, temperature), byproducts)


def logits(hidden, weight, bias, transform):
    """float32 logits (M, V) of hidden states (M, H); transform: (scale, softcap or None, temperature)."""
    scale, softcap, temperature = transform
    if hidden.is_cuda and hidden.dtype != torch.float32 and not torch.is_grad_enabled():
        z = torch.mm(hidden, weight.t(), out_dtype=torch.float32)  # the product's sums leave the matrix unit unrounded
    else:
        z = (hidden @ weight.t()).float()
    if bias is not None:
        z += bias
    if scale != 1.0:
        z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z if temperature == 1.0 else z / temperature


def eager(hidden, weight, bias, labels, transform, byproducts):
    """Log-probs (M,) by plain autograd, with the whole (M, V) table in memory: the reference for `chunked`."""
    z = logits(hidden, weight, bias, transform)  # (M, V)
    log_p = z.log_softmax(-1)  # (M, V)
    out = {"logps": log_p.gather(-1, labels[:, None]).sum(-1)}
    if "live_entropy" in byproducts:
        out["live_entropy"] = -(log_p.exp() * log_p).sum(-1)
    if byproducts:
        with torch.no_grad():
            z = z.detach()
            out |= byproducts_of(z, *statistics(z), labels, set(byproducts) - {"live_entropy"})
    return out


def chunked(hidden, weight, bias, labels, transform, byproducts):
    """Log-probs (M,) slice by slice, each slice recomputed in the backward pass."""
    values = Chunked.apply(hidden, weight, bias, labels, transform, byproducts)
    return dict(zip(("logps", *byproducts), values))


def statistics(z):
    """Of logits z (m, V): probabilities (m, V), log-sum-exp (m,) nats, the likeliest token (m,)."""
    top, index = z.max(-1)
    p = z.softmax(-1)  # (m, V)
    return p, top - p.gather(-1, index[:, None])[:, 0].log(), index  # the top's p is at least 1 / V, so its log is exact


def byproducts_of(z, p, lse, index, labels, names):
    """What metrics want of a slice of logits z (m, V) and its `statistics`; each (m,) float32."""
    out = {}
    for name in {"entropy", "live_entropy"} & set(names):
        out[name] = lse - torch.einsum("mv,mv->m", p, z)
    if "is_top1" in names:
        out["is_top1"] = (index == labels).float()
    if "mean_logits" in names:
        out["mean_logits"] = z.sum(-1) / z.shape[-1]
    if "log_sum_sq" in names:
        out["log_sum_sq"] = torch.einsum("mv,mv->m", p, p).log()
    return out


class Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, transform, byproducts):
        values = {name: torch.empty(len(labels), device=hidden.device) for name in ("logps", *byproducts)}  # (M,) each
        lse = torch.empty(len(labels), device=hidden.device)  # (M,)
        parts = slices(len(labels), weight.shape[0])
        # a single slice is kept for the backward pass, which would make one anyway: no more memory, and no second product
        ctx.p, keep = None, len(parts) == 1 and transform[1] is None and any(ctx.needs_input_grad)
        for part in parts:
            z = logits(hidden[part], weight, bias, transform)  # (m, V)
            p, lse[part], index = statistics(z)
            values["logps"][part] = z.gather(-1, labels[part, None])[:, 0] - lse[part]
            for name, value in byproducts_of(z, p, lse[part], index, labels[part], byproducts).items():
                values[name][part] = value
            if keep:
                ctx.p = p  # (M, V)
            del z, p  # or they would stand beside the next slice
        entropy = values.get("live_entropy")
        ctx.save_for_backward(hidden, weight, bias, labels, lse, entropy)
        ctx.transform, ctx.live = transform, byproducts.index("live_entropy") if entropy is not None else None
        ctx.mark_non_differentiable(*(values[name] for name in byproducts if name != "live_entropy"))
        return tuple(values.values())

    @staticmethod
    def backward(ctx, grad, *others):
        hidden, weight, bias, labels, lse, entropy = ctx.saved_tensors
        scale, softcap, temperature = ctx.transform
        of_entropy = None if ctx.live is None else others[ctx.live]  # (M,)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if want_hidden else None  # (M, H)
        d_weight = torch.zeros(weight.shape, device=weight.device) if want_weight else None  # (V, H) float32
        d_bias = torch.zeros(bias.shape, device=bias.device) if want_bias else None  # (V,) float32
        for part in slices(len(labels), weight.shape[0]):
            if ctx.p is not None:
                p, ctx.p, slope = ctx.p, None, None
            else:
                z = logits(hidden[part], weight, bias, ctx.transform)  # (m, V)
                slope = None if softcap is None else 1 - (z * temperature / softcap) ** 2  # of the soft cap
                p = z.sub_(lse[part, None]).exp_()
            bend = None if of_entropy is None else (torch.xlogy(p, p) + p * entropy[part, None]) * of_entropy[part, None]
            dz = p.mul_(-grad[part, None])  # d log p_y / d z_v = [v = y] - p_v
            if bend is not None:
                dz -= bend  # d H / d z_v = -p_v (log p_v + H)
            dz.scatter_add_(-1, labels[part, None], grad[part, None])
            if slope is not None:
                dz.mul_(slope)
            dz = dz.mul_(scale / temperature).to(hidden.dtype)  # (m, V)
            if want_hidden:
                d_hidden[part] = dz @ weight
            if want_weight:
                d_weight += dz.t() @ hidden[part]
            if want_bias:
                d_bias += dz.sum(0)
            z = p = dz = bend = None  # or they would stand beside the next slice
        return d_hidden, d_weight, d_bias, None, None, None


def slices(count, vocabulary):
    size = max(1, SLICE // vocabulary)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
