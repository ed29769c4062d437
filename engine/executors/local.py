"""This process, one device: starts at once and takes a debugger."""

from __future__ import annotations

import os

from engine.config.schema import RunConfig
from engine.errors import UserError


class LocalExecutor:
    """Runs the one rank here."""

    def run(self, config: RunConfig, recipe: str) -> int:
        """Run the rank on the GPU if there is one, else on the CPU, and return its exit code.

        Raises:
            UserError: If a launcher has started several of these.
        """
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(
                f"cluster=local: a launcher has started {os.environ['WORLD_SIZE']} processes, which would all do the same run; "
                "choose cluster=env."
            )
        import torch

        from engine import worker
        from engine.ranks import Ranks
        from engine.train import StopRequest

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if torch.cuda.device_count() > 1:
            print(f"cluster=local uses one of {torch.cuda.device_count()} devices; cluster=ray_local uses them all.")
        return worker.main(config, recipe, Ranks(device=device), StopRequest())
