"""Ranks as Ray Train workers, on this machine or on a running cluster; this process is the driver.

The driver holds the run folder and the console; the ranks send it what there is to see through a mailbox, and find there
whether they are asked to stop. Ray Train places the ranks, and replaces them when one is lost: each attempt goes on from
the last checkpoint, as the same command would.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import traceback
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

from engine import hub, metrics
from engine.config import layout
from engine.config.schema import ClusterSection, RunConfig
from engine.errors import EXIT_ERROR, EXIT_STOPPED, RunError, UserError
from engine.executors import sweeper
from engine.run_folder import RunFolder
from engine.train import StopRequest

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
}
PASSED_ON = ("NCCL_", "GLOO_", "TORCH", "PYTHONPATH")
"""Environment variables of the driver with which a running cluster starts its ranks, by the beginning of their names."""
HANDED_OVER = ("ANNEAL_", "HF_", "WANDB_", "MLFLOW_", "OMP_NUM_THREADS")
"""Those that the ranks get once they run: a cluster shows anyone what it starts processes with, and there are keys among these."""
END = "end"
SCRATCH = ".ray-"
"""How the names of folders begin in which Ray Train keeps what it needs during a run."""


class RayExecutor:
    """Runs every rank in a Ray Train worker.

    Args:
        wait_s: How long an earlier driver of the run may take to let go of its folder.
    """

    def __init__(self, wait_s: float = 0.0) -> None:
        self.wait_s = wait_s

    def run(self, config: RunConfig, recipe: str) -> int:
        """Run the ranks, replace lost ones, and return the run's exit code.

        Raises:
            RunError: With the first cause, once.
        """
        folder = RunFolder(config, recipe, wait_s=self.wait_s)
        for scratch in folder.path.glob(f"{SCRATCH}*"):  # of a driver that was killed
            rmtree(scratch, ignore_errors=True)
        console = metrics.console(config.logger, folder.path, main=True)
        try:
            folder.resume_from(config)
            return Driver(config, recipe, folder, console).run()
        except RunError as error:
            console.note(f"error: {error}")
            raise
        finally:
            console.close()
            folder.release()


class RayLost(Exception):
    """Ray itself has died on this machine."""


@dataclass
class Driver:
    """The driver's side of one run."""

    config: RunConfig
    recipe: str
    folder: RunFolder
    console: metrics.Console
    replaced: int = 0
    """How often the ranks were started again."""
    started: bool = False
    """Whether the ranks have started, on the Ray that runs now."""
    training: bool = False
    """Whether they train, since they last started."""
    progress: bool = False
    """Whether they have made a step since."""
    causes: list[str] = field(default_factory=list)
    """What they failed of since, first cause first."""
    asked: str | None = None
    """The signal that asks to stop."""
    mailbox: Any = None

    def run(self) -> int:
        """Run the ranks to the end, on as many Rays as it takes."""
        before = self._catch_signals()
        scratch = self.folder.path / f"{SCRATCH}{uuid.uuid4().hex[:8]}"
        try:
            while True:
                try:
                    return self._on_ray(scratch)
                except RayLost:
                    self.causes.insert(0, "Ray was lost on this machine")
                    self._replace("are started again with it")
                    self.started = False
        finally:
            rmtree(scratch, ignore_errors=True)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_ray(self, scratch: Path) -> int:
        """Start Ray, run the ranks, end Ray."""
        import ray

        sweeping = sweeper.start()
        starter = ThreadPoolExecutor(1)  # its thread lives as long as Ray, whose processes the system ends with it
        try:
            # Not in the main thread, where Ray would take SIGTERM for its own.
            starter.submit(connect, self.config.cluster).result()
            self._catch_signals()
            ranks, gpu = devices(self.config)
            here = ray.remote(num_cpus=0, scheduling_strategy=_this_node())
            self.mailbox = here(Mailbox).remote()
            return self._watch(here(fit).options(max_retries=0).remote(self._given(), ranks, gpu, self._train(scratch)))
        finally:
            ray.shutdown()
            starter.shutdown(wait=False)
            sweeping.communicate()

    def _catch_signals(self) -> dict[int, Any]:
        return {n: signal.signal(n, self._signalled) for n in StopRequest.SIGNALS}

    def _signalled(self, number: int, frame: Any) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name

    def _given(self) -> dict[str, Any]:
        """Return what the ranks are given."""
        return {
            "config": self.config,
            "recipe": self.recipe,
            "mailbox": self.mailbox,
            "folder": os.getcwd(),
            "environment": {k: v for k, v in os.environ.items() if k.startswith(HANDED_OVER)},
        }

    def _train(self, scratch: Path) -> dict[str, Any]:
        """Return Ray Train's settings for this run."""
        return {
            "name": f"run{self.replaced}",
            "storage_path": str(scratch),
            "max_failures": self.config.cluster.max_failures - self.replaced,
        }

    def _events(self, trained: Any) -> Iterator[tuple[str, Any] | None]:
        """Return the events as they come, and None now and then where none does; the last one is the end of Ray Train.

        Args:
            trained: Reference to the end of Ray Train.

        Raises:
            RayLost: If Ray dies on this machine.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        letters = self.mailbox.take.remote()
        while True:
            if died():
                raise RayLost  # Ray itself would miss its processes some seconds later, and may then end this one
            try:
                if ray.wait([letters], timeout=0.2)[0]:
                    yield from ray.get(letters)
                    letters = self.mailbox.take.remote()
                elif not ray.wait([trained], timeout=0)[0]:
                    yield None
                else:  # all that was written before is read
                    yield END, ray.get(trained)
            except RayTaskError as error:
                yield END, error
            except RayError as error:  # the mailbox is gone, or Ray Train, and Ray with it
                if self.config.cluster.name == "ray_local":
                    raise RayLost from error
                yield END, error

    def _watch(self, trained: Any) -> int:
        """Show and answer events until the run ends."""
        told = False
        for event in self._events(trained):
            if self.asked is not None and not told:
                told = True
                if not self.training:
                    how = "goes on from the last checkpoint" if self.replaced else "starts again"
                    self.console.say(f"stopped by {self.asked} before training began; the same command {how}.")
                    return EXIT_STOPPED
                self.mailbox.ask.remote(self.asked)
            if event is None:
                continue
            kind, value = event
            if kind == "done":
                return int(value)
            if kind == "failed":
                self._failed(*value)
            elif kind == "gone":
                self.causes.insert(0, *value)
            elif kind == "began":
                if self.started:
                    self._replace("have been started again")
                self.started, self.training = True, False
            elif kind == END:
                self._ended(value)
            else:
                self.training |= kind == "start"
                self.progress |= kind == "log" and "train/loss" in value[1]
                getattr(self.console, kind)(*value)
        raise AssertionError("the end of Ray Train ends the loop")

    def _replace(self, how: str) -> None:
        """Count it that the ranks start again, and say why; a run that makes no step does not go on for ever."""
        limit = f"cluster.max_failures={self.config.cluster.max_failures}"
        if not self.progress:
            raise RunError(
                f"{self._cause()}; no step had been made since the ranks started, so they are not started again."
            )
        if self.replaced == self.config.cluster.max_failures:
            raise RunError(
                f"{self._cause()}; {limit} is used up, and the same command goes on from the last checkpoint."
            )
        self.replaced += 1
        self.console.say(f"{self._cause()}; the ranks {how} ({self.replaced} of {limit})")
        self.progress, self.causes = False, []

    def _failed(self, text: str, exit_code: int, final: bool) -> None:
        if final:
            raise UserError(*text.splitlines()) if exit_code == UserError.exit_code else RunError(text)
        self.causes.append(text)

    def _ended(self, error: Exception | None) -> None:
        """End a run whose ranks did not report their end."""
        if not self.causes and error is not None:
            self.causes.append(f"the ranks were lost ({_last_line(error)})")
        self.replaced = self.config.cluster.max_failures
        self._replace("")

    def _cause(self) -> str:
        return self.causes[0] if self.causes else "the ranks were lost"


class Mailbox:
    """Between the driver and the ranks: events one way, a wish to stop the other. An asynchronous Ray actor."""

    def __init__(self) -> None:
        import asyncio

        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._asked = asyncio.Event()
        self._signal = ""

    async def post(self, kind: str, value: Any) -> None:
        """Leave an event for the driver."""
        await self._events.put((kind, value))

    async def take(self) -> list[tuple[str, Any]]:
        """Return the events that have come, once there is one."""
        found = [await self._events.get()]
        while not self._events.empty():
            found.append(self._events.get_nowait())
        return found

    async def ask(self, name: str) -> None:
        """Ask the ranks to stop, by a signal's name."""
        self._signal = name
        self._asked.set()

    async def asked(self) -> str:
        """Return the signal, once there is one."""
        await self._asked.wait()
        return self._signal


class MailConsole(metrics.Console):
    """The driver's console, seen from the first rank."""

    def __init__(self, mailbox: Any) -> None:
        self._post = mailbox.post

    def note(self, text: str) -> None:
        """Write a line to log.txt alone."""
        self._post.remote("note", (text,))

    def say(self, text: str) -> None:
        """Write a line."""
        self._post.remote("say", (text,))

    def start(self, step: int, total_steps: int) -> None:
        """Show the bar."""
        self._post.remote("start", (step, total_steps))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step's figures."""
        self._post.remote("log", (step, dict(metrics)))


def fit(given: dict[str, Any], ranks: int, gpu: bool, train: dict[str, Any]) -> None:
    """Run Ray Train to its end, in a process of its own: the driver's must outlive Ray."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        partial(rank_main, given),  # no train_loop_config, which Ray may record
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=ranks, use_gpu=gpu, resources_per_worker={"GPU": 1} if gpu else {"CPU": 1}
        ),
        run_config=TrainConfig(
            name=train["name"],
            storage_path=train["storage_path"],
            failure_config=FailureConfig(max_failures=train["max_failures"]),
            callbacks=[report_losses(given["mailbox"])],
        ),
    ).fit()


def rank_main(given: dict[str, Any]) -> None:
    """Run one rank, in a thread of a Ray Train worker whose process group is set up."""
    os.environ.update(given["environment"])
    if os.path.isdir(given["folder"]):
        os.chdir(given["folder"])
    import ray
    import ray.train
    import ray.train.torch
    import torch

    from engine import worker
    from engine.ranks import PeerFailed, Ranks, is_lost_peer

    place = ray.train.get_context()
    threads = given["environment"].get("OMP_NUM_THREADS", "")
    cores = max(1, (os.cpu_count() or 1) // place.get_local_world_size())
    torch.set_num_threads(int(threads) if threads.isdigit() else cores)
    ranks, mailbox, stop = Ranks.join(ray.train.torch.get_device()), given["mailbox"], StopRequest()
    console = metrics.Console()
    if ranks.main:
        console = MailConsole(mailbox)
        ray.get(mailbox.post.remote("began", None))
        threading.Thread(target=_watch_for_stop, args=(mailbox, stop), daemon=True).start()
    who = f"rank {ranks.rank} of {ranks.size} on {socket.gethostname()}"
    try:
        code = worker.main(given["config"], given["recipe"], ranks, stop, console)
    except PeerFailed:
        raise
    except RunError as error:
        lost = error.__cause__ is not None and is_lost_peer(error.__cause__)
        text = str(error) if isinstance(error, UserError) else f"{who}: {error}"
        text = f"{who} lost another rank" if lost else text
        ray.get(mailbox.post.remote("failed", (text, error.exit_code, not lost)))
        raise
    except Exception:
        ray.get(mailbox.post.remote("failed", (f"{who} failed:\n{traceback.format_exc()}", EXIT_ERROR, False)))
        raise
    if ranks.main:
        ray.get(mailbox.post.remote("done", code))


def _watch_for_stop(mailbox: Any, stop: Any) -> None:
    import ray

    stop.signal = ray.get(mailbox.asked.remote())


def report_losses(mailbox: Any) -> Any:
    """Return the callback by which Ray Train's controller tells the driver of ranks whose process is gone: a first cause."""
    from ray.train import UserCallback

    class ReportLosses(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for rank, error in worker_exceptions.items():
                if type(error).__name__ == "WorkerHealthCheckFailedError":  # other errors the ranks report themselves
                    mailbox.post.remote("gone", (f"rank {rank}'s process is gone (killed, or out of memory?)",))

    return ReportLosses()


def connect(cluster: ClusterSection) -> None:
    """Start Ray on this machine, or connect to the running cluster, quietly.

    Raises:
        UserError: If there is no such cluster.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    ray._private.worker.print_to_stdstream = _discard  # the obituaries of raylets and workers, which Ray's logs keep
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.name == "ray_local":
        ray.init("local", include_dashboard=False, **options)
        return
    address = str(cluster.address)
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit() and "//" not in host:
            socket.create_connection((host, int(port)), timeout=5.0).close()
        passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        ray.init(address, runtime_env={"env_vars": {**SETTINGS, **passed}}, **options)
    except (ConnectionError, OSError, ValueError) as error:
        raise UserError(
            f"cluster.address={address}: no Ray cluster answers there ({_last_line(error)}); start one with `ray start --head`, or "
            "choose cluster=ray_local."
        ) from error


def died() -> bool:
    """Return whether one of the processes without which there is no Ray, started by this process, has ended."""
    import ray

    node: Any = ray._private.worker._global_node
    started = node.all_processes  # none on a running cluster
    return any(p.process.poll() is not None for kind in ("raylet", "gcs_server") for p in started.get(kind, ()))


def devices(config: RunConfig) -> tuple[int, bool]:
    """Return the number of ranks and whether each has a GPU.

    Raises:
        UserError: If the cluster has too few devices, or the batch cannot be split over them.
    """
    import ray

    cluster, found = config.cluster, ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus, cores = int(found.get("GPU", 0)), int(found.get("CPU", 0))
    where = "this machine" if cluster.name == "ray_local" else f"the cluster at {cluster.address}"
    if cluster.num_workers is not None:
        ranks, gpu, have, key = cluster.num_workers, False, cores, "cluster.num_workers"
    else:
        ranks = cluster.num_nodes * cluster.gpus_per_node if cluster.gpus_per_node else gpus
        gpu, have, key = True, gpus, "cluster.gpus_per_node"
        if not gpus:
            raise UserError(
                f"cluster={cluster.name}: {where} has no GPU; choose cluster=slurm_1x8 to submit the run, or cluster.num_workers=2 "
                "with cluster.gpus_per_node=null to train on CPUs."
            )
    if ranks > have:
        kind = "GPUs" if gpu else "CPU cores"
        raise UserError(
            f"{key}: {ranks} ranks, and {where} has {have} {kind}; lower it to {max(1, have // (cluster.num_nodes if gpu else 1))}."
        )
    per_node = ranks if cluster.name == "ray_local" else cluster.gpus_per_node
    fields = hub.known_fields(config.model)
    problems = layout.problems(config.backend, fields, config.train, config.data, ranks, per_node)
    if problems:
        raise UserError(*problems)
    return ranks, gpu


def _discard(*args: Any, **options: Any) -> None:
    """Print nothing."""


def _this_node() -> Any:
    """Return the strategy that places an actor or a task on the driver's machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1].strip().rstrip(".")[:200]
