"""What the benchmarks against TRL share: the model, the two sides, each in a process of its own, and the result's file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from engine.types import Callback, Control

FOLDER = Path(__file__).resolve().parent
LOSS_STEPS = 10
"""Steps whose losses must agree."""
LOSS_TOLERANCE = 1e-4
"""Largest relative gap between the losses of a step."""
SIZES: dict[str, dict[str, int]] = {
    "small": {
        "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    },
    "medium": {
        "vocab_size": 32_768, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process did.

    Attributes:
        step_s: Seconds of each step, from the end of the step before to its own end.
        losses: Loss of each step.
        before_mb: Resident memory just before the first step, MiB.
        peak_mb: Largest resident memory of the process up to the end of the last step, MiB.
        lifetime_peak_mb: The same up to the process's end; the engine writes its checkpoint and weights after the last step.
        load: Load average of the machine when the process began.
    """

    step_s: list[float]
    losses: list[float]
    before_mb: float
    peak_mb: float
    lifetime_peak_mb: float = 0.0
    load: float = 0.0


M = TypeVar("M", bound=Measured)


def arguments(
    doc: str | None, *, data: str, examples: str, steps: object, rounds: int, lr: float
) -> argparse.ArgumentParser:
    """Return a parser of the options that all have.

    Args:
        doc: The script's docstring.
        data: What ``--data`` may be.
        examples: What a step consists of.
        steps: What the script takes where ``--steps`` is not given.
        rounds: Default of ``--rounds``.
        lr: Default of ``--lr``.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    add = parser.add_argument
    add("--size", choices=SIZES, default="small")
    add("--data", type=os.path.abspath, help=data)
    add("--batch", type=int, default=8, help=f"{examples} a step")
    add("--steps", type=int, help=f"steps a run, warm-up included (default {steps})")
    add("--warmup", type=int, default=2, help="steps that are not timed")
    add("--rounds", type=int, default=rounds)
    add("--threads", type=int, default=2)
    add("--lr", type=float, default=lr)
    add("--max-length", type=int, default=512)
    add("--out", help="name of the Markdown file in benchmarks/results")
    for name in ("--worker", "--work", "--result"):
        add(name, help=argparse.SUPPRESS)
    return parser


def some(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what reads a list of these choices, separated by commas."""
    known = list(choices)

    def read(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} unknown; there are {', '.join(known)}")
        return text.split(",")

    return read


# The model and the rows


def generated_rows(count: int) -> list[dict[str, str]]:
    """Return Alpaca-like rows, always the same: prompts of 8 to 30 words, log-normal answers with a median near 45 words."""
    draw = random.Random(0)
    onsets, vowels, codas = "b c d f g h j k l m n p r s t v w z st tr ch sh".split(), "aeiou", ["", "n", "r", "s", "t"]
    words = list(
        dict.fromkeys(
            "".join(
                draw.choice(onsets) + draw.choice(vowels) + draw.choice(codas) for _ in range(draw.choice((1, 2, 2, 3)))
            )
            for _ in range(6000)
        )
    )
    weights = [1 / (rank + 3) for rank in range(len(words))]

    def text(length: int) -> str:
        return " ".join(draw.choices(words, weights, k=length)).capitalize() + "."

    return [
        {
            "instruction": text(draw.randint(8, 30)),
            "input": "",
            "output": text(max(3, min(300, round(draw.lognormvariate(3.8, 0.8))))),
        }
        for _ in range(count)
    ]


def write_model(folder: Path, size: Mapping[str, int], template: str, texts: Iterable[str]) -> tuple[Any, int]:
    """Write a Llama, fresh from the random number generator, and a tokenizer of its vocabulary trained on the texts.

    Args:
        folder: Where to.
        size: Fields of its configuration, as one of SIZES; a vocabulary of 259 is the three special tokens and the bytes.
        template: The chat template.
        texts: What the byte-level BPE learns from.

    Returns:
        The tokenizer, and the number of parameters.
    """
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size["vocab_size"],
        special_tokens=[AddedToken(t, special=True) for t in ("<|pad|>", "<|im_start|>", "<|im_end|>")],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **size,
        max_position_embeddings=2048,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).float()
    model.save_pretrained(folder)
    return tokenizer, sum(p.numel() for p in model.parameters())


# The two sides


class StepClock:
    """Notes when steps end, and memory before the first and after the last."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.before_mb = self.peak_mb = 0.0

    def begin(self) -> None:
        """Call just before the first step."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.before_mb = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        self.ends.append(time.perf_counter())

    def step(self) -> None:
        """Call at the end of each step."""
        self.ends.append(time.perf_counter())

    def finish(self) -> None:
        """Call after the last step."""
        self.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def figures(self) -> dict[str, Any]:
        """Return the fields of Measured that a clock knows."""
        step_s = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return {"step_s": step_s, "before_mb": self.before_mb, "peak_mb": self.peak_mb}


class EngineClock(Callback):
    """The clock as a callback of the engine: ``run.callbacks=[trl_sides:EngineClock]``."""

    def __init__(self) -> None:
        self.clock = StepClock()

    def on_train_begin(self, control: Control) -> None:
        """Start the clock."""
        self.clock.begin()

    def on_step_end(self, control: Control) -> None:
        """Note the step's end; after the last, write what was measured."""
        self.clock.step()
        if control.step == control.total_steps:
            self.clock.finish()
            (control.run_dir / "clock.json").write_text(json.dumps(self.clock.figures()))


def trl_clock(clock: StepClock) -> Any:
    """Return the clock as a callback of TRL."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    return Clock()


def trl_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of TRL's configurations that make it train the same."""
    return {
        "output_dir": str(Path(args.work) / "trl"),
        "max_steps": args.steps,
        "learning_rate": args.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"},
    }


def engine_words(args: argparse.Namespace, rows: str, run_dir: Path) -> list[str]:
    """Return the engine's overrides for the same; ``rows`` is the file in the work folder."""
    folder = Path(args.work)
    return [
        f"model.path={folder / 'model'}", f"data.train_path={folder / rows}", "data.shuffle=false",
        f"data.max_length={args.max_length}", f"train.global_batch_size={args.batch}", "scheduler=constant",
        "scheduler.warmup_ratio=0", f"optimizer.lr={args.lr}", f"algorithm.max_num_steps={args.steps}",
        f"run.dir={run_dir}", "run.callbacks=[trl_sides:EngineClock]",
    ]  # fmt: skip


def read_run(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what the clock measured in a run of the engine, and its lines of metrics."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return json.loads((run_dir / "clock.json").read_text()), [json.loads(line) for line in lines]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def worker(script: str, side: str, work: str) -> list[str]:
    """Return the command that does one part of a script, with the options of this command, in a process of its own."""
    return [sys.executable, script, *sys.argv[1:], "--worker", side, "--work", work]


def run_side(side: str, command: Sequence[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run one side in a fresh process, its output into the folder.

    Returns:
        The fields ``lifetime_peak_mb`` and ``load`` of Measured.
    """
    load = os.getloadavg()[0]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=FOLDER, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{side} failed ({process.returncode}):\n" + (folder / "output.txt").read_text()[-4000:])
    return {"lifetime_peak_mb": usage.ru_maxrss / 1024, "load": load}


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Return the environment of both sides: the same threads, no network, a cache of its own."""
    threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    own = {"ANNEAL_CACHE": str(Path(args.work) / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **threads, **quiet, **own}


# The result


def ratios(ours: Sequence[M], theirs: Sequence[M], figure: Callable[[M], float]) -> list[float]:
    """Return our figure over theirs, round by round."""
    return [figure(a) / figure(b) for a, b in zip(ours, theirs, strict=True)]


def loss_gap(ours: Sequence[Measured], theirs: Sequence[Measured]) -> float:
    """Return the largest relative gap between losses over the first steps of all rounds."""
    first = slice(0, LOSS_STEPS)
    pairs = [p for a, b in zip(ours, theirs, strict=True) for p in zip(a.losses[first], b.losses[first], strict=True)]
    return max(abs(x - y) / abs(y) for x, y in pairs)


def peak_mb(run: Measured) -> float:
    """Return the peak memory of a run, MiB."""
    return run.peak_mb


def added_mb(run: Measured) -> float:
    """Return the peak above the memory held before the first step, MiB."""
    return run.peak_mb - run.before_mb


def spread(values: Sequence[float]) -> str:
    """Return median, smallest and largest as text."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def gap_text(gap: float, sound: bool) -> str:
    """Return the largest loss gap as text, and whether the comparison stands."""
    return f"{gap:.1e}" + ("" if sound else " **not the same computation**")


def about_machine(args: argparse.Namespace, runs: Iterable[Sequence[Measured]], packages: Sequence[str]) -> str:
    """Return a line: date, machine, load, versions."""
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    loads = [run.load for side in runs for run in side]
    return (
        f"{date.today().isoformat()} · {cpu()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB · threads {args.threads} · "
        f"load before each run {min(loads):.1f} to {max(loads):.1f} · Python {platform.python_version()}, "
        + ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    )


def cpu() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), platform.machine())


def publish(text: str, name: str | None) -> None:
    """Print a result, and write it to results/ if it has a name."""
    print("\n" + text)
    if name:
        file = FOLDER / "results" / f"{name}.md"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
