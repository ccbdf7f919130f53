"""The test cluster's configuration files."""

from pathlib import Path

NODES = ("node1", "node2")
SUBNET = "198.51.100"  # reserved for documentation, so in use nowhere
CONTROLLER = f"{SUBNET}.1"
PORT = 16817  # of the controller; the nodes use the next one
GRACE = 20  # seconds from SIGTERM to SIGKILL at a preemption

_SLURM_CONF = """
ClusterName=metaformer
SlurmctldHost={controller_name}({controller})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job restarts after cred_expire + 1 s; the minimum is 5, the default 120.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
PropagateResourceLimits=NONE
# Seconds for which `scontrol show job` knows a job that has ended.
MinJobAge=86400
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
# The nodes claim more than the machine has.
SlurmdParameters=config_overrides
# Seconds without an answer after which a node counts as down.
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
KillWait=5
InactiveLimit=0
CompleteWait=0
GresTypes=gpu
"""


def address(node: str) -> str:
    """Return the address of a node."""
    return f"{SUBNET}.{10 + NODES.index(node)}"


def slurm_conf(folder: Path, controller_name: str) -> str:
    """Return slurm.conf with two partitions on the same nodes, where jobs in `urgent` preempt those in `batch`."""
    common = _SLURM_CONF.format(folder=folder, controller_name=controller_name, controller=CONTROLLER, port=PORT)
    nodes = [
        f"NodeName={node} NodeAddr={address(node)} Port={PORT + 1} CPUs=4 RealMemory=32000 Gres=gpu:2" for node in NODES
    ]
    partitions = (
        f"PartitionName=batch Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE}",
        "PartitionName=urgent Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF",
    )
    return "\n".join([common, *nodes, *partitions, ""])


def gres_conf(folder: Path) -> str:
    """Return gres.conf with two GPUs per node, in name only, so that --gpus-per-node is accepted."""
    return f"Name=gpu File={folder}/dev/gpu[0-1]\n"


def cgroup_conf(mount_point: Path) -> str:
    """Return cgroup.conf for version 1 of cgroups, which works without systemd."""
    return f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={mount_point}\nCgroupAutomount=no\n"


def hosts(controller_name: str) -> str:
    """Return the /etc/hosts of the nodes."""
    names = {"127.0.0.1": "localhost", CONTROLLER: controller_name} | {address(node): node for node in NODES}
    return "".join(f"{number} {name}\n" for number, name in names.items())
