"""What is written beside the code: names that exist, examples that run, lists that agree."""
import ast
import doctest
import json
import re

import pytest
from conftest import CHECKOUT, TINY, Project

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

PAGES = sorted((CHECKOUT / 'docs').glob('*.md'))
SOURCES = {path: path.read_text(encoding='utf-8') for pattern in ('*.py', 'prepare/*.py') for path in CHECKOUT.glob(pattern)}
DEFINED = {node.name: ast.get_source_segment(source, node) for source in SOURCES.values() for node in ast.walk(ast.parse(source))
           if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
WORDS = set(re.findall(r'\w+', ' '.join(SOURCES.values())))


def blocks(page, language):
    """The fenced blocks of a page in docs/."""
    return re.findall(rf'```{language}\n(.*?)```', (CHECKOUT / 'docs' / page).read_text(encoding='utf-8'), re.S)


def required(file):
    """The requirements in a requirements file, without comments and what it includes."""
    lines = (CHECKOUT / file).read_text(encoding='utf-8').splitlines()
    return [line for line in lines if line and not line.startswith(('#', '-r'))]


def test_uv_and_pip_install_the_same():
    project = tomllib.loads((CHECKOUT / 'pyproject.toml').read_text(encoding='utf-8'))
    assert project['project']['dependencies'] == required('requirements.txt')
    groups = project['dependency-groups']
    assert groups['dev'] == required('requirements-dev.txt')
    assert len({re.split('[=<>]', line)[0] for line in groups['web'] + groups['dev']}) == len({*groups['web'], *groups['dev']})
    assert project['tool']['uv'] == {'package': False, 'default-groups': []}
    assert project['project']['version'] in (CHECKOUT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert 'uv.lock' in (CHECKOUT / '.gitignore').read_text().split()  # it names hosts

MADE_UP = {'_bpe.py', '_gpt2.py', 'prepare/NAME.py', 'prepare/sums.py', 'vocab.txt', 'said.txt', 'replied.txt', 'my.txt', 'input/my.txt', '/vol/input/my.txt'}


@pytest.mark.parametrize('path', [*PAGES, CHECKOUT / 'CONTRIBUTING.md', CHECKOUT / 'CHANGELOG.md'], ids=lambda p: p.name)
def test_names_in_pages_exist(path):
    text = path.read_text(encoding='utf-8')
    assert len(text.splitlines()) <= 130, 'an evening is short'
    text = re.sub('```python.*?```', '', text, flags=re.S)  # other tests run these
    wrong = [link for link in re.findall(r'\]\(([^):]+)\)', text) if not (path.parent / link).is_file()]
    wrong += [name for name in re.findall(r'[\w./-]+\.(?:py|ipynb|md|txt)\b', text)
              if not any((folder / name).is_file() for folder in (CHECKOUT, path.parent))
              and name not in MADE_UP]
    wrong += [name for name in re.findall(r'\b(\w+)\(\)', text) if name not in DEFINED]
    wrong += [f'{name}.{part}' for name, part in re.findall(r'\b([A-Z]\w+)\.([a-z_]\w*)', text)
              if name in DEFINED and not re.search(rf'(def |self\.){part}\b', DEFINED[name])]
    wrong += [name for name in re.findall(r'`([A-Za-z_]\w*)`', text) if name not in WORDS | {'utils', 'fully_shard'}]
    wrong += [knob for knob in re.findall(r'(?:train|text)\.py[^`\n]* --(\w+)', text) if knob not in WORDS]
    assert not wrong


def test_model_page_has_the_default_shapes():
    knobs = {node.targets[0].id: node.value.value for node in ast.parse(SOURCES[CHECKOUT / 'train.py']).body
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)}
    B, T, C, H, L = (knobs[name] for name in ('batch_size', 'block_size', 'n_embd', 'n_head', 'n_layer'))
    text = ' '.join((CHECKOUT / 'docs' / 'model.md').read_text(encoding='utf-8').split())
    assert f'B = {B} rows, T = {T} tokens, C = {C} channels, H = {H} heads of D = {C // H}, V = 257 ids, {L} blocks' in text
    assert knobs['dataset'] == 'stdlib' and all(shape in text for shape in (f'({B}, {T}, {C})', f'({B}, {T}, {3 * C})',
                                                                           f'({B}, {H}, {T}, {C // H})', f'({B}, {H}, {T}, {T})'))


def test_examples_of_tokenizers():
    from pocket.tokenizer import tokenizer_from_dict
    text = '\n'.join(blocks('tokenizers.md', 'python'))
    result = doctest.DocTestRunner().run(doctest.DocTestParser().get_doctest(text, {}, 'tokenizers.md', None, 0))
    assert result.attempted >= 9 and not result.failed
    described = [json.loads(line) for block in blocks('tokenizers.md', 'json') for line in block.splitlines()]
    assert [tokenizer_from_dict(d).to_dict() for d in described] == described
    assert {d['kind'] for d in described} == {'char', 'byte', 'bpe'}


def test_the_script_in_data_md_works(tmp_path, monkeypatch):
    """It is put where the page says, and train.py runs it; then the same with the end that makes pairs of it."""
    project, (reading, script, ending) = Project(tmp_path), blocks('data.md', 'python')
    assert len(script.splitlines()) <= 20
    (project.root / 'prepare' / 'sums.py').write_text(script, encoding='utf-8')
    tiny = ['--dataset=sums', *TINY[1:], '--max_iters=2', '--eval_interval=2']
    out, _ = project.run('train.py', *tiny)
    assert 'running prepare/sums.py' in out and '83,632 train and 9,263 val ids, 13 in the vocabulary' in out
    monkeypatch.chdir(project.root)
    exec(reading.replace('stdlib', 'sums'), found := {})
    assert len(found['ids']) == 9263 and found['ids'].max() == 12
    pairs = script[:script.index('tok, n =')].replace('write_stream', 'write_pairs') + ending
    (project.root / 'prepare' / 'sums.py').write_text(pairs, encoding='utf-8')
    out, _ = project.run('prepare/sums.py', '--largest=9')
    assert '90 train and 10 val pairs' in out
    out, _ = project.run('train.py', *(a for a in tiny if 'batch_size' not in a), '--arch=seq2seq')
    assert '90 pairs to learn from' in out
