"""TRL's side of benchmarks/gpu.py, in small on the CPU: its trainers take the rows as they are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("trl")
SHAPE = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "tokens": 96, "document": 16,
}  # fmt: skip


@pytest.mark.parametrize(("algorithm", "units"), [("sft", 96), ("dpo", 8)])
def test_figures_of_a_step(algorithm: str, units: float, tmp_path: Path) -> None:
    asked = {"shape": SHAPE, "algorithm": algorithm, "recompute": "none", "smoke": True}
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu_trl.py"),
        json.dumps(asked),
        str(tmp_path / "result.json"),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["steps"] == 3 and found["tokens_per_s"] * found["step_s"] == pytest.approx(192)
    assert found["units_per_s"] * found["step_s"] == pytest.approx(units)
