"""What the scripts share, and nothing else: flags and errors, datasets, time embedding, EMA, run folders."""

import argparse
import atexit
import contextlib
import ctypes
import difflib
import errno
import fcntl
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
import zipfile
import zlib
from collections import Counter
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Flags, errors, seeds, devices

PREEMPTED = 75  # exit status after a signal: a checkpoint is written, --resume goes on


class UserError(Exception):
    """Bad input: ends the program with one line, `error: what is wrong; what to do`, and exit status 2."""


@contextlib.contextmanager
def one_line_errors():
    """Around a script's main: bad input and paths that the system refuses become one line; a bug keeps its
    traceback. Names that are not valid UTF-8 are printed escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not under pytest
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        return
    except UserError as e:
        text = str(e)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if e.filename is None and not full:  # not about a path: a bug
            raise
        advice = "make room, or write elsewhere (--out, --cache)" if full else "give another path"
        text = f"{e.strerror}: {e.filename or 'the run folder'}; {advice}"
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


def why(e):
    """The first line of an exception."""
    return (str(e).splitlines() or [type(e).__name__])[0][:120]


def need(ok, text):
    """Raises UserError(text) unless ok."""
    if not ok:
        raise UserError(text)


def in_range(cfg, names, low, high=math.inf):
    """Raises UserError unless these flags, separated by spaces, are numbers in [low, high]."""
    bounds = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
    for name in names.split():
        value = getattr(cfg, name)
        need(low <= value <= high, f"{_flag(name)} is {value}; give {bounds}")


def positive(cfg, names):
    """Raises UserError unless these flags, separated by spaces, are positive and finite."""
    for name in names.split():
        value = getattr(cfg, name)
        need(0 < value < math.inf, f"{_flag(name)} is {value}; give a positive number")


def derived(default):
    """A field of Config that follows from the dataset: stored with the flags, but not a flag itself."""
    return field(default=default, metadata={"derived": True})


INVOCATION = {"resume", "sample", "config", "new_code"}  # flags that say how to start, not what to train
# A run's flags hold, but --resume may change how long, how often and where it runs, --sample how it samples.
MAY_CHANGE = {
    "resume": set("steps minutes log_every eval_every sample_every save_every keep".split())
    | set("device dtype compile grad_checkpoint dataset data_root out cache vae vae_path".split()),
    "sample": set("guidance guidance_interval sampling_steps solver clip_x0 num_samples seed device".split()),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse(Config, doc, argv=None):
    """Command line -> Config, whose fields are the flags and whose trailing comments are the help.

    Later wins: defaults, then the --config file or the flags of the run that --resume or --sample names, then
    the command line. Raises UserError for unknown flags, values of a wrong type and forbidden changes.
    """
    hints = typing.get_type_hints(Config)
    helps = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", inspect.getsource(Config), re.M))
    flags = {f.name: f.default for f in fields(Config) if not f.metadata}
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=doc, allow_abbrev=False, formatter_class=layout)
    for name, default in flags.items():
        hint, kind = hints[name], {"help": f"{helps.get(name, '')} [{default}]".replace("%", "%%")}
        of, choices = typing.get_origin(hint), typing.get_args(hint)
        if hint is bool:
            kind["action"] = argparse.BooleanOptionalAction
        elif of is typing.Literal:
            kind["choices"] = choices
            if "on" in choices:  # --compile alone means --compile on
                kind |= {"nargs": "?", "const": "on"}
        elif of is tuple:  # tuple[float, ...] takes any number of them, tuple[float, float] two
            kind |= {"nargs": "*" if choices[-1] is ... else len(choices), "type": choices[0], "metavar": "N"}
        else:
            kind |= {"type": hint, "metavar": getattr(hint, "__name__", "").upper()}
        known = hint in (bool, int, float, str) or of in (tuple, typing.Literal)
        types = (of or hint, int) if hint is float else (of or hint,)
        fits = default in choices if of is typing.Literal else type(default) in types
        if not (known and fits):
            text = f"Config.{name} is {hint} with default {default!r}; a flag is a bool, int, float, str,"
            raise TypeError(f"{text} Literal or tuple, and its default is of that type")
        parser.add_argument(_flag(name), default=argparse.SUPPRESS, **kind)

    def read(arguments):
        known, unknown = parser.parse_known_args(arguments)
        if unknown:
            typed, names = unknown[0].split("=")[0], [*map(_flag, flags)]
            near = [f for f in names if f.startswith(typed)] or difflib.get_close_matches(typed, names, 1)
            advice = f"did you mean {near[0]}?" if near else "see --help"
            raise UserError(f"unknown argument {unknown[0]}; {advice}")
        return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(known).items()}

    given = read(argv)
    modes = [m for m in ("config", "resume", "sample") if m in given]
    need(len(modes) < 2, f"--{' and --'.join(modes)} contradict each other; give one of them")
    need(all(given[m] for m in modes), f"--{''.join(modes)} is empty; give a path, or leave it out")
    need(not given.get("new_code") or modes == ["resume"], "--new-code says how to --resume RUN; give both")
    if not modes:
        return Config(**given)
    mode = modes[0]
    if mode != "config":
        check_run(given[mode], mode, inspect.getfile(Config), given.get("new_code", False))
    file = Path(given[mode]) if mode == "config" else find_run(given[mode]) / "run.yaml"
    try:
        stored = dict(yaml.safe_load(file.read_text())["config"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as e:
        text = f"{file} is no readable run.yaml ({why(e)}); give one that a run has written"
        raise UserError(text) from None
    if given.get("new_code") and (gone := [k for k in stored if k not in hints]):
        say(f"note    the new code has no {', '.join(gone)}")
        stored = {k: v for k, v in stored.items() if k in hints}
    arguments, rest = [], {}  # the file's flags are read as if typed: the same types, the same errors
    for key, value in stored.items():
        if key in hints and key not in flags:
            rest[key] = tuple(value) if isinstance(value, list) else value
        elif isinstance(value, bool):
            arguments.append(_flag(str(key)) if value else _flag(f"no_{key}"))
        elif isinstance(value, list):
            arguments += [_flag(str(key)), *map(str, value)]
        else:
            arguments.append(f"{_flag(str(key))}={value}")
    try:
        stored = rest | read(arguments)
    except UserError as e:
        raise UserError(f"{file}: {e}") from None
    new = {k for k in flags if given.get("new_code") and k not in stored}
    for key, value in given.items():
        was = stored.get(key, flags[key])
        ok = key in new or mode == "config" or key in MAY_CHANGE[mode] | INVOCATION or value == was
        need(ok, f"{_flag(key)} {value} is not the run's ({was}); leave it out, or start a new run")
    return Config(**(stored | given))


def _flag(name):
    return "--" + name.replace("_", "-")


def seed_of(*key):
    """An integer in [0, 2^63) from any key; the same in every process, unlike hash() of a string."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def pick_device(name):
    """`auto` -> cuda, mps or cpu; under torchrun each process takes a GPU of its own, from then on the one
    that CUDA calls without a device mean. On a CPU, freed memory is kept. Raises UserError."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(n for n in have if have[n]) if name == "auto" else name
    need(have[name], f"--device {name}: PyTorch finds none on this machine; give --device cpu")
    if name == "cpu":
        keep_memory()
    if name != "cuda":
        return torch.device(name)
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    text = f"there are {count} GPUs here, but a process {rank + 1}; give torchrun --nproc-per-node={count}"
    need(rank < count, f"{text}, or --device cpu")
    torch.cuda.set_device(rank)  # else nccl's barriers, and some memory of each process, go to the first
    return torch.device(name, rank)


def keep_memory():
    """Where C's library is glibc, has it keep what is freed: a step needs as much as the last, and the kernel
    would clear each page of it anew (8% of a step of a DiT of dim 384, depth 3, on two cores)."""
    with contextlib.suppress(AttributeError, OSError):  # another library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap like the rest
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def device_facts(device):
    """(name, whether bfloat16 products are done in hardware; elsewhere the casts only cost time)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.cuda.is_bf16_supported(including_emulation=False)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", info)
    name = f"{model[1] if model else device.type}, {torch.get_num_threads()} threads"
    return name, bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", info))


def compiled(net, trial, cfg, device):
    """torch.compile(net), or net itself where that is not worth while or trial(compiled net) fails.

    trial is a pass whose gradients are dropped. A short run does not earn back the minute that this can take.
    It comes before DistributedDataParallel: one graph, after whose end the gradients are exchanged.
    """
    long = cfg.steps >= 500 and not 0 < cfg.minutes < 1
    if cfg.compile == "off" or (cfg.compile == "auto" and (not long or device.type == "mps")):
        return net
    try:
        fast = torch.compile(net)
        trial(fast)
        return fast
    except Exception as e:
        if cfg.compile == "on":
            raise
        print(f"compile not possible here ({why(e)}); going on without", flush=True)
        return net


def send(x, device):
    """x on device; to a GPU from pinned memory, as a copy from other memory waits for all of its work."""
    if device.type != "cuda":
        return x.to(device)
    return (x if x.is_cuda else x.pin_memory()).to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------
# Datasets

BUILT_IN = ("mnist", "cifar10", "digits")
MAX_BYTES = 4 << 30  # images that take more, decoded, are not kept in memory but decoded at each use
TRAIN, HELD_OUT = ("train", "training"), ("test", "testing", "val", "valid", "validation")  # names of folders


@dataclass
class Dataset:
    """One split: images uint8 [N, C, H, W], or ImageFiles or Resized images of that shape; labels int64 [N];
    the names of the training split's classes, and of the files where there are any."""

    name: str
    images: "torch.Tensor | ImageFiles | Resized"
    labels: torch.Tensor
    classes: list[str]
    files: list[str] = field(default_factory=list)
    content: bytes = b""  # checksums in place of images that memory does not hold, or that a library decoded

    def fingerprint(self):
        """16 hexadecimal digits of images and labels, wherever they lie."""
        content = self.content or self.images.numpy().tobytes()
        return hashlib.blake2b(content + self.labels.numpy().tobytes(), digest_size=8).hexdigest()


def load_dataset(name, data_root="", split="train", image_size=0, channels=0, max_bytes=None):
    """The "train" or "test" split of `mnist`, `cifar10`, `digits`, or of a folder or .zip of images.

    data_root holds mnist and cifar10 (default $DIFFUSION_DATA, else data/). image_size (pixels) and channels
    (1 or 3) of 0 are those of the training split. Raises UserError if the dataset cannot be found, downloaded
    or read, or if it is ambiguous. Images of more than max_bytes (MAX_BYTES) are not kept in memory.
    """
    max_bytes = MAX_BYTES if max_bytes is None else max_bytes
    text = f"--channels is {channels}; give 1 (gray), 3 (colour) or 0 (as the dataset is)"
    need(channels in (0, 1, 3), text)
    text = f"--image-size is {image_size}; give the side in pixels, or 0 for the dataset's own"
    need(0 <= image_size <= 4096, text)
    if name not in BUILT_IN:
        text = f"there is no dataset {name or repr(name)}; give mnist, cifar10, digits, or a folder or .zip"
        need(name and Path(name).exists(), f"{text} of images")
        return _files(Path(os.path.abspath(name)), split, image_size, channels, max_bytes)
    text = f"{name} is a built-in dataset, and here is a folder of that name; give ./{name} for the folder"
    need(not Path(name).exists(), f"{text}, or rename it")
    if name == "digits":
        data = _digits(split, image_size or (32 if channels == 3 else 28), channels or 1)
    else:
        data = _torchvision(name, Path(data_root or os.environ.get("DIFFUSION_DATA") or "data"), split)
    size, channels = image_size or data.images.shape[-1], channels or data.images.shape[1]
    if len(data.images) * channels * size**2 <= max_bytes:
        return replace(data, images=resize(data.images, size, channels))
    return replace(data, images=Resized(data.images, size, channels), content=data.fingerprint().encode())


def resize(x, size, channels):
    """uint8 [N, C, H, W] -> uint8 [N, channels, size, size]."""
    if x.shape[-1] != size:
        x = torch.nn.functional.interpolate(x.float(), (size, size), mode="bicubic", antialias=True)
    if channels == 1 and x.shape[1] == 3:  # luma, ITU-R 601
        x = (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    x = x if x.dtype == torch.uint8 else x.round_().clamp_(0, 255).to(torch.uint8)
    return x.expand(-1, channels, -1, -1).contiguous()


class Resized(torch.utils.data.Dataset):
    """Images of a tensor, resized at each use: images[i] -> (uint8 [C, S, S], None)."""

    def __init__(self, images, size, channels):
        self.images, self.shape = images, (len(images), channels, size, size)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return resize(self.images[i : i + 1], self.shape[3], self.shape[1])[0].numpy(), None


def _torchvision(name, root, split):
    from torchvision import datasets  # takes seconds to import; digits and folders do without

    kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        try:
            data = kind(root, train=split == "train")
        except RuntimeError:  # torchvision's way of saying "not found or corrupted"
            root.mkdir(parents=True, exist_ok=True)
            with open(root / f".{name}.lock", "w") as file:  # of several processes one downloads
                lock(file, wait=True)
                data = kind(root, train=split == "train", download=True)
    except (OSError, RuntimeError, ValueError, EOFError) as e:
        text = f"{name} is not in {root.resolve()} and cannot be downloaded ({why(e)}); "
        raise UserError(text + "give its folder with --data-root, or train on --dataset digits") from None
    images = torch.as_tensor(data.data)  # MNIST [N, 28, 28], CIFAR-10 [N, 32, 32, 3]
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    classes = [c.split(" - ")[0] for c in data.classes]  # MNIST says "0 - zero"
    return Dataset(name, images, torch.as_tensor(data.targets), classes)


def _digits(split, size, channels):
    """MNIST-like digits drawn from Pillow's own font: no download, the same at every call."""
    n = {"train": 20_000, "test": 2_000}[split]
    rng, font, glyphs = np.random.default_rng(seed_of("digits", split)), ImageFont.load_default(64), {}
    for d, stroke in np.ndindex(10, 4):
        glyphs[d, stroke] = Image.new("L", (96, 96))
        ImageDraw.Draw(glyphs[d, stroke]).text((48, 48), str(d), 255, font, anchor="mm", stroke_width=stroke)
    low, high = [-0.3, -0.3, 0.85, 0.9, -0.09, -0.09], [0.3, 0.3, 1.25, 1.2, 0.09, 0.09]
    angle, shear, zoom, aspect, dx, dy = rng.uniform(low, high, (n, 6)).T
    stroke, images = rng.integers(0, 4, n), np.empty((n, size, size, channels), np.uint8)
    for i in range(n):
        # Pixel (u, v) shows the drawing at 48 + M ((u, v) - centre); twice the size, then averaged.
        turn = np.array([[np.cos(angle[i]), -np.sin(angle[i])], [np.sin(angle[i]), np.cos(angle[i])]])
        m = 31 / size * zoom[i] * turn @ np.array([[1, shear[i]], [0, aspect[i]]])
        shift = 48 - m @ [size * (1 + 2 * dx[i]), size * (1 + 2 * dy[i])]
        affine = (*m[0], shift[0], *m[1], shift[1])
        big = glyphs[i % 10, stroke[i]].transform((2 * size,) * 2, Image.AFFINE, affine, Image.BILINEAR)
        ink = np.asarray(big).reshape(size, 2, size, 2).mean((1, 3))[..., None] / 255
        ink = ink * rng.normal(1, 0.06, (size, size, 1))
        paper, pen = (0, 255) if channels == 1 else (rng.uniform(0, 90, 3), rng.uniform(150, 255, 3))
        images[i] = np.clip(paper + (pen - paper) * ink, 0, 255)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Dataset("digits", images, torch.arange(n) % 10, [str(d) for d in range(10)])


def _files(root, split, size, channels, max_bytes):
    """A folder or .zip, see find_images and decode_image."""
    splits, left_out = find_images(root)
    if left_out and split == "train":
        kinds = [f"{n} {what}" for what, n in left_out.most_common(6)] + ["..."] * (len(left_out) > 6)
        say(f"note    left out of {root}: {', '.join(kinds)}")
    classes = sorted({c for c, _ in splits["train"]}, key=natural)
    if more := sorted({c for c, _ in splits["test"]} - {*classes}, key=natural):
        more = ", ".join(c or "no folder" for c in more[:5])
        text = f"{root} holds out images of {more}, of which training has none"
        raise UserError(f"{text} (it has {', '.join(classes[:10])}); give training some, or remove these")
    if split == "test" and not (size and channels):
        _, channels, _, size = _files(root, "train", size, channels, max_bytes).images.shape
    paths, number = [e[:2] for _, e in splits[split]], {c: i for i, c in enumerate(classes)}
    batches = [i.tolist() for i in torch.arange(len(paths)).split(64)]
    size = size or next(read_batches(ImageFiles(paths, 0, 1), [[0]]))[0].shape[-1]
    if len(paths) * (channels or 3) * size**2 > max_bytes:
        gray, checksums = zip(*read_batches(ImageHeaders(paths, 0, 1), batches), strict=True)
        images = ImageFiles(paths, size, channels or (1 if torch.cat(gray).all() else 3))
    else:
        images, checksums = torch.empty(len(paths), channels or 3, size, size, dtype=torch.uint8), []
        decoded = read_batches(ImageFiles(paths, size, channels or 3), batches)
        for i, (x, crcs) in zip(batches, decoded, strict=True):
            images[i] = x
            checksums.append(crcs)
        if channels == 0 and all((x == x[:, :1]).all() for x in images.split(1000)):
            images = images[:, :1].contiguous()  # all of them are gray
    name = printable(root.name.removesuffix(".zip")) or "images"
    return Dataset(
        name,
        images,
        torch.tensor([number[c] for c, _ in splits[split]]),
        [c or name for c in classes],
        ["/".join(e.parts) for _, e in splits[split]],
        np.concatenate(checksums).astype(np.int64).tobytes(),
    )


class Entry(typing.NamedTuple):
    """A file of a dataset: the .zip that holds it or "", its path (there), and its folders and name."""

    archive: str
    path: str
    parts: tuple

    def kind(self):
        """Its suffix."""
        suffix = os.path.splitext(self.parts[-1])[1].lower()
        return "dataset.json" if self.parts[-1] == "dataset.json" else suffix or "without a suffix"


def find_images(root):
    """A folder or .zip -> ({"train": [(class, Entry), ...], "test": ...}, Counter of what is left out).

    Folders that all images share do not count. Then train beside test or val are the splits, as are
    X-train.zip and X-test.zip; else a twentieth of each class is held out, and fewer than 40 images serve as
    both. A class is the first folder below the split. Raises UserError where that is ambiguous.
    """
    kinds = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    kinds -= {*".bufr .eps .emf .grib .h5 .hdf .mpeg .mpg .ps .wmf".split()}  # Pillow needs other programs
    twin = root.with_name(re.sub(r"train\.zip$", "test.zip", root.name))
    twins = {str(root): "train", str(twin): "test"} if twin != root and twin.exists() else {}
    images, paths, left_out, table = [], [], Counter(), {}
    for place in map(Path, twins or [root]):
        files = list_files(place)
        found = [e for e in files if e.kind() in kinds]
        need(found, f"there is no image in {place}; give a folder or .zip that holds some")
        left_out.update(e.kind() for e in files if e.kind() not in kinds)
        table |= integer_labels(files)
        names = {*TRAIN, *HELD_OUT, place.stem.lower()} if twins else set()  # of a folder around all of a zip
        tops = {e.parts[0].lower() if e.parts[1:] else "" for e in found}
        around = len(tops) == 1 and tops <= names
        images, paths = images + found, paths + [e.parts[around:] for e in found]
    shared = len(os.path.commonprefix([p[:-1] for p in paths]))
    paths = [p[shared:] for p in paths]
    if twins:
        paths = [(twins[e.archive], *p) for e, p in zip(images, paths, strict=True)]
    tops = find_splits(root, paths)
    labelled = all(type(table.get((e.archive, e.parts))) is int for e in images)
    if (n := left_out.pop("dataset.json", 0)) and not labelled:
        left_out["dataset.json, which has no integer label for each image"] = n

    splits = {"train": [], "test": []}
    for e, p in zip(images, paths, strict=True):
        split, below = (tops.get(p[0]), p[1:]) if tops else ("train", p)
        if split and below:
            label = str(table[e.archive, e.parts]) if labelled else below[0] if below[1:] else ""
            splits[split].append((label, e))
        else:
            left_out[f"images in {p[0]}" if below else "images beside the splits"] += 1
    for found in splits.values():
        names = sorted({c for c, _ in found}, key=natural)
        text = f"{root} has images beside folders of images ({', '.join(names[1:6])}), which are classes"
        need("" not in names[:1] or len(names) == 1, f"{text}; move them into folders, or out")
    if not tops and len(images) < 40:
        splits["test"] = splits["train"]
    elif not tops:
        classes = {}
        for c, e in splits["train"]:
            classes.setdefault(c, []).append(e)
        held = {e for found in classes.values() if found[1:] for e in found[min(10, len(found) // 2) :: 20]}
        need(held, f"{root} has one image of each class, so that none can be held out; give train/ and test/")
        splits = {s: [x for x in splits["train"] if (x[1] in held) == (s == "test")] for s in splits}
    return splits, left_out


def find_splits(root, paths):
    """Folders and name of each image -> {folder on top: "train" or "test"}, or {} where none is called so."""
    tops = sorted({p[0] for p in paths if len(p) > 1}, key=natural)
    train, held = ([t for t in tops if t.lower() in words] for words in (TRAIN, HELD_OUT))
    held.sort(key=lambda t: HELD_OUT.index(t.lower()))  # beside test, val is left out
    deeper = {p[: i + 1] for p in paths for i in range(1, len(p) - 1) if p[i].lower() in TRAIN + HELD_OUT}
    told = len(train) == 1 and len({t.lower() for t in held}) == len(held) > 0 and not deeper
    untold = not train and not held and len({p[-1].lower() in TRAIN for p in deeper}) < 2
    found = ", ".join([*train, *held, *sorted(map("/".join, deeper))][:4])
    text = f"{root} has {found} among its folders ({', '.join(tops[:4])}), which leaves open what is held out"
    need(told or untold, f"{text}; let one train and one test lie on top, and rename others")
    return {train[0]: "train", held[0]: "test"} if told else {}


def integer_labels(entries):
    """{(archive, folders and name): label} of a dataset.json as EDM and StyleGAN write it."""
    labels = {}
    for e in (e for e in entries if e.parts[-1] == "dataset.json"):
        with contextlib.suppress(Exception):  # it is something else, or damaged
            for name, label in json.loads(ImageFiles([e[:2]], 0, 3).read(0))["labels"]:
                labels[e.archive, (*e.parts[:-1], *name.split("/"))] = label
    return labels


def list_files(root):
    """Entries of all files in a folder or .zip but hidden ones, in natural order. Links are followed."""

    def walk(folder, above):  # above: the folders around; a link back to one of them ends, as do run folders
        for item in os.scandir(folder):
            if not item.is_dir():
                yield "", item.path, os.path.relpath(item.path, root)
            elif (real := os.path.realpath(item.path)) not in above and not os.path.exists(
                f"{real}/run.yaml"
            ):
                yield from walk(item.path, {*above, real})

    if root.is_dir():
        found = walk(str(root), {os.path.realpath(root)})
    else:  # read member by member and never extracted: no name can lead outside
        try:
            with zipfile.ZipFile(root) as archive:
                found = [(str(root), name, name.replace("\\", "/")) for name in archive.namelist()]
        except (OSError, zipfile.BadZipFile) as e:
            text = f"{root} is not a readable folder or .zip ({why(e)}); give one that holds images"
            raise UserError(text) from None
    entries = []
    for archive, path, name in found:
        parts = tuple(printable(p) for p in name.split("/") if p not in ("", ".", ".."))
        if (
            parts
            and not name.endswith("/")
            and not any(p[0] == "." or p in ("__MACOSX", "@eaDir") for p in parts)
        ):
            entries.append(Entry(archive, path, parts))
    return sorted(entries, key=lambda e: [natural(p) for p in e.parts])


def natural(text):
    """A key to sort by, for which 2 comes before 10."""
    parts = re.split(r"([0-9]+)", text)  # every other one is digits
    return [(len(s.lstrip("0")), s.lstrip("0")) if i % 2 else s for i, s in enumerate(parts)], text


def printable(text):
    """A file's name; what is not valid UTF-8 in it is escaped, as in caf\\xe9."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@functools.lru_cache(4)
def open_zip(path, process):
    """Opened by each process for itself: those that share a handle by forking share its position, too."""
    return zipfile.ZipFile(path)


class ImageFiles(torch.utils.data.Dataset):
    """Image files, decoded at each use: files[i] -> (uint8 [C, S, S], CRC-32 of the file), or a UserError
    instead, so that several can be named. paths: [(a .zip or "", path there), ...]; size 0: each its own."""

    def __init__(self, paths, size, channels):
        self.paths, self.shape = paths, (len(paths), channels, size, size)

    def __len__(self):
        return len(self.paths)

    def read(self, i):
        archive, path = self.paths[i]
        if not archive:
            return Path(path).read_bytes()
        archive = open_zip(archive, os.getpid())
        if archive.getinfo(path).file_size >= 1 << 28:
            raise ValueError("larger than 256 MiB")
        return archive.read(path)

    def load(self, i):
        data = self.read(i)
        return decode_image(data, self.shape[3], self.shape[1]), zlib.crc32(data)

    def __getitem__(self, i):
        try:
            return self.load(i)
        except Exception as e:  # damaged files raise nearly anything
            text = "not an image" if isinstance(e, UnidentifiedImageError) else why(e)
            return UserError(f"{printable(self.paths[i][1])} ({text})")


class ImageHeaders(ImageFiles):
    """files[i] -> (is it gray?, checksum of its size and of 4 KiB at either end; in a .zip, its CRC-32)."""

    def load(self, i):
        archive, path = self.paths[i]
        with open_zip(archive, os.getpid()).open(path) if archive else open(path, "rb") as file:
            if archive:
                checksum = open_zip(archive, os.getpid()).getinfo(path).CRC
            else:
                size, ends = os.path.getsize(path), file.read(4096)
                file.seek(max(0, size - 4096))
                checksum = zlib.crc32(ends + file.read(), size % 2**32)
                file.seek(0)
            mode = Image.open(file).mode
        return np.array(mode in ("1", "L", "LA") or mode.startswith("I")), checksum


def decode_image(data, size, channels=3):
    """An image file's bytes -> uint8 [channels, size, size]: centre crop to a square, then resize.

    Palette, 16-bit, RGBA (over white) and CMYK images come out as a viewer shows them, animations as their
    first frame. size 0: the shorter side. Pillow refuses images of more than 179 million pixels.
    """
    image = Image.open(io.BytesIO(data))
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # PNG's have 16 bits
        raise ValueError("its pixels have 32 bits, of unknown range")
    size = size or min(image.size)
    image.draft(None, (size, size))  # JPEG: decode at a lower resolution where that is enough
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB").convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def read_batches(images, batches):
    """Yields (uint8 [n, C, H, W], checksums) for each list of indices: of a tensor, or else decoded ahead of
    use by worker processes. Raises UserError that names files that cannot be read."""
    if torch.is_tensor(images):
        yield from ((images[i], None) for i in batches)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    more = {"num_workers": workers if len(images) > 256 else 0, "generator": torch.Generator()}
    more["worker_init_fn"] = (
        ignore_sigterm  # sent to all processes, as by Slurm, it is for this one to answer
    )
    atexit.register(end_workers)
    bad = []
    for items in torch.utils.data.DataLoader(images, batch_sampler=batches, collate_fn=list, **more):
        bad += [x for x in items if isinstance(x, UserError)]
        if not bad:
            yield torch.from_numpy(np.stack([x for x, _ in items])), [crc for _, crc in items]
        elif not isinstance(batches, list):  # of a list, all that cannot be read are named
            break
    text = f"{len(bad)} of {len(images)} images cannot be read: {', '.join(map(str, bad[:5]))}"
    need(not bad, text + ", ..." * (len(bad) > 5) + "; repair or remove them")


def ignore_sigterm(_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers():
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or PyTorch takes it for an accident
    for process in multiprocessing.active_children():
        process.kill()


def evaluation_set(data, n=2048):
    """At most n images of a split, decoded: a random choice, the same at every call."""
    pick = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed_of("evaluate")))[:n]
    images, _ = next(read_batches(data.images, [pick.tolist()]))
    return replace(data, images=images, labels=data.labels[pick], content=b"")


@functools.lru_cache(2)
def shuffled(n, seed, epoch, device):
    """The numbers below n in the order of an epoch, int64 [n]."""
    generator = torch.Generator().manual_seed(seed_of(seed, "data", epoch))
    return send(torch.randperm(n, generator=generator), device)


class Batches:
    """`x, y = batches(step)`: images and labels of one step; each rank gets its slice of the global batch.

    Sample j of step s is number s * bs + j of a stream of epochs, each its own shuffle of the dataset: a
    function of (seed, step). x is float32 [bs / world, C, H, W] in [-1, 1] on device, y int64; flip mirrors
    half of them.
    """

    def __init__(self, data, bs, seed, device, rank=0, world=1, flip=False):
        self.files = not torch.is_tensor(data.images)
        where = torch.device("cpu" if self.files else device)
        self.images = data.images if self.files else data.images.to(where)
        self.labels, self.bs, self.seed, self.flip = data.labels.to(where), bs, seed, flip
        self.device, self.where, self.next_step = torch.device(device), where, -1
        self.rank_slice = slice(rank * bs // world, (rank + 1) * bs // world)

    def indices(self, step):
        """Which samples make the batch of a step, int64 [bs]."""
        i, end, parts = step * self.bs, (step + 1) * self.bs, []
        while i < end:  # a batch may span epochs
            epoch, k = divmod(i, len(self.labels))
            parts.append(shuffled(len(self.labels), self.seed, epoch, self.where)[k : k + end - i])
            i += len(parts[-1])
        return torch.cat(parts)

    def hflip(self, step):
        """Which of them are mirrored, bool [bs]."""
        generator = torch.Generator(self.device).manual_seed(seed_of(self.seed, "flip", step))
        return torch.rand(self.bs, generator=generator, device=self.device) < 0.5

    def decoded(self, step):
        """This rank's images of a step; the next steps' are decoded meanwhile."""
        if step != self.next_step:
            steps = itertools.count(step)
            self.stream = read_batches(
                self.images, (self.indices(s)[self.rank_slice].tolist() for s in steps)
            )
        self.next_step = step + 1
        return send(next(self.stream)[0], self.device)

    def __call__(self, step):
        indices = self.indices(step)[self.rank_slice]
        x = (self.decoded(step) if self.files else self.images[indices]).float() / 127.5 - 1
        if self.flip:
            x = torch.where(self.hflip(step)[self.rank_slice].view(-1, 1, 1, 1), x.flip(-1), x)
        return x, send(self.labels[indices], self.device)


# ------------------------------------------------------------------------------------------------
# Time embedding and EMA


def time_embedding(t, dim, max_period=10_000.0):
    """Sinusoids of t in [0, 1]: [B] -> float32 [B, dim] (Vaswani et al. 2017, sec. 3.5)."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    # The frequencies are made for integers up to 1000; of t itself, most sinusoids would be constant.
    angle = 1000 * t.float()[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class EMA:
    """Moving average of a model's weights; `ema.model` is a plain copy, to evaluate, sample and save.

    The decay warms up as (1 + n) / (20 + n) after n updates until it reaches `decay`: the average spans the
    last twentieth of the run so far (Karras et al. 2024, sec. 3.1), which suits short runs and long ones.
    """

    def __init__(self, model, decay):
        self.model, self.decay = deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model, n):
        """Call after optimizer step number n = 1, 2, ..."""
        weight = 1 - min(self.decay, (1 + n) / (20 + n))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)
        for mine, new in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(new)


# ------------------------------------------------------------------------------------------------
# Run folders


EARLY = []  # what was said before there was a run.out


def say(text):
    """Prints a line, on rank 0 alone, without tearing the progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        if not isinstance(sys.stdout, Tee):
            EARLY.append(f"{text}\n")


def find_run(path):
    """RUN or RUN/checkpoints/step_X.pt -> RUN. Raises UserError."""
    run = Path(path).parent.parent if str(path).endswith(".pt") else Path(path)
    if not Path(path).exists() or not (run / "run.yaml").exists():
        raise UserError(f"{path} is no run (there is no {run / 'run.yaml'}); give a folder logs/METHOD/NAME")
    return run


def lock(file, wait=False):
    """Locks an open file, which the system undoes however the process ends. False: another process has it.

    On a file system without locks everyone gets it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def write_atomically(path, write):
    """write(file) into a temporary file beside path, then rename: path is whole or as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except RuntimeError as e:  # torch.save hides a full disk behind an error of its own
        raise (e.__context__ if isinstance(e.__context__, OSError) else e) from None
    finally:
        temporary.unlink(missing_ok=True)


def set_aside(path, suffix):
    """Renames a file to PATH.SUFFIX, or _2, _3, ..., so that none gets lost."""
    new = (Path(f"{path}.{suffix}" + f"_{i}" * (i > 1)) for i in itertools.count(1))
    path.rename(next(n for n in new if not n.exists()))


def load_checkpoint(path):
    """A checkpoint's dict, on the CPU, every byte checked and no code in it run. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as z:  # PyTorch's own reader does not look at the checksums
            if damaged := z.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"model", "ema", "optimizer", "step", "config"} <= state.keys():
            raise ValueError("it was not written by these scripts")
        return state
    except Exception as e:  # a damaged or hostile file raises nearly anything
        raise UserError(f"{path} cannot be loaded ({why(e)}); give another checkpoint") from None


def newest_checkpoint(path, none_yet=False):
    """The state in a file, or in the newest undamaged checkpoint of a run, which may have none_yet: None."""
    if str(path).endswith(".pt"):
        return load_checkpoint(path)
    run = find_run(path)
    found = sorted((run / "checkpoints").glob("step_*.pt"), reverse=True)
    text = f"{path} has no checkpoint; wait for its first, or run it again with --config {run}/run.yaml"
    need(found or none_yet, text)
    for i, file in enumerate(found):
        try:
            return load_checkpoint(file)
        except UserError as e:
            if i + 1 == len(found):
                raise
            say(f"warning: {str(e).split(';')[0]}; using {found[i + 1]}")
    return None


def check_run(path, mode, script, new_code=False):
    """Raises UserError, before anything is touched, where a run to --resume or --sample has nothing to go on
    from, or where script or common.py is not the code that it keeps in RUN/code."""
    run = find_run(path)
    log = run / "metrics" / "loss.jsonl"
    if not str(path).endswith(".pt") and (mode == "sample" or log.exists() and log.stat().st_size):
        text = f"{run} has no checkpoint to go on from; run it again with --config {run}/run.yaml"
        need(any((run / "checkpoints").glob("step_*.pt")), text)
    if (changed := changed_code(run, script)) and not new_code:
        kept = sorted(f.name for f in (run / "code").glob("*.py") if f.name != "common.py")
        own = f"{run}/code/{Path(script).name if Path(script).name in kept else (kept or ['SCRIPT.py'])[0]}"
        text = f"{' and '.join(changed)}: not the code of this run; for that, python {own} --{mode} {path}"
        raise UserError(text + ", for this, --new-code" * (mode == "resume"))


def changed_code(run, script):
    """The names of this script and common.py where RUN/code has not the same."""
    there = {f.name: f.read_bytes() for f in (run / "code").glob("*.py")}
    return [f.name for f in (Path(script), Path(__file__)) if there.get(f.name) != f.read_bytes()]


def commit():
    """Of this repository, "" where there is none or no git; with "-dirty" where files differ from it, or
    scripts are not in it."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout

    try:
        changes = git("status", "--porcelain", "--untracked-files=normal").splitlines()
        dirty = any(not x.startswith("??") or x.endswith(".py") for x in changes)
        return git("rev-parse", "HEAD").strip() + "-dirty" * dirty
    except OSError:
        return ""


class Tee:
    """A stream that is also written to a file of the run folder."""

    def __init__(self, stream, file):
        self.stream, self.file = stream, file

    def write(self, text):
        self.stream.write(text)
        with contextlib.suppress(OSError):  # a full disk must not stop the printing
            self.file.write(text)
            self.file.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Clock:
    """Seconds by purpose: lap("train") books the time since the last lap on it; waits for the device."""

    def __init__(self, device):
        self.device, self.seconds, self.last = device, {"train": 0.0}, time.perf_counter()

    def lap(self, purpose):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[purpose] = self.seconds.get(purpose, 0.0) + now - self.last
        self.last = now

    @contextlib.contextmanager
    def apart(self, purpose):
        """Books the time inside on this purpose, and what came before on training."""
        self.lap("train")
        yield
        self.lap(purpose)

    def training(self):
        """Seconds of training so far, the time since the last lap included; does not wait for the device."""
        return self.seconds["train"] + time.perf_counter() - self.last


class Run:
    """A run folder, made new or, by --resume, opened again; only rank 0 writes into it.

    `state` is the checkpoint to go on from (None at a start), `step` the last one recorded; SIGTERM, SIGUSR1
    and Ctrl-C set `stopping`. Raises UserError where it is in use or its checkpoints are damaged.
    """

    def __init__(self, cfg, script, method, backbone, rank=0):
        self.cfg, self.rank, self.pending, self.stopping, self.dir = cfg, rank, [], False, None
        self.script = Path(script)
        self.state = newest_checkpoint(cfg.resume, none_yet=True) if cfg.resume else None  # see check_run
        old = self.state or {"step": 0, "skipped": 0, "seconds": 0.0}
        self.step, self.skipped, self.seconds = old["step"], old["skipped"], old["seconds"]
        self.first = self.step
        self.streak, self.printed, self.lr_before, self.last = 0, time.monotonic(), None, {}
        # What `config` in run.yaml and checkpoints holds: everything but how this process was started.
        self.config = {k: v for k, v in asdict(cfg).items() if k not in INVOCATION}
        for k in {"dataset", "data_root", "cache", "vae"} & {*self.config}:  # found again from another folder
            if (path := self.config[k]) not in (*BUILT_IN, "train", "") and os.path.exists(path):
                self.config[k] = os.path.abspath(path)
        was = self.state["config"] if self.state else self.config
        self.longer = any(was.get(k) != self.config.get(k) for k in ("steps", "minutes"))
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(s, self._stop)
        if rank:
            return
        self.dir = find_run(cfg.resume) if cfg.resume else self._make(method, backbone)
        escaped = {"encoding": "utf-8", "errors": "backslashreplace"}
        files = [open(self.dir / name, "a", **escaped) for name in ("run.out", "run.err")]
        need(lock(files[0]), f"{self.dir} is in use by another process; wait for it, or start a new run")
        for k in {*was} & {*self.config} - MAY_CHANGE["resume"]:
            if self.config[k] != was[k]:
                text = f"{k} is {self.config[k]} now but {was[k]} in the checkpoint"
                raise UserError(f"{text}; restore {self.dir / 'run.yaml'} or the dataset, or start a new run")
        self.bar = tqdm(total=100, bar_format="{l_bar}{bar}| {desc}", disable=not sys.stderr.isatty())
        files[0].writelines(EARLY)
        EARLY.clear()
        sys.stdout, sys.stderr = Tee(sys.stdout, files[0]), Tee(sys.stderr, files[1])
        if job := os.environ.get("DIFFUSION_JOB"):  # of slurm/run.sh; run and job name each other
            write_atomically(Path(job), lambda f: f.write(os.fsencode(self.dir.resolve()) + b"\n"))
            say(f"job     {os.environ.get('DIFFUSION_JOB_LOG')}")

    def _stop(self, number, _):
        if self.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice by hand; launchers and schedulers repeat themselves
        self.stopping = True

    def _make(self, method, backbone):
        home = Path(self.cfg.out or os.environ.get("DIFFUSION_LOGS") or "logs") / method
        home.mkdir(parents=True, exist_ok=True)
        name = folder = f"{method}_{backbone}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
        for i in range(2, 1000):  # a second run in the same second gets a folder of its own
            with contextlib.suppress(FileExistsError):
                (home / folder).mkdir()
                break
            folder = f"{name}_{i}"
        for sub in ("code", "checkpoints", "metrics", "samples"):
            (home / folder / sub).mkdir()
        return home / folder

    def _rewind(self):
        """Takes what came after the checkpoint off the metrics, and later checkpoints out of the way. Nothing
        that was written gets lost: what is made again stays in files of another name."""
        for file in (self.dir / "metrics").glob("*.jsonl"):
            lines = [x for x in file.read_text().splitlines(True) if x.endswith("}\n")]  # not a torn last one
            kept = [x for x in lines if json.loads(x)["step"] <= self.step]
            if again := lines[len(kept) :]:
                with open(f"{file}.old", "a") as f:
                    f.writelines(again)
            write_atomically(file, lambda f, kept=kept: f.write("".join(kept).encode()))
            if kept and file.stem == "loss":
                self.lr_before = json.loads(kept[-1])["lr"]
        for file in [*self.dir.glob("checkpoints/step_*.pt"), *self.dir.glob("samples/step_*.*")]:
            if int(file.name[5:13]) > self.step and file.suffix in (".pt", ".png", ".gif"):
                set_aside(file, "old")

    def _keep_code(self):
        """Copies script and common.py to code/, where others may be that --new-code has overruled."""
        if new := changed_code(self.dir, self.script):
            for own in (self.dir / "code").glob("*.py"):
                old = (
                    own.name != "common.py" and "def build_model" in own.read_text()
                )  # perhaps of another name
                if own.name in new or (self.script.name in new and old):
                    set_aside(own, f"until_step_{self.step:08d}")
                    say(f"note    new code from here on; {own.name} stays beside it in {own.parent}")
            for file in (self.script, Path(__file__)):
                if file.name in new:
                    shutil.copy2(file, self.dir / "code")

    def describe(self, device, data, held_out, model, **more):
        """Writes run.yaml (at the start of a run) and prints its summary."""
        if self.rank:
            return
        count, shape = sum(p.numel() for p in model.parameters()), "x".join(map(str, data.images.shape[1:]))
        splits = {"train": data, "test": held_out}
        facts = {
            "command": " ".join(sys.argv),
            "commit": commit(),
            "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)},
            "device": device_facts(device)[0],
            "dataset": {"name": data.name, "shape": shape}
            | {k: {"images": len(v.labels), "fingerprint": v.fingerprint()} for k, v in splits.items()}
            | {"classes": data.classes},
            "parameters": count,
            **more,
            "config": {k: list(v) if isinstance(v, tuple) else v for k, v in self.config.items()},
        }
        if self.cfg.resume:
            was = facts | (yaml.safe_load((self.dir / "run.yaml").read_text()) or {})
            if (before := was.get("processes")) != (now := facts.get("processes")):
                say(f"note    {before} processes before, now {now}: not bit for bit the same run")
            for k in ("train", "test", "classes"):  # it may lie elsewhere and be called otherwise
                before, now = was["dataset"][k], facts["dataset"][k]
                text = f"the dataset is not the run's: {k} {now} now, {before} before"
                need(before == now, f"{text}; give that one by --dataset, or start a new run")
            self._rewind()
            now = facts["config"]  # what was changed on resuming is the run's from then on
            may = now if self.cfg.new_code else MAY_CHANGE["resume"]
            was["config"] = {
                k: now[k] if k in may else v for k, v in (now | was["config"]).items() if k in now
            }
            facts = was
        self._keep_code()
        text = yaml.safe_dump(facts, sort_keys=False, default_flow_style=None)
        write_atomically(self.dir / "run.yaml", lambda f: f.write(text.encode()))
        names = ", ".join(data.classes[:10]) + ", ..." * (len(data.classes) > 10)
        mirrored = ", half mirrored" if self.config.get("flip") == "on" else ""
        counts = f"{len(data.labels):,} images {shape}{mirrored}; {len(held_out.labels):,} held out"
        say(f"data    {data.name}, {counts}")
        say(f"classes {len(data.classes)}: {names}")
        say(f"device  {facts['device']}; " + ", ".join(f"{k} {v}" for k, v in more.items()))
        say(f"folder  {self.dir}" + (f", going on after step {self.step}" if self.step else ""))

    def agree(self, seconds):
        """(has a signal asked to stop?, seconds of training), the same in all processes."""
        if not dist.is_initialized():
            return self.stopping, seconds
        agreed = torch.tensor([self.stopping, seconds], dtype=torch.float64)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        stop, seconds = agreed.tolist()
        return bool(stop), seconds

    def record(self, step, **values):
        """Keeps a step's numbers, which may still be on their way on the device, for the next flush()."""
        self.step = step
        self.pending.append({"step": step, **values})
        if self.lr_before is not None and self.longer:
            text = f"learning rate {values['lr']:.3g}, {self.lr_before:.3g} before"
            say(f"note    other --steps or --minutes than before: {text}")
        self.lr_before = None

    def flush(self, done):
        """Reads what is pending back, the only time that the loop waits for the device, and logs it.

        done: the share of the run that is behind us. Exits with status 1 after ten skipped steps in a row.
        """
        if not self.pending:
            return
        tensors = [v.float() for x in self.pending for v in x.values() if torch.is_tensor(v)]
        numbers = torch.stack(tensors).tolist()
        lines = [{k: numbers.pop(0) if torch.is_tensor(v) else v for k, v in x.items()} for x in self.pending]
        rate = self.cfg.bs * len(lines) / max(lines[-1]["seconds"] - self.seconds, 1e-9)
        self.seconds, self.pending = lines[-1]["seconds"], []
        losses = [x["loss"] for x in lines if math.isfinite(x["loss"] + x["grad_norm"])]
        for x in lines:
            x["images_per_s"] = round(rate, 1)
            bad = not math.isfinite(x["loss"] + x["grad_norm"])
            self.skipped, self.streak = self.skipped + bad, (self.streak + 1) * bad
            if bad:  # JSON knows no NaN
                x |= {"loss": None, "grad_norm": None, "skipped": True}
            if self.streak == 10:
                self._append("loss.jsonl", lines[: lines.index(x) + 1])
                text = f"error: loss or gradient not finite in ten steps in a row, up to step {x['step']}"
                sys.exit(f"{text}; try a smaller --lr, or --dtype float32")  # status 1
        self._append("loss.jsonl", lines)
        left = round(self.seconds * (1 - done) / max(done, 1e-9))
        loss = self.last["loss"] = sum(losses) / len(losses) if losses else math.nan
        text = f"step {self.step}  loss {loss:.4f}  {rate:.0f} images/s  {left // 60}:{left % 60:02} left"
        text += f"  {self.skipped} steps skipped" if self.skipped else ""
        if self.rank == 0:
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(round(100 * done) - self.bar.n)
            if time.monotonic() - self.printed > 10 or done >= 1:
                self.printed = time.monotonic()
                print(text, file=sys.stdout.file if sys.stderr.isatty() else sys.stdout, flush=True)

    def _append(self, name, lines):
        if self.rank == 0:
            with open(self.dir / "metrics" / name, "a") as f:
                f.writelines(json.dumps(x) + "\n" for x in lines)

    def validate(self, step, losses, t):
        """Appends held-out losses [n] at times t [n] to val.jsonl, by tenths of time too; redraws curves.png.

        Each process brings its share of the losses, and 0 for the rest.
        """
        if dist.is_initialized():
            dist.all_reduce(losses)
        losses, tenth = losses.cpu(), (10 * t).ceil()

        def mean(x):  # JSON knows no NaN
            return x.mean().item() if len(x) and x.isfinite().all() else None

        line = {
            "step": step,
            "loss": mean(losses),
            "loss_t": [mean(losses[tenth == i]) for i in range(1, 11)],
        }
        if bad := int((~losses.isfinite()).sum()):
            line["not_finite"] = bad
        self._append("val.jsonl", [line])
        self.last["held-out loss"] = math.nan if bad else line["loss"]
        if self.rank == 0:
            text = f"not finite for {bad} of {len(losses)} images" if bad else f"{line['loss']:.4f}"
            say(f"step {step}  held-out loss {text}")
            with harmless("the curves"):
                draw_curves(self.dir / "metrics")

    def save(self, model, ema, optimizer, seconds):
        """Writes checkpoints/step_X.pt, whole or not at all, and removes all but the newest --keep."""
        if self.rank:
            return
        state = {"model": model.state_dict(), "ema": ema.model.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "step": self.step, "config": self.config}
        state |= {"skipped": self.skipped, "seconds": seconds}
        home = self.dir / "checkpoints"
        self.last["checkpoint"] = home / f"step_{self.step:08d}.pt"
        write_atomically(self.last["checkpoint"], lambda f: torch.save(state, f))
        for old in sorted(home.glob("step_*.pt"))[: -self.cfg.keep]:
            old.unlink()

    def restore(self, model, ema, optimizer, clock):
        """What save() wrote, if the run goes on from a checkpoint."""
        if self.state:
            model.load_state_dict(self.state["model"])
            ema.model.load_state_dict(self.state["ema"])
            optimizer.load_state_dict(self.state["optimizer"])
            clock.seconds["train"] = self.state["seconds"]
            self.state = None  # which memory need not hold on to

    def pictures(self, name, images, history=()):
        """samples/NAME.png and, of a history, NAME.gif, see save_pictures."""
        if self.rank == 0:
            self.last["picture"] = self.dir / "samples" / f"{name}.{'gif' if len(history) else 'png'}"
            save_pictures(self.dir / "samples" / name, images, history)

    def close(self, clock, finished=True):
        """Prints where the time went and what came of it. Ends the processes' group.

        Where a signal and not the end of the run is the reason, exits with status PREEMPTED.
        """
        if dist.is_initialized():  # a launcher ends all when one has left: not before the checkpoint is there
            dist.barrier()
            dist.destroy_process_group()
        if not finished:
            say(f"stopped by a signal after step {self.step}; go on with --resume {self.dir}")
            sys.exit(PREEMPTED)
        if self.rank:
            return
        self.bar.close()
        say("time    " + ", ".join(f"{k} {v:.1f} s" for k, v in clock.seconds.items()))
        say(
            f"done    step {self.step}"
            + "".join(f", {k} {v:.4f}" for k, v in self.last.items() if "loss" in k)
        )
        for label, what in (("saved  ", "checkpoint"), ("look at", "picture")):
            if what in self.last:
                say(f"{label} {self.last[what]}")


@contextlib.contextmanager
def harmless(what):
    """A picture that cannot be made, say on a full disk, is no reason to stop a training run."""
    try:
        yield
    except (OSError, UserError) as e:
        say(f"warning: {what} could not be written ({e.strerror if isinstance(e, OSError) else e})")


def check_finite(x):
    """Raises UserError unless samples x are numbers: clamping would make a picture even of infinities."""
    text = "the samples are not finite; give another sampler, more steps or less guidance, or train again"
    need(x.isfinite().all(), f"{text} with a lower --lr")


def save_pictures(path, images, history=(), columns=10):
    """PATH.png: images [N, C, H, W] in [-1, 1] as a grid. PATH.gif: a list of such, if any, 50 of each."""
    from torchvision.utils import make_grid

    check_finite(images)

    def picture(x):
        grid = make_grid(x.float().cpu().clamp(-1, 1), columns, padding=2, pad_value=1).permute(1, 2, 0)
        frame = Image.fromarray((grid * 127.5 + 127.5).round().to(torch.uint8).numpy())
        zoom = max(1, 64 // x.shape[-1])  # small images are shown larger
        return frame.resize((frame.width * zoom, frame.height * zoom), Image.Resampling.NEAREST)

    picture(images).save(f"{path}.png")
    if not len(history):
        return
    # Noise compresses badly: with fewer colours it takes a third of the bytes.
    colours = 16 if images.shape[1] == 1 else 128
    first, *others = [picture(x[:50]).quantize(colours, dither=Image.Dither.NONE) for x in history]
    durations = [4000 // len(history)] * len(others) + [2000]  # rests on the last
    first.save(f"{path}.gif", save_all=True, append_images=others, duration=durations, loop=0)


def draw_curves(metrics):
    """metrics/curves.png: training and held-out loss by step, and the held-out loss by time bin."""
    from matplotlib.figure import Figure

    train, val = ([json.loads(x) for x in open(metrics / f"{name}.jsonl")] for name in ("loss", "val"))
    train, val = ([x for x in lines if x["loss"] is not None] for lines in (train, val))
    figure = Figure((10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if train:  # at most 200 points, each the mean of its neighbours
        groups = np.array_split(np.array([(x["step"], x["loss"]) for x in train]), min(200, len(train)))
        left.plot(*np.array([g.mean(0) for g in groups]).T, label="training")
    left.plot([x["step"] for x in val], [x["loss"] for x in val], "o-", label="held out, averaged weights")
    left.set(xlabel="step", ylabel="loss", yscale="log")
    left.legend()
    for i, x in enumerate(val):
        right.plot(
            np.linspace(0.05, 0.95, 10),
            np.array(x["loss_t"], float),
            color=str(0.8 * (1 - (i + 1) / len(val))),
        )
    right.set(xlabel="t (0 = data, 1 = noise)", ylabel="held-out loss, later is darker", yscale="log")
    figure.savefig(metrics / "curves.png", dpi=110)
