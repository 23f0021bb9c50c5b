"""python -m pytest -q test_spectralar.py"""
import math

import torch

from spectralar import GPT, GPTConfig, SpectralTokenizer, TokenizerConfig, dct2, dct_matrix, idct2, low_pass


def tiny_tokenizer(**changes):
    torch.manual_seed(0)
    config = dict(image_size=16, patch_size=4, num_tokens=6, codebook_size=32, code_dim=4, width=32, depth=2, heads=4)
    return SpectralTokenizer(TokenizerConfig(**{**config, **changes})).eval()


def test_dct_matrix_is_its_definition():
    C = dct_matrix(8, torch.float64)
    for k in range(8):
        for n in range(8):
            scale = math.sqrt((1 if k == 0 else 2) / 8)
            assert abs(C[k, n] - scale * math.cos(math.pi * k * (2 * n + 1) / 16)) < 1e-14


def test_dct2_keeps_energy_and_inverts():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(dct2(x).square().sum(), x.square().sum())
    torch.testing.assert_close(idct2(dct2(x)), x)


def test_low_pass_nests_and_is_exact_at_full_window():
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(low_pass(low_pass(x, 5), 3), low_pass(x, 3), atol=1e-5, rtol=0)
    assert torch.equal(low_pass(x, 8), x)


def test_encoder_is_causal_bit_for_bit():
    model, images = tiny_tokenizer(), torch.rand(2, 3, 16, 16)
    before = model.encode_vectors(images)
    model.queries.data[3] += 1
    after = model.encode_vectors(images)
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.equal(before[:, 3:], after[:, 3:])


def test_decoder_ignores_codes_beyond_the_level_bit_for_bit():
    model, codes = tiny_tokenizer(), torch.randint(32, (2, 6))
    changed = torch.cat([codes[:, :4], (codes[:, 4:] + 1) % 32], 1)
    assert torch.equal(model.decode(codes, 4), model.decode(changed, 4))
    assert not torch.equal(model.decode(codes, 5), model.decode(changed, 5))


def test_generate_with_cache_equals_without():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(num_classes=3, num_tokens=6, codebook_size=32, width=32, depth=2, heads=4)).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    labels, seeds = torch.arange(3), torch.arange(3)
    for cfg in (1.0, 2.5):
        assert torch.equal(gpt.generate(labels, cfg, seeds=seeds), gpt.generate(labels, cfg, seeds=seeds, cache=False))
