"""tools/slurm/train.sbatch, the script itself, where Slurm's commands are played."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "slurm" / "train.sbatch"
JOB = "1234567"

# One line a node; what is queued again.
SCONTROL = """
[ "$1 $2" = "show hostnames" ] && printf '%s\\n' $3 && exit
echo "$*" >> "$PLAYED/scontrol"
exit "${REQUEUE_CODE:-0}"
"""
# The command on each node at the same time, as --ntasks-per-node=1 has it.
SRUN = """
while case $1 in --*) true ;; *) false ;; esac; do
  echo "$1" >> "$PLAYED/srun"
  shift
done
echo "$SRUN_CPUS_PER_TASK" >> "$PLAYED/srun"
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" &
  tasks+=($!)
  echo $! >> "$PLAYED/tasks"
done
code=0
for task in "${tasks[@]}"; do
  wait "$task" || code=$?
done
exit $code
"""
# Notes its arguments; node 0 has the rank that writes. SIGNAL goes to the shell of the node, too.
TORCHRUN = """
printf '%s\\0' "$@" > "$PLAYED/torchrun.$SLURM_NODEID"
while [ "$1" != --out ]; do shift; done
if [ -n "${STATUS:-}" ] && [ "$SLURM_NODEID" = 0 ]; then
  mkdir -p "$2/00000-faces-32px-b8-s999"
  printf '{\\n "status": "%s",\\n "step": 7,\\n "kimg": 0.056\\n}\\n' "$STATUS" \
    > "$2/00000-faces-32px-b8-s999/run.json"
fi
[ -z "${SIGNAL:-}" ] || kill -s "$SIGNAL" $PPID
exit "${TORCHRUN_CODE:-1}"
"""


class Job:
    """A job in a folder whose name has a space, of which `start` is called each time it is queued.

    Attributes:
        out: the folder that the script gives fastgan.
    """

    def __init__(self, folder, nodes=1, torchrun=True):
        self.folder, self.nodes = folder / "a project", nodes
        self.out = self.folder / "runs" / f"slurm-{JOB}"
        self.played, commands = folder / "played", folder / "bin"
        played = {"scontrol": SCONTROL, "srun": SRUN} | ({"torchrun": TORCHRUN} if torchrun else {})
        for path in (self.folder, self.played, commands):
            path.mkdir()
        for name, lines in played.items():
            (commands / name).write_text(f"#!/bin/bash{lines}")
            (commands / name).chmod(0o755)
        self.path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def popen(self, *args, **variables):
        slurm = {
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": " ".join(f"node-{'abc'[i]}" for i in range(self.nodes)),
            "SLURM_JOB_NUM_NODES": str(self.nodes),
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_CPUS_PER_TASK": "16",
            "PLAYED": str(self.played),
            "PATH": self.path,
        }
        return subprocess.Popen(
            ["bash", SCRIPT, *args],
            cwd=self.folder,
            env={**os.environ, **slurm, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start(self, *args, **variables):
        """The script's exit code and what it said."""
        child = self.popen(*args, **variables)
        said = child.communicate(timeout=60)[0]
        return child.returncode, said

    def queued_again(self):
        """How often, by now; every time by its own number."""
        if not (self.played / "scontrol").exists():
            return 0
        calls = (self.played / "scontrol").read_text().splitlines()
        assert set(calls) == {f"requeue {JOB}"}
        return len(calls)

    def arguments(self, node=0):
        """torchrun's."""
        return (self.played / f"torchrun.{node}").read_text().split("\0")[:-1]

    def run_json(self):
        [path] = self.out.glob("0*-*/run.json")
        return json.loads(path.read_text())


def test_it_is_a_script_of_bash_with_options_of_sbatch():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    head, _, rest = SCRIPT.read_text().partition("\nset -u\n")
    # sbatch reads no further than the first command
    assert rest and all(not line or line.startswith("#") for line in head.splitlines())
    options = [line.split()[1] for line in head.splitlines() if line.startswith("#SBATCH")]
    wanted = {"--signal=USR1@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"}
    assert {*options} >= wanted | {"--nodes=1", "--gpus-per-node=1"}
    assert all(line.count(" ") == 1 for line in head.splitlines() if line.startswith("#SBATCH"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", SCRIPT], check=True)


# torchrun's exit code says nothing after a signal (it is 1 where all is saved): run.json decides.
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("torchrun_code", ["0", "1"])
@pytest.mark.parametrize(
    ("status", "signal_", "code", "queued"),
    [
        ("done", "", 0, 0),
        ("done", "USR1", 0, 0),
        ("preempted", "USR1", 0, 1),
        ("preempted", "TERM", 0, 1),
        ("failed", "", 1, 0),
        ("failed", "USR1", 1, 0),
        ("running", "USR1", 0, 1),  # killed before it had saved
        ("running", "TERM", 0, 1),
        ("running", "", 1, 0),  # killed by something else, as for its memory
        ("", "USR1", 0, 1),  # still at its images
    ],
)
def test_run_json_decides(tmp_path, nodes, torchrun_code, status, signal_, code, queued):
    job = Job(tmp_path, nodes)
    got, said = job.start(STATUS=status, SIGNAL=signal_, TORCHRUN_CODE=torchrun_code)
    assert (got, job.queued_again()) == (code, queued), said
    assert (f"queued again as {JOB}" in said) == bool(queued)


def test_where_nothing_was_written_and_no_signal_came_the_exit_code_is_all_there_is(tmp_path):
    """A wrong flag is not tried again and again; a run that is done has nothing to do."""
    job = Job(tmp_path)
    code, said = job.start(TORCHRUN_CODE="1")
    assert code == 1 and "ended with exit code 1, without a signal: not queued again" in said
    assert job.start(TORCHRUN_CODE="0")[0] == 0
    assert job.queued_again() == 0


@pytest.mark.parametrize("left", ["preempted", "running", "done"])
def test_what_an_earlier_start_left_does_not_count(tmp_path, left):
    job = Job(tmp_path)
    job.start(STATUS=left, SIGNAL="USR1")
    [path] = job.out.glob("0*-*/run.json")
    os.utime(path, (time.time() - 60,) * 2)
    queued = job.queued_again()
    assert job.start(TORCHRUN_CODE="1")[0] == 1  # and its signal is forgotten, too
    assert job.queued_again() == queued


def test_the_latest_of_several_runs_counts(tmp_path):
    job = Job(tmp_path)
    for number, status, age in ((0, "failed", 0), (2, "failed", 5), (1, "preempted", -5)):
        path = job.out / f"0000{number}-faces" / "run.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"status": status}))
        os.utime(path, (time.time() - age,) * 2)
    assert job.start()[0] == 0 and job.queued_again() == 1


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_is_started_on_each_node_and_the_options_reach_fastgan(tmp_path, nodes):
    job = Job(tmp_path, nodes)
    options = ["--data", "my images/a 'set' of $5", "--amp", "--crop", "*", ""]
    assert job.start(*options, STATUS="done")[0] == 0
    first, *others = (job.arguments(node) for node in range(nodes))
    assert first == [
        f"--nnodes={nodes}",
        "--nproc-per-node=4",
        "--rdzv-backend=c10d",
        f"--rdzv-id={JOB}",
        "--rdzv-endpoint=node-a:24567",
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",
        *("-m", "fastgan", "train", "--resume", "auto", "--out", str(job.out)),
        *options,
    ]
    assert all(arguments == first for arguments in others)
    assert (job.played / "srun").read_text().split() == ["--kill-on-bad-exit=0", "--wait=0", "16"]


@pytest.mark.parametrize("option", ["--out", "--out=here", "--resume", "--resume=runs/00000-faces"])
def test_options_that_the_script_sets_are_refused(tmp_path, option):
    job = Job(tmp_path)
    code, said = job.start("--amp", option, STATUS="done")
    assert code == 2 and f"{option.split('=')[0]} is set by this script" in said
    assert not (job.played / "srun").exists()


def test_a_job_that_cannot_be_queued_again_fails(tmp_path):
    job = Job(tmp_path)
    code, said = job.start(STATUS="preempted", REQUEUE_CODE="1")
    assert code == 1 and f"the same sbatch with out={job.out} goes on" in said


def descendants(pid):
    """Of a process, it included, by /proc."""
    found = [pid]
    for process in found:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
@pytest.mark.skipif(
    not Path(sys.executable).with_name("torchrun").exists(), reason="needs torchrun beside Python"
)
def test_a_job_whose_time_is_up_goes_on_and_is_done(tmp_path):
    """With torchrun and fastgan as they are; USR1 goes where Slurm sends it."""
    job = Job(tmp_path, torchrun=False)
    network = ("--size", "32", "--width", "4", "--latent", "8", "--batch", "8", "--grid", "4")
    options = (*network, "--data", "faces:20", "--device", "cpu", "--tick-kimg", "0.08")
    machine = {"SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "1"}
    child = job.popen(*options, "--kimg", "100000", **machine)
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size for p in job.out.glob("0*-*/stats.jsonl")):
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[0]
        time.sleep(0.1)
    [step] = (job.played / "tasks").read_text().split()
    for pid in descendants(int(step)):
        os.kill(pid, signal.SIGUSR1)
    said = child.communicate(timeout=120)[0]
    assert (child.returncode, job.queued_again()) == (0, 1), said
    stopped = job.run_json()
    assert stopped["status"] == "preempted" and stopped["step"] >= 10
    [checkpoint] = job.out.glob("0*-*/checkpoints/*/")
    assert json.loads((checkpoint / "meta.json").read_text())["step"] == stopped["step"]

    kimg = (stopped["step"] + 20) * 8 / 1000
    code, said = job.start(*options, "--kimg", f"{kimg}", **machine)
    assert (code, job.queued_again()) == (0, 1), said
    ended = job.run_json()  # of the same run: there is one
    assert ended["status"] == "done" and ended["step"] == stopped["step"] + 20
    [lines] = [p.read_text() for p in job.out.glob("0*-*/stats.jsonl")]
    steps = [json.loads(line)["step"] for line in lines.splitlines()]
    assert steps == sorted(set(steps)) and steps[0] == 10 and steps[-1] == ended["step"]
