"""Train a model: `torchrun --standalone --nproc-per-node 2 launch/train.py [--config recipe.yaml] [--train.max_steps 100 ...]`.

One run from top to bottom: settings, ranks, data, model, optimizer, resume, loop, export. Run the same command again after a kill
and it goes on where it stood.
"""

import dataclasses
import itertools
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from algorithms import dpo, grpo, kto, orpo, sft, simpo
from models import flops, load, lora, sharding
from train import batches, card, checkpoint, config, data, dry_run, log, loop, optim, peers, reference, rollouts, toy, trackers
from train.log import say

ALGORITHMS = {"sft": sft, "dpo": dpo, "simpo": simpo, "kto": kto, "orpo": orpo, "grpo": grpo}
STARTS = {  # models that the embedded SFT recipe makes: the options that it runs with
    "builtin:sft": [],
    "builtin:short_sft": ["--output_dir=runs/short_sft", "--train.max_steps=120"],  # GRPO needs something left to learn
}


def main():
    cfg = config.parse()
    if asked := config.dry_run():
        if os.environ.get("RANK", "0") == "0":
            here = "cuda" if torch.cuda.is_available() else "cpu"
            sys.exit(dry_run.show(cfg, ALGORITHMS[cfg.algorithm], asked[0], asked[1] or here))
        return
    device = sharding.start_ranks(cfg.fsdp.timeout_seconds)
    peers.begin()
    progress = {}
    try:
        try:
            if cfg.model.model_name_or_path in STARTS:
                cfg = after_sft(cfg, device)
            state = run(cfg, device, progress)
        except peers.Preempted:  # in a reference pass, or in the SFT run; nothing is lost
            state = "preempted"
        if progress:
            log.write_status(cfg.output_dir, state, progress["step"])
    except BaseException as e:
        expected, where = isinstance(e, (ValueError, FloatingPointError, checkpoint.SaveError)), peers.here["phase"]
        words = str(e) if expected else f"failed in {where!r}: {traceback.format_exc()}"
        print(f"rank {dist.get_rank()}: {words}", file=sys.stderr, flush=True)
        if missing := peers.lost(e):
            print(missing, file=sys.stderr, flush=True)
        if progress:  # a run that was refused leaves the status of the run that stands in its output_dir
            log.write_status(cfg.output_dir, "failed", progress["step"], missing or f"{type(e).__name__}: {e}")
        os._exit(2 if isinstance(e, ValueError) else 1)  # the launcher ends the other ranks, which may wait for this one
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a bare interpreter exit after gloo sometimes aborts


def run(cfg, device, progress):
    """The run that `cfg` describes; returns "finished" or "preempted". progress["step"], once it writes, is the last finished step."""
    peers.now("reading model and data")
    trackers.check(cfg.log)
    algorithm, settings = ALGORITHMS[cfg.algorithm], getattr(cfg, cfg.algorithm)
    checkpoint.claim(cfg.output_dir)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    resumed, folder, tokenizer, rows, held_out, record = read_inputs(cfg, algorithm, settings, device)
    judges = rollouts.start_rewards(cfg, rows, held_out) if algorithm.ROWS == "prompts" else None
    before = checkpoint.read_state(resumed) if resumed else {"step": 0}
    progress["step"] = saved = before["step"]
    if rank == 0:
        Path(cfg.output_dir, "config.yaml").write_text(config.to_yaml(cfg))
        log.write_status(cfg.output_dir, "running", progress["step"])

    model = load.build(cfg.model, folder, cfg.fsdp, device, cfg.seed, cfg.lora)
    for part in (rows, held_out) if held_out else (rows,):
        load.check_vocabulary(model, part.report["max_token_id"])
    parameters, trained, held = load.size(model)
    dealt = (cfg.train.micro_batch_tokens, rank, ranks, batches.attention_share(model.config, parameters))
    first = progress["step"] + 1
    last = record["steps"]
    journal = log.Log(cfg.output_dir, cfg.log, config.as_dict(cfg), first, last, saved if "unevaluated" in before else None)
    exported = 4 * trained if cfg.lora.r else parameters * (model.config.dtype or torch.float32).itemsize
    size = int(trained * (4 + optim.STATE_BYTES[cfg.train.optim])) + (4 * trained if cfg.reference.sync_ref_model else 0)
    saves = len([s for s in range(first, last + 1) if s == last or due(s, cfg.checkpoint.save_steps)])
    checkpoint.check_space(cfg.output_dir, cfg.checkpoint, size, exported, saves)
    peers.now("reference log-probs")
    rows, held_out, follower = with_reference(cfg, algorithm, settings, model, folder, device, record, dealt, rows, held_out)
    changing = follower if cfg.reference.sync_ref_model else None  # what checkpoints must keep
    sampler = rollouts.Rollouts(cfg, folder, model, tokenizer, rows, judges, dealt, journal) if judges else None
    optimizer = optim.make_optimizer(model, cfg.train)
    state = checkpoint.load(resumed, model, optimizer, changing) if resumed else {"num_tokens": 0}
    saver = checkpoint.Saver(cfg.output_dir, cfg.checkpoint, model, optimizer, changing)
    if sampler and resumed:
        sampler.restore(Path(resumed), state)
    steps = f"steps {first} to {last}" if first <= last else f"all {last} steps are done"
    say(
        f"{parameters:,} parameters, {trained:,} of them trained, {held / parameters:.3f} bytes each on a rank; {ranks} x {device.type}, "
        f"{model.config._attn_implementation} attention; {steps}"
    )

    def complete(step):
        step = reference.live(step, follower) if follower else step
        return batches.with_statistics(step, model, algorithm, settings)

    def source():
        stream = sampler.steps(first) if sampler else batches.offline_steps(rows, cfg.train, cfg.seed, first, *dealt[1:])
        for number, drawn in zip(itertools.count(first), stream):  # drawn first: a rollout that is preempted comes again
            if changing and number > 1 and due(number - 1, cfg.reference.ref_model_sync_steps):
                reference.follow(follower, model, cfg.reference.ref_model_mixup_alpha)
            yield complete(drawn)

    def test(step):
        peers.now(f"step {step}: evaluation")
        return evaluate(cfg, algorithm, model, tokenizer, sampler, complete, held_out, dealt, journal, step, last) if held_out else {}

    def check(step, metrics):
        if sampler:
            sampler.check(step, metrics)
        elif step == 1 and algorithm.REFERENCE and cfg.reference.model_name_or_path is None:
            reference.check_first_step(metrics, settings.beta)

    def save(step, more):
        nonlocal saved
        peers.now(f"step {step}: saving")
        files, numbers = sampler.kept(step) if sampler else ({}, {})
        saver.save(step, record | {"num_tokens": state["num_tokens"]} | numbers | more, files)
        saved = step

    def report(step, metrics, preempted):
        progress["step"], state["num_tokens"], owed = step, metrics["num_tokens"], {}
        if step == last or due(step, cfg.evaluation.steps):
            try:
                metrics |= test(step)
            except peers.Preempted:  # the next start evaluates, and writes the line of this step
                owed = {"unevaluated": metrics}
        if not owed:
            journal.write(step, metrics)
        if step == last or preempted or owed or due(step, cfg.checkpoint.save_steps):
            save(step, owed)
        if owed:
            raise peers.Preempted

    outcome = "preempted"
    with suppress(peers.Preempted):
        if first == 1:
            journal.scalars(0, test(0))
        if "unevaluated" in before:
            journal.write(saved, before["unevaluated"] | test(saved))
        outcome = loop.train(
            *(model, algorithm, settings, source(), optimizer, lambda step: optim.learning_rate(cfg.train, last, step), first, last),
            num_tokens=state["num_tokens"],
            max_grad_norm=cfg.train.max_grad_norm,
            stopping=peers.asked,
            check=check,
            report=report,
            work=flops.Work(model),
            peak=flops.peak(device, sharding.compute_dtype(cfg.model.dtype, device)),
        )
    if progress["step"] > saved:  # preempted in a rollout
        save(progress["step"], {})
    saver.finish()
    for part in (journal, sampler):
        if part:
            part.close()
    peers.now("export")
    if outcome == "finished":
        save = lora.save_adapter if cfg.lora.r else load.save_pretrained
        save(model, tokenizer, Path(cfg.output_dir, "final"))
        if rank == 0:
            card.write(cfg, record["data"], rows.report)
        say(f"wrote {cfg.output_dir}/final, {'an adapter for peft' if cfg.lora.r else 'a Hugging Face folder'}")
    checkpoint.release(cfg.output_dir)
    return outcome


def with_reference(cfg, algorithm, settings, model, folder, device, record, dealt, rows, held_out):
    """(rows, held-out rows, live reference or None): rows with reference log-probs, unless the reference must score what is yet to come."""
    if not (algorithm.REFERENCE and settings.beta):
        return rows, held_out, None
    if cfg.reference.sync_ref_model or algorithm.ROWS == "prompts":
        return rows, held_out, reference.live_model(cfg, model, folder, device)
    parts = (part and reference.with_logps(part, model, record["reference"], cfg, folder, device, dealt) for part in (rows, held_out))
    return *parts, None


def read_inputs(cfg, algorithm, settings, device):
    """Everything that a run begins with: (checkpoint or None, model folder, tokenizer, rows, held-out rows or None, record).

    record is what a checkpoint keeps of them. ValueError where a checkpoint was made with others.
    """
    resumed = find_checkpoint(cfg)
    folder = toy.folder(cfg.model, cfg.output_dir) or load.fetch(cfg.model)
    tokenizer = load.load_tokenizer(cfg.model, folder)
    rows = prepare(cfg, "train", cfg.data.train, cfg.data.train_split, tokenizer, algorithm, settings)
    held_out = prepare(cfg, "eval", cfg.data.eval, cfg.data.eval_split, tokenizer, algorithm, settings) if cfg.data.eval else None
    record = {
        "config": config.as_dict(cfg),
        "data": rows.fingerprint,
        "folder": str(Path(folder).resolve()),
        "ranks": dist.get_world_size(),
        "steps": batches.steps_in(len(rows), cfg.train, *(rollouts.sizes(cfg) if algorithm.ROWS == "prompts" else ())),
        "weights": reference.weights_of(folder),
        "rewards": rollouts.reward_files(cfg) if algorithm.ROWS == "prompts" else {},
    }
    if algorithm.REFERENCE and settings.beta:
        record["reference"] = reference.key_of(cfg, folder, device)
    if resumed:
        checkpoint.check_inputs(checkpoint.read_state(resumed), record)
    return resumed, folder, tokenizer, rows, held_out, record


def after_sft(cfg, device):
    """The config with the embedded SFT run's result as its model; that run is made first where it is not there yet."""
    first = config.parse(["--config", str(config.RECIPES / "sft.yaml"), *STARTS[cfg.model.model_name_or_path]])
    final = Path(first.output_dir, "final")
    if not final.exists():
        say(f"{final} is not there yet: running the SFT recipe first")
        progress = {}
        outcome = run(first, device, progress)
        log.write_status(first.output_dir, outcome, progress["step"])
        if outcome == "preempted":
            raise peers.Preempted
        if outcome != "finished":
            raise ValueError(f"the SFT run in {first.output_dir} was {outcome}; run the same command again")
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, model_name_or_path=str(final)))


def due(step, every):
    return bool(every) and step % every == 0


def evaluate(cfg, algorithm, model, tokenizer, sampler, complete, held_out, dealt, journal, step, last):
    """Held-out loss, or rewards, and generated answers, as `eval/` metrics; the last evaluation shows three answers."""
    metrics, samples = {}, []
    peers.together()  # before a reference scores all held-out rows
    if not sampler:
        held = complete(batches.Step(batches.micro_batches(held_out, range(len(held_out)), *dealt), len(held_out), {}))
        metrics = loop.evaluate(model, algorithm, getattr(cfg, cfg.algorithm), held.micro_batches)
    if cfg.evaluation.generate:
        scores, samples = sampler.evaluate(held_out) if sampler else loop.answer(model, tokenizer, held_out, cfg.evaluation)
        metrics |= scores
    metrics = {f"eval/{name}": value for name, value in metrics.items()}
    journal.samples(step, samples)
    for sample in samples[:3] if step == last else ():
        say("\n".join(f"{name}: {text}" for name, text in sample.items()) + "\n")
    say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return metrics


def find_checkpoint(cfg):
    """The checkpoint to go on from, or None to begin."""
    resume, used = cfg.checkpoint.resume, checkpoint.found(cfg.output_dir)
    if resume == "never" and used:
        raise ValueError(f"checkpoint.resume: never, but {cfg.output_dir} holds {len(used)} checkpoints; choose another output_dir")
    if resume in ("auto", "never"):
        folder = checkpoint.newest(cfg.output_dir, say)
    else:
        folder, problem = Path(resume), checkpoint.verify(resume)
        if problem:
            raise ValueError(f"checkpoint.resume: {resume}: {problem}")
        later = [step for step in used if step > checkpoint.read_state(folder)["step"]]
        if later:
            raise ValueError(f"checkpoint.resume: {cfg.output_dir} has a later checkpoint-{later[0]}; choose another output_dir")
    if folder:
        say(f"resuming from {folder}")
    os.makedirs(cfg.output_dir, exist_ok=True)
    return folder


def prepare(cfg, part, source, split, tokenizer, algorithm, settings):
    """The tokenised rows of data.train or data.eval; the first rank of each host makes them, the others read its file."""
    path = Path(cfg.output_dir, "data", f"{part}.safetensors")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        rows = data.prepare(source, split, cfg.data, tokenizer, algorithm.ROWS)
        path.parent.mkdir(exist_ok=True)
        rows.save(path)
        say(f"data.{part}: " + ", ".join(f"{name} {value}" for name, value in rows.report.items()))
        if part == "train":
            say(data.show(rows, tokenizer))
    dist.barrier()
    rows = data.Rows.load(path)
    if getattr(algorithm, "SCORES_PROMPT", False):
        rows = data.scoring_prompts(rows)
    if algorithm.ROWS == "labelled" and algorithm.needs_step(settings):
        rows = data.with_mismatched(rows, cfg.data.max_length)
    if algorithm.ROWS != "prompts":
        batches.check_budget(rows, cfg.train.micro_batch_tokens)
    return rows


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
