"""What needs a card: skipped where torch sees none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent.parent / "benchmarks"
if str(BENCHMARKS) not in sys.path:  # the checks are those of benchmarks/gpu.py
    sys.path.append(str(BENCHMARKS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    """Float32 products in float32: the errors of kernels are held against the eager way's."""
    torch.backends.cuda.matmul.allow_tf32 = False
