"""Small instruction tasks, generated: the quickstart's training and held-out rows.

Every row is a function of (split, seed, index) through a counter-based integer hash, so the same call gives the same
rows on every platform and Python version. The splits cannot overlap: an input belongs to one of them by a hash of
its letters in sorted order, so a word and its anagrams stay together, whatever the task; a number by its digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

_MASK = (1 << 64) - 1
_HELDOUT_SHARE = 10  # one input in so many is held out
_ONSETS = "b c d f g h j k l m n p r s t v w y z bl br cl cr dr fl fr gr pl pr sh sl sn sp st th tr".split()
_VOWELS = "a e i o u a e i o u ai ea ee oa oo ou".split()
_CODAS = "b d g k l m n p r s t x ck ld ll lt mp nd ng nt rd rk rn rt sk ss st th".split()
_MIN_WORD, _MAX_WORD = 3, 5

_PHRASES: dict[str, tuple[str, ...]] = {
    "reverse": ("Reverse: {}", "Backwards: {}"),
    "capitals": ("Capitals: {}", "Uppercase: {}"),
    "first_letter": ("First letter: {}", "Starts with: {}"),
    "last_letter": ("Last letter: {}", "Ends with: {}"),
    "repeat": ("Repeat: {}", "Say: {}"),
    "count": ("Count: {}", "How long: {}"),
    "sort": ("Sort: {}", "In order: {}"),
    "next": ("Next: {}", "What follows: {}"),
}
TASKS: tuple[str, ...] = tuple(_PHRASES)


class _Draws:
    """A stream of integers: SplitMix64 from a start value."""

    def __init__(self, start: int) -> None:
        self._state = start & _MASK

    def below(self, limit: int) -> int:
        """Return the next integer in [0, limit)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        x = self._state
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((x ^ (x >> 31)) * limit) >> 64

    def pick(self, items: Sequence[str]) -> str:
        """Return one of the items."""
        return items[self.below(len(items))]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def input_split(text: str) -> str:
    """Return the only split in which a task input (a word or a number) may occur."""
    key = "".join(sorted(text)) if text.isalpha() else text
    return "heldout" if _digest("anneal-tasks:" + key) % _HELDOUT_SHARE == 0 else "train"


def answer(task: str, text: str) -> str:
    """Return the one right answer of a task on its input."""
    if task == "reverse":
        return text[::-1]
    if task == "capitals":
        return text.upper()
    if task == "first_letter":
        return text[0]
    if task == "last_letter":
        return text[-1]
    if task == "repeat":
        return text
    if task == "count":
        return str(len(text))
    if task == "sort":
        return "".join(sorted(text))
    if task == "next":
        return str(int(text) + 1)
    raise ValueError(f"unknown task {task!r}")


def corrupted(right: str, draws: _Draws) -> str:
    """Return a wrong answer that is near a right one: a letter changed, left out, doubled, or two changed about."""
    while True:
        i, way = draws.below(len(right)), draws.below(4)
        if way == 0:
            wrong = right[:i] + draws.pick("0123456789" if right[i].isdigit() else _like(right[i])) + right[i + 1 :]
        elif way == 1:
            wrong = right[:i] + right[i + 1 :]
        elif way == 2:
            wrong = right[: i + 1] + right[i:]
        else:
            wrong = right[:i] + right[i + 1 : i + 2] + right[i] + right[i + 2 :]
        if wrong not in ("", right):
            return wrong


def _like(letter: str) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return letters.upper() if letter.isupper() else letters


def _word(draws: _Draws) -> str:
    """Return a pronounceable made-up word, no letter in it twice."""
    while True:
        word = draws.pick(_ONSETS) if draws.below(5) else ""
        for _ in range(1 + draws.below(2)):
            word += draws.pick(_VOWELS) + draws.pick(_ONSETS if draws.below(2) else _CODAS)
        if draws.below(3) == 0:
            word += draws.pick("aeiouy")
        if _MIN_WORD <= len(word) <= _MAX_WORD and len(set(word)) == len(word):
            return word


def _letters(draws: _Draws) -> str:
    """Return a few different letters in no order."""
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return "".join(letters.pop(draws.below(len(letters))) for _ in range(3 + draws.below(2)))


def _input(task: str, draws: _Draws) -> str:
    if task == "next":
        return str(10 + draws.below(990))
    return _letters(draws) if task == "sort" else _word(draws)


def generate(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Make instruction rows; the tasks take turns.

    Args:
        split: "train" or "heldout". No input (nor an anagram of it) is in both, whatever the seeds.
        count: The number of rows.
        seed: Other seeds give other rows of the same split.

    Returns:
        Rows with "messages" (a user turn and an assistant turn) and "task".
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    rows = []
    for index in range(count):
        task = TASKS[index % len(TASKS)]
        draws = _Draws(_digest(f"{split}:{seed}:{index}"))
        text = _input(task, draws)
        while input_split(text) != split:
            text = _input(task, draws)
        messages = [
            {"role": "user", "content": draws.pick(_PHRASES[task]).format(text)},
            {"role": "assistant", "content": answer(task, text)},
        ]
        rows.append({"messages": messages, "task": task})
    return rows


def generate_pairs(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Make preference rows of the same tasks: the right answer against a corrupted one.

    Args:
        split: As in ``generate``.
        count: The number of rows.
        seed: As in ``generate``.

    Returns:
        Rows with "prompt", "chosen" and "rejected", strings.
    """
    rows = []
    for index, row in enumerate(generate(split, count, seed)):
        question, right = (message["content"] for message in row["messages"])
        wrong = corrupted(right, _Draws(_digest(f"pairs:{split}:{seed}:{index}")))
        rows.append({"prompt": question, "chosen": right, "rejected": wrong})
    return rows
