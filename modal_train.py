"""
Train on a GPU of Modal, with the same train.py, and take home what comes out. Once: pip install modal; modal setup. Then

    modal run modal_train.py                                              the default config, on a modest GPU
    modal run --detach modal_train.py --config=config/office_encdec.py --gpu=A10 --overrides="--max_iters=5000 --dtype=bfloat16"
    modal run modal_train.py::ls                                          runs and datasets on the volume; hours and cost
    modal run modal_train.py::download --name=office_encdec               to out/office_encdec
    modal run modal_train.py::sample --name=office_encdec --args="--start=Hello."
    modal run -q modal_train.py::chat --name=office_encdec                (-q: without Modal's progress lines)
    modal run modal_train.py::prepare --dataset=tinystories --args="--vocab_size=8192"
"""
import argparse
import csv
import json
import os
import shlex
import shutil
import signal
import sys
import time
import zipfile
from itertools import count
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired, getoutput, run
from threading import Thread

import modal

GPUS = 'L4,A10,T4'                 # the first of these that is free; --gpu=H100 asks for another, --gpu=H100,A100 for either
PYTHON = '3.11'                    # of the image
VOLUME = Path('/vol')              # where containers see the volume: data/, out/, cache/
TIMEOUT = 24 * 3600                # seconds an attempt may take, Modal's limit; a longer run goes on in the next attempt
GRACE = 25                         # seconds to save in when a run is stopped: Modal kills after 30
PRICES = {'L4': None, 'A10G': None, 'T4': None, 'A100': None, 'H100': None}  # USD an hour, from modal.com/pricing: fill in yours

HERE = Path(__file__).resolve().parent if modal.is_local() else Path('/root/pocketgpt')
sys.path.append(str(HERE))
from configurator import UserError, find, show_user_errors
from files import write_whole

if modal.is_local():
    show_user_errors('modal_train.py')
# Modal wants the GPU where a function is defined, before main() gets its options; with_options() comes later, but takes no list
parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
parser.add_argument('--gpu', default=GPUS)
parser.add_argument('--gpus', default='1')
asked = parser.parse_known_args()[0]
gpu = [name.strip() + f':{asked.gpus}' * (asked.gpus != '1') for name in asked.gpu.split(',')]


def stays_here(path):
    """True for what containers don't get: all but our scripts, prepare/ and config/."""
    return path.suffix != '.py' or len(path.parts) > 1 and path.parts[0] not in ('prepare', 'config')


image = (modal.Image.debian_slim(python_version=PYTHON)
         .pip_install_from_requirements(str(HERE / 'requirements.txt'))  # on Linux, PyPI's torch is the one with CUDA
         .env({'PYTHONUNBUFFERED': '1', 'HF_HOME': f'{VOLUME}/cache/huggingface',
               'TIKTOKEN_CACHE_DIR': f'{VOLUME}/cache/tiktoken', 'TORCHINDUCTOR_CACHE_DIR': f'{VOLUME}/cache/inductor'})
         .add_local_dir(str(HERE), '/root/pocketgpt', ignore=stays_here))  # last: mounted, so that an edit rebuilds nothing
volume = modal.Volume.from_name('pocketgpt', create_if_missing=True)
on_cpu = {'image': image, 'volumes': {str(VOLUME): volume}, 'timeout': TIMEOUT}
on_gpu = {**on_cpu, 'gpu': gpu if len(gpu) > 1 else gpu[0]}
try_again = modal.Retries(max_retries=10, initial_delay=0.0, backoff_coefficient=1.0)
app = modal.App('pocketgpt')

# ----------------------------------------------------------------------------------------------------------------------
# what runs on Modal


def commit():
    """Make what is on the volume last. Where that fails training goes on: Modal commits, too, when a container ends."""
    try:
        volume.commit()
    except Exception as e:
        print(f'the volume is not committed: {e}')


def free_name(path):
    """The first of path.1, path.2, … that is not there: nobody's work is overwritten."""
    return next(p for n in count(1) if not (p := path.with_name(f'{path.name}.{n}')).exists())


@app.function(**on_gpu, retries=try_again, single_use_containers=True)
def train(args: list[str], name: str, gpus: int = 1, fresh: bool = False, when: str = '') -> tuple[int, str]:
    """train.py with args, to out/NAME on the volume; goes on where the same command was stopped. Returns (status, words).

    Preemption (SIGINT) stops train.py, which saves, and the same call comes again. A crash is raised and tried again; bad input
    (status 2) is returned: no attempt mends it. `when` is one for all attempts of a call: with --fresh, they alone go on.
    """
    out, forced, args = VOLUME / 'out' / name, '--resume' in args, [arg for arg in args if arg != '--resume']
    note, log, last, words = out / 'modal.json', out / 'train.log', out / 'last.pt', 'starts anew'
    saved = json.loads(note.read_text(encoding='utf-8')) if note.is_file() else {}
    ours = saved.get('when') == when != '' or not fresh and (forced or saved.get('args') == args)
    resume = ours and last.is_file()
    if resume and saved.get('finished') and not forced:
        return 0, f'out/{name} was finished before: --fresh trains anew and keeps this one, --name=… makes another'
    if resume:
        words = 'goes on from its last.pt'
    elif last.is_file():
        words += f'; the run that was there is now out/{out.rename(free_name(out)).name}'
    cards = getoutput('nvidia-smi --query-gpu=name --format=csv,noheader').splitlines() if shutil.which('nvidia-smi') else []
    print(f'out/{name} {words} ({", ".join(cards) or "no GPU"})', flush=True)
    out.mkdir(parents=True, exist_ok=True)

    def write_note(finished):
        content = json.dumps({'args': args, 'when': when, 'gpus': cards, 'finished': finished}).encode('utf-8')
        write_whole(note, lambda f: f.write(content))
        commit()
    write_note(False)
    start = ['torchrun', '--standalone', f'--nproc_per_node={gpus}'] if gpus > 1 else [sys.executable]
    start += ['train.py', *args, f'--data_dir={VOLUME}/data', f'--out_dir={out}', *['--resume'] * resume]
    before, seen, end = log.stat().st_size if log.exists() else 0, None, time.monotonic() + TIMEOUT - min(300, TIMEOUT / 10)
    child = Popen(start, cwd=HERE, stdout=PIPE, stderr=STDOUT, start_new_session=True)  # what is sent to our group is not for it
    tee = Popen(['tee', '-a', log], stdin=child.stdout, start_new_session=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while child.poll() is None:
            time.sleep(0.2)
            if last.is_file() and seen != (seen := last.stat().st_mtime_ns):  # it got its name when it was whole
                commit()
            if time.monotonic() > end:
                raise TimeoutError(f'{TIMEOUT / 3600:g} hours are nearly over: the next attempt goes on')
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(GRACE)
            except TimeoutExpired:
                child.kill()
                tee.kill()
        tee.wait()
        commit()
    lines = log.read_bytes()[before:].decode('utf-8', 'replace').splitlines()
    if child.returncode == 2 or any(line.split()[:3] == ['exitcode', ':', '2'] for line in lines):  # so torchrun says it
        return 2, [line for line in ['train.py: bad input', *lines] if line.startswith('train.py: ')][-1]
    if child.returncode:
        raise RuntimeError(f'train.py ended with status {child.returncode}')
    write_note(True)
    return 0, '\n'.join(line for line in lines if line.startswith('best val loss'))


def script(command: list[str], show: bool) -> tuple[int, str]:
    """Another of our scripts. Returns (status, what it wrote: errors only, where stdout is to show in the log)."""
    done = run([sys.executable, *command], cwd=HERE, stdout=None if show else PIPE, stderr=PIPE)
    commit()
    return done.returncode, ((done.stdout or b'') + done.stderr).decode('utf-8', 'replace')


def pass_on(read, write):
    """In the background: write(what read() returns), to the b'' at its end."""
    Thread(target=lambda: [write(text) for text in [*iter(read, b''), b'']], daemon=True).start()


def talk(command: list[str], typed: modal.Queue):
    """A script that talks: yields what it writes, as it comes. typed: what it reads."""
    child = Popen([sys.executable, *command], cwd=HERE, stdin=PIPE, stdout=PIPE, stderr=STDOUT, bufsize=0)
    pass_on(typed.get, lambda text: child.stdin.write(text) if text else child.stdin.close())
    yield from iter(lambda: child.stdout.read(2**12), b'')


# ----------------------------------------------------------------------------------------------------------------------
# what runs here


def plain(name):
    """The name of a run or dataset, if it can be one. Raises UserError."""
    if name in ('', '.', '..') or name != Path(name).name:
        raise UserError(f'runs and datasets are named by a plain word, got {name!r}: see modal run modal_train.py::ls')
    return name


def with_secret(function, name):
    """The function, with the variables of a secret (HF_TOKEN, …) that the user keeps at Modal, if one is named."""
    return function.with_options(secrets=[modal.Secret.from_name(name)]) if name else function


def end(status, words):
    """Show how it went; what failed ends us with its status."""
    print(words.rstrip(), file=sys.stderr if status else sys.stdout)
    if status:
        raise SystemExit(status)


@app.local_entrypoint()
def main(config: str = '', overrides: str = '', name: str = '', gpu: str = GPUS, gpus: int = 1, fresh: bool = False,
         secret: str = ''):
    """Train. To out/NAME, which is the config's name where none is given."""
    args, path = shlex.split(overrides), find(config).resolve()
    datasets = ['stdlib', *(arg.partition('=')[2] for arg in args if arg.startswith('--dataset='))]
    name = plain(name or (path.stem if config else datasets[-1]))
    if config:
        if not path.is_relative_to(HERE / 'config'):
            raise UserError(f'{config} is not in {HERE / "config"}, which is what containers get: copy it there')
        args.insert(0, path.relative_to(HERE).as_posix())
    call = with_secret(train, secret).spawn(args, name, gpus, fresh, time.strftime('%Y-%m-%d %H:%M:%S'))  # it may outlive us
    end(*call.get())
    print(f'the result lies in out/{name} of the volume pocketgpt: modal run modal_train.py::download --name={name}')


def command(*functions):
    """Decorates what `modal run modal_train.py::NAME` calls: an App of that name, with the functions it needs on Modal.

    Were they entrypoints of one App, Modal would not know that `modal run modal_train.py` means main().
    """
    def wrap(f):
        own = modal.App(f'pocketgpt-{f.__name__}')
        own.local_entrypoint()(f)
        for function, place in functions:
            own.function(**place)(function)
        return own
    return wrap


@command((script, on_cpu))
def prepare(dataset: str = 'stdlib', args: str = '', secret: str = ''):
    """data/NAME on the volume."""
    remote = with_secret(prepare.registered_functions['script'], secret).remote
    end(*remote([f'prepare/{plain(dataset)}.py', *shlex.split(args), f'--data_dir={VOLUME}/data'], True))


@command((script, on_gpu))
def sample(name: str, args: str = '', gpu: str = GPUS):
    """sample.py, with args."""
    remote = sample.registered_functions['script'].remote
    end(*remote(['sample.py', f'--out_dir={VOLUME}/out/{plain(name)}', *shlex.split(args)], False))


@command((talk, on_gpu))
def chat(name: str, args: str = '', gpu: str = GPUS):
    """sample.py --chat, with args: it runs there, and reads what is typed here."""
    with modal.Queue.ephemeral() as typed:
        pass_on(lambda: os.read(0, 2**12), typed.put)
        remote = chat.registered_functions['talk'].remote_gen
        for text in remote(['sample.py', '--chat', f'--out_dir={VOLUME}/out/{plain(name)}', *shlex.split(args)], typed):
            os.write(1, text)


@command()
def download(name: str, to: str = ''):
    """The folder of a run, whole or not at all; one of that name that is there is moved aside."""
    out = Path(to).expanduser() if to else HERE / 'out' / plain(name)
    part = out.with_name(f'{out.name}.part')  # it gets its name when all is there
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for entry in volume.listdir(f'out/{plain(name)}'):
            path = part / Path(entry.path).name
            if path.name != '.lock' and path.suffix != '.tmp':
                with open(path, 'wb') as f:
                    f.writelines(volume.read_file(entry.path))
                print(f'{path.name}: {path.stat().st_size:,} bytes', flush=True)
                if path.stat().st_size != entry.size or path.suffix == '.pt' and zipfile.ZipFile(path).testzip():
                    raise zipfile.BadZipFile
        if out.exists():
            print(f'{out} was there: it is now {out.rename(free_name(out))}')
        part.rename(out)
    except modal.exception.NotFoundError:
        raise UserError(f'there is no run {name} on the volume: modal run modal_train.py::ls shows those that are') from None
    except (zipfile.BadZipFile, FileNotFoundError):
        raise UserError(f'{path.name} was cut, or has changed while it came: try again') from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f'python sample.py --out_dir={shlex.quote(str(out))} --chat')


@command()
def ls():
    """Datasets; runs, with the hours that the whole run takes and, where PRICES knows it, the cost."""
    def names(folder):
        try:
            return sorted(Path(entry.path).name for entry in volume.listdir(folder))
        except modal.exception.NotFoundError:
            return []

    print('datasets:', ', '.join(names('data')) or 'none')
    print(f'{"run":24} {"step":>16} {"best val":>8} {"tokens/s":>9} {"hours":>7} {"USD":>7}  GPU')
    for name in names('out'):
        if 'log.csv' in names(f'out/{name}'):
            log, config, note = (b''.join(volume.read_file(f'out/{name}/{file}')).decode('utf-8')
                                 for file in ('log.csv', 'config.json', 'modal.json'))
            rows, steps, cards = list(csv.DictReader(log.splitlines())), json.loads(config)['max_iters'], json.loads(note)['gpus']
            hours = float(rows[-1]['seconds']) / int(rows[-1]['step']) * steps / 3600
            price = next((price for card, price in PRICES.items() if price and cards and card in cards[0]), None)
            print(f'{name:24} {rows[-1]["step"] + " of " + str(steps):>16} {min(float(row["val_loss"]) for row in rows):8.4f} '
                  f'{rows[-1]["tokens_per_s"]:>9} {hours:7.2f} {f"{hours * price * len(cards):7.2f}" if price else "?":>7}  '
                  + ', '.join(cards))
