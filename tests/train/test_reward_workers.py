"""Reward functions in worker processes: what they get, what is refused at the start, and what a bad one costs."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from algorithms import rewards as builtin
from train.rewards import Rewards, parse

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 1.5  # seconds
FILE = r'''
import asyncio, ctypes, math, os, re, subprocess, sys, time
from dataclasses import dataclass
from fractions import Fraction

@dataclass
class Seen:
    calls: int = 0

seen = Seen()

def size(completions, scale=1, **columns):
    """As long as the completion."""
    return [scale * len(c) for c in completions]

def rows(prompts, completions, completion_ids, number):
    """No **columns: it must get those it names, and no others."""
    return [f"{p}{c}{len(i)}{n}" == f"p{c}3{n}" and n for p, c, i, n in zip(prompts, completions, completion_ids, number)]

async def waits(completions, **columns):
    async def one(c):
        await asyncio.sleep(0.01)
        if c == "raise":
            raise KeyError(c)
        return Fraction(len(c), 2)
    return await asyncio.gather(*map(one, completions), return_exceptions=True)

def everything(**columns):
    seen.calls += 1
    return [float(len(columns) + 100 * seen.calls)] * len(columns["completions"])

def pid(completions, **columns):
    return [os.getpid()] * len(completions)

def slow(completions, **columns):
    time.sleep(1)
    return [1.0] * len(completions)

def only_one(completions, **columns):
    if len(completions) > 1:
        while True:
            pass
    return [1.0]

def wants(completions, gold, hint="", **columns):
    return [1.0] * len(completions)

def noisy(completions, **columns):
    print("x" * 100_000)
    print("y", file=sys.stderr)
    os.write(1, b"raw\n")
    sys.stdin.read()
    return [1.0] * len(completions)

def evil(completions, **columns):
    """What the first word of a completion says; the others get their length."""
    found = []
    for c in completions:
        if c == "loop":
            while True:
                pass
        elif c == "regex":  # in C, with the global lock held
            re.match(r"(a+)+$", "a" * 60 + "b")
        elif c == "sleep":
            ctypes.PyDLL(None).sleep(1000)
        elif c == "stubborn":
            import signal
            for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(s, signal.SIG_IGN)
            while True:
                pass
        elif c == "child":
            subprocess.run(["sleep", "1000"])
        elif c == "exit":
            os._exit(3)
        elif c == "segfault":
            ctypes.string_at(0)
        elif c == "close":
            os.closerange(3, 100)
        elif c == "raise":
            raise KeyError("this one")
        elif c == "sys.exit":
            sys.exit(4)
        elif c == "short":
            return []
        values = {"str": "1.0", "nan": math.nan, "inf": math.inf, "list": [1], "none": None, "true": True, "error": ValueError("no")}
        found.append(values.get(c, len(c)))
    return found
'''


@pytest.fixture(scope="session")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "my_rewards.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def make():
    """Rewards that are closed at the end, with all of their processes gone."""
    made = []

    def begin(names, columns=(), deadline=DEADLINE, **settings):
        made.append(Rewards(names, deadline, set(columns), **settings))
        return made[-1]

    yield begin
    for rewards in made:
        rewards.close()
    assert [p for p in psutil.Process().children(recursive=True) if "train import rewards" in " ".join(p.cmdline())] == []


def score(rewards, completions, **columns):
    n = len(completions)
    return rewards.score(["p"] * n, completions, [[1, 2, 3]] * n, columns)


def same(found, expected):
    return [[None if math.isnan(v) else v for v in row] for row in found] == expected


# ---- what works --------------------------------------------------------------------------------------------------------------


def test_values_names_and_order(make, file):
    names = ["exact_match", f"{file}:size(scale=2)", "soft_overlong(max_length=4, cache=2)", f"{file}:rows", f"{file}:waits"]
    rewards = make(names, {"answer", "number"}, workers=2)
    assert rewards.names == ["exact_match", "size", "soft_overlong", "rows", "waits"]
    found = score(rewards, ["abc", "de", ""], answer=["abc", "x", ""], number=[5, 6, 7])
    assert found == [[1.0, 6.0, -0.5, 5.0, 1.5], [0.0, 4.0, -0.5, 6.0, 1.0], [1.0, 0.0, -0.5, 7.0, 0.0]]
    assert all(type(v) is float for row in found for v in row)
    assert rewards.score([], [], [], {"answer": [], "number": []}) == []
    assert rewards.failures == rewards.first == {}


def test_one_process_keeps_its_state_and_gets_every_column(make, file):
    rewards = make([f"{file}:everything", f"{file}:pid"], {"a", "b"})
    one, two = (score(rewards, ["c"], a=[1], b=[2])[0] for _ in range(2))
    assert one == [105.0, one[1]] and two == [205.0, one[1]] and one[1] != os.getpid()


def test_none_and_chat(make):
    rewards = make(["accuracy(math_verify=False)"], {"answer"})
    chat = [[{"role": "assistant", "content": c}] for c in ("4", "5")]
    assert same(score(rewards, chat, answer=["4", "a cat"]), [[1.0], [None]])
    assert rewards.failures == {}


def test_functions_run_at_the_same_time(make, file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(FILE.replace("def slow", "def slower"))
    rewards = make([f"{file}:slow", f"{other}:slower"], workers=2, deadline=10)
    score(rewards, ["a"])
    started = time.monotonic()
    assert score(rewards, ["a", "b"]) == [[1.0, 1.0], [1.0, 1.0]]
    assert 1 <= time.monotonic() - started < 1.9


def test_output_of_functions_is_shown_and_harmless(make, file, capfd):
    rewards = make([f"{file}:noisy"])
    assert score(rewards, ["a"]) == [[1.0]]
    out, err = capfd.readouterr()
    assert "x" * 100_000 + "\nraw\n" in out and "y\n" in err


def test_large_batches(make, file):
    rewards = make([f"{file}:size"], {"a"}, deadline=20)
    completions = ["c" * (10_000 * (i % 3)) for i in range(300)]
    assert score(rewards, completions, a=["z" * 1000] * 300) == [[10_000.0 * (i % 3)] for i in range(300)]


def test_a_file_may_import_its_neighbours_and_the_built_ins(make, tmp_path):
    (tmp_path / "neighbour.py").write_text("BONUS = 2.0")
    path = tmp_path / "mine.py"
    path.write_text(
        "import neighbour\nfrom algorithms.rewards import exact_match\n"
        "def bonus(completions, answer, **_):\n    return [neighbour.BONUS * r for r in exact_match(completions, answer)]\n"
    )
    rewards = make([f"{path}:bonus"], {"answer"})
    path.write_text("def bonus(completions, **_):\n    return [9.0] * len(completions)\n")
    os.kill(rewards.workers[0].process.pid, signal.SIGKILL)
    for _ in range(2):  # the worker that replaces the first has the file as it was
        assert score(rewards, ["a", "b"], answer=["a", "a"]) == [[2.0], [0.0]]
    assert rewards.failures == {"bonus: exit": 1}


def test_relative_path(make, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert make(["./my_rewards.py:size"]).names == ["size"]


def test_workers_import_no_torch():
    code = "import sys; from train import rewards; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- refused at the start ----------------------------------------------------------------------------------------------------


REFUSED = [
    ("acuracy", "got 'acuracy', expected one of accuracy, format, .*; did you mean accuracy\\?"),
    ("os.system", "got 'os.system', expected one of .* or ./file.py:function"),
    ("./nowhere.py:f", "got './nowhere.py:f', but there is no file /.*nowhere.py"),
    ("{file}:sise", "has no function sise; it has size, rows, "),
    ("{file}:seen", "has no function seen"),
    ("{file}:wants", "wants needs gold, but the data has answer, other; .*wants\\(gold=...\\)"),
    ("{file}:size(scal=3)", "size has no setting scal; did you mean scale\\?"),
    ("exact_match(target=3)", "exact_match has no setting target; it has"),
    ("soft_overlong(max_length=512)", "soft_overlong needs cache, but"),
    ("soft_overlong(max_length=1, cache=2)", "got cache=2 and max_length=1"),
    ("soft_overlong(max_length='a', cache=2)", "soft_overlong: got .* expected settings of other types"),
    ("length(target=__import__('os').getpid())", "expected settings as in length"),
    ("length(100)", "expected settings as in length"),
    ("length(target=1, target=2)", "expected settings as in length"),
    ("length(target=1)(alpha=2)", "expected settings as in length"),
    ("length(**{'target': 1})", "expected settings as in length"),
    ("length(target=1", "got 'length\\(target=1', expected one of"),
    ("judge(url='http://h/v1')", "judge needs model, but"),
    ("judge(url='http://h/v1', model='m', api_key_env='NO_SUCH_KEY')", "NO_SUCH_KEY, named by api_key_env, holds no key"),
    ("", "got '', expected one of"),
]


@pytest.mark.parametrize("name, message", REFUSED)
def test_refused(make, file, name, message):
    with pytest.raises(ValueError, match=message) as error:
        make([name.replace("{file}", str(file))], {"answer", "other"})
    assert str(error.value).startswith("grpo.reward_funcs: ")


def test_missing_answer_column(make):
    with pytest.raises(ValueError, match="accuracy needs solution or answer, but the data has gold"):
        make(["accuracy"], {"gold"})


def test_no_name(make):
    with pytest.raises(ValueError, match="got \\[\\], expected one or more"):
        make([])


def test_duplicate_name(make, file):
    with pytest.raises(ValueError, match="size is there twice"):
        make([f"{file}:size", f"{file}:size(scale=2)"])


@pytest.mark.parametrize(
    "line, message", [("1 / 0", "ZeroDivisionError"), ("import sys; sys.exit(3)", "SystemExit"), ("def", "SyntaxError")]
)
def test_a_file_that_cannot_be_loaded(make, tmp_path, line, message):
    path = tmp_path / "broken.py"
    path.write_text(line)
    with pytest.raises(ValueError, match=f"broken.py cannot be loaded:\n(.*\n)*.*{message}"):
        make([f"{path}:f"])


def test_a_file_that_never_ends_loading(make, tmp_path, monkeypatch):
    monkeypatch.setattr("train.rewards.STARTUP", 2)
    path = tmp_path / "endless.py"
    path.write_text("while True: pass")
    with pytest.raises(ValueError, match="loading f: no answer within 2 s"):
        make([f"{path}:f"])


def test_parse_takes_literals(file):
    spec = parse("judge(url='http://h:1/v1', model=\"a.py:b(c)\", lowest=-1, options={'stop': ['x']})")
    assert (spec.name, spec.path) == ("judge", None)
    assert spec.settings == {"url": "http://h:1/v1", "model": "a.py:b(c)", "lowest": -1, "options": {"stop": ["x"]}}
    assert parse(f"{file}:size").source == FILE


# ---- failures ----------------------------------------------------------------------------------------------------------------


HANGS = {"loop": "while True", "regex": "re.match", "sleep": "ctypes", "stubborn": "signal", "child": "subprocess"}


@pytest.mark.parametrize("what", HANGS)
def test_a_hang_costs_its_value_alone(make, file, what):
    rewards = make([f"{file}:evil", "exact_match"], {"answer"})
    first = rewards.workers[0].process
    started = time.monotonic()
    found = score(rewards, ["abc", what, "de"], answer=["abc"] * 3)
    assert time.monotonic() - started < 2 * DEADLINE + 6  # the batch's deadline, its own, and two new processes
    assert same(found, [[3.0, 1.0], [None, 0.0], [2.0, 0.0]])
    assert rewards.failures == {"evil: timeout": 1}
    words = rewards.first["evil: timeout"]
    assert words.startswith(f"no answer within {DEADLINE:g} s") and f"of the completion '{what}'" in words
    assert "my_rewards.py" in words and "in evil" in words  # where it hung, also if in C
    assert first.returncode == -signal.SIGKILL and rewards.workers[0].process.pid != first.pid
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1000"]]
    assert score(rewards, ["abc"], answer=["abc"]) == [[3.0, 1.0]]


DEATHS = {"exit": "exit code 3", "segfault": "signal 11 (Segmentation fault)", "close": "ended with"}


@pytest.mark.parametrize("what", DEATHS)
def test_a_death_costs_its_value_alone(make, file, what):
    rewards = make([f"{file}:evil"])
    assert same(score(rewards, ["abc", what, "de", what]), [[3.0], [None], [2.0], [None]])
    assert rewards.failures == {"evil: exit": 2}
    assert DEATHS[what] in rewards.first["evil: exit"]
    assert ("in evil" in rewards.first["evil: exit"]) == (what == "segfault")
    assert score(rewards, ["abc"]) == [[3.0]]


@pytest.mark.parametrize(
    "what, kind, words",
    [
        ("raise", "exception", "KeyError: 'this one'"),
        ("sys.exit", "exception", "SystemExit: 4"),
        ("error", "exception", "ValueError: no"),
        ("short", "bad value", "0 values for 1 completions"),
        ("str", "bad value", "'1.0' is no finite number"),
        ("nan", "bad value", "nan is no finite number"),
        ("inf", "bad value", "inf is no finite number"),
        ("list", "bad value", "[1] is no finite number"),
    ],
)
def test_other_failures_cost_their_value_alone(make, file, what, kind, words):
    rewards = make([f"{file}:evil", f"{file}:pid"])
    before = score(rewards, ["a"])[0][1]
    found = score(rewards, ["abc", what, "none", "true"])
    assert same([row[:1] for row in found], [[3.0], [None], [None], [1.0]])
    assert rewards.failures == {f"evil: {kind}": 1} and words in rewards.first[f"evil: {kind}"]
    assert [row[1] for row in found] == [before] * 4  # the process lives on
    score(rewards, ["abc", what])
    assert rewards.failures == {f"evil: {kind}": 2}


def test_an_async_failure_costs_its_value_alone(make, file):
    rewards = make([f"{file}:waits"])
    assert same(score(rewards, ["abc", "raise"]), [[1.5], [None]])
    assert rewards.failures == {"waits: exception": 1} and "KeyError" in rewards.first["waits: exception"]


def test_failures_stop_after_their_deadlines(make, file):
    rewards = make([f"{file}:evil"], deadline=1.0)
    started = time.monotonic()
    found = score(rewards, ["abc", *["loop"] * 5, "de"])
    assert time.monotonic() - started < 4 * 1.0 + 8
    assert same(found, [[3.0]] + [[None]] * 6)
    failures = rewards.failures
    assert failures["evil: timeout"] in (3, 4) and sum(failures.values()) == 6 and set(failures) == {"evil: timeout", "evil: skipped"}
    assert "not tried, as those before took 3 deadlines of 1 s" in rewards.first["evil: skipped"]


def test_a_batch_too_large_for_its_deadline_is_said(make, file):
    rewards = make([f"{file}:only_one"])
    assert score(rewards, ["a", "b"]) == [[1.0], [1.0]]
    assert rewards.failures == {"only_one: timeout": 1} and "(a batch of 2)" in rewards.first["only_one: timeout"]


def test_one_completion_is_tried_once(make, file):
    rewards = make([f"{file}:evil"])
    started = time.monotonic()
    assert same(score(rewards, ["loop"]), [[None]])
    assert time.monotonic() - started < DEADLINE + 3
    assert rewards.failures == {"evil: timeout": 1}


PARENT = """
import sys
from train.rewards import Rewards
rewards = Rewards([sys.argv[1] + ":evil", sys.argv[1] + ":size"], 1000, set(), workers=2)
print(*(worker.process.pid for worker in rewards.workers), flush=True)
rewards.score(["p"] * 2, ["a", sys.argv[2]], [[1]] * 2, {})
"""


@pytest.mark.parametrize(
    "what, how", [("regex", signal.SIGKILL), ("child", signal.SIGKILL), ("child", signal.SIGTERM), ("stubborn", signal.SIGINT)]
)
def test_workers_end_with_their_parent(file, what, how):
    """Also those that hang in C, and their children."""
    signals = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # which a job in a shell's background ignores
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, file, what], cwd=ROOT, **pipes, **signals)
    family = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(family) == 2
    time.sleep(1)  # until the function hangs
    family += [child for process in family for child in process.children()]
    assert len(family) == 2 + (what == "child")
    parent.send_signal(how)
    for _ in range(20 if how == signal.SIGINT else 0):  # the first ones wait for the threads of `score`
        time.sleep(0.5)
        parent.send_signal(how)
    _, alive = psutil.wait_procs([*family, psutil.Process(parent.pid)] if parent.poll() is None else family, timeout=10)
    alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert alive == []


def test_judge_in_a_worker(make, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-key")

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            words = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            if "stall" in words:
                time.sleep(3)
            score = "my key is " + self.headers["Authorization"] if "garbage" in words else "Score: 8"
            body = json.dumps({"choices": [{"message": {"content": score}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    rewards = make([f"judge(url='{url}', model='m', timeout=2, api_key_env='JUDGE_KEY')"], deadline=20)
    assert same(score(rewards, ["fine", "garbage", "stall"]), [[0.8], [None], [None]])
    assert rewards.failures == {"judge: exception": 2}
    assert "my key is Bearer ***" in rewards.first["judge: exception"] and "secret-key" not in str(rewards.first)
    server.shutdown()
    server.server_close()


def test_built_ins_with_all_they_are_given(make):
    """Each built-in takes whatever columns there are, and on the worker gives what it gives here."""
    settings = {"length": "(target=3)", "soft_overlong": "(max_length=4, cache=2)", "accuracy": "(math_verify=False)"}
    names = [name + settings.get(name, "") for name in builtin.REWARDS if name != "judge"]
    rewards = make(names, {"answer", "prompt", "other"})
    found = score(rewards, [r"\boxed{4}", "<think>a</think>4"], answer=["4", "5"], prompt=["x", "y"], other=[None, None])
    assert found == [[1.0, 0.0, 1.0, 0.0, 0.0, -0.5, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0, -0.5, 0.0]]
