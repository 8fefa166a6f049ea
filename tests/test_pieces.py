"""The PTX by which a thread sees that a word is not written yet, computed as it stands there."""

import re

import numpy as np
import pytest

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux alone")

from triton_rnn.kernels import pieces

PATTERN = {16: 0xFFFF, 32: 0xFFFFFFFF}


def text_of(tiles, count, padded, bits):
    text = pieces._look(tiles, count, padded, bits, "text")
    return getattr(text, "value", text)


def found(words, bits):
    """What `found` holds for each of some words by itself, by the numbers in the text."""
    text = text_of(1, 1, False, bits)
    (below,) = set(re.findall(r"sub\.u32 distance, (0x\w+), ", text))
    (highest,) = re.findall(r"and\.b32 found, found, (0x\w+);", text)
    # 0xEA: (a & b) | c.
    assert len(re.findall(r"lop3\.b32 found, distance, \$\d+, found, 0xEA;", text)) == 4
    distance = (int(below, 16) - words.astype(np.int64)) & 0xFFFFFFFF
    return (distance & words & int(highest, 16)) != 0


@pytest.mark.parametrize("bits", [16, 32])
def test_a_word_is_unwritten_if_a_number_in_it_is_and_only_then(bits):
    draw = np.random.default_rng(0)
    edges = [0, 1, 0x7BFF, 0x7C00, 0x7E00, 0x7FFF, 0x8000, 0x8001, 0xFBFF, 0xFC00, 0xFFFD, 0xFFFE]
    halves = np.array([*edges, 0xFFFF, *draw.integers(0, 1 << 16, 2000)], dtype=np.int64)
    low, high = np.meshgrid(halves, np.concatenate([halves[:13], halves[-50:]]))
    words = (low | high << 16).ravel()
    if bits == 16:
        expected = ((words & 0xFFFF) == PATTERN[16]) | (words >> 16 == PATTERN[16])
    else:
        expected = words == PATTERN[32]
    assert expected.any() and not expected.all()
    assert np.array_equal(found(words, bits), expected)


@pytest.mark.parametrize(("tiles", "count"), [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_every_word_is_loaded_and_looked_at_once_a_look(tiles, count, padded):
    text = text_of(tiles, count, padded, 16)
    words = 4 * tiles * count
    loaded = re.findall(
        r"ld\.relaxed\.gpu\.global\.v4\.b32 \{([^}]*)\}, \[(\$\d+) \+ (\d+)\]", text
    )
    assert [name for into, *_ in loaded for name in into.split(", ")] == [
        f"${word}" for word in range(words)
    ]
    # Pieces 64 bytes apart, each tile's from its own address.
    assert [(place, int(offset)) for _, place, offset in loaded] == [
        (f"${words + tile}", 64 * piece) for tile in range(tiles) for piece in range(count)
    ]
    looked_at = re.findall(r"sub\.u32 distance, 0x\w+, (\$\d+);", text)
    assert looked_at == [f"${word}" for word in range(words)]
    constraints = pieces._look(tiles, count, padded, 16, "constraints")
    constraints = getattr(constraints, "value", constraints).split(",")
    operands = {int(number) for number in re.findall(r"\$(\d+)", text)}
    assert operands <= set(range(len(constraints)))
    assert constraints.count("=&r") == words
    assert text.count("@inside") == (tiles * count if padded else 0)
