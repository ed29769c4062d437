"""The reference's log-probabilities: what they are kept under, when they are believed, and what happens to them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import cache as command
from engine import fingerprint, hub
from engine.backends.torch_backend import TorchBackend
from engine.config.compose import compose
from engine.data.assemble import assemble
from engine.data.loader import train_loader
from engine.errors import RunError, UserError
from engine.ranks import Ranks
from engine.reference import attach, store
from engine.reference.store import Store
from tests.conftest import read_metrics
from tests.test_dpo import CHECK, losses, run, run_on_two_ranks

Start = Callable[..., subprocess.Popen[str]]


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def kept(cache: Path) -> Path:
    """The one folder of a reference in a cache."""
    (file,) = (cache / "reference").glob("*/sums.bin")
    return file.parent


@pytest.fixture
def another_model(model_folder: Path, tmp_path: Path) -> Path:
    """The model with other weights."""
    folder = tmp_path / "another"
    shutil.copytree(model_folder, folder)
    nudge(folder, 1.5)
    return folder


def nudge(folder: Path, factor: float) -> None:
    """Change one weight matrix of a model."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"] *= factor
    save_file(weights, file, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------------- the key


class Documents(list[int]):
    """What a key is to be made of."""

    fingerprint = ""


def key_of(words: list[str], tmp_path: Path, weights: str = "w") -> dict[str, Any]:
    config = compose([*words, f"run.dir={tmp_path / 'none'}"]).config
    held = attach._Pass(
        config=config, weights=weights, scorer=lambda: pytest.fail(), root=tmp_path, ranks=Ranks(), say=print
    )
    samples: Any = Documents()
    samples.fingerprint = "f"
    return held._key(samples)


@pytest.mark.parametrize(
    "word",
    [
        "model.attention=sdpa",
        "model.compile=true",
        "model.dtype=bfloat16",
        "model.config_overrides={attention_dropout: 0.5}",
        "run.deterministic=true",
    ],
)
def test_what_changes_the_arithmetic_is_in_the_key(dpo: list[str], tmp_path: Path, word: str) -> None:
    assert key_of([*dpo, word], tmp_path) != key_of(dpo, tmp_path)


def test_code_and_libraries_are_in_the_key_and_the_loss_is_not(
    dpo: list[str], tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key_of(dpo, tmp_path)
    assert key_of([*dpo, "algorithm.preference_loss=ipo", "optimizer.lr=1e-5"], tmp_path) == before
    assert [folder.name for folder in attach.COMPUTED_BY] == ["backends", "kernels"]
    assert before["libraries"]["torch"] and before["libraries"]["transformers"]
    code = fingerprint.ROOT / "kernels"
    assert fingerprint.code([code]) == fingerprint.code([code]) != fingerprint.code(attach.COMPUTED_BY)
    assert before["code"] == fingerprint.code(attach.COMPUTED_BY)
    own = tmp_path / "own"
    shutil.copytree(model_folder, own)
    words = [*dpo, f"model.path={own}", "model.trust_remote_code=true"]
    (own / "modeling.py").write_text("a = 1\n")
    first = key_of(words, tmp_path)
    (own / "modeling.py").write_text("a = 2\n")
    assert key_of(words, tmp_path) != first != before


def test_weights_are_known_by_their_bytes_and_not_by_their_times(
    dpo: list[str], tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    shutil.copytree(model_folder, own)
    config = compose([*dpo, f"model.path={own}", f"run.dir={tmp_path / 'none'}"]).config
    (file,) = own.glob("*.safetensors")
    content = bytearray(file.read_bytes())

    def after(place: int) -> str:
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        found = fingerprint.weights(config.model, config.run.seed)
        file.write_bytes(content)
        return found

    before = fingerprint.weights(config.model, config.run.seed)
    os.utime(file, (1, 1))
    assert fingerprint.weights(config.model, config.run.seed) == before
    rng = np.random.default_rng(0)
    assert all(after(int(place)) != before for place in rng.integers(0, len(content), 20))
    monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "BLOCK", 64)
    sampled, header = fingerprint.weights(config.model, config.run.seed), int.from_bytes(content[:8], "little")
    assert header > 64 * 8
    for place in (8, 8 + header // 2, 7 + header, len(content) - 1):  # the whole header, and the last byte
        assert after(place) != sampled


# ------------------------------------------------------------------------------------------ what is there, and believed


def test_records_of_other_weights_are_noticed_and_computed_again(
    dpo: list[str], tmp_path: Path, passes: list[int]
) -> None:
    """They pass their own check: only the model itself can tell."""
    first = run(dpo, tmp_path / "first")
    held = Store(kept(tmp_path / "cache"), 80)
    right = held.read(np.arange(80))
    held.write(np.arange(80), right - np.float32(0.5))
    passes.clear()
    assert run(dpo, tmp_path / "second") == first
    said = log(tmp_path / "second")
    assert re.search(
        r"reference: \S+sums.bin is stale \(answer \d+ of train: -[\d.]+, and now -[\d.]+\); all that", said
    )
    assert "computing 80 of 80" in said and sum(passes) == 80 + 2 * CHECK
    assert (held.read(np.arange(80)) == right).all()


def test_what_rounding_explains_is_believed(dpo: list[str], tmp_path: Path) -> None:
    run(dpo, tmp_path / "first")
    held = Store(kept(tmp_path / "cache"), 80)
    held.write(np.arange(80), held.read(np.arange(80)) * np.float32(1.0002))
    run(dpo, tmp_path / "second")
    assert "reference: all 80" in log(tmp_path / "second")


def test_another_models_file_counts_for_nothing(dpo: list[str], tmp_path: Path, another_model: Path) -> None:
    first = run(dpo, tmp_path / "first")
    ours = kept(tmp_path / "cache")
    elsewhere = tmp_path / "elsewhere"
    run(dpo, tmp_path / "other", f"model.path={another_model}", f"data.cache_dir={elsewhere}")
    shutil.copy(kept(elsewhere) / "sums.bin", ours / "sums.bin")
    assert run(dpo, tmp_path / "second") == first
    said = log(tmp_path / "second")
    assert "reference: 80 records in" in said and "damaged or another model's do not count" in said
    assert "computing 80 of 80" in said


def test_what_cannot_be_read_is_named(dpo: list[str], tmp_path: Path) -> None:
    run(dpo, tmp_path / "first")
    file = kept(tmp_path / "cache") / "sums.bin"
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"sums.bin: the reference's log-probabilities cannot be read there \(Is a dir"):
        run(dpo, tmp_path / "second")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(dpo: list[str], tmp_path: Path) -> None:
    run(dpo, tmp_path / "first")
    (kept(tmp_path / "cache") / "sums.bin").chmod(0)
    with pytest.raises(UserError, match=r"cannot be read there \(Permission denied\)"):
        run(dpo, tmp_path / "second")


def test_what_is_there_needs_no_lock_and_no_right_to_write(
    dpo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(dpo, tmp_path / "first")
    opened, refuse = os.open, OSError(errno.EROFS, os.strerror(errno.EROFS))

    def read_only(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if str(path).startswith(str(tmp_path / "cache")) and flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise refuse
        return opened(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(refuse))
    assert run(dpo, tmp_path / "second") == first
    with pytest.raises(UserError, match=r"data.cache_dir=\S+cache: \S+ is no folder that can be written to"):
        run(dpo, tmp_path / "third", "algorithm.reference_policy_kl_penalty=0.2", "model.attention=sdpa")


def test_others_may_share_what_the_cache_shares(dpo: list[str], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(0o775)
    before = os.umask(0o077)
    try:
        run(dpo, tmp_path / "run")
    finally:
        os.umask(before)
    folder = kept(root)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (folder.parent, folder)] == [0o775] * 2
    assert [stat.S_IMODE((folder / name).stat().st_mode) for name in ("sums.bin", "meta.json")] == [0o664] * 2
    assert stat.S_IMODE(folder.with_name(f"{folder.name}.lock").stat().st_mode) == 0o666


def test_a_full_disk_is_said(dpo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fills up after some records; they count once there is space."""
    written, monkey = [0], pytest.MonkeyPatch()
    put = os.pwrite

    def full(descriptor: int, content: bytes, place: int) -> int:
        if written[0] + len(content) > 164:
            content = content[: 164 - written[0]]
        if not content:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written[0] += len(content)
        return put(descriptor, content, place)

    monkey.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match=r"sums.bin: the disk is full; free some space") as error:
        run(dpo, tmp_path / "run")
    monkey.undo()
    assert error.value.exit_code == 1
    assert Store(kept(tmp_path / "cache"), 80).count()[0] == 20
    run(dpo, tmp_path / "run")
    assert "computing 60 of 80" in log(tmp_path / "run")


def test_a_real_full_disk_is_an_error_and_no_signal(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        held = Store(disk / "key", 100_000)
        held.begin({})
        with pytest.raises(RunError, match="the disk is full"):
            held.write(np.arange(100_000), np.zeros(100_000, np.float32))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_is_not_kept_never_comes_to_training(
    dpo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "write", lambda *_: None)
    with pytest.raises(RunError, match="does not keep what is written to it"):
        run(dpo, tmp_path / "run")


def test_rebuild_computes_anew_and_off_keeps_nothing_in_the_cache(
    dpo: list[str], tmp_path: Path, passes: list[int], pairs_file: Path
) -> None:
    held_out = ["data.val_fraction=0.3", "algorithm.val_at_end=true"]  # two sets of one source
    first = run(dpo, tmp_path / "first", *held_out)
    count = sum(passes)
    passes.clear()
    assert run(dpo, tmp_path / "second", *held_out, "data.cache=rebuild") == first
    assert sum(passes) == count > 60
    assert Store(kept(tmp_path / "cache"), 80).count() == (
        count,
        0,
    )  # the second set has not done away with the first's
    passes.clear()
    assert run(dpo, tmp_path / "third", *held_out, "data.cache=off", f"data.cache_dir={tmp_path / 'no'}") == first
    assert sum(passes) == count and kept(tmp_path / "third") and not (tmp_path / "no").exists()


def test_progress_is_a_line_now_and_then(dpo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(folder: Path) -> list[str]:
        return [line.partition("reference: ")[2] for line in log(folder).splitlines() if "reference: " in line]

    run(dpo, tmp_path / "short")
    start, end = said(tmp_path / "short")
    assert start == "computing 80 of 80 log-probabilities of train"
    assert re.fullmatch(r"80 log-probabilities of train computed in \d+\.\d s", end)
    first, *others = read_metrics(tmp_path / "short")
    assert first["timing/reference_s"] > 0 and not any("timing/reference_s" in line for line in others)
    monkeypatch.setattr(attach, "PERIOD_S", 0.0)
    monkeypatch.setattr(attach, "CHUNK", 32)
    run(dpo, tmp_path / "long", f"data.cache_dir={tmp_path / 'other'}")
    _, *between, _ = said(tmp_path / "long")
    assert [line.partition(",")[0] for line in between] == ["32 of 80 (40%)", "64 of 80 (80%)"]
    assert all(re.search(r"\), [\d,]+ a second$", line) for line in between)


# ------------------------------------------------------------------------------------------------------------- layouts


def test_a_reference_in_padded_batches_is_the_packed_one(
    dpo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(dpo, tmp_path / "packed")
    masks: list[bool] = []
    plain = TorchBackend.sequence_logprobs

    def watched(self: TorchBackend, batch: Any) -> Any:
        masks.append(batch.attention_mask is not None)
        return plain(self, batch)

    monkeypatch.setattr(TorchBackend, "sequence_logprobs", watched)
    padded = ["data.packing.enabled=false", "train.micro_batch_size=4", f"data.cache_dir={tmp_path / 'other'}"]
    run(dpo, tmp_path / "padded", *padded)
    assert masks and all(masks)
    ours, theirs = (Store(kept(tmp_path / name), 80).read(np.arange(80)) for name in ("cache", "other"))
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_deterministic_sums_do_not_depend_on_the_layout(dpo: list[str], tmp_path: Path, passes: list[int]) -> None:
    """A pair goes through the model by itself, so who else was to be computed does not matter either."""
    words = [*dpo, "run.deterministic=true"]
    try:
        run(words, tmp_path / "first")
        assert passes == [2] * 40
        narrow = ["data.packing.max_tokens=512", f"data.cache_dir={tmp_path / 'other'}"]
        run(words, tmp_path / "half", *narrow, "algorithm.max_num_steps=2")
        run(words, tmp_path / "second", *narrow)
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = kept(tmp_path / "cache"), kept(tmp_path / "other")
    assert one.name == other.name and (one / "sums.bin").read_bytes() == (other / "sums.bin").read_bytes()


@pytest.mark.parametrize("packed", [True, False])
def test_batches_of_some_conversations_are_whole_and_shared_out(dpo: list[str], tmp_path: Path, packed: bool) -> None:
    words = [*dpo, f"run.dir={tmp_path / 'none'}", *([] if packed else ["data.packing.enabled=false"])]
    config = compose(words).config
    data = assemble(config, tmp_path, lambda text: None).train
    documents = np.array([0, 1, 6, 7, 8, 9, 30, 31, 78, 79])
    for apart in (False, True):
        found = [
            train_loader(
                data, config.data, batch_size=8, micro_batch_size=2, seed=0, rank=r, ranks=2, together=2
            ).batches(documents, apart=apart)
            for r in range(2)
        ]
        assert len(found[0]) == len(found[1])
        at = [indices for of_rank in found for indices, _ in of_rank]
        assert sorted(np.concatenate(at).tolist()) == list(range(10))
        assert all(
            pair in (set(), {0, 1}) for a in at for k in range(5) for pair in [{i - 2 * k for i in a.tolist()} & {0, 1}]
        )
        if apart:
            assert max(map(len, at)) == 2
        for indices, batch in (b for of_rank in found for b in of_rank if len(b[0])):
            own = batch.attention_mask.sum(1) if batch.cu_seqlens is None else np.diff(batch.cu_seqlens)
            shared = data.shared[documents[indices]] if packed else 0
            assert own.tolist() == (data.lengths[documents[indices]] - shared).tolist()


# ----------------------------------------------------------------------------------------- a reference of its own


def test_a_reference_of_its_own_is_in_the_receipt(dpo: list[str], tmp_path: Path, another_model: Path) -> None:
    words = [*dpo, f"algorithm.reference={another_model}"]
    run(words, tmp_path / "run")
    lock = json.loads((tmp_path / "run" / "lock.json").read_text())
    assert lock["reference"]["weights"] != lock["weights"] and lock["reference"]["revision"] is None
    before = (tmp_path / "run" / "checkpoints" / "step_00000006" / "state.json").read_text()
    nudge(another_model, 1.1)
    with pytest.raises(UserError, match="the weights of algorithm.reference changed since the run began"):
        run(words, tmp_path / "run", "algorithm.max_num_steps=8")
    assert (tmp_path / "run" / "checkpoints" / "step_00000006" / "state.json").read_text() == before
    run(dpo, tmp_path / "initial")
    assert "reference" not in json.loads((tmp_path / "initial" / "lock.json").read_text())


def test_a_reference_from_the_hub_stays_the_one_that_the_run_began_with(
    dpo: list[str], tmp_path: Path, another_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is two folders here: what its branch points to moves on while the run stands still."""
    snapshots = tmp_path / "snapshots"
    for commit, factor in (("c1", 1.0), ("c2", 1.3)):
        shutil.copytree(another_model, snapshots / commit)
        nudge(snapshots / commit, factor)
    newest, plain = ["c1"], hub.folder

    def folder(path: str, revision: str | None, *, weights: bool) -> Path:
        if path != "someone/model":
            return plain(path, revision, weights=weights)
        return snapshots / (revision or newest[0])

    def lock(name: str) -> Any:
        return json.loads((tmp_path / name / "lock.json").read_text())["reference"]

    monkeypatch.setattr(hub, "folder", folder)
    words = [*dpo, "algorithm.reference=someone/model", "scheduler=constant", "scheduler.warmup_ratio=0"]
    run(words, tmp_path / "run", "algorithm.max_num_steps=3")
    begun = lock("run")
    assert begun["revision"] == "c1"
    newest[0] = "c2"
    assert len(run(words, tmp_path / "run")) == 6 and lock("run") == begun
    run(words, tmp_path / "fresh")
    assert lock("fresh")["revision"] == "c2" and lock("fresh")["weights"] != begun["weights"]
    (snapshots / "c2" / "tokenizer.json").write_text(
        (snapshots / "c2" / "tokenizer.json").read_text().replace('"content": "', '"content": "x', 1)
    )
    with pytest.raises(UserError, match="algorithm.reference=someone/model: has another tokenizer than the policy"):
        run(words, tmp_path / "odd")


def test_a_reference_of_its_own_comes_first_proves_itself_and_goes(
    dpo: list[str], tmp_path: Path, another_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[bool, int, bool]] = []
    alive: list[weakref.ref[Any]] = []
    probed: list[bool] = []
    begin, probe = TorchBackend.__init__, TorchBackend.probe

    def building(self: TorchBackend, *args: Any, train: bool = True, **more: Any) -> None:
        living = sum(ref() is not None for ref in alive)
        begin(self, *args, train=train, **more)
        built.append((train, living, hasattr(self, "optimizer")))
        alive.append(weakref.ref(self.lm))
        assert train or not any(p.requires_grad for p in self.lm.parameters())

    def probing(self: TorchBackend, *args: Any) -> None:
        probed.append(self.train)
        probe(self, *args)

    monkeypatch.setattr(TorchBackend, "__init__", building)
    monkeypatch.setattr(TorchBackend, "probe", probing)
    run(dpo, tmp_path / "run", f"algorithm.reference={another_model}")
    assert built == [(False, 0, False), (True, 0, True)]
    assert probed == [False, True]
    probed.clear()
    run(dpo, tmp_path / "again", f"algorithm.reference={another_model}", "run.probe=false")
    assert not probed


def test_two_ranks_share_a_reference_of_its_own(dpo: list[str], tmp_path: Path, another_model: Path) -> None:
    """Sharded, like the policy after it."""
    words = [*dpo, f"algorithm.reference={another_model}", "train.global_batch_size=8", "algorithm.max_num_steps=3"]
    one = run(words, tmp_path / "one")
    assert run_on_two_ranks([*words, f"data.cache_dir={tmp_path / 'other'}"], tmp_path / "two") == pytest.approx(
        one, rel=1e-5
    )
    ours, theirs = (Store(kept(tmp_path / name), 80) for name in ("cache", "other"))
    assert ours.count() == theirs.count() and ours.folder.name == theirs.folder.name
    assert theirs.read(np.arange(80)) == pytest.approx(ours.read(np.arange(80)), rel=1e-5, nan_ok=True)


def test_a_model_that_is_not_trained_has_no_master_weights(dpo: list[str], tmp_path: Path) -> None:
    config = compose([*dpo, "model.dtype=bfloat16", f"run.dir={tmp_path / 'none'}"]).config
    frozen, trained = (TorchBackend(config, Ranks(), train=train) for train in (False, True))
    assert not frozen.weights.master and {p.dtype for p in frozen.lm.parameters()} == {torch.bfloat16}
    assert len(trained.weights.master) == len(list(trained.lm.parameters()))


# ---------------------------------------------------------------------------------------------------- the cache command


def words_of(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    capsys.readouterr()
    code = command.main([str(w) for w in words])
    return code, capsys.readouterr().out


def test_the_cache_command_knows_references(
    dpo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], pairs_file: Path, model_folder: Path
) -> None:
    run(dpo, tmp_path / "half", "algorithm.max_num_steps=2", "scheduler=constant", "scheduler.warmup_ratio=0")
    root = tmp_path / "cache"
    folder = kept(root)
    code, out = words_of(capsys, "list", "--cache-dir", root)
    (line,) = [line for line in out.splitlines() if line.startswith(folder.name[:8])]
    assert code == 0 and line.split()[1:4] == ["reference", "32", "80"] and "2 entries" in out
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["source"]["model"] == str(model_folder) and meta["source"]["data"] == str(pairs_file)
    assert meta["key"]["libraries"]["torch"] == fingerprint.versions(["torch"])["torch"]
    assert words_of(capsys, "verify", "--cache-dir", root)[0] == 0
    content = bytearray((folder / "sums.bin").read_bytes())
    begun = next(i for i, byte in enumerate(content) if byte)
    content[begun] ^= 1
    (folder / "sums.bin").write_bytes(content)
    code, out = words_of(capsys, "verify", "--cache-dir", root)
    assert code == 1 and f"{folder} (" in out and ": 1 record is damaged" in out and "1 damaged" in out
    then = time.time() - 3 * 86_400
    os.utime(folder / "meta.json", (then, then))
    code, out = words_of(capsys, "prune", "--cache-dir", root, "--older-than", 2)
    assert code == 0 and f"removed: {folder.name[:8]}" in out and not folder.exists() and "1 entry removed" in out


def test_a_run_that_takes_a_reference_keeps_it_young(dpo: list[str], tmp_path: Path) -> None:
    run(dpo, tmp_path / "first")
    os.utime(kept(tmp_path / "cache") / "meta.json", (1, 1))
    run(dpo, tmp_path / "second")
    (entry,) = store.entries(tmp_path / "cache")
    assert entry.used > time.time() - 600 and entry.summary.used == entry.summary.documents == 80


# ------------------------------------------------------------------------------------------- killed, and two at once

PLUGIN = """
import os, signal, time
from pathlib import Path
from engine.backends.torch_backend import TorchBackend
from engine.reference import attach
from engine.types import Callback

attach.CHUNK = 8
plain = TorchBackend.sequence_logprobs
count = 0

def scored(self, batch):
    global count
    count += len(batch.targets.bounds) - 1
    {what}
    return plain(self, batch)

TorchBackend.sequence_logprobs = scored

class Nothing(Callback):
    pass
"""


def test_killed_in_the_pass_and_resumed_is_undisturbed(dpo: list[str], tmp_path: Path, engine_process: Start) -> None:
    """kill -9 after thirty of eighty: what is there is not computed again, and the end is the same, bit for bit."""
    (tmp_path / "slow.py").write_text(
        PLUGIN.format(
            what=f"""
    if count > 30 and not Path({str(tmp_path / "died")!r}).exists():
        Path({str(tmp_path / "died")!r}).touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""
        )
    )
    words = [*dpo, "run.callbacks=[slow:Nothing]", "run.deterministic=true"]
    options = {"cwd": tmp_path}
    killed = engine_process([*words, f"run.dir={tmp_path / 'run'}"], **options)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    there, damaged = Store(kept(tmp_path / "cache"), 80).count()
    assert (there, damaged) == (24, 0)
    for folder, more in (("run", []), ("undisturbed", [f"data.cache_dir={tmp_path / 'other'}"])):
        process = engine_process([*words, f"run.dir={tmp_path / folder}", *more], **options)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert "computing 56 of 80" in log(tmp_path / "run") and "computing 80 of 80" in log(tmp_path / "undisturbed")
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
    one, other = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("run", "undisturbed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    one_file, other_file = (kept(tmp_path / name) / "sums.bin" for name in ("cache", "other"))
    assert one_file.read_bytes() == other_file.read_bytes()


def test_of_two_runs_at_once_the_second_waits(dpo: list[str], tmp_path: Path, engine_process: Start) -> None:
    """The first is held in its pass until the second has said that it waits."""
    go = tmp_path / "go"
    (tmp_path / "slow.py").write_text(
        PLUGIN.format(what=f"\n    while count > 16 and not Path({str(go)!r}).exists():\n        time.sleep(0.01)\n")
    )
    words = [*dpo, "run.callbacks=[slow:Nothing]"]

    def start(name: str) -> subprocess.Popen[str]:
        return engine_process([*words, f"run.dir={tmp_path / name}"], cwd=tmp_path)

    def wait_for(name: str, text: str, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 60
        while not ((tmp_path / name / "log.txt").exists() and text in log(tmp_path / name)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    first = start("first")
    try:
        wait_for("first", "reference: computing", first)
        second = start("second")
        try:
            wait_for("second", "waiting for another run that computes the same reference", second)
        finally:
            go.touch()
            _, errors = second.communicate(timeout=120)
        assert second.returncode == 0, errors
    finally:
        _, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    said = log(tmp_path / "second")
    assert "reference: all 80 log-probabilities of train are there" in said and "computing" not in said
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
