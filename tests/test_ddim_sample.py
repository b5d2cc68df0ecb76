"""The sampler of runs: its solvers against diffusers and closed forms, its command line on real runs."""

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image

import common
import ddim_sample as d
import ddpm_unet_mnist as ddpm

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
    s.alphas_cumprod = ddpm.abar_table(cfg.schedule, cfg.timesteps, False, torch.device("cpu"))[1:]
    return s


def seeded(k, shape=(2, 1, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(k)), dtype=torch.float64)


def predictor(cfg, out, **flags):
    """The program's predictor around a network that says out(k) at time k / T, whatever x."""
    job = SimpleNamespace(script=ddpm, config=cfg, device="cpu")
    job.model = lambda x, t, y: out(round(t[0].item() * cfg.timesteps))[: len(x)]
    flags = replace(d.Config(clip_x0="off", guidance=1.0), **flags)
    f = d.Job.predictor(job, flags, torch.zeros(2, dtype=torch.long))
    return lambda x, t: [v.double() for v in f(x, t)]


def grid_of(cfg, steps, spacing="uniform"):
    return d.make_grid(lambda t: ddpm.path(t, cfg), steps, spacing, cfg.timesteps)


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
        # Times are float32 in the predictor, as networks take them; with clipping so are alpha and sigma.
        close(got, want.prev_sample, 1e-7 if clip == "off" else 1e-6)
        close(x0, want.pred_original_sample, 1e-7 if clip == "off" else 1e-6)
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
    cfg = ddpm.Config(width=8, mults=(1, 2), shape=(1, 8, 8), timesteps=40, guidance=2.0)
    torch.manual_seed(0)
    model = ddpm.build_model(cfg).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head[-1].weight, std=0.3)
    y = torch.arange(5)
    want, _ = ddpm.sample(model, y, cfg, torch.Generator().manual_seed(3), 40)
    g = torch.Generator().manual_seed(3)
    job = SimpleNamespace(script=ddpm, config=cfg, device="cpu", model=model)
    f = d.Job.predictor(job, d.Config(clip_x0="on", guidance=2.0), y)
    x = torch.randn(5, 1, 8, 8, generator=g)
    got = d.last(d.ddim(f, x, grid_of(cfg, 40), 1.0, lambda: torch.randn(x.shape, generator=g)))
    assert want.std() > 0.3
    torch.testing.assert_close(got.clamp(-1, 1), want, rtol=1e-4, atol=1e-4)


def test_heun_is_that_of_edm_where_alpha_is_1():
    def denoise(x, sigma):
        return torch.tanh(x / (1 + sigma**2))

    levels, x = [10.0, 3.0, 1.0, 0.2, 0.0], seeded(0) * 10
    grid = [(s / 10, 1.0, s) for s in levels]
    got = d.last(d.heun(lambda x, t: (denoise(x, 10 * t), (x - denoise(x, 10 * t)) / (10 * t)), x, grid))
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
    """f(x, t) -> (x0, eps) of a network without error."""
    m = torch.tensor(means, dtype=torch.float64)

    def f(x, t):
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
        errors.append((d.last(solver(exact(PATHS[path], *data), x, grid)) - end).abs().mean().item())
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
    grids = [d.make_grid(PATHS[path], n, "uniform") for n in counts]
    errors = [(d.last(solver(f, x, g)) - end).abs().mean().item() for g in grids]
    assert order(counts, errors) == pytest.approx(want, abs=0.15), errors
    assert errors[-1] < (0.01 if want == 1 else 1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", [d.ddim, d.heun, d.dpmpp2m])
@pytest.mark.parametrize("spacing", ["karras", "logsnr"])
def test_other_grids_reach_the_same_end(path, solver, spacing):
    x = torch.linspace(-1.9, 2.1, 8, dtype=torch.float64)
    grid = d.make_grid(PATHS[path], 100, spacing)
    start = math.hypot(*grid[0][1:]) * x
    got = d.last(solver(exact(PATHS[path], *TWO_MODES), start, grid))
    torch.testing.assert_close(got, transported(x, *TWO_MODES), rtol=0, atol=0.05)


@pytest.mark.parametrize("path", PATHS)
def test_inversion_returns_the_image_and_its_noise(path):
    """To first order: half the error at twice the steps."""
    noise, errors = torch.linspace(-1.9, 2.1, 8, dtype=torch.float64), []
    image, f = transported(noise, *TWO_MODES), exact(PATHS[path], *TWO_MODES)
    for n in (250, 500, 1000):
        grid = d.make_grid(PATHS[path], n, "uniform")
        up = d.last(d.invert(f, image, grid, 1e-4))
        errors.append([(up - noise).abs().max(), (d.last(d.ddim(f, up, grid)) - image).abs().max()])
    errors = torch.tensor(errors)
    assert errors[-1].max() < 0.02 and (errors[1:] < 0.6 * errors[:-1]).all(), errors


def test_evaluations_and_what_samplers_yield():
    for solver, nfe in ((d.ddim, 7), (d.dpmpp2m, 7), (d.heun, 13)):
        f, times = exact(PATHS["straight"], *GAUSSIAN), []
        grid, x = d.make_grid(PATHS["straight"], 7, "uniform"), torch.ones(3, dtype=torch.float64)
        steps = list(solver(lambda x, t, f=f, times=times: times.append(t) or f(x, t), x, grid))
        assert len(times) == nfe and min(times) > 0 and len(steps) == 7
        torch.testing.assert_close(steps[0][1], f(x, 1.0)[0])  # the first estimate
        torch.testing.assert_close(steps[-1][0], steps[-1][1])  # at t = 0, x is its estimate


def test_ddim_on_the_straight_path_is_euler():
    f, grid = exact(PATHS["straight"], *TWO_MODES), d.make_grid(PATHS["straight"], 9, "uniform")
    x = want = torch.linspace(-2, 2, 5, dtype=torch.float64)
    for (t, *_), (s, *_) in zip(grid, grid[1:], strict=False):
        x0, eps = f(want, t)
        want = want + (s - t) * (eps - x0)
    torch.testing.assert_close(d.last(d.ddim(f, x, grid)), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spacing", ["uniform", "karras", "logsnr"])
@pytest.mark.parametrize("steps", [1, 2, 5, 50, 990, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine", None])
def test_grids_fall_strictly_over_trained_times(spacing, steps, schedule):
    cfg = ddpm.Config(schedule=schedule) if schedule else None
    grid = grid_of(cfg, steps, spacing) if cfg else d.make_grid(PATHS["straight"], steps, spacing)
    t = np.array([t for t, *_ in grid])
    assert len(t) == steps + 1 and t[0] <= 1 and grid[-1] == (0, 1, 0) and (np.diff(t) < 0).all()
    if cfg:
        assert np.array_equal((t * 1000).round() / 1000, t)
    want = ddpm.path(torch.tensor(t), cfg) if cfg else PATHS["straight"](torch.tensor(t))
    assert torch.equal(torch.tensor(grid, dtype=torch.float64)[:, 1:].T, torch.stack(want))
    if spacing == "uniform":
        assert t == pytest.approx(np.linspace(1, 0, steps + 1), abs=6e-4)
    elif steps == 50 and schedule != "cosine":
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


def test_dynamic_thresholding():
    """The top half percent is cut and the rest scaled into [-1, 1], image by image; eps follows x0."""
    cfg = ddpm.Config(objective="x0", class_dropout=1.0)
    big = (
        torch.stack([torch.linspace(-3, 3, 400), torch.linspace(-0.5, 0.5, 400)]).view(2, 1, 20, 20).double()
    )
    x, t = seeded(1, (2, 1, 20, 20)), 0.5
    x0, eps = predictor(cfg, lambda k: big, clip_x0="dynamic")(x, t)
    top = big[0].abs().flatten().quantile(0.995)
    torch.testing.assert_close(x0[0], (big[0] / top).clamp(-1, 1))
    assert torch.equal(x0[1], big[1])
    alpha, sigma = ddpm.path(torch.tensor([t]).double(), cfg)
    torch.testing.assert_close(alpha * x0 + sigma * eps, x, rtol=1e-5, atol=1e-6)


def test_guidance_acts_in_its_interval():
    cfg, seen = ddpm.Config(), []
    script = SimpleNamespace(predict=lambda m, x, t, y, c, w: seen.append(w) or (x, x))
    job = SimpleNamespace(script=script, config=cfg, device="cpu", model=None)
    flags = d.Config(clip_x0="off", guidance=3.0, guidance_interval=(0.2, 0.6))
    f = d.Job.predictor(job, flags, torch.zeros(1))
    for t in (1.0, 0.7, 0.6, 0.3, 0.2, 0.1):
        f(torch.zeros(1, 1, 2, 2), t)
    assert seen == [1, 1, 3, 3, 3, 1]


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
        self.label, self.body = nn.Embedding(cfg.num_classes + 1, 1), nn.Conv2d(3, cfg.hidden, 3, padding=1)
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
    text = Path(ddpm.__file__).read_text().replace("def build_model(cfg):\n    return UNet(cfg)\n", FORK)
    text = text.replace("    width: int", "    hidden: int = 8  # channels\n    width: int", 1)
    (home / "my_fork.py").write_text(text)
    run = train(home, "my_fork.py", "--steps", 40, "--save-every", 20, "--lr", 0.02, "--warmup", 0)
    (home / "my_fork.py").unlink()
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs the program in this process, which it leaves as it was; -> what it printed."""

    def main(*argv):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, "common", common)
            m.setattr(sys, "path", list(sys.path))
            m.setattr(sys, "dont_write_bytecode", False)
            with common.one_line_errors():
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
    assert "NFE 4, and 4 with the null class" in out and f"wrote {run}/samples/{name}.png" in out
    made = [p for p in names(run / "samples") if p.startswith(name)]
    assert made == [f"{name}.png", f"{name}_x0.gif", f"{name}_xt.gif"]
    assert Image.open(run / "samples" / f"{name}_x0.gif").n_frames == 4
    assert Image.open(run / "samples" / f"{name}_xt.gif").n_frames == 5
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


def test_a_run_of_the_first_script(main, script, tmp_path):
    p = script("ddpm_unet_mnist.py", *TINY, "--dataset", "digits", "--steps", 2, "--eval-every", 0)
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


def predict(model, x, t, y, cfg, guidance=1.0):
    v, t = model(x, t, y), t.view(-1, 1, 1, 1)
    return x - t * v, x + (1 - t) * v


def sample_shape(cfg):
    return 2, 4, 4


def decode(x, cfg):
    return x[:, [0, 1, 0]].repeat_interleave(4, 2).repeat_interleave(4, 3) * cfg.gain
"""


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp2m"])
@pytest.mark.parametrize("spacing", ["uniform", "karras"])
def test_a_latent_run_on_the_straight_path(main, tmp_path, solver, spacing):
    """A foreign script with the contract alone; dx/dt = w x maps noise to exp(-w) of itself."""
    run, w = tmp_path / "run", 0.7
    for sub in ("code", "checkpoints"):
        (run / sub).mkdir(parents=True)
    (run / "code" / "flow.py").write_text(LATENT)
    (run / "run.yaml").write_text("config: {gain: 0.5}")
    state = {"model": {"w": torch.zeros(1)}, "ema": {"w": torch.full((1,), w)}}
    torch.save(state | {"optimizer": {}, "step": 5, "config": {}}, run / "checkpoints" / "step_00000005.pt")
    main(run, "--num-samples", 5, "--solver", solver, "--spacing", spacing, "--steps", 300, "--npz", "--png")
    images, y, _ = arrays(run / "samples")
    assert images.shape == (5, 16, 16, 3) and y.tolist() == [0] * 5
    noise = torch.stack(
        [
            torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(common.seed_of(0, "sample", i)))
            for i in range(5)
        ]
    )
    want = noise[:, [0, 1, 0]].repeat_interleave(4, 2).repeat_interleave(4, 3) * math.exp(-w) * 0.5
    want = (want * 127.5 + 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - want).max() < (0.6 if spacing == "uniform" else 1.1)
    scale = ((images - 127.5) * (want - 127.5)).sum() / ((want - 127.5) ** 2).sum()
    assert scale == pytest.approx(
        1, abs=0.02 if solver == "ddim" else 0.005
    )  # a start below t = 1 has its own variance
    (folder,) = [p for p in (run / "samples").iterdir() if p.is_dir()]
    assert names(folder) == [f"{i:06}.png" for i in range(5)]
    assert np.array_equal(np.asarray(Image.open(folder / "000003.png")), images[3])


def test_a_sample_depends_on_seed_and_number_alone(run, main, tmp_path):
    flags, out = ("--steps", 3, "--eta", 0.7, "--npz", "--frames", 0), []
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
        *["--clip-x0 dynamic", "--step 20", "--classes 3", "--seed 2"],
    ],
)
def test_each_flag_changes_the_samples_and_the_name(run, main, tmp_path, flags):
    common_flags = ("--num-samples", 4, "--npz", "--frames", 0, "--guidance", 2, "--steps", 4)
    main(run, *common_flags, "--out", tmp_path / "a")
    main(run, *common_flags, *flags.split(), "--out", tmp_path / "b")
    assert not np.array_equal(arrays(tmp_path / "a")[0], arrays(tmp_path / "b")[0])
    assert names(tmp_path / "a")[0] != names(tmp_path / "b")[0]


@pytest.mark.parametrize("classes", [["0,1,7"], ["0", "1", "7"]])
def test_classes(run, main, classes):
    main(run, "--num-samples", 7, "--npz", "--steps", 1, "--classes", *classes)
    assert arrays(run / "samples")[1].tolist() == [0, 1, 7, 0, 1, 7, 0]


def test_an_interrupted_job_goes_on(run, main, monkeypatch, tmp_path):
    """Stopped in its fifth batch, when the last sample of the fourth has reached the disk in part."""
    flags = ("--num-samples", 150, "--bs", 30, "--npz", "--steps", 2, "--frames", 2)
    main(run, *flags, "--out", tmp_path / "whole")
    solve, seen = d.Job.solve, []

    def counted(*args):
        seen.append(len(args[1]))
        if len(seen) == 5:
            raise KeyboardInterrupt
        return solve(*args)

    monkeypatch.setattr(d.Job, "solve", counted)
    with pytest.raises(KeyboardInterrupt):
        main(run, *flags, "--out", tmp_path / "out")
    (part,) = (tmp_path / "out").glob("*.part")
    os.truncate(part, part.stat().st_size - 100)
    assert not list((tmp_path / "out").glob("*.npz")) and len(list((tmp_path / "out").glob("*.gif"))) == 2
    seen.extend([0] * 5)
    out = main(run, *flags, "--out", tmp_path / "out")
    assert "going on after 119 samples" in out and seen[10:] == [30, 1]
    whole, again = arrays(tmp_path / "whole"), arrays(tmp_path / "out")
    assert np.abs(whole[0].astype(int) - again[0]).max() <= 1 and whole[1:][1] == again[1:][1]
    assert names(tmp_path / "whole") == names(tmp_path / "out") and np.array_equal(whole[1], again[1])


def test_stopped_among_the_first_it_starts_anew(run, main, monkeypatch):
    """The pictures are made of the first 100 samples, which must pass in one go."""
    flags, draw = ("--num-samples", 120, "--bs", 40, "--npz", "--steps", 1), d.Job.draw
    monkeypatch.setattr(d.Job, "draw", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(run, *flags)
    monkeypatch.setattr(d.Job, "draw", draw)
    out = main(run, *flags)
    assert "going on" not in out and arrays(run / "samples")[0].shape == (120, 16, 16, 1)
    assert len(list((run / "samples").glob("*_steps*"))) == 0 and not list((run / "samples").glob("*.part"))
    assert len(list((run / "samples").glob("step_00000040_ddim1_*.gif"))) == 2


def test_the_file_says_how_it_was_made(run, main):
    main(run, "--num-samples", 2, "--npz", "--solver", "heun", "--steps", 5, "--guidance-interval", 0.5, 1)
    protocol = yaml.safe_load(arrays(run / "samples")[2])
    want = {
        "run": "run",
        "step": 40,
        "solver": "heun",
        "nfe": 9,
        "nfe_null_class": 5,
        "num_samples": 2,
        "seed": 0,
    }
    assert want.items() <= protocol.items() and protocol["guidance_interval"] == [0.5, 1]
    assert protocol["weights"] == "ema" and protocol["rounding"] and protocol["shape"] == [16, 16, 1]


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
    assert len(list(tmp_path.glob("*interpolate6_x0.gif"))) == 1


def test_inverted_images_come_back(run, main):
    errors = []
    for steps in (20, 100):
        out = main(run, "--invert", "--num-samples", 20, "--steps", steps)
        errors.append(float(re.search(r"RMS error ([\d.]+) on", out)[1]))
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.05, errors
    assert "guidance 1" in out and list((run / "samples").glob("*_ddim100_*invert.png"))


def test_compare(run, main):
    out = main(run, "--compare", "--num-samples", 2)
    found = [float(x) for x in re.findall(r"RMS distance to heun 100, NFE 199: ([\d.]+)", out)]
    assert len(found) == 15 and found[-1] == 0 and "ddim 1000, NFE 1000, eta 1" in out
    assert found[4] < found[0] and found[9] < found[5] and found[13] < found[10]  # more steps, nearer
    assert Image.open(run / "samples" / "step_00000040_w1.5_seed0_numsamples2_compare.png").size == (
        288,
        16 * 64,
    )


# ------------------------------------------------------------------------------------------------
# Bad input


def damaged(run, how):
    if how == "no code":
        shutil.rmtree(run / "code")
    elif how == "no syntax":
        (run / "code" / "my_fork.py").write_text("def build_model(:")
    elif how == "no library":
        (run / "code" / "my_fork.py").write_text("import nowhere_to_be_found as build_model")
    elif how == "no contract":
        (run / "code" / "my_fork.py").write_text("def build_model(cfg): pass")
    elif how == "other weights":
        text = (run / "run.yaml").read_text()
        (run / "run.yaml").write_text(text.replace("hidden: 8", "hidden: 9"))
    elif how == "other flags":
        text = (run / "run.yaml").read_text()
        (run / "run.yaml").write_text(text.replace("hidden: 8", "obscured: 8"))
    elif how == "no yaml":
        (run / "run.yaml").write_text("{")
    elif how == "no checkpoint":
        shutil.rmtree(run / "checkpoints")
    elif how == "damaged checkpoints":
        for file in (run / "checkpoints").iterdir():
            file.write_bytes(file.read_bytes()[:1000])
    elif how == "unconditional":
        text = (run / "run.yaml").read_text()
        (run / "run.yaml").write_text(text.replace("class_dropout: 0.1", "class_dropout: 1.0"))
    elif how == "own error":
        file = run / "code" / "my_fork.py"
        text = file.read_text().replace(
            "def decode(x, cfg):", "def decode(x, cfg):\n    common.load_dataset('?')"
        )
        file.write_text(text)
    elif how == "diverges":
        file = run / "code" / "my_fork.py"
        file.write_text(file.read_text().replace("def decode(x, cfg):", "def decode(x, cfg):\n    x = x / 0"))


@pytest.mark.parametrize(
    "how, flags, match",
    [
        ("", "--steps 1001", "--steps is 1001, but the run has only 1000 times"),
        ("", "--steps -1", "--steps is -1; give 0"),
        ("", "--num-samples 0", "--num-samples is 0; give 1"),
        ("", "--num-samples 1001", "--num-samples: no picture holds"),
        ("", "--bs 0", "--bs is 0"),
        ("", "--eta 1.5", "--eta is 1.5"),
        ("", "--eta nan", "--eta is nan"),
        ("", "--eta 1 --solver heun", "heun adds no noise"),
        ("", "--guidance -2", "--guidance is negative"),
        ("", "--guidance-interval 0.5", "--guidance-interval takes two"),
        ("", "--guidance-interval 0.8 0.2", "--guidance-interval takes two"),
        ("", "--classes 3 10", "--classes is 3 10; give some of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ("", "--classes seven", "--classes is seven"),
        ("", "--step 30", "--step 30 is not among .* there are 20, 40"),
        ("", "--interpolate 1", "--interpolate is 1"),
        ("", "--interpolate 5 --invert", "--interpolate and --invert contradict"),
        ("", "--compare --npz", "--compare only draws"),
        ("", "--compare --solver heun", "--compare takes every solver"),
        ("", "--compare --steps 5", "--compare has steps"),
        ("", "--invert --eta 1", "--invert needs samplers without noise"),
        ("", "--invert --solver dpmpp2m", "--invert is done by DDIM"),
        ("", "--solver euler", "invalid choice"),
        ("", "--sovler heun", "did you mean --solver"),
        ("", "--device mps", "--device mps"),
        ("", "--out FILE", "--out .* a file is there"),
        ("", "--out FILE/folder", "--out .* a file is there"),
        ("no code", "", "holds 0 scripts"),
        ("no syntax", "", "cannot be imported"),
        ("no library", "", "cannot be imported .*nowhere_to_be_found"),
        ("no contract", "", "has no Config, path, predict"),
        ("other weights", "", "do not fit together .*size mismatch|do not fit together .*loading state_dict"),
        ("other flags", "", "do not fit together .*obscured"),
        ("no yaml", "", "do not fit together"),
        ("no checkpoint", "", "has no checkpoint; wait for its first, or run it again with --config"),
        ("damaged checkpoints", "", "cannot be loaded"),
        ("unconditional", "--classes 1", "the run is unconditional"),
        ("unconditional", "--guidance 2", "the run is unconditional"),
        ("own error", "", "there is no dataset"),
        ("diverges", "--num-samples 2 --steps 1", "not finite"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, main, capsys, tmp_path, how, flags, match):
    damaged(run, how)
    (tmp_path / "FILE").write_text("")
    before = names(run / "samples")
    with pytest.raises(SystemExit) as e:
        main(run, *flags.replace("FILE", str(tmp_path / "FILE")).split())
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1 and "; " in text, text
    assert re.search(match, text), text
    assert [p for p in names(run / "samples") if not p.endswith(".part")] == before


@pytest.mark.parametrize("argv, match", [([], "the run's folder comes first"), (["nowhere"], "is no run")])
def test_no_run(main, capsys, argv, match):
    with pytest.raises(SystemExit) as e:
        main(*argv)
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1 and match in text


def test_a_part_file_of_other_settings_is_not_touched(run, main, capsys):
    main(run, "--num-samples", 2, "--steps", 1, "--npz", "--frames", 0)
    (file,) = (run / "samples").glob("*ddim1_*.npz")
    part = file.with_name(file.stem + ".part")
    part.write_bytes(b"{}\nprecious")
    with pytest.raises(SystemExit):
        main(run, "--num-samples", 2, "--steps", 1, "--npz", "--frames", 0)
    assert "is of a job with other settings; " in capsys.readouterr().err
    assert part.read_bytes() == b"{}\nprecious"


def test_an_unconditional_run_labels_nothing(run, main):
    damaged(run, "unconditional")
    main(run, "--num-samples", 3, "--steps", 1, "--npz")
    assert arrays(run / "samples")[1].tolist() == [-1, -1, -1]
