"""Measure images: FID, sFID, IS, precision and recall of samples; rFID, PSNR, SSIM and LPIPS of reconstructions.

  python evaluate.py compare samples.npz VIRTUAL_imagenet256_labeled.npz   # anybody's: folder, .npz, or statistics
  python evaluate.py stats /my/images reference.npz                        # reference statistics in ADM's layout
  python evaluate.py generation --data cifar10                             # samples of gpt.pt against training images
  python evaluate.py reconstruction --data cifar10 --levels 1,8,64         # held-out images through the tokenizer

Numbers are those of ADM's TensorFlow evaluator, the field's. Each command prints a table and appends it as a JSON line
to out/<data>/evaluations.jsonl. With `torchrun --nproc-per-node 8 -- evaluate.py ...` the ranks share the images.
"""
import argparse
import json
import math
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from sample import add_sampling_flags, balanced_labels, check_sampling_flags, draw, load_models, sampling
from spectralar import UNREADABLE, UserError, fingerprint, load_tokenizer, read_checkpoint, save_checkpoint
from train_tokenizer import (CIFAR, all_sum, base_parser, batch_indices, codebook_use, download, finish_args,
                             first_rank_first, gather, images_below, load_lpips, open_data, pick, psnr, run,
                             seed_step, share_work, to_float, to_uint8, versions, weights_folder)

# ------------------------------------------------------------------------------------------------------------------
# Inception-v3 as in the 2015 TensorFlow graph that FID is defined by

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class ConvBN(nn.Module):
    """Convolution, batch norm, ReLU. NOTE epsilon 1e-3: PyTorch's 1e-5 would move the features by 0.4 %."""

    def __init__(self, channels_in, channels, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


FORK = "fork"                  # in place of a kernel: 1x3 and 3x1 side by side


class Mixed(nn.Module):
    """One Inception block: chains of convolutions side by side, and a pooling branch; names are torchvision's.

    chains: {name: [(channels, kernel), ...]}; stride is that of each chain's last convolution, and of the pooling.
    """

    def __init__(self, channels_in, chains, stride=1, max_pool=False):
        super().__init__()
        self.stride, self.max_pool, self.names = stride, max_pool, {}
        for name, convs in chains.items():
            self.names[name], channels = [], channels_in
            for i, (out, kernel) in enumerate(convs, 1):
                single = name if len(convs) == 1 else f"{name}_{i}"
                parts = {single + "a": (1, 3), single + "b": (3, 1)} if kernel == FORK else {single: kernel}
                step = stride if i == len(convs) else 1
                for part, size in parts.items():
                    kh, kw = size if isinstance(size, tuple) else (size, size)
                    padding = 0 if step > 1 else (kh // 2, kw // 2)
                    self.add_module(part, ConvBN(channels, out, (kh, kw), step, padding))
                self.names[name].append(list(parts))
                channels = out * len(parts)

    def pool(self, x):
        """NOTE averages leave the padding out of the count, and Mixed_7c takes the maximum: TensorFlow's graph."""
        if self.max_pool:
            return F.max_pool2d(x, 3, self.stride, padding=0 if self.stride > 1 else 1)
        return F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)

    def forward(self, x):
        outputs = []
        for name, convs in self.names.items():
            y = [self.pool(x) if name == "branch_pool" else x]
            for parts in convs:                                                 # only the last may be a fork
                y = [getattr(self, part)(y[0]) for part in parts]
            outputs += y
        return torch.cat(outputs, 1)


def mixed_5(channels_in, pool):
    return Mixed(channels_in, dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                                   branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pool, 1)]))


def mixed_6(c):
    row, column = (1, 7), (7, 1)
    return Mixed(768, dict(branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, row), (192, column)],
                           branch7x7dbl=[(c, 1), (c, column), (c, row), (c, column), (192, row)],
                           branch_pool=[(192, 1)]))


def mixed_7(channels_in, max_pool):
    return Mixed(channels_in, dict(branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, FORK)],
                                   branch3x3dbl=[(448, 1), (384, 3), (384, FORK)], branch_pool=[(192, 1)]),
                 max_pool=max_pool)


class InceptionV3(nn.Module):
    """uint8 images (B, 3, H, W) -> pool3 (B, 2048), spatial (B, 2023), logits without bias (B, 1008)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3)
        self.Mixed_5b = mixed_5(192, 32)
        self.Mixed_5c = mixed_5(256, 64)
        self.Mixed_5d = mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, dict(branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
                                        branch_pool=[]), stride=2, max_pool=True)
        self.Mixed_6b = mixed_6(128)
        self.Mixed_6c = mixed_6(160)
        self.Mixed_6d = mixed_6(160)
        self.Mixed_6e = mixed_6(192)
        self.Mixed_7a = Mixed(768, dict(branch3x3=[(192, 1), (320, 3)],
                                        branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
                                        branch_pool=[]), stride=2, max_pool=True)
        self.Mixed_7b = mixed_7(1280, max_pool=False)
        self.Mixed_7c = mixed_7(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)
        self.eval()

    def train(self, mode=True):
        """Stays in eval mode: batch statistics would make a feature depend on its batch."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images):
        x = (tf1_resize(images, 299) - 128) / 128                               # (B, 3, 299, 299)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))       # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))       # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))       # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                       # (B, 2023), of branch1x1, in NHWC order
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))       # (B, 2048, 8, 8)
        pool3 = x.mean((2, 3))                                                  # (B, 2048)
        return pool3, spatial, pool3 @ self.fc.weight.T                         # NOTE the inception score has no bias


def tf1_resize(images, size):
    """TensorFlow 1's bilinear resize: images (B, 3, H, W) -> float32 (B, 3, size, size), in the same range.

    Output pixel i reads at i H / size: no half-pixel centres, no antialiasing. Another resize moves FID by up to 2.
    """
    def weights(n):                                                             # (size, n), two entries in a row
        position = torch.arange(size, device=images.device) * torch.tensor(n / size)        # float32, as TensorFlow's
        low = position.floor().long()
        share = (position - low)[:, None]
        eye = torch.eye(n, device=images.device)
        return (1 - share) * eye[low] + share * eye[(low + 1).clamp(max=n - 1)]
    H, W = images.shape[-2:]
    return weights(H) @ images.float() @ weights(W).T


def load_inception(path=None, device="cpu"):
    """InceptionV3 with the published weights: of a file, or downloaded once (95 MB) and checked."""
    model = InceptionV3()
    if path is None:
        path = download(INCEPTION_URL, weights_folder() / INCEPTION_URL.rsplit("/", 1)[1], INCEPTION_SHA256,
                        "name a copy by --inception")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing, unknown = model.load_state_dict(state, strict=False)
    except UNREADABLE as e:
        raise UserError(f"{path} is not a whole file of Inception weights ({str(e).strip().splitlines()[0][:80]}): "
                        f"get {INCEPTION_URL} with sha256 {INCEPTION_SHA256}") from None
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]     # older files have none
    if missing or unknown:
        raise UserError(f"{path} lacks {len(missing)} of Inception's weights and has {len(unknown)} unknown ones "
                        f"(first: {(missing + unknown)[0]}): get {INCEPTION_URL}")
    for m in model.modules():                                                   # batch norm becomes part of the weights
        if isinstance(m, ConvBN):
            m.conv, m.bn = fuse_conv_bn_eval(m.conv, m.bn), nn.Identity()
    return model.to(device, memory_format=torch.channels_last).requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------------
# distances between sets of features

class Moments:
    """Mean and unbiased covariance of rows of width d, streamed: sums of f and of f f^T, in float64."""

    def __init__(self, d):
        self.count, self.sum, self.outer = (torch.zeros(shape, dtype=torch.float64) for shape in ((), d, (d, d)))

    def add(self, f):
        f = f.double().cpu()
        self.count += len(f)
        self.sum += f.sum(0)
        self.outer.addmm_(f.T, f)

    def finish(self, device):
        """(mu (d,), sigma (d, d)) over all ranks."""
        for x in (self.count, self.sum, self.outer):
            all_sum(x, device)
        mu = self.sum / self.count
        return mu, self.outer.sub_(self.count * mu[:, None] * mu).div_(self.count - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) in float64 (FID, Heusel et al. 2017).

    The trace of sqrt(S1 S2) is the sum of the roots of the eigenvalues of R S2 R, with R = sqrt(S1): symmetric, so it
    needs no general matrix square root and has no imaginary part.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item()


def inception_score(logits, splits=1):
    """exp(mean KL(p(y|x) || p(y))) of logits (n, 1008) in `splits` consecutive parts: (mean, standard deviation).

    NOTE with more than one split the order matters: class-sorted samples score 62 where shuffled ones score 298.
    """
    p = torch.as_tensor(logits).double().log_softmax(-1)
    edges = [i * len(p) // splits for i in range(splits + 1)]
    scores = []
    for part in (p[a:b] for a, b in zip(edges, edges[1:])):
        marginal = part.logsumexp(0) - math.log(len(part))
        scores.append((part.exp() * (part - marginal)).sum(-1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features real (n, d), fake (m, d).

    Precision: share of fake inside any real ball, whose radius is the distance to the k-th neighbour other than itself.
    Recall: share of real inside any fake ball. NOTE float32; ADM's float16 distances raise both by about 0.002.
    """
    real, fake = (torch.as_tensor(x, dtype=torch.float32) for x in (real, fake))
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall need more than {k} images on each side, "
                        f"not {len(real)} and {len(fake)}")

    def share_inside(points, centres):
        norms = centres.norm(dim=1).square()

        def squared_distances(part):                                            # (512, len(centres))
            return torch.addmm(norms, part, centres.T, alpha=-2).add_(part.square().sum(1, keepdim=True))
        radii = torch.cat([squared_distances(part).topk(k + 1, largest=False).values[:, k]
                           for part in centres.split(512)])
        return torch.cat([(squared_distances(part) <= radii).any(1) for part in points.split(512)]).double().mean()
    return share_inside(fake, real).item(), share_inside(real, fake).item()


def ssim(a, b):
    """Structural similarity of uint8 images (B, 3, H, W) -> (B,) float64, as Wang et al. 2004.

    Gaussian window of 11 px, sigma 1.5, valid region, each channel alone, then their mean; on 0 .. 255, never on
    [-1, 1], as SSIM is not shift-invariant.
    """
    if min(a.shape[-2:]) < 11:
        raise UserError(f"SSIM's window is 11 px, the images are {a.shape[-1]} x {a.shape[-2]}: use larger ones")
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64, device=a.device) ** 2 / (2 * 1.5 ** 2))

    def blur(x):                                                                # a banded matrix on each side
        rows, columns = (torch.stack([F.pad(g / g.sum(), (i, n - 11 - i)) for i in range(n - 10)])
                         for n in x.shape[-2:])
        return rows @ x @ columns.T
    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return similarity.mean((1, 2, 3))


# ------------------------------------------------------------------------------------------------------------------
# a classifier of the data set itself, for images unlike ImageNet's. Its distance is FD-classifier, never FID

class Classifier(nn.Module):
    """Small residual network: uint8 images (B, 3, S, S) -> features (B, 192), None, logits (B, classes)."""

    def __init__(self, num_classes, image_size):
        super().__init__()
        self.image_size = image_size

        def conv(channels_in, channels, stride=1):
            return nn.Sequential(nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels),
                                 nn.ReLU(inplace=True))

        widths = (32, 48, 96, 192)
        self.stem = conv(3, widths[0])
        self.down = nn.ModuleList(conv(a, b, stride=2) for a, b in zip(widths, widths[1:]))
        self.residual = nn.ModuleList(conv(b, b) for b in widths[1:])
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images):
        H, W, S = *images.shape[-2:], self.image_size
        if (H, W) != (S, S):
            raise UserError(f"images are {W} x {H}, the classifier reads {S} x {S}: resize them, "
                            f"or --features inception")
        x = self.stem(to_float(images).contiguous(memory_format=torch.channels_last))       # (B, 32, S, S)
        for down, residual in zip(self.down, self.residual):
            x = down(x)
            x = x + residual(x)
        features = x.mean((2, 3))
        return features, None, self.head(features)


def augment(images):
    """Random mirror images and shifts of up to an eighth, for a batch (B, 3, S, S)."""
    B, _, S, _ = images.shape
    pad = S // 8
    images = torch.where(torch.rand(B, 1, 1, 1) < 0.5, images.flip(-1), images)
    images = F.pad(images.float(), (pad,) * 4, mode="reflect")
    rows, columns = (torch.randint(2 * pad + 1, (B, 1)) + torch.arange(S) for _ in range(2))
    return images[torch.arange(B)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def train_classifier(train, val, args, steps=3000, batch_size=128):
    """(classifier, accuracy on held-out images), trained from scratch: minutes on a CPU."""
    torch.manual_seed(args.seed)
    model = Classifier(len(train.class_names), args.image_size).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="training the classifier", disable=None):
        seed_step(args.seed, step)
        images, labels = train.batch(batch_indices(len(train), batch_size, step, args.seed))
        _, _, logits = model(augment(images).to(args.device))
        F.cross_entropy(logits, labels.to(args.device), label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    hits = []
    with torch.no_grad():
        for chunk in torch.arange(min(len(val), 10_000)).split(500):
            images, labels = val.batch(chunk)
            hits.append(model(images.to(args.device))[2].argmax(-1).cpu() == labels)
    return model, torch.cat(hits).double().mean().item()


def load_classifier(train, val, args):
    """The classifier of --data, from classifier.pt in the run's folder; trained and kept there when absent."""
    path = args.out / "classifier.pt"
    if not path.exists():
        print(f"training a classifier of {args.data} for {path}, minutes on a CPU")
        model, accuracy = train_classifier(train, val, args)
        args.out.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, "classifier", data=args.data, image_size=args.image_size, classes=train.class_names,
                        accuracy=accuracy, model=model.state_dict())
    saved = read_checkpoint(path, "classifier", args.device)
    mine = dict(data=args.data, image_size=args.image_size, classes=train.class_names)
    for k, v in mine.items():
        if saved[k] != v:
            raise UserError(f"{path} is of {k} {saved[k]}, this run of {v}: delete it, or take another --out")
    model = Classifier(len(train.class_names), args.image_size)
    model.load_state_dict(saved["model"])
    if args.rank == 0:
        print(f"{path}: test accuracy {saved['accuracy']:.1%}")
    return model.to(args.device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------------
# sets of images: (count, read) with read(start, stop) -> uint8 (B, 3, H, W)

def read_npz(path):
    """(count, read) of arr_0 (n, H, W, 3) uint8, read as needed: 50,000 images of 256 px are 9.8 GB."""
    file = zipfile.ZipFile(path).open("arr_0.npy")
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise UserError(f"{path}: arr_0 is {dtype} of shape {shape}, not uint8 (n, H, W, 3): convert it")
    offset, size = file.tell(), math.prod(shape[1:])

    def read(start, stop):
        file.seek(offset + start * size)
        return torch.frombuffer(bytearray(file.read((stop - start) * size)), dtype=torch.uint8).view(
            -1, *shape[1:]).permute(0, 3, 1, 2)
    return shape[0], read


def read_folder(path, workers):
    """(count, read) of all images below a folder, in sorted order; they must be of one size."""
    files = images_below(path)
    if not files:
        raise UserError(f"{path} has 0 images below it: name a folder of images, or an .npz")
    size = Image.open(files[0]).size

    def decode(file):
        try:
            with Image.open(file) as image:
                pixels = np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise UserError(f"cannot decode {file} ({e}): mend or remove it") from None
        if image.size != size:
            raise UserError(f"{file} is {image.width} x {image.height}, {files[0]} {size[0]} x {size[1]}: "
                            f"bring all to one size")
        return pixels
    pool = ThreadPoolExecutor(max(1, workers))
    return len(files), lambda start, stop: torch.from_numpy(
        np.stack(list(pool.map(decode, files[start:stop])))).permute(0, 3, 1, 2)


STATISTICS = "mu", "sigma", "mu_s", "sigma_s"      # of an .npz, as ADM names them


@dataclass
class Features:
    """What metrics need of a set of images: moments, and each image's features and logits."""
    count: int
    mu: torch.Tensor                   # (d,)
    sigma: torch.Tensor                # (d, d)
    mu_s: torch.Tensor = None          # of the spatial features, for sFID
    sigma_s: torch.Tensor = None
    pool: torch.Tensor = None          # (n, d)
    logits: torch.Tensor = None        # (n, classes)


def extract(name, count, read, network, args):
    """Features of a set of images; each rank takes a consecutive share."""
    if count < max(2, args.ranks):
        raise UserError(f"{name}: {count} image(s), at least {max(2, args.ranks)} are needed for a covariance and "
                        f"{args.ranks} process(es)")
    first, last = (count * r // args.ranks for r in (args.rank, args.rank + 1))
    moments = kept = None
    for start in tqdm(range(first, last, args.batch_size), desc=str(name), disable=None if args.rank == 0 else True):
        stop = min(start + args.batch_size, last)
        with torch.no_grad():
            pool, spatial, logits = network(read(start, stop).to(args.device))
        if start == first:
            moments = [Moments(f.shape[1]) for f in (pool, spatial) if f is not None]
            kept = [torch.empty(last - first, f.shape[1]) for f in (pool, logits)]
        for m, f in zip(moments, (pool, spatial)):
            m.add(f)
        for k, f in zip(kept, (pool, logits)):
            k[start - first:stop - first] = f
    statistics = [x for m in moments for x in m.finish(args.device)]            # and of spatial, with Inception
    return Features(count, *statistics, **{k: gather(x) for k, x in zip(("pool", "logits"), kept)})


def measure_path(path, network, args):
    """Features of a folder of images, an .npz of images, or statistics in an .npz (their images, if any, too)."""
    path = Path(path)
    if path.is_dir():
        features = extract(path, *read_folder(path, args.workers), network, args)
        shuffled = torch.randperm(features.count, generator=torch.Generator().manual_seed(0))   # folders are sorted
        features.logits = features.logits[shuffled]
        return features
    if not path.exists():
        raise UserError(f"{path} does not exist: name a folder of images, an .npz of images or of statistics")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file)
            statistics = {k: torch.from_numpy(file[k]).double() for k in STATISTICS if k in names}
        features = extract(path, *read_npz(path), network, args) if "arr_0" in names else None
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, AttributeError) as e:
        if isinstance(e, UserError):                                            # ours is a ValueError, too
            raise
        raise UserError(f"{path} is no whole .npz of images or statistics ({str(e).splitlines()[0][:80]})") from None
    if "mu" in statistics and "sigma" in statistics:
        features = features or Features(None, None, None)
        features = Features(**{**vars(features), "mu_s": None, "sigma_s": None, **statistics})
    elif features is None:
        raise UserError(f"{path} has neither arr_0 (images) nor mu and sigma (statistics), but {', '.join(names)}")
    return features


def distances(samples, reference, args):
    """{metric: value} of samples against a reference, in the features of args.features; the first rank works it out."""
    if args.rank:
        return {}
    inception = args.features == "inception"
    if samples.mu.shape != reference.mu.shape:
        raise UserError(f"features of width {len(samples.mu)} against a reference of width {len(reference.mu)}: "
                        f"make the reference with the same --features")
    for f in (samples, reference):
        if f.count and f.count < 2048:
            print(f"warning: {f.count} images give a covariance of low rank: fewer than 2048 bias the distance")
    result = {"FID" if inception else "FD-classifier": frechet_distance(samples.mu, samples.sigma, reference.mu,
                                                                        reference.sigma)}
    if samples.mu_s is not None and reference.mu_s is not None:
        result["sFID"] = frechet_distance(samples.mu_s, samples.sigma_s, reference.mu_s, reference.sigma_s)
    if inception and samples.logits is not None:
        result["IS splits"] = max(1, round(samples.count / 5000))               # of 5,000, as ADM's
        result["IS"], result["IS std"] = inception_score(samples.logits, result["IS splits"])
    if samples.pool is not None and reference.pool is not None:
        real = reference.pool[pick(len(reference.pool), 10_000)]
        result["precision"], result["recall"] = precision_recall(real, samples.pool)
    return result


# ------------------------------------------------------------------------------------------------------------------
# commands: each returns (rows of {column: value}, what the record adds)

def load_network(args):
    """InceptionV3, or the classifier of --data."""
    if args.features == "inception":
        return first_rank_first(lambda: load_inception(args.inception, args.device), args)
    return first_rank_first(lambda: load_classifier(*open_data(args), args), args)


def compare(args):
    a, b = args.paths
    network = load_network(args)
    samples, reference = measure_path(a, network, args), measure_path(b, network, args)
    return [dict(samples=a, reference=b, **distances(samples, reference, args))], dict(
        counts=[samples.count, reference.count])


def stats(args):
    source, target = args.paths
    if Path(target).exists() and not args.overwrite:
        raise UserError(f"{target} exists: --overwrite replaces it")
    if not Path(target).absolute().parent.is_dir():
        raise UserError(f"{Path(target).parent} is not a folder, so {target} cannot be written: make it first")
    features = measure_path(source, load_network(args), args)
    if features.count is None:
        raise UserError(f"{source} holds statistics already: name images")
    count, read = read_folder(Path(source), args.workers) if Path(source).is_dir() else read_npz(source)
    arrays = {k: v.numpy() for k, v in vars(features).items() if k in STATISTICS and v is not None}
    if args.rank == 0:
        images = torch.cat([read(i, i + 1) for i in pick(count, 10_000).tolist()]).permute(0, 2, 3, 1).numpy()
        with open(f"{target}.tmp", "wb") as file:
            np.savez(file, arr_0=images, **arrays)
        os.replace(f"{target}.tmp", target)
    return [dict(images=source, count=count, statistics=target)], {}


def generation(args):
    gpt, tokenizer, names = load_models(args)
    args.image_size, C = tokenizer.config.image_size, len(names)
    train, _ = open_data(args)
    network = load_network(args)
    labels = balanced_labels(args.num, range(C), args.seed)

    def read(start, stop):
        return draw(gpt, tokenizer, labels[start:stop], start, args)[:, 0]
    samples = extract("sampling", args.num, read, network, args)
    if args.reference:
        reference = measure_path(args.reference, network, args)
    else:
        chosen = pick(len(train), 50_000)
        reference = extract("training images", len(chosen), lambda a, b: train.batch(chosen[a:b])[0], network, args)
    row = distances(samples, reference, args)
    if args.features == "classifier":
        row["accuracy"] = (samples.logits.argmax(-1) == labels).double().mean().item()
    return [row], dict(checkpoint=fingerprint(gpt), counts=[samples.count, reference.count],
                       reference=args.reference or "training images", sampling=sampling(args))


def reconstruction(args):
    tokenizer = load_tokenizer(args.out / "tokenizer.pt", args.device)
    args.image_size, N = tokenizer.config.image_size, tokenizer.config.num_tokens
    _, val = open_data(args)
    network = load_network(args)
    lpips = None
    if args.lpips:
        lpips = first_rank_first(lambda: load_lpips(args.vgg, args.lpips_weights, args.device), args)
    chosen = pick(len(val), args.num)
    count = len(chosen)
    originals = extract("originals", count, lambda a, b: val.batch(chosen[a:b])[0], network, args)
    rows = []
    for level in args.levels or [N]:
        codes, labels, scores = [], [], []

        def reconstruct(start, stop):
            images, label = val.batch(chosen[start:stop])
            images = images.to(args.device)
            code = tokenizer.encode(to_float(images))
            result = to_uint8(tokenizer.decode(code, level))
            scores.append(torch.stack([psnr(result, images).double(), ssim(result, images)] + (
                [lpips(to_float(result), to_float(images)).double()] if lpips else [])).T.cpu())
            codes.append(code.cpu()), labels.append(label)
            return result
        features = extract(f"{level} tokens", count, reconstruct, network, args)
        distance = distances(Features(count, features.mu, features.sigma), originals, args)
        row = {"tokens": level, **{f"r{name}": value for name, value in distance.items()},
               **dict(zip(("PSNR", "SSIM", "LPIPS"), gather(torch.cat(scores)).mean(0).tolist()))}
        if args.features == "classifier":
            row["accuracy"] = (features.logits.argmax(-1) == gather(torch.cat(labels))).double().mean().item()
        rows.append(row)
    used, perplexity, _ = codebook_use(gather(torch.cat(codes)), tokenizer.config.codebook_size)
    return rows, dict(checkpoint=fingerprint(tokenizer), counts=[count, count], reference="held-out images",
                      codebook_used=used, codebook_perplexity=perplexity)


# ------------------------------------------------------------------------------------------------------------------
# the run

COMMANDS = dict(compare=compare, stats=stats, generation=generation, reconstruction=reconstruction)


def parse_args(argv=None):
    parser, preset = base_parser(__doc__, argv)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("paths", nargs="*", help="compare: SAMPLES REFERENCE; stats: IMAGES FILE.npz")
    add = parser.add_argument_group("measure").add_argument
    add("--features", choices=("inception", "classifier"),
        help="default: the classifier for generation and reconstruction of shapes and CIFAR, else inception")
    add("--inception", metavar="FILE", help="weights of Inception (default: downloaded once)")
    add("--reference", metavar="PATH", help="generation: what to compare with (default: up to 50,000 training images)")
    add("--num", type=int, help="images to sample (default: 50,000; classifier: 10,000) or reconstruct (all held out)")
    add("--levels", help="reconstruction: numbers of tokens, 1,2,4 (default: all tokens)")
    add("--lpips", action=argparse.BooleanOptionalAction, help="reconstruction: LPIPS too (default: with inception)")
    add("--vgg", metavar="FILE", help="VGG16 weights of LPIPS (default: downloaded once, 528 MB)")
    add("--lpips-weights", metavar="FILE", help="linear weights of LPIPS (default: downloaded once)")
    add("--batch-size", type=int, default=64, help="images at a time")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that decode images")
    add("--overwrite", action="store_true", help="stats: replace the file")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    anybodys = args.command in ("compare", "stats")                             # no run, and no data set, of ours
    if len(args.paths) != 2 * anybodys:
        parser.error(f"{args.command} takes {2 * anybodys} paths, not {len(args.paths)}")
    small = args.data in ("shapes", *CIFAR) and not anybodys
    args.features = args.features or ("classifier" if small else "inception")
    if anybodys and args.features == "inception":
        args.out = args.out or "out"
    args.image_size = preset["image_size"]
    finish_args(parser, args)
    check_sampling_flags(parser, args)
    args.lpips = args.features == "inception" if args.lpips is None else args.lpips
    if args.command == "generation":
        args.num = args.num or (50_000 if args.features == "inception" else 10_000)
    try:
        args.levels = [int(i) for i in args.levels.split(",")] if args.levels else None
    except ValueError:
        parser.error(f"--levels is {args.levels}: give numbers of tokens, as 1,2,4")
    return args


def main(args):
    share_work(args)
    start = time.perf_counter()
    rows, more = COMMANDS[args.command](args)
    if args.rank:
        return
    columns = list(rows[0])
    cells = [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    for line in [columns, *cells]:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    record = dict(command=" ".join(sys.argv), features=args.features, seed=args.seed, results=rows, **more,
                  versions=versions(), seconds=round(time.perf_counter() - start, 1))
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "evaluations.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    run(main, parse_args())
