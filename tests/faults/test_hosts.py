"""F20: two hosts, of network namespaces where the user may make them: the numbers of one host, and an end in time when the cable is cut."""

import os
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from tests.conftest import ROOT, plain, read_metrics, write_recipe

LIMIT = 15  # seconds of fsdp.timeout_seconds


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """(names of the namespaces, name of the interface) of two hosts with a cable."""
    names = [f"baretune-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            if (made := ip("netns", "add", name)).returncode:
                pytest.skip(f"this user may not make network namespaces: {made.stderr.strip()}")
        if (made := ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])).returncode:
            pytest.skip(f"this kernel makes no virtual cable: {made.stderr.strip()}")
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.99.0.{i + 1}/24", "dev", "veth0")
            for link in ("lo", "veth0"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.fixture
def on_two_hosts(hosts):
    """settings -> [a torchrun with one rank on each host]; both write to one disk."""
    started = []

    def begin(settings):
        for i, name in enumerate(hosts):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(i), "--nproc-per-node", "1"]
            torchrun += ["--master-addr", "10.99.0.1", "--master-port", "29511", ROOT / "launch" / "train.py"]
            with open(f"{settings['output_dir']}.host{i}", "wb") as console:
                command = ["ip", "netns", "exec", name, *torchrun, "--config", write_recipe(settings)]
                env = os.environ | {"GLOO_SOCKET_IFNAME": "veth0"}
                started.append(subprocess.Popen(command, env=env, stdout=console, stderr=console))
        return started

    yield begin
    for process in started:
        with suppress(psutil.NoSuchProcess):
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
        process.wait()


def test_two_hosts(hosts, on_two_hosts, start, model_folder, data_file, tmp_path):
    given = {
        "model.model_name_or_path": model_folder("llama"),
        "data.train": data_file("text", 40),
        "train.global_batch_size": 8,
        "train.micro_batch_tokens": 100,
        "train.max_steps": 6,
        "fsdp.timeout_seconds": LIMIT,
        "log.report_to": [],
    }
    one = start(given | {"output_dir": str(tmp_path / "one")}, 2).wait()
    runs = on_two_hosts(given | {"output_dir": str(tmp_path / "two")})
    assert [run.wait(120) for run in runs] == [0, 0], "".join((tmp_path / f"two.host{i}").read_text()[-3000:] for i in range(2))
    assert [plain(row) for row in read_metrics(tmp_path / "two")] == [plain(row) for row in one.metrics()]
    runs.clear()
    runs = on_two_hosts(given | {"output_dir": str(tmp_path / "cut"), "train.max_steps": 1000000})
    while len(read_metrics(tmp_path / "cut")) < 3:
        assert runs[0].poll() is None, (tmp_path / "cut.host0").read_text()[-3000:]
        time.sleep(0.05)
    ip("-n", hosts[0], "link", "set", "veth0", "down")
    began = time.monotonic()
    assert all(run.wait(LIMIT + 45) for run in runs)
    print(f"both ended {time.monotonic() - began:.1f} s after the cut")
    assert "rank 0 waited in 'step " in (tmp_path / "cut.host0").read_text()
