"""Samples any run, in few steps: DDIM, Heun, DPM-Solver++(2M); also inversion, interpolation, comparison.

Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models" (arXiv:2010.02502); Karras et al. 2022,
"Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv:2206.00364), "EDM" below; Lu et al.
2022, "DPM-Solver++" (arXiv:2211.01095). What is sampled comes from the code in the run's folder, which is
executed: a run from someone else runs that someone's code.

    python ddim_sample.py RUN                                  100 samples, classes in turn: grid and GIFs
    python ddim_sample.py RUN --solver dpmpp2m --steps 12      the same in a quarter of the evaluations
    python ddim_sample.py RUN --num-samples 50000 --bs 500 --npz       for FID tools; once stopped, goes on
    python ddim_sample.py RUN --interpolate 10                 rows between the noises of two samples
    python ddim_sample.py RUN --invert                         images of the dataset to noise and back
    python ddim_sample.py RUN --compare                        the same noise, every solver, 5 to 100 steps
"""

import importlib.util
import json
import math
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw
from tqdm import tqdm

import common
from common import UserError, need, seed_of

# ------------------------------------------------------------------------------------------------
# Flags: the only place a default lives; the comment is the help


@dataclass
class Config:
    # method
    solver: Literal["ddim", "heun", "dpmpp2m"] = "ddim"  # first order, or one of second order
    steps: int = 0  # of the solver; 0 = 50 for ddim, 18 for heun, 15 for dpmpp2m
    eta: float = 0.0  # fresh noise of ddim: 0 none, 1 as DDPM's ancestral sampler
    spacing: Literal["auto", "uniform", "karras", "logsnr"] = "auto"  # of times; auto = uniform, eps: logsnr
    guidance: float = -1.0  # w in uncond + w (cond - uncond); 1 = off, -1 = the run's own
    guidance_interval: tuple[float, ...] = (0.0, 1.0)  # times between which guidance acts, such as 0.1 0.8
    clip_x0: Literal["auto", "on", "off", "dynamic"] = "auto"  # estimates of x0 to [-1, 1]; auto = as the run
    weights: Literal["ema", "model"] = "ema"  # averaged, or as trained
    step: int = 0  # checkpoint of this step; 0 = the newest
    # what
    num_samples: int = 100  # samples (--num is the beginning of a flag of torchrun)
    classes: tuple[str, ...] = ()  # names of classes or their numbers, such as cat dog or 0,1,7, in turn
    seed: int = 0  # sample i depends on (seed, i) alone
    bs: int = 100  # samples at a time
    interpolate: int = 0  # images a row, from the noise of one sample to that of another
    invert: bool = False  # held-out images of the run's dataset to noise and back
    compare: bool = False  # the same noise through every solver at 5, 10, 20, 50, 100 steps
    dataset: str = ""  # for --invert, where the run's dataset lies now; default as for training
    data_root: str = ""  # for --invert, where mnist and cifar10 lie; default as for training
    # output
    npz: bool = False  # also NAME.npz: uint8 arr_0 [N, H, W, C], labels arr_1, and how they were made
    png: bool = False  # also NAME/000000.png, ...
    frames: int = 30  # at most, of the GIFs; 0 = no GIF
    out: str = ""  # folder; default RUN/samples
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = the fastest there is


STEPS = {"ddim": 50, "heun": 18, "dpmpp2m": 15}


def check(flags):
    """Raises UserError for values and combinations that cannot work with any run."""
    common.in_range(flags, "steps step frames interpolate", 0)
    common.in_range(flags, "num_samples bs", 1)
    common.in_range(flags, "eta", 0, 1)
    modes = [f"--{m}" for m in ("interpolate", "invert", "compare") if getattr(flags, m)]
    files, mode = flags.npz or flags.png, " and ".join(modes)
    low, high = flags.guidance_interval if len(flags.guidance_interval) == 2 else (1, 0)
    for wrong, text in [
        (not 0 <= low <= high <= 1, "--guidance-interval takes two times in [0, 1]; give such as 0.1 0.8"),
        (not flags.guidance >= 0 and flags.guidance != -1, "--guidance is negative; give 0 or more"),
        (len(modes) > 1, f"{mode} contradict each other; give one of them"),
        (modes and files, f"{mode} only draws pictures; leave out --npz and --png"),
        (modes and flags.eta, f"{mode} needs samplers without noise; leave out --eta"),
        (flags.eta and flags.solver != "ddim", f"--eta: {flags.solver} adds no noise; give --solver ddim"),
        (flags.invert and flags.solver != "ddim", "--invert is done by DDIM; leave out --solver"),
        (flags.compare and flags.solver != "ddim", "--compare takes every solver; leave out --solver"),
        (flags.compare and flags.steps, "--compare has steps of its own; leave out --steps"),
        (flags.interpolate == 1, "--interpolate is 1; give at least 2 images a row"),
        (
            flags.num_samples > 1000 and not files,
            "--num-samples: no picture holds so many; add --npz or --png",
        ),
    ]:
        need(not wrong, text)


# ------------------------------------------------------------------------------------------------
# Samplers: pure functions of a predictor f(x, t) -> (x0, eps), x at the first time of a grid, and the grid, a
# list of (t, alpha, sigma) that falls to (0, 1, 0). Each yields (x, estimate of x0) after every step.


def ddim(f, x, grid, eta=0.0, noise=None):
    """Song et al. 2021, eq. 12 and 16, on any path; eta = 1 is DDPM's ancestral step (Ho et al. 2020).

    noise() returns fresh noise like x. Order 1, one evaluation a step; on the straight path, Euler's method.
    """
    for (t, a_t, s_t), (_, a_s, s_s) in pairwise(grid):
        x0, eps = f(x, t)
        tau = eta * s_s / s_t * math.sqrt(max(s_t**2 - (a_t / a_s) ** 2 * s_s**2, 0.0))
        x = a_s * x0 + math.sqrt(max(s_s**2 - tau**2, 0.0)) * eps
        x = x + tau * noise() if tau else x
        yield x, x0


def heun(f, x, grid):
    """Heun's method on the probability-flow ODE (EDM, algorithm 1): order 2, two evaluations a step.

    On any path the ODE reads dx = x0 d(alpha) + eps d(sigma), x0 and eps being the estimates at (x, t); the
    trapezoidal rule takes their means over the step. That is EDM's own step where alpha = 1 and the usual one
    on the straight path; unlike EDM's in x / alpha, it is at ease at alpha = 0. Euler's step ends it.
    """
    for (t, a_t, s_t), (s, a_s, s_s) in pairwise(grid):
        x0, eps = f(x, t)
        x = a_s * x0 + s_s * eps
        if s_s > 0:
            x0_s, eps_s = f(x, s)
            x = x + (a_s - a_t) / 2 * (x0_s - x0) + (s_s - s_t) / 2 * (eps_s - eps)
        yield x, x0


def dpmpp2m(f, x, grid):
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2, in lambda = log(alpha / sigma); order 2.

    Of order 1 are the first step, for want of an earlier estimate, the last, into lambda = inf, and a second
    after one that came from lambda = -inf. a_s - a_t s_s / s_t is the paper's -a_s (exp(-h) - 1).
    """
    before = h_before = None
    for (t, a_t, s_t), (_, a_s, s_s) in pairwise(grid):
        x0, _ = f(x, t)
        h = math.log(a_s / s_s * s_t / a_t) if a_t and s_s else math.inf
        c = 0.0 if before is None or s_s == 0 else h / (2 * h_before)  # 1 / (2 r)
        D = x0 if c == 0 else x0 + c * (x0 - before)
        x = s_s / s_t * x + (a_s - a_t * s_s / s_t) * D
        before, h_before = x0, h
        yield x, x0


def invert(f, x, grid, t_min):
    """DDIM's ODE from data to noise (Song et al. 2021, eq. 14) up the same grid; order 1.

    Networks are not trained at t = 0: the first estimate is that of time t_min, taken at the clean x.
    """
    for (s, a_s, s_s), (_, a_t, s_t) in pairwise(reversed(grid)):
        _, eps = f(x, max(s, t_min))
        x0 = (x - s_s * eps) / a_s
        x = a_t * x0 + s_t * eps
        yield x, x0


def slerp(a, b, w):
    """From a (w = 0) to b (w = 1), both [C, H, W], along a great circle (Song et al. 2021, sec. 5.3)."""
    theta = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - w) * theta) * a + torch.sin(w * theta) * b) / torch.sin(theta)


def sampler(flags, f, x, grid, noise=None):
    """The sampler that the flags name."""
    if flags.solver == "ddim":
        return ddim(f, x, grid, flags.eta, noise)
    return {"heun": heun, "dpmpp2m": dpmpp2m}[flags.solver](f, x, grid)


def last(steps):
    """The final x of a sampler."""
    return deque(steps, 1)[0][0]


def make_grid(path, steps, spacing, T=None):
    """steps + 1 times, falling to 0, with their alpha and sigma: [(t, alpha, sigma), ...].

    path(t float64 [N]) -> (alpha, sigma). Times are distinct multiples of 1/T, or of 1e-5 where the path is
    continuous (T None). `uniform` in t from 1 (diffusers' "trailing"); `karras` in (sigma / alpha)^(1/7), EDM
    eq. 5; `logsnr` in log(sigma / alpha) (DPM-Solver, Lu et al. 2022); these two run from sigma / alpha = 80
    to 0.002, as far as there are such times, and then to 0.
    """
    T, i = T or 100_000, np.arange(steps + 1)
    alpha, sigma = path(torch.arange(T + 1, dtype=torch.float64) / T)
    noisy = (sigma / alpha).numpy()  # rises from 0, perhaps to infinity
    if spacing == "uniform":
        k = T * i / steps
    else:
        low, high, u = max(noisy[1], 0.002), min(noisy[-1], 80.0), i[:-1] / max(steps - 1, 1)
        karras = (low ** (1 / 7) + u * (high ** (1 / 7) - low ** (1 / 7))) ** 7
        wanted = karras if spacing == "karras" else low * (high / low) ** u
        k = np.append(0, np.interp(np.log(wanted), np.log(noisy[1:]), np.arange(1, T + 1)))
    k = np.maximum.accumulate(k.round().astype(int) - i) + i  # distinct, though roundings collide near 0,
    k = np.minimum(k, T - steps + i)  # and none above T
    return [(j / T, float(alpha[j]), float(sigma[j])) for j in reversed(k.tolist())]


# ------------------------------------------------------------------------------------------------
# The run: its code, its configuration, its weights


def load_script(run):
    """The script in RUN/code as a module; from then on `import common` means the one beside it."""
    theirs = run / "code" / "common.py"
    found = [f for f in (run / "code").glob("*.py") if f != theirs and "build_model" in f.read_text()]
    need(len(found) == 1, f"{run}/code holds {len(found)} scripts with build_model(), not one; restore it")
    sys.path.insert(0, str(run / "code"))
    sys.dont_write_bytecode = True  # the run's folder is left as it is
    for name, file in {"common": theirs, "run_script": found[0]}.items():
        if file.exists():
            spec = importlib.util.spec_from_file_location(name, file)
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except (ImportError, SyntaxError) as e:
                raise UserError(f"{file} cannot be imported ({common.why(e)}); repair that") from None
            if name == "common":
                module.UserError = UserError  # so that the run's own one-line errors are caught here
    names = "Config build_model path predict sample_shape decode".split()
    if missing := ", ".join(n for n in names if not hasattr(module, n)):
        raise UserError(f"{file} has no {missing}; to be sampled a script needs {', '.join(names)}")
    return module


def load_run(path, flags):
    """RUN or a checkpoint -> (RUN, script, its Config, the model, its step, run.yaml on the dataset)."""
    run = common.find_run(path)
    if flags.step:
        path = run / "checkpoints" / f"step_{flags.step:08d}.pt"
        if not path.exists():
            there = ", ".join(str(int(f.stem[5:])) for f in sorted(path.parent.glob("step_*.pt"))) or "none"
            raise UserError(f"--step {flags.step} is not among the run's checkpoints; there are {there}")
    state = common.newest_checkpoint(path)
    script = load_script(run)
    try:
        facts = yaml.safe_load((run / "run.yaml").read_text())
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["config"].items()}
        config = script.Config(**config)
        model = script.build_model(config)
        model.load_state_dict(state[flags.weights])
    except (ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        text = f"code, run.yaml and checkpoint of {run} do not fit together ({common.why(e)}); restore them"
        raise UserError(text) from None
    dataset = facts.get("dataset")
    dataset = dataset if isinstance(dataset, dict) else {}  # runs made before 2026-11-27 tell it otherwise
    return run, script, config, model.eval().requires_grad_(False), state["step"], dataset


def class_numbers(asked, names):
    """--classes, names or numbers, perhaps with commas -> numbers. names: those of the run's classes.

    Where names are numbers themselves, as of folders 0, 1, 4, what is asked for is a name. Raises UserError.
    """
    parts = [c for part in asked for c in ([part] if part in names else part.split(",")) if c]
    parts = [common.printable(c) for c in parts]
    numbers = {} if any(n.isdecimal() for n in names) else {str(i): i for i in range(len(names))}
    numbers |= {n: i for i, n in enumerate(names)}
    there = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
    there += f" (or 0 to {len(names) - 1})" * (not any(n.isdecimal() for n in names))
    need(all(c in numbers for c in parts), f"--classes is {' '.join(parts)}; give some of {there}")
    return [numbers[c] for c in parts] or list(range(len(names)))


def settle(flags, config):
    """The flags, with what they leave to the solver and the run filled in.

    config: the run's. Raises UserError for what this run cannot do.
    """
    steps, guidance, clip = flags.steps or STEPS[flags.solver], flags.guidance, flags.clip_x0
    T, dropout = getattr(config, "timesteps", math.inf), getattr(config, "class_dropout", None)
    if guidance == -1:  # inversion is not stable under guidance (Mokady et al. 2022)
        guidance = 1.0 if flags.invert or dropout == 1 else getattr(config, "guidance", 1.0)
    if clip == "auto":
        clip = "on" if getattr(config, "clip_x0", False) and not flags.invert else "off"
    spacing = flags.spacing
    if spacing == "auto":  # nearest to the ODE's solution in 5 to 50 steps; eps tells little of x0 at t = 1
        spacing = "logsnr" if getattr(config, "objective", "") == "eps" else "uniform"
    unasked = dropout == 1 and (flags.classes or guidance != 1)
    for wrong, text in [
        (flags.steps > T, f"--steps is {steps}, but the run has only {T} times; give at most so many"),
        (unasked, "the run is unconditional; leave out --classes and --guidance"),
        (dropout == 0 and guidance != 1, "--guidance needs a run with --class-dropout; give --guidance 1"),
    ]:
        need(not wrong, text)
    return replace(flags, steps=min(steps, T), spacing=spacing, guidance=float(guidance), clip_x0=clip)


class Job:
    """A run, loaded, and the flags, settled."""

    def __init__(self, path, given):
        check(given)
        self.device, self.given = common.pick_device(given.device), given
        self.run, self.script, self.config, self.model, self.step, self.dataset = load_run(path, given)
        self.model.to(self.device)
        self.flags = settle(given, self.config)
        names = [str(i) for i in range(getattr(self.config, "num_classes", 1))]
        self.names = self.dataset.get("classes") or names
        self.classes = class_numbers(given.classes, self.names)
        self.shape = tuple(self.script.sample_shape(self.config))
        self.conditional = getattr(self.config, "class_dropout", None) != 1
        out = Path(given.out) if given.out else self.run / "samples"
        try:
            out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"--out {out} cannot be a folder, a file is there; give another") from None
        # A file's name tells what its content depends on, as far as that is unusual.
        flags, name = self.flags, f"{self.run.resolve().name}_" if given.out else ""
        name += f"step_{self.step:08d}" + ("" if given.compare else f"_{flags.solver}{flags.steps}")
        name += f"_w{flags.guidance:g}_seed{flags.seed}"
        for key in "eta spacing guidance_interval clip_x0 weights num_samples classes interpolate".split():
            if (value := getattr(given, key)) != getattr(Config(), key):
                value = "-".join(map(str, value)) if isinstance(value, tuple) else value
                name += f"_{key.replace('_', '')}{value}".replace(",", "-").replace("/", "-")
        if len(os.fsencode(name)) > 180:  # a file's name has at most 255 bytes
            name = f"{os.fsencode(name)[:160].decode(errors='ignore')}_{seed_of(name):016x}"
        self.path = out / name

    def grid(self, flags):
        T = getattr(self.config, "timesteps", None)
        return make_grid(lambda t: self.script.path(t, self.config), flags.steps, flags.spacing, T)

    def predictor(self, flags, y):
        """f(x, t) -> (x0, eps) for labels y [B], with guidance in its interval and clipping; t is a float."""
        script, config, (low, high), y = self.script, self.config, flags.guidance_interval, y.to(self.device)

        def f(x, t):
            times = torch.full((len(x),), t, device=x.device)
            w = flags.guidance if low <= t <= high else 1.0
            x0, eps = script.predict(self.model, x, times, y, config, w)
            if flags.clip_x0 == "off":
                return x0, eps
            common.check_finite(x0)  # clipping would hide it
            top = torch.ones_like(x0[:, :1, :1, :1])
            if flags.clip_x0 == "dynamic":  # Saharia et al. 2022, sec. 2.3, with p = 99.5%
                top = x0.flatten(1).abs().quantile(0.995, dim=1).clamp(min=1).view_as(top)
            x0 = x0.clamp(-top, top) / top
            alpha, sigma = (c.view(-1, 1, 1, 1) for c in script.path(times, config))
            return x0, (x - alpha * x0) / sigma  # the noise that goes with it

        return f

    def noise(self, samples):
        """-> (eps [B, *shape], a function for more of it): of each sample by its number, whatever the batch.

        Drawn on the CPU, so that it is the same on every device.
        """
        generators = [torch.Generator().manual_seed(seed_of(self.flags.seed, "sample", i)) for i in samples]

        def draw():
            return torch.stack([torch.randn(self.shape, generator=g) for g in generators]).to(self.device)

        return draw(), draw

    def labels(self, samples):
        """Of samples by number: the classes in turn."""
        return torch.tensor([self.classes[i % len(self.classes)] for i in samples])

    @torch.no_grad()
    def solve(self, eps, y, flags, noise=None, frames=0):
        """eps [B, C, H, W] ~ N(0, 1), y [B] -> (x, film [about `frames`, 2, B, C, H, W] of x_t and x0)."""
        f, grid, steps = self.predictor(flags, y), self.grid(flags), flags.steps
        x = eps.to(self.device) * math.hypot(*grid[0][1:])  # variance 1 but at t < 1 on the straight path
        film = [torch.stack([x, x]).cpu()]
        for i, (x_t, x0) in enumerate(sampler(flags, f, x, grid, noise)):
            if i * frames // steps != (i + 1) * frames // steps:
                film.append(torch.stack([x_t, x0]).cpu())
        return x_t, torch.stack(film)

    @torch.no_grad()
    def images(self, x, at_a_time=50):
        """Decodes x [N, *shape], apart from sampling and few at a time as a VAE needs memory, to the CPU."""
        parts = (self.script.decode(z.to(self.device), self.config) for z in x.split(at_a_time))
        return torch.cat([part.float().cpu() for part in parts])

    def draw(self, path, x, columns=10, **films):
        """PATH.png and, of each film, a list of x's, PATH_FILM.gif."""
        images = self.images(x)
        common.save_pictures(path, images, columns=columns)
        for film, history in films.items():
            common.save_pictures(f"{path}_{film}", images, [self.images(h) for h in history], columns)
            Path(f"{path}_{film}.png").unlink()
        common.say(f"wrote {path}.png" + "".join(f", _{film}.gif" for film in films))


# ------------------------------------------------------------------------------------------------
# What can be asked for


def sample(job):
    """The samples, as a stream through NAME.part: a line that tells how they are made, then their bytes.

    A job that was stopped goes on after the last whole sample there.
    """
    flags, times = job.flags, []
    zero = torch.zeros(1)
    last(sampler(flags, lambda x, t: (times.append(t) or x, x), zero, job.grid(flags), lambda: zero))
    low, high = flags.guidance_interval
    null = sum(flags.guidance != 1 and low <= t <= high for t in times)
    common.say(f"NFE {len(times)}" + f", and {null} with the null class for guidance" * (null > 0))
    C, H, W = job.images(torch.zeros(1, *job.shape)).shape[1:]
    keys = "solver steps spacing eta guidance guidance_interval clip_x0 weights num_samples seed".split()
    protocol = {"run": job.run.resolve().name, "step": job.step, "nfe": len(times), "nfe_null_class": null}
    protocol |= {k: getattr(flags, k) for k in keys} | {"classes": job.classes}
    protocol |= {"conditional": job.conditional, "rounding": "round(127.5 x + 127.5)", "shape": [H, W, C]}
    protocol = json.dumps(protocol)
    header, size, part = f"{protocol}\n".encode(), H * W * C, Path(f"{job.path}.part")
    shown = min(flags.num_samples, 100) if flags.npz or flags.png else flags.num_samples  # in the pictures

    with open(part, "a+b") as file:
        need(common.lock(file), f"{part} is in use by another process; wait for it, or give --out")
        file.seek(0)
        if (first := file.readline()).endswith(b"\n") and first != header:
            raise UserError(f"{part} is of a job with other settings; delete it, or give another --out")
        done = (part.stat().st_size - len(header)) // size
        if done < shown:  # the pictures are of the first samples
            done = 0
            file.truncate(0)
            file.write(header)
        file.truncate(len(header) + done * size)
        bar = tqdm(total=flags.num_samples, initial=done, unit=" images", disable=not sys.stderr.isatty())
        if done:
            common.say(f"going on after {done} samples")
        firsts = []
        for i in range(done, flags.num_samples, flags.bs):
            samples = range(i, min(i + flags.bs, flags.num_samples))
            eps, noise = job.noise(samples)
            x, film = job.solve(eps, job.labels(samples), flags, noise, flags.frames if i < shown else 0)
            images = job.images(x)
            if not images.isfinite().all():
                raise UserError(f"samples from {i} on are not finite; try --clip-x0 on, or more --steps")
            if i < shown:
                firsts.append((x.cpu(), film))
            if i < shown <= samples.stop:
                x, film = torch.cat([x for x, _ in firsts]), torch.cat([film for _, film in firsts], dim=2)
                films = {"x0": film[1:, 1, :shown], "xt": film[:, 0, :shown]} if flags.frames else {}
                job.draw(job.path, x[:shown], **films)
            pixels = (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
            file.write(pixels.permute(0, 2, 3, 1).numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(samples))
        bar.close()
        pack(job, np.memmap(part, np.uint8, "r", len(header), (flags.num_samples, H, W, C)), protocol)
        part.unlink()


def pack(job, data, protocol):
    """NAME.npz and NAME/000000.png, ... of data uint8 [N, H, W, C] on the disk."""
    if job.flags.npz:
        labels = job.labels(range(len(data))).numpy() if job.conditional else np.full(len(data), -1)
        arrays = {"arr_0": data, "arr_1": labels, "protocol": protocol}
        common.write_atomically(Path(f"{job.path}.npz"), lambda f: np.savez(f, **arrays))
        common.say(f"wrote {job.path}.npz")
    if job.flags.png:
        job.path.mkdir(exist_ok=True)
        for i, image in enumerate(tqdm(data, unit=" files", disable=not sys.stderr.isatty())):
            image = image[..., 0] if image.shape[-1] == 1 else image
            Image.fromarray(image).save(job.path / f"{i:06}.png")
        common.say(f"wrote {job.path}/000000.png to {len(data) - 1:06}.png")


def interpolate(job):
    """Rows of images between the noises of samples 0 and 1, 2 and 3, ...; a row has one class."""
    flags, n, rows = job.flags, job.flags.interpolate, max(1, job.flags.num_samples // job.flags.interpolate)
    ends = job.noise(range(2 * rows))[0].cpu().unflatten(0, (rows, 2))
    eps = torch.stack([slerp(a, b, torch.tensor(j / (n - 1))) for a, b in ends for j in range(n)])
    y = job.labels(range(rows)).repeat_interleave(n)
    parts = zip(eps.split(flags.bs), y.split(flags.bs), strict=True)
    x = torch.cat([job.solve(e, c, flags)[0].cpu() for e, c in parts])
    there = list(x.unflatten(0, (rows, n)).unbind(1))
    job.draw(job.path, x, n, **({"x0": there + there[::-1]} if flags.frames else {}))


@torch.no_grad()
def invert_images(job):
    """Held-out images of the run's dataset up to noise and down again; prints how far they return changed."""
    flags, c = job.flags, job.config
    channels, side, _ = shape = tuple(job.images(torch.zeros(1, *job.shape)).shape[1:])
    if shape != job.shape:
        raise UserError(f"--invert is for runs on pixels, and this one is on {job.shape}; leave it out")
    root = flags.data_root or getattr(c, "data_root", "")
    data = common.load_dataset(flags.dataset or c.dataset, root, "test", side, channels)
    was = job.dataset.get("test", {}).get("fingerprint", data.fingerprint())
    need(
        was == data.fingerprint(),
        f"{flags.dataset or c.dataset} is not the run's dataset; give that by --dataset",
    )
    rows = (
        torch.isin(data.labels, torch.tensor(job.classes)).nonzero().flatten()[: flags.num_samples].tolist()
    )
    there = ", ".join(job.names[i] for i in data.labels.unique())
    need(rows, f"--classes: of these no image is held out; give some of {there}")
    images, y, grid, out = (
        next(common.read_batches(data.images, [rows]))[0],
        data.labels[rows],
        job.grid(flags),
        [],
    )
    images = images.float() / 127.5 - 1
    for x, labels in zip(images.split(flags.bs), y.split(flags.bs), strict=True):
        f = job.predictor(flags, labels)
        noise = last(invert(f, x.to(job.device), grid, 1 / getattr(c, "timesteps", 1000)))
        out.append(torch.stack([x, noise.cpu(), last(ddim(f, noise, grid)).cpu()]))
    images, noise, back = out = torch.cat(out, dim=1)
    mse = (back.clamp(-1, 1) - images).square().mean()
    common.say(f"{len(y)} images, {flags.steps} steps up and as many down, guidance {flags.guidance:g}")
    common.say(f"RMS error {mse.sqrt():.4f} on [-1, 1] (PSNR {10 * (4 / mse).log10():.1f} dB)")
    common.say(f"the noise has mean {noise.mean():.3f} and deviation {noise.std():.3f}")
    job.draw(f"{job.path}_invert", torch.cat([part.flatten(0, 1) for part in out.split(10, dim=1)]))


def compare(job):
    """A sheet of the same noise through every solver in few and many steps, and a table of what they cost."""
    T, samples, table = getattr(job.config, "timesteps", 1000), range(min(job.given.num_samples, 10)), []
    counts = sorted({min(k, T) for k in (5, 10, 20, 50, 100)})
    rows = [(solver, k, 0.0) for solver in ("ddim", "dpmpp2m", "heun") for k in counts]
    for solver, steps, eta in tqdm([*rows, ("ddim", T, 1.0)], disable=not sys.stderr.isatty()):
        flags = settle(replace(job.given, solver=solver, steps=steps, eta=eta), job.config)
        (eps, noise), start = job.noise(samples), time.perf_counter()
        x = job.images(job.solve(eps, job.labels(samples), flags, noise)[0]).clamp(-1, 1)
        label = f"{solver} {steps}, NFE {2 * steps - 1 if solver == 'heun' else steps}"
        label += ", eta 1" if eta else ""
        table.append((label, time.perf_counter() - start, x))
    for label, seconds, x in table:
        apart = (x - table[-2][2]).square().mean().sqrt()  # the last of Heun: nearly the ODE's solution
        apart = "" if "eta" in label else f"   RMS distance to {table[-2][0]}: {apart:.4f}"
        common.say(f"{label:24} {seconds:7.2f} s{apart}")
    zoom = max(1, 64 // x.shape[-1])
    lines = torch.cat([torch.cat(list(x), dim=-1).expand(3, -1, -1) for _, _, x in table], dim=1)  # [3, H, W]
    pixels = (lines.permute(1, 2, 0) * 127.5 + 127.5).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1))
    sheet = Image.new("RGB", (picture.width + 160, picture.height), "white")
    sheet.paste(picture, (160, 0))
    for i, (label, _, _) in enumerate(table):
        middle = (i + 0.5) * picture.height / len(table)
        ImageDraw.Draw(sheet).text((6, middle), label, "black", anchor="lm")
    sheet.save(f"{job.path}_compare.png")
    common.say(f"wrote {job.path}_compare.png")


def main(argv):
    path = argv[0] if argv and not argv[0].startswith("-") else ""
    flags = common.parse(Config, __doc__, argv[1:] if path else argv)
    need(path, "no run is named; the run's folder comes first: ddim_sample.py RUN [FLAGS]")
    job = Job(path, flags)
    modes = {"interpolate": interpolate, "invert": invert_images, "compare": compare}
    next((modes[m] for m in modes if getattr(flags, m)), sample)(job)


if __name__ == "__main__":
    with common.one_line_errors():
        main(sys.argv[1:])
