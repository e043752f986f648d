"""
A GPT of ours out: as a folder that transformers reads, and as a .gguf file that llama.cpp reads.
transformers is the reference for the first. llama-cpp-python is that for the second: it compiles
for minutes, so it is not among the packages that the tests need, and its tests are skipped without.

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" \\
        pip install llama-cpp-python

Run it alone: pytest -n 0 tests/test_export.py
"""
import json
import sys

import numpy as np
import pytest
import torch
from conftest import Project, toy_text

from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig
from pocket import checkpoint, gguf_export, pretrained
from pocket.errors import UserError
from pocket.template import (
    ChatTemplate,
    JinjaTemplate,
    encode_conversation,
    reply_start_ids,
)
from pocket.tokenizer import HuggingFaceTokenizer, make_tokenizer

IDX = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
LLAMA = {'pos': 'rotary', 'norm': 'rmsnorm', 'act': 'swiglu', 'bias': False, 'norm_eps': 1e-6}
LLAMA3_SCALING = {'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 1.0,
                  'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}
SHAPES = {  # (model_type, switches)
    'gpt2': ('gpt2', {'bias': True}),
    'gpt2 untied': ('gpt2', {'bias': False, 'tie_weights': False, 'n_inner': 40}),
    'llama': ('llama', {**LLAMA, 'n_kv_head': 2, 'n_inner': 64, 'tie_weights': False}),
    'llama tied': ('llama', {**LLAMA, 'rope_theta': 500.0, 'head_dim': 4}),
    'llama biases': ('llama', {**LLAMA, 'attn_bias': True}),
    'llama3': ('llama', {**LLAMA, 'rope_scaling': LLAMA3_SCALING, 'n_kv_head': 1}),
    'linear': ('llama', {**LLAMA, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}),
    'qwen2': ('qwen2', {**LLAMA, 'qkv_bias': True, 'n_kv_head': 2}),
    'qwen3': ('qwen3', {**LLAMA, 'qk_norm': 'rmsnorm', 'n_kv_head': 2, 'head_dim': 16}),
}


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """For models this small, more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def bpe():
    """A BPE tokenizer with the special tokens of plain text and of pairs."""
    return make_tokenizer('bpe', [toy_text(3000)], 300, ('eot', 'pad', 'sep'))


def random_gpt(vocab_size, **switches):
    """A small GPT with weights so large that every part matters."""
    torch.manual_seed(1)
    shape = {'block_size': 48, 'vocab_size': vocab_size, 'n_layer': 2, 'n_head': 4, 'n_embd': 32}
    model = GPT(GPTConfig(**{**shape, **switches})).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def greedy(model, ids, length=25):
    """The ids that our model continues ids with."""
    return model.generate(torch.tensor([ids]), length, temperature=0)[0].tolist()[len(ids):]


def make_huggingface_tokenizer():
    """One as SmolLM2's: special tokens come first, digits stand alone."""
    bpe = make_tokenizer('bpe', [toy_text(3000)], 280, ('im_start', 'im_end'))
    content = json.loads(bpe.tokenizer_json())
    content['model']['vocab'] = {
        token: (token_id + 2) % 280 for token, token_id in content['model']['vocab'].items()
    }
    for token_id, added in enumerate(content['added_tokens']):
        added['id'] = token_id
    content['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [
        {'type': 'Digits', 'individual_digits': True},
        {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True},
    ]}
    return HuggingFaceTokenizer(json.dumps(content), eos_ids=[1])


def make_llama2_tokenizer():
    """One as Llama 2's: sentencepiece's pieces and, instead of their scores, merges."""
    sp = make_tokenizer('sentencepiece', [toy_text(3000)], 330, ('s', 'end')).sp
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = []
    for piece in sorted(vocab, key=lambda piece: -sp.get_score(vocab[piece])):
        if not sp.is_byte(vocab[piece]) and not sp.is_control(vocab[piece]):
            splits = [[piece[:i], piece[i:]] for i in range(1, len(piece))]
            merges += [split for split in splits if split[0] in vocab and split[1] in vocab]
    added = [{'id': vocab[token], 'content': token, 'special': True, 'single_word': False,
              'lstrip': False, 'rstrip': False, 'normalized': False}
             for token in ('<unk>', '<s>', '<end>')]
    space = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
    back = {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '}
    start = {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}
    bos = {'SpecialToken': {'id': '<s>', 'type_id': 0}}
    text = {'Sequence': {'id': 'A', 'type_id': 0}}
    content = {
        'version': '1.0', 'added_tokens': added,
        'normalizer': {'type': 'Sequence', 'normalizers': [
            {'type': 'Prepend', 'prepend': '▁'}, space]},
        'post_processor': {
            'type': 'TemplateProcessing', 'single': [bos, text], 'pair': [bos, text, text],
            'special_tokens': {'<s>': {'id': '<s>', 'ids': [vocab['<s>']], 'tokens': ['<s>']}}},
        'decoder': {'type': 'Sequence', 'decoders': [
            back, {'type': 'ByteFallback'}, {'type': 'Fuse'}, start]},
        'model': {'type': 'BPE', 'vocab': vocab, 'merges': merges, 'unk_token': '<unk>',
                  'byte_fallback': True, 'fuse_unk': True},
    }
    return HuggingFaceTokenizer(json.dumps(content), eos_ids=[vocab['<end>']])


def some_tokenizers():
    """One of each kind that other tools can have, by its name."""
    text = toy_text(3000)
    special = ('pad', 'bos', 'eos', 'sep')
    return {
        'bpe': make_tokenizer('bpe', [text], 300),
        'byte': make_tokenizer('byte'),
        'char': make_tokenizer('char', [text + 'ÄÖ€🐻\\\n\t\u200b'], special_tokens=special),
        'huggingface': make_huggingface_tokenizer(),
    }


# --------------------------------------------------------------------------------------------------
# A folder for transformers: the model

@pytest.mark.parametrize('name', SHAPES)
def test_transformers_computes_what_an_exported_model_does(tmp_path, bpe, name):
    transformers = pytest.importorskip('transformers')
    model_type, switches = SHAPES[name]
    ours = random_gpt(bpe.vocab_size, **switches)
    folder = tmp_path / 'modell ü'
    pretrained.export_folder(ours, bpe, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
        'tokenizer_config.json']

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.config.model_type == model_type
    assert theirs.generation_config.eos_token_id == bpe.eos_id
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDX)[0], theirs(IDX).logits, atol=1e-4, rtol=1e-4)
    their_ids = theirs.generate(IDX, max_new_tokens=25, do_sample=False, eos_token_id=None)
    assert greedy(ours, IDX[0].tolist()) == their_ids[0, IDX.size(1):].tolist()

    # And back
    back, _ = pretrained.load(folder)
    assert torch.equal(back(IDX)[0], ours(IDX)[0])
    assert pretrained.load_tokenizer(folder).to_dict() == bpe.to_dict()
    with pytest.raises(UserError, match='is there already'):
        pretrained.export_folder(ours, bpe, folder)


@pytest.mark.parametrize('act', ['relu', 'gelu_erf'])
def test_other_activations_of_gpt2(tmp_path, bpe, act):
    transformers = pytest.importorskip('transformers')
    ours = random_gpt(bpe.vocab_size, act=act, dropout=0.1)
    pretrained.export_folder(ours, bpe, tmp_path / 'new')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'new').eval()
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDX)[0], theirs(IDX).logits, atol=1e-4, rtol=1e-4)


REFUSED = [
    # What pocketGPT trains by default: as near to Llama as to GPT-2
    ({'pos': 'rotary', 'act': 'relu2', 'qk_norm': True, 'token_shift': True, 'bias': False},
     'Llama, .* has no norm=layernorm, act=relu2, qk_norm=True, token_shift=True: train with '
     '--norm=rmsnorm --act=swiglu --qk_norm=False --token_shift=False, or as '
     'config/llama_small.py does'),
    ({**LLAMA, 'softcap': 15.0}, 'has no softcap=15.0: train with --softcap=0,'),
    ({**LLAMA, 'cutoffs': (10, 20), 'tie_weights': False}, r'train with --cutoffs=\(\),'),
    ({**LLAMA, 'attn_bias': True, 'qkv_bias': False}, 'has no qkv_bias=False'),
    ({**LLAMA, 'qk_norm': 'rmsnorm', 'qkv_bias': True}, 'has no qkv_bias=True'),
    ({'head_bias': True}, 'GPT-2, .* has no head_bias=True: train with --head_bias=False'),
    ({'n_kv_head': 2}, 'GPT-2, .* has no n_kv_head=2'),
]


@pytest.mark.parametrize('switches, message', REFUSED, ids=str)
def test_what_no_other_tool_has_is_named_with_the_options_to_change(tmp_path, switches, message):
    model = random_gpt(61, **switches)
    with pytest.raises(UserError, match=message):
        pretrained.export_folder(model, make_tokenizer('byte'), tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_an_encoder_decoder_is_refused(tmp_path):
    model = Seq2Seq(Seq2SeqConfig(block_size=8, vocab_size=61, n_layer=1, n_head=2, n_embd=8))
    with pytest.raises(UserError, match='--arch=gpt, as config/llama_small.py does'):
        pretrained.export_folder(model, make_tokenizer('byte'), tmp_path / 'new')


# --------------------------------------------------------------------------------------------------
# A folder for transformers: tokenizer, batches, conversations

TEXTS = ['gimme ba dodo. fu', '  opal\tkilo\n\nrust', 'Ä€🐻ÖÄ\\ ni ', '\\x41 ni 123']


@pytest.mark.parametrize('kind', some_tokenizers())
def test_their_tokenizer_encodes_and_decodes_as_ours(tmp_path, kind):
    transformers = pytest.importorskip('transformers')
    tok = some_tokenizers()[kind]
    model = random_gpt(tok.vocab_size)
    pretrained.export_folder(model, tok, tmp_path / 'new')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'new')
    for text in TEXTS:
        if kind == 'char':
            text = ''.join(c for c in text if c in tok.chars)
        ids = tok.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text
    assert len(theirs) == tok.vocab_size
    assert theirs.eos_token_id == tok.eos_id
    assert theirs.pad_token_id == tok.special_tokens.get('pad', tok.eos_id)
    assert theirs.model_max_length == 48
    assert theirs.decode([tok.eos_id], skip_special_tokens=True) == ''

    # And back: other classes perhaps, but the same ids
    back = pretrained.load_tokenizer(tmp_path / 'new')
    assert back.encode('ba dodo.') == tok.encode('ba dodo.')
    assert back.eos_ids == tok.eos_ids


def test_a_char_tokenizer_refuses_unknown_characters_there_too(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    tok = make_tokenizer('char', ['abc'])
    theirs = tokenizers.Tokenizer.from_str(pretrained.tokenizer_json(tok))
    assert theirs.encode('cab').ids == [2, 0, 1]
    with pytest.raises(Exception, match='WordLevel'):
        theirs.encode('cabin')


def test_a_sentencepiece_tokenizer_stays_behind(tmp_path):
    tok = make_tokenizer('sentencepiece', [toy_text(3000)], 300, ('eot',))
    pretrained.export_folder(random_gpt(tok.vocab_size), tok, tmp_path / 'new')
    assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == [
        'config.json', 'generation_config.json', 'model.safetensors']


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_transformers_generates_a_padded_batch(tmp_path, bpe, name):
    transformers = pytest.importorskip('transformers')
    model = random_gpt(bpe.vocab_size, **SHAPES[name][1])
    pretrained.export_folder(model, bpe, tmp_path / 'new')
    their_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'new').eval()
    their_tok = transformers.AutoTokenizer.from_pretrained(tmp_path / 'new')
    prompts = ['ba', 'gimme dodo. fu', 'ni ni ni']
    batch = their_tok(prompts, return_tensors='pt', padding=True)
    ids = their_model.generate(**batch, max_new_tokens=10, do_sample=False, eos_token_id=None)
    for row, prompt in zip(ids[:, batch['input_ids'].size(1):].tolist(), prompts):
        assert row == greedy(model, bpe.encode(prompt), 10)


TEMPLATES = [
    ChatTemplate(),
    ChatTemplate('{speaker}: "{text}" \\ {}', '\n', '', 3, 'me\'ü"', 'you', 'you: '),
    ChatTemplate('[{text}]{speaker}', '<sep>', '<eot>', 2, '<pad>', '{{ 1 }}', ''),
]


@pytest.mark.parametrize('template', TEMPLATES, ids=str)
def test_their_chat_template_writes_what_ours_does(tmp_path, bpe, template):
    transformers = pytest.importorskip('transformers')
    pretrained.export_folder(random_gpt(bpe.vocab_size), bpe, tmp_path / 'new', template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'new')

    texts = ['ba dodo?', ' fu {speaker} {{ 2 }} {% x %}', 'ni "\\n"\n', 'opal', 'kilo']
    for count in range(1, 6):
        messages = []
        turns = []
        for i, text in enumerate(texts[:count]):
            role = 'user' if i % 2 == 0 else 'assistant'
            messages.append({'role': role, 'content': text})
            turns.append((template.user if role == 'user' else template.assistant, text))
        expected = encode_conversation(bpe, template, turns)
        system = [{'role': 'system', 'content': 'Be kind.'}]
        assert theirs.apply_chat_template(messages) == expected
        assert theirs.apply_chat_template(system + messages) == expected
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt == expected + reply_start_ids(bpe, template)


def test_a_jinja_template_and_its_tokenizer_go_out_as_they_came(tmp_path):
    transformers = pytest.importorskip('transformers')
    tok = some_tokenizers()['huggingface']
    source = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
              "eos_token + '\n' }}{% endfor %}")
    template = JinjaTemplate(source, {'eos_token': '<|im_end|>', 'bos_token': '<|im_start|>'})
    pretrained.export_folder(random_gpt(tok.vocab_size, **LLAMA), tok, tmp_path / 'new', template)
    written = (tmp_path / 'new' / 'tokenizer.json').read_text(encoding='utf-8')
    assert written == tok.tokenizer_json

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'new')
    messages = [{'role': 'user', 'content': 'ba?'}, {'role': 'assistant', 'content': 'fu.'}]
    assert theirs.apply_chat_template(messages, tokenize=False) == template.render(messages)
    assert theirs.bos_token == '<|im_start|>'
    back = pretrained.load_template(tmp_path / 'new')
    assert back.render(messages) == template.render(messages)
    assert pretrained.load_tokenizer(tmp_path / 'new').eos_ids == [1]


# --------------------------------------------------------------------------------------------------
# A .gguf file

def read_gguf(path):
    """(metadata, {name: float array}) of a .gguf file."""
    gguf = pytest.importorskip('gguf')
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        tensors[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return metadata, tensors


@pytest.mark.parametrize('gguf_type, tolerance', [('f32', 0), ('f16', 1e-3), ('q8_0', 1e-2)])
def test_a_gguf_file_holds_the_weights_and_what_they_are_for(tmp_path, bpe, gguf_type, tolerance):
    pytest.importorskip('gguf')
    model = random_gpt(bpe.vocab_size + 5, **SHAPES['llama'][1])
    template = ChatTemplate('{speaker}: {text}')
    path = tmp_path / 'new' / 'modell ü.gguf'
    gguf_export.export_gguf(model, bpe, path, template, gguf_type)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    metadata, tensors = read_gguf(path)

    assert metadata['general.architecture'] == 'llama'
    assert metadata['llama.attention.head_count_kv'] == 2
    assert metadata['llama.context_length'] == 48
    assert metadata['tokenizer.chat_template'] == pretrained.jinja_source(template, bpe)
    assert metadata['tokenizer.ggml.model'] == 'gpt2'
    assert metadata['tokenizer.ggml.pre'] == 'gpt-2'
    assert metadata['tokenizer.ggml.eos_token_id'] == bpe.eos_id
    assert metadata['tokenizer.ggml.merges'] == bpe.merges
    tokens = metadata['tokenizer.ggml.tokens']
    assert len(tokens) == bpe.vocab_size + 5  # as many as the model has ids
    assert tokens[97] == 'a' and tokens[bpe.eos_id] == '<|endoftext|>'

    state = model.state_dict()
    gate, up = state['transformer.h.1.mlp.c_fc.weight'].chunk(2)
    _, k, v = state['transformer.h.1.attn.c_attn.weight'].split((32, 16, 16))
    for name, weight in (('ffn_gate', gate), ('ffn_up', up), ('attn_v', v)):
        np.testing.assert_allclose(tensors[f'blk.1.{name}.weight'], weight, atol=tolerance)
    pairs = [0, 4, 1, 5, 2, 6, 3, 7]  # of a head of 8 channels, for llama.cpp
    expected = k.view(2, 8, 32)[:, pairs].flatten(0, 1)
    np.testing.assert_allclose(tensors['blk.1.attn_k.weight'], expected, atol=tolerance)
    assert path.stat().st_size < 1.2 * model.num_params() * {'f32': 4, 'f16': 2, 'q8_0': 1}[
        gguf_type] + 12_000
    with pytest.raises(UserError, match='is there already'):
        gguf_export.export_gguf(model, bpe, path)


def test_rows_that_are_no_multiple_of_a_block_stay_in_16_bits():
    assert gguf_export.tensor_type('blk.0.ffn_up.weight', (64, 40), 'q8_0') == 'f16'
    assert gguf_export.tensor_type('blk.0.ffn_up.weight', (40, 64), 'q8_0') == 'q8_0'
    assert gguf_export.tensor_type('output_norm.weight', (64,), 'q8_0') == 'f32'


def split_step(regex):
    return {'type': 'Split', 'pattern': {'Regex': regex}, 'behavior': 'Isolated'}


@pytest.mark.parametrize('steps, name', [
    ([{'type': 'ByteLevel', 'use_regex': True}], 'gpt-2'),
    ([{'type': 'Digits', 'individual_digits': True}, {'type': 'ByteLevel'}], 'smollm'),
    ([split_step(gguf_export.BY_LLAMA3), {'type': 'ByteLevel', 'use_regex': False}], 'llama-bpe'),
    ([split_step(gguf_export.BY_LLAMA3.replace('{1,3}', '')),
      {'type': 'ByteLevel', 'use_regex': False}], 'qwen2'),
])
def test_llama_cpps_names_for_how_text_is_cut_into_words(steps, name):
    sequence = {'type': 'Sequence', 'pretokenizers': steps}
    assert gguf_export.pre_tokenizer_name(sequence) == name
    if len(steps) == 1:
        assert gguf_export.pre_tokenizer_name(steps[0]) == name
    for unknown in (None, {'type': 'Metaspace'}, split_step('x'),
                    {'type': 'Sequence', 'pretokenizers': steps + steps}):
        with pytest.raises(UserError, match='unknown to us'):
            gguf_export.pre_tokenizer_name(unknown)


def test_what_llama_cpp_lacks_is_refused(tmp_path, bpe):
    pytest.importorskip('gguf')
    refused = [
        (random_gpt(bpe.vocab_size, act='gelu_erf'), bpe, 'act=gelu_erf'),
        (random_gpt(bpe.vocab_size, **{**SHAPES['qwen3'][1], 'rope_scaling': LLAMA3_SCALING}), bpe,
         'rope_scaling of the type llama3'),
        (random_gpt(9), make_tokenizer('char', ['äbc']), 'no special token that ends a text'),
        (random_gpt(300), make_tokenizer('sentencepiece_unigram', [toy_text(3000)], 300, ('eot',)),
         'sentencepiece_unigram'),
        (random_gpt(61, token_shift=True), bpe, '--token_shift=False'),
    ]
    for model, tok, message in refused:
        with pytest.raises(UserError, match=message):
            gguf_export.export_gguf(model, tok, tmp_path / 'x.gguf')
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_gguf_the_message_says_what_to_install(tmp_path, bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gguf', None)  # importing it now fails
    with pytest.raises(UserError, match='pip install gguf'):
        gguf_export.export_gguf(random_gpt(bpe.vocab_size), bpe, tmp_path / 'x.gguf')


# --------------------------------------------------------------------------------------------------
# … and llama.cpp reads it

def load_llama_cpp(path):
    """The model of a .gguf file in llama-cpp-python."""
    llama_cpp = pytest.importorskip('llama_cpp')
    return llama_cpp.Llama(str(path), n_ctx=48, n_threads=1, verbose=False)


def llama_cpp_greedy(llama, ids, length):
    """The ids that llama.cpp continues ids with."""
    made = []
    for token_id in llama.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
        made.append(token_id)
        if len(made) == length:
            return made


@pytest.mark.parametrize('name', SHAPES)
def test_llama_cpp_generates_what_the_model_does(tmp_path, bpe, name):
    pytest.importorskip('llama_cpp')
    model_type, switches = SHAPES[name]
    model = random_gpt(bpe.vocab_size, **switches)
    gguf_export.export_gguf(model, bpe, tmp_path / 'x.gguf', gguf_type='f32')
    llama = load_llama_cpp(tmp_path / 'x.gguf')
    assert llama.metadata['general.architecture'] == model_type
    for prompt in ('ba dodo.', 'gimme'):
        ids = bpe.encode(prompt)
        assert llama_cpp_greedy(llama, ids, 20) == greedy(model, ids, 20)


@pytest.mark.parametrize('kind', [*some_tokenizers(), 'ascii', 'sentencepiece'])
def test_llama_cpp_encodes_and_decodes_as_ours(tmp_path, kind):
    pytest.importorskip('llama_cpp')
    text = toy_text(3000)
    tok = {
        **some_tokenizers(),
        'ascii': make_tokenizer('char', [text + '\\\n\tx41']),  # without special tokens
        'sentencepiece': make_tokenizer('sentencepiece', [text], 300, ('eot',)),
    }[kind]
    model = random_gpt(tok.vocab_size, **LLAMA)
    gguf_export.export_gguf(model, tok, tmp_path / 'x.gguf')
    llama = load_llama_cpp(tmp_path / 'x.gguf')
    for text in [*TEXTS, toy_text(300, seed=1)]:
        if kind in ('char', 'ascii'):
            text = ''.join(c for c in text if c in tok.chars)
        ids = tok.encode(text)
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids
        assert b''.join(llama.detokenize([i]) for i in ids) == text.encode()
    if tok.eos_id is None:
        assert llama.token_eos() == -1
    else:
        assert llama.token_eos() == tok.eos_id


def test_llama_cpp_encodes_as_a_tokenizer_like_llama_2s(tmp_path):
    pytest.importorskip('llama_cpp')
    tok = make_llama2_tokenizer()
    gguf_export.export_gguf(random_gpt(tok.vocab_size, **LLAMA), tok, tmp_path / 'x.gguf')
    llama = load_llama_cpp(tmp_path / 'x.gguf')
    for text in [*TEXTS, toy_text(300, seed=1)]:
        ids = tok.encode_prompt(text)
        assert len(ids) == 1 + len(tok.encode(text))  # it begins with <s>
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids
        assert llama.detokenize(ids).decode() == tok.decode(ids) == text
    assert llama.token_eos() == tok.eos_id


def test_llama_cpp_answers_in_a_conversation(tmp_path, bpe):
    """Through its own reading of the chat template."""
    pytest.importorskip('llama_cpp')
    model = random_gpt(bpe.vocab_size, **LLAMA)
    template = TEMPLATES[1]
    gguf_export.export_gguf(model, bpe, tmp_path / 'x.gguf', template, 'f32')
    llama = load_llama_cpp(tmp_path / 'x.gguf')
    ids = encode_conversation(bpe, template, [(template.user, 'ba?')])
    ids += reply_start_ids(bpe, template)
    reply = llama.create_chat_completion([{'role': 'user', 'content': 'ba?'}], temperature=0.0,
                                         max_tokens=5, repeat_penalty=1.0)
    assert reply['usage']['prompt_tokens'] == len(ids)
    assert reply['choices'][0]['message']['content'] == bpe.decode(greedy(model, ids, 5))


# --------------------------------------------------------------------------------------------------
# The command

def save_run(project, model, tok, template=None):
    """Save a model as the run out/run of a project."""
    run = project.root / 'out' / 'run'
    run.mkdir(parents=True)
    checkpoint.save(run / 'best.pt', checkpoint.model_state(model, tok, {}, template))


def test_export_says_how_it_is_run(tmp_path):
    project = Project(tmp_path / 'pocket')
    command = 'python -m pocket.export --out_dir=out/RUN --to=FOLDER'
    out, _ = project.run('-m', 'pocket.export', '--help')
    assert command in out
    assert 'usage: python -m pocket.export' in out
    assert command in project.fails('-m', 'pocket.export', '--to=x')
    assert 'there is no checkpoint' in project.fails('-m', 'pocket.export', '--out_dir=x', '--to=x')
    error = project.fails('-m', 'pocket.export', '--out_dir=x', '--to=~nobody9/x')
    assert "'~nobody9/x' can't be a path" in error


def test_one_run_in_three_formats(tmp_path, bpe):
    pytest.importorskip('gguf')
    project = Project(tmp_path / 'pocket')
    save_run(project, random_gpt(bpe.vocab_size, **LLAMA), bpe, ChatTemplate())
    export = ['-m', 'pocket.export', '--out_dir=out/run']

    out, _ = project.run(*export, '--to=hf')
    assert 'config.json, generation_config.json, model.safetensors, tokenizer.json, ' in out
    settings = json.loads((project.root / 'hf' / 'tokenizer_config.json').read_bytes())
    assert 'message["content"]' in settings['chat_template']

    out, _ = project.run(*export, '--to=new/x.gguf', '--gguf_type=q8_0')
    assert 'x.gguf: ' in out and 'next: llama-cli -m ' in out
    metadata, _ = read_gguf(project.root / 'new' / 'x.gguf')
    assert metadata['tokenizer.chat_template'] == settings['chat_template']

    out, _ = project.run(*export, '--to=new/x.pt')
    assert 'sample.py --out_dir=' in out
    assert 'is there already' in project.fails(*export, '--to=new/x.gguf')


def test_a_run_that_cannot_leave_says_what_to_change(tmp_path):
    pytest.importorskip('gguf')
    project = Project(tmp_path / 'pocket')
    tok = make_tokenizer('byte')
    save_run(project, random_gpt(tok.vocab_size, **REFUSED[0][0]), tok)
    for to in ('hf', 'x.gguf'):
        error = project.fails('-m', 'pocket.export', '--out_dir=out/run', f'--to={to}')
        assert '--token_shift=False' in error and 'config/llama_small.py' in error
    assert not (project.root / 'hf').exists()
