"""Rectified flow with a DiT: straight lines from noise to images. One file: flags, model, method, sampler,
optimizer, loop.

Method: Liu et al. 2022, "Flow Straight and Fast" (arXiv:2209.03003), and Lipman et al. 2022, "Flow Matching
for Generative Modeling" (arXiv:2210.02747). Model: Peebles & Xie 2022, "Scalable Diffusion Models with
Transformers" (arXiv:2212.09748), with what came since: rotary positions, QK-norm, a shared modulation, Muon.

    python rf_dit_cifar.py --steps 200000 --bs 256              CIFAR-10 on one GPU
    python rf_dit_cifar.py --resume logs/rf/RUN                 goes on where a run stopped
    python rf_dit_cifar.py --sample logs/rf/RUN --solver heun   samples a finished run
    torchrun --standalone --nproc-per-node=2 rf_dit_cifar.py    same batch, 2 processes

On two CPU cores the README's laptop line draws MNIST's digits in six minutes.
"""

import contextlib
import functools
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import common
from common import UserError, derived, seed_of

# ------------------------------------------------------------------------------------------------
# Flags: the only place a default lives; the comment is the help


@dataclass
class Config:
    # model
    dim: int = 512  # channels of a token
    depth: int = 12  # blocks
    heads: int = 8  # of attention
    patch: int = 2  # side of the square of pixels that is a token
    positions: Literal["rope", "sincos"] = "rope"  # turn queries and keys, or are added to tokens
    adaln: Literal["shared", "block"] = "shared"  # one modulation layer, or one in each block
    mlp_ratio: float = 4.0  # hidden channels of an MLP in units of dim
    dropout: float = 0.0  # inside the MLPs
    # method
    t_sampling: Literal["uniform", "logit-normal"] = "uniform"  # density of the training times
    shift: float = 1.0  # of these times towards noise; 1 = none
    # guidance and sampling
    class_dropout: float = 0.1  # share of labels replaced by the null class; 1 = unconditional
    guidance: float = 1.5  # w in uncond + w (cond - uncond); 1 = off
    guidance_interval: tuple[float, ...] = (0.0, 1.0)  # times between which guidance acts, such as 0.1 0.8
    solver: Literal["euler", "heun", "rk4"] = "euler"  # of the ODE: 1, 2 or 4 evaluations a step
    sampling_steps: int = 50  # of the solver, for the pictures
    num_samples: int = 100  # images in a grid, classes in turn
    # length
    steps: int = 200_000  # optimizer steps
    minutes: float = 0.0  # stop after so many minutes of training if that is earlier; 0 = no limit
    bs: int = 256  # images a step, over all processes
    grad_accum: int = 1  # forward-backward passes that share the bs
    # data
    dataset: str = "cifar10"  # mnist, cifar10, digits, or a folder or .zip of images
    data_root: str = ""  # where mnist and cifar10 are or go; default $DIFFUSION_DATA, else data/
    image_size: int = 0  # resize to this side in pixels; 0 = the dataset's own
    channels: int = 0  # 1 gray, 3 colour, 0 = the dataset's own
    # optimizer
    optimizer: Literal["muon", "adamw"] = "muon"  # of the blocks' matrices; of all else AdamW
    lr: float = 1e-3  # peak learning rate of AdamW, falling linearly to zero
    muon_lr: float = 0.02  # that of Muon
    warmup: int = 100  # steps until the peak
    weight_decay: float = 0.0  # of matrices
    grad_clip: float = 1.0  # largest gradient norm; 0 = off
    ema_decay: float = 0.9999  # of the averaged weights, after their warm-up
    # run
    logs: str = ""  # parent of run folders; default $DIFFUSION_LOGS, else logs/
    seed: int = 0  # of everything random
    resume: str = ""  # RUN or RUN/checkpoints/step_X.pt to go on with
    config: str = ""  # a run.yaml whose flags become the defaults
    sample: str = ""  # RUN to sample, without training
    keep: int = 2  # checkpoints to keep
    # rhythm, in steps; 0 = never
    log_every: int = 20  # read losses back and write them
    eval_every: int = 1000  # held-out loss
    sample_every: int = 10_000  # pictures
    save_every: int = 5000  # checkpoint
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = the fastest there is
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = bfloat16 where it is faster
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = if the run is long enough
    grad_checkpoint: bool = False  # recompute blocks in the backward pass: less memory, a third slower
    # from the dataset
    shape: tuple[int, ...] = derived((3, 32, 32))
    num_classes: int = derived(10)


def check(cfg):
    """Raises UserError for values and combinations that cannot work."""

    def need(ok, text):
        if not ok:
            raise UserError(text)

    at_least_1 = "dim depth heads patch sampling_steps num_samples steps bs grad_accum keep log_every"
    at_least_0 = "minutes warmup weight_decay grad_clip eval_every sample_every save_every"
    for names, low, high in (
        (at_least_1, 1, math.inf),
        (at_least_0, 0, math.inf),
        ("dropout ema_decay class_dropout", 0, 1),
    ):
        for name in names.split():
            value, flag = getattr(cfg, name), "--" + name.replace("_", "-")
            bounds = f"{low} or more" if high == math.inf else f"{low} to {high}"
            need(low <= value <= high, f"{flag} is {value}; give {bounds}")
    for name in ("lr", "muon_lr", "shift", "mlp_ratio"):
        value = getattr(cfg, name)
        need(0 < value < math.inf, f"--{name.replace('_', '-')} is {value}; give a positive number")
    parts, side = cfg.grad_accum * int(os.environ.get("WORLD_SIZE", 1)), cfg.shape[-1]
    need(cfg.bs % parts == 0, f"--bs {cfg.bs} is no multiple of --grad-accum x processes, {parts}; change it")
    fits = [p for p in range(1, side + 1) if side % p == 0]
    need(cfg.patch in fits, f"--patch {cfg.patch} does not divide {side} pixels; choose from {fits}")
    need(
        cfg.dim % (4 * cfg.heads) == 0,
        f"--dim {cfg.dim} is no multiple of 4 x --heads, {4 * cfg.heads}; change one of them",
    )
    need(cfg.guidance == 1 or cfg.class_dropout > 0, "--guidance needs --class-dropout; or give --guidance 1")
    low, high = cfg.guidance_interval if len(cfg.guidance_interval) == 2 else (1.0, 0.0)
    need(0 <= low <= high <= 1, "--guidance-interval takes two times in [0, 1]; give such as 0.1 0.8")


# ------------------------------------------------------------------------------------------------
# Model


def patchify(x, p):
    """[B, C, H, W] -> tokens [B, H/p W/p, C p p], row by row."""
    return F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)


def unpatchify(x, p):
    """Tokens [B, N, C p p] of a square image -> [B, C, H, W]; undoes patchify."""
    side = math.isqrt(x.shape[1])
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (side, side)), p)


def rope_table(side, dim):
    """cos and sin, each [side * side, dim], of the angles that a head's channels turn by: half of the pairs
    tell the row of a token, half its column (Su et al. 2021, arXiv:2104.09864, eq. 34, in two dimensions)."""
    freqs = 100.0 ** -torch.arange(0, 1, 4 / dim)  # from a radian to a hundredth of it a token
    angles = torch.arange(side)[:, None] * freqs
    rows, columns = angles[:, None].expand(side, side, -1), angles[None].expand(side, side, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1).repeat(1, 2)
    return angles.cos(), angles.sin()


def sincos_table(side, dim):
    """[side * side, dim]: half the channels tell the row, half the column (Peebles & Xie 2022, sec. 3.2)."""
    lines = common.time_embedding(torch.arange(side) / 1000, dim // 2)
    rows, columns = lines[:, None].expand(side, side, -1), lines[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def rotate(x, cos, sin):
    """Turns the channel pairs (i, i + dim / 2) of x [B, heads, N, dim]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def attention(q, k, v):
    """softmax(q k^T / sqrt(dim)) v; each [B, heads, N, dim]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The fused kernel takes 3 to 9 times as long, forward and backward (torch 2.15, 49 to 256 tokens).
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def norm(dim):
    """Each token over its root mean square; the scale is the modulation's."""
    return nn.RMSNorm(dim, 1e-6, elementwise_affine=False)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by time and class (Peebles & Xie 2022, sec. 3.2)."""

    def __init__(self, cfg):
        super().__init__()
        dim, hidden = cfg.dim, int(cfg.mlp_ratio * cfg.dim)
        self.heads = cfg.heads
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.qk_norm, self.dropout = norm(dim // cfg.heads), nn.Dropout(cfg.dropout)
        self.mlp1, self.mlp2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.modulation = nn.Linear(dim, 6 * dim) if cfg.adaln == "block" else None
        self.bias = nn.Parameter(torch.zeros(6 * dim)) if cfg.adaln == "shared" else None

    def forward(self, x, c, cos, sin):
        """x [B, N, dim], c [B, dim], or [B, 6 dim] with a shared modulation -> [B, N, dim]."""
        c = self.modulation(c) if self.modulation else c + self.bias
        shift1, scale1, gate1, shift2, scale2, gate2 = c[:, None].chunk(6, dim=-1)
        h = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = h.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, dim / heads]
        q, k = self.qk_norm(q), self.qk_norm(k)  # bounds the logits (Dehghani et al. 2023, arXiv:2302.05442)
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        h = attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.out(h)
        h = self.mlp1(self.norm2(x) * (1 + scale2) + shift2)
        return x + gate2 * self.mlp2(self.dropout(F.gelu(h, approximate="tanh")))


class DiT(nn.Module):
    """model(x [B, C, H, W], t [B] in [0, 1], y int64 [B]) -> [B, C, H, W]; y = num_classes is no class."""

    def __init__(self, cfg):
        super().__init__()
        dim, side, channels = cfg.dim, cfg.shape[-1] // cfg.patch, cfg.shape[0] * cfg.patch**2
        self.patch, self.time_dim, self.grad_checkpoint = cfg.patch, 256, cfg.grad_checkpoint
        self.embed, self.unembed = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.time = nn.Sequential(nn.Linear(self.time_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(cfg.num_classes + 1, dim)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm, self.final_modulation = norm(dim), nn.Linear(dim, 2 * dim)
        # One modulation for all blocks, each with a bias of its own (Chen et al. 2023, arXiv:2310.00426, sec.
        # 2.3), takes a quarter of the parameters and a tenth of the time off, and does not learn worse.
        self.modulation = nn.Linear(dim, 6 * dim) if cfg.adaln == "shared" else None
        cos, sin = rope_table(side, dim // cfg.heads) if cfg.positions == "rope" else (None, None)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        added = sincos_table(side, dim) if cfg.positions == "sincos" else torch.zeros(())
        self.register_buffer("positions", added, persistent=False)

        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "modulation" in name or name == "unembed":  # blocks start as the identity, the model at 0
                    nn.init.zeros_(module.weight)
        nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, x, t, y):
        c = F.silu(self.time(common.time_embedding(t, self.time_dim)) + self.label(y))
        h = self.embed(patchify(x, self.patch)) + self.positions
        modulation = self.modulation(c) if self.modulation else c
        for block in self.blocks:
            args = h, modulation, self.cos, self.sin
            recompute = self.grad_checkpoint and self.training
            h = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
        shift, scale = self.final_modulation(c)[:, None].chunk(2, dim=-1)
        return unpatchify(self.unembed(self.norm(h) * (1 + scale) + shift), self.patch)


def build_model(cfg):
    return DiT(cfg)


# ------------------------------------------------------------------------------------------------
# Method: the straight path x_t = (1 - t) x0 + t eps and its velocity eps - x0 (Liu et al. 2022, eq. 1).
# A new idea usually changes only this section.


def path(t, cfg):
    """t [B] in [0, 1] -> (alpha, sigma), each [B]."""
    return 1 - t, t


def draw_times(u, cfg):
    """u [B], uniform in [0, 1) -> times [B] in (0, 1) of the density that --t-sampling names.

    Stratified: time i of the batch lies in the i-th of B equal shares, so that a step sees all times evenly
    and its gradient varies less (Kingma et al. 2021, arXiv:2107.00630, sec. I.1).
    """
    u = (torch.arange(len(u), device=u.device) + u) / len(u)
    t = u.clamp(1e-5, 1 - 1e-5)
    if cfg.t_sampling == "logit-normal":  # Esser et al. 2024, eq. 19, with location 0 and scale 1
        t = torch.sigmoid(torch.special.ndtri(t))
    return cfg.shift * t / (1 + (cfg.shift - 1) * t)  # ibid., eq. 23: shift > 1 towards noise


def loss_per_sample(model, x0, y, t, eps, cfg):
    """Squared error of the velocity, [B] (Liu et al. 2022, eq. 1; Lipman et al. 2022, eq. 23)."""
    s = t.view(-1, 1, 1, 1)
    return (model((1 - s) * x0 + s * eps, t, y).float() - (eps - x0)).square().mean((1, 2, 3))


def velocity(model, x, t, y, cfg, guidance=1.0):
    """dx/dt at x [B, C, H, W], t [B], for classes y [B].

    Guidance (Ho & Salimans 2022, eq. 6; here w = 1 is off) takes one call, batched with the null class.
    """
    null = torch.full_like(y, cfg.num_classes)
    if cfg.class_dropout == 1:  # trained unconditionally: the labels mean nothing
        y, guidance = null, 1.0
    if guidance == 1:
        return model(x, t, y).to(x.dtype)
    both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).to(x.dtype)
    cond, uncond = both.chunk(2)
    return uncond + guidance * (cond - uncond)


def predict(model, x, t, y, cfg, guidance=1.0):
    """What the network says at x [B, C, H, W], t [B], y [B], as (x0, eps)."""
    v, s = velocity(model, x, t, y, cfg, guidance), t.view(-1, 1, 1, 1)
    return x - s * v, x + (1 - s) * v


def sample_shape(cfg):
    return cfg.shape


def decode(x, cfg):
    return x


# ------------------------------------------------------------------------------------------------
# Sampler: a step of the ODE dx/dt = f(x, t) from time t to s, where v = f(x, t); of order 1, 2 and 4


def euler(f, x, v, t, s):
    return x + (s - t) * v


def heun(f, x, v, t, s):
    return x + (s - t) / 2 * (v + f(x + (s - t) * v, s))


def rk4(f, x, v, t, s):
    h, middle = s - t, (t + s) / 2
    v2 = f(x + h / 2 * v, middle)
    v3 = f(x + h / 2 * v2, middle)
    return x + h / 6 * (v + 2 * v2 + 2 * v3 + f(x + h * v3, s))


@torch.no_grad()
def sample(model, x, y, cfg, frames=24):
    """Follows the flow from noise x [N, C, H, W] at t = 1 to images at t = 0, in equal steps; y int64 [N].

    Returns (images [N, C, H, W] in [-1, 1], history: a list of about `frames` of the estimates of x0).
    """
    step, steps, history = {"euler": euler, "heun": heun, "rk4": rk4}[cfg.solver], cfg.sampling_steps, []

    def f(x, t):
        low, high = cfg.guidance_interval
        guidance = cfg.guidance if low <= t <= high else 1.0  # Kynkaanniemi et al. 2024, arXiv:2404.07724
        return velocity(model, x, torch.full((len(x),), t, device=x.device), y, cfg, guidance)

    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        v = f(x, t)
        if i * frames // steps != (i - 1) * frames // steps or i == steps - 1:
            history.append(decode(x - t * v, cfg))
        x = step(f, x, v, t, s)
    return decode(x, cfg).clamp(-1, 1), history


def sample_classes(model, cfg, device, rank=0, world=1):
    """cfg.num_samples images, classes in turn, of which each process draws its share; all get the whole."""
    y = torch.arange(cfg.num_samples, device=device) % cfg.num_classes
    generator = torch.Generator(device).manual_seed(seed_of(cfg.seed, "sample"))
    x = torch.randn(len(y), *sample_shape(cfg), generator=generator, device=device)
    if world == 1:
        return sample(model, x, y, cfg)
    images, history = sample(model, x[rank::world], y[rank::world], cfg)
    whole = torch.zeros(1 + len(history), *x.shape, device=device)
    whole[:, rank::world] = torch.stack([images, *history])
    dist.all_reduce(whole)
    return whole[0], list(whole[1:])


# ------------------------------------------------------------------------------------------------
# Optimizer: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices of blocks, else AdamW


def orthogonal(g):
    """[n, rows, columns] -> about U V^T of each matrix U S V^T, by five Newton-Schulz steps.

    The coefficients, Jordan's, are fast rather than exact: singular values end between about 0.7 and 1.2.
    """
    x = g if g.shape[1] <= g.shape[2] else g.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if g.shape[1] <= g.shape[2] else x.mT


class Muon(torch.optim.AdamW):
    """AdamW, but the matrices in groups with `momentum` move along their momentum made orthogonal.

    Matrices of one shape are handled as one tensor [n, rows, columns]; the first keeps their momentum.
    A step for which `found_inf` is 1 changes nothing, as in the fused AdamW, and does not ask the device.
    """

    @torch.no_grad()
    def step(self):
        for group in (g for g in self.param_groups if "momentum" in g):
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
                g, state = torch.stack([p.grad for p in params]), self.state[params[0]]
                beta, skip = group["momentum"], self.found_inf > 0
                if not state:  # AdamW looks for a step when it loads
                    state |= {"momentum": torch.zeros_like(g), "step": torch.zeros(())}
                m = state["momentum"].lerp(g, 1 - beta)
                update = orthogonal(g.lerp(m, beta).to(self.dtype)).to(g.dtype)  # with Nesterov's momentum
                update *= max(1, rows / columns) ** 0.5  # Jordan's: alike for all shapes
                if group["weight_decay"]:
                    update += group["weight_decay"] * torch.stack(params)
                state["momentum"] = torch.where(skip, state["momentum"], m)
                torch._foreach_add_(params, list(torch.where(skip, 0.0, update)), alpha=-group["lr"])
            for p in group["params"]:
                p.grad = None  # AdamW leaves alone what has none
        super().step()


def make_optimizer(model, cfg, dtype):
    """`peak` is the highest learning rate of a group; dtype that of orthogonal(), which need not be exact."""
    hidden = {id(p): p for p in model.blocks.parameters() if p.ndim == 2 and cfg.optimizer == "muon"}
    rest = [p for p in model.parameters() if id(p) not in hidden]
    groups = [
        {"params": list(hidden.values()), "peak": cfg.muon_lr, "momentum": 0.95},
        {"params": [p for p in rest if p.ndim > 1], "peak": cfg.lr},
        {"params": [p for p in rest if p.ndim < 2], "peak": cfg.lr, "weight_decay": 0.0},
    ]
    optimizer = Muon(groups[not hidden :], cfg.lr, (0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)
    optimizer.dtype = dtype
    return optimizer


# ------------------------------------------------------------------------------------------------
# Training loop


@torch.no_grad()
def evaluate(model, data, cfg, device, rank, world, n=2048):
    """Loss on n held-out images with noise and evenly spread times that are the same at every call."""
    n = min(n, len(data.labels))
    generator = torch.Generator().manual_seed(seed_of("evaluate"))
    pick = torch.randperm(len(data.labels), generator=generator)[:n]
    t = (torch.arange(n) + 0.5) / n
    eps = torch.randn(n, *cfg.shape, generator=generator)
    sums = torch.zeros(2, 10, device=device)  # of losses, and their number, by time
    for rows in torch.arange(rank, n, world).split(256):
        x0, y = data.images[pick[rows]].to(device).float() / 127.5 - 1, data.labels[pick[rows]].to(device)
        y = torch.full_like(y, cfg.num_classes) if cfg.class_dropout == 1 else y
        loss = loss_per_sample(model, x0, y, t[rows].to(device), eps[rows].to(device), cfg)
        k = (t[rows] * 10).long().to(device)
        sums.index_add_(1, k, torch.stack([loss, torch.ones_like(loss)]))
    if world > 1:
        dist.all_reduce(sums)
    total, count = sums.tolist()
    by_time = [a / b if b else None for a, b in zip(total, count, strict=True)]
    return {"loss": sum(total) / sum(count), "loss_t": by_time}


def matmul_rate(device, dtype):
    """FLOP/s of the product of two large square matrices, the best of a few: what this device can reach."""
    n, best = 8192 if device.type == "cuda" else 2048, math.inf
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def speed(cfg, device, dtype, rate):
    """A line on images/s of one process in FLOP/s of the model: three forward passes a training step."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        x = torch.empty(1, *cfg.shape)
        build_model(cfg)(x, torch.empty(1), torch.empty(1, dtype=torch.long))
    achieved, peak = 3 * counter.get_total_flops() * rate, matmul_rate(device, dtype)
    return (
        f"speed   {rate:.1f} images/s a process, {achieved / 1e12:.3g} TFLOP/s, {achieved / peak:.0%} of the "
        f"{peak / 1e12:.3g} of a large product in {dtype}"
    )


def train(cfg):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = common.pick_device(cfg.device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    load = functools.partial(common.load_dataset, cfg.dataset, cfg.data_root)
    data, held_out = (load(split, cfg.image_size, cfg.channels) for split in ("train", "test"))
    cfg = replace(cfg, shape=tuple(data.images.shape[1:]), num_classes=len(data.classes))
    check(cfg)

    # Compiling costs up to a minute, which a short run does not earn back; bfloat16 costs nothing.
    long = cfg.steps >= 500 and not 0 < cfg.minutes < 1
    use_compile = cfg.compile == "on" or (cfg.compile == "auto" and long and device.type != "mps")
    fast = common.device_facts(device)[1]
    dtype = getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if fast else "float32")
    torch.set_float32_matmul_precision("high")

    torch.manual_seed(seed_of(cfg.seed, "init"))
    model = build_model(cfg).to(device)  # plain: counted, averaged, saved, sampled
    ema = common.EMA(model, cfg.ema_decay)
    optimizer = make_optimizer(model, cfg, torch.bfloat16 if fast else torch.float32)
    owned = sorted(id(p) for g in optimizer.param_groups for p in g["params"])
    assert owned == sorted(map(id, model.parameters())), "a parameter is in no optimizer group, or in two"

    run, clock = common.Run(cfg, __file__, "rf", "dit", rank), common.Clock(device)
    if run.state:
        model.load_state_dict(run.state["model"])
        ema.model.load_state_dict(run.state["ema"])
        optimizer.load_state_dict(run.state["optimizer"])
        clock.seconds["train"] = run.state["seconds"]
    facts = {"dtype": str(dtype).removeprefix("torch."), "compile": use_compile, "processes": world}
    run.describe(device, data, model, **facts)
    batches = common.Batches(data, cfg.bs, cfg.seed, device, rank, world)
    mine = slice(rank * cfg.bs // world, (rank + 1) * cfg.bs // world)

    def losses(net, step):
        """The mean loss of each micro-batch of this rank. Noise and times are drawn for the whole batch from
        (seed, step), so that neither resuming nor the number of processes changes them."""
        x0, y = batches(step)
        noise = torch.Generator(device).manual_seed(seed_of(cfg.seed, "noise", step))
        eps = torch.randn(cfg.bs, *cfg.shape, generator=noise, device=device)[mine]
        u = torch.rand(2, cfg.bs, generator=noise, device=device)
        t = draw_times(u[0], cfg)[mine]
        y = torch.where(u[1, mine] < cfg.class_dropout, cfg.num_classes, y)
        torch.manual_seed(seed_of(cfg.seed, "dropout", step, rank))
        parts = (v.chunk(cfg.grad_accum) for v in (x0, y, t, eps))
        for x0, y, t, eps in zip(*parts, strict=True):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = loss_per_sample(net, x0, y, t, eps, cfg).mean()
            yield loss

    net, seconds, step = model, clock.seconds["train"], run.step
    first, started = step, seconds
    if use_compile:
        net = torch.compile(model)
        try:  # a pass whose gradients are dropped compiles, and shows whether this machine can
            next(losses(net, step)).backward()
        except Exception as e:
            if cfg.compile == "on":
                raise
            common.say(f"compile not possible here ({common.why(e)}); going on without")
            net = model
        optimizer.zero_grad(set_to_none=True)
    net = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    clock.lap("compile")

    def done():  # the larger share of the two budgets, in [0, 1]
        return min(1.0, max(step / cfg.steps, seconds / (60 * cfg.minutes) if cfg.minutes else 0.0))

    model.train()
    while done() < 1:
        pace = min(1.0, (step + 1) / (cfg.warmup + 1)) * (1 - done())
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * pace
        loss = torch.zeros((), device=device)
        for i, part in enumerate(losses(net, step)):
            last = i == cfg.grad_accum - 1  # processes exchange gradients once a step
            with contextlib.nullcontext() if world == 1 or last else net.no_sync():
                (part / cfg.grad_accum).backward()
            loss += part.detach() / cfg.grad_accum
        if step == first and (dead := [n for n, p in model.named_parameters() if p.grad is None]):
            raise RuntimeError(f"no gradient reaches {', '.join(dead[:3])}; is the module used in forward()?")
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        if world > 1:
            dist.all_reduce(loss)
            loss /= world
        # The optimizer leaves the weights alone where this is 1, as fused ones do for torch.amp.GradScaler.
        optimizer.found_inf = (~(loss.isfinite() & grad_norm.isfinite())).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seconds = step + 1, clock.training()
        ema.update(model, step)
        run.record(step, loss=loss, grad_norm=grad_norm, lr=cfg.lr * pace, seconds=seconds)
        stop = run.stopping
        if world > 1:  # all processes stop at the same step
            agreed = torch.tensor([stop, seconds], dtype=torch.float64)
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            stop, seconds = agreed.tolist()

        ends = done() >= 1 or stop
        if ends or step % cfg.log_every == 0:
            run.flush(done())
        due = {e: e and step % e == 0 for e in (cfg.eval_every, cfg.save_every, cfg.sample_every)}
        if ends or any(due.values()):
            clock.lap("train")
        if due[cfg.eval_every] or (cfg.eval_every and done() >= 1):
            run.validate(step, **evaluate(ema.model, held_out, cfg, device, rank, world))
            clock.lap("evaluate")
        if due[cfg.save_every] or ends:
            run.flush(done())
            run.save(model, ema, optimizer, seconds)
            clock.lap("save")
        if due[cfg.sample_every] or done() >= 1:
            run.pictures(f"step_{step:08d}", *sample_classes(ema.model, cfg, device, rank, world))
            clock.lap("sample")
        if stop and done() < 1:
            if world > 1:  # a launcher ends all when one has left: not before the checkpoint is there
                dist.barrier()
            common.say(f"stopped by a signal after step {step}; go on with --resume {run.dir}")
            sys.exit(common.PREEMPTED)
    if step > first:
        rate = (step - first) * cfg.bs / world / (clock.seconds["train"] - started)
        common.say(speed(cfg, device, dtype, rate))
    run.close(clock)
    if world > 1:
        dist.destroy_process_group()


def sample_run(cfg):
    """--sample RUN: a grid and a GIF from the averaged weights of the newest checkpoint."""
    check(cfg)
    device, folder = common.pick_device(cfg.device), common.find_run(cfg.sample) / "samples"
    state = common.newest_checkpoint(cfg.sample)
    if state is None:
        raise UserError(f"{cfg.sample} has no checkpoint yet; wait for its first, or --resume it")
    model = build_model(cfg).to(device).eval()
    model.load_state_dict(state["ema"])
    name = f"step_{state['step']:08d}_{cfg.solver}{cfg.sampling_steps}_w{cfg.guidance:g}_seed{cfg.seed}"
    common.save_pictures(folder / name, *sample_classes(model, cfg, device))
    print(f"wrote {folder / name}.png and .gif")


if __name__ == "__main__":
    with common.one_line_errors():
        cfg = common.parse(Config, __doc__)
        sample_run(cfg) if cfg.sample else train(cfg)
