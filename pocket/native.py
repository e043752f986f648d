"""
C functions for operations that PyTorch lacks or runs slowly, compiled at first use: native.c for
generation, native_training.c for training.

The machine's C compiler takes about two seconds for them, and the result is cached. Without a
compiler, load_library() returns None and callers fall back to PyTorch: slower, but with the same
results up to rounding. CC=none, or any name that is not a program,
turns C off.
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

SOURCES = {  # file name: its own flags
    'native.c': ['-ffinite-math-only'],  # no number is infinite, or NaN
    'native_training.c': [],  # where training diverges, NaN must stay NaN
}
FOLDER = Path(__file__).parent
FLAGS = (
    '-O3', '-march=native', '-fPIC',
    # Sums may be computed in any order, and nobody looks at errno: that allows vector instructions
    '-fno-math-errno', '-fno-trapping-math', '-fassociative-math', '-fno-signed-zeros',
)
POINTER = ctypes.c_void_p
INT = ctypes.c_int
INT64 = ctypes.c_int64
FLOAT = ctypes.c_float
# The longest array that a C function may put on a thread's stack: as float32 it takes 1 MB, and no
# function has more than two. Stacks have 8 MB on Linux. The limit is checked because an untrusted
# file decides how wide a model is
LARGEST_ARRAY = 2**18


class Bfloat16Weights(ctypes.Structure):
    """A linear layer in bfloat16. This and the classes below mirror structs in the C files."""
    _fields_ = [('inputs', INT), ('outputs', INT), ('weight', POINTER), ('bias', POINTER)]


class Int8Weights(ctypes.Structure):
    """A linear layer with 8-bit weights."""
    _fields_ = [('inputs', INT), ('outputs', INT), ('weight', POINTER), ('scale', POINTER),
                ('bias', POINTER)]


class StepContext(ctypes.Structure):
    """What all blocks share while one token is generated."""
    _fields_ = [('B', INT), ('is_bfloat16', INT), ('size', INT), ('length', INT),
                ('pad', POINTER), ('cos', POINTER), ('sin', POINTER)]


class Norm(ctypes.Structure):
    """A LayerNorm or RMSNorm."""
    _fields_ = [('width', INT), ('is_layer_norm', INT), ('eps', FLOAT), ('weight', POINTER),
                ('bias', POINTER)]


class Heads(ctypes.Structure):
    """H query heads and G key-value heads of D channels each, and the weights of their QK-norm."""
    _fields_ = [('H', INT), ('G', INT), ('D', INT), ('eps', FLOAT), ('q_norm', POINTER),
                ('k_norm', POINTER)]


class HeadShape(ctypes.Structure):
    """H query heads and G key-value heads of T tokens in each of B texts."""
    _fields_ = [('B', INT), ('T', INT), ('H', INT), ('G', INT), ('D', INT), ('is_normed', INT),
                ('is_bfloat16', INT), ('cos', POINTER), ('sin', POINTER)]


class ScoreShape(ctypes.Structure):
    """Attention scores (matrices, T, S)."""
    _fields_ = [('matrices', INT64), ('T', INT), ('S', INT), ('first', INT), ('is_bfloat16', INT),
                ('scale', FLOAT), ('mask', POINTER), ('H', INT)]


ACTIVATIONS = {'squared_relu': 0, 'gelu': 1}  # an enum in native_training.c

ARGUMENTS = {  # of the functions in C; structs are given as pointers, too
    'multiply_bfloat16': [POINTER] * 3 + [INT],
    'multiply_int8': [POINTER] * 3 + [INT],
    'add_and_norm': [POINTER] * 5,
    'swiglu': [POINTER] * 3 + [INT],
    'attend': [POINTER] * 6,
    'norm': [POINTER] * 3 + [INT64, INT],
    'norm_gradient': [POINTER] * 5 + [INT64, INT, INT],
    'split_heads': [POINTER] * 5,
    'split_heads_gradient': [POINTER] * 6,
    'softmax': [POINTER] * 2,
    'softmax_gradient': [POINTER] * 3,
    'activate': [INT] + [POINTER] * 2 + [INT64, INT],
    'activate_gradient': [INT] + [POINTER] * 3 + [INT64, INT],
    'drop': [POINTER] * 3 + [INT64, INT, FLOAT, INT],
    'shift_tokens': [POINTER] * 2 + [INT64] + [INT] * 4,
}


@lru_cache(maxsize=1)
def load_library():
    """The functions of both files as a ctypes library, or None if they can't be compiled here.

    Its attribute uses_all_cores tells whether it was built with OpenMP.
    """
    command = os.environ.get('CC', '').split() or ['cc']  # CC may have arguments: ccache gcc
    program = shutil.which(command[0])
    if program is None:
        return None
    compiler = (program, *command[1:])

    # With OpenMP all cores work. Some compilers lack it, and clang's needs another library than the
    # one in PyTorch's Linux packages: then C runs on one core
    for flags in (FLAGS + ('-fopenmp',), FLAGS):
        try:
            library = open_library(compiled(compiler, flags))
            library.uses_all_cores = '-fopenmp' in flags
            return library
        except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError):
            continue
    return None


def open_library(path):
    """Load what was compiled and declare its functions' types.

    Raises OSError or AttributeError.
    """
    library = ctypes.CDLL(str(path))
    for name, arguments in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = None
    return library


def compiled(compiler, flags):
    """The path of the compiled library, from the cache or new.

    compiler: a tuple of its path and its arguments. Raises OSError, SubprocessError, or
    RuntimeError if there is no home folder.
    """
    # What was compiled for one processor may not run on another that shares the home folder
    code = [(FOLDER / name).read_bytes() for name in ('native.h', *SOURCES)]
    key = repr((code, SOURCES, compiler, flags, describe_processor()))
    name = f'native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so'
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'pocketgpt').expanduser()
    path = cache / name
    if path.is_file():
        return path

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        objects = []
        for source, its_flags in SOURCES.items():
            objects.append(str(Path(folder, source + '.o')))
            run(*compiler, *flags, *its_flags, '-c', str(FOLDER / source), '-o', objects[-1])
        built = Path(folder, name)
        # Linked without -fopenmp, which would bring a second OpenMP: PyTorch's is already loaded,
        # with its threads
        run(*compiler, '-shared', *objects, '-o', str(built), '-lm')
        os.replace(built, path)  # atomically: others may be doing the same
    return path


def run(*command):
    """Run a command without input or output. Raises OSError or SubprocessError."""
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def describe_processor():
    """A string that differs between processors with different instructions."""
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
