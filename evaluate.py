"""Measure images: FID, sFID, IS, precision and recall of samples; rFID, PSNR, SSIM and LPIPS of reconstructions.

  python evaluate.py compare samples.npz VIRTUAL_imagenet256_labeled.npz   # anybody's: folder, .npz, or statistics
  python evaluate.py stats /my/images reference.npz                        # reference statistics in ADM's layout
  python evaluate.py generation --data cifar10                             # samples of gpt.pt against training images
  python evaluate.py reconstruction --data cifar10 --levels 1,8,64         # held-out images through the tokenizer
  python evaluate.py truncation --data cifar10                             # both, after 1, 2, 4 ... tokens
  python evaluate.py probe --data cifar10 --against out/cifar10-flat       # what a token owes to those before it

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
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from sample import add_sampling_flags, balanced_labels, check_sampling_flags, draw_codes, load_models, sampling
from spectralar import (UNREADABLE, UserError, dct2, fingerprint, load_generator, load_tokenizer, low_pass,
                        out_of_memory, wrap_int64)
from train_gpt import evaluate as measure_bits
from train_tokenizer import (CIFAR, JUDGE, all_sum, base_parser, codebook_use, download, effective_rank, finish_args,
                             first_rank_first, gather, images_below, load_classifier, load_lpips, open_data, pick,
                             psnr, run, save_grid, share_work, spread_levels, to_float, to_uint8, versions,
                             weights_folder)

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

    def forward(self, images):
        with torch.no_grad(), without_tf32():
            return self.features(images)

    def features(self, images):
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


@contextmanager
def without_tf32():
    """Context in which cuDNN computes convolutions in full float32.

    By default it rounds their inputs to the 10 bits of TF32.
    NOTE: torch.backends.cudnn.flags(allow_tf32=False) would switch cuDNN itself off, too.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


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
        if out_of_memory(e):
            raise
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

    def decode(file):
        try:
            with Image.open(file) as image:
                return np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise UserError(f"cannot decode {file} ({e}): mend or remove it") from None
    height, width, _ = decode(files[0]).shape

    def decode_alike(file):
        pixels = decode(file)
        if pixels.shape != (height, width, 3):
            raise UserError(f"{file} is {pixels.shape[1]} x {pixels.shape[0]}, {files[0]} {width} x "
                            f"{height}: bring all to one size")
        return pixels
    pool = ThreadPoolExecutor(max(1, workers))
    return len(files), lambda start, stop: torch.from_numpy(
        np.stack(list(pool.map(decode_alike, files[start:stop])))).permute(0, 3, 1, 2)


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


def own_share(count, args):
    """(first, last): this rank's consecutive share of so many images."""
    return count * args.rank // args.ranks, count * (args.rank + 1) // args.ranks


def extract(name, count, read, network, args):
    """Features of a set of images; each rank takes a consecutive share."""
    if count < max(2, args.ranks):
        raise UserError(f"{name}: {count} image(s), at least {max(2, args.ranks)} are needed for a covariance and "
                        f"{args.ranks} process(es)")
    first, last = own_share(count, args)
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

def load_data(args):
    """(train, val) of --data. The first rank downloads what is absent, the others wait for it."""
    return first_rank_first(lambda: open_data(args), args)


def load_network(args):
    """InceptionV3, or the classifier of --data."""
    if args.features == "inception":
        return first_rank_first(lambda: load_inception(args.inception, args.device), args)
    return first_rank_first(lambda: load_classifier(args.classifier or args.out / "classifier.pt", JUDGE,
                                                    *open_data(args), args), args)


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


def measure_samples(gpt, tokenizer, network, train, levels, args):
    """(rows, what the record adds) of samples decoded after so many tokens, against training images."""
    labels = balanced_labels(args.num_samples, range(len(train.class_names)), args.seed)
    if args.reference:
        reference = measure_path(args.reference, network, args)
    else:
        chosen = pick(len(train), 50_000)
        reference = extract("training images", len(chosen), lambda a, b: train.batch(chosen[a:b])[0], network, args)
    codes, rows = cache(lambda start, stop: draw_codes(gpt, labels[start:stop], start, args)), []
    for level in levels:
        samples = extract(f"sampling, {level} tokens", len(labels),
                          lambda a, b: to_uint8(tokenizer.decode(codes(a, b), level)), network, args)
        rows.append(distances(samples, reference, args))
        if args.features == "classifier":
            rows[-1]["accuracy"] = (samples.logits.argmax(-1) == labels).double().mean().item()
    return rows, dict(checkpoint=fingerprint(gpt), counts=[len(labels), reference.count],
                      reference=args.reference or "training images", sampling=sampling(args))


def generation(args):
    gpt, tokenizer, _ = load_models(args)
    args.image_size = tokenizer.config.image_size
    network = load_network(args)
    train, _ = load_data(args)
    return measure_samples(gpt, tokenizer, network, train, [args.tokens], args)


def octaves(S):
    """(S, S) long: the octave of each frequency, by window: 0, 1, 2-3, 4-7 ... are 0, 1, 2, 3 ..."""
    side = torch.arange(S)
    side = torch.maximum(side[:, None], side)
    return torch.where(side > 0, side.double().log2().floor().long() + 1, 0)


def band_energy(images):
    """Energy of images (B, 3, S, S) in each band of octaves, added over the images: (bands,) float64."""
    band = octaves(images.shape[-1]).flatten().to(images.device)
    energy = dct2(images.double()).square().sum((0, 1)).flatten()
    return energy.new_zeros(band.max() + 1).index_add_(0, band, energy).cpu()


def measure_reconstructions(tokenizer, network, val, levels, args):
    """(rows, what the record adds) of held-out images, reconstructed from so many tokens, against themselves.

    rows have under "bands" their energy in each octave of the spectrum against the originals', in dB.
    """
    lpips = None
    if args.lpips:
        lpips = first_rank_first(lambda: load_lpips(args.vgg, args.lpips_weights, args.device), args)
    chosen = pick(len(val), args.num)
    count, rows, codes, labels = len(chosen), [], {}, {}                        # codes and labels: by a batch's start
    originals = extract("originals", count, lambda a, b: val.batch(chosen[a:b])[0], network, args)
    for level in levels:
        scores, energy = [], []

        def reconstruct(start, stop):
            images, labels[start] = val.batch(chosen[start:stop])
            images = images.to(args.device)
            if start not in codes:
                codes[start] = tokenizer.encode(to_float(images))
            result = to_uint8(tokenizer.decode(codes[start], level))
            scores.append(torch.stack([psnr(result, images).double(), ssim(result, images)] + (
                [lpips(to_float(result), to_float(images)).double()] if lpips else [])).T.cpu())
            energy.append(torch.stack([band_energy(to_float(x)) for x in (result, images)]))
            return result
        features = extract(f"{level} tokens", count, reconstruct, network, args)
        distance = distances(Features(count, features.mu, features.sigma), originals, args)
        row = {"tokens": level, **{f"r{name}": value for name, value in distance.items()},
               **dict(zip(("PSNR", "SSIM", "LPIPS"), gather(torch.cat(scores)).mean(0).tolist()))}
        if args.features == "classifier":
            truth = gather(torch.cat([*labels.values()]))
            row["accuracy"] = (features.logits.argmax(-1) == truth).double().mean().item()
        energy = torch.stack(energy).sum(0)
        all_sum(energy, args.device)
        rows.append(row | dict(bands=(10 * (energy[0] / energy[1]).log10()).tolist()))
    codes = gather(torch.cat([*codes.values()]).cpu())
    used, perplexity, _ = codebook_use(codes, tokenizer.config.codebook_size)
    rank = effective_rank(tokenizer.quantizer.vectors(codes.unique().to(args.device)))
    return rows, dict(checkpoint=fingerprint(tokenizer), counts=[count, count], reference="held-out images",
                      codebook_used=used, codebook_perplexity=perplexity, codebook_effective_rank=rank)


def reconstruction(args):
    tokenizer = load_tokenizer(args.out / "tokenizer.pt", args.device)
    args.image_size = tokenizer.config.image_size
    levels = args.levels or [tokenizer.config.num_tokens]
    network = load_network(args)
    _, val = load_data(args)
    rows, more = measure_reconstructions(tokenizer, network, val, levels, args)
    return [{k: v for k, v in row.items() if k != "bands"} for row in rows], more


# ------------------------------------------------------------------------------------------------------------------
# the paper's studies: quality by the number of tokens, and what a token owes to those before it

def truncation(args):
    """Reconstructions, and samples where there is a gpt.pt, of the first k tokens; truncation.png and levels.png."""
    models = load_models(args) if (args.out / "gpt.pt").exists() else None      # first, see there for MKL
    tokenizer = load_tokenizer(args.out / "tokenizer.pt", args.device)
    args.image_size = tokenizer.config.image_size
    (train, val), network = load_data(args), load_network(args)
    levels = args.levels or spread_levels(tokenizer.config.num_tokens)
    reconstructions, more = measure_reconstructions(tokenizer, network, val, levels, args)
    samples = [{}] * len(levels)
    if models:
        # no level decodes a token after its own, so these are all that is sampled
        args.tokens = max(levels)
        gpt, its_tokenizer, _ = models
        samples, more["samples"] = measure_samples(gpt, its_tokenizer, network, train, levels, args)
    octave = [0] + [2 ** b for b in range(len(reconstructions[0]["bands"]) - 1)]        # lowest frequency of each band
    rows = []
    for k, reconstruction, sample in zip(levels, reconstructions, samples):
        window, bands = tokenizer.edges[k - 1].item(), reconstruction.pop("bands")
        rows.append(dict(tokens=k, window=window) | reconstruction | {f"g{name}": v for name, v in sample.items()}
                    | {f"band {low}": energy if low < window else None for low, energy in zip(octave, bands)})
    if args.rank == 0:
        def panel(title, lines):
            return dict(title=title, x="tokens", log=True, lines={
                name: [(row["tokens"], row[column]) for row in rows if row[column] is not None]
                for column, name in lines.items() if column in rows[0]})
        distance = "FD-classifier" if args.features == "classifier" else "FID"
        plot(args.out / "truncation.png", [
            panel("PSNR (dB)", {"PSNR": "reconstructions"}),
            panel(distance, {f"r{distance}": "reconstructions", f"g{distance}": "samples"}),
            panel("energy by frequency, against the data's (dB)", {
                f"band {low}": f"{low}-{2 * low - 1}" if low > 1 else f"{low}" for low in octave})])
        draw_levels(args.out / "levels.png", tokenizer, val, levels, args)
        print(f"{args.out / 'truncation.png'}, {args.out / 'levels.png'}; r: reconstructions, g: samples; band f: the "
              f"energy of frequencies f .. 2f-1 in dB against the data's")
    return rows, more


@torch.no_grad()
def draw_levels(path, tokenizer, val, levels, args):
    """Picture: an image's spectrum in each level's window, its sub-images, its reconstructions; then other images'."""
    images = to_float(val.batch(pick(len(val), 4))[0].to(args.device))
    level = torch.tensor(levels, device=args.device)
    windows = tokenizer.edges[level - 1]                                        # (G,)
    power = dct2(images[0]).square().mean(0).log()                              # (S, S)
    low, high = power.quantile(0.05), power.max()
    shades = (60 + 195 * (power - low) / (high - low)).clamp(60, 255)
    inside = torch.arange(len(power), device=args.device) < windows[:, None, None]      # (G, 1, S)
    shades = torch.where(inside & inside.mT, shades, 0)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)
    first = images[:1].expand(len(levels), -1, -1, -1)
    rows = [shades, to_uint8(low_pass(first, windows))]                         # each (G, 3, S, S)
    for code in tokenizer.encode(images).split(1):
        rows.append(to_uint8(tokenizer.decode(code.expand(len(levels), -1), level)))
    # the first two rows show the first image; fewer than four images may be held out
    originals = to_uint8(torch.cat([images[:1], images[:1], images]))
    save_grid(path, [torch.cat([x[None], row]) for x, row in zip(originals, rows)],
              ["spectrum in its window", "sub-image", *["reconstruction"] * len(images)],
              ["image", *(f"{k} token{'s' * (k > 1)}" for k in levels)])


def probe(args):
    """How much of a token the tokens before it tell: linearly (ridge regression), and by the GPT; probe.png."""
    runs = {"": args.out} | ({" against": Path(args.against)} if args.against else {})
    models = {name: load_run(out, args) for name, out in runs.items()}
    args.image_size, N = (getattr(models[""][0].config, k) for k in ("image_size", "num_tokens"))
    for tokenizer, _ in models.values():
        if (tokenizer.config.image_size, tokenizer.config.num_tokens) != (args.image_size, N):
            raise UserError(f"{args.against} has {tokenizer.config.num_tokens} tokens of {tokenizer.config.image_size} "
                            f"px images, {args.out} {N} of {args.image_size}: compare runs of the same sizes")
    train, val = load_data(args)
    chosen = pick(len(train), args.num or 50_000)
    generator = torch.Generator().manual_seed(wrap_int64(args.seed))
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    fit = len(chosen) * 4 // 5
    parts = (train, chosen[:fit]), (train, chosen[fit:]), (val, pick(len(val), 10_000))
    curves = {}
    for name, (tokenizer, gpt) in models.items():
        codes, labels = zip(*(encode_images(tokenizer, *part, args) for part in parts))
        vectors = tokenizer.quantizer.vectors
        moments = [second_moments(len(c), lambda a, b: vectors(c[a:b].to(args.device)), args) for c in codes]
        for order in ("", " reversed", " shuffled") if tokenizer is models[""][0] else ("",):
            curves[f"R2{name}{order}"] = ridge_r2(moments, ORDERS[order](N), N)
        seen = torch.cat(codes[:2])
        curves[f"entropy{name}"] = [math.log2(codebook_use(c[:, None], len(tokenizer.quantizer.codebook))[1])
                                    for c in seen.T]
        if gpt:
            curves[f"bits{name}"] = measure_bits(gpt, codes[2], labels[2], args)["bits_by_position"]
    patches = patch_sides(args.image_size, N)
    values = 3 * args.image_size ** 2
    if patches and values > 4096:
        # 309 GB at 256 px
        print(f"no R2 of raster patches: an image has {values:,} values, and the covariance of more "
              f"than 4,096 takes too much memory and time")
        patches = None
    if patches:
        def read(data, chosen, a, b):
            return F.unfold(to_float(data.batch(chosen[a:b])[0].to(args.device)), patches, stride=patches).mT
        moments = [second_moments(len(part[1]), partial(read, *part), args) for part in parts]
        curves["R2 patches"] = ridge_r2(moments, torch.arange(N), N)
    if args.rank == 0:
        def panel(title, x, names, first):
            return dict(title=title, x=x, lines={
                name.replace("R2 ", "").replace("R2", "in order").replace("against", Path(args.against or "").name):
                [(i + 1, curves[name][i]) for i in range(first, N)] for name in names})
        linear = [name for name in curves if name.startswith("R2")]
        plot(args.out / "probe.png", [
            panel("R2 from the tokens before", "place in the order", linear, 1),
            panel("bits a token", "token", [name for name in curves if name not in linear], 0)])
        print(f"{args.out / 'probe.png'}; R2: of a token from those before it, {len(parts[2][1]):,} held-out images, "
              f"fitted on {fit:,}; entropy: of a token by itself; bits: the GPT needs, told the class and those before")
    rows = [dict(token=i + 1, **{name: curve[i] for name, curve in curves.items()}) for i in range(N)]
    rows.append(dict(token="mean", **{name: sum(curve[1:]) / (N - 1) for name, curve in curves.items()}))
    return rows, dict(checkpoint=[fingerprint(tokenizer) for tokenizer, _ in models.values()], against=args.against,
                      counts=[len(part[1]) for part in parts])


def load_run(out, args):
    """(tokenizer, GPT or None) of a run's folder; the tokenizer is the GPT's own."""
    if (out / "gpt.pt").exists():
        gpt, tokenizer, _ = load_generator(out / "gpt.pt", args.device)
        return tokenizer, gpt
    return load_tokenizer(out / "tokenizer.pt", args.device), None


@torch.no_grad()
def encode_images(tokenizer, data, chosen, args):
    """Codes (n, N) and labels (n,) of the images chosen, in their order, on every rank."""
    first, last = own_share(len(chosen), args)
    codes, labels = [], []
    for part in tqdm(chosen[first:last].split(args.batch_size), desc="encoding", disable=args.rank > 0 or None):
        images, label = data.batch(part)
        codes.append(tokenizer.encode(to_float(images.to(args.device))).cpu()), labels.append(label)
    return gather(torch.cat(codes)), gather(torch.cat(labels))


@torch.no_grad()
def second_moments(count, read, args):
    """Mean (N d,) and second moment about it (N d, N d) of N vectors of width d an image: read(a, b) -> (b-a, N, d)."""
    first, last = own_share(count, args)
    moments = None
    for start in tqdm(range(first, last, 512), desc="moments", disable=args.rank > 0 or None):
        rows = read(start, min(start + 512, last)).flatten(1)
        moments = moments or Moments(rows.shape[1])
        moments.add(rows)
    mu, sigma = moments.finish(args.device)
    return mu, sigma * ((count - 1) / count)


PENALTIES = [10.0 ** k for k in range(-6, 3)]          # of the mean variance of a column
ORDERS = {"": torch.arange, " reversed": lambda N: torch.arange(N).flip(0),
          " shuffled": lambda N: torch.randperm(N, generator=torch.Generator().manual_seed(0))}


def ridge_r2(moments, order, N):
    """[R^2 of each of N vectors from those before it in an order], by ridge regression, in float64.

    moments: of second_moments, for images to fit, to choose the penalty of each vector, and to test. R^2 = 1 - squared
    error / variance about the mean of the fit images, on the test images; 0 for the first, which has none before it.
    """
    mean = moments[0][0]                                                        # (N d,)
    d = len(mean) // N
    columns = (order[:, None] * d + torch.arange(d)).flatten()
    fit, held_out, test = ((sigma + (mu - mean)[:, None] * (mu - mean))[columns][:, columns] for mu, sigma in moments)
    errors = torch.zeros(len(PENALTIES), 2, N, dtype=torch.float64)
    for p, penalty in enumerate(PENALTIES):
        L = torch.linalg.cholesky(fit + penalty * fit.diagonal().mean() * torch.eye(len(fit), dtype=fit.dtype))
        for i in range(1, N):
            own, before = slice(i * d, (i + 1) * d), slice(0, i * d)
            W = torch.cholesky_solve(fit[before, own], L[before, before])       # its leading rows are their own factor
            for s, m in enumerate((held_out, test)):
                errors[p, s, i] = m[own, own].trace() + (W * (m[before, before] @ W - 2 * m[before, own])).sum()
    best = errors[:, 0].argmin(0)                                               # (N,)
    variance = test.diagonal().unflatten(0, (N, d)).sum(1)
    r2 = torch.where(variance > 1e-12, 1 - errors[best, 1, torch.arange(N)] / variance, 0)      # 0: nothing to tell
    return [0.0] + r2[1:].tolist()


def patch_sides(S, N):
    """(height, width) of N equal patches that tile an image of side S, the squarest; None where there are none."""
    sides = [(S // rows, S // (N // rows)) for rows in range(1, N + 1) if N % rows == 0 and S % rows == 0
             and S % (N // rows) == 0]
    return min(sides, key=lambda s: abs(s[0] - s[1]), default=None)


# ------------------------------------------------------------------------------------------------------------------
# line charts

COLOURS = "#1f5fa8", "#d1495b", "#2e933c", "#8d5fd3", "#e08e1b", "#555555", "#17a2b8", "#a0522d"


def ticks(low, high, most=6):
    """Round numbers between low and high, at most so many and a step apart of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plot(path, panels):
    """PNG of line charts side by side. A panel: dict(title, x (label), log (of x), lines {name: [(x, y), ...]})."""
    z, width, height = 2, 420, 310                                              # z: twice the size, for sharp screens
    picture = Image.new("RGB", (z * width * len(panels), z * height), "white")
    draw = ImageDraw.Draw(picture)
    font, large = (ImageFont.load_default(size=z * size) for size in (11, 13))
    for p, panel in enumerate(panels):
        left, right, bottom = z * (p * width + 48), z * ((p + 1) * width - 16), z * (height - 40)
        draw.text((left, z * 12), panel["title"], fill="black", font=large, anchor="lm")
        x, y = left, z * 30
        for colour, name in zip(COLOURS, panel["lines"]):                       # the legend, in rows
            if x > left and x + z * 20 + font.getlength(name) > right:
                x, y = left, y + z * 15
            draw.line([(x, y), (x + z * 12, y)], fill=colour, width=z * 3)
            draw.text((x + z * 16, y), name, fill="black", font=font, anchor="lm")
            x += z * 28 + font.getlength(name)
        top = y + z * 14
        xs, ys = (sorted({point[axis] for line in panel["lines"].values() for point in line}) for axis in (0, 1))
        position = math.log2 if panel.get("log") else float
        margin = 0.05 * (ys[-1] - ys[0]) or 1
        low, high, first, last = ys[0] - margin, ys[-1] + margin, position(xs[0]), position(xs[-1])

        def at(x, y):
            return (left + (right - left) * (position(x) - first) / ((last - first) or 1),
                    bottom - (bottom - top) * (y - low) / (high - low))
        for y in ticks(low, high):
            draw.line([at(xs[0], y), at(xs[-1], y)], fill="#dddddd", width=z)
            draw.text((left - z * 6, at(xs[0], y)[1]), f"{y:g}", fill="black", font=font, anchor="rm")
        free = math.inf                                                         # no label reaches past this
        for x in reversed(xs if panel.get("log") else ticks(xs[0], xs[-1], 8)):
            center, half = at(x, low)[0], font.getlength(f"{x:g}") / 2
            draw.line([(center, bottom), (center, bottom + z * 4)], fill="black", width=z)
            if center + half < free:
                draw.text((center, bottom + z * 7), f"{x:g}", fill="black", font=font, anchor="mt")
                free = center - half - z * 3
        draw.line([(left, bottom), (right, bottom)], fill="black", width=z)
        draw.text(((left + right) / 2, z * (height - 6)), panel["x"], fill="black", font=font, anchor="mb")
        for colour, line in zip(COLOURS, panel["lines"].values()):
            points = [at(*point) for point in line]
            draw.line(points, fill=colour, width=z * 2, joint="curve")
            for x, y in points if len(points) <= 16 else []:
                draw.ellipse([x - z * 3, y - z * 3, x + z * 3, y + z * 3], fill=colour)
    picture.save(f"{path}.tmp", format="PNG", optimize=True)
    os.replace(f"{path}.tmp", path)


# ------------------------------------------------------------------------------------------------------------------
# the run

COMMANDS = dict(compare=compare, stats=stats, generation=generation, reconstruction=reconstruction,
                truncation=truncation, probe=probe)


def parse_args(argv=None):
    parser, preset = base_parser(__doc__, argv)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("paths", nargs="*", help="compare: SAMPLES REFERENCE; stats: IMAGES FILE.npz")
    add = parser.add_argument_group("measure").add_argument
    add("--features", choices=("inception", "classifier"),
        help="default: the classifier for runs on shapes and CIFAR, inception for all else")
    add("--inception", metavar="FILE", help="weights of Inception (default: downloaded once)")
    add("--classifier", metavar="FILE", help="the judge: trained and kept there when absent (default: classifier.pt in "
        "--out); runs to be compared need the same")
    add("--reference", metavar="PATH", help="what to compare samples with (default: up to 50,000 training images)")
    add("--num", type=int, help="images to sample (default: 50,000; classifier: 10,000), reconstruct (all held out), "
        "to fit the probe to (50,000)")
    add("--levels", help="reconstruction: numbers of tokens, 1,2,4 (default: all tokens; truncation: 1, 2, 4 ...)")
    add("--against", metavar="FOLDER", help="probe: another run, whose tokens are asked the same")
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
    args.num_samples = args.num or (50_000 if args.features == "inception" else 10_000)
    try:
        args.levels = [int(i) for i in args.levels.split(",")] if args.levels else None
    except ValueError:
        parser.error(f"--levels is {args.levels}: give numbers of tokens, as 1,2,4")
    # higher levels would be decoded from codes that were never sampled
    if args.command == "truncation" and args.tokens is not None:
        parser.error(f"--tokens {args.tokens} is for generation: for truncation give numbers of tokens by "
                     f"--levels")
    return args


def main(args):
    share_work(args)
    start = time.perf_counter()
    rows, more = COMMANDS[args.command](args)
    if args.rank:
        return
    columns = list(rows[0])
    cells = [["" if v is None else f"{v:.4f}" if type(v) is float else str(v) for v in row.values()] for row in rows]
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
