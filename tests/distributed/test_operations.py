"""Several ranks under real executors: the same numbers through all of them, and what happens when parts of a run die."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from rank_pool import RankPool, whole_run
from safetensors.torch import load_file

import engine
from engine.__main__ import main
from engine.errors import RunError, UserError
from engine.executors import ray as ray_executor
from tests.conftest import ROOT, read_metrics

STEPS = 12
RAY = ["cluster=ray_local", "cluster.num_workers=2"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


class Process:
    """A command whose whole tree of processes is known; none of them may outlive the test."""

    def __init__(self, words: list[str], folder: Path, *, log: Path) -> None:
        self.log = log
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        with log.open("w") as stream:
            self.popen = subprocess.Popen(
                [sys.executable, *words],
                stdout=stream,
                stderr=stream,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
        self.tree: dict[int, psutil.Process] = {}

    def look(self) -> list[psutil.Process]:
        """Remember and return the processes that there are now."""
        try:
            found = psutil.Process(self.popen.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.tree |= {p.pid: p for p in found}
        return found

    def named(self, name: str) -> list[psutil.Process]:
        return [p for p in self.look() if name in p.name() or name in " ".join(p.cmdline())]

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.look()
            assert self.popen.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def wait(self, timeout_s: float = 180) -> int:
        deadline = time.monotonic() + timeout_s
        while self.popen.poll() is None:
            self.look()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)
        return self.popen.returncode

    def left(self, timeout_s: float = 60) -> list[psutil.Process]:
        """Return what still lives of the tree, given some seconds to go."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = [p for p in self.tree.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.2)


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start commands; at the end none of their processes may be left."""
    running: list[Process] = []

    def launch(words: list[str], *, folder: Path = tmp_path) -> Process:
        running.append(Process(words, folder, log=tmp_path / f"console{len(running)}.txt"))
        return running[-1]

    yield launch
    left: list[psutil.Process] = []
    for process in running:
        if process.popen.poll() is None:
            process.look()
            process.popen.kill()
        left += process.left()
    for process_left in left:
        process_left.kill()
    assert not left, f"processes outlived the run: {[(p.pid, p.name()) for p in left]}"


@pytest.fixture(scope="module")
def long_run(base: list[str]) -> list[str]:
    """Twelve steps with validation, a checkpoint a step and dropout, so that the random state of every rank counts."""
    rows = next(o.split("=", 1)[1] for o in base if o.startswith("data.train_path"))
    return [
        *base,
        f"algorithm.max_num_steps={STEPS}",
        "algorithm.val_period=4",
        f"data.val_path={rows}",
        "scheduler=cosine",
        "model.config_overrides={attention_dropout: 0.1}",
    ]


def torchrun(overrides: list[str], **options: Any) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [*TORCHRUN, port, "-m", "engine", "cluster=env", *overrides]


def ray(overrides: list[str]) -> list[str]:
    return ["-m", "engine", *RAY, *overrides]


def run_to_end(words: list[str], tmp_path: Path) -> Process:
    process = Process(words, tmp_path, log=tmp_path / "console.txt")
    assert process.wait() == 0, process.log.read_text()
    assert not process.left()
    return process


@pytest.fixture(scope="module")
def undisturbed(long_run: list[str], two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to, on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert two_ranks(whole_run, [*long_run, f"run.dir={folder / 'run'}"]) == [0, 0]
    return folder / "run"


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """Everything in metrics.jsonl that is no measurement of time, load or memory."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("perf/", "timing/", "host/"))} for line in lines]


def checkpoint_tensors(run_dir: Path, step: int) -> dict[str, Any]:
    files = sorted((run_dir / "checkpoints" / f"step_{step:08d}").glob("*.safetensors"))
    return {f"{file.name}/{name}": x for file in files for name, x in load_file(file).items()}


def assert_same_run(folder: Path, other: Path) -> None:
    assert figures(folder) == figures(other)
    ours, theirs = checkpoint_tensors(folder, STEPS), checkpoint_tensors(other, STEPS)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert all((ours[k] == theirs[k]).all() for k in ours)
    final = [load_file(f / "hf" / "model.safetensors") for f in (folder, other)]
    assert all((final[0][k] == final[1][k]).all() for k in final[0])


def steps_done(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(read_metrics(run_dir)) if file.exists() else 0


def write_callback(folder: Path, body: str, name: str = "Disturb") -> None:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    (folder / "disturb.py").write_text(
        f"import os, signal, time\nfrom pathlib import Path\nfrom engine.types import Callback\nclass {name}(Callback):\n{lines}\n"
    )


# The same numbers everywhere


def test_one_rank_two_ranks_through_torchrun_and_through_ray_are_the_same(
    base: list[str], rows_file: Path, tmp_path: Path
) -> None:
    overrides = [
        *base,
        "algorithm.max_num_steps=6",
        f"data.val_path={rows_file}",
        "algorithm.val_period=3",
        "train.max_grad_norm=0.5",
    ]
    assert engine.run([*overrides, f"run.dir={tmp_path / 'one'}"]) == 0
    run_to_end(torchrun([*overrides, f"run.dir={tmp_path / 'torchrun'}"]), tmp_path)
    console = run_to_end(ray([*overrides, f"run.dir={tmp_path / 'ray'}"]), tmp_path).log.read_text()
    assert console == ""  # logger.backends=[]: nothing of Ray's, and nothing of ours
    assert figures(tmp_path / "ray") == figures(tmp_path / "torchrun")
    one, two = figures(tmp_path / "one"), figures(tmp_path / "torchrun")
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    weights = [load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("one", "torchrun", "ray")]
    for name, x in weights[0].items():
        assert (weights[1][name] == weights[2][name]).all()
        assert (x - weights[1][name]).norm() <= 1e-5 * x.norm()
    state = json.loads((tmp_path / "ray" / "checkpoints" / "step_00000006" / "state.json").read_text())
    assert state["consumed_samples"] == 48 and state["finished"]


def test_two_ranks_then_one_then_two_go_on_with_the_same_global_batches(
    base: list[str], two_ranks: RankPool, tmp_path: Path
) -> None:
    overrides = [*base, "scheduler=constant", "scheduler.warmup_ratio=0"]
    assert engine.run([*overrides, "algorithm.max_num_steps=9", f"run.dir={tmp_path / 'one'}"]) == 0
    elastic = [*overrides, f"run.dir={tmp_path / 'elastic'}"]
    assert two_ranks(whole_run, [*elastic, "algorithm.max_num_steps=3"]) == [0, 0]
    assert engine.run([*elastic, "algorithm.max_num_steps=6"]) == 0
    assert two_ranks(whole_run, [*elastic, "algorithm.max_num_steps=9"]) == [0, 0]
    log = (tmp_path / "elastic" / "log.txt").read_text()
    assert "resuming after step 3 of 6" in log and "resuming after step 6 of 9" in log
    one, other = figures(tmp_path / "one"), figures(tmp_path / "elastic")
    assert [line["train/tokens"] for line in one] == [line["train/tokens"] for line in other]
    for ours, theirs in zip(one, other, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_asynchronous_checkpoints_change_nothing(
    long_run: list[str], undisturbed: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    assert two_ranks(whole_run, [*long_run, "checkpoint.async_save=true", f"run.dir={tmp_path / 'run'}"]) == [0, 0]
    assert_same_run(tmp_path / "run", undisturbed)
    lines = read_metrics(tmp_path / "run")
    assert all("timing/checkpoint_write_s" in line for line in lines[2:-1])
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_00000011", "step_00000012"]


# What happens to real jobs


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_rank_is_replaced_and_the_run_ends_as_the_undisturbed_one(
    long_run: list[str], undisturbed: Path, tmp_path: Path, start: Start, seed: int
) -> None:
    """kill -9 of either worker process at a random step."""
    dice = random.Random(seed)
    step = dice.randrange(2, STEPS - 3)
    write_callback(
        tmp_path,
        "def on_step_begin(self, control):\n"
        f"    died = control.run_dir / 'died'\n"
        f"    if control.rank == {seed % 2} and control.step == {step} and not died.exists():\n"
        "        died.write_text('')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)",
    )
    run_dir = tmp_path / "run"
    process = start(
        ray([*long_run, f"run.dir={run_dir}", "run.callbacks=[disturb:Disturb]", "logger.backends=[console]"])
    )
    assert process.wait() == 0, process.log.read_text()
    assert_same_run(run_dir, undisturbed)
    said = process.log.read_text()
    assert len(re.findall(r"the ranks have been started again \(1 of cluster.max_failures=3\)", said)) == 1, said
    assert f"resuming after step {step} of {STEPS}" in said
    assert "Traceback" not in said and "raylet" not in said


def test_rank_killed_during_a_checkpoint(long_run: list[str], undisturbed: Path, tmp_path: Path, start: Start) -> None:
    """The second rank dies with half of its shard on disk: what is left is no checkpoint, and the run goes on before it."""
    write_callback(
        tmp_path,
        "def on_step_end(self, control):\n"
        "    if control.step == 5 and control.rank == 1 and not (control.run_dir / 'died').exists():\n"
        "        (control.run_dir / 'died').write_text('')\n"
        "        from engine.backends import shards\n"
        "        def die(state, folder, group):\n"
        "            (folder / 'shard-00002-model-00001-of-00001.safetensors').write_bytes(b'half')\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        shards.save = die",
    )
    run_dir = tmp_path / "run"
    process = start(
        ray([*long_run, f"run.dir={run_dir}", "run.callbacks=[disturb:Disturb]", "logger.backends=[console]"])
    )
    assert process.wait() == 0, process.log.read_text()
    assert "resuming after step 4 of" in process.log.read_text()
    assert not list((run_dir / "checkpoints").glob(".partial-*"))
    assert_same_run(run_dir, undisturbed)


def test_killed_driver_and_the_same_command_again(
    long_run: list[str], undisturbed: Path, tmp_path: Path, start: Start
) -> None:
    run_dir = tmp_path / "run"
    words = ray([*long_run, f"run.dir={run_dir}"])
    process = start(words)
    process.wait_for(lambda: (run_dir / "checkpoints" / "step_00000003").exists())
    process.look()
    process.popen.kill()
    process.popen.wait()
    again = start(words)  # at once, while ranks of the first may still live
    assert again.wait() == 0, again.log.read_text()
    assert not process.left()
    assert_same_run(run_dir, undisturbed)


def test_killed_raylet_is_replaced_and_the_run_ends_as_the_undisturbed_one(
    long_run: list[str], undisturbed: Path, tmp_path: Path, start: Start
) -> None:
    write_callback(
        tmp_path,
        "def on_step_begin(self, control):\n"
        "    first = control.run_dir / f'first{control.rank}'\n"
        "    if not first.exists():\n"
        "        first.write_text(str(os.getpid()))\n"
        "    if control.step >= 4 and first.read_text() == str(os.getpid()):\n"
        "        time.sleep(4)  # the first Ray's ranks, which outlive their raylet for a moment",
    )
    run_dir = tmp_path / "run"
    process = start(
        ray([*long_run, f"run.dir={run_dir}", "run.callbacks=[disturb:Disturb]", "logger.backends=[console]"])
    )
    process.wait_for(lambda: steps_done(run_dir) >= 4)
    (raylet,) = [p for p in process.look() if p.name() == "raylet"]
    raylet.kill()
    assert process.wait() == 0, process.log.read_text()
    assert "Ray was lost on this machine; the ranks are started again with it (1 of" in process.log.read_text()
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_signal_to_the_driver_ends_all_ranks_at_one_step_with_75(
    long_run: list[str], undisturbed: Path, tmp_path: Path, start: Start, number: signal.Signals
) -> None:
    write_callback(
        tmp_path,
        "def on_step_end(self, control):\n"
        "    (control.run_dir / f'rank{control.rank}').write_text(str(control.step))\n"
        "    if control.step >= 2 and not (control.run_dir / 'again').exists():\n"
        "        time.sleep(0.5)",
    )
    run_dir = tmp_path / "run"
    overrides = [*long_run, f"run.dir={run_dir}", "run.callbacks=[disturb:Disturb]"]
    process = start(ray(overrides))
    process.wait_for(lambda: steps_done(run_dir) >= 2)
    process.popen.send_signal(number)
    assert process.wait() == 75, process.log.read_text()
    assert not process.left()
    reached = {(run_dir / f"rank{rank}").read_text() for rank in (0, 1)}
    assert len(reached) == 1
    step = int(reached.pop())
    assert step < STEPS and (run_dir / "checkpoints" / f"step_{step:08d}").is_dir()
    assert f"stopped by {number.name} after step {step}" in (run_dir / "log.txt").read_text()
    (run_dir / "again").write_text("")
    again = start(torchrun(overrides))
    assert again.wait() == 0, again.log.read_text()
    assert_same_run(run_dir, undisturbed)


def test_signal_before_training_ends_ray_with_75(long_run: list[str], tmp_path: Path, start: Start) -> None:
    process = start(ray([*long_run, f"run.dir={tmp_path / 'run'}"]))
    process.wait_for(lambda: bool(process.named("raylet")))
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.log.read_text()
    assert "before training began" in (tmp_path / "run" / "log.txt").read_text()


def test_signal_to_torchrun_saves_a_checkpoint(long_run: list[str], tmp_path: Path, start: Start) -> None:
    run_dir = tmp_path / "run"
    process = start(
        torchrun([*long_run, "algorithm.max_num_steps=100000", "checkpoint.period=0", f"run.dir={run_dir}"])
    )
    process.wait_for(lambda: steps_done(run_dir) >= 2)
    process.popen.send_signal(signal.SIGTERM)
    process.wait()
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert saved.name == f"step_{steps_done(run_dir):08d}"


def test_what_a_callback_of_one_rank_asks_for_all_ranks_do(base: list[str], tmp_path: Path) -> None:
    """Asked for after a checkpoint, where the ranks have agreed already; without run.dir they share one folder all the same."""
    write_callback(
        tmp_path,
        "def on_save(self, control, checkpoint):\n"
        "    if control.rank == 1 and control.step == 2:\n"
        "        control.should_stop = True",
    )
    run_to_end(torchrun([*base, "run.callbacks=[disturb:Disturb]"]), tmp_path)
    (run_dir,) = (tmp_path / "outputs").iterdir()
    assert steps_done(run_dir) == 2 and (run_dir / "hf" / "config.json").exists()


def test_run_that_makes_no_step_is_not_started_for_ever(base: list[str], tmp_path: Path, start: Start) -> None:
    write_callback(
        tmp_path,
        "def on_step_begin(self, control):\n    if control.rank == 1:\n        os.kill(os.getpid(), signal.SIGKILL)",
    )
    process = start(ray([*base, f"run.dir={tmp_path / 'run'}", "run.callbacks=[disturb:Disturb]"]))
    assert process.wait() == 1
    (said,) = process.log.read_text().splitlines()
    assert said == (
        "error: rank 1's process is gone (killed, or out of memory?); no step had been made since the ranks started, so they are "
        "not started again."
    )


def test_error_on_one_rank_is_told_once_with_the_rank_and_its_cause(
    base: list[str], tmp_path: Path, start: Start
) -> None:
    write_callback(
        tmp_path,
        "def on_step_begin(self, control):\n    if control.rank == 1 and control.step == 2:\n        raise ZeroDivisionError('by rank 1')",
    )
    overrides = [*base, "run.callbacks=[disturb:Disturb]"]
    process = start(ray([*overrides, f"run.dir={tmp_path / 'ray'}", "cluster.max_failures=0"]))
    assert process.wait() == 1
    said = process.log.read_text()
    assert said.startswith("error: rank 1 of 2 on ") and said.count("ZeroDivisionError: by rank 1") == 1, said
    assert "cluster.max_failures=0 is used up" in said and "lost another rank" not in said
    process = start(torchrun([*overrides, f"run.dir={tmp_path / 'env'}"]))
    assert process.wait() != 0
    said = process.log.read_text()
    assert said.count("ZeroDivisionError: by rank 1") == 1 and "error: " not in said, said


@pytest.mark.parametrize("launch", [ray, torchrun], ids=["ray", "torchrun"])
def test_mistake_that_only_the_ranks_can_see_is_told_once(
    base: list[str], tmp_path: Path, start: Start, launch: Callable[[list[str]], list[str]]
) -> None:
    broken = tmp_path / "broken.jsonl"
    good = '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}\n'
    broken.write_text('{"messages": [{"role": "user", "content": 3}]}\n' + good * 8)
    process = start(launch([*base, f"data.train_path={broken}", f"run.dir={tmp_path / 'run'}"]))
    code = process.wait()
    said = [line for line in process.log.read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "broken.jsonl line 1" in said[0], process.log.read_text()
    if launch is ray:
        assert code == 2


def test_dead_node_of_a_ray_cluster_is_survived(
    long_run: list[str], undisturbed: Path, tmp_path: Path, start: Start
) -> None:
    """The driver's machine and three of one core each, as raylets; that of a rank dies, and the third takes its place."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        write_callback(
            tmp_path,
            "def on_step_begin(self, control):\n"
            "    if control.step == 4 and control.rank == 1 and not (control.run_dir / 'died').exists():\n"
            "        import ray\n"
            "        (control.run_dir / 'node').write_text(ray.get_runtime_context().get_node_id())\n"
            "        time.sleep(60)",
        )
        run_dir = tmp_path / "run"
        overrides = [*long_run, f"run.dir={run_dir}", "run.callbacks=[disturb:Disturb]", "logger.backends=[console]"]
        address = ["cluster=ray", f"cluster.address={cluster.address}", "cluster.num_workers=2"]
        process = start(["-m", "engine", *address, *overrides])
        process.wait_for((run_dir / "node").exists)
        time.sleep(0.5)
        (run_dir / "died").write_text("")
        name = (run_dir / "node").read_text()
        (victim,) = [node for node in nodes if node.node_id == name]
        cluster.remove_node(victim, allow_graceful=False)
        assert process.wait() == 0, process.log.read_text()
        assert "(1 of cluster.max_failures=3)" in process.log.read_text()
        assert_same_run(run_dir, undisturbed)
    finally:
        cluster.shutdown()


# Bad input: one sentence each, before a rank starts where it can be known


@contextmanager
def no_ray() -> Iterator[None]:
    """Fail where Ray is started: what is refused before that is refused at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_executor, "connect", lambda cluster: pytest.fail("Ray was started"))
        yield


def refused(overrides: list[str]) -> str:
    with pytest.raises(RunError) as caught:
        engine.run(overrides)
    assert len(str(caught.value).splitlines()) == 1
    return f"{type(caught.value).__name__}: {caught.value}"


def test_more_ranks_than_cores(base: list[str], tmp_path: Path) -> None:
    overrides = [
        *base,
        "train.global_batch_size=16384",
        "cluster=ray_local",
        "cluster.num_workers=4096",
        f"run.dir={tmp_path}",
    ]
    assert re.match(
        r"UserError: cluster.num_workers: 4096 ranks, and this machine has \d+ CPU cores; lower it", refused(overrides)
    )
    for more in ([], ["cluster.gpus_per_node=2"]):
        said = refused([*base, "cluster=ray_local", f"run.dir={tmp_path}", *more])
        assert "this machine has no GPU; choose cluster=slurm_1x8 to submit the run" in said


def test_ray_address_where_nobody_answers(base: list[str], tmp_path: Path) -> None:
    started = time.monotonic()
    said = refused(
        [*base, "cluster=ray", "cluster.address=127.0.0.1:1", "cluster.num_workers=2", f"run.dir={tmp_path}"]
    )
    assert said.startswith("UserError: cluster.address=127.0.0.1:1: no Ray cluster answers there (")
    assert time.monotonic() - started < 30


def test_launcher_and_executor_that_do_not_fit(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "start the command with torchrun or srun" in refused([*base, "cluster=env", f"run.dir={tmp_path}"])
    assert main([*base, "cluster=env", "-m", "run.seed=0,1", f"run.dir={tmp_path}"]) == 2
    assert "-m: cluster=env runs one recipe" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "cluster=local: a launcher has started 2 processes" in refused([*base, f"run.dir={tmp_path}"])
    monkeypatch.setenv("RANK", "1")
    assert main([*base, "run.sed=1"]) == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.global_batch_size=1"], "train.global_batch_size=1 cannot serve 2 ranks: set it to 2"),
        (
            ["data.packing.enabled=false", "train.micro_batch_size=3", "train.global_batch_size=9"],
            "train.global_batch_size=9 cannot serve 2 ranks with train.micro_batch_size=3: set it to 6 or 12",
        ),
        (["backend.torch.shard_size=3"], "backend.torch.shard_size=3 does not divide the 2 ranks"),
    ],
)
def test_number_of_ranks_that_the_recipe_cannot_serve(
    base: list[str], tmp_path: Path, words: list[str], said: str
) -> None:
    with no_ray():
        assert said in refused([*base, *RAY, *words, f"run.dir={tmp_path}"])
    assert not (tmp_path / "log.txt").exists()


def test_checkpoint_with_a_missing_cut_or_corrupted_shard(
    undisturbed: Path, long_run: list[str], tmp_path: Path
) -> None:
    def damaged(change: Callable[[Path], object]) -> str:
        run_dir = tmp_path / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(undisturbed, run_dir)
        change(run_dir / "checkpoints" / f"step_{STEPS:08d}" / "shard-00002-model-00001-of-00001.safetensors")
        return refused([*long_run, "algorithm.max_num_steps=20", f"run.dir={run_dir}"])

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[-10] ^= 1
        file.write_bytes(content)

    assert "shard-00002-model-00001-of-00001.safetensors is missing from the checkpoint" in damaged(Path.unlink)
    assert "is damaged (not the" in damaged(lambda file: file.write_bytes(file.read_bytes()[:-10]))
    assert "is damaged (not the" in damaged(flip)
    with no_ray(), pytest.raises(RunError, match="is missing from the checkpoint"):
        (
            tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}" / "shard-00001-model-00001-of-00001.safetensors"
        ).unlink()
        engine.run([*long_run, *RAY, "algorithm.max_num_steps=20", f"run.dir={tmp_path / 'run'}"])


def test_checkpoint_of_another_model(base: list[str], tmp_path: Path) -> None:
    fresh = [*base, "model.init=random"]
    assert engine.run([*fresh, "algorithm.max_num_steps=1", f"run.dir={tmp_path / 'a'}"]) == 0
    there = tmp_path / "a" / "checkpoints" / "step_00000001"
    (tmp_path / "a" / "recipe.yaml").unlink()
    other = [
        *fresh,
        "model.config_overrides={num_hidden_layers: 3}",
        f"run.resume={there}",
        f"run.dir={tmp_path / 'b'}",
    ]
    assert "the checkpoint is of another model" in refused(other)


# Exports along the way, and validation alone


def test_hugging_face_folders_along_the_way_load(base: list[str], two_ranks: RankPool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run_dir = tmp_path / "run"
    assert two_ranks(whole_run, [*base, "checkpoint.hf_period=2", f"run.dir={run_dir}"]) == [0, 0]
    assert sorted(p.name for p in (run_dir / "hf_steps").iterdir()) == ["step_00000002", "step_00000004"]
    last = AutoModelForCausalLM.from_pretrained(run_dir / "hf_steps" / "step_00000004").state_dict()
    final = AutoModelForCausalLM.from_pretrained(run_dir / "hf").state_dict()
    assert all((last[k] == final[k]).all() for k in final)


def test_no_steps_validates_only(base: list[str], rows_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert engine.run([*base, "algorithm.max_num_steps=0", f"data.val_path={rows_file}", f"run.dir={run_dir}"]) == 0
    (line,) = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert line["step"] == 0 and line["validation/loss"] > 0
    assert not (run_dir / "hf").exists() and not list((run_dir / "checkpoints").iterdir())
    with pytest.raises(UserError, match=r"algorithm.max_num_steps=0 only validates, and there is no validation data"):
        engine.run([*base, "algorithm.max_num_steps=0", f"run.dir={tmp_path / 'none'}"])
