"""
Configuration: a script's knobs are the assignments at its top; config files and --key=value override them.

    # train.py                                            $ python train.py config/mine.py --batch_size=32 --compile
    batch_size = 12   # sequences a step
    ...
    config, explicit = configure(__file__, globals())

Config files are plain Python and are executed, in the order given; then --key=value in order. The type of a knob is that
of its default, or its annotation where it has one (int | None, Literal['a', 'b']). Every problem with
them is reported, not only the first. --help lists the knobs, --help=all prints each with its comment.
"""
import ast
import difflib
import io
import sys
import textwrap
import tokenize
import types
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

from pocket.errors import UserError, show_user_errors
from pocket.files import ROOT, find_path


def read_options(source):
    """[(name, type, comment)] for the assignments above the call of configure() in a script's source; None: a heading."""
    comments, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            own_line = not token.line[:token.start[1]].strip()
            (alone if own_line else comments)[token.start[0]] = token.string.lstrip('# ').strip()
    knobs, last = [], 0
    for node in ast.parse(source).body:
        if any(isinstance(part, ast.Call) and getattr(part.func, 'id', '') == 'configure' for part in ast.walk(node)):
            break
        if isinstance(node, ast.Assign):
            target, kind = node.targets[0], None
        elif isinstance(node, ast.AnnAssign):
            target, kind = node.target, eval(ast.unparse(node.annotation), {'Literal': Literal})
        else:
            last = node.end_lineno
            continue
        kind = kind if kind is not None else type(ast.literal_eval(node.value))
        headings = [alone[n] for n in range(last + 1, node.lineno) if n in alone]
        knobs += [(None, None, heading) for heading in headings[-1:] if knobs or last]
        knobs.append((target.id, kind, comments.get(node.end_lineno, '')))
        last = node.end_lineno
    return knobs


def describe(kind):
    """A knob's type in words: 'a whole number', 'one of adamw, muon', …"""
    if get_origin(kind) is Literal:
        return 'one of ' + ', '.join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return ' or '.join(describe(k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        return 'text (may be given several times)' if get_args(kind)[0] is str else 'whole numbers with commas between'
    return {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text', type(None): 'None'}[kind]


def convert(value, kind):
    """value as the knob's type, or ValueError. A str is what was typed after --key=; anything else comes from a file."""
    if get_origin(kind) in (Union, types.UnionType):
        for k in sorted(get_args(kind), key=lambda k: k is str):  # None before text: --top_k=None
            try:
                return convert(value, k)
            except ValueError:
                pass
        raise ValueError
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if value == choice and type(value) is type(choice) or value == str(choice):
                return choice
        raise ValueError
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if isinstance(value, str) and item is int:  # 2000,10000
            value = value.strip('()[] ').split(',') if value.strip('()[] ') else ()
        value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (tuple, list)) else (None,)
        return tuple(convert(v, item) for v in value)
    if kind is str:
        if not isinstance(value, str):
            raise ValueError
        return value
    if isinstance(value, str):
        if kind is bool:
            value = value.capitalize()  # true and false are as clear
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            if kind is not float:
                raise ValueError from None
            value = float(value)  # inf
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)  # 1e4
    if type(value) is not kind or kind is int and abs(value) >= 2**63:
        raise ValueError
    return value


def print_help(script, doc, knobs, namespace, asked):
    """The script's docstring, then its knobs. asked: 'all' for a line each, with the default and the comment; '' for that where
    it fits a screen, else for their names; or a word, for those that have it in their line. Raises UserError where none has."""
    lines = [(name, comment if name is None else f'  --{f"{name}={namespace[name]}":38} {comment}') for name, _, comment in knobs]
    if not asked:
        print(f'{(doc or "").strip()}\n\nusage: python {script} [config/FILE.py ...] [--key=value ...]\n')
    if not asked and len(lines) > 16:
        groups = [[]]
        for name, _, comment in knobs:
            groups += [[f'{comment.partition(":")[0]}:']] if name is None else []
            groups[-1] += [name] if name else []
        print(*(textwrap.fill(' '.join(group), 110, subsequent_indent='    ') for group in groups if group), sep='\n')
        print(f'\npython {script} --help=all explains each, --help=WORD those about it')
        return
    found = [line for name, line in lines if asked in ('', 'all') or name and asked.lower() in line.lower()]
    if not found:
        raise UserError(f'--help={asked}: no knob of {script} is about that; --help=all explains all of them')
    print(*found, sep='\n')


def configure(script_file, namespace, argv=None):
    """Override the knobs in `namespace` (a script's globals()) from argv. Returns {knob: value} and {knob: where it was set},
    the latter for the knobs that a config file or the command line named.

    After --help the script ends; bad input raises UserError with every problem found. Installs show_user_errors().
    """
    script = Path(script_file).name
    show_user_errors(script)
    argv = sys.argv[1:] if argv is None else argv
    knobs = read_options(Path(script_file).read_text(encoding='utf-8'))
    kinds = {name: kind for name, kind, _ in knobs if name}
    for arg in argv:
        if arg.partition('=')[0] in ('-h', '--help'):
            path = Path(script_file).resolve()
            name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else script
            print_help(name, namespace.get('__doc__'), knobs, namespace, arg.partition('=')[2])
            raise SystemExit(0)
    problems, explicit = [], {}

    def put(name, value, where, append=False):
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, 1)
            advice = f': did you mean {close[0]}?' if close else f'; python {script} --help lists them'
            problems.append(f'unknown knob {name!r} ({where}){advice}')
            return
        try:
            value = convert(value, kinds[name])
        except (ValueError, OverflowError):
            problems.append(f'{name} must be {describe(kinds[name])}, got {value!r} ({where})')
            return
        namespace[name] = namespace[name] + value if append else value
        explicit[name] = where

    for arg in (a for a in argv if not a.startswith('--')):
        path = find_path(arg)
        if arg.startswith('-') or not arg.endswith('.py'):
            problems.append(f'cannot read {arg!r}: write --key=value, or the path of a config file that ends in .py')
            continue
        if not path.is_file():
            there = sorted(p.stem for p in (ROOT / 'config').glob('*.py'))
            close = difflib.get_close_matches(Path(arg).stem, there, 1)
            advice = f'did you mean config/{close[0]}.py?' if close else f'in config/ there are {", ".join(there)}'
            problems.append(f'config file {arg} does not exist: {advice}')
            continue
        values = {name: namespace[name] for name in kinds}
        before = dict(values)
        try:
            exec(compile(path.read_bytes(), str(path), 'exec'), values)
        except (Exception, SystemExit) as e:  # it is somebody's program: anything can go wrong in it
            line = getattr(e, 'lineno', None)
            tb = e.__traceback__
            while line is None and tb is not None:
                line, tb = (tb.tb_lineno if tb.tb_frame.f_code.co_filename == str(path) else None), tb.tb_next
            problems.append(f'config file {arg}, line {line}: {type(e).__name__}: {e}')
            continue
        for name, value in values.items():
            private = not isinstance(name, str) or name.startswith('_') \
                or isinstance(value, (types.ModuleType, types.FunctionType, type))
            if not private and (name not in before or value is not before[name]):
                put(name, value, arg)
    seen = set()
    for arg in (a for a in argv if a.startswith('--')):
        name, equals, value = arg[2:].partition('=')
        name = name.replace('-', '_')
        if not equals:
            if name in kinds and bool not in (kinds[name], *get_args(kinds[name])):
                problems.append(f'{arg} needs a value: write {arg}=… ({describe(kinds[name])})')
                continue
            value = 'True'
        put(name, value, 'command line', append=name in seen and get_origin(kinds.get(name)) is tuple)
        seen.add(name)
    if problems:
        raise UserError('; '.join(problems))
    return {name: namespace[name] for name in kinds}, explicit
