"""The machine itself: it computes what a GPU would, and stops for what a GPU would not notice."""

import numpy as np
import pytest
import torch
from ptx_machine import Fault, Machine
from ptx_operations import Unknown

HEAD = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1,
    .param .u32 kernel_param_2
)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<40>;
    .reg .b64 %d<9>;
    ld.param.b64 %d1, [kernel_param_0];
    ld.param.b64 %d2, [kernel_param_1];
    ld.param.b32 %r1, [kernel_param_2];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %d3, %r2, 4;
    add.s64 %d4, %d1, %d3; // the thread's own word of the first tensor
    add.s64 %d5, %d2, %d3;
    shl.b32 %r3, %r2, 2;
    mov.b32 %r4, global_smem;
    add.s32 %r5, %r4, %r3; // the thread's own word of shared memory
"""


def run(body, source=None, *, warps=1, programs=1, cluster=1, number=0, seeds=(0,), shared=1024):
    """What a kernel stores in its second tensor, of 64 words; the same for every seed."""
    source = torch.arange(64, dtype=torch.int32) if source is None else source
    machine = Machine(f"{HEAD}{body}\nret;\n}}", warps, shared)
    found = []
    for seed in seeds:
        result = torch.full((64,), -7, dtype=torch.int32)
        machine.launch(programs, cluster, [source, result], [source, result, number], seed)
        found.append(result)
    assert all(torch.equal(result, found[0]) for result in found)
    return found[0]


def unary(instruction, numbers):
    """What an instruction makes of %r10, in %r11."""
    source = torch.zeros(64, dtype=torch.int32)
    source[: len(numbers)] = torch.from_numpy(np.asarray(numbers).view(np.int32).copy())
    body = f"ld.global.b32 %r10, [%d4]; {instruction} st.global.b32 [%d5], %r11;"
    return run(body, source)[: len(numbers)].numpy()


def to_eleven_bits(x):
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent).astype(np.float32)


INTEGERS = np.array([0, 1, -1, 7, -8, 2**31 - 1, -(2**31), 0x12345678], np.int32)
# Among them two in the middle between numbers of bfloat16, where the even one is to be taken.
FLOATS = np.array(
    [0.0, -0.0, 1.5, -2.25, 1e-3, 3e38, np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8],
    np.float32,
)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %r11, %r10, 5;", lambda x: x + np.int32(5)),
        ("mul.lo.s32 %r11, %r10, -3;", lambda x: x * np.int32(-3)),
        (
            "mul.hi.u32 %r11, %r10, 715827883;",
            lambda x: x.astype("u4").astype("u8") * 715827883 >> 32,
        ),
        (
            "cvt.u16.u32 %h1, %r10; mul.hi.u16 %h2, %h1, 456; cvt.u32.u16 %r11, %h2;",
            lambda x: (x & 0xFFFF) * 456 >> 16,
        ),
        ("div.s32 %r11, %r10, 3;", lambda x: np.trunc(x / 3.0)),
        ("rem.s32 %r11, %r10, 3;", lambda x: np.fmod(x, 3)),
        ("shr.s32 %r11, %r10, 31;", lambda x: np.where(x < 0, -1, 0)),
        ("shr.u32 %r11, %r10, 40;", np.zeros_like),
        ("shl.b32 %r11, %r10, 4;", lambda x: x << 4),
        ("shl.b32 %r11, %r10, 32;", np.zeros_like),
        ("mad.lo.s32 %r11, %r10, 3, -7;", lambda x: x * np.int32(3) - np.int32(7)),
        ("cvt.u16.u32 %h1, %r10; cvt.s32.s16 %r11, %h1;", lambda x: x.astype("i2").astype("i4")),
        ("bfe.s32 %r11, %r10, 28, 8;", lambda x: x >> 28),
        (
            "setp.gt.s32 %p1, %r10, 0; setp.lt.and.s32 %p2, %r10, 9, %p1;selp.b32 %r11, 1, 0, %p2;",
            lambda x: (x > 0) & (x < 9),
        ),
        (
            "mov.b32 %r11, 4; setp.lt.s32 %p1, %r10, 0; @!%p1 mov.b32 %r11, 5;",
            lambda x: 5 - (x < 0),
        ),
        ("bfe.u32 %r11, %r10, 4, 8;", lambda x: x >> 4 & 255),
        ("bfe.s32 %r11, %r10, 1, 1;", lambda x: -(x >> 1 & 1)),
        ("lop3.b32 %r11, %r10, 255, 15, 0xEA;", lambda x: x & 255 | 15),
        ("prmt.b32 %r11, %r10, 0, 0x0123;", lambda x: x.byteswap()),
        ("min.u32 %r11, %r10, -2;", lambda x: np.where(x == -1, -2, x)),
        ("not.b32 %r11, %r10;", np.invert),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_integers_are_as_the_manual_says(instruction, expected):
    wanted = expected(INTEGERS.copy()).astype(np.int64) & 0xFFFFFFFF
    assert (unary(instruction, INTEGERS).view(np.uint32) == wanted).all()


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("fma.rn.f32 %r11, %r10, 0fC0000000, 0f3F800000;", lambda x: x * -2 + 1),
        ("neg.f32 %r11, %r10;", np.negative),
        ("ex2.approx.ftz.f32 %r11, %r10;", np.exp2),
        ("tanh.approx.f32 %r11, %r10;", np.tanh),
        ("rcp.approx.ftz.f32 %r11, %r10;", lambda x: 1 / x),
        ("cvt.rn.f16.f32 %h1, %r10; cvt.f32.f16 %r11, %h1;", lambda x: x.astype("f2").astype("f4")),
        (
            "cvt.rn.bf16.f32 %h1, %r10; cvt.f32.bf16 %r11, %h1;",
            lambda x: torch.from_numpy(x).bfloat16().float().numpy(),
        ),
        ("cvt.rna.tf32.f32 %r11, %r10;", to_eleven_bits),
        (
            "cvt.rn.bf16x2.f32 %r12, %r10, 0f3F800000; and.b32 %r11, %r12, 0xFFFF0000;",
            lambda x: (torch.from_numpy(x).bfloat16().float().numpy()),
        ),
        (
            "testp.number.f32 %p1, %r10; selp.f32 %r11, 0f3F800000, 0f00000000, %p1;",
            lambda x: (~np.isnan(x)),
        ),
        ("min.f32 %r11, %r10, 0f3F800000;", lambda x: np.fmin(x, np.float32(1))),
        ("setp.lt.f32 %p1, %r10, 0f00000000; selp.b32 %r11, 1, %r10, %p1;", None),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_floats_are_as_the_manual_says(instruction, expected):
    with np.errstate(all="ignore"):
        found = unary(instruction, FLOATS).view(np.float32)
        if expected is None:
            wanted = np.where(FLOATS < 0, np.int32(1).view(np.float32), FLOATS)
        else:
            wanted = expected(FLOATS.copy())
    np.testing.assert_array_equal(found, wanted)


def test_names_and_labels_of_a_block_are_its_own():
    block = """{ .reg .b32 n, sum<2>; .reg .pred more; mov.u32 n, 0; mov.u32 sum1, 0;
        AGAIN: add.u32 sum1, sum1, %r2; add.u32 n, n, 1; setp.lt.u32 more, n, 3;
        @more bra AGAIN; add.u32 %r10, %r10, sum1; }"""
    found = run(f"mov.b32 %r10, 0; {block} {block} st.global.b32 [%d5], %r10;")
    assert found.tolist() == [6 * i if i < 32 else -7 for i in range(64)]


def test_threads_that_part_meet_again():
    """Each turns as often as its number says; then all exchange, which takes a whole warp."""
    found = run("""
        mov.b32 %r10, 0;
        LOOP: setp.ge.u32 %p1, %r10, %r2; @%p1 bra DONE;
        add.u32 %r10, %r10, 1; bra LOOP;
        DONE: shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1;
        st.global.b32 [%d5], %r11;
    """)
    assert found[:32].tolist() == [i ^ 1 for i in range(32)]


def test_an_instruction_of_all_threads_needs_all_of_them():
    with pytest.raises(Fault, match="a part of a warp"):
        run("setp.lt.u32 %p1, %r2, 5; @%p1 bar.sync 0;")


BETWEEN = "xor.b32 %r12, %r5, 128; {0} ld.shared.b32 %r11, [%r12]; st.global.b32 [%d5], %r11;"


def test_warps_exchange_across_a_barrier():
    body = "st.shared.b32 [%r5], %r2; " + BETWEEN.format("bar.sync 0;")
    found = run(body, warps=2, seeds=range(5))
    assert found.tolist() == [i ^ 32 for i in range(64)]


def test_without_a_barrier_that_is_a_race():
    """Whoever comes first; the words have been written before."""
    body = "st.shared.b32 [%r5], 0; bar.sync 0; st.shared.b32 [%r5], %r2; " + BETWEEN.format("")
    for seed in range(5):
        with pytest.raises(Fault, match="since the last barrier"):
            run(body, warps=2, seeds=[seed])


def test_warps_that_store_one_place_store_the_same():
    at_all = "st.shared.b32 [%r4], {0}; bar.sync 0; ld.shared.b32 %r11, [%r4];"
    assert run(at_all.format(9) + "st.global.b32 [%d5], %r11;", warps=2).tolist() == [9] * 64
    with pytest.raises(Fault, match="threads that store different numbers"):
        run(at_all.format("%r2"))
    with pytest.raises(Fault, match="over what another warp has stored"):
        run("and.b32 %r2, %r2, 32;" + at_all.format("%r2"), warps=2)


def test_to_store_before_another_has_loaded_is_a_race():
    body = (
        "st.shared.b32 [%r5], %r2; "
        + BETWEEN.format("bar.sync 0;")
        + "add.u32 %r2, %r2, 1; st.shared.b32 [%r5], %r2;"
    )
    found = set()
    for seed in range(9):
        with pytest.raises(Fault, match="since the last barrier") as fault:
            run(body, warps=2, seeds=[seed])
        found.add(str(fault.value))
    assert len(found) == 2, "the load may come first, or the store"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r10, [%d4 + 256];", "outside of every tensor"),
        ("ld.global.b32 %r10, [%d4 + 2];", "not aligned"),
        ("ld.shared.b32 %r10, [%r5 + 1024];", "outside of memory"),
        ("ld.shared.b32 %r10, [%r5];", "nobody has written"),
        ("setp.lt.u32 %p1, %r2, 5; @%p1 bra OUT; bar.sync 0; OUT:", "a part of a warp"),
        ("LOOP: bra LOOP;", "does not end"),
    ],
)
def test_what_a_gpu_would_stop_for_or_not_notice_is_an_error(monkeypatch, body, message):
    monkeypatch.setattr("ptx_machine._MOST_TURNS", 1000)
    with pytest.raises(Fault, match=message):
        run(body)


def test_an_instruction_that_is_not_known_is_an_error_where_it_is_reached():
    assert run("bra OVER; frobnicate.b32 %r10, %r2; OVER:")[0] == -7
    with pytest.raises(Unknown, match="frobnicate"):
        run("frobnicate.b32 %r10, %r2;")


# Program 0 stores two words, the second after the first, in the other's sight; program 1 looks for
# the second until it is there, and takes the first.
HANDED = """
    mov.u32 %r20, %ctaid.x; setp.ne.u32 %p1, %r20, 0; @%p1 bra LOOK;
    st.{order}global.b32 [%d2], 1;
    st.relaxed.gpu.global.b32 [%d2 + 4], 1;
    bra END;
    LOOK: ld.relaxed.gpu.global.b32 %r10, [%d2 + 4]; setp.ne.s32 %p2, %r10, 1; @%p2 bra LOOK;
    {load} %r11, [%d2]; st.global.b32 [%d2 + 8], %r11;
    END:
"""


def over_orders(body, warps=1):
    """What two programs leave in their tensors, by turns, over many orders of events."""
    machine = Machine(f"{HEAD}{body}\nret;\n}}", warps, 0)
    for seed in range(40):
        source, result = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
        machine.launch(2, 1, [source, result], [source, result, 0], seed)
        yield source, result


def test_stores_arrive_in_any_order():
    body = HANDED.format(load="ld.relaxed.gpu.global.b32", order="relaxed.gpu.")
    assert {result[2].item() for _, result in over_orders(body)} == {0, 1}


# Whoever counts with a release has stored before all that it stored.
COUNTED = """
    mov.u32 %r20, %ctaid.x; setp.ne.u32 %p1, %r20, 0; @%p1 bra LOOK;
    st.global.b32 [%d5], 5; {barrier}
    setp.eq.u32 %p3, %r2, 0;
    @%p3 atom.global.gpu.{order}.add.u32 %r21, [%d1], 1;
    bra END;
    LOOK: ld.global.gpu.acquire.b32 %r10, [%d1]; setp.ne.s32 %p2, %r10, 1; @%p2 bra LOOK;
    {load} %r11, [%d5]; setp.ne.s32 %p4, %r11, 5; @%p4 st.global.b32 [%d1 + 8], 1;
    END:
"""


def missed(order, load, before="", barrier="bar.sync 0;"):
    """Whether program 1 misses what warps of program 0 have stored, over many orders of events."""
    body = before + COUNTED.format(order=order, load=load, barrier=barrier)
    return {source[2].item() for source, _ in over_orders(body, warps=2)}


def test_a_release_waits_for_what_was_stored_and_an_acquire_forgets_what_was_loaded():
    early = "ld.global.b32 %r30, [%d5];"
    assert missed("release", "ld.global.b32", early) == {0}
    assert missed("relaxed", "ld.global.b32", early) == {0, 1}
    assert missed("release", "ld.global.b32", early, barrier="") == {0, 1}


def test_a_plain_load_may_be_answered_with_what_was_there():
    """Nothing is acquired here; the L1 cache knows the line already."""
    early = "ld.global.b32 %r30, [%d2];"
    body = early + HANDED.format(load="ld.global.b32", order="")
    assert {result[2].item() for _, result in over_orders(body)} >= {0}


# Each program of a cluster sends its number to the next one, which unwritten words wait for.
SENT = """{{
    .shared .align 16 .b8 room[16]; .reg .b32 at, to, n; .reg .b64 there; .reg .pred gone;
    mov.u32 at, room; st.shared.b32 [at], -1;
    barrier.cluster.arrive.release; barrier.cluster.wait.acquire;
    mov.u32 n, %ctaid.x; add.u32 to, n, 1; and.b32 to, to, 3;
    cvt.u64.u32 there, at; cvta.shared.u64 there, there; mapa.u64 there, there, to;
    st.relaxed.cluster.b32 [there], n;
    LOOK: ld.relaxed.cluster.shared::cta.b32 %r10, [at]; setp.eq.s32 gone, %r10, -1;
    @gone bra LOOK;
    mul.wide.u32 there, n, 4; add.s64 there, there, %d2; st.global.b32 [there], %r10;
    {0} }}"""
TOGETHER = "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"


def test_the_programs_of_a_cluster_send_each_other_numbers():
    found = run(SENT.format(TOGETHER), programs=4, cluster=4, seeds=range(5))
    assert found[:4].tolist() == [3, 0, 1, 2]


def test_nobody_stores_into_a_program_that_has_ended():
    """Program 0 stores into one that waits for nothing."""
    text = """{
        .reg .b32 n; .reg .b64 there; .reg .pred first;
        barrier.cluster.arrive.release; barrier.cluster.wait.acquire;
        mov.u32 n, %ctaid.x; setp.ne.u32 first, n, 0; @first bra OVER;
        cvt.u64.u32 there, %r4; cvta.shared.u64 there, there; mapa.u64 there, there, 1;
        st.relaxed.cluster.b32 [there], n;
        OVER: }"""
    with pytest.raises(Fault, match="a program that has ended"):
        run(text, programs=2, cluster=2, seeds=range(20))


def test_what_another_program_sends_is_looked_for():
    plain = SENT.replace("ld.relaxed.cluster.shared::cta", "ld.shared")
    with pytest.raises(Fault, match="may send at any time"):
        run(plain.format(TOGETHER), programs=4, cluster=4, seeds=range(9))


@pytest.mark.parametrize(
    "text",
    [
        "ld.global.cta.acquire.b32 %r10, [%d1];", "atom.global.cta.release.add.u32 %r10, [%d1], 1;",
        "add.sat.s32 %r10, %r2, 1;", "fence.acq_rel.gpu;", "cvt.rz.f16.f32 %h1, %r2;",
        "shfl.sync.bfly.b32 %r10, %r2, 1, 15, -1;", "bar.sync 1;", "bar.sync 0, 32;",
        "barrier.cluster.arrive.release; mov.b32 %r10, 1; barrier.cluster.wait.acquire;",
        "mad.hi.s32 %r10, %r2, %r2, %r2;", "add.rn.bf16x2 %r10, %r2, %r2;",
    ],
)  # fmt: skip
def test_what_would_be_taken_for_something_else_is_not_known(text):
    with pytest.raises(Unknown):
        run(text)


def test_what_a_copy_goes_over_is_free_when_it_is_asked_for():
    """The copy itself is made later, behind a barrier."""
    body = (
        "st.shared.b32 [%r5], %r2; "
        + BETWEEN.format("bar.sync 0;")
        + """
        cp.async.ca.shared.global [%r5], [%d4], 4; cp.async.commit_group;
        bar.sync 0; cp.async.wait_group 0;"""
    )
    with pytest.raises(Fault, match="has loaded since the last barrier"):
        run(body, warps=2, seeds=range(9))


def test_copies_are_made_when_they_are_waited_for():
    copy = """
        cp.async.ca.shared.global [%r5], [%d4], 4, %r30; cp.async.commit_group;
        {0} ld.shared.b32 %r11, [%r5]; st.global.b32 [%d5], %r11;"""
    body = "setp.lt.u32 %p1, %r2, 9; selp.b32 %r30, 4, 0, %p1; st.shared.b32 [%r5], 77;"
    waited = run(body + copy.format("cp.async.wait_group 0;"))
    assert waited[:32].tolist() == [i if i < 9 else 0 for i in range(32)]
    assert run(body + copy.format("cp.async.wait_group 1;"))[:32].tolist() == [77] * 32
