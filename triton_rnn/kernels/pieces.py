"""Numbers in memory that each thread loads and stores for itself, by PTX.

Triton gives the elements of a load to the threads as memory likes it, and hands them on through
shared memory, with barriers, to those that need them. A step of a cooperative kernel has no time
for that. Here a thread loads pieces of 16 bytes, four words, which lie 64 bytes apart: so those of
four threads make up 64 bytes in a row. All of its loads are on their way at once, a wait is its
own, and no layout is changed.

The interpreter knows no PTX: there Triton's operations do the same for all threads at once.
"""

import triton
import triton.language as tl


@triton.jit
def place_in_room(column, n, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr):
    """In bytes, where the number `column` of sequence n of a program's lies in a state.

    BLOCKS of BLOCK_K numbers, 64 bytes each, make up the inner dimension.
    """
    block = (n // 8) * BLOCKS + column // BLOCK_K
    return block * 512 + n % 8 * 64 + column % BLOCK_K * (64 // BLOCK_K)


@triton.jit
def unwrite(ptrs, inside):
    """Mark words as not written yet; where there is PTX, that which reads them does it."""
    tl.store(ptrs, -1, mask=inside)


@triton.constexpr_function
def _types(count):
    return (tl.int32,) * count


@triton.constexpr_function
def look_again(limit, error, step):
    """The PTX at the end of a look: another one if something is `missing`, but not for ever."""
    return [
        "@!missing bra DONE;",
        # Whether somebody has given up is looked for now and then: that is far away.
        "add.u32 looks, looks, 1;",
        "and.b32 rest, looks, 1023;",
        "setp.ne.u32 again, rest, 0;",
        "@again bra LOOK;",
        f"ld.relaxed.sys.global.b64 failed, [{error}];",
        "setp.ne.s64 again, failed, 0;",
        "@again bra DONE;",
        f"setp.lt.u32 again, looks, {limit};",
        "@again bra LOOK;",
        f"st.relaxed.sys.global.b64 [{error}], {step};",
        "DONE:",
    ]


@triton.constexpr_function
def _look(tiles, pieces, padded, bits, near, pause, asked):
    """The PTX of `load_when_written` ("text"), or the constraints of its operands."""
    load, stride = "ld.relaxed.gpu.global", 64
    if near:
        load, stride = "ld.relaxed.cluster.shared::cta", 512
    words = 4 * pieces
    count = tiles * words
    ptr = [f"${count + i}" for i in range(tiles)]
    polls = [f"${count + tiles + i}" for i in range(tiles)]
    left, error, step = (f"${count + 2 * tiles + i}" for i in range(3))
    if asked == "constraints":
        place = "r" if near else "l"
        return ",".join(["=&r"] * count + [place] * tiles + ["r"] * (tiles + 1) + ["l", "l"])
    text = [
        "{",
        ".reg .pred missing, here, again;",
        ".reg .b32 looks, limit, rest, found, distance, begun, now;",
        ".reg .b64 failed;",
        f".reg .pred inside<{pieces}>;",
        "mov.u32 looks, 0;",
        "mov.u32 limit, 0;",
    ]
    text += [f"max.u32 limit, limit, {polls[i]};" for i in range(tiles)]
    if padded:
        text += [f"setp.gt.s32 inside{piece}, {left}, {piece};" for piece in range(pieces)]
        text += [f"mov.b32 ${word}, 0;" for word in range(count)]
    if pause:
        # Who looks in vain is in the way of those who store, and looks again a trip later.
        text += [
            "mov.u32 begun, %clock;",
            "PAUSE:",
            "mov.u32 now, %clock;",
            "sub.u32 now, now, begun;",
            f"setp.lt.u32 again, now, {pause};",
            "@again bra PAUSE;",
        ]
    text += ["LOOK:"]
    for tile in range(tiles):
        for piece in range(pieces):
            first = tile * words + 4 * piece
            into = ", ".join(f"${first + word}" for word in range(4))
            guard = f"@inside{piece} " if padded else ""
            place = f"[{ptr[tile]} + {stride * piece}]"
            text += [f"{guard}{load}.v4.b32 {{{into}}}, {place};"]
    # A number and its distance from one below the pattern both have the highest bit set only if it
    # is the pattern (or, of two in a word, the upper one's, if the lower is: then one is found).
    below, highest = ("0xFFFEFFFE", "0x80008000") if bits == 16 else ("0xFFFFFFFE", "0x80000000")
    text += ["setp.ne.u32 missing, 0, 0;"]
    for tile in range(tiles):
        text += ["mov.b32 found, 0;"]
        for word in range(tile * words, (tile + 1) * words):
            text += [
                f"sub.u32 distance, {below}, ${word};",
                f"lop3.b32 found, distance, ${word}, found, 0xEA;",
            ]
        text += [
            f"and.b32 found, found, {highest};",
            "setp.ne.u32 here, found, 0;",
            f"setp.ne.and.u32 here, {polls[tile]}, 0, here;",
            "or.pred missing, missing, here;",
        ]
    text += look_again("limit", error, step)
    if near:
        text += [".reg .b32 none;", "mov.b32 none, -1;"]
        for tile in range(tiles):
            for piece in range(pieces):
                guard = f"@inside{piece} " if padded else ""
                place = f"[{ptr[tile]} + {stride * piece}]"
                text += [f"{guard}st.shared.v4.b32 {place}, {{none, none, none, none}};"]
    return "\n".join([*text, "}"])


if triton.knobs.runtime.interpret:

    @triton.jit
    def load_when_written(
        ptrs,
        polls,
        left,
        error_ptr,
        step,
        PIECES: tl.constexpr,
        PADDED: tl.constexpr,
        BITS: tl.constexpr,
        NEAR: tl.constexpr,
        PAUSE: tl.constexpr,
    ):
        STRIDE: tl.constexpr = 128 if NEAR else 16
        word = tl.arange(0, 4)[None, None, None, :]
        failed = tl.load(error_ptr) != 0
        words = ()
        looks = 0
        unwritten = 0
        again = 1
        while again > 0:
            words = ()
            unwritten = 0
            again = 0
            for tile in tl.static_range(len(ptrs)):
                first = ptrs[tile].to(tl.pointer_type(tl.int32))[:, :, :, None] + word
                for piece in tl.static_range(PIECES):
                    inside = (left > piece)[:, :, :, None]
                    four = tl.load(first + STRIDE * piece, mask=inside, other=0, volatile=True)
                    empty = four == -1
                    if BITS == 16:
                        empty = ((four & 0xFFFF) == 0xFFFF) | ((four >> 16) == -1)
                    # A thread's wait is its own; here all wait for the one that looks longest.
                    waited = tl.max(empty.to(tl.int32) * polls[tile][:, :, :, None])
                    unwritten += (waited > 0).to(tl.int32)
                    again += (waited > looks).to(tl.int32)
                    words = words + _apart(four)
            looks += 1
            again = tl.where(failed, 0, again)
        if (unwritten > 0) & (failed == 0):
            tl.store(error_ptr, step)
        if NEAR:
            for tile in tl.static_range(len(ptrs)):
                first = ptrs[tile].to(tl.pointer_type(tl.int32))[:, :, :, None] + word
                for piece in tl.static_range(PIECES):
                    unwrite(first + STRIDE * piece, (left > piece)[:, :, :, None])
        return words

    @triton.jit
    def _apart(four):
        """The words of pieces (..., 4)."""
        pairs = tl.reshape(four, (four.shape[0], four.shape[1], four.shape[2], 2, 2))
        even, odd = tl.split(pairs)
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return (first, second, third, fourth)

    @triton.jit
    def load_piece(ptrs, mask, STRIDE: tl.constexpr):
        words = ()
        for word in tl.static_range(4):
            if ptrs.dtype.element_ty.primitive_bitwidth == 32:
                block = tl.load(ptrs + word * STRIDE, mask=mask, other=0.0)
                block = block.to(tl.int32, bitcast=True)
            else:
                low = tl.load(ptrs + 2 * word * STRIDE, mask=mask, other=0.0)
                high = tl.load(ptrs + (2 * word + 1) * STRIDE, mask=mask, other=0.0)
                block = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
                block |= high.to(tl.int16, bitcast=True).to(tl.int32) << 16
            words = words + (block,)  # type: ignore[assignment]
        return words

    @triton.jit
    def store_as_it_lies(ptrs, block, mask):
        tl.store(ptrs, block.to(ptrs.dtype.element_ty), mask=mask)

    @triton.jit
    def prefetch(ptrs, mask):
        pass

else:

    @triton.jit
    def load_when_written(
        ptrs,
        polls,
        left,
        error_ptr,
        step,
        PIECES: tl.constexpr,
        PADDED: tl.constexpr,
        BITS: tl.constexpr,
        NEAR: tl.constexpr,
        PAUSE: tl.constexpr,
    ):
        """PIECES of each of some pointer tensors, when others have written them: 4 words each.

        Words of a tensor after each other. Loads pass by the L1 cache, which nobody keeps coherent.

        Args:
            ptrs: tensors of pointers, of one shape. polls: of each tensor, how often a thread looks
                before it gives up; 0 where it is not others who write.
            left: with PADDED, how many pieces there are; the others are zero.
            error_ptr: where `step` is noted when a wait runs out.
            BITS: of a number.
            NEAR: `ptrs` are places in a room of `cluster`, which are made unwritten again.
            PAUSE: cycles before the first look.
        """
        TILES: tl.constexpr = len(ptrs)
        if not NEAR:
            # All operands of a kind, as the compiler wants them.
            error_ptr = error_ptr.to(ptrs[0].dtype)
        # To Triton it is pure, though it is not: else some versions leave copies of it behind where
        # they try layouts. It is not moved, for its operands are of the step, nor left out.
        return tl.inline_asm_elementwise(
            _look(TILES, PIECES, PADDED, BITS, NEAR, PAUSE, "text"),
            _look(TILES, PIECES, PADDED, BITS, NEAR, PAUSE, "constraints"),
            ptrs + polls + (left, error_ptr, step.to(tl.int64)),
            _types(4 * TILES * PIECES),
            is_pure=True,
            pack=1,
        )

    @triton.constexpr_function
    def _piece(itemsize, stride):
        """The PTX of `load_piece`: words $0 to $3, the pointer $4, the mask $5."""
        text = ["{", ".reg .pred inside;", ".reg .b16 half<8>;", "setp.ne.u32 inside, $5, 0;"]
        if stride == 1:
            text += [f"mov.b32 ${word}, 0;" for word in range(4)]
            text += ["@inside ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"]
        elif itemsize == 4:
            for word in range(4):
                text += [f"mov.b32 ${word}, 0;"]
                text += [f"@inside ld.global.b32 ${word}, [$4 + {4 * stride * word}];"]
        else:
            for half in range(8):
                text += [f"mov.b16 half{half}, 0;"]
                text += [f"@inside ld.global.b16 half{half}, [$4 + {2 * stride * half}];"]
            text += [f"mov.b32 ${w}, {{half{2 * w}, half{2 * w + 1}}};" for w in range(4)]
        return "\n".join([*text, "}"])

    @triton.jit
    def load_piece(ptrs, mask, STRIDE: tl.constexpr):
        """Four words each of numbers STRIDE apart, which nobody writes; zeros outside the mask."""
        return tl.inline_asm_elementwise(
            _piece(ptrs.dtype.element_ty.primitive_bitwidth // 8, STRIDE),
            "=&r,=&r,=&r,=&r,l,r",
            (ptrs, mask.to(tl.int32)),
            (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )

    @triton.constexpr_function
    def _store(bits):
        """The PTX of `store_as_it_lies`."""
        return f"""{{
            .reg .pred inside;
            .reg .b16 half, other;
            setp.ne.u32 inside, $3, 0;
            {"mov.b32 {half, other}, $2;" if bits == 16 else ""}
            @inside st.relaxed.gpu.global.b{bits} [$1], {"half" if bits == 16 else "$2"};
            mov.b32 $0, 0;
            }}"""

    @triton.jit
    def store_as_it_lies(ptrs, block, mask):
        """Store numbers of 16 or 32 bits from the threads that have them."""
        dtype: tl.constexpr = ptrs.dtype.element_ty
        integers: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
        tl.inline_asm_elementwise(
            _store(dtype.primitive_bitwidth),
            "=r,l,r,r",
            (
                ptrs.to(tl.pointer_type(integers)),
                block.to(dtype).to(integers, bitcast=True).to(tl.int32),
                mask.to(tl.int32),
            ),
            tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def prefetch(ptrs, mask):
        """Ask memory to bring what lies there to the L2 cache."""
        tl.inline_asm_elementwise(
            """{
            .reg .pred inside;
            setp.ne.u32 inside, $2, 0;
            @inside prefetch.global.L2 [$1];
            mov.b32 $0, 0;
            }""",
            "=r,l,r",
            (ptrs, mask.to(tl.int32)),
            tl.int32,
            is_pure=False,
            pack=1,
        )
