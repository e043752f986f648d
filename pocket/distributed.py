"""
Several processes that train one model: torchrun starts them, each learns from its share of every step, gradients are averaged.
Without torchrun there is one, and nothing here does anything: torch.distributed is not even imported.
"""
import os
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta

world_size = int(os.environ.get('WORLD_SIZE') or 1)
rank = int(os.environ.get('RANK') or 0) if world_size > 1 else 0
master_process = rank == 0  # the one that prints, writes and prepares
local_world_size = int(os.environ.get('LOCAL_WORLD_SIZE') or world_size)
launcher = 'python' if world_size == 1 else 'torchrun …' if local_world_size != world_size else f'torchrun --standalone --nproc_per_node={world_size}'
host = None  # the group for numbers on the CPU, whatever the model is on


def init(device):
    """Meet the other processes; returns the torch.device of this one. Raises UserError where this device can't be shared so."""
    if world_size == 1:
        return device
    import torch
    import torch.distributed as dist

    from pocket.errors import UserError  # which asks us who speaks
    if missing := [name for name in ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]:
        raise UserError(f'WORLD_SIZE is {world_size}, but {", ".join(missing)} is not set: start with torchrun, or unset WORLD_SIZE')
    if device.type == 'mps' or device.index is not None:
        raise UserError(f'{world_size} processes can\'t share {device}: leave torchrun or --device={device} away, or say --device=cpu')
    if device.type == 'cuda':
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        if device.index >= (n := torch.cuda.device_count()):
            raise UserError(f'{local_world_size} processes need as many GPUs, this machine has {n}: lower --nproc_per_node')
        torch.cuda.set_device(device)
    global host
    hook = sys.excepthook
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    sys.excepthook = hook  # PyTorch has put one around ours that would swallow what ours says
    host = dist.new_group(backend='gloo', timeout=timedelta(days=7))  # the others wait while one prepares a dataset or writes
    return device


def all_reduce_sum(*numbers):
    """These numbers, each summed over all processes in float64. Every process must come here, as often as the others."""
    if world_size == 1:
        return numbers
    import torch
    import torch.distributed as dist
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums, group=host)
    return tuple(sums.tolist())


@contextmanager
def master_first():
    """What is inside, the main process does before the others: they find it done."""
    if not master_process:
        all_reduce_sum(0)
    yield
    if master_process:
        all_reduce_sum(0)


def wrap_model(model, some_unused):
    """The model, compiled already where it should be, so that the last backward of a step averages gradients over all processes.

    some_unused: parameters may get no gradient, as in an adaptive softmax when no target falls into a cluster.
    """
    if world_size == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True,
                                   find_unused_parameters=some_unused)


def no_sync(model, last):
    """Context of a micro-batch's forward and backward: only the last one of a step is where processes wait for each other."""
    return nullcontext() if world_size == 1 or last else model.no_sync()


def shutdown():
    """Part from the other processes, once all are here: who leaves early may cut the last answer of another short."""
    if world_size > 1:
        import torch.distributed as dist
        store, patience = dist.distributed_c10d._get_default_store(), time.monotonic() + 10
        with suppress(dist.DistError):  # the store's host may have left: then all had come
            store.add('parting', 1)
            while store.add('parting', 0) < world_size and time.monotonic() < patience:
                time.sleep(0.01)
        dist.destroy_process_group()
