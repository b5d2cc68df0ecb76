"""Folders and zips as people have them: what is a class, what is held out, what is read, what is said."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import common
from common import UserError

RNG = np.random.default_rng(0)


def encode(image, kind="PNG", mode=None, **more):
    """An array or image -> the bytes of a file."""
    file, image = io.BytesIO(), image if isinstance(image, Image.Image) else Image.fromarray(image)
    (image.convert(mode) if mode else image).save(file, kind, **more)
    return file.getvalue()


def noise(size=8, gray=False):
    """A PNG of random pixels."""
    return encode(RNG.integers(0, 256, (size, size) if gray else (size, size, 3), np.uint8))


def images(**folders):
    """{file name: PNG}; the __ between two folders is a /."""
    folders = {re.sub(r"(?<=\w)__(?=[^_])", "/", k): n for k, n in folders.items()}
    return {f"{k}/{i:03}.png".lstrip("/"): noise() for k, n in folders.items() for i in range(n)}


def folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def pack(path, files):
    with zipfile.ZipFile(path, "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
    return path


def load(path, **more):
    """-> (training split, held-out split), as the scripts load them."""
    train = common.load_dataset(str(path), **more)
    return train, common.load_dataset(str(path), split="test", **more)


def counts(data):
    return dict(zip(data.classes, data.labels.bincount(minlength=len(data.classes)).tolist(), strict=True))


def pixels(data):
    return {x.numpy().tobytes() for x in data.images}


# ---- splits and classes


@pytest.mark.parametrize(
    "files, train, held_out",
    [
        ({"pets__train__cat": 30, "pets__train__dog": 30, "pets__test__cat": 10, "pets__test__dog": 10},
         {"cat": 30, "dog": 30}, {"cat": 10, "dog": 10}),
        ({"train__cat": 30, "valid__cat": 7}, {"cat": 30}, {"cat": 7}),
        ({"Training__cat": 30, "Test__cat": 7}, {"cat": 30}, {"cat": 7}),
        ({"train__cat": 30, "validation__cat": 5, "test__cat": 7}, {"cat": 30}, {"cat": 7}),
        ({"train__n01__images": 20, "train__n02__images": 20, "train__n03__images": 20},
         {"n01": 19, "n02": 19, "n03": 19}, {"n01": 1, "n02": 1, "n03": 1}),
        ({"cat__batch1": 20, "cat__batch2": 20, "dog__batch1": 20},
         {"cat": 38, "dog": 19}, {"cat": 2, "dog": 1}),
        ({"train": 30, "test": 10}, {"set": 30}, {"set": 10}),
        ({"": 60}, {"set": 57}, {"set": 3}),
        ({str(i): 5 for i in range(12)}, {str(i): 4 for i in range(12)}, {str(i): 1 for i in range(12)}),
        ({"cat": 40, "rare": 1, "pair": 2, "cat__@eaDir": 3, "__MACOSX__cat": 3},
         {"cat": 38, "pair": 1, "rare": 1}, {"cat": 2, "pair": 1, "rare": 0}),
        ({"cat": 20, "dog": 19}, {"cat": 20, "dog": 19}, {"cat": 20, "dog": 19}),
    ],
)  # fmt: skip
def test_layouts(tmp_path, files, train, held_out):
    """The same of a folder and of a zip; no image is in both splits, but where they are too few to divide."""
    files = images(**files)
    fingerprints = []
    for path in (folder(tmp_path / "set", files), pack(tmp_path / "set.zip", files)):
        a, b = load(path)
        assert counts(a) == train and list(counts(a)) == list(train) and counts(b) == held_out
        assert sum(train.values()) < 40 or not pixels(a) & pixels(b)
        fingerprints.append((a.fingerprint(), b.fingerprint()))
        again = common.load_dataset(str(path), split="test")
        assert torch.equal(again.images, b.images) and len(a.files) == len(a.images)
    assert fingerprints[0] == fingerprints[1]


def test_a_pair_of_zips_is_one_dataset(tmp_path):
    """Held-out labels are the training split's numbers; a folder around all, called as the zip, is none."""
    path = pack(tmp_path / "x-train.zip", images(cat=20, dog=20, fish=20))
    pack(tmp_path / "x-test.zip", images(dog=5, fish=6))
    train, test = load(path)
    assert counts(train) == {"cat": 20, "dog": 20, "fish": 20} and counts(test) == {
        "cat": 0,
        "dog": 5,
        "fish": 6,
    }
    path = pack(tmp_path / "y-train.zip", {f"y-train/{k}": v for k, v in images(cat=20, dog=20).items()})
    pack(tmp_path / "y-test.zip", {f"test/{k}": v for k, v in images(dog=5).items()})
    assert counts(load(path)[1]) == {"cat": 0, "dog": 5}
    path = pack(tmp_path / "z-train.zip", images(train__cat=20, val__cat=20))
    pack(tmp_path / "z-test.zip", images(cat=5))
    with pytest.raises(UserError, match="has train, test, train/train, train/val among its folders"):
        load(path)
    pack(tmp_path / "x-test.zip", images(dog=5, fish=6, yak=2, zebu=1))
    common.open_zip.cache_clear()
    with pytest.raises(UserError, match="holds out images of yak, zebu, of which training has none"):
        common.load_dataset(str(tmp_path / "x-train.zip"))


@pytest.mark.parametrize(
    "files, match",
    [
        ({"cat": 30, "": 1}, "images beside folders of images \\(cat\\), which are classes"),
        ({"cat__train": 30, "cat__test": 30, "dog__train": 30}, "has cat/test, cat/train, dog/train among"),
        ({"train__cat": 30, "test__cat": 9, "train__dog__val": 9}, "has train, test, train/dog/val among"),
        ({"train__cat": 30, "extra__cat": 9}, "has train among its folders \\(extra, train\\)"),
        ({"train__cat": 30, "Train__dog": 30, "test__cat": 3}, "has Train, train, test among"),
        ({"train__cat": 30, "test": 9}, "holds out images of no folder, of which training has none"),
        (
            {"train__cat": 30, "test__dog": 9},
            "holds out images of dog, of which training has none .it has cat",
        ),
        ({f"p{i}": 1 for i in range(40)}, "has one image of each class"),
    ],
)
def test_what_is_ambiguous_is_one_line(tmp_path, files, match):
    with pytest.raises(UserError, match=match) as e:
        common.load_dataset(str(folder(tmp_path / "set", images(**files))))
    assert "\n" not in str(e.value) and "; " in str(e.value)


def test_labels_of_edm_and_stylegan(tmp_path, capsys):
    """dataset.json, where folders are shards. Without integers for all images it is not read, and says so."""
    shards = {f"{i % 2:05}/img{i:08}.png": noise() for i in range(60)}
    labels = [[name, i % 3] for i, name in enumerate(shards)]
    for table, classes in (
        (labels, ["0", "1", "2"]), (None, ["00000", "00001"]), (labels[1:], ["00000", "00001"]),
        ([[k, [0.5, 1]] for k, _ in labels], ["00000", "00001"]),
    ):  # fmt: skip
        text = json.dumps({"labels": table}).encode()
        path = folder(tmp_path / f"set{len(str(table))}", shards | {"dataset.json": text})
        data = common.load_dataset(str(path))
        said = capsys.readouterr().out
        assert data.classes == classes and ("dataset.json, which has no integer label" in said) == (
            len(classes) == 2
        )
        assert len(classes) == 2 or {
            x: y for x, y in zip(data.files, data.labels.tolist(), strict=True)
        }.items() <= {(k, v) for k, v in labels}


def test_what_is_left_out_is_counted_in_one_line(tmp_path, capsys):
    files = images(train__cat=30, test__cat=3, val__cat=4) | {
        "train/a.txt": b"",
        "b.TXT": b"",
        "LICENSE": b"",
    }
    common.load_dataset(str(folder(tmp_path / "set", files)))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "4 images in val, 2 .txt, 1 without a suffix" in said


def test_many_kinds_are_told_in_few_words(tmp_path, capsys):
    files = (
        images(cat=30) | {f"cat/label{i}": b"" for i in range(50)} | {f"cat/x.{i}": b"" for i in range(50)}
    )
    common.load_dataset(str(folder(tmp_path / "set", files)))
    said = capsys.readouterr().out
    assert "50 without a suffix, 1 .0, " in said and said.endswith(", ...\n") and len(said) < 300


def test_runs_inside_of_a_dataset_are_not_images(tmp_path):
    root = folder(tmp_path, images(cat=30, logs__rf__run__samples=5) | {"logs/rf/run/run.yaml": b""})
    assert list(counts(load(root)[0])) == [tmp_path.name]


@pytest.mark.parametrize("name", ["..", "9" * 5000, "cat\\..\\x.png", "dataset.json"])
def test_odd_members_of_a_zip(tmp_path, name):
    path = pack(tmp_path / "set.zip", images(cat=30, dog=30) | {name: noise()})
    if name == "dataset.json":  # damaged
        path.write_bytes(path.read_bytes().replace(b"dataset.jsonx", b"dataset.jsony"))
    assert {"cat", "dog"} <= {*load(path)[0].classes}


def test_links_are_followed_and_end(tmp_path):
    root = folder(tmp_path / "set", images(cat=25))
    folder(tmp_path / "elsewhere", images(dog=25))
    os.symlink(tmp_path / "elsewhere" / "dog", root / "dog")
    os.symlink(root, root / "cat" / "back")
    train, test = load(root)
    assert counts(train) == {"cat": 24, "dog": 24} and counts(test) == {"cat": 1, "dog": 1}


def test_a_zip_made_on_windows(tmp_path):
    files = {name.replace("/", "\\"): data for name, data in images(cat=30, dog=30).items()}
    assert counts(load(pack(tmp_path / "set.zip", files))[0]) == {"cat": 29, "dog": 29}


def test_names_that_lead_outside_are_read_and_lead_nowhere(tmp_path):
    files = images(a__x=30, a__y=30)
    path = pack(tmp_path / "set.zip", files | {"../../a/x/evil.png": noise()})
    train, test = load(path)
    assert len(train.labels) + len(test.labels) == 61 and sorted(tmp_path.iterdir()) == [path]


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    root = os.fsencode(folder(tmp_path / "set", images(tea=5)))
    os.mkdir(root + b"/caf\xe9")
    Path(os.fsdecode(root + b"/caf\xe9/1.png")).write_bytes(noise())
    data = common.load_dataset(os.fsdecode(root))
    assert data.classes == [r"caf\xe9", "tea"] and len(data.images) == 6
    print(*data.classes, *data.files)  # in any encoding


@pytest.mark.parametrize("sizes", [(16, 8), (8, 16)])
def test_size_and_channels_are_those_of_the_training_split(tmp_path, sizes):
    """Of 60 images in one folder the eleventh is held out; it differs from the others."""
    files = {f"{i:03}.png": noise(sizes[i != 10]) for i in range(60)}
    train, test = load(folder(tmp_path / "sizes", files))
    assert train.images.shape == (57, 3, sizes[1], sizes[1]) and test.images.shape == (
        3,
        3,
        sizes[1],
        sizes[1],
    )
    files = {f"{i:03}.png": noise(8, gray=(i == 10) == (sizes[0] == 8)) for i in range(60)}
    channels = 3 if sizes[0] == 8 else 1
    train, test = load(folder(tmp_path / "channels", files))
    assert train.images.shape[1] == test.images.shape[1] == channels
    train, test = load(folder(tmp_path / "channels", files), image_size=6, channels=3)
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 6, 6)


def test_a_built_in_name_that_is_a_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "digits", images(cat=5))
    with pytest.raises(UserError, match="digits is a built-in dataset, and .*; give ./digits for the folder"):
        common.load_dataset("digits")
    assert common.load_dataset("./digits").classes == ["digits"]
    monkeypatch.chdir(tmp_path / "digits")
    assert common.load_dataset(".").name == "digits" and common.load_dataset("digits").images.shape[1:] == (
        1,
        28,
        28,
    )


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda p: "minst", "there is no dataset minst; give mnist"),
        (lambda p: "", "there is no dataset ''; give mnist"),
        (lambda p: str(folder(p, {"readme.txt": b""})), "there is no image"),
        (lambda p: str(folder(p, {"x.zip": b"no zip"}) / "x.zip"), "not a readable folder or .zip"),
    ],
)
def test_bad_datasets(tmp_path, make, match):
    with pytest.raises(UserError, match=match):
        common.load_dataset(make(tmp_path))


# ---- files


def scene(width=24, height=16):
    """An image that no turn or mirror leaves as it is, smooth, so that JPEG keeps it."""
    v, u = np.mgrid[0:height, 0:width]
    return np.stack([u * 255 / width, v * 255 / height, (u + 2 * v) % 40 * 6], -1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_all_orientations_come_out_as_a_viewer_shows_them(orientation, kind):
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[
        orientation
    ]  # how it was turned to be stored so
    upright = Image.fromarray(scene(16, 16))
    stored = upright if turned is None else upright.transpose(Image.Transpose(turned))
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    got = common.decode_image(encode(stored, kind, exif=exif, **more), 16).transpose(1, 2, 0).astype(int)
    assert np.abs(got - np.asarray(upright)).mean() < 3
    if orientation > 1:
        assert np.abs(got - np.asarray(stored)).mean() > 20


def test_every_kind_of_file_comes_out_right():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    half = np.dstack([red, np.full((8, 8), 128, np.uint8)])  # over white
    clear = np.dstack([red, np.zeros((8, 8), np.uint8)])
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 6:18, 1] = 255  # the centre crop sees green alone
    deep = np.full((8, 8), 40_000, np.uint16)
    palette = Image.fromarray(red).quantize(2)
    cases = {
        "palette": (encode(palette, "GIF"), (255, 0, 0)),
        "transparent palette": (encode(palette, transparency=palette.getpixel((0, 0))), (255, 255, 255)),
        "half transparent": (encode(half), (255, 127, 127)),
        "transparent": (encode(clear), (255, 255, 255)),
        "transparent gray": (encode(np.dstack([red[..., 0], clear[..., 3]])), (255, 255, 255)),
        "cmyk": (encode(red, "JPEG", "CMYK", quality=95), (255, 0, 0)),
        "16 bit": (encode(deep), (155, 155, 155)),
        "16 bit tiff": (encode(deep, "TIFF"), (155, 155, 155)),
        "1 bit": (encode(np.ones((8, 8), bool)), (255, 255, 255)),
        "gray": (encode(np.full((8, 8), 7, np.uint8), "BMP"), (7, 7, 7)),
        "wide": (encode(wide, "WEBP", lossless=True), (0, 255, 0)),
        "tall": (encode(wide.transpose(1, 0, 2)), (0, 255, 0)),
        "one pixel": (encode(np.full((1, 1, 3), 9, np.uint8)), (9, 9, 9)),
        "avif": (encode(red, "AVIF"), (255, 0, 0)),
    }  # fmt: skip
    for name, (data, colour) in cases.items():
        got = common.decode_image(data, 4)
        assert got.shape == (3, 4, 4) and np.abs(got.astype(int).transpose(1, 2, 0) - colour).max() <= 4, name
    assert common.decode_image(cases["cmyk"][0], 4, 1)[0, 0, 0] == pytest.approx(0.299 * 255, abs=2)
    assert np.array_equal(common.decode_image(encode(scene(16, 16)), 16), scene(16, 16).transpose(2, 0, 1))
    small = np.asarray(ImageOps.fit(Image.fromarray(scene()), (8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(common.decode_image(encode(scene()), 8).transpose(1, 2, 0), small)
    for mode in "FI":  # in what range? converted, those of [0, 1] or [0, 255] would be black
        with pytest.raises(ValueError, match="32 bits, of unknown range"):
            common.decode_image(encode(Image.new(mode, (8, 8), 1), "TIFF"), 4)


def test_suffixes_that_pillow_reads(tmp_path):
    kinds = {
        "tif": "TIFF",
        "TIFF": "TIFF",
        "jfif": "JPEG",
        "ppm": "PPM",
        "avif": "AVIF",
        "webp": "WEBP",
        "tga": "TGA",
    }
    files = {f"a/{i}.{suffix}": encode(scene(8, 8), kind) for i, (suffix, kind) in enumerate(kinds.items())}
    assert len(common.load_dataset(str(folder(tmp_path / "set", files | images(b=3)))).labels) == 3 + len(
        kinds
    )


def test_files_that_cannot_be_read_are_named_and_counted(tmp_path, monkeypatch):
    root = folder(tmp_path / "set", images(train__a=300, test__a=1) | {"train/a/bad.png": b"x"})
    with pytest.raises(
        UserError, match="1 of 301 images cannot be read: .*bad.png .not an image.; repair or"
    ):
        common.load_dataset(str(root))
    folder(root, {f"train/a/x{i}.png": b"" for i in range(6)})
    with pytest.raises(UserError, match="7 of 307 images cannot be read: .*, ...; repair"):
        common.load_dataset(str(root))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # what Pillow's limit does to 30,000 x 30,000 pixels
    folder(tmp_path / "bomb", {"a.png": noise(64)})
    with pytest.raises(UserError, match="1 of 1 images cannot be read.*pixels"):
        common.load_dataset(str(tmp_path / "bomb"), image_size=8)


# ---- images that memory does not hold


def test_files_decoded_at_each_use_are_those_that_loading_holds(tmp_path, monkeypatch):
    """Folder, zip and a resized dataset, one by one and in the batches of training, which workers decode."""
    files, pairs = images(x=200, y=200), []
    for path, more in (
        (folder(tmp_path / "set", files), {}),
        (pack(tmp_path / "set.zip", files), {"image_size": 6, "channels": 1}),
    ):
        pairs.append([common.load_dataset(str(path), **more, max_bytes=n) for n in (None, 1000)])
    x = torch.from_numpy(RNG.integers(0, 256, (300, 3, 8, 8), np.uint8))
    data = common.Dataset("random", x, torch.arange(300) % 7, [*"abcdefg"])
    pairs.append([replace(data, images=kind(x, 5, 1)) for kind in (common.resize, common.Resized)])
    for whole, parts in pairs:
        assert not torch.is_tensor(parts.images) and parts.images.shape == tuple(whole.images.shape)
        assert torch.equal(parts.labels, whole.labels)
        one, two = (common.Batches(d, 8, 3, "cpu", flip=True) for d in (whole, parts))
        for step in (0, 1, 2, 60, 61):  # and elsewhere, as a run that goes on
            for a, b in zip(one(step), two(step), strict=True):
                assert torch.equal(a, b)
        two.stream.close()  # the processes that decode for it end
        few = [common.evaluation_set(d, 20) for d in (whole, parts)]
        assert torch.equal(few[0].images, few[1].images) and torch.equal(few[0].labels, few[1].labels)
        assert len(few[0].images.flatten(1).unique(dim=0)) == 20
    gray = folder(tmp_path / "gray", {f"{i}.png": noise(gray=True) for i in range(50)})
    assert common.load_dataset(str(gray), max_bytes=0).images.shape == (48, 1, 8, 8)
    data = common.load_dataset(str(tmp_path / "set"), image_size=8, max_bytes=1000)
    folder(tmp_path / "set", {f"x/{i:03}.png": b"" for i in range(100)})
    with pytest.raises(UserError, match="95 of 380 images cannot be read: .*x/000.png"):  # before any step
        common.load_dataset(str(tmp_path / "set"), image_size=8, max_bytes=1000)
    with pytest.raises(UserError, match="95 of 380 images cannot be read: .*x/000.png"):
        next(common.read_batches(data.images, [list(range(200))]))
    with pytest.raises(UserError, match="of 380 images cannot be read: "):
        common.Batches(data, 64, 0, "cpu")(0)  # an endless stream of batches


def test_fingerprints_tell_content_and_not_place(tmp_path):
    """Of a folder that memory does not hold, by sizes and ends of the files: reading all would be slow."""
    files = images(cat=30, dog=30)
    here, there = folder(tmp_path / "here", files), folder(tmp_path / "there" / "deeper", files)
    data, (a, b) = common.load_dataset, load(here)
    assert (a.fingerprint(), b.fingerprint()) == tuple(d.fingerprint() for d in load(there))
    lazy = data(str(here), max_bytes=0)
    assert lazy.fingerprint() == data(str(there), max_bytes=0).fingerprint()
    os.utime(here / "cat" / "000.png", (0, 0))
    assert data(str(here)).fingerprint() == a.fingerprint()
    first = here / "cat" / "000.png"
    changed = Image.open(first)
    changed.putpixel((3, 3), (1, 2, 3))
    folder(here, {"cat/000.png": encode(changed)})
    assert data(str(here)).fingerprint() != a.fingerprint()
    assert data(str(here), max_bytes=0).fingerprint() != lazy.fingerprint()


PATHS = """
import sys, common, ddpm_unet_mnist as ddpm
for flags in (
    ["--dataset", "x" * 300], ["--out", "file"], ["--out", "/proc/nope"], ["--out", "y" * 300],
    ["--config", "z" * 300], ["--resume", "w" * 300], ["--dataset", "locked"],
):
    tiny = "--steps 1 --width 8 --mults 1 --compile off --dataset set".split()
    try:
        with common.one_line_errors():
            ddpm.train(common.parse(ddpm.Config, "", [*tiny, *flags]))
    except SystemExit as e:
        print(e.code)
"""


def test_paths_that_the_system_refuses_are_one_line(tmp_path):
    """Status 2, one line, no traceback, nothing made."""
    (tmp_path / "file").write_text("")
    folder(tmp_path / "set", images(cat=5))
    command = [sys.executable, "-c", PATHS]
    environment = os.environ | {"PYTHONPATH": str(Path(common.__file__).parent)}
    p = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    errors = p.stderr.splitlines()
    assert p.stdout.split() == ["2"] * 7 and len(errors) == 7, p.stderr
    assert all(e.startswith("error: ") and "; " in e for e in errors), errors
    assert not (tmp_path / "logs").exists()
