"""Quantised tensors in every known form, with the values that torch gives them."""

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
COMPRESSED = {"quant_method": "compressed-tensors"}


def codes(shape, dtype, generator):
    """Return random codes; of FP8 all but those that are not finite."""
    values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if dtype == torch.float8_e4m3fn:
        values[(values & 0x7F) == 0x7F] = 3
    if dtype == torch.float8_e5m2:
        values[(values & 0x7F) >= 0x7C] = 3
    return values.view(dtype)


def scales(shape, generator, dtype=torch.float32):
    return (torch.rand(shape, generator=generator) * 0.01 + 0.001).to(dtype)


def by_blocks(grid, shape, block=(128, 128)):
    """Return the scale of each element."""
    rows, columns = shape[-2:]
    spread = grid.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return spread[..., :rows, :columns]


def grid(shape, block):
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def fp8_blocks(shape, g, dtype=torch.float32, code=torch.float8_e4m3fn):
    w, s = codes(shape, code, g), scales(grid(shape, (128, 128)), g, dtype)
    return {"weight": w, "weight_scale_inv": s}, w.float() * by_blocks(s, shape)


def fp8_blocks_bfloat16(shape, g):
    return fp8_blocks(shape, g, torch.bfloat16, torch.float8_e5m2)


def fp8_channels(shape, g):
    w, s = codes(shape, torch.float8_e4m3fn, g), scales((shape[0], 1), g, torch.bfloat16)
    return {"weight": w, "weight_scale": s}, w.float() * s.float()


def fp8_tensor(shape, g):
    w, s = codes(shape, torch.float8_e4m3fn, g), scales((), g)
    more = {"input_scale": torch.ones(()), "k_scale": torch.ones(1)}
    return {"weight": w, "weight_scale": s, **more}, w.float() * s


def int8_channels(shape, g):
    w, s = codes(shape, torch.int8, g), scales((shape[0], 1), g)
    return {"weight": w, "weight_scale": s}, w.float() * s


def pack(values, bits):
    """Pack rows of unsigned integers into words of 32 bits, the lowest first."""
    rows = []
    for row in values.tolist():
        whole = sum(value << (bits * number) for number, value in enumerate(row))
        num_words = -(-len(row) * bits // 32)
        words = [whole >> (32 * number) & 0xFFFFFFFF for number in range(num_words)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def packed(shape, g, bits=4, group=32, *, zeros=True, order=False):
    """Return integers of any width, as compressed-tensors packs them."""
    (rows, columns), half = shape, 1 << (bits - 1)
    group = group if columns % group == 0 else columns
    unsigned = torch.randint(0, 1 << bits, shape, generator=g)
    s = scales((rows, columns // group), g, torch.bfloat16)
    stored = {
        "weight_packed": pack(unsigned, bits),
        "weight_scale": s,
        "weight_shape": torch.tensor(shape),
    }
    owner = torch.arange(columns) // group
    if order:
        owner = owner[torch.randperm(columns, generator=g)]
        stored["weight_g_idx"] = owner.int()
    values = unsigned.float() - half
    if zeros:
        points = torch.randint(0, 1 << bits, s.shape, generator=g)
        stored["weight_zero_point"] = pack(points.T, bits).T.contiguous()
        values = values - (points.float() - half)[:, owner]
    return stored, values * s.float()[:, owner]


def int4_groups(shape, g):
    return packed(shape, g)


def int3_groups(shape, g):
    return packed(shape, g, bits=3)


def int8_packed(shape, g):
    return packed(shape, g, bits=8, zeros=False)


def int4_ordered(shape, g):
    return packed(shape, g, order=True)


def fp4_values(bytes_):
    nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(-2).long()
    return torch.where(nibbles > 7, -E2M1[nibbles & 7], E2M1[nibbles & 7])


def nvfp4(shape, g, *, modelopt=False):
    shape = (shape[0], -(-shape[1] // 16) * 16)
    w = codes((shape[0], shape[1] // 2), torch.uint8, g)
    s = (torch.rand((shape[0], shape[1] // 16), generator=g) * 100).to(torch.float8_e4m3fn)
    whole = torch.tensor([321.5])
    if modelopt:
        factors = s.float() * (1 / whole)
        stored = {"weight": w, "weight_scale": s, "weight_scale_2": (1 / whole)[0]}
    else:
        factors = s.float() / whole
        stored = {"weight_packed": w, "weight_scale": s, "weight_global_scale": whole}
    return stored, fp4_values(w) * factors.repeat_interleave(16, 1)


def nvfp4_modelopt(shape, g):
    return nvfp4(shape, g, modelopt=True)


def powers(shape, g):
    return torch.randint(110, 130, shape, generator=g, dtype=torch.uint8)


def mxfp4_packed(shape, g):
    shape = (shape[0], -(-shape[1] // 32) * 32)
    w, e = codes((shape[0], shape[1] // 2), torch.uint8, g), powers((shape[0], shape[1] // 32), g)
    values = torch.ldexp(fp4_values(w), (e.int() - 127).repeat_interleave(32, 1))
    return {"weight_packed": w, "weight_scale": e}, values


def mxfp8(shape, g):
    w, e = codes(shape, torch.float8_e4m3fn, g), powers(grid(shape, (1, 32)), g)
    return {"weight": w, "weight_scale_inv": e}, torch.ldexp(
        w.float(), by_blocks(e.int() - 127, shape, (1, 32)).int()
    )


FORMS = {
    fp8_blocks: FP8,
    fp8_blocks_bfloat16: FP8,
    fp8_channels: COMPRESSED,
    fp8_tensor: {"quant_method": "modelopt"},
    mxfp8: {"quant_method": "mxfp8"},
    int8_channels: COMPRESSED,
    int4_groups: COMPRESSED,
    int3_groups: COMPRESSED,
    int8_packed: COMPRESSED,
    int4_ordered: COMPRESSED,
    nvfp4: COMPRESSED,
    nvfp4_modelopt: {"quant_method": "modelopt"},
    mxfp4_packed: COMPRESSED,
}
"""Function of shape and generator → the `quantization_config` of such a model."""


def mxfp4_experts(shape, g):
    """Return gpt-oss' experts: tensors after the module's name and `_`, and the values."""
    experts, outputs, inputs = shape
    w = codes((experts, outputs, inputs // 32, 16), torch.uint8, g)
    e = powers(w.shape[:-1], g)
    values = torch.ldexp(fp4_values(w), e[..., None].int() - 127).flatten(2)
    return {"blocks": w, "scales": e}, values.transpose(1, 2).contiguous()
