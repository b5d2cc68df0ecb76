"""Latent diffusion: a DiT in the latent space of a Stable Diffusion VAE. One file: flags, VAE, cache of
latents, model, method, sampler, optimizer, loop.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752), "LDM"
below, with the DiT of Peebles & Xie 2022 (arXiv:2212.09748) as rf_dit_cifar.py has it; trained as a rectified
flow (Liu et al. 2022, arXiv:2209.03003) or with v-prediction (Salimans & Ho 2022, arXiv:2202.00512).

    python latent_dit_sdvae.py --dataset FOLDER                     256 pixels, DiT-B/2, one GPU
    python latent_dit_sdvae.py --dataset FOLDER --method ddpm       the same with v-prediction
    python latent_dit_sdvae.py --vae train --image-size 0 --patch 1 no download: trains a VAE first
    python latent_dit_sdvae.py --resume logs/rf/RUN                 goes on where a run stopped
    python latent_dit_sdvae.py --sample logs/rf/RUN --guidance 3    samples a finished run
    torchrun --standalone --nproc-per-node=2 latent_dit_sdvae.py    same batch, 2 processes

On two CPU cores the README's line goes from nothing to MNIST's digits in ten minutes, the VAE included.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import time
import warnings
import zlib
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common
from common import UserError, derived, need, seed_of

# ------------------------------------------------------------------------------------------------
# Flags: the only place a default lives; the comment is the help


@dataclass
class Config:
    # latents
    vae: str = "stabilityai/sd-vae-ft-mse"  # hub id, folder in diffusers' format, or train = one of its own
    vae_steps: int = 2000  # of --vae train
    latent_mode: Literal["sample", "mean"] = "sample"  # a fresh draw from the VAE's posterior, or its mean
    cache: str = ""  # folder for latents and trained VAEs; default DATA_ROOT/latents
    # model
    dim: int = 768  # channels of a token
    depth: int = 12  # blocks
    heads: int = 12  # of attention
    patch: int = 2  # side of the square of latents that is a token
    mlp_ratio: float = 4.0  # hidden channels of an MLP in units of dim
    # method
    method: Literal["rf", "ddpm"] = "rf"  # rectified flow, or v-prediction on DDPM's cosine path
    t_sampling: Literal["uniform", "logit-normal"] = "uniform"  # density of the training times
    shift: float = 1.0  # above 1 moves these times towards noise, below 1 towards data
    # guidance and sampling
    class_dropout: float = 0.1  # share of labels replaced by the null class; 1 = unconditional
    guidance: float = 1.5  # w in uncond + w (cond - uncond); 1 = off
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times between which guidance acts, such as 0.1 0.8
    sampling_steps: int = 50  # of DDIM, for the pictures
    num_samples: int = 100  # images in a grid, classes in turn
    # length
    steps: int = 400_000  # optimizer steps
    minutes: float = 0.0  # stop after so many minutes of training if that is earlier; 0 = no limit
    bs: int = 256  # images a step, over all processes
    grad_accum: int = 1  # forward-backward passes that share the bs
    # data
    dataset: str = "cifar10"  # mnist, cifar10, digits, or a folder or .zip of images
    data_root: str = ""  # where mnist and cifar10 are or go; default $DIFFUSION_DATA, else data/
    image_size: int = 256  # resize to this side in pixels; 0 = the dataset's own
    channels: int = 0  # 1 gray, 3 colour, 0 = the VAE's, or with --vae train the dataset's own
    flip: Literal["auto", "on", "off"] = "auto"  # mirror half of the images; auto = of cifar10 alone
    # optimizer: Muon for the matrices of blocks, AdamW for all else
    lr: float = 1e-3  # peak learning rate of AdamW, falling linearly to zero
    muon_lr: float = 0.02  # that of Muon
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
    # from the dataset and the VAE
    shape: tuple[int, ...] = derived((4, 32, 32))  # of a latent
    num_classes: int = derived(10)
    vae_path: str = derived("")  # hub id, or absolute folder
    vae_hash: str = derived("")  # of its weights


def check(cfg):
    """Raises UserError for values and combinations that cannot work."""
    common.in_range(cfg, "dim depth heads patch vae_steps sampling_steps num_samples steps bs grad_accum", 1)
    common.in_range(cfg, "keep log_every", 1)
    common.in_range(cfg, "minutes warmup weight_decay grad_clip eval_every sample_every save_every", 0)
    common.in_range(cfg, "ema_decay class_dropout", 0, 1)
    common.positive(cfg, "lr muon_lr shift mlp_ratio")
    parts, side = cfg.grad_accum * int(os.environ.get("WORLD_SIZE", 1)), cfg.shape[-1]
    need(cfg.bs % parts == 0, f"--bs {cfg.bs} is no multiple of --grad-accum x processes, {parts}; change it")
    fits = [p for p in range(1, side + 1) if side % p == 0]
    text = f"--patch {cfg.patch} does not divide {side}, the side of the latents"
    need(cfg.patch in fits, f"{text}; choose from {fits}")
    unit = 4 * cfg.heads  # a head's channels come in pairs, half of which tell the row, half the column
    need(cfg.dim % unit == 0, f"--dim {cfg.dim} is no multiple of 4 x --heads, {unit}; change one of them")
    need(cfg.guidance == 1 or cfg.class_dropout > 0, "--guidance needs --class-dropout; or give --guidance 1")
    low, high = cfg.guidance_interval
    need(0 <= low <= high <= 1, "--guidance-interval takes two times in [0, 1]; give such as 0.1 0.8")


# ------------------------------------------------------------------------------------------------
# VAE: images [B, C, H, W] in [-1, 1] <-> latents [B, c, h, w] of about unit variance


@functools.lru_cache(2)
def load_vae(path, device):
    """diffusers' AutoencoderKL or AutoencoderTiny by hub id or folder, frozen. Raises UserError."""
    import diffusers  # takes seconds; --help and most errors do without
    import huggingface_hub

    diffusers.utils.logging.set_verbosity_error()  # our error is one line
    huggingface_hub.utils.logging.set_verbosity_error()
    own = Path(__file__).parent / "vae"  # in a run's code/, wherever it is moved to
    path = own if (own.parents[1] / "run.yaml").exists() and own.exists() else path
    try:
        name = diffusers.AutoencoderKL.load_config(path)["_class_name"]
        if name not in ("AutoencoderKL", "AutoencoderTiny"):
            raise ValueError(f"it is a {name}, neither AutoencoderKL nor AutoencoderTiny")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vae = getattr(diffusers, name).from_pretrained(path, low_cpu_mem_usage=False)
    except Exception as e:  # no network, no such id, damaged files: nearly anything
        text = f"the VAE {path} cannot be had ({common.why(e)})"
        raise UserError(f"{text}; give --vae a folder in diffusers' format, or --vae train") from None
    return vae.to(device).eval().requires_grad_(False)


def scale_of(vae):
    """(scale, shift) of latents (z - shift) scale; 0.18215 and 0 for Stable Diffusion."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


@torch.no_grad()
def encode(vae, x):
    """-> mean and standard deviation of the posterior (LDM, app. G), scaled, each [B, c, h, w]."""
    (scale, shift), found = scale_of(vae), vae.encode(x)
    if hasattr(found, "latents"):  # AutoencoderTiny has no posterior
        return (found.latents - shift) * scale, torch.zeros_like(found.latents)
    return (found.latent_dist.mean - shift) * scale, found.latent_dist.std * scale


@torch.no_grad()
def decode(x, cfg):
    """Latents -> images in [-1, 1], few at a time: the VAE's layers are larger than all of the DiT's."""
    vae = load_vae(cfg.vae_path, x.device)
    need(hash_of(vae) == cfg.vae_hash, f"the VAE {cfg.vae_path} is not the one of this run; restore that")
    scale, shift = scale_of(vae)
    parts = [vae.decode(z / scale + shift).sample for z in x.float().split(at_a_time(cfg))]
    return torch.cat(parts).clamp(-1, 1)


def at_a_time(cfg):
    """Images that pass the VAE together: 16 of latents of 32 x 32, more if they are smaller."""
    return max(1, 16 * 32**2 // math.prod(cfg.shape[1:]))


@functools.lru_cache(2)
def hash_of(vae):
    """16 hexadecimal digits of the VAE's weights and scale."""
    digest = hashlib.blake2b(repr((type(vae).__name__, scale_of(vae))).encode(), digest_size=8)
    for value in vae.state_dict().values():
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def train_vae(data, folder, cfg, device):
    """Trains a small AutoencoderKL on a common.Dataset and saves it, in diffusers' format.

    It halves an image's sides twice, from 128 pixels on three times. The loss is the squared error and a
    small KL term, without LDM's perceptual and adversarial ones, which need networks of their own.
    """
    from diffusers import AutoencoderKL

    C, side, bs, kl_weight = *data.images.shape[1:3], 64, 1e-3
    widths = (32, 64, 64, 128)[: halvings(side) + 1]
    down, up = ([f"{kind}Block2D"] * len(widths) for kind in ("DownEncoder", "UpDecoder"))
    more = {"latent_channels": 4, "norm_num_groups": 8, "sample_size": side, "mid_block_add_attention": False}
    torch.manual_seed(seed_of(cfg.seed, "vae"))
    vae = AutoencoderKL(C, C, down, up, widths, **more).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    batches = common.Batches(data, bs, cfg.seed, device, flip=cfg.flip == "on")
    fast = common.device_facts(device)[1]

    def loss_of(x, noise):
        p = vae.encode(x).latent_dist
        error = (vae.decode(p.mean + p.std * noise).sample.float() - x).square().mean()
        kl = 0.5 * (p.mean.float().square() + p.var.float() - 1 - p.logvar.float())
        return error + kl_weight * kl.mean()

    def backward(net, step):
        x, _ = batches(step)
        noise = torch.Generator(device).manual_seed(seed_of(cfg.seed, "vae noise", step))
        noise = torch.randn(bs, 4, *[side >> halvings(side)] * 2, generator=noise, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            loss = net(x.contiguous(memory_format=torch.channels_last), noise)
        loss.backward()
        return loss

    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # in diffusers
    net = common.compiled(loss_of, lambda net: backward(net, 0), cfg, device)
    for step in tqdm(range(cfg.vae_steps), "training the VAE", disable=None):
        optimizer.zero_grad()
        loss = backward(net, step)
        optimizer.found_inf = (~nn.utils.clip_grad_norm_(vae.parameters(), 1.0).isfinite()).float()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - step / cfg.vae_steps)
        optimizer.step()
    need(loss.isfinite(), "the VAE's training diverged; look at the dataset, or give --vae a trained one")
    vae.eval().requires_grad_(False)
    some = [i.tolist() for i in torch.linspace(0, len(data.labels) - 1, 1000).long().split(50)]
    some = (x.to(device).float() / 127.5 - 1 for x, _ in common.read_batches(data.images, some))
    means = torch.cat([vae.encode(x).latent_dist.mean for x in some])
    vae.register_to_config(scaling_factor=1 / means.std().item(), shift_factor=means.mean().item())
    part = folder.with_name(folder.name + ".part")
    vae.save_pretrained(part)
    part.rename(folder)  # whole or not at all


def halvings(side):
    """How often a VAE of our own halves the sides of an image."""
    return 2 if side < 128 else 3


def prepare(cfg, device, rank, world):
    """-> (cfg with shape, num_classes, vae_path and vae_hash, training data, held-out data, VAE).

    Raises UserError before anything slow is done where cfg, data and VAE do not fit together.
    """
    run = cfg.resume and common.find_run(cfg.resume)
    own = run / "code" / "vae" if run and (run / "code" / "vae").exists() else None
    train_it, channels = cfg.vae == "train" and not own, cfg.channels
    if not train_it:
        path = str(own or (Path(cfg.vae).resolve() if Path(cfg.vae).exists() else cfg.vae))
        vae = load_vae(path, device)
        channels = vae.config.in_channels
        if cfg.channels not in (0, channels):
            raise UserError(f"--channels is {cfg.channels}, but the VAE takes {channels}; leave it out")
    load = functools.partial(common.load_dataset, cfg.dataset, cfg.data_root)
    data = load("train", cfg.image_size, channels)
    C, side, _ = data.images.shape[1:]
    held_out = load("test", side, C)
    flip = cfg.flip == "on" or (cfg.flip == "auto" and cfg.dataset == "cifar10")
    levels = halvings(side) if train_it else len(vae.config.block_out_channels) - 1
    c = 4 if train_it else vae.config.latent_channels
    if side % 2**levels:
        near = side // 2**levels * 2**levels
        fit = " or ".join(str(s) for s in (near, near + 2**levels) if s)
        text = f"images of {side} pixels do not suit the VAE, which halves them {levels} times"
        raise UserError(f"{text}; give a multiple of {2**levels}, such as --image-size {fit}")
    cfg = replace(cfg, shape=(c, side >> levels, side >> levels), num_classes=len(data.classes))
    cfg = replace(cfg, flip="on" if flip else "off")
    check(cfg)
    if train_it:
        name = f"vae_{data.name[:40]}_{C}x{side}_{data.fingerprint()[:8]}_steps{cfg.vae_steps}_seed{cfg.seed}"
        name += "_flip" * flip
        folder = cache_folder(cfg) / name
        with alone(folder, rank, world):
            if rank == 0 and not folder.exists():
                common.say(f"vae     training one on {data.name}, {cfg.vae_steps} steps")
                start = time.perf_counter()
                train_vae(data, folder, cfg, device)
                common.say(f"vae     trained in {time.perf_counter() - start:.1f} s, in {folder}")
        path = str(folder.resolve())
        vae = load_vae(path, device)
    return replace(cfg, vae_path=path, vae_hash=hash_of(vae)), data, held_out, vae


# ------------------------------------------------------------------------------------------------
# Cache: every image is encoded once, into a file that is then read in place

CHUNK = 256  # images that are encoded, written and checked together


def cache_folder(cfg):
    return Path(cfg.cache or Path(cfg.data_root or os.environ.get("DIFFUSION_DATA") or "data") / "latents")


def together(world):
    """Waits for all processes."""
    if world > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU, over gloo, which bears hours of waiting


@contextlib.contextmanager
def alone(path, rank, world):
    """No other job, only the processes of this one, works on path meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "a") as file:
        if rank == 0:
            if not common.lock(file):
                common.say(f"waiting for another process that works on {path}")
                common.lock(file, wait=True)
        together(world)
        yield
        together(world)


def encoded(data, vae, cfg, split, device, rank=0, world=1):
    """The posteriors of all images: a memory map, float16 [N, V, 2, c, h, w], of means and deviations.

    V is 2 where mirrored images count, else 1. The folder's name says what it depends on; sums.*.txt has the
    checksum of each chunk that is done, so that what is missing or damaged is encoded, and nothing else.
    Processes share the chunks.
    """
    fast, views = common.device_facts(device)[1], 1 + (cfg.flip == "on" and split == "train")
    shape = (len(data.labels), views, 2, *cfg.shape)
    facts = {"split": split, "fingerprint": data.fingerprint(), "images": list(data.images.shape)}
    facts |= {"vae": cfg.vae_hash, "latents": list(shape), "encoded_in": "bfloat16" if fast else "float32"}
    text = json.dumps(facts, indent=1)
    key = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    folder = cache_folder(cfg) / f"{data.name[:40]}_{split}_{data.images.shape[-1]}px_{key}"
    with alone(folder, rank, world):
        known = folder / "facts.json"
        if rank == 0 and not (known.exists() and known.read_text() == text):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            common.write_atomically(known, lambda f: f.write(text.encode()))
        together(world)
        with open(folder / "latents.f16", "ab") as file:
            file.truncate(2 * math.prod(shape))
        stored = np.memmap(folder / "latents.f16", np.float16, "c", shape=shape)
        sums = {line for f in folder.glob("sums.*.txt") for line in f.read_text().splitlines()}
        begun = {line.split(" ")[0] for line in sums}
        together(world)  # all have read the sums before any writes one

        def whole(i):
            return str(i) in begun and f"{i} {zlib.crc32(stored[i * CHUNK : (i + 1) * CHUNK])}" in sums

        todo = [i for i in range(rank, math.ceil(len(stored) / CHUNK), world) if not whole(i)]
        if damaged := sum(str(i) in begun for i in todo):
            common.say(f"warning: {damaged} chunks in {folder} are damaged; encoding them again")

        chunks = [list(range(i * CHUNK, min((i + 1) * CHUNK, len(stored)))) for i in todo]
        images, start = common.read_batches(data.images, chunks), time.perf_counter()
        with open(folder / "latents.f16", "r+b") as file, open(folder / f"sums.{rank}.txt", "a") as done:
            for i in tqdm(todo, f"encoding {split}", disable=rank > 0 or None):
                (x, _), parts = next(images), []
                for part in x.split(at_a_time(cfg)):
                    part = part.to(device).float() / 127.5 - 1
                    with torch.autocast(device.type, torch.bfloat16, enabled=fast):
                        both = [torch.stack(encode(vae, v), 1) for v in (part, part.flip(-1))[:views]]
                    parts.append(torch.stack(both, 1).half().cpu())
                block = torch.cat(parts).numpy()
                file.seek(i * CHUNK * stored[0].nbytes)
                file.write(block.tobytes())
                file.flush()
                os.fsync(file.fileno())
                done.write(f"\n{i} {zlib.crc32(block)}\n")  # now it counts; the line before may be torn
                done.flush()
    if todo:
        common.say(f"latents {split} encoded in {time.perf_counter() - start:.1f} s, in {folder}")
    return np.memmap(folder / "latents.f16", np.float16, "c", shape=shape)


class Latents:
    """`mean, std, y = latents(step)`: a rank's slice of what common.Batches takes, float32 [n, c, h, w].

    They stay on the disk, but for a GPU of whose memory they take less than a quarter.
    """

    def __init__(self, stored, data, cfg, device, rank, world):
        self.order = common.Batches(data, cfg.bs, cfg.seed, "cpu", rank, world)
        self.stored, self.device, self.rank_slice = torch.from_numpy(stored), device, self.order.rank_slice
        if device.type == "cuda" and stored.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.stored = self.stored.to(device)

    def __call__(self, step):
        rows, mirrored = (v[self.rank_slice] for v in (self.order.indices(step), self.order.hflip(step)))
        view, where = mirrored.long() % self.stored.shape[1], self.stored.device
        posterior = common.send(self.stored[common.send(rows, where), common.send(view, where)], self.device)
        return *posterior.float().unbind(1), common.send(self.order.labels[rows], self.device)


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
        self.qk_norm = norm(dim // cfg.heads)
        self.mlp1, self.mlp2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.bias = nn.Parameter(torch.zeros(6 * dim))

    def forward(self, x, c, cos, sin):
        """x [B, N, dim], c [B, 6 dim] -> [B, N, dim].

        torch.addcmul(a, b, c) is a + b * c in one pass over memory, compiled or not.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (c + self.bias)[:, None].chunk(6, dim=-1)
        h = self.qkv(torch.addcmul(shift1, self.norm1(x), 1 + scale1))
        q, k, v = (u.unflatten(2, (self.heads, -1)).transpose(1, 2) for u in h.chunk(3, dim=-1))
        q, k = self.qk_norm(q), self.qk_norm(k)  # bounds the logits (Dehghani et al. 2023, arXiv:2302.05442)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        h = attention(q, k, v).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, gate1, self.out(h))
        h = self.mlp1(torch.addcmul(shift2, self.norm2(x), 1 + scale2))
        h = F.relu(h)  # and its square (So et al. 2021, arXiv:2109.08668): learns faster than GELU
        return torch.addcmul(x, gate2, self.mlp2(h * h))


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
        # One modulation for all blocks, each with a bias of its own (Chen et al. 2023, arXiv:2310.00426, sec.
        # 2.3), takes a quarter of the parameters and a tenth of the time off, and does not learn worse.
        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm, self.final_modulation = norm(dim), nn.Linear(dim, 2 * dim)
        cos, sin = rope_table(side, dim // cfg.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "modulation" in name or name == "unembed":  # blocks start as the identity, the model at 0
                    nn.init.zeros_(module.weight)
        nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, x, t, y):
        c = F.silu(self.time(common.time_embedding(t, self.time_dim)) + self.label(y))
        h = self.embed(patchify(x, self.patch)).float()  # the residual stream is float32
        modulation = self.modulation(c)
        for block in self.blocks:
            args = h, modulation, self.cos, self.sin
            recompute = self.grad_checkpoint and self.training
            h = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
        shift, scale = self.final_modulation(c)[:, None].chunk(2, dim=-1)
        return unpatchify(self.unembed(self.norm(h) * (1 + scale) + shift), self.patch)


def build_model(cfg):
    return DiT(cfg)


# ------------------------------------------------------------------------------------------------
# Method: x_t = alpha x0 + sigma eps, and the network predicts v = a eps - b x0.
# A new idea usually changes only this section.


def path(t, cfg):
    """t [B] in [0, 1] -> (alpha, sigma), each [B]."""
    if cfg.method == "rf":
        return 1 - t, t
    # Nichol & Dhariwal 2021, eq. 17, in continuous time and without their offset: exact at both ends.
    return torch.sin((1 - t) * math.pi / 2), torch.sin(t * math.pi / 2)


def coefficients(t, cfg):
    """alpha, sigma, a, b at t [B], each [B, 1, 1, 1] or 1; as alpha a + sigma b = 1, x0 = a x - sigma v and
    eps = b x + alpha v.

    Rectified flow: v = eps - x0, the velocity dx/dt. DDPM: v = alpha eps - sigma x0 (Salimans & Ho 2022, sec.
    4), on the cosine path dx/dt over pi / 2.
    """
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in path(t, cfg))
    return (alpha, sigma, 1, 1) if cfg.method == "rf" else (alpha, sigma, alpha, sigma)


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
    """Squared error of v, [B]."""
    alpha, sigma, a, b = coefficients(t, cfg)
    v = model(alpha * x0 + sigma * eps, t, y).float()
    return (v - (a * eps - b * x0)).square().mean((1, 2, 3))


def predict(model, x, t, y, cfg, guidance=1.0):
    """What the network says at x [B, c, h, w], t [B], for classes y [B], as (x0, eps).

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
    alpha, sigma, a, b = coefficients(t, cfg)
    return a * x - sigma * v, b * x + alpha * v


def sample_shape(cfg):
    return cfg.shape


# ------------------------------------------------------------------------------------------------
# Sampler


@torch.no_grad()
def sample(model, x, y, cfg, frames=12):
    """DDIM (Song et al. 2021, eq. 12) from noise x [N, c, h, w] at t = 1 to latents, in equal steps.

    On the straight path it is Euler's method. y int64 [N]. Returns (latents, history: a list of about
    `frames` estimates of x0); decode() makes images of them.
    """
    steps, history = cfg.sampling_steps, []
    for i in range(steps):
        t, s = (torch.full((len(x),), 1 - k / steps, device=x.device) for k in (i, i + 1))
        low, high = cfg.guidance_interval  # Kynkaanniemi et al. 2024, arXiv:2404.07724
        guidance = cfg.guidance if low <= 1 - i / steps <= high else 1.0
        x0, eps = predict(model, x, t, y, cfg, guidance)
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in path(s, cfg))
        x = alpha * x0 + sigma * eps
        if i * frames // steps != (i - 1) * frames // steps or i == steps - 1:
            history.append(x0)
    common.check_finite(x)
    return x, history


def sample_classes(model, cfg, device):
    """cfg.num_samples latents, classes in turn; every process draws them all, the first writes them."""
    y = torch.arange(cfg.num_samples, device=device) % cfg.num_classes
    generator = torch.Generator(device).manual_seed(seed_of(cfg.seed, "sample"))
    x = torch.randn(len(y), *sample_shape(cfg), generator=generator, device=device)
    return sample(model, x, y, cfg)


# ------------------------------------------------------------------------------------------------
# Optimizer: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices of blocks, else AdamW


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
    hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]  # == would compare numbers
    groups = [
        {"params": hidden, "peak": cfg.muon_lr, "momentum": 0.95},
        {"params": [p for p in rest if p.ndim > 1], "peak": cfg.lr},
        {"params": [p for p in rest if p.ndim < 2], "peak": cfg.lr, "weight_decay": 0.0},
    ]
    optimizer = Muon(groups, cfg.lr, (0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)
    optimizer.dtype = dtype
    return optimizer


# ------------------------------------------------------------------------------------------------
# Training loop


@torch.no_grad()
def evaluate(model, stored, labels, cfg, device, rank, world):
    """-> (losses, times [n]) of held-out latents: noise and even times are the same at every call."""
    n, generator = len(labels), torch.Generator().manual_seed(seed_of("evaluate"))
    t = (torch.randperm(n, generator=generator) + 0.5) / n
    eps, fresh = torch.randn(2, n, *cfg.shape, generator=generator)
    losses = torch.zeros(n, device=device)  # those of the other processes stay 0
    for i in range(rank, n, 256 * world):
        rows = torch.arange(i, min(i + 256 * world, n), world)
        mean, std = torch.from_numpy(stored[rows, 0]).float().unbind(1)
        x0 = mean + std * fresh[rows] * (cfg.latent_mode == "sample")
        y = torch.full_like(labels[rows], cfg.num_classes) if cfg.class_dropout == 1 else labels[rows]
        batch = (v.to(device) for v in (x0, y, t[rows], eps[rows]))
        losses[rows] = loss_per_sample(model, *batch, cfg)
    return losses, t


def reconstruct(run, data, vae, cfg, device):
    """samples/reconstruction.png: rows of training images, each above what the VAE makes of it."""
    x, _ = next(common.read_batches(data.images, [list(range(min(50, len(data.labels))))]))
    x = x.float() / 127.5 - 1
    back = torch.cat([decode(encode(vae, v)[0], cfg) for v in x.to(device).split(at_a_time(cfg))]).cpu()
    rows = [v for pair in zip(x.split(10), back.split(10), strict=True) for v in pair]
    with common.harmless("the reconstruction"):
        run.pictures("reconstruction", torch.cat(rows))
    psnr = 10 * math.log10(4 / (back - x).square().mean().item())
    common.say(f"vae     reconstructs {len(x)} training images with a PSNR of {psnr:.1f} dB")


def train(cfg):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = common.pick_device(cfg.device)
    clock = common.Clock(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=2))  # encoding is waited for
    fast = common.device_facts(device)[1]
    dtype = getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if fast else "float32")
    torch.set_float32_matmul_precision("high")
    cfg, data, held_out, vae = prepare(cfg, device, rank, world)
    few = common.evaluation_set(held_out)
    latents = Latents(encoded(data, vae, cfg, "train", device, rank, world), data, cfg, device, rank, world)
    stored_held_out = encoded(few, vae, cfg, "test", device, rank, world)

    torch.manual_seed(seed_of(cfg.seed, "init"))
    model = build_model(cfg).to(device)  # plain: counted, averaged, saved, sampled
    ema = common.EMA(model, cfg.ema_decay)
    optimizer = make_optimizer(model, cfg, torch.bfloat16 if fast else torch.float32)
    owned = sorted(id(p) for g in optimizer.param_groups for p in g["params"])
    assert owned == sorted(map(id, model.parameters())), "a parameter is in no optimizer group, or in two"

    run = common.Run(cfg, __file__, cfg.method, "latentdit", rank)
    run.restore(model, ema, optimizer, clock)
    shape = "x".join(map(str, cfg.shape))
    run.describe(device, data, held_out, model, dtype=str(dtype)[6:], processes=world, latents=shape)
    if rank == 0 and run.first == 0:
        if cfg.vae == "train":
            shutil.copytree(cfg.vae_path, run.dir / "code" / "vae", dirs_exist_ok=True)
        reconstruct(run, data, vae, cfg, device)
    clock.lap("prepare")

    def micro_batches(step):
        """[(x0, y, t, eps), ...] of this rank. Noise and times are drawn for the whole batch, from (seed,
        step), so that neither resuming nor the number of processes changes them."""
        mean, std, y = latents(step)
        generator = torch.Generator(device).manual_seed(seed_of(cfg.seed, "noise", step))
        noise = torch.randn(2, cfg.bs, *cfg.shape, generator=generator, device=device)
        eps, fresh = noise[:, latents.rank_slice]
        x0 = mean + std * fresh if cfg.latent_mode == "sample" else mean
        u = torch.rand(2, cfg.bs, generator=generator, device=device)
        t = draw_times(u[0], cfg)[latents.rank_slice]
        y = torch.where(u[1, latents.rank_slice] < cfg.class_dropout, cfg.num_classes, y)
        torch.manual_seed(seed_of(cfg.seed, "dropout", step, rank))  # of what a fork draws by itself
        return list(zip(*(v.chunk(cfg.grad_accum) for v in (x0, y, t, eps)), strict=True))

    def backward(net, x0, y, t, eps):
        """Adds the gradient of a micro-batch's part of the loss to the parameters; returns that part."""
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_per_sample(net, x0, y, t, eps, cfg).mean() / cfg.grad_accum
        loss.backward()
        return loss.detach()

    # A bug in evaluating or sampling shows now, not after hours.
    evaluate(ema.model, stored_held_out, few.labels[:8], cfg, device, rank, world)
    with common.harmless("a trial picture"):
        decode(sample_classes(ema.model, replace(cfg, num_samples=2, sampling_steps=1), device)[0], cfg)

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
                found = evaluate(ema.model, stored_held_out, few.labels, cfg, device, rank, world)
                run.validate(step, *found)
        if save:
            with clock.apart("save"):
                run.save(model, ema, optimizer, seconds)
        if due(cfg.sample_every):
            with clock.apart("sample"), common.harmless("the pictures"):
                z, history = sample_classes(ema.model, cfg, device)
                if rank == 0:
                    rgb = z[:, : 3 if z.shape[1] > 2 else 1] / 3  # three deviations either way
                    run.pictures(f"step_{step:08d}_latents", rgb)
                    run.pictures(f"step_{step:08d}", decode(z, cfg), [decode(h[:50], cfg) for h in history])
    run.close(clock, finished=done() >= 1)


def sample_run(cfg):
    """--sample RUN: a grid and a GIF from the averaged weights of the newest checkpoint."""
    check(cfg)
    device, run = common.pick_device(cfg.device), common.find_run(cfg.sample)
    state = common.newest_checkpoint(cfg.sample)
    if (run / "code" / "vae").exists():
        cfg = replace(cfg, vae_path=str(run / "code" / "vae"))
    model = build_model(cfg).to(device).eval()
    model.load_state_dict(state["ema"])
    z, history = sample_classes(model, cfg, device)
    path = run / "samples" / f"step_{state['step']:08d}_{cfg.sampling_steps}_w{cfg.guidance:g}_seed{cfg.seed}"
    common.save_pictures(path, decode(z, cfg), [decode(h[:50], cfg) for h in history])
    print(f"wrote {path}.png and .gif")


if __name__ == "__main__":
    with common.one_line_errors():
        cfg = common.parse(Config, __doc__)
        sample_run(cfg) if cfg.sample else train(cfg)
