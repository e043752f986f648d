"""
Loss curves of runs, drawn from their log.csv.

    python -m pocket.plot --run=out/shakespeare_char      train and val loss, the best val marked
    python -m pocket.plot --run=out/a --run=out/b --x=seconds --to=ab.png    val loss of several
"""
import csv
import json
import os
import sys
from pathlib import Path
from typing import Literal

from pocket.configurator import configure
from pocket.errors import UserError, show_control_characters
from pocket.files import atomic_write, check_path, find_path

run: tuple[str, ...] = ()          # a run's folder, or a file like its log.csv; repeat for several
x: Literal['step', 'seconds', 'tokens'] = 'step'  # what the losses are drawn over
to: str | None = None              # .png, .svg or .pdf (None: loss.png in the first run's folder)
title: str | None = None           # None: the names of the runs
if __name__ == '__main__':
    configure(__file__, globals())

X_LABELS = {
    'step': 'step',
    'seconds': 'seconds of training, evaluations included',
    'tokens': 'tokens trained on',
}


def read(path):
    """(name, {column: list of numbers}) of a run, from its folder or log.csv.

    Raises UserError if there is no log, or none with at least one row.
    """
    path = find_path(path)
    file = path / 'log.csv' if path.is_dir() else path
    try:
        rows = list(csv.DictReader(file.read_text(encoding='utf-8').splitlines()))
        log = {}
        columns = ['step', 'val_loss', *rows[0]]  # a log without the first two raises KeyError
        for column in columns:
            log[column] = [float(row[column]) for row in rows]
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror}; --run= is the folder of a run, "
                        "or its log.csv") from None
    except (ValueError, LookupError, TypeError, csv.Error):
        raise UserError(f'{file} is not the log.csv of a run that was evaluated') from None

    name = path.resolve().name if path.is_dir() else path.stem
    name = os.fsencode(name).decode('utf-8', 'replace')  # whatever the locale has made of it
    return name, log


def read_dataset(path):
    """The name of the dataset that a run was trained on; None if its folder does not say so."""
    try:
        text = (find_path(path) / 'config.json').read_text(encoding='utf-8')
        return json.loads(text)['dataset']
    except (OSError, ValueError, LookupError, TypeError):
        return None


def draw(runs, path, x='step', title=None):
    """Write a picture to path: the train and val loss of one run, or the val loss of several.

    runs: a list of what read() returns. x: a column of all logs. Raises UserError if matplotlib is
    missing, or if path can't be written or does not end in .png, .svg or .pdf.
    """
    try:
        import matplotlib
        matplotlib.use('Agg')  # draws into files, needs no display
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError(f'{Path(path).name} needs matplotlib: pip install matplotlib') from None
    extension = Path(path).suffix[1:].lower() or 'png'
    if extension not in ('png', 'svg', 'pdf'):
        raise UserError(f'the name of a picture ends in .png, .svg or .pdf, got {path}')

    figure, axis = plt.subplots(figsize=(7, 4.5))
    if len(runs) == 1:
        draw_one(axis, runs[0], x)
    else:
        draw_several(axis, runs, x)
    names = ', '.join(name for name, _ in runs)
    axis.set(xlabel=X_LABELS[x], ylabel='loss (nats per token)', title=plain(title or names))
    axis.grid(alpha=0.3)
    axis.legend()
    atomic_write(path, lambda file: figure.savefig(file, format=extension, dpi=120))
    plt.close(figure)


def plain(text):
    """Text for matplotlib, to which a dollar sign would begin a formula, and so that it is all
    visible."""
    return show_control_characters(text).replace('$', r'\$')


def draw_one(axis, run, x):
    """Train and val loss of one run, with the best val loss marked."""
    _, log = run
    if 'train_loss' in log:
        axis.plot(log[x], log['train_loss'], label='train', marker='.')
    axis.plot(log[x], log['val_loss'], label='val', marker='.')
    best_x, best = best_point(log, x)
    mark(axis, best_x, best, color='black', label=f'best val {best:.4f}')


def draw_several(axis, runs, x):
    """The val loss of each run, with the best one marked."""
    for name, log in runs:
        best_x, best = best_point(log, x)
        lines = axis.plot(log[x], log['val_loss'], label=plain(f'{name}: best val {best:.4f}'),
                          marker='.')
        mark(axis, best_x, best, color=lines[0].get_color())


def best_point(log, x):
    """(x, loss) at the lowest val loss of a run."""
    best = min(log['val_loss'])
    row = log['val_loss'].index(best)
    return log[x][row], best


def mark(axis, at, loss, color, label=None):
    """A circle around a point."""
    axis.plot(at, loss, 'o', fillstyle='none', color=color, markersize=9, label=label)


if __name__ == '__main__':
    if not run:
        raise UserError('name a run: python -m pocket.plot --run=out/NAME')
    runs = [read(path) for path in run]
    lacking = [name for name, log in runs if x not in log]
    if lacking:
        raise UserError(f'the log of {", ".join(lacking)} has no column {x!r}: '
                        'choose another with --x=')

    datasets = set()
    for path in run:
        dataset = read_dataset(path)
        if dataset is not None:
            datasets.add(str(dataset))
    if len(datasets) > 1:   # a character, a byte and a word are not equally hard to predict
        names = show_control_characters(', '.join(sorted(datasets)))
        print(f'warning: these runs were trained on different datasets ({names}), so their losses '
              f'per token do not compare', file=sys.stderr)

    if to:
        target = check_path(to)
    else:
        first = find_path(run[0])
        folder = first if first.is_dir() else first.parent
        target = folder / 'loss.png'
    draw(runs, target, x, title)
    best_losses = [f'{name} {min(log["val_loss"]):.4f}' for name, log in runs]
    print(f'{target}: {", ".join(best_losses)}')
