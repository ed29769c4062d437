"""The check ahead of time finds what it is for; kernels that are bad on purpose, and their account by the real compiler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="kernels are compiled by Triton")
import triton.language as tl  # noqa: E402

from kernels import aot, tiles  # noqa: E402
from kernels.tiles import Case, Tile  # noqa: E402


@triton.jit
def _gram(x_ptr, out_ptr, length, M: tl.constexpr, N: tl.constexpr):
    row, column = tl.arange(0, M), tl.arange(0, N)
    out = tl.zeros([M, N], tl.float32)
    for start in range(0, length, 64):
        k = start + tl.arange(0, 64)
        a = tl.load(x_ptr + row[:, None] * length + k[None, :])
        b = tl.load(x_ptr + column[None, :] * length + k[:, None])
        out = tl.dot(a, b, out)
    tl.store(out_ptr + row[:, None] * N + column[None, :], out)


def case(tile: Tile, name: str = "gram") -> Case:
    signature = {"x_ptr": "*bf16", "out_ptr": "*fp32", "length": "i32"}
    return Case(name, _gram, signature, {"M": tile.m, "N": tile.n}, ("x_ptr", "out_ptr", "length"), tile)


@pytest.fixture(autouse=True)
def _fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
def test_a_good_tile_passes(arch: str) -> None:
    row = aot.measure(case(Tile(64, 64, 4, 3)), arch)
    assert row.error == "" and row.spilled == 0
    assert 32 <= row.registers <= 255 and 0 < row.shared <= aot.SHARED_MEMORY[arch]
    assert aot.judge([row], {}) == ([], [])


def test_the_cache_changes_nothing_but_the_time() -> None:
    first = aot.measure(case(Tile(64, 64, 4, 2)), "sm_80")
    again = aot.measure(case(Tile(64, 64, 4, 2)), "sm_80")
    assert again._replace(seconds=0) == first._replace(seconds=0)


def test_a_spill_is_found_unless_it_is_listed() -> None:
    row = aot.measure(case(Tile(128, 256, 4, 2)), "sm_80")
    assert row.spilled > 0
    (problem,), _ = aot.judge([row], {})
    assert f"gram on sm_80 spills {row.spilled} bytes" in problem
    assert aot.judge([row], {("gram", "sm_80"): (row.spilled, "why")}) == ([], [])
    (problem,), _ = aot.judge([row], {("gram", "sm_80"): (row.spilled - 4, "why")})
    assert f"and {row.spilled - 4} are known" in problem


def test_an_entry_that_no_longer_spills_is_told() -> None:
    row = aot.Row("gram", "sm_90", Tile(64, 64, 4, 2), 100, 0, 1000)
    problems, (note,) = aot.judge([row], {("gram", "sm_90"): (40, "why")})
    assert problems == [] and "take it out of KNOWN_SPILLS" in note


def test_a_tile_too_large_for_shared_memory_is_refused() -> None:
    row = aot.measure(case(Tile(256, 128, 8, 5)), "sm_80")
    (problem,), _ = aot.judge([row], {})
    assert f"takes {row.shared:,} bytes of shared memory of 166,912" in problem


def test_what_does_not_compile_is_told() -> None:
    row = aot.measure(case(Tile(48, 64, 4, 2)), "sm_80")
    (problem,), _ = aot.judge([row], {})
    assert "gram on sm_80 does not compile: " in problem and "failed" in aot.table([row])


@pytest.fixture
def offering(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the table hold entries, and a module offer cases."""

    def offer(entries: dict[aot.Key, Tile], cases: Any) -> None:
        monkeypatch.setattr(tiles, "TILES", entries)
        monkeypatch.setitem(__import__("sys").modules, "offered", SimpleNamespace(cases=cases))

    return offer


def test_the_table_and_the_cases_match(offering: Any) -> None:
    entries = {("gram", "sm_80", 2, 0): Tile(64, 64, 4, 2), ("gram", "sm_80", 4, 0): Tile(32, 32, 4, 2)}
    offering(entries, lambda arch: [case(tiles.tile("gram", arch, size)) for size in (2, 4)])
    jobs, problems = aot.collect(["offered"], ["sm_80"])
    assert [job.number for job in jobs] == [0, 1] and problems == []


def test_an_entry_without_a_case_is_told(offering: Any) -> None:
    entries = {("gram", "sm_80", 2, 0): Tile(64, 64, 4, 2), ("gram", "sm_80", 2, 128): Tile(32, 32, 4, 2)}
    offering(entries, lambda arch: [case(tiles.tile("gram", arch, 2))])
    assert aot.collect(["offered"], ["sm_80"])[1] == [
        "gram on sm_80, 2 bytes, head 128 is in the table, and no case compiles it."
    ]


def test_a_case_with_a_tile_of_its_own_is_told(offering: Any) -> None:
    offering({}, lambda arch: [case(Tile(64, 64, 4, 2))])
    (problem,) = aot.collect(["offered"], ["sm_90"])[1]
    assert problem.startswith("gram on sm_90 has Tile(") and "did not look up" in problem


def test_two_cases_of_one_name_and_a_spill_of_none_are_told(
    offering: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {("gram", arch, 2, 0): Tile(64, 64, 4, 2) for arch in tiles.ARCHITECTURES}
    offering(entries, lambda arch: [case(tiles.tile("gram", arch, 2))] * 2)
    monkeypatch.setattr(aot, "modules", lambda: ["offered"])
    monkeypatch.setattr(aot, "_measured", lambda jobs: [])
    monkeypatch.setattr(aot, "KNOWN_SPILLS", {("gone", "sm_80"): (4, "why")})
    assert aot.main([]) == 1
    printed = capsys.readouterr().out
    assert "gram on sm_100: several cases have this name." in printed
    assert "KNOWN_SPILLS has gone on sm_80, which is no case." in printed


def test_every_module_of_kernels_that_has_cases_is_found() -> None:
    for name in aot.modules():
        assert name.startswith("kernels.triton_")
        jobs, problems = aot.collect([name], ["sm_80"])
        assert jobs, f"{name} offers no case"
        assert not [p for p in problems if "did not look up" in p or "was looked up" in p]
