"""LoRA from recipe to folders: adapters alone are trained, saved and merged, with the figures of plain peft."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import engine
from engine import flops
from engine.backends import lora
from engine.backends.torch_backend import TorchBackend
from engine.config.compose import compose
from engine.config.schema import RunConfig
from engine.data.assemble import assemble
from engine.data.batch import collate_packed
from engine.data.loader import train_loader
from engine.errors import UserError
from engine.export import export
from engine.export import main as export_main
from engine.generate import main as generate_main
from engine.ranks import Ranks
from engine.schedule import learning_rate
from engine.worker import remedy
from kernels import linear_objective, reference
from tests.conftest import read_metrics

LORA = ["model.lora.enabled=true", "model.lora.rank=4", "model.lora.alpha=16", "optimizer.lr=1e-2"]
ALL_LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
STEPS = 4


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pairs of many lengths."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"question {i} {'why ' * (i % 6)}?", "chosen": f"yes {'so ' * (i % 5)}", "rejected": f"no {i % 10}"}
        for i in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def words(base: list[str], pairs_file: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """Overrides of a small run of an algorithm, without LoRA; add run.dir."""

    def of(algorithm: str) -> list[str]:
        if algorithm == "sft":
            return [*base, f"data.cache_dir={tmp_path / 'cache'}"]
        kept = [o for o in base if not o.startswith(("data=", "data.train_path"))]
        data = ["data=binary_preference", f"data.train_path={pairs_file}", f"data.cache_dir={tmp_path / 'cache'}"]
        return ["algorithm=dpo", *data, *kept, "algorithm.reference_policy_kl_penalty=0.1"]

    return of


def run(overrides: list[str], folder: Path, *more: str) -> list[float]:
    assert engine.run([*overrides, f"run.dir={folder}", *more]) == 0
    return [m["train/loss"] for m in read_metrics(folder)]


def config_of(overrides: list[str], folder: Path, *more: str) -> RunConfig:
    return compose([*overrides, f"run.dir={folder}", *more]).config


def loader_of(config: RunConfig, folder: Path, together: int = 1) -> Any:
    data = assemble(config, folder, lambda text: None).train
    return train_loader(data, config.data, batch_size=8, micro_batch_size=1, seed=0, together=together)


def do_step(backend: TorchBackend, loader: Any, step: int = 0) -> Any:
    from engine.objectives.sft import SFT

    batches = loader.step(step)
    return backend.train_step(batches, SFT(), sum(SFT().units(b.targets) for b in batches), 1e-2)


def logits(lm: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return lm.eval()(input_ids=ids).logits


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_the_first_loss_is_that_of_the_whole_model(words: Any, tmp_path: Path, algorithm: str) -> None:
    whole = run(words(algorithm), tmp_path / "whole", "algorithm.max_num_steps=1")
    ours = run([*words(algorithm), *LORA], tmp_path / "lora")
    assert ours[0] == whole[0]
    assert ours[-1] < ours[0]
    if algorithm == "dpo":
        assert ours[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_ten_steps_equal_plain_peft(words: Any, tmp_path: Path, algorithm: str) -> None:
    """One document at a time, full logits, peft's own model; DPO's reference is peft's model with its adapter off."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    overrides = [*words(algorithm), *LORA, "algorithm.max_num_steps=10", "optimizer.weight_decay=0.1"]
    ours = run(overrides, tmp_path / "run")
    config = config_of(overrides, tmp_path / "plain")
    loader = loader_of(config, tmp_path, 2 if algorithm == "dpo" else 1)
    data = loader.data
    lm = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(lm, LoraConfig(r=4, lora_alpha=16, target_modules=ALL_LINEAR))
    first = {f"base_model.model.{n}": p for n, p in TorchBackend(config, Ranks()).weights.whole(frozen=False)}
    assert not set_peft_model_state_dict(model, first).unexpected_keys
    trained = [p for p in model.parameters() if p.requires_grad]
    o = config.optimizer
    adamw = torch.optim.AdamW(trained, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)

    def taken(document: int) -> Tensor:
        sample = data[document]
        ids = torch.tensor(sample.input_ids.astype(np.int64))[None]
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return torch.cat([logprobs[a - 1 : b - 1] for a, b in sample.trained.tolist()])

    def sft(step: int) -> Tensor:
        found = torch.cat([taken(int(document)) for document in loader.documents(step)])
        return -found.sum() / len(found)

    def dpo(step: int) -> Tensor:
        total = torch.zeros(())
        for chosen, rejected in loader.documents(step).reshape(-1, 2).tolist():
            with torch.no_grad(), model.disable_adapter():
                held = taken(chosen).sum() - taken(rejected).sum()
            margin = taken(chosen).sum() - taken(rejected).sum() - held
            total = total - torch.nn.functional.logsigmoid(0.1 * margin)
        return total / 8

    plain = []
    for step in range(10):
        loss = {"sft": sft, "dpo": dpo}[algorithm](step)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
        adamw.param_groups[0]["lr"] = learning_rate(step + 1, 10, o.lr, config.scheduler)
        adamw.step()
        plain.append(float(loss.detach()))
    assert ours == pytest.approx(plain, rel=1e-5)
    assert ours[-1] < 0.98 * ours[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_alone_change_and_have_gradients_moments_and_float32(words: Any, tmp_path: Path, dtype: str) -> None:
    config = config_of([*words("sft"), *LORA, f"model.dtype={dtype}"], tmp_path / "run")
    backend = TorchBackend(config, Ranks())
    before = {n: p.detach().clone() for n, p in backend.weights.whole()}
    held: list[Tensor] = []
    for name, p in backend.lm.named_parameters():
        assert p.dtype == getattr(torch, dtype) and p.requires_grad == (".lora_" in name)
        if p.requires_grad:
            p.register_hook(held.append)
    loader = loader_of(config, tmp_path)
    for step in range(2):  # A has no gradient while B is zero
        do_step(backend, loader, step)
    after = dict(backend.weights.whole())
    adapters = {n for n in before if ".lora_" in n}
    assert len(adapters) == len(held) // len(loader.step(0)) // 2 == 2 * 7 * 2
    assert backend.weights.master.keys() == adapters and len(backend.optimizer.state) == len(adapters)
    for name, x in before.items():
        assert torch.equal(x, after[name]) == (name not in adapters)
        assert after[name].dtype == (torch.float32 if name in adapters else getattr(torch, dtype))
    assert all(p.grad is None for p in backend.lm.parameters())
    full = TorchBackend(config_of([*words("sft"), f"model.dtype={dtype}"], tmp_path / "run"), Ranks())
    assert same(
        {n: x for n, x in before.items() if n not in adapters},
        {n: p.detach().to(getattr(torch, dtype)) for n, p in full.weights.whole()},
    )


@pytest.mark.parametrize("way", ["_LinearObjective", "_LinearOutputs"])
def test_the_frozen_output_matrix_has_no_gradient_computed(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Neither where the gradients come out of the forward pass nor where the logits are computed again."""
    made: list[str] = []
    plain = linear_objective._add_weight_grad

    def noted(out_VH: Tensor, *args: Any, **options: Any) -> None:
        made.append("weight")
        plain(out_VH, *args, **options)

    backward = getattr(linear_objective, way).backward
    monkeypatch.setattr(linear_objective, "_add_weight_grad", noted)
    monkeypatch.setattr(
        getattr(linear_objective, way), "backward", staticmethod(lambda ctx, *x: made.append(way) or backward(ctx, *x))
    )
    if way == "_LinearOutputs":
        monkeypatch.setattr(linear_objective, "chunk_edges", lambda bounds, rows: None)
    config = config_of(words("sft"), tmp_path / "run")
    do_step(TorchBackend(config, Ranks()), loader_of(config, tmp_path))
    assert {"weight", way} == set(made)
    made.clear()
    do_step(TorchBackend(config_of([*words("sft"), *LORA], tmp_path / "run"), Ranks()), loader_of(config, tmp_path))
    assert set(made) == {way}


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_every_layout_has_the_same_losses(words: Any, tmp_path: Path, algorithm: str) -> None:
    overrides = [*words(algorithm), *LORA]
    packed = run(overrides, tmp_path / "packed")
    layouts = {
        "narrow": ["data.max_length=192", "data.packing.max_tokens=384"],
        "padded": ["data.packing.enabled=false", "train.micro_batch_size=4"],
        "recomputed": ["model.recompute=full"],
    }
    for name, more in layouts.items():
        assert run(overrides, tmp_path / name, *more) == pytest.approx(packed, rel=1e-5), name


def test_compiled_layers_give_the_same_losses(words: Any, tmp_path: Path) -> None:
    few = ["model.config_overrides={num_hidden_layers: 1}", "model.lora.target_modules=[q_proj, up_proj]"]
    found = []
    for more in ([], ["model.compile=true"]):
        backend = TorchBackend(config_of([*words("sft"), *LORA, *few, *more], tmp_path / "run"), Ranks())
        loader = loader_of(backend.config, tmp_path)
        found.append([float(do_step(backend, loader, step).loss) for step in range(3)])
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[0][2] != found[0][0]


def test_the_reference_is_the_base_and_shared_with_full_fine_tuning(words: Any, tmp_path: Path) -> None:
    """The same key and the same figures bit for bit, before training, after it, and on a run that goes on."""
    run(words("dpo"), tmp_path / "whole")
    run([*words("dpo"), *LORA], tmp_path / "lora")
    assert "log-probabilities of train are there" in (tmp_path / "lora" / "log.txt").read_text()
    config = config_of([*words("dpo"), *LORA], tmp_path / "lora")
    data = loader_of(config, tmp_path, 2).data
    batch = collate_packed([data[i] for i in range(6)])
    full = TorchBackend(config_of(words("dpo"), tmp_path / "lora"), Ranks()).sequence_logprobs(batch)
    backend = TorchBackend(config, Ranks())
    assert torch.equal(backend.sequence_logprobs(batch), full)
    backend.load(tmp_path / "lora" / "checkpoints" / f"step_{STEPS:08d}")
    with torch.no_grad():
        policy = reference.sums_by_group(backend.root.logprobs(batch), batch.targets.bounds)
    assert float((policy - full).abs().max()) > 0.1
    assert torch.equal(backend.sequence_logprobs(batch), full)
    with torch.no_grad():
        again = reference.sums_by_group(backend.root.logprobs(batch), batch.targets.bounds)
    assert torch.equal(again, policy)


def test_a_resumed_run_is_the_undisturbed_one(words: Any, tmp_path: Path) -> None:
    overrides = [*words("sft"), *LORA, "model.lora.dropout=0.2", "scheduler=constant", "scheduler.warmup_steps=0"]
    whole = run(overrides, tmp_path / "whole")
    run(overrides, tmp_path / "half", "algorithm.max_num_steps=2")
    assert run(overrides, tmp_path / "half") == whole
    for name in ("hf/model.safetensors", "adapter/adapter_model.safetensors"):
        assert same(load_file(tmp_path / "half" / name), load_file(tmp_path / "whole" / name))
    assert run(overrides, tmp_path / "without", "model.lora.dropout=0.0")[1] != whole[1]


def test_a_checkpoint_holds_adapters_alone(words: Any, tmp_path: Path) -> None:
    overrides = [*words("sft"), *LORA]
    run(overrides, tmp_path / "run", "algorithm.max_num_steps=1")
    (file,) = (tmp_path / "run" / "checkpoints" / "step_00000001").glob("*.safetensors")
    held = load_file(file)
    kinds = {name for name in held if name.startswith(("model/", "exp_avg/", "exp_avg_sq/"))}
    assert all(".lora_" in name for name in kinds)
    assert held.keys() - kinds == {"skipped", "optimizer/step", "rng/cpu/0"}
    backend = TorchBackend(config_of(overrides, tmp_path / "run"), Ranks())
    assert backend.checkpoint_bytes() == sum(held[name].nbytes for name in kinds)
    full = TorchBackend(config_of(words("sft"), tmp_path / "run"), Ranks())
    assert backend.checkpoint_bytes() < 0.3 * full.checkpoint_bytes()


def test_adapter_merged_model_and_trained_model_have_the_same_logits(words: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = config_of([*words("sft"), *LORA], tmp_path / "run")
    run([*words("sft"), *LORA], tmp_path / "run")
    ids = torch.randint(0, 256, (2, 40))
    load = AutoModelForCausalLM.from_pretrained
    whole = load(tmp_path / "run" / "hf", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(load(config.model.path, dtype=torch.float32), tmp_path / "run" / "adapter")
    backend = TorchBackend(config, Ranks())
    backend.load(tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}")
    backend.lm.set_attn_implementation("sdpa")
    trained = logits(backend.lm, ids)
    torch.testing.assert_close(logits(whole, ids), trained, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(adapted, ids), trained, rtol=1e-5, atol=1e-5)
    assert float((logits(load(config.model.path, dtype=torch.float32), ids) - trained).abs().max()) > 1e-2
    described = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == config.model.path
    assert (described["r"], described["lora_alpha"], described["target_modules"]) == (4, 16, ALL_LINEAR)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").chat_template
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_of_a_checkpoint_is_what_the_run_wrote(
    words: Any, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    shutil.copytree(model_folder, tmp_path / "base")
    folder, words_of = (
        tmp_path / "run",
        [*words("sft"), *LORA, f"model.path={tmp_path / 'base'}", f"model.dtype={dtype}"],
    )
    run(words_of, folder)
    for name, options in {"hf": {}, "adapter": {"adapter": True}}.items():
        export(folder, tmp_path / name, **options)
        files = {file.name for file in (folder / name).iterdir()}
        assert files == {file.name for file in (tmp_path / name).iterdir()} and len(files) > 4
        for file in files:
            assert (tmp_path / name / file).read_bytes() == (folder / name / file).read_bytes(), file
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"belong to .*base, where there is no model; say where it is with --base DIR"):
        export(folder, tmp_path / "none")
    export(folder, tmp_path / "again", base=str(tmp_path / "moved"))
    assert same(load_file(tmp_path / "again" / "model.safetensors"), load_file(folder / "hf" / "model.safetensors"))
    export(folder, tmp_path / "alone", adapter=True)
    other = tmp_path / "again"
    with pytest.raises(UserError, match="are not those that its adapters were trained on"):
        export(folder, tmp_path / "none", base=str(other))
    assert not (tmp_path / "none").exists()
    run(words("sft"), tmp_path / "whole", "algorithm.max_num_steps=1")
    arguments = ["--checkpoint", str(tmp_path / "whole"), "--out", str(tmp_path / "none"), "--adapter"]
    assert export_main(arguments) == 2
    assert "holds no LoRA adapters but a whole model; leave it out." in capsys.readouterr().err


def test_adapters_may_be_all_that_is_left(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, folder = [*words("sft"), *LORA, "model.lora.merge=false", "checkpoint.hf_period=2"], tmp_path / "run"
    run(overrides, folder)
    assert not (folder / "hf").exists() and not (folder / "hf_steps").exists()
    assert {f.name for f in (folder / "adapter_steps").iterdir()} == {"step_00000002", "step_00000004"}
    last = folder / "adapter_steps" / "step_00000004" / "adapter_model.safetensors"
    assert same(load_file(last), load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert f"weights in {folder / 'adapter'}" in (folder / "log.txt").read_text()
    assert engine.run([*overrides, f"run.dir={folder}"]) == 0
    assert f"already finished: {STEPS} steps; weights in {folder / 'adapter'}" in (folder / "log.txt").read_text()
    capsys.readouterr()
    ask = ["--prompt", "hello", "--max-new-tokens", "4"]
    assert generate_main(["--model", str(folder / "adapter"), *ask]) == 0
    answer = capsys.readouterr().out
    export(folder, tmp_path / "merged")
    assert generate_main(["--model", str(tmp_path / "merged"), *ask]) == 0
    assert capsys.readouterr().out == answer
    assert generate_main(["--model", str(folder / "hf"), *ask]) == 2
    assert f"{folder / 'adapter'} does" in capsys.readouterr().err
    for path in (folder / "adapter", folder / "hf"):
        with pytest.raises(UserError, match=r"holds LoRA adapters and no model; give .* python -m engine.export"):
            compose([*words("sft"), f"model.path={path}", f"run.dir={tmp_path / 'next'}"])


def test_both_folders_are_written_along_the_way(words: Any, tmp_path: Path) -> None:
    run([*words("sft"), *LORA, "checkpoint.hf_period=2"], tmp_path / "run")
    for name, file in {"hf": "model.safetensors", "adapter": "adapter_model.safetensors"}.items():
        last, final = (tmp_path / "run" / place / file for place in (f"{name}_steps/step_00000004", name))
        assert same(load_file(last), load_file(final))
    assert run(words("sft"), tmp_path / "next", f"model.path={tmp_path / 'run' / 'hf'}")[0] > 0


@pytest.mark.parametrize("tied", ["false", "true"])
def test_fresh_weights_are_those_of_full_fine_tuning_and_are_drawn_again_for_export(
    words: Any, tmp_path: Path, tied: str
) -> None:
    fresh = ["model.init=random", f"model.config_overrides={{tie_word_embeddings: {tied}}}", "run.seed=3"]
    config = config_of([*words("sft"), *fresh, *LORA], tmp_path / "run")
    full = TorchBackend(config_of([*words("sft"), *fresh], tmp_path / "run"), Ranks())
    base = {n: p.detach() for n, p in TorchBackend(config, Ranks()).weights.whole() if ".lora_" not in n}
    assert same(base, {n: p.detach() for n, p in full.weights.whole()})
    run([*words("sft"), *fresh, *LORA], tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()  # no file holds its base
    export(tmp_path / "run", tmp_path / "out")
    assert same(
        load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "run" / "hf" / "model.safetensors")
    )


def test_adapters_begin_as_peft_draws_them_from_streams_of_their_own(words: Any, tmp_path: Path) -> None:
    def first(*more: str) -> dict[str, Tensor]:
        backend = TorchBackend(config_of([*words("sft"), *LORA, *more], tmp_path / "run"), Ranks())
        return {n: p.detach() for n, p in backend.weights.whole(frozen=False)}

    drawn, fewer, other = first(), first("model.lora.target_modules=[layers.1.mlp.up_proj]"), first("run.seed=1")
    for name, x in drawn.items():
        assert x.shape[0 if ".lora_A." in name else 1] == 4
        bound = 1 / math.sqrt(x.shape[1])
        if ".lora_B." in name:
            assert not x.any()
        else:
            assert float(x.abs().max()) <= bound and float(x.std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
            assert not torch.equal(x, other[name])
    assert same(fewer, {n: x for n, x in drawn.items() if ".1.mlp.up_proj." in n}) and len(fewer) == 2
    assert len({x.sum().item() for n, x in drawn.items() if n.endswith("q_proj.lora_A.weight")}) == 2


def test_a_checkpoint_of_something_else_is_refused_in_a_sentence(words: Any, tmp_path: Path) -> None:
    sources = {"full": [], "lora": LORA}
    for name, more in sources.items():
        run([*words("sft"), *more], tmp_path / name, "algorithm.max_num_steps=1")

    def said(source: str, *more: str) -> str:
        backend = TorchBackend(config_of([*words("sft"), *more], tmp_path / "run"), Ranks())
        with pytest.raises(UserError) as caught:
            backend.load(tmp_path / source / "checkpoints" / "step_00000001")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds all weights of a model, and this run trains LoRA adapters; set model.lora.enabled=false" in said(
        "full", *LORA
    )
    assert "holds LoRA adapters, and this run trains all weights; set model.lora as in the run" in said("lora")
    layers = f"14 layers: {', '.join(ALL_LINEAR)}"
    assert f"other LoRA adapters (rank 4 on {layers}) than this run's (rank 8 on {layers})" in said(
        "lora", *LORA, "model.lora.rank=8"
    )
    assert "than this run's (rank 4 on 2 layers: q_proj); set model.lora" in said(
        "lora", *LORA, "model.lora.target_modules=[q_proj]"
    )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.lora.rank=0", "model.lora.rank"),
        ("model.lora.alpha=0", "model.lora.alpha"),
        ("model.lora.dropout=1.0", "model.lora.dropout"),
        ("model.lora.target_modules=[]", r"model.lora.target_modules is empty: name some layers, or set it to null"),
        ("model.lora_r=8", r"there is no key model.lora_r; here it is model.lora.rank"),
        ("model.lora_alpha=8", r"here it is model.lora.alpha"),
        ("model.lora.r=8", r"here it is model.lora.rank"),
        ("model.use_peft=true", r"here it is model.lora.enabled"),
    ],
)
def test_values_that_cannot_be_are_refused_with_the_recipe(
    words: Any, tmp_path: Path, override: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        compose([*words("sft"), override, f"run.dir={tmp_path / 'run'}"])


def test_adapters_alone_on_weights_that_no_file_holds_are_refused(words: Any, tmp_path: Path) -> None:
    given = [*words("sft"), *LORA, "model.init=random", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(
        UserError, match=r"merge=false leaves adapters alone, and model.init=random a base that no file"
    ):
        compose([*given, "model.lora.merge=false"])
    assert not compose([*words("sft"), "model.lora.rank=8", f"run.dir={tmp_path / 'run'}"]).config.model.lora.enabled


@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        ("[qproj]", f"has no module qproj; did you mean q_proj? It has {', '.join(ALL_LINEAR)}."),
        ("[Wqkv]", f"has no module Wqkv; it has {', '.join(ALL_LINEAR)}."),
        (
            "[q_proj,lm_head]",
            "lm_head is the output layer, of which the fused loss reads the matrix alone; take it out.",
        ),
        ("[embed_tokens]", "embed_tokens is the embedding, which is no linear layer; take it out."),
        ("[mlp]", f"mlp is a LlamaMLP, no linear layer; choose of {', '.join(ALL_LINEAR)}."),
    ],
)
def test_layers_that_cannot_have_adapters_are_refused_before_data_is_read(
    words: Any, tmp_path: Path, modules: str, sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        engine.run([*words("sft"), *LORA, f"model.lora.target_modules={modules}", f"run.dir={tmp_path / 'run'}"])
    assert sentence in str(caught.value)
    assert "data:" not in (tmp_path / "run" / "log.txt").read_text()


def test_experts_that_peft_takes_for_layers_are_refused(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, moe_intermediate_size=8, head_dim=4, vocab_size=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, num_experts=4)
    config = Qwen3MoeConfig(**sizes, **heads, num_experts_per_tok=2, decoder_sparse_step=2)
    section = compose(["model=tiny", "data=dummy", *LORA]).config.model
    attention = "[k_proj, o_proj, q_proj, v_proj]"
    with pytest.raises(UserError) as caught:
        lora.inject(section, Qwen3MoeForCausalLM(config), torch.float32)
    assert f"for one of its experts, which have no adapters here; set it to {attention}." in str(caught.value)
    chosen = section.lora.model_copy(update={"target_modules": attention.strip("[]").split(", ")})
    lm = Qwen3MoeForCausalLM(config)
    lora.inject(section.model_copy(update={"lora": chosen}), lm, torch.float32)
    assert len(lora.layers(lm)) == 8


def test_flops_with_a_frozen_base_against_what_torch_counts(words: Any, tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    backend = TorchBackend(config_of([*words("sft"), *LORA], tmp_path / "run"), Ranks())
    backend.lm.set_attn_implementation("eager")
    length = 64
    with FlopCounterMode(display=False) as counter:
        backend.lm(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False).logits.sum().backward()
    counts = {"num_tokens": length, "num_trained_tokens": length, "squared_lengths": 2 * length**2}
    expected = flops.train_flops(**counts, **backend.utilization._model)
    first = (
        2 * length * 32 * (32 + 16 + 16 + 3 * 4)
    )  # q, k, v of the first layer, and A: what they read asks for no gradient
    norms = 4 * length * 4 * 32  # negligible, but of so small a model
    assert counter.get_total_flops() == expected - first - norms
    shape = dict(layer_params=10, num_layers=2, num_heads=3, head_dim=4, hidden_size=5, vocab_size=7)
    counts = dict(num_tokens=10, num_trained_tokens=6, squared_lengths=52)
    found = flops.train_flops(**shape, frozen_layer_params=100, frozen_output=True, **counts)
    assert found == 600 + 4000 + 840 + 7488  # 6·10·10 + 4·100·10 + 4·7·5·6 + 6·2·3·4·52


def test_where_memory_ends_adapters_are_named(words: Any, tmp_path: Path) -> None:
    more = ["model.recompute=full", "data.packing.enabled=false"]
    said = remedy(config_of([*words("sft"), *more], tmp_path / "run"))
    assert said == "set data.max_length=128, or set model.lora.enabled=true, or train a smaller model"
    assert "lora" not in remedy(config_of([*words("sft"), *more, *LORA], tmp_path / "run"))


def test_probe_validation_and_answers_are_of_the_adapted_model(words: Any, rows_file: Path, tmp_path: Path) -> None:
    config = config_of([*words("sft"), *LORA], tmp_path / "run")
    validation = [f"data.val_path={rows_file}", "algorithm.val_at_start=true", "algorithm.val_at_end=true"]
    run([*words("sft"), *LORA], tmp_path / "run", *validation, "algorithm.max_num_steps=8")
    first, last = (m["validation/loss"] for m in read_metrics(tmp_path / "run", "validation/loss"))
    assert last < first
    backend = TorchBackend(config, Ranks())
    backend.load(tmp_path / "run" / "checkpoints" / "step_00000008")
    loader = loader_of(config, tmp_path)
    backend.probe([loader.data[i] for i in range(3)])
    asked = [[{"role": "user", "content": "question 3 why why ?"}]]
    whole = TorchBackend(config_of(words("sft"), tmp_path / "x", f"model.path={tmp_path / 'run' / 'hf'}"), Ranks())
    assert backend.generate(asked, 12) == whole.generate(asked, 12)
    fresh = TorchBackend(config_of(words("sft"), tmp_path / "x"), Ranks())
    assert backend.generate(asked, 12) != fresh.generate(asked, 12)
