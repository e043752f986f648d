"""
sample.py: prompts, samples, stop strings, the completion prompt, and mistakes.

    pytest -n 0 tests/test_sample.py
"""
import os
import re
import signal

import pytest
import torch

from pocket import checkpoint
from pocket.chat import SETTING_TYPES, ChatModel, Detokenizer, Settings
from pocket.configurator import read_options
from pocket.errors import UserError
from pocket.tokenizer import make_tokenizer

QUICK = ('--max_new_tokens=30', '--device=cpu')
GREEDY = (*QUICK, '--temperature=0')


# ---- Samples


def test_sample_continues_the_prompt(trained):
    out, err = trained.run('sample.py', *QUICK, '--start=ba do')
    assert out.startswith('ba do')
    assert len(out) == len('ba do') + 30 + len('\n')
    assert err == ''


def test_seed_decides_the_sample(trained):
    out, _ = trained.run('sample.py', *QUICK, '--start=ba do')
    again, _ = trained.run('sample.py', *QUICK, '--start=ba do')
    other, _ = trained.run('sample.py', *QUICK, '--start=ba do', '--seed=2')
    assert again == out
    assert other != out


def test_out_dir_and_weights_choose_the_checkpoint(trained):
    run = trained.root / 'out' / 'toy'
    out, _ = trained.run('sample.py', *QUICK, '--start=ba do', f'--out_dir={run}', '--weights=last')
    assert out.startswith('ba do')


def test_prompt_from_a_file_is_read_as_training_texts_are(trained, tmp_path):
    plain, _ = trained.run('sample.py', *GREEDY, '--start=ba do\ngimme')
    prompt = tmp_path / 'prompt.txt'
    contents = (b'\xef\xbb\xbfba do\r\ngimme', 'ba do\r\ngimme'.encode('utf-16'))
    for content in contents:
        prompt.write_bytes(content)
        out, _ = trained.run('sample.py', *GREEDY, f'--start=FILE:{prompt}')
        assert out == plain


def test_stop_string_that_never_comes_is_said(trained):
    out, err = trained.run('sample.py', *GREEDY, '--start=ba', '--stop=Q', '--stop=\\n')
    assert "no sample reached --stop='Q'" in err and "$'\\n'" in err
    letter = out[len('ba'):].strip()[0]
    _, err = trained.run('sample.py', *GREEDY, '--start=ba', f'--stop={letter}')
    assert err == ''


class ChatOfDocuments(ChatModel):
    """A ChatModel whose prompts can be looked at without a model."""

    def __init__(self, tok, template=None):
        self.tok = tok
        self.template = template
        self.drop_unknown = False


def test_start_can_name_the_beginning_of_a_document():
    tok = make_tokenizer('char', ['hello'], special_tokens=('eot',))
    chat = ChatOfDocuments(tok)

    def encode(text):
        return chat.encode_prompt(text, (), Settings())

    assert encode('<|endoftext|>') == [tok.eos_id]
    assert encode('<|endoftext|>hell') == [tok.eos_id, *tok.encode('hell')]
    with pytest.raises(UserError, match='does not know'):
        encode('hell<|endoftext|>')
    assert encode('') == [0]
    tok.has_documents = True
    assert encode('') == [tok.eos_id]

    # Without such a token it is text
    chat.tok = make_tokenizer('char', ['<|endoftext|>'])
    assert encode('<|endoftext|>') == chat.tok.encode('<|endoftext|>')


def test_several_prompts_and_samples_in_one_batch(trained, tmp_path):
    prompt = tmp_path / 'prompt.txt'
    prompt.write_text('gimme ', encoding='utf-8')
    out, _ = trained.run('sample.py', *GREEDY, '--start=ba', f'--start=FILE:{prompt}', '--num_samples=2')

    samples = [part.split('\n', 1)[1].rstrip('\n') for part in out.split('--- ')[1:]]
    assert len(samples) == 4
    assert samples[0] == samples[1] and samples[0].startswith('ba')
    assert samples[2] == samples[3] and samples[2].startswith('gimme ')

    # A ragged batch changes nothing
    alone, _ = trained.run('sample.py', *GREEDY, '--start=gimme ')
    assert alone.strip() == samples[2].strip()


def test_stop_string_ends_the_sample_before_it(trained):
    whole, _ = trained.run('sample.py', *GREEDY, '--start=ba')
    stop = whole[10:13]
    out, _ = trained.run('sample.py', *GREEDY, '--start=ba', f'--stop={stop}', '--stop=never')
    assert out.rstrip('\n') == whole[:whole.index(stop, 2)].rstrip('\n')


def test_drop_unknown_leaves_characters_out(trained):
    out, _ = trained.run('sample.py', *GREEDY, '--start=baß', '--drop_unknown')
    without, _ = trained.run('sample.py', *GREEDY, '--start=ba')
    assert out == without


def test_special_tokens_are_never_sampled(project, trained):
    """A model that strongly prefers its padding token, and ids that the tokenizer does not have."""
    state = trained.checkpoint('toy', 'best.pt')
    state['tokenizer'] = {'kind': 'byte'}
    state['model_args'].update(vocab_size=260)      # 257 to 259 stand for nothing
    for key in ('transformer.wte.weight', 'lm_head.weight'):
        state['model'][key] = torch.randn(260, 16)
    state['model']['lm_head.weight'][256:] *= 50
    (project.root / 'out' / 'pad').mkdir(parents=True)
    torch.save(state, project.root / 'out' / 'pad' / 'best.pt')

    out, _ = project.run('sample.py', '--out_dir=out/pad', '--start=a', '--ignore_eot', *QUICK)
    assert len(out) > 5


# ---- Detokenizing


def detokenize(text, stop):
    """The pieces that a Detokenizer makes of a text, one byte at a time."""
    tok = make_tokenizer('byte')
    detokenizer = Detokenizer(tok, stop)
    pieces = [detokenizer.add(token_id) for token_id in tok.encode(text)]
    return pieces + [detokenizer.finish()]


def test_detokenizer_holds_back_what_may_be_a_stop_string():
    assert detokenize('a--b', ['---']) == ['a', '', '', '--b', '']
    assert detokenize('a---b', ['---']) == ['a', '', '', '', '', '']
    assert detokenize('a--', ['---']) == ['a', '', '', '--']


def test_detokenizer_never_splits_a_character():
    assert detokenize('é!', []) == ['', 'é', '!', '']
    assert detokenize('éa', ['a']) == ['', 'é', '', '']


# ---- The completion prompt


def test_completion_prompt_completes_every_line(trained):
    typed = 'ba\n\nß\nfu\nexit\nnot read\n'
    out, err = trained.run('sample.py', '--chat', *QUICK, typed=typed)
    assert out.count('> ') == 5 and 'not read' not in out
    assert "does not know 'ß'" in err

    # 30 characters and two line breaks, without the prompt
    first, second = (part for part in out.split('> ')[1:] if part.strip())
    assert len(first) == len(second) == 32 and not first.startswith('ba')

    # The end of the input ends it too, and --interactive is another name for --chat
    out, _ = trained.run('sample.py', '--interactive', *QUICK, typed='ba')
    assert out.split('> ')[1].startswith(first[:30])


@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
def test_ctrl_c_ends_the_completion_prompt_without_a_traceback(trained):
    process = trained.start('sample.py', '--chat', '--max_new_tokens=1000000', '--device=cpu')
    process.stdin.write('ba\n')
    process.stdin.flush()
    out = ''
    while len(out.partition('> ')[2]) < 3:      # until it generates
        out += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and 'Traceback' not in err


# ---- Options and mistakes


def test_options_are_the_settings_of_a_chat_model(trained):
    """Types and defaults are the same in sample.py and in pocket/chat.py."""
    options = read_options((trained.root / 'sample.py').read_text(encoding='utf-8'))
    types = {option.name: option.type for option in options if option.name in SETTING_TYPES}
    assert types == SETTING_TYPES

    out, _ = trained.run('sample.py', '--help=all')
    defaults = dict(re.findall(r'--(\w+)=(\S*)', out))
    settings = Settings()
    for name in SETTING_TYPES:
        assert defaults[name] == str(getattr(settings, name)), name


def test_run_says_how_to_sample_from_it(tmp_path, trained):
    state = trained.checkpoint('toy')
    state['config']['sample_min_p'] = 0.9
    torch.save(state, tmp_path / 'best.pt')
    args = [f'--out_dir={tmp_path}', '--max_new_tokens=40', '--temperature=1']
    silent, _ = trained.run('sample.py', *args)
    the_same, _ = trained.run('sample.py', *args, '--min_p=0.9')
    another, _ = trained.run('sample.py', *args, '--min_p=0')
    assert silent == the_same != another


@pytest.mark.parametrize('length_penalty, settings', [
    (1.2, {'length_penalty': 1.2}), (99.0, {}), ('long', {}), (None, {})])
def test_length_penalty_of_a_run(length_penalty, settings):
    state = {'config': {'length_penalty': length_penalty}}
    assert checkpoint.decoding_of(state) == settings


def test_run_says_how_long_the_texts_of_a_beam_search_are(tmp_path, trained):
    """Shown by the scores: log-probabilities divided by ((5 + length) / 6)^length_penalty."""
    state = trained.checkpoint('toy')
    state['config']['length_penalty'] = 3.0
    torch.save(state, tmp_path / 'best.pt')
    args = [f'--out_dir={tmp_path}', *QUICK, '--num_beams=2', '--n_best=2', '--lines', '--start=ba']
    silent, _ = trained.run('sample.py', *args)
    the_same, _ = trained.run('sample.py', *args, '--length_penalty=3')
    another, _ = trained.run('sample.py', *args, '--length_penalty=0')
    assert silent == the_same != another


@pytest.mark.parametrize('args, message', [
    (['--start=ba ß'], "does not know 'ß' (U+00DF)"),
    (['--start=FILE:gone.txt'], 'cannot read the prompt FILE:gone.txt'),
    (['--top_p=2', '--temperature=-1'], 'temperature must be'),
    (['--num_samples=0'], 'num_samples must be'),
    (['--out_dir=gone'], 'there is no checkpoint'),
    (['--top_k=0'], 'top_k must be at least 1'),
    (['--seed=99999999999999999999'], 'seed must be'),
    (['--dtype=float16', '--device=cpu'], 'needs a GPU'),
])
def test_mistake_is_explained_in_one_sentence(trained, args, message):
    assert message in trained.fails('sample.py', *args)


@pytest.mark.parametrize('change, message', [
    ({'n_layer': 5}, 'is inconsistent'),
    ({'depth': 3}, 'is inconsistent'),
    ({'tokenizer': {'kind': 'word'}}, "unknown kind of tokenizer 'word'"),
    ({'format': 99}, 'format 99'),
    ({'format': None}, 'parts are missing'),
])
def test_checkpoint_whose_parts_do_not_fit_together(tmp_path, trained, change, message):
    state = trained.checkpoint('toy')
    if change.keys() & {'n_layer', 'depth'}:
        change = {'model_args': {**state['model_args'], **change}}
    path = tmp_path / 'best.pt'
    torch.save({**state, **change}, path)
    with pytest.raises(UserError, match=message):
        checkpoint.build(checkpoint.load(path), path)


def test_file_that_is_no_checkpoint(project):
    folder = project.root / 'out' / 'odd'
    folder.mkdir(parents=True)
    torch.save(torch.ones(3), folder / 'best.pt')
    assert 'parts are missing' in project.fails('sample.py', '--out_dir=out/odd')
