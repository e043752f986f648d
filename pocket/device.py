"""Which device to compute on and in which precision, and how much memory that took."""
import ctypes
import os
import sys

import torch

from pocket import threads
from pocket.errors import UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def pick_device(device):
    """A torch.device that exists here, from its name or 'auto': CUDA, else MPS, else the CPU.

    Raises UserError if there is no such device. A CPU is also set up to compute fast.
    """
    has_mps = torch.backends.mps.is_available()
    if device == 'auto':
        if torch.cuda.is_available():
            device = 'cuda'
        elif has_mps:
            device = 'mps'
        else:
            device = 'cpu'

    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ('cpu', 'cuda', 'mps'):
        raise UserError(f'device must be auto, cpu, cuda, cuda:N or mps, got {device!r}')

    available = ['cpu']
    available += [f'cuda:{i}' for i in range(torch.cuda.device_count())]
    if has_mps:
        available.append('mps')
    name = found.type
    if name == 'cuda':
        name = f'cuda:{found.index or 0}'
    if name not in available:
        raise UserError(f'--device={device} is not available here; this machine has: '
                        f'{", ".join(available)}. Omit --device to use the best one')

    if found.type == 'cpu':
        keep_freed_memory()
        threads.share_cores()
    return found


def keep_freed_memory():
    """Speed up training on a CPU: keep large freed blocks of memory instead of returning them.

    Every training step frees and allocates the same large tensors. By default the C library (glibc)
    maps each of them anew, and the kernel zeroes its pages at first touch: that costs more than the
    arithmetic of an elementwise operation (measured in docs/LOG.md). With another C library nothing
    happens.

    Also lets oneDNN cache fewer kernels: with batches of many shapes, it would hold a gigabyte of
    them to no use.
    """
    os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '128')
    if sys.platform == 'linux':
        m_mmap_max = -4        # names and numbers from glibc's malloc.h
        m_trim_threshold = -1
        try:
            libc = ctypes.CDLL('libc.so.6')
            libc.mallopt(m_mmap_max, 0)         # no block gets a mapping of its own
            libc.mallopt(m_trim_threshold, -1)  # the top of the heap is never given back
        except (OSError, AttributeError):
            pass  # another C library: slower, but correct


def pick_dtype(device, dtype):
    """(torch.dtype for matrix products, the reason in words), from a name in DTYPES or 'auto'.

    'auto' is the fastest that is safe to train in. Raises UserError for float16 on a CPU.
    """
    if dtype != 'auto':
        if dtype == 'float16' and device.type == 'cpu':
            raise UserError('--dtype=float16 needs a GPU: '
                            'on a CPU use --dtype=bfloat16 or --dtype=float32')
        return DTYPES[dtype], 'as asked'

    if device.type == 'cuda':
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, 'the GPU computes in it'
        return torch.float16, 'the GPU is too old for bfloat16'  # which it would emulate, slowly
    if device.type == 'mps':
        return torch.float32, 'the safe choice on MPS'

    has_avx512_bf16 = getattr(torch.cpu, '_is_avx512_bf16_supported', bool)
    if has_avx512_bf16():  # processors with AMX have it too
        return torch.bfloat16, 'the processor has AVX512_BF16'
    return torch.float32, 'the processor has no bfloat16 instructions'


def autocast(device, dtype):
    """A context in which matrix products are computed in dtype. Does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_memory(device):
    """Bytes that this process held at its peak: on its GPU, or in all. None if unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    if device.type == 'mps':
        return torch.mps.driver_allocated_memory()
    if os.name == 'posix':
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == 'darwin' else peak * 1024  # macOS counts bytes, Linux KB
    return None
