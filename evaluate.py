"""Measure samples (FID, sFID, IS, precision, recall), reconstructions (rFID, PSNR, SSIM, LPIPS).

  python evaluate.py compare samples.npz VIRTUAL_imagenet256_labeled.npz   # folders or .npz files
  python evaluate.py generation --data cifar10                       # samples of the generator
  python evaluate.py reconstruction --data cifar10 --levels 1 8 64   # held-out images, rebuilt
  python evaluate.py truncation --data cifar10                       # both, at 1, 2, 4 ... tokens
  python evaluate.py probe --data cifar10                            # what earlier tokens predict

The definitions are those of ADM's TensorFlow evaluator, which most published tables use. Tables
are also appended to out/<data>/evaluations.jsonl. Under torchrun the processes share the images.
Below the metrics stands what training uses, too: data sets, and networks that compare images.
"""
import argparse
import hashlib
import json
import math
import os
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from itertools import chain, cycle, repeat
from pathlib import Path
from types import SimpleNamespace

from spectralar import (Help, Sampling, UserError, all_sum, autocast, base_parser, dct2,
                        first_rank_first, gather, in_window, load_generator, load_tokenizer,
                        low_pass, random_streams, read_checkpoint, run_script, save_checkpoint,
                        start_job, to_float, to_uint8, uniforms)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from sample import (add_sampling_flags, balanced_labels, check_tokens, decode_image, draw_codes,
                    image_grid, own_batches, parse_sampling_flags, permutation, progress, run_file,
                    save_picture, spread_levels)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help,
                                     parents=[base_parser()], allow_abbrev=False)
    parser.add_argument("command", choices=("compare", "generation", "reconstruction",
                                            "truncation", "probe"))
    parser.add_argument("paths", nargs="*", help="of compare: SAMPLES REFERENCE")
    add = parser.add_argument_group("measuring").add_argument
    add("--features", choices=("inception", "classifier"),
        help="network that measures (shapes and CIFAR: classifier, else inception)")
    add("--inception", metavar="FILE", help="weights of Inception (downloaded)")
    add("--classifier", metavar="FILE", help="another run's classifier: take one for all runs "
        "that you compare (cifar10: the one in docs/weights; others: classifier.pt in --out, "
        "which is trained when absent)")
    add("--reference", metavar="PATH",
        help="images or statistics to compare samples with (50,000 training images)")
    add("--num", type=int, help="images (samples: 50,000, with the classifier 10,000; probe: "
        "50,000; others: all)")
    add("--levels", type=int, nargs="+",
        help="numbers of tokens, such as 1 2 4 (all tokens; truncation: 1, 2, 4 ...)")
    add("--lpips", action=argparse.BooleanOptionalAction,
        help="of reconstructions: measure LPIPS, too (on with inception)")
    add("--batch-size", type=int, default=64, help="images per batch of one process")
    add_sampling_flags(parser)
    args = parse_sampling_flags(parser, argv)
    if args.command == "compare" and len(args.paths) != 2:
        parser.error(f"compare takes two paths, SAMPLES REFERENCE, not {args.paths}")
    # A flag without effect would give a number that means something else.
    rebuilt, sampled = "reconstruction, truncation", "generation, truncation"
    users = dict(paths="compare", tokens="generation", levels=rebuilt, lpips=rebuilt,
                 reference=sampled, weights="generation, reconstruction, truncation, probe",
                 **{f.name: sampled for f in fields(Sampling)})
    for name, commands in users.items():
        is_given = getattr(args, name) not in ([], parser.get_default(name))
        if is_given and args.command not in commands:
            parser.error(f"{args.command} does not use {name}: it is of {commands}")
    # Defaults that depend on other flags. After this function, args is only read.
    small_images = args.command != "compare" and args.data in ("shapes", *CIFAR)
    args.features = args.features or ("classifier" if small_images else "inception")
    if args.lpips is None:
        args.lpips = args.features == "inception"
    return args


def main(args):
    job = start_job(args)
    args.out.mkdir(parents=True, exist_ok=True)
    for path in filter(None, [*args.paths, args.reference]):
        os.stat(path)               # a wrong name fails here, not after the samples are measured
    commands = dict(compare=run_compare, generation=run_generation,
                    reconstruction=run_reconstruction, truncation=run_truncation, probe=run_probe)
    rows = commands[args.command](args, job)
    if job.rank == 0:
        print_table(rows)
        flags = vars(args) | dict(out=str(args.out))
        record = dict(command=" ".join(sys.argv), flags=flags, results=rows)
        with open(args.out / "evaluations.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def print_table(rows):
    """Print rows, each a dict of the same columns."""
    lines = [list(rows[0])]
    for row in rows:
        lines.append([f"{x:.4f}" if isinstance(x, float) else str(x) for x in row.values()])
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    for line in lines:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


# ---- the commands: each returns the rows of its table -------------------------------------------
def run_compare(args, job):
    network = load_network(args, None, None, job)
    samples = measure_path(args.paths[0], args.num, network, args, job)
    reference = measure_path(args.paths[1], None, network, args, job)
    row = {"images": samples.count, "reference images": reference.count,
           "px": samples.size, "reference px": reference.size}
    return [row | compare_sets(samples, reference, args, job)]


def load_network(args, data, image_size, job):
    """The network that measures: InceptionV3, or the classifier of a run's data (train, val)."""
    # cuDNN convolves in float32. Its default, TF32, keeps 10 bits of each number.
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    if args.features == "inception":
        load = partial(load_inception, args.inception, job.device)
    else:
        usual = shipped(f"judge-{args.data}.pt") or args.out / "classifier.pt"
        load = partial(find_classifier, args.classifier, usual, JUDGE, args.data, data, image_size,
                       job)
    return first_rank_first(load, job)


def distance_name(args):
    """Only Inception's distance is FID. That of a classifier does not compare with it."""
    return "FID" if args.features == "inception" else "FD-classifier"


def compare_sets(samples, reference, args, job):
    """{metric: value} of samples against a reference, in the first process; {} elsewhere."""
    if job.rank:
        return {}
    if min(samples.count or 2048, reference.count or 2048) < 2048:
        print("warning: the Frechet distance of fewer than 2,048 images is biased")
    if samples.size != reference.size and samples.size and reference.size:
        print(f"warning: samples are {samples.size} px, the reference {reference.size} px")
    result = {distance_name(args): frechet_distance(*samples.moments, *reference.moments)}
    if samples.spatial is not None and reference.spatial is not None:
        result["sFID"] = frechet_distance(*samples.spatial, *reference.spatial)
    # ADM averages the scores of parts of 5,000 samples.
    if args.features == "inception" and samples.logits is not None:
        parts = max(1, round(samples.count / 5000))
        result["IS"], result["IS std"] = inception_score(samples.logits, parts)
    # ADM takes 10,000 reference images. Fewer than 4 have no third neighbour.
    if samples.pool is not None and reference.pool is not None:
        real = reference.pool[pick_images(len(reference.pool), 10_000)]
        if min(len(real), len(samples.pool)) > 3:
            result["precision"], result["recall"] = precision_recall(real, samples.pool)
    return result


def open_run(kind, tokenizer, args, job):
    """(train, val, network that measures) of the run whose checkpoint of this kind is measured."""
    for level in args.levels or []:
        check_tokens("--levels", level, tokenizer.config.num_tokens)
    size = tokenizer.config.image_size
    train, val = open_data(args, size, job)
    check_data(run_file(kind, args), train, args)
    return train, val, load_network(args, (train, val), size, job)


def run_generation(args, job):
    gpt, tokenizer, _ = load_generator(run_file("gpt", args), job.device)
    tokens = check_tokens("--tokens", args.tokens, gpt.config.num_tokens)
    train, _, network = open_run("gpt", tokenizer, args, job)
    return measure_generation(gpt, tokenizer, network, train, [tokens], args, job)


@torch.no_grad()
def measure_generation(gpt, tokenizer, network, train, levels, args, job):
    """Rows of samples decoded at each level, against training images or --reference."""
    num = args.num or (50_000 if args.features == "inception" else 10_000)
    if args.reference:
        reference = measure_path(args.reference, None, network, args, job)
    else:
        chosen = pick_images(len(train), 50_000)
        reference = measure_images(train, chosen, network, args, job)

    # Each process draws the codes of its share once, and decodes them at every level.
    labels = balanced_labels(num, range(gpt.config.num_classes), args.seed)
    batches = own_batches(num, args.batch_size, job)
    drawn = [draw_codes(gpt, labels[rows], rows, max(levels), args, job)
             for rows in progress("sampling", batches, job)]
    results = []
    for level in levels:
        images = (to_uint8(tokenizer.decode(codes, level))
                  for codes in progress(f"{level} tokens", drawn, job))
        samples = extract_features(images, batches, num, network, job)
        result = compare_sets(samples, reference, args, job)
        if args.features == "classifier":
            recognised = samples.logits.argmax(-1) == labels
            result["accuracy"] = recognised.double().mean().item()
        results.append(result)
    return results


def run_reconstruction(args, job):
    tokenizer = load_tokenizer(run_file("tokenizer", args), job.device)
    levels = args.levels or [tokenizer.config.num_tokens]
    _, val, network = open_run("tokenizer", tokenizer, args, job)
    return measure_reconstructions(tokenizer, network, val, levels, args, job)


@torch.no_grad()
def measure_reconstructions(tokenizer, network, val, levels, args, job):
    """Rows of held-out images, reconstructed at each level, against the images.
    band f: energy of the frequencies f .. 2f - 1, against that of the images, in dB."""
    lpips = first_rank_first(partial(load_lpips, job.device), job) if args.lpips else None
    chosen = pick_images(len(val), args.num)
    batches = own_batches(len(chosen), args.batch_size, job)

    # Each image is read and encoded once, and decoded at all levels.
    original_moments = Moments()
    moments = {level: Moments() for level in levels}
    scores = {level: [] for level in levels}
    energies = {level: 0 for level in levels}       # (2, octaves): reconstructions, images
    codes = []
    for rows in progress("reconstruction", batches, job):
        images, labels = val.batch(chosen[rows])
        images = images.to(job.device)
        original_moments.add(network(images)[0])
        codes.append(tokenizer.encode(to_float(images)))
        for level in levels:
            copies = to_uint8(tokenizer.decode(codes[-1], level))
            pool, _, logits = network(copies)
            moments[level].add(pool)
            score = [logits.argmax(-1).cpu() == labels, psnr(copies, images), ssim(copies, images)]
            if lpips is not None:
                score.append(lpips(to_float(copies), to_float(images)))
            scores[level].append(torch.stack([x.cpu().double() for x in score], 1))
            energies[level] += torch.stack([band_energy(copies), band_energy(images)])

    own = torch.cat(batches)
    codes = gather(torch.cat(codes), own, len(chosen))
    used, _, _ = codebook_use(codes, tokenizer.config.codebook_size)
    rank = effective_rank(tokenizer.quantizer.vectors(codes.unique()))
    reference = original_moments.finish()
    results = []
    for level in levels:
        window = tokenizer.edges[level - 1].item()
        distance = frechet_distance(*moments[level].finish(), *reference)
        row = {"tokens": level, "window": window, "r" + distance_name(args): distance}
        score = gather(torch.cat(scores[level]), own, len(chosen))
        accuracy, *quality = score.mean(0).tolist()
        row |= zip(("PSNR", "SSIM", "LPIPS"), quality)
        if args.features == "classifier":
            row["accuracy"] = accuracy
        row |= {"codes used": used, "rank": rank}
        all_sum(energies[level])
        copied, original = energies[level]
        for octave, decibels in enumerate((10 * (copied / original).log10()).tolist()):
            lowest = 2 ** octave // 2
            # A window of w keeps the frequencies below w.
            row[f"band {lowest}"] = decibels if lowest < window else None
        results.append(row)
    return results


def run_truncation(args, job):
    """Reconstructions, and samples (columns that begin with g), after the first i tokens."""
    gpt, tokenizer, _ = load_generator(run_file("gpt", args), job.device)
    levels = args.levels or spread_levels(tokenizer.config.num_tokens)
    train, val, network = open_run("gpt", tokenizer, args, job)
    rows = measure_reconstructions(tokenizer, network, val, levels, args, job)
    samples = measure_generation(gpt, tokenizer, network, train, levels, args, job)
    for row, sample in zip(rows, samples):
        row |= {f"g{name}": value for name, value in sample.items()}
    if job.rank == 0:
        draw_levels(args.out / "levels.png", tokenizer, val, levels, job)
        name = distance_name(args)
        save_charts(args.out / "truncation.png", rows, "tokens", {
            "PSNR (dB)": ["PSNR"],
            f"{name} of reconstructions (r), samples (g)": [f"r{name}", f"g{name}"],
            "energy of frequencies f .. 2f - 1 (dB)": [c for c in rows[0] if c[:4] == "band"]})
        print(f"saved {args.out / 'truncation.png'}")
    return rows


@torch.no_grad()
def draw_levels(path, tokenizer, val, levels, job):
    """PNG, a column per level: an image's spectrum in the level's window, its sub-image and its
    reconstruction; then the reconstructions of up to three other images."""
    pixels, _ = val.batch(pick_images(len(val), 4))
    images = to_float(pixels.to(job.device))
    level = torch.tensor(levels, device=job.device)
    windows = tokenizer.edges[level - 1]                                # (G,)

    # The spectrum on a log scale, in grey values from 60 to 255. Black is outside the window.
    power = dct2(images[0]).square().mean(0).log()                      # (S, S)
    low = power.quantile(0.05)
    shades = (60 + 195 * (power - low) / (power.max() - low)).clamp(60, 255)
    shades = torch.where(in_window(len(power), windows, job.device), shades, 0)
    shades = shades[:, None].expand(-1, pixels.shape[1], -1, -1)        # (G, 3, S, S)

    first = images[:1].expand(len(levels), -1, -1, -1)
    rows = [shades.to(torch.uint8), to_uint8(low_pass(first, windows))]
    for code in tokenizer.encode(images).split(1):
        rows.append(to_uint8(tokenizer.decode(code.expand(len(levels), -1), level)))

    # On the left of each row stands the image that it shows.
    originals = pixels[[0, 0, *range(len(images))]]
    rows = [torch.cat([image[None], row.cpu()]) for image, row in zip(originals, rows)]
    names = ["spectrum in its window", "sub-image"] + ["reconstruction"] * len(images)
    titles = ["image"] + [f"{i} tokens" if i > 1 else "1 token" for i in levels]
    save_picture(path, image_grid(rows, names, titles))


# ---- probe: how well do earlier tokens predict each token? --------------------------------------
#   R2        of a linear map from the code vectors before it (reversed: from the last one on)
#   entropy   of the code in bits, if nothing else is known
#   bits      cross-entropy of the GPT, which knows the class and all codes before

def run_probe(args, job):
    """How well earlier tokens predict each token, and earlier patches of pixels each patch."""
    gpt, tokenizer, _ = load_generator(run_file("gpt", args), job.device)
    N = tokenizer.config.num_tokens
    train, val = open_data(args, tokenizer.config.image_size, job)
    check_data(run_file("gpt", args), train, args)
    # Training images fit the linear map, held-out images measure it.
    fit = correlate_tokens(tokenizer, train, args.num or 50_000, job)
    test = correlate_tokens(tokenizer, val, 10_000, job)

    in_order = torch.arange(N)
    _, _, perplexities = codebook_use(fit["codes"], tokenizer.config.codebook_size)
    columns = {"R2": linear_r2(fit["vectors"], test["vectors"], in_order),
               "R2 reversed": linear_r2(fit["vectors"], test["vectors"], in_order.flip(0)),
               "entropy": [math.log2(perplexity) for perplexity in perplexities],
               "bits": held_out_bits(gpt, test["codes"], test["labels"], job)["bits_by_position"]}
    if "patches" in fit:
        columns["R2 patches"] = linear_r2(fit["patches"], test["patches"], in_order)

    rows = [{"token": i + 1} | {name: values[i] for name, values in columns.items()}
            for i in range(N)]
    if job.rank == 0:
        save_charts(args.out / "probe.png", rows[1:], "token", {
            "R2 of each place, from those before": [c for c in columns if c[:2] == "R2"],
            "bits per token": ["entropy", "bits"]})
        print(f"saved {args.out / 'probe.png'}")
    # The first token has none before it.
    means = {name: sum(values[1:]) / (N - 1) for name, values in columns.items()}
    return rows + [{"token": "mean"} | means]


@torch.no_grad()
def correlate_tokens(tokenizer, data, most, job):
    """Of up to `most` images: codes (n, N), labels (n,), mean and covariance of the code vectors,
    and those of the patches, if N square patches tile an image of up to 4,096 values."""
    N, S = tokenizer.config.num_tokens, tokenizer.config.image_size
    side = S // math.isqrt(N)
    tiles = side ** 2 * N == S ** 2 and 3 * S * S <= 4096
    chosen = pick_images(len(data), most)
    batches = own_batches(len(chosen), 64, job)
    codes, labels = [], []
    vectors, patches = Moments(), Moments()
    for rows in progress("encoding", batches, job):
        images, batch_labels = data.batch(chosen[rows])
        images = to_float(images.to(job.device))
        codes.append(tokenizer.encode(images))
        labels.append(batch_labels)
        vectors.add(tokenizer.quantizer.vectors(codes[-1]).flatten(1))
        if tiles:
            patches.add(F.unfold(images, side, stride=side).mT.flatten(1))
    own = torch.cat(batches)
    result = dict(codes=gather(torch.cat(codes).cpu(), own, len(chosen)), vectors=vectors.finish(),
                  labels=gather(torch.cat(labels), own, len(chosen)))
    return result | (dict(patches=patches.finish()) if tiles else {})


def linear_r2(fit, test, order):
    """R^2 of each of N vectors from those before it in an order, by least squares in float64.
    fit, test: mean (N d,) and covariance (N d, N d) of two sets of images. R^2 = 1 - squared error
    / variance, both on the test images, about the mean of the fit; 0 for the first vector."""
    mean, S = fit
    shift = test[0] - mean
    T = test[1] + shift[:, None] * shift
    N = len(order)
    d = len(mean) // N
    columns = (order[:, None] * d + torch.arange(d)).flatten()
    S = S[columns][:, columns]
    T = T[columns][:, columns]
    # The tiny number keeps the matrix invertible where a value never changes.
    tiny = 1e-6 * S.diagonal().mean() + 1e-30
    factor = torch.linalg.cholesky(S + tiny * torch.eye(len(S), dtype=S.dtype))

    r2 = [0.0]
    for i in range(1, N):
        before, own = slice(0, i * d), slice(i * d, (i + 1) * d)
        # The factor of a leading block is the leading block of the factor.
        W = torch.cholesky_solve(S[before, own], factor[before, before])
        # The mean of |y - W'x|^2 is tr T_yy + the sum of the entries of W * (T_xx W - 2 T_xy).
        variance = T[own, own].trace().item()
        change = (W * (T[before, before] @ W - 2 * T[before, own])).sum().item()
        # A vector that never changes has nothing to predict.
        r2.append(-change / variance if variance > 1e-12 else 0.0)
    return r2


@torch.no_grad()
def held_out_bits(model, codes, labels, job):
    """Bits per token and accuracy, over all and by position, for codes (n, N) and labels (n,)."""
    bits, hits = [], []
    for chunk, label in zip(codes.split(256), labels.split(256)):
        chunk = chunk.to(job.device)
        with autocast(job):
            logits = model(chunk, label.to(job.device)).float()                 # (n, N, K)
        # Position by position: the first tokens are the hardest to predict.
        nats = F.cross_entropy(logits.flatten(0, 1), chunk.flatten(), reduction="none")
        bits.append(nats.view_as(chunk) / math.log(2))
        hits.append((logits.argmax(-1) == chunk).float())
    bits = torch.cat(bits).mean(0)                                              # (N,)
    hits = torch.cat(hits).mean(0)
    return dict(bits=bits.mean().item(), accuracy=hits.mean().item(),
                bits_by_position=bits.tolist(), accuracy_by_position=hits.tolist())


# ---- metrics ------------------------------------------------------------------------------------
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) in float64 (FID, Heusel et al. 2017).
    tr sqrt(S1 S2) is the sum of the roots of the eigenvalues of R S2 R with R = sqrt(S1), which is
    symmetric: no general matrix root is needed, and no imaginary part can appear."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64).cpu()
                                for x in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item()


def inception_score(logits, splits=1):
    """exp(mean KL(p(y|x) || p(y))) of logits (n, 1008): (mean, std) over consecutive parts.
    NOTE with more than one part the order matters: sorted by class, samples score 62, not 298."""
    log_p = torch.as_tensor(logits).double().log_softmax(-1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits:(i + 1) * len(log_p) // splits]
        marginal = part.logsumexp(0) - math.log(len(part))
        divergence = (part.exp() * (part - marginal)).sum(-1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019); features real (n, d), fake (m, d).

    A point's ball reaches to its k-th nearest neighbour in its own set. Precision is the share of
    fake points in any real ball, recall the share of real points in any fake ball.
    NOTE float32; ADM's float16 distances raise both by about 0.002."""
    def share_in_balls(points, centres):
        radii = []
        for part in centres.split(512):             # blocks of rows bound the memory
            nearest = torch.cdist(part, centres).topk(k + 1, largest=False).values
            radii.append(nearest[:, k])             # the first neighbour is the centre itself
        radii = torch.cat(radii)
        inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(512)]
        return torch.cat(inside).double().mean().item()

    real = torch.as_tensor(real, dtype=torch.float32)
    fake = torch.as_tensor(fake, dtype=torch.float32)
    return share_in_balls(fake, real), share_in_balls(real, fake)


def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 images (B, 3, H, W) -> (B,) dB. Equal images have 100,
    because infinity would make every mean infinite."""
    error = (a.float() - b.float()).square().mean((1, 2, 3))
    return (10 * torch.log10(255 ** 2 / error)).clamp(max=100)


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of uint8 images (B, 3, H, W) -> (B,).
    Gaussian window of 11 px, sigma 1.5, valid region, mean over the channels. It is measured on
    0 .. 255, never on [-1, 1]: SSIM changes when both images are shifted."""
    def windows(n):                                 # row i averages the pixels i .. i + 10
        offset = torch.arange(-5, 6, device=a.device)
        window = torch.exp(-offset ** 2 / (2 * 1.5 ** 2))
        window = window / window.sum()
        return torch.stack([F.pad(window, (i, n - 11 - i)) for i in range(n - 10)])

    def blur(x):
        return rows @ x @ columns.T

    rows, columns = windows(a.shape[-2]), windows(a.shape[-1])
    # Variances do not change with a shift, and float32 holds those of small numbers better.
    a, b = a.float() - 128, b.float() - 128
    mean_a, mean_b = blur(a), blur(b)
    var_a = blur(a * a) - mean_a ** 2
    var_b = blur(b * b) - mean_b ** 2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = mean_a + 128, mean_b + 128
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    similarity = similarity / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return similarity.mean((1, 2, 3))


def band_energy(images):
    """Energy of uint8 images (B, 3, S, S), summed over them, in each octave of frequencies: 0, 1,
    2 and 3, 4 .. 7 ... -> (octaves,) float64."""
    number = torch.arange(images.shape[-1])
    frequency = torch.maximum(number[:, None], number)                  # (S, S)
    octave = torch.frexp(frequency.float()).exponent.long().flatten()
    energy = dct2(to_float(images)).square().sum((0, 1)).flatten().cpu().double()
    return energy.new_zeros(octave.max() + 1).index_add_(0, octave, energy)


def codebook_use(codes, K):
    """Codes (n, N) -> share of the K codes in use, perplexity, perplexity per position (N,)."""
    codes = codes.cpu()
    def perplexity(column):
        p = torch.bincount(column.flatten(), minlength=K).double() / column.numel()
        return torch.special.entr(p).sum().exp().item()
    return len(codes.unique()) / K, perplexity(codes), [perplexity(column) for column in codes.T]


def effective_rank(x):
    """How many dimensions rows (n, d) fill about their mean, 1 .. d (Roy and Vetterli 2007)."""
    values = torch.linalg.svdvals((x - x.mean(0)).cpu().double())
    share = values / values.sum().clamp(min=1e-30)
    return torch.special.entr(share).sum().exp().item()


class Moments:
    """Mean and unbiased covariance of rows (n, d), streamed: sums of f and of f f^T in float64."""

    def __init__(self):
        self.count = self.sum = self.outer = torch.zeros((), dtype=torch.float64)

    def add(self, rows):
        rows = rows.cpu().double()                  # Apple's GPUs lack float64
        self.count = self.count + len(rows)
        self.sum = self.sum + rows.sum(0)
        self.outer = torch.addmm(self.outer, rows.T, rows)

    def finish(self):
        """(mean (d,), covariance (d, d)) over all processes."""
        for x in (self.count, self.sum, self.outer):
            all_sum(x)
        if self.count < 2:
            raise UserError("a covariance needs at least 2 images: take more")
        mu = self.sum / self.count
        return mu, self.outer.sub_(self.count * mu[:, None] * mu).div_(self.count - 1)


# ---- features of a set of images ----------------------------------------------------------------
# count; size: "H x W"; moments: mean (d,) and covariance (d, d); spatial: those of Inception's
# spatial features; pool (n, d); logits (n, classes). None: not known

def measure_images(images, chosen, network, args, job):
    """Features of the chosen images of a data set."""
    batches = own_batches(len(chosen), args.batch_size, job)
    pixels = (images.batch(chosen[rows])[0] for rows in progress("measuring", batches, job))
    return extract_features(pixels, batches, len(chosen), network, job)


@torch.no_grad()
def extract_features(images, batches, count, network, job):
    """Features of `count` images, of which this process has some: uint8 (B, 3, H, W) for each of
    its batches of row numbers."""
    pool_moments, spatial_moments = Moments(), Moments()
    pools, logits = [], []
    for pixels in images:
        pool, spatial, batch_logits = network(pixels.to(job.device))
        pool_moments.add(pool)
        if spatial is not None:                     # Inception's only
            spatial_moments.add(spatial)
        pools.append(pool.cpu())
        logits.append(batch_logits.cpu())
    own = torch.cat(batches)
    return SimpleNamespace(
        count=count, size="{} x {}".format(*pixels.shape[2:]), moments=pool_moments.finish(),
        spatial=None if spatial is None else spatial_moments.finish(),
        pool=gather(torch.cat(pools), own, count), logits=gather(torch.cat(logits), own, count))


def measure_path(path, num, network, args, job):
    """Features of the images of a folder or an .npz, at most num; an .npz may hold statistics."""
    images, arrays = None, {}
    if Path(path).is_dir():
        images = Folder(path, [images_below(path)], None, args.workers)
    else:
        with np.load(path) as file:
            arrays = dict(file)
    if "arr_0" in arrays:
        pixels = arrays["arr_0"]
        if pixels.dtype != np.uint8 or pixels.shape[3:] != (3,):
            raise UserError(f"{path}: arr_0 is {pixels.dtype} of shape {pixels.shape}, not uint8 "
                            f"(n, H, W, 3): convert it")
        images = InMemory(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.zeros(len(pixels)))

    features = SimpleNamespace(**dict.fromkeys("count size moments spatial pool logits".split()))
    if images is not None:
        chosen = pick_images(len(images), num)
        features = measure_images(images, chosen, network, args, job)
    # Files come sorted, often by class. A score of consecutive parts needs them shuffled.
    if isinstance(images, Folder):
        features.logits = features.logits[permutation(len(chosen), "order of scores", 0, 0)]
    # ADM's statistics are of the whole training set, its images are 10,000 of it.
    if "mu" in arrays or images is None:
        features.moments = arrays["mu"], arrays["sigma"]
        features.spatial = (arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None
    return features


# ---- data sets ----------------------------------------------------------------------------------
# Each has len(), class_names, fingerprint(), and batch(indices, crops=None) -> uint8 images
# (B, 3, S, S), labels (B,) long.

def open_data(args, image_size, job):
    """(train, val) of --data. The first process opens it first, and downloads it if it must."""
    def load():
        if args.data == "shapes":
            return Shapes("train", image_size), Shapes("val", image_size)
        if args.data in CIFAR:
            return open_cifar(args.data, Path(args.data_dir), image_size)
        imagenet = args.data == "imagenet"
        root = Path(args.data_dir if imagenet else args.data)
        if imagenet and not any((root / place / "train").is_dir() for place in ("", *KAGGLE)):
            raise UserError(f"{root} has no train folder: --data-dir names the one that holds "
                            f"ImageNet's train/<wnid>/*.JPEG and val/<wnid>/*.JPEG")
        return open_folder(root, image_size, args.workers)
    return first_rank_first(load, job)


def check_data(path, train, args):
    """UserError when a checkpoint was trained on other data than this run's."""
    saved = read_checkpoint(path, "tokenizer", "gpt", mmap=True)
    name = saved["args"]["data"]
    # A moved folder has the same files. In a copied one they have other times of change, so there
    # its own name must do.
    if saved.get("data") != train.fingerprint():
        if Path(name).name != Path(args.data).name:
            raise UserError(f"{path} was trained on --data {name}, this run has --data "
                            f"{args.data}: give --data {name}, or another --out")
        print(f"warning: the files of {name} have changed since {path} was trained, or are copies")
    learned = saved.get("class_names", train.class_names)
    if learned != train.class_names:
        raise UserError(f"{path} learned the classes {learned[:5]} .., the data set has "
                        f"{train.class_names[:5]} ..: train it again")


def batch_indices(n, batch_size, step, seed, purpose="order of images"):
    """Which of n samples make the batch of a step; every epoch is a new permutation."""
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = position // n
    return torch.cat([permutation(n, purpose, seed, epoch)[position[epochs == epoch] % n]
                      for epoch in epochs.unique().tolist()])


def pick_images(n, most):
    """At most `most` of n indices, ascending: a fixed random choice, spread over all classes."""
    return permutation(n, "choice of images", 0, 0)[:most].sort().values


# ---- built-in images: ten shapes ----------------------------------------------------------------
# on a smooth background (low frequencies), with an outline (middle) and a texture (high)

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "arrow",
          "hourglass")


def shape_distance(name, x, y):
    """Signed distance of points to the outline of a shape of radius about 1; y points down."""
    def box(half_width, half_height, centre_y=0.0):
        return np.maximum(abs(x) - half_width, abs(y - centre_y) - half_height)

    def disc(radius, centre_x=0.0, centre_y=0.0):
        return np.hypot(x - centre_x, y - centre_y) - radius

    if name == "circle":
        return disc(0.85)
    if name == "square":
        return box(0.75, 0.75)
    if name == "triangle":
        angles = np.pi * np.array([1 / 2, 7 / 6, 11 / 6])
        return np.maximum.reduce([x * cos + y * sin - 0.5
                                  for cos, sin in zip(np.cos(angles), np.sin(angles))])
    if name == "star":
        # Fold the plane into one of ten half-points: there the outline is one straight line.
        angle = np.abs((np.arctan2(x, -y) / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * (2 * np.pi / 5)
        tip = np.array([1.05, 0.0])
        notch = 0.45 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
        normal = np.array([tip[1] - notch[1], notch[0] - tip[0]]) / -np.hypot(*(tip - notch))
        r = np.hypot(x, y)
        across = r * np.cos(angle) - tip[0]
        return across * normal[0] + r * np.sin(angle) * normal[1]
    if name == "cross":
        return np.minimum(box(0.9, 0.3), box(0.3, 0.9))
    if name == "ring":
        return abs(disc(0.68)) - 0.25
    if name == "crescent":
        return np.maximum(disc(0.95), -disc(0.8, 0.5))
    if name == "heart":
        # A square on its corner, and a disc on each of its upper sides.
        diamond = (abs(x) + abs(y - 0.1)) / np.sqrt(2) - 0.58
        return np.minimum.reduce([diamond, disc(0.58, -0.41, -0.31), disc(0.58, 0.41, -0.31)])
    if name == "arrow":
        head = np.maximum((abs(x) * 0.77 - (y + 1.0) * 0.64), y - 0.05)
        return np.minimum(head, box(0.27, 0.5, 0.45))
    if name == "hourglass":
        return np.maximum((abs(x) - abs(y) * 0.85 - 0.1) * 0.76, abs(y) - 0.85)


def hsv_to_rgb(h, s, v):
    """Hue, saturation, value in [0, 1], each (B, 1, 1, 1) -> (B, 3, 1, 1) float32 in [0, 1]."""
    k = (np.array([5, 3, 1])[:, None, None] + h * 6) % 6
    return (v * (1 - s * np.clip(np.minimum(k, 4 - k), 0, 1))).astype(np.float32)


class Shapes:
    """Drawn images without end: image i depends on (split, i) alone, class = i mod 10."""
    class_names = list(SHAPES)

    def __init__(self, split, image_size):
        self.split = split
        self.image_size = image_size
        self.size = 10_000 if split == "val" else 1_000_000

    def __len__(self):
        return self.size

    def fingerprint(self):
        return f"shapes {self.split} {self.image_size}"

    def batch(self, indices, crops=None):
        """indices (B,) -> uint8 images (B, 3, S, S), labels (B,) long."""
        indices = torch.as_tensor(indices)
        labels = indices % len(SHAPES)
        streams = random_streams(f"shapes {self.split}", 0, indices)
        u = uniforms(streams, 16).numpy().astype(np.float32)
        u = u.T[:, :, None, None, None]                                     # 16 of (B, 1, 1, 1)
        axis = (np.arange(self.image_size, dtype=np.float32) + 0.5) * 2 / self.image_size - 1
        X, Y = axis[None, :], axis[:, None]                                 # pixel centres

        # Each shape has its own centre, radius and turn. A crescent opens to either side.
        crescent = (labels == SHAPES.index("crescent")).numpy()[:, None, None, None]
        angle = (u[0] - 0.5) * np.pi / 10 + np.pi * (crescent & (u[1] < 0.5))
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        radius = 0.68 + 0.12 * u[2]
        dx = X - (0.2 * u[3] - 0.1)
        dy = Y - (0.2 * u[4] - 0.1)
        x = (dx * cos + dy * sin) / radius
        y = (dy * cos - dx * sin) / radius
        distance = np.empty(x.shape, np.float32)                            # pixels
        for label, name in enumerate(SHAPES):
            rows = np.flatnonzero(labels == label)
            pixels = radius[rows] * (self.image_size / 2)
            distance[rows] = shape_distance(name, x[rows], y[rows]) * pixels
        inside = np.clip(0.5 - distance, 0, 1)
        line_width = 0.7 * self.image_size / 32                             # 1.4 px at 32
        line = np.clip(0.5 + line_width - abs(distance), 0, 1)

        # A pale or dark background, a saturated fill of another hue, an outline in contrast.
        dark = u[5] < 0.5
        value = np.where(dark, 0.12 + 0.2 * u[6], 0.75 + 0.2 * u[6])
        saturation = 0.25 + 0.35 * u[8]
        corner_a = hsv_to_rgb(u[7], saturation, value)
        corner_b = hsv_to_rgb(u[7] + 0.3 * u[9] - 0.15, saturation,
                              value + np.where(dark, 0.2, -0.2))
        fill = hsv_to_rgb(u[7] + 0.25 + 0.5 * u[10], 0.75 + 0.25 * u[11],
                          np.where(dark, 1.0, 0.8))
        outline = np.where(dark, 0.97, 0.08).astype(np.float32)

        # The background goes from the colour of one corner to that of the other.
        slope = 2 * np.pi * u[13]
        drift = np.clip(0.5 + 0.4 * (X * np.cos(slope) + Y * np.sin(slope)), 0, 1)
        image = corner_a + (corner_b - corner_a) * drift
        image += (fill * self.texture(x * radius, y * radius, u) - image) * inside
        image += (outline - image) * line
        return torch.from_numpy(np.rint(image * 255).clip(0, 255).astype(np.uint8)), labels

    def texture(self, x, y, u):
        """Shade of the fill: plain, stripes, checks or dots of period 0.3 (4.8 px at 32 px)."""
        across = np.sin(x * (2 * np.pi / 0.3))
        down = np.sin(y * (2 * np.pi / 0.3))
        kind = np.floor(4 * u[12])
        pattern = np.select([kind == 1, kind == 2, kind == 3],
                            [down, 1.6 * across * down, across + down - 0.5])
        return np.where(kind == 0, 1, 0.78 + 0.22 * np.clip(2 * pattern, -1, 1))


# ---- CIFAR, from the official binary archives (no pickles) --------------------------------------
CIFAR = {
    "cifar10": dict(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin", names="batches.meta.txt", label_bytes=1,
        train=[f"data_batch_{i}.bin" for i in range(1, 6)], val=["test_batch.bin"]),
    "cifar100": dict(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        folder="cifar-100-binary", names="fine_label_names.txt", label_bytes=2,
        train=["train.bin"], val=["test.bin"]),
}


def open_cifar(name, data_dir, image_size):
    """(train, val) of CIFAR-10 or CIFAR-100; val is the official test set."""
    if image_size != 32:
        raise UserError(f"{name} images are 32 px, --image-size is {image_size}: make it 32")
    about = CIFAR[name]
    root = data_dir / about["folder"]
    if not root.is_dir():
        archive = data_dir / Path(about["url"]).name
        if not archive.exists():
            data_dir.mkdir(parents=True, exist_ok=True)
            print(f"downloading {about['url']} to {archive}")
            torch.hub.download_url_to_file(about["url"], str(archive), about["sha256"])
        # Unpacked elsewhere, then renamed: an interrupted one leaves no half of a data set.
        with tempfile.TemporaryDirectory(dir=data_dir) as elsewhere:
            with tarfile.open(archive) as tar:
                tar.extractall(elsewhere, filter="data")
            os.replace(Path(elsewhere) / about["folder"], root)
    class_names = (root / about["names"]).read_text().split()
    splits = []
    for split in ("train", "val"):
        # Each image: its labels, of which the last one counts, then 3 x 32 x 32 bytes.
        head = about["label_bytes"]
        records = np.concatenate([np.fromfile(root / file, np.uint8) for file in about[split]])
        records = torch.from_numpy(records.reshape(-1, head + 3072))
        images = records[:, head:].unflatten(1, (3, 32, 32))
        splits.append(InMemory(images, records[:, head - 1].long(), class_names))
    return splits


class InMemory:
    """Images uint8 (n, 3, H, W) and labels (n,) as a data set."""

    def __init__(self, images, labels, class_names=None):
        self.images = images
        self.labels = labels
        self.class_names = class_names

    def __len__(self):
        return len(self.images)

    def fingerprint(self):
        digest = hashlib.sha256(self.images.contiguous().numpy())
        digest.update(self.labels.numpy())
        return digest.hexdigest()[:16]

    def batch(self, indices, crops=None):
        indices = torch.as_tensor(indices)
        return self.images[indices], self.labels[indices]


# ---- folders of images --------------------------------------------------------------------------
# train/ and val/ inside, or one folder per class, or images alone (one class)

EXTENSIONS = ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"
TRAIN = "train", "training"                      # names of the parts, in any case, best first
HELD_OUT = "val", "valid", "validation", "eval", "evaluation", "dev", "test", "testing"
KAGGLE = "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC"   # where Kaggle's ImageNet has train and val
ALONE = "images"                                 # the class of images without class folders


def open_folder(root, image_size, workers):
    """(train, val) of a folder. Class names are its folders', in words where ImageNet has some."""
    root = Path(root)
    root = next((root / place for place in KAGGLE if (root / place).is_dir()), root)
    folders = {name.lower(): root / name for name in visible(os.listdir(root))
               if (root / name).is_dir()}
    parts = [folders[name] for name in TRAIN if name in folders]
    held_out = [folders[name] for name in HELD_OUT if name in folders]
    # Beside other folders and without a held-out one, "train" is a class, such as of vehicles.
    if not parts or not held_out and len(folders) > 1:
        parts, held_out = [root], []
    train = list_classes(parts[0])
    if held_out:
        val = list_classes(held_out[0])
    else:
        train, val = hold_out(root, train)
    if list(val) == [ALONE] and len(train) > 1:              # Kaggle's val has no folders
        solution = read_table(root, "LOC_val_solution.csv", ",")
        files = val[ALONE]
        val = {name: [] for name in train}
        for file in files:
            val.setdefault(solution.get(Path(file).stem, "?").split()[0], []).append(file)
    if val.keys() != train.keys():
        odd = sorted(val.keys() ^ train.keys())
        raise UserError(f"{root}: {len(train)} classes in train and {len(val)} in val; "
                        f"{', '.join(odd[:5])} in one of them only: make them the same")
    used = sum(len(files) for files in [*train.values(), *val.values()])
    left_out = sum(len(names) for _, _, names in os.walk(root)) - used
    if left_out > 0:
        print(f"{root}: {left_out} files beside the {used} images are left out")
    words = read_table(root, "LOC_synset_mapping.txt", " ")
    names = [f"{words[name]} ({name})" if name in words else name for name in train]
    return (Folder(root, list(train.values()), image_size, workers, names),
            Folder(root, list(val.values()), image_size, workers, names))


def visible(names):
    """Sorted names, without those that other programs leave behind, .DS_Store and __MACOSX."""
    return [name for name in sorted(names) if not name.startswith((".", "__MACOSX"))]


def list_classes(folder):
    """{class name: files}: sub-folders are classes; images alone are one class."""
    classes = {name: images_below(folder / name) for name in visible(os.listdir(folder))
               if (folder / name).is_dir()}
    if not classes:
        return {ALONE: images_below(folder)}
    # If all of them hold images in the same folders, those may be the classes.
    inner = [{os.path.dirname(file)[len(str(folder / name)) + 1:] for file in files}
             for name, files in classes.items()]
    shared = sorted(set.intersection(*inner) - {""})
    if len(shared) > 1:
        about = f"{', '.join([*classes][:3])} in {folder} all hold {', '.join(shared[:3])}"
        if len(classes) > 1:
            raise UserError(f"{about}: name one of them, or call them train and val")
        print(f"warning: {about} .., which become one class: --data {folder / min(classes)}?")
    return classes


def images_below(folder):
    """Paths of all image files below a folder, sorted, so that image i is the same everywhere."""
    files, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        # A link may lead to a folder that was seen already, even to one above it.
        folders[:] = visible(folders)
        if os.path.realpath(where) in seen:
            folders[:] = names[:] = []
        seen.add(os.path.realpath(where))
        files += [os.path.join(where, name) for name in visible(names)
                  if os.path.splitext(name)[1].lower() in EXTENSIONS]
    if not files:
        raise UserError(f"{folder} has 0 images ({' '.join(EXTENSIONS)}): add some or remove it")
    return sorted(files)


def read_table(root, name, separator):
    """{first word: the rest} of the lines of a file of ImageNet's, in a folder or above it."""
    for place in (root, *root.resolve().parents[:3]):
        if (place / name).is_file():
            parts = [line.partition(separator) for line in open(place / name, encoding="utf-8")]
            return {first: rest.strip() for first, _, rest in parts if rest.strip()}
    return {}


def hold_out(root, classes):
    """(train, val), each {class name: files}; val gets about 5 % of the files, at least one. The
    hash of its name decides about a file, so that a new one changes nothing for the others.
    Only a folder of fewer than about 150 files may choose anew."""
    def number(file):
        name = Path(file).relative_to(root).as_posix()
        return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10_000

    # A small folder may have too few such files. Then it takes more: a covariance needs two.
    for limit in range(500, 10_001, 500):
        held_out = set()
        for files in classes.values():                       # each keeps a file for training
            held_out.update([file for file in files if number(file) < limit][:len(files) - 1])
        if len(held_out) > 1:
            break
    if not held_out:
        raise UserError(f"{root} has one image per class: add more, or folders train and val")
    print(f"{root} has no val folder: {len(held_out)} images, about 5 %, are held out")
    return ({name: [f for f in files if f not in held_out] for name, files in classes.items()},
            {name: [f for f in files if f in held_out] for name, files in classes.items()})


class Folder:
    """Image files by class, decoded and cropped by a few threads when a batch asks for them.
    image_size None: whole pictures, which must have one size."""

    def __init__(self, root, files_by_class, image_size, workers, class_names=None):
        self.root = root
        self.class_names = class_names
        self.files = list(chain.from_iterable(files_by_class))
        counts = torch.tensor([len(files) for files in files_by_class])
        self.labels = torch.arange(len(counts)).repeat_interleave(counts)
        self.image_size = image_size
        self.broken = set()
        self.pool = ThreadPoolExecutor(max(1, workers))          # Pillow decodes outside the lock

    def __len__(self):
        return len(self.files)

    def fingerprint(self):
        """Of names, sizes, times of change and labels: editing or exchanging files changes it."""
        digest = hashlib.sha256()
        for file, label in zip(self.files, self.labels.tolist()):
            about = os.stat(file)
            name = os.path.relpath(file, self.root)
            digest.update(f"{label} {name} {about.st_size} {about.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def load(self, i, crop):
        """(pixels (S, S, 3), label) of file i, or of the next one that is not broken."""
        for number in chain(range(i, len(self)), range(i)):
            try:
                pixels = decode_image(self.files[number], self.image_size, crop)
                return pixels, self.labels[number]
            except UserError as error:
                if self.image_size is None:         # a comparison counts each file
                    raise
                if number not in self.broken:
                    self.broken.add(number)
                    print(f"{error}: the next image stands in", file=sys.stderr)
        raise UserError(f"{self.root}: none of its {len(self)} images can be read")

    def batch(self, indices, crops=None):
        """crops (B, 3): scale, y, x of any_crop; None crops at the centre."""
        indices = torch.as_tensor(indices).tolist()
        crops = [None] * len(indices) if crops is None else crops.tolist()
        images, labels = zip(*self.pool.map(self.load, indices, crops))
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return images.contiguous(), torch.stack(labels)


# ---- networks that compare images: LPIPS, and small classifiers ---------------------------------
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
LPIPS_URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/"
             "weights/v0.1/vgg.pth")


def load_perceptual(train, val, image_size, args, job):
    """The perceptual distance between two batches of images, as --perceptual-net says, or None."""
    net = args.perceptual_net
    if net == "classifier" and len(train.class_names) == 1:
        print("a classifier learns nothing from one class: no perceptual loss")
        return None

    def load():
        if net == "vgg":
            return load_lpips(job.device)
        named = None if net == "classifier" else net
        usual = shipped(f"perceptual-{args.data}.pt") or args.out / "perceptual.pt"
        return find_classifier(named, usual, PERCEPTUAL, args.data, (train, val), image_size,
                               job).distance
    return first_rank_first(load, job)


def feature_distance(taps_a, taps_b, weights):
    """LPIPS of two lists of features (B, C, H, W): the sum of the mean squared differences of unit
    features, weighted per channel -> (B,)."""
    def unit(x):
        x = x.float()
        # The 1e-20 keeps the gradient of the root finite where all channels are 0.
        return x / ((x.square().sum(1, keepdim=True) + 1e-20).sqrt() + 1e-10)

    total = 0
    for a, b, weight in zip(taps_a, taps_b, weights):
        total = total + ((unit(a) - unit(b)).square() * weight).sum(1).mean((1, 2))
    return total


class LPIPS(nn.Module):
    """LPIPS v0.1 with VGG16 (Zhang et al. 2018): two batches (B, 3, H, W) in [-1, 1] -> (B,)."""
    stages = (64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for stage in self.stages:                # the layers are numbered as torchvision's
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        self.lin = nn.ParameterList(torch.zeros(stage[-1]) for stage in self.stages)
        shift = torch.tensor([-.030, -.088, -.188]).view(3, 1, 1)
        scale = torch.tensor([.458, .448, .450]).view(3, 1, 1)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def taps(self, x):
        """Features after relu1_2, 2_2, 3_3, 4_3 and 5_3."""
        x = ((x - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield x
            x = layer(x)
        yield x

    def forward(self, a, b):
        weights = [weight.view(-1, 1, 1) for weight in self.lin]
        return feature_distance(self.taps(a), self.taps(b), weights)


def load_published(url, name=None):
    """Weights from the web, downloaded once to where PyTorch keeps them (TORCH_HOME moves it).
    Where the file's name ends with a hash, the download must have it."""
    return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True,
                                              file_name=name, weights_only=True)


def load_lpips(device="cpu"):
    """LPIPS with the published weights (VGG16: 528 MB)."""
    trunk = load_published(VGG_URL)
    layers = load_published(LPIPS_URL, name="lpips-v0.1-vgg.pth")
    model = LPIPS()
    model.features.load_state_dict({name.removeprefix("features."): weight for name, weight in
                                    trunk.items() if name.startswith("features.")})
    model.lin.load_state_dict({name[3]: weight.flatten()         # lin0.model.1.weight ...
                               for name, weight in layers.items()})
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


class Classifier(nn.Module):
    """Small residual network: uint8 (B, 3, S, S) -> features (B, C), None, logits (B, classes).
    Trained on the data set at hand. JUDGE measures, PERCEPTUAL may serve in the perceptual loss.
    They differ in size and seed, because a loss must not be its own judge."""

    def __init__(self, num_classes, image_size, widths, pool=False):
        super().__init__()
        self.image_size = image_size
        def conv(channels_in, channels, stride=1):
            return nn.Sequential(nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
                                 nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

        self.stem = conv(3, widths[0])
        # Convolving before halving is four times the work, and recognises more images.
        self.down = nn.ModuleList(
            nn.Sequential(conv(a, b), nn.MaxPool2d(2)) if pool else conv(a, b, stride=2)
            for a, b in zip(widths, widths[1:]))
        self.residual = nn.ModuleList(conv(width, width) for width in widths[1:])
        self.head = nn.Linear(widths[-1], num_classes)

    def taps(self, x):
        """Images in [-1, 1] -> features (B, C, S/2^i, S/2^i) of each scale i."""
        features = [self.stem(x.contiguous(memory_format=torch.channels_last))]
        for down, residual in zip(self.down, self.residual):
            x = down(features[-1])
            features.append(x + residual(x))
        return features

    def forward(self, images):
        S = self.image_size
        if images.shape[2:] != (S, S):
            raise UserError(f"images are {images.shape[2:]}, the classifier's {S} px: resize them")
        features = self.taps(to_float(images))[-1].mean((2, 3))
        return features, None, self.head(features)

    def distance(self, a, b):
        """As LPIPS, with these features and equal weights: two batches in [-1, 1] -> (B,)."""
        return feature_distance(self.taps(a), self.taps(b), repeat(1.0))


JUDGE = dict(widths=(32, 48, 96, 192), seed=0)
PERCEPTUAL = dict(widths=(32, 64, 128, 128), seed=1)


def shipped(name):
    """A file of docs/weights, or None. It comes with the code, so that all have the same judge."""
    path = Path(__file__).parent / "docs" / "weights" / name
    return path if path.exists() else None


def find_classifier(named, usual, kind, data_name, data, image_size, job):
    """The classifier, of kind JUDGE or PERCEPTUAL, in the file that a flag has named, or else in
    the usual one, which is trained on data (train, val) when absent. data None: any will do."""
    path = Path(named or usual)
    about = {}
    if data:
        # A folder's own name, because it may be moved. The seed tells which kind it is.
        about = dict(data=Path(data_name).name, image_size=image_size,
                     classes=data[0].class_names, seed=kind["seed"])
    if data and not named and not path.exists():     # a mistyped name must not train one
        print(f"training a classifier for {path}, minutes on a CPU")
        model, accuracy = train_classifier(*data, image_size, job, **kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, "classifier", **about | kind, accuracy=accuracy,
                        model=model.state_dict())
    return load_classifier(path, job.device, **about)


def load_classifier(path, device="cpu", **about):
    """The Classifier in a file. about: what the file must say, such as image_size=32."""
    saved = read_checkpoint(path, "classifier")
    saved["data"] = Path(saved.get("data", "")).name
    for name, value in about.items():
        if saved[name] != value:
            raise UserError(f"{path} is of {name} {saved[name]}, not {value}: name another file")
    model = Classifier(len(saved["classes"]), saved["image_size"], saved["widths"],
                       saved.get("pool", False))
    model.load_state_dict(saved["model"])
    print(f"{path}: test accuracy {saved['accuracy']:.1%}")
    model.to(device, memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def train_classifier(train, val, image_size, job, widths, seed, pool=False, steps=3000,
                     batch_size=128):
    """(classifier, accuracy on held-out images), trained from scratch: minutes on a CPU."""
    torch.manual_seed(random_streams("classifier weights", seed, 0).item())
    model = Classifier(len(train.class_names), image_size, widths, pool)
    model = model.to(job.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="training the classifier", disable=None):
        torch.manual_seed(random_streams("classifier step", seed, step).item())
        chosen = batch_indices(len(train), batch_size, step, seed, "classifier order")
        images, labels = train.batch(chosen)
        with autocast(job):
            _, _, logits = model(augment(images).to(job.device))
            loss = F.cross_entropy(logits, labels.to(job.device), label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    hits = []
    for chosen in torch.arange(min(len(val), 10_000)).split(500):
        images, labels = val.batch(chosen)
        with torch.no_grad():
            _, _, logits = model(images.to(job.device))
        hits.append(logits.argmax(-1).cpu() == labels)
    return model, torch.cat(hits).double().mean().item()


def augment(images):
    """Random mirror images, shifts of up to an eighth of the side, and a grey square of a quarter
    of the side, of a batch (B, 3, S, S)."""
    B, _, S, _ = images.shape
    pad = S // 8
    mirrored = torch.rand(B, 1, 1, 1) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    images = F.pad(images.float(), (pad, pad, pad, pad), mode="reflect")
    rows = torch.randint(2 * pad + 1, (B, 1)) + torch.arange(S)                    # (B, S)
    columns = torch.randint(2 * pad + 1, (B, 1)) + torch.arange(S)
    image = torch.arange(B)[:, None, None]
    images = images[image, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    # Without the square (cutout) a network that sees CIFAR-10 twenty times learns it by heart.
    near_row = (torch.randint(S, (B, 1)) - torch.arange(S)).abs() <= pad           # (B, S)
    near_column = (torch.randint(S, (B, 1)) - torch.arange(S)).abs() <= pad
    square = near_row[:, None, :, None] & near_column[:, None, None]               # (B, 1, S, S)
    return torch.where(square, 127.5, images)


# ---- Inception-v3 as in the 2015 TensorFlow graph that FID is defined by ------------------------
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")


def load_inception(path=None, device="cpu"):
    """InceptionV3 with the published weights, from a file or downloaded once (95 MB)."""
    model = InceptionV3()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True) if path else
                          load_published(INCEPTION_URL))
    return model.to(device, memory_format=torch.channels_last).requires_grad_(False)


class InceptionV3(nn.Module):
    """uint8 images (B, 3, H, W) -> pool3 (B, 2048) for FID, precision and recall; spatial
    (B, 2023) for sFID; logits (B, 1008), without bias, for IS."""

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
        self.Mixed_6a = Mixed(288, max_pool, 2, branch3x3=[(384, 3)],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[])
        self.Mixed_6b = mixed_6(128)
        self.Mixed_6c = mixed_6(160)
        self.Mixed_6d = mixed_6(160)
        self.Mixed_6e = mixed_6(192)
        self.Mixed_7a = Mixed(768, max_pool, 2, branch3x3=[(192, 1), (320, 3)],
                              branch7x7x3=[(192, 1), (192, ROW), (192, COLUMN), (192, 3)],
                              branch_pool=[])
        self.Mixed_7b = mixed_7(1280, average_pool)
        self.Mixed_7c = mixed_7(2048, max_pool)
        self.fc = nn.Linear(2048, 1008)
        self.eval()

    @torch.no_grad()
    def forward(self, images):
        x = (tf1_resize(images, 299) - 128) / 128                       # (B, 3, 299, 299)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)                                   # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)                                   # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))          # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))          # (B, 768, 17, 17)
        x = self.Mixed_6d(x)
        # Seven channels of its branch1x1, flattened in TensorFlow's order: NHWC.
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)           # (B, 2023)
        x = self.Mixed_7a(self.Mixed_6e(x))                         # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))                         # (B, 2048, 8, 8)
        pool3 = x.mean((2, 3))                                          # (B, 2048)
        return pool3, spatial, pool3 @ self.fc.weight.T


def tf1_resize(images, size):
    """TensorFlow 1's bilinear resize: (B, 3, H, W) -> float32 (B, 3, size, size), same range.
    Output pixel i reads at i H / size: no half-pixel centres, no antialiasing. Another resize
    moves FID by up to 2."""
    def interpolation(n):                           # (size, n), two weights per row
        position = torch.arange(size) * torch.tensor(n / size)          # float32, as TF's
        low = position.floor().long()
        share = (position - low)[:, None]
        eye = torch.eye(n)
        matrix = (1 - share) * eye[low] + share * eye[(low + 1).clamp(max=n - 1)]
        return matrix.to(images.device)

    H, W = images.shape[-2:]
    return interpolation(H) @ images.float() @ interpolation(W).T


class ConvBN(nn.Module):
    """Convolution, batch norm, ReLU. NOTE eps 1e-3: PyTorch's 1e-5 moves the features by 0.4 %."""

    def __init__(self, channels_in, channels, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x, stride):
    """NOTE TensorFlow leaves the padding out of its averages, PyTorch's default does not."""
    return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)


def max_pool(x, stride):
    """NOTE Mixed_7c takes the maximum, where the published architecture takes the average."""
    return F.max_pool2d(x, 3, stride, padding=1 if stride == 1 else 0)


ROW, COLUMN = (1, 7), (7, 1)        # kernels: (height, width)
FORK = {"a": (1, 3), "b": (3, 1)}   # two convolutions side by side, by the end of their names


class Mixed(nn.Module):
    """An Inception block: branches side by side, each a chain of convolutions.
    branches: {name: [(channels, kernel), ...]}, with torchvision's names. branch_pool starts with
    the pooling. The pooling and the last convolution of each branch have the stride."""

    def __init__(self, channels_in, pool, stride=1, **branches):
        super().__init__()
        self.pool = pool
        self.stride = stride
        self.steps = {}             # {branch: [names of the convolutions of each step]}
        for branch, convs in branches.items():
            self.steps[branch] = []
            channels = channels_in
            for number, (width, kernel) in enumerate(convs, 1):
                name = f"{branch}_{number}" if len(convs) > 1 else branch
                kernels = kernel if kernel is FORK else {"": kernel}
                step_stride = stride if number == len(convs) else 1
                padding = "same" if step_stride == 1 else "valid"
                for end, size in kernels.items():
                    conv = ConvBN(channels, width, size, step_stride, padding)
                    self.add_module(name + end, conv)
                self.steps[branch].append([name + end for end in kernels])
                channels = width

    def forward(self, x):
        outputs = []
        for branch, steps in self.steps.items():
            ends = [self.pool(x, self.stride) if branch == "branch_pool" else x]
            for parts in steps:                     # only the last step has two parts
                ends = [getattr(self, part)(ends[0]) for part in parts]
            outputs += ends
        return torch.cat(outputs, 1)


def mixed_5(channels, pooled):
    return Mixed(channels, average_pool, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                 branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pooled, 1)])


def mixed_6(c):
    return Mixed(768, average_pool, branch1x1=[(192, 1)],
                 branch7x7=[(c, 1), (c, ROW), (192, COLUMN)],
                 branch7x7dbl=[(c, 1), (c, COLUMN), (c, ROW), (c, COLUMN), (192, ROW)],
                 branch_pool=[(192, 1)])


def mixed_7(channels, pool):
    return Mixed(channels, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, FORK)],
                 branch3x3dbl=[(448, 1), (384, 3), (384, FORK)], branch_pool=[(192, 1)])


# ---- line charts --------------------------------------------------------------------------------
COLOURS = "#1f5fa8", "#d1495b", "#2e933c", "#8d5fd3", "#e08e1b", "#555555", "#17a2b8", "#a0522d"


def save_charts(path, rows, x_column, panels, log=False):
    """PNG of line charts side by side; panels: {title: columns of the rows}."""
    charts = [line_chart(title, rows, x_column, columns, log) for title, columns in panels.items()]
    save_picture(path, Image.fromarray(np.hstack(charts)))


def line_chart(title, rows, x_column, columns, log=False):
    """Pillow picture of columns of a table; the rows stand at equal distances on the x axis.
    log: the y axis is logarithmic, if all values allow it. A row may lack a column."""
    left, right, top, bottom = 96, 808, 164, 540            # twice as large as a page shows it
    values = [row[c] for row in rows for c in columns if row.get(c) is not None]
    low, high = min(values), max(values)
    step = (right - left) / max(len(rows) - 1, 1)
    log = log and low > 0
    scale = np.log if log else float

    def y_pixel(value):
        share = (scale(value) - scale(low)) / (scale(high) - scale(low) or 1)
        return bottom - (bottom - top) * share

    picture = Image.new("RGB", (840, 620), "white")
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(size=22)
    draw.text((left, 24), title, fill="black", anchor="lm")
    draw.text(((left + right) / 2, 608), x_column, fill="black", anchor="mb")
    for value in (np.geomspace if log else np.linspace)(low, high, 6):
        draw.line([(left, y_pixel(value)), (right, y_pixel(value))], fill="#dddddd", width=2)
        draw.text((left - 12, y_pixel(value)), f"{value:.3g}", fill="black", anchor="rm")
    for i in range(0, len(rows), math.ceil(len(rows) / 10)):
        draw.text((left + i * step, bottom + 14), str(rows[i][x_column]), "black", anchor="mt")
    for number, (column, colour) in enumerate(zip(columns, cycle(COLOURS))):
        x, y = left + 240 * (number % 3), 64 + 30 * (number // 3)       # three names a row
        draw.text((x, y), column, fill=colour, anchor="lm")
        points = [(left + i * step, y_pixel(row[column]))
                  for i, row in enumerate(rows) if row.get(column) is not None]
        draw.line(points, fill=colour, width=4)
        for x, y in points:                                             # a lone one, too
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
    return picture


if __name__ == "__main__":
    run_script(main, parse_args)
