"""Files that are whole or not there, folders that one process writes to, and the version of our formats."""
import os
from pathlib import Path

from configurator import UserError

FORMAT = 1  # of meta.json and of checkpoints: an older one is read, a newer one refused


def write_whole(path, write):
    """Call write(file) on a temporary name beside path, flush it to disk, then give it its name: whole or not at all.

    Raises UserError where that fails; a file that was there before is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        why = getattr(e, 'strerror', None) or e
        raise UserError(f'cannot write {path}: {why}; free some space or choose another folder') from None


def lock(folder):
    """Claim a folder for this process: an open file to hold on to. Raises UserError where another process has it."""
    f = open(Path(folder) / '.lock', 'w')
    try:
        if os.name == 'nt':
            import msvcrt
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel gives it back whatever happens to us
    except OSError:
        raise UserError(f'another run is writing to {folder}: wait for it, or choose another place with --out_dir=…') from None
    return f
