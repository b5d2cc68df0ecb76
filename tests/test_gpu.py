"""tests/gpu.py on a CPU, in tiny sizes: all of its stages, and that it notices what it looks for."""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import gpu
import pytest
import torch
from conftest import ROOT

import common


def test_all_stages_in_tiny_sizes(tmp_path):
    command = [sys.executable, ROOT / "tests/gpu.py", "--dry", "--out", tmp_path / "found"]
    p = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr
    facts = {x.pop("what"): x for x in map(json.loads, open(tmp_path / "found/facts.jsonl"))}
    assert all(x["holds"] for x in facts.values()) and not any("error" in x for x in facts.values())
    found = facts["latent_dit_sdvae.py --compile off"]
    assert 0 < found["stopped_at_step"] < found["steps"] == found["equal_losses"]
    assert facts["samples of latent_dit_sdvae.py"]["largest_difference_from_a_CPU_of_255"] == 0
    assert facts["attention, 16 tokens, kernel MATH"]["equal_gradients"]
    speed = [x for name, x in facts.items() if re.match("(DiT|latent DiT|UNet).* images$", name)]
    assert len(speed) == 5 and all(x["images/s"] > 0 and x["TFLOP/s"] > 0 for x in speed)
    assert facts["training"]["steps"] == 6 and len(facts["held-out loss"]) == 3
    assert facts["sampling in TF32"]["largest_difference"] == 0  # a CPU has none
    assert 0 < facts["sampling in bfloat16"]["largest_difference"] < 0.2
    assert (tmp_path / "found/grid.png").stat().st_size > 1000


@pytest.mark.parametrize("name", gpu.SMALL)
def test_a_script_takes_the_flags_of_its_small_model(name):
    script = importlib.import_module(name.removesuffix(".py"))
    cfg = common.parse(script.Config, "", gpu.SMALL[name].split())
    script.check(replace(cfg, shape=(3, 32, 32)))


def test_a_gpu_is_asked_for_unless_dry(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "found")])
    with pytest.raises(common.UserError, match="PyTorch finds no GPU; --dry tries this file on a CPU"):
        gpu.main()
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--only", "sped"], "--only sped: stages are exact, attention, speed, train"),
        (["--minutes", "0"], "--minutes is 0.0; it must be above 0"),
        (["--out", "."], "--out . exists; choose another folder"),
    ],
)
def test_bad_flags(flags, error, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", *flags])
    with pytest.raises(common.UserError, match=re.escape(error)):
        gpu.main()


def test_what_fails_is_counted_and_does_not_end_the_rest(tmp_path, capsys):
    check = gpu.Check(common.parse(gpu.Config, "", ["--dry"]), tmp_path)
    with check.measuring("a"):
        raise RuntimeError("out of luck\nand more")
    check.tell("b", False, value=0.123456)
    check.tell("c", value=7)
    assert check.failures == 2
    lines = [json.loads(x) for x in open(tmp_path / "facts.jsonl")]
    assert lines[0] == {"what": "a", "holds": False, "error": "out of luck"}
    assert capsys.readouterr().out.splitlines()[1:] == ["b: value 0.1235  FAILED", "c: value 7"]


def test_a_failure_is_the_exit_status(tmp_path, monkeypatch):
    def attention(check):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(gpu, "attention", attention)
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--dry", "--only", "attention", "--out", str(tmp_path / "found")]
    )
    with pytest.raises(SystemExit) as e:
        gpu.main()
    assert e.value.code == 1


@pytest.mark.parametrize("differs", ["", "model", "ema", "loss"])
def test_runs_that_differ_are_noticed(tmp_path, differs):
    check = gpu.Check(common.parse(gpu.Config, "", ["--dry"]), tmp_path)
    for name in ("whole", "resumed"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "metrics").mkdir()
        (tmp_path / name / "run.yaml").write_text("")
        state = dict.fromkeys(["optimizer", "step", "config"], 0)
        for part in ("model", "ema"):
            state[part] = {
                "a": torch.zeros(3),
                "b": torch.full((2,), float(part == differs and name == "whole")),
            }
        torch.save(state, tmp_path / name / "checkpoints" / "step_00000002.pt")
        losses = [0.5, 0.25 if differs == "loss" and name == "whole" else 0.125]
        log = "".join(json.dumps({"step": i, "loss": x}) + "\n" for i, x in enumerate(losses))
        (tmp_path / name / "metrics" / "loss.jsonl").write_text(log)
    gpu.compare_runs(check, "x", tmp_path / "whole", tmp_path / "resumed", steps=2)
    (fact,) = map(json.loads, open(tmp_path / "facts.jsonl"))
    assert fact["holds"] == (not differs) and check.failures == bool(differs) and fact["steps"] == 2
    assert fact["equal_losses"] == 2 - (differs == "loss")
    assert fact["unequal_weights"] == (differs in ("model", "ema"))
