"""The model once more, whole on each rank and in its compute dtype, where there is room for it: what a run's steps compute on.

FSDP's model keeps the float32 weights in shards; what is saved, sampled or exported comes from it. A step copies them here once, sums
here, in float32, the gradients of all its micro-batches, and hands the sums back in shards: what FSDP does for each layer and micro-batch.
Nothing lies between two kernels here, so that a whole pass can be recorded as a CUDA graph, one call instead of some thousand.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from models.attention import Rows
from models.sharding import local, moved, whole

SHARE = 0.25  # of a GPU's memory, what replica and gradients may take under `auto`
GRAPHS = 64  # shapes that stay recorded; for another, the oldest goes


def wanted(cfg, fsdp, model, dtype, kind, card):
    """Whether a model to be trained in `dtype` gets a replica. kind: "cuda" or "cpu"; card: bytes of a GPU's memory.

    ValueError: it was asked for CUDA graphs and cannot.
    """
    fits = not fsdp.reshard_after_forward
    if fsdp.reshard_after_forward == "auto":
        taken = sum(p.numel() * (dtype.itemsize + 4 * p.requires_grad) for p in model.parameters())
        fits = kind == "cuda" and taken <= SHARE * card
    if cfg.cuda_graphs and not (fits and kind == "cuda"):
        cure = "set fsdp.reshard_after_forward: false if there is room" if kind == "cuda" else "there is none on a CPU"
        raise ValueError(f"model.cuda_graphs: got true, expected false where weights do not stay whole on a GPU; {cure}")
    attend = model.config._attn_implementation
    if cfg.cuda_graphs and attend in ("packed_sdpa", "packed_flex"):  # a graph would keep the rows of its first micro-batch
        raise ValueError(f"model.cuda_graphs: got true, expected false with {attend} attention, all that this GPU has here")
    return fits and not cfg.quantization


class Replica:
    """Between `begin` and `end`, `twin` scores with the weights of the sharded model and gathers its gradients."""

    def __init__(self, model, twin, dtype, fsdp, budget=None):
        """model: sharded and read; twin: its outline, on the meta device; budget: tokens of a micro-batch, for CUDA graphs."""
        self.model, self.twin, self.reduce_dtype = model, twin, getattr(torch, fsdp.reduce_dtype)
        device = model.lm_head.weight.device
        modules, masters, made = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False)), {}
        alone = dist.get_world_size() == 1
        for name, module in twin.named_modules():
            for key, p in module._parameters.items():
                if p is not None and p not in made:  # a tied weight is there twice
                    master = masters[f"{name}.{key}"].detach()
                    shared = alone and not p.requires_grad and master.dtype == dtype  # then it is the same memory
                    made[p] = nn.Parameter(local(master) if shared else torch.empty(p.shape, dtype=dtype, device=device), p.requires_grad)
                module._parameters[key] = made.get(p)
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else modules[name]._buffers[key].clone()
        self.names = dict(twin.named_parameters())
        self.copy(dict(model.named_parameters()))
        self.masters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.sums = {name: torch.zeros_like(self.names[name], dtype=torch.float32) for name in self.masters}
        self.shards = {name: like(self.sums[name], p) for name, p in self.masters.items()} if alone else {}
        for name, total in self.sums.items():
            self.names[name].register_post_accumulate_grad_hook(adder(total))
        if budget:
            twin.score = Graphs(twin, budget).score

    @torch.no_grad()
    def copy(self, wanted):
        """Take over the weights of these names."""
        if dist.get_world_size() == 1:
            torch._foreach_copy_([self.names[name] for name in wanted], [local(p) for p in wanted.values()])
        for name, p in wanted.items() if dist.get_world_size() > 1 else ():
            self.names[name].copy_(whole(p.to(self.names[name].dtype)))

    def begin(self, training):
        """Before the micro-batches of a step or an evaluation."""
        self.twin.train(training)
        self.copy(self.masters)
        torch._foreach_zero_(list(self.sums.values()))

    def end(self):
        """After a step's last backward pass: `grad` of the sharded parameters is the sum over micro-batches and ranks."""
        for name, p in self.masters.items():
            p.grad = self.shards[name] if self.shards else summed(self.sums[name], p, self.reduce_dtype)


def like(total, p):
    """On one rank, `total` as the DTensor that it is of the parameter p."""
    return DTensor.from_local(total, p.device_mesh, p.placements, run_check=False)


def summed(total, p, dtype):
    """The sum over ranks of `total`, in shards like those of the parameter p."""
    part = DTensor.from_local(total.to(dtype), p.device_mesh, [Partial()] * p.device_mesh.ndim, run_check=False)
    return part.redistribute(placements=p.placements).to(total.dtype)


def adder(total):
    def add(p):
        total.add_(p.grad)
        p.grad = None

    return add


class Graphs:
    """Scores as `logprobs.score` does, by CUDA graphs: one for each rounded-up size of a micro-batch, all of them in the same memory.

    What is rounded up is filled with tokens of a row of their own, that nothing scores, and with targets that no gradient reaches.
    """

    def __init__(self, twin, budget):
        self.twin, self.plain, self.unit, self.recorded = twin, twin.score, max(1, budget // 8), {}
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def score(self, input_ids, position_ids, predictors, labels, rows, byproducts, temperature, keys=None):
        """Arguments and results of `logprobs.score`."""
        given = {"input_ids": input_ids, "position_ids": position_ids, "predictors": predictors, "labels": labels, "keys": keys}
        if not torch.is_grad_enabled():
            return self.plain(**given, rows=rows, byproducts=byproducts, temperature=temperature)
        n, m = self.rounded(input_ids.shape[1]), self.rounded(len(labels))
        bounds = [0]
        for length in (*rows.lengths, n - input_ids.shape[1]):
            bounds.append(bounds[-1] + length)
        longest = min(n, power(max(rows.longest, n - input_ids.shape[1])))
        size = power(len(bounds) - 1)
        key = n, m, size, longest, byproducts, temperature, keys is None
        if key not in self.recorded:
            if len(self.recorded) == GRAPHS:
                del self.recorded[next(iter(self.recorded))]
            try:
                self.recorded[key] = Recorded(self, *key)
            except RuntimeError as e:
                raise ValueError(f"model.cuda_graphs: this model cannot be recorded; set it to false ({str(e).splitlines()[0]})") from e
        found = self.recorded[key]
        found.fill(given, torch.tensor(bounds + [n] * (size + 1 - len(bounds)), dtype=torch.int32))
        return dict(zip(found.out, Replay.apply(found.anchor, found, len(labels))))

    def rounded(self, count):
        return -(-count // self.unit) * self.unit


def power(count):
    """The least power of two that is no smaller."""
    return 1 << (count - 1).bit_length()


def even(n, longest, rows):
    """Bounds (rows + 1,) of n tokens in rows of `longest`: of a longer one, attention would leave the end unwritten in its results."""
    bounds = [min(i * longest, n) for i in range(rows + 1)]
    assert bounds[-1] == n
    return bounds


class Recorded:
    """The passes over a micro-batch of one size: what they read, what they leave, and their graphs."""

    def __init__(self, graphs, n, m, rows, longest, byproducts, temperature, unkeyed):
        device = graphs.twin.lm_head.weight.device
        sizes = {"input_ids": (1, n), "position_ids": (1, n), "predictors": (m,), "labels": (m,)} | ({} if unkeyed else {"keys": (n,)})
        self.given = {name: torch.zeros(shape, dtype=torch.long, device=device) for name, shape in sizes.items()}
        self.rows = Rows([n])
        self.rows.longest, self.rows.bounds = longest, torch.tensor(even(n, longest, rows), dtype=torch.int32, device=device)
        self.live = ("logps", *(name for name in byproducts if name == "live_entropy"))
        self.grads = [torch.zeros(m, device=device) for _ in self.live]
        self.anchor = torch.zeros((), device=device, requires_grad=True)

        def forward():
            return graphs.plain(**self.given, rows=self.rows, byproducts=byproducts, temperature=temperature)

        def backward(out):
            torch.autograd.backward([out[name] for name in self.live], self.grads)

        graphs.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(graphs.stream):
            for _ in range(2):  # compiles and tunes what needs it; with gradients of 0 nothing is added
                backward(forward())
        torch.cuda.current_stream().wait_stream(graphs.stream)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        how = {"pool": graphs.pool, "stream": graphs.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward, **how):
            out = forward()
        with torch.cuda.graph(self.backward, **how):
            backward(out)
        self.out = {name: value.detach() for name, value in out.items()}

    def fill(self, given, bounds):
        """Put a micro-batch in its place, and zeros behind it."""
        for name, place in self.given.items():
            flat = place.flatten()
            flat[: given[name].numel()].copy_(given[name].flatten())
            flat[given[name].numel() :].zero_()
        self.rows.bounds.copy_(moved(bounds, self.rows.bounds.device))


class Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, recorded, count):
        recorded.forward.replay()
        ctx.recorded, ctx.count = recorded, count
        out = {name: value[:count].clone() for name, value in recorded.out.items()}
        ctx.mark_non_differentiable(*(value for name, value in out.items() if name not in recorded.live))
        ctx.live = [i for i, name in enumerate(out) if name in recorded.live]
        return tuple(out.values())

    @staticmethod
    def backward(ctx, *grads):
        for place, i in zip(ctx.recorded.grads, ctx.live):
            place.zero_()
            if grads[i] is not None:
                place[: ctx.count].copy_(grads[i])
        ctx.recorded.backward.replay()
        return None, None, None
