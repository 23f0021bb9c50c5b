"""Train the spectral tokenizer (paper, section 3.3): images in, out/<data>/tokenizer.pt out.

  python train_tokenizer.py                                     # built-in shapes, a laptop CPU, minutes
  python train_tokenizer.py --data cifar10 --data-dir data      # real images, downloaded when absent
  python train_tokenizer.py --data /my/images --image-size 64   # your own: a folder of classes, or one folder
  torchrun --nproc-per-node 8 train_tokenizer.py --data imagenet --data-dir /path/to/ILSVRC    # the paper's size
  python train_tokenizer.py --data imagenet --data-dir /path/to/ILSVRC --dry-run               # what would it take?

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
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, fields
from functools import lru_cache, partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from spectralar import (UNREADABLE, Block, FailedRun, SpectralTokenizer, TokenizerConfig, UserError, dct_matrix,
                        load_tokenizer, load_weights, low_pass, need, out_of_memory, read_checkpoint, read_config,
                        save_checkpoint, uniforms, wrap_int64)

# ------------------------------------------------------------------------------------------------------------------
# presets: all that --data or --preset sets (a folder takes "cifar", so that defaults run on a laptop). Every field is a
# flag of train_tokenizer.py, those of "gpt" of train_gpt.py

PRESETS = {
    "shapes": dict(      # minutes on a laptop CPU
        image_size=32, patch_size=4, num_tokens=16, codebook_size=512, code_dim=16, width=128, depth=4, heads=4,
        power=1.5, flat=False,
        steps=2000, batch_size=16, lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-4, warmup=100, hold=0.0, clip=1.0,
        ema=0.995, perceptual=0.0, perceptual_start=0, perceptual_net="vgg", gan=0.0, gan_start=0, lecam=0.001,
        eval_every=1000, eval_images=512,
        gpt=dict(width=192, depth=4, heads=6, steps=1500, batch_size=64, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05,
                 warmup=100, hold=0.5, clip=2.0, ema=0.99, label_drop=0.1, views="flip", code_images=20000,
                 eval_every=500)),
    "cifar": dict(       # an hour on a CPU core, half of it for the generator
        image_size=32, patch_size=4, num_tokens=64, codebook_size=1024, code_dim=16, width=192, depth=4, heads=6,
        power=0.5, flat=False,
        steps=4500, batch_size=16, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4, warmup=200, hold=0.0, clip=1.0,
        ema=0.995, perceptual=0.2, perceptual_start=2500, perceptual_net="classifier", gan=0.02, gan_start=2500,
        lecam=0.001, eval_every=500, eval_images=512,
        gpt=dict(width=256, depth=6, heads=8, steps=2200, batch_size=64, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05,
                 warmup=200, hold=0.5, clip=2.0, ema=0.995, label_drop=0.1, views="flip", code_images=None,
                 eval_every=500)),
    "imagenet": dict(    # the paper's size: ViT-B encoder and decoder, d16 generator
        image_size=256, patch_size=16, num_tokens=64, codebook_size=4096, code_dim=16, width=768, depth=12, heads=12,
        power=1.5, flat=False,
        steps=1_000_000, batch_size=256, lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-4, warmup=10_000, hold=0.0,
        clip=1.0, ema=0.999, perceptual=1.0, perceptual_start=0, perceptual_net="vgg", gan=0.1, gan_start=200_000,
        lecam=0.001, eval_every=5000, eval_images=512,
        gpt=dict(width=None, depth=16, heads=None, steps=333_600, batch_size=768, lr=3e-4, betas=(0.9, 0.95),
                 weight_decay=0.05, warmup=6672, hold=0.5, clip=2.0, ema=0.9999, label_drop=0.1, views="ten-crop",
                 code_images=None, eval_every=5000)),
}


DATA = ("shapes", "cifar10", "cifar100", "imagenet")    # anything else that --data names is a folder of images


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

    def batch(self, indices, crops=None):
        """indices (B,) -> uint8 images (B, 3, S, S), labels (B,) long."""
        indices = torch.as_tensor(indices)
        seeds = wrap_int64(self.stream * 2 ** 40) + indices
        u = uniforms(seeds, 16).numpy().astype(np.float32)                                  # (B, 16)
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


def cifar_folder(name, data_dir):
    """data_dir, or the folder in it, that holds the unpacked files. None where they are absent."""
    _, folder, _, files, _, _ = CIFAR[name]
    for root in (Path(data_dir) / folder, Path(data_dir)):
        if (root / files["val"][0]).exists():
            return root
    return None


class Cifar:
    """CIFAR-10 or CIFAR-100, whole in memory; "val" is the official test set."""

    def __init__(self, name, split, data_dir, image_size):
        if image_size != 32:
            raise UserError(f"{name} images are 32 px, --image-size is {image_size}: leave it at 32")
        archive, folder, md5, files, head, names = CIFAR[name]
        root = cifar_folder(name, data_dir)
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

    def batch(self, indices, crops=None):
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
# image files: train/ and val/ inside a folder, or one folder a class, or images alone (one class)

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def images_below(folder):
    """The paths of all image files below a folder, sorted, so that the i-th is the same on every machine."""
    return sorted(os.path.join(where, name) for where, _, names in os.walk(folder) for name in names
                  if os.path.splitext(name)[1].lower() in EXTENSIONS)


def list_classes(folder):
    """{class name: files}; sub-folders are classes, a folder of images alone is one class."""
    subfolders = sorted(d for d in folder.iterdir() if d.is_dir())
    classes = {d.name: images_below(d) for d in subfolders} or {folder.name: images_below(folder)}
    for name, files in classes.items():
        if not files:
            raise UserError(f"{folder / name if subfolders else folder} has 0 images "
                            f"({' '.join(sorted(EXTENSIONS))}): add some or remove it")
    return classes


def synset_names(root):
    """{wnid: words} of ImageNet's LOC_synset_mapping.txt, in the folder or beside it; {} without one."""
    for file in (root / "LOC_synset_mapping.txt", root.parent / "LOC_synset_mapping.txt"):
        if file.is_file():
            return dict(line.split(maxsplit=1) for line in file.read_text().splitlines() if " " in line)
    return {}


def open_folder(root, image_size, workers):
    """(train, val) of a folder of images; class names are the folders', with ImageNet's words where those are known."""
    root, words = Path(root), synset_names(Path(root))
    if (root / "Data" / "CLS-LOC").is_dir():                            # ILSVRC as Kaggle packs it
        root = root / "Data" / "CLS-LOC"
    if (root / "train").is_dir():
        train = list_classes(root / "train")
        parts = train, list_classes(root / "val") if (root / "val").is_dir() else None
    else:
        train = list_classes(root)
        parts = train, None
    if parts[1] is None:
        parts = hold_out(root, train)
    elif parts[1].keys() != train.keys():
        odd = sorted(parts[1].keys() ^ train.keys())
        raise UserError(f"{root}: {len(train)} classes in train and {len(parts[1])} in val, {len(odd)} of them in one "
                        f"only (first: {odd[0]}): make them the same, each image in its class's folder")
    names = [f"{words[name].strip()} ({name})" if name in words else name for name in train]
    return tuple(Folder(list(part.values()), names, image_size, workers) for part in parts)


def hold_out(root, classes):
    """(train, val), each {class name: files}: a seeded 5 % of the images, at least one, is held out."""
    samples = [(name, f) for name, files in classes.items() for f in files]
    if len(samples) < 2:
        raise UserError(f"{root} has {len(samples)} image, and 1 is held out for validation: add more")
    order = np.random.RandomState(0).permutation(len(samples))
    held_out = set(order[:max(1, round(0.05 * len(samples)))].tolist())
    print(f"{root} has no val folder: {len(held_out)} of {len(samples)} images (5 %, seeded) are held out")
    parts = {name: [] for name in classes}, {name: [] for name in classes}
    for i, (name, f) in enumerate(samples):
        parts[i in held_out][name].append(f)
    return parts


class Folder:
    """Image files by class, decoded and cropped when asked for, by a few threads."""

    def __init__(self, files, class_names, image_size, workers):
        self.class_names = class_names
        self.files = [f for part in files for f in part]
        self.labels = torch.tensor([c for c, part in enumerate(files) for _ in part])
        self.image_size, self.bad = image_size, set()
        self.pool = ThreadPoolExecutor(max(1, workers))                 # Pillow decodes outside Python's lock

    def __len__(self):
        return len(self.files)

    def load(self, i, crop):
        """(pixels (S, S, 3) uint8, label) of file i, or of the next readable one: those that are not are counted."""
        try:
            with Image.open(self.files[i]) as image:
                if crop is None:
                    return np.array(center_crop(upright_rgb(image), self.image_size)), self.labels[i]
                return np.array(any_crop(image, self.image_size, *crop)), self.labels[i]
        except Exception as e:                                          # broken files raise nearly anything in Pillow
            if i not in self.bad:
                self.bad.add(i)
                print(f"cannot decode {self.files[i]} ({e}): replaced by the next image, {len(self.bad)} so far",
                      file=sys.stderr)
            if len(self.bad) * 1000 > len(self):
                raise UserError(f"{len(self.bad)} of {len(self)} images cannot be decoded, more than 1 in 1,000: "
                                f"remove {self.files[i]} and its like") from None
        return self.load((i + 1) % len(self), crop)

    def batch(self, indices, crops=None):
        """indices (B,) -> uint8 images (B, 3, S, S), labels (B,) long. Cropped at the centre, or see any_crop."""
        indices = torch.as_tensor(indices).tolist()
        crops = [None] * len(indices) if crops is None else crops.tolist()
        images, labels = zip(*self.pool.map(self.load, indices, crops))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.stack(labels)


def upright_rgb(image):
    """A Pillow image as a viewer shows it: turned as EXIF says, 16 bits cut to 8, transparency on white, in RGB."""
    if max(image.size) > 50 * min(image.size):
        raise ValueError(f"{image.width} x {image.height} px, too narrow for a square crop")
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range no one knows")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's crop, the field's: halve with BOX while large, bicubic to the short side, the middle square."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def any_crop(image, size, scale, y, x):
    """The square that remains of a short side of scale * size, y and x in 0 .. 1 of the way down and right."""
    image.draft("RGB", (2 * size, 2 * size))                            # a JPEG far too large: decode a smaller one
    image = upright_rgb(image)
    side = min(image.size) / scale
    left, top = (image.width - side) * x, (image.height - side) * y
    return image.resize((size, size), Image.BICUBIC, box=(left, top, left + side, top + side))


# training images, held-out images and classes of the data sets that a plan can do without
KNOWN_SIZES = {"cifar10": (50_000, 10_000, 10), "cifar100": (50_000, 10_000, 100),
               "imagenet": (1_281_167, 50_000, 1000)}


class RandomImages:
    """In place of a data set that is not here: enough for a plan."""

    def __init__(self, size, classes, image_size):
        self.size, self.image_size = size, image_size
        self.class_names = [f"class {i}" for i in range(classes)]

    def __len__(self):
        return self.size

    def batch(self, indices, crops=None):
        """indices (B,) -> uint8 images (B, 3, S, S), labels (B,) long."""
        indices = torch.as_tensor(indices)
        shape = (len(indices), 3, self.image_size, self.image_size)
        images = torch.randint(256, shape, dtype=torch.uint8)
        return images, indices % len(self.class_names)


def is_here(args):
    """Whether --data-dir holds CIFAR or ImageNet. True of other data, which nobody downloads."""
    if args.data in CIFAR:
        return cifar_folder(args.data, args.data_dir) is not None
    if args.data == "imagenet":
        return any((Path(args.data_dir) / d).is_dir() for d in ("train", "Data/CLS-LOC/train"))
    return True


def open_data(args):
    """(train, val) data sets of --data; each has len(), class_names and batch(indices, crops) -> uint8 images, labels.

    Only image files are cropped: by default as ADM does, for training at random (see batches).
    """
    if getattr(args, "dry_run", False) and not is_here(args):
        train, val, classes = KNOWN_SIZES[args.data]
        print(f"no {args.data} in {args.data_dir}: the plan assumes its {train:,} training images of "
              f"{classes:,} classes, and its one step runs on random images")
        return tuple(RandomImages(size, classes, args.image_size) for size in (train, val))
    if args.data == "shapes":
        return tuple(Shapes(split, args.image_size) for split in ("train", "val"))
    if args.data in CIFAR:
        return tuple(Cifar(args.data, split, args.data_dir or "data", args.image_size) for split in ("train", "val"))
    root = Path(args.data_dir if args.data == "imagenet" else args.data)
    if args.data == "imagenet" and not is_here(args):
        raise UserError(f"{root} has no train folder: --data-dir names the one that holds ImageNet's "
                        f"train/<wnid>/*.JPEG and val/<wnid>/*.JPEG")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: --data takes {', '.join(DATA)} or a folder of images")
    return open_folder(root, args.image_size, args.workers)


@lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    generator = torch.Generator().manual_seed(wrap_int64(seed * 100_003 + epoch))
    return torch.randperm(n, generator=generator)


def batch_indices(n, batch_size, step, seed):
    """Which samples make the batch of a step: a pure function, so a resumed run goes on with the very next batch."""
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    return torch.cat([epoch_order(n, epoch, seed)[position[position // n == epoch] % n]
                      for epoch in (position // n).unique().tolist()])


def pick(n, most):
    """Indices, ascending, of at most `most` of n images: a fixed random choice, as an even one could skip classes."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:most].sort().values


def batches(data, args, start):
    """This rank's micro-batches from step `start` on: uint8 images (b, 3, S, S), flipped, files cropped, at random.

    A pure function of seed and step, for any number of ranks and micro-batches.
    """
    def make(number):
        step, micro = divmod(number, args.accumulate)
        rows = micro_rows(args, micro)
        stream = wrap_int64((2 * args.seed + 1) * 2 ** 50 + step * args.batch_size)
        u = uniforms(stream + torch.arange(args.batch_size)[rows], 4)
        crops = torch.stack([1 + u[:, 1] / 8, u[:, 2], u[:, 3]], 1)     # short side 1 .. 1.125 times the image side
        images, _ = data.batch(batch_indices(len(data), args.batch_size, step, args.seed)[rows], crops)
        # not in place: a data set may return a view of its own images
        images = torch.where((u[:, 0] < 0.5)[:, None, None, None], images.flip(-1), images)
        return images.pin_memory() if args.device.startswith("cuda") else images
    return ahead(make, count(start * args.accumulate))


def ahead(function, items):
    """The function's results for each item in turn, computed by a thread that stays two ahead of the caller.

    NOTE it computes on one core: a second team of OpenMP threads takes the cores from the model (40 % of a step).
    """
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 3:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def to_float(images):
    """uint8 0 .. 255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """[-1, 1] -> uint8 by rounding: truncation, as ADM has it, would lose a level."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------------
# perceptual and adversarial losses

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
        """Features after relu1_2, 2_2, 3_3, 4_3 and 5_3."""
        x = ((x - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        for layer in self.features:
            if isinstance(layer, torch.nn.MaxPool2d):
                yield x
            x = layer(x)
        yield x

    def forward(self, a, b):
        return sum(((unit(x) - unit(y)).square() * w.view(-1, 1, 1)).sum(1).mean((1, 2))
                   for x, y, w in zip(self.taps(a), self.taps(b), self.lin))


def unit(x):
    """Features (B, C, H, W), of unit length along the channels."""
    x = x.float()   # NOTE the 1e-20 keeps the root's gradient finite where all channels are 0
    return x / ((x.square().sum(1, keepdim=True) + 1e-20).sqrt() + 1e-10)


class Classifier(torch.nn.Module):
    """Small residual network for small images: uint8 (B, 3, S, S) -> features (B, C), None, logits (B, classes).

    Trained on the spot, so with no download. evaluate.py measures with one (JUDGE), and another one may stand in for
    VGG16 in the perceptual loss (PERCEPTUAL): a loss must not be its own judge.
    """

    def __init__(self, num_classes, image_size, widths):
        super().__init__()
        self.image_size = image_size

        def conv(channels_in, channels, stride=1):
            return torch.nn.Sequential(torch.nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
                                       torch.nn.BatchNorm2d(channels), torch.nn.ReLU(inplace=True))

        self.stem = conv(3, widths[0])
        self.down = torch.nn.ModuleList(conv(a, b, stride=2) for a, b in zip(widths, widths[1:]))
        self.residual = torch.nn.ModuleList(conv(b, b) for b in widths[1:])
        self.head = torch.nn.Linear(widths[-1], num_classes)

    def taps(self, x):
        """Features (B, C, S/2^i, S/2^i) of images in [-1, 1] at each scale."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        yield x
        for down, residual in zip(self.down, self.residual):
            x = down(x)
            x = x + residual(x)
            yield x

    def forward(self, images):
        H, W, S = *images.shape[-2:], self.image_size
        if (H, W) != (S, S):
            raise UserError(f"images are {W} x {H}, the classifier reads {S} x {S}: resize them, "
                            f"or --features inception")
        *_, x = self.taps(to_float(images))
        features = x.mean((2, 3))
        return features, None, self.head(features)


class ClassifierDistance(torch.nn.Module):
    """LPIPS's distance, without its learned weights, of a classifier's features: images as LPIPS's -> (B,)."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, a, b):
        return sum((unit(x) - unit(y)).square().sum(1).mean((1, 2))
                   for x, y in zip(self.classifier.taps(a), self.classifier.taps(b)))


JUDGE = dict(widths=(32, 48, 96, 192), seed=0)
PERCEPTUAL = dict(widths=(32, 64, 128, 128), seed=1)       # other weights, of another size


def augment(images):
    """Random mirror images and shifts of up to an eighth, for a batch (B, 3, S, S)."""
    B, _, S, _ = images.shape
    pad = S // 8
    images = torch.where(torch.rand(B, 1, 1, 1) < 0.5, images.flip(-1), images)
    images = F.pad(images.float(), (pad,) * 4, mode="reflect")
    rows, columns = (torch.randint(2 * pad + 1, (B, 1)) + torch.arange(S) for _ in range(2))
    return images[torch.arange(B)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def train_classifier(train, val, image_size, widths, seed, device, steps=3000, batch_size=128):
    """(classifier, accuracy on held-out images), trained from scratch: minutes on a CPU."""
    torch.manual_seed(seed)
    model = Classifier(len(train.class_names), image_size, widths).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="training the classifier", disable=None):
        seed_step(seed, step)
        images, labels = train.batch(batch_indices(len(train), batch_size, step, seed))
        _, _, logits = model(augment(images).to(device))
        F.cross_entropy(logits, labels.to(device), label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    hits = []
    with torch.no_grad():
        for chunk in torch.arange(min(len(val), 10_000)).split(500):
            images, labels = val.batch(chunk)
            hits.append(model(images.to(device))[2].argmax(-1).cpu() == labels)
    return model, torch.cat(hits).double().mean().item()


def load_classifier(path, kind, train, val, args):
    """The classifier of a file, of kind JUDGE or PERCEPTUAL; trained and kept there when absent."""
    path = Path(path)
    if not path.exists():
        print(f"training a classifier of {args.data} for {path}, minutes on a CPU")
        model, accuracy = train_classifier(train, val, args.image_size, device=args.device, **kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, "classifier", data=args.data, image_size=args.image_size, classes=train.class_names,
                        **kind, accuracy=accuracy, model=model.state_dict())
    saved = read_checkpoint(path, "classifier")
    mine = dict(data=args.data, image_size=args.image_size, classes=train.class_names, **kind)
    for k, v in mine.items():
        if saved.get(k) != v:
            raise UserError(f"{path} is of {k} {saved.get(k)}, this run needs {v}: delete it, or name another file")
    model = Classifier(len(train.class_names), args.image_size, kind["widths"])
    load_weights(model, saved["model"], path)
    if args.rank == 0:
        print(f"{path}: test accuracy {saved['accuracy']:.1%}")
    return model.to(args.device, memory_format=torch.channels_last).eval().requires_grad_(False)


class Discriminator(torch.nn.Module):
    """PatchGAN (Isola et al. 2017): images in [-1, 1] (B, 3, H, W) -> logits of patches (B, 1, H/8, W/8), real above 0.

    GroupNorm instead of BatchNorm, so that an image's logits do not depend on its batch. logit_means are the moving
    means that LeCAM needs.
    """

    def __init__(self, width=64):
        super().__init__()
        conv, w = torch.nn.Conv2d, width
        layers = [conv(3, w, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
        for a, b, stride in ((w, 2 * w, 2), (2 * w, 4 * w, 2), (4 * w, 8 * w, 1)):
            layers += [conv(a, b, stride + 2, stride, 1), torch.nn.GroupNorm(32, b), torch.nn.LeakyReLU(0.2)]
        self.layers = torch.nn.Sequential(*layers, conv(8 * w, 1, 3, 1, 1))
        for m in self.modules():
            if isinstance(m, conv):
                torch.nn.init.normal_(m.weight, std=0.02)
        self.register_buffer("logit_means", torch.zeros(2))             # of real images, of generated ones

    def forward(self, x):
        return self.layers(x.contiguous(memory_format=torch.channels_last)).float()


def hinge_loss(real, fake):
    """The discriminator's loss on its logits: real ones are pushed above 1, generated ones below -1."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def lecam_loss(real, fake, real_mean, fake_mean):
    """LeCAM (Tseng et al. 2021): real logits stay near the moving mean of generated ones, and the other way round."""
    return F.relu(real - fake_mean).square().mean() + F.relu(real_mean - fake).square().mean()


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
        if out_of_memory(e):
            raise
        raise UserError(f"{vgg} and {linear} are not VGG16's and LPIPS' weights ({str(e).splitlines()[0][:80]}): "
                        f"get {VGG_URL} and {LPIPS_URL}") from None
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------------
# run helpers, shared with train_gpt.py and sample.py

def base_parser(doc, argv):
    """(parser with the flags of every script, preset that --data or --preset names)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument_group("data and run").add_argument
    add("--data", default="shapes", help=", ".join(DATA) + ", or a folder of images")
    add("--data-dir", default="data", help="where CIFAR lies, or is downloaded to; ImageNet's folder of train and val")
    add("--preset", choices=PRESETS, help="sizes and schedule; --data chooses one (a folder: cifar)")
    add("--out", help="folder of the run's files (default: out/<data>)")
    add("--seed", type=int, default=0, help="of weights, batches and samples")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--data", default="shapes")
    peek.add_argument("--preset")
    return parser, preset_of(peek.parse_known_args(argv)[0])


def preset_of(args):
    """The preset that --preset names, or --data."""
    return PRESETS.get(args.preset or args.data, PRESETS["cifar"])


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and every flag's default; where it is None, the flag's own text tells it."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def add_training_flags(parser, p):
    """Flags that both training scripts take; p is the preset's part that gives the defaults."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=int, default=p["steps"], help="optimizer steps")
    add("--batch-size", type=int, default=p["batch_size"], help="images in a step, over all GPUs")
    add("--micro-batch", type=int, help="images in one forward pass of a GPU: smaller needs less memory (default: its "
        "share of the batch)")
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
    add("--keep", type=int, default=0, help="of the last checkpoints so many stay under their step's name, too")
    add("--resume", action="store_true", help="go on from the checkpoint in --out. Flags that are not given "
        "are those of the saved run")
    add("--overwrite", action="store_true", help="replace the checkpoint in --out")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads of a process that decode image files")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of matrix products; auto: the faster")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model")
    add("--grad-checkpoint", action=argparse.BooleanOptionalAction, default=False,
        help="keep the inputs of each block only and compute the rest anew: less memory, a third more time")
    add = parser.add_argument_group("plan").add_argument
    add("--dry-run", action="store_true", help="print the plan, do one step of one micro-batch, write nothing")
    add("--gpus", type=int, default=8, help="of the plan")
    add("--tflops", type=float, default=150, help="of the plan: what each GPU reaches in bfloat16, an assumption")


def finish_args(parser, args):
    """Fill in what follows from other flags."""
    for flag in ("steps", "batch_size", "micro_batch", "log_every", "eval_every", "save_every", "gpus"):
        value = getattr(args, flag, None)
        if value is not None and value < 1:
            parser.error(f"--{flag.replace('_', '-')} is {value}: it must be at least 1")
    if (getattr(args, "keep", None) or 0) < 0:
        parser.error(f"--keep is {args.keep}: it must be at least 0")
    if args.device.startswith("cuda") and "LOCAL_RANK" in os.environ:       # torchrun: each process has its own GPU
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as e:
        parser.error(f"--device {args.device}: {str(e).splitlines()[0]}")
    args.out = run_folder(args)
    return args


def run_folder(args):
    """--out, or the folder in out/ that --data names."""
    name = args.data if args.data in DATA else Path(args.data).resolve().name
    return Path(args.out or Path("out") / name)


def parse_run_flags(parser, argv, kind):
    """The flags of a training script. With --resume the saved run's flags are the defaults.

    A flag that is given wins, and the change is printed.
    """
    args = parser.parse_args(argv)
    path = run_folder(args) / f"{kind}.pt"
    if not args.resume or not path.exists():
        return args
    try:
        saved = read_checkpoint(path, kind, mmap=True).get("args", {})
    except (UserError, FailedRun) as e:
        parser.error(str(e))
    # a whole share of the batch in one pass was the default, which may be another share now
    if saved.get("micro_batch") == saved.get("batch_size", 0) // saved.get("ranks", 1):
        saved["micro_batch"] = None
    own = ("resume", "overwrite", "dry_run", "out", "device")
    known = {action.dest for action in parser._actions if action.dest not in own}
    saved = {k: list(v) if type(v) is tuple else v for k, v in saved.items() if k in known}
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for k, v in saved.items():
        if getattr(args, k) != v and os.environ.get("RANK", "0") == "0":
            print(f"resume: --{k.replace('_', '-')} is {getattr(args, k)} now, it was {v}")
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
    code = 0
    try:
        main(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    except (RuntimeError, MemoryError) as e:
        line = str(e).split("\n")[0]
        if out_of_memory(e):
            flag = next(f for f in ("micro_batch", "batch_size") if hasattr(args, f))
            line = f"out of memory with --{flag.replace('_', '-')} {getattr(args, flag)}: take a smaller one ({line})"
        elif not isinstance(e, FailedRun):
            raise
        print(f"failed: {line}", file=sys.stderr)
        code = 1
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)      # gloo's threads outlive the group, and may abort Python's own exit (1 of 36 runs)
    if code:
        sys.exit(code)


def share_work(args):
    """Join the other processes of torchrun: sets args.rank and args.ranks (0 and 1 without it). Rank 0 alone prints."""
    args.rank, args.ranks = 0, 1
    if "RANK" in os.environ:
        cuda = args.device.startswith("cuda")
        if cuda:
            torch.cuda.set_device(args.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        args.rank, args.ranks = dist.get_rank(), dist.get_world_size()
        if args.rank:
            sys.stdout = open(os.devnull, "w")


def share_batch(args):
    """A step's batch is shared by ranks, a rank's share done in args.accumulate passes of args.micro_batch images."""
    share, rest = divmod(args.batch_size, args.ranks)
    if rest:
        raise UserError(f"--batch-size {args.batch_size} is no multiple of the {args.ranks} processes: make it one")
    args.micro_batch = min(args.micro_batch or share, share)
    if share % args.micro_batch:
        raise UserError(f"each of {args.ranks} process(es) has {share} images of --batch-size {args.batch_size}, no "
                        f"multiple of --micro-batch {args.micro_batch}: change one")
    args.accumulate = 1 if args.dry_run else share // args.micro_batch
    print(f"batch of {args.batch_size} images = {args.ranks} process(es) x {args.accumulate} pass(es) of "
          f"{args.micro_batch}")


def micro_rows(args, micro):
    """The rows of a step's batch that are this rank's micro-batch: in their order ranks and passes give the batch."""
    first = (args.rank * args.accumulate + micro) * args.micro_batch
    return slice(first, first + args.micro_batch)


def wrap(model, args):
    """The model as a step calls it: compiled if asked, its gradients averaged over the ranks."""
    model = torch.compile(model) if args.compile else model
    # buffers need no broadcast: every rank computes the same ones
    return DistributedDataParallel(model, forward_sync_buffers=False) if args.ranks > 1 else model


def syncing(model, args, micro):
    """Context of a pass: the last one of a step averages the gradients over the ranks, those before only add."""
    return model.no_sync() if args.ranks > 1 and micro < args.accumulate - 1 else nullcontext()


def all_sum(x, device):
    """Replace a tensor by its sum over all ranks."""
    if dist.is_initialized():
        total = x.to(device)
        dist.all_reduce(total)
        x.copy_(total)


def any_rank(flag):
    """Whether a flag is set on any rank; all must ask together. Over gloo, so it never waits for a GPU."""
    x = torch.tensor(float(bool(flag)))
    all_sum(x, "cpu")
    return x.item() > 0


def barrier():
    """Wait for all ranks: gloo does so for half an hour, NCCL would for ten minutes."""
    any_rank(False)


def first_rank_first(load, args):
    """load() on the first rank, then on the others, who find what it downloads or trains."""
    if args.rank:
        barrier()
    result = load()
    if args.rank == 0:
        barrier()
    return result


def gather(x):
    """The rows of all ranks' CPU tensors, however many each has, in the order of the ranks."""
    if not dist.is_initialized():
        return x
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return torch.cat(parts)


def gather_equal(x):
    """The rows of all ranks' tensors, as many on each, in the order of the ranks; stays on the device."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def new_run(path, args):
    """Make the run's folder; refuse to overwrite a checkpoint unasked, or to resume from none."""
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other: choose one")
    if args.resume and not path.exists():
        raise UserError(f"{path} does not exist, so there is nothing to resume: leave --resume out, or correct --out")
    if args.dry_run:
        return
    if path.exists() and not (args.resume or args.overwrite):
        raise UserError(f"{path} exists: --resume goes on from it, --overwrite replaces it, --out takes another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder {path.parent} ({e.strerror}): choose another --out") from None


def matmul_speed(device, dtype, budget=0.3):
    """Floating point operations per second of a square matrix product, the best of sides 64 .. 8192.

    The side doubles as long as the next measurement is predicted to end within the budget, in seconds.
    NOTE: a CPU without bfloat16 instructions needs 7 s for a bfloat16 product of side 1024.
    """
    def timed(a):
        start = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    # not counted: the first product loads libraries
    timed(torch.randn(64, 64, device=device, dtype=dtype))
    start, speed, n = time.perf_counter(), 0.0, 64
    while n <= 8192:
        tick = time.perf_counter()
        a = torch.randn(n, n, device=device, dtype=dtype)
        speed = max(speed, 2 * n ** 3 / min(timed(a) for _ in range(4)))
        now = time.perf_counter()
        # a side twice as long takes eight times as long
        if now - start + 8 * (now - tick) > budget:
            break
        n *= 2
    return speed


def choose_dtype(args):
    """Settle args.dtype, of the matrix products; returns the FLOP/s of one in it. Prints why. Rank 0 decides."""
    candidates = [torch.float32, torch.bfloat16]
    if args.dtype != "auto":
        candidates = [getattr(torch, args.dtype)]
    speed = {d: matmul_speed(args.device, d) for d in candidates}
    if args.ranks > 1:
        message = [speed]
        dist.broadcast_object_list(message)
        speed = message[0]
    if args.dtype == "auto":
        ratio = speed[torch.bfloat16] / speed[torch.float32]
        dtype = torch.bfloat16 if ratio > 1.3 else torch.float32
        reason = f"a bfloat16 matrix product is {ratio:.1f} x as fast as float32 here"
    else:
        dtype, reason = getattr(torch, args.dtype), "--dtype, or that of the run resumed"
    args.dtype = str(dtype).removeprefix("torch.")
    print(f"dtype {args.dtype} ({reason}), {speed[dtype] / 1e9:.0f} GFLOP/s in a matrix product = mfu 100%")
    return speed[dtype]


def autocast(args):
    """Context in which matrix products run in args.dtype."""
    dtype = getattr(torch, args.dtype)
    return torch.autocast(torch.device(args.device).type, dtype, enabled=dtype != torch.float32)


def make_optimizer(model, args):
    """AdamW of all that is not frozen; matrices alone decay: no biases, norms, embeddings, positions, codebook."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if (id(p) in matrices) == decays],
                   weight_decay=args.weight_decay if decays else 0.0) for decays in (True, False)]
    assert sum(len(g["params"]) for g in groups) == len(trained)
    adamw = dict(lr=args.lr, betas=tuple(args.betas), fused=True)
    if getattr(args, "zero", False) and args.ranks > 1:                 # each rank keeps the moments of a share
        from torch.distributed.optim import ZeroRedundancyOptimizer     # slow to import, and few need it
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **adamw)
    return torch.optim.AdamW(groups, **adamw)


def optimizer_step(model, optimizer, lr, args):
    """Clip, step, forget the gradients; returns the gradient's norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def recompute_blocks(model):
    """Gradient checkpointing: of each block keep the inputs, and compute the rest anew in backward."""
    for m in model.modules():
        if isinstance(m, Block):
            m.forward = partial(checkpoint, m.forward, use_reentrant=False, preserve_rng_state=False)


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


def restore(path, kind, parts, args):
    """Load a run's checkpoint into its parts {name: model or optimizer}; returns the checkpoint.

    Optimizers keep the betas and the weight decay of this run: a flag may have changed them.
    """
    checkpoint = read_checkpoint(path, kind)
    need(path, checkpoint, "config", "model", "ema", "optimizer", "step")
    saved = asdict(read_config(type(parts["model"].config), checkpoint["config"], path))
    for k, v in asdict(parts["model"].config).items():
        if saved[k] != v:
            raise UserError(f"{path} has {k} {saved[k]}, this run {v}: resume with the same sizes, or take "
                            f"another --out")
    if checkpoint["step"] >= args.steps:
        raise UserError(f"{path} has done {checkpoint['step']} steps, --steps is {args.steps}: ask for more to go on")
    for name, part in parts.items():
        if name in checkpoint:                                          # a discriminator may be new
            if isinstance(part, torch.nn.Module):
                load_weights(part, checkpoint[name], path)
                continue
            groups = [(g["betas"], g["weight_decay"]) for g in part.param_groups]
            try:
                part.load_state_dict(checkpoint[name])
                for group, (betas, decay) in zip(part.param_groups, groups):
                    group.update(betas=betas, weight_decay=decay)
            except ValueError:
                raise UserError(f"{path}: its {name} trained other parameters than this run's: resume with the flags "
                                f"of its start") from None
    return checkpoint


def save_run(path, kind, parts, step, args, **more):
    """Rank 0 writes the checkpoint of a run, all call this; --keep K leaves the last K under their step's name, too."""
    for part in parts.values():
        if hasattr(part, "consolidate_state_dict"):                         # ZeRO: rank 0 collects the shares of all
            part.consolidate_state_dict()
    if args.rank:
        return
    save_checkpoint(path, kind, config=asdict(parts["model"].config), args=plain(args), step=step,
                    **{name: part.state_dict() for name, part in parts.items()}, **more)
    if args.keep:
        named = path.with_stem(f"{path.stem}-{step:07d}")
        named.unlink(missing_ok=True)
        try:
            # the same file under a second name: it takes no room until the first is replaced
            os.link(path, named)
        except OSError:
            # exFAT and some network drives have no hard links
            shutil.copy2(path, named)
        for old in sorted(path.parent.glob(f"{path.stem}-{'[0-9]' * 7}.pt"))[:-args.keep]:
            old.unlink()


def seed_step(seed, step):
    """All random draws of a step follow from (seed, step): nothing to restore on resume."""
    torch.manual_seed((seed * 1_000_003 + step) % 2 ** 32)                  # the CPU generator reads 32 bits


def versions():
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)


class Log:
    """Log lines on the screen, the same fields as JSON lines in a file; the first record says what ran, and where."""

    def __init__(self, path, args, model):
        self.file = open(os.devnull if args.rank or args.dry_run else path, "a" if args.resume else "w", buffering=1)
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
    """Means over passes and ranks, and speed, since the last log line; flops are those of one image."""

    def __init__(self, args, flops, peak):
        self.args, self.flops, self.peak = args, flops, peak
        self.reset()

    def reset(self):
        self.sums, self.steps, self.data_time, self.start, self.codes = {}, 0, 0.0, time.perf_counter(), []

    def add(self, **values):
        for k, v in values.items():
            total, n = self.sums.get(k, (0, 0))
            self.sums[k] = total + v.detach(), n + 1

    def line(self, step, lr):
        """The record of a log line; prints it. All ranks call this. Raises FailedRun when a term is not a number."""
        args = self.args
        means = torch.stack([total / n for total, n in self.sums.values()]).double()
        all_sum(means, args.device)
        terms = dict(zip(self.sums, (means / args.ranks).tolist()))
        for name, value in terms.items():
            if not math.isfinite(value):
                raise FailedRun(f"{name} is {value} by step {step}: the last checkpoint is kept; lower --lr "
                                f"(now {args.lr}) or --clip (now {args.clip}) and --resume")
        seconds = (time.perf_counter() - self.start) / self.steps
        if self.codes:                                                      # codes chosen since the last line
            terms["used"] = len(torch.cat(self.codes).unique()) / args.codebook_size
        speed = args.ranks * args.accumulate * args.micro_batch / seconds
        cuda = args.device.startswith("cuda")
        memory = torch.cuda.max_memory_allocated(args.device) if cuda else peak_memory()
        record = dict(step=step, **terms, lr=lr, ms=seconds * 1e3, images_per_second=speed,
                      mfu=speed * self.flops / (self.peak * args.ranks), data=self.data_time / self.steps / seconds,
                      memory_gb=memory / 1e9, eta_hours=(args.steps - step) * args.batch_size / speed / 3600)
        print(f"step {step:06d}/{args.steps:06d}", *(f"{k} {v:.4f}" for k, v in terms.items()), f"lr {lr:.2e}",
              f"{seconds * 1e3:.0f} ms", f"{speed:.3g} img/s", f"mfu {record['mfu']:.0%}", f"data {record['data']:.1%}",
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
# the plan of --dry-run

def without_memory(device):
    """Context in which tensors have shapes and dtypes only: any size of model can be planned anywhere."""
    stack = ExitStack()
    # real matrices cannot be used inside, nor those without memory outside
    dct_matrix.cache_clear()
    stack.callback(dct_matrix.cache_clear)
    stack.enter_context(FakeTensorMode())
    stack.enter_context(torch.device(device))
    return stack


def cost(compute, model):
    """(floating point operations of matrix products and convolutions, bytes kept for backward) of compute(), a loss.

    Forward and backward are run, the gradients left behind.
    """
    weights, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def note(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x
    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(note, lambda x: x):
            loss = compute()
        loss.backward()
    return counter.get_total_flops(), sum(size for storage, size in kept.items() if storage not in weights)


def cost_of_image(compute, model):
    """(flops, bytes kept) of an image, and the bytes kept whatever the images, as weights cast to bfloat16 are.

    compute(B) is the loss of B images.
    """
    (flops, one), (_, two) = (cost(lambda: compute(B), model) for B in (1, 2))
    return flops, two - one, 2 * one - two


def print_plan(args, model, flops, kept, fixed, images):
    """The plan of a run on args.gpus GPUs, for costs from cost_of_image and a data set of so many images."""
    parts, gb = {}, lambda x: f"{x / 1e9:.3g} GB"
    for name, p in model.named_parameters():
        parts[name.split(".")[0]] = parts.get(name.split(".")[0], 0) + p.numel()
    total, trained = sum(parts.values()), sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = 4 * (2 * total + trained) + fixed                              # weights, their averages, gradients
    states += 8 * trained / (args.gpus if getattr(args, "zero", False) else 1)      # Adam's moments
    seen = args.steps * args.batch_size
    hours = flops * seen / (args.tflops * 1e12 * args.gpus) / 3600
    lines = dict(
        parameters=f"{total / 1e6:.1f} M: " + ", ".join(f"{k} {n / 1e6:.2f}" for k, n in parts.items()),
        tokens=f"{model.config.num_tokens} an image, of {model.config.codebook_size} codes",
        batch=f"{args.batch_size} images, {-(-args.batch_size // args.gpus)} on each of {args.gpus} GPUs",
        steps=f"{args.steps:,}, so {seen / 1e6:,.1f} M images: {seen / images:,.1f} times all {images:,}",
        compute=f"{flops / 1e9:.4g} GFLOP an image, {flops * seen:.2e} FLOP in all",
        memory=f"{gb(states)} a GPU for weights, averages, gradients and Adam; {gb(kept)} an image kept for backward "
               f"({args.dtype}), so {gb(kept * args.micro_batch)} in passes of {args.micro_batch}",
        time=f"{duration(hours)} on {args.gpus} GPUs if each reaches {args.tflops:g} TFLOP/s (--tflops, an assumption)")
    print("the plan", *(f"  {k:11s} {v}" for k, v in lines.items()), sep="\n", flush=True)


# ------------------------------------------------------------------------------------------------------------------
# pictures

def grid(rows, names=None, columns=None, scale=None):
    """Pillow image of rows of images: a list of uint8 (n, 3, S, S), names left of them, column titles above."""
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
    return picture


def save_grid(path, *what):
    """PNG of a grid."""
    grid(*what).save(f"{path}.tmp", format="PNG")
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


def effective_rank(x):
    """exp of the entropy of the singular values of rows (n, d) about their mean (Roy, Vetterli 2007): 1 .. d."""
    p = torch.linalg.svdvals((x - x.mean(0)).double())
    return torch.special.entr(p / p.sum().clamp(min=1e-30)).sum().exp().item()


@torch.no_grad()
def evaluate(model, data, args):
    """Held-out PSNR of each level against its sub-image and the image, and codebook use; writes recon.png."""
    model.eval()
    N, levels = model.config.num_tokens, spread_levels(model.config.num_tokens)
    levels = levels[-1:] if model.config.flat else levels
    results, all_codes, pictures = {i: [] for i in levels}, [], []
    for chunk in pick(len(data), args.eval_images).split(64):
        images = to_float(data.batch(chunk)[0].to(args.device))
        with autocast(args):
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
    shown = 12 if images.shape[-1] <= 64 else 6
    save_grid(args.out / "recon.png", [to_uint8(x[:shown]) for _, x in pictures], [name for name, _ in pictures])
    results = {i: torch.cat(r, 1).mean(1).tolist() for i, r in results.items()}
    codes = torch.cat(all_codes)
    used, perplexity, by_position = codebook_use(codes, model.config.codebook_size)
    return dict(psnr_sub_image={i: r[0] for i, r in results.items()}, psnr_image={i: r[1] for i, r in results.items()},
                used=used, perplexity=perplexity, perplexity_by_position=by_position,
                effective_rank=effective_rank(model.quantizer.vectors(codes.unique())))


def print_evaluation(e, edges, code_dim):
    """The evaluation as a small table."""
    print("  tokens  window  PSNR to sub-image  to image")
    for i in e["psnr_image"]:
        print(f"  {i:6d}  {edges[i - 1]:6d}  {e['psnr_sub_image'][i]:14.2f} dB  {e['psnr_image'][i]:5.2f} dB")
    print(f"  codebook: {e['used']:.1%} used, perplexity {e['perplexity']:.0f}, effective rank "
          f"{e['effective_rank']:.1f} of {code_dim}; perplexity by position: " +
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
    add("--finetune-decoder", metavar="FILE", help="train the decoder of this tokenizer.pt alone, at the full level: "
        "its codes, and any generator of them, stay as they are")
    add = parser.add_argument_group("losses, beside the squared error").add_argument
    add("--perceptual", type=float, default=p["perceptual"], help="weight of the perceptual loss, 0 = without")
    add("--perceptual-start", type=int, default=p["perceptual_start"], help="step at which the perceptual loss begins")
    add("--perceptual-net", metavar="NET", default=p["perceptual_net"], help="its features: vgg is LPIPS, downloaded; "
        "classifier one of the data, trained and kept as perceptual.pt in --out; else such a file")
    add("--gan", type=float, default=p["gan"], help="weight of the adversarial loss, full level only; 0 = without")
    add("--gan-start", type=int, default=p["gan_start"], help="step at which the adversarial loss begins")
    add("--lecam", type=float, default=p["lecam"], help="weight of LeCAM in the discriminator's loss")
    add("--vgg", help="file of torchvision's VGG16 (default: downloaded, 528 MB)")
    add("--lpips-weights", help="file of LPIPS' linear layers, v0.1 VGG (default: downloaded)")
    add_training_flags(parser, p)
    return finish_args(parser, parse_run_flags(parser, argv, "tokenizer"))


def draw_levels(B, N, full_only):
    """(B, G) levels to decode in a step: the full one and one random shorter one for each image.

    NOTE one random prefix alone would collapse the tail of the code (NesTok: 20 % of codes in use against 98 %).
    """
    full = torch.full((B, 1), N)
    return full if full_only or N == 1 else torch.cat([full, torch.randint(1, N, (B, 1))], 1)


def reconstruction_losses(recon, images, levels, edges, lpips=None):
    """Losses between each level's reconstruction and its sub-image (paper, Eq. 7), added over the levels.

    recon (B, G, 3, S, S), images (B, 3, S, S), levels (B, G) -> dict of the mean squared error and of LPIPS.
    """
    pairs = [(x, low_pass(images, edges[level - 1])) for x, level in zip(recon.unbind(1), levels.T)]
    losses = dict(rec=sum(F.mse_loss(x, y) for x, y in pairs))
    if lpips:
        losses["lpips"] = sum(lpips(x, y).mean() for x, y in pairs)
    return losses


def generator_pass(model, images, levels, edges, lpips, critic, args):
    """Forward and losses: ({term: loss}, full-level reconstructions, vectors and codes for the quantizer's update).

    critic: the discriminator, or None while it has no say.
    """
    with autocast(args):
        recon, vq_loss, z, codes = model(images, levels)
        terms = dict(reconstruction_losses(recon, images, levels, edges, lpips), vq=vq_loss)
        if critic:
            terms["gan"] = -critic(recon[:, 0]).mean()                      # full-level reconstructions only
    weights = dict(rec=1, vq=1, lpips=args.perceptual, gan=args.gan)
    return dict(loss=sum(weights[k] * v for k, v in terms.items()), **terms), recon[:, 0].detach(), z, codes


def critic_pass(critic, images, fakes, means, args):
    """Forward and losses of the discriminator: {term: loss}, mean logits (2,) of real and generated images."""
    with autocast(args):
        real, fake = critic(torch.cat([images, fakes])).chunk(2)
    terms = dict(critic=hinge_loss(real, fake), lecam=lecam_loss(real, fake, *means))
    return terms, torch.stack([real.mean(), fake.mean()]).detach()


def training_step(step, parts, wrapped, loader, lpips, meter, args):
    """A batch, its full level and one random level, the losses, the update; returns the learning rate.

    parts: the run's models and optimizers; wrapped: the models as a step calls them (see wrap).
    """
    model, critic = parts["model"], parts.get("critic") if step >= args.gan_start else None
    lpips = lpips if step >= args.perceptual_start else None
    seed_step(args.seed, step)
    levels = draw_levels(args.batch_size, args.num_tokens, args.flat or args.finetune_decoder)
    vectors, codes, logits = [], [], []
    for micro in range(args.accumulate):
        tick = time.perf_counter()
        images = to_float(next(loader).to(args.device, non_blocking=True))
        meter.data_time += time.perf_counter() - tick
        if critic:
            critic.requires_grad_(False)                                    # it judges, and learns nothing from it
        with syncing(wrapped["model"], args, micro):
            terms, recon, z, code = generator_pass(
                wrapped["model"], images, levels[micro_rows(args, micro)].to(args.device), model.edges, lpips, critic,
                args)
            (terms["loss"] / args.accumulate).backward()
        vectors.append(z), codes.append(code)
        if critic:
            critic.requires_grad_(True)
            with syncing(wrapped["critic"], args, micro):
                verdict, logit = critic_pass(wrapped["critic"], images, recon, critic.logit_means, args)
                ((verdict["critic"] + args.lecam * verdict["lecam"]) / args.accumulate).backward()
            terms |= verdict
            logits.append(logit)
        meter.add(**terms)

    lr = lr_at(step, args)
    meter.add(norm=optimizer_step(model, parts["optimizer"], lr, args))
    if critic:
        optimizer_step(critic, parts["critic_optimizer"], lr, args)
        logits = torch.stack(logits).mean(0)
        all_sum(logits, args.device)
        critic.logit_means.lerp_(logits / args.ranks, 0.001)
    codes = gather_equal(torch.cat(codes)).flatten()                        # of the whole batch, in its order
    if not args.finetune_decoder:
        model.quantizer.update(gather_equal(torch.cat(vectors)).flatten(0, 1), codes)
    update_ema(parts["ema"], model, args.ema, step)
    meter.codes.append(codes)
    meter.steps += 1
    return lr


def choose_config(args):
    """(config of the run, the tokenizer whose decoder it finetunes or None); args get the config's sizes."""
    source = None
    if args.finetune_decoder:
        if Path(args.finetune_decoder).resolve() == (args.out / "tokenizer.pt").resolve():
            raise UserError(f"--finetune-decoder {args.finetune_decoder} would replace itself: take another --out")
        source = load_tokenizer(args.finetune_decoder, args.device)
        vars(args).update(asdict(source.config))
    return TokenizerConfig(**{f.name: getattr(args, f.name) for f in fields(TokenizerConfig)}), source


def freeze_codes(model):
    """Leave the decoder alone to be trained."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.split(".")[0] in model.decoder_parts)


def build(config, source, args):
    """{name: model or optimizer}: all whose state a checkpoint holds. source: see choose_config."""
    torch.manual_seed(wrap_int64(args.seed))
    model = SpectralTokenizer(config).to(args.device)
    if source:
        model.load_state_dict(source.state_dict())
        freeze_codes(model)
    parts = dict(model=model, ema=copy.deepcopy(model).eval(), optimizer=make_optimizer(model, args))
    if args.gan:
        parts["critic"] = Discriminator().to(args.device, memory_format=torch.channels_last)
        parts["critic_optimizer"] = torch.optim.AdamW(parts["critic"].parameters(), args.lr, (0.5, 0.9),
                                                      weight_decay=0, fused=True)
    if args.grad_checkpoint:
        recompute_blocks(model)
    return parts


def plan_costs(config, args):
    """cost_of_image of model and losses; the discriminator's own step, 3 % more, is left out."""
    with without_memory(args.device):
        model, critic = SpectralTokenizer(config), Discriminator() if args.gan else None
        lpips = blank_perceptual(args) if args.perceptual else None
        if args.finetune_decoder:
            freeze_codes(model)
        if args.grad_checkpoint:
            recompute_blocks(model)

        def compute(B):
            images = torch.zeros(B, 3, config.image_size, config.image_size)
            levels = draw_levels(B, config.num_tokens, config.flat or args.finetune_decoder)
            return generator_pass(model, images, levels, model.edges, lpips, critic, args)[0]["loss"]
        return cost_of_image(compute, model)


def load_perceptual(train, val, args):
    """The perceptual distance, a function of two batches of images in [-1, 1]; None when no step asks for it."""
    if not args.perceptual:
        return None
    if args.perceptual_start >= args.steps:
        print(f"the run ends before step {args.perceptual_start}, at which the perceptual loss begins: it has none")
        return None
    if args.dry_run:
        return blank_perceptual(args).to(args.device)
    if args.perceptual_net == "vgg":
        return first_rank_first(lambda: load_lpips(args.vgg, args.lpips_weights, args.device), args)
    if len(train.class_names) == 1:
        print("one class teaches a classifier nothing: no perceptual loss (--perceptual-net vgg would be one)")
        return None
    path = args.out / "perceptual.pt" if args.perceptual_net == "classifier" else args.perceptual_net
    return ClassifierDistance(first_rank_first(lambda: load_classifier(path, PERCEPTUAL, train, val, args), args))


def blank_perceptual(args):
    """The perceptual distance without its weights: enough for a plan."""
    if args.perceptual_net == "vgg":
        model = LPIPS()
    else:
        model = ClassifierDistance(Classifier(2, args.image_size, PERCEPTUAL["widths"]))
    return model.eval().requires_grad_(False)


def main(args):
    share_work(args)
    share_batch(args)
    path = args.out / "tokenizer.pt"
    config, source = choose_config(args)
    new_run(path, args)
    train, val = first_rank_first(lambda: open_data(args), args)
    parts = build(config, source, args)
    model = parts["model"]
    start = restore(path, "tokenizer", parts, args)["step"] if args.resume else 0
    lpips = load_perceptual(train, val, args)
    peak = choose_dtype(args)
    log = Log(args.out / "log-tokenizer.jsonl", args, model)
    print(f"{len(train):,} training and {len(val):,} held-out images, {len(train.class_names)} classes")

    costs = plan_costs(config, args)
    if args.dry_run:
        print_plan(args, model, *costs, len(train))
    wrapped = {name: wrap(parts[name], args) for name in ("model", "critic") if name in parts}
    meter, interrupt, loader = Meter(args, costs[0], peak), Interrupt(), batches(train, args, start)

    for step in range(start, args.steps + 1):
        last = step == args.steps or any_rank(interrupt.asked)
        saves = step > start and (step % args.save_every == 0 or last)
        evaluates = step > start and (step % args.eval_every == 0 or step == args.steps)
        if args.dry_run and step > start:
            return meter.line(step, lr)
        if step > start and step % args.log_every == 0 or saves or evaluates:
            log.write(**meter.line(step, lr))
        if evaluates and args.rank == 0:
            evaluation = evaluate(parts["ema"], val, args)
            print_evaluation(evaluation, model.edges.tolist(), config.code_dim)
            log.write(step=step, **evaluation)
            meter.reset()
        if saves:
            save_run(path, "tokenizer", parts, step, args)
        if last:
            break
        lr = training_step(step, parts, wrapped, loader, lpips, meter, args)

    if interrupt.asked:
        raise FailedRun(f"{interrupt.asked} after step {step}: saved {path}, --resume goes on from there")
    print(f"saved {path}, {args.out / 'recon.png'}")


if __name__ == "__main__":
    run(main, parse_args())
