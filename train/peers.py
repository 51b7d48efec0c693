"""What ranks tell each other beside collectives: that one was asked to stop, where each stands, and whether it lives.

It goes through the store by which the ranks found each other, from a thread of each, so it also works while a collective hangs.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

STOP = signal.SIGTERM, signal.SIGUSR1
BEAT = 0.5  # seconds between two signs of life
AGAIN = 2.0  # seconds; a signal that comes sooner is the first one twice, as a process group's and torchrun's copy of it
SILENCE = 4 * BEAT  # what tells a dead rank from a waiting one

received = []  # signals of this process, and "another rank" once one of those was signalled
here = {"phase": "start", "since": time.monotonic()}
wake = threading.Event()


class Preempted(Exception):
    """All ranks leave what they do, as one of them was asked to stop."""


def begin():
    """Catch SIGTERM and SIGUSR1, a second one of which ends the process; and begin to tell the other ranks."""
    ears, mouth = os.pipe()
    os.set_blocking(mouth, False)
    signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    for number in STOP:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=listen, args=(ears,), daemon=True).start()
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: without torchrun nobody would end this process
    if dist.get_world_size() > 1:
        start = torch.tensor([time.time_ns()])  # torchrun's store outlives a restart, and a stop of before is none of this start
        dist.broadcast(start, 0)
        # a connection of its own: this process may wait in the other one
        here["store"] = dist.PrefixStore(str(start.item()), _get_default_store().clone())
        threading.Thread(target=tell, args=(here["store"],), daemon=True).start()


def listen(ears):
    """A thread's life: note signals, and end the process at a second one. The main thread could not while it waits in a collective."""
    first = None
    while True:
        for number in os.read(ears, 1):
            if number in STOP:
                received.append(number)
                wake.set()
                first = first or time.monotonic()
                if time.monotonic() - first > AGAIN:
                    os._exit(128 + number)


def tell(store):
    """A thread's life: post where this rank stands, and look whether another was asked to stop."""
    rank, count = dist.get_rank(), 0
    with suppress(RuntimeError):  # the store ends with torchrun or rank 0
        while True:
            count += 1
            store.set(f"peers/beat/{rank}", str(count))
            store.set(f"peers/phase/{rank}", here["phase"])
            if received:
                store.set("peers/stop", "")
            elif store.check(["peers/stop"]):
                received.append("another rank")
            wake.wait(BEAT)
            wake.clear()


def now(phase):
    """Say what this rank does from now on."""
    here.update(phase=phase, since=time.monotonic())
    wake.set()


def asked():
    """Whether this rank knows that the run was asked to stop; others may not know it yet."""
    return bool(received)


def together():
    """A collective: Preempted on every rank if any was asked to stop."""
    count = torch.tensor(float(asked()))
    dist.all_reduce(count)
    if count:
        received.append("another rank")
        raise Preempted


def between(items):
    """The items, with a look before each whether to stop; every rank must have equally many."""
    for item in items:
        together()
        yield item


def lost(error):
    """Which ranks are missing, and where they were, if `error` is that of a collective; else tells the others of it. Returns words."""
    words, of_a_collective = [], isinstance(error, dist.DistError) or "third_party/gloo" in str(error) or "[gloo]" in str(error)
    if "store" in here:
        failure = "" if of_a_collective else f"{type(error).__name__}: {error}"[:300]
        reader = threading.Thread(target=look, args=(here["store"], failure, words), daemon=True)
        reader.start()
        reader.join(2 * SILENCE)  # it may wait for ever, where the link to the store's host is cut
    if not of_a_collective:
        return ""
    if dist.get_rank() == 0:
        time.sleep(SILENCE / 2)  # the store may be this process's, and others still read it
    waited = time.monotonic() - here["since"]
    missing = "; ".join(words) or "a rank that cannot be named, as the store by which ranks meet does not answer"
    return f"rank {dist.get_rank()} waited in {here['phase']!r}, begun {waited:.0f} s ago, for: {missing}"


def look(store, failure, words):
    """Post this rank's failure ("": that of another), and find words for the ranks that are missing."""
    rank = dist.get_rank()

    def read(kind, r):
        key = f"peers/{kind}/{r}"
        return store.get(key).decode() if store.check([key]) else None

    with suppress(RuntimeError):  # the store ends with torchrun or rank 0
        store.set(f"peers/failed/{rank}", failure)
        if failure:
            return
        others = [r for r in range(dist.get_world_size()) if r != rank]
        beats = {r: read("beat", r) for r in others}
        time.sleep(SILENCE)
        for r in others:
            failed, phase = read("failed", r), read("phase", r)
            if failed:
                words.append(f"rank {r} failed in {phase!r}: {failed}")
            elif failed is None:
                how = "does not answer" if read("beat", r) != beats[r] else f"gives no sign of life for {SILENCE:g} s"
                words.append(f"rank {r} {how}; it was last in {phase!r}")
        if not words:
            words.append("no rank that is missing now: all answer, so a link between them has failed")
