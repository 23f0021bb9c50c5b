"""Train the generator (paper, section 3.4) on the codes of a trained tokenizer: out/<data>/tokenizer.pt in, gpt.pt out.

  python train_gpt.py                                           # after python train_tokenizer.py
  python train_gpt.py --data cifar10 --depth 8 --width 256      # after train_tokenizer.py --data cifar10
  torchrun --nproc-per-node 8 train_gpt.py --data imagenet --data-dir /path/to/ILSVRC          # d16, the paper's size
  python train_gpt.py --data imagenet --data-dir /path/to/ILSVRC --depth 30 --dry-run          # what would d30 take?

The data set is encoded once, in the views of --views, by all processes together, into codes-train.npy and
codes-val.npy; a run that was stopped goes on encoding where it was. ImageNet at 64 tokens takes 164 MB a view. After
the run: samples.png (a row a class) and log-gpt.jsonl.
"""
import argparse
import copy
import json
import math
import os
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from spectralar import (GPT, FailedRun, GPTConfig, SpectralTokenizer, TokenizerConfig, UserError, code_fingerprint,
                        load_tokenizer, need, wrap_int64)
from train_tokenizer import (Folder, Interrupt, Log, Meter, add_training_flags, ahead, any_rank, autocast, barrier,
                             base_parser, batch_indices, choose_dtype, cost_of_image, finish_args, first_rank_first,
                             lr_at, make_optimizer, micro_rows, new_run, open_data, optimizer_step, parse_run_flags,
                             pick, preset_of, print_plan, recompute_blocks, restore, run, save_grid, save_run,
                             seed_step, share_batch, share_work, syncing, to_float, to_uint8, update_ema,
                             without_memory, wrap)

# ------------------------------------------------------------------------------------------------------------------
# codes of the data set, encoded once

CENTRE, FIVE = [None], [(1.1, y, x) for y, x in ((0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1))]   # see Folder.batch
VIEWS = {"centre": (CENTRE, 1), "flip": (CENTRE, 2), "ten-crop": (FIVE, 2)}     # crops; 2: each and its mirror image
UNSEEN = 65535                                                          # label of an image that is not encoded yet


def code_records(views, N):
    """The .npy's dtype: an image's label and its codes in all views (V, N)."""
    crops, sides = VIEWS[views]
    return np.dtype([("label", np.uint16), ("codes", np.uint16, (len(crops) * sides, N))])


def make_blank(path, count, record):
    """A .npy of images still to do, written out in full, so that a disk too small is met here."""
    blank = np.zeros(min(count, 1 + 2 ** 24 // record.itemsize), record)
    blank["label"] = UNSEEN
    try:
        with open(f"{path}.new", "wb") as file:
            header = np.lib.format.header_data_from_array_1_0(blank)
            np.lib.format.write_array_header_1_0(file, dict(header, shape=(count,)))
            for start in range(0, count, len(blank)):
                file.write(blank[:count - start].tobytes())
        os.replace(f"{path}.new", path)
    except OSError as e:
        Path(f"{path}.new").unlink(missing_ok=True)
        raise FailedRun(f"cannot write {path}, {count * record.itemsize / 1e6:,.0f} MB ({e.strerror}): free disk "
                        f"space") from None


def open_records(path, count, record, mode):
    """The memory-mapped records of a .npy file."""
    try:
        file = np.load(path, mmap_mode=mode)
        if file.dtype == record and file.shape == (count,):
            return file
        reason = f"{file.shape} records of {file.dtype}, not {count} of {record}"
    except (OSError, ValueError, EOFError) as e:
        reason = str(e)
    raise UserError(f"{path} is not the file it should be ({reason}): delete it, and the next run makes it "
                    f"anew")


def unseen(file, size, args):
    """This rank's batches of rows, as ranges, that are not all in the file yet: a label is written last."""
    batches = [range(start, min(start + size, len(file))) for start in range(0, len(file), size)]
    return [rows for rows in batches[args.rank::args.ranks] if (file["label"][rows.start:rows.stop] == UNSEEN).any()]


def agree(path, settings, files, args):
    """Note beside files what they are made with; UserError when the note there tells of something else.

    With --overwrite, files whose note differs are deleted, and files without a note too.
    Files whose note agrees are kept: to encode ImageNet again takes hours.
    """
    if args.rank == 0:
        noted = path.exists()
        try:
            found = json.loads(path.read_text()) if noted else settings
        except ValueError as e:
            found = {"file that cannot be read": str(e)}
        differs = [k for k, v in settings.items() if found.get(k) != v]
        if args.overwrite and (differs or not noted):
            for f in (path, *files, *(Path(f"{f}.part") for f in files)):
                f.unlink(missing_ok=True)
            differs = []
        if differs:
            k = differs[0]
            raise UserError(f"{path} tells of {k} {found.get(k)}, this run has {k} {settings[k]}: "
                            f"--overwrite starts anew, another name or --out keeps both")
        write_note(path, settings)
    barrier()


def write_note(path, settings):
    """JSON, whole or not at all."""
    Path(f"{path}.tmp").write_text(json.dumps(settings))
    os.replace(f"{path}.tmp", path)


@torch.no_grad()
def encode_split(path, tokenizer, data, count, views, args):
    """Records of the images picked, encoded by all ranks together; the file's name ends in .part until it is whole.

    What a stopped run left there is kept: batches are the same, and so are the codes.
    """
    part, (crops, sides), record = Path(f"{path}.part"), VIEWS[views], code_records(views, tokenizer.config.num_tokens)
    picked = pick(len(data), count)
    if not path.exists():
        if args.rank == 0 and not part.exists():
            make_blank(part, count, record)
        barrier()
        file = open_records(part, count, record, "r+")
        todo = unseen(file, 64, args)

        def read(rows):
            return [data.batch(picked[rows], crop and torch.tensor(crop).expand(len(rows), 3)) for crop in crops]
        bar = tqdm(todo, desc=f"encoding {count:,} images x {len(crops) * sides}", disable=True if args.rank else None)
        for rows, batches in zip(bar, ahead(read, todo)):
            codes = []
            for images, labels in batches:
                images = to_float(images.to(args.device))
                with autocast(args):
                    codes += [tokenizer.encode(x).cpu() for x in (images, images.flip(-1))[:sides]]
            here = slice(rows.start, rows.stop)
            file["codes"][here] = torch.stack(codes, 1)
            file["label"][here] = labels                                # last: until then the batch is still to do
        file.flush()
        barrier()
        if args.rank == 0:
            os.replace(part, path)
        barrier()
    return open_records(path, count, record, "r")


def cached_codes(tokenizer, train, val, args):
    """(train, val) records of codes, those on disk when they are of this tokenizer and these images."""
    if args.views == "ten-crop" and not isinstance(train, Folder):
        raise UserError(f"--views ten-crop crops image files, {args.data} has none: take flip")
    files = [args.out / f"codes-{split}.npy" for split in ("train", "val")]
    counts = min(args.code_images or len(train), len(train)), min(args.eval_images, len(val))
    tag = dict(tokenizer=code_fingerprint(tokenizer), data=args.data, images=counts[0], held_out=counts[1],
               views=args.views, dtype=args.dtype)
    agree(args.out / "codes.json", tag, files, args)
    if args.overwrite and files[0].exists():
        print(f"{files[0]} is kept, as codes.json agrees with this run. If the images have changed, "
              f"delete it first")
    return [encode_split(files[0], tokenizer, train, counts[0], args.views, args),
            encode_split(files[1], tokenizer, val, counts[1], "centre", args)]


# ------------------------------------------------------------------------------------------------------------------
# evaluation on held-out codes

@torch.no_grad()
def evaluate(model, codes, labels, args):
    """Held-out bits per token and accuracy, over all and by position, for codes (n, N) and labels (n,)."""
    bits, hits = [], []
    for chunk, label in zip(codes.split(256), labels.split(256)):
        chunk, label = chunk.to(args.device), label.to(args.device)
        with autocast(args):
            logits = model(chunk, label).float()                            # (n, N, K)
        nats = F.cross_entropy(logits.flatten(0, 1), chunk.flatten(), reduction="none")
        bits.append(nats.view_as(chunk) / math.log(2))
        hits.append((logits.argmax(-1) == chunk).float())
    bits, hits = torch.cat(bits).mean(0), torch.cat(hits).mean(0)           # (N,)
    return dict(bits=bits.mean().item(), accuracy=hits.mean().item(),
                bits_by_position=bits.tolist(), accuracy_by_position=hits.tolist())


def print_evaluation(e):
    print(f"  held-out: {e['bits']:.3f} bits per token, accuracy {e['accuracy']:.1%}; accuracy by position (%): " +
          " ".join(f"{100 * a:.0f}" for a in e["accuracy_by_position"]), flush=True)


def save_samples(path, gpt, tokenizer, class_names, cfg):
    """A grid of samples, a row for each of up to ten classes; the same random streams each time."""
    device = gpt.pos.device
    classes = torch.arange(min(10, len(class_names)), device=device)
    codes = gpt.generate(classes.repeat_interleave(8), cfg=cfg, seeds=torch.arange(8 * len(classes)))
    with torch.no_grad():
        images = to_uint8(tokenizer.decode(codes))
    save_grid(path, images.split(8), [name.split(",")[0] for name in class_names[:len(classes)]])


# ------------------------------------------------------------------------------------------------------------------
# the run

def parse_args(argv=None):
    parser, p = base_parser(__doc__, argv)
    p = p["gpt"]
    add = parser.add_argument_group("model").add_argument
    add("--depth", type=int, default=p["depth"], help="blocks; the paper's sizes are 16, 20, 24, 30")
    add("--width", type=int, default=p["width"], help="D (where no default stands: 64 x depth, VAR's rule)")
    add("--heads", type=int, default=p["heads"], help="of attention (where no default stands: depth)")
    add("--label-drop", type=float, default=p["label_drop"], help="share of labels dropped, for guidance")
    add = parser.add_argument_group("codes").add_argument
    add("--views", choices=VIEWS, default=p["views"], help="of each training image: centre is ADM's crop, flip adds "
        "its mirror image, ten-crop is five crops at 1.1 times the size and theirs")
    add("--code-images", type=int, default=p["code_images"], help="training images to encode (where no default stands: "
        "all)")
    add("--eval-images", type=int, default=2048, help="held-out images to encode")
    add("--sample-cfg", type=float, default=2.0, help="guidance of the samples drawn at each evaluation")
    add_training_flags(parser, p)
    parser.add_argument("--zero", action=argparse.BooleanOptionalAction, default=False,
                        help="share Adam's moments among the GPUs (ZeroRedundancyOptimizer), for 1 B parameters and up")
    args = finish_args(parser, parse_run_flags(parser, argv, "gpt"))
    args.width, args.heads = args.width or 64 * args.depth, args.heads or args.depth
    return args


def build(config, args):
    """{name: model or optimizer}: all whose state a checkpoint holds."""
    torch.manual_seed(wrap_int64(args.seed))
    model = GPT(config).to(args.device)
    parts = dict(model=model, ema=copy.deepcopy(model).eval(), optimizer=make_optimizer(model, args))
    if args.grad_checkpoint:
        recompute_blocks(model)
    return parts


def forward_pass(model, codes, labels, args):
    """{term: value} of one pass over codes (B, N): cross-entropy in nats, the same in bits, accuracy."""
    with autocast(args):
        logits = model(codes, labels)                                       # (B, N, K)
    loss = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
    return dict(loss=loss, bits=loss / math.log(2), accuracy=(logits.argmax(-1) == codes).float().mean())


def training_step(step, parts, wrapped, data, meter, args):
    """Codes of a batch, a random view of each, some labels dropped; cross-entropy; the update; returns the rate."""
    seed_step(args.seed, step)
    B = args.batch_size
    index, view = batch_indices(len(data), B, step, args.seed), torch.randint(data["codes"].shape[1], (B,))
    dropped = torch.rand(B) < args.label_drop
    for micro in range(args.accumulate):
        tick = time.perf_counter()
        rows = micro_rows(args, micro)
        records = data[index[rows].numpy()]                                 # read from the disk or its cache
        codes = torch.from_numpy(records["codes"][np.arange(len(records)), view[rows]].astype(np.int64))
        labels = torch.from_numpy(records["label"].astype(np.int64))
        labels[dropped[rows]] = parts["model"].config.num_classes
        codes, labels = codes.to(args.device), labels.to(args.device)
        meter.data_time += time.perf_counter() - tick
        with syncing(wrapped, args, micro):
            terms = forward_pass(wrapped, codes, labels, args)
            (terms["loss"] / args.accumulate).backward()
        meter.add(**terms)
    lr = lr_at(step, args)
    meter.add(norm=optimizer_step(parts["model"], parts["optimizer"], lr, args))
    update_ema(parts["ema"], parts["model"], args.ema, step)
    meter.steps += 1
    return lr


def main(args):
    share_work(args)
    share_batch(args)
    path = args.out / "gpt.pt"
    new_run(path, args)
    if args.dry_run and not (args.out / "tokenizer.pt").exists():           # a plan needs its sizes alone
        sizes = {f.name: preset_of(args)[f.name] for f in fields(TokenizerConfig)}
        tokenizer = SpectralTokenizer(TokenizerConfig(**sizes))
    else:
        tokenizer = load_tokenizer(args.out / "tokenizer.pt", args.device)
    args.image_size, args.codebook_size, N = (getattr(tokenizer.config, k) for k in
                                              ("image_size", "codebook_size", "num_tokens"))
    train, val = first_rank_first(lambda: open_data(args), args)
    parts = build(GPTConfig(len(train.class_names), N, args.codebook_size, args.width, args.depth, args.heads), args)
    start, model, code_name = 0, parts["model"], code_fingerprint(tokenizer)
    if args.resume:
        checkpoint = restore(path, "gpt", parts, args)
        need(path, checkpoint, "tokenizer")
        start, learned = checkpoint["step"], checkpoint["tokenizer"]["fingerprint"]
        if learned != code_name:
            raise UserError(f"{path} learned codes of tokenizer {learned}, {args.out / 'tokenizer.pt'} makes those of "
                            f"{code_name}: --overwrite starts anew")
        # or its moments would take memory for the whole run
        del checkpoint
    peak = choose_dtype(args)
    if args.dry_run:
        data = held_out = np.zeros(args.batch_size, code_records(args.views, N))     # any codes do for a plan
    else:
        data, held_out = cached_codes(tokenizer, train, val, args)
    held_out = [torch.from_numpy(held_out[k].astype(np.int64)) for k in ("codes", "label")]
    log = Log(args.out / "log-gpt.jsonl", args, model)
    print(f"{len(data):,} images in {data['codes'].shape[1]} views, {len(train.class_names)} classes")

    with without_memory(args.device):
        fake, codes = GPT(model.config), torch.zeros(2, N, dtype=torch.long)
        if args.grad_checkpoint:
            recompute_blocks(fake)
        costs = cost_of_image(lambda B: forward_pass(fake, codes[:B], codes[:B, 0], args)["loss"], fake)
    if args.dry_run:
        print_plan(args, model, *costs, len(train))
    meter, interrupt, wrapped = Meter(args, costs[0], peak), Interrupt(), wrap(model, args)
    carried = dict(class_names=train.class_names, tokenizer=dict(config=asdict(tokenizer.config), fingerprint=code_name,
                                                                 model=tokenizer.state_dict()))
    for step in range(start, args.steps + 1):
        last = step == args.steps or any_rank(interrupt.asked)
        saves = step > start and (step % args.save_every == 0 or last)
        evaluates = step > start and (step % args.eval_every == 0 or step == args.steps)
        if args.dry_run and step > start:
            return meter.line(step, lr)
        if step > start and step % args.log_every == 0 or saves or evaluates:
            log.write(**meter.line(step, lr))
        if evaluates and args.rank == 0:
            evaluation = evaluate(parts["ema"], held_out[0][:, 0], held_out[1], args)
            print_evaluation(evaluation)
            log.write(step=step, **evaluation)
            save_samples(args.out / "samples.png", parts["ema"], tokenizer, train.class_names, args.sample_cfg)
            meter.reset()
        if saves:
            save_run(path, "gpt", parts, step, args, **carried)
        if last:
            break
        lr = training_step(step, parts, wrapped, data, meter, args)

    if interrupt.asked:
        raise FailedRun(f"{interrupt.asked} after step {step}: saved {path}, --resume goes on from there")
    print(f"saved {path}, {args.out / 'samples.png'}")


if __name__ == "__main__":
    run(main, parse_args())
