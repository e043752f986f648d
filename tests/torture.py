"""
Break pocketGPT on purpose, for N minutes: kill it, fill its disk, stop it and go on, run two of everything.

    python tests/torture.py --minutes=10                                  all experiments in turn, until the time is over
    python tests/torture.py --minutes=5 --only=kill_train,disk --seed=7   some of them, with other random numbers
    python tests/torture.py --only=resume --seed=7 --trial=12             one trial again

A line for each experiment, a table at the end; exit status 1 and how to see it again where something broke. Linux.
"""
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

from conftest import TINY, Project, make_pairs, make_toy, ranks, same_run, toy_text

import files

SHORT = [*TINY, '--n_layer=1', '--max_iters=9', '--eval_interval=3', '--log_interval=1']
LIMITED = '''import os, resource, runpy, sys
if os.environ.get('RANK', '0') == '0':
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ['LIMIT']),) * 2)
sys.argv = [sys.argv[0].replace('limited', 'train'), *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name='__main__')
'''
FETCH = '''import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from configurator import show_user_errors
show_user_errors('fetch.py')
from files import download
download(sys.argv[1].split(','), sys.argv[2], sys.argv[3] or None, 'Do something.')
'''


class Lab:
    """A project to be mistreated, what its runs should have come to, and how often what was seen."""

    def __init__(self, folder):
        self.project, self.known, self.seen = Project(Path(folder) / 'pocket übung'), {}, Counter()
        self.root = self.project.root
        make_toy(self.root)
        make_pairs(self.root)
        train = (self.root / 'train.py').read_text(encoding='utf-8').replace('write_sample(300)', 'write_sample(3)')
        (self.root / 'train.py').write_text(train, encoding='utf-8')  # the same, but in less time
        (self.root / 'limited.py').write_text(LIMITED, encoding='utf-8')
        (self.root / 'fetch.py').write_text(FETCH, encoding='utf-8')
        (self.root / 'text.txt').write_text(toy_text(700_000), encoding='utf-8')
        for name, seed in (('src', 1), ('tgt', 2)):
            lines = [f'{i} {line}' for i, line in enumerate(toy_text(200_000, seed).splitlines()[:4000])]
            (self.root / f'{name}.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')

    def once(self, key, make):
        """make(), the first time that it is asked for under this key."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def timed(self, key, script, *args):
        """Seconds that a script takes, undisturbed; run once."""
        def run():
            begin = time.monotonic()
            self.project.run(script, *args)
            return time.monotonic() - begin
        return self.once((key, 'seconds'), run)

    def fresh(self, name):
        """A path in the project where nothing is."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        return self.root / name


def left(folder, *patterns):
    """Names of temporary files in a folder."""
    return [p.name for pattern in patterns or ('*.tmp',) for p in folder.glob(pattern)] if folder.is_dir() else []


def kill(process, rng, seconds, watch=None):
    """SIGKILL at a random instant of so many seconds or, where watch() says that it is time, within 3 ms of that. True: it was alive."""
    if watch is None:
        time.sleep(rng.random() * seconds)
    else:
        while process.poll() is None and not watch():
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.003)
    alive = process.poll() is None
    with suppress(ProcessLookupError):
        process.kill()
    process.communicate()
    return alive


def saved(out):
    return any((out / name).is_file() for name in ('best.pt', 'last.pt'))


def finish(lab, out, *args, script='train.py'):
    """Go on with a run in out to its end; where it never saved, be told so in a sentence, and start it anew."""
    if saved(out):
        lab.project.run(script, '--resume', f'--out_dir={out}')
        return
    said = lab.project.fails(script, '--resume', *args, f'--out_dir={out}')
    assert 'to go on from' in said, said
    lab.project.run(script, *args, f'--out_dir={out}')


def kill_train(lab, rng):
    """Killed a few times, then to its end: weights, optimizer, scores and log are those of a run that never was."""
    whole, out = lab.root / 'whole', lab.fresh('killed')
    seconds = lab.timed('train', 'train.py', *SHORT, f'--out_dir={whole}')
    for _ in range(rng.randint(1, 6)):
        aim = rng.choice(['any', 'any', 'best.pt.tmp', 'last.pt.tmp', 'log.csv.tmp', 'between'])
        resume = ['--resume'] if saved(out) else []
        before = {p: p.stat().st_mtime_ns for p in out.glob('*')}
        new = lambda p, before=before: p.exists() and p.stat().st_mtime_ns != before.get(p)  # noqa: E731
        watch = None if aim == 'any' else (lambda aim=aim, new=new: new(out / aim)) if aim != 'between' else (
            lambda new=new: new(out / 'best.pt') and not new(out / 'last.pt'))
        process = lab.project.start('train.py', *([] if resume else SHORT), *resume, f'--out_dir={out}')
        if kill(process, rng, seconds, watch):
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


def kill_prepare(lab, rng, kind=None):
    """Killed, it is no dataset or the whole one; the same command makes the same bytes, and leaves nothing else."""
    kind = kind or rng.choice(list(PREPARES))
    name, (script, *args) = PREPARES[kind]
    args = [a.replace('=', f'={lab.root}/') if a.endswith('.txt') else a for a in args]
    good, folder = lab.root / f'good {kind}' / name, lab.fresh('data2') / name
    seconds = lab.timed(kind, script, *args, f'--data_dir={good.parent}')
    for _ in range(rng.randint(1, 4)):
        tmp = rng.random() < 0.5
        process = lab.project.start(script, *args, f'--data_dir={folder.parent}')
        if kill(process, rng, seconds, (lambda: left(folder, '*.tmp', '*.part')) if tmp else None):
            lab.seen[f'kills of {kind}'] += 1
            lab.seen['while writing'] += bool(left(folder, '*.tmp', '*.part'))
            if (folder / 'meta.json').is_file():
                assert all((folder / p.name).read_bytes() == p.read_bytes() for p in good.glob('*.*')), 'taken for whole'
                lab.seen['whole already'] += 1
    lab.project.run(script, *args, f'--data_dir={folder.parent}')
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in good.iterdir()}


class Handler(http.server.BaseHTTPRequestHandler):
    """A slow server of one file that changes; its class says what it has and how well it behaves."""
    content, tag, blocks = b'', '', 40

    def do_GET(self):
        content, tag = self.content, self.tag
        have = int(self.headers.get('Range', 'bytes=0-')[6:-1])
        if self.headers.get('If-Range', tag) != tag:
            have = 0
        if have >= len(content) > 0 and have:
            return self.send_error(416)
        self.send_response(206 if have else 200)
        self.send_header('Content-Length', str(len(content) - have))
        if tag:
            self.send_header('ETag' if '"' in tag else 'Last-Modified', tag)
        self.end_headers()
        with suppress(OSError):
            for i in range(have, len(content), size := len(content) // self.blocks + 1):
                self.wfile.write(content[i:i + size])
                time.sleep(0.004)

    def log_message(self, *args):
        pass


@contextmanager
def server():
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}/x'
    httpd.shutdown()
    httpd.server_close()


def kill_download(lab, rng):
    """Killed, and the file may change meanwhile: what has its name in the end is one whole version of it."""
    folder = lab.fresh('downloads')
    versions = [toy_text(200_000, rng.randrange(10**6)).encode() for _ in range(3)]
    known, tags = rng.random() < 0.3, rng.choice([['"a"', '"b"', '"c"'], [f'Mon, 0{i} Jan 2024 00:00:00 GMT' for i in (1, 2, 3)], [''] * 3])
    with server() as url:
        for i in range(rng.randint(2, 3)):
            change = i if rng.random() < 0.5 else 0
            Handler.content, Handler.tag = versions[change], tags[change]
            (folder.parent / 'versions').write_bytes(Handler.content)
            args = [url, folder / 'x.txt', files.sha256_of(folder.parent / 'versions') if known else '']
            if kill(lab.project.start('fetch.py', *args), rng, 0.35):
                lab.seen['kills'] += 1
                lab.seen['with a part'] += bool(left(folder, '*.part'))
            assert not (folder / 'x.txt').exists() or (folder / 'x.txt').read_bytes() in versions, 'mixed'
        lab.seen['file changed meanwhile'] += change != 0
        lab.project.run('fetch.py', *args)
        got = (folder / 'x.txt').read_bytes()
        assert got == Handler.content if known else got in versions, f'mixed of two versions, tags {tags[:2]}'
        assert {p.name for p in folder.iterdir()} == {'x.txt'}, list(folder.iterdir())


def kill_export(lab, rng):
    """Killed, then the same command: the folder that it would have been."""
    plain = ['--pos=learned', '--act=gelu', '--bias=True', '--qk_norm=False', '--token_shift=False', '--n_embd=64', '--max_iters=1']
    lab.once('gpt2', lambda: lab.project.run('train.py', *SHORT, *plain, f'--out_dir={lab.root / "gpt2"}'))
    good, to = lab.root / 'good export', lab.fresh('exported')
    seconds = lab.timed('export', 'export.py', f'--out_dir={lab.root / "gpt2"}', f'--to={good}')
    for _ in range(rng.randint(1, 5)):
        watch = (lambda: left(lab.root, '.exported*/*.tmp')) if rng.random() < 0.5 else None
        if to.exists():
            break
        if kill(lab.project.start('export.py', f'--out_dir={lab.root / "gpt2"}', f'--to={to}'), rng, seconds, watch):
            lab.seen['kills'] += 1
            lab.seen['while writing'] += bool(left(lab.root, '.exported*'))
    if not to.exists():
        lab.project.run('export.py', f'--out_dir={lab.root / "gpt2"}', f'--to={to}')
    assert {p.name: p.read_bytes() for p in to.iterdir()} == {p.name: p.read_bytes() for p in good.iterdir()}
    assert [p.name for p in lab.root.glob('*exported*')] == ['exported']


@contextmanager
def small_disk(folder, size):
    """A file system of so many bytes at folder, where we may mount one; its value says whether."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = os.geteuid() == 0 and not subprocess.call(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', str(folder)], stderr=subprocess.DEVNULL)
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.check_call(['umount', str(folder)])


def disk(lab, rng):
    """No room for a file: one sentence, status 2, the checkpoints before it whole; with room again it goes on, to the bit."""
    whole, out = lab.root / 'whole', lab.fresh('full')
    lab.timed('train', 'train.py', *SHORT, f'--out_dir={whole}')
    size, tmpfs = (whole / 'last.pt').stat().st_size, rng.random() < 0.4
    with small_disk(out, int(size * rng.uniform(1.2, 3.3)) if tmpfs else 10**8) as mounted:
        run = out / 'run'
        if tmpfs and mounted:
            process = lab.project.start('train.py', *SHORT, f'--out_dir={run}')
        else:
            process = lab.project.start('limited.py', *SHORT, f'--out_dir={run}', env={'LIMIT': str(rng.randrange(int(1.1 * size)))})
        _, err = process.communicate(timeout=60)
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
    ended = [(*p.communicate(timeout=60), p.returncode) for p in processes]
    assert [status for *_, status in ended] in ([2, 1], [2, 2]) and 'cannot write' in ended[0][1] and len(ended[0][1].splitlines()) == 1, ended
    assert 'Traceback' not in ended[1][1], ended
    lab.seen['second: ' + ended[1][1].strip()[:60]] += 1


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
    while True:
        args, whole = [*settings(rng), *more], lab.fresh('uninterrupted')
        process = lab.project.start('train.py', *args, f'--out_dir={whole}')
        said, err = process.communicate(timeout=500)
        if process.returncode == 0:
            break
        assert process.returncode == 2 and len(err.splitlines()) == 1, err
        lab.seen['settings refused'] += 1
    out, last = lab.fresh('interrupted'), json.loads((whole / 'config.json').read_text(encoding='utf-8'))['max_iters']
    for _ in range(rng.randint(2, 4)):
        resumed = saved(out)
        process = lab.project.start('train.py', *(['--resume'] if resumed else args), f'--out_dir={out}')
        name, wait = rng.choice(['SIGINT', 'SIGTERM', 'SIGKILL']), rng.randint(0, last)
        for line in iter(process.stdout.readline, ''):
            if line.startswith('step ') and (wait := wait - 1) < 0:
                break
        if process.poll() is None:
            with suppress(ProcessLookupError):
                process.send_signal(getattr(signal, name))
        process.communicate(timeout=60)
        lab.seen[name if process.returncode else 'too late'] += bool(process.returncode)
        assert process.returncode in (0, -9, 130, 143), process.returncode
    finish(lab, out, *args)
    same_run(whole, out)
    for arg in args:
        if arg.split('=')[0] in ('--arch', '--optimizer', '--cutoffs', '--patience', '--gradient_checkpointing', '--dtype'):
            lab.seen[arg[2:]] += 1


def resume_compiled(lab, rng):
    """The same with torch.compile: slow."""
    resume(lab, rng, ['--compile'])


def cycles(lab, rng):
    """log.csv after ten stops: each row once, in order, and the loss of an uninterrupted run in each."""
    more = [*SHORT, '--max_iters=44', '--eval_interval=2']
    lab.once('cycles', lambda: lab.project.run('train.py', *more, f'--out_dir={lab.root / "long whole"}'))
    out = lab.fresh('cycled')
    for number in range(10):
        process = lab.project.start('train.py', *(['--resume'] if number else more), f'--out_dir={out}')
        steps = 0
        for line in iter(process.stdout.readline, ''):
            steps += ': loss' in line
            if steps > rng.randint(2, 3):
                break
        process.send_signal(rng.choice([signal.SIGINT, signal.SIGTERM]))
        process.communicate(timeout=60)
        assert process.returncode in (130, 143), f'it ended with {process.returncode} in cycle {number}'
    finish(lab, out, *more)
    same_run(lab.root / 'long whole', out)
    lab.seen['stops'] += 10


def vitals(process):
    """(KB of memory, open files) of a process."""
    pages = int(Path(f'/proc/{process.pid}/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') // 1024, len(os.listdir(f'/proc/{process.pid}/fd'))


def slope(points):
    """Of the line through (x, y) by least squares."""
    n, sx, sy = len(points), sum(x for x, _ in points), sum(y for _, y in points)
    return (n * sum(x * y for x, y in points) - sx * sy) / (n * sum(x * x for x, _ in points) - sx * sx)


def memory_train(lab, rng, steps=20_000):
    """Memory and open files by step, once the first tenth is over."""
    process = lab.project.start('train.py', *SHORT, f'--max_iters={steps}', f'--eval_interval={steps // 20}', f'--log_interval={steps // 100}',
                                '--gradient_accumulation_steps=1', f'--out_dir={lab.fresh("long")}')
    points = [(int(line.split()[1].rstrip(':')), *vitals(process)) for line in iter(process.stdout.readline, '') if ': loss' in line and process.poll() is None]
    _, err = process.communicate()
    assert process.returncode == 0, err
    points = [p for p in points if p[0] > steps // 10]
    rise, handles = 1000 * slope([(s, kb) for s, kb, _ in points]), {f for *_, f in points}
    print(f'  memory_train: {points[0][1]:,} to {points[-1][1]:,} KB over {steps:,} steps, {rise:+.1f} KB in 1,000 steps; open files {handles}')
    assert rise < 200 and len(handles) <= 2, 'it grows'


def memory_chat(lab, rng, turns=500):
    """Memory and open files by turn of sample.py --chat, pairs and plain text."""
    for data in ('talk', 'toy'):
        out = lab.root / f'chat {data}'
        lab.once(out, lambda out=out, data=data: lab.project.run('train.py', *SHORT, f'--dataset={data}', '--block_size=24', '--batch_tokens=200', f'--out_dir={out}'))
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
        points = [p for p in points if p[0] >= turns // 5]
        rise, handles = 100 * slope([(t, kb) for t, kb, _ in points]), {f for *_, f in points}
        print(f'  memory_chat, {data}: {points[0][1]:,} to {points[-1][1]:,} KB over {turns} turns, {rise:+.1f} KB in 100 turns; open files {handles}')
        assert rise < 200 and len(handles) <= 2, 'it grows'


def two_runs(lab, rng):
    """Started at once in one folder, which may hold an older run: one trains, the other is refused by name; nobody's work is lost."""
    out = lab.fresh('shared')
    for old in lab.root.glob('shared.*'):
        shutil.rmtree(old)
    held = rng.random() < 0.7
    if held:
        shutil.copytree(lab.once('one', lambda: lab.project.run('train.py', *SHORT, '--max_iters=1', f'--out_dir={lab.root / "one"}') and lab.root / 'one'), out)
    first = lab.project.start('train.py', *SHORT, f'--out_dir={out}')
    time.sleep(rng.random() * 0.02)
    processes = [first, lab.project.start('train.py', *SHORT, f'--out_dir={out}')]
    ended = [(*p.communicate(timeout=60), p.returncode) for p in processes]
    assert sorted(status for *_, status in ended) == [0, 2], ended
    lost = next(err for _, err, status in ended if status)
    assert 'another run is writing to' in lost and len(lost.splitlines()) == 1, lost
    assert len(list(lab.root.glob('shared*'))) == 1 + held and 'step 9' in max(out for out, *_ in ended)


def two_prepares(lab, rng):
    """Of one dataset at once: one makes it, the other is refused by name or makes the same."""
    kind = rng.choice(list(PREPARES))
    name, (script, *args) = PREPARES[kind]
    args = [a.replace('=', f'={lab.root}/') if a.endswith('.txt') else a for a in args]
    good, folder = lab.root / f'good {kind}' / name, lab.fresh('data3') / name
    lab.timed(kind, script, *args, f'--data_dir={good.parent}')
    processes = [lab.project.start(script, *args, f'--data_dir={folder.parent}') for _ in range(2)]
    ended = [(*p.communicate(timeout=60), p.returncode) for p in processes]
    assert sorted(status for *_, status in ended) in ([0, 2], [0, 0]) and not any('Traceback' in err for _, err, _ in ended), ended
    for _, err, status in ended:
        assert err == '' if status == 0 else 'another process is preparing' in err and len(err.splitlines()) == 1, err
        lab.seen['refused'] += status == 2
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in good.iterdir()}


def two_downloads(lab, rng):
    """Of one file at once: each ends with the whole file, or is refused by name."""
    folder, Handler.content, Handler.tag = lab.fresh('downloads2'), toy_text(200_000).encode(), '"a"'
    with server() as url:
        processes = []
        for _ in range(2):
            processes.append(lab.project.start('fetch.py', url, folder / 'x.txt', ''))
            time.sleep(rng.random() * 0.1)
        ended = [(*p.communicate(timeout=60), p.returncode) for p in processes]
    assert sorted(status for *_, status in ended) in ([0, 2], [0, 0]), ended
    assert all('another process is' in err for _, err, status in ended if status) and (folder / 'x.txt').read_bytes() == Handler.content, ended


def sample_while_training(lab, rng):
    """sample.py reads a whole checkpoint whenever it comes."""
    out = lab.fresh('read')
    train = lab.project.start('train.py', *SHORT, '--max_iters=100000', '--eval_interval=1', '--log_interval=1', f'--out_dir={out}')
    while not (out / 'best.pt').is_file():
        time.sleep(0.01)
    for _ in range(5):
        lab.project.run('sample.py', f'--out_dir={out}', '--start=ba', '--max_new_tokens=3')
        lab.seen['samples'] += 1
    train.kill()
    train.communicate()


EXPERIMENTS = {f.__name__: f for f in (kill_train, kill_prepare, kill_download, kill_export, disk, disk_ranks, resume, cycles, two_runs, two_prepares,
                                       two_downloads, sample_while_training, resume_compiled, memory_train, memory_chat)}
ONCE = ('resume_compiled', 'memory_train', 'memory_chat')  # minutes each: only when they are named


def main():
    given = dict(arg.removeprefix('--').split('=', 1) for arg in sys.argv[1:])
    only = given.get('only', ','.join(n for n in EXPERIMENTS if n not in ONCE)).split(',')
    seed, end, done, broken = given.get('seed', '1'), time.monotonic() + 60 * float(given.get('minutes', 10)), Counter(), {}
    labs = {}
    with tempfile.TemporaryDirectory(prefix='torture ') as folder:
        number = int(given.get('trial', 0))
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
