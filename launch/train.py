"""Train a model: `torchrun --standalone --nproc-per-node 2 launch/train.py [--config recipe.yaml] [--train.max_steps 100 ...]`.

One run from top to bottom: settings, ranks, data, model, optimizer, resume, loop, export. Run the same command again after a kill
and it goes on where it stood.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from algorithms import sft
from models import load, sharding
from train import batches, checkpoint, config, data, log, loop, optim, toy
from train.log import say

ALGORITHMS = {"sft": sft}


def main():
    cfg = config.parse()
    device = sharding.start_ranks(cfg.fsdp.timeout_seconds)
    progress = {"step": 0}
    try:
        state = run(cfg, device, progress)
        log.write_status(cfg.output_dir, state, progress["step"])
    except BaseException as e:
        expected = isinstance(e, (ValueError, FloatingPointError))
        print(f"rank {dist.get_rank()}: {e}" if expected else traceback.format_exc(), file=sys.stderr, flush=True)
        os.makedirs(cfg.output_dir, exist_ok=True)
        log.write_status(cfg.output_dir, "failed", progress["step"], f"{type(e).__name__}: {e}")
        os._exit(1)  # the launcher ends the other ranks, which may wait for this one
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a bare interpreter exit after gloo sometimes aborts


def run(cfg, device, progress):
    """The run that `cfg` describes; returns "finished" or "preempted". progress["step"] follows the last finished step."""
    algorithm, settings = ALGORITHMS[cfg.algorithm], getattr(cfg, cfg.algorithm)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    stop = catch_signals()
    resumed = find_checkpoint(cfg)
    folder = toy.folder(cfg.model, cfg.output_dir) or load.fetch(cfg.model)
    tokenizer = load.load_tokenizer(cfg.model, folder)
    rows = prepare(cfg, "train", tokenizer, algorithm.ROWS)
    held_out = prepare(cfg, "eval", tokenizer, algorithm.ROWS) if cfg.data.eval else None
    inputs = {"config": config.as_dict(cfg), "data": rows.fingerprint}
    if resumed:
        checkpoint.check_inputs(checkpoint.read_state(resumed), inputs)
    last = batches.steps_in(len(rows), cfg.train)

    model = load.build(cfg.model, folder, cfg.fsdp, device, cfg.seed)
    parameters = sum(p.numel() for p in model.parameters())
    load.check_vocabulary(model, rows.report["max_token_id"])
    optimizer = optim.make_optimizer(model, cfg.train)
    first, num_tokens = 1, 0
    if resumed:
        state = checkpoint.load(resumed, model, optimizer)
        first, num_tokens = state["step"] + 1, state["num_tokens"]
    progress["step"] = first - 1
    say(f"{parameters:,} parameters on {ranks} x {device.type}; {model.config._attn_implementation} attention; steps {first} to {last}")

    quadratic = batches.attention_share(model.config, parameters)
    source = batches.offline_steps(rows, cfg.train, cfg.seed, first, rank, ranks, quadratic)
    journal = log.Log(cfg.output_dir, cfg.log, first, last)

    def evaluate(step):
        if held_out is None:
            return {}
        held = batches.micro_batches(held_out, range(len(held_out)), cfg.train.micro_batch_tokens, rank, ranks, quadratic)
        metrics, samples = loop.evaluate(model, algorithm, settings, held), []
        if cfg.evaluation.generate:
            scores, samples = loop.answer(model, tokenizer, held_out, cfg.evaluation)
            metrics |= scores
        metrics = {f"eval/{name}": value for name, value in metrics.items()}
        journal.samples(step, samples)
        for sample in samples[: 3 * (step == last)]:
            say("\n".join(f"{name}: {text}" for name, text in sample.items()) + "\n")
        say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        return metrics

    def report(step, metrics, preempted):
        progress["step"] = step
        due = cfg.evaluation.steps and step % cfg.evaluation.steps == 0
        if step == last or (due and not preempted):
            metrics |= evaluate(step)
        journal.write(step, metrics)
        if step == last or preempted or (cfg.checkpoint.save_steps and step % cfg.checkpoint.save_steps == 0):
            record = inputs | {"num_tokens": metrics["num_tokens"], "folder": str(Path(folder).resolve()), "ranks": ranks}
            checkpoint.save(cfg.output_dir, step, model, optimizer, record, cfg.checkpoint.save_total_limit)

    if first == 1:
        journal.scalars(0, evaluate(0))
    state = loop.train(
        *(model, algorithm, settings, source, optimizer, lambda step: optim.learning_rate(cfg.train, last, step), first, last),
        num_tokens=num_tokens,
        max_grad_norm=cfg.train.max_grad_norm,
        stopping=lambda: bool(stop),
        report=report,
    )
    journal.close()
    if state == "finished":
        load.save_pretrained(model, tokenizer, Path(cfg.output_dir, "final"))
        say(f"wrote {cfg.output_dir}/final, a Hugging Face folder")
    return state


def find_checkpoint(cfg):
    """The checkpoint to go on from, or None to begin; writes the resolved config of a run that may start."""
    resume, used = cfg.checkpoint.resume, checkpoint.found(cfg.output_dir)
    if resume == "never" and used:
        raise ValueError(f"checkpoint.resume: never, but {cfg.output_dir} holds {next(iter(used.values())).name}; choose another output_dir")
    if resume in ("auto", "never"):
        folder = checkpoint.newest(cfg.output_dir, say)
    else:
        folder, problem = Path(resume), checkpoint.verify(resume)
        if problem:
            raise ValueError(f"checkpoint.resume: {resume}: {problem}")
    if folder:
        say(f"resuming from {folder}")
    if dist.get_rank() == 0:
        os.makedirs(cfg.output_dir, exist_ok=True)
        Path(cfg.output_dir, "config.yaml").write_text(config.to_yaml(cfg))
        log.write_status(cfg.output_dir, "running", 0)
    dist.barrier()
    return folder


def prepare(cfg, part, tokenizer, kind):
    """The tokenised rows of data.train or data.eval; the first rank of each host makes them, the others read its file."""
    path = Path(cfg.output_dir, "data", f"{part}.safetensors")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        rows = data.prepare(getattr(cfg.data, part), getattr(cfg.data, f"{part}_split"), cfg.data, tokenizer, kind)
        path.parent.mkdir(exist_ok=True)
        rows.save(path)
        say(f"data.{part}: " + ", ".join(f"{name} {value}" for name, value in rows.report.items()))
        if part == "train":
            say(data.show(rows, tokenizer))
    dist.barrier()
    return data.Rows.load(path)


def catch_signals():
    """A list that is no longer empty once SIGTERM or SIGUSR1 has come; a second signal ends the process."""
    received = []

    def handler(number, _):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handler)
    return received


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
