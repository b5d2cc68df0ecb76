"""DDPM with a UNet on MNIST.

Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), with later
improvements: classifier-free guidance (Ho & Salimans 2022), the cosine schedule (Nichol & Dhariwal 2021),
v-prediction (Salimans & Ho 2022), and the Muon optimizer.
Time t runs from 0 (data) to 1 (noise); timestep k of T is t = k / T.

    python ddpm_unet_mnist.py --dataset digits --minutes 1.5       no download, digits in under 4 minutes
    python ddpm_unet_mnist.py --minutes 3                          MNIST on a laptop
    python ddpm_unet_mnist.py --resume logs/ddpm/RUN               continues a run
    torchrun --standalone --nproc-per-node=2 ddpm_unet_mnist.py    the same batch in 2 processes
    python ddim_sample.py logs/ddpm/RUN                            samples a run
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
from common import derive_seed, derived, require, resumable

# ------------------------------------------------------------------------------------------------
# Flags: the only place a default lives; the comments are the help


@dataclass
class Config:
    # model
    backbone: Literal["unet", "resunet"] = "resunet"  # plain blocks, or residual ones with scale and shift
    width: int = 32  # channels of the first level
    mults: tuple[int, ...] = (1, 2, 4)  # channels of each level divided by width; each halves the resolution
    blocks: int = 1  # blocks per level, on the way down and on the way up
    attention: tuple[int, ...] = ()  # resolutions with self-attention, such as 14 7
    dropout: float = 0.0  # dropout rate in the blocks
    # method
    objective: Literal["eps", "v", "x0"] = "v"  # what the network predicts
    schedule: Literal["linear", "cosine"] = "cosine"  # noise schedule
    timesteps: int = 1000  # number of timesteps T
    class_dropout: float = 0.1  # fraction of labels replaced by the null class; 1 = unconditional
    # guidance and sampling
    guidance: float = 1.5  # guidance scale w of uncond + w (cond - uncond); 1 = off
    sampling_steps: int = 50  # timesteps used, of the T
    clip_x0: bool = True  # clip the estimates of x0 to [-1, 1]
    num_samples: int = resumable(100)  # images per grid, all classes in turn
    # length
    steps: int = resumable(20_000)  # optimizer steps
    minutes: float = resumable(0.0)  # minutes of training, if they end before the steps; 0 = no limit
    bs: int = 48  # global batch size, whatever the number of processes
    grad_accum: int = 1  # micro-batches per step
    # data
    dataset: str = resumable("mnist")  # mnist, cifar10, digits, or a folder or .zip of images
    data_root: str = resumable("")  # folder of mnist and cifar10; default $DIFFUSION_DATA, else data/
    image_size: int = 0  # side in pixels that images are resized to; 0 = the dataset's own
    channels: int = 0  # 1 gray, 3 colour, 0 = the dataset's own
    flip: Literal["auto", "on", "off"] = "auto"  # random horizontal flips; auto = only for cifar10
    # optimizer
    lr: float = 4e-3  # peak learning rate of AdamW, decayed linearly to zero
    muon_lr: float = 0.02  # peak learning rate of Muon, which has the 3x3 kernels of blocks
    warmup: int = 20  # warmup steps
    weight_decay: float = 0.0  # weight decay of matrices and kernels
    grad_clip: float = 1.0  # maximum gradient norm; 0 = off
    ema_decay: float = 0.9999  # decay of the EMA weights; lower early in training
    # run
    out: str = resumable("")  # parent folder of runs; default $DIFFUSION_LOGS, else logs/
    seed: int = 0  # random seed
    resume: str = ""  # RUN or RUN/checkpoints/step_X.pt to continue
    config: str = ""  # run.yaml whose flags become the defaults
    keep: int = resumable(2)  # newest checkpoints to keep
    keep_every: int = resumable(0)  # steps between checkpoints to keep forever (for --guide); 0 = none
    # intervals in steps; 0 = never
    log_every: int = resumable(20)  # steps between lines of loss and speed (at least 1)
    eval_every: int = resumable(1000)  # steps between evaluations of the held-out loss
    sample_every: int = resumable(5000)  # steps between grids of samples
    save_every: int = resumable(1000)  # steps between checkpoints
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = resumable("auto")  # auto = the fastest available
    dtype: Literal["auto", "float32", "bfloat16"] = resumable("auto")  # auto = bfloat16 if supported
    compile: Literal["auto", "on", "off"] = resumable("auto")  # torch.compile; auto = if the run is long
    grad_checkpoint: bool = resumable(False)  # recompute blocks in backward: less memory, a third slower
    # derived from the dataset
    shape: tuple[int, ...] = derived((1, 28, 28))
    classes: tuple[str, ...] = derived(tuple("0123456789"))


def check(cfg):
    """Raises UserError for values that cannot work."""
    common.require_range(cfg, "timesteps sampling_steps num_samples steps bs grad_accum keep log_every", 1)
    common.require_range(cfg, "minutes warmup weight_decay grad_clip guidance", 0)
    common.require_range(cfg, "eval_every sample_every save_every keep_every", 0)
    common.require_range(cfg, "ema_decay class_dropout", 0, 1)
    common.require_range(cfg, "lr muon_lr", 0, exclude_low=True)
    parts = cfg.grad_accum * int(os.environ.get("WORLD_SIZE", 1))
    text = f"--bs ({cfg.bs}) must be divisible by --grad-accum x number of processes ({parts})"
    require(cfg.bs % parts == 0, text)
    text = f"--sampling-steps ({cfg.sampling_steps}) must be at most --timesteps ({cfg.timesteps})"
    require(cfg.sampling_steps <= cfg.timesteps, text)
    guided = cfg.guidance == 1 or cfg.class_dropout > 0
    require(guided, "--guidance needs --class-dropout above 0; or use --guidance 1")
    check_model(cfg)


# ------------------------------------------------------------------------------------------------
# Model


def check_model(cfg):
    """Raises UserError for sizes that do not fit."""
    common.require_range(cfg, "width blocks", 1)
    common.require_range(cfg, "dropout", 0, 1)
    levels = len(cfg.mults)
    require(levels and min(cfg.mults) >= 1, "--mults must be a positive number per level, such as 1 2 4")
    side, factor = cfg.shape[-1], 2 ** (levels - 1)  # each level but the first halves the resolution
    near = max(1, round(side / factor)) * factor
    text = f"the image side ({side}) must be divisible by {factor} for {levels} levels"
    require(side % factor == 0, f"{text}; use --image-size {near} or fewer --mults")
    sides = [side >> i for i in range(levels)]
    require(set(cfg.attention) <= set(sides), f"--attention must be resolutions of the levels, {sides}")


class Norm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel. On a CPU, a step takes 0.7 of its time with GroupNorm."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """Two convolutions, with the embedding of time and class added in between."""

    def __init__(self, cin, cout, emb, dropout):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(cin, cout, 3, padding=1), Norm(cout)
        self.conv2, self.norm2 = nn.Conv2d(cout, cout, 3, padding=1), Norm(cout)
        self.emb, self.dropout = nn.Linear(emb, cout), nn.Dropout(dropout)

    def forward(self, x, emb):
        h = F.silu(self.norm1(self.conv1(x))) + self.emb(emb)[:, :, None, None]
        return F.silu(self.norm2(self.conv2(self.dropout(h))))


class ResBlock(nn.Module):
    """Residual block; the embedding scales and shifts the second norm (Dhariwal & Nichol 2021, sec. 3)."""

    def __init__(self, cin, cout, emb, dropout):
        super().__init__()
        self.norm1, self.conv1 = Norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = Norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.emb, self.dropout = nn.Linear(emb, 2 * cout), nn.Dropout(dropout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # the block starts as its skip connection
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(self.dropout(h))


def upsample(x):
    """[B, C, H, W] -> [B, C, 2H, 2W], each pixel four times.

    Not F.interpolate: its gradient is summed in no fixed order when compiled.
    """
    return x.permute(0, 2, 3, 1).repeat_interleave(2, 1).repeat_interleave(2, 2).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Residual self-attention over the pixels of a feature map; called like a block, it ignores emb."""

    def __init__(self, channels):
        super().__init__()
        most = max(1, channels // 64)  # heads of 64 channels or more
        self.heads = next(h for h in range(most, 0, -1) if channels % h == 0)
        self.norm, self.qkv = Norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x, emb=None):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each [B, heads, HW, C / heads]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(-1, -2).reshape(B, C, H, W))


class UNet(nn.Module):
    """model(x [B, C, H, W], t [B] in [0, 1], y int64 [B]) -> [B, C, H, W]."""

    def __init__(self, cfg):
        super().__init__()
        C, side, widths = cfg.shape[0], cfg.shape[-1], [cfg.width * m for m in cfg.mults]
        emb = 4 * cfg.width
        self.t_dim, self.grad_checkpoint = 2 * cfg.width, cfg.grad_checkpoint
        self.t_embed = nn.Sequential(nn.Linear(self.t_dim, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.y_embed = nn.Linear(len(cfg.classes) + 1, emb, bias=False)  # the last is the null class
        nn.init.normal_(self.y_embed.weight)

        def stage(cin, cout, level):  # a block, with attention at the chosen resolutions
            block = {"unet": ConvBlock, "resunet": ResBlock}[cfg.backbone](cin, cout, emb, cfg.dropout)
            return nn.ModuleList([block] + [Attention(cout)] * (side >> level in cfg.attention))

        self.stem = nn.Conv2d(C, widths[0], 3, padding=1)
        self.down, self.narrow, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        now = widths[0]
        for level, w in enumerate(widths):
            cins = [now] + [w] * (cfg.blocks - 1)
            self.down.append(nn.ModuleList(stage(c, w, level) for c in cins))
            now = w
        self.mid = stage(now, now, len(widths) - 1)
        for level, w in reversed(list(enumerate(widths))):
            self.narrow.append(nn.Conv2d(now, w, 1) if now != w else nn.Identity())
            self.up.append(nn.ModuleList(stage(w, w, level) for _ in range(cfg.blocks)))
            now = w
        self.head = nn.Sequential(Norm(now), nn.SiLU(), nn.Conv2d(now, C, 3, padding=1))
        nn.init.zeros_(self.head[-1].weight)  # the first prediction is zero
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, x, t, y):
        # One-hot, not nn.Embedding: a lookup's gradient is summed in no fixed order when compiled.
        y = F.one_hot(y, self.y_embed.in_features).float()
        emb = F.silu(self.t_embed(common.time_embedding(t, self.t_dim)) + self.y_embed(y))
        recompute = self.grad_checkpoint and self.training

        def run(stage, h):
            for layer in stage:
                h = checkpoint(layer, h, emb, use_reentrant=False) if recompute else layer(h, emb)
            return h

        h, skips = self.stem(x), []
        for i, level in enumerate(self.down):
            h = F.avg_pool2d(h, 2) if i else h
            for stage in level:
                h = run(stage, h)
                skips.append(h)
        h = run(self.mid, h)
        for i, level in enumerate(self.up):
            h = self.narrow[i](h)
            h = upsample(h) if i else h
            for stage in level:  # skips are added: concatenated, they make a step a quarter slower
                h = run(stage, h + skips.pop())
        return self.head(h)


build_model = UNet


# ------------------------------------------------------------------------------------------------
# Method: x_t = alpha x0 + sigma eps with alpha = sqrt(abar_k), sigma = sqrt(1 - abar_k), k = round(t T).
# A new idea usually changes only this section.

METHOD = "ddpm"


@functools.lru_cache
def abar_table(schedule, T, device):
    """abar_0 = 1, abar_1, ..., abar_T as float64 [T + 1]."""
    k = torch.arange(T + 1, dtype=torch.float64)
    if schedule == "linear":  # Ho et al. 2020, sec. 4; with other T, one step replaces 1000 / T of theirs
        betas = 1 - (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)) ** (1000 / T)
    else:  # Nichol & Dhariwal 2021, eq. 17
        f = torch.cos((k / T + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    abar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)])
    return abar.to(device, torch.float32 if device.type == "mps" else torch.float64)


def path(t, cfg):
    """t [B] in [0, 1] -> (alpha, sigma), each [B], in the dtype of t."""
    abar = abar_table(cfg.schedule, cfg.timesteps, t.device)[(t * cfg.timesteps).round().long()]
    return abar.sqrt().to(t.dtype), (1 - abar).sqrt().to(t.dtype)


def sample_t(u, cfg):
    """u [B], uniform in [0, 1) -> times [B] of training, k / T for k = 1, ..., T.

    Stratified: time i lies in the i-th of B equal parts, so that every batch covers all times and the
    gradient varies less (Kingma et al. 2021, arXiv:2107.00630, sec. I.1).
    """
    u = (torch.arange(len(u), device=u.device) + u) / len(u)
    return ((u * cfg.timesteps).floor() + 1).clamp(max=cfg.timesteps) / cfg.timesteps


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
    return (model(alpha * x0 + sigma * eps, t, y).float() - target).square().mean((1, 2, 3))


def null(y, cfg):
    """y without its condition: the null class."""
    return torch.full_like(y, len(cfg.classes))


def conditions(names, cfg):
    """Names or numbers of classes -> y int64 [len(names)]; no names: each class once. Raises UserError."""
    return common.class_indices(names, cfg.classes)


def predict(model, x, t, y, cfg, guidance=1.0, s=None):
    """The network's estimate at x [B, C, H, W], t [B] as (x0, eps).

    Guidance (Ho & Salimans 2022, eq. 6, with w = 1 meaning off) is one call on a doubled batch. s, the time
    that the step goes to, is for flow maps.
    """
    if cfg.class_dropout == 1:  # unconditional
        y, guidance = null(y, cfg), 1.0
    if guidance == 1:
        out = model(x, t, y).to(x.dtype)
    else:
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null(y, cfg)])).to(x.dtype)
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
    sigma_up = s_s / s_t * (s_t**2 - (a_t / a_s) ** 2 * s_s**2).clamp(min=0).sqrt()  # of the posterior
    return a_s * x0 + (s_s**2 - sigma_up**2).clamp(min=0).sqrt() * eps + sigma_up * noise


@torch.no_grad()
def sample(model, x, y, cfg, noise=None, frames=24):
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over cfg.sampling_steps of the T timesteps.

    x: standard normal noise [N, C, H, W]; noise() returns more of it. Returns (samples [N, C, H, W],
    trajectory: a list of about `frames` estimates of x0).
    """
    steps, trajectory = cfg.sampling_steps, []
    ts = torch.linspace(cfg.timesteps, 0, steps + 1).round().to(x.device) / cfg.timesteps
    x = x * math.hypot(*(float(c) for c in path(ts[:1], cfg)))  # the path's own noise
    for i in range(steps):
        t, s = ts[i].expand(len(x)), ts[i + 1].expand(len(x))
        x0, _ = predict(model, x, t, y, cfg, cfg.guidance, s)
        common.check_finite(x0)  # clipping would hide it
        x0 = x0.clamp(-1, 1) if cfg.clip_x0 else x0
        x = ancestral_step(x, x0, t, s, noise() if noise else torch.randn_like(x), cfg)
        if i * frames // steps != (i - 1) * frames // steps or i == steps - 1:
            trajectory.append(x0)
    return x, trajectory


def sample_grid(model, cfg, device):
    """cfg.num_samples images of all conditions in turn -> (images in [-1, 1], trajectory of images)."""
    y = conditions([], cfg).to(device)
    y = y[torch.arange(cfg.num_samples, device=device) % len(y)]
    generator = torch.Generator(device).manual_seed(derive_seed(cfg.seed, "sample"))
    noise = functools.partial(torch.randn, len(y), *sample_shape(cfg), generator=generator, device=device)
    x, trajectory = sample(model, noise(), y, cfg, noise)
    return decode(x, cfg), [decode(v, cfg) for v in trajectory]


# ------------------------------------------------------------------------------------------------
# Optimizer: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for 3x3 kernels, AdamW for the rest


def newton_schulz(x):
    """[n, rows, columns] -> approximately U V^T of each matrix U S V^T.

    Each step applies a polynomial of degree 5 to the singular values, optimal for the range that the last
    step left (Amsel et al. 2025, arXiv:2505.16932): 0.01 to 1 end between 0.71 and 1.27. A step maps x to
    p x, and s = x x^T to p s p, so the product with x, which has the longer side, is left to the end.
    """
    x = x / (1.02 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # norms below 1, even after rounding
    eye = torch.eye(x.shape[1], device=x.device)
    s, product = x @ x.mT, eye
    for a, b, c in ((8.0934, -23.6206, 17.4463), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)):
        p = a * eye + b * s + c * s @ s
        s, product = p @ s @ p, p @ product
    return product @ x


class Muon(torch.optim.AdamW):
    """AdamW, except that groups with `momentum` are updated by their momentum, orthogonalized.

    A kernel is a matrix with a row per output channel. Kernels of equal shape are stacked; the state of the
    first holds the momentum of all. A step for which `found_inf` is 1 changes nothing, as in fused AdamW, and
    does not wait for the device.
    """

    @torch.no_grad()
    def step(self):
        for group in (g for g in self.param_groups if "momentum" in g):
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                g = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
                beta, state = group["momentum"], self.state[params[0]]
                if not state:  # "step" because AdamW reads it when it loads
                    state |= {"momentum": torch.zeros_like(g), "step": torch.zeros(())}
                m = state["momentum"].lerp(g, 1 - beta)
                update = newton_schulz(g.lerp(m, beta).flatten(2)).view_as(g)  # Nesterov momentum
                update += group["weight_decay"] * torch.stack(params)
                state["momentum"] = torch.where(self.found_inf > 0, state["momentum"], m)
                update = torch.where(self.found_inf > 0, 0.0, update)
                torch._foreach_add_(params, list(update), alpha=-group["lr"])
            for p in group["params"]:
                p.grad = None  # AdamW skips parameters without gradient
        super().step()


def make_optimizer(model, cfg):
    """Groups for Muon, and for AdamW with and without weight decay."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    named = [(p, "conv" in n and p.ndim == 4) for n, p in trained.items()]
    groups = [
        {"params": [p for p, kernel in named if kernel], "base_lr": cfg.muon_lr, "momentum": 0.95},
        {"params": [p for p, kernel in named if not kernel and p.ndim > 1], "base_lr": cfg.lr},
        {"params": [p for p, _ in named if p.ndim < 2], "base_lr": cfg.lr, "weight_decay": 0.0},
    ]
    return Muon(groups, cfg.lr, (0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)


# ------------------------------------------------------------------------------------------------
# Training loop


@torch.no_grad()
def evaluate(model, data, cfg, device, rank, world):
    """(losses, times [n]) of held-out images. The noise and the evenly spaced times are always the same."""
    n, generator = len(data.labels), torch.manual_seed(derive_seed("evaluate"))
    t = (torch.arange(1, n + 1) * cfg.timesteps / n).ceil() / cfg.timesteps
    eps = torch.randn(n, *cfg.shape, generator=generator)
    losses = torch.zeros(n, device=device)  # other ranks' losses stay 0
    size = min(128 * world, 4 * cfg.bs // cfg.grad_accum)  # without gradients, four times as many fit
    for i in range(rank, n, size):
        part = torch.arange(i, min(i + size, n), world)
        x0, y = data.images[part].to(device).float() / 127.5 - 1, data.labels[part].to(device)
        y = null(y, cfg) if cfg.class_dropout == 1 else y
        loss = loss_per_sample(model, x0, y, t[part].to(device), eps[part].to(device), cfg)
        losses[part] = loss.view(len(part))
    return losses, t


def train(cfg):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = common.get_device(cfg.device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    run, timer = common.Run(cfg, __file__, rank), common.Timer(device)

    # Data
    load = functools.partial(common.load_dataset, cfg.dataset, cfg.data_root)
    data = load("train", cfg.image_size, cfg.channels)
    held_out = load("test", data.images.shape[-1], data.images.shape[1])
    flip = cfg.flip == "on" or (cfg.flip == "auto" and cfg.dataset == "cifar10")
    cfg = replace(cfg, shape=tuple(data.images.shape[1:]), classes=tuple(data.classes))
    cfg = replace(cfg, flip="on" if flip else "off")
    check(cfg)
    batches = common.Batches(data, cfg.bs, cfg.seed, device, rank, world, flip)
    timer.lap("load")

    # Model
    common.seed_all(cfg.seed, "init")
    model = build_model(cfg).to(device, memory_format=torch.channels_last)
    ema = common.EMA(model, cfg.ema_decay)
    # Compiled, a step takes 18 ms for 23 on an H100 after half a minute; on a CPU, a tenth longer.
    worthwhile = device.type == "cuda" and cfg.steps >= 6000 and not 0 < cfg.minutes < 5
    dtype, _ = common.prepare(model, cfg, worthwhile)
    # The average is evaluated and sampled, in any batch size: only a long run recovers compiling it, too.
    worthwhile = worthwhile and cfg.steps >= 20_000 and not 0 < cfg.minutes < 30
    common.prepare(ema.model, cfg, worthwhile, dynamic=True)
    optimizer = make_optimizer(model, cfg)
    owned = sorted(id(p) for g in optimizer.param_groups for p in g["params"])
    trained = sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert owned == trained, "a parameter is in no optimizer group, or in two"
    more = {"dtype": str(dtype)[6:], "processes": world}
    run.write_config(cfg, f"{METHOD}/{METHOD}_{cfg.backbone}", device, data, held_out, model, **more)
    held_out = common.evaluation_set(held_out)

    def get_batch(step):
        """This rank's micro-batches [(x0, y, t, eps), ...]. Noise and times are drawn for the global batch
        from (seed, step), so they depend neither on resuming nor on the number of processes."""
        x0, y = batches(step)
        x0 = x0.contiguous(memory_format=torch.channels_last)
        generator = torch.Generator(device).manual_seed(derive_seed(cfg.seed, "noise", step))
        eps = torch.randn(cfg.bs, *cfg.shape, generator=generator, device=device)[batches.rank_slice]
        u = torch.rand(2, cfg.bs, generator=generator, device=device)
        t = sample_t(u[0], cfg)[batches.rank_slice]
        drop = (u[1] < cfg.class_dropout)[batches.rank_slice]
        y = torch.where(drop.view(-1, *[1] * (y.ndim - 1)), null(y, cfg), y)
        common.seed_all(cfg.seed, "dropout", step, rank)  # for all other random numbers
        return list(zip(*(v.chunk(cfg.grad_accum) for v in (x0, y, t, eps)), strict=True))

    # Errors in evaluation and sampling show now and not after hours; the first pass compiles.
    few = replace(held_out, images=held_out.images[:8], labels=held_out.labels[:8])
    evaluate(ema.model, few, cfg, device, rank, world)
    with common.warn_on_os_error("a trial picture"):
        images, _ = sample_grid(ema.model, replace(cfg, num_samples=2, sampling_steps=1), device)
        assert images.shape[1] in (1, 3), f"decode() returns {images.shape[1]} channels; pictures have 1 or 3"
    loss_per_sample(model, *get_batch(run.step)[0], cfg).mean().backward()
    model.zero_grad()
    run.restore(model, ema, optimizer, timer)  # after the trial, which may change buffers
    ddp = functools.partial(nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True)
    net = ddp(model) if world > 1 else model
    timer.lap("startup")

    step, start_step, seconds, stopping = run.step, run.step, timer.seconds["train"], False

    def progress():
        """Fraction of the run completed: of its steps or its minutes, whichever is larger."""
        return min(1.0, max(step / cfg.steps, seconds / (60 * cfg.minutes) if cfg.minutes else 0.0))

    def due(every):
        return every > 0 and (step % every == 0 or done == 1)

    done = progress()
    while done < 1 and not stopping:
        lr_scale = min(1.0, (step + 1) / (cfg.warmup + 1)) * (1 - done)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_scale

        loss = torch.zeros((), device=device)
        for i, batch in enumerate(get_batch(step)):
            if world > 1:  # ranks exchange gradients once per step, after the last micro-batch
                net.require_backward_grad_sync = i == cfg.grad_accum - 1
            part = loss_per_sample(net, *batch, cfg).mean() / cfg.grad_accum
            part.backward()
            loss += part.detach()
        some = model.named_parameters() if step == 0 else ()
        if dead := [n for n, p in some if p.requires_grad and p.grad is None]:
            raise RuntimeError(f"no gradient reaches {', '.join(dead[:3])}; is the module used in forward()?")
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        if world > 1:
            dist.all_reduce(loss)
            loss /= world

        # A step that is not finite is never applied. Fused optimizers skip it without waiting for the device.
        finite = loss.isfinite() & grad_norm.isfinite()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = (~finite).float()
            optimizer.step()
        elif finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        ema.update(model, step)

        stopping, seconds = run.sync(step, timer.training())
        done = progress()
        run.log(step, loss=loss, grad_norm=grad_norm, lr=cfg.lr * lr_scale, seconds=timer.training())
        save = stopping or due(cfg.save_every) or due(cfg.keep_every) or done == 1
        if save or due(cfg.log_every) or due(cfg.eval_every) or step == start_step + 1:
            run.flush(done)
        if due(cfg.eval_every):
            with timer.section("evaluate"):
                run.validate(step, *evaluate(ema.model, held_out, cfg, device, rank, world))
        if save:
            with timer.section("save"):
                run.save(model, ema, optimizer, timer.training())
        if due(cfg.sample_every):
            with timer.section("sample"), common.warn_on_os_error("the pictures"):
                grid = sample_grid(ema.model, cfg, device)
                if rank == 0:
                    common.save_images(run.dir / "samples" / f"step_{step:08d}", *grid)
    run.finish(timer, done)


if __name__ == "__main__":
    with common.exit_on_user_error():
        train(common.parse(Config, __doc__))
