"""A checkpoint -> a Hugging Face folder: `python launch/export.py runs/sft/checkpoint-400 runs/sft/exported [--dtype bfloat16]`.

Works with any number of ranks (under torchrun) and whatever number wrote the checkpoint.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from models import load, sharding
from train import checkpoint, config
from train.log import say


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder named checkpoint-<step>")
    parser.add_argument("output", help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as the base model's config.json says")
    args = parser.parse_args()
    try:
        export(args.checkpoint, args.output, args.dtype and getattr(torch, args.dtype))
    except ValueError as e:
        sys.exit(f"export.py: {e}")
    dist.barrier()
    dist.destroy_process_group()


def export(folder, output, dtype=None):
    """Rebuild the model of a verified checkpoint and save it. Raises ValueError where the checkpoint is not whole."""
    if not Path(folder, "manifest.json").exists():
        raise ValueError(f"{folder} is not a checkpoint: it has no manifest.json")
    if Path(output).exists():
        raise ValueError(f"{output} exists already; name a new folder")
    device = sharding.start_ranks(timeout_seconds=600)
    if problem := checkpoint.verify(folder):
        raise ValueError(f"{folder}: {problem}")
    state = checkpoint.read_state(folder)
    cfg = config.Model(**state["config"]["model"])
    base = state["folder"] if Path(state["folder"]).is_dir() else load.fetch(cfg)
    model = load.build(cfg, base, config.Fsdp(), device, seed=0)
    checkpoint.load(folder, model)
    load.save_pretrained(model, load.load_tokenizer(cfg, base), output, dtype)
    say(f"wrote {output}: step {state['step']} of a {state['config']['algorithm']} run")


if __name__ == "__main__":
    main()
