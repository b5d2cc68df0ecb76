"""The first script: its model, method and sampler against oracles, and its runs as a user makes them."""

import fcntl
import functools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY, assert_a_bad_step_changes_nothing
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from PIL import Image
from test_ddim_sample import main  # noqa: F401
from test_faults import same, weights

import common
import ddpm_unet_mnist as ddpm
from ddpm_unet_mnist import Config

NAME = "ddpm_unet_mnist.py"

# ------------------------------------------------------------------------------------------------
# Model


@pytest.mark.parametrize("backbone", ["unet", "resunet"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"shape": (3, 32, 32), "attention": (16, 8), "blocks": 2, "classes": ("a", "b", "c")},
        {"shape": (1, 16, 16), "mults": (1,), "attention": (16,), "dropout": 0.1},
        {"shape": (1, 28, 28), "mults": (1, 2, 3), "grad_checkpoint": True},
    ],
)
def test_shapes_and_gradients(backbone, more):
    cfg = replace(Config(backbone=backbone, width=8), **more)
    ddpm.check(cfg)
    model = ddpm.build_model(cfg)
    x, t, y = torch.randn(3, *cfg.shape), torch.rand(3), torch.tensor([0, 1, len(cfg.classes)])
    assert torch.equal(model(x, t, y), torch.zeros_like(x))  # zero-initialised head
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.eval()
    out = model(x, t, y)
    assert out.shape == x.shape
    for other in (model(x, 1 - t, y), model(x, t, y.flip(0)), model(x.flip(-1), t, y)):
        assert not torch.allclose(out, other)  # time, class and image all matter
    torch.testing.assert_close(model(x[1:], t[1:], y[1:]), out[1:])  # samples do not see each other
    model.train()
    assert torch.equal(model(x, t, y), model(x, t, y)) == (cfg.dropout == 0)
    model(x, t, y).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_grad_checkpoint_changes_memory_alone():
    cfg = Config(width=8, mults=(1, 2))
    grads, passes = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = ddpm.build_model(replace(cfg, grad_checkpoint=recompute))
        for m in model.modules():
            m.register_forward_pre_hook(lambda *_, recompute=recompute: passes.append(recompute))
        torch.nn.init.normal_(model.head[-1].weight)
        torch.manual_seed(1)
        model(torch.randn(2, 1, 28, 28), torch.rand(2), torch.tensor([0, 1])).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)
    assert passes.count(True) > 1.5 * passes.count(False)


# ------------------------------------------------------------------------------------------------
# Method and sampler against diffusers and closed forms


def scheduler(cfg, **more):
    """diffusers' DDPM with our configuration, its tables recomputed in float64."""
    kind = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[cfg.objective]
    names = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    s = DDPMScheduler(
        cfg.timesteps,
        beta_schedule=names[cfg.schedule],
        prediction_type=kind,
        clip_sample=cfg.clip_x0,
        **more,
    )
    if cfg.schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, cfg.timesteps, dtype=torch.float64)
    else:
        betas = betas_for_alpha_bar(cfg.timesteps).double()  # float32 inside: good to 1e-7
    s.betas, s.alphas = betas, 1 - betas
    s.alphas_cumprod = torch.cumprod(s.alphas, 0)
    s.one = torch.ones((), dtype=torch.float64)
    return s


@pytest.mark.parametrize("channels, heads", [(32, 1), (128, 2), (200, 2), (224, 2), (320, 5)])
def test_heads_divide_the_channels(channels, heads):
    attention = ddpm.Attention(channels)
    assert attention.heads == heads and attention(torch.zeros(1, channels, 2, 2)).shape == (1, channels, 2, 2)


def test_upsample_is_that_of_pytorch_and_stays_channels_last():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert torch.equal(ddpm.upsample(x), torch.nn.functional.interpolate(x, scale_factor=2.0))
    assert ddpm.upsample(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_is_that_of_diffusers(schedule):
    cfg = Config(schedule=schedule)
    theirs = scheduler(cfg).alphas_cumprod
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma = ddpm.path(t, cfg)
    torch.testing.assert_close(alpha, theirs.sqrt(), rtol=1e-12 if schedule == "linear" else 1e-4, atol=1e-7)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(ddpm.path(t.float(), cfg)[0], alpha.float())  # of times that are not exact
    zero = torch.zeros(1, dtype=torch.float64)
    assert [v.item() for v in ddpm.path(zero, cfg)] == [1, 0]  # t = 0 is data
    if schedule == "linear":  # whatever T is, t = 1 is the same noise
        for T in (2, 10, 50):
            end = ddpm.path(zero + 1, replace(cfg, timesteps=T))[0].item()
            assert end == pytest.approx(alpha[-1].item(), rel=0.03), T


@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("clip", [False, True])
def test_ancestral_steps_are_those_of_diffusers(objective, schedule, clip):
    cfg = Config(objective=objective, schedule=schedule, clip_x0=clip, class_dropout=1.0)
    theirs = scheduler(cfg)
    ours = theirs.alphas_cumprod
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in [*range(1000, 0, -37), 2, 1]:
        out = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(k))
        want = theirs.step(out, k - 1, x, generator=torch.Generator().manual_seed(7)).prev_sample
        t, s = (torch.full((2,), j / 1000, dtype=torch.float64) for j in (k, k - 1))
        x0, _ = ddpm.predict(lambda *_, out=out: out, x, t, torch.zeros(2, dtype=torch.long), cfg)
        x0 = x0.clamp(-1, 1) if clip else x0
        noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7))
        got = ddpm.ancestral_step(x, x0, t, s, noise, cfg)
        exact = schedule == "linear"  # diffusers' cosine table is float32
        tolerance = {"rtol": 1e-10, "atol": 1e-10} if exact else {"rtol": 2e-3, "atol": 2e-3}
        if exact or objective != "eps" or k < 990:  # 1 / alpha is 1e4 where the cosine ends
            torch.testing.assert_close(got, want, **tolerance)
        x = want if clip else x
    assert len(ours) == 1000


@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
def test_conversions_are_exact_and_agree(objective):
    x0, eps = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64).unbind(0)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in ddpm.path(torch.rand(5, dtype=torch.float64), Config()))
    out = {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0}[objective]
    got = ddpm.to_x0_eps(out, alpha * x0 + sigma * eps, alpha, sigma, objective)
    torch.testing.assert_close(got, (x0, eps), rtol=1e-9, atol=1e-9)


def test_guidance():
    """w = 1 is the conditional model, w = 0 the null class, 2 the extrapolation; all in one batched call."""
    calls = []

    def model(x, t, y):
        calls.append(len(x))
        return x * 0 + y.view(-1, 1, 1, 1).float()

    cfg = Config(objective="x0")
    x, t, y = torch.randn(4, 1, 2, 2), torch.full((4,), 0.5), torch.full((4,), 3)
    for w, want in ((1.0, 3.0), (0.0, 10.0), (2.0, -4.0)):
        x0, eps = ddpm.predict(model, x, t, y, cfg, w)
        assert x0.unique().item() == pytest.approx(want)
        alpha, sigma = ddpm.path(t, cfg)
        torch.testing.assert_close(alpha[0] * x0 + sigma[0] * eps, x)
    assert calls == [4, 8, 8]
    unconditional = replace(cfg, class_dropout=1.0)
    assert ddpm.predict(model, x, t, y, unconditional, 2.0)[0].unique().item() == 10


@pytest.mark.parametrize("objective, steps", [("eps", 1000), ("v", 1000), ("x0", 250)])
def test_sampler_returns_the_mean_and_covariance_of_a_gaussian(objective, steps):
    """Data N(m, S): E[x0 | x_t] = m + alpha S C^-1 (x - alpha m) with C = alpha^2 S + sigma^2 I."""
    m, S = torch.tensor([0.4, -0.2]), torch.tensor([[0.09, 0.04], [0.04, 0.05]])
    cfg = Config(objective=objective, shape=(1, 1, 2), clip_x0=False, guidance=1.0, sampling_steps=steps)

    def model(x, t, y):
        (a,), (s,) = (c[:1] for c in ddpm.path(t, cfg))
        gain = a * S @ torch.linalg.inv(a**2 * S + s**2 * torch.eye(2))
        x0 = m + (x.flatten(1) - a * m) @ gain.T
        x0 = x0.view_as(x)
        eps = (x - a * x0) / s
        return {"eps": eps, "v": a * eps - s * x0, "x0": x0}[objective]

    n, generator = 20_000, torch.Generator().manual_seed(0)
    noise = functools.partial(torch.randn, n, 1, 1, 2, generator=generator)
    x, trajectory = ddpm.sample(model, noise(), torch.zeros(n, dtype=torch.long), cfg, noise)
    x = x.flatten(1)
    assert 23 <= len(trajectory) <= 25
    torch.testing.assert_close(x.mean(0), m, rtol=0, atol=0.008)
    # The posterior's variance is that of a single data point (Ho et al. 2020, sec. 3.2): a bias of 1 / steps.
    torch.testing.assert_close(torch.cov(x.T), S, rtol=60 / steps, atol=0.001)


def test_clipping_keeps_estimates_in_range():
    cfg = Config(guidance=1.0, objective="x0", timesteps=20, sampling_steps=20)
    x, y = torch.randn(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    for clip, top in ((True, 1.0), (False, 3.0)):
        x0, trajectory = ddpm.sample(lambda x, t, y: x * 0 + 3, x, y, replace(cfg, clip_x0=clip))
        assert [v.max().item() for v in (*trajectory, x0)] == [top] * 21


def test_times():
    """Each in its own part of the batch; of all timesteps, 1 to T, one is as frequent as another."""
    for T, n in ((1000, 48), (7, 7), (3, 5000)):
        for u in (torch.zeros(n), torch.rand(n), torch.ones(n) - 2**-24):
            k = ddpm.sample_t(u, Config(timesteps=T)) * T
            torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-3)
            share = (k.round() - torch.arange(n) * T / n) / (T / n)  # rounded up to whole timesteps
            assert share.min() >= 0 and share.max() <= 1 + n / T + 1e-3
            assert k.min() > 0.5 and k.max() < T + 0.5
    counts = torch.cat([ddpm.sample_t(torch.rand(48), Config()) for _ in range(2000)]).mul(1000).round()
    counts = counts.long().bincount(minlength=1001)[1:].float()
    assert counts.mean() == 96 and (counts - 96).square().mean() < 1.3 * 96  # of independent ones, 96


# ------------------------------------------------------------------------------------------------
# Optimizer


def test_newton_schulz():
    for rows, columns in ((16, 16), (12, 90), (40, 24)):
        u, _, vh = torch.linalg.svd(torch.randn(3, rows, columns), full_matrices=False)
        x = ddpm.newton_schulz(u * torch.linspace(0.05, 1, u.shape[-1]) @ vh)  # a known, wide spectrum
        spectrum = u.mT @ x @ vh.mT  # diagonal, as the singular vectors stay
        diagonal = spectrum.diagonal(dim1=1, dim2=2)
        assert 0.72 < diagonal.min() and diagonal.max() < 1.28
        assert (spectrum - torch.diag_embed(diagonal)).abs().max() < 1e-3
    one = torch.randn(1, 64, 1) @ torch.randn(1, 1, 64)  # its singular value is the norm
    assert 0.7 < torch.linalg.matrix_norm(ddpm.newton_schulz(one), 2) < 1.3
    assert torch.equal(ddpm.newton_schulz(torch.zeros(1, 4, 8)), torch.zeros(1, 4, 8))


def test_muon_is_that_of_pytorch(monkeypatch):
    """Of kernels as matrices, but for how far each makes them orthogonal: here, both go all the way."""

    def exact(g):
        u, _, vh = torch.linalg.svd(g.float(), full_matrices=False)
        return u @ vh

    monkeypatch.setattr(ddpm, "newton_schulz", exact)
    shapes = [(16, 8, 3, 3), (8, 16, 3, 3), (16, 8, 3, 3)]
    ours = [torch.randn(s).contiguous(memory_format=torch.channels_last).requires_grad_() for s in shapes]
    theirs = [p.detach().flatten(1).clone().requires_grad_() for p in ours]
    mine = ddpm.Muon([{"params": ours, "momentum": 0.95, "weight_decay": 0.1}], lr=0.02, fused=True)
    mine.found_inf = torch.zeros(())
    converging = {"ns_coefficients": (15 / 8, -10 / 8, 3 / 8), "ns_steps": 40}
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, **converging)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.flatten(1)
        mine.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.flatten(1), q, rtol=0, atol=1e-3)  # theirs is in bfloat16


def test_a_bad_step_changes_nothing_and_kernels_have_muon():
    cfg = Config(width=8, attention=(14,))
    model = ddpm.build_model(cfg)
    optimizer = ddpm.make_optimizer(model, cfg)
    assert_a_bad_step_changes_nothing(model, optimizer)
    kernels = {id(p) for p in optimizer.param_groups[0]["params"]}
    blocks = [m for m in model.modules() if isinstance(m, ddpm.ResBlock)]
    assert kernels == {id(c.weight) for b in blocks for c in (b.conv1, b.conv2)} and len(blocks) == 7


# ------------------------------------------------------------------------------------------------
# Training, in this process


def train(tmp_path, monkeypatch, *flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_LOGS", str(tmp_path / "logs"))
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with monkeypatch.context() as m:
        m.setattr("sys.stdout", os.sys.stdout)
        m.setattr("sys.stderr", os.sys.stderr)
        try:
            with common.exit_on_user_error():
                start = [] if {"--resume", "--config"} & {*flags} else [*TINY, "--dataset", "digits"]
                ddpm.train(common.parse(Config, ddpm.__doc__, [*start, *map(str, flags)]))
        finally:
            for s, h in handlers.items():
                signal.signal(s, h)
    return newest_run(tmp_path)


def newest_run(tmp_path):
    return max((tmp_path / "logs" / "ddpm").iterdir(), key=lambda p: p.stat().st_mtime_ns)


def lines(run, name="loss"):
    return [json.loads(x) for x in (run / "metrics" / f"{name}.jsonl").read_text().splitlines()]


def test_overfits_sixteen_images(tmp_path, monkeypatch):
    data = common.load_dataset("digits", image_size=16)
    for i in range(16):
        file = tmp_path / "few" / str(i % 10) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.images[i, 0].numpy()).save(file)
    flags = ["--dataset", tmp_path / "few", "--steps", 500, "--width", 16, "--lr", 4e-3, "--bs", 32]
    run = train(tmp_path, monkeypatch, *flags, "--eval-every", 0)
    state = common.newest_checkpoint(run)
    cfg = Config(width=16, mults=(1, 2), shape=(1, 16, 16), guidance=1.0, sampling_steps=100)
    model = ddpm.build_model(cfg)
    model.load_state_dict(state["ema"])
    torch.manual_seed(0)
    images, _ = ddpm.sample(model.eval(), torch.randn(20, *cfg.shape), torch.arange(20) % 10, cfg)
    targets = data.images[:16].float() / 127.5 - 1
    error = torch.cdist(images.flatten(1), targets.flatten(1)).square() / 256
    nearest = error.min(1)
    assert nearest.values.median() < 0.06, nearest  # the mean square of a digit is about 0.8
    assert (nearest.indices % 10 == torch.arange(20) % 10).float().mean() >= 0.9  # and of the class asked for


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch):
    original, calls = ddpm.loss_per_sample, []

    def sabotaged(*args):
        calls.append(1) if torch.is_grad_enabled() else None  # not those of evaluation
        return original(*args) * (float("nan") if len(calls) - 1 in (3, 4, 8) else 1)  # a trial, then steps

    monkeypatch.setattr(ddpm, "loss_per_sample", sabotaged)
    run = train(tmp_path, monkeypatch, "--steps", 10, "--log-every", 5, "--eval-every", 0)
    assert [x["step"] for x in lines(run) if x.get("skipped")] == [3, 4, 8]
    assert [x["step"] for x in lines(run)] == list(range(1, 11))
    state = common.newest_checkpoint(run)
    assert all(v.isfinite().all() for v in [*state["model"].values(), *state["ema"].values()])
    moments = state["optimizer"]["state"].values()
    adamw, muon = ([x for x in moments if kind in x] for kind in ("exp_avg", "momentum"))
    assert state["skipped"] == 3 and muon and {int(x["step"]) for x in adamw} == {7}
    assert all(x["exp_avg_sq"].isfinite().all() for x in adamw)
    assert all(x["momentum"].isfinite().all() for x in muon)
    monkeypatch.setattr(ddpm, "loss_per_sample", original)
    run = train(tmp_path, monkeypatch, "--resume", run, "--steps", 11)
    assert common.newest_checkpoint(run)["skipped"] == 3


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        ddpm,
        "loss_per_sample",
        lambda model, x0, y, t, eps, cfg: model(x0, t, y).mean((1, 2, 3)) * float("inf"),
    )
    with pytest.raises(
        SystemExit, match="error: loss or gradient not finite in ten steps in a row, up to step 10; try"
    ):
        train(tmp_path, monkeypatch, "--steps", 50, "--log-every", 20)  # the tenth is among twenty unread
    run = newest_run(tmp_path)
    assert len(lines(run)) == 10 and all(x["skipped"] and x["loss"] is None for x in lines(run))
    assert "step 1  loss nan " in capsys.readouterr().out


def test_a_parameter_without_gradient_is_named(tmp_path, monkeypatch):
    build = ddpm.build_model

    def with_dead_weight(cfg):
        model = build(cfg)
        model.forgotten = torch.nn.Linear(2, 2)
        return model

    monkeypatch.setattr(ddpm, "build_model", with_dead_weight)
    with pytest.raises(RuntimeError, match="no gradient reaches forgotten.weight"):
        train(tmp_path, monkeypatch, "--steps", 2)


def test_the_loop_reads_the_device_only_to_log(tmp_path, monkeypatch):
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, original=original, name=name):
            reads.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    counts = []
    for steps in (20, 40):
        reads.clear()
        train(
            tmp_path, monkeypatch, "--steps", steps, "--log-every", 1000, "--eval-every", 0, "--grad-clip", 1
        )
        counts.append(len(reads))
    assert counts[0] == counts[1], reads


def test_minutes_end_a_run_annealed(tmp_path, monkeypatch, capsys):
    run = train(tmp_path, monkeypatch, "--minutes", 0.05, "--log-every", 1, "--eval-every", 0, "--warmup", 0)
    log = lines(run)
    assert 3 <= log[-1]["seconds"] < 4 and log[-1]["step"] < 20_000
    assert (
        log[-1]["lr"] < 0.05 * log[0]["lr"] and (run / "samples" / f"step_{log[-1]['step']:08d}.gif").exists()
    )
    more = "--steps", log[-1]["step"] + 2
    with pytest.raises(SystemExit, match="2"):  # the minutes are over, so more steps alone would do nothing
        train(tmp_path, monkeypatch, "--resume", run, *more)
    assert re.search(r"--minutes is 0.05, but the run has made 0.05\d*; .*, or 0$", capsys.readouterr().err)
    train(tmp_path, monkeypatch, "--resume", run, *more, "--minutes", 0)
    assert len(lines(run)) == len(log) + 2 and lines(run)[-1]["seconds"] > log[-1]["seconds"]


@pytest.mark.parametrize(
    "flags",
    [
        "--backbone unet --objective eps --schedule linear",
        "--objective x0",
        "--grad-accum 4",
    ]
    + ["--class-dropout 1", "--class-dropout 0 --guidance 1", "--channels 3 --dropout 0.1"]
    + ["--grad-checkpoint --attention 8 --dtype bfloat16 --timesteps 100"],
)
def test_flags_train_and_sample(tmp_path, monkeypatch, flags):
    run = train(tmp_path, monkeypatch, *flags.split(), "--steps", 4, "--eval-every", 2)
    assert len(lines(run)) == 4 and len(lines(run, "val")) == 2
    assert (
        Image.open(run / "samples" / "step_00000004.png").size
        == Image.open(run / "samples" / "step_00000004.gif").size
    )


def test_grad_accum_is_the_same_step(tmp_path, monkeypatch):
    losses = []
    for parts in (1, 4):
        run = train(tmp_path, monkeypatch, "--steps", 5, "--grad-accum", parts, "--eval-every", 0)
        losses.append([x[k] for x in lines(run) for k in ("loss", "grad_norm")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--image-size 15", r"side \(15\) must be divisible by 2 for 2 levels; use --image-size 16 or"),
        ("--image-size 30 --mults 1 2 4", r"\(30\) must be divisible by 4 for 3 levels; use --image-size 32"),
        ("--attention 7", r"--attention must be resolutions of the levels, \[16, 8\]"),
        ("--bs 0", "--bs is 0"),
        ("--bs 8 --grad-accum 3", r"\(8\) must be divisible by --grad-accum x number of processes \(3\)"),
        ("--lr 0", "--lr is 0"),
        ("--lr nan", "--lr is nan"),
        ("--sampling-steps 50 --timesteps 20", r"--sampling-steps \(50\) must be at most --timesteps \(20\)"),
        ("--class-dropout 0", "--guidance needs --class-dropout above 0"),
        ("--class-dropout 1.5", "--class-dropout is 1.5"),
        ("--mults", "--mults must be a positive number per level"),
        ("--keep 0", "--keep is 0"),
        ("--dataset nowhere", "there is no dataset nowhere"),
        ("--dataset mnist --data-root none", "mnist is not in"),
        ("--channels 2", "--channels is 2"),
        ("--objective noise", "invalid choice"),
        ("--stpes 3", "did you mean --steps"),
        ("--device mps", "--device mps"),
        ("--resume nowhere", "nowhere is not a run"),
        ("--config nowhere.yaml", "not a readable run.yaml"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, match):
    with pytest.raises(SystemExit) as e:
        train(tmp_path, monkeypatch, "--steps", 2, *flags.split())
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
    assert re.search("; | must be | needs ", text), text  # what to do about it
    assert re.search(match, text), text
    assert not (tmp_path / "logs").exists()


# ------------------------------------------------------------------------------------------------
# Runs as processes


RUN = [*TINY, "--steps", 60, "--save-every", 5, "--eval-every", 30, "--log-every", 3, "--dataset"]


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """An uninterrupted run of the real script."""
    home = tmp_path_factory.mktemp("whole")
    command = [sys.executable, Path(ddpm.__file__), *map(str, RUN), few]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "DIFFUSION_LOGS": str(home / "logs")}
    p = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return newest_run(home), p


def test_a_run_folder_is_complete(whole):
    run, p = whole
    info = yaml.safe_load((run / "run.yaml").read_text())
    assert (
        info["config"]["steps"] == 60 and info["config"]["shape"] == [1, 16, 16] and info["parameters"] > 1000
    )
    assert (
        "--bs 8" in info["command"]
        and info["dataset"]["name"] == "few"
        and info["dataset"]["shape"] == "1x16x16"
        and info["device"]
    )
    assert (run / "code" / NAME).read_text() == Path(ddpm.__file__).read_text()
    assert (run / "code" / "common.py").read_text() == Path(common.__file__).read_text()
    assert sorted(x.name for x in (run / "checkpoints").iterdir()) == ["step_00000055.pt", "step_00000060.pt"]
    assert [x["step"] for x in lines(run)] == list(range(1, 61))
    assert {"loss", "lr", "grad_norm", "images_per_s", "seconds"} <= lines(run)[0].keys()
    val = lines(run, "val")
    assert (
        [x["step"] for x in val] == [30, 60]
        and val[1]["loss"] < val[0]["loss"]
        and len(val[0]["loss_t"]) == 10
    )
    assert Image.open(run / "samples" / "step_00000060.gif").n_frames >= 4
    assert (run / "samples" / "step_00000060.png").exists()
    assert sorted(x.name for x in (run / "metrics").iterdir()) == ["loss.jsonl", "val.jsonl"]
    assert (run / "run.out").read_text() == p.stdout and "look at" in p.stdout and p.stderr == ""
    state = common.newest_checkpoint(run)
    assert state["config"]["bs"] == 8 and not any("module" in k or "_orig" in k for k in state["model"])


def test_config_file_runs_it_again(whole, tmp_path, monkeypatch, two_threads):
    run, _ = whole
    assert same(weights(train(tmp_path, monkeypatch, "--config", run / "run.yaml")), weights(run))


def test_sample_and_resume_of_a_finished_run(whole, main, tmp_path, monkeypatch):  # noqa: F811
    run, before = tmp_path / "logs" / "ddpm" / "copy", weights(whole[0])
    shutil.copytree(whole[0], run)
    flags = ["--solver", "own", "--guidance", 3, "--seed", 5, "--num-samples", 10]
    assert "NFE 4 " in main(run, *flags)
    assert (run / "samples" / "step_00000060_own_w3_seed5_numsamples10.gif").exists()
    train(tmp_path, monkeypatch, "--resume", run)
    assert same(weights(run), before) and len(lines(run)) == 60


def test_kill_9_at_any_moment_then_resume_is_bit_exact(few, whole, script, tmp_path):
    """Killed over and over, at moments that also fall into starting, saving and drawing."""
    run, kills, flags, env = None, 0, [*RUN, few, "--save-every", 1], {"PYTHONUNBUFFERED": "1"}
    for patience in (0.05, 0.3, 0.6, None):
        process = script(NAME, *(["--resume", run] if run else flags), wait=False, env=env)
        if patience is None:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            break
        start, seen = time.monotonic(), len(lines(run)) if run else 0
        while time.monotonic() - start < 120:  # wait for some steps of this process, then a little
            if (tmp_path / "logs" / "ddpm").exists():
                run = newest_run(tmp_path)
                log = run / "metrics" / "loss.jsonl"
                if log.exists() and log.read_text().count("\n") > seen + 3:
                    break
            time.sleep(0.01)
        time.sleep(patience)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills >= 2
    assert same(weights(run), weights(whole[0]))
    assert [x["step"] for x in lines(run)] == list(range(1, 61))
    assert [x["loss"] for x in lines(run)] == [x["loss"] for x in lines(whole[0])]
    assert lines(run, "val") == lines(whole[0], "val")
    assert not list((run / "checkpoints").glob(".*"))


def test_sigterm_saves_and_leaves_with_its_own_status(few, whole, script, tmp_path):
    process = script(NAME, *RUN, few, wait=False)
    while process.poll() is None and "folder" not in "".join(
        f.read_text() for f in (tmp_path / "logs").glob("ddpm/*/run.out")
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    run = newest_run(tmp_path)
    assert process.returncode == common.EXIT_PREEMPTED and f"--resume {run}" in out, err
    step = common.newest_checkpoint(run)["step"]
    assert step < 60 and len(lines(run)) == step
    p = script(NAME, "--resume", run)
    assert p.returncode == 0 and same(weights(run), weights(whole[0])), p.err
    assert [x["step"] for x in lines(run)] == list(range(1, 61))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "pickle bomb", "foreign"])
def test_damaged_newest_checkpoint(whole, tmp_path, monkeypatch, capsys, damage, two_threads):
    """The one before it is used, with a warning that names both; asked for by name, it is an error."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "logs" / "ddpm" / "copy"
    shutil.copytree(whole[0], run)
    bad, good = run / "checkpoints" / "step_00000060.pt", run / "checkpoints" / "step_00000055.pt"
    data = bytearray(bad.read_bytes())
    if damage == "truncated":
        bad.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        weight = common.load_checkpoint(bad)["ema"]["mid.0.emb.weight"]
        data[data.index(weight.numpy().tobytes()) + 100] ^= 1  # one bit
        bad.write_bytes(data)
    elif damage == "empty":
        bad.write_bytes(b"")
    elif damage == "foreign":
        torch.save({"state_dict": {}}, bad)
    else:
        torch.save(Bomb(), bad)
        (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(common.UserError, match="cannot load .*raw.pt"):
            common.load_checkpoint(tmp_path / "raw.pt")
    with pytest.raises(SystemExit) as e:
        train(tmp_path, monkeypatch, "--resume", bad)
    assert e.value.code == 2 and f"cannot load {bad} (" in capsys.readouterr().err
    train(tmp_path, monkeypatch, "--resume", run)
    out = capsys.readouterr().out
    assert "warning" in out and str(bad) in out and str(good) in out and "continuing after step 55" in out
    assert same(weights(run), weights(whole[0]))
    assert [x["step"] for x in lines(run)] == list(range(1, 61)) and not (tmp_path / "owned").exists()


def test_resume_from_an_earlier_checkpoint(whole, tmp_path, monkeypatch, two_threads):
    run = tmp_path / "logs" / "ddpm" / "copy"
    shutil.copytree(whole[0], run)
    (run / "metrics" / "mine.jsonl").write_text('{"epoch": 1}\n[1, 2]\n')  # a fork's own
    with open(run / "metrics" / "loss.jsonl", "ab") as f:
        f.write(b'{"step": 61, "lo\xff')
    train(tmp_path, monkeypatch, "--resume", run / "checkpoints" / "step_00000055.pt")
    assert (run / "metrics" / "mine.jsonl").read_text() == '{"epoch": 1}\n[1, 2]\n'
    assert same(weights(run), weights(whole[0])) and [x["step"] for x in lines(run)] == list(range(1, 61))
    *old, torn = (run / "metrics" / "loss.jsonl.old").read_bytes().splitlines()  # nothing is lost
    assert old == (whole[0] / "metrics" / "loss.jsonl").read_bytes().splitlines()[55:] and b"\xff" in torn
    for name in ("checkpoints/step_00000060.pt", "samples/step_00000060.gif", "samples/step_00000060.png"):
        assert len([*run.glob(f"{name}.*.old")]) == 1 and (run / name).exists()


def test_edited_run_yaml_is_noticed(whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "logs" / "ddpm" / "copy"
    shutil.copytree(whole[0], run)
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace(" lr: 0.004", " lr: 0.003"))
    with pytest.raises(SystemExit) as e:
        train(tmp_path, monkeypatch, "--resume", run)
    assert e.value.code == 2 and f"--lr is 0.003, but 0.004 in {run};" in capsys.readouterr().err
    assert len(lines(run)) == 60


def test_another_dataset_is_noticed_on_resume(tmp_path, monkeypatch, capsys):
    """One image more, and every shuffle is another."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(9):
        Image.new("L", (16, 16), 20 * i).save(images / f"{i}.png")
    go_on = functools.partial(train, tmp_path, monkeypatch, "--dataset", images, "--eval-every", 0)
    run = go_on("--steps", 3)
    (images / "8.png").rename(tmp_path / "8.png")
    with pytest.raises(SystemExit) as e:
        go_on("--resume", run, "--steps", 5)
    assert e.value.code == 2 and "differs from the run's: train is {'images': 8" in capsys.readouterr().err
    (tmp_path / "8.png").rename(images / "8.png")
    assert len(lines(go_on("--resume", run, "--steps", 5))) == 5


def test_two_runs_in_one_second(tmp_path, monkeypatch):
    class Frozen(datetime):
        @classmethod
        def now(cls):
            return datetime(2026, 1, 2)

    monkeypatch.setattr(common, "datetime", Frozen)
    for _ in range(2):
        train(tmp_path, monkeypatch, "--steps", 1, "--eval-every", 0, "--sample-every", 0)
    names = sorted(f.name for f in (tmp_path / "logs/ddpm").iterdir())
    assert names == [f"ddpm_resunet_2026-01-02_00-00-00{x}" for x in ("", "_2")]


def test_a_run_in_use_is_refused(whole, script, tmp_path):
    with open(whole[0] / "run.out", "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        p = script(NAME, "--resume", whole[0], "--steps", 70)
    assert p.returncode == 2 and "is in use by another process" in p.err and p.err.count("\n") == 1


def test_two_processes_train_as_one(few, whole, script, tmp_path):
    prefix = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    p = script(NAME, *RUN, few, prefix=prefix, env={"OMP_NUM_THREADS": "1"})
    assert p.returncode == 0, p.err
    run = newest_run(tmp_path)
    got, want = ([x["loss"] for x in lines(r)] for r in (run, whole[0]))
    assert got == pytest.approx(want, rel=0.01) and got[:5] == pytest.approx(want[:5], rel=1e-5)
    assert len(list((tmp_path / "logs/ddpm").iterdir())) == 1
    assert lines(run, "val")[-1]["loss"] == pytest.approx(lines(whole[0], "val")[-1]["loss"], rel=2e-3)
