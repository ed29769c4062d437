"""The first command of a newcomer, as typed: it must learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.data import tasks
from tests.conftest import ROOT


@pytest.mark.timeout(900)
def test_quickstart_reaches_ninety_percent_on_held_out_prompts(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "engine", f"run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (before, after) = map(float, re.findall(r"held-out prompts: ([\d.]+)% → ([\d.]+)%", done.stdout)[0])
    assert before < 5.0 and after >= 90.0
    for line in (
        "held-out prompt → before | after | right answer",
        f"weights: {tmp_path}/hf",
        "python -m engine.generate",
    ):
        assert line in done.stdout
    asked = [sys.executable, "-m", "engine.generate", "--model", str(tmp_path / "hf"), "--prompt", "Uppercase: stone"]
    answer = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, env=environment, check=True)
    assert answer.stdout.strip() == "STONE"


def test_tasks_are_the_same_everywhere() -> None:
    """Rows are a function of the split, the seed and the index alone; these were written down once."""
    rows = tasks.generate("train", 8, 0)
    assert [row["messages"][0]["content"] for row in rows] == GOLDEN
    assert tasks.generate("train", 8, 0) == rows != tasks.generate("train", 8, 1)


def test_held_out_inputs_and_their_anagrams_are_never_trained() -> None:
    def inputs(split: str, count: int) -> set[str]:
        return {
            "".join(sorted(row["messages"][0]["content"].split(": ")[1])) for row in tasks.generate(split, count, 0)
        }

    words = {
        split: {w for w in inputs(split, count) if w.isalpha()} for split, count in (("train", 8000), ("heldout", 800))
    }
    assert len(words["heldout"]) > 100 and not words["train"] & words["heldout"]


def test_every_answer_is_right() -> None:
    checks = {
        "reverse": lambda x, a: a[::-1] == x,
        "capitals": lambda x, a: a.lower() == x and a.isupper(),
        "first_letter": lambda x, a: x.startswith(a) and len(a) == 1,
        "last_letter": lambda x, a: x.endswith(a) and len(a) == 1,
        "repeat": lambda x, a: a == x,
        "count": lambda x, a: int(a) == len(x),
        "sort": lambda x, a: sorted(x) == list(a),
        "next": lambda x, a: int(a) == int(x) + 1,
    }
    for row in tasks.generate("heldout", 160, 3):
        question, answer = (m["content"] for m in row["messages"])
        assert checks[row["task"]](question.split(": ")[1], answer)


GOLDEN = [
    "Backwards: pesty",
    "Capitals: ilt",
    "First letter: thudi",
    "Ends with: plong",
    "Repeat: ush",
    "How long: bopr",
    "In order: zlvx",
    "What follows: 292",
]
