"""
python -m pocket.memory: the estimate against what autograd really keeps, and the table.

    pytest -n 0 tests/test_memory.py                 a few seconds
"""
import pytest
import torch

from model import GPT, GPTConfig
from pocket import memory


def activation_bytes(config):
    """The estimate for activations, in float32 on a CPU, of one row."""
    parts = memory.estimate(config, 0, 0, config.block_size, torch.float32, 'cpu')
    return parts['activations']


def bytes_that_autograd_keeps(model, idx):
    """Bytes of the tensors that a forward pass keeps for the backward pass, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.transformer(idx)
    return sum(
        tensor.untyped_storage().nbytes()
        for address, tensor in kept.items() if address not in parameters
    )


@pytest.mark.parametrize('switches', [
    {},
    {'act': 'swiglu', 'norm': 'rmsnorm'},
    {'pos': 'rotary', 'qk_norm': True, 'act': 'relu2'},
    {'gradient_checkpointing': True},
])
@pytest.mark.parametrize('block_size', [256, 1100])  # with and without the scores of attention
def test_estimate_of_activations_is_right_to_a_third(switches, block_size):
    shape = {'block_size': block_size, 'vocab_size': 100, 'n_head': 4, 'n_embd': 64}
    config = GPTConfig(**shape, n_layer=6, **switches)
    model = GPT(config)
    idx = torch.randint(100, (1, block_size))
    kept = bytes_that_autograd_keeps(model, idx)

    # The estimate includes what is held only while a layer is at work
    one_layer = GPTConfig(**shape, n_layer=1, **{**switches, 'gradient_checkpointing': True})
    estimated = activation_bytes(config) - activation_bytes(one_layer)
    assert 0.67 < estimated / kept < 1.5


def test_processes_hold_gradients_twice():
    """DistributedDataParallel's buckets, and the sum of micro-batches beside them."""
    config = GPTConfig(block_size=16, vocab_size=100, n_layer=1, n_head=1, n_embd=16)
    alone = memory.estimate(config, 1000, 0, 16, torch.float32, 'cpu')
    together = memory.estimate(config, 1000, 0, 16, torch.float32, 'cpu', world_size=2)
    assert together.pop('gradients') == 2 * alone.pop('gradients') == 8000
    assert together == alone


def read_table(output):
    """The numbers of a Markdown table that follows a line of text: a list of rows."""
    rows = []
    for line in output.splitlines()[4:]:
        cells = line.strip('| ').split(' | ')
        rows.append([float(cell.replace(',', '')) for cell in cells])
    return rows


def test_table_adds_up(project):
    out, _ = project.run('-m', 'pocket.memory', '--batch_size=1')
    rows = read_table(out)
    assert [row[0] for row in rows] == [124.4, 354.8, 774.0, 1557.6]
    for row in rows:
        millions, parameters, gradients, optimizer, head, activations, total = row[:7]
        checkpointed, checkpointed_total = row[7:]
        weights = parameters + gradients + optimizer + head
        assert optimizer == pytest.approx(millions * 8 / 1000, abs=0.06)  # AdamW's two moments
        assert total == pytest.approx(weights + activations, abs=0.3)
        assert checkpointed_total == pytest.approx(weights + checkpointed, abs=0.3)
    assert rows[-1][8] < 80  # GB: the largest fits on one card


def test_unknown_size_is_refused(project):
    error = project.fails('-m', 'pocket.memory', '--measure=5B')
    assert 'measure must be one of 124M, 350M, 774M, 1.5B' in error
    assert "got '5B'" in error
