"""
Run docs/explore.ipynb and store what it prints and draws, so that one can read it without Jupyter.

    python docs/store_notebook.py       needs nbclient and ipykernel (requirements-dev.txt)

Nothing else is stored: no counts, times or other metadata, and no output of a cell that has the tag
remove-output (it shows the text of others).
"""
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pocket.errors import UserError, show_user_errors
from pocket.files import atomic_write

NOTEBOOK = ROOT / 'docs' / 'explore.ipynb'
COPIED = ('model.py', 'pocket', 'prepare')     # what the notebook needs


def run(notebook):
    """Execute a notebook in a copy of the project, which its run and its dataset stay in."""
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, Path(folder) / name)
        resources = {'metadata': {'path': folder}}
        NotebookClient(notebook, timeout=1500, resources=resources, coalesce_streams=True).execute()
        clean(notebook, folder)


def clean(notebook, folder):
    """Remove what differs from run to run, all that comes from stderr, and hidden outputs."""
    for cell in notebook.cells:
        cell.metadata.pop('execution', None)
        if cell.cell_type != 'code':
            continue
        cell.execution_count = None
        stored = []
        for output in cell.outputs:
            is_text = output.get('name') == 'stdout'
            if is_text:
                output.text = output.text.replace(f'{folder}/', '')
            if is_text or output.output_type == 'display_data':
                stored.append(output)
        if 'remove-output' in cell.metadata.get('tags', ()):
            stored = []
        cell.outputs = stored


def main():
    """Run the notebook, clean it, and write it back."""
    try:
        import nbformat
    except ImportError:
        raise UserError('this needs more packages: pip install -r requirements-dev.txt') from None
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    run(notebook)
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + '\n'
    atomic_write(NOTEBOOK, lambda file: file.write(text.encode()))
    print(f'{NOTEBOOK}: {len(text.encode()) / 1e3:.0f} kB')


if __name__ == '__main__':
    show_user_errors('docs/store_notebook.py')
    main()
