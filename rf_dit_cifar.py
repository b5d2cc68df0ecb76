"""Rectified flow with a DiT: straight lines from noise to images. One file: flags, model, method, sampler,
optimizer, loop.

Method: Liu et al. 2022, "Flow Straight and Fast" (arXiv:2209.03003), and Lipman et al. 2022, "Flow Matching
for Generative Modeling" (arXiv:2210.02747). Model: Peebles & Xie 2022, "Scalable Diffusion Models with
Transformers" (arXiv:2212.09748), with what came since: rotary positions, QK-norm, squared ReLU, a shared
modulation, Muon.

    python rf_dit_cifar.py --steps 200000 --bs 256              CIFAR-10 on one GPU
    python rf_dit_cifar.py --resume logs/rf/RUN                 goes on where a run stopped
    python rf_dit_cifar.py --sample logs/rf/RUN --solver heun   samples a finished run
    torchrun --standalone --nproc-per-node=2 rf_dit_cifar.py    same batch, 2 processes

On two CPU cores the README's laptop line draws MNIST's digits in six minutes.
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
    dim: int = 512  # channels of a token
    depth: int = 12  # blocks
    heads: int = 8  # of attention
    patch: int = 2  # side of the square of pixels that is a token
    positions: Literal["rope", "sincos"] = "rope"  # rotate queries and keys, or are added to tokens
    adaln: Literal["shared", "block"] = "shared"  # one modulation layer, or one in each block
    mlp_ratio: float = 4.0  # hidden channels of an MLP in units of dim
    dropout: float = 0.0  # inside the MLPs
    # method
    t_sampling: Literal["uniform", "logit-normal"] = "uniform"  # density of the training times
    shift: float = 1.0  # above 1 moves these times towards noise, below 1 towards data
    # guidance and sampling
    class_dropout: float = 0.1  # share of labels replaced by the null class; 1 = unconditional
    guidance: float = 1.5  # w in uncond + w (cond - uncond); 1 = off
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times between which guidance acts, such as 0.1 0.8
    solver: Literal["euler", "heun", "rk4"] = "euler"  # of the ODE: 1, 2 or 4 evaluations a step
    sampling_steps: int = 50  # of the solver, for the pictures
    num_samples: int = 100  # images in a grid, classes in turn
    # length
    steps: int = 200_000  # optimizer steps
    minutes: float = 0.0  # stop after so many minutes of training if that is earlier; 0 = no limit
    bs: int = 256  # images a step, over all processes
    grad_accum: int = 1  # micro-batches a step
    # data
    dataset: str = "cifar10"  # mnist, cifar10, digits, or a folder or .zip of images
    data_root: str = ""  # where mnist and cifar10 are or go; default $DIFFUSION_DATA, else data/
    image_size: int = 0  # resize to this side in pixels; 0 = the dataset's own
    channels: int = 0  # 1 gray, 3 colour, 0 = the dataset's own
    flip: Literal["auto", "on", "off"] = "auto"  # mirror half of the images; auto = of cifar10 alone
    # optimizer
    optimizer: Literal["muon", "adamw"] = "muon"  # of the matrices inside blocks; all else has AdamW
    lr: float = 1e-3  # peak learning rate of AdamW, falling linearly to zero
    muon_lr: float = 0.02  # peak learning rate of Muon
    warmup: int = 100  # steps until the peak
    weight_decay: float = 0.0  # of matrices
    grad_clip: float = 1.0  # largest gradient norm; 0 = off
    ema_decay: float = 0.9999  # of the averaged weights; a young run uses less
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
    common.in_range(cfg, "dim depth heads patch sampling_steps num_samples steps bs grad_accum", 1)
    common.in_range(cfg, "keep log_every", 1)
    common.in_range(cfg, "minutes warmup weight_decay grad_clip eval_every sample_every save_every", 0)
    common.in_range(cfg, "dropout ema_decay class_dropout", 0, 1)
    common.positive(cfg, "lr muon_lr shift mlp_ratio")
    parts = cfg.grad_accum * int(os.environ.get("WORLD_SIZE", 1))
    need(cfg.bs % parts == 0, f"--bs {cfg.bs} is no multiple of --grad-accum x processes, {parts}; change it")
    side = cfg.shape[-1]
    fits = [p for p in range(1, side + 1) if side % p == 0]
    need(cfg.patch in fits, f"--patch {cfg.patch} does not divide {side} pixels; choose from {fits}")
    unit = 4 * cfg.heads  # a head's channels come in pairs, half of which tell the row, half the column
    need(cfg.dim % unit == 0, f"--dim {cfg.dim} is no multiple of 4 x --heads, {unit}; change one of them")
    need(cfg.guidance == 1 or cfg.class_dropout > 0, "--guidance needs --class-dropout; or give --guidance 1")
    low, high = cfg.guidance_interval
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
    """cos and sin [side * side, dim / 2] of the angles by which a token's place turns a head's channel pairs
    (Su et al. 2021, arXiv:2104.09864, eq. 34): half of the pairs tell its row, half its column."""
    freqs = 100.0 ** -(torch.arange(dim // 4) / (dim // 4))  # radians a token, from 1 down to about 0.01
    angles = torch.arange(side)[:, None] * freqs
    angles = torch.cat([angles.repeat_interleave(side, 0), angles.repeat(side, 1)], dim=1)
    return angles.cos(), angles.sin()


def sincos_table(side, dim):
    """[side * side, dim]: half the channels tell the row, half the column (Peebles & Xie 2022, sec. 3.2)."""
    lines = common.time_embedding(torch.arange(side) / 1000, dim // 2)  # which multiplies by 1000
    return torch.cat([lines.repeat_interleave(side, 0), lines.repeat(side, 1)], dim=1)


def rotate(x, cos, sin):
    """Turns the channel pairs (i, i + dim / 2) of x [..., N, dim]; see rope_table."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def attention(q, k, v):
    """softmax(q k^T / sqrt(dim)) v; each [B, heads, N, dim]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The fused kernel takes 3 to 9 times as long, forward and backward (AVX-512, 49 to 256 tokens).
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def norm(dim):
    """Without weights: the modulation scales and shifts."""
    return nn.LayerNorm(dim, 1e-6, elementwise_affine=False)


class ClassEmbedding(nn.Embedding):
    """Rows of a table by products with one-hot rows: the gradient of a look-up may be added up in no fixed
    order (compiled, and on a GPU), and two equal runs would differ."""

    def forward(self, y):
        with torch.autocast("cuda" if y.is_cuda else "cpu", enabled=False):
            return F.one_hot(y, self.num_embeddings).float() @ self.weight


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
        """x [B, N, dim], c [B, dim], or [B, 6 dim] with a shared modulation -> [B, N, dim].

        torch.addcmul(a, b, c) is a + b * c in one pass over memory, compiled or not.
        """
        c = self.modulation(c) if self.modulation else c + self.bias
        shift1, scale1, gate1, shift2, scale2, gate2 = c[:, None].chunk(6, dim=-1)
        h = self.qkv(torch.addcmul(shift1, self.norm1(x), 1 + scale1))
        q, k, v = (u.unflatten(2, (self.heads, -1)).transpose(1, 2) for u in h.chunk(3, dim=-1))
        q, k = self.qk_norm(q), self.qk_norm(k)  # bounds the logits (Dehghani et al. 2023, arXiv:2302.05442)
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        h = attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, gate1, self.out(h))
        h = self.mlp1(torch.addcmul(shift2, self.norm2(x), 1 + scale2))
        h = F.relu(h)  # and its square (So et al. 2021, arXiv:2109.08668): learns faster than GELU
        return torch.addcmul(x, gate2, self.mlp2(self.dropout(h * h)))


class DiT(nn.Module):
    """model(x [B, C, H, W], t [B] in [0, 1], y int64 [B]) -> [B, C, H, W]; y = num_classes is no class."""

    def __init__(self, cfg):
        super().__init__()
        dim, side, channels = cfg.dim, cfg.shape[-1] // cfg.patch, cfg.shape[0] * cfg.patch**2
        self.patch, self.time_dim, self.grad_checkpoint = cfg.patch, 256, cfg.grad_checkpoint
        self.embed, self.unembed = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.time = nn.Sequential(nn.Linear(self.time_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = ClassEmbedding(cfg.num_classes + 1, dim)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm, self.final_modulation = norm(dim), nn.Linear(dim, 2 * dim)
        # One modulation layer for all blocks, each adding a bias of its own (Chen et al. 2023,
        # arXiv:2310.00426, sec. 2.3): a quarter fewer parameters, a tenth faster, and it learns no worse.
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
        h = self.embed(patchify(x, self.patch)).float() + self.positions  # the residual stream is float32
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
    t = ((torch.arange(len(u), device=u.device) + u) / len(u)).clamp(1e-5, 1 - 1e-5)
    if cfg.t_sampling == "logit-normal":  # Esser et al. 2024, eq. 19, with location 0 and scale 1
        t = torch.sigmoid(torch.special.ndtri(t))
    return cfg.shift * t / (1 + (cfg.shift - 1) * t)  # ibid., eq. 23: shift > 1 towards noise


def loss_per_sample(model, x0, y, t, eps, cfg):
    """Squared error of the velocity, [B] (Liu et al. 2022, eq. 1; Lipman et al. 2022, eq. 23)."""
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in path(t, cfg))
    return (model(alpha * x0 + sigma * eps, t, y).float() - (eps - x0)).square().mean((1, 2, 3))


def predict(model, x, t, y, cfg, guidance=1.0):
    """What the network says at x [B, C, H, W], t [B], for classes y [B], as (x0, eps); dx/dt is eps - x0.

    Guidance (Ho & Salimans 2022, eq. 6; here w = 1 is off) takes one call, batched with the null class.
    """
    null = torch.full_like(y, cfg.num_classes)
    if cfg.class_dropout == 1:  # trained unconditionally: the labels mean nothing
        y, guidance = null, 1.0
    if guidance == 1:
        v = model(x, t, y).to(x.dtype)
    else:
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).to(x.dtype)
        cond, uncond = both.chunk(2)
        v = uncond + guidance * (cond - uncond)
    t = t.view(-1, 1, 1, 1)
    return x - t * v, x + (1 - t) * v


def sample_shape(cfg):
    return cfg.shape


def decode(x, cfg):
    return x


# ------------------------------------------------------------------------------------------------
# Sampler: the ODE dx/dt = velocity, by Euler (order 1), Heun (2) or the classical Runge-Kutta method (4)


@torch.no_grad()
def sample(model, x, y, cfg, frames=24):
    """Follows the flow from noise x [N, C, H, W] at t = 1 to images at t = 0, in equal steps; y int64 [N].

    Returns (images [N, C, H, W] in [-1, 1], history: a list of about `frames` of the estimates of x0).
    """
    steps, history = cfg.sampling_steps, []

    def velocity(x, t):
        low, high = cfg.guidance_interval  # Kynkaanniemi et al. 2024, arXiv:2404.07724
        guidance = cfg.guidance if low <= t <= high else 1.0
        x0, eps = predict(model, x, torch.full((len(x),), t, device=x.device), y, cfg, guidance)
        return eps - x0

    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps  # from t to s
        h, middle, v = s - t, (t + s) / 2, velocity(x, t)
        if (steps - 1 - i) % max(1, round(steps / frames)) == 0:  # the last step is one of them
            history.append(decode(x - t * v, cfg))
        # The last step must not ask the network at t = 0, where eps is not defined.
        if cfg.solver == "euler" or (cfg.solver == "heun" and s == 0):
            x = x + h * v
        elif cfg.solver == "heun":
            x = x + h / 2 * (v + velocity(x + h * v, s))
        elif s == 0:  # Ralston's method of order 3, once, leaves the whole at order 4
            v2 = velocity(x + h / 2 * v, middle)
            v3 = velocity(x + 3 / 4 * h * v2, t + 3 / 4 * h)
            x = x + h / 9 * (2 * v + 3 * v2 + 4 * v3)
        else:
            v2 = velocity(x + h / 2 * v, middle)
            v3 = velocity(x + h / 2 * v2, middle)
            x = x + h / 6 * (v + 2 * v2 + 2 * v3 + velocity(x + h * v3, s))
    common.check_finite(x)
    return decode(x, cfg).clamp(-1, 1), history


def sample_classes(model, cfg, device):
    """cfg.num_samples images, classes in turn; every process draws them all, the first writes them."""
    y = torch.arange(cfg.num_samples, device=device) % cfg.num_classes
    generator = torch.Generator(device).manual_seed(seed_of(cfg.seed, "sample"))
    x = torch.randn(len(y), *sample_shape(cfg), generator=generator, device=device)
    return sample(model, x, y, cfg)


# ------------------------------------------------------------------------------------------------
# Optimizer: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) inside blocks, AdamW for the rest


def orthogonal(g):
    """[n, rows, columns] -> about U V^T of each matrix U S V^T, by three steps of Newton-Schulz's kind.

    Each applies a polynomial of degree 5 to the singular values, the best one for where the last has left
    them (Amsel et al. 2025, arXiv:2505.16932): those of 0.01 to 1 end between 0.71 and 1.27. A step takes x
    to p x, and s = x x^T to p s p; x, which has the longer side, waits for the end.
    """
    x = g if g.shape[1] <= g.shape[2] else g.mT
    x = x / (1.02 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # below 1, after rounding too
    s, eye = x @ x.mT, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    p1 = 8.0934 * eye - 23.6206 * s + 17.4463 * s @ s
    s = p1 @ s @ p1
    p2 = 3.6366 * eye - 2.7219 * s + 0.5365 * s @ s
    s = p2 @ s @ p2
    p3 = 2.6613 * eye - 1.9772 * s + 0.4526 * s @ s
    x = p3 @ p2 @ p1 @ x
    return x if g.shape[1] <= g.shape[2] else x.mT


class Muon(torch.optim.AdamW):
    """AdamW, but in groups with `momentum` the update of a matrix is its momentum, made orthogonal.

    Matrices of one shape are stacked into one tensor; the state of the first holds the momentum of all.
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
                if not state:  # "step" because AdamW reads it when it loads
                    state |= {"momentum": torch.zeros_like(g), "step": torch.zeros(())}
                m = state["momentum"].lerp(g, 1 - beta)
                update = orthogonal(g.lerp(m, beta).to(self.dtype)).to(g.dtype)  # with Nesterov's momentum
                update *= max(1, rows / columns) ** 0.5  # one learning rate for all shapes
                if group["weight_decay"]:
                    update += group["weight_decay"] * torch.stack(params)
                state["momentum"] = torch.where(skip, state["momentum"], m)
                torch._foreach_add_(params, list(torch.where(skip, 0.0, update)), alpha=-group["lr"])
            for p in group["params"]:
                p.grad = None  # done: AdamW leaves alone what has no gradient
        super().step()


def make_optimizer(model, cfg, dtype):
    """Groups for Muon and for AdamW with and without decay; `peak` is a group's learning rate after the
    warm-up. dtype is that of orthogonal(), which need not be exact."""
    hidden = [p for p in model.blocks.parameters() if p.ndim == 2 and cfg.optimizer == "muon"]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]  # == would compare numbers
    groups = [
        {"params": hidden, "peak": cfg.muon_lr, "momentum": 0.95},
        {"params": [p for p in rest if p.ndim > 1], "peak": cfg.lr},
        {"params": [p for p in rest if p.ndim < 2], "peak": cfg.lr, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    optimizer = Muon(groups, cfg.lr, (0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)
    optimizer.dtype = dtype
    return optimizer


# ------------------------------------------------------------------------------------------------
# Training loop


@torch.no_grad()
def evaluate(model, data, cfg, device, rank, world):
    """-> (losses, times [n]) of held-out images: noise and even times are the same at every call."""
    n, generator = len(data.labels), torch.Generator().manual_seed(seed_of("evaluate"))
    t = (torch.arange(n) + 0.5) / n
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
    torch.set_float32_matmul_precision("high")

    torch.manual_seed(seed_of(cfg.seed, "init"))
    model = build_model(cfg).to(device)  # plain: counted, averaged, saved, sampled
    ema = common.EMA(model, cfg.ema_decay)
    optimizer = make_optimizer(model, cfg, torch.bfloat16 if fast else torch.float32)
    owned = sorted(id(p) for g in optimizer.param_groups for p in g["params"])
    assert owned == sorted(map(id, model.parameters())), "a parameter is in no optimizer group, or in two"

    run, clock = common.Run(cfg, __file__, "rf", "dit", rank), common.Clock(device)
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
        u = torch.rand(2, cfg.bs, generator=generator, device=device)
        t = draw_times(u[0], cfg)[batches.rank_slice]
        y = torch.where(u[1, batches.rank_slice] < cfg.class_dropout, cfg.num_classes, y)
        torch.manual_seed(seed_of(cfg.seed, "dropout", step, rank))
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
        pace = min(1.0, (step + 1) / (cfg.warmup + 1)) * (1 - done())
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * pace
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
        run.record(step, loss=loss, grad_norm=grad_norm, lr=cfg.lr * pace, seconds=seconds)

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
    device, state = common.pick_device(cfg.device), common.newest_checkpoint(cfg.sample)
    model = build_model(cfg).to(device).eval()
    model.load_state_dict(state["ema"])
    when = "" if cfg.guidance_interval == (0, 1) else "_{:g}-{:g}".format(*cfg.guidance_interval)
    name = f"step_{state['step']:08d}_{cfg.solver}{cfg.sampling_steps}_w{cfg.guidance:g}{when}_seed{cfg.seed}"
    path = common.find_run(cfg.sample) / "samples" / name
    common.save_pictures(path, *sample_classes(model, cfg, device))
    print(f"wrote {path}.png and .gif")


if __name__ == "__main__":
    with common.one_line_errors():
        cfg = common.parse(Config, __doc__)
        sample_run(cfg) if cfg.sample else train(cfg)
