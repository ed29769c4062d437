"""From a recipe's sources to what a run trains on and validates on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.config import sources
from engine.config.schema import RunConfig
from engine.data import cache
from engine.data.samples import DataSet, Part, Samples, hold_out
from engine.errors import UserError


class Made(NamedTuple):
    """Where the tokenised samples of a source are.

    Attributes:
        folder: Of the cache; None: nowhere, they are made as they are asked for.
        revision: Of a hub data set.
    """

    folder: str | None
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data of a run.

    Attributes:
        train: What it trains on.
        validation: What it validates on, by name: one set named "", or several under their sources' names.
        sources: Every source by name ("train", "validation", "train/NAME" …) for what is told of it.
    """

    train: DataSet
    validation: dict[str, DataSet]
    sources: dict[str, Samples]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hash of everything that the data consists of, by set."""
        sets = {f"validation/{name}" if name else "validation": data for name, data in self.validation.items()}
        return {name: data.fingerprint for name, data in {"train": self.train, **sets}.items()}

    @property
    def made(self) -> dict[str, Made]:
        """Where the samples of each source are, for the other ranks."""
        return {name: Made(str(s.folder) if s.folder else None, s.revision) for name, s in self.sources.items()}


def assemble(
    config: RunConfig,
    scratch: Path,
    say: cache.Say = print,
    *,
    made: Mapping[str, Made] | None = None,
    revisions: Mapping[str, str] | None = None,
) -> Data:
    """Return the data of a recipe, tokenised now where the cache has none.

    Args:
        config: The recipe.
        scratch: Folder of the samples with ``data.cache=off``.
        say: Told what is made, and what became of the rows.
        made: What the first rank has made, by source: taken where it is in reach; else the same is made here.
        revisions: Of hub data sets for which the recipe names none, by source: those that a run has begun with.

    Raises:
        UserError: For a row that cannot be used, or if nothing is left to train or to validate on.
    """
    found: dict[str, Samples] = {}
    fresh: set[str] | None = None if made is not None else set()
    parts: dict[str, list[Part]] = {}
    data = config.data
    for split in sources.LISTS:
        parts[split] = []
        for source in sources.of(data, split):
            name = f"{split}/{source.name}" if getattr(data, split) else split
            known = (made or {}).get(name) or Made(None, source.revision or (revisions or {}).get(name))
            if known.folder is not None and Path(known.folder).is_dir():
                found[name] = Samples(Path(known.folder))
            else:
                pinned = source.model_copy(update={"revision": known.revision})
                found[name] = cache.prepare(config, pinned, scratch, say, fresh=fresh)
            say(found[name].summary.sentence(_shown(name)))
            parts[split].append(Part(name=source.name, samples=found[name], weight=source.weight))
    held = parts["validation"]
    if data.val_fraction:
        pairs = [hold_out(part, data.val_fraction) for part in parts["train"]]
        parts["train"], held = [kept for kept, _ in pairs], [out for _, out in pairs]
        for part in (*parts["train"], *held):
            if not part.num_conversations:
                what = "to train on" if part in parts["train"] else "to validate on"
                raise UserError(
                    f"data.val_fraction={data.val_fraction} leaves nothing {what} of {part.name}; give another fraction."
                )
        say(f"held out: {sum(part.num_conversations for part in held):,} conversations to validate on")
    elif made is None:
        _say_overlap(parts["train"], held, say)
    validation = {part.name if len(held) > 1 else "": DataSet([part]) for part in held}
    return Data(train=DataSet(parts["train"]), validation=validation, sources=found)


def _say_overlap(train: list[Part], held: list[Part], say: cache.Say) -> None:
    """Say how many conversations are both trained on and validated on."""
    if not held:
        return
    trained, seen = (np.unique(np.concatenate([p.samples.row_hashes for p in parts])) for parts in (train, held))
    both = len(np.intersect1d(trained, seen, assume_unique=True))
    if both:
        say(f"{both:,} of {len(seen):,} validation conversations are trained on too")


def _shown(name: str) -> str:
    """Return a source's name in a sentence."""
    split, _, own = name.partition("/")
    what = "data" if split == "train" else "validation data"
    return f"{what} {own}" if own else what
