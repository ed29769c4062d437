"""Weights of every family through the Megatron backend: read slice by slice, right, and written back bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_ranks
import pytest
import torch
from rank_pool import RankPool
from safetensors.torch import load_file
from torch import nn

from engine.config.compose import compose
from engine.config.schema import RunConfig
from engine.ranks import Ranks

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

SIZES: dict[str, Any] = {
    "vocab_size": 265,  # no multiple of 2 or 4
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 257,
    "eos_token_id": 259,
    "pad_token_id": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 8}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 9, "head_dim": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
}
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp1": (1, []),
    "tp2": (2, ["backend.tensor_parallel=2"]),
    "pp2": (2, ["backend.pipeline_parallel=2"]),
    "tp4": (4, ["backend.tensor_parallel=4"]),
    "tp2·pp2": (4, ["backend.tensor_parallel=2", "backend.pipeline_parallel=2"]),
}
DOCUMENT = torch.tensor([i * 37 % 250 for i in range(60)])


@pytest.fixture(scope="module")
def folder_of(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a random model of a family, no weight of which is a constant."""
    known: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in known:
            import transformers

            name, more = FAMILIES[family]
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}Config")(**{**SIZES, **more})
            lm = getattr(transformers, f"{name}ForCausalLM")(config)
            with torch.no_grad():
                for p in lm.parameters():
                    p.add_(torch.randn_like(p) * 0.1)
            known[family] = tmp_path_factory.mktemp("family")
            lm.save_pretrained(known[family], max_shard_size="60KB")
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(model_folder / file, known[family])
        return known[family]

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def composed(overrides: list[str]) -> RunConfig:
    """Return the recipe; of overrides of the same key the last one counts."""
    return compose(list({o.split("=", 1)[0]: o for o in overrides}.values())).config


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_computed_and_written_back_exactly(
    family: str,
    layout: str,
    folder_of: Callable[[str], Path],
    base: list[str],
    one: RankPool,
    two_ranks: RankPool,
    four_ranks: RankPool,
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, export = folder_of(family), tmp_path / "hf"
    export.mkdir()
    count, options = LAYOUTS[layout]
    given = [*base, f"model.path={folder}", f"run.dir={tmp_path}", "backend=megatron", "cluster=env", *options]
    found = {1: one, 2: two_ranks, 4: four_ranks}[count](megatron_ranks.loaded, composed(given), export, DOCUMENT)
    lm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        logits = lm(DOCUMENT[None]).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, DOCUMENT[1:, None])[:, 0]
    for ours in found:
        assert torch.allclose(ours, expected, rtol=0, atol=1e-5), float((ours - expected).abs().max())
    before, after = tensors(folder), tensors(export)
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    again = AutoModelForCausalLM.from_pretrained(export)
    assert again.config.to_dict() == {**lm.config.to_dict(), "_name_or_path": again.config._name_or_path} or (
        again.config.to_diff_dict() == lm.config.to_diff_dict()
    )
    assert AutoTokenizer.from_pretrained(export).chat_template


def written_in_files(ranks: Ranks, config: RunConfig, export: Path) -> None:
    from engine.backends.megatron import weights

    weights.FILE_BYTES = 40_000
    try:
        megatron_ranks.loaded(ranks, config, export, DOCUMENT)
    finally:
        weights.FILE_BYTES = 5 * 10**9


def test_a_large_model_is_written_in_several_files(
    folder_of: Callable[[str], Path], base: list[str], two_ranks: RankPool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder, export = folder_of("llama3"), tmp_path / "hf"
    export.mkdir()
    given = [*base, f"model.path={folder}", f"run.dir={tmp_path}", "backend=megatron", "cluster=env"]
    given += ["backend.tensor_parallel=2"]
    two_ranks(written_in_files, composed(given), export)
    files = sorted(f.name for f in export.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((export / f).stat().st_size < 48_000 for f in files)
    loaded, source = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (export, folder))
    assert all(torch.equal(x, loaded[name]) for name, x in source.items())


@megatron_ranks.in_a_layout_of_its_own
def read_with_a_watch(ranks: Ranks, config: RunConfig) -> tuple[int, int, int]:
    """Load a model, and return the bytes of this rank's parameters, of the largest, and of the most that was held beside them."""
    from engine import backends
    from engine.backends.megatron import parts

    beside, most = [0], [0]
    plain, write = torch.zeros, parts.Part.write

    def zeros(*args: Any, **options: Any) -> torch.Tensor:
        made = plain(*args, **options)
        if made.ndim and made.numel() > 1000:
            beside[0] += made.nbytes
            most[0] = max(most[0], beside[0])
        return made

    def watched(part: Any, parameter: torch.Tensor, values: torch.Tensor) -> None:
        assert values.nbytes <= parameter.nbytes  # a slice, not the whole
        most[0] = max(most[0], beside[0] + values.nbytes)
        write(part, parameter, values)

    from engine.backends.megatron.weights import Weights

    set_one, fill = Weights._set, Weights.fill

    def let_go(self: Any, held: Any, values: Any, optimizer: Any) -> None:
        set_one(self, held, values, optimizer)
        beside[0] -= sum(x.nbytes for x in values.values() if x.numel() > 1000)

    def filled(self: Any, optimizer: Any) -> None:
        torch.zeros = zeros  # type: ignore[assignment]
        try:
            fill(self, optimizer)
        finally:
            torch.zeros = plain

    parts.Part.write, Weights._set, Weights.fill = watched, let_go, filled  # type: ignore[method-assign]
    try:
        backend: Any = backends.build(config, ranks)
    finally:
        parts.Part.write, Weights._set, Weights.fill = write, set_one, fill  # type: ignore[method-assign]
    sizes = [h.parameter.nbytes for h in backend.weights.held]
    return sum(sizes), max(sizes), most[0]


def test_no_rank_holds_more_than_its_shard_and_one_tensor(
    folder_of: Callable[[str], Path], base: list[str], two_ranks: RankPool, tmp_path: Path
) -> None:
    given = [*base, f"model.path={folder_of('llama3')}", f"run.dir={tmp_path}", "backend=megatron", "cluster=env"]
    given += ["backend.tensor_parallel=2", "data.max_length=64"]
    whole = sum(p.nbytes for p in tensors(folder_of("llama3")).values())
    for shard, largest, beside in two_ranks(read_with_a_watch, composed(given)):
        assert shard < 0.6 * whole
        assert beside <= 2 * largest  # one tensor, and the slice that is being put into it


def test_every_parameter_is_in_the_table() -> None:
    """A parameter that no rule names must end in an error, not in random weights."""
    from types import SimpleNamespace

    from engine.backends.megatron import shim

    shim.install()
    from engine.backends.megatron import parts
    from engine.backends.megatron.families import FAMILIES as TABLE

    class Chunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unheard_of = nn.Parameter(torch.zeros(3))

    with pytest.raises(KeyError):
        parts.held([Chunk()], TABLE["llama"], {}, config=SimpleNamespace(), tensor=None, expert=None)
