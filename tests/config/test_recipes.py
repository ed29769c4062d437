"""Recipes and groups that are shared: by folder, file and git repository, and frozen; and the command that looks after them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import engine
from engine import recipes
from engine.config import repository
from engine.config.compose import compose, swept
from engine.errors import UserError
from tests.conftest import ROOT, read_metrics

MINE = """\
# Our own. It has a second sentence.
defaults:
  - groundwork
  - override /cluster: ours
  - override /data: chats
optimizer: {lr: 3e-3}
"""
GROUNDWORK = """\
defaults:
  - override /model: tiny
  - override /scheduler: cosine
algorithm: {max_num_epochs: null, max_num_steps: 3, val_at_end: false}
train: {global_batch_size: 8}
logger: {backends: []}
hydra:
  sweeper:
    params:
      optimizer.lr: 1e-3,2e-3
      run.seed: 1,2
"""


@pytest.fixture
def team(tmp_path: Path, rows_file: Path) -> Path:
    """A folder that a team shares: two recipes, a cluster and data of its own."""
    folder = tmp_path / "team"
    for group, name, text in (
        ("cluster", "ours", "name: local\nmax_failures: 2\n"),
        ("data", "chats", f"# Chats.\ndefaults: [messages]\ntrain_path: {rows_file}\nmax_length: 256\n"),
    ):
        (folder / group).mkdir(parents=True)
        (folder / group / f"{name}.yaml").write_text(text)
    (folder / "mine.yaml").write_text(MINE)
    (folder / "groundwork.yaml").write_text(GROUNDWORK)
    return folder


@pytest.fixture
def shared(team: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANNEAL_RECIPE_PATH", str(team))
    return team


@pytest.fixture
def git(team: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Git in the team's folder, which is a repository with a tag v1; the cache is empty."""
    monkeypatch.setenv("ANNEAL_CACHE", str(tmp_path / "cache"))

    def run(*words: str) -> str:
        command = ["git", "-C", str(team), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # of a hook
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    run("init", "--quiet", "--initial-branch=main")
    run("add", "--all")
    run("commit", "--quiet", "--message=one")
    run("tag", "v1")
    repository.fetch.cache_clear()
    yield run
    repository.fetch.cache_clear()


def problem(*words: str) -> str:
    """Return the one sentence that answers some words."""
    with pytest.raises(UserError) as refused:
        compose(list(words))
    (found,) = refused.value.problems
    return found


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run)]


# ------------------------------------------------------------------------------------------------- where they are


def test_a_recipe_and_the_groups_of_another_folder_run(shared: Path, tmp_path: Path) -> None:
    assert engine.run(["recipe=mine", f"run.dir={tmp_path / 'run'}"]) == 0
    config = compose(["recipe=mine"]).config
    assert config.optimizer.lr == 3e-3 and config.scheduler.name == "cosine" and config.cluster.max_failures == 2
    assert len(losses(tmp_path / "run")) == 3
    assert "recipe" not in json.loads((tmp_path / "run" / "lock.json").read_text())


def test_groups_of_another_folder_are_typed_like_ours(shared: Path) -> None:
    config = compose(["model=tiny", "data=chats", "cluster=ours"]).config
    assert config.data.reader == "messages" and config.data.max_length == 256 and config.cluster.max_failures == 2
    words = ["recipe=quickstart", "cluster=ours"]
    assert compose(words).config.cluster.max_failures == 2
    mixed = compose(["model=tiny", "data.train=[{source: chats, weight: 1}]", "data.max_length=256"]).config.data.train
    assert mixed[0].name == "chats" and mixed[0].path == config.data.train_path
    assert problem("model=tiny", "data=chats", "cluster=our") == "cluster=our: no such choice; did you mean ours?"


@pytest.mark.parametrize("word", ["{}", "file://{}", "[{}]"])
def test_hydras_search_path(team: Path, word: str) -> None:
    search = f"hydra.searchpath={word.format(team)}"
    assert compose([search, "recipe=mine"]).config.cluster.max_failures == 2
    assert compose([search, "model=tiny", "data=chats"]).config.data.reader == "messages"


def test_a_folder_named_twice_is_one(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANNEAL_RECIPE_PATH", f"{shared}:{shared}/../team::{ROOT / 'recipes'}")
    assert compose([f"hydra.searchpath=[{shared}]", "recipe=mine"]).config.optimizer.lr == 3e-3


def test_a_file_has_what_lies_beside_it(team: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compose([f"recipe={team}/mine.yaml"]).config.cluster.max_failures == 2
    monkeypatch.chdir(team)
    assert compose(["recipe=./mine.yaml", "cluster=ours"]).config.scheduler.name == "cosine"
    odd = team / "it's (a, b) [c].yaml"
    odd.write_text(MINE)
    assert recipes.main(["check", str(odd)]) == 0
    (team / "quickstart.yaml").write_text("a: [")  # what is not used is no matter
    (team / "sft_llama3_8b_1x8.yaml").write_text("{}")
    assert compose([f"recipe={team}/mine.yaml"]).config.optimizer.lr == 3e-3


def test_a_copy_of_all_of_ours_is_no_clash(tmp_path: Path) -> None:
    for file in (ROOT / "recipes").glob("*.yaml"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "dpo_ultrafeedback_qwen3_8b.yaml"
    assert compose([f"recipe={path}"]).config.model.path == "Qwen/Qwen3-8B"
    base = tmp_path / "dpo_ultrafeedback_llama3_8b.yaml"
    base.write_text(base.read_text() + "checkpoint: {keep_last: 1}\n")
    assert problem(f"recipe={path}") == (
        f"recipe={base.stem} is defined in {ROOT / 'recipes' / base.name} and in {base}; rename one of them."
    )


def test_a_copy_of_ours_may_be_changed_in_place(team: Path) -> None:
    copy = team / "sft_llama3_8b_1x8.yaml"
    copy.write_text((ROOT / "recipes" / copy.name).read_text().replace("lr: 5e-6", "lr: 4e-6"))
    assert compose([f"recipe={copy}"]).config.optimizer.lr == 4e-6


# ----------------------------------------------------------------------------------------------------- duplicates


def test_a_name_of_two_places_is_refused(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    (other / "cluster").mkdir(parents=True)
    monkeypatch.setenv("ANNEAL_RECIPE_PATH", f"{shared}:{other}")
    for name, given in (("mine.yaml", "recipe=mine"), ("cluster/ours.yaml", "cluster=ours")):
        (other / name).write_text("name: local\n")
        said = f"{given} is defined in {shared / name} and in {other / name}; rename one of them."
        assert problem("recipe=quickstart") == said
        (other / name).unlink()
    (other / "cluster" / "local.yaml").write_text("name: local\n")
    ours = ROOT / "conf" / "cluster" / "local.yaml"
    assert problem("recipe=quickstart") == (
        f"cluster=local is defined in {ours} and in {other / 'cluster' / 'local.yaml'}; rename one of them."
    )


def test_a_base_of_two_places_is_refused(team: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "groundwork.yaml").write_text("{}")
    monkeypatch.setenv("ANNEAL_RECIPE_PATH", str(other))
    assert problem(f"recipe={team}/mine.yaml") == (
        f"recipe=groundwork is defined in {other / 'groundwork.yaml'} and in {team / 'groundwork.yaml'}; rename one of them."
    )


# ------------------------------------------------------------------------------------------------------------ git


def test_a_recipe_of_a_repository_runs_and_is_pinned(git: Callable[..., str], team: Path, tmp_path: Path) -> None:
    commit, url = git("rev-parse", "HEAD"), f"git+file://{team}"
    assert engine.run([f"recipe={url}@v1#mine.yaml", f"run.dir={tmp_path / 'run'}"]) == 0
    pinned = f"{url}@{commit}#mine.yaml"
    assert json.loads((tmp_path / "run" / "lock.json").read_text())["recipe"] == pinned
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["lock"] == {"recipe": pinned}
    assert engine.run([f"recipe={tmp_path / 'run' / 'recipe.yaml'}", f"run.dir={tmp_path / 'again'}"]) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    assert json.loads((tmp_path / "again" / "lock.json").read_text())["recipe"] == pinned


def test_revisions_of_a_repository(git: Callable[..., str], team: Path, tmp_path: Path) -> None:
    first, url = git("rev-parse", "HEAD"), f"git+file://{team}"

    def rate(revision: str, path: str = "mine.yaml") -> float:
        repository.fetch.cache_clear()
        return compose([f"recipe={url}@{revision}#{path}"]).config.optimizer.lr

    assert rate("main") == 3e-3
    (team / "recipes").mkdir()
    (team / "recipes" / "deep.yaml").write_text("defaults: [{override /model: tiny}]\noptimizer: {lr: 5e-3}\n")
    (team / "mine.yaml").write_text(MINE.replace("3e-3", "4e-3"))
    git("checkout", "--quiet", "-b", "next/one")
    git("add", "--all")
    git("commit", "--quiet", "--message=two")
    assert rate("main") == 3e-3 and rate("next/one") == 4e-3 and rate(first[:10]) == 3e-3
    assert rate("next/one", "recipes/deep.yaml") == 5e-3
    git("branch", "--force", "main", "next/one")
    assert rate("main") == 4e-3 and rate("v1") == 3e-3
    team.rename(tmp_path / "away")  # a commit that is here needs no network
    assert rate(first) == 3e-3
    assert "cannot be fetched" in problem(f"recipe={url}@main#mine.yaml")


def test_what_git_does_not_find(git: Callable[..., str], team: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"git+file://{team}"
    commit = git("rev-parse", "HEAD")[:12]
    form = "a recipe in a git repository is written git+https://HOST/REPOSITORY@REVISION#PATH/IN/IT.yaml."
    for address, said in {
        f"{url}#mine.yaml": form,
        f"{url}@v1": form,
        f"{url}@v1#../mine.yaml": form,
        f"git+ext://{team}@v1#mine.yaml": form,
        f"{url}@v2#mine.yaml": f"file://{team} has no branch, tag or commit v2; correct it.",
        f"{url}@--all#mine.yaml": f"file://{team} has no branch, tag or commit --all; correct it.",
        f"{url}@v1#mein.yaml": f"file://{team} has no file mein.yaml at {commit}; correct the path.",
        f"{url}x@v1#mine.yaml": f"cannot be fetched ('{team}x' does not appear to be a git repository); check the address and your access to it.",
    }.items():
        assert problem(f"recipe={address}") == f"recipe={address}: {said}"
    monkeypatch.setenv("PATH", "")
    address = f"{url}@main#mine.yaml"
    assert problem(f"recipe={address}").startswith(f"recipe={address}: needs git, which is not installed here")


# ------------------------------------------------------------------------------------------------------- freezing


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: list[str]) -> Path:
    """A run of four steps, its data named by no group of a team."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert engine.run([*base, f"run.dir={folder}"]) == 0
    return folder


def test_a_frozen_run_has_the_same_losses(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "frozen.yaml"
    assert recipes.main(["freeze", str(run), "--out", str(file)]) == 0
    assert engine.run([f"recipe={file}", f"run.dir={tmp_path / 'again'}"]) == 0
    assert len(losses(run)) == 4 and losses(tmp_path / "again") == losses(run)
    said = "as the recipe was frozen: data, weights, code and versions"
    assert said in (tmp_path / "again" / "log.txt").read_text()
    assert recipes.main(["check", "--locked", str(file)]) == 0
    assert engine.run([f"recipe={file}", f"run.dir={tmp_path / 'again'}"]) == 0  # finished


def test_a_frozen_run_says_what_no_longer_matches(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, rows = tmp_path / "frozen.yaml", tmp_path / "rows.jsonl"
    assert recipes.main(["freeze", str(run), "--out", str(file)]) == 0
    frozen = yaml.safe_load(file.read_text())
    rows.write_text("".join(Path(frozen["data"]["train_path"]).read_text().splitlines(keepends=True)[:16]))
    torch = frozen["lock"]["versions"]["torch"]
    frozen["lock"]["versions"] |= {"torch": "1.0", "elsewhere": "2"}
    frozen["lock"]["weights"], frozen["lock"]["code"] = "a" * 64, {"commit": "b" * 40, "sha256": "c" * 64}
    file.write_text(yaml.safe_dump(frozen))
    assert engine.run([f"recipe={file}", f"data.train_path={rows}", f"run.dir={tmp_path / 'run'}"]) == 0
    (said,) = [x for x in (tmp_path / "run" / "log.txt").read_text().splitlines() if "no longer" in x]
    for part in (
        "data train ",
        "weights aaaaaaaaaaaa → ",
        "code cccccccccccc (commit bbbbbbbbbbbb) → ",
        "elsewhere 2 → none",
    ):
        assert part in said
    assert f"torch 1.0 → {torch}" in said
    assert recipes.main(["check", str(file)]) == 0
    capsys.readouterr()
    assert recipes.main(["check", "--locked", str(file)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"no  {file}: ") and f"torch 1.0 → {torch}" in out and "weights" not in out
    assert recipes.main(["check", "--locked", "quickstart"]) == 1
    assert "came without a lock" in capsys.readouterr().out


def test_a_recipe_is_frozen_with_what_is_known(git: Callable[..., str], team: Path, tmp_path: Path) -> None:
    file = tmp_path / "frozen.yaml"
    address = f"git+file://{team}@v1#mine.yaml"
    assert recipes.main(["freeze", address, "--out", str(file)]) == 0
    lock = yaml.safe_load(file.read_text())["lock"]
    assert list(lock) == ["recipe", "code", "versions"] and git("rev-parse", "v1") in lock["recipe"]
    assert compose([f"recipe={file}", "run.dir=x"]).config == compose([f"recipe={address}", "run.dir=x"]).config


def test_freezing_pins_the_revisions_of_the_data(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    lock = json.loads((run / "lock.json").read_text())
    lock["samples"] = {"train": {"revision": "r1"}}
    (copy / "lock.json").write_text(json.dumps(lock))
    (copy / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    assert recipes.main(["freeze", str(copy), "--out", str(tmp_path / "frozen.yaml")]) == 0
    assert yaml.safe_load((tmp_path / "frozen.yaml").read_text())["data"]["revision"] == "r1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["freeze", "{run}", "--out", "{tmp}"], "exists already; remove it"),
        (["freeze", "{run}", "--out", "{tmp}/x.json"], "must end in .yaml"),
        (["freeze", "{run}", "--out", "/proc/x.yaml"], "cannot be written"),
        (["freeze", "{tmp}", "--out", "{tmp}/x.yaml"], "no recipe.yaml there"),
        (["freeze", "{run}"], "required: --out; see python -m engine.recipes --help"),
        (["freeze", "quikstart", "--out", "{tmp}/x.yaml"], "did you mean quickstart?"),
        (["show", "nowhere.yaml"], "no such file"),
        (["diff", "quickstart"], "required: B"),
        (["lst"], "no such command; there are list, show, diff, check, freeze"),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main([word.format(run=run, tmp=tmp_path) for word in words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------- the command


def test_list(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(ROOT / "recipes")
    here = lines.index(str(shared))
    assert lines[here + 1 :] == ["  groundwork", "  mine          Our own", "  cluster=ours", "  data=chats    Chats"]
    assert {line.split()[0] for line in lines[1:here]} == {file.stem for file in (ROOT / "recipes").glob("*.yaml")}


def test_show(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["show", "mine", "optimizer.eps=1e-6", "scheduler=wsd"]) == 0
    out = capsys.readouterr().out
    found = dict(map(str.strip, line.split("#")) for line in out.splitlines() if "#" in line)
    assert found["eps: 1.0e-06"] == "typed" and found["name: wsd"] == "conf/scheduler/wsd.yaml"
    assert found["lr: 0.003"] == f"{shared}/mine.yaml" and found["max_num_steps: 3"] == f"{shared}/groundwork.yaml"
    assert found["max_failures: 2"] == f"{shared}/cluster/ours.yaml"
    assert found["reader: messages"] == "conf/data/messages.yaml" and found["init: random"] == "conf/model/tiny.yaml"
    shown, resolved = yaml.safe_load(out), yaml.safe_load(compose(["recipe=mine"]).recipe)
    assert shown["data"] == resolved["data"] and "  seed: 0\n" in out


def test_diff(shared: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shared / "other.yaml").write_text("defaults: [mine]\noptimizer: {lr: 1e-2}\ndata: {train_on: all}\n")
    assert recipes.main(["diff", "mine", "other"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "data.train_on: all_assistant → all",
        "optimizer.lr: 0.003 → 0.01",
        "data, weights, code and versions are not compared: mine and other came without a lock",
    ]
    assert recipes.main(["diff", str(run), str(run)]) == 0
    assert capsys.readouterr().out == "no difference in values, data, weights, code and versions\n"
    frozen = tmp_path / "frozen.yaml"
    assert recipes.main(["freeze", str(run), "--out", str(frozen)]) == 0
    text = frozen.read_text()
    frozen.write_text(text.replace("max_num_steps: 4", "max_num_steps: 5").replace("hydra-core: 1", "hydra-core: 0"))
    capsys.readouterr()
    assert recipes.main(["diff", str(run), str(frozen)]) == 0
    steps, hydra = capsys.readouterr().out.splitlines()
    assert steps == "algorithm.max_num_steps: 4 → 5" and hydra.startswith("hydra-core: 1.") and " → 0." in hydra


def test_check(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["check", "mine", "quickstart"]) == 0
    assert capsys.readouterr().out == (
        "ok  mine: sft, builtin:tiny_llama, 1 rank\nok  quickstart: sft, builtin:tiny_llama, 1 rank\n"
    )
    (shared / "cluster" / "ours.yaml").unlink()
    (shared / "broken.yaml").write_text("a: [\n")
    (shared / "odd.yaml").write_text(
        "defaults: [{override /model: tiny}, {override /data: tasks}, {override /backend: megatron}]\n"
        "backend: {tensor_parallel: 8}\ncluster: {name: ray_local, gpus_per_node: 8}\noptimizer: {learning_rate: 1}\n"
    )
    assert recipes.main(["check", "broken", "mine", "odd", "quickstart"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"no  broken: {shared / 'broken.yaml'}: not readable as YAML")
    assert lines[1].startswith("no  mine: recipe=mine: cannot be composed (In 'config': Could not find 'cluster/ours'")
    assert "here it is optimizer.lr" in lines[2]
    assert "backend.tensor_parallel=8 does not divide" in lines[3]
    assert lines[4].startswith("ok  quickstart") and len(lines) == 5


def test_what_a_recipe_sweeps_over(shared: Path) -> None:
    assert swept(["recipe=mine", "run.dir=x"]) == ["optimizer.lr=1e-3,2e-3", "run.seed=1,2", "recipe=mine", "run.dir=x"]
    assert swept(["recipe=mine", "run.seed=7"]) == ["optimizer.lr=1e-3,2e-3", "recipe=mine", "run.seed=7"]
    assert swept(["model=tiny"]) == ["model=tiny"]


@pytest.mark.parametrize("words", [["list"], ["show", "mine"], ["diff", "mine", "quickstart"], ["check", "mine"]])
def test_neither_torch_nor_ray(shared: Path, words: list[str]) -> None:
    program = (
        "import sys; from engine import recipes; code = recipes.main(sys.argv[1:]); "
        "print('loaded:', *sorted({'torch', 'ray', 'transformers'} & set(sys.modules))); sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
