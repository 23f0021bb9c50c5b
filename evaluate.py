"""Measure samples (FID, sFID, IS, precision, recall) and reconstructions (rFID, PSNR, SSIM, LPIPS)

  python evaluate.py compare samples.npz VIRTUAL_imagenet256_labeled.npz   # folders or .npz files
  python evaluate.py stats /my/images reference.npz                  # statistics, in ADM's layout
  python evaluate.py generation --data cifar10                       # samples of the generator
  python evaluate.py reconstruction --data cifar10 --levels 1,8,64   # held-out images, rebuilt
  python evaluate.py truncation --data cifar10                       # both, at 1, 2, 4 ... tokens
  python evaluate.py probe --data cifar10 --against out/flat         # what earlier tokens predict

The definitions are those of ADM's TensorFlow evaluator, which most published tables use. Each
command prints a table and appends it as a JSON line to out/<data>/evaluations.jsonl. With
`torchrun --nproc-per-node 8 -- evaluate.py ...` the processes share the images.
"""
import argparse
import json
import math
import os
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from spectralar import (UserError, code_fingerprint, dct2, fingerprint, in_window, largest_window,
                        load_generator, load_tokenizer, load_weights, low_pass, read_weights)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from sample import (add_sampling_flags, balanced_labels, check_sampling_flags, check_tokens,
                    draw_codes, load_models, sampling_job, sampling_settings)
from train_gpt import held_out_bits
from train_tokenizer import (CIFAR, JUDGE, all_sum, base_parser, codebook_use, decode_image,
                             download, effective_rank, finish_args, first_rank_first, gather,
                             images_below, load_classifier, load_lpips, make_writable, open_data,
                             pick_images, psnr, run_script, save_image_grid, save_picture,
                             spread_levels, to_float, to_uint8, versions, weights_folder)


def parse_args(argv=None):
    parser, preset = base_parser(__doc__, argv)
    parser.add_argument("command", choices=("compare", "stats", "generation", "reconstruction",
                                            "truncation", "probe"))
    parser.add_argument("paths", nargs="*",
                        help="compare: SAMPLES REFERENCE; stats: IMAGES FILE.npz")
    add = parser.add_argument_group("measuring").add_argument
    add("--features", choices=("inception", "classifier"), help="network that measures (default: "
        "the classifier for runs on shapes and CIFAR, else inception)")
    add("--inception", metavar="FILE", help="weights of Inception (default: downloaded once)")
    add("--classifier", metavar="FILE", help="the classifier that measures, trained and saved if "
        "absent (default: classifier.pt in --out); use the same one for all runs that you compare")
    add("--reference", metavar="PATH", help="images or statistics to compare samples with "
        "(default: up to 50,000 training images)")
    add("--num", type=int, help="images to sample (default: 50,000; with the classifier 10,000), "
        "to reconstruct (default: all held out), to fit the probe to (default: 50,000)")
    add("--levels", type=comma_separated, help="reconstruction, truncation: numbers of tokens, "
        "such as 1,2,4 (default: all tokens; truncation: 1, 2, 4 ...)")
    add("--against", metavar="FOLDER", help="probe: the folder of another run to compare with")
    add("--lpips", action=argparse.BooleanOptionalAction,
        help="reconstruction: measure LPIPS too (default: with inception only)")
    add("--vgg", metavar="FILE", help="VGG16 weights of LPIPS (default: downloaded once, 528 MB)")
    add("--lpips-weights", metavar="FILE",
        help="linear weights of LPIPS (default: downloaded once)")
    add("--batch-size", type=int, default=64, help="images per batch of one process")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="threads that decode image files")
    add("--overwrite", action="store_true", help="stats: replace the file")
    add_sampling_flags(parser)
    args = parser.parse_intermixed_args(argv)       # the paths may stand after the flags

    measures_run = args.command not in ("compare", "stats")
    expected = 0 if measures_run else 2
    if len(args.paths) != expected:
        parser.error(f"{args.command} takes {expected} paths, not {len(args.paths)}")
    if args.command != "generation" and args.tokens is not None:
        parser.error(f"--tokens is {args.tokens}, but {args.command} does not use it: use "
                     f"--levels")
    if args.command == "generation" and args.levels:
        parser.error("--levels is of reconstruction and truncation: use --tokens")
    if args.command == "reconstruction" and args.tokenizer:
        parser.error("--tokenizer is of generation: name the folder of that tokenizer by --out")

    # Defaults that depend on other flags. After this function, args is only read.
    small_images = measures_run and args.data in ("shapes", *CIFAR)
    args.features = args.features or ("classifier" if small_images else "inception")
    if args.lpips is None:
        args.lpips = args.features == "inception"
    if args.features == "inception" and not measures_run:
        args.out = args.out or "out"                # such a comparison belongs to no data set
    args.image_size = preset["image_size"]          # what a classifier reads in compare and stats
    finish_args(parser, args)
    check_sampling_flags(parser, args)
    return args


def comma_separated(text):
    return [int(number) for number in text.split(",")]


def main(args):
    job = sampling_job(args)
    commands = dict(compare=run_compare, stats=run_stats, generation=run_generation,
                    reconstruction=run_reconstruction, truncation=run_truncation, probe=run_probe)
    start = time.perf_counter()
    make_writable(args.out)                     # met here, before the work
    rows, more = commands[args.command](args, job)
    if job.rank == 0:
        print_table(rows)
        record = dict(command=" ".join(sys.argv), features=args.features, seed=args.seed,
                      results=rows, **more, versions=versions(),
                      seconds=round(time.perf_counter() - start, 1))
        with open(args.out / "evaluations.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def print_table(rows):
    """Print rows, each a dict of the same columns."""
    lines = [list(rows[0])] + [[table_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    for line in lines:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def table_cell(value):
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


# -------------------------------------------------------------------------------------------------
# compare and stats: any images. Each command returns (rows of the table, more for the record)

def run_compare(args, job):
    network = load_network(args, args.image_size, job)
    samples = measure_path(args.paths[0], network, args, job)
    reference = measure_path(args.paths[1], network, args, job)
    row = {"samples": args.paths[0], "images": samples.count,
           "reference": args.paths[1], "reference images": reference.count}
    row |= compare_sets(samples, reference, args, job)
    return [row], dict(counts=[samples.count, reference.count])


def run_stats(args, job):
    source, target = args.paths
    if Path(target).exists() and not args.overwrite:
        raise UserError(f"{target} exists: --overwrite replaces it")
    if not Path(target).absolute().parent.is_dir():
        raise UserError(f"{Path(target).parent} is not a folder: make it first")
    make_writable(Path(target).absolute().parent)
    features = measure_path(source, load_network(args, args.image_size, job), args, job)
    if features.count is None:
        raise UserError(f"{source} holds statistics already: name images")

    # As in ADM's reference, up to 10,000 images stand beside the statistics of all.
    if job.rank == 0:
        pixels, _ = features.images.batch(pick_images(len(features.images), 10_000))
        arrays = dict(arr_0=pixels.permute(0, 2, 3, 1))
        arrays["mu"], arrays["sigma"] = features.moments
        if features.spatial is not None:
            arrays["mu_s"], arrays["sigma_s"] = features.spatial
        with open(f"{target}.tmp", "wb") as file:
            np.savez(file, **arrays)
        os.replace(f"{target}.tmp", target)
    return [dict(images=source, count=features.count, statistics=target)], {}


def load_network(args, image_size, job, data=None):
    """The network that measures: InceptionV3, or the classifier of --data. data: (train, val)."""
    if args.features == "inception":
        load = partial(load_inception, args.inception, job.device)
    else:
        path = args.classifier or args.out / "classifier.pt"
        train, val = data or open_data(args, image_size, job)
        load = partial(load_classifier, path, JUDGE, args.data, train, val, image_size, job)
    return first_rank_first(load, job)


def distance_name(args):
    """Only Inception's distance is FID. That of a classifier does not compare with it."""
    return "FID" if args.features == "inception" else "FD-classifier"


def warn_of_few_images(count):
    """count is None where only statistics are known."""
    if count is not None and count < 2048:
        print(f"warning: the Frechet distance of {count} images is biased: use at least 2,048")


def compare_sets(samples, reference, args, job):
    """{metric: value} of samples against a reference, computed by the first rank; {} elsewhere."""
    if job.rank:
        return {}
    own, other = len(samples.moments[0]), len(reference.moments[0])
    if own != other:
        raise UserError(f"features of width {own} against a reference of width {other}: make the "
                        f"reference with the same --features")
    warn_of_few_images(samples.count)
    warn_of_few_images(reference.count)
    result = {distance_name(args): frechet_distance(*samples.moments, *reference.moments)}
    if samples.spatial is not None and reference.spatial is not None:
        result["sFID"] = frechet_distance(*samples.spatial, *reference.spatial)
    # ADM averages the scores of parts of 5,000 samples.
    if args.features == "inception" and samples.logits is not None:
        result["IS splits"] = max(1, round(samples.count / 5000))
        result["IS"], result["IS std"] = inception_score(samples.logits, result["IS splits"])
    # ADM takes 10,000 reference images. Fewer than 4 have no third neighbour.
    if samples.pool is not None and reference.pool is not None:
        real = reference.pool[pick_images(len(reference.pool), 10_000)]
        if min(len(real), len(samples.pool)) > 3:
            result["precision"], result["recall"] = precision_recall(real, samples.pool)
    return result


# -------------------------------------------------------------------------------------------------
# generation, reconstruction, truncation: a trained run

def run_generation(args, job):
    gpt, tokenizer, class_names = load_models(args, job)
    tokens = check_tokens("--tokens", args.tokens, gpt.config.num_tokens)
    train, _, network = open_run(tokenizer, class_names, args, job)
    return measure_generation(gpt, tokenizer, network, train, [tokens], args, job)


def open_run(tokenizer, class_names, args, job):
    """(train, val, network that measures); class_names: those of the generator, or None."""
    for level in args.levels or []:
        check_tokens("--levels", level, tokenizer.config.num_tokens)
    data = open_data(args, tokenizer.config.image_size, job)
    train, val = data
    # Samples of one data set, judged by another, would get plausible numbers.
    if class_names not in (None, train.class_names):
        raise UserError(f"{args.out / 'gpt.pt'} has learned {len(class_names)} classes (first: "
                        f"{class_names[0]}), --data {args.data} has {len(train.class_names)} "
                        f"(first: {train.class_names[0]}): give the --data that it learned from")
    return train, val, load_network(args, tokenizer.config.image_size, job, data)


@torch.no_grad()
def measure_generation(gpt, tokenizer, network, train, levels, args, job):
    """(rows, more) of samples decoded at each level, against training images or --reference."""
    # Each rank draws the codes of its share once, and decodes them at every level.
    num = args.num or (50_000 if args.features == "inception" else 10_000)
    labels = balanced_labels(num, range(gpt.config.num_classes), args.seed)
    drawn = []
    if args.reference:                              # first: its name may be wrong
        reference = measure_path(args.reference, network, args, job)
    for rows in own_batches("sampling", num, args.batch_size, job):
        drawn.append(draw_codes(gpt, labels[rows], rows.start, max(levels), args, job))
    if not args.reference:
        chosen = pick_images(len(train), 50_000)
        batches = read_batches("training images", train, chosen, args.batch_size, job)
        reference = extract_features(batches, network, job)
    results = []
    for level in levels:
        bar = tqdm(drawn, desc=f"{level} tokens", disable=True if job.rank else None)
        batches = (to_uint8(tokenizer.decode(codes, level)) for codes in bar)
        samples = extract_features(batches, network, job)
        result = compare_sets(samples, reference, args, job)
        if args.features == "classifier":
            recognised = samples.logits.argmax(-1) == labels
            result["accuracy"] = recognised.double().mean().item()
        results.append(result)
    return results, dict(checkpoint=fingerprint(gpt), counts=[num, reference.count],
                         reference=args.reference or "training images",
                         sampling=dict(sampling_settings(args), stop=max(levels)))


def run_reconstruction(args, job):
    tokenizer = load_tokenizer(args.out / "tokenizer.pt", job.device)
    levels = args.levels or [tokenizer.config.num_tokens]
    _, val, network = open_run(tokenizer, None, args, job)
    rows, _, more = measure_reconstructions(tokenizer, network, val, levels, args, job)
    return rows, more


@torch.no_grad()
def measure_reconstructions(tokenizer, network, val, levels, args, job):
    """(rows, energies, more) of held-out images, reconstructed at each level, against the images.

    energies: per level a list of the octaves' energies, against those of the images, in dB.
    """
    load = partial(load_lpips, args.vgg, args.lpips_weights, job.device)
    lpips = first_rank_first(load, job) if args.lpips else None
    chosen = pick_images(len(val), args.num)
    warn_of_few_images(len(chosen))

    # Each image is read and encoded once, and decoded at all levels.
    original_moments = Moments()
    moments = [Moments() for _ in levels]
    scores = [[] for _ in levels]
    energies = [[] for _ in levels]
    codes = []
    for rows in own_batches("reconstruction", len(chosen), args.batch_size, job):
        images, labels = val.batch(chosen[rows])
        images = images.to(job.device)
        original_moments.add(network(images)[0])
        codes.append(tokenizer.encode(to_float(images)))
        image_energy = band_energy(to_float(images))
        for g, level in enumerate(levels):
            copies = to_uint8(tokenizer.decode(codes[-1], level))
            pool, _, logits = network(copies)
            moments[g].add(pool)
            recognised = logits.argmax(-1).cpu() == labels
            scores[g].append(image_scores(copies, images, recognised, lpips))
            energies[g].append(torch.stack([band_energy(to_float(copies)), image_energy]))

    reference = original_moments.finish(job.device)
    results, decibels = [], []
    for g, level in enumerate(levels):
        distance = frechet_distance(*moments[g].finish(job.device), *reference)
        row = {"tokens": level, "r" + distance_name(args): distance}
        accuracy, *quality = gather(torch.cat(scores[g])).mean(0).tolist()
        row.update(zip(("PSNR", "SSIM", "LPIPS"), quality))
        if args.features == "classifier":
            row["accuracy"] = accuracy
        results.append(row)
        energy = torch.stack(energies[g]).sum(0)                        # (2, octaves)
        all_sum(energy, job.device)
        decibels.append((10 * (energy[0] / energy[1]).log10()).tolist())

    codes = gather(torch.cat(codes).cpu())
    used, perplexity, _ = codebook_use(codes, tokenizer.config.codebook_size)
    vectors = tokenizer.quantizer.vectors(codes.unique().to(job.device))
    more = dict(checkpoint=fingerprint(tokenizer), counts=[len(chosen), len(chosen)],
                reference="held-out images", codebook_used=used, codebook_perplexity=perplexity,
                codebook_effective_rank=effective_rank(vectors))
    return results, decibels, more


def image_scores(copies, images, recognised, lpips):
    """(B, 3 or 4) float64: whether the classifier was right, PSNR, SSIM, and LPIPS if not None."""
    scores = [recognised, psnr(copies, images), ssim(copies, images)]
    if lpips is not None:
        scores.append(lpips(to_float(copies), to_float(images)))
    return torch.stack([score.double().cpu() for score in scores], 1)


def run_truncation(args, job):
    """Reconstructions and, where there is a gpt.pt, samples after the first i tokens."""
    # The generator comes first: load_models sets how MKL rounds, and MKL reads that only once.
    gpt = class_names = None
    if (args.out / "gpt.pt").exists():
        gpt, own_tokenizer, class_names = load_models(args, job)
    tokenizer = load_tokenizer(args.out / "tokenizer.pt", job.device)
    if gpt and code_fingerprint(tokenizer) != code_fingerprint(own_tokenizer):
        raise UserError(f"{args.out}/gpt.pt learned the codes of another tokenizer than "
                        f"{args.out}/tokenizer.pt: train it again, or move it away")
    levels = args.levels or spread_levels(tokenizer.config.num_tokens)
    train, val, network = open_run(tokenizer, class_names, args, job)

    reconstructions, energies, more = measure_reconstructions(tokenizer, network, val, levels,
                                                              args, job)
    samples = [{} for _ in levels]
    if gpt:
        samples, more["samples"] = measure_generation(gpt, own_tokenizer, network, train, levels,
                                                      args, job)
    rows = []
    for level, reconstruction, sample, energy in zip(levels, reconstructions, samples, energies):
        window = tokenizer.edges[level - 1].item()
        row = {"tokens": level, "window": window} | reconstruction
        row |= {f"g{name}": value for name, value in sample.items()}
        for octave, decibels in enumerate(energy):
            lowest = 2 ** octave // 2
            # A window of w keeps the frequencies below w.
            row[f"band {lowest}"] = decibels if lowest < window else None
        rows.append(row)

    if job.rank == 0:
        draw_level_pictures(args.out / "levels.png", tokenizer, val, levels, job)
        distance = distance_name(args)
        bands = [column for column in rows[0] if column.startswith("band")]
        panels = {"PSNR (dB)": ["PSNR"], distance: [f"r{distance}", f"g{distance}"],
                  "energy of band f (f .. 2f - 1) against the images' (dB)": bands}
        charts = [line_chart(title, rows, "tokens", columns, log=True)
                  for title, columns in panels.items()]
        save_charts(args.out / "truncation.png", charts, "r: of reconstructions. g: of samples. "
                    "band f: energy of the frequencies f .. 2f - 1 against that of the held-out "
                    "images, in dB")
    return rows, more


@torch.no_grad()
def draw_level_pictures(path, tokenizer, val, levels, job):
    """PNG, a column per level: an image's spectrum in the level's window, its sub-image and its
    reconstruction; then the reconstructions of up to three other images."""
    pixels, _ = val.batch(pick_images(len(val), 4))
    images = to_float(pixels.to(job.device))
    level = torch.tensor(levels, device=job.device)
    windows = tokenizer.edges[level - 1]                                # (G,)

    # The spectrum on a log scale, in grey values from 60 to 255. Black is outside the window.
    power = dct2(images[0]).square().mean(0).log()                      # (S, S)
    low, high = power.quantile(0.05), power.max()
    shades = (60 + 195 * (power - low) / (high - low)).clamp(60, 255)
    shades = torch.where(in_window(len(power), windows, job.device), shades, 0)
    shades = shades[:, None].expand(-1, 3, -1, -1).to(torch.uint8)      # (G, 3, S, S)

    first = images[:1].expand(len(levels), -1, -1, -1)
    rows = [shades, to_uint8(low_pass(first, windows))]
    for code in tokenizer.encode(images).split(1):
        rows.append(to_uint8(tokenizer.decode(code.expand(len(levels), -1), level)))

    # On the left of each row stands the image that it shows.
    originals = to_uint8(images)[[0, 0, *range(len(images))]]
    rows = [torch.cat([image[None], row]) for image, row in zip(originals, rows)]
    names = ["spectrum in its window", "sub-image"] + ["reconstruction"] * len(images)
    titles = ["image"] + [f"{i} tokens" if i > 1 else "1 token" for i in levels]
    save_image_grid(path, rows, names, titles)


# -------------------------------------------------------------------------------------------------
# probe: how well do earlier tokens predict each token? The measures:
#   R2        a linear map predicts the code vector from those before it, on held-out images
#   entropy   of the code in bits, if nothing else is known
#   bits      cross-entropy of the GPT, which knows the class and all codes before

def run_probe(args, job):
    """How well earlier tokens predict each token, here and in the run of --against."""
    runs = [load_probed_run(args.out, job)]
    if args.against:
        runs.append(load_probed_run(Path(args.against), job))
    sizes = [(model.config.num_tokens, model.config.image_size) for _, model, _ in runs]
    N, S = sizes[0]
    n, s = sizes[-1]
    if (n, s) != (N, S):
        raise UserError(f"{args.against} has {n} tokens of {s} px images, {args.out} has {N} of "
                        f"{S} px images: compare runs of the same sizes")

    # Training images fit the regression and choose its penalties, held-out images measure it.
    train, val = open_data(args, S, job)
    chosen = pick_images(len(train), args.num or 50_000)
    generator = torch.Generator().manual_seed(args.seed)
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    fit = len(chosen) * 4 // 5
    parts = [(train, chosen[:fit]), (train, chosen[fit:]), (val, pick_images(len(val), 10_000))]

    in_order = torch.arange(N)
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    orders = {"R2": in_order, "R2 reversed": in_order.flip(0), "R2 shuffled": shuffled}
    columns = probe_codes(*runs[0], orders, parts, args, job)
    if args.against:
        against = probe_codes(*runs[1], {"R2": in_order}, parts, args, job)
        columns |= {f"{name} against": values for name, values in against.items()}
    columns |= probe_patches(S, N, parts, job)

    rows = []
    for i in range(N):
        rows.append({"token": i + 1} | {name: values[i] for name, values in columns.items()})
    # The first token has none before it.
    means = {name: sum(values[1:]) / (N - 1) for name, values in columns.items()}
    if job.rank == 0:
        linear = [name for name in columns if name.startswith("R2")]
        others = [name for name in columns if name not in linear]
        against = f" (against: {Path(args.against).name})" if args.against else ""
        charts = [line_chart("R2 of each place in the order, from those before" + against,
                             rows[1:], "token", linear),
                  line_chart("bits per token" + against, rows, "token", others)]
        save_charts(args.out / "probe.png", charts, "R2: a linear map predicts the token from "
                    "those before it, on held-out images. entropy: of the token's code alone. "
                    "bits: the GPT predicts the code from the class and the codes before")
    more = dict(checkpoint=[fingerprint(tokenizer) for _, tokenizer, _ in runs],
                against=args.against, counts=[len(chosen) for _, chosen in parts])
    return rows + [{"token": "mean"} | means], more


def load_probed_run(folder, job):
    """(GPT or None, tokenizer, class names) of a run's folder; the tokenizer is the GPT's own."""
    if (folder / "gpt.pt").exists():
        return load_generator(folder / "gpt.pt", job.device)
    return None, load_tokenizer(folder / "tokenizer.pt", job.device), None


@torch.no_grad()
def probe_codes(gpt, tokenizer, class_names, orders, parts, args, job):
    """{column: values}: R2 of the code vectors by order, entropy of the codes, bits of the GPT."""
    codes, moments = [], []
    for data, chosen in parts:
        part_codes, labels = encode_images(tokenizer, data, chosen, args, job)
        vectors = (tokenizer.quantizer.vectors(part_codes[rows].to(job.device)).flatten(1)
                   for rows in own_batches("code vectors", len(chosen), 512, job))
        codes.append(part_codes)
        moments.append(second_moments(vectors, job))

    columns = {}
    for name, order in orders.items():
        columns[name] = ridge_r2(moments, order, len(order))
    _, _, perplexities = codebook_use(torch.cat(codes[:2]), tokenizer.config.codebook_size)
    columns["entropy"] = [math.log2(perplexity) for perplexity in perplexities]
    # Of the parts, the last one is held out: data and labels are of it.
    if class_names not in (None, data.class_names):
        print("the generator has learned other classes than those of --data, so its bits are left "
              "out")
    elif gpt is not None:
        columns["bits"] = held_out_bits(gpt, codes[2], labels, job)["bits_by_position"]
    return columns


def probe_patches(S, N, parts, job):
    """{column: R2} of as many raster patches as there are tokens, to compare with; or {}."""
    sides = patch_sides(S, N)
    if sides is None:
        return {}
    # All pixels are correlated with all: at 256 px the matrix would take 309 GB.
    if 3 * S * S > 4096:
        print(f"R2 of raster patches is left out: an image has {3 * S * S:,} values, more than "
              f"the 4,096 that the probe can correlate")
        return {}
    moments = []
    for data, chosen in parts:
        patches = (F.unfold(to_float(images.to(job.device)), sides, stride=sides).mT.flatten(1)
                   for images in read_batches("patches", data, chosen, 512, job))
        moments.append(second_moments(patches, job))
    return {"R2 patches": ridge_r2(moments, torch.arange(N), N)}


def patch_sides(S, N):
    """(height, width) of N equal patches that tile S x S pixels, the squarest, or None."""
    sides = []
    for rows in range(1, N + 1):
        if N % rows == 0 and S % rows == 0 and S % (N // rows) == 0:
            sides.append((S // rows, S // (N // rows)))
    return min(sides, key=lambda side: abs(side[0] - side[1]), default=None)


@torch.no_grad()
def encode_images(tokenizer, data, chosen, args, job):
    """Codes (n, N) and labels (n,) of the chosen images, in their order, on every rank."""
    codes, labels = [], []
    for rows in own_batches("encoding", len(chosen), args.batch_size, job):
        images, batch_labels = data.batch(chosen[rows])
        codes.append(tokenizer.encode(to_float(images.to(job.device))).cpu())
        labels.append(batch_labels)
    return gather(torch.cat(codes)), gather(torch.cat(labels))


# -------------------------------------------------------------------------------------------------
# metrics

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) in float64 (FID, Heusel et al. 2017).

    tr sqrt(S1 S2) is the sum of the roots of the eigenvalues of R S2 R with R = sqrt(S1), which is
    symmetric: no general matrix root is needed, and no imaginary part can appear.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64).cpu()
                                for x in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item()


def inception_score(logits, splits=1):
    """exp(mean KL(p(y|x) || p(y))) of logits (n, 1008): (mean, std) over consecutive parts.

    NOTE with more than one part the order matters: sorted by class, samples score 62, not 298.
    """
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
    NOTE float32; ADM's float16 distances raise both by about 0.002.
    """
    real = torch.as_tensor(real, dtype=torch.float32)
    fake = torch.as_tensor(fake, dtype=torch.float32)
    return share_in_balls(fake, real, k), share_in_balls(real, fake, k)


def share_in_balls(points, centres, k):
    radii = []
    for part in centres.split(512):                 # blocks of rows bound the memory
        nearest = torch.cdist(part, centres).topk(k + 1, largest=False).values
        radii.append(nearest[:, k])                 # the first neighbour is the centre itself
    radii = torch.cat(radii)
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(512)]
    return torch.cat(inside).double().mean().item()


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of uint8 images (B, 3, H, W) -> (B,) float64.

    Gaussian window of 11 px, sigma 1.5, valid region, mean over the channels. It is measured on
    0 .. 255, never on [-1, 1]: SSIM changes when both images are shifted.
    """
    H, W = a.shape[-2:]
    if min(H, W) < 11:
        raise UserError(f"SSIM's window is 11 px, the images are {W} x {H} px: use larger ones")
    rows = gaussian_windows(H, a.device)
    columns = gaussian_windows(W, a.device)

    def blur(x):
        return rows @ x @ columns.T

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a = blur(a * a) - mean_a ** 2
    var_b = blur(b * b) - mean_b ** 2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    similarity = similarity / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return similarity.mean((1, 2, 3))


def gaussian_windows(n, device):
    """(n - 10, n) float64: row i averages the pixels i .. i + 10 with Gaussian weights."""
    offset = torch.arange(-5, 6, dtype=torch.float64, device=device)
    window = torch.exp(-offset ** 2 / (2 * 1.5 ** 2))
    window = window / window.sum()
    return torch.stack([F.pad(window, (i, n - 11 - i)) for i in range(n - 10)])


@cache
def octaves(S):
    """(S, S) long: the octave of each frequency: 0 -> 0, 1 -> 1, 2 and 3 -> 2, 4 .. 7 -> 3 ...

    The number of a frequency is how many of the windows 1, 2, 3 ... do not hold it.
    """
    windows = torch.arange(1, largest_window(S) + 1)
    frequency = (~in_window(S, windows)).sum(0)                         # (S, S)
    return torch.frexp(frequency.double()).exponent.long()


def band_energy(images):
    """Energy of images (B, 3, S, S) in each octave, summed over the images: (octaves,) float64."""
    band = octaves(images.shape[-1]).flatten().to(images.device)
    energy = dct2(images.double()).square().sum((0, 1)).flatten()
    return energy.new_zeros(band.max() + 1).index_add_(0, band, energy).cpu()


PENALTIES = [10.0 ** k for k in range(-6, 3)]       # times the mean variance of a column


def ridge_r2(moments, order, N):
    """R^2 of each of N vectors from those before it in an order, by ridge regression in float64.

    moments: second_moments of the images to fit, to choose each vector's penalty, to measure.
    R^2 = 1 - squared error / variance about the mean of the fit; 0 for the first vector.
    """
    centre = moments[0][0]                                              # (N d,)
    d = len(centre) // N
    columns = (order[:, None] * d + torch.arange(d)).flatten()
    matrices = []                                                       # (N d, N d) about it
    for mean, second in moments:
        shift = mean - centre
        matrices.append((second + shift[:, None] * shift)[columns][:, columns])
    fit, held_out, test = matrices

    errors = torch.zeros(2, len(PENALTIES), N, dtype=torch.float64)     # on held_out, on test
    for p, penalty in enumerate(PENALTIES):
        ridge = penalty * fit.diagonal().mean() * torch.eye(len(fit), dtype=fit.dtype)
        L = torch.linalg.cholesky(fit + ridge)
        for i in range(1, N):
            before, own = slice(0, i * d), slice(i * d, (i + 1) * d)
            # The Cholesky factor of a leading block is the leading block of the factor.
            W = torch.cholesky_solve(fit[before, own], L[before, before])
            for s, part in enumerate((held_out, test)):
                change = W * (part[before, before] @ W - 2 * part[before, own])
                errors[s, p, i] = part[own, own].trace() + change.sum()

    best = errors[0].argmin(0)                                          # (N,)
    variance = test.diagonal().unflatten(0, (N, d)).sum(1)
    # A vector that never changes has nothing to predict.
    r2 = torch.where(variance > 1e-12, 1 - errors[1, best, torch.arange(N)] / variance, 0)
    return [0.0] + r2[1:].tolist()


def second_moments(batches, job):
    """Mean (D,) and second moment about it (D, D) of batches (B, D) of all ranks."""
    moments = Moments()
    for rows in batches:
        moments.add(rows)
    mean, covariance = moments.finish(job.device)
    return mean, covariance * ((moments.count - 1) / moments.count)


class Moments:
    """Mean and unbiased covariance of rows (n, d), streamed: sums of f and of f f^T in float64."""

    def __init__(self):
        # The first rows make of them a count, (d,) and (d, d).
        self.count = self.sum = self.outer = torch.zeros((), dtype=torch.float64)

    def add(self, rows):
        rows = rows.double().cpu()
        self.count = self.count + len(rows)
        self.sum = self.sum + rows.sum(0)
        self.outer = torch.addmm(self.outer, rows.T, rows)

    def finish(self, device):
        """(mean (d,), covariance (d, d)) over all ranks."""
        for x in (self.count, self.sum, self.outer):
            all_sum(x, device)
        mu = self.sum / self.count
        return mu, self.outer.sub_(self.count * mu[:, None] * mu).div_(self.count - 1)


# -------------------------------------------------------------------------------------------------
# features of sets of images. A set has len() and batch(indices) -> uint8 (B, 3, H, W), labels

@dataclass
class FeatureSet:
    """What the metrics need of a set of images. None: not known."""
    images: object = None           # the set itself, where it is read from a path
    count: int = None               # of images
    moments: tuple = None           # mean (d,) and covariance (d, d) of the features
    spatial: tuple = None           # the same of Inception's spatial features, for sFID
    pool: torch.Tensor = None       # (n, d) features of each image
    logits: torch.Tensor = None     # (n, classes)


@torch.no_grad()
def extract_features(batches, network, job):
    """FeatureSet of all ranks' batches of uint8 images (B, 3, H, W)."""
    pool_moments, spatial_moments = Moments(), Moments()
    pools, logits = [], []
    for images in batches:
        pool, spatial, batch_logits = network(images.to(job.device))
        pool_moments.add(pool)
        if spatial is not None:                     # Inception's only
            spatial_moments.add(spatial)
        pools.append(pool.cpu())
        logits.append(batch_logits.cpu())

    features = FeatureSet(moments=pool_moments.finish(job.device))
    if spatial is not None:
        features.spatial = spatial_moments.finish(job.device)
    features.pool = gather(torch.cat(pools))
    features.logits = gather(torch.cat(logits))
    features.count = len(features.pool)
    return features


def own_batches(name, count, size, job):
    """Slices of at most `size` of `count` images: this rank's consecutive share, under a bar."""
    least = max(2, job.ranks)
    if count < least:
        raise UserError(f"{name}: {count} image(s), at least {least} are needed for a covariance "
                        f"and {job.ranks} process(es)")
    first = count * job.rank // job.ranks
    last = count * (job.rank + 1) // job.ranks
    for start in tqdm(range(first, last, size), desc=name, disable=True if job.rank else None):
        yield slice(start, min(start + size, last))


def read_batches(name, images, chosen, size, job):
    """This rank's share of the chosen images of a set."""
    for rows in own_batches(name, len(chosen), size, job):
        yield images.batch(chosen[rows])[0]


def measure_path(path, network, args, job):
    """FeatureSet of a folder of images, or of an .npz of images, of statistics or of both."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist: name a folder of images or an .npz")
    moments = spatial = None
    if Path(path).is_dir():
        images = ImageFiles(path, args.workers)
    else:
        images, moments, spatial = read_npz(path)
    features = FeatureSet()
    if images is not None:
        batches = read_batches(path, images, torch.arange(len(images)), args.batch_size, job)
        features = extract_features(batches, network, job)
        features.images = images
    if isinstance(images, ImageFiles):
        # Files come sorted, often by class. A score of consecutive parts needs them shuffled.
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        features.logits = features.logits[order]
    if moments is not None:
        # ADM's statistics are of the whole training set, its images are 10,000 of it.
        features.moments, features.spatial = moments, spatial
    return features


def read_npz(path):
    """(NpzImages, moments, spatial moments) of an .npz as ADM's, None where it has none."""
    with reading_npz(path), np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]).double()
                  for name in ("mu", "sigma", "mu_s", "sigma_s") if name in file}
        has_images = "arr_0" in file
    moments = (arrays["mu"], arrays["sigma"]) if "sigma" in arrays else None
    spatial = (arrays["mu_s"], arrays["sigma_s"]) if "sigma_s" in arrays else None
    if moments is None and not has_images:
        raise UserError(f"{path} has neither arr_0 (images) nor mu and sigma (statistics)")
    for name, array in arrays.items():
        if not array.isfinite().all():
            raise UserError(f"{path} holds nan or infinity in {name}: make it anew")
    return NpzImages(path) if has_images else None, moments, spatial


@contextmanager
def reading_npz(path):
    """Tells in one line that a file is damaged."""
    try:
        yield
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as e:
        reason = " ".join(str(e).split())[:80]
        raise UserError(f"{path} is not a whole .npz of images or statistics ({reason}): write it "
                        f"again") from None


class NpzImages:
    """The images arr_0 (n, H, W, 3) uint8 of an .npz, read when they are asked for: 50,000 of
    256 px take 9.8 GB. Ascending indices are fast, because a zip archive is read forwards."""

    def __init__(self, path):
        self.path = path
        with reading_npz(path):
            self.file = zipfile.ZipFile(path).open("arr_0.npy")
            # The later versions of the format are for structured types alone.
            np.lib.format.read_magic(self.file)
            self.shape, fortran, dtype = np.lib.format.read_array_header_1_0(self.file)
        if dtype != np.uint8 or self.shape[3:] != (3,) or fortran:
            raise UserError(f"{path}: arr_0 is {dtype} of shape {self.shape} in "
                            f"{'Fortran' if fortran else 'C'} order, not uint8 (n, H, W, 3) in C "
                            f"order: convert it")
        self.start = self.file.tell()

    def __len__(self):
        return self.shape[0]

    def batch(self, indices):
        pixels = bytearray()
        size = math.prod(self.shape[1:])
        with reading_npz(self.path):
            for i in indices.tolist():
                self.file.seek(self.start + i * size)
                pixels += self.file.read(size)
        images = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, *self.shape[1:])
        return images.permute(0, 3, 1, 2), None


class ImageFiles:
    """All images below a folder in sorted order, decoded by threads as in training, but not
    cropped: they must have one size."""

    def __init__(self, folder, workers):
        self.files = images_below(folder)
        if not self.files:
            raise UserError(f"{folder} has 0 images below it: name a folder of images, or an .npz")
        self.shape = decode_image(self.files[0]).shape      # (H, W, 3)
        self.pool = ThreadPoolExecutor(max(1, workers))

    def __len__(self):
        return len(self.files)

    def batch(self, indices):
        files = [self.files[i] for i in indices]
        images = list(self.pool.map(decode_image, files))
        for file, image in zip(files, images):
            if image.shape != self.shape:
                H, W, _ = image.shape
                raise UserError(f"{file} is {W} x {H} px, {self.files[0]} is {self.shape[1]} x "
                                f"{self.shape[0]} px: bring all to one size")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), None


# -------------------------------------------------------------------------------------------------
# Inception-v3 as in the 2015 TensorFlow graph that FID is defined by

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def load_inception(path=None, device="cpu"):
    """InceptionV3 with the published weights, from a file or downloaded once (95 MB)."""
    if path is None:
        path = download(INCEPTION_URL, weights_folder() / INCEPTION_URL.rsplit("/", 1)[1],
                        INCEPTION_SHA256, "name a copy by --inception")
    model = InceptionV3()
    weights = read_weights(path, "file of Inception weights")
    # Older files lack these counters, which nothing reads in eval mode.
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    load_weights(model, counters | weights, path)

    # Batch norm becomes part of the convolution before it: the same function in less time.
    for module in model.modules():
        if isinstance(module, ConvBN):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return model.to(device, memory_format=torch.channels_last).requires_grad_(False)


class InceptionV3(nn.Module):
    """uint8 images (B, 3, H, W) -> pool3 (B, 2048), spatial (B, 2023), logits (B, 1008).

    pool3 is for FID, precision and recall, spatial for sFID, the logits (without bias) for IS.
    """

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

    def train(self, mode=True):
        """Stays in eval mode: batch statistics would make a feature depend on its batch."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images):
        x = (tf1_resize(images, 299) - 128) / 128                       # (B, 3, 299, 299)
        x = x.contiguous(memory_format=torch.channels_last)
        with float32_convolutions():
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


@contextmanager
def float32_convolutions():
    """Within it cuDNN convolves in float32. Its default, TF32, keeps 10 bits of each number."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def tf1_resize(images, size):
    """TensorFlow 1's bilinear resize: (B, 3, H, W) -> float32 (B, 3, size, size), same range.

    Output pixel i reads at i H / size: no half-pixel centres, no antialiasing. Another resize
    moves FID by up to 2.
    """
    H, W = images.shape[-2:]
    rows = resize_matrix(H, size, images.device)
    return rows @ images.float() @ resize_matrix(W, size, images.device).T


def resize_matrix(n, size, device):
    """(size, n): row i interpolates between the two pixels around i n / size."""
    position = torch.arange(size, device=device) * torch.tensor(n / size)   # float32, as TF's
    low = position.floor().long()
    share = (position - low)[:, None]
    eye = torch.eye(n, device=device)
    return (1 - share) * eye[low] + share * eye[(low + 1).clamp(max=n - 1)]


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
    the pooling. The pooling and the last convolution of each branch have the stride.
    """

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


# -------------------------------------------------------------------------------------------------
# line charts

COLOURS = ("#1f5fa8", "#d1495b", "#2e933c", "#8d5fd3", "#e08e1b", "#555555", "#17a2b8", "#a0522d",
           "#c71585", "#9acd32")


def save_charts(path, charts, explanation):
    """PNG of charts side by side."""
    save_picture(path, Image.fromarray(np.hstack(charts)))
    print(f"saved {path}. {explanation}")


def line_chart(title, rows, x_column, columns, log=False):
    """Pillow picture: columns of the rows against another; log: whether x has a log scale."""
    lines = {}
    for column in columns:
        points = [(row[x_column], row[column]) for row in rows
                  if row.get(column) is not None and math.isfinite(row[column])]
        if points:
            lines[column] = points
    xs = sorted(row[x_column] for row in rows)
    ys = [y for points in lines.values() for _, y in points]
    margin = 0.05 * (max(ys) - min(ys)) or 1
    low, high = min(ys) - margin, max(ys) + margin
    scale = math.log2 if log else float
    left, right, bottom = 96, 808, 540
    top = 104 + 30 * ((len(lines) - 1) // 3)               # below the legend, three names a row

    def x_pixel(x):
        return np.interp(scale(x), [scale(xs[0]), scale(xs[-1])], [left, right])

    def y_pixel(y):
        return np.interp(y, [low, high], [bottom, top])

    picture = Image.new("RGB", (840, 620), "white")         # twice as large as a page shows it
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(size=22)
    draw.text((left, 24), title, fill="black", anchor="lm")
    draw.text(((left + right) / 2, 608), x_column, fill="black", anchor="mb")
    for y in ticks(low, high):
        draw.line([(left, y_pixel(y)), (right, y_pixel(y))], fill="#dddddd", width=2)
        draw.text((left - 12, y_pixel(y)), f"{y:g}", fill="black", anchor="rm")

    # On a log scale the values themselves, 1, 2, 4 ..., are the round numbers. Labels are written
    # from right to left, without those that would overlap the one before.
    draw.line([(left, bottom), (right, bottom)], fill="black", width=2)
    free = math.inf                                 # a label must end before this pixel
    for x in reversed(xs if log else ticks(xs[0], xs[-1], 8)):
        centre, half = x_pixel(x), draw.textlength(f"{x:g}") / 2
        draw.line([(centre, bottom), (centre, bottom + 8)], fill="black", width=2)
        if centre + half < free:
            draw.text((centre, bottom + 14), f"{x:g}", fill="black", anchor="mt")
            free = centre - half - 6

    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        x, y = left + 240 * (number % 3), 64 + 30 * (number // 3)       # of its legend
        draw.line([(x, y), (x + 18, y)], fill=colour, width=6)
        draw.text((x + 24, y), name, fill="black", anchor="lm")
        pixels = [(x_pixel(x), y_pixel(y)) for x, y in points]
        draw.line(pixels, fill=colour, width=4, joint="curve")
        for x, y in pixels:
            draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=colour)
    return picture


def ticks(low, high, most=6):
    """At most so many round numbers from low to high: ticks(-31, 8) = [-30, -20, -10, 0]."""
    raw = (high - low) / most or 1
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


if __name__ == "__main__":
    run_script(main, parse_args())
