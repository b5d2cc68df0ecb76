"""The three training loops: what they train on and evaluate, what they never do, how they go on.

A fork changes model and method; here stands what it may rely on. Each test was seen to fail on a loop that is
wired otherwise: another split, another share of null classes, images mirrored by another step, raw weights.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_ddim_sample import main  # noqa: F401
from test_faults import at_step, same, weights
from test_latent_dit_sdvae import config, small_vae

import common
import ddpm_unet_mnist as ddpm
import latent_dit_sdvae as ld
import rf_dit_cifar as rf

TINY = "--dataset digits --image-size 16 --bs 8 --sampling-steps 4 --num-samples 10 --log-every 1".split()
TINY += "--dtype float32 --warmup 5".split()
SMALL = {
    ddpm: "--width 8 --mults 1 2".split(),
    rf: "--dim 32 --depth 2 --heads 2 --patch 4".split(),
    ld: "--dim 32 --depth 2 --heads 2 --patch 1".split(),
}
every_script = pytest.mark.parametrize("script", SMALL, ids=lambda s: s.__name__)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Flags of the third script: a random VAE and a cache of latents."""
    home = tmp_path_factory.mktemp("vae")
    return ["--vae", small_vae(home / "vae", scaling_factor=0.7), "--cache", str(home / "cache")]


@pytest.fixture
def train(tmp_path, monkeypatch, vae):
    """train(script, *flags) in this process, with logs in tmp_path/NAME; -> its newest run."""

    def train(script, *flags, logs="logs", status=0, compiled=False):
        monkeypatch.setenv("DIFFUSION_LOGS", str(tmp_path / logs))
        handlers, left = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}, 0
        start = [] if "--resume" in flags else [*TINY, *SMALL[script], *(vae if script is ld else ())]
        start += [] if "--resume" in flags else ["--compile", "on" if compiled else "off"]
        with monkeypatch.context() as m:
            m.setattr("sys.stdout", sys.stdout)
            m.setattr("sys.stderr", sys.stderr)
            try:
                with common.exit_on_user_error():
                    script.train(common.parse(script.Config, script.__doc__, [*start, *map(str, flags)]))
            except SystemExit as e:
                left = e.code
            finally:
                for s, h in handlers.items():
                    signal.signal(s, h)
        assert left == status
        return max((tmp_path / logs).glob("*/*"), key=lambda p: p.stat().st_mtime_ns, default=None)

    return train


def lines(run, name="loss"):
    file = run / "metrics" / f"{name}.jsonl"
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


# ---- what goes in


@every_script
def test_the_loop_trains_and_evaluates_as_it_says(script, train, vae, monkeypatch):
    """Training images in order, mirrored by step; null classes; held-out images and the averaged weights."""
    calls, loss_per_sample, sampled, sample = [], script.loss_per_sample, [], script.sample

    def spy(model, x0, y, t, eps, cfg):
        out = loss_per_sample(model, x0, y, t, eps, cfg)
        state = None if torch.is_grad_enabled() else {k: v.clone() for k, v in model.state_dict().items()}
        calls.append((x0.clone(), y.clone(), t.clone(), state, out.detach().clone()))
        return out

    def spy_sample(model, *args, **more):
        sampled.append({k: v.clone() for k, v in model.state_dict().items()})
        return sample(model, *args, **more)

    monkeypatch.setattr(script, "loss_per_sample", spy)
    monkeypatch.setattr(script, "sample", spy_sample)
    run = train(script, "--steps", 60, "--flip", "--class-dropout", 0.3, "--seed", 3, "--eval-every", 60)
    data, held_out = (common.load_dataset("digits", split=s, image_size=16) for s in ("train", "test"))
    network = ld.load_vae(vae[1], torch.device("cpu"))
    encode = (lambda x: ld.encode(network, x)) if script is ld else lambda x: x
    batches = common.Batches(data, 8, 3, "cpu", flip=True)
    trained = [c for c in calls if c[3] is None][1:]  # the first is a trial
    assert len(trained) == 60
    for step, (x0, y, t, _, _) in enumerate(trained):
        x, labels = batches(step)
        torch.testing.assert_close(x0, encode(x), rtol=0, atol=0.03)  # latents are made and kept in 16 bits
        assert ((y == labels) | (y == 10)).all() and 0 < t.min() and t.max() <= 1
        generator = torch.Generator().manual_seed(common.derive_seed(3, "noise", step))
        torch.randn(x0.shape, generator=generator)  # eps is drawn first
        u = torch.rand(2, 8, generator=generator)
        assert torch.equal(t, script.sample_t(u[0], script.Config())) and torch.equal(y == 10, u[1] < 0.3)

    state = common.newest_checkpoint(run)
    assert any(not torch.equal(state["ema"][k], v) for k, v in state["model"].items())
    last = [c for c in calls if c[3] is not None][-63:]  # 2,000 held-out images in batches of 4 x 8
    assert [len(c[0]) for c in last] == [32] * 62 + [16]
    ours, others = (encode(d.images / 127.5 - 1).flatten(1) for d in (held_out, data))
    order = []
    for x0, _, _, used, _ in last:
        assert same(used, state["ema"])
        near, far = (torch.cdist(x0.flatten(1), x).min(1) for x in (ours, others))
        assert near[0].max() < 0.5 * far[0].min(), (near, far)
        order.append(near[1])
    order, times = torch.cat(order), torch.cat([c[2] for c in last])
    want = torch.arange(1, 2001).mul(1000 / 2000).ceil() / 1000  # of a thousand timesteps
    want = want if script is ddpm else (torch.arange(2000) + 0.5) / 2000
    torch.testing.assert_close(times, want)
    assert len(order.unique()) == 2000
    assert torch.stack([order, times]).corrcoef()[0, 1].abs() < 0.1  # folders are sorted by class
    assert same(sampled[-1], state["ema"])
    assert any(not torch.equal(sampled[0][k], v) for k, v in state["ema"].items())  # it follows the weights
    (val,) = lines(run, "val")
    assert val["loss"] == pytest.approx(torch.cat([c[4] for c in last]).mean().item(), rel=1e-5)


@every_script
def test_one_way_to_run_a_network_and_checkpoints_that_stay(script, train, monkeypatch):
    """Training, evaluation and grids in the precision of --dtype; --keep-every keeps what --guide needs."""
    seen, loss_per_sample, predict = set(), script.loss_per_sample, script.predict

    def spy(kind, call):
        def spied(model, *args, **more):
            net = getattr(model, "module", model)
            hook = net.register_forward_hook(
                lambda m, x, out: seen.add((kind, m.training, x[0].dtype, out.dtype))
            )
            out = call(model, *args, **more)
            hook.remove()
            assert all(v.dtype == torch.float32 for v in (out if isinstance(out, tuple) else [out]))
            return out

        return spied

    monkeypatch.setattr(script, "loss_per_sample", spy("loss", loss_per_sample))
    monkeypatch.setattr(script, "predict", spy("sample", predict))
    flags = ("--steps", 9, "--eval-every", 9, "--save-every", 2, "--keep", 1, "--keep-every", 3)
    run = train(script, *flags, "--dtype", "bfloat16")
    kinds = {("loss", True), ("loss", False), ("sample", False)}
    assert seen == {(*kind, torch.float32, torch.bfloat16) for kind in kinds}
    assert [int(p.stem[5:]) for p in sorted(run.glob("checkpoints/*.pt"))] == [3, 6, 9]


@every_script
def test_what_breaks_in_evaluation_breaks_before_the_first_step(script, train, monkeypatch, tmp_path):
    """... and in sampling: not after hours, with nothing saved."""
    for name in ("evaluate", "predict"):
        with monkeypatch.context() as m:
            m.setattr(script, name, lambda *a, **k: [][1])
            with pytest.raises(IndexError):
                train(script, "--steps", 5, logs=name)
        (run,) = (tmp_path / name).glob("*/*")
        assert not lines(run)


@every_script
def test_labels_may_be_sequences(script, train, monkeypatch):
    """A fork's y [B, L], with a null() of its own: whole rows are dropped, in training and for guidance."""
    build_model, conditions, load, asked = script.build_model, script.conditions, common.load_dataset, []

    def first_label(model, inputs):
        asked.append((torch.is_grad_enabled(), inputs[2].clone()))
        return *inputs[:2], inputs[2][:, 0].clamp(min=0)

    def build(cfg):
        model = build_model(cfg)
        model.register_forward_pre_hook(first_label)
        return model

    def load_rows(*args, **more):
        data = load(*args, **more)
        return replace(data, labels=torch.stack([data.labels, data.labels + 20, data.labels + 40], 1))

    monkeypatch.setattr(common, "load_dataset", load_rows)
    monkeypatch.setattr(script, "build_model", build)
    monkeypatch.setattr(script, "null", lambda y, cfg: torch.full_like(y, -1))
    monkeypatch.setattr(script, "conditions", lambda *a: conditions(*a)[:, None] + torch.tensor([0, 20, 40]))
    train(script, "--steps", 20, "--class-dropout", 0.5, "--guidance", 2)
    y = torch.cat([y for training, y in asked if training])
    dropped = (y == -1).all(1)
    assert y.shape == (21 * 8, 3) and 0.3 < dropped.float().mean() < 0.7  # one step is a trial
    assert (y[~dropped] == y[~dropped][:, :1] + torch.tensor([0, 20, 40])).all()
    last = asked[-1][1]  # of the pictures: ten samples with their condition, and without
    assert last.shape == (20, 3) and last[:10, 0].tolist() == [*range(10)] and (last[10:] == -1).all()


@every_script
def test_conditions_are_the_business_of_model_and_method(script):
    """A fork with other conditions, or without blocks, edits these two sections and nothing else."""
    sections = re.split(r"\n# -{90,}\n# ", Path(script.__file__).read_text())
    names = [s.split("\n")[0].split(":")[0] for s in sections[1:]]
    assert {"Model", "Method", "Training loop"} <= {*names}
    known = re.compile(r"num_classes|(?<!data)\.classes|model\.blocks|one_hot|full_like")
    for name, text in zip(names, sections[1:], strict=True):
        if name not in ("Model", "Method"):
            assert not known.findall(text), name
    assert "num_classes" not in sections[0] and known.search("len(cfg.classes)")


OWN = [(ddpm, {}), (ld, {}), *((rf, {"solver": s}) for s in ("euler", "heun", "rk4"))]


@pytest.mark.parametrize("script, more", OWN, ids=lambda v: getattr(v, "__name__", None) or str(v))
def test_samplers_start_at_the_noise_of_the_path_and_say_where_steps_go(script, more, monkeypatch):
    calls = []

    def predict(model, x, t, y, cfg, guidance=1.0, s=None):
        assert t.shape == s.shape == (len(x),) and len({*t.tolist()}) == len({*s.tolist()}) == 1
        calls.append((x, t[0].item(), s[0].item()))
        return 0.3 * torch.ones_like(x), torch.zeros_like(x)

    monkeypatch.setattr(script, "predict", predict)
    monkeypatch.setattr(script, "path", lambda t, cfg: (1 - t, 80 * t))
    x = torch.randn(4, 1, 2, 2)
    script.sample(None, x, torch.zeros(4, dtype=torch.long), script.Config(sampling_steps=4, **more))
    torch.testing.assert_close(calls[0][0], 80 * x)
    assert all(s in (0.75, 0.5, 0.25, 0) and s <= t for _, t, s in calls)
    assert calls[0][1:] == (1, 0.75) and calls[-1][2] == 0 and (0.5, 0.25) in [c[1:] for c in calls]


@every_script
def test_each_group_has_its_learning_rate_warmed_up_and_decayed(script, train, monkeypatch):
    """In every step: Muon's matrices --muon-lr, the others --lr, times warmup and what is left of the run."""
    used, original = [], script.Muon.step

    def step(self):
        used.append([g["lr"] for g in self.param_groups])
        assert ["momentum" in g for g in self.param_groups] == [True, False, False]
        return original(self)

    clip, norms = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, norm: norms.append(norm) or clip(p, norm)
    )
    monkeypatch.setattr(script.Muon, "step", step)
    flags = ["--eval-every", 0, "--lr", 0.003, "--muon-lr", 0.05, "--grad-clip", 0]
    run = train(script, "--steps", 10, *flags)
    assert norms == [math.inf] * 10
    scale = [min(1, (i + 1) / 6) * (1 - i / 10) for i in range(10)]
    want = [[0.05 * x, 0.003 * x, 0.003 * x] for x in scale]
    np.testing.assert_allclose(used, want, rtol=1e-9)
    assert [x["lr"] for x in lines(run)] == pytest.approx([0.003 * x for x in scale])
    log = lines(train(script, "--minutes", 0.02, *flags, logs="minutes"))  # or of its minutes
    assert log[-1]["seconds"] >= 1.2 and len(log) < 20_000 and log[-1]["lr"] < 0.3 * max(x["lr"] for x in log)


# ---- what never happens


def adamw(groups, lr, *_, **__):
    return torch.optim.AdamW(groups, lr)


OPTIMIZERS = [adamw, torch.optim.NAdam, torch.optim.RMSprop, torch.optim.SGD, torch.optim.AdamW]


@pytest.mark.parametrize(
    "script, kind",
    [*((rf, kind) for kind in OPTIMIZERS), (ld, None)],
    ids=["AdamW, not fused", "NAdam", "RMSprop", "SGD", "AdamW, fused", "the latent DiT's own"],
)
def test_a_step_that_is_not_finite_is_never_applied_whatever_the_optimizer(train, monkeypatch, script, kind):
    """A fork's, in place of the script's: fused ones skip by themselves, others are not called."""
    original, calls = script.loss_per_sample, []

    def sabotaged(model, *args):
        calls.append(torch.is_grad_enabled())  # the first is a trial
        loss, step = original(model, *args), calls[-1] and calls.count(True) - 2
        if step == 2:  # the gradient alone is not finite
            return loss + (next(model.parameters()).sum() * 0).abs().sqrt()
        return loss * float("nan") if step == 3 else loss

    def make_optimizer(model, cfg, dtype):
        more = {"fused": True} if kind is torch.optim.AdamW else {}
        optimizer = kind([{"params": list(model.parameters())}], lr=1e-3, **more)
        optimizer.param_groups[0]["base_lr"] = 1e-3
        return optimizer

    monkeypatch.setattr(script, "loss_per_sample", sabotaged)
    monkeypatch.setattr(script, "make_optimizer", make_optimizer if kind else script.make_optimizer)
    run = train(script, "--steps", 6, "--save-every", 1, "--keep", 9, "--eval-every", 0)
    assert [x["step"] for x in lines(run) if x.get("skipped")] == [3, 4]
    state = [common.load_checkpoint(f)["model"] for f in sorted((run / "checkpoints").iterdir())]
    moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in zip(state, state[1:], strict=False)]
    assert moved == [True, False, False, True, True]


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
def test_samplers_never_ask_at_the_end_where_eps_is_undefined(solver):
    """A network that predicts x0 has eps = (x - (1 - t) x0) / t."""
    asked = []

    def predict(model, x, t, y, cfg, guidance=1.0, s=None):
        asked.append(t[0].item())
        return 0.3 * torch.ones_like(x), (x - 0.3 * (1 - t.view(-1, 1, 1, 1))) / t.view(-1, 1, 1, 1)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(rf, "predict", predict)
        cfg = rf.Config(solver=solver, sampling_steps=5, guidance=1.0)
        x, _ = rf.sample(None, torch.randn(4, 1, 2, 2), torch.zeros(4, dtype=torch.long), cfg)
    torch.testing.assert_close(x, torch.full_like(x, 0.3), atol=1e-5, rtol=0)
    assert min(asked) == pytest.approx({"euler": 0.2, "heun": 0.2, "rk4": 0.05}[solver])


@every_script
def test_forks_that_are_wrong_are_told_at_the_start(script, train, monkeypatch, capsys):
    """Not after hours, or never."""
    loss, decode, make = script.loss_per_sample, script.decode, script.make_optimizer

    def wrong(name, value, error, match):
        with monkeypatch.context() as m:
            m.setattr(script, name, value)
            with pytest.raises(error, match=match):
                train(script, "--steps", 2)

    wrong(
        "loss_per_sample", lambda *a: loss(*a).mean(), RuntimeError, "shape .* is invalid for input of size 1"
    )
    two = lambda *a: decode(*a).repeat(1, 2, 1, 1)  # noqa: E731
    wrong("decode", two, RuntimeError if script is ld else AssertionError, "got size 2|returns 2 channels")

    def numpy_rates(*a):
        optimizer = make(*a)
        optimizer.param_groups[0]["base_lr"] = np.float64(0.01)
        return optimizer

    monkeypatch.setattr(script, "make_optimizer", numpy_rates)
    train(script, "--steps", 2, status=2)
    assert "the optimizer's state could not be loaded again (" in capsys.readouterr().err


@every_script
def test_weights_that_are_frozen_and_gradients_that_are_absent(script, train, monkeypatch):
    """Some weights of a pretrained network stay as they are, and in some steps others have no gradient."""
    build, steps = script.build_model, []

    def frozen(cfg):
        model = build(cfg)
        model.t_embed.requires_grad_(False)
        return model

    def absent(optimizer):
        steps.append(1)
        if len(steps) % 2 == 0:
            optimizer.param_groups[0]["params"][0].grad = None
        return step(optimizer)

    step = script.Muon.step
    monkeypatch.setattr(script, "build_model", frozen)
    monkeypatch.setattr(script.Muon, "step", absent)
    run = train(script, "--steps", 6, "--save-every", 3, "--eval-every", 0)
    first, last = (common.load_checkpoint(f) for f in sorted((run / "checkpoints").iterdir()))
    moved = {k for k, v in last["model"].items() if not torch.equal(v, first["model"][k])}
    assert moved and not any(k.startswith("t_embed") for k in moved)
    assert any("blocks" in k or "conv" in k for k in moved)
    losses = [x["loss"] for x in lines(run)]
    steps[:] = [1] * 3
    train(script, "--resume", run / "checkpoints" / "step_00000003.pt")
    assert [x["loss"] for x in lines(run)] == losses


@every_script
def test_samples_that_are_not_finite_are_an_error(script, train, main, monkeypatch, capsys):  # noqa: F811
    """Not pictures of -1 and 1; while training, a warning: the run goes on."""
    original = script.predict

    def predict(*args, **more):
        return [v * float("inf") for v in original(*args, **more)]

    monkeypatch.setattr(script, "predict", predict)
    run = train(script, "--steps", 2)
    said = capsys.readouterr().out
    for what in ("a trial picture", "the pictures"):
        assert f"warning: cannot write {what} (the samples are not finite" in said
    assert not list((run / "samples").glob("step*")) and len(lines(run)) == 2
    file = run / "checkpoints" / "step_00000002.pt"
    state = common.load_checkpoint(file)
    torch.save(state | {"ema": {k: v * float("inf") for k, v in state["ema"].items()}}, file)
    with pytest.raises(SystemExit, match="2"):
        main(run, "--solver", "own")
    error = capsys.readouterr().err
    assert error.startswith("error: the samples are not finite; ") and error.count("\n") == 1


# ---- how they go on


@every_script
def test_compiled_runs_resume_bit_for_bit(script, train, two_threads, monkeypatch, tmp_path):
    """As used: compiled, two threads, gradients large enough to be added up by both of them.

    On a GPU, what is added in no fixed order differs in every step; here it might, so no code may do that.
    """
    assert torch.get_num_threads() == 2
    torch._dynamo.reset()  # forgets what other tests compiled; after eight graphs it gives up
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    large = {
        ddpm: ["--mults", 1, 1, "--bs", 256],
        rf: ["--dim", 128, "--bs", 64],
        ld: ["--dim", 128, "--bs", 64, "--text", "on"],
    }
    flags = [*large[script], "--steps", 24, "--save-every", 12, "--eval-every", 0, "--sample-every", 0]
    if script is ld:  # the average, whose graph is for any batch size, is compiled in the other two
        prepare = common.prepare

        def without(model, cfg, *args, dynamic=False):
            return prepare(model, replace(cfg, compile="off") if dynamic else cfg, *args, dynamic=dynamic)

        monkeypatch.setattr(common, "prepare", without)
    run = train(script, *flags, compiled=True)
    whole, losses = weights(run), [x["loss"] for x in lines(run)]
    state = common.newest_checkpoint(run)
    assert not any("_orig_mod" in k for k in [*state["model"], *state["ema"]])
    train(script, "--resume", run / "checkpoints" / "step_00000012.pt")
    assert same(weights(run), whole) and [x["loss"] for x in lines(run)] == losses
    code = [f.read_text() for f in (tmp_path / "compiled").rglob("*.py")]
    assert code and not any("atomic_add" in text for text in code)


@pytest.mark.parametrize("script", [ddpm, rf], ids=lambda s: s.__name__)
def test_what_a_fork_draws_in_its_loss_is_the_same_when_resumed(script, train, monkeypatch):
    original = script.loss_per_sample

    def noisy(model, x0, y, t, eps, cfg):
        return original(model, x0 + 0.1 * torch.rand(1), y, t, eps, cfg)

    monkeypatch.setattr(script, "loss_per_sample", noisy)
    whole = train(script, "--steps", 8, "--eval-every", 0, logs="whole")
    with monkeypatch.context() as m:
        at_step(m, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run = train(script, "--steps", 8, "--eval-every", 0, logs="cut", status=common.EXIT_PREEMPTED)
    assert same(weights(train(script, "--resume", run, logs="cut")), weights(whole))


def test_buffers_resume_exactly(train, monkeypatch):
    """Those of batch norm, which change whenever the network runs. (The method's name has two words.)"""

    class Normed(rf.DiT):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.first = torch.nn.BatchNorm2d(cfg.shape[0])

        def forward(self, x, t, y):
            return super().forward(self.first(x), t, y)

    monkeypatch.setattr(rf, "build_model", Normed)
    monkeypatch.setattr(rf, "METHOD", "my_idea")
    flags = ["--steps", 4, "--save-every", 2, "--keep", 9, "--eval-every", 0]
    whole = train(rf, *flags, logs="whole")
    assert whole.parent.name == "my_idea" and whole.name.startswith("my_idea_dit_")
    run = train(rf, *flags, logs="cut")
    train(rf, "--resume", run / "checkpoints" / "step_00000002.pt", logs="cut")
    assert same(weights(run), weights(whole))


def snapshot(folder):
    """All files, but for what was printed."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("run.out", "run.err")]
    return {p.relative_to(folder): p.read_bytes() for p in files}


def test_a_run_without_checkpoints_is_not_begun_anew(train, capsys):
    """Deleted to save space, as those of the example runs: what it has recorded is not touched."""
    run = train(ddpm, "--steps", 4)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    before = snapshot(run)
    train(ddpm, "--resume", run, status=2)
    error = capsys.readouterr().err
    assert error == f"error: {run} has no checkpoint; run it again with --config {run}/run.yaml\n"
    assert snapshot(run) == before


def test_nothing_that_was_recorded_gets_lost(train):
    """Resumed from an earlier checkpoint: steps that are made again stay beside the new ones."""
    run = train(rf, "--steps", 6, "--save-every", 2, "--keep", 9, "--eval-every", 2)
    before = {name: lines(run, name) for name in ("loss", "val")}
    train(rf, "--resume", run / "checkpoints" / "step_00000004.pt", "--steps", 5)
    for name, later in (("loss", 2), ("val", 1)):
        old = [json.loads(x) for x in (run / "metrics" / f"{name}.jsonl.old").read_text().splitlines()]
        assert old == before[name][-later:] and lines(run, name)[:-1] == before[name][:-later]
    (old,) = (run / "checkpoints").glob("step_00000006.pt.*.old")
    for kind in ("gif", "png"):
        assert list((run / "samples").glob(f"step_00000006.{kind}.*.old"))
    first = old.read_bytes()
    for _ in range(2):
        train(rf, "--resume", run / "checkpoints" / "step_00000004.pt", "--steps", 6)
    assert old.read_bytes() == first and len(list(old.parent.glob("step_00000006.pt.*.old"))) == 2


def test_other_files_beside_checkpoints_are_the_users(train, main):  # noqa: F811
    """Neither the newest, nor removed, nor in the way."""
    run = train(rf, "--steps", 4, "--eval-every", 0)
    kept = run / "checkpoints" / "step_00000004.pt"
    others = [kept.with_name(name) for name in ("step_best.pt", "step_00000001_copy.pt")]
    for other in others:
        shutil.copy(kept, other)
    train(rf, "--resume", run, "--steps", 8, "--save-every", 2, "--keep", 1, "--keep-every", 6)
    there = [*others, *(kept.with_name(f"step_0000000{i}.pt") for i in (6, 8))]
    assert sorted(kept.parent.iterdir()) == sorted(there) and len(lines(run)) == 8
    for more in ([], ["--step", 6]):
        out = main(run, *more, "--steps", 1, "--num-samples", 2)
        assert f"step_0000000{6 if more else 8}_ddim1" in out


def test_the_runs_code_is_that_which_runs(train, monkeypatch, tmp_path):
    """Not an edit made while the data is loaded."""
    copy = tmp_path / "rf_dit_cifar.py"
    shutil.copy(rf.__file__, copy)
    monkeypatch.setattr(rf, "__file__", str(copy))
    build = rf.build_model
    monkeypatch.setattr(rf, "build_model", lambda cfg: copy.write_text("# edited\n") and build(cfg))
    run = train(rf, "--steps", 2, "--eval-every", 0)
    kept = (run / "code" / "rf_dit_cifar.py").read_text()
    assert copy.read_text() == "# edited\n" and kept == (Path(common.__file__).parent / copy.name).read_text()


def test_edited_code_is_refused_with_two_ways_on(train, script, main, capsys):  # noqa: F811
    """Resumed with another target than it was trained for, a run would be quietly wrong."""
    run = train(rf, "--steps", 4, "--eval-every", 0)
    code = run / "code" / "rf_dit_cifar.py"
    text = code.read_text()
    edited = text.replace("(eps - x0)).square()", "(x0 - eps)).square()")
    assert edited != text
    code.write_text(edited)  # the script here is the one that was edited
    before = snapshot(run)
    for other in (rf, ddpm):
        capsys.readouterr()
        train(other, "--resume", run, status=2)
        what = f"{other.__name__}.py differs from the run's code; use python {code} --resume {run}"
        want = f"error: {what}, or copy your new code to {code.parent} first\n"
        assert capsys.readouterr().err == want and snapshot(run) == before
    p = script(code, "--resume", run, "--steps", 5)
    assert p.returncode == 0 and len(lines(run)) == 5, p.err
    (code.parent / "common.py").write_text(Path(common.__file__).read_text() + "# edited")
    code.write_text(text)
    train(rf, "--resume", run, "--steps", 6, status=2)
    assert "error: common.py differs from the run's code" in capsys.readouterr().err
    shutil.copy(common.__file__, code.parent)
    train(rf, "--resume", run, "--steps", 6)  # now it is the run's

    # Of another name and with a new flag
    code.unlink()
    code = code.with_name("my_idea.py")
    code.write_text(text.replace("    # method\n", "    gamma: float = 1.0  # a new one\n    # method\n", 1))
    p = script(code, "--resume", run, "--steps", 7)
    assert p.returncode == 0 and "gamma: 1.0" in (run / "run.yaml").read_text(), p.err
    p = script(code, "--resume", run, "--steps", 8, "--gamma", 2)
    assert p.returncode == 2 and "--gamma is 2.0, but 1.0 in" in p.err
    main(run, "--steps", 2, "--num-samples", 2)


def test_a_longer_run_that_is_stopped_goes_on_to_its_end(train, monkeypatch):
    """By --resume RUN, as it says when it stops: what was changed on resuming is the run's from then on."""
    run = train(rf, "--steps", 3, "--eval-every", 0)
    with monkeypatch.context() as m:
        at_step(m, 5, lambda: os.kill(os.getpid(), signal.SIGINT))  # Ctrl-C
        train(rf, "--resume", run, "--steps", 9, status=common.EXIT_PREEMPTED)
    train(rf, "--resume", run)
    assert len(lines(run)) == 9


def test_a_moved_dataset_is_the_same_dataset(train, main, tmp_path, capsys):  # noqa: F811
    """Another place may be named on resuming and for --invert; other content is refused."""
    for i in range(50):
        file = tmp_path / "here" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        common.save_images(file.with_suffix(""), torch.randn(1, 1, 16, 16), columns=1)
    run = train(rf, "--dataset", tmp_path / "here", "--steps", 3)
    capsys.readouterr()
    (tmp_path / "here").rename(tmp_path / "there")
    train(rf, "--resume", run, "--steps", 4, status=2)
    assert "there is no dataset" in capsys.readouterr().err
    train(rf, "--resume", run, "--steps", 4, "--dataset", tmp_path / "there")
    other = shutil.copytree(tmp_path / "there", tmp_path / "other")
    for changed in ("2.png", "20.png"):  # of training, held out
        shutil.copy(other / "a" / "0.png", other / "a" / changed)
    train(rf, "--resume", run, "--steps", 5, "--dataset", other, status=2)
    assert "the dataset differs from the run's: train is" in capsys.readouterr().err
    main(run, "--invert", "--steps", 2)
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    main(run, "--invert", "--steps", 2, "--dataset", tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="2"):
        main(run, "--invert", "--classes", "b", "--dataset", other)
    assert "is not the run's dataset; set --dataset to that" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(run, "--invert")
    assert "there is no dataset" in capsys.readouterr().err
    facts = common.yaml.safe_load((run / "run.yaml").read_text())
    assert facts["config"]["dataset"] == str(tmp_path / "there") and facts["config"]["flip"] == "off"
    assert facts["dataset"]["classes"] == ["a", "b"] and facts["dataset"]["test"]["images"] == 2


def test_loss_that_is_not_finite_at_one_time_is_null(train, monkeypatch):
    original = rf.loss_per_sample

    def sabotaged(model, x0, y, t, eps, cfg):
        loss = original(model, x0, y, t, eps, cfg)
        return loss if torch.is_grad_enabled() else torch.where(t < 0.001, float("nan"), loss)

    monkeypatch.setattr(rf, "loss_per_sample", sabotaged)
    run = train(rf, "--steps", 2, "--eval-every", 1)
    text = (run / "metrics" / "val.jsonl").read_text()
    assert "NaN" not in text and len(lines(run, "val")) == 2
    assert all(x["loss"] is x["loss_t"][0] is None and x["loss_t"][1] > 0 for x in lines(run, "val"))


def test_classes_by_name(tmp_path, train, main, capsys):  # noqa: F811
    """Folders 0, 1, 2, 4, 10: a number is a folder's name, not its place."""
    for name in ("0", "1", "2", "4", "10"):
        for i in range(9):
            file = tmp_path / "set" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            common.save_images(file.with_suffix(""), torch.randn(1, 1, 16, 16), columns=1)
    (tmp_path / "set" / "3").mkdir()
    run = train(ddpm, "--dataset", tmp_path / "set", "--steps", 2)
    names = common.yaml.safe_load((run / "run.yaml").read_text())["dataset"]["classes"]
    assert names == ["0", "1", "2", "4", "10"]
    flags = ["--steps", 1, "--num-samples", 4, "--classes", *"0 1 2 4 10".split() * 20]
    main(run, *flags)  # 100 of them: names of files have an end
    assert max(len(p.name) for p in (run / "samples").iterdir()) < 200
    main(run, "--invert", "--steps", 2, "--classes", 4)


def test_prompts_are_sampled_and_kept(tmp_path, train, main, capsys):  # noqa: F811
    """As classes are; file names hold none, and the .npz, a .txt and the picture have them."""
    run = train(ld, "--text", "on", "--steps", 2)
    flags, prompts = (
        ["--steps", 2, "--num-samples", 5, "--guidance", 3],
        ["bold/7", "thin Three leaning left"],
    )
    typed = ["--prompt", prompts[0], "--prompt", prompts[1]]
    main(run, *flags, *typed, "--npz", "--guidance-interval", 0.1, 0.9)
    (file,) = (run / "samples").glob("*.npz")
    with np.load(file) as z:
        images, labels, shown = z["arr_0"], z["arr_1"], z["prompts"].tolist()
        protocol = json.loads(str(z["protocol"]))
    assert shown == [prompts[i % 2] for i in range(5)] and labels.tolist() == [-1] * 5
    assert protocol["prompt"] == prompts and protocol["classes"] == []
    assert file.with_suffix(".txt").read_text().splitlines() == prompts
    assert not any("bold" in p.name for p in (run / "samples").iterdir())
    assert Image.open(file.with_suffix(".png")).size == (4 * (5 * (16 + 2) + 2), 4 * (16 + 4) + 3 * 13 + 2)
    (tmp_path / "prompts.txt").write_text("bold/7\n\n thin Three leaning left \n", "utf-8")
    main(run, *flags, "--prompts", tmp_path / "prompts.txt", "--npz", "--guidance-interval", 0.1, 0.9)
    assert list((run / "samples").glob("*.npz")) == [file] and (np.load(file)["arr_0"] == images).all()
    main(run, "--num-samples", 2, "--compare", *typed)
    main(run, *flags, "--interpolate", 3, "--solver", "heun")  # prompts of the run
    main(run, "--num-samples", 5, "--solver", "own", "--set", "sampling_steps=2", *typed)
    main(run, "--export", tmp_path / "x.safetensors", "--prompt", "a 7")
    assert not list((run / "samples").glob("*own50*")) and len(list((run / "samples").glob("*.txt"))) == 4
    names = config(run)["prompts"]
    assert [*(run / "samples").glob("*interpolate3.txt")][0].read_text().splitlines() == names
    (tmp_path / "empty.txt").write_text("\n")
    classes = train(rf, "--steps", 2)
    unconditional = train(ld, "--text", "on", "--class-dropout", 1, "--steps", 2)
    main(unconditional, "--steps", 2, "--num-samples", 2)
    for command, match in [
        ((run, "--classes", 7), "--classes: the run was trained on captions; use --prompt"),
        ((run, "--prompt", "a purple 7"), "the training captions have no purple"),
        ((run, "--prompts", tmp_path / "empty.txt"), "has no prompt; write one per line"),
        ((run, "--prompts", tmp_path / "none.txt"), "none.txt"),
        ((classes, "--prompt", "a 7"), "--prompt: the run was trained on classes; use --classes"),
        ((unconditional, "--prompt", "a 7"), "the run is unconditional; drop --classes/--prompt"),
    ]:
        with pytest.raises(SystemExit) as e:
            main(*command, "--steps", 2)
        error = capsys.readouterr().err
        assert e.value.code == 2 and error.count("\n") == 1 and match in error, error
