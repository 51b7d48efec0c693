"""Train a model: `torchrun --standalone --nproc-per-node 2 launch/train.py [--config recipe.yaml] [--train.max_steps 100 ...]`.

One run from top to bottom: settings, ranks, data, model, optimizer, resume, loop, export. Run the same command again after a kill
and it goes on where it stood.
"""

import dataclasses
import os
import sys
import traceback
from contextlib import suppress
from functools import partial
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
    "builtin:short_sft": ["--output_dir=runs/short_sft", "--train.max_steps=140"],  # GRPO needs something left to learn
}


def main():
    cfg = config.parse()
    if asked := config.dry_run():
        if os.environ.get("RANK", "0") == "0":
            here = "cuda" if torch.cuda.is_available() else "cpu"
            sys.exit(dry_run.show(cfg, ALGORITHMS[cfg.algorithm], asked[0], asked[1] or here))
        return
    try:
        sharding.check_ranks(cfg.fsdp.replicas, int(os.environ.get("WORLD_SIZE", "1")))
        device = sharding.start_ranks(cfg.fsdp.timeout_seconds)
    except ValueError as e:
        sys.exit(f"train.py: {e}")
    peers.begin()
    progress, state = {}, "preempted"
    try:
        with suppress(peers.Preempted):  # in a reference pass, or in the SFT run; nothing is lost
            if cfg.model.model_name_or_path in STARTS:
                cfg = after_sft(cfg, device)
            state = run(cfg, device, progress)
        if progress:
            log.write_status(cfg.output_dir, state, progress["step"])
    except BaseException as e:
        give_up(cfg, progress, e)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a bare interpreter exit after gloo sometimes aborts


def give_up(cfg, progress, error):
    """Say what went wrong, and which rank is missing where that is why; end this process, whereupon the launcher ends the other ranks."""
    expected, where = isinstance(error, (ValueError, FloatingPointError, checkpoint.SaveError)), peers.here["phase"]
    details = error if isinstance(error, torch.OutOfMemoryError) else traceback.format_exc()
    words = error if expected else f"failed in {where!r}: {details}"
    print(f"rank {dist.get_rank()}: {words}", file=sys.stderr, flush=True)
    if missing := peers.lost(error):
        print(missing, file=sys.stderr, flush=True)
    if progress:  # a run that was refused leaves the status of the run that stands in its output_dir
        with suppress(OSError):  # a disk that is full or gone, as has been said above
            log.write_status(cfg.output_dir, "failed", progress["step"], missing or f"{type(error).__name__}: {error}")
    os._exit(2 if isinstance(error, ValueError) else 1)


def run(cfg, device, progress):
    """The run that `cfg` describes; returns "finished" or "preempted". progress["step"], once it writes, is the last finished step."""
    peers.now("reading model and data")
    trackers.check(cfg.log)
    checkpoint.claim(cfg.output_dir)
    under_way = Run(cfg, device, progress)
    outcome = under_way.train()
    if outcome == "finished":
        peers.now("export")
        under_way.export()
    checkpoint.release(cfg.output_dir)
    return outcome


class Run:
    """All that a run holds, and what happens around its steps."""

    def __init__(self, cfg, device, progress):
        self.cfg, self.device, self.progress = cfg, device, progress
        self.algorithm, self.settings = ALGORITHMS[cfg.algorithm], getattr(cfg, cfg.algorithm)
        resumed, folder, self.tokenizer, rows, held_out, self.record = read_inputs(cfg, self.algorithm, self.settings, device)
        judges = rollouts.start_rewards(cfg, rows, held_out) if self.algorithm.ROWS == "prompts" else None
        before = checkpoint.read_state(resumed) if resumed else {"step": 0, "num_tokens": 0}
        self.unevaluated = before.get("unevaluated")  # the metrics of a step whose evaluation was left
        progress["step"] = before["step"]
        self.first, self.last, self.num_tokens = before["step"] + 1, self.record["steps"], before["num_tokens"]
        peers.together()
        if dist.get_rank() == 0:
            Path(cfg.output_dir, "config.yaml").write_text(config.to_yaml(cfg))
            log.write_status(cfg.output_dir, "running", progress["step"])

        if cfg.fsdp.activation_checkpointing == "auto":
            self.cfg = cfg = dry_run.fitted(cfg, rows, self.algorithm, dist.get_world_size())
            say(f"fsdp.activation_checkpointing: auto is {cfg.fsdp.activation_checkpointing} here")
        self.model = model = load.build(cfg.model, folder, cfg.fsdp, device, cfg.seed, cfg.lora, cfg.train.micro_batch_tokens)
        for part in (rows, held_out) if held_out else (rows,):
            load.check_vocabulary(model, part.report["max_token_id"])
        parameters, trained, held = load.size(model)
        self.check_space(parameters, trained)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.dealt = (cfg.train.micro_batch_tokens, rank, ranks, batches.attention_share(model.config, parameters))
        again = before["step"] if self.unevaluated else None
        self.journal = log.Log(cfg.output_dir, cfg.log, config.as_dict(cfg), self.first, self.last, again)
        peers.now("reference log-probs")
        self.rows, self.held_out, self.follower = self.with_reference(folder, rows, held_out)
        changing = self.follower if cfg.reference.sync_ref_model else None  # what checkpoints must keep
        self.sampler = rollouts.Rollouts(cfg, folder, model, self.tokenizer, rows, judges, self.dealt, self.journal) if judges else None
        self.optimizer = optim.make_optimizer(model, cfg.train)
        waiting = cfg.fsdp.timeout_seconds, before["step"]
        self.saver = checkpoint.Saver(cfg.output_dir, cfg.checkpoint, *waiting, model, self.optimizer, changing)
        if resumed:
            checkpoint.load(resumed, model, self.optimizer, changing)
            if self.sampler:
                self.sampler.restore(Path(resumed), before)
        peers.together()
        steps = f"steps {self.first} to {self.last}" if self.first <= self.last else f"all {self.last} steps are done"
        say(
            f"{parameters:,} parameters, {trained:,} of them trained, {held / parameters:.3f} bytes each on a rank; "
            f"{ranks} x {device.type}, {model.config._attn_implementation} attention; {steps}"
        )

    def check_space(self, parameters, trained):
        """Refuse a disk on which the checkpoints to come and the exported model have no room."""
        cfg, steps = self.cfg, range(self.first, self.last + 1)
        exported = 4 * trained if cfg.lora.r else parameters * (self.model.config.dtype or torch.float32).itemsize
        size = int(trained * (4 + optim.STATE_BYTES[cfg.train.optim] + 4 * cfg.reference.sync_ref_model))
        saves = len([step for step in steps if step == self.last or due(step, cfg.checkpoint.save_steps)])
        checkpoint.check_space(cfg.output_dir, cfg.checkpoint, size, exported, saves)

    def with_reference(self, folder, rows, held_out):
        """(rows, held-out rows, live reference or None): rows with reference log-probs, unless it must score what is yet to come."""
        if not (self.algorithm.REFERENCE and self.settings.beta):
            return rows, held_out, None
        if self.cfg.reference.sync_ref_model or self.algorithm.ROWS == "prompts":
            return rows, held_out, reference.live_model(self.cfg, self.model, folder, self.device)
        more = self.record["reference"], self.cfg, folder, self.device, self.dealt
        return *(part and reference.with_logps(part, self.model, *more) for part in (rows, held_out)), None

    def source(self):
        """The steps to come, with all that their losses want."""
        cfg, number = self.cfg, self.first
        if self.sampler:
            drawn = self.sampler.steps(self.first)
        else:
            drawn = batches.offline_steps(self.rows, cfg.train, cfg.seed, self.first, *self.dealt[1:])
        for step in drawn:  # before the reference changes: a rollout that is preempted comes again
            if cfg.reference.sync_ref_model and number > 1 and due(number - 1, cfg.reference.ref_model_sync_steps):
                reference.follow(self.follower, self.model, cfg.reference.ref_model_mixup_alpha)
            yield self.complete(step)
            number += 1

    def complete(self, step, each=iter):
        """The step with what its losses need beside the rows. each: what its micro-batches are drawn through."""
        if self.follower:
            step = reference.live(step._replace(micro_batches=each(step.micro_batches)), self.follower)
        if getattr(self.algorithm, "needs_step", lambda _: False)(self.settings):
            micro_batches = each(step.micro_batches)
            step = batches.with_statistics(step._replace(micro_batches=micro_batches), self.model, self.algorithm, self.settings)
        return step

    def train(self):
        """All steps; returns "finished" or "preempted"."""
        outcome = "preempted"
        with suppress(peers.Preempted):
            if self.first == 1:
                self.journal.scalars(0, self.evaluate(0))
            if self.unevaluated:
                self.journal.write(self.first - 1, self.unevaluated | self.evaluate(self.first - 1))
                self.unevaluated = None
            outcome = self.steps()
        self.saver.finish()
        if self.progress["step"] > self.saver.published:  # preempted in a rollout, or the last save has failed
            self.save(self.progress["step"])
            self.saver.finish()
        if outcome == "preempted" and self.progress["step"] > self.saver.published:
            raise checkpoint.SaveError(f"stopped as asked, but no checkpoint after step {self.saver.published} could be written")
        for part in (self.journal, self.sampler):
            if part:
                part.close()
        return outcome

    def steps(self):
        cfg = self.cfg
        try:
            return loop.train(
                *(self.model, self.algorithm, self.settings, self.source(), self.optimizer),
                *(lambda step: optim.learning_rate(cfg.train, self.last, step), self.first, self.last),
                num_tokens=self.num_tokens,
                max_grad_norm=cfg.train.max_grad_norm,
                stopping=peers.asked,
                check=self.check,
                report=self.report,
                work=flops.Work(self.model),
                peak=flops.peak(self.device, sharding.compute_dtype(cfg.model.dtype, self.device)),
            )
        except FloatingPointError:  # on all ranks
            self.saver.finish()
            raise

    def check(self, step, metrics):
        if self.sampler:
            self.sampler.check(step, metrics)
        elif step == 1 and self.algorithm.REFERENCE and self.cfg.reference.model_name_or_path is None:
            reference.check_first_step(metrics, self.settings.beta)

    def report(self, step, metrics, preempted):
        """After an update: evaluate, log and save what is due. An evaluation that is left is made by the next start."""
        self.progress["step"], self.num_tokens, self.unevaluated = step, metrics["num_tokens"], None
        if step == self.last or due(step, self.cfg.evaluation.steps):
            try:
                metrics |= self.evaluate(step)
            except peers.Preempted:
                self.unevaluated = metrics
        if not self.unevaluated:
            self.journal.write(step, metrics)
        if step == self.last or preempted or self.unevaluated or due(step, self.cfg.checkpoint.save_steps):
            self.save(step)
        if self.unevaluated:
            raise peers.Preempted

    def save(self, step):
        peers.now(f"step {step}: saving")
        files, numbers = self.sampler.kept(step) if self.sampler else ({}, {})
        owed = {"unevaluated": self.unevaluated} if self.unevaluated else {}
        self.saver.save(step, self.record | {"num_tokens": self.num_tokens} | numbers | owed, files)

    def evaluate(self, step):
        """Held-out loss, or rewards, and generated answers, as `eval/` metrics; the last evaluation shows three answers."""
        if not self.held_out:
            return {}
        peers.now(f"step {step}: evaluation")
        metrics, samples, how = {}, [], self.cfg.evaluation
        if not self.sampler:
            number = len(self.held_out)
            held = batches.Step(batches.micro_batches(self.held_out, range(number), *self.dealt), number, {})
            held = self.complete(held, peers.between)
            metrics = loop.evaluate(self.model, self.algorithm, self.settings, held.micro_batches)
        if how.generate:
            answers = self.sampler.evaluate if self.sampler else partial(loop.answer, self.model, self.tokenizer, cfg=how)
            scores, samples = answers(self.held_out)
            metrics |= scores
        metrics = {f"eval/{name}": value for name, value in metrics.items()}
        self.journal.samples(step, samples)
        for sample in samples[:3] if step == self.last else ():
            say("\n".join(f"{name}: {text}" for name, text in sample.items()) + "\n")
        say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        return metrics

    def export(self):
        """`final/`: the model, or its adapter, with a card."""
        cfg = self.cfg
        save = lora.save_adapter if cfg.lora.r else load.save_pretrained
        save(self.model, self.tokenizer, Path(cfg.output_dir, "final"))
        if dist.get_rank() == 0:
            card.write(cfg, self.record["data"], self.rows.report)
        say(f"wrote {cfg.output_dir}/final, {'an adapter for peft' if cfg.lora.r else 'a Hugging Face folder'}")


def read_inputs(cfg, algorithm, settings, device):
    """Everything that a run begins with: (checkpoint or None, model folder, tokenizer, rows, held-out rows or None, record).

    record is what a checkpoint keeps of them. ValueError where a checkpoint was made with others.
    """
    resumed = find_checkpoint(cfg)
    folder = toy.folder(cfg.model, cfg.output_dir) or load.fetch(cfg.model)
    tokenizer = load.load_tokenizer(cfg.model, folder)
    rows = prepare(cfg, "train", tokenizer, algorithm, settings)
    held_out = prepare(cfg, "eval", tokenizer, algorithm, settings) if cfg.data.eval else None
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


def prepare(cfg, part, tokenizer, algorithm, settings):
    """The tokenised rows of data.train or data.eval; the first rank of each host makes them, the others read its file."""
    path = Path(cfg.output_dir, "data", f"{part}.safetensors")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        parts = [data.prepare(*source, tokenizer, algorithm.ROWS) for source in data.sources_of(cfg.data, part)]
        rows = data.mix(parts, cfg.data.weights, cfg.seed)
        path.parent.mkdir(exist_ok=True)
        rows.save(path)
        for one in parts if len(parts) == 1 else (*parts, rows):
            say(f"data.{part}: " + ", ".join(f"{name} {value}" for name, value in one.report.items()))
        for one in parts if part == "train" else ():
            say(data.show(one, tokenizer))
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
