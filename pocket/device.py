"""Where to compute and in which precision: picked after all overrides, with the reason in words."""
import ctypes
import os
import sys

import torch

from pocket.errors import UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def keep_freed_memory():
    """Let the C library keep big freed blocks instead of handing each back to the kernel (Linux with glibc; else nothing).

    Every training step frees and allocates the same large tensors. By default each of them is mapped anew, and its pages are
    zeroed by the kernel at first touch: on a CPU that costs more than the arithmetic of an elementwise operation (LOG.md).
    And let oneDNN remember fewer kernels: with batches of many shapes it would hold a gigabyte of them, to no use.
    """
    os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '128')
    if sys.platform == 'linux':
        try:
            libc = ctypes.CDLL('libc.so.6')
            libc.mallopt(-4, 0)   # M_MMAP_MAX: no block is mapped on its own
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the top of the heap is never given back
        except (OSError, AttributeError):
            pass  # another C library: slower, but right


def pick_device(device):
    """'auto' or a device's name, to a torch.device that exists here. Raises UserError where it does not."""
    mps = torch.backends.mps.is_available()
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    try:
        d = torch.device(device)
    except RuntimeError:
        d = None
    if d is None or d.type not in ('cpu', 'cuda', 'mps'):
        raise UserError(f'device must be auto, cpu, cuda, cuda:N or mps, got {device!r}')
    here = ['cpu'] + [f'cuda:{i}' for i in range(torch.cuda.device_count())] + ['mps'] * mps
    if d.type == 'cuda' and f'cuda:{d.index or 0}' not in here or d.type == 'mps' and not mps:
        raise UserError(f'--device={device} is not available here; this machine has: {", ".join(here)}. '
                        f'Leave --device away to have the best one chosen')
    if d.type == 'cpu':
        keep_freed_memory()
    return d


def pick_dtype(device, dtype):
    """'auto' or a name in DTYPES, to (torch.dtype to compute in, why): see rule 6 of the design."""
    if dtype != 'auto':
        if dtype == 'float16' and device.type == 'cpu':
            raise UserError('--dtype=float16 needs a GPU: on a CPU use --dtype=bfloat16 or float32')
        return DTYPES[dtype], 'as asked'
    if device.type == 'cuda':
        ok = torch.cuda.get_device_capability(device) >= (8, 0)  # older cards emulate bfloat16, slowly
        return (torch.bfloat16, 'the card computes in it') if ok else (torch.float16, 'the card is too old for bfloat16')
    if device.type == 'mps':
        return torch.float32, 'the safe choice on MPS'
    if getattr(torch.cpu, '_is_avx512_bf16_supported', bool)():  # those with AMX have it too
        return torch.bfloat16, 'the processor has AVX512_BF16'
    return torch.float32, 'the processor has no bfloat16 instructions'


def autocast(device, dtype):
    """Context in which matrix products run in dtype; does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_memory(device):
    """Bytes: the most that this process ever held, on its device where that counts for itself. None where unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    if device.type == 'mps':
        return torch.mps.driver_allocated_memory()
    if os.name == 'posix':
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    return None
