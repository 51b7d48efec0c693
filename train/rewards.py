"""Runs reward functions in processes of their own, so that one that hangs, dies or raises costs a deadline and not the run.

A function gets a whole batch, as in TRL, and `deadline` seconds for it. If that call fails, the completions are scored one by one, so that
all but the bad ones get their values; a hanging one costs the batch's deadline and its own. Once this has taken `RETRY` deadlines, the rest
is left out and counted as skipped. (A function that compares the completions of a batch with each other sees single ones there.)

Workers are fresh interpreters, not forks, as this process has threads and collectives, and not multiprocessing's, which would import
launch/train.py, and so torch, into each. They live from call to call, so functions may keep what they have loaded. This file imports no
torch, so that a worker starts in a fraction of a second.
"""

import ast
import asyncio
import difflib
import faulthandler
import fcntl
import inspect
import json
import math
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Timer
from typing import NamedTuple

from algorithms.rewards import REWARDS, text

RETRY = 3  # deadlines that scoring one by one may take
GRACE = 0.5  # seconds after a deadline in which the worker writes down where it hangs
STARTUP = 120  # seconds to load the functions
GIVEN = ("prompts", "completions", "completion_ids")
MAIN = "import sys; sys.path.insert(0, sys.argv[1]); from train import rewards; rewards.work(*map(int, sys.argv[2:]))"


class Spec(NamedTuple):
    """A reward function as the settings name it."""

    name: str  # in metrics
    path: str | None  # of the user's file; None: one of algorithms/rewards.py
    source: str | None  # what that file held when the run began: a worker started later must not load another version
    settings: dict


def parse(words):
    """The Spec of `name`, `name(setting=1)` or `./file.py:name(setting=1)`; runs nothing of it."""
    found = re.fullmatch(r"""(?:([^("']+\.py):)?([A-Za-z_]\w*)\s*(\(.*\))?""", words.strip(), re.S)
    path, name, arguments = found.groups() if found else (None, words, None)
    if not found or (path is None and name not in REWARDS):
        close = difflib.get_close_matches(name, REWARDS, 1)
        cure = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"grpo.reward_funcs: got {words!r}, expected one of {', '.join(REWARDS)}, or ./file.py:function{cure}")
    settings = literals(arguments or "()")
    if settings is None:
        raise ValueError(
            f"grpo.reward_funcs: got {words!r}, expected settings as in {name}(size=3, word='abc'), numbers and quoted text alone"
        )
    file = Path(path).expanduser().resolve() if path else None
    if file and not file.is_file():
        raise ValueError(f"grpo.reward_funcs: got {words!r}, but there is no file {file}")
    return Spec(name, file and str(file), file and file.read_text(), settings)


def literals(arguments):
    """The keyword arguments "(a=1, b='x')" as a dict; None if they are anything else."""
    with suppress(SyntaxError, ValueError):
        call = ast.parse(f"f{arguments}", mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            found = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
            return None if None in found or len(found) < len(call.keywords) else found
    return None


class Rewards:
    """The reward functions `names` of a run, each with `deadline` seconds per call, on `workers` processes.

    columns: those of the data. ValueError, before anything is trained, for a function that is not there, cannot be loaded, or needs a
    column that the data has not. `failures`: completions that could not be scored by "name: kind", kind being timeout, exit, exception,
    bad value or skipped; 1 for a batch of which each completion alone could. `first`: the first traceback, or what there is, of each.
    """

    def __init__(self, names: list[str], deadline: float, columns: set[str], workers: int = 1):
        assert deadline > 0 and workers > 0, (deadline, workers)
        specs = [parse(words) for words in names]
        if not specs:
            raise ValueError("grpo.reward_funcs: got [], expected one or more")
        self.names = [spec.name for spec in specs]
        self.deadline, self.failures, self.first = deadline, {}, {}
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise ValueError(
                f"grpo.reward_funcs: {twice[0]} is there twice; metrics need names that differ, as of functions in a file of yours"
            )
        self.hello = (specs, sorted(columns))
        self.workers = [Worker() for _ in range(min(workers, len(names)))]
        self.idle = queue.SimpleQueue()  # of indices into workers
        for reply in self._each(lambda worker: worker.ask(self.hello, STARTUP), self.workers):
            if "kind" in reply:
                self.close()
                loading = f"loading {', '.join(self.names)}: " if reply["kind"] != "exception" else ""
                raise ValueError(f"grpo.reward_funcs: {loading}{reply['words']}")
        for slot in range(len(self.workers)):
            self.idle.put(slot)

    def score(self, prompts, completions, completion_ids, columns: dict[str, list]) -> list[list[float]]:
        """One row per completion, in order, with one number per function; NaN for None and for a failure."""
        batch = columns | dict(zip(GIVEN, (prompts, completions, completion_ids)))
        assert {len(values) for values in batch.values()} == {len(completions)}, {k: len(v) for k, v in batch.items()}
        scored = self._each(lambda index: self._score(index, batch), range(len(self.names))) if completions else []
        for name, (rows, whole) in zip(self.names, scored):
            for _, kind, words in rows + whole:
                if kind:
                    self.failures[f"{name}: {kind}"] = self.failures.get(f"{name}: {kind}", 0) + 1
                    self.first.setdefault(f"{name}: {kind}", words)
        return [[math.nan if value is None else value for value, _, _ in row] for row in zip(*(rows for rows, _ in scored))]

    def close(self):
        """Ends the workers. They also end with this process, however it ends."""
        for worker in self.workers:
            worker.close()

    def _each(self, function, items):
        with ThreadPoolExecutor(max(1, len(self.workers))) as pool:
            return list(pool.map(function, items))

    def _score(self, index, batch):
        """Of one function: (value, kind of failure, its words) of each completion, and the same of the batch if only that failed."""
        slot, completions = self.idle.get(), batch["completions"]
        try:
            reply = self._call(slot, index, batch)
            if "rows" in reply:
                return reply["rows"], []
            whole, rows, left = (None, reply["kind"], f"{reply['words']}\n(a batch of {len(completions)})"), [], RETRY * self.deadline
            for i in range(len(completions)):
                started, one = time.monotonic(), reply  # a batch of one was its own second try
                if left <= 0:
                    one = {"kind": "skipped", "words": f"not tried, as those before took {RETRY} deadlines of {self.deadline:g} s"}
                elif len(completions) > 1:
                    one = self._call(slot, index, {name: [values[i]] for name, values in batch.items()})
                rows += one.get("rows") or [(None, one["kind"], f"{one['words']}\nof the completion {text(completions[i])[-500:]!r}")]
                left -= min(time.monotonic() - started, self.deadline)
            return rows, [] if whole[1] in [kind for _, kind, _ in rows] else [whole]
        finally:
            self.idle.put(slot)

    def _call(self, slot, index, batch):
        reply = self._replace(slot) if self.workers[slot].killed else {}
        if "kind" not in reply:
            reply = self.workers[slot].ask((index, batch, self.deadline), self.deadline)
            if self.workers[slot].killed:
                self._replace(slot)  # already now, so that its start counts for the call that made it necessary
        return reply

    def _replace(self, slot):
        self.workers[slot] = Worker()
        reply = self.workers[slot].ask(self.hello, STARTUP)
        if "kind" in reply:
            self.workers[slot].close()
        return reply


class Worker:
    """The parent's end of a worker process."""

    def __init__(self):
        self.socket, theirs = socket.socketpair()
        self.connection = Connection(os.dup(self.socket.fileno()))
        ends, life = os.pipe()
        self.life, self.notes, self.killed = open(life, "wb"), tempfile.TemporaryFile(), False  # noqa: SIM115  open for as long as the worker
        fds = [theirs.fileno(), ends, self.notes.fileno()]
        command = [sys.executable, "-P", "-u", "-c", MAIN, str(Path(__file__).resolve().parents[1]), *map(str, fds)]
        # a session of its own: Ctrl-C does not reach it, and a kill reaches its children; functions print where this process prints
        self.process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True)
        theirs.close()
        os.close(ends)

    def ask(self, message, seconds):
        """The worker's reply, or the kind and the words of its failure, after which it is dead.

        Requests are pickled, as columns may hold anything; replies are JSON, so nothing that runs in a worker can run code here.
        """
        timer = Timer(seconds + GRACE, self.kill)  # and not a timeout for the reply alone, as a worker may also stop to read
        timer.daemon = True
        timer.start()
        reply = None
        try:
            self.connection.send(message)
            reply = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError, ValueError):  # no reply, or half of one
            pass
        finally:
            timer.cancel()
            timer.join()
        if reply is not None and not self.killed:
            return reply
        kind = "timeout" if self.killed else "exit"
        self.kill()
        code = self.process.returncode
        how = f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"
        self.notes.seek(0)
        words = f"no answer within {seconds:g} s" if kind == "timeout" else f"the process ended with {how}"
        words += "\n" + self.notes.read().decode(errors="replace")[-3000:]
        self.close()
        return {"kind": kind, "words": words.strip()}

    def kill(self):
        """Ends the worker and its children at once."""
        if not self.killed:
            self.killed = True
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)  # wakes a reader even if a child that left the group still holds the other end
            self.process.wait()

    def close(self):
        self.kill()
        for end in (self.connection, self.socket, self.life, self.notes):
            end.close()


# ---- in the worker -----------------------------------------------------------------------------------------------------------


def work(pipe, life, notes):
    """A worker's life: load the functions, then score batches until the pipe closes. Arguments are file descriptors."""
    end_with_parent(life)
    faulthandler.enable(file=notes)
    connection = Connection(pipe)
    with suppress(EOFError, OSError):
        specs, columns = connection.recv()
        try:
            functions, reply = load(specs, columns), {}
        except ValueError as error:
            reply = {"kind": "exception", "words": str(error)}
        connection.send_bytes(json.dumps(reply).encode())
        while not reply:
            index, batch, seconds = connection.recv()
            faulthandler.dump_traceback_later(seconds, file=notes)
            answer = score(functions[index], batch)
            faulthandler.cancel_dump_traceback_later()
            connection.send_bytes(json.dumps(answer).encode())


def end_with_parent(life):
    """Has the kernel kill this process and its children, even if they hang in C, when the parent, which holds the other end, is gone."""
    if hasattr(fcntl, "F_SETSIG"):  # Linux; elsewhere a worker ends once its function has returned and the pipe is closed
        fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(life, fcntl.F_SETFL, os.O_ASYNC)
    if select.select([life], [], [], 0)[0]:  # it was gone before
        os._exit(1)


def load(specs, columns):
    """[(function, names of the lists that it gets, settings)]. ValueError says what is missing."""
    modules, found = {}, []
    for spec in specs:
        if spec.path and spec.path not in modules:
            modules[spec.path] = run_file(spec)
        function = getattr(modules[spec.path], spec.name, None) if spec.path else REWARDS[spec.name]
        if not callable(function):
            here = vars(modules[spec.path])
            own = [name for name, value in here.items() if inspect.isfunction(value) and value.__globals__ is here]
            raise ValueError(f"{spec.path} has no function {spec.name}; it has {', '.join(own) or 'none'}")
        takes = wanted(spec, function, columns)
        if not spec.path:  # so that a setting out of range stops the run at its start, and imports take none of a call's time
            try:
                function(**{name: [] for name in takes}, **spec.settings)
            except (TypeError, AttributeError) as error:
                raise ValueError(f"{spec.name}: got {spec.settings}, expected settings of other types ({error})") from error
        found.append((function, takes, spec.settings))
    return found


def run_file(spec):
    name = f"reward_functions_in_{Path(spec.path).stem}"
    sys.modules[name] = module = types.ModuleType(name)  # dataclasses and pickle look there
    module.__file__ = spec.path
    sys.path.append(str(Path(spec.path).parent))
    try:
        exec(compile(spec.source, spec.path, "exec"), module.__dict__)
    except BaseException as error:  # also an exit
        raise ValueError(f"{spec.path} cannot be loaded:\n{traceback.format_exc()}") from error
    return module


def wanted(spec, function, columns):
    """Which of the columns and of what GRPO gives the function takes. ValueError if it needs more."""
    parameters = inspect.signature(function).parameters.values()
    own = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    settable = [p.name for p in own if p.name not in GIVEN]
    have = f"the data has {', '.join(columns) or 'no more columns'}"
    if unknown := [name for name in spec.settings if name not in settable]:
        close = difflib.get_close_matches(unknown[0], settable, 1)
        raise ValueError(f"{spec.name} has no setting {unknown[0]}; " + (f"did you mean {close[0]}?" if close else f"it has {settable}"))
    needed = [p.name for p in own if p.default is p.empty and p.name not in (*GIVEN, *columns, *spec.settings)]
    if needed:
        cure = f"give the data that column (data.columns renames), or set it: {spec.name}({needed[0]}=...)"
        raise ValueError(f"{spec.name} needs {', '.join(needed)}, but {have}; {cure}")
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = [*GIVEN, *(name for name in columns if name not in GIVEN)]
    return [name for name in names if name not in spec.settings and (everything or name in [p.name for p in own])]


def score(loaded, batch):
    """{"rows": [(value, kind of failure, its words)]}, or {"kind", "words"} if the call as a whole failed."""
    function, takes, settings = loaded
    try:
        found = function(**{name: batch[name] for name in takes}, **settings)
        if inspect.isawaitable(found):
            found = asyncio.run(awaited(found))
        rows = [checked(value) for value in found]
    except BaseException:  # also sys.exit
        return {"kind": "exception", "words": traceback.format_exc()[-4000:]}
    if len(rows) != (n := len(batch["completions"])):
        return {"kind": "bad value", "words": f"{len(rows)} values for {n} completions"}
    return {"rows": rows}


async def awaited(found):
    return await found


def checked(value):
    """(the number or None, what is wrong with it or None, in words)"""
    if value is None:
        return None, None, ""
    if isinstance(value, BaseException):
        return None, "exception", "".join(traceback.format_exception(value))[-4000:]
    if not isinstance(value, str | bytes):
        with suppress(Exception):  # whatever float() raises, of a tensor of two numbers for example
            if math.isfinite(number := float(value)):
                return number, None, ""
    return None, "bad value", f"{value!r:.200} is no finite number, nor None"
