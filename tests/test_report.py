"""The report: what it reads from run folders, what it says about them, and what a browser makes of the page."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import engine
from engine.report import chart, compare, page, runs
from engine.report.__main__ import main

HOSTILE = "</script><b>\"bold\"</b> & 'so' <!-- -->"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NO_LOADS = re.compile(r"""(?:src|href|xlink:href)\s*=\s*["'](?!data:,)|url\(|@import|<script""")


def steps(count: int, *, lr: float = 1e-3, period: int = 10, start: int = 1, dpo: bool = False) -> list[dict[str, Any]]:
    """Return the lines of a run whose loss falls faster with a higher rate."""
    lines: list[dict[str, Any]] = []
    for step in range(start, count + 1):
        loss = 2 + 4 / (1 + step * lr * 100)
        line = {"step": step, "train/loss": loss, "train/grad_norm": 3.0 / step, "train/lr": lr, "train/tokens": 100}
        line |= {"perf/tokens_per_second": 5000.0 + step, "perf/memory_gb": 0.75}
        line |= {"train/accuracy": 0.5, "train/margin": step / 10} if dpo else {}
        lines.append(line)
        if step % period == 0:
            lines.append({"step": step, "validation/loss": loss + 0.1, "timing/validation_s": 0.1})
    return lines


def write(
    folder: Path,
    lines: Sequence[dict[str, Any]],
    *,
    lr: float = 1e-3,
    log: str = "",
    finished: bool = True,
    algorithm: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    **lock: Any,
) -> Path:
    """Write a run folder as the engine does."""
    folder.mkdir(parents=True)
    recipe = {
        "run": {"name": "quick", "seed": 0},
        "optimizer": {"lr": lr, "betas": [0.9, 0.99]},
        "algorithm": {"name": "sft", **(algorithm or {})},
        "checkpoint": checkpoint or {"metric": "validation/loss", "mode": "min"},
    }
    (folder / "recipe.yaml").write_text("# @package _global_\n" + yaml.safe_dump(recipe))
    whole = {"data": {"train": "a" * 24}, "weights": "b" * 64, "versions": {"torch": "2.13.0"}, **lock}
    (folder / "lock.json").write_text(json.dumps(whole))
    (folder / "log.txt").write_text(f"run folder {folder}\n{log}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "hf").mkdir()
        (folder / "hf" / "config.json").write_text("{}")
    return folder


def saved(folder: Path, step: int, total_steps: int, *, finished: bool) -> None:
    """Write what a checkpoint says of its run."""
    state = {"step": step, "total_steps": total_steps, "finished": finished}
    target = folder / "checkpoints" / f"step_{step:08d}"
    target.mkdir(parents=True)
    (target / "state.json").write_text(json.dumps(state))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of five rates over three decades, one of which failed before its first step."""
    for number, lr in enumerate((1e-4, 1e-3, 1e-2, 1e-1)):
        write(tmp_path / "sweep" / f"{number:03d}", steps(40, lr=lr), lr=lr)
    failed = tmp_path / "sweep" / "004"
    failed.mkdir()
    (failed / "log.txt").write_text(f"run folder {failed}\nerror: train.jsonl: row 3 has no messages.\n")
    return tmp_path / "sweep"


@pytest.fixture
def report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command; returns exit code, what it printed, and the page or the errors."""

    def call(*folders: Path) -> tuple[int, str, str]:
        file = tmp_path / "out.html"
        code = main([*map(str, folders), "--out", str(file)])
        out, err = capsys.readouterr()
        return code, out, file.read_text() if code == 0 else err

    return call


class Page(HTMLParser):
    """Reads a page: balanced tags, its text, the cells of each row, the labels of its drawings."""

    VOID = {"meta", "input", "link"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.charts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("class") == "chart":
            self.charts.append(str(found["aria-label"]))
            assert found["role"] == "img"
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Nothing inside."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return [cell.strip() for row in self.rows if row and row[0].strip().startswith(name) for cell in row]


def test_a_sweep_is_ranked_and_drawn(report: Callable[..., tuple[int, str, str]], sweep: Path) -> None:
    code, out, text = report(sweep)
    shown = Page(text)
    assert code == 0 and "5 runs" in out and "004: failed: train.jsonl: row 3 has no messages." in out
    order = [row[0].split()[0] for row in shown.rows[1:6]]
    assert order == ["003", "002", "001", "000", "004"]  # best first, the failed one last
    assert shown.row("003")[:5] == ["003 · lr 0.1best", "finished", "40", "2.110", "40"]
    assert "✕ failed" in shown.row("004")[1] and "row 3 has no messages" in shown.row("004")[1]
    over = next(label for label in shown.charts if label.startswith("validation/loss over optimizer.lr"))
    assert "003, lr 0.1: 2.110 (best)" in over and over.count("(best)") == 1 and "000, lr 1e-4" in over
    assert ", logarithmic" in shown.text
    titles = ["Loss", "Gradient norm", "Learning rate", "Throughput", "Memory"]
    assert [label.split(" over the steps")[0] for label in shown.charts[1:]] == titles
    assert not NO_LOADS.search(text)


def test_a_swept_value_has_its_place(sweep: Path) -> None:
    [group] = runs.gather([sweep])
    measure = compare.measure(group.runs)
    assert measure is not None and compare.swept(group.runs) == [["optimizer.lr"]]
    drawn, dots = page.over_values(group.runs[:4], "optimizer.lr", measure, {run.folder: 0 for run in group.runs})
    assert drawn.x.log and [dot.best for dot in dots] == [False, False, False, True]
    places = sorted(dot.x for dot in dots)
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert max(gaps) - min(gaps) < 0.3  # equal factors are equally far
    assert dots[-1].y == max(dot.y for dot in dots)  # the lowest loss is lowest on the page
    assert [label for _, label in drawn.x.ticks] == ["1e-4", "0.001", "0.01", "0.1"]


def test_a_sweep_says_what_it_has_swept(report: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    for number, (model, lr) in enumerate((("tiny", 1e-3), ("small", 1e-3), ("tiny", 1e-2))):
        # a group that is chosen changes many keys
        other = {f"key_{i}": model for i in range(9)}
        write(tmp_path / "s" / f"{number:03d}", steps(20, lr=lr), lr=lr, algorithm={"name": "sft", **other})
    write(tmp_path / "s" / "reference", [])  # what prepares a sweep is no point of it
    points = {
        f"{n:03d}": {"model": m, "optimizer.lr": lr}
        for n, (m, lr) in enumerate((("tiny", "1e-3"), ("small", "1e-3"), ("tiny", "1e-2")))
    }
    (tmp_path / "s" / "sweep.json").write_text(json.dumps({"points": points, "metric": "validation/loss"}))
    [group] = runs.gather([tmp_path / "s"])
    assert compare.swept(group.runs) == [["model"], ["optimizer.lr"]] and len(group.runs) == 3
    assert [run.setting("optimizer.lr") for run in group.runs] == [1e-3, 1e-3, 1e-2]
    charts = Page(report(tmp_path / "s")[2]).charts
    assert charts[0].startswith("validation/loss over model: ") and "002, lr 0.01" in charts[1]


def test_words_that_are_swept_stand_side_by_side(tmp_path: Path) -> None:
    for number, name in enumerate(("sigmoid", "ipo", "hinge")):
        write(tmp_path / "s" / f"{number}", steps(20), algorithm={"name": "dpo", "preference_loss": name})
    [group] = runs.gather([tmp_path / "s"])
    measure = compare.measure(group.runs)
    assert measure is not None
    drawn, dots = page.over_values(group.runs, "algorithm.preference_loss", measure, {r.folder: 0 for r in group.runs})
    assert [label for _, label in drawn.x.ticks] == ["sigmoid", "ipo", "hinge"]
    assert sorted(dot.x for dot in dots) == [place for place, _ in drawn.x.ticks]
    assert "algorithm.preference_loss" in compare.caution(group.runs, measure)  # these losses do not compare


def test_higher_is_better_where_the_recipe_says_so(report: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    checkpoint = {"metric": "validation/accuracy", "mode": "max"}
    for name, best in (("a", 0.6), ("b", 0.9)):
        lines = steps(20) + [{"step": 20, "validation/accuracy": best}]
        write(tmp_path / name, lines, checkpoint=checkpoint)
    shown = Page(report(tmp_path / "a", tmp_path / "b")[2])
    assert [row[0].strip() for row in shown.rows[1:3]] == ["bbest", "a"] and "higher is better" in shown.text


def test_without_validation_the_end_of_training_ranks(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", steps(40, period=99))
    [group] = runs.gather([folder])
    measure = compare.measure(group.runs)
    assert measure == compare.Measure(metric="train/loss", highest=False, closing=True)
    losses = [2 + 4 / (1 + step * 0.1) for step in range(31, 41)]
    score = measure.score(group.runs[0])
    assert score is not None and score[0] == 40 and math.isclose(score[1], sum(losses) / 10)


def test_other_objectives_are_not_ranked(report: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    sft = write(tmp_path / "sft", steps(20))
    dpo = write(tmp_path / "dpo", steps(30, dpo=True), algorithm={"name": "dpo"})
    shown = Page(report(sft, dpo)[2])
    assert "Not ranked" in shown.text and "best" not in shown.text.split("Over the steps")[0]
    assert {label.split(" over")[0] for label in shown.charts} >= {"Loss", "Accuracy", "Margin"}


def test_what_differs_and_nothing_else(report: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    a = write(tmp_path / "a", steps(20), versions={"torch": "2.12.0", "numpy": "2"}, code={"sha256": "c" * 64})
    b = write(tmp_path / "b", steps(20), lr=2e-5, versions={"torch": "2.13.0", "numpy": "2"}, code={"sha256": "d" * 64})
    found = {
        d.key: (d.part, d.values) for d in compare.differences(runs.gather([a])[0].runs + runs.gather([b])[0].runs)
    }
    assert found == {
        "optimizer.lr": ("Recipe", ["0.001", "2e-05"]),
        "code.sha256": ("Code", ["c" * 10 + "…", "d" * 10 + "…"]),
        "torch": ("Version", ["2.12.0", "2.13.0"]),
    }
    text = Page(report(a, b)[2]).text.split("What differs")[1]
    assert "2e-05" in text and "2.12.0" in text and "numpy" not in text and "betas" not in text


def test_a_run_alone_has_nothing_to_differ_from(report: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    text = report(write(tmp_path / "only", steps(20)))[2]
    assert "What differs" not in text and "Not ranked" not in text and 'class="top"' not in text


def test_steps_that_a_resume_repeats_are_there_once(tmp_path: Path) -> None:
    again = [{**line, "train/loss": 9.0} if "train/loss" in line else line for line in steps(15, start=11, period=99)]
    folder = write(tmp_path / "a", steps(20) + again)
    series, notes = runs.figures(folder / "metrics.jsonl")
    assert list(series["train/loss"]) == list(range(1, 16)) and notes == []
    assert [series["train/loss"][step] for step in (11, 15)] == [9.0, 9.0]
    assert list(series["validation/loss"]) == [10]  # that of step 20 is void


@pytest.mark.parametrize("cut", [b'{"step": 21, "train/lo', b'{"step": 21, "train/loss": 1.0, "x": "\xff', b"[1]"])
def test_a_cut_last_line_is_ignored_and_told(
    report: Callable[..., tuple[int, str, str]], tmp_path: Path, cut: bytes
) -> None:
    folder = write(tmp_path / "a", steps(20))
    with (folder / "metrics.jsonl").open("ab") as stream:
        stream.write(cut)
    code, out, text = report(folder)
    assert code == 0 and "the last line of metrics.jsonl is cut short and was ignored" in out
    assert "is cut short" in Page(text).text and runs.read(folder, "a").step == 20


def test_figures_that_are_not_finite_break_the_line_and_are_told(tmp_path: Path) -> None:
    lines = steps(20)
    lines[4]["train/loss"] = math.nan  # the engine writes null; others may not
    run = runs.read(write(tmp_path / "a", lines), "a")
    assert run.notes == ["train/loss was not finite at 1 step: 5"]
    drawn = page.over_steps(page.KINDS[0], [run])
    assert drawn is not None and drawn.lines[0].path.count("M") == 2


@pytest.mark.parametrize(
    ("log", "finished", "expected"),
    [
        ("done: 20 steps\n", True, ("finished", "")),
        ("done: there were no steps to train\n", False, ("finished", "")),
        ("", True, ("finished", "")),
        ("stopped by SIGTERM after step 20 of 40, checkpoint saved; the same command goes on.\n", False,
         ("stopped", "stopped by SIGTERM after step 20 of 40, checkpoint saved")),
        ("error: out of memory: set train.micro_batch_size=1.\n", False,
         ("failed", "out of memory: set train.micro_batch_size=1.")),
        ("error: old\nrun folder /x\nresuming after step 10 of 40\n", True, ("finished", "")),
    ],
)  # fmt: skip
def test_how_a_run_ended(tmp_path: Path, log: str, finished: bool, expected: tuple[str, str]) -> None:
    run = runs.read(write(tmp_path / "a", steps(20), log=log, finished=finished), "a")
    assert (run.state, run.reason) == expected


def test_a_run_that_goes_on_behind_its_final_weights_is_unfinished(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", steps(20))
    saved(folder, 20, 20, finished=True)
    assert runs.read(folder, "a").state == "finished"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps(25)))
    run = runs.read(folder, "a")
    assert run.state == "unfinished" and run.reason.startswith("newest figures of") and run.total_steps == 20


def test_bad_folders_are_answered_all_at_once(report: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    empty, silent, broken = tmp_path / "empty", write(tmp_path / "silent", []), write(tmp_path / "broken", steps(5))
    empty.mkdir()
    (broken / "lock.json").write_text("{")
    code, _, err = report(tmp_path / "missing", empty, silent, broken)
    assert code == 2 and len(err.splitlines()) == 4 and all(line.startswith("error: ") for line in err.splitlines())
    for name, words in (("missing", "no such folder"), ("empty", "no run folder"), ("silent", "no figures yet")):
        assert any(f"/{name}: " in line and words in line for line in err.splitlines()), err
    assert "broken/lock.json: cannot be read" in err


def test_bad_words(report: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert report()[0] == 2
    folder = write(tmp_path / "a", steps(5))
    assert main([str(folder), "--out", str(tmp_path / "no" / "out.html")]) == 2
    (folder / "recipe.yaml").write_text("a: [")
    assert "recipe.yaml: cannot be read" in report(folder)[2]


def test_a_folder_named_twice_is_one_run_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    a, b = write(tmp_path / "x" / "run", steps(5)), write(tmp_path / "y" / "run", steps(5))
    groups = runs.gather([a, b, tmp_path / "x" / ".." / "x" / "run"])
    assert [run.name for group in groups for run in group.runs] == ["x/run", "y/run"]


def test_hostile_names_stay_text(report: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    folder = write(tmp_path / "a", steps(5), log=f"error: {HOSTILE}\n", finished=False)
    other = write(tmp_path / "b", steps(5), versions={"torch": HOSTILE})
    text = report(folder, other)[2]
    assert Page(text).text.count(HOSTILE) == 2 and '<b>"bold' not in text


def test_thinning_keeps_extremes_ends_and_breaks() -> None:
    points: list[chart.Point] = [(float(i), math.sin(i / 500)) for i in range(20_000)]
    points[7_777], points[3_333], points[12_345] = (7_777.0, 50.0), (3_333.0, -50.0), (12_345.0, None)
    kept = chart.thin(points)
    assert len(kept) <= 5 * chart.BUCKETS and kept == sorted(kept, key=lambda point: point[0])
    assert {points[i] for i in (0, 3_333, 7_777, 12_345, 19_999)} <= set(kept)
    assert chart.thin(points[:400]) == points[:400]


def test_a_moving_mean_is_the_mean_of_its_window() -> None:
    points: list[chart.Point] = [(float(i), float(i * i % 7)) for i in range(50)] + [(50.0, None)]
    means = chart.moving_mean(points, 5)
    assert len(means) == 50 and means[0] == points[0] and means[1][1] == pytest.approx((0 + 1 + 4) / 3)
    assert means[20][1] == pytest.approx(sum(float(i * i % 7) for i in range(18, 23)) / 5)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 40.0, ["0", "10", "20", "30", "40"]),
        (0.0, 6_900.0, ["0", "2k", "4k", "6k"]),
        (0.0, 1.1e-5, ["0", "5e-6", "1e-5"]),
        (1.32, 1.43, ["1.35", "1.40"]),
        (-0.6, 0.0, ["-0.6", "-0.4", "-0.2", "0.0"]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[str]) -> None:
    assert [label for _, label in chart._ticks(low, high)] == expected


def test_one_value_and_equal_values_have_an_axis() -> None:
    for values in ([0.0], [5.0, 5.0], [-2.0], [1e-12]):
        drawn = chart.axis(values, 0, 100)
        assert drawn.low < values[0] < drawn.high and 0 <= drawn.at(values[0]) <= 100 and drawn.ticks
    assert chart.axis([0.0, 0.0], 0, 100, base=(0.0,)).at(0.0) == 50


def test_a_validation_alone_is_drawn(report: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [{"step": 0, "validation/loss": 2.5}], log="done: no steps\n", finished=False)
    shown = Page(report(folder)[2])
    assert shown.row("a")[1:5] == ["finished", "0", "2.500", "0"] and shown.charts == [
        "Loss over the steps; last values: a 2.500"
    ]


@pytest.mark.parametrize("record", ["[]", '{"points": [1]}', '{"points": {"000": 3}}'])
def test_a_sweep_json_that_is_another_thing_ends_in_no_traceback(
    report: Callable[..., tuple[int, str, str]], sweep: Path, record: str
) -> None:
    (sweep / "sweep.json").write_text(record)
    code, _, text = report(sweep)
    assert code == (2 if record == "[]" else 0) and "Traceback" not in text


def test_what_the_engine_leaves_behind_is_read(
    report: Callable[..., tuple[int, str, str]], base: list[str], rows_file: Path, tmp_path: Path
) -> None:
    for number, lr in enumerate(("1e-3", "1e-2")):
        words = [word for word in base if not word.startswith("optimizer.lr")]
        held = [f"data.val_path={rows_file}", "algorithm.val_period=2"]
        engine.run([*words, *held, f"optimizer.lr={lr}", f"run.dir={tmp_path / 'sweep' / f'{number:03d}'}"])
    code, out, text = report(tmp_path / "sweep")
    shown = Page(text)
    assert code == 0 and out.endswith(": 2 runs\n") and "All have finished." in shown.text
    assert shown.row("001")[0].startswith("001 · lr 0.01") and "4 of 4" in shown.row("001")
    first = json.loads((tmp_path / "sweep" / "000" / "metrics.jsonl").read_text().splitlines()[-1])
    assert chart.figure(first["validation/loss"]) in shown.row("000")
    assert "optimizer.lr" in shown.text.split("What differs")[1]


def test_torch_and_ray_stay_out(sweep: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from engine.report.__main__ import main; code = main(sys.argv[1:]);"
        "sys.exit(code or 3 * bool({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", code, str(sweep), "--out", str(tmp_path / "out.html")]
    assert subprocess.run(words, check=False).returncode == 0


class Look(NamedTuple):
    """What a browser has made of a page."""

    boxes: list[list[float]]
    """Left, top, right, bottom of each chart's drawing, in pixels."""
    width: float
    """Width of the page's contents."""
    console: list[str]
    image: Any


PROBE = """<script>
addEventListener("load", () => parent.postMessage(JSON.stringify({
  boxes: [...document.querySelectorAll("svg.chart")].map(c => c.getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom]),
  width: document.documentElement.scrollWidth}), "*"));
</script>"""


def look(text: str, folder: Path, width: int, *, dark: bool) -> Look:
    """Open a page in a window of some width."""
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: nothing looks at the page (apt-get install chromium)")
    image_module = pytest.importorskip("PIL.Image", reason="no Pillow: the screenshot cannot be read")
    (folder / "page.html").write_text(text + PROBE)
    outer = folder / "outer.html"
    frame = f'<iframe src="page.html" style="border:0;width:{width}px;height:6000px"></iframe>'  # narrower than a window can be
    outer.write_text(f'<body style="margin:0"><pre></pre>{frame}<script>onmessage = e => document.querySelector("pre").textContent = e.data</script>'.replace("<pre>", '<pre style="display:none">'))  # fmt: skip
    shot = folder / "shot.png"
    words = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={int(not dark)}",
        f"--window-size={max(width, 500)},6000", "--enable-logging=stderr", "--virtual-time-budget=3000",
        f"--screenshot={shot}", "--dump-dom", outer.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    told = re.search(r"<pre[^>]*>(.*?)</pre>", done.stdout, re.DOTALL)
    assert told is not None and told[1], done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Look(**json.loads(told[1]), console=console, image=image_module.open(shot).convert("RGB"))


def colours(found: Look, box: Sequence[float]) -> set[tuple[int, int, int]]:
    """Return the colours that cover more than a few pixels of a box."""
    part = found.image.crop(tuple(map(round, box)))
    return {colour for count, colour in part.getcolors(maxcolors=1 << 24) if count > 8}


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (400, True)])
def test_a_browser_shows_every_chart(
    report: Callable[..., tuple[int, str, str]], sweep: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    found = look(report(sweep)[2], tmp_path, width, dark=dark)
    assert found.console == [] and found.width <= width and len(found.boxes) == 6
    for box in found.boxes:
        assert box[2] - box[0] > 250 and box[3] - box[1] > 150 and box[3] < 6000 and 0 <= box[0] < box[2] <= width
        own = colours(found, box)
        # a line or a dot has a colour, ink and paper have none
        assert any(max(colour) - min(colour) > 40 for colour in own), own
    corner = found.image.getpixel((2, 2))
    assert (max(corner) < 60) == dark


def test_the_browser_would_tell_an_error(tmp_path: Path) -> None:
    found = look(
        "<!DOCTYPE html><script>console.error('boo'); nope()</script><svg class=chart></svg>", tmp_path, 600, dark=False
    )
    assert len(found.console) == 2 and len(colours(found, (0, 0, 400, 400))) == 1
