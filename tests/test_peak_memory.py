"""The plan's memory against what a step of a model of 105 million parameters holds at most, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.peak import held, planned


def measured(*words: str) -> dict[str, Any]:
    """Run ``tests.peak`` in a process of its own: megatron-core has one layout a process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.peak", *words], capture_output=True, text=True, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "words",
    [
        ["backend=torch"],
        ["backend=torch", "model.dtype=bfloat16", "model.recompute=full"],
        ["backend=torch", "model.lora.enabled=true"],
        ["backend=megatron", "model.dtype=bfloat16"],
    ],
    ids=["torch", "torch_bfloat16_recompute", "torch_lora", "megatron_bfloat16"],
)
def test_the_formulas_say_what_a_step_holds(words: list[str]) -> None:
    found = measured(*words)
    assert planned(found) == held(found)
    assert found["kept"] == pytest.approx(found["state"], rel=1e-3)
