"""What goes wrong around a run: full and read-only disks, untimely signals, lost processes, wrong clocks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import common
import ddpm_unet_mnist as ddpm
import rf_dit_cifar as rf

ROOT = Path(__file__).parent.parent
TINY = "--dataset digits --image-size 16 --bs 8 --sampling-steps 4 --num-samples 10 --log-every 1".split()
TINY += "--compile off --dtype float32".split()
SMALL = {ddpm: "--width 8 --mults 1 2".split(), rf: "--dim 32 --depth 2 --heads 2 --patch 4".split()}


def train(script, home, monkeypatch, *flags):
    """Runs it in this process with logs under home; -> its exit status and its newest run."""
    monkeypatch.setenv("DIFFUSION_LOGS", str(home))
    handlers, status = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}, 0
    with monkeypatch.context() as m:
        m.setattr("sys.stdout", sys.stdout)
        m.setattr("sys.stderr", sys.stderr)
        try:
            with common.exit_on_user_error():
                start = [] if "--resume" in flags else [*TINY, *SMALL[script]]
                script.train(common.parse(script.Config, script.__doc__, [*start, *map(str, flags)]))
        except SystemExit as e:
            status = e.code
        finally:
            for s, h in handlers.items():
                signal.signal(s, h)
    runs = sorted(home.glob("*/*"), key=lambda p: p.stat().st_mtime_ns)
    return status, runs[-1] if runs else None


def steps(run):
    return [json.loads(x)["step"] for x in (run / "metrics" / "loss.jsonl").read_text().splitlines()]


def weights(run):
    state = common.newest_checkpoint(run)
    return [state["step"], *state["model"].values(), *state["ema"].values(), state["optimizer"]["state"]]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    return True


# ---- signals


@pytest.mark.parametrize("script", [ddpm, rf], ids=lambda s: s.__name__)
@pytest.mark.parametrize("during", ["save", "validate", "save_images"])
def test_sigterm_in_the_middle_of(tmp_path, monkeypatch, capsys, script, during):
    """A checkpoint, an evaluation, a picture: each is finished, then the run stops; it ends as usual."""
    flags = ["--steps", 12, "--save-every", 4, "--eval-every", 4, "--sample-every", 4]
    status, whole = train(script, tmp_path / "whole", monkeypatch, *flags)
    assert status == 0
    owner = common if during == "save_images" else common.Run
    original, calls = getattr(owner, during), []

    def disturbed(*args):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # launchers and schedulers send it more than once
        return original(*args)

    with monkeypatch.context() as m:
        m.setattr(owner, during, disturbed)
        status, run = train(script, tmp_path / "cut", monkeypatch, *flags)
    assert status == common.EXIT_PREEMPTED and common.newest_checkpoint(run)["step"] == steps(run)[-1] < 12
    status, run = train(script, tmp_path / "cut", monkeypatch, "--resume", run)
    assert status == 0 and same(weights(run), weights(whole)) and steps(run) == list(range(1, 13))
    assert (run / "metrics/val.jsonl").read_text() == (whole / "metrics/val.jsonl").read_text()
    assert {f.name for f in (run / "samples").iterdir()} == {f.name for f in (whole / "samples").iterdir()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_there_is_a_run_ends_at_once(tmp_path, monkeypatch, capsys, number):
    """As long as a VAE trains, or images are read: minutes."""
    load, shut = common.load_dataset, []
    monkeypatch.setattr(
        common, "load_dataset", lambda *a, **more: os.kill(os.getpid(), number) or load(*a, **more)
    )
    monkeypatch.setattr(common, "THREADS", SimpleNamespace(shutdown=lambda **how: shut.append(how)))
    status, _ = train(ddpm, tmp_path, monkeypatch, "--steps", 12)
    assert status == common.EXIT_PREEMPTED and not list(tmp_path.rglob("run.yaml"))
    assert "stopped by a signal before the first step; start it again" in capsys.readouterr().out
    assert len(shut) == 1


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    original = common.Run.log

    def impatient(self, *args, **kwargs):
        original(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(common.Run, "log", impatient)
    with pytest.raises(KeyboardInterrupt):
        train(ddpm, tmp_path, monkeypatch, "--steps", 12)


STREAMED = """
import common, rf_dit_cifar as rf
common.MAX_BYTES = 0
with common.exit_on_user_error():
    rf.train(common.parse(rf.Config, ""))
"""


def test_sigterm_while_threads_decode(tmp_path, monkeypatch):
    """A dataset on the disk: the process ends with a checkpoint, and goes on with every step."""
    for i in range(300):
        file = tmp_path / "set" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 60).save(file)
    flags = [*TINY, *SMALL[rf], "--dataset", tmp_path / "set", "--eval-every", 0, "--sample-every", 0]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DIFFUSION_LOGS", str(tmp_path / "logs"))
    command = [sys.executable, "-c", STREAMED, *map(str, flags)]
    process = subprocess.Popen([*command, "--steps", "100000"], cwd=tmp_path)
    while process.poll() is None and not any(
        len(steps(f.parent.parent)) > 20 for f in tmp_path.glob("logs/*/*/metrics/loss.jsonl")
    ):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == common.EXIT_PREEMPTED
    (run,) = tmp_path.glob("logs/*/*")
    last = common.newest_checkpoint(run)["step"]
    assert steps(run) == list(range(1, last + 1))
    command = [*command[:3], "--resume", str(run), "--steps", str(last + 3)]
    assert subprocess.run(command, cwd=tmp_path, timeout=60).returncode == 0
    assert steps(run) == list(range(1, last + 4))


def test_a_lost_process_ends_the_others(few, script, tmp_path):
    """kill -9 of one of two: torchrun ends the other, and the run goes on, also as one process."""
    prefix = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = [*TINY, *SMALL[ddpm], "--dataset", few, "--eval-every", 0, "--save-every", 5, "--steps"]
    process = script(
        "ddpm_unet_mnist.py", *flags, 100_000, prefix=prefix, env={"OMP_NUM_THREADS": "1"}, wait=False
    )
    logs = tmp_path / "logs"
    while process.poll() is None and not any(
        len(steps(f.parent.parent)) > 20 for f in logs.glob("*/*/metrics/loss.jsonl")
    ):
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [c for c in children if b"\0RANK=1\0" in Path(f"/proc/{c}/environ").read_bytes()]
    os.kill(int(ranks[0]), signal.SIGKILL)
    start = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - start < 45
    (run,) = logs.glob("*/*")
    last = common.newest_checkpoint(run)["step"]
    p = script("ddpm_unet_mnist.py", "--resume", run, "--steps", last + 10)
    assert p.returncode == 0 and "2 processes before, 1 now: not bit for bit the same run" in p.out, p.err
    assert steps(run) == list(range(1, last + 11))


# ---- disks


@pytest.fixture
def disk(tmp_path):
    """disk(size, *options): a mounted tmpfs of so many bytes."""
    mounted = []

    def mount(size, *options):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        settings = ",".join([f"size={size}", *options])
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", settings, "none", place], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here ({done.stderr.strip()})")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)


def fill(place, leave=0):
    """Writes a file that leaves so many bytes free; -> that file."""
    room, ballast = os.statvfs(place), place / "ballast"
    ballast.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - leave)))
    return ballast


def at_step(monkeypatch, step, action):
    """Calls action() once, after the given step."""
    original = common.Run.log

    def log(self, now, **values):
        original(self, now, **values)
        if now == step:
            action()

    monkeypatch.setattr(common.Run, "log", log)


@pytest.mark.parametrize("leave", [100_000, 0], ids=["checkpoint", "metrics"])
def test_a_full_disk_stops_the_run_and_harms_nothing(tmp_path, disk, monkeypatch, capsys, leave):
    """100 kB hold metrics but no checkpoint, 0 hold nothing."""
    flags = ["--steps", 12, "--save-every", 4, "--eval-every", 0]
    _, whole = train(rf, tmp_path / "whole", monkeypatch, *flags)
    place, ballast = disk(8 << 20), []
    with monkeypatch.context() as m:
        at_step(m, 6, lambda: ballast.append(fill(place, leave)))
        status, _ = train(rf, place, m, *flags)
    error = capsys.readouterr().err
    assert status == 2 and re.fullmatch(r"error: No space left on device: .*; free some .*\n", error), error
    (run,) = place.glob("rf/*")
    assert common.newest_checkpoint(run)["step"] == 4 and not list(run.glob("checkpoints/.*"))
    ballast[0].unlink()
    status, run = train(rf, place, monkeypatch, "--resume", run)
    assert status == 0 and same(weights(run), weights(whole)) and steps(run) == list(range(1, 13))


def test_pictures_that_do_not_fit_are_no_reason_to_stop(tmp_path, disk, monkeypatch, capsys):
    place = disk(8 << 20)
    flags = ["--steps", 8, "--sample-every", 4, "--num-samples", 100, "--eval-every", 0, "--out", place]
    ballast, original = [], common.save_images

    def save_images(*args):
        if not ballast:
            ballast.append(fill(place, 8192))
            try:
                original(*args)
            finally:
                ballast[0].unlink()
        else:
            original(*args)

    monkeypatch.setattr(common, "save_images", save_images)
    status, run = train(rf, place, monkeypatch, *flags)
    printed = capsys.readouterr()
    assert status == 0 and printed.err == "", printed.err
    assert "warning: cannot write the pictures (No space left on device)" in printed.out
    assert steps(run) == list(range(1, 9))
    Image.open(run / "samples/step_00000008.gif").load()
    assert not (run / "samples/step_00000004.gif").exists()


def test_a_read_only_folder_is_one_line(disk, monkeypatch, capsys):
    status, run = train(rf, disk(1 << 20, "ro"), monkeypatch, "--steps", 2)
    error = capsys.readouterr().err
    assert status == 2 and run is None, error
    assert re.fullmatch(r"error: Read-only file system: .*; .* or set another folder .*\n", error)


# ---- clocks


def test_a_clock_that_is_set_back(tmp_path, monkeypatch):
    """The newest checkpoint is that of the latest step, whatever the dates say; no rate is negative."""
    flags = ["--steps", 12, "--save-every", 4, "--eval-every", 0]
    _, whole = train(rf, tmp_path / "whole", monkeypatch, *flags)

    class Early(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(1999, 1, 1)

    at_step(monkeypatch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    status, run = train(rf, tmp_path / "back", monkeypatch, *flags)
    for i, file in enumerate(sorted((run / "checkpoints").iterdir())):
        os.utime(file, (10**9 - i, 10**9 - i))
    monkeypatch.setattr(common, "datetime", Early)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    status, run = train(rf, tmp_path / "back", monkeypatch, "--resume", run)
    assert status == 0 and same(weights(run), weights(whole)) and steps(run) == list(range(1, 13))
    rates = [json.loads(x)["images_per_s"] for x in (run / "metrics/loss.jsonl").read_text().splitlines()]
    assert min(rates) > 0


# ---- hostile data


def test_hostile_images(tmp_path, monkeypatch):
    """A zip whose names lead outside, a bomb, one pixel, 900 million pixels: read, or named as unreadable."""
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "huge.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(150):
            z.write(tmp_path / "one.png", f"a/{i}.png")
        z.write(tmp_path / "one.png", "../../../a/outside.png")
    before = sorted(tmp_path.rglob("*"))
    data = common.load_dataset(str(tmp_path / "set.zip"), image_size=4)
    assert data.images.shape[0] == 143 and data.images[:, 0].unique().tolist() == [255]
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path.parent / "a").exists()
    shutil.copy(tmp_path / "set.zip", tmp_path / "bomb.zip")
    with (
        zipfile.ZipFile(tmp_path / "bomb.zip", "a", zipfile.ZIP_DEFLATED) as z,
        z.open("a/0bomb.png", "w") as f,
    ):
        for _ in range(300):  # 300 MB of zeros in 300 kB
            f.write(bytes(1 << 20))
    with pytest.raises(
        common.UserError, match="1 of 144 images .*bomb.png .larger than 256 MiB.; repair or remove"
    ):
        common.load_dataset(str(tmp_path / "bomb.zip"), image_size=4)
    with zipfile.ZipFile(tmp_path / "huge.zip", "w") as z:
        z.write(tmp_path / "huge.png", "a/huge.png")
    with pytest.raises(common.UserError, match="huge.png .*pixels.*; repair or remove them"):
        common.load_dataset(str(tmp_path / "huge.zip"), image_size=4)


# ---- growth


def test_nothing_grows_without_bound(tmp_path, monkeypatch):
    """Checkpoints that are kept, and what resuming from an earlier one leaves behind."""
    _, run = train(
        rf, tmp_path, monkeypatch, "--steps", 20, "--save-every", 2, "--keep", 3, "--eval-every", 0
    )
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == [
        f"step_{i:08d}.pt" for i in (16, 18, 20)
    ]
    for _ in range(3):
        train(rf, tmp_path, monkeypatch, "--resume", run / "checkpoints" / "step_00000016.pt")
    kept = sorted(f.name for f in (run / "checkpoints").iterdir())
    assert [n for n in kept if n.endswith(".pt")] == [f"step_{i:08d}.pt" for i in (16, 18, 20)]
    assert len(kept) == 3 + 2 * 3 and len(steps(run)) == 20  # what was asked to be made again, three times
