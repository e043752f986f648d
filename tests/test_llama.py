"""
Models of the Llama family against Hugging Face's transformers: logits, tokens, templates, refusals.

    pytest -n 0 tests/test_llama.py
"""
import json
import random
import re
import shutil
import time

import pytest
import torch
from conftest import CHECKOUT
from safetensors.torch import load_file, save_file

from model import attention, plain_attention
from pocket import pretrained, template
from pocket.chat import Settings, load
from pocket.errors import UserError
from pocket.generate import new_cache
from pocket.template import JinjaTemplate, encode_messages
from pocket.tokenizer import HuggingFaceTokenizer, tokenizer_from_dict

transformers = pytest.importorskip('transformers')
pytest.importorskip('tokenizers')
pytest.importorskip('jinja2')

SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 16}
CONFIGS = {
    'llama': lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False),
    'llama tied, theta': lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True,
                                                          rope_theta=5e5, rms_norm_eps=1e-3),
    'llama biases': lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True),
    'llama linear': lambda: transformers.LlamaConfig(
        **SHAPE, rope_scaling={'rope_type': 'linear', 'factor': 2.0}),
    'llama llama3': lambda: transformers.LlamaConfig(**SHAPE, rope_scaling=LLAMA3),
    'llama head_dim': lambda: transformers.LlamaConfig(**SHAPE, head_dim=16),
    'llama one kv head': lambda: transformers.LlamaConfig(**{**SHAPE, 'num_key_value_heads': 1}),
    'mistral': lambda: transformers.MistralConfig(**SHAPE, sliding_window=None),
    'mistral, window as long as the context': lambda: transformers.MistralConfig(
        **SHAPE, sliding_window=64),
    'qwen2': lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    'qwen2, window that it does not use': lambda: transformers.Qwen2Config(
        **SHAPE, use_sliding_window=False, sliding_window=8),
    'qwen3': lambda: transformers.Qwen3Config(**SHAPE, head_dim=16),
    'qwen3 tied, biases': lambda: transformers.Qwen3Config(**SHAPE, attention_bias=True,
                                                           tie_word_embeddings=True),
}


def save(config, folder, **options):
    """A folder with a random model of this config, whose norms and biases are random, too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(-1, 1)
    model.save_pretrained(folder, **options)
    return model.eval()


@pytest.fixture(params=CONFIGS, scope='module')
def pair(request, tmp_path_factory):
    """(transformers' model, ours) of the same folder."""
    folder = tmp_path_factory.mktemp('llama')
    theirs = save(CONFIGS[request.param](), folder)
    ours, _ = pretrained.load(folder)
    return theirs, ours


@torch.no_grad()
def test_logits_equal_those_of_transformers(pair):
    theirs, ours = pair
    idx = torch.randint(96, (3, 50))
    assert torch.allclose(ours(idx)[0], theirs(idx).logits, atol=1e-4)


@torch.no_grad()
def test_greedy_text_equals_that_of_transformers(pair):
    theirs, ours = pair
    prompt = torch.tensor([[5, 17, 60]])
    want = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60,
                           do_sample=False, eos_token_id=None, pad_token_id=0)
    got = ours.generate(prompt, 60, temperature=0.0)
    assert got.tolist() == want.tolist()


@torch.no_grad()
def test_cached_ragged_and_overflowing_text_is_that_of_each_prompt_alone(pair):
    _, ours = pair
    prompts = [[3], [7, 8, 9, 10], [20, 21]]
    together = ours.generate(prompts, 80, temperature=0.0)  # past the context of 64
    for prompt, text in zip(prompts, together):
        assert ours.generate([prompt], 80, temperature=0.0, use_cache=False)[0] == text


@torch.no_grad()
def test_chunked_prefill_equals_forward(pair):
    _, ours = pair
    idx = torch.randint(96, (2, 30))
    cache = new_cache(ours, 2, 30)
    assert cache.k.size(2) == ours.config.num_kv_heads
    logits = [ours(chunk, cache=cache)[0] for chunk in idx.split(11, dim=1)]
    assert torch.allclose(torch.cat(logits, dim=1), ours(idx)[0], atol=1e-5)


@pytest.mark.parametrize('T, S, masked', [(1, 9, False), (1, 9, True), (7, 7, False), (300, 300, False)])
def test_grouped_query_attention_equals_the_plain_formula(T, S, masked):
    q = torch.randn(2, 6, T, 8)
    k, v = torch.randn(2, 2, 2, S, 8).unbind(0)
    mask = torch.rand(2, 1, T, S) > 0.3 if masked else None
    if masked:
        mask[..., 0] = True
    is_causal = T > 1
    got = attention(q, k, v, mask, is_causal)
    assert torch.allclose(got, plain_attention(q, k, v, mask, is_causal), atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_weights_on_disk_may_be_in_16_bits_and_in_shards(tmp_path, dtype):
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size='10KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    ours, _ = pretrained.load(tmp_path)
    idx = torch.randint(96, (1, 10))
    assert torch.allclose(ours(idx)[0], theirs.float()(idx).logits, atol=1e-4)


@pytest.mark.parametrize('change, message', [
    ({'num_local_experts': 8}, 'mixture of 8 experts'),
    ({'model_type': 'qwen3_moe', 'num_experts': 128}, "'qwen3_moe', a mixture of 128 experts"),
    ({'model_type': 'qwen2', 'use_sliding_window': True, 'sliding_window': 16, 'max_window_layers': 1},
     'sliding_window is 16'),
    ({'rope_parameters': {'rope_type': 'dynamic', 'rope_theta': 1e4}}, "'dynamic', only linear"),
    ({'rope_scaling': 5}, "rope_scaling is of type '5'"),
    ({'rope_scaling': {'type': 'llama3', 'factor': 2.0}}, 'low_freq_factor of rope_scaling'),
    ({'rope_theta': 'large'}, "rope_theta is 'large', not a number"),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor is 0.5'),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'its weights are quantized'),
    ({'mlp_bias': True}, 'mlp_bias is True'),
    ({'model_type': ['llama']}, 'model_type is .* only gpt2, llama'),
    ({'model_type': 'mistral', 'sliding_window': 16}, 'sliding_window is 16'),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}}, "'yarn', only linear and llama3"),
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu'"),
    ({'model_type': 'phi'}, "model_type is 'phi', only gpt2, llama"),
    ({'hidden_size': '32'}, "hidden_size is '32', not a whole number"),
    ({'num_key_value_heads': 3}, 'n_head must be divisible by n_kv_head'),
])
def test_what_ours_cannot_be_is_refused_by_name(tmp_path, change, message):
    save(transformers.LlamaConfig(**SHAPE), tmp_path)
    path = tmp_path / 'config.json'
    content = json.loads(path.read_text(encoding='utf-8'))
    path.write_text(json.dumps(content | change), encoding='utf-8')
    with pytest.raises(UserError, match=message):
        pretrained.load(tmp_path)


@torch.no_grad()
def test_rope_parameters_of_newer_configs_are_read(tmp_path):
    """transformers 5 keeps theta and scaling in one dict."""
    theirs = save(transformers.LlamaConfig(**SHAPE, rope_theta=5e5, rope_scaling=LLAMA3), tmp_path)
    path = tmp_path / 'config.json'
    content = json.loads(path.read_text(encoding='utf-8'))
    rope = content.pop('rope_scaling') | {'rope_theta': content.pop('rope_theta')}
    path.write_text(json.dumps(content | {'rope_parameters': rope}), encoding='utf-8')
    ours, args = pretrained.load(tmp_path)
    assert args['rope_theta'] == 5e5
    idx = torch.randint(96, (1, 50))
    assert torch.allclose(ours(idx)[0], theirs(idx).logits, atol=1e-4)


@torch.no_grad()
def test_a_folder_saved_without_the_head_is_read(tmp_path):
    """Its keys lack 'model.'."""
    theirs = save(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True), tmp_path)
    path = tmp_path / 'model.safetensors'
    tensors = {key.removeprefix('model.'): tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path)
    ours, _ = pretrained.load(tmp_path)
    idx = torch.randint(96, (1, 50))
    assert torch.allclose(ours(idx)[0], theirs(idx).logits, atol=1e-4)


@pytest.mark.parametrize('scaling', [None, LLAMA3, {'rope_type': 'linear', 'factor': 2.5}])
def test_rotary_positions_are_those_of_transformers_to_the_last_bit(tmp_path, scaling):
    """Far from the start a difference in the last bit of a frequency is one in the third digit."""
    shape = SHAPE | {'max_position_embeddings': 4096, 'head_dim': 64}
    config = transformers.LlamaConfig(**shape, rope_theta=5e5, rope_scaling=scaling)
    theirs = save(config, tmp_path)
    ours, _ = pretrained.load(tmp_path)
    cos, sin = theirs.model.rotary_emb(torch.zeros(1, 4096, 32), torch.arange(4096)[None])
    assert torch.equal(ours.transformer.cos, cos[0, :, :32])
    assert torch.equal(ours.transformer.sin, sin[0, :, :32])


@torch.no_grad()
@pytest.mark.parametrize('layer_types', [None, ['full_attention'] * 2])
def test_a_sliding_window_that_no_layer_has_does_not_matter(tmp_path, layer_types):
    config = transformers.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16,
                                      max_window_layers=SHAPE['num_hidden_layers'])
    theirs = save(config, tmp_path)
    path = tmp_path / 'config.json'
    content = json.loads(path.read_text(encoding='utf-8')) | {'layer_types': layer_types}
    path.write_text(json.dumps(content), encoding='utf-8')
    ours, _ = pretrained.load(tmp_path)
    idx = torch.randint(96, (1, 50))
    assert torch.allclose(ours(idx)[0], theirs(idx).logits, atol=1e-4)


@torch.no_grad()
def test_a_block_within_the_sliding_window_can_be_had(tmp_path):
    theirs = save(transformers.MistralConfig(**SHAPE, sliding_window=16), tmp_path)
    with pytest.raises(UserError, match='sliding_window is 16 with 64 positions.*at most 16'):
        pretrained.load(tmp_path)
    ours, _ = pretrained.load(tmp_path, block_size=16)
    idx = torch.randint(96, (1, 16))
    assert torch.allclose(ours(idx)[0], theirs(idx).logits, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Tokenizer and template

LINES = ['Hello, world!', 'def f(x):\n    return x ** 2', 'naïve café — 日本語 🙂', '  two  spaces ',
         '1234567 3.14', "it's don't", 'tab\there', '', 'Ünïcödé\r\n', '<tag attr="1">', 'x' * 50]


@pytest.fixture(scope='module')
def tokenizer_folder(tmp_path_factory):
    """A folder with a byte-level BPE that splits digits, as SmolLM2's does, and a chat template."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    folder = tmp_path_factory.mktemp('tokenizer')
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    library.train_from_iterator(LINES * 5, trainer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token='<|im_end|>',
                                                  bos_token='<|im_start|>')
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(folder)
    save(transformers.LlamaConfig(**{**SHAPE, 'vocab_size': 512}), folder)  # padded beyond the tokenizer
    (folder / 'generation_config.json').write_text('{"eos_token_id": [2, 0]}', encoding='utf-8')
    return folder


def test_makers_say_how_to_sample(tokenizer_folder, tmp_path):
    folder = tmp_path / 'model'
    shutil.copytree(tokenizer_folder, folder)
    generation = {'eos_token_id': 2, 'temperature': 0.6, 'top_p': 0.95, 'top_k': 0}
    for do_sample in (True, False):
        (folder / 'generation_config.json').write_text(
            json.dumps({**generation, 'do_sample': do_sample}), encoding='utf-8')
        settings = load(init_from=folder).settings
        if do_sample:
            assert (settings.temperature, settings.top_p, settings.top_k) == (0.6, 0.95, None)
        else:
            assert settings == Settings()

    (folder / 'generation_config.json').write_text(
        '{"do_sample": true, "temperature": "hot"}', encoding='utf-8')
    with pytest.raises(UserError, match="generation_config.json: temperature .* 'hot'"):
        load(init_from=folder)


TEMPLATE = """{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
{{ bos_token }}system
Be kind.{{ eos_token }}
    {% endif %}
{{ bos_token + message['role'] + '\\n' + message['content'] | trim + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"""


def test_token_ids_equal_those_of_transformers(tokenizer_folder):
    ours = pretrained.load_tokenizer(tokenizer_folder)
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    assert ours.eos_ids == [2, 0] and ours.eos_id == 2
    for line in LINES:
        ids = ours.encode(line)
        assert ids == theirs(line, add_special_tokens=False).input_ids
        assert ours.decode(ids) == line
        decode_next = ours.stream_decoder()
        streamed = ''.join(decode_next(token) for token in [*ids, None])
        assert streamed == line
        assert ours.byte_lengths()[ids].sum() == len(line.encode('utf-8'))


def test_typed_special_tokens_are_plain_text_but_those_of_a_template_are_not(tokenizer_folder):
    tok = pretrained.load_tokenizer(tokenizer_folder)
    assert 2 not in tok.encode('say <|im_end|>')
    assert tok.encode_with_specials('say <|im_end|>')[-1] == 2


def test_chat_prompts_equal_apply_chat_template(tokenizer_folder):
    template = pretrained.load_template(tokenizer_folder)
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    conversations = [
        [{'role': 'user', 'content': ' Hi '}],
        [{'role': 'system', 'content': 'Be rude.'}, {'role': 'user', 'content': 'Hi'}],
        [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'},
         {'role': 'user', 'content': 'c'}],
    ]
    for messages in conversations:
        for add in (True, False):
            want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
            assert template.render(messages, add) == want


@pytest.mark.parametrize('source, message', [
    ("{{ raise_exception('roles must alternate') }}", 'roles must alternate'),
    ("{% for i in range(10**9) %}x{% endfor %}", 'chat template'),
    ("{{ ''.__class__.__mro__ }}", 'chat template'),
    ("{{ messages.append(1) }}", 'chat template'),
])
def test_template_that_refuses_loops_or_reaches_out_is_a_sentence(source, message):
    with pytest.raises((ValueError, UserError), match=message):
        JinjaTemplate(source).render([{'role': 'user', 'content': 'Hi'}])


def test_template_that_is_none_is_refused(tmp_path, tokenizer_folder):
    with pytest.raises(ValueError, match='not a Jinja template'):
        JinjaTemplate('{% for %}')


def test_tokenizer_with_ids_beyond_the_embedding_is_refused(tmp_path, tokenizer_folder):
    folder = tmp_path / 'small'
    shutil.copytree(tokenizer_folder, folder)
    save(transformers.LlamaConfig(**SHAPE), folder)
    with pytest.raises(UserError, match='ids up to 350, but the model knows only 96'):
        pretrained.load_tokenizer(folder)


def made_up_lines():
    """1,000 lines: code and prose of this project, and characters that are seldom together."""
    files = [CHECKOUT / name for name in ('model.py', 'train.py', 'pocket/template.py', 'README.md')]
    text = ''.join(path.read_text(encoding='utf-8') for path in files)
    chooser = random.Random(0)
    lines = chooser.sample(text.splitlines(keepends=True), 700)
    rare = 'aé ßÄ中文日本語🙂👩\u200d👧 \t\n\r\u200b\u00a0▁Ġa\u0301ñ012345١٢ﷺ\ufeffkK<>|_'
    lines += [''.join(chooser.choices(rare, k=chooser.randint(1, 60))) for _ in range(300)]
    return [line.replace('<|endoftext|>', '') for line in lines]  # which is plain text to us alone


def learn(library, trainer_class, **options):
    """Train a tokenizer of Hugging Face's library on some of the lines."""
    special = ['<unk>', '<s>', '</s>']
    trainer = trainer_class(vocab_size=600, special_tokens=special, show_progress=False, **options)
    library.train_from_iterator(made_up_lines()[:400], trainer)
    return library


def make_llama2_like():
    """BPE as sentencepiece writes it: ▁ for spaces, unknown characters as bytes, <s> in front."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        processors,
        trainers,
    )
    library = Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    library.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(),
                                         decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    learn(library, trainers.BpeTrainer)
    content = json.loads(library.to_str())
    vocab = content['model']['vocab']
    for byte in range(256):
        vocab[f'<0x{byte:02X}>'] = len(vocab)
    library = Tokenizer.from_str(json.dumps(content))
    library.add_special_tokens([AddedToken('<|end|>', special=True)])
    library.post_processor = processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 1)])
    return library


def make_metaspace():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    library = Tokenizer(models.BPE(unk_token='<unk>'))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    return learn(library, trainers.BpeTrainer)


def make_bert_like():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    library = Tokenizer(models.WordPiece(unk_token='<unk>'))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(cleanup=False)
    return learn(library, trainers.WordPieceTrainer)


def make_byte_level():
    """Digits stand alone, words are cut as Llama 3 does, and some tokens were added later."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    library = Tokenizer(models.BPE())
    split = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    learn(library, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    library.add_tokens([AddedToken('    ', normalized=False), AddedToken('日本', normalized=False)])
    library.add_special_tokens([AddedToken('<|x|>'), AddedToken('<x>')])
    return library


@pytest.mark.slow
@pytest.mark.parametrize('make', [make_byte_level, make_llama2_like, make_metaspace, make_bert_like])
def test_ids_and_texts_of_1000_lines_equal_those_of_transformers(make):
    library = make()
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, clean_up_tokenization_spaces=False)
    ours = tokenizer_from_dict(HuggingFaceTokenizer(library.to_str(), [2]).to_dict())
    lengths = ours.byte_lengths()
    lines = made_up_lines()
    for line, ids in zip(lines, ours.encode_batch(lines)):
        ids = ids.tolist()
        assert ids == theirs(line, add_special_tokens=False).input_ids == ours.encode(line)
        text = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == text
        decode_next = ours.stream_decoder()
        assert ''.join(decode_next(token) for token in [*ids, None]) == text
        if make is make_byte_level:  # the only one that keeps all characters
            assert text == line
            assert lengths[ids].sum() == len(line.encode('utf-8'))
        if make is make_llama2_like:  # a space comes in front, and ▁ is a space
            assert text == line.replace('▁', ' ')
            assert lengths[ids].sum() == len(f' {text}'.encode())
        assert ours.encode_prompt(line) == (theirs(line).input_ids or [2])
    special = {token_id for token_id, token in library.get_added_tokens_decoder().items()
               if token.special}
    assert set(ours.special_tokens.values()) == special  # <|x|> and <x> both have a name


@pytest.mark.parametrize('make', [make_byte_level, make_llama2_like])
def test_text_that_ends_in_half_a_character_is_streamed_as_it_is_decoded(make):
    ours = HuggingFaceTokenizer(make().to_str())
    lonely = [token_id for token_id, token in enumerate(ours.tokens) if token in (b'\xe2', b'\x82')]
    ids = [*ours.encode('a🙂b'), *lonely[:1]]
    decode_next = ours.stream_decoder()
    pieces = [decode_next(token) for token in [*ids, None]]
    assert ''.join(pieces) == ours.decode(ids) == 'a🙂b\ufffd'
    assert not any('\ufffd' in piece for piece in pieces[:-1])


def test_a_text_that_a_tokenizer_cannot_encode_is_a_sentence():
    content = {'version': '1.0', 'added_tokens': [], 'decoder': {'type': 'Fuse'},
               'model': {'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': '[UNK]'}}
    with pytest.raises(UserError, match='the tokenizer cannot encode this text'):
        HuggingFaceTokenizer(json.dumps(content)).encode('b')


def copy_without(folder, new_folder, *files):
    """A copy of a model's folder, without some of its files."""
    shutil.copytree(folder, new_folder)
    for file in files:
        (new_folder / file).unlink()
    return new_folder


@pytest.mark.parametrize('content, message', [
    (b'', 'tokenizer.json is not a JSON object'),
    (b'{"model": {"type": "BPE"}}', 'cannot read .*tokenizer.json: it is not a tokenizer.json'),
    (b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}', 'it has ids up to -1'),
    (b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}',
     'it has ids up to 4,294,967,295'),
    (b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', 'cannot read'),
])
def test_a_corrupt_tokenizer_is_refused(tmp_path, tokenizer_folder, content, message):
    folder = copy_without(tokenizer_folder, tmp_path / 'copy')
    (folder / 'tokenizer.json').write_bytes(content)
    with pytest.raises(UserError, match=message):
        pretrained.load_tokenizer(folder)


def test_a_missing_tokenizer_is_refused(tmp_path, tokenizer_folder):
    folder = copy_without(tokenizer_folder, tmp_path / 'copy', 'tokenizer.json')
    with pytest.raises(UserError, match='has 512 ids of its own, but no tokenizer.json'):
        pretrained.load_tokenizer(folder)


def test_the_ids_that_end_a_reply_come_from_the_first_file_that_says_so(tmp_path, tokenizer_folder):
    folder = copy_without(tokenizer_folder, tmp_path / 'copy')
    assert pretrained.load_tokenizer(folder).eos_ids == [2, 0]
    (folder / 'generation_config.json').write_text('{}', encoding='utf-8')
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    for told, eos_ids in ((1, [1]), (None, [2])):  # None: the tokenizer's eos_token
        (folder / 'config.json').write_text(json.dumps(config | {'eos_token_id': told}), encoding='utf-8')
        assert pretrained.load_tokenizer(folder).eos_ids == eos_ids


def test_a_reply_ends_at_any_of_the_ids(tokenizer_folder):
    chat = load(init_from=str(tokenizer_folder))
    assert chat.eos_ids == [2, 0]
    for eos_id in chat.eos_ids:
        queue = [40, 41, eos_id, 42]

        def predict_next_in_queue(idx, cache):
            cache.length += idx.size(1)
            return torch.nn.functional.one_hot(torch.tensor([queue.pop(0)]), 512).float()

        chat.model.next_token_logits = predict_next_in_queue
        messages = [{'role': 'user', 'content': 'Hi'}]
        reply = ''.join(chat.reply(messages, max_new_tokens=8, temperature=0.0))
        assert reply == chat.tok.decode([40, 41])
        assert queue == [42]


# --------------------------------------------------------------------------------------------------
# Chat templates

TEMPLATES = {
    'chatml': TEMPLATE,
    'llama 2, with blocks, whitespace control and refusals': """\
{% if messages[0]['role'] == 'system' %}
    {% set system = messages[0]['content'] %}
    {% set messages = messages[1:] %}
{% else %}
    {% set system = false %}
{% endif %}
    {%- for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/...') }}
    {% endif %}
    {%- set content = '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' ~ message.content if loop.index0 == 0 and system else message.content %}
{{ bos_token ~ '[INST] ' ~ content.strip() ~ ' [/INST]' if message.role == 'user' else ' ' ~ content | trim ~ ' ' ~ eos_token }}
{%- endfor %}
""",
    'llama 3, with dates, namespaces and tojson': """\
{{- bos_token }}{% set ns = namespace(turns=0) %}
{%- if strftime_now is defined %}{{ strftime_now('%d %B %Y') }}{% endif %}
{%- if tools is not none and tools %}{{ tools | tojson(indent=4) }}{% endif %}
{%- for message in messages %}
  {%- if loop.index > 9 %}{% break %}{% endif %}
  {%- set ns.turns = ns.turns + 1 %}
  {{- '<|' + message.role + '|>' + (message | tojson) + (message.content | tojson(indent=2)) }}
{%- endfor %}
{{- ns.turns }}{{ messages | length }}{{ undefined_thing }}{{ (messages | last).content[:3] | upper }}
{%- generation %} answer {% endgeneration %}
{%- macro hint(x) -%} ({{ x }}) {%- endmacro %}{{ hint('go on') if add_generation_prompt }}
""",
}
CONVERSATIONS = {
    'one': [('user', ' Hi ')],
    'system': [('system', 'Be rude.\n'), ('user', 'Tschüß "日本" <b> & \'x\'')],
    'five': [('user', 'a\n\n'), ('assistant', '\tb '), ('user', '{{ 7 * 7 }}'), ('assistant', ''),
             ('user', '<|im_end|>')],
}


@pytest.mark.parametrize('conversation', CONVERSATIONS)
@pytest.mark.parametrize('source', TEMPLATES)
def test_prompts_equal_apply_chat_template_to_the_character(tokenizer_folder, source, conversation):
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    theirs.chat_template = TEMPLATES[source]
    ours = JinjaTemplate(TEMPLATES[source], theirs.special_tokens_map)
    ours = template.template_from_dict(json.loads(json.dumps(ours.to_dict())))
    messages = [{'role': role, 'content': content} for role, content in CONVERSATIONS[conversation]]
    tok = pretrained.load_tokenizer(tokenizer_folder)
    for add in (True, False):
        options = {'add_generation_prompt': add}
        assert ours.render(messages, add) == theirs.apply_chat_template(messages, tokenize=False, **options)
        ids = theirs.apply_chat_template(messages, **options)
        assert tok.encode_with_specials(ours.render(messages, add)) == ids


def test_a_long_conversation_keeps_its_system_message_and_its_newest_turns(tokenizer_folder):
    tok = pretrained.load_tokenizer(tokenizer_folder)
    theirs = pretrained.load_template(tokenizer_folder)
    messages = [{'role': 'system', 'content': 'SYSTEM'}]
    for number in range(9):
        messages.append({'role': ['user', 'assistant'][number % 2], 'content': f'turn {number}'})
    whole = encode_messages(tok, theirs, messages)
    cut = tok.library.decode(encode_messages(tok, theirs, messages, len(whole) - 1))
    assert re.findall(r'SYSTEM|turn \d', cut) == ['SYSTEM', *(f'turn {n}' for n in range(2, 9))]
    with pytest.raises(UserError, match='this message is .* tokens long, but there is room for 9'):
        encode_messages(tok, theirs, messages, 9)


@pytest.mark.parametrize('source', [
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
    '{% for i in range(10**9) %}{% endfor %}',
    "{{ 'x' * 10**9 }}",
    "{% set n = 10**9 %}{{ messages * n }}",
    "{% set ns = namespace(x='abc') %}{% for i in range(22) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x * 20 }}",
    '{{ 9**9**9**9 }}',
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x' | center(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    '{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}',
])
def test_a_template_that_does_not_end_or_wants_too_much_is_stopped(monkeypatch, source):
    monkeypatch.setattr(template, 'RENDER_SECONDS', 0.2)
    start = time.monotonic()
    with pytest.raises(ValueError, match='chat template failed') as caught:
        JinjaTemplate(source).render([{'role': 'user', 'content': 'Hi'}])
    assert '\n' not in str(caught.value)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize('source', [
    '{% if a %}' * 300 + '{% endif %}' * 300,
    '{% for x in y %}' * 30 + '{% endfor %}' * 30,
    '{{ ' + '(' * 3000 + '1' + ')' * 3000 + ' }}',
    'x' * 2**21,
    '{% include',
])
def test_a_template_that_python_cannot_compile_is_refused(source):
    with pytest.raises(ValueError, match='not a Jinja template|longer than'):
        JinjaTemplate(source)


@pytest.mark.parametrize('source', [
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ self._TemplateReference__context.environment }}",
])
def test_a_template_that_reaches_out_is_stopped(source):
    messages = [{'role': 'user', 'content': 'Hi'}]
    with pytest.raises(ValueError, match='chat template failed'):
        JinjaTemplate(source).render(messages)
    assert messages == [{'role': 'user', 'content': 'Hi'}]


def test_a_template_that_writes_nothing_is_one_sentence(tokenizer_folder):
    tok = pretrained.load_tokenizer(tokenizer_folder)
    with pytest.raises(UserError, match='writes nothing for this conversation'):
        encode_messages(tok, JinjaTemplate('{% if false %}x{% endif %}'), [{'role': 'user', 'content': 'Hi'}])


def test_a_template_that_fails_is_one_sentence_in_a_chat(project, tmp_path, tokenizer_folder):
    folder = copy_without(tokenizer_folder, tmp_path / 'copy', 'chat_template.jinja')
    (folder / 'chat_template.jinja').write_text("{{ raise_exception('no, never') }}", encoding='utf-8')
    error = project.fails('sample.py', f'--init_from={folder}', '--start=Hi')
    assert 'no, never' in error


def test_a_message_that_is_too_long_does_not_end_the_chat(project, tokenizer_folder):
    out, err = project.run('sample.py', f'--init_from={tokenizer_folder}', '--chat', '--max_new_tokens=4',
                           typed=f'Hello\n{"0123456789" * 30}\nStill there?\n/quit\n')
    assert 'shorten it' in err
    assert out.count('assistant: ') == 3


def test_chat_with_a_folder(project, tokenizer_folder):
    out, _ = project.run('sample.py', f'--init_from={tokenizer_folder}', '--chat', '--max_new_tokens=8',
                         '--system=Be brief.', typed='Hello\n/reset\nAgain\n/quit\n')
    assert out.count('assistant: ') == 2
    assert 'forgotten' in out
