"""
What a new user meets first: the bundled model, pictures, advice, and every command of README and
docs/.

    pytest -n 0 tests/test_readme.py
"""
import csv
import importlib.util
import json
import re
import shlex
import shutil
from xml.etree import ElementTree

import pytest
from conftest import CHECKOUT, TINY, make_pairs, toy_text

from pocket.configurator import convert, read_options

SIMPLE = [*TINY, '--gradient_accumulation_steps=1', '--dropout=0']
BUNDLED = CHECKOUT / 'pocket' / 'bundled'
SVG = '{http://www.w3.org/2000/svg}'

# --------------------------------------------------------------------------------------------------
# Before and after training


def test_bundled_model_writes_shakespeare(project):
    """`python sample.py` before anything was trained."""
    shutil.copytree(BUNDLED, project.root / 'pocket' / 'bundled')
    out, err = project.run('sample.py', '--max_new_tokens=400', '--start=ROMEO:')
    assert 'bundled' in err and 'python train.py' in err and len(err.splitlines()) == 1
    assert out.startswith('ROMEO:')
    assert re.search(r'\n\n[A-Z][A-Za-z ]+:\n', out)  # a speaker

    frequent = 'the and to of i you my a that in is not it me for be his with'.split()
    words = re.findall('[a-z]+', out.lower())
    assert sum(word in frequent for word in words) > 0.15 * len(words)


def test_bundled_model_is_small_and_described():
    folder = BUNDLED / 'shakespeare'
    assert (folder / 'best.pt').stat().st_size < 3e6
    log = csv.DictReader((folder / 'log.csv').read_text(encoding='utf-8').splitlines())
    best = min(float(row['val_loss']) for row in log)
    assert f'{best:.4f}' in (folder / 'README.md').read_text(encoding='utf-8')


def test_export_of_a_small_checkpoint(trained, project):
    """The same model but for rounding, without paths of this machine; nothing is overwritten."""
    import torch

    shutil.copytree(trained.root / 'out', project.root / 'out')
    export = ['-m', 'pocket.export', '--out_dir=out/toy', '--to=out/small/best.pt']
    out, _ = project.run(*export)
    assert 'next: python sample.py --out_dir=out' in out

    small = project.checkpoint('small', 'best.pt')
    original = project.checkpoint('toy', 'best.pt')
    for name, weight in original['model'].items():
        assert torch.equal(small['model'][name], weight.bfloat16())
    assert 'optimizers' not in small
    assert str(project.root) not in str(small['config'])
    small_size = (project.root / 'out' / 'small' / 'best.pt').stat().st_size
    original_size = (project.root / 'out' / 'toy' / 'best.pt').stat().st_size
    assert small_size < 0.4 * original_size

    out, _ = project.run('sample.py', '--out_dir=out/small', '--start=ba', '--max_new_tokens=20')
    assert len(out) == 23
    out, _ = project.run('train.py', '--eval_only', '--out_dir=out/small', '--device=cpu')
    assert 'accuracy' in out
    assert 'there already' in project.fails(*export)

    shutil.rmtree(project.root / 'out' / 'toy')  # now it is the newest run
    _, err = project.run('sample.py', '--start=ba', '--max_new_tokens=20')
    assert err == ''


def test_plot_draws_several_runs(trained, tmp_path):
    other = tmp_path / 'other.csv'
    shutil.copy(trained.root / 'out' / 'toy' / 'log.csv', other)
    picture = tmp_path / 'ab.svg'
    runs = ['--run=out/toy', f'--run={other}']
    out, err = trained.run('-m', 'pocket.plot', *runs, '--x=seconds', f'--to={picture}')
    assert 'ab.svg' in out and err == ''
    assert 'other: best val' in re.sub('<!--|-->', '', picture.read_text(encoding='utf-8'))

    trained.run('-m', 'pocket.plot', f'--run={other}')
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_plot_warns_of_losses_that_do_not_compare(trained, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(trained.root / 'out' / 'toy', run)
    config = json.loads((run / 'config.json').read_text(encoding='utf-8'))
    (run / 'config.json').write_text(json.dumps({**config, 'dataset': 'other'}), encoding='utf-8')
    to = f'--to={tmp_path / "a.svg"}'
    _, err = trained.run('-m', 'pocket.plot', '--run=out/toy', f'--run={run}', to)
    assert '(other, toy), so their losses per token do not compare' in err


def test_plot_refuses_what_is_no_run(trained, tmp_path):
    bad = tmp_path / 'bad.csv'
    bad.write_text('step,loss\n1,2\n', encoding='utf-8')
    for options, message in [
        ([], 'name a run'),
        (['--run=gone'], 'cannot read'),
        ([f'--run={bad}'], 'is not the log.csv'),
        (['--run=out/toy', f'--to={tmp_path / "a.jpg"}'], '.png, .svg or .pdf'),
    ]:
        assert message in trained.fails('-m', 'pocket.plot', *options)


# --------------------------------------------------------------------------------------------------
# The chat that README shows


@pytest.fixture
def capture():
    spec = importlib.util.spec_from_file_location('capture', CHECKOUT / 'docs' / 'capture.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_capture_draws_each_piece_at_its_time(capture):
    pieces = [
        capture.Piece(0.1, '$ ', False), capture.Piece(0.5, 'chat', True),
        capture.Piece(1.0, '\nBot: a < b, said the', False), capture.Piece(1.25, ' model\n', False),
    ]
    svg = ElementTree.fromstring(capture.draw(pieces, columns=20))
    spans = [[span.text, span.get('class'), span.get('style')] for span in svg.iter(f'{SVG}tspan')]
    assert spans == [
        ['$ ', 'name', 'animation-duration:100ms'], ['chat', 'typed', 'animation-duration:500ms'],
        ['Bot: ', 'name', 'animation-duration:1000ms'],
        ['a < b, said the', None, 'animation-duration:1000ms'],
        ['model', None, 'animation-duration:1250ms'],  # wrapped: at most 20 columns
    ]


def test_picture_of_the_chat_is_small_and_plays():
    picture = (CHECKOUT / 'docs' / 'chat.svg').read_bytes()
    assert len(picture) < 200_000
    svg = ElementTree.fromstring(picture)
    text = ''.join(svg.itertext())
    assert '$ python sample.py --chat' in text and 'Plunkett: ' in text
    delays = [span.get('style') for span in svg.iter(f'{SVG}tspan')]
    assert len(set(delays)) > 100


# --------------------------------------------------------------------------------------------------
# Advice


def test_no_advice_for_a_good_run(project):
    out, _ = project.run('train.py', *SIMPLE)
    assert 'advice' not in out


def test_advice_for_a_loss_that_does_not_move(project):
    frozen = ['--learning_rate=0', '--muon_lr=0', '--warmup_iters=1']
    out, _ = project.run('train.py', *SIMPLE, *frozen)
    assert 'advice: the loss is still at chance level' in out


def test_advice_for_little_text_that_is_memorized(project):
    data = project.root / 'data' / 'toy'
    ids = (data / 'train.bin').read_bytes()
    (data / 'train.bin').write_bytes(ids[:2 * 60])  # 60 characters
    meta = (data / 'meta.json').read_text(encoding='utf-8')
    (data / 'meta.json').write_text(meta.replace('5000', '60'), encoding='utf-8')
    long = ['--max_iters=120', '--eval_interval=12', '--learning_rate=1e-2']
    out, _ = project.run('train.py', *SIMPLE, *long)
    assert re.search(r'advice: the dataset is small, and each token will be seen \d+ times', out)
    assert out.count('memorizing its text') == 1


# --------------------------------------------------------------------------------------------------
# README and docs/

README = CHECKOUT / 'README.md'
PAGES = [README, *sorted((CHECKOUT / 'docs').glob('*.md'))]


def read(page):
    return page.read_text(encoding='utf-8')


def commands(page):
    """The commands in the shell blocks of a page, without comments."""
    for block in re.findall(r'```sh\n(.*?)```', read(page), re.S):
        for line in block.replace('\\\n', ' ').splitlines():
            command = re.sub(r'\s*#.*', '', line).strip()
            if command:
                yield command


def script_of(words):
    """(the script's path, its arguments) of a command, split into words; (None, []) if it runs none
    of ours.
    """
    if '-m' in words and words[words.index('-m') + 1].startswith('pocket.'):
        place = words.index('-m') + 1
        return words[place].replace('.', '/') + '.py', words[place + 1:]
    for place, word in enumerate(words):
        if word.endswith('.py'):
            return word, words[place + 1:]
    return None, []


def test_readme_is_short_and_lists_the_scripts():
    readme = read(README)
    assert len(readme.splitlines()) < 300
    listed = set(re.findall(r'`([\w/]+\.py)`', readme))
    assert {path.name for path in CHECKOUT.glob('*.py')} <= listed


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    text = read(page)
    for target in re.findall(r'\]\(([^)#]+)\)', text) + re.findall(r'src="([^"]+)"', text):
        assert target.startswith('http') or (page.parent / target).exists(), target


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_scripts_and_options_in_commands_exist(page):
    """Every script, config file and option that a command names is there, and takes that value."""
    for command in commands(page):
        words = shlex.split(command.partition(' > ')[0])
        script, arguments = script_of(words)
        if script is None or words[0] == 'modal' or script.startswith('tests/'):
            continue
        source = (CHECKOUT / script).read_text(encoding='utf-8')
        types = {option.name: option.type for option in read_options(source)}
        for argument in arguments:
            if not argument.startswith('--'):
                assert (CHECKOUT / argument).is_file(), command
                continue
            name, _, value = argument[2:].partition('=')
            if name != 'help':
                assert name in types, command
                convert(value or 'True', types[name])


# README's commands that test_commands_of_readme_run leaves out, and where they are tested instead
TESTED_ELSEWHERE = {
    'git clone URL pocketgpt && cd pocketgpt': 'by whoever reads this',
    'python -m venv .venv && . .venv/bin/activate': 'by .ci/run',
    'pip install -r requirements.txt': 'by .ci/run',
    'pip install -r requirements-dev.txt': 'by .ci/run',
    'pytest': 'this is it',
    'python prepare/office.py': 'it downloads; with local files in test_prepare_pairs.py',
    'python sample.py --init_from=gpt2 --start="The" --dtype=bfloat16':
        'it downloads; from a local server in test_pretrained.py',
    'python sample.py --init_from=smollm2 --chat':
        'it downloads; a small Llama in test_llama.py',
    'python train.py config/finetune_gpt2.py': 'it downloads; from a local folder in test_pretrained.py',
    'python -m pocket.export --out_dir=out/finetune_gpt2 --to=my_gpt2':
        'needs that download; of small ones in test_pretrained.py',
    'modal setup': 'needs an account',
    'modal run modal_train.py': 'needs an account; against a stand-in in test_modal.py',
    'torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py':
        'needs GPUs; small ones in test_distributed.py',
}
SMALL = [
    '--n_layer=1', '--n_embd=16', '--n_head=2', '--block_size=16', '--device=cpu',
    '--max_iters=2', '--eval_interval=1', '--warmup_iters=0',
]


def make_what_readme_needs(project):
    """Little data in the place of what its commands would download or take long to make."""
    root = project.root
    (root / 'input.txt').write_text(toy_text(4000) + 'ROMEO: JULIET def\n', encoding='utf-8')
    (root / 'prompt.txt').write_text('ba', encoding='utf-8')
    (root / 'my_texts').mkdir()
    for i in range(40):
        (root / 'my_texts' / f'{i}.txt').write_text(toy_text(300, seed=i), encoding='utf-8')
    shutil.copytree(BUNDLED, root / 'pocket' / 'bundled')
    project.run('prepare/shakespeare_char.py', '--input=input.txt')
    shutil.copytree(root / 'data' / 'shakespeare_char', root / 'data' / 'stdlib')
    make_pairs(root).rename(root / 'data' / 'office')


def test_commands_of_readme_run(project):
    """One after the other, on little data and with models of a few hundred parameters."""
    make_what_readme_needs(project)
    listed = list(commands(README))
    assert set(TESTED_ELSEWHERE) <= set(listed), set(TESTED_ELSEWHERE) - set(listed)
    number = 0
    for command in listed:
        writes_a_prompt = '> prompt.txt' in command
        if command in TESTED_ELSEWHERE or writes_a_prompt:
            continue
        python, *words = shlex.split(command)
        if python == 'cp':
            source, target = words
            shutil.copy(project.root / source, project.root / target)
            continue
        assert python == 'python', command
        if words[0] == 'prepare/character.py':
            words += ['--conversations=200', '--beginnings=100', '--vocab_size=300']
        elif words[0] == 'train.py' and '--help' not in command:
            words += SMALL
        elif words[0] == 'sample.py':
            words += ['--max_new_tokens=20', '--device=cpu']
        project.run(*words, typed='/quit\n' if '--chat' in words else '')
        number += 1
    assert number > 10
    assert (project.root / 'both.png').is_file()
    assert (project.root / 'out' / 'shakespeare_char_cpu' / 'loss.png').is_file()


def test_python_example_of_readme_runs(trained, capsys, monkeypatch):
    """On a run of the test's."""
    example = re.search(r'```python\n(.*?)```', read(README), re.S)[1]
    example = example.replace('out/shakespeare_char_cpu', 'out/toy').replace('ROMEO:', 'ba')
    monkeypatch.chdir(trained.root)
    exec(compile(example, 'README', 'exec'), {})
    assert len(capsys.readouterr().out) > 50
