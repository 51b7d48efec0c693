"""What `--dry_run` shows before a run: a decoded example, the model's size, one rank's memory, steps, tokens and room on the disk.

The model stands on the meta device and a micro-batch goes forward through it there, so what autograd would keep is counted, not guessed.
No weights are read and no ranks are started.
"""

import math
import sys
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig

from models import load, logprobs, replica, sharding
from models.attention import Rows
from train import batches, data, optim, rewards, rollouts, toy

SAMPLE = 1000  # rows of data.train that are tokenised
ROOM = 0.9  # of a GPU's memory, for tensors; the rest is CUDA's, and what lies between them
NF4 = 0.5, (1 + 4 / 256) / 64  # bytes of a weight: sharded, and whole on every rank


class Memory(NamedTuple):
    """Bytes of one rank. Not all stand at once: `peak` is the most that does."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    gathered: float  # layers that are whole for a moment, and their gradients
    replica: float  # the whole model beside the shards, and where these are not the gradients themselves, the sums of its gradients
    rollouts: float
    peak: float


def show(cfg, algorithm, ranks, device):
    """Print it all; returns the exit code, 2 where the run would be refused. device: "cuda" or "cpu"."""
    try:
        for line in describe(cfg, algorithm, ranks, device):
            print(line, flush=True)
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


def describe(cfg, algorithm, ranks, device):
    """Lines of text, one after another as they become known. ValueError: what would end the run at its start."""
    sharding.check_ranks(cfg.fsdp.replicas, ranks)
    for words in cfg.grpo.reward_funcs if algorithm.ROWS == "prompts" else ():
        rewards.parse(words)
    shape, tokenizer = model_config(cfg.model), tokenizer_of(cfg.model)
    parts = {"train": sample(cfg, "train", algorithm, tokenizer), "eval": sample(cfg, "eval", algorithm, tokenizer)}
    for part, samples in parts.items():
        for rows in samples:
            yield f"data.{part}: " + ", ".join(f"{name} {value}" for name, value in rows.report.items())
            if part == "train":
                yield data.show(rows, tokenizer)
    model, samples = outline(cfg, shape, device), parts["train"]
    load.check_vocabulary(model, max(rows.report["max_token_id"] for rows in samples))
    counts, steps, tokens, share = extent(cfg, algorithm, samples)
    parts = math.ceil(tokens / steps / ranks / cfg.train.micro_batch_tokens)
    more = ranks, round(cfg.train.micro_batch_tokens * share), parts > 1, longest(cfg, samples)
    cfg = with_checkpointing(cfg, model, *more)
    found = memory(cfg, model, *more)
    everything, trained = count(model.parameters()), count(p for p in model.parameters() if p.requires_grad)
    kind, dtype = type(model).__name__, str(model.dtype).removeprefix("torch.")
    yield f"model: {kind}, {everything:,} parameters, {trained:,} of them trained, {dtype}, {ranks} x {device}"
    parts_of_it = ", ".join(f"{name} {in_words(value)}" for name, value in found._asdict().items() if value)
    how = f"{cfg.train.micro_batch_tokens} tokens at once, activation checkpointing {cfg.fsdp.activation_checkpointing}"
    yield f"memory of a rank, its tensors alone, with {how}: {parts_of_it}"
    size = cfg.train.global_batch_size
    if len(counts) > 1:
        shares = zip(data.sources_of(cfg.data, "train"), counts)
        yield "an epoch: " + ", ".join(f"{count:,} examples of {source[0]}" for source, count in shares)
    yield f"run: {sum(counts):,} examples, {steps:,} steps of {size}, {parts} micro-batches a rank and step, {tokens:,} tokens"
    saved, saves, final = on_disk(cfg, shape, everything, trained, steps)
    kept = cfg.checkpoint.save_total_limit or saves
    yield f"disk: {in_words(saved)} a checkpoint, of which {kept} are kept; {in_words(final)} for final/"


def written(cfg, algorithm):
    """What a run writes: (bytes of a checkpoint, how many times one is saved, bytes of final/). ValueError: as of `describe`."""
    shape, tokenizer = model_config(cfg.model), tokenizer_of(cfg.model)
    steps, model = extent(cfg, algorithm, sample(cfg, "train", algorithm, tokenizer))[1], outline(cfg, shape, "cpu")
    return on_disk(cfg, shape, count(model.parameters()), count(p for p in model.parameters() if p.requires_grad), steps)


def on_disk(cfg, shape, everything, trained, steps):
    """As `written`, of so many parameters and so many of them trained."""
    saved = trained * (4 + optim.STATE_BYTES[cfg.train.optim] + 4 * cfg.reference.sync_ref_model)
    final = trained * 4 if cfg.lora.r else everything * (shape.dtype or torch.float32).itemsize
    return saved, math.ceil(steps / (cfg.checkpoint.save_steps or steps)), final


def in_words(size):
    return f"{size / 2**30:.2f} GiB" if size > 2**27 else f"{size / 2**20:.2f} MiB"


def model_config(cfg):
    """The architecture, from a folder, from the hub, or of the embedded model."""
    name = cfg.model_name_or_path
    if name.startswith("builtin:"):
        return toy.model_config(embedded(name))
    return offered(AutoConfig, name, cfg)


def embedded(name):
    """The embedded model of this name; what the SFT default made of it has its shape."""
    return "tiny" if name.endswith("sft") else name.removeprefix("builtin:")


def tokenizer_of(cfg):
    name = cfg.model_name_or_path
    found = toy.tokenizer(embedded(name)) if name.startswith("builtin:") else offered(load.AutoTokenizer, name, cfg)
    return load.with_template(found, cfg.chat_template_path)


def offered(kind, name, cfg):
    try:
        return kind.from_pretrained(name, revision=cfg.model_revision, trust_remote_code=cfg.trust_remote_code)
    except Exception as e:  # of many types, from network to parsing
        first = str(e).splitlines()[0]
        raise ValueError(f"model.model_name_or_path: {name!r} cannot be read, here or from the hub: {type(e).__name__}: {first}") from e


def sample(cfg, part, algorithm, tokenizer):
    """The first rows of each source of data.train, or of data.eval, refused like all of them would be."""
    if part == "eval" and not cfg.data.eval:
        return []
    samples = [data.prepare(*source, tokenizer, algorithm.ROWS, SAMPLE) for source in data.sources_of(cfg.data, part)]
    for rows in samples if algorithm.ROWS != "prompts" else ():
        batches.check_budget(rows, cfg.train.micro_batch_tokens)
    return [data.scoring_prompts(rows) for rows in samples] if getattr(algorithm, "SCORES_PROMPT", False) else samples


def extent(cfg, algorithm, samples):
    """(each source's examples in an epoch, steps, tokens of the run, share of tokens that the head scores); samples stand for more."""
    lines = [sum(1 for _ in data.rows_of(*source)) for source in data.sources_of(cfg.data, "train")]
    counts = data.epoch_of([round(len(rows) * n / min(n, SAMPLE)) for rows, n in zip(samples, lines)], cfg.data.weights)
    weighed = [(count / len(rows) / sum(counts), rows) for count, rows in zip(counts, samples)]
    tokens = sum(weight * len(rows.input_ids) for weight, rows in weighed)
    scored = sum(weight * rows.per_token.get("score_mask", rows.loss_mask).sum().item() for weight, rows in weighed) / tokens
    sizes, examples = (), sum(counts)
    if algorithm.ROWS == "prompts":  # each answer as long as it may be
        sizes, answer = rollouts.sizes(cfg), cfg.grpo.max_completion_length
        tokens, scored = tokens + answer, answer / (tokens + answer)
    steps = batches.steps_in(examples, cfg.train, *sizes)
    per_step = min(cfg.train.global_batch_size, examples if algorithm.ROWS != "prompts" else math.inf)
    return counts, steps, round(steps * per_step * tokens), scored


def longest(cfg, samples):
    """Tokens of the longest row that is sampled."""
    return max(int(rows.lengths.max()) for rows in samples) + cfg.grpo.max_completion_length


def outline(cfg, shape, device):
    """The model on the meta device, in its compute dtype; what would be quantised is not yet."""
    dtype = sharding.compute_dtype(cfg.model.dtype, torch.device(device))
    model = load.outline(replace(cfg.model, quantization=None), shape, dtype, cfg.lora, f"counted_{device}")
    for p in model.parameters():
        p.data = p.data.to(dtype)  # as FSDP casts it for the forward pass
    return model.train()


def fitted(cfg, rows, algorithm, ranks):
    """The config of a run, with activation checkpointing by name where it was `auto`; rows: all that are trained on."""
    answer = cfg.grpo.max_completion_length if algorithm.ROWS == "prompts" else 0
    share = answer / (answer + int(rows.lengths.max())) or rows.per_token.get("score_mask", rows.loss_mask).float().mean().item()
    model = outline(cfg, model_config(cfg.model), "cuda" if torch.cuda.is_available() else "cpu")
    return with_checkpointing(cfg, model, ranks, round(cfg.train.micro_batch_tokens * share), True, int(rows.lengths.max()) + answer)


def with_checkpointing(cfg, model, *more):
    """`cfg` with the first kind of activation checkpointing under which `memory` fits into a GPU, if it has `auto`; none on a CPU."""
    if cfg.fsdp.activation_checkpointing != "auto":
        return cfg
    if model.config._attn_implementation != "counted_cuda":
        return replace(cfg, fsdp=replace(cfg.fsdp, activation_checkpointing="none"))
    room = ROOM * sharding.card()
    for kind in ("none", "selective", "full", "offload"):
        try:
            chosen = replace(cfg, fsdp=replace(cfg.fsdp, activation_checkpointing=kind))
        except ValueError:  # not with these settings
            continue
        taken = memory(chosen, model, *more).peak
        if taken <= room:
            return chosen
    cure = "lower train.micro_batch_tokens, set fsdp.reshard_after_forward: true, take more GPUs, or adapters (lora.r)"
    raise ValueError(f"fsdp.activation_checkpointing: auto: even offload needs {in_words(taken)} of {in_words(room)}; {cure}")


def memory(cfg, model, ranks, targets, accumulates, row_length=0):
    """What one rank needs for `targets` scored tokens of a full micro-batch; accumulates: a step has more than one micro-batch."""
    c, shards = model.dtype.itemsize, ranks // cfg.fsdp.replicas
    layers, head = sharding.decoder_layers(model), model.lm_head
    inside = {id(p) for layer in layers for p in layer.parameters()}

    def packed(p):
        return cfg.model.quantization and id(p) in inside and p.ndim == 2 and not p.requires_grad

    def stored(p):
        frozen = cfg.lora.r and not p.requires_grad
        return p.numel() * (NF4[0] / shards + NF4[1] if packed(p) else (c if frozen else 4) / shards)

    def whole(parameters):  # in the compute dtype
        return sum(p.numel() * (NF4[0] if packed(p) else c) for p in parameters)

    def trained(parameters):
        return count(p for p in parameters if p.requires_grad)

    weights, gradients = sum(map(stored, model.parameters())), 4 * trained(model.parameters()) / shards
    optimizer = optim.STATE_BYTES[cfg.train.optim] * trained(model.parameters()) / shards
    if cfg.reference.sync_ref_model or (cfg.algorithm == "grpo" and cfg.grpo.beta):
        weights *= 1 if cfg.lora.r else 2  # the live reference
    tied, root = sharding.is_tied(model), [p for p in model.parameters() if id(p) not in inside]
    open_ = [p for p in root if tied or p is not model.get_input_embeddings().weight]  # whole until the backward pass ends
    device = model.config._attn_implementation.removeprefix("counted_")
    copied = replica.wanted(cfg.model, cfg.fsdp, model, model.dtype, device, sharding.card())
    open_ += [] if cfg.fsdp.reshard_after_forward or copied else [p for layer in layers for p in layer.parameters()]
    activations, again = kept_by_autograd(model, cfg.train.micro_batch_tokens, targets, cfg.fsdp.activation_checkpointing)
    biggest = max(layers, key=lambda layer: count(layer.parameters()))
    reducing = 4 if copied else c + 4 + 4 / shards  # a gradient as it comes, the buffer that is reduced, this rank's part of the sum
    unpacked = c * max((p.numel() for p in biggest.parameters() if packed(p)), default=0)
    layer = whole(biggest.parameters()) * (2 if ranks > 1 else 1) + reducing * trained(biggest.parameters()) + unpacked
    layer += c * trained(head.parameters()) * tied  # a tied head's gradient waits for the embedding's
    scoring = reducing * trained(head.parameters())
    if cfg.model.logprobs == "chunked":
        cuda, kept = model.config._attn_implementation == "counted_cuda", keeps_table(model, targets)
        piece = min(targets * head.weight.shape[0], logprobs.SLICE["cuda" if cuda else "cpu"])  # of the table of tokens x vocabulary
        slope = 0 if kept else (4 + (c if cuda else c % 4)) * piece
        activations += c * targets * head.weight.shape[0] * kept
        scoring = max((4 if cuda else 8) * piece, slope + scoring)
    ending = whole(root) - whole(p for p in root if any(p is o for o in open_)) + (reducing + c * tied) * trained(root)
    earlier = gradients if accumulates else 0
    moments = [earlier + activations + scoring, earlier + activations + again + layer, gradients + ending]
    beside = 0
    if copied:
        alone = ranks == 1
        beside = sum(c * p.numel() for p in model.parameters() if p.requires_grad or not alone)
        beside += gradients if alone else 4 * trained(model.parameters())
        layer, open_ = c * max(p.numel() for p in biggest.parameters()) + c * trained(head.parameters()) * tied, []
        moments = [activations + scoring, activations + again + layer, 0 if alone else gradients]
    sampling = sampled(cfg, model, whole(model.parameters()), ranks, row_length) if cfg.algorithm == "grpo" else 0
    peak = weights + optimizer + beside + max(whole(open_) + max(moments), sampling)
    beside -= gradients * (copied and ranks == 1)  # which are named as such
    return Memory(weights, gradients, optimizer, activations, scoring, whole(open_) + layer, beside, sampling, peak)


def sampled(cfg, model, whole, ranks, row_length):
    """Bytes of the gathered model and of the caches of the completions that one rank decodes at once."""
    if cfg.rollout.engine != "in_process":
        return 0
    shape = model.config.get_text_config()
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    at_once = min(cfg.rollout.max_num_seqs, math.ceil(cfg.train.global_batch_size * cfg.grpo.steps_per_generation / ranks))
    token = 2 * shape.num_hidden_layers * (shape.num_key_value_heads or shape.num_attention_heads) * width * model.dtype.itemsize
    return whole + at_once * (row_length * token + 12 * shape.vocab_size)  # float32 logits, their order and their sums


def keeps_table(model, targets):
    """Whether the head's table of tokens x vocabulary waits for the backward pass."""
    head, device = model.lm_head, torch.device(model.config._attn_implementation.removeprefix("counted_"))
    return logprobs.keeps(targets, head.weight, (1.0, head.softcap, 1.0), (), device)


def kept_by_autograd(model, tokens, targets, checkpointing):
    """Bytes that a forward pass over `tokens` tokens keeps for the backward pass, and those that one layer makes again there.

    Each storage counts once, and weights not at all. checkpointing: as in the config's `fsdp` block.
    """
    weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    layers, kept, inputs, products = sharding.decoder_layers(model), {}, {}, Products()

    def keep(t):
        storage = t.untyped_storage()
        kept.setdefault(storage._cdata, (storage, products.layer))  # held, or another could have its number
        return t

    def enter(layer, args, kwargs):
        products.layer, hidden = id(layer), args[0].untyped_storage()
        inputs[hidden._cdata] = hidden

    def leave(*_):
        products.layer = None

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    ids, places = torch.zeros(1, tokens, dtype=torch.long, device="meta"), torch.zeros(targets, dtype=torch.long, device="meta")
    rows = Rows([tokens]).to("meta")
    keys = torch.zeros(tokens, dtype=torch.long, device="meta")
    with saved_tensors_hooks(keep, lambda t: t), products:
        try:
            model.score(ids, ids, places, places, rows, ("entropy",), 1.0, keys)
        except (RuntimeError, NotImplementedError) as e:
            raise ValueError(
                f"{type(model).__name__} chooses its work by its data (experts?), so what it keeps cannot be counted; leave --dry_run out "
                f"and name fsdp.activation_checkpointing ({str(e).splitlines()[0]})"
            ) from e
        finally:
            for hook in hooks:
                hook.remove()
    sizes = Counter({None: 0})
    for number, (storage, layer) in kept.items():
        sizes[layer] += storage.nbytes() * (number not in weights)
    outside, again = sizes.pop(None), max(sizes.values())
    if checkpointing == "none":
        return outside + sum(sizes.values()), 0
    if checkpointing == "offload":
        return outside, again
    outside += sum(storage.nbytes() for storage in inputs.values())
    more = products.bytes if checkpointing == "selective" else 0
    return outside + more, again - more / len(layers)


class Products(TorchDispatchMode):
    """Counts the bytes of what selective checkpointing keeps, while `layer` is one."""

    layer, bytes = None, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if self.layer and sharding.is_product(op):
            self.bytes += sum(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


def shapes_of_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of attention by shape: (1, heads, N, D) and one float32 number a token and head."""
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


attended = torch.library.custom_op("baretune::counted_attention", shapes_of_attention, mutates_args=())
attended.register_fake(shapes_of_attention)


class Counted(torch.autograd.Function):
    """What attention over packed rows keeps: query, key, value, its output and one number a token and head."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, sums = attended(q, k, v)
        ctx.save_for_backward(q, k, v, out, sums)
        return out


def counted_cpu(module, query, key, value, attention_mask, **kwargs):
    """As `attention.sdpa`: rows are put together, so the output is there twice."""
    return Counted.apply(query, key, value).transpose(1, 2), None


def counted_cuda(module, query, key, value, attention_mask, **kwargs):
    """As `attention.varlen`, whose output is already in the order that the next layer wants."""
    return Counted.apply(query, key, value).view(1, query.shape[2], query.shape[1], -1), None


def count(parameters):
    return sum(p.numel() for p in parameters)


AttentionInterface.register("counted_cpu", counted_cpu)
AttentionInterface.register("counted_cuda", counted_cuda)
