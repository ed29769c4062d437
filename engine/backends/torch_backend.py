"""A transformers model: packed forward, fused output layer, AdamW on float32 weights, whole or sharded over ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.backends import attention, common, hf_model, liger, lora, shards
from engine.backends.weights import Replicated, Sharded
from engine.config.schema import OptimizerSection, RunConfig
from engine.data.batch import collate_packed
from engine.data.samples import trained_positions
from engine.errors import UserError
from engine.ranks import PATIENCE, Ranks
from engine.types import MicroBatch, Objective, Sample, StepMetrics
from kernels import linear_objective, reference

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainable(nn.Module):
    """The model with its output layer inside the objective; the root whose forward owns every parameter."""

    def __init__(self, lm: Any, workspace_mb: float) -> None:
        super().__init__()
        self.lm = lm
        self.workspace_mb = workspace_mb
        self.options = hf_model.logit_options(lm)

    def forward(self, work: Callable[..., T], *args: Any) -> T:
        """Return ``work(*args)``, done where the root's weights are at hand, gathered if they are sharded."""
        return work(*args)

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Return the hidden states from which the trained tokens are predicted, [N, H]."""
        states: Tensor = self.lm.get_decoder()(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            cu_seqlens=batch.cu_seqlens,
            shared=batch.shared,
            use_cache=False,
        ).last_hidden_state
        return states.reshape(-1, states.shape[-1]).index_select(0, batch.index_N)

    def loss(self, batch: MicroBatch, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss sum of a micro-batch and the sums to report."""
        chunk, group_bounds = common.by_chunk(objective, batch.targets)
        return linear_objective.linear_objective(
            self.hidden(batch),
            labels_N=batch.labels_N,
            objective=chunk,
            group_bounds=group_bounds,
            **self._output_layer(),
        )

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Return the log-probabilities of the trained tokens, [N]."""
        return linear_objective.linear_logprobs(self.hidden(batch), labels_N=batch.labels_N, **self._output_layer())

    def _output_layer(self) -> dict[str, Any]:
        """Return what the kernels are told of the output layer, its weights as they are now."""
        head = self.lm.get_output_embeddings()
        bias_V = getattr(head, "bias", None)
        return {"weight_VH": head.weight, "bias_V": bias_V, "options": self.options, "workspace_mb": self.workspace_mb}


class TorchBackend:
    """Trains one transformers model on the devices of all ranks.

    Args:
        config: The recipe.
        ranks: Who takes part, and this rank's device.
        train: Whether it is trained; else it has neither gradients nor optimizer, and is a ``Scorer``.

    Raises:
        UserError: If the model cannot be loaded or cannot serve.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, *, train: bool = True) -> None:
        self.device = ranks.device
        self.config = config
        self.ranks = ranks
        self.train = train
        self.dtype = hf_model.compute_dtype(config.model, self.device)
        self.attention = attention.register(
            config.model.attention, self.device, self.dtype, deterministic=config.run.deterministic
        )
        sharded = ranks.size > 1 and config.backend.torch.shard_size != 1
        if config.backend.torch.cpu_offload and (self.device.type == "cpu" or not sharded):
            raise UserError(
                "backend.torch.cpu_offload: needs CUDA and weights sharded over several ranks; set it to false."
            )
        self.lm = hf_model.skeleton(config.model, attention=attention.NAME)
        common.check_model(self.lm, config)
        self.no_liger = liger.why_not(config.model.liger, self.device, self.lm.config)
        self.weights = self._sharded() if sharded else self._replicated()
        self.utilization = common.Utilization(self.lm, self.device, self.dtype, ranks.size)
        self.adapted = list(lora.layers(self.lm).values()) if config.model.lora.enabled else []
        if not train:
            return
        self.optimizer = _adamw(self.weights.master, config.optimizer)
        self.skipped = torch.zeros((), device=self.device)
        self.write_group = dist.new_group(backend="gloo", timeout=PATIENCE) if ranks.size > 1 else None
        torch.manual_seed(config.run.seed + ranks.rank)

    def train_step(
        self, micro_batches: Sequence[MicroBatch], objective: Objective, global_units: float, lr: float
    ) -> StepMetrics:
        """Do forward, backward, clipping and update for one global batch.

        Args:
            micro_batches: This rank's, on the host; every rank has equally many.
            objective: Gives the loss sum of each.
            global_units: Count that normalises the whole batch.
            lr: Learning rate of this step.

        Returns:
            Scalars of the whole batch, on the device; nothing here waits for it.
        """
        self.root.train()
        loss, sums = torch.zeros((), device=self.device), dict[str, Tensor]()
        for batch in micro_batches:
            share, found = self.root(self.root.loss, batch.to(self.device), objective)
            (share / global_units).backward()
            loss += share.detach()
            common.accumulate(sums, found)
        loss, sums = self._over_ranks(loss, sums, global_units)
        self.weights.reduce()
        norm = self.weights.norm()
        parameters = list(self.weights.master.values())
        nn.utils.clip_grads_with_norm_(parameters, self.config.train.max_grad_norm, norm)
        failed = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.skipped = torch.where(failed, self.skipped + 1, 0.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        found_inf = failed.float().to(parameters[0].device)  # the fused kernel then changes nothing
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.step()
        self.weights.publish()
        return StepMetrics(loss=loss, sums=sums, grad_norm=norm, skipped=self.skipped)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch], objective: Objective) -> StepMetrics:
        """Compute the loss over all ranks' micro-batches, normalised by their units, without gradients."""
        self.root.eval()
        units = 0.0
        loss, sums = torch.zeros((), device=self.device), dict[str, Tensor]()
        for batch in micro_batches:
            share, found = self.root(self.root.loss, batch.to(self.device), objective)
            loss += share
            units += objective.units(batch.targets)
            common.accumulate(sums, found)
        self.weights.rest()
        units = self.ranks.sum([units])[0]
        loss, sums = self._over_ranks(loss, sums, units)
        return StepMetrics(loss=loss, sums=sums, units=units)

    @torch.no_grad()
    def sequence_logprobs(self, batch: MicroBatch) -> Tensor:
        """Return the log-probability of each document's trained tokens, summed, without gradients; float32 [S].

        Adapters are off: it is the base that a LoRA run starts from, and its reference, whatever has been trained since.
        """
        self.root.eval()
        batch = batch.to(self.device)
        with lora.disabled(self.adapted):
            logprobs_N, weights_N = self.root(self.root.logprobs, batch), batch.targets.weights_N
        self.weights.rest()
        return reference.sums_by_group(
            logprobs_N if weights_N is None else logprobs_N * weights_N, batch.targets.bounds
        )

    def score(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Return ``sequence_logprobs`` of each."""
        return [self.sequence_logprobs(batch) for batch in batches]

    @torch.no_grad()
    def probe(self, samples: Sequence[Sample]) -> None:
        """Hold packed, fused log-probabilities against the model's own logits, one document at a time.

        Args:
            samples: A few documents; their first 128 tokens are used.

        Raises:
            UserError: If they differ by more than rounding.
        """
        probed = common.probed_documents(samples)
        self.root.eval()
        ours_N = self.root(self.root.logprobs, collate_packed(probed).to(self.device))
        self.lm.set_attn_implementation("eager")
        try:
            with self.liger.off() if self.liger is not None else nullcontext():
                own_N = self.root(self._own_logprobs, probed)
        finally:
            self.lm.set_attn_implementation(attention.NAME)
            self.weights.rest()
        hint = "try model.liger=false" if self.liger is not None else "this model cannot be trained yet"
        common.check_gap(ours_N, own_N, self.dtype, self.lm, self.config.model.path, hint)

    def snapshot(self, *, copy: bool) -> Callable[[Path], Sequence[Path]]:
        """Return what writes model (float32), optimizer and random state as sharded safetensors, once, and names its files.

        Args:
            copy: Copy the state first, so that the writing may go on in another thread while training changes it.
        """
        state = self._state()
        if copy:
            state = {name: x.to("cpu", copy=True) for name, x in state.items()}
        if self.ranks.main:
            self.tokenizer  # noqa: B018  # loaded here, not by the thread that writes

        def write(folder: Path) -> Sequence[Path]:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a new thread begins with the first
            files = shards.save(state, folder, self.write_group)
            if self.ranks.main:
                hf_model.write_description(self.lm, self.tokenizer, folder, self.dtype)
                if self.adapted:
                    lora.describe(self.config.model, self.config.run.seed, folder)
                files += [f for f in folder.iterdir() if not f.name.startswith("shard-")]
            return files

        return write

    def load(self, folder: Path) -> None:
        """Read what a snapshot wrote, on any number of ranks; dropout goes on from where it was if the number is the same.

        Raises:
            RunError: If it cannot be read.
            UserError: If it is of another model, or of other adapters.
        """
        state = self._state()
        sizes = shards.sizes(folder)
        wanted = {name: x for name, x in state.items() if not name.startswith("rng/")}
        shapes = {name: x.shape for name, x in wanted.items()}
        if shapes != {n: s for n, s in sizes.items() if not n.startswith("rng/")}:
            other = lora.mismatch(sizes, shapes)
            if other is not None:
                raise UserError(f"{folder}: the checkpoint {other}.")
            raise UserError(
                f"{folder}: the checkpoint is of another model than {self.config.model.path}; choose the run's own recipe."
            )
        same_ranks = sum(name.startswith("rng/cpu/") for name in sizes) == self.ranks.size
        same_ranks &= all(name in sizes for name in state)  # and the same kind of device
        shards.load(state if same_ranks else wanted, folder, self.write_group)
        for p in self.weights.master.values():
            self.optimizer.state[p]["step"].copy_(state["optimizer/step"][0])
        self.weights.publish()
        self.skipped = state["skipped"][0]
        if same_ranks:
            torch.set_rng_state(state[f"rng/cpu/{self.ranks.rank}"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state[f"rng/cuda/{self.ranks.rank}"], self.device)
        else:
            torch.manual_seed(hash((self.config.run.seed, int(state["optimizer/step"][0]), self.ranks.rank)))

    @property
    def kernels(self) -> str | None:
        """Which kernels were chosen on CUDA, in words; None on a CPU, where there is no choice."""
        if self.device.type == "cpu":
            return None
        rest = "Liger" if self.no_liger is None else f"torch ({self.no_liger})"
        return f"attention by {self.attention}; RMSNorm, RoPE and MLP by {rest}"

    def checkpoint_bytes(self) -> int:
        """Return the size of one checkpoint: float32 weights and two moments of all that is trained."""
        return 12 * sum(p.numel() for p in self.root.parameters() if p.requires_grad)

    def export(self, folder: Path | None) -> None:
        """Write the master weights, adapters merged in float32, in the compute type, as a Hugging Face folder.

        Args:
            folder: None on the ranks that only take part in gathering.
        """
        whole = ((n, p) for n, p in self.weights.whole() if folder is not None)
        weights = {n: p.detach().to("cpu", p.dtype if self.adapted else self.dtype) for n, p in whole}
        if folder is not None:
            weights = lora.merged(self.lm, weights) if self.adapted else weights
            hf_model.write(self.lm, weights, self.tokenizer, folder, self.dtype)

    def export_adapter(self, folder: Path | None) -> None:
        """Write LoRA's adapters, float32, as peft loads them.

        Args:
            folder: None on the ranks that only take part in gathering.
        """
        weights = {name: p.detach().cpu() for name, p in self.weights.whole(frozen=False) if folder is not None}
        if folder is not None:
            lora.write(self.lm, weights, self.tokenizer, folder)

    def generate(self, conversations: Sequence[list[dict[str, Any]]], max_new_tokens: int) -> list[str]:
        """Answer conversations by greedy decoding."""
        with torch.no_grad():
            answers: list[str] = self.root(self._answer, conversations, max_new_tokens)
        self.weights.rest()
        return answers

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer with the template that is trained."""
        return hf_model.trained_tokenizer(self.config)

    def _replicated(self) -> Replicated:
        """Put the whole model on the device."""
        if self.config.model.init == "random":
            hf_model.initialise(self.lm, self.config.run.seed, hf_model.into_module)
            self.lm.tie_weights()
        else:
            self.lm = hf_model.load(self.config.model, self.lm)
        if self.config.model.lora.enabled:
            lora.inject(self.config.model, self.lm, self.dtype)
            lora.initialise(self.lm, self.config.run.seed, hf_model.into_module)
        self.root = self._trainable(self.lm.to(self.device))
        return Replicated(self.root, self.dtype, self.ranks)

    def _sharded(self) -> Sharded:
        """Shard the model before it has weights; then each rank reads or draws its own rows."""
        bare, seed = self.lm, self.config.run.seed
        if self.config.model.lora.enabled:
            bare = copy.deepcopy(self.lm)  # its names and shapes are those of the files
            lora.inject(self.config.model, self.lm, self.dtype)
        self.root = self._trainable(self.lm)
        layers = hf_model.layers(self.lm)
        weights = Sharded(self.root, layers, self.dtype, self.config.backend.torch, self.ranks)
        if self.config.model.lora.enabled:
            lora.initialise(self.lm, seed, lambda module, name, p: weights.fill(name, p))
        if self.config.model.init == "random":
            hf_model.initialise(bare, seed, lambda module, name, p: weights.fill(name, p))
        else:
            buffers = hf_model.saved_buffers(self.lm)
            for name, source in hf_model.sources(self.config.model, bare):
                if name in buffers:
                    buffers[name].copy_(source[:])
                else:
                    weights.fill(name, source)
        return weights

    def _trainable(self, lm: Any) -> Trainable:
        if not self.train:
            lm.requires_grad_(False)
        self.liger = liger.Liger(lm) if self.no_liger is None else None
        if self.train and self.config.model.recompute == "full":
            enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if self.config.model.compile:  # attention, whose documents differ from step to step, stays outside
            for layer in hf_model.layers(lm):
                layer.compile(dynamic=True)
        return Trainable(lm, common.WORKSPACE_MB[self.device.type])

    def _state(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint holds, by name, each with its place in the whole."""
        state: dict[str, Tensor] = {}
        for name, p in self.weights.master.items():
            moments = self.optimizer.state[p]
            for key, local in (("model", p), *((key, moments[key]) for key in MOMENTS)):
                state[f"{key}/{name}"] = self.weights.saved(name, local)
        if not self.adapted:  # the base is that of model.path
            state |= {f"model/{name}": b for name, b in hf_model.saved_buffers(self.lm).items()}
        state |= {"optimizer/step": moments["step"].reshape(1), "skipped": self.skipped.reshape(1)}
        state[f"rng/cpu/{self.ranks.rank}"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state[f"rng/cuda/{self.ranks.rank}"] = torch.cuda.get_rng_state(self.device)
        return state

    def _over_ranks(self, loss: Tensor, sums: dict[str, Tensor], units: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Add up loss and sums over ranks, and divide them by the units."""
        names = sorted(sums)
        values = torch.stack([loss, *(sums[name] for name in names)])
        if self.ranks.size > 1:
            dist.all_reduce(values)
        values /= units
        return values[0], dict(zip(names, values[1:].unbind(), strict=True))

    def _own_logprobs(self, samples: Sequence[Sample]) -> Tensor:
        """Return the log-probabilities of the trained tokens by the model's own logits, one document at a time, [N]."""
        own = []
        for sample in samples:
            ids = torch.from_numpy(sample.input_ids.astype("int64")).to(self.device)
            trained = torch.from_numpy(trained_positions(sample)).to(self.device)
            logprobs_TV = self.lm(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
            own.append(logprobs_TV[trained - 1, ids[trained]])
        return torch.cat(own)

    def _answer(self, conversations: Sequence[list[dict[str, Any]]], max_new_tokens: int) -> list[str]:
        return hf_model.answer(self.lm, self.tokenizer, conversations, max_new_tokens=max_new_tokens)


def _adamw(parameters: dict[str, Tensor], section: OptimizerSection) -> torch.optim.AdamW:
    """Return AdamW that decays matrices alone, and whose step is one kernel."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=section.lr, betas=section.betas, eps=section.eps, fused=True
    )
    for p in parameters.values():  # from the start, so that a checkpoint before the first step is one like the others
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **{key: torch.zeros_like(p) for key in MOMENTS}}
    return optimizer
