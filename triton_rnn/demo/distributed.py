"""The demo over several processes: started by torchrun, it trains data-parallel.

Every process trains both models with DistributedDataParallel on its rows of every batch, so that
all of them together do what one process does with the whole batch. Started without torchrun, all
that stands here does nothing.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triton_rnn.demo.settings import DemoError, Settings

# What torchrun tells each of its processes. All of it: a stray RANK alone starts no group.
_TORCHRUNS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _is_torchruns() -> bool:
    return all(name in os.environ for name in _TORCHRUNS)


def processes() -> int:
    """How many processes train together; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if _is_torchruns() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ["RANK"]) if _is_torchruns() else 0


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


@contextmanager
def group(settings: Settings) -> Iterator[None]:
    """Join the other processes for a block; nccl on GPUs, a GPU each, else gloo.

    Raises:
        DemoError: torch cannot do that here, or there are fewer sequences or GPUs than processes.
    """
    if not _is_torchruns():
        yield
        return
    if settings.batch < processes():
        raise DemoError(
            f"argument --batch: {settings.batch} leaves some of the {processes()} processes idle"
        )
    backend = "nccl" if settings.device.type == "cuda" else "gloo"
    if not dist.is_available() or not dist.is_backend_available(backend):
        raise DemoError(f"torchrun needs torch.distributed with {backend}, which this torch lacks")
    if backend == "nccl":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise DemoError(f"process {local} of this machine finds no GPU of its own")
        torch.cuda.set_device(local)
    dist.init_process_group(backend)
    yield
    # Not after an error: the others may never come to what a group in use would wait for. This
    # process ends then, and torchrun ends the others.
    # The wrapped models are garbage by now, in cycles. Left until the interpreter's end, they made
    # one run of ten abort there ("terminate called without an active exception", torch 2.13).
    gc.collect()
    dist.destroy_process_group()


def share(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The rows of a batch that fall to this process; all shares together are the batch."""
    input, target = (whole.tensor_split(processes())[rank()] for whole in batch)
    return input, target


def shared_loss(
    loss_function: Callable[[Tensor, Tensor], Tensor], batch: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss function of a share of ``batch`` rows, such that the mean over all is the batch's.

    Shares differ by a row where the batch is no multiple of the processes, so they are weighted.
    """
    if processes() == 1:
        return loss_function
    return lambda output, target: (
        loss_function(output, target) * (len(target) * processes() / batch)
    )


def parallel(model: nn.Module) -> nn.Module:
    """``model``, its gradients averaged over the processes at every backward."""
    if not _is_torchruns():
        return model
    return nn.parallel.DistributedDataParallel(model)


def joined(loss: Tensor) -> float:
    """The loss of the batch from those of the shares; all processes wait for each other here."""
    if _is_torchruns():
        loss = loss.clone()
        dist.all_reduce(loss)
    return float(loss) / processes()
