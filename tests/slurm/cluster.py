"""A real SLURM cluster on one machine: `python -m tests.slurm.cluster` runs one until Ctrl-C.

Each node is a slurmd with its own network, host-name, mount and process namespaces: its own address, name, /dev/shm and
process table. Jobs are tracked by cgroups, as on most clusters, so that a signal to a step reaches only torchrun. This
needs root, Debian's packages munge, slurmctld, slurmd and slurm-client, network namespaces and the freezer cgroup of
version 1; anything missing is reported. The nodes share /tmp; their CPUs and GPUs exist in name only.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.slurm.settings import CONTROLLER, NODES, address, cgroup_conf, gres_conf, hosts, slurm_conf

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "setpriv", "ip")
FREEZER = Path("/sys/fs/cgroup/freezer")
BRIDGE = "mfslurm"
SBIN = ":/usr/sbin:/sbin"

# The script of a node's first process, which starts slurmd and then reaps orphaned processes of jobs.
START_NODE = """
hostname "$1"
mount --bind "$3/hosts" /etc/hosts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip address add "$2/24" dev eth0
ip link set eth0 up
slurmd -D -f "$3/slurm.conf" -N "$1" &
wait $!
"""


class ClusterError(Exception):
    """The cluster cannot be started, or a part of it does not respond in time."""


def find_missing_requirement() -> str | None:
    """Return why no cluster can run on this machine, or None if one can."""
    if os.geteuid() != 0:
        return "SLURM's test cluster needs root"
    for program in PROGRAMS:
        if shutil.which(program, path=os.environ["PATH"] + SBIN) is None:
            return f"no {program}: SLURM is not installed; make test-slurm installs Debian's packages"
    if not os.access(FREEZER / "tasks", os.W_OK):
        return f"no writable {FREEZER}, with which SLURM's test cluster tracks processes"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "no network namespaces, in which SLURM's test cluster runs its nodes"
    return None


class Cluster:
    """A cluster whose daemons are children of this process and die with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.environ["PATH"] + SBIN}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration, start all daemons, and wait until the nodes are idle.

        Raises:
            ClusterError: The nodes do not become idle in time; the message has the end of the daemons' logs.
        """
        self._write_settings()
        self._ip("link", "add", BRIDGE, "type", "bridge")
        self._ip("address", "add", f"{CONTROLLER}/24", "dev", BRIDGE)
        self._ip("link", "set", BRIDGE, "up")
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={self.folder}/munge/{file}" for option, file in files.items()]
        self._spawn("munged", ["munged", "-F", *munge])
        wait_for((self.folder / "munge" / "socket").exists, 5, "munged's socket")
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")])
        for node in NODES:
            self.boot(node)
        try:
            wait_for(lambda: self.node_states() == dict.fromkeys(NODES, "idle"), 30, "idle nodes")
        except ClusterError as error:
            raise ClusterError(f"{error}: {self.node_states()}\n{self.logs()}") from error

    def _write_settings(self) -> None:
        for name in ("state", "log", *(f"spool/{node}" for node in NODES), "munge", "dev"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for gpu in range(2):
            os.mknod(self.folder / "dev" / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
        controller = os.uname().nodename.split(".")[0]
        settings = {
            "slurm.conf": slurm_conf(self.folder, controller),
            "gres.conf": gres_conf(self.folder),
            "cgroup.conf": cgroup_conf(FREEZER.parent),
            "hosts": hosts(controller),
        }
        for name, text in settings.items():
            (self.folder / name).write_text(text)

    def stop(self) -> None:
        """End all daemons and jobs, and remove their network links and cgroups."""
        for name in reversed(self._daemons):
            self._kill(name)
        remove_links(*(f"{BRIDGE}-{node}" for node in NODES), BRIDGE)
        for group in sorted(FREEZER.glob("slurm_node*/**/"), reverse=True):
            wait_for(partial(is_empty, group), 10, f"the end of what runs in {group}")
            group.rmdir()

    def crash(self, node: str) -> None:
        """Kill slurmd and all processes of its jobs at once, as if the node lost power."""
        self._kill(node)

    def boot(self, node: str) -> None:
        """Start a node, or restart one that has crashed."""
        unshare = ["unshare", "--net", "--uts", "--mount", "--propagation=slave", "--pid", "--fork", "--kill-child"]
        start = ["--mount-proc", "bash", "-euc", START_NODE, "node", node, address(node), str(self.folder)]
        pid = self._spawn(node, [*unshare, *start])
        here = Path("/proc/self/ns/net").readlink()
        wait_for(lambda: Path(f"/proc/{pid}/ns/net").readlink() != here, 5, f"{node}'s namespace")
        remove_links(f"{BRIDGE}-{node}")  # the kernel may not have removed a crashed node's link yet
        self._ip("link", "add", f"{BRIDGE}-{node}", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._ip("link", "set", f"{BRIDGE}-{node}", "master", BRIDGE, "up")

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Run a command as a user on the login node would, and return its stdout and stderr."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env or self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode:
            raise ClusterError(f"{command}: {done.stdout}")
        return done.stdout

    def enter(self, node: str) -> list[str]:
        """Return the prefix of a command that runs on a node outside of any job."""
        return ["nsenter", f"--target={self._daemons[node].pid}", "--net", "--uts", "--mount"]

    def node_states(self) -> dict[str, str]:
        """Return SLURM's state of each node; empty while the controller does not answer."""
        listed = self.run("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %t", check=False)
        return dict(line.split() for line in listed.splitlines() if len(line.split()) == 2)

    def logs(self) -> str:
        """Return the last lines of each daemon's log."""
        files = sorted((self.folder / "log").glob("*"))
        return "\n".join(f"--- {file.name}\n" + "\n".join(file.read_text().splitlines()[-8:]) for file in files)

    def _spawn(self, name: str, command: list[str]) -> int:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command], env=self.environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        self._daemons[name] = daemon
        return daemon.pid

    def _kill(self, name: str) -> None:
        self._daemons[name].kill()
        self._daemons[name].wait()

    def _ip(self, *arguments: str) -> None:
        self.run("ip", *arguments)


def is_empty(group: Path) -> bool:
    """Return whether a cgroup has no processes."""
    return not (group / "tasks").read_text()


def remove_links(*names: str) -> None:
    """Remove the network links that exist among the given ones."""
    for name in names:
        environment = os.environ | {"PATH": os.environ["PATH"] + SBIN}
        subprocess.run(["ip", "link", "del", name], env=environment, capture_output=True, check=False)


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until a condition is true.

    Raises:
        ClusterError: The condition is still false after the given number of seconds.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise ClusterError(f"waited {seconds:g} s for {what}, without success")
        time.sleep(0.1)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Run a cluster of two nodes inside the block. A lock allows one cluster at a time on a machine.

    Raises:
        ClusterError: The cluster cannot be started.
    """
    missing = find_missing_requirement()
    if missing is not None:
        raise ClusterError(missing)
    with Path("/tmp/metaformer-slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_links(*(f"{BRIDGE}-{node}" for node in NODES), BRIDGE)  # left by a killed cluster
        folder = Path(tempfile.mkdtemp(prefix="metaformer-slurm-"))
        cluster = Cluster(folder)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
            shutil.rmtree(folder)


def main() -> None:
    """Run a cluster for manual experiments."""
    with running_cluster() as cluster:
        print(
            f"export SLURM_CONF={cluster.environment['SLURM_CONF']}   # {', '.join(NODES)} are idle; Ctrl-C ends them"
        )
        try:
            while True:
                time.sleep(60)
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    main()
