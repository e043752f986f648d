"""
Fault injection: break pocketGPT on purpose, for as long as you like. Linux only.

    python tests/fault_injection.py --minutes=10                            all experiments in turn
    python tests/fault_injection.py --minutes=5 --only=kill_train,disk      some of them
    python tests/fault_injection.py --only=resume --seed=7 --trial=12       one trial again

An experiment kills scripts, fills their disk, stops and resumes them or runs two at once, at random
moments, and then checks that nothing was lost or mixed up. It prints a line per experiment now and
then and a table at the end. If something broke, the exit status is 1 and the output says how to
repeat it. test_fault_injection.py runs a few trials of each.
"""
import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from fault_helpers import FEW_TOKENS, SHORT, Lab, SlowServer, server, small_disk
from project import ranks
from runs import same_run
from toy import toy_text

# --------------------------------------------------------------------------------------------------
# Helpers


def leftovers(folder, *patterns):
    """Names of the temporary files in a folder."""
    return [path.name for pattern in patterns or ['*.tmp'] for path in folder.glob(pattern)]


def content(folder):
    """{name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill(process, rng, seconds, watch=None):
    """Kill a process (SIGKILL) at a random moment. Returns whether it was still running.

    The moment is within so many seconds or, if a function `watch` is given, within 3 ms after that
    returns True.
    """
    if watch:
        while process.poll() is None and not watch():
            time.sleep(0.0005)
        seconds = 0.003
    time.sleep(rng.random() * seconds)
    was_running = process.poll() is None
    with suppress(ProcessLookupError):
        process.kill()
    process.communicate()
    return was_running


def has_checkpoint(out):
    return (out / 'best.pt').is_file() or (out / 'last.pt').is_file()


def start_or_resume(lab, out, args):
    """Start the run in out or, if it has a checkpoint, resume it; returns the process."""
    if has_checkpoint(out):
        args = ['--resume']
    return lab.project.start('train.py', *args, f'--out_dir={out}')


def finish(lab, out, args):
    """Resume the run in out to its end. If it has no checkpoint, --resume must say so, and the run
    starts anew.
    """
    if has_checkpoint(out):
        args = ['--resume']
    else:
        error = lab.project.fails('train.py', '--resume', *args, f'--out_dir={out}')
        assert 'there is no checkpoint in' in error, error
    lab.project.run('train.py', *args, f'--out_dir={out}')


def undisturbed_run(lab):
    """(folder of a run with the options SHORT that nothing disturbed, seconds that it took)."""
    out = lab.root / 'undisturbed'
    return out, lab.timed('train', 'train.py', *SHORT, f'--out_dir={out}')


# --------------------------------------------------------------------------------------------------
# Killed scripts


def kill_train(lab, rng):
    """A run that is killed a few times and resumed ends with the weights, optimizer state, scores
    and log of one that was not.
    """
    undisturbed, seconds = undisturbed_run(lab)
    out = lab.fresh('killed')
    for _ in range(rng.randint(1, 6)):
        watch = moment_of_writing(out, rng)
        if kill(start_or_resume(lab, out, SHORT), rng, seconds, watch):
            temporary = ', '.join(leftovers(out)) or 'no .tmp'
            checkpoints = ' and '.join(path.name for path in sorted(out.glob('*.pt')))
            lab.seen['kills'] += 1
            lab.seen[f'with {temporary}'] += 1
            lab.seen[f'saved: {checkpoints or "nothing"}'] += 1
    finish(lab, out, SHORT)
    same_run(undisturbed, out)
    assert not leftovers(out), leftovers(out)


def moment_of_writing(out, rng):
    """A function that says whether a random one of a run's files is being written just now; or
    None, for any moment.
    """
    before = {path: path.stat().st_mtime_ns for path in out.glob('*')}

    def is_new(name):
        path = out / name
        return path.exists() and path.stat().st_mtime_ns != before.get(path)

    files = ['best.pt.tmp', 'last.pt.tmp', 'log.csv.tmp']
    aim = rng.choice([None, None, *files, 'between the checkpoints'])
    if aim is None:
        return None
    if aim == 'between the checkpoints':
        return lambda: is_new('best.pt') and not is_new('last.pt')
    return lambda: is_new(aim)


PREPARATIONS = {  # {what: (name of the dataset, script, options)}
    'text': ('mine', 'prepare/text.py', ['--input=text.txt', '--vocab_size=600']),
    'text by files': ('mine', 'prepare/text.py', [
        '--input=text.txt', '--separator=lamp', '--tokenizer=byte',
    ]),
    'shakespeare_char': ('shakespeare_char', 'prepare/shakespeare_char.py', ['--input=text.txt']),
    'office': ('office', 'prepare/office.py', [
        '--src=src.txt', '--tgt=tgt.txt', '--vocab_size=300',
    ]),
}


def preparation(lab, rng, kind=None):
    """One of PREPARATIONS: (kind, command, folder it makes, folder it made undisturbed, seconds
    that took).
    """
    kind = kind or rng.choice(list(PREPARATIONS))
    name, script, options = PREPARATIONS[kind]
    options = [o.replace('=', f'={lab.root}/') if o.endswith('.txt') else o for o in options]
    good = lab.root / f'good {kind}' / name
    folder = lab.fresh('prepared') / name
    seconds = lab.timed(kind, script, *options, f'--data_dir={good.parent}')
    return kind, [script, *options, f'--data_dir={folder.parent}'], folder, good, seconds


def kill_prepare(lab, rng, kind=None):
    """What a killed preparation leaves is no dataset or a whole one; the same command then makes
    the same bytes and no more.
    """
    kind, command, folder, good, seconds = preparation(lab, rng, kind)

    def is_writing():
        return bool(leftovers(folder, '*.tmp', '*.part'))

    for _ in range(rng.randint(1, 4)):
        watch = rng.choice([None, is_writing])
        if kill(lab.project.start(*command), rng, seconds, watch):
            lab.seen[f'kills of {kind}'] += 1
            lab.seen['while writing'] += is_writing()
            if (folder / 'meta.json').is_file():
                lab.seen['complete already'] += 1
                for path in good.glob('*.*'):
                    made = folder / path.name
                    assert made.read_bytes() == path.read_bytes(), f'{path.name} is incomplete'
    lab.project.run(*command)
    assert content(folder) == content(good)


def kill_download(lab, rng):
    """A killed download that is started again ends with one version of the file, although the file
    may change meanwhile.
    """
    folder = lab.fresh('downloads')
    versions = [toy_text(200_000, rng.randrange(10**6)).encode() for _ in range(3)]
    etags = ['"a"', '"b"', '"c"']
    dates = [f'Mon, 0{day} Jan 2024 00:00:00 GMT' for day in (1, 2, 3)]
    no_tags = ['', '', '']
    tags = rng.choice([etags, dates, no_tags])
    sha256_is_known = rng.random() < 0.3

    with server(SlowServer) as url:
        for i in range(rng.randint(2, 3)):
            version = i if rng.random() < 0.5 else 0
            SlowServer.content = versions[version]
            SlowServer.tag = tags[version]
            sha256 = hashlib.sha256(SlowServer.content).hexdigest() if sha256_is_known else ''
            command = ['fetch.py', url, folder / 'x.txt', sha256]
            if kill(lab.project.start(*command), rng, 0.35):
                lab.seen['kills'] += 1
                lab.seen['with a part'] += bool(leftovers(folder, '*.part'))
            if (folder / 'x.txt').exists():
                assert (folder / 'x.txt').read_bytes() in versions, 'parts of two versions'
        lab.seen['file changed meanwhile'] += version != 0
        lab.project.run(*command)

        got = (folder / 'x.txt').read_bytes()
        expected = [SlowServer.content] if sha256_is_known else versions
        assert got in expected, f'parts of two versions, tags {tags[:2]}'
        assert list(content(folder)) == ['x.txt'], list(content(folder))


def kill_export(lab, rng):
    """A killed export that is started again makes the folder that an undisturbed one makes, and
    leaves nothing else.
    """
    run = lab.root / 'gpt2'
    like_gpt2 = [
        '--pos=learned', '--act=gelu', '--bias=True', '--qk_norm=False', '--token_shift=False',
        '--n_embd=64',
    ]
    train = [*SHORT, *like_gpt2, '--max_iters=1', f'--out_dir={run}']
    lab.once('gpt2', lambda: lab.project.run('train.py', *train))

    export = ['-m', 'pocket.export', f'--out_dir={run}']
    good = lab.root / 'good export'
    folder = lab.fresh('exported')
    seconds = lab.timed('export', *export, f'--to={good}')
    for _ in range(rng.randint(1, 5)):
        if folder.exists():
            break
        watch = None
        if rng.random() < 0.5:
            watch = lambda: leftovers(lab.root, '.exported*/*.tmp')
        if kill(lab.project.start(*export, f'--to={folder}'), rng, seconds, watch):
            lab.seen['kills'] += 1
            lab.seen['while writing'] += bool(leftovers(lab.root, '.exported*'))
    if not folder.exists():
        lab.project.run(*export, f'--to={folder}')
    assert content(folder) == content(good)
    assert [path.name for path in lab.root.glob('*exported*')] == ['exported']


# --------------------------------------------------------------------------------------------------
# Full disks


def disk(lab, rng):
    """Training that finds no room for a file ends with one sentence and status 2; with room again
    it resumes, bit for bit.

    Either a small file system is mounted, or the length of files is limited.
    """
    undisturbed, _ = undisturbed_run(lab)
    checkpoint_size = (undisturbed / 'last.pt').stat().st_size
    mount = lab.fresh('full')
    out = mount / 'run'
    want_small_disk = rng.random() < 0.4
    size = int(checkpoint_size * rng.uniform(1.2, 3.3)) if want_small_disk else 10**8
    with small_disk(mount, size) as mounted:
        if want_small_disk and mounted:
            how, limit = 'small disk', 10**9
        else:
            how, limit = 'limited files', rng.randrange(int(1.1 * checkpoint_size))
        command = ['limited.py', *SHORT, f'--out_dir={out}']
        process = lab.project.start(*command, env={'LIMIT': str(limit)})
        _, err = process.communicate(timeout=300)
        lab.seen[f'{how}, status {process.returncode}'] += 1
        if process.returncode == 0:
            assert err == ''
        else:
            assert process.returncode == 2 and len(err.splitlines()) == 1, err
            assert 'cannot write' in err and 'free some space' in err, err
        assert not leftovers(out), leftovers(out)

        if mounted:
            subprocess.check_call(['mount', '-o', 'remount,size=100m', str(mount)])
        if process.returncode or not (out / 'loss.png').is_file():
            lab.seen['with an earlier checkpoint'] += has_checkpoint(out)
            finish(lab, out, SHORT)
        same_run(undisturbed, out)


def disk_ranks(lab, rng):
    """If one of two ranks finds no room for a file, both end: the other does not wait for ever."""
    limit = str(rng.randrange(2000, 20000))
    out = lab.fresh('full of two')
    command = ['limited.py', *SHORT, '--dropout=0', f'--out_dir={out}']
    processes = ranks(lab.project, 2, *command, LIMIT=limit)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    status = [process.returncode for process in processes]
    assert status in ([2, 1], [2, 2]), (status, errors)
    assert 'cannot write' in errors[0] and len(errors[0].splitlines()) == 1, errors
    assert 'Traceback' not in errors[1], errors


# --------------------------------------------------------------------------------------------------
# Stopped and resumed runs


def random_options(rng):
    """Options of a run: every kind of model, dataset and optimizer, and everything that has a
    state.
    """
    options = {'device': 'cpu', 'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'log_interval': 1}
    is_pairs = rng.random() < 0.5
    if is_pairs:
        options['arch'] = 'seq2seq' if rng.random() < 0.6 else 'gpt'
        options |= {'dataset': 'talk', 'block_size': 24, 'batch_tokens': rng.choice([90, 200])}
    else:
        options |= {'dataset': 'toy', 'block_size': 16, 'batch_size': 4}

    choices = {
        'optimizer': ['muon', 'adamw'],
        'dropout': [0, 0.2],
        'attn_dropout': [0, 0.1],
        'gradient_accumulation_steps': [1, 3],
        'patience': [0, 1, 2],
        'gradient_checkpointing': [False, True],
        'token_shift': [True, False],
        'cutoffs': ['', '', '5,12'],
        'tie_weights': [False, True],
        'dtype': ['float32', 'bfloat16'],
        'schedule': ['linear', 'cosine'],
        'eval_interval': [2, 3, 5],
        'sample_tokens': [0, 3],
        'learning_rate': [0.01, 0.2],
        'seed': [1, 2, 3],
    }
    for name, values in choices.items():
        options[name] = rng.choice(values)
    if rng.random() < 0.5:
        options['max_iters'] = rng.randint(6, 12)
    else:
        options['max_epochs'] = rng.choice([0.3, 0.5]) if is_pairs else 0.11
    return [FEW_TOKENS] + [f'--{name}={value}' for name, value in options.items()]


# The table counts how often each value of these was tried
SEEN_OPTIONS = (
    '--arch', '--dataset', '--optimizer', '--cutoffs', '--patience', '--gradient_checkpointing',
    '--dropout', '--token_shift', '--max_epochs',
)


def resume(lab, rng):
    """A run that is stopped at random steps by SIGINT, SIGTERM or SIGKILL and resumed is the run
    that was not.
    """
    undisturbed = lab.fresh('uninterrupted')
    while True:
        options = random_options(rng)
        process = lab.project.start('train.py', *options, f'--out_dir={undisturbed}')
        _, err = process.communicate(timeout=500)
        refused = process.returncode == 2 and len(err.splitlines()) == 1
        if not refused:
            break
        lab.seen['options refused'] += 1  # they contradict each other: try others
        assert 'unknown' not in err, err
    assert process.returncode == 0, err

    config = json.loads((undisturbed / 'config.json').read_text(encoding='utf-8'))
    out = lab.fresh('interrupted')
    for _ in range(rng.randint(2, 4)):
        process = start_or_resume(lab, out, options)
        name = rng.choice(['SIGINT', 'SIGTERM', 'SIGKILL'])
        wait_for_lines(process, 'step ', rng.randint(1, config['max_iters'] + 1))
        with suppress(ProcessLookupError):
            process.send_signal(getattr(signal, name))
        process.communicate(timeout=300)
        assert process.returncode in (0, -9, 130, 143), process.returncode
        lab.seen['too late' if process.returncode == 0 else name] += 1
    finish(lab, out, options)
    same_run(undisturbed, out)
    lab.seen.update(option[2:] for option in options if option.startswith(SEEN_OPTIONS))


def wait_for_lines(process, beginning, n):
    """Read a process's output up to the n-th line that begins so, or to its end."""
    for line in iter(process.stdout.readline, ''):
        n -= line.startswith(beginning)
        if n == 0:
            return


def cycles(lab, rng):
    """After ten stops log.csv has each row once, in order, with the losses of an uninterrupted run.
    """
    options = [*SHORT, '--max_iters=44', '--eval_interval=2']
    undisturbed = lab.root / 'long undisturbed'
    lab.once('cycles', lambda: lab.project.run('train.py', *options, f'--out_dir={undisturbed}'))
    out = lab.fresh('cycled')
    for _ in range(10):
        process = start_or_resume(lab, out, options)
        # The first line says where it starts, then comes a line per step
        wait_for_lines(process, 'step ', rng.randint(2, 4))
        process.send_signal(rng.choice([signal.SIGINT, signal.SIGTERM]))
        process.communicate(timeout=300)
        lab.seen['stops'] += process.returncode in (130, 143)
    finish(lab, out, options)
    same_run(undisturbed, out)


# --------------------------------------------------------------------------------------------------
# Two processes at once


def two_at_once(lab, rng, command, refusal, seconds):
    """Run a command twice, the second time a moment later. Each succeeds, or one is refused;
    returns the number refused.
    """
    first = lab.project.start(*command)
    time.sleep(rng.random() * seconds)
    second = lab.project.start(*command)

    refused = 0
    for process in (first, second):
        _, err = process.communicate(timeout=300)
        if process.returncode == 0:
            assert err == '', err
        else:
            assert refusal in err and len(err.splitlines()) == 1, err
            refused += 1
    assert refused < 2
    return refused


def two_runs(lab, rng):
    """Of two runs in one folder, where an older run may lie, one trains and the other is refused;
    no run is lost.
    """
    out = lab.fresh('shared')
    for older in lab.root.glob('shared.*'):
        shutil.rmtree(older)
    has_older_run = rng.random() < 0.7
    if has_older_run:
        one = lab.root / 'one'
        command = ['train.py', *SHORT, '--max_iters=1', f'--out_dir={one}']
        lab.once('one', partial(lab.project.run, *command))
        shutil.copytree(one, out)

    command = ['train.py', *SHORT, f'--out_dir={out}']
    refused = two_at_once(lab, rng, command, 'another run is writing to', 0.02)
    folders = list(lab.root.glob('shared*'))
    finished = [folder for folder in folders if (folder / 'loss.png').exists()]
    assert len(finished) == 2 - refused and len(folders) == len(finished) + has_older_run, folders
    lab.seen['refused'] += refused


def two_prepares(lab, rng):
    """Of two preparations of one dataset one makes it, and the other is refused or makes the same.
    """
    _, command, folder, good, _ = preparation(lab, rng)
    lab.seen['refused'] += two_at_once(lab, rng, command, 'another process is preparing', 0.01)
    assert content(folder) == content(good)


def two_downloads(lab, rng):
    """Of two downloads of one file each ends with the whole file or is refused."""
    folder = lab.fresh('two downloads')
    SlowServer.content = toy_text(200_000).encode()
    SlowServer.tag = '"a"'
    with server(SlowServer) as url:
        command = ['fetch.py', url, folder / 'x.txt', '']
        lab.seen['refused'] += two_at_once(lab, rng, command, 'another process is downloading', 0.2)
    assert content(folder) == {'x.txt': SlowServer.content}


def sample_while_training(lab, rng):
    """sample.py finds a whole checkpoint at any moment of training."""
    out = lab.fresh('sampled')
    endless = ['--max_iters=100000', '--eval_interval=1']
    train = lab.project.start('train.py', *SHORT, *endless, f'--out_dir={out}')
    while not (out / 'best.pt').is_file():
        time.sleep(0.01)
    for _ in range(5):
        lab.project.run('sample.py', f'--out_dir={out}', '--start=ba', '--max_new_tokens=3')
    train.kill()
    train.communicate()


# --------------------------------------------------------------------------------------------------
# Leaks


def memory_and_files(process):
    """(KB of memory, number of open files) of a process."""
    proc = Path(f'/proc/{process.pid}')
    pages = int((proc / 'statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') // 1024, len(os.listdir(proc / 'fd'))


def assert_no_leak(what, points, unit):
    """points: [(x, KB, open files)]. Memory rises by less than 200 KB per `unit` of x, by least
    squares, and files stay as they are.
    """
    x, kb, files = zip(*points)
    rise = unit * np.polyfit(x, kb, 1)[0]
    print(f'  {what} {x[0]:,} to {x[-1]:,}: {kb[0]:,} to {kb[-1]:,} KB, '
          f'{rise:+.1f} KB per {unit:,}; open files {min(files)} to {max(files)}', flush=True)
    assert rise < 200 and max(files) <= min(files) + 1, 'it grows'


def memory_train(lab, rng, steps=20_000):
    """A long training run does not take more and more memory or files. The first tenth does not
    count.
    """
    out = lab.fresh('long')
    options = [
        f'--max_iters={steps}', f'--eval_interval={steps // 20}',
        f'--log_interval={steps // 100}', '--gradient_accumulation_steps=1',
    ]
    process = lab.project.start('train.py', *SHORT, *options, f'--out_dir={out}')
    points = []
    for line in iter(process.stdout.readline, ''):
        if ': loss' in line and process.poll() is None:
            step = int(line.split()[1].rstrip(':'))
            points.append((step, *memory_and_files(process)))
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert_no_leak('train.py, steps', [point for point in points if point[0] > steps // 10], 1000)


def memory_chat(lab, rng, turns=500):
    """A long chat, with a model of pairs and one of plain text, does not take more and more memory
    or files.
    """
    for dataset in ('talk', 'toy'):
        out = lab.root / f'chat {dataset}'
        options = [f'--dataset={dataset}', '--block_size=24', f'--out_dir={out}']
        short = SHORT
        if dataset == 'talk':  # pairs have no batch_size
            short = [option for option in SHORT if not option.startswith('--batch_size')]
        lab.once(out, partial(lab.project.run, 'train.py', *short, *options))

        chat = ['sample.py', f'--out_dir={out}', '--chat', '--max_new_tokens=12']
        process = lab.project.start(*chat)
        points = []
        for turn in range(turns):
            output = ''
            while not output.endswith(('\nU: ', '\n> ')):  # the prompt
                more = os.read(process.stdout.fileno(), 4096).decode('utf-8', 'replace')
                assert more, process.communicate()
                output += more
            points.append((turn, *memory_and_files(process)))
            process.stdin.write('dodo lamp ba\n')
            process.stdin.flush()
        process.communicate('/quit\n')
        assert_no_leak(f'sample.py --chat of {dataset}, turns', points[turns // 5:], 100)


# --------------------------------------------------------------------------------------------------
# Changed files, and output that nobody reads


def flip_bits(lab, rng):
    """A checkpoint or token file with a flipped bit is refused, or the bit says nothing.

    A zip has a few such bits: dates, versions, and whatever stands between its records.
    """
    def sample(run):
        options = ['--max_new_tokens=20', '--temperature=0', '--start=ba']
        return lab.project.start('sample.py', f'--out_dir={run}', *options).communicate(timeout=100)

    undisturbed, _ = undisturbed_run(lab)
    expected, _ = lab.once('sample', lambda: sample(undisturbed))
    out = lab.fresh('flipped')
    shutil.copytree(undisturbed, out)
    checkpoint = bytearray((out / 'best.pt').read_bytes())
    checkpoint[rng.randrange(len(checkpoint))] ^= 1 << rng.randrange(8)
    (out / 'best.pt').write_bytes(checkpoint)
    text, error = sample(out)
    refused = text == '' and len(error.strip().splitlines()) == 1
    lab.seen['refused' if refused else 'harmless'] += 1
    assert refused or text == expected, error

    dataset = lab.root / 'data' / 'flipped'
    prepare = ['prepare/text.py', '--input=text.txt', '--tokenizer=byte', '--name=flipped']
    lab.once('dataset', lambda: lab.project.run(*prepare))
    tokens = bytearray((dataset / 'train.bin').read_bytes())
    whole = bytes(tokens)
    tokens[rng.randrange(len(tokens))] ^= 1 << rng.randrange(8)
    (dataset / 'train.bin').write_bytes(tokens)
    error = lab.project.fails('train.py', *SHORT, '--dataset=flipped', f'--out_dir={out}')
    (dataset / 'train.bin').write_bytes(whole)
    assert 'not what was prepared' in error or 'has id' in error, error


def lost_output(lab, rng):
    """A reader that leaves (`| head`), or a full disk under a log: the run saves its last step, and
    resumed it ends like one that nothing disturbed.
    """
    undisturbed, _ = undisturbed_run(lab)
    out = lab.fresh('unheard')
    kind = rng.choice(['reader leaves', 'disk is full'])
    with small_disk(lab.fresh('small'), 4096) as mounted:
        if kind == 'disk is full' and mounted:
            with open(lab.root / 'small' / 'log', 'w') as log:
                log.write('x' * rng.randint(3000, 4000))
                log.flush()
                done = subprocess.run(
                    [sys.executable, 'train.py', *SHORT, f'--out_dir={out}'], cwd=lab.root,
                    stdout=log, stderr=subprocess.PIPE, text=True, encoding='utf-8')
            error = done.stderr
        else:
            process = lab.project.start('train.py', *SHORT, f'--out_dir={out}')
            wait_for_lines(process, 'step ', rng.randint(1, 5))
            process.stdout.close()
            error = process.stderr.read()
            process.wait(100)
    lab.seen[kind] += 1
    assert 'Traceback' not in error, error
    assert len(error.strip().splitlines()) <= 1, error
    finish(lab, out, SHORT)
    same_run(undisturbed, out)


def prepared_anew(lab, rng):
    """A run is not resumed on another text, of whatever length."""
    folder = lab.root / 'data' / 'mine'
    out = lab.fresh('anew')
    shutil.rmtree(folder, ignore_errors=True)
    prepare = ['prepare/text.py', '--tokenizer=byte']
    text = toy_text(30_000)
    lab.write('short.txt', text)
    lab.project.run(*prepare, '--input=short.txt')
    options = [*SHORT, '--dataset=mine', f'--out_dir={out}']
    lab.project.run('train.py', *options)
    lab.project.run('train.py', *options, '--resume', '--max_iters=10')
    before = content(out)

    place = rng.randrange(len(text))
    lab.write('other.txt', text[:place] + 'Q' + text[place + rng.randint(0, 1):])
    lab.project.run(*prepare, '--input=other.txt')
    error = lab.project.fails('train.py', *options, '--resume', '--max_iters=12')
    assert 'prepared anew' in error, error
    assert content(out) == before


# --------------------------------------------------------------------------------------------------
# All of it

EXPERIMENTS = {
    function.__name__: function
    for function in (
        kill_train, kill_prepare, kill_download, kill_export, disk, disk_ranks, resume, cycles,
        two_runs, two_prepares, two_downloads, sample_while_training, flip_bits, lost_output,
        prepared_anew, memory_train, memory_chat,
    )
}
# Each takes minutes: run once, and only if named
ONCE = ('memory_train', 'memory_chat')


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--minutes', type=float, default=10)
    parser.add_argument('--only', help='of these, with commas between: ' + ', '.join(EXPERIMENTS))
    parser.add_argument('--seed', default='1')
    parser.add_argument('--trial', type=int, help='run this trial alone')
    args = parser.parse_args()
    if args.only:
        args.only = args.only.split(',')
    else:
        args.only = [name for name in EXPERIMENTS if name not in ONCE]
    unknown = set(args.only) - EXPERIMENTS.keys()
    if unknown:
        parser.error(f'unknown: {", ".join(unknown)}; there are {", ".join(EXPERIMENTS)}')
    return args


def main():
    args = parse_arguments()
    end = time.monotonic() + 60 * args.minutes
    done = Counter()
    broken = {}
    labs = {}

    def one_trial(name, number, folder):
        if name not in labs:
            labs[name] = Lab(folder / name)
        try:
            EXPERIMENTS[name](labs[name], Random(f'{args.seed} {name} {number}'))
            done[name] += 1
        except Exception as e:
            broken[name] = f'trial {number}: {type(e).__name__}: {str(e)[:1500]}'
            traceback.print_exc()
            again = f'--only={name} --seed={args.seed} --trial={number}'
            print(f'{name} BROKE. Again: python tests/fault_injection.py {again}', flush=True)

    with tempfile.TemporaryDirectory(prefix='fault injection ') as folder:
        if args.trial is not None:
            for name in args.only:
                one_trial(name, args.trial, Path(folder))
                print(f'{name}: {counts(labs[name])}', flush=True)
        else:
            number = 0
            todo = args.only
            while todo and time.monotonic() < end:
                for name in todo:
                    one_trial(name, number, Path(folder))
                    if number % 10 == 0:
                        print(f'{name}: {done[name]} done; {counts(labs[name])}', flush=True)
                number += 1
                todo = [name for name in todo if name not in broken and name not in ONCE]

    print('\n| experiment | trials | seen | result |\n|---|---|---|---|')
    for name in args.only:
        seen = counts(labs[name]) if name in labs else ''
        result = broken.get(name, 'passed').splitlines()[0]
        print(f'| {name} | {done[name]} | {seen} | {result} |')
    return 1 if broken else 0


def counts(lab):
    """What was seen, as text."""
    return ', '.join(f'{what} {n}' for what, n in sorted(lab.seen.items()) if n)


if __name__ == '__main__':
    raise SystemExit(main())
