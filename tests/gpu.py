"""Is this repository right on a GPU, how fast is it there, and how far from what the GPU can do?

    python tests/gpu.py                          needs a GPU and cifar10
    python tests/gpu.py --dry                    most of them in tiny sizes on a CPU, in under a minute

    exact        each script trained whole, and stopped by SIGTERM and resumed: weights equal bit for bit?
                 Samples of the GPU (in TF32) and of a CPU from the same noise
    attention    PyTorch's kernels, forward and backward: time, and are the gradients of five calls equal?
    speed        matmul and copy rates; training steps: images/s, share of that rate, memory, waits
    train        the README's CIFAR-10 command for --minutes: held-out loss, FD ratio, a grid to look at;
                 50 guided steps of that run in four precisions: images/s, difference from float32

Each fact is printed as soon as it is known, and kept as a line of OUT/facts.jsonl. The exit status is 1 if a
measurement failed, or if what should be equal differs.
"""

import contextlib
import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of several runs must not spin as they wait
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import benchmark  # noqa: E402
import compare  # noqa: E402
import quality  # noqa: E402

import common  # noqa: E402
import ddpm_unet_mnist as ddpm  # noqa: E402
import latent_dit_sdvae as ld  # noqa: E402
import rf_dit_cifar as rf  # noqa: E402
from common import first_line, print0, require  # noqa: E402


@dataclass
class Config:
    only: tuple[str, ...] = ()  # stages; default all
    minutes: float = 3.0  # minutes of training in the stage train
    dataset: str = "cifar10"  # dataset of the stage train
    data_root: str = ""  # folder of cifar10; default $DIFFUSION_DATA, else data/
    cache: str = "data/quality"  # folder of trained classifiers
    out: str = ""  # folder of what is found; default logs/gpu/ and the time
    dry: bool = False  # tiny sizes on a CPU: is this file still true?


class Check:
    """What all stages need; prints facts, and appends them to a file, as soon as they are known."""

    def __init__(self, flags, folder):
        self.flags, self.folder, self.dry, self.failures = flags, folder, flags.dry, 0
        self.device = common.get_device("cpu" if flags.dry else "cuda")
        self.synchronize = getattr(torch, self.device.type).synchronize

    def tell(self, what, holds=True, **facts):
        self.failures += not holds
        with open(self.folder / "facts.jsonl", "a") as f:
            f.write(json.dumps({"what": what, "holds": holds} | facts) + "\n")
        shown = (f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items())
        print0(f"{what}: {', '.join(shown)}" + "  FAILED" * (not holds))

    @contextlib.contextmanager
    def measuring(self, what):
        """What fails inside is a fact, too, and does not end the program."""
        try:
            yield
        except Exception as e:
            traceback.print_exc()
            self.tell(what, False, error=first_line(e))

    def milliseconds(self, fn, n, warm=2):
        """Of one call, on average over n."""
        for i in range(warm + n):
            if i == warm:
                self.synchronize()
                start = time.perf_counter()
            fn()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start) / n


def set_precision(name):
    """Of products of float32 matrices: "TF32", or "float32" itself. Returns the dtype of `name`."""
    torch.set_float32_matmul_precision("highest" if name == "float32" else "high")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


# ------------------------------------------------------------------------------------------------
# Exact

SMALL = {
    "rf_dit_cifar.py": "--dim 192 --heads 3 --depth 2",
    "ddpm_unet_mnist.py": "--attention 8",
    "latent_dit_sdvae.py": "--dim 192 --heads 3 --depth 2 --patch 1",
}
TINY = "--dim 32 --heads 2 --depth 1 --patch 4"  # with --dry


def call(script, *flags, minutes=20):
    """Runs a script to its end. Raises RuntimeError if it fails, or takes too long."""
    command = [sys.executable, ROOT / script, *map(str, flags)]
    p = subprocess.run(command, capture_output=True, text=True, timeout=60 * minutes)
    if p.returncode:
        raise RuntimeError(f"exit status {p.returncode}: {' '.join(p.stderr.splitlines()[-1:])}")


def train_twice(check, name, how):
    """Trains whole, and stopped and resumed, and compares them. Returns the whole run."""
    steps, bs, size = (40, 8, TINY) if check.dry else (200, 64, SMALL[name])
    home = check.folder / f"{name}_{how}"
    flags = "--image-size 32 --channels 3 --log-every 1 --sampling-steps 2 --num-samples 10".split()
    flags += [*size.split(), f"--bs={bs}", f"--steps={steps}", f"--compile={how}"]
    flags += [f"--dataset={check.folder}/images", f"--device={check.device.type}"]
    if name == "latent_dit_sdvae.py":
        flags += ["--vae=train", f"--vae-steps={2 if check.dry else 30}", f"--cache={home}/cache"]
    call(name, *flags, f"--out={home}/whole")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    p = subprocess.Popen([sys.executable, ROOT / name, *flags, f"--out={home}/stopped"], **quiet)
    while p.poll() is None and not any(f.stat().st_size for f in home.glob("stopped/*/*/metrics/loss.jsonl")):
        time.sleep(0.01)
    p.terminate()
    if p.wait(60) != common.EXIT_PREEMPTED:
        raise RuntimeError(f"exit status {p.returncode} after SIGTERM")
    whole, stopped = (next(home.glob(f"{x}/*/*/run.yaml")).parent for x in ("whole", "stopped"))
    facts = {"stopped_at_step": (stopped / "metrics/loss.jsonl").read_text().count("\n"), "steps": steps}
    call(name, "--resume", stopped)
    compare_runs(check, f"{name} --compile {how}", whole, stopped, **facts)
    return whole


def compare_runs(check, what, *runs, **facts):
    """Tells whether all losses and weights of two runs are equal."""
    a, b = map(common.newest_checkpoint, runs)
    off = [k for part in ("model", "ema") for k, v in a[part].items() if not torch.equal(v, b[part][k])]
    logs = [(run / "metrics/loss.jsonl").read_text().splitlines() for run in runs]
    same = [json.loads(x)["loss"] == json.loads(y)["loss"] is not None for x, y in zip(*logs, strict=True)]
    check.tell(what, all(same) and not off, equal_losses=sum(same), unequal_weights=len(off), **facts)


def compare_devices(check, name, run):
    """Samples in float32 of this device and of a CPU, from the same noise."""
    images, how = [], "--solver heun --steps 5 --num-samples 10 --npz --frames 0 --dtype float32".split()
    for i, where in enumerate((check.device.type, "cpu")):
        out = check.folder / f"{name}_{i}"
        call("ddim_sample.py", run, *how, "--device", where, "--out", out)
        images.append(quality.load_samples(next(out.glob("*.npz")))[0].int())
    worst = (images[0] - images[1]).abs().max().item()
    check.tell(f"samples of {name}", worst <= 2, largest_difference_from_a_CPU_of_255=worst)


def make_images(folder):
    for i in range(60):
        (folder / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 100).convert("RGB").save(folder / f"{i % 2}/{i}.png")


def exact(check):
    def both(name, how):
        with check.measuring(f"{name} --compile {how}"):
            run = train_twice(check, name, how)
            if how == "off":
                compare_devices(check, name, run)

    cases = [(name, how) for how in ("off", "on") for name in SMALL]
    cases = [("latent_dit_sdvae.py", "off")] if check.dry else cases  # it has most parts
    with ThreadPoolExecutor(max(3, common.CORES // 2)) as pool:
        list(pool.map(both, *zip(*cases, strict=True)))


# ------------------------------------------------------------------------------------------------
# Attention


def attention(check):
    heads, dim, kernels = 8, 64, "any CUDNN_ATTENTION FLASH_ATTENTION EFFICIENT_ATTENTION MATH".split()
    for tokens in (16,) if check.dry else (256, 1024):
        n = 2 if check.dry else 65536 // tokens
        qkvg = torch.randn(4, n, heads, tokens, dim).to(check.device, torch.bfloat16).unbind()
        flop = 3 * 4 * n * heads * tokens**2 * dim  # forward and backward, without computing scores again

        def gradients(qkvg=qkvg):
            qkv = [x.requires_grad_() for x in qkvg[:3]]
            return torch.autograd.grad(F.scaled_dot_product_attention(*qkv), qkv, qkvg[3])

        for name in kernels:
            one = contextlib.nullcontext() if name == "any" else sdpa_kernel(getattr(SDPBackend, name))
            with one, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    ms = check.milliseconds(gradients, 2 if check.dry else 20)
                    first, *rest = (gradients() for _ in range(5))
                    equal = all(torch.equal(a, b) for x in rest for a, b in zip(first, x, strict=True))
                    facts = {"ms": ms, "TFLOP/s": flop / ms / 1e9, "equal_gradients": equal}
                except RuntimeError as e:
                    facts = {"not_here": first_line(e)}
                holds = "ms" in facts or (name != "any" and re.search("available|viable", facts["not_here"]))
                check.tell(f"attention, {tokens} tokens, kernel {name}", bool(holds), **facts)


# ------------------------------------------------------------------------------------------------
# Speed


def speed_cases(dry):
    """[(name, script, Config, precision, compiled or not, or as CUDA graphs)]"""
    tiny = {"dim": 32, "depth": 1, "heads": 2, "patch": 8, "bs": 8} if dry else {}
    dit, latent, unet = rf.Config(**tiny), ld.Config(**tiny), ddpm.Config(bs=8 if dry else 48)
    cases = [("DiT, Muon", rf, dit, "bfloat16", "compiled")]
    cases += [("DiT, AdamW", rf, replace(dit, optimizer="adamw"), "bfloat16", "compiled")]
    cases += [("DiT, Muon", rf, dit, p, "not compiled") for p in ("bfloat16", "TF32", "float32")]
    cases += [("latent DiT, Muon", ld, latent, "bfloat16", how) for how in ("compiled", "not compiled")]
    cases += [("UNet", ddpm, unet, "bfloat16", how) for how in ("compiled", "not compiled", "CUDA graphs")]
    return [c for c in cases if c[-1] == "not compiled" or not dry]  # compiling takes minutes on a CPU


def count_waits(step):
    """Calls in a step that make the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in found)


def speed(check):
    names, on_gpu = ("float32", "TF32", "bfloat16"), check.device.type == "cuda"
    rates = {k: benchmark.matmul_rate(check.device, set_precision(k)) / 1e12 for k in names}
    check.tell("matmul, TFLOP/s", **rates)
    x = torch.zeros(1 << (20 if check.dry else 30), device=check.device)
    check.tell("copy", **{"TB/s": 2e-9 * x.nbytes / check.milliseconds(x.clone, 5)})
    del x
    for name, script, cfg, precision, how in speed_cases(check.dry):
        what = f"{name}, {precision}, {how}, {cfg.bs} images"
        with check.measuring(what):
            torch._dynamo.reset()
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            torch.manual_seed(0)
            compiled, dtype = how == "compiled", set_precision(precision)
            model, steps = benchmark.ours(script, cfg, check.device, dtype, compiled)
            if how == "CUDA graphs":
                model.compile(options={"triton.cudagraphs": True, "triton.cudagraph_or_error": True})
            step, start = steps.__next__, time.perf_counter()
            require(math.isfinite(step().item()), "the loss is not finite")
            facts = {"first_step_s": time.perf_counter() - start}
            ms = check.milliseconds(step, 1 if check.dry else 20, 3)
            rate = 1e3 * cfg.bs / ms
            tflop = rate * benchmark.flops(model, lambda model, *args: model(*args), cfg) / 1e12
            facts |= {"ms": ms, "images/s": rate, "TFLOP/s": tflop, "of_matmul": tflop / rates[precision]}
            facts |= {"peak_GiB": torch.cuda.max_memory_reserved() / 2**30}
            check.tell(what, **facts, waits=count_waits(step) if on_gpu else None)
        model = steps = step = None


# ------------------------------------------------------------------------------------------------
# Train, and sample


def train(check):
    flags, home = check.flags, check.folder / "train"
    command = ["rf_dit_cifar.py", "--dataset", flags.dataset, "--minutes", flags.minutes, "--compile", "on"]
    command += ["--eval-every", 500] + ["--data-root", flags.data_root] * bool(flags.data_root)
    if check.dry:
        tiny = "--channels 3 --image-size 32 --steps 6 --eval-every 3 --sampling-steps 2 --bs 8 --compile off"
        command += [*TINY.split(), *tiny.split(), "--dataset", check.folder / "images"]
    call(*command, "--device", check.device.type, "--out", home, minutes=20 + flags.minutes)
    (run,) = (f.parent for f in home.glob("*/*/run.yaml"))
    about = yaml.safe_load((run / "run.yaml").read_text())
    cell = compare.read_run(run, about["dataset"])
    check.tell("training", **{k: cell[k] for k in ("steps", "images/s", "seconds", "startup")})
    check.tell("held-out loss", **{f"after {seconds:.3g} s:": loss for seconds, loss in cell["curve"]})
    shutil.copy(max(run.glob("samples/*.png")), check.folder / "grid.png")
    if not check.dry:  # training a classifier takes minutes on a CPU
        call("ddim_sample.py", run, "--npz", "--frames", 0, "--num-samples", 1000, "--out", home / "samples")
        evaluator = compare.Evaluator(about["config"], about["dataset"], flags.cache)
        check.tell("1,000 samples", **evaluator.evaluate(next(home.glob("samples/*.npz"))))
    sample(check, common.newest_checkpoint(run))


def sample(check, state):
    cfg = rf.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in state["config"].items()})
    cfg = replace(cfg, sampling_steps=2 if check.dry else 50)
    model, reference = rf.build_model(cfg).eval().requires_grad_(False).to(check.device), None
    model.load_state_dict(state["ema"])
    n, g = 4 if check.dry else 100, torch.Generator().manual_seed(0)
    x, y = torch.randn(n, *cfg.shape, generator=g).to(check.device), rf.conditions([], cfg).to(check.device)
    y = y[torch.arange(n, device=check.device) % len(y)]
    for name in ["float32", "TF32", "bfloat16"] + ["bfloat16, compiled"] * (not check.dry):
        with check.measuring(f"sampling in {name}"):
            dtype, net = set_precision(name.split(",")[0]), copy.deepcopy(model)
            how = "on" if "compiled" in name else "off"
            common.prepare(net, replace(cfg, dtype=str(dtype)[6:], compile=how), dynamic=True)
            rf.sample(net, x, y, replace(cfg, sampling_steps=1))
            start = time.perf_counter()
            images = rf.sample(net, x, y, cfg)[0].cpu()
            rate = n / (time.perf_counter() - start)
            reference = images if name == "float32" else reference
            off = (images - reference).abs()
            facts = {"images/s": rate, "largest_difference": off.max().item()}
            facts |= {"off_by_over_1_of_255": (off > 1 / 127.5).float().mean().item()}
            check.tell(f"sampling in {name}", **facts)


# ------------------------------------------------------------------------------------------------


def main():
    flags, stages = common.parse(Config, __doc__), [exact, attention, speed, train]
    names = [f.__name__ for f in stages]
    require({*flags.only} <= {*names}, f"--only {' '.join(flags.only)}: stages are {', '.join(names)}")
    common.require_range(flags, "minutes", 0, exclude_low=True)
    folder = Path(flags.out or f"logs/gpu/{time.strftime('%Y-%m-%d_%H-%M-%S')}").absolute()
    require(flags.dry or torch.cuda.is_available(), "PyTorch finds no GPU; --dry tries this file on a CPU")
    require(not folder.exists(), f"--out {flags.out} exists; choose another folder")
    check = Check(flags, folder)
    make_images(folder / "images")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # new: first steps wait as a user's do
    check.tell(common.device_name(check.device), torch=torch.__version__, commit=common.commit())
    for stage in stages:
        if stage.__name__ in (flags.only or names):
            start = time.perf_counter()
            with check.measuring(stage.__name__):
                stage(check)
            print0(f"-- {stage.__name__}: {time.perf_counter() - start:.0f} s")
    print0(f"wrote {folder}; failed: {check.failures}")
    sys.exit(check.failures > 0)


if __name__ == "__main__":
    with common.exit_on_user_error():
        main()
