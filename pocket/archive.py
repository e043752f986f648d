"""
Reading the file of a checkpoint, which may come from anybody, without believing it.

torch.save() writes a zip: its record data.pkl holds the names, numbers and texts, as a program for
pickle, and data/0, data/1, … hold what is in the tensors. Before torch.load() sees the file, we
check that

    every record has the checksum that the zip notes for it: a single flipped bit is found
    data.pkl asks for nothing but plain tensors, and shares few values: it can't grow in memory
    tensors lie within their records, and no number in a record stands for many
"""
import errno
import pickletools
import zipfile
import zlib

import torch

from pocket.errors import UserError

BYTES_PER_NUMBER = {
    'torch BFloat16Storage': 2,
    'torch BoolStorage': 1,
    'torch ByteStorage': 1,
    'torch CharStorage': 1,
    'torch DoubleStorage': 8,
    'torch FloatStorage': 4,
    'torch HalfStorage': 2,
    'torch IntStorage': 4,
    'torch LongStorage': 8,
    'torch ShortStorage': 2,
}
# What data.pkl may name: what dicts of plain tensors need. torch.load() would allow more, such as
# bytearray, of which a few bytes in the file make as many gigabytes as they like
ALLOWED_NAMES = {'collections OrderedDict', 'torch._utils _rebuild_tensor_v2', *BYTES_PER_NUMBER}

# A value can be used twice without being stored twice. Twice that, and so on: 30 such lists within
# each other have 2**30 entries. Ours share one tuple, the betas of AdamW's groups of parameters
MOST_SHARED = 10
LONGEST_SHARED = 1000  # characters of a text, such as a key, that may be used again without limit


class Damaged(ValueError):
    """A file that is not as it was written. Its text says in what."""


def read_archive(path, mapped=False):
    """What torch.save() wrote to a file: tensors on the CPU and plain types.

    mapped: the file is mapped into memory, so what nobody looks at, such as the optimizer's state,
    takes none; but it must stay as it is meanwhile.
    Raises UserError if it is anything else, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = check_records(archive, path.stat().st_size)
            [pickle_name] = [name for name in sizes if name.endswith('/data.pkl')]
            root = pickle_name.removesuffix('data.pkl')
            check_pickle(archive.read(pickle_name), sizes, root)
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
        check_tensors(state)
        return state
    except OSError as e:
        if e.errno == errno.EINVAL:  # the zip points to places that are not in the file
            raise UserError(f'{path} is damaged: bytes are missing, or there are more than were '
                            f'written; take another copy of it') from None
        raise UserError(f'cannot read {path}: {e.strerror or e}') from None
    except Damaged as e:
        raise UserError(f'{path} is damaged: {e}; take another copy of it') from None
    except Exception as e:  # from an untrusted file anything can come
        why = 'it is truncated or something else'
        if 'weights_only' in str(e):
            why = 'it contains code, which is never loaded'
        raise UserError(f'{path} is not a checkpoint of pocketGPT: {why}') from None


def check_records(archive, file_size):
    """{name: size} of the records of a zip. Raises an error if they are not as they were written.

    Reading all of them for their checksums takes 0.2 s for 500 MB.
    """
    members = archive.infolist()
    sizes = {member.filename: member.file_size for member in members}
    names = {name.lower() for name in sizes}  # torch finds records whatever their case
    compressed = any(member.compress_type for member in members)
    if compressed or sum(sizes.values()) > file_size or len(names) < len(members):
        raise ValueError('not as torch.save() writes it')

    try:
        wrong = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError):
        wrong = 'of unknown name'
    if wrong is not None:
        raise Damaged(f'its record {wrong} is not what was written (the checksum is wrong)')
    return sizes


def check_pickle(content, sizes, root):
    """Raise ValueError unless data.pkl makes plain tensors and types, of the size of the file.

    sizes: of all records; root: the folder in the zip, whose name each of them begins with.
    """
    memo = {}        # what data.pkl has numbered, to use it again: short texts, None for all else
    latest = None    # short text that the latest instruction made, None if it made something else
    values = []      # those since the latest mark
    num_shared = 0
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in ('BINPUT', 'LONG_BINPUT'):
            memo[argument] = latest
            continue
        if name == 'GLOBAL' and argument not in ALLOWED_NAMES:
            raise ValueError('weights_only: it names more than plain tensors need')
        if name == 'BINPERSID':
            check_storage(values, sizes, root)

        is_text = name in ('GLOBAL', 'BINUNICODE')
        latest = argument if is_text and len(argument) <= LONGEST_SHARED else None
        if name in ('BINGET', 'LONG_BINGET'):
            latest = memo[argument]
            argument = latest
            if latest is None:
                num_shared += 1
        if name == 'MARK':
            values = []
        elif name != 'TUPLE':
            values.append(argument)
    if num_shared > MOST_SHARED:
        raise ValueError('it shares more values than a checkpoint does')


def check_storage(values, sizes, root):
    """Raise ValueError unless a tensor's numbers are exactly those of its record.

    values: 'storage', a type in BYTES_PER_NUMBER, the record's name, a device, how many numbers.
    """
    _, kind, record, _, count = values
    if count * BYTES_PER_NUMBER[kind] != sizes[f'{root}data/{record}']:
        raise Damaged(f'its record data/{record} has another size than its tensor')


def check_tensors(state):
    """Raise Damaged if a tensor, at any depth, has more numbers than are stored for it.

    expand() makes such tensors: they take no memory, but whatever is computed from them does.
    """
    seen = set()
    waiting = [state]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        if isinstance(value, torch.Tensor):
            if value.nbytes > value.untyped_storage().nbytes():
                raise Damaged('it is smaller than its weights claim to be')
        elif isinstance(value, dict):
            seen.add(id(value))
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            seen.add(id(value))
            waiting += value
