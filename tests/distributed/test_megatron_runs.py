"""Whole runs through the command line: what `python -m engine` does by default, on either backend, with Ray."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from megatron_ranks import close

from tests.conftest import read_metrics

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

SHORT = ["algorithm.max_num_steps=4", "algorithm.val_period=0", "optimizer.weight_decay=0.1", "train.max_grad_norm=0.7"]
ANSWERED = "exact match on 400 held-out prompts: 0.0%"
TWO_WORKERS = ["cluster=ray_local", "cluster.num_workers=2"]
TENSOR_PARALLEL = ["backend=megatron", "backend.tensor_parallel=2"]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(engine_process: Callable[..., subprocess.Popen[str]]) -> Run:
    """Run four steps in a folder, and return what is said."""

    def to_end(folder: Path, *words: str) -> str:
        process = engine_process([*SHORT, *words, f"run.dir={folder}"])
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, out + err
        assert not err.strip(), err
        return out

    return to_end


@pytest.fixture(scope="module")
def by_torch(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the torch backend makes of it, with the answers before and after, on two workers."""
    folder = tmp_path_factory.mktemp("torch")
    assert ANSWERED in run(folder, "backend=torch", *TWO_WORKERS)
    return folder


@pytest.fixture
def four_cores() -> Iterator[list[str]]:
    """A Ray cluster that has four cores, whatever this machine has."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield ["cluster=ray", f"cluster.address={cluster.address}", "cluster.num_workers=4"]
    cluster.shutdown()


def assert_same_run(folder: Path, other: Path) -> None:
    ours, theirs = read_metrics(folder), read_metrics(other)
    for key in ("train/loss", "train/grad_norm"):
        figures = [[line[key] for line in lines] for lines in (ours, theirs)]
        assert len(ours) == 4 and close(*figures), (key, *figures)
    for key in ("train/tokens", "train/trained_tokens", "train/lr"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]


def test_the_default_run_is_the_same_on_both_backends(run: Run, by_torch: Path, tmp_path: Path) -> None:
    """No recipe is named: the embedded model and data."""
    assert ANSWERED in run(tmp_path, *TENSOR_PARALLEL, *TWO_WORKERS)
    assert_same_run(tmp_path, by_torch)


@pytest.mark.parametrize(
    "backend", [["backend=torch"], [*TENSOR_PARALLEL, "backend.context_parallel=2"]], ids=["torch", "megatron"]
)
def test_four_workers_of_a_cluster_do_the_same(
    run: Run, by_torch: Path, four_cores: list[str], tmp_path: Path, backend: list[str]
) -> None:
    run(tmp_path, *backend, *four_cores, "run.callbacks=[]")
    assert_same_run(tmp_path, by_torch)
