"""
Options: their types and ranges, config files, the command line, --help, and what mistakes lead to.

    pytest -n 0 tests/test_configurator.py
"""
import doctest
import math
import sys
from typing import Literal

import pytest

from pocket import configurator, errors, files
from pocket.configurator import check_ranges, configure, convert, describe, read_options
from pocket.errors import UserError

OPTIONS = '''"""Does nothing."""
from typing import Literal
# Sizes
batch_size = 12      # rows per step
rate = 0.5           # learning rate
# Words
name = 'x'           # what it is called
kind: Literal['a', 'b'] = 'a'
top_k: int | None = 200
flag = False
either: bool | Literal['auto'] = 'auto'
many: tuple[str, ...] = ('',)
'''

RANGES = '''"""Options with every kind of interval."""
from typing import Literal
both = 1.0                           # [0, 2] both bounds are included
neither = 1.0                        # (0, 2) neither is
low: float = 1.0                     # [0, 2) the lower one is
high = 1.0                           # (0, 2] the higher one is
at_least = 16                        # [1, inf) a whole number
unlimited = 1.0                      # [0, inf] inf is included, nan is not
minutes: float | None = None         # (0, inf) or so many
cuts: tuple[int, ...] = ()           # [1, 100] each of them
mode: int | Literal['auto'] = 'auto'  # [0, 8]
free = 1.0                           # (0: no limit) is no interval
'''

END = '''configure(__file__, globals())
not_an_option = 3
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*argv, options=OPTIONS, NAME=TEXT): what configure() returns; the texts are config files NAME.py."""
    monkeypatch.setattr(configurator, 'show_user_errors', lambda script: None)
    monkeypatch.chdir(tmp_path)

    def run(*argv, options=OPTIONS, **config_files):
        (tmp_path / 'script.py').write_text(options + END, encoding='utf-8')
        for name, text in config_files.items():
            (tmp_path / f'{name}.py').write_text(text, encoding='utf-8')
        namespace = {}
        exec(options, namespace)
        return configure(str(tmp_path / 'script.py'), namespace, list(argv))
    return run


def problem_with(run, *argv, **kwargs):
    """The message of the UserError that run(*argv) raises."""
    with pytest.raises(UserError) as e:
        run(*argv, **kwargs)
    return str(e.value)


@pytest.mark.parametrize('module', [configurator, errors, files])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


# --------------------------------------------------------------------------------------------------
# Values

@pytest.mark.parametrize('argument, name, value', [
    ('--batch_size=3', 'batch_size', 3),
    ('--batch_size=1e3', 'batch_size', 1000),
    ('--batch-size=3', 'batch_size', 3),
    ('--rate=1', 'rate', 1.0),
    ('--rate=3e-4', 'rate', 3e-4),
    ('--rate=inf', 'rate', math.inf),
    ('--name=123', 'name', '123'),
    ('--name=a=b', 'name', 'a=b'),
    ('--name=', 'name', ''),
    ('--name=--x', 'name', '--x'),
    ('--kind=b', 'kind', 'b'),
    ('--top_k=None', 'top_k', None),
    ('--top_k=5', 'top_k', 5),
    ('--flag', 'flag', True),
    ('--flag=True', 'flag', True),
    ('--flag=false', 'flag', False),
    ('--either=False', 'either', False),
    ('--either', 'either', True),
    ('--either=auto', 'either', 'auto'),
    ('--many=one', 'many', ('one',)),
    ('--many=[1]', 'many', ('[1]',)),
])
def test_values_on_the_command_line(run, argument, name, value):
    config, explicit = run(argument)
    assert config[name] == value
    assert type(config[name]) is type(value)
    assert explicit == {name: 'command line'}


def test_config_files_come_first_then_the_command_line_in_order(run):
    text = 'rate = 1\nbatch_size = batch_size * 2'
    config, explicit = run('--rate=2', '--many=a', 'one.py', '--rate=3', '--many=b', one=text)
    assert config['rate'] == 3.0
    assert config['batch_size'] == 24
    assert config['many'] == ('a', 'b')
    assert explicit['batch_size'] == 'one.py'
    assert explicit['rate'] == 'command line'
    assert 'not_an_option' not in config


def test_a_config_file_may_compute(run):
    config, _ = run('c.py', c="many = ('one', 'two')")
    assert config['many'] == ('one', 'two')
    text = 'import math\ndef double(x):\n    return 2 * x\n_half = 4\nbatch_size = double(_half)\nrate = 1'
    config, _ = run('c.py', c=text)
    assert config['batch_size'] == 8
    assert config['rate'] == 1.0
    assert type(config['rate']) is float


def test_all_problems_are_reported_at_once(run):
    message = problem_with(run, '--batch_sise=3', '--rate=fast', '--kind=c', 'bad.py', 'gone.py',
                           'word', '--name', bad='toq_k = 3\nflag = 1\n')
    for part in (
        "unknown option 'batch_sise' (command line): did you mean batch_size?",
        "rate must be a number, got 'fast' (command line)",
        "kind must be one of a, b, got 'c'",
        "unknown option 'toq_k' (bad.py): did you mean top_k?",
        'flag must be True or False, got 1',
        'gone.py does not exist',
        '--name needs a value',
        "cannot read 'word'",
    ):
        assert part in message, message


@pytest.mark.parametrize('text, message', [
    ('rate = = 2', 'line 1: SyntaxError'),
    ('\nrate = 1 / 0', 'line 2: ZeroDivisionError'),
    ('def f():\n    return 1 / 0\nf()', 'line 3: ZeroDivisionError'),
    ('x = \xff', 'line 1: NameError'),
    ('import json\njson.loads("{")', 'line 2: JSONDecodeError'),
    ('raise SystemExit', 'line 1: SystemExit'),
])
def test_a_broken_config_file_is_named_with_its_line(run, text, message):
    assert f'config file broken.py, {message}' in problem_with(run, 'broken.py', broken=text)


def test_a_config_file_with_an_impossible_name(run):
    message = problem_with(run, 'a\0b.py', '--rate=fast')
    assert "can't be a path" in message
    assert 'rate must be a number' in message


# --------------------------------------------------------------------------------------------------
# Ranges

@pytest.mark.parametrize('name, inside, outside', [
    ('both', ['0', '2', '1.5'], ['-0.1', '2.1', 'inf', 'nan']),
    ('neither', ['0.1', '1.9'], ['0', '2', 'nan']),
    ('low', ['0', '1.9'], ['2', '-1', 'nan']),
    ('high', ['0.1', '2'], ['0', '3', 'nan']),
    ('at_least', ['1', '1e6', str(2**63 - 1)], ['0', '-5']),
    ('unlimited', ['0', 'inf'], ['-inf', '-1e-9', 'nan']),
    ('minutes', ['None', '0.5'], ['0', '-1', 'inf', 'nan']),
    ('cuts', ['', '1', '1,100'], ['0', '5,101']),
    ('mode', ['auto', '8'], ['9']),
    ('free', ['-5', 'inf', 'nan'], []),
])
def test_ranges(run, name, inside, outside):
    for text in inside:
        run(f'--{name}={text}', options=RANGES)
    for text in outside:
        message = problem_with(run, f'--{name}={text}', options=RANGES)
        assert message.startswith(f'{name} must be in '), message


@pytest.mark.parametrize('argument, message', [
    ('--low=2', 'low must be in [0, 2), got 2.0 (command line)'),
    ('--unlimited=nan', 'unlimited must be in [0, inf], got nan (command line)'),
    ('--minutes=-1', 'minutes must be in (0, inf) or None, got -1.0 (command line)'),
    ('--cuts=5,101', 'cuts must be in [1, 100], got (5, 101) (command line)'),
    ('--at_least=x', "at_least must be a whole number, got 'x' (command line)"),
])
def test_the_message_names_value_range_and_source(run, argument, message):
    assert problem_with(run, argument, options=RANGES) == message


def test_values_of_config_files_must_be_in_range_too(run):
    text = 'high = 3\nminutes = 0\nboth = 2\nneither = 2\n'
    message = problem_with(run, 'c.py', '--low=5', options=RANGES, c=text)
    assert message.split('; ') == [
        'neither must be in (0, 2), got 2.0 (c.py)',
        'high must be in (0, 2], got 3.0 (c.py)',
        'minutes must be in (0, inf) or None, got 0.0 (c.py)',
        'low must be in [0, 2), got 5.0 (command line)',
    ]
    config, _ = run('c.py', options=RANGES, c='minutes = None\nhigh = 2')
    assert config['minutes'] is None
    assert config['high'] == 2.0


def test_check_ranges_for_values_of_a_checkpoint():
    options = read_options(RANGES + END)
    good = {'both': 2.0, 'minutes': None, 'cuts': (1, 100), 'mode': 'auto', 'something_else': -1}
    assert check_ranges(options, good) == []
    bad = {**good, 'both': math.nan, 'at_least': 0}
    assert check_ranges(options, bad, 'last.pt') == [
        'both must be in [0, 2], got nan (last.pt)',
        'at_least must be in [1, inf), got 0 (last.pt)',
    ]
    assert check_ranges(options, {'at_least': 0}) == ['at_least must be in [1, inf), got 0']


def test_read_options():
    options = read_options(OPTIONS + END)
    assert [option.name for option in options] == [
        None, 'batch_size', 'rate', None, 'name', 'kind', 'top_k', 'flag', 'either', 'many']
    assert options[0].comment == 'Sizes'
    assert options[1].type is int
    assert options[1].comment == 'rows per step'
    assert options[5].type == Literal['a', 'b']

    by_name = {option.name: option for option in read_options(RANGES + END)}
    assert by_name['low'].comment == 'the lower one is'  # without the interval
    assert str(by_name['low'].interval) == '[0, 2)'
    assert by_name['mode'].comment == ''
    assert by_name['free'].interval is None
    assert by_name['free'].comment == '(0: no limit) is no interval'


@pytest.mark.parametrize('value, kind', [
    (10**400, float), (2**63, int), (1.5, int), (True, int), (1, bool), (None, int), ('x', float),
    (3, str), ([1, 'x'], tuple[int, ...]), (None, tuple[str, ...]), ('c', Literal['a', 'b']),
    (True, Literal[1]), ('[' * 10**5, int), ('9' * 5000, int), ('\ud800', float),
])
def test_convert_raises_value_error(value, kind):
    with pytest.raises(ValueError):
        convert(value, kind)


def test_describe():
    assert describe(tuple[str, ...]) == 'text (may be given several times)'
    assert describe(tuple[int, ...]) == 'whole numbers separated by commas'
    assert describe(bool | Literal['auto']) == 'True or False or one of auto'


# --------------------------------------------------------------------------------------------------
# --help, and real scripts

@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'prepare/shakespeare_char.py', 'prepare/stdlib.py'])
def test_help(project, script):
    short, _ = project.run(script, '--help')
    long, _ = project.run(script, '--help=all')
    source = (project.root / script).read_text(encoding='utf-8')
    names = [option.name for option in read_options(source) if option.name is not None]
    assert len(names) >= 1
    for name in names:
        assert name in short
        assert f'--{name}=' in long
    assert len(short.splitlines()) <= 30
    assert f'python {script}' in short

    for line in source.splitlines():  # the comment beside each option, with its interval
        if line.split(' ')[0].rstrip(':') in names and '  # ' in line:
            assert line.split('  # ')[1].strip() in long

    about_one, _ = project.run(script, f'--help={names[0]}')
    assert f'--{names[0]}=' in about_one
    assert 'no option mentions that' in project.fails(script, '--help=xyzzy')


def test_help_shows_intervals(run, capsys):
    with pytest.raises(SystemExit) as e:
        run('--help', options=RANGES)
    assert e.value.code == 0
    help_text = capsys.readouterr().out
    assert '[0, 2) the lower one is' in help_text
    assert '(0, inf) or so many' in help_text


@pytest.mark.parametrize('module', ['pocket.plot', 'pocket.memory'])
def test_modules_say_how_they_are_run(project, module):
    out, _ = project.run('-m', module, '--help')
    assert f'usage: python -m {module} [config/FILE.py ...]' in out


def test_mistakes_end_in_one_sentence_and_status_2(project):
    message = project.fails('train.py', '--batch_size=two', '--lr=3')
    assert message.startswith('train.py: ')
    assert 'batch_size must be a whole number' in message
    assert "unknown option 'lr'" in message
    message = project.fails('train.py', 'config/shakespeare_chr.py')
    assert 'did you mean config/shakespeare_char' in message


def test_config_files_are_found_from_any_folder(project, tmp_path):
    out, _ = project.run('train.py', 'config/shakespeare_char_cpu.py', '--help=all', cwd=tmp_path)
    assert '--batch_size=' in out


def test_nothing_heavy_is_imported():
    """--help and mistakes are answered at once: the configurator never imports torch."""
    import subprocess
    code = 'import sys, pocket.configurator; print([name for name in ("torch", "numpy", "requests") if name in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], cwd=configurator.ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == '[]'


# --------------------------------------------------------------------------------------------------
# What people type who come from other programs


@pytest.mark.parametrize('typed, expected', [
    (['--batch_size', '32'], {'batch_size': 32}),
    (['--batch-size', '32', '--flag'], {'batch_size': 32, 'flag': True}),
    (['--flag', 'False', '--name', 'y'], {'flag': False, 'name': 'y'}),
    (['--either', 'auto', '--top_k', 'None'], {'either': 'auto', 'top_k': None}),
    (['--many', 'a', '--many', 'b'], {'many': ('a', 'b')}),
])
def test_a_value_may_follow_after_a_space(run, typed, expected):
    config, _ = run(*typed)
    for name, value in expected.items():
        assert config[name] == value


def test_a_flag_does_not_swallow_the_config_file_behind_it(run):
    config, explicit = run('--flag', 'mine.py', mine='batch_size = 3\n')
    assert config['flag'] is True
    assert config['batch_size'] == 3


@pytest.mark.parametrize('typed', [['--lr=0.1'], ['--lr', '0.1']])
def test_options_of_other_programs_are_told_their_name_here(run, typed):
    message = problem_with(run, *typed, options=OPTIONS + 'learning_rate = 0.1\n')
    assert message == "unknown option 'lr' (command line): did you mean learning_rate?"


@pytest.mark.parametrize('option, typed, advice', [
    ('start = ()', '--prompt=x', 'did you mean start?'),
    ('sample_start = ""\ndropout = 0.0', '--prompt=x', 'did you mean sample_start?'),
    ('compile = True', '--no-compile', 'did you mean compile=False?'),
    ('compile = True', '--compile=x', 'compile must be True or False'),
    ('batch_size = 1', 'batch_size=8', 'write --batch_size=8'),
    ('batch_size = 1', '-batch_size=8', 'write --batch_size=8'),
    ('start = ()', 'Romeo and Juliet', "write --start='Romeo and Juliet'"),
    ('input = ()', 'novel.txt', 'write --input=novel.txt'),
    ('out_dir = ""\nstart = ()', 'out/mine', 'write --out_dir=out/mine'),
    ('batch_size = 1', 'shakespeare_chr', 'did you mean config/shakespeare_char'),
])
def test_what_is_typed_in_another_way_gets_the_right_one(run, option, typed, advice):
    assert advice in problem_with(run, typed, options=f'{option}\n')


def test_a_word_after_a_flag_is_its_value_unless_it_names_a_config_file(run):
    assert "flag must be True or False, got 'no'" in problem_with(run, '--flag', 'no')
    assert 'flag must be' not in problem_with(run, '--flag', 'shakespeare_char', '--rate=fast')


def test_the_bare_name_of_a_config_will_do(project):
    config = project.root / 'config' / 'mine.py'
    config.write_text('dataset = "toy"\nmax_iters = 1\nblock_size = 8\n', encoding='utf-8')
    out, _ = project.run('train.py', 'mine', '--device', 'cpu', '--n_layer', '1')
    assert 'out/mine' in out.replace('\\', '/')
    for typed in ('mine.py', 'config/mine'):
        assert project.fails('train.py', typed, '--foo').startswith("train.py: unknown option 'foo'")
    assert (project.root / 'out' / 'mine' / 'last.pt').is_file()


def test_plot_says_how_a_run_is_named(project):
    err = project.fails('-m', 'pocket.plot', 'out/stdlib')
    assert 'write --run=out/stdlib' in err


@pytest.mark.parametrize('text, message', [
    ('batch_size = 10**5000', 'of at most 64 bits, got a number too long to show'),
    ('name = [[1] * 10**6] * 10**6', r'name must be text, got \[\[1, 1, 1, 1, 1, 1, \.\.\.\]'),
    ('class Odd:\n    def __repr__(self): 1 / 0\nname = Odd()', 'name must be text, got '),
    ('raise GeneratorExit', 'config file mine.py, line 1: GeneratorExit'),
    ('class Odd(Exception):\n    def __str__(self): 1 / 0\nraise Odd', 'Odd: no explanation'),
])
def test_config_file_with_odd_objects(run, text, message):
    with pytest.raises(UserError, match=message):
        run('mine.py', mine=text)


def test_control_c_while_a_config_file_runs(run):
    with pytest.raises(KeyboardInterrupt):
        run('mine.py', mine='raise KeyboardInterrupt')


def test_number_beyond_64_bits_is_called_that(run):
    with pytest.raises(UserError, match='a whole number of at most 64 bits, got .1e30.'):
        run('--batch_size=1e30')


@pytest.mark.parametrize('error, sentence', [
    (PermissionError(13, 'Permission denied', '/closed/x'), 'cannot use /closed/x: Permission denied'),
    (OSError(40, 'Too many levels of symbolic links', 'a\x1b'), None),
])
def test_files_that_the_system_refuses_are_a_sentence(error, sentence):
    text, status = errors.explain(type(error), error)
    assert status == 2 and '\x1b' not in text
    assert sentence in (None, text)


def test_a_package_that_is_not_installed_is_a_sentence():
    missing = ModuleNotFoundError("No module named 'torch'", name='torch')
    text, status = errors.explain(ModuleNotFoundError, missing)
    assert status == 2 and 'torch is not installed' in text and 'requirements.txt' in text
    ours = ModuleNotFoundError("No module named 'modle'", name='modle')
    assert errors.explain(ModuleNotFoundError, ours) is None


def test_errors_of_our_own_keep_their_traceback():
    assert errors.explain(FileNotFoundError, FileNotFoundError(2, 'No such file', 'x')) is None
    assert errors.explain(ValueError, ValueError('a bug')) is None
