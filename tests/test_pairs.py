"""Encoder-decoders and GPTs on pairs through the scripts' own doors: training, exact resume, evaluation, conversations, mistakes."""
import os
import signal

import pytest
import torch
from conftest import TINY, Project, make_pairs, make_toy

PAIRS = [a for a in TINY if not a.startswith(('--dataset', '--batch_size', '--block_size'))] + ['--dataset=talk', '--block_size=40', '--batch_tokens=300']
SEQ2SEQ = [*PAIRS, '--arch=seq2seq', '--src_block_size=60', '--n_encoder_layer=1', '--pos=sinusoidal', '--act=relu']


@pytest.fixture(scope='module')
def talked(tmp_path_factory):
    """A project with a finished encoder-decoder out/s2s and a finished GPT out/gpt, both on data/talk."""
    p = Project(tmp_path_factory.mktemp('talked'))
    make_pairs(p.root)
    make_toy(p.root)
    p.stdout, _ = p.run('train.py', *SEQ2SEQ, '--out_dir=out/s2s', '--label_smoothing=0.1')
    p.run('train.py', *(a for a in PAIRS if 'max_iters' not in a), '--out_dir=out/gpt', '--cutoffs=10,15', '--max_epochs=1', '--eval_interval=0')
    return p


def test_training_says_what_it_does(talked):
    assert '200 pairs to learn from' in talked.stdout and 'padding' in talked.stdout and '  -> ' in talked.stdout
    state = talked.checkpoint('s2s')
    assert state['kind'] == 'seq2seq' and state['chat']['me'] == 'B' and state['step'] == 8
    gpt = talked.checkpoint('gpt')
    assert gpt['kind'] == 'gpt' and gpt['evaluated'] == gpt['step'] and sorted(gpt['model']['lm_head.rank'].tolist()) == list(range(gpt['model_args']['vocab_size']))
    # the most frequent ids come first
    ids = torch.from_numpy(__import__('numpy').fromfile(talked.root / 'data' / 'talk' / 'train.bin', dtype='<u2').astype('int64'))
    counts = torch.bincount(ids, minlength=gpt['model_args']['vocab_size'])
    assert (counts[gpt['model']['lm_head.rank'].argsort()].diff() <= 0).all()


def test_resume_is_exact(talked):
    talked.run('train.py', *SEQ2SEQ, '--label_smoothing=0.1', '--out_dir=out/parts', '--max_iters=3', '--lr_decay_iters=8')
    talked.run('train.py', '--resume', '--out_dir=out/parts', '--max_iters=8')
    a, b = talked.checkpoint('s2s'), talked.checkpoint('parts')
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model']) and a['tokens'] == b['tokens'] > 0


def test_evaluation(talked):
    out, _ = talked.run('train.py', '--eval_only', '--out_dir=out/s2s', '--eval_replies=10', '--num_beams=2')
    assert 'val loss' in out and 'accuracy' in out and 'BLEU' in out and 'chrF2' in out and 'version:' in out and 'distinct-2' in out
    loss = float(out.split('val loss ')[1].split()[0])
    assert abs(loss - talked.checkpoint('s2s', 'best.pt')['best']) < 1e-3  # smoothing is in training alone
    out, _ = talked.run('train.py', '--eval_only', '--out_dir=out/s2s', '--eval_protocol=smoothed_batch_mean')
    assert 'smoothing 0.1' in out and float(out.split()[-1]) > 0


@pytest.mark.parametrize('run', ['s2s', 'gpt'])
def test_conversation(talked, run):
    typed = ('ba dodo\n\n/as B\nfu\n/as U\n/settings\n/settings temperature=9x\n/settings num_beams=2 top_k=3\n/settings greedy num_beams=2\nni\n'
             '/settings focused\n/nonsense\nß\n' + 'lamp ' * 60 + '\n/reset\n/help\nqua\n/quit\nnot read\n')
    out, err = talked.run('sample.py', '--chat', f'--out_dir=out/{run}', '--max_new_tokens=12', '--device=cpu', typed=typed)
    assert out.count('\nU: B: ') + out.count('\nB: B: ') == 5 and 'not read' not in out and '/reset' in out
    assert 'temperature must be a number' in err and 'it stays 0.8' in err and "'/nonsense' is no command" in err and "does not know 'ß'" in err
    assert "num_beams=2 searches for the likeliest text and draws nothing, so top_k can't be honoured" in err and len(err.splitlines()) == 4
    assert 'temperature=0.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, max_new_tokens=12, num_beams=2' in out
    out, _ = talked.run('sample.py', '--chat', f'--out_dir=out/{run}', '--device=cpu', '--max_new_tokens=5', typed='ba')  # end of input


def test_replies_to_start(talked):
    one, _ = talked.run('sample.py', '--out_dir=out/s2s', '--start=ba', '--start=fu ni', '--temperature=0', '--max_new_tokens=9')
    assert 'U: ba\nB: ' in one and 'U: fu ni\nB: ' in one and '--- 2 of 2' in one
    talked.fails('sample.py', '--out_dir=out/s2s', '--num_beams=0')
    assert 'draws nothing, so temperature' in talked.fails('sample.py', '--out_dir=out/s2s', '--num_beams=2', '--temperature=0.5')
    assert 'give it something' in talked.fails('sample.py', '--out_dir=out/s2s')


@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
def test_ctrl_c_ends_a_reply_only(talked):
    process = talked.start('sample.py', '--chat', '--out_dir=out/gpt', '--max_new_tokens=1000000', '--ignore_eot', '--device=cpu')
    process.stdin.write('ba\n')
    process.stdin.flush()
    got = ''
    while 'B: ' not in got:
        got += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate('/settings max_new_tokens=3\nfu\n', timeout=30)
    assert process.returncode == 0 and 'Traceback' not in err and ' …' in out and 'max_new_tokens=3' in out and out.count('B: ') == 1


@pytest.mark.parametrize('args, said', [
    (['--arch=seq2seq', '--dataset=toy'], 'is one stream of text, but an encoder-decoder learns from pairs'),
    (['--dataset=talk', '--batch_size=4'], 'batch_size (command line) means nothing for'), (['--dataset=toy', '--batch_tokens=99'], 'set --batch_size instead'),
    (['--dataset=talk', '--cutoffs=3,99'], 'cutoffs must be rising'), (['--dataset=talk', '--cutoffs=3,x'], 'cutoffs must be whole numbers'),
    (['--dataset=talk', '--eval_only', '--eval_split=test', '--out_dir=out/s2s'], 'has no test split'), (['--dataset=talk', '--max_epochs=0'], 'max_epochs must be above 0'),
    (['--dataset=talk', '--max_epochs=2', '--max_iters=9'], 'give one of them'),
    (['--dataset=talk', '--cutoffs=5', '--label_smoothing=0.1'], "can't do label_smoothing"), (['--init_from=gpt3'], "'gpt3' is neither one of gpt2, gpt2-medium")])
def test_mistakes(talked, args, said):
    assert said in talked.fails('train.py', *args)


@pytest.mark.slow
@pytest.mark.parametrize('task', ['copy', 'reverse', 'sort'])
def test_learns_synthetic_tasks(tmp_path, task):
    """Copying, reversing and sorting random sequences: at least 99 % exactly right after 1,300 steps."""
    import numpy as np

    from pocket.checkpoint import build, load
    p, rng = Project(tmp_path / 'p'), np.random.default_rng(0)
    folder = p.root / 'data' / 'task'
    folder.mkdir(parents=True)
    do = {'copy': list, 'reverse': lambda s: s[::-1], 'sort': sorted}[task]
    chars = 'abcdefghijklmnopqrst'
    counts, pairs, held = {}, {}, None
    for split, n in (('train', 20_000), ('val', 500)):
        sources = [rng.integers(0, 20, rng.integers(3, 13)).tolist() for _ in range(n)]
        rows = [side for s in sources for side in (s, [*do(s), 22])]
        np.array([i for row in rows for i in row], dtype='<u2').tofile(folder / f'{split}.bin')
        np.cumsum([0] + [len(row) for row in rows], dtype='<i8').tofile(folder / f'{split}.idx')
        counts[split], pairs[split], held = sum(map(len, rows)), n, sources
    (folder / 'meta.json').write_text(__import__('json').dumps({
        'format': 1, 'kind': 'pairs', 'dtype': 'uint16', 'vocab_size': 23, 'counts': counts, 'pairs': pairs,
        'tokenizer': {'kind': 'char', 'chars': chars, 'specials': ['pad', 'bos', 'eos']}}), encoding='utf-8')
    out, _ = p.run('train.py', '--dataset=task', '--arch=seq2seq', '--block_size=16', '--n_layer=2', '--n_head=4', '--n_embd=64', '--pos=rotary',
                   '--batch_tokens=2048', '--max_iters=1300', '--eval_interval=1300', '--device=cpu', '--out_dir=out/task', env={'OMP_NUM_THREADS': '2'}, timeout=300)
    path = p.root / 'out' / 'task' / 'best.pt'
    state = load(path)
    model, tok = build(state, path)
    got = model.generate(held, 16, start=tok.decoder_start_id, eot=tok.eos_id, temperature=0)
    right = sum(g == [*do(s), 22] for g, s in zip(got, held)) / len(held)
    print(f'{task}: {right:.1%} after {state["seconds"]:.0f} s')
    assert right >= 0.99, f'{right:.1%}'
