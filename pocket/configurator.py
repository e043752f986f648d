"""
A script's options: assignments at its top, which config files and --key=value override.

    # train.py
    batch_size = 16        # [1, inf) windows per micro-batch
    dropout = 0.0          # [0, 1) on what each block adds to the residual stream
    ...
    config, explicit = configure(__file__, globals())

    $ python train.py config/mine.py --batch_size=32 --compile

Config files are plain Python and are executed, in the order given; then come the --key=value, in
order. An option has the type of its default value, or its annotation if it has one (int | None,
Literal['a', 'b']). Its comment may begin with the interval that its values must lie in: a square
bracket includes the bound, a round one excludes it. All problems are reported, not only the first.
--help lists the options, --help=all explains each.
"""
import ast
import difflib
import io
import re
import shlex
import sys
import textwrap
import tokenize
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

from pocket.errors import UserError, short_repr, show_user_errors
from pocket.files import ROOT, find_path

# --------------------------------------------------------------------------------------------------
# Reading the options of a script


@dataclass(frozen=True)
class Interval:
    """Which numbers an option may have.

    >>> interval = Interval(0, 1, includes_low=True, includes_high=False, text='[0, 1)')
    >>> 0 in interval, 0.5 in interval, 1 in interval, float('nan') in interval
    (True, True, False, False)
    """
    low: float
    high: float
    includes_low: bool
    includes_high: bool
    text: str  # as it was written

    def __contains__(self, number):
        if number == self.low:
            return self.includes_low
        if number == self.high:
            return self.includes_high
        return self.low < number < self.high  # nan is never between

    def __str__(self):
        return self.text


@dataclass(frozen=True)
class Option:
    """An option of a script or, if name is None, a heading between options (the comment)."""
    name: str | None
    type: object = None              # int, float | None, Literal['a', 'b'], tuple[str, ...], …
    comment: str = ''                # without the interval
    interval: Interval | None = None

    def explanation(self):
        """The whole comment, as --help shows it."""
        if self.interval is None:
            return self.comment
        return f'{self.interval} {self.comment}'.rstrip()


def read_options(source):
    """The options in a script's source, and the headings above them: a list of Option.

    They are the assignments above the call of configure(). A comment on a line of its own is a
    heading.

    >>> options = read_options('''
    ... "A script."
    ... # Sizes
    ... batch_size = 16              # [1, inf) rows
    ... max_epochs: float | None = None  # so many
    ... configure(__file__, globals())
    ... ''')
    >>> for option in options:
    ...     print([option.name, option.type, str(option.interval), option.comment])
    [None, None, 'None', 'Sizes']
    ['batch_size', <class 'int'>, '[1, inf)', 'rows']
    ['max_epochs', float | None, 'None', 'so many']
    """
    behind_code, on_own_line = read_comments(source)
    options = []
    previous_end = 0  # the line that the previous statement ends on
    for node in ast.parse(source).body:
        if calls_configure(node):
            break
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
            kind = type(ast.literal_eval(node.value))
        elif isinstance(node, ast.AnnAssign):
            name = node.target.id
            kind = eval(ast.unparse(node.annotation), {'Literal': Literal})
        else:
            previous_end = node.end_lineno
            continue

        above = range(previous_end + 1, node.lineno)
        headings = [on_own_line[line] for line in above if line in on_own_line]
        if headings and previous_end > 0:  # a comment at the top of the file is no heading
            options.append(Option(None, comment=headings[-1]))

        interval, comment = parse_interval(behind_code.get(node.end_lineno, ''))
        options.append(Option(name, kind, comment, interval))
        previous_end = node.end_lineno
    return options


def read_comments(source):
    """Two dicts {line number: comment}: those behind code, and those on a line of their own."""
    behind_code = {}
    on_own_line = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, column = token.start
        text = token.string.lstrip('# ').strip()
        if token.line[:column].strip():
            behind_code[line] = text
        else:
            on_own_line[line] = text
    return behind_code, on_own_line


def calls_configure(node):
    """Whether a statement calls configure()."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and getattr(part.func, 'id', '') == 'configure':
            return True
    return False


def parse_interval(comment):
    """(Interval, the rest of the comment); (None, comment) if it does not begin with an interval.

    >>> interval, rest = parse_interval('(0, inf) minutes')
    >>> print(interval.low, interval.high, rest)
    0.0 inf minutes
    >>> parse_interval('(so far) a comment')
    (None, '(so far) a comment')
    """
    match = re.match(r'[\[(]([^,()\[\]]+),([^,()\[\]]+)[\])]', comment)
    if match is None:
        return None, comment
    try:
        low = float(match[1])
        high = float(match[2])
    except ValueError:  # words in brackets
        return None, comment
    text = match[0]
    interval = Interval(low, high, text.startswith('['), text.endswith(']'), text)
    return interval, comment[len(text):].lstrip()


# --------------------------------------------------------------------------------------------------
# Types and ranges

TOO_LARGE = 'too large for 64 bits'


def describe(kind):
    """An option's type in words.

    >>> describe(int | None)
    'a whole number or None'
    >>> describe(Literal['adamw', 'muon'])
    'one of adamw, muon'
    """
    if get_origin(kind) is Literal:
        return 'one of ' + ', '.join(str(choice) for choice in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return ' or '.join(describe(member) for member in get_args(kind))
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if item is int:
            return 'whole numbers separated by commas'
        return f'{describe(item)} (may be given several times)'
    words = {
        int: 'a whole number',
        float: 'a number',
        bool: 'True or False',
        str: 'text',
        type(None): 'None',
    }
    return words[kind]


def convert(value, kind):
    """value as the type of an option. Raises ValueError if it can't be.

    A str is what the user typed after --key=, or text from a config file; anything else comes from
    a config file or a checkpoint.

    >>> convert('1e3', int), convert(1, float), convert('none', str), convert('None', int | None)
    (1000, 1.0, 'none', None)
    >>> convert('2000,10000', tuple[int, ...])
    (2000, 10000)
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return convert_to_any(value, get_args(kind))
    if origin is Literal:
        return convert_to_choice(value, get_args(kind))
    if origin is tuple:
        return convert_to_tuple(value, get_args(kind)[0])
    if isinstance(value, str) and kind is not str:
        value = parse(value, kind)

    # Numbers may change their type if that loses nothing: 1 is a float, and 1e4 an int
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise ValueError('too large for a float') from None
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)

    if type(value) is not kind:
        raise ValueError(f'not {describe(kind)}')
    if kind is int and abs(value) >= 2**63:
        raise ValueError(TOO_LARGE)
    return value


def convert_to_any(value, kinds):
    """value as the first of the kinds that it can be. Text comes last: --top_k=None means None."""
    for kind in sorted(kinds, key=lambda kind: kind is str):
        try:
            return convert(value, kind)
        except ValueError:
            continue
    raise ValueError('none of the types fits')


def convert_to_choice(value, choices):
    """The one of the choices that is equal to value, or written so."""
    for choice in choices:
        if value == str(choice):
            return choice
        if value == choice and type(value) is type(choice):  # 1 == True, but they are not the same
            return choice
    raise ValueError('none of the choices')


def convert_to_tuple(value, kind):
    """A tuple of values of one kind, from a tuple or list, from one text, or from '2000,10000'."""
    if isinstance(value, str):
        if kind is int:
            numbers = value.strip('()[] ')
            value = numbers.split(',') if numbers else ()
        else:
            value = (value,)
    if not isinstance(value, (tuple, list)):
        raise ValueError('not a list')
    return tuple(convert(item, kind) for item in value)


def parse(text, kind):
    """The Python value that a text stands for, such as 3, 0.5, True or None."""
    text = text.strip()
    if kind is bool:
        text = text.capitalize()  # true and false are just as clear
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if kind is float:
            return float(text)  # inf and nan are no literals
        raise ValueError(f'not {describe(kind)}') from None


def check_value(value, option, source=None):
    """A sentence if a value is out of the option's range, else None.

    value: already of the option's type; numbers are checked, None and text are in any range.
    source: where the value comes from, for the sentence.

    >>> rate = Option('rate', float | None, interval=parse_interval('(0, 1]')[0])
    >>> check_value(1.5, rate, 'command line')
    'rate must be in (0, 1] or None, got 1.5 (command line)'
    """
    if option.interval is None:
        return None
    items = value if isinstance(value, tuple) else (value,)
    numbers = [item for item in items if type(item) in (int, float)]
    if all(number in option.interval for number in numbers):
        return None

    problem = f'{option.name} must be in {option.interval}'
    if type(None) in get_args(option.type):
        problem += ' or None'
    problem += f', got {short_repr(value)}'
    if source is not None:
        problem += f' ({source})'
    return problem


def check_ranges(options, values, source=None):
    """check_value() for a dict {name: value}: a list of problems, empty if there are none.

    Names that are no options, and options without a value, are skipped.
    """
    problems = []
    for option in options:
        if option.name in values:
            problem = check_value(values[option.name], option, source)
            if problem is not None:
                problems.append(problem)
    return problems


# --------------------------------------------------------------------------------------------------
# --help


def command_for(script_file):
    """How to run a script: 'python prepare/text.py', or 'python -m pocket.plot' for a module."""
    path = Path(script_file).resolve()
    if not path.is_relative_to(ROOT):
        return f'python {path.name}'
    path = path.relative_to(ROOT)
    if path.parts[0] == 'pocket':
        return 'python -m ' + '.'.join(path.with_suffix('').parts)
    return f'python {path.as_posix()}'


def print_help(command, doc, options, namespace, word):
    """Print what --help, --help=all or --help=WORD asks for (word: '', 'all' or WORD).

    Raises UserError if no option mentions the word.
    """
    lines = []
    for option in options:
        if option.name is None:
            lines.append(option.comment)
        else:
            assignment = f'{option.name}={namespace[option.name]}'
            lines.append(f'  --{assignment:38} {option.explanation()}'.rstrip())

    if word == 'all':
        print('\n'.join(lines))
    elif word:
        found = [line for option, line in zip(options, lines)
                 if option.name is not None and word.lower() in line.lower()]
        if not found:
            raise UserError(f'--help={word}: no option mentions that; '
                            f'{command} --help=all explains all of them')
        print('\n'.join(found))
    else:
        print((doc or '').strip())
        print(f'\nusage: {command} [config/FILE.py ...] [--key=value ...]\n')
        if len(lines) <= 16:
            print('\n'.join(lines))
        else:  # more than a screen: names only
            print_names(options)
            print(f'\n{command} --help=all explains each, --help=WORD those that mention a word')


def print_names(options):
    """Print the names of all options, a paragraph for each heading."""
    paragraphs = [[]]
    for option in options:
        if option.name is None:
            title = option.comment.partition(':')[0]
            paragraphs.append([f'{title}:'])
        else:
            paragraphs[-1].append(option.name)
    for words in paragraphs:
        if words:
            print(textwrap.fill(' '.join(words), 100, subsequent_indent='    '))


# --------------------------------------------------------------------------------------------------
# Overriding


def configure(script_file, namespace, argv=None):
    """Override the options in namespace, a script's globals(), as argv says (None: sys.argv[1:]).

    Returns two dicts: {option: value}, and {option: source} for those that a config file or the
    command line sets. Ends the script after --help. Raises UserError with every problem found, and
    installs show_user_errors(), which shows it.
    """
    show_user_errors(Path(script_file).name)
    command = command_for(script_file)
    options = read_options(Path(script_file).read_text(encoding='utf-8'))
    if argv is None:
        sys.argv[1:] = join_values(sys.argv[1:], options)  # for all who look at them later, too
        argv = sys.argv[1:]
    else:
        argv = join_values(argv, options)

    for argument in argv:
        name, _, word = argument.partition('=')
        if name in ('-h', '--help'):
            print_help(command, namespace.get('__doc__'), options, namespace, word)
            raise SystemExit(0)

    overrides = Overrides(command, options, namespace)
    for argument in argv:
        if not argument.startswith('--'):
            overrides.read_config_file(argument)
    for argument in argv:
        if argument.startswith('--'):
            overrides.read_argument(argument)
    if overrides.problems:
        raise UserError('; '.join(overrides.problems))

    config = {name: namespace[name] for name in overrides.options}
    return config, overrides.explicit


def join_values(argv, options):
    """Arguments in which '--key value', as other programs have it, has become '--key=value'.

    >>> options = [Option('device', str), Option('resume', bool)]
    >>> join_values(['--device', 'cpu', '--resume', 'config/mine.py'], options)
    ['--device=cpu', '--resume', 'config/mine.py']
    """
    types = {option.name: option.type for option in options if option.name is not None}
    joined = []
    for argument in argv:
        previous = joined[-1] if joined else ''
        lacks_value = previous.startswith('--') and '=' not in previous
        name = previous.removeprefix('--').replace('-', '_')
        # After an option that can be True, or that we don't know, a config file is none
        needs_value = name in types and not can_be_true(types[name])
        is_value = not argument.startswith('--') and (needs_value or not names_config(argument))
        if lacks_value and is_value:
            joined[-1] = f'{previous}={argument}'
        else:
            joined.append(argument)
    return joined


def can_be_true(kind):
    """Whether an option of this type may stand without a value: --resume is --resume=True."""
    return kind is bool or bool in get_args(kind)


def names_config(argument):
    """Whether an argument is the path of a config file, or the bare name of one in config/."""
    return argument.endswith('.py') or find_config(argument) is not None


def find_config(argument):
    """'config/mine.py' for 'mine' and the like, if there is such a file of ours; else None.

    >>> find_config('shakespeare_char'), find_config('config/shakespeare_char'), find_config('mine')
    ('config/shakespeare_char.py', 'config/shakespeare_char.py', None)
    """
    match = re.fullmatch(r'(?:config/)?(\w{1,100})(?:\.py)?', argument)
    if match and (ROOT / 'config' / f'{match[1]}.py').is_file():
        return f'config/{match[1]}.py'
    return None


# What other programs call our options: the first of these that a script has
SYNONYMS = {
    'lr': ['learning_rate'],
    'epochs': ['max_epochs'],
    'num_epochs': ['max_epochs'],
    'steps': ['max_iters'],
    'bs': ['batch_size'],
    'prompt': ['start', 'sample_start'],
    'temp': ['temperature'],
    'n': ['num_samples'],
    'num_return_sequences': ['num_samples'],
    'max_tokens': ['max_new_tokens'],
    'max_length': ['max_new_tokens'],
    'length': ['max_new_tokens'],
    'model': ['init_from'],
    'checkpoint': ['out_dir', 'init_from'],
    'output_dir': ['out_dir'],
    'output': ['to'],
    'grad_accum': ['gradient_accumulation_steps'],
    'context': ['block_size'],
    'beams': ['num_beams'],
    'file': ['input'],
}

# What a word without an option in front of it means to say, if a script has such an option
WORDS = ('run', 'input', 'start')


class Overrides:
    """Sets options in a script's namespace, and collects the problems with what it is given."""

    def __init__(self, command, options, namespace):
        self.command = command
        self.options = {option.name: option for option in options if option.name is not None}
        self.namespace = namespace
        self.explicit = {}     # {option: the config file, or 'command line'}
        self.problems = []     # sentences
        self.typed = set()     # options that the command line has named so far

    def set(self, name, value, source, append=False):
        """Give an option a value, or add to the tuple that it has."""
        if name not in self.options:
            self.problems.append(f'unknown option {name!r} ({source}): {self.advise_name(name)}')
            return
        option = self.options[name]
        try:
            value = convert(value, option.type)
        except ValueError as e:
            expected = describe(option.type)
            if str(e) == TOO_LARGE:
                expected += ' of at most 64 bits'
            self.problems.append(f'{name} must be {expected}, '
                                 f'got {short_repr(value)} ({source})')
            return
        problem = check_value(value, option, source)
        if problem is not None:
            self.problems.append(problem)
            return

        if append:
            value = self.namespace[name] + value
        self.namespace[name] = value
        self.explicit[name] = source

    def advise_name(self, name):
        """What to say about an option that does not exist."""
        if name.startswith('no_') and name[3:] in self.options:
            return f'did you mean {name[3:]}=False?'
        similar = [option for option in SYNONYMS.get(name, []) if option in self.options]
        similar += difflib.get_close_matches(name, self.options, 1)
        if similar:
            return f'did you mean {similar[0]}?'
        return f'{self.command} --help lists them'

    def advise_word(self, argument):
        """What to say about an argument that is neither an option nor a config file."""
        name, equals, value = argument.lstrip('-').partition('=')
        if name.replace('-', '_') in self.options:
            return f'write --{name}={value if equals else "…"}'
        is_run = argument.startswith('out/') or find_path(argument).is_dir()
        if is_run and 'out_dir' in self.options:
            return f'write --out_dir={argument}'
        for option in WORDS:
            if option in self.options:
                return f'write --{option}={shlex.quote(argument)}'
        advice = 'write --key=value, or the path of a config file that ends in .py'
        similar = similar_config(argument)
        if similar:
            advice += f'; did you mean {similar}?'
        return advice

    def read_argument(self, argument):
        """--key=value, or --key alone for what can be True."""
        name, equals, value = argument[2:].partition('=')
        name = name.replace('-', '_')
        kind = self.options[name].type if name in self.options else bool
        if not equals:
            if not can_be_true(kind):
                expected = describe(kind)
                self.problems.append(f'{argument} needs a value: write {argument}=… ({expected})')
                return
            value = 'True'

        # A repeated option with several values collects them: --start=one --start=two
        repeated = name in self.typed and get_origin(kind) is tuple
        self.set(name, value, 'command line', append=repeated)
        self.typed.add(name)

    def read_config_file(self, argument):
        """Execute a config file and set the options that it assigns to.

        The bare name of one in config/ will do.
        """
        try:
            path = find_path(argument)
            if not path.is_file() and find_config(argument):
                argument = find_config(argument)
                path = ROOT / argument
        except UserError as e:
            self.problems.append(str(e))
            return
        if argument.startswith('-') or not argument.endswith('.py'):
            self.problems.append(f'cannot read {argument!r}: {self.advise_word(argument)}')
            return
        if not path.is_file():
            self.problems.append(f'config file {argument} does not exist: {advise_config(path)}')
            return

        # It sees the options as they are, and can compute with them
        before = {name: self.namespace[name] for name in self.options}
        after = dict(before)
        try:
            exec(compile(path.read_bytes(), str(path), 'exec'), after)
        except KeyboardInterrupt:  # Ctrl-C
            raise
        except BaseException as e:  # it is a program: anything can go wrong in it
            place = f'config file {argument}'
            line = line_of(e, path)
            if line is not None:
                place += f', line {line}'
            self.problems.append(f'{place}: {type(e).__name__}: {text_of(e)}')
            return

        for name, value in after.items():
            if name in before and value is before[name]:
                continue  # unchanged
            if not is_private(name, value):
                self.set(name, value, argument)


def text_of(error):
    """str() of an exception of a config file, which can fail, as anything there."""
    try:
        return str(error)
    except Exception:
        return 'no explanation'


def is_private(name, value):
    """Whether a name in a config file is its own affair: _name, an import, a function, a class."""
    if not isinstance(name, str) or name.startswith('_'):
        return True
    return isinstance(value, (types.ModuleType, types.FunctionType, type))


def line_of(error, path):
    """The line of a config file that an exception comes from; None if that is unknown."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == str(path):
            return line
    return None


def similar_config(name):
    """The config file of ours with a similar name, or None."""
    existing = [config.stem for config in (ROOT / 'config').glob('*.py')]
    for stem in difflib.get_close_matches(Path(name).stem, existing, 1):
        return f'config/{stem}.py'
    return None


def advise_config(path):
    """What to say about a config file that does not exist."""
    similar = similar_config(path)
    if similar:
        return f'did you mean {similar}?'
    existing = sorted(config.stem for config in (ROOT / 'config').glob('*.py'))
    return f'in config/ there are {", ".join(existing)}'
