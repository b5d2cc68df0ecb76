"""The second script: its model, method, sampler and optimizer against oracles, and its runs."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_a_bad_step_changes_nothing
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from test_ddim_sample import main  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import rf_dit_cifar as rf
from rf_dit_cifar import Config

NAME = "rf_dit_cifar.py"
TINY = "--dim 32 --depth 2 --heads 2 --patch 4 --bs 8 --sampling-steps 4 --num-samples 10".split()
TINY += "--image-size 16 --compile off --dtype float32 --lr 2e-3".split()
SMALL = Config(dim=32, depth=2, heads=2, patch=4, shape=(1, 16, 16))

# ------------------------------------------------------------------------------------------------
# Model


def random_model(cfg, seed=0):
    """Weights as after some training: nothing is zero."""
    torch.manual_seed(seed)
    model = rf.build_model(cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_patchify_round_trip(p):
    x = torch.randn(2, 3, 8, 8)
    tokens = rf.patchify(x, p)
    assert tokens.shape == (2, 64 // p**2, 3 * p * p)
    torch.testing.assert_close(rf.unpatchify(tokens, p), x, rtol=0, atol=0)
    last = tokens[0, 8 // p - 1].view(3, p, p)  # tokens run along the rows: this is the upper right corner
    torch.testing.assert_close(last, x[0, :, :p, 8 - p :], rtol=0, atol=0)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"shape": (3, 32, 32), "patch": 8, "classes": ("a", "b", "c"), "mlp_ratio": 2.0},
        {"grad_checkpoint": True},
    ],
)
def test_shapes_start_and_gradients(more):
    cfg = replace(SMALL, **more)
    rf.check(cfg)
    model = rf.build_model(cfg)
    x, t, y = torch.randn(3, *cfg.shape), torch.rand(3), torch.tensor([0, 1, len(cfg.classes)])
    assert torch.equal(model(x, t, y), torch.zeros_like(x))
    h = torch.randn(3, 4, cfg.dim)
    for block in model.blocks:  # shared modulations start at zero, too
        assert torch.equal(block(h, torch.zeros(3, 6 * cfg.dim), model.cos[:4], model.sin[:4]), h)
    model = random_model(cfg)
    out = model(x, t, y)
    assert out.shape == x.shape
    for other in (model(x, 1 - t, y), model(x, t, y.flip(0)), model(x.flip(-1), t, y)):
        assert not torch.allclose(out, other)  # time, class and image all matter
    model.train()
    model(x, t, y).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # the latter without a GPU: dtypes, no numbers
def test_the_residual_stream_is_bfloat16_under_autocast_and_float32_without(device):
    """So are the widest activations, those of the MLP: autocast on a GPU computes powers in float32."""
    with FakeTensorMode(), torch.device(device):
        model, seen = random_model(SMALL), []
        for block in model.blocks:
            block.register_forward_hook(lambda _, args, out: seen.extend([args[0].dtype, out.dtype]))
            block.mlp2.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        x, t, y = torch.randn(2, 1, 16, 16), torch.rand(2), torch.zeros(2, dtype=torch.long)
        for autocast in (False, True):
            seen.clear()
            torch.set_autocast_enabled(device, autocast)  # torch.autocast asks for a GPU
            torch.set_autocast_dtype(device, torch.bfloat16)
            try:
                model(x, t, y)
            finally:
                torch.set_autocast_enabled(device, False)
            assert seen == 6 * [torch.bfloat16 if autocast else torch.float32]


def test_positions_matter():
    """Without them a transformer cannot tell where a token is: moved tokens would give the moved result."""
    model = random_model(SMALL)
    x, t, y = torch.randn(1, 1, 16, 16), torch.rand(1), torch.tensor([1])
    moved = model(x.roll(4, -1), t, y).roll(-4, -1)
    assert not torch.allclose(moved, model(x, t, y), rtol=1e-2, atol=1e-3)


def test_samples_of_a_batch_do_not_see_each_other():
    model = random_model(SMALL)
    x, t, y = torch.randn(6, 1, 16, 16), torch.rand(6), torch.arange(6)
    whole, order = model(x, t, y), torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(model(x[order], t[order], y[order]), whole[order])
    torch.testing.assert_close(model(x[2:3], t[2:3], y[2:3]), whole[2:3])


def test_rotary_products_depend_on_the_offset_alone():
    cos, sin = rf.rope_table(5, 16)
    q, k = torch.randn(16), torch.randn(16)
    turned_q, turned_k = (rf.rotate(u.expand(1, 1, 25, 16), cos, sin)[0, 0] for u in (q, k))
    products = (turned_q @ turned_k.T).view(5, 5, 5, 5)  # of the tokens (row, column) and (row, column)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(25))
    for dr, dc in ((0, 0), (1, 0), (0, 2), (2, 1)):
        same = [products[r, c, r + dr, c + dc] for r in range(5 - dr) for c in range(5 - dc)]
        torch.testing.assert_close(torch.stack(same), same[0].expand(len(same)), rtol=1e-4, atol=1e-4)
    assert abs(products[0, 0, 1, 0] - products[0, 0, 0, 1]) > 1e-3  # rows and columns differ
    assert all(abs(products[0, 0, r, c] - products[0, 0, 0, 0]) > 1e-3 for r, c in ((1, 0), (0, 1)))


def test_queries_and_keys_are_turned_alike():
    """All tokens turned by one angle attend as if none were turned: what counts is their difference."""
    model, x, c = random_model(SMALL), torch.randn(2, 16, 32), torch.randn(2, 6 * 32)
    block, angle = model.blocks[0], torch.full_like(model.cos, 0.7)
    unturned = block(x, c, angle * 0 + 1, angle * 0)
    torch.testing.assert_close(block(x, c, angle.cos(), angle.sin()), unturned)
    assert not torch.allclose(block(x, c, model.cos, model.sin), unturned)


def test_the_size_of_queries_and_keys_does_not_matter():
    """QK-norm: however large they grow, the logits stay bounded."""
    model, x, c = random_model(SMALL), torch.randn(2, 16, 32), torch.randn(2, 6 * 32)
    block = model.blocks[0]
    before = block(x, c, model.cos, model.sin)
    with torch.no_grad():
        block.qkv.weight[: 2 * 32] *= 10
    torch.testing.assert_close(block(x, c, model.cos, model.sin), before, rtol=1e-3, atol=1e-3)


def test_attention_of_the_cpu_in_bfloat16_is_attention():
    q, k, v = (torch.randn(2, 3, 20, 8, dtype=torch.bfloat16) for _ in range(3))
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(rf.attention(q, k, v).float(), want, rtol=0.03, atol=0.03)


def test_grad_checkpoint_changes_memory_alone():
    grads = []
    for recompute in (False, True):
        model, passes = random_model(replace(SMALL, grad_checkpoint=recompute)).train(), []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        torch.manual_seed(1)
        model(torch.randn(2, 1, 16, 16), torch.rand(2), torch.tensor([0, 1])).square().sum().backward()
        assert len(passes) == len(model.blocks) * (1 + recompute)
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_any_head_has_its_angles():
    for dim in range(4, 1001, 4):  # 4 / dim is not exact: counted in floats, some had one too many
        cos, sin = rf.rope_table(2, dim)
        assert cos.shape == sin.shape == (4, dim // 2)


# ------------------------------------------------------------------------------------------------
# Method


@pytest.mark.parametrize("path", [rf.path, lambda t, cfg: ((t * math.pi / 2).cos(), (t * math.pi / 2).sin())])
def test_velocity_and_estimates_are_one_statement(path, monkeypatch):
    """... on a fork's path, too."""
    monkeypatch.setattr(rf, "path", path)
    cfg = Config(guidance=1.0)
    x0, eps, t = torch.randn(5, 1, 4, 4), torch.randn(5, 1, 4, 4), torch.tensor([0.01, 0.3, 0.5, 0.9, 1.0])
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in rf.path(t, cfg))
    x, y = alpha * x0 + sigma * eps, torch.zeros(5, dtype=torch.long)
    got = rf.predict(lambda *_: eps - x0, x, t, y, cfg)  # a network that knows the velocity knows both
    torch.testing.assert_close(got, (x0, eps), rtol=1e-4, atol=1e-5)
    loss = rf.loss_per_sample(lambda *_: eps - x0 + 2, x0, y, t, eps, cfg)
    torch.testing.assert_close(loss, torch.full((5,), 4.0))
    seen = []
    rf.loss_per_sample(lambda *a: seen.append(a) or a[0], x0, y, t, eps, cfg)
    torch.testing.assert_close(seen[0][0], x)


def test_times():
    """Each in its own share of the batch, and of the density that was asked for, by its quantiles."""
    u = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    quantiles = (np.arange(4000) + u.numpy()) / 4000
    for name, shift in (("uniform", 1.0), ("logit-normal", 1.0), ("uniform", 3.0), ("logit-normal", 0.5)):
        t = rf.sample_t(u, Config(t_sampling=name, shift=shift)).double().numpy()
        want = (
            quantiles
            if name == "uniform"
            else 1 / (1 + np.exp(-np.vectorize(NormalDist().inv_cdf)(quantiles)))
        )
        want = shift * want / (1 + (shift - 1) * want)
        np.testing.assert_allclose(t, want, rtol=1e-3, atol=2e-5)
        assert 0 < t.min() and t.max() < 1 and (np.diff(t) >= 0).all()
    edge = rf.sample_t(torch.zeros(1), Config(t_sampling="logit-normal"))
    assert 0 < edge.item() < 1


def test_guidance():
    calls = []

    def model(x, t, y):
        calls.append(len(x))
        return x * 0 + y.view(-1, 1, 1, 1).float()

    cfg = Config()
    x, t, y = torch.randn(4, 1, 2, 2), torch.full((4,), 0.5), torch.full((4,), 3)
    for w, want in ((1.0, 3.0), (0.0, 10.0), (2.0, -4.0)):
        x0, eps = rf.predict(model, x, t, y, cfg, w)
        torch.testing.assert_close(eps - x0, torch.full_like(x, want))
    assert calls == [4, 8, 8]  # w = 1 is the conditional model; else one call for both
    x0, eps = rf.predict(model, x, t, y, replace(cfg, class_dropout=1.0), 2.0)
    torch.testing.assert_close(eps - x0, torch.full_like(x, 10.0))
    calls.clear()
    cfg = replace(cfg, guidance=2.0, guidance_interval=(0.2, 0.6), sampling_steps=10)
    rf.sample(model, x, y, cfg)
    assert calls == [4] * 4 + [8] * 5 + [4]  # t = 1, 0.9, ..., 0.1; 0.6 to 0.2 with guidance


def test_conditions():
    cfg = Config(classes=("cat", "dog", "a,b"))
    assert rf.null(torch.tensor([[0, 1], [2, 2]]), cfg).tolist() == [[3, 3], [3, 3]]
    assert rf.conditions([], cfg).tolist() == [0, 1, 2] and rf.conditions([], cfg).dtype == torch.int64
    assert rf.conditions(["dog", "0", "a,b", "dog"], cfg).tolist() == [1, 0, 2, 1]
    assert rf.conditions(["10", "0"], replace(cfg, classes=("0", "4", "10"))).tolist() == [2, 0]  # names
    for classes, name in ((cfg.classes, "bird"), (cfg.classes, "3"), (("0", "4", "10"), "1")):
        want = f"there is no class {name}; there are {', '.join(classes)}$"
        with pytest.raises(common.UserError, match=want):
            rf.conditions([classes[0], name], replace(cfg, classes=classes))


# ------------------------------------------------------------------------------------------------
# Sampler

M, S = torch.tensor([0.4, -0.2]).double(), torch.tensor([[0.09, 0.04], [0.04, 0.05]]).double()


def gaussian(x, t, y):
    """The exact velocity E[eps - x0 | x_t] for data N(M, S): x_t is N((1-t) M, C), C = (1-t)^2 S + t^2 I."""
    t = t[0].double()
    C = (1 - t) ** 2 * S + t**2 * torch.eye(2).double()
    gain = (t * torch.eye(2).double() - (1 - t) * S) @ torch.linalg.inv(C)
    return (-M + (x.flatten(1) - (1 - t) * M) @ gain.T).view_as(x)


def test_flow_lands_on_the_mean_and_covariance_of_a_gaussian():
    cfg = Config(shape=(1, 1, 2), guidance=1.0, solver="heun", sampling_steps=100)
    x = torch.randn(20_000, 1, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    images, history = rf.sample(gaussian, x, torch.zeros(len(x), dtype=torch.long), cfg)
    images = images.flatten(1)
    assert 23 <= len(history) <= 25
    torch.testing.assert_close(images.mean(0), M, rtol=0, atol=0.008)
    torch.testing.assert_close(torch.cov(images.T), S, rtol=0.04, atol=0.001)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_orders(solver, order):
    """The flow of a Gaussian is known: x_0 = M + S^(1/2) x_1, as the path's covariances commute."""
    x = torch.randn(64, 1, 1, 2, generator=torch.Generator().manual_seed(1)).double() * 0.5
    values, vectors = torch.linalg.eigh(S)
    want = M + x.flatten(1) @ (vectors * values.sqrt() @ vectors.T)
    steps, errors = np.array([20, 40, 80, 160]), []
    for n in steps.tolist():
        cfg = Config(shape=(1, 1, 2), guidance=1.0, solver=solver, sampling_steps=n)
        got, _ = rf.sample(gaussian, x, torch.zeros(64, dtype=torch.long), cfg)
        errors.append((got.flatten(1) - want).square().mean().sqrt().item())
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order - 0.2 < slope < order + 0.5, errors


def test_euler_is_that_of_diffusers():
    model, cfg = random_model(SMALL), replace(SMALL, guidance=1.0, sampling_steps=10)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    x, y = torch.randn(3, 1, 16, 16), torch.arange(3)
    want = x
    with torch.no_grad():
        for k in scheduler.timesteps:
            v = model(want, torch.full((3,), k.item() / 1000), y)
            want = scheduler.step(v, k, want, return_dict=False)[0]
    got, history = rf.sample(model, x, y, cfg)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(history[-1], got)  # the last estimate is the sample


# ------------------------------------------------------------------------------------------------
# Optimizer


@pytest.mark.parametrize("rows, columns", [(32, 32), (96, 32), (32, 128)])
def test_newton_schulz(rows, columns):
    u, _, vh = torch.linalg.svd(torch.randn(3, rows, columns), full_matrices=False)
    x = rf.newton_schulz(u * torch.linspace(0.05, 1, u.shape[-1]) @ vh)  # a known, wide spectrum
    spectrum = u.mT @ x @ vh.mT  # diagonal, as the singular vectors stay
    diagonal = spectrum.diagonal(dim1=1, dim2=2)
    assert 0.72 < diagonal.min() and diagonal.max() < 1.28
    assert (spectrum - torch.diag_embed(diagonal)).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_of_one_direction_stays_bounded(dtype):
    """Its singular value is the norm: a polynomial that is left where it is meant to act explodes."""
    for seed in range(20):
        a, b = torch.randn(2, 1, 64, 1, generator=torch.Generator().manual_seed(seed)).to(dtype)
        assert 0.7 < torch.linalg.matrix_norm(rf.newton_schulz(a @ b.mT).float(), 2) < 1.3
    assert torch.equal(rf.newton_schulz(torch.zeros(1, 4, 8, dtype=dtype)), torch.zeros(1, 4, 8, dtype=dtype))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has it since 2.9")
def test_muon_is_that_of_pytorch(monkeypatch):
    """But for how far each makes a matrix orthogonal: here, both go all the way."""

    def exact(g):
        u, _, vh = torch.linalg.svd(g.float(), full_matrices=False)
        return u @ vh

    monkeypatch.setattr(rf, "newton_schulz", exact)
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s)) for s in ((48, 16), (16, 16), (48, 16), (16, 64))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    group = {"params": ours, "momentum": 0.95, "weight_decay": 0.1}
    mine = rf.Muon([group], lr=0.02, fused=True)
    mine.dtype, mine.found_inf = torch.float32, torch.zeros(())
    converging = {"ns_coefficients": (15 / 8, -10 / 8, 3 / 8), "ns_steps": 40}
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, **converging)
    for _ in range(5):
        grads = [torch.randn_like(p) for p in ours]
        for params in (ours, theirs):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)  # bfloat16; five steps move each by about 0.02


def test_a_bad_step_changes_nothing():
    model = rf.build_model(SMALL)
    optimizer = rf.make_optimizer(model, SMALL, torch.float32)
    assert_a_bad_step_changes_nothing(model, optimizer)
    groups = optimizer.param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert {p.ndim for p in groups[0]["params"]} == {2} and groups[0]["base_lr"] == SMALL.muon_lr
    plain = rf.make_optimizer(model, replace(SMALL, optimizer="adamw"), torch.float32)
    assert not any(g["params"] for g in plain.param_groups if "momentum" in g)


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
                rf.train(common.parse(Config, rf.__doc__, [*TINY, "--dataset", "digits", *map(str, flags)]))
        finally:
            for s, h in handlers.items():
                signal.signal(s, h)
    return newest_run(tmp_path)


def newest_run(tmp_path):
    return max((tmp_path / "logs" / "rf").iterdir(), key=lambda p: p.stat().st_mtime_ns)


def lines(run, name="loss"):
    return [json.loads(x) for x in (run / "metrics" / f"{name}.jsonl").read_text().splitlines()]


def test_overfits_ten_images(tmp_path, monkeypatch):
    data = common.load_dataset("digits", image_size=16)
    for i in range(10):
        file = tmp_path / "few" / str(i) / "image.png"
        file.parent.mkdir(parents=True)
        Image.fromarray(data.images[i, 0].numpy()).save(file)
    flags = ["--dataset", tmp_path / "few", "--dim", 64, "--depth", 4, "--bs", 40, "--lr", 4e-3]
    run = train(tmp_path, monkeypatch, *flags, "--muon-lr", 0.05, "--steps", 500, "--eval-every", 0)
    cfg = replace(SMALL, dim=64, depth=4, guidance=1.0)
    model = rf.build_model(cfg)
    model.load_state_dict(common.newest_checkpoint(run)["ema"])
    noise = torch.randn(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    images, _ = rf.sample(model.eval(), noise, torch.arange(20) % 10, cfg)
    targets = data.images[:10].float() / 127.5 - 1
    nearest = (torch.cdist(images.flatten(1), targets.flatten(1)).square() / 256).min(1)
    assert nearest.values.median() < 0.06, nearest  # the mean square of a digit is about 0.8
    assert (nearest.indices % 10 == torch.arange(20) % 10).float().mean() >= 0.9  # and of the class asked for


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch):
    original, calls = rf.loss_per_sample, []

    def sabotaged(*args):
        calls.append(1) if torch.is_grad_enabled() else None  # not those of evaluation; the first is a trial
        return original(*args) * (float("nan") if len(calls) in (4, 5, 9) else 1)

    monkeypatch.setattr(rf, "loss_per_sample", sabotaged)
    run = train(tmp_path, monkeypatch, "--steps", 10, "--log-every", 5, "--eval-every", 0)
    assert [x["step"] for x in lines(run) if x.get("skipped")] == [3, 4, 8]
    state = common.newest_checkpoint(run)
    assert state["skipped"] == 3
    assert all(v.isfinite().all() for v in [*state["model"].values(), *state["ema"].values()])
    kept = [v for s in state["optimizer"]["state"].values() for v in s.values()]
    assert kept and all(v.isfinite().all() for v in kept)


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
        train(tmp_path, monkeypatch, "--steps", steps, "--log-every", 1000, "--eval-every", 0)
        counts.append(len(reads))
    assert counts[0] == counts[1], reads


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer adamw",
        "--t-sampling logit-normal --shift 2 --solver heun --weight-decay 0.1",
        "--class-dropout 1 --solver rk4 --channels 3 --flip",
        "--class-dropout 0 --guidance 1 --grad-accum 4",
        "--grad-checkpoint --dtype bfloat16 --guidance-interval 0.2 0.8",
    ],
)
def test_flags_train_and_sample(tmp_path, monkeypatch, capsys, flags):
    run = train(tmp_path, monkeypatch, *flags.split(), "--steps", 4, "--eval-every", 2)
    assert len(lines(run)) == 4 and len(lines(run, "val")) == 2
    assert None not in lines(run, "val")[0]["loss_t"]
    assert (
        Image.open(run / "samples" / "step_00000004.png").size
        == Image.open(run / "samples" / "step_00000004.gif").size
    )
    said = capsys.readouterr().out.splitlines()[-3:]
    assert re.fullmatch(r"done    step 4, loss [\d.]+, held-out loss [\d.]+", said[0])
    assert said[1:] == [
        f"saved   {run}/checkpoints/step_00000004.pt",
        f"look at {run}/samples/step_00000004.gif",
    ]


def test_flops_are_counted_by_hand():
    """By tests/benchmark.py: a linear layer of m x n takes 2 m n for a token, attention 4 N dim."""
    import benchmark

    cfg = Config(dim=64, depth=3, heads=2, patch=2, shape=(3, 8, 8))
    tokens, per_block = 16, 2 * (3 + 1 + 4 + 4) * 64 * 64 + 4 * 16 * 64
    outside = tokens * 2 * 2 * 12 * 64 + 2 * (256 * 64 + 64 * 64 + (6 + 2) * 64 * 64)
    want = 3 * (3 * tokens * per_block + outside)
    got = benchmark.flops(rf.build_model(cfg), lambda net, x, t, y: net(x, t, y), cfg)
    assert got == pytest.approx(want, rel=0.01)


def test_rhythm_of_zero_is_never(tmp_path, monkeypatch):
    never = ["--eval-every", 0, "--sample-every", 0, "--save-every", 0]
    run = train(tmp_path, monkeypatch, "--steps", 3, *never)
    assert not list((run / "samples").iterdir()) and not (run / "metrics" / "val.jsonl").exists()
    assert [f.name for f in (run / "checkpoints").iterdir()] == [
        "step_00000003.pt"
    ]  # the last is always kept


def test_where_nothing_compiles_the_error_says_what_to_do(tmp_path, script):
    environment = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = [*TINY, "--dataset", "digits", "--steps", 2, "--compile", "on"]
    p = script("rf_dit_cifar.py", *flags, env=environment)
    assert p.returncode == 2
    assert re.search(r"^error: torch.compile failed \(.+\); use --compile off$", p.err, re.M), p.err


def test_muon_without_blocks_is_one_line(tmp_path, monkeypatch, capsys):
    class Pixels(torch.nn.Conv2d):
        def forward(self, x, t, y):
            return super().forward(x)

    monkeypatch.setattr(rf, "build_model", lambda cfg: Pixels(1, 1, 3, padding=1))
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path, monkeypatch, "--steps", 2)
    error = "error: Muon finds no matrix named blocks.*; use --optimizer adamw\n"
    assert capsys.readouterr().err == error
    assert len(lines(train(tmp_path, monkeypatch, "--steps", 2, "--optimizer", "adamw"))) == 2


def test_grad_accum_is_the_same_step(tmp_path, monkeypatch):
    losses = []
    for parts in (1, 4):
        run = train(tmp_path, monkeypatch, "--steps", 5, "--grad-accum", parts, "--eval-every", 0)
        losses.append([x[k] for x in lines(run) for k in ("loss", "grad_norm")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--patch 5", r"--patch \(5\) must divide the image side \(16\); possible are \[1, 2, 4, 8, 16\]"),
        ("--dim 36", r"--dim \(36\) must be divisible by 4 x --heads \(8\)"),
        ("--depth 0", "--depth is 0; it must be at least 1"),
        (
            "--bs 8 --grad-accum 3",
            r"--bs \(8\) must be divisible by --grad-accum x number of processes \(3\)",
        ),
        ("--lr 0", "--lr is 0.0; it must be above 0"),
        ("--muon-lr nan", "--muon-lr is nan"),
        ("--shift inf", "--shift is inf"),
        ("--warmup -1", "--warmup is -1; it must be at least 0"),
        ("--class-dropout 0", "--guidance needs"),
        ("--class-dropout 1.5", "--class-dropout is 1.5; it must be from 0 to 1"),
        ("--guidance-interval 0.5", "--guidance-interval: expected 2 arguments"),
        ("--guidance-interval 0.8 0.2", "--guidance-interval must be two times"),
        ("--dataset nowhere", "there is no dataset nowhere"),
        ("--dataset cifar10 --data-root none", "cifar10 is not in"),
        ("--solver dopri", "invalid choice"),
        ("--stpes 3", "did you mean --steps"),
        ("--resume nowhere", "nowhere is not a run"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, match):
    with pytest.raises(SystemExit) as e:
        train(tmp_path, monkeypatch, "--steps", 2, *flags.split())
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
    assert re.search(match, text) and re.search("; | must ", text), text  # what is wrong, and what to do
    assert not (tmp_path / "logs").exists()


# ------------------------------------------------------------------------------------------------
# Runs as processes


def weights(run):
    state = common.newest_checkpoint(run)
    return [state["step"], *state["model"].values(), *state["ema"].values(), state["optimizer"]["state"]]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    return True


@pytest.fixture(scope="module")
def flags(few):
    """Of a run on 190 images that are mirrored at times: its 60 steps of 8 span three epochs."""
    rhythm = ["--steps", 60, "--save-every", 5, "--eval-every", 30, "--log-every", 3]
    return [*TINY, "--dataset", few, *rhythm]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """An uninterrupted run of the real script."""
    home = tmp_path_factory.mktemp("whole")
    command = [sys.executable, Path(rf.__file__), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "DIFFUSION_LOGS": str(home / "logs")}
    p = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert p.returncode == 0 and p.stderr == "", p.stderr
    assert lines(newest_run(home), "val")[1]["loss"] < lines(newest_run(home), "val")[0]["loss"]
    return newest_run(home)


def test_kill_9_then_resume_is_bit_exact(flags, whole, script, tmp_path):
    process = script(NAME, *flags, "--save-every", 1, wait=False)
    while process.poll() is None and not any(
        f.read_text().count("\n") > 10 for f in (tmp_path / "logs").glob("rf/*/metrics/loss.jsonl")
    ):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    run = newest_run(tmp_path)
    assert process.returncode == -signal.SIGKILL and len(lines(run)) < 60
    p = script(NAME, "--resume", run)
    assert p.returncode == 0 and same(weights(run), weights(whole)), p.err
    assert [x["loss"] for x in lines(run)] == [x["loss"] for x in lines(whole)]
    assert lines(run, "val") == lines(whole, "val")


def test_two_processes_train_as_one(flags, whole, script, tmp_path):
    prefix = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    p = script(NAME, *flags, "--num-samples", 11, prefix=prefix, env={"OMP_NUM_THREADS": "1"})
    assert p.returncode == 0, p.err
    run = newest_run(tmp_path)
    got, want = ([x["loss"] for x in lines(r)] for r in (run, whole))
    assert got == pytest.approx(want, rel=2e-3) and got[:5] == pytest.approx(want[:5], rel=1e-5)
    got, want = ([x["grad_norm"] for x in lines(r)[:5]] for r in (run, whole))
    assert got == pytest.approx(want, rel=1e-3)
    assert len(list((tmp_path / "logs/rf").iterdir())) == 1
    assert lines(run, "val")[-1]["loss"] == pytest.approx(lines(whole, "val")[-1]["loss"], rel=2e-3)
    both, alone = (np.asarray(Image.open(r / "samples/step_00000060.png"), int) for r in (run, whole))
    top = slice(0, alone.shape[0] - 2)  # the first ten samples, drawn by two processes and by one
    assert np.abs(both[top] - alone[top]).mean() < 1


COUNTING = """
import rf_dit_cifar as rf, common
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

exchanges = []

class Counted(rf.nn.parallel.DistributedDataParallel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, self.counted)

    def counted(self, state, bucket):
        exchanges.append(1)
        return allreduce_hook(state, bucket)

rf.nn.parallel.DistributedDataParallel = Counted
rf.train(common.parse(rf.Config, ""))
print(f"{len(exchanges)} exchanges")
"""


def test_processes_exchange_gradients_once_a_step(few, tmp_path):
    (tmp_path / "counting.py").write_text(COUNTING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    more = [*TINY, "--dataset", few, "--steps", 3, "--grad-accum", 4, "--eval-every", 0]
    here = {
        "OMP_NUM_THREADS": "1",
        "DIFFUSION_LOGS": str(tmp_path),
        "PYTHONPATH": str(Path(rf.__file__).parent),
    }
    p = subprocess.run(
        [*command, tmp_path / "counting.py", *map(str, more)],
        env=os.environ | here,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert p.returncode == 0 and p.stdout.count("3 exchanges") == 2, p.stdout + p.stderr


def test_more_processes_than_images(script, tmp_path):
    """One image, of which one sample is drawn: the second process has none to evaluate."""
    (tmp_path / "one").mkdir()
    Image.fromarray(np.full((16, 16), 200, np.uint8)).save(tmp_path / "one" / "image.png")
    prefix = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    more = ["--dataset", tmp_path / "one", "--num-samples", 1, "--steps", 2, "--sample-every", 1]
    p = script(NAME, *TINY, *more, prefix=prefix, env={"OMP_NUM_THREADS": "1"})
    assert p.returncode == 0, p.err
    assert lines(newest_run(tmp_path), "val")[-1]["loss"] > 0


def test_sampled_by_its_own_sampler_and_by_ddim_sample(whole, main):  # noqa: F811
    more = ["--set", "solver=heun", "--guidance", 3, "--guidance-interval", 0.1, 0.9, "--num-samples", 10]
    out = main(whole, "--solver", "own", *more)
    assert "NFE 7 network passes per sample, 6 of them doubled" in out
    assert list((whole / "samples").glob("step_00000060_own_w3_seed0_*0.1+0.9*heun*.gif"))
    main(whole, "--steps", 4, "--num-samples", 10, "--npz")
    (file,) = (whole / "samples").glob("*.npz")
    assert np.load(file)["arr_0"].shape == (10, 16, 16, 1)
