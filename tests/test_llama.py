"""
Models of the Llama family against Hugging Face's transformers: logits, tokens, templates, refusals.

    pytest -n 0 tests/test_llama.py
"""
import json

import pytest
import torch

from model import attention, plain_attention
from pocket import pretrained
from pocket.errors import UserError
from pocket.generate import new_cache
from pocket.template import JinjaTemplate

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
    'qwen3': lambda: transformers.Qwen3Config(**SHAPE, head_dim=16),
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
    import shutil
    folder = tmp_path / 'small'
    shutil.copytree(tokenizer_folder, folder)
    save(transformers.LlamaConfig(**SHAPE), folder)
    with pytest.raises(UserError, match='ids up to 350, but the model knows only 96'):
        pretrained.load_tokenizer(folder)


def test_chat_with_a_folder(project, tokenizer_folder):
    out, _ = project.run('sample.py', f'--init_from={tokenizer_folder}', '--chat', '--max_new_tokens=8',
                         '--system=Be brief.', typed='Hello\n/reset\nAgain\n/quit\n')
    assert out.count('assistant: ') == 2
    assert 'forgotten' in out
