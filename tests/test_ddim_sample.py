"""The sampler of runs: its solvers against diffusers and closed forms, its command line on real runs."""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import TINY
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image
from safetensors import safe_open

import common
import ddim_sample as d
import ddpm_unet_mnist as ddpm
import rf_dit_cifar as rf

NAME = "ddim_sample.py"
ROOT = Path(d.__file__).parent

# ------------------------------------------------------------------------------------------------
# Solvers against diffusers


def theirs(kind, cfg, **more):
    """A scheduler of diffusers with our configuration and our table, which is float64."""
    s = kind(
        cfg.timesteps,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[cfg.schedule],
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[cfg.objective],
        timestep_spacing="trailing",
        **more,
    )
    s.alphas_cumprod = ddpm.abar_table(cfg.schedule, cfg.timesteps, torch.device("cpu"))[1:]
    return s


def seeded(k, shape=(2, 1, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(k)), dtype=torch.float64)


def predictor(cfg, out, **flags):
    """The program's predictor around a network that says out(k) at time k / T, whatever x."""

    def model(x, t, y):
        return out(round(t[0].item() * cfg.timesteps))[: len(x)]

    flags = replace(d.Config(clip_x0="off", guidance=1.0), **flags)
    return d.predictor(run_of(ddpm, cfg, model), flags, torch.zeros(2, dtype=torch.long))


def run_of(script, cfg, model):
    return d.Run(Path("run"), script, cfg, [model], 0, None, True, torch.device("cpu"))


def grid_of(cfg, steps, spacing="trailing"):
    return d.time_grid(lambda t: ddpm.path(t, cfg), steps, spacing, cfg.timesteps)


def last(steps):
    """The result of a sampler."""
    *_, (x, _) = steps
    return x


def close(got, want, rtol):
    assert (got - want).norm() <= rtol * want.norm(), ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("steps", [10, 50, 100])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("objective, clip", [("eps", "off"), ("v", "off"), ("v", "on")])
def test_ddim_steps_are_those_of_diffusers(objective, clip, schedule, eta, steps):
    cfg = ddpm.Config(objective=objective, schedule=schedule, class_dropout=1.0)
    s = theirs(DDIMScheduler, cfg, clip_sample=clip == "on")
    s.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    s.set_timesteps(steps)
    x, noises = seeded(0), iter(range(10_000, 20_000))
    ours = d.ddim(
        predictor(cfg, seeded, clip_x0=clip), x, grid_of(cfg, steps), eta, lambda: seeded(next(noises))
    )
    for i, (k, (got, x0)) in enumerate(zip(s.timesteps, ours, strict=True)):
        want = s.step(
            seeded(k + 1),
            k,
            x,
            eta,
            use_clipped_model_output=clip == "on",
            variance_noise=seeded(10_000 + i) if eta else None,
        )
        close(got, want.prev_sample, 1e-7)
        close(x0, want.pred_original_sample, 1e-7)
        x = got
    assert x.std() > 0 and next(noises, None) == 10_000 + (steps - 1) * (eta > 0)  # no noise into t = 0


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("objective", ["eps", "v"])
def test_dpm_solver_steps_are_those_of_diffusers(objective, schedule, steps):
    cfg = ddpm.Config(objective=objective, schedule=schedule, class_dropout=1.0)
    s = theirs(DPMSolverMultistepScheduler, cfg, algorithm_type="dpmsolver++", final_sigmas_type="zero")
    s.set_timesteps(steps)
    abar = s.alphas_cumprod[s.timesteps]
    s.sigmas = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1, dtype=torch.float64)])  # not float32
    x = seeded(0)
    ours = d.dpmpp2m(predictor(cfg, seeded), x, grid_of(cfg, steps))
    for k, (got, _) in zip(s.timesteps, ours, strict=True):
        close(got, s.step(seeded(k + 1), k, x).prev_sample, 1e-6)  # float32 inside theirs
        x = got


def test_eta_1_at_all_times_is_the_ancestral_sampler():
    cfg = ddpm.Config(width=8, mults=(1, 2), shape=(1, 8, 8), timesteps=40, sampling_steps=40, guidance=2.0)
    torch.manual_seed(0)
    model = ddpm.build_model(cfg).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head[-1].weight, std=0.3)
    y, g = torch.arange(5), torch.Generator()

    def noise():
        return torch.randn(5, 1, 8, 8, generator=g)

    g.manual_seed(3)
    want, _ = ddpm.sample(model, noise(), y, cfg, noise)
    g.manual_seed(3)
    f = d.predictor(run_of(ddpm, cfg, model), d.Config(clip_x0="on", guidance=2.0), y)
    got = last(d.ddim(f, noise(), grid_of(cfg, 40), 1.0, noise))
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_heun_is_that_of_edm_where_alpha_is_1():
    def denoise(x, sigma):
        return torch.tanh(x / (1 + sigma**2))

    levels, x = [10.0, 3.0, 1.0, 0.2, 0.0], seeded(0) * 10
    grid = [(s / 10, 1.0, s) for s in levels]
    got = last(d.heun(lambda x, t, s: (denoise(x, 10 * t), (x - denoise(x, 10 * t)) / (10 * t)), x, grid))
    for s, r in zip(levels, levels[1:], strict=False):  # Karras et al. 2022, algorithm 1
        slope = (x - denoise(x, s)) / s
        y = x + (r - s) * slope
        if r:
            y = x + (r - s) * (slope + (y - denoise(y, r)) / r) / 2
        x = y
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------
# Solvers against closed forms: the data is a mixture of Gaussians on a line

PATHS = {
    "cosine": lambda t: (torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)),
    "straight": lambda t: (1 - t, t),
}
GAUSSIAN = ([0.4], 0.5)
TWO_MODES = ([-0.8, 0.6], 0.3)


def exact(path, means, sd):
    """f(x, t, s) -> (x0, eps) of a network without error."""
    m = torch.tensor(means, dtype=torch.float64)

    def f(x, t, to=None):
        a, s = path(torch.tensor(t, dtype=torch.float64))
        var = a**2 * sd**2 + s**2
        far = x[:, None] - a * m
        x0 = ((-(far**2) / (2 * var)).softmax(1) * (m + a * sd**2 / var * far)).sum(1)
        return x0, (x - a * x0) / s

    return f


def transported(x, means, sd):
    """Where the probability flow takes x ~ N(0, 1): on a line, to the same quantile of the data."""
    m, low, high = torch.tensor(means, dtype=torch.float64), torch.full_like(x, -9), torch.full_like(x, 9)
    for _ in range(80):
        mid = (low + high) / 2
        below = torch.special.ndtr((mid[:, None] - m) / sd).mean(1) < torch.special.ndtr(x)
        low, high = torch.where(below, mid, low), torch.where(below, high, mid)
    return low


def order(counts, errors):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize("solver, want", [(d.ddim, 1), (d.heun, 2), (d.dpmpp2m, 2)])
@pytest.mark.parametrize("data", [GAUSSIAN, TWO_MODES])
@pytest.mark.parametrize("path", PATHS)
def test_orders_in_log_snr(solver, want, data, path):
    """From sigma / alpha = 50 to 1e-4 in equal steps of its logarithm, and to 0."""
    (means, sd), counts, errors = data, (64, 128, 256, 512), []
    for n in counts:
        noisy = torch.tensor([*np.geomspace(50, 1e-4, n), 0])
        t = noisy.atan() * 2 / math.pi if path == "cosine" else noisy / (1 + noisy)
        grid = list(zip(*(v.tolist() for v in (t, *PATHS[path](t))), strict=True))
        grid[-1] = (0, 1, 0)
        _, a, s = grid[0]
        x = torch.linspace(-1.9, 2.1, 8, dtype=torch.float64)
        far = (x[:, None] - a * torch.tensor(means, dtype=torch.float64)) / math.hypot(a * sd, s)
        end = transported(torch.special.ndtri(torch.special.ndtr(far).mean(1)), means, sd)
        errors.append((last(solver(exact(PATHS[path], *data), x, grid)) - end).abs().mean().item())
    assert order(counts, errors) == pytest.approx(want, abs=0.1), errors
    assert errors[-1] < (0.01 if want == 1 else 1e-4)


@pytest.mark.parametrize("solver, want", [(d.ddim, 1), (d.heun, 2), (d.dpmpp2m, 1.8)])
@pytest.mark.parametrize("data", [GAUSSIAN, TWO_MODES])
@pytest.mark.parametrize("path", PATHS)
def test_orders_in_t(solver, want, data, path):
    """From t = 1, where alpha = 0. Near both ends, steps in t however small are long in log SNR, in which
    DPM-Solver++ has its order: it comes close to it, slowly.
    """
    x, counts = torch.linspace(-1.9, 2.1, 8, dtype=torch.float64), (256, 512, 1024)
    f, end = exact(PATHS[path], *data), transported(x, *data)
    grids = [d.time_grid(PATHS[path], n, "trailing") for n in counts]
    errors = [(last(solver(f, x, g)) - end).abs().mean().item() for g in grids]
    assert order(counts, errors) == pytest.approx(want, abs=0.15), errors
    assert errors[-1] < (0.01 if want == 1 else 1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", [d.ddim, d.heun, d.dpmpp2m])
@pytest.mark.parametrize("spacing", ["karras", "logsnr"])
def test_other_grids_reach_the_same_end(path, solver, spacing):
    x = torch.linspace(-1.9, 2.1, 8, dtype=torch.float64)
    grid = d.time_grid(PATHS[path], 100, spacing)
    start = math.hypot(*grid[0][1:]) * x
    got = last(solver(exact(PATHS[path], *TWO_MODES), start, grid))
    torch.testing.assert_close(got, transported(x, *TWO_MODES), rtol=0, atol=0.05)


@pytest.mark.parametrize("path", PATHS)
def test_inversion_returns_the_image_and_its_noise(path):
    """To first order: half the error at twice the steps."""
    noise, errors = torch.linspace(-1.9, 2.1, 8, dtype=torch.float64), []
    image, f = transported(noise, *TWO_MODES), exact(PATHS[path], *TWO_MODES)
    for n in (250, 500, 1000):
        grid = d.time_grid(PATHS[path], n, "trailing")
        up = last(d.invert(f, image, grid, 1e-4))
        errors.append([(up - noise).abs().max(), (last(d.ddim(f, up, grid)) - image).abs().max()])
    errors = torch.tensor(errors)
    assert errors[-1].max() < 0.02 and (errors[1:] < 0.6 * errors[:-1]).all(), errors


def test_evaluations_and_what_samplers_yield():
    for solver, nfe in ((d.ddim, 7), (d.dpmpp2m, 7), (d.heun, 13)):
        f, times = exact(PATHS["straight"], *GAUSSIAN), []
        grid, x = d.time_grid(PATHS["straight"], 7, "trailing"), torch.ones(3, dtype=torch.float64)
        steps = list(solver(lambda x, t, s, f=f, times=times: times.append(t) or f(x, t), x, grid))
        assert len(times) == nfe and min(times) > 0 and len(steps) == 7
        torch.testing.assert_close(steps[0][1], f(x, 1.0)[0])  # the first estimate
        torch.testing.assert_close(steps[-1][0], steps[-1][1])  # at t = 0, x is its estimate


def test_ddim_on_the_straight_path_is_euler():
    f, grid = exact(PATHS["straight"], *TWO_MODES), d.time_grid(PATHS["straight"], 9, "trailing")
    x = want = torch.linspace(-2, 2, 5, dtype=torch.float64)
    for (t, *_), (s, *_) in zip(grid, grid[1:], strict=False):
        x0, eps = f(want, t)
        want = want + (s - t) * (eps - x0)
    torch.testing.assert_close(last(d.ddim(f, x, grid)), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spacing", ["trailing", "karras", "logsnr"])
@pytest.mark.parametrize("steps", [1, 2, 5, 50, 990, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine", None])
def test_grids_fall_strictly_over_trained_times(spacing, steps, schedule):
    cfg = ddpm.Config(schedule=schedule) if schedule else None
    grid = grid_of(cfg, steps, spacing) if cfg else d.time_grid(PATHS["straight"], steps, spacing)
    t = np.array([t for t, *_ in grid])
    assert len(t) == steps + 1 and t[0] <= 1 and grid[-1] == (0, 1, 0) and (np.diff(t) < 0).all()
    if cfg:
        assert np.array_equal((t * 1000).round() / 1000, t)
    want = ddpm.path(torch.tensor(t), cfg) if cfg else PATHS["straight"](torch.tensor(t))
    assert torch.equal(torch.tensor(grid, dtype=torch.float64)[:, 1:].T, torch.stack(want))
    if spacing == "trailing":
        assert t == pytest.approx(np.linspace(1, 0, steps + 1), abs=6e-4)
    elif steps in (1, 50) and schedule != "cosine":
        noisy = np.array([s / a for _, a, s in grid[:-1]])
        bent = {"karras": noisy ** (1 / 7), "logsnr": np.log(noisy)}[spacing]
        head = bent[:20]  # where rounding to 1 / T does not matter
        assert noisy[0] == pytest.approx(80, rel=0.01)
        assert np.diff(head) == pytest.approx((bent[-1] - bent[0]) / 49, rel=0.1)


def test_slerp():
    a, b = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(d.slerp(a, b, torch.tensor(0.0)), a)
    torch.testing.assert_close(d.slerp(a, b, torch.tensor(1.0)), b)
    for w in (0.2, 0.5):
        assert d.slerp(a, b, torch.tensor(w)).std().item() == pytest.approx(
            1, abs=0.05
        )  # unlike a mean's 0.7
    torch.testing.assert_close(d.slerp(a, b, torch.tensor(0.3)), d.slerp(b, a, torch.tensor(0.7)))


def test_predict_gets_guidance_in_its_interval_and_both_times():
    seen = []

    def predict(model, x, t, y, cfg, guidance, s):
        seen.append((t.item(), guidance, s.item()))
        return x, x

    flags = d.Config(clip_x0="off", guidance=3.0, guidance_interval=(0.25, 0.5))
    f = d.predictor(run_of(SimpleNamespace(predict=predict), None, None), flags, torch.zeros(1))
    times = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
    for t in times:
        f(torch.zeros(1, 1, 2, 2), t, t / 2)
    assert seen == [(t, w, t / 2) for t, w in zip(times, (1, 1, 3, 3, 3, 1), strict=True)]


def test_networks_and_data_of_other_shapes():
    """Two outputs; and sound, [B, C, L], with clipping."""

    class Two(torch.nn.Module):
        def forward(self, x, t, y):
            return torch.cat([x, x], 1)

    def predict(model, x, t, y, cfg, guidance, s):
        v, _ = model(x, t, y).chunk(2, 1)
        return 3 * v, v

    def path(t, cfg):
        return 1 - t, t

    script = SimpleNamespace(predict=predict, path=path, sample_shape=lambda cfg: (2, 7))
    run, flags = (
        run_of(script, None, Two()),
        d.Config(steps=4, spacing="trailing", clip_x0="on", guidance=1.0),
    )
    assert d.count_passes(run, flags, torch.zeros(1)) == (4, 0)
    x = torch.randn(3, 2, 7)
    x0, eps = d.predictor(run, flags, torch.zeros(3))(x, 0.5, 0.25)
    torch.testing.assert_close(x0, (3 * x).clamp(-1, 1))
    torch.testing.assert_close(0.5 * x0 + 0.5 * eps, x)


def test_an_earlier_checkpoint_guides_within_the_interval():
    """Karras et al. 2024, eq. 3: away from the worse network, both without guidance of their own."""

    def predict(model, x, t, y, cfg, guidance, s):
        assert guidance == 1
        return model(x), 2 * model(x)

    run = run_of(SimpleNamespace(predict=predict), None, lambda x: x + 5)
    run = run._replace(models=[*run.models, lambda x: x + 1])
    f = d.predictor(run, d.Config(clip_x0="off", guidance=3.0, guidance_interval=(0.25, 0.5)), torch.zeros(1))
    for t, want in ((1.0, 5), (0.5, 1 + 3 * 4), (0.25, 1 + 3 * 4), (0.125, 5)):
        x0, eps = f(torch.zeros(1, 1, 2, 2), t, t / 2)
        assert (x0 == want).all() and (eps == 2 * want).all()


# ------------------------------------------------------------------------------------------------
# Runs


def train(home, name, *flags):
    command = [sys.executable, home / name, *TINY, "--dataset", "digits", "--eval-every", 0, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DIFFUSION_LOGS": str(home / "logs")}
    p = subprocess.run([*map(str, command)], cwd=home, env=environment, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return next((home / "logs" / "ddpm").iterdir())


FORK = """
class TwoConvs(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.label, self.body = nn.Embedding(len(cfg.classes) + 1, 1), nn.Conv2d(3, cfg.hidden, 3, padding=1)
        self.head = nn.Conv2d(cfg.hidden, 1, 3, padding=1)

    def forward(self, x, t, y):
        maps = [v.view(-1, 1, 1, 1).expand_as(x) for v in (t, self.label(y))]
        return self.head(self.body(torch.cat([x, *maps], 1)).relu())


def build_model(cfg):
    return TwoConvs(cfg)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a fork with a backbone and a flag of its own: a few steps, two checkpoints."""
    home = tmp_path_factory.mktemp("fork")
    shutil.copy(common.__file__, home)
    text = Path(ddpm.__file__).read_text().replace("build_model = UNet\n", FORK)
    text = text.replace("    width: int", "    hidden: int = 8  # channels\n    width: int", 1)
    text = text.replace(
        "    sampling_steps: int", "    churn: float = 1.0  # of noise\n    sampling_steps: int"
    )
    text = text.replace("noise() if noise else torch.randn_like(x), cfg)", "cfg.churn * noise(), cfg)")
    (home / "my_fork.py").write_text(text)
    run = train(home, "my_fork.py", "--steps", 40, "--save-every", 20, "--lr", 0.02, "--warmup", 0)
    (home / "my_fork.py").unlink()
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs the program in this process, which it leaves as it was; returns what it printed."""

    def main(*argv):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, "common", common)
            m.setattr(sys, "path", list(sys.path))
            m.setattr(sys, "dont_write_bytecode", False)
            m.setattr(d.signal, "signal", lambda *_: None)
            with common.exit_on_user_error():
                d.main([str(a) for a in argv])
        return capsys.readouterr().out

    return main


def arrays(folder):
    (file,) = folder.glob("*.npz")
    with np.load(file) as z:  # no pickles in it
        return z["arr_0"], z["arr_1"], str(z["protocol"])


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_samples_of_a_fork_whose_script_is_gone(run, main, tmp_path):
    """Pictures by default; the run's folder is otherwise left alone."""
    code, before = names(run / "code"), names(run)
    out = main(run, "--num-samples", 12, "--steps", 4)
    name = "step_00000040_ddim4_w1.5_seed0_numsamples12"
    assert "NFE 4 network passes per sample, 4 of them doubled by guidance\n" in out
    assert f"wrote {run}/samples/{name}.png" in out
    made = [p for p in names(run / "samples") if p.startswith(name)]
    assert made == [f"{name}.gif", f"{name}.png"]
    assert Image.open(run / "samples" / f"{name}.gif").n_frames == 4
    assert names(run / "code") == code == ["common.py", "my_fork.py"] and names(run) == before


def test_code_weights_and_configuration_come_from_the_run(run, main, script, tmp_path):
    """With another common.py and no scripts here, samples are the same; with the run's code changed, not."""
    flags = ("--num-samples", 3, "--steps", 2, "--npz", "--frames", 0)
    main(run, *flags, "--out", tmp_path / "a")
    home = tmp_path / "elsewhere"
    home.mkdir()
    shutil.copy(ROOT / NAME, home)
    ours = Path(common.__file__).read_text()
    (home / "common.py").write_text(ours.replace("def time_embedding", "def another_time_embedding"))
    (run / "code" / "common.py").write_text(f"{ours}\nMARK = 'the run has its own'\n")
    fork = run / "code" / "my_fork.py"
    fork.write_text(fork.read_text() + "\nimport helper\nassert common.MARK and common.time_embedding\n")
    (run / "code" / "helper.py").write_text("")
    p = script(home / NAME, run, *flags, "--out", tmp_path / "b")
    assert p.returncode == 0 and p.err == "", p.err
    a, b = arrays(tmp_path / "a"), arrays(tmp_path / "b")
    assert a[2] == b[2] and np.array_equal(a[0], b[0]) and a[0].std() > 10
    fork.write_text(fork.read_text().replace(".relu())", ".sin())"))
    main(run, *flags, "--out", tmp_path / "c")
    assert not np.array_equal(a[0], arrays(tmp_path / "c")[0])


def test_a_fork_that_imports_another_script(run, main):
    """Of two files with build_model(), the one that imports the other is the run's."""
    fork = run / "code" / "my_fork.py"
    shutil.copy(fork, run / "code" / "parent.py")
    fork.write_text("import parent  # build_model is replaced\n" + fork.read_text())
    assert "wrote" in main(run, "--num-samples", 2, "--steps", 1)
    shutil.copy(run / "code" / "parent.py", run / "code" / "another.py")
    with pytest.raises(SystemExit, match="2"):
        main(run, "--num-samples", 2, "--steps", 1)


def test_a_run_of_the_first_script(few, main, script, tmp_path):
    p = script("ddpm_unet_mnist.py", *TINY, "--dataset", few, "--steps", 2, "--eval-every", 0)
    assert p.returncode == 0, p.err
    (run,) = (tmp_path / "logs" / "ddpm").iterdir()
    main(run, "--num-samples", 3, "--solver", "heun", "--npz", "--steps", 2)
    assert arrays(run / "samples")[0].shape == (3, 16, 16, 1)


LATENT = """
from dataclasses import dataclass

import torch


@dataclass
class Config:
    gain: float = 0.9


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, y):
        return self.w * x


def build_model(cfg):
    return Net()


def path(t, cfg):
    return 1 - t, t


def null(y, cfg):
    return y


def conditions(names, cfg):
    return torch.tensor([float(n) for n in names or [1.0]])


def predict(model, x, t, y, cfg, guidance=1.0, s=None):
    v, t = model(x, t, y), t.view(-1, 1, 1, 1)
    return x - t * v, x + (1 - t) * v


def sample_shape(cfg):
    return 2, 4, 4


def decode(x, cfg):
    return x[:, [0, 1, 0]].repeat_interleave(4, 2).repeat_interleave(4, 3) * cfg.gain
"""


W = 0.7  # dx/dt = W x maps noise to exp(-W) of itself


@pytest.fixture
def latent_run(tmp_path):
    """latent_run((old, new), ...): a run of a foreign script with the contract alone, with texts replaced."""

    def make(*changes):
        run, text = tmp_path / "run", LATENT
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        for sub in ("code", "checkpoints"):
            (run / sub).mkdir(parents=True)
        (run / "code" / "flow.py").write_text(text)
        (run / "code" / "common.py").write_text("")
        (run / "run.yaml").write_text("config: {gain: 0.5}")
        state = {"model": {"w": torch.zeros(1)}, "ema": {"w": torch.full((1,), W)}}
        torch.save(state | {"optimizer": {}, "step": 5, "config": {}}, run / "checkpoints/step_00000005.pt")
        return run

    return make


def pixels(n, factor=None):
    """n samples [n, H, W, C] of a latent run, as real numbers on the scale of pixels."""
    seeds = [torch.Generator().manual_seed(common.derive_seed(0, "sample", i)) for i in range(n)]
    noise = torch.stack([torch.randn(2, 4, 4, generator=g) for g in seeds])
    x = noise[:, [0, 1, 0]].repeat_interleave(4, 2).repeat_interleave(4, 3) * (factor or math.exp(-W)) * 0.5
    return (x * 127.5 + 127.5).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp2m"])
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_a_latent_run_on_the_straight_path(main, latent_run, solver, spacing):
    run = latent_run()
    main(run, "--num-samples", 5, "--solver", solver, "--spacing", spacing, "--steps", 300, "--npz", "--png")
    images, y, _ = arrays(run / "samples")
    assert images.shape == (5, 16, 16, 3) and y.tolist() == [1] * 5
    want = pixels(5)
    assert np.abs(images - want).max() < (0.6 if spacing == "trailing" else 1.1)
    scale = ((images - 127.5) * (want - 127.5)).sum() / ((want - 127.5) ** 2).sum()
    # A start below t = 1 has its own variance.
    assert scale == pytest.approx(1, abs=0.02 if solver == "ddim" else 0.005)
    (folder,) = [p for p in (run / "samples").iterdir() if p.is_dir()]
    assert names(folder) == [f"{i:06}.png" for i in range(5)]
    assert np.array_equal(np.asarray(Image.open(folder / "000003.png")), images[3])


def test_a_flow_map_is_exact_in_any_number_of_steps(main, latent_run):
    """Its predict() uses s: the mean velocity from t to s."""
    new = "v, d, t = model(x, t, y), (s - t).view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)"
    run = latent_run(
        ("v, t = model(x, t, y), t.view(-1, 1, 1, 1)", f"{new}\n    v = x * (model.w * d).expm1() / d")
    )
    for steps in (1, 3):
        main(run, "--num-samples", 5, "--steps", steps, "--npz", "--out", run / str(steps))
        assert np.abs(arrays(run / str(steps))[0] - pixels(5)).max() < 0.6


def test_passes_are_counted_at_the_network(main, latent_run):
    run = latent_run(("v, t = model(x, t, y)", "v, t = (model(x, t, y) + model(x, t, null(y, cfg))) / 2"))
    assert "NFE 6 network passes per sample\n" in main(run, "--num-samples", 2, "--steps", 3, "--npz")
    assert yaml.safe_load(arrays(run / "samples")[2])["nfe"] == 6


def test_conditions_may_have_any_shape(main, latent_run, tmp_path):
    """y [B, L]: each sample gets its own row in every batch, picture and file."""
    run = latent_run(
        ("torch.tensor([float(n) for n in names or [1.0]])", "torch.tensor([[0.0, 0, 1], [2, 2, 2]])"),
        ("self.w * x", "self.w * x * y.mean(1).view(-1, 1, 1, 1)"),
    )
    main(run, "--num-samples", 5, "--bs", 2, "--steps", 300, "--npz", "--out", tmp_path / "a")
    images, y, _ = arrays(tmp_path / "a")
    assert y.tolist() == [[0, 0, 1], [2, 2, 2]] * 2 + [[0, 0, 1]]
    for i, factor in enumerate([math.exp(-W / 3), math.exp(-2 * W)] * 2 + [math.exp(-W / 3)]):
        assert np.abs(images[i] - pixels(5, factor)[i].clip(0, 255)).max() < 0.9
    main(run, "--interpolate", 2, "--num-samples", 4, "--steps", 300, "--out", tmp_path / "b")
    tiles = np.asarray(Image.open(next((tmp_path / "b").glob("*.png"))))[8:, 8:]
    for i, factor in enumerate([math.exp(-W / 3)] * 2 + [math.exp(-2 * W)] * 2):
        tile = tiles[i // 2 * 72 :, i % 2 * 72 :][:64:4, :64:4]
        assert np.abs(tile - pixels(4, factor)[i].clip(0, 255)).max() < 0.9


def test_the_own_sampler_is_sample_of_the_script(run, main, tmp_path):
    """With --set and the noise of the same samples, whatever the batch size."""
    for bs in (100, 3):
        flags = ("--solver", "own", "--bs", bs, "--num-samples", 7, "--guidance", 2, "--npz")
        flags += ("--dtype", "float32", "--set", "sampling_steps=5", "churn=0.5", "clip_x0=false")
        out = main(run, *flags, "--out", tmp_path / str(bs))
        assert "NFE 5 network passes per sample, 5 of them doubled" in out
    spec = importlib.util.spec_from_file_location("a_fork", run / "code" / "my_fork.py")
    fork = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, "a_fork", fork)
        spec.loader.exec_module(fork)
    cfg = fork.Config(shape=(1, 16, 16), guidance=2.0, sampling_steps=5, churn=0.5, clip_x0=False)
    model = fork.build_model(cfg).eval()
    model.load_state_dict(common.newest_checkpoint(run)["ema"])
    seeds = [torch.Generator().manual_seed(common.derive_seed(0, "sample", i)) for i in range(7)]

    def noise():
        return torch.stack([torch.randn(1, 16, 16, generator=g) for g in seeds])

    def pixels(**more):
        x, _ = fork.sample(model, noise(), torch.arange(7), replace(cfg, **more), noise)
        return (x.clamp(-1, 1) * 127.5 + 127.5).permute(0, 2, 3, 1).numpy()

    images, y, protocol = arrays(tmp_path / "100")
    assert np.abs(images - pixels()).max() < 0.6 and images.std() > 10 and y.tolist() == [*range(7)]
    assert np.abs(images.astype(int) - arrays(tmp_path / "3")[0]).max() <= 1
    for more in ({"sampling_steps": 6}, {"churn": 1.0}, {"clip_x0": True}, {"guidance": 1.5}):
        assert np.abs(images - pixels(**more)).max() > 2
    stored = yaml.safe_load(protocol)
    assert stored["solver"] == "own" and stored["nfe"] == 5
    assert stored["set"] == ["sampling_steps=5", "churn=0.5", "clip_x0=false"]
    name = "run_step_00000040_own_w2_seed0_setsampling_steps=5+churn=0.5+clip_x0=false_numsamples7"
    name += "_dtypefloat32"
    assert names(tmp_path / "100") == [f"{name}.gif", f"{name}.npz", f"{name}.png"]


@dataclass
class RunConfig:
    # method
    lr: float = 1.0  # rate
    # guidance and sampling
    guidance: float = 1.0  # scale
    levels: tuple[int, ...] = ()  # times
    kind: Literal["a", "b"] = "a"  # kind
    clip: bool = True  # clip
    num_samples: int = 3  # images
    # run
    seed: int = 0  # seed


def test_the_own_sampler_of_a_run_whatever_it_needs_to_train(run, monkeypatch, tmp_path):
    """A batch that three processes cannot share does not matter to them."""
    monkeypatch.setitem(sys.modules, "common", common)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(d, "WORLD", 3)
    loaded, _ = d.load_run(str(run), d.Config(solver="own", set=("churn=0.5",)))
    assert loaded.config.churn == 0.5 and loaded.config.bs % 3


def test_the_gif_of_the_own_sampler_has_so_many_frames(run, main):
    main(run, *"--solver own --set sampling_steps=30 --frames 5 --num-samples 2".split())
    (gif,) = (run / "samples").glob("*_own_*.gif")
    assert 3 <= Image.open(gif).n_frames <= 5


def test_guidance_and_its_interval_are_the_runs_own():
    for script, own in ((rf, (0.1, 0.8)), (ddpm, (0.0, 1.0))):
        config = script.Config(guidance=3.0, **({"guidance_interval": own} if script is rf else {}))
        flags, config, *_ = d.resolve(d.Config(solver="own"), config)
        assert flags.guidance == config.guidance == 3 and flags.guidance_interval == own
    flags, config, *_ = d.resolve(d.Config(guidance=2, guidance_interval=(0.0, 0.5)), rf.Config())
    assert flags.guidance_interval == config.guidance_interval == (0, 0.5) and config.guidance == 2
    with pytest.raises(common.UserError, match="--steps is 100001; it must be from 0 to 100000"):
        d.resolve(d.Config(steps=100_001), rf.Config())


def test_set_changes_only_fields_about_guidance_and_sampling():
    def parsed(*items):
        return d.parse_settings(items, RunConfig)

    assert parsed("levels=3,1", "kind=b", "clip=false") == {"levels": (3, 1), "kind": "b", "clip": False}
    for key in ("lr", "guidance", "num_samples", "seed", "kindd", "config"):
        with pytest.raises(common.UserError, match=f"--set {key}=1.* levels=VALUE, kind=VALUE, clip=VALUE$"):
            parsed(f"{key}=1")
    for item in ("kind=c", "clip=2", "levels=x"):
        with pytest.raises(common.UserError, match="argument --.*; see --help"):
            parsed(item)


def test_a_sample_depends_on_seed_and_number_alone(run, main, tmp_path):
    flags, out = ("--steps", 3, "--eta", 0.7, "--npz", "--frames", 0, "--dtype", "float32"), []
    for i, more in enumerate((("--bs", 100), ("--bs", 3), ("--num-samples", 7), ("--seed", 1))):
        main(run, "--num-samples", 10, *flags, *more, "--out", tmp_path / str(i))
        out.append(arrays(tmp_path / str(i)))
    images, y, _ = out[0]
    assert y.dtype == np.int64 and y.tolist() == list(range(10)) and images.dtype == np.uint8
    assert images.std() > 10 and len(np.unique(images.reshape(10, -1), axis=0)) == 10
    assert np.abs(images.astype(int) - out[1][0]).max() <= 1  # float rounding may differ by batch
    assert np.abs(images[:7].astype(int) - out[2][0]).max() <= 1
    assert np.abs(images.astype(int) - out[3][0]).max() > 20


@pytest.mark.parametrize(
    "flags",
    [
        *["--eta 0.5", "--solver heun", "--solver dpmpp2m", "--steps 3", "--spacing karras"],
        *[
            "--spacing logsnr",
            "--guidance 4",
            "--guidance-interval 0.5 1",
            "--clip-x0 off",
            "--weights model",
        ],
        *["--step 20", "--classes 3", "--seed 2"],
    ],
)
def test_each_flag_changes_the_samples_and_the_name(run, main, tmp_path, flags):
    common_flags = ("--num-samples", 4, "--npz", "--frames", 0, "--guidance", 2, "--steps", 4)
    main(run, *common_flags, "--out", tmp_path / "a")
    main(run, *common_flags, *flags.split(), "--out", tmp_path / "b")
    assert not np.array_equal(arrays(tmp_path / "a")[0], arrays(tmp_path / "b")[0])
    assert names(tmp_path / "a")[0] != names(tmp_path / "b")[0]


def test_classes(run, main):
    main(run, "--num-samples", 7, "--npz", "--steps", 1, "--classes", 0, 1, 7)
    assert arrays(run / "samples")[1].tolist() == [0, 1, 7, 0, 1, 7, 0]


def test_an_interrupted_job_continues(run, main, monkeypatch, tmp_path):
    """Stopped in its fourth batch, while the third is written; what is whole is not drawn again."""
    flags = ("--num-samples", 140, "--bs", 30, "--npz", "--steps", 2, "--frames", 2)
    main(run, *flags, "--out", tmp_path / "whole")
    solve, seen = d.solve, []

    def counted(*args):
        seen.append(len(args[2]))
        if len(seen) == 5:  # the first counts the passes
            raise KeyboardInterrupt
        return solve(*args)

    monkeypatch.setattr(d, "solve", counted)
    with pytest.raises(KeyboardInterrupt):
        main(run, *flags, "--out", tmp_path / "out")
    (part,) = (tmp_path / "out").glob("*.part")
    assert [p for p in names(part) if "npy" in p] == [f"{i:08d}.npy" for i in (0, 28, 56)]  # equal batches
    (part / "00000056.npy").rename(part / ".00000056.npy.123.tmp")
    assert not list((tmp_path / "out").glob("*.npz")) and len(list((tmp_path / "out").glob("*.gif"))) == 1
    seen.clear()
    out = main(run, *flags, "--out", tmp_path / "out")
    assert "continuing after 2 of 5 batches" in out and seen == [1, 28, 28, 28]
    for file in (tmp_path / "whole").iterdir():  # bit for bit, pictures included
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert names(tmp_path / "whole") == names(tmp_path / "out")


def digest(folder):
    (file,) = folder.glob("*.npz")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_any_number_of_processes_draw_the_same_bytes(run, main, script, tmp_path):
    """Three, killed while they draw, then two: the file of one that was never interrupted."""
    flags = "--num-samples 95 --bs 10 --npz --steps 200 --frames 2".split()
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node".split()]
    main(run, *flags, "--out", tmp_path / "one")
    flags += ["--out", tmp_path / "many"]
    process = script(NAME, run, *flags, prefix=[*torchrun, "3"], wait=False, env={"OMP_NUM_THREADS": "1"})
    while process.poll() is None and len([*tmp_path.glob("many/*.part/*0.npy")]) < 2:
        time.sleep(0.01)
    workers = [int(p.name) for p in Path("/proc").glob("[0-9]*") if ours(p, str(tmp_path / "many"))]
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    done = [*tmp_path.glob("many/*.part/*0.npy")]
    assert len(workers) == 4 and 2 <= len(done) < 10 and not [*tmp_path.glob("many/*.npz")]
    p = script(NAME, run, *flags, prefix=[*torchrun, "2"], env={"OMP_NUM_THREADS": "1"})
    assert p.returncode == 0 and f"continuing after {len(done)} of 10 batches" in p.out, p.err
    assert digest(tmp_path / "one") == digest(tmp_path / "many") and arrays(tmp_path / "one")[0].std() > 10
    assert arrays(tmp_path / "one")[0].shape == (95, 16, 16, 1) and not [*tmp_path.glob("*/*.part")]


def ours(process, text):
    with contextlib.suppress(OSError):
        return text.encode() in (process / "cmdline").read_bytes()


def test_networks_run_in_bfloat16_and_compiled_once_for_all_batches(run, main, tmp_path):
    """... the last, smaller one included; x and the arithmetic of samplers stay float32."""
    flags, out = ("--num-samples", 5, "--bs", 3, "--npz", "--frames", 0), {}
    counters = torch._dynamo.utils.counters
    kinds = {"a": ("float32", "off"), "b": ("bfloat16", "off"), "c": ("bfloat16", "on")}
    for name, (dtype, compiled) in kinds.items():
        counters.clear()
        main(run, *flags, "--dtype", dtype, "--compile", compiled, "--out", tmp_path / name)
        out[name], _, protocol = arrays(tmp_path / name)
        protocol = yaml.safe_load(protocol)
        assert (protocol["dtype"], protocol["compiled"]) == (dtype, compiled == "on")
        assert counters["stats"]["unique_graphs"] == (compiled == "on")
    assert not np.array_equal(out["a"], out["b"])  # 40 steps: errors of 16 bits on the way to x0
    for name in "bc":
        assert np.abs(out[name].astype(int) - out["a"]).mean() < 2 and out["a"].std() > 10


def test_weights_are_shared_as_a_file(run, main, capsys, tmp_path):
    """... which has all but the code: Config, class names, step; and the run's checkpoints may be gone."""
    file, flags = tmp_path / "x.safetensors", ("--num-samples", 3, "--steps", 2, "--npz", "--frames", 0)
    main(run, *flags, "--out", tmp_path / "a")
    main(run, "--export", file)
    shutil.rmtree(run / "checkpoints")
    (run / "run.yaml").write_text("config: {}")
    main(run, *flags, "--weights", file, "--out", tmp_path / "b")
    assert np.array_equal(arrays(tmp_path / "a")[0], arrays(tmp_path / "b")[0])
    with safe_open(file, "pt") as f:
        about = f.metadata()
    config = json.loads(about["config"])
    assert config["classes"] == [*"0123456789"] and "out" not in config and about["step"] == "40"
    other = safetensors.torch.save({"x": torch.zeros(1)}, about | {"contract": "0"})
    for data, more, text in (
        (file.read_bytes(), ["--step", 40], "has a step of its own; leave out --step"),
        (b"nothing", [], "is not a file of .*; use ema, model or such a file"),
        (other, [], "contract 0 instead of 1"),
    ):
        file.write_bytes(data)
        with pytest.raises(SystemExit):
            main(run, *flags, "--weights", file, *more)
        err = capsys.readouterr().err
        assert re.search(text, err) and err.count("\n") == 1


def test_an_earlier_checkpoint_guides_runs_without_conditions(run, main, tmp_path):
    damaged(run, "unconditional")
    flags = ("--num-samples", 3, "--steps", 4, "--npz", "--frames", 0)
    out = main(run, *flags, "--guide", 20, "--guidance", 2, "--out", tmp_path / "a")
    assert "NFE 8 network passes per sample\n" in out
    main(run, *flags, "--out", tmp_path / "b")
    assert not np.array_equal(arrays(tmp_path / "a")[0], arrays(tmp_path / "b")[0])


def test_a_pipe_that_ends_is_no_error(run, script):
    process = script(NAME, run, "--num-samples", 2, "--steps", 1, wait=False)
    process.stdout.close()  # as `| head` does
    assert (process.stderr.read(), process.wait()) == ("", 1)


def test_the_file_says_how_it_was_made(run, main):
    out = main(run, *"--num-samples 2 --npz --solver heun --steps 5 --guidance-interval 0.5 1".split())
    assert "NFE 9 network passes per sample, 5 of them doubled by guidance" in out
    protocol = yaml.safe_load(arrays(run / "samples")[2])
    want = {"run": "run", "step": 40, "solver": "heun", "steps": 5, "nfe": 9, "num_samples": 2, "seed": 0}
    want |= {"spacing": "trailing", "guidance": 1.5, "clip_x0": "on", "weights": "ema", "bs": 2}
    assert want.items() <= protocol.items() and protocol["guidance_interval"] == [0.5, 1]
    assert protocol["rounding"] == "round(127.5 x + 127.5)"


def test_interpolation_runs_from_sample_to_sample(run, main, tmp_path):
    flags = ("--solver", "dpmpp2m", "--steps", 3, "--classes", 5, "--out", tmp_path)
    main(run, "--num-samples", 4, *flags, "--npz")
    ends = arrays(tmp_path)[0][..., 0]
    main(run, "--interpolate", 6, "--num-samples", 12, *flags)
    (file,) = tmp_path.glob("*interpolate6.png")
    sheet = np.asarray(Image.open(file).convert("L")).astype(int)  # 4 times as large, with a border of 2
    tiles = sheet[8:, 8:].reshape(-1, sheet.shape[1] - 8)
    for row, (a, b) in enumerate(((0, 1), (2, 3))):
        for column, i in ((0, a), (5, b)):
            tile = tiles[row * 72 : row * 72 + 64 : 4, column * 72 : column * 72 + 64 : 4]
            assert np.abs(tile - ends[i]).max() <= 1
    assert len(list(tmp_path.glob("*interpolate6.gif"))) == 1


def test_inverted_images_come_back(run, main):
    errors = []
    for steps in (20, 100):
        out = main(run, "--invert", "--num-samples", 20, "--steps", steps)
        errors.append(float(re.search(r"RMS error ([\d.]+) on", out)[1]))
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.05, errors
    (picture,) = (run / "samples").glob("*_ddim100_*invert.png")  # an image, its noise, and the image again
    sheet = np.asarray(Image.open(picture).convert("L")).astype(int)[8:, 8:]
    assert sheet.shape == (5 * 72, 12 * 72)
    data = common.load_dataset("digits", split="test", image_size=16)
    images, found = data.images[:, 0].numpy().astype(int), set()
    for row, column in np.ndindex(5, 4):
        tiles = [sheet[row * 72 :, (3 * column + j) * 72 :][:64:4, :64:4] for j in (0, 2)]
        i = np.abs(images - tiles[0]).max((1, 2)).argmin()
        assert np.abs(tiles[0] - images[i]).max() <= 1 and np.abs(tiles[1] - images[i]).mean() < 10
        found.add(int(data.labels[i]))
    assert len(found) > 5  # a folder's images are sorted by class
    assert "guidance 1" in out and list((run / "samples").glob("*_ddim100_*invert.png"))


def test_compare(run, main):
    out = main(run, "--compare", "--num-samples", 2)
    found = [float(x) for x in re.findall(r"RMS distance to heun 100, NFE 199: ([\d.]+)", out)]
    assert len(found) == 15 and found[-1] == 0 and "ddim 1000, NFE 1000, eta 1" in out
    assert found[4] < found[0] and found[9] < found[5] and found[13] < found[10]  # more steps, nearer
    picture = run / "samples" / "step_00000040_w1.5_seed0_numsamples2_compare.png"
    assert Image.open(picture).size == (4 * (2 * 18 + 2), 4 * (16 * 18 + 2))  # 16 rows of 2 images


# ------------------------------------------------------------------------------------------------
# Bad input


DECODE = "def decode(x, cfg):\n"
DAMAGE = {  # in a file of the run: a text and its replacement
    "no syntax": ("code/my_fork.py", "import math", "def build_model(:"),
    "no library": ("code/my_fork.py", "import math", "import nowhere_to_be_found"),
    "no contract": ("code/my_fork.py", "def path(", "def way("),
    "no null": ("code/my_fork.py", "null", "none"),  # as scripts were before there were conditions
    "own error": ("code/my_fork.py", DECODE, f"{DECODE}    common.load_dataset('?')\n"),
    "diverges": ("code/my_fork.py", DECODE, f"{DECODE}    x = x / 0\n"),
    "other weights": ("run.yaml", "hidden: 8", "hidden: 9"),
    "other flags": ("run.yaml", "hidden: 8", "obscured: 8"),
    "no yaml": ("run.yaml", "config:", "{"),
    "unconditional": ("run.yaml", "class_dropout: 0.1", "class_dropout: 1.0"),
}


def damaged(run, how):
    if how in DAMAGE:
        name, old, new = DAMAGE[how]
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))
    elif how in ("no code", "no checkpoints"):
        shutil.rmtree(run / how.split()[1])
    elif how:
        for file in (run / "checkpoints").iterdir():
            file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    "how, flags, match",
    [
        ("", "--steps 1001", "--steps is 1001; it must be from 0 to 1000"),
        ("", "--steps -1", "--steps is -1; it must be from 0 to 1000"),
        ("", "--num-samples 0", "--num-samples is 0; it must be at least 1"),
        ("", "--num-samples 1001", "--num-samples: too many for a picture"),
        ("", "--bs 0", "--bs is 0"),
        ("", "--frames -1", "--frames is -1"),
        ("", "--eta 1.5", "--eta is 1.5"),
        ("", "--eta nan", "--eta is nan"),
        ("", "--eta 1 --solver heun", "heun adds no noise"),
        ("", "--guidance -2", "--guidance is negative"),
        ("", "--guidance-interval 0.5", "--guidance-interval: expected 2 arguments"),
        ("", "--guidance-interval 0.8 0.2", "--guidance-interval must be two times"),
        ("", "--classes 3 10", "there is no class 10; there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ("", "--classes 1,7", "there is no class 1,7;"),
        (
            "",
            "--set sampling_stps=3",
            "--set sampling_stps=3.* churn=VALUE, sampling_steps=VALUE, clip_x0=VAL",
        ),
        ("", "--set lr=3", "--set lr=3.* churn=VALUE, sampling_steps=VALUE, clip_x0=VALUE"),
        ("", "--set sampling_steps=many", "argument --sampling-steps: invalid int value: 'many'"),
        ("", "--solver own --set sampling_steps=1001", "--sampling-steps .1001. must be at most"),
        (
            "",
            "--solver own --steps 3 --spacing karras --clip-x0 on",
            "--solver own has no --steps, --spacing, --clip-x0; leave it out, or use --set",
        ),
        ("", "--solver own --guidance-interval 0 0.5", "own has no --guidance-interval; leave it"),
        ("", "--solver own --interpolate 3", "--interpolate has no --solver own; use another"),
        ("", "--set sampling_steps=9 churn=0.5", "--set sampling_steps is for the .*; add --solver own"),
        ("", "--invert --num-samples 1001", "--num-samples: too many for a picture; use at most 1000"),
        ("", "--export .", "--export must be a file such as x.safetensors"),
        ("", "--export run.yaml", "--export must be a file such as x.safetensors"),
        ("", "--guide 40 --guidance 2", "--guide 40 is the checkpoint that is sampled; use an earlier one"),
        ("", "--step 30", "no checkpoint step_00000030.pt; there are step_00000020.pt, step_00000040"),
        ("", "--guide 30 --guidance 2", "no checkpoint step_00000030.pt; there are step_00000020.pt"),
        ("", "--guide 20 --guidance 1", "--guide has no effect at guidance 1"),
        ("", "--guide 20 --solver own", "--solver own has no --guide"),
        ("", "--export x --npz", "--export writes no samples"),
        ("", "--weights nowhere", "--weights nowhere is not a file of .*--export"),
        ("", "--interpolate 5 --invert", "--interpolate and --invert exclude each other"),
        ("", "--compare --npz", "--compare writes no samples"),
        ("", "--compare --solver heun", "--compare uses every solver"),
        ("", "--compare --steps 5", "--compare has its own steps"),
        ("", "--invert --eta 1", "--invert needs samplers without noise"),
        ("", "--invert --solver dpmpp2m", "--invert uses DDIM"),
        ("", "--solver euler", "invalid choice"),
        ("", "--sovler heun", "did you mean --solver"),
        ("", "--device mps", "--device mps"),
        ("", "--out FILE", "File exists: .*FILE; use another path"),
        ("", "--out FILE/folder", "Not a directory: .*FILE.*; use another path"),
        ("no code", "", "has 0 scripts"),
        ("no syntax", "", "cannot import"),
        ("no library", "", "cannot import .*nowhere_to_be_found"),
        ("no contract", "", "has no path; a script that is sampled needs Config, "),
        (
            "no null",
            "",
            "has no null; a script that is sampled needs .* null, conditions, sample_shape",
        ),
        ("other weights", "", "do not match .*(size mismatch|loading state_dict)"),
        ("other flags", "", "do not match .*obscured"),
        ("no yaml", "", "do not match"),
        ("no checkpoints", "", "has no checkpoint; run it again with --config"),
        ("damaged checkpoints", "", "cannot load"),
        ("unconditional", "--classes 1", "the run is unconditional"),
        ("unconditional", "--guidance 2", "--guidance"),
        ("own error", "", "there is no dataset"),
        ("diverges", "--num-samples 2 --steps 1", "the samples are not finite"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, main, capsys, tmp_path, how, flags, match):
    damaged(run, how)
    (tmp_path / "FILE").write_text("")
    before = names(run / "samples")
    with pytest.raises(SystemExit) as e:
        main(run, *flags.replace("FILE", str(tmp_path / "FILE")).split())
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
    assert re.search(match, text) and re.search("; | must be ", text), text  # it says what to do
    assert [p for p in names(run / "samples") if not p.endswith(".part")] == before


@pytest.mark.parametrize(
    "argv, match",
    [
        ([], "folder comes first"),
        (["--num-samples", "2", "x"], "folder comes first"),
        (["nowhere"], "is not a run"),
    ],
)
def test_no_run(main, capsys, argv, match):
    with pytest.raises(SystemExit) as e:
        main(*argv)
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1 and match in text


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["RUN", "--help"]])
def test_help(main, capsys, argv):
    with pytest.raises(SystemExit) as e:
        main(*argv)
    assert e.value.code == 0 and "--guidance-interval" in capsys.readouterr().out


def test_a_part_folder_of_other_settings_or_in_use_is_not_touched(run, main, capsys):
    flags = ("--num-samples", 2, "--steps", 1, "--npz", "--frames", 0)
    main(run, *flags)
    (file,) = (run / "samples").glob("*ddim1_*.npz")
    part = file.with_name(file.stem + ".part")
    part.mkdir()
    (part / "settings.json").write_text("{}")
    with open(part / "lock", "w") as lock:
        for message in ("was started with other settings; ", "is in use by another process; "):
            with pytest.raises(SystemExit):
                main(run, *flags)
            assert message in capsys.readouterr().err and (part / "settings.json").read_text() == "{}"
            assert common.lock(lock)


def test_a_checkpoint_that_is_named_twice(run, main, capsys, tmp_path):
    file = run / "checkpoints" / "step_00000020.pt"
    main(run, "--export", tmp_path / "x.safetensors")
    for flags in (("--step", 40), ("--weights", tmp_path / "x.safetensors")):
        with pytest.raises(SystemExit, match="2"):
            main(file, *flags)
        assert "is a checkpoint; leave out --step and --weights FILE" in capsys.readouterr().err


def test_what_a_network_draws_is_seeded_and_other_weights_are_noticed(run, main, capsys, tmp_path):
    code = run / "code" / "my_fork.py"
    noisy = "self.body(torch.cat([x, *maps], 1)) + torch.randn(1))"  # in eval(), too
    code.write_text(code.read_text().replace("self.body(torch.cat([x, *maps], 1))", f"({noisy}"))
    flags, made = ("--num-samples", 6, "--bs", 3, "--steps", 2, "--npz", "--frames", 0), []
    for seed in (0, 0, 1):
        main(run, *flags, "--out", tmp_path / str(len(made)), "--seed", seed)
        made.append(arrays(tmp_path / str(len(made)))[0])
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])
    name = "run_step_00000040_ddim2_w1.5_seed0_numsamples6"
    part = tmp_path / "0" / f"{name}.part"
    part.mkdir()
    (part / "settings.json").write_text(arrays(tmp_path / "0")[2])  # of an interrupted job
    main(run, *flags, "--out", tmp_path / "0")
    part.mkdir()
    (part / "settings.json").write_text(arrays(tmp_path / "0")[2])
    file = run / "checkpoints" / "step_00000040.pt"
    state = common.load_checkpoint(file)
    state["ema"]["body.bias"] += 1
    torch.save(state, file)
    with pytest.raises(SystemExit, match="2"):
        main(run, *flags, "--out", tmp_path / "0")
    assert "was started with other settings" in capsys.readouterr().err


def test_an_unconditional_run_labels_nothing(run, main):
    damaged(run, "unconditional")
    main(run, "--num-samples", 3, "--steps", 1, "--npz")
    assert arrays(run / "samples")[1].tolist() == [-1, -1, -1]
