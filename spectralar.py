"""SpectralAR (arXiv 2506.10962): an image as a short sequence of frequency tokens, coarse to fine, and a GPT over them.

Read from top to bottom:
  1. spectrum     DCT, low-pass sub-images, which token owns which band
  2. masks        who may attend to whom
  3. transformer  one block, for the encoder, the decoder and the generator
  4. quantizer    vectors -> codes
  5. tokenizer    image <-> codes, nested: the first i codes give the i-th sub-image
  6. generator    class -> codes, one after the other
  7. checkpoints  load_tokenizer, load_gpt

Shapes: B batch, S image side, P patches, p patch side, N tokens, K codebook size, d code width, D model width,
H heads, G levels decoded in one pass, T sequence length.
"""
import hashlib
import math
import os
import pickle
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(ValueError):
    """A mistake of the user's, told in one line; the scripts print it and exit with 2."""


class FailedRun(RuntimeError):
    """A run that cannot go on, told in one line; the scripts exit with 1."""


# ------------------------------------------------------------------------------------------------------------------
# 1. spectrum (paper, section 3.2)

@lru_cache(maxsize=64)
def dct_matrix(n, dtype=torch.float32, device=None):
    """(n, n) orthonormal DCT-II: row k is the cosine of frequency k.

    dct_matrix(n) @ signal is the signal's spectrum. The matrix is kept for later calls: never write to it.
    """
    # kept because each training step needs it a dozen times, and each copy to a GPU makes it wait
    # not an inference tensor: a later training step could not use it
    with torch.inference_mode(False):
        k = torch.arange(n, dtype=torch.float64)
        C = torch.cos(math.pi / n * k[:, None] * (k + 0.5)) * math.sqrt(2 / n)
        C[0] /= math.sqrt(2)
        return C.to(device, dtype)


def _at_least_float32(x):
    """Never half precision: bf16 would lose the high bands."""
    return x if x.dtype == torch.float64 else x.float()


def dct2(x):
    """2-D spectrum over the last two dims: D = C x C^T. Orthonormal, so energy is kept (Parseval)."""
    with torch.autocast(x.device.type, enabled=False):
        x = _at_least_float32(x)
        rows, cols = (dct_matrix(n, x.dtype, x.device) for n in x.shape[-2:])
        return rows @ x @ cols.mT


def idct2(X):
    """Inverse of dct2: C^T X C."""
    with torch.autocast(X.device.type, enabled=False):
        X = _at_least_float32(X)
        rows, cols = (dct_matrix(n, X.dtype, X.device) for n in X.shape[-2:])
        return rows.mT @ X @ cols


def low_pass(x, window):
    """The sub-image I_i = C^T (D o 1_w) C: keep the top-left w x w square of the spectrum (section 3.2).

    x (B, C, S, S); window: int, or (B,) one for each image. low_pass(x, 1) is the mean colour, low_pass(x, S) is x.
    """
    S = x.shape[-1]
    window = torch.as_tensor(window, device=x.device).reshape(-1, 1, 1, 1)
    inside = torch.arange(S, device=x.device) < window      # (B or 1, 1, 1, S)
    sub_image = idct2(dct2(x) * (inside.mT & inside))
    return torch.where(window >= S, x.to(sub_image.dtype), sub_image)


def band_edges(num_tokens, image_size, power):
    """(N,) long: w_i, the side of the spectral window of the first i tokens; non-decreasing, the last is image_size.

    NOTE the paper (Eq. 9) leaves its mapping's constants open; here w_i = round(S (i/N)^power), at least 1.
    power 1 is the paper's uniform mapping; above 1 early tokens own narrow low bands and late ones wide high bands;
    0.5 gives every token as many new frequencies (w_i^2 grows evenly).
    band_edges(4, 32, 1) = [8, 16, 24, 32]; band_edges(4, 32, 2) = [2, 8, 18, 32].
    """
    if num_tokens > image_size ** 2:
        raise UserError(f"{num_tokens} tokens for the {image_size ** 2} frequencies of a {image_size} px image: "
                        f"use at most {image_size ** 2} tokens (--num-tokens)")
    if not power > 0:
        raise UserError(f"the mapping's power is {power}: it must be above 0 (--power), 1 is uniform")
    i = torch.arange(1, num_tokens + 1, dtype=torch.float64)
    return (image_size * (i / num_tokens) ** power).round().long().clamp(1, image_size)


# ------------------------------------------------------------------------------------------------------------------
# 2. masks (paper, section 3.3 and Figure 2); True = the row's token may attend to the column's

def causal_mask(T):
    """(T, T): position t sees positions 0 .. t."""
    return torch.ones(T, T, dtype=torch.bool).tril()


def encoder_mask(P, N, flat=False, figure=False):
    """(P+N, P+N) for [P patches ; N queries]: patches see patches, query i sees all patches and queries 1 .. i.

    flat: everyone sees everyone (a TiTok-like tokenizer).
    NOTE in the paper's Figure 2 the patches also see the queries. From the second layer on query j would then hear
    later queries through the patches, and code j would change with them; figure=True brings that mask back.
    """
    mask = torch.ones(P + N, P + N, dtype=torch.bool)
    if not flat:
        mask[P:, P:] = causal_mask(N)
        mask[:P, P:] = figure
    return mask


def decoder_mask(P, N, levels, flat=False):
    """(B, T, T) for [N codes ; P mask tokens of each of G levels], T = N + G P; levels (B, G) long, 1 .. N.

    Code i sees codes 1 .. i. A mask token of level l sees codes 1 .. l and the mask tokens of its own group, so the
    groups are blind to each other and one pass decodes several levels of an image as if each were alone.
    flat: codes 1 .. l and all mask tokens see each other (one level only).
    """
    B, G = levels.shape
    code = torch.arange(N, device=levels.device)
    group = torch.arange(G, device=levels.device).repeat_interleave(P)          # (G P,) of each mask token
    if flat:
        if G != 1:
            raise ValueError(f"a flat tokenizer decodes one level in a pass, not {G}")
        columns = torch.cat([code < levels, code.new_ones(B, P, dtype=torch.bool)], 1)
        return columns[:, None].expand(B, N + P, N + P)
    last_code = torch.cat([(code + 1).expand(B, N), levels[:, group]], 1)       # (B, T) codes that each row sees
    group = torch.cat([code.new_full((N,), -1), group])                         # (T,)   -1: a code, in no group
    same_group = (group[:, None] == group[N:]).expand(B, -1, -1)                # (B, T, G P)
    return torch.cat([code < last_code[:, :, None], same_group], 2)


# ------------------------------------------------------------------------------------------------------------------
# 3. transformer

def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v for q (B, H, T, d) and k, v (B, H, T', d); mask bool, or the same as 0 and -inf."""
    if q.is_cuda or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # NOTE on CPU scaled_dot_product_attention has a slow backward: these lines are 4 times faster in bf16 at T = 160
    scores = (q * q.shape[-1] ** -0.5) @ k.mT                                   # (B, H, T, T')
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


def additive(mask, like):
    """A bool mask as 0 and -inf in the dtype that attention will run in; made once for all layers."""
    device = like.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)


class Attention(nn.Module):
    """Multi-head self-attention with LayerNorm on queries and keys (QK-norm)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads)
        self.k_norm = nn.LayerNorm(width // heads, bias=False)  # one would shift all scores of a query alike: no effect
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None, cache=None, start=0):
        """x (B, T, D); cache (2, B, H, N, D/H) of earlier keys and values: x stands at positions start .. start+T-1."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # each (B, H, T, D/H)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cache is not None:
            cache[:, :, :, start:start + T] = torch.stack([k, v])
            k, v = cache[:, :, :, :start + T]                                   # (B, H, start+T, D/H)
        x = attention(q, k, v, mask).transpose(1, 2).reshape(B, T, D)
        return self.proj(x)


class Block(nn.Module):
    """Pre-norm transformer block; if conditional, a condition (B, D) shifts, scales and gates both halves (AdaLN)."""

    def __init__(self, width, heads, conditional=False):
        super().__init__()
        self.attn_norm = nn.LayerNorm(width, elementwise_affine=not conditional)
        self.attn = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=not conditional)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width) if conditional else None

    def modulate(self, condition):
        """(B, D) -> six (B, 1, D): shift, scale, gate of the attention, then of the MLP. Depends on the class alone."""
        return self.modulation(condition)[:, None].chunk(6, -1)

    def forward(self, x, mask=None, modulation=None, cache=None, start=0):
        if modulation is None:
            x = x + self.attn(self.attn_norm(x), mask, cache, start)
            return x + self.mlp(self.mlp_norm(x))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        h = torch.addcmul(shift_a, self.attn_norm(x), 1 + scale_a)
        x = x + gate_a * self.attn(h, mask, cache, start)
        h = torch.addcmul(shift_m, self.mlp_norm(x), 1 + scale_m)
        return x + gate_m * self.mlp(h)


def check_sizes(config):
    """UserError when a size of a model is below 1, or the heads do not share the width evenly."""
    for name, value in asdict(config).items():
        if type(value) is int and value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1 (--{name.replace('_', '-')})")
    if config.width % config.heads:
        raise UserError(f"width {config.width} is not divisible by {config.heads} heads: change --width or --heads")


# ------------------------------------------------------------------------------------------------------------------
# 4. quantizer (paper, section 3.3; l2-normalised codes as in ViT-VQGAN and TiTok)

class VectorQuantizer(nn.Module):
    """Nearest of K unit vectors, straight-through gradient, always float32 (bf16 loses codes).

    A code is dead once its moving share of use falls below 5 % of an even share: it is then re-seeded with a random
    encoder output of the batch. All codes start dead, so the first batch initialises the codebook.
    """
    commitment, decay, dead = 0.25, 0.95, 0.05

    def __init__(self, codebook_size, code_dim):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(codebook_size, code_dim))
        self.register_buffer("usage", torch.zeros(codebook_size))               # 1 = an even share

    def nearest(self, z):
        """Unit vectors z (..., d) -> codes (...) long: for unit vectors the nearest has the largest dot product."""
        with torch.autocast(z.device.type, enabled=False):
            return (z @ F.normalize(self.codebook, dim=-1).T).argmax(-1)

    def vectors(self, codes):
        """codes (...) -> unit vectors (..., d)."""
        return F.embedding(codes, F.normalize(self.codebook, dim=-1))

    def forward(self, z):
        """Unit z (B, N, d) -> quantized (B, N, d), codes (B, N), loss = |e - sg z|^2 + 0.25 |z - sg e|^2 (mean)."""
        codes = self.nearest(z.detach())
        e = self.vectors(codes)
        loss = F.mse_loss(e, z.detach()) + self.commitment * F.mse_loss(z, e.detach())
        return z + (e - z).detach(), codes, loss

    @torch.no_grad()
    def update(self, z, codes):
        """After a step, z (n, d) and codes (n,) of its whole batch: track use; dead codes become random rows of z.

        A new code gets a full share of use, so that it has time to live. NOTE all that is random is drawn on the CPU:
        ranks that were given the same batch and seed stay alike.
        """
        K = len(self.usage)
        share = torch.bincount(codes, minlength=K) * (K / len(codes))
        self.usage.lerp_(share.to(self.usage), 1 - self.decay)
        dead = self.usage < self.dead
        pick = torch.randint(len(z), (K,)).to(z.device)
        self.codebook.copy_(torch.where(dead[:, None], z[pick], self.codebook))
        self.usage.masked_fill_(dead, 1.0)


# ------------------------------------------------------------------------------------------------------------------
# 5. tokenizer (paper, section 3.3)

def sine_positions(side, width):
    """(side * side, width): sines and cosines of y and of x at width/4 frequencies, of the queries' size (std 0.5)."""
    frequency = 100 ** (-torch.arange(width // 4) / (width // 4))
    y, x = (g.reshape(-1, 1) * frequency for g in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], 1) / math.sqrt(2)


@dataclass
class TokenizerConfig:
    image_size: int = 32       # S, pixels
    patch_size: int = 4        # p, pixels
    num_tokens: int = 16       # N
    codebook_size: int = 512   # K
    code_dim: int = 16         # d
    width: int = 192           # D, of encoder and decoder
    depth: int = 4             # blocks in the encoder, and in the decoder
    heads: int = 6
    power: float = 1.5         # of the token-frequency mapping, see band_edges
    flat: bool = False         # the baseline: one level, bidirectional masks

    def __post_init__(self):
        check_sizes(self)
        if self.image_size % self.patch_size:
            raise UserError(f"image side {self.image_size} is not divisible by patch side {self.patch_size}: "
                            f"change --image-size or --patch-size")
        if self.codebook_size > 65536:
            raise UserError(f"codebook size {self.codebook_size} is above 65536, the most that uint16 codes can name")
        if self.width % 4:
            raise UserError(f"width {self.width} is not divisible by 4, as 2-D positions need: change --width")
        band_edges(self.num_tokens, self.image_size, self.power)

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


class SpectralTokenizer(nn.Module):
    """Image in [-1, 1] <-> N codes; the codes 1 .. i alone give the i-th sub-image low_pass(image, edges[i-1])."""
    decoder_parts = ("from_code", "code_pos", "mask_tokens", "level_embed", "decoder", "decoder_norm", "to_pixels")

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        P, N, D, pixels = c.num_patches, c.num_tokens, c.width, 3 * c.patch_size ** 2
        self.patch_embed = nn.Linear(pixels, D)
        self.patch_pos = nn.Parameter(torch.empty(P, D))
        self.queries = nn.Parameter(torch.empty(N, D))
        self.encoder = nn.ModuleList(Block(D, c.heads) for _ in range(c.depth))
        self.encoder_norm = nn.LayerNorm(D)
        self.to_code = nn.Linear(D, c.code_dim)

        self.quantizer = VectorQuantizer(c.codebook_size, c.code_dim)

        self.from_code = nn.Linear(c.code_dim, D)
        self.code_pos = nn.Parameter(torch.empty(N, D))
        self.mask_tokens = nn.Parameter(torch.empty(P, D))                      # one for each patch: its position
        self.level_embed = nn.Parameter(torch.empty(N, D))
        self.decoder = nn.ModuleList(Block(D, c.heads) for _ in range(c.depth))
        self.decoder_norm = nn.LayerNorm(D)
        self.to_pixels = nn.Linear(D, pixels)

        self.register_buffer("encoder_bias", encoder_mask(P, N, c.flat), persistent=False)
        self.register_buffer("edges", band_edges(N, c.image_size, c.power), persistent=False)
        self.init_weights()

    def init_weights(self):
        """
        Linear.weight                  Xavier uniform (MAE)
        Linear.bias                    0
        patch positions, mask tokens   2-D sine and cosine (MAE), learned from there
        queries, code positions        normal, std 0.5: queries that start alike stay alike for long
        level embedding                0
        codebook                       set from the first batch (VectorQuantizer); normal, std 1 until then
        LayerNorm                      weight 1, bias 0
        """
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for p in (self.patch_pos, self.mask_tokens):
            p.data.copy_(sine_positions(self.config.image_size // self.config.patch_size, self.config.width))
        for p in (self.queries, self.code_pos):
            nn.init.normal_(p, std=0.5)
        nn.init.zeros_(self.level_embed)
        nn.init.normal_(self.quantizer.codebook)

    def patchify(self, images):
        """(B, 3, S, S) -> (B, P, 3 p p), patches in raster order."""
        return F.unfold(images, self.config.patch_size, stride=self.config.patch_size).mT

    def unpatchify(self, patches):
        """Inverse of patchify."""
        c = self.config
        return F.fold(patches.mT, c.image_size, c.patch_size, stride=c.patch_size)

    def encode_vectors(self, images):
        """(B, 3, S, S) -> (B, N, d): the encoder's outputs at the queries as unit vectors, before quantization."""
        S = self.config.image_size
        if images.shape[1:] != (3, S, S):
            raise ValueError(f"images are {tuple(images.shape)}, this tokenizer reads (B, 3, {S}, {S}): resize them")
        x = self.patch_embed(self.patchify(images)) + self.patch_pos            # (B, P, D)
        x = torch.cat([x, self.queries.expand(len(x), -1, -1)], 1)              # (B, P+N, D)
        mask = additive(self.encoder_bias, x) if not self.config.flat else None
        for block in self.encoder:
            x = block(x, mask)
        x = x[:, self.config.num_patches:]                                      # (B, N, D)
        return F.normalize(self.to_code(self.encoder_norm(x)).float(), dim=-1)  # (B, N, d)

    def decode_vectors(self, vectors, levels):
        """Code vectors (B, N, d), levels (B, G) -> the G reconstructions of each image (B, G, 3, S, S), in one pass.

        Each is passed through its level's window: a preview cannot hold what its band cannot.
        """
        c, (B, G) = self.config, levels.shape
        codes = self.from_code(vectors) + self.code_pos                         # (B, N, D)
        masks = self.mask_tokens + self.level_embed[levels - 1][:, :, None]     # (B, G, P, D)
        x = torch.cat([codes, masks.flatten(1, 2)], 1)                          # (B, N + G P, D)
        mask = additive(decoder_mask(c.num_patches, c.num_tokens, levels, c.flat)[:, None], x)
        for block in self.decoder:
            x = block(x, mask)
        x = self.to_pixels(self.decoder_norm(x[:, c.num_tokens:]))              # (B, G P, 3 p p)
        x = self.unpatchify(x.unflatten(1, (G, -1)).flatten(0, 1).float())      # (B G, 3, S, S)
        return low_pass(x, self.edges[levels - 1].flatten()).unflatten(0, (B, G))   # (B, G, 3, S, S)

    def forward(self, images, levels):
        """Training: images (B, 3, S, S), levels (B, G) -> reconstructions (B, G, 3, S, S), VQ loss, and for
        VectorQuantizer.update the vectors (B, N, d) and codes (B, N)."""
        z = self.encode_vectors(images)
        vectors, codes, vq_loss = self.quantizer(z)
        return self.decode_vectors(vectors, levels), vq_loss, z.detach(), codes

    def encode(self, images):
        """Images (B, 3, S, S) in [-1, 1] -> codes (B, N) long."""
        return self.quantizer.nearest(self.encode_vectors(images))

    def decode(self, codes, levels=None):
        """codes (B, N) -> (B, 3, S, S). levels: how many codes each image may see; None = all, int, or (B,)."""
        N = self.config.num_tokens
        if codes.shape[1] != N:
            raise ValueError(f"codes are {tuple(codes.shape)}, this tokenizer decodes (B, {N}): pad them, "
                             f"and say by levels how many count")
        levels = torch.as_tensor(N if levels is None else levels, device=codes.device).expand(len(codes))
        if levels.min() < 1 or levels.max() > N:
            raise UserError(f"level {levels.min().item()} .. {levels.max().item()} is outside 1 .. {N}")
        return self.decode_vectors(self.quantizer.vectors(codes), levels[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------------------------
# 6. generator (paper, section 3.4): [C, s_1 .. s_{N-1}] -> s_1 .. s_N

@dataclass
class GPTConfig:
    num_classes: int = 10
    num_tokens: int = 16       # N
    codebook_size: int = 512   # K
    width: int = 256           # D; the paper's d16 is width 1024, depth 16, 16 heads (VAR's rule: width = 64 depth)
    depth: int = 6
    heads: int = 4

    def __post_init__(self):
        check_sizes(self)


class GPT(nn.Module):
    """Causal transformer over codes; the class is its first token and drives AdaLN in each block."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.class_embed = nn.Embedding(c.num_classes + 1, c.width)             # the last row: no class
        self.code_embed = nn.Embedding(c.codebook_size, c.width)                # also the output head (tied)
        self.pos = nn.Parameter(torch.empty(c.num_tokens, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, conditional=True) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, elementwise_affine=False)
        self.norm_modulation = nn.Linear(c.width, 2 * c.width)
        self.register_buffer("causal", causal_mask(c.num_tokens), persistent=False)
        self.init_weights()

    def init_weights(self):
        """
        Linear.weight                        normal, std 0.02
        attn.proj, mlp[2] (into the stream)  normal, std 0.02 / sqrt(2 depth) (GPT-2)
        modulations                          0: each block starts as the identity (DiT's AdaLN-zero)
        Linear.bias                          0
        embeddings, positions                normal, std 0.02
        """
        residual = 0.02 / math.sqrt(2 * self.config.depth)
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                std = 0 if "modulation" in name else residual if name.endswith(("attn.proj", "mlp.2")) else 0.02
                nn.init.normal_(m.weight, std=std)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)
        nn.init.normal_(self.pos, std=0.02)

    def modulations(self, labels):
        """All that depends on the class alone, so once for a sequence: an entry a block, then the last norm's."""
        condition = F.silu(self.class_embed(labels))                            # (B, D)
        return [b.modulate(condition) for b in self.blocks] + [self.norm_modulation(condition)[:, None].chunk(2, -1)]

    def embed(self, codes, labels):
        """codes (B, T-1), labels (B,) -> the input sequence [C, s_1 .. s_{T-1}] (B, T, D)."""
        x = torch.cat([self.class_embed(labels)[:, None], self.code_embed(codes)], 1)
        return x + self.pos[:x.shape[1]]

    def logits(self, x, modulations, caches=None, start=0):
        """Input embeddings x (B, T, D) at positions start .. start+T-1 -> logits (B, T, K) of the codes that follow."""
        T = x.shape[1]
        mask = additive(self.causal[start:start + T, :start + T], x) if T > 1 else None
        for i, block in enumerate(self.blocks):
            x = block(x, mask, modulations[i], None if caches is None else caches[i], start)
        shift, scale = modulations[-1]
        x = torch.addcmul(shift, self.norm(x), 1 + scale)
        return F.linear(x, self.code_embed.weight)                              # (B, T, K)

    def forward(self, codes, labels):
        """Teacher forcing: codes (B, N), labels (B,); label num_classes = no class -> logits (B, N, K).

        The logits at i are of code i, given the class and the codes before i.
        """
        return self.logits(self.embed(codes[:, :-1], labels), self.modulations(labels))

    @torch.no_grad()
    def generate(self, labels, cfg=1.0, cfg_schedule="constant", temperature=1.0, top_k=0, top_p=1.0, prefix=None,
                 seeds=None, cache=True, stop=None):
        """Sample codes (B, N) for labels (B,).

        cfg            guidance: logits = u + s (c - u); 1 = none, 0 = unconditional
        cfg_schedule   s over the tokens, see guidance_scale
        top_k, top_p   keep the k likeliest codes (0 = all); of these the likeliest with a joint probability of top_p
        prefix         (B, k) codes to keep; the other N - k are sampled
        seeds          (B,) one random stream for each image, whatever the batch it is in; None = new ones
        cache          keep keys and values of earlier tokens; False recomputes the prefix at every token (the oracle)
        stop           sample only so many tokens; the codes after them are 0
        """
        c, B, device = self.config, len(labels), labels.device
        seeds = torch.randint(2 ** 62, (B,)) if seeds is None else torch.as_tensor(seeds)
        uniform = uniforms(seeds, c.num_tokens).to(device)                      # (B, N)
        codes = labels.new_zeros(B, c.num_tokens)
        first = 0 if prefix is None else prefix.shape[1]
        if first:
            codes[:, :first] = prefix
        guided = cfg != 1
        if guided:                                                              # conditional and unconditional halves
            labels, codes = torch.cat([labels, torch.full_like(labels, c.num_classes)]), codes.repeat(2, 1)
        modulations = self.modulations(labels)
        shape = (2, len(labels), c.heads, c.num_tokens, c.width // c.heads)
        caches = [modulations[0][0].new_empty(shape) for _ in self.blocks] if cache else None
        for t in range(first, c.num_tokens if stop is None else stop):
            if cache and t > first:                                             # all but the last are in the cache
                x, start = self.code_embed(codes[:, t - 1:t]) + self.pos[t], t  # (rows, 1, D)
            else:
                x, start = self.embed(codes[:, :t], labels), 0                  # (rows, t+1, D)
            logits = self.logits(x, modulations, caches, start)[:, -1].float()  # (rows, K)
            if guided:
                conditional, unconditional = logits.chunk(2)
                s = guidance_scale(cfg, cfg_schedule, t, c.num_tokens)
                logits = unconditional + s * (conditional - unconditional)
            code = sample(logits, uniform[:, t], temperature, top_k, top_p)     # (B,)
            codes[:, t] = code.repeat(1 + guided)
        return codes[:B]


def guidance_scale(cfg, schedule, t, num_tokens):
    """s at token t = 0 .. N-1, with r = t / (N-1) running from 0 to 1:

    constant       s = cfg
    linear         s = 1 + (cfg - 1) r                                    (VAR; its 1.5 is 2.5 here)
    power-cosine   s = 1 + (cfg - 1) (1 - cos(pi r^2.75)) / 2             (RAR, its exponent for RAR-B)
    """
    r = t / max(num_tokens - 1, 1)
    if schedule == "constant":
        return cfg
    if schedule == "linear":
        return 1 + (cfg - 1) * r
    if schedule == "power-cosine":
        return 1 + (cfg - 1) * (1 - math.cos(math.pi * r ** 2.75)) / 2
    raise UserError(f"guidance schedule {schedule!r}: choose constant, linear or power-cosine")


def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """One code for each row by the inverse of the cumulative distribution: logits (B, K), uniform (B,) -> (B,) long."""
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    logits, order = (logits.double() / temperature).sort(dim=-1, descending=True, stable=True)
    p = logits.softmax(-1)
    if top_k:
        p[:, top_k:] = 0
    p = p / p.sum(-1, keepdim=True)
    if top_p < 1:
        p[p.cumsum(-1) - p >= top_p] = 0                                        # the likeliest code always stays
    cumulative = p.cumsum(-1)
    rank = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return order.gather(1, rank.clamp(max=(p > 0).sum(-1, keepdim=True) - 1))[:, 0]


def wrap_int64(n):
    """A Python integer of any size as a signed 64-bit one, modulo 2^64. So every --seed works."""
    return (n + 2 ** 63) % 2 ** 64 - 2 ** 63


def uniforms(seeds, n):
    """seeds (B,) long -> (B, n) float64 in [0, 1), row b a pure function of seeds[b]: SplitMix64, counter-based.

    NOTE torch.Generator on CPU keeps only the lower 32 bits of its seed, and costs a call for each image.
    """
    def mix(z):
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            z = (z ^ ((z >> shift) & ((1 << 64 - shift) - 1))) * factor         # >> is arithmetic: clear the sign bits
        return z ^ ((z >> 31) & ((1 << 33) - 1))
    counter = torch.arange(1, n + 1, device=seeds.device) * -7046029254386353131
    return ((mix(mix(seeds[:, None]) + counter) >> 11) & ((1 << 53) - 1)).double() / 2 ** 53


# ------------------------------------------------------------------------------------------------------------------
# 7. checkpoints: a dict of tensors and plain types, always read with weights_only=True

FORMAT = 2                     # raised when a reader of old files would misread new ones
UNREADABLE = (RuntimeError, EOFError, OSError, AttributeError, KeyError, TypeError, ValueError, pickle.UnpicklingError)


def save_checkpoint(path, kind, **content):
    """Write to a temporary name, then rename: a full disk or a kill leaves the old file intact."""
    temporary = f"{path}.tmp"
    try:
        torch.save(dict(format=FORMAT, kind=kind, **content), temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise FailedRun(f"cannot write {path} ({str(e).splitlines()[0]}): an older one is intact; free disk space, "
                        f"then --resume") from None


def out_of_memory(error):
    """Whether an exception says that memory ran out, be it of Python, of a GPU, or of PyTorch on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error)


def read_checkpoint(path, kind, mmap=False):
    """The checkpoint's dict, on the CPU: on a GPU it would take several times the model's memory.

    mmap: tensors stay in the file until they are used. This is fast when only the flags are needed.
    UserError when the file is missing, truncated, or of another kind or format.
    FailedRun when memory runs out.
    """
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: train it first (train_{kind}.py), or name its folder by --out")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        found = checkpoint["kind"], checkpoint["format"]
    except (MemoryError, *UNREADABLE) as e:
        if out_of_memory(e):
            size = os.path.getsize(path) / 1e9
            raise FailedRun(f"out of memory while reading {path}, {size:.2g} GB: the file may be whole; "
                            f"free some memory, then try again") from None
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:100]
        raise UserError(f"{path} is not a whole checkpoint ({reason}): it is truncated or of another program") from None
    if found != (kind, FORMAT):
        raise UserError(f"{path} holds a {found[0]} of format {found[1]}, not a {kind} of format {FORMAT}")
    return checkpoint


def need(path, found, *keys):
    """UserError that names the first of the keys that a checkpoint lacks."""
    for key in keys:
        if key not in found:
            raise UserError(f"{path} has no {key}, which this version needs: use the version that wrote it, "
                            f"or train anew")


def read_config(config_class, found, path):
    """The config of a checkpoint. UserError that names the first field unknown to this version."""
    for name in found:
        if name not in config_class.__dataclass_fields__:
            raise UserError(f"{path} has {name} {found[name]} in its config, and this version does not know "
                            f"it: use the version that wrote it, or train anew")
    return config_class(**found)


def load_weights(model, found, path):
    """model.load_state_dict(found).

    UserError that names the first weight that is missing, unknown or of another shape.
    """
    own = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    theirs = {name: tuple(weight.shape) for name, weight in found.items()}
    for name in [*own, *theirs]:
        if own.get(name) != theirs.get(name):
            reason = f"{name} of shape {theirs[name]}" if name in theirs else f"no {name}"
            wanted = f"needs it of shape {own[name]}" if name in own else "does not know it"
            raise UserError(f"{path} has {reason}, and this version {wanted}: use the version that wrote it, "
                            f"or train anew")
    model.load_state_dict(found)


def build(model_class, config_class, part, path, device):
    """A model in eval mode from {config, model, ema}: the averaged weights where there are any."""
    need(path, part, "config", "model")
    model = model_class(read_config(config_class, part["config"], path))
    load_weights(model, part.get("ema") or part["model"], path)
    return model.to(device).eval()


def load_tokenizer(path, device="cpu"):
    """SpectralTokenizer of a tokenizer.pt, ready to encode and decode."""
    checkpoint = read_checkpoint(path, "tokenizer")
    return build(SpectralTokenizer, TokenizerConfig, checkpoint, path, device)


def load_gpt(path, device="cpu"):
    """GPT of a gpt.pt, ready to generate."""
    return load_generator(path, device)[0]


def load_generator(path, device="cpu"):
    """(GPT, SpectralTokenizer, class names) of a gpt.pt: it carries the tokenizer of its codes, so one file samples."""
    checkpoint = read_checkpoint(path, "gpt")
    need(path, checkpoint, "tokenizer", "class_names")
    gpt = build(GPT, GPTConfig, checkpoint, path, device)
    tokenizer = build(SpectralTokenizer, TokenizerConfig, checkpoint["tokenizer"], path, device)
    return gpt, tokenizer, checkpoint["class_names"]


def fingerprint(model, without=()):
    """16 hex digits that name a model by its config and weights, leaving out some of its parts."""
    digest = hashlib.sha256(repr(sorted(asdict(model.config).items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.split(".")[0] not in without:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def code_fingerprint(tokenizer):
    """Which codes are these? Named by all that makes them, so that another decoder of the same codes is welcome."""
    return fingerprint(tokenizer, tokenizer.decoder_parts)
