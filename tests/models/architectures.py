"""The real shapes of the models that recipes name, as their config.json files give them."""

LLAMA = {
    "model_type": "llama",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
QWEN = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "dtype": "bfloat16"}
GEMMA = {
    "model_type": "gemma3_text",
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "sliding_window": 512,
    "dtype": "bfloat16",
}
SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def shape(base, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, **more):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return base | dict(zip(names, (hidden_size, intermediate_size, num_hidden_layers, num_attention_heads))) | more


SHAPES = {
    "data/SmolLM2-135M-Instruct": SMOLLM2_135M,
    "runs/smollm2_sft_gsm8k/final": SMOLLM2_135M,
    "Qwen/Qwen3-0.6B": shape(QWEN, 1024, 3072, 28, 16, tie_word_embeddings=True),
    "Qwen/Qwen3-0.6B-Base": shape(QWEN, 1024, 3072, 28, 16, tie_word_embeddings=True),
    "Qwen/Qwen3-1.7B": shape(QWEN, 2048, 6144, 28, 16, tie_word_embeddings=True),
    "Qwen/Qwen3-1.7B-Base": shape(QWEN, 2048, 6144, 28, 16, tie_word_embeddings=True),
    "Qwen/Qwen3-4B": shape(QWEN, 2560, 9728, 36, 32, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": shape(QWEN, 4096, 12288, 36, 32, tie_word_embeddings=False),
    "Qwen/Qwen3-8B-Base": shape(QWEN, 4096, 12288, 36, 32, tie_word_embeddings=False),
    "Qwen/Qwen3-14B": shape(QWEN, 5120, 17408, 40, 40, tie_word_embeddings=False),
    "Qwen/Qwen3-32B": shape(QWEN, 5120, 25600, 64, 64, tie_word_embeddings=False),
    "meta-llama/Llama-3.2-1B-Instruct": shape(LLAMA, 2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B-Instruct": shape(LLAMA, 3072, 8192, 28, 24, tie_word_embeddings=True),
    "meta-llama/Llama-3.1-8B-Instruct": shape(LLAMA, 4096, 14336, 32, 32),
    "meta-llama/Llama-3.3-70B-Instruct": shape(LLAMA, 8192, 28672, 80, 64),
    "mistralai/Mistral-7B-Instruct-v0.3": shape(LLAMA, 4096, 14336, 32, 32, model_type="mistral", vocab_size=32768, sliding_window=None),
    "google/gemma-3-270m-it": shape(GEMMA, 640, 2048, 18, 4),
    "google/gemma-3-1b-it": shape(GEMMA, 1152, 6912, 26, 4),
}
SIZES = {  # parameters, as the models' pages say
    "data/SmolLM2-135M-Instruct": 0.1345e9,
    "Qwen/Qwen3-0.6B": 0.596e9,
    "Qwen/Qwen3-1.7B": 1.72e9,
    "Qwen/Qwen3-1.7B-Base": 1.72e9,
    "Qwen/Qwen3-4B": 4.02e9,
    "Qwen/Qwen3-8B": 8.19e9,
    "Qwen/Qwen3-8B-Base": 8.19e9,
    "Qwen/Qwen3-14B": 14.77e9,
    "Qwen/Qwen3-32B": 32.76e9,
    "meta-llama/Llama-3.2-1B-Instruct": 1.236e9,
    "meta-llama/Llama-3.2-3B-Instruct": 3.213e9,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03e9,
    "meta-llama/Llama-3.3-70B-Instruct": 70.55e9,
    "mistralai/Mistral-7B-Instruct-v0.3": 7.248e9,
    "google/gemma-3-270m-it": 0.268e9,
    "google/gemma-3-1b-it": 1.0e9,
}
