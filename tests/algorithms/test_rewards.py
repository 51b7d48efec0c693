"""The built-in reward functions: numbers worked by hand, TRL's numbers, and a judge behind a real HTTP server."""

import importlib.util
import json
import random
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product

import pytest
from trl.rewards import accuracy_reward, get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from algorithms import rewards

needs_math_verify = pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason='needs pip install "baretune[math]"')


def chat(words):
    return [[{"role": "assistant", "content": w}] for w in words]


def both(function, words, **columns):
    """Of strings, after a check that they and messages are scored alike."""
    found = function(completions=words, **columns)
    assert found == function(completions=chat(words), **columns)
    return found


# ---- answers -----------------------------------------------------------------------------------------------------------------


def test_boxed():
    cases = {
        r"\boxed{4}": ["4"],
        r"\boxed{\frac{1}{2}} or \boxed {x}": [r"\frac{1}{2}", "x"],
        r"\boxed{\{1, 2\}}": [r"\{1, 2\}"],
        r"\boxed{\boxed{5}}": ["5", r"\boxed{5}"],
        r"\boxed{4": [],
        r"} {a} \boxed{}": [""],
    }
    assert {words: rewards.boxed(words) for words in cases} == cases


NUMERIC = [  # words, gold, reward
    ("so it is 1234.", "48 + 1186 = <<48+1186=1234>>1234\n#### 1,234", 1.0),
    (r"\boxed{1234}", "#### 1,234", 1.0),
    (r"\boxed{1243}", "#### 1,234", 0.0),
    ("#### $1,234.50", "1234.5", 1.0),
    ("**42**", "42", 1.0),
    (r"\(42\)", "42", 1.0),
    ("#### 5\nor perhaps #### 7 eggs\n9", "7", 1.0),
    (r"first \boxed{3}, no: \boxed{4}. 3", "4", 1.0),
    (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
    ("1/2", r"\boxed{\dfrac{1}{2}}", 1.0),
    (r"\boxed{50\%}", "50", 1.0),
    (r"\boxed{-3}", "3", 0.0),
    (r"\boxed{1, 2}", "2", 0.0),
    ("no number", "2", 0.0),
    ("", "2", 0.0),
    ("9" * 5000, "2", 0.0),
    ("2", "a cat", None),
    ("1", "x^2+1", None),
    ("2", r"\boxed{1, 2}", None),
    ("0", "1/0", None),
]


@pytest.mark.parametrize("words, gold, reward", NUMERIC)
def test_accuracy_of_numbers(words, gold, reward):
    assert both(rewards.accuracy, [words], solution=[gold], math_verify=False) == [reward]
    assert both(rewards.accuracy, [words], answer=[gold], math_verify=False) == [reward]


def test_accuracy_prefers_solution_and_says_what_is_missing():
    assert rewards.accuracy(["4"], solution=[4], answer=["5"], math_verify=False) == [1.0]
    with pytest.raises(ValueError, match="needs solution or answer, but the data has gold"):
        rewards.accuracy(["4"], math_verify=False, gold=["4"])


@needs_math_verify
def test_accuracy_is_trls_on_latex():
    golds = [r"\frac{1}{3}", r"\boxed{x+1}", "$2$", r"$\sqrt{8}$", "42", r"\boxed{1,234}", r"$(1, 2)$", "a cat", r"so $x=\frac{3}{4}$"]
    words = [
        *(r"\boxed{\frac{1}{3}}", r"\boxed{\frac{2}{6}}", r"My answer is \boxed{1 + x}", r"\boxed{2\sqrt{2}}", r"\boxed{42}"),
        *(r"\boxed{1,234}", r"\boxed{(1,2)}", r"\boxed{1} and \boxed{2}", r"\boxed{0.75}", r"\boxed{", "none"),
    ]
    pairs = list(product(words, golds))
    mine = both(rewards.accuracy, [w for w, _ in pairs], solution=[g for _, g in pairs], math_verify=True)
    assert mine == accuracy_reward(chat([w for w, _ in pairs]), [g for _, g in pairs])
    assert {0.0, 1.0, None} == set(mine)


@needs_math_verify
def test_accuracy_with_math_verify_also_reads_what_trl_does_not():
    words = ["#### 1,234", "It is 1234.", "so 1/2", "$2$", "#### 1243", "nothing"]
    golds = ["#### 1,234", "#### 1,234", "0.5", "2", "#### 1,234", "5"]
    assert both(rewards.accuracy, words, answer=golds) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert accuracy_reward(chat(words), golds) == [0.0] * 6
    found = []
    thread = threading.Thread(target=lambda: found.extend(rewards.accuracy(words, answer=golds)))  # where math-verify may set no alarm
    thread.start()
    thread.join()
    assert found == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


# ---- form and length ---------------------------------------------------------------------------------------------------------


def test_format_is_trls():
    draw = random.Random(0)
    parts = ["<think>", "</think>", "a", "\n", "<answer>", " "]
    words = ["".join(draw.choices(parts, k=draw.randrange(7))) for _ in range(2000)]
    words += ["<think>a</think>b", "<think>\na\n</think>\nb", "<think><think>a</think>b", "a</think>b", " <think>a</think>"]
    found = both(rewards.format, words)
    assert found == think_format_reward(chat(words))
    assert found[-5:] == [1.0, 1.0, 0.0, 0.0, 0.0] and 50 < sum(found) < 1000


def test_boxed_format():
    words = [r"so \boxed{4}", "4", r"\boxed{4} or \boxed{5}", r"\boxed{ }", r"\boxed{4"]
    assert both(rewards.boxed_format, words) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_exact_match():
    assert both(rewards.exact_match, [" abc\n", "abc.", "7"], answer=["abc", "abc", 7]) == [1.0, 0.0, 1.0]


def test_length():
    assert rewards.length([[1] * 150, [1] * 100, [1] * 90], target=100) == pytest.approx([-0.015, 0.0, -0.003])


def test_soft_overlong_is_trls():
    assert rewards.soft_overlong([[1] * n for n in (80, 90, 100, 101)], max_length=100, cache=20) == [0.0, -0.5, -1.0, -1.0]
    ids = [[1] * n for n in range(130)]
    for longest, cache in [(100, 20), (100, 100), (100, 1), (100, 0), (7, 3)]:
        assert rewards.soft_overlong(ids, longest, cache) == get_soft_overlong_punishment(longest, cache)(ids)
    with pytest.raises(ValueError, match="got cache=200 and max_length=100"):
        rewards.soft_overlong([], 100, 200)


def test_repetition_is_trls():
    assert rewards.repetition([[5] * 5, [1, 2, 3, 4], [1]], ngram_size=2) == [-0.75, 0.0, 0.0]
    draw = random.Random(0)
    ids = [draw.choices(range(4), k=draw.randrange(30)) for _ in range(300)]
    for size, penalty in [(1, -1.0), (2, -0.5), (3, -1.0), (5, 0.0)]:
        assert rewards.repetition(ids, size, penalty) == pytest.approx(get_repetition_penalty_reward(size, penalty)(ids), abs=1e-12)
    with pytest.raises(ValueError, match="ngram_size=0"):
        rewards.repetition([], 0)


# ---- the judge ---------------------------------------------------------------------------------------------------------------


@contextmanager
def server(reply):
    """An OpenAI-compatible server; reply(request, headers) -> (status, words or bytes). Yields its url and the requests it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((self.path, request, dict(self.headers)))
            status, words = reply(request, self.headers)
            body = words if isinstance(words, bytes) else json.dumps({"choices": [{"message": {"content": words}}]}).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", words.decode())
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(OSError):  # a client that has stopped waiting
                self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", got
    httpd.shutdown()
    httpd.server_close()


def asked(request):
    return request["messages"][0]["content"]


def test_judge(monkeypatch):
    monkeypatch.setenv("A_KEY", "secret-key")
    scores = {"good": "Fine.\n**Score:** 7", "best": "Score: 3, no: score: 10", "half": "Score: 2.5/10"}
    with server(lambda request, _: (200, next(s for w, s in scores.items() if f"<{w}>" in asked(request)))) as (url, got):
        found = rewards.judge(
            prompts=[[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "{completion}?"}]] * 3,
            completions=chat(["<good>", "<best>", "<half>"]),
            url=url + "/",
            model="m",
            template=r"{prompt} \frac{1}{2} {completion} {gold}",
            api_key_env="A_KEY",
            gold=["a", "b", "c"],
        )
    assert found == [0.7, 1.0, 0.25]
    path, request, headers = next(g for g in got if "<good>" in asked(g[1]))
    assert (path, request["model"], request["temperature"]) == ("/v1/chat/completions", "m", 0)
    assert asked(request) == "system: Be kind.\n\nuser: {completion}? \\frac{1}{2} <good> a"
    assert headers["Authorization"] == "Bearer secret-key"


def test_judge_on_another_scale():
    with server(lambda *_: (200, "Score: 4")) as (url, got):
        settings = {"url": url, "model": "m", "lowest": 1, "highest": 5, "options": {"max_tokens": 9}}
        assert rewards.judge(["p"], ["c"], **settings) == [0.75]
    assert "temperature" not in got[0][1] and got[0][1]["max_tokens"] == 9 and "Authorization" not in got[0][2]


def test_judge_failures_are_of_one_completion(monkeypatch):
    monkeypatch.setenv("A_KEY", "secret-key")
    release = threading.Event()
    replies = {
        "none": (200, "It is good."),
        "off": (200, "Score: 11"),
        "json": (200, b"<html>"),
        "null": (200, None),
        "key": (401, b"wrong key secret-key"),
        "down": (500, b"out of memory"),
        "fine": (200, "Score: 5"),
    }

    def reply(request, _):
        if "<slow>" in asked(request):
            release.wait(20)
        return next((r for w, r in replies.items() if f"<{w}>" in asked(request)), (200, "Score: 1"))

    with server(reply) as (url, got):
        words = ["<none>", "<off>", "<json>", "<null>", "<key>", "<down>", "<slow>", "<fine>"]
        started = time.monotonic()
        found = rewards.judge(["p"] * 8, words, url, "m", "{completion}", api_key_env="A_KEY", timeout=3)
        assert time.monotonic() - started < 15
        release.set()
    assert found[-1] == 0.5 and all(isinstance(f, RuntimeError) for f in found[:-1])
    causes = [
        "got 'It is good.'",
        "from 0.0 to 10.0",
        "JSON",
        "TypeError",
        "HTTP 401: wrong key ***",
        "HTTP 500: out of memory",
        "timed out",
    ]
    assert [c for c, f in zip(causes, found) if c not in str(f)] == []
    assert not any("secret-key" in repr(f) + repr(f.__context__) + repr(f.__cause__) for f in found[:-1])
    assert sum("<down>" in asked(g[1]) for g in got) == 3  # a failing server is asked again, a refusing one is not
    assert sum("<key>" in asked(g[1]) for g in got) == 1


def test_judge_keeps_its_key_from_other_hosts(monkeypatch):
    monkeypatch.setenv("A_KEY", "secret-key")
    seen = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(dict(self.headers))
            self.send_error(404)

        def log_message(self, *args):
            pass

    other = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    with server(lambda *_: (302, f"http://127.0.0.1:{other.server_port}/".encode())) as (url, got):
        assert isinstance(rewards.judge(["p"], ["c"], url, "m", api_key_env="A_KEY")[0], RuntimeError)
    other.shutdown()
    other.server_close()
    assert "secret-key" in got[0][2]["Authorization"] and seen and "secret-key" not in str(seen)


def test_judge_refuses_bad_settings(monkeypatch):
    monkeypatch.setenv("A_KEY", "se\ncret")
    for name in ("A_KEY", "NO_SUCH_KEY"):
        with pytest.raises(ValueError, match=f"{name}, named by api_key_env, holds no key") as error:
            rewards.judge([], [], "http://h/v1", "m", api_key_env=name)
        assert "cret" not in str(error.value)
    for settings in ({"url": "file:///etc/passwd"}, {"template": "{prompt}"}, {"lowest": 10}):
        with pytest.raises(ValueError, match="expected a url that begins with http"):
            rewards.judge([], [], **{"url": "http://h/v1", "model": "m"} | settings)
