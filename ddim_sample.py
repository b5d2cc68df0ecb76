"""Samples any run: DDIM, Heun, DPM-Solver++(2M), its own sampler; inversion, interpolation, comparison.

Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models" (arXiv:2010.02502); Karras et al. 2022,
"Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv:2206.00364), "EDM" below; Lu et
al. 2022, "DPM-Solver++" (arXiv:2211.01095). Time t runs from 0 (data) to 1 (noise). The run's own code is
executed, so only sample runs that you trust.

    python ddim_sample.py RUN                                       100 samples, classes in turn
    python ddim_sample.py RUN --solver dpmpp2m --steps 12           similar, with a quarter of the passes
    python ddim_sample.py RUN --solver own --set sampling_steps=20  the script's own sample()
    python ddim_sample.py RUN --prompt "a thin white 3"             images of a caption (runs with --text on)
    python ddim_sample.py RUN --num-samples 50000 --bs 500 --npz    for FID tools; continues if interrupted
    torchrun --standalone --nproc-per-node=8 ddim_sample.py RUN ... the same, by 8 processes
    python ddim_sample.py RUN --guide 5000 --guidance 2             guided by the run's own checkpoint
    python ddim_sample.py RUN --interpolate 10                      rows between the noise of two samples
    python ddim_sample.py RUN --invert                              held-out images to noise and back
    python ddim_sample.py RUN --compare                             every solver from the same noise
"""

import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import typing
import zlib
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from tqdm import tqdm

import common
from common import UserError, derive_seed, require

# ------------------------------------------------------------------------------------------------
# Flags: the only place a default lives; the comments are the help


@dataclass
class Config:
    # method
    solver: Literal["ddim", "heun", "dpmpp2m", "own"] = "ddim"  # sampler; own = the script's sample()
    steps: int = 0  # steps of the solver; 0 = 50 for ddim, 18 for heun, 15 for dpmpp2m
    eta: float = 0.0  # noise added by ddim: 0 none, 1 as much as DDPM's ancestral sampler
    spacing: Literal["auto", "trailing", "karras", "logsnr"] = "auto"  # time grid; auto: eps has logsnr
    guidance: float = -1.0  # guidance scale w of uncond + w (cond - uncond); 1 = off, -1 = the run's own
    guidance_interval: tuple[float, float] = (-1.0, -1.0)  # times with guidance; -1 -1 = the run's own
    guide: int = 0  # step of an earlier checkpoint that guides instead of the null class; 0 = none
    clip_x0: Literal["auto", "on", "off"] = "auto"  # clip estimates of x0; auto = as the run does
    set: tuple[str, ...] = ()  # KEY=VALUE of the run's flags about guidance and sampling
    weights: str = "ema"  # ema = EMA weights, model = those of the last step, or a file of --export
    step: int = 0  # step of the checkpoint; 0 = the newest
    # what
    num_samples: int = 100  # number of samples
    classes: tuple[str, ...] = ()  # names or numbers of classes, used in turn; default all
    prompt: tuple[str, ...] = ()  # captions of the samples, used in turn; default ten training captions
    prompts: str = ""  # file of prompts, one per line
    seed: int = 0  # random seed; sample i depends on (seed, i) only
    bs: int = 100  # largest batch size of a process
    interpolate: int = 0  # images per row, from the noise of one sample to that of another
    invert: bool = False  # invert held-out images of the run's dataset to noise, and back
    compare: bool = False  # compare all solvers at 5, 10, 20, 50, 100 steps from the same noise
    dataset: str = ""  # dataset of --invert; default the run's
    data_root: str = ""  # folder of mnist and cifar10 for --invert; default the run's
    # output
    npz: bool = False  # also NAME.npz: uint8 arr_0 [N, H, W, C], labels arr_1, and the settings
    png: bool = False  # also NAME/000000.png, ...
    frames: int = 20  # maximum number of frames of the GIF; 0 = no GIF
    out: str = ""  # output folder; default RUN/samples
    export: str = ""  # only write the weights, with the run's Config, to this .safetensors
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = the fastest available
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = as the run was trained
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = for 500 passes or more


SETTINGS = "eta spacing guidance_interval guide clip_x0 set weights num_samples classes".split()  # in names
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
STEPS = {"ddim": 50, "heun": 18, "dpmpp2m": 15, "own": 0}
CONTINUOUS = 100_000  # times in a grid of continuous time


def resolve(flags, config):
    """(flags, config of the run, its timesteps or None, whether it is conditional). Raises UserError.

    All that is read from a run's Config, beyond the functions of its script, is read here. A script without
    these fields gets the defaults: continuous time, no null condition, guidance 1, no clipping, no prompts.
    """
    settings = parse_settings(flags.set, type(config))
    config = replace(config, **settings)
    timesteps, class_dropout = getattr(config, "timesteps", None), getattr(config, "class_dropout", 0)
    captions, typed = tuple(getattr(config, "prompts", ())), tuple(map(common.printable, flags.prompt))
    if flags.prompts:
        try:
            lines = Path(flags.prompts).read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"--prompts: {flags.prompts} is not in UTF-8; save it as such") from None
        typed += tuple(line.strip() for line in lines if line.strip())
        require(typed, f"--prompts: {flags.prompts} has no prompt; write one per line")
    clip, predicts_eps = getattr(config, "clip_x0", False), getattr(config, "objective", "") == "eps"
    guidance, (low, high) = flags.guidance, flags.guidance_interval
    if guidance == -1:  # inversion is unstable under guidance (Mokady et al. 2022)
        alone = flags.invert or (class_dropout == 1 and not flags.guide)
        guidance = 1.0 if alone else getattr(config, "guidance", 1.0)
    if (low, high) == Config.guidance_interval:
        low, high = getattr(config, "guidance_interval", (0.0, 1.0))
    modes = [f"--{m}" for m in ("interpolate", "invert", "compare", "export") if getattr(flags, m)]
    mode, files, ddim = " and ".join(modes), flags.npz or flags.png, flags.solver == "ddim"
    own = ["steps", "eta", "spacing", "clip_x0"]
    own += ["guidance_interval"] * (not hasattr(config, "guidance_interval"))
    own = ", ".join(f"--{k.replace('_', '-')}" for k in own if getattr(flags, k) != getattr(Config, k))
    unused = ", ".join(k for k in settings if k in ("solver", "sampling_steps", "clip_x0"))
    fewer = "at most 1000" if modes else "--npz or --png"
    guided = flags.guide or 0 < class_dropout < 1  # by an earlier checkpoint, or by the null class
    common.require_range(flags, "step guide frames interpolate", 0)
    common.require_range(flags, "num_samples bs", 1)
    common.require_range(flags, "eta", 0, 1)
    common.require_range(flags, "steps", 0, timesteps or CONTINUOUS)
    for good, message in [
        (0 <= low <= high <= 1, "--guidance-interval must be two times in [0, 1], such as 0.1 0.8"),
        (guidance >= 0, "--guidance is negative; it must be at least 0"),
        (guided or guidance == 1, "--guidance needs a run with --class-dropout in (0, 1), or --guide; use 1"),
        (not flags.guide or guidance != 1, "--guide has no effect at guidance 1; set --guidance 2"),
        (not flags.guide or flags.solver != "own", "--solver own has no --guide; use another solver"),
        (class_dropout < 1 or not flags.classes + typed, "the run is unconditional; drop --classes/--prompt"),
        (captions or not typed, "--prompt: the run was trained on classes; use --classes"),
        (not captions or not flags.classes, "--classes: the run was trained on captions; use --prompt"),
        (len(modes) < 2, f"{mode} exclude each other; use one of them"),
        (not modes or not files, f"{mode} writes no samples; leave out --npz and --png"),
        (not modes or not flags.eta, f"{mode} needs samplers without noise; leave out --eta"),
        (not flags.eta or ddim, f"--eta: {flags.solver} adds no noise; use --solver ddim"),
        (not flags.invert or ddim, "--invert uses DDIM; leave out --solver"),
        (not flags.compare or ddim, "--compare uses every solver; leave out --solver"),
        (not flags.compare or not flags.steps, "--compare has its own steps; leave out --steps"),
        (flags.solver != "own" or not own, f"--solver own has no {own}; leave it out, or use --set"),
        (not unused or flags.solver == "own", f"--set {unused} is for the own sampler; add --solver own"),
        (flags.solver != "own" or not flags.interpolate, "--interpolate has no --solver own; use another"),
        (re.search(r"^$|[^/]\.safetensors$", flags.export), "--export must be a file such as x.safetensors"),
        (flags.num_samples <= 1000 or files, f"--num-samples: too many for a picture; use {fewer}"),
        (not modes or WORLD == 1, f"{mode} runs in one process; use torchrun --nproc-per-node=1"),
    ]:
        require(good, message)
    spacing = flags.spacing
    if spacing == "auto":  # nearest to the ODE's solution in 5 to 50 steps; eps hardly tells x0 at t = 1
        spacing = "logsnr" if predicts_eps else "trailing"
    clip = flags.clip_x0 if flags.clip_x0 != "auto" else "on" if clip and not flags.invert else "off"
    steps = flags.steps or min(STEPS[flags.solver], timesteps or math.inf)
    dtype = flags.dtype if flags.dtype != "auto" else getattr(config, "dtype", "auto")
    flags = replace(flags, steps=steps, spacing=spacing, clip_x0=clip, dtype=dtype)
    flags = replace(flags, guidance=float(guidance), guidance_interval=(low, high))
    data = {k: getattr(flags, k) or getattr(config, k, "") for k in ("dataset", "data_root")}
    flags = replace(flags, prompt=typed or captions * (class_dropout < 1), **data)
    for name in {"guidance", "guidance_interval"} & {f.name for f in fields(config)}:  # for --solver own
        config = replace(config, **{name: getattr(flags, name)})
    return flags, config, timesteps, class_dropout < 1


def parse_settings(items, RunConfig):
    """["solver=rk4", ...] -> {"solver": "rk4", ...}, with the types of the run's Config. Raises UserError."""
    headings, values = common.comments(RunConfig), {}
    allowed = [k for k, (heading, _) in headings.items() if heading == "guidance and sampling"]
    allowed = [k for k in allowed if k not in ("guidance", "guidance_interval", "num_samples")]  # flags here
    for item in items:
        key, _, text = item.partition("=")
        there = ", ".join(f"{k}=VALUE" for k in allowed) or "none"
        require(key in allowed, f"--set {item} is not a sampling flag of this run; there are {there}")
        value = {"true": True, "false": False}.get(text, text.split(",") if "," in text else text)
        values[key] = getattr(common.parse(RunConfig, "", common.as_arguments(key, value)), key)
    return values


# ------------------------------------------------------------------------------------------------
# Samplers: functions of a predictor f(x, t, s) -> (x0, eps) for a step from time t to s, of x at the first
# time of a grid, and of the grid [(t, alpha, sigma), ...], which ends at (0, 1, 0). They yield (x, x0).


def ddim(f, x, grid, eta=0.0, noise=None):
    """Song et al. 2021, eq. 12 and 16, on any path; eta = 1 is DDPM's ancestral step (Ho et al. 2020).

    noise() returns new noise like x. Order 1, one evaluation per step; on the straight path, Euler's method.
    """
    for (t, a_t, s_t), (s, a_s, s_s) in pairwise(grid):
        x0, eps = f(x, t, s)
        sigma_up = eta * s_s / s_t * math.sqrt(max(s_t**2 - (a_t / a_s) ** 2 * s_s**2, 0.0))
        x = a_s * x0 + math.sqrt(max(s_s**2 - sigma_up**2, 0.0)) * eps
        x = x + sigma_up * noise() if sigma_up else x
        yield x, x0


def heun(f, x, grid):
    """Heun's method for the probability-flow ODE (EDM, algorithm 1): order 2, two evaluations per step.

    On any path, the ODE is dx = x0 d(alpha) + eps d(sigma), and the trapezoidal rule averages x0 and eps.
    This is EDM's step where alpha = 1; unlike EDM's in x / alpha, it also works at alpha = 0. The last step
    is Euler's.
    """
    for (t, a_t, s_t), (s, a_s, s_s) in pairwise(grid):
        x0, eps = f(x, t, s)
        x = a_s * x0 + s_s * eps
        if s_s > 0:
            x0_s, eps_s = f(x, s, s)
            x = x + (a_s - a_t) / 2 * (x0_s - x0) + (s_s - s_t) / 2 * (eps_s - eps)
        yield x, x0


def dpmpp2m(f, x, grid):
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2, in lambda = log(alpha / sigma): order 2.

    Order 1 are the first step, the last (to lambda = inf), and the second if the first came from -inf. In
    the paper's terms, a_s - a_t s_s / s_t is -a_s (exp(-h) - 1).
    """
    x0_before = h_before = None
    for (t, a_t, s_t), (s, a_s, s_s) in pairwise(grid):
        x0, _ = f(x, t, s)
        h = math.log(a_s / s_s * s_t / a_t) if a_t and s_s else math.inf
        c = 0.0 if x0_before is None or s_s == 0 else h / (2 * h_before)  # 1 / (2 r)
        D = x0 if c == 0 else x0 + c * (x0 - x0_before)
        x = s_s / s_t * x + (a_s - a_t * s_s / s_t) * D
        x0_before, h_before = x0, h
        yield x, x0


def invert(f, x, grid, t_min):
    """DDIM's ODE from data to noise (Song et al. 2021, eq. 14) along the reversed grid; order 1.

    Networks are not trained at t = 0: the first estimate is made at the clean x with time t_min.
    """
    for (s, a_s, s_s), (t, a_t, s_t) in pairwise(reversed(grid)):
        _, eps = f(x, max(s, t_min), t)
        x0 = (x - s_s * eps) / a_s
        x = a_t * x0 + s_t * eps
        yield x, x0


def slerp(a, b, w):
    """From a (w = 0) to b (w = 1), both [C, H, W], along a great circle (Song et al. 2021, sec. 5.3)."""
    theta = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - w) * theta) * a + torch.sin(w * theta) * b) / torch.sin(theta)


def time_grid(path, steps, spacing, timesteps=None):
    """steps + 1 times from noise to 0, with their alpha and sigma: [(t, alpha, sigma), ...].

    path(t float64 [N]) -> (alpha, sigma). Times are distinct multiples of 1 / timesteps, or of
    1 / CONTINUOUS (None). `trailing`: uniform in t from 1, as in diffusers. `karras`: uniform in
    (sigma / alpha)^(1/7), EDM eq. 5. `logsnr`: uniform in log(sigma / alpha) (DPM-Solver, Lu et al. 2022).
    The last two run from sigma / alpha = 80 to 0.002, as far as there are such times, and then to 0.
    """
    T, i = timesteps or CONTINUOUS, np.arange(steps + 1)
    alpha, sigma = path(torch.arange(T + 1, dtype=torch.float64) / T)
    ratio = (sigma / alpha).numpy()  # rises from 0, perhaps to infinity
    if spacing == "trailing":
        k = T * i / steps
    else:
        low, high, u = max(ratio[1], 0.002), min(ratio[-1], 80.0), np.linspace(1, 0, steps)[::-1]
        karras = (low ** (1 / 7) + u * (high ** (1 / 7) - low ** (1 / 7))) ** 7
        wanted = karras if spacing == "karras" else low * (high / low) ** u
        k = np.append(0, np.interp(np.log(wanted), np.log(ratio[1:]), np.arange(1, T + 1)))
    k = np.maximum.accumulate(k.round().astype(int) - i) + i  # distinct, even if rounded to the same time,
    k = np.minimum(k, T - steps + i)  # and none above T
    return [(j / T, float(alpha[j]), float(sigma[j])) for j in reversed(k.tolist())]


# ------------------------------------------------------------------------------------------------
# The run: its code, Config and weights

CONTRACT = "Config build_model path predict null conditions sample_shape decode".split()
VERSION = "1"  # of these names and what they mean


class Run(typing.NamedTuple):
    """A loaded run."""

    folder: Path
    script: typing.Any  # the module in RUN/code
    config: typing.Any  # the script's Config
    models: list  # the network, and that of --guide
    step: int
    timesteps: int | None  # T, or None in continuous time
    conditional: bool  # whether it was trained with conditions
    device: torch.device


def load_script(run):
    """The script in RUN/code as a module. From then on, `import common` means the copy beside it."""
    theirs = run / "code" / "common.py"
    scripts = [f for f in (run / "code").glob("*.py") if f != theirs and "build_model" in f.read_text()]
    scripts = [f for f in scripts if {s.name for s in scripts} <= {*common.local_files(f)}]  # has the others
    text = f"{run}/code has {len(scripts)} scripts with build_model(), not one; restore it"
    require(len(scripts) == 1, text)
    sys.path.insert(0, str(run / "code"))
    sys.dont_write_bytecode = True  # the run's folder stays as it is
    for name, file in {"common": theirs, "run_script": scripts[0]}.items():
        spec = importlib.util.spec_from_file_location(name, file)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (OSError, ImportError, SyntaxError) as e:
            raise UserError(f"cannot import {file} ({common.first_line(e)}); repair it") from None
        if name == "common":
            module.UserError = UserError  # so that exit_on_user_error() here catches it
    missing = ", ".join(n for n in CONTRACT if not hasattr(module, n))
    require(not missing, f"{file} has no {missing}; a script that is sampled needs {', '.join(CONTRACT)}")
    return module


def load_run(path, flags):
    """RUN or a checkpoint, flags -> (Run, flags resolved). Raises UserError."""
    folder, device = common.find_run(path), common.get_device(flags.device)
    step, guide = (folder / "checkpoints" / f"step_{k:08d}.pt" for k in (flags.step, flags.guide))
    exported = flags.weights not in ("ema", "model")
    text = f"{path} is a checkpoint; leave out --step and --weights FILE, or name the run"
    require(not (str(path).endswith(".pt") and (flags.step or exported)), text)
    if exported:
        require(not flags.step, f"--weights {flags.weights} has a step of its own; leave out --step")
        states = [import_weights(flags.weights)]
    else:
        states = [common.newest_checkpoint(step if flags.step else path)]
    if flags.guide:
        text = f"--guide {flags.guide} is the checkpoint that is sampled; use an earlier one"
        require(flags.guide != states[0]["step"], text)
        states.append(common.newest_checkpoint(guide))
    script = load_script(folder)
    try:
        about = states[0] if exported else yaml.safe_load((folder / "run.yaml").read_text())
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in about["config"].items()}
        config, models = script.Config(**config), []
        for state in states:
            model = script.build_model(config)
            model.load_state_dict(state["ema" if exported else flags.weights])
            models.append(model.eval().requires_grad_(False))
    except (ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        text = f"code, run.yaml and checkpoint of {folder} do not match ({' '.join(str(e).split())[:300]})"
        raise UserError(f"{text}; restore them") from None
    flags, config, timesteps, conditional = resolve(flags, config)
    if flags.set and hasattr(script, "check"):
        others = {"bs": WORLD, "grad_accum": 1}  # training's needs do not matter here
        script.check(replace(config, **{k: v for k, v in others.items() if hasattr(config, k)}))
    models = [model.to(device) for model in models]
    return Run(folder, script, config, models, states[0]["step"], timesteps, conditional, device), flags


def export(run, flags):
    """The weights, with step, contract and Config (which has the class names) in the file's metadata."""
    from safetensors.torch import save

    local = ("resume", "config", "data_root", "out", "cache")  # paths on this machine
    config = {k: v for k, v in asdict(run.config).items() if k not in local}
    about = {"contract": VERSION, "step": str(run.step), "config": json.dumps(config)}
    weights = {k: v.cpu().contiguous().clone() for k, v in run.models[0].state_dict().items()}  # may be tied
    data = save(weights, about)
    common.write_atomically(Path(flags.export), lambda f: f.write(data))
    common.print0(f"wrote {flags.export}")


def import_weights(path):
    """A file of export() -> a dict as of a checkpoint. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about, weights = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
        require(about["contract"] == VERSION, f"contract {about['contract']} instead of {VERSION}")
        return {"ema": weights, "step": int(about["step"]), "config": json.loads(about["config"])}
    except (UserError, OSError, SafetensorError, LookupError, TypeError, ValueError) as e:
        text = f"--weights {path} is not a file of this version's --export ({common.first_line(e)})"
        raise UserError(f"{text}; use ema, model or such a file") from None


def predictor(run, flags, y):
    """f(x, t, s) -> (x0, eps) for conditions y [B], with guidance and clipping; t and s are numbers."""
    y, (low, high) = y.to(run.device), flags.guidance_interval

    def f(x, t, s):
        t, s, w = *(x.new_full((len(x),), u) for u in (t, s)), flags.guidance if low <= t <= high else 1.0
        model, *guides = run.models
        x0, eps = run.script.predict(model, x, t, y, run.config, 1.0 if guides else w, s)
        for guide in guides * (w != 1):  # autoguidance (Karras et al. 2024, arXiv:2406.02507, eq. 3)
            x0_bad, eps_bad = run.script.predict(guide, x, t, y, run.config, 1.0, s)
            x0, eps = x0_bad + w * (x0 - x0_bad), eps_bad + w * (eps - eps_bad)
        if flags.clip_x0 == "off":
            return x0, eps
        common.check_finite(x0)  # clipping would hide it
        x0 = x0.clamp(-1, 1)
        alpha, sigma = (c.view(-1, *[1] * (x.ndim - 1)) for c in run.script.path(t, run.config))
        return x0, (x - alpha * x0) / sigma  # the eps that belongs to it

    return f


def grid_of(run, flags):
    return time_grid(lambda t: run.script.path(t, run.config), flags.steps, flags.spacing, run.timesteps)


def noise_of(run, flags, indices):
    """(noise [B, *shape], a function that returns more) of samples by index, whatever batch and device."""
    generators = [torch.Generator().manual_seed(derive_seed(flags.seed, "sample", i)) for i in indices]
    shape = tuple(run.script.sample_shape(run.config))

    def draw():
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(run.device)

    return draw(), draw


@torch.no_grad()
def solve(run, flags, eps, y, noise=None, frames=0):
    """Standard normal eps [B, C, H, W], y [B] -> (x, about `frames` estimates of x0, each of 50 samples)."""
    if flags.solver == "own":
        x, x0s = run.script.sample(run.models[0], eps, y.to(run.device), run.config, noise)
        every = max(1, math.ceil(len(x0s) / max(1, frames)))
        return x, [x0[:50].cpu() for x0 in x0s[-1::-every][::-1]] if frames else []
    f, grid, x0s = predictor(run, flags, y), grid_of(run, flags), []
    x = eps * math.hypot(*grid[0][1:])  # the path's own noise
    solvers = {"ddim": lambda *a: ddim(*a, flags.eta, noise), "heun": heun, "dpmpp2m": dpmpp2m}
    for i, (x_s, x0) in enumerate(solvers[flags.solver](f, x, grid)):  # noqa: B007
        if i * frames // flags.steps != (i + 1) * frames // flags.steps:
            x0s.append(x0[:50].cpu())
    return x_s, x0s


def count_passes(run, flags, y):
    """(network passes per sample, those on a doubled batch for guidance), counted by drawing one sample."""
    sizes, (eps, noise) = [], noise_of(run, flags, [0])
    hooks = [m.register_forward_hook(lambda _, x, out: sizes.append(len(x[0]))) for m in run.models]
    solve(run, flags, eps, y[:1], noise)
    for hook in hooks:
        hook.remove()
    return len(sizes), sum(n > 1 for n in sizes)


@torch.no_grad()
def to_images(run, x):
    """Decodes x [N, *shape], in batches of 50, to the CPU."""
    return torch.cat([run.script.decode(z.to(run.device), run.config).float().cpu() for z in x.split(50)])


def draw_grid(path, images, frames=(), **more):
    """Saves images with common.save_images() and prints the path."""
    common.save_images(path, images, frames, **more)
    common.print0(f"wrote {path}.png" + f" and {path.name}.gif" * bool(frames))


# ------------------------------------------------------------------------------------------------
# Modes


def sample(run, flags, y, path):
    """Samples in batches, each a file of the folder PATH.part until all are there. Process r of N draws every
    N-th of those that are missing; an interrupted job continues, with any number of processes."""

    def stop(*_):
        common.print0("stopped by a signal; the same command continues")
        sys.exit(common.EXIT_PREEMPTED)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)
    nfe, guided = count_passes(run, flags, y)
    guided = f", {guided} of them doubled by guidance" * (guided > 0)
    common.print0(f"NFE {nfe} network passes per sample{guided}")
    num, num_batches = flags.num_samples, math.ceil(flags.num_samples / flags.bs)
    bs = math.ceil(num / num_batches)  # about equal batches: 101 samples are not 100 and 1
    starts, part, prompts = range(0, num, bs), Path(f"{path}.part"), list(flags.prompt)
    prompts = [prompts[i % len(prompts)] for i in range(num) if prompts]
    shown = min(num, 100) if flags.npz or flags.png else num  # in the picture
    for model in run.models:
        dtype, compiled = common.prepare(model, flags, nfe * len(starts) >= 500)
    settings = {"run": run.folder.resolve().name, "step": run.step, "nfe": nfe, "bs": bs}
    keys = ["solver", "steps", "guidance", "prompt", "seed", *SETTINGS]
    settings |= {k: getattr(flags, k) for k in keys} | {"dtype": str(dtype)[6:]}
    weights = (v.cpu().reshape(-1).view(torch.uint8) for v in run.models[0].state_dict().values())
    settings["crc"] = functools.reduce(lambda crc, v: zlib.crc32(v.numpy(), crc), weights, 0)
    settings = json.dumps(settings | {"compiled": compiled, "rounding": "round(127.5 x + 127.5)"})

    part.mkdir(exist_ok=True)
    with open(part / "lock", "a") as file:
        todo, about = [[]], part / "settings.json"
        if RANK == 0:
            require(common.lock(file), f"{part} is in use by another process; wait for it, or set --out")
            same = not about.exists() or about.read_text() == settings
            require(same, f"{part} was started with other settings; delete it, or set another --out")
            common.write_atomically(about, lambda f: f.write(settings.encode()))
            todo = [[i for i in starts if not (part / f"{i:08d}.npy").exists()]]
        if WORLD > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=2))  # the first waits for the slowest
            dist.broadcast_object_list(todo)
        if len(todo[0]) < len(starts):
            common.print0(f"continuing after {len(starts) - len(todo[0])} of {len(starts)} batches")
        for i in tqdm(todo[0][RANK::WORLD], unit="batch", disable=RANK > 0 or not sys.stderr.isatty()):
            indices = range(i, i + bs)  # the last batch is full, too: a smaller one would be compiled anew
            (eps, noise), labels = noise_of(run, flags, indices), y[indices_in(y, indices)]
            common.seed_all(flags.seed, "batch", i)  # in case the model draws random numbers
            x, x0s = solve(run, flags, eps, labels, noise, flags.frames * (i == 0))
            images = to_images(run, x)[: num - i]
            common.check_finite(images)
            if i == 0:
                x0s = [to_images(run, x0[:num]) for x0 in x0s]
                draw_grid(path, images[:shown], x0s, captions=prompts[:bs][:shown])
            pixels = (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
            pixels = pixels.permute(0, 2, 3, 1).numpy()
            common.write_atomically(part / f"{i:08d}.npy", lambda f, pixels=pixels: np.save(f, pixels))
        if WORLD > 1:
            dist.barrier()
            dist.destroy_process_group()
        if RANK == 0:
            pack(run, flags, y, path, [part / f"{i:08d}.npy" for i in starts], shown, prompts, settings)
            shutil.rmtree(part, ignore_errors=True)  # NFS keeps a file that is open, the lock


def pack(run, flags, y, path, files, shown, prompts, settings):
    """Batches of samples, .npy uint8 [B, H, W, C] -> PATH.png of the first, PATH.npz, PATH/000000.png, ..."""
    num, (B, H, W, C) = flags.num_samples, np.load(files[0]).shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, H, W, C)}

    def write(f):
        np.lib.format.write_array_header_1_0(f, header)
        f.writelines(np.load(file) for file in files)

    whole = files[0].with_name("all.npy")  # on the disk: there may be more than fit into memory
    common.write_atomically(whole, write)
    pixels = np.load(whole, mmap_mode="r")
    if shown > B:
        images = torch.tensor(pixels[:shown]).permute(0, 3, 1, 2) / 127.5 - 1
        common.save_images(path, images, captions=prompts[:shown])
    if flags.npz:
        classes = run.conditional and not prompts
        labels = y[indices_in(y, range(num))].numpy() if classes else np.full(num, -1)
        arrays = {"arr_0": pixels, "arr_1": labels, "protocol": settings}
        arrays |= {"prompts": prompts} if prompts else {}
        common.write_atomically(Path(f"{path}.npz"), lambda f: np.savez(f, **arrays))
        common.print0(f"wrote {path}.npz")
    if flags.png:
        path.mkdir(exist_ok=True)
        for i, image in enumerate(tqdm(pixels, unit=" files", disable=not sys.stderr.isatty())):
            Image.fromarray(image.squeeze(-1) if C == 1 else image).save(path / f"{i:06}.png")
        common.print0(f"wrote {path}/000000.png to {num - 1:06}.png")


def indices_in(y, indices):
    """Samples take the conditions in turn."""
    return torch.tensor([*indices]) % len(y)


def interpolate(run, flags, y, path):
    """Rows of images between the noise of samples 0 and 1, 2 and 3, ...; each row has one condition."""
    n, rows = flags.interpolate, max(1, flags.num_samples // flags.interpolate)
    ends = noise_of(run, flags, range(2 * rows))[0].unflatten(0, (rows, 2))
    eps = torch.stack([slerp(a, b, w) for a, b in ends for w in torch.linspace(0, 1, n)])
    y = y[indices_in(y, range(rows))].repeat_interleave(n, 0)
    parts = zip(eps.split(flags.bs), y.split(flags.bs), strict=True)
    images = torch.cat([to_images(run, solve(run, flags, e, c)[0]) for e, c in parts])
    frames = list(images.unflatten(0, (rows, n)).unbind(1))
    draw_grid(path, images, (frames + frames[::-1]) * bool(flags.frames), columns=n)


@torch.no_grad()
def invert_images(run, flags, y, path):
    """Held-out images of the run's dataset to noise and back; prints how much they differ."""
    shape = tuple(run.script.sample_shape(run.config))
    channels, side, _ = pixels = tuple(to_images(run, torch.zeros(1, *shape)).shape[1:])
    require(pixels == shape, f"--invert is for pixels, and this run has latents {shape}; leave it out")
    data = common.load_dataset(flags.dataset, flags.data_root, "test", side, channels)
    facts = yaml.safe_load((run.folder / "run.yaml").read_text())
    same = facts["dataset"]["test"]["fingerprint"] == data.fingerprint() and data.images.shape[1:] == shape
    require(same, f"{flags.dataset} is not the run's dataset; set --dataset to that")
    rows = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(flags.seed))
    rows = rows[torch.isin(data.labels[rows], y)][: flags.num_samples].tolist()
    there = ", ".join(data.classes[i] for i in data.labels.unique())
    require(rows, f"--classes: no held-out image has these; there are {there}")
    images, y, grid, out = common.images_at(data.images, rows), data.labels[rows], grid_of(run, flags), []
    for x, labels in zip((images.float() / 127.5 - 1).split(flags.bs), y.split(flags.bs), strict=True):
        f = predictor(run, flags, labels)
        *_, (noise, _) = invert(f, x.to(run.device), grid, 1 / (run.timesteps or 1000))
        *_, (recon, _) = ddim(f, noise, grid)
        out.append(torch.stack([x, noise.cpu(), recon.cpu()]))
    images, noise, recon = out = torch.cat(out, dim=1)  # each [N, C, H, W]
    mse = (recon.clamp(-1, 1) - images).square().mean()
    common.print0(f"{len(y)} images, {flags.steps} steps to noise and back, guidance {flags.guidance:g}")
    common.print0(f"RMS error {mse.sqrt():.4f} on [-1, 1] (PSNR {10 * (4 / mse).log10():.1f} dB)")
    common.print0(f"the noise has mean {noise.mean():.3f} and standard deviation {noise.std():.3f}")
    path, rows = path.with_name(f"{path.name}_invert"), out.transpose(0, 1).flatten(0, 1)
    draw_grid(path, to_images(run, rows), columns=12)  # image, noise, image, noise, ...


def compare(run, flags, y, path):
    """A table of every solver with few and many steps from the same noise, and a picture with its rows."""
    T, indices, table, passes = run.timesteps or 1000, range(min(flags.num_samples, 10)), [], []
    y, steps = y[indices_in(y, indices)], sorted({min(k, T) for k in (5, 10, 20, 50, 100)})
    for model in run.models:
        model.register_forward_hook(lambda *_: passes.append(1))
    rows = [(solver, k, 0.0) for solver in ("ddim", "dpmpp2m", "heun") for k in steps]
    for solver, k, eta in tqdm([*rows, ("ddim", T, 1.0)], disable=not sys.stderr.isatty()):
        f, start = replace(flags, solver=solver, steps=k, eta=eta), time.perf_counter()
        eps, noise = noise_of(run, f, indices)
        passes.clear()
        x = to_images(run, solve(run, f, eps, y, noise)[0]).clamp(-1, 1)
        label = f"{solver} {k}, NFE {len(passes)}" + ", eta 1" * (eta == 1)
        table.append((label, time.perf_counter() - start, x))
    reference = table[-2]  # Heun with the most steps is nearly the ODE's solution
    for label, seconds, x in table:
        distance = (x - reference[2]).square().mean().sqrt()
        distance = "" if "eta" in label else f"   RMS distance to {reference[0]}: {distance:.4f}"
        common.print0(f"{label:24} {seconds:7.2f} s{distance}")
    path = path.with_name(f"{path.name}_compare")
    draw_grid(path, torch.cat([x for _, _, x in table]), columns=len(indices))


def output_path(run, flags, given):
    """Where outputs go. The name holds all settings that are not the defaults."""
    folder = Path(given.out) if given.out else run.folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{run.folder.resolve().name}_" * bool(given.out) + f"step_{run.step:08d}"
    name += f"_{flags.solver}{flags.steps or ''}" * (not given.compare)
    name += f"_w{flags.guidance:g}_seed{flags.seed}"
    for key in (*SETTINGS, "interpolate", "dtype", "compile"):
        if (value := getattr(given, key)) != getattr(Config(), key):
            value = "+".join(map(str, value)) if isinstance(value, tuple) else value
            name += f"_{key.replace('_', '')}{value}".replace(",", "-").replace("/", "-")
    if given.prompt or given.prompts:  # prompts are long, and PATH.txt has them
        name += f"_prompt{derive_seed(flags.prompt):016x}"[:15]
    if len(os.fsencode(name)) > 180:  # file names have at most 255 bytes
        name = f"{os.fsencode(name)[:160].decode(errors='ignore')}_{derive_seed(name):016x}"
    return folder / name


def main(argv):
    path = argv[0] if argv and not argv[0].startswith("-") else ""
    text = "the run's folder comes first: ddim_sample.py RUN [FLAGS]"
    require(path or {"-h", "--help"} & {*argv}, text)
    given = common.parse(Config, __doc__, argv[bool(path) :])
    run, flags = load_run(path, given)
    typed = flags.prompt if given.prompt or given.prompts else flags.classes
    y = run.script.conditions(list(typed), run.config)
    if flags.export:
        return export(run, flags)
    modes = {"interpolate": interpolate, "invert": invert_images, "compare": compare}
    mode = next((modes[m] for m in modes if getattr(flags, m)), sample)
    path = output_path(run, flags, given)
    if flags.prompt and RANK == 0:
        text = "".join(f"{' '.join(prompt.split())}\n" for prompt in flags.prompt)
        common.write_atomically(Path(f"{path}.txt"), lambda f: f.write(text.encode()))
    for model in run.models if mode is not sample else []:
        common.prepare(model, flags, False)
    common.seed_all(flags.seed)
    mode(run, flags, y, path)


if __name__ == "__main__":
    with common.exit_on_user_error():
        main(sys.argv[1:])
