"""The third script: its VAE, caches, text, its method against closed forms, and its runs."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_a_bad_step_changes_nothing
from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from PIL import Image
from test_ddim_sample import main  # noqa: F401

import common
import latent_dit_sdvae as ld
import rf_dit_cifar as rf
from latent_dit_sdvae import Config

NAME, CPU = "latent_dit_sdvae.py", torch.device("cpu")
TINY = "--dim 32 --depth 2 --heads 2 --patch 1 --bs 8 --sampling-steps 4 --num-samples 10".split()
TINY += "--compile off --dtype float32 --lr 2e-3 --dataset digits --image-size 16".split()
SMALL = Config(dim=32, depth=2, heads=2, patch=1, shape=(4, 4, 4))
WORDS = {"text": "on", "words": ("a", "big", "cat", "dog"), "text_shape": (5,), "prompts": ("a cat", "a dog")}


def small_vae(folder, channels=1, seed=0, **more):
    """A random AutoencoderKL that halves twice, in diffusers' format."""
    torch.manual_seed(seed)
    widths = (8, 8, 8)
    down, up = ["DownEncoderBlock2D"] * 3, ["UpDecoderBlock2D"] * 3
    more = {"latent_channels": 4, "norm_num_groups": 4, "mid_block_add_attention": False} | more
    AutoencoderKL(channels, channels, down, up, widths, **more).save_pretrained(folder)
    ld.read_vae.cache_clear()
    return str(folder)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return small_vae(tmp_path_factory.mktemp("vae") / "vae", scaling_factor=0.7, shift_factor=0.2)


def prepared(vae_folder, tmp_path, **more):
    """-> (cfg, data, held_out, vae) as train() has them."""
    more = {"dataset": "digits", "image_size": 16, "patch": 1, "cache": str(tmp_path / "cache")} | more
    return ld.load_data_and_vae(Config(vae=str(vae_folder), **more), CPU, 0, 1)


def few(data, n):
    return replace(data, images=data.images[torch.arange(n)], labels=data.labels[:n])


# ------------------------------------------------------------------------------------------------
# VAE


def test_the_vae_of_stable_diffusion(tmp_path, monkeypatch):
    """Its configuration (CompVis), with random weights: shapes, scale, and never more at once than agreed."""
    down, up, widths = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4, (128, 256, 512, 512)
    vae = AutoencoderKL(3, 3, down, up, widths, 2, latent_channels=4, sample_size=256)
    vae.save_pretrained(tmp_path / "sd")
    cfg, data, _, vae = prepared(tmp_path / "sd", tmp_path, image_size=64)
    assert cfg.shape == (4, 8, 8) and data.images.shape[1:] == (3, 64, 64)
    x = data.images[:2].float() / 127.5 - 1
    z, raw = ld.encode(vae, x), vae.encode(x).latent_dist
    torch.testing.assert_close(z, raw.mean * 0.18215)
    want = vae.decode(raw.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(ld.decode(z, cfg), want, rtol=0, atol=1e-4)
    sizes, original = [], vae.decode
    monkeypatch.setattr(ld, "vae_batch_size", lambda cfg: 2)
    used = ld.load_vae(cfg.vae_path, CPU, cfg.vae_hash)
    monkeypatch.setattr(used, "decode", lambda z: sizes.append(len(z)) or original(z))
    assert ld.decode(torch.randn(3, 4, 8, 8), cfg).shape == (3, 3, 64, 64) and sizes == [2, 1]
    assert cfg.vae_path == str((tmp_path / "sd").resolve())


def test_vae_batch_size_bounds_the_pixels():
    assert ld.vae_batch_size(replace(SMALL, shape=(4, 32, 32))) == 16
    assert ld.vae_batch_size(replace(SMALL, shape=(4, 7, 7))) == 334
    assert ld.vae_batch_size(replace(SMALL, shape=(4, 512, 512))) == 1


def test_scale_and_shift(vae_folder, tmp_path):
    cfg, data, _, vae = prepared(vae_folder, tmp_path)
    assert ld.scaling_factor(vae) == (0.7, 0.2) and cfg.shape == (4, 4, 4)
    x = data.images[:3].float() / 127.5 - 1
    z, raw = ld.encode(vae, x), vae.encode(x).latent_dist
    torch.testing.assert_close(z, (raw.mean - 0.2) * 0.7)
    torch.testing.assert_close(ld.decode(z, cfg), vae.decode(raw.mean).sample.clamp(-1, 1))
    assert not any(p.requires_grad for p in vae.parameters())


def test_a_folder_that_is_called_vae_is_not_a_runs(vae_folder, tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    monkeypatch.setattr(ld, "__file__", str(tmp_path / "latent_dit_sdvae.py"))
    assert ld.load_vae(vae_folder, CPU, "").config.in_channels == 1
    ld.read_vae.cache_clear()
    assert ld.load_vae(vae_folder, CPU, ld.weights_hash(ld.read_vae(vae_folder, CPU))).config.in_channels == 1


def test_the_vae_in_a_runs_code_is_used_if_it_is_the_one(vae_folder, tmp_path, monkeypatch):
    """A new run, started from that code, may have another; and the original may be gone."""
    run = tmp_path / "run"
    own = small_vae(run / "code" / "vae", seed=5)
    (run / "run.yaml").write_text("")
    monkeypatch.setattr(ld, "__file__", str(run / "code" / NAME))
    hashes = [ld.weights_hash(ld.load_vae(path, CPU)) for path in (own, vae_folder)]
    assert hashes[0] != hashes[1]
    for path, expected in (("/gone", hashes[0]), (vae_folder, hashes[0]), (vae_folder, hashes[1])):
        assert ld.weights_hash(ld.load_vae(path, CPU, expected)) == expected
    with pytest.raises(common.UserError, match="VAE .*run/code/vae is not the one .*; restore it"):
        ld.load_vae("/gone", CPU, hashes[1])


def test_a_tiny_autoencoder(tmp_path):
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    cfg, data, _, vae = prepared(tmp_path / "tiny", tmp_path)
    x = data.images[:2].float() / 127.5 - 1
    z = ld.encode(vae, x)
    assert cfg.shape == (4, 4, 4) and z.shape == (2, 4, 4, 4)
    torch.testing.assert_close(z, vae.encode(x).latents)
    assert ld.decode(z, cfg).shape == (2, 3, 16, 16)


def test_a_vae_trained_for_half_a_minute(tmp_path, monkeypatch):
    """It reconstructs, its latents have unit variance, and it is there for ever after."""
    cfg, data, held_out, vae = prepared("train", tmp_path, vae_steps=160, steps=5)
    x = held_out.images[:200].float() / 127.5 - 1
    z, std = ld.encode(vae, x), vae.encode(x).latent_dist.std * ld.scaling_factor(vae)[0]
    assert cfg.shape == (4, 4, 4) and z.shape == (200, 4, 4, 4)
    assert z.std().item() == pytest.approx(1, abs=0.05) and abs(z.mean().item()) < 0.05
    assert 0 < std.mean() < 0.7
    error = (ld.decode(z, cfg) - x).square().mean()
    assert error < 0.1 * x.var(), error  # a constant image has 1
    (made,) = (tmp_path / "cache").glob("vae_*/config.json")
    assert AutoencoderKL.from_pretrained(made.parent, low_cpu_mem_usage=False).config.latent_channels == 4
    with monkeypatch.context() as m:
        m.setattr(common, "Batches", lambda *_, **__: pytest.fail("trained again"))
        assert ld.load_data_and_vae(replace(cfg, vae_path="", vae_hash=""), CPU, 0, 1)[0] == cfg

    monkeypatch.setitem(ld.CODE, "train_vae", "a fork's")
    monkeypatch.setattr(ld, "train_vae", lambda data, folder, *_: shutil.copytree(made.parent, folder))
    assert ld.load_data_and_vae(replace(cfg, vae_path="", vae_hash=""), CPU, 0, 1)[0].vae_path != cfg.vae_path


@pytest.mark.parametrize("side, latent", [(28, 7), (32, 8), (64, 16), (128, 16), (256, 32)])
def test_a_vae_of_its_own_suits_the_size(tmp_path, monkeypatch, side, latent):
    monkeypatch.setattr(ld, "train_vae", lambda data, folder, *_: small_vae(folder))
    dataset = str(folder_of_images(tmp_path, 3))
    assert prepared("train", tmp_path, dataset=dataset, image_size=side)[0].shape == (4, latent, latent)


# ------------------------------------------------------------------------------------------------
# Cache


def cached(monkeypatch, cfg, data, vae, split="train", **more):
    """-> (latents as one array, number of images encoded, folder)."""
    count, original = [], ld.encode
    with monkeypatch.context() as m:
        m.setattr(ld, "encode", lambda vae, x: count.append(len(x)) or original(vae, x))
        chunks = ld.encode_dataset(data, vae, cfg, split, CPU, **more)
    return np.concatenate(chunks), sum(count), Path(chunks[0].filename).parent


def test_cache_is_direct_encoding(vae_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "supports_bf16", lambda d: False)  # in float32
    cfg, data, _, vae = prepared(vae_folder, tmp_path)
    data, cfg = few(data, 600), replace(cfg, flip="on")
    stored, count, _ = cached(monkeypatch, cfg, data, vae)
    x = data.images.float() / 127.5 - 1
    want = torch.stack([ld.encode(vae, v) for v in (x, x.flip(-1))], 1)
    assert stored.shape == (600, 2, 4, 4, 4) and stored.dtype == np.float16 and count == 1200
    torch.testing.assert_close(torch.from_numpy(stored).float(), want, rtol=1e-3, atol=1e-3)
    again, count, _ = cached(monkeypatch, cfg, data, vae)
    assert count == 0 and np.array_equal(again, stored)
    stored, *_ = cached(monkeypatch, cfg, data, vae, "test")  # held-out images are not mirrored
    assert stored.shape == (600, 1, 4, 4, 4)


@pytest.mark.skipif(not common.supports_bf16(CPU), reason="this machine encodes in float32")
def test_bfloat16_is_safe_for_encoding(vae_folder, tmp_path, monkeypatch):
    cfg, data, _, vae = prepared(vae_folder, tmp_path)
    data = few(data, 256)
    fast, *_ = cached(monkeypatch, cfg, data, vae)
    z = ld.encode(vae, data.images.float() / 127.5 - 1)
    error = torch.from_numpy(fast[:, 0]).float() - z
    assert error.std() < 0.02 * z.std()


def test_cache_is_keyed_by_data_size_vae_and_split(vae_folder, tmp_path, monkeypatch):
    cfg, data, held_out, vae = prepared(vae_folder, tmp_path)
    data = few(data, 20)
    folders = [cached(monkeypatch, cfg, data, vae)[2], cached(monkeypatch, cfg, data, vae)[2]]
    assert folders[0] == folders[1]
    changed = replace(data, images=data.images.clone())
    changed.images[3, 0, 5, 5] += 1
    folders += [cached(monkeypatch, cfg, changed, vae)[2], cached(monkeypatch, cfg, data, vae, "test")[2]]
    folders.append(cached(monkeypatch, replace(cfg, flip="on"), data, vae)[2])
    for name, more in (("other", {"seed": 1}), ("scale", {"scaling_factor": 0.5})):
        other, *_, vae2 = prepared(small_vae(tmp_path / name, **more), tmp_path)
        folders.append(cached(monkeypatch, other, data, vae2)[2])
    larger, more, _, vae = prepared(vae_folder, tmp_path, image_size=24)
    folders.append(cached(monkeypatch, larger, few(more, 20), vae)[2])
    bf16 = common.supports_bf16(CPU)
    monkeypatch.setattr(common, "supports_bf16", lambda d: not bf16)
    folders.append(cached(monkeypatch, cfg, data, vae)[2])
    inverted = replace(data, images=255 - data.images, checksums=data.fingerprint().encode())  # by a fork
    folders.append(cached(monkeypatch, cfg, inverted, vae)[2])
    for name in ("encode_dataset", "encode"):
        monkeypatch.setitem(ld.CODE, name, "a fork's")
        folders.append(cached(monkeypatch, cfg, data, vae)[2])
    assert len(set(folders)) == 11


@pytest.mark.parametrize("how", ["truncated", "no header", "empty", "gone"])
def test_a_damaged_chunk_is_encoded_again(vae_folder, tmp_path, monkeypatch, how):
    monkeypatch.setattr(ld, "CHUNK", 100)
    cfg, data, _, vae = prepared(vae_folder, tmp_path)
    data = few(data, 250)
    want, count, folder = cached(monkeypatch, cfg, data, vae)
    files = sorted(folder.iterdir())
    assert count == 250 and [f.name for f in files] == ["00000000.npy", "00000100.npy", "00000200.npy"]
    if how == "gone":
        files[1].unlink()
    else:
        os.truncate(files[1], {"truncated": files[1].stat().st_size - 1, "no header": 20, "empty": 0}[how])
    before = [f.stat().st_mtime_ns for f in files[::2]]
    latents, count, _ = cached(monkeypatch, cfg, data, vae)
    assert np.array_equal(latents, want) and count == 100
    assert [f.stat().st_mtime_ns for f in files[::2]] == before
    assert cached(monkeypatch, cfg, data, vae)[1] == 0


@pytest.mark.parametrize("where", ["encode", "save"])
def test_interrupted_encoding_continues_with_the_missing_chunks(vae_folder, tmp_path, monkeypatch, where):
    """Interrupted in the second chunk: between two batches, or when half of its file is written."""
    monkeypatch.setattr(ld, "CHUNK", 100)
    monkeypatch.setattr(ld, "vae_batch_size", lambda cfg: 50)
    cfg, data, _, vae = prepared(vae_folder, tmp_path)
    data, calls, original = few(data, 250), [], {"encode": ld.encode, "save": np.save}[where]

    def interrupted(*args):
        calls.append(1)
        if len(calls) == {"encode": 4, "save": 2}[where]:
            if where == "save":
                args[0].write(b"half")
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(*{"encode": (ld, "encode"), "save": (np, "save")}[where], interrupted)
        ld.encode_dataset(data, vae, cfg, "train", CPU)
    (folder,) = (tmp_path / "cache").iterdir()
    assert [f.name for f in folder.iterdir()] == ["00000000.npy"]
    (folder / ".00000100.npy.1.tmp").write_bytes(b"half")  # of one that was killed
    latents, count, _ = cached(monkeypatch, cfg, data, vae)
    complete, *_ = cached(monkeypatch, replace(cfg, cache=str(tmp_path / "other")), data, vae)
    assert count == 150 and np.array_equal(latents, complete)


def test_ranks_share_the_chunks(vae_folder, tmp_path, monkeypatch):
    """The two calls of one job, here one after the other (test_two_processes_train_as_one: at once)."""
    monkeypatch.setattr(ld, "CHUNK", 100)
    cfg, data, _, vae = prepared(vae_folder, tmp_path)
    data, encoded = few(data, 450), []

    def arrive(world):
        encoded.append([int(f.stem) for f in sorted((tmp_path / "cache").glob("*/*.npy"))])
        if world == 2 and len(encoded) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ld, "barrier", arrive)
    with pytest.raises(KeyboardInterrupt):
        cached(monkeypatch, cfg, data, vae, rank=0, world=2)
    latents, count, _ = cached(monkeypatch, cfg, data, vae, rank=1, world=2)
    assert encoded == [[0, 200, 400], [0, 100, 200, 300, 400]] and count == 200
    again, count, _ = cached(monkeypatch, cfg, data, vae)  # by another number of processes
    assert count == 0 and np.array_equal(again, latents)


def folder_of_images(home, n=300, size=20, classes="ab"):
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)
    for i, x in enumerate(pixels):
        file = home / "images" / classes[i % len(classes)] / f"{i:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(file)
    return home / "images"


def test_images_that_memory_does_not_hold(tmp_path, monkeypatch):
    """A folder is read when it is encoded, and gives the same; an error names what cannot be read."""
    vae_folder = small_vae(tmp_path / "vae", channels=3)
    folder = str(folder_of_images(tmp_path))
    cfg, data, _, vae = prepared(vae_folder, tmp_path, dataset=folder)
    eager, *_ = cached(monkeypatch, cfg, data, vae)
    monkeypatch.setattr(common, "MAX_BYTES", 0)
    cfg, data, held_out, vae = prepared(vae_folder, tmp_path, dataset=folder)
    assert isinstance(data.images, common.ImageFiles) and isinstance(held_out.images, common.ImageFiles)
    stored, count, _ = cached(monkeypatch, cfg, data, vae)
    assert np.array_equal(stored, eager) and count == len(stored) == 286
    assert cached(monkeypatch, cfg, data, vae)[1] == 0
    (tmp_path / "images" / "a" / "0010.png").write_bytes(b"no image")
    cfg, data, _, vae = prepared(vae_folder, tmp_path, dataset=folder)
    with pytest.raises(common.UserError, match="1 of 286 images cannot be read: .*0010.png .not an image"):
        cached(monkeypatch, cfg, data, vae)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_latents_come_in_the_order_of_the_batches(vae_folder, tmp_path, monkeypatch, on_gpu):
    """What common.Batches would have flipped and encoded, rank by rank, from chunks or from memory."""
    monkeypatch.setattr(common, "supports_bf16", lambda d: False)
    monkeypatch.setattr(ld, "CHUNK", 20)
    cfg, data, _, vae = prepared(vae_folder, tmp_path, bs=10, flip="on")
    data = few(data, 64)
    chunks = ld.encode_dataset(data, vae, cfg, "train", CPU)
    assert [len(c) for c in chunks] == [20, 20, 20, 4]
    batches = common.Batches(data, 10, cfg.seed, CPU, flip=True)
    parts = [ld.Latents(chunks, data, cfg, CPU, rank, 2) for rank in (0, 1)]
    for p in parts:
        p.on_gpu = torch.from_numpy(np.concatenate(chunks)) if on_gpu else None
    for step in (0, 5, 6, 7):
        x, y = batches(step)
        latents, labels = (torch.cat(v) for v in zip(*(p(step) for p in parts), strict=True))
        torch.testing.assert_close(latents, ld.encode(vae, x), rtol=2e-3, atol=2e-3)
        assert torch.equal(labels, y)
        assert all(step + 1 in p.queue for p in parts)  # is read while this step trains


def test_chunks_give_the_batches_of_one_chunk(vae_folder, tmp_path, monkeypatch):
    cfg, data, _, vae = prepared(vae_folder, tmp_path, bs=10)
    data, batches = few(data, 64), []
    monkeypatch.setattr(ld, "vae_batch_size", lambda cfg: 4)
    for chunk in (4096, 20):
        monkeypatch.setattr(ld, "CHUNK", chunk)
        latents = ld.encode_dataset(data, vae, replace(cfg, cache=str(tmp_path / str(chunk))), "train", CPU)
        batches.append([ld.Latents(latents, data, cfg, CPU)(step) for step in range(8)])
    same(*batches)


# ------------------------------------------------------------------------------------------------
# Model, method, sampler


def random_model(cfg, seed=0):
    torch.manual_seed(seed)
    model = ld.build_model(cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    "more", [{}, {"shape": (4, 7, 7)}, {"shape": (16, 8, 8), "patch": 2, "classes": tuple("abc")}]
)
def test_shapes_start_and_gradients(more):
    cfg = replace(SMALL, **more)
    ld.check(cfg)
    model = ld.build_model(cfg)
    x, t, y = torch.randn(3, *cfg.shape), torch.rand(3), torch.tensor([0, 1, len(cfg.classes)])
    assert torch.equal(model(x, t, y), torch.zeros_like(x))
    model = random_model(cfg)
    out = model(x, t, y)
    for other in (model(x, 1 - t, y), model(x, t, y.flip(0)), model(x.flip(-1), t, y)):
        assert not torch.allclose(out, other)
    torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2]), out[1:2])  # samples do not see each other
    grads = []
    for model.grad_checkpoint in (False, True):
        model.train().zero_grad()
        model(x, t, y).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)
    assert all(g.abs().sum() > 0 for g in grads[0])


def test_what_the_network_predicts():
    cfg = Config(guidance=1.0)
    x0, eps, t = torch.randn(2, 5, 4, 4, 4).unbind(0) + (torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0]),)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in ld.path(t, cfg))
    assert alpha[0] == 1 and sigma[0] == 0 and alpha[-1] == 0 and sigma[-1] == 1
    x, y = alpha * x0 + sigma * eps, torch.zeros(5, dtype=torch.long)
    v = eps - x0
    torch.testing.assert_close(ld.predict(lambda *_: v, x, t, y, cfg), (x0, eps), rtol=1e-4, atol=1e-5)
    loss = ld.loss_per_sample(lambda *_: v + 2, x0, y, t, eps, cfg)
    torch.testing.assert_close(loss, torch.full((5,), 4.0))
    seen = []
    ld.loss_per_sample(lambda *a: seen.append(a) or a[0], x0, y, t, eps, cfg)
    torch.testing.assert_close(seen[0][0], x)


def test_guidance():
    calls = []

    def model(x, t, y):
        calls.append(len(x))
        return x * 0 + y.view(-1, 1, 1, 1).float()

    cfg = Config()
    x, t, y = torch.randn(4, 1, 2, 2), torch.full((4,), 0.5), torch.full((4,), 3)
    for w, want in ((1.0, 3.0), (0.0, 10.0), (2.0, -4.0)):
        x0, eps = ld.predict(model, x, t, y, cfg, w)
        torch.testing.assert_close(eps - x0, torch.full_like(x, want))
    assert calls == [4, 8, 8]  # w = 1 is the conditional model; else one call for both
    x0, eps = ld.predict(model, x, t, y, replace(cfg, class_dropout=1.0), 2.0)
    torch.testing.assert_close(eps - x0, torch.full_like(x, 10.0))
    calls.clear()
    ld.sample(model, x, y, replace(cfg, guidance=2.0, guidance_interval=(0.2, 0.6), sampling_steps=10))
    assert calls == [4] * 4 + [8] * 5 + [4]


M, S = torch.tensor([0.4, -0.2]).double(), torch.tensor([[0.9, 0.4], [0.4, 0.5]]).double()


def test_sampling_follows_the_flow_of_a_gaussian():
    """For data N(M, S) x_t is N(alpha M, C), C = alpha^2 S + sigma^2 I, and x_0 = M + S^(1/2) x_1."""
    cfg = Config(guidance=1.0)

    def exact(x, t, y):
        (alpha, sigma), one = (c[0].double() for c in ld.path(t, cfg)), torch.eye(2).double()
        whitened = (x.flatten(1) - alpha * M) @ torch.linalg.inv(alpha**2 * S + sigma**2 * one)
        return (sigma * whitened - (M + alpha * whitened @ S)).view_as(x)

    x = torch.randn(200, 1, 1, 2, generator=torch.Generator().manual_seed(1)).double()
    values, vectors = torch.linalg.eigh(S)
    want = M + x.flatten(1) @ (vectors * values.sqrt() @ vectors.T)
    steps, errors = np.array([20, 40, 80, 160]), []
    for n in steps.tolist():
        y = torch.zeros(len(x), dtype=torch.long)
        got, history = ld.sample(exact, x, y, replace(cfg, sampling_steps=n))
        errors.append((got.flatten(1) - want).square().mean().sqrt().item())
    torch.testing.assert_close(history[-1], got)
    assert 11 <= len(history) <= 13 and errors[-1] < 0.02
    assert 0.8 < -np.polyfit(np.log(steps), np.log(errors), 1)[0] < 1.4, errors


def test_on_the_straight_path_it_is_euler_of_diffusers():
    model, cfg = random_model(SMALL), replace(SMALL, guidance=1.0, sampling_steps=10)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    x, y = torch.randn(3, 4, 4, 4), torch.arange(3)
    want = x
    with torch.no_grad():
        for k in scheduler.timesteps:
            v = model(want, torch.full((3,), k.item() / 1000), y)
            want = scheduler.step(v, k, want, return_dict=False)[0]
    torch.testing.assert_close(ld.sample(model, x, y, cfg)[0], want, rtol=1e-4, atol=1e-4)


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
        for p in block.qkv.parameters():
            p[: 2 * 32] *= 10
    torch.testing.assert_close(block(x, c, model.cos, model.sin), before, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------
# Text


def captioned(kind):
    """-> (cfg, model, y of two captions: five words, and two words with padding)."""
    cfg = replace(SMALL, **WORDS)
    if kind == "hidden states":
        cfg = replace(cfg, words=(), text_shape=(5, 12))
        y = torch.randn(2, 5, 12) * torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])[..., None]
    else:
        y = ld.encode_text(["a big dog, a CAT", "big cat"], cfg)
        assert y.tolist() == [[1, 2, 4, 1, 3], [2, 3, 0, 0, 0]]
    return cfg, random_model(cfg), y


@pytest.mark.parametrize("kind", ["words", "hidden states"])
def test_a_caption_reaches_every_block_and_padding_none(kind):
    cfg, model, y = captioned(kind)
    x, t, seen, embed_text, changed = (
        torch.randn(2, *cfg.shape),
        torch.rand(2),
        [],
        model.embed_text,
        y.clone(),
    )
    changed[:, 1] = y[:, 0]  # one word
    for block in model.blocks:
        block.register_forward_hook(lambda *a: seen.append(a[-1][:, 5:]))
    for way in ((1, 0), (0, 1), (1, 1)):  # by the tokens, by their mean, by both
        model.embed_text = lambda y, way=way: [v * k for v, k in zip(embed_text(y), (*way, 1), strict=True)]
        seen.clear()
        out, other, depth = model(x, t, y), model(x, t, changed), cfg.depth
        assert len(seen) == 2 * depth and out.shape == x.shape
        for before, after in zip([*seen[:depth], out], [*seen[depth:], other], strict=True):
            assert ((before - after).flatten(1).abs().max(1).values > 1e-4).all(), way
        assert not torch.allclose(model(x, t, y.flip(1))[0], out[0], atol=1e-4), way  # their order matters
    # more padding, another vector for it, other positions there: all the same
    longer = ld.build_model(replace(cfg, text_shape=(9, *cfg.text_shape[1:])))
    state = model.state_dict() | {"text_pos": torch.cat([model.text_pos.data, torch.randn(4, cfg.dim)])}
    longer.load_state_dict(state)
    if kind == "words":
        longer.y_embed.weight.data[0] += 1
    more = torch.cat([y, torch.zeros(2, 4, *y.shape[2:], dtype=y.dtype)], 1)
    torch.testing.assert_close(longer.eval()(x, t, more), out)
    torch.testing.assert_close(model(x[1:], t[1:], y[1:]), out[1:])  # captions do not see each other


@pytest.mark.parametrize("kind", ["words", "hidden states"])
def test_the_null_caption_is_the_empty_one_and_captions_are_of_their_row(kind):
    cfg, model, y = captioned(kind)
    x, t, empty = torch.randn(2, *cfg.shape), torch.rand(2), torch.zeros_like(y)
    assert torch.equal(ld.null(y, cfg), empty) and torch.isfinite(model(x, t, empty)).all()
    if kind == "words":
        assert torch.equal(ld.encode_text(["", "unknown"], cfg), empty)
    x0, eps = ld.predict(model, x, t, y, cfg, guidance=0.0)
    torch.testing.assert_close(eps - x0, model(x, t, empty))
    cfg = replace(cfg, sampling_steps=4, guidance=3.0)
    noise = torch.randn(1, *cfg.shape).expand(2, -1, -1, -1)
    samples, swapped = (ld.sample(model, noise, c, cfg)[0] for c in (y, y.flip(0)))
    torch.testing.assert_close(swapped, samples.flip(0))
    assert not torch.allclose(samples[0], samples[1], atol=1e-3)


def test_every_caption_of_an_image_is_drawn():
    cfg = replace(SMALL, **WORDS)
    captions = [["a cat", "a dog", "big cat"], [], ["a dog"]]
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    data = common.Dataset("x", images, torch.zeros(3).long(), ["x"], captions=captions)
    y = ld.Captions(data, cfg, CPU)
    drawn = y(torch.zeros(9).long(), torch.arange(9) / 9)
    assert torch.equal(drawn, ld.encode_text(captions[0], cfg).repeat_interleave(3, 0))
    assert torch.equal(
        y(torch.tensor([1, 2]), torch.tensor([0.99, 0.99])), ld.encode_text(["", "a dog"], cfg)
    )
    latents, cfg = [np.zeros((3, 1, 4, 4, 4), np.float16)], replace(cfg, bs=6)
    steps = [ld.Latents(latents, data, cfg, CPU, captions=y)(i)[1] for i in range(9)]
    drawn = torch.cat(steps)
    assert all((drawn == c).all(1).any() for c in ld.encode_text(["a cat", "big cat", ""], cfg))
    assert len({v.numpy().tobytes() for v in steps}) > 4  # other captions in other steps
    halves = [ld.Latents(latents, data, cfg, CPU, r, 2, y)(4)[1] for r in (0, 1)]
    assert torch.equal(torch.cat(halves), steps[4])


@pytest.mark.parametrize(
    "prompts, match",
    [
        (["a cat", "a CaT!"], None),
        (["a purple cat"], "the training captions have no purple; describe an image, as in 'a cat'"),
        (["一只猫"], "have no 一, 只, 猫; describe"),
        ([""], "the prompt '' has no words"),
        (["a cat", " .. "], "has no words"),
        (["a cat a cat a cat"], r"prompt 'a cat a cat a cat' has 6 tokens; this run takes at most 5"),
    ],
)
def test_prompts(prompts, match):
    cfg = replace(SMALL, **WORDS)
    if match:
        with pytest.raises(common.UserError, match=match):
            ld.conditions(prompts, cfg)
    else:
        assert ld.conditions(prompts, cfg).tolist() == [[1, 3, 0, 0, 0]] * 2
        assert torch.equal(ld.conditions([], cfg), ld.encode_text(WORDS["prompts"], cfg))


def test_words_of_any_language():
    assert ld.split_words("Ein GROSSES Café, 3-mal: l'été") == [
        "ein",
        "grosses",
        "café",
        "3",
        "mal",
        "l",
        "été",
    ]
    assert ld.split_words("一只red猫、в_лесу") == ["一", "只", "red", "猫", "в", "лесу"]
    assert ld.split_words("cafe\u0301") == ["café"] and ld.split_words("ねこ") == ["ね", "こ"]


def test_words_are_numbered_the_same_in_every_process_and_rare_ones_go(vae_folder, tmp_path):
    cfg, data, *_ = prepared(vae_folder, tmp_path, text="on")
    assert cfg.words == tuple(sorted(cfg.words)) and {"seven", "7", "leaning"} <= {*cfg.words}
    assert cfg.text_shape == (5,) and len({*cfg.prompts}) == 10
    data.captions = [[f"common word{i}"] for i in range(20_000)]
    cfg = ld.prepare_text(cfg, data)
    assert len(cfg.words) == 8192 and "common" in cfg.words
    assert len(ld.prepare_text(replace(cfg, text="off"), data).words) == 0


def test_long_captions_are_cut(vae_folder, tmp_path, capsys):
    cfg, *_ = prepared(vae_folder, tmp_path, text="on", text_tokens=3)
    assert cfg.text_shape == (3,) and ld.encode_text(["bold seven leaning left"], cfg).shape == (1, 3)
    assert re.search(r"captions of at most 5 tokens, \d+ cut to 3\n", capsys.readouterr().out)


def small_clip(folder, seed=0):
    """A random CLIP text model with a tokenizer of letters, in transformers' format."""
    transformers = pytest.importorskip("transformers")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokens), "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    config = transformers.CLIPTextConfig(**sizes, **ids, max_position_embeddings=24)
    transformers.CLIPTextModel(config).save_pretrained(folder)
    ld.read_text_encoder.cache_clear()
    return folder


def test_a_frozen_text_encoder(tmp_path, monkeypatch, shared, main, capsys):  # noqa: F811
    """Its hidden states are encoded once, cached as latents are, and belong to the run."""
    clip, cache = small_clip(tmp_path / "clip"), tmp_path / "cache"
    flags = ["--vae", shared[1], "--cache", cache, "--text", "on", "--text-encoder", clip, "--eval-every", 0]
    run = train(tmp_path, monkeypatch, *flags, "--steps", 3)
    printed = capsys.readouterr().out
    count = int(re.search(r"text    ([\d,]+) different captions of at most", printed)[1].replace(",", ""))
    assert 0 < count < ld.CHUNK and printed.count("encoding 1 of 1 chunks of captions") == 2
    cfg = ld.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config(run).items()})
    data = common.load_dataset("digits", image_size=16)
    captions, rows = ld.Captions(data, cfg, CPU), torch.arange(50)
    y, texts = captions(rows, torch.zeros(50)), [data.captions[i][0] for i in range(50)]
    torch.testing.assert_close(y, ld.encode_text(texts, cfg).half(), rtol=1e-2, atol=1e-2)
    assert cfg.text_shape == y.shape[1:] == (24, 16) and cfg.words == ()
    letters = torch.tensor([len(t.replace(" ", "")) for t in texts])
    lengths = (letters + 2).clamp(max=24)  # with start and end
    assert torch.equal((y != 0).any(-1).sum(1), lengths)
    assert not ld.encode_text([""], cfg).any()  # not even start and end
    files = sorted(cache.glob("digits_captions_*/*.npy"))
    os.truncate(files[0], 1000)
    before = [f.stat().st_mtime_ns for f in files[1:]]
    assert len(files) == 2  # of the training and the held-out split
    train(tmp_path, monkeypatch, "--resume", run, "--steps", 5)
    assert len(lines(run)) == 5 and [f.stat().st_mtime_ns for f in files[1:]] == before
    assert "encoding 1 of" in capsys.readouterr().out
    prompts = ["--num-samples", 4, "--steps", 2, "--prompt"]
    main(run, *prompts, "a thin 3")
    shutil.copytree(clip, tmp_path / "kept")
    shutil.rmtree(clip)
    for command, match in [
        (lambda: main(run, *prompts, "a thin 3"), "cannot load text encoder"),
        (lambda: small_clip(clip, seed=1) and main(run, *prompts, "a thin 3"), f"text encoder {clip} is not"),
        (lambda: train(tmp_path, monkeypatch, "--resume", run), f"text encoder {clip} is not the one"),
        (lambda: main(run, *prompts, "x" * 30), f"text encoder {clip} is not the one"),
        (lambda: train(tmp_path, monkeypatch, "--resume", run, "--text-encoder="), "--text-encoder is ''"),
    ]:
        ld.read_text_encoder.cache_clear()
        with pytest.raises(SystemExit) as e:
            command()
        error = capsys.readouterr().err.splitlines()[-1]
        assert e.value.code == 2 and error.startswith(f"error: {match}"), error
    train(tmp_path, monkeypatch, "--resume", run, "--steps", 6, "--text-encoder", tmp_path / "kept")
    with pytest.raises(SystemExit):
        main(run, *prompts, "x" * 30)
    assert "has 32 tokens; this run takes at most 24" in capsys.readouterr().err and len(lines(run)) == 6


def test_transformers_is_asked_for_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    ld.read_text_encoder.cache_clear()
    with pytest.raises(common.UserError, match="needs transformers; install it: pip install transformers"):
        ld.read_text_encoder("openai/clip-vit-large-patch14")


def test_captions_without_a_word_are_one_line(vae_folder, tmp_path):
    cfg, data, *_ = prepared(vae_folder, tmp_path)
    for captions in ([[]] * 3, [["!!"], ["..."]]):
        data.captions = captions
        with pytest.raises(common.UserError, match="no caption of digits has a word; write some, or use"):
            ld.prepare_text(replace(cfg, text="on"), data)


def test_names_of_classes_are_captions_where_there_are_none(tmp_path, monkeypatch, capsys):
    vae = small_vae(tmp_path / "vae", channels=3)
    flags = ["--dataset", folder_of_images(tmp_path), "--vae", vae, "--text", "on", "--steps", 2]
    run = train(tmp_path, monkeypatch, *flags)
    assert "note    no captions: the names of classes are the captions" in capsys.readouterr().out
    assert config(run)["words"] == ["a", "b"] and sorted(config(run)["prompts"]) == ["a", "b"]


def config(run):
    return common.yaml.safe_load((run / "run.yaml").read_text())["config"]


# ------------------------------------------------------------------------------------------------
# Training, in this process


@pytest.fixture(scope="module")
def shared(tmp_path_factory, vae_folder):
    """Flags that let runs share a VAE and a cache."""
    return ["--vae", vae_folder, "--cache", str(tmp_path_factory.mktemp("cache"))]


def train(tmp_path, monkeypatch, *flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_LOGS", str(tmp_path / "logs"))
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with monkeypatch.context() as m:
        m.setattr("sys.stdout", os.sys.stdout)
        m.setattr("sys.stderr", os.sys.stderr)
        try:
            with common.exit_on_user_error():
                start = [] if "--resume" in flags else TINY
                cfg = common.parse(Config, ld.__doc__, [*start, *map(str, flags)])
                ld.train(cfg)
        finally:
            for s, h in handlers.items():
                signal.signal(s, h)
    return newest_run(tmp_path)


def newest_run(tmp_path):
    return max((tmp_path / "logs").glob("*/*"), key=lambda p: p.stat().st_mtime_ns)


def lines(run, name="loss"):
    return [json.loads(x) for x in (run / "metrics" / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "flags",
    [
        "--t-sampling logit-normal --shift 2 --weight-decay 0.1",
        "--text on --grad-accum 2 --grad-checkpoint --dtype bfloat16",
        "--class-dropout 1 --grad-accum 4 --patch 2",
        "--class-dropout 0 --guidance 1 --grad-checkpoint --dtype bfloat16",
    ],
)
def test_flags_train_and_sample(tmp_path, monkeypatch, shared, capsys, flags):
    run = train(tmp_path, monkeypatch, *shared, *flags.split(), "--steps", 4, "--eval-every", 2)
    assert run.parent.name == "rf" and run.name.startswith("rf_latentdit_")
    assert len(lines(run)) == 4 and len(lines(run, "val")) == 2
    assert None not in lines(run, "val")[0]["loss_t"]
    sizes = [Image.open(run / "samples" / f"step_00000004.{x}").size for x in ("png", "gif")]
    assert sizes[0] == sizes[1] and sizes[0][0] == 4 * (10 * (16 + 2) + 2)
    assert sizes[0][1] == 4 * (16 + 4) + ("text" in flags) * (4 * 13 + 2)  # captions of up to four lines
    picture = np.asarray(Image.open(run / "samples" / "reconstruction.png"))
    assert picture.shape[0] == picture.shape[1] and "with a PSNR of" in capsys.readouterr().out


def test_the_loop_reads_the_device_only_to_log(tmp_path, monkeypatch, shared):
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, original=original, name=name):
            reads.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    made = ld.Latents.__init__

    def on_gpu(self, chunks, *args):  # otherwise chunks are read at indices on the CPU
        made(self, chunks, *args)
        self.on_gpu = torch.from_numpy(np.concatenate(chunks))

    monkeypatch.setattr(ld.Latents, "__init__", on_gpu)
    counts = []
    for steps in (20, 20, 40):  # the first fills the cache
        reads.clear()
        train(tmp_path, monkeypatch, *shared, "--steps", steps, "--log-every", 1000, "--eval-every", 0)
        counts.append(len(reads))
    assert counts[1] == counts[2], reads


def test_it_learns(tmp_path, monkeypatch, shared):
    for text in ("off", "on"):
        flags = ["--text", text, *"--bs 32 --steps 150 --eval-every 50".split()]
        run = train(tmp_path, monkeypatch, *shared, *flags)
        losses = [x["loss"] for x in lines(run, "val")]
        assert losses == sorted(losses, reverse=True) and losses[-1] < 0.99 * losses[0], losses


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--vae nobody/nothing", "cannot load VAE nobody/nothing .*; set --vae to a folder .*, or to train"),
        ("--vae {tmp}", "cannot load VAE"),
        ("--vae {tmp}/unet", "UNet2DModel is neither AutoencoderKL nor"),
        ("--vae {tmp}/broken", "cannot load VAE .*broken"),
        ("--image-size 18", r"side \(18\) must be divisible by 4 for this VAE; use --image-size 16 or 20"),
        ("--channels 3", "--channels is 3, but the VAE takes 1"),
        ("--patch 3", r"--patch \(3\) must divide the side of the latents \(4\); possible are \[1, 2, 4\]"),
        ("--vae train --image-size 30", r"side \(30\) must be divisible by 4"),
        ("--vae train --vae-steps 0", "--vae-steps is 0; it must be at least 1"),
        ("--dim 36", r"--dim \(36\) must be divisible by 4 x --heads \(8\)"),
        ("--bs 8 --grad-accum 3", r"--bs \(8\) must be divisible by"),
        ("--muon-lr nan", "--muon-lr is nan"),
        ("--class-dropout 0", "--guidance needs"),
        ("--guidance-interval 0.8 0.2", "--guidance-interval must be two times"),
        ("--text-encoder nowhere/nothing", "--text-encoder needs --text on"),
        (
            "--text on --text-encoder nobody/nothing",
            "cannot load text encoder nobody/nothing .*transformers' format|needs transformers",
        ),
        ("--text on --text-encoder {tmp}/unet", "cannot load text encoder .*/unet|needs transformers"),
        ("--text on --text-tokens 0", "--text-tokens is 0"),
        (
            "--text on --dataset {tmp}/bare",
            "/bare has neither captions nor classes; write 1.txt beside 1.jpg, or",
        ),
        ("--flip maybe", "invalid choice"),
        ("--dataset nowhere", "there is no dataset nowhere"),
        ("--t-smapling uniform", "did you mean --t-sampling"),
        ("--resume nowhere", "nowhere is not a run"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, shared, capsys, flags, match):
    shutil.copytree(shared[1], tmp_path / "broken")
    (weights,) = (tmp_path / "broken").glob("*.safetensors")
    os.truncate(weights, 1000)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    folder_of_images(tmp_path, 3, classes=".").rename(tmp_path / "bare")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it asks for 23 s
    before = sorted(Path(shared[3]).rglob("*"))
    with pytest.raises(SystemExit) as e:
        train(tmp_path, monkeypatch, *shared, "--steps", 2, *flags.format(tmp=tmp_path).split())
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
    assert re.search(match, text) and re.search("; | must ", text), text  # it says what to do
    assert not (tmp_path / "logs").exists() and sorted(Path(shared[3]).rglob("*")) == before


# ------------------------------------------------------------------------------------------------
# Runs as processes


def weights(run):
    state = common.newest_checkpoint(run)
    return [state["step"], *state["model"].values(), *state["ema"].values(), state["optimizer"]["state"]]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    return True


RUN = [*TINY, "--steps", 40, "--save-every", 5, "--eval-every", 20, "--log-every", 3]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shared):
    """An uninterrupted run of the real script."""
    home = tmp_path_factory.mktemp("whole")
    command = [sys.executable, Path(ld.__file__), *map(str, [*RUN, *shared])]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "DIFFUSION_LOGS": str(home / "logs")}
    p = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert p.returncode == 0 and p.stderr == "", p.stderr
    return newest_run(home)


def kill(process, ready):
    while process.poll() is None and not ready():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_kill_9_then_resume_is_bit_exact(whole, shared, script, tmp_path):
    logs = tmp_path / "logs"
    p = script(NAME, *RUN, *shared, "--save-every", 1, wait=False)
    kill(p, lambda: any(f.read_text().count("\n") > 10 for f in logs.glob("*/*/metrics/loss.jsonl")))
    run = newest_run(tmp_path)
    assert len(lines(run)) < 40
    p = script(NAME, "--resume", run)
    assert p.returncode == 0 and same(weights(run), weights(whole)), p.err
    assert [x["loss"] for x in lines(run)] == [x["loss"] for x in lines(whole)]
    assert lines(run, "val") == lines(whole, "val")


def test_two_processes_train_as_one(whole, shared, script, tmp_path):
    prefix = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = [*RUN, "--vae", shared[1], "--cache", tmp_path / "cache", "--num-samples", 11]
    p = script(NAME, *flags, prefix=prefix, env={"OMP_NUM_THREADS": "1"})
    assert p.returncode == 0, p.err
    run = newest_run(tmp_path)
    got, want = ([x["loss"] for x in lines(r)] for r in (run, whole))
    assert got == pytest.approx(want, rel=2e-3) and got[:5] == pytest.approx(want[:5], rel=1e-4)
    assert len(list((tmp_path / "logs/rf").iterdir())) == 1
    assert "encoding 3 of 5 chunks of train" in p.out  # the other process encoded two
    assert len(list((tmp_path / "cache").glob("digits_train*/*.npy"))) == 5


def test_ddim_sample_samples_it(whole, main, capsys):  # noqa: F811
    main(whole, "--solver", "own", "--guidance", 3, "--num-samples", 10)
    assert (whole / "samples" / "step_00000040_own_w3_seed0_numsamples10.gif").exists()
    for flags in (["--npz"], ["--solver", "dpmpp2m"], ["--solver", "heun", "--interpolate", 5]):
        main(whole, "--steps", 4, "--num-samples", 10, *flags)
    (file,) = (whole / "samples").glob("*.npz")
    assert np.load(file)["arr_0"].shape == (10, 16, 16, 1)
    with pytest.raises(SystemExit, match="2"):
        main(whole, "--invert", "--steps", 4)
    assert "this run has latents (4, 4, 4)" in capsys.readouterr().err


def test_killed_before_its_first_step_a_run_with_a_vae_of_its_own_begins_anew(tmp_path, monkeypatch):
    flags = ["--vae", "train", "--vae-steps", 2, "--eval-every", 0, "--cache", tmp_path / "cache"]
    run = train(tmp_path, monkeypatch, *flags, "--steps", 2)
    for file in (*(run / "checkpoints").iterdir(), run / "metrics" / "loss.jsonl"):
        file.unlink()
    train(tmp_path, monkeypatch, "--resume", run)
    assert len(lines(run)) == 2

    def killed(source, folder, **more):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(shutil, "copytree", killed)
        train(tmp_path, monkeypatch, *flags, "--steps", 3)
    run = newest_run(tmp_path)
    train(tmp_path, monkeypatch, "--resume", run)
    assert len(lines(run)) == 3 and (run / "code" / "vae" / "config.json").stat().st_size > 100


def test_its_copies_of_the_dits_optimizer_and_times_are_the_same():
    """And steps that are not finite are not applied."""
    model = ld.build_model(SMALL)
    assert_a_bad_step_changes_nothing(model, ld.make_optimizer(model, SMALL, torch.float32))
    for shape in ((2, 8, 20), (2, 20, 8)):
        x = torch.randn(shape)
        assert torch.equal(ld.newton_schulz(x), rf.newton_schulz(x))
    u = torch.rand(64)
    for kind, shift in (("uniform", 1.0), ("uniform", 3.0), ("logit-normal", 1.0), ("logit-normal", 2.0)):
        more = {"t_sampling": kind, "shift": shift}
        assert torch.equal(ld.sample_t(u, Config(**more)), rf.sample_t(u, rf.Config(**more)))


def test_a_cache_that_cannot_be_written_is_known_before_a_vae_is_trained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(common, "Batches", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(NotADirectoryError):
        prepared("train", tmp_path, cache=str(tmp_path / "file"))


def test_a_folder_that_is_called_train_is_not_a_vae(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ld, "train_vae", lambda data, folder, *_: small_vae(folder))
    assert prepared("train", tmp_path)[0].shape == (4, 4, 4)
    with pytest.raises(common.UserError, match="cannot load VAE /.*/train "):
        prepared("./train", tmp_path)


def test_a_run_with_a_vae_of_its_own_moves(few, script, main, tmp_path, monkeypatch, capsys):  # noqa: F811
    """--vae train: sampled, and even resumed, where the cache and its VAE are gone."""
    flags = "--vae train --vae-steps 3 --steps 4 --eval-every 0 --dataset".split()
    p = script(NAME, *TINY, *flags, few, "--cache", tmp_path / "cache")
    assert p.returncode == 0 and "vae     training one on few" in p.out, p.err
    run = newest_run(tmp_path)
    run = run.rename(run.with_name("moved"))
    shutil.rmtree(tmp_path / "cache")
    for flags in (["--steps", 4], ["--solver", "own", "--guidance", 2]):
        main(run, "--num-samples", 10, *flags)
    train(tmp_path, monkeypatch, "--resume", run, "--steps", 6)
    assert "training one" not in capsys.readouterr().out and len(lines(run)) == 6
    for file in (run / "code" / "vae").glob("*.safetensors"):  # another VAE's weights in its place
        tensors = bytearray(file.read_bytes())
        tensors[-1] ^= 1
        file.write_bytes(tensors)
    ld.read_vae.cache_clear()
    for go_on in (main, functools.partial(train, tmp_path, monkeypatch, "--resume")):
        with pytest.raises(SystemExit, match="2"):
            go_on(run, "--steps", 8)
        error = capsys.readouterr().err
        assert error.startswith("error: VAE ") and error.count("\n") == 1, error
        assert "is not the one that this run was trained with; restore it" in error
