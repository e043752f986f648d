"""bench.py: what it prints, for people and as JSON. Never how fast anything is."""
import json

import pytest


def test_a_row(project):
    """Ours and a peer in turns, and all of it in one line of JSON; the share of the ceiling is that of the rate."""
    args = ['--rows=CPU example', f'--nanogpt={project.root / "peer"}', '--seconds=0.02', '--device=cpu']
    (project.root / 'peer').mkdir()
    (project.root / 'peer' / 'model.py').write_text(  # stands for nanoGPT: a model of that interface, one layer large
        'import torch\nfrom dataclasses import dataclass\n@dataclass\nclass GPTConfig:\n    vocab_size: int; block_size: int; n_layer: int; '
        'n_head: int; n_embd: int; bias: bool\n'
        'class GPT(torch.nn.Module):\n    def __init__(self, c):\n        super().__init__()\n        self.e = torch.nn.Embedding(c.vocab_size, c.vocab_size)\n'
        '    def forward(self, idx, targets):\n        return None, torch.nn.functional.cross_entropy(self.e(idx).flatten(0, 1), targets.flatten())\n',
        encoding='utf-8')
    out, _ = project.run('bench.py', *args)
    told = json.loads(out.splitlines()[-1])
    work = told['work']["train nanoGPT's CPU example (0.8 M), 12 x 64"]
    assert list(work) == ['ours', 'nanogpt'] and all(len(w['rates']) == 1 and min(w['rates']) > 0 for w in work.values())
    ours, theirs = (work[who]['rates'][0] for who in work)
    line = next(line for line in out.splitlines() if line.startswith('    nanogpt'))
    assert float(line.split('ours is ')[1].split()[0]) == pytest.approx(ours / theirs, abs=0.006)
    line = next(line for line in out.splitlines() if line.startswith('    ours'))
    cost = 6 * (4 * (12 * 128 ** 2 + 2 * 128) + 128 + 65 * 128) + 6 * 4 * 128 * 64  # of weights, of attention
    assert int(line.split('%')[0].split()[-1]) == round(100 * ours * cost / told['limits']['FLOP'])


@pytest.mark.parametrize('args, said', [
    (['--rows=xyz'], "no row holds 'xyz': there are train nanoGPT"), (['--rounds=0'], 'rounds must be at least 1'),
    (['--nanogpt=nowhere'], 'nowhere holds no model.py')])
def test_bad_input(project, args, said):
    assert said in project.fails('bench.py', *args)
