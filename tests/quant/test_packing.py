import pytest
import torch

from qncd_cli.quant.packing import narrowed, pack, unpack
from qncd_cli.store.artifacts import packed_width

STREAMED = [2, 3, 4, 5, 6, 7]
WIDTHS = [*STREAMED, 8, 15]


def random_codes(bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    low, high = (1 - 2 ** (bits - 1), 2 ** (bits - 1)) if bits >= 8 else (0, 2**bits)
    return torch.randint(low, high, shape, generator=generator)


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """The bytes of the documented layout, through one big integer."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


def test_low_nibble_first():
    packed = pack(torch.tensor([[1, 2, 15, 0]]), 4)
    assert packed.tolist() == [[0x21, 0x0F]]


def test_an_odd_last_code_has_zero_above_it():
    assert pack(torch.tensor([[5, 6, 7]]), 4).tolist() == [[0x65, 0x07]]


def test_four_codes_of_2_bits_to_a_byte():
    assert pack(torch.tensor([[3, 0, 1, 2, 1]]), 2).tolist() == [[0b10_01_00_11, 0b01]]


def test_a_3_bit_code_crosses_bytes():
    assert pack(torch.tensor([[0b001, 0b010, 0b110]]), 3).tolist() == [[0b10_010_001, 0b1]]


def test_8_bit_codes_keep_their_sign():
    packed = pack(torch.tensor([[-127, 127]]), 8)
    assert packed.dtype == torch.int8
    assert packed.tolist() == [[-127, 127]]


@pytest.mark.parametrize("bits", STREAMED)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 16, 27])
def test_the_bytes_are_the_documented_bit_stream(bits, length):
    codes = random_codes(bits, (3, length))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [bit_stream(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 3, 3), (1, 1), (2, 8), (5, 1, 1, 1), (2, 31)])
def test_round_trip(bits, shape):
    codes = random_codes(bits, shape)
    packed = pack(codes, bits)
    assert packed.nbytes == shape[0] * packed_width(codes[0].numel(), bits)
    assert packed.is_contiguous()
    found = unpack(packed, bits, shape)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), codes)
    narrow = torch.int8 if bits <= 8 else torch.int16
    if int(codes.max()) <= torch.iinfo(narrow).max:
        assert torch.equal(unpack(packed, bits, shape, narrow), codes.to(narrow))


@pytest.mark.parametrize("bits", STREAMED)
def test_the_largest_codes_come_back(bits):
    codes = torch.full((1, 17), 2**bits - 1)
    assert torch.equal(unpack(pack(codes, bits), bits, (1, 17)).long(), codes)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.5, -3.0, 65504.0], torch.float16),
        ([2.0**100, 1.0], torch.bfloat16),
        ([1.0, 1 + 2.0**-20], torch.float32),
        ([2.0**-10 + 1, 2.0**100], torch.float32),  # each fits one of the two
        ([float("inf"), 1.0], torch.float16),
    ],
)
def test_numbers_are_kept_in_16_bits_only_where_these_hold_them_exactly(values, kind):
    x = torch.tensor(values)
    kept = narrowed(x)
    assert kept.dtype == kind
    assert torch.equal(kept.float(), x)
    whole = torch.arange(3)
    assert narrowed(whole) is whole
