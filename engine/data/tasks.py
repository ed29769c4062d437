"""Small instruction tasks, generated: the quickstart's training and held-out rows.

Every row is a function of (split, seed, index) through a counter-based integer hash, so the same call gives the same
rows on every platform and Python version. The splits cannot overlap: an input belongs to one of them by a hash of
its letters (in sorted order, so a word and its anagrams stay together, whatever the task) or of its numbers (in sorted
order, so 23 + 45 and 45 + 23 stay together).
"""

from __future__ import annotations

import hashlib
from typing import Any

_MASK = (1 << 64) - 1
_HELDOUT_SHARE = 10  # one input in so many is held out
_ONSETS = "b c d f g h j k l m n p r s t v w y z bl br cl cr dr fl fr gr pl pr sh sl sn sp st th tr".split()
_VOWELS = "a e i o u a e i o u ai ea ee oa oo ou".split()
_CODAS = "b d g k l m n p r s t x ck ld ll lt mp nd ng nt rd rk rn rt sk ss st th".split()
_MIN_WORD, _MAX_WORD = 3, 6

_PHRASES: dict[str, tuple[str, ...]] = {
    "reverse": ("Reverse the word: {}", "Spell backwards: {}", "Write in reverse: {}"),
    "capitals": ("Write in capitals: {}", "Make uppercase: {}", "Put in capital letters: {}"),
    "first_letter": ("First letter of {}?", "What is the first letter of {}?", "Which letter starts {}?"),
    "last_letter": ("Last letter of {}?", "What is the last letter of {}?", "Which letter ends {}?"),
    "repeat": ("Repeat twice: {}", "Say it twice: {}", "Write two times: {}"),
    "count": ("Count the letters in: {}", "How many letters: {}", "Number of letters in: {}"),
    "sort": ("Sort the letters: {}", "Letters in order: {}", "Put in alphabetical order: {}"),
    "next": ("What comes after {}?", "Which number follows {}?", "Next number after {}?"),
    "sum": ("What is {} + {}?", "Add {} and {}.", "Work out {} + {}."),
}
TASKS: tuple[str, ...] = tuple(_PHRASES)


class _Draws:
    """A stream of integers: SplitMix64 from a start value."""

    def __init__(self, start: int) -> None:
        self._state = start & _MASK

    def below(self, limit: int) -> int:
        """Returns the next integer in [0, limit)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        x = self._state
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((x ^ (x >> 31)) * limit) >> 64

    def pick(self, items: Any) -> Any:
        """Returns one of the items."""
        return items[self.below(len(items))]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def input_split(inputs: tuple[str, ...]) -> str:
    """Returns the only split in which a task input (one word, or one or two numbers) may occur."""
    key = "".join(sorted(inputs[0])) if inputs[0].isalpha() else "+".join(sorted(inputs))
    return "heldout" if _digest("anneal-tasks:" + key) % _HELDOUT_SHARE == 0 else "train"


def answer(task: str, inputs: tuple[str, ...]) -> str:
    """Returns the one right answer of a task on its inputs."""
    text = inputs[0]
    if task == "reverse":
        return text[::-1]
    if task == "capitals":
        return text.upper()
    if task == "first_letter":
        return text[0]
    if task == "last_letter":
        return text[-1]
    if task == "repeat":
        return f"{text} {text}"
    if task == "count":
        return str(len(text))
    if task == "sort":
        return "".join(sorted(text))
    if task == "next":
        return str(int(text) + 1)
    if task == "sum":
        return str(int(text) + int(inputs[1]))
    raise ValueError(f"unknown task {task!r}")


def _word(draws: _Draws) -> str:
    """Returns a pronounceable made-up word."""
    while True:
        word = draws.pick(_ONSETS) if draws.below(5) else ""
        for _ in range(1 + draws.below(2)):
            word += draws.pick(_VOWELS) + draws.pick(_ONSETS if draws.below(2) else _CODAS)
        if draws.below(3) == 0:
            word += draws.pick("aeiouy")
        if _MIN_WORD <= len(word) <= _MAX_WORD:
            return word


def _letters(draws: _Draws) -> str:
    """Returns a few different letters in no order."""
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return "".join(letters.pop(draws.below(len(letters))) for _ in range(3 + draws.below(3)))


def _inputs(task: str, draws: _Draws) -> tuple[str, ...]:
    if task == "sum":
        return str(10 + draws.below(90)), str(10 + draws.below(90))
    if task == "next":
        return (str(10 + draws.below(990)),)
    return (_letters(draws) if task == "sort" else _word(draws),)


def generate(split: str, count: int, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> list[dict[str, Any]]:
    """Makes instruction rows; the tasks take turns.

    Args:
        split: "train" or "heldout". No input (nor an anagram of it) is in both, whatever the seeds.
        count: The number of rows.
        seed: Other seeds give other rows of the same split.
        tasks: The tasks to draw from.

    Returns:
        Rows with "messages" (a user turn and an assistant turn) and "task".
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    rows = []
    for index in range(count):
        task = tasks[index % len(tasks)]
        draws = _Draws(_digest(f"{split}:{seed}:{index}"))
        inputs = _inputs(task, draws)
        while input_split(inputs) != split:
            inputs = _inputs(task, draws)
        messages = [
            {"role": "user", "content": draws.pick(_PHRASES[task]).format(*inputs)},
            {"role": "assistant", "content": answer(task, inputs)},
        ]
        rows.append({"messages": messages, "task": task})
    return rows
