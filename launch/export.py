"""A checkpoint -> a Hugging Face folder: `python launch/export.py runs/sft/checkpoint-400 runs/sft/exported [--dtype bfloat16]`.

A LoRA run's checkpoint becomes an adapter in peft's format, or with --merge a whole model; over a quantised base the weights are made
from their 4 bits first. Works with any number of ranks (under torchrun) and whatever number wrote the checkpoint.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from models import load, lora, sharding
from train import checkpoint, config
from train.log import say


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder named checkpoint-<step>")
    parser.add_argument("output", help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as the base model's config.json says")
    parser.add_argument("--merge", action="store_true", help="add the adapter of a LoRA run to its base, and write the whole model")
    args = parser.parse_args()
    try:
        export(args.checkpoint, args.output, args.dtype and getattr(torch, args.dtype), args.merge)
    except ValueError as e:
        sys.exit(f"export.py: {e}")
    dist.barrier()
    dist.destroy_process_group()


def export(folder, output, dtype=None, merge=False):
    """Rebuild the model of a verified checkpoint and save it. Raises ValueError where the checkpoint is not whole."""
    if Path(folder, "adapter_config.json").exists():
        raise ValueError(f"{folder} is an adapter; name the checkpoint-<step> beside it")
    if not Path(folder, "manifest.json").exists():
        raise ValueError(f"{folder} is not a checkpoint: it has no manifest.json")
    if Path(output).exists():
        raise ValueError(f"{output} exists already; name a new folder")
    device = sharding.start_ranks(timeout_seconds=600)
    if problem := checkpoint.verify(folder):
        raise ValueError(f"{folder}: {problem}")
    state = checkpoint.read_state(folder)
    cfg, adapters = (
        config.Model(**state["config"]["model"]),
        config.Lora(**state["config"].get("lora", {}) | {"adapter_name_or_path": None}),
    )
    if merge and not adapters.r:
        raise ValueError("--merge: this run trained all weights, so there is no adapter to merge; leave it out")
    if adapters.r and not merge and dtype:
        raise ValueError("--dtype: an adapter is written as it was trained; add --merge to write the whole model in this dtype")
    base = state["folder"] if Path(state["folder"]).is_dir() else load.fetch(cfg)
    model = load.build(cfg, base, config.Fsdp(), device, 0, adapters)
    checkpoint.load(folder, model)
    tokenizer = load.load_tokenizer(cfg, base)
    if adapters.r and not merge:
        lora.save_adapter(model, tokenizer, output)
    else:
        load.save_pretrained(model, tokenizer, output, dtype)
    say(f"wrote {output}: step {state['step']} of a {state['config']['algorithm']} run")


if __name__ == "__main__":
    main()
