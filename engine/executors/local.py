"""This process, one device: starts at once and takes a debugger."""

from __future__ import annotations

from collections.abc import Callable

from engine.config.schema import RunConfig


class LocalExecutor:
    """Runs the one rank here."""

    def run(self, worker_main: Callable[[RunConfig, str, str], int], config: RunConfig, recipe: str) -> int:
        """Run the rank on the GPU if there is one, else on the CPU, and return its exit code."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and torch.cuda.device_count() > 1:
            print(f"cluster=local uses one of the {torch.cuda.device_count()} devices in sight.")
        return worker_main(config, recipe, device)
