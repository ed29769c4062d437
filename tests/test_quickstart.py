"""The first command of a newcomer, as typed: it must learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from engine.data import tasks
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Type commands in a folder of their own, with one thread: where tests share the cores, several wait for each other."""
    folder = tmp_path_factory.mktemp("newcomer")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def types(*words: str) -> str:
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return types


@pytest.fixture(scope="module")
def quickstart(newcomer: Callable[..., str]) -> str:
    """Return what ``python -m engine`` says."""
    return newcomer("engine")


@pytest.mark.timeout(900)
def test_quickstart_reaches_ninety_percent_on_held_out_prompts(quickstart: str, newcomer: Callable[..., str]) -> None:
    ((before, after),) = re.findall(r"held-out prompts: ([\d.]+)% → ([\d.]+)%", quickstart)
    assert float(before) < 5.0 and float(after) >= 90.0
    assert "held-out prompt → before | after | right answer" in quickstart
    ((weights, asked),) = re.findall(r"python -m engine.generate --model (\S+) --prompt \"([^\"]+)\"", quickstart)
    assert asked == "Backwards: stone" and f"weights: {weights}" in quickstart
    assert newcomer("engine.generate", "--model", weights, "--prompt", "Uppercase: stone").strip() == "STONE"


@pytest.mark.timeout(900)
def test_quickstart_of_dpo_starts_from_these_weights_and_learns(quickstart: str, newcomer: Callable[..., str]) -> None:
    said = newcomer("engine", "algorithm=dpo")
    assert "running it first" not in said and "reference: computing" in said
    found = re.findall(r"validation/loss ([\d.]+)  validation/accuracy ([\d.]+)  validation/margin (-?[\d.]+)", said)
    accuracies, margins = ([float(line[i]) for line in found] for i in (1, 2))
    assert len(found) == 6 and accuracies[0] == 0 and abs(margins[0]) < 1e-3
    assert accuracies[-1] > 0.9 and margins[-1] > margins[1] > 0.5
    ((before, after),) = re.findall(r"held-out prompts: ([\d.]+)% → ([\d.]+)%", said)
    assert float(after) > float(before) - 3


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
