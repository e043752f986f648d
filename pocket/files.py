"""Paths as the user types them, atomic writes, locks, and downloads that resume."""
import hashlib
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from pocket.errors import UserError

ROOT = Path(__file__).resolve().parent.parent  # the folder of train.py and the other scripts
FORMAT = 1  # version of meta.json and of checkpoints: older ones are read, newer ones refused

# --------------------------------------------------------------------------------------------------
# Paths


def check_path(path):
    """A Path with ~ expanded, existing or not. Raises UserError if no file can have this name."""
    try:
        path = Path(path).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # nothing there, or nothing that we may see: still a path
    except (OSError, RuntimeError, ValueError) as e:
        if getattr(e, 'winerror', None) == 123:  # Windows, for * and ?: no file, but maybe a glob
            return path
        reason = getattr(e, 'strerror', None) or e
        raise UserError(f"{str(path)!r} can't be a path: {reason}") from None
    return path


def find_path(path):
    """A path relative to the working directory or, if nothing is there, to ROOT.

    So config/shakespeare_char.py and out/stdlib are found from any working directory.
    """
    path = check_path(path)
    if path.exists() or path.is_absolute():
        return path
    if (ROOT / path).exists():
        return ROOT / path
    return path


def short_path(path):
    """The same path, relative if it lies inside the working directory: shorter to read and type."""
    path = check_path(path).resolve()
    if path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd())
    return path


def next_free_name(path):
    """The first of path.1, path.2, … that does not exist, so that nothing is overwritten."""
    number = 1
    while path.with_name(f'{path.name}.{number}').exists():
        number += 1
    return path.with_name(f'{path.name}.{number}')


# --------------------------------------------------------------------------------------------------
# Writing and locking


def atomic_write(path, write):
    """Write a file atomically: even after a crash, path is either the old file or all of the new.

    Calls write(file) on a temporary file beside path, flushes it to disk, then renames it to path.
    If path is a symbolic link, all this happens where it points to. Raises UserError if any of it
    fails, or if path is a device or a pipe; a file that existed before is then unchanged.
    """
    path = Path(path)
    real_path = follow_links(path)
    temporary = real_path.with_name(real_path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        replace_patiently(temporary, real_path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(e, 'strerror', None) or e
        advice = 'free some space or choose another folder'
        raise UserError(f'cannot write {path}: {reason}; {advice}') from None


def follow_links(path):
    """The path of the file, existing or not, that a path leads to.

    Raises UserError if that is a device or a pipe: a file must not take its place.
    """
    try:
        path = Path(os.path.realpath(path))
        mode = path.lstat().st_mode
        is_special = not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    except FileNotFoundError:
        is_special = False
    except OSError as e:
        raise UserError(f'cannot write {path}: {e.strerror}; choose another name') from None
    if is_special or not path.name:  # the latter is /
        raise UserError(f'cannot write {path}: it is not a file; choose another name')
    return path


def replace_patiently(source, target):
    """os.replace(), tried for two seconds: Windows refuses while another process reads target."""
    for _ in range(20):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(0.1)
    os.replace(source, target)


def make_folder(folder, option='--data_dir=…'):
    """Create a folder, and its parents, if missing.

    Raises UserError if that fails. option: how the user chooses another place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        advice = f'choose another place with {option}'
        raise UserError(f'cannot make {folder}: {e.strerror}; {advice}') from None


def lock(folder, message='another run is writing to', option='--out_dir=…', name='.lock'):
    """Lock a folder for this process. Returns an open file: closing it, or our end, unlocks.

    name: the file in the folder that carries the lock. Raises UserError if another process holds
    the lock (the sentence begins with message), or if the folder is not writable.
    option: how the user chooses another place.
    """
    advice = f'choose another place with {option}'
    try:
        file = open(Path(folder) / name, 'a+', encoding='utf-8')
    except OSError as e:
        raise UserError(f'cannot write to {folder}: {e.strerror}; {advice}') from None
    file.seek(0)

    try:
        if os.name == 'nt':
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel unlocks when we end
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                raise OSError('the folder was renamed after we had opened the file')
    except OSError:
        file.close()
        raise UserError(f'{message} {folder}: wait for it, or {advice}') from None
    return file


def back_up(folder):
    """Rename a folder to its next_free_name(), which is returned.

    Raises UserError if another process is writing to it, or if there is more in it than one run:
    other runs, whose processes would lose their folders, or the folder that we are in.
    """
    others = runs_inside(folder)
    if others:
        raise UserError(f'{folder} holds a run, and {short_list(others)} as well, which would be '
                        f'moved with it: choose another place, such as '
                        f'--out_dir={Path(folder) / "new"}')
    real_folder = Path(folder).resolve()
    if real_folder in (ROOT, *ROOT.parents, Path.cwd(), *Path.cwd().parents):
        raise UserError(f'{folder} holds a run, but also the folder that we are in, and so is not '
                        f'moved: choose another place with --out_dir=…')
    lock_file = lock(folder)
    if os.name == 'nt':  # Windows does not rename a folder that has an open file in it
        lock_file.close()
    backup = Path(folder).rename(next_free_name(Path(folder).resolve()))
    lock_file.close()
    return backup


def runs_inside(folder):
    """Names of the runs and datasets below a folder, in itself not counted. A lock tells."""
    found = set()
    for name in ('best.pt', 'last.pt', 'meta.json', '.lock'):
        found.update(path.parent for path in Path(folder).glob(f'*/**/{name}'))
    return sorted(str(path.relative_to(folder)) for path in found)


def short_list(names):
    """The first three of some names.

    >>> short_list(['a', 'b', 'c', 'd', 'e'])
    'a, b, c and 2 more'
    """
    text = ', '.join(names[:3])
    if len(names) > 3:
        text += f' and {len(names) - 3} more'
    return text


# --------------------------------------------------------------------------------------------------
# Downloads. While one is in progress, there are two files beside its path:
#
#     NAME.part      what has arrived so far; renamed to NAME once it is complete and verified
#     NAME.part.tag  locked by the process that downloads. Its content is the server's name for the
#                    version of the file (the ETag or Last-Modified header), empty if it has none


def download(urls, path, sha256, advice):
    """Download a file from the first of urls that works. Returns path; an intact file is kept.

    A download that was cut off resumes (HTTP Range), even in a later process. The complete file is
    verified by its sha256. If that is unknown (None), its length must be what the server says, and
    it resumes only if the server still has the same version (HTTP If-Range).
    Raises UserError, ending with advice, if no URL works.
    """
    path = Path(path)
    part = path.with_name(path.name + '.part')
    tag_path = part.with_name(part.name + '.tag')
    if path.is_file():
        if sha256 is None or sha256_of(path) == sha256:  # only a complete file gets this name
            part.unlink(missing_ok=True)  # left by a killed download of another version
            tag_path.unlink(missing_ok=True)
            return path
        print(f'{path} is not the file it should be (its sha256 differs): downloading it again')

    make_folder(path.parent)
    message = f'another process is downloading {path.name} to'
    tag = lock(path.parent, message, '--data_dir=…', tag_path.name)
    failures = []
    try:
        for url in urls:
            for _ in range(2):  # the second attempt resumes where the first was cut off
                failure = try_mirror(url, part, tag, sha256)
                if failure is None:
                    part.replace(path)
                    return path
                failures.append(f'{url}: {failure}')
    except OSError as e:
        raise UserError(f'cannot write {part}: {e.strerror}') from None
    finally:
        tag.close()
        if not part.is_file():
            tag_path.unlink(missing_ok=True)
    reasons = '; '.join(dict.fromkeys(failures))  # each once
    raise UserError(f'could not download {path.name} ({reasons}). {advice}')


def try_mirror(url, part, tag, sha256):
    """Complete part from one URL and verify it. Returns None, or in a few words what went wrong.

    If the connection is cut, part is kept for another attempt; if its content is wrong, deleted.
    Raises OSError if part can't be written.
    """
    import requests
    try:
        length_is_right = resume_part(url, part, tag, has_checksum=sha256 is not None)
    except requests.RequestException as e:
        if e.response is not None:
            return f'status {e.response.status_code}'
        return type(e).__name__

    if sha256 is not None and sha256_of(part) != sha256:
        part.unlink()
        return 'wrong sha256'
    if sha256 is None and not length_is_right:
        part.unlink()
        return 'the server does not say how long it is'
    return None


def resume_part(url, part, tag, has_checksum):
    """Fetch from a URL what part lacks. Returns whether its length is what the server announced.

    has_checksum: a mix of two versions would be noticed, so we resume whatever we have. Otherwise
    we resume only if tag says which version it is of, and the server still has that one.
    """
    import requests
    from tqdm import tqdm

    # Ask for the whole file, or for what is missing
    headers = {'Accept-Encoding': 'identity'}  # the bytes of the file itself, not compressed
    tag.seek(0)
    version = tag.read()
    have = 0
    if part.is_file() and (has_checksum or version):
        have = part.stat().st_size
    if have > 0:
        headers['Range'] = f'bytes={have}-'
        if not has_checksum:
            headers['If-Range'] = version

    with requests.get(url, stream=True, timeout=30, headers=headers) as response:
        if response.status_code == 416:  # we have more than the whole file: start over
            part.unlink(missing_ok=True)
        response.raise_for_status()
        if response.status_code != 206:  # the server does not resume, but sends the whole file
            have = 0
        length = None
        if 'Content-Length' in response.headers:
            length = have + int(response.headers['Content-Length'])

        # Open the part before the tag is written, so that the tag never describes older bytes
        bar = tqdm(total=length, initial=have, unit='B', unit_scale=True,
                   desc=part.stem, disable=None)
        with open(part, 'ab' if have else 'wb') as file, bar:
            if have == 0:
                tag.truncate(0)
                tag.write(version_of(response.headers))
                tag.flush()
            for block in response.iter_content(2**16):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())

    if length is None:  # a chunked response has an end mark: a cut would have raised an error
        return response.headers.get('Transfer-Encoding') == 'chunked'
    return part.stat().st_size == length


def version_of(headers):
    """What identifies a server's file byte for byte: its ETag or its date, '' if there is neither.

    >>> version_of({'ETag': 'W/"1a"', 'Last-Modified': 'Mon, 01 Jan 2024 00:00:00 GMT'})
    'Mon, 01 Jan 2024 00:00:00 GMT'
    """
    for name in ('ETag', 'Last-Modified'):
        value = headers.get(name, '')
        if value and not value.startswith('W/'):  # W/: "weak", the bytes may differ
            return value
    return ''


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
