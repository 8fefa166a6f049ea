"""A machine that runs PTX: all programs of a launch, warp by warp, in an order that a seed decides.

It is for what neither Triton's interpreter nor a compiler shows: whether the code that a GPU is
given does what it should, with its inline assembly, its fragments and its barriers. Where a GPU
may do one thing or another, the machine does what is worse for who relied on it:

- Warps take turns at random, and some programs are slow.
- What is stored for other programs arrives late and in any order, but for one place. Until then
  only the program itself sees it. A barrier of a program orders its stores; a release waits for
  those.
- A plain load may be answered by the program's own L1 cache, which forgets nothing but at an
  acquire.
- Copies to shared memory are made when they are waited for, not before.
- Memory outside of the tensors' storages, unaligned accesses, shared memory that one warp writes
  and another reads or writes without a barrier between, stores into a program that has ended, and
  instructions that need a whole warp but find a part of it are errors, and so is a launch that
  never ends.

It is kinder than a GPU in this: all programs run at once, however they are launched; the threads of
a warp never race with each other; a thread's load or store is whole; what a program stores in its
own shared memory is there at once; of threads that have parted those run that are farthest behind;
matrix instructions are never late.
"""

import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ptx_operations import LANES, Unknown, operation
from ptx_text import Instruction, Number, Target, parse

Array = NDArray[Any]
Mask = Array | None


class Fault(Exception):
    """What a GPU would stop for, or not notice."""


# Addresses: of global memory from here on, of the shared memory of a cluster's programs from there.
_GLOBAL = 1 << 40
_CLUSTER = 1 << 52
_RANK = 1 << 32

# Between storages, so that none is overrun unnoticed.
_GAP = 4096
# Where the first of a launch's tensors is.
FIRST_ADDRESS = _GLOBAL + _GAP
_SECTOR = 32
# How likely stores are to arrive, each time that some do: after every other turn of a warp.
_HASTE = (0.5, 0.1, 0.01)
# Of a sane launch: far more than any of the tests needs.
_MOST_TURNS = 10_000_000


class _Global:
    """Copies of the tensors of a launch, side by side.

    Attributes:
        bytes: of all. owned: which of them are a tensor's.
        cold: sectors that a load waited for before anybody had prefetched, loaded or stored them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._storages: dict[int, tuple[int, torch.Tensor]] = {}
        end = _GAP
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._storages:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._storages[storage.data_ptr()] = end, whole
                end += -(-whole.numel() // _GAP) * _GAP + _GAP
        self.bytes = np.zeros(end, np.uint8)
        self.owned = np.zeros(end, bool)
        self._asked = np.zeros(end // _SECTOR, bool)
        self.cold = 0
        for start, whole in self._storages.values():
            self.bytes[start : start + whole.numel()] = whole.numpy()
            self.owned[start : start + whole.numel()] = True

    def address(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage().data_ptr()
        return _GLOBAL + self._storages[storage][0] + tensor.data_ptr() - storage

    def ask_for(self, sectors: Array, waits: bool) -> None:
        """Note that these are on their way to the L2 cache; somebody `waits` for them."""
        if waits:
            self.cold += np.count_nonzero(~self._asked[sectors])
        self._asked[sectors] = True

    def copy_back(self) -> None:
        for start, whole in self._storages.values():
            whole.numpy()[:] = self.bytes[start : start + whole.numel()]


@dataclass
class _Store:
    """Numbers on their way.

    Attributes:
        warp: whose. memory: where to, in bytes; program: whose shared memory that is, or None.
        places: first bytes. values: (places, bytes).
        haste: how likely it is to arrive, each time. ordered: a barrier of the program has come
            after it.
    """

    warp: "Warp"
    memory: Array
    program: "_Running | None"
    places: Array
    values: Array
    haste: float
    ordered: bool = False

    def __post_init__(self) -> None:
        self._words = (self.places[:, None] + np.arange(0, self.values.shape[1], 4)).ravel() // 4

    def meets(self, other: "_Store") -> bool:
        """Whether both are for the same place."""
        return self.memory is other.memory and bool(np.isin(self._words, other._words).any())

    def is_in(self, sectors: Array) -> bool:
        return bool(np.isin(self.places // _SECTOR, sectors).any())


class _Shared:
    """Shared memory of a program, and who last used it since which barrier."""

    def __init__(self, size: int) -> None:
        self.bytes = np.zeros(size, np.uint8)
        self._written = np.zeros(size, bool)
        # By other programs; only who looks for it may load it.
        self._sent = np.zeros(size, bool)
        self._writer = np.full(size, -1, np.int32)
        self._reader = np.full(size, -1, np.int32)
        self._written_at = np.full(size, -1, np.int64)
        self._read_at = np.full(size, -1, np.int64)
        # Barriers so far.
        self.epoch = 0

    def load(self, places: Array, size: int, warp: int) -> Array:
        """Raises Fault if another warp has stored there since the last barrier."""
        every = (places[:, None] + np.arange(size)).ravel()
        if self._stored_by_others(every, warp).any():
            raise Fault("a load of what another warp has stored since the last barrier")
        if not self._written[every].all():
            raise Fault("a load of shared memory that nobody has written")
        if self._sent[every].any():
            raise Fault("a plain load of what another program may send at any time")
        # Of several readers it is enough to know that there are: -2.
        again = (self._read_at[every] == self.epoch) & (self._reader[every] != warp)
        self._reader[every] = np.where(again, -2, warp)
        self._read_at[every] = self.epoch
        return _at(self.bytes, places, size)

    def store(self, places: Array, values: Array, warp: int) -> None:
        """Raises Fault if another warp has loaded from there, or stored something else."""
        every = (places[:, None] + np.arange(values.shape[1])).ravel()
        changes = self.bytes[every] != values.ravel()
        if (self._stored_by_others(every, warp) & changes).any():
            raise Fault("a store over what another warp has stored since the last barrier")
        self.may_change(every[changes], warp)
        self._written[every], self._sent[every] = True, False
        self._writer[every], self._written_at[every] = warp, self.epoch
        _put(self.bytes, places, values)

    def may_change(self, every: Array, warp: int) -> None:
        """Raises Fault if another warp has loaded from there."""
        if ((self._read_at[every] == self.epoch) & (self._reader[every] != warp)).any():
            raise Fault("a store over what another warp has loaded since the last barrier")

    def _stored_by_others(self, every: Array, warp: int) -> Array:
        return (self._written_at[every] == self.epoch) & (self._writer[every] != warp)

    def send(self, places: Array, size: int) -> None:
        """Another program stores there."""
        every = (places[:, None] + np.arange(size)).ravel()
        self._written[every] = self._sent[every] = True

    def pass_barrier(self, of_cluster: bool) -> None:
        self.epoch += 1
        if of_cluster:
            self._sent[:] = False


class _Cluster:
    """Programs that run next to each other."""

    def __init__(self) -> None:
        self.programs: list[_Running] = []
        self._waiting = 0

    def meet(self, warp: "Warp") -> None:
        """A warp comes to the barrier of all."""
        warp.is_waiting = True
        self._waiting += 1
        if self._waiting == sum(len(program.warps) for program in self.programs):
            self._waiting = 0
            for program in self.programs:
                program.shared.pass_barrier(of_cluster=True)
                program.in_l1[:] = False
                for each in program.warps:
                    each.is_waiting = False


class _Running:
    """One program."""

    def __init__(self, machine: "Machine", number: int, cluster: _Cluster) -> None:
        self.machine, self.number, self.cluster = machine, number, cluster
        self.rank = len(cluster.programs)
        cluster.programs.append(self)
        self.shared = _Shared(machine.program.shared)
        memory = machine.memory.bytes
        self.l1 = np.zeros_like(memory)
        self.in_l1 = np.zeros(len(memory) // _SECTOR, bool)
        self.waiting = 0
        self.warps = [Warp(self, number) for number in range(machine.warps)]

    def meet(self, warp: "Warp") -> None:
        """A warp comes to the barrier."""
        warp.is_waiting = True
        self.waiting += 1
        if self.waiting == len(self.warps):
            self.waiting = 0
            self.shared.pass_barrier(of_cluster=False)
            for each in self.warps:
                each.is_waiting = False
            for store in self.machine.on_their_way:
                store.ordered |= store.warp.running is self

    @property
    def is_over(self) -> bool:
        return all(warp.is_over for warp in self.warps)


class Warp:
    """32 threads: those at the lowest place run, until they meet the others.

    Attributes:
        taking: the threads that run, None for all; parked: the others, by where they are.
    """

    def __init__(self, running: _Running, number: int) -> None:
        self.running, self.number = running, number
        machine = running.machine
        self.registers = [_undefined(bits) for bits in machine.program.registers]
        thread = np.arange(LANES, dtype=np.uint32) + np.uint32(LANES * number)
        same = {
            "%ctaid.x": running.number,
            "%nctaid.x": machine.programs,
            "%ntid.x": LANES * machine.warps,
            "%cluster_ctarank": running.rank,
        }
        self.special = {name: np.full(LANES, n, np.uint32) for name, n in same.items()}
        self.special["%tid.x"] = thread
        self.special["%laneid"] = thread % np.uint32(LANES)
        self.place = 0
        self.taking: Mask = None
        self.parked: list[tuple[int, Array]] = []
        self.is_waiting = self.is_over = False
        self.copies: list[Any] = []
        self.groups: list[list[Any]] = []

    @property
    def clock(self) -> Array:
        """Instructions of all warps before this turn."""
        return np.full(LANES, self.running.machine.clock % (1 << 32), np.uint32)

    @property
    def is_ready(self) -> bool:
        return not self.is_waiting and not self.is_over

    def run(self, most: int) -> int:
        """Run so many instructions, or until the warp turns back or waits; how many it ran."""
        code = self.running.machine.code
        for count in range(most):
            if self.parked:
                self._meet()
            kind, function, guard, wanted = code[self.place]
            taking = self.taking
            if guard is not None:
                truth = self.registers[guard]
                truth = truth if wanted else ~truth
                taking = truth if taking is None else truth & taking
                if taking.all():
                    taking = None
            if kind == "branch":
                before = self.place
                self._branch(function, taking)
                if self.place <= before:
                    return count + 1
            elif taking is not None and not taking.any():
                self.place += 1
            elif kind == "plain":
                function(self, taking)
                self.place += 1
            elif kind == "return":
                if self.parked or taking is not None:
                    raise Fault("a part of a warp returns")
                self.await_copies(0)
                self.is_over = True
                return count + 1
            else:
                self.must_be_whole(taking, function)
                self.place += 1
                if kind == "barrier":
                    self.running.meet(self)
                else:
                    self.running.machine.land(lambda store: store.warp is self)
                    self.running.cluster.meet(self)
                return count + 1
        return most

    def must_be_whole(self, taking: Mask, instruction: Instruction) -> None:
        if taking is not None:
            raise Fault(f"{instruction.text}: a part of a warp is there")

    def _branch(self, target: int, taking: Mask) -> None:
        if taking is None and self.taking is None:
            self.place = target
            return
        current = np.ones(LANES, bool) if self.taking is None else self.taking
        leaving = current if taking is None else current & taking
        staying = current & ~leaving
        if not leaving.any():
            self.place += 1
        elif not staying.any():
            self.place = target
        else:
            self.parked.append((target, leaving))
            self.taking = staying
            self.place += 1

    def _meet(self) -> None:
        """Let those run that are farthest behind."""
        current = np.ones(LANES, bool) if self.taking is None else self.taking
        every = [*self.parked, (self.place, current)]
        self.place = min(place for place, _ in every)
        here = [mask for place, mask in every if place == self.place]
        self.taking = np.logical_or.reduce(here)
        self.parked = [(place, mask) for place, mask in every if place != self.place]
        if self.taking.all():
            self.taking = None

    # Memory ---------------------------------------------------------------------------------------

    def load(self, how: tuple[str, str], places: Array, taking: Mask, size: int) -> Array:
        """(32, size) bytes; zeros of those that take no part."""
        space, order = how
        taken = places if taking is None else places[taking]
        if space == "param":
            found = self._parameters(taken, size)
        elif space == "shared":
            found = self.load_shared(order, taken, size)
        elif space == "global":
            found = self._load_global(order, taken, size)
        else:
            raise Unknown(f"a load from {space}")
        if taking is None:
            return found
        result = np.zeros((LANES, size), np.uint8)
        result[taking] = found
        return result

    def _parameters(self, places: Array, size: int) -> Array:
        return self.running.machine.parameters[places.astype(np.int64)[:, None] + np.arange(size)]

    def load_shared(self, order: str, places: Array, size: int) -> Array:
        shared = self.running.shared
        places = _checked(places.astype(np.int64), size, len(shared.bytes))
        if order == "weak":
            return shared.load(places, size, self.number)
        return _at(shared.bytes, places, size)

    def _load_global(self, order: str, places: Array, size: int) -> Array:
        machine, running = self.running.machine, self.running
        memory = machine.memory.bytes
        places = self._in_memory(places, size)
        sectors = np.unique(places // _SECTOR)
        machine.memory.ask_for(sectors, waits=True)
        if order == "acquire":
            running.in_l1[:] = False
        if order != "weak":
            self._land_own(sectors)
            return _at(memory, places, size)
        missing = sectors[~running.in_l1[sectors]]
        if len(missing):
            whole = memory.reshape(-1, _SECTOR)
            running.l1.reshape(-1, _SECTOR)[missing] = whole[missing]
            running.in_l1[missing] = True
            for store in machine.on_their_way:
                # What is the program's own it sees before it has arrived.
                if store.warp.running is running and store.memory is memory:
                    _put(running.l1, store.places, store.values)
        return _at(running.l1, places, size)

    def _land_own(self, sectors: Array) -> None:
        """Let the program's own stores there arrive."""
        machine, running = self.running.machine, self.running
        memory = machine.memory.bytes
        machine.land(
            lambda store: (
                store.warp.running is running and store.memory is memory and store.is_in(sectors)
            )
        )

    def _in_memory(self, places: Array, size: int) -> Array:
        machine = self.running.machine
        places = _checked((places - np.uint64(_GLOBAL)).view(np.int64), size, machine.size)
        owned = machine.memory.owned
        if not (owned[places].all() and owned[places + size - 1].all()):
            raise Fault("an access outside of every tensor")
        return places

    def store(self, how: tuple[str, str], places: Array, taking: Mask, values: Array) -> None:
        """Store (32, count) numbers."""
        space, _ = how
        values = np.ascontiguousarray(values).view(np.uint8).reshape(LANES, -1)
        if taking is not None:
            places, values = places[taking], values[taking]
        size, running = values.shape[1], self.running
        machine = running.machine
        if space == "shared":
            shared = running.shared
            places = _checked(places.astype(np.int64), size, len(shared.bytes))
            shared.store(places, values, self.number)
            if (_at(shared.bytes, places, size) != values).any():
                raise Fault("threads that store different numbers in one place")
        elif space == "global":
            places = self._in_memory(places, size)
            machine.memory.ask_for(places // _SECTOR, waits=False)
            _put(running.l1, places, values)
            if (_at(running.l1, places, size) != values).any():
                raise Fault("threads that store different numbers in one place")
            machine.send(self, machine.memory.bytes, None, places, values)
        else:
            self._store_in_cluster(places, values)

    def _store_in_cluster(self, places: Array, values: Array) -> None:
        size, machine = values.shape[1], self.running.machine
        if (places < _CLUSTER).any():
            raise Fault("a store for other programs that is not in their shared memory")
        ranks = (places - np.uint64(_CLUSTER)) // np.uint64(_RANK)
        for rank in np.unique(ranks):
            program = self.running.cluster.programs[int(rank)]
            there = ranks == rank
            inside = (places[there] % np.uint64(_RANK)).astype(np.int64)
            inside = _checked(inside, size, len(program.shared.bytes))
            machine.send(self, program.shared.bytes, program, inside, values[there])

    def add(self, order: str, places: Array, taking: Mask, values: Array) -> Array:
        machine, running = self.running.machine, self.running
        if order in ("release", "acq_rel"):
            machine.land(
                lambda store: (
                    store.warp is self or (store.ordered and store.warp.running is running)
                )
            )
        if order in ("acquire", "acq_rel"):
            running.in_l1[:] = False
        lanes = np.arange(LANES) if taking is None else np.flatnonzero(taking)
        sectors = np.unique(self._in_memory(places[lanes], 4) // _SECTOR)
        self._land_own(sectors)
        running.in_l1[sectors] = False
        before = np.zeros(LANES, np.uint32)
        words = machine.memory.bytes.view(np.uint32)
        for lane in lanes:
            place = self._in_memory(places[lane : lane + 1], 4)[0] // 4
            before[lane] = words[place]
            words[place] += values[lane]
        return before

    def generic(self, places: Array, taking: Mask) -> Array:
        taken = places if taking is None else places[taking]
        if (taken >= len(self.running.shared.bytes)).any():
            raise Fault("an address outside of shared memory")
        return places + np.uint64(_CLUSTER + self.running.rank * _RANK)

    def of_rank(self, places: Array, ranks: Array, taking: Mask) -> Array:
        here = slice(None) if taking is None else taking
        if (places[here] < _CLUSTER).any():
            raise Fault("an address that is not in shared memory")
        if (ranks[here] >= len(self.running.cluster.programs)).any():
            raise Fault("no such program in the cluster")
        return places % np.uint64(_RANK) + np.uint64(_CLUSTER) + ranks * np.uint64(_RANK)

    def prefetch(self, places: Array, taking: Mask) -> None:
        places = self._in_memory(places if taking is None else places[taking], 1)
        self.running.machine.memory.ask_for(places // _SECTOR, waits=False)

    def copy(
        self, order: str, to: Array, source: Array, taking: Mask, size: int, taken: Array
    ) -> None:
        """Note a copy; what it goes over must be free from now on."""
        here = slice(None) if taking is None else taking
        every = (to[here].astype(np.int64)[:, None] + np.arange(size)).ravel()
        self.running.shared.may_change(every, self.number)
        self.copies.append((order, to, source, taking, size, taken))

    def commit_copies(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def await_copies(self, left: int) -> None:
        """Make copies, all but the last so many groups of them."""
        while len(self.groups) > left:
            for order, to, source, taking, size, taken in self.groups.pop(0):
                whole = np.ones(LANES, bool) if taking is None else taking
                if (whole & (taken != size) & (taken != 0)).any():
                    raise Unknown("a copy of a part")
                reading = whole & (taken == size)
                values = self.load(("global", order), source, reading, size)
                self.store(("shared", "weak"), to, taking, values)


def _undefined(bits: int) -> Array:
    """What stands in a register that nothing has been written to."""
    if bits == 1:
        return np.arange(LANES) % 3 == 0
    return np.full(LANES, 0xDEADBEEFDEADBEEF % (1 << bits), f"u{bits // 8}")


def _checked(places: Array, size: int, end: int) -> Array:
    if ((places < 0) | (places + size > end)).any():
        raise Fault("an access outside of memory")
    if (places % size).any():
        raise Fault(f"an access of {size} bytes that is not aligned")
    return places


def _at(memory: Array, places: Array, size: int) -> Array:
    return memory.reshape(-1, size)[places // size] if size > 1 else memory[places][:, None]


def _put(memory: Array, places: Array, values: Array) -> None:
    memory.reshape(-1, values.shape[1])[places // values.shape[1]] = values


class Machine:
    """A GPU for one kernel.

    Args:
        text: its PTX. warps: of a program. shared: bytes of shared memory that Triton asks for.
    """

    def __init__(self, text: str, warps: int, shared: int) -> None:
        self.program = parse(text, -(-shared // 16) * 16)
        self.warps = warps
        self.code = _prepared(self.program.instructions)
        self.on_their_way: list[_Store] = []

    def launch(
        self,
        programs: int,
        cluster: int,
        tensors: Sequence[torch.Tensor],
        arguments: Sequence[Any],
        seed: int = 0,
    ) -> int:
        """Run a grid to its end; how many instructions of a warp that took.

        Args:
            cluster: programs of a cluster, side by side in the grid.
            tensors: all that the arguments point to. arguments: tensors and integers, as the
                kernel's parameters; what is left of those is zero.

        Raises:
            Fault: see the head of this file.
        """
        assert programs % cluster == 0
        self._random = random.Random(seed)
        self.memory = _Global(tensors)
        self.size = len(self.memory.bytes)
        self.programs = programs
        self.parameters = self._laid_out(arguments)
        running: list[_Running] = []
        for first in range(0, programs, cluster):
            together = _Cluster()
            running += [_Running(self, first + i, together) for i in range(cluster)]
        executed = self._run([warp for program in running for warp in program.warps])
        self.land(lambda store: True)
        self.memory.copy_back()
        return executed

    def _laid_out(self, arguments: Sequence[Any]) -> Array:
        """The kernel's parameters as bytes."""
        end = max(place + size for size, place in self.program.parameters)
        parameters = np.zeros(end, np.uint8)
        # Triton adds two of its own.
        for (size, place), argument in zip(self.program.parameters, arguments, strict=False):
            number = argument
            if isinstance(argument, torch.Tensor):
                number = self.memory.address(argument)
            packed = (operator.index(number) % (1 << 8 * size)).to_bytes(size, "little")
            parameters[place : place + size] = np.frombuffer(packed, np.uint8)
        return parameters

    def _run(self, warps: list[Warp]) -> int:
        chance = self._random
        # Some programs are slow.
        slow = {warp.running: chance.random() < 0.2 for warp in warps}
        self.clock = 0
        for _ in range(_MOST_TURNS):
            ready = [warp for warp in warps if warp.is_ready]
            if not ready:
                left = [warp for warp in warps if not warp.is_over]
                if left:
                    raise Fault(f"{len(left)} warps wait for ever")
                return self.clock
            warp = chance.choice(ready)
            if slow[warp.running] and chance.random() < 0.8:
                warp = chance.choice(ready)
            self.clock += warp.run(1 << chance.randrange(10))
            if warp.is_over and warp.running.is_over:
                warps = [other for other in warps if not other.is_over]
            if self.on_their_way and chance.random() < 0.5:
                self._some_arrive()
        raise Fault("a launch that does not end")

    def send(
        self, warp: Warp, memory: Array, program: _Running | None, places: Array, values: Array
    ) -> None:
        """A store is on its way from now, in one piece or in two."""
        chance = self._random
        first = np.array([chance.random() < 0.5 for _ in places]) | (chance.random() < 0.5)
        for part in (first, ~first):
            if part.any():
                self.on_their_way.append(
                    _Store(warp, memory, program, places[part], values[part], chance.choice(_HASTE))
                )

    def _some_arrive(self) -> None:
        chance = self._random
        chosen = {id(store) for store in self.on_their_way if chance.random() < store.haste}
        self.land(lambda store: id(store) in chosen)

    def land(self, which: Any) -> None:
        """Let stores arrive, and before each whatever was stored at its places earlier."""
        left: list[_Store] = []
        landing: list[_Store] = []
        for store in reversed(self.on_their_way):
            if which(store) or any(store.meets(later) for later in landing):
                landing.append(store)
            else:
                left.append(store)
        self.on_their_way = left[::-1]
        for store in reversed(landing):
            if store.program is not None:
                if store.program.is_over:
                    raise Fault("a store into a program that has ended")
                store.program.shared.send(store.places, store.values.shape[1])
            _put(store.memory, store.places, store.values)


_Prepared = tuple[str, Any, int | None, bool]


def _prepared(instructions: Sequence[Instruction]) -> list[_Prepared]:
    """Of each: kind, what is to be done, the guard's register and what it must be."""
    prepared = []
    for place, ins in enumerate(instructions):
        kind, what = _kind_of(ins, instructions[place + 1 : place + 2])
        guard = None if ins.guard is None else ins.guard.index
        prepared.append((kind, what, guard, ins.wanted))
    return prepared


# A cluster's barrier is two instructions, between which nothing may stand here.
_ARRIVE, _AWAIT = "barrier.cluster.arrive.release", "barrier.cluster.wait.acquire"


def _kind_of(ins: Instruction, following: Sequence[Instruction]) -> tuple[str, Any]:
    if ins.name == "ret":
        return "return", ins
    if ins.name == "bar.sync" and ins.operands == (Number(0),):
        return "barrier", ins
    if ins.name == _ARRIVE and [other.name for other in following] == [_AWAIT]:
        return "cluster", ins
    if ins.name == _AWAIT:
        return "plain", lambda warp, taking: None
    if ins.name in ("bra", "bra.uni") and isinstance(ins.operands[0], Target):
        return "branch", ins.operands[0].place
    try:
        return "plain", operation(ins)
    except Unknown:
        return "plain", _unknown(ins)


def _unknown(ins: Instruction) -> Any:
    def run(warp: Warp, taking: Mask) -> None:
        raise Unknown(ins.text)

    return run
