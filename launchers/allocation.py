"""A run inside a Slurm allocation: Ray on its nodes, the driver on the first, and what restarts the job.

One step a node runs ``launchers.ray_node``, which ends with this process. Slurm's warning makes the driver save a checkpoint; the
job is then requeued, as it is when a node is lost, and goes on from the newest checkpoint, since its run folder is the same.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from engine import checkpoint
from engine.config.schema import ClusterSection, RunConfig
from engine.errors import EXIT_STOPPED, RunError, UserError
from launchers import snapshot
from launchers.ray_node import own_address

FIRST_PORT, PORTS = 20_000, 10_000
"""Ray's servers of all jobs get two ports each out of so many."""
NODES_TIMEOUT_S = 300.0
"""Seconds that the nodes of a job have to start Ray."""
LOCK_S = 600.0
"""Seconds that the driver of a job's earlier start may take to let go of the run folder: on a machine that was cut off it waits for
the others first."""
WHOLE_NODE = ("--mem=0", "--cpu-bind=none", "--mpi=none")
"""What lets a step of one task have all that the job has of a machine."""
END_S = 20.0
"""Seconds that the steps have to end."""


def run_in_allocation(run_dir: Path) -> int:
    """Run a frozen recipe on the nodes of the job that this process is in; it is called on the first node.

    Args:
        run_dir: The run folder, with recipe.yaml.

    Returns:
        The run's exit code; 75 where the job was stopped, and requeued if that was Slurm's wish.

    Raises:
        UserError: If this is no job, or the recipe is not right.
        RunError: With the first cause, once.
    """
    config, recipe = snapshot.read(run_dir)
    job = Job.here()
    starts = Starts(run_dir, job, config.cluster.max_failures)
    starts.begin()
    with Warned() as warned, RayNodes(job, config.cluster) as nodes:
        try:
            nodes.wait(warned)
            code = _drive(config, recipe, nodes.address) if not warned.by else EXIT_STOPPED
        except UserError:
            raise
        except RunError as error:
            if nodes.all_there() or not starts.requeue(str(error)):
                raise
            return EXIT_STOPPED
    if code == EXIT_STOPPED:
        starts.note_stop()
        starts.requeue("stopped")
    return code


def _drive(config: RunConfig, recipe: str, address: str) -> int:
    """Run the driver against the job's own Ray."""
    from engine.executors.ray import RayExecutor

    cluster = config.cluster.model_copy(update={"name": "ray", "address": address})
    return RayExecutor(wait_s=LOCK_S).run(config.model_copy(update={"cluster": cluster}), recipe)


@dataclass(frozen=True)
class Job:
    """The job that this process is in."""

    id: str
    nodes: list[str]
    """Names, this one first."""

    @classmethod
    def here(cls) -> Job:
        """Return it.

        Raises:
            UserError: If there is none.
        """
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError(
                "SLURM_JOB_ID is not set: this is no Slurm job; submit one with python -m engine cluster=slurm."
            )
        return cls(
            os.environ["SLURM_JOB_ID"], _ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        )

    def is_running(self) -> bool:
        """Tell whether Slurm wants it to run: not when it is cancelled, requeued or at its time limit."""
        return _ask("squeue", "--noheader", "--format=%T", f"--job={self.id}") == "RUNNING"


class Warned:
    """Takes note of signals that ask to stop, before and after the driver, which answers its own."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

    def __init__(self) -> None:
        self.by: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Warned:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)  # all is over but for the job's end

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.by = signal.Signals(number).name


@dataclass
class Starts:
    """The starts of a job, in slurm.json: how often it may start again, and whether that helps."""

    run_dir: Path
    job: Job
    most: int
    """Restarts."""
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """Starts of this job before this one."""

    def begin(self) -> None:
        """Count this start.

        Raises:
            RunError: If it is one too many, or no step was made since the one before, which nobody asked to stop.
        """
        before = snapshot.read_note(self.run_dir).get("starts", [])
        self.earlier = [start for start in before if start["job"] == self.job.id]
        own = {
            "job": self.job.id,
            "nodes": self.job.nodes,
            "step": self._saved(),
            "at": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        if len(self.earlier) > self.most:
            raise RunError(f"job {self.job.id}: {self._used_up()}.")
        if self.earlier and not self.earlier[-1].get("stopped") and self._reached() <= self.earlier[-1]["step"]:
            raise RunError(
                f"job {self.job.id}: no step was made between its last two starts, so it is not started again; the log has what "
                "ended the first of them, and the same command goes on from the last checkpoint."
            )
        snapshot.note(self.run_dir, starts=[*before, own])
        again = f", restart {len(self.earlier)} of cluster.max_failures={self.most}" if self.earlier else ""
        print(f"job {self.job.id} on {', '.join(self.job.nodes)}{again}", flush=True)

    def note_stop(self) -> None:
        """Note that a signal has ended this start: that it may have made no step says nothing of the next one."""
        *before, own = snapshot.read_note(self.run_dir)["starts"]
        snapshot.note(self.run_dir, starts=[*before, {**own, "stopped": True}])

    def requeue(self, why: str) -> bool:
        """Ask Slurm to start the job again, unless Slurm has ended it itself, or it has started too often; returns whether."""
        if not self.job.is_running():
            return False
        if len(self.earlier) >= self.most:
            print(f"{why}; {self._used_up()}.", flush=True)
            return False
        print(f"{why}; job {self.job.id} is requeued.", flush=True)
        _ask("scontrol", "requeue", self.job.id)
        return True

    def _used_up(self) -> str:
        return f"cluster.max_failures={self.most} restarts are used up, and the same command goes on from the last checkpoint"

    def _saved(self) -> int:
        """Return the step of the newest checkpoint; 0 without any."""
        newest = max(checkpoint.all_in(self.run_dir / "checkpoints"), default=None)
        return checkpoint.read_state(newest).step if newest is not None else 0

    def _reached(self) -> int:
        """Return the last step whose figures are written, or the newest checkpoint's."""
        file, reached = self.run_dir / "metrics.jsonl", self._saved()
        lines = file.read_text().splitlines() if file.is_file() else []
        for line in lines[-2:]:  # a crash may have cut the last one short
            try:
                reached = max(reached, json.loads(line)["step"])
            except ValueError:
                continue
        return reached


class RayNodes:
    """Ray on the nodes of a job, with a secret of its own; a context at whose end nothing of it is left on any node."""

    def __init__(self, job: Job, cluster: ClusterSection) -> None:
        self.job = job
        self.address = f"{_address(job.nodes)}:{_port(int(job.id))}"
        self._folder = Path(f"/tmp/anneal-{os.getuid()}") / f"{job.id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        self._srun, self._ray = options(cluster, len(job.nodes))
        self._steps: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> RayNodes:
        os.environ.update(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_USAGE_STATS_ENABLED="0",
            RAY_DISABLE_DOCKER_CPU_WARNING="1",
            RAY_worker_niceness="0",  # ranks are what the machine is for; Ray would have them yield to everything else
        )
        return self

    def wait(self, warned: Warned) -> None:
        """Start Ray on the first node, then on the others, and wait for all of them; until a signal comes.

        Raises:
            RunError: If one of them does not start.
        """
        deadline = time.monotonic() + NODES_TIMEOUT_S
        for kind, names in (("head", self.job.nodes[:1]), ("worker", self.job.nodes[1:])):
            for name in names:
                self._steps[name] = self._start(name, kind)
            self._wait_for(names, deadline, warned)

    def all_there(self) -> bool:
        """Tell whether Ray runs on all nodes, as far as their steps tell."""
        return all(step.poll() is None for step in self._steps.values())

    def __exit__(self, *exc: object) -> None:
        for step in self._steps.values():
            assert step.stdin is not None and step.stdout is not None
            step.stdin.close()
            step.stdout.close()
        deadline = time.monotonic() + END_S
        for step in self._steps.values():
            try:
                step.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                step.kill()
                step.wait()

    def _start(self, name: str, kind: str) -> subprocess.Popen[bytes]:
        step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={name}", *WHOLE_NODE]
        node = [sys.executable, "-u", "-m", "launchers.ray_node", self.address, kind, str(self._folder)]
        return subprocess.Popen([*step, *self._srun, *node, *self._ray], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _wait_for(self, names: Sequence[str], deadline: float, warned: Warned) -> None:
        waiting = {stream: name for name in names if (stream := self._steps[name].stdout) is not None}
        while waiting and not warned.by:
            for stream in select.select(list(waiting), [], [], 0.2)[0]:
                name = waiting.pop(stream)
                if not stream.readline():
                    raise RunError(
                        f"{name}: Ray has not started there; the lines above say why, and the same command tries again."
                    )
            if waiting and time.monotonic() > deadline:
                raise RunError(
                    f"{', '.join(waiting.values())}: Ray has not started there within {NODES_TIMEOUT_S:.0f} s; look at these "
                    "machines, or leave them out with cluster.sbatch.exclude."
                )


def options(cluster: ClusterSection, nodes: int) -> tuple[list[str], list[str]]:
    """Return what srun and ``ray start`` are told of a node's devices: its GPUs, or its share of the CPU ranks."""
    if cluster.num_workers is not None:
        return [], [f"--num-cpus={-(-cluster.num_workers // nodes)}", "--num-gpus=0"]
    gpus = cluster.gpus_per_node or int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    if not gpus:  # Slurm knows of none: Ray looks
        return [], []
    return [f"--gres=gpu:{gpus}"], [f"--num-cpus={gpus}", f"--num-gpus={gpus}"]


def _address(nodes: Sequence[str]) -> str:
    """Return the address of the first machine, this one, by which the others reach it."""
    if len(nodes) == 1:
        return "127.0.0.1"
    try:
        return own_address(nodes[1])
    except OSError as error:
        raise RunError(
            f"{nodes[1]}: {nodes[0]} finds no way to it ({error}); the machines of a job must know each other by name."
        ) from error


def _port(job: int) -> int:
    """Return a port of this machine's that is free, the next one too; where two jobs look first differs."""
    for attempt in range(PORTS // 2):
        port = FIRST_PORT + 2 * (job + attempt) % PORTS
        if _is_free(port) and _is_free(port + 1):
            return port
    raise RunError(f"no port between {FIRST_PORT} and {FIRST_PORT + PORTS} is free on {socket.gethostname()}.")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def _ask(*command: str) -> str:
    """Return what one of Slurm's commands prints.

    Raises:
        RunError: If it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{' '.join(command)}: {' '.join(done.stderr.split()) or 'failed'}.")
    return done.stdout.strip()
