"""What the programs of one cluster hand each other through their shared memory.

A cluster's programs run next to each other (Hopper and later), and each may store into the others'
shared memory: one trip between neighbours instead of two to the L2 cache, where all who wait meet.
So what a step sends lies in a room of every program's own.

Forward whoever computes a part of the state stores it in all rooms, and all multiply all of it with
their rows of W_hh. A room is laid out as the threads read it (`pieces`): of every 64 bytes of the
inner dimension those of eight sequences side by side.

Backward the gradients are G times as many numbers. There a program multiplies its own alone with
their rows of W_hh, which makes a part of every unit's gradient, and sends each unit's part, in
float32, to the program that owns the unit; that one adds up what came of all. So what is sent is
half as much of an LSTM in 16 bits, and the inner dimension is short: no warp needs another's sums.

A room holds what two steps send, by turns: while one is read, the next arrives. What is not written
yet has all bits set, as in `exchange`. Whoever has read it makes it unwritten again. That is in
time: what the next step but one sends comes from programs that have all that the next one sent, and
that was sent by threads that a barrier let through after the reading. For the same reason nobody
may store a number twice: a late copy would be taken for a later step's.

The interpreter has no clusters: there a room is a part of a tensor.
"""

import triton
import triton.language as tl

from triton_rnn.kernels.exchange import bits_to_send
from triton_rnn.kernels.pieces import load_piece, look_again, unwrite
from triton_rnn.kernels.product import left_operand, right_operand

if triton.knobs.runtime.interpret:

    @triton.jit
    def enter_cluster(rooms_ptr, polls, BYTES: tl.constexpr):
        return rooms_ptr.to(tl.pointer_type(tl.int8)) + tl.program_id(0) * BYTES

    @triton.jit
    def send_to_all(rooms, places, block, mask, DTYPE: tl.constexpr):
        INTEGERS: tl.constexpr = tl.int16 if DTYPE.primitive_bitwidth == 16 else tl.int32
        for k in tl.static_range(len(rooms)):
            ptrs = (rooms[k] + places).to(tl.pointer_type(INTEGERS))
            tl.store(ptrs, bits_to_send(block, DTYPE), mask=mask)

    @triton.jit
    def room_of(room, rank, to, BYTES: tl.constexpr):
        return room + (to - rank) * BYTES

    @triton.jit
    def send(ptrs, block, mask):
        tl.store(ptrs.to(tl.pointer_type(tl.int32)), bits_to_send(block, tl.float32), mask=mask)

    @triton.jit
    def lay_out(places, block, DTYPE: tl.constexpr):
        tl.store(places.to(tl.pointer_type(DTYPE)), block.to(DTYPE))

    @triton.jit
    def when_laid_out(place):
        return place

    @triton.jit
    def load_laid_out(places, left, PIECES: tl.constexpr, PADDED: tl.constexpr):
        words = ()
        for tile in tl.static_range(len(places)):
            for piece in tl.static_range(PIECES):
                ptrs = (places[tile] + 512 * piece).to(tl.pointer_type(tl.int32))
                words = words + load_piece(ptrs, left > piece, 1)
        return words

    @triton.jit
    def copied(words):
        return words

    @triton.jit
    def sum_when_sent(places, polls, error_ptr, step, COUNT: tl.constexpr, STRIDE: tl.constexpr):
        ptrs = places.to(tl.pointer_type(tl.int32))
        failed = tl.load(error_ptr) != 0
        looks = 0
        missing = polls
        total = tl.zeros(places.shape, tl.float32)
        while tl.max(missing) > looks:
            missing = 0 * polls
            total = tl.zeros(places.shape, tl.float32)
            for k in tl.static_range(COUNT):
                word = tl.load(ptrs + STRIDE // 4 * k, volatile=True)
                missing = tl.where(word == -1, polls, missing)
                total += word.to(tl.float32, bitcast=True)
            looks += 1
            if failed:
                looks = tl.max(polls)
        if (tl.max(missing) > 0) & (failed == 0):
            tl.store(error_ptr, step)
        for k in tl.static_range(COUNT):
            unwrite(ptrs + STRIDE // 4 * k, polls >= 0)
        return total

    @triton.jit
    def leave_cluster(polls):
        pass

else:

    @triton.constexpr_function
    def _enter(size):
        """The PTX of `enter_cluster`: the room $0."""
        return f"""{{
            .shared .align 16 .b8 room[{size}];
            .reg .pred outside;
            .reg .b32 place, end, width, none;
            mov.u32 $0, room;
            mov.b32 none, -1;
            mov.u32 place, %tid.x;
            mov.u32 width, %ntid.x;
            shl.b32 width, width, 4;
            mad.lo.u32 place, place, 16, $0;
            add.u32 end, $0, {size};
            FILL:
            setp.ge.u32 outside, place, end;
            @outside bra FILLED;
            st.shared.v4.b32 [place], {{none, none, none, none}};
            add.u32 place, place, width;
            bra FILL;
            FILLED:
            barrier.cluster.arrive.release;
            barrier.cluster.wait.acquire;
            }}"""

    @triton.jit
    def enter_cluster(rooms_ptr, polls, BYTES: tl.constexpr):
        """The program's own room, when those of all programs of its cluster are ready.

        Shared memory that Triton does not know of; so this stands once in a kernel.

        Args:
            rooms_ptr: of the interpreter, where the rooms of all programs are.
            polls: any number.
        """
        return tl.inline_asm_elementwise(
            _enter(BYTES), "=&r,r", (polls,), tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def room_of(room, rank, to, BYTES: tl.constexpr):
        """The room of program number `to` of each element; `rank` is the own number."""
        return tl.inline_asm_elementwise(
            """{
            .reg .b64 here;
            cvt.u64.u32 here, $1;
            cvta.shared.u64 here, here;
            mapa.u64 $0, here, $2;
            }""",
            "=l,r,r",
            (room, to),
            tl.int64,
            is_pure=True,
            pack=1,
        )

    @triton.constexpr_function
    def _send(count, bits, asked):
        """The PTX of `send_to_all`, or the constraints of its operands.

        They are the places in all rooms, the number, and whether it is sent.
        """
        if asked == "constraints":
            return ",".join(["=r"] + ["l"] * count + ["r", "r"])
        number, mask = f"${count + 1}", f"${count + 2}"
        text = ["{", ".reg .pred inside;", f"setp.ne.u32 inside, {mask}, 0;"]
        if bits == 16:
            text += [".reg .b16 half, other;", f"mov.b32 {{half, other}}, {number};"]
            number = "half"
        text += [f"@inside st.relaxed.cluster.b{bits} [${1 + k}], {number};" for k in range(count)]
        return "\n".join([*text, "mov.b32 $0, 0;", "}"])

    @triton.jit
    def send_to_all(rooms, places, block, mask, DTYPE: tl.constexpr):
        """Store numbers in all rooms, each from the one thread that has it.

        Sixteen bytes from each lane, those of eight, to a room of its own take an eighth of the
        instructions and are slower (H200, 128 units: 0.65 us a step for 0.51): what costs time is
        how many programs an instruction stores to.
        """
        # Addresses of 64 bits: else a register of the chip is asked for their upper half each time.
        there = ()
        for k in tl.static_range(len(rooms)):
            there = there + (rooms[k] + places,)
        tl.inline_asm_elementwise(
            _send(len(rooms), DTYPE.primitive_bitwidth, "text"),
            _send(len(rooms), DTYPE.primitive_bitwidth, "constraints"),
            there + (bits_to_send(block, DTYPE).to(tl.int32), mask.to(tl.int32)),
            tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def send(ptrs, block, mask):
        """Store numbers of float32 in rooms, each from the one thread that has it."""
        tl.inline_asm_elementwise(
            """{
            .reg .pred inside;
            setp.ne.u32 inside, $3, 0;
            @inside st.relaxed.cluster.b32 [$1], $2;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,r",
            (ptrs, bits_to_send(block, tl.float32), mask.to(tl.int32)),
            tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.constexpr_function
    def _lay_out(bits):
        """The PTX of `lay_out`."""
        text = f"st.shared.b{bits} [$1], {'half' if bits == 16 else '$2'}; mov.b32 $0, 0;"
        if bits == 16:
            text = f".reg .b16 half, other; mov.b32 {{half, other}}, $2; {text}"
        return f"{{ {text} }}"

    @triton.jit
    def lay_out(places, block, DTYPE: tl.constexpr):
        """Store numbers in the own room, for the own warps."""
        INTEGERS: tl.constexpr = tl.int16 if DTYPE.primitive_bitwidth == 16 else tl.int32
        tl.inline_asm_elementwise(
            _lay_out(DTYPE.primitive_bitwidth),
            "=r,r,r",
            (places, block.to(DTYPE).to(INTEGERS, bitcast=True).to(tl.int32)),
            tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def when_laid_out(place):
        """A place, when all warps have laid out what they had to."""
        return tl.inline_asm_elementwise(
            "bar.sync 0; mov.b32 $0, $1;", "=r,r", (place,), tl.int32, is_pure=False, pack=1
        )

    @triton.constexpr_function
    def _load_laid_out(tiles, pieces, padded, asked):
        """The PTX of `load_laid_out`, or the constraints of its operands, or its results' types."""
        count = 4 * tiles * pieces
        if asked == "types":
            return (tl.int32,) * count
        if asked == "constraints":
            return ",".join(["=&r"] * count + ["r"] * (tiles + 1))
        text = ["{", f".reg .pred inside<{pieces}>;"]
        for piece in range(pieces):
            text += [f"setp.gt.s32 inside{piece}, ${count + tiles}, {piece};"] if padded else []
        for tile in range(tiles):
            for piece in range(pieces):
                first = 4 * (tile * pieces + piece)
                four = [f"${first + word}" for word in range(4)]
                text += [f"mov.b32 {word}, 0;" for word in four] if padded else []
                guard = f"@inside{piece} " if padded else ""
                place = f"[${count + tile} + {512 * piece}]"
                text += [f"{guard}ld.shared.v4.b32 {{{', '.join(four)}}}, {place};"]
        return "\n".join([*text, "}"])

    @triton.jit
    def load_laid_out(places, left, PIECES: tl.constexpr, PADDED: tl.constexpr):
        """PIECES of 16 bytes each from places in the own room, which warps have laid out.

        Args:
            places: of tiles of eight sequences; the pieces lie 512 bytes apart.
            left: with PADDED, how many pieces there are; the others are zero.
        """
        # Pure, as `pieces.load_when_written`: it stays behind what its places come from.
        return tl.inline_asm_elementwise(
            _load_laid_out(len(places), PIECES, PADDED, "text"),
            _load_laid_out(len(places), PIECES, PADDED, "constraints"),
            places + (left,),
            _load_laid_out(len(places), PIECES, PADDED, "types"),
            is_pure=True,
            pack=1,
        )

    @triton.constexpr_function
    def _copied(count, asked):
        """The PTX of `copied`, or the constraints of its operands, or its results' types."""
        if asked == "types":
            return (tl.int32,) * count
        if asked == "constraints":
            return ",".join(["=r"] * count + ["r"] * count)
        return "\n".join(f"mov.b32 ${word}, ${count + word};" for word in range(count))

    @triton.jit
    def copied(words):
        """The same words, which Triton does not know to be the same; the chip does nothing.

        Of what two products take Triton from 3.8 on moves one through shared memory.
        """
        return tl.inline_asm_elementwise(
            _copied(len(words), "text"),
            _copied(len(words), "constraints"),
            words,
            _copied(len(words), "types"),
            is_pure=False,
            pack=1,
        )

    @triton.constexpr_function
    def _sum(count, stride):
        """The PTX of `sum_when_sent`: the sum $0, place $1, polls $2, error_ptr $3, step $4."""
        text = [
            "{",
            ".reg .pred missing, again;",
            f".reg .b32 looks, rest, word<{count}>, none;",
            f".reg .f32 sum<{count}>;",
            ".reg .b64 failed;",
            "mov.u32 looks, 0;",
            "LOOK:",
        ]
        text += [
            f"ld.relaxed.cluster.shared::cta.b32 word{k}, [$1 + {stride * k}];"
            for k in range(count)
        ]
        text += [f"mov.b32 sum{k}, word{k};" for k in range(count)]
        # By pairs, always the same ones.
        step = 1
        while step < count:
            pairs = range(0, count - step, 2 * step)
            text += [f"add.f32 sum{k}, sum{k}, sum{k + step};" for k in pairs]
            step *= 2
        # What is not written is a NaN: if the sum is none, all is there.
        text += [
            "mov.b32 $0, sum0;",
            "testp.number.f32 again, sum0;",
            "@again bra DONE;",
            "setp.eq.u32 again, $2, 0;",
            "@again bra DONE;",
            "setp.eq.u32 missing, word0, 0xFFFFFFFF;",
        ]
        text += [f"setp.eq.or.u32 missing, word{k}, 0xFFFFFFFF, missing;" for k in range(1, count)]
        text += [*look_again("$2", "$3", "$4"), "mov.b32 none, -1;"]
        text += [f"st.shared.b32 [$1 + {stride * k}], none;" for k in range(count)]
        return "\n".join([*text, "}"])

    @triton.jit
    def sum_when_sent(places, polls, error_ptr, step, COUNT: tl.constexpr, STRIDE: tl.constexpr):
        """Sums of COUNT numbers STRIDE bytes apart in the own room, when they have been sent.

        They are unwritten then. Arguments as of `pieces.load_when_written`.
        """
        return tl.inline_asm_elementwise(
            _sum(COUNT, STRIDE),
            "=&f,r,r,l,l",
            (places, polls, error_ptr, step.to(tl.int64)),
            tl.float32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def leave_cluster(polls):
        """Wait for all programs of the cluster: nobody may store where a program has ended."""
        tl.inline_asm_elementwise(
            "barrier.cluster.arrive.release; barrier.cluster.wait.acquire; mov.b32 $0, 0;",
            "=r,r",
            (polls,),
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def rooms_of_all(room, rank, COUNT: tl.constexpr, BYTES: tl.constexpr):
    """The rooms of all COUNT programs of a cluster, from the own one, of number `rank`, on."""
    rooms = ()
    for k in tl.static_range(COUNT):
        rooms = rooms + (room_of(room, rank, (rank + k) % COUNT, BYTES),)
    return rooms


# Backward -----------------------------------------------------------------------------------------
#
# The product's inner dimension are a program's own gradients, gate after gate, its rows all units:
# sixteen at a time for each of SPLITS warps, and so many rounds of that as it takes. Fragments are
# those of `product`, but warps differ in the rows, not in the inner numbers.


@triton.jit
def _units(k, SPLITS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """(SPLITS, WIDTH, 1): units that each warp's rows of round k are, from STEP on."""
    rows = STEP + tl.arange(0, WIDTH)[None, :, None]
    return (k * SPLITS + tl.arange(0, SPLITS)[:, None, None]) * 16 + rows


@triton.jit
def weights_of_own(
    w_hh_ptr,
    first,
    H: tl.constexpr,
    GATES: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """W_hh^T, all rows, for the gradients of a program's units, as left operands of `parts_of_all`.

    TURN: the gate whose gradients come first.
    """
    ROUNDS: tl.constexpr = (H + 16 * SPLITS - 1) // (16 * SPLITS)
    NUM_K: tl.constexpr = (GATES * BLOCK_H + BLOCK_K - 1) // BLOCK_K
    weights = ()
    for k in tl.static_range(ROUNDS):
        for block in tl.static_range(NUM_K):
            column = block * BLOCK_K + (tl.arange(0, 4) * (BLOCK_K // 4))[None, None, :]
            own = first + column % BLOCK_H
            row = (column // BLOCK_H + TURN) % GATES * H + own
            words = ()
            for half in tl.static_range(2):
                unit = _units(k, SPLITS, 8, 8 * half)
                mask = (unit < H) & (own < H) & (column < GATES * BLOCK_H)
                words = words + load_piece(w_hh_ptr + row * H + unit, mask, H)
            weights = weights + (left_operand(words, 0, 4, 2, w_hh_ptr.dtype.element_ty),)
    return weights


@triton.jit
def parts_of_all(
    weights,
    places,
    DTYPE: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The products (SPLITS, 16, 8 * tiles) of each round with what was laid out.

    Args:
        weights: of `weights_of_own`. places: where each tile of eight sequences is laid out.
    """
    NUM_K: tl.constexpr = (GATES * BLOCK_H + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = len(places)
    column = (tl.arange(0, 4) * (BLOCK_K // 4))[None, None, :] + 0 * tl.arange(0, SPLITS)[
        :, None, None
    ]
    left = (GATES * BLOCK_H - column + BLOCK_K - 1) // BLOCK_K
    ptrs = ()
    for tile in tl.static_range(TILES):
        row = tl.arange(0, 8)[None, :, None]
        ptrs = ptrs + (places[tile] + (row * 64 + column * (64 // BLOCK_K)),)
    words = load_laid_out(ptrs, left, NUM_K, GATES * BLOCK_H % BLOCK_K > 0)
    products = ()
    for k in tl.static_range(len(weights) // NUM_K):
        product = tl.zeros((SPLITS, 16, 8 * TILES), tl.float32)
        if k > 0:
            words = copied(words)
        for block in tl.static_range(NUM_K):
            right = right_operand(words, 4 * block, 4 * NUM_K, TILES, DTYPE)
            product = tl.dot(weights[k * NUM_K + block], right, product, input_precision=PRECISION)
        products = products + (product,)
    return products


@triton.jit
def no_parts(H: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    """Zeros in the place of what `parts_of_all` gives."""
    ROUNDS: tl.constexpr = (H + 16 * SPLITS - 1) // (16 * SPLITS)
    parts = ()
    for _ in tl.static_range(ROUNDS):
        parts = parts + (tl.zeros((SPLITS, 16, BLOCK_N), tl.float32),)
    return parts


@triton.jit
def rooms_of_rows(
    room,
    rank,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Of each round where the parts of its units belong: (SPLITS, 16, 1) places in their rooms."""
    ROUNDS: tl.constexpr = (H + 16 * SPLITS - 1) // (16 * SPLITS)
    rooms = ()
    for k in tl.static_range(ROUNDS):
        unit = _units(k, SPLITS, 16, 0)
        to = tl.minimum(unit, H - 1) // BLOCK_H
        own = rank * (4 * BLOCK_N * BLOCK_H) + unit % BLOCK_H * 4
        rooms = rooms + (room_of(room, rank, to, BYTES) + own,)
    return rooms


@triton.jit
def send_parts(
    products,
    rooms,
    here,
    sequences,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Send each unit's part, of so many sequences, `here` bytes into those of `rooms_of_rows`."""
    for k in tl.static_range(len(products)):
        n = tl.arange(0, products[k].shape[2])[None, None, :]
        mask = (_units(k, SPLITS, 16, 0) < H) & (n < sequences)
        send(rooms[k] + (here + n * (4 * BLOCK_H)), products[k], mask)
