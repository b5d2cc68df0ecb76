"""Compares samples, the .npz of `ddim_sample.py --npz`, with the dataset that the model was trained on.

A small classifier, trained once on the training images and kept in --cache, supplies features; nothing is
downloaded. The dataset is brought to the samples' size and channels, as in training. No number means anything
alone: beside it stand the real-vs-real baseline, its value for as many training images of the same classes
(four draws: mean +- deviation), and that of uniform noise.

    FD                 Frechet distance to the test images (Heusel et al. 2017, arXiv:1706.08500, eq. 6)
    KID                kernel distance to them (Binkowski et al. 2018, arXiv:1801.01401), unbiased: of equal
                       distributions it is 0 in the mean, and often negative. FD and KID have the hash of the
                       classifier's weights in their name: compare only what has the same name.
    precision, recall  shares of samples that look like test images, and of test images that look like samples
                       (Kynkaanniemi et al. 2019, arXiv:1904.06991, k = 3)
    label accuracy     share in which the classifier sees the class asked for; baseline: test images
    class histogram    of what it sees: total variation distance to the test images' labels, from 0 to 1
    distance to train  median RMS distance, of pixels in [0, 1], to the nearest training image; baseline: test
                       images. Guidance lowers it too: typical images have near neighbours.
    nearest training   share whose nearest training image stands out as in only 1% of the test images: by its
    images             distance over the mean to the 50 nearest (Carlini et al. 2023, arXiv:2301.13188, 5.1)

    python tests/quality.py SAMPLES.npz --dataset mnist
    python tests/quality.py SAMPLES.npz --dataset digits --attributes
    python tests/quality.py SAMPLES.npz --dataset cifar10 --inception WEIGHTS.pth

The second instead compares drawn digits with their prompts: shares of samples in which a classifier, trained
on drawn digits and their captions, sees the digit, weight, lean, pen and paper asked for, and all five. They
are given for combinations of digit, pen and paper of the training split, for those held out, and for true
images. tests/prompts.txt has 500 prompts of either kind (ddim_sample.py --prompts FILE --num-samples 1000).

The third adds FID and KID proper, by Inception and, as is the custom, against the training images;
baseline: test images. FID falls as samples get more; papers take 50,000. Beside SAMPLES.npz are written
SAMPLES_quality.json and SAMPLES_neighbours.png: five samples, and the five closest to training images, each
with its nearest training images.
"""

import hashlib
import importlib
import inspect
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
from common import UserError, first_line, print0  # noqa: E402


@dataclass
class Config:
    dataset: str = ""  # mnist, cifar10, digits, or a folder or .zip of images: what the samples imitate
    data_root: str = ""  # where mnist and cifar10 are; default $DIFFUSION_DATA, else data/
    attributes: bool = False  # only compare samples of digits with their prompts
    inception: str = ""  # also FID and KID by the Inception weights in this file, those of torch-fidelity
    cache: str = "data/quality"  # folder of trained classifiers
    out: str = ""  # folder of the picture and the .json; default beside SAMPLES.npz
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = the fastest there is


STEPS, BATCH = 3000, 100  # of the classifier's training: five epochs of MNIST
BASELINES = 4  # sets of real images whose mean is the baseline
FEWEST = 10  # samples; the metrics are defined for less, but mean nothing

# ------------------------------------------------------------------------------------------------
# Samples


def load_samples(path):
    """A .npz -> (images uint8 [N, C, H, W], labels int64 [N] or None if unconditional, protocol, a dict).

    Only arr_0 must be there: other programs' files say nothing of labels and protocol. Raises UserError.
    """
    try:
        with np.load(path, allow_pickle=False) as file:  # pickles run code
            x = file["arr_0"]
            y = file["arr_1"] if "arr_1" in file else np.full(len(x), -1)
            protocol = dict(json.loads(str(file["protocol"]))) if "protocol" in file else {}
    except Exception as e:  # a damaged file raises nearly anything
        raise UserError(
            f"{path} is no .npz of samples ({first_line(e)}); give one of ddim_sample.py --npz"
        ) from None
    unconditional = bool((y == -1).all())
    square = x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] == x.shape[2] >= 8
    for wrong, text in [
        (
            x.dtype != np.uint8 or not square,
            f"arr_0 is {x.dtype} {x.shape}; give uint8 [N, H >= 8, H, 1 or 3]",
        ),
        (
            y.shape != x.shape[:1] or y.dtype.kind not in "iu",
            f"arr_1 is {y.dtype} {y.shape}; give N integers",
        ),
        (len(x) < FEWEST, f"it has {len(x)} samples; give {FEWEST} at least, better 1,000"),
    ]:
        if wrong:
            raise UserError(f"{path}: {text}")
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    return images, None if unconditional else torch.from_numpy(y.astype(np.int64)), protocol


# ------------------------------------------------------------------------------------------------
# Metrics of features [N, D] and [M, D]


def frechet(mean_a, cov_a, mean_b, cov_b):
    """Squared Frechet distance of two Gaussians (Dowson & Landau 1982): means [D], covs [D, D].

    The symmetric A^(1/2) B A^(1/2), in float64, has the eigenvalues of A B; the trace of (A B)^(1/2) is the
    sum of their roots. But for rounding they are real and not negative, whatever the ranks; a general root of
    the matrix A B turns complex, or does not converge, when there are fewer samples than dimensions.
    """
    mean_a, cov_a, mean_b, cov_b = (v.double() for v in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return max(0.0, ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item())


def frechet_distance(a, b):
    """Of the Gaussians with the means and (unbiased) covariances of two sets of features."""
    a, b = a.double(), b.double()
    return frechet(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


def fidelity(module):
    """A module of torch-fidelity; imported where it is used, as that takes seconds. Raises UserError."""
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except ImportError as e:
        text = f"torch-fidelity cannot be imported ({first_line(e)})"
        raise UserError(f"{text}; install it: pip install -r requirements.txt") from None


def kernel_distance(a, b):
    """KID: unbiased squared MMD under the kernel (x.y / D + 1)^3, the mean over random subsets of 1,000."""
    n = min(len(a), len(b), 1000)
    subsets = {"kid_subsets": 20, "kid_subset_size": n, "verbose": False}
    found = fidelity("metric_kid").kid_features_to_metric(a.double(), b.double(), **subsets)
    return found["kernel_inception_distance_mean"]


def precision_recall(a, b):
    """Of samples a against images b: the shares of a in b's manifold, and of b in a's (k = 3 neighbours).

    At most 10,000 of each: the distances between all of them are computed.
    """
    a, b = a[:10_000].double(), b[:10_000].double()
    parts = {"save_cpu_ram": True, "prc_batch_size": 2000, "verbose": False}
    found = fidelity("metric_prc").prc_features_to_metric(a, b, **parts)
    return found["precision"], found["recall"]


def variation(labels, reference, classes):
    """Total variation distance of two sets of labels: the share of images in the wrong class; 0 to 1."""
    p, q = (y.bincount(minlength=classes) / len(y) for y in (labels, reference))
    return (p - q).abs().sum().item() / 2


# ------------------------------------------------------------------------------------------------
# The classifier


class Classifier(nn.Module):
    """forward(x [B, C, H, W] in [-1, 1]) -> (logits [B, sum of sizes], features [B, 64]).

    sizes: the number of classes, or of values of each attribute.
    """

    def __init__(self, channels, sizes):
        super().__init__()
        self.sizes = sizes

        def conv(i, o):
            return nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()

        self.features = nn.Sequential(
            *(*conv(channels, 24), *conv(24, 24), nn.MaxPool2d(2)),
            *(*conv(24, 48), *conv(48, 48), nn.MaxPool2d(2), *conv(48, 96)),
            *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(96, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, sum(sizes))

    def forward(self, x):
        z = self.features(x)
        return self.head(z), z


def train(data, sizes, device):
    """The weights of a Classifier of a common.Dataset; the same at every call, on one machine. Minutes.

    Its labels are [N], or [N, len(sizes)] with -1 for what is unknown.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(data.images.shape[1], sizes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    batches = common.Batches(data, BATCH, seed=0, device=device, flip=data.name == "cifar10")
    for step in tqdm(range(STEPS), unit=" steps", disable=not sys.stderr.isatty()):
        x, y = batches(step)
        shift = np.random.default_rng(step).integers(-2, 3, 2).tolist()  # by at most two pixels
        logits, _ = model(x.roll(shift, (2, 3)))
        parts = zip(logits.split(sizes, 1), y.view(len(y), -1).T, strict=True)
        sum(F.cross_entropy(p, v, ignore_index=-1, label_smoothing=0.05) for p, v in parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.state_dict()


def weights_hash(weights):
    """8 hex digits of a state dict."""
    digest = hashlib.blake2b(digest_size=4)
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def classifier(data, folder, device, sizes=None):
    """-> (Classifier of a dataset, its name), from the cache, or trained and put there. Raises UserError."""
    sizes = sizes or [len(data.classes)]
    digest = hashlib.blake2b(digest_size=8)  # of all that it depends on, this code among it
    for source in (Classifier, train, common.Batches):
        digest.update(inspect.getsource(source).encode())
    digest.update(repr((STEPS, BATCH, data.name, sizes, data.images.shape)).encode())
    digest.update(data.images.numpy().tobytes() + data.labels.numpy().tobytes())
    file = Path(folder) / f"{data.name[:40]}_{digest.hexdigest()}.pt"
    model = Classifier(data.images.shape[1], sizes).to(device).eval().requires_grad_(False)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if weights_hash(state["model"]) != state["hash"]:
            raise ValueError("its hash is wrong")
        model.load_state_dict(state["model"])
        return model, f"{data.name}-{state['hash']}"
    except FileNotFoundError:
        print0(f"training a classifier of {data.name}, once ({STEPS} steps)")
    except Exception as e:  # a damaged file raises nearly anything
        print0(f"warning: {file} is damaged ({first_line(e)}); training its classifier again")
    make_folder(folder, "--cache")  # before the minutes of training, not after
    start = time.perf_counter()
    weights = train(data, sizes, device)
    print0(f"trained in {time.perf_counter() - start:.0f} s")
    state = {"model": weights, "hash": weights_hash(weights)}
    common.write_atomically(file, lambda f: torch.save(state, f))
    model.load_state_dict(weights)
    return model, f"{data.name}-{state['hash']}"


def make_folder(path, flag):
    """Raises UserError where no file could be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"no file can be written in {path}; give another folder with {flag}")


@torch.no_grad()
def read(model, images, device):
    """uint8 [N, C, H, W] -> (the classes that the classifier sees [N] or [N, attributes], features [N, 64]),
    on the CPU."""
    parts = [model(x.to(device).float() / 127.5 - 1) for x in images.split(500)]
    seen = [torch.stack([q.argmax(1) for q in p.split(model.sizes, 1)], 1).squeeze(1) for p, _ in parts]
    return torch.cat(seen).cpu(), torch.cat([z for _, z in parts]).cpu()


# ------------------------------------------------------------------------------------------------
# Inception


def inception(path, device):
    """-> f(images uint8 [N, C, H, W]) -> features [N, 2048], by torch-fidelity. Raises UserError."""
    kind = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run a pickle's code
        model = kind("inception-v3-compat", ["2048"], feature_extractor_weights_path=path).to(device)
    except Exception as e:
        text = f"--inception {path} holds no weights that torch-fidelity can take ({first_line(e)})"
        raise UserError(f"{text}; give its weights-inception-2015-12-05-6726825d.pth") from None

    @torch.no_grad()
    def features(images):
        parts = tqdm(images.split(50), unit=" x 50 images", disable=not sys.stderr.isatty())
        return torch.cat([model(x.expand(-1, 3, -1, -1).to(device))[0].cpu() for x in parts])

    return features


# ------------------------------------------------------------------------------------------------
# Nearest training images. In pixels, as features of one class lie close together whatever the image.


def nearest(images, train, k):
    """Root mean square distances on [0, 1], rising, to the k nearest of train, and which: [N, k], [N, k].

    Images of more than 32 pixels a side are compared at that size.
    """

    def flat(images):
        small = min(32, images.shape[-1])
        return torch.cat([F.adaptive_avg_pool2d(x / 255, small).flatten(1) for x in images.split(1000)])

    b, found = flat(train), []
    for a in flat(images).split(200):
        found.append(torch.cdist(a, b).topk(k, largest=False))
    distances, rows = (torch.cat(v) for v in zip(*found, strict=True))
    return distances / b.shape[1] ** 0.5, rows


def draw_neighbours(path, images, train, ratios, k=9):
    """PATH: the first five samples and the five with the smallest ratios [N], each beside its k nearest."""
    rows = [*range(5), *ratios.argsort()[:5].tolist()]
    _, near = nearest(images[rows], train, k)
    tiles = torch.stack([torch.cat([images[i : i + 1], train[n]]) for i, n in zip(rows, near, strict=True)])
    tiles = F.pad(tiles, (1, 1, 1, 1), value=255).expand(-1, -1, 3, -1, -1)  # [10, 1 + k, 3, H, W]
    gap = torch.full_like(tiles[:, :1, :, :, :8], 255)  # between a sample and the training images
    strips = [torch.cat([tiles[:, :1], gap.expand(-1, 1, -1, -1, -1)], -1), tiles[:, 1:]]
    lines = torch.cat([torch.cat(list(s.unbind(1)), -1) for s in strips], -1)  # [10, 3, H, W of a line]
    sheet = torch.cat(list(lines), 1).permute(1, 2, 0).numpy()
    zoom = max(1, 64 // images.shape[-1])
    picture = Image.fromarray(sheet.repeat(zoom, 0).repeat(zoom, 1))
    common.write_atomically(path, lambda f: picture.save(f, "png"))


# ------------------------------------------------------------------------------------------------
# Attributes of drawn digits


def attributes(captions):
    """[N] captions of digits -> int64 [N, 5], indices of digit, weight, lean, pen and paper; -1: not said."""
    index = [{w: i for i, w in enumerate(names)} for names in common.DIGITS.values()]
    index[0] |= {str(i): i for i in range(10)}
    rows = [
        [next((k[w] for w in re.findall(r"\w+", c.lower()) if w in k), -1) for k in index] for c in captions
    ]
    return torch.tensor(rows)


def is_unseen(y):
    """Attributes [N, 5] -> bool [N]: combinations of digit, pen and paper that training lacks."""
    return (y[:, 0] + y[:, 3] + y[:, 4]) % 5 == 0


def by_attributes(images, protocol, flags, device):
    """Prints the shares of samples with each attribute as in their prompt, and all five -> the report."""
    prompts, (n, channels, side, _) = protocol.get("prompt"), images.shape
    text = "; give samples of a run that was trained on digits with --text on and --channels 3"
    common.require(flags.dataset == "digits" and channels == 3, f"--attributes is for digits in colour{text}")
    common.require(prompts, f"--attributes: the file has no prompts{text}")
    asked = attributes([prompts[i % len(prompts)] for i in range(n)])
    train_set, test_set = (
        common.load_dataset("digits", "", split, side, channels) for split in ("train", "test")
    )
    train_set, test_set = (
        replace(d, labels=attributes([c for (c,) in d.captions])) for d in (train_set, test_set)
    )
    sizes, report = [len(words) for words in common.DIGITS.values()], {}
    model, name = classifier(train_set, flags.cache, device, sizes)
    print0(f"samples     {n:,}, {protocol_line(protocol)}")
    print0(f"classifier  {name}\n\n{'':26}" + "".join(f"{k:>10}" for k in [*common.DIGITS, "all", "n"]))
    for kind, x, y in (("samples", images, asked), ("true images", test_set.images, test_set.labels)):
        right, complete = read(model, x, device)[0] == y, (y >= 0).all(1)
        for of, rows in (("of training", complete & ~is_unseen(y)), ("held out", complete & is_unseen(y))):
            if not rows.any():
                continue  # all prompts are of the other kind
            shares = [*right[rows].float().mean(0).tolist(), right[rows].all(1).float().mean().item()]
            report[f"{kind}, {of}"] = dict(
                zip([*common.DIGITS, "all", "n"], [*shares, int(rows.sum())], strict=True)
            )
            print0(f"{kind + ', ' + of:26}" + "".join(f"{v:10.1%}" for v in shares) + f"{rows.sum():10,}")
    return {"classifier": name, "protocol": protocol, "attributes": report}


# ------------------------------------------------------------------------------------------------
# The report


def distances(name, samples, baselines, noise, reference):
    """Rows of a table (metric, of the samples, [of real images], of noise), of features."""
    sets = [samples, *baselines, noise]
    rows = [(f"FD {name}", *(frechet_distance(x, reference) for x in sets))]
    rows += [(f"KID {name}", *(kernel_distance(x, reference) for x in sets))]
    return [(metric, first, real, last) for metric, first, *real, last in rows]


def by_classifier(model, name, images, labels, baselines, noise, test_set, device):
    """-> (rows as of distances(), [images that the classifier takes for class 0, 1, ...])."""
    sets = [images, *baselines, noise]
    seen, z = zip(*(read(model, x, device) for x in sets), strict=True)
    seen_test, z_test = read(model, test_set.images, device)
    accuracy = (seen_test == test_set.labels).float().mean().item()
    print0(f"classifier  {name}: right on {accuracy:.2%} of {len(z_test):,} test images")
    unit = z_test.double().square().mean().sqrt()  # features have no scale of their own
    z, z_test = [x.double() / unit for x in z], z_test.double() / unit
    rows = distances(name, z[0], z[1:-1], z[-1], z_test)
    precision, recall = zip(*(precision_recall(x, z_test) for x in z), strict=True)
    rows += [("precision", precision[0], precision[1:-1], precision[-1])]
    rows += [("recall", recall[0], recall[1:-1], recall[-1])]
    if labels is not None:
        right = [(x == labels).float().mean().item() for x in (seen[0], seen[-1])]
        rows += [("label accuracy", right[0], [accuracy], right[1])]
    classes = len(test_set.classes)
    apart = [variation(x, test_set.labels, classes) for x in seen]
    rows += [("class histogram", apart[0], apart[1:-1], apart[-1])]
    return rows, seen[0].bincount(minlength=classes).tolist()


def by_pixels(images, train_set, test_set, noise):
    """-> (rows as of distances(), ratios of distances), of at most 1,000 images.

    A ratio is the distance to the nearest training image over the mean to the 50 nearest (Carlini et al.
    2023): in distance alone, plain images, which have many near neighbours, would all stand out.
    """
    sets, k = (images[:1000], test_set.images[:1000], noise[:1000]), min(50, len(train_set.images))
    d = [nearest(x, train_set.images, k)[0] for x in sets]
    median = [x[:, 0].median().item() for x in d]
    ratios = [x[:, 0] / x.mean(1).clamp(min=1e-9) for x in d]
    close = [(x < ratios[1].quantile(0.01)).float().mean().item() for x in ratios]
    rows = [("distance to train", median[0], [median[1]], median[2])]
    return rows + [("nearest training images", close[0], [close[1]], close[2])], ratios[0]


def real_images(data, n, labels, generator):
    """uint8 [N, C, H, W]: random ones of a dataset, without repetition while there are enough.

    Of the samples' classes where labels [n] tell them: classes in turn are more even than a random draw.
    """
    order = torch.randperm(len(data.images), generator=generator)
    if labels is None:
        return data.images[order[:n]]
    rows = torch.empty(n, dtype=torch.long)
    for c in labels.unique():
        mine, wanted = order[data.labels[order] == c], labels == c
        rows[wanted] = mine[torch.arange(wanted.sum()) % len(mine)]
    return data.images[rows]


def print_table(rows):
    """Aligned; "ratio" is that to the baseline, where that is never 0 or below."""
    print0(f"\n{'':26}{'samples':>11}{'baseline':>22}{'ratio':>8}{'noise':>10}")
    for metric, value, real, noise in rows:
        baseline = f"{np.mean(real):.4g}" + (f" +- {np.std(real, ddof=1):.2g}" if len(real) > 1 else "")
        ratio = f"{value / np.mean(real):.2f}" if metric.startswith(("FD", "distance")) and any(real) else ""
        print0(f"{metric:26}{value:11.4g}{baseline:>22}{ratio:>8}{noise:10.4g}")


def protocol_line(p):
    """How the samples were made, as their file tells it."""
    if not p:
        return "unknown, the file does not say how the samples were made"
    told = {k: p.get(k, "?") for k in "nfe solver steps eta guidance weights step run".split()}
    text = "NFE {nfe}, {solver} of {steps} steps, eta {eta}, guidance {guidance}, {weights} weights of step "
    return (text + "{step} of {run}").format(**told) + f", {p.get('rounding', 'unknown rounding')}"


def main(argv):
    path = argv[0] if argv and not argv[0].startswith("-") else ""
    flags = common.parse(Config, __doc__, argv[1:] if path else argv)
    if not path:
        raise UserError("no samples are named; their file comes first: quality.py SAMPLES.npz --dataset D")
    if not flags.dataset:
        raise UserError("--dataset is not given; give what the samples imitate, such as --dataset mnist")
    device, stem = common.get_device(flags.device), Path(flags.out or Path(path).parent) / Path(path).stem
    images, labels, protocol = load_samples(path)
    if flags.out and not stem.name.startswith(run := protocol.get("run", "")):
        stem = stem.with_name(f"{run}_{stem.name}")  # samples in the folders of runs have equal names
    make_folder(stem.parent, "--out")
    n, channels, size = images.shape[:3]
    if flags.attributes:
        results = by_attributes(images, protocol, flags, device)
        common.write_atomically(
            Path(f"{stem}_attributes.json"), lambda f: f.write(json.dumps(results, indent=1).encode())
        )
        return print0(f"\nwrote {stem}_attributes.json")
    train_set, test_set = (
        common.load_dataset(flags.dataset, flags.data_root, split, size, channels, max_bytes=math.inf)
        for split in ("train", "test")
    )
    count, classes = len(test_set.images), len(train_set.classes)
    test_set = common.evaluation_set(test_set, count)  # in random order: a folder's are sorted by class
    if count < FEWEST:
        raise UserError(f"{flags.dataset} has {count} test images; give a dataset of at least {20 * FEWEST}")
    if labels is not None and not 0 <= labels.min() <= labels.max() < classes:
        text = f"{path} has labels {labels.min()} to {labels.max()}, and {flags.dataset} {classes} classes"
        raise UserError(f"{text}; give the dataset that the run was trained on")
    if classes == 1 and not flags.inception:
        text = f"{flags.dataset} has one class, and a classifier needs two"
        raise UserError(f"{text}; give --inception WEIGHTS, or images in a folder for each class")
    extract = inception(flags.inception, device) if flags.inception else None  # errors come before minutes
    fidelity("metric_kid")

    g = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, images.shape, generator=g, dtype=torch.uint8)
    baselines = [real_images(train_set, n, labels, g) for _ in range(BASELINES)]
    print0(f"samples     {n:,} of {channels}x{size}x{size}" + ", without labels" * (labels is None))
    print0(f"protocol    {protocol_line(protocol)}")
    print0(
        f"reference   {count:,} test images of {flags.dataset}; baseline: {len(baselines[0]):,} for training"
    )
    results, rows = {"dataset": flags.dataset, "samples": n, "protocol": protocol}, []
    if classes > 1:
        model, name = classifier(train_set, flags.cache, device)
        rows, seen = by_classifier(model, name, images, labels, baselines, noise, test_set, device)
        results["seen"] = dict(zip(train_set.classes, seen, strict=True))
        print0("sees        " + ", ".join(f"{k} {v}" for k, v in results["seen"].items()))
    more, ratios = by_pixels(images, train_set, test_set, noise)
    rows += more
    if extract:
        sets = extract(images), [extract(test_set.images[:n])], extract(noise), extract(train_set.images)
        rows += distances("Inception", *sets)
    print_table(rows)
    results["metrics"] = {m: dict(samples=v, baseline=list(real), noise=x) for m, v, real, x in rows}
    draw_neighbours(Path(f"{stem}_neighbours.png"), images[:1000], train_set.images, ratios)
    text = json.dumps(results, indent=1).encode()
    common.write_atomically(Path(f"{stem}_quality.json"), lambda file: file.write(text))
    print0(f"\nwrote {stem}_neighbours.png, _quality.json")


if __name__ == "__main__":
    with common.exit_on_user_error():
        main(sys.argv[1:])
