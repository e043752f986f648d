"""
Comparing runs: two are the same if their checkpoints are equal, bit for bit, and their logs, but
for the clock.
"""
import csv

# Not the configuration, because two runs have two folders, nor the time they took
COMPARED = (
    'model', 'optimizers', 'scaler', 'step', 'tokens', 'best', 'bad_evals', 'evaluated',
    'loss_sum', 'loss_tokens', 'grad_norm', 'val_loss',
)


def same(a, b):
    """Whether a and b are equal; tensors bit for bit, also inside dicts and lists."""
    import torch

    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return a == b


def assert_same_run(a, b):
    """Assert that two checkpoints are of the same run."""
    for part in COMPARED:
        assert same(a[part], b[part]), part


def read_log(folder):
    """The rows of a run's log.csv, without what depends on the clock."""
    with open(folder / 'log.csv', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    for row in rows:
        del row['seconds']
        del row['tokens_per_s']
    return [list(row.values()) for row in rows]


def same_run(a, b):
    """Assert that two folders hold the same run: both checkpoints and the log."""
    import torch

    for name in ('last.pt', 'best.pt'):
        checkpoint_a = torch.load(a / name, weights_only=True)
        checkpoint_b = torch.load(b / name, weights_only=True)
        assert_same_run(checkpoint_a, checkpoint_b)
    assert read_log(a) == read_log(b)
