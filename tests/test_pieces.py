"""The PTX by which a thread sees that a word is not written yet, computed as it stands there."""

import re

import numpy as np
import pytest

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux alone")

from triton_rnn.kernels import cluster, pieces

PATTERN = {16: 0xFFFF, 32: 0xFFFFFFFF}


def plain(constant):
    return getattr(constant, "value", constant)


def text_of(tiles, count, padded, bits, near=False):
    return plain(pieces._look(tiles, count, padded, bits, near, 0, "text"))


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


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize(("tiles", "count"), [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_every_word_is_loaded_and_looked_at_once_a_look(tiles, count, padded, near):
    text = text_of(tiles, count, padded, 16, near)
    words = 4 * tiles * count
    load = r"ld\.relaxed\.cluster\.shared::cta" if near else r"ld\.relaxed\.gpu\.global"
    loaded = re.findall(load + r"\.v4\.b32 \{([^}]*)\}, \[(\$\d+) \+ (\d+)\]", text)
    assert [name for into, *_ in loaded for name in into.split(", ")] == [
        f"${word}" for word in range(words)
    ]
    # Pieces 64 bytes apart, in a room 512, each tile's from its own address.
    places = [
        (f"${words + tile}", (512 if near else 64) * piece)
        for tile in range(tiles)
        for piece in range(count)
    ]
    assert [(place, int(offset)) for _, place, offset in loaded] == places
    # Those of a room are unwritten then, when all have come, with or without success.
    unwritten = re.findall(
        r"st\.shared\.v4\.b32 \[(\$\d+) \+ (\d+)\], \{none, none, none, none\}",
        text.split("DONE:")[1],
    )
    assert [(place, int(offset)) for place, offset in unwritten] == (places if near else [])
    assert ("mov.b32 none, -1;" in text) == near
    looked_at = re.findall(r"sub\.u32 distance, 0x\w+, (\$\d+);", text)
    assert looked_at == [f"${word}" for word in range(words)]
    constraints = plain(pieces._look(tiles, count, padded, 16, near, 0, "constraints")).split(",")
    operands = {int(number) for number in re.findall(r"\$(\d+)", text)}
    assert operands <= set(range(len(constraints)))
    assert constraints.count("=&r") == words
    assert text.count("@inside") == (tiles * count * (1 + near) if padded else 0)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16])
def test_a_sum_has_each_number_once_and_waits_for_each(count):
    text = plain(cluster._sum(count, 512))
    before, after = text.split("DONE:")
    offsets = [512 * k for k in range(count)]
    loads = re.findall(
        r"ld\.relaxed\.cluster\.shared::cta\.b32 word(\d+), \[\$1 \+ (\d+)\]", before
    )
    assert [(int(word), int(offset)) for word, offset in loads] == list(enumerate(offsets))
    terms = {word: [word] for word in range(count)}
    for to, left, right in re.findall(r"add\.f32 sum(\d+), sum(\d+), sum(\d+);", before):
        assert to == left
        terms[int(left)] += terms.pop(int(right))
    assert list(terms) == [0] and sorted(terms[0]) == list(range(count))
    waited = re.findall(r"setp\.eq(?:\.or)?\.u32 missing, word(\d+), 0xFFFFFFFF", before)
    assert [int(word) for word in waited] == list(range(count))
    unwritten = re.findall(r"st\.shared\.b32 \[\$1 \+ (\d+)\], none;", after)
    assert [int(offset) for offset in unwritten] == offsets


@pytest.mark.parametrize("bits", [16, 32])
def test_a_number_is_sent_to_every_room(bits):
    text = plain(cluster._send(5, bits, "text"))
    sent = re.findall(rf"@inside st\.relaxed\.cluster\.b{bits} \[\$(\d)\], (\S+);", text)
    assert sent == [(str(k), "half" if bits == 16 else "$6") for k in range(1, 6)]
    # After the place of each room the number, then whether it is sent.
    assert "setp.ne.u32 inside, $7, 0;" in text
    assert plain(cluster._send(5, bits, "constraints")) == "=r,l,l,l,l,l,r,r"
