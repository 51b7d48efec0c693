"""Checkpoints: safetensors and JSON, complete and verified, or not there.

`checkpoint-<step>/` holds one file of tensors per rank, `state.json` and `manifest.json` (size and SHA-256 of every other file). All of
it is written under a temporary name and published by one rename, so a killed run leaves the old checkpoint or the new one. Each file
says which rows of which tensors it has, so any number of ranks can read what any other number wrote. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from train import optim

NAME = re.compile(r"checkpoint-(\d+)")


def save(output_dir, step, model, optimizer, state, keep, reference=None, files=None):
    """Write `checkpoint-<step>` from all ranks, then drop all but the newest `keep` (None: keep all).

    state: what state.json records. reference: a second model that training changes (TR-DPO). files: {name: function that writes it}, of
    what all ranks have alike.
    """
    final = Path(output_dir, f"checkpoint-{step}")
    temporary = Path(output_dir, f".tmp-checkpoint-{step}")
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    tensors, scalars = local_tensors(model, optimizer, reference)
    name = f"rank-{rank:05d}-of-{dist.get_world_size():05d}.safetensors"
    entry = write(temporary / name, tensors)
    entries = [torch.zeros_like(entry) for _ in range(dist.get_world_size())]
    dist.all_gather(entries, entry)
    if rank == 0:
        names = [f"rank-{r:05d}-of-{len(entries):05d}.safetensors" for r in range(len(entries))]
        for extra, put_there in (files or {}).items():
            put_there(temporary / extra)
            sync(temporary / extra)
            names.append(extra)
            entries.append(entry_of(temporary / extra))
        files = {name: {"bytes": int(e[0]), "sha256": bytes(e[1:].tolist()).hex()} for name, e in zip(names, entries)}
        text = json.dumps(state | {"step": step, "optimizer_scalars": scalars}, indent=1).encode()
        files["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        put(temporary / "state.json", text)
        put(temporary / "manifest.json", json.dumps({"step": step, "files": files}, indent=1).encode())
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)  # only one that was rejected when this run resumed can stand here
        os.rename(temporary, final)
        sync(final.parent)
        prune(output_dir, step, keep)
    dist.barrier()


def local_tensors(model, optimizer, reference):
    """This rank's slices {key: (local tensor, first row, whole shape)} of weights and optimizer state, and the state's scalars."""
    tensors, scalars, parts = {}, {}, {}
    slices = {f"reference.{name}": p.detach() for name, p in reference.named_parameters()} if reference else {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        slices[f"model.{name}"] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, DTensor):
                slices[f"optimizer.{key}.{name}"] = value
            elif isinstance(value, torch.Tensor) and value.ndim:
                parts[f"optimizer.{key}.{name}"] = value, p
            else:
                scalars[f"optimizer.{key}.{name}"] = float(value)
    for key, value in slices.items():
        rows = local_rows(value)
        if rows is not None:
            tensors[key] = (value.to_local().contiguous().cpu(), rows[0], list(value.shape))
    for key, (value, p) in parts.items():  # of this rank's rows of p: bitsandbytes' states and their scales
        rows = local_rows(p)
        if rows is not None:
            tensors[key] = (value.cpu(), rows[0], list(p.shape))
    return tensors, scalars


def local_rows(tensor):
    """(first, past the last) of the rows of dimension 0 that this rank holds and must write; None where it has none to write."""
    mesh = tensor.device_mesh
    if mesh.ndim == 2 and mesh.get_coordinate()[0] != 0:
        return None  # HSDP: the first replica writes
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    return (offset[0], offset[0] + shape[0]) if shape[0] else None


def write(path, tensors):
    """One file of tensors, flushed to the disk; returns its size and digest as (33,) int64."""
    rows = json.dumps({k: [first, *shape] for k, (_, first, shape) in tensors.items()})
    save_file({k: t for k, (t, _, _) in tensors.items()}, path, metadata={"rows": rows})
    sync(path)
    return entry_of(path)


def entry_of(path):
    return torch.tensor([os.path.getsize(path), *digest(path)])


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


def put(path, data):
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def sync(path):
    """Flush a file, or the names in a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def found(output_dir):
    """The checkpoints of a run, {step: folder}, newest first."""
    folders = Path(output_dir).glob("checkpoint-*") if os.path.isdir(output_dir) else ()
    steps = {int(m[1]): f for f in folders if (m := NAME.fullmatch(f.name))}
    return dict(sorted(steps.items(), reverse=True))


def prune(output_dir, step, keep):
    """Remove all but the newest `keep` checkpoints up to `step`, and what killed runs left half-written."""
    old = [folder for number, folder in found(output_dir).items() if number <= step][keep:] if keep else []
    for folder in [*old, *Path(output_dir).glob(".tmp-checkpoint-*")]:
        shutil.rmtree(folder, ignore_errors=True)


def newest(output_dir, say):
    """The newest checkpoint that verifies, or None if there is none at all; every rank gets the same answer.

    One that fails is named with the reason through `say`. If all fail, a ValueError: training must not start over in silence.
    """
    folders = found(output_dir)
    for folder in folders.values():
        problem = verify(folder)
        if problem is None:
            return folder
        say(f"{folder} rejected: {problem}")
    if folders:
        raise ValueError(f"checkpoint.resume: none of the {len(folders)} checkpoints of {output_dir} is whole (reasons above)")
    return None


def verify(folder):
    """What is wrong with a checkpoint, or None. The ranks share the hashing and agree on the answer."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    problem = None
    try:
        manifest = json.loads(Path(folder, "manifest.json").read_text())
        files = sorted(manifest["files"].items())
        strangers = set(os.listdir(folder)) - {name for name, _ in files} - {"manifest.json"}
        if strangers:
            problem = f"{min(strangers)}: not in the manifest"
        for name, expected in files[rank::ranks]:
            problem = problem or check_file(Path(folder), name, expected)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        problem = f"manifest.json: {type(e).__name__}: {e}"
    return agree(problem)


def check_file(folder, name, expected):
    path = folder / name
    if os.path.basename(name) != name or path.is_symlink():
        return f"{name}: leads out of the checkpoint"
    if not path.exists():
        return f"{name}: missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{name}: {path.stat().st_size} bytes, expected {expected['bytes']}"
    return None if digest(path).hex() == expected["sha256"] else f"{name}: sha256 differs"


def agree(problem):
    """The first rank's problem that has one, on every rank."""
    text = (problem or "").encode()[:256]
    mine = torch.zeros(256, dtype=torch.uint8)
    mine[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    texts = [bytes(t.tolist()).rstrip(b"\0").decode(errors="replace") for t in everyone]
    return next((t for t in texts if t), None)


def read_state(folder):
    return json.loads(Path(folder, "state.json").read_text())


MAY_CHANGE = ("output_dir", "checkpoint", "log", "evaluation", "fsdp", "data.eval", "data.eval_split", "train.micro_batch_tokens")
MAY_CHANGE += ("rollout.max_num_seqs", "rollout.reward_seconds", "rollout.reward_workers")


def check_inputs(state, inputs):
    """Refuse to go on from a checkpoint of a run with other maths: a ValueError that lists every difference."""
    old, new = flat(state["config"]), flat(inputs["config"])
    differences = [
        f"{key}: {old.get(key)} then, {new.get(key)} now"
        for key in sorted(old | new)
        if old.get(key) != new.get(key) and not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    old, new = state.get("reference", {}), inputs.get("reference", {})
    changed = [name for name in ("model", "weights", "adapter") if old.get(name) != new.get(name)]
    differences += [f"reference {name}: {old.get(name)} then, {new.get(name)} now" for name in changed]
    if state["data"] != inputs["data"]:
        differences.append("data.train: the tokenised rows differ")
    if differences:
        raise ValueError(
            f"checkpoint.resume: the checkpoint of step {state['step']} was made with other settings: {'; '.join(differences)}. "
            "Restore them, or choose another output_dir"
        )


def flat(settings, prefix=""):
    """Nested settings as {"train.max_steps": 10, ...}."""
    out = {}
    for key, value in settings.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


@torch.no_grad()
def load(folder, model, optimizer=None, reference=None):
    """Fill the model's trainable weights, and the optimizer's state, from a checkpoint of any number of ranks. Returns its state."""
    state = read_state(folder)
    files = [safe_open(f, framework="pt") for f in sorted(Path(folder).glob("rank-*.safetensors"))]
    try:
        where = {}  # key -> [(file, first row, whole shape)]
        for f in files:
            for key, (first, *shape) in json.loads(f.metadata()["rows"]).items():
                where.setdefault(key, []).append((f, first, shape))
        for name, p in model.named_parameters():
            if p.requires_grad:
                fill(p, f"model.{name}", where)
                if optimizer is not None:
                    optim.restore(optimizer, p, optimizer_state(p, name, where, state["optimizer_scalars"]))
        for name, p in reference.named_parameters() if reference else ():
            fill(p, f"reference.{name}", where)
    except SafetensorError as e:
        raise ValueError(f"checkpoint.resume: {folder}: {e}") from e
    return state


def optimizer_state(p, name, where, scalars):
    out = {}
    for key in {k.split(".")[1]: None for k in (*scalars, *where) if k.startswith("optimizer.") and k.endswith(f".{name}")}:
        full = f"optimizer.{key}.{name}"
        if full in scalars:
            out[key] = torch.tensor(scalars[full], dtype=torch.float32, device=p.device)
        elif key.startswith("absmax"):
            continue  # goes with its codes
        elif key.startswith("state") and full.replace("state", "absmax", 1) in where:
            out[key], out[key.replace("state", "absmax")] = blocks(p, key, full, where)
        else:
            out[key] = fill(torch.zeros_like(p, dtype=torch.float32), full, where)
    return out


def blocks(p, key, full, where):
    """This rank's (codes, scales) of an 8-bit state: the same bytes where its rows are those of one file, else anew from float32."""
    sizes, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    begin, end, floats = offset[0], offset[0] + sizes[0], []
    for file, first, _ in where[full]:
        codes, scales = file.get_tensor(full), file.get_tensor(full.replace("state", "absmax", 1))
        low, high = max(begin, first), min(end, first + len(codes))
        if (begin, end) == (first, first + len(codes)):
            return codes, scales
        if low < high:
            floats.append(optim.to_floats(codes, scales, key)[low - first : high - first])
    return optim.to_codes(torch.cat(floats), key) if floats else (torch.empty(0), torch.empty(0))


def fill(tensor, key, where):
    """Copy into a DTensor's local rows the parts of them that each file has."""
    if key not in where:
        raise ValueError(f"checkpoint.resume: the checkpoint has no {key}; was it made by another model?")
    for _, _, shape in where[key]:
        if shape != list(tensor.shape):
            raise ValueError(f"checkpoint.resume: {key} has shape {shape} in the checkpoint, {list(tensor.shape)} here")
    local = tensor.to_local()
    sizes, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    begin, end, done = offset[0], offset[0] + sizes[0], 0
    for file, first, _ in where[key]:
        rows = file.get_slice(key)
        low, high = max(begin, first), min(end, first + rows.get_shape()[0])
        if low < high:
            local[low - begin : high - begin].copy_(rows[low - first : high - first])
            done += high - low
    if done != sizes[0]:
        raise ValueError(f"checkpoint.resume: the checkpoint has {done} of rows {begin} to {end} of {key}")
    return tensor
