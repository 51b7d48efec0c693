"""Ranks forked from a process that has imported everything: the real launch/train.py on real processes, started within a second.

Run as a script, this file is that process: it reads a line of JSON for each thing to do, and answers with one. Faults are put into a rank
by wrapping functions after the fork, so the product knows nothing of them.
"""

import ctypes
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.conftest import read_metrics, write_recipe

PLACES = {  # of a save, in order: the function that is wrapped, which of its calls, and whether the fault comes before or after it
    "flush": ("sync", "rank-", "before"),
    "own tensors": ("write", "rank-", "after"),
    "state": ("put", "state.json", "after"),
    "half a manifest": ("put", "manifest.json", "half"),
    "manifest": ("put", "manifest.json", "after"),
    "before the rename": ("rename", "", "before"),
    "after the rename": ("rename", "", "after"),
    "before the pruning": ("prune", "", "before"),
    "inside of the pruning": ("rmtree", "", "after"),
}


class Born:
    """A run of forked ranks."""

    def __init__(self, nursery, settings, ranks, fault=None, env=None):
        self.nursery, self.folder = nursery, Path(settings["output_dir"])
        self.console = Path(f"{self.folder}.console")
        order = {"config": str(write_recipe(settings)), "ranks": ranks, "fault": fault, "console": str(self.console), "env": env or {}}
        self.pids = nursery.ask(order)["pids"]
        self.codes = None

    def ended(self):
        """Whether every rank has ended; then `codes` has their exit codes, negative ones for signals."""
        if self.codes is None:
            self.codes = self.nursery.ask({"look": self.pids})["codes"]
        return self.codes is not None

    def wait(self, seconds=60):
        """Exit codes, of ranks that must have ended by then."""
        deadline = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {seconds} s:\n{self.console.read_text()[-6000:]}")
            time.sleep(0.02)
        return self.codes

    def good(self):
        """This run, all of whose ranks ended well."""
        assert set(self.wait()) == {0}, self.console.read_text()[-6000:]
        return self

    def signal(self, number, ranks=None):
        for pid in [self.pids[r] for r in ranks] if ranks else self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self):
        if self.codes is None:
            self.signal(signal.SIGKILL)
            while not self.ended():
                time.sleep(0.005)

    def metrics(self):
        return read_metrics(self.folder)

    def status(self):
        return json.loads((self.folder / "run_status.json").read_text())


class Nursery:
    """The other end of the process that forks."""

    def __init__(self):
        env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
        self.process = subprocess.Popen([sys.executable, __file__], **pipes)

    def ask(self, order):
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, settings, ranks, fault=None, env=None):
        return Born(self, settings, ranks, fault, env)

    def close(self):
        self.process.stdin.close()  # its children end with it
        self.process.wait()


# ---- in the process that forks ------------------------------------------------------------------------------------------------


def serve():
    import launch.train  # noqa: F401  once, for all

    codes = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "look" in order:
            for pid in order["look"]:
                if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(found[1])
            done = all(pid in codes for pid in order["look"])
            reply = {"codes": [codes[pid] for pid in order["look"]] if done else None}
        else:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            reply = {"pids": [fork(rank, order, port) for rank in range(order["ranks"])]}
        print(json.dumps(reply), flush=True)


def fork(rank, order, port):
    if pid := os.fork():
        return pid
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with its parent
        console = os.open(order["console"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for fd, target in ((console, 1), (console, 2), (os.open(os.devnull, os.O_RDONLY), 0)):
            os.dup2(fd, target)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["ranks"]), "MASTER_PORT": str(port)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | order["env"]
        sys.argv = ["train.py", "--config", order["config"]]
        from launch import train

        if order["fault"]:
            arm(rank, **order["fault"])
        train.main()
    except SystemExit as e:
        os._exit(e.code or 0)
    finally:
        os._exit(1)


def arm(rank, do, place, step=None, call=1, on=None):
    """Have rank `on` (None: every rank) do something at the `call`-th time (None: each time) that it comes to a place.

    place: one of PLACES, in the save of `step` (None: of any); or a phase of train/peers.py, at a forward pass or a token that is decoded.
    """
    if on not in (None, rank):
        return
    from models import generate
    from train import checkpoint, loop, peers, reference

    seen = []

    def fire():
        seen.append(place)
        if call in (None, len(seen)):
            DO[do]()

    def wrap(owner, name, wanted, when="before"):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            hit = wanted(*args)
            if hit and when == "half":
                args[0].write_bytes(args[1][: len(args[1]) // 2])
            if hit and when != "after":
                fire()
            result = function(*args, **kwargs)
            if hit and when == "after":
                fire()
            return result

        setattr(owner, name, wrapped)

    number = r"\d+"
    if place in PLACES:
        name, file, when = PLACES[place]
        owner = {"rename": os, "rmtree": checkpoint.shutil}.get(name, checkpoint)
        inside = re.compile(rf"\.tmp-checkpoint-{step or number}(/|$)")
        wanted = {
            "prune": lambda _, now, __: now == step,
            "rmtree": lambda path, **_: Path(path).name == f"checkpoint-{step - 2}",  # of the three, the oldest
        }.get(name, lambda path, *_: inside.search(str(path)) and (not file or path.name.startswith(file)))
        wrap(owner, name, wanted, when)
    else:
        for owner, name in ((loop, "token_logps"), (reference, "token_logps"), (generate.Decoder, "step")):
            wrap(owner, name, lambda *_: peers.here["phase"] == place)


def hold_the_interpreter():
    """A regular expression that takes for ever, in C, with the lock of the interpreter."""
    re.fullmatch(r"(a|aa)+$", "a" * 80 + "b")


def out_of_memory():
    import torch

    raise torch.OutOfMemoryError("out of memory: tried to allocate 80 GiB")


def input_output_error():
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def not_finite():
    """The next gradient norm of this rank is not a number."""
    from train import loop

    norm = loop.get_total_norm
    loop.get_total_norm = lambda grads: norm([g * float("nan") for g in grads])


DO = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "usr1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(600),
    "nap": lambda: time.sleep(3),
    "hold": hold_the_interpreter,
    "abort": os.abort,
    "segfault": lambda: ctypes.string_at(0),
    "out of memory": out_of_memory,
    "input/output error": input_output_error,
    "not finite": not_finite,
}

if __name__ == "__main__":
    serve()
