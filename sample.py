"""Draw images from a trained generator: out/<data>/gpt.pt in, pictures or an .npz out.

  python sample.py                                   # samples.png: a row for each class
  python sample.py --classes star ring 7 --cfg 3     # by name, part of a name, folder or number
  python sample.py --progressive --gif               # after 1, 2, 4 ... tokens; after each
  python sample.py --tokens 8                        # stop after 8 tokens: the low frequencies
  python sample.py --upscale photo.jpg --keep 4      # keep its first 4 tokens, sample the others
  torchrun --nproc-per-node 8 -- sample.py --npz samples.npz --num 50000   # for evaluate.py

Image i of a seed has random numbers of its own, whatever the batch size and the number of
processes. Only rounding may differ: it moves a pixel by one level, and rarely changes a code.
"""
import argparse
import os
import re
from functools import lru_cache
from pathlib import Path

from spectralar import (Help, Sampling, UserError, add_settings, autocast, barrier, base_parser,
                        config_from_flags, load_generator, one_line, parse_flags, random_streams,
                        read_checkpoint, run_script, start_job, to_float, to_uint8, whole_file)

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help,
                                     parents=[base_parser()], allow_abbrev=False)
    group = parser.add_argument_group("what to draw")
    add = group.add_argument
    add("--classes", nargs="+", help="numbers, from 0, folder names (wnids) or parts of names "
        "(all, in a picture at most ten, evenly spread)")
    add("--num", type=int, help="images, shared evenly among the classes (8 per class; "
        "--progressive: 1; --npz: 50,000 in all)")
    add("--batch-size", type=int, default=64, help="images at a time: more are faster")
    add("--gif", action="store_true", help="an animation too, token by token (not of --upscale)")
    add("--keep", type=int, help="of --upscale: tokens of the image to keep (a quarter)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--progressive", action="store_true",
        help="one row per image, with more tokens from left to right")
    add("--upscale", metavar="IMAGE", help="keep the first tokens of an image and sample the "
        "others, of --classes (without it, sampling is unconditional)")
    add("--npz", metavar="FILE", type=Path,
        help="write images for evaluation, of balanced classes in shuffled order")
    add_sampling_flags(parser)
    return parse_sampling_flags(parser, argv)


def main(args):
    job = start_job(args)
    if job.rank and not args.npz:                # pictures need one process alone
        return
    gpt, tokenizer, names = load_generator(run_file("gpt", args), job.device)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.npz:
        write_npz(gpt, tokenizer, choose_classes(args, names), args, job)
    elif args.upscale:
        upscale(gpt, tokenizer, names, args, job)
    else:
        draw_samples(gpt, tokenizer, names, args, job)


# ---- pictures -----------------------------------------------------------------------------------
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
        picture = image_grid(images[:, columns], [first_words[c] for c in labels],
                             [str(level) for level in shown])
    else:
        path = args.out / "samples.png"
        picture = image_grid(class_rows(images[:, -1], classes), row_names)
    save_picture(path, picture)
    if args.gif:
        frames = [image_grid(class_rows(images[:, g], classes), row_names, [f"{level}/{N}"])
                  for g, level in enumerate(levels)]
        save_gif(path.with_suffix(".gif"), frames)
    print(f"{num} images of {len(row_names)} classes after {N} tokens, cfg {args.cfg:g}, seed "
          f"{args.seed}: {path}{' and .gif' if args.gif else ''}")


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
    labels = labels_in_turn(num, classes)
    images = sample_images(gpt, tokenizer, labels, [N], args, job, codes[:, :k])[:, 0]
    rows = [torch.cat([image, preview, variations]) for variations in class_rows(images, classes)]
    picture = image_grid(rows, row_names, ["image", f"{k}/{N}", f"{N}/{N}"])
    save_picture(args.out / "upscale.png", picture)
    print(f"{num} variations of {args.upscale} from its first {k} of {gpt.config.num_tokens} "
          f"tokens (window {tokenizer.edges[k - 1]} of {tokenizer.edges[-1]}): "
          f"{args.out / 'upscale.png'}")


@torch.no_grad()
def sample_images(gpt, tokenizer, labels, levels, args, job, prefix=None):
    """Labels (n,), G levels -> uint8 images (n, G, 3, S, S), --batch-size at a time.
    prefix (1, k): codes that all images keep."""
    images = []
    for chosen in progress("sampling", torch.arange(len(labels)).split(args.batch_size), job):
        kept = None if prefix is None else prefix.expand(len(chosen), -1)
        codes = draw_codes(gpt, labels[chosen], chosen, levels[-1], args, job, kept)
        # Codes are drawn once, and decoded at every level: a preview costs no sampling.
        shown = [to_uint8(tokenizer.decode(codes, level)).cpu() for level in levels]
        images.append(torch.stack(shown, 1))
    return torch.cat(images)


@torch.no_grad()
def draw_class_samples(path, gpt, tokenizer, class_names, cfg):
    """A grid of eight samples for each of up to ten classes, the same seeds each time."""
    names = [name.split(",")[0] for name in class_names[:10]]
    labels = torch.arange(len(names), device=gpt.code_embed.weight.device).repeat_interleave(8)
    seeds = random_streams("samples", 0, torch.arange(len(labels)))
    images = to_uint8(tokenizer.decode(gpt.generate(labels, cfg=cfg, seeds=seeds)))
    save_picture(path, image_grid(images.split(8), names))


def class_rows(images, classes):
    """Images of labels_in_turn, a row per class."""
    return [images[row::len(classes)] for row in range(min(len(images), len(classes)))]


@torch.no_grad()
def write_npz(gpt, tokenizer, classes, args, job):
    """arr_0 uint8 (n, S, S, 3) and arr_1 labels (n,), as ADM's evaluator reads them."""
    path = args.npz
    if path.exists():
        raise UserError(f"{path} exists: remove it, or choose another name")
    N = check_tokens("--tokens", args.tokens, gpt.config.num_tokens)
    num = args.num or 50_000
    S = tokenizer.config.image_size
    labels = balanced_labels(num, classes, args.seed)
    images = shared_array(part_name(path), np.uint8, (num, S, S, 3), job)
    for chosen in progress("sampling", own_batches(num, args.batch_size, job), job):
        codes = draw_codes(gpt, labels[chosen], chosen, N, args, job)
        pixels = to_uint8(tokenizer.decode(codes, N)).permute(0, 2, 3, 1)
        images[chosen.numpy()] = pixels.cpu().numpy()
    images.flush()
    barrier()
    if job.rank == 0:
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, arr_0=images, arr_1=labels.numpy())
        del images                               # Windows removes no file that is in use
        os.remove(part_name(path))
        print(f"{num:,} images of {len(classes)} classes: {path}")


def own_batches(count, size, job):
    """The row numbers of each batch of this process: the processes take the batches in turn."""
    size = max(1, min(size, count // job.ranks))   # each process gets a batch, if it can
    return torch.arange(count).split(size)[job.rank::job.ranks]


def progress(name, batches, job):
    """The batches, under a bar where a terminal is attached."""
    return tqdm(batches, desc=name, disable=True if job.rank else None)


def part_name(path):
    """A temporary name that all processes of this run share, and no other run."""
    return f"{path}.{os.environ.get('MASTER_PORT', os.getpid())}.part"


def shared_array(path, dtype, shape, job):
    """A new array on the disk that all processes write into; it takes no memory."""
    if job.rank == 0:
        np.lib.format.open_memmap(path, "w+", dtype, shape)
    barrier()
    return np.lib.format.open_memmap(path, "r+")


# ---- sampling, shared with evaluate.py ----------------------------------------------------------
def add_sampling_flags(parser):
    """The flags of every command that samples."""
    add_settings(parser, "sampling", Sampling, dict(cfg=2.0))
    add = parser.add_argument_group("decoding").add_argument
    add("--weights", metavar="FILE", help="a gpt.pt from elsewhere (for reconstructions a "
        "tokenizer.pt will do); it also tells --data (the files in --out)")
    add("--tokens", type=int, help="stop after this many tokens (all)")


def parse_sampling_flags(parser, argv):
    """The flags. --data is that of --weights where the command line gives none."""
    args = parse_flags(parser, argv)
    if args.weights:
        saved = read_checkpoint(args.weights, "gpt", "tokenizer", mmap=True)
        parser.set_defaults(data=saved["args"]["data"])
        args = parse_flags(parser, argv)
    return args


def run_file(kind, args):
    """The checkpoint to load: --weights, or the one of this kind in --out."""
    return Path(args.weights or args.out / f"{kind}.pt")


def check_tokens(flag, tokens, most):
    """The number of tokens that a flag asks for, all by default. UserError when out of range."""
    if tokens is not None and not 1 <= tokens <= most:
        raise UserError(f"{flag} is {tokens}, and there are 1 .. {most} tokens: correct it")
    return tokens or most


def draw_codes(gpt, labels, indices, tokens, args, job, prefix=None):
    """Codes (B, N) of the samples with these indices (B,) and labels (B,); `tokens` of them."""
    seeds = random_streams("samples", args.seed, indices)
    with autocast(job):
        return gpt.generate(labels.to(job.device), prefix=prefix, seeds=seeds, stop=tokens,
                            **vars(config_from_flags(Sampling, args)))


def labels_in_turn(num, classes):
    """(num,) long: image i has class i mod len(classes)."""
    return torch.tensor(classes)[torch.arange(num) % len(classes)]


def balanced_labels(num, classes, seed):
    """(num,) long: each class as often as every other, give or take one, in shuffled order."""
    return labels_in_turn(num, classes)[permutation(num, "order of labels", seed, 0)]


@lru_cache(maxsize=4)
def permutation(n, purpose, seed, index):
    """(n,) long: 0 .. n - 1 in a random order (see random_streams). Do not modify it."""
    generator = torch.Generator().manual_seed(random_streams(purpose, seed, index).item())
    return torch.randperm(n, generator=generator)


def spread_levels(N):
    """1, 2, 4, 8 ... and N: the levels that evaluations and pictures show."""
    return [2 ** k for k in range(N.bit_length()) if 2 ** k < N] + [N]


# ---- classes by name ----------------------------------------------------------------------------
def choose_classes(args, names):
    """Class numbers of --classes. Without it all, for a picture at most ten, evenly spread."""
    if args.classes:
        return [find_class(word, names) for word in args.classes]
    shown = len(names) if args.npz else min(10, len(names))
    return [i * len(names) // shown for i in range(shown)]


def find_class(word, names):
    """The class that a word means: a whole name, one of several names or the wnid, a number, or a
    piece of a name."""
    # A name reads "tench, Tinca tinca (n01440764)".
    parts = [re.split(r", | \(|\)", name.lower()) for name in names]
    lower = word.lower()
    # Folders 0 .. 9 and 01 .. 12: there 7 means the folder of that name, never the eighth one.
    numbered = all(name.isdecimal() for name in names)
    numbers = [int(name) for name in names] if numbered else range(len(names))
    meanings = ([c for c, name in enumerate(names) if name == word],
                [c for c, its_parts in enumerate(parts) if lower in its_parts],
                [c for c in range(len(names)) if str(numbers[c]) == word],
                [c for c, name in enumerate(names) if lower in name.lower() and not numbered])
    found = next(filter(None, meanings), [])
    if len(found) == 1:
        return found[0]
    some = "; ".join(f"{c} {names[c]}" for c in (found or range(len(names)))[:10])
    raise UserError(f"{word!r} names {len(found)} of {len(names)} classes, not one: {some}")


# ---- image files --------------------------------------------------------------------------------
def decode_image(path, size=None, crop=None):
    """An image file as a viewer shows it, uint8 RGB (H, W, 3). UserError when it is broken.
    size: None = the whole picture, else ADM's square crop of that side, or any_crop(*crop)."""
    try:
        with Image.open(path) as image:
            if crop is not None:                 # a JPEG far too large: decode a smaller one
                image.draft("RGB", (2 * size, 2 * size))
            image = upright_rgb(image)
    except Exception as error:                   # a broken file raises nearly anything in Pillow
        raise UserError(f"cannot decode {path} ({one_line(error)})")
    if crop is not None:
        image = any_crop(image, size, *crop)
    elif size is not None:
        image = center_crop(image, size)
    return np.array(image)


def upright_rgb(image):
    """A Pillow image turned as its EXIF says, transparency on white, in RGB."""
    # Pillow would cut these to white or black.
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {image.mode}: convert it to 8 bits")
    image = ImageOps.exif_transpose(image)
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
    side = min(image.size) / scale
    left = (image.width - side) * x
    top = (image.height - side) * y
    return image.resize((size, size), Image.BICUBIC, box=(left, top, left + side, top + side))


# ---- grids of images ----------------------------------------------------------------------------
def image_grid(rows, names=None, columns=None):
    """Pillow picture of rows of images: a list of uint8 (n, 3, S, S).
    names stand to the left of the rows, columns above the columns. Small images are enlarged."""
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


def save_picture(path, picture, **how):
    with whole_file(path) as temporary:
        picture.save(temporary, **how)


def save_gif(path, frames):
    """An endless animation of Pillow pictures, ten per second, that rests on the last."""
    duration = [100] * (len(frames) - 1) + [2000]                # milliseconds
    save_picture(path, frames[0], save_all=True, append_images=frames[1:], duration=duration,
                 loop=0)


if __name__ == "__main__":
    run_script(main, parse_args)
