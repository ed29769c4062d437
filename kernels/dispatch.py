"""Which implementation serves: Triton's kernels on CUDA, their eager twins elsewhere, Triton's interpreter only when asked."""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch import Tensor

from kernels.tiles import SHARED_MEMORY

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's own switch, read when it is first imported: kernels then run on the CPU, slowly, for tests."""


def use_triton(x: Tensor) -> bool:
    """Tell whether our Triton kernels serve a tensor. Where they cannot on its device, that is said once."""
    return INTERPRETED or (x.is_cuda and serves(x.device))


def serves(device: torch.device) -> bool:
    """Tell whether our Triton kernels run on a CUDA device."""
    return works(device) and _fits(device)


def architecture(device: torch.device) -> str:
    """Return the name of a device's architecture in the table of tiles: sm_80, sm_90 or sm_100, the next lower one of others."""
    if device.type != "cuda":
        return "interpreter"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


@cache
def works(device: torch.device) -> bool:
    """Compile and run the smallest kernel there is, and tell whether Triton works on a device; if not, it is said once."""
    try:
        from kernels.triton_probe import doubled

        value = float(doubled(torch.ones(1, device=device)))
        if value != 2.0:
            raise ArithmeticError(f"twice one is {value:g} there")
    except Exception as error:  # whatever Triton, its compiler or the driver may raise
        _say(f"Triton does not work on {device} ({' '.join(str(error).split())[:200] or repr(error)})")
        return False
    return True


@cache
def _fits(device: torch.device) -> bool:
    """Tell whether a program may have the shared memory that the table of tiles reckons with."""
    most = SHARED_MEMORY.get(architecture(device), 0)
    there = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", most)
    if there < most:
        _say(f"{device} has {there:,} bytes of shared memory for a program, and the tiles are made for {most:,}")
    return bool(there >= most)


def _say(reason: str) -> None:
    warnings.warn(f"{reason}: the kernels' eager twins serve, which are slower.", RuntimeWarning, stacklevel=3)
