"""The seam: a model and a batch of rows in, per-token log-probs out, float32 and aligned with `input_ids`.

Below it, rows are packed end to end (no padding is computed), the head runs only where a target follows, and the table of
(tokens x vocabulary) is made slice by slice, so in float32 it never exists whole.
"""

from types import MethodType

import torch
from torch import nn

from models.attention import Rows
from models.dropout import token_keys
from models.sharding import moved, reshard

SLICE = {"cpu": 2**26, "cuda": 2**28, "meta": 2**26}  # elements of one slice of (tokens x vocabulary), 4 bytes each
KEPT = {"cpu": 2**28, "cuda": 2**32, "meta": 0}  # bytes of such a table that may wait for the backward pass


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
    packed = {k: v.to(device) if isinstance(v, Rows) else moved(v, device) for k, v in packed.items()}
    values = model.score(**packed, byproducts=tuple(byproducts), temperature=float(batch.get("temperature", 1.0)))
    if not torch.is_grad_enabled():
        reshard(model)  # the groups that stay whole for the backward pass, which does not come
    where = (moved(rows, device), moved(columns, device))
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
    """Log-probs (M,) slice by slice; what the backward pass needs of a slice is kept where it is small, or made again."""
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
    if "entropy" in names:
        out["entropy"] = lse - torch.einsum("mv,mv->m", p, z)
    if "is_top1" in names:
        out["is_top1"] = (index == labels).float()
    if "mean_logits" in names:
        out["mean_logits"] = z.sum(-1) / z.shape[-1]
    if "log_sum_sq" in names:
        out["log_sum_sq"] = torch.einsum("mv,mv->m", p, p).log()
    return out


def read(z, labels, out, rest):
    """Fill `out`, {name: (m,)} with "lse", "logps" and byproducts, from logits z (m, V); rest, (m, V) or None: [v = y] - p_v."""
    if z.is_cuda:
        return head_kernels().read(z, labels, out, rest)
    p, lse, index = statistics(z)
    found = {"lse": lse, "logps": z.gather(-1, labels[:, None])[:, 0] - lse} | byproducts_of(z, p, lse, index, labels, out)
    for name, value in out.items():
        value.copy_(found[name])
    if rest is not None:
        one = torch.ones(1, 1, dtype=p.dtype, device=p.device).expand(len(p), 1)
        rest.copy_(p.neg_().scatter_add_(-1, labels[:, None], one))


def slope(z, labels, lse, grad, entropy, of_entropy, transform, dtype):
    """The gradient in the head's products (m, V), in `dtype`, of upstream gradients of log-probs and, if not None, of entropies (m,)."""
    scale, softcap, temperature = transform
    if z.is_cuda and softcap is None:
        return head_kernels().slope(z, labels, lse, grad, entropy, of_entropy, scale / temperature, dtype)
    cap = None if softcap is None else 1 - (z * temperature / softcap) ** 2  # slope of the soft cap
    p = z.sub_(lse[:, None]).exp_()
    bend = None if of_entropy is None else (torch.xlogy(p, p) + p * entropy[:, None]) * of_entropy[:, None]
    dz = p.mul_(-grad[:, None])  # d log p_y / d z_v = [v = y] - p_v
    if bend is not None:
        dz -= bend  # d H / d z_v = -p_v (log p_v + H)
    dz.scatter_add_(-1, labels[:, None], grad[:, None])
    if cap is not None:
        dz.mul_(cap)
    return dz.mul_(scale / temperature).to(dtype)


def head_kernels():
    from models import head_kernels  # Triton comes with torch for GPUs alone

    return head_kernels


class Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, transform, byproducts):
        m, vocabulary = len(labels), weight.shape[0]
        names = {"logps", "lse", *(name.removeprefix("live_") for name in byproducts)}
        out = {name: torch.empty(m, device=hidden.device) for name in names}  # (M,) each
        keep = any(ctx.needs_input_grad) and keeps(m, weight, transform, byproducts, hidden.device)
        ctx.rest = hidden.new_empty(m, vocabulary) if keep else None
        for part in slices(m, vocabulary, hidden.device):
            z = logits(hidden[part], weight, bias, transform)  # (m, V)
            read(z, labels[part], {name: value[part] for name, value in out.items()}, ctx.rest[part] if keep else None)
            del z  # or it would stand beside the next slice
        live = "live_entropy" in byproducts
        values = {name: out["entropy"].clone() if name == "live_entropy" else out[name] for name in ("logps", *byproducts)}
        ctx.save_for_backward(hidden, weight, bias, labels, out["lse"], out["entropy"] if live else None)
        ctx.transform, ctx.live = transform, byproducts.index("live_entropy") if live else None
        ctx.mark_non_differentiable(*(values[name] for name in byproducts if name != "live_entropy"))
        return tuple(values.values())

    @staticmethod
    def backward(ctx, grad, *others):
        hidden, weight, bias, labels, lse, entropy = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        if ctx.rest is not None:
            rest, ctx.rest = ctx.rest, None  # (M, V)
            grad = (grad * (ctx.transform[0] / ctx.transform[2]))[:, None]  # (M, 1)
            d_hidden = ((rest @ weight) * grad).to(hidden.dtype) if want_hidden else None
            d_weight = rest.t() @ (hidden * grad).to(hidden.dtype) if want_weight else None
            return d_hidden, d_weight, (rest.t() @ grad.to(rest.dtype)).float()[:, 0] if want_bias else None, None, None, None
        of_entropy = None if ctx.live is None else others[ctx.live]  # (M,)
        d_hidden = torch.empty_like(hidden) if want_hidden else None  # (M, H)
        d_weight = torch.zeros(weight.shape, device=weight.device) if want_weight else None  # (V, H) float32
        d_bias = torch.zeros(bias.shape, device=bias.device) if want_bias else None  # (V,) float32
        for part in slices(len(labels), weight.shape[0], hidden.device):
            z = logits(hidden[part], weight, bias, ctx.transform)  # (m, V)
            of = (None, None) if of_entropy is None else (entropy[part], of_entropy[part])
            dz = slope(z, labels[part], lse[part], grad[part], *of, ctx.transform, hidden.dtype)  # (m, V)
            if want_hidden:
                d_hidden[part] = dz @ weight
            if want_weight:
                d_weight += dz.t() @ hidden[part]
            if want_bias:
                d_bias += dz.sum(0)
            z = dz = None  # or they would stand beside the next slice
        return d_hidden, d_weight, d_bias, None, None, None


def keeps(count, weight, transform, byproducts, device):
    """Whether [v = y] - p_v of all `count` targets stays in memory, in 16 bits under bfloat16: no second product with the head then."""
    plain = transform[1] is None and "live_entropy" not in byproducts
    return plain and count * weight.numel() // weight.shape[1] * weight.itemsize <= KEPT[device.type]


def slices(count, vocabulary, device):
    size = max(1, SLICE[device.type] // vocabulary)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
