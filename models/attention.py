"""Attention over packed rows, registered with transformers by name.

All rows of a micro-batch lie end to end in one sequence of N tokens. No mask is ever built: each implementation is told where the
rows begin, so rows cannot see each other and no work is spent on pairs of tokens of different rows.
"""

import importlib.util
import inspect
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from models.sharding import moved

# torch 2.13 demands this argument for grouped heads, 2.11 does not have it
VARLEN_TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


KERNELS = {  # name: (least and largest major compute capability, whether in 16 bits alone, module, how it is installed); fastest first
    "flash_attention_3": (9, 9, True, "flash_attn_interface", "python setup.py install in hopper/ of github.com/Dao-AILab/flash-attention"),
    "flash_attention_4": (9, 12, True, "flash_attn.cute", "pip install --pre flash-attn-4"),
    "varlen": (8, 99, True, None, None),
    "flash_attention_2": (8, 99, True, "flash_attn.flash_attn_interface", "pip install flash-attn --no-build-isolation"),
    "sdpa": (0, 99, False, None, None),
    "flex": (8, 99, False, None, None),
}


def choose(name, device, dtype):
    """The registered name for the `attn_implementation` of the config; a ValueError where this machine cannot run it."""
    if name == "auto":
        name = next(n for n in KERNELS if not lacks(n, device, dtype))
    if problem := lacks(name, device, dtype):
        raise ValueError(f"model.attn_implementation: {name} needs {problem}; `sdpa` runs everywhere")
    return registered(name)


def registered(name):
    """What transformers knows an implementation by; it would take any name with `flash` in it for one of its own."""
    return f"packed_{name.replace('flash_attention_', 'fa')}"


def lacks(name, device, dtype):
    """What this machine would need for an implementation, or None."""
    low, high, short, module, install = KERNELS[name]
    if module and not installed(module):
        return f"the package {module}: {install}"
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if not low <= major <= high or (short and dtype not in (torch.bfloat16, torch.float16)):
        models = f"{low}.0 or later" if high == 99 else f"{low}.x" if low == high else f"{low}.x to {high}.x"
        floats = " and model.dtype bfloat16" if short else ""
        return f"a GPU of compute capability {models}{floats}, got {device.type} and {str(dtype).removeprefix('torch.')}"


def installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


class Rows:
    """Where the rows of a pack begin and end, made once a micro-batch; no layer asks the device for it.

    One object goes through the layers instead of its parts, which torch.compile would take for constants of the graph.
    """

    def __init__(self, lengths):
        """lengths: tokens of each row, a list that sums to N."""
        self.lengths, self.longest, self.masks = lengths, max(lengths), {}
        self.bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()  # (R + 1,)

    def to(self, device):
        self.bounds = moved(self.bounds, torch.device(device))
        return self


@torch.compiler.disable  # what is traced would be of these row lengths alone
def sdpa(module, query, key, value, attention_mask, rows, scaling=None, dropout=0.0, sliding_window=None, **kwargs):
    """torch's scaled_dot_product_attention, one call a row.

    query (1, heads, N, D); key, value (1, key heads, N, D). Returns (1, N, heads, D).
    """
    refuse(kwargs)
    parts = []
    for q, k, v in zip(*(t.split(rows.lengths, dim=2) for t in (query, key, value))):
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            near = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
            mask = near.tril().triu(1 - sliding_window)  # (T, T): token t sees t - window + 1 .. t
        options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": q.shape[1] != k.shape[1]}
        parts.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, **options))
    return torch.cat(parts, dim=2).transpose(1, 2), None


@torch.compiler.disable
def varlen(module, query, key, value, attention_mask, rows, scaling=None, sliding_window=None, **kwargs):
    """torch.nn.attention.varlen: one kernel for all rows. The same shapes as `sdpa`."""
    refuse(kwargs)
    cu, longest = rows.bounds, rows.longest
    gqa = {"enable_gqa": True} if VARLEN_TAKES_GQA and query.shape[1] != key.shape[1] else {}
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (N, heads, D)
    return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=window, **gqa)[None], None


@torch.compiler.disable
def flash(package, module, query, key, value, attention_mask, rows, scaling=None, sliding_window=None, **kwargs):
    """FlashAttention's own packages, versions 2 to 4. The same shapes as `sdpa`."""
    refuse(kwargs)
    open_ = None if package == "flash_attn.cute" else -1
    how = {"softmax_scale": scaling, "causal": True, "window_size": (open_, open_) if sliding_window is None else (sliding_window - 1, 0)}
    how |= {f"cu_seqlens_{side}": rows.bounds for side in "qk"} | {f"max_seqlen_{side}": rows.longest for side in "qk"}
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (N, heads, D)
    out = importlib.import_module(package).flash_attn_varlen_func(q, k, v, **how)
    return (out[0] if isinstance(out, tuple) else out)[None], None  # some versions of 3 give the log-sum-exps too


@torch.compiler.disable
def flex(module, query, key, value, attention_mask, rows, scaling=None, sliding_window=None, **kwargs):
    """torch's flex_attention, compiled, with one block mask a micro-batch. The same shapes as `sdpa`."""
    refuse(kwargs)
    attend, make_mask = flex_parts()
    n = query.shape[2]
    if sliding_window not in rows.masks:
        row = torch.searchsorted(rows.bounds, torch.arange(n, device=query.device), right=True)  # (N,)

        def sees(b, h, i, j):
            return (row[i] == row[j]) & (j <= i) & (j > i - (sliding_window or n))

        rows.masks[sliding_window] = make_mask(sees, None, None, n, n, device=query.device)
    out = attend(query, key, value, block_mask=rows.masks[sliding_window], scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2), None


@cache
def flex_parts():
    return torch.compile(flex_attention), torch.compile(create_block_mask)  # uncompiled, both would make (N, N) tables


def refuse(kwargs):
    """Attention features that these kernels would ignore in silence."""
    if kwargs.get("dropout"):
        raise ValueError("model.attn_implementation: only `sdpa` has dropout; set the model's attention_dropout to 0 or take it")
    for name, model in (("softcap", "Gemma 2"), ("s_aux", "gpt-oss")):
        if kwargs.get(name) is not None:
            raise ValueError(f"model.model_name_or_path: attention with `{name}` (as in {model}) is not supported over packed rows")


AttentionInterface.register("packed_sdpa", sdpa)
AttentionInterface.register("packed_varlen", varlen)
AttentionInterface.register("packed_flex", flex)
for version in "234":
    AttentionInterface.register(registered(f"flash_attention_{version}"), partial(flash, KERNELS[f"flash_attention_{version}"][3]))
