"""Is an idea better than what it was forked from? The same seeds, data and noise for all, taking turns.

    python tests/compare.py rf_dit_cifar.py my_idea.py --dataset mnist --minutes 2 --seeds 5
    python tests/compare.py rf_dit_cifar.py --vary "--optimizer muon" "--optimizer adamw" --minutes 2
    python tests/compare.py rf_dit_cifar.py tests/forks/*.patch --dataset mnist --minutes 2
    python tests/compare.py --record logs/compare/NAME

Scripts and patches come first, the baseline before the others. Flags that are not listed below go to all of
them: --minutes of training (compiling, evaluating and saving do not count) or --steps. For each seed, all
train one after the other, each time beginning with another one, so that a noisy machine is noisy for all.
Samples of each run are evaluated as in tests/quality.py. FD ratio: the Frechet distance divided by that of as
many training images. The held-out loss is compared where it means the same: where equal outputs of a network
give equal losses.

Differences to the baseline are paired by seed: their mean, its 95% interval, p of Student's t-test, and how
many seeds agree. The verdict is "better" or "worse" if the interval excludes 0, else how large a difference
can be. Which difference so many seeds can show is said from the spread of the baseline, once it is known; a
baseline alone tells it beforehand.

Interrupted, the same command continues; with more --seeds, it adds to what there is. --record checks a folder
against the target of MNIST's record (TARGET below) and prints its rows.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.stats
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import quality  # noqa: E402

import common  # noqa: E402
from common import UserError, derive_seed, first_line, print0, require  # noqa: E402


@dataclass
class Config:
    vary: tuple[str, ...] = ()  # flags of each contender: --vary "--lr 1e-3" "--lr 2e-3"
    seeds: int = 5  # number of seeds: 0, 1, 2, ...
    sample: str = "--solver dpmpp2m --steps 12"  # flags of ddim_sample.py
    num_samples: int = 1000  # samples of each run
    cache: str = "data/quality"  # folder of trained classifiers
    out: str = ""  # folder of code, runs and results; default logs/compare/ and a name of its own
    record: str = ""  # folder of a comparison to check and to print the record's rows of


TRAIN = "--sample-every 0 --eval-every 250".split()  # flags of all trainers, unless others are given
# Name, whether more is better, digits. The first metric is the one to decide by.
METRICS = [("FD ratio", False, 3), ("held-out loss", False, 4), ("label accuracy", True, 4)]
METRICS += [("KID", False, 5), ("precision", True, 3), ("recall", True, 3)]
SPEED = [("steps", True, 0), ("images/s", True, 1), ("seconds", False, 1), ("startup", False, 1)]


# ------------------------------------------------------------------------------------------------
# Contenders


def split_arguments(argv):
    """argv -> (scripts and patches, flags of ours, flags of the trainers, contenders of --vary).

    A word with a space in it is a value, also if it begins with a dash. Raises UserError.
    """
    own = {f"--{f.name.replace('_', '-')}" for f in fields(Config)} | {"-h", "--help"}
    files, ours, theirs, variants = [], [], [], []
    target = files
    for word in argv:
        if word == "--vary":
            target = variants
        elif word.startswith("-") and " " not in word:
            target = ours if word.split("=")[0] in own else theirs
        if word != "--vary":
            target.append(word)
    lost = [w for w in theirs if w.startswith("-") and " " in w]
    require(not lost, f"{lost[:1]} is a value of no flag; the contenders of --vary stand together, in quotes")
    several = len(variants) > 1 or "--vary" not in argv
    require(several, '--vary needs the flags of two contenders or more: --vary "--lr 1e-3" "--lr 2e-3"')
    every = [*theirs, *sum(map(shlex.split, variants), [])]
    taken = {w.split("=")[0] for w in every} & {"--seed", "--resume", "--config"}
    require(not taken, f"{' '.join(taken)} differs from run to run; leave it out")
    return files, ours, theirs, variants


def make_contenders(files, variants, folder):
    """Copies code to folder/0, folder/1, ... -> [{name, flags, code, script, hash}, ...], the baseline first.

    A patch is applied to the baseline's script. Raises UserError.
    """
    first = Path(files[0] if files else "")
    require(first.suffix == ".py", "the script to compare with comes first: compare.py SCRIPT.py ...")
    require(not variants or len(files) == 1, "--vary is for flags of one script; leave out the others")
    sources = [(" ".join(v.split()) or "no flags", first, shlex.split(v)) for v in variants]
    sources = sources or [(Path(f).stem, Path(f), []) for f in files]
    names, contenders = [name for name, _, _ in sources], []
    require(len({*names}) == len(names), f"of {', '.join(names)}, two have the same name; rename one")
    for name, file, flags in sources:
        script, code = first if file.suffix == ".patch" else file, folder / str(len(contenders))
        code.mkdir(parents=True)
        for path, content in common.local_files(script).items():
            (code / path).parent.mkdir(parents=True, exist_ok=True)
            (code / path).write_bytes(content)
        if file.suffix == ".patch":
            text = file.read_text()
            changed = {*re.findall(r"^\+\+\+ b/(\S+)", text, re.M)}
            if changed != {script.name}:
                print0(f"note    left out: {file} changes {', '.join(changed)} and not {script.name}")
                shutil.rmtree(code)
                continue
            command = ["patch", "-p1", "--silent", "--no-backup-if-mismatch"]
            done = subprocess.run(command, cwd=code, input=text, text=True, capture_output=True)
            require(not done.returncode, f"{file} does not apply to {script} ({first_line(done.stdout)})")
        about = {"name": name, "flags": flags, "code": code.name, "script": script.name}
        contenders.append(about | {"hash": code_hash(code)})
    return contenders


def code_hash(code):
    """Of the scripts in a folder."""
    return derive_seed(*(f.read_text() for f in sorted(code.rglob("*.py"))))


class Diverged(Exception):
    """A run, or its samples, are not finite."""


def call(command, what):
    """Runs a command to its end; interrupted, waits until it has saved.

    Raises Diverged, or a UserError that begins with `what`, with the last line of its stderr.
    """
    command = [*map(str, command)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, err = process.communicate()
    except KeyboardInterrupt:
        process.terminate()
        process.communicate()
        raise
    if process.returncode == common.EXIT_PREEMPTED:  # Ctrl-C reaches the command, too
        raise KeyboardInterrupt
    if process.returncode:
        text = (err.strip().splitlines() or ["it says nothing"])[-1].removeprefix("error: ")
        raise Diverged(text) if "not finite" in text else UserError(f"{what}: {text}")


def trial(folder, contender, theirs, sample):
    """Trains for two steps, not compiled, and samples -> the run's Config and dataset as dicts. Raises
    UserError."""
    home, script = folder / "trial", folder / "code" / contender["code"] / contender["script"]
    shutil.rmtree(home, ignore_errors=True)
    flags = [*TRAIN, *theirs, *contender["flags"], "--steps=2", "--minutes=0", "--compile=off"]
    call([sys.executable, script, *flags, f"--out={home}"], f"{contender['name']} does not train")
    (run,) = (f.parent for f in home.glob("*/*/run.yaml"))
    require((run / "metrics/val.jsonl").exists(), "the held-out loss is needed; leave out --eval-every 0")
    command = [sys.executable, ROOT / "ddim_sample.py", run, *shlex.split(sample), "--num-samples=2"]
    with contextlib.suppress(Diverged):  # after two steps, that says nothing
        call([*command, "--npz", "--frames=0", "--compile=off"], f"{contender['name']} cannot be sampled")
    facts = yaml.safe_load((run / "run.yaml").read_text())
    return facts["config"], facts["dataset"]


def check_dataset(config, dataset):
    """Raises UserError if samples cannot be judged by what --dataset names."""
    name, (channels, side, _) = config["dataset"], map(int, dataset["shape"].split("x"))
    require(len(dataset["classes"]) > 1, f"{name} has one class, and a classifier needs two; use another")
    held_out = dataset["test"]["images"]
    require(
        held_out >= quality.FEWEST, f"{name} has {held_out} test images, too few to judge by; use another"
    )
    for split in ("train", "test"):
        data = common.load_dataset(name, config["data_root"], split, side, channels)
        text = f"the runs have other images or labels than --dataset {name}, by which samples are judged"
        require(data.fingerprint() == dataset[split]["fingerprint"], f"{text}; name theirs")


class Output(torch.nn.Module):
    """A network that is a function of x alone."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x, *conditions):
        return self.f(x)


def probe(file, config):
    """-> (losses of three given outputs at given x0, t, eps [3, 4], FLOP of a training step per image), each
    None where loss_per_sample() is called in another way than the trainers do."""
    spec = importlib.util.spec_from_file_location(f"contender_{derive_seed(str(file))}", file)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    beside = {Path(f).with_suffix("").parts[0] for f in common.local_files(file)}
    ours = {name: sys.modules.pop(name) for name in beside & {*sys.modules}}  # it imports its own
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(script)
    finally:
        sys.path.pop(0)
        for name in [n for n in sys.modules if n.split(".")[0] in beside]:
            del sys.modules[name]
        sys.modules.update(ours)
    cfg = script.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    x0, eps = torch.randn(2, 4, *script.sample_shape(cfg), generator=torch.Generator().manual_seed(0))
    t, losses, flop = torch.tensor([0.1, 0.4, 0.7, 0.9]), None, None

    def loss(f):
        torch.manual_seed(0)  # it may draw
        return script.loss_per_sample(Output(f).eval(), x0, y, t, eps, cfg)

    with contextlib.suppress(Exception):  # the code is anyone's
        y = script.conditions([], cfg)[:1].repeat_interleave(4, 0)
        losses = torch.stack([loss(f) for f in (torch.zeros_like, torch.clone, torch.square)])
    # Only of attention in PyTorch's own operations, the counter knows the products on a CPU.
    by_hand = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with contextlib.suppress(Exception), by_hand, FlopCounterMode(display=False) as counter:
        script.loss_per_sample(script.build_model(cfg), x0, y, t, eps, cfg).mean().backward()
        flop = counter.get_total_flops() / 4
    return losses, flop


def try_all(folder, contenders, theirs, sample):
    """Tries each for two steps -> ([those that train], Config of the baseline, dataset). Raises UserError."""
    kept, reference, config, dataset = [], None, None, None
    for c in contenders:
        try:
            cfg, data = trial(folder, c, theirs, sample)
            dataset = data if dataset is None else dataset
            require(data == dataset, f"{c['name']} trains on other images or classes")
        except (UserError, Diverged) as e:
            if not kept or len(contenders) == 2:
                raise UserError(str(e)) from None
            print0(f"note    left out: {e}")
            continue
        losses, flop = probe(folder / "code" / c["code"] / c["script"], cfg)
        reference, config = (reference, config) if kept else (losses, cfg | {"out": ""})  # a trial's
        known = losses is not None and reference is not None and losses.shape == reference.shape
        known = known and cfg.get("vae_hash") == config.get("vae_hash")  # losses on the same latents
        same = not kept or bool(known and torch.allclose(losses, reference))
        kept.append(c | {"same loss": same, "flop": flop, "bs": cfg["bs"]})
    require(len(kept) > 1 or len(contenders) == 1, "only the baseline trains; see the notes")
    check_dataset(config, dataset)
    return kept, config, dataset


# ------------------------------------------------------------------------------------------------
# Runs


def train(folder, contender, seed, theirs):
    """Trains, or continues -> the run's folder."""
    home = folder / "runs" / contender["code"] / f"seed_{seed}"
    if not [*home.glob("*/*/checkpoints/step_*.pt")]:  # killed before it could save
        shutil.rmtree(home, ignore_errors=True)
    runs = [f.parent for f in home.glob("*/*/run.yaml")]
    flags = [*TRAIN, *theirs, *contender["flags"], f"--seed={seed}", f"--out={home}"]
    if not runs or not re.search("^done ", (runs[0] / "run.out").read_text(), re.M):
        script = folder / "code" / contender["code"] / contender["script"]
        flags = [f"--resume={runs[0]}"] if runs else flags
        call([sys.executable, script, *flags], f"{contender['name']}, seed {seed}")
    (run,) = (f.parent for f in home.glob("*/*/run.yaml"))
    return run


def read_run(run, dataset):
    """A finished run of this dataset -> {steps, images/s, seconds, startup, held-out loss, curve, ...}."""
    facts, out = yaml.safe_load((run / "run.yaml").read_text()), (run / "run.out").read_text()
    lines, val = (
        [json.loads(x) for x in (run / "metrics" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("loss", "val")
    )
    at, last = {x["step"]: x["seconds"] for x in lines}, lines[-1]
    require(
        facts["dataset"] == dataset, f"{run} was trained on other images than the first; set another --out"
    )
    if val[-1]["loss"] is None:
        raise Diverged("the held-out loss is not finite")
    startup = re.findall(r"startup ([\d.]+) s", out)[-1]
    cell = {"steps": last["step"], "seconds": last["seconds"], "startup": float(startup)}
    cell |= {"images/s": last["step"] * facts["config"]["bs"] / last["seconds"]}
    cell |= {"held-out loss": val[-1]["loss"], "curve": [(at[x["step"]], x["loss"]) for x in val]}
    return cell | {k: facts[k] for k in ("commit", "device", "versions")}


class Evaluator:
    """evaluate(.npz) -> {metric: value}, as tests/quality.py does; reads dataset and classifier once."""

    def __init__(self, config, dataset, cache):
        self.config, self.dataset, self.cache, self.model = config, dataset, cache, None

    def load(self, images):
        """Classifier, features of the test images, and FD of real images, in place of these samples."""
        name, root, (n, channels, side, _) = *(self.config[k] for k in ("dataset", "data_root")), images.shape
        train_set, test_set = (
            common.load_dataset(name, root, split, side, channels, max_bytes=math.inf)
            for split in ("train", "test")
        )
        test_set = common.evaluation_set(test_set, len(test_set.labels))  # a folder's are sorted by class
        self.device, g = common.get_device("auto"), torch.Generator().manual_seed(0)
        self.model, self.name = quality.classifier(train_set, self.cache, self.device)
        z = quality.read(self.model, test_set.images, self.device)[1].double()
        self.unit, self.truth = z.square().mean().sqrt(), test_set.labels  # features have no scale
        self.z = z / self.unit
        labels = torch.arange(n) % len(train_set.classes)  # the same for samples without labels
        real = [quality.real_images(train_set, n, labels, g) for _ in range(quality.BASELINES)]
        self.fd = [quality.frechet_distance(self.features(x)[1], self.z) for x in real]

    def features(self, images):
        seen, z = quality.read(self.model, images, self.device)
        return seen, z.double() / self.unit

    def evaluate(self, file):
        images, labels, _ = quality.load_samples(file)
        if self.model is None:
            self.load(images)
        seen, z = self.features(images)
        precision, recall = quality.precision_recall(z, self.z)
        fd, apart = (
            quality.frechet_distance(z, self.z),
            quality.variation(seen, self.truth, self.model.sizes[0]),
        )
        cell = {"FD ratio": fd / float(np.mean(self.fd)), "FD": fd, "KID": quality.kernel_distance(z, self.z)}
        cell |= {"precision": precision, "recall": recall, "class histogram": apart, "classifier": self.name}
        if labels is not None:
            cell["label accuracy"] = (seen == labels).float().mean().item()
        return cell


def make_cell(folder, contender, seed, flags, theirs, evaluator):
    """Trains, samples and evaluates a contender with a seed, or reads what is there -> {metric: value}."""
    file = folder / "cells" / contender["code"] / f"seed_{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    samples = file.with_suffix("")
    samples.mkdir(parents=True, exist_ok=True)
    try:
        run = train(folder, contender, seed, theirs)
        command = [sys.executable, ROOT / "ddim_sample.py", run, *shlex.split(flags.sample)]
        command += ["--npz", "--frames=0", f"--num-samples={flags.num_samples}", f"--out={samples}"]
        command += [f"--seed={seed}"]
        call(command, f"samples of {contender['name']}, seed {seed}")
        (npz,) = samples.glob("*.npz")
        cell = read_run(run, evaluator.dataset) | evaluator.evaluate(npz)
    except Diverged as e:
        cell = {"failed": str(e)}
    common.write_atomically(file, lambda f: f.write(json.dumps(cell).encode()))
    return cell


# ------------------------------------------------------------------------------------------------
# Statistics


def paired(a, b):
    """Values of two contenders [n] by seed -> (mean of b - a, its 95% interval, p, number above 0)."""
    d = np.subtract(b, a)
    if len(d) < 2 or np.ptp(d) == 0:  # equal differences that are not 0 were rounded: unknown
        width = 0.0 if len(d) > 1 and not d.any() else math.inf
        return d.mean(), (d.mean() - width, d.mean() + width), math.nan, (d > 0).sum()
    test = scipy.stats.ttest_1samp(d, 0)
    return d.mean(), tuple(test.confidence_interval(0.95)), test.pvalue, (d > 0).sum()


def detectable(sd, n, power=0.8):
    """The mean of n differences with this standard deviation that a t-test at 5% finds with this power."""
    limit = scipy.stats.t.ppf(0.975, n - 1)

    def missing(mean):  # in standard deviations; t has a noncentral t-distribution
        return scipy.stats.nct.sf(limit, n - 1, mean * n**0.5) - power

    return sd * scipy.optimize.brentq(missing, 0, 20)


def verdict(mean, low, high, more_is_better):
    if low <= 0 <= high:
        largest = max(abs(low), high)
        return f"no difference larger than {largest:.2g}" if math.isfinite(largest) else "unknown"
    return "better" if (mean > 0) == more_is_better else "worse"


def spread(values, digits):
    """Mean ± standard deviation."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):,.{digits}f}{deviation}"


def power_line(name, values, n):
    """Which difference n seeds can show, from the baseline's values so far."""
    sd = np.std(values, ddof=1)
    text = (
        f"power   {name}: FD ratio {spread(values, 2)} with {len(values)} seeds; {n} seeds show differences"
    )
    return f"{text} above {detectable(2**0.5 * sd, n):.2g} in 8 of 10 cases, if pairs do not vary together"


def report(contenders, cells):
    """{(name, seed): cell} -> lines of Markdown: a table of metrics, and one of differences."""
    done = {c["name"]: [s for (n, s), x in cells.items() if n == c["name"] and "FD" in x] for c in contenders}
    there = [m for m in METRICS if all(m[0] in x for x in cells.values() if "FD" in x)]
    head, *others = contenders
    lines = ["| | " + " | ".join(m for m, _, _ in SPEED + there) + " |"]
    lines += ["|---" * (len(SPEED + there) + 1) + "|"]
    for c in contenders:
        row = [f"`{c['name']}`"]
        for metric, _, digits in SPEED + there:
            known = done[c["name"]] and (metric != "held-out loss" or c["same loss"])
            row += [spread([cells[c["name"], s][metric] for s in done[c["name"]]], digits) if known else ""]
        lines += ["| " + " | ".join(row) + " |"]
    lines += [""] + [f"`{n}`, seed {s}: {x['failed']}" for (n, s), x in cells.items() if "failed" in x]
    lines += [f"| minus `{head['name']}` | metric | mean [95% interval] | p | seeds | verdict |"]
    lines += ["|---|---|---|---|---|---|"]
    for c in others:
        both = sorted({*done[c["name"]]} & {*done[head["name"]]})
        failed = []
        for name in (head["name"], c["name"]):
            lost = ["failed" in x for (n, _), x in cells.items() if n == name]
            failed += [f"{name} failed in {sum(lost)} of {len(lost)} seeds"] * any(lost)
        for metric, more, digits in there if both else []:
            if metric == "held-out loss" and not c["same loss"]:
                continue
            values = ([cells[n, s][metric] for s in both] for n in (head["name"], c["name"]))
            mean, (low, high), p, above = paired(*values)
            numbers = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] | {p:.2g}"
            seeds = f"{above} of {len(both)} higher"
            text = "; ".join(failed) or verdict(mean, low, high, more)
            row = [f"`{c['name']}`", metric, numbers, seeds, text]
            lines += ["| " + " | ".join(row) + " |"]
    count = len(lines) - lines.index("|---|---|---|---|---|---|") - 1
    text = f"Of {count} differences that are none, one in twenty has p < 0.05; for all together,"
    return lines + ["", f"{text} p < {0.05 / max(count, 1):.2g} (Bonferroni)."]


def draw_figure(file, contenders, cells):
    """Held-out loss against seconds of training, a line per seed; and FD ratios, joined by seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    names, seeds = [c["name"] for c in contenders], sorted({s for _, s in cells})
    for i, c in enumerate(contenders):
        curves = [cells[c["name"], s].get("curve", []) for s in seeds]
        for n, curve in enumerate(curves if c["same loss"] else []):
            label = c["name"] if n == 0 else None
            left.plot([s for s, _ in curve], [loss for _, loss in curve], f"C{i}", lw=1, label=label)
    for s in seeds:
        right.plot(names, [cells[n, s].get("FD ratio", math.nan) for n in names], "o-k", lw=0.5, ms=4)
    left.set(xlabel="seconds of training", ylabel="held-out loss", yscale="log")
    left.legend()
    right.set(ylabel="FD ratio, a line per seed")
    right.tick_params("x", rotation=20)
    common.write_atomically(file, lambda f: figure.savefig(f, format="png", dpi=110))
    plt.close(figure)


# ------------------------------------------------------------------------------------------------
# The record: samples as good as TARGET, on average over the seeds, after the shortest training

TARGET = {"num_samples": 1000, "seeds": 5, "FD ratio": 2.0, "label accuracy": 0.99}


def record(folder):
    """Checks a finished comparison from its folder alone and prints rows of the record. Raises UserError."""
    try:
        about = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{folder} has no readable results.json ({first_line(e)}); finish it first") from None
    head, n = about["contenders"][0]["name"], TARGET["seeds"]
    name = about["config"]["dataset"]
    require(name == "mnist", f"the record is MNIST's, and {folder} is of {name}")
    enough = about["seeds"] >= n and about["num_samples"] == TARGET["num_samples"]
    require(enough, f"a record needs --seeds {n} --num-samples {TARGET['num_samples']}; run it again so")
    titles = "training time / first row's|minutes|PFLOP|label accuracy|FD ratio|p|contender|log|date".split(
        "|"
    )
    print0("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for c in about["contenders"]:
        name, code = c["name"], folder / "code" / c["code"]
        require(code_hash(code) == c["hash"], f"{code} is not the code that was compared; restore it")
        mine, first = ([about["cells"][k][str(s)] for s in range(n)] for k in (name, head))
        require(all("FD" in x for x in mine + first), f"of {name} or {head}, a run failed: no record")
        classifiers = {x["classifier"] for x in mine + first}
        require(
            len(classifiers) == 1, f"{folder} was evaluated by several classifiers: {', '.join(classifiers)}"
        )
        fd, accuracy = ([x[k] for x in mine] for k in ("FD ratio", "label accuracy"))
        # p: how often the mean of five seeds would be as low if the expected one were at the target
        p = scipy.stats.ttest_1samp(fd, TARGET["FD ratio"], alternative="less").pvalue
        ratio = [x["seconds"] / y["seconds"] for x, y in zip(mine, first, strict=True)]
        seconds, steps = (np.mean([x[k] for x in mine]) for k in ("seconds", "steps"))
        pflop = f"{steps * c['bs'] * c['flop'] / 1e15:.2f}" if c["flop"] else "?"
        row = [spread(ratio, 2), f"{seconds / 60:.1f}", pflop, f"{np.mean(accuracy):.2%}", spread(fd, 2)]
        row += [f"{p:.2g}", f"`{name}`", f"`{folder}`, {classifiers.pop()}", about["date"]]
        reached = np.mean(fd) <= TARGET["FD ratio"] and np.mean(accuracy) >= TARGET["label accuracy"]
        print0("| " + " | ".join(row) + " |" + " target not reached" * (not reached))


# ------------------------------------------------------------------------------------------------


def compare(files, flags, theirs, variants, new):
    """The whole comparison; `new` is a folder for what is not yet known to work."""
    asked = make_contenders(files, variants, new / "code")
    key = {"asked": asked, "theirs": theirs, "sample": flags.sample, "num_samples": flags.num_samples}
    tools = ("common.py", "ddim_sample.py", "tests/quality.py", "tests/compare.py")
    key["tools"] = derive_seed(*((ROOT / f).read_text() for f in tools))
    name = re.sub(r"\W+", "_", "_".join(c["name"] for c in asked)).strip("_")
    folder = Path(flags.out or f"logs/compare/{name[:60]}_{derive_seed(key) % 16**8:08x}")
    if not (folder / "about.json").exists():
        foreign = [f.name for f in folder.glob("code/*") if not f.name.isdecimal()]
        require(not foreign, f"{folder}/code is not of a comparison ({foreign[:1]}); set another --out")
        contenders, config, dataset = try_all(new, asked, theirs, flags.sample)
        folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        require(common.lock(file), f"{folder} is in use by another process; wait for it, or set --out")
        if not (folder / "about.json").exists():
            shutil.rmtree(folder / "code", ignore_errors=True)  # of a process killed right here
            os.rename(new / "code", folder / "code")
            text = json.dumps(
                key | {"contenders": contenders, "config": config, "dataset": dataset}, indent=1
            )
            common.write_atomically(folder / "about.json", lambda f: f.write(text.encode()))
        about, cells = json.loads((folder / "about.json").read_text()), {}
        same = {k: about[k] for k in key} == key
        require(same, f"{folder} compares other code, flags, samples or metrics; set another --out")
        print0(f"folder  {folder}")
        contenders = about["contenders"]
        evaluator = Evaluator(about["config"], about["dataset"], flags.cache)
        for seed in range(flags.seeds):
            turn = seed % len(contenders)
            for c in contenders[turn:] + contenders[:turn]:
                cell = cells[c["name"], seed] = make_cell(folder, c, seed, flags, theirs, evaluator)
                text = cell.get("failed") or f"FD ratio {cell['FD ratio']:.3f}, {cell['steps']:,} steps"
                print0(f"seed {seed}  {c['name']}: {text}")
            head = contenders[0]["name"]
            values = [cells[head, s]["FD ratio"] for s in range(seed + 1) if "FD" in cells[head, s]]
            if len(values) > 1 and seed in (1, flags.seeds - 1):
                print0(power_line(head, values, flags.seeds))
    judges = {x["classifier"] for x in cells.values() if "classifier" in x}
    text = f"{folder} was judged by {' and '.join(sorted(judges))}, of two caches; delete its cells of one"
    require(len(judges) < 2, text)
    by_name = {c["name"]: {s: cells[c["name"], s] for s in range(flags.seeds)} for c in contenders}
    about |= {"seeds": flags.seeds, "cells": by_name, "report": report(contenders, cells)}
    text = json.dumps(about | {"date": str(date.today())}, indent=1)
    common.write_atomically(folder / "results.json", lambda f: f.write(text.encode()))
    draw_figure(folder / "figure.png", contenders, cells)
    print0("\n" + "\n".join(about["report"]) + f"\n\nwrote {folder}/results.json, figure.png")


def main(argv):
    files, ours, theirs, variants = split_arguments(argv)
    flags = common.parse(Config, __doc__, ours)
    if flags.record:
        return record(Path(flags.record))
    common.require_range(flags, "seeds", 1)
    common.require_range(flags, "num_samples", quality.FEWEST)
    new = Path(flags.out or "logs/compare") / f".new_{os.getpid()}"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        compare(files, flags, theirs, variants, new)
    except KeyboardInterrupt:
        print0("stopped by a signal; the same command continues")
        sys.exit(common.EXIT_PREEMPTED)
    finally:
        shutil.rmtree(new, ignore_errors=True)


if __name__ == "__main__":
    with common.exit_on_user_error():
        main(sys.argv[1:])
