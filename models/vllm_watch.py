"""Runs a command for no longer than a process lives: `python vllm_watch.py PID FOLDER COMMAND ...`.

A rank may end by kill -9 or os._exit, where no handler of its own runs, and a vLLM server that nobody ends keeps its GPU memory.
So this process, the rank's child and the server's parent, looks whether the rank is still there; when it is not, or on SIGTERM, it ends
the server with all that the server started and removes FOLDER (weights under way in shared memory). It ends as the command ended.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

PATIENCE = 10  # seconds between asking the server to end and killing it


def run(parent, folder, *command):
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.append(True))
    server = subprocess.Popen(command, start_new_session=True)  # a group of its own, to be ended as a whole
    while server.poll() is None and not asked and os.getppid() == int(parent):
        time.sleep(0.2)
    end(server)
    shutil.rmtree(folder, ignore_errors=True)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def end(server):
    """End the server's process group: by SIGTERM and patience, which lets shared memory be freed, then by SIGKILL."""
    deadline = time.monotonic() + (PATIENCE if server.poll() is None else 1)  # 1: the rank waits for word that the server is dead
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        while time.monotonic() < deadline and group_lives(server):
            time.sleep(0.1)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def group_lives(server):
    server.poll()  # takes the ended server out of its group
    try:
        os.killpg(server.pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
