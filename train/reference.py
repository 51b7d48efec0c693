"""The reference's per-token log-probs: computed once, kept on disk, keyed by everything they depend on.

The reference is the policy itself before its first update, or a named model. A synced reference (TR-DPO,
https://arxiv.org/abs/2404.09656, equation 6) lives beside the policy and follows it.
"""

import dataclasses
import hashlib
import json
import os
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from models import attention, load, lora, sharding
from models.logprobs import token_logps
from train import peers
from train.batches import micro_batches
from train.log import say

PART = 2048  # examples of one file: what a kill during this pass can cost


def named(cfg):
    """The settings of the reference's own model, or None where the reference is the policy before its first update."""
    name = cfg.reference.model_name_or_path
    return name and dataclasses.replace(cfg.model, model_name_or_path=name, model_revision=None, from_scratch=False)


def build(cfg, folder, device):
    """A model with the reference's weights."""
    other = named(cfg)
    return load.build(other or cfg.model, load.fetch(other) if other else folder, cfg.fsdp, device, cfg.seed)


def key_of(cfg, folder, device):
    """Everything but the rows that reference log-probs depend on; weights by a digest of their files, or of their shape and seed."""
    other = named(cfg)
    drawn = other is None and (cfg.model.from_scratch or cfg.model.model_name_or_path.startswith("builtin:"))
    dtype = sharding.compute_dtype(cfg.model.dtype, device)
    more = {name: value for name in ("quantization", "compile", "kernels") if (value := getattr(cfg.model, name))}
    if cfg.lora.adapter_name_or_path and other is None:
        if not Path(cfg.lora.adapter_name_or_path, "adapter_model.safetensors").exists():
            where = f"lora.adapter_name_or_path: {cfg.lora.adapter_name_or_path}"
            raise ValueError(f"{where} is no adapter: it has no adapter_model.safetensors")
        more["adapter"] = hashlib.sha256(Path(cfg.lora.adapter_name_or_path, "adapter_model.safetensors").read_bytes()).hexdigest()[:16]
    return more | {
        "model": (other or cfg.model).model_name_or_path,
        "weights": weights_of(load.fetch(other) if other else folder, drawn and cfg.seed),
        "attention": attention.choose(cfg.model.attn_implementation, device, dtype),
        "dtype": str(dtype).removeprefix("torch."),
    }


def weights_of(folder, seed=False):
    """What tells a model's weights from others: a digest of its files, or of its shape and the seed that they are drawn from.

    A collective, as the ranks share the reading.
    """
    digest, seeded, home = hashlib.sha256(), seed is not False, Path(folder)
    files = [f for f in (home / "config.json", *([] if seeded else sorted(home.glob("*.safetensors")))) if f.exists()]
    digests = torch.zeros(len(files), 32, dtype=torch.uint8)
    for i in range(len(files))[dist.get_rank() :: dist.get_world_size()]:
        with open(files[i], "rb") as f:
            digests[i] = torch.tensor(list(hashlib.file_digest(f, "sha256").digest()), dtype=torch.uint8)
    dist.all_reduce(digests)
    for file, own in zip(files, digests.tolist()):
        digest.update(f"{file.name} {bytes(own).hex()} ".encode())
    return digest.hexdigest()[:16] + (f" drawn from seed {seed}" if seeded else "")


def with_logps(rows, policy, key, cfg, folder, device, dealt):
    """The rows with `ref_logps`, from the cache of `output_dir` as far as it has them. dealt: (budget, rank, ranks, quadratic).

    It is called before a checkpoint is loaded, so `policy` still is the reference, also when a run is resumed without its cache.
    """
    key = key | {"rows": rows.fingerprint}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(cfg.output_dir, "reference", name)
    writes = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if writes:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "key.json").write_text(json.dumps(key, indent=1) + "\n")
    dist.barrier()
    starts = range(0, len(rows), PART)
    absent = [start for start in starts if not (cache / f"{start:09d}.safetensors").exists()]
    missing = torch.tensor(absent + [-1] * (len(starts) - len(absent)))
    dist.broadcast(missing, 0)  # ranks must agree on what is left to compute
    todo = [start for start in missing.tolist() if start >= 0]
    model = build(cfg, folder, device) if todo and cfg.reference.model_name_or_path else policy
    for start in todo:
        began = time.perf_counter()
        chosen = range(start, min(start + PART, len(rows)))
        logps = score(model, rows, chosen, dealt)
        if writes:
            temporary = cache / f".{start}.{os.urandom(4).hex()}"
            save_file({"ref_logps": logps}, temporary)
            os.replace(temporary, cache / f"{start:09d}.safetensors")
        say(f"reference log-probs: {chosen[-1] + 1} of {len(rows)} examples in {time.perf_counter() - began:.1f} s")
    dist.barrier()
    parts = [load_file(cache / f"{start:09d}.safetensors")["ref_logps"] for start in starts]
    return dataclasses.replace(rows, per_token=rows.per_token | {"ref_logps": torch.cat(parts)})


def check_first_step(metrics, beta):
    """Before the first update the policy is its own reference: rewards are 0, and DPO's loss is ln 2. ValueError where they are not."""
    for name in ("rewards/chosen", "rewards/rejected"):
        if abs(metrics[name]) > 1e-2 * max(1.0, beta / 0.1):  # at beta 0.1 the loss is then ln 2 within 1e-2
            raise ValueError(
                f"step 1: {name} is {metrics[name]:.4g}, expected 0, because the policy has not been updated yet. The reference's "
                "log-probs are not the policy's: is dropout on, or was the cache in output_dir/reference made elsewhere?"
            )


@torch.no_grad()
def score(model, rows, chosen, dealt):
    """Log-probs of consecutive examples by a model, laid out as their tokens are, (n,) float32, whole on every rank."""
    k = rows.rows_per_example
    base = int(rows.offsets[chosen[0] * k])
    out = torch.zeros(int(rows.offsets[(chosen[-1] + 1) * k]) - base)  # (n,)
    training = model.training
    model.eval()
    for batch in peers.between(micro_batches(rows, chosen, *dealt)):
        logps = token_logps(model, batch)["logps"].cpu()  # (R, T)
        if "placeholder" in batch:
            continue
        for i, row in enumerate(j for p in batch["positions"].tolist() for j in range(chosen[p] * k, chosen[p] * k + k)):
            first, end = int(rows.offsets[row]) - base, int(rows.offsets[row + 1]) - base
            out[first:end] = logps[i, : end - first]
    model.train(training)
    dist.all_reduce(out)
    return out


def live_model(cfg, policy, folder, device):
    """The reference that scores rows during training: a model, or what makes one of a policy with adapters for as long as it scores."""
    if cfg.lora.r is None or cfg.reference.model_name_or_path:
        return build(cfg, folder, device).requires_grad_(False).eval()
    fixed = not cfg.reference.sync_ref_model and not cfg.lora.adapter_name_or_path
    return AdaptersOff(policy) if fixed else AdapterCopy(policy)


class AdaptersOff:
    """The base of a policy: what it was before its first update."""

    def __init__(self, policy):
        self.policy = policy

    def scoring(self):
        return lora.adapters_off(self.policy)


class AdapterCopy(AdaptersOff):
    """A copy of a policy's adapters over its own base, as a reference that may follow it.

    Mixing adapters is not mixing weights: where the update's share of the policy is below 1, B and A are averaged apart.
    """

    def __init__(self, policy):
        super().__init__(policy)
        self.copies = {name: p.detach().clone() for name, p in lora.trained(policy).items()}

    def named_parameters(self):
        return self.copies.items()

    def parameters(self):
        return self.copies.values()

    @contextmanager
    def scoring(self):
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        for theirs, ours in zip(self.parameters(), lora.trained(self.policy).values()):
            values = ours.to_local().clone()
            ours.to_local().copy_(theirs.to_local())
            theirs.to_local().copy_(values)


def live(step, reference):
    """The step with `ref_logps` by a reference that changes during training, or scores what is sampled in it."""
    borrowed = isinstance(reference, AdaptersOff)
    model = reference.policy if borrowed else reference
    with reference.scoring() if borrowed else nullcontext():
        return step._replace(micro_batches=[batch | {"ref_logps": token_logps_of(model, batch)} for batch in step.micro_batches])


@torch.no_grad()
def token_logps_of(model, batch):
    return token_logps(model, batch)["logps"].cpu()


@torch.no_grad()
def follow(reference, policy, mixup):
    """TR-DPO's update of the reference, reference <- mixup * policy + (1 - mixup) * reference, slice by slice on each rank."""
    for theirs, ours in zip(reference.parameters(), (p for p in policy.parameters() if p.requires_grad)):
        theirs.to_local().lerp_(ours.to_local(), mixup)
