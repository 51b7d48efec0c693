"""The embedded default: a model, a tokenizer and a task, all made in place, so that the first run needs no download.

The task: the answer gives letters reversed, sorted or rotated, as the instruction asks. A model of about a million weights learns it
within a minute or two on a CPU, and held-out words measure whether it has learned the rule. Every third answer to learn from is in
capitals, so that these are something which preferences can make likelier: what a model never says they cannot teach it.
"""

import os
import random
import shutil
from pathlib import Path

import torch.distributed as dist
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

LETTERS = "abcdefghijklmnop"
TASKS = {
    "Reverse": lambda word: word[::-1],
    "Sort": lambda word: "".join(sorted(word)),
    "Rotate": lambda word: word[1:] + word[:1],
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|pad|>"]
ROWS = {"letters": {"train": 12000, "test": 200}, "capitals": {"train": 4000, "test": 200}}


def known(name, names, what):
    if name not in names:
        raise ValueError(f"builtin:{name}: there is no such {what}; there is {', '.join(f'builtin:{n}' for n in names)}")


def tokenizer(name):
    """A tokenizer of single characters, with the instructions and roles as whole tokens, and a ChatML template."""
    known(name, ("tiny",), "model")
    words = ["system", "user", "assistant", *TASKS, "\n", *map(chr, range(32, 127))]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys([*SPECIAL, "<|unk|>", *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    whole = "|".join(("system", "user", "assistant", *TASKS))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"{whole}|[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", unk_token="<|unk|>", chat_template=CHATML
    )


def model_config(name):
    """A Qwen3 of 0.9 million weights."""
    known(name, ("tiny",), "model")
    return Qwen3Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=2,
        dtype="float32",
    )


def dataset(name, split):
    """Conversational rows; no word of `test` is in `train`. letters: prompt and completion; capitals: pairs."""
    known(name, ("letters", "capitals"), "data set")
    if split not in ROWS[name]:
        raise ValueError(f"builtin:{name} has the splits {', '.join(ROWS[name])}, not {split!r}")
    stream, seen, splits = random.Random(0), set(), {}
    for part in ("test", "train"):
        rows = splits[part] = []
        while len(rows) < ROWS[name][part]:
            word = "".join(stream.choices(LETTERS, k=stream.randint(4, 7)))
            if part == "test":
                seen.add(word)
            elif word in seen:
                continue
            task = stream.choice(list(TASKS))
            prompt, answer = [{"role": "user", "content": f"{task}: {word}"}], TASKS[task](word)
            plain, capitals = ([{"role": "assistant", "content": text}] for text in (answer, answer.upper()))
            shown = capitals if part == "train" and len(rows) % 3 == 0 else plain
            answers = {"completion": shown} if name == "letters" else {"chosen": capitals, "rejected": plain}
            rows.append({"prompt": prompt, **answers, "answer": answer})
    return splits[split]


def write_model(name, folder):
    """Put the model's config and its tokenizer, without weights, into `folder`, whole or not at all."""
    config, own = model_config(name), Path(f"{folder}.{os.urandom(4).hex()}")
    config.save_pretrained(own)
    tokenizer(name).save_pretrained(own)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(own, folder)


def folder(model, output_dir):
    """The folder of a builtin model, written there if it is one; None for any other model."""
    if not model.model_name_or_path.startswith("builtin:"):
        return None
    made = Path(output_dir, "builtin")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        write_model(model.model_name_or_path.removeprefix("builtin:"), made)
    dist.barrier()
    return made
