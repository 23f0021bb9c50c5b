"""Draw images from a trained generator: out/<data>/gpt.pt in, pictures or an .npz out.

  python sample.py                                   # samples.png: a row for each class
  python sample.py --classes star ring 7 --cfg 3     # by name, part of a name, folder or number
  python sample.py --progressive --gif               # after 1, 2, 4 ... tokens; after each
  python sample.py --tokens 8                        # stop after 8 tokens: the low frequencies
  python sample.py --upscale photo.jpg --keep 4      # keep its first 4 tokens, sample the others
  torchrun --nproc-per-node 8 -- sample.py --npz samples.npz --num 50000   # for evaluate.py

Image i of a seed has random numbers of its own. On an Intel CPU its bytes are the same for any
--batch-size, number of threads and number of processes. Elsewhere rounding may move a pixel by one
level, and once in a while change a code. An .npz that was stopped goes on where it was, when the
same command is given again.
"""
import argparse
import difflib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

from spectralar import (UserError, code_fingerprint, fingerprint, guidance_scale, load_generator,
                        load_tokenizer, wrap64)

import numpy as np
import torch
from tqdm import tqdm

from train_gpt import (claim_files, open_records, unfinished, write_note, write_records)
from train_tokenizer import (autocast, barrier, base_parser, decode_image, duration, finish_args,
                             image_grid, join_ranks, make_writable, run_script,
                             save_image_grid, save_picture, spread_levels, to_float, to_uint8,
                             versions)

SCHEDULES = "constant", "linear", "power-cosine"


def parse_args(argv=None):
    parser, _ = base_parser(__doc__, argv)
    group = parser.add_argument_group("what to draw")
    add = group.add_argument
    add("--classes", nargs="+",
        help="numbers, from 0, folder names (wnids) or parts of names (default: all; in a picture "
             "at most ten, evenly spread)")
    add("--num", type=int,
        help="images, shared evenly among the classes (default: 8 per class; --progressive: 1; "
             "--npz: 50,000)")
    add("--batch-size", type=int, default=64, help="images at a time: more are faster")
    add("--gif", action=argparse.BooleanOptionalAction, default=False,
        help="an animation too, token by token")
    add("--keep", type=int, help="of --upscale: tokens of the image to keep (default: a quarter)")
    add("--overwrite", action="store_true", help="of --npz: replace the file")
    add = group.add_mutually_exclusive_group().add_argument
    add("--progressive", action=argparse.BooleanOptionalAction, default=False,
        help="one row per image, with more tokens from left to right")
    add("--upscale", metavar="IMAGE",
        help="keep the first tokens of an image and sample the others; --classes says what it "
             "shows (without it, sampling is unconditional)")
    add("--npz", metavar="FILE", type=Path,
        help="write images for evaluation, of balanced classes in shuffled order")
    add("--list-classes", action="store_true", help="print the classes and leave")
    add_sampling_flags(parser)
    args = finish_args(parser, parser.parse_args(argv))
    check_sampling_flags(parser, args)
    if args.keep is not None and not args.upscale:
        parser.error("--keep is of --upscale IMAGE: name one")
    if args.gif and args.npz:
        parser.error("--gif animates pictures, --npz makes none: leave one out")
    return args


def main(args):
    job = sampling_job(args)
    if job.rank and not args.npz:                # pictures need one process alone
        return
    gpt, tokenizer, names = load_models(args, job)
    if args.list_classes:
        for c, name in enumerate(names):
            print(f"{c:4d}  {name}")
    elif args.npz:
        write_npz(gpt, tokenizer, choose_classes(args, names), args, job)
    elif args.upscale:
        upscale(gpt, tokenizer, names, args, job)
    else:
        draw_samples(gpt, tokenizer, names, args, job)


# -------------------------------------------------------------------------------------------------
# pictures

def draw_samples(gpt, tokenizer, names, args, job):
    """samples.png, a row per class, or progressive.png, a row per image; and as an animation."""
    N = check_tokens("--tokens", args.tokens, gpt.config.num_tokens)
    classes = choose_classes(args, names)
    num = args.num or len(classes) * (1 if args.progressive else 8)
    labels = labels_in_turn(num, classes)
    shown = spread_levels(N) if args.progressive else [N]
    levels = list(range(1, N + 1)) if args.gif else shown
    images = sample_images(gpt, tokenizer, labels, levels, args, job)           # (num, G, 3, S, S)

    first_words = [name.split(",")[0] for name in names]         # ImageNet has several per class
    row_names = [first_words[c] for c in classes[:num]]
    if args.progressive:
        path = args.out / "progressive.png"
        columns = [levels.index(level) for level in shown]
        save_image_grid(path, images[:, columns], [first_words[c] for c in labels],
                        [str(level) for level in shown])
    else:
        path = args.out / "samples.png"
        save_image_grid(path, class_rows(images[:, -1], classes), row_names)
    if args.gif:
        frames = [image_grid(class_rows(images[:, g], classes), row_names, [f"{level}/{N}"])
                  for g, level in enumerate(levels)]
        save_gif(path.with_suffix(".gif"), frames)
    print(f"{num} images of {len(row_names)} classes after {N} tokens, cfg {args.cfg:g} "
          f"({args.cfg_schedule}), seed {args.seed}: {path}{' and .gif' if args.gif else ''}")


@torch.no_grad()
def upscale(gpt, tokenizer, names, args, job):
    """upscale.png: an image, what its first k tokens hold, and variations of all other tokens."""
    N = check_tokens("--tokens", args.tokens, gpt.config.num_tokens)
    k = check_tokens("--keep", max(1, N // 4) if args.keep is None else args.keep, N)
    size = tokenizer.config.image_size
    image = torch.from_numpy(decode_image(args.upscale, size)).permute(2, 0, 1)[None]
    codes = tokenizer.encode(to_float(image).to(job.device))                    # (1, N)
    preview = to_uint8(tokenizer.decode(codes, k)).cpu()

    classes = [gpt.config.num_classes]                           # the label that means: no class
    row_names = None
    if args.classes:
        classes = choose_classes(args, names)
        row_names = [names[c].split(",")[0] for c in classes]
    num = args.num or len(classes) * (8 if k < N else 1)
    levels = list(range(k, N + 1)) if args.gif else [N]
    labels = labels_in_turn(num, classes)
    images = sample_images(gpt, tokenizer, labels, levels, args, job, codes[:, :k])

    # One picture per level: the frames of the animation, the last one is the still picture.
    pictures = []
    for g, level in enumerate(levels):
        rows = [torch.cat([image, preview, variations])
                for variations in class_rows(images[:, g], classes)]
        pictures.append(image_grid(rows, row_names, ["image", f"{k}/{N}", f"{level}/{N}"]))
    save_picture(args.out / "upscale.png", pictures[-1])
    if args.gif:
        save_gif(args.out / "upscale.gif", pictures)
    print(f"{num} variations of {args.upscale} from its first {k} of {gpt.config.num_tokens} "
          f"tokens (window {tokenizer.edges[k - 1]} of {tokenizer.edges[-1]}): "
          f"{args.out / 'upscale.png'}")


def sample_images(gpt, tokenizer, labels, levels, args, job, prefix=None):
    """Labels (n,), G levels -> uint8 images (n, G, 3, S, S), --batch-size at a time.

    prefix (1, k): codes that all images keep.
    """
    # Codes are drawn once, and decoded at every level: a preview costs no sampling.
    images = []
    for chosen in tqdm(torch.arange(len(labels)).split(args.batch_size), desc="sampling",
                       disable=None):
        kept = None if prefix is None else prefix.expand(len(chosen), -1)
        codes = draw_codes(gpt, labels[chosen], chosen[0].item(), levels[-1], args, job, kept)
        images.append(decode_levels(tokenizer, codes, levels, args.batch_size))
    return torch.cat(images)


@torch.no_grad()
def decode_levels(tokenizer, codes, levels, batch_size):
    """Codes (B, N) after each of G levels -> uint8 images (B, G, 3, S, S) on the CPU."""
    levels = torch.tensor(levels, device=codes.device)
    B, G = len(codes), len(levels)
    codes = codes.repeat_interleave(G, 0).split(batch_size)
    levels = levels.repeat(B).split(batch_size)
    images = [to_uint8(tokenizer.decode(c, level)).cpu() for c, level in zip(codes, levels)]
    return torch.cat(images).unflatten(0, (B, G))


def class_rows(images, classes):
    """Images of labels_in_turn, a row per class."""
    return [images[row::len(classes)] for row in range(min(len(images), len(classes)))]


def save_gif(path, frames):
    """An endless animation of Pillow pictures, ten per second, that rests on the last."""
    frames[0].save(f"{path}.tmp", format="GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[100] * (len(frames) - 1) + [2000])
    os.replace(f"{path}.tmp", path)


# -------------------------------------------------------------------------------------------------
# many images for evaluation

def write_npz(gpt, tokenizer, classes, args, job):
    """arr_0 uint8 (n, S, S, 3), arr_1 labels (n,), as ADM's; FILE.json tells how they were made.

    All processes draw into FILE.part, which a later run goes on with.
    """
    path, started = args.npz, time.perf_counter()
    if path.exists() and not args.overwrite:
        raise UserError(f"{path} exists: --overwrite replaces it, another name keeps both")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.parent} is not a folder, so {path} cannot be written: make it "
                        f"first")
    make_writable(path.absolute().parent)
    N = check_tokens("--tokens", args.tokens, gpt.config.num_tokens)
    num, S = args.num or 50_000, tokenizer.config.image_size
    made_with = dict(num=num, seed=args.seed, classes=classes, **sampling_settings(args), stop=N,
                     dtype=job.dtype_name, gpt=fingerprint(gpt), tokenizer=fingerprint(tokenizer))
    claim_files(Path(f"{path}.json"), made_with, [path], args, job)

    labels = balanced_labels(num, classes, args.seed)
    record = np.dtype([("label", np.uint16), ("image", np.uint8, (S, S, 3))])
    file = open_records(path, num, record, job)
    todo = unfinished(file, args.batch_size, job)
    total = sum(len(rows) for rows in todo) * job.ranks
    with tqdm(total=total, unit=" img", disable=True if job.rank else None) as bar:
        for rows in todo:
            # A batch that was half written is drawn again: the same seeds give the same images.
            codes = draw_codes(gpt, labels[rows], rows.start, N, args, job)
            images = decode_levels(tokenizer, codes, [N], args.batch_size)[:, 0]
            write_records(file, rows, labels[rows], image=images.permute(0, 2, 3, 1))
            bar.update(len(rows) * job.ranks)
    # Only when every process has drawn its share is the file whole.
    file.flush()
    barrier()
    if job.rank == 0:
        with open(f"{path}.tmp", "wb") as out:
            np.savez(out, arr_0=file["image"], arr_1=labels.numpy())
        os.replace(f"{path}.tmp", path)
        del file
        Path(f"{path}.part").unlink()
        seconds = time.perf_counter() - started
        note = Path(f"{path}.json")
        write_note(note, json.loads(note.read_text()) | dict(
            seconds=round(seconds, 1), command=" ".join(sys.argv), versions=versions()))
        print(f"{num:,} images of {len(classes)} classes, {duration(seconds / 3600)}: {path}")


# -------------------------------------------------------------------------------------------------
# sampling, shared with evaluate.py

def add_sampling_flags(parser):
    """Flags of all that samples."""
    curves = []
    for schedule in SCHEDULES:
        scales = [guidance_scale(2, schedule, t, 9) for t in range(0, 9, 2)]
        curves.append(f"{schedule} " + " ".join(f"{s:.2f}" for s in scales))
    add = parser.add_argument_group("sampling").add_argument
    add("--cfg", type=float, default=2.0,
        help="guidance s: logits = u + s (c - u); 1 = none, 0 = unconditional")
    add("--cfg-schedule", choices=SCHEDULES, default="constant",
        help="s from the first token to the last; for --cfg 2 at 0, 1/4 .. 1 of the way: " +
             "; ".join(curves))
    add("--temperature", type=float, default=1.0, help="of the logits; 0 = the likeliest code")
    add("--top-k", type=int, default=0, help="sample among the k likeliest codes; 0 = all")
    add("--top-p", type=float, default=1.0,
        help="sample among the likeliest codes that reach this probability together")
    add("--tokens", type=int, help="stop after this many tokens (default: all)")
    add("--tokenizer", metavar="FILE",
        help="decode by this tokenizer.pt of the same codes, such as one of train_tokenizer.py "
             "--finetune-decoder (default: the one in gpt.pt)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="of the generator's matrix products; auto: bfloat16 on CUDA, float32 on a CPU")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the generator")


def check_sampling_flags(parser, args):
    """Leave with a usage error where a value is out of its range."""
    if not math.isfinite(args.cfg):
        parser.error(f"--cfg is {args.cfg}: it must be a number")
    if not args.temperature >= 0:
        parser.error(f"--temperature is {args.temperature}: it must be at least 0")
    if args.top_k < 0:
        parser.error(f"--top-k is {args.top_k}: it must be at least 0")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p is {args.top_p}: it must be above 0 and at most 1")


def sampling_job(args):
    """The Job of this process, with the dtype to sample in."""
    job = join_ranks(args)
    half = args.dtype == "bfloat16" or args.dtype == "auto" and args.device.startswith("cuda")
    job.dtype = torch.bfloat16 if half else torch.float32
    return job


def load_models(args, job):
    """(GPT, SpectralTokenizer, class names) to sample with."""
    # Intel's MKL reads this when it is first used: products of all shapes are then rounded alike.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    path = args.out / "gpt.pt"
    gpt, tokenizer, names = load_generator(path, job.device)
    if args.tokenizer:
        learned = code_fingerprint(tokenizer)
        tokenizer = load_tokenizer(args.tokenizer, job.device)
        made = code_fingerprint(tokenizer)
        if made != learned:
            raise UserError(f"{args.tokenizer} makes codes {made}, {path} learned {learned}: name "
                            f"the tokenizer it learned from, or its --finetune-decoder")
    if args.compile:
        gpt.logits = torch.compile(gpt.logits, dynamic=True)
    return gpt, tokenizer, names


def check_tokens(flag, tokens, most):
    """The number of tokens that a flag asks for, all by default. UserError when out of range."""
    if tokens is not None and not 1 <= tokens <= most:
        raise UserError(f"{flag} is {tokens}, and there are 1 .. {most} tokens: correct it")
    return tokens or most


def sampling_settings(args):
    """How to sample, as arguments of GPT.generate."""
    return dict(cfg=args.cfg, cfg_schedule=args.cfg_schedule, temperature=args.temperature,
                top_k=args.top_k, top_p=args.top_p)


def draw_codes(gpt, labels, start, tokens, args, job, prefix=None):
    """Codes (B, N) of the sample indices start, start + 1 ... of labels (B,); `tokens` of them."""
    with autocast(job):
        return gpt.generate(labels.to(job.device), **sampling_settings(args), stop=tokens,
                            prefix=prefix, seeds=sample_seeds(args.seed, start, len(labels)))


def sample_seeds(seed, start, number):
    """The random stream of each sample index, distinct for every (seed, index)."""
    return wrap64(seed * 2 ** 32) + torch.arange(start, start + number)


def labels_in_turn(num, classes):
    """(num,) long: image i has class i mod len(classes)."""
    return torch.tensor(classes)[torch.arange(num) % len(classes)]


def balanced_labels(num, classes, seed):
    """(num,) long: each class as often as every other, give or take one, in shuffled order."""
    generator = torch.Generator().manual_seed(wrap64(seed))
    return labels_in_turn(num, classes)[torch.randperm(num, generator=generator)]


# -------------------------------------------------------------------------------------------------
# classes by name

def choose_classes(args, names):
    """Class numbers of --classes. Without it all, for a picture at most ten, evenly spread."""
    if args.classes:
        return [find_class(word, names) for word in args.classes]
    if args.npz:
        return list(range(len(names)))
    shown = min(10, len(names))
    return [i * len(names) // shown for i in range(shown)]


def find_class(word, names):
    """The class that a word means: its number, a name or wnid of it, a part of its name alone."""
    if re.fullmatch(r"-?\d+", word):
        if not 0 <= int(word) < len(names):
            raise UserError(f"class {word} is outside 0 .. {len(names) - 1}, the model's "
                            f"{len(names)} classes: correct --classes")
        return int(word)
    word = word.lower()
    # A name reads "tench, Tinca tinca (n01440764)". A whole part of it wins over a piece.
    parts = [re.split(r", | \(|\)", name.lower()) for name in names]
    found = [c for c, its_parts in enumerate(parts) if word in its_parts]
    found = found or [c for c, name in enumerate(names) if word in name.lower()]
    if len(found) > 1:
        raise UserError(f"{word!r} fits {len(found)} classes ({name_some(found, names)}): give "
                        f"more of the name, or the number")
    if not found:
        close = difflib.get_close_matches(word, sum(parts, []), 5, 0.5)
        near = dict.fromkeys(c for part in close for c in range(len(names)) if part in parts[c])
        raise UserError(f"no class is named {word!r}; nearest: {name_some(list(near), names)}: "
                        f"--list-classes shows all {len(names)}")
    return found[0]


def name_some(classes, names):
    """Up to five classes with their names, as text."""
    shown = [f"{c} {names[c]}" for c in classes[:5]]
    if len(classes) > 5:
        shown.append("...")
    return "; ".join(shown) or "none"


if __name__ == "__main__":
    run_script(main, parse_args())
