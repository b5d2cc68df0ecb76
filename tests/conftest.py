import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

# Two tests at once (-n 2) have a thread each; those of scripts, which have two, must not spin when they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

import common  # noqa: E402

# A model of a few thousand weights: a step takes milliseconds.
TINY = "--width 8 --mults 1 2 --bs 8 --sampling-steps 4 --num-samples 10 --image-size 16".split()
TINY += "--compile off --dtype float32".split()


def assert_a_bad_step_changes_nothing(model, optimizer):
    """A step that is not finite leaves all weights and states, as found_inf says so; one before moves all."""
    for bad in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan")) if bad else torch.randn_like(p)
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert not any(moved) if bad else all(moved)
    assert all(v.isfinite().all() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))


load = common.load_dataset
draw = functools.cache(load)


@pytest.fixture(autouse=True)
def digits_are_drawn_once(request, monkeypatch):
    """Drawing them takes seconds in every run; test_common.py tests that each time gives the same."""

    def once(name, *args, **more):
        return replace(draw(name, *args, **more)) if name == "digits" else load(name, *args, **more)

    if request.module.__name__ != "test_common":
        monkeypatch.setattr(common, "load_dataset", once)


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A folder of 200 digits in classes, for scripts that run as processes: drawing all takes seconds."""
    home, data = tmp_path_factory.mktemp("images") / "few", draw("digits", image_size=16)
    for i in range(200):
        (home / str(i % 10)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.images[i, 0].numpy()).save(home / str(i % 10) / f"{i}.png")
    return home


@pytest.fixture
def two_threads():
    """As scripts have by default; sums are split in other ways than with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def script(tmp_path):
    """Runs a script as a user does, in an empty folder, on two threads; returns the finished process."""

    def run(name, *flags, wait=True, env=None, prefix=()):
        command = [*(prefix or [sys.executable]), str(ROOT / name), *map(str, flags)]
        environment = (
            os.environ | {"OMP_NUM_THREADS": "2", "DIFFUSION_LOGS": str(tmp_path / "logs")} | (env or {})
        )
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if not wait:
            return process
        process.out, process.err = process.communicate(timeout=300)
        return process

    return run
