"""A transformers model on one device: packed forward, fused output layer, AdamW with float32 master weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.backends import attention, hf_model
from engine.config.schema import OptimizerSection, RunConfig
from engine.data.batch import collate_packed
from engine.errors import UserError
from engine.types import MicroBatch, Objective, Sample, StepMetrics
from kernels import reference

WORKSPACE_MB = {"cpu": 32, "cuda": 512}
"""Float32 logits that exist at once: on CPUs a chunk is best when it stays near the caches."""
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Largest difference in a log-probability that rounding explains; what a wrong mask or scale does is far above."""


class Trainable(nn.Module):
    """The model with its output layer inside the objective; the root whose forward owns every parameter."""

    def __init__(self, lm: Any, workspace_mb: float) -> None:
        super().__init__()
        self.lm = lm
        self.workspace_mb = workspace_mb

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Return the hidden states from which the trained tokens are predicted, [N, H]."""
        states: Tensor = self.lm.get_decoder()(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            cu_seqlens=batch.cu_seqlens,
            use_cache=False,
        ).last_hidden_state
        return states.reshape(-1, states.shape[-1]).index_select(0, batch.index_N)

    def forward(self, batch: MicroBatch, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss sum of a micro-batch and the sums to report."""
        size, targets = objective.sequences_per_group, batch.targets

        def chunk(logprobs_C: Tensor, start: int, stop: int) -> tuple[Tensor, dict[str, Tensor]]:
            part = targets.sequences(start * size, stop * size) if size else targets.tokens(start, stop)
            return objective.loss(logprobs_C, part)

        return reference.linear_objective(
            self.hidden(batch),
            self.lm.get_output_embeddings().weight,
            batch.labels_N,
            chunk,
            group_bounds=targets.bounds[::size] if size else None,
            workspace_mb=self.workspace_mb,
        )

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Return the log-probabilities of the trained tokens, [N]."""
        weight = self.lm.get_output_embeddings().weight
        return reference.linear_logprobs(self.hidden(batch), weight, batch.labels_N, workspace_mb=self.workspace_mb)


class MasterWeights:
    """Float32 copies of bfloat16 parameters, and the float32 sum of their gradients over micro-batches.

    With float32 parameters the copies are the parameters themselves and nothing is done.
    """

    def __init__(self, parameters: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.compute = parameters
        self.master = parameters
        if dtype == torch.float32:
            return
        self.master = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
        for name, p in parameters.items():
            p.data = p.data.to(dtype)
            p.register_post_accumulate_grad_hook(self._accumulator(self.master[name]))  # type: ignore[no-untyped-call]

    def publish(self) -> None:
        """Copy the updated master weights to the model."""
        if self.master is not self.compute:
            with torch.no_grad():
                torch._foreach_copy_(list(self.compute.values()), list(self.master.values()))

    @staticmethod
    def _accumulator(master: Tensor) -> Any:
        def accumulate(p: Tensor) -> None:
            assert p.grad is not None
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None

        return accumulate


class TorchBackend:
    """Trains one transformers model on one device.

    Args:
        config: The recipe.
        device: Where the model goes.

    Raises:
        UserError: If the model cannot be loaded or cannot serve.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.device = device
        self.config = config
        self.dtype = hf_model.compute_dtype(config.model, device)
        self.attention = attention.register(config.model.attention, device, self.dtype)
        self.lm = hf_model.load(config.model, seed=config.run.seed, attention=attention.NAME).to(device)
        self._check_model()
        if config.model.recompute == "full":
            enable = getattr(self.lm, "activation_checkpointing_enable", None) or self.lm.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if config.model.compile:  # attention, whose documents differ from step to step, stays outside
            for layer in self.lm.get_decoder().layers:
                layer.compile(dynamic=True)
        self.weights = MasterWeights(hf_model.named_parameters(self.lm), self.dtype)
        self.root = Trainable(self.lm, WORKSPACE_MB[device.type])
        self.optimizer = _adamw(self.weights.master, config.optimizer)
        self.skipped = torch.zeros((), device=device)
        torch.manual_seed(config.run.seed)

    def train_step(
        self, micro_batches: Sequence[MicroBatch], objective: Objective, global_units: float, lr: float
    ) -> StepMetrics:
        """Do forward, backward, clipping and update for one global batch.

        Args:
            micro_batches: On the host.
            objective: Gives the loss sum of each.
            global_units: Count that normalises the whole batch.
            lr: Learning rate of this step.

        Returns:
            Scalars on the device; nothing here waits for it.
        """
        self.root.train()
        loss, sums = torch.zeros((), device=self.device), dict[str, Tensor]()
        for batch in micro_batches:
            partial, found = self.root(batch.to(self.device), objective)
            (partial / global_units).backward()
            loss += partial.detach()
            _accumulate(sums, found)
        loss /= global_units
        parameters = list(self.weights.master.values())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        nn.utils.clip_grads_with_norm_(parameters, self.config.train.max_grad_norm, norm)
        failed = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.skipped = torch.where(failed, self.skipped + 1, 0.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.found_inf = failed.float()  # type: ignore[attr-defined]  # the fused kernel then changes nothing
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.weights.publish()
        return StepMetrics(
            loss=loss, sums={k: v / global_units for k, v in sums.items()}, grad_norm=norm, skipped=self.skipped
        )

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch], objective: Objective) -> StepMetrics:
        """Compute the loss over micro-batches, normalised by their units, without gradients."""
        self.root.eval()
        units = 0.0
        loss, sums = torch.zeros((), device=self.device), dict[str, Tensor]()
        for batch in micro_batches:
            partial, found = self.root(batch.to(self.device), objective)
            loss += partial
            units += objective.units(batch.targets)
            _accumulate(sums, found)
        return StepMetrics(loss=loss / units, sums={k: v / units for k, v in sums.items()})

    @torch.no_grad()
    def probe(self, samples: Sequence[Sample]) -> None:
        """Hold packed, fused log-probabilities against the model's own logits, one document at a time.

        Args:
            samples: A few documents; their first 128 tokens are used.

        Raises:
            UserError: If they differ by more than rounding.
        """
        documents = [s.input_ids[:128] for s in samples]
        packed = collate_packed(
            [
                s._replace(input_ids=d, trained=np.array([[0, len(d)]], np.int32))
                for s, d in zip(samples, documents, strict=True)
            ]
        )
        self.root.eval()
        ours_N = self.root.logprobs(packed.to(self.device))
        self.lm.set_attn_implementation("eager")
        try:
            own = []
            for document in documents:
                ids = torch.from_numpy(document.astype("int64")).to(self.device)
                logprobs_TV = self.lm(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
                own.append(logprobs_TV.gather(1, ids[1:, None]).squeeze(1))
        finally:
            self.lm.set_attn_implementation(attention.NAME)
        gap = float((ours_N - torch.cat(own)).abs().max())
        if not gap <= PROBE_TOLERANCE[self.dtype]:
            raise UserError(
                f"model.path={self.config.model.path}: packed, fused log-probabilities differ from the model's own logits by up to "
                f"{gap:.3g} ({type(self.lm).__name__} scales its logits or attends in its own way), so its loss would be wrong; "
                "this model cannot be trained yet."
            )

    def save(self, folder: Path) -> None:
        """Write model (float32), optimizer and random state as safetensors, and what ``engine.export`` needs beside them."""
        moments: dict[str, Tensor] = {}
        for name, p in self.weights.master.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                moments[f"{key}/{name}"] = value.contiguous()
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        save_file({k: v.detach().contiguous() for k, v in self.weights.master.items()}, folder / "model.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        save_file({**rng, "skipped": self.skipped}, folder / "rng.safetensors")
        hf_model.write_description(self.lm, self.tokenizer, folder, self.dtype)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote.

        Raises:
            RunError: If a file is missing or not whole, or belongs to another model.
        """
        weights = hf_model.load_weights(folder / "model.safetensors", str(self.device))
        moments = hf_model.load_weights(folder / "optimizer.safetensors", str(self.device))
        rng = hf_model.load_weights(folder / "rng.safetensors")
        own = {name: p.shape for name, p in self.weights.master.items()}
        if own != {name: w.shape for name, w in weights.items()}:
            raise UserError(
                f"{folder}: the checkpoint is of another model than {self.config.model.path}; choose the run's own recipe."
            )
        with torch.no_grad():
            for name, p in self.weights.master.items():
                p.copy_(weights[name])
                self.optimizer.state[p] = {
                    key.split("/")[0]: v for key, v in moments.items() if key.split("/", 1)[1] == name
                }
        self.weights.publish()
        self.skipped = rng["skipped"].to(self.device)
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.device)

    def checkpoint_bytes(self) -> int:
        """Return the size of one checkpoint: float32 weights and two moments."""
        return 12 * sum(p.numel() for p in self.weights.master.values())

    def export(self, folder: Path) -> None:
        """Write the master weights, in the compute type, as a Hugging Face folder."""
        hf_model.write(self.lm, self.weights.master, self.tokenizer, folder, self.dtype)

    def generate(self, conversations: Sequence[list[dict[str, Any]]], max_new_tokens: int) -> list[str]:
        """Answer conversations by greedy decoding."""
        return hf_model.answer(self.lm, self.tokenizer, conversations, max_new_tokens=max_new_tokens)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer with the template that is trained."""
        return hf_model.trained_tokenizer(self.config.model)

    def _check_model(self) -> None:
        head = self.lm.get_output_embeddings()
        path = self.config.model.path
        if head is None or getattr(head, "bias", None) is not None:
            raise UserError(
                f"model.path={path}: its output layer is missing or has a bias, which the fused loss does not know."
            )
        longest = getattr(self.lm.config, "max_position_embeddings", None)
        if longest is not None and self.config.data.max_length > longest:
            raise UserError(
                f"data.max_length={self.config.data.max_length}: {path} reads at most {longest} tokens; lower it."
            )


def _adamw(parameters: dict[str, Tensor], section: OptimizerSection) -> torch.optim.AdamW:
    """Return AdamW that decays matrices alone, and whose step is one kernel."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=section.lr, betas=section.betas, eps=section.eps, fused=True
    )


def _accumulate(sums: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, value in found.items():
        sums[name] = sums[name] + value if name in sums else value
