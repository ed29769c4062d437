"""A step of the engine against plain PyTorch, and against itself in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from engine.backends.torch_backend import TorchBackend
from engine.config.compose import compose
from engine.config.schema import RunConfig
from engine.data.assemble import assemble
from engine.data.loader import Loader, train_loader
from engine.objectives.sft import SFT
from engine.ranks import Ranks
from tests.conftest import read_metrics

TOLERANCE = 1e-5


def config_of(base: list[str], tmp_path: Path, *more: str) -> RunConfig:
    return compose([*base, f"run.dir={tmp_path}", *more]).config


def loader_of(config: RunConfig, tmp_path: Path) -> Loader:
    return train_loader(
        assemble(config, tmp_path, lambda text: None).train,
        config.data,
        batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.run.seed,
    )


def gradients(config: RunConfig, loader: Loader, step: int = 0) -> tuple[float, dict[str, torch.Tensor], int]:
    """Return loss, gradients and number of micro-batches of one step, before clipping and update."""
    backend = TorchBackend(config, Ranks())
    objective, batches = SFT(), loader.step(step)
    units = sum(objective.units(b.targets) for b in batches)
    total = 0.0
    for batch in batches:
        loss, _ = backend.root(backend.root.loss, batch, objective)
        (loss / units).backward()
        total += float(loss.detach()) / units
    grads = {name: p.grad.clone() for name, p in backend.weights.master.items() if p.grad is not None}
    return total, grads, len(batches)


def plain_pytorch(config: RunConfig, loader: Loader, step: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """The same step as anyone would write it: one document at a time, full logits, cross-entropy over the trained tokens."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        config.model.path, dtype=torch.float32, attn_implementation="eager"
    )
    losses, count = [], 0
    for i in loader.plan.members(step).tolist():
        sample = loader.data[i]
        ids = torch.from_numpy(sample.input_ids.astype("int64"))
        labels = torch.full_like(ids, -100)
        for a, b in sample.trained.tolist():
            labels[a:b] = ids[a:b]
        logits = model(input_ids=ids[None]).logits[0]
        losses.append(F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
        count += int((labels[1:] != -100).sum())
    loss = torch.stack(losses).sum() / count
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(ours: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert ours[0] == pytest.approx(other[0], rel=TOLERANCE)
    assert ours[1].keys() == other[1].keys()
    norm = torch.stack([g.norm() for g in other[1].values()]).norm()
    for name, grad in ours[1].items():
        assert (grad - other[1][name]).norm() <= TOLERANCE * norm, name


@pytest.mark.parametrize(
    "layout",
    [
        ["data.packing.max_tokens=4096"],
        ["data.packing.max_tokens=256"],
        ["data.packing.enabled=false", "train.micro_batch_size=1"],
        ["data.packing.enabled=false", "train.micro_batch_size=4"],
        ["data.packing.enabled=false", "train.micro_batch_size=8"],
        ["model.recompute=full"],
        ["data.train_on=all"],
        ["data.train_on=last_assistant"],
    ],
    ids=lambda layout: " ".join(layout),
)
def test_step_equals_plain_pytorch(base: list[str], tmp_path: Path, layout: list[str]) -> None:
    config = config_of(base, tmp_path, *layout)
    loader = loader_of(config, tmp_path)
    assert_same(gradients(config, loader), plain_pytorch(config, loader))


def test_layouts_differ_in_micro_batches_alone(base: list[str], tmp_path: Path) -> None:
    """N×1 = 1×N, packed = padded; the layouts are really different ones."""
    results = {}
    for layout in (
        ["data.packing.max_tokens=4096"],
        ["data.packing.max_tokens=256"],
        ["data.packing.enabled=false", "train.micro_batch_size=1"],
        ["data.packing.enabled=false", "train.micro_batch_size=8"],
    ):
        config = config_of(base, tmp_path, *layout)
        results[tuple(layout)] = gradients(config, loader_of(config, tmp_path), step=1)
    counts = [r[2] for r in results.values()]
    assert counts[0] == 1 and counts[1] > 1 and counts[2:] == [8, 1]
    first = next(iter(results.values()))
    for other in results.values():
        assert_same(first, other)


def test_curve_equals_plain_pytorch(base: list[str], tmp_path: Path) -> None:
    """Ten steps with AdamW, clipping, decay and schedule against a loop written out with torch's own AdamW."""
    from transformers import AutoModelForCausalLM

    config = config_of(
        base,
        tmp_path,
        "optimizer.weight_decay=0.1",
        "train.max_grad_norm=0.5",
        "scheduler=cosine",
        "scheduler.warmup_ratio=0.2",
    )
    loader, objective = loader_of(config, tmp_path), SFT()
    backend = TorchBackend(config, Ranks())
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.model.path, dtype=torch.float32, attn_implementation="sdpa"
    )
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    others = [p for n, p in model.named_parameters() if "norm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (s + 1) / 2 if s < 2 else 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (s - 2) / 8)).item()),
    )
    from engine.schedule import learning_rate

    for step in range(10):
        batches = loader.step(step)
        lr = learning_rate(step + 1, 10, 1e-3, config.scheduler)
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        ours = backend.train_step(batches, objective, sum(objective.units(b.targets) for b in batches), lr)
        loss_sum, count = torch.zeros(()), 0
        for i in loader.plan.members(step).tolist():
            sample = loader.data[i]
            ids = torch.from_numpy(sample.input_ids.astype("int64"))[None]
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            for a, b in sample.trained.tolist():
                positions = torch.arange(max(a, 1), b)
                loss_sum = loss_sum - logprobs[positions - 1, ids[0, positions]].sum()
                count += len(positions)
        loss = loss_sum / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert ours.grad_norm is not None
        assert float(ours.loss) == pytest.approx(float(loss.detach()), rel=TOLERANCE)
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-4)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def test_bfloat16_keeps_float32_master_weights(base: list[str], tmp_path: Path) -> None:
    config = config_of(base, tmp_path, "model.dtype=bfloat16", "data.packing.max_tokens=256")
    loader, objective = loader_of(config, tmp_path), SFT()
    backend = TorchBackend(config, Ranks())
    full = TorchBackend(config_of(base, tmp_path), Ranks())
    assert {p.dtype for p in backend.lm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in backend.weights.master.values()} == {torch.float32}
    losses = []
    for step in range(5):
        batches = loader.step(step)
        units = sum(objective.units(b.targets) for b in batches)
        losses.append(
            [float(b.train_step(batches, objective, units, 1e-6).loss) for b in (backend, full)]
        )  # a step that bfloat16 weights alone could not take
    for ours, exact in losses:
        assert ours == pytest.approx(exact, rel=5e-3)
    before = torch.cat([p.flatten() for p in TorchBackend(config, Ranks()).weights.master.values()])
    after = torch.cat([p.detach().flatten() for p in backend.weights.master.values()])
    assert 0 < float((after - before).detach().abs().max()) < 1e-4


def test_non_finite_step_changes_nothing(base: list[str], tmp_path: Path) -> None:
    config = config_of(base, tmp_path)
    loader, backend, objective = loader_of(config, tmp_path), TorchBackend(config, Ranks()), SFT()
    batches = loader.step(0)
    backend.train_step(batches, objective, 100.0, 1e-3)
    before = {n: p.detach().clone() for n, p in backend.weights.master.items()}
    moments = {n: backend.optimizer.state[p]["exp_avg"].clone() for n, p in backend.weights.master.items()}
    result = backend.train_step(batches, objective, float("nan"), 1e-3)
    assert result.skipped is not None and int(result.skipped) == 1
    assert int(backend.train_step(batches, objective, float("nan"), 1e-3).skipped) == 2  # type: ignore[arg-type]
    for name, p in backend.weights.master.items():
        assert torch.equal(p, before[name]) and torch.equal(backend.optimizer.state[p]["exp_avg"], moments[name])
    assert int(backend.train_step(batches, objective, 100.0, 1e-3).skipped) == 0  # type: ignore[arg-type]
    assert any(not torch.equal(p, before[n]) for n, p in backend.weights.master.items())


def test_compiled_layers_give_the_same_loss(base: list[str], tmp_path: Path) -> None:
    one_layer = "model.config_overrides={num_hidden_layers: 1}"
    config = config_of(base, tmp_path, one_layer, "model.compile=true")
    loader = loader_of(config, tmp_path)
    assert_same(gradients(config, loader), gradients(config_of(base, tmp_path, one_layer), loader))


FAMILIES = {
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral windowed": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "granite divides its logits": ("GraniteConfig", {"logits_scaling": 4.0}),
    "cohere multiplies its logits": ("CohereConfig", {"logit_scale": 0.3}),
    "gemma2 caps its logits": (
        "Gemma2Config",
        {"final_logit_softcapping": 1.0, "head_dim": 8, "attn_logit_softcapping": None},
    ),
    "gemma2 caps its scores": (
        "Gemma2Config",
        {"head_dim": 8, "sliding_window": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": None},
    ),
    "phi has a bias": ("PhiConfig", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass_the_probe_and_equal_plain_pytorch(
    base: list[str], tmp_path: Path, model_folder: Path, family: str
) -> None:
    folder = random_model(tmp_path / "model", model_folder, *FAMILIES[family])
    config = config_of([o for o in base if not o.startswith("model.path")], tmp_path, f"model.path={folder}")
    loader = loader_of(config, tmp_path)
    TorchBackend(config, Ranks()).probe([loader.data[i] for i in range(3)])
    assert_same(gradients(config, loader), plain_pytorch(config, loader))


def test_probe_refuses_a_model_that_makes_its_logits_in_its_own_way(
    base: list[str], tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.backends import hf_model
    from engine.errors import UserError
    from kernels.output_layer import LogitOptions

    folder = random_model(tmp_path / "model", model_folder, "GraniteConfig", {"logits_scaling": 4.0})
    config = config_of([o for o in base if not o.startswith("model.path")], tmp_path, f"model.path={folder}")
    loader = loader_of(config, tmp_path)
    monkeypatch.setattr(hf_model, "logit_options", lambda lm: LogitOptions())  # as of a model that nobody has heard of
    backend = TorchBackend(config, Ranks())
    with pytest.raises(UserError, match="differ from the model's own logits"):
        backend.probe([loader.data[i] for i in range(3)])


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_losses_are_those_of_plain_log_softmax(
    base: list[str], dpo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """A whole run, with the output layer of the engine and with one that writes all logits and leaves the rest to autograd."""
    import engine
    from kernels import linear_objective

    words = {"sft": base, "dpo": dpo}[algorithm]
    called: list[str] = []

    def logprobs(hidden_NH: Any, labels_N: Any, weight_VH: Any, **_: Any) -> Any:
        called.append("logprobs")
        return (hidden_NH @ weight_VH.t()).log_softmax(-1).gather(1, labels_N[:, None])[:, 0]

    def objective(hidden_NH: Any, labels_N: Any, objective: Any, group_bounds: Any, **head: Any) -> Any:
        groups = len(labels_N) if group_bounds is None else len(group_bounds) - 1
        loss, sums = objective(logprobs(hidden_NH, labels_N, **head), 0, groups)
        return loss, {name: value.detach() for name, value in sums.items()}

    def losses(name: str) -> list[float]:
        more = [f"run.dir={tmp_path / name}", f"data.cache_dir={tmp_path / name}"]
        assert engine.run([*words, *more]) == 0
        return [line["train/loss"] for line in read_metrics(tmp_path / name)]

    ours = losses("ours")
    monkeypatch.setattr(linear_objective, "linear_objective", objective)
    monkeypatch.setattr(linear_objective, "linear_logprobs", logprobs)
    plain = losses("plain")
    assert called and len(plain) >= 4 and plain[0] != plain[-1]
    assert ours == pytest.approx(plain, rel=TOLERANCE)


def random_model(folder: Path, tokenizer: Path, name: str, fields: dict[str, Any]) -> Path:
    """Write a random model of some family with the small tokenizer."""
    import shutil

    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, name)(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=257,
        eos_token_id=259,
        pad_token_id=256,
        **fields,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / file, folder)
    return folder
