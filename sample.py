"""Draw images from a trained generator: out/<data>/gpt.pt in, a PNG out.

  python sample.py                                   # samples.png: a row for each class
  python sample.py --classes 3 7 --num 32 --cfg 2    # two classes, 16 images each
  python sample.py --progressive                     # progressive.png: after 1, 2, 4, 8 ... all tokens
"""
import argparse

import torch
from tqdm import tqdm

from spectralar import UserError, code_fingerprint, load_generator, load_tokenizer
from train_tokenizer import base_parser, finish_args, run, save_grid, spread_levels, to_uint8


def add_sampling_flags(parser):
    """Flags of all that samples: sample.py, evaluate.py generation."""
    add = parser.add_argument_group("sampling").add_argument
    add("--cfg", type=float, default=2.0, help="guidance: 1 = none, 0 = unconditional")
    add("--cfg-schedule", choices=("constant", "linear", "power-cosine"), default="constant",
        help="guidance over the tokens")
    add("--temperature", type=float, default=1.0, help="of the logits; 0 = the likeliest code")
    add("--top-k", type=int, default=0, help="sample among the k likeliest codes, 0 = all")
    add("--top-p", type=float, default=1.0, help="sample among the likeliest codes of this joint probability")
    add("--tokenizer", metavar="FILE", help="decode by this tokenizer.pt of the same codes, such as one of "
        "train_tokenizer.py --finetune-decoder (default: the one in gpt.pt)")


def check_sampling_flags(parser, args):
    """Leave with a usage error where a value is out of its range."""
    for wrong, what in ((args.num is not None and args.num < 1, f"--num is {args.num}: it must be at least 1"),
                        (args.temperature < 0, f"--temperature is {args.temperature}: it must be at least 0"),
                        (args.top_k < 0, f"--top-k is {args.top_k}: it must be at least 0"),
                        (not 0 < args.top_p <= 1, f"--top-p is {args.top_p}: it must be above 0 and at most 1")):
        if wrong:
            parser.error(what)


def sampling(args):
    """How to sample, as arguments of GPT.generate."""
    return {k: getattr(args, k) for k in ("cfg", "cfg_schedule", "temperature", "top_k", "top_p")}


def load_models(args):
    """(GPT, SpectralTokenizer, class names) to sample with."""
    gpt, tokenizer, names = load_generator(args.out / "gpt.pt", args.device)
    if args.tokenizer:
        other, own = load_tokenizer(args.tokenizer, args.device), code_fingerprint(tokenizer)
        if code_fingerprint(other) != own:
            raise UserError(f"{args.tokenizer} makes codes {code_fingerprint(other)}, {args.out / 'gpt.pt'} learned "
                            f"{own}: name the tokenizer it learned from, or one that --finetune-decoder made of it")
        tokenizer = other
    return gpt, tokenizer, names


def parse_args(argv=None):
    parser, _ = base_parser(__doc__, argv)
    add = parser.add_argument_group("samples").add_argument
    add("--classes", type=int, nargs="+", help="class numbers, from 0 (default: all, at most ten spread evenly)")
    add("--num", type=int, help="images in all, shared evenly among the classes (default: 8 a class, progressive: 1)")
    add("--progressive", action=argparse.BooleanOptionalAction, default=False,
        help="one row an image, more tokens from left to right")
    add("--batch-size", type=int, default=64, help="images sampled at a time")
    add_sampling_flags(parser)
    args = finish_args(parser, parser.parse_args(argv))
    check_sampling_flags(parser, args)
    return args


def choose_classes(wanted, num_classes):
    """Class numbers to draw; UserError when one is out of range."""
    for c in wanted or []:
        if not 0 <= c < num_classes:
            raise UserError(f"class {c} is outside 0 .. {num_classes - 1}, the model's {num_classes} classes: "
                            f"correct --classes")
    step = max(1, num_classes // 10)
    return wanted or list(range(0, num_classes, step))[:10]


def sample_seeds(seed, start, stop):
    """The random stream of each sample index, distinct for every (seed, index)."""
    return seed * 2 ** 32 + torch.arange(start, stop)


@torch.no_grad()
def main(args):
    gpt, tokenizer, names = load_models(args)
    names = [name.split(",")[0] for name in names]                          # of ImageNet's words the first
    classes = choose_classes(args.classes, gpt.config.num_classes)
    num = args.num or len(classes) * (1 if args.progressive else 8)
    labels = torch.tensor(classes).repeat(-(-num // len(classes)))[:num]    # image i has class i mod len(classes)
    N = gpt.config.num_tokens
    levels = torch.tensor(spread_levels(N) if args.progressive else [N], device=args.device)
    images = []                                                             # (levels, 3, S, S) each
    for part in tqdm(torch.arange(num).split(args.batch_size), desc="sampling", disable=None):
        seeds = sample_seeds(args.seed, part[0], part[-1] + 1)
        codes = gpt.generate(labels[part].to(args.device), **sampling(args), seeds=seeds)   # (B, N)
        views = tokenizer.decode(codes.repeat_interleave(len(levels), 0), levels.repeat(len(codes)))
        images += to_uint8(views).split(len(levels))
    if args.progressive:
        path, rows, row_names = args.out / "progressive.png", images, [names[c] for c in labels]
        columns = [f"{i}" for i in levels.tolist()]
    else:
        path, row_names, columns = args.out / "samples.png", [names[c] for c in classes], None
        rows = [torch.cat(images[i::len(classes)]) for i in range(min(num, len(classes)))]
    save_grid(path, rows, row_names, columns)
    print(f"{num} images of {len(rows if not args.progressive else classes)} classes, cfg {args.cfg:g} "
          f"({args.cfg_schedule}), seed {args.seed}: {path}")


if __name__ == "__main__":
    run(main, parse_args())
