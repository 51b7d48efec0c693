"""Tiny random models of the families that packed rows must work for."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **HEAD}
FAMILIES = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": HEAD,
    "qwen3_moe": EXPERTS,
    "mistral": {"sliding_window": 4},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.25},
    "gemma3_text": {"final_logit_softcapping": 5.0, "sliding_window": 4, "query_pre_attn_scalar": 8, **HEAD},
}


def write(name, folder, **changes):
    """Save a random float32 model of the family to `folder`; returns its config."""
    settings = COMMON | FAMILIES[name] | changes
    config = AutoConfig.for_model(settings.pop("model_type", name), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():  # wide logits, so that errors show
            p.add_(0.1 * torch.randn(p.shape))
    model.save_pretrained(folder)
    return config
