"""
bench.py: what it measures and prints, for people and as JSON. Never how fast anything is.

    pytest -n 0 tests/test_bench.py
"""
import importlib
import json
import sys
from types import SimpleNamespace

import pytest
from conftest import CHECKOUT

NANOGPT = '''
from dataclasses import dataclass
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool

class GPT(nn.Module):
    """Stands for nanoGPT's: the same interface, but no layers."""

    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),
            'h': nn.ModuleList(),
            'ln_f': nn.LayerNorm(config.n_embd),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx, targets):
        logits = self.lm_head(self.transformer.ln_f(self.transformer.wte(idx)))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
'''

# bench.py, but nothing is compiled, which takes seconds
UNCOMPILED = '''
import runpy
import sys
from pathlib import Path

import torch

torch.compile = lambda model: model
sys.argv[0] = str(Path(__file__).with_name('bench.py'))
runpy.run_path(sys.argv[0], run_name='__main__')
'''


@pytest.fixture
def bench(monkeypatch):
    """bench.py as a module, with the defaults of its options."""
    monkeypatch.setattr(sys, 'argv', ['bench.py'])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.syspath_prepend(str(CHECKOUT))
    return importlib.import_module('bench')


def line_of(name, output):
    """The line of bench.py's output that has the figures of 'ours' or of a baseline."""
    return next(line for line in output.splitlines() if line.startswith(f'    {name}'))


def write_peer(project):
    """Write a stand-in for nanoGPT into a project and return its folder."""
    peer = project.root / 'peer'
    peer.mkdir()
    (peer / 'model.py').write_text(NANOGPT, encoding='utf-8')
    return peer


def test_row_shows_rates_ratio_and_utilization(project, bench, monkeypatch, capsys):
    def run(command, **options):
        """subprocess.run, but workers are started by the tests' fork server, which is quicker."""
        python, script, *args = command
        out, _ = project.run('uncompiled.py', *args)
        return SimpleNamespace(returncode=0, stdout=out)

    peer = write_peer(project)
    (project.root / 'uncompiled.py').write_text(UNCOMPILED, encoding='utf-8')
    monkeypatch.setattr(bench, 'subprocess', SimpleNamespace(run=run, PIPE=None))
    monkeypatch.setattr(bench, 'rows', 'CPU example')
    monkeypatch.setattr(bench, 'nanogpt', str(peer))
    monkeypatch.setattr(bench, 'rounds', 1)
    monkeypatch.setattr(bench, 'to', str(project.root / 'figures.json'))
    monkeypatch.setattr(sys, 'argv', [
        'bench.py', '--rows=CPU example', f'--nanogpt={peer}', '--seconds=0.02', '--device=cpu'])
    bench.main()

    out = capsys.readouterr().out
    result = json.loads((project.root / 'figures.json').read_text(encoding='utf-8'))
    work = result['work']["train nanoGPT's CPU example (0.8 M), 12 x 64"]
    assert list(work) == ['ours', 'nanogpt', 'nanogpt-bf16']
    for measured in work.values():
        assert len(measured['rates']) == 1
        assert measured['rates'][0] > 0

    ours = work['ours']['rates'][0]
    theirs = work['nanogpt']['rates'][0]
    ratio = line_of('nanogpt', out).split('ours is ')[1].split()[0]
    assert float(ratio) == pytest.approx(ours / theirs, abs=0.006)

    # FLOP per token: 6 per weight, and for attention 6 per layer, channel and position
    weights_per_layer = 12 * 128**2 + 2 * 128
    weights = 4 * weights_per_layer + 128 + 65 * 128
    flop = 6 * weights + 6 * 4 * 128 * 64
    percent = line_of('ours', out).split('%')[0].split()[-1]
    assert int(percent) == round(100 * ours * flop / result['limits']['FLOP'])


def test_range_is_shown_for_several_repeats_only(bench, capsys):
    row = bench.Row('some work', 'tok/s', ours=None, baselines={})
    bench.print_row(row, {'ours': [[1234.5, None, 10**9]]}, {})
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == ['ours', '1,234.5', 'tok/s', '1.00', 'GB']
    bench.print_row(row, {'ours': [[3.0, None, 10**9], [1.0, None, 10**9], [2.0, None, 10**9]]}, {})
    assert '2.0 tok/s    (1.0 - 3.0) 1.00 GB' in capsys.readouterr().out


def test_batches_of_different_sizes_are_timed_in_whole_passes(bench, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(bench, 'time', clock)
    monkeypatch.setattr(bench, 'seconds', 10.0)
    calls = []

    def step(i):
        calls.append(i)
        clock.now += 3.0 if i % 2 else 1.0

    rate = bench.time_steps(step, [10, 20])
    assert rate == pytest.approx(30 / 4)
    assert calls == [0, 1, 2, *range(6)]  # three steps to warm up, then three passes in 12 seconds


@pytest.mark.parametrize('args, message', [
    (['--rows=xyz'], "no row has 'xyz' in its name: there are train nanoGPT"),
    (['--rounds=0'], 'rounds must be in [1, inf) or None, got 0'),
    (['--seconds=0'], 'seconds must be in (0, inf), got 0'),
    (['--nanogpt=nowhere'], 'nowhere has no model.py'),
])
def test_bad_options_are_refused_in_one_sentence(project, args, message):
    assert message in project.fails('bench.py', *args)


@pytest.mark.slow
def test_every_row_runs(project):
    """With every baseline that is installed, compiled where it is in real life. GPT-2 124M is among
    the models: this takes minutes.
    """
    project.run('bench.py', f'--nanogpt={write_peer(project)}', '--seconds=0.01', '--device=cpu',
                '--to=figures.json', timeout=1200)
    work = json.loads((project.root / 'figures.json').read_text(encoding='utf-8'))['work']
    assert len(work) == 16
    assert all(measured['ours']['rates'][0] > 0 for measured in work.values())
