"""Training through megatron-core: its schedules, data-parallel gradients and distributed optimizer, on rows of documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from engine.backends import attention, common, hf_model, shards
from engine.backends.megatron import model, rows
from engine.backends.megatron.objective import Head, counted_here
from engine.backends.megatron.optimizer import Optimizer
from engine.backends.megatron.weights import Weights
from engine.config.schema import BackendSection, RunConfig
from engine.data.batch import collate_packed, empty_micro_batch, with_reference
from engine.errors import UserError
from engine.ranks import PATIENCE, Ranks
from engine.types import MicroBatch, Objective, Sample, StepMetrics

Use = Callable[[Tensor, Tensor, rows.Row], Any]
"""(hidden states of this rank's tokens [L, H], its rows of the output matrix [V, H], row) → what is wanted of the last stage."""


class MegatronBackend:
    """Trains one model through megatron-core on all ranks.

    Args:
        config: The recipe.
        ranks: Who takes part, and this rank's device.
        train: Whether it is trained; else it has neither gradients nor optimizer, and is a ``Scorer``.

    Raises:
        UserError: If the model cannot be loaded or cannot serve.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, *, train: bool = True) -> None:
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.dtype = hf_model.compute_dtype(config.model, self.device)
        self.lm = hf_model.skeleton(config.model, attention="eager")
        family = model.family(self.lm.config.model_type, config.model.path)
        common.check_model(self.lm, config)
        join(config)
        self.attention, attend = attention.choose(
            config.model.attention, self.device, self.dtype, deterministic=config.run.deterministic
        )
        self.core = model.transformer_config(
            self.lm.config, config.model, config.backend, self.dtype, device=self.device
        )
        rotary = self.lm.get_decoder().rotary_emb.to(self.device)
        self.chunks = model.build(self.lm.config, self.core, attend, rotary)
        self.head = Head(
            options=hf_model.logit_options(self.lm),
            vocabulary=self.lm.config.vocab_size,
            workspace_mb=common.WORKSPACE_MB[self.device.type],
        )
        self.utilization = common.Utilization(self.lm, self.device, self.dtype, ranks.size)
        self.weights = Weights(config, self.lm, family, self.core, self.chunks, ranks)
        self.write_group = dist.new_group(
            backend="gloo", timeout=PATIENCE
        )  # its own: a thread may write while others talk
        self.optimizer: Optimizer | None = None
        self.wrapped: list[Any] = list(self.chunks)
        if train:
            self._wrap()
        else:
            for chunk in self.chunks:
                chunk.requires_grad_(False)
        self.weights.fill(self.optimizer)
        self.skipped = torch.zeros((), device=self.device)
        self._names: dict[type, list[str]] = {}
        torch.manual_seed(config.run.seed + ranks.rank)

    @staticmethod
    def check(config: RunConfig) -> None:
        """Refuse what megatron-core cannot be told of the model and its layout.

        Raises:
            UserError: Naming the key.
        """
        hf = hf_model.skeleton(config.model, attention="eager").config
        cpu = torch.device("cpu")
        model.transformer_config(
            hf, config.model, config.backend, hf_model.compute_dtype(config.model, cpu), device=cpu
        )

    def train_step(
        self, micro_batches: Sequence[MicroBatch], objective: Objective, global_units: float, lr: float
    ) -> StepMetrics:
        """Do forward, backward, clipping and update for one global batch; see ``types.Backend``.

        Args:
            micro_batches: This data-parallel rank's, on the host; every rank has equally many.
            objective: Gives the loss sum of each.
            global_units: Count that normalises the whole batch.
            lr: Learning rate of this step.

        Returns:
            Scalars of the whole batch, on the device; nothing here waits for it.
        """
        assert self.optimizer is not None
        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero()
        found = self._run(micro_batches, partial(self._loss, objective, 1 / global_units), train=True)
        loss, sums = self._over_ranks(found, objective, global_units)
        norm = self.optimizer.norm()
        failed = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.skipped = torch.where(failed, self.skipped + 1, 0.0)
        self.optimizer.step(norm, self.config.train.max_grad_norm, failed, lr)
        return StepMetrics(loss=loss, sums=sums, grad_norm=norm, skipped=self.skipped)

    def evaluate(self, micro_batches: Iterable[MicroBatch], objective: Objective) -> StepMetrics:
        """Compute the loss over all ranks' micro-batches, normalised by their units, without gradients."""
        batches = list(micro_batches)
        copies = self.ranks.size // int(parallel_state.get_data_parallel_world_size())
        units = self.ranks.sum([sum(objective.units(b.targets) for b in batches)], copies)[0]
        found = self._ask(batches, partial(self._loss, objective, 1.0))
        loss, sums = self._over_ranks([sums for _, sums in found], objective, units)
        return StepMetrics(loss=loss, sums=sums, units=units)

    def sequence_logprobs(self, batch: MicroBatch) -> Tensor:
        """Return the log-probability of each document's trained tokens, summed, without gradients; float32 [S]."""
        return self.score([batch])[0]

    def score(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Return ``sequence_logprobs`` of each, all through one schedule."""
        if not batches:
            return []
        found = self._ask(batches, self.head.sequence_logprobs)
        return self._shared(found, [len(b.targets.bounds) - 1 for b in batches])

    def probe(self, samples: Sequence[Sample]) -> None:
        """Hold packed, fused log-probabilities against the model's own logits, one document at a time.

        Args:
            samples: A few documents; their first 128 tokens are used.

        Raises:
            UserError: If they differ by more than rounding.
        """
        probed = common.probed_documents(samples)
        packed, apart = collate_packed(probed), [collate_packed([s._replace(shared=0)]) for s in probed]
        ours = self._shared(self._ask([packed], self.head.logprobs), [len(packed.labels_N)])
        own = self._shared(self._ask(apart, self.head.own_logprobs), [len(b.labels_N) for b in apart])
        hint = "try backend=torch"
        common.check_gap(ours[0], torch.cat(own), self.dtype, self.lm, self.config.model.path, hint)

    def snapshot(self, *, copy: bool) -> Callable[[Path], Sequence[Path]]:
        """Return what writes model (float32), optimizer and random state as sharded safetensors, once, and names its files.

        Args:
            copy: The state is copied to the host in any case.
        """
        state = self._state()
        if self.ranks.main:
            self.tokenizer  # noqa: B018  # loaded here, not by the thread that writes

        def write(folder: Path) -> Sequence[Path]:
            files = shards.save(state, folder, self.write_group)
            if self.ranks.main:
                hf_model.write_description(self.lm, self.tokenizer, folder, self.dtype)
                files += [f for f in folder.iterdir() if not f.name.startswith("shard-")]
            return files

        return write

    def load(self, folder: Path) -> None:
        """Read what a snapshot wrote, in any layout; dropout goes on from where it was if the layout is the same.

        Raises:
            RunError: If it cannot be read.
            UserError: If it is of another model.
        """
        assert self.optimizer is not None
        sizes, wanted = shards.sizes(folder), self.weights.shapes()
        if {n: s for n, s in sizes.items() if n in wanted or n.startswith(("model/", "exp_avg"))} != wanted:
            raise UserError(
                f"{folder}: the checkpoint is of another model than {self.config.model.path}; choose the run's own recipe."
            )
        self.weights.load(folder, self.optimizer)
        rest = {"optimizer/step": torch.zeros(1), "skipped": torch.zeros(1)}
        random = self._random_state()
        if random.keys() <= sizes.keys() and sum(name.startswith("rng/") for name in sizes) == self._random_states():
            rest |= random
        shards.load(rest, folder, None)
        self.optimizer.resume(rest["optimizer/step"])
        self.skipped = rest["skipped"][0].to(self.device)
        if random.keys() <= rest.keys():
            self._set_random_state(rest)
        else:
            torch.manual_seed(hash((self.config.run.seed, int(rest["optimizer/step"][0]), self.ranks.rank)))

    @property
    def kernels(self) -> str | None:
        """Which kernels were chosen on CUDA, in words; None on a CPU, where there is no choice."""
        if self.device.type == "cpu":
            return None
        return f"attention by {self.attention}; the rest by megatron-core and torch"

    def checkpoint_bytes(self) -> int:
        """Return the size of one checkpoint: float32 weights and two moments."""
        return 12 * sum(int(p.numel()) for p in self.lm.parameters())

    def export(self, folder: Path | None) -> None:
        """Write the weights, in the compute type, as a Hugging Face folder.

        Args:
            folder: None on the ranks that only send.
        """
        with self._gathered():
            self.weights.export(folder, lambda: self.tokenizer, self.dtype)

    def export_adapter(self, folder: Path | None) -> None:
        """Refuse: there are no adapters with this backend.

        Raises:
            UserError: Always.
        """
        raise UserError("model.lora: backend=megatron has no adapters; choose backend=torch.")

    def generate(self, conversations: Sequence[list[dict[str, Any]]], max_new_tokens: int) -> list[str]:
        """Answer conversations by greedy decoding: the whole of them goes through the model for every token, in any layout."""
        tokenizer = self.tokenizer
        texts = [
            tokenizer.apply_chat_template(list(c), tokenize=False, add_generation_prompt=True) for c in conversations
        ]
        known = [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        prompts = [len(ids) for ids in known]
        ends = hf_model.end_tokens(self.lm, tokenizer)
        open_ones = list(range(len(known)))
        for _ in range(max_new_tokens):
            open_ones.sort(key=lambda i: len(known[i]))  # neighbours of one length share a call in attention
            asked = [known[i] for i in open_ones]
            batches = [rows.to_predict([asked[i] for i in part]) for part in rows.together(asked)]
            found = self._shared(self._ask(batches, self.head.best), [len(b.labels_N) for b in batches], torch.int64)
            for i, token in zip(open_ones, torch.cat(found).tolist(), strict=True):
                known[i].append(token)
            open_ones = [i for i in open_ones if known[i][-1] not in ends]
            if not open_ones:
                break
        answers: list[str] = tokenizer.batch_decode(
            [ids[n:] for ids, n in zip(known, prompts, strict=True)], skip_special_tokens=True
        )
        return answers

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer with the template that is trained."""
        return hf_model.trained_tokenizer(self.config)

    def _wrap(self) -> None:
        """Give the model gradients, spread over the data-parallel ranks, and an optimizer."""
        overlap = bool(self.config.backend.overlap) and parallel_state.get_data_parallel_world_size(True) > 1
        how = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
        )
        self.wrapped = [
            DistributedDataParallel(self.core, how, chunk, disable_bucketing=i > 0)  # as megatron-core's own loop does
            for i, chunk in enumerate(self.chunks)
        ]
        self.overlap = overlap
        self.optimizer = Optimizer(self.wrapped, self.config.optimizer, self.dtype, overlap=overlap)
        self.core.finalize_model_grads_func = lambda chunks, *args, **options: finalize_model_grads(chunks)
        if overlap:
            several = len(self.wrapped) > 1
            syncs = [chunk.no_sync for chunk in self.wrapped]
            self.core.no_sync_func = syncs if several else syncs[0]
            if self.core.pipeline_model_parallel_size > 1:
                starts = [chunk.start_grad_sync for chunk in self.wrapped]
                gathers = [chunk.start_param_sync for chunk in self.wrapped]
                self.core.grad_sync_func = starts if several else starts[0]
                self.core.param_sync_func = gathers if several else gathers[0]

    def _loss(
        self, objective: Objective, scale: float, hidden_LH: Tensor, weight_VH: Tensor, row: rows.Row
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what is differentiated of a row, and what is reported of it: nothing where another rank reports the same."""
        share, found = self.head.loss(hidden_LH, weight_VH, row, objective)
        sums = {"loss": share.detach().clone(), **{name: x.detach() for name, x in found.items()}}
        if not counted_here(row, objective):
            sums = {name: torch.zeros_like(x) for name, x in sums.items()}
        return share * scale, sums

    def _ask(self, batches: Sequence[MicroBatch], use: Use) -> list[Any]:
        """Return what is made of the hidden states of each micro-batch, without gradients; on other stages nothing."""
        with torch.no_grad(), self._gathered():
            for chunk in self.wrapped:
                chunk.eval()
            return self._run(batches, use, train=False)

    def _run(self, batches: Sequence[MicroBatch], use: Use, *, train: bool) -> list[Any]:
        """Send micro-batches through the pipeline.

        Args:
            batches: Of this data-parallel rank.
            use: What is made of their hidden states; with ``train`` (scalar that is differentiated, named sums).
            train: Whether gradients are made.

        Returns:
            What ``use`` made of each, with ``train`` the sums, on the ranks of the last stage; elsewhere nothing.
        """
        made, virtual = self._rows(batches), self.core.virtual_pipeline_model_parallel_size

        def forward(source: Iterator[rows.Row], chunk: Any) -> tuple[Tensor, Any]:
            row = next(source).to(self.device)

            def finish(hidden: Tensor) -> Any:
                bare = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
                found = bare.head(lambda weight_VH: use(hidden, weight_VH, row))
                nothing = torch.zeros((), dtype=torch.int, device=self.device)
                return (found[0], nothing, found[1]) if train else (hidden.new_zeros(()), nothing, found)

            return chunk(row), finish

        sources = [iter(made) for _ in self.wrapped]
        results = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=sources if virtual else sources[0],
            model=self.wrapped,
            num_microbatches=len(made),
            seq_length=made[0].length,
            micro_batch_size=1,
            forward_only=not train,
        )
        return list(results[: len(batches)])

    def _rows(self, batches: Sequence[MicroBatch]) -> list[rows.Row]:
        """Return this rank's parts of the micro-batches; behind them empty ones where chunks of stages need a multiple."""
        stages, context = self.core.pipeline_model_parallel_size, parallel_state.get_context_parallel_group()
        if self.core.virtual_pipeline_model_parallel_size and len(batches) % stages:
            empty = with_reference(empty_micro_batch(padded=False), np.zeros(0, np.float32))
            batches = [*batches, *[empty] * (stages - len(batches) % stages)]
        multiple = self.core.tensor_model_parallel_size * (2 * context.size() if context.size() > 1 else 1)
        lengths = [rows.length(batch, multiple) for batch in batches]
        if stages > 1:  # which know the shape of what they are sent
            lengths = [max(lengths)] * len(lengths)
        return [
            rows.row(batch, length=length, rank=context.rank(), ranks=context.size())
            for batch, length in zip(batches, lengths, strict=True)
        ]

    def _over_ranks(
        self, reports: list[dict[str, Tensor]], objective: Objective, units: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add up what the last stages report over micro-batches and ranks, and divide it by the units."""
        total: dict[str, Tensor] = {}
        for report in reports:
            common.accumulate(total, report)
        if type(objective) not in self._names:  # the other stages learn them once
            self._names[type(objective)] = sorted(set().union(*self.ranks.gather([*total])))
        names = self._names[type(objective)]
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        zero = torch.zeros((), device=self.device)
        values = torch.stack([total[n].float() if first and n in total else zero for n in names])
        dist.all_reduce(values)
        sums = dict(zip(names, (values / units).unbind(), strict=True))
        return sums.pop("loss"), sums

    def _shared(self, found: list[Tensor], lengths: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return what the last stage has found of each micro-batch on every stage."""
        group = parallel_state.get_pipeline_model_parallel_group()
        flat = torch.cat(found) if found else torch.empty(sum(lengths), dtype=dtype, device=self.device)
        if group.size() > 1:
            dist.broadcast(flat, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        return list(torch.split(flat, lengths))

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Have every parameter whole, none of them on its way."""
        hooked = self.optimizer is not None and self.overlap
        for chunk in self.wrapped if hooked else ():
            chunk.disable_forward_pre_hook()
        yield
        for chunk in self.wrapped if hooked else ():
            chunk.enable_forward_pre_hook()

    def _state(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint holds of this rank, by name, on the host."""
        assert self.optimizer is not None
        state = self.weights.state(self.optimizer)
        state |= {"optimizer/step": self.optimizer.applied.cpu(), "skipped": self.skipped.reshape(1).cpu()}
        return state | self._random_state()

    def _random_state(self) -> dict[str, Tensor]:
        """Return the random streams of this rank: its own, and those that tensor-parallel ranks share and keep apart."""
        streams = {"own": torch.get_rng_state(), **tensor_parallel.get_cuda_rng_tracker().get_states()}
        if self.device.type == "cuda":
            streams["cuda"] = torch.cuda.get_rng_state(self.device)
        return {f"rng/{name}/{self.ranks.rank}": state.clone() for name, state in streams.items()}

    def _random_states(self) -> int:
        """Return how many streams all ranks have."""
        return self.ranks.size * len(self._random_state())

    def _set_random_state(self, state: dict[str, Tensor]) -> None:
        streams = {name.split("/")[1]: x for name, x in state.items() if name.startswith("rng/")}
        torch.set_rng_state(streams.pop("own"))
        if "cuda" in streams:
            torch.cuda.set_rng_state(streams.pop("cuda"), self.device)
        tensor_parallel.get_cuda_rng_tracker().set_states(streams)


def join(config: RunConfig) -> None:
    """Set up megatron-core's process groups of this run's layout, and its random streams, once."""
    if not dist.is_initialized():
        kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(kinds, store=store, rank=0, world_size=1)
    backend: BackendSection = config.backend
    if parallel_state.model_parallel_is_initialized():
        return
    parallel_state.initialize_model_parallel(
        backend.tensor_parallel,
        backend.pipeline_parallel,
        backend.virtual_pipeline,
        context_parallel_size=backend.context_parallel,
        expert_model_parallel_size=backend.expert_parallel,
        expert_tensor_parallel_size=1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed)
