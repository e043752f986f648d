"""
C functions for what PyTorch has no quick operation for: pocket/native.c, compiled at first use.

The C compiler of the machine compiles it when it is first needed, which takes a second, and the
result is cached. Without a compiler, load_library() returns None, and whoever would call C does
without: more slowly, and with the same results but for rounding. CC=none switches it off.
"""
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch  # noqa: F401 - it brings OpenMP, whose threads native.c shares

SOURCE = Path(__file__).with_name('native.c')
FLAGS = (
    '-O3', '-march=native', '-fPIC',
    # Sums may be computed in any order, nobody looks at errno, and no number is infinite: that
    # allows vector instructions
    '-fno-math-errno', '-fno-trapping-math', '-fassociative-math', '-fno-signed-zeros',
    '-ffinite-math-only',
)
POINTER = ctypes.c_void_p
INT = ctypes.c_int
FLOAT = ctypes.c_float
# How many numbers may be in an array of native.c. They lie on the thread's stack, whose size is
# 8 MB on Linux, and an untrusted file decides how wide a model is
LARGEST_ARRAY = 2**18


class Int8Weights(ctypes.Structure):
    """An 8-bit linear layer: the struct of native.c, as are those below."""
    _fields_ = [('inputs', INT), ('outputs', INT), ('weight', POINTER), ('scale', POINTER),
                ('bias', POINTER)]


class Step(ctypes.Structure):
    """What all blocks share in a step of generation."""
    _fields_ = [('B', INT), ('is_bfloat16', INT), ('size', INT), ('position', INT),
                ('pad', POINTER), ('cos', POINTER), ('sin', POINTER)]


class Norm(ctypes.Structure):
    """A LayerNorm or RMSNorm."""
    _fields_ = [('width', INT), ('is_layer_norm', INT), ('eps', FLOAT), ('weight', POINTER),
                ('bias', POINTER)]


class Heads(ctypes.Structure):
    """The heads of an attention, and its QK-norm."""
    _fields_ = [('H', INT), ('G', INT), ('D', INT), ('eps', FLOAT), ('q_norm', POINTER),
                ('k_norm', POINTER)]


ARGUMENTS = {  # of the functions in native.c; structs are given as pointers, too
    'multiply_int8': [POINTER] * 3 + [INT],
    'add_and_norm': [POINTER] * 5,
    'swiglu': [POINTER] * 3 + [INT],
    'attend': [POINTER] * 6,
}


@lru_cache(maxsize=1)
def load_library():
    """The functions of native.c as a ctypes library, or None if they can't be compiled here."""
    compiler = shutil.which(os.environ.get('CC') or 'cc')
    if compiler is None:
        return None
    # OpenMP puts all cores to work. But some compilers lack it, and some want another OpenMP than
    # the one that PyTorch brings
    for flags in (FLAGS + ('-fopenmp',), FLAGS):
        try:
            return open_library(compiled(compiler, flags))
        except (OSError, AttributeError, subprocess.SubprocessError):
            continue
    return None


def open_library(path):
    """A compiled native.c with its functions' types. Raises OSError or AttributeError."""
    library = ctypes.CDLL(str(path))
    for name, arguments in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = None
    return library


def compiled(compiler, flags):
    """The path of the compiled native.c, from the cache or new. Raises OSError or
    SubprocessError."""
    # What was compiled for one processor need not run on another that shares the home folder
    key = repr((SOURCE.read_bytes(), compiler, flags, describe_processor()))
    name = f'native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so'
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'pocketgpt').expanduser()
    path = cache / name
    if path.is_file():
        return path

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        objects = str(Path(folder, 'native.o'))
        made = Path(folder, name)
        run(compiler, *flags, '-c', str(SOURCE), '-o', objects)
        # Linked without -fopenmp, which would bring a second OpenMP: PyTorch's has its threads
        run(compiler, '-shared', objects, '-o', str(made), '-lm')
        os.replace(made, path)  # atomically: others may be doing the same
    return path


def run(*command):
    """Run a command without input or output. Raises OSError or SubprocessError."""
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def describe_processor():
    """A text that differs between processors with different instructions."""
    text = platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():  # Linux
        for line in info.read_text(encoding='utf-8', errors='replace').splitlines():
            if line.startswith(('flags', 'Features', 'isa')):
                return text + line
    return text + platform.processor()


def pointer(tensor):
    """The address of a tensor's numbers; None, a null pointer, for None."""
    return None if tensor is None else tensor.data_ptr()
