"""What a training step holds at most, measured: ``python -m tests.peak OVERRIDES`` prints one object, sizes in bytes.

A storage counts from the operation that returns its first tensor until the last one is gone; what is on the meta device has none. What
gloo's sum over ranks copies to scratch is left out: NCCL has none of it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import weakref
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import backends
from engine.config.compose import compose
from engine.data.batch import collate_packed
from engine.objectives.sft import SFT
from engine.plan import plan
from engine.ranks import Ranks
from engine.types import MicroBatch, Sample

TOKENS = 256
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 16000,
    "tie_word_embeddings": False,
}
"""Of a Llama of 105 million parameters."""


class Peak(TorchDispatchMode):
    """Adds up the storages of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                self.see(x.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.live.pop(key)


def batch(vocabulary: int, seed: int) -> MicroBatch:
    """Return a full micro-batch of one document, all of it trained."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, TOKENS).astype(np.int32)
    return collate_packed([Sample(ids, np.array([[0, TOKENS]], np.int32))])


def measure(words: list[str]) -> dict[str, Any]:
    """Return peak and state, as measured, and the memory that the plan says."""
    overrides = "{" + ", ".join(f"{key}: {str(value).lower()}" for key, value in SIZES.items()) + "}"
    with tempfile.TemporaryDirectory() as folder:
        base = ["model=tiny", f"model.config_overrides={overrides}", "data=dummy", f"run.dir={folder}"]
        base += [f"data.max_length={TOKENS}", f"data.packing.max_tokens={TOKENS}", "algorithm.max_num_steps=1"]
        config = compose([*base, *words]).config
    # a plan for workers on CPUs, of which there is one
    found = plan(config.model_copy(update={"cluster": config.cluster.model_copy(update={"num_workers": 1})}))
    assert found.memory is not None
    mode = Peak()
    with mode:
        backend: Any = backends.build(config, Ranks())
    state = mode.now
    if config.backend.name == "megatron":
        leave_out_sums_over_ranks(backend, mode)
    batches = [batch(SIZES["vocab_size"], seed) for seed in range(2)]
    mode.peak = mode.now
    with mode:
        backend.train_step(batches, SFT(), 2.0 * (TOKENS - 1), 1e-5)
    return {"peak": mode.peak, "state": state, "parameters": found.parameters, **found.memory._asdict()}


def leave_out_sums_over_ranks(backend: Any, mode: Peak) -> None:
    """Forget what the peak is while gradients are summed."""
    summed = backend.core.finalize_model_grads_func

    def quietly(*args: Any, **options: Any) -> None:
        before = mode.peak
        summed(*args, **options)
        mode.peak = before

    backend.core.finalize_model_grads_func = quietly


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1:])))
