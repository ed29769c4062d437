"""Recipes in git repositories: ``git+URL@REVISION#PATH``, fetched into a cache and pinned to the commit."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError

PREFIX = "git+"
FORM = "git+https://HOST/REPOSITORY@REVISION#PATH/IN/IT.yaml"
ADDRESS = re.compile(
    r"git\+(?P<url>(?:https?|ssh|git|file)://[^#]*[^#/][^#]*)@(?P<revision>[^@#/][^@#]*)#(?P<path>[^#]+)"
)
TIMEOUT_S = 120


class Address(NamedTuple):
    """A file of a repository at a revision."""

    url: str
    """As git takes it."""
    revision: str
    """Branch, tag or commit."""
    path: str
    """Of the file in the repository."""


def cache_home() -> Path:
    """Return the folder that runs share: ``$ANNEAL_CACHE`` or ``~/.cache/anneal``."""
    return Path(os.environ.get("ANNEAL_CACHE") or "~/.cache/anneal").expanduser()


def parse(word: str) -> Address:
    """Take an address apart.

    Raises:
        UserError: If it lacks a part.
    """
    found = ADDRESS.fullmatch(word)
    parts = Path(found["path"]).parts if found else ()
    if found is None or ".." in parts or parts[0] == "/":
        raise UserError(f"recipe={word}: a recipe in a git repository is written {FORM}.")
    return Address(found["url"], found["revision"], found["path"])


@functools.cache
def fetch(word: str) -> tuple[Path, str]:
    """Return the file of a recipe in a repository, fetched unless its commit is here, and its address at that commit.

    Raises:
        UserError: If git, the repository, the revision or the file is not there.
    """
    address = parse(word)
    name = re.sub(r"[^A-Za-z0-9]+", "-", address.url.rpartition("/")[2].removesuffix(".git"))
    home = cache_home() / "recipes" / f"{name}-{hashlib.sha256(address.url.encode()).hexdigest()[:12]}"
    with _locked(home, word):
        commit = _commit(home / "repository.git", address, word)
        tree = home / commit
        if not tree.is_dir():
            _extract(home / "repository.git", commit, tree)
    file = tree / address.path
    if not file.is_file():
        raise UserError(f"recipe={word}: {address.url} has no file {address.path} at {commit[:12]}; correct the path.")
    return file, f"{PREFIX}{address.url}@{commit}#{address.path}"


def _commit(repository: Path, address: Address, word: str) -> str:
    """Return the commit that a revision names; a commit that is here already needs no network."""
    if not repository.is_dir():
        _git(word, "init", "--quiet", "--bare", "--template=", str(repository))
    here = _resolve(repository, address.revision) if re.fullmatch(r"[0-9a-f]{40}", address.revision) else None
    if here is not None:
        return here
    refs = [f"+refs/{kind}/*:refs/{kind}/*" for kind in ("heads", "tags")]
    _git(word, f"--git-dir={repository}", "fetch", "--quiet", "--prune", "--", address.url, *refs)
    found = _resolve(repository, address.revision)
    if found is None:
        raise UserError(f"recipe={word}: {address.url} has no branch, tag or commit {address.revision}; correct it.")
    return found


def _resolve(repository: Path, revision: str) -> str | None:
    words = ["git", f"--git-dir={repository}", "rev-parse", "--verify", "--quiet", "--end-of-options"]
    found = subprocess.run([*words, f"{revision}^{{commit}}"], capture_output=True, text=True, check=False)
    return found.stdout.strip().splitlines()[-1] if found.returncode == 0 else None


def _extract(repository: Path, commit: str, tree: Path) -> None:
    """Write the files of a commit aside and rename the folder into place."""
    command = ["git", f"--git-dir={repository}", "archive", "--format=tar", commit]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    aside = tree.with_name(f"{commit}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(aside, filter="data")
    os.rename(aside, tree)


def _git(word: str, *words: str) -> None:
    """Run git; it asks for no password."""
    environment = {"GIT_SSH_COMMAND": "ssh -oBatchMode=yes", **os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        subprocess.run(["git", *words], capture_output=True, text=True, check=True, env=environment, timeout=TIMEOUT_S)
    except FileNotFoundError as error:
        raise UserError(f"recipe={word}: needs git, which is not installed here; give the recipe as a file.") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"recipe={word}: no answer within {TIMEOUT_S} s; check the network or the address.") from error
    except subprocess.CalledProcessError as error:
        said = next((x for x in error.stderr.splitlines() if x.startswith("fatal: ")), error.stderr.strip())
        raise UserError(
            f"recipe={word}: cannot be fetched ({said.removeprefix('fatal: ').rstrip('.')}); check the address and your access "
            "to it."
        ) from error


@contextmanager
def _locked(home: Path, word: str) -> Iterator[None]:
    """Let one process at a time fetch a repository."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"recipe={word}: {home} cannot be written ({error.strerror}); set ANNEAL_CACHE to another folder."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
