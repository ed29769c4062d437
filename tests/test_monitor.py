"""Built-in callbacks, and the FLOPs behind perf/mfu."""

from __future__ import annotations

import gzip
import json
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config.compose import compose
from engine.errors import UserError
from engine.flops import peak_flops, train_flops
from engine.monitor import MemoryRecorder, Monitor, Profiler, builtin
from engine.types import Control


def control_of(run_dir: Path, total_steps: int = 10, step: int = 0, device: str = "cpu", rank: int = 0) -> Control:
    """Return what the loop would hand to callbacks; the backend is a device alone."""
    backend: Any = SimpleNamespace(device=torch.device(device))
    config: Any = None
    return Control(
        config=config,
        run_dir=run_dir,
        backend=backend,
        rank=rank,
        step=step,
        total_steps=total_steps,
        say=lambda _: None,
    )


def loop(callback: Any, control: Control, steps: int) -> None:
    """Do steps as the loop calls them."""
    callback.on_train_begin(control)
    for _ in range(steps):
        callback.on_step_begin(control)
        torch.mm(torch.ones(8, 8), torch.ones(8, 8))
        control.step += 1
        callback.on_step_end(control)


def traced(run_dir: Path, rank: int = 0) -> tuple[set[str], int]:
    """Return the names of the steps in a trace, and how many matrix products it shows."""
    with gzip.open(run_dir / "profile" / f"rank_{rank}.json.gz", "rt") as stream:
        names = [event.get("name", "") for event in json.load(stream)["traceEvents"]]
    return {n for n in names if n.startswith("step ")}, names.count("aten::mm")


def test_monitor_adds_the_load_to_training_lines_only(tmp_path: Path) -> None:
    monitor, control = Monitor(), control_of(tmp_path)
    sum(i * i for i in range(300_000))
    line: dict[str, float] = {"train/loss": 1.0}
    monitor.on_log(control, line)
    assert set(line) == {"train/loss", "host/rss_gb", "host/cpu_percent"}
    assert 0.05 < line["host/rss_gb"] < 100 and line["host/cpu_percent"] > 0
    other: dict[str, float] = {"validation/loss": 1.0}
    monitor.on_log(control, other)
    assert set(other) == {"validation/loss"}


def test_monitor_costs_little(tmp_path: Path) -> None:
    monitor, control, taken = Monitor(), control_of(tmp_path), []
    for _ in range(100):
        started = time.perf_counter()
        monitor.on_log(control, {"train/loss": 1.0})
        taken.append(time.perf_counter() - started)
    assert sorted(taken)[50] < 0.5e-3


def test_monitor_looks_at_the_device_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the driver's answers; test_on_a_device has real ones."""
    looks: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: looks.append(device) or 87)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda device: 12_000_000_000)
    monitor, control = Monitor(), control_of(tmp_path, device="cuda:1")
    for _ in range(20):
        line: dict[str, float] = {"train/loss": 1.0}
        monitor.on_log(control, line)
        assert line["device/utilization_percent"] == 87.0 and line["device/memory_gb"] == 12.0
    assert looks == [torch.device("cuda:1")]


def test_monitor_goes_on_where_the_driver_gives_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def missing(device: torch.device) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    said: list[str] = []
    monitor, control = Monitor(), control_of(tmp_path, device="cuda")
    control.say = said.append
    for _ in range(3):
        line: dict[str, float] = {"train/loss": 1.0}
        monitor.on_log(control, line)
        assert set(line) == {"train/loss", "host/rss_gb", "host/cpu_percent"}
    assert len(said) == 1 and "Not Supported" in said[0]


def test_profiler_traces_its_window(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    profiler, control = Profiler(2, 3, Path("profile")), control_of(tmp_path, rank=1)
    loop(profiler, control, 5)
    profiler.on_train_end(control)
    assert traced(tmp_path, rank=1) == ({"step 2", "step 3"}, 2)
    out, err = capfd.readouterr()
    assert out == ""
    if not any(
        line.startswith("USDT:") for line in err.splitlines()
    ):  # its level is read once a process, perhaps by another test
        assert err == ""


def test_profiler_of_a_run_that_resumes_within_the_window(tmp_path: Path) -> None:
    loop(Profiler(2, 5, Path("profile")), control_of(tmp_path, step=3), 4)
    assert traced(tmp_path) == ({"step 4", "step 5"}, 2)


def test_profiler_of_a_run_that_resumes_past_the_window(tmp_path: Path) -> None:
    profiler, control = Profiler(2, 3, Path("profile")), control_of(tmp_path, step=3)
    loop(profiler, control, 2)
    profiler.on_train_end(control)
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("total_steps", [3, 10])
def test_profiler_of_a_run_that_ends_within_the_window(tmp_path: Path, total_steps: int) -> None:
    profiler, control = Profiler(2, 9, Path("profile")), control_of(tmp_path, total_steps=total_steps)
    loop(profiler, control, 3)
    assert (tmp_path / "profile").exists() == (total_steps == 3)  # with 10, a callback asks to stop after step 3
    profiler.on_train_end(control)
    assert traced(tmp_path) == ({"step 2", "step 3"}, 2)


def test_profiler_of_a_run_that_is_stopped(tmp_path: Path) -> None:
    profiler = Profiler(1, 9, Path("profile"))
    loop(profiler, control_of(tmp_path), 2)
    profiler.close()
    profiler.close()
    assert traced(tmp_path) == ({"step 1", "step 2"}, 2)
    loop(Profiler(1, 1, Path("again")), control_of(tmp_path), 1)  # another run in the same process


def test_builtin_callbacks_are_those_of_the_recipe(base: list[str], tmp_path: Path) -> None:
    plain = [*base, f"run.dir={tmp_path}"]
    assert [type(c) for c in builtin(compose(plain).config)] == [Monitor]
    monitor, profiler = builtin(compose([*plain, "run.profile_steps=[3,4]"]).config)
    assert isinstance(profiler, Profiler) and (profiler.first, profiler.last) == (3, 4)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="run.record_memory: .* needs CUDA.*; set it to false"):
            builtin(compose([*plain, "run.record_memory=true"]).config)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for torch's recorder, which needs a device; test_on_a_device has the real one."""
    seen: dict[str, Any] = {"states": [], "dumps": 0}

    def dump(file: str) -> None:
        seen["dumps"] += 1
        Path(file).write_text(str(seen["dumps"]))

    def record(enabled: str | None = "all", **_: Any) -> None:
        seen["states"].append(enabled)

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    monkeypatch.setattr(
        torch._C, "_cuda_attach_out_of_memory_observer", lambda o: seen.update(observer=o), raising=False
    )
    return seen


def test_memory_recorder_writes_at_the_end(tmp_path: Path, recorded: dict[str, Any]) -> None:
    recorder, control = MemoryRecorder(Path("memory")), control_of(tmp_path, rank=3)
    loop(recorder, control, 2)
    recorder.on_train_end(control)
    recorder.close()
    assert (tmp_path / "memory" / "rank_3.pickle").read_text() == "1" and recorded["states"] == ["all", None]
    recorded["observer"](0, 1, 2, 3)
    assert recorded["dumps"] == 1  # a later run in this process is not this one's


def test_memory_recorder_keeps_the_snapshot_of_a_step_that_ran_out(tmp_path: Path, recorded: dict[str, Any]) -> None:
    recorder, control = MemoryRecorder(Path("memory")), control_of(tmp_path)
    loop(recorder, control, 1)
    recorded["observer"](0, 1, 2, 3)
    recorder.close()
    assert recorded["dumps"] == 1 and recorded["states"] == ["all", None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device(tmp_path: Path) -> None:
    monitor, recorder = Monitor(), MemoryRecorder(Path("memory"))
    control = control_of(tmp_path, device="cuda")
    loop(recorder, control, 1)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, device="cuda")
    recorder.close()
    with (tmp_path / "memory" / "rank_0.pickle").open("rb") as stream:
        assert {"segments", "device_traces"} <= set(pickle.load(stream))
    line: dict[str, float] = {"train/loss": 1.0}
    monitor.on_log(control, line)
    assert 0 <= line["device/utilization_percent"] <= 100 and line["device/memory_gb"] > 0
    profiler = Profiler(1, 1, Path("profile"))
    profiler.on_step_begin(control_of(tmp_path, device="cuda"))
    torch.mm(torch.ones(64, 64, device="cuda"), torch.ones(64, 64, device="cuda"))
    profiler.on_step_end(control_of(tmp_path, device="cuda", step=1))
    assert traced(tmp_path)[0] == {"step 1"}


def test_train_flops_by_hand() -> None:
    shape = dict(layer_params=100, num_layers=2, num_heads=3, head_dim=4, hidden_size=5, vocab_size=7)
    # 6·100·10 + 6·7·5·6 + 6·2·3·4·(4² + 6²)
    assert train_flops(**shape, num_tokens=10, num_trained_tokens=6, squared_lengths=52) == 6000 + 1260 + 7488


def test_train_flops_against_what_torch_counts(model_folder: Path) -> None:
    """Eager attention computes both halves of the square, so its attention is twice the causal one."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager", dtype=torch.float32)
    config, length = model.config, 64
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False).logits.sum().backward()
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    expected = train_flops(
        layer_params=sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2),
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_tokens=length,
        num_trained_tokens=length,
        squared_lengths=2 * length**2,
    )
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H20", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peak_flops_of_a_device(name: str, tflops: float | None) -> None:
    assert peak_flops(name, "bfloat16") == (None if tflops is None else tflops * 1e12)
    assert peak_flops(name, "torch.bfloat16") == peak_flops(name, "bfloat16")
    assert peak_flops(name, "float32") is None
