"""Section (d) of gpu.py: whole training steps of the engine's torch backend on one card, beside TRL's trainers.

Legend: V vocabulary, H hidden size.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gpu_section import Job, attempt, clean

if TYPE_CHECKING:
    from engine.backends.torch_backend import TorchBackend
    from engine.types import MicroBatch, Objective, Sample

HERE = Path(__file__).resolve().parent
GOAL = 0.45
"""MFU at least."""
MICRO_BATCHES = 2
WARM_UP, STEPS = 2, 10
LR = 1e-6
BYTES_PER_PARAMETER = 18
"""float32 weights, two moments and gradient; bfloat16 weights."""
BYTES_PER_TOKEN_AND_LAYER = 290_000
"""Activations that a layer of the 8B's shape keeps for the backward pass, with room for what comes and goes."""
SPARE = 0.9, 8e9
"""Share of the free memory that is used; bytes for the output layer and for what is made in a step."""


@dataclass(frozen=True)
class Shape:
    """A Llama, and the micro-batches that it is given."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    tokens: int
    """Of a micro-batch."""
    document: int
    """Tokens of a document of SFT, half of them trained; of a pair's prompt and of each of its answers, half as many."""

    def fields(self) -> dict[str, Any]:
        """Return the fields of a LlamaConfig."""
        own = {name: value for name, value in asdict(self).items() if name not in ("tokens", "document")}
        head = self.hidden_size // self.num_attention_heads
        return {**own, "head_dim": head, "max_position_embeddings": self.tokens, "tie_word_embeddings": False}


def run(job: Job) -> None:
    """Measure SFT and DPO, without and with recomputation, ours and TRL's."""
    shape, found = _fitting(job), {"sft": 0.0, "dpo": 0.0}
    for recompute in ("none", "full"):
        shape = _until_it_fits(job, shape, recompute, found)
    job.note(
        f"{shape.num_hidden_layers} layers, H {shape.hidden_size}, V {shape.vocab_size}; a step is {MICRO_BATCHES} micro-batches "
        f"of up to {shape.tokens} tokens: documents of {shape.document} with half trained, pairs of a prompt and two answers of "
        f"{shape.document // 2} each; units are trained tokens, and pairs"
    )
    for algorithm, mfu in found.items():
        job.goal(
            f"(d) {algorithm}: MFU at least {GOAL:.0%}", f"{mfu:.1%}" if mfu else "–", mfu >= GOAL if mfu else None
        )
    for recompute in ("none", "full"):
        for algorithm in found:
            _trl(job, shape, algorithm, recompute)


def _until_it_fits(job: Job, shape: Shape, recompute: str, found: dict[str, float]) -> Shape:
    """Measure ours, with a quarter of the layers less each time that memory runs out; return the shape that was measured."""
    while job.left > 0:
        _, reason = attempt(partial(_ours, job, shape, recompute, found))
        clean()
        if not reason:
            return shape
        job.row("Steps", side="ours", recompute=recompute, layers=shape.num_hidden_layers, note=reason)
        fewer = shape.num_hidden_layers * 3 // 4
        if "out of memory" not in reason or not fewer:
            return shape
        shape = replace(shape, num_hidden_layers=fewer)
    job.row("Steps", side="ours", recompute=recompute, note="skipped: out of time")
    return shape


def _fitting(job: Job) -> Shape:
    """Return the 8B's shape with as many layers as fit without recomputation."""
    full = Shape(128_256, 4096, 14_336, 32, 8, 32, tokens=8192, document=1024)
    if job.smoke:
        return Shape(264, 32, 64, 4, 2, 2, tokens=64, document=16)
    h, v = full.hidden_size, full.vocab_size
    layer = (
        h * h * 2 + 2 * h * h * full.num_key_value_heads // full.num_attention_heads + 3 * h * full.intermediate_size
    )
    share, kept = SPARE
    free = torch.cuda.mem_get_info()[0] * share - kept - BYTES_PER_PARAMETER * 2 * v * h
    fit = int(free // (BYTES_PER_PARAMETER * layer + BYTES_PER_TOKEN_AND_LAYER * full.tokens))
    return replace(full, num_hidden_layers=max(1, min(fit, full.num_hidden_layers)))


def _ours(job: Job, shape: Shape, recompute: str, best: dict[str, float]) -> None:
    """Measure both algorithms on one model; ``best`` gets the largest MFU of each."""
    from engine import objectives
    from engine.backends.torch_backend import TorchBackend
    from engine.data.batch import with_reference
    from engine.ranks import Ranks

    with _fast_weights(job.device):
        backend = TorchBackend(_recipe("sft", shape, recompute), Ranks(device=job.device))
    for algorithm in best:
        objective = objectives.build(_recipe(algorithm, shape, recompute).algorithm)
        batches = micro_batches(shape, algorithm)
        if objective.needs_reference:
            sums = [backend.sequence_logprobs(batch).cpu().numpy() for batch in batches]
            batches = [with_reference(batch, each) for batch, each in zip(batches, sums, strict=True)]
        figures = _steps(job, backend, objective, batches)
        best[algorithm] = max(best[algorithm], figures["MFU"] or 0.0)
        job.row(
            "Steps",
            side="ours",
            algorithm=algorithm,
            recompute=recompute,
            layers=shape.num_hidden_layers,
            **_shown(figures),
            note=backend.kernels or "",
        )


def _shown(figures: dict[str, Any]) -> dict[str, Any]:
    mfu = figures["MFU"]
    return {**figures, "MFU": None if mfu is None else f"{mfu:.1%}"}


def _recipe(algorithm: str, shape: Shape, recompute: str) -> Any:
    """Return a recipe with fresh weights; its data is never read."""
    from engine.config.compose import compose

    overrides = ", ".join(f"{name}: {str(value).lower()}" for name, value in shape.fields().items())
    words = [
        "model=tiny",
        f"model.config_overrides={{{overrides}}}",
        f"model.recompute={recompute}",
        "logger.backends=[]",
    ]
    words += ["data=dummy", f"data.max_length={shape.tokens}", f"algorithm={algorithm}"]
    with tempfile.TemporaryDirectory(prefix="gpu-") as work:
        return compose([*words, f"run.dir={work}"]).config


@contextmanager
def _fast_weights(device: torch.device) -> Iterator[None]:
    """Draw fresh weights on a device: billions of them take minutes on a CPU, where the engine draws its own."""
    from engine.backends import hf_model

    drawn = hf_model.initialise

    def initialise(lm: Any, seed: int, into: Any) -> None:
        for path, module in lm.named_modules():
            for name, p in list(module.named_parameters(recurse=False)):
                fresh = torch.ones(p.shape, device=device)
                into(module, f"{path}.{name}", fresh.normal_(0, 0.02) if p.ndim > 1 else fresh)

    hf_model.initialise = initialise
    try:
        yield
    finally:
        hf_model.initialise = drawn


def micro_batches(shape: Shape, algorithm: str) -> list[MicroBatch]:
    """Return a step's micro-batches of random tokens: documents, or pairs whose answers share a prompt."""
    from engine.data.batch import collate_packed

    draw, found = np.random.default_rng(0), []
    for _ in range(MICRO_BATCHES):
        samples: list[Sample] = []
        if algorithm == "sft":
            for _ in range(shape.tokens // shape.document):
                samples.append(_sample(draw, shape, shape.document, shape.document // 2))
        else:
            part = shape.document // 2
            for _ in range(shape.tokens // (3 * part)):
                chosen = _sample(draw, shape, 2 * part, part)
                rejected = _sample(draw, shape, 2 * part, part)
                rejected.input_ids[:part] = chosen.input_ids[:part]
                samples += [chosen, rejected._replace(shared=part)]
        found.append(collate_packed(samples))
    return found


def _sample(draw: np.random.Generator, shape: Shape, length: int, prompt: int) -> Sample:
    from engine.types import Sample

    ids = draw.integers(shape.vocab_size, size=length).astype(np.int32)
    return Sample(ids, np.array([[prompt, length]], np.int32))


def _steps(job: Job, backend: TorchBackend, objective: Objective, batches: list[MicroBatch]) -> dict[str, Any]:
    """Return the figures of a step, the median of some."""
    units = sum(objective.units(batch.targets) for batch in batches)
    tokens = sum(batch.num_tokens for batch in batches)
    taken: list[float] = []
    warm_up, steps = job.sizes((WARM_UP, STEPS), (1, 2))
    for step in range(warm_up + steps):
        if step == warm_up and not job.smoke:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        float(backend.train_step(batches, objective, units, LR).loss)  # waits for the device
        taken += [time.perf_counter() - started] if step >= warm_up else []
        if job.left <= 0 and taken:
            break
    seconds = median(taken)
    mfu = backend.utilization(
        tokens=tokens,
        trained_tokens=sum(batch.targets.num_tokens for batch in batches),
        squared_lengths=sum(batch.squared_lengths() for batch in batches),
        seconds=seconds,
    )
    peak = None if job.smoke else torch.cuda.max_memory_allocated() / 1e9
    return {"step_s": seconds, "tokens_per_s": tokens / seconds, "units_per_s": units / seconds, "MFU": mfu, "peak_GB": peak,
            "steps": len(taken)}  # fmt: skip


def _trl(job: Job, shape: Shape, algorithm: str, recompute: str) -> None:
    """Measure TRL's trainer, without or with its gradient checkpointing."""
    about = {"side": "TRL", "algorithm": algorithm, "recompute": recompute, "layers": shape.num_hidden_layers}
    missing = [f"No module named '{name}'" for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    missing += ["needs a card"] * job.smoke
    if missing or job.left <= 0:
        job.row("Steps", **about, note=f"absent: {missing[0]}" if missing else "skipped: out of time")
        return
    found, reason = attempt(lambda: _trl_process(job, shape, algorithm, recompute))
    job.row("Steps", **about, **(_shown(found) if found else {"note": reason}))


def _trl_process(job: Job, shape: Shape, algorithm: str, recompute: str) -> dict[str, Any]:
    """Run gpu_trl.py and return its figures."""
    asked = {"shape": asdict(shape), "algorithm": algorithm, "recompute": recompute, "smoke": False}
    with tempfile.TemporaryDirectory(prefix="gpu-") as work:
        result, output = Path(work, "result.json"), Path(work, "output.txt")
        command = [sys.executable, str(HERE / "gpu_trl.py"), json.dumps(asked), str(result)]
        with output.open("w") as stream:
            try:
                subprocess.run(command, stdout=stream, stderr=stream, cwd=work, timeout=max(1.0, job.left), check=True)
            except subprocess.TimeoutExpired:
                raise RuntimeError("not done when time was over") from None
            except subprocess.CalledProcessError:
                raise RuntimeError(output.read_text().strip().splitlines()[-1]) from None
        found: dict[str, Any] = json.loads(result.read_text())
    return found
