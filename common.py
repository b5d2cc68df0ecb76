"""Shared by all scripts: flags and errors, datasets, time embedding, EMA, run folders. Nothing else."""

import argparse
import contextlib
import ctypes
import difflib
import errno
import fcntl
import functools
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
import types
import typing
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

# ------------------------------------------------------------------------------------------------
# Errors and flags

EXIT_PREEMPTED = 75  # exit status after SIGTERM or SIGUSR1: a checkpoint is saved, --resume continues


class UserError(Exception):
    """Bad input. The program ends with one line, `error: what is wrong; what to do`, and exit status 2."""


@contextlib.contextmanager
def exit_on_user_error():
    """Turns a UserError, or a path that the system refuses, into one line and exit status 2."""
    if hasattr(sys.stdout, "reconfigure"):  # not under pytest
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be invalid UTF-8; as stderr does
    try:
        yield
        return
    except UserError as e:
        message = str(e)
    except torch._dynamo.exc.TorchDynamoException as e:
        message = f"torch.compile failed ({first_line(e)}); use --compile off"
    except RuntimeError as e:
        if not (isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)):
            raise
        advice = "use --grad-accum, --grad-checkpoint, a smaller --image-size, or fewer --num-samples"
        message = f"{first_line(e)}; {advice}; to sample, a smaller --bs"
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Exception as e:
        path = isinstance(e, OSError) and e.filename
        full = os.strerror(errno.ENOSPC) in str(e)  # libraries raise their own exceptions
        full = full or getattr(e, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
        if not (full or path):  # a programming error
            raise
        advice = "free some space, or set another folder" if full else "use another path"
        text = getattr(e, "strerror", "") or first_line(e)
        message = f"{text}: {path or 'the run folder'}; {advice} (--dataset, --out, --cache)"
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def first_line(e):
    """The first line of an exception's message, or its type."""
    return (str(e).splitlines() or [type(e).__name__])[0][:120]


def require(condition, message):
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_range(cfg, names, low, high=math.inf, exclude_low=False):
    """Raises UserError unless the flags named (separated by spaces) are finite and in [low, high]."""
    for name in names.split():
        value = getattr(cfg, name)
        allowed = f"from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
        allowed = f"above {low:g}" if exclude_low else allowed
        good = low < value if exclude_low else low <= value
        good = good and value <= high and value < math.inf
        allowed += " and finite" * (not math.isfinite(value))
        require(good, f"{_flag(name)} is {value}; it must be {allowed}")


def derived(default):
    """A Config field computed from the dataset. It is saved with the flags, but is not a flag."""
    return field(default=default, metadata={"derived": True})


def resumable(default):
    """A flag that --resume may change. All others keep the value of the run."""
    return field(default=default, metadata={"resumable": True})


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def comments(Config):
    """{field: (heading above it, comment beside it)} from the source of a dataclass."""
    heading, found = "", {}
    for line in inspect.getsource(Config).splitlines():
        if m := re.match(r"    # (.+)", line):
            heading = m[1]
        elif m := re.match(r"    (\w+): [^#]*(?:# *(.+))?$", line):
            found[m[1]] = heading, m[2] or ""
    return found


def parse(Config, doc, argv=None):
    """Command line -> Config. Its fields are the flags; their comments are the help.

    --config FILE and --resume RUN read the flags of a run.yaml, as if they had been typed before the others.
    Raises UserError for unknown flags, wrong values and unreadable files.
    """
    hints, notes = typing.get_type_hints(Config), comments(Config)
    flags = {f.name: f.default for f in fields(Config) if "derived" not in f.metadata}
    style = argparse.RawDescriptionHelpFormatter
    parser, groups = _Parser(description=doc, allow_abbrev=False, formatter_class=style), {}
    for name, default in flags.items():
        heading, note = notes.get(name, ("more", ""))  # inherited fields have none
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        text = f"{note} [{default}]".replace("%", "%%")
        options = _options(f"Config.{name}", hints[name], default)
        groups[heading].add_argument(_flag(name), default=argparse.SUPPRESS, help=text, **options)

    def read(arguments):
        known, unknown = parser.parse_known_args(arguments)
        for word in unknown:
            near = difflib.get_close_matches(word.split("=")[0], map(_flag, flags), 1)
            advice = f"did you mean {near[0]}?" if near else "see --help"
            raise UserError(f"unknown argument {word}; {advice}")
        return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(known).items()}

    typed = read(argv)
    sources = [s for s in ("config", "resume") if s in typed]
    require(len(sources) < 2, "--config and --resume exclude each other; use one of them")
    require(all(typed[s] for s in sources), f"--{''.join(sources)} is empty; it must be a path")
    if not sources:
        return Config(**typed)
    file = Path(typed["config"]) if "config" in typed else find_run(typed["resume"]) / "run.yaml"
    if "resume" in typed:
        check_code(typed["resume"], inspect.getfile(Config))
    try:
        stored = dict(yaml.safe_load(file.read_text())["config"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as e:
        text = f"{file} is not a readable run.yaml ({first_line(e)}); use one that a run wrote"
        raise UserError(text) from None
    for k, v in stored.items():
        require(v is not None and k not in ("config", "resume"), f"{file}: {k} is {v}; leave it out")
        if isinstance(v, bool) and hints.get(k) is not bool:  # YAML reads `flip: off` as false
            stored[k] = "on" if v else "off"
    derived = {k: stored.pop(k) for k in [*stored] if k in hints and k not in flags}
    derived = {k: tuple(v) if isinstance(v, list) else v for k, v in derived.items()}
    try:
        return Config(**derived | read(sum(map(as_arguments, stored, stored.values()), [])) | typed)
    except UserError as e:
        raise UserError(f"{file}: {e}") from None


def as_arguments(name, value):
    """A flag and its value as one would type them: a list of words."""
    if isinstance(value, bool):
        return [_flag(name if value else f"no_{name}")]
    return [_flag(name), *map(str, value)] if isinstance(value, list | tuple) else [f"{_flag(name)}={value}"]


def _flag(name):
    return "--" + str(name).replace("_", "-")


def _options(name, hint, default):
    """A field's type -> keyword arguments of add_argument()."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    types = (int, float) if hint is float else (origin or hint,)
    if not (default in choices if origin is typing.Literal else type(default) in types):
        raise TypeError(f"{name} is {hint}, but its default is {default!r}")
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is typing.Literal:  # --compile alone means --compile on
        more = {"nargs": "?", "const": "on"} if "on" in choices else {}
        return {"choices": choices, "type": type(default)} | more
    if origin is tuple and choices[0] in (int, float, str):
        # --prompt A --prompt B is --prompt A B; of numbers, the last list counts
        many = {"nargs": "*" if choices[-1] is ... else len(choices), "type": choices[0], "metavar": "N"}
        return many | {"action": "extend", "metavar": "TEXT"} if choices[0] is str else many
    if hint in (int, float, str):
        return {"type": hint, "metavar": hint.__name__.upper()}
    allowed = "a bool, int, float, str, Literal, or a tuple of numbers or str"
    raise TypeError(f"{name} is {hint}; a flag is {allowed}")


# ------------------------------------------------------------------------------------------------
# Seeds and devices


def derive_seed(*key):
    """Any key -> an integer in [0, 2^63), the same in every process (unlike hash() of a string)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def seed_all(*key):
    """Seeds the global generators of PyTorch, NumPy and Python."""
    seed = derive_seed(*key)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def get_device(name):
    """The device of this name; under torchrun, each process gets its own GPU. Raises UserError."""
    torch.set_float32_matmul_precision("high")  # TF32 where networks run in float32
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(n for n in available if available[n]) if name == "auto" else name
    require(available[name], f"--device {name}: PyTorch finds no such device; use --device cpu")
    if name == "cpu":
        keep_freed_memory()
    if name != "cuda":
        return torch.device(name)
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    text = f"{count} GPUs cannot serve {rank + 1} or more processes; use torchrun --nproc-per-node={count}"
    require(rank < count, f"{text}, or --device cpu")
    torch.cuda.set_device(rank)  # otherwise NCCL's barriers would use memory of the first GPU
    return torch.device(name, rank)


def keep_freed_memory():
    """Tells glibc not to return freed memory to the kernel, which would zero it again in every step
    (8% of a step of a DiT of dim 384 and depth 3 on two cores)."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap as well
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def device_name(device):
    """Name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
    return f"{model[1] if model else device.type}, {torch.get_num_threads()} threads"


def supports_bf16(device):
    """Whether bfloat16 matrix products run in hardware. Elsewhere, casting to it only costs time."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", _cpuinfo()))


def _cpuinfo():
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def prepare(model, cfg, worthwhile=True, dynamic=False):
    """The one way to run a network, in place: in the precision of --dtype, and compiled if --compile says so.

    Autocast ends where forward() ends: weights, x, and what samplers and losses compute stay float32.
    Compiled are the modules of lists named blocks, or the model if there are none: one block's graph serves
    all, which takes a fifth of the time. With --compile auto only if `worthwhile`: compiling takes up to a
    minute, which a short run never recovers. A graph is for one batch size, or for all if `dynamic`. Returns
    (dtype, whether it is compiled).
    """
    device = next(model.parameters()).device
    auto = "bfloat16" if supports_bf16(device) else "float32"
    dtype = getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    model.forward = types.MethodType(autocast(type(model).forward), model)  # deepcopy() binds it to the copy
    if cfg.compile == "off" or (cfg.compile == "auto" and (device.type == "mps" or not worthwhile)):
        return dtype, False
    if not dynamic:  # said once for training and evaluation
        print0("compile takes up to a minute (--compile off does without)")
    for module in [m for n, m in model.named_modules() if re.search(r"blocks\.\d+$", n)] or [model]:
        module.compile(dynamic=dynamic)
    return dtype, True


def to_device(x, device):
    """x on device. Copies to a GPU go through pinned memory, so they do not wait for its queue."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------
# Datasets

BUILT_IN = ("mnist", "cifar10", "digits")
MAX_BYTES = 2 << 30  # larger datasets are not held in memory; their files are decoded when they are used
TRAIN = ("train", "training")  # folder names of the splits
CAPTIONS = "metadata.jsonl"
HELD_OUT = ("test", "testing", "val", "valid", "validation")  # the first that exists is used
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
# Threads that read and decode images. They run each operation on one core: if OpenMP has more threads than
# cores, they sleep between operations, and training takes up to twice as long.
torch.get_num_threads()  # fixes the main thread's number, which set_num_threads() would otherwise change
NUM_READERS = max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
THREADS = ThreadPoolExecutor(NUM_READERS, "reader", torch.set_num_threads, (1,))

DIGITS = {  # attributes of drawn digits and their names in captions
    "digit": "zero one two three four five six seven eight nine".split(),
    "weight": ["thin", "medium", "bold"],
    "lean": ["left", "upright", "right"],
    "pen": "white red orange yellow lime cyan pink violet".split(),  # bright colours of CSS
    "paper": "black navy maroon teal gray".split(),  # dark ones
}


@dataclass
class Dataset:
    """One split. `files` are the images' names below the dataset's folder (empty for built-in datasets)."""

    name: str
    images: "torch.Tensor | ImageFiles"  # uint8 [N, C, H, W]
    labels: torch.Tensor  # int64 [N], indices into classes
    classes: list[str]  # of the training split
    files: list[str] = field(default_factory=list)
    checksums: bytes = b""  # of the files, or of the images before they were resized
    captions: list[list[str]] = field(default_factory=list)  # of each image, or none at all

    def fingerprint(self):
        """16 hex digits that identify images and labels, independent of where they are stored."""
        content = self.checksums or self.images.numpy().tobytes()
        return hashlib.blake2b(content + self.labels.numpy().tobytes(), digest_size=8).hexdigest()


def load_dataset(name, data_root="", split="train", image_size=0, channels=0, max_bytes=None, captions=False):
    """The "train" or "test" split of mnist, cifar10, digits, or of a folder or .zip of images.

    data_root: folder of mnist and cifar10 (default $DIFFUSION_DATA, else data/). image_size: side in pixels,
    channels: 1 or 3; 0 takes those of the training split. Raises UserError if the dataset cannot be found,
    downloaded or read, or if it is ambiguous. Images of more than max_bytes (MAX_BYTES) stay on the disk.
    captions: also read these, see read_captions.
    """
    max_bytes = MAX_BYTES if max_bytes is None else max_bytes
    require(channels in (0, 1, 3), f"--channels is {channels}; it must be 1 (gray), 3 (colour) or 0 (any)")
    require(0 <= image_size <= 4096, f"--image-size is {image_size}; it must be a side in pixels, or 0")
    if name not in BUILT_IN:
        text = f"there is no dataset {name or repr(name)}; use mnist, cifar10, digits, or a folder or .zip"
        require(name and Path(name).exists(), f"{text} of images")
        return _files(Path(os.path.abspath(name)), split, image_size, channels, max_bytes, captions)
    text = f"{name} is a built-in dataset, and also a folder here; use ./{name} for the folder, or rename it"
    require(not Path(name).exists(), text)
    if name == "digits":
        return _digits(split, image_size or (32 if channels == 3 else 28), channels or 1)
    data = _torchvision(name, Path(data_root or os.environ.get("DIFFUSION_DATA") or "data"), split)
    size, channels = image_size or data.images.shape[-1], channels or data.images.shape[1]
    if data.images.shape[1:] == (channels, size, size):
        return data
    files = ImageFiles(data.images, size, channels)
    images = files if math.prod(files.shape) > max_bytes else images_at(files, range(len(files)))
    return replace(data, images=images, checksums=data.fingerprint().encode())


def _torchvision(name, root, split):
    from torchvision import datasets  # takes seconds to import

    kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        try:
            data = kind(root, train=split == "train")
        except RuntimeError:  # torchvision's "not found or corrupted"
            root.mkdir(parents=True, exist_ok=True)
            with open(root / f".{name}.lock", "w") as file:  # only one of several processes downloads
                lock(file, wait=True)
                data = kind(root, train=split == "train", download=True)
    except (OSError, RuntimeError, ValueError, EOFError) as e:
        text = f"{name} is not in {root.resolve()} and cannot be downloaded ({first_line(e)})"
        raise UserError(f"{text}; set its folder with --data-root, or train on --dataset digits") from None
    images = torch.as_tensor(data.data)  # MNIST [N, 28, 28], CIFAR-10 [N, 32, 32, 3]
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    classes = [c.split(" - ")[0] for c in data.classes]  # MNIST has "0 - zero"
    return Dataset(name, images, torch.as_tensor(data.targets), classes)


def _digits(split, size, channels):
    """MNIST-like digits drawn with Pillow's own font, with captions: no download, the same at every call.

    In colour, a fifth of the combinations of digit, pen and paper never occurs in the training split, and
    makes up half of the held-out one: those whose indices in DIGITS have a sum divisible by 5.
    """
    n = {"train": 20_000, "test": 2_000}[split]
    rng, font, glyphs = np.random.default_rng(derive_seed("digits", split)), ImageFont.load_default(64), {}
    digit, unseen = np.arange(n) % 10, np.arange(n) // 10 % 2 * (split == "test")
    weight, lean, pen = (rng.integers(0, len(DIGITS[k]), n) for k in ("weight", "lean", "pen"))
    paper = (np.where(unseen, 0, rng.integers(1, 5, n)) - digit - pen) % 5
    for d, w in np.ndindex(10, 3):
        glyph = glyphs[d, w] = Image.new("L", (96, 96))
        ImageDraw.Draw(glyph).text((48, 48), str(d), 255, font, anchor="mm", stroke_width=2 * w)
    low, high = [-0.08, -0.1, 0.85, 0.9, -0.09, -0.09], [0.08, 0.1, 1.25, 1.2, 0.09, 0.09]
    angle, shear, zoom, aspect, dx, dy = rng.uniform(low, high, (n, 6)).T
    shear, images, captions = shear + 0.4 * (lean - 1), np.empty((n, size, size, channels), np.uint8), []
    for i, indices in enumerate(zip(digit, weight, lean, pen, paper, strict=True)):
        # Pixel (u, v) shows the glyph at 48 + M ((u, v) - centre), at twice the size, then averaged.
        rotation = np.array([[np.cos(angle[i]), -np.sin(angle[i])], [np.sin(angle[i]), np.cos(angle[i])]])
        m = 31 / size * zoom[i] * rotation @ np.array([[1, shear[i]], [0, aspect[i]]])
        shift = 48 - m @ [size * (1 + 2 * dx[i]), size * (1 + 2 * dy[i])]
        affine = (*m[0], shift[0], *m[1], shift[1])
        large = glyphs[indices[:2]].transform((2 * size,) * 2, Image.AFFINE, affine, Image.BILINEAR)
        ink = np.asarray(large).reshape(size, 2, size, 2).mean((1, 3))[..., None] / 255
        ink = ink * rng.normal(1, 0.06, (size, size, 1))
        words = [names[k] for names, k in zip(DIGITS.values(), indices, strict=True)]
        front, back = (ImageColor.getrgb(w) + rng.uniform(-10, 10, 3) for w in words[3:])
        front, back = (255, 0) if channels == 1 else (front, back)
        images[i] = np.clip(back + (front - back) * ink, 0, 255)
        captions.append([describe(words if channels == 3 else [*words[:3], "", ""], rng)])
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Dataset("digits", images, torch.arange(n) % 10, [*map(str, range(10))], captions=captions)


def describe(words, rng, keep=0.85):
    """Names of digit, weight, lean, pen and paper (or "") -> a caption. The digit is a figure half of the
    time, and each of the others is left out with probability 1 - keep."""
    weight, lean, pen, paper = (w if rng.random() < keep else "" for w in words[1:])
    digit = words[0] if rng.random() < 0.5 else str(DIGITS["digit"].index(words[0]))
    lean = f"leaning {lean}" if lean in ("left", "right") else lean
    ink, ground = pen and f"in {pen}", paper and f"on {paper} paper"
    patterns = [("a", weight, pen, digit, lean, ground), (digit, ink, ground, weight, lean)]
    patterns += [(ground, weight, digit, ink, lean)]
    return " ".join(part for part in patterns[rng.integers(3)] if part)


def _files(root, split, size, channels, max_bytes, captions=False):
    """A folder or .zip of images; see find_images, decode_image and read_captions."""
    splits, ignored = find_images(root)
    if captions:  # read_captions reports those without an image
        del ignored[".txt"], ignored["captions"]
    if ignored and split == "train":
        print0(f"note    ignored in {root}: {', '.join(f'{n} {kind}' for kind, n in ignored.most_common(6))}")
    classes = sorted({c for c, _ in splits["train"]}, key=natural)
    extra = sorted({c for c, _ in splits["test"]} - {*classes}, key=natural)
    text = f"held-out images of {', '.join(c or 'no folder' for c in extra[:5])}, which training lacks"
    require(not extra, f"{root} has {text} (it has {', '.join(classes[:10])}); add or remove some")
    if split == "test" and not (size and channels):
        _, channels, _, size = _files(root, "train", size, channels, max_bytes).images.shape
    files = [f for _, f in splits[split]]
    if not size:
        size = images_at(ImageFiles(files, 0, 1), [0]).shape[-1]
        require(size <= 512, f"{root} has images of {size} pixels; set --image-size, such as 64")
    images = ImageFiles(files, size, channels or 3)
    if math.prod(images.shape) > max_bytes:  # too large to read only to identify it: file sizes do
        checksums = np.array([images.file_size(i) for i in range(len(files))])
    else:
        images, checksums = stack(images.decode(range(len(files))))
        if channels == 0 and all((x == x[:, :1]).all() for x in images.split(1000)):
            images = images[:, :1].contiguous()  # all are gray
    index = {c: i for i, c in enumerate(classes)}
    labels = torch.tensor([index[c] for c, _ in splits[split]])
    name = printable(root.name.removesuffix(".zip")) or "images"
    names, classes = [printable(f) for _, f in files], [c or name for c in classes]
    found = read_captions(splits, split) if captions else []
    return Dataset(name, images, labels, classes, names, checksums.tobytes(), found)


def find_images(root):
    """A folder or .zip -> ({"train": [(class, (root, name)), ...], "test": ...}, Counter of ignored files).

    Folders that all images share do not count. Below them, train beside test or val are the splits, as are
    X-train.zip and X-test.zip. Otherwise a twentieth of each class is held out, but fewer than 40 images
    serve as both. A class is the first folder below the split. Raises UserError where that is ambiguous.
    """
    kinds = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    kinds -= {*".bufr .eps .emf .grib .h5 .hdf .mpeg .mpg .ps .wmf".split()}  # Pillow needs other programs
    twin = root.with_name(re.sub(r"train\.zip$", "test.zip", root.name))
    places = {root: ("train",), twin: ("test",)} if twin != root and twin.exists() else {root: ()}
    images, paths, ignored = [], [], Counter()  # (root, name) of images, and their folders and names
    for place in places:
        for name in list_files(place):
            parts = path_parts(name)
            text = f"{place} has labels in dataset.json, which is not supported; make one folder per class"
            require(parts[-1] != "dataset.json", text)
            if (suffix := os.path.splitext(parts[-1])[1].lower()) in kinds:
                images.append((place, name))
                paths.append(parts)
            else:
                ignored["captions" if parts[-1] == CAPTIONS else suffix or "without a suffix"] += 1
        others = "".join(f", {n} {kind}" for kind, n in ignored.most_common(6))
        text = f"there is no image in {place} that can be read{others}; use a folder or .zip with images"
        require(images and images[-1][0] == place, text)
    shared = len(os.path.commonprefix([p[:-1] for p in paths]))
    paths = [places[place] + p[shared:] for (place, _), p in zip(images, paths, strict=True)]
    split_of = find_splits(root, paths)

    splits, by_class = {"train": [], "test": []}, {}
    for image, p in zip(images, paths, strict=True):
        split, below = (split_of.get(p[0]), p[1:]) if split_of else ("train", p)
        if split and below:
            splits[split].append((below[0] if below[1:] else "", image))
            by_class.setdefault(below[0] if below[1:] else "", []).append(image)
        else:
            ignored[f"images in {p[0]}" if below else "images beside the splits"] += 1
    for items in splits.values():
        classes = sorted({c for c, _ in items}, key=natural)
        text = f"{root} has images beside folders of images ({', '.join(classes[1:6])}), which are classes"
        require("" not in classes[:1] or len(classes) == 1, f"{text}; move them into folders, or out")
    if not split_of and len(images) < 40:
        splits["test"] = splits["train"]
    elif not split_of:
        held = {x for same in by_class.values() if same[1:] for x in same[min(10, len(same) // 2) :: 20]}
        require(held, f"{root} has one image per class, so none can be held out; make folders train and test")
        splits = {s: [x for x in splits["train"] if (x[1] in held) == (s == "test")] for s in splits}
    return splits, ignored


def find_splits(root, paths):
    """Folders and name of each image -> {top folder: "train" or "test"}, or {} if none has such a name."""
    found = {p[: i + 1] for p in paths for i, f in enumerate(p[:-1]) if f.lower() in TRAIN + HELD_OUT}
    words = [p[-1].lower() for p in found]
    held = min((w for w in words if w in HELD_OUT), key=HELD_OUT.index, default="")  # test rather than val
    unique = all(len(p) == 1 for p in found) and len({*words}) == len(words)
    there = ", ".join(sorted(map("/".join, found), key=natural)[:4])
    text = f"{root} has {there} among its folders, so it is unclear what is held out"
    clear = not found or (unique and held and sum(w in TRAIN for w in words) == 1)
    require(clear, f"{text}; keep one train and one test folder at the top, and rename others")
    names = {w: "train" if w in TRAIN else "test" for w in (*TRAIN, held)}
    return {p[0]: names[p[0].lower()] for p in found if p[0].lower() in names}


def list_files(root):
    """Names of all files in a folder or .zip in natural order, without hidden ones. Links are followed."""
    hidden = re.compile(r"(^|[/\\])(\.(?!\.?[/\\])|__MACOSX|@eaDir|lost\+found)")

    def fail(e):  # os.walk would leave out a folder that it may not read
        raise e

    if root.is_dir():
        names = []
        for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
            names += [os.path.relpath(os.path.join(folder, f), root) for f in files]
            above = [os.path.realpath(p) for p in (folder, *Path(folder).parents)]
            for f in [*subfolders]:  # a link to a folder above would never end; a run is not a dataset
                place = os.path.realpath(f"{folder}/{f}")
                endless = any(f"{p}/".startswith(f"{place}/") for p in above)
                if endless or hidden.search(f) or os.path.exists(f"{folder}/{f}/run.yaml"):
                    subfolders.remove(f)
    else:  # its files are read one by one and never extracted: no name can lead outside
        try:
            names = [n for n in open_zip(root).namelist() if n[-1:] not in ("", "/", "\\")]
        except Exception as e:  # damaged files raise nearly anything
            raise UserError(f"{root} is not a folder or .zip of images ({first_line(e)}); use one") from None
        twice = [n for n, count in Counter(names).items() if count > 1]
        require(not twice, f"{root} has {len(twice)} names twice ({', '.join(twice[:3])}); make it again")
    return sorted((n for n in names if not hidden.search(n)), key=natural)


def read_captions(splits, split):
    """Captions of the images of a split of find_images -> [[text, ...], ...], or [] if there are none at all.

    In any folder, metadata.jsonl may hold {"file_name": NAME, "text": TEXT or [TEXT, ...]} per line, and
    NAME.txt beside an image is its caption. Prints what is missing. Raises UserError.
    """
    images = {(root, *path_parts(name)) for items in splits.values() for _, (root, name) in items}
    captions, beside, empty, lost = {image: [] for image in images}, {}, [], []
    for image in images:
        beside.setdefault((*image[:-1], os.path.splitext(image[-1])[0]), []).append(image)
    for root in sorted({image[0] for image in images}):
        for name in list_files(root):
            *folder, last = parts = path_parts(name)
            stem, suffix = os.path.splitext(last)
            if suffix.lower() != ".txt" and last != CAPTIONS:
                continue
            try:
                data = read_bytes(root, name)
                if last == CAPTIONS:
                    found = [json.loads(line) for line in data.splitlines() if line.strip()]
                    found = [((root, *folder, *path_parts(x["file_name"])), x["text"]) for x in found]
                else:
                    same = beside.get((root, *folder, stem), [(root, *parts)])
                    found = [(image, data.decode("utf-8-sig")) for image in same]
                found = [(image, text if isinstance(text, list) else [text]) for image, text in found]
                found = [(image, [" ".join(t.split()).encode().decode() for t in ts]) for image, ts in found]
            except Exception as e:  # damaged files raise nearly anything
                text = f"{root}: cannot read captions from {printable(name)} ({first_line(e)}); write UTF-8,"
                raise UserError(f'{text} as in {{"file_name": "1.jpg", "text": "a cat"}}') from None
            for image, texts in found:
                empty += ["/".join(image[1:])] * texts.count("")
                lost += ["/".join(image[1:])] * (image not in captions)
                captions.setdefault(image, []).extend(text for text in texts if text)
    if not any(captions[image] for image in images):
        wrong = [name for name in lost if not name.lower().endswith(".txt")]
        text = f"none of the {len(wrong)} captions in {CAPTIONS} has an image ({wrong[0] if wrong else ''})"
        require(not wrong, f"{text}; write file names relative to its folder")
        return []
    names = [(root, *path_parts(name)) for _, (root, name) in splits[split]]
    kinds = {"images have no caption": ["/".join(image[1:]) for image in names if not captions[image]]}
    if split == "train":
        kinds |= {"captions are empty": empty, "captions have no image": lost}
    if kinds := [f"{len(v)} {kind} ({v[0]})" for kind, v in kinds.items() if v]:
        print0(f"note    {split}: {', '.join(kinds)}")
    return [captions[image] for image in names]


def path_parts(name):
    """Folders and name of a file in a folder or .zip, as they can be printed."""
    return tuple(printable(p) for p in re.split(r"[/\\]", name) if p not in ("", ".", ".."))


def read_bytes(root, name):
    """A file in a folder or .zip."""
    return (root / name).read_bytes() if root.is_dir() else open_zip(root).read(name)


def natural(text):
    """Sort key for which 2 comes before 10."""
    return re.sub(r"[0-9]+", lambda digits: digits[0].zfill(20), text), text


def printable(text):
    """A file name, with bytes that are not UTF-8 escaped as in caf\\xe9."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


open_zip = functools.lru_cache(4)(zipfile.ZipFile)  # several threads may read one


class ImageFiles:
    """Images decoded when indexed: images[i] -> (uint8 [C, S, S], CRC-32 of the file), or a UserError, so
    that all unreadable files can be named.

    source: [(folder or .zip, name), ...], or a uint8 tensor [N, C, H, W].
    """

    def __init__(self, source, size, channels):
        self.source, self.shape = source, (len(source), channels, size, size)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        _, channels, size, _ = self.shape
        if torch.is_tensor(self.source):
            image = Image.fromarray(self.source[i].permute(1, 2, 0).squeeze(2).numpy())
            return fit_image(image, size, channels), 0
        root, name = self.source[i]
        try:
            require(self.file_size(i) < 1 << 28, "larger than 256 MiB")
            data = read_bytes(root, name)
            return decode_image(data, size, channels), zlib.crc32(data)
        except Exception as e:  # damaged files raise nearly anything
            text = "not an image" if isinstance(e, UnidentifiedImageError) else first_line(e)
            return UserError(f"{printable(name)} ({text})")

    def decode(self, indices):
        """The items of indices. Threads help above 10 kB per file; below, they wait for Python's lock."""
        large = self.file_size(0) > 10_000
        return (THREADS.map if large else map)(self.__getitem__, indices)

    def file_size(self, i):
        """Bytes of a file, or of the image to make from a tensor."""
        if torch.is_tensor(self.source):
            return math.prod(self.shape[1:])
        root, name = self.source[i]
        return os.path.getsize(root / name) if root.is_dir() else open_zip(root).getinfo(name).file_size


def decode_image(data, size, channels=3):
    """An image file's bytes -> uint8 [channels, size, size]; see fit_image. size 0: the shorter side.

    Palette, 16-bit, RGBA (over white) and CMYK images look as in an image viewer. Animations give their
    first frame. Pillow refuses more than 179 million pixels.
    """
    image = Image.open(io.BytesIO(data))
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # 16-bit PNGs open as "I"
        raise ValueError("its pixels have 32 bits, of unknown range")
    size = size or min(image.size)
    image.draft(None, (size, size))  # JPEG: decode at a lower resolution if that is enough
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return fit_image(image.convert("RGB"), size, channels)


def fit_image(image, size, channels):
    """Crops the centre square and resizes it (bicubic) -> uint8 [channels, size, size]."""
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def stack(decoded):
    """Items of ImageFiles -> (uint8 [N, C, H, W], checksums). The UserError names unreadable files."""
    items = list(decoded)
    errors = [x for x in items if isinstance(x, UserError)]
    text = f"{len(errors)} of {len(items)} images cannot be read: {', '.join(map(str, errors[:5]))}"
    require(not errors, f"{text}{', ...' * (len(errors) > 5)}; repair or remove them")
    return torch.from_numpy(np.stack([x for x, _ in items])), np.array([crc for _, crc in items])


def images_at(images, indices):
    """uint8 [n, C, H, W], from memory or decoded."""
    return images[indices] if torch.is_tensor(images) else stack(images.decode(indices))[0]


def class_indices(names, classes):
    """Names of classes, or their numbers unless these are names -> int64 [N]; no names: each class once."""
    index = {} if any(c.isdecimal() for c in classes) else {str(i): i for i in range(len(classes))}
    index |= {c: i for i, c in enumerate(classes)}
    unknown = [n for n in names if n not in index]
    require(not unknown, f"there is no class {' '.join(unknown)}; there are {', '.join(classes[:20])}")
    return torch.tensor([index[n] for n in names or classes])


def evaluation_set(data, n=2048):
    """At most n random images of a split, decoded; the same at every call."""
    generator = torch.Generator().manual_seed(derive_seed("evaluate"))
    pick = torch.randperm(len(data.labels), generator=generator)[:n]
    images = images_at(data.images, pick.tolist())
    captions = [data.captions[i] for i in pick.tolist()] if data.captions else []
    return replace(data, images=images, labels=data.labels[pick], captions=captions, checksums=b"")


@functools.lru_cache(2)
def shuffled(n, seed, epoch, device):
    """A permutation of 0 ... n - 1 for an epoch, int64 [n]."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "data", epoch))
    return to_device(torch.randperm(n, generator=generator), device)


class Batches:
    """`x, y = batches(step)`: images and labels of one step. Each rank gets its slice of the global batch.

    The training set is shuffled anew in every epoch; a batch depends on (seed, step) only. x is float32
    [bs / world, C, H, W] in [-1, 1], y is int64 [bs / world]; flip mirrors half of the images.
    """

    def __init__(self, data, bs, seed, device, rank=0, world=1, flip=False):
        self.device, self.on_disk = torch.device(device), not torch.is_tensor(data.images)
        home = torch.device("cpu") if self.on_disk else self.device  # a GPU holds what it indexes
        self.images = data.images if self.on_disk else data.images.to(home)
        if not self.on_disk:
            kind = self.images.dtype
            require(kind == torch.uint8, f"images are {kind}; convert them to uint8, 0 to 255")
        self.labels, self.bs, self.seed, self.flip = data.labels.to(home), bs, seed, flip
        self.rank_slice, self.queue = slice(rank * bs // world, (rank + 1) * bs // world), {}

    def indices(self, step):
        """Indices of the images of a step, int64 [bs]."""
        n, start, end = len(self.labels), step * self.bs, (step + 1) * self.bs
        epochs = range(start // n, (end - 1) // n + 1)  # a batch may span several
        orders = [(e * n, shuffled(n, self.seed, e, self.labels.device)) for e in epochs]
        return torch.cat([order[max(0, start - first) : end - first] for first, order in orders])

    def hflip(self, step):
        """Which images of a step are mirrored, bool [bs]."""
        generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, "flip", step))
        return torch.rand(self.bs, generator=generator, device=self.device) < 0.5

    def decode(self, step):
        """This rank's images of a step. Those of the next steps are decoded in the meantime."""
        for s in range(step, step + 4):
            if s not in self.queue:
                indices = self.indices(s)[self.rank_slice].tolist()
                self.queue[s] = [THREADS.submit(self.images.__getitem__, i) for i in indices]
        return to_device(stack(x.result() for x in self.queue.pop(step))[0], self.device)

    def __call__(self, step):
        indices = self.indices(step)[self.rank_slice]
        x = (self.decode(step) if self.on_disk else self.images[indices]).float() / 127.5 - 1
        if self.flip:
            x = torch.where(self.hflip(step)[self.rank_slice].view(-1, 1, 1, 1), x.flip(-1), x)
        return x, to_device(self.labels[indices], self.device)


# ------------------------------------------------------------------------------------------------
# Time embedding and EMA


def time_embedding(t, dim, max_period=10_000.0):
    """Sinusoids of t in [0, 1]: [B] -> float32 [B, dim] (Vaswani et al. 2017, sec. 3.5).

    The frequencies assume timesteps 0 ... 1000, so t is scaled up; otherwise most would hardly move.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angle = 1000 * t.float()[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class EMA:
    """Exponential moving average of a model's weights. `ema.model` is a copy to evaluate, sample and save.

    The decay after n updates is (1 + n) / (20 + n), at most `decay`: the average covers the last twentieth of
    the run so far (Karras et al. 2024, sec. 3.1), which suits short runs and long ones.
    """

    def __init__(self, model, decay):
        self.model, self.decay = deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model, n):
        """Call after optimizer step n = 1, 2, ..."""
        weight = 1 - min(self.decay, (1 + n) / (20 + n))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)
        for average, new in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(new)


# ------------------------------------------------------------------------------------------------
# Run folders

EARLY = []  # lines printed before there was a run.out


def print0(text):
    """Prints a line on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
        if not isinstance(sys.stdout, Tee):
            EARLY.append(f"{text}\n")


def find_run(path):
    """RUN or RUN/checkpoints/step_X.pt -> RUN. Raises UserError."""
    run = Path(path).parent.parent if str(path).endswith(".pt") else Path(path)
    text = f"{path} is not a run (no {run / 'run.yaml'}); use a folder logs/METHOD/NAME"
    require((run / "run.yaml").exists(), text)
    there = ", ".join(f.name for f in checkpoints(run)) or "none"
    require(Path(path).exists(), f"the run has no checkpoint {Path(path).name}; there are {there}")
    return run


def checkpoints(run):
    """step_00001000.pt, ... of a run, oldest first. Other files there are the user's."""
    return sorted((run / "checkpoints").glob(f"step_{'[0-9]' * 8}.pt"))


def lock(file, wait=False):
    """Locks an open file until it is closed. False if another process has it. A file system without locks
    gives it to everyone."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def write_atomically(path, write):
    """write(file) to a temporary file, then rename it: path is complete, or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except RuntimeError as e:  # torch.save hides a full disk behind its own error
        raise (e.__context__ if isinstance(e.__context__, OSError) else e) from None
    except OSError as e:  # NumPy tells only how much it could not write
        raise (e if e.errno else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path):
    """A checkpoint's dict on the CPU. Verifies every byte and runs no code in it. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as z:  # PyTorch's reader ignores the checksums
            if damaged := z.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"model", "ema", "optimizer", "step", "config"} <= state.keys():
            raise ValueError("these scripts did not write it")
        return state
    except Exception as e:  # a damaged or hostile file raises nearly anything
        raise UserError(f"cannot load {path} ({first_line(e)}); use another checkpoint") from None


def newest_checkpoint(path):
    """The state in a file, or in the newest undamaged checkpoint of a run. Raises UserError."""
    run = find_run(path)
    if str(path).endswith(".pt"):
        return load_checkpoint(path)
    files = checkpoints(run)[::-1]
    require(files, f"{run} has no checkpoint; run it again with --config {run}/run.yaml")
    for file, older in zip(files, [*files[1:], None], strict=True):
        try:
            return load_checkpoint(file)
        except UserError as e:
            if not older:
                raise
            print0(f"warning: {str(e).split(';')[0]}; using {older}")


def local_files(script):
    """{name: content} of a script, common.py, and the modules and packages beside them that these import."""
    found, todo = {}, [(Path(f).parent, Path(f)) for f in (__file__, script)]
    while todo:
        home, file = todo.pop()
        name = str(file.relative_to(home))
        if name not in found:
            found[name] = file.read_bytes()
            lines = re.findall(r"^ *(?:from|import) .*", found[name].decode(errors="replace"), re.M)
            for word in re.findall(r"\w+", " ".join(lines)):
                todo += [(home, f) for f in (home / f"{word}.py", *(home / word).rglob("*.py")) if f.exists()]
    return found


def check_code(path, script):
    """Raises UserError if local_files() differ from the copies in the run's code folder."""
    code, name = find_run(path) / "code", Path(script).name
    kept = {str(f.relative_to(code)): f.read_bytes() for f in sorted(code.rglob("*.py"))}
    changed = [n for n, content in local_files(script).items() if kept.get(n) != content]
    own = name if name in kept else next((n for n in kept if n != "common.py"), "SCRIPT.py")
    text = f"{' and '.join(changed)} differs from the run's code; use python {code / own} --resume {path}"
    require(not changed, f"{text}, or copy your new code to {code} first")


def commit():
    """The git commit, with "-dirty" if files differ from it or scripts are not in it; "" without git."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    with contextlib.suppress(OSError):  # no git
        changes = git("status", "--porcelain", "--untracked-files=normal").splitlines()
        return git("rev-parse", "HEAD") + "-dirty" * any(x[:2] != "??" or x.endswith(".py") for x in changes)
    return ""


def step_of(line):
    """The step in a line of a log; infinity if the line is incomplete."""
    with contextlib.suppress(ValueError):
        values = json.loads(line)
        return values.get("step", 0) if isinstance(values, dict) else 0
    return math.inf


class Tee:
    """A stream whose text is also written to a file."""

    def __init__(self, stream, file):
        self.stream, self.file = stream, file

    def write(self, text):
        self.stream.write(text)
        with contextlib.suppress(OSError):  # a full disk must not stop the printing
            self.file.write(text)
            self.file.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Timer:
    """Seconds by section. Everything outside of `with timer.section("evaluate")` is training."""

    def __init__(self, device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.seconds, self.last = {"train": 0.0}, time.perf_counter()

    def lap(self, section="train"):
        """Adds the time since the last lap to a section."""
        self.wait()
        now = time.perf_counter()
        self.seconds[section] = self.seconds.get(section, 0.0) + now - self.last
        self.last = now

    @contextlib.contextmanager
    def section(self, name):
        self.lap()
        yield
        self.lap(name)

    def training(self):
        """Seconds of training so far, without waiting for the device."""
        return self.seconds["train"] + time.perf_counter() - self.last


class Run:
    """A run folder, new or reopened by --resume. Only rank 0 writes to it.

    `checkpoint` is the state to continue from, or None; `step` is the last step logged. SIGTERM, SIGUSR1 and
    Ctrl-C set `stopping`. Raises UserError if the run is in use or damaged, or if flags differ from its own.
    """

    def __init__(self, cfg, script, rank=0):
        self.cfg, self.rank, self.stopping, self.dir = cfg, rank, False, None
        self.step = self.num_skipped = self.bad_steps_in_a_row = 0
        self.seconds, self.agreed, self.next_sync = 0.0, (False, 0.0, 0), 0
        self.pending, self.last, self.checkpoint, self.config = [], {}, None, None
        self.code = local_files(script)  # read now, as it may be edited soon
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(s, self._stop)
        if not cfg.resume:
            return
        run = find_run(cfg.resume)
        if rank == 0:
            self._open(run)
        if not (run / "metrics" / "loss.jsonl").exists() and not any(run.glob("checkpoints/*.pt")):
            return  # it was killed before its first steps were logged: start again
        old = self.checkpoint = newest_checkpoint(cfg.resume)
        self.step, self.seconds, self.num_skipped = old["step"], old["seconds"], old["skipped"]
        self.agreed = False, self.seconds, self.step
        done = {"steps": old["step"], "minutes": old["seconds"] / 60}
        limits = {k: getattr(cfg, k, 0) for k in done}
        if any(limits[k] != old["config"].get(k, 0) for k in done):
            for k, v in limits.items():
                text = f"{_flag(k)} is {v}, but the run has made {done[k]:.5g}; name those of the whole run"
                require(not v or v > done[k], text + ", or 0" * (k == "minutes"))
        for f in (f for f in fields(cfg) if f.name not in ("resume", "config") and not f.metadata):
            was, now = old["config"].get(f.name, f.default), getattr(cfg, f.name)
            text = f"{_flag(f.name)} is {now}, but {was} in {cfg.resume}"
            require(was == now, f"{text}; leave it out, or start a new run")

    def _stop(self, number, _):
        if not self.config:  # datasets are being read or encoded: nothing is there to save
            print0("stopped by a signal before the first step; start it again")
            THREADS.shutdown(wait=False, cancel_futures=True)
            sys.exit(EXIT_PREEMPTED)
        if self.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt  # Ctrl-C twice; launchers repeat the other signals
        self.stopping = True

    def _open(self, folder):
        utf8 = {"encoding": "utf-8", "errors": "backslashreplace"}
        out, err = (open(folder / name, "a", **utf8) for name in ("run.out", "run.err"))
        require(lock(out), f"{folder} is in use by another process; wait for it, or start a new run")
        self.dir, sys.stdout, sys.stderr = folder, Tee(sys.stdout, out), Tee(sys.stderr, err)
        out.writelines(EARLY)
        EARLY.clear()

    def _make_folder(self, name):
        home = Path(self.cfg.out or os.environ.get("DIFFUSION_LOGS") or "logs")
        name = f"{name}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
        for suffix in ("", *(f"_{i}" for i in range(2, 100))):  # two runs may start in the same second
            with contextlib.suppress(FileExistsError):
                for sub in ("code", "checkpoints", "metrics", "samples"):
                    (home / f"{name}{suffix}" / sub).mkdir(parents=True)
                return home / f"{name}{suffix}"

    def write_config(self, cfg, name, device, data, held_out, model, **more):
        """Makes the run folder NAME_TIME with run.yaml and code, or checks that a resumed run has the
        same dataset. Prints a summary."""
        self.config = {k: v for k, v in asdict(cfg).items() if k not in ("resume", "config")}
        if self.rank:
            return
        shape, num = "x".join(map(str, data.images.shape[1:])), sum(p.numel() for p in model.parameters())
        splits = {}
        for k, v in {"train": data, "test": held_out}.items():
            splits[k] = {"images": len(v.labels), "fingerprint": v.fingerprint()}
            splits[k] |= {"captions": f"{derive_seed(v.captions):016x}"} if v.captions else {}
        facts = {
            "command": " ".join(sys.argv),
            "commit": commit(),
            "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)},
            "device": device_name(device),
            "dataset": {"name": data.name, "shape": shape, **splits, "classes": data.classes},
            "parameters": num,
            **more,
            "config": {k: list(v) if isinstance(v, tuple) else v for k, v in self.config.items()},
        }
        if self.cfg.resume:
            was = yaml.safe_load((self.dir / "run.yaml").read_text())
            for k in ("train", "test", "classes"):  # name and place may change
                old, new = was["dataset"][k], facts["dataset"][k]
                text = f"the dataset differs from the run's: {k} is {new}, but was {old}"
                require(old == new, f"{text}; set --dataset, or start a new run")
            if was.get("processes") != facts.get("processes"):
                text = f"{was.get('processes')} processes before, {facts.get('processes')} now"
                print0(f"note    {text}: not bit for bit the same run")
            self.truncate_logs()
            facts = was | {"config": facts["config"]}
        else:
            self._open(self._make_folder(name))
            for file, text in self.code.items():
                (self.dir / "code" / file).parent.mkdir(parents=True, exist_ok=True)
                (self.dir / "code" / file).write_bytes(text)
        text = yaml.safe_dump(facts, sort_keys=False, default_flow_style=None)
        write_atomically(self.dir / "run.yaml", lambda f: f.write(text.encode()))
        if job := os.environ.get("DIFFUSION_JOB"):  # of slurm/run.sh: run and job name each other
            write_atomically(Path(job), lambda f: f.write(os.fsencode(self.dir.resolve()) + b"\n"))
            print0(f"job     {os.environ.get('DIFFUSION_JOB_LOG')}")
        flipped = ", half mirrored" if self.config.get("flip") == "on" else ""
        names = ", ".join(data.classes[:10]) + ", ..." * (len(data.classes) > 10)
        counts = f"{len(data.labels):,} images {shape}{flipped}, {len(held_out.labels):,} held out"
        print0(f"data    {data.name}: {counts}")
        print0(f"classes {len(data.classes)}: {names}")
        print0(f"model   {num / 1e6:.2f} M parameters; " + ", ".join(f"{k} {v}" for k, v in more.items()))
        print0(f"device  {facts['device']}")
        print0(f"folder  {self.dir}" + (f", continuing after step {self.step}" if self.step else ""))

    def truncate_logs(self):
        """Moves what was logged, saved or sampled after the checkpoint to files named .old."""
        for file in (f for sub in (".", "checkpoints", "metrics") for f in (self.dir / sub).glob(".*.tmp")):
            file.unlink()  # of a killed process, see write_atomically
        for file in (self.dir / "metrics").glob("*.jsonl"):
            kept, later = [], []
            for line in file.read_bytes().splitlines(True):
                (kept if step_of(line) <= self.step else later).append(line)
            if later:
                with open(f"{file}.old", "ab") as f:
                    f.writelines(later)
                write_atomically(file, lambda f, kept=kept: f.writelines(kept))
        for file in [*checkpoints(self.dir), *self.dir.glob(f"samples/step_{'[0-9]' * 8}*")]:
            if file.suffix != ".old" and int(file.name[5:13]) > self.step:
                file.rename(f"{file}.{time.time_ns()}.old")

    def restore(self, model, ema, optimizer, timer):
        """Loads what save() wrote, if the run continues from a checkpoint."""
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        try:
            torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        except pickle.UnpicklingError as e:
            text = f"the optimizer's state could not be loaded again ({str(e).splitlines()[-1]})"
            raise UserError(f"{text}; keep only tensors and Python's numbers in its groups") from None
        if self.checkpoint:
            model.load_state_dict(self.checkpoint["model"])
            ema.model.load_state_dict(self.checkpoint["ema"])
            optimizer.load_state_dict(self.checkpoint["optimizer"])
            timer.seconds["train"] = self.checkpoint["seconds"]
            self.checkpoint = None  # frees its memory

    def sync(self, step, seconds):
        """(stopping, seconds of training) on which all ranks agree, every 5 seconds or --log-every steps."""
        if not dist.is_initialized():
            return self.stopping, seconds
        if step >= self.next_sync:
            new = torch.tensor([self.stopping, seconds], dtype=torch.float64)
            dist.all_reduce(new, dist.ReduceOp.MAX)
            pace = (new[1].item() - self.agreed[1]) / max(1, step - self.agreed[2])  # seconds per step
            self.next_sync = step + max(1, min(self.cfg.log_every, int(5 / max(pace, 1e-3))))
            self.agreed = bool(new[0]), new[1].item(), step
        return self.agreed[:2]

    def log(self, step, **values):
        """Keeps a step's numbers, which the device may still be computing, until the next flush()."""
        self.step = step
        self.pending.append({"step": step, **values})

    def flush(self, progress):
        """Reads pending numbers back (the only time the loop waits for the device), writes and prints them.

        progress: fraction of the run completed. Exits with status 1 after ten skipped steps in a row.
        """
        numbers = [v.float() for x in self.pending for v in x.values() if torch.is_tensor(v)]
        numbers = iter(torch.stack(numbers).tolist())
        lines = [{k: next(numbers) if torch.is_tensor(v) else v for k, v in x.items()} for x in self.pending]
        rate = self.cfg.bs * len(lines) / max(lines[-1]["seconds"] - self.seconds, 1e-9)
        self.pending, self.seconds = [], lines[-1]["seconds"]
        for x in lines:
            x["images_per_s"] = round(rate, 1)
            bad = not math.isfinite(x["loss"] + x["grad_norm"])
            self.num_skipped += bad
            self.bad_steps_in_a_row = (self.bad_steps_in_a_row + 1) * bad
            if bad:
                x |= {"loss": None, "grad_norm": None, "skipped": True}
            x |= {k: None for k, v in x.items() if v != v or v in (math.inf, -math.inf)}  # JSON has no NaN
            if self.bad_steps_in_a_row == 10:
                self._append("loss", lines[: lines.index(x) + 1])
                text = f"error: loss or gradient not finite in ten steps in a row, up to step {x['step']}"
                sys.exit(f"{text}; try a lower --lr, or --dtype float32")  # status 1
        losses = [x["loss"] for x in lines if x["loss"] is not None]
        self._append("loss", lines)
        self.last["loss"] = sum(losses) / len(losses) if losses else math.nan
        left = timedelta(seconds=round(self.seconds * (1 - progress) / max(progress, 1e-9)))
        skipped = f"  {self.num_skipped} steps skipped" if self.num_skipped else ""
        print0(f"step {self.step}  loss {self.last['loss']:.4f}  {rate:.0f} images/s  {left} left{skipped}")
        if left.days > 1 and self.step == 1:
            print0("note    --minutes 60 trains a complete shorter run, --dim and --depth a smaller model")

    def _append(self, name, lines):
        if self.rank == 0:
            with open(self.dir / "metrics" / f"{name}.jsonl", "a") as f:
                f.writelines(json.dumps(x) + "\n" for x in lines)

    def validate(self, step, losses, t):
        """Writes held-out losses [n] at times t [n] to val.jsonl: their mean, and means by tenths of time.

        Each rank computes a part of the losses and leaves the others 0.
        """
        if dist.is_initialized():
            dist.all_reduce(losses)
        losses, tenth = losses.cpu(), (10 * t).ceil()
        means = [x.mean().item() for x in (losses, *(losses[tenth == i] for i in range(1, 11)))]
        means = [x if math.isfinite(x) else None for x in means]  # JSON has no NaN
        self._append("val", [{"step": step, "loss": means[0], "loss_t": means[1:]}])
        self.last["held-out loss"] = losses.mean().item()
        print0(f"step {step}  held-out loss {self.last['held-out loss']:.4f}")

    def save(self, model, ema, optimizer, seconds):
        """Writes checkpoints/step_X.pt, completely or not at all, and removes all but the newest --keep and
        those of --keep-every."""
        if self.rank:
            return
        state = {"model": model, "ema": ema.model, "optimizer": optimizer}
        state = {k: v.state_dict() for k, v in state.items()}
        state |= {"step": self.step, "seconds": seconds, "skipped": self.num_skipped, "config": self.config}
        folder = self.dir / "checkpoints"
        write_atomically(folder / f"step_{self.step:08d}.pt", lambda f: torch.save(state, f))
        for old in checkpoints(self.dir)[: -self.cfg.keep]:
            if not self.cfg.keep_every or int(old.stem[5:]) % self.cfg.keep_every:
                old.unlink()

    def finish(self, timer, progress):
        """Prints where the time went, and results. A run stopped by a signal exits with EXIT_PREEMPTED."""
        if dist.is_initialized():  # torchrun kills every rank when one exits, so wait until rank 0 has saved
            dist.barrier()
            dist.destroy_process_group()
        if progress < 1:
            print0(f"stopped by a signal after step {self.step}; continue with --resume {self.dir}")
            sys.exit(EXIT_PREEMPTED)
        print0("time    " + ", ".join(f"{k} {v:.1f} s" for k, v in timer.seconds.items()))
        print0(f"done    step {self.step}, " + ", ".join(f"{k} {v:.4f}" for k, v in self.last.items()))
        if self.rank == 0:
            pictures = sorted(self.dir.glob("samples/step_*.gif"))
            for label, files in {"saved  ": checkpoints(self.dir), "look at": pictures}.items():
                if files:
                    print0(f"{label} {files[-1]}")


@contextlib.contextmanager
def warn_on_os_error(what):
    """Training goes on if a picture cannot be made or written, for example on a full disk."""
    try:
        yield
    except (OSError, UserError) as e:
        print0(f"warning: cannot write {what} ({e.strerror if isinstance(e, OSError) else e})")


def check_finite(x):
    """Raises UserError if samples are not finite: clamping would turn infinities into an image."""
    text = "the samples are not finite; try another sampler, more steps or less guidance, or train again"
    require(x.isfinite().all(), f"{text} with a lower --lr")


def save_images(path, images, trajectory=(), columns=10, captions=()):
    """PATH.png: images [N, C, H, W] in [-1, 1] as a grid. PATH.gif: a list of such, 50 images of each.

    captions: texts to print below the images.
    """
    check_finite(images)
    zoom = max(1, 64 // images.shape[-1])
    strips = draw_captions(captions, zoom * images.shape[-1])

    def grid(x):  # not torchvision's, which takes longer to import than all of this to run
        x = (x.float().cpu().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
        x = x.permute(0, 2, 3, 1).numpy().repeat(zoom, 1).repeat(zoom, 2)
        x = np.concatenate([x, strips[: len(x)]], 1) if len(captions) else x
        (_, h, w, _), n, rows = x.shape, min(columns, len(x)), math.ceil(len(x) / columns)
        cells = np.full((rows * n, h + 2 * zoom, w + 2 * zoom, 3), 255, np.uint8)  # white lines between them
        cells[: len(x), 2 * zoom :, 2 * zoom :] = x
        cells = np.concatenate(np.concatenate(cells.reshape(rows, n, *cells.shape[1:]), 1), 1)
        return Image.fromarray(np.pad(cells, ((0, 2 * zoom), (0, 2 * zoom), (0, 0)), constant_values=255))

    grid(images).save(f"{path}.png")
    if len(trajectory):
        colours = 16 if images.shape[1] == 1 else 128  # noise compresses badly; fewer colours take a third
        first, *others = [grid(x[:50]).quantize(colours, dither=Image.Dither.NONE) for x in trajectory]
        durations = [4000 // len(trajectory)] * len(others) + [2000]  # in ms; rests on the last
        first.save(f"{path}.gif", save_all=True, append_images=others, duration=durations, loop=0)


def draw_captions(captions, width):
    """Black on white, wrapped to a width in pixels, at most 8 lines -> uint8 [N, height, width, 3]."""
    lines = [textwrap.wrap(c, width // 6, max_lines=8, placeholder="...") for c in captions]
    strips = np.full((len(lines), 13 * max(map(len, lines), default=0) + 2, width, 3), 255, np.uint8)
    for strip, text in zip(strips, lines, strict=True):
        image = Image.fromarray(strip)
        ImageDraw.Draw(image).text((1, 0), "\n".join(text), "black", ImageFont.load_default(10), spacing=2)
        strip[:] = np.asarray(image)
    return strips
