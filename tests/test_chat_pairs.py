"""
Models of conversations, encoder-decoders and GPTs trained on pairs, as a user of the scripts meets them: training, exact
resume, evaluation, chat, mistakes.

    pytest -n 0 tests/test_chat_pairs.py
    pytest -n 0 -m slow tests/test_chat_pairs.py     learns to copy, reverse and sort: minutes
"""
import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from conftest import TINY, Project, make_pairs, make_toy
from wrapped import lose_data_in_bleu

from pocket import checkpoint

NOT_FOR_PAIRS = ('--dataset', '--batch_size', '--block_size')
PAIRS = [option for option in TINY if not option.startswith(NOT_FOR_PAIRS)]
PAIRS += ['--dataset=talk', '--block_size=40', '--batch_tokens=300']
SEQ2SEQ = [*PAIRS, '--arch=seq2seq', '--src_block_size=60', '--n_encoder_layer=1', '--pos=sinusoidal', '--act=relu']


@pytest.fixture(scope='module')
def chatty(tmp_path_factory):
    """A project with a finished encoder-decoder out/s2s and a finished GPT out/gpt, both trained on data/talk."""
    p = Project(tmp_path_factory.mktemp('chatty'))
    make_pairs(p.root)
    make_toy(p.root)
    p.stdout, _ = p.run('train.py', *SEQ2SEQ, '--out_dir=out/s2s', '--label_smoothing=0.1')
    one_epoch = [option for option in PAIRS if 'max_iters' not in option]
    one_epoch += ['--max_epochs=1', '--eval_interval=0', '--cutoffs=10,15']
    p.run('train.py', *one_epoch, '--out_dir=out/gpt')
    return p


# ---- Training


def test_training_tells_of_pairs_padding_and_sample_replies(chatty):
    assert '200 training pairs' in chatty.stdout and 'padding' in chatty.stdout
    assert '  -> ' in chatty.stdout


def test_checkpoint_holds_the_kind_and_the_chat_template(chatty):
    state = chatty.checkpoint('s2s')
    assert state['kind'] == 'seq2seq' and state['chat']['me'] == 'B' and state['step'] == 8
    state = chatty.checkpoint('gpt')
    assert state['kind'] == 'gpt' and state['evaluated'] == state['step']


def test_adaptive_softmax_puts_the_most_frequent_ids_first(chatty):
    state = chatty.checkpoint('gpt')
    vocab_size = state['model_args']['vocab_size']
    rank = state['model']['lm_head.rank']
    assert sorted(rank.tolist()) == list(range(vocab_size))

    ids = np.fromfile(chatty.root / 'data' / 'talk' / 'train.bin', dtype='<u2')
    counts = np.bincount(ids, minlength=vocab_size)
    counts_by_rank = counts[rank.argsort().numpy()]
    assert (np.diff(counts_by_rank) <= 0).all()


def test_resume_is_exact(chatty):
    options = [*SEQ2SEQ, '--label_smoothing=0.1', '--out_dir=out/parts', '--lr_decay_iters=8']
    chatty.run('train.py', *options, '--max_iters=3')
    chatty.run('train.py', '--resume', '--out_dir=out/parts', '--max_iters=8')
    whole = chatty.checkpoint('s2s')
    parts = chatty.checkpoint('parts')
    for key in whole['model']:
        assert torch.equal(whole['model'][key], parts['model'][key]), key
    assert whole['tokens'] == parts['tokens'] > 0


# ---- Evaluation


def test_eval_only_measures_loss_and_replies(chatty):
    out, _ = chatty.run('train.py', '--eval_only', '--out_dir=out/s2s', '--eval_replies=10', '--num_beams=2')
    for word in ('val loss', 'accuracy', 'BLEU', 'chrF2', 'version:', 'distinct-2'):
        assert word in out

    # A length penalty prefers longer texts
    longer, _ = chatty.run('train.py', '--eval_only', '--out_dir=out/s2s', '--eval_replies=10', '--num_beams=2',
                           '--length_penalty=9')
    ratio = re.compile(r'length ([0-9.]+) of the reference')
    assert float(ratio.search(longer)[1]) > float(ratio.search(out)[1])

    # Label smoothing enters training only
    loss = float(out.split('val loss ')[1].split()[0])
    assert abs(loss - chatty.checkpoint('s2s', 'best.pt')['best']) < 1e-3


def test_bleu_during_training_chooses_the_best(chatty):
    pytest.importorskip('sacrebleu')
    options = [*SEQ2SEQ, '--out_dir=out/bleu', '--label_smoothing=0.1', '--eval_bleu=5', '--best_by=bleu']
    out, _ = chatty.run('train.py', *options)
    assert out.count('of 5 replies') == 2 and 'BLEU ' in out
    best = chatty.checkpoint('bleu', 'best.pt')
    shown = re.findall(r'BLEU ([\d.]+) of', out)
    assert best['best_bleu'] == pytest.approx(max(map(float, shown)), abs=0.01)
    assert f'best BLEU {best["best_bleu"]:.2f}, val loss {best["best"]:.4f}' in out

    # Looking at replies changes nothing in training
    whole = chatty.checkpoint('s2s')
    for key, value in chatty.checkpoint('bleu')['model'].items():
        assert torch.equal(value, whole['model'][key]), key


def test_data_lost_while_bleu_is_computed_costs_no_step(chatty):
    options = [*SEQ2SEQ, '--out_dir=out/lost', '--eval_bleu=5']
    _, err = chatty.run(lose_data_in_bleu(chatty), *options, status=1)
    assert 'val.bin was written to while it was in use; saved at step 4; resume with' in err
    assert chatty.checkpoint('lost')['step'] == 4


def test_eval_protocol_smoothed_batch_mean(chatty):
    out, _ = chatty.run('train.py', '--eval_only', '--out_dir=out/s2s', '--eval_protocol=smoothed_batch_mean')
    found = re.search(r'loss with smoothing 0\.1, .*: ([\d.]+)', out)
    assert found and float(found[1]) > 0


# ---- Chat


@pytest.mark.parametrize('run', ['s2s', 'gpt'])
def test_chat_replies_obeys_commands_and_explains_mistakes(chatty, run):
    lines = [
        'ba dodo', '', '/as B', 'fu', '/as U',      # two replies
        '/settings', '/settings temperature=9x', '/settings num_beams=2 top_k=3', '/settings greedy num_beams=2',
        'ni', '/settings focused', '/nonsense', 'ß', 'lamp ' * 60,      # two replies
        '/reset', '/help', 'qua', '/quit', 'not read',      # one reply
    ]
    typed = '\n'.join(lines) + '\n'
    out, err = chatty.run('sample.py', '--chat', f'--out_dir=out/{run}', '--max_new_tokens=12', '--device=cpu', typed=typed)

    assert out.count('\nU: B: ') + out.count('\nB: B: ') == 5
    assert '/reset' in out      # from /help
    assert 'not read' not in out
    assert ('temperature=0.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, '
            'max_new_tokens=12, num_beams=2') in out

    bad_number, no_effect, bad_command, unknown_character = err.splitlines()
    assert 'temperature must be a number' in bad_number and 'it stays 0.8' in bad_number
    assert no_effect.startswith('num_beams=2 searches') and 'so top_k would have no effect' in no_effect
    assert "'/nonsense' is no command" in bad_command
    assert "does not know 'ß'" in unknown_character


def test_names_that_are_not_written_may_have_any_letters(chatty):
    """Pairs without names: the tokenizer knows the letters of the text alone, and "Zoë" is not in it."""
    state = chatty.checkpoint('s2s', 'best.pt')
    state['chat'] |= {'turn': '{text}', 'you': 'Zoë', 'reply': ''}
    folder = chatty.root / 'out' / 'nameless'
    folder.mkdir()
    checkpoint.save(folder / 'best.pt', state)
    options = ['--out_dir=out/nameless', '--device=cpu', '--max_new_tokens=5']
    chatty.run('sample.py', *options, '--start=ba')
    out, err = chatty.run('sample.py', '--chat', *options, typed='ba\n/as Eve\n')
    assert out.count('Zoë: B: ') == 1
    assert 'this model has none' in err


@pytest.mark.parametrize('run', ['s2s', 'gpt'])
def test_end_of_input_ends_the_chat(chatty, run):
    chatty.run('sample.py', '--chat', f'--out_dir=out/{run}', '--device=cpu', '--max_new_tokens=5', typed='ba')


@pytest.mark.parametrize('command, message', [('/as', 'needs a name'), ('/as ß', "does not know 'ß'")])
def test_name_that_cannot_be_spoken_under(chatty, command, message):
    options = ['--out_dir=out/s2s', '--device=cpu', '--max_new_tokens=5']
    _, err = chatty.run('sample.py', '--chat', *options, typed=f'{command}\n')
    assert message in err


def test_prompts_of_start_get_replies(chatty):
    out, _ = chatty.run('sample.py', '--out_dir=out/s2s', '--start=ba', '--start=fu ni', '--temperature=0', '--max_new_tokens=9')
    assert 'U: ba\nB: ' in out and 'U: fu ni\nB: ' in out and '--- 2 of 2' in out


def test_each_line_of_a_file_gets_a_line(chatty, tmp_path):
    options = ['--out_dir=out/s2s', '--device=cpu', '--max_new_tokens=9']
    prompts = tmp_path / 'prompts.txt'
    prompts.write_bytes(b'ba\n\nfu ni\r\n' + b'lamp\n' * 35)
    out, _ = chatty.run('sample.py', *options, f'--start=FILE:{prompts}', '--lines', '--temperature=0')
    first, blank, third, *others = out.removesuffix('\n').split('\n')
    assert blank == '' and len(set(others)) == 1 and len(others) == 35

    said, _ = chatty.run('sample.py', *options, '--start=ba', '--start=fu ni', '--temperature=0')
    assert f'B: {first}\n' in said and f'B: {third}\n' in said


def test_an_empty_file_gets_no_line(chatty, tmp_path):
    (tmp_path / 'empty.txt').write_bytes(b'')
    out, _ = chatty.run('sample.py', '--out_dir=out/s2s', f'--start=FILE:{tmp_path / "empty.txt"}', '--lines')
    assert out == ''


def test_seeds_of_later_batches_wrap_around(chatty):
    options = ['--out_dir=out/s2s', '--device=cpu', '--max_new_tokens=3', f'--seed={2**63 - 1}']
    out, _ = chatty.run('sample.py', *options, '--lines', '--start=' + 'ba\n' * 33)
    assert out.count('\n') == 33


def test_n_best_texts_have_scores(chatty):
    options = ['--out_dir=out/s2s', '--device=cpu', '--max_new_tokens=9', '--num_beams=3']
    out, _ = chatty.run('sample.py', *options, '--start=ba\nfu ni', '--lines', '--n_best=2')
    rows = [line.split('\t') for line in out.splitlines()]
    assert [number for number, _, _ in rows] == ['1', '1', '2', '2']
    assert float(rows[0][1]) >= float(rows[1][1]) and float(rows[2][1]) >= float(rows[3][1])

    best, _ = chatty.run('sample.py', *options, '--start=ba\nfu ni', '--lines')
    assert best.splitlines() == [rows[0][2], rows[2][2]]


@pytest.mark.parametrize('args, message', [
    (['--start=ba', '--n_best=2'], 'add --num_beams=2'),
    (['--start=ba', '--lines', '--num_samples=2'], 'omit --num_samples'),
    (['--start=ba', '--num_beams=0'], 'num_beams must be'),
    (['--start=ba', '--num_beams=2', '--temperature=0.5'], 'samples nothing, so temperature would have no effect'),
    ([], 'give it something'),
    (['--n_best=2', '--num_beams=2'], 'give it something'),
    (['--lines'], '--lines needs lines: add --start=FILE:'),
    (['--start=ba', '--n_best=2', '--num_beams=2', '--num_samples=2'], 'omit --num_samples'),
    (['--start=ba', '--lines', '--chat'], 'not for conversations'),
    (['--n_best=2', '--num_beams=2', '--web'], 'not for conversations'),
])
def test_mistake_in_sampling_from_a_model_of_conversations(chatty, args, message):
    assert message in chatty.fails('sample.py', '--out_dir=out/s2s', *args)


@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
def test_ctrl_c_ends_a_reply_but_not_the_chat(chatty):
    options = ['--out_dir=out/gpt', '--max_new_tokens=1000000', '--ignore_eot', '--device=cpu']
    process = chatty.start('sample.py', '--chat', *options)
    process.stdin.write('ba\n')
    process.stdin.flush()
    out = ''
    while 'B: ' not in out:
        out += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate('/settings max_new_tokens=3\nfu\n', timeout=30)
    assert process.returncode == 0 and 'Traceback' not in err
    assert ' …' in out and 'max_new_tokens=3' in out and out.count('B: ') == 1


# ---- Mistakes in training


@pytest.mark.parametrize('args, message', [
    (['--arch=seq2seq', '--dataset=toy'], 'is a single stream of text, but an encoder-decoder learns from pairs'),
    (['--dataset=talk', '--batch_size=4'], 'batch_size (command line) has no effect on'),
    (['--dataset=toy', '--batch_tokens=99'], 'set --batch_size instead'),
    (['--dataset=talk', '--cutoffs=3,99'], 'cutoffs must be rising'),
    (['--dataset=talk', '--cutoffs=3,x'], 'cutoffs must be whole numbers'),
    (['--dataset=talk', '--eval_only', '--eval_split=test', '--out_dir=out/s2s'], 'has no test split'),
    (['--dataset=toy', '--eval_protocol=smoothed_batch_mean'], 'smoothed_batch_mean is for pairs'),
    (['--dataset=talk', '--max_epochs=0'], 'max_epochs must be'),
    (['--dataset=talk', '--max_epochs=2', '--max_iters=9'], 'give one of them'),
    (['--dataset=talk', '--cutoffs=5', '--label_smoothing=0.1'], "can't do label_smoothing"),
    (['--init_from=gpt3'], "'gpt3' is neither one of smollm2, gpt2"),
])
def test_mistake_in_training_is_explained_in_one_sentence(chatty, args, message):
    assert message in chatty.fails('train.py', *args)


# ---- Learning


TASKS = {
    'copy': list,
    'reverse': lambda source: source[::-1],
    'sort': sorted,
}
EOS = 22    # of the dataset below: 20 letters, pad, bos, eos


def write_task(folder, solve):
    """Write a dataset of random sequences of 3 to 12 letters, with their solutions. Returns the sources of val."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    num_pairs = {'train': 20_000, 'val': 500}
    num_ids = {}
    for split, n in num_pairs.items():
        sources = [rng.integers(0, 20, rng.integers(3, 13)).tolist() for _ in range(n)]
        rows = []
        for source in sources:
            rows.append(source)
            rows.append([*solve(source), EOS])
        lengths = [len(row) for row in rows]
        np.concatenate(rows).astype('<u2').tofile(folder / f'{split}.bin')
        np.cumsum([0, *lengths], dtype='<i8').tofile(folder / f'{split}.idx')
        num_ids[split] = sum(lengths)
    meta = {
        'format': 1,
        'kind': 'pairs',
        'dtype': 'uint16',
        'vocab_size': 23,
        'counts': num_ids,
        'pairs': num_pairs,
        'tokenizer': {'kind': 'char', 'chars': 'abcdefghijklmnopqrst', 'specials': ['pad', 'bos', 'eos']},
    }
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    return sources


@pytest.mark.slow
@pytest.mark.parametrize('task', TASKS)
def test_encoder_decoder_learns_to_copy_reverse_and_sort(tmp_path, task):
    """At least 99 % of the outputs are exactly right after 1,300 steps."""
    solve = TASKS[task]
    p = Project(tmp_path / 'p')
    sources = write_task(p.root / 'data' / 'task', solve)
    p.run('train.py', '--dataset=task', '--arch=seq2seq', '--block_size=16', '--n_layer=2', '--n_head=4', '--n_embd=64',
          '--pos=rotary', '--batch_tokens=2048', '--max_iters=1300', '--eval_interval=1300', '--device=cpu',
          '--out_dir=out/task', env={'OMP_NUM_THREADS': '2'}, timeout=300)

    path = p.root / 'out' / 'task' / 'best.pt'
    state = checkpoint.load(path)
    model, tok = checkpoint.build(state, path)
    outputs = model.generate(sources, 16, decoder_start=tok.decoder_start_id, eos_id=tok.eos_id, temperature=0)
    num_right = sum(output == [*solve(source), EOS] for source, output in zip(sources, outputs))
    fraction = num_right / len(sources)
    print(f'{task}: {fraction:.1%} after {state["seconds"]:.0f} s')
    assert fraction >= 0.99
