"""Kernels in Triton's interpreter, which is chosen when triton is first imported: a process of its own, ``make test`` starts it.

Elsewhere this folder is passed over. Keep to about 130 tokens a test: the interpreter is some thousand times slower than a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.dispatch import INTERPRETED

if INTERPRETED:
    from tests.interpreter import bf16

    bf16.repair()
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    here = Path(__file__).parent
    asked = [config.invocation_params.dir / argument.partition("::")[0] for argument in config.args]
    if not INTERPRETED and any(path == here or here in path.parents for path in asked):
        raise pytest.UsageError(
            "tests/interpreter needs a process of its own: TRITON_INTERPRET=1 pytest tests/interpreter"
        )
