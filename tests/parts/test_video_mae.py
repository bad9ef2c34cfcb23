from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moviola.parts.backbones.video_mae import (
    BiasedAttention,
    Encoder,
    MaskedAutoencoder,
    StackConfig,
    pixel_targets,
    positions,
)
from moviola.parts.video_masks import kept, take, tube_mask
from moviola.types import Refusal, UsageError

CONFIG, SIZE = StackConfig(32, 2, 2), (8, 16, 4, 2)


def encoder_of(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return Encoder(config, *SIZE).eval()


def pixels(count, seed=0):
    return torch.randn(count, 8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def hidden_of(count):
    return tube_mask(count, (4, 4, 4), 0.75, generator=torch.Generator().manual_seed(0))


def test_seen_tokens_alone_are_those_of_the_convolution():
    encoder, frames = encoder_of(), pixels(3)
    every = encoder.embed(frames)
    index = kept(hidden_of(3))
    torch.testing.assert_close(encoder.embed(frames, index), take(every, index))
    everywhere = torch.arange(64).expand(3, -1)
    torch.testing.assert_close(encoder(frames, everywhere), encoder(frames))


def test_nothing_of_what_is_hidden_reaches_the_encoder():
    encoder, frames = encoder_of(), pixels(2)
    hidden = hidden_of(2)
    seen = kept(hidden)
    changed = encoder.patches(frames)
    changed = torch.where(hidden[..., None], torch.randn_like(changed) * 9, changed)
    before = encoder.embed_patches(take(encoder.patches(frames), seen), seen)
    assert torch.equal(before, encoder.embed_patches(take(changed, seen), seen))
    frames.requires_grad_()
    encoder(frames, seen).square().sum().backward()
    grad = encoder.patches(frames.grad)
    assert (grad[hidden] == 0).all()
    assert (grad[~hidden] != 0).any()


def test_targets_are_standardised_by_tubelet_and_channel():
    frames = pixels(1)
    encoder = encoder_of()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    patches = encoder.patches(frames)
    target = pixel_targets(patches, mean, std).unflatten(-1, (-1, 3))
    first = frames[0, :2, :, :4, :4] * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    flat = first.permute(0, 2, 3, 1).reshape(-1, 3)  # frame, row, column, channel
    torch.testing.assert_close(target[0, 0], (flat - flat.mean(0)) / (flat.std(0) + 1e-6))
    plain = pixel_targets(patches, mean, std, normalise=False).unflatten(-1, (-1, 3))
    torch.testing.assert_close(plain[0, 0], flat)


def test_cosine_attention_is_the_hand_formula_and_its_factor_is_clamped():
    torch.manual_seed(0)
    attention = BiasedAttention(StackConfig(12, 1, 3, cosine=True)).eval()
    torch.testing.assert_close(attention.scale.exp(), torch.full((3, 1, 1), 10.0))
    with torch.no_grad():
        attention.scale[1] = 7.0  # above ln 100
        attention.q_bias.normal_()
        attention.v_bias.normal_()
    x = torch.randn(2, 5, 12)
    qkv = x @ attention.qkv.weight.T
    q, k, v = (qkv[..., 12 * n : 12 * n + 12] for n in range(3))
    q, v = q + attention.q_bias, v + attention.v_bias
    heads = []
    for n, factor in enumerate((10, 100, 10)):
        h = slice(4 * n, 4 * n + 4)
        cosine = F.normalize(q[..., h], dim=-1) @ F.normalize(k[..., h], dim=-1).mT
        heads.append((factor * cosine).softmax(-1) @ v[..., h])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, -1)), atol=1e-5, rtol=1e-4)


def test_scaled_branches_begin_at_their_value():
    config = StackConfig(12, 2, 3, init_values=0.1)
    encoder = Encoder(config, 2, 8, 4, 2)
    assert encoder.blocks[0].gamma_1.tolist() == pytest.approx([0.1] * 12)
    x = torch.randn(1, 4, 12)
    block = encoder.blocks[0].eval()
    y = x + 0.1 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), y + 0.1 * block.mlp(block.norm2(y)))


def test_blocks_drop_out_while_training_alone_and_checkpoints_change_nothing():
    encoder, frames = encoder_of(StackConfig(32, 3, 2)), pixels(2)
    encoder.set_drop_path(0.5)
    assert [block.rate for block in encoder.blocks] == [0, 0.25, 0.5]
    plain = encoder(frames)
    torch.testing.assert_close(encoder(frames), plain)
    torch.manual_seed(0)
    assert not torch.allclose(encoder.train()(frames), plain)
    encoder.eval().checkpointing = True
    torch.testing.assert_close(encoder(frames), plain)


def test_positions_are_sines_and_cosines_in_turn():
    table = positions(5, 6, torch.device("cpu"))
    for n in range(5):
        for d in range(6):
            angle = torch.tensor(n / 10000 ** (2 * (d // 2) / 6))
            assert float(table[n, d]) == pytest.approx(float(angle.cos() if d % 2 else angle.sin()), abs=1e-6)


def test_the_decoder_may_go():
    torch.manual_seed(0)
    model = MaskedAutoencoder(CONFIG, StackConfig(24, 1, 2), SIZE)
    patches, seen, said = model.encoder.patches(pixels(2)), kept(hidden_of(2)), kept(~hidden_of(2))
    assert model.reconstruct(patches, seen, said).shape == (2, 48, 96)
    model.drop_decoder()
    assert all(name.startswith("encoder.") for name in model.state_dict())
    with pytest.raises(Refusal, match="no decoder"):
        model.reconstruct(patches, seen, said)
    model.drop_decoder()


BAD = {
    "frames": (lambda: Encoder(CONFIG, 7, 16, 4, 2), "7 of 16 x 16"),
    "side": (lambda: Encoder(CONFIG, 8, 18, 4, 2), "8 of 18 x 18"),
    "clip": (lambda: encoder_of()(pixels(1)[:, :6]), r"\(B, 8, 3, 16, 16\)"),
    "width": (lambda: StackConfig(30, 2, 4), "width 30 and 4 heads"),
    "layers": (lambda: StackConfig(30, 0, 3), "0 layers"),
    "init_values": (lambda: StackConfig(init_values=-1.0), "init_values"),
    "drop path": (lambda: encoder_of().set_drop_path(1.0), "drop_path"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        call()
