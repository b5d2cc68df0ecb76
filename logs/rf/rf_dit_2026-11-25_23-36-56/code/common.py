"""What the scripts share, and nothing else: flags and errors, datasets, time embedding, EMA, run folders."""

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
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Flags, errors, seeds, devices

PREEMPTED = 75  # exit status after a signal: a checkpoint is written, --resume goes on


class UserError(Exception):
    """Bad input: ends the program with one line, `error: what is wrong; what to do`, and exit status 2."""


@contextlib.contextmanager
def one_line_errors():
    """Around a script's main: bad input or an unwritable disk becomes one line; a bug keeps its traceback."""
    try:
        yield
        return
    except UserError as e:
        text = str(e)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        place = e.filename or "the run folder"
        text = f"{e.strerror}: {place}; make room, or write elsewhere (--logs, --out, --cache)"
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


INVOCATION = {"resume", "sample", "config"}  # flags that name a run instead of describing one
# A run's flags hold, but --resume may change how long, how often and where it runs, --sample how it samples.
MAY_CHANGE = {
    "resume": set("steps minutes log_every eval_every sample_every save_every keep".split())
    | set("device dtype compile grad_checkpoint data_root logs cache vae_path".split()),
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
        if hint is bool:
            kind["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is typing.Literal:
            kind["choices"] = typing.get_args(hint)
        elif typing.get_origin(hint) is tuple:
            of = typing.get_args(hint)  # tuple[float, ...] takes any number of them, tuple[float, float] two
            kind |= {"nargs": "*" if of[-1] is ... else len(of), "type": of[0], "metavar": "N"}
        else:
            kind |= {"type": hint, "metavar": hint.__name__.upper()}
        parser.add_argument(_flag(name), default=argparse.SUPPRESS, **kind)

    def read(arguments):
        known, unknown = parser.parse_known_args(arguments)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], map(_flag, flags), 1)
            advice = f"did you mean {near[0]}?" if near else "see --help"
            raise UserError(f"unknown argument {unknown[0]}; {advice}")
        return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(known).items()}

    given = read(argv)
    modes = [m for m in sorted(INVOCATION) if given.get(m)]
    need(len(modes) < 2, f"--{' and --'.join(modes)} contradict each other; give one of them")
    if not modes:
        return Config(**given)
    mode = modes[0]
    file = Path(given[mode]) if mode == "config" else find_run(given[mode]) / "run.yaml"
    try:
        stored = dict(yaml.safe_load(file.read_text())["config"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as e:
        text = f"{file} is no readable run.yaml ({why(e)}); give one that a run has written"
        raise UserError(text) from None
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
    for key, value in given.items():
        was = stored.get(key, flags[key])
        ok = mode == "config" or key in MAY_CHANGE[mode] | INVOCATION or value == was
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
# Datasets: one uint8 tensor, labels, class names


@dataclass
class Dataset:
    """images uint8 [N, C, H, W]; labels int64 [N]; flip: may a mirrored image stand for itself?"""

    name: str
    images: "torch.Tensor | Stream"
    labels: torch.Tensor
    classes: list[str]
    flip: bool

    def digest(self):
        """16 hexadecimal digits of its content; of a Stream, of the files' names, sizes and dates."""
        x = self.images.identity if isinstance(self.images, Stream) else self.images.numpy().tobytes()
        return hashlib.blake2b(x + self.labels.numpy().tobytes(), digest_size=8).hexdigest()


class Stream:
    """Stands for images that memory may not hold: stream[rows] reads them, uint8 [n, C, H, W].

    rows is a list or tensor of integers. What is unreadable comes out black, and `bad` says why: {row: text}.
    """

    def __init__(self, shape, read, identity, bad):
        self.shape, self.read, self.identity, self.bad = shape, read, identity, bad

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        return self.read(torch.as_tensor(rows).tolist())


def load_dataset(name, data_root="", split="train", image_size=0, channels=0, most=math.inf):
    """The "train" or "test" split of `mnist`, `cifar10`, `digits`, or of a folder or .zip of images.

    data_root holds mnist and cifar10 (default $DIFFUSION_DATA, else data/). image_size (pixels) and channels
    (1 or 3) of 0 keep the dataset's own. Images of more than `most` bytes are not loaded, but are a Stream.
    Raises UserError when it cannot be had.
    """
    root = Path(data_root or os.environ.get("DIFFUSION_DATA") or "data")
    text = f"--channels is {channels}; give 1 (gray), 3 (colour) or 0 (as the dataset is)"
    need(channels in (0, 1, 3), text)
    text = f"--image-size is {image_size}; give the side in pixels, or 0 for the dataset's own"
    need(0 <= image_size <= 4096, text)
    if name in ("mnist", "cifar10"):
        data = _torchvision(name, root, split)
    elif name == "digits":
        data = _digits(split, image_size or (32 if channels == 3 else 28), channels or 1)
    elif Path(name).exists():
        data = _files(Path(name), split, image_size, most)
    else:
        text = f"there is no dataset {name}; give mnist, cifar10, digits, or a folder or .zip of images"
        raise UserError(text)

    def fit(x):  # uint8 [n, C, H, W] to the size and channels that are asked for
        if image_size and x.shape[-1] != image_size:
            x = torch.nn.functional.interpolate(x.float(), (image_size,) * 2, mode="bicubic", antialias=True)
        if channels == 1 and x.shape[1] == 3:  # luma, ITU-R 601
            x = (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        x = x if x.dtype == torch.uint8 else x.round_().clamp_(0, 255).to(torch.uint8)
        return x.expand(-1, 3, -1, -1).contiguous() if channels == 3 else x

    x, shape = data.images, (channels or data.images.shape[1], *[image_size or data.images.shape[-1]] * 2)
    if isinstance(x, Stream) or len(x) * math.prod(shape) > most:
        bad, identity = getattr(x, "bad", {}), data.digest().encode()
        data.images = Stream((len(x), *shape), lambda rows: fit(x[rows]), identity, bad)
    else:
        data.images = fit(x)
    return data


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
    return Dataset(name, images, torch.as_tensor(data.targets), classes, flip=name == "cifar10")


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
    return Dataset("digits", images, torch.arange(n) % 10, [str(d) for d in range(10)], flip=False)


def _files(root, split, size, most):
    """A folder or .zip with images at any depth; an image's class is the name of the folder it lies in.

    Splits: top folders train/ and test/ (or val/), or X-train.zip beside X-test.zip; else every 20th image is
    held out. Fewer than 40 images serve as both. size 0: that of the first image.
    """
    twin = root.with_name(root.name.replace("train", "test"))
    has_twin = root.suffix == ".zip" and twin != root and twin.exists()
    root = twin if has_twin and split == "test" else root
    try:
        if root.is_dir():
            files = {str(f.relative_to(root)): f for f in root.rglob("*")}
            read, identity = Path.read_bytes, lambda f: [f.stat().st_size, f.stat().st_mtime_ns]
        else:  # read member by member and never extracted: no name can lead outside
            archive = zipfile.ZipFile(root)
            files = {i.filename: i for i in archive.infolist()}
            read = lambda i: archive.read(i) if i.file_size < 1 << 28 else b""  # noqa: E731
            identity = lambda i: [i.CRC]  # noqa: E731
    except (OSError, zipfile.BadZipFile) as e:
        text = f"{root} is no readable folder or .zip ({why(e)}); give one that holds images"
        raise UserError(text) from None
    kinds, hidden = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"), r"(^|/)(\.[^./]|__MACOSX)"
    names = sorted(n for n in files if n.lower().endswith(kinds) and not re.search(hidden, n))
    need(names, f"there is no image ({' '.join(kinds)}) in {root}; give a folder or .zip that holds some")
    classes = {c: i for i, c in enumerate(sorted({Path(n).parent.name for n in names}))}
    tops = {Path(n).parts[0] for n in names}
    held = next((t for t in ("test", "val") if {"train", t} <= tops), None)
    if held:
        names = [n for n in names if Path(n).parts[0] == ("train" if split == "train" else held)]
    elif not has_twin and len(names) >= 40:
        names = [n for i, n in enumerate(names) if (i % 20 == 10) == (split == "test")]

    def load(name, size):  # -> (uint8 [size, size, 3], gray?), or what is wrong
        try:
            return decode_image(read(files[name]), size)
        except Exception as e:  # damaged files raise nearly anything; each is counted and named
            return f"{name} ({why(e)})"

    found = (load(n, 0) for n in names) if size == 0 else ()
    size = size or next((len(x[0]) for x in found if isinstance(x, tuple)), 1)
    labels, bad, grays = torch.tensor([classes[Path(n).parent.name] for n in names]), {}, set()
    pool = ThreadPoolExecutor(os.cpu_count())  # decoding leaves Python's lock

    def read_rows(rows):
        x = np.zeros((len(rows), size, size, 3), np.uint8)
        for i, found in enumerate(pool.map(lambda row: load(names[row], size), rows)):
            if isinstance(found, str):
                bad[rows[i]] = found
            else:
                x[i] = found[0]
                grays.add(found[1])
        return torch.from_numpy(x).permute(0, 3, 1, 2)

    if 3 * size**2 * len(names) > most:
        key = repr([size, [[n, *identity(files[n])] for n in names]]).encode()
        images = Stream((len(names), 3, size, size), read_rows, key, bad)
        return Dataset(root.stem, images, labels, list(classes), flip=True)
    images = read_rows(range(len(names)))
    text = f"{len(bad)} of {len(names)} images in {root} are unreadable: {', '.join([*bad.values()][:5])}"
    need(len(bad) <= 0.01 * len(names), f"{text}; remove them")
    images = images[:, : 1 if grays == {True} else 3].contiguous()
    if bad:
        say(f"warning: {text}; left out")
        fine = torch.tensor([i not in bad for i in range(len(names))])
        images, labels = images[fine], labels[fine]
    return Dataset(root.stem, images, labels, list(classes), flip=True)


def decode_image(data, size):
    """An image file's bytes -> (uint8 [size, size, 3], was it gray?): centre crop to a square, then resize.

    Palette, 16-bit, RGBA (over white) and CMYK images come out as a viewer shows them, animations as their
    first frame. size 0: the shorter side. Pillow refuses images of more than 179 million pixels.
    """
    image = Image.open(io.BytesIO(data))
    size = size or min(image.size)
    image.draft(None, (size, size))  # JPEG: decode at a lower resolution where that is enough
    image = ImageOps.exif_transpose(image)
    gray = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image), gray


class Order:
    """`rows = order(step)`: which samples make the batch of a step, int64 [bs]: a function of (seed, step).

    Sample j of step s is number s * bs + j of a stream of epochs, each its own shuffle of n.
    """

    def __init__(self, n, bs, seed, device="cpu"):
        self.n, self.bs, self.seed, self.device = n, bs, seed, torch.device(device)
        self.epoch = functools.lru_cache(2)(self._epoch)

    def _epoch(self, epoch):
        generator = torch.Generator().manual_seed(seed_of(self.seed, "data", epoch))
        return send(torch.randperm(self.n, generator=generator), self.device)

    def __call__(self, step):
        i, end, parts = step * self.bs, (step + 1) * self.bs, []
        while i < end:  # a batch may span epochs
            epoch, k = divmod(i, self.n)
            parts.append(self.epoch(epoch)[k : k + end - i])
            i += len(parts[-1])
        return torch.cat(parts)

    def mirrored(self, step):
        """Which of them are to be flipped, bool [bs]."""
        generator = torch.Generator(self.device).manual_seed(seed_of(self.seed, "flip", step))
        return torch.rand(self.bs, generator=generator, device=self.device) < 0.5


class Batches:
    """`x, y = batches(step)`: images and labels in the order above, of which a rank has its slice.

    x is float32 [bs / world, C, H, W] in [-1, 1], on the device of the uint8 tensor; y int64.
    """

    def __init__(self, data, bs, seed, device, rank=0, world=1):
        self.images = data.images.to(device) if torch.is_tensor(data.images) else data.images
        self.labels, self.flip = data.labels.to(device), data.flip
        self.order = Order(len(self.images), bs, seed, device)
        self.mine = slice(rank * bs // world, (rank + 1) * bs // world)

    def __call__(self, step):
        rows = self.order(step)[self.mine]
        x = self.images[rows].to(rows.device).float() / 127.5 - 1
        if self.flip:
            x = torch.where(self.order.mirrored(step)[self.mine].view(-1, 1, 1, 1), x.flip(-1), x)
        return x, self.labels[rows]


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


def say(text):
    """Prints a line, on rank 0 alone, without tearing the progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


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
    found = sorted((find_run(path) / "checkpoints").glob("step_*.pt"), reverse=True)
    need(found or none_yet, f"{path} has no checkpoint yet; wait for its first, or --resume it")
    for i, file in enumerate(found):
        try:
            return load_checkpoint(file)
        except UserError as e:
            if i + 1 == len(found):
                raise
            say(f"warning: {str(e).split(';')[0]}; using {found[i + 1]}")
    return None


def commit():
    """Of this repository, with "-dirty" where files differ from it; "" where there is none, or no git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
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
        self.state = newest_checkpoint(cfg.resume, none_yet=True) if cfg.resume else None
        old = self.state or {"step": 0, "skipped": 0, "seconds": 0.0}
        self.step, self.skipped, self.seconds = old["step"], old["skipped"], old["seconds"]
        self.first, self.seconds_before = self.step, self.seconds
        self.streak, self.printed = 0, time.monotonic()
        # What `config` in run.yaml and checkpoints holds: everything but how this process was started.
        self.config = {k: v for k, v in asdict(cfg).items() if k not in INVOCATION}
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(s, self._stop)
        if rank:
            return
        self.dir = find_run(cfg.resume) if cfg.resume else self._make(method, backbone)
        files = [open(self.dir / name, "a") for name in ("run.out", "run.err")]
        need(lock(files[0]), f"{self.dir} is in use by another process; wait for it, or start a new run")
        if cfg.resume:
            self._rewind()
        else:
            for source in (script, __file__):
                shutil.copy2(source, self.dir / "code")
        self.bar = tqdm(total=100, bar_format="{l_bar}{bar}| {desc}", disable=not sys.stderr.isatty())
        sys.stdout, sys.stderr = Tee(sys.stdout, files[0]), Tee(sys.stderr, files[1])
        if job := os.environ.get("DIFFUSION_JOB"):  # of slurm/run.sh; run and job name each other
            write_atomically(Path(job), lambda f: f.write(f"{self.dir.resolve()}\n".encode()))
            say(f"job     {os.environ.get('DIFFUSION_JOB_LOG')}")

    def _stop(self, number, _):
        if self.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice by hand; launchers and schedulers repeat themselves
        self.stopping = True

    def _make(self, method, backbone):
        home = Path(self.cfg.logs or os.environ.get("DIFFUSION_LOGS") or "logs") / method
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
        """Takes what came after the checkpoint off the metrics, and later checkpoints out of the way."""
        for k, was in (self.state["config"] if self.state else {}).items():
            if k not in MAY_CHANGE["resume"] and k in self.config and self.config[k] != was:
                text = f"{k} is {self.config[k]} now but {was} in the checkpoint"
                raise UserError(f"{text}; restore {self.dir / 'run.yaml'} or the dataset, or start a new run")
        for file in (self.dir / "metrics").glob("*.jsonl"):
            lines = file.read_text().splitlines(True)
            lines = [x for x in lines if x.endswith("}\n")]  # the last may be torn
            kept = "".join(x for x in lines if json.loads(x)["step"] <= self.step)
            write_atomically(file, lambda f, kept=kept: f.write(kept.encode()))
        for file in (self.dir / "checkpoints").glob("step_*.pt"):
            if int(file.stem[5:]) > self.step:
                file.replace(file.with_suffix(".pt.old"))

    def describe(self, device, data, model, **more):
        """Writes run.yaml (at the start of a run) and prints its summary."""
        if self.rank:
            return
        count, shape = sum(p.numel() for p in model.parameters()), "x".join(map(str, data.images.shape[1:]))
        facts = {
            "command": " ".join(sys.argv),
            "commit": commit(),
            "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)},
            "device": device_facts(device)[0],
            "dataset": f"{data.name}, {len(data.labels)} images {shape}, blake2b {data.digest()}",
            "parameters": count,
            **more,
            "config": {k: list(v) if isinstance(v, tuple) else v for k, v in self.config.items()},
        }
        if (self.dir / "run.yaml").exists():
            was = facts | (yaml.safe_load((self.dir / "run.yaml").read_text()) or {})
            if (before := was.get("processes")) != (now := facts.get("processes")):
                say(f"note    {before} processes before, now {now}: not bit for bit the same run")
            if was["dataset"] != facts["dataset"]:
                text = f"the dataset is not the run's: {facts['dataset']} now, {was['dataset']} before"
                need(isinstance(data.images, Stream), f"{text}; restore it, or start a new run")
                say(f"note    {text}")  # by the files' dates, too, which copying may change
        else:
            text = yaml.safe_dump(facts, sort_keys=False)
            write_atomically(self.dir / "run.yaml", lambda f: f.write(text.encode()))
        say(f"model   {type(model).__name__}, {count / 1e6:.2f} M parameters")
        say(f"data    {data.name}, {len(data.labels):,} images {shape}, {len(data.classes)} classes")
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
        loss = sum(losses) / len(losses) if losses else math.nan
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
        bins, loss = [losses[tenth == i] for i in range(1, 11)], losses.mean().item()
        by_time = [x.mean().item() if len(x) else None for x in bins]
        self._append("val.jsonl", [{"step": step, "loss": loss, "loss_t": by_time}])
        if self.rank == 0:
            say(f"step {step}  held-out loss {loss:.4f}")
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
        write_atomically(home / f"step_{self.step:08d}.pt", lambda f: torch.save(state, f))
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
            with harmless("the pictures"):
                save_pictures(self.dir / "samples" / name, images, history)

    def close(self, clock, model, dtype, finished=True):
        """Prints how fast it was, where the time went and where to look. Ends the processes' group.

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
        if self.step > self.first:
            images = (self.step - self.first) * self.cfg.bs / int(os.environ.get("WORLD_SIZE", 1))
            rate = images / (clock.seconds["train"] - self.seconds_before)
            per_image, peak = training_flops(model, self.cfg.shape), matmul_rate(clock.device, dtype)
            tflops, peak = per_image * rate / 1e12, peak / 1e12
            facts = {"step": self.step, "images_per_s": rate, "tflops": tflops}
            self._append("speed.jsonl", [facts | {"tflops_of_a_product": peak, "mfu": tflops / peak}])
            text = f"speed   {rate:.1f} images/s a process, {tflops:.3g} TFLOP/s, {tflops / peak:.0%} of the "
            say(text + f"{peak:.3g} of a large product in {str(dtype)[6:]}")
        say("time    " + ", ".join(f"{k} {v:.1f} s" for k, v in clock.seconds.items()))
        say(f"look at {self.dir}/samples and {self.dir}/metrics/curves.png")


def training_flops(model, shape):
    """FLOP of a training step of one image of this shape: three forward passes, counted on no data."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        deepcopy(model).to("meta")(torch.empty(1, *shape), torch.empty(1), torch.empty(1, dtype=torch.long))
    return 3 * counter.get_total_flops()


def matmul_rate(device, dtype):
    """FLOP/s of the product of two large square matrices, the best of a few: what this device can reach."""
    # Without hardware for it, bfloat16 is a hundred times slower at any size: a small product tells as much.
    emulated = dtype == torch.bfloat16 and not device_facts(device)[1]
    n, best = 8192 if device.type == "cuda" else 256 if emulated else 2048, math.inf
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


@contextlib.contextmanager
def harmless(what):
    """A picture that cannot be written, say on a full disk, is no reason to stop a training run."""
    try:
        yield
    except OSError as e:
        say(f"warning: {what} could not be written ({e.strerror})")


def save_pictures(path, images, history=(), columns=10):
    """PATH.png: images [N, C, H, W] in [-1, 1] as a grid. PATH.gif: a list of such, if any, 50 of each."""
    from torchvision.utils import make_grid

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
    train = [x for x in train if x["loss"] is not None]
    figure = Figure((10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if train:  # at most 200 points, each the mean of its neighbours
        groups = np.array_split(np.array([(x["step"], x["loss"]) for x in train]), min(200, len(train)))
        left.plot(*np.array([g.mean(0) for g in groups]).T, label="training")
    left.plot([x["step"] for x in val], [x["loss"] for x in val], "o-", label="held out, averaged weights")
    left.set(xlabel="step", ylabel="loss", yscale="log")
    left.legend()
    for i, x in enumerate(val):
        right.plot(np.linspace(0.05, 0.95, 10), x["loss_t"], color=str(0.8 * (1 - (i + 1) / len(val))))
    right.set(xlabel="t (0 = data, 1 = noise)", ylabel="held-out loss, later is darker", yscale="log")
    figure.savefig(metrics / "curves.png", dpi=110)
