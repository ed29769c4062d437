"""The simulated cluster, and runs that are submitted to it."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import engine
from engine.config import compose
from tests.conftest import ROOT, read_metrics
from tests.slurm import cluster as simulated
from tests.slurm.cluster import Cluster, wait_for

STEPS = 40
RUN = "import sys; from pathlib import Path; from launchers.allocation import run_in_allocation as run; from engine.errors import command"
RUN += "; sys.exit(command(lambda words: run(Path(words[0])))())"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def nodes() -> Iterator[Cluster]:
    """Eight nodes of eight GPUs, as far as Slurm knows."""
    reason = simulated.missing()
    if reason is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)
    started = Cluster(folder)
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture
def slurm(nodes: Cluster) -> Iterator[Cluster]:
    """The cluster, on which nothing runs before or after the test."""
    yield nodes
    for job in nodes.ask("squeue", "-h", "-o", "%A").split():
        nodes.run(["scancel", job])
    wait_for(lambda: nodes.ask("squeue", "-h") == "", "no job is left")
    for name in nodes.nodes:
        nodes.join(name)
        nodes.boot(name)
    wait_for(lambda: nodes.idle() == set(nodes.nodes), "all nodes are idle again")
    wait_for(lambda: not nodes.left(), f"nothing of a job is left on a node: {nodes.left()}", timeout_s=10.0)


class Submitted:
    """A run in a job."""

    def __init__(self, slurm: Cluster, job: str, run_dir: Path, output: Path) -> None:
        self.slurm, self.job, self.run_dir, self.output = slurm, job, run_dir, output

    def state(self) -> str:
        """Return Slurm's word for where the job is."""
        return self.slurm.job(self.job)["JobState"]

    def wait(self, *states: str, timeout_s: float = 240.0) -> None:
        """Wait for one of some states; COMPLETED where none is named."""
        ended = {"COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED", "PREEMPTED"}
        wanted = set(states) or {"COMPLETED"}
        wait_for(lambda: self.state() in wanted | ended, f"job {self.job} {wanted}\n{self.text()}", timeout_s, 0.3)
        assert self.state() in wanted, f"{self.state()}\n{self.text()}"

    def wait_for_step(self, step: int) -> None:
        """Wait until a step's figures are written."""
        wait_for(
            lambda: self.state() in ("FAILED", "COMPLETED") or self.step() >= step, f"step {step}\n{self.text()}", 240.0
        )
        assert self.step() >= step, self.text()

    def step(self) -> int:
        """Return the last step whose figures are written."""
        lines = read_metrics(self.run_dir) if (self.run_dir / "metrics.jsonl").exists() else []
        return int(lines[-1]["step"]) if lines else 0

    def text(self) -> str:
        """Return what the job has printed."""
        return self.output.read_text() if self.output.exists() else ""


@pytest.fixture
def submitted(slurm: Cluster, tmp_path: Path) -> Callable[..., Submitted]:
    """Submit a run: overrides, and options of sbatch; ``program`` is what the job does with the run folder."""

    def submit(
        overrides: Sequence[str], *options: str, nodes: int = 2, run_dir: Path | None = None, program: str = RUN
    ) -> Submitted:
        folder = run_dir or tmp_path / "run"
        words = [*overrides, "cluster=ray", "cluster.address=auto", f"cluster.num_nodes={nodes}", f"run.dir={folder}"]
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(compose.compose(words).recipe)
        output = folder.with_name(f"{folder.name}-job.txt")
        script = tmp_path / f"{folder.name}.sh"
        command = shlex.join([sys.executable, "-u", "-c", program, str(folder)])
        script.write_text(f"#!/bin/bash\ntrap '' USR2\nexec {command}\n")
        asked = [f"--nodes={nodes}", f"--output={output}", "--open-mode=append", "--requeue", "--signal=B:USR2@20"]
        done = slurm.run(
            ["sbatch", "--parsable", *asked, *options, str(script)],
            {"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return Submitted(slurm, done.stdout.strip(), folder, output)

    return submit


@pytest.fixture(scope="session")
def small(base: list[str]) -> list[str]:
    """A run on two CPU workers."""
    return [
        *(o for o in base if not o.startswith("algorithm.max_num_steps")),
        f"algorithm.max_num_steps={STEPS}",
        "cluster.num_workers=2",
        "run.probe=false",
    ]


@pytest.fixture(autouse=True)
def _slow_steps(tmp_path: Path) -> None:
    """Give the ranks a callback that makes the steps of a run's first start slow enough to be disturbed."""
    (tmp_path / "slow_steps.py").write_text(
        "import json, time\n"
        "from engine.types import Callback\n"
        "class Slow(Callback):\n"
        "    def on_step_begin(self, control):\n"
        "        if len(json.loads((control.run_dir / 'slurm.json').read_text())['starts']) == 1:\n"
        "            time.sleep(1.0)\n"
    )


@pytest.fixture(scope="session")
def undisturbed(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert engine.run([*small, "cluster=ray_local", f"run.dir={folder}"]) == 0
    return folder
