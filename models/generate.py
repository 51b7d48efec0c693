"""Completions by the model being trained, in its own process and with its own weights: the rollout sampler, and greedy answers.

Weights are gathered once and used where they lie. Rows are decoded side by side over a KV cache of fixed shape; a row that has ended
makes room for the next one, and once none waits, the batch shrinks. On CUDA a step is a graph, captured once per shape. What a row
draws depends on its own key alone, so the same completions come out of any number of ranks, up to the rounding of matrix products.
"""

import math
from collections import deque
from contextlib import contextmanager
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from models import attention
from models.sharding import gathered

BLOCK = {"cpu": 64, "cuda": 256}  # tokens: the part of the cache that attention reads grows in such steps; on CUDA each is a graph
LANES = 128  # tokens of the vocabulary whose probabilities are first summed
PREFILL = 16384  # tokens of prompts that are read at once


class Sampling(NamedTuple):
    """How tokens are drawn. temperature 0: the likeliest token. The filters act one after another, top_k first."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Completion(NamedTuple):
    ids: list[int]
    """What follows the prompt; the stop token, if it came, is the last."""
    logps: list[float]
    """nats, of each token under the policy at the sampling temperature (1 where it is 0), without the filters."""


def generate(model, prompts, keys, sampling, stops, batch_size=256, stopping=lambda: False):
    """Completions of `prompts` (lists of token ids): for prompt i one per key in keys[i], in their order.

    keys: 63-bit numbers, the random streams. stops: token ids that end a completion. batch_size: completions decoded at once on this
    rank, which costs memory for their caches. Ranks may call it with different prompts, and different numbers of them, between
    collective operations. Once `stopping()` it returns at once, and what is not done is None.
    """
    done = [[None] * len(own) for own in keys]
    waiting = deque((i, j) for i, own in enumerate(keys) for j in range(len(own)))
    if not waiting:
        with gathered(model):  # the other ranks gather
            return done
    with gathered(model), cached_attention(model):
        rows = min(batch_size, len(waiting))
        length = max(map(len, prompts)) + sampling.max_new_tokens
        decoder = Decoder(model, rows, length, sampling, stops)
        every = 16 if decoder.device.type == "cuda" else 4  # steps between two looks at which rows have ended
        while (waiting or decoder.places) and not stopping():
            free = rows - len(decoder.places)
            if waiting and free >= max(1, rows // 8):
                decoder.admit([waiting.popleft() for _ in range(min(free, len(waiting)))], prompts, keys)
            decoder.shrink(spare=bool(waiting))
            for _ in range(every):
                decoder.step()
            for (i, j), completion in decoder.ended():
                done[i][j] = completion
    return done


class Decoder:
    """Rows that are being decoded: their caches, their streams, and what they have written so far. Slots 0 to `size` are computed."""

    def __init__(self, model, rows, length, sampling, stops):
        self.model, self.sampling, self.packed = model, sampling, model.packed_attention
        self.device = device = model.lm_head.weight.device
        self.block = BLOCK[device.type]
        self.length = math.ceil(length / self.block) * self.block
        self.stops = torch.tensor(stops, device=device)
        self.keys, self.values = {}, {}  # layer -> (rows, key heads, length, D), made when a layer first writes
        self.rows, self.size, self.window, self.places = rows, rows, 0, {}  # places: slot -> (prompt, generation)
        self.token, self.position, self.count = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3))  # (rows,)
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        self.ids = torch.zeros(rows, sampling.max_new_tokens, dtype=torch.int64, device=device)
        self.logps = torch.zeros(rows, sampling.max_new_tokens, device=device)
        self.uniform = torch.zeros(rows, sampling.max_new_tokens, device=device)  # the draws of each row
        self.steps, self.started = 0, [0] * rows  # steps done; for each slot the step at which its row would have been at position 0
        self.graphs, self.prefilling, self.seen = {}, None, {}  # seen: sliding window or None -> (R, 1, 1, S) bool, of this step
        self.slots = torch.arange(rows, device=device)

    def admit(self, places, prompts, keys):
        """Give free slots to new rows. A prompt is read once, without its last token, which is the first that `step` reads."""
        free = iter([s for s in range(self.rows) if s not in self.places])
        slots = {}
        for i, j in places:
            slots.setdefault(i, []).append(slot := next(free))
            self.places[slot] = (i, j)
            self.started[slot] = self.steps - len(prompts[i]) + 1
        self.size = self.rows
        taken = torch.tensor([s for own in slots.values() for s in own], device=self.device)
        draws = [torch.Generator().manual_seed(keys[i][j]) for own in slots.values() for i, j in (self.places[s] for s in own)]
        self.uniform[taken] = torch.stack([torch.rand(self.sampling.max_new_tokens, generator=g) for g in draws]).to(self.device)
        self.token[taken] = torch.tensor([prompts[i][-1] for i, own in slots.items() for _ in own], device=self.device)
        self.position[taken] = torch.tensor([len(prompts[i]) - 1 for i, own in slots.items() for _ in own], device=self.device)
        self.count[taken], self.done[taken] = 0, False
        part = []
        for i in [i for i in slots if len(prompts[i]) > 1]:
            if part and sum(len(prompts[k]) for k in part) + len(prompts[i]) > PREFILL:
                self.prefill(part, prompts, slots)
                part = []
            part.append(i)
        if part:
            self.prefill(part, prompts, slots)

    def prefill(self, part, prompts, slots):
        lengths = [len(prompts[i]) - 1 for i in part]
        ends = torch.tensor(lengths).cumsum(0)  # (P,)
        copies = [(slot, int(end) - n, n) for i, n, end in zip(part, lengths, ends) for slot in slots[i]]
        self.prefilling = tuple(  # of each token and row that has it: slot, position in the row, place in the pack
            torch.cat(x).to(self.device)
            for x in zip(*((torch.full((n,), slot), torch.arange(n), torch.arange(first, first + n)) for slot, first, n in copies))
        )
        self.model.decode(
            input_ids=torch.tensor([t for i in part for t in prompts[i][:-1]], device=self.device)[None],  # (1, N)
            position_ids=torch.cat([torch.arange(n) for n in lengths]).to(self.device)[None],
            rows=attention.Rows(lengths).to(self.device),
            decoder=self,
        )
        self.prefilling = None

    def attend(self, module, query, key, value, scaling, sliding_window, kwargs):
        """Attention of one layer, with its keys and values kept: over packed prompts, or of each row's newest token over its cache."""
        layer = module.layer_idx
        if layer not in self.keys:
            shape = self.rows, key.shape[1], self.length, key.shape[3]
            self.keys[layer], self.values[layer] = (torch.zeros(shape, dtype=key.dtype, device=key.device) for _ in range(2))
        keys, values = self.keys[layer], self.values[layer]
        if self.prefilling:
            slots, positions, places = self.prefilling
            keys[slots, :, positions] = key[0, :, places].transpose(0, 1)
            values[slots, :, positions] = value[0, :, places].transpose(0, 1)
            return self.packed(module, query, key, value, None, scaling=scaling, sliding_window=sliding_window, **kwargs)
        attention.refuse(kwargs)
        rows, heads = key.shape[:2]
        at = self.slots[:rows], slice(None), self.position[:rows]
        keys[at], values[at] = key[:, :, 0], value[:, :, 0]
        if sliding_window not in self.seen:
            places, here = torch.arange(self.window, device=key.device), self.position[:rows, None]  # (S,), (R, 1)
            seen = (places <= here) & (places > here - (sliding_window or self.length))
            self.seen[sliding_window] = seen[:, None, None]
        grouped = query.reshape(rows, heads, -1, query.shape[3])  # (R, key heads, heads per key head, D)
        k, v = keys[:rows, :, : self.window], values[:rows, :, : self.window]
        mask = self.seen[sliding_window].expand(-1, -1, grouped.shape[2], -1)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scaling)
        return out.reshape(rows, 1, -1, query.shape[3]), None

    def step(self):
        """One more token for every row; a row that has ended stays where it is."""
        longest = max((self.steps - self.started[slot] for slot in self.places), default=0) + 1
        self.window = min(math.ceil(longest / self.block) * self.block, self.length)
        self.steps += 1
        if self.device.type != "cuda" or self.graphs is None:
            return self.compute()
        shape = self.size, self.window
        if shape in self.graphs:
            return self.graphs[shape].replay()
        self.compute()  # this step itself, so that whatever is made once is made outside of the graph
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=next((g.pool() for g in self.graphs.values()), None)):
                self.compute()
            self.graphs[shape] = graph
        except RuntimeError as e:
            print(f"sampling without CUDA graphs, several times slower: {str(e).splitlines()[0]}", flush=True)
            self.graphs = None

    def compute(self):
        n, self.seen = self.size, {}
        token, position, count, done = self.token[:n], self.position[:n], self.count[:n], self.done[:n]
        z = self.model.decode(input_ids=token[:, None], position_ids=position[:, None], decoder=self)  # (R, V) float32
        at = count.clamp(max=self.sampling.max_new_tokens - 1)[:, None]
        chosen, logps = pick(z, self.uniform[:n].gather(1, at), self.sampling)
        self.ids[:n].scatter_(1, at, torch.where(done[:, None], self.ids[:n].gather(1, at), chosen))
        self.logps[:n].scatter_(1, at, torch.where(done[:, None], self.logps[:n].gather(1, at), logps))
        token.copy_(torch.where(done, token, chosen[:, 0]))
        position += ~done
        count += ~done
        done |= (token[:, None] == self.stops).any(-1) | (count >= self.sampling.max_new_tokens)

    def ended(self):
        """[((prompt, generation), Completion)] of rows that have ended; their slots are free."""
        over = [slot for slot, done in enumerate(self.done.tolist()) if done and slot in self.places]
        if not over:
            return []
        at = torch.tensor(over, device=self.device)
        counts, ids, logps = self.count[at].tolist(), self.ids[at].cpu(), self.logps[at].cpu()
        return [
            (self.places.pop(slot), Completion(ids[k, :n].tolist(), logps[k, :n].tolist())) for k, (slot, n) in enumerate(zip(over, counts))
        ]

    def shrink(self, spare):
        """Compute fewer slots where many are free and, unless `spare`, stay so; on CUDA of a few sizes, as each shape is a graph."""
        n = size = len(self.places)
        if self.device.type == "cuda":
            size = min(s for s in (self.rows, self.rows // 4, self.rows // 16) if s >= n)
        if spare or size > 0.9 * self.size:
            return
        kept = sorted(self.places)
        moved = [(slot, place) for slot, place in zip([s for s in range(n) if s not in self.places], [s for s in kept if s >= n])]
        if moved:
            to, source = (torch.tensor(slots, device=self.device) for slots in zip(*moved))
            for table in (*self.keys.values(), *self.values.values()):
                table[to] = table[source]
            for table in (self.token, self.position, self.count, self.done, self.ids, self.logps, self.uniform):
                table[to] = table[source]
            self.done[source] = True
            for new, old in moved:
                self.places[new], self.started[new] = self.places.pop(old), self.started[old]
        self.size = size


def pick(z, uniform, sampling):
    """Tokens (R, 1) drawn from logits z (R, V) float32, and their log-probs (R, 1) nats; uniform (R, 1) in [0, 1) decides."""
    if not sampling.temperature:
        chosen = z.argmax(-1, keepdim=True)
        return chosen, z.gather(1, chosen) - z.logsumexp(-1, keepdim=True)
    z = z / sampling.temperature
    kept = filtered(z, sampling)
    p = kept.softmax(-1)
    chosen = draw(p, uniform)
    return chosen, p.gather(1, chosen).log() if kept is z else z.gather(1, chosen) - z.logsumexp(-1, keepdim=True)


def draw(p, uniform):
    """Where the cumulative sums of p (R, V) pass uniform (R, 1) of their total; never a token whose p is 0. Returns (R, 1).

    First among the sums of LANES tokens, then within those: one pass over p, where cumulative sums of it all would take several.
    """
    lanes = F.pad(p, (0, -p.shape[1] % LANES)).view(len(p), -1, LANES)  # (R, V / LANES, LANES)
    sums = lanes.sum(-1).cumsum(-1)  # (R, V / LANES)
    below = 1 - 2**-22  # keeps a rounded product below the total
    target = uniform.clamp(max=below) * sums[:, -1:]
    lane = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[1] - 1)  # (R, 1)
    rest = target - F.pad(sums, (1, 0)).gather(1, lane)
    within = lanes.gather(1, lane[:, :, None].expand(-1, -1, LANES))[:, 0].cumsum(-1)  # (R, LANES)
    place = torch.searchsorted(within, torch.minimum(rest.clamp(min=0), within[:, -1:] * below), right=True)
    return lane * LANES + place.clamp(max=LANES - 1)


def filtered(z, sampling):
    """Logits (R, V) with -inf where top_k, then top_p, then min_p leave a token out."""
    if 0 < sampling.top_k < z.shape[1]:
        z = z.masked_fill(z < z.topk(sampling.top_k).values[:, -1:], -math.inf)
    if sampling.top_p < 1:
        ordered, index = z.sort(-1, descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= sampling.top_p  # what comes before is enough
        z = z.masked_fill(beyond.scatter(1, index, beyond), -math.inf)
    if sampling.min_p > 0:
        z = z.masked_fill(z < z.amax(-1, keepdim=True) + math.log(sampling.min_p), -math.inf)
    return z


def decode(self, input_ids, position_ids, decoder, **rows):
    """The model's forward pass as the sampler needs it. Returns logits (R, V) float32 of one token per row; of prompts, nothing."""
    hidden = self.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False, decoder=decoder, **rows
    ).last_hidden_state  # (R, 1, H), or (1, N, H) of prompts
    if decoder.prefilling:
        return None
    return self.lm_head.logits(hidden[:, 0])


def add_decoder(model):
    model.decode = MethodType(decode, model)


def cached(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, decoder=None, **kwargs):
    return decoder.attend(module, query, key, value, scaling, sliding_window, kwargs)


AttentionInterface.register("cached", cached)


@contextmanager
def cached_attention(model):
    packed = model.config._attn_implementation
    model.packed_attention = AttentionInterface()[packed]
    model.config._attn_implementation = "cached"
    try:
        yield
    finally:
        model.config._attn_implementation = packed


def greedy(model, tokenizer, prompts, max_new_tokens, batch_size=256, stopping=lambda: False):
    """The likeliest continuations of `prompts`, each a list of ids that ends with a stop token or at the limit; none once `stopping()`."""
    stops, keys = stop_ids(model, tokenizer), [[0]] * len(prompts)
    found = generate(model, prompts, keys, Sampling(max_new_tokens), stops, batch_size, stopping)
    return [completion.ids for (completion,) in found if completion]


def stop_ids(model, tokenizer):
    """Every token that ends an answer: the tokenizer's, and those of the model's generation config."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    ids = [i for i in (tokenizer.eos_token_id, *own) if i is not None]
    if not ids:
        raise ValueError("model.model_name_or_path: the tokenizer has no eos_token, so a generated answer could not end")
    return list(dict.fromkeys(ids))
