"""slurm/run.sh on a real Slurm of two nodes: submit, signal, requeue, resume; skipped where there is none."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import common

ROOT = Path(__file__).parent.parent
UP = bool(shutil.which("sbatch")) and not subprocess.run(["sinfo"], capture_output=True).returncode
MUST = "SLURM_REQUIRED" in os.environ  # as in CI
slurm = pytest.mark.skipif(not UP and not MUST, reason="no Slurm runs here (sinfo fails)")
TINY = "ddpm_unet_mnist.py --dataset few --image-size 16 --width 8 --mults 1 2 --bs 8".split()
TINY += (
    "--num-samples 10 --sampling-steps 4 --compile off --dtype float32 --eval-every 0 --log-every 5".split()
)


@pytest.fixture
def repo(few, tmp_path, monkeypatch):
    """A copy of the repository, from which jobs are submitted, with this Python as its environment."""
    for file in [*ROOT.glob("*.py"), ROOT / "slurm", few]:
        (shutil.copytree if file.is_dir() else shutil.copy)(file, tmp_path / file.name)
    (tmp_path / "logs" / "slurm").mkdir(parents=True)
    for name in [n for n in os.environ if n.startswith(("SLURM_JOB", "DIFFUSION_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VENV", sys.prefix)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Job:
    """A job on CPUs, from its submission on."""

    def __init__(self, repo, *options, flags=(), command=TINY):
        sbatch = "sbatch --parsable --gpus-per-node=0 --cpus-per-task=1".split()
        sbatch += [*options, "slurm/run.sh", *command, *flags]
        done = subprocess.run([*map(str, sbatch)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.number, self.repo = done.stdout.strip(), repo
        self.out = repo / "logs" / "slurm" / f"{self.number}.out"

    def facts(self):
        text = subprocess.run(["scontrol", "show", "job", self.number], capture_output=True, text=True).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def log(self):
        return self.out.read_text() if self.out.exists() else ""

    def until(self, ready, seconds=120):
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, self.log()
            time.sleep(0.2)
        return self

    def ended(self):
        """Waits until it has; -> its state, such as COMPLETED."""
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.facts()["JobState"] in states)
        return self.facts()["JobState"]

    def run(self):
        """The run's folder, as the job names it."""
        return Path((self.repo / "logs" / "slurm" / f"{self.number}.run").read_text().strip())

    def steps(self):
        return [x["step"] for x in lines(self.run())]

    def training(self, step=20):
        """Waits until it has made so many steps."""
        return self.until(lambda: (self.out.with_suffix(".run")).exists() and len(self.steps()) >= step)


def lines(run):
    file = run / "metrics" / "loss.jsonl"
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


def weights(run):
    state = common.newest_checkpoint(run)
    return [state["step"], *state["model"].values(), *state["ema"].values()]


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """The same run by two processes, never interrupted and without Slurm."""
    home = tmp_path_factory.mktemp("whole")
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node=2".split()]
    command += [ROOT / TINY[0], *TINY[1:], "--steps", "300"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DIFFUSION_LOGS": str(home)}
    done = subprocess.run(command, cwd=few.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = home.glob("ddpm/*")
    return run


SAMPLE = "--num-samples 240 --bs 6 --steps 20 --npz --frames 0 --out".split()


@slurm
def test_two_nodes_go_on_after_each_requeue_as_if_nothing_had_happened(repo, whole):
    """A job that trains gets the time limit's warning, to its shell alone; one that samples gets a signal to
    all but its shell, as in some preemptions. Then Slurm requeues the first, whose script is now only in the
    run's code."""

    def warn(job, *how):
        subprocess.run(["scancel", *how, job.number], check=True)

    job = Job(repo, "--nodes=2", flags=["--steps", 300, "--save-every", 1000])
    other = Job(repo, command=["ddim_sample.py", whole, *SAMPLE, repo / "two"])
    with ThreadPoolExecutor() as pool:  # neither may end before it is warned
        drawn = functools.partial(repo.glob, "two/*.part/*.npy")
        warned = pool.submit(lambda: warn(other.until(lambda: len([*drawn()]) > 3), "--signal=TERM"))
        warn(job.training(), "--signal=USR1", "--batch")
        job.until(lambda: ", continuing after step" in job.log())
        job.training(len(job.steps()) + 20)
        (repo / TINY[0]).unlink()
        subprocess.run(["scontrol", "requeue", job.number], check=True)
        warned.result()
    command = [sys.executable, ROOT / "ddim_sample.py", whole, *SAMPLE, repo / "one"]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)  # as in the job
    assert other.ended() == "COMPLETED" and other.facts()["Restarts"] == "1", other.log()
    assert re.search(r"continuing after \d+ of 40 batches", other.log())
    one, two = (next(repo.glob(f"{name}/*.npz")).read_bytes() for name in ("one", "two"))
    assert one == two
    assert job.ended() == "COMPLETED" and job.facts()["Restarts"] == "2", job.log()
    assert str(job.run().relative_to(repo)) in job.log()  # job and run name each other
    assert f"job     {job.out}" in (job.run() / "run.out").read_text()
    for text in ("stopped by a signal after step", ", continuing after step"):
        assert job.log().count(text) == 2
    assert job.steps() == list(range(1, 301)) and len(list((repo / "logs" / "ddpm").iterdir())) == 1
    torch.testing.assert_close(weights(job.run()), weights(whole), rtol=0, atol=0)
    assert [x["loss"] for x in lines(job.run())] == [x["loss"] for x in lines(whole)]


@slurm
def test_a_cancelled_job_saves_and_stays_cancelled(repo):
    job = Job(repo, flags=["--steps", 100_000]).training()
    subprocess.run(["scancel", job.number], check=True)
    assert job.ended() == "CANCELLED" and job.facts()["Restarts"] == "0"
    job.until(lambda: "stopped by a signal after step" in job.log())
    state = common.newest_checkpoint(job.run())
    assert state["step"] == job.steps()[-1]


@slurm
def test_an_error_on_one_node_ends_the_job_with_its_message(repo):
    source = (repo / TINY[0]).read_text()
    broken = source.replace(
        "        ema.update(model, step)\n", "        ema.update(model, step)\n        trip(rank, step)\n", 1
    )
    broken = broken.replace(
        "def train(cfg):",
        "def trip(rank, step):\n    assert rank == 0 or step < 5, 'tripped'\n\n\ndef train(cfg):",
    )
    (repo / TINY[0]).write_text(broken)
    job, start = Job(repo, "--nodes=2", flags=["--steps", 100_000]), time.monotonic()
    assert job.ended() == "FAILED" and time.monotonic() - start < 60
    assert "AssertionError: tripped" in job.log() and job.facts()["Restarts"] == "0"


# ---- before there is a job; these need no Slurm


@pytest.mark.parametrize(
    "arguments, environment, match",
    [
        ([], {}, "no script is named; sbatch slurm/run.sh SCRIPT.py"),
        (["nothing.py"], {}, "there is no script nothing.py in .*; submit from the repository"),
        (TINY, {"VENV": "nowhere"}, "VENV=nowhere holds no bin/python; make it"),
        (TINY, {"DIFFUSION_DATA": "nowhere"}, "DIFFUSION_DATA=nowhere is no folder"),
        (TINY, {"PATH": "/usr/bin:/bin", "VENV": ""}, "cannot import torch; set VENV"),
    ],
)
def test_what_is_missing_is_one_line_before_anything_is_queued(repo, arguments, environment, match):
    command = ["bash", "slurm/run.sh", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert re.search(match, done.stderr), done.stderr


def test_without_a_folder_for_logs_nothing_is_queued(repo):
    (repo / "logs" / "slurm").rmdir()
    done = subprocess.run(["bash", "slurm/run.sh", *TINY], capture_output=True, text=True)
    assert done.returncode == 2 and "logs/slurm, without which Slurm drops a job's log" in done.stderr


@slurm
def test_run_directly_it_submits_itself(repo):
    environment = os.environ | {"SBATCH_GPUS_PER_NODE": "0"}
    command = ["bash", "slurm/run.sh", *map(str, TINY), "--steps", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    number = re.search(r"Submitted batch job (\d+)", done.stdout)
    assert number, done.stderr
    subprocess.run(["scancel", number[1]], check=True)
