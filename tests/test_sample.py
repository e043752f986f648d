"""sample.py: prompts, samples, stop strings, the completion prompt, and mistakes."""
import ast
import os
import re
import signal

import pytest
import torch

from pocket import checkpoint
from pocket.errors import UserError

QUICK = ('--max_new_tokens=30', '--device=cpu')


def test_writes_behind_the_prompt(trained):
    out, err = trained.run('sample.py', *QUICK, '--start=ba do')
    assert out.startswith('ba do') and len(out) == 5 + 30 + 1 and err == ''
    assert trained.run('sample.py', *QUICK, '--start=ba do')[0] == out  # the same seed
    assert trained.run('sample.py', *QUICK, '--start=ba do', '--seed=2')[0] != out
    assert trained.run('sample.py', *QUICK, '--start=ba do', f'--out_dir={trained.root / "out" / "toy"}', '--weights=last')[0].startswith('ba do')


def test_several_prompts_and_samples(trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text('gimme ', encoding='utf-8')
    out, _ = trained.run('sample.py', *QUICK, '--start=ba', f'--start=FILE:{tmp_path / "prompt.txt"}', '--num_samples=2', '--temperature=0')
    parts = [part.split('\n', 1)[1].rstrip('\n') for part in out.split('--- ')[1:]]
    assert len(parts) == 4 and parts[0] == parts[1] and parts[2] == parts[3] and parts[0].startswith('ba') and parts[2].startswith('gimme ')
    alone, _ = trained.run('sample.py', *QUICK, '--start=gimme ', '--temperature=0')
    assert alone.strip() == parts[2].strip()  # a ragged batch changes nothing


def test_stop_strings_end_the_text_before_them(trained):
    whole, _ = trained.run('sample.py', *QUICK, '--start=ba', '--temperature=0')
    stop = whole[10:13]
    out, _ = trained.run('sample.py', *QUICK, '--start=ba', '--temperature=0', f'--stop={stop}', '--stop=never')
    assert out.rstrip('\n') == whole[:whole.index(stop, 2)].rstrip('\n')


def test_completion_prompt(trained):
    out, err = trained.run('sample.py', '--chat', *QUICK, typed='ba\n\nß\nfu\nexit\nnot read\n')
    assert out.count('> ') == 5 and "does not know 'ß'" in err and 'not read' not in out
    first, second = (part for part in out.split('> ')[1:] if part.strip())
    assert len(first) == len(second) == 32 and not first.startswith('ba')  # 30 characters and two line breaks, not the prompt
    out, _ = trained.run('sample.py', '--interactive', *QUICK, typed='ba')  # the end of input ends it too
    assert out.split('> ')[1].startswith(first[:30])


@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
def test_ctrl_c_in_the_completion_prompt(trained):
    process = trained.start('sample.py', '--chat', '--max_new_tokens=1000000', '--device=cpu')
    process.stdin.write('ba\n')
    process.stdin.flush()
    got = ''
    while len(got.partition('> ')[2]) < 3:
        got += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and 'Traceback' not in err


@pytest.mark.parametrize('args, said', [
    (['--start=ba ß'], "does not know 'ß' (U+00DF)"), (['--start=FILE:gone.txt'], 'cannot read the prompt FILE:gone.txt'),
    (['--top_p=2', '--temperature=-1'], 'temperature must be'), (['--num_samples=0'], 'must be at least 1'), (['--out_dir=gone'], 'there is no checkpoint'),
    (['--top_k=0'], 'top_k must be at least 1'), (['--seed=99999999999999999999'], 'seed must be'), (['--dtype=float16', '--device=cpu'], 'needs a GPU')])
def test_mistakes(trained, args, said):
    assert said in trained.fails('sample.py', *args)


def test_drop_unknown(trained):
    out, _ = trained.run('sample.py', *QUICK, '--start=baß', '--drop_unknown', '--temperature=0')
    assert out == trained.run('sample.py', *QUICK, '--start=ba', '--temperature=0')[0]


def test_knobs_are_the_settings_that_a_talk_has(trained):
    from pocket.chat import SETTINGS
    from pocket.configurator import read_options
    source = (trained.root / 'sample.py').read_text(encoding='utf-8')
    assert SETTINGS == {name: (kind, ast.literal_eval(re.search(rf'(?m)^{name}[^=]*= (\S+)', source)[1]))
                        for name, kind, _ in read_options(source) if name in SETTINGS}


def test_checkpoint_that_does_not_fit_together(project, trained):
    folder = project.root / 'out' / 'odd'
    folder.mkdir(parents=True)
    state = trained.checkpoint('toy')
    for change, said in (({'model_args': {**state['model_args'], 'n_layer': 5}}, 'does not fit together'), ({'model_args': {'depth': 3}}, 'does not fit together'),
                         ({'tokenizer': {'kind': 'word'}}, "unknown kind of tokenizer 'word'"), ({'format': 99}, 'format 99'), ({'format': None}, 'parts are missing')):
        torch.save({**state, **change}, folder / 'best.pt')
        with pytest.raises(UserError, match=said):
            checkpoint.build(checkpoint.load(folder / 'best.pt'), folder / 'best.pt')
    torch.save(torch.ones(3), folder / 'best.pt')
    assert 'parts are missing' in project.fails('sample.py', '--out_dir=out/odd')


def test_special_ids_are_never_written(project, trained):
    """A model that wants nothing but its padding token."""
    state = trained.checkpoint('toy', 'best.pt')
    state['tokenizer'] = {'kind': 'byte'}
    state['model_args'].update(vocab_size=260)  # 257 to 259 mean nothing
    for key in ('transformer.wte.weight', 'lm_head.weight'):
        state['model'][key] = torch.randn(260, 16)
    state['model']['lm_head.weight'][256:] *= 50
    (project.root / 'out' / 'pad').mkdir(parents=True)
    torch.save(state, project.root / 'out' / 'pad' / 'best.pt')
    out, _ = project.run('sample.py', '--out_dir=out/pad', '--start=a', '--ignore_eot', *QUICK)
    assert len(out) > 5
