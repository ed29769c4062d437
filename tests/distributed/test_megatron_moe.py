"""Mixtures of experts through megatron-core: the same losses, gradients and files as with torch, however the experts are spread."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import megatron_ranks
import pytest
import torch
from rank_pool import RankPool
from safetensors.torch import load_file
from torch import Tensor

from engine import backends, objectives
from engine.backends import hf_model, hf_names
from engine.config.compose import compose
from engine.config.layout import Layout
from engine.config.schema import RunConfig
from engine.data.assemble import assemble
from engine.data.batch import with_reference
from engine.data.loader import Loader, train_loader
from engine.errors import UserError
from engine.ranks import Ranks
from engine.train import Counts
from engine.types import MicroBatch, Objective

pytest.importorskip("megatron.core")

TOLERANCE = 1e-5
"""Float32: sums of the same terms in another order."""
LR = 1e-3
ROOT = Path(__file__).resolve().parent.parent.parent
MEGATRON = ["backend=megatron", "cluster=env"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "experts": (2, ["backend.expert_parallel=2"]),
    "tensors": (2, ["backend.tensor_parallel=2"]),
    "stages": (2, ["backend.pipeline_parallel=2"]),
    "experts and tensors": (4, ["backend.expert_parallel=2", "backend.tensor_parallel=2"]),
}
COMMON = {
    "vocab_size": 265,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 257,
    "eos_token_id": 259,
    "pad_token_id": 256,
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", {**QWEN, "norm_topk_prob": False}),
    "half dense": ("Qwen3MoeConfig", {**QWEN, "norm_topk_prob": True, "mlp_only_layers": [0, 1]}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
}
CASES = [(model, layout) for model in ("qwen3_moe", "mixtral") for layout in LAYOUTS] + [("half dense", "stages")]
"""The last one's first stage has no experts at all."""


class Outcome(NamedTuple):
    """What a backend has done with a model."""

    sft: list[tuple[float, float]]
    """Loss and gradient norm of four steps."""
    dpo: list[tuple[float, float]]
    """The same of four that follow."""
    scores: list[Tensor]
    """Log-probability of each document of the first step, before it."""


Recipe = Callable[..., RunConfig]
ByTorch = Callable[[str], Outcome]
ByMegatron = Callable[[str, str], tuple[list[Outcome], Path]]


@pytest.fixture(scope="module")
def pools(
    _own_cache: None, _one_thread: None, two_ranks: RankPool, four_ranks: RankPool
) -> Iterator[dict[int, RankPool]]:
    """By how many they are; one rank too is a process of its own, where megatron-core may leave its traces."""
    one_rank = RankPool(1)
    yield {1: one_rank, 2: two_ranks, 4: four_ranks}
    one_rank.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models whose routers are far from undecided, as ``save_pretrained`` writes them: one tensor an expert."""
    import transformers

    found = {}
    for name, (kind, fields) in MODELS.items():
        torch.manual_seed(0)
        lm = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**COMMON, **fields))
        with torch.no_grad():
            for router in (p for n, p in lm.named_parameters() if n.endswith("mlp.gate.weight")):
                router.mul_(20)
        found[name] = tmp_path_factory.mktemp("model")
        lm.save_pretrained(found[name])
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(ROOT / "engine" / "assets" / "tiny_llama" / file, found[name])
    return found


@pytest.fixture(scope="module")
def recipe(
    folders: dict[str, Path], rows_file: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recipe:
    """The recipe of a model and an algorithm, and of what else is given."""
    data = {
        "sft": ["data=messages", f"data.train_path={rows_file}"],
        "dpo": ["algorithm=dpo", "data=binary_preference", f"data.train_path={pairs_file}"],
    }
    run_dir = tmp_path_factory.mktemp("run")

    def of(model: str, algorithm: str = "sft", more: Sequence[str] = ()) -> RunConfig:
        overrides = [
            *data[algorithm],
            f"model.path={folders[model]}",
            f"run.dir={run_dir}",
            "data.max_length=256",
            "data.packing.max_tokens=512",
            "train.global_batch_size=8",
            "algorithm.max_num_epochs=null",
            "algorithm.max_num_steps=4",
            "algorithm.val_at_end=false",
            "optimizer.weight_decay=0.1",
            "logger.backends=[]",
        ]
        return compose([*overrides, *more]).config

    return of


@pytest.fixture(scope="module")
def by_torch(recipe: Recipe) -> ByTorch:
    """What backend=torch does with a model."""
    return functools.cache(lambda model: outcome(Ranks(), recipe(model), recipe(model, "dpo"), None))


@pytest.fixture(scope="module")
def by_megatron(recipe: Recipe, pools: dict[int, RankPool], tmp_path_factory: pytest.TempPathFactory) -> ByMegatron:
    """What each rank of a layout does with a model, and where its weights were written before that."""

    def of(model: str, layout: str) -> tuple[list[Outcome], Path]:
        size, keys = LAYOUTS[layout]
        folder = tmp_path_factory.mktemp("hf")
        configs = (recipe(model, algorithm, [*MEGATRON, *keys]) for algorithm in ("sft", "dpo"))
        return pools[size](outcome, *configs, folder), folder

    return functools.cache(of)


@megatron_ranks.in_a_layout_of_its_own
def outcome(ranks: Ranks, sft: RunConfig, dpo: RunConfig, folder: Path | None) -> Outcome:
    """Write the weights as they were read, score, and train."""
    backend = built(ranks, sft)
    if folder is not None:
        backend.export(folder if ranks.main else None)
    batches = loader_of(sft, objectives.build(sft.algorithm), ranks).step(0)
    scores = [s.cpu() for s in backend.score(batches)]
    return Outcome(*(stepped(ranks, config, backend, range(4)) for config in (sft, dpo)), scores)


def built(ranks: Ranks, config: RunConfig) -> Any:
    """Return the recipe's backend, whatever layout there was before."""
    if config.backend.name == "megatron":
        megatron_ranks.leave(ranks)
    return backends.build(config, ranks)


def loader_of(config: RunConfig, objective: Objective, ranks: Ranks) -> Loader:
    """Return the run's loader of this rank."""
    layout = Layout.of(config.backend, ranks.size)
    return train_loader(
        assemble(config, Path(config.run.dir), lambda text: None).train,
        config.data,
        batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=0,
        rank=layout.data_rank(ranks.rank),
        ranks=layout.data,
        attention_length=400.0,
        together=config.algorithm.together,
    )


def stepped(ranks: Ranks, config: RunConfig, backend: Any, steps: range) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step."""
    objective = objectives.build(config.algorithm)
    loader, found = loader_of(config, objective, ranks), []
    copies = Layout.of(config.backend, ranks.size).copies
    for step in steps:
        batches = loader.step(step)
        if objective.needs_reference:
            batches = [referred(b, s) for b, s in zip(batches, backend.score(batches), strict=True)]
        units = ranks.sum(Counts.of(batches, objective))[0] / copies
        result = backend.train_step(batches, objective, units, LR)
        found.append((float(result.loss), float(result.grad_norm)))
    return found


def referred(batch: MicroBatch, scores: Tensor) -> MicroBatch:
    """Return the micro-batch with a reference that differs from the model."""
    return with_reference(batch, (scores.cpu().numpy() * 0.9 + 1).astype("float32"))


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_steps_are_those_of_torch(
    model: str, layout: str, algorithm: str, by_torch: ByTorch, by_megatron: ByMegatron
) -> None:
    wanted = torch.tensor(getattr(by_torch(model), algorithm))
    for found in by_megatron(model, layout)[0]:
        torch.testing.assert_close(torch.tensor(getattr(found, algorithm)), wanted, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_weights_come_and_go(model: str, layout: str, folders: dict[str, Path], by_megatron: ByMegatron) -> None:
    """What is written is what was read, to the bit and by name."""
    assert_same_files(folders[model], by_megatron(model, layout)[1])


def assert_same_files(*folders: Path) -> None:
    """See that two folders hold the same weights."""
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("model", MODELS)
def test_the_model_is_that_of_transformers(model: str, recipe: Recipe, by_megatron: ByMegatron) -> None:
    (found,), written = by_megatron(model, "one rank")
    config = recipe(model)
    batches = loader_of(config, objectives.build(config.algorithm), Ranks()).step(0)
    torch.testing.assert_close(torch.cat(found.scores), own_scores(written, batches), rtol=TOLERANCE, atol=0)


def own_scores(folder: Path, batches: Sequence[MicroBatch]) -> Tensor:
    """Return the log-probability of each document by transformers' own forward pass, one at a time."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for batch in batches:
        edges, token = batch.cu_seqlens or (), 0
        for start, stop, count in zip(edges, edges[1:], batch.targets.bounds[1:], strict=False):
            with torch.no_grad():
                logprobs = lm(batch.input_ids[:, start:stop]).logits[0].log_softmax(-1)
            index = batch.index_N[token:count] - start
            found.append(logprobs[index, batch.labels_N[token:count]].sum())
            token = count
    return torch.stack(found)


class Counted:
    """A tensor in a file that notes when it is read."""

    def __init__(self, piece: Any, reads: list[slice]) -> None:
        self.piece, self.reads = piece, reads

    def __getitem__(self, place: slice) -> Tensor:
        self.reads.append(place)
        found: Tensor = self.piece[place]
        return found


@pytest.mark.parametrize("model", MODELS)
def test_experts_are_read_one_by_one(
    model: str, folders: dict[str, Path], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read but the experts that are asked for, and never the whole model."""
    from transformers import AutoModelForCausalLM

    reads: list[slice] = []
    section = recipe(model).model
    lm = hf_model.skeleton(section, attention="eager")
    whole = AutoModelForCausalLM.from_pretrained(folders[model], dtype=torch.float32).state_dict()
    monkeypatch.delattr(hf_model, "load")
    for name, source in hf_model.sources(section, lm):
        reads.clear()
        if isinstance(source, hf_names.Fused):
            source.pieces = [[Counted(piece, reads) for piece in pieces] for pieces in source.pieces]
        assert torch.equal(source[1:3], whole[name][1:3])
        assert len(reads) == (0 if ".experts." not in name else 4 if "gate_up" in name else 2)


@megatron_ranks.in_a_layout_of_its_own
def read_and_written(ranks: Ranks, config: RunConfig, folder: Path) -> None:
    """Write the weights as they were read, by slices."""
    with mock.patch.object(hf_model, "load", None):
        built(ranks, config).export(folder if ranks.main else None)


@pytest.mark.parametrize("model", ["qwen3_moe", "mixtral"])
def test_torch_reads_them_so_too(
    model: str, folders: dict[str, Path], recipe: Recipe, two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks(read_and_written, recipe(model, more=["cluster=env"]), tmp_path)
    assert_same_files(folders[model], tmp_path)


def test_fused_files_are_read_too(
    folders: dict[str, Path], recipe: Recipe, two_ranks: RankPool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source, out = tmp_path / "fused", tmp_path / "out"
    shutil.copytree(folders["mixtral"], source)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(source, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(source / "model.safetensors")
    out.mkdir()
    more = [f"model.path={source}", *MEGATRON, *LAYOUTS["experts"][1]]
    two_ranks(read_and_written, recipe("mixtral", more=more), out)
    assert_same_files(folders["mixtral"], out)


@megatron_ranks.in_a_layout_of_its_own
def saved(ranks: Ranks, config: RunConfig, folder: Path) -> list[tuple[float, float]]:
    """Write a checkpoint after two steps, and return what the next two find."""
    backend = built(ranks, config)
    stepped(ranks, config, backend, range(2))
    backend.snapshot(copy=True)(folder)
    ranks.sum([0])  # all have written
    return stepped(ranks, config, backend, range(2, 4))


@megatron_ranks.in_a_layout_of_its_own
def resumed(ranks: Ranks, config: RunConfig, folder: Path) -> list[tuple[float, float]]:
    """Return what two steps find after a checkpoint."""
    backend = built(ranks, config)
    backend.load(folder)
    return stepped(ranks, config, backend, range(2, 4))


def test_a_checkpoint_is_read_in_any_layout(
    recipe: Recipe, by_torch: ByTorch, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    """What two ranks with two experts each have written goes on there to the bit, and elsewhere, with torch too, as it would."""
    model = "qwen3_moe"
    configs = {name: recipe(model, more=[*MEGATRON, *keys]) for name, (_, keys) in LAYOUTS.items()}
    after = pools[2](saved, configs["experts"], tmp_path)
    assert pools[2](resumed, configs["experts"], tmp_path) == after
    others = [
        *pools[1](resumed, configs["one rank"], tmp_path),
        *pools[4](resumed, configs["experts and tensors"], tmp_path),
        resumed(Ranks(), recipe(model), tmp_path),
    ]
    for found in others:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(by_torch(model).sft[2:]), rtol=TOLERANCE, atol=0)


@megatron_ranks.in_a_layout_of_its_own
def refusal(ranks: Ranks, config: RunConfig) -> str:
    """Return what is said instead of building the backend."""
    with pytest.raises(UserError) as error:
        built(ranks, config)
    return str(error.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            ["backend.tensor_parallel=2", "backend.sequence_parallel=false"],
            "backend.sequence_parallel=false: a model with experts needs it",
        ),
        (["model.config_overrides={router_jitter_noise: 0.1}"], "router_jitter_noise=0.1 is not for backend=megatron"),
    ],
)
def test_what_cannot_be_is_refused(keys: list[str], words: str, recipe: Recipe, two_ranks: RankPool) -> None:
    for said in two_ranks(refusal, recipe("mixtral", more=[*MEGATRON, *keys])):
        assert words in said
