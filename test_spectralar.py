"""Each test has an oracle: a formula, brute force, another tool's numbers, the slow path, a single
process, or the uninterrupted run. The tests run on a CPU and download nothing.

  python -m pytest -q test_spectralar.py                        # all, in two minutes
  python -m pytest -q test_spectralar.py -k encoder             # those of the encoder
  python -m pytest -q test_spectralar.py -m "not documents"     # for a fork: without its diffs

Read these five first:

  test_low_pass_is_idempotent_and_nested                  # what a sub-image is
  test_encoder_is_causal                                  # code i depends on no later query
  test_decoder_levels_in_one_pass_equal_each_alone        # why one pass may decode many levels
  test_generate_equals_its_definition                     # guidance, prefix and cache
  test_encoder_leaks_with_the_figures_mask                # why our mask is not the paper's figure

The sections: helpers, spectralar.py from 1 to 10, sample.py, evaluate.py, train_tokenizer.py,
train_gpt.py, what a user may do wrong, README and docs.
"""
import ast
import copy
import hashlib
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
import time
import warnings
import zlib
from argparse import Namespace
from code import InteractiveConsole
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import evaluate
import sample as sample_script
import train_gpt
import train_tokenizer
from evaluate import (COLOURS, JUDGE, LPIPS, SHAPES, Classifier, Folder, InceptionV3, Moments,
                      Shapes, band_energy, batch_indices, codebook_use, effective_rank,
                      find_classifier, frechet_distance, inception_score, line_chart, linear_r2,
                      load_classifier, load_inception, open_cifar, open_folder, pick_images,
                      precision_recall, psnr, ssim, train_classifier)
from sample import any_crop, center_crop, decode_image, find_class, spread_levels
from spectralar import (GPT, Block, GPTConfig, Job, SpectralTokenizer, TokenizerConfig, UserError,
                        VectorQuantizer, attention, band_edges, causal_mask, code_fingerprint,
                        config_from_flags, dct2, decoder_mask, encoder_mask, idct2, in_window,
                        largest_window, load_generator, load_tokenizer, low_pass, nested_loss,
                        random_streams, run_script, sample_from_logits, sample_levels,
                        save_checkpoint, sine_positions, squared_error, sub_images, to_float,
                        to_uint8, uniforms)
from train_tokenizer import (PRESETS, Discriminator, Muon, discriminator_loss, lr_at,
                             make_optimizers, optimizer_step, orthogonalize, update_ema)

ROOT = Path(__file__).parent
SCRIPTS = {"train_tokenizer.py": train_tokenizer, "train_gpt.py": train_gpt,
           "sample.py": sample_script, "evaluate.py": evaluate}

torch.set_num_threads(1)                # tiny tensors: threads would only cost time

# pytest does not know the mark "documents", and would warn of it.
warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)

# A device that this machine lacks (see FarDevice). PyTorch must know it before its first gradient.
pretend_device = getattr(torch.utils.backend_registration,
                         "_setup_privateuseone_for_python_backend", None)
if pretend_device:
    pretend_device("far")
    torch.far.get_amp_supported_dtype = lambda: [torch.bfloat16]

# Intel's MKL reads this when it is first used. Matrix products of any shape then round in the same
# way, here and in the processes that the tests start.
os.environ["MKL_CBWR"] = "AUTO,STRICT"

# -------------------------------------------------------------------------------------------------
# helpers: tiny models and random inputs

SIZES = dict(image_size=16, patch_size=4, num_tokens=6, codebook_size=32, code_dim=8, width=32,
             depth=2, heads=4)
GPT_SIZES = dict(num_classes=10, num_tokens=6, codebook_size=32, width=32, depth=2, heads=4)
S, N, K, D = (SIZES[name] for name in ("image_size", "num_tokens", "codebook_size", "width"))
P = (S // SIZES["patch_size"]) ** 2
NO_CLASS = GPT_SIZES["num_classes"]     # the label of unconditional sampling


def randomized(model):
    """The model in eval mode, with no parameter left at zero. AdaLN and level embeddings start at
    zero, which would hide bugs."""
    torch.manual_seed(1)
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


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise_images(B, seed=0, dtype=torch.float32):
    return noise(B, 3, S, S, seed=seed, dtype=dtype)


def some_codes(B, seed=0):
    return torch.randint(K, (B, N), generator=torch.Generator().manual_seed(seed))


def sample_seeds(seed, n):
    """The random streams of the first n samples of a seed."""
    return random_streams("samples", seed, torch.arange(n))


def number_changed(codes, i):
    """Codes (B, N) with another code at place i, counted from 0."""
    return (codes + (torch.arange(N) == i)) % K


# -------------------------------------------------------------------------------------------------
# helpers: inputs from numpy's frozen random streams

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


# -------------------------------------------------------------------------------------------------
# helpers: the scripts as from the command line

def as_flags(sizes):
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())


COMMON = "--steps 6 --batch-size 8 --warmup 2 --eval-images 16"
WIDTHS = as_flags({name: SIZES[name] for name in ("width", "depth", "heads")})
MACHINE = "--device cpu --dtype float32"
FLAGS = {train_tokenizer: f"{COMMON} {as_flags(SIZES)}",
         train_gpt: f"{COMMON} {WIDTHS} --code-images 64",
         sample_script: "--seed 1", evaluate: ""}
TRAINING = pytest.mark.parametrize(
    "script, kind", [(train_tokenizer, "tokenizer"), (train_gpt, "gpt")],
    ids=["tokenizer", "gpt"])


def call(script, out, flags=""):
    """Run a script as from the command line. Its signal handlers stay installed."""
    words = shlex.split(f"{FLAGS[script]} {MACHINE} --out {shlex.quote(str(out))} {flags}")
    run_script(script.main, script.parse_args, words)


def error_of(capsys, script, out, flags=""):
    """The line that a refused command prints on stderr. argparse prints the usage before it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        call(script, out, flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2
    assert len(lines) == 1 or lines[0].startswith("usage:")
    return lines[-1]


def start(script, out, flags="", **environment):
    """Start a script as a process of its own."""
    words = shlex.split(f"{FLAGS[script]} {MACHINE} --out {shlex.quote(str(out))} {flags}")
    return subprocess.Popen([sys.executable, script.__file__, *words], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=os.environ | dict(OMP_NUM_THREADS="1") | environment)


def start_ranks(script, out, flags):
    """Start two processes with the environment of torchrun, but without its start-up time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    return [start(script, out, flags, RANK=rank, LOCAL_RANK=rank, **together) for rank in "01"]


def finish(*processes):
    """Wait until processes have ended, each without an error."""
    for process in processes:
        text = process.communicate(timeout=300)[0]
        assert process.returncode == 0 and "Warning" not in text, text


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def kill(process):
    """End a process as kill -9 does."""
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
    """The log's records of steps, without those of the run and of evaluations."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if "ms" in record]


def read_saved(path):
    return torch.load(path, weights_only=True)


def read_codes(out, split):
    """The path of a run's file of codes, and its records."""
    (path,) = out.glob(f"codes-{split}*.npy")
    return path, np.load(path)


def same_weights(model, other):
    one, two = model.state_dict(), other.state_dict()
    return all(torch.equal(value, two[name]) for name, value in one.items())


def leaves(content, name=""):
    """Nested dicts, lists and tuples as one dict {path: leaf}."""
    if isinstance(content, (list, tuple)):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return {name: content}
    found = {}
    for key, value in content.items():
        found |= leaves(value, f"{name}.{key}")
    return found


def assert_same(path, other):
    """Two checkpoints hold the same values, bit for bit. Only their flags may differ."""
    one, two = read_saved(path), read_saved(other)
    del one["args"], two["args"]
    one, two = leaves(one), leaves(two)
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, two[name]), name
        else:
            assert value == two[name], name


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
    assert torch.allclose(idct2(spectrum), x, atol=1e-12)


def test_spectrum_stays_float32_under_autocast():
    x = noise_images(2)
    with torch.autocast("cpu", torch.bfloat16):
        blurred = low_pass(x, 5)
    assert torch.equal(blurred, low_pass(x, 5))
    assert low_pass(x.bfloat16(), 5).dtype == torch.float32


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
    """The low-passed image holds everything that a smaller window needs."""
    x = noise_images(2, dtype=torch.float64)
    for small, large in ((1, 2), (3, 11), (5, 16), (7, 7)):
        expected = low_pass(x, small)
        assert torch.allclose(low_pass(low_pass(x, large), small), expected, atol=1e-12)


def test_low_pass_keeps_the_mean_at_one_and_all_at_the_image_side():
    x = noise_images(2)
    mean = x.mean((2, 3), keepdim=True)
    assert torch.equal(low_pass(x, S), x)
    assert torch.allclose(low_pass(x, 1), mean.expand_as(x), atol=1e-6)


# -------------------------------------------------------------------------------------------------
# spectralar.py 2: mapping

@pytest.mark.parametrize("num_tokens, size, power", [
    (16, 32, 1.5), (64, 256, 2), (1, 8, 3), (64, 9, 0.5), (64, 16, 4)])
def test_band_edges_grow_from_one_to_the_image(num_tokens, size, power):
    edges = band_edges(num_tokens, size, power)
    assert edges.shape == (num_tokens,)
    assert edges[0] >= 1 and edges[-1] == size
    for i, edge in enumerate(edges.tolist(), 1):
        exact = size * (i / num_tokens) ** power
        assert abs(edge - exact) <= 0.5 or (edge == 1 and exact < 1)
    example = " ".join(map(str, band_edges(16, 32, 1.5).tolist()))
    assert example in band_edges.__doc__


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


def test_attention_equals_its_formula():
    """On a CPU, other lines run with gradients than without, which are PyTorch's."""
    q, k, v = noise(3, 2, 4, 5, 8).requires_grad_()
    some = noise(2, 1, 5, 5) > 0
    some = some | torch.eye(5, dtype=torch.bool)            # each row sees something
    for mask, causal in ((None, False), (causal_mask(5), False), (None, True), (some, False)):
        sees = causal_mask(5) if causal else mask
        scores = q @ k.mT / math.sqrt(8)
        if sees is not None:
            scores = scores.masked_fill(~sees, -math.inf)
        expected = scores.softmax(-1) @ v
        assert torch.allclose(attention(q, k, v, mask, causal), expected, atol=1e-6)
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
    """The quantizer brings the encoder's raw outputs to unit length."""
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


def test_quantizer_gradients_go_straight_through_and_the_loss_moves_codes_alone():
    """The encoder gets the gradient that it would get without quantization. A loss that also
    pulled it kept one CIFAR-10 run in four dimensions."""
    vq = quantizer()
    w = noise(5, 3, 8, seed=1)
    z, other = (noise(5, 3, 8).requires_grad_() for _ in range(2))
    quantized, codes, loss = vq(z)
    (quantized * w).sum().backward()
    assert vq.codebook.grad is None
    loss.backward()
    (F.normalize(other, dim=-1) * w).sum().backward()
    assert torch.equal(z.grad, other.grad) and z.grad.any()

    table = vq.codebook.detach().clone().requires_grad_()
    e = F.normalize(table, dim=-1)[codes]
    (F.normalize(z.detach(), dim=-1) - e).square().mean().backward()
    assert torch.allclose(vq.codebook.grad, table.grad, atol=1e-7)


def test_quantizer_is_float32_under_autocast():
    vq = quantizer(1024, 16)
    z = noise(200, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, codes, loss = vq(z)
    assert torch.equal(codes, vq(z)[1])
    assert torch.equal(quantized, vq(z)[0])
    assert loss.dtype == torch.float32


@torch.no_grad()
def test_quantizer_revives_dead_codes_and_leaves_live_ones():
    vq = quantizer(4)
    axes = torch.eye(8)
    z = axes[:3].repeat(10, 1, 1) + 0.1 * noise(10, 3, 8)   # three clusters
    vq.codebook.copy_(torch.cat([axes[:3], -axes[:1]]))     # no cluster chooses the fourth
    for step in range(100):
        vq.update(z.flatten(0, 1), vq(z)[1].flatten())
        if vq.codebook[3, 0] != -1:
            break
    assert step == 58                                       # 0.95^59 is the first power below 5 %
    # The fourth code is one of the unit vectors now, and in use.
    assert (F.normalize(z, dim=-1) == vq.codebook[3]).all(-1).any()
    assert (vq(z)[1] == 3).any()
    assert torch.equal(vq.codebook[:3], axes[:3])


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
    """(vectors, codes) of 32 images, before and after query j, counted from 0, is replaced."""
    images = noise_images(32)
    before = model.encode_vectors(images), model.encode(images)
    model.queries[j] = 3 * noise(D, seed=5)
    after = model.encode_vectors(images), model.encode(images)
    return before, after


@pytest.mark.parametrize("j", [1, 3, N - 1])
def test_encoder_is_causal(j):
    """Later queries leak into earlier codes where a reshape stands in place of a permute, or where
    patches see queries."""
    (vectors, codes), (new_vectors, new_codes) = disturbed(tiny_tokenizer(), j)
    assert torch.equal(vectors[:, :j], new_vectors[:, :j])
    assert torch.equal(codes[:, :j], new_codes[:, :j])
    assert (vectors[:, j:] != new_vectors[:, j:]).any(-1).all()


def test_encoder_leaks_with_the_figures_mask():
    """In the paper's Figure 2, patches see queries. The last query then changes the first code."""
    model = tiny_tokenizer()
    model.encoder_mask = encoder_mask(P, N, figure=True)
    (vectors, codes), (new_vectors, new_codes) = disturbed(model, N - 1)
    assert (vectors != new_vectors).any(-1).all()
    assert (codes[:, :-1] != new_codes[:, :-1]).any()


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
    model.decoder[-1].register_forward_hook(lambda _, inputs, output: hidden.append(output))
    model.decode(codes)
    model.decode(number_changed(codes, N - 1))
    assert (hidden[0] != hidden[1]).any(-1).all()           # the last code reaches every position


def test_decoder_refuses_levels_that_do_not_exist():
    message = re.escape("level 0 .. 7 is outside 1 .. 6")
    with pytest.raises(UserError, match=message):
        tiny_tokenizer().decode(some_codes(2), torch.tensor([0, N + 1]))


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
    squares = 0.0
    for b, g in np.ndindex(3, 2):
        target = low_pass(images[b:b + 1], 2 * levels[b, g].item())[0]
        assert torch.allclose(targets[b, g], target, atol=1e-6)
        squares += (recon[b, g] - target).square().mean() / 3

    def largest_difference(a, b):                           # one number per image
        return (a - b).amax((1, 2, 3))
    assert torch.allclose(nested_loss(recon, targets), squares, rtol=1e-5)
    # Weights per image and level. A distance that forgets the images is refused.
    weights = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    found = nested_loss(recon, targets, largest_difference, weights)
    full = largest_difference(recon[:, 0], targets[:, 0]).mean()
    assert torch.allclose(found, full, rtol=1e-5)
    with pytest.raises(RuntimeError):                       # two weights for one level
        nested_loss(recon[:, :1], targets[:, :1], largest_difference, torch.ones(2))
    for distance in (F.mse_loss, torch.sub):
        with pytest.raises((RuntimeError, IndexError)):
            nested_loss(recon, targets, distance)


def test_prefix_weight_is_that_of_the_shorter_level():
    torch.manual_seed(0)
    model = tiny_tokenizer()
    images, levels = noise(3, 3, S, S), sample_levels(3, N)
    recs = []
    for weight in (0.0, 1.0, 0.25):
        args = Namespace(prefix_weight=weight, perceptual=0.5)
        losses, recon, *_ = train_tokenizer.tokenizer_losses(
            model, images, levels, model.edges, squared_error, None, args, Job("cpu"))
        assert losses["perceptual"] == losses["rec"]        # here both are the squared error
        recs.append(losses["rec"].item())
    full, both, quarter = recs
    assert full == pytest.approx(squared_error(recon, images).mean().item(), rel=1e-5)
    assert both > full + 0.01
    assert quarter == pytest.approx(full + 0.25 * (both - full), rel=1e-5)


def overfit(model, lr, steps, loss_of):
    """Train with AdamW; returns the loss of each step."""
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
@pytest.mark.parametrize("kept", [0, 1, 4, N])
@pytest.mark.parametrize("cfg, cfg_start", [(1.0, 0), (0.0, 0), (3.0, 0), (7.0, 3)])
def test_generate_equals_its_definition(cfg, cfg_start, kept):
    """The oracle runs the whole sequence again for each token, with and without the class."""
    model, labels, seeds = tiny_gpt(), torch.arange(8), torch.arange(8) + 100
    prefix = some_codes(8)[:, :kept]
    expected = F.pad(prefix, (0, N - kept))
    for t in range(kept, N):
        conditional = model(expected, labels)[:, t]
        unconditional = model(expected, torch.full_like(labels, NO_CLASS))[:, t]
        logits = unconditional + cfg * (conditional - unconditional)
        if t < cfg_start:
            logits = conditional
        expected[:, t] = sample_from_logits(logits, uniforms(seeds, N)[:, t])
    codes = model.generate(labels, cfg, cfg_start=cfg_start, prefix=prefix, seeds=seeds)
    assert torch.equal(codes, expected)


@torch.no_grad()
def test_generate_with_top_k_one_is_greedy():
    model, labels, codes = tiny_gpt(), torch.arange(8), torch.zeros(8, N, dtype=torch.long)
    for t in range(N):
        codes[:, t] = model(codes, labels)[:, t].argmax(-1)
    assert torch.equal(model.generate(labels, top_k=1), codes)
    assert torch.equal(model.generate(labels, temperature=0), codes)


def test_generate_stops_early_with_the_same_codes():
    model, labels, seeds = tiny_gpt(), torch.arange(8), torch.arange(8)
    whole = model.generate(labels, cfg=2, seeds=seeds)
    for stop in range(1, N + 1):
        codes = model.generate(labels, cfg=2, seeds=seeds, stop=stop)
        assert torch.equal(codes, F.pad(whole[:, :stop], (0, N - stop)))


@pytest.mark.parametrize("how, kept", [
    (dict(), range(5)), (dict(temperature=0.5), range(5)), (dict(temperature=2.0), range(5)),
    (dict(top_k=2), [1, 3]), (dict(top_k=9), range(5)), (dict(top_p=0.3), [1]),
    (dict(top_p=0.5), [1, 3]), (dict(top_p=0.9), [0, 1, 3, 4]), (dict(top_p=1e-9), [1]),
    (dict(top_k=2, top_p=0.6), [1])])
def test_sample_frequencies_equal_probabilities(how, kept):
    """An even grid of random numbers draws each code as often as its probability says."""
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    expected = torch.zeros(5)
    for code in kept:
        expected[code] = p[code] ** (1 / how.get("temperature", 1))
    grid = (torch.arange(20_000).double() + 0.5) / 20_000
    codes = sample_from_logits(p.log().expand(20_000, -1), grid, **how)
    found = torch.bincount(codes, minlength=5) / 20_000
    assert (found - expected / expected.sum()).abs().max() < 1e-3


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
    """A field of the config that is newer than the file takes its default."""
    model, path = tiny_tokenizer(), tmp_path / "tokenizer.pt"
    config = {name: value for name, value in vars(model.config).items() if name != "flat"}
    content = dict(config=config, model=model.state_dict(), step=3)
    save_checkpoint(path, "tokenizer", **content)
    assert read_saved(path)["step"] == 3 and list(tmp_path.iterdir()) == [path]
    loaded = load_tokenizer(path)
    assert same_weights(loaded, model) and loaded.config == model.config
    assert not loaded.training
    averages = dict(model.state_dict(), queries=model.queries + 1)
    save_checkpoint(path, "tokenizer", ema=averages, **content)
    assert torch.equal(load_tokenizer(path).queries, averages["queries"])   # not "model"


def test_checkpoint_that_is_absent_damaged_or_of_another_kind_is_told_in_one_line(tmp_path):
    path = tmp_path / "tokenizer.pt"
    with pytest.raises(UserError, match="tokenizer.pt does not exist"):
        load_tokenizer(path)
    save_checkpoint(path, "tokenizer", model={})
    with pytest.raises(UserError, match="is a tokenizer of format .*, not a gpt"):
        load_generator(path)
    torch.save(dict(kind="tokenizer", format=99), path)
    with pytest.raises(UserError, match="format 99"):
        load_tokenizer(path)
    torch.save(dict(kind="tokenizer", config=tmp_path), path)       # a pickle that runs code
    runs_code = path.read_bytes()
    no_text = b"\x80\x02X\x03\x00\x00\x00\xcf\xcf\xcf."      # of the error, even
    for damaged in (runs_code, runs_code[:len(runs_code) // 2], b"hello world\n", no_text):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"^[^\n]*is not a whole checkpoint[^\n]*$"):
            load_tokenizer(path)


def test_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "gpt.pt"
    save_checkpoint(path, "gpt", step=1)
    before = path.read_bytes()

    def half(content, target):
        Path(target).write_bytes(before[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises((UserError, RuntimeError, OSError), match="No space left"):
        save_checkpoint(path, "gpt", step=2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["field", "shape"])
def test_checkpoint_of_another_version_is_told_in_one_line(change, a_copy, capsys):
    """An unknown config field or weights of another shape ended in a traceback."""
    path = a_copy / "gpt.pt"
    checkpoint = read_saved(path)
    if change == "field":
        checkpoint["config"]["rope_base"] = 10000
    else:
        checkpoint["ema"]["pos"] = torch.ones(7)
        checkpoint["model"]["pos"] = torch.ones(7)
    torch.save(checkpoint, path)
    for script, flags in ((sample_script, ""), (train_gpt, "--resume --steps 9")):
        line = error_of(capsys, script, a_copy, flags)
        assert line.startswith("error: ") and "gpt.pt" in line
        assert ("rope_base" if change == "field" else "pos") in line


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


def test_random_streams_differ_by_purpose_seed_and_index():
    """Sample i of seed 0 once had the numbers that drew training image i of shapes."""
    indices = torch.tensor([0, 1, 2, 2 ** 32, 2 ** 32 + 1, 2 ** 40, 2 ** 62, -1])
    seeds = [0, 1, 2 ** 32, 2 ** 64, 10 ** 30, -1]
    streams = torch.cat([random_streams(purpose, seed, indices)
                         for purpose in ("samples", "crops") for seed in seeds])
    assert len(streams.unique()) == len(uniforms(streams, 1).unique()) == 2 * 6 * 8
    assert random_streams("samples", 1, 2 ** 40) == streams[8 + 5]          # each index alone


# =================================================================================================
# sample.py: image files and grids of images

def test_center_crop_gives_the_middle_at_the_size():
    for size in ((16, 16), (33, 47), (1001, 37), (5, 9), (64, 33), (31, 17)):
        assert center_crop(Image.new("RGB", size), 16).size == (16, 16), size
    pixels = np.random.default_rng(0).integers(0, 256, (16, 48, 3), np.uint8)
    cropped = center_crop(Image.fromarray(pixels), 16)
    assert np.array_equal(np.array(cropped), pixels[:, 16:32])


def test_training_crops_are_the_squares_they_say():
    """Red grows to the right and green grows downwards, so the corners tell the square."""
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


def test_odd_images_are_read_upright_and_as_rgb(tmp_path):
    """All files show red above blue. One is turned by EXIF, others have other colour modes."""
    halves = Image.new("RGB", (40, 40), (255, 0, 0))
    halves.paste((0, 0, 255), (0, 20, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6                                        # "turn me a quarter clockwise"
    halves.rotate(90).save(tmp_path / "turned.png", exif=exif)
    halves.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    halves.quantize(2).save(tmp_path / "palette.png")
    clear = halves.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 20, 40, 40))
    clear.save(tmp_path / "clear.png")                      # the transparent half becomes white
    clear.quantize(2).save(tmp_path / "clear-palette.png")

    files = sorted(str(file) for file in tmp_path.iterdir())
    for crops in (None, torch.tensor([[1.0, 0, 0]] * len(files))):
        images, _ = Folder(tmp_path, [files], 16, 1).batch(range(len(files)), crops)
        for file, image in zip(files, images):
            lower = (255, 255, 255) if "clear" in file else (0, 0, 255)
            found = torch.stack([image[:, 3, 8], image[:, 12, 8]]).float()
            assert (found - torch.tensor([(255, 0, 0), lower])).abs().max() <= 2, file


def test_pictures_of_more_than_8_bits_are_refused(tmp_path):
    """Pillow would cut them to white or black."""
    for mode in ("I", "I;16", "F"):
        Image.new(mode, (20, 20), 200).save(tmp_path / "deep.tiff")
        with pytest.raises(UserError, match="deep.tiff.*convert it to 8 bits"):
            decode_image(tmp_path / "deep.tiff", S)


def cells(picture, head=20):
    """The images of a grid of 16 px images, four times enlarged: (rows, columns, 16, 16, 3).
    head: pixels above the first row."""
    picture = np.array(picture.convert("RGB")).astype(int)
    left = picture.shape[1] % 66 if picture.shape[1] % 66 > 2 else 2
    rows = [picture[y:y + 64:4, left:] for y in range(head, picture.shape[0], 66)]
    return np.array([[row[:, x:x + 64:4] for x in range(0, row.shape[1], 66)] for row in rows])


# -------------------------------------------------------------------------------------------------
# sample.py: what it draws

@torch.no_grad()
def test_samples_are_a_row_per_class_from_gpt_pt_alone(trained, tmp_path):
    shutil.copy(trained / "gpt.pt", tmp_path)
    call(sample_script, tmp_path, "--classes star ring --num 5 --batch-size 2")
    gpt, tokenizer, _ = load_generator(tmp_path / "gpt.pt")
    codes = gpt.generate(torch.tensor([3, 5, 3, 5, 3]), cfg=2, seeds=sample_seeds(1, 5))
    expected = to_uint8(tokenizer.decode(codes)).permute(0, 2, 3, 1).int().numpy()
    shown = cells(Image.open(tmp_path / "samples.png"), head=2)
    assert abs(shown[0] - expected[::2]).max() <= 1
    assert abs(shown[1, :2] - expected[1::2]).max() <= 1
    assert (shown[1, 2:] == 255).all()                      # white where a row has ended
    every_class = cells(Image.open(trained / "samples.png"), head=2)
    assert every_class.shape[:2] == (10, 8)


@torch.no_grad()
def test_progressive_pictures_show_the_tokens_one_by_one(trained, tmp_path):
    shutil.copy(trained / "gpt.pt", tmp_path)
    gpt, tokenizer, _ = load_generator(tmp_path / "gpt.pt")
    codes = gpt.generate(torch.tensor([3, 7]), cfg=2, seeds=sample_seeds(1, 2))
    for stop in (N, 3):
        call(sample_script, tmp_path, f"--progressive --gif --classes star heart --tokens {stop}")
        levels = spread_levels(stop)
        strip = cells(Image.open(tmp_path / "progressive.png"))
        assert strip.shape[:2] == (2, len(levels))
        for column, level in enumerate(levels):
            expected = to_uint8(tokenizer.decode(codes, level)).permute(0, 2, 3, 1).numpy()
            assert abs(strip[:, column] - expected).max() <= 1
        with Image.open(tmp_path / "progressive.gif") as gif:
            # Equal frames are one, shown for longer.
            assert 1 < gif.n_frames <= stop
            gif.seek(gif.n_frames - 1)
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
        labels, prefix = torch.full((n,), label), codes[:, :keep].expand(n, -1)
        sampled = gpt.generate(labels, cfg=2, prefix=prefix, seeds=sample_seeds(seed, n))
        expected = torch.cat([tokenizer.decode(codes, keep), tokenizer.decode(sampled)])
        expected = to_uint8(expected).permute(0, 2, 3, 1).numpy()
        assert abs(row[1:] - expected).max() <= 1
        assert len(sampled.unique(dim=0)) == n


def test_npz_is_the_same_for_any_batch_and_processes(a_copy):
    """All bytes are the same, so each image has its own random numbers and label."""
    def flags(name, batch_size):
        return f"--npz {a_copy / name} --num 64 --batch-size {batch_size}"
    ranks = start_ranks(sample_script, a_copy, flags("ranks.npz", 5))
    call(sample_script, a_copy, flags("64.npz", 64))
    call(sample_script, a_copy, flags("5.npz", 5))
    finish(*ranks)
    whole = (a_copy / "64.npz").read_bytes()
    assert (a_copy / "5.npz").read_bytes() == whole
    assert (a_copy / "ranks.npz").read_bytes() == whole


@torch.no_grad()
def test_npz_is_as_adm_lays_it_out(a_copy, capsys):
    """Samples of the first tokens alone were decoded as if code 0 stood at the other places."""
    path = a_copy / "samples.npz"
    call(sample_script, a_copy,
         f"--npz {path} --num 33 --classes ring 2 star --cfg 1.5 --tokens 4")
    gpt, tokenizer, _ = load_generator(a_copy / "gpt.pt")
    with np.load(path) as file:
        images, labels = file["arr_0"], torch.from_numpy(file["arr_1"])
    assert images.dtype == np.uint8 and images.shape == (33, S, S, 3)
    assert labels.dtype == torch.int64
    assert torch.bincount(labels).tolist() == [0, 0, 11, 11, 0, 11]
    codes = gpt.generate(labels, cfg=1.5, seeds=sample_seeds(1, 33))
    expected = to_uint8(tokenizer.decode(codes, 4)).permute(0, 2, 3, 1).int().numpy()
    assert abs(images - expected).max() <= 1
    line = error_of(capsys, sample_script, a_copy, f"--npz {path}")
    assert "samples.npz exists" in line


@pytest.mark.parametrize("word, found", [
    ("crane", 4), ("10", 6),                                # the whole name
    ("tinca TINCA", 0), ("n02123045", 1), ("tabby", 1), ("5", 7),       # one of its parts
    ("0", 0), ("3", 3),                                     # the number
    ("tiger", 2), ("tama", 5), ("45", 1),                   # a piece of one name alone
    ("cow", "'cow' names 2 of 11 classes, not one: 8 ox, cow; 9 bull, cow"),
    ("11", "'11' names 0 of 11 classes, not one: 0 tench")])
def test_classes_are_found_by_name_part_number_or_piece(word, found):
    """found: the class, or what the error says. A folder that is named 10 is found by its name,
    although there is a class number 10."""
    names = ["tench, Tinca tinca (n01440764)", "tabby, tabby cat (n02123045)",
             "tiger cat (n02123159)", "dog, crane", "crane", "catamaran (n02981792)", "10",
             "digit, 5", "ox, cow", "bull, cow", "pear"]
    if isinstance(found, int):
        assert find_class(word, names) == found
    else:
        with pytest.raises(UserError, match=re.escape(found)):
            find_class(word, names)


def test_numbered_folders_are_found_by_their_own_number():
    """Of folders 01 .. 12, 1 was the second one, and 0 the first."""
    names = [f"{number:02d}" for number in range(1, 13)]
    assert [find_class(word, names) for word in ("01", "1", "10", "12")] == [0, 0, 9, 11]
    for word in ("0", "13", "1x"):
        with pytest.raises(UserError, match=f"'{word}' names 0 of 12 classes"):
            find_class(word, names)


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
    state = {}
    for name, value in InceptionV3().state_dict().items():
        if not name.endswith("num_batches_tracked"):        # older published files have none
            state[name] = weight(name, tuple(value.shape))
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path, load_inception(path)


def test_inception_has_the_published_names_and_shapes(inception):
    shapes = {name: list(value.shape) for name, value in inception[1].state_dict().items()}
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "1932d991bb5cf880"


def test_inception_equals_torch_fidelitys(inception):
    """torch-fidelity 0.4.0 in float64. A wrong pooling, epsilon, resize or layout moves these
    numbers by 1e-3 and more."""
    pool, spatial, logits = (x.numpy() for x in inception[1](pictures(103, 2, 64, 64)))
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 2048), (2, 2023), (2, 1008))
    # Features, where to look, values of the first image, largest of both.
    for found, where, values, largest in (
            (pool, range(0, 2046, 341),
             [0.0, 0.02465052343904972, 0.004095542244613171, 0.0017090020701289177,
              0.4379909634590149, 0.3599598705768585], 1.0578194856643677),
            (spatial, range(100, 2023, 401),
             [0.0, 0.0, 0.14552049338817596, 0.0, 0.35728177428245544], 0.7943995594978333),
            (logits, range(0, 1008, 168),
             [-0.38744843006134033, 0.6327806115150452, -0.31324663758277893,
              0.021672382950782776, 0.09384988993406296, -0.49044209718704224],
             1.4881196022033691)):
        assert np.allclose(found[0, where], values, rtol=0, atol=5e-6 * largest)
        assert abs(found).max() == pytest.approx(largest, rel=5e-6)


def test_inception_convolves_in_float32(inception):
    """By default cuDNN rounds to TF32, which has 10 bits."""
    args = Namespace(features="inception", inception=inception[0])
    evaluate.load_network(args, None, None, Job("cpu"))
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"


def moments(features, block=100):
    """(mean, covariance) by Moments, from `block` rows at a time."""
    m = Moments()
    for part in torch.as_tensor(features).split(block):
        m.add(part)
    return m.finish()


@pytest.mark.parametrize("n1, n2, d, expected", [           # pytorch-fid 0.3.0
    (500, 400, 64, 4.204492004929165), (1200, 1000, 256, 23.456267582217833)])
def test_frechet_distance_equals_pytorch_fids(n1, n2, d, expected):
    a = moments(correlated(1, n1, d, 0.0, 1.0))
    b = moments(correlated(2, n2, d, 0.05, 1.1))
    assert frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-6)
    arrays = [x.numpy() for x in (*b, *a)]                  # symmetric, and of numpy arrays, too
    assert frechet_distance(*arrays) == pytest.approx(expected, rel=1e-6)
    assert abs(frechet_distance(*a, *a)) < 1e-9 * a[1].trace()


def test_inception_score_equals_torch_fidelitys():
    logits = (stream(21).standard_normal((1003, 1008)) * 2.5).astype(np.float32)
    expected = {1: (14.753672271308714, 0), 10: (12.034158879046622, 0.5268761313770315)}
    for splits, score in expected.items():
        assert inception_score(logits, splits) == pytest.approx(score, rel=1e-6)


def test_precision_and_recall_equal_torch_fidelitys():
    fake = correlated(31, 600, 16, 0.1, 0.8)
    real = correlated(32, 500, 16, 0.0, 1.0)
    assert precision_recall(real, fake) == pytest.approx((0.975, 0.532), abs=1 / 600)


def test_psnr_and_ssim_equal_scikit_images():
    a = pictures(7, 3, 24, 32)
    b = noisy(a, 8, (5, 20, 60))
    expected = [34.20717792136969, 22.375562612323634, 13.404340401028074]
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-6)
    expected = [0.9896887801428584, 0.8542946714689168, 0.4204133453782313]
    assert ssim(a, b).tolist() == pytest.approx(expected, rel=1e-6)
    assert psnr(a, a).tolist() == [100] * 3                 # infinity would make means infinite
    assert ssim(a, a).tolist() == pytest.approx([1, 1, 1])


# -------------------------------------------------------------------------------------------------
# evaluate.py: its commands

@pytest.fixture(scope="module")
def judged(trained, tmp_path_factory):
    """The tiny run with a classifier of its 16 px shapes, trained for a few seconds."""
    out = shutil.copytree(trained, tmp_path_factory.mktemp("judged") / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_classifier, "__defaults__", (False, 150, 64))
        load_judge(out)
    return out


def load_judge(out):
    train, val = Shapes("train", S), Shapes("val", S)
    own = out / "classifier.pt"
    return find_classifier(None, own, JUDGE, "shapes", (train, val), S, Job("cpu"))


def test_judge_of_other_data_is_refused(judged):
    """Its classes may have the same names. A folder that was moved is not other data."""
    data = Shapes("train", S), Shapes("val", S)
    saved, moved = read_saved(judged / "classifier.pt"), judged / "moved.pt"
    for name in ("/old/place/shapes", "shapes"):
        torch.save(saved | dict(data=name), moved)
        find_classifier(moved, None, JUDGE, "/new/place/shapes", data, S, Job("cpu"))
    with pytest.raises(UserError, match="is of data shapes, not other"):
        find_classifier(moved, None, JUDGE, "/new/place/other", data, S, Job("cpu"))


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
def test_generation_is_measured_as_defined(judged, reference, monkeypatch):
    """The test draws the labels, samples the images and measures the features by itself."""
    shuffle = torch.Generator().manual_seed(random_streams("order of labels", 3, 0).item())
    labels = (torch.arange(40) % 10)[torch.randperm(40, generator=shuffle)]
    gpt, tokenizer, _ = load_generator(judged / "gpt.pt")
    codes = gpt.generate(labels, cfg=1.5, seeds=sample_seeds(3, 40))
    logits, mine = numpy_features(judged, to_uint8(tokenizer.decode(codes)))
    expected = {"FD-classifier": frechet_distance(*mine, *reference[1]),
                "accuracy": share_right(logits, labels)}
    flags = "generation --num 40 --cfg 1.5 --seed 3"
    call(evaluate, judged, f"{flags} --batch-size 16 --reference {reference[0]}")
    assert last_record(judged)["results"] == [pytest.approx(expected, rel=1e-6)]

    # Without a reference: against the training images. Here they are those of the reference.
    monkeypatch.setattr(Shapes, "__len__", lambda self: 200)
    call(evaluate, judged, flags)
    (row,) = last_record(judged)["results"]
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1


@torch.no_grad()
def test_reconstruction_is_measured_as_defined(judged):
    file = judged / "tokenizer.pt"
    flags = f"--num 50 --levels 1 6 --batch-size 16 --weights {file}"
    call(evaluate, judged, f"reconstruction {flags}")
    record = last_record(judged)
    tokenizer = load_tokenizer(file)
    images, labels = Shapes("val", S).batch(pick_images(10_000, 50))
    codes = tokenizer.encode(to_float(images))
    used = codes.unique()
    rank = effective_rank(tokenizer.quantizer.vectors(used))
    assert rank > 1
    _, originals = numpy_features(judged, images)
    assert len(record["results"]) == 2
    for row, level in zip(record["results"], (1, 6)):
        copies = to_uint8(tokenizer.decode(codes, level))
        logits, mine = numpy_features(judged, copies)
        expected = {
            "tokens": level, "window": tokenizer.edges[level - 1].item(),
            "rFD-classifier": frechet_distance(*mine, *originals),
            "PSNR": psnr(copies, images).double().mean().item(),
            "SSIM": ssim(copies, images).mean().item(), "accuracy": share_right(logits, labels),
            "codes used": len(used) / K, "rank": rank}
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        decibels = 10 * (band_energy(copies) / band_energy(images)).log10()
        bands = {f"band {lowest}": value if lowest < row["window"] else None
                 for lowest, value in zip((0, 1, 2, 4, 8), decibels.tolist())}
        assert {name: row[name] for name in bands} == pytest.approx(bands, abs=1e-4)
        assert len(row) == len(expected) + len(bands)


@torch.no_grad()
def test_reconstruction_has_lpips_of_weight_files(judged, tmp_path, monkeypatch):
    """The files lie where torch.hub puts them, in the published layout: torchvision's VGG16, and
    LPIPS' 1 x 1 convolutions."""
    model = LPIPS()
    for w in model.lin:
        w.uniform_()
    trunk = {f"features.{name}": value for name, value in model.features.state_dict().items()}
    trunk["classifier.0.bias"] = torch.zeros(3)
    linear = {f"lin{i}.model.1.weight": w.view(1, -1, 1, 1) for i, w in enumerate(model.lin)}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(trunk, folder / "vgg16-397923af.pth")
    torch.save(linear, folder / "lpips-v0.1-vgg.pth")
    call(evaluate, judged, "reconstruction --num 9 --lpips")

    images, _ = Shapes("val", S).batch(pick_images(10_000, 9))
    tokenizer = load_tokenizer(judged / "tokenizer.pt")
    copies = to_uint8(tokenizer.decode(tokenizer.encode(to_float(images))))
    expected = model(to_float(copies), to_float(images)).mean().item()
    assert expected > 0
    assert last_record(judged)["results"][0]["LPIPS"] == pytest.approx(expected, rel=1e-5)


def test_ranks_give_what_one_process_gives(judged, reference, tmp_path):
    """The counts are odd, so that the shares of the ranks differ, and smaller than one batch."""
    out = shutil.copytree(judged, tmp_path / "out")
    (out / "evaluations.jsonl").unlink(missing_ok=True)
    for flags in (f"generation --num 31 --reference {reference[0]}", "reconstruction --num 33"):
        call(evaluate, out, flags)
        alone = last_record(out)["results"]
        finish(*start_ranks(evaluate, out, flags))
        assert last_record(out)["results"] == [pytest.approx(alone[0], rel=1e-6)]
    assert len((out / "evaluations.jsonl").read_text().splitlines()) == 4       # one rank writes


def test_compare_takes_folders_images_and_statistics(judged, tmp_path, capsys):
    """The same images have distance 0 in every form. Images of one class have not. A folder of
    links is read, too, and a link back to it adds no image twice."""
    images = Shapes("val", S).batch(torch.arange(24))[0].permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(images):
        target = tmp_path / "folder" / str(i % 2)
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target / f"{i:02d}.{('PNG', 'png', 'bmp')[i % 3]}")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "class").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / "back").symlink_to(tmp_path / "links")
    np.savez(tmp_path / "plain.npz", arr_0=images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images, arr_1=np.arange(24))
    np.savez(tmp_path / "one_class.npz", arr_0=images[::10].repeat(4, 0))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    _, (mu, sigma) = numpy_features(judged, pixels)
    np.savez(tmp_path / "moments.npz", mu=mu, sigma=sigma)

    def compare(a, b, flags=""):
        call(evaluate, judged, f"compare {tmp_path / a} {tmp_path / b} --features classifier "
                               f"{flags}")
        return last_record(judged)["results"][0]
    for a, b in (("folder", "plain.npz"), ("links", "packed.npz"), ("folder", "moments.npz")):
        row = compare(a, b)
        assert abs(row["FD-classifier"]) < 1e-4, (a, b)
        assert row["images"] == 24
    assert "fewer than 2,048 images is biased" in capsys.readouterr().out
    row = compare("one_class.npz", "plain.npz")
    assert row["FD-classifier"] > 0.1 and row["recall"] < 0.5
    row = compare("links", "plain.npz", "--num 5")          # the reference stays whole
    assert (row["images"], row["reference images"]) == (5, 24)


def distance_of_few(a, b):
    """Frechet distance of features (n, d) and (m, d) of far fewer rows than columns: if A A' and
    B B' are the covariances, tr sqrt(A A' B B') is the sum of the singular values of A' B."""
    a, b = a.double(), b.double()
    A = (a - a.mean(0)) / (len(a) - 1) ** 0.5
    B = (b - b.mean(0)) / (len(b) - 1) ** 0.5
    cross = torch.linalg.svdvals(A @ B.T).sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + A.square().sum() + B.square().sum() - 2 * cross).item()


def test_compare_with_inception_gives_adms_numbers(inception, tmp_path, capsys):
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
    assert row["IS"] == pytest.approx(inception_score(a[2])[0], rel=1e-5)
    assert (row["precision"], row["recall"]) == precision_recall(b[0], a[0])

    # Images of another size are measured, with a word: their sharpness alone makes a distance.
    assert "samples are" not in capsys.readouterr().out
    np.savez(tmp_path / "large.npz", arr_0=images[4:].repeat(2, 1).repeat(2, 2))
    call(evaluate, tmp_path, f"compare {tmp_path / 'a.npz'} {tmp_path / 'large.npz'} "
                             f"--inception {inception[0]}")
    assert "samples are 32 x 32 px, the reference 64 x 64 px" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    ("compare {tmp}/good.npz", "compare takes two paths"),
    ("compare {tmp}/empty {tmp}/absent", "No such file or directory: '{tmp}/absent'"),
    ("compare {tmp}/empty {tmp}/good.npz", "empty has 0 images"),
    ("compare {tmp}/float.npz {tmp}/good.npz", "arr_0 is float64"),
    ("compare {tmp}/planes.npz {tmp}/good.npz", "(3, 3, 16, 16)"),
    ("compare {tmp}/good.npz {tmp}/good.npz --classifier {tmp}/no.pt", "no.pt does not exist"),
    ("compare {tmp}/broken {tmp}/good.npz", "cannot decode {tmp}/broken/b.png"),
    ("generation --features inception", "Connection refused"),
    ("generation --levels 2", "generation does not use levels"),
    ("reconstruction --tokens 2", "reconstruction does not use tokens"),
    ("reconstruction --cfg 3", "reconstruction does not use cfg"),
    ("generation --no-lpips", "generation does not use lpips"),
    ("reconstruction --levels 7", "--levels is 7, and there are 1 .. 6 tokens")])
def test_evaluate_tells_bad_input_in_one_line(flags, message, judged, tmp_path, capsys,
                                              monkeypatch):
    images = np.zeros((3, S, S, 3), np.uint8)
    np.savez(tmp_path / "good.npz", arr_0=images)
    np.savez(tmp_path / "float.npz", arr_0=images / 255)
    np.savez(tmp_path / "planes.npz", arr_0=images.transpose(0, 3, 1, 2))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "broken" / "a.png")
    (tmp_path / "broken" / "b.png").write_bytes(b"no picture")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(evaluate, "INCEPTION_URL", "http://127.0.0.1:9/inception.pth")
    if flags.startswith("compare"):
        flags += " --features classifier"
    line = error_of(capsys, evaluate, judged, flags.format(tmp=tmp_path))
    assert message.format(tmp=tmp_path) in line
    assert not list(tmp_path.rglob("*.pth*"))


# -------------------------------------------------------------------------------------------------
# evaluate.py: the studies of tokens, and their pictures

def test_bands_share_out_the_energy():
    """Of the larger of the two frequencies, the octaves are 0, 1, 2 and 3, 4 to 7, 8 to 15. The
    energies of images add up."""
    images = pictures(4, 3, S, S)
    spectrum = dct2(to_float(images).double()).square().sum((0, 1))
    expected = [0.0] * 5
    for u, v in np.ndindex(S, S):
        expected[max(u, v).bit_length()] += spectrum[u, v].item()
    assert band_energy(images).tolist() == pytest.approx(expected)
    parts = band_energy(images[:2]) + band_energy(images[2:])
    assert parts.tolist() == pytest.approx(expected)


def test_truncation_is_reconstruction_and_generation_side_by_side(judged, reference):
    sampling = f"--num 40 --cfg 1.5 --seed 3 --reference {reference[0]}"
    call(evaluate, judged, f"truncation {sampling} --levels 1 3 6")
    rows = last_record(judged)["results"]
    call(evaluate, judged, "reconstruction --num 40 --levels 1 3 6")
    reconstructed = last_record(judged)["results"]
    assert len(rows) == 3
    for row, level, expected in zip(rows, (1, 3, 6), reconstructed):
        call(evaluate, judged, f"generation {sampling} --tokens {level}")
        (sampled,) = last_record(judged)["results"]
        expected |= {f"g{name}": value for name, value in sampled.items()}
        assert row == pytest.approx(expected)
    assert Image.open(judged / "truncation.png").size == (3 * 840, 620)
    # levels.png is recon.png with three levels instead of four.
    width, height = Image.open(judged / "recon.png").size
    assert Image.open(judged / "levels.png").size == (width - 66, height)


def test_linear_r2_equals_its_definition():
    """torch's least squares gives the same R2, in two orders of the tokens."""
    n, places, d = 3000, 4, 2
    x = noise(n, places, d, dtype=torch.float64)
    x[:, 1] = 0.7 * x[:, 0] + 0.3 * x[:, 1] + 5
    x[:, 3] = x[:, 0] - 2 * x[:, 1]                         # earlier tokens tell all of it
    parts = x[:2000], x[2000:] + 0.1                        # the test images have another mean
    fit, test = (part - parts[0].mean(0) for part in parts)
    for order in (torch.arange(4), torch.tensor([3, 0, 2, 1])):
        expected = [0.0]
        for i in range(1, places):
            before, own = order[:i], order[i]
            W = torch.linalg.lstsq(fit[:, before].flatten(1), fit[:, own]).solution
            error = (test[:, own] - test[:, before].flatten(1) @ W).square().sum()
            expected.append(1 - (error / test[:, own].square().sum()).item())
        sets = [moments(part.flatten(1)) for part in parts]
        assert linear_r2(*sets, order) == pytest.approx(expected, abs=2e-3)
        assert max(expected) > 0.9


@torch.no_grad()
def test_probe_reports_what_the_codes_hold(judged, monkeypatch):
    """Entropy and bits equal their definitions; R2 is that of the code vectors."""
    monkeypatch.setattr(Shapes, "__len__", lambda self: 600)
    call(evaluate, judged, "probe --num 400")
    *rows, mean = last_record(judged)["results"]

    gpt, tokenizer, _ = load_generator(judged / "gpt.pt")
    images, _ = Shapes("train", S).batch(pick_images(600, 400))
    codes = tokenizer.encode(to_float(images))
    held_out, labels = Shapes("val", S).batch(torch.arange(600))
    held_out = tokenizer.encode(to_float(held_out))
    nats = -gpt(held_out, labels).log_softmax(-1).gather(-1, held_out[..., None])
    bits = nats.mean(0)[:, 0] / math.log(2)
    assert len(rows) == N
    for i, row in enumerate(rows):
        p = torch.bincount(codes[:, i]) / 400
        p = p[p > 0]
        assert row["entropy"] == pytest.approx(-(p * p.log2()).sum().item(), rel=1e-5)
        assert row["bits"] == pytest.approx(bits[i].item(), rel=1e-6)
    sets = [moments(tokenizer.quantizer.vectors(x).flatten(1)) for x in (codes, held_out)]
    for column, order in (("R2", torch.arange(N)), ("R2 reversed", torch.arange(N).flip(0))):
        found = [row[column] for row in rows]
        assert found == pytest.approx(linear_r2(*sets, order), abs=1e-6)
        assert mean[column] == pytest.approx(sum(found) / (N - 1))
    assert "R2 patches" not in mean                         # six squares do not tile an image
    assert Image.open(judged / "probe.png").size == (2 * 840, 620)


@torch.no_grad()
def test_probe_compares_tokens_with_square_patches(tmp_path, monkeypatch):
    """Four patches in raster order tile the image."""
    monkeypatch.setattr(Shapes, "__len__", lambda self: 900)
    with torch.enable_grad():
        call(train_tokenizer, tmp_path, "--steps 1 --num-tokens 4")
        call(train_gpt, tmp_path, "--steps 1")
    call(evaluate, tmp_path, "probe --num 800")
    sets = []
    for split, number in (("train", 800), ("val", 900)):
        images = to_float(Shapes(split, S).batch(pick_images(900, number))[0])
        corners = [images[:, :, y:y + 8, x:x + 8].flatten(1) for y in (0, 8) for x in (0, 8)]
        sets.append(moments(torch.cat(corners, 1)))
    *rows, _ = last_record(tmp_path)["results"]
    expected = linear_r2(*sets, torch.arange(4))
    assert [row["R2 patches"] for row in rows] == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_recon_png_shows_what_each_level_holds(trained):
    """Rows: a spectrum in its windows, its sub-images, and reconstructions of it and three other
    images. Columns: the image, and one per level."""
    picture, levels = Image.open(trained / "recon.png"), spread_levels(N)
    assert picture.height == 20 + 6 * 66
    shown = cells(picture)[:, -1 - len(levels):]            # beside the names
    images, _ = Shapes("val", S).batch(pick_images(10_000, 4))
    assert np.array_equal(shown[:, 0], images[[0, 0, 0, 1, 2, 3]].permute(0, 2, 3, 1))
    model, x = load_tokenizer(trained / "tokenizer.pt"), to_float(images)
    codes = model.encode(x)
    for level, column in zip(levels, shown[:, 1:].swapaxes(0, 1)):
        window = model.edges[level - 1].item()
        assert np.array_equal((column[0] > 0).all(-1), in_window(S, window))
        expected = to_uint8(torch.cat([low_pass(x[:1], window), model.decode(codes, level)]))
        assert abs(column[1:] - expected.permute(0, 2, 3, 1).numpy()).max() <= 1


def test_line_chart_draws_each_column():
    """The lowest value is drawn at the bottom, the highest at the top, and no value nowhere."""
    rows = [dict(tokens=i, up=float(i), down=4.0 - i if i > 1 else None) for i in range(5)]
    picture = line_chart("a title", rows, "tokens", ["up", "down"])
    assert picture.size == (840, 620)
    left, middle, right, top, centre, bottom = 96, 452, 808, 164, 352, 540
    for colour, first, last in ((COLOURS[0], (left, bottom), (right, top)),
                                (COLOURS[1], (middle, centre), (right, bottom))):
        drawn = (np.array(picture) == ImageColor.getrgb(colour)).all(-1)
        drawn[:top - 9] = False                             # the names of the columns
        y, x = drawn.nonzero()
        for end, place in ((x.min(), first), (x.max(), last)):
            assert (end, y[x == end].mean()) == pytest.approx(place, abs=6)

    # On a logarithmic axis 1, 10, 100 are a straight line. An adversarial loss may be below 0.
    for values, height in (((1.0, 10.0, 100.0), centre), ((-1.0, 10.0, 99.0), 498)):
        rows = [dict(step=i, loss=value) for i, value in enumerate(values)]
        picture = np.array(line_chart("a title", rows, "step", ["loss"], log=True))
        y, x = (picture == ImageColor.getrgb(COLOURS[0])).all(-1).nonzero()
        assert y[(x == middle) & (y > top)].mean() == pytest.approx(height, abs=6)


# -------------------------------------------------------------------------------------------------
# evaluate.py: data sets

def test_shapes_are_a_pure_function_of_split_and_index():
    data = Shapes("train", S)
    images, labels = data.batch(torch.arange(40))
    assert images.shape == (40, 3, S, S) and images.dtype == torch.uint8
    assert labels.tolist() == [*range(10)] * 4
    assert torch.equal(Shapes("train", S).batch([39, 2, 17])[0], images[[39, 2, 17]])
    both = [Shapes(split, S).batch(torch.arange(300))[0] for split in ("train", "val")]
    assert len(torch.cat(both).flatten(1).unique(dim=0)) == 2 * 300


@pytest.mark.parametrize("name, folder, train, val, names, head", [
    ("cifar10", "cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)],
     "test_batch.bin", "batches.meta.txt", 1),
    ("cifar100", "cifar-100-binary", ["train.bin"], "test.bin", "fine_label_names.txt", 2)])
def test_cifar_reads_the_official_layout(name, folder, train, val, names, head, tmp_path):
    """head: bytes of labels before each image. CIFAR-100 has a coarse label first."""
    root = tmp_path / folder
    root.mkdir()
    rng = np.random.default_rng(0)
    records = rng.integers(0, 10, (4 * len(train), head + 3072), np.uint8)
    parts = [*np.split(records, len(train)), records[:2]]
    for file, part in zip(train + [val], parts):
        part.tofile(root / file)
    (root / names).write_text("".join(f"name{i}\n" for i in range(10)) + "\n")
    data, held_out = open_cifar(name, tmp_path, 32)
    assert len(data) == len(records) and len(held_out) == 2
    images, labels = data.batch([3, 1, 0, 2])
    assert labels.tolist() == records[[3, 1, 0, 2], head - 1].tolist()
    assert data.class_names[9] == "name9"
    # Three planes, row by row.
    assert images[0, 2, 5, 30] == records[3, head + 2 * 1024 + 5 * 32 + 30]
    # Another copy of CIFAR has other codes.
    parts[0][0, -1] ^= 1
    parts[0].tofile(root / train[0])
    assert open_cifar(name, tmp_path, 32)[0].fingerprint() != data.fingerprint()


def write_images(folder, count):
    """Write 000.png, 001.png and so on. The red value of each image is its number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (20, 24), (i, 100, 200)).save(folder / f"{i:03d}.png")
    return folder


def write_pictures(folder, count):
    """Write 0.png, 1.png and so on: waves and noise, which get different codes."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pictures(0, count, 24, 30).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def test_folder_split_is_disjoint_and_covers_all(tmp_path):
    write_images(tmp_path / "b", 30)
    write_images(tmp_path / "a" / "deeper", 10)
    train, val = open_folder(tmp_path, S, 2)
    assert train.class_names == val.class_names == ["a", "b"]
    assert len(val) >= 1 and not set(train.files) & set(val.files)
    assert set(train.files) | set(val.files) == {str(f) for f in tmp_path.rglob("*.png")}
    assert open_folder(tmp_path, S, 1)[1].files == val.files
    folders = [Path(file).relative_to(tmp_path).parts[0] for file in train.files]
    assert [train.class_names[c] for c in train.labels] == folders
    images, labels = train.batch([5, 0])
    assert images.shape == (2, 3, S, S)
    assert torch.equal(labels, train.labels[[5, 0]])
    assert images[0, :, 3, 3].tolist() == [int(Path(train.files[5]).stem), 100, 200]


def test_new_files_move_no_other_into_or_out_of_val(tmp_path):
    """One file more drew all held-out images anew."""
    root = tmp_path / "old"

    def held_out():
        return {os.path.relpath(file, root) for file in open_folder(root, S, 1)[1].files}
    for name in "abc":
        write_images(root / name, 40)
    before = held_out()
    root = root.rename(tmp_path / "moved")
    assert held_out() == before
    write_images(root / "b" / "new", 20)
    write_images(root / "d", 20)
    kept = {file for file in held_out() if not file.startswith(("b/new", "d/"))}
    assert kept == before and 1 < len(before) < 20


def test_each_class_keeps_an_image_for_training(tmp_path):
    root = tmp_path / "many"
    write_images(root / "a", 200)
    write_images(root / "b", 40)
    held_out = open_folder(root, S, 1)[1].files
    for file in (root / "a").iterdir():
        if str(file) not in held_out:
            file.unlink()                                   # now the hash would hold out all of a
    train, val = open_folder(root, S, 1)
    assert (train.labels == 0).sum() == 1 and (val.labels == 0).sum() > 1

    for i in range(10):                                     # of three images, one is held out
        root = tmp_path / str(i)
        write_images(root / f"single{i}", 1)
        write_images(root / f"two{i}", 2)
        train, val = open_folder(root, S, 1)
        assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1], [1])

    for i in range(400):                                    # here it cannot be
        write_images(tmp_path / "single" / str(i), 1)
    with pytest.raises(UserError, match="one image per class"):
        open_folder(tmp_path / "single", S, 1)


@pytest.mark.parametrize("train, val", [
    ("Train", "Test"), ("training", "testing"), ("train", "eval"), ("TRAIN", "dev"),
    ("Training", "Val"), ("train", "valid"), ("train", "validation")])
def test_parts_have_many_names_and_must_agree(train, val, tmp_path):
    """Parts of unknown names would be two classes, and the test images would be trained on."""
    for data, name in ((tmp_path / "classes", "cat"), (tmp_path / "alone", "")):
        write_images(data / train / name, 3)
        write_images(data / val / name, 2)
        assert [len(part) for part in open_folder(data, S, 1)] == [3, 2]
        write_images(data / val / "dog", 1)
        with pytest.raises(UserError, match="dog"):
            open_folder(data, S, 1)


@pytest.mark.parametrize("inner", ["", "data"])
def test_folders_that_hold_the_classes_are_told(inner, tmp_path, capsys):
    """Parts of unknown names became two classes, an archive's folder of its own name became one.
    But a single class may lie in many folders, so that is a warning."""
    for name in ("rose", "tulip"):
        write_images(tmp_path / "one" / "flowers" / inner / name, 4)
        write_images(tmp_path / "two" / "first" / inner / name, 4)
        write_images(tmp_path / "two" / "second" / inner / name, 4)
    with pytest.raises(UserError, match="first, second in .* all hold .*rose, .*tulip: name one"):
        open_folder(tmp_path / "two", S, 1)
    assert open_folder(tmp_path / "one", S, 1)[0].class_names == ["flowers"]
    place = tmp_path / "one" / "flowers"
    assert f"which become one class: --data {place}?" in capsys.readouterr().out
    assert open_folder(place / inner, S, 1)[0].class_names == ["rose", "tulip"]


@pytest.mark.parametrize("folders, classes", [
    (["bus", "car", "train"], ["bus", "car", "train"]),     # a split would leave out the others
    (["cat", "__MACOSX", ".ipynb_checkpoints"], ["cat"])])
def test_folders_that_are_classes_or_none(folders, classes, tmp_path):
    for name in folders:
        write_images(tmp_path / name, 20)
    (tmp_path / folders[0] / "._000.png").write_bytes(b"no image")
    train, val = open_folder(tmp_path, S, 1)
    assert train.class_names == classes
    assert len(train) + len(val) == 20 * len(classes)


def test_kaggles_flat_val_takes_its_classes_from_the_solution(tmp_path):
    """Kaggle's ILSVRC has val/*.JPEG without class folders. It was refused."""
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


def test_folder_names_what_it_cannot_decode_and_takes_the_next(tmp_path, capsys):
    good = write_images(tmp_path, 1) / "000.png"
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:40])
    data = Folder(tmp_path, [[cut], [good] * 999], S, 1)
    images, labels = data.batch([0, 1, 0])
    assert torch.equal(images[0], images[1]) and labels.tolist() == [1, 1, 1]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "cut.png" in lines[0]        # named once, however often drawn


# -------------------------------------------------------------------------------------------------
# evaluate.py: networks of the losses

@torch.no_grad()
def test_lpips_equals_its_value_when_it_matched_the_lpips_package():
    """These values are from the day when this class gave the numbers of the lpips package to 1e-7,
    with the published weights and real images."""
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
    """The slope of a root is infinite at 0. Black patches once made the loss's gradient nan."""
    model, image = LPIPS(), torch.zeros(1, 3, 32, 32, requires_grad=True)
    for value in model.features.parameters():
        torch.nn.init.zeros_(value)                         # every feature is 0
    for value in model.lin:
        torch.nn.init.ones_(value)
    model(image, noise(1, 3, 32, 32)).sum().backward()
    assert torch.isfinite(image.grad).all()


def test_classifier_is_read_back_whether_it_pools_or_strides(tmp_path):
    """Both halve the side at each scale. The file tells which one it is."""
    images = pictures(0, 4, S, S)
    for pool in (False, True):
        torch.manual_seed(0)
        model = Classifier(3, S, (4, 6, 8), pool).eval()
        assert [tap.shape[2] for tap in model.taps(to_float(images))] == [S, S // 2, S // 4]
        save_checkpoint(tmp_path / "net.pt", "classifier", widths=(4, 6, 8), pool=pool, seed=0,
                        classes=[*"abc"], image_size=S, accuracy=0.5, model=model.state_dict())
        found = load_classifier(tmp_path / "net.pt")
        assert torch.equal(found(images)[2], model(images)[2])


def test_cifar10s_networks_come_with_the_code(tmp_path, capsys):
    """Nothing is trained, and the loss cannot be its own judge: they are of different seeds."""
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    data = evaluate.InMemory(pictures(0, 4, 32, 32), torch.arange(4), names)
    args = Namespace(data="cifar10", out=tmp_path, features="classifier", classifier=None,
                     perceptual_net="classifier")
    judge = evaluate.load_network(args, (data, data), 32, Job("cpu"))
    distance = evaluate.load_perceptual(data, data, 32, args, Job("cpu"))
    assert judge(data.images)[2].shape == (4, 10)
    assert distance(noise(4, 3, 32, 32), noise(4, 3, 32, 32, seed=1)).min() > 0.1
    assert "test accuracy 93.2%" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


@torch.no_grad()
def test_classifier_distance_is_that_of_unit_features():
    """The features of the stem and of each stage get unit length at each pixel."""
    model = randomized(Classifier(10, S, (8, 16, 24)))
    a, b = (to_float(pictures(seed, 3, S, S)) for seed in (1, 2))
    expected = 0
    for x, y in zip(model.taps(a), model.taps(b)):
        difference = F.normalize(x, dim=1) - F.normalize(y, dim=1)
        expected = expected + difference.square().sum(1).mean((1, 2))
    assert torch.allclose(model.distance(a, b), expected, rtol=1e-4)
    assert expected.min() > 0.1


# =================================================================================================
# train_tokenizer.py: settings

@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name, monkeypatch):
    """Without a width, a generator is 64 times as wide as it is deep, with one head per block."""
    config = config_from_flags(TokenizerConfig, train_tokenizer.parse_args(["--preset", name]))
    args = train_gpt.parse_args(["--preset", name])

    def on_meta(model_class):                               # sizes alone, without numbers
        def build(config):
            with torch.device("meta"):
                return model_class(config)
        return build
    on_meta(SpectralTokenizer)(config)
    monkeypatch.setattr(train_gpt, "GPT", on_meta(GPT))
    monkeypatch.setattr(train_gpt, "make_optimizers", lambda *_: {})
    gpt = train_gpt.build_generator_parts(config, 10, args, Job("meta"))["model"]
    assert args.width or (gpt.config.width, gpt.config.heads) == (64 * args.depth, args.depth)
    # A misspelt name in a preset would change nothing.
    tokenizer, generator = dict(PRESETS[name]), dict(PRESETS[name]["gpt"])
    del tokenizer["gpt"]
    assert tokenizer.keys() <= vars(train_tokenizer.parse_args([])).keys()
    assert generator.keys() <= vars(args).keys()


@torch.no_grad()
def test_tokenizer_takes_a_width_that_four_does_not_divide():
    """A quarter of the width are sines of y. Widths of 30 or 34 ended in a traceback."""
    model = tiny_tokenizer(width=30, heads=2)
    assert model(noise_images(2), torch.tensor([[N], [N]]))[0].shape == (2, 1, 3, S, S)
    assert torch.equal(sine_positions(4, 30)[:, :28], sine_positions(4, 28))


# -------------------------------------------------------------------------------------------------
# train_tokenizer.py and train_gpt.py: a whole run

@torch.no_grad()
def test_scripts_run_end_to_end(trained):
    names = {re.sub("-[0-9a-f]{16}", "", file.name) for file in trained.iterdir()}
    assert names == {
        "tokenizer.pt", "gpt.pt", "codes-train.npy", "codes-val.npy",
        "log-tokenizer.jsonl", "log-gpt.jsonl", "recon.png", "samples.png",
        "loss-tokenizer.png", "loss-gpt.png"}
    tokenizer = load_tokenizer(trained / "tokenizer.pt")
    gpt, carried, class_names = load_generator(trained / "gpt.pt")
    assert same_weights(tokenizer, carried)
    assert class_names == list(SHAPES)
    assert gpt.config == GPTConfig(**GPT_SIZES)
    for split, number, sides in (("train", 64, 2), ("val", 16, 1)):
        _, records = read_codes(trained, split)
        data = Shapes(split, S)
        images, labels = data.batch(pick_images(len(data), number))
        views = [tokenizer.encode(to_float(x)) for x in (images, images.flip(-1))[:sides]]
        assert np.array_equal(records["codes"], torch.stack(views, 1))
        assert np.array_equal(records["label"], labels)


def test_loss_charts_show_the_steps_before_a_resume(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(train_tokenizer, "save_charts",
                        lambda path, rows, *panels, log: drawn.update({path.name: rows}))
    for script in (train_tokenizer, train_gpt):
        call(script, tmp_path, "--log-every 1 --eval-every 3")
        call(script, tmp_path, "--resume --steps 8")
    for name, held_out in (("tokenizer", str(N)), ("gpt", "held-out bits")):
        rows = drawn[f"loss-{name}.png"]
        assert [row["step"] for row in rows] == [*range(1, 9)]
        assert all(row["loss"] > 0 for row in rows)
        assert [row["step"] for row in rows if held_out in row] == [3, 6, 8]


def test_flat_run_trains_and_samples(tmp_path):
    """The baseline decodes level N alone."""
    call(train_tokenizer, tmp_path, "--flat")
    call(train_gpt, tmp_path)
    records = (tmp_path / "log-tokenizer.jsonl").read_text().splitlines()
    assert list(json.loads(records[-1])["psnr_image"]) == [str(N)]
    assert load_generator(tmp_path / "gpt.pt")[1].config.flat


def test_run_that_diverges_names_the_term(tmp_path, capsys):
    line = error_of(capsys, train_tokenizer, tmp_path, "--lr 1e30 --log-every 1")
    assert re.search("(loss|rec|vq|norm) is (nan|inf) by step [1-6]", line)
    assert not list(tmp_path.glob("*.pt"))


def test_perceptual_loss_takes_a_classifier_of_the_data(tmp_path, capsys, monkeypatch):
    """Trained once, then read by other runs. It cannot be the judge, nor have a mistyped name."""
    monkeypatch.setattr(train_classifier, "__defaults__", (False, 2, 8))
    net = tmp_path / "a" / "perceptual.pt"
    flags = "--perceptual 0.5 --perceptual-start 1 --log-every 1 --perceptual-net "
    logs = []
    for out, name in (("a", "classifier"), ("b", net)):
        call(train_tokenizer, tmp_path / out, flags + str(name))
        assert ("training a classifier" in capsys.readouterr().out) == (out == "a")
        logs.append(read_log(tmp_path / out / "log-tokenizer.jsonl"))
    assert ["perceptual" in record for record in logs[0]] == [False] + [True] * 5
    for a, b in zip(*logs):
        total = a["rec"] + a["vq"] + 0.5 * a.get("perceptual", 0)
        assert a["loss"] == b["loss"] == pytest.approx(total, rel=1e-5)
    call(train_gpt, tmp_path / "a")
    line = error_of(capsys, evaluate, tmp_path / "a", f"generation --num 20 --classifier {net}")
    assert "is of seed 1, not 0" in line
    for name in ("VGG", tmp_path / "no.pt"):
        line = error_of(capsys, train_tokenizer, tmp_path / "c", flags + str(name))
        assert f"{name} does not exist" in line


# -------------------------------------------------------------------------------------------------
# train_tokenizer.py: what the log tells about codes

def test_codebook_use_by_hand():
    codes = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1]])
    used, perplexity, by_position = codebook_use(codes, 4)

    def of(*shares):
        return math.exp(-sum(share * math.log(share) for share in shares))
    assert used == 0.5 and perplexity == pytest.approx(of(3 / 8, 5 / 8))
    assert by_position == pytest.approx([of(1 / 2, 1 / 2), of(1 / 4, 3 / 4)])


def test_effective_rank_by_hand():
    """A line has rank 1 and a cross has rank 2, wherever they lie. The arms of the stretched cross
    have the shares 3/4 and 1/4. A point has rank 1."""
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
# train_tokenizer.py: batches and processes

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
    """The class of shape i is i mod 10, so every 20th shape is a circle."""
    chosen = pick_images(1_000_000, 50_000)
    assert len(chosen.unique()) == 50_000
    assert (chosen.diff() > 0).all() and chosen.max() > 990_000
    assert torch.bincount(chosen % 10, minlength=10).min() > 4500
    assert pick_images(7, 9).tolist() == [*range(7)]


def assert_same_training(path, other, lr, steps):
    """Two runs took the same steps, whatever the machine's rounding.

    AdamW divides a gradient by its own size, so where a gradient is all rounding, a weight moves
    by up to lr in any direction. The optimizers' means are sums of gradients: they differ by
    rounding alone, and by much where a micro-batch is dropped or gradients are not averaged.
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

    differ = {"ms", "images_per_second", "eta_hours"}
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
# train_tokenizer.py: optimizer and averaged weights

@pytest.mark.parametrize("build", [tiny_tokenizer, tiny_gpt])
def test_optimizer_holds_every_parameter_once(build):
    model = build()
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
def test_muon_equals_torchs(shape, monkeypatch):
    """With its polynomials, ours equals torch.optim.Muon in bfloat16, and is close in float32."""
    monkeypatch.setattr(train_tokenizer, "POLYNOMIALS", [(3.4445, -4.7750, 2.0315)] * 5)
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
    lengths = torch.logspace(0, -1.8, 12)
    x = orthogonalize(u * lengths @ v)
    kept = u.mT @ x @ v.mT                              # in the basis of its singular vectors
    diagonal = kept.diagonal(dim1=1, dim2=2)
    assert 0.72 < diagonal.min() and diagonal.max() < 1.28
    assert (kept - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert not orthogonalize(torch.zeros(1, 3, 2)).any()
    # Of a matrix of rank 1 the norm is the singular value, and bfloat16 may round it up.
    rank_one = (torch.randn(99, 12, 1) @ torch.randn(99, 1, 40)).bfloat16()
    assert torch.linalg.matrix_norm(orthogonalize(rank_one).float(), 2).max() < 1.3


def test_optimizer_step_clips_and_keeps_each_groups_own_rate():
    """A fork's group keeps its lr_scale. Once, every group's rate was overwritten."""
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    model = torch.nn.ParameterList([a, b])
    optimizers = [torch.optim.SGD([dict(params=[a])], lr=1.0),
                  torch.optim.SGD([dict(params=[b], lr_scale=0.1)], lr=1.0)]
    args = Namespace(lr=1.0, warmup=2, hold=1.0, steps=9, clip=1.0)
    (3 * a.sum() + 4 * b.sum()).backward()
    norm = optimizer_step(model, optimizers, 0, args)
    assert norm.item() == pytest.approx(50 ** 0.5)
    assert a.tolist() == pytest.approx([-0.5 * 3 / 50 ** 0.5] * 2, rel=1e-4)    # at half the rate
    assert b.tolist() == pytest.approx([-0.05 * 4 / 50 ** 0.5] * 2, rel=1e-4)
    assert a.grad is None and b.grad is None


def test_lr_at_equals_its_formula():
    args = Namespace(lr=2.0, warmup=10, hold=0.5, steps=110)
    assert [lr_at(step, args) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert [lr_at(step, args) for step in (10, 30, 55)] == [2.0, 2.0, 2.0]
    assert [lr_at(step, args) for step in (82.5, 110, 200)] == pytest.approx([1.1, 0.2, 0.2])
    args.hold = 0.0
    assert lr_at(60, args) == pytest.approx(1.1)            # halfway from warm-up to the end


def test_update_ema_equals_its_closed_form():
    """The average is one of parameters and of buffers, such as the codebook's usage."""
    model = torch.nn.BatchNorm1d(2)
    model.num_batches_tracked = None                        # an integer
    ema, expected = copy.deepcopy(model), 0.0
    for step in range(30):
        for value in (model.bias.data, model.running_mean):
            value.fill_(step)
        update_ema(ema, model, 0.6, step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.bias.tolist() == ema.running_mean.tolist() == pytest.approx([expected] * 2)


# -------------------------------------------------------------------------------------------------
# train_tokenizer.py: checkpoints and --resume

@TRAINING
def test_resume_is_exact(script, kind, trained, tmp_path, monkeypatch):
    """Three steps and three more give the same bits as six steps. --resume needs no other flag: a
    run with --lr 5e-4 once went on at the preset's rate."""
    flags = "--lr 5e-4 --seed 3 --betas 0.8 0.9 --weight-decay 0.3 --batch-size 6 --hold 1"
    if kind == "tokenizer":
        flags += " --gan 0.5 --gan-start 2"
    whole = copy_without(trained, tmp_path / "whole", kind)
    resumed = copy_without(trained, tmp_path / "resumed", kind)
    call(script, whole, flags)
    call(script, resumed, f"{flags} --steps 3")
    with open(resumed / f"log-{kind}.jsonl", "a") as log:   # a crash cut a line short
        log.write('{"step": 3, "lo')
    monkeypatch.setitem(FLAGS, script, "")
    torch.manual_seed(12345)                                # a new process has another state
    call(script, resumed, "--resume --steps 6")
    assert_same(whole / f"{kind}.pt", resumed / f"{kind}.pt")


@TRAINING
def test_killed_run_resumes_exactly(script, kind, trained, tmp_path):
    flags = "--steps 40 --save-every 4"
    whole = copy_without(trained, tmp_path / "whole", kind)
    killed = copy_without(trained, tmp_path / "killed", kind)
    process = start(script, killed, flags)
    wait_for((killed / f"{kind}.pt").exists, process)
    kill(process)                                           # between steps, in one, or in a save
    assert read_saved(killed / f"{kind}.pt")["step"] in range(4, 40, 4)
    call(script, whole, flags)
    call(script, killed, f"{flags} --resume")
    assert_same(whole / f"{kind}.pt", killed / f"{kind}.pt")


@pytest.mark.parametrize("script, kind, sent", [
    (train_tokenizer, "tokenizer", "SIGTERM"), (train_gpt, "gpt", "SIGHUP")],
    ids=["SIGTERM", "SIGHUP"])
def test_stopped_run_saves_and_resumes_exactly(script, kind, sent, trained, tmp_path):
    """A run that was told to stop once lost all steps since its last save."""
    if signal.getsignal(getattr(signal, sent)) == signal.SIG_IGN:
        pytest.skip("nohup ignores SIGHUP, and so do the processes that it starts")
    flags = "--steps 60 --log-every 1"
    whole = copy_without(trained, tmp_path / "whole", kind)
    stopped = copy_without(trained, tmp_path / "stopped", kind)
    log = stopped / f"log-{kind}.jsonl"
    log.unlink(missing_ok=True)
    process = start(script, stopped, flags)
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, process)
    process.send_signal(getattr(signal, sent))
    process.communicate(timeout=60)
    assert 2 < read_saved(stopped / f"{kind}.pt")["step"] < 60
    call(script, whole, flags)
    call(script, stopped, f"{flags} --resume")
    assert_same(whole / f"{kind}.pt", stopped / f"{kind}.pt")


@TRAINING
def test_run_does_not_replace_a_checkpoint_unasked(script, kind, a_copy, capsys):
    path = a_copy / f"{kind}.pt"
    before = path.read_bytes()
    for flags, message in (("", "--resume goes on from it, --overwrite replaces it"),
                           ("--resume", "6 steps"),
                           ("--resume --steps 9 --width 64", "width")):
        assert message in error_of(capsys, script, a_copy, flags)
        assert path.read_bytes() == before
    call(script, a_copy, "--overwrite --seed 5")
    assert path.read_bytes() != before


@pytest.mark.parametrize("place", ["open_data", "training_step"])
def test_two_runs_do_not_write_into_one_folder(place, tmp_path, capsys, monkeypatch):
    """The second's checkpoints replaced the first's without --overwrite. The other run saves while
    this one opens its data, or later."""
    path, function = tmp_path / "tokenizer.pt", getattr(train_tokenizer, place)

    def beside_another_run(*args):
        path.write_bytes(b"another run's")
        return function(*args)
    monkeypatch.setattr(train_tokenizer, place, beside_another_run)
    assert "another run has written" in error_of(capsys, train_tokenizer, tmp_path)
    assert path.read_bytes() == b"another run's"


def test_checkpoint_that_was_moved_aside_is_written_anew(tmp_path, monkeypatch):
    """The run took the absent file for the work of another run, and threw its steps away."""
    path, aside = tmp_path / "tokenizer.pt", tmp_path / "aside.pt"
    training_step = train_tokenizer.training_step

    def step_after_a_move(step, *args):
        if step == 4:
            path.rename(aside)
        return training_step(step, *args)
    monkeypatch.setattr(train_tokenizer, "training_step", step_after_a_move)
    call(train_tokenizer, tmp_path, "--save-every 4")
    assert (read_saved(aside)["step"], read_saved(path)["step"]) == (4, 6)


# -------------------------------------------------------------------------------------------------
# train_tokenizer.py: adversarial loss

def test_adversarial_losses_equal_their_formulas():
    real, fake = noise(5, 7), noise(5, 7, seed=1)
    r, f = real.flatten().tolist(), fake.flatten().tolist()
    expected = (sum(max(1 - x, 0) for x in r) + sum(max(1 + x, 0) for x in f)) / 70
    found = discriminator_loss(torch.nn.Identity(), real, fake, Job("cpu"))
    assert found.item() == pytest.approx(expected, rel=1e-5)

    discriminator = Discriminator().requires_grad_(False)
    assert discriminator(noise(2, 3, 64, 64)).shape == (2, 1, 8, 8)
    images = noise(2, 3, 32, 32)
    alone = discriminator(images[1:])                       # an image's logits are its own
    assert torch.allclose(discriminator(images)[1:], alone, atol=1e-5)


# =================================================================================================
# train_gpt.py: codes, labels and data

def test_codes_of_another_tokenizer_are_refused(a_copy, capsys):
    checkpoint = read_saved(a_copy / "tokenizer.pt")
    old = code_fingerprint(load_generator(a_copy / "gpt.pt")[1])
    checkpoint["ema"]["mask_tokens"] += 1                   # another decoder, the same codes
    torch.save(checkpoint, a_copy / "tokenizer.pt")
    assert code_fingerprint(load_tokenizer(a_copy / "tokenizer.pt")) == old
    checkpoint["ema"]["patch_pos"] += 1
    torch.save(checkpoint, a_copy / "tokenizer.pt")
    new = code_fingerprint(load_tokenizer(a_copy / "tokenizer.pt"))
    line = error_of(capsys, train_gpt, a_copy, "--resume --steps 9")
    assert old in line and new in line and "--overwrite" in line
    call(train_gpt, a_copy, "--overwrite")
    assert code_fingerprint(load_generator(a_copy / "gpt.pt")[1]) == new


def test_weights_from_elsewhere_name_their_data_and_lend_their_tokenizer(trained, tmp_path,
                                                                         monkeypatch):
    """A gpt.pt of 16-bit weights draws, is measured, and has its tokenizer learned anew."""
    saved = read_saved(trained / "gpt.pt")
    for model in (saved["ema"], saved["tokenizer"]["model"]):
        model |= {name: x.half() if x.is_floating_point() else x for name, x in model.items()}
    file = tmp_path / "small.pt"
    torch.save(saved, file)
    monkeypatch.chdir(tmp_path)
    for script, flags in ((evaluate, f"probe --weights {file} --num 500"),
                          (sample_script, f"--weights {file}")):
        run_script(script.main, script.parse_args, shlex.split(f"{flags} {MACHINE}"))
    assert Path("out/shapes/samples.png").exists() and Path("out/shapes/probe.png").exists()
    assert not Path("out/shapes/gpt.pt").exists()

    call(train_gpt, tmp_path / "new", f"--tokenizer {file}")
    borrowed = load_generator(tmp_path / "new/gpt.pt")[1]
    assert same_weights(borrowed, load_tokenizer(file))
    assert not same_weights(borrowed, load_tokenizer(trained / "tokenizer.pt"))


def test_training_uses_the_mirror_images(trained, a_copy):
    path, records = read_codes(a_copy, "train")
    records["codes"][:, 1] = (records["codes"][:, 1] + 1) % K
    np.save(path, records)
    call(train_gpt, a_copy, "--overwrite")
    one, two = (read_saved(out / "gpt.pt")["model"] for out in (a_copy, trained))
    assert not torch.equal(one["pos"], two["pos"])


@torch.no_grad()
def test_ten_crop_encodes_five_crops_and_their_mirror_images(tmp_path):
    data, tokenizer = write_pictures(tmp_path / "data", 20), tiny_tokenizer()
    train, _ = open_folder(data, S, 1)
    args = Namespace(out=tmp_path)
    records = train_gpt.encode_data("train", tokenizer, train, 4, "ten-crop", args, Job("cpu"))
    views = []
    for down, right in ((0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1)):
        crops = torch.tensor([[1.1, down, right]] * 4)
        images, _ = train.batch(pick_images(len(train), 4), crops)
        views += [tokenizer.encode(to_float(x)) for x in (images, images.flip(-1))]
    assert np.array_equal(records["codes"], torch.stack(views, 1))


@pytest.mark.parametrize("drop, untouched", [
    (0, slice(NO_CLASS, NO_CLASS + 1)), (1, slice(0, NO_CLASS))])
def test_dropped_labels_train_the_row_without_a_class(drop, untouched, a_copy):
    call(train_gpt, a_copy, f"--overwrite --label-drop {drop}")
    torch.manual_seed(random_streams("generator weights", 0, 0).item())
    begin = GPT(GPTConfig(**GPT_SIZES))
    end = read_saved(a_copy / "gpt.pt")["model"]
    same = (begin.class_embed.weight == end["class_embed.weight"]).all(1)
    assert same[untouched].all() and same.sum() == len(same[untouched])


def test_codes_belong_to_their_images_and_classes(tmp_path, capsys):
    """A renamed class folder moved every label, and the old codes were learned in silence. So it
    was where two files were exchanged to correct their labels."""
    data, out = tmp_path / "data", tmp_path / "out"
    write_images(data / "blue", 30)
    write_images(data / "red", 40)
    flags = f"--data {data} --code-images 50"
    call(train_tokenizer, out, f"--data {data} --perceptual 0 --gan 0")
    call(train_gpt, out, flags)
    assert load_generator(out / "gpt.pt")[2] == ["blue", "red"]
    old, _ = read_codes(out, "train")

    one, two = data / "blue" / "003.png", data / "red" / "003.png"
    assert one.stat().st_size == two.stat().st_size
    one.rename(tmp_path / "one.png")
    two.rename(one)
    (tmp_path / "one.png").rename(two)
    call(train_gpt, out, f"{flags} --overwrite")
    assert len(list(out.glob("codes-train-*.npy"))) == 2 and old.exists()

    (data / "blue").rename(data / "zblue")
    line = error_of(capsys, train_gpt, out, f"{flags} --resume --steps 9")
    assert "['blue', 'red']" in line and "zblue" in line and "--overwrite" in line


@pytest.mark.parametrize("classes", [["cat", "dog"], [""]], ids=["classes", "alone"])
def test_run_keeps_to_its_data_wherever_they_lie(classes, tmp_path, capsys):
    """Without --data, every run was once measured against the built-in shapes."""
    data, other, moved, out = (tmp_path / name for name in ("data", "other", "moved", "out"))
    for name in classes:
        write_pictures(data / name, 30)
    shutil.copytree(data, other)
    write_images(other / classes[0], 1)
    call(train_tokenizer, out, f"--data {data} --perceptual 0")
    call(train_gpt, out, f"--data {data}")
    for script, flags in ((train_gpt, "--overwrite"), (evaluate, "reconstruction"),
                          (evaluate, "generation"), (evaluate, "truncation"), (evaluate, "probe")):
        for name in ("shapes", other):
            line = error_of(capsys, script, out, f"{flags} --data {name}")
            assert f"was trained on --data {data}, this run has --data {name}: give" in line

    data.rename(moved)
    call(evaluate, out, f"probe --data {moved}")
    call(train_gpt, out, f"--data {moved} --overwrite")
    assert len(list(out.glob("codes-train-*.npy"))) == 1    # those of before

    # A copy has other times of change, so its codes are made anew.
    copy = shutil.copytree(moved, tmp_path / "elsewhere" / "data", copy_function=shutil.copyfile)
    call(train_gpt, out, f"--data {copy} --overwrite")
    assert "have changed since" in capsys.readouterr().out
    assert len(list(out.glob("codes-train-*.npy"))) == 2


# =================================================================================================
# all scripts: on a device that this machine lacks

class Far(torch.Tensor):
    """A tensor that says it lies on another device, "far". Its numbers, `near`, are on the CPU."""

    @staticmethod
    def __new__(cls, near):
        far = torch.Tensor._make_wrapper_subclass(
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(),
            dtype=near.dtype, device="far:0")
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("a tensor left the pretended device's mode")


class FarDevice(TorchDispatchMode):
    """Computes on the CPU, refuses what Apple's GPUs cannot do or would be a mistake on any, and
    collects in `waits` each operation that makes the CPU wait for the device."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_far = [isinstance(x, Far) for x in tensors]
        copies = name in ("_to_copy", "copy_")
        # A number, as a tensor without dimensions, may come from the CPU.
        mixed = any(is_far) and any(x.dim() and not far for x, far in zip(tensors, is_far))
        assert copies or not mixed, f"{name} mixes devices"

        to_far = any(is_far)
        if kwargs.get("device") is not None:
            to_far = torch.device(kwargs["device"]).type == "far"
            kwargs["device"] = torch.device("cpu")
        elif copies and name == "copy_":
            to_far = is_far[0]
        comes_back = any(is_far) and (not to_far or name == "_local_scalar_dense")
        blocks = to_far and not any(is_far) and copies and not kwargs.get("non_blocking")
        if comes_back or blocks or to_far and name in ("bincount", "nonzero", "_unique2"):
            self.waits.append(name)

        def near(x):
            return x.near if isinstance(x, Far) else x

        def far(x):
            if not isinstance(x, torch.Tensor) or not to_far:
                return x
            assert x.dtype != torch.float64, f"{name} makes float64 on the device"
            return Far(x)
        result = function(*tree_map(near, args), **tree_map(near, kwargs))
        in_place = function._schema.is_mutable and name.endswith("_") and tensors[0] is args[0]
        return args[0] if in_place else tree_map(far, result)


class FarNumbers(TorchFunctionMode):
    """The few functions of PyTorch that a FarDevice cannot see."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and "device" in kwargs:
            device = kwargs["device"]
            rest = {name: value for name, value in kwargs.items() if name != "device"}
            return function(*args, **rest).to(device, non_blocking=True)
        if function is torch.Tensor.tolist and isinstance(args[0], Far):
            return args[0].cpu().tolist()
        return function(*args, **kwargs)


def steps_and_measures(device, out, waits):
    """Three steps of each script, samples and all evaluations on a device -> numbers to compare,
    and what of `waits` the last step of each script has caused. (The first one builds what later
    ones find in caches.)"""
    job = Job(device)
    flags = shlex.split(f"--device {device} --out {out} --gan 0.1 {FLAGS[train_tokenizer]}")
    args = train_tokenizer.parse_args(flags)
    parts = train_tokenizer.build_tokenizer_parts(args, job)
    train, val = Shapes("train", S), Shapes("val", S)
    train.size = val.size = 48
    judge = Classifier(10, S, (8, 8, 8)).to(device)
    batches = train_tokenizer.image_batches(train, args, job, 0)
    for step in range(3):
        batch = next(batches)
        waits.clear()
        terms = train_tokenizer.training_step(step, batch, parts, parts, judge.distance, args, job)
    seen = list(waits)
    numbers = [value.item() for value in terms.values()]
    record = train_tokenizer.evaluate_tokenizer(parts["ema"], val, args, job)
    numbers += record["psnr_image"].values()

    flags = shlex.split(f"--device {device} --out {out} {FLAGS[train_gpt]}")
    args = train_gpt.parse_args(flags)
    tokenizer, judge = parts["ema"], judge.eval()
    parts = train_gpt.build_generator_parts(tokenizer.config, 10, args, job)
    codes = train_gpt.encode_data("train", tokenizer, train, None, "flip", args, job)
    batches = train_gpt.code_batches(codes, 10, args, job, 0)
    for step in range(3):
        batch = next(batches)
        waits.clear()
        terms = train_gpt.generator_step(step, batch, parts, parts["model"], args, job)
    seen += waits
    numbers += [value.item() for value in terms.values()]
    numbers.append(train_gpt.evaluate_generator(parts["ema"], codes, job)["bits"])

    args = evaluate.parse_args(shlex.split(f"truncation --num 40 --device {device} --out {out}"))
    gpt = randomized(parts["ema"])
    rows = evaluate.measure_reconstructions(tokenizer, judge, val, [2, N], args, job)
    rows += evaluate.measure_generation(gpt, tokenizer, judge, train, [2, N], args, job)
    numbers += [value for row in rows for value in row.values() if value is not None]
    evaluate.draw_levels(out / "levels.png", tokenizer, val, [2, N], job)
    numbers.append(evaluate.correlate_tokens(tokenizer, val, 40, job)["vectors"][1].sum().item())
    sample_script.draw_class_samples(out / "samples.png", gpt, tokenizer, SHAPES, 2.0)
    return numbers, seen


@pytest.mark.skipif(not hasattr(torch, "far"), reason="this PyTorch cannot pretend a device")
def test_nothing_needs_float64_or_makes_a_step_wait_on_a_device(tmp_path, monkeypatch):
    """Apple's GPUs have no float64, and a GPU that a step waits for stands idle. The same numbers
    as on the CPU show that the pretended device computes what it should."""
    expected, _ = steps_and_measures("cpu", tmp_path, [])
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    device = FarDevice()
    (tmp_path / "far").mkdir()
    with FarNumbers(), device:
        found, waits = steps_and_measures("far", tmp_path / "far", device.waits)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert waits == []


def test_blocks_and_gpt_compile_without_a_graph_break():
    """Also where the length of the sequence changes, as under the cache."""
    torch._dynamo.reset()
    model, codes, labels = tiny_gpt(), some_codes(2), torch.arange(2)
    logits = torch.compile(model.logits, fullgraph=True, backend="eager")
    block = torch.compile(tiny_tokenizer().encoder[0], fullgraph=True, backend="eager")
    with torch.no_grad():
        x, modulations = model.embed(codes[:, :-1], labels), model.modulations(labels)
        caches = torch.empty(2, 2, 2, GPT_SIZES["heads"], N, D // GPT_SIZES["heads"])
        found = [logits(x[:, :2], modulations, caches, 0)]
        found += [logits(x[:, t:t + 1], modulations, caches, t) for t in range(2, N)]
        assert torch.allclose(torch.cat(found, 1), model(codes, labels), atol=1e-5)
    for length in (5, 9):                                   # with gradients
        x = noise(2, length, D).requires_grad_()
        block(x, causal_mask(length)).sum().backward()
        assert x.grad.abs().sum() > 0


# =================================================================================================
# all scripts: what a user may do wrong

@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder of an unusable data set."""
    folder = tmp_path_factory.mktemp("bad")
    write_images(folder / "classes" / "full", 1)
    (folder / "classes" / "empty").mkdir()
    return folder


@pytest.mark.parametrize("script, flags, message", [
    (train_tokenizer, "--data {bad}/absent", "No such file or directory: '{bad}/absent'"),
    (train_tokenizer, "--data {bad}/classes", "empty has 0 images"),
    (train_tokenizer, "--data cifar10", "32 px, --image-size is 16"),
    (train_tokenizer, "--data imagenet --data-dir {bad}/classes", "classes has no train folder"),
    (train_tokenizer, "--image-size 30", "image_size 30 is not divisible by patch_size 4"),
    (train_tokenizer, "--heads 5", "width 32 is not divisible by heads 5"),
    (train_tokenizer, "--batch-size 7 --micro-batch 2", "--batch-size 7 is not a multiple of"),
    (train_tokenizer, "--resume", "tokenizer.pt does not exist"),
    (train_gpt, "", "tokenizer.pt does not exist"),
    (train_gpt, "--out {trained} --overwrite --heads 5", "width 32 is not divisible by heads 5"),
    (train_gpt, "--out {trained} --overwrite --views ten-crop",
     "crops image files, shapes has none"),
    (sample_script, "", "gpt.pt does not exist"),
    (sample_script, "--out {trained} --classes rings", "'rings' names 0 of 10 classes, not one"),
    (sample_script, "--out {trained} --top-p 0", "temperature and top_k must be at least 0"),
    (sample_script, "--out {trained} --tokens 7", "--tokens is 7, and there are 1 .. 6 tokens"),
    (sample_script, "--out {trained} --upscale {image} --keep 7", "--keep is 7"),
    (sample_script, "--out {trained} --upscale {trained}/gpt.pt", "cannot decode {trained}/gpt"),
    (sample_script, "--out {trained} --upscale {bad}/absent.png", "absent.png")])
def test_bad_input_is_told_in_one_line(script, flags, message, trained, bad_files, tmp_path,
                                       capsys):
    image = bad_files / "classes" / "full" / "000.png"
    places = dict(bad=bad_files, image=image, trained=trained, out=tmp_path / "out")
    line = error_of(capsys, script, tmp_path / "out", flags.format(**places))
    assert "error: " in line and message.format(**places) in line
    assert not list((tmp_path / "out").glob("*.pt"))


def test_lack_of_memory_names_the_remedy(trained, capsys, monkeypatch):
    def generate(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(GPT, "generate", generate)
    line = error_of(capsys, sample_script, trained, "--batch-size 20")
    assert "out of memory: take a smaller" in line and "--batch-size" in line


def test_command_line_ends_with_its_exit_code(tmp_path):
    command = [sys.executable, "sample.py", "--out", str(tmp_path / "absent")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


# =================================================================================================
# README and docs

def documents():
    """{name: text} of README.md and docs/*.md."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def code_blocks(text, language):
    """The fenced blocks of one language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_readme_docs_and_docstring_commands_parse(tmp_path, monkeypatch):
    """A reader pastes the commands. They are parsed in an empty folder."""
    texts = [script.__doc__ for script in SCRIPTS.values()]
    texts += [text.replace("\\\n", " ") for text in documents().values()]
    commands = re.findall(r"(?:python|torchrun .*?) (\w+\.py)([^\n`#|&;]*)", "\n".join(texts))
    assert len(commands) > 60
    monkeypatch.chdir(tmp_path)
    Path("docs").symlink_to(ROOT / "docs")                  # --weights reads its file
    for script, flags in commands:
        SCRIPTS[script].parse_args(shlex.split(flags))


def test_readme_and_docs_python_names_what_exists():
    """Python in the documents compiles, and imports only names that exist."""
    for text in documents().values():
        for block in code_blocks(text, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    exec(ast.unparse(node), {})


def test_readme_and_docs_links_and_pictures_exist():
    for document, text in documents().items():
        text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text)
        links += re.findall(r'(?:src|href)="([^"]+)"', text)
        for link in links:
            path = link.split("#")[0]
            if not re.match(r"\w+:", link):                 # https:, mailto:
                target = (ROOT / document).parent / path
                assert target.exists(), f"{document}: {path} does not exist"


def test_readme_and_docs_name_tests_that_exist():
    """Also those in the docstring of this file."""
    text = " ".join([__doc__, *documents().values()])
    for name in re.findall(r"\btest_(?!spectralar)\w+", text):
        assert name in globals(), name


# -------------------------------------------------------------------------------------------------
# docs/tour.md: what a reader types, and what comes back

@pytest.mark.documents
def test_tour_prints_what_it_says(tmp_path, capsys, monkeypatch):
    """All is typed line by line. So the test also finds a loop that lacks the empty line after it.
    Stops 1 to 6 are equal to the letter. From stop 7 on, a machine's rounding may change a code
    here and there, and a sample with it: there a number may differ by a tenth."""
    monkeypatch.chdir(tmp_path)
    Path("docs").symlink_to(ROOT / "docs")
    pairs = re.findall(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?",
                       documents()["docs/tour.md"], re.M | re.S)
    assert len(pairs) > 12
    prompt, number, tolerance = InteractiveConsole(), r"\d+\.?\d*", 0.0
    try:
        for block, printed in pairs:
            if "load_generator(" in block:
                tolerance = 0.1
            capsys.readouterr()
            for line in [*block.splitlines(), ""]:
                unfinished = prompt.push(line)
            shown, errors = capsys.readouterr()
            assert not unfinished and not errors, block + errors
            assert re.sub(number, "", shown) == re.sub(number, "", printed)
            expected = [float(x) for x in re.findall(number, printed)]
            found = [float(x) for x in re.findall(number, shown)]
            assert found == pytest.approx(expected, rel=tolerance), shown
    finally:
        torch.set_grad_enabled(True)


# -------------------------------------------------------------------------------------------------
# docs/forks.md: the diffs

@pytest.mark.documents
@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_forks_apply_and_parse(tmp_path):
    outside = os.environ | dict(GIT_CEILING_DIRECTORIES=str(tmp_path))     # of all repositories
    diffs = code_blocks(documents()["docs/forks.md"], "diff")
    assert diffs
    for number, diff in enumerate(diffs):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in ["spectralar.py", *SCRIPTS]:
            shutil.copy(ROOT / file, folder)
        done = subprocess.run(["git", "apply"], input=diff, cwd=folder, env=outside,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for file in re.findall(r"^\+\+\+ b/(.*)", diff, re.M):
            ast.parse((folder / file).read_text())
