"""Train the generator (paper, section 3.4) on the codes of a trained tokenizer: out/<data>/tokenizer.pt in, gpt.pt out.

  python train_gpt.py                                           # after python train_tokenizer.py
  python train_gpt.py --data cifar10 --depth 8 --width 256      # after train_tokenizer.py --data cifar10

The data set is encoded once, each image and its mirror image, into codes.npz. After the run: samples.png (a row a
class) and log-gpt.jsonl.
"""
import copy
import math
import os
import time
import zipfile
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from spectralar import GPT, FailedRun, GPTConfig, UserError, fingerprint, load_tokenizer, save_checkpoint
from train_tokenizer import (Interrupt, Log, Meter, add_training_flags, base_parser, batch_indices,
                             choose_dtype, finish_args, lr_at, make_optimizer, new_run, open_data, plain, restore, run,
                             save_grid, seed_step, to_float, to_uint8, update_ema)

# ------------------------------------------------------------------------------------------------------------------
# codes of the data set, encoded once

@torch.no_grad()
def encode(tokenizer, data, count, views, args, dtype):
    """Codes (views, count, N) uint16 and labels (count,) of the first images; view 1 is the mirror image."""
    codes, labels = [], []
    for chunk in tqdm(torch.arange(count).split(64), desc=f"encoding {count:,} images x {views}", disable=None):
        images, label = data.batch(chunk)
        images = to_float(images.to(args.device))
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            codes.append(torch.stack([tokenizer.encode(x) for x in (images, images.flip(-1))[:views]]).cpu())
        labels.append(label)
    return torch.cat(codes, 1).numpy().astype(np.uint16), torch.cat(labels).numpy()


def cached_codes(tokenizer, train, val, args, dtype):
    """The data set's codes as a dict of arrays, from codes.npz when it is of this tokenizer and these images."""
    path = args.out / "codes.npz"
    count = min(args.code_images or len(train), len(train))
    held_out = min(args.eval_images, len(val))
    tag = dict(tokenizer=fingerprint(tokenizer), data=args.data, images=str(count), held_out=str(held_out),
               dtype=args.dtype)
    if path.exists() and not args.overwrite:
        try:
            with np.load(path, allow_pickle=False) as file:
                cache = dict(file)
        except (OSError, ValueError, zipfile.BadZipFile) as e:
            raise UserError(f"{path} is not a whole file of codes ({e}): --overwrite encodes again") from None
        for k, v in tag.items():
            if str(cache.get(k)) != v:
                raise UserError(f"{path} holds codes with {k} {cache.get(k)}, this run has {k} {v}: "
                                f"--overwrite encodes again, --out takes another folder")
        print(f"{path}: {count:,} images in {len(cache['train_codes'])} views")
        return cache
    train_codes, train_labels = encode(tokenizer, train, count, 2, args, dtype)
    val_codes, val_labels = encode(tokenizer, val, held_out, 1, args, dtype)
    cache = dict(tag, train_codes=train_codes, train_labels=train_labels, val_codes=val_codes[0], val_labels=val_labels)
    with open(f"{path}.tmp", "wb") as file:
        np.savez(file, **cache)
    os.replace(f"{path}.tmp", path)
    return cache


# ------------------------------------------------------------------------------------------------------------------
# evaluation on held-out codes

@torch.no_grad()
def evaluate(model, codes, labels, args, dtype):
    """Held-out bits per token and accuracy, over all and by position, for codes (n, N) and labels (n,)."""
    bits, hits = [], []
    for chunk, label in zip(codes.split(256), labels.split(256)):
        chunk, label = chunk.to(args.device), label.to(args.device)
        with torch.autocast(chunk.device.type, dtype, enabled=dtype != torch.float32):
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
    save_grid(path, images.split(8), class_names[:len(classes)])


# ------------------------------------------------------------------------------------------------------------------
# the run

def parse_args(argv=None):
    parser, p = base_parser(__doc__, argv)
    p = p["gpt"]
    add = parser.add_argument_group("model").add_argument
    add("--width", type=int, default=p["width"], help="D; the paper's d16 is width 1024, depth 16, 16 heads")
    add("--depth", type=int, default=p["depth"], help="blocks")
    add("--heads", type=int, default=p["heads"], help="of attention")
    add("--label-drop", type=float, default=p["label_drop"], help="share of labels dropped, for guidance")
    add("--code-images", type=int, default=p["code_images"], help="training images to encode (default: all)")
    add("--eval-images", type=int, default=2048, help="held-out images to encode")
    add("--sample-cfg", type=float, default=2.0, help="guidance of the samples drawn at each evaluation")
    add_training_flags(parser, p)
    return finish_args(parser, parser.parse_args(argv))


def main(args):
    path = args.out / "gpt.pt"
    new_run(path, args)
    tokenizer = load_tokenizer(args.out / "tokenizer.pt", args.device)
    args.image_size = tokenizer.config.image_size
    train, val = open_data(args)
    config = GPTConfig(len(train.class_names), tokenizer.config.num_tokens, tokenizer.config.codebook_size,
                       args.width, args.depth, args.heads)
    torch.manual_seed(args.seed)
    model = GPT(config).to(args.device)
    ema = copy.deepcopy(model).eval()
    optimizer = make_optimizer(model, args)
    start = 0
    if args.resume:
        checkpoint = restore(path, "gpt", model, ema, optimizer, args)
        start = checkpoint["step"]
        if checkpoint["tokenizer"]["fingerprint"] != fingerprint(tokenizer):
            raise UserError(f"{path} learned codes of tokenizer {checkpoint['tokenizer']['fingerprint']}, "
                            f"{args.out / 'tokenizer.pt'} is {fingerprint(tokenizer)}: --overwrite starts anew")
    dtype, peak = choose_dtype(args)
    cache = cached_codes(tokenizer, train, val, args, dtype)
    codes, labels = torch.from_numpy(cache["train_codes"].astype(np.int32)), torch.from_numpy(cache["train_labels"])
    val_codes, val_labels = torch.from_numpy(cache["val_codes"].astype(np.int64)), torch.from_numpy(cache["val_labels"])
    log = Log(args.out / "log-gpt.jsonl", args, model)
    print(f"{codes.shape[1]:,} images in {len(codes)} views, {len(val_codes):,} held out, {config.num_classes} classes")
    step_model = torch.compile(model) if args.compile else model
    meter, interrupt = Meter(args, model.flops(), peak), Interrupt()

    def save(step):
        save_checkpoint(path, "gpt", config=asdict(config), args=plain(args), step=step, model=model.state_dict(),
                        ema=ema.state_dict(), optimizer=optimizer.state_dict(), class_names=train.class_names,
                        tokenizer=dict(config=asdict(tokenizer.config), model=tokenizer.state_dict(),
                                       fingerprint=fingerprint(tokenizer)))

    for step in range(start, args.steps + 1):
        last = step == args.steps or interrupt.asked
        if step > start and (step % args.log_every == 0 or last) and meter.count:
            log.write(**meter.line(step, lr))
        if step > start and (step % args.eval_every == 0 or step == args.steps):
            evaluation = evaluate(ema, val_codes, val_labels, args, dtype)
            print_evaluation(evaluation)
            log.write(step=step, **evaluation)
            save_samples(args.out / "samples.png", ema, tokenizer, train.class_names, args.sample_cfg)
            meter.reset()
        if step > start and (step % args.save_every == 0 or last):
            save(step)
        if last:
            break

        # one training step: codes of a batch, a random view of each, some labels dropped; cross-entropy; the update
        tick = time.perf_counter()
        seed_step(args.seed, step)
        index = batch_indices(codes.shape[1], args.batch_size, step, args.seed)
        view = torch.randint(len(codes), (len(index),))
        batch, label = codes[view, index].long().to(args.device), labels[index]
        label = torch.where(torch.rand(len(index)) < args.label_drop, config.num_classes, label).to(args.device)
        meter.data_time += time.perf_counter() - tick

        with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
            logits = step_model(batch, label)                               # (B, N, K)
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        lr = lr_at(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, args.ema, step)
        meter.add(loss=loss, bits=loss / math.log(2), accuracy=(logits.argmax(-1) == batch).float().mean(), norm=norm)

    if interrupt.asked:
        raise FailedRun(f"{interrupt.asked} after step {step}: saved {path}, --resume goes on from there")
    print(f"saved {path}, {args.out / 'samples.png'}")


if __name__ == "__main__":
    run(main, parse_args())
