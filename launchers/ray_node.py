"""One node's part of a job's Ray, alive as long as its standard input: ``python -m launchers.ray_node …``, a step of the job.

srun closes a step's standard input when the process that has started it ends, however it ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

import psutil

READY = "ready"
"""What is printed once the node's Ray runs."""
PERIOD_S = 0.5
"""Seconds between two looks at standard input and at Ray."""
LOOK_S = 5.0
"""Seconds between two looks whether Ray's server is in reach, and that one of them may take."""
LOST_S = 45.0
"""Seconds out of reach after which a node is taken to be cut off: its ranks must not hold what the job's next start needs."""
PR_SET_CHILD_SUBREAPER = 36
ANY_PORTS = ("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0")
"""Where Ray would take fixed numbers, it takes any that are free."""
OBJECTS_BYTES = 200_000_000
"""Size of Ray's object store, through which nothing large goes."""


def main(words: list[str]) -> int:
    """Run the node's part until standard input is closed, Ray has ended, or its server is out of reach.

    Args:
        words: Address of Ray's server, HOST:PORT; ``head`` or ``worker``; folder for Ray's files; more options of ``ray start``.

    Returns:
        0 where standard input has been closed, else 1.
    """
    address, kind, folder, options = words[0], words[1], Path(words[2]), words[3:]
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the warning, which Slurm may send to every step, is the driver's
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as it may send this one, while ranks save a checkpoint
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what Ray starts stays below this process
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    if folder.parent.stat().st_uid != os.getuid():
        print(f"{folder.parent} belongs to another user; have it removed from {socket.gethostname()}.", file=sys.stderr)
        return 1
    claim(folder)
    try:
        started = subprocess.run(
            [*command(address, kind, folder), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if started.returncode:
            print(f"{socket.gethostname()}: ray start failed\n{started.stdout}", file=sys.stderr)
            return 1
        print(READY, flush=True)
        return _wait(address if kind == "worker" else None)
    finally:
        end_descendants()
        rmtree(folder, ignore_errors=True)


def claim(folder: Path) -> None:
    """Make a folder that is this process's as long as it lives, and remove those beside it whose process was killed."""
    alone = _hold(folder.parent)
    for other in folder.parent.iterdir():
        with suppress(BlockingIOError, FileNotFoundError):  # it is in use, or just being removed
            _hold(other, fcntl.LOCK_NB)
            rmtree(other, ignore_errors=True)
    folder.mkdir(mode=0o700)
    _hold(folder)
    os.close(alone)


def _hold(folder: Path, flags: int = 0) -> int:
    """Lock a folder until the file descriptor is closed, or this process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    return descriptor


def command(address: str, kind: str, folder: Path) -> list[str]:
    """Return the command that starts Ray on this node; arguments as in ``main``."""
    host, _, port = address.rpartition(":")
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--temp-dir={folder}", "--disable-usage-stats"]
    words += [f"--object-store-memory={OBJECTS_BYTES}", *ANY_PORTS]
    if kind == "worker":
        return [*words, f"--address={address}", f"--node-ip-address={own_address(host)}"]
    words += ["--head", "--include-dashboard=false", f"--node-ip-address={host}"]
    return [*words, f"--port={port}", f"--ray-client-server-port={int(port) + 1}"]


def own_address(peer: str, port: int = 9) -> str:
    """Return the address of this machine that a peer reaches it by; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, port))
        return str(probe.getsockname()[0])


def end_descendants() -> None:
    """Kill all that this process has started, and what that has started, until nothing is left."""
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=PERIOD_S)
        _reap()


def _wait(address: str | None) -> int:
    """Wait until standard input is closed, or Ray's own process on this node has ended, or its server is out of reach.

    Ray itself would take minutes to notice the last of these.

    Args:
        address: The server's; None: it is on this node.
    """
    looked = reached = time.monotonic()
    while not select.select([sys.stdin], [], [], PERIOD_S)[0]:
        _reap()
        if not any(_is_raylet(child) for child in psutil.Process().children()):
            return 1
        now = time.monotonic()
        if address is None or now - looked < LOOK_S:
            continue
        looked = now
        if _answers(address):
            reached = now
        elif now - reached > LOST_S:
            print(f"{socket.gethostname()}: {address} is out of reach, and what runs here ends.", file=sys.stderr)
            return 1
    return 0


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=LOOK_S).close()
    except OSError:
        return False
    return True


def _is_raylet(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.name() == "raylet")
    return False


def _reap() -> None:
    """Take note of children that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
