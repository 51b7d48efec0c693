"""Triton kernels of the scoring head: what `logprobs.chunked` wants of a slice of logits, in one pass over it instead of ten."""

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def read_row(z, labels, lse, logps, entropy, top, mean, sum_sq, rest, vocabulary, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """One row of logits: the sums of its softmax, online, and with KEEP, what the gradient needs of it."""
    row = tl.program_id(0).to(tl.int64)
    z += row * vocabulary
    label = tl.load(labels + row)
    high, total, weighed, squares, plain = -float("inf"), 0.0, 0.0, 0.0, 0.0
    likeliest = 0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        x = tl.load(z + at, mask=inside, other=-float("inf"))
        finite = tl.where(inside, x, 0.0)
        most = tl.max(x, 0)
        if most > high:
            likeliest = start + tl.argmax(x, 0)
        higher = tl.maximum(high, most)
        shrink, e = tl.exp(high - higher), tl.exp(x - higher)
        total = total * shrink + tl.sum(e, 0)
        weighed = weighed * shrink + tl.sum(e * finite, 0)
        squares = squares * shrink * shrink + tl.sum(e * e, 0)
        plain += tl.sum(finite, 0)
        high = higher
    sums = high + tl.log(total)
    tl.store(lse + row, sums)
    tl.store(logps + row, tl.load(z + label) - sums)
    tl.store(entropy + row, sums - weighed / total)
    tl.store(top + row, (likeliest == label).to(tl.float32))
    tl.store(mean + row, plain / vocabulary)
    tl.store(sum_sq + row, tl.log(squares) - 2 * tl.log(total))
    if KEEP:
        rest += row * vocabulary
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(z + at, mask=at < vocabulary, other=0.0)
            tl.store(rest + at, (at == label).to(tl.float32) - tl.exp(x - sums), mask=at < vocabulary)


@triton.jit
def slope_of_row(z, labels, lse, grad, entropy, of_entropy, dz, vocabulary, scale, LIVE: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient in a row of logits, in the dtype of `dz`, times `scale`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocabulary
    sums = tl.load(lse + row)
    x = tl.load(z + row * vocabulary + at, mask=inside, other=0.0)
    p = tl.exp(x - sums)
    slope = tl.load(grad + row) * ((at == tl.load(labels + row)).to(tl.float32) - p)
    if LIVE:
        slope -= tl.load(of_entropy + row) * p * (x - sums + tl.load(entropy + row))
    tl.store(dz + row * vocabulary + at, slope * scale, mask=inside)


def read(z, labels, out, rest=None):
    """Fill `out`, {name: (m,)} with "lse", "logps" and any of the byproducts, from logits z (m, V) float32; rest (m, V): [v = y] - p_v."""
    spare = {
        name: out[name] if name in out else torch.empty_like(out["lse"]) for name in ("entropy", "is_top1", "mean_logits", "log_sum_sq")
    }
    with torch.cuda.device_of(z):
        read_row[len(z),](
            z, labels, out["lse"], out["logps"], *spare.values(), rest, z.shape[1], KEEP=rest is not None, BLOCK=BLOCK, num_warps=8
        )


def slope(z, labels, lse, grad, entropy, of_entropy, scale, dtype):
    """d loss / d z (m, V) in `dtype`, times `scale`, of upstream gradients grad (m,) and, if not None, of_entropy (m,)."""
    dz = torch.empty(z.shape, dtype=dtype, device=z.device)
    of_entropy = None if of_entropy is None else of_entropy.contiguous()
    with torch.cuda.device_of(z):
        slope_of_row[len(z), triton.cdiv(z.shape[1], BLOCK)](
            z,
            labels,
            lse,
            grad.contiguous(),
            entropy,
            of_entropy,
            dz,
            z.shape[1],
            scale,
            LIVE=of_entropy is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return dz
