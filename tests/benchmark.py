"""Times training steps of the scripts beside those of other code: same shapes, same batch, one process.

Every step is a whole one: fetch a batch, forward, backward, optimizer, average the weights. The models
take turns, round by round, so that a busy machine is busy for all; a line is the median over the rounds and,
in brackets, their range. Three comparisons:

    plain_dit    a DiT and a training step as public repositories write them: DataLoader with workers and
                 transforms, sinusoidal positions, a modulation layer in each block, AdamW as it comes, the
                 average of the weights in a Python loop, loss.item() every step
    diffusers    its DiTTransformer2DModel, and its UNet2DModel with the channels of ours, AdamW and EMAModel
    matmul       products of large square matrices: what the machine can do

FLOP are those of the model's products, three forward passes a step; "of-peak" is their share of the matmul
rate in the same precision (which convolutions may pass, as there are ways with fewer). Memory is the peak
during a step over what was held before it. On a CPU freed memory is kept (common.keep_freed_memory) for all.
"compiled": the scripts' DiTs block by block, as they are trained, and all other models as a whole.

    python tests/benchmark.py                     DiT-S/2 on 32x32x3 at 32 images, UNet on 28x28 at 48
    python tests/benchmark.py --only dit --dim 768 --heads 12 --bs 128
    python tests/benchmark.py --only latent       the same DiT on latents of 7x7 and on pixels at patch 2
    python tests/benchmark.py --only text         the same DiT on 8x8 latents, with captions and with classes
"""

import contextlib
import copy
import ctypes
import itertools
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import ddpm_unet_mnist as ddpm  # noqa: E402
import latent_dit_sdvae as ld  # noqa: E402
import rf_dit_cifar as rf  # noqa: E402
from common import print0, require  # noqa: E402


@dataclass
class Config:
    only: Literal["all", "dit", "unet", "latent", "text"] = "all"  # which comparison
    dim: int = 384  # of the DiT
    depth: int = 12  # of the DiT
    heads: int = 6  # of the DiT
    patch: int = 2  # of the DiT
    bs: int = 32  # images a step of the DiT
    unet_bs: int = 48  # images a step of the UNet
    rounds: int = 5  # turns of each model
    out: str = ""  # file for the numbers, as JSON
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = the fastest there is


def settings(device):
    """{name: (precision, compiled)}: as public scripts are run, and the best that this device can do."""
    fast = "bfloat16" if common.supports_bf16(device) else "float32"
    return {"float32, eager": (torch.float32, False), f"{fast}, compiled": (getattr(torch, fast), True)}


# ------------------------------------------------------------------------------------------------
# Models: generators that take one training step at each next() and yield its loss, a tensor or a number


def ours(script, cfg, device, dtype, use_compile):
    """-> (model, steps): the loop of a script, without its run folder."""
    model = script.build_model(cfg).to(device, memory_format=torch.channels_last)

    def steps():
        ema = common.EMA(model, cfg.ema_decay)
        blocks = [*getattr(model, "blocks", [model]), *getattr(model, "text_blocks", [])]
        for module in blocks if use_compile else []:
            module.compile(dynamic=False)
        if script is ddpm:
            optimizer = script.make_optimizer(model, cfg)
        else:
            optimizer = script.make_optimizer(model, cfg, dtype)
        data = random_images(cfg)
        if script is ld:
            stored = torch.randn(len(data.labels), 1, *cfg.shape).half().numpy()
            chunks = [stored[i : i + ld.CHUNK] for i in range(0, len(stored), ld.CHUNK)]
            captions = ld.Captions(data, cfg, device) if cfg.text == "on" else None
            batches = ld.Latents(chunks, data, cfg, device, captions=captions)
        else:
            batches = common.Batches(data, cfg.bs, 0, device, flip=True)
        for step in itertools.count():
            generator = torch.Generator(device).manual_seed(step)
            (x0, y), eps = batches(step), torch.randn(cfg.bs, *cfg.shape, generator=generator, device=device)
            u = torch.rand(2, cfg.bs, generator=generator, device=device)
            t = script.sample_t(u[0], cfg)
            drop = (u[1] < cfg.class_dropout).view(-1, *[1] * (y.ndim - 1))
            y = torch.where(drop, script.null(y, cfg), y)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = script.loss_per_sample(model, x0, y, t, eps, cfg).mean()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
            optimizer.found_inf = (~(loss.isfinite() & grad_norm.isfinite())).float()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(model, step + 1)
            yield loss.detach()

    return model, steps()


class Images(torch.utils.data.Dataset):
    """Pillow images and torchvision's transforms, as in public training scripts."""

    def __init__(self, cfg):
        from torchvision import transforms

        self.data = random_images(cfg)
        self.pictures = [transforms.functional.to_pil_image(x) for x in self.data.images]
        half = [0.5] * cfg.shape[0]
        parts = transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(half, half)
        self.transform = transforms.Compose(parts)

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return self.transform(self.pictures[i]), self.data.labels[i]


def theirs(model, call, cfg, device, dtype, use_compile, average):
    """-> (model, steps): the usual loop. call(net, x, t, y) -> prediction; average(model) -> a step's EMA."""
    model = model.to(device)

    def steps():
        optimizer, update = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0), average(model)
        net = torch.compile(model) if use_compile else model
        loader = torch.utils.data.DataLoader(
            Images(cfg), cfg.bs, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
        )
        while True:
            for x0, y in loader:
                x0, y = x0.to(device), y.to(device)
                t, eps = torch.rand(cfg.bs, device=device), torch.randn_like(x0)
                s = t.view(-1, 1, 1, 1)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = F.mse_loss(call(net, (1 - s) * x0 + s * eps, t, y).float(), eps - x0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                update()
                yield loss.item()

    return model, steps()


def ema_in_python(model):
    """The weights' average as public repositories take it: parameter by parameter."""
    average = copy.deepcopy(model)

    def update():
        with torch.no_grad():
            for mine, new in zip(average.parameters(), model.parameters(), strict=True):
                mine.mul_(0.9999).add_(new.data, alpha=1 - 0.9999)

    return update


def ema_of_diffusers(model):
    from diffusers.training_utils import EMAModel

    average = EMAModel(model.parameters(), decay=0.9999)
    return lambda: average.step(model.parameters())


class PlainBlock(nn.Module):
    """A transformer block with LayerNorm and its own modulation layer."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, 1e-6, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        B, N, D = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = x + gate1 * self.proj(h)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainDiT(nn.Module):
    """The DiT of Peebles & Xie 2022, plainly."""

    def __init__(self, cfg):
        super().__init__()
        self.patch, side = cfg.patch, cfg.shape[-1] // cfg.patch
        self.embed = nn.Conv2d(cfg.shape[0], cfg.dim, cfg.patch, stride=cfg.patch)
        rows, columns = (i.flatten() / 1000 for i in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
        halves = [common.time_embedding(v, cfg.dim // 2) for v in (rows, columns)]
        self.register_buffer("positions", torch.cat(halves, dim=1))
        self.time = nn.Sequential(nn.Linear(256, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim))
        self.label = nn.Embedding(len(cfg.classes) + 1, cfg.dim)
        self.blocks = nn.ModuleList(PlainBlock(cfg.dim, cfg.heads) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.dim, 1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 2 * cfg.dim))
        self.out = nn.Linear(cfg.dim, cfg.patch**2 * cfg.shape[0])

    def forward(self, x, t, y):
        h = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        c = self.time(common.time_embedding(t, 256)) + self.label(y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return rf.unpatchify(self.out(self.norm(h) * (1 + scale) + shift), self.patch)


def random_images(cfg):
    """A hundred batches; what is in them does not change a step's time."""
    g, n = torch.Generator().manual_seed(0), 100 * cfg.bs
    images = torch.randint(0, 256, (n, *cfg.shape), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, len(cfg.classes), (n,), generator=g)
    data = common.Dataset("random", images, labels, [str(c) for c in range(len(cfg.classes))])
    if getattr(cfg, "text", "off") == "on":  # every caption has the full length
        rows = torch.randint(0, len(cfg.words), (n, *cfg.text_shape), generator=g).tolist()
        data.captions = [[" ".join(cfg.words[i] for i in row)] for row in rows]
    return data


def dit_models(flags, device):
    """{name: (dtype, function that returns (model, steps))}; others are compared with the first."""
    from diffusers import DiTTransformer2DModel

    cfg = rf.Config(dim=flags.dim, depth=flags.depth, heads=flags.heads, patch=flags.patch, bs=flags.bs)
    adamw = replace(cfg, optimizer="adamw")
    rf.check(cfg)

    def diffusers_dit():
        return DiTTransformer2DModel(
            num_attention_heads=cfg.heads, attention_head_dim=cfg.dim // cfg.heads, in_channels=3,
            num_layers=cfg.depth, sample_size=cfg.shape[-1], patch_size=cfg.patch, num_embeds_ada_norm=10,
        )  # fmt: skip

    def call_diffusers(net, x, t, y):
        return net(x, timestep=1000 * t, class_labels=y).sample

    def call(net, x, t, y):
        return net(x, t, y)

    found = {}
    for name, how in settings(device).items():
        end = (cfg, device, *how, ema_in_python)
        found |= {
            f"ours, {name}": (how[0], lambda s=how: ours(rf, cfg, device, *s)),
            f"ours adamw, {name}": (how[0], lambda s=how: ours(rf, adamw, device, *s)),
            f"plain_dit, {name}": (how[0], lambda e=end: theirs(PlainDiT(cfg), call, *e)),
            f"diffusers, {name}": (
                how[0],
                lambda e=end: theirs(diffusers_dit(), call_diffusers, *e[:-1], ema_of_diffusers),
            ),
        }
    return found, cfg, {"call": call, "call_diffusers": call_diffusers}


def unet_models(flags, device):
    from diffusers import UNet2DModel

    cfg = ddpm.Config(bs=flags.unet_bs)
    widths = [cfg.width * m for m in cfg.mults]

    def diffusers_unet():
        return UNet2DModel(
            sample_size=28, in_channels=1, out_channels=1, block_out_channels=widths, layers_per_block=1,
            down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3, norm_num_groups=8,
            num_class_embeds=11, add_attention=False,
        )  # fmt: skip

    def call_diffusers(net, x, t, y):
        return net(x, timestep=1000 * t, class_labels=y).sample

    found = {}
    for name, how in settings(device).items():
        found |= {
            f"ours, {name}": (how[0], lambda s=how: ours(ddpm, cfg, device, *s)),
            f"diffusers, {name}": (
                how[0],
                lambda s=how: theirs(diffusers_unet(), call_diffusers, cfg, device, *s, ema_of_diffusers),
            ),
        }
    return found, cfg, {"call": lambda net, x, t, y: net(x, t, y), "call_diffusers": call_diffusers}


def latent_models(flags, device):
    """The same blocks on the 49 latents of an image of 28x28 and on the 196 squares of its pixels."""
    common_flags = {"dim": 128, "depth": 6, "heads": 4, "bs": flags.bs}
    latent = ld.Config(**common_flags, patch=1, shape=(4, 7, 7))
    pixels = rf.Config(**common_flags, patch=2, shape=(1, 28, 28))
    name, how = list(settings(device).items())[1]
    found = {
        f"latents, {name}": (how[0], lambda: ours(ld, latent, device, *how)),
        f"pixels, {name}": (how[0], lambda: ours(rf, pixels, device, *how)),
    }
    return found, {"latents": latent, "pixels": pixels}, {"call": lambda net, x, t, y: net(x, t, y)}


def text_models(flags, device):
    """The same blocks on 64 latents, with captions of nine words as those of digits, and with classes."""
    classes = ld.Config(dim=128, depth=6, heads=4, bs=flags.bs, patch=1, shape=(4, 8, 8))
    words = tuple(f"word{i}" for i in range(44))
    text = replace(classes, text="on", words=words, text_shape=(9,))
    name, how = list(settings(device).items())[1]
    found = {
        f"classes, {name}": (how[0], lambda: ours(ld, classes, device, *how)),
        f"text, {name}": (how[0], lambda: ours(ld, text, device, *how)),
    }
    return found, {"classes": classes, "text": text}, {"call": lambda net, x, t, y: net(x, t, y)}


# ------------------------------------------------------------------------------------------------
# Measuring


def flops(model, call, cfg):
    """Of a training step of one image: three times those of the forward pass, counted on no data."""
    model = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        y = torch.empty(1, *getattr(cfg, "text_shape", ()), dtype=torch.long)
        call(model, torch.empty(1, *cfg.shape), torch.empty(1), y)
    return 3 * counter.get_total_flops()


def matmul_rate(device, dtype):
    """FLOP/s of the product of two large square matrices, the best of a few: what this device can reach."""
    # Without hardware for it, bfloat16 is a hundred times slower at any size: a small product tells as much.
    emulated = dtype == torch.bfloat16 and not common.supports_bf16(device)
    n, best = 8192 if device.type == "cuda" else 256 if emulated else 2048, math.inf
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def give_back():
    """Memory that was freed to the system, which the allocator would keep; on Linux."""
    with contextlib.suppress(AttributeError, OSError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


class Memory:
    """Peak of memory in use since it was made, in bytes over what was in use then; None where unknown."""

    def __init__(self, device):
        self.device, self.before = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        elif device.type == "cpu" and Path("/proc/self/clear_refs").exists():
            give_back()
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
            self.before = self.read("VmRSS")

    def read(self, name):
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])

    def peak(self):
        if self.before is None:
            return None
        now = (
            torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self.read("VmHWM")
        )
        return max(0, now - self.before)


def measure(models, cfg, calls, flags, device):
    """-> [a dict of numbers for each model], after `rounds` rounds in which each has a turn."""
    running, rows, peaks = {}, [], {dtype: [] for dtype, _ in settings(device).values()}
    for name, (dtype, make) in models.items():
        try:
            torch.manual_seed(0)
            model, steps = make()
            for _ in range(2):  # compiles
                float(next(steps))
            start = time.perf_counter()
            float(next(steps))
            count = max(1, round(1 / (time.perf_counter() - start)))  # a turn takes a second or more
            call = calls["call_diffusers" if "diffusers" in name else "call"]
            shaped = cfg[name.split(",")[0]] if isinstance(cfg, dict) else cfg
            row = {"name": name, "dtype": dtype, "parameters": sum(p.numel() for p in model.parameters())}
            running[name] = row | {
                "flops": flops(model, call, shaped),
                "bs": shaped.bs,
                "steps": steps,
                "count": count,
                "ms": [],
            }
        except Exception as e:  # other code that does not compile here is no reason to stop
            print0(f"{name}: failed ({common.first_line(e)})")
            continue
        print0(f"{name}: ready")
        give_back()
    for turn in range(2 + flags.rounds):
        for kind, rates in peaks.items():
            rates.append(matmul_rate(device, kind))
        for row in running.values():
            start = time.perf_counter()
            for _ in range(row["count"]):
                loss = next(row["steps"])
            row["loss"] = float(loss)  # waits for the device
            if not math.isfinite(row["loss"]):
                raise RuntimeError(f"{row['name']}: the loss is {row['loss']}; its time means nothing")
            if turn > 1:  # in the first two, memory comes back from the system
                row["ms"].append(1e3 * (time.perf_counter() - start) / row["count"])
    for row in running.values():
        memory = Memory(device)  # in a step of its own, as looking costs time
        float(next(row["steps"]))
        row["memory"] = memory.peak()
        give_back()
        ms = statistics.median(row["ms"])
        rate = row["bs"] / ms * 1e3
        achieved, peak = rate * row["flops"], statistics.median(peaks[row["dtype"]])
        keep = {k: row[k] for k in ("name", "parameters", "loss", "memory")}
        rows.append(keep | {"ms": ms, "ms_all": row["ms"], "images_per_s": rate})
        rows[-1] |= {"gflops": achieved / 1e9, "of_peak": achieved / peak}
    print0(
        "matmul: "
        + ", ".join(f"{str(k)[6:]} {statistics.median(v) / 1e9:,.0f} GFLOP/s" for k, v in peaks.items())
    )
    return rows


def report(title, rows, pairs):
    print0(f"\n{title}")
    head = "model parameters images/s ms/step range memory GFLOP/s of-peak".split()
    print0("{:30}{:>11}{:>10}{:>9}{:>17}{:>9}{:>9}{:>9}".format(*head))
    for r in rows:
        memory = f"{r['memory'] / 2**20:,.0f} M" if r["memory"] is not None else "-"
        spread = f"[{min(r['ms_all']):.1f}, {max(r['ms_all']):.1f}]"
        print0(
            f"{r['name']:30}{r['parameters'] / 1e6:9.2f} M{r['images_per_s']:10.1f}{r['ms']:9.1f}{spread:>17}"
            f"{memory:>9}{r['gflops']:9.0f}{r['of_peak']:9.0%}"
        )
    by_name = {r["name"]: r for r in rows}
    for ours, peer in pairs:
        if ours in by_name and peer in by_name:
            ratios = [b / a for a, b in zip(by_name[ours]["ms_all"], by_name[peer]["ms_all"], strict=True)]
            spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
            print0(f"{statistics.median(ratios):5.2f} {spread} times the images/s: {ours} / {peer}")


def main():
    flags = common.parse(Config, __doc__)
    common.require_range(flags, "rounds bs unet_bs", 1)
    require(Path(flags.out).parent.is_dir(), f"--out {flags.out} is in no folder; make that first")
    device, results = common.get_device(flags.device), {}
    torch.set_float32_matmul_precision("high")
    machine = f"{common.device_name(device)}; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}"
    print0(machine)
    eager, fast = settings(device)
    if flags.only in ("all", "dit"):
        rows = measure(*dit_models(flags, device), flags, device)
        pairs = [(f"ours, {fast}", f"{p}, {eager}") for p in ("plain_dit", "diffusers")]
        pairs += [
            (f"{o}, {s}", f"{p}, {s}")
            for s in (eager, fast)
            for o in ("ours", "ours adamw")
            for p in ("plain_dit", "diffusers")
        ]
        title = (
            f"DiT of dim {flags.dim}, depth {flags.depth}, patch {flags.patch}; {flags.bs} images of 32x32x3"
        )
        report(title, rows, pairs)
        results["dit"] = rows
    if flags.only in ("all", "latent"):
        rows = measure(*latent_models(flags, device), flags, device)
        pairs = [[r["name"] for r in rows]] * (len(rows) == 2)  # one may have failed
        report(f"DiT of dim 128, depth 6; {flags.bs} images", rows, pairs)
        results["latent"] = rows
    if flags.only in ("all", "text"):
        rows = measure(*text_models(flags, device), flags, device)
        pairs = [[r["name"] for r in rows]] * (len(rows) == 2)
        report(f"DiT of dim 128, depth 6; {flags.bs} images", rows, pairs)
        results["text"] = rows
    if flags.only in ("all", "unet"):
        rows = measure(*unet_models(flags, device), flags, device)
        pairs = [(f"ours, {fast}", f"diffusers, {eager}")]
        pairs += [(f"ours, {s}", f"diffusers, {s}") for s in (eager, fast)]
        report(f"UNet; {flags.unet_bs} images of 28x28", rows, pairs)
        results["unet"] = rows
    if flags.out:
        text = json.dumps({"machine": machine, "flags": vars(flags), **results}, indent=1).encode()
        common.write_atomically(Path(flags.out), lambda f: f.write(text))


if __name__ == "__main__":
    with common.exit_on_user_error():
        main()
