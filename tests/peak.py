"""What a training step holds at most, measured: ``python -m tests.peak OVERRIDES`` prints one object, sizes in bytes.

A storage counts from the operation that returns its first tensor until the last one is gone; what is on the meta device has none. What
gloo's sums over ranks copy to scratch is left out: NCCL has none of it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import weakref
from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import backends
from engine.config.compose import compose
from engine.data.batch import collate_packed
from engine.memory import Memory
from engine.objectives.sft import SFT
from engine.plan import Plan, plan
from engine.ranks import Ranks
from engine.types import MicroBatch, Sample

T = TypeVar("T")
TOLERANCE = 0.15
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
        self.live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0
        self.looks = True

    @property
    def now(self) -> int:
        """Bytes of those that are there; FSDP2 gives up what it has gathered by making a storage empty."""
        found = [reference() for reference in list(self.live.values())]
        return sum(storage.nbytes() for storage in found if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.looks:
            return out
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                storage = (x.to_local() if isinstance(x, DTensor) else x).untyped_storage()
                self.live.setdefault(
                    storage._cdata, weakref.ref(storage, lambda _, key=storage._cdata: self.live.pop(key))
                )
        self.peak = max(self.peak, self.now)
        return out

    def unseen(self, work: Callable[..., T]) -> Callable[..., T]:
        """Return a function in which nothing is added up."""

        def done(*args: Any, **options: Any) -> T:
            self.looks = False
            try:
                return work(*args, **options)
            finally:
                self.looks = True

        return done


def batch(vocabulary: int, seed: int) -> MicroBatch:
    """Return a full micro-batch of one document, all of it trained."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, TOKENS).astype(np.int32)
    return collate_packed([Sample(ids, np.array([[0, TOKENS]], np.int32))])


def measure(words: list[str], ranks: Ranks | None = None) -> dict[str, Any]:
    """Return peak and state of this rank, as measured, and the memory that the plan says."""
    ranks = ranks or Ranks()
    overrides = "{" + ", ".join(f"{key}: {str(value).lower()}" for key, value in SIZES.items()) + "}"
    with tempfile.TemporaryDirectory() as folder:
        base = ["model=tiny", f"model.config_overrides={overrides}", "data=dummy", f"run.dir={folder}"]
        base += [f"data.max_length={TOKENS}", f"data.packing.max_tokens={TOKENS}", "algorithm.max_num_steps=1"]
        base += ["cluster=ray_local", f"cluster.num_workers={ranks.size}"]  # a plan for workers on CPUs
        config = compose([*base, *words]).config
    found = plan(config)
    assert found.memory is not None
    mode = Peak()
    with mode:
        backend: Any = backends.build(config, ranks)
    state = mode.now
    if config.backend.name == "megatron":
        backend.core.finalize_model_grads_func = mode.unseen(backend.core.finalize_model_grads_func)
    batches = [batch(SIZES["vocab_size"], seed) for seed in range(2)]
    mode.peak = mode.now
    with mode, mock.patch.object(DefaultReduceScatter, "__call__", mode.unseen(DefaultReduceScatter.__call__)):
        backend.train_step(batches, SFT(), 2.0 * (TOKENS - 1), 1e-5)
    return {"peak": mode.peak, "state": state, "kept": kept(found), **found.memory._asdict()}


def kept(found: Plan) -> float:
    """Return the bytes that are there from the start, as the plan says."""
    memory, model = found.memory, found.config.model
    assert memory is not None and found.parameters is not None and found.parameters > 100e6
    if found.config.backend.name == "megatron":
        return memory.weights + memory.gradients + memory.optimizer
    if found.ranks == 1:
        return memory.weights + memory.optimizer
    size = 2 if model.dtype == "bfloat16" else 4
    return memory.optimizer + (size * found.parameters / found.ranks if model.lora.enabled else 0.0)


def planned(found: dict[str, Any]) -> tuple[float, float]:
    """Return the bytes that the plan says: all, and without what is there from the start, which would hide the rest."""
    total = sum(found[name] for name in Memory._fields)
    return total, total - found["kept"]


def held(found: dict[str, Any]) -> Any:
    """Return the same as measured, as near as the plan is to be."""
    return pytest.approx((found["peak"], found["peak"] - found["state"]), rel=TOLERANCE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1:])))
