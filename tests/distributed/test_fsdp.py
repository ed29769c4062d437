"""Several ranks against one: the same losses, gradients, weights, answers and checkpoints, however the model is spread."""

from __future__ import annotations

import errno
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine import checkpoint
from engine.backends import hf_model, shards
from engine.backends.torch_backend import TorchBackend
from engine.checkpoint import Checkpoints, TrainState
from engine.config.compose import compose
from engine.config.schema import RunConfig
from engine.data.assemble import assemble
from engine.data.batch import empty_micro_batch
from engine.data.loader import Loader, train_loader, val_loader
from engine.errors import EXIT_ERROR, RunError, UserError
from engine.objectives.sft import SFT
from engine.ranks import PeerFailed, Ranks
from engine.train import Counts
from engine.types import StepMetrics

TOLERANCE = 1e-5
"""Float32: sums of the same terms in another order."""
UPDATE_TOLERANCE = 1e-4
"""AdamW divides a gradient by its own size: where that is near zero, what rounding leaves of it counts in full."""
BF16_TOLERANCE = 2**-8
"""Half a unit in the last place of bfloat16's eight bits, of a loss that averages hundreds of rounded figures."""
ATTENTION_LENGTH = 12.0 * 32
LR = 1e-3
ONE = Ranks()
CONVERSATIONS = [
    [{"role": "user", "content": "hello"}],
    [{"role": "user", "content": "question 3 why why ?"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "and then?"}],
]

LAYOUTS = {
    "sharded": [],
    "replicated": ["backend.torch.shard_size=1"],
    "weights kept after forward": ["backend.torch.reshard_after_forward=false"],
    "recomputed": ["model.recompute=full"],
    "recomputed, replicated": ["model.recompute=full", "backend.torch.shard_size=1"],
    "several micro-batches": ["data.packing.max_tokens=256"],
    "several micro-batches, weights kept": ["data.packing.max_tokens=256", "backend.torch.reshard_after_forward=false"],
    "several micro-batches, replicated": ["data.packing.max_tokens=256", "backend.torch.shard_size=1"],
    "padded": ["data.packing.enabled=false", "train.micro_batch_size=2"],
    "padded, replicated": ["data.packing.enabled=false", "train.micro_batch_size=2", "backend.torch.shard_size=1"],
    "clipped": ["train.max_grad_norm=0.01"],
    "decayed": ["optimizer.weight_decay=0.5"],
    "tied": ["model.init=random", "model.config_overrides={tie_word_embeddings: true}"],
    "tied, replicated": [
        "model.init=random",
        "model.config_overrides={tie_word_embeddings: true}",
        "backend.torch.shard_size=1",
    ],
    "an empty bin": ["train.global_batch_size=13", "data.drop_last=false"],
    "an empty bin, replicated": [
        "train.global_batch_size=13",
        "data.drop_last=false",
        "backend.torch.shard_size=1",
    ],
}
SHARDED_OR_NOT = {"sharded": [], "replicated": ["backend.torch.shard_size=1"]}


@pytest.fixture(scope="module")
def recipe(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """Compose a recipe, and fill the cache of its data."""
    folder = tmp_path_factory.mktemp("recipes")

    def make(*more: str) -> RunConfig:
        given = {o.split("=", 1)[0]: o for o in [*base, f"run.dir={folder}", *more]}
        config = compose(list(given.values())).config
        loader_of(config, ONE)
        return config

    return make


@pytest.fixture(scope="module")
def odd_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which two ranks have unlike parts: 265 words, 63 units in its MLPs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("odd")
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=265,
            hidden_size=30,
            intermediate_size=63,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=2,
            max_position_embeddings=512,
        )
    ).save_pretrained(folder)
    copy_tokenizer(model_folder, folder)
    return folder


@pytest.fixture(scope="module")
def renamed_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder of a model saved alone: no file has the names of a causal model's weights."""
    from transformers import LlamaConfig, LlamaModel

    folder = tmp_path_factory.mktemp("renamed")
    config = LlamaConfig.from_pretrained(model_folder)
    config.tie_word_embeddings = True
    torch.manual_seed(2)
    LlamaModel(config).save_pretrained(folder)
    copy_tokenizer(model_folder, folder)
    return folder


@pytest.fixture(scope="module")
def tied_bfloat16_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as most small ones are published: in bfloat16, its output layer left out because it is the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tied")
    config = LlamaConfig.from_pretrained(model_folder)
    config.tie_word_embeddings = True
    torch.manual_seed(3)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    copy_tokenizer(model_folder, folder)
    return folder


@pytest.fixture(scope="module")
def buffer_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts, whose router has a correction that is saved with the weights and is no parameter."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    folder = tmp_path_factory.mktemp("buffers")
    torch.manual_seed(4)
    lm = Glm4MoeForCausalLM(
        Glm4MoeConfig(
            vocab_size=264,
            hidden_size=32,
            intermediate_size=64,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            n_shared_experts=1,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            max_position_embeddings=512,
        )
    )
    for name, buffer in lm.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(0.5, 1.5)
    lm.save_pretrained(folder)
    copy_tokenizer(model_folder, folder)
    return folder


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, target)


def loader_of(config: RunConfig, ranks: Ranks, *, val_batch_size: int | None = None) -> Loader:
    data = assemble(config, Path(config.run.dir), lambda text: None).train
    place: dict[str, Any] = {"rank": ranks.rank, "ranks": ranks.size, "attention_length": ATTENTION_LENGTH}
    sizes = {"batch_size": config.train.global_batch_size, "micro_batch_size": config.train.micro_batch_size}
    if val_batch_size is not None:
        return val_loader(data, config.data, **{**sizes, "batch_size": val_batch_size}, **place)
    return train_loader(data, config.data, seed=config.run.seed, **sizes, **place)


def do_step(backend: TorchBackend, loader: Loader, step: int, lr: float = LR) -> Any:
    batches = loader.step(step)
    counts = Counts(*backend.ranks.sum(Counts.of(batches, SFT())))
    return backend.train_step(batches, SFT(), counts.units, lr)


def whole(backend: TorchBackend) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in backend.weights.whole()}


def state_of(backend: TorchBackend) -> dict[str, Tensor]:
    """Return all that a checkpoint holds, whole."""
    state = {}
    steps = {float(backend.optimizer.state[p]["step"]) for p in backend.weights.master.values()}
    assert len(steps) == 1  # AdamW counts for each parameter
    for name, p in backend.weights.master.items():
        moments = backend.optimizer.state[p]
        for kind, x in {"model": p, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}.items():
            saved = backend.weights.saved(name, x)
            state[f"{kind}/{name}"] = (saved.full_tensor() if isinstance(saved, DTensor) else saved).clone()
    return state | {"skipped": backend.skipped.clone().reshape(1), "optimizer/step": torch.tensor([*steps])}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the L2 norm of the difference as a share of that of ``theirs``, over all tensors together."""
    assert ours.keys() == theirs.keys() and all(x.shape == theirs[name].shape for name, x in ours.items())
    difference = sum(float((x.double() - theirs[name]).square().sum()) for name, x in ours.items())
    size = sum(float(x.double().square().sum()) for x in theirs.values())
    return float((difference / size) ** 0.5)


def part(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if name.startswith(kind)}


def raised(work: Callable[[], Any]) -> tuple[str, str, int]:
    """Return kind, text and exit code of what a call raises."""
    try:
        work()
    except RunError as error:
        return type(error).__name__, str(error), error.exit_code
    raise AssertionError("nothing was raised")


def train(ranks: Ranks, config: RunConfig, num_steps: int = 5) -> dict[str, Any]:
    """Train, and return what each step said and the state after the first and the last."""
    backend, loader = TorchBackend(config, ranks), loader_of(config, ranks)
    found: dict[str, Any] = {"losses": [], "norms": [], "empty": 0, "initial": whole(backend)}
    found["type"] = type(backend.weights).__name__
    found["local"] = sum(p.numel() for p in backend.weights.master.values())
    found["micro_batches"] = [len(loader.step(step)) for step in range(num_steps)]
    found["dtypes"] = {p.dtype for p in backend.weights.master.values()}
    for step in range(num_steps):
        found["empty"] += sum(b.num_tokens == 0 for b in loader.step(step))
        result = do_step(backend, loader, step)
        found["losses"].append(float(result.loss))
        found["norms"].append(float(result.grad_norm))
        if step in (0, num_steps - 1):
            found[step] = state_of(backend)
    return found


@functools.cache
def one_rank(text: str, num_steps: int = 5) -> dict[str, Any]:
    return train(ONE, RunConfig.model_validate_json(text), num_steps)


def reference(config: RunConfig, num_steps: int = 5) -> dict[str, Any]:
    """Return what one plain rank does with the recipe; once for all ways to spread it."""
    plain = config.model_copy(deep=True, update={"run": config.run.model_copy(update={"dir": "."})})
    plain = plain.model_copy(update={"backend": compose_defaults(config)})
    return one_rank(plain.model_dump_json(), num_steps)


def compose_defaults(config: RunConfig) -> Any:
    options = {"shard_size": None, "reshard_after_forward": True}
    return config.backend.model_copy(update={"torch": config.backend.torch.model_copy(update=options)})


def assert_same_training(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert same(ours["initial"], theirs["initial"])
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=TOLERANCE)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=TOLERANCE)
    last = len(ours["losses"]) - 1
    for step in (0, last):
        mine, other = ours[step], theirs[step]
        assert mine["optimizer/step"] == other["optimizer/step"] == step + 1
        if step == 0:  # the gradients themselves, times 0.1
            assert gap(part(mine, "exp_avg/"), part(other, "exp_avg/")) < TOLERANCE
        assert gap(part(mine, "model/"), part(other, "model/")) < TOLERANCE
        before = {f"model/{name}": x for name, x in theirs["initial"].items()}
        moved = [{n: x - before[n] for n, x in part(s, "model/").items()} for s in (mine, other)]
        assert gap(*moved) < UPDATE_TOLERANCE
    assert theirs["losses"][-1] < theirs["losses"][0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_step_and_five_equal_one_ranks(two_ranks: RankPool, recipe: Callable[..., RunConfig], layout: str) -> None:
    config = recipe(*LAYOUTS[layout])
    theirs = reference(config)
    results = two_ranks(train, config)
    for ours in results:
        assert_same_training(ours, theirs)
        assert ours["type"] == ("Replicated" if "shard_size=1" in str(LAYOUTS[layout]) else "Sharded")
    if "replicated" not in layout:
        assert sum(r["local"] for r in results) == theirs["local"] and all(r["local"] for r in results)
    assert any(r["empty"] for r in results) == ("empty" in layout)
    assert all(max(r["micro_batches"]) > 1 for r in results) == ("several" in layout or "padded" in layout)


def train_alone(ranks: Ranks, config: RunConfig, working: int) -> dict[str, Any]:
    """One step in which one rank has all the samples, and the other an empty micro-batch for each of its."""
    backend, loader = TorchBackend(config, ranks), loader_of(config, ONE)
    batches = loader.step(0)
    units = Counts.of(batches, SFT()).units
    if ranks.size > 1 and ranks.rank != working:
        batches = [empty_micro_batch(padded=not config.data.packing.enabled)] * len(batches)
    result = backend.train_step(batches, SFT(), units, LR)
    return {"loss": float(result.loss), "norm": float(result.grad_norm), "state": state_of(backend)}


@pytest.mark.parametrize("spread", SHARDED_OR_NOT)
@pytest.mark.parametrize("batch", ["packed", "padded"])
@pytest.mark.parametrize("working", [0, 1])
def test_a_rank_with_nothing_to_do_takes_part_and_adds_nothing(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], spread: str, batch: str, working: int
) -> None:
    padded = ["data.packing.enabled=false", "train.micro_batch_size=4"] if batch == "padded" else []
    config = recipe(*SHARDED_OR_NOT[spread], *padded)
    theirs = train_alone(ONE, config, 0)
    for ours in two_ranks(train_alone, config, working):
        assert (ours["loss"], ours["norm"]) == pytest.approx((theirs["loss"], theirs["norm"]), rel=TOLERANCE)
        assert gap(ours["state"], theirs["state"]) < TOLERANCE


@pytest.mark.parametrize("model", ["odd_folder", "renamed_folder"])
@pytest.mark.parametrize("spread", SHARDED_OR_NOT)
def test_training_of_models_that_split_unevenly_or_have_other_names(
    two_ranks: RankPool,
    recipe: Callable[..., RunConfig],
    request: pytest.FixtureRequest,
    model: str,
    spread: str,
) -> None:
    config = recipe(f"model.path={request.getfixturevalue(model)}", *SHARDED_OR_NOT[spread])
    theirs = reference(config)
    results = two_ranks(train, config)
    for ours in results:
        assert_same_training(ours, theirs)
    unlike = results[0]["local"] != results[1]["local"]
    assert unlike == (model == "odd_folder" and spread == "sharded")


def initial(ranks: Ranks, config: RunConfig) -> dict[str, Tensor]:
    return whole(TorchBackend(config, ranks))


@pytest.mark.parametrize("tied", ["false", "true"])
@pytest.mark.parametrize("spread", SHARDED_OR_NOT)
def test_fresh_weights_are_bit_for_bit_those_of_one_rank(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], odd_folder: Path, spread: str, tied: str
) -> None:
    overrides = [f"model.path={odd_folder}", "model.init=random", "run.seed=3", *SHARDED_OR_NOT[spread]]
    config = recipe(*overrides, f"model.config_overrides={{tie_word_embeddings: {tied}}}")
    expected = initial(ONE, config)
    assert ("lm_head.weight" in expected) == (tied == "false")
    for ours in two_ranks(initial, config):
        assert same(ours, expected)
    first, second = (expected[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    other = initial(ONE, recipe(*overrides[:2], "run.seed=4", "model.config_overrides={}"))
    assert not torch.equal(other["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])


class NotedSlice:
    """Rows of a weight; notes how many were read."""

    def __init__(self, name: str, slices: Any, rows: dict[str, int]) -> None:
        self.name, self.slices, self.rows = name, slices, rows

    def get_shape(self) -> list[int]:
        return list(self.slices.get_shape())

    def __getitem__(self, place: slice) -> Tensor:
        found: Tensor = self.slices[place]
        self.rows[self.name] = self.rows.get(self.name, 0) + len(found)
        return found


class NotedFile:
    """A safetensors file whose weights can be read by rows alone."""

    def __init__(self, file: Any, rows: dict[str, int]) -> None:
        self.file, self.rows = file, rows

    def keys(self) -> Any:
        return self.file.keys()

    def get_slice(self, name: str) -> NotedSlice:
        return NotedSlice(name, self.file.get_slice(name), self.rows)


def streamed(ranks: Ranks, config: RunConfig) -> tuple[dict[str, Tensor], dict[str, int], dict[str, int]]:
    """Return the initial weights, the rows of each that this rank read, and those that it holds."""

    def refuse(*args: Any) -> Any:
        raise AssertionError("the model was loaded whole")

    rows: dict[str, int] = {}
    opened = hf_model.safe_open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_model, "load", refuse)
        patch.setattr(hf_model, "safe_open", lambda *args: NotedFile(opened(*args), rows))
        backend = TorchBackend(config, ranks)
    held = {name: len(p) for name, p in backend.weights.master.items() if len(p)}
    return whole(backend), rows, held


@pytest.mark.parametrize("model", ["model_folder", "odd_folder", "tied_bfloat16_folder"])
def test_pretrained_weights_are_read_by_rows_and_bit_for_bit_those_of_from_pretrained(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], request: pytest.FixtureRequest, model: str
) -> None:
    folder = request.getfixturevalue(model)
    expected = from_pretrained(folder)
    results = two_ranks(streamed, recipe(f"model.path={folder}"))
    for ours, rows, held in results:
        assert same(ours, expected)
        assert rows == held
    together = {name: sum(rows.get(name, 0) for _, rows, _ in results) for name in expected}
    assert together == {name: len(w) for name, w in expected.items()}
    if model == "odd_folder":
        assert [rows["lm_head.weight"] for _, rows, _ in results] == [133, 132]


def from_pretrained(folder: Path) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    lm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: p.detach() for name, p in lm.named_parameters()}


def initial_and_loads(ranks: Ranks, config: RunConfig) -> tuple[dict[str, Tensor], int]:
    loads = []
    load = hf_model.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_model, "load", lambda *args: loads.append(args) or load(*args))
        return initial(ranks, config), len(loads)


def test_weights_of_other_names_are_converted_as_transformers_does(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], renamed_folder: Path
) -> None:
    expected = from_pretrained(renamed_folder)
    for ours, loads in two_ranks(initial_and_loads, recipe(f"model.path={renamed_folder}")):
        assert same(ours, expected) and loads == 1


def buffers(ranks: Ranks, config: RunConfig) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in TorchBackend(config, ranks).lm.named_buffers()}


def test_buffers_that_are_saved_with_the_weights_are_read_too(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], buffer_folder: Path
) -> None:
    config = recipe(f"model.path={buffer_folder}")
    expected = buffers(ONE, config)
    assert any(name.endswith("e_score_correction_bias") and b.all() for name, b in expected.items())
    for ours in two_ranks(buffers, config):
        assert same(ours, expected)


def test_tying_a_folder_that_has_an_output_layer_of_its_own_is_refused_on_one_rank_and_on_two(
    two_ranks: RankPool, recipe: Callable[..., RunConfig]
) -> None:
    config = recipe("model.config_overrides={tie_word_embeddings: true}")
    for said in (refused(ONE, config), *two_ranks(refused, config)):
        assert (
            said[0] == "UserError"
            and "ties lm_head.weight to other weights, and its files hold others for it" in said[1]
        )


def refused(ranks: Ranks, config: RunConfig) -> tuple[str, str, int]:
    return raised(lambda: TorchBackend(config, ranks))


def test_weights_that_are_missing_or_of_another_shape_are_refused_on_every_rank(
    two_ranks: RankPool, recipe: Callable[..., RunConfig]
) -> None:
    config = recipe("model.config_overrides={intermediate_size: 96}")
    for kind, text, _ in two_ranks(refused, config):
        assert kind == "UserError" and "weights are missing or of another shape" in text


def test_a_shard_size_that_does_not_divide_the_ranks_is_refused_before_they_start(base: list[str]) -> None:
    ray = ["run.dir=x", "cluster=ray_local", "cluster.num_workers=2"]
    assert compose([*base, *ray, "backend.torch.shard_size=2"]).config.backend.torch.shard_size == 2
    with pytest.raises(UserError, match="backend.torch.shard_size=3 does not divide the 2 ranks"):
        compose([*base, *ray, "backend.torch.shard_size=3"])


@pytest.mark.parametrize("spread", SHARDED_OR_NOT)
def test_bfloat16_over_two_ranks_keeps_float32_weights_and_stays_near_float32(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], spread: str
) -> None:
    layout = ["data.packing.max_tokens=256", *SHARDED_OR_NOT[spread]]
    exact, rounded = reference(recipe(*layout)), reference(recipe(*layout, "model.dtype=bfloat16"))
    for ours in two_ranks(train, recipe(*layout, "model.dtype=bfloat16")):
        assert ours["dtypes"] == {torch.float32} == {x.dtype for x in ours[4].values()}
        assert same(ours["initial"], exact["initial"])
        for theirs in (exact, rounded):
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=BF16_TOLERANCE)
            assert ours["norms"] == pytest.approx(theirs["norms"], rel=8 * BF16_TOLERANCE)
        assert ours["losses"] != exact["losses"]  # it is really computed in bfloat16
        moved = [{n: x - r["initial"][n[6:]] for n, x in part(r[4], "model/").items()} for r in (ours, exact)]
        assert gap(*moved) < 0.25


def test_bfloat16_sharded_equals_replicated(two_ranks: RankPool, recipe: Callable[..., RunConfig]) -> None:
    layout = ["data.packing.max_tokens=256", "model.dtype=bfloat16"]
    sharded, replicated = (two_ranks(train, recipe(*layout, *more)) for more in SHARDED_OR_NOT.values())
    for ours, theirs in zip(sharded, replicated, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=BF16_TOLERANCE)
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=BF16_TOLERANCE)
        assert gap(ours[4], theirs[4]) < BF16_TOLERANCE


def evaluated(ranks: Ranks, config: RunConfig, batch_size: int, steps: list[int]) -> tuple[float, list[int]]:
    loader = loader_of(config, ranks, val_batch_size=batch_size)
    batches = [b for step in steps for b in loader.step(step)]
    backend = TorchBackend(config, ranks)
    return float(backend.evaluate(batches, SFT()).loss), [b.num_tokens for b in batches]


@pytest.mark.parametrize("spread", SHARDED_OR_NOT)
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(("batch_size", "steps"), [(10, [0, 1, 2, 3]), (13, [3]), (13, [0, 3])])
def test_evaluation_equals_one_ranks_even_of_fewer_samples_than_ranks(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], spread: str, layout: str, batch_size: int, steps: list[int]
) -> None:
    """Step 3 of 13 conversations each holds the last one of the forty."""
    padded = ["data.packing.enabled=false", "train.micro_batch_size=2"] if layout == "padded" else []
    config = recipe(*SHARDED_OR_NOT[spread], *padded)
    loss, tokens = evaluated(ONE, config, batch_size, steps)
    results = two_ranks(evaluated, config, batch_size, steps)
    for ours, _ in results:
        assert ours == pytest.approx(loss, rel=TOLERANCE)
    assert sum(sum(own) for _, own in results) == sum(tokens)
    assert any(0 in own for _, own in results) == (batch_size == 13)


def seen_between_steps(ranks: Ranks, config: RunConfig) -> list[Any]:
    """Return validation losses and answers before and after steps large enough to change them."""
    backend, loader = TorchBackend(config, ranks), loader_of(config, ranks)
    val = loader_of(config, ranks, val_batch_size=10)
    seen: list[Any] = []
    for step in range(3):
        seen.append(float(backend.evaluate(val.step(0), SFT()).loss))
        backend.probe([loader.data[i] for i in range(3)])
        seen.append(backend.generate(CONVERSATIONS, 12))
        do_step(backend, loader, step, lr=2e-2)
        seen.append(float(backend.evaluate(val.step(1), SFT()).loss))
    return seen


@pytest.mark.parametrize(
    "layout",
    [
        [],
        ["backend.torch.shard_size=1"],
        ["backend.torch.reshard_after_forward=false"],
        ["model.recompute=full"],
        ["model.config_overrides={tie_word_embeddings: true}", "model.init=random"],
    ],
    ids=str,
)
def test_evaluation_probe_and_answers_between_steps_see_the_newest_weights(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], layout: list[str]
) -> None:
    config = recipe(*layout)
    theirs = seen_between_steps(ONE, config)
    losses = [x for x in theirs if isinstance(x, float)]
    assert len(set(losses)) == 6 and len({str(x) for x in theirs if isinstance(x, list)}) > 1
    for ours in two_ranks(seen_between_steps, config):
        assert [x for x in ours if isinstance(x, float)] == pytest.approx(losses, rel=TOLERANCE)
        assert [x for x in ours if isinstance(x, list)] == [x for x in theirs if isinstance(x, list)]


class Poison(SFT):
    """A loss that is not finite on one rank, or whose gradient is not."""

    def __init__(self, what: str) -> None:
        self.what = what

    def loss(self, logprobs_N: Tensor, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = super().loss(logprobs_N, targets)
        if self.what == "loss":
            loss = loss + float("inf")
        elif self.what == "gradient":
            loss = loss + (loss - loss.detach()).abs().sqrt()  # zero, with an infinite slope
        return loss, sums


def poisoned(ranks: Ranks, config: RunConfig, what: str) -> tuple[dict[str, Tensor], dict[str, Tensor], StepMetrics]:
    """Return the state before and after a step whose figures are not finite on the last rank."""
    backend, loader = TorchBackend(config, ranks), loader_of(config, ranks)
    do_step(backend, loader, 0)
    before = state_of(backend)
    objective = Poison(what if ranks.rank == ranks.size - 1 else "nothing")
    result = backend.train_step(loader.step(1), objective, 100.0, LR)
    return before, state_of(backend), result


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("spread", SHARDED_OR_NOT)
def test_a_step_that_is_not_finite_on_one_rank_alone_changes_nothing_on_any(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], spread: str, what: str
) -> None:
    for before, after, result in two_ranks(poisoned, recipe(*SHARDED_OR_NOT[spread]), what):
        assert result.loss.isfinite() == (what == "gradient")
        assert result.grad_norm is not None and result.grad_norm.isfinite() == (what == "loss")
        assert (before.pop("skipped"), after.pop("skipped")) == (0, 1)
        assert same(after, before)


def probed(ranks: Ranks, config: RunConfig) -> tuple[str, str, int]:
    backend, loader = TorchBackend(config, ranks), loader_of(config, ranks)
    wrong = reference_without_scale(backend)
    with wrong:
        return raised(lambda: backend.probe([loader.data[i] for i in range(3)]))


@contextmanager
def reference_without_scale(backend: TorchBackend) -> Iterator[None]:
    """Make the model scale its logits, which the fused loss does not know."""
    handle = backend.lm.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits * 1.5)
    yield
    handle.remove()


def test_probe_refuses_a_sharded_model_that_scales_its_logits(
    two_ranks: RankPool, recipe: Callable[..., RunConfig]
) -> None:
    for kind, text, code in two_ranks(probed, recipe()):
        assert kind == "UserError" and code == 2 and "differ from the model's own logits" in text


def saved(ranks: Ranks, config: RunConfig, folder: Path, num_steps: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """Train, lose a step, save; return the whole state and this rank's random state."""
    backend, loader = TorchBackend(config, ranks), loader_of(config, ranks)
    for step in range(num_steps):
        do_step(backend, loader, step)
    backend.train_step(loader.step(num_steps), SFT(), float("nan"), LR)
    torch.rand(5 + ranks.rank)
    state, random = state_of(backend), torch.get_rng_state()
    ranks.first(lambda: folder.mkdir(parents=True))
    backend.snapshot(copy=False)(folder)
    return state, random


def loaded(ranks: Ranks, config: RunConfig, folder: Path) -> tuple[dict[str, Tensor], Tensor, list[float]]:
    """Load into a backend that has gone elsewhere; return its state and the losses of two more steps."""
    backend, loader = TorchBackend(config, ranks), loader_of(config, ranks)
    do_step(backend, loader, 4, lr=1e-2)
    ranks.together(lambda: backend.load(folder))
    state, random = state_of(backend), torch.get_rng_state()
    return state, random, [float(do_step(backend, loader, step).loss) for step in (3, 4)]


@pytest.mark.parametrize(
    ("model", "more"), [("model_folder", ["model.dtype=bfloat16"]), ("odd_folder", [])], ids=["bfloat16", "uneven"]
)
def test_checkpoints_of_any_layout_load_in_any_other_bit_for_bit(
    two_ranks: RankPool,
    recipe: Callable[..., RunConfig],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    model: str,
    more: list[str],
) -> None:
    path = f"model.path={request.getfixturevalue(model)}"
    configs = {name: recipe(path, *more, *spread) for name, spread in SHARDED_OR_NOT.items()}
    random: dict[str, list[Tensor]] = {}
    states: dict[str, dict[str, Tensor]] = {}
    state, own = saved(ONE, configs["sharded"], tmp_path / "one")
    states["one"], random["one"] = state, [own]
    for name, config in configs.items():
        results = two_ranks(saved, config, tmp_path / name)
        assert same(results[0][0], results[1][0])
        states[name], random[name] = results[0][0], [r for _, r in results]
        assert not torch.equal(*random[name])
        assert len(list((tmp_path / name).glob("shard-*.safetensors"))) == 2
    for source, before in states.items():
        assert before["skipped"] == 1 and before["optimizer/step"] == 3
        targets = [("one", [loaded(ONE, configs["sharded"], tmp_path / source)])]
        targets += [(name, two_ranks(loaded, config, tmp_path / source)) for name, config in configs.items()]
        losses = targets[0][1][0][2]
        for target, results in targets:
            for rank, (after, drawn, next_losses) in enumerate(results):
                assert same(after, before), (source, target)
                if len(results) == len(random[source]):
                    assert torch.equal(drawn, random[source][rank])
                else:
                    assert not any(torch.equal(drawn, r) for r in random[source])
                assert next_losses == pytest.approx(losses, rel=BF16_TOLERANCE if more else TOLERANCE)
            if len(results) == 2:
                assert not torch.equal(results[0][1], results[1][1])


def test_checkpoint_of_two_ranks_is_float32_rows_of_each_parameter_once(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Whatever reads safetensors can put it together; all parts together have the size that was foretold."""
    from safetensors import safe_open

    config = recipe("model.dtype=bfloat16")
    (state, _), _ = two_ranks(saved, config, tmp_path / "saved")
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            places = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            for name in opened.keys():  # noqa: SIM118
                parts.setdefault(name, []).append((places[name]["saved_offsets"][0], opened.get_tensor(name)))
    assert {name for name in parts if name.startswith("rng/")} == {"rng/cpu/0", "rng/cpu/1"}
    joined = {n: torch.cat([x for _, x in sorted(p, key=lambda item: item[0])]) for n, p in parts.items()}
    assert same({n: x for n, x in joined.items() if not n.startswith("rng/")}, state)
    assert len(parts["model/lm_head.weight"]) == 2
    size = sum(x.nbytes for n, x in joined.items() if n.startswith(("model/", "exp_avg")))
    assert size == TorchBackend(config, ONE).checkpoint_bytes()


def exported(ranks: Ranks, config: RunConfig, folder: Path) -> dict[str, Tensor]:
    backend, loader = TorchBackend(config, ranks), loader_of(config, ranks)
    do_step(backend, loader, 0)
    ranks.first(lambda: folder.mkdir(parents=True))
    backend.export(folder if ranks.main else None)
    return whole(backend)


@pytest.mark.parametrize("tied", ["false", "true"])
def test_export_of_two_ranks_is_what_transformers_loads(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], tmp_path: Path, tied: str
) -> None:
    config = recipe("model.init=random", f"model.config_overrides={{tie_word_embeddings: {tied}}}")
    for weights in two_ranks(exported, config, tmp_path / "hf"):
        assert same(from_pretrained(tmp_path / "hf"), weights)


def copied(ranks: Ranks, config: RunConfig, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state when a snapshot was taken, and when it was written, some steps later."""
    backend, loader = TorchBackend(config, ranks), loader_of(config, ranks)
    do_step(backend, loader, 0)
    taken = state_of(backend)
    write = backend.snapshot(copy=True)
    for step in (1, 2):
        do_step(backend, loader, step)
    backend.train_step(loader.step(3), SFT(), float("nan"), LR)
    ranks.first(lambda: folder.mkdir(parents=True))
    write(folder)
    return taken, state_of(backend)


@pytest.mark.parametrize("more", [[], ["model.dtype=bfloat16"]], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spread", SHARDED_OR_NOT)
def test_a_copied_snapshot_is_of_the_time_it_was_taken(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], tmp_path: Path, spread: str, more: list[str]
) -> None:
    config = recipe(*SHARDED_OR_NOT[spread], *more)
    (taken, later), _ = two_ranks(copied, config, tmp_path / "saved")
    backend = TorchBackend(config, ONE)
    backend.load(tmp_path / "saved")
    assert same(state_of(backend), taken)
    assert not any(torch.equal(x, later[name]) for name, x in taken.items())


def load_refused(ranks: Ranks, config: RunConfig, folder: Path) -> tuple[str, str, int]:
    backend = TorchBackend(config, ranks)
    return raised(lambda: backend.load(folder))


@pytest.mark.parametrize("spread", SHARDED_OR_NOT)
@pytest.mark.parametrize("change", ["{num_hidden_layers: 1}", "{num_hidden_layers: 3}", "{intermediate_size: 65}"])
def test_a_checkpoint_of_another_model_is_refused_in_one_sentence_on_every_rank(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], tmp_path: Path, spread: str, change: str
) -> None:
    saved(ONE, recipe(), tmp_path / "saved", 1)
    config = recipe("model.init=random", f"model.config_overrides={change}", *SHARDED_OR_NOT[spread])
    for kind, text, code in two_ranks(load_refused, config, tmp_path / "saved"):
        assert kind == "UserError" and code == 2
        assert text.startswith(f"{tmp_path / 'saved'}: the checkpoint is of another model than {config.model.path}")
        assert "\n" not in text


def saved_at_once(ranks: Ranks, config: RunConfig, folder: Path) -> dict[str, Tensor]:
    """Save before the first step, and load it again."""
    backend = TorchBackend(config, ranks)
    ranks.first(lambda: folder.mkdir(parents=True))
    backend.snapshot(copy=False)(folder)
    weights, other = whole(backend), TorchBackend(config, ranks)
    for p in other.weights.master.values():
        p.data.zero_()
    other.load(folder)
    assert same(whole(other), weights)
    return state_of(other)


def test_a_checkpoint_before_the_first_step_can_be_loaded(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = recipe()
    alone = saved_at_once(ONE, config, tmp_path / "one")
    for state in two_ranks(saved_at_once, config, tmp_path / "two"):
        assert same(state, alone) and state["optimizer/step"] == 0


@pytest.mark.parametrize("damage", ["cut short", "one rank's part gone"])
def test_a_checkpoint_that_cannot_be_read_is_refused_in_one_sentence_on_every_rank(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], tmp_path: Path, damage: str
) -> None:
    config = recipe()
    two_ranks(saved, config, tmp_path / "saved", 1)
    file = sorted((tmp_path / "saved").glob("shard-*.safetensors"))[1]
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        file.unlink()
    for kind, text, _ in two_ranks(load_refused, config, tmp_path / "saved"):
        assert kind in ("RunError", "UserError") and text.startswith(str(tmp_path / "saved")) and "\n" not in text


def checkpoints_of(config: RunConfig, folder: Path, ranks: Ranks, *, async_save: bool) -> Checkpoints:
    section = config.checkpoint.model_copy(update={"async_save": async_save})
    return ranks.together(lambda: Checkpoints(folder, section, ranks))


def published(ranks: Ranks, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Save a step twice: at once, and while training goes on."""
    backend, loader = TorchBackend(config, ranks), loader_of(config, ranks)
    for step in range(2):
        do_step(backend, loader, step)
    at_once = checkpoints_of(config, folder / "at_once", ranks, async_save=False)
    meanwhile = checkpoints_of(config, folder / "meanwhile", ranks, async_save=True)
    state = TrainState(step=2, total_steps=9, val_loss=1.5)
    at_once.save(state, backend)
    first = at_once.finish(backend)
    meanwhile.save(state, backend)
    hidden = meanwhile.newest()
    state.step, state.val_loss = 3, None
    for step in range(2, 5):
        do_step(backend, loader, step)
    second = meanwhile.finish(backend)
    assert first is not None and second is not None and at_once.finish(backend) is None
    assert not meanwhile.busy
    ranks.together(lambda: checkpoint.check_whole(second[0], ranks))
    return {"folders": (first[0], second[0]), "hidden": hidden}


@pytest.mark.parametrize("spread", SHARDED_OR_NOT)
def test_a_checkpoint_written_while_training_goes_on_is_that_of_its_step(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], tmp_path: Path, spread: str
) -> None:
    for result in two_ranks(published, recipe(*SHARDED_OR_NOT[spread]), tmp_path):
        first, second = (contents_of(folder) for folder in result["folders"])
        assert result["hidden"] is None
        assert first == second and len([n for n in first if n.startswith("shard-")]) == 2
        assert {"manifest.json", "state.json", "config.json", "tokenizer.json"} <= first.keys()
        state = json.loads(first["state.json"])
        assert state["step"] == 2 and state["val_loss"] == 1.5
        assert not list(tmp_path.rglob(".partial-*"))


def folder_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def contents_of(folder: Path) -> dict[str, Any]:
    """Return what the files hold; a safetensors header has an order of its own each time, and with it a checksum."""
    from safetensors import safe_open

    contents: dict[str, Any] = dict(folder_of(folder))
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            tensors = {n: (opened.get_tensor(n).tobytes(), opened.get_slice(n).get_shape()) for n in opened.keys()}  # noqa: SIM118
            contents[file.name] = (json.loads(opened.metadata()["DCP_SHARDING_INFO"]), tensors)
    contents["manifest.json"] = {name: size for name, (size, _) in json.loads(contents["manifest.json"]).items()}
    return contents


def full_disk(ranks: Ranks, config: RunConfig, folder: Path, who: int, where: str, async_save: bool) -> dict[str, Any]:
    """Save step 1; let one rank find no space at step 2; save step 3 once there is."""
    backend, loader = TorchBackend(config, ranks), loader_of(config, ranks)
    checkpoints = checkpoints_of(config, folder, ranks, async_save=async_save)
    do_step(backend, loader, 0)
    checkpoints.save(TrainState(step=1), backend)
    checkpoints.finish(backend)
    before = folder_of(folder / "step_00000001")

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == who:
            owners = {
                "write_data": shards.HuggingFaceStorageWriter,
                "write_description": hf_model,
                "publish": checkpoint,
            }
            patch.setattr(owners[where], where, fail)
        checkpoints.save(TrainState(step=2), backend)
        do_step(backend, loader, 1)
        error = raised(lambda: checkpoints.finish(backend))
    ranks.gather(None)  # the first rank has cleared away what there was
    left = sorted(p.name for p in folder.iterdir())
    untouched = folder_of(folder / "step_00000001") == before
    ranks.gather(None)
    checkpoints.save(TrainState(step=3), backend)
    checkpoints.finish(backend)
    return {"error": error, "left": left, "untouched": untouched, "newest": checkpoints.newest()}


@pytest.mark.parametrize("async_save", [False, True], ids=["at once", "meanwhile"])
@pytest.mark.parametrize(
    ("who", "where"), [(1, "write_data"), (0, "write_data"), (0, "write_description"), (0, "publish")]
)
def test_a_disk_full_for_one_rank_ends_all_and_leaves_earlier_checkpoints(
    two_ranks: RankPool, recipe: Callable[..., RunConfig], tmp_path: Path, who: int, where: str, async_save: bool
) -> None:
    results = two_ranks(full_disk, recipe(), tmp_path / "checkpoints", who, where, async_save)
    for rank, result in enumerate(results):
        kind, text, code = result["error"]
        assert code == EXIT_ERROR
        if where != "write_data" and rank != who:
            assert kind == "PeerFailed" and not text  # the rank that wrote alone says it
        else:
            assert kind == "RunError" and "the disk is full, and the checkpoint of step 2" in text
            assert text.endswith("which goes on from step_00000001.")
        assert result["left"] == ["step_00000001"] and result["untouched"]
        assert result["newest"] == tmp_path / "checkpoints" / "step_00000003"


def exchange(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Do all that ranks can do together."""

    def once() -> str:
        (folder / f"by_{ranks.rank}").write_text("")
        return f"rank {ranks.rank}"

    def fail(*who: int, error: Exception) -> Callable[[], int]:
        def work() -> int:
            if ranks.rank in who:
                raise error
            return ranks.rank

        return work

    def answer(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:
            return type(error).__name__, str(error), getattr(error, "exit_code", None)

    def gathered_by(work: Callable[[], Any]) -> list[Any]:
        sent: list[Any] = []
        gather = dist.all_gather_object
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                dist, "all_gather_object", lambda to, value, **more: (sent.append(value), gather(to, value, **more))
            )
            assert work() == "a great deal"
        return sent

    own = ranks.rank
    if ranks.main and ranks.size > 1:
        dist.distributed_c10d._get_default_store().delete_key("anneal/failures")
    ranks.gather(None)
    return {
        "sum": ranks.sum([own + 1.0, 0.5, 2.0**53]),
        "max": ranks.max([float(own), -float(own), 7.0]),
        "gather": ranks.gather({"rank": own}),
        "first": ranks.first(once),
        "gathered by first": gathered_by(lambda: ranks.first(lambda: "a great deal")),
        "together": ranks.together(lambda: own),
        "one fails": answer(lambda: ranks.together(fail(1, error=UserError("mine")))),
        "first fails": answer(lambda: ranks.first(fail(0, error=RunError("mine")))),
        "a bug": answer(lambda: ranks.together(fail(1, error=KeyError("mine")))),
        "both fail": answer(lambda: ranks.together(fail(0, 1, error=RunError(f"of {own}")))),
        "after": ranks.together(lambda: own),
        "blame": [ranks.blame() for _ in range(2)],
        "main": ranks.main,
    }


def test_what_ranks_exchange_and_how_they_fail_together(two_ranks: RankPool, tmp_path: Path) -> None:
    results = two_ranks(exchange, tmp_path)
    for rank, found in enumerate(results):
        assert found["sum"] == [3.0, 1.0, 2.0**54] and found["max"] == [1.0, 0.0, 7.0]
        assert found["gather"] == [{"rank": 0}, {"rank": 1}] and found["first"] == "rank 0"
        assert found["together"] == found["after"] == rank and found["main"] == (rank == 0)
        assert found["both fail"] == ("RunError", f"of {rank}", 1)
    assert [r["gathered by first"] for r in results] == [[None], [None]]  # the result goes one way: from the first
    assert [p.name for p in tmp_path.iterdir()] == ["by_0"]
    assert [r["one fails"] for r in results] == [("PeerFailed", "", 2), ("UserError", "mine", 2)]
    assert [r["first fails"] for r in results] == [("RunError", "mine", 1), ("PeerFailed", "", 1)]
    assert [r["a bug"] for r in results] == [("PeerFailed", "", 1), ("KeyError", "'mine'", None)]
    blamed = [blame for r in results for blame in r["blame"]]
    assert blamed.count(True) == 1 and (results[0]["blame"][0] or results[1]["blame"][0])


def test_one_rank_exchanges_with_itself(tmp_path: Path) -> None:
    found = exchange(ONE, tmp_path)
    assert found["sum"] == [1.0, 0.5, 2.0**53] and found["max"] == [0.0, 0.0, 7.0] and found["gather"] == [{"rank": 0}]
    assert found["first"] == "rank 0" and found["together"] == found["one fails"] == 0
    assert found["both fail"] == ("RunError", "of 0", 1) and found["blame"] == [True, True] and found["main"]
    assert issubclass(PeerFailed, RunError)


def fails_on_one(ranks: Ranks, how: str) -> int:
    if ranks.rank == 1 and how == "raises":
        raise ValueError("on purpose")
    if ranks.rank == 1 and how == "dies":
        import os

        os._exit(3)
    return int(ranks.sum([1.0])[0])


@pytest.mark.parametrize(("how", "text"), [("raises", "ValueError: on purpose"), ("dies", "its process is gone")])
def test_the_pool_of_these_tests_reports_a_failure_and_leaves_no_process(how: str, text: str) -> None:
    pool = RankPool(2)
    assert pool(fails_on_one, "nothing") == [2, 2]
    processes = [process for process, _ in pool._ranks]
    with pytest.raises(RuntimeError, match=f"rank 1 of 2: (.|\n)*{text}"):
        pool(fails_on_one, how)
    assert not any(process.is_alive() for process in processes)


def over_four(ranks: Ranks, configs: dict[str, RunConfig], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: train(ranks, config, 2) for name, config in configs.items()}
    found["saved"] = {name: saved(ranks, config, folder / name, 2)[0] for name, config in configs.items()}
    return found


def test_four_ranks_in_two_pairs_equal_one_rank(
    recipe: Callable[..., RunConfig], odd_folder: Path, tmp_path: Path
) -> None:
    """HSDP, two copies of two shards each; and four shards of parameters that have two rows. Their checkpoints load on one."""
    path = f"model.path={odd_folder}"
    configs = {"pairs": recipe("backend.torch.shard_size=2"), "two rows for four": recipe(path)}
    pool = RankPool(4)
    try:
        results = pool(over_four, configs, tmp_path)
    finally:
        pool.close()
    for found in results:
        for name, config in configs.items():
            assert_same_training(found[name], reference(config, 2))
    assert [r["pairs"]["local"] * 2 for r in results] == [reference(configs["pairs"], 2)["local"]] * 4
    for name, config in configs.items():
        state, _, _ = loaded(ONE, config, tmp_path / name)
        assert all(same(state, found["saved"][name]) for found in results)


def test_tolerances_would_notice_a_mean_instead_of_a_sum(recipe: Callable[..., RunConfig]) -> None:
    """The comparison itself: half the gradients, or those of one micro-batch less, are far outside."""
    theirs = reference(recipe())
    ours = {**theirs, 0: {n: x * 0.5 if n.startswith("exp_avg/") else x for n, x in theirs[0].items()}}
    assert_same_training(theirs, theirs)
    with pytest.raises(AssertionError):
        assert_same_training(ours, theirs)
