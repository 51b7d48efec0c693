"""Checkpoints: safetensors and JSON, complete and verified, or not there.

`checkpoint-<step>/` holds one file of tensors per rank, `state.json` and `manifest.json` (size and SHA-256 of every other file). All of
it is written under a temporary name and published by one rename, so a killed run leaves the old checkpoint or the new one. Each file
says which rows of which tensors it has, so any number of ranks can read what any other number wrote. Nothing is ever unpickled.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from train import config, optim
from train.log import say

NAME = re.compile(r"checkpoint-(\d+)")


class SaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class Saver:
    """Writes the checkpoints of a run: at once, or with `checkpoint.async_save` in a thread, one at a time, while training goes on."""

    def __init__(self, output_dir, cfg, seconds, step, model, optimizer, reference=None):
        """cfg: the config's `checkpoint` block. seconds: how long ranks wait for each other. step: that of the newest checkpoint, or 0.

        reference: a second model that training changes (TR-DPO).
        """
        self.output_dir, self.cfg, self.seconds, self.held = output_dir, cfg, seconds, (model, optimizer, reference)
        self.published, self.thread, self.error = step, None, None
        # a thread's collectives must not meet the loop's
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds)) if cfg.async_save else None

    def save(self, step, state, files=None):
        """Write `checkpoint-<step>` from all ranks, then drop all but the newest `save_total_limit`.

        state: what state.json records. files: {name: function that writes it}, of what all ranks have alike.
        """
        self.finish()
        tensors, scalars = local_tensors(*self.held, copy=self.cfg.async_save)
        what = step, tensors, state | {"step": step, "optimizer_scalars": scalars}, files
        if self.cfg.async_save:
            self.thread = threading.Thread(target=self.write, args=what, daemon=True)
            self.thread.start()
        else:
            self.write(*what)
            self.finish()

    def write(self, step, *what):
        try:
            publish(self.output_dir, step, *what, self.cfg.save_total_limit, self.group)
            self.published = step
        except Exception as e:
            self.error = e

    def finish(self):
        """Wait for what is being written. A SaveError that it met stops the run, or is said, by `checkpoint.on_save_error`."""
        if self.thread:
            self.thread.join(2 * self.seconds)
            if self.thread.is_alive():
                raise TimeoutError(f"{self.output_dir}: a checkpoint is not written after {2 * self.seconds} s; does the disk answer?")
        self.thread, error, self.error = None, self.error, None
        if error and self.cfg.on_save_error == "warn" and isinstance(error, SaveError):
            say(f"warning: {error}")
        elif error:
            raise error


def publish(output_dir, step, tensors, state, files, keep, group=None):
    """Write a checkpoint from all ranks and give it its name; SaveError on all of them if that failed on one."""
    final = Path(output_dir, f"checkpoint-{step}")
    temporary = Path(output_dir, f".tmp-checkpoint-{step}")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    names = [f"rank-{r:05d}-of-{ranks:05d}.safetensors" for r in range(ranks)]
    entry = torch.zeros(33, dtype=torch.int64)
    entries = [torch.zeros_like(entry) for _ in names]

    def begin():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def complete():
        complete_folder(temporary, names, entries, state, files or {})
        shutil.rmtree(final, ignore_errors=True)  # only one that was rejected when this run resumed can stand here
        os.rename(temporary, final)
        sync(final.parent)
        prune(output_dir, step, keep)

    size = sum(t.nbytes for t, _, _ in tensors.values())
    attempt(begin if rank == 0 else None, temporary, size, group)
    attempt(lambda: entry.copy_(write(temporary / names[rank], tensors)), temporary / names[rank], size, group)
    dist.all_gather(entries, entry, group=group)
    attempt(complete if rank == 0 else None, temporary, size, group)


def attempt(function, path, size, group):
    """Run it, then SaveError on every rank if it failed on one: a rank that stopped alone would leave the others waiting."""
    problem = None
    try:
        if function:
            function()
    except Exception as e:
        cause = getattr(e, "strerror", None) or f"{type(e).__name__}: {e}"
        problem = f"checkpoint.save_steps: {path}: {cause} ({size:,} bytes to write"
        with suppress(OSError):
            problem += f", {free_bytes(path):,} free"
        problem += ")"
    if problem := agree(problem, group):
        if dist.get_rank() == 0:
            folder = next((p for p in (path, *path.parents) if p.name.startswith(".tmp-checkpoint-")), None)
            shutil.rmtree(folder, ignore_errors=True)
        raise SaveError(problem)


def complete_folder(folder, names, entries, state, files):
    """Put what is the same on all ranks beside their files, and the manifest of it all; flushed to the disk."""
    names, entries = list(names), list(entries)
    for extra, put_there in files.items():
        put_there(folder / extra)
        sync(folder / extra)
        names.append(extra)
        entries.append(entry_of(folder / extra))
    listed = {name: {"bytes": int(e[0]), "sha256": bytes(e[1:].tolist()).hex()} for name, e in zip(names, entries)}
    text = json.dumps(state, indent=1).encode()
    listed["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    put(folder / "state.json", text)
    put(folder / "manifest.json", json.dumps({"step": state["step"], "files": listed}, indent=1).encode())
    sync(folder)


def free_bytes(path):
    """Room on the disk that a path is on, or would be."""
    return shutil.disk_usage(next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())).free


def needed(output_dir, cfg, size, exported, saves):
    """(how many checkpoints come to stand beside those that are there, bytes that they and the final model need with a tenth to spare).

    size: bytes of a checkpoint; saves: how many will be written. One more than `save_total_limit` stand at a time, as an old one is removed
    only after.
    """
    standing = len(found(output_dir))
    most = standing + saves if cfg.save_total_limit is None else min(standing + saves, cfg.save_total_limit + 1)
    coming = max(min(saves, 1), most - standing)
    exported *= not Path(output_dir, "final").exists()  # else it is written over the old one
    return coming, int(1.1 * (coming * size + exported))


def check_space(output_dir, cfg, size, exported, saves):
    """ValueError where the disk has no room for what is `needed`."""
    (coming, need), free, problem = needed(output_dir, cfg, size, exported, saves), free_bytes(output_dir), None
    if dist.get_rank() == 0 and need > free:
        problem = (
            f"checkpoint.save_total_limit: {coming} more checkpoints of {size:,} bytes and the final model need {need:,} "
            f"bytes with a tenth to spare, but {output_dir} has {free:,} free; make room, lower it, or choose another output_dir"
        )
    if problem := agree(problem):
        raise ValueError(problem)


CLAIMED = {}  # output_dir -> the open file that holds its lock; the kernel releases it when this process ends, however it ends


def claim(output_dir):
    """Refuse an output_dir that another process is writing to: ValueError on every rank. Rank 0 holds it from then on.

    What a killed run left half-written is removed, so that its room is free.
    """
    problem, key = None, os.path.realpath(output_dir)
    if dist.get_rank() == 0 and key not in CLAIMED:
        try:
            os.makedirs(output_dir, exist_ok=True)
            file = open(Path(output_dir, ".lock"), "a+")  # noqa: SIM115  open for as long as the run
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                CLAIMED[key] = file
                file.truncate(0)
                file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
                file.flush()
                prune(output_dir, -1, None)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                problem = f"output_dir: {output_dir} is being written by {file.read().strip()}; end that run, or choose another"
            except OSError as e:
                say(f"warning: {output_dir} cannot be locked ({e.strerror}): see to it that no other run writes to it")
        except OSError as e:
            problem = f"output_dir: {output_dir} cannot be written: {e.strerror}"
    if problem := agree(problem):
        raise ValueError(problem)


def release(output_dir):
    if file := CLAIMED.pop(os.path.realpath(output_dir), None):
        file.close()


def local_tensors(model, optimizer, reference, copy=False):
    """This rank's slices {key: (local tensor, first row, whole shape)} of weights and optimizer state, and the state's scalars.

    copy: in memory of their own, so that training may go on while they are written.
    """
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
            tensors[key] = (value.to_local().contiguous().to("cpu", copy=copy), rows[0], list(value.shape))
    for key, (value, p) in parts.items():  # of this rank's rows of p: bitsandbytes' states and their scales
        rows = local_rows(p)
        if rows is not None:
            tensors[key] = (value.to("cpu", copy=copy), rows[0], list(p.shape))
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


def agree(problem, group=None):
    """The first rank's problem that has one, on every rank."""
    text = (problem or "").encode()[:2048]
    mine = torch.zeros(2048, dtype=torch.uint8)
    mine[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine, group=group)
    texts = [bytes(t.tolist()).rstrip(b"\0").decode(errors="replace") for t in everyone]
    return next((t for t in texts if t), None)


def read_state(folder):
    return json.loads(Path(folder, "state.json").read_text())


MAY_CHANGE = ("output_dir", "checkpoint", "log", "evaluation", "data.eval", "data.eval_split", "train.micro_batch_tokens")
MAY_CHANGE += ("fsdp.replicas", "fsdp.reshard_after_forward", "fsdp.prefetch", "fsdp.activation_checkpointing", "fsdp.timeout_seconds")
MAY_CHANGE += tuple(f"rollout.{name}" for name in ("max_num_seqs", "reward_seconds", "reward_workers"))
MAY_CHANGE += tuple(f"rollout.vllm_{name}" for name in ("address", "command", "devices", "gpu_memory_utilization", "weights_dir"))
MAY_CHANGE += ("rollout.vllm_timeout_seconds", "rollout.vllm_start_timeout_seconds")
MAY_CHANGE += ("train.max_steps", "train.num_train_epochs")  # see `schedule_problem`


def check_inputs(state, inputs):
    """Refuse to go on from a checkpoint of a run with other maths: a ValueError that lists every difference."""
    old, new = config.flat(state["config"]), config.flat(inputs["config"])
    differences = [
        f"{key}: {old.get(key)} then, {new.get(key)} now"
        for key in sorted(old | new)
        if old.get(key) != new.get(key) and not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    old, new = state.get("reference", {}), inputs.get("reference", {})
    changed = [name for name in ("model", "weights", "adapter") if old.get(name) != new.get(name)]
    differences += [f"reference {name}: {old.get(name)} then, {new.get(name)} now" for name in changed]
    if state.get("weights") != inputs["weights"]:
        differences.append(f"model.model_name_or_path: the weights of {inputs['folder']} are others than then")
    then, now = state.get("rewards", {}), inputs["rewards"]
    differences += [f"grpo.reward_funcs: the file of {name} has changed" for name in now if name in then and then[name] != now[name]]
    differences += schedule_problem(state, inputs)
    if state["data"] != inputs["data"]:
        differences.append("data.train: the tokenised rows differ")
    if differences:
        raise ValueError(
            f"checkpoint.resume: the checkpoint of step {state['step']} was made with other settings: {'; '.join(differences)}. "
            "Restore them, or choose another output_dir"
        )


def schedule_problem(state, inputs):
    """Another number of steps is no other run as long as the steps done so far have had the learning rates that it gives them."""
    then, now, train = state.get("steps"), inputs["steps"], SimpleNamespace(**inputs["config"]["train"])
    if then == now:
        return []
    done = range(1, state["step"] + 1)
    if then and now >= state["step"] and all(optim.learning_rate(train, then, s) == optim.learning_rate(train, now, s) for s in done):
        return []
    cure = "the steps done so far would have had other learning rates; constant, or warmup_stable_decay before its decay, can be prolonged"
    return [f"train.max_steps: {then} steps in all then, {now} now ({cure})"]


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
