"""train.py as people use it: the whole road, resuming to the bit, stopping, and every mistake that has an answer."""
import csv
import math
import os
import signal
import sys

import pytest
import torch
from conftest import TINY, Project, assert_same_run, make_toy, read_log, same, same_run


def rows(project, run):
    with open(project.root / 'out' / run / 'log.csv', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def test_what_a_run_says_and_leaves(trained):
    out = trained.stdout
    for part in ('M parameters, 128 tokens a step', 'cpu in ', 'GB of memory', 'step 2: loss', 'tokens/s', 'left', 'perplexity', 'bits a byte',
                 'the best so far', 'next: python sample.py'):
        assert part in out, part
    assert trained.stderr == ''
    run = trained.root / 'out' / 'toy'
    assert sorted(p.name for p in run.iterdir()) == ['.lock', 'best.pt', 'config.json', 'last.pt', 'log.csv', 'loss.png']
    assert (run / 'loss.png').read_bytes().startswith(b'\x89PNG')
    log = rows(trained, 'toy')
    assert [(r['step'], r['tokens']) for r in log] == [('4', '512'), ('8', '1024')]
    assert all(float(v) >= 0 for r in log for v in r.values())
    state = trained.checkpoint('toy')
    assert state['step'] == 8 and state['config']['n_embd'] == 16 and state['tokenizer']['kind'] == 'char'


def test_validation_is_the_mean_over_all_of_val(trained):
    """The number in the checkpoint, against the plain formula; and --eval_only says it again."""
    from pocket import checkpoint
    from pocket.data import Stream, load_meta
    path = trained.root / 'out' / 'toy' / 'best.pt'
    state = checkpoint.load(path)
    model, tok = checkpoint.build(state, path)
    folder = trained.root / 'data' / 'toy'
    ids = torch.from_numpy(Stream(folder, load_meta(folder), 'val', 16).tokens().astype('int64'))
    total = 0.0
    with torch.no_grad():
        for i in range(0, len(ids) - 1, 16):
            x, y = ids[i:i + 16][:len(ids) - 1 - i], ids[i + 1:i + 17]
            total += -model(x[None])[0][0].log_softmax(-1).gather(1, y[:, None]).sum().item()
    assert abs(total / (len(ids) - 1) - state['best']) < 0.02  # training may run in bfloat16
    out, _ = trained.run('train.py', '--eval_only', f'--out_dir={trained.root / "out" / "toy"}', '--dtype=float32')
    said = float(out.split('val loss ')[1].split()[0])
    assert abs(said - total / (len(ids) - 1)) < 1e-4
    bits = float(out.split(' bits a byte')[0].split()[-1])
    assert abs(bits - said / 0.693147) < 2e-3  # a character of this text is a byte


@pytest.mark.parametrize('stop_after, extra', [
    (3, ()), (4, ()), (8, ()),
    (3, ('--optimizer=adamw', '--schedule=cosine', '--attn_dropout=0.1', '--label_smoothing=0.1', '--gradient_checkpointing'))])
def test_resume_is_exact(project, trained, stop_after, extra):
    """8 steps are 3 and 5: weights, optimizer, scores and log; stopped between evaluations, just before one, and at the end."""
    if extra:
        project.train(*extra, '--out_dir=whole')
        whole = project.root / 'whole'
    else:
        whole = trained.root / 'out' / 'toy'
    # a stop after three steps, as Ctrl-C makes it, without the race
    text = (project.root / 'train.py').read_text(encoding='utf-8')
    at_the_seed = '    torch.manual_seed((seed'
    assert text.count(at_the_seed) == 1
    stopping = text.replace(at_the_seed, f'    if step == {stop_after - 1}:\n        ask_to_stop(signal.SIGINT, None)\n' + at_the_seed)
    (project.root / 'stopping.py').write_text(stopping, encoding='utf-8')
    out, _ = project.run('stopping.py', *TINY, *extra, '--out_dir=parts', status=130)
    assert f'stopped by SIGINT at step {stop_after}' in out and '--resume' in out
    project.run('train.py', '--resume', '--out_dir=parts')
    same_run(whole, project.root / 'parts')
    assert len(read_log(project.root / 'parts')) == 2


def test_a_run_does_not_depend_on_how_often_it_is_evaluated(project, trained):
    project.train('--eval_interval=2', '--sample_tokens=10', '--out_dir=often')
    a, b = trained.checkpoint('toy'), torch.load(project.root / 'often' / 'last.pt', weights_only=True)
    assert same(a['model'], b['model']) and same(a['optimizers'], b['optimizers'])


def test_accumulation_equals_the_whole_batch(project):
    def weights(run, *args):
        project.train('--dropout=0', '--dtype=float32', '--max_iters=3', '--optimizer=adamw', f'--out_dir={run}', *args)
        return torch.load(project.root / run / 'last.pt', weights_only=True)['model']
    a = weights('a', '--batch_size=8', '--gradient_accumulation_steps=1')
    b = weights('b', '--batch_size=2', '--gradient_accumulation_steps=4')
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


@pytest.mark.slow  # a new interpreter
@pytest.mark.skipif(os.name == 'nt', reason='terminals of POSIX')
def test_a_lost_terminal_saves_first(project):
    """What a step would say goes to nobody: that is no reason to lose the step."""
    import pty
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(project.root)
        os.execv(sys.executable, [sys.executable, 'train.py', *TINY, '--max_iters=1000000', '--eval_interval=1000000', '--log_interval=1'])
    said = ''
    while 'step 5:' not in said:
        said += os.read(terminal, 1000).decode()
    os.close(terminal)
    os.waitpid(pid, 0)
    assert project.checkpoint('toy')['step'] >= 5


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
def test_signals_save_first(project, name):
    process = project.start('train.py', *TINY, '--max_iters=100000', '--eval_interval=100000', '--log_interval=1')
    lines = iter(process.stdout.readline, '')
    assert any(line.startswith('step 5:') for line in lines)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name) and 'Traceback' not in err
    assert f'stopped by {name}' in out and '--resume' in out
    step = project.checkpoint('toy')['step']
    assert step >= 5
    if name != 'SIGINT':
        return
    out, _ = project.run('train.py', '--resume', '--dataset=toy', f'--max_iters={step + 2}')
    assert f'step {step} of {step + 2}' in out and 'changed since' in out and f'max_iters 100000 -> {step + 2}' in out


def test_divergence_stops_and_keeps_the_checkpoint(project):
    """The rate explodes after a good step: by itself in training, and so that only the evaluation behind the last step can tell."""
    project.train('--max_iters=1', '--eval_interval=1')
    good = project.checkpoint('toy')
    for steps, said in ((9, 'loss nan'), (2, 'validation loss nan')):
        err = project.fails('train.py', '--resume', '--dataset=toy', f'--max_iters={steps}', '--learning_rate=1e30', '--muon_lr=1e30', '--grad_clip=0',
                            f'--eval_interval={steps}')
        assert said in err and 'diverged' in err and 'learning rate' in err and 'are from before this' in err
        assert same(project.checkpoint('toy'), good) and good['step'] == 1 and good['val_loss'] < 10
    err = project.fails('train.py', *TINY, '--learning_rate=1e30', '--muon_lr=1e30', '--out_dir=other')
    assert 'gradient norm' in err and 'no checkpoint yet' in err


def test_early_stopping_and_best(project):
    out, _ = project.train('--patience=2', '--max_iters=400', '--eval_interval=20', '--learning_rate=0.03', '--dropout=0')
    log = rows(project, 'toy')
    vals = [float(r['val_loss']) for r in log]
    at = vals.index(min(vals))
    assert len(vals) < 20 and at == len(vals) - 3
    best = project.checkpoint('toy', 'best.pt')
    assert best['step'] == int(log[at]['step']) and project.checkpoint('toy')['step'] == int(log[-1]['step'])
    assert f'{best["val_loss"]:.5f}' == log[at]['val_loss']


def test_a_run_is_never_overwritten(project):
    project.train('--max_iters=1')
    before = (project.root / 'out' / 'toy' / 'last.pt').read_bytes()
    out, _ = project.train('--max_iters=1')
    assert 'held a run' in out and (project.root / 'out' / 'toy.1' / 'last.pt').read_bytes() == before


def test_datasets_are_prepared_when_missing(project):
    (project.root / 'prepare' / 'made.py').write_text(
        'from common import dataset_folder, write_stream\nfrom configurator import configure\nfrom tokenizer import ByteTokenizer\n'
        'data_dir: str | None = None\nconfigure(__file__, globals())\ntok = ByteTokenizer()\nids = tok.encode_to_numpy("hello world " * 50)\n'
        'write_stream(dataset_folder(data_dir, "made"), tok, ids, ids[:50], {}, "none")\n', encoding='utf-8')
    out, _ = project.train('--dataset=made', '--max_iters=1', '--data_dir=elsewhere')
    assert 'running prepare/made.py' in out and (project.root / 'elsewhere' / 'made' / 'meta.json').is_file()


def test_all_problems_with_numbers_at_once(project):
    err = project.fails('train.py', '--n_embd=384', '--n_head=5', '--batch_size=0', '--learning_rate=-1', '--dropout=2', '--beta2=1')
    for part in ('n_embd must be divisible by n_head, got 384 and 5', 'batch_size must be at least 1', 'learning_rate must be', 'dropout must be', 'beta2'):
        assert part in err


def cut_train(folder):
    (folder / 'train.bin').write_bytes((folder / 'train.bin').read_bytes()[:-7])


def bad_id(folder):
    ids = bytearray((folder / 'train.bin').read_bytes())
    ids[100:102] = b'\xff\xff'
    (folder / 'train.bin').write_bytes(ids)


@pytest.mark.parametrize('break_it, args, said', [
    (None, ['--dataset=nope'], "no dataset 'nope'"), (None, ['--block_size=5000'], 'only 5,000 ids'),
    (cut_train, [], 'train.bin has 9,993 bytes'), (bad_id, [], 'train.bin has id 65535'),
    (lambda f: (f / 'meta.json').write_text('{"kind": 5', encoding='utf-8'), [], 'meta.json is not'),
    (lambda f: make_toy(f.parent.parent, tokenizer={'kind': 'word'}), [], "unknown kind of tokenizer 'word'"),
    (lambda f: make_toy(f.parent.parent, vocab_size=5), [], 'vocab_size is 5, but the tokenizer has'),
    (None, ['--resume', '--out_dir=nowhere'], 'there is no'), (None, ['--device=tpu'], "got 'tpu'"), (None, ['--dtype=float16'], 'needs a GPU'),
    pytest.param(None, ['--device=mps'], 'this machine has: cpu', marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason='has MPS')),
    pytest.param(None, ['--device=cuda:7'], '--device=cuda:7 is not available here', marks=pytest.mark.skipif(torch.cuda.device_count() > 7, reason='has it')),
])
def test_mistakes(project, break_it, args, said):
    if break_it:
        break_it(project.root / 'data' / 'toy')
    assert said in project.fails('train.py', '--dataset=toy', '--device=cpu', '--block_size=16', *args)
    assert not (project.root / 'out').exists()


def test_out_dir_that_cannot_be_written(project):
    (project.root / 'file').write_text('', encoding='utf-8')
    assert 'cannot write to' in project.fails('train.py', '--dataset=toy', '--block_size=16', '--out_dir=file/run')


def test_resume_refuses_what_it_cannot_honour(project, trained):
    run = f'--out_dir={trained.root / "out" / "toy"}'
    err = project.fails('train.py', '--resume', run, '--n_layer=3', '--dataset=other')
    assert 'n_layer 2 -> 3' in err and 'dataset toy -> other' in err


@pytest.mark.parametrize('content, said', [(b'', 'cut short'), (b'not a checkpoint', 'cut short'), ('half', 'cut short'), ('pickle', 'code')])
def test_resume_from_what_is_no_checkpoint(project, trained, content, said):
    good = (trained.root / 'out' / 'toy' / 'last.pt').read_bytes()
    (project.root / 'out' / 'toy').mkdir(parents=True)
    path = project.root / 'out' / 'toy' / 'last.pt'
    if content == 'pickle':
        torch.save({'model': __import__('pathlib').PurePosixPath('/tmp')}, path)  # any class but tensors: its pickle would run code
    else:
        path.write_bytes(good[:len(good) // 2] if content == 'half' else content)
    assert said in project.fails('train.py', '--resume', '--dataset=toy')


def test_out_of_memory_says_what_to_lower(project):
    err = project.fails('train.py', '--dataset=toy', '--device=cpu', '--block_size=16', '--n_embd=4000000', '--n_head=1', '--n_layer=1')
    assert 'out of memory: lower --batch_size' in err


def test_compile_falls_back_or_says_so(project):
    assert 'eager (compiling pays late on cpu; --compile tries it)' in project.train('--max_iters=1', '--compile=auto')[0]
    text = (project.root / 'train.py').read_text(encoding='utf-8')  # a compiler that fails when it is used, on what looks like CUDA
    text = text.replace("compile == 'auto' and where.type == 'cuda'", "compile == 'auto'").replace('torch.compile(model)', 'Broken()')
    broken = 'class Broken:\n    training = True\n    def __call__(self, **k):\n        raise RuntimeError("no compiler")\n\n\n'
    (project.root / 'train.py').write_text(text.replace('def forward(batch)', broken + 'def forward(batch)'), encoding='utf-8')
    assert '--compile does not work here (RuntimeError: no compiler)' in project.fails('train.py', *TINY, '--compile', '--out_dir=other')
    assert 'eager (compiling failed: RuntimeError)' in project.train('--max_iters=1', '--compile=auto', '--out_dir=other')[0]


def test_the_schedule_is_what_the_optimizer_gets(project):  # others, and their corners: test_properties.py
    project.train('--eval_interval=1', '--learning_rate=0.01', '--schedule=cosine', '--warmup_iters=2', '--lr_decay_iters=6', '--min_lr=0.001')
    want = [1 / 3, 2 / 3] + [0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * i / 4)) for i in range(4)] + [0.1, 0.1]
    assert [float(row['lr']) for row in rows(project, 'toy')] == pytest.approx([0.01 * w for w in want], rel=1e-3)


def test_optimizer_settings(trained, project):
    """Norms and biases do not decay; Muon takes the matrices of the blocks and nothing else; clipping limits the gradient."""
    adam, muon = trained.checkpoint('toy')['optimizers']
    assert [g['weight_decay'] for g in adam['param_groups']] == [0.1, 0.0] and [len(g['params']) for g in adam['param_groups']] == [2, 5]
    assert len(muon['param_groups'][0]['params']) == 8 and [g['lr'] for g in muon['param_groups']][0] < 0.015
    momentum = []
    for clip in (1e-9, 0):
        project.train('--max_iters=1', '--optimizer=adamw', f'--grad_clip={clip}', f'--out_dir={clip}')
        state = torch.load(project.root / str(clip) / 'last.pt', weights_only=True)['optimizers'][0]['state']
        momentum.append(max(s['exp_avg'].norm().item() for s in state.values()))
    assert 0 < momentum[0] <= 1e-9 < 1e-5 < momentum[1]


def test_label_smoothing_is_for_training_only(project):
    for smoothing in (0.0, 0.3):
        project.train('--learning_rate=0', '--muon_lr=0', '--zero_init=False', '--dropout=0', '--max_iters=1', f'--label_smoothing={smoothing}',
                      f'--out_dir=s{smoothing}')
    a, b = (list(csv.DictReader(open(project.root / f's{s}' / 'log.csv', encoding='utf-8')))[0] for s in (0.0, 0.3))
    assert a['val_loss'] == b['val_loss'] and a['train_loss'] != b['train_loss']


def test_a_signal_during_evaluation(project, trained):
    """It is not waited for: the run stops, and the evaluation is made when it goes on."""
    text = (project.root / 'scores.py').read_text(encoding='utf-8')
    line = '            bar.update(count - bar.n)\n'
    assert text.count(line) == 1
    (project.root / 'scores.py').write_text(text.replace(line, line + '            __import__("signal").raise_signal(15)\n'), encoding='utf-8')
    out, _ = project.run('train.py', *TINY, '--out_dir=parts', status=143)
    (project.root / 'scores.py').write_text(text, encoding='utf-8')
    assert 'stopped by SIGTERM at step 4' in out and ', val ' not in out
    project.run('train.py', '--resume', '--out_dir=parts')
    assert_same_run(trained.checkpoint('toy'), torch.load(project.root / 'parts' / 'last.pt', weights_only=True))


def test_resume_keeps_what_the_run_was_started_with(project):
    """… also where a config file says otherwise; what stands on the command line counts, and is said."""
    (project.root / 'config' / 'mine.py').write_text('dataset = "toy"\nblock_size = 16\nn_embd = 16\nn_layer = 1\nbatch_size = 4\nmax_iters = 3\n', encoding='utf-8')
    project.run('train.py', 'config/mine.py', '--max_iters=2', '--n_layer=2', '--device=cpu')
    out, _ = project.run('train.py', 'config/mine.py', '--resume')
    assert 'config/mine.py says max_iters=3, the run was started with 2: kept; --max_iters=3 changes it' in out and 'step 2 of 2' in out
    out, _ = project.run('train.py', 'config/mine.py', '--resume', '--max_iters=4', '--gradient_checkpointing', f'--data_dir={project.root / "data"}')
    assert 'max_iters 2 -> 4' in out and 'gradient_checkpointing False -> True' in out and 'data_dir' not in out and 'step 2 of 4' in out
    state = project.checkpoint('mine')
    assert state['step'] == 4 and state['model_args']['n_layer'] == 2


def test_max_minutes(project):
    """The rates fall with the clock, to nearly nothing when the time is over; a config file's length gives way to what is typed."""
    (project.root / 'config' / 'mine.py').write_text('dataset = "toy"\nblock_size = 16\nn_embd = 16\nn_layer = 1\nbatch_size = 4\nmax_epochs = 1e6\n', encoding='utf-8')
    out, _ = project.run('train.py', 'config/mine.py', '--max_minutes=0.03', '--device=cpu', '--eval_interval=40', '--log_interval=1', '--warmup_iters=0')
    assert 'step 0 of what fits into 0.03 minutes' in out
    rates = [float(line.split('lr ')[1].split(',')[0]) for line in out.splitlines() if ', lr ' in line]
    assert rates == sorted(rates, reverse=True) and rates[0] > 9e-3 and rates[-1] < 2e-3 and len(rates) > 10
    assert project.checkpoint('mine')['step'] == len(rates) and 1 < project.checkpoint('mine')['seconds'] < 10
    out, _ = project.run('train.py', 'config/mine.py', '--resume', f'--max_iters={len(rates) + 2}')
    assert 'max_minutes 0.03 -> None' not in out and project.checkpoint('mine')['step'] == len(rates) + 2
    assert 'max_iters and max_minutes both say how long' in project.fails('train.py', '--max_minutes=1', '--max_iters=5')


def test_a_run_older_than_a_switch_goes_on_without_it(project):
    import torch
    project.train('--token_shift=False', '--out_dir=whole')
    project.train('--token_shift=False', '--out_dir=parts', '--max_iters=4')
    path = project.root / 'parts' / 'last.pt'
    state = torch.load(path, weights_only=True)
    del state['config']['token_shift'], state['model_args']['token_shift']
    torch.save(state, path)
    project.run('train.py', '--resume', '--out_dir=parts', '--max_iters=8')
    assert_same_run(*(torch.load(project.root / d / 'last.pt', weights_only=True) for d in ('whole', 'parts')))


def test_two_runs_never_share_a_folder(project):
    first = project.start('train.py', *TINY, '--max_iters=100000', '--eval_interval=20', '--log_interval=1')
    assert any(line.startswith('step 25:') for line in iter(first.stdout.readline, ''))
    try:
        for args in ((), ('--resume',)):
            assert 'another run is writing to' in project.fails('train.py', '--dataset=toy', '--block_size=16', *args)
    finally:
        first.kill()
        first.communicate()
    project.run('train.py', '--resume', '--dataset=toy', '--max_iters=1')  # whatever happened to the first, the folder is free again


def test_precision_is_chosen_and_explained(monkeypatch):
    from pocket import device
    cpu = torch.device('cpu')
    for has, want in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda has=has: has, raising=False)
        assert device.pick_dtype(cpu, 'auto')[0] == want
    assert device.pick_dtype(cpu, 'float32') == (torch.float32, 'as asked')
    for capability, want in (((7, 5), torch.float16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d, c=capability: c)
        assert device.pick_dtype(torch.device('cuda'), 'auto')[0] == want
    assert device.pick_dtype(torch.device('mps'), 'auto')[0] == torch.float32


def test_made_up_sentences_are_learned(project):
    """The loss comes near what the words hold, equally likely as they are: about 0.6 nats a character."""
    project.train('--dropout=0', '--max_iters=300', '--eval_interval=300', '--n_embd=32', '--gradient_accumulation_steps=1', '--batch_size=16')
    assert float(rows(project, 'toy')[-1]['val_loss']) < 1.0


@pytest.mark.slow
def test_the_default_run_learns_python(tmp_path):
    """python train.py, as typed."""
    p = Project(tmp_path / 'clone')
    out, _ = p.run('train.py', timeout=600, env={'OMP_NUM_THREADS': str(os.cpu_count())})
    losses = [float(row['val_loss']) for row in rows(p, 'stdlib')]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1.3, out
