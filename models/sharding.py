"""Ranks, the device mesh and FSDP2: how one model is spread over any number of GPUs (or CPU processes), and what its layers keep."""

import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial, wraps

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}  # what selective checkpointing keeps, and all that is named attention


def start_ranks(timeout_seconds):
    """Join the process group that torchrun describes, or make one of a single rank; returns this rank's device.

    ValueError: more ranks than GPUs.
    """
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
        if ranks > gpus:  # on all ranks of the host, or those that have a GPU would wait for the others
            raise ValueError(f"--nproc-per-node: got {ranks} ranks on this host, expected at most {gpus}, one for each of its GPUs")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend, timeout = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_seconds)
        dist.init_process_group(backend, timeout=timeout, **meeting_place(os.environ, timeout))
    return device


def meeting_place(env, timeout):
    """How the ranks find each other, where it is not by torchrun's variables alone."""
    if "RANK" not in env:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    again, hosts = int(env.get("TORCHELASTIC_RESTART_COUNT", 0)), int(env.get("GROUP_WORLD_SIZE", 1))
    if not again or hosts > 1 or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # restarts of several hosts are counted by each alone
        return {}
    # torchrun's store outlives a restart, with addresses of ranks that have ended: pytorch/pytorch#135712
    ranks = int(env["WORLD_SIZE"])
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), ranks, is_master=False, timeout=timeout)
    return {"store": dist.PrefixStore(f"restart-{again}", store), "rank": int(env["RANK"]), "world_size": ranks}


def check_ranks(replicas, world):
    """ValueError where `world` ranks do not make so many equal groups."""
    if world % replicas:
        raise ValueError(f"fsdp.replicas: got {replicas}, expected a divisor of the run's {world} ranks; change it, or --nproc-per-node")


def make_mesh(device, replicas):
    """The mesh of all ranks: one axis, or with `replicas` above 1 (HSDP) a (replicate, shard) pair."""
    world = dist.get_world_size()
    check_ranks(replicas, world)
    if replicas == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def card(device=None):
    """Bytes of memory of the run's smallest GPU, so that all ranks decide alike; without one, of those that are most usual."""
    if not torch.cuda.is_available():
        return 80 * 2**30
    size = torch.tensor(torch.cuda.mem_get_info(device)[1])
    if dist.is_initialized():
        dist.all_reduce(size, dist.ReduceOp.MIN)
    return int(size)


def compute_dtype(name, device):
    """The dtype of the layers' arithmetic for the config's `model.dtype`."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def shard(model, mesh, dtype, settings, reshards):
    """`fully_shard` the layers, then the ends, then the root; works on the meta device and moves nothing.

    Parameters keep their own dtype (float32 masters); with `dtype` bfloat16 the layers compute in it. settings: the config's `fsdp` block;
    reshards: whether layers are freed between their forward and backward passes.
    """
    policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, getattr(torch, settings.reduce_dtype))
    layers = decoder_layers(model)
    groups = [(layer, reshards) for layer in layers]
    embed, head = model.get_input_embeddings(), model.lm_head
    if not is_tied(model):  # a tied pair stays in the root's group: in two groups, torch 2.11 unties it in silence
        groups += [(embed, reshards), (head, False)]  # the backward pass begins with the head
    for module, reshard in (*groups, (model, False)):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        module.reshards = reshard
    for i, layer in enumerate(layers) if settings.prefetch else ():
        layer.set_modules_to_forward_prefetch(layers[i + 1 : i + 1 + settings.prefetch])
        layer.set_modules_to_backward_prefetch(layers[max(0, i - settings.prefetch) : i][::-1])
    for name in ("score", "decode"):
        register_fsdp_forward_method(model, name)


def moved(tensor, device):
    """A CPU tensor on the device; the copy to a GPU goes in the order of its stream, and nothing waits for it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def wrap_layers(model, checkpointing, compiled):
    """Let each decoder layer be compiled, and compute again in the backward pass what it does not keep; before `shard`.

    checkpointing: none, selective, full or offload, as in the config's `fsdp` block. A layer's forward is replaced rather than the
    layer, so that all names stay: checkpoint(compiled(forward)), inside of FSDP's hooks, which neither run twice nor are traced. The
    sampler gets the plain forward.
    """
    model.is_gathered = False
    for layer in decoder_layers(model) if compiled or checkpointing != "none" else ():
        plain = layer.forward
        layer.forward = wrapped(model, plain, torch.compile(plain) if compiled else plain, checkpointing)


def wrapped(model, plain, fast, checkpointing):
    contexts = partial(create_selective_checkpoint_contexts, keep_products) if checkpointing == "selective" else noop_context_fn
    # the dropout of adapters is keyed, and models have no other (load.make_packable), so there is no state of a generator to restore
    options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}

    @wraps(plain)
    def forward(*args, **kwargs):
        if model.is_gathered:
            return plain(*args, **kwargs)
        if checkpointing == "none":
            return fast(*args, **kwargs)
        with on_host() if checkpointing == "offload" else nullcontext():
            return checkpoint(fast, *args, **options, **kwargs)

    return forward


def keep_products(ctx, op, *args, **kwargs):
    """Of a layer, the results of matrix products and of attention are kept; what lies between is cheap to make again."""
    return CheckpointPolicy.MUST_SAVE if is_product(op) else CheckpointPolicy.PREFER_RECOMPUTE


def is_product(op):
    name = op._schema.name.rpartition("::")[2]
    return name in PRODUCTS or "attention" in name or "attn" in name


def on_host():
    """Inside, what the backward pass needs waits in the host's memory. Copies go in the order of the stream: nothing waits for them."""

    def pack(tensor):
        place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, place.copy_(tensor, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[1].to(packed[0], non_blocking=True))


def is_tied(model):
    """Whether head and embedding share a weight."""
    return bool({*model.lm_head.parameters()} & {*model.get_input_embeddings().parameters()})


def place(module, name, tensor, device):
    """Give a parameter its values, of which each rank keeps its slice; `tensor` is whole on every rank."""
    p = module._parameters[name]
    tensor = tensor.to(device)
    if isinstance(p, DTensor):
        tensor = slice_of(tensor, p)
    module._parameters[name] = nn.Parameter(tensor, requires_grad=p.requires_grad)


def slice_of(tensor, like):
    """Of a tensor that is whole on every rank, the DTensor with this rank's slice in memory of its own; no communication."""
    sliced = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    own = sliced.to_local().clone()  # else it would keep the whole alive
    return DTensor.from_local(own, sliced.device_mesh, sliced.placements, run_check=False, shape=sliced.shape, stride=sliced.stride())


def whole(tensor):
    """The tensor with all ranks' slices, on every rank; all must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    """This rank's slice."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def decoder_layers(model) -> list[nn.Module]:
    """The repeated blocks, by transformers' own list of modules that must not be split."""
    names = set(model._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__.removeprefix("FSDP") in names]
    if not layers:
        raise ValueError(f"{type(model).__name__} names no layers that may be sharded one by one (_no_split_modules)")
    return layers


def reshard(model):
    """Free what a forward pass left whole, or `model.parameters()` would not be the sharded ones; not inside `gathered`."""
    for part in () if model.is_gathered else model.modules():
        if isinstance(part, FSDPModule) and not part.reshards:
            part.reshard()


@contextmanager
def gathered(model):
    """Inside, every rank holds the whole model in its compute dtype and no forward pass communicates: ranks may differ in work."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    training = model.training
    model.eval()
    model.is_gathered = True
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        with torch.no_grad():
            yield
    finally:
        model.is_gathered = False
        for part in parts:
            part.set_reshard_after_forward(part.reshards, recurse=False)
            part.reshard()
        model.train(training)
