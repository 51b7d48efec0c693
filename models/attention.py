"""Attention over packed rows, registered with transformers by name.

All rows of a micro-batch lie end to end in one sequence of N tokens. No mask is ever built: each implementation is told where the
rows begin, so rows cannot see each other and no work is spent on pairs of tokens of different rows.
"""

import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

# torch 2.13 demands this argument for grouped heads, 2.11 does not have it
VARLEN_TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def choose(name, device, dtype):
    """The registered name for the `attn_implementation` of the config; a ValueError where this machine cannot run it."""
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(device)[0] >= 8
    if name == "auto":
        name = "varlen" if fits else "sdpa"
    if name == "varlen" and not fits:
        raise ValueError(
            f"model.attn_implementation: varlen needs a GPU of compute capability 8.0 or later and model.dtype bfloat16, got "
            f"{device.type} and {str(dtype).removeprefix('torch.')}; `sdpa` runs everywhere"
        )
    return f"packed_{name}"


def sdpa(module, query, key, value, attention_mask, scaling=None, dropout=0.0, row_lengths=None, sliding_window=None, **kwargs):
    """torch's scaled_dot_product_attention, one call a row.

    query (1, heads, N, D); key, value (1, key heads, N, D); row_lengths: tokens of each row, summing to N. Returns (1, N, heads, D).
    """
    refuse(kwargs)
    rows = []
    for q, k, v in zip(*(t.split(row_lengths, dim=2) for t in (query, key, value))):
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            near = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
            mask = near.tril().triu(1 - sliding_window)  # (T, T): token t sees t - window + 1 .. t
        options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": q.shape[1] != k.shape[1]}
        rows.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, **options))
    return torch.cat(rows, dim=2).transpose(1, 2), None


def varlen(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, **kwargs):
    """torch.nn.attention.varlen: one kernel for all rows. The same shapes as `sdpa`; `cu_seq_lens_q` (rows + 1,) int32."""
    refuse(kwargs)
    if dropout:
        raise ValueError("model.attn_implementation: varlen has no dropout; set the model's attention_dropout to 0 or take `sdpa`")
    cu, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    gqa = {"enable_gqa": True} if VARLEN_TAKES_GQA and query.shape[1] != key.shape[1] else {}
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (N, heads, D)
    return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=window, **gqa)[None], None


def refuse(kwargs):
    """Attention features that these kernels would ignore in silence."""
    for name, model in (("softcap", "Gemma 2"), ("s_aux", "gpt-oss")):
        if kwargs.get(name) is not None:
            raise ValueError(f"model.model_name_or_path: attention with `{name}` (as in {model}) is not supported over packed rows")


AttentionInterface.register("packed_sdpa", sdpa)
AttentionInterface.register("packed_varlen", varlen)
