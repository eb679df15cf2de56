"""A real SLURM of two nodes on one machine, under a folder of its own, for the time of a test session.

    python tests/slurm/cluster.py       brings it up, says how to talk to it, takes it down at the end of stdin

munged, slurmctld and two slurmd, of the packages that `make slurm` installs, run as whoever calls, without systemd and
without a change to /etc. For root each node has its own hostname, hosts file and mounts (`unshare`); otherwise both
share those of the machine. CPUs, memory and GPUs of the nodes are claims of the configuration: nothing enforces them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = {"node1": "127.0.0.11", "node2": "127.0.0.12"}
CPUS, MEMORY_MB, GPUS = 4, 8000, 2
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={prefix}/run/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
CommunicationParameters=NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=256
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
SlurmdTimeout=10
SchedulerParameters=sched_interval=2,bf_interval=2
FirstJobId={first_job}
StateSaveLocation={prefix}/state
SlurmdSpoolDir={prefix}/spool/%n
SlurmctldPidFile={prefix}/run/slurmctld.pid
SlurmdPidFile={prefix}/run/%n.pid
SlurmctldLogFile={prefix}/log/slurmctld.log
SlurmdLogFile={prefix}/log/%n.log
{nodes}
PartitionName=debug Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=ALL PriorityTier=1 MaxTime=10
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    absent = [name for name in DAEMONS if shutil.which(name, path=_PATH) is None]
    return f"no {', '.join(absent)} on this machine; `make slurm` (as root) installs SLURM" if absent else None


class Cluster:
    """Two nodes, node1 and node2, in the partitions debug, high (preempts debug) and short (10 minutes).

    Attributes
    ----------
    prefix : Path
        All files of the cluster.
    environment : dict
        What a command needs to talk to this cluster.
    own_hosts : bool
        Whether each node has its own hostname and mounts.
    hidden : Path
        A folder that node2 does not see the contents of, where `own_hosts`.
    """

    def __init__(self) -> None:
        # The socket's path must be short, shorter than pytest's folders are.
        self.prefix = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(self.prefix / "slurm.conf")}
        self.hidden = self.prefix / "hidden"
        self.own_hosts = os.geteuid() == 0 and _works("unshare", "--mount", "--uts", "true")
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start_munged()
            self._start("slurmctld", "slurmctld", "-D", "-c", "-f", self.prefix / "slurm.conf")
            for node in NODES:
                self.start_node(node)
            self.wait(lambda: self.states() == dict.fromkeys(NODES, "idle"), 60, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """All processes are ended by their ids: daemons, and what jobs have left."""
        for name in [*NODES, "slurmctld", "munged"]:
            self._stop(name)
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.prefix, ignore_errors=True)

    def call(self, *words: object, timeout: float = 30) -> str:
        """What a command of SLURM's says; without its controller it would wait for minutes."""
        done = subprocess.run([*map(str, words)], env=self.environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise AssertionError(f"{words}: {done.returncode}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """State of each node, `idle*` where it does not answer."""
        return dict(line.split() for line in self.call("sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T").splitlines())

    def job(self, number: object, field: str = "%T") -> str:
        """A field of `squeue` for a job, by default its state."""
        return self.call("squeue", "-h", "-j", number, "-t", "all", "-o", field)

    def wait(self, until: Callable[[], bool], seconds: float, what: str) -> None:
        """Ask again and again; AssertionError with the daemons' words after so long."""
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end:
                logs = "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in (self.prefix / "log").glob("*.log"))
                raise AssertionError(f"no {what} after {seconds} s\n{self.call('squeue', '-t', 'all', '-l')}\n{logs}")
            time.sleep(0.2)

    def clear(self) -> None:
        """Cancel all jobs and bring both nodes back, for the next test."""
        self.call("scancel", "--user", os.environ.get("USER") or _user())
        for node in NODES:
            if node not in self._daemons:
                self.start_node(node)
        self.wait(self._idle_again, 60, "idle nodes")

    def _idle_again(self) -> bool:
        """Whether both nodes are idle; one that is down is asked back."""
        for node, state in self.states().items():
            if state.startswith(("down", "drain")):
                with contextlib.suppress(AssertionError):  # refused where it has come back by itself meanwhile
                    self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        return self.states() == dict.fromkeys(NODES, "idle")

    def start_node(self, node: str) -> None:
        words = ["slurmd", "-D", "-N", node, "-f", str(self.prefix / "slurm.conf")]
        if self.own_hosts:
            private = [f"hostname {node}", f"mount --bind {self.prefix}/hosts /etc/hosts"]
            private += [f"mount --bind {self.prefix}/empty {self.hidden}"] if node == "node2" else []
            script = " && ".join([*private, 'exec "$@"'])
            words = ["unshare", "--mount", "--uts", "sh", "-c", script, "sh", *words]
        self._start(node, *words)

    def stop_node(self, node: str) -> None:
        """As if its power had gone: the daemon and all it has started are killed."""
        # The pid of the popen is the daemon's: unshare and sh are replaced by it.
        mine = [p for p in self.processes() if p.pid != os.getpid() and _environment(p).get("SLURMD_NODENAME") == node]
        self._daemons.pop(node).kill()
        for process in mine:
            process.kill()

    def _configure(self) -> None:
        for name in ("run", "state", "log", "hidden", "empty", *(f"spool/{node}" for node in NODES)):
            (self.prefix / name).mkdir(parents=True)
        ports = _free_ports(1 + len(NODES))
        lines = []
        for (node, address), port in zip(NODES.items(), ports[1:], strict=True):
            where = (node, address) if self.own_hosts else (socket.gethostname(), "127.0.0.1")
            lines.append(
                f"NodeName={node} NodeHostname={where[0]} NodeAddr={where[1]} Port={port} CPUs={CPUS} "
                f"RealMemory={MEMORY_MB} Gres=gpu:{GPUS}"
            )
        text = _CONFIGURATION.format(
            host=socket.gethostname(),
            ports=ports,
            user=_user(),
            prefix=self.prefix,
            nodes="\n".join(lines),
            # Ports of a run follow from its job: two clusters on a machine must not count alike.
            first_job=1000 + secrets.randbelow(60_000),
        )
        (self.prefix / "slurm.conf").write_text(text)
        (self.prefix / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        hosts = "".join(f"{address} {node}\n" for node, address in NODES.items())
        (self.prefix / "hosts").write_text(Path("/etc/hosts").read_text() + "\n" + hosts)

    def _start_munged(self) -> None:
        key = self.prefix / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        socket_ = self.prefix / "run" / "munge.sock"
        files = {"socket": socket_, "key-file": key, "log-file": self.prefix / "log" / "munged.log"}
        files |= {f"{name}-file": self.prefix / "run" / f"munged.{name}" for name in ("pid", "seed")}
        # It refuses folders that others may write to, or whose group may not enter.
        self._start("munged", "munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in files.items()))
        end = time.monotonic() + 20
        while not socket_.exists():
            if time.monotonic() > end:
                raise AssertionError("munged does not start")
            time.sleep(0.02)

    def _start(self, name: str, *words: object) -> None:
        with open(self.prefix / "log" / f"{name}.err", "ab") as errors:
            self._daemons[name] = subprocess.Popen(
                [*map(str, words)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.terminate()
        try:
            daemon.wait(timeout=5)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def processes(self) -> list[psutil.Process]:
        """Those of this cluster, daemons and jobs, known by the configuration they were given."""
        wanted = self.environment["SLURM_CONF"]
        return [
            process
            for process in psutil.process_iter()
            if process.pid != os.getpid() and _environment(process).get("SLURM_CONF") == wanted
        ]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name


def _works(*words: str) -> bool:
    try:
        return subprocess.run(words, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


if __name__ == "__main__":
    if why := missing():
        sys.exit(f"error: {why}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Cluster() as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        sys.stdin.read()
