"""Ranks that torchrun or srun has started: this process is one of them. No Ray."""

from __future__ import annotations

import os
import subprocess

from engine import hub
from engine.config import layout
from engine.config.schema import RunConfig
from engine.errors import UserError

FIRST_PORT, PORTS = 20000, 20000
"""Under srun all ranks meet at a port that follows from the numbers of job and step."""


class EnvExecutor:
    """Runs one rank here; the launcher runs the others."""

    def run(self, config: RunConfig, recipe: str) -> int:
        """Join the process group, run the rank, and return its exit code.

        Raises:
            UserError: If no launcher has started this process, or it started more ranks than there are devices.
        """
        place = rendezvous()
        rank, size, local_rank = (int(place[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        fields, per_node = hub.known_fields(config.model), ranks_per_node(size)
        problems = layout.problems(config.backend, fields, config.train, config.data, size, per_node)
        if problems:
            raise UserError(*problems if rank == 0 else ())
        import torch
        import torch.distributed as dist

        from engine import worker
        from engine.ranks import Ranks
        from engine.train import StopRequest

        device = torch.device("cpu")
        if torch.cuda.is_available():
            if torch.cuda.device_count() == 1 and "SLURM_PROCID" in os.environ:
                local_rank = 0  # srun shows each task its own GPU
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"cluster=env: local rank {local_rank}, and this machine has {torch.cuda.device_count()} GPUs; start at most "
                    "one rank a GPU."
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        os.environ.update(place)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        ranks = Ranks.join(device)
        config, recipe = ranks.gather((config, recipe))[0]  # a default run.dir has a time and a number: one for all
        code = worker.main(config, recipe, ranks, StopRequest())
        dist.destroy_process_group()
        return code


def ranks_per_node(size: int) -> int | None:
    """Return how many of so many ranks share this machine, as torchrun or srun says; None if neither does."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = os.environ.get("SLURM_STEP_NUM_NODES", "")
    return size // int(nodes) if nodes.isdigit() and size % int(nodes) == 0 else None


def rendezvous() -> dict[str, str]:
    """Return torch.distributed's environment variables, from torchrun's own or from srun's.

    Raises:
        UserError: If there are neither.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if all(name in os.environ for name in names):
        return {name: os.environ[name] for name in names}
    if "SLURM_PROCID" not in os.environ or "SLURM_STEP_NODELIST" not in os.environ:
        raise UserError(
            "cluster=env: neither torchrun's RANK nor srun's SLURM_PROCID is set; start the command with torchrun or srun, or "
            "choose cluster=ray_local."
        )
    nodes = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    first = subprocess.run(nodes, capture_output=True, text=True, check=True).stdout.split()[0]
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "MASTER_ADDR": first,
        "MASTER_PORT": str(
            FIRST_PORT + (int(os.environ["SLURM_JOB_ID"]) * 7 + int(os.environ.get("SLURM_STEP_ID", 0))) % PORTS
        ),
    }
