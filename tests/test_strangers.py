"""Files from strangers: what reads them works, or says one sentence. No traceback, no hang, no code, no memory they have not paid for."""
import copy
import json
import math
import os
import pickle
import random
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import CHECKOUT, TINY, make_pairs, make_toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig
from pocket import checkpoint, configurator, data, pretrained, template
from pocket.configurator import configure
from pocket.errors import UserError
from pocket.tokenizer import UnknownCharacters, make_tokenizer, tokenizer_from_dict

JUNK = [None, True, 0, 1, -1, 2, 10**9, 10**12, 2**62, 2**63, 10**30, 10**5000, 0.0, -0.5, 1e300, math.inf, math.nan, '', 'x', '5', '../../x', 'a\0b',
        '\ud800', 'é☃', '{', '{text.__class__}', '{text:>9999999999}', '<eos>', 'Z' * 5000, [], [1], ['a', 'a'], [[]], {}, {'a': 1}, {'kind': 'byte'},
        {'kind': 'char', 'chars': 'ab'}, [0, 10**15], 'F64', 'F4', '..']
TENSORS = [(), (1, 2), b'x', torch.ones(3), torch.zeros(0), torch.tensor(math.nan), torch.ones(2, 2, dtype=torch.int64), torch.ones(1).expand(10**12),
           torch.ones(4).to_sparse(), torch.ones(8, 8, dtype=torch.complex64)]


def answers(f):
    """f works, or says one sentence."""
    try:
        f()
    except UserError as e:
        assert str(e).strip() and len(str(e)) <= 3000 and '\n' not in str(e)


def hammer(f, n):
    """Call f(rng) n times, always with the same n random generators."""
    @settings(derandomize=True, database=None, deadline=None, max_examples=n, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32))
    def run(seed):
        answers(lambda: f(random.Random(seed)))
    run()


def places(x, at=()):
    for key, value in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ():
        yield (*at, key)
        yield from places(value, (*at, key))


def mutate(x, rng, junk=JUNK):
    """x with one to three of its values, at any depth, something else or gone."""
    x = copy.deepcopy(x)
    for _ in range(rng.choice((1, 1, 2, 3))):
        *path, key = rng.choice(list(places(x)) or [('x',)])
        parent = x
        for step in path:
            parent = parent[step]
        if isinstance(parent, tuple):
            continue
        if rng.random() < 0.15:
            parent.pop(key, None) if isinstance(parent, dict) else parent.pop(key)
        elif isinstance(parent, dict) and rng.random() < 0.15:
            parent[rng.choice(('x', 'chat', 'n_head', 'cutoffs', 'specials'))] = rng.choice(junk)
        else:
            parent[key] = copy.deepcopy(rng.choice(junk))
    return x


def scratch(raw, rng):
    """Bytes that were cut, or have a few others."""
    raw = bytearray(raw)
    if rng.random() < 0.3:
        return bytes(raw[:rng.randrange(len(raw))])
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.choice((rng.randrange(len(raw)), rng.randrange(min(400, len(raw))), len(raw) - 1 - rng.randrange(min(2000, len(raw)))))
        raw[at:at + rng.randrange(3)] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
    return bytes(raw)


def write_json(path, content):
    path.write_text(json.dumps(content), encoding='utf-8', errors='surrogatepass')


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints

def some_state(folder, kind='gpt', **fields):
    """The state of a tiny run on characters or, for a seq2seq or with cutoffs, on pairs with a format of conversations."""
    torch.manual_seed(0)
    meta = json.loads(((make_pairs if kind == 'seq2seq' or 'cutoffs' in fields else make_toy)(folder) / 'meta.json').read_text(encoding='utf-8'))
    Model, Config = checkpoint.KINDS[kind]
    net = Model(Config(block_size=16, vocab_size=meta['vocab_size'], n_layer=1, n_head=2, n_embd=8, **fields))
    return {'format': 1, **checkpoint.model_state(net, tokenizer_from_dict(meta['tokenizer']), {'dataset': 'toy', 'n_embd': 8}, meta.get('chat')), 'step': 3,
            'tokens': 9, 'seconds': 1.0, 'best': 2.0, 'bad_evals': 0, 'evaluated': 3, 'loss_sum': 0.0, 'loss_tokens': 0, 'grad_norm': 1.0}


def write_with(path):
    """What sample.py does with a checkpoint."""
    state = checkpoint.load(path)
    model, tok = checkpoint.build(state, path, gradient_checkpointing=False)
    style, (T, V) = state.get('chat'), (model.config.block_size, model.config.vocab_size)
    start, banned = template.reply_start_ids(tok, style) if style else None, set(tok.special_tokens.values()) - {tok.eos_id} | set(range(tok.vocab_size, V))
    try:
        ids = template.encode_conversation(tok, style, [(style['you'], 'ba'), (style['me'], 'ba')], model.reply_room(start, 3)) if style else tok.encode_prompt('ba')
    except UnknownCharacters:
        return
    prompt = model.reply_prompts([ids], start, 3)[0] if style else ids[-T:]
    for column in model.stream([prompt], 3, tok.eos_id, start, 1, banned, top_k=20):
        tok.decode([i for i in column.tolist() if i >= 0])


def checkpoints(folder, by_bytes=False):
    states = [some_state(folder, **kw) for kw in ({'pos': 'rotary', 'token_shift': True}, {}, {'cutoffs': (10, 15), 'div_value': 2.0, 'tie_weights': False},
                                                   {'kind': 'seq2seq', 'src_block_size': 24})]
    path, raw = folder / 'x.pt', []
    for state in states if by_bytes else ():
        torch.save(state, path)
        raw.append(path.read_bytes())

    def use(rng):
        if by_bytes:
            path.write_bytes(scratch(rng.choice(raw), rng))
        else:
            torch.save(mutate(rng.choice(states), rng, JUNK + TENSORS), path)
        write_with(path)
    return use


class Code:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_code_never_runs(tmp_path):
    proof, path = tmp_path / 'it ran', tmp_path / 'x.pt'
    torch.save({'model': Code(proof)}, path)
    with pytest.raises(UserError, match='it holds code, which is never loaded'):
        checkpoint.load(path)
    torch.save({'model': Code(proof)}, path, _use_new_zipfile_serialization=False)
    legacy = path.read_bytes()
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    for content in (legacy, pickle.dumps(Code(proof)), path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match='is not a checkpoint of pocketGPT'):
            checkpoint.load(path)
    assert not proof.exists()


@pytest.mark.skipif(sys.platform != 'linux', reason='where peaks are measured')
def test_no_memory_is_taken_on_a_files_word(tmp_path):
    """Few bytes that claim to be much: by their config, by repeated numbers, by compression."""
    import resource
    path, state = tmp_path / 'x.pt', some_state(tmp_path, pos='sinusoidal')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wte = torch.ones(1, 1).expand(2**40, 8)
    for fields, tensors, said in (({'n_layer': 10**9}, {}, 'n_layer must be from 1 to 1,024'), ({'block_size': 10**12}, {}, 'block_size must be from 1 to'),
                                  ({'block_size': 2**20, 'n_embd': 2**12}, {}, 'too large with 1048576: lower block_size'),
                                  ({'n_embd': 2**24}, {}, 'positions are a table'), ({'vocab_size': 2**61}, {}, 'does not fit together'),
                                  ({'vocab_size': 2**40}, {}, 'must be'), ({'n_inner': 2**24}, {}, 'c_fc'), ({'cutoffs': tuple(range(1, 20))}, {}, 'cutoffs'), ({'n_head': True}, {}, 'n_head must be of type int, got bool'),
                                  ({'vocab_size': 2**40}, {'transformer.wte.weight': wte, 'lm_head.weight': wte}, 'smaller than its weights say')):
        torch.save({**state, 'model_args': {**state['model_args'], **fields}, 'model': {**state['model'], **tensors}}, path)
        with pytest.raises(UserError, match=said):
            checkpoint.load(path)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        with z.open('x/data.pkl', 'w') as f:
            for _ in range(300):
                f.write(bytes(2**20))
    with pytest.raises(UserError, match='cut short or something else'):
        checkpoint.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_weights_that_are_no_numbers(tmp_path):
    state, path = some_state(tmp_path), tmp_path / 'x.pt'
    for value in (math.nan, math.inf, -math.inf):
        state['model']['transformer.h.0.mlp.c_fc.weight'][3, 2] = value
        torch.save(state, path)
        with pytest.raises(UserError, match=r'mlp.c_fc.weight has values that are infinite or no numbers \(NaN\): take an earlier checkpoint'):
            checkpoint.load(path)
    pretrained.export_folder(GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=4)), make_tokenizer('byte'), tmp_path / 'g')
    tensors = load_file(tmp_path / 'g' / 'model.safetensors')
    tensors['transformer.wpe.weight'][0, 0] = math.nan
    save_file(tensors, tmp_path / 'g' / 'model.safetensors')
    with pytest.raises(UserError, match='transformer.wpe.weight in .* has values that are infinite or no numbers'):
        pretrained.load(tmp_path / 'g')


def test_versions(tmp_path):
    """Older checkpoints load: before token_shift, chat and the count of tokens. Newer ones are refused before anything else is said."""
    path, state = tmp_path / 'x.pt', some_state(tmp_path, 'seq2seq') | {'grad_norm': math.inf}  # as float16 leaves it now and then
    for field in ('token_shift', 'cutoffs', 'div_value'):
        del state['model_args'][field]
    del state['tokens'], state['chat']
    torch.save(state, path)
    assert checkpoint.build(checkpoint.load(path), path)[0].config.token_shift is False
    write_with(path)  # with template.PLAIN_TEMPLATE
    torch.save({'format': 2, 'weights': 'elsewhere'}, path)
    with pytest.raises(UserError, match='has format 2, this version reads up to 1: use a newer pocketGPT'):
        checkpoint.load(path)
    write_json(make_toy(tmp_path) / 'meta.json', {'format': 2, 'shards': []})
    with pytest.raises(UserError, match='has format 2, this version reads up to 1: use a newer pocketGPT, or prepare'):
        data.load_meta(tmp_path / 'data' / 'toy')


def test_cut_anywhere(tmp_path):
    """A checkpoint without its end, at every byte of the zip's directory; a safetensors file at every byte of its header."""
    torch.save(some_state(tmp_path), tmp_path / 'x.pt')
    pretrained.export_folder(GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=4)), make_tokenizer('byte'), tmp_path / 'g')
    for path, read, ends in ((tmp_path / 'x.pt', checkpoint.load, (0, 200, -500)), (tmp_path / 'g' / 'model.safetensors', lambda p: pretrained.find_tensors(p.parent), (0, 1600, -50))):
        raw = path.read_bytes()
        for n in [*range(*ends[:2]), *range(ends[1], len(raw), 500), *range(len(raw) + ends[2], len(raw))]:
            path.write_bytes(raw[:n])
            with pytest.raises(UserError):
                read(path)


# ----------------------------------------------------------------------------------------------------------------------
# datasets, tokenizers, GPT-2 folders

def datasets(folder):
    def use(rng):
        shutil.rmtree(folder / 'data', ignore_errors=True)
        d = rng.choice((make_toy, make_pairs))(folder)
        path = d / rng.choice(('meta.json', 'meta.json', 'meta.json', 'train.bin', 'val.bin', 'train.idx'))
        if path.name == 'meta.json' and rng.random() < 0.8:
            write_json(path, mutate(json.loads(path.read_text(encoding='utf-8')), rng, [j for j in JUNK if j != 10**5000]))
        elif path.is_file() and path.suffix != '.json' and rng.random() < 0.5:
            ids = np.fromfile(path, dtype='<u2' if path.suffix == '.bin' else '<i8')
            ids[rng.randrange(len(ids))] = rng.choice((0, 50, 65535) if path.suffix == '.bin' else (0, -1, 2**62, -2**62, -2**63, 5))
            ids.tofile(path)
        elif path.is_file():
            path.write_bytes(scratch(path.read_bytes(), rng))
        meta = data.load_meta(d)
        try:
            tok = tokenizer_from_dict(meta['tokenizer'])
        except ValueError as e:  # train.py, too
            raise UserError(str(e)) from None
        if tok.vocab_size != meta['vocab_size']:
            return
        pairs, style = meta['kind'] == 'pairs', meta.get('chat', template.PLAIN_TEMPLATE)
        source = rng.choice((24, None))
        split = data.Pairs(d, meta, 'train', template.reply_start_ids(tok, style), 16, source, 300) if pairs else data.Stream(d, meta, 'train', 16, 4)
        list(split.batches(1, 3, 2)), split.count_bytes(tok.byte_lengths()), split.token_counts()
    return use


def tokenizers(folder):
    known = [make_tokenizer('char', ['hello ba'], special_tokens=('eos',)), make_tokenizer('byte'), make_tokenizer('bpe', ['the cat sat on the mat'] * 9, 269),
             make_tokenizer('sentencepiece', ['the cat sat on the mat\n'] * 30, 289, ('eos',))]

    def use(rng):
        try:
            tok = tokenizer_from_dict(mutate(rng.choice(known).to_dict(), rng))
        except ValueError as e:
            raise UserError(str(e)) from None
        try:
            tok.decode(tok.encode('ba the cat'))
        except UnknownCharacters:
            pass
        assert tok.encode_prompt('') and all(0 <= i < tok.vocab_size for i in tok.encode_prompt(''))
        tok.decode(range(tok.vocab_size)), tok.vocabulary_listing(), tokenizer_from_dict(json.loads(json.dumps(tok.to_dict())))
    return use


def gpt2_folders(folder):
    tok, there, here = make_tokenizer('bpe', ['the cat sat on the mat'] * 9, 269), folder / 'there', folder / 'here'
    pretrained.export_folder(GPT(GPTConfig(block_size=16, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_embd=8)), tok, there)
    raw = (there / 'model.safetensors').read_bytes()
    size = 8 + int.from_bytes(raw[:8], 'little')
    header, junk = json.loads(raw[8:size]), [j for j in JUNK if j != 10**5000]

    def use(rng):
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(there, here)
        path = here / rng.choice(('config.json', 'tokenizer.json', 'model.safetensors', 'index'))
        if path.name == 'index':
            (here / 'model.safetensors').rename(here / 'a.safetensors')
            write_json(here / 'model.safetensors.index.json', mutate({'weight_map': dict.fromkeys(header, 'a.safetensors')}, rng, junk))
        elif rng.random() < 0.4:
            path.write_bytes(scratch(path.read_bytes(), rng))
        elif path.name == 'model.safetensors':
            text = json.dumps(mutate(header, rng, junk)).encode('utf-8', 'surrogatepass')
            path.write_bytes(len(text).to_bytes(8, 'little') + text + raw[size:])
        else:
            write_json(path, mutate(json.loads(path.read_text(encoding='utf-8')), rng, junk))
        pretrained.load(str(here))[0].generate([[1, 2]], 3, temperature=0)
        pretrained.load_tokenizer(str(here))
    return use


# ----------------------------------------------------------------------------------------------------------------------
# what is typed, and config files

VALUES = ['', '1', '-1', '1e3', '1e400', 'nan', '9' * 5000, 'None', 'true', '{[]}', '{[]:1}', '(' * 300, '-' * 9000 + '1', '1+2j', "b'x'", '"', '\\', 'auto', '1,2',
          '1,,2', '[1,2]', '(((1', '{1,2}', '1.5.2', 'é☃', '\ud800', '...', '__import__("os")', '10**9', 'a\nb', 'a' * 5000, '~nobody9/x', '\0', '99999999999999999999']
LINES = ['n_layer = VALUE', 'VALUE', 'n_layer = [1]', 'del n_layer', 'raise ValueError("a\\nb")', 'globals()[5] = 3', 'cutoffs = (1, (2,))', 'dropout = 10**400',
         'out_dir = b"x"', 'def f(): f()\nf()', '\0', 'raise SystemExit(0)', 'import numpy; act = numpy.zeros(3)', 'batch_size = 10**30', 'batch_size *= 2']


def typed(folder):
    source, config, script = (CHECKOUT / 'train.py').read_text(encoding='utf-8').split('config, explicit')[0], folder / 'c.py', folder / 'script.py'
    keep = ('cutoffs', 'dropout', 'n_layer', 'batch_size', 'act', 'out_dir', 'compile', 'max_epochs')  # of each type one: reading them is what costs time
    source = '\n'.join(['from typing import Literal', *(line for line in source.splitlines() if line.split(' ')[0].rstrip(':') in keep)])
    script.write_text(source + '\nconfigure(__file__, globals())', encoding='utf-8')
    start = {}
    exec(source, start)

    def use(rng):
        argv, value = [], rng.choice(VALUES)
        for _ in range(rng.choice((1, 2, 3))):
            form = rng.choice(('--KNOB=VALUE', '--KNOB=VALUE', '--KNOB=VALUE', 'VALUE', '--VALUE', 'VALUE.py', '--KNOB', str(config)))
            argv.append(form.replace('KNOB', rng.choice(keep)).replace('VALUE', value))
        text = '\n'.join(rng.choice(LINES).replace('VALUE', rng.choice(VALUES)) for _ in range(3))
        config.write_text(text, encoding='utf-8', errors='surrogatepass')
        configure(str(script), {name: copy.copy(start[name]) for name in keep}, argv)
    return use


FUZZERS = {'checkpoints': (checkpoints, 60), 'their bytes': (lambda f: checkpoints(f, by_bytes=True), 60), 'datasets': (datasets, 60), 'tokenizers': (tokenizers, 150),
           'gpt2 folders': (gpt2_folders, 60), 'typed': (typed, 150)}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('what', FUZZERS)
def test_anything(what, tmp_path, monkeypatch):
    monkeypatch.setattr(configurator, 'show_user_errors', lambda script: None)
    make_use, n = FUZZERS[what]
    hammer(make_use(tmp_path), n)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('what', FUZZERS)
def test_anything_at_length(what, tmp_path, monkeypatch):
    """POCKETGPT_FUZZ inputs of each kind, 3,000 where that is not set: a quarter of an hour."""
    monkeypatch.setattr(configurator, 'show_user_errors', lambda script: None)
    hammer(FUZZERS[what][0](tmp_path), int(os.environ.get('POCKETGPT_FUZZ', 3000)))


def test_path_tricks(project):
    """A dataset's name comes from a checkpoint, too: it never chooses a script outside prepare/. Nor an index its shards."""
    (project.root / 'evil.py').write_text('open("it ran", "w")', encoding='utf-8')
    state = some_state(project.root)
    (project.root / 'out' / 'x').mkdir(parents=True)
    torch.save({**state, 'optimizers': [], 'config': {'dataset': '../evil', 'data_dir': 'elsewhere'}}, project.root / 'out' / 'x' / 'last.pt')
    assert "there is no dataset '../evil'" in project.fails('train.py', '--resume', '--out_dir=out/x')
    assert not (project.root / 'it ran').exists()
    for name in ('a' * 300, '../' * 2000):
        assert "can't be a path" in project.fails('train.py', f'--dataset={name}')


def test_formats_of_conversations(tmp_path):
    tok = make_tokenizer('char', ['UB: ba'], special_tokens=('sep', 'eos'))
    good = {'turn': '{speaker}: {text}', 'between': '<sep>', 'begin': '', 'turns': 3, 'you': 'U', 'me': 'B', 'reply': 'B: '}
    template.check(good, tok)
    assert tok.decode(template.encode_conversation(tok, good, [('U', 'ba'), ('B', 'ab')])) == 'U: baB: ab'
    for change in ({'turn': 'text'}, {'turn': 5}, {'turns': 0}, {'turns': True}, {'turns': '3'}, {'you': None}, {'between': ['<sep>']}, {'reply': 'x' * 10**6}):
        with pytest.raises(ValueError, match='chat, the format of conversations, must have turn, between'):
            template.check({**good, **change})
    for change in ({'turn': '{speaker}!r {text}'}, {'turn': '{text:>9999999999}'}, {'reply': 'Bot: '}, {'begin': '<bos>'}):
        with pytest.raises(ValueError):
            template.check({**good, **change}, tok)
    with pytest.raises(UserError, match='no special id to begin a reply with'):
        template.reply_start_ids(make_tokenizer('char', ['B: ']), good)


def test_resume_from_a_damaged_run(project, trained):
    """Settings of another type, an optimizer of another shape, numbers that are none: refused by name. log.csv: what is whole stays."""
    shutil.copytree(trained.root / 'out' / 'toy', project.root / 'out' / 'toy')
    path, state = project.root / 'out' / 'toy' / 'last.pt', trained.checkpoint('toy')
    adam = copy.deepcopy(state['optimizers'])
    adam[0]['state'][1]['exp_avg'] = torch.ones(3)
    for change, said in (({'config': {**state['config'], 'batch_size': 'x'}}, 'is damaged: its batch_size should be a whole number'),
                         ({'optimizers': adam}, 'what the optimizer has kept of the steps before is damaged'), ({'seconds': math.nan}, 'no such thing (seconds)')):
        torch.save({**state, **change}, path)
        assert said in project.fails('train.py', '--resume', '--out_dir=out/toy', '--max_iters=9')
    torch.save(state, path)
    log = path.with_name('log.csv')
    log.write_bytes(log.read_bytes().replace(b'\n8,', b'\n8,\xff\0' + b'9' * 200_000))
    project.run('train.py', '--resume', '--out_dir=out/toy', '--max_iters=10', TINY[-1])
    assert [line.split(',')[0] for line in log.read_text(encoding='utf-8').splitlines()] == ['step', '4', '10']
