"""The vLLM engine: against a real server where BARETUNE_VLLM_PYTHON names an environment that tests/make_vllm_env.sh made, and its error
paths against an HTTP server that misbehaves."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import load, logprobs, vllm_server
from models.generate import Sampling
from models.vllm_server import VllmServer
from tests.conftest import ROOT
from train import toy
from train.config import Fsdp, Model, Rollout, address_of

PYTHON = os.environ.get("BARETUNE_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(
    not PYTHON, reason="needs vLLM: run tests/make_vllm_env.sh FOLDER and set BARETUNE_VLLM_PYTHON=FOLDER/bin/python"
)
BOUND = 5e-5  # nats, float32 on both sides; seen: 2.4e-6, and 1.3e-5 for weights 1.3 times as large
PROMPTS = [[5, 6, 7], [9] * 40, [11], list(range(20, 30))]


def sampling(**settings):
    return Sampling(**{"max_new_tokens": 32, "temperature": 1.0} | settings)


def make_folder(folder):
    """A model whose distributions are far from uniform, with its tokenizer and weights."""
    toy.write_model("tiny", folder)
    config = toy.model_config("tiny")
    config.initializer_range = 0.1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def policy(folder, device):
    return load.build(Model(folder), folder, Fsdp(), device, seed=0), AutoTokenizer.from_pretrained(folder)


def own_settings(**settings):
    return Rollout(engine="vllm_server", vllm_command=PYTHON, vllm_extra_args=["--enforce-eager"], **settings)


@pytest.fixture(scope="module")
def real(one_rank, tmp_path_factory):
    """A started server with the policy's weights: .server .model .tokenizer .folder."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    base = tmp_path_factory.mktemp("vllm")
    folder = make_folder(base / "model")
    model, tokenizer = policy(folder, one_rank)
    server = VllmServer(own_settings(), folder, base / "out", 128, torch.float32)
    server.update(model, tokenizer)
    yield SimpleNamespace(server=server, model=model, tokenizer=tokenizer, folder=folder)
    server.close()


def own_logps(model, prompt, ids, temperature=1.0):
    row = torch.tensor([[*prompt, *ids]])
    mask = torch.ones_like(row, dtype=torch.bool)
    targets = mask.clone()
    targets[:, : len(prompt)] = False
    batch = {"input_ids": row, "attention_mask": mask, "loss_mask": targets}
    with torch.no_grad():
        return logprobs.token_logps(model, batch | {"temperature": torch.tensor(temperature)})["logps"][0, len(prompt) :]


def distance(model, prompts, answers, temperature=1.0):
    """The largest difference of log-probs, nats."""
    pairs = [(p, c) for p, group in zip(prompts, answers) for c in group]
    return max((own_logps(model, p, c.ids, temperature or 1.0) - torch.tensor(c.logps)).abs().max().item() for p, c in pairs)


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_the_policys_at_the_temperature(real, temperature):
    keys = [[1, 2, 3], [4], [5, 6], [7]]
    answers = real.server.sample(PROMPTS, keys, sampling(temperature=temperature))
    assert [len(group) for group in answers] == [3, 1, 2, 1]
    assert distance(real.model, PROMPTS, answers, temperature) < BOUND
    if temperature == 0:
        assert answers[0][0] == answers[0][1] == answers[0][2]


@needs_vllm
def test_log_probs_of_truncated_sampling_are_those_of_the_kept_tokens(real):
    """Equal to the policy's log-softmax over the five likeliest tokens."""
    (answer,) = real.server.sample([PROMPTS[0]], [[1]], sampling(top_k=5))[0]
    ids = torch.tensor([PROMPTS[0] + answer.ids])
    logits = AutoModelForCausalLM.from_pretrained(real.folder, dtype=torch.float32)(ids).logits[0, len(PROMPTS[0]) - 1 : -1]  # (T, V)
    kept = logits.masked_fill(logits < logits.topk(5).values[:, -1:], -torch.inf).log_softmax(-1)
    expected = kept.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    assert (expected - torch.tensor(answer.logps)).abs().max() < BOUND


@needs_vllm
def test_a_completion_ends_with_its_stop_token_or_at_the_limit(real):
    answers = real.server.sample(PROMPTS, [list(range(i, i + 12)) for i in (0, 20, 40, 60)], sampling(max_new_tokens=48))
    stops = set(real.server.stop_ids)
    rows = [c for group in answers for c in group]
    ended = [c for c in rows if c.ids[-1] in stops]
    assert 3 < len(ended) < len(rows)
    assert all(len(c.ids) == 48 for c in rows if c not in ended)
    assert all(len(c.ids) == len(c.logps) and not stops & set(c.ids[:-1]) for c in rows)


@needs_vllm
def test_a_key_makes_the_same_completion_in_any_company(real):
    first = real.server.sample(PROMPTS, [[1, 2], [3], [4, 2**70 + 5], [6]], sampling())
    again = real.server.sample(PROMPTS, [[1, 2], [3], [4, 2**70 + 5], [6]], sampling())
    assert first == again
    other = real.server.sample([PROMPTS[2], PROMPTS[0]], [[4], [2, 1]], sampling())
    assert [c.ids for c in other[1]] == [c.ids for c in first[0][::-1]] and other[0][0].ids == first[2][0].ids
    assert first[0][0].ids != first[0][1].ids
    assert real.server.sample([[3]], [[]], sampling()) == [[]]


@needs_vllm
def test_new_weights_are_used_after_update_whole(real, one_rank):
    """Every tensor is moved, the tied head too; the first weights then give the first answers, to the last digit."""
    keys = [[1], [2], [3], [4]]
    first = real.server.sample(PROMPTS, keys, sampling())
    changed, _ = policy(real.folder, one_rank)
    with torch.no_grad():
        for p in changed.parameters():
            p.mul_(1.3)
    real.server.update(changed, real.tokenizer)
    second = real.server.sample(PROMPTS, keys, sampling())
    assert distance(changed, PROMPTS, second) < BOUND
    assert distance(real.model, PROMPTS, second) > 0.3
    real.server.update(real.model, real.tokenizer)
    assert real.server.sample(PROMPTS, keys, sampling()) == first
    assert not real.server.scratch.exists()


@needs_vllm
def test_a_given_server_is_used_and_a_hanging_one_is_an_error(real, tmp_path):
    settings = Rollout(engine="vllm_server", vllm_address=real.server.name(), vllm_timeout_seconds=10, vllm_start_timeout_seconds=3)
    given = VllmServer(settings, real.folder, tmp_path, 128, torch.float32)
    given.update(real.model, real.tokenizer)
    assert list(tmp_path.iterdir()) == []
    assert given.sample([[5]], [[1]], sampling()) == real.server.sample([[5]], [[1]], sampling())
    with pytest.raises(RuntimeError, match=r"vllm_address: .* HTTP 400: .*vocab"):
        given.sample([[5], [500]], [[1], [2]], sampling())
    with pytest.raises(ValueError, match=r"max model length 128; start it with .* --max-model-len 129"):
        VllmServer(settings, real.folder, tmp_path, 129, torch.float32)
    server = psutil.Process(real.server.process.pid).children()[0]
    server.suspend()
    try:
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match=r"did not answer /v1/completions within 10 s \(rollout.vllm_timeout_seconds\)"):
            given.sample(PROMPTS, [[1]] * 4, sampling())
        with pytest.raises(RuntimeError, match=r"was not ready after 3 s \(rollout.vllm_start_timeout_seconds\)"):
            VllmServer(settings, real.folder, tmp_path, 128, torch.float32)
        assert time.monotonic() - begun < 20
    finally:
        server.resume()


@needs_vllm
def test_close_ends_every_process(real, tmp_path):
    watch = psutil.Process(real.server.process.pid)
    family = [watch, *watch.children(recursive=True)]
    assert len(family) >= 3  # the watch, the API server, the engine
    real.server.close()
    real.server.close()  # a second time: nothing
    assert gone(family, 1)


RANKS = """
import json, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from transformers import AutoTokenizer
from models import generate, load, sharding, vllm_server
from train.config import Fsdp, Model, Rollout

folder, python = sys.argv[1:]
device = sharding.start_ranks(300)
rank = dist.get_rank()
model = load.build(Model(folder), folder, Fsdp(), device, 0)
settings = Rollout(engine="vllm_server", vllm_command=python, vllm_extra_args=["--enforce-eager"])
server = vllm_server.VllmServer(settings, folder, "out", 128, torch.float32)
server.update(model, AutoTokenizer.from_pretrained(folder))
sampling = generate.Sampling(8, temperature=1.0)
(answer,) = server.sample([[5 + rank, 6, 7]], [[rank]], sampling)[0]
out = {"ids": answer.ids, "logps": answer.logps, "watch": server.process and server.process.pid, "pid": os.getpid()}
Path(f"{rank}.tmp").write_text(json.dumps(out))
os.rename(f"{rank}.tmp", f"{rank}.json")
while True:
    try:
        server.sample([[5 + rank, 6, 7]], [[rank]], sampling)
    except RuntimeError as error:
        Path(f"{rank}.error").write_text(str(error))
        time.sleep(600)
"""


@contextmanager
def ranks_with_a_server(tmp_path, ranks):
    """Runs RANKS under torchrun until each rank has sampled once; yields what they wrote and the server's processes."""
    (tmp_path / "ranks.py").write_text(RANKS)
    folder = make_folder(tmp_path / "model")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"}
    with open(tmp_path / "console", "wb") as console:
        process = subprocess.Popen([*torchrun, "ranks.py", folder, PYTHON], cwd=tmp_path, env=environment, stdout=console, stderr=console)
    try:
        paths = [tmp_path / f"{rank}.json" for rank in range(ranks)]
        eventually(lambda: process.poll() is not None or all(p.exists() for p in paths), 300)
        assert process.poll() is None, (tmp_path / "console").read_text()[-4000:]
        said = [json.loads(p.read_text()) for p in paths]
        watch = psutil.Process(said[0]["watch"])
        yield said, [watch, *watch.children(recursive=True)], folder
    finally:
        torchrun = psutil.Process(process.pid)
        for p in [*torchrun.children(recursive=True), torchrun]:
            p.kill()
        process.wait()


def eventually(condition, seconds):
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return true


def gone(processes, seconds):
    return eventually(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes), seconds)


@needs_vllm
def test_two_ranks_share_a_server_and_both_say_when_it_is_killed(tmp_path, one_rank):
    with ranks_with_a_server(tmp_path, 2) as (said, family, folder):
        assert said[1]["watch"] is None
        for rank, one in enumerate(said):
            expected = own_logps(policy(folder, one_rank)[0], [5 + rank, 6, 7], one["ids"])
            assert (expected - torch.tensor(one["logps"])).abs().max() < BOUND
        family[1].kill()  # the API server, by SIGKILL
        errors = [tmp_path / "0.error", tmp_path / "1.error"]
        assert eventually(lambda: all(e.exists() and e.read_text() for e in errors), 10)
        assert gone(family, 15)
        assert "is dead; the end of" in errors[0].read_text() and "vllm_server.log" in errors[0].read_text()
        assert "the vLLM server of this run" in errors[1].read_text() and "Application startup complete" in errors[1].read_text()


@needs_vllm
def test_the_server_ends_with_its_rank(tmp_path):
    with ranks_with_a_server(tmp_path, 1) as (said, family, _):
        assert len(family) >= 3
        os.kill(said[0]["pid"], signal.SIGKILL)
        assert gone(family, 15)


# What follows needs no vLLM.


class Misbehaving(BaseHTTPRequestHandler):
    """Answers /health, and elsewhere what `server.script` says: a list of functions, one a request, the last again and again."""

    def do_GET(self):
        if self.path != "/health":
            return self.do_POST()
        self.reply(200, "")

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        script = self.server.script
        self.server.requests += 1
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def reply(self, status, text):
        text = text if isinstance(text, str) else json.dumps(text)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def web(one_rank, tmp_path):
    """A function: script -> (a VllmServer for a misbehaving HTTP server, that server)."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()

    def serve(*script, **settings):
        httpd.script, httpd.requests = [answers({"vllm_config": {"model_config": SERVES}})], 0
        address = f"127.0.0.1:{httpd.server_address[1]}"
        server = VllmServer(Rollout(engine="vllm_server", vllm_address=address, **settings), "none", tmp_path, 128, torch.float32)
        server.stop_ids = [0]
        httpd.script, httpd.requests = list(script), 0
        return server, httpd

    yield serve
    httpd.shutdown()
    httpd.server_close()


SERVES = {"logprobs_mode": "processed_logprobs", "max_model_len": 128}
GOOD = {"choices": [{"token_ids": [7, 0], "logprobs": {"token_logprobs": [-1.5, -0.5]}, "finish_reason": "stop"}]}


def answers(what, status=200):
    return lambda request: request.reply(status, what)


def hang_up(request):
    request.connection.shutdown(socket.SHUT_RDWR)


def trickle(request):
    """A byte every 0.2 s: the connection is never idle for long, and the answer never whole."""
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    for _ in range(100):
        request.wfile.write(b" ")
        time.sleep(0.2)


def changed(**choice):
    return {"choices": [GOOD["choices"][0] | choice]}


def test_a_lost_connection_and_an_error_inside_are_tried_again(web):
    server, httpd = web(hang_up, answers("busy", 503), answers(GOOD))
    assert server.sample([[5]], [[1]], sampling()) == [[vllm_server.Completion([7, 0], [-1.5, -0.5])]]
    assert httpd.requests == 3


@pytest.mark.parametrize(
    ("script", "message", "requests"),
    [
        ([answers("engine gone", 500)], "answered /v1/completions with HTTP 500: engine gone", 3),
        ([hang_up], "lost the connection at /v1/completions", 3),
        ([answers({"error": {"message": "too long"}}, 400)], "HTTP 400: .*too long", 1),
        ([answers("<html>")], "which is not JSON", 1),
        ([answers([])], "no whole completion", 1),
        ([answers({"choices": []})], "no whole completion", 1),
        ([answers(changed(token_ids=None))], "no whole completion", 1),
        ([answers(changed(token_ids=[7]))], "no whole completion", 1),
        ([answers(changed(token_ids=[7, "a"]))], "no whole completion", 1),
        ([answers(changed(logprobs={"token_logprobs": [-1.5, float("nan")]}))], "no whole completion", 1),
        ([answers(changed(logprobs={"token_logprobs": [-1.5, None]}))], "no whole completion", 1),
        ([answers(changed(finish_reason="abort"))], "no whole completion", 1),
    ],
)
def test_a_wrong_answer_is_an_error(web, script, message, requests):
    server, httpd = web(*script)
    with pytest.raises(RuntimeError, match=rf"^rollout.vllm_address: the vLLM server at 127.0.0.1:\d+ .*{message}"):
        server.sample([[5]], [[1]], sampling())
    assert httpd.requests == requests


def test_a_prompt_that_leaves_too_little_room_is_refused(web):
    server, httpd = web(answers(GOOD))
    with pytest.raises(ValueError, match=r"^grpo.max_completion_length: .* 152 tokens, the vLLM server takes 128"):
        server.sample([[5], [5] * 120], [[1], [2]], sampling())
    assert httpd.requests == 0


@pytest.mark.parametrize("slow", [trickle, lambda request: time.sleep(20)])
def test_a_slow_answer_is_an_error_in_time(web, slow):
    server, _ = web(slow, vllm_timeout_seconds=1)
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"within 1 s \(rollout.vllm_timeout_seconds\)"):
        server.sample([[5], [6]], [[1], [2, 3]], sampling())
    assert time.monotonic() - begun < 3


def test_weights_that_the_server_did_not_take_are_an_error(web, one_rank, tmp_path):
    folder = make_folder(tmp_path / "model")
    model, tokenizer = policy(folder, one_rank)
    cases = [
        ([answers("no such route", 404)], "HTTP 404"),
        ([answers({"results": ["False"]})], "answered reload_weights with"),
        ([answers({"results": []})], "answered reload_weights with"),
        ([answers({"results": [None]}), answers({"success": False})], "did not drop its prefix cache"),
    ]
    for script, message in cases:
        server, _ = web(*script)
        with pytest.raises(RuntimeError, match=message):
            server.update(model, tokenizer)
    scores = [None, *({str(i): {"logprob": -4.0}} for i in [7919 * k % len(tokenizer) for k in range(2, 33)])]
    server, _ = web(answers({"results": [None]}), answers({"success": True}), answers({"choices": [{"prompt_logprobs": scores}]}))
    server.stop_ids = None
    with pytest.raises(RuntimeError, match="does not have the policy's weights: log-probs of 32 tokens differ by"):
        server.update(model, tokenizer)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (answers("", 404), "does not tell its settings .*VLLM_SERVER_DEV_MODE=1"),
        (answers({"vllm_config": "text"}), "does not tell its settings"),
        (answers({"vllm_config": {"model_config": SERVES | {"logprobs_mode": "raw_logprobs"}}}), "has logprobs mode raw_logprobs"),
        (answers({"vllm_config": {"model_config": SERVES | {"max_model_len": 64}}}), "max model length 64; start it .* 128 or more"),
    ],
)
def test_a_given_server_of_another_kind_is_refused(web, what, message):
    server, httpd = web(answers(GOOD))
    httpd.script = [what]
    with pytest.raises(ValueError, match=f"^rollout.vllm_address: .*{message}"):
        VllmServer(server.settings, "none", server.output_dir, 128, torch.float32)


def test_an_address_where_nobody_answers(one_rank, tmp_path):
    with socket.socket() as bound, pytest.raises(RuntimeError, match=r"was not ready after 1 s .*Refused"):
        bound.bind(("127.0.0.1", 0))  # and does not listen
        settings = Rollout(engine="vllm_server", vllm_address=f"127.0.0.1:{bound.getsockname()[1]}", vllm_start_timeout_seconds=1)
        VllmServer(settings, "none", tmp_path, 128, torch.float32)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(RuntimeError, match=r"was not ready after 1 s .*TimeoutError"):
        settings = Rollout(engine="vllm_server", vllm_address=f"127.0.0.1:{silent.getsockname()[1]}", vllm_start_timeout_seconds=1)
        VllmServer(settings, "none", tmp_path, 128, torch.float32)


def test_a_command_that_cannot_start_vllm(one_rank, tmp_path):
    with pytest.raises(ValueError, match=r"rollout.vllm_command: there is no program 'no-such-python'"):
        VllmServer(Rollout(engine="vllm_server", vllm_command="no-such-python -O"), "none", tmp_path, 128, torch.float32)
    begun = time.monotonic()
    bare = f"{sys.executable} -I -S"  # without any package
    with pytest.raises(RuntimeError, match=r"(?s)^rollout.engine: .*ended before it was ready; the end of .*No module named"):
        VllmServer(Rollout(engine="vllm_server", vllm_command=bare), "none", tmp_path, 128, torch.float32)
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_address": "localhost"}, "vllm_address: got 'localhost', expected host:port"),
        ({"vllm_address": "http://a:1"}, "vllm_address: "),
        ({"vllm_address": "a:99999"}, "vllm_address: "),
        ({"vllm_command": " "}, "vllm_command: "),
        ({"vllm_gpu_memory_utilization": 0.0}, "vllm_gpu_memory_utilization: got 0.0, expected a number above 0"),
        ({"vllm_timeout_seconds": 0}, "vllm_timeout_seconds: got 0"),
        ({"vllm_address": "a:1", "vllm_extra_args": ["--x"]}, "vllm_extra_args: .*already runs"),
        ({"vllm_address": "a:1", "vllm_devices": "0"}, "vllm_devices: .*already runs"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^rollout.{message}"):
        Rollout(engine="vllm_server", **settings)


def test_addresses():
    assert address_of("127.0.0.1:8000") == ("127.0.0.1", 8000)
    assert address_of("[::1]:8000") == ("::1", 8000)


def test_the_watch_ends_children_that_ignore_a_request(tmp_path):
    """A command and its child, both deaf to SIGTERM, end with the process that they were started for; FOLDER is removed."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    deaf = "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN)\n"
    child = f"{deaf}open({str(tmp_path / 'ready')!r}, 'w').close(); time.sleep(600)"
    command = f"{deaf}subprocess.run([sys.executable, '-c', {child!r}])"
    watch = ROOT / "models" / "vllm_watch.py"
    rank = f"""
import os, subprocess, sys, time
command = [sys.executable, {str(watch)!r}, str(os.getpid()), {str(folder)!r}, sys.executable, "-c", {command!r}]
p = subprocess.Popen(command, start_new_session=True)
print(p.pid, flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE)
    watch = psutil.Process(int(process.stdout.readline()))
    assert eventually((tmp_path / "ready").exists, 20)
    family = [watch, *watch.children(recursive=True)]
    assert len(family) == 3
    process.kill()
    process.wait()
    assert gone(family, 20)
    assert not folder.exists()


def test_weights_go_to_shared_memory_only_where_there_is_room(web, one_rank, tmp_path, monkeypatch):
    server, _ = web(answers(GOOD))
    model, _ = policy(make_folder(tmp_path / "model"), one_rank)
    assert server.weights_folder(model).parent == tmp_path / "vllm_weights"  # another's server may not see this /dev/shm
    server.own = True
    monkeypatch.setattr(vllm_server, "SHARED_MEMORY", tmp_path)
    server.scratch = tmp_path / "scratch"
    assert server.weights_folder(model).parent == server.scratch
    assert (server.scratch.stat().st_mode & 0o777) == 0o700
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert server.weights_folder(model).parent == Path(tmp_path, "vllm_weights")


@needs_vllm
def test_a_run_with_vllm_as_its_sampler(start, tmp_path):
    """Three steps of GRPO on two ranks: the loss is corrected for the sampler, whose log-probs are the trainer's but for rounding."""
    settings = {
        "algorithm": "grpo",
        "output_dir": str(tmp_path / "run"),
        "model.model_name_or_path": make_folder(tmp_path / "model"),
        "data.train": "builtin:letters",
        "train.global_batch_size": 16,
        "train.micro_batch_tokens": 512,
        "train.max_steps": 3,
        "train.learning_rate": 1e-3,
        "grpo.reward_funcs": ["length(target=4)"],
        "grpo.num_generations": 4,
        "grpo.max_completion_length": 12,
        "rollout.engine": "vllm_server",
        "rollout.vllm_command": PYTHON,
        "rollout.vllm_extra_args": ["--enforce-eager"],
    }
    run = start(settings, 2).wait()
    lines = run.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["sampling/sampling_logp_difference/mean"] < 1e-4  # also after updates: the server has the new weights
        assert abs(line["sampling/importance_sampling_ratio/mean"] - 1) < 1e-3
        assert line["completions/mean_length"] <= 12 and line["grad_norm"] > 0
