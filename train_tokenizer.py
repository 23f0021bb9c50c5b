"""Train the spectral tokenizer (paper, section 3.3): images in, out/<data>/tokenizer.pt out.

  python train_tokenizer.py                                     # built-in shapes, a laptop CPU
  python train_tokenizer.py --data cifar10                      # downloaded when absent
  python train_tokenizer.py --data /my/images --image-size 64   # a folder of your own
  torchrun --nproc-per-node 8 train_tokenizer.py --data imagenet --data-dir /path/to/ILSVRC
  python train_tokenizer.py --data imagenet --dry-run --micro-batch 2      # what would it take?

After the run, out/<data>/ also holds recon.png (images, their sub-images and reconstructions at
several levels) and log-tokenizer.jsonl.

This file begins with the run: presets, flags, training step, main. Below main stands what they use
and what the later files share: evaluation, the training loop, processes and log, images,
perceptual and adversarial losses, pictures.
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
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain, count, repeat
from pathlib import Path

from spectralar import (Block, FailedRun, SpectralTokenizer, TokenizerConfig, UserError,
                        check_setting, load_tokenizer, load_weights, low_pass, nested_loss,
                        out_of_memory, read_checkpoint, read_config, read_weights, sample_levels,
                        save_checkpoint, setting, sub_images, uniforms, wrap64)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# -------------------------------------------------------------------------------------------------
# settings: each field is a flag (a default, the text of -h, the values allowed)

@dataclass
class TrainingSettings:
    """Of both training scripts. The defaults are the tokenizer's, for shapes."""
    steps: int = setting(1200, "optimizer steps")
    batch_size: int = setting(16, "images per step, over all GPUs")
    muon: bool = setting(True, "Muon for the matrices of the blocks, AdamW for all else; AdamW "
                               "alone needs a smaller --lr, about a quarter")
    lr: float = setting(4e-3, "peak learning rate", least=0)
    betas: tuple = setting((0.9, 0.99), "of AdamW", least=0, most=0.999999)
    weight_decay: float = setting(1e-4, "of matrices; nothing else decays", least=0)
    warmup: int = setting(100, "steps of linear warm-up", least=0)
    hold: float = setting(0.0, "share of the run at the peak, before the cosine to a tenth of it",
                          least=0, most=1)
    clip: float = setting(1.0, "largest gradient norm; 0 = no clipping", least=0)
    ema: float = setting(0.995, "decay of the averaged weights, which are evaluated", 0, 1)
    eval_every: int = setting(600, "steps between evaluations with pictures")


@dataclass
class TokenizerSettings:
    """The losses beside the squared error, and the evaluation."""
    perceptual: float = setting(0.0, "weight of the perceptual loss; 0 = none", least=0)
    perceptual_start: int = setting(0, "step at which the perceptual loss begins", least=0)
    perceptual_net: str = setting("vgg", "vgg: LPIPS, downloaded; classifier: a small network, "
                                  "trained on the data set, kept as perceptual.pt in --out; or "
                                  "the file of such a network")
    gan: float = setting(0.0, "weight of the adversarial loss, at the full level; 0 = none", 0)
    gan_start: int = setting(0, "step at which the adversarial loss begins", least=0)
    lecam: float = setting(0.001, "weight of LeCAM in the discriminator's loss", least=0)
    eval_images: int = setting(512, "held-out images per evaluation")


# Presets name only what differs from these defaults. Those under "gpt" are of train_gpt.py.
BASE = {f.name: f.default for settings in (TokenizerConfig, TokenizerSettings, TrainingSettings)
        for f in fields(settings)}
BASE_GPT = {f.name: f.default for f in fields(TrainingSettings)} | dict(
    width=192, depth=4, heads=6, steps=600, batch_size=64, betas=(0.9, 0.95),
    weight_decay=0.05, hold=0.5, clip=2.0, ema=0.99, eval_every=300, views="flip")

PRESETS = {
    # minutes on a laptop CPU; with patches of 8 instead of 4 a step takes about half the time
    "shapes": BASE | dict(patch_size=8, gpt=BASE_GPT | dict(code_images=20_000)),

    # 70 minutes on one CPU core, nearly half for the generator; folders take it, too
    "cifar": BASE | dict(
        num_tokens=64, codebook_size=1024, width=192, heads=6, power=0.5, steps=4000, warmup=200,
        perceptual=0.2, perceptual_start=2000, perceptual_net="classifier", eval_every=500,
        gpt=BASE_GPT | dict(width=256, depth=6, heads=8, steps=2000, warmup=200, ema=0.995,
                            eval_every=500)),

    # the paper's size: ViT-B encoder and decoder, d16 generator (width 64 x depth, heads = depth);
    # Muon was not tried here
    "imagenet": BASE | dict(
        image_size=256, patch_size=16, num_tokens=64, codebook_size=4096, width=768, depth=12,
        heads=12, steps=1_000_000, batch_size=256, muon=False, lr=1e-4, warmup=10_000, ema=0.999,
        perceptual=1.0, gan=0.1, gan_start=200_000, eval_every=5000,
        gpt=BASE_GPT | dict(width=None, depth=16, heads=None, steps=333_600, batch_size=768,
                            muon=False, lr=3e-4, warmup=6672, ema=0.9999, eval_every=5000,
                            views="ten-crop")),
}


def parse_args(argv=None):
    parser, preset = base_parser(__doc__, argv, follow=False)
    add_settings(parser, "model", TokenizerConfig, preset)
    add_settings(parser, "losses and evaluation", TokenizerSettings, preset)
    add_settings(parser, "training", TrainingSettings, preset)
    add_run_flags(parser)
    parser.add_argument("--vgg", metavar="FILE",
                        help="weights of VGG16 (default: downloaded once, 528 MB)")
    parser.add_argument("--lpips-weights", metavar="FILE",
                        help="weights of LPIPS (default: downloaded once)")
    parser.add_argument("--finetune-decoder", metavar="FILE",
                        help="train only the decoder of this tokenizer.pt, at the full level; its "
                             "codes, and any generator of them, stay as they are")
    return parse_training_args(parser, argv, "tokenizer", TokenizerSettings)


# -------------------------------------------------------------------------------------------------
# one training step

def training_step(step, batch, parts, wrapped, perceptual, args, job):
    """Losses, gradients and updates of one step; returns {term: value} for the log.

    batch: this process's micro-batches of uint8 images (b, 3, S, S). parts: the run's models and
    optimizers. wrapped: the models as a step calls them, see wrap_model.
    """
    model = parts["model"]
    config = model.config
    perceptual = perceptual if step >= args.perceptual_start else None
    discriminator = parts.get("discriminator") if step >= args.gan_start else None
    seed_step(args.seed, step)
    levels = sample_levels(args.batch_size, config.num_tokens,
                           full_only=config.flat or args.finetune_decoder)

    # Passes of a micro-batch each: their gradients add up to those of the whole batch.
    vectors, codes, logits, terms = [], [], [], {}
    for micro, images in enumerate(batch):
        images = to_float(images.to(job.device, non_blocking=True))
        its_levels = levels[micro_rows(micro, job)].to(job.device)

        # Frozen: this pass trains the tokenizer only.
        if discriminator:
            discriminator.requires_grad_(False)
        with gradient_sync(wrapped["model"], micro, job):
            losses, recon, z, code = tokenizer_losses(
                wrapped["model"], images, its_levels, model.edges, perceptual, discriminator,
                args, job)
            (losses["loss"] / job.passes).backward()
        vectors.append(z)
        codes.append(code)
        add_mean(terms, losses, job.passes)

        # The discriminator learns from the same images and their full-level reconstructions.
        if discriminator:
            discriminator.requires_grad_(True)
            with gradient_sync(wrapped["discriminator"], micro, job):
                losses, logit = discriminator_losses(
                    wrapped["discriminator"], images, recon, discriminator.logit_means, job)
                loss = losses["disc"] + args.lecam * losses["lecam"]
                (loss / job.passes).backward()
            logits.append(logit)
            add_mean(terms, losses, job.passes)

    terms["norm"] = optimizer_step(model, own_optimizers(parts), step, args)
    if discriminator:
        # LeCAM needs the running means of the logits, over all passes and processes.
        optimizer_step(discriminator, [parts["discriminator_optimizer"]], step, args)
        logits = torch.stack(logits).mean(0)
        all_sum(logits, job.device)
        discriminator.logit_means.lerp_(logits / job.ranks, 0.001)

    # The codebook is updated from the whole batch, so every process must see all of it.
    codes = gather_equal(torch.cat(codes)).flatten()
    if not args.finetune_decoder:
        model.quantizer.update(gather_equal(torch.cat(vectors)).flatten(0, 1), codes)
    update_ema(parts["ema"], model, args.ema, step)
    terms["used"] = torch.bincount(codes, minlength=config.codebook_size) > 0
    return terms


def tokenizer_losses(model, images, levels, edges, perceptual, discriminator, args, job):
    """Forward pass and losses (paper, Eq. 7) of images (b, 3, S, S) at levels (b, G).

    Returns {term: loss}, full-level reconstructions (b, 3, S, S), and for the codebook's update
    the encoder outputs (b, N, d) and codes (b, N). perceptual, discriminator: None = no such term.
    """
    with autocast(job):
        recon, vq_loss, z, codes = model(images, levels)
        targets = sub_images(images, levels, edges)
        # Each level against its own sub-image: this is what orders the tokens.
        losses = dict(rec=nested_loss(recon, targets))
        loss = losses["rec"]
        if perceptual:
            losses["perceptual"] = nested_loss(recon, targets, perceptual)
            loss = loss + args.perceptual * losses["perceptual"]
        losses["vq"] = vq_loss
        loss = loss + vq_loss
        if discriminator:
            # Only full reconstructions can look real; a blurred level could not.
            losses["gan"] = -discriminator(recon[:, 0]).mean()
            loss = loss + args.gan * losses["gan"]
    return dict(loss=loss, **losses), recon[:, 0].detach(), z.detach(), codes


def discriminator_losses(discriminator, images, fakes, means, job):
    """Forward pass and losses of the discriminator, and its mean logits (2,): real, generated."""
    with autocast(job):
        real, fake = discriminator(torch.cat([images, fakes])).chunk(2)
    losses = dict(disc=hinge_loss(real, fake), lecam=lecam_loss(real, fake, *means))
    return losses, torch.stack([real.mean(), fake.mean()]).detach()


# -------------------------------------------------------------------------------------------------
# the run

def main(args):
    job = join_ranks(args)
    split_batch(args, job)
    path = args.out / "tokenizer.pt"
    config, source = choose_config(args, path)
    start_folder(path, args)
    train, val = open_data(args, config.image_size, job)
    choose_dtype(args, job)
    parts = build_tokenizer_parts(config, source, args, job)
    start = restore(path, "tokenizer", parts, args) if args.resume else 0
    perceptual = load_perceptual(train, val, config.image_size, args, job)
    print(f"{len(train):,} training and {len(val):,} held-out images, "
          f"{len(train.class_names)} classes")
    wrapped = {name: wrap_model(parts[name], args, job)
               for name in ("model", "discriminator") if name in parts}
    batches = image_batches(train, args, job, start)

    def take_step(step, batch):
        return training_step(step, batch, parts, wrapped, perceptual, args, job)

    def compute_loss(images):
        images = to_float(images.to(job.device))
        levels = sample_levels(len(images), config.num_tokens,
                               full_only=config.flat or args.finetune_decoder)
        distance = perceptual if start >= args.perceptual_start else None
        losses, _, _, _ = tokenizer_losses(parts["model"], images, levels.to(job.device),
                                           parts["model"].edges, distance, None, args, job)
        return losses["loss"]

    def evaluate():
        return evaluate_tokenizer(parts["ema"], val, args, job)

    if args.dry_run:
        return print_plan(take_step, next(batches), parts, len(train), args, job)
    training_loop("tokenizer", parts, start, batches, take_step, compute_loss, evaluate, args, job)
    print(f"saved {path}, {args.out / 'recon.png'}")


def choose_config(args, path):
    """(config of the run, the tokenizer that --finetune-decoder names, or None)."""
    if not args.finetune_decoder:
        return config_from_flags(TokenizerConfig, args), None
    if Path(args.finetune_decoder).resolve() == path.resolve():
        raise UserError(f"--finetune-decoder {args.finetune_decoder} would replace itself: take "
                        f"another --out")
    source = load_tokenizer(args.finetune_decoder, args.device)
    return source.config, source


def build_tokenizer_parts(config, source, args, job):
    """{name: model or optimizer}: all whose state belongs into a checkpoint."""
    torch.manual_seed(wrap64(args.seed))
    model = SpectralTokenizer(config).to(job.device)
    if source:
        model.load_state_dict(source.state_dict())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in model.decoder_parts)
    parts = dict(model=model, ema=copy.deepcopy(model).eval(), **make_optimizers(model, args, job))
    if args.gan:
        discriminator = Discriminator().to(job.device, memory_format=torch.channels_last)
        parts["discriminator"] = discriminator
        # AdamW trains all of it, and takes a quarter of the rate that suits Muon.
        group = dict(params=discriminator.parameters(), lr_scale=0.25 if args.muon else 1.0)
        parts["discriminator_optimizer"] = torch.optim.AdamW(
            [group], args.lr, (0.5, 0.9), weight_decay=0, fused=True)
    if args.grad_checkpoint:
        recompute_blocks(model)
    return parts


def load_perceptual(train, val, image_size, args, job):
    """The perceptual distance between two batches of images, or None when no step asks for it."""
    if not args.perceptual:
        return None
    if args.perceptual_start >= args.steps:
        print(f"the run ends before step {args.perceptual_start}, at which the perceptual loss "
              f"begins: it has none")
        return None
    vgg = args.perceptual_net == "vgg"
    if args.dry_run:                    # random weights take as long, and need no download
        widths = PERCEPTUAL["widths"]
        distance = LPIPS() if vgg else ClassifierDistance(Classifier(2, image_size, widths))
        return distance.to(job.device).eval().requires_grad_(False)
    if not vgg and len(train.class_names) == 1:
        print("a classifier learns nothing from one class, so there is no perceptual loss; "
              "--perceptual-net vgg would be one")
        return None

    def load():
        if vgg:
            return load_lpips(args.vgg, args.lpips_weights, job.device)
        path = args.perceptual_net
        if path == "classifier":
            path = args.out / "perceptual.pt"
        return ClassifierDistance(
            load_classifier(path, PERCEPTUAL, args.data, train, val, image_size, job))
    return first_rank_first(load, job)


# -------------------------------------------------------------------------------------------------
# evaluation on held-out images

@torch.no_grad()
def evaluate_tokenizer(model, data, args, job):
    """PSNR of each level, to its sub-image and to the image, and the use of the codebook."""
    config = model.config
    levels = [config.num_tokens] if config.flat else spread_levels(config.num_tokens)
    scores, codes = {level: [] for level in levels}, []
    for chosen in pick_images(len(data), args.eval_images).split(64):
        images = to_float(data.batch(chosen)[0].to(job.device))
        with autocast(job):
            codes.append(model.encode(images))
            outputs = {level: model.decode(codes[-1], level) for level in levels}
        if len(codes) == 1:
            draw_reconstructions(args.out / "recon.png", images, outputs, model.edges)
        for level, output in outputs.items():
            # Against the sub-image, then against the image. An exact copy counts as 100 dB.
            truths = low_pass(images, model.edges[level - 1]), images
            score = [psnr(to_uint8(output), to_uint8(truth)) for truth in truths]
            scores[level].append(torch.stack(score).clamp(max=100))

    means = {level: torch.cat(score, 1).mean(1).tolist() for level, score in scores.items()}
    codes = torch.cat(codes)
    used, perplexity, by_position = codebook_use(codes, config.codebook_size)
    rank = effective_rank(model.quantizer.vectors(codes.unique()))

    print("  tokens  window  PSNR to sub-image  to image")
    for level, (to_sub_image, to_image) in means.items():
        print(f"  {level:6d}  {model.edges[level - 1]:6d}  {to_sub_image:14.2f} dB  "
              f"{to_image:5.2f} dB")
    print(f"  codebook: {used:.1%} used, perplexity {perplexity:.0f}, effective rank {rank:.1f} "
          f"of {config.code_dim}; perplexity by position: " +
          " ".join(f"{p:.0f}" for p in by_position), flush=True)
    return dict(psnr_sub_image={level: mean[0] for level, mean in means.items()},
                psnr_image={level: mean[1] for level, mean in means.items()},
                used=used, perplexity=perplexity, perplexity_by_position=by_position,
                effective_rank=rank)


def draw_reconstructions(path, images, outputs, edges):
    """A row of images, then for each level the sub-images (targets) and the reconstructions."""
    if len(outputs) > 6:
        outputs = {level: output for level, output in outputs.items() if level > 1}
    names, rows = ["image"], [images]
    for level, output in outputs.items():
        names += [f"target, {level} token{'s' * (level > 1)}", "reconstruction"]
        rows += [low_pass(images, edges[level - 1]), output]
    shown = 12 if images.shape[-1] <= 64 else 6
    save_image_grid(path, [to_uint8(row[:shown]) for row in rows], names)


def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 images (B, 3, H, W) -> (B,) dB; infinite when equal."""
    error = (a.float() - b.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(255 ** 2 / error)


def codebook_use(codes, K):
    """Codes (n, N) -> share of the K codes in use, perplexity, perplexity per position (N,)."""
    def perplexity(column):
        p = torch.bincount(column.flatten(), minlength=K).double() / column.numel()
        return torch.special.entr(p).sum().exp().item()
    return len(codes.unique()) / K, perplexity(codes), [perplexity(column) for column in codes.T]


def effective_rank(x):
    """How many dimensions rows (n, d) fill about their mean, 1 .. d (Roy and Vetterli 2007)."""
    values = torch.linalg.svdvals((x - x.mean(0)).double())
    share = values / values.sum().clamp(min=1e-30)
    return torch.special.entr(share).sum().exp().item()


def spread_levels(N):
    """1, 2, 4, 8 ... and N: the levels that evaluations and pictures show."""
    powers = [2 ** k for k in range(N.bit_length()) if 2 ** k < N]
    return powers + [N]


# -------------------------------------------------------------------------------------------------
# the training loop of train_tokenizer.py and train_gpt.py

def training_loop(kind, parts, start, batches, take_step, compute_loss, evaluate, args, job,
                  carried=None):
    """Steps `start` .. --steps, with log lines, checkpoints and evaluations on their way.

    batches yields the batch of each step, a list of micro-batches. take_step(step, batch) trains
    on it and returns {term: value}. compute_loss(micro_batch) tells what a pass costs. evaluate()
    returns a record for the log. carried: what else to save.
    """
    path = args.out / f"{kind}.pt"
    log = Log(args.out / f"log-{kind}.jsonl", parts["model"], args, job)
    interrupt = Interrupt()
    ours = file_stamp(path)
    for step in range(start, args.steps + 1):
        # All processes must agree to stop, or those that go on would wait for the others.
        last = step == args.steps or any_rank(interrupt.asked)
        if step > start:
            saves = last or step % (args.save_every or args.eval_every) == 0
            evaluates = step == args.steps or step % args.eval_every == 0
            if saves or evaluates or step % args.log_every == 0:
                log.report(step)
            # Save first: a picture that cannot be written must not cost the steps of hours.
            if saves and job.rank == 0 and file_stamp(path) != ours:
                raise FailedRun(f"another run has written {path} since this one started: nothing "
                                f"is saved; take another --out")
            if saves:
                save_run(path, kind, parts, step, args, job, **(carried or {}))
                ours = file_stamp(path)
            if evaluates and job.rank == 0:
                log.write(step=step, **evaluate())
                log.reset()
        if last:
            break

        # The log tells how long a step waits for its batch: more --workers may help.
        before = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - before
        if step == start:
            log.flops_per_image = count_flops(compute_loss, batch[0], parts) / job.micro_batch
            log.reset()
        log.add(take_step(step, batch), waited)
    if step < args.steps:
        raise FailedRun(f"{interrupt.asked or 'a signal'} after step {step}: saved {path}, "
                        f"--resume goes on from there")


def file_stamp(path):
    """What changes when another program writes a file; None without one."""
    return (path.stat().st_mtime_ns, path.stat().st_ino) if path.exists() else None


def count_flops(compute_loss, micro_batch, parts):
    """Operations of the matrix products and convolutions of a forward and backward pass.

    A separate pass whose gradients are thrown away. Counting inside the step would change the last
    bits of its gradients, and end up in compiled code.
    """
    compiled = any(module._compiled_call_impl for module in parts["model"].modules())
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with eager, FlopCounterMode(display=False) as counter:
        compute_loss(micro_batch).backward()
    for part in parts.values():
        part.zero_grad()
    return counter.get_total_flops()


class Interrupt:
    """Ctrl-C, a kill and a closed terminal ask the loop to finish its step, save and leave."""

    def __init__(self):
        self.asked = None
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)                 # Windows has no SIGHUP
            # nohup ignores SIGHUP on purpose.
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)                    # a second one ends it at once


def image_batches(data, args, job, start):
    """The batch of each step from `start` on: this process's micro-batches, uint8 (b, 3, S, S).

    Images are mirrored at random, and image files are cropped at random. A batch depends on seed
    and step alone, whatever the number of processes: a resumed run goes on with the very next one.
    """
    first_stream = (2 * args.seed + 1) * 2 ** 50

    def make_batch(step):
        indices = batch_indices(len(data), args.batch_size, step, args.seed)
        streams = wrap64(first_stream + step * args.batch_size) + torch.arange(args.batch_size)
        batch = []
        for micro in range(job.passes):
            rows = micro_rows(micro, job)
            u = uniforms(streams[rows], 4)
            # The short side is 1 .. 1.125 times the image side; the square lies anywhere.
            crops = torch.stack([1 + u[:, 1] / 8, u[:, 2], u[:, 3]], 1)
            images, _ = data.batch(indices[rows], crops)
            mirrored = (u[:, 0] < 0.5)[:, None, None, None]
            images = torch.where(mirrored, images.flip(-1), images)
            batch.append(images.pin_memory() if job.device.startswith("cuda") else images)
        return batch
    return ahead(make_batch, count(start))


@lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    generator = torch.Generator().manual_seed(wrap64(seed * 100_003 + epoch))
    return torch.randperm(n, generator=generator)


def batch_indices(n, batch_size, step, seed):
    """Which of n samples make the batch of a step; every epoch is a new permutation."""
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = position // n
    parts = [epoch_order(n, epoch, seed)[position[epochs == epoch] % n]
             for epoch in epochs.unique().tolist()]
    return torch.cat(parts)


def pick_images(n, most):
    """At most `most` of n indices, ascending: a fixed random choice, spread over all classes."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[:most].sort().values


def ahead(function, items):
    """Yields function(item) for each item, computed by a thread that stays two items ahead."""
    # The thread uses one core: a second team of OpenMP threads would take the cores from the
    # model (40 % of a step).
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 3:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def add_mean(terms, losses, passes):
    """Add the losses of one of several passes to the means of a step."""
    for name, value in losses.items():
        terms[name] = terms.get(name, 0) + value.detach() / passes


# -------------------------------------------------------------------------------------------------
# optimizer, averaged weights, checkpoints

def make_optimizers(model, args, job):
    """{name: optimizer}: each trained parameter of the model belongs to exactly one.

    muon trains the matrices of the blocks, but not those of AdaLN, which start at zero. optimizer,
    an AdamW, trains all else. Only the matrices of Linear layers decay: no biases, norms,
    embeddings, codebook.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    hidden, decayed, others = {}, [], []       # hidden: by shape, as Muon treats them together
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if args.muon and id(p) in linear and (".attn." in name or ".mlp." in name):
            hidden.setdefault(p.shape, []).append(p)
        elif id(p) in linear:
            decayed.append(p)
        else:
            others.append(p)

    def make(kind, groups, **settings):
        if getattr(args, "zero", False) and job.ranks > 1:
            # Each process keeps the state of a share. Imported here: slow, and few need it.
            from torch.distributed.optim import ZeroRedundancyOptimizer
            return ZeroRedundancyOptimizer(groups, kind, lr=args.lr, **settings)
        return kind(groups, lr=args.lr, **settings)

    rest = [dict(params=decayed, weight_decay=args.weight_decay),
            dict(params=others, weight_decay=0.0)]
    optimizers = dict(optimizer=make(torch.optim.AdamW, rest, betas=tuple(args.betas), fused=True))
    if hidden:
        by_shape = [dict(params=same) for same in hidden.values()]
        optimizers["muon"] = make(Muon, by_shape, weight_decay=args.weight_decay, dtype=job.dtype)
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal (Jordan 2024): a matrix moves equally far in
    all directions, also in those in which its gradient is small.

    The matrices of a group have one shape. Their entries move by 0.2 lr on average (root mean
    square), about as far as AdamW's, so both take the same lr (Liu and others, arXiv 2502.16982).
    torch.optim.Muon does the same, but always in bfloat16. A CPU without bfloat16 instructions
    needs seconds per step for that.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if not trained:
                continue
            directions = []
            for p in trained:
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                state["mean"].lerp_(p.grad, 1 - group["momentum"])
                # Nesterov's momentum: the newest gradient counts once more.
                directions.append(p.grad.lerp(state["mean"], group["momentum"]))
            directions = orthogonalize(torch.stack(directions).to(self.dtype))
            scale = 0.2 * math.sqrt(max(directions.shape[1:]))
            for p, direction in zip(trained, directions):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-group["lr"] * scale)


def orthogonalize(x):
    """Matrices U S V' (n, rows, columns) -> about U V': singular values between 0.7 and 1.2.

    Each pass of Newton and Schulz's iteration applies an odd polynomial to the singular values,
    which lifts the small ones. Its coefficients are Jordan's: steep at 0, not exact at 1.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)      # no singular value above 1
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x


def own_optimizers(parts):
    """The optimizers of the run's model, without the discriminator's."""
    return [parts[name] for name in ("optimizer", "muon") if name in parts]


def optimizer_step(model, optimizers, step, args):
    """Clip, step, clear the gradients; returns the norm of the gradient before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args) * group.get("lr_scale", 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return norm


def lr_at(step, args):
    """Linear warm-up, then --lr for a share --hold of the run, then a cosine to a tenth of it."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    start = max(args.warmup, args.hold * args.steps)
    done = (step - start) / max(args.steps - start, 1)
    done = min(max(done, 0), 1)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay ema + (1 - decay) model, buffers too. Early steps decay faster."""
    decay = min(decay, (1 + step) / (10 + step))
    for averaged, current in zip(ema.state_dict().values(), model.state_dict().values()):
        if averaged.is_floating_point():
            averaged.lerp_(current, 1 - decay)
        else:
            averaged.copy_(current)


def recompute_blocks(model):
    """Gradient checkpointing: keep only the input of each block, compute the rest again."""
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = partial(recompute_in_backward, module.forward, use_reentrant=False,
                                     preserve_rng_state=False)


def step_seed(seed, step):
    """All random draws of a step follow from (seed, step), so a resume has nothing to restore."""
    return (seed * 1_000_003 + step) % 2 ** 32                   # a CPU generator reads 32 bits


def seed_step(seed, step):
    torch.manual_seed(step_seed(seed, step))


def start_folder(path, args):
    """Make the run's folder. Refuse to replace a checkpoint unasked, or to resume from none."""
    if args.resume and not path.exists():
        raise UserError(f"{path} does not exist, so there is nothing to resume: leave --resume "
                        f"out, or correct --out")
    if args.dry_run:
        return
    if path.exists() and not (args.resume or args.overwrite):
        raise UserError(f"{path} exists: --resume goes on from it, --overwrite replaces it, --out "
                        f"takes another folder")
    make_writable(path.parent)


def make_writable(folder):
    """Make a folder. UserError when no file can be written there: better now than after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(65536))
    except OSError as e:
        raise UserError(f"cannot write into {folder} ({e.strerror}): choose another place, or "
                        f"free disk space") from None


def save_run(path, kind, parts, step, args, job, **carried):
    """Write the run's checkpoint; --keep K also keeps the last K under their step's name."""
    for part in parts.values():
        if hasattr(part, "consolidate_state_dict"):              # ZeRO: collect all shares
            part.consolidate_state_dict()
    if job.rank:
        return
    states = {name: part.state_dict() for name, part in parts.items()}
    save_checkpoint(path, kind, config=asdict(parts["model"].config), args=plain_args(args, job),
                    step=step, **states, **carried)
    if args.keep:
        shutil.copyfile(path, path.with_stem(f"{path.stem}-{step:07d}"))
        kept = path.parent.glob(f"{path.stem}-{'[0-9]' * 7}.pt")
        for old in sorted(kept, key=os.path.getmtime)[:-args.keep]:
            old.unlink()


def restore(path, kind, parts, args):
    """Load a run's checkpoint into its parts {name: model or optimizer}; returns its step."""
    saved = read_checkpoint(path, kind)
    config = parts["model"].config
    saved_config = read_config(type(config), saved, path)
    for f in fields(config):
        found, value = getattr(saved_config, f.name), getattr(config, f.name)
        if found != value:
            raise UserError(f"{path} has {f.name} {found}, this run {value}: resume with the same "
                            f"sizes, or take another --out")
    if saved["step"] >= args.steps:
        raise UserError(f"{path} has done {saved['step']} steps, --steps is {args.steps}: ask for "
                        f"more to go on")
    for name, part in parts.items():
        state = saved.get(name, saved.get(name.replace("discriminator", "critic")))   # older name
        if state is None and "discriminator" in name:            # --gan may be new
            continue
        if state is None:
            raise UserError(f"{path} has no {name}: another version of the code made it")
        if isinstance(part, nn.Module):
            load_weights(part, state, path)
            continue
        # The state also holds the old betas and weight decay. Those of this run's flags count.
        for old, group in zip(state["param_groups"], part.param_groups):
            old.update({k: v for k, v in group.items() if k != "params"})
        try:
            part.load_state_dict(state)
        except ValueError:
            raise UserError(f"{path}: its {name} trained other parameters than this run's: resume "
                            f"with the flags of its start") from None
    return saved["step"]


# -------------------------------------------------------------------------------------------------
# the log, and the plan of --dry-run

class Log:
    """Log lines on the screen, and as JSON in a file, after a record of what ran, and where."""

    def __init__(self, path, model, args, job):
        self.args, self.job = args, job
        self.flops_per_image = 0
        path = os.devnull if job.rank else path
        self.file = open(path, "a" if args.resume else "w", buffering=1)
        config = plain_args(args, job)
        parameters = sum(p.numel() for p in model.parameters())
        self.write(command=" ".join(sys.argv), config=config, model=asdict(model.config),
                   parameters=parameters, versions=versions(), device=job.device,
                   threads=torch.get_num_threads(), commit=git_commit())
        print(" ".join(f"{name}={value}" for name, value in config.items()))
        print(f"{parameters / 1e6:.2f} M parameters")
        self.reset()

    def write(self, **record):
        self.file.write(json.dumps(record) + "\n")

    def reset(self):
        self.terms, self.steps, self.waited = defaultdict(list), 0, 0.0
        self.start = time.perf_counter()

    def add(self, terms, waited):
        """Terms of a step: numbers, or bool vectors of codes in use. waited: for data, seconds."""
        for name, value in terms.items():
            self.terms[name].append(value.detach())
        self.waited += waited
        self.steps += 1

    def report(self, step):
        """A line about the steps since the last one: means of numbers, the share of a bool vector
        that was ever True. All processes call this. FailedRun when a mean is not finite."""
        args, job = self.args, self.job
        shares = [name for name, values in self.terms.items() if values[0].dtype == torch.bool]
        numbers = [name for name in self.terms if name not in shares]
        means = [sum(self.terms[name]) / len(self.terms[name]) for name in numbers]
        means = torch.stack(means).double()
        all_sum(means, job.device)
        terms = dict(zip(numbers, (means / job.ranks).tolist()))
        for name, value in terms.items():
            if not math.isfinite(value):
                raise FailedRun(f"{name} is {value} by step {step}: the last checkpoint is kept; "
                                f"lower --lr (now {args.lr}) or --clip (now {args.clip}) and "
                                f"--resume")
        for name in shares:
            terms[name] = torch.stack(self.terms[name]).any(0).double().mean().item()

        seconds = (time.perf_counter() - self.start) / self.steps
        speed = args.batch_size / seconds                        # images per second
        record = dict(
            lr=lr_at(step - 1, args), ms=seconds * 1e3, images_per_second=speed,
            mfu=speed * self.flops_per_image / (job.matmul_flops * job.ranks),
            data=self.waited / self.steps / seconds, memory_gb=peak_memory(job.device) / 1e9,
            eta_hours=(args.steps - step) * seconds / 3600)
        print(f"step {step:06d}/{args.steps:06d}",
              *[f"{name} {value:.4f}" for name, value in terms.items()],
              "lr {lr:.2e} | {ms:.0f} ms | {images_per_second:.3g} img/s | mfu {mfu:.0%} | "
              "data {data:.1%} | {memory_gb:.1f} GB".format(**record),
              f"eta {duration(record['eta_hours'])}", sep=" | ", flush=True)
        self.write(step=step, **terms, **record)
        self.reset()


def print_plan(take_step, batch, parts, count, args, job):
    """--dry-run: do one step of one micro-batch, and print what the whole run would take.

    count: images of the data set. Operations are those of matrix products and convolutions.
    """
    model = parts["model"]
    start = time.perf_counter()
    with FlopCounterMode(display=False) as counter:
        take_step(args.steps - 1, batch)         # the last one: by then all losses have begun
    seconds = time.perf_counter() - start
    # Muon's part does not depend on the batch, so it is counted apart, without being done.
    with FlopCounterMode(display=False) as muon_counter:
        for group in parts["muon"].param_groups if args.muon else []:
            orthogonalize(torch.stack([p.to("meta") for p in group["params"]]))
    muon = muon_counter.get_total_flops()
    flops = (counter.get_total_flops() - muon) / job.micro_batch
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = [f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f}"
             for name, part in model.named_children()]

    # Four bytes per number: weights, averages, gradients, and the moments of the optimizers.
    states = [state for own in own_optimizers(parts) for state in own.state.values()]
    moments = sum(x.numel() for state in states for x in state.values() if x.dim())
    shares = args.gpus if getattr(args, "zero", False) else 1
    fixed = 4 * (2 * total + trained + moments / shares)
    seen = args.steps * args.batch_size
    per_gpu = flops * seen / args.gpus + muon * args.steps / shares
    hours = per_gpu / (args.tflops * 1e12) / 3600
    memory = peak_memory(job.device)
    muon_work = f"; Muon {muon / 1e9:.4g} GFLOP per step" if muon else ""
    print(f"""the plan
  parameters  {total / 1e6:.1f} M: {", ".join(sizes)}
  tokens      {model.config.num_tokens} per image, from {model.config.codebook_size} codes
  batch       {args.batch_size} images, {-(-args.batch_size // args.gpus)} per GPU ({args.gpus})
  steps       {args.steps:,}, so {seen / 1e6:,.1f} M images: {seen / count:,.1f} x all {count:,}
  compute     {flops / 1e9:.4g} GFLOP per image, {flops * seen:.2e} FLOP for all steps{muon_work}
  memory      {fixed / 1e9:.3g} GB per GPU for weights, averages, gradients, optimizers' moments
  time        {duration(hours)} if each GPU reaches {args.tflops:g} TFLOP/s (an assumption)
  here        {seconds:.1f} s and {memory / 1e9:.1f} GB for a step of {job.micro_batch} images""")


def plain_args(args, job):
    """The flags as a dict of plain types, with the dtype that "auto" became."""
    flags = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    return flags | dict(dtype=job.dtype_name)


def peak_memory(device):
    """The most bytes that this process ever held: on its GPU, or resident in the CPU's memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                          # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024               # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def duration(hours):
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def versions():
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)


def git_commit():
    """The commit of this code, or "" where there is no git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()
    except OSError:
        return ""


# -------------------------------------------------------------------------------------------------
# processes and devices

@dataclass
class Job:
    """What is worked out when a run starts. The flags, args, stay as they were given."""
    device: str
    rank: int = 0                       # number of this process
    ranks: int = 1                      # processes under torchrun
    micro_batch: int = 1                # images per pass
    passes: int = 1                     # passes of this process per step
    dtype: torch.dtype = torch.float32  # of matrix products
    matmul_flops: float = 1.0           # FLOP per second of a large one

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")


def join_ranks(args):
    """The Job of this process, alone or beside the others of torchrun. The first alone prints."""
    job = Job(args.device)
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        cuda = job.device.startswith("cuda")
        if cuda:
            torch.cuda.set_device(job.device)
        # The first process may train a classifier or download for hours, while the others wait.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=timedelta(days=1))
        job.rank, job.ranks = dist.get_rank(), dist.get_world_size()
        if job.rank:
            sys.stdout = open(os.devnull, "w")
    return job


def split_batch(args, job):
    """Share a step's batch among the processes, and each share among passes of a micro-batch."""
    share, rest = divmod(args.batch_size, job.ranks)
    if rest:
        raise UserError(f"--batch-size {args.batch_size} is not a multiple of the {job.ranks} "
                        f"processes: make it one")
    job.micro_batch = min(args.micro_batch or share, share)
    if share % job.micro_batch:
        raise UserError(f"each of {job.ranks} process(es) has {share} images of --batch-size "
                        f"{args.batch_size}, no multiple of --micro-batch {job.micro_batch}: "
                        f"change one")
    job.passes = 1 if args.dry_run else share // job.micro_batch
    print(f"batch of {args.batch_size} images = {job.ranks} process(es) x {job.passes} pass(es) "
          f"of {job.micro_batch}")


def micro_rows(micro, job):
    """Rows of a step's batch that are this process's micro-batch: all together give the batch."""
    first = (job.rank * job.passes + micro) * job.micro_batch
    return slice(first, first + job.micro_batch)


def wrap_model(model, args, job):
    """The model as a step calls it: compiled if asked, gradients averaged over the processes."""
    if args.compile:
        # Block by block: they are all the same, so that one is compiled instead of a whole model.
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()
    if job.ranks > 1:
        # Buffers need no broadcast, because every process computes the same ones.
        model = DistributedDataParallel(model, broadcast_buffers=False)
    return model


def gradient_sync(model, micro, job):
    """Context of a pass: the last one of a step averages gradients, those before only add them."""
    if job.ranks > 1 and micro < job.passes - 1:
        return model.no_sync()
    return nullcontext()


def all_sum(x, device):
    """Replace a tensor by its sum over all processes."""
    if dist.is_initialized():
        total = x.to(device)
        dist.all_reduce(total)
        x.copy_(total)


def any_rank(flag):
    """Whether a flag is set in any process; all must ask together. Never waits for a GPU."""
    x = torch.tensor(float(bool(flag)))
    all_sum(x, "cpu")
    return x.item() > 0


def barrier():
    """Wait for all processes."""
    any_rank(False)


def first_rank_first(load, job):
    """load() in the first process, then in the others, which find what it downloads or trains."""
    if job.rank:
        barrier()
    result = load()
    if job.rank == 0:
        barrier()
    return result


def gather(x):
    """The rows of all processes' CPU tensors, however many each has, in the processes' order."""
    if not dist.is_initialized():
        return x
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return torch.cat(parts)


def gather_equal(x):
    """The rows of all processes' tensors, the same number in each; they stay on the device."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def choose_dtype(args, job):
    """Settle the dtype of matrix products, and measure their speed (mfu is a share of it)."""
    names = ["float32", "bfloat16"] if args.dtype == "auto" else [args.dtype]
    speeds = [matmul_speed(job.device, getattr(torch, name)) for name in names]
    if job.ranks > 1:
        dist.broadcast_object_list(speeds)                       # the first process decides
    ratio = speeds[-1] / speeds[0]                               # 1 where --dtype names one
    chosen = int(ratio > 1.3)
    job.dtype, job.matmul_flops = getattr(torch, names[chosen]), speeds[chosen]
    reason = "--dtype"
    if args.dtype == "auto":
        reason = f"a bfloat16 matrix product is {ratio:.1f} x as fast as a float32 one here"
    print(f"dtype {job.dtype_name} ({reason}), {job.matmul_flops / 1e9:.0f} GFLOP/s in a matrix "
          f"product = mfu 100%")


def matmul_speed(device, dtype, budget=0.4):
    """FLOP per second of a square matrix product, the best of several sides.

    The side doubles until the next one would exceed the budget in seconds: on a CPU without
    bfloat16 instructions one product of side 1024 takes 7 seconds.
    """
    best = spent = 0.0
    for side in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
        a = torch.randn(side, side, device=device).to(dtype)
        a @ a                                                    # the first one is slower
        # Small products are repeated for 10 ms, because another program may delay some of them.
        times = []
        while len(times) < 3 or sum(times) < 0.01:
            start = time.perf_counter()
            a @ a
            if a.is_cuda:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * side ** 3 / min(times))
        spent += sum(times)
        if spent + 4 * 8 * min(times) > budget:
            break
    return best


def autocast(job):
    """Context in which matrix products run in the job's dtype."""
    half = job.dtype != torch.float32
    return torch.autocast(torch.device(job.device).type, job.dtype, enabled=half)


# -------------------------------------------------------------------------------------------------
# flags that scripts share, and how a script starts and ends

DATA = ("shapes", "cifar10", "cifar100", "imagenet")    # all else that --data names is a folder


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and each flag's default; where it is None, the text tells it."""

    def _get_help_string(self, action):
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


def base_parser(doc, argv, follow=True):
    """(parser with the flags of every script, preset that --preset or --data names).

    follow: without --data, take the data set that the run in --out was trained on.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument_group("data and run").add_argument
    add("--data", default="shapes", help=", ".join(DATA) + ", or a folder of images")
    add("--data-dir", default="data",
        help="where CIFAR lies, or is downloaded to; ImageNet's folder of train and val")
    add("--preset", choices=PRESETS, help="sizes and schedule (default: by --data; folder: cifar)")
    add("--out", help="folder of the run's files (default: out/<data>)")
    add("--seed", type=int, default=0, help="of weights, batches and samples")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda, cuda:1, cpu")
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--data", "--preset", "--out"):
        peek.add_argument(flag)
    given = vars(peek.parse_known_args(argv)[0])
    saved = {}
    if follow and given["out"] and not given["data"]:
        flags = saved_flags(Path(given["out"]).expanduser())
        saved = {name: flags[name] for name in ("data", "data_dir", "preset") if name in flags}
        parser.set_defaults(**saved)
    name = given["preset"] or given["data"] or saved.get("preset") or saved.get("data", "shapes")
    return parser, preset_of(name)


def saved_flags(out):
    """The flags of the run in a folder, {} without one. A broken file is told when it is used."""
    for kind in ("gpt", "tokenizer"):
        try:
            return read_checkpoint(out / f"{kind}.pt", kind, mmap=True)["args"]
        except (UserError, RuntimeError, MemoryError):
            continue
    return {}


def preset_of(name):
    """The preset of that name, or of that --data: CIFAR-10 and folders take "cifar"."""
    return PRESETS.get(name, PRESETS["cifar"])


def add_settings(parser, title, settings, preset, without=()):
    """One flag per field of a dataclass (see setting); the preset may change the default."""
    add = parser.add_argument_group(title).add_argument
    for f in fields(settings):
        how = dict(type=f.type)
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif f.type is tuple:
            how = dict(type=float, nargs=len(f.default))
        if f.name not in without:
            add("--" + f.name.replace("_", "-"), **how, help=f.metadata["help"],
                default=preset.get(f.name, f.default))


def config_from_flags(config_class, args, **known):
    """The config of the flags that add_settings made, and of values that are known."""
    flags = {f.name: getattr(args, f.name) for f in fields(config_class) if f.name not in known}
    return config_class(**flags, **known)


def add_run_flags(parser):
    """What both training scripts take beside their settings."""
    add = parser.add_argument_group("run").add_argument
    add("--micro-batch", type=int,
        help="images per forward pass: fewer need less memory (default: a GPU's whole share)")
    add("--log-every", type=int, default=20, help="steps between log lines")
    add("--save-every", type=int, help="steps between checkpoints (default: --eval-every)")
    add("--keep", type=int, default=0, help="also keep the last KEEP checkpoints")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true",
           help="go on from the checkpoint in --out, with its flags where none are given")
    either("--overwrite", action="store_true", help="replace the checkpoint in --out")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="threads per process that decode image files")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="of matrix products; auto: the faster one")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the model")
    add("--grad-checkpoint", action=argparse.BooleanOptionalAction, default=False,
        help="keep only each block's input, compute the rest again: less memory, a third slower")
    add("--dry-run", action="store_true",
        help="do one step of one micro-batch, print what the whole run would take, write nothing")
    add("--gpus", type=int, default=8, help="of the dry run's plan")
    add("--tflops", type=float, default=150,
        help="of the dry run's plan: what each GPU reaches in bfloat16, an assumption")


def parse_training_args(parser, argv, kind, settings):
    """The flags of a training script. --resume takes those of the saved run as defaults."""
    args = finish_args(parser, parser.parse_args(argv))
    path = args.out / f"{kind}.pt"
    try:
        if args.resume and path.exists():
            # The first runs had no Muon.
            saved = dict(muon=False) | read_checkpoint(path, kind, mmap=True)["args"]
            # These belong to this call and this machine, never to the saved run.
            own = {"resume", "overwrite", "dry_run", "out", "device", "workers"}
            if saved["device"][:4] != args.device[:4]:           # another machine: choose anew
                own.add("dtype")
            saved = {k: v for k, v in saved.items() if k in vars(args).keys() - own}
            parser.set_defaults(**saved)
            args = finish_args(parser, parser.parse_args(argv))
            for name, old in saved.items():
                now = getattr(args, name)
                changed = list(now) != list(old) if isinstance(now, (tuple, list)) else now != old
                if changed and os.environ.get("RANK", "0") == "0":
                    print(f"resume: --{name.replace('_', '-')} is {now} now, it was {old}")
        for f in fields(settings) + fields(TrainingSettings):
            check_setting(f, getattr(args, f.name))
    except UserError as e:
        parser.error(str(e))
    return args


def finish_args(parser, args):
    """Refuse numbers that are too small, and fill in the device of this process and --out."""
    if (getattr(args, "keep", None) or 0) < 0:
        parser.error(f"--keep is {args.keep}: it must be at least 0")
    for name in ("batch_size", "micro_batch", "log_every", "save_every", "gpus", "num", "workers",
                 "tflops"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    for name, value in vars(args).items():
        if isinstance(value, str) and value.startswith("~"):     # --out=~/run: bash leaves it
            setattr(args, name, os.path.expanduser(value))
    if args.device.startswith("mps"):
        parser.error("--device mps is not supported yet, because it has no float64, which the "
                     "mapping and sampling need: use cpu")
    if args.device.startswith("cuda") and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"         # torchrun: a GPU per process
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as e:
        parser.error(f"--device {args.device}: {str(e).splitlines()[0]}")
    if args.data not in DATA:
        args.data = str(Path(args.data).resolve())
    args.out = Path(args.out or Path("out") / Path(args.data).name)
    return args


def run_script(main, args):
    """main(args). A user's mistake (exit 2) and a failed run (exit 1) are told in one line."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                       # names that it cannot print
            stream.reconfigure(errors="backslashreplace")
    code = 0
    try:
        main(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    except OSError as e:                                         # a full disk, a read-only folder
        print(f"failed: {e}", file=sys.stderr)
        code = 1
    except (RuntimeError, MemoryError) as e:
        line = str(e).split("\n")[0]
        if out_of_memory(e):
            name = "micro_batch" if hasattr(args, "micro_batch") else "batch_size"
            line = (f"out of memory with --{name.replace('_', '-')} {getattr(args, name)}: take a "
                    f"smaller one ({line})")
        elif not isinstance(e, FailedRun):
            raise
        print(f"failed: {line}", file=sys.stderr)
        code = 1
    if dist.is_initialized():
        # gloo's threads outlive the group and may abort Python's own exit (1 of 36 runs), so leave
        # without it.
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def keep_freed_memory():
    """Let glibc keep what a step frees: returning it and asking again takes 10 % of a CPU step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 30)                                # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, 2 ** 31 - 1)                            # M_TRIM_THRESHOLD, bytes


# -------------------------------------------------------------------------------------------------
# data sets. Each has len(), class_names, and batch(indices, crops=None) -> uint8 images
# (B, 3, S, S), labels (B,) long.

# What --dry-run assumes where a data set is not at hand: training images, classes.
EXPECTED = {"cifar10": (50_000, 10), "cifar100": (50_000, 100), "imagenet": (1_281_167, 1000)}


def open_data(args, image_size, job):
    """(train, val) of --data. The first process opens it first, and downloads it if it must."""
    name, root = args.data, Path(args.data_dir)
    found = True
    if name in CIFAR:
        found = find_cifar(name, root)
    elif name == "imagenet":                                     # by itself, or as Kaggle packs it
        found = any((root / place / "train").is_dir() for place in ("", *KAGGLE))
    elif name != "shapes":
        root = Path(name)
    if not found and getattr(args, "dry_run", False):
        number, classes = EXPECTED[name]
        print(f"{name} is not in {root}: the plan assumes {number:,} images of {classes:,} "
              f"classes")
        train, val = Shapes("train", image_size), Shapes("val", image_size)      # any images do
        train.size = number
        train.class_names = val.class_names = [str(c) for c in range(classes)]
        return train, val

    def load():
        if name == "shapes":
            return Shapes("train", image_size), Shapes("val", image_size)
        if name in CIFAR:
            return Cifar(name, "train", root, image_size), Cifar(name, "val", root, image_size)
        if not found:
            raise UserError(f"{root} has no train folder: --data-dir names the one that holds "
                            f"ImageNet's train/<wnid>/*.JPEG and val/<wnid>/*.JPEG")
        if not root.is_dir():
            raise UserError(f"{root} is not a folder: --data takes {', '.join(DATA)} or a folder "
                            f"of images")
        return open_folder(root, image_size, args.workers, args.out)
    return first_rank_first(load, job)


# -------------------------------------------------------------------------------------------------
# built-in images: ten shapes on a smooth background (low frequencies), with an outline (middle
# frequencies) and a texture (high frequencies)

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
    """Drawn images without end: image i depends on (seed, split, i) alone, class = i mod 10."""
    class_names = list(SHAPES)

    def __init__(self, split, image_size, seed=0):
        self.image_size = image_size
        # Train and val never share a random stream.
        self.first_stream = (2 * seed + (split == "val")) * 2 ** 40
        self.size = 10_000 if split == "val" else 1_000_000

    def __len__(self):
        return self.size

    def batch(self, indices, crops=None):
        """indices (B,) -> uint8 images (B, 3, S, S), labels (B,) long."""
        indices = torch.as_tensor(indices)
        labels = indices % len(SHAPES)
        u = uniforms(self.first_stream + indices, 16).numpy().astype(np.float32)
        u = u.T[:, :, None, None, None]                                     # 16 of (B, 1, 1, 1)
        axis = (np.arange(self.image_size, dtype=np.float32) + 0.5) * 2 / self.image_size - 1
        X, Y = axis[None, :], axis[:, None]                                 # pixel centres

        # The shape's frame has its own centre and radius, and is turned by up to 9 degrees. A
        # crescent may also open to the other side.
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
        """Shade of the fill: plain, stripes, checks or dots of a fixed period."""
        period = 0.3                                             # 4.8 px at 32 px
        across = np.sin(x * (2 * np.pi / period))
        down = np.sin(y * (2 * np.pi / period))
        kind = np.floor(4 * u[12])
        pattern = np.select([kind == 1, kind == 2, kind == 3],
                            [down, 1.6 * across * down, across + down - 0.5])
        return np.where(kind == 0, 1, 0.78 + 0.22 * np.clip(2 * pattern, -1, 1))


# -------------------------------------------------------------------------------------------------
# CIFAR, from the official binary archives (no pickles)

CIFAR = {
    "cifar10": dict(archive="cifar-10-binary.tar.gz", folder="cifar-10-batches-bin",
                    md5="c32a1d4ab5d03f1284b67883e8d87530", val=["test_batch.bin"],
                    train=[f"data_batch_{i}.bin" for i in range(1, 6)],
                    label_bytes=1, names="batches.meta.txt"),
    "cifar100": dict(archive="cifar-100-binary.tar.gz", folder="cifar-100-binary",
                     md5="03b5dce01913d631647c71ecec9e9cb8", val=["test.bin"],
                     train=["train.bin"],
                     label_bytes=2, names="fine_label_names.txt"),   # a coarse label comes first
}


def find_cifar(name, data_dir):
    """The folder of CIFAR's files: --data-dir, or the archive's folder inside it, or None."""
    for root in (Path(data_dir) / CIFAR[name]["folder"], Path(data_dir)):
        if (root / CIFAR[name]["val"][0]).exists():
            return root


class Cifar:
    """CIFAR-10 or CIFAR-100, whole in memory; "val" is the official test set."""

    def __init__(self, name, split, data_dir, image_size):
        if image_size != 32:
            raise UserError(f"{name} images are 32 px, --image-size is {image_size}: give "
                            f"--image-size 32")
        about, data_dir = CIFAR[name], Path(data_dir)
        root = find_cifar(name, data_dir)
        if not root:
            root = data_dir / about["folder"]
            there = (data_dir / about["archive"]).exists()       # the user's own: it stays
            file = download(f"https://www.cs.toronto.edu/~kriz/{about['archive']}",
                            data_dir / about["archive"], about["md5"],
                            f"fetch it elsewhere and unpack it into {data_dir}, or name its "
                            f"folder by --data-dir")
            with tarfile.open(file) as archive:
                # Pythons before 3.10.12 and 3.11.4 know no filters.
                safe = dict(filter="data") if hasattr(tarfile, "data_filter") else {}
                archive.extractall(data_dir, **safe)
            if not there:
                file.unlink()
        head = about["label_bytes"]
        records = []
        for path in [root / name for name in about[split]]:
            data = np.fromfile(path, np.uint8)
            if data.size == 0 or data.size % (head + 3072):
                raise UserError(f"{path} has {data.size} bytes, not a multiple of {head + 3072}: "
                                f"it is truncated, delete it")
            records.append(data.reshape(-1, head + 3072))
        records = np.concatenate(records)
        self.labels = torch.from_numpy(records[:, head - 1].astype(np.int64))
        self.images = torch.from_numpy(records[:, head:].reshape(-1, 3, 32, 32))
        self.class_names = (root / about["names"]).read_text().split()

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, crops=None):
        indices = torch.as_tensor(indices)
        return self.images[indices], self.labels[indices]


def download(url, path, digest, remedy):
    """Fetch a file once; returns its path. A partial or wrong file (md5, sha256) is removed."""
    part = Path(f"{path}.part")
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=10) as reply, open(part, "wb") as file:
                size = int(reply.headers.get("Content-Length", 0))
                with tqdm.wrapattr(reply, "read", total=size, desc=url) as stream:
                    shutil.copyfileobj(stream, file)
            os.replace(part, path)
        except (OSError, http.client.HTTPException) as e:
            part.unlink(missing_ok=True)
            raise UserError(f"cannot download {url} to {path} ({e}), checksum {digest}: "
                            f"{remedy}") from None
    kind = "md5" if len(digest) == 32 else "sha256"
    found = hashlib.new(kind, path.read_bytes()).hexdigest()
    if found != digest:
        path.unlink()
        raise UserError(f"{path} from {url} had checksum {found}, not {digest}, and is removed: "
                        f"run again, or {remedy}")
    return path


# -------------------------------------------------------------------------------------------------
# folders of images: train/ and val/ inside, or one folder per class, or images alone (one class)

PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 28          # some programs write long texts into a picture
EXTENSIONS = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
HELD_OUT = "val", "valid", "validation", "test"  # names of a held-out folder, the best first
KAGGLE = "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC"   # where Kaggle's ImageNet has train and val


def visible(names):
    """Sorted names, without those that other programs leave behind (.DS_Store, __MACOSX)."""
    return sorted(name for name in names if not name.startswith((".", "__MACOSX")))


def image_names(names):
    return [name for name in visible(names) if os.path.splitext(name)[1].lower() in EXTENSIONS]


def images_below(folder):
    """Paths of all image files below a folder, sorted, so that image i is the same everywhere."""
    files, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        # A link may lead to a folder that was seen already, even to one above it.
        place = os.path.realpath(where)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = visible(folders)
        files += [os.path.join(where, name) for name in image_names(names)]
    return sorted(files)


def list_classes(folder, alone, out=None):
    """{class name: files}: sub-folders are classes; images alone are one class, named `alone`.

    out: the run's own folder, which may lie in the data folder and is no class.
    """
    names = visible(os.listdir(folder))
    places = {name: folder / name for name in names if (folder / name).is_dir()
              and not (out and out.resolve().is_relative_to((folder / name).resolve()))}
    beside = image_names(names)
    if places and beside:
        print(f"warning: {folder} has {len(beside)} images beside its {len(places)} class "
              f"folders: they are left out")
    files = {}
    for name, place in (places or {alone: folder}).items():
        files[name] = images_below(place)
        if not files[name]:
            raise UserError(f"{place} has 0 images ({' '.join(sorted(EXTENSIONS))}): add some or "
                            f"remove it")
    return files


def read_table(root, name, separator):
    """{first word: the rest} of the lines of a file of ImageNet's, in a folder or above it."""
    for place in (root, *root.resolve().parents[:3]):
        if (place / name).is_file():
            parts = [line.partition(separator) for line in open(place / name, encoding="utf-8")]
            return {first: rest.strip() for first, _, rest in parts if rest.strip()}
    return {}


def open_folder(root, image_size, workers, out=None):
    """(train, val) of a folder. Class names are its folders', in words where ImageNet has some."""
    root = Path(root)
    for place in KAGGLE:
        if (root / place).is_dir():
            root = root / place
    folders = [name for name in visible(os.listdir(root)) if (root / name).is_dir()]
    held_out = [name for name in HELD_OUT if name in folders]
    # Beside other folders and without a held-out one, "train" is a class, such as of vehicles.
    if "train" in folders and (held_out or folders == ["train"]):
        train = list_classes(root / "train", root.name)
    else:
        train, held_out = list_classes(root, root.name, out), []
    if held_out:
        val = list_classes(root / held_out[0], root.name)
    else:
        train, val = hold_out(root, train)
    if list(val) == [root.name] and len(train) > 1:              # Kaggle's val has no folders
        solution = read_table(root, "LOC_val_solution.csv", ",")
        files, val = val[root.name], {name: [] for name in train}
        for file in files:
            val.setdefault(solution.get(Path(file).stem, "?").split()[0], []).append(file)
    if val.keys() != train.keys():
        odd = sorted(val.keys() ^ train.keys())
        raise UserError(f"{root}: {len(train)} classes in train and {len(val)} in val, {len(odd)} "
                        f"of them in one only (first: {odd[0]}): make them the same, each image "
                        f"in its class's folder")
    words = read_table(root, "LOC_synset_mapping.txt", " ")
    names = [f"{words[name]} ({name})" if name in words else name for name in train]
    return (Folder(list(train.values()), names, image_size, workers),
            Folder(list(val.values()), names, image_size, workers))


def hold_out(root, classes):
    """(train, val), each {class name: files}: a seeded 5 % of the images, at least one, is val."""
    total = sum(len(files) for files in classes.values())
    if total < 2:
        raise UserError(f"{root} has {total} image, and 1 is held out for validation: add more")
    order = np.random.RandomState(0).permutation(total).tolist()
    held_out = set(order[:max(1, round(0.05 * total))])
    print(f"{root} has no {', '.join(HELD_OUT[:-1])} or {HELD_OUT[-1]} folder: {len(held_out)} of "
          f"{total} images (5 %, seeded) are held out")
    train, val, numbers = {}, {}, count()
    for name, files in classes.items():
        train[name], val[name] = [], []
        for file in files:
            part = val if next(numbers) in held_out else train
            part[name].append(file)
    return train, val


class Folder:
    """Image files by class, decoded and cropped when a batch asks for them, by a few threads."""

    def __init__(self, files_by_class, class_names, image_size, workers):
        self.class_names = class_names
        self.files = list(chain.from_iterable(files_by_class))
        counts = torch.tensor([len(files) for files in files_by_class])
        self.labels = torch.arange(len(counts)).repeat_interleave(counts)
        self.image_size = image_size
        self.bad = set()                                         # files that cannot be decoded
        self.pool = ThreadPoolExecutor(max(1, workers))          # Pillow decodes outside the lock

    def __len__(self):
        return len(self.files)

    def load(self, i, crop):
        """(pixels (S, S, 3), label) of file i, or of the next file that can be decoded."""
        try:
            return decode_image(self.files[i], self.image_size, crop), self.labels[i]
        except UserError as e:
            if i not in self.bad:
                self.bad.add(i)
                print(f"{e}: replaced by the next image, {len(self.bad)} so far", file=sys.stderr)
            if len(self.bad) * 1000 > len(self):
                raise UserError(f"{len(self.bad)} of {len(self)} images cannot be decoded, more "
                                f"than 1 in 1,000: remove those named above") from None
        return self.load((i + 1) % len(self), crop)

    def batch(self, indices, crops=None):
        """crops (B, 3): scale, y, x of any_crop; None crops at the centre."""
        indices = torch.as_tensor(indices).tolist()
        crops = [None] * len(indices) if crops is None else crops.tolist()
        images, labels = zip(*self.pool.map(self.load, indices, crops))
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return images.contiguous(), torch.stack(labels)


def decode_image(path, size=None, crop=None):
    """An image file as a viewer shows it, uint8 RGB (H, W, 3). UserError when it is broken.

    size: None = the whole picture, else ADM's square crop of that side, or any_crop(*crop).
    """
    try:
        with Image.open(path) as image:
            if crop is not None:
                image = any_crop(image, size, *crop)
            elif size is not None:
                image = center_crop(upright_rgb(image), size)
            else:
                image = upright_rgb(image)
            return np.array(image)
    except Exception as e:                       # broken files raise nearly anything in Pillow
        if out_of_memory(e):
            raise
        raise UserError(f"cannot decode {path} ({e})") from None


def upright_rgb(image):
    """A Pillow image turned as its EXIF says, 16 bits cut to 8, transparency on white, in RGB."""
    if max(image.size) > 50 * min(image.size):
        raise ValueError(f"{image.width} x {image.height} px, too narrow for a square crop")
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range no one knows")
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:                            # a broken EXIF block tells nothing: leave it out
        pass
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's crop, the field's: halve with BOX while large, bicubic to the side, middle square."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    sides = round(image.width * scale), round(image.height * scale)
    image = image.resize(sides, Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def any_crop(image, size, scale, y, x):
    """A square of side size, y and x (0 .. 1) of the way down and to the right, of an image that
    has a short side of scale * size."""
    image.draft("RGB", (2 * size, 2 * size))     # a JPEG far too large: decode a smaller one
    image = upright_rgb(image)
    side = min(image.size) / scale
    left = (image.width - side) * x
    top = (image.height - side) * y
    return image.resize((size, size), Image.BICUBIC, box=(left, top, left + side, top + side))


def to_float(images):
    """uint8 0 .. 255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """[-1, 1] -> uint8 by rounding. (ADM truncates, which loses a level of 63 values in 256.)"""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


# -------------------------------------------------------------------------------------------------
# perceptual loss

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
LPIPS_URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/"
             "weights/v0.1/vgg.pth")
LPIPS_MD5 = "d507d7349b931f0638a25a48a722f98a"


def feature_distance(taps_a, taps_b, weights):
    """LPIPS of two lists of features (B, C, H, W): the sum of the mean squared differences of unit
    features, weighted per channel -> (B,)."""
    total = 0
    for a, b, weight in zip(taps_a, taps_b, weights):
        difference = (unit_features(a) - unit_features(b)).square() * weight
        total = total + difference.sum(1).mean((1, 2))
    return total


def unit_features(x):
    """Features (B, C, H, W), divided by their length over the channels."""
    x = x.float()
    # The 1e-20 keeps the gradient of the root finite where all channels are 0.
    return x / ((x.square().sum(1, keepdim=True) + 1e-20).sqrt() + 1e-10)


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


def load_lpips(vgg=None, linear=None, device="cpu"):
    """LPIPS with the published weights: from files (VGG16, linear layers), or downloaded once."""
    vgg = vgg or download(VGG_URL, weights_folder() / "vgg16-397923af.pth", VGG_SHA256,
                          "name a copy by --vgg")
    linear = linear or download(LPIPS_URL, weights_folder() / "lpips-v0.1-vgg.pth", LPIPS_MD5,
                                "name a copy by --lpips-weights")
    model = LPIPS()
    trunk = read_weights(vgg, "file of VGG16's weights")
    load_weights(model.features, {name.removeprefix("features."): weight for name, weight in
                                  trunk.items() if name.startswith("features.")}, vgg)
    layers = read_weights(linear, "file of LPIPS' weights")      # lin0.model.1.weight ...
    load_weights(model.lin, {name[3]: weight.flatten() for name, weight in layers.items()}, linear)
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def weights_folder():
    """Where PyTorch keeps downloaded weights; TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints"


class Classifier(nn.Module):
    """Small residual network: uint8 (B, 3, S, S) -> features (B, C), None, logits (B, classes).

    Trained on the data set at hand, so nothing is downloaded. evaluate.py measures with one of
    these (JUDGE), and another one may serve in the perceptual loss (PERCEPTUAL). They differ in
    size and seed, because a loss must not be its own judge.
    """

    def __init__(self, num_classes, image_size, widths):
        super().__init__()
        self.image_size = image_size

        def conv(channels_in, channels, stride=1):
            return nn.Sequential(nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
                                 nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

        self.stem = conv(3, widths[0])
        self.down = nn.ModuleList(conv(a, b, stride=2) for a, b in zip(widths, widths[1:]))
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
        H, W = images.shape[-2:]
        S = self.image_size
        if (H, W) != (S, S):
            raise UserError(f"images are {W} x {H}, the classifier reads {S} x {S}: resize them, "
                            f"or --features inception")
        features = self.taps(to_float(images))[-1].mean((2, 3))
        return features, None, self.head(features)


class ClassifierDistance(nn.Module):
    """As LPIPS, with a Classifier's features and equal weights: two batches in [-1, 1] -> (B,)."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, a, b):
        return feature_distance(self.classifier.taps(a), self.classifier.taps(b), repeat(1.0))


JUDGE = dict(widths=(32, 48, 96, 192), seed=0)
PERCEPTUAL = dict(widths=(32, 64, 128, 128), seed=1)


def load_classifier(path, kind, data_name, train, val, image_size, job):
    """The classifier in a file, of kind JUDGE or PERCEPTUAL; trained and kept when absent."""
    path = Path(path)
    about = dict(data=data_name, image_size=image_size, classes=train.class_names, **kind)
    if not path.exists():
        print(f"training a classifier of {data_name} for {path}, minutes on a CPU")
        model, accuracy = train_classifier(train, val, image_size, device=job.device, **kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, "classifier", **about, accuracy=accuracy, model=model.state_dict())
    saved = read_checkpoint(path, "classifier")
    for name, value in about.items():
        if saved.get(name) != value:
            raise UserError(f"{path} is of {name} {saved.get(name)}, this run needs {value}: "
                            f"delete it, or name another file")
    model = Classifier(len(train.class_names), image_size, kind["widths"])
    load_weights(model, saved["model"], path)
    print(f"{path}: test accuracy {saved['accuracy']:.1%}")
    model.to(job.device, memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def train_classifier(train, val, image_size, widths, seed, device, steps=3000, batch_size=128):
    """(classifier, accuracy on held-out images), trained from scratch: minutes on a CPU."""
    torch.manual_seed(seed)
    model = Classifier(len(train.class_names), image_size, widths)
    model = model.to(device, memory_format=torch.channels_last)
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
    for chosen in torch.arange(min(len(val), 10_000)).split(500):
        images, labels = val.batch(chosen)
        with torch.no_grad():
            _, _, logits = model(images.to(device))
        hits.append(logits.argmax(-1).cpu() == labels)
    return model, torch.cat(hits).double().mean().item()


def augment(images):
    """Random mirror images, and shifts of up to an eighth of the side, of a batch (B, 3, S, S)."""
    B, _, S, _ = images.shape
    pad = S // 8
    mirrored = torch.rand(B, 1, 1, 1) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    images = F.pad(images.float(), (pad, pad, pad, pad), mode="reflect")
    rows = torch.randint(2 * pad + 1, (B, 1)) + torch.arange(S)                    # (B, S)
    columns = torch.randint(2 * pad + 1, (B, 1)) + torch.arange(S)
    image = torch.arange(B)[:, None, None]
    return images[image, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


# -------------------------------------------------------------------------------------------------
# adversarial loss

class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): images in [-1, 1] (B, 3, H, W) -> logits (B, 1, H/8, W/8).

    A logit judges a patch: above 0 it takes it for real. GroupNorm instead of BatchNorm, so that
    the logits of an image do not depend on its batch.
    """

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for kernel, stride in ((4, 2), (4, 2), (3, 1)):
            layers += [nn.Conv2d(width, 2 * width, kernel, stride, 1),
                       nn.GroupNorm(32, 2 * width), nn.LeakyReLU(0.2)]
            width = 2 * width
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
        # Running means of the logits of real and of generated images, for LeCAM.
        self.register_buffer("logit_means", torch.zeros(2))

    def forward(self, x):
        return self.layers(x.contiguous(memory_format=torch.channels_last)).float()


def hinge_loss(real, fake):
    """The discriminator's loss: logits of real patches are pushed above 1, others below -1."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def lecam_loss(real, fake, real_mean, fake_mean):
    """LeCAM (Tseng et al. 2021): logits stay near the running mean of the other kind's."""
    return F.relu(real - fake_mean).square().mean() + F.relu(real_mean - fake).square().mean()


# -------------------------------------------------------------------------------------------------
# pictures

def image_grid(rows, names=None, columns=None):
    """Pillow picture of rows of images: a list of uint8 (n, 3, S, S).

    names stand to the left of the rows, columns above the columns. Small images are enlarged.
    """
    S = rows[0].shape[-1]
    cell = S * max(1, 64 // S)
    gap = 2
    font = ImageFont.load_default(size=12)
    left = max(int(font.getlength(name)) for name in names) + 10 if names else gap
    top = 20 if columns else gap
    width = left + max(len(row) for row in rows) * (cell + gap)
    picture = Image.new("RGB", (width, top + len(rows) * (cell + gap)), "white")
    draw = ImageDraw.Draw(picture)
    for i, title in enumerate(columns or []):
        centre = left + i * (cell + gap) + cell / 2
        draw.text((centre, top / 2), title, fill="black", font=font, anchor="mm")
    for j, row in enumerate(rows):
        y = top + j * (cell + gap)
        if names:
            draw.text((5, y + cell / 2), names[j], fill="black", font=font, anchor="lm")
        for i, pixels in enumerate(row):
            tile = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
            tile = tile.resize((cell, cell), Image.NEAREST)
            picture.paste(tile, (left + i * (cell + gap), y))
    return picture


def save_image_grid(path, rows, names=None, columns=None):
    """image_grid as a PNG."""
    save_picture(path, image_grid(rows, names, columns))


def save_picture(path, picture):
    """A Pillow picture as a PNG, written under a temporary name first."""
    picture.save(f"{path}.tmp", format="PNG", optimize=True)
    os.replace(f"{path}.tmp", path)


if __name__ == "__main__":
    run_script(main, parse_args())
