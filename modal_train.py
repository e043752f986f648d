"""
Train on one of Modal's GPUs with the same train.py, then download the result.
Once: pip install modal; modal setup. Then

    modal run modal_train.py                           the default config, on a modest GPU
    modal run modal_train.py --name=long --overrides="--max_iters=5000 --dtype=bfloat16"
    modal run --detach modal_train.py --config=config/office_encdec.py --gpu=A10
    modal run modal_train.py::ls                       runs and datasets; hours and cost
    modal run modal_train.py::download --name=office_encdec    to out/office_encdec
    modal run modal_train.py::sample --name=office_encdec --args="--start=Hello."
    modal run -q modal_train.py::chat --name=office_encdec    (-q: without Modal's progress lines)
    modal run modal_train.py::prepare --dataset=tinystories --args="--vocab_size=8192"

The first half of this file runs in containers on Modal, the second half on your machine. They share
a volume: a disk at Modal that keeps data/, out/ and cache/ from one container to the next.
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

GPUS = 'L4,A10,T4'    # the first that is free; --gpu=H100 asks for another, --gpu=H100,A100: either
TIMEOUT = 24 * 3600   # seconds per attempt, Modal's limit; a longer run resumes in the next attempt
GRACE = 25            # seconds for train.py to save when it is stopped: after 30 Modal kills us
PRICES = {            # USD per hour, from modal.com/pricing: fill in
    'L4': None, 'A10': None, 'T4': None, 'A100': None, 'H100': None,
}
VOLUME = os.environ.get('POCKETGPT_VOLUME', '/vol')  # where containers see the volume

# In a container this script is /root/modal_train.py, and a copy of our folder lies beside it.
if modal.is_local():
    HERE = Path(__file__).resolve().parent
else:
    HERE = Path(__file__).parent / 'pocketgpt'
sys.path.append(str(HERE))
from pocket.errors import UserError, show_user_errors
from pocket.files import atomic_write, back_up, find_path

show_user_errors('modal_train.py')


# --------------------------------------------------------------------------------------------------
# What we ask Modal for

# Modal has to know the GPU where a function is defined, before main() is given its options: so look
# for --gpu and --gpus here. (Function.with_options() comes later, but takes no list of GPUs.)
parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
parser.add_argument('--gpu', default=GPUS)
parser.add_argument('--gpus', default='1')
gpu_options, _ = parser.parse_known_args()
gpu_choices = [name.strip() for name in gpu_options.gpu.split(',')]
if gpu_options.gpus != '1':
    gpu_choices = [f'{name}:{gpu_options.gpus}' for name in gpu_choices]

# The image is a Linux with our requirements and a copy of our scripts, and of what they read.
COPIED_FOLDERS = ('pocket', 'prepare', 'config')


def not_copied(path):
    """Whether containers get no copy of a file: they need neither data nor tests. path: in our
    folder."""
    is_script = path.suffix == '.py' and len(path.parts) == 1
    is_needed = is_script or path.parts[0] in COPIED_FOLDERS
    return not is_needed or '__pycache__' in path.parts


image = modal.Image.debian_slim(python_version='3.11')
image = image.pip_install_from_requirements(str(HERE / 'requirements.txt'))  # torch with CUDA
image = image.env({
    'PYTHONUNBUFFERED': '1',
    'HF_HOME': f'{VOLUME}/cache/huggingface',
    'TIKTOKEN_CACHE_DIR': f'{VOLUME}/cache/tiktoken',
    'TORCHINDUCTOR_CACHE_DIR': f'{VOLUME}/cache/inductor',
})
# Our scripts come last: they are mounted, not built in, so no edit makes Modal build an image.
image = image.add_local_dir(str(HERE), '/root/pocketgpt', ignore=not_copied)

volume = modal.Volume.from_name('pocketgpt', create_if_missing=True)
on_cpu = {'image': image, 'volumes': {VOLUME: volume}, 'timeout': TIMEOUT}
on_gpu = {**on_cpu, 'gpu': gpu_choices if len(gpu_choices) > 1 else gpu_choices[0]}
ten_retries = modal.Retries(max_retries=10, initial_delay=0.0, backoff_coefficient=1.0)
app = modal.App('pocketgpt')


# --------------------------------------------------------------------------------------------------
# In a container on Modal

@app.function(**on_gpu, retries=ten_retries, single_use_containers=True)
def train(
    args: str = '', name: str = 'stdlib', gpus: int = 1, fresh: bool = False, when: str = '',
) -> tuple[int, str]:
    """Run train.py with args, writing to out/NAME on the volume. Returns (exit status, message).

    The same command resumes a run that was stopped. So when Modal preempts the container, train.py
    saves, Modal makes the same call again, and the run continues. A crash raises RuntimeError, and
    Modal makes the call again, too. Bad input (status 2) is returned: no other attempt can mend it.

    fresh: start over, even if the same command has been run before.
    when: the time of the call. Retries of a call have the same, and resume even if fresh.
    """
    out = Path(VOLUME, 'out', name)
    last = out / 'last.pt'
    log = out / 'train.log'
    note = out / 'modal.json'      # what was asked for, and the GPUs that it runs on
    finished = out / 'finished'    # an empty file that marks a run as trained to its end
    note_before = read_note(note)

    # Resume, start over, or is there nothing left to do?
    has_checkpoint = last.is_file() or (out / 'best.pt').is_file()  # best.pt is written first
    resume_asked = '--resume' in shlex.split(args)
    same_call = when != '' and note_before.get('when') == when
    same_command = not fresh and note_before.get('args') == args
    resume = has_checkpoint and (resume_asked or same_call or same_command)
    if resume and finished.exists() and not resume_asked:
        return 0, (f'out/{name} has finished already: --fresh starts over and keeps this run, '
                   f'--name=… starts another one')

    # A run of the same name that is not resumed is kept under another name.
    backup = None
    plan = 'starts from scratch'
    if resume:
        plan = 'resumes where it stopped'
    elif has_checkpoint:
        backup = back_up(out)
        plan += f'; the previous run is now out/{backup.name}'
    cards = gpu_names()
    print(f'out/{name} {plan} ({", ".join(cards) or "no GPU"})', flush=True)

    out.mkdir(parents=True, exist_ok=True)
    write_note(note, {'args': args, 'when': when, 'gpus': cards})
    finished.unlink(missing_ok=True)
    log_size_before = log.stat().st_size if log.exists() else 0

    # Train.
    if gpus > 1:
        command = ['torchrun', '--standalone', f'--nproc_per_node={gpus}']
    else:
        command = [sys.executable]
    command += ['train.py', *shlex.split(args), f'--data_dir={VOLUME}/data', f'--out_dir={out}']
    if resume and not resume_asked:
        command.append('--resume')
    status = run_training(command, last, log)

    # How did it end?
    output = log.read_bytes()[log_size_before:].decode('utf-8', 'replace').splitlines()
    if is_bad_input(status, output):
        if backup is not None and not last.exists():  # it never started: undo the backup
            shutil.rmtree(out)
            backup.rename(out)
        elif note_before and backup is None:
            write_note(note, note_before)
        errors = [line for line in output if line.startswith('train.py: ')]
        return 2, errors[-1] if errors else 'train.py: bad input'
    if status != 0:
        raise RuntimeError(f'train.py ended with status {status}')
    finished.touch()
    commit()
    return 0, (f'the result is in out/{name} on the volume pocketgpt; to download it: '
               f'modal run modal_train.py::download --name={name}')


def run_training(command, checkpoint, log):
    """Run train.py, append its output to the file log, commit the volume after each checkpoint.

    Returns the exit status. Raises TimeoutError shortly before Modal's time limit. However we leave
    this function, for example by the KeyboardInterrupt that is a preemption, train.py is told to
    stop and has GRACE seconds to save.
    """
    deadline = time.monotonic() + TIMEOUT - min(300, TIMEOUT / 10)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM interrupts like Ctrl-C

    # train.py gets a session of its own: signals to our process group do not reach it, so it is for
    # us to stop it. If we are killed outright, Linux does that (PR_SET_PDEATHSIG is 1).
    prctl = ctypes.CDLL(None).prctl
    process = Popen(
        command, cwd=HERE, stdout=PIPE, stderr=STDOUT, start_new_session=True,
        preexec_fn=lambda: prctl(1, signal.SIGTERM),
    )
    tee = Popen(['tee', '-a', log], stdin=process.stdout, start_new_session=True)

    committed = None  # modification time of the checkpoint that was committed last
    try:
        while process.poll() is None:
            time.sleep(0.2)
            if checkpoint.is_file():  # it is complete: train.py writes it under another name
                modified = checkpoint.stat().st_mtime_ns
                if modified != committed:
                    committed = modified
                    commit()
            if time.monotonic() > deadline:
                hours = f'{TIMEOUT / 3600:g} hours'
                raise TimeoutError(f'the {hours} are nearly over: the next attempt will resume')
    finally:
        process.terminate()  # does nothing if it has ended
        try:
            process.wait(GRACE)
            tee.wait(5)  # it ends when train.py, and any child it left behind, have ended
        except TimeoutExpired:
            process.kill()
            tee.kill()
        commit()
    return process.returncode


def is_bad_input(status, output):
    """Whether train.py ended with status 2. torchrun only says so in its output (lines)."""
    if status == 2:
        return True
    return any(line.split()[:3] == ['exitcode', ':', '2'] for line in output)


def gpu_names():
    """The names of this container's GPUs, as nvidia-smi prints them."""
    if shutil.which('nvidia-smi') is None:
        return []
    return getoutput('nvidia-smi --query-gpu=name --format=csv,noheader').splitlines()


def read_note(path):
    """The content of modal.json: a dict, empty if there is no such file."""
    if not path.is_file():
        return {}
    return json.loads(path.read_text(encoding='utf-8'))


def write_note(path, content):
    """Write a dict to modal.json."""
    atomic_write(path, lambda f: f.write(json.dumps(content).encode('utf-8')))


def commit():
    """Make changes to the volume permanent. If that fails, training goes on: Modal will do it when
    the container ends."""
    try:
        volume.commit()
    except Exception as e:
        print(f'could not commit the volume: {e}')


def run_script(command: list[str], show: bool) -> tuple[int, str]:
    """Run another of our scripts. Returns (exit status, output).

    show: stdout goes to Modal's log as it is printed, and only stderr is returned.
    """
    process = run([sys.executable, *command], cwd=HERE, stdout=None if show else PIPE, stderr=PIPE)
    commit()
    output = process.stderr
    if not show:
        output = process.stdout + output
    return process.returncode, output.decode('utf-8', 'replace')


def run_chat(command: list[str], keyboard: modal.Queue):
    """Run one of our scripts that reads from keyboard. Yields its output, bytes, as it comes."""
    process = Popen(
        [sys.executable, *command], cwd=HERE, stdin=PIPE, stdout=PIPE, stderr=STDOUT, bufsize=0,
    )

    def write(data):
        if data:
            process.stdin.write(data)
        else:
            process.stdin.close()

    forward(keyboard.get, write)
    while True:
        output = process.stdout.read(2**12)
        if not output:
            return
        yield output


def forward(read, write):
    """In the background, write(read()) again and again, up to and including b'' for the end."""
    def loop():
        while True:
            data = read()
            write(data)
            if not data:
                return

    Thread(target=loop, daemon=True).start()


# --------------------------------------------------------------------------------------------------
# On your machine

@app.local_entrypoint()
def main(
    config: str = '', overrides: str = '', name: str = '', gpu: str = GPUS, gpus: int = 1,
    fresh: bool = False, secret: str = '',
):
    """Train to out/NAME on the volume; NAME is by default that of the config file or dataset."""
    args = shlex.split(overrides)
    if config:
        path = find_path(config).resolve()
        if path.parent != HERE / 'config':
            raise UserError(f'containers only get the config files in {HERE / "config"}, '
                            f'and {config} is not there: copy it there')
        args.insert(0, f'config/{path.name}')
        default_name = path.stem
    else:
        default_name = 'stdlib'
        for arg in args:
            if arg.startswith('--dataset='):
                default_name = arg.removeprefix('--dataset=')
    name = check_name(name or default_name)

    function = train
    if secret:  # holds HF_TOKEN, WANDB_API_KEY, …
        function = train.with_options(secrets=[modal.Secret.from_name(secret)])
    when = time.strftime('%Y-%m-%d %H:%M:%S')
    call = function.spawn(shlex.join(args), name, gpus, fresh, when)  # outlives us with --detach
    status, message = call.get()
    finish(status, message)


remote_functions = {}  # {name of a command: the function that it calls on Modal}


def command(remote_function=None, **resources):
    """Decorator for a function that is to be run by `modal run modal_train.py::NAME`.

    remote_function: what it calls on Modal, as remote_functions[NAME]; resources: image, GPU, …
    Each command is a Modal App of its own. If all were entrypoints of one App, Modal would not know
    that `modal run modal_train.py` means main().
    """
    def register(function):
        name = function.__name__
        command_app = modal.App(f'pocketgpt-{name}')
        command_app.local_entrypoint()(function)
        if remote_function is not None:
            remote_functions[name] = command_app.function(**resources)(remote_function)
        return command_app

    return register


@command(run_script, **on_cpu)
def prepare(dataset: str = 'stdlib', args: str = ''):
    """Run prepare/DATASET.py with args, writing to data/ on the volume."""
    script = [f'prepare/{check_name(dataset)}.py', *shlex.split(args), f'--data_dir={VOLUME}/data']
    status, output = remote_functions['prepare'].remote(script, True)
    finish(status, output)


@command(run_script, **on_gpu)
def sample(name: str, args: str = '', gpu: str = GPUS):
    """Run sample.py with args, for the model in out/NAME on the volume."""
    script = ['sample.py', f'--out_dir={VOLUME}/out/{check_name(name)}', *shlex.split(args)]
    status, output = remote_functions['sample'].remote(script, False)
    finish(status, output)


@command(run_chat, **on_gpu)
def chat(name: str, args: str = '', gpu: str = GPUS):
    """Run sample.py --chat with args on Modal; it reads what you type here."""
    out = f'{VOLUME}/out/{check_name(name)}'
    script = ['sample.py', '--chat', f'--out_dir={out}', *shlex.split(args)]
    with modal.Queue.ephemeral() as keyboard:
        forward(lambda: os.read(0, 2**12), keyboard.put)
        for output in remote_functions['chat'].remote_gen(script, keyboard):
            os.write(1, output)


@command()
def download(name: str):
    """Download a run to out/NAME, complete or not at all. What is there already is renamed."""
    out = HERE / 'out' / check_name(name)
    part = out.with_name(f'{name}.part')  # becomes out once every file has arrived
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for entry in volume.listdir(f'out/{name}'):
            path = part / Path(entry.path).name
            if path.name != '.lock' and path.suffix != '.tmp':
                download_file(entry, path)
        if out.exists():
            print(f'{out} existed already: it is now {back_up(out)}')
        part.rename(out)
    except modal.exception.NotFoundError:
        raise UserError(f'there is no run {name} on the volume: '
                        f'modal run modal_train.py::ls lists them') from None
    except Exception as e:
        raise UserError(f'the download of out/{name} is incomplete ({e}); '
                        f'nothing was changed here: try again') from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f'python sample.py --out_dir={shlex.quote(str(out))} --chat')


def download_file(entry, path):
    """Download a file of the volume to path. Raises EOFError if it arrives truncated or damaged."""
    with open(path, 'wb') as f:
        f.writelines(volume.read_file(entry.path))
    size = path.stat().st_size
    print(f'{path.name}: {size:,} bytes', flush=True)

    damaged = size != entry.size
    if path.suffix == '.pt' and not damaged:  # a ZIP file, with a checksum for each of its parts
        damaged = zipfile.ZipFile(path).testzip() is not None
    if damaged:
        raise EOFError(f'{path.name} arrived truncated or damaged')


@command()
def ls(steps: int = 0):
    """List datasets and runs, with hours and cost of a whole run or of so many steps."""
    top_level = [entry.path.strip('/') for entry in volume.listdir('/')]
    paths = set()
    for folder in ('out', 'data'):
        if folder in top_level:
            for entry in volume.listdir(folder, recursive=True):
                paths.add(entry.path.strip('/'))

    datasets = []
    for path in sorted(paths):
        if path.endswith('/meta.json'):
            datasets.append(path.removeprefix('data/').removesuffix('/meta.json'))
    print('datasets:', ', '.join(datasets))

    print(f'{"run":24} {"step":>16} {"best val":>8} {"tokens/s":>9} {"hours":>7} {"USD":>7}  GPU')
    for path in sorted(paths):
        folder, _, file = path.rpartition('/')
        if file == 'modal.json' and f'{folder}/log.csv' in paths:
            log = list(csv.DictReader(read_text(f'{folder}/log.csv').splitlines()))
            config = json.loads(read_text(f'{folder}/config.json'))
            cards = json.loads(read_text(path))['gpus']
            run_name = folder.removeprefix('out/')
            print(format_run(run_name, log, cards, config['max_iters'], steps))


def read_text(path):
    """The text of a file on the volume."""
    return b''.join(volume.read_file(path)).decode('utf-8')


def format_run(name, log, cards, max_iters, steps=0):
    """A run as a line of the list. log: the rows of its log.csv, dicts; cards: names of its GPUs.

    Hours and cost are those of max_iters steps or, if given, of `steps`, at the speed in its log.
    """
    last = log[-1]
    progress = f'{last["step"]} of {max_iters}'
    best_val = min(float(row['val_loss']) for row in log)
    hours = float(last['seconds']) / int(last['step']) * (steps or max_iters) / 3600
    price = price_per_hour(cards)
    cost = '?' if price is None else f'{hours * price:.2f}'
    return (f'{name:24} {progress:>16} {best_val:8.4f} {last["tokens_per_s"]:>9} '
            f'{hours:7.2f} {cost:>7}  {", ".join(cards)}')


def price_per_hour(cards):
    """USD per hour of all these GPUs, which are of one kind; None if PRICES does not say."""
    for gpu, price in PRICES.items():
        if price and cards and re.search(rf'\b{gpu}G?\b', cards[0]):  # an A10 is an 'NVIDIA A10G'
            return price * len(cards)
    return None


def check_name(name):
    """Return the name of a run or dataset. Raises UserError if it could be a path to elsewhere."""
    if name in ('', '.', '..') or name != Path(name).name:
        raise UserError(f'the name of a run or dataset must be a plain word, got {name!r}: '
                        f'modal run modal_train.py::ls lists them')
    return name


def finish(status, message):
    """Print what came back from Modal, to stderr if it failed, and exit with its status."""
    print(message.rstrip(), file=sys.stderr if status else sys.stdout)
    if status:
        raise SystemExit(status)


if __name__ == '__main__':
    raise UserError('Modal runs this script: modal run modal_train.py --help. '
                    'To train on this machine: python train.py')
