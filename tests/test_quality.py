"""Metrics of samples against closed forms, their classifier, and what they are for known sets."""

import json
import math
import os
import pickle
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import quality as q
import torch
from PIL import Image, ImageColor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

import common

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default of --cache is below
    monkeypatch.setattr(q, "STEPS", 5)  # what fails to be refused takes no minutes


def normal(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------------
# Metrics against closed forms


def test_frechet_of_gaussians():
    # With commuting covariances: |m - n|^2 + sum (sqrt(a) - sqrt(b))^2 over the eigenvalues.
    turn, _ = torch.linalg.qr(normal(6, 6, 0))
    a, b, shift = torch.arange(1.0, 7), torch.tensor([9.0, 0, 1, 25, 0.5, 6]), torch.arange(6) / 10
    A, B = (turn @ torch.diag(v.double()) @ turn.T for v in (a, b))
    want = (shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item()
    assert q.frechet(torch.zeros(6), A, shift, B) == pytest.approx(want, rel=1e-6)
    # In two dimensions the trace of a root is sqrt(tr M + 2 sqrt(det M)), commuting or not.
    A, B = torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double(), torch.tensor([[1.0, -0.7], [-0.7, 3.0]]).double()
    M = A @ B
    want = (A.trace() + B.trace() - 2 * (M.trace() + 2 * M.det().sqrt()).sqrt()).item()
    for pair in ((A, B), (B, A)):
        assert q.frechet(torch.zeros(2), pair[0], torch.zeros(2), pair[1]) == pytest.approx(want, rel=1e-12)


def test_frechet_distance_of_samples_of_gaussians():
    scale, shift = torch.tensor([2.0, 1, 0.5]), torch.tensor([0.0, 1, 0])
    got = q.frechet_distance(normal(50_000, 3, 0), normal(50_000, 3, 1) * scale + shift)
    assert got == pytest.approx(1 + 1 + 0.25, rel=0.03)


def test_frechet_distance_where_ranks_are_deficient():
    a = normal(20, 64, 0, torch.float32)  # 19 directions of 64
    size = a.double().var(0).sum().item()
    assert q.frechet_distance(a, a) < 1e-6 * size
    assert q.frechet_distance(a, a + 3) == pytest.approx(64 * 9, rel=1e-6)
    b = normal(30, 64, 1)
    assert q.frechet_distance(a, b) == pytest.approx(q.frechet_distance(b, a), rel=1e-6)
    x, y = torch.diag(torch.tensor([1.0, 0, 0])), torch.diag(torch.tensor([0, 4.0, 0]))
    assert q.frechet(torch.zeros(3), x, torch.zeros(3), y) == pytest.approx(5)


def test_frechet_distance_is_that_of_torch_fidelity():
    a, b = normal(500, 16, 0) @ normal(16, 16, 2), normal(300, 16, 1) + 1
    want = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), False)
    assert q.frechet_distance(a, b) == pytest.approx(want["frechet_inception_distance"], rel=1e-9)


def test_kernel_distance_is_unbiased():
    # For N(0, s^2 I), N(0, r^2 I) in D dimensions E k(x, y) = 1 + 3 s^2 r^2 / D, MMD^2 = 3 (s^2 - r^2)^2 / D.
    for scale, tolerance in [(1.0, 0.01), (1.5, 0.04)]:
        sets = [(normal(100, 8, 2 * i), normal(100, 8, 2 * i + 1) * scale) for i in range(60)]
        got = np.mean([q.kernel_distance(a, b) for a, b in sets])
        assert got == pytest.approx(3 * (scale**2 - 1) ** 2 / 8, abs=tolerance)  # biased, it is 0.06 more


def test_precision_and_recall_of_points_on_a_line():
    # Radii of 0, 1, ..., 9: to the third neighbour, 2 inside and 3 at the ends; so they cover [-3, 12].
    line = torch.arange(10.0)[:, None]
    near, far = torch.tensor([-2.9, 0.5, 4.5, 11.9])[:, None], torch.tensor([-3.1, 12.1, 50, 99])[:, None]
    assert q.precision_recall(torch.cat([near, far]), line)[0] == 0.5
    assert q.precision_recall(line, torch.cat([near, far]))[1] == 0.5
    assert q.precision_recall(line, line) == (1.0, 1.0)


def test_precision_tells_of_fidelity_and_recall_of_variety():
    modes = torch.tensor([0.0, 40]).repeat(200)[:, None]
    real, samples = normal(400, 8, 0) + modes, normal(400, 8, 1) + modes
    precision, recall = q.precision_recall(samples, real)
    assert precision > 0.8 and recall > 0.8
    dropped = q.precision_recall(normal(400, 8, 2), real)
    assert dropped[0] > 0.8 and dropped[1] < 0.55
    astray = torch.cat([samples[:200], normal(200, 8, 3) - 40])
    assert q.precision_recall(astray, real)[0] < 0.55 and q.precision_recall(astray, real)[1] > 0.7


def test_variation():
    assert q.variation(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1]), 3) == 0
    assert q.variation(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1]), 3) == 0.25
    assert q.variation(torch.tensor([2]), torch.tensor([0, 1]), 3) == 1
    assert q.variation(torch.tensor([0, 1]), torch.tensor([2, 3]), 4) == 1


def test_nearest_is_in_pixels():
    train = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    train[1], train[2] = 255, 51
    distances, rows = q.nearest(train[2:], train, 3)
    assert rows.tolist() == [[2, 0, 1]]
    torch.testing.assert_close(distances, torch.tensor([[0, 0.2, 0.8]]))
    big = train.repeat_interleave(8, 2).repeat_interleave(8, 3)  # 64 pixels a side, compared at 32
    torch.testing.assert_close(q.nearest(big[2:], big, 3)[0], distances, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------
# On digits of 16 x 16 pixels, with a classifier of few steps


@pytest.fixture(scope="module")
def digits():
    """common.load_dataset that draws each dataset once."""
    return cache(common.load_dataset)


@pytest.fixture
def measure(digits, tmp_path_factory, monkeypatch, capsys):
    """measure(images [N, C, H, W], labels) -> (metrics, FD and KID without hashes; printed text; .json)."""
    monkeypatch.setattr(q, "STEPS", 100)
    monkeypatch.setattr(common, "load_dataset", digits)
    shared = tmp_path_factory.getbasetemp() / "classifiers"  # one is trained for all tests

    def run(images, labels=None, **more):
        labels = {} if labels is None else {"arr_1": np.asarray(labels)}
        np.savez("s.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), **labels, **more)
        q.main(["s.npz", "--dataset", "digits", "--device", "cpu", "--cache", str(shared)])
        assert Image.open("s_neighbours.png").size[0] > 10 * 64
        results = json.loads(Path("s_quality.json").read_text())
        metrics = {k.split()[0] if k[:2] in ("FD", "KI") else k: v for k, v in results["metrics"].items()}
        return metrics, capsys.readouterr().out, results

    return run


def test_real_images_are_at_the_baseline(measure, digits):
    data = digits("digits", "", "test", 16, 1)
    protocol = json.dumps({"nfe": 12, "solver": "heun", "rounding": "round(127.5 x + 127.5)"})
    metrics, printed, results = measure(data.images[:600], data.labels[:600], protocol=protocol)
    for key in ("FD", "KID"):
        assert metrics[key]["samples"] < np.mean(metrics[key]["baseline"]) < 0.02 * metrics[key]["noise"]
        assert len(set(metrics[key]["baseline"])) == q.BASELINES
    assert metrics["precision"]["samples"] == 1 and metrics["precision"]["noise"] < 0.1
    assert metrics["recall"]["samples"] > 0.7 and metrics["recall"]["noise"] < 0.1
    assert metrics["label accuracy"]["samples"] > 0.95 > 0.3 > metrics["label accuracy"]["noise"]
    assert metrics["class histogram"]["samples"] < 0.05 < 0.5 < metrics["class histogram"]["noise"]
    assert (
        metrics["nearest training images"]["samples"] <= 0.04
        and metrics["nearest training images"]["noise"] == 0
    )
    assert metrics["distance to train"]["samples"] == pytest.approx(
        metrics["distance to train"]["baseline"][0], rel=0.1
    )
    assert sum(results["seen"].values()) == 600
    assert "NFE 12" in printed and "heun" in printed and "2,000 test images of digits" in printed
    name = next(k for k in results["metrics"] if k.startswith("FD ")).split()[1]
    assert f"classifier  {name}: right on" in printed and len(name) == len("digits-") + 8


def test_the_accuracy_of_shuffled_labels_is_chance(measure, digits):
    data = digits("digits", "", "test", 16, 1)
    metrics, *_ = measure(data.images[:300], data.labels[torch.randperm(300)])
    assert metrics["label accuracy"]["samples"] < 0.25


def test_training_images_are_found_among_the_nearest(measure, digits):
    data = digits("digits", "", "train", 16, 1)
    metrics, printed, _ = measure(data.images[:100], np.full(100, -1))
    assert (
        metrics["nearest training images"]["samples"] == 1 and metrics["distance to train"]["samples"] < 1e-3
    )
    assert "label accuracy" not in metrics and "without labels" in printed  # -1: unconditional
    assert "does not say how the samples were made" in printed


def test_samples_of_few_classes(measure, digits):
    data = digits("digits", "", "test", 16, 1)
    rows = data.labels < 2
    metrics, *_ = measure(data.images[rows][:200])
    assert metrics["class histogram"]["samples"] == pytest.approx(0.8, abs=0.05)
    assert metrics["precision"]["samples"] == 1 and metrics["recall"]["samples"] < 0.5
    assert metrics["FD"]["samples"] > 5 * np.mean(metrics["FD"]["baseline"])


def test_the_baseline_has_the_classes_of_the_samples(digits):
    data = deepcopy(digits("digits", "", "train", 16, 1))
    data.images.flatten(1)[:, 0] = data.labels  # a pixel that tells
    g, wanted = torch.Generator().manual_seed(0), torch.tensor([3, 3, 3, 9, 0] * 4)
    images = q.real_images(data, 20, wanted, g)
    assert images[:, 0, 0, 0].tolist() == wanted.tolist() and len(images.flatten(1).unique(dim=0)) == 20
    assert q.real_images(data, 30_000, None, g).shape[0] == 20_000
    assert q.real_images(data, 30_000, torch.zeros(30_000), g).shape[0] == 30_000


# ------------------------------------------------------------------------------------------------
# The classifier


@pytest.fixture
def small():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 8, 8), generator=g, dtype=torch.uint8)
    return common.Dataset("small", images, torch.arange(50) % 2, ["a", "b"])


def test_the_classifier_is_trained_once_and_always_the_same(small, tmp_path, monkeypatch):
    model, name = q.classifier(small, tmp_path / "a", CPU)
    _, again = q.classifier(small, tmp_path / "b", CPU)
    assert name == again == f"small-{q.weights_hash(model.state_dict())}"
    with monkeypatch.context() as m:
        m.setattr(q, "weights_hash", lambda weights: name.removeprefix("small-"))
        m.setattr(torch.optim, "AdamW", None)  # whoever trains fails
        cached, same = q.classifier(small, tmp_path / "a", CPU)
    assert same == name
    x = small.images / 127.5 - 1
    torch.testing.assert_close(cached(x), model(x))
    small.images[0, 0, 0, 0] ^= 1  # other images, another classifier
    _, other = q.classifier(small, tmp_path / "a", CPU)
    assert other != name and len(list((tmp_path / "a").iterdir())) == 2
    monkeypatch.setattr(q, "STEPS", 6)
    q.classifier(small, tmp_path / "a", CPU)
    assert len(list((tmp_path / "a").iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "weights", "other", "pickle"])
def test_a_damaged_classifier_is_trained_again(damage, small, tmp_path, capsys):
    _, name = q.classifier(small, tmp_path, CPU)
    [file] = tmp_path.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "weights":
        state = torch.load(file, weights_only=True)
        state["model"]["head.bias"] += 1
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps(Evil(tmp_path)) if damage == "pickle" else b"not a classifier")
    assert q.classifier(small, tmp_path, CPU)[1] == name
    assert "is damaged" in capsys.readouterr().out and list(tmp_path.iterdir()) == [file]
    q.classifier(small, tmp_path, CPU)
    assert "damaged" not in capsys.readouterr().out


class Evil:
    """Its pickle makes a folder `pwned` where it is loaded with trust."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "pwned"),)


# ------------------------------------------------------------------------------------------------
# Inception, with random weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, "load", lambda *a, **k: {})
        m.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        model = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="x")
    torch.save(model.state_dict(), file)
    return file, model


def test_inception_is_that_of_torch_fidelity(weights):
    file, model = weights
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    got = q.inception(str(file), CPU)(images)
    assert got.shape == (3, 2048)
    torch.testing.assert_close(got, model(images.repeat(1, 3, 1, 1))[0])


def test_one_class_is_measured_by_inception_alone(tmp_path, monkeypatch, capsys):
    folder, g = tmp_path / "faces", np.random.default_rng(0)
    folder.mkdir()
    images = g.integers(0, 256, (220, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    np.savez(tmp_path / "s.npz", arr_0=images[:20], protocol=json.dumps({"run": "r7"}))
    arguments = [str(tmp_path / "s.npz"), "--dataset", str(folder)]
    with pytest.raises(common.UserError, match="has one class.*; give --inception"):
        q.main(arguments)
    monkeypatch.setattr(q, "inception", lambda path, device: lambda x: x.flatten(1)[:, :5].float())
    q.main([*arguments, "--inception", "x", "--out", str(tmp_path / "out")])
    metrics = json.loads((tmp_path / "out" / "r7_s_quality.json").read_text())["metrics"]
    assert set(metrics) == {"distance to train", "nearest training images", "FD Inception", "KID Inception"}
    assert "classifier" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Wrong input


GOOD = {"arr_0": np.zeros((20, 16, 16, 1), np.uint8), "arr_1": np.arange(20) % 10}
WRONG = [
    ({"arr_0": GOOD["arr_0"].astype(float)}, "arr_0 is float64"),
    ({"arr_0": GOOD["arr_0"][..., 0]}, "arr_0 is uint8"),
    ({"arr_0": GOOD["arr_0"].transpose(0, 3, 1, 2)}, "arr_0 is uint8"),
    ({"arr_0": GOOD["arr_0"][:, :8]}, "arr_0 is uint8"),
    ({"arr_0": GOOD["arr_0"][:, :4, :4]}, "arr_0 is uint8"),
    ({"arr_0": np.array([{}] * 20)}, "no .npz of samples"),
    ({"arr_0": GOOD["arr_0"][:5], "arr_1": GOOD["arr_1"][:5]}, "has 5 samples"),
    ({"arr_1": GOOD["arr_1"][:7]}, "arr_1 is int64 (7,)"),
    ({"arr_1": GOOD["arr_1"] / 2}, "arr_1 is float64"),
    ({"arr_1": GOOD["arr_1"] + 1}, "labels 1 to 10, and digits 10 classes"),
    ({"arr_1": GOOD["arr_1"] - 1}, "labels -1 to 8"),
    ({"protocol": "{"}, "no .npz of samples"),
    ({"protocol": "[1, 2]"}, "no .npz of samples"),
    (b"", "no .npz of samples"),
    (b"PK\x03\x04" + bytes(100), "no .npz of samples"),
    (None, "No such file"),
]


def refused(capsys, *arguments):
    """What is wrong, as one line and status 2."""
    with pytest.raises(SystemExit) as e, common.exit_on_user_error():
        q.main([str(a) for a in arguments])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "; " in err
    return err


@pytest.mark.parametrize("arrays, message", WRONG)
def test_samples_that_are_none(arrays, message, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_dataset", digits)
    file = tmp_path / "s.npz"
    if isinstance(arrays, dict):
        np.savez(file, **(GOOD | arrays))
    elif arrays is not None:
        file.write_bytes(arrays)
    assert message in refused(capsys, file, "--dataset", "digits")


def test_a_pickle_in_the_samples_is_not_run(tmp_path, capsys):
    np.savez(tmp_path / "s.npz", arr_0=np.array([Evil(tmp_path)] * 20))
    refused(capsys, tmp_path / "s.npz", "--dataset", "digits")
    np.save(tmp_path / "s.npy", GOOD["arr_0"])
    refused(capsys, tmp_path / "s.npy", "--dataset", "digits")
    assert not (tmp_path / "pwned").exists()


def test_wrong_flags(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_dataset", digits)
    file = tmp_path / "s.npz"
    np.savez(file, **GOOD)
    assert "no samples are named" in refused(capsys)
    assert "no samples are named" in refused(capsys, "--dataset", "digits")
    assert "--dataset is not given" in refused(capsys, file)
    assert "there is no dataset cats" in refused(capsys, file, "--dataset", "cats")
    assert "did you mean --dataset?" in refused(capsys, file, "--dataste", "digits")
    blocked = tmp_path / "s.npz" / "x"
    assert "with --cache" in refused(capsys, file, "--dataset", "digits", "--cache", blocked)
    assert "with --out" in refused(capsys, file, "--dataset", "digits", "--out", blocked)


def test_inception_weights_that_are_none(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_dataset", digits)
    np.savez(tmp_path / "s.npz", **GOOD)
    start = tmp_path / "s.npz", "--dataset", "digits", "--inception"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(tmp_path)))
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for name in ("none.pth", "evil.pth", "other.pth"):
        assert f"{name} holds no weights" in refused(capsys, *start, tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_without_torch_fidelity(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_dataset", digits)
    np.savez(tmp_path / "s.npz", **GOOD)
    for module in ("metric_kid", "metric_prc", "feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, f"torch_fidelity.{module}", None)
    arguments = tmp_path / "s.npz", "--dataset", "digits", "--cache", tmp_path / "cache"
    assert "torch-fidelity cannot be imported" in refused(capsys, *arguments)
    assert "pip install" in refused(capsys, *arguments, "--inception", "x")
    assert not (tmp_path / "cache").exists()  # said before the minutes of training


@pytest.mark.parametrize(
    "train, test, message",
    [("ab", "a", "has 1 test images"), ("a", "ab" * 9, "has held-out images of b, which training lacks")],
)
def test_datasets_that_cannot_be_used(train, test, message, tmp_path, capsys):
    for split, labels in {"train": train * 30, "test": test}.items():
        for i, c in enumerate(labels):
            (tmp_path / "data" / split / c).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "data" / split / c / f"{i}.png")
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((20, 8, 8, 3), np.uint8))
    assert message in refused(capsys, tmp_path / "s.npz", "--dataset", tmp_path / "data")


def test_parts_of_the_test_images_have_all_classes(tmp_path, monkeypatch):
    """A folder's images are sorted by class, and some measures take the first ones."""
    for i in range(600):
        (tmp_path / "data" / "train" / str(i % 5)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i % 256).save(tmp_path / "data" / "train" / str(i % 5) / f"{i}.png")
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((20, 8, 8, 1), np.uint8))
    seen = []
    monkeypatch.setattr(q, "classifier", lambda *_: (None, ""))
    monkeypatch.setattr(q, "by_classifier", lambda *a: seen.append(a[6].labels) or ([], [0] * 5))
    monkeypatch.setattr(q, "by_pixels", lambda images, train_set, test_set, noise: exit(test_set is None))
    with pytest.raises(SystemExit):
        q.main([str(tmp_path / "s.npz"), "--dataset", str(tmp_path / "data")])
    assert len(seen[0]) == 30 and len(set(seen[0][:15].tolist())) == 5


def test_as_a_program(script, tmp_path):
    process = script("tests/quality.py", "none.npz", "--dataset", "digits")
    assert process.returncode == 2 and process.err.startswith("error: none.npz") and not process.out
    process = script("tests/quality.py", "--help")
    assert process.returncode == 0 and "--inception" in process.out and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------
# Captions and attributes of drawn digits


def test_captions_say_how_digits_are_drawn():
    """Colours are those of the words, and a fifth of the combinations is for the held-out split alone."""
    names, unseen = [w for words in common.DIGITS.values() for w in words], {}
    assert len(names) == len({*names})  # a word belongs to one attribute
    for split in ("train", "test"):
        data = common.load_dataset("digits", split=split, channels=3)
        rows = q.attributes([c for (c,) in data.captions])
        said = (rows >= 0).float().mean(0)
        assert torch.equal(rows[:, 0], data.labels) and (said[1:] > 0.8).all() and (said[1:] < 0.9).all()
        assert max(len(c.split()) for (c,) in data.captions) == 9
        pixels, chosen = data.images.flatten(2).float(), torch.arange(len(rows))
        paper = data.images[:, :, 0].float().median(2).values
        pen = pixels[chosen, :, (pixels - paper[..., None]).norm(dim=1).argsort(1)[:, -20]]
        for k, colour in {"pen": pen, "paper": paper}.items():
            column = rows[:, [*common.DIGITS].index(k)]
            named = torch.tensor([ImageColor.getrgb(w) for w in common.DIGITS[k]]).float()
            assert (torch.cdist(colour, named).argmin(1) == column)[column >= 0].float().mean() > 0.95, k
        unseen[split] = q.is_unseen(rows[(rows >= 0).all(1)]).float().mean().item()
    assert unseen["train"] == 0 and 0.4 < unseen["test"] < 0.6
    gray = common.load_dataset("digits", split="test").captions
    assert (q.attributes([c for (c,) in gray])[:, 3:] == -1).all()


def test_prompts_of_digits_name_every_attribute():
    """tests/prompts.txt: 500 of combinations in the training split, then 500 of others; made as here."""
    names, rng, prompts = [*common.DIGITS.values()], np.random.default_rng(0), []
    for i in range(1000):
        weight, lean, pen = (rng.integers(len(names[k])) for k in (1, 2, 3))
        paper = ((0 if i >= 500 else rng.integers(1, 5)) - i % 10 - pen) % 5
        words = [w[k] for w, k in zip(names, (i % 10, weight, lean, pen, paper), strict=True)]
        prompts.append(common.describe(words, rng, keep=1))
    assert (Path(q.__file__).parent / "prompts.txt").read_text().splitlines() == prompts
    rows = q.attributes(prompts)
    assert (rows >= 0).all() and q.is_unseen(rows).tolist() == [False] * 500 + [True] * 500


def test_attributes_of_true_images_are_seen_and_of_swapped_prompts_not(tmp_path, monkeypatch, capsys):
    """The classifier reads images of the test split as their captions say, whichever words these use."""
    monkeypatch.setattr(q, "STEPS", 250)
    data = common.load_dataset("digits", split="test", image_size=16, channels=3)
    captions = [c for (c,) in data.captions]
    rows = (q.attributes(captions) >= 0).all(1).nonzero().flatten()[:400]
    prompts, shares = [captions[i] for i in rows], []
    for given in (prompts, prompts[1:] + prompts[:1]):
        arrays = {"arr_0": data.images[rows].permute(0, 2, 3, 1).numpy()}
        np.savez(tmp_path / "s.npz", **arrays, protocol=json.dumps({"prompt": given}))
        q.main(["s.npz", "--dataset", "digits", "--attributes", "--device", "cpu"])
        report = json.loads((tmp_path / "s_attributes.json").read_text())["attributes"]
        assert [*report["samples, held out"]] == [*common.DIGITS, "all", "n"]
        assert report["samples, held out"]["n"] + report["samples, of training"]["n"] == 400
        shares.append([report[f"samples, {k}"]["all"] for k in ("of training", "held out")])
        assert min(report["true images, held out"].values()) == report["true images, held out"]["all"]
    assert "true images, held out" in capsys.readouterr().out
    one = [p for p, y in zip(prompts, q.attributes(prompts), strict=True) if q.is_unseen(y[None])][:1]
    np.savez(tmp_path / "s.npz", **arrays, protocol=json.dumps({"prompt": one}))
    q.main(["s.npz", "--dataset", "digits", "--attributes", "--device", "cpu"])
    report = json.loads((tmp_path / "s_attributes.json").read_text())["attributes"]
    assert "samples, held out" in report and "samples, of training" not in report
    assert min(shares[0]) > 0.5 and max(shares[1]) < 0.05, shares


def test_attributes_need_prompts_of_digits(digits, tmp_path, monkeypatch, capsys):
    colour = {"arr_0": np.zeros((20, 16, 16, 3), np.uint8)}
    np.savez(tmp_path / "s.npz", **colour)
    assert "the file has no prompts" in refused(capsys, "s.npz", "--dataset", "digits", "--attributes")
    assert "is for digits in colour" in refused(capsys, "s.npz", "--dataset", "mnist", "--attributes")


def test_no_number_is_not_finite(measure, digits):
    """All samples one image: covariance 0, all neighbours at distance 0."""
    data = digits("digits", "", "test", 16, 1)
    metrics, *_ = measure(data.images[:1].repeat(50, 1, 1, 1), np.zeros(50, int))
    assert all(math.isfinite(v) for m in metrics.values() for v in [m["samples"], m["noise"], *m["baseline"]])
    assert metrics["recall"]["samples"] < 0.05 and metrics["class histogram"]["samples"] > 0.8
