"""Datasets, batches, time embedding, EMA, flags and the atomic write of common.py."""

import errno
import functools
import importlib
import io
import platform
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image

import common
from common import UserError


def png(array, mode=None, kind="PNG", **more):
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, kind, **more)
    return file.getvalue()


def folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


# ---- datasets


def test_digits_are_deterministic_balanced_and_split():
    a, b, test = (common.load_dataset("digits", split=s) for s in ("train", "train", "test"))
    assert torch.equal(a.images, b.images) and a.images.shape == (20_000, 1, 28, 28) and not a.flip
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
    assert data.classes == [str(i) for i in range(10)] and not data.flip
    assert common.load_dataset("mnist", tmp_path, image_size=32, channels=3).images.shape == (3, 3, 32, 32)


def test_folder_and_zip_agree_at_any_depth(tmp_path):
    rng = np.random.default_rng(0)
    files = {
        f"a/b/{c}/{i}.png": png(rng.integers(0, 255, (8, 8, 3), np.uint8)) for c in "xy" for i in range(30)
    }
    root = folder(tmp_path / "set", files)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
        z.writestr("../../escape/x/evil.png", files["a/b/x/0.png"])  # read as an image, never as a path
    one, two = (common.load_dataset(str(p)) for p in (root, tmp_path / "set.zip"))
    assert one.classes == ["x", "y"] and one.images.shape == (57, 3, 8, 8) and one.flip
    assert two.classes == ["x", "y"] and len(two.labels) == 58 and not (tmp_path.parent / "escape").exists()
    held = common.load_dataset(str(root), split="test")
    seen = {x.numpy().tobytes() for x in one.images}
    assert len(held.labels) == 3 and not any(x.numpy().tobytes() in seen for x in held.images)


def test_splits_that_the_folder_names(tmp_path):
    def gray(v):
        return png(np.full((8, 8), v, np.uint8))

    root = folder(tmp_path / "s", {"train/a/0.png": gray(1), "val/a/0.png": gray(2)})
    assert [common.load_dataset(str(root), split=s).images.unique().tolist() for s in ("train", "test")] == [
        [1],
        [2],
    ]
    for split, value in (("train", 3), ("test", 4)):
        with zipfile.ZipFile(tmp_path / f"z-{split}.zip", "w") as z:
            z.writestr("a/0.png", gray(value))
    path = str(tmp_path / "z-train.zip")
    assert [common.load_dataset(path, split=s).images.unique().tolist() for s in ("train", "test")] == [
        [3],
        [4],
    ]


def test_every_kind_of_file_comes_out_right(tmp_path):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    clear = np.dstack([red, np.zeros((8, 8), np.uint8)])  # fully transparent: white
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 6:18, 1] = 255  # the centre crop sees green alone
    deep = np.full((8, 8), 40_000, np.uint16)
    cases = {
        "palette.gif": (png(red, "P", "GIF"), (255, 0, 0)),
        "clear.png": (png(clear), (255, 255, 255)),
        "cmyk.jpg": (png(red, "CMYK", "JPEG", quality=95), (255, 0, 0)),
        "deep.png": (png(deep), (155, 155, 155)),
        "gray.bmp": (png(np.full((8, 8), 7, np.uint8), None, "BMP"), (7, 7, 7)),
        "wide.webp": (png(wide, None, "WEBP", lossless=True), (0, 255, 0)),
        "one.png": (png(np.full((1, 1, 3), 9, np.uint8)), (9, 9, 9)),
    }
    for name, (data, colour) in cases.items():
        pixels, _ = common.decode_image(data, 4)
        assert pixels.shape == (4, 4, 3) and np.abs(pixels.astype(int) - colour).max() <= 3, name
    folder(tmp_path / "g", {f"{i}.png": png(deep) for i in range(3)})
    assert common.load_dataset(str(tmp_path / "g")).images.shape == (3, 1, 8, 8)  # all gray: one channel


def test_unreadable_files_are_named_and_counted(tmp_path, capsys, monkeypatch):
    good = png(np.zeros((8, 8, 3), np.uint8))
    root = folder(tmp_path / "s", {f"train/a/{i:03}.png": good for i in range(200)} | {"test/a/x.png": good})
    folder(root, {"train/a/bad.png": good[:20], "train/a/notes.txt": b"not an image"})
    assert len(common.load_dataset(str(root)).labels) == 200
    assert "bad.png" in capsys.readouterr().out
    folder(root, {f"train/a/bad{i}.png": b"" for i in range(3)})
    with pytest.raises(UserError, match="4 of 204 images .* unreadable"):
        common.load_dataset(str(root))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # what Pillow's limit does to 30,000 x 30,000 pixels
    folder(tmp_path / "bomb", {"a.png": png(np.zeros((64, 64), np.uint8))})
    with pytest.raises(UserError, match="1 of 1 images .* unreadable.*pixels"):
        common.load_dataset(str(tmp_path / "bomb"), image_size=8)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda p: "minst", "there is no dataset minst; give mnist"),
        (lambda p: str(folder(p, {"readme.txt": b""})), "there is no image"),
        (lambda p: str(folder(p, {"x.zip": b"no zip"}) / "x.zip"), "no readable folder or .zip"),
    ],
)
def test_bad_datasets(tmp_path, make, match):
    with pytest.raises(UserError, match=match):
        common.load_dataset(make(tmp_path))


def test_a_stream_reads_what_loading_holds(tmp_path):
    """Folder, zip and a resized dataset: the same images, one by one; unreadable ones black and named."""
    rng = np.random.default_rng(0)
    files = {f"{'xy'[i % 2]}/{i:02}.png": png(rng.integers(0, 256, (8, 12, 3), np.uint8)) for i in range(50)}
    root = folder(tmp_path / "s", files)
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
    for name, more in (
        (root, {}),
        (tmp_path / "s.zip", {"image_size": 6, "channels": 1}),
        ("digits", {"image_size": 20}),
    ):
        whole = common.load_dataset(str(name), **more)
        parts = common.load_dataset(str(name), **more, most=1000)
        assert isinstance(parts.images, common.Stream) and parts.images.shape == tuple(whole.images.shape)
        assert torch.equal(parts.labels, whole.labels) and len(parts.images) == len(whole.images)
        rows = torch.tensor([5, 0, 40])
        assert torch.equal(parts.images[rows], whole.images[rows]) and not parts.images.bad
        assert parts.digest() == common.load_dataset(str(name), **more, most=1000).digest() != whole.digest()
    before = common.load_dataset(str(root), most=1000).digest()
    folder(root, {"x/00.png": files["x/00.png"][:30]})
    parts = common.load_dataset(str(root), most=1000)
    assert parts.digest() != before
    assert parts.images[[0, 1]].flatten(1).any(1).tolist() == [False, True]
    assert list(parts.images.bad) == [0] and "x/00.png" in parts.images.bad[0]


# ---- batches


def numbered(n, flip=False):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 1, 2, 2)
    images[:, :, :, 1] = 255  # left and right differ
    return common.Dataset("numbered", images, torch.arange(n), ["a"], flip)


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
        for _ in range(10):  # the first find no piece that is large enough
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)  # 64 MiB
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
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
    whole = common.Batches(numbered(50, flip=True), 8, 0, "cpu")
    parts = [common.Batches(numbered(50, flip=True), 8, 0, "cpu", rank, 2) for rank in (0, 1)]
    for step in range(7):
        assert torch.equal(torch.cat([p(step)[0] for p in parts]), whole(step)[0])
    left = torch.cat([whole(s)[0][:, 0, 0, 0] == 1 for s in range(20)]).float().mean()
    assert 0.3 < left < 0.7  # half are mirrored


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
    run = str(tmp_path)
    assert flags("--resume", run, "--steps", "9") == Config(9, 0.01, resume=run)
    assert flags("--resume", run, "--lr", "0.01").lr == 0.01  # the same value is no change
    with pytest.raises(UserError, match=r"--lr 0.02 is not the run's \(0.01\)"):
        flags("--resume", run, "--lr", "0.02")
    with pytest.raises(UserError, match=r"--kind b is not the run's \(a\)"):
        flags("--resume", run, "--kind", "b")


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
    run = SimpleNamespace(rank=1, _append=lambda name, lines: rows.extend(lines))
    common.Run.validate(run, 5, torch.arange(1.0, 11).repeat_interleave(2), (torch.arange(20) + 0.5) / 20)
    common.Run.validate(run, 6, torch.tensor([2.0, 4.0]), torch.tensor([0.95, 1.0]))
    assert rows[0] == {"step": 5, "loss": 5.5, "loss_t": [float(i) for i in range(1, 11)]}
    assert rows[1] == {"step": 6, "loss": 3.0, "loss_t": [None] * 9 + [3.0]}


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


def test_errors_are_one_line_and_bugs_keep_their_traceback(capsys):
    for error in (UserError("no such thing; give another"), OSError(28, "No space left on device", "x.pt")):
        with pytest.raises(SystemExit) as e, common.one_line_errors():
            raise error
        text = capsys.readouterr().err
        assert e.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1 and "; " in text
    with pytest.raises(ZeroDivisionError), common.one_line_errors():
        1 / 0  # noqa: B018


def test_pictures(tmp_path):
    images = torch.linspace(-1, 1, 20).view(20, 1, 1, 1).expand(20, 1, 28, 28)
    common.save_pictures(tmp_path / "x", images, [images * s for s in (0.0, 0.5, 1.0)])
    gif, grid = Image.open(tmp_path / "x.gif"), Image.open(tmp_path / "x.png")
    assert gif.n_frames == 3 and gif.size == grid.size and np.asarray(grid).min() == 0
    assert np.asarray(gif.convert("L")).max() == 255


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
