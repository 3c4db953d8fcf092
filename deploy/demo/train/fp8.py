"""FP8 E4M3 with one fp32 scale for each 128 x 128 block, as DeepSeek-V3's checkpoints hold linears."""

import torch
import torch.nn.functional as F

BLOCK, LARGEST = 128, 448.0


def blocks(w):
    """w [..., rows, columns] -> [..., row blocks, 128, column blocks, 128], padded with zeros."""
    rows, columns = w.shape[-2:]
    w = F.pad(w, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return w.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))


def quantise(w):
    """w [..., rows, columns] fp32 -> E4M3 of the same shape, scales [..., row blocks, column blocks]; w is about their product."""
    b = blocks(w)
    scale = b.abs().amax(dim=(-3, -1), keepdim=True).clamp_min(1e-12) / LARGEST
    codes = (b / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    rows, columns = w.shape[-2:]
    return codes.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns], scale.squeeze(-1).squeeze(-2)


def dequantise(codes, scale):
    rows, columns = codes.shape[-2:]
    full = scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
    return codes.float() * full


def fake_quantise(w):
    """w after a round trip through the checkpoint's format."""
    b = blocks(w)
    scale = b.abs().amax(dim=(-3, -1), keepdim=True).clamp_min(1e-12) / LARGEST
    rows, columns = w.shape[-2:]
    rounded = (b / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]
