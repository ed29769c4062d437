"""A Slurm cluster of many nodes on this one machine: real slurmctld, slurmd and munged, each node in namespaces of its own.

A node has its own network address, processes, /dev/shm and folder for what Ray leaves; files are shared, as on a shared file
system. Its GPUs are names without devices. It needs root, Slurm's and munge's programs, and a kernel that gives namespaces.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PROGRAMS = (
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "squeue",
    "munged",
    "ip",
    "unshare",
    "nsenter",
    "setpriv",
)
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
SUBNET = "10.213.7"
PRIVATE = Path(f"/tmp/anneal-{os.getuid()}")
"""Where a job's Ray has its files on a node."""

LOGIN = """
set -eu
hostname login
mount --bind "$ETC/hosts" /etc/hosts
ip link set lo up
ip link add bridge type bridge forward_delay 0
ip addr add "$SUBNET.1/24" dev bridge
ip link set bridge up
touch "$ETC/login.ready"
exec sleep infinity
"""

NODE = """
set -eu
hostname "$NAME"
mount --bind "$ETC/hosts" /etc/hosts
mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm
mkdir -p "$DISK" "$PRIVATE"
mount --bind "$DISK" "$PRIVATE"
while ! ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip link set lo up
ip addr add "$ADDRESS/24" dev eth0
ip link set eth0 up
ip route add default via "$SUBNET.1"
slurmd -D -N "$NAME" -f "$SLURM_CONF" &
slurmd=$!
trap 'kill -TERM $slurmd' TERM
while kill -0 $slurmd 2>/dev/null; do wait $slurmd || true; done
"""

CONF = """
ClusterName=simulated
SlurmctldHost=login({subnet}.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1024
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_min_interval=10000
MinJobAge=86400
KillWait=4
SlurmdTimeout=12
SlurmctldTimeout=30
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
GresTypes=gpu
NodeName={names} NodeAddr={addresses} CPUs=16 RealMemory=32768 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 PriorityTier=10 GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=30 PriorityTier=100 PreemptMode=OFF
"""


def missing() -> str | None:
    """Return why no cluster can be started here; None: it can."""
    if os.geteuid() != 0:
        return "a simulated Slurm cluster needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge iproute2)"
    probe = "ip link add bridge type bridge && ip link add port1 type veth peer name eth0 && mount -t tmpfs tmpfs /mnt"
    tried = subprocess.run(
        ["unshare", "-n", "-u", "-m", "--pid", "--fork", "--mount-proc", "sh", "-c", probe],
        env={**os.environ, "PATH": PATH},
        capture_output=True,
    )
    return None if tried.returncode == 0 else "the kernel gives no network, mount and process namespaces"


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 60.0, period_s: float = 0.1) -> None:
    """Wait until a condition holds; an assertion fails if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(period_s)


class Cluster:
    """Nodes node1, node2, … and a login host, in a folder with a short path."""

    def __init__(self, folder: Path, nodes: int = 8, gpus: int = 8) -> None:
        self.folder, self.gpus = folder, gpus
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RAY_"))},
            "PATH": PATH,
            "ETC": str(folder),
            "SUBNET": SUBNET,
            "PRIVATE": str(PRIVATE),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all and wait until every node is idle."""
        for name in ("log", "state", "spool", "disk", "gpus", "munge"):
            (self.folder / name).mkdir(mode=0o755)
        self._write_files()
        munge = self.folder / "munge"
        self._start(
            "munged",
            ["munged", "--foreground", *(f"--{what}-file={munge / what}" for what in ("key", "seed", "log", "pid"))]
            + [f"--socket={munge / 'socket'}"],
        )
        wait_for((munge / "socket").exists, "munged's socket")
        self._start("login", ["unshare", "-n", "-u", "-m", "sh", "-c", LOGIN])
        wait_for((self.folder / "login.ready").exists, "the login host")
        self._start("slurmctld", [*self._on_login(), "slurmctld", "-D", "-i", "-f", self._environment["SLURM_CONF"]])
        for name in self.nodes:
            self.boot(name)
        wait_for(lambda: self.idle() == set(self.nodes), "all nodes idle", period_s=0.2)

    def stop(self) -> None:
        """End every process of the cluster, those of jobs included."""
        for name in [*self.nodes, "slurmctld", "login", "munged"]:
            if name in self._running:
                self._end(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command on the login host, in the working folder."""
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', os.getcwd(), *command]
        environment = {**self._environment, **(env or {})}
        return subprocess.run(
            [*self._on_login(), *inside], env=environment, capture_output=True, text=True, timeout=120
        )

    def ask(self, *command: str) -> str:
        """Return what a command prints on the login host; it has to succeed."""
        done = self.run(command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return Slurm's fields of a job, by name."""
        found = (word.partition("=") for word in self.ask("scontrol", "-o", "show", "job", job).split())
        return {name: value for name, _, value in found}

    def idle(self) -> set[str]:
        """Return the nodes on which nothing runs."""
        return set(self.run(["sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N"]).stdout.split())

    def boot(self, name: str) -> None:
        """Switch a node on, unless it is; its temporary files are gone."""
        if name in self._running:
            return
        shutil.rmtree(self.folder / "disk" / name, ignore_errors=True)
        number = self.nodes.index(name) + 1
        own = {"NAME": name, "ADDRESS": f"{SUBNET}.{10 + number}", "DISK": str(self.folder / "disk" / name)}
        spaces = ["unshare", "-n", "-u", "-m", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._start(name, [*spaces, "sh", "-c", NODE], own)
        wait_for(lambda: self._init(name) is not None, name)
        self._wire("del", f"port{number}", check=False)
        self._wire("add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", str(self._init(name)))
        self._wire("set", f"port{number}", "master", "bridge", "up")

    def crash(self, name: str) -> None:
        """Cut a node's power: everything on it is gone at once."""
        init = self._init(name)
        assert init is not None
        os.kill(init, signal.SIGKILL)
        self._end(name)

    def cut(self, name: str) -> None:
        """Unplug a node's network."""
        self._wire("set", f"port{self.nodes.index(name) + 1}", "down")

    def join(self, name: str) -> None:
        """Plug it in again."""
        self._wire("set", f"port{self.nodes.index(name) + 1}", "up")

    def processes(self, name: str) -> list[str]:
        """Return the command of each process on a node that is not Slurm's or the node's own."""
        init = self._init(name)
        if init is None:
            return []
        space, found = os.readlink(f"/proc/{init}/ns/pid"), []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(process / "ns" / "pid") == space and int(process.name) != init:
                    found.append((process / "cmdline").read_text().replace("\0", " ").strip())
            except OSError:  # it has ended meanwhile
                continue
        return [command for command in found if command and not command.startswith(("slurmd", "slurmstepd"))]

    def running(self) -> dict[str, list[str]]:
        """Return the processes of jobs, by node."""
        return {name: found for name in self.nodes if (found := self.processes(name))}

    def files(self) -> list[Path]:
        """Return what jobs have in their private folders on the nodes."""
        return list((self.folder / "disk").glob("*/*"))

    def _write_files(self) -> None:
        count, hosts = len(self.nodes), ["127.0.0.1 localhost", f"{SUBNET}.1 login"]
        hosts += [f"{SUBNET}.{11 + i} {name}" for i, name in enumerate(self.nodes)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        span = f"[1-{count}]" if count > 1 else "1"
        addresses = f"{SUBNET}.[11-{10 + count}]" if count > 1 else f"{SUBNET}.11"
        (self.folder / "slurm.conf").write_text(
            CONF.format(folder=self.folder, subnet=SUBNET, names=f"node{span}", addresses=addresses, gpus=self.gpus)
        )
        files = [self.folder / "gpus" / f"gpu{i}" for i in range(self.gpus)]
        for number, file in enumerate(files):  # slurmd wants device files, which nothing opens
            try:
                os.mknod(file, 0o600 | 0o020000, os.makedev(195, number))
            except PermissionError:
                file.symlink_to("/dev/null")
        listed = "".join(f"NodeName=node{span} Name=gpu File={file}\n" for file in files)
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{listed}")
        (self.folder / "munge" / "key").write_bytes(os.urandom(1024))
        (self.folder / "munge" / "key").chmod(0o600)

    def _start(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._running[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],  # it ends with this process, however that ends
                env={**self._environment, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _end(self, name: str) -> None:
        """End what was started under a name; a node's processes end with the first of them."""
        process = self._running.pop(name)
        process.kill() if name in self.nodes else process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _init(self, name: str) -> int | None:
        """Return the number of a node's first process, as this machine counts."""
        if name not in self._running:
            return None
        pid = self._running[name].pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def _on_login(self) -> list[str]:
        return ["nsenter", "-t", str(self._running["login"].pid), "-n", "-u", "-m", "--"]

    def _wire(self, *words: str, check: bool = True) -> None:
        command = [*self._on_login(), "ip", "link", *words]
        subprocess.run(command, env=self._environment, check=check, capture_output=not check)
