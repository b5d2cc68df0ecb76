"""Drawn digits, batches, time embedding, EMA, flags, errors and files of common.py."""

import errno
import functools
import importlib
import math
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from torch.distributed.run import get_args_parser

import common
import rf_dit_cifar
from common import UserError

SCRIPTS = ["ddpm_unet_mnist", "rf_dit_cifar", "latent_dit_sdvae", "ddim_sample"]


def test_digits_are_deterministic_balanced_and_split():
    a, b, test = (common.load_dataset("digits", split=s) for s in ("train", "test", "test"))
    assert torch.equal(test.images, b.images) and a.images.shape == (20_000, 1, 28, 28)
    assert test.images.shape == (2_000, 1, 28, 28) and test.labels.bincount().tolist() == [200] * 10
    train = {x.numpy().tobytes() for x in a.images}
    assert len(train) == 20_000 and not any(x.numpy().tobytes() in train for x in test.images)
    # images of a class look alike: the nearest training image is nearly always of the same class
    x, y = (data.images.float().flatten(1) for data in (test, a))
    nearest = a.labels[torch.cdist(x[:500], y).argmin(1)]
    assert (nearest == test.labels[:500]).float().mean() > 0.95
    assert common.load_dataset("digits", split="test", channels=3).images.shape[1:] == (3, 32, 32)
    assert common.load_dataset("digits", split="test", image_size=16).images.shape[1:] == (1, 16, 16)


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="2 GPUs cannot serve 3 or more .*; use torchrun --nproc-per-node=2"):
        common.get_device("auto")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_process_gets_its_own_gpu():
    device = common.get_device("auto")
    assert torch.cuda.current_device() == device.index == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_kept_on_the_cpu():
    """Otherwise the kernel zeroes it again in every step, which shows as page faults."""
    code = """if 1:
        import resource, sys, torch, common
        if sys.argv[1] == "kept":
            common.get_device("cpu")
        counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
        for i in range(40):  # glibc joins small pieces only after some seven rounds
            torch.ones(2**24 + i % 3 * 2**20)  # 64, 68, 72 MiB: one size alone is kept without trim_threshold
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        faults = [b - a for a, b in zip(counts, counts[1:])]
        print(sum(faults[-20:]))
    """
    run = functools.partial(subprocess.run, cwd=Path(common.__file__).parent, capture_output=True, check=True)
    faults = [int(run([sys.executable, "-c", code, arg]).stdout) for arg in ("kept", "usual")]
    assert faults[0] < 100 < faults[1]


@pytest.mark.skipif(platform.system() != "Linux", reason="counts the threads in /proc")
def test_threads_that_read_start_no_others():
    """If OpenMP has more threads than cores, they sleep between operations: up to ten times as slow."""
    code = """if 1:
        import os, threading, torch, common
        def read(n):  # would be split among threads
            return torch.randperm(n).numel() and torch.get_num_threads()
        counts = [len(os.listdir("/proc/self/task"))]
        print(*common.THREADS.map(read, [10**5] * 8))
        counts.append(len(os.listdir("/proc/self/task")) - threading.active_count() + 1)
        print(read(10**5), *counts)
    """
    run = functools.partial(subprocess.run, cwd=Path(common.__file__).parent, capture_output=True, check=True)
    out = run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "2"}, text=True).stdout
    seen, (own, before, after) = ([int(x) for x in line.split()] for line in out.splitlines())
    assert {*seen} == {1} and after == before
    assert own == 2  # the main thread's, still


def numbered(n):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 1, 2, 2)
    images[:, :, :, 1] = 255  # left and right differ
    return common.Dataset("numbered", images, torch.arange(n), ["a"])


def test_batches_shuffle_without_replacement_and_depend_on_seed_and_step_alone():
    batches = common.Batches(numbered(10), 4, seed=1, device="cpu")
    stream = torch.cat([batches(s)[1] for s in range(5)])  # two epochs of ten; batch 2 spans them
    assert sorted(stream[:10].tolist()) == sorted(stream[10:].tolist()) == list(range(10))
    assert stream[:10].tolist() != stream[10:].tolist()
    again = common.Batches(numbered(10), 4, seed=1, device="cpu")
    assert torch.equal(again(3)[1], batches(3)[1])
    assert not torch.equal(common.Batches(numbered(10), 4, seed=2, device="cpu")(0)[1], batches(0)[1])
    x, y = batches(0)
    assert torch.equal(x[:, 0, 0, 0], y / 127.5 - 1) and x.dtype == torch.float32


def test_ranks_share_the_batch_flips_included():
    whole = common.Batches(numbered(50), 8, 0, "cpu", flip=True)
    parts = [common.Batches(numbered(50), 8, 0, "cpu", rank, 2, flip=True) for rank in (0, 1)]
    for step in range(7):
        assert torch.equal(torch.cat([p(step)[0] for p in parts]), whole(step)[0])
    left = torch.cat([whole(s)[0][:, 0, 0, 0] == 1 for s in range(20)]).float().mean()
    assert 0.3 < left < 0.7  # half are mirrored
    plain = common.Batches(numbered(50), 8, 0, "cpu")
    assert not any((plain(s)[0][:, 0, 0, 0] == 1).any() for s in range(20))  # no mirroring without flip
    masks = [(whole(s)[0] == plain(s)[0].flip(-1)).flatten(1).all(1) for s in range(20)]
    assert all(torch.equal(m, whole.hflip(s)) for s, m in enumerate(masks))
    assert len({tuple(m.tolist()) for m in masks}) > 15  # others in each step, and with another seed
    assert not torch.equal(common.Batches(numbered(50), 8, 1, "cpu", flip=True).hflip(0), masks[0])


def test_time_embedding_equals_that_of_diffusers():
    t = torch.rand(64)
    theirs = get_timestep_embedding(1000 * t, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(common.time_embedding(t, 32), theirs, atol=2e-4, rtol=0)


def test_ema_warms_up_and_copies_buffers():
    model = torch.nn.BatchNorm1d(1)
    ema = common.EMA(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(5.0)
    ema.update(model, 1)  # decay (1 + 1) / (20 + 1) = 2 / 21
    assert ema.model.weight.item() == pytest.approx(3 - 2 * 2 / 21) and ema.model.running_mean.item() == 5
    ema.update(model, 10**6)  # decay 0.5
    assert ema.model.weight.item() == pytest.approx(3 - 2 / 21)
    assert not any(p.requires_grad for p in ema.model.parameters()) and not ema.model.training


# ---- flags


@dataclass
class Config:
    # length
    steps: int = common.resumable(10)  # how long
    lr: float = 1e-3  # how fast, at 100%
    # model and others
    mults: tuple[int, ...] = (1, 2)  # how wide
    clip_x0: bool = True  # whether to clip
    kind: Literal["a", "b"] = "a"  # which
    resume: str = ""  # a run
    config: str = ""  # a file
    shape: tuple[int, ...] = common.derived((1, 2))


def flags(*argv):
    return common.parse(Config, "doc", argv)


def test_flags_are_typed_and_documented_below_their_headings(capsys):
    cfg = flags("--steps", "3", "--lr", "1e-2", "--mults", "1", "2", "4", "--no-clip-x0", "--kind", "b")
    assert cfg == Config(3, 0.01, (1, 2, 4), False, "b")
    with pytest.raises(SystemExit, match="0"):
        flags("--help")
    text = " ".join(capsys.readouterr().out.split())
    words = ("length: --steps INT how long [10] --lr", "how fast, at 100% [0.001] model and others: --mults")
    assert all(w in text for w in (*words, "whether to clip [True]")) and "--shape" not in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_of_the_scripts(name, capsys):
    """Each has a heading and a help text. None is a flag of torchrun or the beginning of one: torchrun also
    reads what follows the script's name, and accepts abbreviations."""
    Config = importlib.import_module(name).Config
    notes, names = common.comments(Config), [f.name for f in fields(Config) if "derived" not in f.metadata]
    assert not [n for n in names if not all(notes[n])]
    with pytest.raises(SystemExit, match="0"):
        common.parse(Config, "", ["--help"])
    text = capsys.readouterr().out
    assert all(f"\n{notes[n][0]}:\n" in text and f"\n  {common._flag(n)}" in text for n in names)
    theirs = [o for a in get_args_parser()._actions for o in a.option_strings if o.startswith("--")]
    ours = [common._flag(prefix + n) for n in names for prefix in ("", "no_")]
    assert "--nnodes" in theirs and not [(o, t) for o in ours for t in theirs if t.startswith(o)]


BAD = """--stpes 3 -> unknown argument --stpes; did you mean --steps
--step 3 -> unknown argument --step;
--m 3 -> unknown argument --m; did you mean --mults
--shape 3 -> unknown argument --shape
--steps many -> invalid int value: 'many'; see --help
--kind c -> invalid choice: 'c'
--resume x --config y -> exclude each other
--resume= -> --resume is empty
--resume x -> x is not a run
--config x.yaml -> x.yaml is not a readable run.yaml
config: {stepz: 5} -> unknown argument --stepz
config: {steps: many} -> invalid int value
config: {clip_x0: maybe} -> clip-x0
config: [steps -> not a readable run.yaml
steps: 5 -> not a readable run.yaml
config: !!python/object/apply:os.system [touch owned] -> not a readable run.yaml"""


def test_bad_flags_and_config_files(tmp_path, monkeypatch):
    """There are no abbreviations: a typo must not become another flag."""
    monkeypatch.chdir(tmp_path)
    for text, match in (case.split(" -> ") for case in BAD.splitlines()):
        Path("run.yaml").write_text(text)
        with pytest.raises(UserError, match=match):
            flags(*(text.split() if text[0] == "-" else ["--config", "run.yaml"]))
    assert [*tmp_path.iterdir()] == [tmp_path / "run.yaml"]  # nothing was executed
    Path("run.yaml").write_text("config: {steps: 5, lr: 1e-2, mults: [3], clip_x0: false, shape: [7, 7]}")
    expected = Config(6, 0.01, (3,), False, config="run.yaml", shape=(7, 7))
    assert flags("--config", "run.yaml", "--steps", "6") == expected


def test_resume_refuses_flags_and_code_that_would_change_the_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (tmp_path / "run.yaml").write_text("config: {steps: 5, lr: 0.01}")
    for folder in ("code", "checkpoints"):
        (tmp_path / folder).mkdir()
    for file in (__file__, common.__file__):  # this file has the Config, so it is the script
        shutil.copy(file, tmp_path / "code")
    state = {"model": {}, "ema": {}, "optimizer": {}, "step": 4, "seconds": 2.0, "skipped": 1}
    torch.save(state | {"config": {"steps": 5, "lr": 0.01}}, tmp_path / "checkpoints" / "step_00000004.pt")

    def resume(*argv):  # rank 1 writes nothing
        cfg = flags("--resume", str(tmp_path), *argv)
        return cfg, common.Run(cfg, __file__, rank=1)

    cfg, run = resume("--steps", "9")
    assert cfg == Config(9, 0.01, resume=str(tmp_path)) and (run.step, run.seconds) == (4, 2.0)
    assert resume("--lr", "0.01")[0] == Config(5, 0.01, resume=str(tmp_path))  # the same value
    with pytest.raises(UserError, match=f"--lr is 0.02, but 0.01 in {tmp_path}; leave it out, or start a"):
        resume("--lr", "0.02")
    with pytest.raises(UserError, match="--kind is b, but a in"):  # newer than the run, which has the default
        resume("--kind", "b")
    for more in (["--steps", "3"], ["--steps", "4"]):  # it counts the whole run
        with pytest.raises(
            UserError, match="--steps is .*, but the run has made 4; name those of the whole run"
        ):
            resume(*more)
    with pytest.raises(UserError, match="^the run has no checkpoint step_9.pt; there are step_00000004.pt$"):
        common.find_run(tmp_path / "checkpoints" / "step_9.pt")
    code = tmp_path / "code" / Path(__file__).name
    code.write_text("")
    with pytest.raises(UserError, match=f"^{code.name} differs .*; use python {code} --resume {tmp_path}, "):
        resume()


@pytest.mark.parametrize(
    "hint, default", [(float | None, None), (int, 5e3), (int, "1"), (list[int], ()), (Literal["a"], "c")]
)
def test_a_default_of_another_type_is_a_type_error(hint, default):
    """It is raised for whoever adds the field, so it is not a UserError."""
    with pytest.raises(TypeError, match=re.escape(f"Config.x is {hint}, but its default is {default!r}")):
        common._options("Config.x", hint, default)
    with pytest.raises(TypeError, match="is <class 'bytes'>; a flag is a bool, int, float, str, Literal, or"):
        common._options("Config.x", bytes, b"")


def test_types_that_come_back_from_a_run_yaml():
    assert common._options("Config.x", Literal[1, 2], 2)["type"] is int
    for hint, default in ((tuple[bool, ...], (True,)), (tuple[Literal["a"], ...], ("a",))):
        with pytest.raises(TypeError, match="a flag is a bool, int, float, str, Literal, or a tuple of"):
            common._options("Config.x", hint, default)


def test_values_of_yaml_that_no_flag_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @dataclass
    class Switch:
        flip: Literal["auto", "on", "off"] = "auto"  # as in the scripts
        out: str = ""  # a folder
        config: str = ""  # a file
        resume: str = ""  # a run

    Path("run.yaml").write_text("config: {flip: off}")  # which YAML reads as false
    monkeypatch.setattr(common, "comments", lambda _: {})
    assert common.parse(Switch, "", ["--config", "run.yaml"]).flip == "off"
    for text, match in (
        ("out: null", "out is None; leave it out"),
        ("resume: x", "resume is x; leave it out"),
    ):
        Path("run.yaml").write_text(f"config: {{{text}}}")
        with pytest.raises(UserError, match=f"^run.yaml: {match}"):
            common.parse(Switch, "", ["--config", "run.yaml"])


def test_what_is_drawn_without_a_generator_is_seeded():
    def draw(*key):
        common.seed_all(*key)
        return torch.rand(1).item(), np.random.rand(), random.random()

    assert draw(0, "x") == draw(0, "x") and all(a != b for a, b in zip(draw(0), draw(1), strict=True))


def test_modules_beside_a_script_belong_to_its_code(tmp_path):
    (tmp_path / "idea.py").write_text("import common, helper\nfrom nets.layers import act\n")
    (tmp_path / "nets" / "deep").mkdir(parents=True)
    (tmp_path / "nets" / "layers.py").write_text("from . import other, deep\n")
    (tmp_path / "nets" / "deep" / "__init__.py").write_text("")
    (tmp_path / "helper.py").write_text("import os\n    from deeper import x\n")
    (tmp_path / "deeper.py").write_text("")
    (tmp_path / "other.py").write_text("")
    kept = common.local_files(tmp_path / "idea.py")
    names = ["common.py", "deeper.py", "helper.py", "idea.py", "nets/deep/__init__.py", "nets/layers.py"]
    assert sorted(kept) == [*names, "other.py"]
    (tmp_path / "common.py").write_text("x = 1\n")  # that beside the script is what it imports
    assert common.local_files(tmp_path / "idea.py")["common.py"] == b"x = 1\n"
    (tmp_path / "common.py").unlink()
    (tmp_path / "run" / "code").mkdir(parents=True)
    (tmp_path / "run" / "run.yaml").write_text("")
    for name, content in kept.items():
        (tmp_path / "run" / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "code" / name).write_bytes(content)
    common.check_code(tmp_path / "run", tmp_path / "idea.py")
    (tmp_path / "nets" / "layers.py").write_text("")
    with pytest.raises(UserError, match="^nets/layers.py differs from the run's code"):
        common.check_code(tmp_path / "run", tmp_path / "idea.py")
    (tmp_path / "nets" / "layers.py").write_bytes(kept["nets/layers.py"])
    (tmp_path / "helper.py").write_text("import os, deeper  # edited\n")
    with pytest.raises(UserError, match="^helper.py differs from the run's code; use python .*code/idea.py "):
        common.check_code(tmp_path / "run", tmp_path / "idea.py")


def test_a_full_disk_that_numpy_reports_is_one_line(tmp_path, capsys):
    def write(file):
        raise OSError("10 requested and 3 written")  # as its tofile() does, without a number

    with pytest.raises(SystemExit), common.exit_on_user_error():
        common.write_atomically(tmp_path / "x.npy", write)
    assert capsys.readouterr().err.startswith("error: No space left on device: ")
    assert not list(tmp_path.iterdir())


def test_images_are_uint8():
    data = replace(common.load_dataset("digits"), images=torch.zeros(20_000, 1, 8, 8))
    with pytest.raises(UserError, match="images are torch.float32; convert them to uint8, 0 to 255"):
        common.Batches(data, 8, 0, "cpu")


def test_on_off_flags_alone_mean_on():
    for argv, want in (([], "auto"), (["--flip"], "on"), (["--flip", "off"], "off"), (["--flip=on"], "on")):
        assert common.parse(rf_dit_cifar.Config, "", argv).flip == want


# ---- files


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path, calls, fsync, rename = tmp_path / "f", [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: calls.append("fsync") or fsync(f))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or rename(*names))
    common.write_atomically(path, lambda f: f.write(b"old"))
    assert calls == ["fsync", "replace"]  # a power failure leaves one file or the other

    def half(f):
        f.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        common.write_atomically(path, half)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_held_out_losses_are_written_by_tenths_of_time():
    rows = []
    run = SimpleNamespace(rank=1, last={}, _append=lambda name, lines: rows.extend(lines))
    common.Run.validate(run, 5, torch.arange(1.0, 11).repeat_interleave(2), (torch.arange(20) + 0.5) / 20)
    common.Run.validate(run, 6, torch.tensor([2.0, 4.0]), torch.tensor([0.95, 1.0]))
    common.Run.validate(run, 7, torch.tensor([1.0, math.nan, 3.0]), torch.tensor([0.05, 0.95, 0.45]))
    assert rows[0] == {"step": 5, "loss": 5.5, "loss_t": [float(i) for i in range(1, 11)]}
    assert rows[1] == {"step": 6, "loss": 3.0, "loss_t": [None] * 9 + [3.0]}
    assert rows[2] == {"step": 7, "loss": None, "loss_t": [1.0, None, None, None, 3.0] + [None] * 5}  # no NaN


def test_each_line_has_the_time_left_and_the_first_a_note_if_that_is_days(capsys):
    for step, seconds, left, note in (
        (1, 1.8, "2 days, 1:59:58", True), (1, 1.0, "1 day, 3:46:39", False),
        (20, 36.0, "2 days, 1:59:24", False),
    ):  # fmt: skip
        line = {"step": step, "loss": torch.tensor(0.25), "grad_norm": torch.tensor(1.0), "seconds": seconds}
        more = {"step": step, "num_skipped": 0, "bad_steps_in_a_row": 0, "last": {}}
        more |= {"cfg": SimpleNamespace(bs=8), "seconds": seconds - 1, "pending": [line]}
        run = SimpleNamespace(_append=lambda *_: None, **more)
        common.Run.flush(run, progress=step / 100_000)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"step {step}  loss 0.2500  8 images/s  {left} left"
        assert len(lines) == 1 + note and ("--minutes 60" in lines[-1]) == note


def test_one_process_gets_a_lock_but_all_do_on_file_systems_without_locks(tmp_path, monkeypatch):
    with open(tmp_path / "f", "a") as a, open(tmp_path / "f", "a") as b:
        assert common.lock(a) and not common.lock(b)
        a.close()
        assert common.lock(b, wait=True)

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with open(tmp_path / "f", "a") as a, open(tmp_path / "f", "a") as b:
        assert common.lock(a) and common.lock(b)


def test_a_commit_is_dirty_with_a_script_that_is_not_in_git_and_empty_without_git(tmp_path, monkeypatch):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "common.py").write_text("")
    for command in (["init", "-q"], ["add", "common.py"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    (tmp_path / "photo.png").write_bytes(b"")
    clean = common.commit()
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "my_idea.py").write_text("")
    assert common.commit() == f"{clean}-dirty"
    (tmp_path / "my_idea.py").unlink()
    subprocess.run([*git, "add", "photo.png"], check=True)
    assert common.commit() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")
    assert common.commit() == ""


def test_errors_of_the_user_are_one_line_and_bugs_keep_their_traceback(capsys):
    for error, text in (
        (UserError("no such thing; use another"), "no such thing; use another"),
        (OSError(28, "disk full"), "disk full: the run folder; free some space, or set another folder .*"),
        (OSError(36, "File name too long", "x" * 300), "File name too long: x{300}; use another path .*"),
        (torch.OutOfMemoryError("no memory\nmore"), "no memory; use --grad-accum, .*; to sample, .* --bs"),
        (RuntimeError("[enforce fail] can't allocate memory: 9 bytes"), ".*can't allocate memory.*; use .*"),
        (OSError(27, "File too large"), "File too large: the run folder; free some space, or .*"),
        (
            Exception("I/O error: No space left on device (os error 28)"),
            "I/O error: .*: the run folder; free .*",
        ),
    ):
        with pytest.raises(SystemExit) as e, common.exit_on_user_error():
            raise error
        assert e.value.code == 2 and re.fullmatch(f"error: {text}\n", capsys.readouterr().err)
    for error in (
        ZeroDivisionError(),
        RuntimeError("other"),
        ConnectionRefusedError(111, "about no path"),
        SyntaxError("x", ("a.py", 1, 1, "x")),
    ):
        with pytest.raises(type(error)), common.exit_on_user_error():
            raise error


class Net(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        setattr(self, name, torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]))

    def forward(self, x):
        return next(self.children())[0](x)


def test_a_network_runs_in_its_precision_and_its_blocks_are_compiled():
    for flag, worthwhile, name, expected in (
        ("on", False, "blocks", ["blocks.0", "blocks.1"]), ("on", False, "layers", [""]),
        ("auto", True, "text_blocks", ["text_blocks.0", "text_blocks.1"]), ("auto", False, "blocks", []),
        ("off", True, "blocks", []),
    ):  # fmt: skip
        model = Net(name)
        dtype, compiled = common.prepare(model, SimpleNamespace(compile=flag, dtype="float32"), worthwhile)
        assert [n for n, m in model.named_modules() if m._compiled_call_impl] == expected
        assert (dtype, compiled) == (torch.float32, bool(expected))
    model, x = Net("blocks"), torch.ones(1, 2)
    common.prepare(model, SimpleNamespace(compile="off", dtype="bfloat16"))
    copy, before = deepcopy(model), model(x)
    assert before.dtype == torch.bfloat16 and (x @ model.blocks[0].weight).dtype == torch.float32
    torch.nn.init.zeros_(copy.blocks[0].weight)  # a copy runs on its own weights
    assert torch.equal(model(x), before) and torch.equal(copy(x)[0], copy.blocks[0].bias.bfloat16())


@pytest.mark.parametrize("pace, when", [(0.1, [1, 4, 7]), (2.0, [1, 3, 5, 7]), (60.0, [*range(1, 8)])])
def test_processes_agree_every_few_seconds_or_log_every_steps(monkeypatch, pace, when):
    """On what any of them says: seconds, and whether a signal came; torchrun kills after 30 seconds."""
    asked = []

    def all_reduce(tensor, op):
        assert op is common.dist.ReduceOp.MAX
        asked.append(round(tensor[1].item() / pace))
        tensor.copy_(
            torch.maximum(tensor, torch.tensor([asked[-1] > 2, tensor[1] + 0.05]))
        )  # another process

    monkeypatch.setattr(common.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(common.dist, "all_reduce", all_reduce)
    run = SimpleNamespace(cfg=SimpleNamespace(log_every=3), stopping=False, agreed=(False, 0, 0), next_sync=0)
    got = [common.Run.sync(run, step, seconds=step * pace) for step in range(1, 8)]
    assert asked == when
    last = [max(w for w in when if w <= step) for step in range(1, 8)]
    assert got == [(w > 2, pytest.approx(w * pace + 0.05)) for w in last]


def test_images_are_saved_as_a_grid_and_an_animation(tmp_path):
    images = torch.linspace(-1, 1, 20).view(20, 1, 1, 1).expand(20, 1, 28, 28)
    common.save_images(tmp_path / "x", images, [images * s for s in (0.0, 0.5, 1.0)])
    gif, grid = Image.open(tmp_path / "x.gif"), Image.open(tmp_path / "x.png")
    assert gif.n_frames == 3 and gif.size == grid.size and np.asarray(grid).min() == 0
    assert np.asarray(gif.convert("L")).max() == 255
    with pytest.raises(UserError, match="the samples are not finite"):
        common.save_images(tmp_path / "y", images / 0)
    assert not (tmp_path / "y.png").exists()


@pytest.mark.parametrize("channels, size", [(1, 28), (3, 64), (3, 100)])
def test_captions_are_printed_below_the_images(tmp_path, channels, size):
    """Black on white in a strip below each image, which stays as it is, however long or strange they are."""
    images = torch.full((12, channels, size, size), -0.5)
    captions = ["a cat", "", "word " * 200, "x" * 500, "猫が好き", "caf\udce9", *["a cat"] * 6]
    common.save_images(tmp_path / "x", images, [images, images], captions=captions)
    x, zoom = np.asarray(Image.open(tmp_path / "x.png").convert("L")), max(1, 64 // size)
    side, pad = zoom * size, 2 * zoom
    height = (x.shape[0] - 3 * pad) // 2 - side
    assert x.shape[1] == 10 * (side + pad) + pad and height > 8 * 11
    tiles = [x[pad : pad + side + height, pad + i * (side + pad) :][:, :side] for i in range(5)]
    assert all((tile[:side] == 64).all() and (tile[side:] > 200).mean() > 0.5 for tile in tiles)
    dark = [(tile[side:] < 100).sum() for tile in tiles]
    assert 0 == dark[1] < dark[0] < dark[2]
    assert Image.open(tmp_path / "x.gif").size == x.shape[::-1]


def test_readme_has_each_section_once_and_only_flags_that_exist():
    text = (Path(common.__file__).parent / "README.md").read_text()
    headings, pictures = re.findall(r"^#+ .+", text, re.M), re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert len(set(headings)) == len(headings) > 5 and len(set(pictures)) == len(pictures) > 0
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))
    others = r"^(mkdir|cp|python tests/compare|python one/).*"  # see test_compare.py, test_forks.py
    blocks = re.sub(others, "", blocks, flags=re.M)
    calls = re.findall(rf"({'|'.join(SCRIPTS)})\.py([^#\n]*)", blocks)
    assert len(calls) > 12
    for name, flags in calls:
        flags = re.sub(r"--(resume|config) \S+|^ logs/\S+", "", flags)  # paths of the reader's own runs
        common.parse(importlib.import_module(name).Config, "", shlex.split(flags))


def test_readme_names_only_flags_that_exist():
    """Also in its sentences, and those of the tools and forks."""
    root, tools = Path(common.__file__).parent, ("quality", "compare", "gpu", "benchmark")
    known = {f.name for n in (*SCRIPTS, *tools) for f in fields(importlib.import_module(n).Config)}
    known |= {"teacher", "help"}  # of a fork
    known |= {*"standalone nproc_per_node nodes gpus_per_node cpus_per_task dist".split()}  # of launchers
    flags = re.findall(r"(?<![\w-])--([a-z][a-z-]+)", (root / "README.md").read_text())
    assert len({*flags}) > 30 and {f.replace("-", "_") for f in flags} <= known


def test_example_runs_can_be_run_again():
    """`--config logs/.../run.yaml` of each run in the README, by the script in its command."""
    root = Path(common.__file__).parent
    examples = {*re.findall(r"logs/\w+/\w+_\d{4}-[\w-]+", (root / "README.md").read_text())}
    examples = [root / run / "run.yaml" for run in examples]
    assert examples
    for file in examples:
        facts = common.yaml.safe_load(file.read_text())
        Config = importlib.import_module(facts["command"].split(".py")[0]).Config
        assert common.parse(Config, "", ["--config", str(file)]).steps == facts["config"]["steps"]
