"""
docs/explore.ipynb: valid, with its pictures, in step with the code; and (slow) executed.

    pytest -n 0 tests/test_notebook.py
    pytest -n 0 -m slow tests/test_notebook.py       executes it: about a minute
"""
import ast
import base64
import importlib
import shutil

import nbformat
import pytest
from conftest import CHECKOUT, Project

NOTEBOOK = CHECKOUT / 'docs' / 'explore.ipynb'


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_is_valid_and_stored_with_its_pictures(notebook):
    """As docs/store_notebook.py stores it: no counts, no paths of a machine, nothing of stderr."""
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 500_000
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert len(cells) > 8
    pictures = 0
    for cell in cells:
        assert cell.execution_count is None
        if 'remove-output' in cell.metadata.get('tags', ()):
            assert not cell.outputs
        for output in cell.outputs:
            if output.output_type == 'display_data':
                pictures += 1
            else:
                assert output.name == 'stdout' and '/tmp' not in output.text
    assert pictures == 5
    for cell in notebook.cells:
        assert 'widgets' not in cell.metadata and 'execution' not in cell.metadata


def is_ours(module):
    return (CHECKOUT / f'{module.replace(".", "/")}.py').is_file()


def test_names_that_the_notebook_imports_exist(notebook):
    """Every name that it imports from our modules, or uses as their attribute: GPT,
    checkpoint.save.
    """
    tree = ast.parse('\n'.join(cell.source for cell in notebook.cells if cell.cell_type == 'code'))
    modules = {}  # {name in the notebook: module}
    used = set()  # (module, name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_ours(alias.name):
                    modules[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if is_ours(f'{node.module}.{alias.name}'):  # from pocket import chat
                    modules[alias.name] = f'{node.module}.{alias.name}'
                elif is_ours(node.module):
                    used.add((node.module, alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            used.add((modules[ast.unparse(node.value)], node.attr))

    assert {('model', 'GPT'), ('model', 'attention'), ('pocket.chat', 'load')} <= used
    for module, name in used:
        assert hasattr(importlib.import_module(module), name), f'{module}.{name}'


ATTENTION_SUMS_TO_1 = '''
for weights in [*maps, encoder_map, decoder_map, cross_map]:
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-4)
print(cross_map.mean(0)[:len(word)].argmax(1).tolist())
'''


@pytest.mark.slow
@pytest.mark.parametrize('folder', ['docs', '.'])
def test_notebook_runs(notebook, tmp_path, folder):
    """In a copy of the project: both models learn, and five pictures are drawn."""
    from nbclient import NotebookClient

    project = Project(tmp_path)
    (project.root / 'docs').mkdir()
    shutil.copy(NOTEBOOK, project.root / 'docs')
    notebook.cells.append(nbformat.v4.new_code_cell(ATTENTION_SUMS_TO_1))
    where = {'metadata': {'path': str(project.root / folder)}}
    NotebookClient(notebook, timeout=1500, resources=where).execute()

    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    printed = ''.join(output.text for output in outputs if output.output_type == 'stream')
    train_loss = float(printed.split('step 300: train ')[1].split(',')[0])
    assert train_loss < 1.8
    assert 'notebook -> koobeton' in printed

    # For each letter that was generated, the position of one in the source
    looks_at = ast.literal_eval(printed.strip().splitlines()[-1])
    backwards = range(len(looks_at) - 1, -1, -1)
    right = sum(abs(at - expected) <= 1 for at, expected in zip(looks_at, backwards))
    assert right >= 0.8 * len(looks_at)

    pictures = []
    for output in outputs:
        if output.output_type == 'display_data' and 'image/png' in output.data:
            pictures.append(base64.b64decode(output.data['image/png']))
    assert len(pictures) == 5
    assert all(picture.startswith(b'\x89PNG') for picture in pictures)
    assert (project.root / 'out' / 'explore' / 'best.pt').is_file()
