"""
The house: what lies where, and who imports whom.

    pytest -n 0 tests/test_house.py
"""
import ast
import re

import pytest
from conftest import CHECKOUT

from pocket.configurator import read_options

FILES = sorted(
    path for pattern in ('*.py', 'pocket/*.py', 'prepare/*.py') for path in CHECKOUT.glob(pattern)
)


def module_name(path):
    """pocket/files.py -> pocket.files"""
    return '.'.join(path.relative_to(CHECKOUT).with_suffix('').parts)


MODULES = {module_name(path) for path in FILES}


def imports_of(path):
    """The modules of ours that a file imports, also within functions."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path.name}: relative import'
            imported.add(node.module)
            for alias in node.names:  # from pocket import files
                imported.add(f'{node.module}.{alias.name}')
    return imported & MODULES - {'pocket'}


IMPORTS = {module_name(path): imports_of(path) for path in FILES}


def test_top_level_is_five_files():
    names = {path.name for path in CHECKOUT.glob('*.py')}
    assert names == {'model.py', 'train.py', 'sample.py', 'bench.py', 'modal_train.py'}


def test_prepare_holds_dataset_scripts_only():
    for path in CHECKOUT.glob('prepare/*.py'):
        text = path.read_text(encoding='utf-8')
        calls_configure = re.search(r'^configure\(__file__, globals\(\)\)', text, re.M)
        assert calls_configure or path.name == 'office_gpt2.py', path.name  # which runs office.py


def test_no_file_imports_a_script():
    preparations = {name for name in MODULES if name.startswith('prepare.')}
    scripts = {'train', 'sample', 'bench', 'modal_train', 'pocket.export'} | preparations
    for name, imported in IMPORTS.items():
        assert not imported & scripts, name


def test_imports_have_no_circles():
    done = set()

    def follow(name, path):
        assert name not in path, ' -> '.join([*path, name])
        if name not in done:
            for imported in sorted(IMPORTS[name]):
                follow(imported, [*path, name])
            done.add(name)

    for name in sorted(IMPORTS):
        follow(name, [])


@pytest.mark.parametrize('name, allowed', [
    ('model', {'pocket.fused', 'pocket.kernels', 'pocket.generate'}),
    ('pocket.kernels', {'pocket.fused'}),
    ('pocket.fused', {'pocket.native'}),
    ('pocket.generate', {'pocket.kernels'}),
    ('pocket.errors', set()),
    ('pocket.files', {'pocket.errors'}),
    ('pocket.configurator', {'pocket.errors', 'pocket.files'}),
])
def test_arrows_go_one_way(name, allowed):
    assert IMPORTS[name] <= allowed


def test_train_imports_its_models_by_name():
    source = (CHECKOUT / 'train.py').read_text(encoding='utf-8')
    names = re.search('^from model import (.*)', source, re.M)[1].split(', ')
    assert {'GPT', 'Seq2Seq'} <= set(names)


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_options_that_readme_names_exist(script):
    """Also those in the text; those in commands are tried in test_readme.py."""
    source = (CHECKOUT / script).read_text(encoding='utf-8')
    options = {option.name for option in read_options(source)}
    readme = (CHECKOUT / 'README.md').read_text(encoding='utf-8')
    used = set()
    for line in readme.replace('\\\n', ' ').splitlines():
        for command in re.findall(rf'{script}\b([^`#|]*)', line):
            used |= set(re.findall(r'--(\w+)', command))
    assert used - {'help'} <= options
