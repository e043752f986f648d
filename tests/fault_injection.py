"""
Break pocketGPT on purpose, for N minutes: kill it, fill its disk, stop it and go on, run two of everything.

    python tests/torture.py --minutes=10                                  all experiments in turn, until the time is over
    python tests/torture.py --minutes=5 --only=kill_train,disk --seed=7   some of them, with other random numbers
    python tests/torture.py --only=resume --seed=7 --trial=12             one trial again

A line for each experiment, a table at the end; exit status 1 and how to see it again where something broke. Linux.
"""
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
from conftest import TINY, Lab, SlowServer, ranks, same_run, server, small_disk, toy_text

SHORT = [*TINY, '--n_layer=1', '--max_iters=9', '--eval_interval=3', '--log_interval=1']


def left(folder, *patterns):
    """Names of temporary files in a folder."""
    return [p.name for pattern in patterns or ('*.tmp',) for p in folder.glob(pattern)]


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def kill(process, rng, seconds, watch=None):
    """SIGKILL at a random instant of so many seconds or, where watch() says that it is time, within 3 ms of that. True: it was alive."""
    while watch and process.poll() is None and not watch():
        time.sleep(0.0005)
    time.sleep(rng.random() * (0.003 if watch else seconds))
    alive = process.poll() is None
    with suppress(ProcessLookupError):
        process.kill()
    process.communicate()
    return alive


def saved(out):
    return any((out / name).is_file() for name in ('best.pt', 'last.pt'))


def finish(lab, out, *args):
    """Go on with a run in out to its end; where it never saved, be told so in a sentence, and start it anew."""
    if not saved(out):
        assert 'to go on from' in lab.project.fails('train.py', '--resume', *args, f'--out_dir={out}')
    lab.project.run('train.py', *(['--resume'] if saved(out) else args), f'--out_dir={out}')


def kill_train(lab, rng):
    """Killed a few times, then to its end: weights, optimizer, scores and log are those of a run that never was."""
    whole, out = lab.root / 'whole', lab.fresh('killed')
    seconds = lab.timed('train', 'train.py', *SHORT, f'--out_dir={whole}')
    for _ in range(rng.randint(1, 6)):
        before, aim = {p: p.stat().st_mtime_ns for p in out.glob('*')}, rng.choice([None, None, 'best.pt.tmp', 'last.pt.tmp', 'log.csv.tmp', 'between'])
        new = lambda name: (out / name).exists() and (out / name).stat().st_mtime_ns != before.get(out / name)
        watch = aim and (lambda: new('best.pt') and not new('last.pt') if aim == 'between' else new(aim))
        if kill(lab.project.start('train.py', *(['--resume'] if saved(out) else SHORT), f'--out_dir={out}'), rng, seconds, watch):
            lab.seen['kills'] += 1
            lab.seen['with ' + (', '.join(left(out)) or 'no .tmp')] += 1
            lab.seen[f'saved: {"".join(n[0] for n in ("best.pt", "last.pt") if (out / n).exists()) or "nothing"}'] += 1
    finish(lab, out, *SHORT)
    same_run(whole, out)
    assert not left(out), left(out)


PREPARES = {'text': ('mine', ['prepare/text.py', '--input=text.txt', '--vocab_size=600']),
            'text, by files': ('mine', ['prepare/text.py', '--input=text.txt', '--separator=lamp', '--tokenizer=byte']),
            'shakespeare_char': ('shakespeare_char', ['prepare/shakespeare_char.py', '--input=text.txt']),
            'office': ('office', ['prepare/office.py', '--src=src.txt', '--tgt=tgt.txt', '--vocab_size=300'])}


def preparation(lab, rng, kind=None):
    """One of PREPARES: (its name, the command, the folder that it once made, the one that it is to make, seconds that it takes)."""
    kind = kind or rng.choice(list(PREPARES))
    name, (script, *args) = PREPARES[kind]
    command = [script, *(a.replace('=', f'={lab.root}/') if a.endswith('.txt') else a for a in args)]
    good, folder = lab.root / f'good {kind}' / name, lab.fresh('data2') / name
    return kind, [*command, f'--data_dir={folder.parent}'], good, folder, lab.timed(kind, *command, f'--data_dir={good.parent}')


def kill_prepare(lab, rng, kind=None):
    """Killed, it is no dataset or the whole one; the same command makes the same bytes, and leaves nothing else."""
    kind, command, good, folder, seconds = preparation(lab, rng, kind)
    for _ in range(rng.randint(1, 4)):
        watch = rng.choice([None, lambda: left(folder, '*.tmp', '*.part')])
        if kill(lab.project.start(*command), rng, seconds, watch):
            lab.seen[f'kills of {kind}'] += 1
            lab.seen['while writing'] += bool(left(folder, '*.tmp', '*.part'))
            if (folder / 'meta.json').is_file():
                assert all((folder / p.name).read_bytes() == p.read_bytes() for p in good.glob('*.*')), 'taken for whole'
                lab.seen['whole already'] += 1
    lab.project.run(*command)
    assert content(folder) == content(good)


def kill_download(lab, rng):
    """Killed, and the file may change meanwhile: what has its name in the end is one whole version of it."""
    folder = lab.fresh('downloads')
    versions = [toy_text(200_000, rng.randrange(10**6)).encode() for _ in range(3)]
    known, tags = rng.random() < 0.3, rng.choice([['"a"', '"b"', '"c"'], [f'Mon, 0{i} Jan 2024 00:00:00 GMT' for i in (1, 2, 3)], [''] * 3])
    with server(SlowServer) as url:
        for i in range(rng.randint(2, 3)):
            change = i if rng.random() < 0.5 else 0
            SlowServer.content, SlowServer.tag = versions[change], tags[change]
            args = [url, folder / 'x.txt', hashlib.sha256(SlowServer.content).hexdigest() if known else '']
            if kill(lab.project.start('fetch.py', *args), rng, 0.35):
                lab.seen['kills'] += 1
                lab.seen['with a part'] += bool(left(folder, '*.part'))
            assert not (folder / 'x.txt').exists() or (folder / 'x.txt').read_bytes() in versions, 'mixed'
        lab.seen['file changed meanwhile'] += change != 0
        lab.project.run('fetch.py', *args)
        got = (folder / 'x.txt').read_bytes()
        assert got == SlowServer.content if known else got in versions, f'mixed of two versions, tags {tags[:2]}'
        assert list(content(folder)) == ['x.txt'], list(content(folder))


def kill_export(lab, rng):
    """Killed, then the same command: the folder that it would have been."""
    plain = ['--pos=learned', '--act=gelu', '--bias=True', '--qk_norm=False', '--token_shift=False', '--n_embd=64', '--max_iters=1']
    lab.once('gpt2', lambda: lab.project.run('train.py', *SHORT, *plain, f'--out_dir={lab.root / "gpt2"}'))
    good, to = lab.root / 'good export', lab.fresh('exported')
    seconds = lab.timed('export', 'export.py', f'--out_dir={lab.root / "gpt2"}', f'--to={good}')
    for _ in range(rng.randint(1, 5)):
        watch = (lambda: left(lab.root, '.exported*/*.tmp')) if rng.random() < 0.5 else None
        if not to.exists() and kill(lab.project.start('export.py', f'--out_dir={lab.root / "gpt2"}', f'--to={to}'), rng, seconds, watch):
            lab.seen['kills'] += 1
            lab.seen['while writing'] += bool(left(lab.root, '.exported*'))
    if not to.exists():
        lab.project.run('export.py', f'--out_dir={lab.root / "gpt2"}', f'--to={to}')
    assert content(to) == content(good)
    assert [p.name for p in lab.root.glob('*exported*')] == ['exported']


def disk(lab, rng):
    """No room for a file: one sentence, status 2, the checkpoints before it whole; with room again it goes on, to the bit."""
    whole, out = lab.root / 'whole', lab.fresh('full')
    lab.timed('train', 'train.py', *SHORT, f'--out_dir={whole}')
    size, tmpfs = (whole / 'last.pt').stat().st_size, rng.random() < 0.4
    with small_disk(out, int(size * rng.uniform(1.2, 3.3)) if tmpfs else 10**8) as mounted:
        run = out / 'run'
        limit = 10**9 if tmpfs and mounted else rng.randrange(int(1.1 * size))
        process = lab.project.start('limited.py', *SHORT, f'--out_dir={run}', env={'LIMIT': str(limit)})
        _, err = process.communicate(timeout=300)
        lab.seen[f'{"tmpfs" if tmpfs and mounted else "limit"}, ended with {process.returncode}'] += 1
        assert process.returncode in (0, 2) and len(err.splitlines()) == (process.returncode == 2) and 'Traceback' not in err, err
        assert process.returncode == 0 or 'cannot write' in err and 'free some space' in err, err
        assert not left(run), left(run)
        if mounted:
            subprocess.check_call(['mount', '-o', 'remount,size=100m', str(out)])
        if process.returncode or not (run / 'loss.png').is_file():
            lab.seen['with an earlier checkpoint'] += saved(run)
            finish(lab, run, *SHORT)
        same_run(whole, run)


def disk_ranks(lab, rng):
    """… and of two processes the other does not wait for ever."""
    out = lab.fresh('full2')
    processes = ranks(lab.project, 2, 'limited.py', *SHORT, '--dropout=0', f'--out_dir={out}', LIMIT=str(rng.randrange(2000, 20000)))
    ended = [(*p.communicate(timeout=300), p.returncode) for p in processes]
    assert [status for *_, status in ended] in ([2, 1], [2, 2]) and 'cannot write' in ended[0][1] and len(ended[0][1].splitlines()) == 1, ended
    assert 'Traceback' not in ended[1][1], ended


def settings(rng):
    """Knobs of a run: every kind of model, data and optimizer, and what has a state."""
    pairs = rng.random() < 0.5
    seq2seq = pairs and rng.random() < 0.6
    args = ['--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=16', '--log_interval=1']
    args += ['--dataset=talk', '--block_size=24', f'--batch_tokens={rng.choice([90, 200])}'] if pairs else ['--dataset=toy', '--block_size=16', '--batch_size=4']
    some = {'arch': ['seq2seq' if seq2seq else 'gpt'], 'optimizer': ['muon', 'adamw'], 'dropout': [0, 0.2], 'attn_dropout': [0, 0.1],
            'gradient_accumulation_steps': [1, 3], 'patience': [0, 1, 2], 'gradient_checkpointing': [False, True], 'token_shift': [True, False],
            'cutoffs': ['', '', '5,12'], 'tie_weights': [False, True], 'dtype': ['float32', 'bfloat16'], 'schedule': ['linear', 'cosine'],
            'eval_interval': [2, 3, 5], 'sample_tokens': [0, 3], 'learning_rate': [0.01, 0.2], 'seed': [1, 2, 3],
            rng.choice(['max_iters', 'max_epochs']): None}
    for name, values in some.items():
        value = {'max_iters': rng.randint(6, 12), 'max_epochs': rng.choice([0.3, 0.5]) if pairs else 0.11}[name] if values is None else rng.choice(values)
        args += [f'--{name}={value}']
    return args


def resume(lab, rng, more=()):
    """Stopped at random steps by SIGINT, SIGTERM and SIGKILL: the end is that of the run that never was."""
    args, whole = [*settings(rng), *more], lab.fresh('uninterrupted')
    process = lab.project.start('train.py', *args, f'--out_dir={whole}')
    _, err = process.communicate(timeout=500)
    if process.returncode == 2 and len(err.splitlines()) == 1:  # they do not go together: others
        lab.seen['settings refused'] += 1
        return resume(lab, rng, more)
    assert process.returncode == 0, err
    out, last = lab.fresh('interrupted'), json.loads((whole / 'config.json').read_text(encoding='utf-8'))['max_iters']
    for _ in range(rng.randint(2, 4)):
        process = lab.project.start('train.py', *(['--resume'] if saved(out) else args), f'--out_dir={out}')
        name, wait = rng.choice(['SIGINT', 'SIGTERM', 'SIGKILL']), rng.randint(0, last)
        for line in iter(process.stdout.readline, ''):
            if line.startswith('step ') and (wait := wait - 1) < 0:
                break
        with suppress(ProcessLookupError):
            process.send_signal(getattr(signal, name))
        process.communicate(timeout=300)
        lab.seen[name if process.returncode else 'too late'] += bool(process.returncode)
        assert process.returncode in (0, -9, 130, 143), process.returncode
    finish(lab, out, *args)
    same_run(whole, out)
    lab.seen.update(arg[2:] for arg in args if arg.startswith(('--arch', '--data', '--opt', '--cut', '--pat', '--gradient_ch', '--dropout', '--token', '--max_e')))


def cycles(lab, rng):
    """log.csv after ten stops: each row once, in order, and the loss of an uninterrupted run in each."""
    more = [*SHORT, '--max_iters=44', '--eval_interval=2']
    lab.once('cycles', lambda: lab.project.run('train.py', *more, f'--out_dir={lab.root / "long whole"}'))
    out = lab.fresh('cycled')
    for number in range(10):
        process = lab.project.start('train.py', *(['--resume'] if number else more), f'--out_dir={out}')
        for _ in range(rng.randint(4, 6)):  # what it begins with, and a step or more
            process.stdout.readline()
        process.send_signal(rng.choice([signal.SIGINT, signal.SIGTERM]))
        process.communicate(timeout=300)
        lab.seen['stops'] += process.returncode in (130, 143)
    finish(lab, out, *more)
    same_run(lab.root / 'long whole', out)


def vitals(process):
    """(KB of memory, open files) of a process."""
    proc = Path(f'/proc/{process.pid}')
    return int((proc / 'statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') // 1024, len(os.listdir(proc / 'fd'))


def judge(what, points, unit):
    """Of [(x, KB, open files)]: say how much more memory it is in so many x, by least squares; not much, and no more files."""
    x, kb, handles = zip(*points)
    rise = unit * np.polyfit(x, kb, 1)[0]
    print(f'  {what}: {kb[0]:,} to {kb[-1]:,} KB from {x[0]:,} to {x[-1]:,}, {rise:+.1f} KB in {unit:,}; open files {min(handles)} to {max(handles)}', flush=True)
    assert rise < 200 and max(handles) <= min(handles) + 1, 'it grows'


def memory_train(lab, rng, steps=20_000):
    """Memory and open files by step, once the first tenth is over."""
    process = lab.project.start('train.py', *SHORT, f'--max_iters={steps}', f'--eval_interval={steps // 20}', f'--log_interval={steps // 100}',
                                '--gradient_accumulation_steps=1', f'--out_dir={lab.fresh("long")}')
    points = [(int(line.split()[1].rstrip(':')), *vitals(process)) for line in iter(process.stdout.readline, '') if ': loss' in line and process.poll() is None]
    _, err = process.communicate()
    assert process.returncode == 0, err
    judge('train.py, by step', [p for p in points if p[0] > steps // 10], 1000)


def memory_chat(lab, rng, turns=500):
    """Memory and open files by turn of sample.py --chat, pairs and plain text."""
    for data in ('talk', 'toy'):
        out = lab.root / f'chat {data}'
        args = [a for a in SHORT if data == 'toy' or not a.startswith('--batch_size')]
        lab.once(out, lambda: lab.project.run('train.py', *args, f'--dataset={data}', '--block_size=24', f'--out_dir={out}'))
        process, points = lab.project.start('sample.py', f'--out_dir={out}', '--chat', '--max_new_tokens=12'), []
        for turn in range(turns):
            said = ''
            while not said.endswith(('\nU: ', '\n> ')):
                more = os.read(process.stdout.fileno(), 4096).decode('utf-8', 'replace')
                assert more, process.communicate()
                said += more
            points.append((turn, *vitals(process)))
            process.stdin.write('dodo lamp ba\n')
            process.stdin.flush()
        process.communicate('/quit\n')
        judge(f'sample.py --chat of {data}, by turn', points[turns // 5:], 100)


def at_once(lab, rng, command, refusal, seconds):
    """A command twice, the second a moment later: each does its work, but one may be refused. What it was told: a list."""
    first = lab.project.start(*command)
    time.sleep(rng.random() * seconds)
    ended = [(*p.communicate(timeout=300), p.returncode) for p in (first, lab.project.start(*command))]
    refused = [err for _, err, status in ended if status]
    assert len(refused) < 2 and all(refusal in err and len(err.splitlines()) == 1 for err in refused) and not any(err for _, err, s in ended if not s), ended
    return refused


def two_runs(lab, rng):
    """Started at once in one folder, which may hold an older run: one trains, the other is refused by name; nobody's work is lost."""
    out = lab.fresh('shared')
    for old in lab.root.glob('shared.*'):
        shutil.rmtree(old)
    held = rng.random() < 0.7
    if held:
        shutil.copytree(lab.once('one', lambda: lab.project.run('train.py', *SHORT, '--max_iters=1', f'--out_dir={lab.root / "one"}') and lab.root / 'one'), out)
    refused = len(at_once(lab, rng, ['train.py', *SHORT, f'--out_dir={out}'], 'another run is writing to', 0.02))
    folders = [p for p in lab.root.glob('shared*') if (p / 'loss.png').exists()]
    assert len(folders) == 2 - refused and len(list(lab.root.glob('shared*'))) == len(folders) + held, folders
    lab.seen['refused'] += refused


def two_prepares(lab, rng):
    """Of one dataset at once: one makes it, the other is refused by name or makes the same."""
    _, command, good, folder, _ = preparation(lab, rng)
    lab.seen['refused'] += len(at_once(lab, rng, command, 'another process is preparing', 0.01))
    assert content(folder) == content(good)


def two_downloads(lab, rng):
    """Of one file at once: each ends with the whole file, or is refused by name."""
    folder, SlowServer.content, SlowServer.tag = lab.fresh('downloads2'), toy_text(200_000).encode(), '"a"'
    with server(SlowServer) as url:
        lab.seen['refused'] += len(at_once(lab, rng, ['fetch.py', url, folder / 'x.txt', ''], 'another process is downloading', 0.2))
    assert content(folder) == {'x.txt': SlowServer.content}


def sample_while_training(lab, rng):
    """sample.py reads a whole checkpoint whenever it comes."""
    out = lab.fresh('read')
    train = lab.project.start('train.py', *SHORT, '--max_iters=100000', '--eval_interval=1', f'--out_dir={out}')
    while not (out / 'best.pt').is_file():
        time.sleep(0.01)
    for _ in range(5):
        lab.project.run('sample.py', f'--out_dir={out}', '--start=ba', '--max_new_tokens=3')
    train.kill()
    train.communicate()


EXPERIMENTS = {f.__name__: f for f in (kill_train, kill_prepare, kill_download, kill_export, disk, disk_ranks, resume, cycles, two_runs, two_prepares,
                                       two_downloads, sample_while_training, memory_train, memory_chat)}
EXPERIMENTS['resume_compiled'] = partial(resume, more=['--compile'])
ONCE = ('resume_compiled', 'memory_train', 'memory_chat')  # minutes each: only when they are named


def main():
    given = dict(arg.removeprefix('--').split('=', 1) for arg in sys.argv[1:])
    only = given.get('only', ','.join(n for n in EXPERIMENTS if n not in ONCE)).split(',')
    seed, end, done, broken = given.get('seed', '1'), time.monotonic() + 60 * float(given.get('minutes', 10)), Counter(), {}
    labs, number = {}, int(given.get('trial', 0))
    with tempfile.TemporaryDirectory(prefix='torture ') as folder:
        while time.monotonic() < end and (todo := [n for n in only if n not in broken and not (n in ONCE and done[n])]):
            for name in todo:
                labs[name] = labs.get(name) or Lab(Path(folder) / name)
                try:
                    EXPERIMENTS[name](labs[name], Random(f'{seed} {name} {number}'))
                    done[name] += 1
                except Exception as e:
                    broken[name] = f'trial {number}: {type(e).__name__}: {str(e)[:1500]}'
                    traceback.print_exc()
                    print(f'{name} BROKE. Again: python tests/torture.py --only={name} --seed={seed} --trial={number}', flush=True)
                if number % 10 == 0 or 'trial' in given:
                    print(f'{name}: {done[name]} done; ' + ', '.join(f'{k} {v}' for k, v in sorted(labs[name].seen.items())), flush=True)
            number += 1
            if 'trial' in given:
                break
        print('\n| experiment | trials | seen | |\n|---|---|---|---|')
        for name in only:
            seen = ', '.join(f'{k} {v}' for k, v in sorted(labs[name].seen.items()) if v) if name in labs else ''
            print(f'| {name} | {done[name]} | {seen} | {broken.get(name, "held").splitlines()[0]} |')
    return 1 if broken else 0


if __name__ == '__main__':
    raise SystemExit(main())
