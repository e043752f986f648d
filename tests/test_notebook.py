"""explore.ipynb: valid, without outputs, in step with the code; and (slow) executed."""
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


def test_is_valid_and_has_no_outputs(notebook):
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 30_000
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert len(cells) > 8 and not any(cell.outputs or cell.execution_count for cell in cells)
    assert not any('widgets' in cell.metadata or 'execution' in cell.metadata for cell in notebook.cells)


def test_names_from_our_files_exist(notebook):
    """Every name that it imports from our modules, or takes of them: model.GPT, checkpoint.save."""
    tree = ast.parse('\n'.join(cell.source for cell in notebook.cells if cell.cell_type == 'code'))
    ours, used = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours |= {a.asname or a.name: a.name for a in node.names if (CHECKOUT / f'{a.name}.py').is_file()}
        elif isinstance(node, ast.ImportFrom) and (CHECKOUT / f'{node.module}.py').is_file():
            used |= {(node.module, a.name) for a in node.names}
    used |= {(ours[node.value.id], node.attr) for node in ast.walk(tree)
             if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours}
    assert {('model', 'GPT'), ('model', 'attend'), ('talk', 'load')} <= used
    assert not [(module, name) for module, name in used if not hasattr(importlib.import_module(module), name)]


@pytest.mark.slow
def test_runs(notebook, tmp_path):
    """In a copy of the project: it learns, both models, and draws five pictures. What its tokens look at sums to 1."""
    from nbclient import NotebookClient
    project = Project(tmp_path)
    shutil.copy(NOTEBOOK, project.root)
    notebook.cells.append(nbformat.v4.new_code_cell(
        'assert all(torch.allclose(m.sum(-1), torch.ones(()), atol=1e-4) for m in [*maps, encoder_map, decoder_map, cross_map])\n'
        'print(cross_map.mean(0)[:len(word)].argmax(1).tolist())'))
    NotebookClient(notebook, timeout=1500, resources={'metadata': {'path': str(project.root)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    said = ''.join(output.text for output in outputs if output.output_type == 'stream')
    assert float(said.split('step 300: train ')[1].split(',')[0]) < 1.8 and 'notebook -> koobeton' in said
    looks = ast.literal_eval(said.strip().splitlines()[-1])
    assert sum(abs(at - (len(looks) - 1 - row)) <= 1 for row, at in enumerate(looks)) >= 0.8 * len(looks)  # backwards
    pictures = [base64.b64decode(o.data['image/png']) for o in outputs if o.output_type == 'display_data' and 'image/png' in o.data]
    assert len(pictures) == 5 and all(picture.startswith(b'\x89PNG') for picture in pictures)
    assert (project.root / 'out' / 'explore' / 'best.pt').is_file()
