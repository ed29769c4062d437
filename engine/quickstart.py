"""The quickstart's callback: the same held-out questions before and after training."""

from __future__ import annotations

from engine.data import rows, tasks
from engine.types import Callback, Control

SHOWN = 8
MAX_NEW_TOKENS = 32


class BeforeAndAfter(Callback):
    """Answers the held-out prompts by greedy generation before and after training, and shows what changed."""

    def __init__(self) -> None:
        self.rows = list(tasks.generate("heldout", *rows.BUILTIN_ROWS["tasks/heldout"]))
        self.before: list[str] | None = None

    def on_train_begin(self, control: Control) -> None:
        """Answer before the first step; a resumed run has no answers from before."""
        if control.step == 0:
            self.before = self._answers(control)
            control.say(
                f"exact match on {len(self.rows)} held-out prompts before training: {self._score(self.before):.1%}"
            )

    def on_train_end(self, control: Control) -> None:
        """Answer again, and show a few prompts with both answers and what to try next."""
        after = self._answers(control)
        control.say("\nheld-out prompt → " + ("before | " if self.before else "") + "after | right answer")
        for i in range(0, len(self.rows), len(self.rows) // SHOWN + 1):
            question, right = (m["content"] for m in self.rows[i]["messages"])
            said = f"{_short(self.before[i])} | " if self.before else ""
            control.say(f"  {question} → {said}{_short(after[i])} | {right}")
        was = f"{self._score(self.before):.1%} → " if self.before else ""
        control.say(f"\nexact match on {len(self.rows)} held-out prompts: {was}{self._score(after):.1%}")
        weights = next(f for f in (control.run_dir / "hf", control.run_dir / "adapter") if f.is_dir())
        control.say(
            f"weights: {weights}\n"
            "next:\n"
            f'  python -m engine.generate --model {weights} --prompt "Backwards: stone"\n'
            "  python -m engine data=messages data.train_path=YOURS.jsonl model.path=FOLDER_OR_HUB_ID   # your data, your model\n"
            "  python -m engine --help                                                     # every key"
        )

    def _answers(self, control: Control) -> list[str]:
        return control.backend.generate([row["messages"][:-1] for row in self.rows], MAX_NEW_TOKENS)

    def _score(self, answers: list[str]) -> float:
        right = [row["messages"][-1]["content"] for row in self.rows]
        return float(sum(a == b for a, b in zip(answers, right, strict=True))) / len(right)


def _short(text: str) -> str:
    shown = "".join(c if c.isascii() and c.isprintable() else "·" for c in text)
    return repr(shown if len(shown) <= 12 else shown[:11] + "…")
