"""What the programs of one cluster hand each other through their shared memory.

A cluster's programs run next to each other (Hopper and later), and each may store into the others'
shared memory: one trip between neighbours instead of two to the L2 cache, where all who wait meet.
So a step's state lies in a room of every program's own, and whoever computes a part of it stores
that part in all rooms.

A room holds two states, by turns: while one is read, the next arrives. It is laid out as the
threads read it (`pieces`): of every 64 bytes of the inner dimension those of eight sequences side
by side. What is not written yet has all bits set, as in `exchange`. Whoever has read a piece makes
it unwritten again. That is in time: the next state but one is stored there by programs that have
the next one, all of it, and that was sent by threads that a barrier let through after the reading.
For the same reason nobody may store a number twice: a late copy would be taken for the next state.

The interpreter has no clusters: there a room is a part of a tensor.
"""

import triton
import triton.language as tl

from triton_rnn.kernels.exchange import bits_to_send


@triton.jit
def place_in_room(column, n, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr):
    """In bytes, where the number `column` of sequence n of a program's lies in a state.

    BLOCKS of BLOCK_K numbers, 64 bytes each, make up the inner dimension.
    """
    block = (n // 8) * BLOCKS + column // BLOCK_K
    return block * 512 + n % 8 * 64 + column % BLOCK_K * (64 // BLOCK_K)


if triton.knobs.runtime.interpret:

    @triton.jit
    def enter_cluster(rooms_ptr, polls, BYTES: tl.constexpr):
        return rooms_ptr.to(tl.pointer_type(tl.int8)) + tl.program_id(0) * BYTES

    @triton.jit
    def rooms_of_all(room, rank, COUNT: tl.constexpr, BYTES: tl.constexpr):
        rooms = ()
        for k in tl.static_range(COUNT):
            rooms = rooms + (room + ((rank + k) % COUNT - rank) * BYTES,)
        return rooms

    @triton.jit
    def send_to_all(rooms, places, block, mask, DTYPE: tl.constexpr):
        INTEGERS: tl.constexpr = tl.int16 if DTYPE.primitive_bitwidth == 16 else tl.int32
        for k in tl.static_range(len(rooms)):
            ptrs = (rooms[k] + places).to(tl.pointer_type(INTEGERS))
            tl.store(ptrs, bits_to_send(block, DTYPE), mask=mask)

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
    def rooms_of_all(room, rank, COUNT: tl.constexpr, BYTES: tl.constexpr):
        """The rooms of all COUNT programs of a cluster, from the own one, of number `rank`, on."""
        rooms = ()
        for k in tl.static_range(COUNT):
            there = tl.inline_asm_elementwise(
                """{
                .reg .b64 here;
                cvt.u64.u32 here, $1;
                cvta.shared.u64 here, here;
                mapa.u64 $0, here, $2;
                }""",
                "=l,r,r",
                (room, (rank + k) % COUNT),
                tl.int64,
                is_pure=True,
                pack=1,
            )
            rooms = rooms + (there,)
        return rooms

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
        """Store numbers in all rooms, each from the one thread that has it."""
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
