"""Answers by the model being trained."""

from contextlib import contextmanager

import torch

from models.sharding import gathered


@torch.no_grad()
def greedy(model, tokenizer, prompts, max_new_tokens, batch_size=128):
    """Greedy continuations of `prompts` (lists of token ids), each a list of ids that ends with the end token or at the limit.

    Ranks may call it with different prompts, and different numbers of them, between collective operations.
    """
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    answers = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # rows of one batch are of like length
    with gathered(model), masked_attention(model):
        device = model.get_input_embeddings().weight.device
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in part)
            ids = torch.full((len(part), width), pad)  # (R, T), padded on the left
            mask = torch.zeros_like(ids)  # (R, T)
            for row, i in enumerate(part):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=stops,
                pad_token_id=pad,
                synced_gpus=False,  # whole weights are here: no rank waits for another
            )[:, width:].tolist()
            for i, answer in zip(part, out):
                ends = [k for k, token in enumerate(answer) if token in stops]
                answers[i] = answer[: ends[0] + 1] if ends else answer
    return answers


def stop_ids(model, tokenizer):
    """Every token that ends an answer: the tokenizer's, and those of the model's generation config."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    ids = [i for i in (tokenizer.eos_token_id, *own) if i is not None]
    if not ids:
        raise ValueError("model.model_name_or_path: the tokenizer has no eos_token, so a generated answer could not end")
    return list(dict.fromkeys(ids))


@contextmanager
def masked_attention(model):
    """Attention with masks and a cache, which packed attention does not have."""
    packed = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = packed
