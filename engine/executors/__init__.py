"""Executors: where the ranks of a run are. Nothing heavy is imported until one runs."""

from __future__ import annotations

from engine.config.schema import ClusterSection
from engine.types import Executor


def choose(cluster: ClusterSection) -> Executor:
    """Return the executor that ``cluster.name`` chooses."""
    if cluster.name == "local":
        from engine.executors.local import LocalExecutor

        return LocalExecutor()
    if cluster.name == "env":
        from engine.executors.env import EnvExecutor

        return EnvExecutor()
    from engine.executors.ray import RayExecutor

    return RayExecutor()
