"""Who serves where. There is no CUDA here: tensors of the CPU say that they are on it, and the rest is as it is.

So Triton itself raises, there being no driver; only where something else is to go wrong is that put in.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import dispatch, tiles
from kernels.linear_objective import linear_logprobs


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on CUDA."""

    is_cuda = True


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    for step in "before", "after":
        dispatch.works.cache_clear()
        dispatch._fits.cache_clear()
        if step == "before":
            yield


def asked_twice() -> tuple[list[bool], list[str]]:
    """Return what is said of a tensor on CUDA, and what is warned of."""
    x = torch.ones(1).as_subclass(OnCuda)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said = [dispatch.use_triton(x), dispatch.use_triton(x)]
    return said, [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


def test_the_cpu_is_served_without_importing_triton() -> None:
    code = (
        "import sys, torch; from kernels import dispatch; before = 'triton' in sys.modules; "
        "assert not dispatch.use_triton(torch.ones(1)) and ('triton' in sys.modules) == before; import kernels.reference; "
        "assert not [m for m in sys.modules if m.startswith('kernels.triton_')]"
    )
    ended = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_triton_that_raises_is_told_once_and_does_without() -> None:
    pytest.importorskip("triton")
    said, (told,) = asked_twice()
    assert said == [False, False]
    assert told.startswith("Triton does not work on cpu (") and told.endswith("eager twins serve, which are slower.")


def test_no_triton_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kernels.triton_probe", raising=False)
    monkeypatch.delattr("kernels.triton_probe", raising=False)
    said, (told,) = asked_twice()
    assert said == [False, False] and "import of triton halted" in told


def put_in(monkeypatch: pytest.MonkeyPatch, doubled: Any) -> None:
    monkeypatch.setitem(sys.modules, "kernels.triton_probe", SimpleNamespace(doubled=doubled))


def test_a_compiler_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Any) -> Any:
        raise RuntimeError("ptxas failed with error code 255\n\n  ptxas stderr:\n" + "x" * 1000)

    put_in(monkeypatch, fails)
    said, (told,) = asked_twice()
    assert said == [False, False] and "(ptxas failed with error code 255 ptxas stderr: xxx" in told
    assert "\n" not in told and len(told) < 320


def test_a_triton_that_computes_wrong_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, lambda x: x * 3)
    said, (told,) = asked_twice()
    assert said == [False, False] and "(twice one is 3 there)" in told


@pytest.mark.parametrize(("there", "serves"), [(166_912, True), (101_376, False), (None, True)])
def test_a_device_needs_the_shared_memory_of_the_tiles(
    monkeypatch: pytest.MonkeyPatch, there: int | None, serves: bool
) -> None:
    put_in(monkeypatch, lambda x: x * 2)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_80")
    properties = SimpleNamespace() if there is None else SimpleNamespace(shared_memory_per_block_optin=there)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    said, told = asked_twice()
    assert said == [serves, serves]
    assert [t.partition(":")[0] for t in told] == [
        "cpu has 101,376 bytes of shared memory for a program, and the tiles are made for 166,912"
    ] * (not serves)


def test_the_twins_are_right_where_triton_does_not_work() -> None:
    torch.manual_seed(0)
    hidden_NH, weight_VH = (torch.randn(n, 8, requires_grad=True) for n in (5, 11))
    labels_N = torch.tensor([3, 0, 10, 7, 7])
    plain_NV = (hidden_NH @ weight_VH.t()).log_softmax(-1)
    expected = plain_NV.gather(1, labels_N[:, None]).squeeze(1)
    with pytest.warns(RuntimeWarning, match="Triton does not work"):
        assert not dispatch.use_triton(hidden_NH.as_subclass(OnCuda))
    found = linear_logprobs(hidden_NH.as_subclass(OnCuda), weight_VH, labels_N, workspace_mb=1)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), (hidden_NH, weight_VH)),
        torch.autograd.grad(expected.sum(), (hidden_NH, weight_VH)),
        strict=True,
    ):
        torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs)


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_100")],
)
def test_architectures_take_the_next_lower_entry(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dispatch.architecture(torch.device("cuda")) == name and name in tiles.ARCHITECTURES
    assert dispatch.architecture(torch.device("cpu")) == "interpreter"
