"""Train the spectral tokenizer (paper, section 3.3): images in, out/<data>/tokenizer.pt out.

  python train_tokenizer.py                                     # built-in shapes, a laptop CPU, minutes
  python train_tokenizer.py --data cifar10 --data-dir data      # real images, downloaded when absent
  python train_tokenizer.py --data /my/images --image-size 64   # your own: a folder of classes, or one folder

After the run: recon.png (image, target sub-image, reconstruction at several levels) and log-tokenizer.jsonl.
"""
import argparse
import copy
import ctypes
import hashlib
import http.client
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from spectralar import (UNREADABLE, FailedRun, SpectralTokenizer, TokenizerConfig, UserError, low_pass,
                        read_checkpoint, save_checkpoint, uniforms)

# ------------------------------------------------------------------------------------------------------------------
# presets: all that --data or --preset sets (a folder takes "cifar", so that defaults run on a laptop). Every field is a
# flag of train_tokenizer.py, those of "gpt" of train_gpt.py

PRESETS = {
    "shapes": dict(      # minutes on a laptop CPU
        image_size=32, patch_size=4, num_tokens=16, codebook_size=512, code_dim=16, width=128, depth=4, heads=4,
        power=1.5, flat=False,
        steps=2000, batch_size=16, lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-4, warmup=100, hold=0.0, clip=1.0,
        ema=0.995, eval_every=1000, eval_images=512,
        gpt=dict(width=192, depth=4, heads=6, steps=1500, batch_size=64, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05,
                 warmup=100, hold=0.5, clip=2.0, ema=0.99, label_drop=0.1, code_images=20000, eval_every=500)),
    "cifar": dict(       # an hour or two on a CPU
        image_size=32, patch_size=4, num_tokens=64, codebook_size=1024, code_dim=16, width=192, depth=4, heads=6,
        power=1.5, flat=False,
        steps=5500, batch_size=16, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4, warmup=200, hold=0.0, clip=1.0,
        ema=0.995, eval_every=500, eval_images=512,
        gpt=dict(width=256, depth=6, heads=8, steps=3000, batch_size=64, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05,
                 warmup=200, hold=0.5, clip=2.0, ema=0.995, label_drop=0.1, code_images=None, eval_every=500)),
    "imagenet": dict(    # the paper's size: ViT-B encoder and decoder, d16 generator
        image_size=256, patch_size=16, num_tokens=64, codebook_size=4096, code_dim=16, width=768, depth=12, heads=12,
        power=1.5, flat=False,
        steps=1_000_000, batch_size=256, lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-4, warmup=10_000, hold=0.0,
        clip=1.0, ema=0.999, eval_every=5000, eval_images=512,
        gpt=dict(width=1024, depth=16, heads=16, steps=333_600, batch_size=768, lr=3e-4, betas=(0.9, 0.95),
                 weight_decay=0.05, warmup=6672, hold=0.5, clip=2.0, ema=0.9999, label_drop=0.1, code_images=None,
                 eval_every=5000)),
}


# ------------------------------------------------------------------------------------------------------------------
# built-in images: ten shapes on a smooth background (low bands), outlined (middle bands), textured (high bands)

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "arrow", "hourglass")


def shape_distance(name, x, y):
    """Signed distance from points (x, y) to the outline of a shape of radius about 1: negative inside, y is down."""
    r = np.hypot(x, y)
    half_plane = lambda angle, offset: x * np.cos(angle) + y * np.sin(angle) - offset
    box = lambda w, h, cy=0.0: np.maximum(abs(x) - w, abs(y - cy) - h)
    disc = lambda cx, cy, radius: np.hypot(x - cx, y - cy) - radius
    if name == "circle":
        return r - 0.85
    if name == "square":
        return box(0.75, 0.75)
    if name == "triangle":
        return np.maximum.reduce([half_plane(a, 0.5) for a in np.pi * np.array([1 / 2, 7 / 6, 11 / 6])])
    if name == "star":         # fold the plane into one of ten half-points: there the outline is one straight line
        angle = np.abs((np.arctan2(x, -y) / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * (2 * np.pi / 5)
        tip, notch = np.array([1.05, 0.0]), 0.45 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
        normal = np.array([tip[1] - notch[1], notch[0] - tip[0]]) / -np.hypot(*(tip - notch))
        return (r * np.cos(angle) - tip[0]) * normal[0] + (r * np.sin(angle) - tip[1]) * normal[1]
    if name == "cross":
        return np.minimum(box(0.9, 0.3), box(0.3, 0.9))
    if name == "ring":
        return abs(r - 0.68) - 0.25
    if name == "crescent":
        return np.maximum(r - 0.95, -disc(0.5, 0.0, 0.8))
    if name == "heart":        # a square on its corner and two discs on its upper sides
        diamond = (abs(x) + abs(y - 0.1)) / np.sqrt(2) - 0.58
        return np.minimum.reduce([diamond, disc(-0.41, -0.31, 0.58), disc(0.41, -0.31, 0.58)])
    if name == "arrow":        # head up
        head = np.maximum((abs(x) * 0.77 - (y + 1.0) * 0.64), y - 0.05)
        return np.minimum(head, box(0.27, 0.5, 0.45))
    if name == "hourglass":
        return np.maximum((abs(x) - abs(y) * 0.85 - 0.1) * 0.76, abs(y) - 0.85)


def hsv(h, s, v):
    """Hue, saturation, value in [0, 1], each (B,) -> (B, 3) RGB in [0, 1]."""
    k = (np.array([5, 3, 1]) + h[:, None] * 6) % 6
    return v[:, None] * (1 - s[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))


class Shapes:
    """Procedural images without end: the i-th is a pure function of (seed, split, i), its class is i mod 10."""
    class_names = list(SHAPES)

    def __init__(self, split, image_size, seed=0):
        self.image_size = image_size
        self.stream = 2 * seed + (split == "val")                       # train and val never share a random stream
        self.size = 10_000 if split == "val" else 1_000_000

    def __len__(self):
        return self.size

    def batch(self, indices):
        """indices (B,) -> uint8 images (B, 3, S, S), labels (B,) long."""
        indices = torch.as_tensor(indices)
        u = uniforms(self.stream * 2 ** 40 + indices, 16).numpy().astype(np.float32)        # (B, 16)
        labels = indices % len(SHAPES)
        S, B = self.image_size, len(indices)
        axis = (np.arange(S, dtype=np.float32) + 0.5) * 2 / S - 1                           # pixel centres in -1 .. 1
        X, Y = axis[None, None, :], axis[None, :, None]
        column = lambda values: values.astype(np.float32)[:, None, None]                    # (B,) -> (B, 1, 1)

        # the shape's own frame: centre, rotation within 9 degrees (either way round for the crescent), radius
        turned = (labels.numpy() == SHAPES.index("crescent")) & (u[:, 1] < 0.5)
        angle = (u[:, 0] - 0.5) * np.pi / 10 + np.pi * turned
        radius = column(0.68 + 0.12 * u[:, 2])
        dx, dy = X - column(0.2 * u[:, 3] - 0.1), Y - column(0.2 * u[:, 4] - 0.1)
        x = (dx * column(np.cos(angle)) + dy * column(np.sin(angle))) / radius              # (B, S, S)
        y = (dy * column(np.cos(angle)) - dx * column(np.sin(angle))) / radius

        distance = np.empty((B, S, S), np.float32)                                          # in pixels
        for c, name in enumerate(SHAPES):
            rows = np.flatnonzero(labels.numpy() == c)
            distance[rows] = shape_distance(name, x[rows], y[rows]) * radius[rows] * (S / 2)
        inside = np.clip(0.5 - distance, 0, 1)
        line = np.clip(0.5 + 0.7 * S / 32 - abs(distance), 0, 1)                            # 1.4 px wide at 32 px

        # colours: a pale or dark background that drifts in hue, a saturated fill of another hue, an outline in contrast
        dark = u[:, 5] < 0.5
        value = np.where(dark, 0.12 + 0.2 * u[:, 6], 0.75 + 0.2 * u[:, 6])
        corner_a = hsv(u[:, 7], 0.25 + 0.35 * u[:, 8], value)
        corner_b = hsv(u[:, 7] + 0.3 * u[:, 9] - 0.15, 0.25 + 0.35 * u[:, 8], value + np.where(dark, 0.2, -0.2))
        fill = hsv(u[:, 7] + 0.25 + 0.5 * u[:, 10], 0.75 + 0.25 * u[:, 11], np.where(dark, 1.0, 0.8))
        outline = np.where(dark, 0.97, 0.08).astype(np.float32)[:, None, None, None]

        # texture, in the shape's frame and of fixed period: plain, stripes, checks or dots
        wave = lambda t: np.sin(t * radius * (2 * np.pi / 0.3))                             # 4.8 px at 32 px
        kind = column(np.floor(4 * u[:, 12]))
        across, down = wave(x), wave(y)
        pattern = np.select([kind == 1, kind == 2, kind == 3], [down, 1.6 * across * down, across + down - 0.5])
        shade = np.where(kind == 0, 1, 0.78 + 0.22 * np.clip(2 * pattern, -1, 1))[:, None]  # (B, 1, S, S)

        slope = column(2 * np.pi * u[:, 13])
        drift = np.clip(0.5 + 0.4 * (X * np.cos(slope) + Y * np.sin(slope)), 0, 1)[:, None]
        rgb = lambda c: c.astype(np.float32)[:, :, None, None]                              # (B, 3, 1, 1)
        image = rgb(corner_a) + (rgb(corner_b) - rgb(corner_a)) * drift
        image += (rgb(fill) * shade - image) * inside[:, None]
        image += (outline - image) * line[:, None]
        return torch.from_numpy(np.rint(image * 255).clip(0, 255).astype(np.uint8)), labels


# ------------------------------------------------------------------------------------------------------------------
# CIFAR, from the official binary archives (no pickles)

CIFAR = {   # folder in the archive, md5 from the authors' page, files of each split, bytes before the pixels, names
    "cifar10": ("cifar-10", "cifar-10-batches-bin", "c32a1d4ab5d03f1284b67883e8d87530",
                {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "val": ["test_batch.bin"]},
                1, "batches.meta.txt"),
    "cifar100": ("cifar-100", "cifar-100-binary", "03b5dce01913d631647c71ecec9e9cb8",
                 {"train": ["train.bin"], "val": ["test.bin"]}, 2, "fine_label_names.txt"),
}


class Cifar:
    """CIFAR-10 or CIFAR-100, whole in memory; "val" is the official test set."""

    def __init__(self, name, split, data_dir, image_size):
        if image_size != 32:
            raise UserError(f"{name} images are 32 px, --image-size is {image_size}: leave it at 32")
        archive, folder, md5, files, head, names = CIFAR[name]
        root = next((d for d in (Path(data_dir) / folder, Path(data_dir)) if (d / files["val"][0]).exists()), None)
        if root is None:
            file = download(f"https://www.cs.toronto.edu/~kriz/{archive}-binary.tar.gz",
                            Path(data_dir) / f"{archive}-binary.tar.gz", md5,
                            f"fetch it elsewhere and unpack it into {data_dir}, or name its folder by --data-dir")
            with tarfile.open(file) as packed:
                packed.extractall(data_dir, filter="data")
            file.unlink()
            root = Path(data_dir) / folder
        for f in files[split] + [names]:
            if not (root / f).exists():
                raise UserError(f"{root / f} is missing: {name} has {len(files[split])} {split} file(s); "
                                f"delete {root} to download them again")
        records = np.concatenate([self.read(root / f, head) for f in files[split]])
        self.labels = torch.from_numpy(records[:, head - 1].astype(np.int64))               # CIFAR-100: the fine label
        self.images = torch.from_numpy(records[:, head:].reshape(-1, 3, 32, 32))
        self.class_names = (root / names).read_text().split()

    @staticmethod
    def read(path, head):
        data = np.fromfile(path, np.uint8)
        if data.size == 0 or data.size % (head + 3072):
            raise UserError(f"{path} has {data.size} bytes, not a multiple of {head + 3072}: it is truncated, "
                            f"delete it")
        return data.reshape(-1, head + 3072)

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        """indices (B,) -> uint8 images (B, 3, 32, 32), labels (B,) long."""
        indices = torch.as_tensor(indices)
        return self.images[indices], self.labels[indices]


def download(url, path, digest, remedy):
    """Fetch a file once; returns its path. A partial or wrong file (md5 or sha256) never keeps the name."""
    known = hashlib.md5 if len(digest) == 32 else hashlib.sha256
    if path.exists():
        found = known(path.read_bytes()).hexdigest()
        if found != digest:
            path.unlink()
            raise UserError(f"{path} had checksum {found}, not {digest}, and is removed: run again, or {remedy}")
        return path
    part = Path(f"{path}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=10) as reply, open(part, "wb") as out, \
                tqdm(total=int(reply.headers.get("Content-Length", 0)), unit="B", unit_scale=True, desc=url) as bar:
            while chunk := reply.read(1 << 20):
                out.write(chunk)
                bar.update(len(chunk))
        found = known(part.read_bytes()).hexdigest()
        if found != digest:
            raise UserError(f"{url} has checksum {found}, not {digest}, and is removed: {remedy}")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"cannot download {url} to {path} ({e}), checksum {digest}: {remedy}") from None
    finally:
        part.unlink(missing_ok=True)
    return path


# ------------------------------------------------------------------------------------------------------------------
# a folder of images: train/ and val/ inside, or one folder a class, or images alone (one class)

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def images_below(folder):
    """All image files below a folder, sorted, so that the i-th is the same on every machine."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())


def list_classes(folder):
    """{class name: files}; sub-folders are classes, a folder of images alone is one class."""
    subfolders = sorted(d for d in folder.iterdir() if d.is_dir())
    classes = {d.name: images_below(d) for d in subfolders} or {folder.name: images_below(folder)}
    for name, files in classes.items():
        if not files:
            raise UserError(f"{folder / name if subfolders else folder} has 0 images "
                            f"({' '.join(sorted(EXTENSIONS))}): add some or remove it")
    return classes


def open_folder(root, image_size, workers):
    """(train, val) of a folder of images."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: --data takes {', '.join(['shapes', *CIFAR])} or a folder of images")
    if (root / "train").is_dir():
        train = list_classes(root / "train")
        if (root / "val").is_dir():
            val = list_classes(root / "val")
            if val.keys() != train.keys():
                odd = sorted(val.keys() ^ train.keys())
                raise UserError(f"{root}: {len(train)} classes in train and {len(val)} in val, {len(odd)} of them in "
                                f"one only (first: {odd[0]}): make them the same")
            return Folder(train, image_size, workers), Folder(val, image_size, workers)
    else:
        train = list_classes(root)
    samples = [(name, f) for name, files in train.items() for f in files]
    if len(samples) < 2:
        raise UserError(f"{root} has {len(samples)} image, and 1 is held out for validation: add more")
    order = np.random.RandomState(0).permutation(len(samples))
    held_out = set(order[:max(1, round(0.05 * len(samples)))].tolist())
    print(f"{root} has no val folder: {len(held_out)} of {len(samples)} images (5 %, seeded) are held out")
    parts = [{name: [] for name in train}, {name: [] for name in train}]     # classes -> files, of train and of val
    for i, (name, f) in enumerate(samples):
        parts[i in held_out][name].append(f)
    return tuple(Folder(part, image_size, workers) for part in parts)


class Folder:
    """Image files, decoded and centre-cropped when asked for, by a few threads."""

    def __init__(self, classes, image_size, workers):
        self.class_names = list(classes)
        self.files = [f for files in classes.values() for f in files]
        self.labels = torch.tensor([c for c, files in enumerate(classes.values()) for _ in files])
        self.image_size, self.bad = image_size, set()
        self.pool = ThreadPoolExecutor(max(1, workers))                 # Pillow decodes outside Python's lock

    def __len__(self):
        return len(self.files)

    def decode(self, i):
        """Image i as (S, S, 3) uint8; one that cannot be read is named, counted, and replaced by the next readable."""
        try:
            with Image.open(self.files[i]) as image:
                return np.array(center_crop(image.convert("RGB"), self.image_size))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            if i not in self.bad:
                self.bad.add(i)
                print(f"cannot decode {self.files[i]} ({e}): replaced by the next image, {len(self.bad)} so far")
            if len(self.bad) * 1000 > len(self):
                raise UserError(f"{len(self.bad)} of {len(self)} images cannot be decoded, more than 1 in 1,000: "
                                f"remove {self.files[i]} and its like") from None
            return self.decode((i + 1) % len(self))

    def batch(self, indices):
        """indices (B,) -> uint8 images (B, 3, S, S), labels (B,) long."""
        indices = torch.as_tensor(indices)
        images = np.stack(list(self.pool.map(self.decode, indices.tolist())))
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), self.labels[indices]


def center_crop(image, size):
    """ADM's crop, the field's: halve with BOX while large, bicubic to the short side, the middle square."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def open_data(args):
    """(train, val) data sets of --data; each has len(), class_names and batch(indices) -> uint8 images, labels."""
    if args.data == "shapes":
        return tuple(Shapes(split, args.image_size) for split in ("train", "val"))
    if args.data in CIFAR:
        return tuple(Cifar(args.data, split, args.data_dir or "data", args.image_size) for split in ("train", "val"))
    return open_folder(args.data, args.image_size, args.workers)


@lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def batch_indices(n, batch_size, step, seed):
    """Which samples make the batch of a step: a pure function, so a resumed run goes on with the very next batch."""
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    return torch.cat([epoch_order(n, epoch, seed)[position[position // n == epoch] % n]
                      for epoch in (position // n).unique().tolist()])


def to_float(images):
    """uint8 0 .. 255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """[-1, 1] -> uint8 by rounding: truncation, as ADM has it, would lose a level."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------------
# perceptual distance

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
LPIPS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"
LPIPS_MD5 = "d507d7349b931f0638a25a48a722f98a"


class LPIPS(torch.nn.Module):
    """LPIPS v0.1 with VGG16 (Zhang et al. 2018): images in [-1, 1] (B, 3, H, W), twice -> (B,)."""
    stages = (64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for stage in self.stages:                                       # module numbers are torchvision's
            for width in stage:
                layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
                channels = width
            layers.append(torch.nn.MaxPool2d(2))
        self.features = torch.nn.Sequential(*layers[:-1])
        self.lin = torch.nn.ParameterList(torch.zeros(stage[-1]) for stage in self.stages)
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(3, 1, 1), persistent=False)

    def taps(self, x):
        """Unit-length features after relu1_2, 2_2, 3_3, 4_3 and 5_3."""
        x = (x - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            if isinstance(layer, torch.nn.MaxPool2d):
                yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            x = layer(x)
        yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    def forward(self, a, b):
        return sum(((x - y).square() * w.view(-1, 1, 1)).sum(1).mean((1, 2))
                   for x, y, w in zip(self.taps(a), self.taps(b), self.lin))


def weights_folder():
    """Where PyTorch keeps downloaded weights; TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def load_lpips(vgg=None, linear=None, device="cpu"):
    """LPIPS with the published weights: of files (torchvision's VGG16, LPIPS' linear layers), or downloaded once."""
    vgg = vgg or download(VGG_URL, weights_folder() / "vgg16-397923af.pth", VGG_SHA256, "name a copy by --vgg")
    linear = linear or download(LPIPS_URL, weights_folder() / "lpips-v0.1-vgg.pth", LPIPS_MD5,
                                "name a copy by --lpips-weights")
    model = LPIPS()
    try:
        trunk, lin = (torch.load(f, map_location="cpu", weights_only=True) for f in (vgg, linear))
        model.features.load_state_dict({k.removeprefix("features."): v for k, v in trunk.items() if "features" in k})
        for i, w in enumerate(model.lin):
            w.data.copy_(lin[f"lin{i}.model.1.weight"].flatten())
    except UNREADABLE as e:
        raise UserError(f"{vgg} and {linear} are not VGG16's and LPIPS' weights ({str(e).splitlines()[0][:80]}): "
                        f"get {VGG_URL} and {LPIPS_URL}") from None
    return model.to(device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------------
# run helpers, shared with train_gpt.py and sample.py

def base_parser(doc, argv):
    """(parser with the flags of every script, preset that --data or --preset names)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument_group("data and run").add_argument
    add("--data", default="shapes", help="shapes, cifar10, cifar100, or a folder of images")
    add("--data-dir", default="data", help="where CIFAR lies, or is downloaded to")
    add("--preset", choices=PRESETS, help="sizes and schedule; --data chooses one (a folder: cifar)")
    add("--out", help="folder of the run's files (default: out/<data>)")
    add("--seed", type=int, default=0, help="of weights, batches and samples")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--data", default="shapes")
    peek.add_argument("--preset")
    known, _ = peek.parse_known_args(argv)
    return parser, PRESETS.get(known.preset or known.data, PRESETS["cifar"])


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and every flag's default; where it is None, the flag's own text tells it."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def add_training_flags(parser, p):
    """Flags that both training scripts take; p is the preset's part that gives the defaults."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=int, default=p["steps"], help="optimizer steps")
    add("--batch-size", type=int, default=p["batch_size"], help="images in a step")
    add("--lr", type=float, default=p["lr"], help="peak learning rate of AdamW")
    add("--betas", type=float, nargs=2, default=p["betas"], help="of AdamW")
    add("--weight-decay", type=float, default=p["weight_decay"], help="of matrices; nothing else decays")
    add("--warmup", type=int, default=p["warmup"], help="steps of linear warm-up")
    add("--hold", type=float, default=p["hold"], help="share of the run at the peak before the cosine to a tenth")
    add("--clip", type=float, default=p["clip"], help="largest gradient norm")
    add("--ema", type=float, default=p["ema"], help="decay of the averaged weights, which are the ones evaluated")
    add = parser.add_argument_group("training run").add_argument
    add("--log-every", type=int, default=20, help="steps between log lines")
    add("--eval-every", type=int, default=p["eval_every"], help="steps between evaluations with pictures")
    add("--save-every", type=int, default=p["eval_every"], help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--overwrite", action="store_true", help="replace the checkpoint in --out")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that decode images of a folder")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of matrix products; auto: the faster")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model")


def finish_args(parser, args):
    """Fill in what follows from other flags."""
    for flag in ("steps", "batch_size", "log_every", "eval_every", "save_every"):
        if getattr(args, flag, 1) < 1:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}: it must be at least 1")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as e:
        parser.error(f"--device {args.device}: {str(e).splitlines()[0]}")
    name = args.data if args.data in ("shapes", *CIFAR) else Path(args.data).resolve().name
    args.out = Path(args.out or Path("out") / name)
    return args


def keep_freed_memory():
    """Let glibc keep what a step frees: to give it back and fault it in again takes 10 % of a CPU step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 2 ** 30)                                                # M_MMAP_THRESHOLD, bytes
        mallopt(-1, 2 ** 31 - 1)                                            # M_TRIM_THRESHOLD, bytes


def run(main, args):
    """main(args), with a user's mistake told in one line (exit 2) and a failed run too (exit 1)."""
    keep_freed_memory()
    try:
        main(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except (FailedRun, torch.OutOfMemoryError) as e:
        print(f"failed: {str(e).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()                                    # or its threads may abort the exit


def share_work(args):
    """(rank, ranks) under torchrun, which this joins; (0, 1) without it."""
    if "RANK" not in os.environ:
        return 0, 1
    cuda = args.device.startswith("cuda")
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return dist.get_rank(), dist.get_world_size()


def first_rank_first(load, args):
    """load() on the first rank, then on the others, who find what it downloads or trains."""
    if args.rank:
        dist.barrier()
    result = load()
    if args.ranks > 1 and not args.rank:
        dist.barrier()
    return result


def all_sum(x, device):
    """Replace a tensor by its sum over all ranks."""
    if dist.is_initialized():
        total = x.to(device)
        dist.all_reduce(total)
        x.copy_(total)


def gather(x):
    """The rows of all ranks' CPU tensors, in the order of the ranks."""
    if not dist.is_initialized():
        return x
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return torch.cat(parts)


def new_run(path, args):
    """Make the run's folder; refuse to overwrite a checkpoint unasked, or to resume from none."""
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other: choose one")
    if args.resume and not path.exists():
        raise UserError(f"{path} does not exist, so there is nothing to resume: leave --resume out, or correct --out")
    if path.exists() and not (args.resume or args.overwrite):
        raise UserError(f"{path} exists: --resume goes on from it, --overwrite replaces it, --out takes another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder {path.parent} ({e.strerror}): choose another --out") from None


def matmul_speed(device, dtype, n=1024):
    """Floating point operations per second of this machine's n x n matrix product, the best of several."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def choose_dtype(args):
    """(dtype of the matrix products, FLOP/s of a matrix product in it); prints which and why."""
    n = 8192 if args.device.startswith("cuda") else 1024
    speed = {d: matmul_speed(args.device, d, n) for d in (torch.float32, torch.bfloat16)}
    if args.dtype == "auto":
        ratio = speed[torch.bfloat16] / speed[torch.float32]
        dtype = torch.bfloat16 if ratio > 1.3 else torch.float32
        reason = f"a bfloat16 matrix product is {ratio:.1f} x as fast as float32 here"
    else:
        dtype, reason = getattr(torch, args.dtype), "--dtype"
    args.dtype = str(dtype).removeprefix("torch.")
    print(f"dtype {args.dtype} ({reason}), {speed[dtype] / 1e9:.0f} GFLOP/s in a matrix product = mfu 100%")
    return dtype, speed[dtype]


def make_optimizer(model, args):
    """AdamW that decays matrices only: no biases, norms, embeddings, positions, codebook."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    groups = [dict(params=[p for p in model.parameters() if (id(p) in matrices) == decays],
                   weight_decay=args.weight_decay if decays else 0.0) for decays in (True, False)]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    return torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)


def lr_at(step, args):
    """Linear warm-up, the peak for a share `hold` of the run, then a cosine to a tenth of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    start = max(args.warmup, args.hold * args.steps)
    done = min(max((step - start) / max(args.steps - start, 1), 0), 1)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay ema + (1 - decay) model, buffers too; the decay warms up as (1 + step) / (10 + step)."""
    decay = min(decay, (1 + step) / (10 + step))
    for averaged, current in zip(ema.state_dict().values(), model.state_dict().values()):
        averaged.lerp_(current, 1 - decay) if averaged.is_floating_point() else averaged.copy_(current)


def plain(args):
    """The command line as a dict of plain types, for logs and checkpoints."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def restore(path, kind, model, ema, optimizer, args):
    """Load a run's checkpoint into model, ema and optimizer, keep its dtype; returns the checkpoint."""
    checkpoint = read_checkpoint(path, kind, args.device)
    config = asdict(model.config)
    for k, v in config.items():
        if checkpoint["config"].get(k) != v:
            raise UserError(f"{path} has {k} {checkpoint['config'].get(k)}, this run {v}: resume with the same sizes, "
                            f"or take another --out")
    if checkpoint["step"] >= args.steps:
        raise UserError(f"{path} has done {checkpoint['step']} steps, --steps is {args.steps}: ask for more to go on")
    model.load_state_dict(checkpoint["model"])
    ema.load_state_dict(checkpoint["ema"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    args.dtype = checkpoint["args"]["dtype"]
    return checkpoint


def seed_step(seed, step):
    """All random draws of a step follow from (seed, step): nothing to restore on resume."""
    torch.manual_seed((seed * 1_000_003 + step) % 2 ** 32)                  # the CPU generator reads 32 bits


def versions():
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)


class Log:
    """Log lines on the screen, the same fields as JSON lines in a file; the first record says what ran, and where."""

    def __init__(self, path, args, model):
        self.file = open(path, "a" if args.resume else "w", buffering=1)
        try:
            commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                                    cwd=Path(__file__).parent).stdout.strip()
        except OSError:                                                     # no git here
            commit = ""
        config = plain(args)
        parameters = sum(p.numel() for p in model.parameters())
        self.write(command=" ".join(sys.argv), config=config, model=asdict(model.config), parameters=parameters,
                   versions=versions(), device=args.device, threads=torch.get_num_threads(), commit=commit)
        print(" ".join(f"{k}={v}" for k, v in config.items()))
        print(f"{parameters / 1e6:.2f} M parameters")

    def write(self, **record):
        self.file.write(json.dumps(record) + "\n")


class Meter:
    """Means and speed since the last log line."""

    def __init__(self, args, flops_per_image, peak):
        self.args, self.flops, self.peak = args, flops_per_image, peak
        self.reset()

    def reset(self):
        self.sums, self.count, self.data_time, self.start, self.codes = {}, 0, 0.0, time.perf_counter(), []

    def add(self, **values):
        self.count += 1
        for k, v in values.items():
            self.sums[k] = self.sums.get(k, 0) + v.detach()

    def line(self, step, lr):
        """The record of a log line; prints it. Raises FailedRun when a term is not a number."""
        args = self.args
        terms = {k: (v / self.count).item() for k, v in self.sums.items()}
        for name, value in terms.items():
            if not math.isfinite(value):
                raise FailedRun(f"{name} is {value} by step {step}: the last checkpoint is kept; lower --lr "
                                f"(now {args.lr}) or --clip (now {args.clip}) and --resume")
        seconds = (time.perf_counter() - self.start) / self.count
        if self.codes:                                                      # codes chosen since the last line
            terms["used"] = len(torch.cat(self.codes).unique()) / args.codebook_size
        speed = args.batch_size / seconds
        memory = torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else peak_memory()
        record = dict(step=step, **terms, lr=lr, ms=seconds * 1e3, images_per_second=speed,
                      mfu=speed * self.flops / self.peak, data=self.data_time / self.count / seconds,
                      memory_gb=memory / 1e9, eta_hours=(args.steps - step) * seconds / 3600)
        print(f"step {step:06d}/{args.steps:06d}", *(f"{k} {v:.4f}" for k, v in terms.items()), f"lr {lr:.2e}",
              f"{seconds * 1e3:.0f} ms", f"{speed:.0f} img/s", f"mfu {record['mfu']:.0%}", f"data {record['data']:.1%}",
              f"{record['memory_gb']:.1f} GB", f"eta {duration(record['eta_hours'])}", sep=" | ", flush=True)
        self.reset()
        return record


def peak_memory():
    """Bytes of the process's largest resident size; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def duration(hours):
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


class Interrupt:
    """SIGINT and SIGTERM ask the loop to finish its step, save and leave."""

    def __init__(self):
        self.asked = None
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.ask)

    def ask(self, number, frame):
        self.asked = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)                               # a second one ends the process at once


# ------------------------------------------------------------------------------------------------------------------
# pictures

def save_grid(path, rows, names=None, columns=None, scale=None):
    """PNG of rows of images: a list of uint8 (n, 3, S, S), names left of them, column titles above."""
    S = rows[0].shape[-1]
    scale = scale or max(1, 64 // S)
    gap, cell, font = 2, S * scale, ImageFont.load_default(size=12)
    margin = max((int(font.getlength(n)) for n in names), default=0) + 10 if names else gap
    head = 20 if columns else gap
    size = margin + max(len(r) for r in rows) * (cell + gap), head + len(rows) * (cell + gap)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for i, title in enumerate(columns or []):
        draw.text((margin + i * (cell + gap) + cell / 2, head / 2), title, fill="black", font=font, anchor="mm")
    for j, row in enumerate(rows):
        y = head + j * (cell + gap)
        if names:
            draw.text((5, y + cell / 2), names[j], fill="black", font=font, anchor="lm")
        for i, image in enumerate(row):
            tile = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).resize((cell, cell), Image.NEAREST)
            picture.paste(tile, (margin + i * (cell + gap), y))
    picture.save(f"{path}.tmp", format="PNG")
    os.replace(f"{path}.tmp", path)


def spread_levels(N):
    """1, 2, 4, 8 ... and N: the levels that evaluations and pictures show."""
    return sorted({2 ** k for k in range(N.bit_length()) if 2 ** k <= N} | {N})


# ------------------------------------------------------------------------------------------------------------------
# evaluation on held-out images

def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 images (B, 3, H, W) -> (B,) dB; infinite where they are equal."""
    return 10 * torch.log10(255 ** 2 / (a.float() - b.float()).square().mean((1, 2, 3)))


def codebook_use(codes, K):
    """codes (n, N) -> (share of the K codes in use, perplexity, perplexity by token position (N,))."""
    def perplexity(column):
        p = torch.bincount(column.flatten(), minlength=K).double() / column.numel()
        return torch.special.entr(p).sum().exp().item()
    return len(codes.unique()) / K, perplexity(codes), [perplexity(c) for c in codes.T]


@torch.no_grad()
def evaluate(model, data, args, dtype):
    """Held-out PSNR of each level against its sub-image and the image, and codebook use; writes recon.png."""
    model.eval()
    N, levels = model.config.num_tokens, spread_levels(model.config.num_tokens)
    levels = levels[-1:] if model.config.flat else levels
    results, all_codes, pictures = {i: [] for i in levels}, [], []
    for chunk in torch.arange(min(args.eval_images, len(data))).split(64):
        images = to_float(data.batch(chunk)[0].to(args.device))
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            codes = model.encode(images)
            outputs = {i: model.decode(codes, i) for i in levels}
        targets = {i: low_pass(images, model.edges[i - 1]) for i in levels}
        for i in levels:
            results[i].append(torch.stack([psnr(to_uint8(outputs[i]), to_uint8(x)) for x in (targets[i], images)]))
        all_codes.append(codes)
        if not pictures:
            pictures = [("image", images)]
            for i in ([i for i in levels if i > 1] if len(levels) > 6 else levels):
                pictures += [(f"target, {i} token{'s' * (i > 1)}", targets[i]), ("reconstruction", outputs[i])]
    save_grid(args.out / "recon.png", [to_uint8(x[:12]) for _, x in pictures], [name for name, _ in pictures])
    results = {i: torch.cat(r, 1).mean(1).tolist() for i, r in results.items()}
    used, perplexity, by_position = codebook_use(torch.cat(all_codes), model.config.codebook_size)
    return dict(psnr_sub_image={i: r[0] for i, r in results.items()}, psnr_image={i: r[1] for i, r in results.items()},
                used=used, perplexity=perplexity, perplexity_by_position=by_position)


def print_evaluation(e, edges):
    """The evaluation as a small table."""
    print("  tokens  window  PSNR to sub-image  to image")
    for i in e["psnr_image"]:
        print(f"  {i:6d}  {edges[i - 1]:6d}  {e['psnr_sub_image'][i]:14.2f} dB  {e['psnr_image'][i]:5.2f} dB")
    print(f"  codebook: {e['used']:.1%} used, perplexity {e['perplexity']:.0f}; perplexity by position: " +
          " ".join(f"{p:.0f}" for p in e["perplexity_by_position"]), flush=True)


# ------------------------------------------------------------------------------------------------------------------
# the run

def parse_args(argv=None):
    parser, p = base_parser(__doc__, argv)
    add = parser.add_argument_group("model").add_argument
    add("--image-size", type=int, default=p["image_size"], help="S, pixels")
    add("--patch-size", type=int, default=p["patch_size"], help="p, pixels")
    add("--num-tokens", type=int, default=p["num_tokens"], help="N, codes of an image")
    add("--codebook-size", type=int, default=p["codebook_size"], help="K")
    add("--code-dim", type=int, default=p["code_dim"], help="d, width of a code vector")
    add("--width", type=int, default=p["width"], help="D, of encoder and decoder")
    add("--depth", type=int, default=p["depth"], help="blocks in each of encoder and decoder")
    add("--heads", type=int, default=p["heads"], help="of attention")
    add("--power", type=float, default=p["power"], help="of the mapping: window side S (i/N)^power, 1 = uniform")
    add("--flat", action=argparse.BooleanOptionalAction, default=p["flat"], help="baseline: one level, bidirectional")
    add("--eval-images", type=int, default=p["eval_images"], help="held-out images in an evaluation")
    add_training_flags(parser, p)
    return finish_args(parser, parser.parse_args(argv))


def draw_levels(B, N, flat, device):
    """(B, G) levels to decode in a step: the full one and one random shorter one for each image.

    NOTE one random prefix alone would collapse the tail of the code (NesTok: 20 % of codes in use against 98 %).
    """
    full = torch.full((B, 1), N, device=device)
    return full if flat or N == 1 else torch.cat([full, torch.randint(1, N, (B, 1), device=device)], 1)


def reconstruction_loss(recon, images, levels, edges):
    """Sum over the levels of the mean squared error between each reconstruction and its sub-image (paper, Eq. 7)."""
    return sum(F.mse_loss(recon[:, g], low_pass(images, edges[levels[:, g] - 1])) for g in range(levels.shape[1]))


def main(args):
    path = args.out / "tokenizer.pt"
    config = TokenizerConfig(**{f.name: getattr(args, f.name) for f in fields(TokenizerConfig)})
    new_run(path, args)
    train, val = open_data(args)
    torch.manual_seed(args.seed)
    model = SpectralTokenizer(config).to(args.device)
    ema = copy.deepcopy(model).eval()
    optimizer = make_optimizer(model, args)
    start = 0
    if args.resume:
        start = restore(path, "tokenizer", model, ema, optimizer, args)["step"]
    dtype, peak = choose_dtype(args)
    log = Log(args.out / "log-tokenizer.jsonl", args, model)
    print(f"{len(train):,} training and {len(val):,} held-out images, {len(train.class_names)} classes")
    step_model = torch.compile(model) if args.compile else model
    meter, interrupt = Meter(args, model.flops(1 if config.flat else 2), peak), Interrupt()

    def save(step):
        save_checkpoint(path, "tokenizer", config=asdict(config), args=plain(args), step=step,
                        model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())

    for step in range(start, args.steps + 1):
        last = step == args.steps or interrupt.asked
        if step > start and (step % args.log_every == 0 or last) and meter.count:
            log.write(**meter.line(step, lr))
        if step > start and (step % args.eval_every == 0 or step == args.steps):
            evaluation = evaluate(ema, val, args, dtype)
            print_evaluation(evaluation, model.edges.tolist())
            log.write(step=step, **evaluation)
            meter.reset()
        if step > start and (step % args.save_every == 0 or last):
            save(step)
        if last:
            break

        # one training step: a batch, its full level and one random level, the losses, the update
        tick = time.perf_counter()
        seed_step(args.seed, step)
        images, _ = train.batch(batch_indices(len(train), args.batch_size, step, args.seed))
        flip = torch.rand(len(images), 1, 1, 1) < 0.5
        images = to_float(torch.where(flip, images.flip(-1), images).to(args.device))
        meter.data_time += time.perf_counter() - tick

        levels = draw_levels(len(images), config.num_tokens, config.flat, args.device)
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            recon, codes, vq_loss = step_model(images, levels)
        rec_loss = reconstruction_loss(recon, images, levels, model.edges)
        loss = rec_loss + vq_loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        lr = lr_at(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, args.ema, step)
        meter.add(loss=loss, rec=rec_loss, vq=vq_loss, norm=norm)
        meter.codes.append(codes)

    if interrupt.asked:
        raise FailedRun(f"{interrupt.asked} after step {step}: saved {path}, --resume goes on from there")
    print(f"saved {path}, {args.out / 'recon.png'}")


if __name__ == "__main__":
    run(main, parse_args())
