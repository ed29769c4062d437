"""What the keys of an algorithm say about each other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import checks
from engine.config.compose import compose
from engine.config.help import docstrings
from engine.config.schema import AlgorithmSection
from engine.errors import UserError

WORDS = ["model=tiny", "data=tasks"]


def problems(*words: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        compose([*WORDS, *words])
    return list(refused.value.problems)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("preference_loss=sigmoyd", "algorithm.preference_loss=sigmoyd: no such loss, and no module:function of your own; did you mean sigmoid?"),
        ("preference_loss=kto_pair_x", "choose one of sigmoid, ipo, hinge, robust, simpo, orpo."),
        ("preference_loss=mine:", "is not of the form module:function"),
        ("preference_loss=null", "algorithm.preference_loss is not set"),
        ("reference_policy_kl_penalty=0", "must be greater than 0"),
        ("label_smoothing=0.1 preference_loss=ipo", "is for the losses sigmoid and robust, not ipo: set it to 0"),
        ("label_smoothing=0.5", "must be less than 0.5"),
        ("preference_margin=0.5", "is for the loss simpo, not sigmoid: set it to 0"),
        ("reference=none", "the loss sigmoid needs a reference; set algorithm.reference=initial, or choose algorithm.preference_loss=simpo or orpo"),
        ("reference=inital", "owner/name; did you mean initial?"),
        ("reference=./nowhere preference_loss=a:b", "a model folder (no config.json there)"),
        ("reference=builtin:tiny_llama", "no *.safetensors weights there; give the folder of a model that has some"),
        ("preference_loss_weight=0", "are both 0: nothing would be trained"),
        ("beta=0.1", "here it is algorithm.reference_policy_kl_penalty"),
        ("loss_type=ipo", "here it is algorithm.preference_loss"),
    ],
)  # fmt: skip
def test_one_sentence_with_the_remedy(words: str, answer: str) -> None:
    (found,) = problems("algorithm=dpo", *(f"algorithm.{w}" for w in words.split()))
    assert answer in found and found.startswith("algorithm.")


@pytest.mark.parametrize(
    "words",
    [
        "preference_loss=robust label_smoothing=0.2",
        "preference_loss=robust",
        "preference_loss=simpo preference_margin=0.5",
        "preference_loss=simpo reference=none",
        "preference_loss=orpo",
        "preference_loss=orpo reference=./nowhere",
        "preference_loss=mine:loss reference=none label_smoothing=0.1 preference_margin=2",
        "reference=someone/model",
        "preference_loss_weight=0 sft_loss_weight=1",
    ],
)
def test_what_goes_together(words: str) -> None:
    given = dict(w.split("=") for w in words.split())
    algorithm = compose([*WORDS, "algorithm=dpo", *(f"algorithm.{w}" for w in words.split())]).config.algorithm
    assert {key: str(getattr(algorithm, key)) for key in given} == {
        key: str(float(value)) if value[0].isdigit() else value for key, value in given.items()
    }


def test_pairs_must_fit() -> None:
    (found,) = problems("algorithm=dpo", "data.max_length=64", "data.packing.max_tokens=100")
    assert "smaller than two samples of data.max_length=64" in found and "set it to 128 or more" in found
    (found,) = problems("algorithm=dpo", "data.max_length=64", "data.packing.max_tokens=63")
    assert "smaller than data.max_length=64" in found
    compose([*WORDS, "algorithm=dpo", "data.max_length=64", "data.packing.max_tokens=128"])
    compose([*WORDS, "data.max_length=64", "data.packing.max_tokens=100"])


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def swap_two_tokens(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


@pytest.mark.parametrize(
    ("file", "change", "answer"),
    [
        ("config.json", lambda c: c.update(max_position_embeddings=100), "reads at most 100 tokens, less than data.max_length=128; set data.max_length=100"),
        ("config.json", lambda c: c.update(vocab_size=200), "has a vocabulary of 200, and the tokenizer ids up to 2"),
        ("tokenizer.json", swap_two_tokens, "has another tokenizer than the policy; 2 of "),
        ("tokenizer.json", lambda t: t["added_tokens"].pop(), "1 of 264 ids differ (263 is "),
        ("config.json", lambda c: c.update(vocab_size=1024), None),  # padded to another size: every id means the same
        ("tokenizer.json", lambda t: t.update(padding=None, truncation=None), None),
    ],
)  # fmt: skip
def test_a_reference_must_fit_the_policy(
    tmp_path: Path, file: str, change: Callable[[dict[str, Any]], Any], answer: str | None
) -> None:
    folder = tmp_path / "reference"
    shutil.copytree(checks.ASSETS / "tiny_llama", folder)
    (folder / "model.safetensors").touch()
    rewrite(folder / file, change)
    words = ["algorithm=dpo", f"algorithm.reference={folder}", "data.max_length=128"]
    if answer is None:
        compose([*WORDS, *words])
        return
    (found,) = problems(*words)
    assert found.startswith(f"algorithm.reference={folder}: ") and answer in found
    compose([*WORDS, *words, "algorithm.preference_loss=orpo"])  # which looks at no reference


def test_without_a_tokenizer_the_size_of_the_vocabulary_tells(tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    shutil.copytree(checks.ASSETS / "tiny_llama", folder)
    (folder / "model.safetensors").touch()
    (folder / "tokenizer.json").unlink()
    words = ["algorithm=dpo", f"algorithm.reference={folder}"]
    compose([*WORDS, *words])
    rewrite(folder / "config.json", lambda c: c.update(vocab_size=999))
    (found,) = problems(*words)
    assert "has a vocabulary of 999, and the policy of " in found and "the same tokenizer" in found


def test_keys_of_dpo_with_sft() -> None:
    found = problems("algorithm.reference=initial", "algorithm.sft_loss_weight=0")
    assert sorted(found) == [
        f"algorithm.{key} is for algorithm=dpo: set it to null, or choose algorithm=dpo."
        for key in ("reference", "sft_loss_weight")
    ]


def test_keys_of_dpo_are_those_described_so() -> None:
    described = [name for name, said in docstrings(AlgorithmSection).items() if said.startswith("dpo:")]
    assert tuple(described) == checks.DPO_KEYS


def test_checks_do_not_import_torch() -> None:
    code = "import sys; from engine.config.compose import compose; compose(['model=tiny', 'data=tasks', 'algorithm=dpo']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
