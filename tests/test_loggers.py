"""Loggers of others: what they wrote is read back with their own readers."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import engine
from engine import loggers
from engine.config import checks
from engine.config.compose import compose
from engine.config.schema import RunConfig
from engine.errors import RunError, UserError
from tests.conftest import read_metrics

RECIPE = "run:\n  name: named\n  callbacks: []\ndata:\n  train_path: ${oc.env:SECRET_FOLDER}\n"
FIGURES = [{"train/loss": 2.0, "perf/step_s": 0.5}, {"train/loss": float("nan")}, {"train/loss": float("inf")}]


def configured(base: list[str], run_dir: Path, backend: str, *more: str) -> RunConfig:
    overrides = [*base, f"run.dir={run_dir}", "run.name=named", f"logger.backends=[console,{backend}]", *more]
    return compose(overrides).config


def write(config: RunConfig, run_dir: Path, step: int, steps: range) -> list[str]:
    """Log a session of a run: three figures, of which two are not finite, then whole ones."""
    said: list[str] = []
    (logger,) = loggers.build(config, RECIPE, run_dir, step, said.append)
    for number in steps:
        logger.log(number, FIGURES[number] if number < len(FIGURES) else {"train/loss": 1.0 / number})
    logger.close()
    return said


@pytest.fixture
def wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    yield
    wandb.teardown()


def wandb_records(file: Path) -> list[Any]:
    """Return the records of an offline run: protocol buffers in the log format of LevelDB, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole, records = file.read_bytes(), 7, b"", []
    assert b":W&B".startswith(data[:4])
    while at + 7 <= len(data):  # the last record may be half written
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            break
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    return [{i.key or "/".join(i.nested_key): yaml.safe_load(i.value_json) for i in row.item} for row in rows]


def wandb_sessions(run_dir: Path, last_steps: list[int]) -> list[list[Any]]:
    """Return the records of a run's sessions, once each has come to its last step: wandb's service may still be writing."""
    deadline = time.monotonic() + 120
    while True:
        sessions = [wandb_records(file) for file in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))]
        reached = [[row["step"] for row in history(session)][-1:] for session in sessions]
        if reached == [[step] for step in last_steps]:
            return sessions
        assert time.monotonic() < deadline, reached
        time.sleep(0.05)


def test_wandb_goes_on_with_the_same_run(
    base: list[str],
    tmp_path: Path,
    wandb_offline: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run_dir.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = configured(base, run_dir, "wandb", "logger.wandb.tags=[a,b]", "logger.wandb.project=p")
    assert write(config, run_dir, 0, range(5)) == []
    assert write(config, run_dir, 2, range(3, 6)) == []  # steps 3 and 4 are done again
    assert capfd.readouterr() == ("", "")
    assert not list(elsewhere.iterdir())
    assert {p.name for p in run_dir.iterdir()} == {"wandb", ".wandb_id"}

    sessions = wandb_sessions(run_dir, [4, 5])
    rows = [history(s) for s in sessions]
    assert [[row["step"] for row in session] for session in rows] == [[0, 1, 2, 3, 4], [3, 4, 5]]
    assert rows[0][0]["train/loss"] == 2.0 and rows[0][0]["perf/step_s"] == 0.5 and rows[1][2]["train/loss"] == 0.2
    runs = [next(r.run for r in s if r.WhichOneof("record_type") == "run") for s in sessions]
    assert {r.run_id for r in runs} == {(run_dir / ".wandb_id").read_text().strip()}
    assert (runs[0].display_name, runs[0].project, sorted(runs[0].tags)) == ("named", "p", ["a", "b"])
    shown = {u.key: yaml.safe_load(u.value_json) for u in runs[0].config.update}
    assert shown["data"] == {"train_path": "${oc.env:SECRET_FOLDER}"}


def test_wandb_without_a_login_is_refused_and_does_not_ask(
    base: list[str], tmp_path: Path, wandb_offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    config = configured(base, tmp_path, "wandb")
    with pytest.raises(
        UserError, match=r"logger.backends: wandb cannot start \(.*WANDB_MODE=offline.*take wandb out\."
    ):
        loggers.build(config, RECIPE, tmp_path, 0, print)


def test_tensorboard_hides_what_is_done_again(
    base: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configured(base, tmp_path, "tensorboard")
    write(config, tmp_path, 0, range(4))  # a start that fails before its first checkpoint
    write(config, tmp_path, 0, range(7))
    write(config, tmp_path, 4, range(5, 8))
    assert capfd.readouterr() == ("", "")
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [e.step for e in read.Scalars("train/loss")] == list(range(8))
    assert read.Scalars("perf/step_s")[0].value == 0.5
    text = read.Tensors("recipe/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert yaml.safe_load(text)["data"] == {"train_path": "${oc.env:SECRET_FOLDER}"}


@pytest.fixture
def mlflow_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_mlflow_goes_on_with_the_same_run(
    base: list[str], tmp_path: Path, mlflow_files: None, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    config = configured(base, tmp_path, "mlflow", "logger.mlflow.experiment=tried")
    write(config, tmp_path, 0, range(5))
    run_id = (tmp_path / ".mlflow_id").read_text().strip()
    write(config, tmp_path, 4, range(5, 7))
    assert capfd.readouterr() == ("", "")
    assert {p.name for p in tmp_path.iterdir()} == {"mlruns", ".mlflow_id"}

    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("tried")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "named", "FINISHED")
    points = {m.step: m.value for m in client.get_metric_history(run_id, "train/loss")}
    assert points == {0: 2.0, 3: 1 / 3, 4: 0.25, 5: 0.2, 6: 1 / 6}  # 1 and 2 were not finite
    assert run.data.params == {
        "run.name": "named",
        "run.callbacks": "[]",
        "data.train_path": "${oc.env:SECRET_FOLDER}",
    }


def test_mlflow_takes_many_figures_and_long_parameters(base: list[str], tmp_path: Path, mlflow_files: None) -> None:
    from mlflow.tracking import MlflowClient

    recipe = yaml.safe_dump({"model": {"chat_template": "x" * 7000}, **{f"k{i}": i for i in range(150)}})
    (logger,) = loggers.build(configured(base, tmp_path, "mlflow"), recipe, tmp_path, 0, print)
    for step in range(40):
        logger.log(step, {f"train/m{i}": float(step) for i in range(30)})
    logger.close()
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    run = client.get_run((tmp_path / ".mlflow_id").read_text().strip())
    assert len(run.data.params) == 151 and len(run.data.params["model.chat_template"]) == 6000
    assert [m.value for m in client.get_metric_history(run.info.run_id, "train/m29")] == list(range(40))


def test_mlflow_marks_a_run_that_fails(base: list[str], tmp_path: Path, mlflow_files: None) -> None:
    from mlflow.tracking import MlflowClient

    (logger,) = loggers.build(configured(base, tmp_path, "mlflow"), RECIPE, tmp_path, 0, print)
    with pytest.raises(RunError):
        try:
            raise RunError("the loss is not finite")
        finally:
            logger.close()
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    assert client.get_run((tmp_path / ".mlflow_id").read_text().strip()).info.status == "FAILED"


def test_mlflow_starts_a_run_where_the_server_has_another_store(
    base: list[str], tmp_path: Path, mlflow_files: None
) -> None:
    write(configured(base, tmp_path, "mlflow"), tmp_path, 0, range(2))
    first = (tmp_path / ".mlflow_id").read_text()
    elsewhere = f"logger.mlflow.tracking_uri={tmp_path / 'elsewhere'}"
    assert write(configured(base, tmp_path, "mlflow", elsewhere), tmp_path, 2, range(3, 5)) == []
    assert (tmp_path / ".mlflow_id").read_text() != first and (tmp_path / "elsewhere").is_dir()


def test_an_unreachable_server_stops_a_start_but_no_resumed_run(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = configured(base, tmp_path, "mlflow", "logger.mlflow.tracking_uri=http://127.0.0.1:9")
    with pytest.raises(RunError, match="logger.backends: mlflow cannot start .* take mlflow out") as raised:
        loggers.build(config, RECIPE, tmp_path, 0, print)
    assert raised.value.exit_code == 1
    said: list[str] = []
    assert loggers.build(config, RECIPE, tmp_path, 4, said.append) == []
    assert len(said) == 1 and "goes on without it" in said[0] and "\n" not in said[0]


class Failing:
    """Fails from step 2 on, and on closing."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step >= 2:
            raise ConnectionError("server gone\nat 10.0.0.1")
        self.steps.append(step)

    def close(self) -> None:
        raise TimeoutError


def test_a_logger_that_fails_is_told_once_and_off() -> None:
    said: list[str] = []
    inner = Failing()
    logger = loggers.Guarded("wandb", inner, said.append)
    for step in range(5):
        logger.log(step, {})
    logger.close()
    assert inner.steps == [0, 1] and len(said) == 1
    assert said[0].startswith("step 2: logger wandb failed and is off from here (server gone); the run goes on")
    closing = loggers.Guarded("mlflow", Failing(), said.append)
    closing.close()
    closing.close()
    assert len(said) == 2 and "mlflow failed to close" in said[1] and "TimeoutError" in said[1]


def test_a_missing_package_is_answered_before_anything_starts(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_installed", lambda package: package == "mlflow")
    with pytest.raises(UserError) as raised:
        configured(base, tmp_path, "wandb,tensorboard,mlflow,mlflow", "run.profile_steps=[5,3]")
    assert set(raised.value.problems) == {
        "logger.backends: wandb is not installed; pip install wandb, or take it out.",
        "logger.backends: tensorboard is not installed; pip install 'anneal[tensorboard]', or take it out.",
        "logger.backends names mlflow 2 times: name it once.",
        "run.profile_steps=[5,3]: the first step comes after the last; swap them.",
    }


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_logger").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert checks._installed("tensorboard") and not checks._installed("some_logger")


def test_nothing_is_imported_for_loggers_that_are_not_named(base: list[str], tmp_path: Path) -> None:
    config = compose([*base, f"run.dir={tmp_path}", "logger.backends=[console]"]).config
    assert loggers.build(config, RECIPE, tmp_path, 0, print) == [] and not list(tmp_path.iterdir())


def test_every_logger_gets_the_figures_of_a_run_and_of_its_continuation(
    base: list[str], tmp_path: Path, wandb_offline: None, mlflow_files: None
) -> None:
    from mlflow.tracking import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "run"
    words = [*base, f"run.dir={run_dir}", "logger.backends=[wandb,tensorboard,mlflow]", "run.profile_steps=[2,2]"]
    assert engine.run([*words, "algorithm.max_num_steps=3"]) == 0
    assert engine.run([*words, "algorithm.max_num_steps=5"]) == 0
    losses = {line["step"]: line["train/loss"] for line in read_metrics(run_dir)}
    assert sorted(losses) == [1, 2, 3, 4, 5]

    rows = [row for session in wandb_sessions(run_dir, [3, 5]) for row in history(session)]
    assert {row["step"]: row["train/loss"] for row in rows if "train/loss" in row} == losses
    assert all("host/rss_gb" in row for row in rows if "train/loss" in row)
    read = EventAccumulator(str(run_dir / "tensorboard"))
    read.Reload()
    assert {e.step: e.value for e in read.Scalars("train/loss")} == pytest.approx(losses)
    client = MlflowClient(tracking_uri=(run_dir / "mlruns").as_uri())
    run = client.get_run((run_dir / ".mlflow_id").read_text().strip())
    assert {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/loss")} == losses
    assert run.data.params["train.global_batch_size"] == "8" and run.info.status == "FINISHED"
    assert (run_dir / "profile" / "rank_0.json.gz").is_file()
