"""Rectified flow with a DiT on CIFAR-10.

Method: Liu et al. 2022, "Flow Straight and Fast" (arXiv:2209.03003), and Lipman et al. 2022, "Flow Matching
for Generative Modeling" (arXiv:2210.02747). Time t runs from 0 (data) to 1 (noise). Model: Peebles & Xie
2022, "Scalable Diffusion Models with Transformers" (arXiv:2212.09748), with later improvements: rotary
positions, QK-norm, squared ReLU, one adaLN layer for all blocks, and the Muon optimizer.

    python rf_dit_cifar.py --steps 200000 --bs 256              CIFAR-10 on one GPU
    python rf_dit_cifar.py --resume logs/rf/RUN                 continues a run
    torchrun --standalone --nproc-per-node=2 rf_dit_cifar.py    the same batch on 2 GPUs
    python ddim_sample.py logs/rf/RUN                           samples a run

On two CPU cores, the README's laptop command draws MNIST digits in six minutes.
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
    dim: int = 512  # channels per token
    depth: int = 12  # number of blocks
    heads: int = 8  # attention heads
    patch: int = 2  # side of a patch (one token) in pixels
    mlp_ratio: float = 4.0  # hidden channels of an MLP divided by dim
    # method
    t_sampling: Literal["uniform", "logit-normal"] = "uniform"  # distribution of the training times
    shift: float = 1.0  # shift of the training times; above 1 towards noise, below 1 towards data
    class_dropout: float = 0.1  # fraction of labels replaced by the null class; 1 = unconditional
    # guidance and sampling
    guidance: float = 1.5  # guidance scale w of uncond + w (cond - uncond); 1 = off
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times between which guidance acts, such as 0.1 0.8
    solver: Literal["euler", "heun", "rk4"] = "euler"  # ODE solver: 1, 2 or 4 network passes per step
    sampling_steps: int = 50  # steps of the solver
    num_samples: int = resumable(100)  # images per grid, all classes in turn
    # length
    steps: int = resumable(200_000)  # optimizer steps
    minutes: float = resumable(0.0)  # minutes of training, if they end before the steps; 0 = no limit
    bs: int = 256  # global batch size, whatever the number of processes
    grad_accum: int = 1  # micro-batches per step
    # data
    dataset: str = resumable("cifar10")  # mnist, cifar10, digits, or a folder or .zip of images
    data_root: str = resumable("")  # folder of mnist and cifar10; default $DIFFUSION_DATA, else data/
    image_size: int = 0  # side in pixels that images are resized to; 0 = the dataset's own
    channels: int = 0  # 1 gray, 3 colour, 0 = the dataset's own
    flip: Literal["auto", "on", "off"] = "auto"  # random horizontal flips; auto = only for cifar10
    # optimizer
    optimizer: Literal["muon", "adamw"] = "muon"  # optimizer of the blocks' matrices; the rest has AdamW
    lr: float = 1e-3  # peak learning rate of AdamW, decayed linearly to zero
    muon_lr: float = 0.02  # peak learning rate of Muon
    warmup: int = 100  # warmup steps
    weight_decay: float = 0.0  # weight decay of matrices
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
    sample_every: int = resumable(10_000)  # steps between grids of samples
    save_every: int = resumable(5000)  # steps between checkpoints
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = resumable("auto")  # auto = the fastest available
    dtype: Literal["auto", "float32", "bfloat16"] = resumable("auto")  # auto = bfloat16 if supported
    compile: Literal["auto", "on", "off"] = resumable("auto")  # torch.compile; auto = if the run is long
    grad_checkpoint: bool = resumable(False)  # recompute blocks in backward: less memory, a third slower
    # derived from the dataset
    shape: tuple[int, ...] = derived((3, 32, 32))
    classes: tuple[str, ...] = derived(tuple("0123456789"))


def check(cfg):
    """Raises UserError for values that cannot work."""
    common.require_range(cfg, "sampling_steps num_samples steps bs grad_accum keep log_every", 1)
    common.require_range(cfg, "minutes warmup weight_decay grad_clip guidance", 0)
    common.require_range(cfg, "eval_every sample_every save_every keep_every", 0)
    common.require_range(cfg, "ema_decay class_dropout", 0, 1)
    common.require_range(cfg, "lr muon_lr shift", 0, exclude_low=True)
    parts = cfg.grad_accum * int(os.environ.get("WORLD_SIZE", 1))
    text = f"--bs ({cfg.bs}) must be divisible by --grad-accum x number of processes ({parts})"
    require(cfg.bs % parts == 0, text)
    guided = cfg.guidance == 1 or cfg.class_dropout > 0
    require(guided, "--guidance needs --class-dropout above 0; or use --guidance 1")
    low, high = cfg.guidance_interval
    require(0 <= low <= high <= 1, "--guidance-interval must be two times in [0, 1], such as 0.1 0.8")
    check_model(cfg)


# ------------------------------------------------------------------------------------------------
# Model

BACKBONE = "dit"


def check_model(cfg):
    """Raises UserError for sizes that do not fit."""
    common.require_range(cfg, "dim depth heads patch", 1)
    common.require_range(cfg, "mlp_ratio", 0.25)
    side = cfg.shape[-1]
    fits = [p for p in range(1, side + 1) if side % p == 0]
    text = f"--patch ({cfg.patch}) must divide the image side ({side}); possible are {fits}"
    require(cfg.patch in fits, text)
    unit = 4 * cfg.heads  # RoPE rotates pairs of channels: half of them by row, half by column
    require(cfg.dim % unit == 0, f"--dim ({cfg.dim}) must be divisible by 4 x --heads ({unit})")


def patchify(x, p):
    """[B, C, H, W] -> tokens [B, H/p W/p, C p p], row by row."""
    return F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)


def unpatchify(x, p):
    """Tokens [B, N, C p p] of a square image -> [B, C, H, W]; undoes patchify."""
    side = math.isqrt(x.shape[1])
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (side, side)), p)


def rope_table(side, dim):
    """cos and sin [side * side, dim / 2] of the angles that rotate a head's channel pairs, half of them by
    the token's row, half by its column (Su et al. 2021, arXiv:2104.09864, eq. 34)."""
    freqs = 100.0 ** -(torch.arange(dim // 4) / (dim // 4))  # radians per token, from 1 to about 0.01
    angles = torch.arange(side)[:, None] * freqs
    angles = torch.cat([angles.repeat_interleave(side, 0), angles.repeat(side, 1)], dim=1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotates the channel pairs (i, i + dim / 2) of x [..., N, dim]; see rope_table."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def attention(q, k, v):
    """softmax(q k^T / sqrt(dim)) v; each [B, heads, N, dim]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The fused kernel takes 3 to 9 times as long (AVX-512, 49 to 256 tokens).
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


norm = functools.partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)  # adaLN scales and shifts


class Block(nn.Module):
    """Attention and MLP; adaLN shifts, scales and gates both (Peebles & Xie 2022, sec. 3.2)."""

    def __init__(self, cfg):
        super().__init__()
        dim, hidden = cfg.dim, int(cfg.mlp_ratio * cfg.dim)
        self.heads = cfg.heads
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp1, self.mlp2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.qk_norm = nn.RMSNorm(dim // cfg.heads, 1e-6, elementwise_affine=False)
        self.adaln_bias = nn.Parameter(torch.zeros(6 * dim))

    def forward(self, x, c, cos, sin):
        """x [B, N, dim], c [B, 6 dim] -> [B, N, dim], in the dtype of x (under autocast, bfloat16).

        torch.addcmul(a, b, c) is a + b * c in one pass over memory.
        """
        c = (c + self.adaln_bias).to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = c[:, None].chunk(6, dim=-1)
        h = self.qkv(torch.addcmul(shift1, self.norm1(x), 1 + scale1))
        q, k, v = (u.unflatten(2, (self.heads, -1)).transpose(1, 2) for u in h.chunk(3, dim=-1))
        q, k = self.qk_norm(q), self.qk_norm(k)  # bounds the logits (Dehghani et al. 2023, arXiv:2302.05442)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        h = attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, gate1, self.proj(h))
        h = F.relu(self.mlp1(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))
        # Squared ReLU (So et al. 2021, arXiv:2109.08668) learns faster than GELU.
        return torch.addcmul(x, gate2, self.mlp2(h * h))


class DiT(nn.Module):
    """model(x [B, C, H, W], t [B] in [0, 1], y int64 [B]) -> [B, C, H, W]."""

    def __init__(self, cfg):
        super().__init__()
        dim, side, channels = cfg.dim, cfg.shape[-1] // cfg.patch, cfg.shape[0] * cfg.patch**2
        self.patch, self.t_dim, self.grad_checkpoint = cfg.patch, 256, cfg.grad_checkpoint
        self.patch_embed, self.final_linear = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.t_embed = nn.Sequential(nn.Linear(self.t_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embed = nn.Linear(len(cfg.classes) + 1, dim, bias=False)  # the last is the null class
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        # One adaLN layer for all blocks, each of which adds its own bias (Chen et al. 2023, arXiv:2310.00426,
        # sec. 2.3): a quarter fewer parameters, a tenth faster, and the same loss.
        self.adaln, self.norm, self.final_adaln = nn.Linear(dim, 6 * dim), norm(dim), nn.Linear(dim, 2 * dim)
        cos, sin = rope_table(side, dim // cfg.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if "adaln" in name or name == "final_linear":  # blocks start as the identity, the model at 0
                    nn.init.zeros_(module.weight)
        nn.init.normal_(self.y_embed.weight, std=0.02)

    def forward(self, x, t, y):
        # One-hot, not nn.Embedding: a lookup's gradient is summed in no fixed order when compiled.
        y = F.one_hot(y, self.y_embed.in_features).float()
        c = F.silu(self.t_embed(common.time_embedding(t, self.t_dim)) + self.y_embed(y))
        h, args = self.patch_embed(patchify(x, self.patch)), (self.adaln(c), self.cos, self.sin)
        for block in self.blocks:
            recompute = self.grad_checkpoint and self.training
            h = checkpoint(block, h, *args, use_reentrant=False) if recompute else block(h, *args)
        shift, scale = self.final_adaln(c)[:, None].chunk(2, dim=-1)
        return unpatchify(self.final_linear(self.norm(h) * (1 + scale) + shift), self.patch)


build_model = DiT


# ------------------------------------------------------------------------------------------------
# Method: the straight path x_t = (1 - t) x0 + t eps and its velocity eps - x0 (Liu et al. 2022, eq. 1).
# A new idea usually changes only this section.

METHOD = "rf"


def path(t, cfg):
    """t [B] in [0, 1] -> (alpha, sigma), each [B]."""
    return 1 - t, t


def sample_t(u, cfg):
    """u [B], uniform in [0, 1) -> training times [B] in (0, 1), distributed as --t-sampling says.

    Stratified: time i lies in the i-th of B equal parts, so that every batch covers all times and the
    gradient varies less (Kingma et al. 2021, arXiv:2107.00630, sec. I.1).
    """
    t = ((torch.arange(len(u), device=u.device) + u) / len(u)).clamp(1e-5, 1 - 1e-5)
    if cfg.t_sampling == "logit-normal":  # Esser et al. 2024, eq. 19, with location 0 and scale 1
        t = torch.sigmoid(torch.special.ndtri(t))
    return cfg.shift * t / (1 + (cfg.shift - 1) * t)  # eq. 23: shift > 1 towards noise


def loss_per_sample(model, x0, y, t, eps, cfg):
    """Squared error of the velocity, [B] (Liu et al. 2022, eq. 1; Lipman et al. 2022, eq. 23)."""
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in path(t, cfg))
    return (model(alpha * x0 + sigma * eps, t, y).float() - (eps - x0)).square().mean((1, 2, 3))


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
        v = model(x, t, y).to(x.dtype)
    else:
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null(y, cfg)])).to(x.dtype)
        cond, uncond = both.chunk(2)
        v = uncond + guidance * (cond - uncond)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in path(t, cfg))  # solves x and v = eps - x0 for both
    return (x - sigma * v) / (alpha + sigma), (x + alpha * v) / (alpha + sigma)


def sample_shape(cfg):
    return cfg.shape


def decode(x, cfg):
    return x


# ------------------------------------------------------------------------------------------------
# Sampler: the ODE dx = x0 d(alpha) + eps d(sigma), by Euler (order 1), Heun (2) or classical Runge-Kutta (4)


@torch.no_grad()
def sample(model, x, y, cfg, noise=None, frames=24):
    """From standard normal noise x [N, C, H, W] at t = 1 to samples at t = 0, in equal steps.

    Returns (samples [N, C, H, W], trajectory: a list of about `frames` estimates of x0).
    """
    steps, trajectory, (low, high) = cfg.sampling_steps, [], cfg.guidance_interval

    def f(x, t, s):
        """The estimates (x0, eps) at time t, stacked."""
        w = cfg.guidance if low <= t <= high else 1.0  # Kynkaanniemi et al. 2024, arXiv:2404.07724
        t, s = (torch.full((len(x),), u, device=x.device) for u in (t, s))
        return torch.stack(predict(model, x, t, y, cfg, w, s))

    def move(x, e, t, s):
        """x at time t -> x at time s, if x0 and eps stay as they are."""
        (a_t, s_t), (a_s, s_s) = (path(torch.tensor(u, dtype=torch.float64), cfg) for u in (t, s))
        return x + (a_s - a_t).item() * e[0] + (s_s - s_t).item() * e[1]

    x = x * math.hypot(*(float(c) for c in path(torch.tensor(1.0), cfg)))  # the path's own noise
    for i in range(steps):
        t, s = (steps - i) / steps, (steps - i - 1) / steps
        mid, e = (t + s) / 2, f(x, t, s)
        if (steps - 1 - i) % max(1, round(steps / frames)) == 0:  # includes the last step
            trajectory.append(e[0])
        # The last step must not evaluate the network at t = 0, where eps is undefined.
        if cfg.solver == "heun" and s > 0:
            e = (e + f(move(x, e, t, s), s, s)) / 2
        elif cfg.solver == "rk4" and s > 0:
            e2 = f(move(x, e, t, mid), mid, s)
            e3 = f(move(x, e2, t, mid), mid, s)
            e = (e + 2 * e2 + 2 * e3 + f(move(x, e3, t, s), s, s)) / 6
        elif cfg.solver == "rk4":  # one step of Ralston's third-order method keeps order 4
            late = t + 0.75 * (s - t)
            e2 = f(move(x, e, t, mid), mid, s)
            e = (2 * e + 3 * e2 + 4 * f(move(x, e2, t, late), late, s)) / 9
        x = move(x, e, t, s)
    common.check_finite(x)
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
# Optimizer: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) inside blocks, AdamW for the rest


def newton_schulz(g):
    """[n, rows, columns] -> approximately U V^T of each matrix U S V^T, in three steps.

    Each step applies a polynomial of degree 5 to the singular values, optimal for the range that the last
    step left (Amsel et al. 2025, arXiv:2505.16932): 0.01 to 1 end between 0.71 and 1.27 (in bfloat16 5% off).
    A step maps x to p x, and s = x x^T to p s p, so the product with x, which is longer, comes last.
    """
    x = g if g.shape[1] <= g.shape[2] else g.mT
    x = x / (1.02 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # norms below 1, even after rounding
    s, eye = x @ x.mT, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    p1 = 8.0934 * eye - 23.6206 * s + 17.4463 * s @ s
    s = p1 @ s @ p1
    p2 = 3.6366 * eye - 2.7219 * s + 0.5365 * s @ s
    s = p2 @ s @ p2
    p3 = 2.6613 * eye - 1.9772 * s + 0.4526 * s @ s
    x = p3 @ p2 @ p1 @ x
    return x if g.shape[1] <= g.shape[2] else x.mT


class Muon(torch.optim.AdamW):
    """AdamW, except that groups with `momentum` are updated by their momentum, orthogonalized.

    Matrices of equal shape are stacked; the state of the first holds the momentum of all. A step for which
    `found_inf` is 1 changes nothing, as in fused AdamW, and does not wait for the device.
    """

    @torch.no_grad()
    def step(self):
        for group in (g for g in self.param_groups if "momentum" in g):
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
                g = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
                state, beta, skip = self.state[params[0]], group["momentum"], self.found_inf > 0
                if not state:  # "step" because AdamW reads it when it loads
                    state |= {"momentum": torch.zeros_like(g), "step": torch.zeros(())}
                m = state["momentum"].lerp(g, 1 - beta)
                update = newton_schulz(g.lerp(m, beta).to(self.dtype)).to(g.dtype)  # Nesterov momentum
                update *= max(1, rows / columns) ** 0.5  # one learning rate for all shapes
                if group["weight_decay"]:
                    update += group["weight_decay"] * torch.stack(params)
                state["momentum"] = torch.where(skip, state["momentum"], m)
                torch._foreach_add_(params, list(torch.where(skip, 0.0, update)), alpha=-group["lr"])
            for p in group["params"]:
                p.grad = None  # AdamW skips parameters without gradient
        super().step()


def make_optimizer(model, cfg, dtype):
    """Groups for Muon, and for AdamW with and without weight decay. dtype is that of newton_schulz()."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    muon = cfg.optimizer == "muon"
    named = [(p, muon and "blocks." in n and p.ndim == 2) for n, p in trained.items()]
    groups = [
        {"params": [p for p, matrix in named if matrix], "base_lr": cfg.muon_lr, "momentum": 0.95},
        {"params": [p for p, matrix in named if not matrix and p.ndim > 1], "base_lr": cfg.lr},
        {"params": [p for p, _ in named if p.ndim < 2], "base_lr": cfg.lr, "weight_decay": 0.0},
    ]
    require(groups[0]["params"] or not muon, "Muon finds no matrix named blocks.*; use --optimizer adamw")
    optimizer = Muon(groups, cfg.lr, (0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)
    optimizer.dtype = dtype
    return optimizer


# ------------------------------------------------------------------------------------------------
# Training loop


@torch.no_grad()
def evaluate(model, data, cfg, device, rank, world):
    """(losses, times [n]) of held-out images. The noise and the evenly spaced times are always the same."""
    n, generator = len(data.labels), torch.manual_seed(derive_seed("evaluate"))
    t = (torch.arange(n) + 0.5) / n
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
    model = build_model(cfg).to(device)
    ema = common.EMA(model, cfg.ema_decay)
    dtype, _ = common.prepare(model, cfg, cfg.steps >= 500 and not 0 < cfg.minutes < 1)
    # The average is evaluated and sampled, in any batch size: only a long run recovers compiling it, too.
    common.prepare(ema.model, cfg, cfg.steps >= 20_000 and not 0 < cfg.minutes < 30, dynamic=True)
    optimizer = make_optimizer(model, cfg, dtype)
    owned = sorted(id(p) for g in optimizer.param_groups for p in g["params"])
    trained = sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert owned == trained, "a parameter is in no optimizer group, or in two"
    more = {"dtype": str(dtype)[6:], "processes": world}
    run.write_config(cfg, f"{METHOD}/{METHOD}_{BACKBONE}", device, data, held_out, model, **more)
    held_out = common.evaluation_set(held_out)

    def get_batch(step):
        """This rank's micro-batches [(x0, y, t, eps), ...]. Noise and times are drawn for the global batch
        from (seed, step), so they depend neither on resuming nor on the number of processes."""
        x0, y = batches(step)
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
