"""
Files from somebody else: what reads them works, or says one sentence. No traceback, no hang, no
code that runs, no memory that the file itself does not take.

    pytest -n 0 tests/test_untrusted_files.py
    pytest -n 0 -m slow tests/test_untrusted_files.py       fuzzing at length: a quarter of an hour
"""
import copy
import io
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
from conftest import TINY, make_pairs, make_toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig
from pocket import checkpoint, configurator, data, pretrained, template
from pocket.configurator import configure
from pocket.errors import Output, UserError
from pocket.generate import (
    SamplingParams,
    generate_stream,
    max_source_tokens,
    prepare_reply_prompts,
)
from pocket.template import ChatTemplate
from pocket.tokenizer import (
    BpeTokenizer,
    UnknownCharacters,
    make_tokenizer,
    tokenizer_from_dict,
)

JUNK = [
    None, True, 0, 1, -1, 2, 10**9, 10**12, 2**62, 2**63, 10**30, 10**5000,
    0.0, -0.5, 1e300, math.inf, math.nan,
    '', 'x', '5', '..', '../../x', 'a\0b', '\ud800', 'é☃', '{', '{text.__class__}',
    '{text:>9999999999}', '<eos>', 'Z' * 5000, 'F64', 'F4',
    [], [1], ['a', 'a'], [[]], [0, 10**15],
    {}, {'a': 1}, {'kind': 'byte'}, {'kind': 'char', 'chars': 'ab'},
]
JSON_JUNK = [junk for junk in JUNK if junk != 10**5000]  # Python does not print so many digits
TENSOR_JUNK = [
    (), (1, 2), b'x', torch.ones(3), torch.zeros(0), torch.tensor(math.nan),
    torch.ones(2, 2, dtype=torch.int64), torch.ones(1).expand(10**12), torch.ones(4).to_sparse(),
    torch.ones(8, 8, dtype=torch.complex64),
]

# --------------------------------------------------------------------------------------------------
# Fuzzing


def works_or_explains(function, *args):
    """Call function(*args): it works, or raises a UserError of one sentence."""
    try:
        function(*args)
    except UserError as e:
        text = str(e)
        assert text.strip() and len(text) <= 3000 and '\n' not in text


def fuzz(function, n):
    """Call function(rng) n times, with the same n random generators each time that this is called.
    """
    @settings(derandomize=True, database=None, deadline=None, max_examples=n,
              suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32))
    def run(seed):
        works_or_explains(function, random.Random(seed))

    run()


def places(x, path=()):
    """Paths to all values in nested dicts and lists: tuples of keys."""
    items = []
    if isinstance(x, dict):
        items = x.items()
    elif isinstance(x, (list, tuple)):
        items = enumerate(x)
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutate(x, rng, junk=JUNK):
    """A copy of x in which one to three values, at any depth, are something else or gone."""
    x = copy.deepcopy(x)
    for _ in range(rng.choice((1, 1, 2, 3))):
        *path, key = rng.choice(list(places(x)) or [('x',)])
        parent = x
        for step in path:
            parent = parent[step]
        if isinstance(parent, tuple):
            continue
        if rng.random() < 0.15:  # remove
            if isinstance(parent, dict):
                parent.pop(key, None)
            else:
                parent.pop(key)
        elif isinstance(parent, dict) and rng.random() < 0.15:  # add
            parent[rng.choice(('x', 'chat', 'n_head', 'cutoffs', 'specials'))] = rng.choice(junk)
        else:
            parent[key] = copy.deepcopy(rng.choice(junk))
    return x


def corrupt(content, rng):
    """Bytes that end too early, or have a few others in their place."""
    content = bytearray(content)
    size = len(content)
    if rng.random() < 0.3:
        return bytes(content[:rng.randrange(size)])
    for _ in range(rng.choice((1, 1, 2, 8))):
        anywhere = rng.randrange(len(content))
        near_the_start = rng.randrange(min(400, len(content)))
        near_the_end = len(content) - 1 - rng.randrange(min(2000, len(content)))
        place = rng.choice((anywhere, near_the_start, near_the_end))
        others = [rng.randrange(256) for _ in range(rng.randrange(3))]
        content[place:place + rng.randrange(3)] = bytes(others)
    return bytes(content)


def write_json(path, content):
    path.write_text(json.dumps(content), encoding='utf-8', errors='surrogatepass')


def read_json(path):
    return json.loads(path.read_text(encoding='utf-8'))


# --------------------------------------------------------------------------------------------------
# Checkpoints


def tiny_state(folder, kind='gpt', pairs=False, **fields):
    """The state of a tiny run, on characters or on pairs with a chat template."""
    torch.manual_seed(0)
    dataset = make_pairs(folder) if pairs else make_toy(folder)
    meta = read_json(dataset / 'meta.json')
    Model, Config = checkpoint.MODELS[kind]
    sizes = {'block_size': 16, 'n_layer': 1, 'n_head': 2, 'n_embd': 8}
    model = Model(Config(vocab_size=meta['vocab_size'], **sizes, **fields))
    tok = tokenizer_from_dict(meta['tokenizer'])
    chat = ChatTemplate.from_dict(meta['chat']) if pairs else None
    return {
        'format': 1,
        **checkpoint.model_state(model, tok, {'dataset': 'toy', 'n_embd': 8}, chat),
        'step': 3, 'tokens': 9, 'seconds': 1.0, 'best': 2.0, 'bad_evals': 0, 'evaluated': 3,
        'loss_sum': 0.0, 'loss_tokens': 0, 'grad_norm': 1.0,
    }


def sample_from(path):
    """Do with a checkpoint what sample.py does."""
    state = checkpoint.load(path)
    model, tok = checkpoint.build(state, path, gradient_checkpointing=False)
    banned = template.banned_ids(tok, model.config.vocab_size, keep=tok.eos_id)
    decoder_start = None
    try:
        if state.get('chat') is None:
            prompts = [tok.encode_prompt('ba')[-model.config.block_size:]]
        else:
            chat = ChatTemplate.from_dict(state['chat'])
            turns = [(chat.user, 'ba'), (chat.assistant, 'ba')]
            decoder_start = template.reply_start_ids(tok, chat)
            room = max_source_tokens(model, decoder_start, 3)
            source = template.encode_conversation(tok, chat, turns, room)
            prompts = prepare_reply_prompts(model, [source], decoder_start, 3)
    except UnknownCharacters:
        return
    params = SamplingParams(top_k=20)
    stream = generate_stream(model, prompts, 3, params, tok.eos_id, decoder_start, banned, seed=1)
    for column in stream:
        tok.decode([i for i in column.tolist() if i >= 0])


def states_of_all_kinds(folder):
    return [
        tiny_state(folder, pos='rotary', token_shift=True),
        tiny_state(folder),
        tiny_state(folder, pairs=True, cutoffs=(10, 15), div_value=2.0, tie_weights=False),
        tiny_state(folder, kind='seq2seq', pairs=True, src_block_size=24),
    ]


def fuzz_checkpoints(folder):
    """Checkpoints with strange values."""
    states = states_of_all_kinds(folder)
    path = folder / 'x.pt'

    def use(rng):
        torch.save(mutate(rng.choice(states), rng, JUNK + TENSOR_JUNK), path)
        sample_from(path)
    return use


def fuzz_checkpoint_bytes(folder):
    """Damaged files of checkpoints."""
    path = folder / 'x.pt'
    contents = []
    for state in states_of_all_kinds(folder):
        torch.save(state, path)
        contents.append(path.read_bytes())

    def use(rng):
        path.write_bytes(corrupt(rng.choice(contents), rng))
        sample_from(path)
    return use


class MakesFolder:
    """Unpickling this makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_never_runs(tmp_path):
    proof = tmp_path / 'it ran'
    path = tmp_path / 'x.pt'
    torch.save({'model': MakesFolder(proof)}, path)
    with pytest.raises(UserError, match='contains code, which is never loaded'):
        checkpoint.load(path)

    torch.save({'model': MakesFolder(proof)}, path, _use_new_zipfile_serialization=False)
    legacy = path.read_bytes()
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    torchscript = path.read_bytes()
    for content in (legacy, pickle.dumps(MakesFolder(proof)), torchscript):
        path.write_bytes(content)
        with pytest.raises(UserError, match='is not a checkpoint of pocketGPT'):
            checkpoint.load(path)
    assert not proof.exists()


CLAIMS = [  # (fields of the config, what the error says)
    ({'n_layer': 10**9}, 'n_layer must be from 1 to 1,024'),
    ({'block_size': 10**12}, 'block_size must be from 1 to'),
    ({'block_size': 2**20, 'n_embd': 2**12}, 'too large with 1048576: lower block_size'),
    ({'n_embd': 2**24}, 'positions are a table'),
    ({'vocab_size': 2**61}, 'is inconsistent'),
    ({'vocab_size': 2**40}, 'must be'),
    ({'n_inner': 2**24}, 'c_fc'),
    ({'cutoffs': tuple(range(1, 20))}, 'cutoffs'),
    ({'n_head': True}, 'n_head must be of type int, got bool'),
    ({'pos': 'learned', 'norm': 'rmsnorm', 'n_embd': 2**24, 'n_layer': 2**10}, 'weights|must be'),
    ({'block_size': 2**20, 'n_embd': 64}, 'far more than the file'),
    ({'cutoffs': (2, (1,) * 10**4)}, r'got \(2, \(1, 1, 1, 1, 1, 1, \.\.\.'),
]


@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is measured there')
def test_checkpoint_takes_no_memory_on_its_word(tmp_path):
    """Few bytes that claim to be much: in their config, as repeated numbers, by compression."""
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB

    path = tmp_path / 'x.pt'
    state = tiny_state(tmp_path, pos='sinusoidal')
    before = peak()
    for fields, message in CLAIMS:
        torch.save({**state, 'model_args': {**state['model_args'], **fields}}, path)
        with pytest.raises(UserError, match=message):
            checkpoint.load(path)

    repeated = torch.ones(1, 1).expand(2**40, 8)
    model = {**state['model'], 'transformer.wte.weight': repeated, 'lm_head.weight': repeated}
    config = {**state['model_args'], 'vocab_size': 2**40}
    torch.save({**state, 'model_args': config, 'model': model}, path)
    with pytest.raises(UserError, match='smaller than its weights'):
        checkpoint.load(path)

    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        with archive.open('x/data.pkl', 'w') as f:
            for _ in range(300):
                f.write(bytes(2**20))
    with pytest.raises(UserError, match='is not a checkpoint'):
        checkpoint.load(path)
    assert peak() - before < 200_000


def tiny_gpt2_folder(folder):
    """A folder as Hugging Face's tools have it, with a tiny GPT-2."""
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=4))
    pretrained.export_folder(model, make_tokenizer('byte'), folder)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    path = tmp_path / 'x.pt'
    state = tiny_state(tmp_path)
    state['model']['transformer.h.0.mlp.c_fc.weight'][3, 2] = value
    torch.save(state, path)
    with pytest.raises(UserError, match='mlp.c_fc.weight has .*: take an earlier checkpoint'):
        checkpoint.load(path)

    folder = tmp_path / 'gpt2'
    tiny_gpt2_folder(folder)
    tensors = load_file(folder / 'model.safetensors')
    tensors['transformer.wpe.weight'][0, 0] = value
    save_file(tensors, folder / 'model.safetensors')
    with pytest.raises(UserError, match='transformer.wpe.weight in .* has .*NaN'):
        pretrained.load(folder)


def test_flipped_bits_in_weights_are_noticed(tmp_path):
    path = tmp_path / 'x.pt'
    checkpoint.save(path, tiny_state(tmp_path))
    checkpoint.load(path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = [member for member in archive.infolist() if '/data/' in member.filename]
    rng = random.Random(0)
    for record in records:
        flipped = bytearray(content)
        # A record ends where the header of the next begins, after padding: so count from its start
        name_length, more_length = content[record.header_offset + 26::2][:2]
        more_length = int.from_bytes(content[record.header_offset + 28:][:2], 'little')
        start = record.header_offset + 30 + name_length + more_length
        flipped[start + rng.randrange(record.file_size)] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UserError, match='damaged: its record .*checksum is wrong'):
            checkpoint.load(path)


def zip_as_torch_does(path, content, records=()):
    """Write a file whose data.pkl is content; records: {name: bytes} of data/."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('x/data.pkl', content)
        archive.writestr('x/version', '3')
        archive.writestr('x/byteorder', 'little')
        for name, record in dict(records).items():
            archive.writestr(f'x/data/{name}', record)


class Asks:
    """Pickled, it asks whoever loads it to call function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is measured there')
def test_pickles_that_grow_are_refused(tmp_path):
    """A few bytes that ask for gigabytes, although torch.load() would allow them."""
    import resource

    nested = (1, 2)
    for _ in range(11):  # 60 would do harm
        nested = (nested, nested)
    expanded = torch.ones(1).expand(2**31)
    state = tiny_state(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / 'x.pt'
    shared = pickle.dumps(nested, protocol=2)
    as_key = b'\x80\x02}' + shared[2:-1] + b'K\x01s.'  # {nested: 1}, which takes for ever to hash
    texts = pickle.dumps(['x' * 10**6] * 10**5, protocol=2)  # 100 GB for whoever encodes them
    for content, message in [
        (pickle.dumps(Asks(bytearray, 2**32), protocol=2), 'contains code'),
        (shared, 'is not a checkpoint'),
        (as_key, 'is not a checkpoint'),
        (texts, 'is not a checkpoint'),
    ]:
        zip_as_torch_does(path, content)
        with pytest.raises(UserError, match=message):
            checkpoint.load(path)
    torch.save({**state, 'optimizers': [{'state': {0: {'exp_avg': expanded}}}]}, path)
    with pytest.raises(UserError, match='smaller than its weights'):
        checkpoint.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_tokenizer_that_makes_texts_longer_is_refused():
    """Forty steps that double a text would take a terabyte for one letter."""
    content = json.loads(BpeTokenizer(['a b']).tokenizer_json())
    tokenizer_from_dict({'kind': 'huggingface', 'json': json.dumps(content)})
    doubles = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'aa'}
    content['normalizer'] = {'type': 'Sequence', 'normalizers': [doubles] * 40}
    with pytest.raises(ValueError, match='many times longer'):
        tokenizer_from_dict({'kind': 'huggingface', 'json': json.dumps(content)})


def test_jinja_template_needs_its_tokenizer_and_a_gpt(tmp_path):
    jinja = {'jinja': '{{ messages[0].content }}', 'special': {}}
    for state in states_of_all_kinds(tmp_path):
        with pytest.raises(UserError, match='Jinja'):
            checkpoint.build({**state, 'chat': jinja}, 'x.pt')


def test_tensor_larger_than_its_record_is_refused(tmp_path):
    """torch.load() would read what is behind the record in memory."""
    path = tmp_path / 'x.pt'
    torch.save({'model': torch.ones(8)}, path)
    with zipfile.ZipFile(path) as archive:
        content = archive.read('x/data.pkl')
    claims = content.replace(b'K\x08', b'K\x50')  # 8 numbers become 80
    assert claims != content
    zip_as_torch_does(path, content, {0: bytes(32)})
    with pytest.raises(UserError, match='parts are missing'):
        checkpoint.load(path)
    zip_as_torch_does(path, claims, {0: bytes(32)})
    with pytest.raises(UserError, match='has another size than its tensor'):
        checkpoint.load(path)


def test_two_records_of_one_name_are_refused(tmp_path):
    """Python reads one of them, torch may read the other: whatever the case."""
    path = tmp_path / 'x.pt'
    torch.save(tiny_state(tmp_path), path)
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('x/DATA.PKL', b'N.')
    with pytest.raises(UserError, match='is not a checkpoint'):
        checkpoint.load(path)


def test_checkpoint_that_lacks_bytes_is_not_called_unreadable(tmp_path):
    path = tmp_path / 'x.pt'
    torch.save(tiny_state(tmp_path), path)
    content = path.read_bytes()
    path.write_bytes(content[:500] + content[520:])
    with pytest.raises(UserError, match='is damaged: bytes are missing'):
        checkpoint.load(path)


def test_checkpoint_that_cannot_be_read_is_not_called_truncated(tmp_path, monkeypatch):
    path = tmp_path / 'x.pt'
    torch.save(tiny_state(tmp_path), path)

    def refuse(*args):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(zipfile, 'ZipFile', refuse)
    with pytest.raises(UserError, match='cannot read .*: Permission denied'):
        checkpoint.load(path)


def test_all_that_our_checkpoints_hold_is_allowed(tmp_path):
    """Every kind of model, dtype and optimizer, with the state that training leaves."""
    for i, state in enumerate(states_of_all_kinds(tmp_path)):
        path = tmp_path / f'{i}.pt'
        tensors = {str(dtype): torch.zeros(3, dtype=dtype) for dtype in (
            torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
            torch.int16, torch.int8, torch.uint8, torch.bool)}
        tensors['transposed'] = torch.ones(2, 3).t()
        tensors['empty'] = torch.ones(0)
        betas = (0.9, 0.99)
        groups = [{'betas': betas} for _ in range(8)]
        checkpoint.save(path, {**state, 'optimizers': [tensors, groups]})
        loaded = checkpoint.load(path)
        assert loaded['optimizers'][1] == groups
        for name, tensor in tensors.items():
            assert torch.equal(loaded['optimizers'][0][name], tensor)


def test_errors_without_a_text_have_a_first_and_a_last_line():
    assert checkpoint.first_line(ValueError()) == 'ValueError'
    assert checkpoint.last_line(ValueError()) == 'ValueError'
    assert checkpoint.last_line(ValueError('a\nb ')) == 'b'


def test_older_checkpoints_load(tmp_path):
    """From before token_shift, adaptive softmax, chat templates and the count of tokens."""
    path = tmp_path / 'x.pt'
    state = tiny_state(tmp_path, kind='seq2seq', pairs=True)
    for field in ('token_shift', 'cutoffs', 'div_value'):
        del state['model_args'][field]
    del state['tokens']
    del state['chat']
    state['grad_norm'] = math.inf  # as float16 leaves it now and then
    torch.save(state, path)
    model, _ = checkpoint.build(checkpoint.load(path), path)
    assert model.config.token_shift is False
    sample_from(path)


def test_newer_formats_are_refused_before_anything_else(tmp_path):
    advice = 'has format 2, this version reads up to 1: use a newer pocketGPT'
    path = tmp_path / 'x.pt'
    torch.save({'format': 2, 'weights': 'elsewhere'}, path)
    with pytest.raises(UserError, match=advice):
        checkpoint.load(path)
    folder = make_toy(tmp_path)
    write_json(folder / 'meta.json', {'format': 2, 'shards': []})
    with pytest.raises(UserError, match=f'{advice}, or prepare'):
        data.load_meta(folder)


def test_truncated_checkpoint_and_safetensors_are_refused(tmp_path):
    """At every length that ends near the file's start or in a zip's directory, and at some between.
    """
    def lengths(size, dense_start, dense_end):
        near_the_start = range(dense_start)
        between = range(dense_start, size, 500)
        near_the_end = range(size - dense_end, size)
        return [*near_the_start, *between, *near_the_end]

    path = tmp_path / 'x.pt'
    torch.save(tiny_state(tmp_path), path)
    content = path.read_bytes()
    for length in lengths(len(content), dense_start=200, dense_end=500):
        path.write_bytes(content[:length])
        with pytest.raises(UserError):
            checkpoint.load(path)

    folder = tmp_path / 'gpt2'
    tiny_gpt2_folder(folder)
    path = folder / 'model.safetensors'
    content = path.read_bytes()
    for length in lengths(len(content), dense_start=1600, dense_end=50):
        path.write_bytes(content[:length])
        with pytest.raises(UserError):
            pretrained.find_tensors(folder)


# --------------------------------------------------------------------------------------------------
# Datasets, tokenizers, GPT-2 folders


def fuzz_datasets(folder):
    """Datasets with strange values in meta.json, ids out of range, offsets that do not rise,
    damaged files.
    """
    def damage(path, rng):
        if not path.is_file():
            return
        if path.name == 'meta.json' and rng.random() < 0.8:
            write_json(path, mutate(read_json(path), rng, JSON_JUNK))
        elif path.suffix == '.bin' and rng.random() < 0.5:
            ids = np.fromfile(path, dtype='<u2')
            ids[rng.randrange(len(ids))] = rng.choice((0, 50, 65535))
            ids.tofile(path)
        elif path.suffix == '.idx' and rng.random() < 0.5:
            offsets = np.fromfile(path, dtype='<i8')
            offsets[rng.randrange(len(offsets))] = rng.choice((0, -1, 2**62, -2**62, -2**63, 5))
            offsets.tofile(path)
        else:
            path.write_bytes(corrupt(path.read_bytes(), rng))

    def read(dataset, rng):
        """What train.py does with a dataset."""
        meta = data.load_meta(dataset)
        try:
            tok = tokenizer_from_dict(meta['tokenizer'])
        except ValueError as e:
            raise UserError(str(e)) from None
        if tok.vocab_size != meta['vocab_size']:
            return
        if meta['kind'] == 'pairs':
            reply_start = template.reply_start_ids(tok, ChatTemplate.from_dict(meta.get('chat')))
            split = data.Pairs(dataset, meta, 'train', reply_start, 16, rng.choice((24, None)), 300)
        else:
            split = data.Stream(dataset, meta, 'train', 16, 4)
        list(split.batches(1, 3, 2))
        split.count_bytes(tok.byte_lengths())
        split.token_counts()

    def use(rng):
        shutil.rmtree(folder / 'data', ignore_errors=True)
        make = rng.choice((make_toy, make_pairs))
        dataset = make(folder)
        others = ['train.bin', 'val.bin', 'train.idx']
        name = rng.choice(['meta.json', 'meta.json', 'meta.json', *others])
        damage(dataset / name, rng)
        read(dataset, rng)
    return use


def fuzz_tokenizers(folder):
    """Tokenizers, as meta.json has them, with strange values."""
    tokenizers = [
        make_tokenizer('char', ['hello ba'], special_tokens=('eos',)),
        make_tokenizer('byte'),
        make_tokenizer('bpe', ['the cat sat on the mat'] * 9, 269),
        make_tokenizer('sentencepiece', ['the cat sat on the mat\n'] * 30, 289, ('eos',)),
    ]

    def use(rng):
        try:
            tok = tokenizer_from_dict(mutate(rng.choice(tokenizers).to_dict(), rng))
        except ValueError as e:
            raise UserError(str(e)) from None
        try:
            tok.decode(tok.encode('ba the cat'))
        except UnknownCharacters:
            pass
        ids = tok.encode_prompt('')
        assert ids and all(0 <= i < tok.vocab_size for i in ids)
        tok.decode(range(tok.vocab_size))
        tok.vocabulary_listing()
        tokenizer_from_dict(json.loads(json.dumps(tok.to_dict())))
    return use


def fuzz_gpt2_folders(folder):
    """Hugging Face's folders with strange values or damaged files."""
    original = folder / 'original'
    copied = folder / 'copy'
    tok = make_tokenizer('bpe', ['the cat sat on the mat'] * 9, 269)
    model = GPT(GPTConfig(block_size=16, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_embd=8))
    pretrained.export_folder(model, tok, original)
    content = (original / 'model.safetensors').read_bytes()
    header_end = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:header_end])

    def damage(name, rng):
        path = copied / name
        if name == 'model.safetensors.index.json':  # weights in several files
            (copied / 'model.safetensors').rename(copied / 'a.safetensors')
            index = {'weight_map': dict.fromkeys(header, 'a.safetensors')}
            write_json(path, mutate(index, rng, JSON_JUNK))
        elif rng.random() < 0.4:
            path.write_bytes(corrupt(path.read_bytes(), rng))
        elif name == 'model.safetensors':
            text = json.dumps(mutate(header, rng, JSON_JUNK)).encode('utf-8', 'surrogatepass')
            path.write_bytes(len(text).to_bytes(8, 'little') + text + content[header_end:])
        else:
            write_json(path, mutate(read_json(path), rng, JSON_JUNK))

    def use(rng):
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(original, copied)
        weights = ['model.safetensors', 'model.safetensors.index.json']
        damage(rng.choice(['config.json', 'tokenizer.json', *weights]), rng)
        model, _ = pretrained.load(str(copied))
        model.generate([[1, 2]], 3, temperature=0)
        pretrained.load_tokenizer(str(copied))
    return use


# --------------------------------------------------------------------------------------------------
# Command lines and config files

VALUES = [
    '', '1', '-1', '1e3', '1e400', 'nan', '9' * 5000, '99999999999999999999', '-' * 9000 + '1',
    '1.5.2', '1+2j', '10**9', 'None', 'true', 'auto', '...', '{[]}', '{[]:1}', '{1,2}', '(' * 300,
    '(((1', '[1,2]', '1,2', '1,,2', "b'x'", '"', '\\', 'é☃', '\ud800', '\0', 'a\nb', 'a' * 5000,
    '~nobody9/x', '__import__("os")',
]
CONFIG_LINES = [
    'n_layer = VALUE', 'VALUE', 'n_layer = [1]', 'del n_layer', 'cutoffs = (1, (2,))',
    'dropout = 10**400', 'out_dir = b"x"', 'batch_size = 10**30', 'batch_size *= 2',
    'import numpy; act = numpy.zeros(3)', 'globals()[5] = 3', 'def f(): f()\nf()', '\0',
    'raise ValueError("a\\nb")', 'raise SystemExit(0)',
]
SCRIPT = '''"""A script with an option of each type."""
from typing import Literal

from pocket.configurator import configure

out_dir: str | None = None
n_layer = 3
dropout = 0.0
act: Literal['gelu', 'relu'] = 'relu'
cutoffs: tuple[int, ...] = ()
batch_size = 16
max_epochs: float | None = None
compile: bool | Literal['auto'] = 'auto'
configure(__file__, globals())
'''
DEFAULTS = {
    'out_dir': None, 'n_layer': 3, 'dropout': 0.0, 'act': 'relu', 'cutoffs': (), 'batch_size': 16,
    'max_epochs': None, 'compile': 'auto',
}


def fuzz_options(folder):
    """Strange command lines and config files."""
    script = folder / 'script.py'
    config = folder / 'c.py'
    script.write_text(SCRIPT, encoding='utf-8')
    most = ['--NAME=VALUE'] * 3
    forms = [*most, '--NAME', '--VALUE', 'VALUE', 'VALUE.py', str(config)]

    def use(rng):
        lines = [rng.choice(CONFIG_LINES).replace('VALUE', rng.choice(VALUES)) for _ in range(3)]
        config.write_text('\n'.join(lines), encoding='utf-8', errors='surrogatepass')
        argv = []
        value = rng.choice(VALUES)
        for _ in range(rng.choice((1, 2, 3))):
            argument = rng.choice(forms).replace('NAME', rng.choice(list(DEFAULTS)))
            argv.append(argument.replace('VALUE', value))
        configure(str(script), dict(DEFAULTS), argv)
    return use


# --------------------------------------------------------------------------------------------------

FUZZERS = {  # {what: (function, number of inputs in a short run)}
    'checkpoints': (fuzz_checkpoints, 60),
    'checkpoint bytes': (fuzz_checkpoint_bytes, 60),
    'datasets': (fuzz_datasets, 60),
    'tokenizers': (fuzz_tokenizers, 150),
    'gpt2 folders': (fuzz_gpt2_folders, 60),
    'options': (fuzz_options, 150),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('what', FUZZERS)
def test_damaged_input_works_or_is_explained(what, tmp_path, monkeypatch):
    monkeypatch.setattr(configurator, 'show_user_errors', lambda script: None)
    prepare, n = FUZZERS[what]
    fuzz(prepare(tmp_path), n)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('what', FUZZERS)
def test_damaged_input_at_length(what, tmp_path, monkeypatch):
    """POCKETGPT_FUZZ: the number of inputs of each kind."""
    monkeypatch.setattr(configurator, 'show_user_errors', lambda script: None)
    prepare, _ = FUZZERS[what]
    fuzz(prepare(tmp_path), int(os.environ.get('POCKETGPT_FUZZ', 3000)))


def test_checkpoint_cannot_name_a_script_to_run(project):
    """A dataset's name, which may come from a checkpoint, never chooses a script outside prepare/.
    """
    (project.root / 'evil.py').write_text('open("it ran", "w")', encoding='utf-8')
    run = project.root / 'out' / 'x'
    run.mkdir(parents=True)
    config = {'dataset': '../evil', 'data_dir': 'elsewhere'}
    torch.save({**tiny_state(project.root), 'optimizers': [], 'config': config}, run / 'last.pt')
    error = project.fails('train.py', '--resume', '--out_dir=out/x')
    assert "there is no dataset '../evil'" in error
    assert not (project.root / 'it ran').exists()


def test_run_from_elsewhere_does_not_say_where_to_write(project):
    """Its data_dir is not obeyed, nor does its dataset's name run a script that makes it."""
    proof = project.root / 'strange place'
    run = project.root / 'downloaded'
    run.mkdir()
    state = {**tiny_state(project.root), 'optimizers': [], 'val_loss': 2.0}
    for config, advice in [
        ({'dataset': 'stdlib', 'data_dir': str(proof)}, f'add --data_dir={proof} if it is right'),
        ({'dataset': 'stdlib'}, 'add --dataset=…'),
        ({'dataset': '../data/toy'}, 'add --dataset=…'),
    ]:
        torch.save({**state, 'config': config}, run / 'best.pt')
        torch.save({**state, 'config': config}, run / 'last.pt')
        for option in ('--eval_only', '--resume'):
            error = project.fails('train.py', option, '--out_dir=downloaded')
            assert 'is not in out/, so it may not say that' in error and advice in error
    assert not proof.exists() and not (project.root / 'data' / 'stdlib').exists()

    torch.save({**state, 'config': {'dataset': 'toy'}}, run / 'best.pt')
    project.run('train.py', '--eval_only', '--out_dir=downloaded', '--device=cpu')


@pytest.mark.parametrize('name', ['a' * 300, '../' * 2000], ids=['long', 'deep'])
def test_dataset_name_that_is_no_path_is_refused(project, name):
    assert "can't be a path" in project.fails('train.py', f'--dataset={name}')


GOOD_CHAT = {
    'turn': '{speaker}: {text}', 'between': '<sep>', 'begin': '', 'turns': 3, 'you': 'U', 'me': 'B',
    'reply': 'B: ',
}


def test_chat_template_from_a_file():
    tok = make_tokenizer('char', ['UB: ba'], special_tokens=('sep', 'eos'))
    chat = ChatTemplate.from_dict(GOOD_CHAT)
    template.check_template(chat, tok)
    ids = template.encode_conversation(tok, chat, [('U', 'ba'), ('B', 'ab')])
    assert tok.decode(ids) == 'U: baB: ab'
    assert chat.to_dict() == GOOD_CHAT

    no_special_tokens = make_tokenizer('char', ['B: '])
    with pytest.raises(UserError, match='no special (id|token) to begin a reply with'):
        template.reply_start_ids(no_special_tokens, chat)


@pytest.mark.parametrize('change', [
    {'turn': 'text'}, {'turn': 5}, {'turns': 0}, {'turns': True}, {'turns': '3'}, {'you': None},
    {'between': ['<sep>']}, {'reply': 'x' * 10**6},
], ids=lambda change: str(change)[:30])
def test_what_is_no_chat_template_is_refused(change):
    with pytest.raises(ValueError, match='must have turn, between'):
        ChatTemplate.from_dict({**GOOD_CHAT, **change})


@pytest.mark.parametrize('change', [
    {'turn': '{speaker}!r {text}'}, {'turn': '{text:>9999999999}'}, {'reply': 'Bot: '},
    {'begin': '<bos>'},
])
def test_chat_template_that_the_tokenizer_cannot_write_is_refused(change):
    tok = make_tokenizer('char', ['UB: ba'], special_tokens=('sep', 'eos'))
    with pytest.raises(ValueError):
        template.check_template(ChatTemplate.from_dict({**GOOD_CHAT, **change}), tok)


# --------------------------------------------------------------------------------------------------
# Terminals


class Terminal(io.StringIO):
    def isatty(self):
        return True


CLEARS_SCREEN = '\x1b[2J\x1b]52;c;aGk=\x07\x9b1m\r'


def test_control_characters_are_visible_on_a_terminal_only():
    shown = Terminal()
    print(f'a\tb\n{CLEARS_SCREEN}é', file=Output(shown))
    assert shown.getvalue() == 'a\tb\n\\x1b[2J\\x1b]52;c;aGk=\\x07\\x9b1m\\x0dé\n'

    file = io.StringIO()
    print(CLEARS_SCREEN, file=Output(file))
    assert file.getvalue() == CLEARS_SCREEN + '\n'


def test_characters_that_turn_the_direction_are_visible_on_a_terminal():
    """Others that are invisible, too, but part of emoji and of other scripts' words, stay."""
    shown = Terminal()
    needed = '👩\u200d👧 \u0645\u06cc\u200c\u062e \u05d0\u200f! ❤\ufe0f \U0001f3f4\U000e0067\U000e007f'
    print(f'\u202eexe.txt\u202c \u2066x\u2069 {needed}', file=Output(shown))
    assert shown.getvalue() == f'\\u202eexe.txt\\u202c \\u2066x\\u2069 {needed}\n'


def test_errors_show_control_characters():
    assert str(UserError(f'no file {CLEARS_SCREEN!s}x')).startswith('no file \\x1b[2J\\x1b]52')


# --------------------------------------------------------------------------------------------------
# Damaged runs


def test_resume_from_a_damaged_checkpoint_is_refused(project, trained):
    """An option of another type, an optimizer of another shape, a number that is none."""
    shutil.copytree(trained.root / 'out' / 'toy', project.root / 'out' / 'toy')
    path = project.root / 'out' / 'toy' / 'last.pt'
    state = trained.checkpoint('toy')
    optimizers = copy.deepcopy(state['optimizers'])
    optimizers[0]['state'][1]['exp_avg'] = torch.ones(3)
    config = {**state['config'], 'batch_size': 'x'}
    for change, message in [
        ({'config': config}, 'its batch_size should be a whole number'),
        ({'optimizers': optimizers}, 'is damaged'),
        ({'seconds': math.nan}, '(seconds)'),
    ]:
        torch.save({**state, **change}, path)
        error = project.fails('train.py', '--resume', '--out_dir=out/toy', '--max_iters=9')
        assert message in error


def test_resume_keeps_the_good_rows_of_a_damaged_log(project, trained):
    run = project.root / 'out' / 'toy'
    shutil.copytree(trained.root / 'out' / 'toy', run)
    log = run / 'log.csv'
    log.write_bytes(log.read_bytes().replace(b'\n8,', b'\n8,\xff\0' + b'9' * 200_000))
    log_interval = TINY[-1]
    project.run('train.py', '--resume', '--out_dir=out/toy', '--max_iters=10', log_interval)
    rows = log.read_text(encoding='utf-8').splitlines()
    assert [row.split(',')[0] for row in rows] == ['step', '4', '10']
