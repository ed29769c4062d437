"""The parameters of transformers that a rank's parameters of megatron-core hold, and the way from one to the other and back.

A part is a rectangle of one of transformers' parameters: some of its rows or columns, or all of it. In the rank's own parameter it
is a view, so that reading and writing a part are one copy, and every way back is exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from engine.backends.megatron.families import MODEL, Family, Rule

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a rank has of one parameter of transformers'."""

    name: str
    """In transformers."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    dim: int
    """Dimension in which it is cut."""
    start: int
    """First row or column of it that the rank has."""
    count: int
    """How many it has of them."""
    group: Any
    """The ranks that have the others."""
    view: Callable[[Tensor], Tensor]
    """Returns where a tensor of the shape of the rank's parameter holds it."""

    @property
    def whole(self) -> bool:
        """Whether the rank has all of it."""
        return self.count == self.shape[self.dim]

    @property
    def local(self) -> tuple[int, ...]:
        """The shape of what the rank has."""
        return tuple(self.count if d == self.dim else n for d, n in enumerate(self.shape))

    @property
    def place(self) -> tuple[slice, ...]:
        """Where in the whole parameter it is."""
        return tuple(
            slice(self.start, self.start + self.count) if d == self.dim else slice(None) for d in range(len(self.shape))
        )

    def of(self, parameter: Tensor) -> Tensor:
        """Return the part of the rank's parameter, or of a tensor of its shape, laid out as in transformers."""
        return self.view(parameter).reshape(self.local)

    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Copy the part into the rank's parameter, or a tensor of its shape."""
        at = self.view(parameter)
        at.copy_(values.reshape(at.shape))


@dataclass(frozen=True, kw_only=True)
class Held:
    """A parameter of megatron-core's on this rank."""

    name: str
    """With the number of its layer in the whole model."""
    parameter: nn.Parameter
    parts: tuple[Part, ...]


def held(
    chunks: list[Any],
    family: Family,
    shapes: dict[str, tuple[int, ...]],
    *,
    config: Any,
    tensor: Any,
    expert: Any,
) -> list[Held]:
    """Return the parameters of this rank's model chunks with what they hold, marked as whole or as one of several parts.

    Args:
        chunks: This rank's parts of the model, megatron-core's modules.
        family: The model's.
        shapes: Of transformers' parameters, by name; tied ones once.
        config: megatron-core's, for heads and groups.
        tensor: Group of the tensor-parallel ranks.
        expert: Group of the expert-parallel ranks.

    Raises:
        KeyError: If a parameter is not in the family's table.
    """
    found = []
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            match = LAYER.fullmatch(name)
            if match is None:
                rule, prefix, full = MODEL[name], "", name
            else:
                layer = chunk.decoder.layers[int(match[1])].layer_number - 1
                rule, prefix, full = (
                    family.layer[match[2]],
                    f"model.layers.{layer}.",
                    f"decoder.layers.{layer}.{match[2]}",
                )
            names = [prefix + n for n in rule.names]
            if names == ["lm_head.weight"] and names[0] not in shapes:  # tied, on another stage than the embedding
                names = ["model.embed_tokens.weight"]
            if rule.kind != "whole" and not hasattr(parameter, "tensor_model_parallel"):  # drawn weights would have it
                set_tensor_model_parallel_attributes(parameter, True, 1 if rule.kind == "columns" else 0, 1)
            parts = tuple(_parts(rule, names, shapes, config, expert if rule.kind == "experts" else tensor))
            found.append(Held(name=full, parameter=parameter, parts=parts))
    return found


def _parts(rule: Rule, names: list[str], shapes: dict[str, tuple[int, ...]], config: Any, group: Any) -> Iterator[Part]:
    """Return the parts of one parameter."""
    cuts = len(names) if rule.kind in ("stacked", "qkv") else 1
    dim = 1 if rule.kind == "columns" else 0
    for i, name in enumerate(names):
        shape = shapes[name]
        if rule.kind == "whole":
            start, count = 0, shape[dim]
        else:  # the vocabulary is rounded up to a multiple of the ranks: the last one may have rows that are nobody's
            share = -(-shape[dim] // group.size())
            start = min(group.rank() * share, shape[dim])
            count = min(share, shape[dim] - start)
        if rule.kind == "qkv":
            view = _heads(i, config)
        elif cuts > 1:
            view = _stacked(i, cuts)
        else:
            view = _leading(dim, count)
        yield Part(name=name, shape=shape, dim=dim, start=start, count=count, group=group, view=view)


def _heads(i: int, config: Any) -> Callable[[Tensor], Tensor]:
    """Return the view of queries, keys or values (0, 1, 2) among [groups · (queries + 2) · head, …]."""
    head, queries = config.kv_channels, config.num_attention_heads // config.num_query_groups
    first, size = ((0, queries), (queries, 1), (queries + 1, 1))[i]

    def view(x: Tensor) -> Tensor:
        return x.view(-1, queries + 2, head, *x.shape[1:])[:, first : first + size]

    return view


def _stacked(i: int, cuts: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.view(cuts, -1, *x.shape[1:])[i]


def _leading(dim: int, count: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.narrow(dim, 0, count)
