"""A DiT in the latent space of a Stable Diffusion VAE, conditioned on classes or on text.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752), "LDM"
below, with the DiT of Peebles & Xie 2022 (arXiv:2212.09748) as in rf_dit_cifar.py, trained as a rectified
flow (Liu et al. 2022, arXiv:2209.03003). Captions are tokens in front of those of the image, with one
attention for both (Chen et al. 2025, "DiT-Air", arXiv:2503.10618). Time t runs from 0 (data) to 1 (noise).

    python latent_dit_sdvae.py --dataset FOLDER                        256 pixels, DiT-B/2, one GPU
    python latent_dit_sdvae.py --dataset FOLDER --text on              with the captions beside the images
    python latent_dit_sdvae.py --vae train --image-size 0 --patch 1    trains a VAE first, on the dataset
    python latent_dit_sdvae.py --resume logs/rf/RUN                    continues a run
    torchrun --standalone --nproc-per-node=2 latent_dit_sdvae.py       the same batch on 2 GPUs
    python ddim_sample.py logs/rf/RUN                                  samples a run

On two CPU cores, the README's command goes from nothing to MNIST digits in ten minutes, VAE included.
"""

import functools
import hashlib
import inspect
import math
import os
import random
import re
import shutil
import unicodedata
import warnings
from collections import Counter
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
from common import UserError, derive_seed, derived, require, resumable

# ------------------------------------------------------------------------------------------------
# Flags: the only place a default lives; the comments are the help


@dataclass
class Config:
    # latents
    vae: str = resumable("stabilityai/sd-vae-ft-mse")  # hub id or folder of diffusers; train = its own
    vae_steps: int = 2000  # training steps of --vae train
    cache: str = resumable("")  # folder of latents and trained VAEs; default DATA_ROOT/latents
    # text
    text: Literal["on", "off"] = "off"  # condition on captions instead of classes
    text_encoder: str = resumable("")  # frozen CLIP or T5, hub id or folder; default learned words
    text_tokens: int = 64  # maximum tokens per caption; longer captions are cut
    # model
    dim: int = 768  # channels per token
    depth: int = 12  # number of blocks
    heads: int = 12  # attention heads
    patch: int = 2  # side of a patch (one token) in latents
    mlp_ratio: float = 4.0  # hidden channels of an MLP divided by dim
    # method
    t_sampling: Literal["uniform", "logit-normal"] = "uniform"  # distribution of the training times
    shift: float = 1.0  # shift of the training times; above 1 towards noise, below 1 towards data
    class_dropout: float = 0.1  # fraction of labels or captions left out; 1 = unconditional
    # guidance and sampling
    guidance: float = 1.5  # guidance scale w of uncond + w (cond - uncond); 1 = off
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times between which guidance acts, such as 0.1 0.8
    sampling_steps: int = 50  # steps of the sampler
    num_samples: int = resumable(100)  # images per grid, all classes or ten captions in turn
    # length
    steps: int = resumable(400_000)  # optimizer steps
    minutes: float = resumable(0.0)  # minutes of training, if they end before the steps; 0 = no limit
    bs: int = 256  # global batch size, whatever the number of processes
    grad_accum: int = 1  # micro-batches per step
    # data
    dataset: str = resumable("cifar10")  # mnist, cifar10, digits, or a folder or .zip of images
    data_root: str = resumable("")  # folder of mnist and cifar10; default $DIFFUSION_DATA, else data/
    image_size: int = 256  # side in pixels that images are resized to; 0 = the dataset's own
    channels: int = 0  # 1 gray, 3 colour, 0 = the VAE's; with --vae train the dataset's own
    flip: Literal["auto", "on", "off"] = "auto"  # random horizontal flips; auto = only for cifar10
    # optimizer
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
    # derived from the dataset and the VAE
    shape: tuple[int, ...] = derived((4, 32, 32))  # of a latent
    classes: tuple[str, ...] = derived(tuple("0123456789"))
    vae_path: str = derived("")  # hub id, or absolute folder
    vae_hash: str = derived("")  # of its weights
    words: tuple[str, ...] = derived(())  # of the training captions
    text_shape: tuple[int, ...] = derived(())  # of a caption's tokens: (L,), or (L, D) of a frozen encoder
    text_path: str = derived("")  # hub id, or absolute folder
    text_hash: str = derived("")  # of its weights
    prompts: tuple[str, ...] = derived(())  # captions of the grids


def check(cfg):
    """Raises UserError for values that cannot work."""
    names = "vae_steps text_tokens sampling_steps num_samples steps bs grad_accum keep log_every"
    common.require_range(cfg, names, 1)
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
    require(cfg.text == "on" or not cfg.text_encoder, "--text-encoder needs --text on; add that")
    check_model(cfg)


# ------------------------------------------------------------------------------------------------
# VAE: images [B, C, H, W] in [-1, 1] <-> latents [B, c, h, w] of about unit variance


def load_vae(path, device, expected_hash=""):
    """An AutoencoderKL or AutoencoderTiny of diffusers, by hub id or folder, frozen. Raises UserError."""
    own = Path(__file__).parent / "vae"  # in a run's code folder, wherever that was moved
    if expected_hash and own.exists() and (own.parents[1] / "run.yaml").exists():
        gone = os.path.isabs(path) and not os.path.exists(path)
        path = str(own) if gone or weights_hash(read_vae(str(own), device)) == expected_hash else path
    vae = read_vae(path, device)
    same = expected_hash in ("", weights_hash(vae))
    require(same, f"VAE {path} is not the one that this run was trained with; restore it")
    return vae


@functools.lru_cache(2)
def read_vae(path, device):
    import diffusers  # takes seconds; --help and most errors do not need it
    import huggingface_hub

    diffusers.utils.logging.set_verbosity_error()  # our error is one line
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        name = diffusers.AutoencoderKL.load_config(path)["_class_name"]
        if name not in ("AutoencoderKL", "AutoencoderTiny"):
            raise ValueError(f"{name} is neither AutoencoderKL nor AutoencoderTiny")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vae = getattr(diffusers, name).from_pretrained(path, low_cpu_mem_usage=False)
    except Exception as e:  # no network, no such id, damaged files: nearly anything
        text = f"cannot load VAE {path} ({common.first_line(e)})"
        raise UserError(f"{text}; set --vae to a folder in diffusers' format, or to train") from None
    return vae.to(device).eval().requires_grad_(False)


def scaling_factor(vae):
    """(scale, shift): latents are (z - shift) scale; 0.18215 and 0 for Stable Diffusion."""
    return getattr(vae.config, "scaling_factor", 1.0), getattr(vae.config, "shift_factor", None) or 0.0


@functools.lru_cache(2)
def weights_hash(model):
    """16 hex digits of the weights of a VAE or text encoder, and of the VAE's scale."""
    digest = hashlib.blake2b(repr((type(model).__name__, scaling_factor(model))).encode(), digest_size=8)
    for value in model.state_dict().values():
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def encode(vae, x):
    """Images -> latents [B, c, h, w], scaled (LDM, app. G). The mean of the posterior is used: sampling from
    it trains no better (logs/README.md) and doubles the cache."""
    (scale, shift), encoded = scaling_factor(vae), vae.encode(x)
    tiny = hasattr(encoded, "latents")  # AutoencoderTiny has no posterior
    z = encoded.latents if tiny else encoded.latent_dist.mean
    return (z - shift) * scale


@torch.no_grad()
def decode(x, cfg):
    """Latents -> images in [-1, 1], in small batches, as the VAE's activations are larger than the DiT's."""
    vae = load_vae(cfg.vae_path, x.device, cfg.vae_hash)
    scale, shift = scaling_factor(vae)
    parts = [vae.decode(z / scale + shift).sample for z in x.float().split(vae_batch_size(cfg))]
    return torch.cat(parts).clamp(-1, 1)


def vae_batch_size(cfg):
    """Images per VAE batch: 16 for latents of 32 x 32, more if they are smaller."""
    return max(1, 16 * 32**2 // math.prod(cfg.shape[1:]))


def train_vae(data, folder, cfg, device):
    """Trains a small AutoencoderKL on a common.Dataset and saves it in diffusers' format.

    The loss is the squared error and a small KL term, without LDM's perceptual and adversarial terms, which
    need networks of their own.
    """
    from diffusers import AutoencoderKL

    C, side, bs, kl_weight = *data.images.shape[1:3], 64, 1e-3
    widths = (32, 64, 64, 128)[: int(math.log2(side / cfg.shape[-1])) + 1]  # each but the first halves it
    down, up = ([f"{kind}Block2D"] * len(widths) for kind in ("DownEncoder", "UpDecoder"))
    more = {"latent_channels": cfg.shape[0], "sample_size": side}
    more |= {"norm_num_groups": 8, "mid_block_add_attention": False}
    torch.manual_seed(derive_seed(cfg.seed, "vae"))
    vae = AutoencoderKL(C, C, down, up, widths, **more).to(device, memory_format=torch.channels_last)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)  # if it cannot be written, this is known now
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    batches = common.Batches(data, bs, cfg.seed, device, flip=cfg.flip == "on")
    bf16 = common.supports_bf16(device)
    for step in tqdm(range(cfg.vae_steps), "training the VAE", disable=None):
        x = batches(step)[0].contiguous(memory_format=torch.channels_last)
        generator = torch.Generator(device).manual_seed(derive_seed(cfg.seed, "vae noise", step))
        noise = torch.randn(bs, *cfg.shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            p = vae.encode(x).latent_dist
            recon = vae.decode(p.mean + p.std * noise).sample.float()
        kl = 0.5 * (p.mean.float().square() + p.var.float() - 1 - p.logvar.float()).mean()
        loss = (recon - x).square().mean() + kl_weight * kl
        loss.backward()
        optimizer.found_inf = (~nn.utils.clip_grad_norm_(vae.parameters(), 1.0).isfinite()).float()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - step / cfg.vae_steps)
        optimizer.step()
        optimizer.zero_grad()
    require(loss.isfinite(), "the VAE's training diverged; check the dataset, or set --vae to a trained one")
    vae.eval().requires_grad_(False)
    some = torch.linspace(0, len(data.labels) - 1, 1000).long().split(50)
    some = (common.images_at(data.images, i.tolist()).to(device).float() / 127.5 - 1 for i in some)
    means = torch.cat([vae.encode(x).latent_dist.mean for x in some])
    vae.register_to_config(scaling_factor=1 / means.std().item(), shift_factor=means.mean().item())
    vae.save_pretrained(temporary)
    if folder.exists():  # another job has trained the same one
        shutil.rmtree(temporary)
    else:
        temporary.rename(folder)  # complete or not at all


def load_data_and_vae(cfg, device, rank, world):
    """-> (cfg with its derived fields, training set, held-out set, VAE). Raises UserError."""
    run = cfg.resume and common.find_run(cfg.resume)
    there = cfg.vae != "train" and Path(cfg.vae).exists()  # ./train is a folder
    path, channels = str(Path(cfg.vae).resolve() if there else cfg.vae), cfg.channels
    if run and (run / "code" / "vae").exists():
        path = str(run / "code" / "vae")
    if path != "train":
        vae = load_vae(path, device, cfg.vae_hash if run else "")
        channels = vae.config.in_channels
        text = f"--channels is {cfg.channels}, but the VAE takes {channels}; leave it out"
        require(cfg.channels in (0, channels), text)
    load = functools.partial(common.load_dataset, cfg.dataset, cfg.data_root, captions=cfg.text == "on")
    data = load("train", cfg.image_size, channels)
    _, C, side, _ = data.images.shape
    held_out = load("test", side, C)
    if cfg.text == "on" and not data.captions:
        text = f"{cfg.dataset} has neither captions nor classes; write 1.txt beside 1.jpg, or metadata.jsonl"
        require(len(data.classes) > 1, text + ' with {"file_name": "1.jpg", "text": "a cat"} per line')
        common.print0("note    no captions: the names of classes are the captions")
        names = data.classes
        data, held_out = (replace(d, captions=[[names[i]] for i in d.labels]) for d in (data, held_out))
    levels = (2 if side < 128 else 3) if path == "train" else len(vae.config.block_out_channels) - 1
    near = side // 2**levels * 2**levels
    sizes = " or ".join(str(s) for s in (near, near + 2**levels) if s)
    text = f"the image side ({side}) must be divisible by {2**levels} for this VAE; use --image-size {sizes}"
    require(near == side, text)
    shape = (4 if path == "train" else vae.config.latent_channels, side >> levels, side >> levels)
    flip = cfg.flip == "on" or (cfg.flip == "auto" and cfg.dataset == "cifar10")
    cfg = replace(cfg, shape=shape, classes=tuple(data.classes), flip="on" if flip else "off")
    cfg = prepare_text(cfg, data)
    check(cfg)
    if path == "train":
        key = derive_seed(pixels_key(data), flip, shape, CODE["train_vae"])
        name = f"vae_{data.name[:40]}_{C}x{side}_steps{cfg.vae_steps}_seed{cfg.seed}_{key:016x}"
        folder = cache_folder(cfg) / name
        if rank == 0 and not folder.exists():
            common.print0(f"vae     training one on {data.name}, {cfg.vae_steps} steps")
            train_vae(data, folder, cfg, device)
        barrier(world)
        path = str(folder.resolve())
        vae = load_vae(path, device)
    return replace(cfg, vae_path=path, vae_hash=weights_hash(vae)), data, held_out, vae


# ------------------------------------------------------------------------------------------------
# Latents: every image is encoded once, in files of CHUNK images

CHUNK = 4096


def cache_folder(cfg):
    return Path(cfg.cache or Path(cfg.data_root or os.environ.get("DIFFUSION_DATA") or "data") / "latents")


def pixels_key(data):
    """Identifies the pixels to encode. fingerprint() identifies the files, and a fork may change images after
    reading them."""
    pixels = replace(data, checksums=b"") if torch.is_tensor(data.images) else data
    return pixels.fingerprint(), *PIXELS


def barrier(world):
    """Waits for all ranks, on the CPU, for days if needed."""
    if world > 1:
        dist.all_reduce(torch.zeros(1))


def encode_dataset(data, vae, cfg, split, device, rank=0, world=1):
    """Encodes a split, unless that is done -> a list of memory maps, float16 [CHUNK, V, c, h, w].

    V: the image, and its mirror image with --flip.
    """
    bf16, flip = common.supports_bf16(device), cfg.flip == "on" and split == "train"
    key = (pixels_key(data), data.images.shape, cfg.vae_hash, cfg.shape, flip, bf16)
    key += (CODE["encode"], CODE["encode_dataset"])
    name = f"{data.name[:40]}_{split}_{data.images.shape[-1]}px_{derive_seed(*key):016x}"

    def encode_part(indices):
        x = common.images_at(data.images, indices).to(device).float() / 127.5 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return torch.stack([encode(vae, v) for v in ([x, x.flip(-1)] if flip else [x])], 1)

    folder, bs = cache_folder(cfg) / name, vae_batch_size(cfg)
    return encode_chunks(folder, split, len(data.labels), encode_part, bs, rank, world)


def encode_chunks(folder, name, n, encode_part, bs, rank, world):
    """encode_part(indices) -> a tensor, for bs of n items at a time -> memory maps of CHUNK items, float16.

    A chunk is written completely or not at all, by whoever finds it missing. Everything that it depends on
    must be in the folder's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:08d}.npy" for i in range(0, n, CHUNK)]
    missing = [f for f in files[rank::world] if not is_valid(f)]
    if missing:
        common.print0(f"cache   encoding {len(missing)} of {len(files)} chunks of {name} into {folder}")
    for file in tqdm(missing, f"encoding {name}", disable=rank > 0 or None):
        indices = range(n)[int(file.stem) :][:CHUNK]
        parts = [encode_part(indices[i : i + bs]).half().cpu() for i in range(0, len(indices), bs)]
        common.write_atomically(file, lambda f, parts=parts: np.save(f, torch.cat(parts).numpy()))
    barrier(world)
    return [np.load(file, mmap_mode="r") for file in files]


def is_valid(file):
    """Whether a .npy file exists and has its whole length."""
    try:
        return np.load(file, mmap_mode="r") is not None
    except (OSError, ValueError, EOFError):
        return False


class Latents:
    """`x0, y = latents(step)`: like common.Batches.

    The latents stay on the disk and are read a step ahead, or on a GPU if they take less than a quarter of
    its memory. With captions, y is one of each image's, drawn in every step.
    """

    def __init__(self, chunks, data, cfg, device, rank=0, world=1, captions=None):
        self.order = common.Batches(data, cfg.bs, cfg.seed, "cpu", rank, world)
        self.chunks, self.device, self.rank_slice = chunks, device, self.order.rank_slice
        self.captions, self.bs, self.seed, self.queue = captions, cfg.bs, cfg.seed, {}
        self.on_gpu, num_bytes = None, sum(c.nbytes for c in chunks)
        if device.type == "cuda" and num_bytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.on_gpu = torch.cat([torch.from_numpy(np.array(c)).to(device) for c in chunks])

    def read(self, step):
        """This rank's part of a step, on the CPU: (indices, views, y), or (latents, y) from the disk."""
        indices, hflip = (v[self.rank_slice] for v in (self.order.indices(step), self.order.hflip(step)))
        views, y = hflip.long() % self.chunks[0].shape[1], self.order.labels[indices]
        if self.captions:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "caption", step))
            y = self.captions(indices, torch.rand(self.bs, generator=generator)[self.rank_slice])
        if self.on_gpu is not None:
            return indices, views, y
        rows = zip(indices.tolist(), views.tolist(), strict=True)
        return torch.from_numpy(np.stack([self.chunks[i // CHUNK][i % CHUNK, v] for i, v in rows])), y

    def __call__(self, step):
        for s in (step, step + 1):
            if s not in self.queue:
                self.queue[s] = common.THREADS.submit(self.read, s)
        *where, y = (common.to_device(v, self.device) for v in self.queue.pop(step).result())
        return (where[0] if self.on_gpu is None else self.on_gpu[tuple(where)]).float(), y


# ------------------------------------------------------------------------------------------------
# Text: a caption is a row of word numbers from 1, int64 [L], or with --text-encoder the last hidden states of
# a frozen encoder, float [L, D]. Zeros are padding, and a row of zeros is the null caption.


def split_words(text):
    """Words in lower case. Each Chinese or Japanese character is a word."""
    return re.findall(r"[^\W_\u2e80-\u9fff]+|[^\W_]", unicodedata.normalize("NFKC", text.casefold()))


def load_text_encoder(cfg):
    """read_text_encoder() of a run. Raises UserError if its weights have changed."""
    tokenizer, encoder = read_text_encoder(cfg.text_path)
    text = f"text encoder {cfg.text_path} is not the one that this run was trained with; restore it"
    require(weights_hash(encoder) == cfg.text_hash, text)
    return tokenizer, encoder


@functools.cache
def read_text_encoder(path):
    """(tokenizer, CLIP text model or T5 encoder) of transformers, by hub id or folder. Raises UserError."""
    try:
        import transformers
    except ImportError:
        raise UserError("--text-encoder needs transformers; install it: pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kinds = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}
    try:
        kind = transformers.AutoConfig.from_pretrained(path).model_type
        if kind not in kinds:
            raise ValueError(f"{kind} is neither CLIP nor T5")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        encoder = getattr(transformers, kinds[kind]).from_pretrained(path).float()
    except Exception as e:  # no network, no such id, damaged files: nearly anything
        text = f"cannot load text encoder {path} ({common.first_line(e)})"
        raise UserError(f"{text}; set --text-encoder to a folder in transformers' format") from None
    return tokenizer, encoder.eval().requires_grad_(False)


def prepare_text(cfg, data):
    """cfg with its derived fields about text. Raises UserError."""
    old_hash = cfg.text_hash if cfg.resume else ""
    cfg = replace(cfg, words=(), text_shape=(), text_path="", text_hash="", prompts=())
    if cfg.text == "off":
        return cfg
    texts, limit, width = sorted({t for captions in data.captions for t in captions}), cfg.text_tokens, ()
    cfg = replace(cfg, prompts=tuple(random.Random(0).sample(texts, min(10, len(texts)))))
    same_kind = not cfg.resume or bool(old_hash) == bool(cfg.text_encoder)
    require(same_kind, f"--text-encoder is {cfg.text_encoder!r}, which the run did not use; leave it out")
    if cfg.text_encoder:
        path = str(Path(cfg.text_encoder).resolve() if Path(cfg.text_encoder).exists() else cfg.text_encoder)
        tokenizer, encoder = read_text_encoder(path)
        longest = getattr(encoder.config, "max_position_embeddings", limit)  # T5 has no maximum
        limit, width = min(limit, longest, tokenizer.model_max_length), (encoder.config.hidden_size,)
        cfg = replace(cfg, text_path=path, text_hash=old_hash or weights_hash(encoder))
    else:  # the most frequent words
        words = Counter(w for t in texts for w in split_words(t)).most_common(8192)
        cfg = replace(cfg, words=tuple(sorted(w for w, _ in words)))
    lengths = count_tokens(texts, cfg) if texts else []
    require(any(lengths), f"no caption of {cfg.dataset} has a word; write some, or use --text off")
    L, num_cut = min(limit, max(lengths)), sum(n > limit for n in lengths)
    text = f"text    {len(texts):,} different captions of at most {max(lengths)} tokens"
    common.print0(text + f", {num_cut} cut to {limit}" * (num_cut > 0))
    return replace(cfg, text_shape=(L, *width))


def count_tokens(texts, cfg):
    """Numbers of tokens of texts."""
    if not cfg.text_path:
        return [len(split_words(text)) for text in texts]
    tokenizer, _ = load_text_encoder(cfg)
    return [len(tokens) for tokens in tokenizer(list(texts)).input_ids]


@torch.no_grad()
def encode_text(texts, cfg, device="cpu"):
    """[N] texts -> int64 [N, L] or float32 [N, L, D]. Unknown words are left out, and long texts are cut."""
    L = cfg.text_shape[0]
    if cfg.text_path:
        tokenizer, encoder = load_text_encoder(cfg)
        more = {"padding": "max_length", "truncation": True, "max_length": L, "return_tensors": "pt"}
        tokens = tokenizer(list(texts), **more).to(device)
        used = tokens.attention_mask * torch.tensor([[text != ""] for text in texts], device=device)
        return encoder.to(device)(**tokens).last_hidden_state * used[..., None]
    number = {w: i for i, w in enumerate(cfg.words, 1)}
    rows = [[number[w] for w in split_words(text) if w in number][:L] for text in texts]
    return torch.tensor([row + [0] * (L - len(row)) for row in rows])


# The source of what is cached, for the names of caches: a fork's differs. Read now, as it may be edited soon.
CODE = {f.__name__: inspect.getsource(f) for f in (train_vae, encode, encode_dataset, encode_text)}
PIXELS = [inspect.getsource(f) for f in (common.decode_image, common.fit_image)]


class Captions:
    """`y = captions(indices, u)`: one encoded caption per image, on the CPU; u in [0, 1) picks it."""

    def __init__(self, data, cfg, device, rank=0, world=1):
        captions = [c or [""] for c in data.captions]  # "" is the null caption
        texts = list(dict.fromkeys(text for c in captions for text in c))
        number = {text: i for i, text in enumerate(texts)}
        self.rows = torch.tensor([number[text] for c in captions for text in c])
        self.count = torch.tensor([len(c) for c in captions])
        self.first = self.count.cumsum(0) - self.count
        if cfg.text_path:
            tokenizer, _ = load_text_encoder(cfg)
            ids = tokenizer(texts).input_ids
            key = derive_seed(ids, cfg.text_hash, cfg.text_shape, CODE["encode_text"])
            folder = cache_folder(cfg) / f"{data.name[:40]}_captions_{key:016x}"
            args = "captions", len(texts), lambda part: encode_text([texts[i] for i in part], cfg, device)
            self.chunks = encode_chunks(folder, *args, 64, rank, world)
        else:
            parts = [texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK)]
            self.chunks = [encode_text(part, cfg).numpy() for part in parts]

    def __call__(self, indices, u):
        rows = self.rows[self.first[indices] + (u * self.count[indices]).long()].tolist()
        return torch.from_numpy(np.stack([self.chunks[i // CHUNK][i % CHUNK] for i in rows]))


# ------------------------------------------------------------------------------------------------
# Model

BACKBONE = "latentdit"


def check_model(cfg):
    """Raises UserError for sizes that do not fit."""
    common.require_range(cfg, "dim depth heads patch", 1)
    common.require_range(cfg, "mlp_ratio", 0.25)
    side = cfg.shape[-1]
    fits = [p for p in range(1, side + 1) if side % p == 0]
    text = f"--patch ({cfg.patch}) must divide the side of the latents ({side}); possible are {fits}"
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


def attention(q, k, v, bias=None):
    """softmax(q k^T / sqrt(dim) + bias) v; each [B, heads, N, dim], bias [B, 1, 1, N] or none."""
    bias = bias if bias is None else bias.to(q.dtype)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The fused kernel takes 3 to 9 times as long (AVX-512, 49 to 256 tokens).
        logits = q * q.shape[-1] ** -0.5 @ k.mT
        return (logits if bias is None else logits + bias).softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, bias)


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

    def forward(self, x, c, cos, sin, bias=None):
        """x [B, N, dim], c [B, 6 dim] -> [B, N, dim], in the dtype of x (under autocast, bfloat16). bias:
        see attention().

        torch.addcmul(a, b, c) is a + b * c in one pass over memory.
        """
        c = (c + self.adaln_bias).to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = c[:, None].chunk(6, dim=-1)
        h = self.qkv(torch.addcmul(shift1, self.norm1(x), 1 + scale1))
        q, k, v = (u.unflatten(2, (self.heads, -1)).transpose(1, 2) for u in h.chunk(3, dim=-1))
        q, k = self.qk_norm(q), self.qk_norm(k)  # bounds the logits (Dehghani et al. 2023, arXiv:2302.05442)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        h = attention(q.to(v.dtype), k.to(v.dtype), v, bias).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, gate1, self.proj(h))
        h = F.relu(self.mlp1(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))
        # Squared ReLU (So et al. 2021, arXiv:2109.08668) learns faster than GELU.
        return torch.addcmul(x, gate2, self.mlp2(h * h))


class DiT(nn.Module):
    """model(x [B, C, H, W], t [B] in [0, 1], y int64 [B], or text [B, L] or [B, L, D]) -> [B, C, H, W]."""

    def __init__(self, cfg):
        super().__init__()
        dim, side, channels = cfg.dim, cfg.shape[-1] // cfg.patch, cfg.shape[0] * cfg.patch**2
        self.patch, self.t_dim, self.grad_checkpoint = cfg.patch, 256, cfg.grad_checkpoint
        self.patch_embed, self.final_linear = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.t_embed = nn.Sequential(nn.Linear(self.t_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        cos, sin = rope_table(side, dim // cfg.heads)
        if cfg.text == "off":
            self.y_embed = nn.Linear(len(cfg.classes) + 1, dim, bias=False)  # the last is the null class
        else:
            L, *width = cfg.text_shape
            self.y_embed = nn.Linear(*width, dim) if width else nn.Embedding(len(cfg.words) + 1, dim)
            self.text_pos = nn.Parameter(torch.zeros(L, dim))
            self.text_blocks = nn.ModuleList([Block(cfg)])  # two learn no better, and cost 5% of a step
            cos, sin = F.pad(cos, (0, 0, L, 0), value=1.0), F.pad(sin, (0, 0, L, 0))  # text is not rotated
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        # One adaLN layer for all blocks, each of which adds its own bias (Chen et al. 2023, arXiv:2310.00426,
        # sec. 2.3): a quarter fewer parameters, a tenth faster, and the same loss.
        self.adaln, self.norm, self.final_adaln = nn.Linear(dim, 6 * dim), norm(dim), nn.Linear(dim, 2 * dim)
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

    def embed_text(self, y):
        """Text [B, L] or [B, L, D] -> (tokens [B, L, dim], their mean [B, dim], and the bias [B, 1, 1, L] of
        attention that masks padding)."""
        mask = y != 0 if y.ndim == 2 else (y != 0).any(-1)
        y = y if y.ndim == 2 else F.rms_norm(y.float(), y.shape[2:])  # encoders differ in scale
        h, bias, L = self.y_embed(y) + self.text_pos, torch.where(mask, 0.0, -1e4)[:, None, None], y.shape[1]
        for block in self.text_blocks:  # those of the image, without time
            h = block(h, h.new_zeros(1, 1), self.cos[:L], self.sin[:L], bias)
        mean = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return h, mean, bias

    def forward(self, x, t, y):
        h, bias = self.patch_embed(patchify(x, self.patch)), None
        n = h.shape[1]
        if y.ndim == 1:  # one-hot, because a compiled lookup's gradient is summed in no fixed order
            c = self.y_embed(F.one_hot(y, self.y_embed.in_features).float())
        else:
            tokens, c, bias = self.embed_text(y)
            h, bias = torch.cat([tokens.to(h.dtype), h], 1), F.pad(bias, (0, n))
        c = F.silu(self.t_embed(common.time_embedding(t, self.t_dim)) + c)
        args = self.adaln(c), self.cos, self.sin, bias
        for block in self.blocks:
            recompute = self.grad_checkpoint and self.training
            h = checkpoint(block, h, *args, use_reentrant=False) if recompute else block(h, *args)
        shift, scale = self.final_adaln(c)[:, None].chunk(2, dim=-1)
        return unpatchify(self.final_linear(self.norm(h[:, -n:]) * (1 + scale) + shift), self.patch)


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
    """y without its condition: the null class, or the null caption."""
    return torch.full_like(y, len(cfg.classes) if cfg.text == "off" else 0)


def conditions(names, cfg):
    """Names or numbers of classes -> y int64 [N], or prompts -> y [N, L] or [N, L, D]; no names: each class
    once, or cfg.prompts. Raises UserError."""
    if cfg.text == "off":
        return common.class_indices(names, cfg.classes)
    for prompt, length in zip(names, count_tokens(names, cfg) if names else [], strict=True):
        unknown = ", ".join(w for w in split_words(prompt) if w not in cfg.words and not cfg.text_path)
        example = f"describe an image, as in {cfg.prompts[0][:80]!r}"
        require(split_words(prompt), f"the prompt {prompt!r} has no words; {example}")
        require(not unknown, f"the training captions have no {unknown}; {example}")
        text = f"the prompt {prompt[:40]!r} has {length} tokens; this run takes at most {cfg.text_shape[0]}"
        require(length <= cfg.text_shape[0], text)
    return encode_text(names or cfg.prompts, cfg)


def predict(model, x, t, y, cfg, guidance=1.0, s=None):
    """The network's estimate at x [B, c, h, w], t [B] as (x0, eps).

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


# ------------------------------------------------------------------------------------------------
# Sampler


@torch.no_grad()
def sample(model, x, y, cfg, noise=None, frames=12):
    """DDIM (Song et al. 2021, eq. 12), on the straight path Euler's method, from standard normal noise
    x [N, c, h, w] at t = 1 to latents at t = 0, in equal steps.

    Returns (latents [N, c, h, w], trajectory: a list of about `frames` estimates of x0).
    """
    steps, trajectory, (low, high) = cfg.sampling_steps, [], cfg.guidance_interval
    x = x * math.hypot(*(float(c) for c in path(torch.tensor(1.0), cfg)))  # the path's own noise
    for i in range(steps):
        t, s = (torch.full((len(x),), (steps - k) / steps, device=x.device) for k in (i, i + 1))
        guided = low <= (steps - i) / steps <= high  # Kynkaanniemi et al. 2024, arXiv:2404.07724
        w = cfg.guidance if guided else 1.0
        x0, eps = predict(model, x, t, y, cfg, w, s)
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in path(s, cfg))
        x = alpha * x0 + sigma * eps
        if i * frames // steps != (i - 1) * frames // steps or i == steps - 1:
            trajectory.append(x0)
    common.check_finite(x)
    return x, trajectory


def sample_grid(model, cfg, device):
    """cfg.num_samples images of all conditions in turn -> (images in [-1, 1], trajectory of images)."""
    y = conditions([], cfg).to(device)
    y = y[torch.arange(cfg.num_samples, device=device) % len(y)]
    generator = torch.Generator(device).manual_seed(derive_seed(cfg.seed, "sample"))
    noise = functools.partial(torch.randn, len(y), *sample_shape(cfg), generator=generator, device=device)
    x, trajectory = sample(model, noise(), y, cfg, noise)
    return decode(x, cfg), [decode(v[:50], cfg) for v in trajectory]


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
    named = [(p, "blocks." in n and p.ndim == 2) for n, p in trained.items()]
    groups = [
        {"params": [p for p, matrix in named if matrix], "base_lr": cfg.muon_lr, "momentum": 0.95},
        {"params": [p for p, matrix in named if not matrix and p.ndim > 1], "base_lr": cfg.lr},
        {"params": [p for p, _ in named if p.ndim < 2], "base_lr": cfg.lr, "weight_decay": 0.0},
    ]
    text = "Muon finds no matrix named blocks.*; rename the model's blocks, or use AdamW"
    require(groups[0]["params"], text)
    optimizer = Muon(groups, cfg.lr, (0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)
    optimizer.dtype = dtype
    return optimizer


# ------------------------------------------------------------------------------------------------
# Training loop


@torch.no_grad()
def evaluate(model, chunks, y, cfg, device, rank, world):
    """(losses, times [n]) of held-out latents with conditions y [n, ...]. The noise and the evenly spaced
    times are always the same."""
    n, generator = len(y), torch.manual_seed(derive_seed("evaluate"))
    t = (torch.arange(n) + 0.5) / n  # the images are in random order
    eps = torch.randn(n, *cfg.shape, generator=generator)
    losses = torch.zeros(n, device=device)  # other ranks' losses stay 0
    size = min(128 * world, 4 * cfg.bs // cfg.grad_accum)  # without gradients, four times as many fit
    for i in range(rank, n, size):
        part = torch.arange(i, min(i + size, n), world)
        x0 = torch.from_numpy(chunks[0][part, 0]).float()  # an evaluation set is one chunk
        cond = null(y[part], cfg) if cfg.class_dropout == 1 else y[part]
        loss = loss_per_sample(model, *(v.to(device) for v in (x0, cond, t[part], eps[part])), cfg)
        losses[part] = loss.view(len(part))
    return losses, t


def reconstruct(data, vae, cfg, device):
    """Rows of training images, each above its reconstruction by the VAE [N, C, H, W]; prints their PSNR."""
    x = common.images_at(data.images, range(min(50, len(data.labels)))).float() / 127.5 - 1
    recon = torch.cat([decode(encode(vae, v), cfg) for v in x.to(device).split(vae_batch_size(cfg))]).cpu()
    psnr = 10 * math.log10(4 / (recon - x).square().mean().item())
    common.print0(f"vae     reconstructs {len(x)} training images with a PSNR of {psnr:.1f} dB")
    return torch.cat([v for pair in zip(x.split(10), recon.split(10), strict=True) for v in pair])


def train(cfg):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = common.get_device(cfg.device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=2))  # ranks wait for each other to encode
    run, timer = common.Run(cfg, __file__, rank), common.Timer(device)

    # Data
    cfg, data, held_out, vae = load_data_and_vae(cfg, device, rank, world)
    few = common.evaluation_set(held_out)
    held_out_latents = encode_dataset(few, vae, cfg, "test", device, rank, world)
    latents = encode_dataset(data, vae, cfg, "train", device, rank, world)
    captions, held_out_y = None, few.labels
    if cfg.text == "on":
        captions = Captions(data, cfg, device, rank, world)
        held_out_y = Captions(few, cfg, device, rank, world)(torch.arange(len(few.labels)), torch.zeros(1))
    latents = Latents(latents, data, cfg, device, rank, world, captions)
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
    more = {"dtype": str(dtype)[6:], "processes": world, "latents": "x".join(map(str, cfg.shape))}
    run.write_config(cfg, f"{METHOD}/{METHOD}_{BACKBONE}", device, data, held_out, model, **more)
    if rank == 0 and run.step == 0:
        if cfg.vae == "train":
            own = run.dir / "code" / "vae"
            if not own.exists():  # nor a part of it, if this was killed
                shutil.copytree(cfg.vae_path, f"{own}.part", dirs_exist_ok=True)
                Path(f"{own}.part").rename(own)
        with common.warn_on_os_error("the reconstruction"):
            common.save_images(run.dir / "samples" / "reconstruction", reconstruct(data, vae, cfg, device))

    def get_batch(step):
        """This rank's micro-batches [(x0, y, t, eps), ...]. Noise and times are drawn for the global batch
        from (seed, step), so they depend neither on resuming nor on the number of processes."""
        x0, y = latents(step)
        generator = torch.Generator(device).manual_seed(derive_seed(cfg.seed, "noise", step))
        eps = torch.randn(cfg.bs, *cfg.shape, generator=generator, device=device)[latents.rank_slice]
        u = torch.rand(2, cfg.bs, generator=generator, device=device)
        t = sample_t(u[0], cfg)[latents.rank_slice]
        drop = (u[1] < cfg.class_dropout)[latents.rank_slice]
        y = torch.where(drop.view(-1, *[1] * (y.ndim - 1)), null(y, cfg), y)
        common.seed_all(cfg.seed, "dropout", step, rank)  # for all other random numbers
        return list(zip(*(v.chunk(cfg.grad_accum) for v in (x0, y, t, eps)), strict=True))

    # Errors in evaluation and sampling show now and not after hours; the first pass compiles.
    evaluate(ema.model, held_out_latents, held_out_y[:8], cfg, device, rank, world)
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
                losses, t = evaluate(ema.model, held_out_latents, held_out_y, cfg, device, rank, world)
                run.validate(step, losses, t)
        if save:
            with timer.section("save"):
                run.save(model, ema, optimizer, timer.training())
        if due(cfg.sample_every):
            with timer.section("sample"), common.warn_on_os_error("the pictures"):
                grid = sample_grid(ema.model, cfg, device)
                prompts = cfg.prompts * cfg.num_samples * (cfg.class_dropout < 1)
                if rank == 0:
                    file = run.dir / "samples" / f"step_{step:08d}"
                    common.save_images(file, *grid, captions=prompts[: cfg.num_samples])
    run.finish(timer, done)


if __name__ == "__main__":
    with common.exit_on_user_error():
        train(common.parse(Config, __doc__))
