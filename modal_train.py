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
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired, getoutput, run
from threading import Thread

import modal

GPUS = 'L4,A10,T4'                 # the first of these that is free; --gpu=H100 asks for another, --gpu=H100,A100 for either
VOLUME = '/vol'                    # where containers see the volume: data/, out/, cache/
TIMEOUT = 24 * 3600                # seconds an attempt may take, Modal's limit; a longer run goes on in the next attempt
GRACE = 25                         # seconds to save in when a run is stopped: Modal kills after 30
PRICES = {'L4': None, 'A10': None, 'T4': None, 'A100': None, 'H100': None}  # USD an hour, from modal.com/pricing: fill in

HERE = Path(__file__).resolve().parent if modal.is_local() else Path('/root/pocketgpt')
sys.path.append(str(HERE))
from pocket.errors import UserError, show_user_errors
from pocket.files import atomic_write, back_up, find_path

show_user_errors('modal_train.py')
# Modal wants the GPU where a function is defined, before main() gets its options; with_options() comes later, but takes no list
parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
parser.add_argument('--gpu', default=GPUS)
parser.add_argument('--gpus', default='1')
asked = parser.parse_known_args()[0]
gpu = [name.strip() + f':{asked.gpus}' * (asked.gpus != '1') for name in asked.gpu.split(',')]
ours = ('.', 'prepare', 'config', 'pocket')  # of whose folders' scripts containers get a copy: no data, no out, no .git
image = (modal.Image.debian_slim(python_version='3.11')
         .pip_install_from_requirements(str(HERE / 'requirements.txt'))  # on Linux, PyPI's torch is the one with CUDA
         .env({'PYTHONUNBUFFERED': '1', 'HF_HOME': f'{VOLUME}/cache/huggingface',
               'TIKTOKEN_CACHE_DIR': f'{VOLUME}/cache/tiktoken', 'TORCHINDUCTOR_CACHE_DIR': f'{VOLUME}/cache/inductor'})
         .add_local_dir(str(HERE), '/root/pocketgpt',  # last: it is mounted, so that an edit rebuilds nothing
                        ignore=lambda path: path.suffix != '.py' or str(path.parent) not in ours))
volume = modal.Volume.from_name('pocketgpt', create_if_missing=True)
on_cpu = {'image': image, 'volumes': {VOLUME: volume}, 'timeout': TIMEOUT}
on_gpu = {**on_cpu, 'gpu': gpu if len(gpu) > 1 else gpu[0]}
try_again = modal.Retries(max_retries=10, initial_delay=0.0, backoff_coefficient=1.0)
app = modal.App('pocketgpt')


def commit():
    """Make what is on the volume last. Where that fails training goes on: Modal commits, too, when a container ends."""
    try:
        volume.commit()
    except Exception as e:
        print(f'the volume is not committed: {e}')


@app.function(**on_gpu, retries=try_again, single_use_containers=True)
def train(args: str = '', name: str = 'stdlib', gpus: int = 1, fresh: bool = False, when: str = '') -> tuple[int, str]:
    """train.py with args, to out/NAME on the volume; goes on where the same command was stopped. Returns (status, words).

    Preemption (SIGINT) stops train.py, which saves, and the same call comes again. A crash is raised and tried again; bad input
    (status 2) is returned: no attempt mends it. `when` is one for all attempts of a call: with --fresh, they alone go on.
    """
    out, aside, words = Path(VOLUME, 'out', name), None, 'starts anew'
    last, note, log, done = (out / file for file in ('last.pt', 'modal.json', 'train.log', 'finished'))
    saved = json.loads(note.read_text(encoding='utf-8')) if note.is_file() else {}
    resume = '--resume' in shlex.split(args)
    same = saved.get('when') == when != '' or not fresh and saved.get('args') == args
    there = last.is_file() or (out / 'best.pt').is_file()  # best.pt is written first
    if there and (resume or same):
        words = 'goes on where it stopped'
        if done.exists() and not resume:
            return 0, f'out/{name} was finished before: --fresh trains anew and keeps this one, --name=… makes another'
        resume = True
    elif there:
        aside = back_up(out)
        words += f'; the run that was there is now out/{aside.name}'
    cards = getoutput('nvidia-smi --query-gpu=name --format=csv,noheader').splitlines() if shutil.which('nvidia-smi') else []
    print(f'out/{name} {words} ({", ".join(cards) or "no GPU"})', flush=True)
    out.mkdir(parents=True, exist_ok=True)
    content = json.dumps({'args': args, 'when': when, 'gpus': cards}).encode('utf-8')
    atomic_write(note, lambda f: f.write(content))
    done.unlink(missing_ok=True)
    start = ['torchrun', '--standalone', f'--nproc_per_node={gpus}'] if gpus > 1 else [sys.executable]
    start += ['train.py', *shlex.split(args), f'--data_dir={VOLUME}/data', f'--out_dir={out}', *['--resume'] * resume]
    before, seen, end = log.stat().st_size if log.exists() else 0, None, time.monotonic() + TIMEOUT - min(300, TIMEOUT / 10)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    prctl = ctypes.CDLL(None).prctl
    child = Popen(start, cwd=HERE, stdout=PIPE, stderr=STDOUT, start_new_session=True,  # what our group is sent is not for it …
                  preexec_fn=lambda: prctl(1, signal.SIGTERM))  # … but it stops where we are killed outright
    tee = Popen(['tee', '-a', log], stdin=child.stdout, start_new_session=True)
    try:
        while child.poll() is None:
            time.sleep(0.2)
            if last.is_file() and seen != (seen := last.stat().st_mtime_ns):  # a checkpoint: it gets its name when it is whole
                commit()
            if time.monotonic() > end:
                raise TimeoutError(f'{TIMEOUT / 3600:g} hours are nearly over: the next attempt goes on')
    finally:
        child.terminate()  # nothing happens where it has ended
        try:
            child.wait(GRACE)
            tee.wait(5)  # it ends where train.py has left no child behind
        except TimeoutExpired:
            child.kill()
            tee.kill()
        commit()
    lines = log.read_bytes()[before:].decode('utf-8', 'replace').splitlines()
    if child.returncode == 2 or any(line.split()[:3] == ['exitcode', ':', '2'] for line in lines):  # so torchrun says it
        if aside and not last.exists():  # it did not even start, so that one stays where it was
            shutil.rmtree(out)
            aside.rename(out)
        elif saved and not aside:
            atomic_write(note, lambda f: f.write(json.dumps(saved).encode('utf-8')))
        return 2, [line for line in ['train.py: bad input', *lines] if line.startswith('train.py: ')][-1]
    if child.returncode:
        raise RuntimeError(f'train.py ended with status {child.returncode}')
    done.touch()
    commit()
    return 0, f'the result lies in out/{name} of the volume pocketgpt: modal run modal_train.py::download --name={name}'


def script(command: list[str], show: bool) -> tuple[int, str]:
    """Another of our scripts. Returns (status, what it wrote: errors only, where stdout is to show in the log)."""
    done = run([sys.executable, *command], cwd=HERE, stdout=None if show else PIPE, stderr=PIPE)
    commit()
    return done.returncode, ((done.stdout or b'') + done.stderr).decode('utf-8', 'replace')


def talk(command: list[str], typed: modal.Queue):
    """A script that talks: yields what it writes, as it comes. typed: what it reads."""
    child = Popen([sys.executable, *command], cwd=HERE, stdin=PIPE, stdout=PIPE, stderr=STDOUT, bufsize=0)
    pass_on(typed.get, lambda text: child.stdin.write(text) if text else child.stdin.close())
    yield from iter(lambda: child.stdout.read(2**12), b'')


def pass_on(read, write):
    """In the background: write(what read() returns), up to the b'' at its end."""
    def loop():
        while text := read():
            write(text)
        write(b'')
    Thread(target=loop, daemon=True).start()


# What follows runs here, all above it on Modal


def plain(name):
    """The name of a run or dataset, if it can be one. Raises UserError."""
    if name in ('', '.', '..') or name != Path(name).name:
        raise UserError(f'runs and datasets are named by a plain word, got {name!r}: see modal run modal_train.py::ls')
    return name


def end(status, words):
    """Show how it went; what failed ends us with its status."""
    print(words.rstrip(), file=sys.stderr if status else sys.stdout)
    if status:
        raise SystemExit(status)


@app.local_entrypoint()
def main(config: str = '', overrides: str = '', name: str = '', gpu: str = GPUS, gpus: int = 1, fresh: bool = False,
         secret: str = ''):
    """Trains to out/NAME; without a name, to that of the config file or dataset."""
    args, path = shlex.split(overrides), find_path(config).resolve()
    datasets = ['stdlib', *(arg.partition('=')[2] for arg in args if arg.startswith('--dataset='))]
    name = plain(name or (path.stem if config else datasets[-1]))
    if config:
        args.insert(0, f'config/{path.name}')
        if path.parent != HERE / 'config':
            raise UserError(f'{config} is not in {HERE / "config"}, which is what containers get: copy it there')
    function = train.with_options(secrets=[modal.Secret.from_name(secret)]) if secret else train  # HF_TOKEN, WANDB_API_KEY, …
    call = function.spawn(shlex.join(args), name, gpus, fresh, time.strftime('%Y-%m-%d %H:%M:%S'))  # with --detach it outlives us
    end(*call.get())


on_modal = {}


def command(function=None, **place):
    """Decorates what `modal run modal_train.py::NAME` calls: an App of that name, with the function that it needs on Modal.

    Were they entrypoints of one App, Modal would not know that `modal run modal_train.py` means main().
    """
    def wrap(f):
        own = modal.App(f'pocketgpt-{f.__name__}')
        own.local_entrypoint()(f)
        if function:
            on_modal[f.__name__] = own.function(**place)(function)
        return own
    return wrap


@command(script, **on_cpu)
def prepare(dataset: str = 'stdlib', args: str = ''):
    """A dataset, to data/ on the volume."""
    script = [f'prepare/{plain(dataset)}.py', *shlex.split(args), f'--data_dir={VOLUME}/data']
    end(*on_modal['prepare'].remote(script, True))


@command(script, **on_gpu)
def sample(name: str, args: str = '', gpu: str = GPUS):
    """sample.py, with args."""
    end(*on_modal['sample'].remote(['sample.py', f'--out_dir={VOLUME}/out/{plain(name)}', *shlex.split(args)], False))


@command(talk, **on_gpu)
def chat(name: str, args: str = '', gpu: str = GPUS):
    """sample.py --chat, with args: it runs there, and reads what is typed here."""
    with modal.Queue.ephemeral() as typed:
        pass_on(lambda: os.read(0, 2**12), typed.put)
        script = ['sample.py', '--chat', f'--out_dir={VOLUME}/out/{plain(name)}', *shlex.split(args)]
        for text in on_modal['chat'].remote_gen(script, typed):
            os.write(1, text)


@command()
def download(name: str):
    """The folder of a run, whole or not at all; one of that name that is there is moved aside."""
    out = HERE / 'out' / plain(name)
    part = out.with_name(f'{name}.part')  # it gets its name when all is there
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for entry in volume.listdir(f'out/{name}'):
            path = part / Path(entry.path).name
            if path.name != '.lock' and path.suffix != '.tmp':
                with open(path, 'wb') as f:
                    f.writelines(volume.read_file(entry.path))
                print(f'{path.name}: {path.stat().st_size:,} bytes', flush=True)
                if path.stat().st_size != entry.size or path.suffix == '.pt' and zipfile.ZipFile(path).testzip():
                    raise EOFError(f'{path.name} was cut, or has changed on the way')
        if out.exists():
            print(f'{out} was there: it is now {back_up(out)}')
        part.rename(out)
    except modal.exception.NotFoundError:
        raise UserError(f'there is no run {name} on the volume: modal run modal_train.py::ls shows those that are') from None
    except Exception as e:
        raise UserError(f'out/{name} did not come whole ({e}), nothing was changed here: try again') from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f'python sample.py --out_dir={shlex.quote(str(out))} --chat')


@command()
def ls(steps: int = 0):
    """Datasets and runs: hours and cost of the whole run or of so many steps, by what was measured and by PRICES."""
    there = {entry.path.strip('/') for folder in ('out', 'data') if any(e.path.strip('/') == folder for e in volume.listdir('/'))
             for entry in volume.listdir(folder, recursive=True)}
    print('datasets:', ', '.join(sorted(path[5:-10] for path in there if path.endswith('/meta.json'))))
    print(f'{"run":24} {"step":>16} {"best val":>8} {"tokens/s":>9} {"hours":>7} {"USD":>7}  GPU')
    for out in sorted(path[:-11] for path in there if path.endswith('/modal.json') and f'{path[:-11]}/log.csv' in there):
        log, config, note = (b''.join(volume.read_file(out + file)).decode('utf-8')
                             for file in ('/log.csv', '/config.json', '/modal.json'))
        rows, total, cards = list(csv.DictReader(log.splitlines())), json.loads(config)['max_iters'], json.loads(note)['gpus']
        hours = float(rows[-1]['seconds']) / int(rows[-1]['step']) * (steps or total) / 3600
        price = next((price for card, price in PRICES.items() if price and re.search(rf'\b{card}G?\b', ''.join(cards[:1]))), None)
        print(f'{out[4:]:24} {rows[-1]["step"] + " of " + str(total):>16} {min(float(row["val_loss"]) for row in rows):8.4f} '
              f'{rows[-1]["tokens_per_s"]:>9} {hours:7.2f} {f"{hours * price * len(cards):.2f}" if price else "?":>7}  '
              + ', '.join(cards))


if __name__ == '__main__':
    raise UserError('Modal runs this script: modal run modal_train.py --help, or on this machine python train.py')
