"""The ideas in tests/forks: each patch is small, trains what its paper says, resumes bit for bit, is sampled.

A loss or sampler that is nearly right also trains, so each is checked against numbers that it cannot reach by
accident: closed forms, exact minima, exact orders.
"""

import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_ddim_sample
import test_faults
import torch
from PIL import Image
from test_ddim_sample import GAUSSIAN, PATHS, arrays, exact, last, main, order, transported  # noqa: F401
from test_faults import SMALL, at_step, same, weights
from test_faults import train as train_script
from torch import nn

import common

ROOT = Path(__file__).parent.parent
# The most lines that each may change. A hunk counts as its added or its removed lines, whichever are more.
BUDGETS = {"ot": 6, "xpred": 14, "selfcond": 21, "convnext": 21, "lion": 20, "meanflow": 60, "edm": 51}
FORKS = tuple(BUDGETS)  # those of rf_dit_cifar.py that the tests for all of them train
BUDGETS |= {"attributes": 9, "inpaint": 37, "deis": 22, "onestep": 150}
every_fork = pytest.mark.parametrize("name", FORKS)


def split(name):
    """(header, diff) of a patch."""
    text = (ROOT / "tests/forks" / f"{name}.patch").read_text()
    return text[: text.index("--- a/")], text[text.index("--- a/") :]


@pytest.fixture
def fork(tmp_path):
    """fork(name) -> the patched script, imported from an own folder in tmp_path."""

    def fork(name):
        file = tmp_path / name / re.match(r"--- a/(\S+)", split(name)[1])[1]
        file.parent.mkdir()
        shutil.copy(ROOT / file.name, file)
        patch = ROOT / "tests/forks" / f"{name}.patch"
        subprocess.run(["patch", "-p1", "-s", "-i", str(patch)], cwd=file.parent, check=True)
        return load(f"fork_{name}", file)

    return fork


def load(name, file):
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(script, *flags) in this process, without evaluations and pictures; -> its newest run."""

    def train(script, *flags, status=0):
        heads = ["--heads", 2] * hasattr(script.Config, "heads")
        if not hasattr(script.Config, "sampling_steps"):
            kept = [x for x in test_faults.TINY if x not in ("--sampling-steps", "4")]
            monkeypatch.setattr(test_faults, "TINY", kept)
        monkeypatch.setitem(
            SMALL, script, [*"--dim 32 --depth 1 --patch 4 --warmup 0".split(), *map(str, heads)]
        )
        quiet = [] if "--resume" in flags else ["--eval-every", 0, "--sample-every", 0]
        left, run = train_script(script, tmp_path / "logs", monkeypatch, *quiet, *flags)
        assert left == status
        return run

    return train


def losses(run):
    return [json.loads(x)["loss"] for x in (run / "metrics/loss.jsonl").read_text().splitlines()]


def tiny(script, **more):
    """(Config, a network with random weights in all layers)."""
    cfg = script.Config(**{"dim": 32, "depth": 1, "patch": 4, "shape": (1, 16, 16)} | more)
    torch.manual_seed(0)
    model = script.build_model(cfg).eval().requires_grad_(False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return cfg, model


class Constant(nn.Module):
    """A network that returns `out`, whatever it is given."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x, *_):
        return self.out.repeat(len(x) // len(self.out), 1, 1, 1)


# ------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("name", BUDGETS)
def test_patches_are_small_and_say_what_they_are(name):
    header, diff = split(name)
    hunks = [h.splitlines() for h in re.split(r"^@@.*\n", diff, flags=re.M)[1:]]
    changed = sum(max(sum(x[0] == c for x in h) for c in "+-") for h in hunks)
    assert changed <= BUDGETS[name], f"{changed} changed lines"
    assert 3 <= header.count("\n") <= 6 and "\nVerdict: " in header
    assert name == "attributes" or re.search(r"\(arXiv:\d{4}\.\d{5}\)", header)
    assert all(len(x) <= 111 for x in diff.splitlines()[2:]), "a line is too long"


def squared(x):
    return x.square().mean((1, 2, 3))


def first_loss(name, x0, y, eps, u):
    """The loss at step 0, when networks return 0. u: evenly spread over [0, 1], the times of most forks."""
    t = u.view(-1, 1, 1, 1)
    if name == "ot":  # the best of all pairings within classes
        every = torch.tensor(list(itertools.permutations(range(6))))
        assert len(pairs := every[(y[every] == y).all(1)]) == 6  # three of the images are a 4
        return min((eps[p] - x0).square().mean() for p in pairs)
    if name == "xpred":
        return squared(x0 / t.clamp(min=0.05)).mean()
    if name == "meanflow":  # the JVP of a network that is 0 is 0
        loss = squared(eps - x0)
        return (loss / (loss + 1e-3).sqrt()).mean()
    if name == "edm":
        sigma = (-1.2 + 1.2 * torch.special.ndtri(t)).exp()
        denoised = 0.25 / (sigma**2 + 0.25) * (x0 + sigma * eps)
        return ((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * (denoised - x0) ** 2).mean()
    return squared(eps - x0).mean()


@every_fork
def test_first_loss_is_a_closed_form(name, fork, train):
    script = fork(name)
    run = train(script, "--bs", 6, "--steps", 1, *["--adaptive", 0.5] * (name == "meanflow"))
    x0, y = common.Batches(common.load_dataset("digits", image_size=16), 6, 0, "cpu")(0)
    generator = torch.Generator().manual_seed(common.derive_seed(0, "noise", 0))
    eps, u = (f(*n, generator=generator) for f, n in ((torch.randn, x0.shape), (torch.rand, (2, 6))))
    want = first_loss(name, x0, y, eps, (torch.arange(6) + u[0]) / 6).item()
    assert losses(run) == [pytest.approx(want, rel=2e-5)]
    parent = first_loss("rf", x0, y, eps, u[0]).item()
    assert (abs(want / parent - 1) > 1e-3) == (name not in ("selfcond", "convnext", "lion"))


@every_fork
def test_estimates_belong_to_the_point_on_the_path(name, fork):
    """x = alpha x0 + sigma eps, with any guidance, at any time; guidance is linear."""
    script = fork(name)
    cfg, model = tiny(script)
    x, y = torch.randn(2, 1, 16, 16), torch.tensor([3, 7])
    for t, s in ((0.001, 0.0), (0.3, 0.1), (0.7, 0.7), (1.0, None)):
        t = torch.full((2,), t)
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in script.path(t, cfg))
        z, out = x * math.hypot(alpha[0], sigma[0]), {}
        for w in (0, 1, 2):
            args = (w,) if s is None else (w, torch.full((2,), s))
            x0, eps = out[w] = torch.stack(script.predict(model, z, t, y, cfg, *args))
            torch.testing.assert_close(alpha * x0 + sigma * eps, z, rtol=1e-4, atol=1e-4)
        assert (out[1] - out[0]).square().mean() > 1e-4 * out[1].square().mean()
        tolerance = 1e-3 * out[1].square().mean((1, 2, 3, 4), keepdim=True).sqrt().max().item()
        torch.testing.assert_close(out[2], 2 * out[1] - out[0], rtol=1e-3, atol=tolerance)


@every_fork
@pytest.mark.parametrize("training", [True, False])
def test_the_network_with_the_least_loss_gives_the_image_and_its_noise(name, fork, training):
    """The loss is quadratic in the network's output: one step of Newton's method finds its minimum."""
    script = fork(name)
    cfg = script.Config(shape=(1, 3, 3))
    for i, t in enumerate((0.06, 0.5, 0.94)):
        generator = torch.Generator().manual_seed(i)
        x0, eps, start = torch.randn(3, 1, 1, 3, 3, generator=generator)
        t, y = torch.tensor([t]), torch.tensor([2])

        def loss(out, x0=x0, y=y, t=t, eps=eps):
            torch.manual_seed(0)  # the same draws at each call
            return script.loss_per_sample(Constant(out).train(training), x0, y, t, eps, cfg).sum()

        start.requires_grad_()
        (g,) = torch.autograd.grad(loss(start), start)
        hessian = torch.autograd.functional.hessian(loss, start).view(9, 9)
        best = start.detach() - torch.linalg.solve(hessian, g.flatten()).view_as(g)
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in script.path(t, cfg))
        for w in (1.0, 3.0):
            got = script.predict(Constant(best), alpha * x0 + sigma * eps, t, y, cfg, w, t / 2)
            torch.testing.assert_close(torch.stack(got), torch.stack([x0, eps]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*FORKS, "onestep"])
def test_compiled_runs_resume_bit_for_bit(name, fork, train, monkeypatch, two_threads):
    """Stopped by a signal after step 6, and again when continued from step 2."""
    script, rf = fork(name), ROOT / "rf_dit_cifar.py"
    teacher = train(load("teacher", rf), "--dim", 128, "--steps", 1) if name == "onestep" else None
    torch._dynamo.reset()  # forgets what other tests compiled; after eight graphs it gives up
    torch._dynamo.utils.counters.clear()
    flags = "--dim 128 --bs 64 --steps 500 --save-every 2 --keep 9 --compile auto".split()
    flags += ["--teacher", teacher] if teacher else []

    def stopped(*more):
        with monkeypatch.context() as m:
            at_step(m, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
            return train(script, *more, status=common.EXIT_PREEMPTED)

    run = stopped(*flags)
    if teacher:  # it is in the checkpoint
        shutil.rmtree(teacher)
    whole, before = weights(run), losses(run)
    assert whole[0] == len(before) == 6 and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    stopped("--resume", run / "checkpoints/step_00000002.pt")
    assert same(weights(run), whole) and losses(run) == before


@every_fork
def test_runs_are_sampled_without_the_fork(name, fork, train, main):  # noqa: F811
    """By the run's own code, in one step and in four."""
    script = fork(name)
    run = train(script, "--steps", 1)
    file = run / "checkpoints/step_00000001.pt"
    state = common.load_checkpoint(file)
    _, model = tiny(script)
    torch.save(state | {"ema": model.state_dict()}, file)
    shutil.rmtree(Path(script.__file__).parent)
    (code,) = (f for f in (run / "code").glob("*.py") if f.name != "common.py")
    script = load("snapshot", code)
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in state["config"].items()}
    cfg, y = script.Config(**config), torch.arange(3)
    model = script.build_model(cfg).eval().requires_grad_(False)
    model.load_state_dict(common.load_checkpoint(file)["ema"])
    seeds = [common.derive_seed(0, "sample", i) for i in range(3)]
    noise = [torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(i)) for i in seeds]
    for steps in (1, 4):
        out = main(run, "--steps", steps, "--num-samples", 3, "--guidance", 2, "--npz", "--frames", 0)
        passes = steps * (1 + (name == "selfcond"))
        assert f"NFE {passes} network passes per sample, {passes} of them doubled" in out
        got, labels, _ = arrays(run / "samples")
        shutil.rmtree(run / "samples")
        x, times = torch.stack(noise), torch.linspace(1, 0, steps + 1)
        for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
            (_, s_t), (a_s, s_s) = (script.path(u, cfg) for u in (t, s))
            x = x * math.hypot(1 - (script.METHOD != "edm"), s_t) if i == 0 else x
            t, s = t.expand(3), s.expand(3)
            x0, eps = script.predict(model, x, t, y, cfg, 2.0, s)
            x = a_s * x0 + s_s * eps
        want = (x.clamp(-1, 1) * 127.5 + 127.5).round()
        assert labels.tolist() == [0, 1, 2] and 0.2 < (want % 255 > 0).float().mean()
        difference = torch.from_numpy(got).float().squeeze(-1) - want.squeeze(1)
        assert difference.abs().max() <= (steps > 1)  # rounding


# ------------------------------------------------------------------------------------------------
# One by one


def test_attributes_in_place_of_classes(tmp_path, fork, train, main, monkeypatch):  # noqa: F811
    """y is two numbers per image, read from a table by file name."""
    script, table, seen, original = fork("attributes"), [], [], common.Batches.__call__
    monkeypatch.chdir(tmp_path)
    for i in range(60):
        file = tmp_path / "set" / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 4 * i, np.uint8)).save(file)
        table.append(f"{file.name} {i / 60},{i % 2}\n")
    (tmp_path / "attributes.txt").write_text("".join(table))
    monkeypatch.setattr(
        common.Batches, "__call__", lambda *args: seen.append(original(*args)) or original(*args)
    )
    run = train(script, "--dataset", "set", "--image-size", 0, "--steps", 4, "--save-every", 2)
    for x, y in seen:
        i = ((x[:, 0, 0, 0] + 1) * 127.5 / 4).round()
        torch.testing.assert_close(y, torch.stack([i / 60, i % 2], 1))
    whole = weights(run)
    (tmp_path / "here").mkdir()
    main(run, "--classes", "0.2,1", "0.9,0", "--num-samples", 3, "--steps", 2, "--npz", "--out", "here")
    _, labels, _ = arrays(tmp_path / "here")
    np.testing.assert_allclose(labels, [[0.2, 1], [0.9, 0], [0.2, 1]], rtol=1e-6)
    assert same(weights(train(script, "--resume", run / "checkpoints/step_00000002.pt")), whole)


def test_ot_pairs_classes_of_the_whole_batch_and_leaves_labels_and_evaluation(fork, train, monkeypatch):
    script, calls = fork("ot"), []
    original = script.loss_per_sample

    def spy(model, x0, y, t, eps, cfg):
        calls.append((torch.is_grad_enabled(), x0, y, eps))
        return original(model, x0, y, t, eps, cfg)

    monkeypatch.setattr(script, "loss_per_sample", spy)
    train(script, "--bs", 6, "--grad-accum", 2, "--steps", 1, "--class-dropout", 0, "--guidance", 1)
    (x, y), *parts = common.Batches(common.load_dataset("digits", image_size=16), 6, 0, "cpu")(0), *calls[-2:]
    x0, labels, eps = (torch.cat(v) for v in list(zip(*parts, strict=True))[1:])
    assert torch.equal(x0, x) and torch.equal(labels, y)
    generator = torch.Generator().manual_seed(common.derive_seed(0, "noise", 0))
    drawn = torch.randn(x.shape, generator=generator)
    cost = (x[:, None] - drawn).square().sum((2, 3, 4))
    pairs = [p for p in itertools.permutations(range(6)) if torch.equal(y[list(p)], y)]
    best = min(pairs, key=lambda p: sum(cost[i, j] for i, j in enumerate(p)))
    assert best != (*range(6),) and torch.equal(eps, drawn[list(best)])
    evaluated = next(eps for training, _, _, eps in calls if not training)
    generator = torch.Generator().manual_seed(common.derive_seed("evaluate"))
    assert torch.equal(evaluated, torch.randn(8, 1, 16, 16, generator=generator))


def test_xpred_divides_by_small_times_neither_in_the_loss_nor_wrongly(fork):
    script = fork("xpred")
    cfg, t = script.Config(shape=(1, 3, 3)), torch.tensor([0.01])
    out, x0, eps = torch.randn(3, 1, 1, 3, 3)
    loss = script.loss_per_sample(Constant(out), x0, torch.tensor([1]), t, eps, cfg)
    torch.testing.assert_close(loss, squared(out - x0) / 0.05**2)
    got, _ = script.predict(Constant(out), eps, t, torch.tensor([1]), cfg)
    assert torch.equal(got, out)


def test_selfcond_sees_its_own_estimate(fork):
    """Always in evaluation and sampling, and in half of the training batches."""
    script, calls = fork("selfcond"), []
    cfg, model = tiny(script)
    hook = lambda m, args, out: calls.append((args[0].chunk(2, dim=-1), out))  # noqa: E731
    model.patch_embed.register_forward_hook(hook)
    x, y, t = torch.randn(2, 1, 16, 16), torch.tensor([1, 2]), torch.tensor([0.4, 0.8])
    v = model(x, t, y)
    script.predict(model, x, t, y, cfg)
    ((_, nothing), _), ((again, zeros), _), ((same_x, estimate), _) = calls
    assert not nothing.any() and not zeros.any() and torch.equal(again, same_x)
    want = script.patchify(x - t.view(-1, 1, 1, 1) * v, 4)
    torch.testing.assert_close(estimate, want, rtol=1e-5, atol=1e-5)
    for training, low, high in ((False, 40, 40), (True, 10, 30)):
        calls.clear()
        for i in range(40):
            torch.manual_seed(i)
            script.loss_per_sample(model.train(training), x, y, t, torch.randn_like(x), cfg)
        assert low <= len(calls) - 40 <= high
    model.requires_grad_(True)
    torch.manual_seed(int(torch.rand(()) > 2))
    calls.clear()
    script.loss_per_sample(model.eval(), x, y, t, torch.randn_like(x), cfg).mean().backward()
    assert [out.requires_grad for _, out in calls] == [False, True]  # no gradient through the estimate


def test_convnext_sees_three_tokens_far_in_every_direction(fork):
    script = fork("convnext")
    cfg, model = tiny(script, patch=1)
    x, t, y = torch.randn(1, 1, 16, 16), torch.tensor([0.5]), torch.tensor([4])
    seen = torch.autograd.functional.jacobian(lambda x: model(x, t, y)[0, 0, 8, 8], x)[0, 0] != 0
    want = torch.zeros(16, 16, dtype=torch.bool)
    want[5:12, 5:12] = True
    assert torch.equal(seen, want)
    moved = model(x.roll((1, 2), (2, 3)), t, y).roll((-1, -2), (2, 3))
    torch.testing.assert_close(moved[..., 3:-4, 3:-5], model(x, t, y)[..., 3:-4, 3:-5], rtol=1e-4, atol=1e-4)
    assert not any(
        p.ndim == 4
        for g in script.make_optimizer(model.requires_grad_(), cfg, torch.float32).param_groups[:1]
        for p in g["params"]
    )


def test_lion_is_algorithm_2_and_never_applies_what_is_not_finite(fork, train, monkeypatch):
    script = fork("lion")
    cfg, model = tiny(script, weight_decay=0.1)
    optimizer = script.make_optimizer(model.requires_grad_(), cfg, torch.float32)
    assert sorted({g["weight_decay"] for g in optimizer.param_groups}) == [0, 0.1]
    start, momentum = [p.clone() for p in model.parameters()], {}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for _ in range(3):
        for p, before in zip(model.parameters(), start, strict=True):
            p.grad = torch.randn_like(p)
            m = momentum.get(id(p), torch.zeros_like(p))
            lr, update = cfg.lr / 5, (0.9 * m + 0.1 * p.grad).sign()  # at step 0, sign(g)
            before.copy_(before - lr * (update + decay[id(p)] * before))
            momentum[id(p)] = 0.99 * m + 0.01 * p.grad
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        torch.testing.assert_close([*model.parameters()], start, rtol=1e-6, atol=1e-7)
    before = (
        [p.clone() for p in model.parameters()],
        [s["momentum"].clone() for s in optimizer.state.values()],
    )
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = [*model.parameters()], [s["momentum"] for s in optimizer.state.values()]
    assert same(after, before)

    original, calls = script.loss_per_sample, []

    def sabotaged(model, *args):
        calls.append(torch.is_grad_enabled())
        return original(model, *args) * (float("nan") if calls[-1] and calls.count(True) == 3 else 1)

    monkeypatch.setattr(script, "loss_per_sample", sabotaged)  # the first call is a trial
    run = train(script, "--steps", 4, "--save-every", 1, "--keep", 9)
    state = [common.load_checkpoint(f) for f in sorted((run / "checkpoints").iterdir())]
    moved = [
        any(not torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        for a, b in itertools.pairwise(state)
    ]
    assert losses(run)[1] is None and moved == [False, True, True]


def test_meanflow_trains_on_its_identity(fork, monkeypatch):
    """Its target has the derivative of u along the path, here by a central difference in float64."""
    script, h = fork("meanflow"), 1e-4
    cfg, model = tiny(script, adaptive=0.0, flow_ratio=0.7)
    model, calls, (f, g) = model.double().train(), [], torch.randn(2, 6, 1, 16, 16, dtype=torch.float64)
    k = torch.exp(-math.log(1e4) * torch.arange(128, dtype=torch.float64) / 128)
    sinusoids = lambda t, dim: torch.cat([(1000 * t[:, None] * k).cos(), (1000 * t[:, None] * k).sin()], 1)  # noqa: E731
    monkeypatch.setattr(script.common, "time_embedding", sinusoids)
    model.y_embed.register_forward_pre_hook(lambda m, args: args[0].double())
    y, t = torch.arange(6), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    hook = model.register_forward_pre_hook(lambda m, args: calls.append(args))
    loss = script.loss_per_sample(model, f, y, t, g, cfg)
    hook.remove()
    x, t, y, s = calls[-1]
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in (1 - t, t))
    torch.testing.assert_close(x, alpha * f + sigma * g)
    assert (s <= t).all() and 0 < (s < t).sum() < 6 and s.min() > 0
    v, u = g - f, model(x, t, y, s)
    slope = (model(x + h * v, t + h, y, s) - model(x - h * v, t - h, y, s)) / (2 * h)
    assert slope[s < t].square().mean() > 0.1
    want = squared(u - v + (t - s).view(-1, 1, 1, 1) * slope)
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6)
    model.eval()  # in evaluation, the velocity's own loss
    loss = script.loss_per_sample(model, f, y, t, g, cfg).double()
    torch.testing.assert_close(loss, squared(model(x, t, y, t) - v), rtol=1e-4, atol=1e-6)


def test_meanflow_has_the_paper_s_ratio_and_steps_by_its_average_velocity(fork):
    script, s = fork("meanflow"), []
    cfg, model = tiny(script)
    y, x = torch.zeros(64, dtype=torch.long), torch.randn(2, 64, 1, 16, 16)
    hook = model.train().register_forward_pre_hook(lambda m, args: s.append((args[1], args[3])))
    for i in range(8):
        torch.manual_seed(i)
        script.loss_per_sample(model, x[0], y, script.sample_t(torch.rand(64), cfg), x[1], cfg)
    hook.remove()
    t, s = (torch.cat(v) for v in zip(*s[1::2], strict=True))
    assert 0.2 < (s < t).float().mean() < 0.3
    assert (t - s)[s < t].mean() == pytest.approx(1 / 3, abs=0.06)  # of two independent uniform times
    t, s, x, y = torch.full((3,), 0.8), torch.full((3,), 0.2), x[0, :3], torch.arange(3)
    x0, eps = script.predict(model.eval(), x, t, y, cfg, s=s)
    torch.testing.assert_close(0.8 * x0 + 0.2 * eps, x - 0.6 * model(x, t, y, s), rtol=1e-4, atol=1e-4)
    assert (model(x, t, y, s) - model(x, t, y, t)).abs().max() > 0.1


def test_edm_is_sampled_by_the_paper_s_algorithm_1(fork):
    script = fork("edm")
    cfg, model = tiny(script, guidance=1.0)
    model, y, n, d = model.float(), torch.tensor([1, 5]), 8, test_ddim_sample.d
    grid = d.time_grid(lambda t: script.path(t, cfg), n, "karras")
    i = np.arange(n)
    levels = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # eq. 5
    sigma = script.path(torch.tensor([*(1 - i / (n - 1))]), cfg)[1]
    np.testing.assert_allclose(sigma, [*levels[:-1], 0], rtol=1e-4)
    sigmas = [s for _, _, s in grid]
    np.testing.assert_allclose(sigmas, [*levels, 0], rtol=2e-3)
    times = {round(s, 9): t for t, _, s in grid}

    def denoise(x, s):  # eq. 7, table 1
        out = model(x / math.sqrt(s**2 + 0.25), torch.full((2,), times[round(s, 9)]), y)
        return 0.25 / (s**2 + 0.25) * x + s * 0.5 / math.sqrt(s**2 + 0.25) * out

    eps = torch.randn(2, 1, 16, 16)
    run = d.Run(Path("run"), script, cfg, [model], 0, None, True, torch.device("cpu"))
    flags = d.Config(solver="heun", steps=n, spacing="karras", clip_x0="off", guidance=1.0)
    got, _ = d.solve(run, flags, eps, y)
    x = eps * math.hypot(1, sigmas[0])
    for s, r in itertools.pairwise(sigmas):  # algorithm 1
        slope = (x - denoise(x, s)) / s
        z = x + (r - s) * slope
        if r:
            z = x + (r - s) * (slope + (z - denoise(z, r)) / r) / 2
        x = z
    assert x.std() > 0.1
    torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m"])
def test_inpaint_keeps_the_known_pixels(solver, fork, train, main, tmp_path, monkeypatch):  # noqa: F811
    """And only these; what the network sees of them has the noise of its time."""
    d, seen, pictures = fork("inpaint"), [], []
    monkeypatch.setattr(test_ddim_sample, "d", d)  # of main()
    monkeypatch.setattr(d, "draw_grid", lambda path, x, **_: pictures.append((path, x)))
    original = d.load_run

    def load_run(*args):
        run, flags = original(*args)
        predict = run.script.predict

        def spy(model, x, t, *more):
            seen.append((t[0].item(), x.clone()))
            return predict(model, x, t, *more)

        monkeypatch.setattr(run.script, "predict", spy)
        return run, flags

    monkeypatch.setattr(d, "load_run", load_run)
    run = train(load("rf_of_inpaint", ROOT / "rf_dit_cifar.py"), "--steps", 1)
    holes = np.zeros((16, 16), np.uint8)
    holes[4:9, 3:14] = 255
    Image.fromarray(holes).save(tmp_path / "hole.png")
    held_out = common.load_dataset("digits", split="test", image_size=16)
    for classes in ([], ["--classes", 3]):
        flags = ["--inpaint", tmp_path / "hole.png", "--solver", solver, "--steps", 5, "--num-samples", 23]
        main(run, *flags, "--bs", 9, *classes)
        path, x = pictures.pop()
        assert path.name.endswith("_inpaint_hole")
        image, masked, filled = x.unflatten(0, (23, 3)).unbind(1)
        known = torch.from_numpy(holes == 0).expand_as(image)
        pick = held_out.labels == 3 if classes else slice(None)
        there = held_out.images[pick].flatten(1) / 127.5 - 1
        assert all((there == v).all(1).any() for v in image.flatten(1))
        assert torch.equal(filled[known], image[known]) and torch.equal(masked[known], image[known])
        assert (filled != image)[~known].float().mean() > 0.99 and not masked[~known].any()
        assert (filled[:1] != filled[1:])[~known[1:]].float().mean() > 0.99
    known, batches = known[0], [x for t, x in seen if t == pytest.approx(0.4)]
    x = torch.cat(batches[-3:])[:, known[None]] if known.ndim == 2 else torch.cat(batches[-3:])[:, known]
    noise = (x - 0.6 * image[:, known]) / 0.4
    assert noise.std() == pytest.approx(1, abs=0.05) and abs(noise.mean()) < 0.05
    earlier = torch.cat([x for t, x in seen if t == pytest.approx(0.6)][-3:])[:, known]
    assert abs(((earlier - 0.4 * image[:, known]) / 0.6 * noise).mean()) < 0.05  # new noise at each pass


@pytest.mark.parametrize("start", [50, 1])
@pytest.mark.parametrize("path", PATHS)
def test_deis_has_order_3(path, start, fork):
    """Against the exact solution for Gaussian data. From sigma / alpha = 1, the first steps count."""
    d, (means, sd), counts, errors = fork("deis"), GAUSSIAN, (32, 64, 128, 256), []
    for n in counts:
        noisy = torch.linspace(start**0.25, 0, n + 1, dtype=torch.float64) ** 4
        t = noisy.atan() * 2 / math.pi if path == "cosine" else noisy / (1 + noisy)
        grid = list(zip(*(v.tolist() for v in (t, *PATHS[path](t))), strict=True))
        _, a, s = grid[0]
        x = torch.linspace(-1.9, 2.1, 8, dtype=torch.float64)
        end = means[0] + sd * (x - a * means[0]) / math.hypot(a * sd, s)
        errors.append((last(d.deis(exact(PATHS[path], means, sd), x, grid)) - end).abs().mean().item())
    assert order(counts, errors) == pytest.approx(3, abs=0.25), errors
    assert errors[-1] < 5e-5


def test_deis_from_pure_noise_and_in_few_steps(fork):
    """From t = 1, where alpha = 0: one pass per step, two in the first two; one step is DDIM's."""
    d, calls = fork("deis"), []
    x, f = torch.linspace(-1.9, 2.1, 8, dtype=torch.float64), exact(PATHS["straight"], *GAUSSIAN)
    for n, passes in ((1, 1), (2, 3), (10, 12), (100, 102)):
        calls.clear()
        grid = d.time_grid(PATHS["straight"], n, "trailing")
        got = last(d.deis(lambda *a: calls.append(a) or f(*a), x, grid))
        assert len(calls) == passes
        if n == 1:
            torch.testing.assert_close(got, last(d.ddim(f, x, grid)))
    torch.testing.assert_close(got, transported(x, *GAUSSIAN), rtol=0, atol=1e-3)


def test_deis_is_a_flag(fork, train, main, monkeypatch):  # noqa: F811
    run = train(load("rf_of_deis", ROOT / "rf_dit_cifar.py"), "--steps", 1)
    monkeypatch.setattr(test_ddim_sample, "d", fork("deis"))  # of main()
    assert "NFE 17 network passes per sample" in main(run, "--solver", "deis", "--num-samples", 2)


@pytest.fixture
def distilled(fork, train):
    """(the script, a run of one step, its teacher: a network with random weights)."""
    script, rf = fork("onestep"), load("rf_of_onestep", ROOT / "rf_dit_cifar.py")
    run = train(rf, "--steps", 1, "--class-dropout", 0.2)
    cfg, model = tiny(rf, heads=2)
    file = run / "checkpoints/step_00000001.pt"
    torch.save(common.load_checkpoint(file) | {"ema": model.state_dict()}, file)
    return script, train(script, "--teacher", run, "--bs", 6, "--steps", 1), model


def test_onestep_begins_with_its_teacher_and_its_flags(distilled):
    """And the loss of the first step is that of the teacher for images that it draws itself."""
    script, run, teacher = distilled
    state = common.newest_checkpoint(run)
    assert state["config"]["dataset"] == "digits" and state["config"]["class_dropout"] == 0.2
    _, y = common.Batches(common.load_dataset("digits", image_size=16), 6, 0, "cpu")(0)
    generator = torch.Generator().manual_seed(common.derive_seed(0, "noise", 0))
    z = torch.randn(6, 1, 16, 16, generator=generator)
    u = torch.rand(2, 6, generator=generator)
    y, t = torch.where(u[1] < 0.2, 10, y), (torch.arange(6) + u[0]) / 6
    torch.manual_seed(common.derive_seed(0, "dropout", 0, 0))
    noise, at = torch.randn(z.shape), t.view(-1, 1, 1, 1)
    x0 = (0.75 * z - 0.75 * teacher(0.75 * z, torch.full((6,), 0.75), y)).clamp(-1, 1)
    assert 0.1 < (x0.abs() < 1).float().mean()
    want = (teacher((1 - at) * x0 + at * noise, t, y) - (noise - x0)).square().mean()
    assert losses(run) == [pytest.approx(want.item(), rel=2e-5)]
    moved = {}
    for name, p in teacher.state_dict().items():
        assert torch.equal(state["model"][f"teacher.{name}"], p) and torch.equal(
            state["ema"][f"teacher.{name}"], p
        )
        moved[name] = [(state["model"][f"{net}.{name}"] - p).norm() for net in ("generator", "fake")]
    ratios = torch.tensor(
        [g / f for n, (g, f) in moved.items() if "blocks." in n and teacher.get_parameter(n).ndim == 2]
    )
    assert all(g > 0 and f > 0 for g, f in moved.values())
    torch.testing.assert_close(
        ratios, torch.full_like(ratios, 0.1), rtol=0.3, atol=0
    )  # Muon's updates: equal norms


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_onestep_moves_images_by_the_difference_of_the_scores(fork, w):
    """For Gaussian images and a Gaussian teacher, whose scores are known; the condition moves its mean."""
    script = fork("onestep")
    cfg, n = script.Config(shape=(1, 3, 3), teacher_guidance=w), 5
    images = 0.4 * torch.randn(n, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0] = torch.tensor([-1.5, 0.3, 1.5])
    images.requires_grad_()
    eps, t, y = torch.randn(n, 1, 3, 3), torch.linspace(0.1, 0.9, n), torch.arange(n)

    def score(x, t, mean, sd):
        x = x.detach().requires_grad_()
        t = t.view(-1, 1, 1, 1)
        density = torch.distributions.Normal((1 - t) * mean, ((1 - t) ** 2 * sd**2 + t**2).sqrt())
        return torch.autograd.grad(density.log_prob(x).sum(), x)[0]

    def denoised(part, x, t, y):  # Tweedie's formula
        sigma, mean = t.view(-1, 1, 1, 1), torch.where(y == 10, 0.0, 0.1 * (y + 1.0)).view(-1, 1, 1, 1)
        s = score(x, t, 0.2, 0.4) if part == "fake" else score(x, t, mean, 0.3)
        return (x + sigma**2 * s) / (1 - sigma)

    def model(x, t, y, part="generator"):
        if part == "generator":
            torch.testing.assert_close((x, t), (0.75 * eps, torch.full((n,), 0.75)))
            return (x - images) / 0.75
        with torch.enable_grad():
            return ((x - denoised(part, x, t, y)) / t.view(-1, 1, 1, 1)).detach()

    torch.manual_seed(1)
    loss = script.loss_per_sample(model, torch.full_like(eps, math.nan), y, t, eps, cfg)
    (got,) = torch.autograd.grad(loss.sum(), images)
    torch.manual_seed(1)
    noise, at, fake = torch.randn(eps.shape), t.view(-1, 1, 1, 1), images.detach().clamp(-1, 1)
    x = (1 - at) * fake + at * noise
    torch.testing.assert_close(loss, squared(model(x, t, y, "fake") - (noise - fake)))
    real = w * denoised("teacher", x, t, y) + (1 - w) * denoised("teacher", x, t, torch.full_like(y, 10))
    scale = (fake - real).abs().mean((1, 2, 3), keepdim=True) + 1e-3  # eq. 8
    want = (denoised("fake", x, t, y) - real) / scale
    want = torch.where(images.abs() < 1, want, 0.0)
    torch.testing.assert_close(got, want / 9, rtol=1e-4, atol=1e-5)


def test_onestep_draws_without_fork_and_teacher_in_one_step_only(distilled, main, capsys):  # noqa: F811
    script, run, teacher = distilled
    file = run / "checkpoints/step_00000001.pt"
    state = common.load_checkpoint(file)
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.15)
    ema = {k: v * 0 for k, v in state["ema"].items()}
    ema |= {f"generator.{k}": v for k, v in teacher.state_dict().items()}
    torch.save(state | {"ema": ema}, file)
    shutil.rmtree(Path(script.__file__).parent)
    out = main(run, "--steps", 1, "--num-samples", 3, "--npz", "--frames", 0)
    assert "NFE 1 network passes per sample\n" in out
    got, labels, _ = arrays(run / "samples")
    seeds = [common.derive_seed(0, "sample", i) for i in range(3)]
    z = torch.stack([torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(i)) for i in seeds])
    x0 = 0.75 * (z - teacher(0.75 * z, torch.full((3,), 0.75), torch.arange(3)))
    want = (x0.clamp(-1, 1) * 127.5 + 127.5).round()
    difference = torch.from_numpy(got).float().squeeze(-1) - want.squeeze(1)
    assert labels.tolist() == [0, 1, 2] and 0.2 < (want % 255 > 0).float().mean()
    assert difference.abs().max() <= 1
    shutil.rmtree(run / "samples")
    main(run, "--solver", "own", "--num-samples", 3, "--npz", "--frames", 0)
    assert np.array_equal(arrays(run / "samples")[0], got)
    for wrong in (["--steps", 2], ["--steps", 1, "--guidance", 2]):
        with pytest.raises(SystemExit, match="2"):
            main(run, *wrong, "--num-samples", 2)
        assert "draws in one step" in capsys.readouterr().err


def test_onestep_says_what_is_no_teacher(fork, train, capsys, tmp_path):
    script, rf = fork("onestep"), load("rf_of_onestep", ROOT / "rf_dit_cifar.py")
    command = re.search(r"^python one/rf_dit_cifar.py (.*)$", (ROOT / "README.md").read_text(), re.M)[1]
    assert common.parse(script.Config, "", command.split()).teacher == "logs/rf/RUN"
    run = train(rf, "--steps", 1, "--class-dropout", 0, "--guidance", 1)
    other, wide = tmp_path / "xpred_dit_2026", tmp_path / "rf_dit_wide"
    shutil.copytree(run, other)
    shutil.copytree(run, wide)
    file = wide / "checkpoints/step_00000001.pt"
    state = common.load_checkpoint(file)
    torch.save(state | {"ema": state["ema"] | {"y_embed.weight": torch.zeros(32, 3)}}, file)
    for flags, message in [
        ([], "--teacher is missing"),
        (["--teacher", tmp_path / "none"], "is not a run"),
        (["--teacher", other], "is not a run of rf_dit_cifar.py"),
        (["--teacher", run, "--depth", 2], "--depth is 2, but 1 in"),
        (["--teacher", run], "use --teacher-guidance 1"),
        (["--teacher", run, "--start", 1.5], "at most 1"),
        (["--teacher", wide, "--teacher-guidance", 1], "has another model or other classes"),
    ]:
        train(script, "--steps", 1, *flags, status=2)
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
