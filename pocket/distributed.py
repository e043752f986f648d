"""
Data-parallel training: several processes, started by torchrun, train one model.

Every process computes its share of each step, and gradients are averaged over all of them. Without
torchrun there is one process, and nothing here does anything: torch.distributed is not even
imported.
"""
import os
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta

from pocket.errors import UserError, rank, read_environment, world_size

local_world_size = read_environment('LOCAL_WORLD_SIZE', world_size)  # on this machine
master_process = rank == 0  # the one that prints, writes files, and prepares datasets

# How to start a run like this one, for the advice to resume it
if world_size == 1:
    launcher = 'python'
elif local_world_size == world_size:
    launcher = f'torchrun --standalone --nproc_per_node={world_size}'
else:
    launcher = 'torchrun …'  # several machines: we don't know the addresses

cpu_group = None  # the process group for numbers on the CPU, whatever device the model is on


def init(device):
    """Meet the other processes. Returns the torch.device of this one.

    Raises UserError if the processes can't share this device, or if torchrun did not start us.
    """
    global cpu_group
    if world_size == 1:
        return device
    import torch
    import torch.distributed as dist

    # Is this a launch by torchrun, and a device that several processes can use?
    needed = ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise UserError(f'WORLD_SIZE is {world_size}, but {", ".join(missing)} is not set: '
                        'start with torchrun, or unset WORLD_SIZE')
    if device.type == 'mps' or device.index is not None:
        raise UserError(f"{world_size} processes can't share {device}: start without torchrun, "
                        f'omit --device={device}, or use --device=cpu')
    if device.type == 'cuda':  # a GPU for each process
        device = torch.device('cuda', read_environment('LOCAL_RANK', 0))
        num_gpus = torch.cuda.device_count()
        if device.index >= num_gpus:
            raise UserError(f'{local_world_size} processes need as many GPUs, but this machine '
                            f'has {num_gpus}: lower --nproc_per_node')
        torch.cuda.set_device(device)

    # PyTorch puts its own excepthook around ours, which would swallow our messages: put ours back
    our_hook = sys.excepthook
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    sys.excepthook = our_hook

    # The timeout is long because processes wait here while the first prepares a dataset
    cpu_group = dist.new_group(backend='gloo', timeout=timedelta(days=7))
    return device


def all_reduce_sum(*numbers):
    """The numbers, each summed over all processes in float64: a tuple.

    Every process must call this, with as many numbers and as often as the others.
    """
    if world_size == 1:
        return numbers
    import torch
    import torch.distributed as dist
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums, group=cpu_group)
    return tuple(sums.tolist())


def barrier():
    """Wait until every process has come here."""
    all_reduce_sum(0)


@contextmanager
def master_first():
    """A context that the master process goes through before the others enter it.

    So the master downloads or prepares, and the others find it done.
    """
    if not master_process:
        barrier()
    yield
    if master_process:
        barrier()


def wrap_model(model, some_unused):
    """The model, wrapped so that backward() averages its gradients over all processes.

    model: compiled already, if it is to be. some_unused: whether parameters may get no gradient in
    a step, as in an adaptive softmax when none of the targets falls into a cluster.
    """
    if world_size == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel
    return DistributedDataParallel(
        model,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=some_unused,
    )


def no_sync(model, last):
    """A context for forward and backward of a micro-batch: only a step's last one averages."""
    if world_size == 1 or last:
        return nullcontext()
    return model.no_sync()


def shutdown():
    """Leave the process group once all have come here, or after ten seconds.

    A process that left early could cut short the last answer that another is waiting for.
    """
    if world_size == 1:
        return
    import torch.distributed as dist
    store = dist.distributed_c10d._get_default_store()
    deadline = time.monotonic() + 10
    with suppress(dist.DistError):  # the store's host may have left, but then all have come
        store.add('leaving', 1)
        while store.add('leaving', 0) < world_size and time.monotonic() < deadline:
            time.sleep(0.01)
    dist.destroy_process_group()
