"""The devices that plans are made for. Plain Python; none is asked."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What a plan must know of a device.

    Attributes:
        name: for the reader.
        backend, architecture: Triton's target, ("cuda", 90) or ("hip", "gfx942").
        multiprocessors: so many programs are sure to run at the same time.
        shared_memory: bytes that one program may take.
        matrix_mflops: dense 16-bit arithmetic of one multiprocessor in 1e6 operations per
            microsecond.
        cooperative: whether the device can guarantee that all programs of a launch run at once.
        narrow_apart: whether even products of eight columns are made in a memory of their own
            (data-centre Blackwell, by Triton 3.8 and later).
    """

    name: str
    backend: str
    architecture: int | str
    multiprocessors: int
    shared_memory: int
    matrix_mflops: float
    cooperative: bool = True
    narrow_apart: bool = False

    @property
    def weight_room(self) -> int:
        """Bytes of W_hh that a program can keep."""
        if self.backend == "hip":
            # Registers, half of which are left to everything else: what is loaded before a loop
            # does not stay in shared memory there.
            return 64 * 1024
        return self.shared_memory

    @property
    def multiplies_apart(self) -> bool:
        """Whether its matrix units have a memory of their own: data-centre Blackwell."""
        return isinstance(self.architecture, int) and 100 <= self.architecture < 120

    @property
    def is_hopper_or_later(self) -> bool:
        return isinstance(self.architecture, int) and self.architecture >= 90

    @property
    def is_in_data_centres(self) -> bool:
        """Hopper, or Blackwell but that of graphics cards."""
        return isinstance(self.architecture, int) and 90 <= self.architecture < 120


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", "cuda", 80, 108, 163 * 1024, 2.9),
        Chip("H100", "cuda", 90, 132, 227 * 1024, 7.5),
        Chip("H200", "cuda", 90, 132, 227 * 1024, 7.5),
        Chip("B200", "cuda", 100, 148, 227 * 1024, 15.0),
        Chip("RTX 4090", "cuda", 89, 128, 99 * 1024, 1.3),
        Chip("MI300X", "hip", "gfx942", 304, 64 * 1024, 4.3),
    )
}
# What runs the kernels under Triton's interpreter, one program after the other.
INTERPRETER = Chip("interpreter", "interpreter", 0, 1, 1 << 40, 1.0, cooperative=False)
