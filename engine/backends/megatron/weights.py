"""A rank's weights: read from Hugging Face's files slice by slice, kept and resumed under Hugging Face's names, and written back.

Checkpoints are those of the torch backend in form: every tensor under its name in transformers, each rank's part with its place in
the whole. So any layout reads what another has written, and nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_common import _from_local_no_grad
from torch.distributed.tensor import Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from engine.backends import hf_model, hf_names, shards
from engine.backends.megatron import parts
from engine.backends.megatron.families import Family
from engine.backends.megatron.optimizer import STATE, Optimizer
from engine.backends.megatron.parts import Held, Part
from engine.config.schema import RunConfig
from engine.ranks import Ranks

FILE_BYTES = 5 * 10**9
"""Most bytes in a file of hf/."""
LOAD_BYTES = 2**31
"""About how much of a checkpoint is read at a time."""


class Weights:
    """This rank's parameters under their names in transformers.

    Args:
        config: The recipe.
        lm: The transformers model's skeleton, for names, shapes and files.
        family: Its table.
        core: megatron-core's configuration.
        chunks: This rank's parts of the model.
        ranks: Who takes part.
    """

    def __init__(self, config: RunConfig, lm: Any, family: Family, core: Any, chunks: list[Any], ranks: Ranks) -> None:
        self.config, self.lm, self.ranks = config, lm, ranks
        tensor = parallel_state.get_tensor_model_parallel_group()
        expert = parallel_state.get_expert_model_parallel_group()
        shapes = {name: tuple(p.shape) for name, p in lm.named_parameters()}
        self.held = parts.held(chunks, family, shapes, config=core, tensor=tensor, expert=expert)

    def fill(self, optimizer: Optimizer | None) -> None:
        """Give every parameter, and its master, its first values: of the model's files, or drawn from the seed."""
        wanted: dict[str, list[tuple[Held, Part]]] = {}
        for held in self.held:
            for part in held.parts:
                wanted.setdefault(part.name, []).append((held, part))
        filling: dict[str, tuple[Tensor, set[str]]] = {}

        def take(name: str, source: Any) -> None:
            for held, part in wanted.pop(name, ()):
                if held.name not in filling:
                    filling[held.name] = torch.zeros(held.parameter.shape), {p.name for p in held.parts}
                whole, missing = filling[held.name]
                part.write(whole, source[part.place].float())
                missing.discard(name)
                if not missing:
                    self._set(held, {"model": filling.pop(held.name)[0]}, optimizer)

        if self.config.model.init == "random":
            hf_model.initialise(self.lm, self.config.run.seed, lambda module, name, p: take(name, p))
        else:
            for name, source in hf_model.sources(self.config.model, self.lm):
                take(name, source)
        assert not wanted, sorted(wanted)

    def state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return what a checkpoint holds of the parameters: this rank's share of the work, on the host.

        The state of each parameter is spread over the data-parallel ranks by elements; one of them, in turn, collects it.
        """
        found: dict[str, Tensor] = {}
        for i, held in enumerate(self.held):
            owners = optimizer.owners(held.parameter)
            collector = i % owners.size()
            share = optimizer.share(held.parameter)
            for key in STATE:
                whole = torch.zeros(held.parameter.shape, device=held.parameter.device)
                if share is not None:
                    whole.view(-1)[share[0]] = share[1][key].view(-1)
                if owners.size() > 1:  # as whole numbers: their sum with zeros changes no bit
                    dist.reduce(whole.view(torch.int32), dist.get_global_rank(owners, collector), group=owners)
                if owners.rank() == collector:
                    host = whole.cpu()
                    found |= {f"{key}/{part.name}": self._placed(part, part.of(host)) for part in held.parts}
        return found

    def load(self, folder: Path, optimizer: Optimizer) -> None:
        """Read what ``state`` gave of any layout, some parameters at a time."""
        for group in self._pieces():
            wholes = {held.name: {key: torch.zeros(held.parameter.shape) for key in STATE} for held in group}
            read = {
                f"{key}/{part.name}": torch.empty(part.local) for held in group for part in held.parts for key in STATE
            }
            placed = {
                f"{key}/{part.name}": self._placed(part, read[f"{key}/{part.name}"])
                for held in group
                for part in held.parts
                for key in STATE
            }
            shards.load(placed, folder, None)
            for held in group:
                for key in STATE:
                    for part in held.parts:
                        part.write(wholes[held.name][key], read[f"{key}/{part.name}"])
                self._set(held, wholes.pop(held.name), optimizer)

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of everything that all ranks' states hold of the parameters, by name."""
        return {f"{key}/{name}": p.shape for key in STATE for name, p in self.lm.named_parameters()}

    def export(self, folder: Path | None, tokenizer: Any, dtype: torch.dtype) -> None:
        """Write hf/: one tensor at a time comes to the first rank, which writes a file whenever one is full.

        Args:
            folder: None on the ranks that only send.
            tokenizer: Returns the tokenizer.
            dtype: Of the written weights.
        """
        sizes = {n: p.numel() * dtype.itemsize for n, p in self.lm.named_parameters()}
        files = _files(sizes)
        weight_map: dict[str, str] = {}
        for file, inside in files.items():
            tensors = {name: self._collected(name, dtype) for name in inside}
            if folder is not None:
                saved = hf_names.as_saved(self.lm, {n: x for n, x in tensors.items() if x is not None})
                save_file(saved, folder / file, {"format": "pt"})
                weight_map |= dict.fromkeys(saved, file)
        if folder is None:
            return
        if len(files) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        self.lm.generation_config.save_pretrained(folder)
        hf_model.write_description(self.lm, tokenizer(), folder, dtype)

    def _set(self, held: Held, values: dict[str, Tensor], optimizer: Optimizer | None) -> None:
        """Give a parameter its value, and its state what is known of it; float32 of its shape."""
        with torch.no_grad():
            held.parameter.copy_(values["model"])
            share = None if optimizer is None else optimizer.share(held.parameter)
            if share is not None:
                for key, whole in values.items():
                    share[1][key].view(-1).copy_(whole.view(-1)[share[0]])

    def _placed(self, part: Part, local: Tensor) -> Tensor:
        """Return a part as a checkpoint takes it: with its place in the whole."""
        if part.whole:
            return local
        stride = torch.empty(part.shape, device="meta").stride()
        meta = TensorMeta(torch.Size(part.shape), stride, local.dtype)
        spec = DTensorSpec(_mesh(part.group), (Shard(part.dim),), meta)
        return _from_local_no_grad(local, spec)

    def _pieces(self) -> Iterator[list[Held]]:
        """Return the parameters in groups that are read together."""
        group: list[Held] = []
        size = 0
        for held in self.held:
            group.append(held)
            size += 4 * len(STATE) * held.parameter.numel()
            if size > LOAD_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    @cached_property
    def _senders(self) -> dict[str, list[tuple[int, int, int, int]]]:
        """For each parameter, which ranks have the parts that make it up: (rank, dimension, start, count)."""
        own = [(part.name, part.dim, part.start, part.count) for held in self.held for part in held.parts]
        found: dict[str, dict[int, tuple[int, int, int, int]]] = {}
        for rank, entries in enumerate(self.ranks.gather(own)):
            for name, dim, start, count in entries:
                if count:
                    found.setdefault(name, {}).setdefault(start, (rank, dim, start, count))
        return {name: [entry for _, entry in sorted(places.items())] for name, places in found.items()}

    @cached_property
    def _own(self) -> dict[str, tuple[Held, Part]]:
        return {part.name: (held, part) for held in self.held for part in held.parts}

    def _collected(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return a parameter whole on the first rank, None on others; all call."""
        pieces = []
        for rank, dim, _, count in self._senders[name]:
            shape = list(self.lm.get_parameter(name).shape)
            shape[dim] = count
            piece = torch.empty(shape, dtype=dtype)
            if rank == self.ranks.rank:
                held, part = self._own[name]
                piece = part.of(held.parameter.detach()).to("cpu", dtype).contiguous()
                if rank:
                    dist.send(piece, 0, group=self.ranks.group)
            elif self.ranks.main:
                dist.recv(piece, rank, group=self.ranks.group)
            pieces.append(piece)
        return torch.cat(pieces, dim).contiguous() if self.ranks.main else None


@cache
def _mesh(group: Any) -> DeviceMesh:
    """Return the ranks that share a parameter with this one as a mesh."""
    return DeviceMesh.from_group(group, "cpu", mesh=torch.tensor(dist.get_process_group_ranks(group)))


def _files(sizes: dict[str, int]) -> dict[str, list[str]]:
    """Return which tensors go to which file of a Hugging Face folder, in order, by their bytes."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}
