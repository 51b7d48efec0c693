"""The loop: one optimizer step after another, for every algorithm.

Counts are summed over all micro-batches and ranks before any loss is computed, so each loss is a sum divided by global totals, and the
gradients of micro-batches and ranks simply add up. Nothing here knows an algorithm by name.
"""

import math
import re
import time

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from models.generate import greedy
from models.logprobs import token_logps
from models.sharding import moved
from train import peers


def train(
    model,
    algorithm,
    settings,
    source,
    optimizer,
    lr,
    first,
    last,
    *,
    num_tokens,
    max_grad_norm,
    stopping,
    check,
    report,
    work=None,
    peak=None,
):
    """Optimizer steps `first` to `last`. Returns "finished", or "preempted" after the step in which `stopping()` was true on any rank.

    source: generator of train.batches.Step. lr: step -> learning rate. num_tokens: seen before `first`. check(step, metrics): called
    before each update, to stop the run by raising. report(step, metrics, preempted): called on every rank after each update, to log,
    evaluate and save. work, peak: a models.flops.Work and a device's FLOP/s, for the log. Raises FloatingPointError before the update
    where loss or gradient norm is not finite.
    """
    device = model.lm_head.weight.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in range(first, last + 1):
        began = time.perf_counter()
        peers.now(f"step {step}: drawing rows")
        micro_batches, _, known = next(source)
        waited = time.perf_counter() - began
        peers.now(f"step {step}: training")
        totals = total_counts(algorithm, micro_batches, stopping(), work)
        preempted = totals.pop("stopping") > 0
        optimizer.zero_grad()
        metrics = accumulate(model, algorithm, settings, micro_batches, totals, device, backward=True)
        norm = get_total_norm([p.grad for p in parameters])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        metrics = summed(metrics, device) | {"grad_norm": float(norm)} | known
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise FloatingPointError(
                f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: not finite, so training stopped before the "
                f"update (rows {known.get('rows')}). Likely causes: a learning rate too high, or broken weights or data"
            )
        check(step, metrics)
        if max_grad_norm:
            clip_grads_with_norm_(parameters, max_grad_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.step()
        num_tokens += int(totals["all_tokens"])
        metrics |= {"learning_rate": lr(step), "num_tokens": num_tokens}
        metrics |= speeds(totals, time.perf_counter() - began, waited, device, peak)
        report(step, metrics, preempted)
        if preempted:
            return "preempted"
    return "finished"


def evaluate(model, algorithm, settings, micro_batches):
    """The loss and metrics of one pass over micro-batches, as of one step that holds them all."""
    model.eval()
    totals = total_counts(algorithm, micro_batches, False)
    with torch.no_grad():
        device = model.lm_head.weight.device
        sums = accumulate(model, algorithm, settings, peers.between(micro_batches), totals, device, backward=False)
        metrics = summed(sums, device)
    model.train()
    return metrics


def total_counts(algorithm, micro_batches, stopping, work=None):
    """What the step's losses divide by, summed over micro-batches and ranks; with it `stopping`, all tokens and, of `work`, FLOPs.

    Raises ValueError where no token is trained: fixed data has nothing to learn from, while of sampled rows the next may.
    """
    mine = {"stopping": float(stopping), "all_tokens": 0.0, "trained_tokens": 0.0}
    for batch in micro_batches:
        weight = weight_of(batch)
        mine["all_tokens"] += weight * float(batch["attention_mask"].sum())
        mine["trained_tokens"] += weight * float(batch["loss_mask"].sum())
        for name, value in (algorithm.counts(batch) | (work.of(batch) if work else {})).items():
            mine[name] = mine.get(name, 0.0) + weight * float(value)
    sums = torch.tensor(list(mine.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    totals = dict(zip(mine, sums.tolist()))
    if not totals["trained_tokens"] and algorithm.ROWS != "prompts":
        raise ValueError("no token of the step is trained: see the masks of data.train, and data.max_length")
    return totals


def accumulate(model, algorithm, settings, micro_batches, totals, device, backward):
    """This rank's share of the step's loss and metrics (0-d tensors), and of its gradients where `backward`."""
    replica, sums = getattr(model, "replica", None), {}
    if replica:
        replica.begin(model.training)
    scale = 1 if replica else dist.get_world_size()  # FSDP averages over ranks what must be summed
    for batch in micro_batches:
        weight = weight_of(batch)
        try:
            scored = token_logps(replica.twin if replica else model, batch, algorithm.byproducts(settings))
            on_device = {name: moved(t, device) for name, t in batch.items()}
            loss, metrics = algorithm.loss(scored.pop("logps"), on_device | scored, totals, settings)
            if backward:
                (loss * (weight * scale)).backward()
        except torch.OutOfMemoryError as e:
            lengths = batch["attention_mask"].sum(-1)
            what = f"a micro-batch of {len(lengths)} rows, {int(lengths.sum())} tokens, the longest row of {int(lengths.max())}"
            cure = "lower train.micro_batch_tokens, or set fsdp.activation_checkpointing or fsdp.reshard_after_forward"
            raise torch.OutOfMemoryError(f"{what}, did not fit: {cure} ({e})") from e
        for name, value in ({"loss": loss} | metrics).items():
            sums[name] = sums.get(name, 0) + weight * torch.as_tensor(value, device=device).detach().double()
    if replica and backward:
        replica.end()
    return sums


def weight_of(batch):
    return 0.0 if "placeholder" in batch else 1.0


def summed(metrics, device):
    """Metrics added up over ranks, as floats."""
    names = sorted(metrics)
    values = torch.stack([metrics[name] for name in names])
    dist.all_reduce(values)
    return dict(zip(names, values.tolist()))


def speeds(totals, seconds, waited, device, peak):
    """How fast the step was, of all ranks together; these numbers of a step, and no others, change from run to run."""
    speed = {"step_time": seconds, "data_time": waited, "data_time_share": waited / seconds}
    speed |= {"tokens_per_second": totals["all_tokens"] / seconds, "loss_tokens_per_second": totals["trained_tokens"] / seconds}
    if peak:
        share = seconds * peak * dist.get_world_size()
        speed |= {"mfu": totals["flops"] / share, "mfu_noncausal": totals["flops_noncausal"] / share}
    if device.type == "cuda":
        speed["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        speed["reserved_memory_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return speed


def answer(model, tokenizer, rows, cfg):
    """Answer the first `cfg.generate` prompts of held-out `rows` greedily. Returns ({"exact_match": fraction}, rank 0's samples).

    A row's prompt is what stands before its first trained token, its reference the trained text; an answer labelled bad is none.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    prompts, samples = [], []
    firsts = torch.arange(0, len(rows) * rows.rows_per_example, rows.rows_per_example)  # of a pair the chosen row
    if "desirable" in rows.columns:
        firsts = firsts[rows.columns["desirable"][firsts].bool()]
    for i in firsts[: cfg.generate][rank::ranks].tolist():
        ids, mask = rows.row(i)  # (T,), (T,)
        start = int(mask.int().argmax())
        prompts.append(ids[:start].tolist())
        reference = tokenizer.decode(ids[mask], skip_special_tokens=True).strip()
        samples.append({"prompt": tokenizer.decode(prompts[-1]), "reference": reference})
    answers = greedy(model, tokenizer, prompts, cfg.max_new_tokens, stopping=peers.asked)
    peers.together()
    for sample, ids in zip(samples, answers):
        sample["answer"] = tokenizer.decode(ids, skip_special_tokens=True).strip()
        wanted = compared(sample["reference"], cfg.answer_pattern)
        if wanted is None:
            raise ValueError(f"evaluation.answer_pattern: {cfg.answer_pattern!r} is not in the reference answer {sample['reference']!r}")
        sample["match"] = compared(sample["answer"], cfg.answer_pattern) == wanted
    score = torch.tensor([sum(s["match"] for s in samples), len(samples)], dtype=torch.float64)
    dist.all_reduce(score)
    return {"exact_match": float(score[0] / score[1])} if score[1] else {}, samples


def compared(text, pattern):
    """What of an answer is compared: all of it, or the pattern's last match (its first group, if it has one) without commas; or None."""
    if pattern is None:
        return text
    found = re.findall(pattern, text)
    if not found:
        return None
    return (found[-1] if isinstance(found[-1], str) else found[-1][0]).replace(",", "")
