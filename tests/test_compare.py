"""compare.py: its statistics and arguments; a comparison that is interrupted, continued and extended."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import compare
import numpy as np
import pytest
import quality
import torch
from PIL import Image

import common
import rf_dit_cifar
from common import UserError

ROOT = Path(__file__).parent.parent
TINY = "--dim 32 --depth 1 --heads 2 --patch 4 --bs 8 --steps 300 --compile off --log-every 1".split()


# ---- statistics


def test_paired_differences_of_students_own_example():
    """Hours of additional sleep (Student 1908, "The probable error of a mean"); results of R's t.test()."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    mean, (low, high), p, above = compare.paired(first, second)
    assert (mean, low, high, p) == pytest.approx((1.58, 0.7001142, 2.4598858, 0.002832890), rel=1e-6)
    assert above == 9
    assert compare.verdict(mean, low, high, more_is_better=True) == "better"
    assert compare.verdict(mean, low, high, more_is_better=False) == "worse"
    assert compare.verdict(-mean, -high, -low, more_is_better=False) == "better"
    assert compare.verdict(0.1, -0.3, 0.5, more_is_better=True) == "no difference larger than 0.5"
    for few in ([1.0], [1.0, 3.0]):  # one difference, or two that are equal because they were rounded
        mean, (low, high), *_ = compare.paired(few, [x + 1 for x in few])
        assert compare.verdict(mean, low, high, more_is_better=True) == "unknown"
    assert compare.paired([1.0, 3.0], [1.0, 3.0])[1] == (0, 0)


def test_no_verdict_where_a_seed_failed():
    cells = {("a", s): {m: 1 + s / 10 for m, *_ in compare.SPEED + compare.METRICS} for s in range(3)}
    cells |= {("b", s): {k: v / 2 + s**2 / 99 for k, v in cells["a", s].items()} for s in range(3)}
    contenders = [{"name": n, "same loss": True} for n in "ab"]
    cells = {k: v | {"FD": 1.0} for k, v in cells.items()}
    assert "| better |" in "".join(compare.report(contenders, cells))
    cells["b", 2] = {"failed": "samples are not finite"}
    text = "".join(compare.report(contenders, cells))
    assert text.count("| b failed in 1 of 3 seeds |") == 6 and "better" not in text
    cells["b", 2], cells["a", 1] = cells["b", 1], {"failed": "samples are not finite"}
    text = "".join(compare.report(contenders, cells))
    assert text.count("| a failed in 1 of 3 seeds |") == 6 and "b failed" not in text


def test_losses_on_the_latents_of_other_vaes_are_not_compared(monkeypatch):
    """Though equal outputs of a network give equal losses."""
    monkeypatch.setattr(compare, "trial", lambda folder, c, *_: ({"bs": 8, "vae_hash": c["vae"]}, "data"))
    monkeypatch.setattr(compare, "check_dataset", lambda *_: None)
    monkeypatch.setattr(compare, "probe", lambda *_: (torch.ones(3), 1.0))
    contenders = [{"name": str(i), "code": "", "script": "", "vae": v} for i, v in enumerate("aab")]
    kept, *_ = compare.try_all(Path("x"), contenders, [], "")
    assert [c["same loss"] for c in kept] == [True, True, False]


def test_detectable_differences_as_tabulated():
    """Half a standard deviation takes 34 pairs at 5% and 80% (Cohen 1988; G*Power), a whole one takes 10."""
    for effect, pairs in ((0.5, 34), (1.0, 10), (0.2, 199)):
        assert compare.detectable(3.0, pairs) < 3 * effect < compare.detectable(3.0, pairs - 1)


# ---- arguments


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of noisy 8x8 images, bright and dark."""
    folder, g = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, n in (("train", 60), ("test", 30)):
        for i in range(n):
            file = folder / split / ("dark", "bright")[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(g.integers(0, 100, (8, 8), np.uint8) + np.uint8(150 * (i % 2))).save(file)
    return folder


def test_arguments_are_ours_or_the_trainers():
    words = "a.py --minutes 2 --vary|--lr 1|--lr 2 --wd 3|--seeds 3 --num-samples=50 --optimizer adamw"
    words = [w for part in words.split("|") for w in ([part] if part.startswith("--lr") else part.split())]
    files, ours, theirs, variants = compare.split_arguments(words)
    assert (files, variants) == (["a.py"], ["--lr 1", "--lr 2 --wd 3"])
    assert ours == ["--seeds", "3", "--num-samples=50"]
    assert theirs == ["--minutes", "2", "--optimizer", "adamw"]


def test_commands_in_the_readme():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python tests/compare.py (.*) \$laptop$", text, re.M)
    laptop = shlex.split(re.search(r'^laptop="(.*)"', text, re.M)[1])
    assert len(commands) == text.count("python tests/compare.py") == 3
    for command in commands:
        files, ours, theirs, variants = compare.split_arguments([*shlex.split(command), *laptop])
        flags = common.parse(compare.Config, "", ours)
        assert files[0] == "rf_dit_cifar.py" and (len(files) > 1) != (len(variants) > 1) and flags.seeds == 5
        for v in variants or [""]:
            common.parse(rf_dit_cifar.Config, "", [*theirs, *v.split()])


@pytest.mark.parametrize(
    "words, error",
    [
        (["--minutes", "2"], "the script to compare with comes first"),
        (["ot.patch"], "the script to compare with comes first"),
        (["rf_dit_cifar.py", "rf_dit_cifar.py"], "two have the same name"),
        (["rf_dit_cifar.py", "--vary", "--lr 1"], "--vary needs the flags of two contenders or more"),
        (["rf_dit_cifar.py", "--vary", "--lr 1", "--flip", "--lr 2"], "is a value of no flag"),
        (["rf_dit_cifar.py", "x.py", "--vary", "--lr 1", "--lr 2"], "--vary is for flags of one script"),
        (["rf_dit_cifar.py", "--seed", "3"], "--seed differs from run to run; leave it out"),
        (
            ["rf_dit_cifar.py", "--vary", "--seed 1", "--seed 2"],
            "--seed differs from run to run; leave it out",
        ),
        (
            ["rf_dit_cifar.py", "--out", "mine"],
            "mine/code is not of a comparison (['thesis.py']); set another",
        ),
        (["rf_dit_cifar.py", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["rf_dit_cifar.py", "broken.patch"], "broken.patch does not apply to rf_dit_cifar.py"),
        (["fails.py"], "fails does not train: unknown argument --bs"),
        (["--record", "."], "has no readable results.json"),
        (["rf_dit_cifar.py", "--eval-every", "0"], "leave out --eval-every 0"),
        (["rf_dit_cifar.py", "--vary", "--image-size 8", "--image-size 16"], "trains on other images"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, error, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rf_dit_cifar.py", "common.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    code = "import common\nif __name__ == '__main__':\n    with common.exit_on_user_error():\n"
    (tmp_path / "fails.py").write_text(code + "        raise common.UserError('unknown argument --bs')\n")
    lines = "--- a/rf_dit_cifar.py\n+++ b/rf_dit_cifar.py\n@@ -1,2 +1,2 @@\n not there\n-nor this\n+at all\n"
    (tmp_path / "broken.patch").write_text(lines)
    (tmp_path / "mine" / "code").mkdir(parents=True)
    (tmp_path / "mine" / "code" / "thesis.py").write_text("years")
    before = [f for f in sorted(tmp_path.rglob("*")) if f.is_file()]
    with pytest.raises(UserError, match=re.escape(error)):
        compare.main([*words, *(["--dataset", str(images), *TINY] if words[0] != "--record" else [])])
    assert [f for f in sorted(tmp_path.rglob("*")) if f.is_file()] == before


def test_a_patch_is_applied_to_the_baseline_and_one_of_another_file_left_out(tmp_path, capsys):
    script, code = ROOT / "rf_dit_cifar.py", tmp_path / "code"
    old = "def decode(x, cfg):\n    return x\n"
    text = f"A header.\n--- a/rf_dit_cifar.py\n+++ b/rf_dit_cifar.py\n@@ -{line_of(script, old)},2 +1,2 @@\n"
    (tmp_path / "idea.patch").write_text(text + " def decode(x, cfg):\n-    return x\n+    return -x\n")
    (tmp_path / "other.patch").write_text(text.replace("rf_dit_cifar", "ddim_sample"))
    files = [script, tmp_path / "other.patch", tmp_path / "idea.patch"]
    first, second = compare.make_contenders([*map(str, files)], [], code)
    assert "left out" in (out := capsys.readouterr().out) and "changes ddim_sample.py" in out
    assert (first["name"], second["name"]) == ("rf_dit_cifar", "idea") and first["hash"] != second["hash"]
    assert (code / first["code"] / first["script"]).read_text() == script.read_text()
    changed = (code / second["code"] / second["script"]).read_text()
    assert changed == script.read_text().replace(old, old.replace("return x", "return -x"))


def line_of(file, text):
    return file.read_text().split(text)[0].count("\n") + 1


# ---- a comparison


def test_samples_are_judged_by_the_images_of_the_runs(images):
    """A fork may load others, and a classifier needs two classes."""
    config, about = {"dataset": str(images), "data_root": ""}, {"shape": "1x8x8", "classes": ["a", "b"]}
    for split in ("train", "test"):
        data = compare.common.load_dataset(str(images), split=split, image_size=8, channels=1)
        about[split] = {"fingerprint": data.fingerprint()}
    about["test"]["images"] = 10
    compare.check_dataset(config, about)
    with pytest.raises(UserError, match="has 9 test images, too few to judge by; use another"):
        compare.check_dataset(config, about | {"test": about["test"] | {"images": 9}})
    with pytest.raises(UserError, match="has one class, and a classifier needs two; use another"):
        compare.check_dataset(config, about | {"classes": ["a"]})
    with pytest.raises(
        UserError, match="the runs have other images or labels than --dataset .*; name theirs"
    ):
        compare.check_dataset(config, about | {"train": {"fingerprint": "0"}})


def test_what_cannot_be_sampled_is_found_before_it_is_trained(images, tmp_path, capsys):
    idea = tmp_path / "idea.py"
    text = (ROOT / "rf_dit_cifar.py").read_text()
    old = "    if cfg.class_dropout == 1:  # unconditional\n"
    text = text.replace(old, f"    raise ValueError('unfit')\n{old}")
    idea.write_text(
        text.replace("sample_grid(ema.model", "(lambda *_: (torch.zeros(1, 1, 8, 8), []))(ema.model")
    )
    (tmp_path / "common.py").write_bytes((ROOT / "common.py").read_bytes())
    words = [ROOT / "rf_dit_cifar.py", idea, "--dataset", images, *TINY, "--out", tmp_path / "out"]
    with pytest.raises(UserError, match="idea cannot be sampled: ValueError: unfit"):
        compare.main([*map(str, words)])
    assert not (tmp_path / "out" / "runs").exists()


def test_a_run_that_was_killed_before_it_saved_is_trained_anew(tmp_path, monkeypatch):
    contender, calls = {"code": "0", "script": "idea.py", "name": "idea", "flags": []}, []
    monkeypatch.setattr(compare, "call", lambda command, what: calls.append(command))
    home = tmp_path / "runs" / "0" / "seed_3"
    for checkpoint in (False, True):
        (home / "rf" / "x" / "checkpoints").mkdir(parents=True)
        for name in ["run.yaml", "run.out"] + ["checkpoints/step_00000001.pt"] * checkpoint:
            (home / "rf" / "x" / name).write_text("")
        with contextlib.suppress(ValueError):  # nothing was trained
            compare.train(tmp_path, contender, 3, [])
        assert home.exists() == checkpoint and (f"--resume={home}/rf/x" in calls[-1]) == checkpoint


def test_interrupted_continued_and_extended(images, tmp_path, monkeypatch, capsys):
    """Equal contenders are exactly equal: seeds, order of the images, noise and samples are paired."""
    monkeypatch.setattr(quality, "STEPS", 20)
    out, script = tmp_path / "out", tmp_path / "idea.py"
    script.write_text((ROOT / "rf_dit_cifar.py").read_text() + "import helper\nfrom common import own\n")
    (tmp_path / "common.py").write_text((ROOT / "common.py").read_text() + "own = 1\n")
    (tmp_path / "helper.py").write_text("import common\n\nassert common.own\n")
    words = [script, "--vary", "--lr 1e-3", "--lr 0.001 --t-sampling uniform", "--dataset", images, *TINY]
    words += [
        "--num-samples",
        20,
        "--sample",
        "--steps 2 --seed 9",
        "--out",
        out,
        "--cache",
        tmp_path / "cache",
    ]
    words = [*map(str, words), "--seeds", "1"]
    command = [sys.executable, ROOT / "tests/compare.py", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    logs, end = [], time.monotonic() + 120
    while not any(f.read_text().count("\n") > 20 for f in logs):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
        logs = [*out.glob("runs/0/*/rf/*/metrics/loss.jsonl")]
    os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "the same command continues" in printed
    (run,) = out.glob("runs/*/*/rf/*")
    assert len([*run.glob("checkpoints/*.pt")]) == 1  # it has saved; killed at once, it had not

    compare.main(words)
    assert ", continuing after step" in (run / "run.out").read_text()
    compare.main([*words[:-1], "2"])  # a second seed
    assert [len([*out.glob(f"runs/{c}/seed_{s}/rf/*")]) for c in "01" for s in "01"] == [1, 1, 1, 1]
    assert len([*out.glob("cells/*/seed_1/*_seed1_*.npz")]) == 2  # the noise of samples, too
    results = json.loads((out / "results.json").read_text())
    first, second = results["cells"].values()
    for metric, *_ in compare.METRICS:
        assert [first[s][metric] for s in "01"] == [second[s][metric] for s in "01"], metric
    assert first["0"]["held-out loss"] != first["1"]["held-out loss"]
    assert first["0"]["steps"] == 300 and len(first["0"]["curve"]) == 2
    printed = capsys.readouterr().out
    assert re.search(r"2 seeds show differences above [\d.e+]+ in 8 of 10 cases", printed)
    assert printed.count("no difference larger than 0 |") == 6
    assert Image.open(out / "figure.png").width > 1000
    config = results["config"]
    assert config["out"] == ""  # no path of this machine
    flop = compare.probe(script, config)[1]
    assert flop == pytest.approx(flop_by_hand(config), rel=1e-6)

    assert "helper" not in sys.modules and not hasattr(compare.common, "own")
    with open(out / "lock") as file:
        assert compare.common.lock(file)
        with pytest.raises(UserError, match="is in use by another process"):
            compare.main(words)
    cell = out / "cells" / "0" / "seed_0.json"
    text = cell.read_text()
    cell.write_text(text.replace('"classifier": "', '"classifier": "another-'))
    with pytest.raises(UserError, match="was judged by .*another-.* and .*; delete its cells of one"):
        compare.main(words)
    cell.write_text(text)
    script.write_text(script.read_text() + "# edited\n")
    with pytest.raises(UserError, match="compares other code, flags, samples or metrics"):
        compare.main(words)

    # The record: of MNIST, five seeds and 1,000 samples.
    with pytest.raises(UserError, match="the record is MNIST's"):
        compare.main(["--record", str(out)])
    results |= {"config": config | {"dataset": "mnist"}, "seeds": 5, "num_samples": 1000}
    cell = first["0"] | {"label accuracy": 0.995}
    good, bad = (
        {str(s): cell | {"FD ratio": fd + s / 100, "seconds": t} for s in range(5)}
        for fd, t in ((1.5, 60), (1.99, 30))
    )
    results["cells"] = dict(zip(results["cells"], (good, bad), strict=True))
    (out / "results.json").write_text(json.dumps(results))
    compare.main(["--record", str(out)])
    *_, one, two = capsys.readouterr().out.splitlines()
    assert "| 1.00 ± 0.00 | 1.0 | " in one and "99.50%" in one and one.endswith("|")
    assert "| 0.50 ± 0.00 | 0.5 | " in two and two.endswith("target not reached")
    (out / "code/0/idea.py").write_text("")
    with pytest.raises(UserError, match="is not the code that was compared"):
        compare.main(["--record", str(out)])


def flop_by_hand(config):
    """FLOP of a training step per image, by hand: products of the DiT, and twice as many in the backward
    pass, but for the inputs of the network, which have no gradient."""
    dim, tokens, hidden = config["dim"], (config["shape"][1] // config["patch"]) ** 2, 4 * config["dim"]
    pixels = config["shape"][0] * config["patch"] ** 2
    block = 2 * tokens * (4 * dim * dim + 2 * dim * hidden) + 2 * 2 * tokens * tokens * dim
    once = 2 * (256 * dim + dim * dim + (len(config["classes"]) + 1) * dim + 6 * dim * dim + 2 * dim * dim)
    inputs = 2 * dim * (256 + len(config["classes"]) + 1 + tokens * pixels)
    return 3 * (config["depth"] * block + once + 2 * 2 * tokens * pixels * dim) - inputs
