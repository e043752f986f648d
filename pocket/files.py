"""Files that are whole or not there, downloads, folders that one process writes to, and the version of our formats."""
import hashlib
import os
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from pocket.errors import UserError

ROOT = Path(__file__).resolve().parent.parent  # the folder of the scripts
FORMAT = 1  # of meta.json and of checkpoints: an older one is read, a newer one refused


def check_path(path):
    """A Path, ~ expanded. Raises UserError where nothing can have such a name, whether it is there or not."""
    try:
        path = Path(path).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, RuntimeError, ValueError) as e:
        if getattr(e, 'winerror', None) == 123:  # Windows, of a * or ?: no file has that name, but it may be a glob
            return path
        raise UserError(f'{str(path)!r} can\'t be a path: {getattr(e, "strerror", None) or e}') from None
    return path


def find_path(path):
    """A path as typed from the working directory or, where that does not exist, from the folder that holds the scripts."""
    path = check_path(path)
    return path if path.exists() or path.is_absolute() or not (ROOT / path).exists() else ROOT / path


def short_path(path):
    """The same path, relative to the working directory where it lies inside: shorter to read and to type."""
    path = check_path(path).resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def atomic_write(path, write):
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
        for _ in range(20):
            with suppress(PermissionError):  # Windows, while another process reads the old file: that is soon over
                return os.replace(temporary, path)
            time.sleep(0.1)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        why = getattr(e, 'strerror', None) or e
        raise UserError(f'cannot write {path}: {why}; free some space or choose another folder') from None


def make_folder(folder, knob='--data_dir=…'):
    """Make a folder where it is missing. Raises UserError where that can't be: knob is how another place is chosen."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'cannot make {folder}: {e.strerror}; choose another place with {knob}') from None


def next_free_name(path):
    """The first of path.1, path.2, … that is not there: nobody's work is overwritten."""
    return next(p for n in count(1) if not (p := path.with_name(f'{path.name}.{n}')).exists())


def back_up(folder):
    """Give a folder the first free name, which is returned. Raises UserError where another process is writing to it."""
    claim = lock(folder)
    if os.name == 'nt':  # there a folder with an open file in it keeps its name
        claim.close()
    aside = Path(folder).rename(next_free_name(Path(folder).resolve()))
    claim.close()
    return aside


def lock(folder, who='another run is writing to', knob='--out_dir=…', name='.lock'):
    """Claim a folder, or with a name a file in it, for this process: an open file to hold on to.

    Raises UserError where another process has it, or where nothing can be written.
    """
    try:
        f = open(Path(folder) / name, 'a+', encoding='utf-8')
    except OSError as e:
        raise UserError(f'cannot write to {folder}: {e.strerror}; choose another place with {knob}') from None
    f.seek(0)
    try:
        if os.name == 'nt':
            import msvcrt
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel gives it back whatever happens to us
            if not os.path.samestat(os.fstat(f.fileno()), os.stat(f.name)):
                raise OSError('moved aside while we came')
    except OSError:
        f.close()
        raise UserError(f'{who} {folder}: wait for it, or choose another place with {knob}') from None
    return f


def sha256_of(path):
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def download(urls, path, sha256, advice):
    """Fetch the first of urls that gives a file with that sha256, to path; a file that is already there and right is kept.

    sha256 None: none is known, a file is right when it is as long as the server says.
    A cut download goes on where it stopped (HTTP Range): checked in the end by its sha256 or, where none is known, only while
    the server says that it still has the same file (If-Range). Raises UserError, ending in `advice`, where no url works.
    """
    path = Path(path)
    part = path.with_name(path.name + '.part')
    if path.is_file():
        if sha256 is None or sha256_of(path) == sha256:  # only what was whole has got this name
            for left in (part, part.with_name(part.name + '.tag')):  # of a download of something else, which was killed
                left.unlink(missing_ok=True)
            return path
        print(f'{path} is not the file it should be (its sha256 differs): downloading it again')
    import requests
    from tqdm import tqdm
    failures = []
    make_folder(path.parent)
    tag = lock(path.parent, f'another process is downloading {path.name} to', '--data_dir=…', part.name + '.tag')
    try:
        for url in [u for u in urls for _ in range(2)]:  # a second try goes on from a cut
            try:
                tag.seek(0)
                same = None if sha256 else tag.read()
                have = part.stat().st_size if part.is_file() and same != '' else 0
                headers = {'Accept-Encoding': 'identity',  # bytes as they are on disk
                           'Range': f'bytes={have}-' if have else None, 'If-Range': same if have else None}
                with requests.get(url, stream=True, timeout=30, headers=headers) as r:
                    if r.status_code == 416:  # what we have is longer than the file: start anew
                        part.unlink()
                    r.raise_for_status()
                    have = have if r.status_code == 206 else 0
                    total = int(r.headers['Content-Length']) + have if 'Content-Length' in r.headers else None
                    bar = tqdm(total=total, initial=have, unit='B', unit_scale=True, desc=path.name, disable=None)
                    with open(part, 'ab' if have else 'wb') as f, bar:
                        if not have:  # first the part is empty, then we note which file on the server it is of
                            strong = [r.headers[h] for h in ('ETag', 'Last-Modified') if r.headers.get(h, 'W/')[:2] != 'W/']
                            tag.truncate(0)
                            tag.write(''.join(strong[:1]))
                            tag.flush()
                        for block in r.iter_content(2**16):
                            f.write(block)
                            bar.update(len(block))
                        f.flush()
                        os.fsync(f.fileno())
                if sha256 is None:  # a cut shows in the length or, where the server sends chunks, has raised an error
                    whole = part.stat().st_size == total or total is None and r.headers.get('Transfer-Encoding') == 'chunked'
                else:
                    whole = sha256_of(part) == sha256
                if whole:
                    part.replace(path)
                    return path
                failures.append(f'{url}: ' + ('wrong sha256' if sha256 else 'the server does not say how long it is'))
                part.unlink()
            except requests.RequestException as e:
                code = getattr(e.response, 'status_code', None)
                failures.append(f'{url}: ' + (f'status {code}' if code else type(e).__name__))
            except OSError as e:
                raise UserError(f'cannot write {part}: {e.strerror}') from None
    finally:
        tag.close()
        if not part.is_file():
            Path(tag.name).unlink(missing_ok=True)
    raise UserError(f'could not download {path.name} ({"; ".join(dict.fromkeys(failures))}). {advice}')
