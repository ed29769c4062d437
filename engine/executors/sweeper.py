"""Ends what a killed driver leaves of Ray: ``python -m engine.executors.sweeper PID RAY``, its standard input the driver's life.

Ray's processes end with the one that started them, but for two agents that look for its server a minute longer.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from contextlib import suppress

import psutil

PERIOD_S = 1.0
"""Seconds between two looks at the driver's descendants."""


def start() -> subprocess.Popen[bytes]:
    """Start a sweeper for the Ray that this process starts; it sweeps when its standard input is closed."""
    import ray

    command = [sys.executable, "-m", "engine.executors.sweeper", str(os.getpid()), os.path.dirname(ray.__file__)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def sweep(driver: int, ray: str) -> None:
    """Remember Ray's processes under the driver until standard input is closed, then kill those that are left.

    Args:
        driver: Its process id.
        ray: Folder of the Ray package, which the command of each process that the driver starts for Ray names.
    """
    known: set[psutil.Process] = set()
    while not select.select([sys.stdin], [], [], PERIOD_S)[0]:
        for child in _children(driver):
            with suppress(psutil.NoSuchProcess):
                if any(ray in word for word in child.cmdline()) and child.pid != os.getpid():
                    known |= {child, *child.children(recursive=True)}
    for process in known:
        with suppress(
            psutil.NoSuchProcess
        ):  # psutil knows a process by its start too: a number used again is another one
            process.kill()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    sweep(int(sys.argv[1]), sys.argv[2])
