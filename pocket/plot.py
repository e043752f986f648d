"""
Draw the loss curves of runs, from their log.csv.

    python plot.py --run=out/shakespeare_char                       train and val, the best marked: loss.png, as train.py draws it
    python plot.py --run=out/a --run=out/b --x=seconds --to=ab.png  several on one axis: val of each
"""
import csv
import os
from pathlib import Path
from typing import Literal

from pocket.configurator import configure
from pocket.errors import UserError
from pocket.files import find_path

run: tuple[str, ...] = ()          # the folder of a run, or a file like its log.csv; give it several times for several runs
x: Literal['step', 'seconds', 'tokens'] = 'step'  # what to draw the losses over
to: str | None = None              # the picture to write, .png, .svg or .pdf (None: loss.png in the folder of the first run)
title: str | None = None           # None: the run's name
if __name__ == '__main__':
    configure(__file__, globals())

from pocket.files import atomic_write

UNITS = {'step': 'step', 'seconds': 'seconds of training, evaluations included', 'tokens': 'tokens trained on'}


def read(path):
    """(name, {column: list of float}) of a run. Raises UserError where there is no log with at least a row."""
    path = find_path(path)
    file = path / 'log.csv' if path.is_dir() else path
    try:
        rows = list(csv.DictReader(file.read_text(encoding='utf-8').splitlines()))
        columns = {key: [float(row[key]) for row in rows] for key in ('step', 'val_loss', *(rows[0] if rows else ()))}
    except OSError as e:
        raise UserError(f'cannot read {file}: {e.strerror}; --run= is the folder of a run, or its log.csv') from None
    except (ValueError, KeyError, TypeError, csv.Error):
        columns = {}
    if not columns or not columns['step']:
        raise UserError(f'{file} is not the log.csv of a run that was evaluated')
    name = path.resolve().name if path.is_dir() else path.stem
    return os.fsencode(name).decode('utf-8', 'replace'), columns  # whatever the locale made of it


def draw(runs, path, x='step', title=None):
    """Write a picture to path. runs: [(name, {column: list of numbers})], of one both losses, of several those of val.

    Raises UserError where matplotlib is missing or path can't be written.
    """
    try:
        import matplotlib
        matplotlib.use('Agg')
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError(f'{Path(path).name} needs matplotlib: pip install matplotlib') from None
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for name, log in runs:
        if len(runs) == 1 and 'train_loss' in log:
            axis.plot(log[x], log['train_loss'], label='train', marker='.')
        best = min(log['val_loss'])
        at = log[x][log['val_loss'].index(best)]
        line, = axis.plot(log[x], log['val_loss'], marker='.', label='val' if len(runs) == 1 else f'{name}: best val {best:.4f}')
        axis.plot(at, best, 'o', fillstyle='none', color='black' if len(runs) == 1 else line.get_color(), markersize=9,
                  label=f'best val {best:.4f}' if len(runs) == 1 else None)
    axis.set(xlabel=UNITS[x], ylabel='loss (nats a token)', title=title or ', '.join(name for name, _ in runs))
    axis.grid(alpha=0.3)
    axis.legend()
    kind = Path(path).suffix[1:].lower() or 'png'
    if kind not in ('png', 'svg', 'pdf'):
        raise UserError(f'a picture\'s name ends in .png, .svg or .pdf, got {path}')
    atomic_write(path, lambda f: figure.savefig(f, format=kind, dpi=120))
    plt.close(figure)


if __name__ == '__main__':
    if not run:
        raise UserError('name a run: python plot.py --run=out/NAME')
    runs = [read(path) for path in run]
    if lacking := [name for name, log in runs if x not in log]:
        raise UserError(f'the log of {", ".join(lacking)} has no column {x!r}: choose another with --x=')
    first = find_path(run[0])
    to = Path(to).expanduser() if to else (first if first.is_dir() else first.parent) / 'loss.png'
    draw(runs, to, x, title)
    print(f'{to}: ' + ', '.join(f'{name} {min(log["val_loss"]):.4f}' for name, log in runs))
