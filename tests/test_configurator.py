"""Knobs, config files, overrides, and what is said about mistakes in them."""
import pytest

from pocket import configurator
from pocket.configurator import configure
from pocket.errors import UserError

SCRIPT = '''"""Does nothing."""
from typing import Literal
# Sizes
batch_size = 12      # sequences a step
rate = 0.5           # of learning
# Words
name = 'x'           # what it is called
kind: Literal['a', 'b'] = 'a'
top_k: int | None = 200
flag = False
either: bool | Literal['auto'] = 'auto'
many: tuple[str, ...] = ('',)
configure(__file__, globals())
not_a_knob = 3
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(configurator, 'show_user_errors', lambda script: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'script.py').write_text(SCRIPT, encoding='utf-8')

    def run(*argv, **files):
        for name, text in files.items():
            (tmp_path / f'{name}.py').write_text(text, encoding='utf-8')
        namespace = {}
        exec(SCRIPT.split('configure(')[0], namespace)
        return configure(str(tmp_path / 'script.py'), namespace, list(argv))[0]
    return run


@pytest.mark.parametrize('arg, knob, value', [
    ('--batch_size=3', 'batch_size', 3), ('--batch_size=1e3', 'batch_size', 1000), ('--batch-size=3', 'batch_size', 3),
    ('--rate=1', 'rate', 1.0), ('--rate=3e-4', 'rate', 3e-4), ('--rate=inf', 'rate', float('inf')),
    ('--name=123', 'name', '123'), ('--name=a=b', 'name', 'a=b'), ('--name=', 'name', ''), ('--name=--x', 'name', '--x'),
    ('--kind=b', 'kind', 'b'), ('--top_k=None', 'top_k', None), ('--top_k=5', 'top_k', 5),
    ('--flag', 'flag', True), ('--flag=True', 'flag', True), ('--flag=false', 'flag', False),
    ('--either=False', 'either', False), ('--either', 'either', True), ('--either=auto', 'either', 'auto'),
    ('--many=one', 'many', ('one',)), ('--many=[1]', 'many', ('[1]',))])
def test_values(run, arg, knob, value):
    got = run(arg)[knob]
    assert got == value and type(got) is type(value)


def test_order_and_repetition(run):
    got = run('--rate=2', '--many=a', 'one.py', '--rate=3', '--many=b', one='rate = 1\nbatch_size = batch_size * 2', )
    assert (got['rate'], got['batch_size'], got['many']) == (3.0, 24, ('a', 'b'))  # files first, then the command line in its order
    assert 'not_a_knob' not in got


def test_config_may_compute(run):
    assert run('c.py', c="many = ('one', 'two')")['many'] == ('one', 'two')
    got = run('c.py', c='import math\ndef double(x):\n    return 2 * x\n_half = 4\nbatch_size = double(_half)\nrate = 1')
    assert got['batch_size'] == 8 and got['rate'] == 1.0 and type(got['rate']) is float


def test_every_problem_at_once(run):
    with pytest.raises(UserError) as e:
        run('--batch_sise=3', '--rate=fast', '--kind=c', 'bad.py', 'gone.py', '--name', 'word', bad='toq_k = 3\nflag = 1\n')
    said = str(e.value)
    for part in ("unknown knob 'batch_sise' (command line): did you mean batch_size?", "rate must be a number, got 'fast'",
                 "kind must be one of a, b, got 'c'", "unknown knob 'toq_k' (bad.py): did you mean top_k?",
                 'flag must be True or False, got 1', 'gone.py does not exist', '--name needs a value', "cannot read 'word'"):
        assert part in said, said


@pytest.mark.parametrize('text, said', [('rate = = 2', 'line 1: SyntaxError'), ('\nrate = 1 / 0', 'line 2: ZeroDivisionError'),
                                        ('x = \xff', 'NameError')])
def test_broken_config(run, text, said):
    with pytest.raises(UserError, match=said):
        run('broken.py', broken=text)


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'prepare/shakespeare_char.py', 'prepare/stdlib.py'])
def test_help(project, script):
    short, out = project.run(script, '--help')[0], project.run(script, '--help=all')[0]
    source = (project.root / script).read_text(encoding='utf-8')
    knobs = [name for name, _, _ in configurator.read_options(source) if name]
    assert len(knobs) >= 1 and all(f'--{name}=' in out and name in short for name in knobs)
    assert len(short.splitlines()) <= 30 and f'python {script}' in short
    for line in source.splitlines():  # a comment beside each knob is in the help
        if line.split(' ')[0].rstrip(':') in knobs and '  # ' in line:
            assert line.split('  # ')[1].strip() in out
    name = knobs[0]
    assert f'--{name}=' in project.run(script, f'--help={name}')[0]
    assert "no knob of" in project.fails(script, '--help=xyzzy')


def test_exit_status_and_one_sentence(project):
    said = project.fails('train.py', '--batch_size=two', '--lr=3')
    assert said.startswith('train.py: ') and 'batch_size must be a whole number' in said and 'unknown knob' in said
    assert 'did you mean config/shakespeare_char' in project.fails('train.py', 'config/shakespeare_chr.py')


def test_works_from_anywhere(project, tmp_path):
    out, _ = project.run('train.py', 'config/shakespeare_char_cpu.py', '--help=all', cwd=tmp_path)
    assert '--batch_size=' in out
