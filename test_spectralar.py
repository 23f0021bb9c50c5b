"""Tests, each against an oracle: a formula, brute force, another tool's numbers, the slow path, a
single process, the uninterrupted run. They run on a CPU and download nothing.

  python -m pytest -q test_spectralar.py                  # all, in four minutes on two cores
  python -m pytest -q test_spectralar.py -k encoder       # those that have "encoder" in their name

Read these five first:

  test_low_pass_is_idempotent_and_nested                  # what a sub-image is
  test_encoder_is_causal                                  # code i depends on no later query
  test_decoder_levels_in_one_pass_equal_each_alone        # why one pass may decode many levels
  test_generate_equals_its_definition                     # guidance, prefix and cache
  test_encoder_leaks_with_the_figures_mask                # why our mask is not the paper's figure

The sections follow the source files: helpers, spectralar.py, train_tokenizer.py, train_gpt.py,
sample.py, evaluate.py, README and docs.
"""
import ast
import copy
import gc
import hashlib
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import weakref
import zlib
from argparse import Namespace
from code import InteractiveConsole
from dataclasses import fields, make_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import sample as sample_script
import spectralar
import train_gpt
import train_tokenizer
from sample import sample_seeds
from spectralar import (FORMATS, GPT, Block, FailedRun, GPTConfig, SpectralTokenizer,
                        TokenizerConfig, UserError, VectorQuantizer, attention, band_edges,
                        causal_mask, code_fingerprint, dct2, dct_matrix, decoder_mask,
                        encoder_mask, fingerprint, guidance_scale, idct2, in_window,
                        largest_window, load_generator, load_gpt, load_tokenizer, low_pass,
                        nested_loss, sample_from_logits, sample_levels, save_checkpoint, setting,
                        sub_images, uniforms, wrap64)
from train_tokenizer import (JUDGE, LPIPS, PRESETS, SHAPES, Cifar, Classifier, ClassifierDistance,
                             Discriminator, Folder, Job, Log, Muon, Shapes, any_crop,
                             batch_indices, center_crop, choose_dtype, codebook_use, download,
                             effective_rank, hinge_loss, lecam_loss, load_classifier, lr_at,
                             make_optimizers, matmul_speed, open_folder, optimizer_step,
                             orthogonalize, pick_images, psnr, recompute_blocks, run_script,
                             spread_levels, to_float, to_uint8, update_ema, upright_rgb)

ROOT = Path(__file__).parent
SCRIPTS = {"train_tokenizer.py": train_tokenizer, "train_gpt.py": train_gpt,
           "sample.py": sample_script, "evaluate.py": evaluate}

torch.set_num_threads(1)                # tiny tensors: threads would only cost time

# Intel's MKL reads this when it is first used: products of any shape then round alike, here and in
# the processes that the tests start.
os.environ["MKL_CBWR"] = "AUTO,STRICT"

# -------------------------------------------------------------------------------------------------
# helpers: tiny models and random inputs

SIZES = dict(image_size=16, patch_size=4, num_tokens=6, codebook_size=32, code_dim=8, width=32,
             depth=2, heads=4)
GPT_SIZES = dict(num_classes=10, num_tokens=6, codebook_size=32, width=32, depth=2, heads=4)
S, N, K, D = (SIZES[name] for name in ("image_size", "num_tokens", "codebook_size", "width"))
P = (S // SIZES["patch_size"]) ** 2
NO_CLASS = GPT_SIZES["num_classes"]     # the label that means: no class


def randomized(model, seed=1):
    """In eval mode, with no parameter left at zero: AdaLN and level embeddings start there, and
    would hide bugs."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer(**changes):
    torch.manual_seed(0)
    sizes = SIZES | dict(power=1.0) | changes
    return randomized(SpectralTokenizer(TokenizerConfig(**sizes)))


def tiny_gpt(**changes):
    torch.manual_seed(0)
    return randomized(GPT(GPTConfig(**GPT_SIZES | changes)))


TINY = dict(tokenizer=tiny_tokenizer, gpt=tiny_gpt)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise_images(B, seed=0, dtype=torch.float32):
    return noise(B, 3, S, S, seed=seed, dtype=dtype)


def some_codes(B, seed=0):
    return torch.randint(K, (B, N), generator=torch.Generator().manual_seed(seed))


def number_changed(codes, i):
    """Codes (B, N) with another one at place i, from 0."""
    return (codes + (torch.arange(N) == i)) % K


# -------------------------------------------------------------------------------------------------
# helpers: the scripts as from the command line

def as_flags(sizes):
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())


COMMON = "--steps 6 --batch-size 8 --warmup 2 --eval-images 16"
WIDTHS = as_flags({name: SIZES[name] for name in ("width", "depth", "heads")})
FLAGS = {train_tokenizer: f"{COMMON} {as_flags(SIZES)}",
         train_gpt: f"{COMMON} {WIDTHS} --code-images 64",
         sample_script: "--seed 1", evaluate: ""}
TRAINING = pytest.mark.parametrize(
    "script, kind", [(train_tokenizer, "tokenizer"), (train_gpt, "gpt")],
    ids=["tokenizer", "gpt"])
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]                        # Windows has no SIGHUP


@pytest.fixture(scope="module", autouse=True)
def no_benchmark():
    """The scripts time matrix products to choose their dtype. Here both are as fast: float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer, "matmul_speed", lambda *_: 1e12)
        yield


def call(script, out, flags=""):
    """A script as from the command line, with pytest's own signal handlers put back."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    words = shlex.split(f"{FLAGS[script]} --device cpu --out {shlex.quote(str(out))} {flags}")
    try:
        run_script(script.main, script.parse_args(words))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def error_of(capsys, script, out, flags="", code=2):
    """What a refused command prints on stderr: one line, after the usage if it is argparse's."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        call(script, out, flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == code
    assert len(lines) == 1 or lines[0].startswith("usage:")
    return lines[-1]


def start(script, out, flags="", launcher=(), **environment):
    """A script as a process of its own."""
    words = shlex.split(f"{FLAGS.get(script, '')} --device cpu --out {shlex.quote(str(out))} "
                        f"--dtype float32 {flags}")
    return subprocess.Popen([sys.executable, *launcher, script.__file__, *words], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=os.environ | dict(OMP_NUM_THREADS="1") | environment)


def start_torchrun(script, out, flags):
    """A script as two processes under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--"]
    return start(script, out, flags, launcher)


def start_ranks(script, out, flags):
    """Two processes with the environment that torchrun gives them, without its start-up time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    return [start(script, out, flags, RANK=rank, LOCAL_RANK=rank, **together) for rank in "01"]


def finish(*processes):
    """Wait until processes have ended, each without an error."""
    for process in processes:
        text = process.communicate(timeout=300)[0]
        assert process.returncode == 0, text


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def kill(process):
    """As kill -9."""
    process.kill()
    process.communicate()


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


def copy_without(trained, folder, kind):
    """A copy of the tiny run that lacks one of its two checkpoints."""
    return shutil.copytree(trained, folder, ignore=shutil.ignore_patterns(f"{kind}.pt"))


def read_log(path):
    """The log's records about steps. (Others tell of the run, and of evaluations.)"""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if "ms" in record]


def read_saved(path):
    return torch.load(path, weights_only=True)


def leaves(content, name=""):
    """{path: leaf} of nested dicts, lists and tuples."""
    if isinstance(content, dict):
        entries = content.items()
    elif isinstance(content, (list, tuple)):
        entries = enumerate(content)
    else:
        return {name: content}
    found = {}
    for key, value in entries:
        found.update(leaves(value, f"{name}.{key}"))
    return found


def assert_same(path, other, tolerance=0.0, without=("args",)):
    """Two checkpoints hold the same in all parts, whatever their names. Only flags may differ."""
    one, two = read_saved(path), read_saved(other)
    for name in without:
        del one[name], two[name]
    one, two = leaves(one), leaves(two)
    assert one.keys() == two.keys()
    for name, a in one.items():
        b = two[name]
        if not isinstance(a, torch.Tensor):
            assert a == b, (name, a, b)
            continue
        assert a.shape == b.shape and a.dtype == b.dtype, name
        worst = (a.double() - b.double()).abs().amax().item() if a.numel() else 0.0
        # Adam's first steps are as large for a gradient that is all rounding. Some of the
        # discriminator's gradients are.
        allowed = tolerance * (20 if name.startswith(".discriminator") else 1)
        assert worst <= allowed, (name, worst)


# =================================================================================================
# spectralar.py 1: spectrum

def test_dct2_equals_its_definition():
    n = 5
    x = noise(n, n, dtype=torch.float64)

    def wave(k, i):
        return math.sqrt((2 if k else 1) / n) * math.cos(math.pi * (2 * i + 1) * k / (2 * n))

    spectrum = dct2(x)
    for u, v in np.ndindex(n, n):
        expected = sum(x[i, j].item() * wave(u, i) * wave(v, j) for i, j in np.ndindex(n, n))
        assert abs(spectrum[u, v] - expected) < 1e-12


def test_dct2_equals_scipy():
    """scipy.fft.dctn(x, norm="ortho") of scipy 1.17.1."""
    x = torch.arange(16, dtype=torch.float64).view(4, 4) ** 2 % 7 / 4
    expected = torch.tensor([
        [1.8125, 0.264794639386959, -0.3125, -0.17733104339604602],
        [0.014010672786498918, -0.5593592167691146, -0.5716212971334146, 0.21652913087920392],
        [-0.1875, -0.23677329381396117, 0.4375, 0.5716212971334146],
        [0.19714512686868438, -0.658470869120796, -0.23677329381396117, 0.05935921676911449]],
        dtype=torch.float64)
    assert torch.allclose(dct2(x), expected, atol=1e-14)


@pytest.mark.parametrize("n", [1, 7, 32])
def test_dct_is_orthonormal_and_inverted(n):
    C = dct_matrix(n, torch.float64)
    x = noise(2, 3, n, n, dtype=torch.float64)
    assert torch.allclose(C @ C.T, torch.eye(n, dtype=torch.float64), atol=1e-13)
    assert torch.allclose(dct2(x).square().sum(), x.square().sum(), rtol=1e-12)     # Parseval
    assert torch.allclose(idct2(dct2(x)), x, atol=1e-12)


def test_spectrum_stays_float32_under_autocast():
    x = noise_images(2)
    with torch.autocast("cpu", torch.bfloat16):
        spectrum = dct2(x)
        blurred = low_pass(x, 5)
    assert torch.equal(spectrum, dct2(x))
    assert torch.equal(blurred, low_pass(x, 5))
    assert low_pass(x.bfloat16(), 5).dtype == torch.float32


def test_dct_matrices_are_made_once(monkeypatch):
    """They were made anew on the CPU a dozen times per step, and a GPU waited for each copy."""
    dct_matrix.cache_clear()
    x = noise_images(2)
    with torch.inference_mode():
        expected = low_pass(x, 5)

    def cos(*args):
        raise AssertionError("a DCT matrix is made again")
    monkeypatch.setattr(torch, "cos", cos)
    assert torch.equal(low_pass(x, 5), expected)
    # Matrices that were made in inference mode must serve a training step, too.
    x.requires_grad_()
    low_pass(x, 5).square().sum().backward()
    assert torch.allclose(x.grad, 2 * expected, atol=1e-5)
    monkeypatch.undo()
    # One matrix per dtype and device.
    assert dct_matrix(S).dtype == torch.float32
    assert dct_matrix(S, torch.float64).dtype == torch.float64
    assert dct_matrix(S, device="meta").is_meta


def test_window_is_the_square_of_low_frequencies():
    windows = [1, 3, 5, 8]
    together = in_window(8, torch.tensor(windows))
    assert together.shape == (4, 8, 8) and together.dtype == torch.bool
    for window, mask in zip(windows, together):
        assert torch.equal(mask, in_window(8, window))
        for u, v in np.ndindex(8, 8):
            assert mask[u, v] == (u < window and v < window)
    assert in_window(8, largest_window(8)).all()


def test_low_pass_is_idempotent_and_nested():
    """A smaller window takes nothing from a larger one but what the image itself would give."""
    x = noise_images(2, dtype=torch.float64)
    for small, large in ((1, 2), (3, 11), (5, 16), (7, 7)):
        expected = low_pass(x, small)
        assert torch.allclose(low_pass(low_pass(x, large), small), expected, atol=1e-12)


def test_low_pass_keeps_the_mean_at_one_and_all_at_the_image_side():
    x = noise_images(2)
    mean = x.mean((2, 3), keepdim=True)
    assert torch.equal(low_pass(x, S), x)
    assert torch.allclose(low_pass(x, 1), mean.expand_as(x), atol=1e-6)


def test_low_pass_of_many_windows_equals_each_alone():
    x = noise_images(4)
    windows = [1, 5, S, 12]
    alone = torch.cat([low_pass(x[i:i + 1], window) for i, window in enumerate(windows)])
    assert torch.allclose(low_pass(x, torch.tensor(windows)), alone, atol=1e-6)


def triangle(image_size, window, device=None):
    """Another window: the frequencies with row + column < window."""
    frequency = torch.arange(image_size, device=device)
    return frequency[:, None] + frequency < torch.as_tensor(window, device=device)[..., None, None]


def largest_triangle(image_size):
    return 2 * image_size - 1


@torch.no_grad()
def test_another_window_is_an_edit_of_two_functions(monkeypatch):
    """in_window and largest_window alone know the window's shape: sub-images, mapping, tokenizer
    and the octaves of evaluate.py follow them."""
    for module in (spectralar, evaluate):
        monkeypatch.setattr(module, "in_window", triangle)
        monkeypatch.setattr(module, "largest_window", largest_triangle)

    # Sub-images: the mean at 1, the image at the largest window, nested, by brute force.
    x = noise_images(2, dtype=torch.float64)
    assert torch.equal(low_pass(x, 2 * S - 1), x)
    assert torch.allclose(low_pass(x, 1), x.mean((2, 3), keepdim=True).expand_as(x), atol=1e-12)
    assert torch.allclose(low_pass(low_pass(x, 20), 9), low_pass(x, 9), atol=1e-12)
    spectrum = dct2(low_pass(x, torch.tensor([9, 20])))
    for u, v in np.ndindex(S, S):
        for image, window in enumerate((9, 20)):
            kept = dct2(x)[image, :, u, v] if u + v < window else torch.zeros(3).double()
            assert torch.allclose(spectrum[image, :, u, v], kept, atol=1e-12)

    # The mapping ends at the new largest window, and the tokenizer at the whole image.
    assert band_edges(4, 8, 1).tolist() == [4, 8, 11, 15]
    model = tiny_tokenizer()
    assert model.edges[-1] == 2 * S - 1
    codes = some_codes(3)
    for level in range(1, N + 1):
        image = model.decode(codes, level)
        assert torch.allclose(low_pass(image, model.edges[level - 1]), image, atol=1e-5)

    # The octave of a frequency: the number of windows that do not hold it is row + column.
    octaves = evaluate.octaves.__wrapped__(8)               # without the cache
    assert octaves[0].tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    assert octaves[5].tolist() == [3, 3, 3, 4, 4, 4, 4, 4]


# -------------------------------------------------------------------------------------------------
# spectralar.py 2: mapping

@pytest.mark.parametrize("num_tokens, size, power", [
    (16, 32, 1.5), (64, 256, 2), (1, 8, 3), (64, 9, 0.5), (64, 16, 4)])
def test_band_edges_grow_from_one_to_the_image(num_tokens, size, power):
    edges = band_edges(num_tokens, size, power)
    assert edges.shape == (num_tokens,)
    assert edges[0] >= 1 and edges[-1] == size
    assert (edges.diff() >= 0).all()
    for i, edge in enumerate(edges.tolist(), 1):
        exact = size * (i / num_tokens) ** power
        assert abs(edge - exact) <= 0.5 or (edge == 1 and exact < 1)


def test_band_edges_are_uniform_at_power_one():
    assert band_edges(4, 32, 1).tolist() == [8, 16, 24, 32]
    assert band_edges(4, 32, 2).tolist() == [2, 8, 18, 32]


def test_band_edges_are_those_of_their_docstring():
    """The worked example, and how many new coefficients each token brings."""
    edges = band_edges(16, 32, 1.5)
    assert edges.tolist() == [1, 1, 3, 4, 6, 7, 9, 11, 14, 16, 18, 21, 23, 26, 29, 32]
    text = " ".join(band_edges.__doc__.split())
    assert " ".join(str(edge) for edge in edges.tolist()) in text
    new = F.pad(edges ** 2, (1, 0)).diff().tolist()
    first, last = (" ".join(map(str, part)) for part in (new[:6], new[-2:]))
    assert f"{first} ... {last}" in text


@pytest.mark.parametrize("num_tokens, power, named", [
    (65, 1, "64"), (4, 0, "power"), (4, -1, "power")])
def test_band_edges_refuse_what_no_mapping_can_be(num_tokens, power, named):
    with pytest.raises(UserError, match=named):
        band_edges(num_tokens, 8, power)


# -------------------------------------------------------------------------------------------------
# spectralar.py 3 and 4: masks, attention

@pytest.mark.parametrize("flat, figure", [(False, False), (True, False), (False, True)])
def test_encoder_mask_equals_brute_force(flat, figure):
    patches, queries = 3, 4
    mask = encoder_mask(patches, queries, flat, figure)
    for row, column in np.ndindex(*mask.shape):
        if flat or column < patches:
            sees = True
        elif row < patches:
            sees = figure
        else:
            sees = column <= row
        assert mask[row, column] == sees


@pytest.mark.parametrize("levels, flat", [
    ([[4, 2, 1], [3, 3, 4]], False), ([[4], [2], [1]], False), ([[4], [2], [1]], True)])
def test_decoder_mask_equals_brute_force(levels, flat):
    patches, codes = 3, 4
    mask = decoder_mask(patches, codes, torch.tensor(levels), flat)
    T = codes + len(levels[0]) * patches
    assert mask.shape == (len(levels), T, T)
    for b, row, column in np.ndindex(*mask.shape):
        own_level = (row - codes) // patches                # negative: a code
        other_level = (column - codes) // patches
        if flat:
            sees = other_level >= 0 or column < levels[b][0]
        elif own_level < 0:
            sees = column <= row
        elif other_level >= 0:
            sees = own_level == other_level
        else:
            sees = column < levels[b][own_level]
        assert mask[b, row, column] == sees, (b, row, column)


def test_attention_equals_pytorchs():
    """With gradients a CPU takes other lines than without. Both must equal the plain formula."""
    q, k, v = noise(3, 2, 4, 5, 8).requires_grad_()
    some = noise(2, 1, 5, 5) > 0
    some = some | torch.eye(5, dtype=torch.bool)            # each row sees something
    for mask, causal in ((None, False), (causal_mask(5), False), (None, True), (some, False)):
        sees = causal_mask(5) if causal else mask
        scores = q @ k.mT / math.sqrt(8)
        if sees is not None:
            scores = scores.masked_fill(~sees, -math.inf)
        expected = scores.softmax(-1) @ v
        pytorchs = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        found = attention(q, k, v, mask, causal)
        assert torch.allclose(found, expected, atol=1e-6)
        assert torch.allclose(found, pytorchs, atol=1e-6)
        with torch.no_grad():
            assert torch.allclose(attention(q, k, v, mask, causal), expected, atol=1e-6)


# -------------------------------------------------------------------------------------------------
# spectralar.py 5: quantizer

def quantizer(codes=K, width=8):
    torch.manual_seed(0)
    vq = VectorQuantizer(codes, width)
    vq.init_weights()
    vq.usage.fill_(1.0)                                     # all alive
    return vq


def test_quantizer_finds_the_nearest_by_brute_force():
    """The inputs are the encoder's raw outputs: the quantizer brings them to unit length."""
    vq = quantizer()
    z = 3 * noise(50, 3, 8)
    quantized, codes, loss = vq(z)
    unit = F.normalize(z.double(), dim=-1)
    table = F.normalize(vq.codebook.detach(), dim=-1).double()
    assert torch.equal(codes, (unit[:, :, None] - table).norm(dim=-1).argmin(-1))
    assert torch.equal(codes, vq.nearest(z))
    assert torch.allclose(quantized.double(), table[codes], atol=1e-6)
    assert torch.allclose(vq.vectors(codes).double(), table[codes], atol=1e-6)
    expected = (unit - table[codes]).square().mean()
    assert torch.allclose(loss.double(), expected, rtol=1e-5)


def test_quantizer_passes_the_gradient_straight_through():
    """As if the nearest code had been the unit vector itself."""
    vq = quantizer()
    w = noise(5, 3, 8, seed=1)
    z, other = (noise(5, 3, 8).requires_grad_() for _ in range(2))
    (vq(z)[0] * w).sum().backward()
    (F.normalize(other, dim=-1) * w).sum().backward()
    assert torch.equal(z.grad, other.grad) and z.grad.any()
    assert vq.codebook.grad is None


def test_quantizer_loss_moves_codes_alone():
    """A loss that pulls the encoder towards its codes kept one CIFAR-10 run in four dimensions."""
    vq = quantizer()
    z = noise(5, 3, 8).requires_grad_()
    _, codes, loss = vq(z)
    loss.backward()
    table = vq.codebook.detach().clone().requires_grad_()
    e = F.normalize(table, dim=-1)[codes]
    (F.normalize(z.detach(), dim=-1) - e).square().mean().backward()
    assert torch.allclose(vq.codebook.grad, table.grad, atol=1e-7)
    assert z.grad is None or not z.grad.any()


def test_quantizer_is_float32_under_autocast():
    vq = quantizer(1024, 16)
    z = noise(200, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, codes, loss = vq(z)
    assert torch.equal(codes, vq(z)[1])
    assert torch.equal(quantized, vq(z)[0])
    assert loss.dtype == torch.float32


@torch.no_grad()
def test_encode_searches_in_float32_under_autocast():
    """encode() once kept its search in bf16, and gave other codes than forward()."""
    model = tiny_tokenizer()
    model.quantizer = quantizer(1024)
    images = noise_images(64)
    with torch.autocast("cpu", torch.bfloat16):
        codes = model.encode(images)
        vectors = model.encode_vectors(images)
        trained_on = model(images, torch.full((64, 1), N))[3]
    assert torch.equal(codes, trained_on)
    assert torch.equal(codes, model.quantizer(vectors)[1])


@torch.no_grad()
def test_quantizer_revives_dead_codes_and_leaves_live_ones():
    vq = quantizer(4)
    axes = torch.eye(8)
    z = axes[:3].repeat(10, 1, 1) + 0.1 * noise(10, 3, 8)   # three clusters
    vq.codebook.copy_(torch.cat([axes[:3], -axes[:1]]))     # a code each; none chooses the fourth
    for step in range(100):
        vq.update(z.flatten(0, 1), vq(z)[1].flatten())
        if vq.codebook[3, 0] != -1:
            break
    assert step == 58                                       # 0.95^59 is the first below 5 %
    # It is one of the unit vectors now, and in use.
    assert (F.normalize(z, dim=-1) == vq.codebook[3]).all(-1).any()
    assert (vq(z)[1] == 3).any()
    assert torch.equal(vq.codebook[:3], axes[:3])


@torch.no_grad()
def test_quantizer_starts_from_the_first_batch():
    torch.manual_seed(0)
    vq = VectorQuantizer(K, 8)
    vq.init_weights()
    old = vq.codebook.clone()
    z = noise(50, 8)
    vq.update(z, torch.zeros(50, dtype=torch.long))         # all chose code 0, which alone stays
    assert torch.equal(vq.codebook[0], old[0])
    assert (vq.codebook[1:, None] == F.normalize(z, dim=-1)).all(-1).any(1).all()


# -------------------------------------------------------------------------------------------------
# spectralar.py 6: tokenizer

def test_patchify_is_in_raster_order_and_inverted():
    model = tiny_tokenizer()
    images = noise_images(2)
    patches = model.patchify(images)
    assert torch.equal(patches[:, 5], images[:, :, 4:8, 4:8].flatten(1))
    assert torch.equal(model.unpatchify(patches), images)


@torch.no_grad()
def disturbed(model, j):
    """(vectors, codes) of 32 images, before and after query j (from 0) is replaced."""
    images = noise_images(32)
    before = model.encode_vectors(images), model.encode(images)
    model.queries[j] = 3 * noise(D, seed=5)
    after = model.encode_vectors(images), model.encode(images)
    return before, after


@pytest.mark.parametrize("j", [1, 3, N - 1])
def test_encoder_is_causal(j):
    """A reshape where a permute is meant, or patches that see queries, leak later queries into
    earlier codes."""
    (vectors, codes), (new_vectors, new_codes) = disturbed(tiny_tokenizer(), j)
    assert torch.equal(vectors[:, :j], new_vectors[:, :j])
    assert torch.equal(codes[:, :j], new_codes[:, :j])
    assert (vectors[:, j:] != new_vectors[:, j:]).any(-1).all()


def test_encoder_leaks_with_the_figures_mask():
    """In the paper's Figure 2 patches see queries: the last query then changes the first code."""
    model = tiny_tokenizer()
    model.encoder_mask = encoder_mask(P, N, figure=True)
    (vectors, codes), (new_vectors, new_codes) = disturbed(model, N - 1)
    assert (vectors != new_vectors).any(-1).all()
    assert (codes[:, :-1] != new_codes[:, :-1]).any()


@torch.no_grad()
def test_shorter_tokenizer_gives_a_prefix_of_the_codes():
    long, short = tiny_tokenizer(), tiny_tokenizer(num_tokens=4)
    state = long.state_dict()
    for name in ("queries", "code_pos", "level_embed"):
        state[name] = state[name][:4]
    short.load_state_dict(state)
    images = noise_images(32)
    assert torch.equal(short.encode(images), long.encode(images)[:, :4])
    found, expected = (F.normalize(m.encode_vectors(images)[:, :4], dim=-1) for m in (short, long))
    assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("flat", [False, True])
def test_decoder_level_ignores_later_codes(flat):
    model = tiny_tokenizer(flat=flat)
    codes = some_codes(4)
    for level in range(1, N + 1):
        image = model.decode(codes, level)
        later = torch.cat([codes[:, :level], (codes[:, level:] + 1) % K], 1)
        assert torch.equal(image, model.decode(later, level)), level
        own = number_changed(codes, level - 1)
        assert not torch.equal(image, model.decode(own, level)), level
        # And it stays within its window.
        assert torch.allclose(low_pass(image, model.edges[level - 1]), image, atol=1e-5)


@torch.no_grad()
def test_decoder_levels_in_one_pass_equal_each_alone():
    """A training step decodes two levels of each image in one pass."""
    model = tiny_tokenizer()
    codes = some_codes(4)
    levels = torch.tensor([[6, 1], [6, 3], [6, 5], [2, 2]])
    together = model.decode_vectors(model.quantizer.vectors(codes), levels)     # (4, 2, 3, S, S)
    for b, g in np.ndindex(4, 2):
        alone = model.decode(codes[b:b + 1], levels[b, g].item())[0]
        assert torch.allclose(together[b, g], alone, atol=1e-5)
        assert torch.allclose(model.decode(codes, levels[:, g])[b], alone, atol=1e-5)


@torch.no_grad()
def test_flat_tokenizer_sees_all():
    (vectors, _), (new_vectors, _) = disturbed(tiny_tokenizer(flat=True), N - 1)
    assert (vectors != new_vectors).any(-1).all()           # the last query reaches every vector

    model = tiny_tokenizer(flat=True)
    codes, hidden = some_codes(1), []

    def note(module, inputs, output):
        hidden.append(output[0])
    model.decoder[-1].register_forward_hook(note)
    model.decode(codes)
    model.decode(number_changed(codes, N - 1))
    assert (hidden[0] != hidden[1]).any(-1).all()           # the last code reaches every position


@torch.no_grad()
def test_tokenizer_refuses_other_images_and_levels():
    model = tiny_tokenizer()
    with pytest.raises(ValueError, match=re.escape("(2, 3, 8, 8)")):
        model.encode(noise(2, 3, 8, 8))
    with pytest.raises(UserError, match=re.escape("level 0 .. 7 is outside 1 .. 6")):
        model.decode(some_codes(2), torch.tensor([0, N + 1]))


# -------------------------------------------------------------------------------------------------
# spectralar.py 7: the nested objective

def test_training_levels_and_loss_equal_their_definition():
    """A training step decodes the full level and one random shorter one of every image."""
    torch.manual_seed(0)
    drawn = sample_levels(500, N)
    assert (drawn[:, 0] == N).all()
    assert set(drawn[:, 1].tolist()) == set(range(1, N))
    assert sample_levels(2, N, full_only=True).tolist() == [[N], [N]]
    assert sample_levels(2, 1).tolist() == [[1], [1]]

    images = noise(3, 3, 8, 8)
    recon = noise(3, 2, 3, 8, 8, seed=1)
    levels = torch.tensor([[4, 1], [4, 2], [4, 3]])
    edges = band_edges(4, 8, 1)                             # 2 4 6 8
    targets = sub_images(images, levels, edges)
    squares, largest = 0.0, 0.0
    for b, g in np.ndindex(3, 2):
        target = low_pass(images[b:b + 1], 2 * levels[b, g].item())[0]
        assert torch.allclose(targets[b, g], target, atol=1e-6)
        squares += (recon[b, g] - target).square().mean() / 3
        largest += (recon[b, g] - target).max() / 3

    def largest_difference(a, b):                           # one number per image
        return (a - b).amax((1, 2, 3))
    assert torch.allclose(nested_loss(recon, targets), squares, rtol=1e-5)
    assert torch.allclose(nested_loss(recon, targets, largest_difference), largest, rtol=1e-5)


def overfit(model, lr, steps, loss_of):
    """The losses of some steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    losses = []
    for _ in range(steps):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_tokenizer_overfits_eight_images():
    torch.manual_seed(0)
    model = SpectralTokenizer(TokenizerConfig(**SIZES | dict(width=64, power=1.0)))
    images = to_float(Shapes("train", S).batch(torch.arange(8))[0])
    passes = []

    def loss():
        levels = sample_levels(8, N)
        if passes:
            model.quantizer.update(*passes[-1])             # after the last step
        recon, vq_loss, z, codes = model(images, levels)
        passes.append((z.detach().flatten(0, 1), codes.flatten()))
        return nested_loss(recon, sub_images(images, levels, model.edges)) + vq_loss
    losses = overfit(model, 2e-3, 300, loss)
    assert np.mean(losses[-10:]) < losses[0] / 12


# -------------------------------------------------------------------------------------------------
# spectralar.py 8: generator

@torch.no_grad()
def test_gpt_is_causal():
    model, codes, labels = tiny_gpt(), some_codes(4), torch.arange(4)
    logits = model(codes, labels)
    for i in range(N):
        new = model(number_changed(codes, i), labels)
        assert torch.equal(new[:, :i + 1], logits[:, :i + 1])       # the logits at i are of code i
        assert (new[:, i + 1:] != logits[:, i + 1:]).any(-1).all()
    assert (model(codes, labels + 1) != logits).any(-1).all()


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 3])
def test_gpt_cached_logits_equal_uncached(first):
    """first: positions in the first pass; then one pass per position."""
    model, codes, labels = tiny_gpt(), some_codes(4), torch.arange(4)
    x = model.embed(codes[:, :-1], labels)
    modulations = model.modulations(labels)
    caches = model.new_caches(4, torch.float32)
    logits = [model.logits(x[:, :first], modulations, caches, 0)]
    for t in range(first, N):
        logits.append(model.logits(x[:, t:t + 1], modulations, caches, t))
    assert torch.allclose(torch.cat(logits, 1), model(codes, labels), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 1, 4, N])
@pytest.mark.parametrize("cfg, schedule", [
    (1.0, "constant"), (0.0, "constant"), (3.0, "constant"), (3.0, "linear")])
def test_generate_equals_its_definition(cfg, schedule, kept):
    """The oracle runs the whole sequence again for each token, with and without the class."""
    model, labels, seeds = tiny_gpt(), torch.arange(8), torch.arange(8) + 100
    prefix = some_codes(8)[:, :kept]
    expected = F.pad(prefix, (0, N - kept))
    for t in range(kept, N):
        conditional = model(expected, labels)[:, t]
        unconditional = model(expected, torch.full_like(labels, NO_CLASS))[:, t]
        s = 1 + (cfg - 1) * t / (N - 1) if schedule == "linear" else cfg
        logits = unconditional + s * (conditional - unconditional)
        expected[:, t] = sample_from_logits(logits, uniforms(seeds, N)[:, t])
    for cache in (True, False):
        found = model.generate(labels, cfg, schedule, prefix=prefix, seeds=seeds, cache=cache)
        assert torch.equal(found, expected)


def test_guidance_one_is_none_and_zero_is_unconditional():
    model, labels, seeds = tiny_gpt(), torch.arange(10), torch.arange(10)
    none = model.generate(labels, seeds=seeds)
    unconditional = model.generate(torch.full_like(labels, NO_CLASS), seeds=seeds)
    assert torch.equal(model.generate(labels, cfg=1, seeds=seeds), none)
    assert torch.equal(model.generate(labels, cfg=0, seeds=seeds), unconditional)
    assert not torch.equal(none, unconditional)
    assert not torch.equal(none, model.generate(labels, cfg=4, seeds=seeds))


def test_guidance_schedules_equal_their_formulas():
    for schedule, at_half in (("constant", 3), ("linear", 2),
                              ("power-cosine", 2 - math.cos(math.pi * 0.5 ** 2.75))):
        found = [guidance_scale(3.0, schedule, t, 17) for t in (0, 8, 16)]
        assert found == pytest.approx([3 if schedule == "constant" else 1, at_half, 3])
    assert guidance_scale(3.0, "linear", 0, 1) == 1         # one token alone: no division by zero
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
    model, labels, seeds = tiny_gpt(), torch.arange(8), torch.arange(8)
    for prefix in (None, some_codes(8)[:, :2]):
        whole = model.generate(labels, cfg=2, seeds=seeds, prefix=prefix)
        for stop in range(1, N + 1):
            codes = model.generate(labels, cfg=2, seeds=seeds, prefix=prefix, stop=stop)
            stop = max(stop, 0 if prefix is None else 2)    # what is given is never cut
            assert torch.equal(codes[:, :stop], whole[:, :stop])
            assert (codes[:, stop:] == 0).all()


def step_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """{code: probability} that one token is drawn from, code by code from the definition."""
    p = (logits.double() / temperature).softmax(-1)
    likeliest = logits.argsort(descending=True).tolist()[:top_k or None]
    kept, joint = {}, 0.0
    for code in likeliest:
        if joint / p[likeliest].sum() < top_p:
            kept[code] = p[code].item()
            joint += p[code].item()
    return {code: x / joint for code, x in kept.items()}


@torch.no_grad()
@pytest.mark.parametrize("how", [
    dict(), dict(temperature=0.7), dict(top_k=3), dict(temperature=2.0, top_p=0.8),
    dict(temperature=1.5, top_k=4, top_p=0.9, cfg=2.0, cfg_schedule="linear")])
def test_sampled_sequences_are_distributed_as_the_model_says(how):
    """Chi-square of 20,000 sequences of 3 tokens from 5 codes against the exact probability of
    each of the 125 that there are."""
    codes_number, T, n = 5, 3, 20_000
    model = tiny_gpt(num_classes=1, num_tokens=T, codebook_size=codes_number)
    filters = {name: value for name, value in how.items() if not name.startswith("cfg")}
    exact = {(): 1.0}
    for t in range(T):
        longer = {}
        for codes, probability in exact.items():
            sequence = torch.tensor([[*codes, *[0] * (T - t)]])
            conditional, unconditional = (model(sequence, torch.tensor([label]))[0, t]
                                          for label in (0, 1))
            s = 1 + (how.get("cfg", 1) - 1) * t / (T - 1)
            logits = unconditional + s * (conditional - unconditional)
            for code, p in step_probabilities(logits, **filters).items():
                longer[(*codes, code)] = probability * p
        exact = longer

    codes = model.generate(torch.zeros(n, dtype=torch.long), seeds=torch.arange(n), **how)
    place = torch.tensor([25, 5, 1])
    counts = torch.bincount((codes * place).sum(1), minlength=125).double()
    expected = torch.zeros(125, dtype=torch.float64)
    for codes, p in exact.items():
        expected[(torch.tensor(codes) * place).sum()] = n * p
    assert expected.sum() == pytest.approx(n)
    assert (counts[expected == 0] == 0).all()

    # Chi-square wants 5 per bin: the rare sequences share one.
    often, rare = expected >= 5, (expected < 5) & (expected > 0)
    observed, expected = (torch.cat([x[often], x[rare].sum()[None]]) for x in (counts, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi2 = ((observed - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    assert len(expected) > 9
    assert torch.special.gammaincc(degrees, chi2 / 2) > 1e-3


def frequencies(logits, **how):
    """Share of each code over an even grid of random numbers."""
    grid = (torch.arange(20_000).double() + 0.5) / 20_000
    codes = sample_from_logits(logits.expand(20_000, -1), grid, **how)
    return torch.bincount(codes, minlength=len(logits)) / 20_000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_frequencies_equal_probabilities(temperature):
    logits = 2 * noise(12)
    expected = (logits / temperature).softmax(-1)
    assert (frequencies(logits, temperature=temperature) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("how, kept", [
    (dict(top_k=2), [1, 3]), (dict(top_k=9), [0, 1, 2, 3, 4]), (dict(top_p=0.3), [1]),
    (dict(top_p=0.5), [1, 3]), (dict(top_p=0.9), [0, 1, 3, 4]), (dict(top_p=1e-9), [1]),
    (dict(top_k=2, top_p=0.6), [1])])
def test_sample_keeps_the_right_codes(how, kept):
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    expected = torch.zeros(5).index_copy(0, torch.tensor(kept), p[kept])
    assert (frequencies(p.log(), **how) - expected / expected.sum()).abs().max() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("weights", [1, 2, 3])
def test_seed_gives_the_same_image_in_any_batch(weights):
    """In float64, whose rounding flips no code, and near uniform, so that two seeds surely differ:
    the test holds for any weights."""
    model, tokenizer = randomized(tiny_gpt(), weights).double(), tiny_tokenizer()
    labels, seeds = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([8, 9, 10, 11, 12])
    how = dict(cfg=1.5, temperature=50.0)
    together = model.generate(labels, seeds=seeds, **how)
    for order in ([2], [4, 2, 0], [1, 3]):
        codes = model.generate(labels[order], seeds=seeds[order], **how)
        assert torch.equal(codes, together[order])
        images = tokenizer.decode(codes)
        assert torch.allclose(images, tokenizer.decode(together)[order], atol=1e-5)
    assert not torch.equal(together[1], together[3])        # the same class, another seed


@pytest.mark.parametrize("width, depth, expected, tolerance", [
    (1024, 16, 309.6e6, 0.005), (1280, 20, 600e6, 0.1), (1536, 24, 1.0e9, 0.1),
    (1920, 30, 2.0e9, 0.1)])
def test_gpt_has_the_papers_sizes(width, depth, expected, tolerance):
    config = GPTConfig(1000, 64, 4096, width, depth, heads=depth)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=tolerance)


def test_gpt_overfits_eight_sequences():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**GPT_SIZES | dict(width=64)))
    codes, labels = some_codes(8), torch.arange(8)

    def loss():
        return F.cross_entropy(model(codes, labels).flatten(0, 1), codes.flatten())
    losses = overfit(model, 3e-3, 100, loss)
    assert losses[0] == pytest.approx(math.log(K), rel=0.1)
    assert losses[-1] < 0.05
    assert torch.equal(model.eval().generate(labels, top_k=1), codes)


# -------------------------------------------------------------------------------------------------
# spectralar.py 9: checkpoints

def test_checkpoint_round_trip(tmp_path):
    model, path = tiny_tokenizer(), tmp_path / "tokenizer.pt"
    content = dict(config=vars(model.config), model=model.state_dict(), step=3)
    save_checkpoint(path, "tokenizer", **content)
    assert read_saved(path)["step"] == 3 and list(tmp_path.iterdir()) == [path]
    assert not load_tokenizer(path).training
    assert fingerprint(load_tokenizer(path)) == fingerprint(model)
    averages = dict(model.state_dict(), queries=model.queries + 1)
    save_checkpoint(path, "tokenizer", ema=averages, **content)
    assert torch.equal(load_tokenizer(path).queries, model.queries + 1)     # averages win
    assert fingerprint(load_tokenizer(path)) != fingerprint(model)


@pytest.mark.parametrize("damage", ["empty", "100 bytes", "half", "a byte short", "text", "PNG",
                                    "pickle"])
def test_checkpoint_that_is_damaged_is_told_in_one_line(damage, tmp_path):
    path = tmp_path / "tokenizer.pt"
    save_checkpoint(path, "tokenizer", model=tiny_tokenizer().state_dict())
    whole = path.read_bytes()
    damaged = {"empty": b"", "100 bytes": whole[:100], "half": whole[:len(whole) // 2],
               "a byte short": whole[:-1], "text": b"hello world\n",
               "PNG": b"\x89PNG\r\n\x1a\n", "pickle": b"\x80\x02X\x03\x00\x00\x00\xcf\xcf\xcf."}
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"^[^\n]*is not a whole checkpoint[^\n]*$"):
        load_tokenizer(path)


def test_checkpoint_of_another_kind_or_format_or_none_is_told(tmp_path):
    path = tmp_path / "tokenizer.pt"
    version = FORMATS["tokenizer"]
    save_checkpoint(path, "tokenizer", model={})
    with pytest.raises(UserError, match=f"holds a tokenizer of format {version}, not a gpt"):
        load_gpt(path)
    with pytest.raises(UserError, match="absent.pt does not exist"):
        load_tokenizer(tmp_path / "absent.pt")
    # A pickle that runs code.
    torch.save(dict(kind="tokenizer", format=version, config=tmp_path), path)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        load_tokenizer(path)
    torch.save(dict(kind="tokenizer", format=version + 97), path)
    with pytest.raises(UserError, match=f"format {version + 97}"):
        load_tokenizer(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        load_tokenizer(path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("write failed\nat zip.cc:1")])
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


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_lack_of_memory_for_a_checkpoint_is_told_as_such(error, trained, capsys, monkeypatch):
    """A checkpoint too large for the memory was called truncated: a user would have deleted it."""
    def load(*args, **how):
        raise error
    monkeypatch.setattr(torch, "load", load)
    line = error_of(capsys, sample_script, trained, code=1)
    assert "out of memory" in line and "truncated" not in line


def change_version(checkpoint, change):
    """Change a checkpoint as if another version had written it. Returns what differs."""
    if change == "field":
        checkpoint["config"]["rope_base"] = 10000
        return "rope_base"
    weights = [checkpoint["model"], checkpoint["ema"]]
    last = list(weights[0])[-1]
    if change == "no weights":
        del checkpoint["model"], checkpoint["ema"]
        return "model"
    for state in weights:
        if change == "missing":
            del state[last]
        elif change == "unknown":
            state["rope.frequencies"] = torch.ones(3)
        elif change == "shape":
            state[last] = torch.ones(7)
    return "rope.frequencies" if change == "unknown" else last


@pytest.mark.parametrize("change", ["field", "missing", "unknown", "shape", "no weights"])
def test_checkpoint_of_another_version_is_told_in_one_line(change, a_copy, capsys):
    """An unknown config field or a missing weight ended in a traceback. The line names the first
    difference."""
    readers = {"gpt": [(sample_script, ""), (train_gpt, "--resume --steps 9")],
               "tokenizer": [(train_gpt, "--overwrite"), (train_tokenizer, "--resume --steps 9")]}
    for kind, commands in readers.items():
        path = a_copy / f"{kind}.pt"
        checkpoint = read_saved(path)
        differs = change_version(checkpoint, change)
        torch.save(checkpoint, path)
        for script, flags in commands:
            line = error_of(capsys, script, a_copy, flags)
            assert line.startswith("error: ") and path.name in line
            assert differs in line and "version" in line


def test_config_field_that_is_newer_than_a_checkpoint_takes_its_default(tmp_path):
    """So that a new field does not end the life of every checkpoint."""
    model, path = tiny_tokenizer(), tmp_path / "tokenizer.pt"
    config = {name: value for name, value in vars(model.config).items() if name != "flat"}
    save_checkpoint(path, "tokenizer", config=config, model=model.state_dict())
    assert load_tokenizer(path).config == model.config


def with_new_field(config_class):
    """The config of a fork that has one more setting, which is off by default."""
    field = ("rope_base", int, setting(0, "a setting of a fork; 0 = off", least=0))
    return make_dataclass("Forked" + config_class.__name__, [field], bases=(config_class,))


def test_new_config_field_renames_and_refuses_no_old_run(trained, tmp_path, monkeypatch):
    """A field with its default once changed every fingerprint: old codes, generators and runs to
    resume were refused. Now a fork goes on bit for bit, and the field is a flag."""
    before = {}
    for kind, load in (("tokenizer", load_tokenizer), ("gpt", load_gpt)):
        before[kind] = fingerprint(load(trained / f"{kind}.pt"))
    runs = {name: shutil.copytree(trained, tmp_path / name) for name in ("before", "forked")}
    for script in (train_gpt, train_tokenizer):
        call(script, runs["before"], "--resume --steps 8")

    for config_class in (TokenizerConfig, GPTConfig):
        for module in (spectralar, train_tokenizer, train_gpt):
            if hasattr(module, config_class.__name__):
                forked = with_new_field(config_class)
                monkeypatch.setattr(module, config_class.__name__, forked)
    gpt, tokenizer, _ = load_generator(trained / "gpt.pt")
    assert gpt.config.rope_base == tokenizer.config.rope_base == 0
    assert fingerprint(gpt) == before["gpt"]
    assert fingerprint(tokenizer) == before["tokenizer"]
    tokenizer.config.rope_base = 3
    assert fingerprint(tokenizer) != before["tokenizer"]

    for script, kind in ((train_gpt, "gpt"), (train_tokenizer, "tokenizer")):
        call(script, runs["forked"], "--resume --steps 8")
        files = [run / f"{kind}.pt" for run in runs.values()]
        parts = ("args", "config", "tokenizer") if kind == "gpt" else ("args", "config")
        assert_same(*files, without=parts)
        assert read_saved(files[1])["config"]["rope_base"] == 0
        words = ["--device", "cpu", "--rope-base", "5"]
        assert script.parse_args(words).rope_base == 5


# -------------------------------------------------------------------------------------------------
# spectralar.py 10: machinery

def test_uniforms_are_splitmix64():
    mask, gamma = 2 ** 64 - 1, 0x9E3779B97F4A7C15

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)
    assert mix(gamma) == 0xE220A8397B1DCDAF                 # the published first output of seed 0
    seeds = [0, 1, 7, 2 ** 32 + 1, 2 ** 62, -3]
    expected = []
    for seed in seeds:
        outputs = [mix(mix(seed & mask) + i * gamma & mask) for i in range(1, 6)]
        expected.append([(output >> 11) / 2 ** 53 for output in outputs])
    assert uniforms(torch.tensor(seeds), 5).tolist() == expected


def test_any_integer_wraps_to_64_bits():
    for number in (0, 5, -5, 2 ** 63 - 1, -2 ** 63, 2 ** 63, 2 ** 64 + 3, 10 ** 30, -10 ** 30):
        assert wrap64(number) == np.array(number % 2 ** 64, dtype=np.uint64).astype(np.int64)


# =================================================================================================
# train_tokenizer.py: settings

@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    """A generator without a width is 64 times as wide as it is deep, with a head per block."""
    preset = PRESETS[name]
    sizes = {f.name: preset[f.name] for f in fields(TokenizerConfig)}
    generator = {size: preset["gpt"][size] for size in ("width", "depth", "heads")}
    generator["width"] = generator["width"] or 64 * generator["depth"]
    generator["heads"] = generator["heads"] or generator["depth"]
    with torch.device("meta"):
        SpectralTokenizer(TokenizerConfig(**sizes))
        GPT(GPTConfig(num_classes=10, num_tokens=preset["num_tokens"],
                      codebook_size=preset["codebook_size"], **generator))


@pytest.mark.parametrize("config_class", [TokenizerConfig, GPTConfig])
def test_config_refuses_sizes_that_do_not_fit(config_class):
    with pytest.raises(UserError, match="not divisible by 5 heads"):
        config_class(width=32, heads=5)
    with pytest.raises(UserError, match="--depth is 0: it must be at least 1"):
        config_class(depth=0)


# -------------------------------------------------------------------------------------------------
# the run, end to end

@torch.no_grad()
def test_scripts_run_end_to_end(trained):
    assert {file.name for file in trained.iterdir()} == {
        "tokenizer.pt", "gpt.pt", "codes-train.npy", "codes-val.npy", "codes.json",
        "log-tokenizer.jsonl", "log-gpt.jsonl", "recon.png", "samples.png"}
    tokenizer = load_tokenizer(trained / "tokenizer.pt")
    gpt, carried, names = load_generator(trained / "gpt.pt")
    assert fingerprint(tokenizer) == fingerprint(carried)
    assert names == list(SHAPES)
    assert gpt.config == GPTConfig(**GPT_SIZES)
    for split, number, sides in (("train", 64, 2), ("val", 16, 1)):
        records = np.load(trained / f"codes-{split}.npy")
        assert len(records) == number
        data = Shapes(split, S)
        images, labels = data.batch(pick_images(len(data), number))
        views = [tokenizer.encode(to_float(x)) for x in (images, images.flip(-1))[:sides]]
        assert np.array_equal(records["codes"], torch.stack(views, 1))
        assert np.array_equal(records["label"], labels + 1)         # 0 means: not encoded yet


def test_flat_run_trains_and_samples(tmp_path):
    """The baseline decodes level N alone, in training, evaluation and pictures."""
    call(train_tokenizer, tmp_path, "--flat")
    call(train_gpt, tmp_path)
    records = (tmp_path / "log-tokenizer.jsonl").read_text().splitlines()
    assert list(json.loads(records[-1])["psnr_image"]) == [str(N)]
    assert load_generator(tmp_path / "gpt.pt")[1].config.flat
    height = Image.open(tmp_path / "recon.png").height
    assert height == 2 + 3 * (64 + 2)                       # images, targets, reconstructions


def test_run_that_diverges_names_the_term(tmp_path, capsys):
    line = error_of(capsys, train_tokenizer, tmp_path, "--lr 1e30 --log-every 1", code=1)
    assert re.match("failed: (loss|rec|vq|norm) is (nan|inf) by step [1-6]", line)
    assert not list(tmp_path.glob("*.pt"))


class Views:
    """A data set that returns views of its images, not copies."""
    class_names = ["a", "b"]

    def __init__(self):
        pixels = np.random.RandomState(0).randint(0, 256, (64, 3, S, S))
        self.images = torch.from_numpy(pixels.astype(np.uint8))

    def __len__(self):
        return len(self.images)

    def batch(self, indices, crops=None):
        return self.images[:len(indices)], torch.as_tensor(indices) % 2


def test_training_leaves_the_images_of_a_data_set_alone(tmp_path, monkeypatch):
    """Mirror images were made in place: a data set that returns views was changed."""
    data = Views()
    before = data.images.clone()
    monkeypatch.setattr(train_tokenizer, "open_data", lambda *_: (data, data))
    call(train_tokenizer, tmp_path)
    assert torch.equal(data.images, before)


def test_finetuned_decoder_keeps_the_codes(trained, tmp_path, capsys):
    """--finetune-decoder trains the decoder alone, so the generator's codes stay valid."""
    source, out = trained / "tokenizer.pt", tmp_path / "out"
    call(train_tokenizer, out, f"--finetune-decoder {source} --image-size 99")  # sizes: the file's
    old, new = load_tokenizer(source), load_tokenizer(out / "tokenizer.pt")
    images = to_float(Shapes("val", S).batch(range(20))[0])
    assert torch.equal(old.encode(images), new.encode(images))
    assert code_fingerprint(old) == code_fingerprint(new)
    assert fingerprint(old) != fingerprint(new)
    for (name, a), b in zip(old.named_parameters(), new.parameters()):
        assert torch.equal(a, b) == (name.split(".")[0] not in old.decoder_parts), name

    # Either decoder may show the generator's samples.
    shutil.copy(trained / "gpt.pt", out)
    shown = []
    for tokenizer in (out / "tokenizer.pt", source):
        call(sample_script, out, f"--num 4 --tokenizer {tokenizer}")
        shown.append(np.array(Image.open(out / "samples.png")).astype(int))
    assert abs(shown[0] - shown[1]).max() > 0

    # A resumed run still trains the decoder alone, and nothing else can go on from it.
    call(train_tokenizer, out, "--resume --steps 9")
    assert code_fingerprint(load_tokenizer(out / "tokenizer.pt")) == code_fingerprint(old)
    line = error_of(capsys, train_tokenizer, out, "--resume --steps 12 --finetune-decoder ''")
    assert "resume with the flags of its start" in line


def test_perceptual_loss_takes_a_classifier_of_the_data(tmp_path, capsys, monkeypatch):
    """--perceptual-net: trained once, then read; never the judge's."""
    monkeypatch.setattr(train_tokenizer.train_classifier, "__defaults__", (2, 8))
    net = tmp_path / "new" / "net.pt"
    flags = f"--perceptual 0.5 --perceptual-net {net} --steps 2 --log-every 1"
    logs = []
    for out in ("a", "b"):
        call(train_tokenizer, tmp_path / out, flags)
        assert ("training a classifier" in capsys.readouterr().out) == (out == "a")
        logs.append(read_log(tmp_path / out / "log-tokenizer.jsonl"))
    assert len(logs[0]) == len(logs[1]) == 2
    for a, b in zip(*logs):
        total = a["rec"] + a["vq"] + 0.5 * a["perceptual"]
        assert a["loss"] == b["loss"] == pytest.approx(total, rel=1e-5)
    assert a["perceptual"] > 0.1
    call(train_tokenizer, tmp_path / "late", f"{flags} --perceptual-start 1")
    late = read_log(tmp_path / "late" / "log-tokenizer.jsonl")
    assert ["perceptual" in record for record in late] == [False, True]
    call(train_gpt, tmp_path / "a")
    line = error_of(capsys, evaluate, tmp_path / "a", f"generation --num 20 --classifier {net}")
    assert "is of widths" in line and "name another file" in line


# -------------------------------------------------------------------------------------------------
# evaluation on held-out images

def test_codebook_use_by_hand():
    codes = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1]])
    used, perplexity, by_position = codebook_use(codes, 4)

    def of(*shares):
        return math.exp(-sum(share * math.log(share) for share in shares))
    assert used == 0.5 and perplexity == pytest.approx(of(3 / 8, 5 / 8))
    assert by_position == pytest.approx([of(1 / 2, 1 / 2), of(1 / 4, 3 / 4)])


def test_effective_rank_by_hand():
    """A line has rank 1, a cross 2, wherever they lie. Arms of 3 and 1 have the shares 3/4 and
    1/4. A point has no more than 1."""
    cross = torch.tensor([[1., 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    stretched = cross * torch.tensor([3., 1, 1])
    assert effective_rank(cross[:2] + 5) == pytest.approx(1)
    assert effective_rank(cross - 7) == pytest.approx(2)
    assert effective_rank(stretched) == pytest.approx(4 / 3 ** 0.75)
    assert effective_rank(cross[:1]) == 1


def test_levels_shown_are_powers_of_two_and_the_last():
    assert spread_levels(16) == [1, 2, 4, 8, 16]
    assert spread_levels(6) == [1, 2, 4, 6]
    assert spread_levels(1) == [1]


# -------------------------------------------------------------------------------------------------
# training loop and batches

@pytest.mark.parametrize("n, batch_size", [(10, 4), (7, 7), (3, 8)])
def test_batches_are_permutations_and_pure(n, batch_size):
    batches = [batch_indices(n, batch_size, step, seed=3) for step in range(2 * n)]
    epochs = torch.cat(batches)[:2 * batch_size * n].view(-1, n)
    assert (epochs.sort(1).values == torch.arange(n)).all()
    assert len(epochs.unique(dim=0)) > 1
    for step in (2 * n - 1, 3, 0):
        assert torch.equal(batch_indices(n, batch_size, step, seed=3), batches[step])
    others = [batch_indices(n, batch_size, step, seed=4) for step in range(2 * n)]
    assert not torch.equal(torch.cat(others), torch.cat(batches))


def test_pick_skips_no_class():
    """Every 20th of the shapes, whose class is i mod 10, would be circles alone."""
    chosen = pick_images(1_000_000, 50_000)
    assert len(chosen.unique()) == 50_000
    assert (chosen.diff() > 0).all() and chosen.max() > 990_000
    assert torch.bincount(chosen % 10, minlength=10).min() > 4500
    assert pick_images(7, 9).tolist() == [*range(7)]


def assert_same_training(path, other, lr, steps):
    """Two runs took the same steps, whatever the machine's rounding.

    AdamW divides a gradient by its own size, so where a gradient is all rounding, a weight moves by
    up to lr in any direction. The optimizers' means are sums of gradients: they differ by rounding
    alone, and by much where a micro-batch is dropped or gradients are not averaged.
    """
    one, two = leaves(read_saved(path)), leaves(read_saved(other))
    assert one.keys() == two.keys()
    means = [name for name in one if name.endswith((".exp_avg", ".mean"))]
    for optimizer in {name.split(".")[1] for name in means}:
        own = [name for name in means if name.startswith(f".{optimizer}.")]
        largest = max(one[name].abs().max() for name in own)
        for name in own:
            worst = (one[name] - two[name]).abs().max()
            assert worst <= 1e-3 * largest, (name, worst, largest)
    weights = [name for name in one if name.startswith((".model.", ".ema.", ".discriminator."))]
    for name in weights:
        worst = (one[name] - two[name]).abs().max()
        assert worst <= 2 * lr * steps, (name, worst)


@TRAINING
def test_ranks_and_passes_train_as_one_process_does(script, kind, a_copy, tmp_path):
    """Adversarial loss and codebook statistics included; batches, levels, crops and label drops
    are the same, and so is each term of the log."""
    lr, steps = 1e-4, 4
    flags = f"--steps {steps} --lr {lr} --log-every 1 --overwrite"
    if kind == "tokenizer":
        flags += " --gan 0.5 --gan-start 2"
    first, *others = [shutil.copytree(a_copy, tmp_path / name)
                      for name in ("1x8", "1x4", "2x4", "2x2")]
    processes = []
    for out in others[1:]:
        micro_batch = out.name[-1]
        processes += start_ranks(script, out, f"{flags} --micro-batch {micro_batch}")
    call(script, first, flags)
    call(script, others[0], f"{flags} --micro-batch 4")
    finish(*processes)

    differ = {"ms", "images_per_second", "mfu", "data", "memory_gb", "eta_hours"}
    logs = {out: read_log(out / f"log-{kind}.jsonl") for out in (first, *others)}
    for out in others:
        assert_same_training(first / f"{kind}.pt", out / f"{kind}.pt", lr, steps)
        assert len(logs[first]) == len(logs[out]) == steps
        for one, other in zip(logs[first], logs[out]):
            assert one.keys() == other.keys()
            for term in one.keys() - differ:
                expected = pytest.approx(one[term], rel=1e-3, abs=1e-3)
                assert other[term] == expected, (out.name, one["step"], term)


# -------------------------------------------------------------------------------------------------
# optimizer and averaged weights

@pytest.mark.parametrize("kind", TINY)
def test_optimizer_holds_every_parameter_once(kind):
    model = TINY[kind]()
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    blocks = (m for m in model.modules() if isinstance(m, Block))
    hidden = {id(m.weight) for b in blocks for m in (b.attn.qkv, b.attn.proj, b.mlp[0], b.mlp[2])}
    for muon in (True, False):
        args = Namespace(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, muon=muon)
        optimizers = make_optimizers(model, args, Job("cpu"))
        groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
        held = [id(p) for group in groups for p in group["params"]]
        assert len(held) == len(set(held))
        assert set(held) == {id(p) for p in model.parameters()}
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        assert decayed == linear
        by_muon = {id(p) for group in groups if "momentum" in group for p in group["params"]}
        assert by_muon == (hidden if muon else set())


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)])
def test_muon_equals_torchs(shape):
    """In bfloat16 ours does what torch.optim.Muon does, and in float32 nearly so."""
    torch.manual_seed(0)
    ours, exact, theirs = ([torch.nn.Parameter(torch.ones(shape)) for _ in range(3)]
                           for _ in range(3))
    optimizers = [
        Muon(ours, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16),
        Muon(exact, lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    for _ in range(4):
        for same in zip(ours, exact, theirs):
            gradient = torch.randn(shape)
            for p in same:
                p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, c in zip(ours, exact, theirs):
        assert (c - 1).abs().max() > 0.01
        assert torch.allclose(a, c, rtol=0, atol=1e-6)
        assert torch.allclose(b, c, rtol=0, atol=2e-3)


def test_orthogonalize_keeps_directions_and_evens_out_their_lengths():
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(5, 12, 40), full_matrices=False)
    lengths = torch.logspace(0, -2, 12)
    x = orthogonalize(u * lengths @ v)
    kept = u.mT @ x @ v.mT                              # in the basis of its singular vectors
    diagonal = kept.diagonal(dim1=1, dim2=2)
    assert 0.68 < diagonal.min() and diagonal.max() < 1.21
    assert (kept - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert not orthogonalize(torch.zeros(1, 3, 2)).any()


def test_optimizer_step_clips_and_keeps_each_groups_own_rate():
    """A fork's group with an lr_scale keeps it: every group's rate was once overwritten."""
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    model = torch.nn.ParameterList([a, b])
    optimizers = [torch.optim.SGD([dict(params=[a])], lr=1.0),
                  torch.optim.SGD([dict(params=[b], lr_scale=0.1)], lr=1.0)]
    args = Namespace(lr=1.0, warmup=2, hold=1.0, steps=9, clip=1.0)
    (3 * a.sum() + 4 * b.sum()).backward()
    norm = optimizer_step(model, optimizers, 0, args)
    assert norm.item() == pytest.approx(50 ** 0.5)
    assert a.tolist() == pytest.approx([-0.5 * 3 / 50 ** 0.5] * 2, rel=1e-4)    # half the rate yet
    assert b.tolist() == pytest.approx([-0.05 * 4 / 50 ** 0.5] * 2, rel=1e-4)
    assert a.grad is None and b.grad is None
    args.clip = 0                                           # no clipping
    (3 * a.sum()).backward()
    optimizer_step(model, optimizers, 1, args)
    assert a.tolist() == pytest.approx([-0.5 * 3 / 50 ** 0.5 - 3] * 2, rel=1e-4)


def test_lr_at_equals_its_formula():
    args = Namespace(lr=2.0, warmup=10, hold=0.5, steps=110)
    assert [lr_at(step, args) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert [lr_at(step, args) for step in (10, 30, 55)] == [2.0, 2.0, 2.0]
    assert [lr_at(step, args) for step in (82.5, 110, 200)] == pytest.approx([1.1, 0.2, 0.2])
    args.hold = 0.0
    assert lr_at(60, args) == pytest.approx(1.1)            # halfway from warm-up to the end


def test_update_ema_equals_its_closed_form():
    """Of a model with parameters, float buffers and an integer one."""
    model = torch.nn.BatchNorm1d(2)
    ema, expected = copy.deepcopy(model), 0.0
    for step in range(30):
        torch.nn.init.constant_(model.bias, step)
        model.running_mean.fill_(step)
        model.num_batches_tracked.fill_(step)
        update_ema(ema, model, 0.6, step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.bias.tolist() == pytest.approx([expected] * 2)
    assert ema.running_mean.tolist() == ema.bias.tolist()
    assert ema.num_batches_tracked == 29


# What a forward and backward pass of the tiny GPT costs, by hand: two blocks of linear layers,
# attention and AdaLN, then the head and the last norm. Each product costs two operations forward
# and four backward.
GPT_MACS = 2 * (N * 12 * D * D + 2 * N * N * D + 6 * D * D) + N * D * K + 2 * D * D
GPT_FLOPS = 6 * GPT_MACS


def flops_of(model, codes):
    """Operations of a step's losses and gradients, counted by torch."""
    labels = torch.zeros(len(codes), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        train_gpt.generator_losses(model, codes, labels, Job("cpu"))["loss"].backward()
    return counter.get_total_flops()


def kept_bytes(model, codes):
    """Bytes that autograd keeps for the backward pass."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(codes, torch.zeros(len(codes), dtype=torch.long)).square().sum()
    return sum(sizes)


def test_recomputed_blocks_cost_a_third_more_and_keep_less():
    model, codes = tiny_gpt(), some_codes(1)
    flops, kept = flops_of(model, codes), kept_bytes(model, codes)
    assert flops == GPT_FLOPS
    recompute_blocks(model)
    assert flops < flops_of(model, codes) < 4 / 3 * flops
    assert kept_bytes(model, codes) < kept / 2


def test_recomputed_blocks_give_the_same_gradients():
    model, codes = tiny_gpt(), some_codes(3)
    other = copy.deepcopy(model)
    recompute_blocks(other)
    for m in (model, other):
        m(codes, torch.arange(3)).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a.grad, b.grad)


# -------------------------------------------------------------------------------------------------
# checkpoints of a run, and --resume

@TRAINING
@pytest.mark.parametrize("during", ["a step", "a save"])
def test_resume_is_exact(script, kind, during, trained, a_copy, monkeypatch):
    """A run stopped by SIGTERM in its third step, or in the save before it, and resumed ends bit
    for bit where an uninterrupted one does."""
    path = a_copy / f"{kind}.pt"
    path.unlink()
    seed_step, save = script.seed_step, torch.save

    def stop():
        assert callable(signal.getsignal(signal.SIGTERM))   # or the signal would end pytest
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
    assert e.value.code == 1 and read_saved(path)["step"] == 3
    torch.manual_seed(12345)                                # whatever state the new process is in
    call(script, a_copy, "--resume")
    assert_same(trained / path.name, path)


@TRAINING
def test_killed_run_resumes_exactly(script, kind, trained, tmp_path):
    flags = "--steps 60 --save-every 4 --keep 2"
    if kind == "tokenizer":
        flags += " --gan 0.5 --gan-start 5"
    folders = tmp_path / "whole", tmp_path / "killed"
    whole, killed = (copy_without(trained, folder, kind) for folder in folders)
    process = start(script, killed, flags)
    wait_for((killed / f"{kind}.pt").exists, process)
    kill(process)                                           # between steps, in one, or in a save
    assert read_saved(killed / f"{kind}.pt")["step"] in range(4, 60, 4)
    call(script, whole, flags)
    call(script, killed, f"{flags} --resume")
    assert_same(whole / f"{kind}.pt", killed / f"{kind}.pt")
    kept = sorted(file.name for file in killed.glob(f"{kind}-*"))
    assert kept == [f"{kind}-0000056.pt", f"{kind}-0000060.pt"]
    assert_same(killed / kept[-1], killed / f"{kind}.pt")


@TRAINING
def test_stopped_ranks_save_together_and_resume_exactly(script, kind, trained, tmp_path):
    folders = tmp_path / "whole", tmp_path / "stopped"
    whole, stopped = (copy_without(trained, folder, kind) for folder in folders)
    steps = 100 if kind == "tokenizer" else 150
    flags = f"--steps {steps} --log-every 1"
    if kind == "gpt":
        flags += " --zero"
    log = stopped / f"log-{kind}.jsonl"
    log.unlink()
    process = start_torchrun(script, stopped, flags)
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3, process)
    process.send_signal(signal.SIGTERM)                     # to torchrun, which passes it on
    assert "SIGTERM after step" in process.communicate(timeout=60)[0]
    assert read_saved(stopped / f"{kind}.pt")["step"] < steps
    uninterrupted = start_ranks(script, whole, flags)
    resumed = start_ranks(script, stopped, f"{flags} --resume")
    finish(*uninterrupted, *resumed)
    assert_same(whole / f"{kind}.pt", stopped / f"{kind}.pt")


def test_keep_copies_where_there_are_no_hard_links(tmp_path, monkeypatch):
    """--keep ended in a PermissionError on file systems without hard links, such as exFAT."""
    def link(*args, **how):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", link)
    call(train_tokenizer, tmp_path, "--steps 3 --save-every 1 --keep 2")
    kept = sorted(file.name for file in tmp_path.glob("tokenizer-*"))
    assert kept == ["tokenizer-0000002.pt", "tokenizer-0000003.pt"]
    assert_same(tmp_path / "tokenizer-0000003.pt", tmp_path / "tokenizer.pt")


@TRAINING
def test_checkpoint_is_not_kept_while_training(script, kind, a_copy, monkeypatch):
    """train_gpt.py kept the checkpoint that it resumed from for the whole run."""
    load, save = torch.load, torch.save
    averages, alive = [], []

    def watched_load(*a, **how):
        content = load(*a, **how)
        if content.get("step"):
            averages.extend(weakref.ref(x) for x in content["ema"].values())
        return content

    def watched_save(*a, **how):
        gc.collect()
        alive.append(sum(average() is not None for average in averages))
        save(*a, **how)
    monkeypatch.setattr(torch, "load", watched_load)
    monkeypatch.setattr(torch, "save", watched_save)
    call(script, a_copy, "--resume --steps 8")
    assert averages and alive == [0]


@TRAINING
def test_run_does_not_replace_a_checkpoint_unasked(script, kind, a_copy, capsys):
    path = a_copy / f"{kind}.pt"
    before = path.read_bytes()
    for flags, message in (("", "--resume goes on from it, --overwrite replaces it"),
                           ("--resume", "6 steps"),
                           ("--resume --overwrite", "not allowed with argument --resume"),
                           ("--resume --steps 9 --width 64", "width")):
        line = error_of(capsys, script, a_copy, flags)
        assert "error: " in line and message in line
        assert path.read_bytes() == before
    call(script, a_copy, "--overwrite --seed 5")
    assert path.read_bytes() != before


def resumed_from_step(out, kind, step, folder):
    """A copy of a run's folder as it was after a step that --keep left there."""
    shutil.copytree(out, folder, ignore=shutil.ignore_patterns("*-0*.pt", f"{kind}.pt"))
    shutil.copy(out / f"{kind}-{step:07d}.pt", folder / f"{kind}.pt")
    return folder


# Flags that differ from those of the presets.
CHANGED = ("--lr 5e-4 --seed 3 --betas 0.8 0.9 --weight-decay 0.3 --batch-size 6 --hold 0.3 "
           "--ema 0.9 --clip 0.5 --save-every 2 --keep 9")
SIZE_FLAGS = {train_tokenizer: f"{as_flags(SIZES)} --eval-images 16",
              train_gpt: f"{WIDTHS} --code-images 64 --eval-images 16"}


@pytest.fixture(scope="module")
def changed_runs(trained, tmp_path_factory):
    """{kind: folder of a run with CHANGED flags and all its checkpoints}. Tests copy from it."""
    folders = {}
    for script, kind in ((train_tokenizer, "tokenizer"), (train_gpt, "gpt")):
        out = tmp_path_factory.mktemp("changed") / "out"
        folders[kind] = copy_without(trained, out, kind)
        call(script, folders[kind], CHANGED)
    return folders


@TRAINING
def test_resume_takes_the_flags_of_its_run(script, kind, changed_runs, tmp_path, capsys,
                                           monkeypatch):
    """A run of --lr 5e-4 went on at the preset's rate when --resume stood alone. Now it goes on
    bit for bit, from any step."""
    whole = changed_runs[kind]
    monkeypatch.setitem(FLAGS, script, SIZE_FLAGS[script])  # the next test gives not even these
    for step in (2, 4):
        resumed = resumed_from_step(whole, kind, step, tmp_path / str(step))
        capsys.readouterr()
        call(script, resumed, "--resume --steps 6")
        assert "resume: " not in capsys.readouterr().out
        assert_same(whole / f"{kind}.pt", resumed / f"{kind}.pt")


@TRAINING
def test_resume_needs_no_other_flag(script, kind, changed_runs, tmp_path, monkeypatch, capsys):
    """All flags of the run, sizes included, had to be given again."""
    whole = changed_runs[kind]
    monkeypatch.setitem(FLAGS, script, "")
    resumed = resumed_from_step(whole, kind, 2, tmp_path / "resumed")
    call(script, resumed, "--resume")
    assert_same(whole / f"{kind}.pt", resumed / f"{kind}.pt")
    # The size of a pass follows from the new batch.
    capsys.readouterr()
    call(script, resumed, "--resume --steps 8 --batch-size 9")
    assert "1 pass(es) of 9" in capsys.readouterr().out


@TRAINING
def test_resume_tells_what_a_flag_changes(script, kind, changed_runs, tmp_path, monkeypatch,
                                          capsys):
    """A flag that differed from the saved run's was taken, or for --dtype ignored, silently."""
    resumed = resumed_from_step(changed_runs[kind], kind, 2, tmp_path / "resumed")
    monkeypatch.setitem(FLAGS, script, "")
    other, value, before = "dtype", "bfloat16", "float32"
    if kind == "gpt":                       # its codes belong to a dtype, so it cannot change
        other, value, before = "label-drop", "0.2", "0.1"
    capsys.readouterr()
    call(script, resumed, f"--resume --lr 1e-3 --betas 0.5 0.6 --{other} {value} --seed 3")
    told = re.findall("^resume: (.*)", capsys.readouterr().out, re.M)
    assert sorted(told) == ["--betas is [0.5, 0.6] now, it was [0.8, 0.9]",
                            f"--{other} is {value} now, it was {before}",
                            "--lr is 0.001 now, it was 0.0005"]
    saved = read_saved(resumed / f"{kind}.pt")["args"]
    assert (saved["lr"], saved["weight_decay"]) == (1e-3, 0.3)
    assert str(saved[other.replace("-", "_")]) == value


@TRAINING
def test_optimizer_settings_can_be_changed_on_resume(script, kind, trained, tmp_path):
    """--weight-decay and --betas were ignored on --resume, though the checkpoint recorded them."""
    weights = []
    for number, flags in enumerate(("", "--weight-decay 50", "--betas 0.1 0.2")):
        out = shutil.copytree(trained, tmp_path / str(number))
        call(script, out, f"--resume --steps 9 {flags}")
        weights.append(read_saved(out / f"{kind}.pt")["model"])
    same, *changed = weights
    for state in changed:
        assert any(not torch.equal(same[name], state[name]) for name in same)


def test_discriminator_may_be_new_on_resume(a_copy):
    """The adversarial loss can be added to a run that began without it."""
    call(train_tokenizer, a_copy, "--resume --steps 8 --gan 0.5 --log-every 1")
    assert read_log(a_copy / "log-tokenizer.jsonl")[-1]["disc"] > 0
    saved = read_saved(a_copy / "tokenizer.pt")
    assert saved["discriminator"]["logit_means"].any()
    # Beside Muon it learns at a quarter of the rate.
    rates = [saved[name]["param_groups"][0]["lr"] for name in ("discriminator_optimizer", "muon")]
    assert rates[0] == rates[1] / 4 > 0


def as_format_2(path, folder, kind):
    """A copy of a checkpoint as the first versions of this code wrote it: the discriminator's
    parts had another name, the flags held what was worked out at the start. There was no Muon."""
    saved = read_saved(path)
    assert not saved["args"].pop("muon") and "muon" not in saved
    saved["format"] = 2
    for part in ("discriminator", "discriminator_optimizer"):
        if part in saved:
            saved[part.replace("discriminator", "critic")] = saved.pop(part)
    saved["args"] |= dict(rank=0, ranks=1, accumulate=1, micro_batch=8, image_size=S)
    assert {"kind", "config", "args", "step", "model", "ema", "optimizer"} <= saved.keys()
    folder.mkdir(exist_ok=True)
    torch.save(saved, folder / f"{kind}.pt")
    return folder / f"{kind}.pt"


def test_checkpoints_of_format_2_load_and_resume(trained, tmp_path, capsys):
    """Runs of the first versions go on: from step 3 of 6, bit for bit as today's do."""
    whole, old = tmp_path / "whole", tmp_path / "old"
    call(train_tokenizer, whole, "--no-muon --gan 0.5 --save-every 3 --keep 9")
    today = whole / "tokenizer-0000003.pt"
    path = as_format_2(today, old, "tokenizer")
    assert {"critic", "critic_optimizer"} <= read_saved(path).keys()
    assert fingerprint(load_tokenizer(path)) == fingerprint(load_tokenizer(today))
    call(train_tokenizer, old, "--gan 0.5 --resume")
    assert_same(whole / "tokenizer.pt", path)

    shutil.copy(whole / "tokenizer.pt", old)
    call(train_gpt, whole, "--no-muon --save-every 3 --keep 9")
    today = whole / "gpt-0000003.pt"
    path = as_format_2(today, old, "gpt")
    for mine, its in zip(load_generator(path)[:2], load_generator(today)[:2]):
        assert fingerprint(mine) == fingerprint(its)
    call(sample_script, old, "--num 2")
    # Codes of that version have no "format" in their note: they are made anew, without a question.
    (old / "codes.json").write_text(json.dumps(dict(tokenizer="0" * 16, images=64)))
    (old / "codes-train.npy").write_bytes(b"old codes")
    capsys.readouterr()
    call(train_gpt, old, "--resume")
    assert "made anew" in capsys.readouterr().out
    assert_same(whole / "gpt.pt", path)


# -------------------------------------------------------------------------------------------------
# the log, and the plan of --dry-run

def test_log_does_without_git(tmp_path, monkeypatch):
    """Slim containers have no git: the run must start all the same."""
    monkeypatch.setenv("PATH", str(tmp_path))
    Log(tmp_path / "log.jsonl", tiny_gpt(), Namespace(resume=False), Job("cpu"))


def test_log_tells_the_memory_of_the_runs_own_gpu(tmp_path, monkeypatch):
    """A run on cuda:1 logged the memory of cuda:0."""
    def max_memory_allocated(device="cuda:0"):
        return {"cuda:0": 1e9, "cuda:1": 5e9}[str(device)]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", max_memory_allocated)
    args = Namespace(resume=False, batch_size=1, steps=1, lr=1.0, warmup=0, hold=0.0)
    path = tmp_path / "log.jsonl"
    log = Log(path, tiny_gpt(), args, Job("cuda:1"))
    log.add(dict(loss=torch.tensor(1.0)), waited=0.0)
    log.report(1)
    assert read_log(path)[0]["memory_gb"] == 5


def test_log_counts_the_operations_of_a_step(trained):
    """Its share of the machine's speed, mfu, must come from the operations counted by hand."""
    speed = 1e12                                            # of no_benchmark
    for record in read_log(trained / "log-gpt.jsonl"):
        flops = record["mfu"] * speed / record["images_per_second"]
        assert flops == pytest.approx(GPT_FLOPS, rel=1e-6)


@TRAINING
def test_dry_run_plans_and_writes_nothing(script, kind, tmp_path, capsys):
    call(script, tmp_path / "out", "--dry-run --steps 1000 --batch-size 64 --micro-batch 4 "
                                   "--tflops 1 --gpus 2")
    text = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    plan = dict(re.findall(r"^  (\w+) +(.*)$", text[text.index("the plan"):], re.M))
    assert list(plan) == ["parameters", "tokens", "batch", "steps", "compute", "memory", "time",
                          "here"]
    assert "64 images, 32 per GPU" in plan["batch"]
    # The tokenizer sees all images of shapes, the generator 64 that are encoded.
    times = "0.1 x all 1,000,000" if kind == "tokenizer" else "1,000.0 x all 64"
    assert f"1,000, so 0.1 M images: {times}" in plan["steps"]
    assert "a step of 4 images" in plan["here"]
    gflop, total = map(float, re.findall(r"([\d.e+-]+) G?FLOP (?:per image|for)", plan["compute"]))
    assert total == pytest.approx(gflop * 1e9 * 64000, rel=0.01)
    if kind == "gpt":                                       # a dry run takes the preset's tokens
        assert plan["tokens"] == "16 per image, from 512 codes"
        model = GPT(GPTConfig(**GPT_SIZES | dict(num_tokens=16, codebook_size=512)))
        macs = 2 * (16 * 12 * D * D + 2 * 16 * 16 * D + 6 * D * D) + 16 * D * 512 + 2 * D * D
        assert gflop == pytest.approx(6 * macs / 1e9, rel=1e-3)
    else:
        assert plan["tokens"] == f"{N} per image, from {K} codes"
        model = tiny_tokenizer()
    # Weights, averages, gradients and Adam's two moments: five float32 numbers per parameter.
    # Muon has one moment: four numbers.
    matrices = [m.weight for name, m in model.named_modules()
                if isinstance(m, torch.nn.Linear) and (".attn." in name or ".mlp." in name)]
    memory = 20 * sum(p.numel() for p in model.parameters()) - 4 * sum(m.numel() for m in matrices)
    assert float(plan["memory"].split()[0]) == pytest.approx(memory / 1e9, rel=0.01)
    # Five passes of three products, of s x s and s x l numbers, for matrices of s x l, s <= l.
    passes = sum(4 * s * s * l + 2 * s ** 3 for s, l in (sorted(m.shape) for m in matrices))
    muon = float(re.search(r"Muon ([\d.e-]+) GFLOP per step", plan["compute"])[1])
    assert muon == pytest.approx(5 * passes / 1e9, rel=1e-3)
    minutes = float(re.match(r"([\d.]+) min if each GPU reaches 1 TFLOP/s", plan["time"])[1])
    assert minutes == pytest.approx((total / 2 + muon * 1e12) / 1e12 / 60, abs=0.06)


@TRAINING
@pytest.mark.parametrize("data, images, classes", [
    ("imagenet", "1,281,167", "1,000"), ("cifar10", "50,000", "10"),
    ("cifar100", "50,000", "100")])
def test_plan_needs_no_data_set(script, kind, data, images, classes, tmp_path, capsys,
                                monkeypatch):
    """--dry-run refused ImageNet where it is absent, and downloaded CIFAR though it writes
    nothing."""
    def urlopen(*args, **how):
        raise OSError("no network in tests")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    flags = f"--data {data} --data-dir {tmp_path / 'absent'} --dry-run"
    if script is train_tokenizer:
        flags += f" --image-size {S if data == 'imagenet' else 32} --perceptual 0"
    else:
        flags += " --code-images 2000000"
    call(script, tmp_path / "out", flags)
    text = capsys.readouterr().out
    assert f"the plan assumes {images} images of {classes} classes" in text
    assert f"x all {images}" in text
    assert not list(tmp_path.iterdir())


def test_a_plan_leaves_no_matrices_behind(tmp_path):
    """Those that a plan makes held no numbers: kept, they ended up in the next real step."""
    for flags in ("--dry-run", "--steps 2", "--dry-run"):
        call(train_tokenizer, tmp_path / "out", flags)
        assert low_pass(noise_images(1), 5).isfinite().all()


# -------------------------------------------------------------------------------------------------
# processes and devices

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
    monkeypatch.setattr(train_tokenizer, "matmul_speed", matmul_speed)      # not no_benchmark's
    job = Job("cpu")
    with SlowBfloat16() as clock:
        monkeypatch.setattr(time, "perf_counter", lambda: real() + clock.seconds)
        choose_dtype(Namespace(dtype="auto"), job)
        before = clock.seconds
        speed = matmul_speed("cpu", torch.bfloat16)
    assert 0 < before < 1
    assert speed == pytest.approx(2 * 1024 ** 3 / 7.2, rel=0.5)
    assert job.dtype == torch.float32 and "dtype float32 (" in capsys.readouterr().out


def test_dtype_that_is_given_is_the_only_one_measured(tmp_path, monkeypatch):
    """With --dtype float32 the bfloat16 product, slow on many CPUs, was timed all the same."""
    measured = []

    def note(device, dtype, *_):
        measured.append(dtype)
        return 1e12
    monkeypatch.setattr(train_tokenizer, "matmul_speed", note)
    call(train_tokenizer, tmp_path / "out", "--steps 1 --dtype float32")
    assert measured == [torch.float32]


DRIVER = """
import sys, time, urllib.request
sys.path.insert(0, {repository!r})
import train_tokenizer
fetch = urllib.request.urlopen
train_tokenizer.CIFAR["cifar10"]["md5"] = {md5!r}

def slow(url, **how):
    with open({log!r}, "a") as log:
        log.write("fetched\\n")
    time.sleep(2)
    return fetch({archive!r})
urllib.request.urlopen = slow
train_tokenizer.run_script(train_tokenizer.main, train_tokenizer.parse_args())
"""


def test_ranks_download_a_data_set_once(tmp_path):
    """All ranks fetched CIFAR at once into one file: of four processes three died."""
    folder, log = tmp_path / "cifar-10-batches-bin", tmp_path / "log"
    archive, driver = tmp_path / "archive", tmp_path / "driver.py"
    folder.mkdir()
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = np.random.default_rng(0).integers(0, 10, (16, 3073), np.uint8)
        records.tofile(folder / name)
    (folder / "batches.meta.txt").write_text("\n".join(SHAPES))
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, folder.name)
    driver.write_text(DRIVER.format(
        repository=str(ROOT), archive=archive.as_uri(), log=str(log),
        md5=hashlib.md5(archive.read_bytes()).hexdigest()))
    flags = (f"{FLAGS[train_tokenizer]} --data cifar10 --data-dir {tmp_path / 'data'} "
             f"--image-size 32 --steps 1 --perceptual 0 --gan 0")

    class Driver:
        __file__ = str(driver)
    finish(*start_ranks(Driver, tmp_path / "out", flags))
    assert log.read_text().split() == ["fetched"]


@pytest.mark.parametrize("seed", [8192, 20240101, -5000, 2 ** 40, 10 ** 30, -10 ** 30])
def test_any_integer_is_a_seed(seed, judged, reference, tmp_path):
    """--seed 8192 ended train_tokenizer.py with an OverflowError, --seed 2147483648 sample.py."""
    out = shutil.copytree(judged, tmp_path / "out")
    for script in (train_tokenizer, train_gpt):
        call(script, out, f"--overwrite --steps 2 --seed {seed}")
    for kind in ("tokenizer", "gpt"):
        assert read_saved(out / f"{kind}.pt")["args"]["seed"] == seed
    call(sample_script, out, f"--num 2 --seed {seed}")
    call(sample_script, out, f"--npz {tmp_path / 'a.npz'} --num 2 --seed {seed}")
    call(evaluate, out, f"generation --num 20 --seed {seed} --reference {reference[0]}")
    assert last_record(out)["seed"] == seed


# -------------------------------------------------------------------------------------------------
# what a user may do wrong

@pytest.fixture(scope="module")
def bad_files(trained, tmp_path_factory):
    """A folder of data sets that are none, and of damaged copies of the tiny run's files."""
    folder = tmp_path_factory.mktemp("bad")
    write_images(folder / "classes" / "full", 1)
    (folder / "classes" / "empty").mkdir()
    for name in ("tokenizer.pt", "gpt.pt", "codes-train.npy", "codes.json"):
        broken = folder / f"broken-{name}"
        broken.mkdir()
        shutil.copy(trained / "tokenizer.pt", broken)
        shutil.copy(trained / "codes.json", broken)
        (broken / name).write_bytes((trained / name).read_bytes()[:1500])
    (folder / "broken-codes.json" / "codes.json").write_text("{}")
    shutil.copy(trained / "codes-train.npy", folder / "broken-codes.json")
    other = read_saved(trained / "tokenizer.pt")
    other["ema"]["queries"] += 1
    torch.save(other, folder / "other.pt")
    torch.save({f"features.{k}": v for k, v in LPIPS().features.state_dict().items()},
               folder / "vgg.pth")
    return folder


@pytest.mark.parametrize("script, flags, message", [
    (train_tokenizer, "--data {bad}/absent", "absent is not a folder"),
    (train_tokenizer, "--data {bad}/classes", "empty has 0 images"),
    (train_tokenizer, "--data {bad}/classes/full", "1 image"),
    (train_tokenizer, "--image-size 30", "image side 30 is not divisible by patch side 4"),
    (train_tokenizer, "--heads 5", "width 32 is not divisible by 5 heads"),
    (train_tokenizer, "--num-tokens 257", "257 tokens for the 256 frequencies"),
    (train_tokenizer, "--resume", "nothing to resume"),
    (train_tokenizer, "--steps 0", "--steps is 0"),
    (train_tokenizer, "--patch-size 0", "patch"),
    (train_tokenizer, "--num-tokens 0", "tokens"),
    (train_tokenizer, "--device cuda:99", "cuda:99"),
    (train_tokenizer, "--out {image}", "000.png"),
    (train_tokenizer, "--data imagenet --data-dir {bad}/classes", "classes has no train folder"),
    (train_tokenizer, "--batch-size 7 --micro-batch 2",
     "7 images of --batch-size 7, no multiple of --micro-batch 2"),
    (train_tokenizer, "--micro-batch 0", "--micro-batch is 0"),
    (train_tokenizer, "--finetune-decoder {bad}/absent.pt", "absent.pt does not exist"),
    (train_tokenizer, "--finetune-decoder {out}/tokenizer.pt", "would replace itself"),
    (train_tokenizer, "--perceptual 1 --vgg {image} --lpips-weights {image}",
     "000.png is not a whole file of VGG16's weights"),
    (train_tokenizer, "--perceptual 1 --vgg {bad}/vgg.pth --lpips-weights {image}",
     "000.png is not a whole file of LPIPS' weights"),
    (train_tokenizer, "--perceptual 1 --vgg {bad}/vgg.pth --lpips-weights {bad}/vgg.pth",
     "vgg.pth has "),
    (train_gpt, "", "tokenizer.pt does not exist"),
    (train_gpt, "--out {bad}/broken-tokenizer.pt", "tokenizer.pt is not a whole checkpoint"),
    (train_gpt, "--out {bad}/broken-codes-train.npy",
     "codes-train.npy is not the file it should be"),
    (train_gpt, "--out {bad}/broken-codes.json", "codes.json tells of tokenizer None"),
    (train_gpt, "--out {trained} --overwrite --views ten-crop",
     "crops image files, shapes has none"),
    (sample_script, "--out {trained} --tokenizer {bad}/other.pt", "makes codes"),
    (sample_script, "", "gpt.pt does not exist"),
    (sample_script, "--out {bad}/broken-gpt.pt", "gpt.pt is not a whole checkpoint"),
    (sample_script, "--out {trained} --classes 10",
     "class 10 is outside 0 .. 9, the model's 10 classes"),
    (sample_script, "--out {trained} --classes 3 -1", "class -1 is outside 0 .. 9"),
    (sample_script, "--out {trained} --classes rings",
     "no class is named 'rings'; nearest: 5 ring; 2 triangle: "),
    (sample_script, "--out {trained} --classes star cr",
     "'cr' fits 2 classes (4 cross; 6 crescent)"),
    (sample_script, "--out {trained} --tokens 7", "--tokens is 7, and there are 1 .. 6 tokens"),
    (sample_script, "--out {trained} --upscale {image} --keep 7", "--keep is 7"),
    (sample_script, "--out {trained} --upscale {image} --keep 0", "--keep is 0"),
    (sample_script, "--out {trained} --upscale {bad}/other.pt", "cannot decode {bad}/other.pt"),
    (sample_script, "--out {trained} --upscale {bad}/absent.png", "absent.png"),
    (sample_script, "--out {trained} --keep 3", "--keep is of --upscale"),
    (sample_script, "--out {trained} --progressive --npz {bad}/a.npz", "not allowed with"),
    (sample_script, "--out {trained} --npz {bad}/absent/a.npz", "absent is not a folder"),
    (sample_script, "--out {trained} --temperature nan", "--temperature is nan"),
    (sample_script, "--out {trained} --top-p 0", "--top-p is 0")])
def test_bad_input_is_told_in_one_line(script, flags, message, trained, bad_files, tmp_path,
                                       capsys):
    image = bad_files / "classes" / "full" / "000.png"
    places = dict(bad=bad_files, image=image, trained=trained, out=tmp_path / "out")
    line = error_of(capsys, script, tmp_path / "out", flags.format(**places))
    assert "error: " in line and message.format(**places) in line
    assert not list((tmp_path / "out").glob("*.pt"))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: "
                 "you tried to allocate 4096 bytes")])
def test_lack_of_memory_names_the_remedy(error, trained, capsys, monkeypatch):
    def generate(*args, **how):
        raise error
    monkeypatch.setattr(GPT, "generate", generate)
    line = error_of(capsys, sample_script, trained, "--batch-size 20", code=1)
    assert "out of memory with --batch-size 20: take a smaller one" in line
    assert "allocate" in line


def test_command_line_ends_with_its_exit_code(tmp_path):
    command = [sys.executable, "sample.py", "--out", str(tmp_path / "absent")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


# -------------------------------------------------------------------------------------------------
# data sets

def test_shapes_are_a_pure_function_of_seed_split_and_index():
    data = Shapes("train", S)
    images, labels = data.batch(torch.arange(40))
    assert images.shape == (40, 3, S, S) and images.dtype == torch.uint8
    assert labels.tolist() == [*range(10)] * 4
    for i in (31, 7, 0):
        assert torch.equal(Shapes("train", S).batch([i])[0][0], images[i])
    assert torch.equal(data.batch([39, 2, 17])[0], images[[39, 2, 17]])
    streams = []
    for split in ("train", "val"):
        for seed in (0, 1):
            streams.append(Shapes(split, S, seed).batch(torch.arange(300))[0])
    assert len(torch.cat(streams).flatten(1).unique(dim=0)) == 4 * 300


@pytest.mark.parametrize("name, folder, train, val, names, head", [
    ("cifar10", "cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)],
     "test_batch.bin", "batches.meta.txt", 1),
    ("cifar100", "cifar-100-binary", ["train.bin"], "test.bin", "fine_label_names.txt", 2)])
def test_cifar_reads_the_official_layout(name, folder, train, val, names, head, tmp_path):
    """head: bytes of labels before an image. CIFAR-100 has a coarse label first."""
    root = tmp_path / folder
    root.mkdir()
    rng = np.random.default_rng(0)
    records = rng.integers(0, 10, (4 * len(train), head + 3072), np.uint8)
    parts = [*np.split(records, len(train)), records[:2]]
    for file, part in zip(train + [val], parts):
        part.tofile(root / file)
    (root / names).write_text("".join(f"name{i}\n" for i in range(10)) + "\n")
    for data_dir in (tmp_path, root):
        data = Cifar(name, "train", data_dir, 32)
        assert len(data) == len(records)
        assert len(Cifar(name, "val", data_dir, 32)) == 2
        images, labels = data.batch([3, 1, 0, 2])
        assert labels.tolist() == records[[3, 1, 0, 2], head - 1].tolist()
        assert data.class_names[9] == "name9"
        # Three planes, row by row.
        assert images[0, 2, 5, 30] == records[3, head + 2 * 1024 + 5 * 32 + 30]
    (root / train[-1]).write_bytes(b"short")
    with pytest.raises(UserError, match="5 bytes"):
        Cifar(name, "train", tmp_path, 32)


def test_download_keeps_no_file_that_is_wrong(tmp_path):
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_bytes(b"weights")
    right, wrong = hashlib.sha256(b"weights").hexdigest(), hashlib.md5(b"others").hexdigest()
    with pytest.raises(UserError, match=f"not {wrong}.*do this"):
        download(source.as_uri(), target, wrong, "do this")
    assert not list(target.parent.iterdir())
    assert download(source.as_uri(), target, right, "").read_bytes() == b"weights"
    source.unlink()
    assert download(source.as_uri(), target, right, "") == target       # no second download
    target.write_bytes(b"weight")
    with pytest.raises(UserError, match="removed"):
        download(source.as_uri(), target, right, "")
    with pytest.raises(UserError, match="cannot download"):
        download(source.as_uri(), target, right, "")
    assert not list(target.parent.iterdir())


def write_images(folder, count):
    """Files 000.png, 001.png ... of one size, the red of each is its number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (20, 24), (i, 100, 200)).save(folder / f"{i:03d}.png")
    return folder


def test_folder_split_is_disjoint_and_covers_all(tmp_path):
    write_images(tmp_path / "b", 30)
    write_images(tmp_path / "a" / "deeper", 10)
    train, val = open_folder(tmp_path, S, 2)
    assert train.class_names == val.class_names == ["a", "b"]
    assert len(val) == 2 and not set(train.files) & set(val.files)
    assert set(train.files) | set(val.files) == {str(f) for f in tmp_path.rglob("*.png")}
    folders = [Path(file).relative_to(tmp_path).parts[0] for file in train.files]
    assert [train.class_names[c] for c in train.labels] == folders
    assert open_folder(tmp_path, S, 1)[1].files == val.files
    images, labels = train.batch([5, 0])
    assert images.shape == (2, 3, S, S)
    assert torch.equal(labels, train.labels[[5, 0]])
    assert images[0, :, 3, 3].tolist() == [int(Path(train.files[5]).stem), 100, 200]

@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_held_out_folders_have_many_names(name, tmp_path):
    """Only "val" was known. With another name, 5 % of train were held out."""
    write_images(tmp_path / "train" / "cat", 3)
    write_images(tmp_path / name / "cat", 2)
    assert [len(part) for part in open_folder(tmp_path, S, 1)] == [3, 2]


def test_images_alone_may_lie_in_train_and_val(tmp_path):
    """They were refused: one class in each, named train and val."""
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "val", 2)
    train, val = open_folder(tmp_path, S, 1)
    assert [len(train), len(val)] == [3, 2]
    assert train.class_names == val.class_names == [tmp_path.name]


def test_train_beside_other_folders_is_a_class(tmp_path):
    """Vehicles: with "train" taken for a split, buses and cars would be left out in silence."""
    for name in ("bus", "car", "train"):
        write_images(tmp_path / name, 10)
    assert open_folder(tmp_path, S, 1)[0].class_names == ["bus", "car", "train"]


def test_folders_of_other_programs_are_no_classes(tmp_path, capsys):
    """__MACOSX and .ipynb_checkpoints became classes, ._0.png counted as a broken image, and the
    run's own folder stopped the next run. Images beside class folders are named."""
    write_images(tmp_path / "cat", 20)
    for name in ("__MACOSX", ".ipynb_checkpoints"):
        write_images(tmp_path / name, 1)
    (tmp_path / "cat" / "._000.png").write_bytes(b"no image")
    (tmp_path / "out" / "run").mkdir(parents=True)
    shutil.copy(tmp_path / "cat" / "000.png", tmp_path)
    train, val = open_folder(tmp_path, S, 1, out=tmp_path / "out" / "run")
    assert train.class_names == ["cat"] and len(train) + len(val) == 20
    assert "1 images beside its 1 class folders" in capsys.readouterr().out


def test_links_are_followed_without_loops(tmp_path):
    write_images(tmp_path / "elsewhere", 20)
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "cat" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data" / "cat")
    assert len(train_tokenizer.images_below(tmp_path / "data" / "cat")) == 20


def test_kaggles_flat_val_takes_its_classes_from_the_solution(tmp_path):
    """Kaggle's ILSVRC has val/*.JPEG without folders, and was refused."""
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for wnid in ("n01", "n02"):
        write_images(root / "train" / wnid, 3)
    write_images(root / "val", 4)
    lines = ["ImageId,PredictionString"]
    lines += [f"{i:03d},{'n02' if i else 'n01'} 1 2 3 4" for i in range(4)]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines))
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01 tench, Tinca tinca\nn02 \n")
    for data_dir in (tmp_path / "ILSVRC", tmp_path):
        train, val = open_folder(data_dir, S, 1)
        assert train.class_names == ["tench, Tinca tinca (n01)", "n02"]
        assert val.labels.tolist() == [0, 1, 1, 1]


def test_codes_belong_to_their_images_and_classes(tmp_path, capsys):
    """A renamed class folder moved every label, and the old codes were learned in silence."""
    data = tmp_path / "data"
    write_images(data / "blue", 30)
    write_images(data / "red", 30)
    flags = f"--data {data} --perceptual 0 --gan 0"
    call(train_tokenizer, tmp_path / "out", flags)
    call(train_gpt, tmp_path / "out", "--code-images 50")               # --data from the run
    assert load_generator(tmp_path / "out" / "gpt.pt")[2] == ["blue", "red"]
    (data / "blue").rename(data / "zblue")
    line = error_of(capsys, train_gpt, tmp_path / "out", "--code-images 50 --resume --steps 9")
    assert "learned the classes ['blue', 'red']" in line and "zblue" in line
    (tmp_path / "out" / "gpt.pt").unlink()
    line = error_of(capsys, train_gpt, tmp_path / "out", "--code-images 50")
    assert "codes.json tells of data" in line

    # The same classes and names of files, but each class holds the other's pictures.
    (data / "zblue").rename(data / "blue")
    for file in (data / "blue").iterdir():
        Image.open(file).resize((200, 240)).save(file)
    call(train_gpt, tmp_path / "out", "--code-images 50 --overwrite")
    for old, new in (("blue", "kept"), ("red", "blue"), ("kept", "red")):
        (data / old).rename(data / new)
    (tmp_path / "out" / "gpt.pt").unlink()
    line = error_of(capsys, train_gpt, tmp_path / "out", "--code-images 50")
    assert "codes.json tells of data" in line


def test_scripts_know_the_data_set_of_a_run(tmp_path, capsys):
    """Without --data they took the built-in shapes, whatever the run had learned."""
    write_images(tmp_path / "data" / "cat", 30)
    call(train_tokenizer, tmp_path / "out", f"--data {tmp_path / 'data'} --perceptual 0 --gan 0")
    for script in (train_gpt, sample_script, evaluate):
        command = ["probe"] if script is evaluate else []
        args = script.parse_args(command + ["--out", str(tmp_path / "out")])
        assert args.data == str(tmp_path / "data")
    assert train_gpt.parse_args(["--out", str(tmp_path / "none")]).data == "shapes"


def test_two_runs_do_not_write_into_one_folder(a_copy, capsys, monkeypatch):
    """The second's checkpoints replaced the first's without --overwrite."""
    path = a_copy / "tokenizer.pt"
    path.unlink()
    step_of_this_run = train_tokenizer.seed_step

    def another_run_saves(seed, step):
        step_of_this_run(seed, step)
        if step == 3:
            path.write_bytes(b"another run's")
    monkeypatch.setattr(train_tokenizer, "seed_step", another_run_saves)
    line = error_of(capsys, train_tokenizer, a_copy, code=1)
    assert "another run has written" in line and path.read_bytes() == b"another run's"


def test_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    """A read-only folder or a full disk was a traceback, after all the work."""
    def full(*args, **how):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train_tokenizer.tempfile, "TemporaryFile", full)
    for script, flags in ((train_tokenizer, ""), (evaluate, "compare a.npz b.npz")):
        line = error_of(capsys, script, tmp_path / "out", flags)
        assert "cannot write into" in line and "No space left" in line


def test_words_of_the_command_line_are_read_as_meant(tmp_path, capsys, monkeypatch):
    """--out=~/run made a folder named ~; mps failed late; RANK alone is no torchrun."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train_tokenizer.parse_args(["--out=~/run"]).out == tmp_path / "run"
    assert "float64" in error_of(capsys, train_tokenizer, tmp_path / "out", "--device mps")
    assert "--cfg is nan" in error_of(capsys, sample_script, tmp_path / "out", "--cfg nan")
    monkeypatch.setenv("RANK", "0")
    assert train_tokenizer.join_ranks(Namespace(device="cpu")).ranks == 1


def test_scripts_run_where_there_is_no_resource_module(tmp_path):
    """Windows has none, and every script died at its import."""
    code = "import sys; sys.modules['resource'] = None; import evaluate, train_tokenizer as t; " \
           "assert t.peak_memory('cpu') == 0"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)

def test_nohup_keeps_its_meaning():
    """The handler was installed over the SIGHUP that nohup ignores, so closing ssh ended a run."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        interrupt = train_tokenizer.Interrupt()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == interrupt.ask
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_keep_keeps_the_newest_checkpoints(a_copy):
    """Sorted by step, the checkpoints of an older, longer run were kept, the new ones deleted."""
    stale = a_copy / "tokenizer-0009999.pt"
    stale.write_bytes(b"of an older run")
    os.utime(stale, (0, 0))
    call(train_tokenizer, a_copy, "--overwrite --save-every 2 --keep 2")
    names = sorted(file.name for file in a_copy.glob("tokenizer-*"))
    assert names == ["tokenizer-0000004.pt", "tokenizer-0000006.pt"]


def test_evaluate_refuses_what_it_would_ignore(a_copy, capsys):
    """reconstruction --tokens 8 measured all tokens; truncation mixed two tokenizers."""
    for flags, message in (("reconstruction --tokens 3", "--tokens is 3"),
                           ("generation --levels 1,2", "--levels is of"),
                           ("reconstruction --tokenizer x.pt", "--tokenizer is of generation")):
        assert message in error_of(capsys, evaluate, a_copy, flags)
    checkpoint = read_saved(a_copy / "tokenizer.pt")
    checkpoint["ema"]["queries"] += 1
    torch.save(checkpoint, a_copy / "tokenizer.pt")
    line = error_of(capsys, evaluate, a_copy, "truncation --num 8")
    assert "learned the codes of another tokenizer" in line


def test_metadata_that_is_broken_is_left_out(tmp_path):
    """The pixels are whole, yet such files counted as broken and stopped small data sets."""
    for name, text, packed in (("exif", "\nexif\n 8\n0008000201120003\n", False),
                               ("text", "y" * 2_000_000, True)):
        info = PngImagePlugin.PngInfo()
        info.add_text("Raw profile type exif" if name == "exif" else "workflow", text, zip=packed)
        Image.new("RGB", (S, S), (200, 0, 0)).save(tmp_path / "image.png", pnginfo=info)
        pixels = train_tokenizer.decode_image(tmp_path / "image.png", S)
        assert pixels.shape == (S, S, 3) and (pixels == (200, 0, 0)).all()


def test_folder_with_train_and_val_must_agree(tmp_path):
    write_images(tmp_path / "train" / "cat", 3)
    write_images(tmp_path / "val" / "cat", 2)
    assert [len(part) for part in open_folder(tmp_path, S, 1)] == [3, 2]
    write_images(tmp_path / "val" / "dog", 1)
    with pytest.raises(UserError, match="1 classes in train and 2 in val.*dog"):
        open_folder(tmp_path, S, 1)


def test_folder_names_what_it_cannot_decode_and_stops_above_one_in_a_thousand(tmp_path, capsys):
    good = write_images(tmp_path, 1) / "000.png"
    cut, text = tmp_path / "cut.png", tmp_path / "text.png"
    cut.write_bytes(good.read_bytes()[:40])
    text.write_text("no image")
    data = Folder([[cut], [good] * 998 + [text]], ["a", "b"], S, 1)
    images, labels = data.batch([0, 1, 0])
    assert torch.equal(images[0], images[1]) and torch.equal(images[2], images[1])
    assert labels.tolist() == [1, 1, 1]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "cut.png" in lines[0]        # named once, however often drawn
    with pytest.raises(UserError, match="2 of 1000"):
        data.batch([999])


def test_center_crop_gives_the_middle_at_the_size():
    for size in ((16, 16), (33, 47), (1001, 37), (5, 9), (64, 33), (31, 17)):
        assert center_crop(Image.new("RGB", size), 16).size == (16, 16), size
    pixels = np.random.default_rng(0).integers(0, 256, (16, 48, 3), np.uint8)
    cropped = center_crop(Image.fromarray(pixels), 16)
    assert np.array_equal(np.array(cropped), pixels[:, 16:32])


def test_training_crops_are_the_squares_they_say():
    """Of an image whose red grows to the right and whose green grows downwards."""
    x, y = np.meshgrid(np.arange(300), np.arange(200))
    image = np.stack([x * 255 // 299, y * 255 // 199, 0 * x], -1)
    image = Image.fromarray(image.astype(np.uint8))
    for scale, down, right in ((1.0, 0.3, 0.0), (1.125, 0.0, 1.0), (1.1, 0.5, 0.5)):
        crop = np.array(any_crop(image.copy(), 50, scale, down, right)).astype(float)
        side = 200 / scale
        left, top = (300 - side) * right, (200 - side) * down
        ends = np.array([side / 100, side * 0.99])          # centres of the outer pixels
        assert abs(crop[25, [0, -1], 0] - 255 / 299 * (left + ends)).max() < 2
        assert abs(crop[[0, -1], 25, 1] - 255 / 199 * (top + ends)).max() < 2


def test_odd_images_are_handled_or_named(tmp_path):
    """Red above blue, in every way that files have: what comes out is RGB, upright."""
    halves = Image.new("RGB", (40, 40), (255, 0, 0))
    halves.paste((0, 0, 255), (0, 20, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6                                        # "turn me a quarter clockwise"
    halves.rotate(90).save(tmp_path / "turned.png", exif=exif)
    halves.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    halves.quantize(2).save(tmp_path / "palette.png")
    halves.save(tmp_path / "plain.tif")
    deep = np.array([[65535] * 40] * 20 + [[256] * 40] * 20, np.uint16)
    Image.fromarray(deep).save(tmp_path / "16-bit.png")
    halves.convert("L").save(tmp_path / "grey.png")
    clear = halves.convert("RGBA")
    opacity = np.array([[255] * 40] * 20 + [[0] * 40] * 20, np.uint8)
    clear.putalpha(Image.fromarray(opacity))
    clear.save(tmp_path / "clear.png")

    expected = {"16-bit.png": ((255,) * 3, (1,) * 3), "grey.png": ((76,) * 3, (29,) * 3),
                "clear.png": ((255, 0, 0), (255,) * 3)}
    files = sorted(str(file) for file in tmp_path.iterdir())
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
    root = tmp_path / "ILSVRC"
    for split, number in (("train", 3), ("val", 2)):
        for wnid in ("n02", "n01"):
            write_images(root / inside / split / wnid, number)
    words = "n01 tench, Tinca tinca\nn02 goldfish\nn03 more\n"
    (tmp_path / "LOC_synset_mapping.txt").write_text(words)
    args = train_tokenizer.parse_args(
        ["--data", "imagenet", "--data-dir", str(root), "--device", "cpu"])
    train, val = train_tokenizer.open_data(args, S, Job("cpu"))
    assert train.class_names == val.class_names == ["tench, Tinca tinca (n01)", "goldfish (n02)"]
    assert (len(train), len(val)) == (6, 4)
    assert args.out == Path("out/imagenet")


# -------------------------------------------------------------------------------------------------
# perceptual and adversarial loss, on inputs from numpy's frozen random streams

stream = np.random.RandomState


def weight(key, shape):
    """A plausible value for an entry of a network's state, from its name and shape alone."""
    seed = zlib.crc32(key.encode()) & 0x7FFFFFFF
    z = stream(seed).standard_normal(math.prod(shape)).reshape(shape)
    if key.endswith("running_var"):
        z = 1 + 0.25 * abs(z)
    elif key.endswith(("running_mean", ".bias")):
        z = 0.1 * z
    elif len(shape) == 1:
        z = 1 + 0.1 * z
    elif len(shape) == 2:
        z = z / shape[-1] ** 0.5 * 2
    else:
        z = z * (2 / math.prod(shape[1:]) or 1) ** 0.5
    return torch.from_numpy(z.astype(np.float32))


def pictures(seed, n, h, w):
    """uint8 (n, 3, h, w): smooth waves and noise."""
    r = stream(seed)
    y, x = np.mgrid[0:h, 0:w]
    images = np.zeros((n, 3, h, w))
    for i in range(n):
        frequency = r.uniform(1, 6, (3, 2))
        phase = r.uniform(0, 6.28, (3, 2))
        base = r.uniform(30, 220, 3)
        for c in range(3):
            across = np.sin(frequency[c, 0] * 6.28 * x / w + phase[c, 0])
            down = np.cos(frequency[c, 1] * 6.28 * y / h + phase[c, 1])
            images[i, c] = base[c] + 60 * (across * down) + r.standard_normal((h, w)) * 20
    return torch.from_numpy(np.rint(images).clip(0, 255).astype(np.uint8))


def noisy(images, seed, strengths):
    """uint8 images with noise of one strength per image; the stream runs over NHWC."""
    n, c, h, w = images.shape
    noise = stream(seed).standard_normal((n, h, w, c)) * np.reshape(strengths, (-1, 1, 1, 1))
    result = np.rint(images.numpy() + noise.transpose(0, 3, 1, 2)).clip(0, 255)
    return torch.from_numpy(result.astype(np.uint8))


@torch.no_grad()
def test_lpips_equals_its_value_when_it_matched_the_lpips_package():
    """By this class, the day it gave the lpips package's numbers (other weights, real images) to
    1e-7."""
    model = LPIPS()
    for name, value in model.features.state_dict().items():
        value.copy_(weight(f"features.{name}", tuple(value.shape)))
    for i, value in enumerate(model.lin):
        value.copy_(weight(f"lin{i}.x", tuple(value.shape)).abs())
    a = pictures(9, 2, 32, 32)
    b = noisy(a, 10, (25, 25))
    a, b = to_float(a), to_float(b)
    assert model(a, b).tolist() == pytest.approx([0.139215367, 0.167455415], rel=2e-6)
    assert model(a, a).tolist() == [0, 0]


def test_lpips_has_a_gradient_where_all_features_are_zero():
    """A root's slope at 0 is infinite: black patches of a real network once made the loss's
    gradient nan."""
    model, image = LPIPS(), torch.zeros(1, 3, 32, 32, requires_grad=True)
    for value in model.features.parameters():
        torch.nn.init.zeros_(value)                         # every feature is 0
    for value in model.lin:
        torch.nn.init.ones_(value)
    model(image, noise(1, 3, 32, 32)).sum().backward()
    assert torch.isfinite(image.grad).all()


@torch.no_grad()
def test_classifier_distance_is_that_of_unit_features():
    """Written out: the stem's features and each stage's, of unit length at each pixel."""
    model = randomized(Classifier(10, S, (8, 16, 24)))

    def stages(x):
        maps = [model.stem(x)]
        for down, residual in zip(model.down, model.residual):
            x = down(maps[-1])
            maps.append(x + residual(x))
        return maps

    a, b = (to_float(pictures(i, 3, S, S)) for i in (1, 2))
    expected = 0
    for x, y in zip(stages(a), stages(b)):
        difference = F.normalize(x, dim=1) - F.normalize(y, dim=1)
        expected = expected + difference.square().sum(1).mean((1, 2))
    distance = ClassifierDistance(model)
    assert torch.allclose(distance(a, b), expected, rtol=1e-4) and expected.min() > 0.1
    assert distance(a, a).tolist() == [0, 0, 0]
    features, _, _ = model(pictures(1, 3, S, S))
    assert torch.allclose(features, stages(a)[-1].mean((2, 3)), rtol=1e-4)


def test_adversarial_losses_equal_their_formulas():
    real, fake = noise(5, 7), noise(5, 7, seed=1)
    real_mean, fake_mean = 0.3, -0.2
    r, f = real.flatten().tolist(), fake.flatten().tolist()

    def relu(x):
        return max(x, 0.0)
    expected = (sum(relu(1 - x) for x in r) + sum(relu(1 + x) for x in f)) / 70
    assert hinge_loss(real, fake).item() == pytest.approx(expected, rel=1e-5)
    # Real logits against the mean of generated ones, and the other way round.
    expected = (sum(relu(x + 0.2) ** 2 for x in r) + sum(relu(0.3 - x) ** 2 for x in f)) / 35
    found = lecam_loss(real, fake, real_mean, fake_mean).item()
    assert found == pytest.approx(expected, rel=1e-5)

    discriminator = Discriminator().requires_grad_(False)
    assert discriminator(noise(2, 3, 64, 64)).shape == (2, 1, 8, 8)
    images = noise(2, 3, 32, 32)
    alone = discriminator(images[1:])                       # an image's logits are its own
    assert torch.allclose(discriminator(images)[1:], alone, atol=1e-5)


# -------------------------------------------------------------------------------------------------
# pictures

def cells(picture, head=20):
    """The images of a grid of 16 px images, four times enlarged: (rows, columns, 16, 16, 3).

    head: pixels above the first row.
    """
    picture = np.array(picture.convert("RGB")).astype(int)
    left = picture.shape[1] % 66 if picture.shape[1] % 66 > 2 else 2
    rows = [picture[y:y + 64:4, left:] for y in range(head, picture.shape[0], 66)]
    return np.array([[row[:, x:x + 64:4] for x in range(0, row.shape[1], 66)] for row in rows])


def test_image_grid_shows_each_image_in_its_place():
    rows = [Shapes("val", S).batch(torch.arange(4))[0], Shapes("val", S).batch(torch.arange(2))[0]]
    for names, columns in ((None, None), (["a", "longer"], ["1", "2", "3", "4"])):
        picture = train_tokenizer.image_grid(rows, names, columns)
        shown = cells(picture, head=20 if columns else 2)
        assert shown.shape == (2, 4, S, S, 3)
        assert np.array_equal(shown[0], rows[0].permute(0, 2, 3, 1))
        assert np.array_equal(shown[1, :2], rows[1].permute(0, 2, 3, 1))
        assert (shown[1, 2:] == 255).all()                  # white where a row has ended


# =================================================================================================
# train_gpt.py

def records_done(part):
    """How many records of a file that is being filled are done; 0 before it is there."""
    try:
        return int((np.load(part, mmap_mode="r")["label"] > 0).sum())
    except (OSError, ValueError, EOFError):                 # absent, or its header not yet whole
        return 0


def test_killed_encoding_goes_on_where_it_was(trained, tmp_path):
    """And two processes may go on with what one began."""
    flags = "--code-images 3000 --steps 1"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        out.mkdir()
        shutil.copy(trained / "tokenizer.pt", out)
    part = killed / "codes-train.npy.part"
    process = start(train_gpt, killed, flags)
    wait_for(lambda: records_done(part) > 200, process)
    kill(process)
    assert 200 < records_done(part) < 3000
    assert not (killed / "codes-train.npy").exists()
    resumed = start_ranks(train_gpt, killed, flags)
    call(train_gpt, whole, flags)
    finish(*resumed)
    records = [np.load(out / "codes-train.npy") for out in (whole, killed)]
    assert np.array_equal(*records) and not part.exists()
    assert (records[0]["label"] >= 1).all() and (records[0]["label"] <= 10).all()


def test_codes_of_another_tokenizer_are_refused(a_copy, capsys):
    checkpoint = read_saved(a_copy / "tokenizer.pt")
    checkpoint["ema"]["patch_pos"] += 1
    torch.save(checkpoint, a_copy / "tokenizer.pt")
    old = code_fingerprint(load_generator(a_copy / "gpt.pt")[1])
    new = code_fingerprint(load_tokenizer(a_copy / "tokenizer.pt"))
    # The codes that the generator learned.
    line = error_of(capsys, train_gpt, a_copy, "--resume --steps 9")
    assert line.startswith("error: ") and old in line and new in line and "--overwrite" in line
    # The codes on the disk.
    (a_copy / "gpt.pt").unlink()
    line = error_of(capsys, train_gpt, a_copy)
    assert line.startswith("error: ") and old in line and new in line and "codes.json" in line
    call(train_gpt, a_copy, "--overwrite")
    assert code_fingerprint(load_generator(a_copy / "gpt.pt")[1]) == new


def test_overwrite_keeps_codes_whose_note_agrees(a_copy):
    """train_gpt.py --overwrite deleted codes that another --lr does not change, and encoded all
    images again."""
    files = [a_copy / "codes-train.npy", a_copy / "codes-val.npy"]

    def identities():
        return [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
    before = identities()
    call(train_gpt, a_copy, "--overwrite --lr 1e-4")
    assert identities() == before
    # Codes of other views are made anew.
    call(train_gpt, a_copy, "--overwrite --views centre")
    codes = np.load(files[0])
    assert codes["codes"].shape == (64, 1, N)
    # And so are codes without a note.
    (a_copy / "codes.json").unlink()
    np.save(files[0], codes[::-1])
    call(train_gpt, a_copy, "--overwrite --views centre")
    assert np.array_equal(np.load(files[0]), codes)


def test_training_uses_the_mirror_images(trained, a_copy):
    records = np.load(a_copy / "codes-train.npy", mmap_mode="r+")
    records["codes"][:, 1] = (records["codes"][:, 1] + 1) % K
    records.flush()
    (a_copy / "gpt.pt").unlink()
    call(train_gpt, a_copy)
    assert not torch.equal(load_gpt(a_copy / "gpt.pt").pos, load_gpt(trained / "gpt.pt").pos)


@pytest.mark.parametrize("drop, untouched", [
    (0, slice(NO_CLASS, NO_CLASS + 1)), (1, slice(0, NO_CLASS))])
def test_dropped_labels_train_the_row_without_a_class(drop, untouched, a_copy):
    call(train_gpt, a_copy, f"--overwrite --label-drop {drop}")
    torch.manual_seed(0)
    begin = GPT(GPTConfig(**GPT_SIZES))
    end = read_saved(a_copy / "gpt.pt")["model"]
    same = (begin.class_embed.weight == end["class_embed.weight"]).all(1)
    assert same[untouched].all() and same.sum() == len(same[untouched])


# =================================================================================================
# sample.py

def test_sample_draws_what_it_is_asked_for_from_gpt_pt_alone(trained, tmp_path):
    shutil.copy(trained / "gpt.pt", tmp_path)
    cell = 64 + 2                                           # 16 px, four times enlarged, and a gap
    for flags, name, rows, columns, head in (
            ("", "samples", 10, 8, 2), ("--progressive", "progressive", 10, 4, 20),
            ("--classes 3 7 --num 6 --top-k 5", "samples", 2, 3, 2)):
        call(sample_script, tmp_path, flags)
        width, height = Image.open(tmp_path / f"{name}.png").size
        assert height == head + rows * cell
        assert 0 < width - columns * cell < 100             # beside the class names


def test_sample_is_another_for_another_seed(a_copy):
    shown = []
    for flags in ("--batch-size 64", "--batch-size 3", "--batch-size 3 --seed 2"):
        call(sample_script, a_copy, f"--num 7 {flags}")
        shown.append(np.array(Image.open(a_copy / "samples.png")).astype(int))
    assert abs(shown[0] - shown[1]).max() <= 1
    assert abs(shown[0] - shown[2]).max() > 10


@torch.no_grad()
def test_progressive_pictures_show_the_tokens_one_by_one(trained, tmp_path):
    shutil.copy(trained / "gpt.pt", tmp_path)
    gpt, tokenizer, _ = load_generator(tmp_path / "gpt.pt")
    codes = gpt.generate(torch.tensor([3, 7]), cfg=2, seeds=sample_seeds(1, 0, 2))
    for stop in (N, 3):
        call(sample_script, tmp_path, f"--progressive --gif --classes star heart --tokens {stop}")
        levels = spread_levels(stop)
        expected = [to_uint8(tokenizer.decode(codes, level)) for level in levels]
        expected = torch.stack(expected, 1).permute(0, 1, 3, 4, 2).numpy()
        strip = cells(Image.open(tmp_path / "progressive.png"))
        assert strip.shape[:2] == (2, len(levels))
        assert abs(strip - expected).max() <= 1
        with Image.open(tmp_path / "progressive.gif") as gif:
            shown = 0
            for i in range(gif.n_frames):                   # equal frames are one, shown longer
                gif.seek(i)
                shown += gif.info["duration"]
            assert shown == 100 * (stop - 1) + 2000 and gif.info["loop"] == 0
            assert 1 < gif.n_frames <= stop
            assert abs(cells(gif)[:, 0] - strip[:, -1]).mean() < 8      # a GIF has 256 colours


@torch.no_grad()
@pytest.mark.parametrize("keep", [2, N])
def test_upscale_keeps_the_first_tokens_and_samples_the_others(keep, trained, tmp_path):
    shutil.copy(trained / "gpt.pt", tmp_path)
    gpt, tokenizer, _ = load_generator(tmp_path / "gpt.pt")
    original = Shapes("val", S).batch([3])[0]
    Image.fromarray(original[0].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    codes = tokenizer.encode(to_float(original))
    for flags, label, seed in (("", NO_CLASS, 1), ("--classes star --seed 4", 3, 4)):
        call(sample_script, tmp_path, f"--upscale {tmp_path / 'image.png'} --keep {keep} {flags}")
        row = cells(Image.open(tmp_path / "upscale.png"))[0]
        n = len(row) - 2                                    # beside the image and its preview
        assert n == (8 if keep < N else 1)
        assert np.array_equal(row[0], original[0].permute(1, 2, 0))
        prefix = codes[:, :keep].expand(n, -1)
        sampled = gpt.generate(torch.full((n,), label), cfg=2, prefix=prefix,
                               seeds=sample_seeds(seed, 0, n))
        expected = torch.cat([tokenizer.decode(codes, keep), tokenizer.decode(sampled)])
        expected = to_uint8(expected).permute(0, 2, 3, 1).numpy()
        assert abs(row[1:] - expected).max() <= 1
        assert (sampled[:, :keep] == codes[:, :keep]).all()
        assert len(sampled.unique(dim=0)) == n


def test_npz_is_the_same_for_any_batch_processes_and_interruption(a_copy):
    """Byte for byte. A stream or a label of another image would show; for rounding see the test
    after this one."""
    def flags(name, batch_size):
        return f"--npz {a_copy / name} --num 64 --batch-size {batch_size}"

    killed = start(sample_script, a_copy, flags("killed.npz", 1))
    part = a_copy / "killed.npz.part"
    wait_for(lambda: records_done(part) >= 8, killed)
    kill(killed)
    half = np.load(part)
    done = half["label"] > 0
    assert 8 <= done.sum() < 64 and not (a_copy / "killed.npz").exists()
    ranks = start_ranks(sample_script, a_copy, flags("ranks.npz", 5))
    call(sample_script, a_copy, flags("64.npz", 64))
    call(sample_script, a_copy, flags("5.npz", 5))
    call(sample_script, a_copy, flags("killed.npz", 2))
    finish(*ranks)

    whole = (a_copy / "64.npz").read_bytes()
    for name in ("5", "ranks", "killed"):
        assert (a_copy / f"{name}.npz").read_bytes() == whole, name
    images = np.load(a_copy / "64.npz")["arr_0"]
    assert np.array_equal(half["image"][done], images[done]) and not part.exists()


def is_intel():
    cpus = Path("/proc/cpuinfo")
    return cpus.exists() and "GenuineIntel" in cpus.read_text()


@pytest.mark.skipif(not is_intel(), reason="MKL rounds alike for all shapes on Intel's CPUs only")
def test_matrix_products_round_alike_for_any_batch_and_threads(trained):
    """Without MKL's strict mode a code flips once in some 100,000: too rare for a test of images
    to see."""
    code = f"""
import torch, torch.nn.functional as F, sample
args = sample.parse_args(["--device", "cpu", "--out", {str(trained)!r}])
sample.load_models(args, sample.sampling_job(args))
x, w = torch.randn(40, 1024), torch.randn(512, 1024)
torch.set_num_threads(2)
whole = F.linear(x, w)
for threads in (1, 2):
    torch.set_num_threads(threads)
    for i in (0, 3):
        for n in (1, 2, 5, 16, 37):
            assert torch.equal(F.linear(x[i:i + n], w), whole[i:i + n])"""
    environment = {k: v for k, v in os.environ.items() if k != "MKL_CBWR"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@torch.no_grad()
def test_npz_is_as_adm_lays_it_out(a_copy, capsys):
    path = a_copy / "samples.npz"
    call(sample_script, a_copy, f"--npz {path} --num 33 --classes ring 2 star --cfg 1.5")
    gpt, tokenizer, _ = load_generator(a_copy / "gpt.pt")
    with np.load(path) as file:
        images, labels = file["arr_0"], torch.from_numpy(file["arr_1"])
    assert images.dtype == np.uint8 and images.shape == (33, S, S, 3)
    assert labels.dtype == torch.int64 and (labels.diff() < 0).any()
    assert torch.bincount(labels).tolist() == [0, 0, 11, 11, 0, 11]
    codes = gpt.generate(labels, cfg=1.5, seeds=sample_seeds(1, 0, 33))
    expected = to_uint8(tokenizer.decode(codes)).permute(0, 2, 3, 1).int().numpy()
    assert abs(images - expected).max() <= 1
    note = json.loads((a_copy / "samples.npz.json").read_text())
    assert note["cfg"] == 1.5 and note["seed"] == 1
    assert note["classes"] == [5, 2, 3] and note["gpt"] == fingerprint(gpt)
    assert len(evaluate.read_npz(path)[0]) == 33

    line = error_of(capsys, sample_script, a_copy, f"--npz {path} --num 33")
    assert "samples.npz exists: --overwrite replaces it" in line
    path.rename(a_copy / "samples.npz.part")                # as if stopped
    line = error_of(capsys, sample_script, a_copy,
                    f"--npz {path} --num 33 --classes ring 2 star --cfg 3")
    assert "tells of cfg 1.5, this run has cfg 3.0" in line


@pytest.mark.parametrize("word, found", [
    ("0", 0), ("tinca TINCA", 0), ("n02123045", 1), ("tiger", 2), ("tama", 5), ("tabby", 1),
    ("n0298", 5), ("crane", "'crane' fits 2 classes (3 dog, crane; 4 crane)"),
    ("cat", "fits 3 classes"), ("zzzz", "nearest: none: --list-classes shows all 6"),
    ("tenhc", "no class is named 'tenhc'; nearest: 0 tench, Tinca tinca (n01440764)"),
    ("6", "class 6 is outside 0 .. 5")])
def test_classes_are_found_by_number_name_wnid_or_part(word, found):
    """found: the class, or what the error says."""
    names = ["tench, Tinca tinca (n01440764)", "tabby, tabby cat (n02123045)",
             "tiger cat (n02123159)", "dog, crane", "crane", "catamaran (n02981792)"]
    if isinstance(found, int):
        assert sample_script.find_class(word, names) == found
        return
    with pytest.raises(UserError, match=re.escape(found)):
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


# =================================================================================================
# evaluate.py: metrics, against numbers of other people's tools

def correlated(seed, n, d, shift, scale):
    """float32 (n, d) features with a full covariance."""
    mix = stream(1000 + d).standard_normal((d, d)) / d ** 0.5
    features = shift + scale * (stream(seed).standard_normal((n, d)) @ mix) + 0.3
    return features.astype(np.float32)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """(a file of Inception weights of the published names and shapes, the network with them)."""
    model = evaluate.InceptionV3()
    state = {}
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):        # older published files have none
            state[name] = weight(name, tuple(value.shape))
    model.load_state_dict(state, strict=False)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path, model


def test_inception_has_the_published_names_and_shapes(inception):
    shapes = {name: list(value.shape) for name, value in inception[1].state_dict().items()}
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "1932d991bb5cf880"


@pytest.mark.parametrize("fused", [False, True])
def test_inception_equals_torch_fidelitys(fused, inception):
    """torch-fidelity 0.4.0 in float64. A wrong pooling, epsilon, resize or layout moves these
    numbers by 1e-3 and more. fused: batch norm as part of the convolutions."""
    model = evaluate.load_inception(inception[0]) if fused else inception[1].train()
    pool, spatial, logits = (x.numpy() for x in model(pictures(103, 2, 64, 64)))
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 2048), (2, 2023), (2, 1008))
    # Features, where to look, values of the first image, of the second, largest of all.
    for found, where, first, second, largest in (
            (pool, range(0, 2046, 341),
             [0.0, 0.02465052343904972, 0.004095542244613171, 0.0017090020701289177,
              0.4379909634590149, 0.3599598705768585],
             [0.0, 0.025310125201940536, 0.00450359471142292], 1.0578194856643677),
            (spatial, range(100, 2023, 401),
             [0.0, 0.0, 0.14552049338817596, 0.0, 0.35728177428245544],
             [0.0, 0.0, 0.14166603982448578], 0.7943995594978333),
            (logits, range(0, 1008, 168),
             [-0.38744843006134033, 0.6327806115150452, -0.31324663758277893,
              0.021672382950782776, 0.09384988993406296, -0.49044209718704224],
             [-0.39106959104537964, 0.6247377395629883, -0.32684168219566345],
             1.4881196022033691)):
        tolerance = 5e-6 * largest
        assert np.allclose(found[0, where[:len(first)]], first, rtol=0, atol=tolerance)
        assert np.allclose(found[1, where[:3]], second, rtol=0, atol=tolerance)
        assert abs(found).max() == pytest.approx(largest, rel=5e-6)


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_inception_convolves_in_float32(before, inception, monkeypatch):
    """By default cuDNN rounds to TF32, which has 10 bits. The setting of others must come back,
    after an error, too."""
    convolutions, seen = torch.backends.cudnn.conv, []
    outside = convolutions.fp32_precision
    convolutions.fp32_precision = before

    def note(module, inputs, output):
        seen.append(convolutions.fp32_precision)

    def fail(self, x):
        raise ArithmeticError

    found = []
    for module in inception[1].modules():
        if isinstance(module, torch.nn.Conv2d):
            found.append(module.register_forward_hook(note))
    try:
        pool, _, _ = inception[1](pictures(103, 1, 32, 32))
        after = convolutions.fp32_precision
        monkeypatch.setattr(evaluate.Mixed, "forward", fail)
        with pytest.raises(ArithmeticError):
            inception[1](pictures(103, 1, 32, 32))
        after_error = convolutions.fp32_precision
    finally:
        convolutions.fp32_precision = outside
        for handle in found:
            handle.remove()
    assert len(found) == 94 and len(seen) > 94 and set(seen) == {"ieee"}
    assert after == after_error == before
    assert not pool.requires_grad


def test_tf1_resize_equals_tensorflows():
    expected = [[131.0, 124.40467834472656, 163.9632110595703, 166.1739044189453],
                [117.03009796142578, 149.71177673339844, 144.6067657470703, 158.03854370117188],
                [110.9899673461914, 139.04295349121094, 160.81356811523438, 179.06495666503906]]
    found = evaluate.tf1_resize(pictures(103, 1, 64, 64), 299)
    assert found.shape == (1, 3, 299, 299)
    assert np.allclose(found[0, 0, :21:7, :28:7], expected, rtol=0, atol=1e-4)
    whole = pictures(5, 1, 299, 299)
    assert torch.equal(evaluate.tf1_resize(whole, 299), whole.float())


def moments(features, block=100):
    """(mean, covariance) by evaluate.Moments, `block` rows at a time."""
    m = evaluate.Moments()
    for part in torch.as_tensor(features).split(block):
        m.add(part)
    return m.finish("cpu")


def test_moments_equal_numpys():
    f = correlated(3, 250, 8, 5.0, 1.0).astype(np.float64)
    mu, sigma = moments(f)
    assert np.allclose(mu, f.mean(0), rtol=1e-12)
    assert np.allclose(sigma, np.cov(f.T), rtol=1e-9)


@pytest.mark.parametrize("n1, n2, d, expected", [           # pytorch-fid 0.3.0
    (500, 400, 64, 4.204492004929165), (1200, 1000, 256, 23.456267582217833)])
def test_frechet_distance_equals_pytorch_fids(n1, n2, d, expected):
    a = moments(correlated(1, n1, d, 0.0, 1.0))
    b = moments(correlated(2, n2, d, 0.05, 1.1))
    assert evaluate.frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-6)
    arrays = [x.numpy() for x in (*b, *a)]                  # symmetric, and of numpy arrays, too
    assert evaluate.frechet_distance(*arrays) == pytest.approx(expected, rel=1e-6)
    assert abs(evaluate.frechet_distance(*a, *a)) < 1e-9 * a[1].trace()


def test_frechet_distance_of_commuting_covariances_by_hand():
    """|mu1 - mu2|^2 + sum of (sqrt(s1) - sqrt(s2))^2; the covariances are of low rank, too."""
    sigma1, sigma2 = np.diag([4.0, 0, 9]), np.diag([1.0, 16, 0])
    distance = evaluate.frechet_distance([1.0, 0, 0], sigma1, [0, 0, 2.0], sigma2)
    assert distance == pytest.approx((1 + 4) + (1 + 16 + 9))


def test_inception_score_equals_torch_fidelitys():
    logits = (stream(21).standard_normal((1003, 1008)) * 2.5).astype(np.float32)
    expected = {1: (14.753672271308714, 0), 10: (12.034158879046622, 0.5268761313770315)}
    for splits, score in expected.items():
        assert evaluate.inception_score(logits, splits) == pytest.approx(score, rel=1e-6)
    by_class = np.eye(4).repeat(5, 0) * 50
    assert evaluate.inception_score(by_class)[0] == pytest.approx(4)
    assert evaluate.inception_score(by_class, 4)[0] == pytest.approx(1)     # sorted: meaningless


def test_precision_and_recall_equal_torch_fidelitys():
    fake = correlated(31, 600, 16, 0.1, 0.8)
    real = correlated(32, 500, 16, 0.0, 1.0)
    assert evaluate.precision_recall(real, fake) == pytest.approx((0.975, 0.532), abs=1 / 600)


def test_precision_and_recall_equal_brute_force():
    real = stream(1).standard_normal((1100, 3))
    fake = stream(2).standard_normal((700, 3)) * 0.7 + 0.5

    def distance(a, b):
        return np.sqrt(((a[:, None] - b) ** 2).sum(-1))

    def share_inside(points, centres):
        radii = np.sort(distance(centres, centres), 1)[:, 3]
        return (distance(points, centres) <= radii).any(1).mean()

    expected = share_inside(fake, real), share_inside(real, fake)
    assert evaluate.precision_recall(real, fake) == pytest.approx(expected, abs=2e-3)
    with pytest.raises((UserError, RuntimeError)):          # three have no third neighbour
        evaluate.precision_recall(real[:3], fake)


def test_psnr_and_ssim_equal_scikit_images():
    a = pictures(7, 3, 24, 32)
    b = noisy(a, 8, (5, 20, 60))
    expected = [34.20717792136969, 22.375562612323634, 13.404340401028074]
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-6)
    expected = [0.9896887801428584, 0.8542946714689168, 0.4204133453782313]
    assert evaluate.ssim(a, b).tolist() == pytest.approx(expected, rel=1e-6)
    assert psnr(a, a).tolist() == [math.inf] * 3
    assert evaluate.ssim(a, a).tolist() == pytest.approx([1, 1, 1])
    with pytest.raises(UserError, match="11 px"):
        evaluate.ssim(a[..., :10], b[..., :10])


# -------------------------------------------------------------------------------------------------
# evaluate.py, end to end

@pytest.fixture(scope="module")
def judged(trained, tmp_path_factory):
    """The tiny run with a classifier of its 16 px shapes, trained for a few seconds."""
    out = shutil.copytree(trained, tmp_path_factory.mktemp("judged") / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer.train_classifier, "__defaults__", (150, 64))
        load_judge(out)
    return out


def load_judge(out):
    train, val = Shapes("train", S), Shapes("val", S)
    return load_classifier(out / "classifier.pt", JUDGE, "shapes", train, val, S, Job("cpu"))


def last_record(out):
    return json.loads((out / "evaluations.jsonl").read_text().splitlines()[-1])


def numpy_features(judged, images):
    """Logits of the run's classifier, and numpy's (mean, covariance) of its features."""
    features, _, logits = load_judge(judged)(images)
    f = features.double().numpy()
    return logits, (f.mean(0), np.cov(f.T))


def share_right(logits, labels):
    return (logits.argmax(-1) == labels).double().mean().item()


def test_classifier_learns_the_classes_and_is_kept(judged, capsys):
    saved = torch.load(judged / "classifier.pt", weights_only=True)
    images, labels = Shapes("val", S).batch(torch.arange(2000))
    accuracy = share_right(numpy_features(judged, images)[0], labels)
    assert accuracy > 0.7
    assert accuracy == pytest.approx(saved["accuracy"], abs=0.03)           # of the first 10,000
    assert f"test accuracy {saved['accuracy']:.1%}" in capsys.readouterr().out


@pytest.fixture
def reference(judged):
    """(file of classifier statistics, the same by numpy)."""
    images, _ = Shapes("train", S).batch(torch.arange(200))
    _, statistics = numpy_features(judged, images)
    np.savez(judged / "reference.npz", mu=statistics[0], sigma=statistics[1])
    return judged / "reference.npz", statistics


@torch.no_grad()
def test_generation_is_measured_as_defined(judged, reference):
    """By hand: labels of every class, samples of the generator, the classifier's features."""
    labels = torch.arange(40) % 10
    labels = labels[torch.randperm(40, generator=torch.Generator().manual_seed(3))]
    gpt, tokenizer, _ = load_generator(judged / "gpt.pt")
    codes = gpt.generate(labels, cfg=1.5, seeds=3 * 2 ** 32 + torch.arange(40))
    logits, mine = numpy_features(judged, to_uint8(tokenizer.decode(codes)))
    expected = {"FD-classifier": evaluate.frechet_distance(*mine, *reference[1]),
                "accuracy": share_right(logits, labels)}
    for batch_size in (16, 40):
        call(evaluate, judged, f"generation --num 40 --cfg 1.5 --seed 3 --batch-size {batch_size} "
                               f"--reference {reference[0]}")
        record = last_record(judged)
        assert record["results"] == [pytest.approx(expected, rel=1e-6)]
        assert record["checkpoint"] == fingerprint(gpt)
        assert record["counts"] == [40, None] and record["seed"] == 3


def test_generation_is_compared_with_training_images(judged, monkeypatch):
    monkeypatch.setattr(Shapes, "__len__", lambda self: 2200)
    call(evaluate, judged, "generation --num 20 --batch-size 500")
    record = last_record(judged)
    assert record["counts"] == [20, 2200]
    assert set(record["results"][0]) == {"FD-classifier", "precision", "recall", "accuracy"}


def test_generation_refuses_the_classes_of_other_data(judged, tmp_path, capsys):
    """Without --data, a generator of anything was once measured against the built-in shapes."""
    for name in ("cat", "dog"):
        write_images(tmp_path / "animals" / name, 3)
    line = error_of(capsys, evaluate, judged, f"generation --data {tmp_path / 'animals'}")
    assert "learned 10 classes (first: circle)" in line and "has 2 (first: cat)" in line


@torch.no_grad()
def test_reconstruction_is_measured_as_defined(judged):
    call(evaluate, judged, "reconstruction --num 50 --levels 2,6 --batch-size 16")
    record = last_record(judged)
    tokenizer = load_tokenizer(judged / "tokenizer.pt")
    images, labels = Shapes("val", S).batch(pick_images(10_000, 50))
    codes = tokenizer.encode(to_float(images))
    _, originals = numpy_features(judged, images)
    assert len(record["results"]) == 2
    for row, level in zip(record["results"], (2, 6)):
        copies = to_uint8(tokenizer.decode(codes, level))
        logits, mine = numpy_features(judged, copies)
        assert row == pytest.approx({
            "tokens": level, "rFD-classifier": evaluate.frechet_distance(*mine, *originals),
            "PSNR": psnr(copies, images).double().mean().item(),
            "SSIM": evaluate.ssim(copies, images).mean().item(),
            "accuracy": share_right(logits, labels)}, rel=1e-6)
    used = codes.unique()
    assert record["codebook_used"] == len(used) / K
    rank = effective_rank(tokenizer.quantizer.vectors(used))
    assert record["codebook_effective_rank"] == rank > 1


@torch.no_grad()
def test_reconstruction_has_lpips_of_weight_files(judged, tmp_path, capsys):
    """Files as published: torchvision's VGG16 with its classifier, 1 x 1 convolutions of LPIPS."""
    model = LPIPS()
    for w in model.lin:
        w.uniform_()
    trunk = {f"features.{name}": value for name, value in model.features.state_dict().items()}
    trunk["classifier.0.bias"] = torch.zeros(3)
    linear = {f"lin{i}.model.1.weight": w.view(1, -1, 1, 1) for i, w in enumerate(model.lin)}
    torch.save(trunk, tmp_path / "vgg.pth")
    torch.save(linear, tmp_path / "lin.pth")
    flags = (f"reconstruction --num 9 --lpips --vgg {tmp_path / 'vgg.pth'} "
             f"--lpips-weights {tmp_path / 'lin.pth'}")
    call(evaluate, judged, flags)

    images, _ = Shapes("val", S).batch(pick_images(10_000, 9))
    tokenizer = load_tokenizer(judged / "tokenizer.pt")
    copies = to_uint8(tokenizer.decode(tokenizer.encode(to_float(images))))
    expected = model(to_float(copies), to_float(images)).mean().item()
    assert expected > 0
    assert last_record(judged)["results"][0]["LPIPS"] == pytest.approx(expected, rel=1e-5)
    (tmp_path / "lin.pth").write_bytes(b"no weights")
    assert "lin.pth" in error_of(capsys, evaluate, judged, flags)


def test_ranks_give_what_one_process_gives(judged, reference, tmp_path):
    """Odd counts, so that the ranks' shares differ."""
    out = shutil.copytree(judged, tmp_path / "out")
    (out / "evaluations.jsonl").unlink(missing_ok=True)
    for command in ("generation --num 31", "reconstruction --num 33"):
        flags = f"{command} --reference {reference[0]}"
        call(evaluate, out, flags)
        alone = last_record(out)["results"]
        finish(*start_ranks(evaluate, out, flags))
        assert last_record(out)["results"] == [pytest.approx(alone[0], rel=1e-6)]
    assert len((out / "evaluations.jsonl").read_text().splitlines()) == 4       # one rank writes


CLASSIFIER = "--features classifier --preset shapes"        # for compare and stats


@pytest.fixture
def shapes_of_16_px(monkeypatch):
    monkeypatch.setitem(PRESETS["shapes"], "image_size", S)


def held_out_shapes(n):
    """uint8 (n, S, S, 3)."""
    return Shapes("val", S).batch(torch.arange(n))[0].permute(0, 2, 3, 1).numpy()


def save_images(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:02d}.png")


def test_compare_takes_folders_images_and_statistics(judged, tmp_path, capsys, shapes_of_16_px):
    """The same images in every form are at distance 0; images of one class are not."""
    images = held_out_shapes(24)
    for i, image in enumerate(images):
        target = tmp_path / "folder" / str(i % 2)
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target / f"{i:02d}.{('PNG', 'png', 'bmp')[i % 3]}")
    np.savez(tmp_path / "plain.npz", arr_0=images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images, arr_1=np.arange(24))
    np.savez(tmp_path / "one_class.npz", arr_0=images[::10].repeat(4, 0))

    out = shutil.copytree(judged, tmp_path / "out")
    stats = f"stats {tmp_path / 'folder'} {tmp_path / 'reference.npz'} {CLASSIFIER}"
    call(evaluate, out, stats)
    with np.load(tmp_path / "reference.npz") as file:
        assert sorted(file) == ["arr_0", "mu", "sigma"]
        assert file["arr_0"].shape == images.shape
    for a, b in (("folder", "plain.npz"), ("plain.npz", "packed.npz"),
                 ("packed.npz", "reference.npz")):
        call(evaluate, out, f"compare {tmp_path / a} {tmp_path / b} {CLASSIFIER} --batch-size 5")
        row = last_record(out)["results"][0]
        assert abs(row["FD-classifier"]) < 1e-4, (a, b)
        assert (row["precision"], row["recall"]) == (1, 1), (a, b)
        assert (row["images"], row["reference images"]) == (24, 24)
    assert "24 images is biased" in capsys.readouterr().out

    call(evaluate, out, f"compare {tmp_path / 'one_class.npz'} {tmp_path / 'plain.npz'} "
                        f"{CLASSIFIER}")
    row = last_record(out)["results"][0]
    assert row["FD-classifier"] > 0.1 and row["recall"] < 0.5
    assert row["images"] == 12
    assert "exists: --overwrite" in error_of(capsys, evaluate, out, stats)


def test_compare_takes_its_flags_before_its_paths(judged, tmp_path, shapes_of_16_px):
    """argparse of Python 3.10 and 3.11 once called the paths unrecognized (cpython#59317)."""
    np.savez(tmp_path / "a.npz", arr_0=held_out_shapes(8))
    path = tmp_path / "a.npz"
    call(evaluate, judged, f"{CLASSIFIER} compare --batch-size 5 {path} {path}")
    assert abs(last_record(judged)["results"][0]["FD-classifier"]) < 1e-4


def test_compare_measures_a_distance_of_three_images(judged, tmp_path, shapes_of_16_px):
    """Precision and recall need four. They once ended the command after all its work."""
    np.savez(tmp_path / "three.npz", arr_0=held_out_shapes(3))
    np.savez(tmp_path / "eight.npz", arr_0=held_out_shapes(8))
    call(evaluate, judged, f"compare {tmp_path}/three.npz {tmp_path}/eight.npz {CLASSIFIER}")
    row = last_record(judged)["results"][0]
    assert row["FD-classifier"] > 0 and "precision" not in row


def test_compare_reads_files_as_training_does(judged, tmp_path, shapes_of_16_px):
    """Turned by EXIF, 16 bits, transparency on white. They were once read as they are stored."""
    images = held_out_shapes(12)
    grey = images[..., 0]
    alpha = np.where(grey > 100, 255, 0).astype(np.uint8)
    exif = Image.Exif()
    exif[0x112] = 6                                         # a viewer turns it by 90 degrees
    for name in ("exif", "alpha", "deep"):
        (tmp_path / name).mkdir()
    for i in range(12):
        Image.fromarray(images[i]).save(tmp_path / "exif" / f"{i:02d}.png", exif=exif)
        Image.fromarray(np.dstack([images[i], alpha[i]])).save(tmp_path / "alpha" / f"{i:02d}.png")
        deep = grey[i].astype(np.uint16) * 257
        Image.fromarray(deep).save(tmp_path / "deep" / f"{i:02d}.png")
    save_images(tmp_path / "exif shown", np.rot90(images, 3, (1, 2)))
    save_images(tmp_path / "alpha shown", np.where(alpha[..., None] > 0, images, 255))
    save_images(tmp_path / "deep shown", grey)
    for name in ("exif", "alpha", "deep"):
        call(evaluate, judged, f"compare '{tmp_path / name}' '{tmp_path / name} shown' "
                               f"{CLASSIFIER}")
        assert abs(last_record(judged)["results"][0]["FD-classifier"]) < 1e-4, name


def test_images_of_an_npz_are_read_as_needed(tmp_path):
    images = stream(0).randint(0, 256, (9, 5, 7, 3), np.uint8)
    np.savez(tmp_path / "plain.npz", arr_0=images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    for name in ("plain.npz", "packed.npz"):
        found, moments, spatial = evaluate.read_npz(tmp_path / name)
        assert len(found) == 9 and moments is None and spatial is None
        for rows in ([0, 1, 2], [3, 7, 8], [2]):            # backwards, too
            pixels, _ = found.batch(torch.tensor(rows))
            assert np.array_equal(pixels.permute(0, 2, 3, 1), images[rows])


def distance_of_few(a, b):
    """Frechet distance of features (n, d) and (m, d) of far fewer rows than columns: if A A' and
    B B' are the covariances, tr sqrt(A A' B B') is the sum of the singular values of A' B."""
    a, b = a.double(), b.double()
    A = (a - a.mean(0)) / (len(a) - 1) ** 0.5
    B = (b - b.mean(0)) / (len(b) - 1) ** 0.5
    cross = torch.linalg.svdvals(A @ B.T).sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + A.square().sum() + B.square().sum() - 2 * cross).item()


def test_compare_with_inception_gives_adms_numbers(inception, tmp_path):
    images = pictures(3, 9, 32, 32).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", arr_0=images[:5])
    np.savez(tmp_path / "b.npz", arr_0=images[4:])
    call(evaluate, tmp_path, f"compare {tmp_path / 'a.npz'} {tmp_path / 'b.npz'} "
                             f"--inception {inception[0]}")
    row = last_record(tmp_path)["results"][0]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    a, b = inception[1](pixels[:5]), inception[1](pixels[4:])
    for name, part in (("FID", 0), ("sFID", 1)):
        expected = distance_of_few(a[part], b[part])
        assert row[name] == pytest.approx(expected, rel=1e-4)
    assert row["IS"] == pytest.approx(evaluate.inception_score(a[2])[0], rel=1e-5)
    assert (row["precision"], row["recall"]) == evaluate.precision_recall(b[0], a[0])


def broken_npz(folder):
    """Files that are no set of images, each in its own way."""
    images = np.zeros((3, S, S, 3), np.uint8)
    np.savez(folder / "other.npz", samples=images)
    np.savez(folder / "float.npz", arr_0=images / 255)
    np.savez(folder / "planes.npz", arr_0=images.transpose(0, 3, 1, 2))
    np.savez(folder / "fortran.npz", arr_0=np.asfortranarray(images))
    np.savez(folder / "pickle.npz", arr_0=np.array([folder], dtype=object))
    np.savez(folder / "one.npz", arr_0=images[:1])
    np.savez(folder / "good.npz", arr_0=images)
    np.savez(folder / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(folder / "nan.npz", mu=np.zeros(192), sigma=np.full((192, 192), np.nan))
    np.save(folder / "array.npy", images)
    whole = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[:900])
    (folder / "damaged.npz").write_bytes(whole[:900] + b"other" + whole[905:])
    (folder / "empty").mkdir()
    write_images(folder / "sizes", 2)
    Image.new("RGB", (5, 7)).save(folder / "sizes" / "odd.png")
    write_images(folder / "unreadable", 3)
    (folder / "unreadable" / "000.png").write_bytes(b"\0\5\26\7")
    (folder / "weights.pth").write_bytes(b"PK no weights")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, folder / "torchvision.pth")


@pytest.mark.parametrize("flags, message", [
    ("compare {tmp}/empty {tmp}/good.npz", "empty has 0 images"),
    ("compare {tmp}/sizes {tmp}/good.npz",
     "odd.png is 5 x 7 px, {tmp}/sizes/000.png is 20 x 24 px"),
    ("compare {tmp}/unreadable {tmp}/good.npz", "cannot decode {tmp}/unreadable/000.png"),
    ("compare {tmp}/absent {tmp}/good.npz", "absent does not exist"),
    ("compare {tmp}/other.npz {tmp}/good.npz", "neither arr_0 (images) nor mu and sigma"),
    ("compare {tmp}/float.npz {tmp}/good.npz", "arr_0 is float64"),
    ("compare {tmp}/planes.npz {tmp}/good.npz", "(3, 3, 16, 16)"),
    ("compare {tmp}/fortran.npz {tmp}/good.npz", "in Fortran order"),
    ("compare {tmp}/pickle.npz {tmp}/good.npz", "arr_0 is object"),
    ("compare {tmp}/cut.npz {tmp}/good.npz", "cut.npz is not a whole .npz"),
    ("compare {tmp}/damaged.npz {tmp}/good.npz", "damaged.npz is not a whole .npz"),
    ("compare {tmp}/array.npy {tmp}/good.npz", "array.npy is not a whole .npz"),
    ("compare {tmp}/one.npz {tmp}/good.npz", "1 image(s), at least 2"),
    ("compare {tmp}/good.npz {tmp}/narrow.npz",
     "features of width 192 against a reference of width 3"),
    ("compare {tmp}/good.npz {tmp}/nan.npz", "nan.npz holds nan"),
    ("compare {tmp}/good.npz", "compare takes 2 paths, not 1"),
    ("stats {tmp}/good.npz {tmp}/absent/reference.npz", "absent is not a folder"),
    ("stats {tmp}/narrow.npz {tmp}/reference.npz", "holds statistics already"),
    ("generation --features inception --inception {tmp}/weights.pth",
     "weights.pth is not a whole file"),
    ("generation --features inception --inception {tmp}/torchvision.pth", "torchvision.pth has"),
    ("generation --features inception", "cannot download http://127.0.0.1:9/inception.pth"),
    ("reconstruction --levels 0,3", "--levels is 0"),
    ("reconstruction --levels 7", "--levels is 7"),
    ("reconstruction --levels all", "'all'"),
    ("truncation --tokens 3", "use --levels"),
    ("truncation --levels 3,7", "--levels is 7"),
    ("generation --num 1", "1 image(s), at least 2")])
def test_evaluate_tells_bad_input_in_one_line(flags, message, judged, tmp_path, capsys,
                                              monkeypatch, shapes_of_16_px):
    broken_npz(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(evaluate, "INCEPTION_URL", "http://127.0.0.1:9/inception.pth")
    if flags.startswith(("compare", "stats")):
        flags += " " + CLASSIFIER
    (judged / "evaluations.jsonl").unlink(missing_ok=True)
    line = error_of(capsys, evaluate, judged, flags.format(tmp=tmp_path))
    assert message.format(tmp=tmp_path) in line
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("inception.pth"))
    assert not (judged / "evaluations.jsonl").exists()


# -------------------------------------------------------------------------------------------------
# the paper's studies

def test_bands_share_out_the_energy():
    """Parseval; a cosine's energy lies in the octave of its larger frequency; images add up."""
    assert evaluate.octaves(8)[0].tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    assert evaluate.octaves(8)[5].tolist() == [3] * 8
    x = noise(5, 3, 32, 32, dtype=torch.float64)
    energy = evaluate.band_energy(x)
    assert energy.sum().item() == pytest.approx(x.square().sum().item(), rel=1e-12)
    parts = evaluate.band_energy(x[:2]) + evaluate.band_energy(x[2:])
    assert torch.allclose(parts, energy)
    octave_of = {(0, 0): 0, (1, 0): 1, (1, 3): 2, (7, 4): 3, (15, 16): 5}
    for (row, column), octave in octave_of.items():
        spectrum = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
        spectrum[:, 1, row, column] = 3
        expected = torch.zeros(6, dtype=torch.float64)
        expected[octave] = 9
        assert torch.allclose(evaluate.band_energy(idct2(spectrum)), expected, atol=1e-12)


@torch.no_grad()
def test_truncation_is_measured_as_defined(judged, reference, capsys):
    call(evaluate, judged, f"truncation --num 40 --levels 1,3,6 --cfg 1.5 --seed 3 "
                           f"--reference {reference[0]}")
    rows, printed = last_record(judged)["results"], capsys.readouterr().out
    call(evaluate, judged, "reconstruction --num 40 --levels 1,3,6")
    reconstructed = last_record(judged)["results"]

    gpt, tokenizer, _ = load_generator(judged / "gpt.pt")
    images, _ = Shapes("val", S).batch(pick_images(10_000, 40))
    codes = tokenizer.encode(to_float(images))
    labels = evaluate.balanced_labels(40, range(10), 3)
    sampled = gpt.generate(labels, cfg=1.5, seeds=3 * 2 ** 32 + torch.arange(40))
    for row, level, other in zip(rows, (1, 3, 6), reconstructed):
        assert {column: row[column] for column in other} == pytest.approx(other)
        window = row["window"]
        assert window == tokenizer.edges[level - 1]

        # The energy of the rings between the squares of side low and high, against the images'.
        copies = to_uint8(tokenizer.decode(codes, level))
        mine, theirs = (dct2(to_float(x).double()).square().sum((0, 1)) for x in (copies, images))
        for low, high in ((0, 1), (1, 2), (2, 4), (4, 8), (8, S)):
            if low >= window:
                assert row[f"band {low}"] is None
                continue
            ring = torch.zeros(S, S, dtype=torch.bool)
            ring[:high, :high] = True
            ring[:low, :low] = False
            decibels = 10 * math.log10(mine[ring].sum() / theirs[ring].sum())
            assert row[f"band {low}"] == pytest.approx(decibels, abs=1e-4)

        # Samples of all tokens, looked at after `level`.
        logits, statistics = numpy_features(judged, to_uint8(tokenizer.decode(sampled, level)))
        distance = evaluate.frechet_distance(*statistics, *reference[1])
        assert row["gFD-classifier"] == pytest.approx(distance, rel=1e-6)
        assert row["gaccuracy"] == share_right(logits, labels)
    assert "truncation.png" in printed
    for name in ("truncation.png", "levels.png"):
        assert Image.open(judged / name).width > 400


def test_truncation_samples_no_more_tokens_than_it_looks_at(judged, reference, monkeypatch):
    drawn = []

    def draw_codes(gpt, labels, start, tokens, args, job, prefix=None):
        drawn.append((start, tokens))
        return torch.zeros(len(labels), N, dtype=torch.long)

    monkeypatch.setattr(evaluate, "draw_codes", draw_codes)
    call(evaluate, judged, f"truncation --num 20 --levels 1,3 --batch-size 16 "
                           f"--reference {reference[0]}")
    assert drawn == [(0, 3), (16, 3)]                       # once for both levels
    assert last_record(judged)["samples"]["sampling"]["stop"] == 3


def test_truncation_draws_fewer_than_four_held_out_images(judged, reference, monkeypatch):
    """It measured everything, and then ended with an IndexError in the picture of four."""
    monkeypatch.setattr(Shapes, "__len__", lambda self: 3)
    (judged / "levels.png").unlink(missing_ok=True)
    call(evaluate, judged, f"truncation --num 20 --levels 1,6 --reference {reference[0]}")
    assert last_record(judged)["counts"] == [3, 3]
    picture = Image.open(judged / "levels.png")
    assert picture.height == 20 + 5 * 66                    # spectrum, sub-image, three images


def test_ridge_gives_the_r2_of_its_definition():
    """Against least squares with the penalty as extra rows, each penalty tried in turn."""
    n, places, d = 300, 4, 2
    x = noise(n, places, d, dtype=torch.float64)
    x[:, 1] = 0.7 * x[:, 0] + 0.3 * x[:, 1] + 5
    x[:, 3] = x[:, 0] - 2 * x[:, 1]                         # known wholly from those before it
    parts = x[:100], x[100:180], x[180:]
    batches = [part.flatten(1).split(30) for part in parts]
    moments = [evaluate.second_moments(batch, Job("cpu")) for batch in batches]
    for order in (torch.arange(4), torch.tensor([3, 0, 2, 1])):
        fit, held_out, test = (part[:, order] - parts[0].mean(0)[order] for part in parts)
        expected = [0.0]
        for i in range(1, places):
            tried = []
            for penalty in evaluate.PENALTIES:
                X, Y = fit[:, :i].flatten(1), fit[:, i]
                width = X.shape[1]
                weight = (penalty * fit.square().mean() * len(fit)).sqrt()
                X = torch.cat([X, weight * torch.eye(width, dtype=X.dtype)])
                Y = torch.cat([Y, torch.zeros(width, d, dtype=Y.dtype)])
                W = torch.linalg.lstsq(X, Y).solution
                error, test_error = ((p[:, i] - p[:, :i].flatten(1) @ W).square().sum().item()
                                     for p in (held_out, test))
                tried.append((error, 1 - test_error / test[:, i].square().sum().item()))
            expected.append(min(tried)[1])
        assert evaluate.ridge_r2(moments, order, places) == pytest.approx(expected, abs=1e-8)
    found = evaluate.ridge_r2(moments, torch.arange(4), places)
    assert found[3] > 0.999 and abs(found[2]) < 0.1


def test_patches_of_the_same_count_tile_the_image():
    assert evaluate.patch_sides(32, 64) == (4, 4)
    assert evaluate.patch_sides(256, 64) == (32, 32)
    assert sorted(evaluate.patch_sides(32, 32)) == [4, 8]
    assert evaluate.patch_sides(16, 6) is None


@torch.no_grad()
def test_probe_reports_what_the_codes_hold(judged, tmp_path, capsys, monkeypatch):
    """Entropy and bits against their definitions. A run against itself gives the same numbers."""
    monkeypatch.setattr(Shapes, "__len__", lambda self: 600)
    against = shutil.copytree(judged, tmp_path / "other")
    call(evaluate, judged, f"probe --num 400 --against {against}")
    *rows, mean = last_record(judged)["results"]

    gpt, tokenizer, _ = load_generator(judged / "gpt.pt")
    images, _ = Shapes("train", S).batch(pick_images(600, 400))
    codes = tokenizer.encode(to_float(images))
    held_out, labels = Shapes("val", S).batch(torch.arange(600))
    held_out = tokenizer.encode(to_float(held_out))
    nats = -gpt(held_out, labels).log_softmax(-1).gather(-1, held_out[..., None])
    bits = nats.mean(0)[:, 0] / math.log(2)
    for i, row in enumerate(rows):
        p = torch.bincount(codes[:, i]) / 400
        p = p[p > 0]
        assert row["entropy"] == pytest.approx(-(p * p.log2()).sum().item(), rel=1e-5)
        assert row["bits"] == pytest.approx(bits[i].item(), rel=1e-6)
        for name in ("R2", "entropy", "bits"):
            assert row[f"{name} against"] == row[name]
    assert len(rows) == N
    assert mean["R2"] == pytest.approx(sum(row["R2"] for row in rows) / (N - 1))
    assert 0 < mean["R2 reversed"] < 1
    assert "R2 patches" not in mean                         # 6 patches do not tile 16 px
    assert Image.open(judged / "probe.png").width > 400

    with torch.enable_grad():
        call(train_tokenizer, tmp_path / "third", "--num-tokens 4")
    line = error_of(capsys, evaluate, judged, f"probe --num 400 --against {tmp_path / 'third'}")
    assert "has 4 tokens of 16 px images" in line


def test_probe_measures_no_generator_of_other_classes(judged, capsys, monkeypatch):
    """The probe also takes data that the tokenizer has not learned from. Their labels mean other
    classes, so the generator's bits on them would be a wrong number."""
    monkeypatch.setattr(Shapes, "__len__", lambda self: 100)
    monkeypatch.setattr(Shapes, "class_names", list("abcdefghij"))
    call(evaluate, judged, "probe --num 50")
    assert "learned other classes" in capsys.readouterr().out
    mean = last_record(judged)["results"][-1]
    assert "R2" in mean and "bits" not in mean


def test_probe_leaves_out_patches_too_large_to_correlate(capsys, monkeypatch):
    """At 256 px their second moments would take 309 GB, which ended the command with no result;
    at 64 px it did not end within minutes."""
    job = Job("cpu")
    assert evaluate.probe_patches(40, 4, [], job) == {}
    assert "4,800 values" in capsys.readouterr().out
    assert evaluate.probe_patches(64, 16, [], job) == {}
    assert "12,288 values" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "ridge_r2", lambda moments, order, N: [0.5] * N)
    found = evaluate.probe_patches(32, 4, [], job)          # 3,072 values: small enough
    assert found == {"R2 patches": [0.5] * 4}


def test_ticks_are_round():
    assert evaluate.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert evaluate.ticks(-31, 8) == [-30, -20, -10, 0]
    assert evaluate.ticks(17.9, 23.1) == [18, 19, 20, 21, 22, 23]


# =================================================================================================
# README and docs

def documents():
    """{name: text} of README.md and docs/*.md."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def code_blocks(text, language=""):
    """The fenced blocks of a document; those of one language where it is named."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return [block for name, block in blocks if language in ("", name)]


def inline_code(text):
    """What stands between single backticks."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def commands_in(text):
    """The python and torchrun commands in lines of shell code, each as a list of words."""
    text = re.sub(r"\\\n", " ", text)
    commands = []
    for line in text.splitlines():
        for part in re.split(r"&&|;|\||(?:^|\s)#.*", line):
            found = re.match(r"\s*(?:do )?(?:\w+=\S* )*((?:python3?|torchrun) .*)", part)
            if found:
                commands.append(shlex.split(re.sub(r"\$\{?\w+\}?", "1", found[1])))
    return commands


def check_command(words):
    """None, or what is wrong with a command."""
    if words[1] in ("-m", "-c"):
        files = [word for word in words if word.endswith(".py")]
        missing = [file for file in files if not (ROOT / file).exists()]
        return f"{missing[0]} does not exist" if missing else None
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if script is None or words[script] not in SCRIPTS:
        return "it names none of our scripts"
    if "..." in words:                      # a pattern, such as "evaluate.py ..."
        return None
    arguments = [re.sub(r"^cuda(:\d+)?$", "cpu", word) for word in words[script + 1:]]
    try:
        SCRIPTS[words[script]].parse_args(arguments)
    except SystemExit:
        return "its flags do not parse (see stderr)"


def test_readme_docs_and_docstring_commands_parse(tmp_path, monkeypatch):
    """A reader pastes them. Each is parsed as from an empty folder."""
    sources = {}
    for name, text in documents().items():
        sources[name] = commands_in("\n".join(code_blocks(text) + inline_code(text)))
    for name, script in SCRIPTS.items():
        sources[name] = commands_in(script.__doc__)
        assert len(sources[name]) >= 3, f"the docstring of {name} has fewer than three commands"
    monkeypatch.chdir(tmp_path)
    wrong = []
    for name, commands in sources.items():
        for words in commands:
            problem = check_command(words)
            if problem:
                wrong.append(f"{name}: {' '.join(words)}: {problem}")
    assert not wrong, "\n".join(wrong)

    shown = [word for name, commands in sources.items() if name.endswith(".md")
             for words in commands for word in words]
    for name in [*SCRIPTS, "test_spectralar.py"]:
        assert name in shown, f"neither README.md nor docs/ shows a command of {name}"


def test_readme_and_docs_python_names_what_exists():
    """Python in the documents compiles, and imports only names that our files have."""
    for name, text in documents().items():
        for block in code_blocks(text, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        told = f"{name}: {node.module}.py has no {alias.name}"
                        assert hasattr(module, alias.name), told


IDENTIFIER = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"


def has_word(source, name):
    """Whether a file's text has each part of a dotted name as a word."""
    return all(re.search(rf"\b{re.escape(part)}\b", source) for part in name.split("."))


def is_defined(source, name):
    """Whether a file defines a function, class, constant or setting of this name."""
    last = re.escape(name.split(".")[-1])
    return re.search(rf"(?:def|class) {last}\b|^\s*{last}(?::.*)? =|^\s*{last}: ", source, re.M)


def names_with_their_files(text):
    """[(file, name, strict)] that a document tells together.

    strict: `file.py: name, name()` and `file.py`: `name`, `name` say that the file defines them.
    Other names in backticks, in a table row that starts with one file's name, must occur there.
    """
    found = []
    name = rf"{IDENTIFIER}(?:\(\))?"
    together = rf"`(\w+\.py): ({name}(?:, {name})*)`"       # `file.py: name, name`
    apart = rf"`(\w+\.py)`: (`{name}`(?:,? (?:and )?`{name}`)*)"
    for file, names in re.findall(together, text) + re.findall(apart, text):
        names = re.sub(r"\band\b", "", names)
        found += [(file, name, True) for name in re.findall(IDENTIFIER, names)]
    for row in re.findall(r"^\|.*\|$", text, re.M):
        words = inline_code(row)
        files = {word for word in words if re.fullmatch(r"\w+\.py", word)}
        if len(files) == 1:
            for word in words:
                name = re.fullmatch(rf"({IDENTIFIER})(\(\))?", word)
                if name and word not in files:
                    found.append((*files, name[1], False))
    return found


def test_readme_and_docs_name_what_the_files_have():
    """A function that a document sends its readers to must be in the file that it names."""
    extensions = {"py", "md", "pt", "png", "npz", "npy", "json", "jsonl", "gif", "txt"}
    wrong, count = [], 0
    for document, text in documents().items():
        for file, name, strict in names_with_their_files(text):
            if name.split(".")[-1] in extensions:           # a file, no function
                continue
            count += 1
            path = ROOT / file
            if not path.exists():
                wrong.append(f"{document}: {file} does not exist")
            elif strict and not is_defined(path.read_text(), name):
                wrong.append(f"{document}: {file} does not define {name}")
            elif not has_word(path.read_text(), name):
                wrong.append(f"{document}: {file} has no {name}")
    assert not wrong, "\n".join(wrong)
    assert count >= 8, "README.md and docs/ name fewer than 8 functions with their files"


def test_readme_tells_the_length_of_each_file():
    """Within 10 %: rows of the table that has the columns file and lines."""
    text = documents()["README.md"]
    rows = re.findall(r"^\| *`(\w+\.py)` *\| *(?:about |~)?([\d,]+)(?: lines)? *\|", text, re.M)
    told = {file: int(lines.replace(",", "")) for file, lines in rows}
    for file in ["spectralar.py", *SCRIPTS, "test_spectralar.py"]:
        assert file in told, f"README.md's table of files has no row of {file} and its lines"
        lines = len((ROOT / file).read_text().splitlines())
        message = f"README.md says {told[file]} lines of {file}, it has {lines}"
        assert told[file] == pytest.approx(lines, rel=0.1), message


def test_readme_and_docs_links_and_pictures_exist():
    wrong, pictures_shown = [], 0
    for document, text in documents().items():
        text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text)
        links += re.findall(r'(?:src|href)="([^"]+)"', text)
        for link in links:
            path, _, heading = link.partition("#")
            if re.match(r"\w+:", link):                     # https:, mailto:
                continue
            target = (ROOT / document).parent / path if path else ROOT / document
            pictures_shown += path.endswith((".png", ".gif", ".jpg", ".svg"))
            if not target.exists():
                wrong.append(f"{document}: {path} does not exist")
            elif heading and heading not in headings_of(target.read_text()):
                wrong.append(f"{document}: {path} has no heading #{heading}")
    assert not wrong, "\n".join(wrong)
    assert pictures_shown >= 1, "README.md and docs/ show no picture"


def headings_of(text):
    """The anchors that GitHub gives to a document's headings."""
    anchors = []
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.append(words.replace(" ", "-"))
    return anchors


def test_readme_and_docs_name_tests_that_exist():
    """Those to read first, and all others."""
    own = (ROOT / "test_spectralar.py").read_text()
    named = re.findall(r"\btest_(?!spectralar)\w+", " ".join([__doc__, *documents().values()]))
    assert len(named) >= 5
    for name in named:
        assert f"def {name}(" in own, f"{name} is not a test of test_spectralar.py"


# -------------------------------------------------------------------------------------------------
# docs/tour.md: what a reader types, and what comes back

class Prompt(InteractiveConsole):
    """A python prompt in which an error is raised, not printed."""

    def showtraceback(self):
        raise

    def showsyntaxerror(self, *_, **__):
        raise

    def typed(self, block, capsys):
        """What appears while a block of code and an empty line are typed, line by line."""
        capsys.readouterr()
        for line in [*block.splitlines(), ""]:
            unfinished = self.push(line)
        assert not unfinished, block
        return capsys.readouterr().out


def tour_parts():
    """[(code, what it prints)]: the imports, the stops without training, then the other stops."""
    text = documents()["docs/tour.md"]
    pairs = re.findall(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?", text, re.M | re.S)
    first = next(i for i, (code, _) in enumerate(pairs) if "out/shapes/gpt.pt" in code)
    return pairs[:1], pairs[1:first], pairs[first:]


def test_tour_prints_what_it_says(capsys):
    """A line that follows a loop without an empty line, or a result that only a prompt shows, is
    found because the lines are typed."""
    imports, untrained, _ = tour_parts()
    assert len(untrained) >= 6
    prompt = Prompt()
    for block, printed in imports + untrained:
        assert prompt.typed(block, capsys) == printed


def test_tour_runs_with_any_checkpoint(tmp_path, monkeypatch, capsys):
    """A tiny generator prints other numbers, but as many lines. It has other sizes than the
    preset, and these stops need no name of the stops before them."""
    gpt, tokenizer = tiny_gpt(), tiny_tokenizer()
    carried = dict(config=vars(tokenizer.config), model=tokenizer.state_dict())
    (tmp_path / "out/shapes").mkdir(parents=True)
    save_checkpoint(tmp_path / "out/shapes/gpt.pt", "gpt", config=vars(gpt.config),
                    model=gpt.state_dict(), tokenizer=carried, class_names=list(SHAPES))
    monkeypatch.chdir(tmp_path)
    imports, _, trained = tour_parts()
    assert len(trained) >= 4
    prompt = Prompt()
    with torch.enable_grad():                       # puts the mode back that the tour changes
        for block, printed in imports + trained:
            found = prompt.typed(block, capsys)
            assert len(found.splitlines()) == len(printed.splitlines()), found


# -------------------------------------------------------------------------------------------------
# docs/forks.md: the diffs

def forks():
    """[(title, the diff with the text around it, stated size)] of docs/forks.md."""
    sections = documents()["docs/forks.md"].split("\n## ")[1:]
    found = []
    for section in sections:
        size = re.search(r"\*\*Size:\*\* (\d+) changed lines in ", section)
        found.append((section.splitlines()[0], section, int(size[1])))
    return found


def apply_fork(section, folder):
    """Apply a diff to a copy of the scripts in a new folder: outside of any repository."""
    folder.mkdir()
    for file in ["spectralar.py", *SCRIPTS]:
        shutil.copy(ROOT / file, folder)
    alone = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    alone["GIT_CEILING_DIRECTORIES"] = str(folder.resolve().parent)
    for flags in (["--check"], []):
        done = subprocess.run(["git", "apply", *flags], input=section, cwd=folder, env=alone,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


HAS_GIT = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


@HAS_GIT
def test_forks_apply_and_have_the_size_that_they_state(tmp_path):
    table = re.findall(r"^\| \[(.*?)\]\(#.*?\) \| (\d+) \| (.*?) \|$",
                       documents()["docs/forks.md"], re.M)
    assert len(forks()) == len(table) >= 10
    for (title, section, size), row in zip(forks(), table):
        (diff,) = code_blocks(section, "diff")
        files = re.findall(r"^\+\+\+ b/(.*)", diff, re.M)
        lines = [line for line in diff.splitlines() if not line.startswith(("+++", "---"))]
        changed = sum(line.startswith(("+", "-")) for line in lines)
        assert (size, row) == (changed, (title, str(changed), ", ".join(files))), title

        folder = apply_fork(section, tmp_path / title.split(".")[0])
        for file in ["spectralar.py", *SCRIPTS]:
            text = (folder / file).read_text()
            ast.parse(text)
            assert (text != (ROOT / file).read_text()) == (file in files), (title, file)


@HAS_GIT
def test_forks_train(tmp_path):
    """The longest one, video, stands for all: two steps, and a GIF of all eight frames."""
    section = next(section for title, section, _ in forks() if "Video" in title)
    folder = apply_fork(section, tmp_path / "fork")
    flags = f"{FLAGS[train_tokenizer]} --device cpu --dtype float32 --steps 2 --out out"
    done = subprocess.run([sys.executable, "train_tokenizer.py", *flags.split()], cwd=folder,
                          env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(folder / "out" / "recon.gif") as gif:
        assert gif.n_frames == 8
    with pytest.raises(UserError, match="this model needs"):
        load_tokenizer(folder / "out" / "tokenizer.pt")
