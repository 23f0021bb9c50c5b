"""Draw images from a trained generator: out/<data>/gpt.pt in, pictures or an .npz out.

  python sample.py                                   # samples.png: a row for each class
  python sample.py --classes star ring 7 --cfg 3     # classes by name, part of a name, folder (wnid) or number
  python sample.py --progressive --gif               # progressive.png: after 1, 2, 4 ... tokens; .gif: after each
  python sample.py --tokens 8                        # stop after 8 tokens: the low frequencies alone
  python sample.py --upscale photo.jpg --keep 4      # upscale.png: its first 4 tokens, the others imagined
  torchrun --nproc-per-node 8 -- sample.py --npz samples.npz --num 50000       # for evaluate.py compare

Image i of a seed has random numbers of its own: on an Intel CPU its bytes are the same whatever --batch-size, threads
or processes; elsewhere rounding may move a pixel by one level, and once in a while a code. An .npz that was stopped
goes on where it was, when the same command is given again.
"""
import argparse
import difflib
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from spectralar import (FailedRun, UserError, code_fingerprint, fingerprint, guidance_scale, load_generator,
                        load_tokenizer, wrap_int64)
from train_gpt import agree, make_blank, open_records, unseen, write_note
from train_tokenizer import (autocast, barrier, base_parser, center_crop, duration, finish_args, grid, run, save_grid,
                             share_work, spread_levels, to_float, to_uint8, upright_rgb, versions)

SCHEDULES = "constant", "linear", "power-cosine"


# ------------------------------------------------------------------------------------------------------------------
# sampling, shared with evaluate.py

def curve(schedule):
    """The guidance of a schedule over the sequence, as text for -h."""
    return f"{schedule} " + " ".join(f"{guidance_scale(2, schedule, t, 9):.2f}" for t in range(0, 9, 2))


def add_sampling_flags(parser):
    """Flags of all that samples: sample.py, evaluate.py generation."""
    add = parser.add_argument_group("sampling").add_argument
    add("--cfg", type=float, default=2.0, help="guidance s: logits = u + s (c - u); 1 = none, 0 = unconditional")
    add("--cfg-schedule", choices=SCHEDULES, default="constant",
        help="s from the first token to the last; of --cfg 2 at 0, 1/4 .. 1 of the way: " +
        "; ".join(map(curve, SCHEDULES)))
    add("--temperature", type=float, default=1.0, help="of the logits; 0 = the likeliest code")
    add("--top-k", type=int, default=0, help="sample among the k likeliest codes, 0 = all")
    add("--top-p", type=float, default=1.0, help="sample among the likeliest codes of this joint probability")
    add("--tokens", type=int, help="stop after so many tokens (default: all)")
    add("--tokenizer", metavar="FILE", help="decode by this tokenizer.pt of the same codes, such as one of "
        "train_tokenizer.py --finetune-decoder (default: the one in gpt.pt)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the generator's matrix products; "
        "auto: bfloat16 on CUDA, float32 on a CPU")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the generator")


def check_sampling_flags(parser, args):
    """Leave with a usage error where a value is out of its range; settle --dtype."""
    for wrong, what in ((args.num is not None and args.num < 1, f"--num is {args.num}: it must be at least 1"),
                        (args.temperature < 0, f"--temperature is {args.temperature}: it must be at least 0"),
                        (args.top_k < 0, f"--top-k is {args.top_k}: it must be at least 0"),
                        (not 0 < args.top_p <= 1, f"--top-p is {args.top_p}: it must be above 0 and at most 1")):
        if wrong:
            parser.error(what)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"


def load_models(args):
    """(GPT, SpectralTokenizer, class names) to sample with."""
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")    # of Intel's MKL, on its first use: all shapes round alike
    gpt, tokenizer, names = load_generator(args.out / "gpt.pt", args.device)
    if args.tokenizer:
        other, own = load_tokenizer(args.tokenizer, args.device), code_fingerprint(tokenizer)
        if code_fingerprint(other) != own:
            raise UserError(f"{args.tokenizer} makes codes {code_fingerprint(other)}, {args.out / 'gpt.pt'} learned "
                            f"{own}: name the tokenizer it learned from, or one that --finetune-decoder made of it")
        tokenizer = other
    args.tokens = check_tokens("--tokens", args.tokens, gpt.config.num_tokens)
    if args.compile:
        gpt.logits = torch.compile(gpt.logits, dynamic=True)
    return gpt, tokenizer, names


def check_tokens(flag, tokens, most):
    """The number of tokens that a flag asks for, all by default; UserError when there are not as many."""
    if tokens is not None and not 1 <= tokens <= most:
        raise UserError(f"{flag} is {tokens}, and there are 1 .. {most} tokens: correct it")
    return tokens or most


def sampling(args):
    """How to sample, as arguments of GPT.generate."""
    return dict(cfg=args.cfg, cfg_schedule=args.cfg_schedule, temperature=args.temperature, top_k=args.top_k,
                top_p=args.top_p, stop=args.tokens)


def sample_seeds(seed, start, stop):
    """The random stream of each sample index, distinct for every (seed, index)."""
    return wrap_int64(seed * 2 ** 32) + torch.arange(start, stop)


def labels_in_turn(num, classes):
    """(num,) long: image i has class i mod len(classes)."""
    return torch.tensor(classes)[torch.arange(num) % len(classes)]


def balanced_labels(num, classes, seed):
    """(num,) long: as many of each class as of every other, give or take one, in shuffled order."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(wrap_int64(seed)))
    return labels_in_turn(num, classes)[order]


def draw_codes(gpt, labels, start, args, prefix=None):
    """Codes (B, N) of the sample indices start, start + 1 ... of labels (B,)."""
    with autocast(args):
        return gpt.generate(labels.to(args.device), **sampling(args), prefix=prefix,
                            seeds=sample_seeds(args.seed, start, start + len(labels)))


@torch.no_grad()
def draw(gpt, tokenizer, labels, start, args, levels=None, prefix=None):
    """Sample indices start, start + 1 ... of labels (B,) -> uint8 images (B, G, 3, S, S) on the CPU.

    levels: after how many tokens to look, G of them (default: all that are sampled); prefix (B, k): codes to keep.
    """
    codes = draw_codes(gpt, labels, start, args, prefix)
    levels = torch.tensor(levels or [args.tokens], device=args.device)
    views = codes.repeat_interleave(len(levels), 0), levels.repeat(len(codes))  # all the previews are one batch
    images = [to_uint8(tokenizer.decode(*part)).cpu() for part in zip(*(v.split(args.batch_size) for v in views))]
    return torch.cat(images).unflatten(0, (len(codes), len(levels)))


# ------------------------------------------------------------------------------------------------------------------
# classes by name

def find_class(word, names):
    """The number of the class that a word means: its number, a name or wnid of it, or a part of its name alone."""
    if re.fullmatch(r"-?\d+", word):
        if not 0 <= int(word) < len(names):
            raise UserError(f"class {word} is outside 0 .. {len(names) - 1}, the model's {len(names)} classes: "
                            f"correct --classes")
        return int(word)
    parts = [re.split(r", | \(|\)", name.lower()) for name in names]            # "tench, Tinca tinca (n01440764)"
    found = [c for c, part in enumerate(parts) if word.lower() in part]
    found = found or [c for c, name in enumerate(names) if word.lower() in name.lower()]
    if len(found) > 1:
        raise UserError(f"{word!r} fits {len(found)} classes ({tell(found, names)}): give more of the name, or the "
                        f"number")
    if not found:
        near = difflib.get_close_matches(word.lower(), sum(parts, []), 5, 0.5)
        near = list(dict.fromkeys(c for n in near for c, part in enumerate(parts) if n in part))
        raise UserError(f"no class is named {word!r}; nearest: {tell(near, names)}: --list-classes shows all "
                        f"{len(names)}")
    return found[0]


def tell(classes, names):
    return "; ".join(f"{c} {names[c]}" for c in classes[:5]) + "; ..." * (len(classes) > 5) or "none"


def choose_classes(args, names):
    """Class numbers of --classes; by default all, at most ten spread evenly, or for an .npz all there are."""
    if args.classes:
        return [find_class(word, names) for word in args.classes]
    return list(range(len(names))) if args.npz else list(range(0, len(names), max(1, len(names) // 10)))[:10]


# ------------------------------------------------------------------------------------------------------------------
# pictures

def save_gif(path, frames):
    """An endless animation of Pillow images, ten in a second, that rests on the last."""
    frames[0].save(f"{path}.tmp", format="GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[100] * (len(frames) - 1) + [2000])
    os.replace(f"{path}.tmp", path)


def sample_all(gpt, tokenizer, labels, args, levels, prefix=None):
    """draw() for many labels (n,), --batch-size at a time. prefix (1, k): of all."""
    images = []
    for i in tqdm(torch.arange(len(labels)).split(args.batch_size), desc="sampling", disable=None):
        kept = None if prefix is None else prefix.expand(len(i), -1)
        images.append(draw(gpt, tokenizer, labels[i], i[0], args, levels, kept))
    return torch.cat(images)


def class_rows(images, classes):
    """Images of labels_in_turn, a row a class."""
    return [images[i::len(classes)] for i in range(min(len(images), len(classes)))]


def draw_pictures(gpt, tokenizer, classes, names, args):
    """samples.png, a row a class, or progressive.png, a row an image; and the same as an animation."""
    N = args.tokens
    num = args.num or len(classes) * (1 if args.progressive else 8)
    labels = labels_in_turn(num, classes)
    levels = list(range(1, N + 1)) if args.gif else spread_levels(N) if args.progressive else [N]
    images = sample_all(gpt, tokenizer, labels, args, levels)               # (num, G, 3, S, S)
    row_names = [names[c] for c in classes][:num]
    path = args.out / ("progressive.png" if args.progressive else "samples.png")
    if args.progressive:
        shown = spread_levels(N)
        save_grid(path, images[:, [levels.index(k) for k in shown]], [names[c] for c in labels], list(map(str, shown)))
    else:
        save_grid(path, class_rows(images[:, -1], classes), row_names)
    if args.gif:
        save_gif(path.with_suffix(".gif"), [grid(class_rows(images[:, g], classes), row_names, [f"{k}/{N}"])
                                            for g, k in enumerate(levels)])
    print(f"{num} images of {len(row_names)} classes after {N} tokens, cfg {args.cfg:g} ({args.cfg_schedule}), "
          f"seed {args.seed}: {path}{' and .gif' if args.gif else ''}")


def load_image(path, size):
    """uint8 (1, 3, S, S) of an image file, cropped at its centre."""
    try:
        with Image.open(path) as image:
            pixels = np.array(center_crop(upright_rgb(image), size))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"cannot read {path} as an image ({e}): name another by --upscale") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


@torch.no_grad()
def upscale(gpt, tokenizer, classes, names, args):
    """upscale.png: the image, what its first k tokens hold, and variations of the others, a row a class (or none)."""
    N = args.tokens
    k = check_tokens("--keep", max(1, N // 4) if args.keep is None else args.keep, N)
    image = load_image(args.upscale, tokenizer.config.image_size)
    codes = tokenizer.encode(to_float(image).to(args.device))               # (1, N)
    preview = to_uint8(tokenizer.decode(codes, k)).cpu()
    classes = classes if args.classes else [gpt.config.num_classes]         # no class
    num = args.num or len(classes) * (8 if k < N else 1)
    levels = list(range(k, N + 1)) if args.gif else [N]
    images = sample_all(gpt, tokenizer, labels_in_turn(num, classes), args, levels, codes[:, :k])
    row_names = [names[c] for c in classes] if args.classes else None

    def picture(g):
        rows = [torch.cat([image, preview, variations]) for variations in class_rows(images[:, g], classes)]
        return rows, row_names, ["image", f"{k}/{N}", f"{levels[g]}/{N}"]
    save_grid(args.out / "upscale.png", *picture(-1))
    if args.gif:
        save_gif(args.out / "upscale.gif", [grid(*picture(g)) for g in range(len(levels))])
    print(f"{num} variations of {args.upscale} from its first {k} of {gpt.config.num_tokens} tokens, which hold the "
          f"lowest {tokenizer.edges[k - 1]} of {tokenizer.config.image_size} frequencies: {args.out / 'upscale.png'}")


# ------------------------------------------------------------------------------------------------------------------
# many images for evaluation

def write_npz(gpt, tokenizer, classes, args):
    """arr_0 uint8 (n, S, S, 3) and arr_1 labels (n,), as ADM's; beside it FILE.json tells how they were drawn.

    All ranks draw into FILE.part, which a later run goes on with.
    """
    path, part, S = args.npz, Path(f"{args.npz}.part"), tokenizer.config.image_size
    if path.exists() and not args.overwrite:
        raise UserError(f"{path} exists: --overwrite replaces it, another name keeps both")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.parent} is not a folder, so {path} cannot be written: make it first")
    num, start = args.num or 50_000, time.perf_counter()
    settings = dict(num=num, seed=args.seed, classes=classes, **sampling(args), dtype=args.dtype,
                    gpt=fingerprint(gpt), tokenizer=fingerprint(tokenizer))
    agree(Path(f"{path}.json"), settings, [path], args)
    labels = balanced_labels(num, classes, args.seed)
    record = np.dtype([("label", np.uint16), ("image", np.uint8, (S, S, 3))])
    if args.rank == 0 and not part.exists():
        make_blank(part, num, record)
    barrier()
    file = open_records(part, num, record, "r+")
    todo = unseen(file, args.batch_size, args)
    with tqdm(total=sum(map(len, todo)) * args.ranks, unit=" img", disable=True if args.rank else None) as bar:
        for rows in todo:
            here = slice(rows.start, rows.stop)
            file["image"][here] = draw(gpt, tokenizer, labels[here], rows.start, args)[:, 0].permute(0, 2, 3, 1)
            file["label"][here] = labels[here]                              # last: until then the batch is still to do
            bar.update(len(rows) * args.ranks)
    file.flush()
    barrier()
    if args.rank == 0:
        try:
            with open(f"{path}.tmp", "wb") as out:
                np.savez(out, arr_0=file["image"], arr_1=labels.numpy())
        except OSError as e:
            Path(f"{path}.tmp").unlink(missing_ok=True)
            raise FailedRun(f"cannot write {path} ({e.strerror}), {part} is complete: free space, run again") from None
        os.replace(f"{path}.tmp", path)
        part.unlink()
        seconds = time.perf_counter() - start
        write_note(Path(f"{path}.json"), dict(settings, seconds=round(seconds, 1), command=" ".join(sys.argv),
                                              versions=versions()))
        print(f"{num:,} images of {len(classes)} classes, {duration(seconds / 3600)}: {path}")


# ------------------------------------------------------------------------------------------------------------------
# the run

def parse_args(argv=None):
    parser, _ = base_parser(__doc__, argv)
    group = parser.add_argument_group("samples")
    add = group.add_argument
    add("--classes", nargs="+", help="numbers, from 0, folder names (wnids) or parts of names (default: all, in a "
        "picture at most ten spread evenly)")
    add("--num", type=int, help="images in all, shared evenly among the classes (default: 8 a class, --progressive: 1, "
        "--npz: 50,000)")
    add("--batch-size", type=int, default=64, help="images sampled at a time: more is faster, and takes more memory")
    add("--gif", action=argparse.BooleanOptionalAction, default=False, help="an animation too, token by token")
    add("--keep", type=int, help="of --upscale: tokens of the image to keep (default: a quarter)")
    add("--overwrite", action="store_true", help="of --npz: replace the file")
    add = group.add_mutually_exclusive_group().add_argument
    add("--progressive", action=argparse.BooleanOptionalAction, default=False,
        help="one row an image, more tokens from left to right")
    add("--upscale", metavar="IMAGE", help="keep an image's first tokens and sample the others (--classes says what it "
        "shows; default: not told)")
    add("--npz", metavar="FILE", type=Path, help="write images for evaluation, of balanced classes in shuffled order")
    add("--list-classes", action="store_true", help="print the model's classes and leave")
    add_sampling_flags(parser)
    args = finish_args(parser, parser.parse_args(argv))
    check_sampling_flags(parser, args)
    if args.keep is not None and not args.upscale:
        parser.error("--keep is of --upscale IMAGE: name one")
    if args.gif and args.npz:
        parser.error("--gif animates pictures, --npz makes none: leave one out")
    return args


def main(args):
    share_work(args)
    if args.ranks > 1 and not args.npz:
        raise UserError(f"{args.ranks} processes share the work of --npz alone: leave torchrun out")
    gpt, tokenizer, names = load_models(args)
    if args.list_classes:
        return print("\n".join(f"{c:4d}  {name}" for c, name in enumerate(names)))
    classes = choose_classes(args, names)
    if args.npz:
        return write_npz(gpt, tokenizer, classes, args)
    names = [name.split(",")[0] for name in names]                          # of ImageNet's words the first
    (upscale if args.upscale else draw_pictures)(gpt, tokenizer, classes, names, args)


if __name__ == "__main__":
    run(main, parse_args())
