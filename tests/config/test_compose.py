"""What a user may type, and the sentence that answers what he may not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.config.checks import check
from engine.config.compose import compose, known_keys, needs_quickstart, parse, quoted, with_quickstart
from engine.config.help import docstrings, text
from engine.config.names import FOREIGN_NAMES
from engine.config.places import library
from engine.config.schema import RunConfig, Section
from engine.errors import UserError
from tests.conftest import ROOT

TINY = ["model=tiny", "data=tasks"]


def problems(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        compose([*TINY, *overrides])
    return list(refused.value.problems)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("optimizer.lrr=1", "there is no key optimizer.lrr; did you mean optimizer.lr?"),
        ("optimiser.lr=1", "there is no key optimiser.lr; did you mean optimizer.lr?"),
        ("+optimizer.momentum=1", "there is no key optimizer.momentum"),
        ("++data.max_lenght=3", "did you mean data.max_length?"),
        ("lr=1", "did you mean optimizer.lr?"),
        ("model.lora.rnak=4", "there is no key model.lora.rnak; did you mean model.lora.rank?"),
        ("learning_rate=1", "here it is optimizer.lr"),
        ("train.learning_rate=1", "here it is optimizer.lr"),
        ("per_device_train_batch_size=1", "here it is train.global_batch_size"),
        ("policy.model_name=x", "here it is model.path"),
        ("train_data_path=x", "here it is data.train_path"),
        ("gradient_checkpointing=true", "here it is model.recompute=full"),
        ("dataset=alpaca", "here it is data"),
        ("optimizer.lr=fast", "must be a valid number"),
        ("optimizer.lr=-1", "must be greater than 0"),
        ("optimizer.lr=null", "must be a valid number"),
        ("optimizer.betas=[0.9,1.0]", "must be less than 1"),
        ("train.global_batch_size=1.5", "must be a valid integer"),
        ("train.global_batch_size=true", "must be a number"),
        ("train.max_grad_norm=true", "must be a number"),
        ("algorithm.max_num_epochs=inf", "must be a finite number"),
        ("algorithm.val_period=5 data.val_path=null", "need validation data: set data.val_path"),
        ("train.micro_batch_size=4", "are for padded micro-batches"),
        ("data.packing.max_tokens=999 data.packing.enabled=false", "is for packed micro-batches"),
        ("scheduler.min_lr=1e-7 scheduler=constant", "does nothing with scheduler=constant"),
        ("model.revision=main", "is a folder, which has no revisions"),
        ("policy.optimizer.lr=1", "did you mean optimizer.lr?"),
        ("train.global_batch_size=0", "must be greater than or equal to 1"),
        ("data.overlong=dropp", "must be 'drop', 'truncate' or 'error'; did you mean drop?"),
        ("data.packing=true", "is a group of keys, not a value"),
        ("scheduler=cosinus", "no such choice; did you mean cosine?"),
        ("model=lama3_8b", "no such choice; did you mean llama3_8b?"),
        ("model=[tiny]", "model=NAME chooses one of"),
        ("recipe=quikstart", "did you mean quickstart?"),
        ("recipe=nowhere.yaml", "no such file"),
        ("~optimizer.lr", "set optimizer.lr=null instead"),
        ("optimizer.lr=1,2", "several values need -m"),
        ("optimizer.lr", "write key=value"),
        ("run.name='a b", "not an override"),
        ("run.name=../x", "must be letters, digits, dots, dashes and underscores"),
        ("run.callbacks=[nocolon]", "not of the form module:Class"),
        ("run.resume=/no/where", "must be auto, never, or a run or checkpoint folder that exists"),
        ("model.path=./nowhere", "no such folder"),
        ("model.path=builtin:huge", "there is builtin:tiny_llama"),
        ("data.train_path=nowhere.jsonl", "no such file or folder"),
        ("data.max_length=2048", "reads at most 1024 tokens; set data.max_length=1024 or lower"),
        ("data.packing.max_tokens=100", "smaller than data.max_length"),
        ("algorithm.max_num_epochs=null", "set one of them"),
        ("scheduler.warmup_steps=3 scheduler.warmup_ratio=0.1", "set one of them to null"),
        ("scheduler.decay_steps=3", "is for scheduler=wsd"),
        ("scheduler.min_lr=1", "is above optimizer.lr"),
        ("run.name=${oc.env:NO_SUCH_VARIABLE}", "run.dir, run.name: cannot be resolved"),
        ("model.dtype=${nowhere.key}", "model.dtype: cannot be resolved"),
    ],
)  # fmt: skip
def test_one_sentence_with_the_remedy(override: str, answer: str) -> None:
    words = [override] if "'" in override or "run.name" in override else override.split(" ")
    (found,) = problems(*words)
    assert answer in found
    key = words[0].lstrip("+~").split("=")[0]
    assert key in found


def test_every_problem_at_once() -> None:
    found = problems(
        "model=tinny", "optimizer.lrr=1", "data.overlong=x", "train.global_batch_size=none", "scheduler=wrong"
    )
    assert len(found) == 5
    found = problems("optimizer.lrr=1", "data.train_path=nowhere.jsonl", "data.max_length=4096")
    assert len(found) == 3


def test_the_example_in_the_readme() -> None:
    with pytest.raises(UserError) as refused:
        compose(["model=tinny", "optimizer.learning_rate=1e-4", "data.train_path=chat.jsonl"])
    shown = [
        line.removeprefix("error: ")
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("error: ")
    ]
    here = str(Path.cwd())
    assert sorted(p.replace(here, "/home/you/project") for p in refused.value.problems) == sorted(shown)


def test_what_cannot_be_searched_is_answered(tmp_path: Path) -> None:
    """Paths below a folder that this user may not search."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    config = compose(TINY).config
    data = config.data.model_copy(update={"train_path": f"{closed}/x.jsonl"})
    model = config.model.model_copy(update={"path": f"{closed}/model"})
    run = config.run.model_copy(update={"dir": f"{closed}/run"})
    user = os.geteuid()
    os.seteuid(65534) if user == 0 else closed.chmod(0)
    try:
        found = check({"data": data, "checkpoint": config.checkpoint, "model": model, "run": run})
    finally:
        os.seteuid(user)
        closed.chmod(0o700)
    said = "\n".join(found)
    assert f"data.train_path={closed}/x.jsonl: no such file or folder" in said
    assert f"model.path={closed}/model: no such folder" in said


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_data_of_ones_own_bring_nothing_of_the_default_set(algorithm: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("{}\n")
    mine = f"{tmp_path}/mine.jsonl"
    for words in ([f"data.train_path={mine}"], [f"data.train=[{{path: '{mine}'}}]"]):
        data = compose(["model=tiny", f"algorithm={algorithm}", *words]).config.data
        assert (data.reader, data.val_path, data.train_split, data.val_split) == (None, None, "train", "validation")
    chosen = compose(["model=tiny", f"algorithm={algorithm}", "data=response", f"data.train_path={mine}"]).config.data
    assert chosen.reader == "response"
    assert compose(["model=tiny", "recipe=quickstart", f"data.train_path={mine}"]).config.data.reader == "messages"
    recipe = tmp_path / "mine.yaml"
    head = f"defaults: [override /algorithm: {algorithm}, override /model: tiny]"
    recipe.write_text(f"{head}\ndata: {{train_path: {mine}}}\n")
    data = compose([f"recipe={recipe}"]).config.data
    assert (data.reader, data.val_path, data.train_split) == (None, None, "train")
    assert compose([f"recipe={recipe}", "data=response"]).config.data.reader == "response"
    for data_of_it, sentence in (
        ("3", "is a group of keys, not a value"),
        ("{train_path: '${oc.env:NO_SUCH_VARIABLE}'}", "data.train_path: cannot be resolved"),
    ):
        recipe.write_text(f"{head}\ndata: {data_of_it}\n")
        with pytest.raises(UserError, match=sentence):
            compose([f"recipe={recipe}"])


def test_longest_sample_by_default_is_what_the_model_reads(tmp_path: Path) -> None:
    assert compose(TINY).config.data.max_length == 256
    assert compose(["model=tiny", "data.train_path=someone/set"]).config.data.max_length == 1024
    assert compose(["model=llama3_1b"]).config.data.max_length == 4096


@pytest.mark.parametrize(
    ("sizes", "answer"),
    [
        (["train.global_batch_size=10", "train.micro_batch_size=4"], "nearest batch sizes are 8 and 12"),
        (
            ["algorithm.val_global_batch_size=7", "train.micro_batch_size=2"],
            "algorithm.val_global_batch_size=7 is not divisible",
        ),
    ],
)
def test_batch_sizes_that_do_not_divide(sizes: list[str], answer: str) -> None:
    assert any(answer in p for p in problems("data.packing.enabled=false", *sizes))


def test_missing_choices_are_named() -> None:
    with pytest.raises(UserError, match=r"model.path is not set: choose a model, such as model=tiny"):
        compose(["data=tasks"])
    with pytest.raises(UserError, match=r"data.train_path is not set: give the training data"):
        compose(["model=tiny", "data=messages"])


def test_model_folder_without_weights_or_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as refused:
        compose(["data=tasks", f"model.path={tmp_path}"])
    words = str(refused.value)
    assert "no *.safetensors weights there" in words and "no tokenizer.json there" in words


def test_unwritable_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file; choose another folder" in problems(f"run.dir={tmp_path}/file/run")[0]
    if os.getuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "not writable" in problems(f"run.dir={tmp_path}/closed/run")[0]
    import engine

    with pytest.raises(UserError, match=r"run.dir=/proc/run: (cannot be made|/proc is not writable)"):
        engine.run([*TINY, "run.dir=/proc/run"])


def test_recipe_problems_name_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optimizer: {lrr: 1}\ntrain: {max_grad_norm: much}\n")
    found = problems(f"recipe={recipe}")
    assert len(found) == 2 and all(str(recipe) in p for p in found)
    recipe.write_text("defaults:\n  - override /scheduler: nowhere\n")
    assert "cannot be composed" in problems(f"recipe={recipe}")[0]
    recipe.write_text("a: [\n")
    assert "not readable as YAML" in problems(f"recipe={recipe}")[0]


def test_precedence(tmp_path: Path) -> None:
    """Defaults < algorithm < groups < recipe < groups typed < keys typed."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults:\n  - override /model: tiny\n  - override /data: tasks\n  - override /scheduler: cosine\n"
        "optimizer: {lr: 2e-3}\nmodel: {dtype: float32, path: somewhere/else}\ndata: {max_length: 99}\n"
    )
    config = compose([f"recipe={recipe}", "model=tiny", "data.max_length=77"]).config
    assert config.optimizer.lr == 2e-3 and config.scheduler.name == "cosine"
    assert config.model.path == "builtin:tiny_llama" and config.model.dtype == "float32"
    assert config.data.max_length == 77
    assert compose([*TINY]).config.optimizer.lr == 1e-5


def test_recipe_found_by_name_on_a_path_and_duplicates_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours.yaml").write_text("optimizer: {lr: 3e-4}\n")
    monkeypatch.setenv("ANNEAL_RECIPE_PATH", str(tmp_path))
    assert compose([*TINY, "recipe=ours"]).config.optimizer.lr == 3e-4
    (tmp_path / "quickstart.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"recipe=quickstart is defined in .* and in"):
        compose([*TINY, "recipe=ours"])
    monkeypatch.setenv("ANNEAL_RECIPE_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"ANNEAL_RECIPE_PATH: .* is not a folder"):
        compose(TINY)


def test_recipe_yaml_repeats_the_run_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "hunter2")
    (tmp_path / "base.yaml").write_text(
        "run: {name: '${oc.env:MY_SECRET}'}\noptimizer: {lr: 5e-4, betas: [0.8, 0.9]}\n"
    )
    through = "model.template_args={x: 1, y: '${run.name}'}"
    first = compose([*TINY, f"recipe={tmp_path}/base.yaml", f"run.dir={tmp_path}/run", through])
    assert first.config.model.template_args["y"] == "hunter2"
    assert first.config.run.name == "hunter2"
    assert "hunter2" not in first.recipe and "${oc.env:MY_SECRET}" in first.recipe
    dumped = yaml.safe_load(first.recipe)
    assert "dir" not in dumped["run"] and "resume" not in dumped["run"]
    (tmp_path / "recipe.yaml").write_text(first.recipe)
    second = compose([f"recipe={tmp_path}/recipe.yaml", f"run.dir={tmp_path}/run"])
    assert second.config == first.config and second.recipe == first.recipe


def test_quickstart_only_when_nothing_is_chosen() -> None:
    assert with_quickstart([]) == ["recipe=quickstart"]
    assert with_quickstart(["optimizer.lr=1"]) == ["optimizer.lr=1", "recipe=quickstart"]
    for chosen in ("model=tiny", "data=tasks", "recipe=x", "model.path=x", "data.train_path=x"):
        assert with_quickstart([chosen]) == [chosen]


def test_quickstart_of_dpo_starts_from_the_newest_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["algorithm=dpo"], ["recipe=quickstart_dpo"]):
        started = with_quickstart(words)
        assert started == ["recipe=quickstart_dpo"] and needs_quickstart(started)
    hf = tmp_path / "outputs" / "quickstart-1" / "hf"
    hf.mkdir(parents=True)
    (hf / "config.json").write_text("{}")
    for words in (["algorithm=dpo"], ["recipe=quickstart_dpo"]):
        started = with_quickstart(words)
        assert started == ["recipe=quickstart_dpo", "model.path=outputs/quickstart-1/hf", "model.init=pretrained"]
        assert with_quickstart(started) == started and not needs_quickstart(started)
    own = ["recipe=quickstart_dpo", "model.path=mine"]
    assert with_quickstart(own) == own and not needs_quickstart(own)


def test_every_choice_and_recipe_composes() -> None:
    for model in library().choices["model"]:
        config = compose([f"model={model}", "data.max_length=512"]).config
        assert config.data.train_path == "allenai/tulu-3-sft-mixture" and config.optimizer.lr == 1e-5
    for scheduler in ("constant", "linear", "cosine", "wsd"):
        assert compose([*TINY, f"scheduler={scheduler}"]).config.scheduler.name == scheduler
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        compose([f"recipe={recipe.stem}"])


def test_foreign_names_point_at_keys_that_exist() -> None:
    known = set(known_keys())
    for foreign, here in FOREIGN_NAMES.items():
        first = here.replace(",", " ").split()[0].split("=")[0]
        assert first in known, foreign
        assert foreign not in known


def test_help_shows_every_key_with_default_and_meaning() -> None:
    page = text()
    leaves = [k for k in known_keys() if not any(o.startswith(k + ".") for o in known_keys())]
    for key in leaves:
        assert f"  {key.replace('validation[]', 'train[]')} = " in page
    assert "data.overlong = drop  [drop | truncate | error]\n      What happens to a sample longer" in page

    def sections(model: type[Section]) -> list[type[Section]]:
        inner = [f.annotation for f in model.model_fields.values()]
        return [model, *(s for t in inner if isinstance(t, type) and issubclass(t, Section) for s in sections(t))]

    for section in sections(RunConfig)[1:]:
        assert section.__doc__ and docstrings(section).keys() == section.model_fields.keys() - _groups(section)


def _groups(section: type[Section]) -> set[str]:
    fields = section.model_fields.items()
    documented = docstrings(section)
    return {
        n
        for n, f in fields
        if isinstance(f.annotation, type) and issubclass(f.annotation, Section) and n not in documented
    }


@pytest.mark.parametrize(
    ("words", "code"), [(["optimizer.lrr=1"], 2), (["--help"], 0), (["data.train_path=nowhere.jsonl", "model=tiny"], 2), (["--cfg"], 0)]
)  # fmt: skip
def test_answers_at_once_and_without_torch(words: list[str], code: int) -> None:
    program = "import sys, time; from engine.__main__ import main; code = main(sys.argv[1:]); print('torch' in sys.modules, time.process_time()); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == code
    torch, spent = done.stdout.splitlines()[-1].split()
    assert torch == "False"
    assert float(spent) < 4.0  # of this process's own time: half a second, and a heavy import would be several
    assert (code == 0) == (done.stderr == "") and "Traceback" not in done.stderr


def test_unknown_flag() -> None:
    from engine.__main__ import main

    assert main(["--resume"]) == 2


def test_wheel_carries_conf_and_recipes(tmp_path: Path) -> None:
    """An installed wheel finds its groups, recipes and assets."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(ROOT),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if "hatchling" in done.stderr and "No module" in done.stderr:
        pytest.skip("hatchling is not installed")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(tmp_path / "site")], check=True)
    program = (
        "import json, engine; from engine.config.compose import compose; from engine.config.places import resource; "
        "from engine.recipes import main; assert main(['show', 'quickstart_dpo']) == 0; "
        "print(json.dumps([engine.__file__, str(resource('conf')), compose(['recipe=quickstart']).config.model.path]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    )  # fmt: skip
    module, conf, path = json.loads(out.stdout.splitlines()[-1])
    assert (tmp_path / "site" / "engine" / "assets" / "tiny_llama" / "tokenizer.json").is_file()
    assert (
        module.startswith(str(tmp_path))
        and conf == str(tmp_path / "site" / "engine" / "conf")
        and path == "builtin:tiny_llama"
    )


@pytest.mark.parametrize(
    "text",
    ["/runs/a-b_1.2", "a b", "it's", 'a "b" (c), d=e', "a\\b", "a\\'b", "end\\", "end\\\\", "/é", "~/a", "null", "1e3", "${a}", "git+x#y", ""],
)  # fmt: skip
def test_any_text_is_read_as_it_is_once_quoted(text: str) -> None:
    assert parse([f"run.dir={quoted(text)}"])[0].value() == text
    assert text != "/runs/a-b_1.2" or quoted(text) == text
