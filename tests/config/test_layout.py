"""How ranks are split, and the sentence that answers a layout or a model that backend=megatron cannot have."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config import layout, megatron
from engine.config.checks import ASSETS
from engine.config.compose import compose
from engine.config.help import docstrings
from engine.config.layout import Layout
from engine.config.places import library
from engine.config.schema import BackendSection, RunConfig
from engine.data.assemble import assemble
from engine.errors import UserError
from engine.memory import device_memory
from engine.ranks import Ranks
from engine.run_folder import RunFolder
from engine.worker import _loaders, remedy
from tests.conftest import ROOT
from tests.models import LLAMA_8B, MIXTRAL, MODELS

TINY = ["model=tiny", "data=tasks"]
MEGATRON = [*TINY, "backend=megatron"]


def backend(**keys: Any) -> BackendSection:
    words = [f"backend.{key}={json.dumps(value)}" for key, value in keys.items()]
    return compose([*MEGATRON[:2], "backend=megatron", "cluster=env", *words]).config.backend


def problems(words: list[str]) -> list[str]:
    with pytest.raises(UserError) as refused:
        compose(words)
    return list(refused.value.problems)


# ------------------------------------------------------------------------------------------------- the ranks


@pytest.mark.parametrize(
    ("keys", "ranks"),
    [
        ({}, 4),
        ({"tensor_parallel": 2}, 8),
        ({"pipeline_parallel": 2}, 8),
        ({"context_parallel": 2}, 8),
        ({"tensor_parallel": 2, "pipeline_parallel": 2, "context_parallel": 2}, 32),
        ({"tensor_parallel": 4, "pipeline_parallel": 3, "context_parallel": 2}, 48),
    ],
)
def test_ranks_have_the_data_that_megatron_gives_them(keys: dict[str, int], ranks: int) -> None:
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    found = Layout.of(backend(**keys), ranks)
    assert found.copies * found.data == ranks
    groups = parallel_state.RankGenerator(
        tp=found.tensor, ep=1, dp=found.data, pp=found.pipeline, cp=found.context, order="tp-cp-ep-dp-pp"
    )
    for group in groups.get_ranks("dp"):
        assert [found.data_rank(rank) for rank in group] == list(range(found.data))
    for group in groups.get_ranks("tp-cp-pp"):
        assert len(group) == found.copies and len({found.data_rank(rank) for rank in group}) == 1


def test_ranks_of_torch_all_have_data_of_their_own() -> None:
    found = Layout.of(compose([*TINY, "backend.torch.shard_size=2"]).config.backend, 6)
    assert found == Layout(data=6) and [found.data_rank(rank) for rank in range(6)] == list(range(6))


def test_loaders_take_their_place_from_the_layout(base: list[str], tmp_path: Path) -> None:
    words = [*base, f"run.dir={tmp_path}", "data.packing.max_tokens=256"]
    one = compose(words).config
    data = assemble(one, tmp_path, lambda text: None)

    def documents(config: RunConfig, rank: int, size: int) -> list[list[int]]:
        train, _ = _loaders(config, data, Ranks(rank=rank, size=size), together=1)
        return [batch.input_ids.flatten().tolist() for batch in train.step(0)]

    split = compose(
        [*words, "backend=megatron", "cluster=env", "backend.tensor_parallel=2", "backend.pipeline_parallel=2"]
    )
    found = [documents(split.config, rank, 8) for rank in range(8)]
    torch = [documents(one, rank, 2) for rank in range(2)]
    assert torch[0] != torch[1]
    assert found == [torch[rank] for rank in (0, 0, 1, 1, 0, 0, 1, 1)]


# ------------------------------------------------------------------------------------------ impossible layouts


@pytest.mark.parametrize(
    ("keys", "ranks", "fields", "said"),
    [
        ({"tensor_parallel": 2, "pipeline_parallel": 2, "context_parallel": 3}, 8, LLAMA_8B, "backend.tensor_parallel=2, backend.pipeline_parallel=2 and backend.context_parallel=3 together need a multiple of 12 ranks, and there are 8: use 12, or lower a size."),
        ({"tensor_parallel": 4}, 10, None, "backend.tensor_parallel=4 needs a multiple of 4 ranks, and there are 10: use 8 or 12, or lower a size."),
        ({"context_parallel": 2}, 1, None, "backend.context_parallel=2 needs a multiple of 2 ranks, and there is 1: use 2, or lower a size."),
        ({"tensor_parallel": 3}, 3, LLAMA_8B, "backend.tensor_parallel=3 does not divide the model's 32 attention heads and 8 key/value heads and 14336 units of an MLP: set it to 2 or 4."),
        ({"tensor_parallel": 16}, 16, LLAMA_8B, "backend.tensor_parallel=16 does not divide the model's 8 key/value heads: set it to 8."),
        ({"pipeline_parallel": 3}, 3, LLAMA_8B, "backend.pipeline_parallel=3 does not divide the model's 32 layers: set it to 2 or 4."),
        ({"pipeline_parallel": 64}, 64, LLAMA_8B, "backend.pipeline_parallel=64 does not divide the model's 32 layers: set it to 32."),
        ({"pipeline_parallel": 4, "virtual_pipeline": 3}, 4, LLAMA_8B, "backend.virtual_pipeline=3 does not divide the layers of a stage, 8 with backend.pipeline_parallel=4: set it to 2 or 4."),
        ({"pipeline_parallel": 32, "virtual_pipeline": 2}, 32, LLAMA_8B, "backend.virtual_pipeline=2 does not divide the layers of a stage, 1 with backend.pipeline_parallel=32: set it to null."),
        ({"virtual_pipeline": 2}, 4, LLAMA_8B, "backend.virtual_pipeline=2 splits the stages of a pipeline, and backend.pipeline_parallel=1 has one: set backend.virtual_pipeline=null, or backend.pipeline_parallel=2 or more."),
        ({"sequence_parallel": True}, 4, None, "backend.sequence_parallel=true splits tokens over the tensor-parallel ranks, and backend.tensor_parallel=1 has one: set backend.sequence_parallel=null, or backend.tensor_parallel=2 or more."),
        ({"expert_parallel": 2}, 4, LLAMA_8B, "backend.expert_parallel=2: the model has no experts to split; set it to 1."),
        ({"expert_parallel": 3}, 3, MIXTRAL, "backend.expert_parallel=3 does not divide the model's 8 experts: set it to 2 or 4."),
        ({"expert_parallel": 4}, 6, MIXTRAL, "backend.expert_parallel=4 does not divide the 6 ranks of a stage: set it to 3 or 6."),
        ({"tensor_parallel": 2, "sequence_parallel": False}, 4, MIXTRAL, "backend.sequence_parallel=false: a model with experts needs it where backend.tensor_parallel is 2 or more; set it to null."),
        ({"tensor_parallel": 8}, 16, LLAMA_8B, "backend.tensor_parallel=8 stays inside a machine and does not divide its 4 ranks: set it to 4."),
        ({"tensor_parallel": 2}, 128, None, "train.global_batch_size=32 cannot serve the 64 data-parallel ranks of 128: set it to 64, or use fewer ranks."),
    ],
)  # fmt: skip
def test_impossible_layouts(keys: dict[str, Any], ranks: int, fields: dict[str, Any] | None, said: str) -> None:
    config = compose(TINY).config
    node = 4 if "inside a machine" in said else None
    assert layout.problems(backend(**keys), fields, config.train, config.data, ranks, node) == [said]


@pytest.mark.parametrize(
    ("keys", "ranks", "fields"),
    [
        ({"tensor_parallel": 8, "pipeline_parallel": 4, "virtual_pipeline": 4, "context_parallel": 2}, 64, LLAMA_8B),
        ({"tensor_parallel": 2, "expert_parallel": 8}, 8, MIXTRAL),
        ({"tensor_parallel": 8, "sequence_parallel": False}, 8, LLAMA_8B),
        ({"context_parallel": 8}, 8, LLAMA_8B),
    ],
)
def test_possible_layouts(keys: dict[str, Any], ranks: int, fields: dict[str, Any]) -> None:
    config = compose(TINY).config
    assert layout.problems(backend(**keys), fields, config.train, config.data, ranks, 8) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster.num_workers=64"], "train.global_batch_size=32 cannot serve 64 ranks: set it to 64, or use fewer ranks."),
        (["cluster.num_workers=3", "data.packing.enabled=false", "train.micro_batch_size=4"], "train.global_batch_size=32 cannot serve 3 ranks with train.micro_batch_size=4: set it to 24 or 36, or use fewer ranks."),
        (["cluster.num_workers=4", "backend.torch.shard_size=3"], "backend.torch.shard_size=3 does not divide the 4 ranks; choose a divisor."),
        (["cluster.num_workers=4", "backend=megatron", "backend.tensor_parallel=8"], "backend.tensor_parallel=8 does not divide the model's 4 attention heads and 4 key/value heads: set it to 4."),
        (["cluster.gpus_per_node=8", "backend=megatron", "backend.pipeline_parallel=8"], "backend.pipeline_parallel=8 does not divide the model's 3 layers: set it to 3."),
    ],
)  # fmt: skip
def test_layouts_that_the_recipe_alone_shows(words: list[str], said: str) -> None:
    assert said in problems([*TINY, "cluster=ray_local", *words])


def test_one_rank_is_a_layout_too() -> None:
    assert problems([*MEGATRON, "backend.tensor_parallel=2"]) == [
        "backend.tensor_parallel=2 needs a multiple of 2 ranks, and there is 1: use 2, or lower a size.",
    ]
    compose(MEGATRON)


# ---------------------------------------------------------------------------------------------------- the keys


def test_sequence_parallelism_goes_with_tensor_parallelism() -> None:
    words = [*MEGATRON, "cluster=env"]
    for given, found in (([], False), (["2"], True)):
        config = compose([*words, *(f"backend.tensor_parallel={n}" for n in given)]).config
        assert config.backend.sequence_parallel is found
    off = compose([*words, "backend.tensor_parallel=2", "backend.sequence_parallel=false"]).config
    assert off.backend.sequence_parallel is False
    assert compose(TINY).config.backend.sequence_parallel is None


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("tensor_parallel=2", "backend.tensor_parallel=2: tensor parallelism is for backend=megatron; set it to null, or choose backend=megatron."),
        ("context_parallel=2", "backend.context_parallel=2: context parallelism (Ulysses too) is for backend=megatron; set it to null, or choose backend=megatron."),
        ("overlap=false", "backend.overlap=false: this key is for backend=megatron; set it to null, or choose backend=megatron."),
        ("transformer_config={}", "backend.transformer_config={}: a TransformerConfig is for backend=megatron; set it to null, or choose backend=megatron."),
        ("ulysses_sequence_parallel_size=2", "backend.ulysses_sequence_parallel_size=2: there is no key backend.ulysses_sequence_parallel_size; here it is backend.context_parallel."),
        ("tensor_model_parallel_size=2", "backend.tensor_model_parallel_size=2: there is no key backend.tensor_model_parallel_size; here it is backend.tensor_parallel."),
        ("virtual_pipeline=1", "backend.virtual_pipeline=1: must be greater than or equal to 2."),
    ],
)  # fmt: skip
def test_keys_of_megatron_with_torch(word: str, said: str) -> None:
    assert problems([*TINY, f"backend.{word}"]) == [said]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["backend.torch.shard_size=1"], "backend.torch.shard_size=1 is for backend=torch: set it to null, or choose backend=torch."),
        (["backend.torch.cpu_offload=true"], "backend.torch.cpu_offload=true is for backend=torch: set it to false, or choose backend=torch."),
        (["backend.overlap=null"], "backend.overlap is not set: choose backend=megatron, which has a value for each of its keys."),
        (["model.lora.enabled=true"], "model.lora.enabled=true is for backend=torch: set it to false, or choose backend=torch."),
        (["model.liger=true"], "model.liger=true is for backend=torch: set it to auto or false, or choose backend=torch."),
        (["model.compile=true"], "model.compile=true is for backend=torch: set it to false, or choose backend=torch."),
        (["model.trust_remote_code=true"], "model.trust_remote_code=true is for backend=torch: set it to false, or choose backend=torch."),
        (["model.config_overrides={model_type: gemma2}"], "model.path=builtin:tiny_llama: backend=megatron has no models of type gemma2; choose one of llama, mistral, qwen2, qwen3, qwen3_moe, mixtral, or backend=torch."),
        (["model.config_overrides={hidden_act: gelu}"], "model.path=builtin:tiny_llama: hidden_act is gelu, and backend=megatron has silu alone; choose backend=torch."),
    ],
)  # fmt: skip
def test_what_megatron_does_not_have(words: list[str], said: str) -> None:
    assert problems([*MEGATRON, *words]) == [said]


def test_megatron_by_its_name_alone() -> None:
    (found,) = problems([*TINY, "backend.name=megatron"])
    assert found == (
        "backend.tensor_parallel is not set: choose backend=megatron, which has a value for each of its keys."
    )


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"einops": "0.8.2"}, "backend=megatron: megatron-core is not installed; pip install 'anneal[megatron]'."),
        ({"megatron-core": "0.16.1"}, "backend=megatron: einops is not installed; pip install 'anneal[megatron]'."),
        (
            {"megatron-core": "0.17.0", "einops": "0.8.2"},
            "backend=megatron: megatron-core 0.17.0 is installed, and the engine knows 0.16 alone; pip install 'anneal[megatron]'.",
        ),
    ],
)
def test_what_is_installed(installed: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "_version", installed.get)
    assert problems(MEGATRON) == [said]
    compose(TINY)


def test_keys_of_megatron_are_those_described_so() -> None:
    described = [name for name, said in docstrings(BackendSection).items() if said.startswith("megatron:")]
    assert described == list(megatron.KEYS)
    for file in ("torch", "megatron"):
        assert list(yaml.safe_load((ROOT / "conf" / "backend" / f"{file}.yaml").read_text())) == ["name", *described]


def test_defaults_of_torch_are_those_of_the_config() -> None:
    assert yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())["backend"]["torch"] == megatron.TORCH_DEFAULTS


def test_a_group_on_the_command_line_replaces_the_recipes_backend() -> None:
    found = compose(["recipe=sft_llama3_8b_1x8_megatron", "backend=torch"]).config.backend
    assert found == compose(TINY).config.backend


# --------------------------------------------------------------------------------------------------- a hub model


def test_a_model_of_the_hub_is_held_against_the_layout_once_it_is_here(
    base: list[str], tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot in the hub's cache, as a download leaves it: what the recipe cannot tell, the executor's check can."""
    from huggingface_hub import constants

    from engine import hub

    folder = tmp_path / "models--someone--model"
    shutil.copytree(model_folder, folder / "snapshots" / "c1")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    words = [*(w for w in base if not w.startswith("model.path")), "model.path=someone/model", "backend=megatron"]
    config = compose([*words, "model.config_overrides={num_hidden_layers: 3}", "cluster=env"]).config
    fields = hub.known_fields(config.model)
    assert fields is not None and fields["num_attention_heads"] == 4 and fields["num_hidden_layers"] == 3
    assert hub.fields(config.model) == fields
    missing = config.model.model_copy(update={"path": "someone/else"})
    assert hub.known_fields(missing) is None


def test_the_worker_refuses_a_model_that_megatron_does_not_have(base: list[str], tmp_path: Path) -> None:
    """The recipe of a hub id tells no family: the rank that reads the config refuses it, before any data is read."""
    from engine import worker
    from engine.train import StopRequest

    other = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny_llama", other)
    composed = compose(
        [*base, "model.init=random", f"model.path={other}", "backend=megatron", f"run.dir={tmp_path / 'run'}"]
    )
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gemma2"}))
    with pytest.raises(UserError, match="backend=megatron has no models of type gemma2; choose one of llama"):
        worker.main(composed.config, composed.recipe, Ranks(), StopRequest())


# ------------------------------------------------------------------------------------------------ resuming


def test_a_checkpoint_of_the_other_backend_is_refused_in_a_sentence(base: list[str], tmp_path: Path) -> None:
    words = [*base, f"run.dir={tmp_path}", "cluster=env"]
    first = compose(words)
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000001" / "state.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(first.recipe)
    other = compose([*words, "backend=megatron", "backend.tensor_parallel=2", "backend.transformer_config={x: 1}"])
    with pytest.raises(UserError) as refused:
        RunFolder(other.config, other.recipe)
    assert str(refused.value) == (
        f"run.dir={tmp_path}: was written by backend=torch; resume with that, or start a new run from its hf/ folder "
        f"(model.path={tmp_path}/hf)."
    )


def test_another_layout_may_go_on(base: list[str], tmp_path: Path) -> None:
    words = [*base, f"run.dir={tmp_path}", "cluster=env", "backend=megatron"]
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000001" / "state.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(compose(words).recipe)
    other = compose([*words, "backend.tensor_parallel=2", "backend.pipeline_parallel=2", "backend.virtual_pipeline=2"])
    RunFolder(other.config, other.recipe).release()
    other = compose([*words, "backend.transformer_config={attention_softmax_in_fp32: true}"])
    with pytest.raises(UserError, match="another recipe"):
        RunFolder(other.config, other.recipe)


def test_remedy_for_memory_is_one_that_the_backend_has() -> None:
    words = ["data.packing.max_tokens=256", "model.recompute=full"]
    assert "lora" in remedy(compose([*TINY, *words]).config)
    assert remedy(compose([*MEGATRON, *words]).config) == (
        "raise backend.tensor_parallel, or backend.pipeline_parallel where that fills a machine"
    )


# ------------------------------------------------------------------------------------------ models and recipes


def test_every_model_has_a_layout() -> None:
    choices = {file.stem: yaml.safe_load(file.read_text())["path"] for file in (ROOT / "conf" / "model").glob("*.yaml")}
    del choices["tiny"]
    assert sorted(choices.values()) == sorted(MODELS)
    for name, path in choices.items():
        words = [f"model={name}", "backend=megatron", "backend.tensor_parallel=2", "backend.pipeline_parallel=2"]
        config = compose([*words, "cluster=ray_local", "cluster.gpus_per_node=8"]).config
        assert config.model.path == path
        assert not megatron.check_fields(path, MODELS[path])
        assert layout.problems(config.backend, MODELS[path], config.train, config.data, 8, 8) == []


@pytest.mark.parametrize("name", sorted(set(library().choices["recipe"]) - {"quickstart", "quickstart_dpo"}))
def test_every_recipe_has_a_possible_layout(name: str) -> None:
    config = compose([f"recipe={name}"]).config
    assert config.run.name == name
    ranks, per_node = layout.named_ranks(config.cluster), layout.named_ranks_per_node(config.cluster)
    nodes, gpus = map(int, (re.findall(r"_(\d)x(\d)", name) or [(1, 8)])[0])  # a machine, where the name says nothing
    assert ranks == nodes * gpus and per_node == gpus
    assert config.algorithm.name == name[:3] and config.model.lora.enabled is ("_lora_" in name)
    fields = MODELS[config.model.path]
    assert layout.problems(config.backend, fields, config.train, config.data, ranks, per_node) == []
    assert (config.backend.name == "megatron") is name.endswith("_megatron")
    if config.backend.name == "megatron":
        split = Layout.of(config.backend, ranks)
        tokens = 4096
        assert config.data.max_length * config.algorithm.together <= tokens or config.algorithm.together == 1
        held = device_memory(fields, split, tokens=tokens, recompute=config.model.recompute == "full")
        assert held.total < 60e9  # of 80, so that CUDA, NCCL and gaps have room


def test_a_recipe_and_its_twin_differ_in_the_backend_alone() -> None:
    for name in ("sft_llama3_8b_1x8", "dpo_llama3_8b_1x8"):
        one, other = (compose([f"recipe={n}", "run.dir=x", "run.name=x"]).config for n in (name, f"{name}_megatron"))
        assert one.model_copy(update={"backend": other.backend}) == other
