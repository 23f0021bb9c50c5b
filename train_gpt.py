"""Train the generator (paper, section 3.4) on the codes of a trained tokenizer.

  python train_gpt.py                                           # after python train_tokenizer.py
  python train_gpt.py --data cifar10 --depth 8 --width 256      # another size
  torchrun --nproc-per-node 8 train_gpt.py --data imagenet --data-dir /path/to/ILSVRC      # d16

It reads out/<data>/tokenizer.pt and writes gpt.pt, samples.png, loss-gpt.png and log-gpt.jsonl
beside it. The data set is encoded once, into codes-*.npy (ImageNet: 164 MB per view).
"""
import copy
import hashlib
import math
import os
from dataclasses import asdict, dataclass
from itertools import count

from spectralar import (GPT, GPTConfig, UserError, add_settings, autocast, barrier,
                        code_fingerprint, config_from_flags, load_tokenizer, random_streams,
                        run_script, setting, start_job, to_float, uniforms)

import numpy as np
import torch
import torch.nn.functional as F

from evaluate import Folder, batch_indices, check_data, held_out_bits, open_data, pick_images
from sample import draw_class_samples, own_batches, part_name, progress, shared_array
from train_tokenizer import (Log, TrainingSettings, add_mean, ahead, catch_signals, file_stamp,
                             gradient_sync, make_optimizers, optimizer_step, parse_training_flags,
                             restore, save_run, split_batch, start_folder, training_parser,
                             update_ema, wrap_model)

# ---- settings -----------------------------------------------------------------------------------
# Of each training image: crops (scale, y, x of any_crop; None: the middle), also mirrored?
VIEWS = {
    "centre": ([None], False),
    "flip": ([None], True),
    "ten-crop": ([(1.1, 0.5, 0.5), (1.1, 0, 0), (1.1, 0, 1), (1.1, 1, 0), (1.1, 1, 1)], True),
}


@dataclass
class GeneratorSettings(TrainingSettings):
    """The generator's defaults, for shapes."""
    steps: int = setting(600, "optimizer steps")
    batch_size: int = setting(64, "images per step, over all GPUs")
    betas: tuple = setting((0.9, 0.95), "of AdamW")
    weight_decay: float = setting(0.05, "of matrices; nothing else decays")
    hold: float = setting(0.5, "share of the run at the peak, before the cosine to a tenth of it")
    clip: float = setting(2.0, "largest gradient norm; 0 = no clipping")
    ema: float = setting(0.99, "decay of the averaged weights, which are evaluated")
    eval_every: int = setting(300, "steps between evaluations with pictures")
    label_drop: float = setting(0.1, "share of labels dropped, for guidance")
    code_images: int = setting(None, "training images to encode (all)")
    eval_images: int = setting(2048, "held-out images to encode")
    sample_cfg: float = setting(2.0, "guidance of the samples drawn at each evaluation")


def parse_args(argv=None):
    parser, preset = training_parser(__doc__, argv)
    add_settings(parser, "model", GPTConfig, preset["gpt"])
    add_settings(parser, "training", GeneratorSettings, preset["gpt"])
    parser.add_argument("--views", choices=VIEWS, default=preset["gpt"].get("views", "flip"),
                        help="of each training image. centre: ADM's crop; flip: also its mirror "
                             "image; ten-crop: five crops at 1.1 times the size, and theirs")
    parser.add_argument("--tokenizer", metavar="FILE", help="another run's tokenizer.pt or gpt.pt "
                        "(tokenizer.pt in --out)")
    return parse_training_flags(parser, argv, "gpt")


# ---- one training step --------------------------------------------------------------------------
def generator_step(step, batch, parts, wrapped, args, job):
    """Cross-entropy of one batch, gradients and updates; returns {term: value} for the log.

    batch: this process's micro-batches of codes (b, N) and labels (b,)."""
    model = parts["model"]
    passes = len(batch)
    terms = {}
    for micro, (codes, labels) in enumerate(batch):
        codes = codes.to(job.device, non_blocking=True)
        labels = labels.to(job.device, non_blocking=True)
        last = micro == passes - 1

        # Gradients of all passes add up. Divided by their number, they are those of the batch.
        with gradient_sync(wrapped, last, job):
            losses = generator_losses(wrapped, codes, labels, job)
            loss = losses["loss"] / passes
            loss.backward()
        add_mean(terms, losses, passes)

    # Only now the gradients are those of the whole batch, so that they can be clipped.
    optimizers = [parts["optimizer"], parts.get("muon")]
    terms["norm"] = optimizer_step(model, optimizers, step, args)
    # The averaged weights make better samples than those of the last step.
    update_ema(parts["ema"], model, args.ema, step)
    return terms


def generator_losses(model, codes, labels, job):
    """Teacher forcing of codes (B, N): cross-entropy in nats, the same in bits, and accuracy."""
    with autocast(job):
        logits = model(codes, labels)                                           # (B, N, K)
    # The logits at a position predict the code that stands there (see GPT.embed).
    loss = F.cross_entropy(
        logits.float().flatten(0, 1),
        codes.flatten(),
    )
    bits = loss / math.log(2)
    hits = logits.argmax(-1) == codes                                           # (B, N)
    accuracy = hits.float().mean()
    return dict(loss=loss, bits=bits, accuracy=accuracy)


# ---- the run ------------------------------------------------------------------------------------
def main(args):
    job = start_job(args)
    path = args.out / "gpt.pt"
    start_folder(path, args)
    stamp = file_stamp(path)

    # The tokenizer, and the images whose codes the generator learns.
    tokenizer_path = args.tokenizer or args.out / "tokenizer.pt"
    tokenizer = load_tokenizer(tokenizer_path, job.device)
    train, val = open_data(args, tokenizer.config.image_size, job)
    check_data(tokenizer_path, train, args)
    names = train.class_names

    # What a resumed run must find unchanged, and what sampling needs: gpt.pt is enough for it.
    same = dict(class_names=names, codes_of_tokenizer=code_fingerprint(tokenizer))
    config = asdict(tokenizer.config)
    carried = dict(
        tokenizer=dict(config=config, model=tokenizer.state_dict()),
        data=train.fingerprint(),
        **same,
    )
    parts = build_generator_parts(tokenizer.config, len(names), args, job)
    start = 0
    if args.resume:
        start = restore(path, "gpt", parts, args, **same)

    # The generator learns codes, so the data set is encoded first.
    codes = encode_data("train", tokenizer, train, args.code_images, args.views, args, job)
    held_out = encode_data("val", tokenizer, val, args.eval_images, "centre", args, job)
    print(f"{len(codes):,} images in {codes['codes'].shape[1]} views, {len(names)} classes")
    wrapped = wrap_model(parts["model"], args, job)
    batches = code_batches(codes, len(names), args, job, start)

    log = Log(args.out / "log-gpt.jsonl", parts["model"], args, job)
    caught = catch_signals(job)
    save_every = args.save_every or args.eval_every

    for step in range(start, args.steps):
        # The batch was made while the step before it ran.
        batch = next(batches)
        terms = generator_step(step, batch, parts, wrapped, args, job)
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
            stamp = save_run(path, "gpt", parts, done, stamp, args, job, **carried)
        if evaluates and job.rank == 0:
            record = evaluate_generator(parts["ema"], held_out, job)
            log.write(step=done, **{f"held-out {name}": value for name, value in record.items()})
            log.draw(args.out / "loss-gpt.png", {"bits per token": ["bits", "held-out bits"]})
            samples = args.out / "samples.png"
            draw_class_samples(samples, parts["ema"], tokenizer, names, args.sample_cfg)
            log.reset()                  # the evaluation's time is not that of a step
        if leaves:
            break

    if done < args.steps:
        raise UserError(f"{caught[0]} after step {done}: saved {path}, --resume goes on")
    print(f"saved {path}, {args.out / 'samples.png'}, {args.out / 'loss-gpt.png'}")


def build_generator_parts(tokenizer_config, num_classes, args, job):
    """{name: model or optimizer} of the run."""
    # VAR's rule where no size is given: width 64 x depth, heads = depth.
    config = config_from_flags(
        GPTConfig, args, num_classes=num_classes, num_tokens=tokenizer_config.num_tokens,
        codebook_size=tokenizer_config.codebook_size, width=args.width or 64 * args.depth,
        heads=args.heads or args.depth)
    torch.manual_seed(random_streams("generator weights", args.seed, 0).item())
    model = GPT(config).to(job.device)
    return dict(model=model, ema=copy.deepcopy(model).eval(), **make_optimizers(model, args, job))


def evaluate_generator(model, records, job):
    """Bits per token and accuracy on held-out codes, over all and by position."""
    codes = torch.from_numpy(records["codes"][:, 0].astype(np.int64))           # (n, N)
    labels = torch.from_numpy(records["label"].astype(np.int64))
    record = held_out_bits(model, codes, labels, job)
    print(f"  held-out: {record['bits']:.3f} bits per token, accuracy "
          f"{record['accuracy']:.1%}; accuracy by position (%): " +
          " ".join(f"{100 * a:.0f}" for a in record["accuracy_by_position"]), flush=True)
    return record


# ---- the data set as codes ----------------------------------------------------------------------
def code_batches(data, num_classes, args, job, start):
    """The batch of each step from `start` on, as generator_step takes it.
    Each image comes in a random view, and some labels are dropped (label num_classes). A batch
    depends on seed and step alone, whatever the number of processes."""
    views = data["codes"].shape[1]
    passes = split_batch(args, job)

    def make_batch(step):
        index = batch_indices(len(data), args.batch_size, step, args.seed, "order of codes")
        number = step * args.batch_size + torch.arange(args.batch_size)
        u = uniforms(random_streams("views and label drops", args.seed, number), 2)
        view = (u[:, 0] * views).long()
        dropped = u[:, 1] < args.label_drop
        batch = []
        for rows in passes:
            # Drawn for the whole batch above, so that each process only takes its own rows.
            records = data[index[rows].numpy()]                  # read from the disk or its cache
            codes = records["codes"][np.arange(len(records)), view[rows]]
            labels = torch.from_numpy(records["label"].astype(np.int64))
            labels[dropped[rows]] = num_classes
            batch.append((torch.from_numpy(codes.astype(np.int64)), labels))
        return batch
    return ahead(make_batch, count(start))


@torch.no_grad()
def encode_data(split, tokenizer, data, most, views, args, job):
    """Records (label, codes (V, N)) of up to `most` images in V views, encoded by all processes.
    The file's name tells the tokenizer, images, views and number type, so that codes of others are
    never taken."""
    crops, mirrored = VIEWS[views]
    if views == "ten-crop" and not isinstance(data, Folder):
        raise UserError(f"--views ten-crop crops image files, {args.data} has none: take flip")
    chosen = pick_images(len(data), most)
    made_of = [code_fingerprint(tokenizer), data.fingerprint(), len(chosen), views, job.dtype]
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    path = args.out / f"codes-{split}-{name}.npy"

    def read_views(rows):
        places = [None if crop is None else torch.tensor(crop).expand(len(rows), 3)
                  for crop in crops]
        return [data.batch(chosen[rows], place) for place in places]

    if not path.exists():
        shape = (len(crops) * (1 + mirrored), tokenizer.config.num_tokens)
        record = np.dtype([("label", np.int32), ("codes", np.uint16, shape)])
        file = shared_array(part_name(path), record, (len(chosen),), job)
        # A thread reads images while the model encodes those before.
        batches = own_batches(len(chosen), 64, job)
        bar = progress(f"encoding {split} images", batches, job)
        for rows, images_of_views in zip(bar, ahead(read_views, batches)):
            codes = []
            for images, labels in images_of_views:
                images = to_float(images.to(job.device))
                with autocast(job):
                    codes.append(tokenizer.encode(images))
                    if mirrored:
                        codes.append(tokenizer.encode(images.flip(-1)))
            file["codes"][rows.numpy()] = torch.stack(codes, 1).cpu().numpy()
            file["label"][rows.numpy()] = labels.numpy()
        file.flush()
        del file                                 # Windows renames no file that is in use
        barrier()
        if job.rank == 0:
            os.replace(part_name(path), path)
        barrier()
    return np.load(path, mmap_mode="r")


if __name__ == "__main__":
    run_script(main, parse_args)
