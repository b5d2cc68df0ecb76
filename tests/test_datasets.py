"""MNIST, folders and zips of images: classes, held-out images, file formats, messages."""

import io
import json
import os
import re
import subprocess
import sys
import threading
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
    """Equal for a folder and a zip. No image is in both splits, unless there are fewer than 40."""
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
    """Held-out labels are the training split's numbers. A folder around all images of both does not count."""
    for name, prefix in (("x", ""), ("y", "pets/"), ("z", "a/b/")):
        train, test = images(cat=20, dog=20, fish=20), images(dog=5, fish=6)
        path = pack(tmp_path / f"{name}-train.zip", {prefix + k: v for k, v in train.items()})
        pack(tmp_path / f"{name}-test.zip", {prefix + k: v for k, v in test.items()})
        train, test = load(path)
        assert counts(train) == {"cat": 20, "dog": 20, "fish": 20}
        assert counts(test) == {"cat": 0, "dog": 5, "fish": 6}
    for files, match in (
        (images(x_test__dog=5), "held-out images of x_test, which training lacks"),  # around one of the two
        (images(train__cat=20), "has test, test/train, train among its folders"),
        (images(dog=5, yak=2, zebu=1), "held-out images of yak, zebu, which training lacks .it has cat, "),
        ({"a.txt": b""}, "there is no image in .*x-test.zip"),
    ):
        pack(tmp_path / "x-test.zip", files)
        common.open_zip.cache_clear()
        with pytest.raises(UserError, match=match):
            common.load_dataset(str(tmp_path / "x-train.zip"))


@pytest.mark.parametrize(
    "files, match",
    [
        ({"cat": 30, "": 1}, "images beside folders of images .cat., which are classes"),
        ({"cat__train": 30, "cat__test": 30, "dog__train": 30}, "has cat/test, cat/train, dog/train among"),
        ({"train__cat": 30, "test__cat": 9, "train__dog__val": 9}, "has test, train, train/dog/val among"),
        ({"cat": 30, "dog__val": 9}, "has dog/val among its folders, so it is unclear what is held out"),
        ({"train__cat": 30, "extra__cat": 9}, "has train among its folders"),
        ({"test__cat": 30, "extra__cat": 9}, "has test among its folders"),
        ({"train__cat": 30, "Train__dog": 30, "test__cat": 3}, "has Train, test, train among"),
        ({"train__cat": 30, "test": 9}, "held-out images of no folder, which training lacks"),
        (
            {"train__cat": 30, "test__dog": 9},
            "held-out images of dog, which training lacks .it has cat.; add",
        ),
        ({f"p{i}": 1 for i in range(40)}, "has one image per class, so none can be held out"),
    ],
)
def test_ambiguous_datasets_are_one_line(tmp_path, files, match):
    with pytest.raises(UserError, match=match) as e:
        common.load_dataset(str(folder(tmp_path / "set", images(**files))))
    assert "\n" not in str(e.value) and "; " in str(e.value)


def test_dataset_json_is_refused(tmp_path):
    """StyleGAN and EDM keep labels in it; their folders are not classes."""
    files = images(**{"00000": 30, "00001": 30}) | {"dataset.json": b"{}"}
    for path in (folder(tmp_path / "set", files), pack(tmp_path / "set.zip", files)):
        with pytest.raises(
            UserError, match="has labels in dataset.json, which is not supported; make one fol"
        ):
            common.load_dataset(str(path))


def test_ignored_files_are_counted_in_one_line(tmp_path, capsys):
    files = images(train__cat=30, test__cat=3, val__cat=4)
    files |= {"train/a.txt": b"", "b.TXT": b"", "LICENSE": b""}
    common.load_dataset(str(folder(tmp_path / "few", files)))
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and "ignored in" in text and "4 images in val, 2 .txt, 1 without a s" in text
    files = images(cat=30) | {f"cat/{n}{i}": b"" for i in range(50) for n in ("label", "x.")}
    common.load_dataset(str(folder(tmp_path / "many", files)))
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and "50 without a suffix, 1 .0, " in text and len(text) < 300


def test_runs_inside_of_a_dataset_are_not_images(tmp_path):
    root = folder(tmp_path, images(cat=30, logs__rf__run__samples=5) | {"logs/rf/run/run.yaml": b""})
    assert list(counts(load(root)[0])) == [tmp_path.name]


@pytest.mark.parametrize("name", ["..", "..\\", "\\", "9" * 5000, "cat\\..\\x.png"])
def test_odd_members_of_a_zip(tmp_path, name):
    path = pack(tmp_path / "set.zip", images(cat=30, dog=30) | {name: noise()})
    assert {"cat", "dog"} <= {*load(path)[0].classes}


def test_links_are_followed_but_not_to_a_parent(tmp_path):
    root = folder(tmp_path / "set", images(cat=25))
    folder(tmp_path / "elsewhere", images(dog=25))
    os.symlink(tmp_path / "elsewhere" / "dog", root / "dog")
    os.symlink(root, root / "cat" / "back")
    os.symlink(tmp_path / "elsewhere" / "dog", root / "cat" / "there")  # and there, a link back
    os.symlink(root / "cat", tmp_path / "elsewhere" / "dog" / "here")
    train, test = load(root)
    assert counts(train) == {"cat": 48, "dog": 48} and counts(test) == {"cat": 2, "dog": 2}


def test_a_zip_with_two_files_of_one_name(tmp_path):
    """The first would never be read."""
    path = pack(tmp_path / "set.zip", images(cat=30))
    with zipfile.ZipFile(path, "a") as z, pytest.warns(UserWarning, match="Duplicate name"):
        z.writestr("cat/000.png", noise())
    with pytest.raises(UserError, match=r"set.zip has 1 names twice \(cat/000.png\); make it again"):
        load(path)


def test_a_zip_made_on_windows(tmp_path, capsys):
    files = {name.replace("/", "\\"): data for name, data in images(cat=30, dog=30).items()}
    assert counts(load(pack(tmp_path / "set.zip", files | {"cat\\": b""}))[0]) == {"cat": 29, "dog": 29}
    assert capsys.readouterr().out == ""  # folders are not ignored files


def test_names_in_a_zip_that_lead_outside_write_nothing_there(tmp_path):
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
    assert train.images.shape[1:] == test.images.shape[1:] == (3, sizes[1], sizes[1])
    files = {f"{i:03}.png": noise(8, gray=(i == 10) == (sizes[0] == 8)) for i in range(60)}
    channels = 3 if sizes[0] == 8 else 1
    train, test = load(folder(tmp_path / "channels", files))
    assert train.images.shape[1] == test.images.shape[1] == channels
    train, test = load(folder(tmp_path / "channels", files), image_size=6, channels=3)
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 6, 6)


def test_a_built_in_name_that_is_a_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "digits", images(cat=5))
    with pytest.raises(UserError, match="digits is a built-in dataset, and .*; use ./digits for the folder"):
        common.load_dataset("digits")
    assert common.load_dataset("./digits").classes == ["digits"]
    monkeypatch.chdir(tmp_path / "digits")
    assert common.load_dataset(".").name == "digits"
    assert common.load_dataset("digits", split="test").files == []


def test_mnist_missing_is_one_line_that_offers_digits(tmp_path):
    with pytest.raises(UserError, match=f"mnist is not in {tmp_path} .*--data-root.*--dataset digits"):
        common.load_dataset("mnist", tmp_path)


def test_mnist_layout_of_torchvision_is_read(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = np.arange(3 * 784, dtype=np.uint8).reshape(3, 28, 28), np.array([3, 1, 4], np.uint8)
    for split in ("train", "t10k"):
        for kind, header, x in (
            ("images-idx3", (2051, 3, 28, 28), images),
            ("labels-idx1", (2049, 3), labels),
        ):
            (raw / f"{split}-{kind}-ubyte").write_bytes(np.array(header, ">i4").tobytes() + x.tobytes())
    data = common.load_dataset("mnist", tmp_path)
    assert np.array_equal(data.images[:, 0], images) and data.labels.tolist() == [3, 1, 4]
    assert data.classes == [str(i) for i in range(10)]
    resized, on_disk = (common.load_dataset("mnist", tmp_path, "train", 32, 3, n) for n in (None, 0))
    assert resized.images.shape == on_disk.images.shape == (3, 3, 32, 32) and torch.is_tensor(resized.images)
    assert torch.equal(common.images_at(on_disk.images, range(3)), resized.images)
    assert on_disk.fingerprint() == resized.fingerprint()


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda p: "minst", "there is no dataset minst; use mnist"),
        (lambda p: "", "there is no dataset ''; use mnist"),
        (lambda p: str(folder(p, {"readme.txt": b""})), "there is no image"),
        (lambda p: str(folder(p, {"x.zip": b"no zip"}) / "x.zip"), "x.zip is not a folder or .zip of images"),
    ],
)
def test_bad_datasets(tmp_path, make, match):
    with pytest.raises(UserError, match=match):
        common.load_dataset(make(tmp_path))


# ---- files


def scene(width=24, height=16):
    """An image that every rotation or reflection changes, smooth, so that JPEG keeps it."""
    v, u = np.mgrid[0:height, 0:width]
    return np.stack([u * 255 / width, v * 255 / height, (u + 2 * v) % 40 * 6], -1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_images_are_turned_as_in_an_image_viewer(orientation, kind):
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # to be stored
    upright = Image.fromarray(scene(16, 16))
    stored = upright if turned is None else upright.transpose(Image.Transpose(turned))
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    got = common.decode_image(encode(stored, kind, exif=exif, **more), 16).transpose(1, 2, 0).astype(int)
    assert np.abs(got - np.asarray(upright)).mean() < 3
    if orientation > 1:
        assert np.abs(got - np.asarray(stored)).mean() > 20


def test_every_pixel_format_is_decoded_correctly():
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
    for mode in "FI":  # converted, those in [0, 1] would be black
        with pytest.raises(ValueError, match="32 bits, of unknown range"):
            common.decode_image(encode(Image.new(mode, (8, 8), 1), "TIFF"), 4)


def test_suffixes_that_pillow_reads(tmp_path):
    kinds = {"tif": "TIFF", "TIFF": "TIFF", "jfif": "JPEG", "ppm": "PPM"}
    kinds |= {"avif": "AVIF", "webp": "WEBP", "tga": "TGA"}
    files = {f"a/{i}.{suffix}": encode(scene(8, 8), kind) for i, (suffix, kind) in enumerate(kinds.items())}
    data = common.load_dataset(str(folder(tmp_path / "set", files | images(b=3))))
    assert counts(data) == {"a": len(kinds), "b": 3}


def test_files_that_cannot_be_read_are_named_and_counted(tmp_path, monkeypatch):
    root = folder(tmp_path / "set", images(train__a=300, test__a=1) | {"train/a/bad.png": b"x"})
    match = "1 of 301 images cannot be read: train/a/bad.png .not an image.; repair or remove them"
    with pytest.raises(UserError, match=match):
        common.load_dataset(str(root))
    folder(root, {f"train/a/x{i}.png": b"" for i in range(6)})
    with pytest.raises(UserError, match="7 of 307 images cannot be read: .*, ...; repair"):
        common.load_dataset(str(root))
    for name in ("001.png", "000.png"):
        (root / "train/a" / name).unlink()
        (root / "train/a" / name).symlink_to("nowhere.png")
        match = "8 of 307 images cannot be read: train/a/001.png" if name == "001.png" else "a/000.png'$"
        with pytest.raises((UserError, FileNotFoundError), match=match):  # each is one line
            common.load_dataset(str(root), image_size=8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # what Pillow's limit does to 30,000 x 30,000 pixels
    folder(tmp_path / "bomb", {"a.png": noise(64)})
    with pytest.raises(UserError, match="1 of 1 images cannot be read.*pixels"):
        common.load_dataset(str(tmp_path / "bomb"), image_size=8)


# ---- images that memory does not hold


def on_disk(path, **more):
    return common.load_dataset(str(path), max_bytes=1000, **more)


def test_images_on_disk_equal_those_in_memory(tmp_path):
    """Of a folder and a resized zip, in the batches of two ranks, whose files several threads decode."""
    files = images(x=200, y=200)
    for path, more in (
        (folder(tmp_path / "set", files), {}),
        (pack(tmp_path / "set.zip", files), {"image_size": 6, "channels": 1}),
    ):
        a, b = common.load_dataset(str(path), **more), on_disk(path, **more)
        assert torch.is_tensor(a.images) and not torch.is_tensor(b.images)
        assert b.images.shape == tuple(a.images.shape) and torch.equal(a.labels, b.labels)
        for rank in (0, 1):
            one, two = (common.Batches(d, 8, 3, "cpu", rank, 2, flip=True) for d in (a, b))
            for step in (0, 1, 2, 60, 61, 0):  # out of order, and into the second epoch
                assert all(torch.equal(x, y) for x, y in zip(one(step), two(step), strict=True))
        few = [common.evaluation_set(d, 20) for d in (a, b)]
        assert torch.equal(few[0].images, few[1].images) and torch.equal(few[0].labels, few[1].labels)
        assert len(few[0].images.flatten(1).unique(dim=0)) == 20


def test_on_disk_only_the_images_of_a_batch_are_read(tmp_path):
    """They have three channels, as not all can be looked at. Unreadable ones are named when they are used."""
    path = folder(tmp_path / "set", {f"{i:03}.png": noise(gray=True) for i in range(100)})
    data = on_disk(path)
    assert data.images.shape == (95, 3, 8, 8) and on_disk(path, channels=1).images.shape[1] == 1
    test = common.load_dataset(str(path), split="test", image_size=8, channels=3)
    assert torch.is_tensor(test.images) and test.images.shape[1] == 3
    for i in range(100):
        (path / f"{i:03}.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"8 of 8 images cannot be read: \d+.png .not an image.*, ...; repair"
    ):
        common.Batches(data, 8, 0, "cpu")(0)
    with pytest.raises(UserError, match="20 of 20 images cannot be read"):
        common.evaluation_set(data, 20)


@pytest.mark.parametrize("size, threads", [(8, False), (128, True)])
def test_small_files_are_decoded_without_threads(tmp_path, monkeypatch, size, threads):
    """On two cores, threads halve the speed for CIFAR-10's JPEGs (1 kB), and double it for photos."""
    decode, seen = common.decode_image, set()
    monkeypatch.setattr(common, "decode_image", lambda *a: seen.add(threading.current_thread()) or decode(*a))
    data, _ = load(folder(tmp_path / "pets", {f"a/{i}.png": noise(size) for i in range(60)}), image_size=8)
    main = threading.main_thread()
    assert seen and (main not in seen if threads else seen == {main})
    resized = common.ImageFiles(data.images, size, 3)
    assert isinstance(resized.decode([0]), map) != threads


def test_fingerprints_depend_on_content_but_not_on_place(tmp_path):
    """Of a dataset on disk, on the sizes of the files: reading all of them would take long."""
    files = images(cat=30, dog=30)
    here, there = folder(tmp_path / "here", files), folder(tmp_path / "there" / "deeper", files)
    a, b = load(here)
    assert a.fingerprint() != b.fingerprint()
    assert [a.fingerprint(), b.fingerprint()] == [d.fingerprint() for d in load(there)]
    disk = on_disk(here).fingerprint()
    assert disk == on_disk(there).fingerprint()
    first = here / "cat" / "000.png"
    os.utime(first, (0, 0))
    assert common.load_dataset(str(here)).fingerprint() == a.fingerprint()
    with Image.open(first) as changed:
        changed.putpixel((3, 3), (1, 2, 3))
        first.write_bytes(encode(changed))
    assert common.load_dataset(str(here)).fingerprint() != a.fingerprint()
    first.write_bytes(first.read_bytes() + b" ")
    assert on_disk(here).fingerprint() != disk
    assert replace(a, labels=1 - a.labels).fingerprint() != a.fingerprint()


# ---- captions


def captioned():
    """{file name: content} with captions by both conventions, and with what may be wrong about them."""
    files = images(train__a=4, train__b=2, test__a=2)
    lines = [
        {"file_name": "train/a/000.png", "text": ["one  cat", "a cat "]},
        {"file_name": "./test/a/000.png", "text": "held out"},
        {"file_name": "train/a/001.png", "text": " "},
        {"file_name": "train/a/009.png", "text": "a ghost"},
    ]
    files["metadata.jsonl"] = b"\xef\xbb\xbf" + "\n".join(map(json.dumps, lines)).encode()
    files["train/b/metadata.jsonl"] = (
        b'\n{"file_name": "000.png", "text": "nes\xe2\x80\xa8ted", "more": 1}\r\n'
    )
    files |= {"train/a/002.txt": b"\xef\xbb\xbfbeside\nit", "train/a/003.TXT": "größer".encode()}
    return files | {"train/a/notes.txt": b"of nobody", "test/a/001.txt": b"held out, too"}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_captions_by_both_conventions(tmp_path, capsys, kind):
    path = (folder if kind == "folder" else pack)(tmp_path / f"set.{kind}", captioned())
    train, held_out = load(path, captions=True, image_size=8, channels=3)
    want = [["one cat", "a cat"], [], ["beside it"], ["größer"], ["nes ted"], []]
    assert train.files[4].endswith("train/b/000.png") and train.captions == want
    assert held_out.captions == [["held out"], ["held out, too"]]
    notes = capsys.readouterr().out.splitlines()
    missing = "2 images have no caption (train/a/001.png), 1 captions are empty (train/a/001.png)"
    lost = "2 captions have no image (train/a/009.png)"
    assert notes == [f"note    train: {missing}, {lost}"]
    plain = common.load_dataset(str(path))
    assert plain.captions == [] and "ignored in" in capsys.readouterr().out
    assert plain.fingerprint() == train.fingerprint()
    few = common.evaluation_set(train)
    assert all(
        torch.equal(few.images[i], train.images[want.index(c)]) for i, c in enumerate(few.captions) if c
    )


@pytest.mark.parametrize(
    "name, data, match",
    [
        ("metadata.jsonl", b'{"file_name": "a/000.png", "text": "x"}\n{"file_na', "Unterminated string"),
        ("metadata.jsonl", b'{"file_name": "a/000.png"}', "'text'"),
        ("metadata.jsonl", b'{"file_name": "a/000.png", "text": 7}', "no attribute 'split'"),
        ("metadata.jsonl", b'{"file_name": "a/000.png", "text": {"en": "x"}}', "no attribute 'split'"),
        ("metadata.jsonl", b'{"file_name": "a/000.png", "text": "\\ud83d"}', "surrogates not allowed"),
        ("metadata.jsonl", b'{"file_name": "a/000.png", "text": ["x", null]}', "no attribute 'split'"),
        ("metadata.jsonl", b'{"file_name": 7, "text": "x"}', "expected string"),
        ("metadata.jsonl", b"[1]", "list indices"),
        ("a/000.txt", b"caf\xe9", "codec can't decode"),
    ],
)
def test_captions_that_cannot_be_read_are_one_line(tmp_path, name, data, match):
    path = folder(tmp_path / "set", images(a=3) | {name: data})
    with pytest.raises(
        UserError, match=rf"set: cannot read captions from {name} \(.*{match}.*\); write UTF-8"
    ):
        common.load_dataset(str(path), captions=True)
    assert common.load_dataset(str(path)).captions == []


def test_images_without_any_caption_have_none(tmp_path):
    path = folder(tmp_path / "set", images(a=3) | {"metadata.jsonl": b"", "a/000.txt": b" \n"})
    assert common.load_dataset(str(path), captions=True).captions == []


def test_captions_of_images_that_are_not_there(tmp_path, capsys):
    """All of them is a mistake, and not a dataset without captions; other .jsonl files are no captions."""
    line = b'{"file_name": "000.png", "text": "a cat"}\n'
    path = folder(
        tmp_path / "set", images(a=3) | {"a/000.jsonl": line, "captions.jsonl": line, "README.txt": b"x"}
    )
    assert common.load_dataset(str(path), captions=True).captions == []
    assert "ignored in" in (out := capsys.readouterr().out) and "2 .jsonl" in out
    (path / "metadata.jsonl").write_bytes(line)
    with pytest.raises(
        UserError,
        match=r"none of the 1 captions in metadata.jsonl has an image \(000.png\); write file names",
    ):
        common.load_dataset(str(path), captions=True)


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    """It would be left out, and nobody told; but not a file system's own. (Who runs this may read all.)"""
    path, scandir, refused = folder(tmp_path / "set", images(cat=5, dog=5)), os.scandir, "lost+found"
    (path / refused).mkdir()

    def refuse(name):
        if str(name).endswith(refused):
            raise PermissionError(13, "Permission denied", name)
        return scandir(name)

    monkeypatch.setattr(os, "scandir", refuse)
    assert common.load_dataset(str(path)).classes == ["cat", "dog"]
    refused = "dog"
    with pytest.raises(PermissionError) as e:
        common.load_dataset(str(path))
    assert e.value.filename == str(path / "dog")


def test_photos_that_pillow_cannot_read_are_counted(tmp_path):
    path = folder(tmp_path / "set", {"1.heic": b"", "2.HEIC": b"", "Thumbs.db": b""})
    with pytest.raises(
        UserError, match="no image in .*set that can be read, 2 .heic, 1 .db; use a folder or"
    ):
        common.load_dataset(str(path))


def test_images_of_many_pixels_need_a_size(tmp_path):
    Image.new("L", (800, 513)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="has images of 513 pixels; set --image-size, such as 64"):
        common.load_dataset(str(tmp_path))
    assert common.load_dataset(str(tmp_path), image_size=513).images.shape == (1, 1, 513, 513)
    assert common.load_dataset(str(tmp_path), image_size=8).images.shape == (1, 1, 8, 8)


PATHS = """
import sys, common, ddpm_unet_mnist as ddpm
for flags in (
    ["--dataset", "x" * 300], ["--out", "file"], ["--out", "/proc/nope"], ["--out", "y" * 300],
    ["--config", "z" * 300], ["--resume", "w" * 300], ["--dataset", "locked"],
):
    tiny = "--steps 1 --width 8 --mults 1 --compile off --dataset set".split()
    try:
        with common.exit_on_user_error():
            ddpm.train(common.parse(ddpm.Config, "", [*tiny, *flags]))
    except SystemExit as e:
        print(e.code)
"""


def test_paths_that_the_system_refuses_are_one_line(tmp_path):
    """Status 2, one line, no traceback, no run folder."""
    (tmp_path / "file").write_text("")
    folder(tmp_path / "set", images(cat=5))
    command = [sys.executable, "-c", PATHS]
    environment = os.environ | {"PYTHONPATH": str(Path(common.__file__).parent)}
    p = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    errors = p.stderr.splitlines()
    assert p.stdout.split() == ["2"] * 7 and len(errors) == 7, p.stderr
    assert all(e.startswith("error: ") and "; " in e for e in errors), errors
    assert not (tmp_path / "logs").exists()
