"""DDPM with a UNet: noise in, digits out. One file: flags, model, method, sampler, loop.

Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), with what followed:
classifier-free guidance (Ho & Salimans 2022), the cosine schedule (Nichol & Dhariwal 2021), v-prediction
(Salimans & Ho 2022), min-SNR weights (Hang et al. 2023), zero terminal SNR (Lin et al. 2023).

    python ddpm_unet_mnist.py --dataset digits --minutes 1.5    no download; digits in under 4 minutes
    python ddpm_unet_mnist.py --minutes 6                       MNIST on a laptop
    python ddpm_unet_mnist.py --resume logs/ddpm/RUN            goes on where a run stopped
    python ddpm_unet_mnist.py --sample logs/ddpm/RUN            samples a finished run
    torchrun --standalone --nproc-per-node=2 ddpm_unet_mnist.py    same batch, 2 processes
"""

import functools
import math
import os
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common
from common import derived, need, seed_of

# ------------------------------------------------------------------------------------------------
# Flags: the only place a default lives; the comment is the help


@dataclass
class Config:
    # model
    backbone: Literal["unet", "resunet"] = "resunet"  # ConvBlocks, or ResBlocks with scale-shift conditioning
    width: int = 32  # channels of the first level
    mults: tuple[int, ...] = (1, 2, 4)  # channels of each level in units of width; each halves the resolution
    blocks: int = 1  # blocks a level, on the way down and on the way up
    attention: tuple[int, ...] = ()  # resolutions with self-attention, such as 14 7
    dropout: float = 0.0  # inside the blocks
    # method
    objective: Literal["eps", "v", "x0"] = "v"  # what the network predicts
    schedule: Literal["linear", "cosine"] = "cosine"  # of abar
    timesteps: int = 1000  # T
    min_snr: float = 0.0  # gamma of the min-SNR loss weights, usually 5; 0 = off
    zero_snr: bool = False  # rescale the schedule so that t = 1 is pure noise
    # guidance and sampling
    class_dropout: float = 0.1  # share of labels replaced by the null class; 1 = unconditional
    guidance: float = 1.5  # w in uncond + w (cond - uncond); 1 = off
    sampling_steps: int = 50  # of the T, for the pictures
    clip_x0: bool = True  # clip the sampler's estimates of x0 to [-1, 1]
    num_samples: int = 100  # images in a grid, classes in turn
    # length
    steps: int = 20_000  # optimizer steps
    minutes: float = 0.0  # stop after so many minutes of training if that is earlier; 0 = no limit
    bs: int = 48  # images a step, over all processes
    grad_accum: int = 1  # forward-backward passes that share the bs
    # data
    dataset: str = "mnist"  # mnist, cifar10, digits, or a folder or .zip of images
    data_root: str = ""  # where mnist and cifar10 are or go; default $DIFFUSION_DATA, else data/
    image_size: int = 0  # resize to this side in pixels; 0 = the dataset's own
    channels: int = 0  # 1 gray, 3 colour, 0 = the dataset's own
    flip: Literal["auto", "on", "off"] = "auto"  # mirror half of the images; auto = of cifar10 alone
    # optimizer
    lr: float = 2e-3  # peak learning rate of AdamW, falling linearly to zero
    warmup: int = 100  # steps until the peak
    weight_decay: float = 0.0  # of matrices and kernels
    grad_clip: float = 1.0  # largest gradient norm; 0 = off
    ema_decay: float = 0.9999  # of the averaged weights, after their warm-up
    # run
    out: str = ""  # parent of run folders; default $DIFFUSION_LOGS, else logs/
    seed: int = 0  # of everything random
    resume: str = ""  # RUN or RUN/checkpoints/step_X.pt to go on with
    new_code: bool = False  # with --resume: go on though script or common.py differ from the run's
    config: str = ""  # a run.yaml whose flags become the defaults
    sample: str = ""  # RUN to sample, without training
    keep: int = 2  # checkpoints to keep
    # rhythm, in steps; 0 = never (but not of log_every)
    log_every: int = 20  # read losses back and write them
    eval_every: int = 1000  # held-out loss
    sample_every: int = 5000  # pictures
    save_every: int = 1000  # checkpoint
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = the fastest there is
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = bfloat16 where it is faster
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = if the run is long enough
    channels_last: bool = True  # memory order of the feature maps
    grad_checkpoint: bool = False  # recompute blocks in the backward pass: less memory, a third slower
    # from the dataset
    shape: tuple[int, ...] = derived((1, 28, 28))
    num_classes: int = derived(10)


def check(cfg):
    """Raises UserError for values and combinations that cannot work."""
    common.in_range(cfg, "width blocks timesteps sampling_steps num_samples steps bs grad_accum", 1)
    common.in_range(cfg, "keep log_every", 1)
    common.in_range(cfg, "min_snr minutes warmup weight_decay grad_clip", 0)
    common.in_range(cfg, "eval_every sample_every save_every", 0)
    common.in_range(cfg, "dropout ema_decay class_dropout", 0, 1)
    common.positive(cfg, "lr")
    parts = cfg.grad_accum * int(os.environ.get("WORLD_SIZE", 1))
    need(cfg.bs % parts == 0, f"--bs {cfg.bs} is no multiple of --grad-accum x processes, {parts}; change it")
    levels = len(cfg.mults)
    need(levels and min(cfg.mults) >= 1, "--mults needs a number for each level; give such as --mults 1 2 4")
    side, factor = cfg.shape[-1], 2 ** (levels - 1)  # each level but the first halves the resolution
    near = max(1, round(side / factor)) * factor
    text = f"{side}x{side} does not fit {levels} levels, multiples of {factor} do"
    need(side % factor == 0, f"{text}; give --image-size {near} or fewer --mults")
    sides = [side >> i for i in range(levels)]
    need(set(cfg.attention) <= set(sides), f"--attention is at none of the levels; choose from {sides}")
    need(cfg.sampling_steps <= cfg.timesteps, "--sampling-steps is more than --timesteps; give fewer")
    blind = cfg.zero_snr and cfg.objective == "eps"
    need(not blind, "--zero-snr: at t = 1 eps says nothing; use --objective v")
    need(cfg.guidance == 1 or cfg.class_dropout > 0, "--guidance needs --class-dropout; or give --guidance 1")


# ------------------------------------------------------------------------------------------------
# Model


def norm(channels):
    return nn.GroupNorm(math.gcd(8, channels), channels)


class ConvBlock(nn.Module):
    """Two convolutions; the embedding of time and class is added in between."""

    def __init__(self, cin, cout, emb, dropout):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(cin, cout, 3, padding=1), norm(cout)
        self.conv2, self.norm2 = nn.Conv2d(cout, cout, 3, padding=1), norm(cout)
        self.emb, self.dropout = nn.Linear(emb, cout), nn.Dropout(dropout)

    def forward(self, x, emb):
        h = F.silu(self.norm1(self.conv1(x))) + self.emb(emb)[:, :, None, None]
        return F.silu(self.norm2(self.conv2(self.dropout(h))))


class ResBlock(nn.Module):
    """Residual block; the embedding scales and shifts the second norm (Dhariwal & Nichol 2021, sec. 3)."""

    def __init__(self, cin, cout, emb, dropout):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.emb, self.dropout = nn.Linear(emb, 2 * cout), nn.Dropout(dropout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # the block starts as its skip connection
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, added to it."""

    def __init__(self, channels):
        super().__init__()
        self.heads = max(1, channels // 64)
        self.norm, self.qkv = norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each [B, heads, HW, C / heads]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class ClassEmbedding(nn.Embedding):
    """Rows of a table by products with one-hot rows: the gradient of a look-up may be added up in no fixed
    order (compiled, and on a GPU), and two equal runs would differ."""

    def forward(self, y):
        with torch.autocast("cuda" if y.is_cuda else "cpu", enabled=False):
            return F.one_hot(y, self.num_embeddings).float() @ self.weight


class UNet(nn.Module):
    """model(x [B, C, H, W], t [B] in [0, 1], y int64 [B]) -> [B, C, H, W]; y = num_classes is no class."""

    def __init__(self, cfg):
        super().__init__()
        C, side, widths = cfg.shape[0], cfg.shape[-1], [cfg.width * m for m in cfg.mults]
        emb = 4 * cfg.width
        self.time_dim, self.grad_checkpoint = 2 * cfg.width, cfg.grad_checkpoint
        self.time = nn.Sequential(nn.Linear(self.time_dim, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = ClassEmbedding(cfg.num_classes + 1, emb)

        def stage(cin, cout, level):  # a block, and attention if asked for at this resolution
            block = {"unet": ConvBlock, "resunet": ResBlock}[cfg.backbone](cin, cout, emb, cfg.dropout)
            return nn.ModuleList([block] + [Attention(cout)] * (side >> level in cfg.attention))

        self.stem = nn.Conv2d(C, widths[0], 3, padding=1)
        self.down, self.up, now = nn.ModuleList(), nn.ModuleList(), widths[0]
        for level, w in enumerate(widths):
            cins = [now] + [w] * (cfg.blocks - 1)
            self.down.append(nn.ModuleList(stage(c, w, level) for c in cins))
            now = w
        self.middle = stage(now, now, len(widths) - 1)
        for level, w in reversed(list(enumerate(widths))):  # each block takes a skip of w channels
            cins = [now + w] + [2 * w] * (cfg.blocks - 1)
            self.up.append(nn.ModuleList(stage(c, w, level) for c in cins))
            now = w
        self.head = nn.Sequential(norm(now), nn.SiLU(), nn.Conv2d(now, C, 3, padding=1))
        nn.init.zeros_(self.head[-1].weight)  # the first prediction is zero
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, x, t, y):
        emb = F.silu(self.time(common.time_embedding(t, self.time_dim)) + self.label(y))

        def run(stage, h):
            def body(h):
                h = stage[0](h, emb)
                return stage[1](h) if len(stage) > 1 else h

            recompute = self.grad_checkpoint and self.training
            return checkpoint(body, h, use_reentrant=False) if recompute else body(h)

        h, skips = self.stem(x), []
        for i, level in enumerate(self.down):
            h = F.avg_pool2d(h, 2) if i else h
            for stage in level:
                h = run(stage, h)
                skips.append(h)
        h = run(self.middle, h)
        for i, level in enumerate(self.up):
            h = F.interpolate(h, scale_factor=2.0) if i else h
            for stage in level:
                h = run(stage, torch.cat([h, skips.pop()], dim=1))
        return self.head(h)


def build_model(cfg):
    return UNet(cfg)


# ------------------------------------------------------------------------------------------------
# Method: x_t = alpha x0 + sigma eps with alpha = sqrt(abar_k), sigma = sqrt(1 - abar_k), k = round(t T).
# A new idea usually changes only this section.


@functools.lru_cache
def abar_table(schedule, T, zero_snr, device):
    """abar_0 = 1, abar_1, ..., abar_T as float64 [T + 1]."""
    k = torch.arange(T + 1, dtype=torch.float64)
    if schedule == "linear":  # Ho et al. 2020, sec. 4; scaled so that any T ends at the same noise
        betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    else:  # Nichol & Dhariwal 2021, eq. 17
        f = torch.cos((k / T + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    abar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas.clamp(max=0.999), 0)])
    if zero_snr:  # Lin et al. 2023, algorithm 1: shift and scale sqrt(abar) so that it ends at 0
        root = abar.sqrt()
        root[1:] = (root[1:] - root[-1]) * root[1] / (root[1] - root[-1])
        abar = root.square()
    return abar.to(device, torch.float32 if device.type == "mps" else torch.float64)


def path(t, cfg):
    """t [B] in [0, 1] -> (alpha, sigma), each [B] and of t's dtype."""
    abar = abar_table(cfg.schedule, cfg.timesteps, cfg.zero_snr, t.device)
    abar = abar[(t * cfg.timesteps).round().long()]
    return abar.sqrt().to(t.dtype), (1 - abar).sqrt().to(t.dtype)


def to_x0_eps(out, x, alpha, sigma, objective):
    """The network's output at x = alpha x0 + sigma eps -> (x0, eps); alpha, sigma [B, 1, 1, 1]."""
    if objective == "eps":
        return (x - sigma * out) / alpha, out
    if objective == "x0":
        return out, (x - alpha * out) / sigma
    return alpha * x - sigma * out, sigma * x + alpha * out  # v = alpha eps - sigma x0


def loss_per_sample(model, x0, y, t, eps, cfg):
    """Squared error of the prediction, [B]."""
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in path(t, cfg))
    target = {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0}[cfg.objective]
    loss = (model(alpha * x0 + sigma * eps, t, y).float() - target).square().mean((1, 2, 3))
    if cfg.min_snr:  # Hang et al. 2023, sec. 3.4: min(snr, gamma) on x0, in the network's own coordinates
        snr = (alpha / sigma).square().flatten()
        loss = loss * snr.clamp(max=cfg.min_snr) / {"eps": snr, "v": snr + 1, "x0": 1}[cfg.objective]
    return loss


def predict(model, x, t, y, cfg, guidance=1.0):
    """What the network says at x [B, C, H, W], t [B], y [B], as (x0, eps).

    Guidance (Ho & Salimans 2022, eq. 6; here w = 1 is off) takes one call, batched with the null class.
    """
    null = torch.full_like(y, cfg.num_classes)
    if cfg.class_dropout == 1:  # trained unconditionally: the labels mean nothing
        y, guidance = null, 1.0
    if guidance == 1:
        out = model(x, t, y).to(x.dtype)
    else:
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).to(x.dtype)
        cond, uncond = both.chunk(2)
        out = uncond + guidance * (cond - uncond)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in path(t, cfg))
    return to_x0_eps(out, x, alpha, sigma, cfg.objective)


def sample_shape(cfg):
    return cfg.shape


def decode(x, cfg):
    return x


# ------------------------------------------------------------------------------------------------
# Sampler


def ancestral_step(x, x0, t, s, noise, cfg):
    """x_t [B, C, H, W] and an estimate of x0 -> x_s, for times t > s, each [B] (Ho et al. 2020, eq. 6, 7)."""
    (a_t, s_t), (a_s, s_s) = ([c.view(-1, 1, 1, 1) for c in path(u, cfg)] for u in (t, s))
    eps = (x - a_t * x0) / s_t
    tau = s_s / s_t * (s_t**2 - (a_t / a_s) ** 2 * s_s**2).clamp(min=0).sqrt()  # the posterior's deviation
    return a_s * x0 + (s_s**2 - tau**2).clamp(min=0).sqrt() * eps + tau * noise


@torch.no_grad()
def sample(model, y, cfg, generator, steps, frames=24):
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over `steps` of the T times, from noise to images.

    y int64 [N] -> (images [N, C, H, W] in [-1, 1], history: about `frames` of the x0 estimates, on the CPU).
    """
    x, history = torch.randn(len(y), *sample_shape(cfg), generator=generator, device=y.device), []
    ts = torch.linspace(cfg.timesteps, 0, steps + 1).round().to(y.device) / cfg.timesteps
    for i in range(steps):
        t, s = ts[i].expand(len(y)), ts[i + 1].expand(len(y))
        x0, _ = predict(model, x, t, y, cfg, cfg.guidance)
        common.check_finite(x0)  # clipping would hide it
        x0 = x0.clamp(-1, 1) if cfg.clip_x0 else x0
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        x = ancestral_step(x, x0, t, s, noise, cfg)
        if i * frames // steps != (i - 1) * frames // steps or i == steps - 1:
            history.append(decode(x0, cfg).cpu())
    return decode(x, cfg).clamp(-1, 1), history


def sample_classes(model, cfg, device):
    """cfg.num_samples images, classes in turn; every process draws them all, the first writes them."""
    y = torch.arange(cfg.num_samples, device=device) % cfg.num_classes
    generator = torch.Generator(device).manual_seed(seed_of(cfg.seed, "sample"))
    return sample(model, y, cfg, generator, cfg.sampling_steps)


# ------------------------------------------------------------------------------------------------
# Training loop


@torch.no_grad()
def evaluate(model, data, cfg, device, rank, world):
    """-> (losses, times [n]) of held-out images: noise and even times are the same at every call."""
    n, generator = len(data.labels), torch.Generator().manual_seed(seed_of("evaluate"))
    t = (torch.arange(1, n + 1) * cfg.timesteps / n).ceil() / cfg.timesteps
    eps = torch.randn(n, *cfg.shape, generator=generator)
    losses = torch.zeros(n, device=device)  # those of the other processes stay 0
    for i in range(rank, n, 256 * world):
        rows = torch.arange(i, min(i + 256 * world, n), world)
        x0, y = data.images[rows].to(device).float() / 127.5 - 1, data.labels[rows].to(device)
        y = torch.full_like(y, cfg.num_classes) if cfg.class_dropout == 1 else y
        losses[rows] = loss_per_sample(model, x0, y, t[rows].to(device), eps[rows].to(device), cfg)
    return losses, t


def train(cfg):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = common.pick_device(cfg.device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    load = functools.partial(common.load_dataset, cfg.dataset, cfg.data_root)
    data = load("train", cfg.image_size, cfg.channels)
    held_out = load("test", data.images.shape[-1], data.images.shape[1])
    cfg = replace(cfg, shape=tuple(data.images.shape[1:]), num_classes=len(data.classes))
    flip = cfg.flip == "on" or (cfg.flip == "auto" and cfg.dataset == "cifar10")
    cfg = replace(cfg, flip="on" if flip else "off")
    check(cfg)

    fast = common.device_facts(device)[1]
    dtype = getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if fast else "float32")
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    torch.set_float32_matmul_precision("high")

    torch.manual_seed(seed_of(cfg.seed, "init"))
    model = build_model(cfg).to(device, memory_format=layout)  # plain: counted, averaged, saved, sampled
    ema = common.EMA(model, cfg.ema_decay)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == m] for m in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, cfg.lr, (0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)
    owned = sorted(id(p) for g in optimizer.param_groups for p in g["params"])
    assert owned == sorted(map(id, model.parameters())), "a parameter is in no optimizer group, or in two"

    run, clock = common.Run(cfg, __file__, "ddpm", cfg.backbone, rank), common.Clock(device)
    run.restore(model, ema, optimizer, clock)
    run.describe(device, data, held_out, model, dtype=str(dtype)[6:], processes=world)
    batches = common.Batches(data, cfg.bs, cfg.seed, device, rank, world, flip)
    held_out = common.evaluation_set(held_out)

    def micro_batches(step):
        """[(x0, y, t, eps), ...] of this rank. Noise and times are drawn for the whole batch, from (seed,
        step), so that neither resuming nor the number of processes changes them."""
        x0, y = batches(step)
        generator = torch.Generator(device).manual_seed(seed_of(cfg.seed, "noise", step))
        eps = torch.randn(cfg.bs, *cfg.shape, generator=generator, device=device)[batches.rank_slice]
        u = torch.rand(2, cfg.bs, generator=generator, device=device)[:, batches.rank_slice]
        t = (u[0] * cfg.timesteps).floor().add(1) / cfg.timesteps
        y = torch.where(u[1] < cfg.class_dropout, cfg.num_classes, y)
        torch.manual_seed(seed_of(cfg.seed, "dropout", step, rank))
        x0 = x0.contiguous(memory_format=layout)
        return list(zip(*(v.chunk(cfg.grad_accum) for v in (x0, y, t, eps)), strict=True))

    def backward(net, x0, y, t, eps):
        """Adds the gradient of a micro-batch's part of the loss to the parameters; returns that part."""
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_per_sample(net, x0, y, t, eps, cfg).mean() / cfg.grad_accum
        loss.backward()
        return loss.detach()

    # A bug in evaluating or sampling shows now, not after hours.
    few = replace(held_out, images=held_out.images[:8], labels=held_out.labels[:8])
    evaluate(ema.model, few, cfg, device, rank, world)
    with common.harmless("a trial picture"):
        sample_classes(ema.model, replace(cfg, num_samples=2, sampling_steps=1), device)

    step, first, seconds = run.step, run.step, clock.seconds["train"]
    net = common.compiled(model, lambda net: backward(net, *micro_batches(step)[0]), cfg, device)
    model.zero_grad()
    net = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    clock.lap("compile")

    def done():  # the larger share of the two budgets, in [0, 1]
        return min(1.0, max(step / cfg.steps, seconds / (60 * cfg.minutes) if cfg.minutes else 0.0))

    def due(every):
        return every > 0 and (step % every == 0 or done() >= 1)

    stop = False
    while done() < 1 and not stop:
        lr = cfg.lr * min(1.0, (step + 1) / (cfg.warmup + 1)) * (1 - done())
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for i, part in enumerate(micro_batches(step)):
            if world > 1:  # processes exchange gradients once, in the last
                net.require_backward_grad_sync = i == cfg.grad_accum - 1
            loss += backward(net, *part)
        if step == first and (dead := [n for n, p in model.named_parameters() if p.grad is None]):
            raise RuntimeError(f"no gradient reaches {', '.join(dead[:3])}; is the module used in forward()?")
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        if world > 1:
            dist.all_reduce(loss)
            loss /= world
        finite = loss.isfinite() & grad_norm.isfinite()
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # fused: skips by itself, without waiting
            optimizer.found_inf = (~finite).float()
            optimizer.step()
        elif finite:  # waits for the device
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, (stop, seconds) = step + 1, run.agree(clock.training())
        ema.update(model, step)
        run.record(step, loss=loss, grad_norm=grad_norm, lr=lr, seconds=seconds)

        save = stop or done() >= 1 or due(cfg.save_every)
        if save or due(cfg.log_every) or due(cfg.eval_every):
            run.flush(done())
        if due(cfg.eval_every):
            with clock.apart("evaluate"):
                run.validate(step, *evaluate(ema.model, held_out, cfg, device, rank, world))
        if save:
            with clock.apart("save"):
                run.save(model, ema, optimizer, seconds)
        if due(cfg.sample_every):
            with clock.apart("sample"), common.harmless("the pictures"):
                run.pictures(f"step_{step:08d}", *sample_classes(ema.model, cfg, device))
    run.close(clock, finished=done() >= 1)


def sample_run(cfg):
    """--sample RUN: a grid and a GIF from the averaged weights of the newest checkpoint."""
    check(cfg)
    device, folder = common.pick_device(cfg.device), common.find_run(cfg.sample) / "samples"
    state = common.newest_checkpoint(cfg.sample)
    model = build_model(cfg).to(device).eval()
    model.load_state_dict(state["ema"])
    name = f"step_{state['step']:08d}_steps{cfg.sampling_steps}_w{cfg.guidance:g}_seed{cfg.seed}"
    common.save_pictures(folder / name, *sample_classes(model, cfg, device))
    print(f"wrote {folder / name}.png and .gif")


if __name__ == "__main__":
    with common.one_line_errors():
        cfg = common.parse(Config, __doc__)
        sample_run(cfg) if cfg.sample else train(cfg)
