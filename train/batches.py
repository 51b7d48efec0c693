"""Generators that yield what one optimizer step trains on: this rank's micro-batches.

A step has the same examples on any hardware. They are dealt over ranks and micro-batches so that no micro-batch exceeds
`train.micro_batch_tokens` and the work of the ranks is even; every rank gets the same number of micro-batches, some perhaps empty.
"""

import math
import zlib
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from models.dropout import row_keys
from models.logprobs import token_logps


class Step(NamedTuple):
    micro_batches: list[dict]
    """Batches of rows, on the CPU. One that carries `placeholder` keeps this rank in step with the others and weighs nothing."""
    examples: int
    """Examples of the whole step, over all ranks."""
    metrics: dict
    """What the source itself knows of the step, equal on all ranks."""


def steps_in(examples, train, size=None, repeats=1):
    """Optimizer steps of the run; the last step of an epoch may be short, none reaches across epochs.

    GRPO: `size` prompts make a rollout, which is trained on for `repeats` steps.
    """
    if train.max_steps is not None:
        return train.max_steps
    return math.ceil(train.num_train_epochs * math.ceil(examples / (size or train.global_batch_size))) * repeats


def examples_of(step, examples, batch_size, seed):
    """Indices of the examples of step `step` (from 1): a pure function, so a resumed run neither repeats nor skips."""
    per_epoch = math.ceil(examples / batch_size)
    epoch, within = divmod(step - 1, per_epoch)
    return order(examples, seed + epoch)[within * batch_size : (within + 1) * batch_size]


@lru_cache(maxsize=2)
def order(examples, seed):
    """TRL's order of an epoch for the same seed."""
    return torch.randperm(examples, generator=torch.Generator().manual_seed(seed)).tolist()


def offline_steps(rows, train, seed, first, rank, ranks, quadratic):
    """Endless steps over fixed rows, from step `first` on."""
    step = first
    while True:
        chosen = examples_of(step, len(rows), train.global_batch_size, seed)
        dealt = micro_batches(rows, chosen, train.micro_batch_tokens, rank, ranks, quadratic)
        dealt = [batch | {"row_keys": row_keys(seed, step, numbers(batch))} for batch in dealt]
        yield Step(dealt, len(chosen), {"rows": fingerprint(chosen)})
        step += 1


def micro_batches(rows, chosen, budget, rank, ranks, quadratic):
    """This rank's share of the examples `chosen`, as batches."""
    k = rows.rows_per_example
    lengths = [int(rows.lengths[i * k : i * k + k].sum()) for i in chosen]
    work = [int((n + quadratic * n * n).sum()) for n in (rows.lengths[i * k : i * k + k].double() for i in chosen)]
    return [collate(rows, chosen, bin) for bin in deal(lengths, work, budget, ranks)[rank]]


def numbers(batch):
    """(R,) numbers of a batch's rows in the step."""
    k = len(batch["input_ids"]) // len(batch["positions"])
    return (batch["positions"][:, None] * k + torch.arange(k)).flatten()


def check_budget(rows, budget):
    """ValueError where one example is longer than a micro-batch may be; its rows stay together."""
    longest = int(rows.lengths.view(-1, rows.rows_per_example).sum(-1).max())
    if longest > budget:
        raise ValueError(f"train.micro_batch_tokens: {budget} is less than the {longest} tokens of the longest example; raise it")


def deal(lengths, work, budget, ranks):
    """Bins of positions: `deal(...)[rank][i]` lists what rank `rank` computes in its i-th micro-batch; all ranks have equally many.

    Heaviest first, each to the least loaded bin that has room; the fewest bins with which that succeeds.
    """
    assert max(lengths) <= budget, "check_budget comes first"
    heaviest_first = sorted(range(len(lengths)), key=lambda j: (-work[j], j))
    count = math.ceil(sum(lengths) / (budget * ranks))
    while (bins := fill(lengths, work, budget, count * ranks, heaviest_first)) is None:
        count += 1
    bins.sort(key=lambda b: (-sum(work[j] for j in b), b))
    rounds = [bins[i : i + ranks] for i in range(0, len(bins), ranks)]  # micro-batches of one round weigh about the same
    return [[sorted(r[rank if i % 2 == 0 else ranks - 1 - rank]) for i, r in enumerate(rounds)] for rank in range(ranks)]


def fill(lengths, work, budget, count, order):
    bins, tokens, load = [[] for _ in range(count)], [0] * count, [0] * count
    for j in order:
        room = [b for b in range(count) if tokens[b] + lengths[j] <= budget]
        if not room:
            return None
        b = min(room, key=load.__getitem__)
        bins[b].append(j)
        tokens[b] += lengths[j]
        load[b] += work[j]
    return bins


def collate(rows, chosen, positions):
    """A batch of the examples of a step (`chosen`) at `positions`, right-padded; of none, a placeholder with a real batch's keys."""
    k = rows.rows_per_example
    index = [chosen[p] * k + j for p in positions or [0] for j in range(k)]
    ids, masks = zip(*(rows.row(i) for i in index))
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),  # (R, T)
        "attention_mask": pad_sequence([torch.ones_like(m) for m in masks], batch_first=True),  # (R, T)
        "loss_mask": pad_sequence(masks, batch_first=True),  # (R, T)
        "positions": torch.tensor(positions or [0]),  # (examples,) in the step
    }
    cuts = [slice(int(rows.offsets[i]), int(rows.offsets[i + 1])) for i in index]
    batch |= {name: pad_sequence([flat[cut] for cut in cuts], batch_first=True) for name, flat in rows.per_token.items()}  # (R, T)
    batch |= {name: column[index] for name, column in rows.columns.items()} | rows.constants  # (R,), 0-d
    if not positions:
        batch = {name: t[:, :2] if t.ndim == 2 else t for name, t in batch.items()}
        masks = {name: torch.zeros_like(batch[name]) for name in ("loss_mask", "score_mask") if name in batch}
        batch |= masks | {"placeholder": torch.tensor(True)}
    return batch


def with_statistics(step, model, algorithm, settings):
    """The step with what its losses need to know of the other examples of all ranks: KTO's baseline, AOT's sorted partners.

    One pass without gradients: `algorithm.summary` of each micro-batch, gathered in the step's order, and `algorithm.spread` of it all.
    Labelled rows are followed by mismatched ones (train.data.with_mismatched), which serve here alone.
    """
    interleaved, table, kept = algorithm.ROWS == "labelled", None, []
    wanted = getattr(algorithm, "SUMMARY_OF", ())
    for batch in step.micro_batches:
        seen = every_second(batch, 1) if interleaved else batch
        with torch.no_grad():
            scored = {name: t.cpu() for name, t in token_logps(model, seen, wanted).items()}  # (R, T) each
        summary = algorithm.summary(scored.pop("logps"), seen | scored, settings).double()  # (examples, k)
        table = torch.zeros(step.examples, summary.shape[1], dtype=torch.float64) if table is None else table
        if "placeholder" not in batch:
            table[batch["positions"]] = summary
        kept.append(every_second(batch, 0) if interleaved else batch)
    dist.all_reduce(table)
    columns = {name: c.float() for name, c in algorithm.spread(table, settings).items()}  # (B, ...) each
    return step._replace(micro_batches=[b | {name: c[b["positions"]] for name, c in columns.items()} for b in kept])


def every_second(batch, first):
    """Rows first, first + 2, ... of a batch; what is kept per example, or once, stays."""
    rows = len(batch["input_ids"])
    return {name: t[first::2] if t.ndim and len(t) == rows and name != "positions" else t for name, t in batch.items()}


def fingerprint(chosen):
    """Eight hex digits that tell one step's examples from another's."""
    return f"{zlib.crc32(','.join(map(str, chosen)).encode()):08x}"


def attention_share(config, parameters):
    """Work of attention per token and token of context, relative to the rest's per token: the coefficient of length squared."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers * heads * width / parameters
