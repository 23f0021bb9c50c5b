"""Train the generator (paper, section 3.4) on the codes of a trained tokenizer.

  python train_gpt.py                                           # after python train_tokenizer.py
  python train_gpt.py --data cifar10 --depth 8 --width 256      # another size
  torchrun --nproc-per-node 8 train_gpt.py --data imagenet --data-dir /path/to/ILSVRC      # d16
  python train_gpt.py --data imagenet --dry-run --micro-batch 4      # what would d16 take?

It reads out/<data>/tokenizer.pt and writes gpt.pt, samples.png (a row per class) and
log-gpt.jsonl beside it. The data set is encoded once, by all processes together, into
codes-train.npy and codes-val.npy; a run that was stopped goes on encoding where it was. ImageNet
at 64 tokens takes 164 MB per view.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from spectralar import (GPT, FailedRun, GPTConfig, SpectralTokenizer, TokenizerConfig, UserError,
                        build_model, code_fingerprint, load_tokenizer, read_checkpoint, setting,
                        wrap64)

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from train_tokenizer import (Folder, add_mean, add_run_flags, add_settings, ahead, autocast,
                             barrier, base_parser, batch_indices, choose_dtype, config_from_flags,
                             gradient_sync, join_ranks, make_optimizers, micro_rows, open_data,
                             optimizer_step, own_optimizers, parse_training_args, pick_images,
                             preset_of, print_plan, recompute_blocks, restore, run_script,
                             save_image_grid, seed_step, split_batch, start_folder, step_seed,
                             to_float, to_uint8, training_loop, update_ema, wrap_model,
                             TrainingSettings)

# -------------------------------------------------------------------------------------------------
# settings

FIVE_CROPS = [(1.1, 0.5, 0.5), (1.1, 0, 0), (1.1, 0, 1), (1.1, 1, 0), (1.1, 1, 1)]
VIEWS = {                      # of each training image: crops (see any_crop), also mirrored?
    "centre": ([None], False),
    "flip": ([None], True),
    "ten-crop": (FIVE_CROPS, True),
}


@dataclass
class GeneratorSettings:
    label_drop: float = setting(0.1, "share of labels dropped, for guidance", least=0, most=1)
    code_images: int = setting(None, "training images to encode (where no default stands: all)")
    eval_images: int = setting(2048, "held-out images to encode")
    sample_cfg: float = setting(2.0, "guidance of the samples drawn at each evaluation", 0)


def parse_args(argv=None):
    parser, preset = base_parser(__doc__, argv)
    preset = preset["gpt"]
    add_settings(parser, "model", GPTConfig, preset,
                 without=("num_classes", "num_tokens", "codebook_size"))
    add_settings(parser, "codes and samples", GeneratorSettings, preset)
    add_settings(parser, "training", TrainingSettings, preset)
    add_run_flags(parser)
    parser.add_argument("--views", choices=VIEWS, default=preset["views"],
                        help="of each training image. centre: ADM's crop; flip: also its mirror "
                             "image; ten-crop: five crops at 1.1 times the size, and theirs")
    parser.add_argument("--zero", action=argparse.BooleanOptionalAction, default=False,
                        help="share the optimizers' state among the GPUs "
                             "(ZeroRedundancyOptimizer), for 1 B parameters and up")
    return parse_training_args(parser, argv, "gpt", GeneratorSettings)


# -------------------------------------------------------------------------------------------------
# one training step

def generator_step(step, batch, parts, wrapped, args, job):
    """Cross-entropy of one batch, gradients and updates; returns {term: value} for the log.

    batch: this process's micro-batches of codes (b, N) and labels (b,).
    """
    seed_step(args.seed, step)
    terms = {}
    for micro, (codes, labels) in enumerate(batch):
        # Gradients of all passes add up. Dividing by their number gives the mean of the batch.
        with gradient_sync(wrapped, micro, job):
            losses = generator_losses(wrapped, codes.to(job.device), labels.to(job.device), job)
            (losses["loss"] / job.passes).backward()
        add_mean(terms, losses, job.passes)
    terms["norm"] = optimizer_step(parts["model"], own_optimizers(parts), step, args)
    update_ema(parts["ema"], parts["model"], args.ema, step)
    return terms


def generator_losses(model, codes, labels, job):
    """Teacher forcing of codes (B, N): cross-entropy in nats, the same in bits, and accuracy."""
    with autocast(job):
        logits = model(codes, labels)                                           # (B, N, K)
    loss = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
    accuracy = (logits.argmax(-1) == codes).float().mean()
    return dict(loss=loss, bits=loss / math.log(2), accuracy=accuracy)


# -------------------------------------------------------------------------------------------------
# the run

def main(args):
    job = join_ranks(args)
    split_batch(args, job)
    path = args.out / "gpt.pt"
    start_folder(path, args)
    tokenizer = find_tokenizer(args)
    train, val = open_data(args, tokenizer.config.image_size, job)
    choose_dtype(args, job)
    parts = build_generator_parts(tokenizer.config, len(train.class_names), args, job)
    if args.resume:
        check_learned_codes(path, tokenizer, train.class_names, args)
    start = restore(path, "gpt", parts, args) if args.resume else 0
    codes, val_codes, val_labels = cached_codes(tokenizer, train, val, args, job)
    print(f"{len(codes):,} images in {codes['codes'].shape[1]} views, {len(train.class_names)} "
          f"classes")
    wrapped = wrap_model(parts["model"], args, job)
    batches = code_batches(codes, len(train.class_names), args, job, start)

    def take_step(step, batch):
        return generator_step(step, batch, parts, wrapped, args, job)

    def compute_loss(micro_batch):
        codes, labels = micro_batch
        losses = generator_losses(parts["model"], codes.to(job.device), labels.to(job.device), job)
        return losses["loss"]

    def evaluate():
        record = held_out_bits(parts["ema"], val_codes, val_labels, job)
        print(f"  held-out: {record['bits']:.3f} bits per token, accuracy "
              f"{record['accuracy']:.1%}; accuracy by position (%): " +
              " ".join(f"{100 * a:.0f}" for a in record["accuracy_by_position"]), flush=True)
        draw_class_samples(args.out / "samples.png", parts["ema"], tokenizer, train.class_names,
                           args.sample_cfg)
        return record

    if args.dry_run:
        images = min(args.code_images or len(train), len(train))
        return print_plan(take_step, next(batches), parts, images, args, job)
    carried = dict(class_names=train.class_names,
                   tokenizer=dict(config=asdict(tokenizer.config), model=tokenizer.state_dict(),
                                  fingerprint=code_fingerprint(tokenizer)))
    training_loop("gpt", parts, start, batches, take_step, compute_loss, evaluate, args, job,
                  carried)
    print(f"saved {path}, {args.out / 'samples.png'}")


def find_tokenizer(args):
    """The tokenizer in --out. A dry run without one takes the preset's: its sizes are enough."""
    path = args.out / "tokenizer.pt"
    if args.dry_run and not path.exists():
        preset = preset_of(args.preset or args.data)
        sizes = {name: preset[name] for name in asdict(TokenizerConfig())}
        return SpectralTokenizer(TokenizerConfig(**sizes))
    return load_tokenizer(path, args.device)


def check_learned_codes(path, tokenizer, class_names, args):
    """UserError when the checkpoint to resume learned other classes or another tokenizer."""
    saved = read_checkpoint(path, "gpt", mmap=True)
    carried = build_model(SpectralTokenizer, TokenizerConfig, saved["tokenizer"], path, "cpu")
    learned, now = code_fingerprint(carried), code_fingerprint(tokenizer)
    if saved["class_names"] != class_names:
        raise UserError(f"{path} learned the classes {saved['class_names'][:5]} .., the data set "
                        f"has {class_names[:5]} ..: --overwrite starts anew")
    if learned != now:
        raise UserError(f"{path} learned codes of tokenizer {learned}, {args.out}/tokenizer.pt "
                        f"makes those of {now}: --overwrite starts anew")


def build_generator_parts(tokenizer_config, num_classes, args, job):
    """{name: model or optimizer}: all whose state belongs into a checkpoint."""
    # VAR's rule: width 64 x depth, heads = depth.
    sizes = dict(width=args.width or 64 * args.depth, heads=args.heads or args.depth)
    config = config_from_flags(GPTConfig, args, num_classes=num_classes, **sizes,
                               num_tokens=tokenizer_config.num_tokens,
                               codebook_size=tokenizer_config.codebook_size)
    torch.manual_seed(wrap64(args.seed))
    model = GPT(config).to(job.device)
    parts = dict(model=model, ema=copy.deepcopy(model).eval(), **make_optimizers(model, args, job))
    if args.grad_checkpoint:
        recompute_blocks(model)
    return parts


def code_batches(data, num_classes, args, job, start):
    """The batch of each step from `start` on: this process's micro-batches of codes and labels.

    Each image comes in a random view, and some labels are dropped (label num_classes). A batch
    depends on seed and step alone, whatever the number of processes.
    """
    views = data["codes"].shape[1]

    def make_batch(step):
        generator = torch.Generator().manual_seed(step_seed(args.seed, step))
        index = batch_indices(len(data), args.batch_size, step, args.seed)
        view = torch.randint(views, (args.batch_size,), generator=generator)
        dropped = torch.rand(args.batch_size, generator=generator) < args.label_drop
        batch = []
        for micro in range(job.passes):
            # Drawn for the whole batch above, so that each process only takes its own rows.
            rows = micro_rows(micro, job)
            records = data[index[rows].numpy()]                  # read from the disk or its cache
            codes = records["codes"][np.arange(len(records)), view[rows]]
            labels = torch.from_numpy(records["label"].astype(np.int64) - 1)
            labels[dropped[rows]] = num_classes
            batch.append((torch.from_numpy(codes.astype(np.int64)), labels))
        return batch
    return ahead(make_batch, count(start))


# -------------------------------------------------------------------------------------------------
# evaluation on held-out codes

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


@torch.no_grad()
def draw_class_samples(path, gpt, tokenizer, class_names, cfg):
    """A grid of samples, a row for each of up to ten classes, from the same random numbers."""
    device = gpt.code_embed.weight.device
    classes = torch.arange(min(10, len(class_names)), device=device)
    labels = classes.repeat_interleave(8)
    codes = gpt.generate(labels, cfg=cfg, seeds=torch.arange(len(labels)))
    images = to_uint8(tokenizer.decode(codes))
    save_image_grid(path, images.split(8), [name.split(",")[0] for name in class_names[:10]])


# -------------------------------------------------------------------------------------------------
# the data set as codes

def cached_codes(tokenizer, train, val, args, job):
    """Records of the training images, and codes (n, N) and labels (n,) of held-out ones.

    Those on disk are taken when they are of this tokenizer and these images.
    """
    N = tokenizer.config.num_tokens
    if args.dry_run:                                             # any codes do for a plan
        blank = np.ones(args.batch_size, code_record(args.views, N))
        return blank, None, None
    if args.views == "ten-crop" and not isinstance(train, Folder):
        raise UserError(f"--views ten-crop crops image files, {args.data} has none: take flip")
    images = min(args.code_images or len(train), len(train))
    held_out = min(args.eval_images, len(val))
    made_with = dict(tokenizer=code_fingerprint(tokenizer), images=images,
                     held_out=held_out, views=args.views, dtype=job.dtype_name)
    if job.rank == 0:                            # it looks at every file
        made_with.update(data=data_fingerprint(train), held_out_data=data_fingerprint(val))
    train_file, val_file = args.out / "codes-train.npy", args.out / "codes-val.npy"
    claim_files(args.out / "codes.json", made_with, [train_file, val_file], args, job)
    codes = encode_split(train_file, tokenizer, train, images, args.views, job)
    val_records = encode_split(val_file, tokenizer, val, held_out, "centre", job)
    val_codes = torch.from_numpy(val_records["codes"][:, 0].astype(np.int64))
    val_labels = torch.from_numpy(val_records["label"].astype(np.int64) - 1)
    return codes, val_codes, val_labels


def data_fingerprint(data):
    """16 hex digits that name a data set by its classes and by the labels, names and sizes of its
    files: codes of other images or labels must not be learned."""
    digest = hashlib.sha256(repr((len(data), data.class_names)).encode())
    if isinstance(data, Folder):
        for file, label in zip(data.files, data.labels.tolist()):
            digest.update(f"{label} {os.path.basename(file)} {os.path.getsize(file)}".encode())
    return digest.hexdigest()[:16]


def code_record(views, N):
    """An image's label + 1 (0 = not encoded yet), and its codes in all views (V, N)."""
    crops, mirrored = VIEWS[views]
    return np.dtype([("label", np.uint16), ("codes", np.uint16, (len(crops) * (1 + mirrored), N))])


@torch.no_grad()
def encode_split(path, tokenizer, data, number, views, job):
    """Records of so many images, encoded by all processes together, 64 images at a time."""
    crops, mirrored = VIEWS[views]
    record = code_record(views, tokenizer.config.num_tokens)
    chosen = pick_images(len(data), number)
    def read_views(rows):
        places = [None if crop is None else torch.tensor(crop).expand(len(rows), 3)
                  for crop in crops]
        return [data.batch(chosen[rows], place) for place in places]

    if not path.exists():
        file = open_records(path, number, record, job)
        todo = unfinished(file, 64, job)
        bar = tqdm(todo, desc=f"encoding {number:,} images", disable=True if job.rank else None)
        for rows, batches in zip(bar, ahead(read_views, todo)):
            # The views of an image: each crop, and its mirror image right after it.
            codes = []
            for images, labels in batches:
                images = to_float(images.to(job.device))
                with autocast(job):
                    codes.append(tokenizer.encode(images).cpu())
                    if mirrored:
                        codes.append(tokenizer.encode(images.flip(-1)).cpu())
            write_records(file, rows, labels, codes=torch.stack(codes, 1))
        file.flush()
        del file                                 # Windows renames no file that is in use
        barrier()
        if job.rank == 0:
            os.replace(f"{path}.part", path)
        barrier()
    return read_records(path, number, record)


# -------------------------------------------------------------------------------------------------
# a file of records that all processes fill together, and that a stopped run goes on with. It is
# named PATH.part until it is whole. A record's label is written last: 0 means, not done yet.

RECORDS_FORMAT = 3              # raised when new code would misread an old file


def claim_files(note, made_with, files, args, job):
    """Note what files are made with. Files made with something else are an error; --overwrite
    deletes them. Those of an older version of this program are made anew."""
    if job.rank == 0:
        made_with = dict(made_with, format=RECORDS_FORMAT)
        files = [Path(f"{file}{end}") for file in files for end in ("", ".part")]
        try:
            found = json.loads(note.read_text()) if note.exists() else {}
        except ValueError:                                       # a note that is not whole
            found = {}
        differs = [name for name in made_with if found.get(name) != made_with[name]]
        there = [file for file in files if file.exists()]
        if there and "tokenizer" in found and "format" not in found:
            print(f"{note} is of an older version of this program: its files are made anew")
        elif there and differs and not args.overwrite:
            name = differs[0]
            raise UserError(f"{note} tells of {name} {found.get(name)}, this run has {name} "
                            f"{made_with[name]}: --overwrite starts anew, another name or --out "
                            f"keeps both")
        if differs:
            for file in there:
                file.unlink()
        write_note(note, made_with)
    barrier()


def write_note(path, content):
    """JSON, whole or not at all."""
    Path(f"{path}.tmp").write_text(json.dumps(content))
    os.replace(f"{path}.tmp", path)


def open_records(path, number, record, job):
    """PATH.part as a memory-mapped array to be filled; made when there is none."""
    part = f"{path}.part"
    size = number * record.itemsize
    if job.rank == 0 and not os.path.exists(part):
        # Met here, a full disk is an error; met while the mapped file is written, it is a crash.
        if shutil.disk_usage(Path(part).absolute().parent).free < size:
            raise FailedRun(f"cannot write {path}: it takes {size / 1e6:,.0f} MB, more than the "
                            f"disk has free")
        np.lib.format.open_memmap(part, "w+", record, (number,))
    barrier()
    return read_records(part, number, record, "r+")


def read_records(path, number, record, mode="r"):
    """The records of a file, read when they are used."""
    try:
        file = np.load(path, mmap_mode=mode)
        if file.dtype == record and file.shape == (number,):
            return file
        reason = f"{file.shape} records of {file.dtype}, not {number} of {record}"
    except (OSError, ValueError, EOFError) as e:
        reason = str(e)
    raise UserError(f"{path} is not the file it should be ({reason}): remove it, it is made anew")


def unfinished(file, batch_size, job):
    """This process's batches of rows, as ranges, that are not all in the file yet."""
    numbers = range(len(file))
    batches = [numbers[first:first + batch_size] for first in numbers[::batch_size]]
    return [rows for rows in batches[job.rank::job.ranks] if (file["label"][rows] == 0).any()]


def write_records(file, rows, labels, **content):
    for name, value in content.items():
        file[name][rows] = value
    if labels.max() >= 65535:
        raise UserError(f"class {labels.max()} does not fit 16 bits: use at most 65,535 classes")
    file["label"][rows] = labels + 1


if __name__ == "__main__":
    run_script(main, parse_args())
