"""Tests, each against an oracle: a formula, brute force, the uncached path, the uninterrupted run. CPU, no download.

  python -m pytest -q test_spectralar.py
"""
import copy
import gc
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
import weakref
import zlib
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import sample as sample_script
import train_gpt
import train_tokenizer
from spectralar import (GPT, FailedRun, GPTConfig, SpectralTokenizer, TokenizerConfig, UserError, VectorQuantizer,
                        additive, attention, band_edges, causal_mask, code_fingerprint, dct2, dct_matrix, decoder_mask,
                        encoder_mask, fingerprint, guidance_scale, idct2, load_generator, load_gpt, load_tokenizer,
                        low_pass, sample, save_checkpoint, uniforms)
from train_tokenizer import (JUDGE, LPIPS, PRESETS, SHAPES, Cifar, Classifier, ClassifierDistance, Discriminator,
                             Folder, Log, Shapes, any_crop, batch_indices, center_crop, choose_dtype, codebook_use,
                             cost, download, draw_levels, effective_rank, hinge_loss, lecam_loss, load_classifier, lr_at,
                             make_optimizer, matmul_speed, open_folder, psnr, reconstruction_losses, recompute_blocks,
                             run, to_float, upright_rgb, update_ema)

torch.set_num_threads(1)                # tiny tensors: threads would only cost time
P, N, K, D = 16, 6, 32, 32              # 16 px in patches of 4 px


def randomized(model):
    """In eval mode, with no parameter left at zero: AdaLN and level embeddings start there, and would hide bugs."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def tiny_tokenizer(num_tokens=N, flat=False):
    torch.manual_seed(0)
    return randomized(SpectralTokenizer(TokenizerConfig(16, 4, num_tokens, K, 8, D, 2, 4, 1.0, flat)))


def tiny_gpt():
    torch.manual_seed(0)
    return randomized(GPT(GPTConfig(10, N, K, D, 2, 4)))


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_codes(B, seed=0):
    return torch.randint(K, (B, N), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------------
# spectrum

def test_dct2_equals_its_definition():
    n, x = 5, noise(5, 5, dtype=torch.float64)
    wave = lambda k, i: math.sqrt((2 if k else 1) / n) * math.cos(math.pi * (2 * i + 1) * k / (2 * n))
    for u, v in np.ndindex(n, n):
        expected = sum(x[i, j].item() * wave(u, i) * wave(v, j) for i in range(n) for j in range(n))
        assert abs(dct2(x)[u, v] - expected) < 1e-12


def test_dct2_equals_scipy():
    x = torch.arange(16, dtype=torch.float64).view(4, 4) ** 2 % 7 / 4
    expected = torch.tensor([                                           # scipy.fft.dctn(x, norm="ortho"), scipy 1.17.1
        [1.8125, 0.264794639386959, -0.3125, -0.17733104339604602],
        [0.014010672786498918, -0.5593592167691146, -0.5716212971334146, 0.21652913087920392],
        [-0.1875, -0.23677329381396117, 0.4375, 0.5716212971334146],
        [0.19714512686868438, -0.658470869120796, -0.23677329381396117, 0.05935921676911449]], dtype=torch.float64)
    assert torch.allclose(dct2(x), expected, atol=1e-14)


@pytest.mark.parametrize("n", [1, 7, 32])
def test_dct_is_orthonormal_and_inverted(n):
    C, x = dct_matrix(n, torch.float64), noise(2, 3, n, n, dtype=torch.float64)
    assert torch.allclose(C @ C.T, torch.eye(n, dtype=torch.float64), atol=1e-13)
    assert torch.allclose(dct2(x).square().sum(), x.square().sum(), rtol=1e-12)         # Parseval
    assert torch.allclose(idct2(dct2(x)), x, atol=1e-12)


def test_spectrum_stays_float32_under_autocast():
    x = noise(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        spectrum, blurred = dct2(x), low_pass(x, 5)
    assert torch.equal(spectrum, dct2(x)) and torch.equal(blurred, low_pass(x, 5))
    assert low_pass(x.bfloat16(), 5).dtype == torch.float32


def test_low_pass_is_idempotent_and_nested():
    x = noise(2, 3, 16, 16, dtype=torch.float64)
    for w1, w2 in ((1, 2), (3, 11), (5, 16), (7, 7)):
        assert torch.allclose(low_pass(low_pass(x, w2), w1), low_pass(x, w1), atol=1e-12)


def test_low_pass_keeps_the_mean_at_one_and_all_at_the_image_side():
    x = noise(2, 3, 16, 16)
    assert torch.equal(low_pass(x, 16), x)
    assert torch.allclose(low_pass(x, 1), x.mean((2, 3), keepdim=True).expand_as(x), atol=1e-6)


def test_low_pass_of_many_windows_equals_each_alone():
    x, windows = noise(4, 3, 16, 16), [1, 5, 16, 12]
    alone = torch.cat([low_pass(x[i:i + 1], w) for i, w in enumerate(windows)])
    assert torch.allclose(low_pass(x, torch.tensor(windows)), alone, atol=1e-6)


@pytest.mark.parametrize("num_tokens, size, power", [(16, 32, 1.5), (64, 256, 2), (1, 8, 3), (64, 9, 0.5), (64, 16, 4)])
def test_band_edges_grow_from_one_to_the_image(num_tokens, size, power):
    edges = band_edges(num_tokens, size, power)
    assert edges.shape == (num_tokens,) and edges[0] >= 1 and edges[-1] == size and (edges.diff() >= 0).all()
    expected = [size * ((i + 1) / num_tokens) ** power for i in range(num_tokens)]
    assert all(e == 1 and w < 1 or abs(e - w) <= 0.5 for e, w in zip(edges.tolist(), expected))


def test_band_edges_are_uniform_at_power_one():
    assert band_edges(4, 32, 1).tolist() == [8, 16, 24, 32] and band_edges(4, 32, 2).tolist() == [2, 8, 18, 32]


@pytest.mark.parametrize("num_tokens, power, named", [(65, 1, "64"), (4, 0, "power"), (4, -1, "power")])
def test_band_edges_refuse_what_no_mapping_can_be(num_tokens, power, named):
    with pytest.raises(UserError, match=named):
        band_edges(num_tokens, 8, power)


# ------------------------------------------------------------------------------------------------------------------
# masks and attention

@pytest.mark.parametrize("flat, figure", [(False, False), (True, False), (False, True)])
def test_encoder_mask_equals_brute_force(flat, figure):
    p, n = 3, 4
    for row, column in np.ndindex(p + n, p + n):
        sees = flat or column < p or (figure if row < p else column <= row)
        assert encoder_mask(p, n, flat, figure)[row, column] == sees


@pytest.mark.parametrize("levels, flat", [([[4, 2, 1], [3, 3, 4]], False), ([[4], [2], [1]], False),
                                          ([[4], [2], [1]], True)])
def test_decoder_mask_equals_brute_force(levels, flat):
    p, n = 3, 4
    mask = decoder_mask(p, n, torch.tensor(levels), flat)
    assert mask.shape == (len(levels), n + len(levels[0]) * p, n + len(levels[0]) * p)
    for b, row, column in np.ndindex(*mask.shape):
        group, other = (row - n) // p, (column - n) // p                # negative: a code
        if flat:
            sees = other >= 0 or column < levels[b][0]
        elif group < 0:
            sees = column <= row
        else:
            sees = group == other if other >= 0 else column < levels[b][group]
        assert mask[b, row, column] == sees, (b, row, column)


def test_attention_equals_pytorchs():
    q, k, v = noise(3, 2, 4, 5, 8)
    for mask in (None, additive(causal_mask(5), q)):
        assert torch.allclose(attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------
# quantizer

def quantizer(codes=K, width=8):
    torch.manual_seed(0)
    vq = VectorQuantizer(codes, width)
    torch.nn.init.normal_(vq.codebook)
    vq.usage.fill_(1.0)                                                 # all alive
    return vq


def test_quantizer_finds_the_nearest_by_brute_force():
    vq, z = quantizer(), F.normalize(noise(50, 3, 8), dim=-1)
    quantized, codes, loss = vq(z)
    unit, table = z.double(), F.normalize(vq.codebook.detach(), dim=-1).double()
    assert torch.equal(codes, (unit[:, :, None] - table).norm(dim=-1).argmin(-1))
    assert torch.allclose(quantized.double(), table[codes], atol=1e-6)
    assert torch.allclose(loss.double(), 1.25 * (unit - table[codes]).square().mean(), rtol=1e-5)


def test_quantizer_passes_the_gradient_straight_through():
    vq, z, w = quantizer(), F.normalize(noise(5, 3, 8), dim=-1).requires_grad_(), noise(5, 3, 8, seed=1)
    (vq(z)[0] * w).sum().backward()
    assert torch.equal(z.grad, w) and vq.codebook.grad is None


def test_quantizer_is_float32_under_autocast():
    vq, z = quantizer(1024, 16), F.normalize(noise(200, 4, 16), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, codes, loss = vq(z)
    assert torch.equal(codes, vq(z)[1]) and torch.equal(quantized, vq(z)[0]) and loss.dtype == torch.float32


@torch.no_grad()
def test_encode_searches_in_float32_under_autocast():
    """encode() once kept its search in bf16, and gave other codes than forward()."""
    model, images = tiny_tokenizer(), noise(64, 3, 16, 16)
    model.quantizer = quantizer(1024)
    with torch.autocast("cpu", torch.bfloat16):
        codes = model.encode(images)
        vectors, trained_on = model.encode_vectors(images), model(images, torch.full((64, 1), N))[3]
    assert torch.equal(codes, trained_on) and torch.equal(codes, model.quantizer(vectors)[1])


@torch.no_grad()
def test_quantizer_revives_dead_codes_and_leaves_live_ones():
    vq, axes = quantizer(4), torch.eye(8)
    z = axes[:3].repeat(10, 1, 1) + 0.1 * noise(10, 3, 8)               # three clusters
    vq.codebook.copy_(torch.cat([axes[:3], -axes[:1]]))                 # each with its code, and one that none chooses
    for step in range(100):
        vq.update(F.normalize(z, dim=-1).flatten(0, 1), vq(F.normalize(z, dim=-1))[1].flatten())
        if vq.codebook[3, 0] != -1:
            break
    assert step == 58                                                   # 0.95^59 is the first below 5 %
    assert (F.normalize(z, dim=-1) == vq.codebook[3]).all(-1).any()     # it is one of the vectors now, and in use
    assert (vq(F.normalize(z, dim=-1))[1] == 3).any() and torch.equal(vq.codebook[:3], axes[:3])


@torch.no_grad()
def test_quantizer_starts_from_the_first_batch():
    torch.manual_seed(0)
    vq, z = VectorQuantizer(K, 8), F.normalize(noise(50, 8), dim=-1)
    torch.nn.init.normal_(vq.codebook)
    old = vq.codebook.clone()
    vq.update(z, torch.zeros(50, dtype=torch.long))                     # all chose code 0, which alone stays
    assert torch.equal(vq.codebook[0], old[0]) and (vq.codebook[1:, None] == z).all(-1).any(1).all()


# ------------------------------------------------------------------------------------------------------------------
# tokenizer

def test_patchify_is_in_raster_order_and_inverted():
    model, images = tiny_tokenizer(), noise(2, 3, 16, 16)
    assert torch.equal(model.patchify(images)[:, 5], images[:, :, 4:8, 4:8].flatten(1))
    assert torch.equal(model.unpatchify(model.patchify(images)), images)


@torch.no_grad()
def disturbed(model, j):
    """Vectors and codes of 32 images, before and after query j (from 0) is replaced."""
    images = noise(32, 3, 16, 16)
    before = model.encode_vectors(images), model.encode(images)
    model.queries[j] = 3 * noise(D, seed=5)
    return before, (model.encode_vectors(images), model.encode(images))


@pytest.mark.parametrize("j", [1, 3, N - 1])
def test_encoder_is_causal(j):
    """A reshape where a permute is meant, or patches that see queries, leak later queries into earlier codes."""
    (vectors, codes), (new_vectors, new_codes) = disturbed(tiny_tokenizer(), j)
    assert torch.equal(vectors[:, :j], new_vectors[:, :j]) and torch.equal(codes[:, :j], new_codes[:, :j])
    assert (vectors[:, j:] != new_vectors[:, j:]).any(-1).all()


def test_encoder_leaks_with_the_figures_mask():
    model = tiny_tokenizer()
    model.encoder_bias = encoder_mask(P, N, figure=True)
    (vectors, codes), (new_vectors, new_codes) = disturbed(model, N - 1)
    assert (vectors != new_vectors).any(-1).all() and (codes[:, :-1] != new_codes[:, :-1]).any()


@torch.no_grad()
def test_shorter_tokenizer_gives_a_prefix_of_the_codes():
    long, short, images = tiny_tokenizer(), tiny_tokenizer(num_tokens=4), noise(32, 3, 16, 16)
    state = long.state_dict()
    for name in ("queries", "code_pos", "level_embed"):
        state[name] = state[name][:4]
    short.load_state_dict(state)
    assert torch.equal(short.encode(images), long.encode(images)[:, :4])
    assert torch.allclose(short.encode_vectors(images), long.encode_vectors(images)[:, :4], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("flat", [False, True])
def test_decoder_level_ignores_later_codes(flat):
    model, codes = tiny_tokenizer(flat=flat), some_codes(4)
    for level in range(1, N + 1):
        later = torch.cat([codes[:, :level], (codes[:, level:] + 1) % K], 1)
        assert torch.equal(model.decode(codes, level), model.decode(later, level)), level
        own = codes + (torch.arange(N) == level - 1)
        assert not torch.equal(model.decode(codes, level), model.decode(own % K, level)), level
        assert torch.allclose(low_pass(model.decode(codes, level), model.edges[level - 1]), model.decode(codes, level),
                              atol=1e-5)                                # and it stays within its band


@torch.no_grad()
def test_decoder_levels_in_one_pass_equal_each_alone():
    model, codes = tiny_tokenizer(), some_codes(4)
    levels = torch.tensor([[6, 1], [6, 3], [6, 5], [2, 2]])
    together = model.decode_vectors(model.quantizer.vectors(codes), levels)             # (4, 2, 3, 16, 16)
    for b, g in np.ndindex(4, 2):
        alone = model.decode(codes[b:b + 1], levels[b, g].item())[0]
        assert torch.allclose(together[b, g], alone, atol=1e-5)
        assert torch.allclose(model.decode(codes, levels[:, g])[b], alone, atol=1e-5)


@torch.no_grad()
def test_flat_tokenizer_sees_all():
    (vectors, _), (new_vectors, _) = disturbed(tiny_tokenizer(flat=True), N - 1)
    assert (vectors != new_vectors).any(-1).all()                       # the last query reaches every vector
    model, codes, hidden = tiny_tokenizer(flat=True), some_codes(1), []
    model.decoder[-1].register_forward_hook(lambda module, inputs, output: hidden.append(output[0]))
    model.decode(codes), model.decode((codes + (torch.arange(N) == N - 1)) % K)
    assert (hidden[0] != hidden[1]).any(-1).all()                       # the last code reaches every position


def test_training_levels_and_loss_equal_their_definition():
    torch.manual_seed(0)
    drawn = draw_levels(500, N, False)
    assert (drawn[:, 0] == N).all() and set(drawn[:, 1].tolist()) == set(range(1, N))
    assert draw_levels(2, N, True).tolist() == [[N], [N]]
    images, recon, levels = noise(3, 3, 8, 8), noise(3, 2, 3, 8, 8, seed=1), torch.tensor([[4, 1], [4, 2], [4, 3]])
    expected = sum((recon[b, g] - low_pass(images[b:b + 1], 2 * levels[b, g].item())[0]).square().mean() / 3
                   for b in range(3) for g in range(2))
    losses = reconstruction_losses(recon, images, levels, band_edges(4, 8, 1), lambda a, b: (a - b).amax((1, 2, 3)))
    assert torch.allclose(losses["rec"], expected, rtol=1e-5)
    expected = sum((recon[b, g] - low_pass(images[b:b + 1], 2 * levels[b, g].item())[0]).max() / 3
                   for b in range(3) for g in range(2))
    assert torch.allclose(losses["lpips"], expected, rtol=1e-5)


def overfit(model, lr, steps, loss_of):
    """The losses of some steps of AdamW."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr), []
    for _ in range(steps):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_tokenizer_overfits_eight_images():
    torch.manual_seed(0)
    model = SpectralTokenizer(TokenizerConfig(16, 4, N, K, 8, 64, 2, 4, 1.0))
    images, passes = to_float(Shapes("train", 16).batch(torch.arange(8))[0]), []

    def loss():
        levels = draw_levels(8, N, False)
        if passes:
            model.quantizer.update(*passes[-1])                         # after the last step
        recon, vq_loss, z, codes = model(images, levels)
        passes.append((z.flatten(0, 1), codes.flatten()))
        return reconstruction_losses(recon, images, levels, model.edges)["rec"] + vq_loss
    losses = overfit(model, 2e-3, 300, loss)
    assert np.mean(losses[-10:]) < losses[0] / 12


# ------------------------------------------------------------------------------------------------------------------
# generator

@torch.no_grad()
def test_gpt_is_causal():
    model, codes, labels = tiny_gpt(), some_codes(4), torch.arange(4)
    logits = model(codes, labels)
    for i in range(N):
        new = model((codes + (torch.arange(N) == i)) % K, labels)
        assert torch.equal(new[:, :i + 1], logits[:, :i + 1])           # the logits at i are of code i
        assert (new[:, i + 1:] != logits[:, i + 1:]).any(-1).all()
    assert (model(codes, labels + 1) != logits).any(-1).all()


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 3])                               # positions in the first pass, then one each
def test_gpt_cached_logits_equal_uncached(first):
    model, codes, labels = tiny_gpt(), some_codes(4), torch.arange(4)
    x, modulations = model.embed(codes[:, :-1], labels), model.modulations(labels)
    caches = torch.zeros(2, 2, 4, 4, N, 8)
    logits = [model.logits(x[:, :first], modulations, caches, 0)]
    logits += [model.logits(x[:, t:t + 1], modulations, caches, t) for t in range(first, N)]
    assert torch.allclose(torch.cat(logits, 1), model(codes, labels), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 1, 4, N])
@pytest.mark.parametrize("cfg, schedule", [(1.0, "constant"), (0.0, "constant"), (3.0, "constant"), (3.0, "linear")])
def test_generate_equals_its_definition(cfg, schedule, kept):
    """The oracle runs the whole sequence again for each token, with and without the class."""
    model, labels, seeds, prefix = tiny_gpt(), torch.arange(8), torch.arange(8) + 100, some_codes(8)[:, :kept]
    expected = F.pad(prefix, (0, N - kept))
    for t in range(kept, N):
        c, u = (model(expected, y)[:, t] for y in (labels, torch.full_like(labels, 10)))
        s = 1 + (cfg - 1) * t / (N - 1) if schedule == "linear" else cfg
        expected[:, t] = sample(u + s * (c - u), uniforms(seeds, N)[:, t])
    for cache in (True, False):
        assert torch.equal(model.generate(labels, cfg, schedule, prefix=prefix, seeds=seeds, cache=cache), expected)


def test_guidance_one_is_none_and_zero_is_unconditional():
    model, labels, seeds = tiny_gpt(), torch.arange(10), torch.arange(10)
    none, unconditional = model.generate(labels, seeds=seeds), model.generate(torch.full_like(labels, 10), seeds=seeds)
    assert torch.equal(model.generate(labels, cfg=1, seeds=seeds), none)
    assert torch.equal(model.generate(labels, cfg=0, seeds=seeds), unconditional)
    assert not torch.equal(none, unconditional) and not torch.equal(none, model.generate(labels, cfg=4, seeds=seeds))


def test_guidance_schedules_equal_their_formulas():
    cosine = lambda r: 1 + (1 - math.cos(math.pi * r ** 2.75))
    for schedule, s in (("constant", lambda r: 3), ("linear", lambda r: 1 + 2 * r), ("power-cosine", cosine)):
        assert [guidance_scale(3.0, schedule, t, 17) for t in (0, 8, 16)] == pytest.approx([s(0), s(0.5), s(1)])
    assert guidance_scale(3.0, "linear", 0, 1) == 1                     # one token alone: no division by zero
    with pytest.raises(UserError, match="cubic"):
        guidance_scale(3.0, "cubic", 0, 17)


@torch.no_grad()
def test_generate_with_top_k_one_is_greedy():
    model, labels, codes = tiny_gpt(), torch.arange(8), torch.zeros(8, N, dtype=torch.long)
    for t in range(N):
        codes[:, t] = model(codes, labels)[:, t].argmax(-1)
    assert torch.equal(model.generate(labels, top_k=1), codes)
    assert torch.equal(model.generate(labels, temperature=0), codes)


def test_generate_stops_early_with_the_same_codes():
    model, labels, seeds, prefix = tiny_gpt(), torch.arange(8), torch.arange(8), some_codes(8)[:, :2]
    for kept in (None, prefix):
        whole = model.generate(labels, cfg=2, seeds=seeds, prefix=kept)
        for stop in range(1, N + 1):
            codes = model.generate(labels, cfg=2, seeds=seeds, prefix=kept, stop=stop)
            stop = max(stop, 0 if kept is None else 2)                  # what is given is never cut
            assert torch.equal(codes[:, :stop], whole[:, :stop]) and (codes[:, stop:] == 0).all()


def step_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution that one token is drawn from, code by code from its definition."""
    order, joint, kept = logits.argsort(descending=True).tolist(), 0.0, {}
    p = (logits.double() / temperature).softmax(-1)
    likeliest = order[:top_k or None]
    for code in likeliest:
        if joint / p[likeliest].sum() < top_p:
            kept[code], joint = p[code].item(), joint + p[code].item()
    return {code: x / joint for code, x in kept.items()}


@torch.no_grad()
@pytest.mark.parametrize("how", [dict(), dict(temperature=0.7), dict(top_k=3), dict(temperature=2.0, top_p=0.8),
                                 dict(temperature=1.5, top_k=4, top_p=0.9, cfg=2.0, cfg_schedule="linear")])
def test_sampled_sequences_are_distributed_as_the_model_says(how):
    """Chi-square of 20,000 sequences against the exact probability of each of the 125 there are."""
    torch.manual_seed(0)
    model, K, T, n = randomized(GPT(GPTConfig(1, 3, 5, 32, 2, 4))), 5, 3, 20_000
    filters = {k: v for k, v in how.items() if not k.startswith("cfg")}
    exact = {(): 1.0}
    for t in range(T):
        longer = {}
        for codes, probability in exact.items():
            sequence = torch.tensor([[*codes, *[0] * (T - t)]])
            c, u = (model(sequence, torch.tensor([label]))[0, t] for label in (0, 1))
            s = 1 + (how.get("cfg", 1) - 1) * t / (T - 1)
            for code, p in step_probabilities(u + s * (c - u), **filters).items():
                longer[*codes, code] = probability * p
        exact = longer
    codes = model.generate(torch.zeros(n, dtype=torch.long), seeds=torch.arange(n), **how)
    counts = torch.bincount((codes * torch.tensor([25, 5, 1])).sum(1), minlength=125).double()
    expected = torch.zeros(125, dtype=torch.float64)
    for (a, b, c), p in exact.items():
        expected[25 * a + 5 * b + c] = n * p
    assert expected.sum() == pytest.approx(n) and (counts[expected == 0] == 0).all()
    rare = (expected < 5) & (expected > 0)                              # chi-square wants 5 a bin: the rare share one
    observed, expected = (torch.cat([x[expected >= 5], x[rare].sum()[None]]) for x in (counts, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi2 = ((observed - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    assert len(expected) > 9 and torch.special.gammaincc(degrees, chi2 / 2) > 1e-3


def frequencies(logits, **how):
    """Share of each code over an even grid of random numbers."""
    grid = (torch.arange(20_000).double() + 0.5) / 20_000
    return torch.bincount(sample(logits.expand(20_000, -1), grid, **how), minlength=len(logits)) / 20_000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_frequencies_equal_probabilities(temperature):
    logits = 2 * noise(12)
    assert (frequencies(logits, temperature=temperature) - (logits / temperature).softmax(-1)).abs().max() < 1e-3


@pytest.mark.parametrize("how, kept", [
    (dict(top_k=2), [1, 3]), (dict(top_k=9), [0, 1, 2, 3, 4]), (dict(top_p=0.3), [1]), (dict(top_p=0.5), [1, 3]),
    (dict(top_p=0.9), [0, 1, 3, 4]), (dict(top_p=1e-9), [1]), (dict(top_k=2, top_p=0.6), [1])])
def test_sample_keeps_the_right_codes(how, kept):
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    expected = torch.zeros(5).index_copy(0, torch.tensor(kept), p[kept])
    assert (frequencies(p.log(), **how) - expected / expected.sum()).abs().max() < 1e-3


def test_uniforms_are_splitmix64():
    mask, gamma = 2 ** 64 - 1, 0x9E3779B97F4A7C15

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)
    assert mix(gamma) == 0xE220A8397B1DCDAF                             # the published first output of seed 0
    seeds = [0, 1, 7, 2 ** 32 + 1, 2 ** 62, -3]
    expected = [[(mix(mix(s & mask) + i * gamma & mask) >> 11) / 2 ** 53 for i in range(1, 6)] for s in seeds]
    assert uniforms(torch.tensor(seeds), 5).tolist() == expected


@torch.no_grad()
def test_seed_gives_the_same_image_in_any_batch():
    model, tokenizer = tiny_gpt(), tiny_tokenizer()
    labels, seeds = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([8, 9, 10, 11, 12])
    together = model.generate(labels, cfg=2, seeds=seeds)
    for order in ([2], [4, 2, 0], [1, 3]):
        codes = model.generate(labels[order], cfg=2, seeds=seeds[order])
        assert torch.equal(codes, together[order])
        assert torch.allclose(tokenizer.decode(codes), tokenizer.decode(together)[order], atol=1e-5)
    assert not torch.equal(together[1], together[3])                    # the same class, another seed


@pytest.mark.parametrize("width, depth, expected, tolerance", [
    (1024, 16, 309.6e6, 0.005), (1280, 20, 600e6, 0.1), (1536, 24, 1.0e9, 0.1), (1920, 30, 2.0e9, 0.1)])
def test_gpt_has_the_papers_sizes(width, depth, expected, tolerance):
    with torch.device("meta"):
        model = GPT(GPTConfig(1000, 64, 4096, width, depth, depth))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    preset = PRESETS[name]
    sizes = [preset["gpt"][k] or {"width": 1024, "heads": 16}[k] for k in ("width", "depth", "heads")]
    with torch.device("meta"):
        SpectralTokenizer(TokenizerConfig(**{f.name: preset[f.name] for f in fields(TokenizerConfig)}))
        GPT(GPTConfig(10, preset["num_tokens"], preset["codebook_size"], *sizes))


def test_gpt_overfits_eight_sequences():
    torch.manual_seed(0)
    model, codes, labels = GPT(GPTConfig(10, N, K, 64, 2, 4)), some_codes(8), torch.arange(8)
    losses = overfit(model, 3e-3, 100, lambda: F.cross_entropy(model(codes, labels).flatten(0, 1), codes.flatten()))
    assert losses[0] == pytest.approx(math.log(K), rel=0.1) and losses[-1] < 0.05
    assert torch.equal(model.eval().generate(labels, top_k=1), codes)


# ------------------------------------------------------------------------------------------------------------------
# data

def test_shapes_are_a_pure_function_of_seed_split_and_index():
    data = Shapes("train", 16)
    images, labels = data.batch(torch.arange(40))
    assert images.shape == (40, 3, 16, 16) and images.dtype == torch.uint8 and labels.tolist() == [*range(10)] * 4
    for i in (31, 7, 0):
        assert torch.equal(Shapes("train", 16).batch([i])[0][0], images[i])
    assert torch.equal(data.batch([39, 2, 17])[0], images[[39, 2, 17]])
    streams = [Shapes(split, 16, seed).batch(torch.arange(300))[0] for split in ("train", "val") for seed in (0, 1)]
    assert len(torch.cat(streams).flatten(1).unique(dim=0)) == 4 * 300


@pytest.mark.parametrize("n, batch_size", [(10, 4), (7, 7), (3, 8)])
def test_batches_are_permutations_and_pure(n, batch_size):
    batches = [batch_indices(n, batch_size, step, seed=3) for step in range(2 * n)]
    epochs = torch.cat(batches)[:2 * batch_size * n].view(-1, n)
    assert (epochs.sort(1).values == torch.arange(n)).all() and len(epochs.unique(dim=0)) > 1
    for step in (2 * n - 1, 3, 0):
        assert torch.equal(batch_indices(n, batch_size, step, seed=3), batches[step])
    assert not torch.equal(torch.cat([batch_indices(n, batch_size, s, 4) for s in range(2 * n)]), torch.cat(batches))


@pytest.mark.parametrize("name, folder, train, val, names, head", [
    ("cifar10", "cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin",
     "batches.meta.txt", 1),
    ("cifar100", "cifar-100-binary", ["train.bin"], "test.bin", "fine_label_names.txt", 2)])    # a coarse label first
def test_cifar_reads_the_official_layout(name, folder, train, val, names, head, tmp_path):
    root, rng = tmp_path / folder, np.random.default_rng(0)
    root.mkdir()
    records = rng.integers(0, 10, (4 * len(train), head + 3072), np.uint8)
    for f, part in zip(train + [val], [*np.split(records, len(train)), records[:2]]):
        part.tofile(root / f)
    (root / names).write_text("".join(f"name{i}\n" for i in range(10)) + "\n")
    for data_dir in (tmp_path, root):
        data = Cifar(name, "train", data_dir, 32)
        images, labels = data.batch([3, 1, 0, 2])
        assert (len(data), len(Cifar(name, "val", data_dir, 32))) == (len(records), 2)
        assert labels.tolist() == records[[3, 1, 0, 2], head - 1].tolist() and data.class_names[9] == "name9"
        assert images[0, 2, 5, 30] == records[3, head + 2 * 1024 + 5 * 32 + 30]         # planes, row by row
    (root / train[-1]).write_bytes(b"short")
    with pytest.raises(UserError, match="5 bytes"):
        Cifar(name, "train", tmp_path, 32)


def write_images(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (20, 24), (i, 100, 200)).save(folder / f"{i:03d}.png")
    return folder


def test_folder_split_is_disjoint_and_covers_all(tmp_path):
    write_images(tmp_path / "b", 30), write_images(tmp_path / "a" / "deeper", 10)
    train, val = open_folder(tmp_path, 16, 2)
    assert train.class_names == val.class_names == ["a", "b"] and len(val) == 2
    assert not set(train.files) & set(val.files)
    assert set(train.files) | set(val.files) == {str(f) for f in tmp_path.rglob("*.png")}
    assert [train.class_names[c] for c in train.labels] == [Path(f).relative_to(tmp_path).parts[0] for f in train.files]
    assert open_folder(tmp_path, 16, 1)[1].files == val.files
    images, labels = train.batch([5, 0])
    assert images.shape == (2, 3, 16, 16) and torch.equal(labels, train.labels[[5, 0]])
    assert images[0, :, 3, 3].tolist() == [int(Path(train.files[5]).stem), 100, 200]


def test_folder_with_train_and_val_must_agree(tmp_path):
    write_images(tmp_path / "train" / "cat", 3), write_images(tmp_path / "val" / "cat", 2)
    assert [len(part) for part in open_folder(tmp_path, 16, 1)] == [3, 2]
    write_images(tmp_path / "val" / "dog", 1)
    with pytest.raises(UserError, match="1 classes in train and 2 in val.*dog"):
        open_folder(tmp_path, 16, 1)


def test_folder_names_what_it_cannot_decode_and_stops_above_one_in_a_thousand(tmp_path, capsys):
    good, cut, text = write_images(tmp_path, 1) / "000.png", tmp_path / "cut.png", tmp_path / "text.png"
    cut.write_bytes(good.read_bytes()[:40])
    text.write_text("no image")
    data = Folder([[cut], [good] * 998 + [text]], ["a", "b"], 16, 1)
    images, labels = data.batch([0, 1, 0])
    assert torch.equal(images[0], images[1]) and torch.equal(images[2], images[1]) and labels.tolist() == [1, 1, 1]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "cut.png" in lines[0]                    # named once, however often it is drawn
    with pytest.raises(UserError, match="2 of 1000"):
        data.batch([999])


def test_center_crop_gives_the_middle_at_the_size():
    for size in ((16, 16), (33, 47), (1001, 37), (5, 9), (64, 33), (31, 17)):
        assert center_crop(Image.new("RGB", size), 16).size == (16, 16), size
    pixels = np.random.default_rng(0).integers(0, 256, (16, 48, 3), np.uint8)
    assert np.array_equal(np.array(center_crop(Image.fromarray(pixels), 16)), pixels[:, 16:32])


def test_training_crops_are_the_squares_they_say():
    x, y = np.meshgrid(np.arange(300), np.arange(200))
    image = Image.fromarray(np.stack([x * 255 // 299, y * 255 // 199, 0 * x], -1).astype(np.uint8))
    for scale, down, right in ((1.0, 0.3, 0.0), (1.125, 0.0, 1.0), (1.1, 0.5, 0.5)):
        crop, side = np.array(any_crop(image.copy(), 50, scale, down, right)).astype(float), 200 / scale
        left, top = (300 - side) * right, (200 - side) * down
        assert abs(crop[25, [0, -1], 0] - [255 / 299 * (left + o) for o in (side / 100, side * 0.99)]).max() < 2
        assert abs(crop[[0, -1], 25, 1] - [255 / 199 * (top + o) for o in (side / 100, side * 0.99)]).max() < 2


def test_odd_images_are_handled_or_named(tmp_path):
    """Red above blue, in every way that files have: what comes out is RGB, upright."""
    halves = Image.new("RGB", (40, 40), (255, 0, 0))
    halves.paste((0, 0, 255), (0, 20, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # "turn me a quarter clockwise"
    halves.rotate(90).save(tmp_path / "turned.png", exif=exif)
    halves.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    halves.quantize(2).save(tmp_path / "palette.png")
    halves.save(tmp_path / "plain.tif")
    Image.fromarray(np.array([[65535] * 40] * 20 + [[256] * 40] * 20, np.uint16)).save(tmp_path / "16-bit.png")
    halves.convert("L").save(tmp_path / "grey.png")
    clear = halves.convert("RGBA")
    clear.putalpha(Image.fromarray(np.array([[255] * 40] * 20 + [[0] * 40] * 20, np.uint8)))
    clear.save(tmp_path / "clear.png")
    expected = {"16-bit.png": ((255,) * 3, (1,) * 3), "grey.png": ((76,) * 3, (29,) * 3),
                "clear.png": ((255, 0, 0), (255,) * 3)}
    files = sorted(str(f) for f in tmp_path.iterdir())
    for crops in (None, torch.tensor([[1.0, 0, 0]] * len(files))):
        images, _ = Folder([files], ["a"], 16, 1).batch(range(len(files)), crops)
        for file, image in zip(files, images):
            upper, lower = expected.get(Path(file).name, ((255, 0, 0), (0, 0, 255)))
            found = torch.stack([image[:, 3, 8], image[:, 12, 8]]).float()
            assert (found - torch.tensor([upper, lower])).abs().max() <= 2, file
    with pytest.raises(ValueError, match="500 x 1 px"):
        upright_rgb(Image.new("RGB", (500, 1)))
    with pytest.raises(ValueError, match="floating"):
        upright_rgb(Image.new("F", (9, 9)))


@pytest.mark.parametrize("inside", ["", "Data/CLS-LOC"])
def test_imagenet_is_read_as_published(inside, tmp_path):
    for split, number in (("train", 3), ("val", 2)):
        for wnid in ("n02", "n01"):
            write_images(tmp_path / "ILSVRC" / inside / split / wnid, number)
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\nn03 more\n")
    args = train_tokenizer.parse_args(["--data", "imagenet", "--data-dir", f"{tmp_path}/ILSVRC", "--image-size", "16"])
    train, val = train_tokenizer.open_data(args)
    assert train.class_names == val.class_names == ["tench, Tinca tinca (n01)", "goldfish (n02)"]
    assert (len(train), len(val)) == (6, 4) and args.out == Path("out/imagenet")


# ------------------------------------------------------------------------------------------------------------------
# run helpers

def test_cost_counts_each_product_and_what_backward_keeps():
    """A linear layer's three products of 2 n^3, and a GPT's by hand; recomputing keeps less."""
    layer, x = torch.nn.Linear(8, 8, bias=False), noise(8, 8, seed=1).requires_grad_()
    assert cost(lambda: layer(x).sum(), layer) == (3 * 2 * 8 ** 3, 8 * 8 * 4)
    model, codes = tiny_gpt(), some_codes(1)
    macs = 2 * (N * 12 * D * D + 2 * N * N * D + 6 * D * D) + N * D * K + 2 * D * D     # blocks, AdaLN, head, norm
    flops, kept = cost(lambda: model(codes, torch.zeros(1, dtype=torch.long)).square().sum(), model)
    assert flops == 6 * macs
    recompute_blocks(model)
    again, less = cost(lambda: model(codes, torch.zeros(1, dtype=torch.long)).square().sum(), model)
    assert flops < again < 4 / 3 * flops and less < kept / 2


def test_recomputed_blocks_give_the_same_gradients():
    model, codes = tiny_gpt(), some_codes(3)
    other = copy.deepcopy(model)
    recompute_blocks(other)
    for m in (model, other):
        m(codes, torch.arange(3)).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters()))


def test_lr_at_equals_its_formula():
    args = Namespace(lr=2.0, warmup=10, hold=0.5, steps=110)
    assert [lr_at(s, args) for s in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])        # (step + 1) / warmup
    assert [lr_at(s, args) for s in (10, 30, 55)] == [2.0, 2.0, 2.0]
    assert [lr_at(s, args) for s in (82.5, 110, 200)] == pytest.approx([1.1, 0.2, 0.2])
    args.hold = 0.0
    assert lr_at(60, args) == pytest.approx(1.1)                        # halfway from warm-up to the end


def test_update_ema_equals_its_closed_form():
    model = torch.nn.BatchNorm1d(2)                                     # parameters, float buffers and an integer one
    ema, expected = copy.deepcopy(model), 0.0
    for step in range(30):
        torch.nn.init.constant_(model.bias, step)
        model.running_mean.fill_(step), model.num_batches_tracked.fill_(step)
        update_ema(ema, model, 0.6, step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.bias.tolist() == ema.running_mean.tolist() == pytest.approx([expected] * 2)
    assert ema.num_batches_tracked == 29


@pytest.mark.parametrize("model", [tiny_tokenizer(), tiny_gpt()])
def test_optimizer_holds_every_parameter_once(model):
    groups = make_optimizer(model, Namespace(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)).param_groups
    held = [id(p) for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters()}
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}


def test_codebook_use_by_hand():
    used, perplexity, by_position = codebook_use(torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1]]), 4)
    of = lambda *p: math.exp(-sum(x * math.log(x) for x in p))
    assert used == 0.5 and perplexity == pytest.approx(of(3 / 8, 5 / 8))
    assert by_position == pytest.approx([of(1 / 2, 1 / 2), of(1 / 4, 3 / 4)])


def test_effective_rank_by_hand():
    """A line 1, a cross 2, whatever their place; arms of 3 and 1 have shares 3/4 and 1/4; a point is no more than 1."""
    cross = torch.tensor([[1., 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert effective_rank(cross[:2] + 5) == pytest.approx(1) and effective_rank(cross - 7) == pytest.approx(2)
    assert effective_rank(cross * torch.tensor([3., 1, 1])) == pytest.approx(4 / 3 ** 0.75)
    assert effective_rank(cross[:1]) == 1


def test_log_does_without_git(tmp_path, monkeypatch):
    """Slim containers have no git: the run must start all the same."""
    monkeypatch.setenv("PATH", str(tmp_path))
    Log(tmp_path / "log.jsonl", Namespace(resume=False, device="cpu", rank=0, dry_run=False), tiny_gpt())


# ------------------------------------------------------------------------------------------------------------------
# checkpoints

def test_checkpoint_round_trip(tmp_path):
    model, path = tiny_tokenizer(), tmp_path / "tokenizer.pt"
    content = dict(config=vars(model.config), model=model.state_dict(), step=3)
    save_checkpoint(path, "tokenizer", **content)
    assert torch.load(path, weights_only=True)["step"] == 3 and list(tmp_path.iterdir()) == [path]
    assert not load_tokenizer(path).training and fingerprint(load_tokenizer(path)) == fingerprint(model)
    save_checkpoint(path, "tokenizer", ema=dict(model.state_dict(), queries=model.queries + 1), **content)
    assert torch.equal(load_tokenizer(path).queries, model.queries + 1)                 # the averaged weights win
    assert fingerprint(load_tokenizer(path)) != fingerprint(model)


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b[:100], lambda b: b[:len(b) // 2], lambda b: b[:-1], lambda b: b"hello world\n",
    lambda b: b"\x89PNG\r\n\x1a\n", lambda b: b"\x80\x02X\x03\x00\x00\x00\xcf\xcf\xcf."])
def test_checkpoint_that_is_damaged_is_told_in_one_line(damage, tmp_path):
    path = tmp_path / "tokenizer.pt"
    save_checkpoint(path, "tokenizer", model=tiny_tokenizer().state_dict())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"^[^\n]*is not a whole checkpoint[^\n]*$"):
        load_tokenizer(path)


def test_checkpoint_of_another_kind_or_format_or_none_is_told(tmp_path):
    path = tmp_path / "tokenizer.pt"
    save_checkpoint(path, "tokenizer", model={})
    with pytest.raises(UserError, match="holds a tokenizer of format 2, not a gpt"):
        load_gpt(path)
    with pytest.raises(UserError, match="absent.pt does not exist"):
        load_tokenizer(tmp_path / "absent.pt")
    torch.save(dict(kind="tokenizer", format=2, config=tmp_path), path)                 # a pickle that runs code
    with pytest.raises(UserError, match="not a whole checkpoint"):
        load_tokenizer(path)
    torch.save(dict(kind="tokenizer", format=99), path)
    with pytest.raises(UserError, match="format 99"):
        load_tokenizer(path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed\nat zip.cc:1")])
def test_save_that_fails_leaves_the_old_checkpoint(error, tmp_path, monkeypatch):
    path = tmp_path / "gpt.pt"
    save_checkpoint(path, "gpt", step=1)
    before = path.read_bytes()

    def half(content, target):
        Path(target).write_bytes(before[:100])
        raise error
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(FailedRun, match=r"^[^\n]*$"):
        save_checkpoint(path, "gpt", step=2)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------------------------
# metrics: literals made by other people's tools, on inputs rebuilt from numpy's frozen random streams

stream = np.random.RandomState


def weight(key, shape):
    """A plausible value for an entry of a network's state, from its name and shape alone."""
    z = stream(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(math.prod(shape)).reshape(shape)
    if key.endswith("running_var"):
        z = 1 + 0.25 * abs(z)
    elif key.endswith(("running_mean", ".bias")):
        z = 0.1 * z
    else:
        z = {1: 1 + 0.1 * z, 2: z / shape[-1] ** 0.5 * 2}.get(len(shape), z * (2 / math.prod(shape[1:]) or 1) ** 0.5)
    return torch.from_numpy(z.astype(np.float32))


def pictures(seed, n, h, w):
    """uint8 (n, 3, h, w): smooth waves and noise."""
    r, (y, x) = stream(seed), np.mgrid[0:h, 0:w]
    images = np.zeros((n, 3, h, w))
    for i in range(n):
        a, p, b = r.uniform(1, 6, (3, 2)), r.uniform(0, 6.28, (3, 2)), r.uniform(30, 220, 3)
        for c in range(3):
            wave = np.sin(a[c, 0] * 6.28 * x / w + p[c, 0]) * np.cos(a[c, 1] * 6.28 * y / h + p[c, 1])
            images[i, c] = b[c] + 60 * wave + r.standard_normal((h, w)) * 20
    return torch.from_numpy(np.rint(images).clip(0, 255).astype(np.uint8))


def correlated(seed, n, d, shift, scale):
    """float32 (n, d) features with a full covariance."""
    mix = stream(1000 + d).standard_normal((d, d)) / d ** 0.5
    return (shift + scale * (stream(seed).standard_normal((n, d)) @ mix) + 0.3).astype(np.float32)


def noisy(images, seed, strengths):
    """uint8 images with noise of a strength for each; the stream runs over NHWC."""
    n, c, h, w = images.shape
    noise = stream(seed).standard_normal((n, h, w, c)) * np.reshape(strengths, (-1, 1, 1, 1))
    return torch.from_numpy(np.rint(images.numpy() + noise.transpose(0, 3, 1, 2)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """(a file of Inception weights of the published names and shapes, the plain network with them)."""
    model = evaluate.InceptionV3()
    state = {k: weight(k, tuple(v.shape)) for k, v in model.state_dict().items() if not k.endswith("tracked")}
    model.load_state_dict(state, strict=False)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path, model


def test_inception_has_the_published_names_and_shapes(inception):
    shapes = json.dumps({k: list(v.shape) for k, v in inception[1].state_dict().items()}, sort_keys=True)
    assert hashlib.sha256(shapes.encode()).hexdigest()[:16] == "1932d991bb5cf880"


@pytest.mark.parametrize("fused", [False, True])
def test_inception_equals_torch_fidelitys(fused, inception):
    """torch-fidelity 0.4.0 in float64. Wrong pooling, epsilon, resize or layout move these by 1e-3 and more."""
    model = evaluate.load_inception(inception[0]) if fused else inception[1].train()
    pool, spatial, logits = (x.numpy() for x in model(pictures(103, 2, 64, 64)))
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 2048), (2, 2023), (2, 1008))
    for found, where, first, second, largest in (
            (pool, range(0, 2046, 341), [0.0, 0.02465052343904972, 0.004095542244613171, 0.0017090020701289177,
                                         0.4379909634590149, 0.3599598705768585],
             [0.0, 0.025310125201940536, 0.00450359471142292], 1.0578194856643677),
            (spatial, range(100, 2023, 401), [0.0, 0.0, 0.14552049338817596,
                                              0.0, 0.35728177428245544],
             [0.0, 0.0, 0.14166603982448578], 0.7943995594978333),
            (logits, range(0, 1008, 168), [-0.38744843006134033, 0.6327806115150452, -0.31324663758277893,
                                           0.021672382950782776, 0.09384988993406296, -0.49044209718704224],
             [-0.39106959104537964, 0.6247377395629883, -0.32684168219566345], 1.4881196022033691)):
        assert np.allclose(found[0, where[:len(first)]], first, rtol=0, atol=5e-6 * largest)
        assert np.allclose(found[1, where[:3]], second, rtol=0, atol=5e-6 * largest)
        assert abs(found).max() == pytest.approx(largest, rel=5e-6)


def test_tf1_resize_equals_tensorflows():
    expected = [[131.0, 124.40467834472656, 163.9632110595703, 166.1739044189453],
                [117.03009796142578, 149.71177673339844, 144.6067657470703, 158.03854370117188],
                [110.9899673461914, 139.04295349121094, 160.81356811523438, 179.06495666503906]]
    found = evaluate.tf1_resize(pictures(103, 1, 64, 64), 299)
    assert found.shape == (1, 3, 299, 299) and np.allclose(found[0, 0, :21:7, :28:7], expected, rtol=0, atol=1e-4)
    whole = pictures(5, 1, 299, 299)
    assert torch.equal(evaluate.tf1_resize(whole, 299), whole.float())


def moments(features, block=100):
    m = evaluate.Moments(features.shape[1])
    for part in torch.as_tensor(features).split(block):
        m.add(part)
    return m.finish("cpu")


def test_moments_equal_numpys():
    f = correlated(3, 250, 8, 5.0, 1.0).astype(np.float64)
    mu, sigma = moments(f)
    assert np.allclose(mu, f.mean(0), rtol=1e-12) and np.allclose(sigma, np.cov(f.T), rtol=1e-9)


@pytest.mark.parametrize("n1, n2, d, expected", [                       # pytorch-fid 0.3.0
    (500, 400, 64, 4.204492004929165), (1200, 1000, 256, 23.456267582217833)])
def test_frechet_distance_equals_pytorch_fids(n1, n2, d, expected):
    a, b = moments(correlated(1, n1, d, 0.0, 1.0)), moments(correlated(2, n2, d, 0.05, 1.1))
    assert evaluate.frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-6)
    assert evaluate.frechet_distance(*(x.numpy() for x in (*b, *a))) == pytest.approx(expected, rel=1e-6)
    assert abs(evaluate.frechet_distance(*a, *a)) < 1e-9 * a[1].trace()


def test_frechet_distance_of_commuting_covariances_by_hand():
    """Of low rank, too: sum of (sqrt(s1) - sqrt(s2))^2."""
    distance = evaluate.frechet_distance([1.0, 0, 0], np.diag([4.0, 0, 9]), [0, 0, 2.0], np.diag([1.0, 16, 0]))
    assert distance == pytest.approx(1 + 4 + 1 + 16 + 9)


def test_inception_score_equals_torch_fidelitys():
    logits = (stream(21).standard_normal((1003, 1008)) * 2.5).astype(np.float32)
    assert evaluate.inception_score(logits) == pytest.approx((14.753672271308714, 0), rel=1e-6)
    assert evaluate.inception_score(logits, 10) == pytest.approx((12.034158879046622, 0.5268761313770315), rel=1e-6)
    by_class = np.eye(4).repeat(5, 0) * 50
    assert evaluate.inception_score(by_class)[0] == pytest.approx(4)
    assert evaluate.inception_score(by_class, 4)[0] == pytest.approx(1)                 # sorted, and so meaningless


def test_precision_and_recall_equal_torch_fidelitys():
    fake, real = correlated(31, 600, 16, 0.1, 0.8), correlated(32, 500, 16, 0.0, 1.0)
    assert evaluate.precision_recall(real, fake) == pytest.approx((0.975, 0.532), abs=1 / 600)


def test_precision_and_recall_equal_brute_force():
    real, fake = stream(1).standard_normal((1100, 3)), stream(2).standard_normal((700, 3)) * 0.7 + 0.5
    distance = lambda a, b: np.sqrt(((a[:, None] - b) ** 2).sum(-1))
    inside = lambda points, centres: (distance(points, centres) <= np.sort(distance(centres, centres), 1)[:, 3]
                                      ).any(1).mean()
    assert evaluate.precision_recall(real, fake) == pytest.approx((inside(fake, real), inside(real, fake)), abs=2e-3)
    with pytest.raises(UserError, match="3 and 700"):
        evaluate.precision_recall(real[:3], fake)


def test_psnr_and_ssim_equal_scikit_images():
    a = pictures(7, 3, 24, 32)
    b = noisy(a, 8, (5, 20, 60))
    assert psnr(a, b).tolist() == pytest.approx([34.20717792136969, 22.375562612323634, 13.404340401028074], rel=1e-6)
    expected = [0.9896887801428584, 0.8542946714689168, 0.4204133453782313]
    assert evaluate.ssim(a, b).tolist() == pytest.approx(expected, rel=1e-6)
    assert psnr(a, a).tolist() == [math.inf] * 3 and evaluate.ssim(a, a).tolist() == pytest.approx([1, 1, 1])
    with pytest.raises(UserError, match="11 px"):
        evaluate.ssim(a[..., :10], b[..., :10])


@torch.no_grad()
def test_lpips_equals_its_value_when_it_matched_the_lpips_package():
    """By this class, the day it gave the lpips package's numbers (other weights, real images) to 1e-7."""
    model = LPIPS()
    for k, v in model.features.state_dict().items():
        v.copy_(weight(f"features.{k}", tuple(v.shape)))
    for i, w in enumerate(model.lin):
        w.copy_(weight(f"lin{i}.x", tuple(w.shape)).abs())
    a = pictures(9, 2, 32, 32)
    b = noisy(a, 10, (25, 25))
    assert model(to_float(a), to_float(b)).tolist() == pytest.approx([0.139215367, 0.167455415], rel=2e-6)
    assert model(to_float(a), to_float(a)).tolist() == [0, 0]


def test_lpips_has_a_gradient_where_all_features_are_zero():
    """A root's slope at 0 is infinite: black patches of a real network once made the loss's gradient nan."""
    model, image = LPIPS(), torch.zeros(1, 3, 32, 32, requires_grad=True)
    for v in model.features.parameters():
        torch.nn.init.zeros_(v)                                         # every feature is 0
    for w in model.lin:
        torch.nn.init.ones_(w)
    model(image, noise(1, 3, 32, 32)).sum().backward()
    assert torch.isfinite(image.grad).all()


@torch.no_grad()
def test_classifier_distance_is_that_of_unit_features():
    """Written out: the stem's features and each stage's, of unit length at each pixel."""
    model = randomized(Classifier(10, 16, (8, 16, 24)))
    def stages(x):
        maps = [model.stem(x)]
        for down, residual in zip(model.down, model.residual):
            x = down(maps[-1])
            maps.append(x + residual(x))
        return maps
    images = [to_float(pictures(i, 3, 16, 16)) for i in (1, 2)]
    expected = sum((F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2))
                   for x, y in zip(*map(stages, images)))
    distance = ClassifierDistance(model)
    assert torch.allclose(distance(*images), expected, rtol=1e-4) and expected.min() > 0.1
    assert distance(images[0], images[0]).tolist() == [0, 0, 0]
    assert torch.allclose(model(pictures(1, 3, 16, 16))[0], stages(images[0])[-1].mean((2, 3)), rtol=1e-4)


def test_adversarial_losses_equal_their_formulas():
    real, fake, means = noise(5, 7), noise(5, 7, seed=1), (0.3, -0.2)
    relu = lambda x: max(x, 0.0)
    r, f = real.flatten().tolist(), fake.flatten().tolist()
    assert hinge_loss(real, fake).item() == pytest.approx(
        (sum(relu(1 - x) for x in r) + sum(relu(1 + x) for x in f)) / 70, rel=1e-5)
    assert lecam_loss(real, fake, *means).item() == pytest.approx(      # real against the fakes' mean, and vice versa
        (sum(relu(x + 0.2) ** 2 for x in r) + sum(relu(0.3 - x) ** 2 for x in f)) / 35, rel=1e-5)
    critic = Discriminator().requires_grad_(False)
    assert critic(noise(2, 3, 64, 64)).shape == (2, 1, 8, 8)
    images = noise(2, 3, 32, 32)
    assert torch.allclose(critic(images)[1:], critic(images[1:]), atol=1e-5)        # an image's logits are its own


def test_download_keeps_no_file_that_is_wrong(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_bytes(b"weights")
    right, wrong = hashlib.sha256(b"weights").hexdigest(), hashlib.md5(b"others").hexdigest()
    with pytest.raises(UserError, match=f"not {wrong}.*do this"):
        download(source.as_uri(), target, wrong, "do this")
    assert not list(target.parent.iterdir())
    assert download(source.as_uri(), target, right, "").read_bytes() == b"weights"
    source.unlink()
    assert download(source.as_uri(), target, right, "") == target       # it is there: no second download
    target.write_bytes(b"weight")
    with pytest.raises(UserError, match="removed"):
        download(source.as_uri(), target, right, "")
    with pytest.raises(UserError, match="cannot download"):
        download(source.as_uri(), target, right, "")
    assert not list(target.parent.iterdir())


# ------------------------------------------------------------------------------------------------------------------
# the scripts, end to end

COMMON = "--steps 6 --batch-size 8 --width 32 --depth 2 --heads 4 --warmup 2 --eval-images 16"
FLAGS = {train_tokenizer: COMMON + " --image-size 16 --patch-size 4 --num-tokens 6 --codebook-size 32 --code-dim 8",
         train_gpt: COMMON + " --code-images 64", sample_script: "--seed 1", evaluate: ""}
TRAINING = pytest.mark.parametrize("script, kind", [(train_tokenizer, "tokenizer"), (train_gpt, "gpt")])


@pytest.fixture(scope="module", autouse=True)
def no_benchmark():
    """The scripts time matrix products to choose their dtype: here both are as fast, so float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer, "matmul_speed", lambda *_: 1e12)
        yield


def call(script, out, flags=""):
    """A script as from the command line, with pytest's own signal handlers put back."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    words = shlex.split(f"{FLAGS[script]} --device cpu --out {shlex.quote(str(out))} {flags}")
    try:
        run(script.main, script.parse_args(words))
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def error_of(capsys, script, out, flags="", code=2):
    """What a refused command prints on stderr: one line, after argparse's usage if that refused it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        call(script, out, flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == code and (len(lines) == 1 or lines[0].startswith("usage:"))
    return lines[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a whole tiny run. Tests that change it take a copy."""
    out = tmp_path_factory.mktemp("run") / "out"
    for script in (train_tokenizer, train_gpt, sample_script):
        call(script, out)
    return out


@pytest.fixture
def a_copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "out")


@torch.no_grad()
def test_scripts_run_end_to_end(trained):
    assert {f.name for f in trained.iterdir()} == {"tokenizer.pt", "gpt.pt", "codes-train.npy", "codes-val.npy",
                                                   "codes.json", "log-tokenizer.jsonl", "log-gpt.jsonl", "recon.png",
                                                   "samples.png"}
    tokenizer, (gpt, carried, names) = load_tokenizer(trained / "tokenizer.pt"), load_generator(trained / "gpt.pt")
    assert fingerprint(tokenizer) == fingerprint(carried) and names == list(SHAPES)
    assert gpt.config == GPTConfig(10, N, K, D, 2, 4)
    for split, sides in (("train", 2), ("val", 1)):
        codes = np.load(trained / f"codes-{split}.npy")
        data = Shapes(split, 16)
        images, labels = data.batch(train_tokenizer.pick(len(data), len(codes)))
        views = torch.stack([tokenizer.encode(to_float(x)) for x in (images, images.flip(-1))[:sides]], 1)
        assert len(codes) == {"train": 64, "val": 16}[split]
        assert np.array_equal(codes["codes"], views) and np.array_equal(codes["label"], labels)


def test_sample_draws_what_it_is_asked_for_from_gpt_pt_alone(trained, tmp_path):
    shutil.copy(trained / "gpt.pt", tmp_path)
    cell = 64 + 2                                                       # 16 px four times enlarged, and the gap
    for flags, name, rows, columns, head in (("", "samples", 10, 8, 2), ("--progressive", "progressive", 10, 4, 20),
                                             ("--classes 3 7 --num 6 --top-k 5", "samples", 2, 3, 2)):
        call(sample_script, tmp_path, flags)
        width, height = Image.open(tmp_path / f"{name}.png").size
        assert height == head + rows * cell and 0 < width - columns * cell < 100        # beside the class names


def test_sample_is_another_for_another_seed(a_copy):
    pictures = []
    for flags in ("--batch-size 64", "--batch-size 3", "--batch-size 3 --seed 2"):
        call(sample_script, a_copy, f"--num 7 {flags}")
        pictures.append(np.array(Image.open(a_copy / "samples.png")).astype(int))
    assert abs(pictures[0] - pictures[1]).max() <= 1 and abs(pictures[0] - pictures[2]).max() > 10


def cells(picture, head=20):
    """Pictures of a grid of 16 px images, four times enlarged: (rows, columns, 16, 16, 3)."""
    picture = np.array(picture.convert("RGB")).astype(int)
    left = picture.shape[1] % 66 if picture.shape[1] % 66 > 2 else 2
    rows = [picture[y:y + 64:4, left:] for y in range(head, picture.shape[0], 66)]
    return np.array([[row[:, x:x + 64:4] for x in range(0, row.shape[1], 66)] for row in rows])


@torch.no_grad()
def test_progressive_pictures_show_the_tokens_one_by_one(trained, tmp_path):
    shutil.copy(trained / "gpt.pt", tmp_path)
    gpt, tokenizer, _ = load_generator(tmp_path / "gpt.pt")
    labels = torch.tensor([3, 7])
    codes = gpt.generate(labels, cfg=2, seeds=sample_script.sample_seeds(1, 0, 2))
    for stop in (N, 3):
        call(sample_script, tmp_path, f"--progressive --gif --classes star heart --tokens {stop}")
        levels = train_tokenizer.spread_levels(stop)
        expected = [train_tokenizer.to_uint8(tokenizer.decode(codes, k)).permute(0, 2, 3, 1) for k in levels]
        strip = cells(Image.open(tmp_path / "progressive.png"))
        assert strip.shape[:2] == (2, len(levels)) and abs(strip - torch.stack(expected, 1).numpy()).max() <= 1
        with Image.open(tmp_path / "progressive.gif") as gif:
            shown = 0
            for i in range(gif.n_frames):                               # equal frames are one, shown for longer
                gif.seek(i)
                shown += gif.info["duration"]
            assert shown == 100 * (stop - 1) + 2000 and gif.info["loop"] == 0 and 1 < gif.n_frames <= stop
            assert abs(cells(gif)[:, 0] - strip[:, -1]).mean() < 8      # a GIF has 256 colours


@torch.no_grad()
@pytest.mark.parametrize("keep", [2, N])
def test_upscale_keeps_the_first_tokens_and_samples_the_others(keep, trained, tmp_path):
    shutil.copy(trained / "gpt.pt", tmp_path)
    gpt, tokenizer, _ = load_generator(tmp_path / "gpt.pt")
    original = Shapes("val", 16).batch([3])[0]
    Image.fromarray(original[0].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    codes = tokenizer.encode(to_float(original))
    for flags, label, seed in (("", 10, 1), ("--classes star --seed 4", 3, 4)):
        call(sample_script, tmp_path, f"--upscale {tmp_path / 'image.png'} --keep {keep} {flags}")
        row = cells(Image.open(tmp_path / "upscale.png"))[0]
        n = len(row) - 2
        assert n == (8 if keep < N else 1) and np.array_equal(row[0], original[0].permute(1, 2, 0))
        sampled = gpt.generate(torch.full((n,), label), cfg=2, prefix=codes[:, :keep].expand(n, -1),
                               seeds=sample_script.sample_seeds(seed, 0, n))
        expected = torch.cat([tokenizer.decode(codes, keep), tokenizer.decode(sampled)])
        assert abs(row[1:] - train_tokenizer.to_uint8(expected).permute(0, 2, 3, 1).numpy()).max() <= 1
        assert (sampled[:, :keep] == codes[:, :keep]).all() and len(sampled.unique(dim=0)) == n


def npz_run(out, name, flags="", **how):
    return start(sample_script, out, f"--npz {out / name} --num 32 --overwrite {flags}", **how)


def test_npz_is_the_same_for_any_batch_processes_and_interruption(a_copy):
    """Byte for byte. A stream or a label of another image would show; for rounding see the test after this one."""
    for name, flags, ranks in (("32.npz", "--batch-size 32", 1), ("5.npz", "--batch-size 5", 1),
                               ("ranks.npz", "--batch-size 5", 2)):
        finish(npz_run(a_copy, name, flags, ranks=ranks))
    command = f"--npz {a_copy / 'killed.npz'} --num 32 --batch-size 2"
    process, part = start(sample_script, a_copy, command), a_copy / "killed.npz.part"
    done = lambda: (np.load(part, mmap_mode="r")["label"] < 10).sum() if part.exists() else 0
    wait_for(lambda: done() >= 8, process)
    process.kill()
    process.communicate()
    half = np.load(part)
    assert 8 <= done() < 32 and not (a_copy / "killed.npz").exists()
    finish(start(sample_script, a_copy, command))
    whole = (a_copy / "32.npz").read_bytes()
    for name in ("5", "ranks", "killed"):
        assert (a_copy / f"{name}.npz").read_bytes() == whole, name
    kept = half["label"] < 10
    assert np.array_equal(half["image"][kept], np.load(a_copy / "32.npz")["arr_0"][kept]) and not part.exists()


@pytest.mark.skipif("GenuineIntel" not in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else True,
                    reason="MKL rounds alike for all shapes on Intel's CPUs only")
def test_matrix_products_round_alike_for_any_batch_and_threads(trained):
    """Without MKL's strict mode a code flips once in some 100,000: rare enough for a test of images to miss."""
    code = f"""
import torch, torch.nn.functional as F, sample
sample.load_models(sample.parse_args(["--device", "cpu", "--out", {str(trained)!r}]))
x, w = torch.randn(40, 1024), torch.randn(512, 1024)
torch.set_num_threads(2)
whole = F.linear(x, w)
for threads in (1, 2):
    torch.set_num_threads(threads)
    assert all(torch.equal(F.linear(x[i:i + n], w), whole[i:i + n]) for i in (0, 3) for n in (1, 2, 5, 16, 37))"""
    environment = {k: v for k, v in os.environ.items() if k != "MKL_CBWR"}
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, check=True)


@torch.no_grad()
def test_npz_is_as_adm_lays_it_out(a_copy, capsys):
    path = a_copy / "samples.npz"
    call(sample_script, a_copy, f"--npz {path} --num 33 --classes ring 2 star --cfg 1.5")
    gpt, tokenizer, _ = load_generator(a_copy / "gpt.pt")
    with np.load(path) as file:
        images, labels = file["arr_0"], torch.from_numpy(file["arr_1"])
    assert images.dtype == np.uint8 and images.shape == (33, 16, 16, 3) and labels.dtype == torch.int64
    assert torch.bincount(labels).tolist() == [0, 0, 11, 11, 0, 11] and (labels.diff() < 0).any()
    codes = gpt.generate(labels, cfg=1.5, seeds=sample_script.sample_seeds(1, 0, 33))
    assert abs(images - train_tokenizer.to_uint8(tokenizer.decode(codes)).permute(0, 2, 3, 1).int().numpy()).max() <= 1
    note = json.loads((a_copy / "samples.npz.json").read_text())
    assert note["cfg"] == 1.5 and note["classes"] == [5, 2, 3] and note["gpt"] == fingerprint(gpt) and note["seed"] == 1
    assert evaluate.read_npz(path)[0] == 33
    line = error_of(capsys, sample_script, a_copy, f"--npz {path} --num 33")
    assert "samples.npz exists: --overwrite replaces it" in line
    path.rename(a_copy / "samples.npz.part")                            # as if stopped
    line = error_of(capsys, sample_script, a_copy, f"--npz {path} --num 33 --classes ring 2 star --cfg 3")
    assert "tells of cfg 1.5, this run has cfg 3.0" in line


def test_classes_are_found_by_number_name_wnid_or_part():
    names = ["tench, Tinca tinca (n01440764)", "tabby, tabby cat (n02123045)", "tiger cat (n02123159)", "dog, crane",
             "crane", "catamaran (n02981792)"]
    for word, found in (("0", 0), ("tinca TINCA", 0), ("n02123045", 1), ("tiger", 2), ("tama", 5), ("tabby", 1),
                        ("n0298", 5)):
        assert sample_script.find_class(word, names) == found
    for word, told in (("crane", "'crane' fits 2 classes (3 dog, crane; 4 crane)"), ("cat", "fits 3 classes"),
                       ("tenhc", "no class is named 'tenhc'; nearest: 0 tench, Tinca tinca (n01440764)"),
                       ("zzzz", "nearest: none: --list-classes shows all 6"), ("6", "class 6 is outside 0 .. 5")):
        with pytest.raises(UserError, match=re.escape(told)):
            sample_script.find_class(word, names)


def test_classes_are_listed(trained, capsys):
    call(sample_script, trained, "--list-classes")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [[str(c), name] for c, name in enumerate(SHAPES)]


def test_guidance_curves_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        sample_script.parse_args(["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert "linear 1.00 1.25 1.50 1.75 2.00; power-cosine 1.00 1.00 1.05 1.43 2.00" in text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")])
def test_lack_of_memory_names_the_remedy(error, trained, capsys, monkeypatch):
    def generate(*args, **how):
        raise error
    monkeypatch.setattr(GPT, "generate", generate)
    line = error_of(capsys, sample_script, trained, "--batch-size 20", code=1)
    assert "out of memory with --batch-size 20: take a smaller one" in line and "allocate" in line


@TRAINING
@pytest.mark.parametrize("during", ["a step", "a save"])
def test_resume_is_exact(script, kind, during, trained, a_copy, monkeypatch):
    """A run stopped by SIGTERM in its third step, or in the save before it, and resumed ends bit for bit where an
    uninterrupted one does."""
    path, seed_step, save = a_copy / f"{kind}.pt", script.seed_step, torch.save
    path.unlink()

    def stop():
        assert callable(signal.getsignal(signal.SIGTERM))               # or the signal would end pytest
        os.kill(os.getpid(), signal.SIGTERM)

    def stop_in_step(seed, step):
        seed_step(seed, step)
        if during == "a step" and step == 2:
            stop()

    def stop_in_save(content, target):
        if during == "a save" and content["step"] == 2:
            Path(target).write_bytes(b"half a file")
            stop()
        save(content, target)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(script, "seed_step", stop_in_step)
        patch.setattr(torch, "save", stop_in_save)
        call(script, a_copy, "--save-every 2")
    assert e.value.code == 1 and torch.load(path, weights_only=True)["step"] == 3
    torch.manual_seed(12345)                                            # whatever state the new process is in
    call(script, a_copy, "--resume")
    assert_same(trained / path.name, path)


def start(script, out, flags="", ranks=1, common=None):
    """A script as a process of its own, or as several under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--"] if ranks > 1 else []
    common = FLAGS[script] if common is None else common
    words = shlex.split(f"{common} --device cpu --dtype float32 --out {shlex.quote(str(out))} {flags}")
    return subprocess.Popen([sys.executable, *launcher, script.__file__, *words], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))


def finish(process, code=0):
    text = process.communicate(timeout=300)[0]
    assert process.returncode == code, text
    return text


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def assert_same(path, other, tolerance=0.0):
    """Two checkpoints hold the same weights, averages, moments and codebook statistics, and did as many steps."""
    a, b = (torch.load(f, weights_only=True) for f in (path, other))
    assert a["step"] == b["step"] and a.keys() == b.keys()
    for name in {"model", "ema", "optimizer", "critic", "critic_optimizer"} & a.keys():
        flat = [{k: v for part in ([c[name]] if "state" not in c[name] else c[name]["state"].items()) for k, v in (
                 part.items() if isinstance(part, dict) else {f"{part[0]}.{k}": v for k, v in part[1].items()}.items())}
                for c in (a, b)]
        assert flat[0].keys() == flat[1].keys()
        worst = max((x.double() - flat[1][k].double()).abs().max().item() for k, x in flat[0].items())
        # Adam's first steps are as large for a gradient that is all rounding: some of the critic's are
        assert worst <= tolerance * (20 if "critic" in name else 1), (name, worst)


@TRAINING
def test_ranks_and_passes_train_as_one_process_does(script, kind, a_copy, tmp_path):
    """Adversarial loss and codebook statistics included; batches, levels, crops and label drops are the same."""
    flags = "--steps 20 --log-every 1 --overwrite" + (" --gan 0.5 --gan-start 12" if kind == "tokenizer" else "")
    runs = {f"{ranks} x {micro}": shutil.copytree(a_copy, tmp_path / f"{ranks}x{micro}")
            for ranks, micro in ((1, 8), (1, 4), (2, 4), (2, 2))}
    processes = [start(script, out, f"{flags} --micro-batch {name[4:]}", int(name[0])) for name, out in runs.items()]
    for process in processes:
        finish(process)
    first = runs.pop("1 x 8")
    logs = lambda out: [r for r in map(json.loads, (out / f"log-{kind}.jsonl").read_text().splitlines()) if "ms" in r]
    for name, out in runs.items():
        assert_same(first / f"{kind}.pt", out / f"{kind}.pt", 1e-5)
        assert len(logs(out)) == 20
        for one, other in zip(logs(first), logs(out)):
            for term in {"loss", "rec", "vq", "gan", "critic", "bits", "accuracy", "used", "norm"} & one.keys():
                assert other[term] == pytest.approx(one[term], rel=1e-5, abs=1e-5), (name, one["step"], term)


@TRAINING
def test_killed_run_resumes_exactly(script, kind, trained, tmp_path):
    flags = "--steps 60 --save-every 4 --keep 2" + (" --gan 0.5 --gan-start 5" if kind == "tokenizer" else "")
    whole, killed = (shutil.copytree(trained, tmp_path / name, ignore=shutil.ignore_patterns(f"{kind}.pt"))
                     for name in ("whole", "killed"))
    uninterrupted, process = start(script, whole, flags), start(script, killed, flags)
    wait_for((killed / f"{kind}.pt").exists, process)
    process.kill()                                                      # between two steps, in one, or in a save
    process.communicate()
    assert torch.load(killed / f"{kind}.pt", weights_only=True)["step"] in range(4, 60, 4)
    resumed = start(script, killed, f"{flags} --resume")
    finish(uninterrupted), finish(resumed)
    assert_same(whole / f"{kind}.pt", killed / f"{kind}.pt")
    assert sorted(f.name for f in killed.glob(f"{kind}-*")) == [f"{kind}-0000056.pt", f"{kind}-0000060.pt"]
    assert_same(killed / f"{kind}-0000060.pt", killed / f"{kind}.pt")


@TRAINING
def test_stopped_ranks_save_together_and_resume_exactly(script, kind, trained, tmp_path):
    whole, stopped = (shutil.copytree(trained, tmp_path / name, ignore=shutil.ignore_patterns(f"{kind}.pt"))
                      for name in ("whole", "stopped"))
    flags = "--steps 150 --log-every 1 --batch-size 8" + (" --zero" if kind == "gpt" else "")
    log = stopped / f"log-{kind}.jsonl"
    log.unlink()
    uninterrupted, process = start(script, whole, flags, 2), start(script, stopped, flags, 2)
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3, process)
    process.send_signal(signal.SIGTERM)                                 # to torchrun, which passes it on
    assert "SIGTERM after step" in process.communicate(timeout=60)[0]
    assert torch.load(stopped / f"{kind}.pt", weights_only=True)["step"] < 150
    finish(uninterrupted), finish(start(script, stopped, f"{flags} --resume", 2))
    assert_same(whole / f"{kind}.pt", stopped / f"{kind}.pt")


def test_killed_encoding_goes_on_where_it_was(trained, tmp_path):
    flags = "--code-images 3000 --steps 1"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        out.mkdir(), shutil.copy(trained / "tokenizer.pt", out)
    part = killed / "codes-train.npy.part"
    done = lambda: (np.load(part, mmap_mode="r")["label"] != train_gpt.UNSEEN).sum()
    process = start(train_gpt, killed, flags)
    wait_for(lambda: part.exists() and done() > 200, process)
    process.kill(), process.communicate()
    before = done()
    assert 200 < before < 3000 and not (killed / "codes-train.npy").exists()
    finish(start(train_gpt, whole, flags)), finish(start(train_gpt, killed, flags, 2))  # and two ranks give the same
    codes = [np.load(out / "codes-train.npy") for out in (whole, killed)]
    assert np.array_equal(*codes) and not part.exists() and (codes[0]["label"] < 10).all()


def test_finetuned_decoder_keeps_the_codes(trained, tmp_path, capsys):
    source, out = trained / "tokenizer.pt", tmp_path / "out"
    call(train_tokenizer, out, f"--finetune-decoder {source} --image-size 99")          # sizes are the file's
    old, new = load_tokenizer(source), load_tokenizer(out / "tokenizer.pt")
    images = to_float(Shapes("val", 16).batch(range(20))[0])
    assert torch.equal(old.encode(images), new.encode(images)) and code_fingerprint(old) == code_fingerprint(new)
    assert fingerprint(old) != fingerprint(new)
    for (name, a), b in zip(old.named_parameters(), new.parameters()):
        assert torch.equal(a, b) == (name.split(".")[0] not in old.decoder_parts), name
    shutil.copy(trained / "gpt.pt", out)
    pictures = []
    for flags in ("", f"--tokenizer {source}"):
        call(sample_script, out, f"--num 4 --tokenizer {out / 'tokenizer.pt'} {flags}")
        pictures.append(np.array(Image.open(out / "samples.png")).astype(int))
    assert abs(pictures[0] - pictures[1]).max() > 0
    call(train_tokenizer, out, "--resume --steps 9")                    # still the decoder alone
    assert code_fingerprint(load_tokenizer(out / "tokenizer.pt")) == code_fingerprint(old)
    line = error_of(capsys, train_tokenizer, out, "--resume --steps 12 --finetune-decoder ''")
    assert "resume with the flags of its start" in line


@TRAINING
def test_dry_run_plans_and_writes_nothing(script, kind, tmp_path, capsys):
    call(script, tmp_path / "out", "--dry-run --steps 1000 --batch-size 64 --micro-batch 4 --tflops 1 --gpus 2")
    text = capsys.readouterr().out
    plan = dict(re.findall(r"^  (\w+) +(.*)$", text[text.index("the plan"):], re.M))
    assert list(plan) == ["parameters", "tokens", "batch", "steps", "compute", "memory", "time"]
    gflop, total = (float(x) for x in re.findall(r"([\d.e+]+) G?FLOP", plan["compute"]))
    assert total == pytest.approx(gflop * 1e9 * 64000, rel=0.01) and "step 000001/001000 | loss" in text
    assert plan["batch"] == "64 images, 32 on each of 2 GPUs" and not (tmp_path / "out").exists()


@TRAINING
def test_run_does_not_replace_a_checkpoint_unasked(script, kind, a_copy, capsys):
    path = a_copy / f"{kind}.pt"
    before = path.read_bytes()
    for flags, message in (("", "--resume goes on from it, --overwrite replaces it"), ("--resume", "6 steps"),
                           ("--resume --overwrite", "choose one"), ("--resume --steps 9 --width 64", "width")):
        line = error_of(capsys, script, a_copy, flags)
        assert line.startswith("error: ") and message in line and path.read_bytes() == before
    call(script, a_copy, "--overwrite --seed 5")
    assert path.read_bytes() != before


def test_codes_of_another_tokenizer_are_refused(a_copy, capsys):
    checkpoint = torch.load(a_copy / "tokenizer.pt", weights_only=True)
    checkpoint["ema"]["patch_pos"] += 1
    torch.save(checkpoint, a_copy / "tokenizer.pt")
    old, new = (code_fingerprint(m) for m in (load_generator(a_copy / "gpt.pt")[1],
                                              load_tokenizer(a_copy / "tokenizer.pt")))
    line = error_of(capsys, train_gpt, a_copy, "--resume --steps 9")    # those that the generator learned
    assert line.startswith("error: ") and old in line and new in line and "--overwrite" in line
    (a_copy / "gpt.pt").unlink()
    line = error_of(capsys, train_gpt, a_copy)                          # those in the cache
    assert line.startswith("error: ") and old in line and new in line and "codes.json" in line
    call(train_gpt, a_copy, "--overwrite")
    assert code_fingerprint(load_generator(a_copy / "gpt.pt")[1]) == new


def test_training_uses_the_mirror_images(trained, a_copy):
    codes = np.load(a_copy / "codes-train.npy", mmap_mode="r+")
    codes["codes"][:, 1] = (codes["codes"][:, 1] + 1) % K
    codes.flush()
    (a_copy / "gpt.pt").unlink()
    call(train_gpt, a_copy)
    assert not torch.equal(load_gpt(a_copy / "gpt.pt").pos, load_gpt(trained / "gpt.pt").pos)


@pytest.mark.parametrize("drop, untouched", [(0, slice(10, 11)), (1, slice(0, 10))])
def test_dropped_labels_train_the_row_without_a_class(drop, untouched, a_copy):
    call(train_gpt, a_copy, f"--overwrite --label-drop {drop}")
    torch.manual_seed(0)
    start, end = GPT(GPTConfig(10, N, K, D, 2, 4)), torch.load(a_copy / "gpt.pt", weights_only=True)["model"]
    same = (start.class_embed.weight == end["class_embed.weight"]).all(1)
    assert same[untouched].all() and same.sum() == len(same[untouched])


@pytest.mark.parametrize("script, flags, message", [
    (train_tokenizer, "--data {tmp}/absent", "absent is not a folder"),
    (train_tokenizer, "--data {tmp}/classes", "empty has 0 images"),
    (train_tokenizer, "--data {tmp}/classes/full", "1 image"),
    (train_tokenizer, "--image-size 30", "image side 30 is not divisible by patch side 4"),
    (train_tokenizer, "--heads 5", "width 32 is not divisible by 5 heads"),
    (train_tokenizer, "--num-tokens 257", "257 tokens for the 256 frequencies"),
    (train_tokenizer, "--resume", "nothing to resume"),
    (train_tokenizer, "--steps 0", "--steps is 0"),
    (train_tokenizer, "--patch-size 0", "patch"),
    (train_tokenizer, "--num-tokens 0", "tokens"),
    (train_tokenizer, "--device cuda:99", "cuda:99"),
    (train_tokenizer, "--out {tmp}/classes/full/000.png", "000.png"),
    (train_gpt, "", "tokenizer.pt does not exist"),
    (train_gpt, "--out {tmp}/broken-tokenizer.pt", "tokenizer.pt is not a whole checkpoint"),
    (train_gpt, "--out {tmp}/broken-codes-train.npy", "codes-train.npy is not the file it should be"),
    (train_gpt, "--out {tmp}/broken-codes.json", "codes.json tells of tokenizer None"),
    (train_gpt, "--out {trained} --overwrite --views ten-crop", "crops image files, shapes has none"),
    (train_tokenizer, "--data imagenet --data-dir {tmp}/classes", "classes has no train folder"),
    (train_tokenizer, "--batch-size 7 --micro-batch 2", "7 images of --batch-size 7, no multiple of --micro-batch 2"),
    (train_tokenizer, "--micro-batch 0", "--micro-batch is 0"),
    (train_tokenizer, "--finetune-decoder {tmp}/absent.pt", "absent.pt does not exist"),
    (train_tokenizer, "--finetune-decoder {tmp}/out/tokenizer.pt", "would replace itself"),
    (train_tokenizer, "--perceptual 1 --vgg {tmp}/classes/full/000.png --lpips-weights {tmp}/classes/full/000.png",
     "are not VGG16's and LPIPS' weights"),
    (sample_script, "--out {trained} --tokenizer {tmp}/other.pt", "makes codes"),
    (sample_script, "", "gpt.pt does not exist"),
    (sample_script, "--out {tmp}/broken-gpt.pt", "gpt.pt is not a whole checkpoint"),
    (sample_script, "--out {trained} --classes 10", "class 10 is outside 0 .. 9, the model's 10 classes"),
    (sample_script, "--out {trained} --classes 3 -1", "class -1 is outside 0 .. 9"),
    (sample_script, "--out {trained} --classes rings", "no class is named 'rings'; nearest: 5 ring; 2 triangle: "),
    (sample_script, "--out {trained} --classes star cr", "'cr' fits 2 classes (4 cross; 6 crescent)"),
    (sample_script, "--out {trained} --tokens 7", "--tokens is 7, and there are 1 .. 6 tokens"),
    (sample_script, "--out {trained} --upscale {tmp}/classes/full/000.png --keep 7", "--keep is 7"),
    (sample_script, "--out {trained} --upscale {tmp}/classes/full/000.png --keep 0", "--keep is 0"),
    (sample_script, "--out {trained} --upscale {tmp}/other.pt", "other.pt as an image"),
    (sample_script, "--out {trained} --upscale {tmp}/absent.png", "absent.png"),
    (sample_script, "--out {trained} --keep 3", "--keep is of --upscale"),
    (sample_script, "--out {trained} --progressive --npz {tmp}/a.npz", "not allowed with"),
    (sample_script, "--out {trained} --npz {tmp}/absent/a.npz", "absent is not a folder"),
    (sample_script, "--out {trained} --top-p 0", "--top-p is 0")])
def test_bad_input_is_told_in_one_line(script, flags, message, trained, tmp_path, capsys):
    write_images(tmp_path / "classes" / "full", 1), (tmp_path / "classes" / "empty").mkdir()
    for name in ("tokenizer.pt", "gpt.pt", "codes-train.npy", "codes.json"):
        folder = tmp_path / f"broken-{name}"
        folder.mkdir()
        shutil.copy(trained / "tokenizer.pt", folder), shutil.copy(trained / "codes.json", folder)
        (folder / name).write_bytes((trained / name).read_bytes()[:1500])
    (tmp_path / "broken-codes.json" / "codes.json").write_text("{}")
    other = torch.load(trained / "tokenizer.pt", weights_only=True)
    other["ema"]["queries"] += 1
    torch.save(other, tmp_path / "other.pt")
    line = error_of(capsys, script, tmp_path / "out", flags.format(tmp=tmp_path, trained=trained))
    assert "error: " in line and message in line and not list((tmp_path / "out").glob("*.pt"))


# ------------------------------------------------------------------------------------------------------------------
# evaluate.py, end to end

@pytest.fixture(scope="module")
def judged(trained, tmp_path_factory):
    """The tiny run with a classifier of its 16 px shapes, trained for a few seconds."""
    out = shutil.copytree(trained, tmp_path_factory.mktemp("judged") / "out")
    args = Namespace(seed=0, device="cpu", data="shapes", image_size=16, out=out, rank=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer.train_classifier, "__defaults__", (150, 64))
        load_classifier(out / "classifier.pt", JUDGE, Shapes("train", 16), Shapes("val", 16), args)
    return out


def last_record(out):
    return json.loads((out / "evaluations.jsonl").read_text().splitlines()[-1])


def numpy_features(judged, images):
    """(features, logits) of the run's classifier, and numpy's mean and covariance of the features."""
    args = Namespace(device="cpu", data="shapes", image_size=16, out=judged, rank=0)
    features, _, logits = load_classifier(judged / "classifier.pt", JUDGE, Shapes("train", 16), None, args)(images)
    f = features.double().numpy()
    return logits, (f.mean(0), np.cov(f.T))


def test_classifier_learns_the_classes_and_is_kept(judged, capsys):
    saved = torch.load(judged / "classifier.pt", weights_only=True)
    images, labels = Shapes("val", 16).batch(torch.arange(2000))
    accuracy = (numpy_features(judged, images)[0].argmax(-1) == labels).double().mean().item()
    assert accuracy > 0.7 and accuracy == pytest.approx(saved["accuracy"], abs=0.03)    # of the first 10,000
    assert f"test accuracy {saved['accuracy']:.1%}" in capsys.readouterr().out


def test_perceptual_loss_takes_a_classifier_of_the_data(tmp_path, capsys, monkeypatch):
    """--perceptual-net: trained once, then read; never the judge's."""
    monkeypatch.setattr(train_tokenizer.train_classifier, "__defaults__", (2, 8))
    net, flags = tmp_path / "new" / "net.pt", "--perceptual 0.5 --perceptual-net {} --steps 2 --log-every 1"
    for out in ("a", "b"):
        call(train_tokenizer, tmp_path / out, flags.format(net))
        assert ("training a classifier" in capsys.readouterr().out) == (out == "a")
    logs = [[json.loads(line) for line in open(tmp_path / out / "log-tokenizer.jsonl")] for out in "ab"]
    for a, b in zip(*([r for r in log if "loss" in r] for log in logs)):
        assert a["loss"] == b["loss"] == pytest.approx(a["rec"] + a["vq"] + 0.5 * a["lpips"], rel=1e-5)
    assert a["lpips"] > 0.1
    call(train_tokenizer, tmp_path / "late", flags.format(net) + " --perceptual-start 1")
    log = [json.loads(line) for line in open(tmp_path / "late" / "log-tokenizer.jsonl")]
    assert ["lpips" in r for r in log if "loss" in r] == [False, True]
    call(train_gpt, tmp_path / "a")
    line = error_of(capsys, evaluate, tmp_path / "a", f"generation --num 20 --classifier {net}")
    assert "is of widths" in line and "name another file" in line


@pytest.fixture
def reference(judged):
    """(file of classifier statistics, the same by numpy)."""
    _, statistics = numpy_features(judged, Shapes("train", 16).batch(torch.arange(200))[0])
    np.savez(judged / "reference.npz", mu=statistics[0], sigma=statistics[1])
    return judged / "reference.npz", statistics


@torch.no_grad()
def test_generation_is_measured_as_defined(judged, reference):
    labels = torch.arange(40) % 10
    labels = labels[torch.randperm(40, generator=torch.Generator().manual_seed(3))]
    gpt, tokenizer, _ = load_generator(judged / "gpt.pt")
    codes = gpt.generate(labels, cfg=1.5, seeds=3 * 2 ** 32 + torch.arange(40))
    logits, mine = numpy_features(judged, train_tokenizer.to_uint8(tokenizer.decode(codes)))
    for batch_size in (16, 40):
        call(evaluate, judged, f"generation --num 40 --cfg 1.5 --seed 3 --batch-size {batch_size} "
                               f"--reference {reference[0]}")
        record = last_record(judged)
        assert record["results"] == [pytest.approx({
            "FD-classifier": evaluate.frechet_distance(*mine, *reference[1]),
            "accuracy": (logits.argmax(-1) == labels).double().mean().item()}, rel=1e-6)]
        assert record["checkpoint"] == fingerprint(gpt) and record["counts"] == [40, None] and record["seed"] == 3


def test_generation_is_compared_with_training_images(judged, monkeypatch):
    monkeypatch.setattr(Shapes, "__len__", lambda self: 2200)
    call(evaluate, judged, "generation --num 20 --batch-size 500")
    record = last_record(judged)
    assert record["counts"] == [20, 2200] and set(record["results"][0]) == {"FD-classifier", "precision", "recall",
                                                                             "accuracy"}


def test_pick_skips_no_class():
    """Every 20th of the shapes, whose class is i mod 10, would be circles alone."""
    chosen = evaluate.pick(1_000_000, 50_000)
    assert len(chosen.unique()) == 50_000 and (chosen.diff() > 0).all() and chosen.max() > 990_000
    assert torch.bincount(chosen % 10, minlength=10).min() > 4500 and evaluate.pick(7, 9).tolist() == [*range(7)]


@torch.no_grad()
def test_reconstruction_is_measured_as_defined(judged):
    call(evaluate, judged, "reconstruction --num 50 --levels 2,6 --batch-size 16")
    record, tokenizer = last_record(judged), load_tokenizer(judged / "tokenizer.pt")
    images, labels = Shapes("val", 16).batch(evaluate.pick(10_000, 50))
    codes = tokenizer.encode(to_float(images))
    for row, level in zip(record["results"], (2, 6)):
        copies = train_tokenizer.to_uint8(tokenizer.decode(codes, level))
        logits, mine = numpy_features(judged, copies)
        expected = dict(tokens=level, PSNR=psnr(copies, images).double().mean().item(),
                        SSIM=evaluate.ssim(copies, images).mean().item(),
                        accuracy=(logits.argmax(-1) == labels).double().mean().item())
        expected["rFD-classifier"] = evaluate.frechet_distance(*mine, *numpy_features(judged, images)[1])
        assert row == pytest.approx(expected, rel=1e-6)
    assert record["codebook_used"] == len(codes.unique()) / K and len(record["results"]) == 2
    assert record["codebook_effective_rank"] == effective_rank(tokenizer.quantizer.vectors(codes.unique())) > 1


@torch.no_grad()
def test_reconstruction_has_lpips_of_weight_files(judged, tmp_path, capsys):
    """Files as published: torchvision's names for VGG16 and its classifier, 1 x 1 convolutions for the linear part."""
    model = LPIPS()
    for w in model.lin:
        w.uniform_()
    torch.save({f"features.{k}": v for k, v in model.features.state_dict().items()} | {
        "classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg.pth")
    torch.save({f"lin{i}.model.1.weight": w.view(1, -1, 1, 1) for i, w in enumerate(model.lin)}, tmp_path / "lin.pth")
    flags = f"reconstruction --num 9 --lpips --vgg {tmp_path / 'vgg.pth'} --lpips-weights {tmp_path / 'lin.pth'}"
    call(evaluate, judged, flags)
    images, tokenizer = Shapes("val", 16).batch(evaluate.pick(10_000, 9))[0], load_tokenizer(judged / "tokenizer.pt")
    copies = train_tokenizer.to_uint8(tokenizer.decode(tokenizer.encode(to_float(images))))
    expected = model(to_float(copies), to_float(images)).mean().item()
    assert expected > 0 and last_record(judged)["results"][0]["LPIPS"] == pytest.approx(expected, rel=1e-5)
    (tmp_path / "lin.pth").write_bytes(b"no weights")
    assert "are not VGG16's and LPIPS' weights" in error_of(capsys, evaluate, judged, flags)


def test_ranks_give_what_one_process_gives(judged, reference, tmp_path):
    """Odd counts, so that the ranks' shares differ."""
    out = shutil.copytree(judged, tmp_path / "out")
    (out / "evaluations.jsonl").unlink(missing_ok=True)
    results = []
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--"]):
        for command in ("generation --num 31", "reconstruction --num 33"):
            done = subprocess.run([sys.executable, *launcher, "evaluate.py", *command.split(), "--device", "cpu",
                                   "--reference", str(reference[0]), "--out", str(out)], capture_output=True,
                                  cwd=Path(__file__).parent, env=dict(os.environ, OMP_NUM_THREADS="1"), text=True)
            assert done.returncode == 0, done.stderr
            results.append(last_record(out)["results"][0])
    assert len((out / "evaluations.jsonl").read_text().splitlines()) == len(results)    # one rank writes
    for alone, together in zip(results[:2], results[2:]):
        assert together == pytest.approx(alone, rel=1e-6)


def test_compare_takes_folders_images_and_statistics(judged, tmp_path, capsys):
    images = Shapes("val", 16).batch(torch.arange(24))[0].permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(images):
        target = tmp_path / "folder" / str(i % 2)
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target / f"{i:02d}.{('PNG', 'png', 'bmp')[i % 3]}")
    np.savez(tmp_path / "plain.npz", arr_0=images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images, arr_1=np.arange(24))
    out = shutil.copytree(judged, tmp_path / "out")
    flags = "--features classifier --preset shapes --batch-size 5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS["shapes"], "image_size", 16)
        call(evaluate, out, f"stats {tmp_path / 'folder'} {tmp_path / 'reference.npz'} {flags}")
        with np.load(tmp_path / "reference.npz") as file:
            assert sorted(file) == ["arr_0", "mu", "sigma"] and file["arr_0"].shape == images.shape
        for a, b in (("folder", "plain.npz"), ("plain.npz", "packed.npz"), ("packed.npz", "reference.npz")):
            call(evaluate, out, f"compare {tmp_path / a} {tmp_path / b} {flags}")
            row = last_record(out)["results"][0]
            assert abs(row["FD-classifier"]) < 1e-4 and (row["precision"], row["recall"]) == (1, 1), (a, b)
        assert "24 images give a covariance of low rank" in capsys.readouterr().out
        np.savez(tmp_path / "one_class.npz", arr_0=images[::10].repeat(4, 0))
        call(evaluate, out, f"compare {tmp_path / 'one_class.npz'} {tmp_path / 'plain.npz'} {flags}")
        row = last_record(out)["results"][0]
        assert row["FD-classifier"] > 0.1 and row["recall"] < 0.5
        line = error_of(capsys, evaluate, out, f"stats {tmp_path / 'folder'} {tmp_path / 'reference.npz'} {flags}")
        assert "exists: --overwrite" in line


def test_compare_with_inception_gives_adms_numbers(inception, tmp_path):
    images = pictures(3, 9, 32, 32).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", arr_0=images[:5]), np.savez(tmp_path / "b.npz", arr_0=images[4:])
    call(evaluate, tmp_path, f"compare {tmp_path / 'a.npz'} {tmp_path / 'b.npz'} --inception {inception[0]}")
    row = last_record(tmp_path)["results"][0]
    parts = [inception[1](torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (images[:5], images[4:])]
    for name, i in (("FID", 0), ("sFID", 1)):
        expected = evaluate.frechet_distance(*moments(parts[0][i]), *moments(parts[1][i]))
        assert row[name] == pytest.approx(expected, rel=1e-4)
    assert row["IS"] == pytest.approx(evaluate.inception_score(parts[0][2])[0], rel=1e-5)
    assert (row["precision"], row["recall"]) == evaluate.precision_recall(parts[1][0], parts[0][0])


def broken_npz(folder):
    """Files that are no set of images, each in its way."""
    images = np.zeros((3, 16, 16, 3), np.uint8)
    np.savez(folder / "other.npz", samples=images)
    np.savez(folder / "float.npz", arr_0=images / 255)
    np.savez(folder / "planes.npz", arr_0=images.transpose(0, 3, 1, 2))
    np.savez(folder / "pickle.npz", arr_0=np.array([folder], dtype=object))
    np.savez(folder / "one.npz", arr_0=images[:1])
    np.savez(folder / "good.npz", arr_0=images)
    np.savez(folder / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    (folder / "cut.npz").write_bytes((folder / "good.npz").read_bytes()[:900])
    (folder / "empty").mkdir()
    write_images(folder / "sizes", 2)
    Image.new("RGB", (5, 7)).save(folder / "sizes" / "odd.png")
    (folder / "weights.pth").write_bytes(b"PK no weights")


@pytest.mark.parametrize("flags, message", [
    ("compare {tmp}/empty {tmp}/good.npz", "empty has 0 images"),
    ("compare {tmp}/sizes {tmp}/good.npz", "odd.png is 5 x 7"),
    ("compare {tmp}/absent {tmp}/good.npz", "absent does not exist"),
    ("compare {tmp}/other.npz {tmp}/good.npz", "neither arr_0 (images) nor mu and sigma"),
    ("compare {tmp}/float.npz {tmp}/good.npz", "arr_0 is float64"),
    ("compare {tmp}/planes.npz {tmp}/good.npz", "(3, 3, 16, 16)"),
    ("compare {tmp}/pickle.npz {tmp}/good.npz", "arr_0 is object"),
    ("compare {tmp}/cut.npz {tmp}/good.npz", "no whole .npz"),
    ("compare {tmp}/one.npz {tmp}/good.npz", "1 image(s), at least 2"),
    ("compare {tmp}/good.npz {tmp}/narrow.npz", "features of width 192 against a reference of width 3"),
    ("compare {tmp}/good.npz", "compare takes 2 paths, not 1"),
    ("stats {tmp}/good.npz {tmp}/absent/reference.npz", "absent is not a folder"),
    ("generation --features inception --inception {tmp}/weights.pth", "weights.pth is not a whole file"),
    ("generation --features inception", "cannot download http://127.0.0.1:9/inception.pth"),
    ("reconstruction --levels 0,3", "level 0"),
    ("reconstruction --levels 7", "level 7"),
    ("reconstruction --levels all", "--levels is all"),
    ("generation --num 1", "1 image(s), at least 2")])
def test_evaluate_tells_bad_input_in_one_line(flags, message, judged, tmp_path, capsys, monkeypatch):
    broken_npz(tmp_path)
    monkeypatch.setitem(PRESETS["shapes"], "image_size", 16)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(evaluate, "INCEPTION_URL", "http://127.0.0.1:9/inception.pth")
    if flags.startswith(("compare", "stats")):
        flags += " --features classifier --preset shapes"
    (judged / "evaluations.jsonl").unlink(missing_ok=True)
    line = error_of(capsys, evaluate, judged, flags.format(tmp=tmp_path))
    assert message in line
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("inception.pth"))
    assert not (judged / "evaluations.jsonl").exists()


def test_run_that_diverges_names_the_term(tmp_path, capsys):
    line = error_of(capsys, train_tokenizer, tmp_path, "--lr 1e30 --log-every 1", code=1)
    assert re.match("failed: (loss|rec|vq|norm) is (nan|inf) by step [1-6]", line) and not list(tmp_path.glob("*.pt"))


def test_command_line_ends_with_its_exit_code(tmp_path):
    command = [sys.executable, "sample.py", "--out", str(tmp_path / "absent")]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_readme_and_docstring_commands_parse():
    readme = (Path(__file__).parent / "README.md").read_text()
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", readme, re.M | re.S)
    scripts = {"train_tokenizer.py": train_tokenizer, "train_gpt.py": train_gpt, "sample.py": sample_script,
               "evaluate.py": evaluate}
    indented = re.findall(r"^  ((?:python|torchrun) .*)", "\n".join(s.__doc__ for s in scripts.values()), re.M)
    for text, least in (("\n".join(blocks), 20), ("\n".join(indented), 16)):
        text = re.sub(r"torchrun --nproc-per-node 8 (-- )?", "python ", text)
        parts = [part for line in text.splitlines() for part in re.split("&&|#.*", line)]
        found = [words for words in map(str.split, parts) if words[:1] == ["python"] and words[1] in scripts]
        assert len(found) >= least and {words[1] for words in found} == set(scripts)
        for words in found:
            scripts[words[1]].parse_args(words[2:])


# ------------------------------------------------------------------------------------------------------------------
# the paper's studies

def test_bands_share_out_the_energy():
    """Parseval; a cosine's energy lies in the octave of its larger frequency; energies add up over the images."""
    assert evaluate.octaves(8).tolist()[5] == [3] * 8 and evaluate.octaves(8)[0].tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    x = noise(5, 3, 32, 32, dtype=torch.float64)
    assert evaluate.band_energy(x).sum().item() == pytest.approx(x.square().sum().item(), rel=1e-12)
    assert torch.allclose(evaluate.band_energy(x[:2]) + evaluate.band_energy(x[2:]), evaluate.band_energy(x))
    for (row, column), band in {(0, 0): 0, (1, 0): 1, (1, 3): 2, (7, 4): 3, (15, 16): 5}.items():
        spectrum = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
        spectrum[:, 1, row, column] = 3
        expected = torch.zeros(6, dtype=torch.float64)
        expected[band] = 9
        assert torch.allclose(evaluate.band_energy(idct2(spectrum)), expected, atol=1e-12)


@torch.no_grad()
def test_truncation_is_measured_as_defined(judged, reference, capsys):
    call(evaluate, judged, f"truncation --num 40 --levels 1,3,6 --cfg 1.5 --seed 3 --reference {reference[0]}")
    rows, printed = last_record(judged)["results"], capsys.readouterr().out
    gpt, tokenizer, _ = load_generator(judged / "gpt.pt")
    images = Shapes("val", 16).batch(evaluate.pick(10_000, 40))[0]
    codes = tokenizer.encode(to_float(images))
    call(evaluate, judged, "reconstruction --num 40 --levels 1,3,6")
    reconstructed = last_record(judged)["results"]
    labels = evaluate.balanced_labels(40, range(10), 3)
    sampled = gpt.generate(labels, cfg=1.5, seeds=3 * 2 ** 32 + torch.arange(40))
    low = [0, 1, 2, 4, 8]
    for row, level, other in zip(rows, (1, 3, 6), reconstructed):
        assert {k: row[k] for k in other} == pytest.approx(other)
        window = row["window"]
        assert window == tokenizer.edges[level - 1]
        copies = train_tokenizer.to_uint8(tokenizer.decode(codes, level))
        mine, theirs = (dct2(to_float(x).double()).square().sum((0, 1)) for x in (copies, images))
        for a, b in zip(low, [*low[1:], 16]):
            if a >= window:
                assert row[f"band {a}"] is None
                continue
            ring = torch.zeros(16, 16, dtype=torch.bool)
            ring[:b, :b] = True
            ring[:a, :a] = False
            assert row[f"band {a}"] == pytest.approx(10 * math.log10(mine[ring].sum() / theirs[ring].sum()), abs=1e-4)
        logits, statistics = numpy_features(judged, train_tokenizer.to_uint8(tokenizer.decode(sampled, level)))
        distance = evaluate.frechet_distance(*statistics, *reference[1])
        assert row["gFD-classifier"] == pytest.approx(distance, rel=1e-6)
        assert row["gaccuracy"] == (logits.argmax(-1) == labels).double().mean().item()
    pictures = [Image.open(judged / name) for name in ("truncation.png", "levels.png")]
    assert "truncation.png" in printed and all(p.width > 400 for p in pictures)
    assert "is outside 1 .. 6" in error_of(capsys, evaluate, judged, "truncation --num 40 --levels 7")


def test_ridge_gives_the_r2_of_its_definition():
    """Against least squares with the penalty as extra rows, tried one by one."""
    n, places, d = 300, 4, 2
    x = noise(n, places, d, dtype=torch.float64)
    x[:, 1] = 0.7 * x[:, 0] + 0.3 * x[:, 1] + 5
    x[:, 3] = x[:, 0] - 2 * x[:, 1]                                             # told wholly by those before
    args = Namespace(rank=0, ranks=1, device="cpu")
    parts = x[:100], x[100:180], x[180:]
    moments = [evaluate.second_moments(len(part), lambda a, b: part[a:b], args) for part in parts]
    for order in (torch.arange(4), torch.tensor([3, 0, 2, 1])):
        fit, held_out, test = (part[:, order] - parts[0].mean(0)[order] for part in parts)
        penalties, expected = [p * fit.square().mean() for p in evaluate.PENALTIES], [0.0]
        for i in range(1, places):
            tried = []
            for penalty in penalties:
                X, Y = fit[:, :i].flatten(1), fit[:, i]
                X = torch.cat([X, (penalty * len(fit)).sqrt() * torch.eye(X.shape[1], dtype=X.dtype)])
                W = torch.linalg.lstsq(X, F.pad(Y, (0, 0, 0, X.shape[0] - len(Y)))).solution
                error = [(p[:, i] - p[:, :i].flatten(1) @ W).square().sum() for p in (held_out, test)]
                tried.append((error[0].item(), 1 - error[1].item() / test[:, i].square().sum().item()))
            expected.append(min(tried)[1])
        found = evaluate.ridge_r2(moments, order, places)
        assert found == pytest.approx(expected, abs=1e-8)
    assert evaluate.ridge_r2(moments, torch.arange(4), 4)[3] > 0.999 and abs(expected[2]) < 0.1


def test_patches_of_the_same_count_tile_the_image():
    assert evaluate.patch_sides(32, 64) == (4, 4) and evaluate.patch_sides(256, 64) == (32, 32)
    assert sorted(evaluate.patch_sides(32, 32)) == [4, 8] and evaluate.patch_sides(16, 6) is None


@torch.no_grad()
def test_probe_reports_what_the_codes_hold(judged, tmp_path, capsys, monkeypatch):
    """Entropy and bits against their definitions; a run asked about itself answers the same; sizes must agree."""
    monkeypatch.setattr(Shapes, "__len__", lambda self: 600)
    against = shutil.copytree(judged, tmp_path / "other")
    call(evaluate, judged, f"probe --num 400 --against {against}")
    *rows, mean = last_record(judged)["results"]
    gpt, tokenizer, _ = load_generator(judged / "gpt.pt")
    codes = tokenizer.encode(to_float(Shapes("train", 16).batch(evaluate.pick(600, 400))[0]))
    held_out, labels = Shapes("val", 16).batch(torch.arange(600))
    held_out = tokenizer.encode(to_float(held_out))
    bits = -gpt(held_out, labels).log_softmax(-1).gather(-1, held_out[..., None]).mean(0)[:, 0] / math.log(2)
    for i, row in enumerate(rows):
        p = torch.bincount(codes[:, i]) / 400
        assert row["entropy"] == pytest.approx(-(p[p > 0] * p[p > 0].log2()).sum().item(), rel=1e-5)
        assert row["bits"] == pytest.approx(bits[i].item(), rel=1e-6)
        assert all(row[f"{name} against"] == row[name] for name in ("R2", "entropy", "bits"))
    assert len(rows) == N and mean["R2"] == pytest.approx(sum(r["R2"] for r in rows) / (N - 1))
    assert 0 < mean["R2 reversed"] < 1 and "R2 patches" not in mean             # 6 patches do not tile 16 px
    assert Image.open(judged / "probe.png").width > 400
    with torch.enable_grad():
        call(train_tokenizer, tmp_path / "third", "--num-tokens 4")
    line = error_of(capsys, evaluate, judged, f"probe --num 400 --against {tmp_path / 'third'}")
    assert "has 4 tokens of 16 px images" in line


def test_ticks_are_round():
    assert evaluate.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert evaluate.ticks(-31, 8) == [-30, -20, -10, 0] and evaluate.ticks(17.9, 23.1) == [18, 19, 20, 21, 22, 23]


# ------------------------------------------------------------------------------------------------------------------
# bugs that were reported: each test fails on the code before its fix

class SlowBfloat16(TorchDispatchMode):
    """A clock for a CPU without bfloat16 instructions: a product of side 1024 takes 7.2 s."""
    seconds = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default and args[0].dtype == torch.bfloat16:
            self.seconds += 7.2 * (len(args[0]) / 1024) ** 3
        return function(*args, **(kwargs or {}))


def test_dtype_is_chosen_within_a_second_where_bfloat16_is_slow(monkeypatch, capsys):
    """Eight bfloat16 products of side 1024 delayed every start by a minute on such a CPU."""
    real = time.perf_counter
    monkeypatch.setattr(train_tokenizer, "matmul_speed", matmul_speed)  # other tests replace it
    with SlowBfloat16() as clock:
        monkeypatch.setattr(time, "perf_counter", lambda: real() + clock.seconds)
        choose_dtype(Namespace(device="cpu", dtype="auto", ranks=1))
        assert matmul_speed("cpu", torch.bfloat16) == pytest.approx(2 * 1024 ** 3 / 7.2, rel=0.5)
    assert 0 < clock.seconds < 1 and "dtype float32 (" in capsys.readouterr().out


def test_dtype_that_is_given_is_the_only_one_measured(tmp_path, monkeypatch):
    """With --dtype float32 the bfloat16 product, slow on many CPUs, was timed all the same."""
    measured = []

    def note(device, dtype, *_):
        measured.append(dtype)
        return 1e12
    monkeypatch.setattr(train_tokenizer, "matmul_speed", note)
    call(train_tokenizer, tmp_path / "out", "--steps 1 --dtype float32")
    assert measured == [torch.float32]


def test_overwrite_keeps_codes_whose_note_agrees(a_copy):
    """train_gpt.py --overwrite deleted codes that another --lr does not change, and encoded again."""
    files = [a_copy / "codes-train.npy", a_copy / "codes-val.npy"]
    written = [(f.stat().st_ino, f.stat().st_mtime_ns) for f in files]
    call(train_gpt, a_copy, "--overwrite --lr 1e-4")
    assert [(f.stat().st_ino, f.stat().st_mtime_ns) for f in files] == written
    # codes of other views are made anew
    call(train_gpt, a_copy, "--overwrite --views centre")
    codes = np.load(files[0])
    assert codes["codes"].shape == (64, 1, N)
    # and so are codes without a note
    (a_copy / "codes.json").unlink()
    np.save(files[0], codes[::-1])
    call(train_gpt, a_copy, "--overwrite --views centre")
    assert np.array_equal(np.load(files[0]), codes)


DRIVER = """
import sys, time, urllib.request
sys.path.insert(0, {repository!r})
import train_tokenizer
fetch = urllib.request.urlopen
cifar10 = [{md5!r} if x == {official!r} else x for x in train_tokenizer.CIFAR["cifar10"]]
train_tokenizer.CIFAR["cifar10"] = tuple(cifar10)

def slow(url, **how):
    with open({log!r}, "a") as log:
        log.write("fetched\\n")
    time.sleep(4)
    return fetch({archive!r})
urllib.request.urlopen = slow
train_tokenizer.run(train_tokenizer.main, train_tokenizer.parse_args())
"""


def test_ranks_download_a_data_set_once(tmp_path):
    """All ranks fetched CIFAR at once into one file: of four processes three died."""
    folder, log = tmp_path / "cifar-10-batches-bin", tmp_path / "log"
    folder.mkdir()
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        np.random.default_rng(0).integers(0, 10, (16, 3073), np.uint8).tofile(folder / name)
    (folder / "batches.meta.txt").write_text("\n".join(SHAPES))
    archive, driver = tmp_path / "archive", tmp_path / "driver.py"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, folder.name)
    driver.write_text(DRIVER.format(
        repository=str(Path(__file__).parent), archive=archive.as_uri(), log=str(log),
        md5=hashlib.md5(archive.read_bytes()).hexdigest(), official="c32a1d4ab5d03f1284b67883e8d87530"))
    flags = f"--data cifar10 --data-dir {tmp_path / 'data'} --image-size 32 --steps 1"
    script = Namespace(__file__=str(driver))
    finish(start(script, tmp_path / "out", flags, 2, FLAGS[train_tokenizer]))
    assert log.read_text().split() == ["fetched"]


def test_probe_leaves_patches_of_large_images_out(tmp_path, capsys, monkeypatch):
    """The covariance of raster patches took 309 GB at 256 px, and did not end within minutes at 64 px."""
    monkeypatch.setattr(Shapes, "__len__", lambda self: 200)
    means = {}
    for size in (32, 40):
        out = tmp_path / f"{size}"
        call(train_tokenizer, out, f"--image-size {size} --patch-size 8 --num-tokens 4 --steps 1")
        call(evaluate, out, "probe --num 100")
        means[size] = last_record(out)["results"][-1]
    assert "R2" in means[32] and "R2 patches" in means[32]
    assert "R2" in means[40] and "R2 patches" not in means[40]
    assert "no R2 of raster patches: an image has 4,800 values" in capsys.readouterr().out


def test_checkpoints_are_read_to_the_cpu(trained, monkeypatch):
    """They were loaded onto the GPU, Adam's moments included: 4.4 times the model's memory."""
    load, places = torch.load, []

    def note(*a, map_location=None, **how):
        places.append(str(map_location))
        return load(*a, map_location="cpu", **how)
    monkeypatch.setattr(torch, "load", note)
    assert load_gpt(trained / "gpt.pt", "meta").pos.is_meta
    assert load_tokenizer(trained / "tokenizer.pt", "meta").queries.is_meta
    assert places == ["cpu", "cpu"]


@TRAINING
def test_checkpoint_is_not_kept_while_training(script, kind, a_copy, monkeypatch):
    """train_gpt.py kept the checkpoint that it resumed from, moments and all, for the whole run."""
    load, save, averages, alive = torch.load, torch.save, [], []

    def watched_load(*a, **how):
        content = load(*a, **how)
        if content.get("step"):
            averages.extend(weakref.ref(x) for x in content["ema"].values())
        return content

    def watched_save(*a, **how):
        gc.collect()
        alive.append(sum(x() is not None for x in averages))
        save(*a, **how)
    monkeypatch.setattr(torch, "load", watched_load)
    monkeypatch.setattr(torch, "save", watched_save)
    call(script, a_copy, "--resume --steps 8")
    assert averages and alive == [0]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_lack_of_memory_for_a_checkpoint_is_told_as_such(error, trained, capsys, monkeypatch):
    """A checkpoint too large for the memory was called truncated: a user would have deleted it."""
    def load(*args, **how):
        raise error
    monkeypatch.setattr(torch, "load", load)
    line = error_of(capsys, sample_script, trained, code=1)
    assert "out of memory" in line and "gpt.pt" in line and "truncated" not in line


@pytest.mark.parametrize("seed", [8192, 20240101, -5000, 2 ** 40, 10 ** 30, -10 ** 30])
def test_any_integer_is_a_seed(seed, judged, reference, tmp_path):
    """--seed 8192 ended train_tokenizer.py with an OverflowError, and --seed 2147483648 sample.py."""
    out = shutil.copytree(judged, tmp_path / "out")
    for script in (train_tokenizer, train_gpt):
        call(script, out, f"--overwrite --steps 2 --seed {seed}")
    for kind in ("tokenizer", "gpt"):
        assert torch.load(out / f"{kind}.pt", weights_only=True)["args"]["seed"] == seed
    call(sample_script, out, f"--num 2 --seed {seed}")
    call(sample_script, out, f"--npz {tmp_path / 'a.npz'} --num 2 --seed {seed}")
    call(evaluate, out, f"generation --num 20 --seed {seed} --reference {reference[0]}")
    assert last_record(out)["seed"] == seed



def test_truncation_does_with_three_held_out_images(judged, reference, monkeypatch):
    """With fewer than 4 held-out images an IndexError came after everything was measured."""
    monkeypatch.setattr(Shapes, "__len__", lambda self: 3)
    call(evaluate, judged, f"truncation --num 40 --levels 1,6 --reference {reference[0]}")
    assert last_record(judged)["counts"] == [3, 3]
    # rows: the spectrum, the sub-image, three reconstructions
    assert cells(Image.open(judged / "levels.png")).shape[0] == 5


def test_compare_tells_of_an_unreadable_first_file_in_one_line(tmp_path, capsys):
    """The first file of a folder was opened apart from the others: a broken one gave a traceback."""
    write_images(tmp_path / "folder", 3)
    (tmp_path / "folder" / "000.png").write_bytes(b"\0\5\26\7")
    folder = tmp_path / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load_classifier", lambda *a: Classifier(10, 16, (8, 8)).eval())
        line = error_of(capsys, evaluate, tmp_path,
                        f"compare {folder} {folder} --features classifier --preset shapes")
    assert "cannot decode" in line and "000.png" in line and "mend or remove it" in line


def test_dct_matrices_are_made_once(monkeypatch):
    """They were made anew on the CPU a dozen times per step, and a GPU waited for each copy."""
    x = noise(2, 3, 16, 16)
    with torch.inference_mode():
        expected = low_pass(x, 5)

    def cos(*args):
        raise AssertionError("a DCT matrix is made again")
    monkeypatch.setattr(torch, "cos", cos)
    assert torch.equal(low_pass(x, 5), expected)
    # matrices that were made in inference mode must serve a training step too
    x.requires_grad_()
    low_pass(x, 5).square().sum().backward()
    assert torch.allclose(x.grad, 2 * expected, atol=1e-5)
    monkeypatch.undo()
    # one for each dtype and device
    assert dct_matrix(16).dtype == torch.float32
    assert dct_matrix(16, torch.float64).dtype == torch.float64
    assert dct_matrix(16, device="meta").is_meta


def test_a_plan_leaves_no_matrices_behind(tmp_path):
    """Those that a plan makes hold no numbers: kept, they would end up in the next real step."""
    for flags in ("--dry-run", "--steps 2", "--dry-run"):
        call(train_tokenizer, tmp_path / "out", flags)
        assert low_pass(noise(1, 3, 16, 16), 5).isfinite().all()


def test_truncation_samples_the_tokens_of_its_highest_level(judged, reference, monkeypatch, capsys):
    """With --tokens 3 higher levels were decoded from codes that were never sampled."""
    generate, stops = GPT.generate, []

    def note(*a, **how):
        stops.append(how["stop"])
        return generate(*a, **how)
    monkeypatch.setattr(GPT, "generate", note)
    call(evaluate, judged, f"truncation --num 40 --levels 1,3 --reference {reference[0]}")
    assert set(stops) == {3}
    line = error_of(capsys, evaluate, judged, "truncation --num 40 --tokens 3")
    assert "--tokens 3" in line and "--levels" in line


def test_log_tells_the_memory_of_the_runs_own_gpu(monkeypatch):
    """A run on cuda:1 logged the memory of cuda:0."""
    memory = {"cuda:0": 1e9, "cuda:1": 5e9}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device="cuda:0": memory[str(device)])
    args = Namespace(device="cuda:1", ranks=1, accumulate=1, micro_batch=1, batch_size=1, steps=1)
    meter = train_tokenizer.Meter(args, 1, 1)
    meter.add(loss=torch.tensor(1.0))
    meter.steps = 1
    assert meter.line(1, 0.1)["memory_gb"] == 5


def test_keep_copies_where_there_are_no_hard_links(tmp_path, monkeypatch):
    """--keep ended in a PermissionError on file systems without hard links, such as exFAT."""
    def link(*args, **how):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", link)
    call(train_tokenizer, tmp_path, "--steps 3 --save-every 1 --keep 2")
    kept = sorted(f.name for f in tmp_path.glob("tokenizer-*"))
    assert kept == ["tokenizer-0000002.pt", "tokenizer-0000003.pt"]
    assert_same(tmp_path / "tokenizer-0000003.pt", tmp_path / "tokenizer.pt")


@pytest.mark.parametrize("before", [True, False])
def test_inception_computes_without_tf32(before, inception, monkeypatch):
    """On a GPU its convolutions rounded their inputs to the 10 bits of TF32, the default of cuDNN."""
    cudnn, seen, model = torch.backends.cudnn, [], inception[1]
    monkeypatch.setattr(cudnn, "allow_tf32", before)
    settings = lambda: (cudnn.allow_tf32, cudnn.enabled, cudnn.benchmark)
    outside = settings()
    handles = [m.register_forward_hook(lambda *_: seen.append(settings())) for m in model.modules()
               if isinstance(m, torch.nn.Conv2d)]
    pool, _, _ = model(pictures(103, 1, 32, 32))
    for handle in handles:
        handle.remove()
    assert len(seen) > 90 and set(seen) == {(False, *outside[1:])} and settings() == outside
    assert not pool.requires_grad


@TRAINING
@pytest.mark.parametrize("data, images, classes", [
    ("imagenet", "1,281,167", "1,000"), ("cifar10", "50,000", "10"), ("cifar100", "50,000", "100")])
def test_plan_needs_no_data_set(script, kind, data, images, classes, tmp_path, capsys, monkeypatch):
    """--dry-run refused ImageNet where it is absent, and downloaded CIFAR though it writes nothing."""
    def urlopen(*args, **how):
        raise OSError("no network in tests")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    flags = f"--data {data} --data-dir {tmp_path / 'absent'} --dry-run"
    if script is train_tokenizer:
        flags += f" --image-size {16 if data == 'imagenet' else 32} --perceptual 0"
    call(script, tmp_path / "out", flags)
    text = capsys.readouterr().out
    assert f"assumes its {images} training images of {classes} classes" in text
    assert "random images" in text and f"times all {images}" in text
    assert "step 000001/000006 | loss" in text and not list(tmp_path.iterdir())


def resumed_from_step(out, kind, step, copy):
    """A copy of a run's folder as it was after a step that --keep left there."""
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns("*-0*.pt", f"{kind}.pt"))
    shutil.copy(out / f"{kind}-{step:07d}.pt", copy / f"{kind}.pt")
    return copy


# flags that differ from those of the presets
CHANGED = ("--lr 5e-4 --seed 3 --betas 0.8 0.9 --weight-decay 0.3 --batch-size 6 --hold 0.3 --ema 0.9 "
           "--clip 0.5 --save-every 2 --keep 9")
SIZES = ("width", "depth", "heads", "image-size", "patch-size", "num-tokens", "codebook-size", "code-dim",
         "code-images", "eval-images")


def changed_run(script, kind, trained, folder):
    """The folder of a run of CHANGED flags, with all its checkpoints."""
    out = shutil.copytree(trained, folder / "whole", ignore=shutil.ignore_patterns(f"{kind}.pt"))
    call(script, out, CHANGED)
    return out


@TRAINING
def test_resume_takes_the_flags_of_its_run(script, kind, trained, tmp_path, capsys, monkeypatch):
    """A run of --lr 5e-4 went on at the preset's rate when --resume stood alone. Now bit for bit."""
    whole = changed_run(script, kind, trained, tmp_path)
    # only the sizes are given again; the next test gives none
    monkeypatch.setitem(FLAGS, script, " ".join(re.findall(rf"--(?:{'|'.join(SIZES)}) \d+", FLAGS[script])))
    resumed = resumed_from_step(whole, kind, 2, tmp_path / "resumed")
    capsys.readouterr()
    call(script, resumed, "--resume --steps 6")
    assert "resume: " not in capsys.readouterr().out
    assert_same(whole / f"{kind}.pt", resumed / f"{kind}.pt")


@TRAINING
def test_resume_needs_no_other_flag(script, kind, trained, tmp_path, monkeypatch, capsys):
    """All flags of the run, sizes included, had to be given again."""
    whole = changed_run(script, kind, trained, tmp_path)
    monkeypatch.setitem(FLAGS, script, "")
    resumed = resumed_from_step(whole, kind, 2, tmp_path / "resumed")
    call(script, resumed, "--resume")
    assert_same(whole / f"{kind}.pt", resumed / f"{kind}.pt")
    # the size of a pass follows from the new batch
    capsys.readouterr()
    call(script, resumed, "--resume --steps 8 --batch-size 9")
    assert "1 pass(es) of 9" in capsys.readouterr().out


@TRAINING
def test_resume_tells_what_a_flag_changes(script, kind, trained, tmp_path, monkeypatch, capsys):
    """A flag that differed from the saved run's was taken, or for --dtype ignored, without a word."""
    resumed = resumed_from_step(changed_run(script, kind, trained, tmp_path), kind, 2, tmp_path / "resumed")
    monkeypatch.setitem(FLAGS, script, "")
    # the codes that a generator learns belong to a dtype, so it cannot change
    other, value, before = ("label-drop", "0.2", "0.1")
    if kind == "tokenizer":
        other, value, before = ("dtype", "bfloat16", "float32")
    capsys.readouterr()
    call(script, resumed, f"--resume --lr 1e-3 --betas 0.5 0.6 --{other} {value} --seed 3")
    told = re.findall("^resume: (.*)", capsys.readouterr().out, re.M)
    assert sorted(told) == ["--betas is [0.5, 0.6] now, it was [0.8, 0.9]",
                            f"--{other} is {value} now, it was {before}",
                            "--lr is 0.001 now, it was 0.0005"]
    saved = torch.load(resumed / f"{kind}.pt", weights_only=True)["args"]
    assert (saved["lr"], saved["weight_decay"]) == (1e-3, 0.3)
    assert str(saved[other.replace("-", "_")]) == value


@TRAINING
@pytest.mark.parametrize("flag", ["--weight-decay 50", "--betas 0.1 0.2"])
def test_optimizer_settings_can_be_changed_on_resume(script, kind, flag, trained, tmp_path):
    """--weight-decay and --betas were ignored on --resume, though the checkpoint recorded them."""
    weights = []
    for name, flags in (("same", ""), ("changed", flag)):
        out = shutil.copytree(trained, tmp_path / name)
        call(script, out, f"--resume --steps 9 {flags}")
        weights.append(torch.load(out / f"{kind}.pt", weights_only=True)["model"])
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def other_version(checkpoint, change):
    """Change a checkpoint as if another version had written it. Returns the key or field that differs."""
    config, weights = checkpoint["config"], [checkpoint["model"], checkpoint["ema"]]
    last = list(weights[0])[-1]
    if change == "field":
        config["rope_base"] = 10000
        return "rope_base"
    if change == "no weights":
        del checkpoint["model"], checkpoint["ema"]
        return "model"
    for w in weights:
        if change == "missing":
            del w[last]
        elif change == "unknown":
            w["rope.frequencies"] = torch.ones(3)
        elif change == "shape":
            w[last] = torch.ones(7)
    return "rope.frequencies" if change == "unknown" else last


@pytest.mark.parametrize("change", ["field", "missing", "unknown", "shape", "no weights"])
def test_checkpoint_of_another_version_is_told_in_one_line(change, a_copy, capsys):
    """An unknown config field or a missing weight ended in a traceback. The line names the first."""
    readers = {"gpt": [(sample_script, ""), (train_gpt, "--resume --steps 9")],
               "tokenizer": [(train_gpt, "--overwrite"), (train_tokenizer, "--resume --steps 9")]}
    for kind, commands in readers.items():
        path = a_copy / f"{kind}.pt"
        checkpoint = torch.load(path, weights_only=True)
        differs = other_version(checkpoint, change)
        torch.save(checkpoint, path)
        for script, flags in commands:
            line = error_of(capsys, script, a_copy, flags)
            assert line.startswith("error: ") and path.name in line
            assert differs in line and "version" in line


def test_config_field_that_is_newer_than_a_checkpoint_takes_its_default(tmp_path):
    """So that a new field does not end the life of every checkpoint."""
    model, path = tiny_tokenizer(), tmp_path / "tokenizer.pt"
    config = {k: v for k, v in vars(model.config).items() if k != "flat"}
    save_checkpoint(path, "tokenizer", config=config, model=model.state_dict())
    assert load_tokenizer(path).config == model.config


class Viewed:
    """A data set that returns views of its images, not copies."""
    class_names = ["a", "b"]

    def __init__(self):
        self.images = torch.from_numpy(stream(0).randint(0, 256, (64, 3, 16, 16)).astype(np.uint8))

    def __len__(self):
        return len(self.images)

    def batch(self, indices, crops=None):
        return self.images[:len(indices)], torch.as_tensor(indices) % 2


def test_training_leaves_the_images_of_a_data_set_alone(tmp_path, monkeypatch):
    """Mirror images were made in place: a data set that returns views of its images was changed."""
    data = Viewed()
    before = data.images.clone()
    monkeypatch.setattr(train_tokenizer, "open_data", lambda args: (data, data))
    call(train_tokenizer, tmp_path)
    assert torch.equal(data.images, before)
