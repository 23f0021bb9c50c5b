"""Train the spectral tokenizer (paper, section 3.3): images -> out/<data>/tokenizer.pt.

  python train_tokenizer.py                                     # built-in shapes, a laptop CPU
  python train_tokenizer.py --data cifar10                      # downloaded when absent
  python train_tokenizer.py --data /my/images --image-size 64   # a folder of your own
  torchrun --nproc-per-node 8 train_tokenizer.py --data imagenet --data-dir /path/to/ILSVRC

out/<data>/ also gets recon.png (a spectrum in its windows, sub-images, reconstructions),
loss-tokenizer.png and log-tokenizer.jsonl. Read settings, the training step, main with its loop,
then what they use.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import count

from spectralar import (Block, Help, SpectralTokenizer, TokenizerConfig, UserError, add_settings,
                        all_sum, autocast, base_parser, config_from_flags, gather, low_pass,
                        nested_loss, one_line, parse_flags, random_streams, read_checkpoint,
                        run_script, sample_levels, save_checkpoint, setting, start_job, sub_images,
                        to_float, to_uint8, uniforms)

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from evaluate import LPIPS  # noqa: F401 (can be imported from here, too)
from evaluate import (batch_indices, check_data, codebook_use, draw_levels, effective_rank,
                      load_perceptual, open_data, pick_images, psnr, save_charts)
from sample import spread_levels

# ---- settings: each field is a flag -------------------------------------------------------------
@dataclass
class TrainingSettings:
    """Of both training scripts. The defaults are the tokenizer's, for shapes."""
    steps: int = setting(1200, "optimizer steps")
    batch_size: int = setting(16, "images per step, over all GPUs")
    muon: bool = setting(True, "Muon for the matrices of the blocks, AdamW for all else; AdamW "
                               "alone needs a smaller --lr, about a quarter")
    lr: float = setting(4e-3, "peak learning rate")
    betas: tuple = setting((0.9, 0.99), "of AdamW")
    weight_decay: float = setting(1e-4, "of matrices; nothing else decays")
    warmup: int = setting(100, "steps of linear warm-up")
    hold: float = setting(0.0, "share of the run at the peak, before the cosine to a tenth of it")
    clip: float = setting(1.0, "largest gradient norm; 0 = no clipping")
    ema: float = setting(0.995, "decay of the averaged weights, which are evaluated")
    eval_every: int = setting(600, "steps between evaluations with pictures")


@dataclass
class TokenizerSettings:
    """The weights of the losses, and the evaluation."""
    prefix_weight: float = setting(1.0, "weight of the shorter level; the full one has 1")
    perceptual: float = setting(0.0, "weight of the perceptual loss; 0 = none")
    perceptual_start: int = setting(0, "step at which the perceptual loss begins")
    perceptual_net: str = setting("vgg", "vgg: LPIPS, downloaded; classifier: a small network "
                                  "(cifar10: in docs/weights; others: trained on the data set, "
                                  "kept as perceptual.pt in --out); or such a file")
    gan: float = setting(0.0, "weight of the adversarial loss, at the full level; 0 = none")
    gan_start: int = setting(0, "step at which the adversarial loss begins")
    eval_images: int = setting(512, "held-out images per evaluation")


# What each preset changes of the defaults; those under "gpt" are of train_gpt.py.
PRESETS = {
    # minutes on a laptop CPU; with patches of 8 instead of 4 a step takes about half the time
    "shapes": dict(patch_size=8, gpt=dict(code_images=20_000)),
    # one to two hours on one CPU core, 40 % of them for the generator; folders take it, too.
    # The small prefix_weight favours the full level, by which samples are judged (docs/claims.md).
    "cifar": dict(
        num_tokens=64, codebook_size=1024, width=192, heads=6, power=0.5, steps=4000, warmup=200,
        prefix_weight=0.25, perceptual=0.5, perceptual_start=1500, perceptual_net="classifier",
        eval_every=500,
        gpt=dict(width=256, depth=6, heads=8, steps=2000, warmup=200, ema=0.995, eval_every=500)),
    # the paper's size: ViT-B encoder and decoder, d16 generator; Muon was not tried here
    "imagenet": dict(
        image_size=256, patch_size=16, num_tokens=64, codebook_size=4096, width=768, depth=12,
        heads=12, steps=1_000_000, batch_size=256, muon=False, lr=1e-4, warmup=10_000, ema=0.999,
        perceptual=1.0, gan=0.1, gan_start=200_000, eval_every=5000,
        gpt=dict(width=None, depth=16, heads=None, steps=333_600, batch_size=768, muon=False,
                 lr=3e-4, warmup=6672, ema=0.9999, eval_every=5000, views="ten-crop")),
}


def parse_args(argv=None):
    parser, preset = training_parser(__doc__, argv)
    add_settings(parser, "model", TokenizerConfig, preset)
    add_settings(parser, "losses and evaluation", TokenizerSettings, preset)
    add_settings(parser, "training", TrainingSettings, preset)
    return parse_training_flags(parser, argv, "tokenizer")


# ---- one training step --------------------------------------------------------------------------
def training_step(step, batch, parts, wrapped, perceptual, args, job):
    """Losses, gradients and updates of one step; returns {term: value} for the log.

    batch: this process's micro-batches, each (rows of the whole batch, uint8 images (b, 3, S, S)).
    parts: the run's models and optimizers. wrapped: the models as a step calls them (wrap_model).
    """
    model = parts["model"]
    discriminator = parts.get("discriminator")
    passes = len(batch)

    # Some losses join later, when there is something in the reconstructions to judge.
    if step < args.perceptual_start:
        perceptual = None
    if step < args.gan_start:
        discriminator = None

    # All draws of a step follow from the seed and the step: every process draws the same levels,
    # and a run that is resumed draws the levels that it would have drawn.
    stream = random_streams("tokenizer step", args.seed, step)
    torch.manual_seed(stream.item())
    levels = sample_levels(args.batch_size, model.config.num_tokens, model.config.flat)

    vectors = []
    codes = []
    terms = {}
    for micro, (rows, images) in enumerate(batch):
        images = images.to(job.device, non_blocking=True)
        images = to_float(images)
        its_levels = levels[rows].to(job.device, non_blocking=True)
        last = micro == passes - 1

        # The discriminator is frozen here, because this pass trains the tokenizer only.
        if discriminator:
            discriminator.requires_grad_(False)
        # Gradients of all passes add up. Divided by their number, they are those of the batch.
        with gradient_sync(wrapped["model"], last, job):
            losses, recon, z, code = tokenizer_losses(
                wrapped["model"], images, its_levels, model.edges, perceptual, discriminator,
                args, job)
            loss = losses["loss"] / passes
            loss.backward()
        vectors.append(z)
        codes.append(code)
        add_mean(terms, losses, passes)

        # The discriminator learns from the same images and their full-level reconstructions.
        if discriminator:
            discriminator.requires_grad_(True)
            with gradient_sync(wrapped["discriminator"], last, job):
                disc = discriminator_loss(wrapped["discriminator"], images, recon, job)
                loss = disc / passes
                loss.backward()
            add_mean(terms, {"disc": disc}, passes)

    # Only now the gradients are those of the whole batch, so that they can be clipped.
    optimizers = [parts["optimizer"], parts.get("muon")]
    terms["norm"] = optimizer_step(model, optimizers, step, args)
    if discriminator:
        optimizers = [parts["discriminator_optimizer"]]
        optimizer_step(discriminator, optimizers, step, args)

    # Codes that no image of the whole batch chose may be dead, so every process must see them all.
    rows = slice(batch[0][0].start, batch[-1][0].stop)
    vectors = torch.cat(vectors)                                                # (share, N, d)
    vectors = gather(vectors, rows, args.batch_size)                            # (B, N, d)
    codes = torch.cat(codes)
    codes = gather(codes, rows, args.batch_size)                                # (B, N)
    model.quantizer.update(vectors.flatten(0, 1), codes.flatten())
    update_ema(parts["ema"], model, args.ema, step)
    return terms


def tokenizer_losses(model, images, levels, edges, perceptual, discriminator, args, job):
    """Forward pass and losses (paper, Eq. 7) of images (b, 3, S, S) at levels (b, G).

    Returns {term: loss}, full-level reconstructions (b, 3, S, S), and for the codebook's update
    the encoder outputs (b, N, d) and codes (b, N). perceptual, discriminator: None = no such term.
    """
    losses = {}
    with autocast(job):
        recon, vq_loss, z, codes = model(images, levels)                        # (b, G, 3, S, S)
        targets = sub_images(images, levels, edges)                             # (b, G, 3, S, S)
        full = recon[:, 0]

        # Each level against its own sub-image: this is what orders the tokens.
        weights = torch.full(levels.shape[1:], args.prefix_weight, device=job.device)   # (G,)
        weights[0] = 1                                   # of the full level
        losses["rec"] = nested_loss(recon, targets, weights=weights)
        loss = losses["rec"]
        if perceptual:
            losses["perceptual"] = nested_loss(recon, targets, perceptual, weights)
            loss = loss + args.perceptual * losses["perceptual"]
        losses["vq"] = vq_loss
        loss = loss + vq_loss

        # Only full reconstructions can look real; a blurred level could not.
        if discriminator:
            logits = discriminator(full)
            losses["gan"] = -logits.mean()
            loss = loss + args.gan * losses["gan"]
    losses = {"loss": loss, **losses}
    return losses, full.detach(), z.detach(), codes


# ---- the run ------------------------------------------------------------------------------------
def main(args):
    job = start_job(args)
    path = args.out / "tokenizer.pt"
    start_folder(path, args)
    stamp = file_stamp(path)

    # The models and optimizers, whose state the checkpoint keeps.
    parts = build_tokenizer_parts(args, job)
    start = 0
    if args.resume:
        start = restore(path, "tokenizer", parts, args)
    models = [name for name in ("model", "discriminator") if name in parts]
    wrapped = {name: wrap_model(parts[name], args, job) for name in models}

    # The images, and the network that compares them beside the squared error.
    image_size = parts["model"].config.image_size
    train, val = open_data(args, image_size, job)
    data = train.fingerprint()
    if args.resume:
        check_data(path, train, args)
    batches = image_batches(train, args, job, start)
    perceptual = None
    if args.perceptual and args.perceptual_start < args.steps:
        perceptual = load_perceptual(train, val, image_size, args, job)

    log = Log(args.out / "log-tokenizer.jsonl", parts["model"], args, job)
    caught = catch_signals(job)
    save_every = args.save_every or args.eval_every

    for step in range(start, args.steps):
        # The batch was made while the step before it ran.
        batch = next(batches)
        terms = training_step(step, batch, parts, wrapped, perceptual, args, job)
        log.add(terms)

        # What is due after this step? The last one, and the one at Ctrl-C, are always saved.
        done = step + 1
        leaves = done == args.steps or bool(caught)
        saves = leaves or done % save_every == 0
        evaluates = done == args.steps or done % args.eval_every == 0

        # A loss that is not finite ends the run here, before it can be saved.
        if saves or evaluates or done % args.log_every == 0:
            log.report(done)
        # Save first: a picture that cannot be written must not cost the steps of hours.
        if saves:
            stamp = save_run(path, "tokenizer", parts, done, stamp, args, job, data=data)
        if evaluates and job.rank == 0:
            record = evaluate_tokenizer(parts["ema"], val, args, job)
            log.write(step=done, **record)
            log.draw(args.out / "loss-tokenizer.png", {
                "training batches": ["loss", "rec"],
                "PSNR of held-out images, by tokens (dB)": [*map(str, record["psnr_image"])]})
            log.reset()                  # the evaluation's time is not that of a step
        if leaves:
            break

    if done < args.steps:
        raise UserError(f"{caught[0]} after step {done}: saved {path}, --resume goes on")
    print(f"saved {path}, {args.out / 'recon.png'}, {args.out / 'loss-tokenizer.png'}")


def build_tokenizer_parts(args, job):
    """{name: model or optimizer} of the run."""
    torch.manual_seed(random_streams("tokenizer weights", args.seed, 0).item())
    model = SpectralTokenizer(config_from_flags(TokenizerConfig, args)).to(job.device)
    parts = dict(model=model, ema=copy.deepcopy(model).eval(), **make_optimizers(model, args, job))

    if args.gan:
        discriminator = Discriminator().to(job.device, memory_format=torch.channels_last)
        parts["discriminator"] = discriminator
        # AdamW trains all of it, and takes a quarter of the rate that suits Muon.
        group = dict(params=discriminator.parameters(), lr_scale=0.25 if args.muon else 1.0)
        parts["discriminator_optimizer"] = torch.optim.AdamW(
            [group], args.lr, (0.5, 0.9), weight_decay=0, fused=True)
    return parts


@torch.no_grad()
def evaluate_tokenizer(model, data, args, job):
    """PSNR of each level, to its sub-image and to the image, and the use of the codebook."""
    config = model.config
    levels = [config.num_tokens] if config.flat else spread_levels(config.num_tokens)
    scores, codes = [], []
    for chosen in pick_images(len(data), args.eval_images).split(64):
        images = to_float(data.batch(chosen)[0].to(job.device))
        with autocast(job):
            codes.append(model.encode(images))
            outputs = [to_uint8(model.decode(codes[-1], level)) for level in levels]
        truths = [to_uint8(low_pass(images, model.edges[level - 1])) for level in levels]
        score = [torch.stack([psnr(output, truth), psnr(output, to_uint8(images))])
                 for output, truth in zip(outputs, truths)]
        scores.append(torch.stack(score))                                       # (G, 2, b)
    draw_levels(args.out / "recon.png", model, data, levels, job)

    means = dict(zip(levels, torch.cat(scores, 2).mean(2).tolist()))
    codes = torch.cat(codes)
    used, perplexity, by_position = codebook_use(codes, config.codebook_size)
    rank = effective_rank(model.quantizer.vectors(codes.unique()))
    print("  tokens  window  PSNR to sub-image  to image")
    for level, (to_sub_image, to_image) in means.items():
        print(f"  {level:6d}  {model.edges[level - 1].item():6d}  {to_sub_image:14.2f} dB  "
              f"{to_image:5.2f} dB")
    print(f"  codebook: {used:.1%} used, perplexity {perplexity:.0f}, effective rank {rank:.1f} "
          f"of {config.code_dim}; perplexity by position: " +
          " ".join(f"{p:.0f}" for p in by_position), flush=True)
    return dict(psnr_sub_image={level: mean[0] for level, mean in means.items()},
                psnr_image={level: mean[1] for level, mean in means.items()}, used=used,
                perplexity=perplexity, perplexity_by_position=by_position, effective_rank=rank)


# ---- flags and folder of a run, shared with train_gpt.py ----------------------------------------
def training_parser(doc, argv):
    """(parser with the flags of both training scripts, the preset that --preset or --data names).
    The preset decides the defaults of the other flags, so these two are read first."""
    base = base_parser()
    add = base.add_argument_group("run").add_argument
    add("--preset", choices=PRESETS, help="sizes and schedule (by --data; folders: cifar)")
    add("--micro-batch", type=int, help="images per forward pass: fewer need less memory (a GPU's "
        "share of the batch)")
    add("--log-every", type=int, default=20, help="steps between log lines")
    add("--save-every", type=int, help="steps between checkpoints (--eval-every)")
    add("--resume", action="store_true",
        help="go on from the checkpoint in --out, with its flags where none are given")
    add("--overwrite", action="store_true", help="replace the checkpoint in --out")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the model")
    known, _ = base.parse_known_args(argv)
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help, parents=[base],
                                     allow_abbrev=False)
    return parser, PRESETS.get(known.preset or known.data, PRESETS["cifar"])


def parse_training_flags(parser, argv, kind):
    """The flags. With --resume, those of the saved run stand where the command line gives none."""
    args = parse_flags(parser, argv)
    if args.resume:
        saved = read_checkpoint(args.out / f"{kind}.pt", kind, mmap=True)["args"]
        # These belong to this call and this machine.
        for name in ("resume", "overwrite", "out", "device", "workers"):
            saved.pop(name)
        parser.set_defaults(**{name: v for name, v in saved.items() if name in vars(args)})
        args = parse_flags(parser, argv)
    return args


def start_folder(path, args):
    """Make the run's folder. A checkpoint is never replaced unasked."""
    if path.exists() and not (args.resume or args.overwrite):
        raise UserError(f"{path} exists: --resume goes on from it, --overwrite replaces it, --out "
                        f"takes another folder")
    path.parent.mkdir(parents=True, exist_ok=True)


# ---- batches ------------------------------------------------------------------------------------
def image_batches(data, args, job, start):
    """The batch of each step from `start` on, as training_step takes it.
    Images are mirrored at random, and image files are cropped at random. A batch depends on seed
    and step alone, whatever the number of processes: a resumed run goes on with the very next one.
    """
    passes = split_batch(args, job)

    def make_batch(step):
        indices = batch_indices(len(data), args.batch_size, step, args.seed)
        number = step * args.batch_size + torch.arange(args.batch_size)
        u = uniforms(random_streams("crops", args.seed, number), 4)             # (B, 4)
        # The short side is 1 .. 1.125 times the image side; the square lies anywhere.
        crops = torch.stack([1 + u[:, 1] / 8, u[:, 2], u[:, 3]], 1)
        mirrored = (u[:, 0] < 0.5)[:, None, None, None]
        batch = []
        for rows in passes:
            images, _ = data.batch(indices[rows], crops[rows])
            images = torch.where(mirrored[rows], images.flip(-1), images)
            if job.device.startswith("cuda"):
                images = images.pin_memory()
            batch.append((rows, images))
        return batch
    return ahead(make_batch, count(start))


def split_batch(args, job):
    """The rows of a step's batch that this process takes, a slice for each of its passes."""
    share = args.batch_size // job.ranks
    size = min(args.micro_batch or share, share)
    if args.batch_size % job.ranks or share % size:
        raise UserError(f"--batch-size {args.batch_size} is not a multiple of {job.ranks} "
                        f"process(es) x --micro-batch {size}: change one")
    print(f"batch of {args.batch_size} images = {job.ranks} process(es) x {share // size} "
          f"pass(es) of {size}")
    first = job.rank * share
    return [slice(row, row + size) for row in range(first, first + share, size)]


def ahead(function, items):
    """Yields function(item) for each item, computed by a thread that stays two items ahead."""
    # One core: a second team of OpenMP threads would take the cores from the model.
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


def wrap_model(model, args, job):
    """The model as a step calls it: compiled if asked, gradients averaged over the processes."""
    if args.compile:
        # Block by block: all are the same, so that only one is compiled.
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()
    if job.ranks > 1:
        model = DistributedDataParallel(model)
    return model


def gradient_sync(model, last, job):
    """Context of a pass: the last one of a step averages gradients, those before only add them."""
    return nullcontext() if last or job.ranks == 1 else model.no_sync()


# ---- optimizers and averaged weights ------------------------------------------------------------
def make_optimizers(model, args, job):
    """{name: optimizer}: each parameter of the model belongs to exactly one.
    muon trains the matrices of the blocks, but not those of AdaLN, which start at zero. optimizer,
    an AdamW, trains all else. Only the matrices of Linear layers decay: no biases, norms,
    embeddings, codebook."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    in_blocks = {id(layer.weight) for block in model.modules() if isinstance(block, Block)
                 for layer in block.modules()
                 if isinstance(layer, nn.Linear) and layer is not block.modulation}
    hidden = {}                          # by shape, because Muon treats equal shapes together
    decayed = []
    others = []
    for p in model.parameters():
        if args.muon and id(p) in in_blocks:
            hidden.setdefault(p.shape, []).append(p)
        elif id(p) in linear:
            decayed.append(p)
        else:
            others.append(p)

    groups = [dict(params=decayed, weight_decay=args.weight_decay),
              dict(params=others, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)
    optimizers = dict(optimizer=adamw)
    if hidden:
        groups = [dict(params=same) for same in hidden.values()]
        optimizers["muon"] = Muon(groups, args.lr, args.weight_decay, dtype=job.dtype)
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal (Jordan 2024): a matrix moves equally far in
    all directions, also in those in which its gradient is small.

    The matrices of a group have one shape. Their entries move by 0.2 lr on average (root mean
    square), about as far as AdamW's, so both take the same lr (Liu and others, arXiv 2502.16982).
    torch.optim.Muon does the same, but always in bfloat16, which some CPUs lack."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            directions = []
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                state["mean"].lerp_(p.grad, 1 - group["momentum"])
                # Nesterov's momentum: the newest gradient counts once more.
                directions.append(p.grad.lerp(state["mean"], group["momentum"]))
            directions = orthogonalize(torch.stack(directions).to(self.dtype))
            scale = 0.2 * math.sqrt(max(directions.shape[1:]))
            for p, direction in zip(group["params"], directions):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-group["lr"] * scale)


# Three odd polynomials a x + b x^3 + c x^5. In turn they bring all x between 0.0105 and 1.05 to
# 1 +- 0.27, nearer than any other three (Polar Express, arXiv 2505.16932). Beyond 1.05 they
# explode; bfloat16 may round a norm of 1 to a little more.
POLYNOMIALS = ((7.708, -20.4043, 13.6695), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


def orthogonalize(x):
    """Matrices U S V' (n, rows, columns) -> about U V', with singular values between 0.73 and 1.27
    (lower where they were below 0.01 of the norm). Each pass applies a polynomial to them."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)      # no singular value above 1
    for a, b, c in POLYNOMIALS:
        square = x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return x


def optimizer_step(model, optimizers, step, args):
    """Clip, step, clear the gradients; returns the norm of the gradient before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
    for optimizer in filter(None, optimizers):
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
    """ema <- decay ema + (1 - decay) model, buffers too. Early on it forgets the first weights."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_([*ema.state_dict().values()], [*model.state_dict().values()], 1 - decay)


# ---- checkpoint and log -------------------------------------------------------------------------
def file_stamp(path):
    """What changes when another program writes a file; None without one."""
    return (path.stat().st_mtime_ns, path.stat().st_ino) if path.exists() else None


def save_run(path, kind, parts, step, stamp, args, job, **carried):
    """Write the run's checkpoint, unless another run has written it since `stamp` was taken.
    Returns the new stamp. carried: what else to save."""
    if job.rank:
        return None
    if path.exists() and file_stamp(path) != stamp:
        raise UserError(f"another run has written {path}: nothing is saved; take another --out")
    states = {name: part.state_dict() for name, part in parts.items()}
    flags = vars(args) | dict(out=str(args.out))                 # plain types alone
    save_checkpoint(path, kind, config=asdict(parts["model"].config), args=flags, step=step,
                    **states, **carried)
    return file_stamp(path)


def restore(path, kind, parts, args, **same):
    """Load a run's checkpoint into its parts {name: model or optimizer}; returns its step.
    same: what else in the checkpoint must not differ."""
    saved = read_checkpoint(path, kind)
    config = parts["model"].config
    same["config"] = asdict(config)
    saved["config"] = asdict(type(config)()) | saved["config"]   # newer fields have their defaults
    for name, value in same.items():
        if saved.get(name) != value:
            raise UserError(f"{path} has {name} {saved.get(name)}, this run {value}: take another "
                            f"--out, or --overwrite instead of --resume")
    if saved["step"] >= args.steps:
        raise UserError(f"{path} has done {saved['step']} of {args.steps} steps: raise --steps")
    try:
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):
                # The flags of this run count, not the saved betas and weight decay.
                for old, group in zip(saved[name]["param_groups"], part.param_groups):
                    old.update({key: v for key, v in group.items() if key != "params"})
            part.load_state_dict(saved[name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} has other parts than this run ({one_line(error)}): resume with "
                        f"the flags of its start")
    return saved["step"]


def catch_signals(job):
    """A list that gets the name of a signal: Ctrl-C, a kill, a closed terminal. One process alone
    then finishes its step, saves and leaves. Several end at once: --resume takes the last save."""
    caught = []

    def catch(number, frame):
        caught.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)                    # a second one ends it at once

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)                     # Windows has no SIGHUP
        # nohup ignores SIGHUP on purpose.
        if number and job.ranks == 1 and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, catch)
    return caught


class Log:
    """Log lines on the screen, and as JSON in a file, after a record of what ran, and where."""

    def __init__(self, path, model, args, job):
        self.args = args
        self.job = job
        if args.resume and job.rank == 0 and path.exists():
            # A crash may have cut the last line short.
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if line.endswith("\n")))
        mode = "a" if args.resume else "w"
        self.file = open(os.devnull if job.rank else path, mode, buffering=1)
        parameters = sum(p.numel() for p in model.parameters())
        self.write(command=" ".join(sys.argv), flags=vars(args) | dict(out=str(args.out)),
                   device=job.device, dtype=str(job.dtype), torch=torch.__version__)
        print(" ".join(f"{name}={value}" for name, value in vars(args).items()))
        print(f"{parameters / 1e6:.2f} M parameters")
        self.reset()

    def write(self, **record):
        self.file.write(json.dumps(record) + "\n")

    def draw(self, path, panels):
        """Charts of all records of steps in the file, those before a --resume included. An
        evaluation's PSNR, {tokens: dB}, gives a column for each number of tokens."""
        rows = defaultdict(dict)
        for record in map(json.loads, open(self.file.name)):
            if "step" in record:
                rows[record["step"]] |= record | record.get("psnr_image", {})
        save_charts(path, [rows[step] for step in sorted(rows)], "step", panels, log=True)

    def reset(self):
        self.terms = defaultdict(list)
        self.steps = 0
        self.start = time.perf_counter()

    def add(self, terms):
        for name, value in terms.items():
            self.terms[name].append(value.detach())
        self.steps += 1

    def report(self, step):
        """A line of means over the steps since the last one and over all processes."""
        means = torch.stack([sum(v) / len(v) for v in self.terms.values()]).cpu().double()
        all_sum(means)
        terms = dict(zip(self.terms, (means / self.job.ranks).tolist()))
        for name, value in terms.items():
            if not math.isfinite(value):
                raise UserError(f"{name} is {value} by step {step}: the last checkpoint is kept; "
                                f"lower --lr ({self.args.lr}) or --clip ({self.args.clip})")

        seconds = (time.perf_counter() - self.start) / self.steps
        record = dict(lr=lr_at(step - 1, self.args), ms=seconds * 1e3,
                      images_per_second=self.args.batch_size / seconds,
                      eta_hours=(self.args.steps - step) * seconds / 3600)
        print(f"step {step:06d}/{self.args.steps:06d}",
              *[f"{name} {value:.4f}" for name, value in terms.items()],
              "lr {lr:.2e} | {ms:.0f} ms | {images_per_second:.3g} img/s | "
              "eta {eta_hours:.2f} h".format(**record), sep=" | ", flush=True)
        self.write(step=step, **terms, **record)
        self.reset()


# ---- adversarial loss ---------------------------------------------------------------------------
class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): images in [-1, 1] (B, 3, H, W) -> logits (B, 1, H/8, W/8).
    A logit judges a patch: above 0 it takes it for real. GroupNorm instead of BatchNorm, so that
    the logits of an image do not depend on its batch."""

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

    def forward(self, x):
        return self.layers(x.contiguous(memory_format=torch.channels_last)).float()


def discriminator_loss(discriminator, images, recon, job):
    """Hinge loss of images and their reconstructions (b, 3, S, S)."""
    with autocast(job):
        logits = discriminator(torch.cat([images, recon]))
    real, fake = logits.chunk(2)
    # Logits of real patches are pushed above 1, those of reconstructions below -1.
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


if __name__ == "__main__":
    run_script(main, parse_args)
