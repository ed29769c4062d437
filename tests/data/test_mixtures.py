"""Several sources: whose turn it is, what an epoch holds, what is held out, and what is told of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine.config.compose import compose
from engine.config.schema import RunConfig
from engine.data.assemble import Data, assemble
from engine.data.plan import Plan
from engine.errors import UserError
from tests.conftest import read_metrics

NAMES = ("code", "chat", "maths", "tools", "other")


def plan_of(sizes: Sequence[int], weights: Sequence[float] | None, batch_size: int = 1, **options: Any) -> Plan:
    names = NAMES[: len(sizes)]
    return Plan(sizes=sizes, weights=weights, names=names, batch_size=batch_size, drop_last=False, **options)


def drawn_by_source(plan: Plan, steps: range) -> list[list[int]]:
    """Return the conversations of some steps by source, each numbered within its own."""
    edges = np.cumsum([0, *plan.sizes])
    found: list[list[int]] = [[] for _ in plan.sizes]
    for step in steps:
        for i in plan.members(step).tolist():
            source = int(np.searchsorted(edges, i, "right")) - 1
            found[source].append(i - int(edges[source]))
    return found


mixtures = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 40), min_size=n, max_size=n),
        st.none() | st.lists(st.sampled_from([0.5, 1.0, 0.1, 0.25, 3.0, 0.07]), min_size=n, max_size=n),
    )
)


@settings(max_examples=60)
@given(mixture=mixtures, batch_size=st.integers(1, 9), seed=st.integers(0, 3))
def test_shares_are_exact_however_an_epoch_is_cut(
    mixture: tuple[list[int], list[float] | None], batch_size: int, seed: int
) -> None:
    sizes, weights = mixture
    plan = plan_of(sizes, weights, batch_size, seed=seed)
    shares = sizes if weights is None else weights
    taken = [0] * len(sizes)
    for step in range(plan.steps_per_epoch):
        assert plan.size(step) == len(plan.members(step))
        for source, members in enumerate(drawn_by_source(plan, range(step, step + 1))):
            taken[source] += len(members)
        for count, share in zip(taken, shares, strict=True):
            assert abs(count - sum(taken) * share / sum(shares)) <= len(sizes) / 2 + 0.5
    assert taken == plan.quotas
    largest = max(range(len(sizes)), key=lambda i: (shares[i], sizes[i], i))
    assert plan.quotas[largest] == sizes[largest]
    if weights is None:
        assert plan.quotas == sizes


@given(mixture=mixtures)
def test_turns_do_not_depend_on_how_many_are_asked_for(mixture: tuple[list[int], list[float] | None]) -> None:
    """The first n turns are the first n of any more: the definition by time, one turn after the other."""
    sizes, weights = mixture
    plan = plan_of(sizes, weights)
    shares = [int(s * 100) for s in (sizes if weights is None else weights)]
    expected = [0] * len(sizes)
    for count in range(1, sum(plan.quotas) + 1):
        nearest = min(range(len(sizes)), key=lambda i: ((2 * expected[i] + 1) / shares[i], i))
        times = [(2 * expected[i] + 1) / shares[i] for i in range(len(sizes))]
        if sum(abs(t - times[nearest]) < 1e-12 for t in times) == 1:  # elsewhere floats do not tell equal times apart
            step = [b - a for a, b in zip(plan._drawn(count - 1), plan._drawn(count), strict=True)]
            assert step[nearest] == 1
        expected = plan._drawn(count)
        assert sum(expected) == count


def test_each_pass_over_a_source_sees_every_conversation_once() -> None:
    plan = plan_of([10, 30, 7], [1.0, 1.0, 2.0], batch_size=4)
    assert plan.quotas == [3, 3, 7]
    found = drawn_by_source(plan, range(plan.steps_per_epoch * 40))
    for size, members in zip(plan.sizes, found, strict=True):
        for lap in range(len(members) // size):
            assert sorted(members[lap * size : (lap + 1) * size]) == list(range(size))
    laps = [tuple(found[2][lap * 7 : (lap + 1) * 7]) for lap in range(5)]
    assert len(set(laps)) > 1


def test_an_order_depends_on_no_other_source() -> None:
    """Another source beside it, or one fewer, changes when a conversation comes and not which comes next."""
    alone = drawn_by_source(plan_of([50, 20], [1.0, 1.0]), range(40))[0]
    more = drawn_by_source(plan_of([50, 20, 30], [1.0, 1.0, 1.0]), range(60))[0]
    assert alone[:15] == more[:15]


def test_one_source_is_in_the_order_it_has_always_had() -> None:
    assert Plan(sizes=[10], batch_size=10).members(0).tolist() == [7, 0, 4, 2, 8, 9, 3, 5, 6, 1]


def test_passes_count_each_source_on_its_own() -> None:
    plan = plan_of([4, 40], [1.0, 1.0], batch_size=8)
    assert plan.quotas == [40, 40]
    assert plan.passes(0) == [0.0, 0.0]
    assert plan.passes(5) == [5.0, 0.5]
    assert plan.passes(10) == [10.0, 1.0]


# Recipes


def write_rows(file: Path, word: str, count: int) -> str:
    with file.open("w") as stream:
        for i in range(count):
            turns = [{"role": "user", "content": f"{word} {i}?"}, {"role": "assistant", "content": f"{word} {i}!"}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return str(file)


def config_of(base: list[str], tmp_path: Path, *more: str) -> RunConfig:
    return compose([*without_path(base), f"run.dir={tmp_path / 'run'}", *more]).config


def without_path(base: list[str]) -> list[str]:
    return [o for o in base if not o.startswith("data.train_path")]


def assembled(config: RunConfig, tmp_path: Path) -> tuple[Data, list[str]]:
    said: list[str] = []
    return assemble(config, tmp_path, said.append), said


@pytest.fixture
def listed(tmp_path: Path) -> str:
    code, chat = write_rows(tmp_path / "code.jsonl", "code", 30), write_rows(tmp_path / "chat.jsonl", "chat", 90)
    return f"data.train=[{{path: {code}, weight: 1}}, {{path: {chat}, weight: 3, name: talk, limit: 60}}]"


def test_sources_are_named_limited_and_numbered_through(base: list[str], tmp_path: Path, listed: str) -> None:
    config = config_of(base, tmp_path, listed)
    assert config.data.train_path is None
    assert [source.name for source in config.data.train] == ["code", "talk"]
    data, said = assembled(config, tmp_path)
    assert data.train.sizes == [30, 60] and data.train.weights == [1.0, 3.0]
    assert [line.split(":")[0] for line in said] == ["data code", "data talk"]
    assert "60 of 60 rows used" in said[1]
    members = np.array([0, 29, 30, 89])
    assert data.train.part_of(members).tolist() == [0, 0, 1, 1]
    first = data.train[int(data.train.documents(members)[2])].input_ids
    assert first.tolist() == data.sources["train/talk"][0].input_ids.tolist()


def test_a_run_on_a_mixture_logs_each_source(base: list[str], tmp_path: Path, listed: str) -> None:
    run_dir = tmp_path / "run"
    validation = f"data.validation=[{{path: {tmp_path / 'code.jsonl'}}}, {{path: {tmp_path / 'chat.jsonl'}}}]"
    words = [*without_path(base), listed, validation, "algorithm.val_at_end=true", f"run.dir={run_dir}"]
    assert engine.run(words) == 0
    steps = read_metrics(run_dir)
    for line in steps:
        assert line["train/code/tokens"] + line["train/talk/tokens"] == line["train/tokens"]
    assert steps[-1]["train/code/epoch"] == pytest.approx(8 / 30)
    assert steps[-1]["train/talk/epoch"] == pytest.approx(24 / 60)
    (last,) = read_metrics(run_dir, "validation/loss")
    apart = sorted(last[f"validation/{name}/loss"] for name in ("chat", "code"))
    assert apart[0] < last["validation/loss"] < apart[1]
    lock = json.loads((run_dir / "lock.json").read_text())
    assert set(lock["data"]) == {"train", "validation/chat", "validation/code"}
    assert set(lock["samples"]) == {"train/code", "train/talk", "validation/code", "validation/chat"}
    assert engine.run([f"recipe={run_dir / 'recipe.yaml'}", f"run.dir={tmp_path / 'again'}"]) == 0
    again = [m["train/loss"] for m in read_metrics(tmp_path / "again")]
    assert again == [m["train/loss"] for m in steps]


def test_validation_of_several_sets_is_that_of_one(base: list[str], tmp_path: Path) -> None:
    code, chat = write_rows(tmp_path / "code.jsonl", "code", 10), write_rows(tmp_path / "chat.jsonl", "chat", 23)
    both = tmp_path / "both.jsonl"
    both.write_text(Path(code).read_text() + Path(chat).read_text())
    found = []
    for name, where in (
        ("several", f"data.validation=[{{path: {code}}}, {{path: {chat}}}]"),
        ("one", f"data.val_path={both}"),
    ):
        run_dir = tmp_path / name
        assert engine.run([*base, where, "algorithm.max_num_steps=0", f"run.dir={run_dir}"]) == 0
        found.append(read_metrics(run_dir, "validation/loss")[-1]["validation/loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_source_takes_the_keys_of_a_data_choice(base: list[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "1+1?", "answer": "2"}) + "\n")
    listed = (
        f"data.train=[{{source: gsm8k, path: {rows}}}, {{source: gsm8k, name: other, path: {rows}, split: 'test[:1]'}}]"
    )
    one, other = config_of(base, tmp_path, listed).data.train
    assert (one.name, one.input_key, one.output_key, one.subset, one.split) == (
        "gsm8k",
        "question",
        "answer",
        "main",
        "train",
    )
    assert other.split == "test[:1]"


def test_held_out_rows_stay_out_when_rows_are_added(base: list[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    held = []
    for count in (200, 400):
        write_rows(file, "row", count)
        with file.open("a") as stream:
            stream.write(file.read_text().splitlines()[0] + "\n")  # the first row once more
        data, said = assembled(config_of(base, tmp_path, f"data.train_path={file}", "data.val_fraction=0.1"), tmp_path)
        (kept,), (out,) = data.train.parts, data.validation[""].parts
        assert kept.kept is not None and out.kept is not None
        assert sorted([*kept.kept.tolist(), *out.kept.tolist()]) == list(range(count + 1))
        assert 0.04 < len(out.kept) / count < 0.18
        assert (0 in out.kept) == (count in out.kept)
        assert said[-1] == f"held out: {len(out.kept)} conversations to validate on"
        held.append({i for i in out.kept.tolist() if i < 200})
    assert held[0] == held[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.train=[{path: A}, {path: A}]"], "data.train: two sources are named A; give them names of their own."),
        (
            ["data.train=[{path: A, weight: 1}, {path: B}]"],
            "data.train: some sources have a weight and B has none; give all a weight, or none.",
        ),
        (["data.train=[{source: gsm9k}]"], "data.train[0].source=gsm9k: no such choice of data; did you mean gsm8k?"),
        (["data.train=[{path: A, wieght: 2}]"], "there is no key data.train.0.wieght"),
        (
            ["data.train_path=A", "data.train=[{path: B}]"],
            "data.train_path and the list data.train are both given: set data.train=[], or leave it out.",
        ),
        (
            ["data.train_path=A", "data.val_path=B", "data.val_fraction=0.1"],
            "data.val_fraction=0.1 and validation data are both",
        ),
        (
            ["data.train_path=A", "data.validation=[{path: B, weight: 2}]"],
            "data.validation: a weight means nothing there",
        ),
        (
            ["data.train=[{path: A}]", "data.limit=3"],
            "data.limit is for a single source: give it to each source of the list.",
        ),
        (
            ["data.train_path=A", "data.validation=[{path: A}, {path: B}]", "checkpoint.metric=validation/C/loss"],
            "checkpoint.metric=validation/C/loss: no validation set is named C; there is A, B.",
        ),
        (["data.train_path=null"], "data.train_path is not set: give the training data"),
        (["data.train=[{name: x}]"], "data.train.0.path is not set"),
    ],
)
def test_contradictions_are_refused(base: list[str], tmp_path: Path, words: list[str], sentence: str) -> None:
    for name in "AB":
        write_rows(tmp_path / name, "row", 3)
    words = [w.replace(": A", f": {tmp_path}/A").replace(": B", f": {tmp_path}/B") for w in words]
    words = [w.replace("=A", f"={tmp_path}/A").replace("=B", f"={tmp_path}/B") for w in words]
    with pytest.raises(UserError) as caught:
        config_of(base, tmp_path, *words)
    assert sentence in str(caught.value)


def test_a_path_over_the_list_of_a_recipe_is_refused(base: list[str], tmp_path: Path, listed: str) -> None:
    recipe = tmp_path / "mixture.yaml"
    sources = listed.removeprefix("data.train=")
    recipe.write_text(f"# @package _global_\ndata:\n  train: {sources}\n")
    words = [f"recipe={recipe}", *(o for o in without_path(base) if not o.startswith("data=")), f"run.dir={tmp_path}"]
    assert len(compose(words).config.data.train) == 2
    for word in ("data.train_path=x.jsonl", "data=messages"):
        with pytest.raises(UserError, match=r"the list data.train"):
            compose([*words, word])


def test_a_share_too_small_for_one_conversation_is_refused(base: list[str], tmp_path: Path) -> None:
    few, many = write_rows(tmp_path / "few.jsonl", "few", 20), write_rows(tmp_path / "many.jsonl", "many", 20)
    listed = f"data.train=[{{path: {few}, weight: 1000}}, {{path: {many}, weight: 1}}]"
    with pytest.raises(
        UserError, match=r"an epoch has no place for a conversation of many \(weight 1.0\); raise its weight"
    ):
        engine.run([*without_path(base), listed, f"run.dir={tmp_path / 'run'}"])
