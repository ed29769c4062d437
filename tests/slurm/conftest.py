"""The simulated cluster, and runs that are submitted to it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import engine
from tests.conftest import ROOT, read_metrics
from tests.slurm import cluster as simulated
from tests.slurm.cluster import Cluster, wait_for

STEPS = 40


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
    """The cluster, on which nothing runs before or after the test, and none of whose processes is left."""
    yield nodes
    for job in nodes.ask("squeue", "-h", "-o", "%A").split():
        nodes.run(["scancel", job])
    wait_for(lambda: nodes.ask("squeue", "-h") == "", "no job is left")
    for name in nodes.nodes:
        nodes.boot(name)
        nodes.join(name)
    wait_for(lambda: nodes.idle() == set(nodes.nodes), "all nodes are idle again")
    wait_for(lambda: not nodes.running(), "no process of a job is left on a node", timeout_s=20.0)
    for folder in nodes.files():  # of jobs that were killed; the next job on these nodes would remove them
        shutil.rmtree(folder)


class Submitted:
    """A run in a job."""

    def __init__(self, slurm: Cluster, job: str, run_dir: Path, output: Path) -> None:
        self.slurm, self.job, self.run_dir, self.output = slurm, job, run_dir, output

    def state(self) -> str:
        """Return Slurm's word for where the job is."""
        return self.slurm.job(self.job)["JobState"]

    def wait(self, *states: str, timeout_s: float = 400.0) -> None:
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
    """Submit a run by the command that users type, on the login host."""

    def submit(overrides: Sequence[str], run_dir: Path | None = None) -> Submitted:
        folder = run_dir or tmp_path / "run"
        done = command(slurm, tmp_path, "engine", *overrides, f"run.dir={folder}")
        assert done.returncode == 0, done.stdout + done.stderr
        job = str(json.loads((folder / "slurm.json").read_text())["job_id"])
        assert f"submitted job {job}" in done.stdout
        return Submitted(slurm, job, folder, folder / "slurm" / f"{job}.out")

    return submit


def command(slurm: Cluster, folder: Path, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands on the login host; it and its jobs may import from a folder."""
    environment = {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
    return slurm.run([sys.executable, "-m", module, *words], environment)


@pytest.fixture(scope="session")
def small(base: list[str]) -> list[str]:
    """A run on two CPU workers."""
    kept = (word for word in base if not word.startswith("algorithm.max_num_steps"))
    return [*kept, f"algorithm.max_num_steps={STEPS}", "cluster.num_workers=2", "run.probe=false"]


@pytest.fixture(autouse=True)
def _slow_steps(tmp_path: Path) -> None:
    """A callback that makes the steps of a job's first start slow enough to be disturbed."""
    (tmp_path / "slow_steps.py").write_text(
        "import json, time\n"
        "from engine.types import Callback\n"
        "class Slow(Callback):\n"
        "    def on_step_begin(self, control):\n"
        "        if len(json.loads((control.run_dir / 'slurm.json').read_text())['starts']) == 1 and control.step > 1:\n"
        "            time.sleep(3.0)\n"
    )


@pytest.fixture(scope="session")
def undisturbed(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert engine.run([*small, "cluster=ray_local", f"run.dir={folder}"]) == 0
    return folder
