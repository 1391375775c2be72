import pytest
import torch

from qncd_cli.quant.packing import pack, unpack


def test_low_nibble_first():
    packed = pack(torch.tensor([[1, 2, 15, 0]]), 4)
    assert packed.tolist() == [[0x21, 0x0F]]


def test_an_odd_last_code_has_zero_above_it():
    assert pack(torch.tensor([[5, 6, 7]]), 4).tolist() == [[0x65, 0x07]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 3, 3), (1, 1), (2, 8)])
def test_round_trip(bits, shape):
    generator = torch.Generator().manual_seed(bits)
    low, high = (-127, 128) if bits == 8 else (0, 2**bits)
    codes = torch.randint(low, high, shape, generator=generator)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, shape).long(), codes)
    width = codes[0].numel()
    assert packed.shape == (shape[0], (width + 1) // 2 if bits <= 4 else width)
