"""benchmarks/gpu.py on the CPU: what it runs, what it leaves out, and what it writes when it is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.conftest import ROOT


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--smoke", "--out", str(out), *words]
    env = {**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}  # it finds the engine itself
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def rows(found: dict[str, Any], section: str) -> list[dict[str, Any]]:
    return [line["row"] for line in found["sections"][section] if line["kind"] == "row"]


def test_every_section_in_small(tmp_path: Path) -> None:
    process = start(tmp_path, "--minutes", "4")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["smoke"] and found["card"] == "none (CPU)"
    errors = rows(found, "a")
    assert all(row.get("right") and row["same bits"] for row in errors) and len(errors) > 50
    linear = {row["side"]: row for row in rows(found, "b")}
    assert all(row["ms"] > 0 for side, row in linear.items() if side.startswith(("ours", "naive")))
    assert linear["cut-cross-entropy"]["note"].startswith("absent: ")
    attention = {row["side"]: row for row in rows(found, "c")}
    assert attention["ours"]["both ms"] > 0 and attention["ours"]["gap"] < 1e-5
    assert attention["FlashAttention-3"]["note"].startswith("absent: ")
    steps = [(row["algorithm"], row["recompute"]) for row in rows(found, "d") if row["side"] == "ours"]
    assert steps == [("sft", "none"), ("dpo", "none"), ("sft", "full"), ("dpo", "full")]
    assert rows(found, "e")[0]["registers"] > 0
    text = (tmp_path / "gpu.md").read_text()
    assert "A smoke run" in text and text.count("not measured") == 6 and "**missed**" not in text
    for name in "abcde":
        assert f"## ({name}) " in text


def test_ended_by_a_signal_it_writes_what_it_has(tmp_path: Path) -> None:
    process = start(tmp_path, "--only", "a")
    assert process.stdout is not None
    while "Kernels: " not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 30, output[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert rows(found, "a")
    assert "broke off: asked to end" in (tmp_path / "gpu.md").read_text()


def test_out_of_time_it_skips_and_says_so(tmp_path: Path) -> None:
    process = start(tmp_path, "--minutes", "0")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "gpu.md").read_text().count("skipped: out of time") == 5
