"""A Slurm that is none: scripts on PATH that answer from files, and write down what they are asked."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest

SINFO = """\
gpu*|gpu:h100:8(S:0-1)|96|4|2-00:00:00
gpu*|gpu:a100:4|64|6|2-00:00:00
cpu|(null)|64|10|infinite
"""
HELP = """\
Usage: sbatch [OPTIONS...] executable [args...]
      --mem=MB                minimum amount of real memory
      --reservation=name      allocate resources from named reservation
      --gres=list             required generic resources
  -c, --cpus-per-task=ncpus   number of cpus required per task
  -t, --time=minutes          time limit
      --container-image=IMAGE from a plugin
"""
SCRIPTS = {
    "sbatch": """\
if [ "$1" = --help ]; then cat "$FAKE/help"; exit 0; fi
for script in "$@"; do :; done
if grep -q "${REFUSED:-no such text}" "$script"; then echo "sbatch: error: Batch job submission failed: $SAID" >&2; exit 1; fi
id=$((101 + $(ls "$FAKE/jobs" | grep -c '\\.sh$')))
cp "$script" "$FAKE/jobs/$id.sh"; env > "$FAKE/jobs/$id.env"
echo "Submitted batch job $id"
""",
    "sinfo": 'cat "$FAKE/sinfo"\n',
    "squeue": """\
for word in "$@"; do case $word in --jobs=*) id=${word#--jobs=};; esac; done
echo "$id" >> "$FAKE/asked"
cd "$FAKE/states"; known=$(ls | grep -E "^${id}(_[0-9]+)?$")
if [ -z "$known" ]; then echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi
for task in $known; do echo "$task $(cat $task)"; done
""",
    "scontrol": 'cat "$FAKE/ended/$4"\n',
    "scancel": 'echo "$@" >> "$FAKE/cancelled"\n',
    "srun": "exit 0\n",
}


@dataclass(frozen=True)
class FakeSlurm:
    folder: Path

    @property
    def jobs(self) -> list[str]:
        """Ids of the jobs that were submitted."""
        return sorted(file.stem for file in (self.folder / "jobs").glob("*.sh"))

    def script(self, job_id: str) -> str:
        return (self.folder / "jobs" / f"{job_id}.sh").read_text()

    def options(self, job_id: str) -> dict[str, str]:
        """What a job's script tells sbatch."""
        lines = [line.split("--", 1)[1] for line in self.script(job_id).splitlines() if line.startswith("#SBATCH")]
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    def environment(self, job_id: str) -> dict[str, str]:
        lines = (self.folder / "jobs" / f"{job_id}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def command(self, job_id: str) -> str:
        return self.script(job_id).strip().splitlines()[-1]

    def state(self, job_id: str, state: str | None) -> None:
        file = self.folder / "states" / job_id
        file.unlink(missing_ok=True)
        if state is not None:
            file.write_text(state + "\n")

    def ended(self, job_id: str, state: str, code: int) -> None:
        self.state(job_id, None)
        (self.folder / "ended" / job_id).write_text(
            f"JobId={job_id} JobState={state} Reason=None ExitCode={code}:0 Restarts=0\n"
        )

    @property
    def cancelled(self) -> list[str]:
        return self._noted("cancelled")

    @property
    def asked(self) -> list[str]:
        """Ids of the jobs whose states were asked for."""
        return self._noted("asked")

    def _noted(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().split() if file.is_file() else []


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("bin", "jobs", "states", "ended"):
        (folder / name).mkdir()
    for name, text in SCRIPTS.items():
        file = folder / "bin" / name
        file.write_text("#!/bin/sh\n" + text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    (folder / "sinfo").write_text(SINFO)
    (folder / "help").write_text(HELP)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return FakeSlurm(folder)
