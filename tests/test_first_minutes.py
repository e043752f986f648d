"""What a person sees first: the model that comes along, pictures, advice, README's commands and what it says of Python."""
import csv
import re
import shlex
import shutil

import pytest
from conftest import CHECKOUT, TINY, make_pairs, toy_text

from pocket.configurator import convert, read_options

LITTLE = [*TINY, '--gradient_accumulation_steps=1', '--dropout=0']


def test_something_to_talk_to_at_once(project):
    """Before anything was trained."""
    shutil.copytree(CHECKOUT / 'pretrained', project.root / 'pretrained')
    out, err = project.run('sample.py', '--max_new_tokens=400', '--start=ROMEO:')
    assert 'comes along' in err and 'python train.py' in err and len(err.splitlines()) == 1
    words = re.findall('[a-z]+', out.lower())
    common = sum(word in {'the', 'and', 'to', 'of', 'i', 'you', 'my', 'a', 'that', 'in', 'is', 'not', 'it', 'me', 'for', 'be', 'his', 'with'} for word in words)
    assert out.startswith('ROMEO:') and common > 0.15 * len(words) and re.search(r'\n\n[A-Z][A-Za-z ]+:\n', out)
    folder = CHECKOUT / 'pretrained' / 'shakespeare'
    assert (folder / 'best.pt').stat().st_size < 3e6
    val = min(float(row['val_loss']) for row in csv.DictReader((folder / 'log.csv').read_text(encoding='utf-8').splitlines()))
    assert f'{val:.4f}' in (folder / 'README.md').read_text(encoding='utf-8')


def test_small_checkpoint(trained, project):
    """export.py --to=FILE.pt: the same model but for rounding, without paths of this machine; nothing is overwritten."""
    import torch
    shutil.copytree(trained.root / 'out', project.root / 'out')
    out, _ = project.run('export.py', '--out_dir=out/toy', '--to=out/small/best.pt')
    assert 'next: python sample.py --out_dir=out' in out
    ours, theirs = project.checkpoint('small', 'best.pt'), project.checkpoint('toy', 'best.pt')
    assert all(torch.equal(ours['model'][name], p.bfloat16()) for name, p in theirs['model'].items())
    assert 'optimizers' not in ours and str(project.root) not in str(ours['config'])
    assert (project.root / 'out/small/best.pt').stat().st_size < 0.4 * (project.root / 'out/toy/best.pt').stat().st_size
    assert len(project.run('sample.py', '--out_dir=out/small', '--start=ba', '--max_new_tokens=20')[0]) == 23
    shutil.rmtree(project.root / 'out/toy')  # now it is the newest run
    assert project.run('sample.py', '--start=ba', '--max_new_tokens=20')[1] == ''
    shutil.copytree(trained.root / 'out/toy', project.root / 'out/toy')
    assert 'accuracy' in project.run('train.py', '--eval_only', '--out_dir=out/small', '--device=cpu')[0]
    assert 'is there already' in project.fails('export.py', '--out_dir=out/toy', '--to=out/small/best.pt')


def test_pictures(trained, tmp_path):
    log = trained.root / 'out' / 'toy' / 'log.csv'
    shutil.copy(log, tmp_path / 'other.csv')
    out, _ = trained.run('plot.py', '--run=out/toy', f'--run={tmp_path / "other.csv"}', '--x=seconds', f'--to={tmp_path / "ab.svg"}')
    assert 'other: best val' in re.sub('<!--|-->', '', (tmp_path / 'ab.svg').read_text(encoding='utf-8')) and 'ab.svg' in out
    trained.run('plot.py', f'--run={tmp_path / "other.csv"}')
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')
    (tmp_path / 'bad.csv').write_text('step,loss\n1,2\n', encoding='utf-8')
    for args, said in (([], 'name a run'), (['--run=gone'], 'cannot read'), ([f'--run={tmp_path / "bad.csv"}'], 'is not the log.csv'),
                       (['--run=out/toy', f'--to={tmp_path / "a.jpg"}'], '.png, .svg or .pdf')):
        assert said in trained.fails('plot.py', *args)


def test_advice(project):
    """One line each: little text, a loss that does not move, a model that learns by heart; and none where all is well."""
    out, _ = project.run('train.py', *LITTLE)
    assert 'advice' not in out
    out, _ = project.run('train.py', *LITTLE, '--learning_rate=0', '--muon_lr=0', '--warmup_iters=1', '--out_dir=out/still')
    assert 'advice: the loss hardly moves' in out
    ids = (project.root / 'data' / 'toy' / 'train.bin')
    ids.write_bytes(ids.read_bytes()[:2 * 60])  # 60 characters
    meta = project.root / 'data' / 'toy' / 'meta.json'
    meta.write_text(meta.read_text(encoding='utf-8').replace('5000', '60'), encoding='utf-8')
    out, _ = project.run('train.py', *LITTLE, '--max_iters=120', '--eval_interval=12', '--learning_rate=1e-2', '--out_dir=out/little')
    assert re.search(r'advice: this is little text, each token will be seen \d+ times', out)
    assert out.count('learns its text by heart') == 1


# README's commands that no test runs as they stand, and what is done instead
NOT_HERE = {
    'pip install -r requirements.txt': '.ci/run does', 'pip install -r requirements-dev.txt': '.ci/run does', 'pytest': 'this is it',
    'python prepare/office.py': 'downloads; on local files in test_prepare_pairs.py',
    'python sample.py --init_from=gpt2 --start="The" --dtype=bfloat16': 'downloads; from a local server in test_gpt2.py',
    'python train.py config/finetune_gpt2.py': 'downloads; from a local folder in test_gpt2.py',
    'python export.py --out_dir=out/finetune_gpt2 --to=my_gpt2': 'of a downloaded model; of small ones in test_gpt2.py',
    'modal setup': 'needs an account', 'modal run modal_train.py': 'needs an account; against a stand-in in test_modal.py',
    'torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py': 'needs GPUs; small ones in test_parallel.py',
}


@pytest.fixture(scope='module')
def pages():
    return {path: path.read_text(encoding='utf-8') for path in [CHECKOUT / 'README.md', *sorted((CHECKOUT / 'docs').glob('*.md'))]}


def test_readme_is_a_front_door(pages):
    readme = pages[CHECKOUT / 'README.md']
    assert len(readme.splitlines()) < 300
    for page, text in pages.items():  # links and pictures lead somewhere
        for target in re.findall(r'\]\(([^)#]+)\)', text):
            assert target.startswith('http') or (page.parent / target).exists(), f'{page.name}: {target}'
    listed = set(re.findall(r'`([\w/]+\.py)`', readme))
    assert {p.name for p in CHECKOUT.glob('*.py')} <= listed


def commands(text):
    """The commands in the shell blocks of a page, without comments."""
    for block in re.findall(r'```sh\n(.*?)```', text, re.S):
        for line in block.replace('\\\n', ' ').splitlines():
            yield re.sub(r'\s+#.*', '', line).strip()


def test_commands_of_all_pages_exist(pages):
    """Every script, config file and knob that a page names is there, and takes that value."""
    for page, text in pages.items():
        for command in commands(text):
            words = shlex.split(command)
            script = next((w for w in words if w.endswith('.py')), None)
            if 'modal' in words[0] or script is None:
                continue
            knobs = {name: kind for name, kind, _ in read_options((CHECKOUT / script).read_text(encoding='utf-8')) if name}
            for word in words[words.index(script) + 1:]:
                name, _, value = word.removeprefix('--').partition('=')
                if word.startswith('--') and name != 'help':
                    convert(value or 'True', knobs[name])
                elif not word.startswith('--'):
                    assert (CHECKOUT / word).is_file(), f'{page.name}: {command}'


def test_readme_walked(pages, project):
    """README's commands one after the other, on little data and with models of a few hundred parameters."""
    text = toy_text(4000) + 'ROMEO: JULIET def\n'
    (project.root / 'input.txt').write_text(text, encoding='utf-8')
    (project.root / 'prompt.txt').write_text('ba', encoding='utf-8')
    (project.root / 'my_texts').mkdir()
    for i in range(40):
        (project.root / 'my_texts' / f'{i}.txt').write_text(toy_text(300, seed=i), encoding='utf-8')
    shutil.copytree(CHECKOUT / 'pretrained', project.root / 'pretrained')
    project.run('prepare/shakespeare_char.py', '--input=input.txt')
    shutil.copytree(project.root / 'data' / 'shakespeare_char', project.root / 'data' / 'stdlib')  # or half a minute
    make_pairs(project.root).rename(project.root / 'data' / 'office')
    small = ['--n_layer=1', '--n_embd=16', '--n_head=2', '--block_size=16', '--device=cpu', '--max_iters=2', '--eval_interval=1', '--warmup_iters=0']
    run, listed = 0, list(commands(pages[CHECKOUT / 'README.md']))
    for command in listed:
        script, *args = shlex.split(command)[1:] or ['']
        if command in NOT_HERE or command.startswith('echo '):
            continue
        extra = {'train.py': [] if '--help' in command else small, 'sample.py': ['--max_new_tokens=20', '--device=cpu']}.get(script, [])
        project.run(script, *args, *extra, typed='/quit\n' if '--chat' in args else '')
        run += 1
    assert run > 10 and set(NOT_HERE) <= set(listed)
    assert (project.root / 'both.png').is_file() and (project.root / 'out' / 'shakespeare_char_cpu' / 'loss.png').is_file()


def test_readme_in_python(pages, trained, capsys, monkeypatch):
    """The snippet of README, on a run of the test's."""
    snippet = re.search(r'```python\n(.*?)```', pages[CHECKOUT / 'README.md'], re.S)[1]
    monkeypatch.chdir(trained.root)
    exec(compile(snippet.replace('out/shakespeare_char_cpu', 'out/toy').replace('ROMEO:', 'ba'), 'README', 'exec'), {})
    assert len(capsys.readouterr().out) > 50
