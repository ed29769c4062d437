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
SPLIT = {2: ["backend.tensor_parallel=2"], 4: ["backend.tensor_parallel=2", "backend.context_parallel=2"]}


@pytest.fixture
def four_cores() -> Iterator[list[str]]:
    """A Ray cluster that has four cores, whatever this machine has."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield ["cluster=ray", f"cluster.address={cluster.address}", "cluster.num_workers=4"]
    cluster.shutdown()


@pytest.mark.parametrize("workers", [2, 4])
def test_the_default_run_is_the_same_on_both_backends(
    workers: int,
    engine_process: Callable[..., subprocess.Popen[str]],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """No recipe is named: the embedded model and data, with the answers before and after on two workers."""
    more = SHORT if workers == 2 else [*SHORT, "run.callbacks=[]"]
    here = ["cluster=ray_local", "cluster.num_workers=2"]
    cluster = here if workers == 2 else request.getfixturevalue("four_cores")
    found = {}
    for name, backend in {"torch": ["backend=torch"], "megatron": ["backend=megatron", *SPLIT[workers]]}.items():
        process = engine_process([*more, *backend, *cluster, f"run.dir={tmp_path / name}"])
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, out + err
        assert (workers == 4) or "exact match on 400 held-out prompts: 0.0%" in out
        assert not err.strip(), err
        found[name] = read_metrics(tmp_path / name)
    for key in ("train/loss", "train/grad_norm"):
        ours, theirs = ([line[key] for line in found[name]] for name in ("megatron", "torch"))
        assert len(ours) == 4 and close(ours, theirs), (key, ours, theirs)
    for key in ("train/tokens", "train/trained_tokens", "train/lr"):
        assert [line[key] for line in found["megatron"]] == [line[key] for line in found["torch"]]
