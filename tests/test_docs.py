"""
The documentation: names that exist, examples that run, lists that agree. README's commands:
test_readme.py.

    pytest -n 0 tests/test_docs.py
"""
import ast
import doctest
import functools
import importlib
import json
import re

import pytest
from conftest import CHECKOUT, TINY, Project

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

# Not LOG.md: it is history, with the names of its time
PAGES = [path for path in sorted((CHECKOUT / 'docs').glob('*.md')) if path.name != 'LOG.md']
PAGES += [CHECKOUT / 'CONTRIBUTING.md', CHECKOUT / 'CHANGELOG.md']
MODULES = [CHECKOUT / 'model.py', *sorted(CHECKOUT.glob('pocket/*.py'))]
SOURCES = {
    path: path.read_text(encoding='utf-8')
    for pattern in ('*.py', 'pocket/*.py', 'prepare/*.py', 'config/*.py')
    for path in sorted(CHECKOUT.glob(pattern))
}


@functools.cache
def definitions():
    """{name: source} of all classes, functions and methods."""
    found = {}
    for source in SOURCES.values():
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found[node.name] = '\n'.join(lines[node.lineno - 1:node.end_lineno])
    return found


@functools.cache
def words_in_sources():
    """All names, and the words of strings and comments."""
    return set(re.findall(r'\w+', ' '.join(SOURCES.values())))


def blocks(page, language):
    """The fenced blocks of a page in docs/."""
    text = (CHECKOUT / 'docs' / page).read_text(encoding='utf-8')
    return re.findall(rf'```{language}\n(.*?)```', text, re.S)


# --------------------------------------------------------------------------------------------------
# Installation


def requirements(file):
    """The lines of a requirements file, without comments and what it includes."""
    lines = (CHECKOUT / file).read_text(encoding='utf-8').splitlines()
    return [line for line in lines if line and not line.startswith(('#', '-r'))]


def test_uv_and_pip_install_the_same():
    project = tomllib.loads((CHECKOUT / 'pyproject.toml').read_text(encoding='utf-8'))
    groups = project['dependency-groups']
    assert project['project']['dependencies'] == requirements('requirements.txt')
    assert groups['dev'] == requirements('requirements-dev.txt')
    assert project['tool']['uv'] == {'package': False, 'default-groups': []}

    requirements_of_both = {*groups['web'], *groups['dev']}
    packages = {re.split('[=<>]', line)[0] for line in requirements_of_both}
    assert len(packages) == len(requirements_of_both)  # one version of each


def test_changelog_has_the_version_and_git_ignores_uv_lock():
    project = tomllib.loads((CHECKOUT / 'pyproject.toml').read_text(encoding='utf-8'))
    assert project['project']['version'] in (CHECKOUT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert 'uv.lock' in (CHECKOUT / '.gitignore').read_text().split()  # it names hosts


# --------------------------------------------------------------------------------------------------
# Names

# Files that pages speak of, but that are not in the repository
MADE_UP = {
    '_bpe.py', '_gpt2.py', 'prepare/NAME.py', 'prepare/sums.py', 'vocab.txt', 'said.txt',
    'replied.txt', 'my.txt', 'input/my.txt', '/vol/input/my.txt',
    'prepare/characters/mine.txt', 'plunkett.txt',
    'explore.ipynb', 'LOG.md', 'tests/torture.py',  # their old names, in CHANGELOG.md
}
NOT_OURS = {'utils', 'fully_shard'}


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_names_in_pages_exist(path):
    text = path.read_text(encoding='utf-8')
    assert len(text.splitlines()) <= 150
    assert not missing_files(text, path.parent)
    assert not unknown_names(text)


def missing_files(text, folder):
    """Links and file names in a page that lead nowhere."""
    missing = []
    for link in re.findall(r'\]\(([^):]+)\)', text):
        if not (folder / link.partition('#')[0]).exists():
            missing.append(link)
    without_python = re.sub('```python.*?```', '', text, flags=re.S)  # other tests run these
    for name in re.findall(r'[\w./-]+\.(?:py|ipynb|md|txt)\b', without_python):
        places = (CHECKOUT, folder, CHECKOUT / 'pocket')
        if name not in MADE_UP and not any((place / name).is_file() for place in places):
            missing.append(name)
    return missing


def unknown_names(text):
    """Functions, attributes, options and other names in a page that are nowhere in the code."""
    defined = definitions()
    words = words_in_sources() | NOT_OURS
    text = re.sub('```python.*?```', '', text, flags=re.S)
    unknown = []
    for name in re.findall(r'\b(\w+)\(\)', text):
        if name not in defined:
            unknown.append(f'{name}()')
    for owner, attribute in re.findall(r'\b([A-Z]\w+)\.([a-z_]\w*)', text):
        if owner in defined and not re.search(rf'(def |self\.|\b){attribute}\b', defined[owner]):
            unknown.append(f'{owner}.{attribute}')
    for name in re.findall(r'`([A-Za-z_]\w*)`', text):
        if name not in words:
            unknown.append(name)
    for option in re.findall(r'\.py[^`\n]* --(\w+)', text):
        if option not in words:
            unknown.append(f'--{option}')
    return unknown


# --------------------------------------------------------------------------------------------------
# Examples


@pytest.mark.parametrize('path', MODULES, ids=lambda path: path.stem)
def test_examples_in_docstrings(path):
    if '>>> ' not in SOURCES[path]:
        return
    name = '.'.join(path.relative_to(CHECKOUT).with_suffix('').parts)
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def test_model_page_has_the_shapes_of_the_default_options():
    options = {}
    for node in ast.parse(SOURCES[CHECKOUT / 'train.py']).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            options[ast.unparse(node.targets[0])] = node.value.value
    B, T, C = options['batch_size'], options['block_size'], options['n_embd']
    H, L = options['n_head'], options['n_layer']
    D = C // H
    assert options['dataset'] == 'stdlib'

    text = ' '.join((CHECKOUT / 'docs' / 'model.md').read_text(encoding='utf-8').split())
    for shape in ((B, T, C), (B, T, 3 * C), (B, H, T, D), (B, H, T, T)):
        assert str(shape) in text
    sizes = {'B': B, 'T': T, 'C': C, 'H': H, 'D': D, 'V': 257}
    for letter, size in sizes.items():
        assert f'{letter} = {size}' in text
    assert f'{L} blocks' in text


def test_examples_of_tokenizers_page():
    from pocket.tokenizer import tokenizer_from_dict

    text = '\n'.join(blocks('tokenizers.md', 'python'))
    examples = doctest.DocTestParser().get_doctest(text, {}, 'tokenizers.md', None, 0)
    result = doctest.DocTestRunner().run(examples)
    assert result.attempted >= 9 and not result.failed

    lines = ''.join(blocks('tokenizers.md', 'json')).splitlines()
    described = [json.loads(line) for line in lines]
    assert [tokenizer_from_dict(d).to_dict() for d in described] == described
    assert {d['kind'] for d in described} == {'char', 'byte', 'bpe'}


def test_script_of_data_page_makes_a_dataset(tmp_path, monkeypatch):
    """It is put where the page says, and train.py runs it; then the same with the ending that makes
    pairs.
    """
    project = Project(tmp_path)
    reading, script, ending = blocks('data.md', 'python')
    assert len(script.splitlines()) <= 25
    (project.root / 'prepare' / 'sums.py').write_text(script, encoding='utf-8')
    tiny = ['--dataset=sums', *TINY[1:], '--max_iters=2', '--eval_interval=2']
    out, _ = project.run('train.py', *tiny)
    assert 'running prepare/sums.py' in out
    assert '83,632 train and 9,263 val ids, 13 in the vocabulary' in out

    monkeypatch.chdir(project.root)
    found = {}
    exec(reading.replace('stdlib', 'sums'), found)
    assert len(found['ids']) == 9263 and found['ids'].max() == 12
    script = script_for_pairs(script, ending)
    (project.root / 'prepare' / 'sums.py').write_text(script, encoding='utf-8')
    out, _ = project.run('prepare/sums.py', '--largest=9')
    assert '90 train and 10 val pairs' in out
    no_batch_size = [option for option in tiny if not option.startswith('--batch_size')]
    out, _ = project.run('train.py', *no_batch_size, '--arch=seq2seq')
    assert '90 training pairs' in out


def script_for_pairs(script, ending):
    """The script of data.md with its other ending, as that page says."""
    beginning, _, _ = script.partition('tok = ')
    return beginning.replace('write_stream', 'write_pairs') + ending
