"""Datasets, batches, time embedding, EMA, flags and the atomic write of common.py."""

import errno
import functools
import importlib
import math
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
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

# ---- datasets


def test_digits_are_deterministic_balanced_and_split():
    a, b, test = (common.load_dataset("digits", split=s) for s in ("train", "train", "test"))
    assert torch.equal(a.images, b.images) and a.images.shape == (20_000, 1, 28, 28)
    assert test.images.shape == (2_000, 1, 28, 28) and test.labels.bincount().tolist() == [200] * 10
    train = {x.numpy().tobytes() for x in a.images}
    assert len(train) == 20_000 and not any(x.numpy().tobytes() in train for x in test.images)
    # each class looks like itself: the nearest class mean of the training split is right for most test digits
    means = torch.stack([a.images[a.labels == c].float().mean(0).flatten() for c in range(10)])
    nearest = torch.cdist(test.images.float().flatten(1), means).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.6


def test_digits_in_colour_and_other_sizes():
    assert common.load_dataset("digits", split="test", channels=3).images.shape[1:] == (3, 32, 32)
    assert common.load_dataset("digits", split="test", image_size=16).images.shape[1:] == (1, 16, 16)


def test_mnist_missing_is_one_line_that_offers_digits(tmp_path):
    with pytest.raises(UserError, match=f"mnist is not in {tmp_path} .*--data-root.*--dataset digits"):
        common.load_dataset("mnist", tmp_path)


def test_mnist_layout_of_torchvision_is_read(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = np.arange(3 * 784, dtype=np.uint8).reshape(3, 28, 28), np.array([3, 1, 4], np.uint8)
    for split in ("train", "t10k"):
        header = np.array([2051, 3, 28, 28], ">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            np.array([2049, 3], ">i4").tobytes() + labels.tobytes()
        )
    data = common.load_dataset("mnist", tmp_path)
    assert np.array_equal(data.images[:, 0], images) and data.labels.tolist() == [3, 1, 4]
    assert data.classes == [str(i) for i in range(10)]
    assert common.load_dataset("mnist", tmp_path, image_size=32, channels=3).images.shape == (3, 3, 32, 32)


# ---- batches


def numbered(n):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 1, 2, 2)
    images[:, :, :, 1] = 255  # left and right differ
    return common.Dataset("numbered", images, torch.arange(n), ["a"])


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="2 GPUs here, but a process 3; give torchrun --nproc-per-node=2"):
        common.pick_device("auto")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_process_takes_its_own_gpu():
    device = common.pick_device("auto")
    assert torch.cuda.current_device() == device.index == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_kept_on_the_cpu():
    """Else the kernel clears all of it again in the next step."""
    code = """if 1:
        import resource, sys, torch, common
        if sys.argv[1] == "kept":
            common.pick_device("cpu")
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
    assert not any((plain(s)[0][:, 0, 0, 0] == 1).any() for s in range(20))  # nobody asked for it
    masks = [(whole(s)[0] == plain(s)[0].flip(-1)).flatten(1).all(1) for s in range(20)]
    assert all(torch.equal(m, whole.hflip(s)) for s, m in enumerate(masks))
    assert len({tuple(m.tolist()) for m in masks}) > 15  # others in each step, and with another seed
    assert not torch.equal(common.Batches(numbered(50), 8, 1, "cpu", flip=True).hflip(0), masks[0])


# ---- time embedding, EMA


def test_time_embedding_is_that_of_diffusers():
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
    steps: int = 10  # how long
    lr: float = 1e-3  # how fast, at 100%
    mults: tuple[int, ...] = (1, 2)  # how wide
    clip_x0: bool = True  # whether to clip
    kind: Literal["a", "b"] = "a"  # which
    resume: str = ""  # a run
    sample: str = ""  # a run
    config: str = ""  # a file
    shape: tuple[int, ...] = common.derived((1, 2))


def flags(*argv):
    return common.parse(Config, "doc", argv)


def test_flags_are_typed_and_documented(capsys):
    cfg = flags("--steps", "3", "--lr", "1e-2", "--mults", "1", "2", "4", "--no-clip-x0", "--kind", "b")
    assert cfg == Config(3, 0.01, (1, 2, 4), False, "b")
    with pytest.raises(SystemExit, match="0"):
        flags("--help")
    text = capsys.readouterr().out
    assert (
        all(words in text for words in ("how long", "how fast, at 100%", "whether to clip"))
        and "--shape" not in text
    )


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--stpes", "3"], "unknown argument --stpes; did you mean --steps"),
        (
            ["--step", "3"],
            "unknown argument --step;",
        ),  # no abbreviations: a typo must not become another flag
        (["--m", "3"], "unknown argument --m; did you mean --mults"),
        (["--steps", "many"], "invalid int value: 'many'; see --help"),
        (["--kind", "c"], "invalid choice: 'c'"),
        (["--resume", "x", "--sample", "y"], "contradict"),
        (["--resume", "x"], "x is no run"),
        (["--config", "x.yaml"], "x.yaml is no readable run.yaml"),
    ],
)
def test_bad_flags(argv, match):
    with pytest.raises(UserError, match=match):
        flags(*argv)


@pytest.mark.parametrize(
    "text, match",
    [
        ("config: {steps: 5, lr: 1e-2, mults: [3], clip_x0: false, shape: [7, 7]}", None),
        ("config: {stepz: 5}", "unknown argument --stepz"),
        ("config: {steps: many}", "invalid int value"),
        ("config: {clip_x0: maybe}", "clip-x0"),
        ("config: [steps", "no readable run.yaml"),
        ("steps: 5", "no readable run.yaml"),
        ("config: !!python/object/apply:os.system [touch owned]", "no readable run.yaml"),
    ],
)
def test_config_files(tmp_path, monkeypatch, text, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    if match:
        with pytest.raises(UserError, match=match):
            flags("--config", "run.yaml")
    else:
        assert flags("--config", "run.yaml", "--steps", "6") == Config(
            6, 0.01, (3,), False, config="run.yaml", shape=(7, 7)
        )
    assert not (tmp_path / "owned").exists()


def test_resume_refuses_what_would_change_the_experiment(tmp_path):
    (tmp_path / "run.yaml").write_text("config: {steps: 5, lr: 0.01}")
    (tmp_path / "code").mkdir()
    for file in (__file__, common.__file__):  # this file has the Config and is the script
        shutil.copy(file, tmp_path / "code")
    run = str(tmp_path)
    assert flags("--resume", run, "--steps", "9") == Config(9, 0.01, resume=run)
    assert flags("--resume", run, "--lr", "0.01").lr == 0.01  # the same value is no change
    with pytest.raises(UserError, match=r"--lr 0.02 is not the run's \(0.01\)"):
        flags("--resume", run, "--lr", "0.02")
    with pytest.raises(UserError, match=r"--kind b is not the run's \(a\)"):
        flags("--resume", run, "--kind", "b")


@pytest.mark.parametrize(
    "default, hint", [(None, "float | None"), (5e3, "int"), ((), "list[int]"), ("1", "int")]
)
def test_a_field_that_is_no_flag_is_a_bug_with_one_sentence(default, hint):
    """Of a fork: tuples and Literals aside, only bool, int, float and str, with a default of that type."""
    fork = type("Config", (), {"__annotations__": {"extra": eval(hint)}, "extra": default})
    fork.__module__ = __name__
    with pytest.raises(TypeError, match=r"Config.extra is .* with default .*; a flag is a bool, int, float"):
        common.parse(dataclass(fork), "doc", [])


def test_on_off_flags_alone_mean_on():
    for argv, want in (([], "auto"), (["--flip"], "on"), (["--flip", "off"], "off"), (["--flip=on"], "on")):
        assert common.parse(rf_dit_cifar.Config, "", argv).flip == want


@pytest.mark.parametrize("name", ["ddpm_unet_mnist", "rf_dit_cifar", "latent_dit_sdvae", "ddim_sample"])
def test_no_flag_is_one_of_torchruns_or_the_beginning_of_one(name):
    """torchrun reads what follows the script's name, too, and takes abbreviations."""
    theirs = [o for a in get_args_parser()._actions for o in a.option_strings if o.startswith("--")]
    assert "--logs-specs" in theirs or "--logs_specs" in theirs
    ours = [f.name.replace("_", "-") for f in fields(importlib.import_module(name).Config) if not f.metadata]
    ours = [f"--{prefix}{x}" for x in ours for prefix in ("", "no-")]
    assert not [(o, t) for o in ours for t in theirs if t.startswith(o)]


# ---- files


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "f"
    common.write_atomically(path, lambda f: f.write(b"old"))

    def half(f):
        f.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        common.write_atomically(path, half)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_held_out_losses_are_told_by_tenths_of_time():
    rows = []
    run = SimpleNamespace(rank=1, last={}, _append=lambda name, lines: rows.extend(lines))
    common.Run.validate(run, 5, torch.arange(1.0, 11).repeat_interleave(2), (torch.arange(20) + 0.5) / 20)
    common.Run.validate(run, 6, torch.tensor([2.0, 4.0]), torch.tensor([0.95, 1.0]))
    assert rows[0] == {"step": 5, "loss": 5.5, "loss_t": [float(i) for i in range(1, 11)]}
    assert rows[1] == {"step": 6, "loss": 3.0, "loss_t": [None] * 9 + [3.0]}
    common.Run.validate(run, 7, torch.tensor([1.0, math.nan, 3.0]), torch.tensor([0.05, 0.95, 0.45]))
    assert rows[2]["loss"] is None and rows[2]["not_finite"] == 1  # null, not NaN, which is no JSON
    assert rows[2]["loss_t"] == [1.0, None, None, None, 3.0] + [None] * 5


def test_one_process_has_a_lock_and_where_there_are_none_all_have(tmp_path, monkeypatch):
    with open(tmp_path / "f", "a") as a, open(tmp_path / "f", "a") as b:
        assert common.lock(a) and not common.lock(b)
        a.close()
        assert common.lock(b, wait=True)

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with open(tmp_path / "f", "a") as a, open(tmp_path / "f", "a") as b:
        assert common.lock(a) and common.lock(b)


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert common.commit() == ""


def test_a_script_that_is_not_in_git_makes_the_commit_dirty(tmp_path, monkeypatch):
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


def test_errors_are_one_line_and_bugs_keep_their_traceback(capsys):
    full = OSError(28, "No space left on device")
    for error in (
        UserError("no such thing; give another"),
        full,
        OSError(36, "File name too long", "x" * 300),
    ):
        with pytest.raises(SystemExit) as e, common.one_line_errors():
            raise error
        text = capsys.readouterr().err
        assert e.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1 and "; " in text
    with pytest.raises(ZeroDivisionError), common.one_line_errors():
        1 / 0  # noqa: B018
    with pytest.raises(ConnectionRefusedError), common.one_line_errors():
        raise ConnectionRefusedError(111, "Connection refused")  # about no path


def test_pictures(tmp_path):
    images = torch.linspace(-1, 1, 20).view(20, 1, 1, 1).expand(20, 1, 28, 28)
    common.save_pictures(tmp_path / "x", images, [images * s for s in (0.0, 0.5, 1.0)])
    gif, grid = Image.open(tmp_path / "x.gif"), Image.open(tmp_path / "x.png")
    assert gif.n_frames == 3 and gif.size == grid.size and np.asarray(grid).min() == 0
    assert np.asarray(gif.convert("L")).max() == 255
    with pytest.raises(UserError, match="the samples are not finite"):
        common.save_pictures(tmp_path / "y", images / 0)
    assert not (tmp_path / "y.png").exists()


# ---- the README


def test_readme_has_each_section_once_and_flags_that_there_are():
    text = (Path(common.__file__).parent / "README.md").read_text()
    headings, pictures = re.findall(r"^#+ .+", text, re.M), re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert len(set(headings)) == len(headings) > 5 and len(set(pictures)) == len(pictures) > 2
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))
    calls = re.findall(
        r"(?<!cp )(ddpm_unet_mnist|rf_dit_cifar|latent_dit_sdvae|ddim_sample)\.py([^#\n]*)", blocks
    )
    assert len(calls) > 12
    for name, flags in calls:
        flags = re.sub(r"--(resume|sample|config) \S+|^ logs/\S+", "", flags)  # runs of the reader's own
        common.parse(importlib.import_module(name).Config, "", flags.split())


def test_example_runs_can_be_run_again():
    """`--config logs/.../run.yaml` of each committed run, by the script that its command names."""
    files = [*(Path(common.__file__).parent / "logs").glob("*/*/run.yaml")]
    examples = [f for f in files if not (f.parent / "code").exists()]  # those that are committed have none
    assert len(examples) >= 4
    for file in examples:
        facts = common.yaml.safe_load(file.read_text())
        Config = importlib.import_module(facts["command"].split(".py")[0]).Config
        assert common.parse(Config, "", ["--config", str(file)]).steps == facts["config"]["steps"]
