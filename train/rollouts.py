"""GRPO's source of steps: the policy answers prompts, rewards judge the answers, and those become the rows of the next optimizer steps.

Prompts are drawn in one endless order; draw number k is prompt k % n of epoch k // n, and what its completions draw is keyed by (seed, k).
So a rollout is a function of the weights and of the number of prompts drawn before it, on any number of ranks.
"""

import hashlib
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
import torch.distributed as dist

from algorithms import grpo
from models import lora, sharding
from models.generate import Sampling, generate, stop_ids
from models.vllm_server import VllmServer
from train import batches, peers, reference
from train.data import Rows
from train.log import say
from train.rewards import Rewards, parse

KEPT = "rollout.safetensors"  # in a checkpoint inside of a rollout
AGREE = 0.1  # nats: sampler and trainer compute one policy by different kernels; 1e-6 in float32, about 1e-2 in bfloat16


class Answers(NamedTuple):
    """Completions of P prompts, G each: all of them, on every rank."""

    prompts: list[int]  # (P,) rows of the data
    ids: torch.Tensor  # (P * G, L) int32, 0 beyond the end
    lengths: torch.Tensor  # (P * G,)
    logps: torch.Tensor  # (P * G, L) nats, as the sampler gave them
    rewards: torch.Tensor  # (P * G, K) float64; NaN where a function does not apply, or failed

    def of(self, groups, g):
        """The groups at these positions."""
        rows = torch.tensor([i * g + j for i in groups for j in range(g)], dtype=torch.int64)
        return Answers([self.prompts[i] for i in groups], *(t[rows] for t in self[1:]))

    def __add__(self, other):
        return Answers(self.prompts + other.prompts, *(torch.cat(pair) for pair in zip(self[1:], other[1:])))


class Rollouts:
    """What samples, and what is left of the last rollout. Every rank has one and calls it at the same steps."""

    def __init__(self, cfg, folder, model, tokenizer, rows, rewards, dealt, journal):
        """folder: of the model as it was. rewards: of `start_rewards`. dealt: (budget, rank, ranks, quadratic) of
        train.batches.micro_batches. ValueError where the model has too few positions for a prompt and its completion.
        """
        self.cfg, self.model, self.tokenizer, self.rows = cfg, model, tokenizer, rows
        self.rewards = rewards
        self.dealt, self.journal, self.stops = dealt, journal, stop_ids(model, tokenizer)
        self.drawn, self.current = 0, None  # prompts drawn so far; the rows being trained on
        self.shown = set()  # kinds of reward failures that the console has seen
        room = int(rows.lengths.max()) + max(cfg.grpo.max_completion_length, cfg.evaluation.generate and cfg.evaluation.max_new_tokens)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or room
        if room > positions:
            raise ValueError(
                f"grpo.max_completion_length: a prompt and its completion may have {room} tokens, but the model knows {positions} positions"
            )
        self.server = None
        head_of_its_own = sharding.is_tied(model) and lora.unties(lora.wrappers(model))
        if cfg.rollout.engine == "vllm_server" and head_of_its_own:
            raise ValueError("lora.modules_to_save: vLLM would keep the tied head; leave head and embedding out, or sample in_process")
        if cfg.rollout.engine == "vllm_server":
            dtype = sharding.compute_dtype(cfg.model.dtype, model.lm_head.weight.device)
            self.server = VllmServer(cfg.rollout, folder, cfg.output_dir, room, dtype)

    def steps(self, first):
        """Endless optimizer steps from step `first` on."""
        settings, step, (_, per_rollout) = self.cfg.grpo, first, sizes(self.cfg)
        while True:
            within, known = (step - 1) % per_rollout, {}
            if within == 0:
                drawn = self.drawn
                try:
                    known = self.roll(step)
                    if per_rollout > 1:  # the policy will have changed by the later steps
                        logps = reference.score(self.model, self.current, range(len(self.current)), self.dealt)
                        self.current.per_token["old_logps"] = logps
                except peers.Preempted:
                    self.drawn = drawn  # the whole rollout comes again
                    raise
            size = self.cfg.train.global_batch_size
            begin = within % settings.steps_per_generation * size
            chosen = range(begin, begin + size)
            yield batches.Step(
                batches.micro_batches(self.current, chosen, *self.dealt), size, known | {"rows": self.current.fingerprint[:8]}
            )
            step += 1

    def kept(self, step):
        """What a checkpoint after `step` must hold beside the weights: {file: what writes it}, and the numbers for its state."""
        inside = step % sizes(self.cfg)[1] > 0
        return {KEPT: self.current.save} if inside else {}, {"prompts_drawn": self.drawn}

    def restore(self, folder, state):
        """Go on from a checkpoint that was written with `kept`."""
        self.drawn = state["prompts_drawn"]
        self.current = Rows.load(folder / KEPT) if (folder / KEPT).exists() else None

    def roll(self, step):
        """Sample and judge one rollout into `self.current`. Returns its metrics."""
        began, settings = time.perf_counter(), self.cfg.grpo
        if self.server:
            self.server.update(self.model, self.tokenizer)
        wanted, _ = sizes(self.cfg)
        kept, spare, failed, rounds = None, None, sum(self.rewards.failures.values()), 0
        while rounds <= settings.dynamic_sampling and (kept is None or len(kept.prompts) < wanted):
            draws = range(self.drawn, self.drawn + wanted - (len(kept.prompts) if kept else 0))
            self.drawn, rounds = draws.stop, rounds + 1
            new = self.answer(self.rows, [self.prompt(k) for k in draws], [self.keys(k, settings.num_generations) for k in draws])
            flat = grpo.advantages(new.rewards, settings)[1].tolist() if settings.dynamic_sampling else [False] * len(new.prompts)
            good, rest = (new.of([i for i, f in enumerate(flat) if f is which], settings.num_generations) for which in (False, True))
            kept, spare = (kept + good, spare + rest) if kept else (good, rest)
        missing = wanted - len(kept.prompts)
        answers = kept + spare.of(range(missing), settings.num_generations) if missing else kept
        advantages, flat = grpo.advantages(answers.rewards, settings)
        self.current = self.as_rows(answers, advantages)
        metrics = self.metrics(answers, flat) | {"rewards/failures": self.failures(failed), "prompts_drawn": self.drawn}
        metrics |= {"rollout_time": time.perf_counter() - began}
        metrics["rollout_tokens_per_second"] = int(answers.lengths.sum()) / metrics["rollout_time"]
        samples = self.samples(self.rows, answers, advantages)
        self.journal.samples(step, samples)
        if (step - 1) % self.cfg.log.logging_steps == 0:
            say(table(samples[:: settings.num_generations][:2]))
        return metrics

    def prompt(self, draw):
        """The row of the data that draw number `draw` (from 0) is."""
        epoch, place = divmod(draw, len(self.rows))
        return batches.order(len(self.rows), self.cfg.seed + epoch)[place]

    def keys(self, draw, count):
        """The random streams of a draw's completions."""
        named = (f"{self.cfg.seed} {draw} {j}".encode() for j in range(count))
        return [int.from_bytes(hashlib.sha256(name).digest()[:7], "big") for name in named]

    def answer(self, rows, chosen, keys, sampling=None):
        """Completions of the rows `chosen`, len(keys[0]) each, with their rewards; the ranks share the work. Returns Answers."""
        settings, (_, rank, ranks, _) = self.cfg.grpo, self.dealt
        filters = settings.top_k, settings.top_p, settings.min_p
        sampling = sampling or Sampling(settings.max_completion_length, settings.temperature, *filters)
        mine, g = range(len(chosen))[rank::ranks], len(keys[0])
        prompts = [rows.row(chosen[i])[0].tolist() for i in mine]
        keys = [keys[i] for i in mine]
        if self.server:
            found = self.server.sample(prompts, keys, sampling, peers.asked)
        else:
            found = generate(self.model, prompts, keys, sampling, self.stops, self.cfg.rollout.max_num_seqs, peers.asked)
        peers.together()
        ids = torch.zeros(len(chosen) * g, sampling.max_new_tokens, dtype=torch.int32)
        logps, lengths = torch.zeros(ids.shape), torch.zeros(len(ids), dtype=torch.int64)
        rewards = torch.zeros(len(ids), len(self.rewards.names), dtype=torch.float64)
        places = [i * g + j for i in mine for j in range(g)]
        for place, c in zip(places, (c for own in found for c in own)):
            lengths[place] = len(c.ids)
            ids[place, : len(c.ids)], logps[place, : len(c.ids)] = torch.tensor(c.ids, dtype=torch.int32), torch.tensor(c.logps)
        rewards[places] = self.judge(rows, [chosen[i] for i in mine for _ in range(g)], [c.ids for own in found for c in own])
        peers.together()
        for table in (ids, lengths, logps, rewards):
            dist.all_reduce(table)  # each row is zero but on one rank
        return Answers(list(chosen), ids, lengths, logps, rewards)

    def judge(self, rows, chosen, completions):
        """Rewards (N, K) of completions (lists of ids) of the rows `chosen`; NaN once this rank is asked to stop."""
        if not completions:
            return torch.zeros(0, len(self.rewards.names), dtype=torch.float64)
        examples = [rows.examples[i] for i in chosen]
        columns = {name: [e.get(name) for e in examples] for name in self.rewards.columns}
        texts = [self.text(example, ids) for example, ids in zip(examples, completions)]
        pool = ThreadPoolExecutor(1)  # a signal does not wait for a reward's deadline
        scores = pool.submit(self.rewards.score, [e["prompt"] for e in examples], texts, completions, columns)
        pool.shutdown(wait=False)
        while wait([scores], timeout=1).not_done:
            if peers.asked():
                return torch.full((len(texts), len(self.rewards.names)), math.nan, dtype=torch.float64)
        return torch.tensor(scores.result(), dtype=torch.float64)

    def text(self, example, ids):
        """A completion as reward functions take it: text, or the assistant's message where the prompt is a conversation."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text if isinstance(example["prompt"], str) else [{"role": "assistant", "content": text}]

    def as_rows(self, answers, advantages):
        """What is trained on: prompts with their completions, the sampler's log-probs and the advantages."""
        g = self.cfg.grpo.num_generations
        prompts = [self.rows.row(i)[0].int() for i in answers.prompts for _ in range(g)]
        trained = self.ended(answers) if self.cfg.grpo.mask_truncated_completions else torch.ones(len(prompts), dtype=torch.bool)
        ids, masks, logps = [], [], []
        for row, (prompt, n) in enumerate(zip(prompts, answers.lengths.tolist())):
            ids.append(torch.cat([prompt, answers.ids[row, :n]]))
            masks.append((torch.arange(len(ids[-1])) >= len(prompt)) & trained[row])
            logps.append(torch.cat([torch.zeros(len(prompt)), answers.logps[row, :n]]))
        offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
        rows = Rows.of(torch.cat(ids), torch.cat(masks), offsets, {"advantages": advantages.float()})
        rows.per_token["sampling_logps"] = torch.cat(logps)
        rows.constants["temperature"] = torch.tensor(self.cfg.grpo.temperature)
        if self.server:
            rows.constants["foreign_sampler"] = torch.tensor(True)
        return rows

    def ended(self, answers):
        """Whether each completion (N,) ended by itself."""
        last = answers.ids.gather(1, (answers.lengths - 1).clamp(min=0)[:, None])  # (N, 1)
        return (last == torch.tensor(self.stops)).any(-1)

    def metrics(self, answers, flat):
        """TRL's metrics of a rollout; a number that there is none of (no completion ended) is left out."""
        weights = torch.tensor(self.cfg.grpo.reward_weights or [1.0] * answers.rewards.shape[1], dtype=torch.float64)
        total = (answers.rewards * weights).nansum(-1).masked_fill(answers.rewards.isnan().all(-1), math.nan)  # (N,)
        out = {"reward": total.nanmean(), "reward_std": grpo.nanstd(total, 0)[0], "frac_reward_zero_std": flat.double().mean()}
        for name, values in zip(self.rewards.names, answers.rewards.T):
            out |= {f"rewards/{name}/mean": values.nanmean(), f"rewards/{name}/std": grpo.nanstd(values, 0)[0]}
        ended, lengths = self.ended(answers), answers.lengths.double()
        out["completions/clipped_ratio"] = 1 - ended.double().mean()
        for kind, of in (("length", lengths), ("terminated_length", lengths[ended])):
            out |= {
                f"completions/{name}_{kind}": f(of) for name, f in (("mean", torch.mean), ("min", torch.min), ("max", torch.max)) if len(of)
            }
        return {name: float(value) for name, value in out.items() if not math.isnan(value)}

    def failures(self, before):
        """Reward calls that failed since `before`, on all ranks."""
        count = torch.tensor(sum(self.rewards.failures.values()) - before)
        dist.all_reduce(count)
        return int(count)

    def samples(self, rows, answers, advantages=None):
        """All completions for samples.jsonl, on rank 0."""
        if dist.get_rank() != 0:
            return []
        out, g = [], len(answers.ids) // len(answers.prompts)
        for row, n in enumerate(answers.lengths.tolist()):
            example = rows.examples[answers.prompts[row // g]]
            prompt = example["prompt"] if isinstance(example["prompt"], str) else json.dumps(example["prompt"], ensure_ascii=False)
            rewards = {name: None if math.isnan(r) else r for name, r in zip(self.rewards.names, answers.rewards[row].tolist())}
            sample = {"prompt": prompt, "completion": self.tokenizer.decode(answers.ids[row, :n]), "rewards": rewards}
            out.append(sample | ({"advantage": float(advantages[row])} if advantages is not None else {}))
        return out

    def evaluate(self, rows):
        """Rewards of held-out answers. Returns (metrics, rank 0's samples). A sample passes where its first reward is above 1/2."""
        cfg = self.cfg.evaluation
        if self.server:
            self.server.update(self.model, self.tokenizer)
        chosen, failed = range(min(cfg.generate, len(rows))), sum(self.rewards.failures.values())
        sampling = Sampling(cfg.max_new_tokens, cfg.temperature)
        answers = self.answer(rows, chosen, [self.keys(f"eval {i}", cfg.num_samples) for i in chosen], sampling)
        passed = (answers.rewards[:, 0] > 0.5).view(-1, cfg.num_samples)  # (P, k)
        metrics = self.metrics(answers, torch.zeros(len(chosen)))
        shown = ("reward", "completions/mean_length", "completions/clipped_ratio", *(f"rewards/{name}/mean" for name in self.rewards.names))
        metrics = {name: metrics[name] for name in shown if name in metrics} | {"pass@1": float(passed.double().mean())}
        metrics["rewards/failures"] = self.failures(failed)
        if cfg.num_samples > 1:
            metrics[f"pass@{cfg.num_samples}"] = float(passed.any(-1).double().mean())
        return metrics, self.samples(rows, answers)

    def check(self, step, metrics):
        """Before an update: ValueError where sampler and trainer disagree on one policy; a line where the run looks sick."""
        difference, inside = metrics["sampling/sampling_logp_difference/mean"], (step - 1) % sizes(self.cfg)[1]
        if not inside and not self.server and not difference <= AGREE:  # NaN too
            raise ValueError(
                f"step {step}: the log-probs of the sampler and of the trainer differ by {difference:.3g} nats on average, where rounding "
                f"explains at most {AGREE}: the sampler does not support this model"
            )
        signs = {
            "every reward equals its group's, so nothing is learned from this step": metrics.get("frac_reward_zero_std") == 1,
            "every completion was cut off; raise grpo.max_completion_length": metrics.get("completions/clipped_ratio") == 1,
            "the policy's entropy has collapsed": metrics["entropy"] < 1e-3,
            f"{metrics.get('rewards/failures')} rewards failed": metrics.get("rewards/failures"),
        }
        for sign in (sign for sign, seen in signs.items() if seen):
            say(f"step {step}: warning: {sign}")
        for kind in self.rewards.first.keys() - self.shown:
            self.shown.add(kind)
            print(f"rank {dist.get_rank()}: the first failure of {kind}:\n{self.rewards.first[kind]}", flush=True)

    def close(self):
        self.rewards.close()
        if self.server:
            self.server.close()


def reward_files(cfg):
    """{reward as the settings name it: digest of the file that it is in}, of those in files of the user's."""
    specs = {words: parse(words) for words in cfg.grpo.reward_funcs}
    return {words: hashlib.sha256(spec.source.encode()).hexdigest()[:16] for words, spec in specs.items() if spec.source is not None}


def start_rewards(cfg, rows, held_out):
    """The reward functions of a run. ValueError, before a model is loaded or anything written, for what cannot be used with these rows."""
    longest, limit = int(rows.lengths.max()), cfg.grpo.max_completion_length
    if longest + limit > cfg.train.micro_batch_tokens:
        raise ValueError(
            f"train.micro_batch_tokens: {cfg.train.micro_batch_tokens} is less than the longest prompt, {longest} "
            f"tokens, and grpo.max_completion_length, {limit}; raise it"
        )
    parts = [{name for example in part.examples for name in example} for part in (rows, held_out) if part]
    columns = set.intersection(*parts) - {"prompt"}  # what every call can be given
    return Rewards(cfg.grpo.reward_funcs, cfg.rollout.reward_seconds, columns, cfg.rollout.reward_workers)


def table(samples):
    """A line for each sample: the end of its prompt, the beginning of its completion, its rewards and its advantage."""
    lines = []
    for sample in samples:
        rewards = "  ".join(f"{name} {'-' if value is None else f'{value:.3g}'}" for name, value in sample["rewards"].items())
        lines.append(f"  {sample['prompt'][-40:]!r} -> {sample['completion'][:70]!r}  {rewards}  advantage {sample['advantage']:.2f}")
    return "\n".join(lines)


def sizes(cfg):
    """(prompts of one rollout, optimizer steps on one rollout)."""
    settings = cfg.grpo
    prompts = cfg.train.global_batch_size * settings.steps_per_generation // settings.num_generations
    return prompts, settings.steps_per_generation * settings.num_iterations
