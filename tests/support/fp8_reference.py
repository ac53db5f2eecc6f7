"""The oracle of quantised outputs: torch's own casts, knowing nothing of shardmix."""

import torch

BLOCK = 128


def spread(scales, shape):
    """Return the scale of each element."""
    rows, columns = shape[-2:]
    wide = scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return wide[..., :rows, :columns]


def quantised(values):
    """Return codes and scales of a float32 tensor of matrices."""
    rows, columns = values.shape[-2:]
    finite = torch.where(values.isfinite(), values, 0.0)
    padded = torch.nn.functional.pad(finite, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    largest = blocks.abs().amax((-3, -1))
    scales = (largest / 448).clamp(min=2.0**-149)
    scales = torch.where(largest == 0, 1.0, scales)
    scaled = (values / spread(scales, values.shape)).clamp(-448, 448)
    scaled = torch.where(values.isfinite(), scaled, torch.nan)
    return scaled.to(torch.float8_e4m3fn), scales


def decoded(codes, scales):
    """Return the values of codes."""
    return codes.float() * spread(scales, codes.shape)


def check_quantised(stored, values):
    """Hold each tensor of an output with scales to the reference; return the names of these."""
    found = [name for name in stored if f"{name}_scale_inv" in stored]
    for name in found:
        codes, scales = quantised(values[name])
        assert torch.equal(stored[f"{name}_scale_inv"], scales), name
        bits, expected = (x.view(torch.uint8) & 0x7F for x in (stored[name], codes))
        is_nan = expected == 0x7F
        assert torch.equal(bits, expected), name
        signs = [(x.view(torch.uint8) >> 7)[~is_nan] for x in (stored[name], codes)]
        assert torch.equal(*signs), name
    assert set(stored) - set(values) == {f"{name}_scale_inv" for name in found}
    return found
