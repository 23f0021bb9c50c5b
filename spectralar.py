"""SpectralAR (arXiv 2506.10962): an image as a short sequence of frequency tokens, coarse to fine.

Read from top to bottom. Each part needs only the parts above it, and a few helpers of part 10:
UserError, attention, uniforms, whole_file and one_line.

   1. spectrum     an image as a sum of cosine waves; windows and sub-images
   2. mapping      how many frequencies the first i tokens may describe
   3. masks        which position may attend to which
   4. transformer  one block, used by the encoder, the decoder and the generator
   5. quantizer    vectors -> codes
   6. tokenizer    image <-> codes; the first i codes give the i-th sub-image
   7. objective    the nested loss: two levels per step, each against its sub-image
   8. generator    class -> codes, one after the other
   9. checkpoints  save and load
  10. machinery    attention on a CPU, random numbers, processes, flags; nothing of the method

Every tensor shape is written with these letters:

  B  images in the batch     S  side of the image, pixels    N  tokens per image
  P  patches per image       p  side of a patch, pixels      K  codes in the codebook
  d  width of a code vector  D  width of the transformer     H  attention heads
  G  levels decoded at once  T  length of a sequence
"""
import argparse
import hashlib
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# ---- 1. spectrum (paper, section 3.2) -----------------------------------------------------------
@lru_cache(maxsize=None)
def dct_matrix(n, dtype=torch.float32, device="cpu"):
    """(n, n) orthonormal DCT-II: row k holds a cosine of frequency k.

    dct_matrix(n) @ signal is the signal's spectrum. The result is cached: do not modify it."""
    frequency = torch.arange(n, dtype=torch.float64)[:, None]
    position = torch.arange(n, dtype=torch.float64) + 0.5
    matrix = torch.cos(math.pi / n * frequency * position) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.to(dtype).to(device)           # Apple's GPUs lack float64


def _transform(x, inverse):
    # bfloat16 would lose the high frequencies, so these products are never in half precision.
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype != torch.float64:
            x = x.float()
        rows = dct_matrix(x.shape[-2], x.dtype, x.device)
        columns = dct_matrix(x.shape[-1], x.dtype, x.device)
        if inverse:
            return rows.mT @ x @ columns
        return rows @ x @ columns.mT


def dct2(x):
    """The 2-D spectrum of x over its last two dims. The sum of squares is kept (Parseval)."""
    return _transform(x, inverse=False)


def idct2(spectrum):
    """The inverse of dct2."""
    return _transform(spectrum, inverse=True)


def in_window(image_size, window, device=None):
    """True at the frequencies that a window keeps: the top-left square of the spectrum.

    window: an int -> (S, S), or a tensor of windows (...) -> (..., S, S). in_window(S, 1) keeps
    the mean alone. Only this function and the next one depend on the shape of a window."""
    frequency = torch.arange(image_size, device=device)
    window = torch.as_tensor(window, device=device)[..., None, None]
    return (frequency[:, None] < window) & (frequency < window)


def largest_window(image_size):
    """The window that keeps the whole spectrum."""
    return image_size


def low_pass(x, window):
    """The sub-image: x without the frequencies outside the window, transformed back (section 3.2).

    x (B, 3, S, S); window: an int, or (B,) with one window per image.
    low_pass(x, 1) is the mean colour everywhere, low_pass(x, S) is x."""
    S = x.shape[-1]
    window = torch.as_tensor(window, device=x.device).reshape(-1, 1)
    keep = in_window(S, window, x.device)                        # (B or 1, 1, S, S)
    sub_image = idct2(dct2(x) * keep)

    # The largest window keeps everything: give x itself, without the error of two transforms.
    whole = window[..., None, None] >= largest_window(S)
    return torch.where(whole, x.to(sub_image.dtype), sub_image)


# ---- 2. the non-uniform token-frequency mapping (paper, Eq. 9) ----------------------------------
def band_edges(num_tokens, image_size, power):
    """(N,) long: w_i, the window of the first i tokens. It never shrinks, and the last is S.

    NOTE: the paper does not publish the constants of its Eq. 9; here w_i = round(S (i/N)^power),
    at least 1. power = 1 is the paper's uniform mapping. power > 1 gives the low frequencies more
    tokens. power = 0.5 gives every token about as many coefficients: w_i^2 = S^2 i/N.

    band_edges(16, 32, 1.5) = 1 1 3 4 6 7 9 11 14 16 18 21 23 26 29 32
    Token i brings w_i^2 - w_(i-1)^2 new coefficients per channel: 1 0 8 7 20 13 ... 165 183.
    Rounding can make neighbours equal: here levels 1 and 2 both show the mean colour alone. With
    64 tokens, 32 px and power 0.5, 36 tokens refine what the window already holds."""
    largest = largest_window(image_size)
    share = torch.arange(1, num_tokens + 1, dtype=torch.float64) / num_tokens
    return (largest * share ** power).round().long().clamp(1, largest)


# ---- 3. masks (paper, section 3.3 and Figure 2) -------------------------------------------------
# True: the position of the row may attend to the position of the column.

def causal_mask(T, device=None):
    """(T, T): position t sees positions 0 .. t."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


def encoder_mask(P, N, flat=False, figure=False):
    """(P+N, P+N) for the sequence [P patches, N queries].

    Patches see patches. Query i sees all patches and queries 1 .. i, so that code i depends on
    nothing that comes later. For P = 2, N = 3 (x: may attend):

                 patches  queries
      patch 1     x x      . . .
      patch 2     x x      . . .
      query 1     x x      x . .
      query 2     x x      x x .
      query 3     x x      x x x

    flat: every position sees every position.
    NOTE: in the paper's Figure 2 patches also see the queries. Then, from the second block on,
    query 1 hears queries 2 and 3 through the patches, and code 1 changes with them. We block this
    leak; figure=True brings the figure's mask back.
    """
    mask = torch.ones(P + N, P + N, dtype=torch.bool)
    if not flat:
        mask[:P, P:] = figure
        mask[P:, P:] = causal_mask(N)
    return mask


def decoder_mask(P, N, levels, flat=False):
    """(B, T, T) for [N codes, P mask tokens for each of G levels], T = N + G P; levels (B, G).

    Code i sees codes 1 .. i. A mask token of level l sees codes 1 .. l and the mask tokens of its
    own level. The levels do not see each other, so one pass decodes all of them, each as if it
    were alone. For P = 2, N = 3, levels 3 and 1:

                     codes   level 3  level 1
      code 1         x . .     . .      . .
      code 2         x x .     . .      . .
      code 3         x x x     . .      . .
      level 3 mask   x x x     x x      . .
      level 3 mask   x x x     x x      . .
      level 1 mask   x . .     . .      x x
      level 1 mask   x . .     . .      x x

    flat: codes 1 .. l and all mask tokens see each other (one level only).
    """
    B, G = levels.shape
    number = torch.arange(N, device=levels.device)               # of each code, from 0
    if flat:
        assert G == 1
        columns = torch.cat([number < levels, number.new_ones(B, P, dtype=torch.bool)], 1)
        return columns[:, None].expand(B, N + P, N + P)

    # How many codes does each row see? Code i sees i of them, a mask token sees its level's.
    group_of_mask = torch.arange(G, device=levels.device).repeat_interleave(P)     # (G P,)
    codes_seen = torch.cat([(number + 1).expand(B, N), levels[:, group_of_mask]], 1)
    sees_code = number < codes_seen[:, :, None]                  # (B, T, N)

    # Mask tokens see the mask tokens of their own level. A code has group -1, so it sees none.
    group_of_row = torch.cat([number.new_full((N,), -1), group_of_mask])           # (T,)
    sees_mask = group_of_row[:, None] == group_of_mask           # (T, G P)
    return torch.cat([sees_code, sees_mask.expand(B, -1, -1)], 2)


# ---- 4. transformer -----------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention with LayerNorm on queries and keys (QK-norm)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads)
        # No bias: it would add the same number to every score of a query, which softmax ignores.
        self.k_norm = nn.LayerNorm(width // heads, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None, causal=False, cache=None, start=0):
        """x (B, T, D), the positions start .. start+T-1; cache (2, B, H, N, D/H): keys and values.

        mask: bool, (T, T) or with dims for batch and heads before. causal: t sees 0 .. t."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                     # (B, H, T, D/H) each
        q = self.q_norm(q).to(v.dtype)
        k = self.k_norm(k).to(v.dtype)
        if cache is not None:
            cache[:, :, :, start:start + T] = torch.stack([k, v])
            k, v = cache[:, :, :, :start + T]                    # (B, H, start+T, D/H) each
        x = attention(q, k, v, mask, causal)                     # (B, H, T, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Transformer block with norms before attention and MLP (pre-norm).

    A conditional block has AdaLN (DiT): the condition shifts, scales and gates both halves."""

    def __init__(self, width, heads, conditional=False):
        super().__init__()
        self.attn_norm = nn.LayerNorm(width, elementwise_affine=not conditional)
        self.attn = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=not conditional)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width) if conditional else None

        # The layers whose output is added to x. GPT.init_weights starts them smaller.
        self.into_stream = [self.attn.proj, self.mlp[-1]]

    def modulate(self, condition):
        """Condition (B, D) -> six (B, 1, D): shift, scale, gate of attention, then of the MLP."""
        return self.modulation(condition)[:, None].chunk(6, -1)

    def forward(self, x, mask=None, causal=False, modulation=None, cache=None, start=0):
        """x (B, T, D) -> (B, T, D); see Attention. modulation: the six tensors of modulate()."""
        if modulation is None:
            x = x + self.attn(self.attn_norm(x), mask, causal, cache, start)
            return x + self.mlp(self.mlp_norm(x))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        h = torch.addcmul(shift_a, self.attn_norm(x), 1 + scale_a)
        x = x + gate_a * self.attn(h, mask, causal, cache, start)
        h = torch.addcmul(shift_m, self.mlp_norm(x), 1 + scale_m)
        return x + gate_m * self.mlp(h)


# ---- 5. quantizer (paper, section 3.3; unit-length codes as in ViT-VQGAN and TiTok) -------------
class VectorQuantizer(nn.Module):
    """Replaces each vector by the nearest of K learned unit vectors; the code is its number.

    A code is lossy: the last token of the shapes preset brings 3 x 183 new coefficients, and its
    code says 9 bits about them. All is float32: in bfloat16 many vectors would get another code.
    """
    decay = 0.95               # of the running average `usage`
    dead = 0.05                # a code used less than this, relative to uniform use, is re-seeded

    def __init__(self, codebook_size, code_dim):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(codebook_size, code_dim))
        # Running average of how often each code is chosen, relative to uniform use.
        self.register_buffer("usage", torch.zeros(codebook_size))

    def init_weights(self):
        nn.init.normal_(self.codebook)

    def nearest(self, z):
        """Encoder outputs z (..., d) -> codes (...) long."""
        with torch.autocast(z.device.type, enabled=False):
            # For unit vectors the nearest one is the one with the largest dot product.
            unit = F.normalize(z.float(), dim=-1)
            return (unit @ F.normalize(self.codebook, dim=-1).T).argmax(-1)

    def vectors(self, codes):
        """Codes (...) -> their unit vectors (..., d)."""
        return F.embedding(codes, F.normalize(self.codebook, dim=-1))

    def forward(self, z):
        """Encoder outputs z (B, N, d) -> quantized unit vectors (B, N, d), codes (B, N), loss.

        loss = |e - sg(z)|^2, a mean over all entries; z is normalised here, e is the vector of its
        code, sg stops the gradient. So codes follow the outputs, and the encoder learns from the
        reconstruction alone."""
        codes = self.nearest(z.detach())
        e = self.vectors(codes)
        z = F.normalize(z.float(), dim=-1)
        # NOTE: VQ-VAE and TiTok also pull z towards its code, by 0.25 |z - sg(e)|^2. Unit vectors
        # cannot run away, so nothing needs it. With it, the codes of one run on CIFAR-10 filled
        # only 4 of their 16 dimensions.
        loss = F.mse_loss(e, z.detach())
        # Straight-through: the value is e; in the backward pass z gets the gradient of e.
        quantized = z + (e - z).detach()
        return quantized, codes, loss

    @torch.no_grad()
    def update(self, z, codes):
        """After a step: track the use of codes, and re-seed dead ones from encoder outputs.

        z (n, d) and codes (n,) of the whole batch. The running average starts at 0, so the first
        call keeps only codes that are used at least as often as the average, and re-seeds the
        rest. A new code counts as fully used; if nobody chooses it, it lives for 59 steps."""
        K = len(self.usage)
        # Not bincount: a GPU would have to wait for the largest code.
        one = self.usage.new_ones(len(codes))
        share = torch.zeros_like(self.usage).index_add_(0, codes, one) * (K / len(codes))
        self.usage.lerp_(share, 1 - self.decay)
        is_dead = self.usage < self.dead
        # Drawn on the CPU, so that every rank makes the same replacements.
        chosen = torch.randint(len(z), (K,)).to(z.device, non_blocking=True)
        seeds = F.normalize(z[chosen].float(), dim=-1)
        self.codebook.copy_(torch.where(is_dead[:, None], seeds, self.codebook))
        self.usage.masked_fill_(is_dead, 1.0)


# ---- 6. tokenizer (paper, section 3.3) ----------------------------------------------------------
def setting(default, help):
    """A field of a config that is also a flag: its default, and its text in -h."""
    return field(default=default, metadata=dict(help=help))


def check_divides(config, whole, part):
    """UserError when one size of a config is not a multiple of another."""
    a, b = getattr(config, whole), getattr(config, part)
    if a % b:
        raise UserError(f"{whole} {a} is not divisible by {part} {b}: change one of them")


@dataclass
class TokenizerConfig:
    image_size: int = setting(32, "S, side of the images in pixels")
    patch_size: int = setting(4, "p, side of a patch in pixels")
    num_tokens: int = setting(16, "N, tokens per image")
    codebook_size: int = setting(512, "K, codes in the codebook")
    code_dim: int = setting(16, "d, width of a code vector")
    width: int = setting(128, "D, width of encoder and decoder")
    depth: int = setting(4, "blocks in the encoder, and as many in the decoder")
    heads: int = setting(4, "attention heads per block")
    power: float = setting(1.5, "of the mapping: window = S (i/N)^power; 1 = uniform")
    flat: bool = setting(False, "the baseline: bidirectional masks, and level N alone is trained")

    def __post_init__(self):
        check_divides(self, "image_size", "patch_size")
        check_divides(self, "width", "heads")
        if self.codebook_size > 65536:
            raise UserError(f"codebook_size {self.codebook_size} is above 65536, the most that "
                            f"16-bit codes can name: take a smaller --codebook-size")

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


class SpectralTokenizer(nn.Module):
    """Image in [-1, 1] <-> N codes. Codes 1 .. i alone give level i: the i-th sub-image."""
    decoder_parts = ("from_code", "code_pos", "mask_tokens", "level_embed", "decoder",
                     "decoder_norm", "to_pixels")

    def __init__(self, config):
        super().__init__()
        self.config = config
        P, N, D = config.num_patches, config.num_tokens, config.width
        pixels = 3 * config.patch_size ** 2
        self.register_buffer("edges", band_edges(N, config.image_size, config.power),
                             persistent=False)

        self.patch_embed = nn.Linear(pixels, D)
        self.patch_pos = nn.Parameter(torch.empty(P, D))
        self.queries = nn.Parameter(torch.empty(N, D))
        self.encoder = nn.ModuleList(Block(D, config.heads) for _ in range(config.depth))
        self.encoder_norm = nn.LayerNorm(D)
        self.to_code = nn.Linear(D, config.code_dim)
        self.register_buffer("encoder_mask", encoder_mask(P, N, config.flat), persistent=False)

        self.quantizer = VectorQuantizer(config.codebook_size, config.code_dim)

        self.from_code = nn.Linear(config.code_dim, D)
        self.code_pos = nn.Parameter(torch.empty(N, D))
        self.mask_tokens = nn.Parameter(torch.empty(P, D))       # one per patch, tells its place
        self.level_embed = nn.Parameter(torch.empty(N, D))       # tells mask tokens their level
        self.decoder = nn.ModuleList(Block(D, config.heads) for _ in range(config.depth))
        self.decoder_norm = nn.LayerNorm(D)
        self.to_pixels = nn.Linear(D, pixels)
        self.init_weights()

    def init_weights(self):
        """
        Linear.weight                  Xavier uniform (MAE)
        Linear.bias                    0
        patch positions, mask tokens   2-D sines and cosines (MAE), trained from there
        queries, code positions        normal, std 0.5: queries that start close together take long
                                       to become different
        level embedding                0
        codebook                       normal, std 1; the first batch re-seeds most of it
        LayerNorm                      weight 1, bias 0
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        side = self.config.image_size // self.config.patch_size
        for positions in (self.patch_pos, self.mask_tokens):
            positions.data.copy_(sine_positions(side, self.config.width))
        for vectors in (self.queries, self.code_pos):
            nn.init.normal_(vectors, std=0.5)
        nn.init.zeros_(self.level_embed)
        self.quantizer.init_weights()

    def patchify(self, images):
        """(B, 3, S, S) -> (B, P, 3 p p), patches row by row."""
        return F.unfold(images, self.config.patch_size, stride=self.config.patch_size).mT

    def unpatchify(self, patches):
        """The inverse of patchify."""
        p = self.config.patch_size
        return F.fold(patches.mT, self.config.image_size, p, stride=p)

    def encode_vectors(self, images):
        """(B, 3, S, S) -> (B, N, d): the encoder's outputs at the queries, not yet quantized."""
        patches = self.patch_embed(self.patchify(images)) + self.patch_pos         # (B, P, D)
        queries = self.queries.expand(len(images), -1, -1)                         # (B, N, D)
        x = torch.cat([patches, queries], 1)                                       # (B, P+N, D)
        mask = None if self.config.flat else self.encoder_mask
        for block in self.encoder:
            x = block(x, mask)
        x = x[:, self.config.num_patches:]                                         # (B, N, D)
        return self.to_code(self.encoder_norm(x)).float()                          # (B, N, d)

    def decode_vectors(self, vectors, levels):
        """Code vectors (B, N, d), levels (B, G) -> reconstructions (B, G, 3, S, S), in one pass.

        Each output image is low-passed, so that a level shows only its window's frequencies."""
        B, G = levels.shape
        P, N = self.config.num_patches, self.config.num_tokens
        code_tokens = self.from_code(vectors) + self.code_pos                      # (B, N, D)
        mask_tokens = self.mask_tokens + self.level_embed[levels - 1][:, :, None]  # (B, G, P, D)
        x = torch.cat([code_tokens, mask_tokens.flatten(1, 2)], 1)                 # (B, N+GP, D)
        mask = decoder_mask(P, N, levels, self.config.flat)[:, None]               # for all heads
        for block in self.decoder:
            x = block(x, mask)
        patches = self.to_pixels(self.decoder_norm(x[:, N:])).float()              # (B, GP, 3pp)
        images = self.unpatchify(patches.unflatten(1, (G, P)).flatten(0, 1))       # (BG, 3, S, S)
        windows = self.edges[levels - 1].flatten()                                 # (BG,)
        return low_pass(images, windows).unflatten(0, (B, G))                      # (B,G,3,S,S)

    def forward(self, images, levels):
        """Training: images (B, 3, S, S), levels (B, G) -> the terms of a step.

        reconstructions (B, G, 3, S, S), VQ loss, encoder outputs (B, N, d), codes (B, N)"""
        z = self.encode_vectors(images)
        vectors, codes, vq_loss = self.quantizer(z)
        return self.decode_vectors(vectors, levels), vq_loss, z, codes

    def encode(self, images):
        """Images (B, 3, S, S) in [-1, 1] -> codes (B, N) long."""
        return self.quantizer.nearest(self.encode_vectors(images))

    def decode(self, codes, levels=None):
        """Codes (B, N) -> images (B, 3, S, S), roughly in [-1, 1], not clipped.

        levels: how many codes each image may see. None = all, an int, or (B,). Codes after the
        level are ignored."""
        N = self.config.num_tokens
        levels = torch.as_tensor(N if levels is None else levels, device=codes.device)
        levels = levels.expand(len(codes))
        if levels.min() < 1 or levels.max() > N:
            raise UserError(f"level {levels.min().item()} .. {levels.max().item()} is outside "
                            f"1 .. {N}")
        return self.decode_vectors(self.quantizer.vectors(codes), levels[:, None])[:, 0]


def sine_positions(side, width):
    """(side * side, width): sines and cosines of y and x at width / 4 frequencies.
    Their mean square is 1/4."""
    frequency = 100 ** (-torch.arange(width // 4) / (width // 4))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y = y.reshape(-1, 1) * frequency
    x = x.reshape(-1, 1) * frequency
    positions = torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], 1) / math.sqrt(2)
    return F.pad(positions, (0, width % 4))      # what a quarter of the width leaves over stays 0


# ---- 7. the nested objective (paper, section 3.3, Eq. 7) ----------------------------------------
# Why the order of the tokens follows the order of the frequencies.

def sample_levels(B, N, full_only=False):
    """(B, G) long: the levels that a training step decodes, N and one random level below N.

    At level i only the frequencies of window i are compared, so tokens 1 .. i first learn those.
    At level N every token may help with every frequency: the order is encouraged, not forced.
    NOTE: the paper does not say which levels it decodes; here N is always among them, because a
    random level alone reaches the last token once in N steps. In a study of nested tokens, NesTok,
    that left 80 % of the codebook unused; with the full level too, FID fell from 2.46 to 1.93.
    (There a prefix is compared with the whole image: it says nothing about sub-images.)
    full_only: level N alone, for flat tokenizers."""
    full = torch.full((B, 1), N)
    if full_only or N == 1:
        return full
    return torch.cat([full, torch.randint(1, N, (B, 1))], 1)


def sub_images(images, levels, edges):
    """The targets: images (B, 3, S, S), levels (B, G), edges (N,) -> (B, G, 3, S, S)."""
    windows = edges[levels - 1]                                  # (B, G)
    return torch.stack([low_pass(images, window) for window in windows.T], 1)


def squared_error(a, b):
    """Two batches (B, 3, S, S) -> (B,): the mean of each image's squared errors."""
    return (a - b).square().mean((1, 2, 3))


def nested_loss(recon, targets, distance=squared_error, weights=None):
    """Eq. 7: the sum over the levels of distance(reconstruction, sub-image), a mean over images.

    recon and targets (B, G, 3, S, S); distance: two batches (B, 3, S, S) -> (B,);
    weights: of each image's levels, (B, G) or (G,); None = all 1."""
    B, G = recon.shape[:2]
    distances = [distance(recon[:, g], targets[:, g]) for g in range(G)]
    # A distance that is not one number per image ends in an error here, not in a wrong loss.
    distances = torch.stack(distances, 1).view(B, G)
    if weights is not None:
        distances = distances * weights.expand(B, G)
    return distances.mean(0).sum()


# ---- 8. generator (paper, section 3.4) ----------------------------------------------------------
@dataclass
class GPTConfig:
    # These three are no flags: they follow from the data set and the tokenizer.
    num_classes: int = 10                # one more label means: no class
    num_tokens: int = 16
    codebook_size: int = 512
    width: int = setting(192, "D; the paper's d16 has 64 x 16")
    depth: int = setting(4, "blocks; the paper's sizes are 16, 20, 24, 30")
    heads: int = setting(6, "attention heads per block; the paper's d16 has 16")

    def __post_init__(self):
        check_divides(self, "width", "heads")


@dataclass
class Sampling:
    """Settings of GPT.generate. sample.py and evaluate.py make flags of them."""
    cfg: float = setting(1.0, "guidance: logits = u + cfg (c - u), where c knows the class and u "
                              "does not; 1 = none, 0 = unconditional")
    cfg_start: int = setting(0, "tokens to draw without guidance, before it begins")
    temperature: float = setting(1.0, "of the logits; 0 = the likeliest code")
    top_k: int = setting(0, "sample among the k likeliest codes; 0 = all")
    top_p: float = setting(1.0, "sample among the likeliest codes that together reach this")

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"{self}: temperature and top_k must be at least 0, top_p in (0, 1]")


class GPT(nn.Module):
    """Causal transformer over codes. The class is its first input, and modulates every block."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.width
        self.class_embed = nn.Embedding(config.num_classes + 1, D)      # the last row: no class
        self.code_embed = nn.Embedding(config.codebook_size, D)         # also the output head
        self.pos = nn.Parameter(torch.empty(config.num_tokens, D))
        self.blocks = nn.ModuleList(Block(D, config.heads, conditional=True)
                                    for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.norm_modulation = nn.Linear(D, 2 * D)
        self.init_weights()

    def init_weights(self):
        """
        Linear.weight                        normal, std 0.02
        those that write into the stream     normal, std 0.02 / sqrt(2 depth) (GPT-2)
        modulations                          0: each block starts as the identity (DiT)
        Linear.bias                          0
        embeddings, positions                normal, std 0.02
        """
        into_stream = {layer for block in self.blocks for layer in block.into_stream}
        modulations = {block.modulation for block in self.blocks} | {self.norm_modulation}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = 0.02
                if module in modulations:
                    std = 0
                elif module in into_stream:
                    std = 0.02 / math.sqrt(2 * self.config.depth)
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.pos, std=0.02)

    def modulations(self, labels):
        """Labels (B,) -> the modulation of each block, then the shift and scale of the last norm.

        They depend on the class alone, so sampling computes them once per sequence."""
        condition = F.silu(self.class_embed(labels))                            # (B, D)
        blocks = [block.modulate(condition) for block in self.blocks]
        return blocks + [self.norm_modulation(condition)[:, None].chunk(2, -1)]

    def embed(self, codes, labels, start=0):
        """Codes (B, T-1), labels (B,) -> the input (B, T, D): the target, one position later.
        start: leave out the positions before it, which a cache holds -> (B, T - start, D).

        position   0        1    2    ...  N-1
        input      [class]  s_1  s_2  ...  s_(N-1)
        target     s_1      s_2  s_3  ...  s_N
        """
        x = self.code_embed(codes[:, max(start - 1, 0):])
        if start == 0:
            x = torch.cat([self.class_embed(labels)[:, None], x], 1)
        return x + self.pos[start:start + x.shape[1]]

    def logits(self, x, modulations, caches=None, start=0):
        """Input x (B, T, D) of positions start .. start+T-1 -> logits (B, T, K) of the targets."""
        # A single position may see all positions before it: it needs no mask.
        assert start == 0 or x.shape[1] == 1
        causal = True if x.shape[1] > 1 else False       # a bool of Python's, for torch.compile
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, None, causal, modulations[i], cache, start)
        shift, scale = modulations[-1]
        x = torch.addcmul(shift, self.norm(x), 1 + scale)                       # (B, T, D)
        return F.linear(x, self.code_embed.weight)                              # (B, T, K)

    def forward(self, codes, labels):
        """Teacher forcing: codes (B, N), labels (B,) -> logits (B, N, K).

        The logits at position t predict s_(t+1). Label num_classes means: no class."""
        return self.logits(self.embed(codes[:, :-1], labels), self.modulations(labels))

    @torch.no_grad()
    def generate(self, labels, cfg=1.0, prefix=None, seeds=None, stop=None, **settings):
        """Sample codes (B, N) for labels (B,).

        prefix   (B, k) codes to keep; the other N - k are sampled
        seeds    (B,) one random stream per image, whatever batch it is in; None = new ones
        stop     stop after this many tokens, the prefix included; later codes are 0
        cfg, cfg_start, temperature, top_k, top_p   see Sampling
        """
        settings = Sampling(cfg, **settings)
        B, N = len(labels), self.config.num_tokens
        seeds = torch.randint(2 ** 62, (B,)) if seeds is None else torch.as_tensor(seeds)
        uniform = uniforms(seeds.cpu(), N).float().to(labels.device)            # (B, N)
        prefix = labels.new_zeros(B, 0) if prefix is None else prefix           # (B, k)

        # Guidance needs two predictions. The second half of the batch runs without the class.
        halves = 1 if cfg == 1 else 2
        if halves == 2:
            labels = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])
        codes = F.pad(prefix.repeat(halves, 1), (0, N - prefix.shape[1]))
        modulations = self.modulations(labels)
        # One KV cache per block. Keys and values have the dtype that autocast gives to the output
        # of every Linear layer. (d16, 32 rows, float32: 268 MB together.)
        heads, width = self.config.heads, self.config.width
        size = (2, len(labels), heads, N, width // heads)
        caches = [modulations[0][0].new_empty(size) for _ in self.blocks]

        start = 0                                # positions before this one are in the cache
        for t in range(prefix.shape[1], N if stop is None else stop):
            # The first pass reads the class and the prefix, each later one only the newest code.
            x = self.embed(codes[:, :t], labels, start)
            logits = self.logits(x, modulations, caches, start)[:, -1].float()
            start = t + 1
            if halves == 2:
                conditional, unconditional = logits.chunk(2)
                scale = cfg if t >= settings.cfg_start else 1
                logits = unconditional + scale * (conditional - unconditional)  # (B, K)
            new = sample_from_logits(logits, uniform[:, t], settings.temperature, settings.top_k,
                                     settings.top_p)                            # (B,)
            codes[:, t] = new.repeat(halves)
        return codes[:B]


def sample_from_logits(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one code per row: logits (B, K), uniform random numbers (B,) in [0, 1) -> (B,) long.

    In this order: temperature divides the logits (0: the likeliest code); top_k keeps the k
    likeliest codes (0: all); top_p > 0 keeps, of these, the likeliest that together reach it."""
    if temperature <= 0 or top_k == 1:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    probs = logits.softmax(-1)
    if top_k:
        probs[:, top_k:] = 0
    probs = probs / probs.sum(-1, keepdim=True)
    if top_p < 1:
        # Drop a code when those before it reach top_p already. The likeliest one always stays.
        probs[probs.cumsum(-1) - probs >= top_p] = 0

    # The code where the cumulative probability passes the random number. Rounding must not lead
    # past the last code that is allowed.
    cumulative = probs.cumsum(-1)
    threshold = uniform[:, None].to(probs) * cumulative[:, -1:]
    rank = torch.searchsorted(cumulative, threshold, right=True)
    last_allowed = (probs > 0).sum(-1, keepdim=True) - 1
    return order.gather(1, rank.clamp(max=last_allowed))[:, 0]


# ---- 9. checkpoints: a dict of tensors and plain types, always read with weights_only=True ------
FORMAT = 2                      # raised when new code would misread an old file


def save_checkpoint(path, kind, **content):
    with whole_file(path) as temporary:
        torch.save(dict(format=FORMAT, kind=kind, **content), temporary)


def read_checkpoint(path, *kinds, mmap=False):
    """The dict of a checkpoint of one of these kinds, on the CPU.
    mmap: read a tensor only when it is used."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        found = checkpoint["kind"], checkpoint["format"]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: train it first, or name its folder by --out")
    except Exception as error:                   # a broken file raises nearly anything
        raise UserError(f"{path} is not a whole checkpoint ({one_line(error)})")
    if found not in [(kind, FORMAT) for kind in kinds]:
        raise UserError(f"{path} is a {found[0]} of format {found[1]}, not a "
                        f"{' or '.join(kinds)} of {FORMAT}")
    return checkpoint


def build_model(model_class, config_class, saved, path, device):
    """A model in eval mode from {config, model, ema}: the averaged weights where there are any."""
    try:
        model = model_class(config_class(**saved["config"]))
        model.load_state_dict(saved.get("ema") or saved["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is of another version of this program ({one_line(error)})")
    return model.to(device).eval()


def load_tokenizer(path, device="cpu"):
    """The SpectralTokenizer of a tokenizer.pt, or that of a gpt.pt, ready to encode and decode."""
    checkpoint = read_checkpoint(path, "tokenizer", "gpt")
    saved = checkpoint.get("tokenizer", checkpoint)
    return build_model(SpectralTokenizer, TokenizerConfig, saved, path, device)


def load_generator(path, device="cpu"):
    """(GPT, SpectralTokenizer, class names) of a gpt.pt, which carries its tokenizer."""
    checkpoint = read_checkpoint(path, "gpt")
    gpt = build_model(GPT, GPTConfig, checkpoint, path, device)
    carried = checkpoint["tokenizer"]
    tokenizer = build_model(SpectralTokenizer, TokenizerConfig, carried, path, device)
    return gpt, tokenizer, checkpoint["class_names"]


def code_fingerprint(tokenizer):
    """16 hex digits that name a tokenizer's codes: a hash of all weights but the decoder's."""
    digest = hashlib.sha256()
    for name, tensor in tokenizer.state_dict().items():
        if name.split(".")[0] not in tokenizer.decoder_parts:
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- 10. machinery: nothing of the method -------------------------------------------------------
class UserError(ValueError):
    """A mistake of the user, told in one line: what disagrees, and the remedy."""


@contextmanager
def whole_file(path):
    """A temporary name to write to. The old file stays until the new one is whole."""
    path = Path(path)
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    yield temporary
    os.replace(temporary, path)


def one_line(error):
    """What an exception says, shortened to one line."""
    return " ".join(str(error).split())[:200]


def to_float(images):
    """uint8 0 .. 255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """[-1, 1] -> uint8 by rounding. (ADM truncates, which loses a level of 63 values in 256.)"""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def attention(q, k, v, mask=None, causal=False):
    """softmax(q k^T / sqrt(D/H)) v: q (B, H, T, D/H), k and v (B, H, T', D/H) -> as q."""
    if q.is_cuda or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    # In bfloat16 on a CPU, PyTorch's function has a slow backward. These lines compute the same
    # result four times faster there (T = 160), and about as fast in float32.
    if causal:
        mask = causal_mask(q.shape[-2], q.device)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT                    # (B, H, T, T')
    if mask is not None:
        # 0 or -inf is added, because the gradient passes through a sum at no cost.
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -math.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def random_streams(purpose, seed, index):
    """The random streams of indices (B,) long, or of an int: one 64-bit number each.
    Every random number of a run comes from the stream of its purpose, seed and index. So no two
    purposes share a stream, and a resumed run has nothing to restore. Any integer is a seed."""
    name = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    name = int.from_bytes(name[:8], "little", signed=True)
    return mix_bits(mix_bits(torch.as_tensor(index)) + name)


def uniforms(streams, n):
    """Random streams (B,) -> (B, n) float64 in [0, 1): row b depends on streams[b] alone.
    SplitMix64, a counter-based generator: an image's random numbers do not depend on its batch."""
    counter = torch.arange(1, n + 1, device=streams.device) * (0x9E3779B97F4A7C15 - 2 ** 64)
    bits = mix_bits(mix_bits(streams)[:, None] + counter)
    return ((bits >> 11) & ((1 << 53) - 1)).double() / 2 ** 53


def mix_bits(z):
    """SplitMix64's hash of 64-bit numbers; different numbers have different hashes."""
    # torch has no unsigned shift: shift, then clear the copies of the sign bit.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << 64 - shift) - 1))) * (factor - 2 ** 64)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@dataclass
class Job:
    """Where this process runs. The flags, args, stay as they were given."""
    device: str
    rank: int = 0                        # number of this process
    ranks: int = 1                       # processes under torchrun
    dtype: torch.dtype = torch.float32   # of matrix products


def start_job(args):
    """The Job of this process, alone or beside the others of torchrun. Only the first prints."""
    job = Job(args.device)
    cuda = job.device.startswith("cuda")
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        if cuda:
            job.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(job.device)
        # The first process may train a classifier or download, while the others wait.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
        job.rank, job.ranks = dist.get_rank(), dist.get_world_size()
        if job.rank:
            sys.stdout = open(os.devnull, "w")

    # Our choice: bfloat16 where the hardware multiplies it. Other CPUs can be 90 times slower.
    fast = cuda or job.device == "cpu" and torch.cpu._is_amx_tile_supported()
    if args.dtype == "bfloat16" or args.dtype == "auto" and fast:
        job.dtype = torch.bfloat16
    print(f"dtype {job.dtype}, device {job.device}, {job.ranks} process(es)")
    return job


def autocast(job):
    """Context in which matrix products run in the job's dtype."""
    half = job.dtype != torch.float32
    return torch.autocast(torch.device(job.device).type, job.dtype, enabled=half)


def all_sum(x):
    """Replace a tensor by its sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)


def gather(x, rows, total):
    """All processes' rows of a tensor (total, ...); x holds those of this one, `rows`."""
    if not dist.is_initialized():
        return x
    whole = x.new_zeros(total, *x.shape[1:])
    whole[rows] = x
    all_sum(whole)                               # elsewhere the others' rows are 0
    return whole


def barrier():
    """Wait for all processes."""
    all_sum(torch.zeros(1))


def first_rank_first(load, job):
    """load() in the first process, then in the others, which find what it downloads or trains."""
    if job.rank:
        barrier()
    result = load()
    if job.rank == 0:
        barrier()
    return result


BUILT_IN = ("shapes", "cifar10", "cifar100", "imagenet")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """-h shows the docstring as it stands, and each default."""

    def _get_help_string(self, action):
        # Where the default is None, the text tells what is taken instead.
        return action.help if action.default is None else super()._get_help_string(action)


def base_parser():
    """The flags of every script; a parent of its parser."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = parser.add_argument_group("data and run").add_argument
    add("--data", default="shapes", help=", ".join(BUILT_IN) + ", or a folder of images")
    add("--data-dir", default="data",
        help="where CIFAR's folder lies, or is downloaded to; ImageNet's folder of train and val")
    add("--out", help="folder of the run's files (out/<data>)")
    add("--seed", type=int, default=0, help="of weights, batches and samples")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu, mps")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="of matrix products; auto: bfloat16 on CUDA and on CPUs with AMX, else float32")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="threads per process that decode image files")
    return parser


def parse_flags(parser, argv):
    """The flags. In paths of folders ~ is the home folder, and --data is a whole path."""
    args = parser.parse_intermixed_args(argv)    # paths may stand before and after flags
    if args.data not in BUILT_IN:
        args.data = str(Path(args.data).expanduser().resolve())
    args.data_dir = str(Path(args.data_dir).expanduser())
    args.out = Path(args.out or Path("out") / Path(args.data).name).expanduser()
    return args


def add_settings(parser, title, settings, preset):
    """One flag per field of a dataclass (see setting). A preset may change the default."""
    add = parser.add_argument_group(title).add_argument
    for f in fields(settings):
        how = dict(type=f.type)
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif f.type is tuple:
            how = dict(type=float, nargs=len(f.default))
        if f.metadata:                           # others are no flags
            add("--" + f.name.replace("_", "-"), **how, help=f.metadata["help"],
                default=preset.get(f.name, f.default))


def config_from_flags(config_class, args, **known):
    """The config of the flags that add_settings made, and of values that are known."""
    flags = {f.name: getattr(args, f.name) for f in fields(config_class) if f.name not in known}
    return config_class(**flags, **known)


def run_script(main, parse_args, argv=None):
    """main(parse_args(argv)). What the user can mend is told in one line, with exit code 2."""
    code = 2
    try:
        main(parse_args(argv))
        code = 0
    except (UserError, OSError) as error:        # OSError: a missing file, a full disk, no network
        print(f"error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("error: out of memory: take a smaller --micro-batch or --batch-size",
              file=sys.stderr)
    if dist.is_initialized():
        # gloo's threads may abort Python's own exit (1 of 36 runs), so leave without it.
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)
