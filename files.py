"""Files that are whole or not there, and the version of our formats."""
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
