"""Weights that a folder names otherwise than the model does: experts, which transformers fuses in memory and saves one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Fused:
    """The experts of a layer in one tensor [E, …], which the files hold apart: sliced like a tensor, it reads what is asked for.

    Args:
        pieces: For each expert the tensors, or what is sliced like one, that lie above each other in its matrix.
    """

    def __init__(self, pieces: Sequence[Sequence[Any]]) -> None:
        self.pieces = pieces

    def get_shape(self) -> list[int]:
        """Return the shape of the whole; that of nothing if the experts are not alike."""
        shapes = [[piece.get_shape() for piece in pieces] for pieces in self.pieces]
        if any(s != shapes[0] for s in shapes) or any(s[1:] != shapes[0][0][1:] for s in shapes[0]):
            return []
        return [len(shapes), sum(s[0] for s in shapes[0]), *shapes[0][0][1:]]

    def __getitem__(self, place: slice | tuple[slice, ...]) -> Tensor:
        """Return some experts, and of these the rows and columns that are asked for."""
        experts, *rest = place if isinstance(place, tuple) else (place,)
        chosen = [torch.cat([piece[:] for piece in pieces]) for pieces in self.pieces[experts]]
        return torch.stack(chosen)[(slice(None), *rest)]


def as_saved(lm: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names, and in the pieces, in which ``save_pretrained`` writes them."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(lm, weights)
    return found


def fused(lm: Any, files: Mapping[str, Any]) -> dict[str, Any]:
    """Return for parameters that are saved otherwise what is sliced to read them.

    Args:
        lm: The model's skeleton.
        files: What is sliced to read each tensor of a folder, by its name there.
    """
    shapes = {name: p.shape for name, p in lm.named_parameters()}
    found: dict[str, Any] = {}
    for name, experts in _saved_names(lm, shapes).items():
        if all(n in files for names in experts for n in names):
            pieces = [[files[n] for n in names] for names in experts]
            found[name] = Fused(pieces) if len(shapes[name]) == 3 else pieces[0][0]
    return found


def _saved_names(lm: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[list[str]]]:
    """Return the names under which each parameter is saved: some for each expert where it is of three dimensions, else one.

    Transformers' own conversion tells, given two numbers for the upper and the lower half of each matrix instead of the weights.
    What it does to them beside taking experts and their halves apart is not followed: there is no name then.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    steps = [op for c in get_model_conversion_mapping(lm) if isinstance(c, WeightConverter) for op in c.operations]
    if not all(isinstance(op, (Concatenate, MergeModulelist)) for op in steps):
        return {}
    owners: list[tuple[str, int]] = []
    numbers = {}
    for name, shape in shapes.items():
        experts = shape[0] if len(shape) == 3 else 1
        start = len(owners)
        owners += [(name, expert) for expert in range(experts) for _ in range(2)]
        halves = torch.arange(start, len(owners)).view(experts, 2, 1)
        numbers[name] = halves if len(shape) == 3 else halves[0]
    found: dict[str, dict[int, list[str]]] = {}
    for saved, numbered in sorted(as_saved(lm, numbers).items(), key=lambda entry: int(entry[1].flatten()[0])):
        name, expert = owners[int(numbered.flatten()[0])]
        found.setdefault(name, {}).setdefault(expert, []).append(saved)
    return {name: [names for _, names in sorted(experts.items())] for name, experts in found.items()}
