"""
OpenAI's API of sample.py --web, asked by OpenAI's own client: a model of plain text, one with a
ChatTemplate, one with somebody else's tokenizer and Jinja template.

    pytest -n 0 tests/test_api.py
"""
import contextlib
import copy
import threading
import time

import pytest
import requests
import torch
from toy import CHAT, WORDS

from model import GPT, GPTConfig
from pocket import chat
from pocket.chat import ChatModel
from pocket.template import ChatTemplate, JinjaTemplate
from pocket.tokenizer import HuggingFaceTokenizer, make_tokenizer

openai = pytest.importorskip('openai', reason='pip install openai')
pytest.importorskip('uvicorn', reason='pip install uvicorn')
pytest.importorskip('starlette', reason='pip install starlette')

from pocket import server as server_module

GREEDY = {'temperature': 0}


@contextlib.contextmanager
def serving(chat_model, api_key=None):
    """A client of a server in this process; client.server is the ChatServer, client.url its URL.

    client.here is the same ChatModel, but not the server's, which ends what it does not wait for.
    """
    here = copy.copy(chat_model)
    here.model = copy.deepcopy(chat_model.model)
    sock = server_module.listen('127.0.0.1', 0)
    server = server_module.ChatServer(chat_model, sock, '127.0.0.1', api_key=api_key)
    server.server.on_start = lambda: None   # opens no browser
    thread = threading.Thread(target=server.run)
    thread.start()
    url = server_module.url_of(sock) + 'v1'
    client = openai.OpenAI(base_url=url, api_key=api_key or 'none', max_retries=0, timeout=30)
    client.url = url
    client.server = server
    client.here = here
    client.name = client.models.list().data[0].id
    try:
        yield client
    finally:
        client.close()
        server.server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def small_gpt(tok, block_size=128):
    """A GPT with random weights: what it says makes no sense, but depends on what it reads."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=block_size, vocab_size=tok.vocab_size, n_layer=2, n_head=2,
                       n_embd=32, dropout=0.0)
    model = GPT(config).eval()
    for parameter in model.parameters():
        parameter.data *= 5
    return model


@pytest.fixture(scope='module')
def plain(trained):
    """A client of a model of plain text."""
    model = chat.load(trained.root / 'out' / 'toy', device='cpu')
    model.settings.max_new_tokens = 30
    with serving(model) as client:
        yield client


@pytest.fixture(scope='module')
def talker():
    """A client of a model of conversations, with a template of ours."""
    tok = make_tokenizer('char', [' '.join(WORDS) + 'UB:.'], special_tokens=('pad', 'bos', 'eos', 'sep'))
    with serving(ChatModel(small_gpt(tok), tok, ChatTemplate.from_dict(CHAT), 'out/talk/best.pt')) as client:
        yield client


JINJA = """{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}
{%- if messages[0]['content'] == 'fail' %}{{ raise_exception('Not that.') }}{% endif %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope='module')
def stranger():
    """A client of a model with a Hugging Face tokenizer and a Jinja template."""
    pytest.importorskip('jinja2')
    tokenizers = pytest.importorskip('tokenizers')
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, show_progress=False,
        special_tokens=['<|end|>', '<|system|>', '<|user|>', '<|assistant|>'],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(['ba dodo fu gimme kilo'] * 5, trainer)
    tok = HuggingFaceTokenizer(library.to_str(), eos_ids=[0])
    model = ChatModel(small_gpt(tok), tok, JinjaTemplate(JINJA), 'OWNER/stranger', system='Be kind.')
    with serving(model) as client:
        yield client


def post(client, path='completions', headers=None, **fields):
    """A request that is not written by OpenAI's client."""
    return requests.post(f'{client.url}/{path}', json=fields, headers=headers, timeout=30)


# ---- Models


def test_one_model_is_listed(plain, stranger):
    assert plain.name == 'toy' and stranger.name == 'OWNER/stranger'
    for client in (plain, stranger):
        assert client.models.retrieve(client.name).id == client.name
        assert len(client.models.list().data) == 1
    with pytest.raises(openai.NotFoundError, match="'nobody' does not exist: here is 'toy'"):
        plain.models.retrieve('nobody')
    with pytest.raises(openai.NotFoundError, match="'nobody' does not exist"):
        plain.completions.create(model='nobody', prompt='ba')


# ---- Completions of plain text


def test_completion_is_what_the_model_generates(plain):
    here = plain.here
    answer = plain.completions.create(model=plain.name, prompt='ba ', max_tokens=20, **GREEDY)
    choice, = answer.choices
    assert choice.text == here('ba ', max_new_tokens=20, **GREEDY) and len(choice.text) == 20
    assert choice.finish_reason == 'length' and choice.index == 0
    assert answer.object == 'text_completion' and answer.model == 'toy'
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 20, 23)
    assert abs(answer.created - time.time()) < 60

    # A list of one prompt, and none at all
    again = plain.completions.create(model=plain.name, prompt=['ba '], max_tokens=20, **GREEDY)
    assert again.choices[0].text == choice.text and again.id != answer.id
    assert plain.completions.create(model=plain.name, prompt='', max_tokens=2).usage.completion_tokens == 2


def test_sampling_options_are_used(plain):
    here = plain.here
    options = {'temperature': 1.5, 'top_p': 0.9, 'seed': 5}
    more = {'top_k': 8, 'min_p': 0.01, 'repetition_penalty': 1.2}

    def text(**fields):
        return plain.completions.create(model=plain.name, prompt='ba', **fields).choices[0].text

    assert text(**options) == here('ba', **options)     # 30 tokens: as it was started
    assert text(**options, extra_body=more) == here('ba', **options, **more)
    assert text(**{**options, 'seed': 6}) != text(**options) == text(**options)
    assert text(temperature=1.5) != text(temperature=1.5)   # without a seed


def test_stop_strings(plain):
    whole = plain.completions.create(model=plain.name, prompt='ba ', **GREEDY).choices[0].text
    for stop in (whole[7:10], [whole[7:10]], ['§', whole[7:10], whole[20:]], [whole[7:10], '']):
        expected = whole[:whole.index(whole[7:10])]
        answer = plain.completions.create(model=plain.name, prompt='ba ', stop=stop, **GREEDY)
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == 'stop'
        assert answer.usage.completion_tokens == len(expected) + 3

        *pieces, last = plain.completions.create(model=plain.name, prompt='ba ', stop=stop, stream=True, **GREEDY)
        assert ''.join(piece.choices[0].text for piece in pieces) == expected
        assert last.choices[0].finish_reason == 'stop'


def test_stream_is_the_same_in_pieces(plain):
    fields = {'model': plain.name, 'prompt': 'ba ', 'max_tokens': 20, **GREEDY}
    whole = plain.completions.create(**fields)
    chunks = list(plain.completions.create(**fields, stream=True))
    assert len(chunks) > 10 and len({chunk.id for chunk in chunks}) == 1
    assert ''.join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ['length']
    assert all(chunk.usage is None for chunk in chunks)

    *chunks, last = plain.completions.create(**fields, stream=True, stream_options={'include_usage': True})
    assert last.choices == [] and last.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks)

    answer = post(plain, **fields, stream=True)
    assert answer.headers['Content-Type'].startswith('text/event-stream')
    assert answer.text.endswith('\n\ndata: [DONE]\n\n')


def test_model_of_plain_text_does_not_chat(plain):
    with pytest.raises(openai.BadRequestError, match='toy is a model of plain text.*/v1/completions'):
        plain.chat.completions.create(model='toy', messages=[{'role': 'user', 'content': 'ba'}])


# ---- Conversations


TURNS = [
    {'role': 'user', 'content': 'ba dodo'},
    {'role': 'assistant', 'content': 'dodo.'},
    {'role': 'user', 'content': 'kilo'},
]


def test_conversation_with_a_template_of_ours(talker):
    here = talker.here
    for messages in (TURNS[:1], TURNS):
        answer = talker.chat.completions.create(model='talk', messages=messages, seed=1, max_tokens=40)
        choice, = answer.choices
        assert choice.message.role == 'assistant' and answer.object == 'chat.completion'
        reply = ''.join(here.reply(messages, seed=1, max_new_tokens=40))
        assert choice.message.content == reply

        *earlier, (speaker, text) = [('UB'[message['role'] == 'assistant'], message['content'])
                                     for message in messages]
        prompt = here.encode_prompt(text, earlier, here.settings, speaker)
        assert answer.usage.prompt_tokens == len(prompt)

    # Text in parts; a system message, which such a model does not know
    parts = [{'type': 'text', 'text': 'ba'}, {'type': 'text', 'text': ' dodo'}]
    for system in ('system', 'developer'):
        messages = [{'role': system, 'content': 'Be kind.'}, {'role': 'user', 'content': parts}]
        answer = talker.chat.completions.create(model='talk', messages=messages, seed=1, max_tokens=40)
        expected = ''.join(here.reply(TURNS[:1], seed=1, max_new_tokens=40))
        assert answer.choices[0].message.content == expected

    with pytest.raises(openai.BadRequestError, match='/v1/chat/completions'):
        talker.completions.create(model='talk', prompt='ba')
    with pytest.raises(openai.BadRequestError, match="does not know 'ß'"):
        talker.chat.completions.create(model='talk', messages=[{'role': 'user', 'content': 'ß'}])


@pytest.mark.parametrize('client', ['talker', 'stranger'])
def test_finish_reason_says_whether_the_model_ended_the_reply(client, request):
    client = request.getfixturevalue(client)
    here = client.here
    reasons = set()
    for seed in range(40):
        fields = {'model': client.name, 'messages': TURNS[:1], 'seed': seed, 'temperature': 2,
                  'max_completion_tokens': 20}
        answer = client.chat.completions.create(**fields)
        reason = answer.choices[0].finish_reason
        assert (reason == 'length') == (answer.usage.completion_tokens == 20)
        assert answer.choices[0].message.content == ''.join(
            here.reply(TURNS[:1], seed=seed, temperature=2.0, max_new_tokens=20))
        if reason not in reasons:
            *_, last = client.chat.completions.create(**fields, stream=True)
            assert last.choices[0].finish_reason == reason
        reasons.add(reason)
        if len(reasons) == 2:
            return
    raise AssertionError(reasons)


def test_conversation_with_a_jinja_template(stranger):
    here = stranger.here
    kind = [{'role': 'system', 'content': 'Be kind.'}, *TURNS]    # as the server was started
    brief = [{'role': 'system', 'content': 'Be brief.'}, *TURNS]
    for messages, read in ((TURNS, kind), (brief, brief)):
        fields = {'model': stranger.name, 'messages': messages, 'max_tokens': 15, **GREEDY}
        answer = stranger.chat.completions.create(**fields)
        reply = ''.join(here.reply(read, max_new_tokens=15, **GREEDY))
        assert answer.choices[0].message.content == reply
        prompt = here.tok.encode_with_specials(here.template.render(read))
        assert answer.usage.prompt_tokens == len(prompt)

        first, *chunks = stranger.chat.completions.create(**fields, stream=True)
        assert first.choices[0].delta.role == 'assistant' and first.object == 'chat.completion.chunk'
        assert ''.join(chunk.choices[0].delta.content or '' for chunk in chunks) == reply

    # It also continues plain text
    answer = stranger.completions.create(model=stranger.name, prompt='ba dodo', max_tokens=5)
    assert answer.usage.prompt_tokens == len(here.tok.encode('ba dodo'))

    with pytest.raises(openai.BadRequestError, match='Not that'):
        messages = [{'role': 'system', 'content': 'fail'}, *TURNS]
        stranger.chat.completions.create(model=stranger.name, messages=messages)
    with pytest.raises(openai.BadRequestError, match='there is room for'):
        messages = [{'role': 'user', 'content': 'ba' * 500}]
        stranger.chat.completions.create(model=stranger.name, messages=messages)


# ---- Requests that make no sense


@pytest.mark.parametrize('fields, param, message', [
    ({'temperature': 'warm'}, 'temperature', "temperature must be a number, got 'warm'"),
    ({'temperature': -1}, 'temperature', 'temperature must be 0'),
    ({'top_p': 7}, 'top_p', 'top_p must be'),
    ({'top_k': [1]}, 'top_k', 'top_k must be'),
    ({'max_tokens': 0}, 'max_tokens', 'max_tokens must be a whole number from 1, got 0'),
    ({'max_tokens': 1.5}, 'max_tokens', 'got 1.5'),
    ({'max_tokens': True}, 'max_tokens', 'got True'),
    ({'max_tokens': 2**70}, 'max_tokens', 'must be from 1 to 100,000 here'),
    ({'max_completion_tokens': '5'}, 'max_completion_tokens', "got '5'"),
    ({'seed': 'x'}, 'seed', 'seed must be'),
    ({'seed': 2**70}, 'seed', 'seed must be'),
    ({'stop': 5}, 'stop', 'stop must be'),
    ({'stop': ['a'] * 5}, 'stop', 'up to 4 strings'),
    ({'stop': [['a']]}, 'stop', 'stop must be'),
    ({'stop': 'a' * 1001}, 'stop', 'up to 1,000 characters'),
    ({'stream': 'yes'}, 'stream', 'stream must be true or false'),
    ({'stream': True, 'stream_options': 5}, 'stream_options', 'stream_options must be'),
    ({'n': 2}, 'n', 'n=2 is not supported: omit it'),
    ({'logprobs': 3}, 'logprobs', 'not supported'),
    ({'echo': True}, 'echo', 'not supported'),
    ({'presence_penalty': 0.5}, 'presence_penalty', 'not supported'),
    ({'prompt': ['a', 'b']}, 'prompt', 'prompt must be one string'),
    ({'prompt': [1, 2]}, 'prompt', 'prompt must be one string'),
    ({'prompt': 'ß'}, None, "does not know 'ß'"),
])
def test_wrong_field_is_named(plain, fields, param, message):
    answer = post(plain, **{'model': 'toy', 'prompt': 'ba', **fields})
    assert answer.status_code == 400
    error = answer.json()['error']
    assert message in error['message'] and error['param'] == param
    assert error['type'] == 'invalid_request_error'


@pytest.mark.parametrize('messages, message', [
    (None, 'messages must be a list'),
    ([], 'messages must be a list'),
    ('ba', 'messages must be a list'),
    (['ba'], "got 'ba'"),
    ([{'role': 'pirate', 'content': 'ba'}], "roles system, developer, user, assistant, got 'pirate'"),
    ([{'role': ['user'], 'content': 'ba'}], 'messages[0] must have one of the roles'),
    ([{'role': 'system', 'content': 'ba'}], 'one from the user'),
    ([{'role': 'user'}], 'messages[0] must have text'),
    ([*TURNS, {'role': 'user', 'content': 5}], 'messages[3] must have text'),
    ([{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {}}]}], 'must have text'),
])
def test_wrong_messages_are_explained(talker, messages, message):
    answer = post(talker, 'chat/completions', messages=messages)
    assert answer.status_code == 400
    assert message in answer.json()['error']['message']


def test_null_is_the_same_as_nothing(plain):
    nothing = dict.fromkeys(['temperature', 'top_p', 'stop', 'seed', 'stream', 'logprobs', 'suffix', 'n'])
    neutral = {'n': 1, 'presence_penalty': 0, 'frequency_penalty': 0.0, 'logit_bias': {}, 'user': 'me'}
    for fields in (nothing, neutral):
        assert post(plain, prompt='ba', max_tokens=2, **fields).status_code == 200


@pytest.mark.parametrize('body', [b'', b'{', b'[]', b'7', b'\xff', b'[' * 100_000, b'{"prompt": "\\ud800"}'])
def test_request_that_is_no_json_object_is_refused(plain, body):
    answer = requests.post(f'{plain.url}/completions', data=body, timeout=10)
    assert answer.status_code == 400 and 'must be' in answer.json()['error']['message']


def test_refusals_have_openai_s_form(plain):
    url = plain.url
    refusals = [
        (404, requests.get(f'{url}/embeddings', timeout=10)),
        (405, requests.get(f'{url}/completions', timeout=10)),
        (413, requests.post(f'{url}/completions', data=b' ' * 2**21, timeout=10)),
        (403, post(plain, headers={'Origin': 'http://evil.example'}, prompt='ba')),
        (403, post(plain, headers={'Host': 'evil.example'}, prompt='ba')),
        (403, requests.get(f'{url}/models', headers={'Host': 'evil.example'}, timeout=10)),
    ]
    for status, answer in refusals:
        assert answer.status_code == status
        assert answer.json()['error'].keys() == {'message', 'type', 'param', 'code'}


def test_key(trained):
    model = chat.load(trained.root / 'out' / 'toy', device='cpu')
    with serving(model, api_key='sesame') as client:
        assert client.completions.create(model='toy', prompt='ba', max_tokens=2).usage.completion_tokens == 2
        with pytest.raises(openai.AuthenticationError, match='wrong API key') as caught:
            client.with_options(api_key='open').models.list()
        assert caught.value.code == 'invalid_api_key'


# ---- One generation at a time, and its end


class Steps:
    """Counts the steps of a model, each of which takes `pause` seconds."""

    def __init__(self, client, pause=0.0):
        self.client = client
        self.pause = pause
        self.count = 0
        self.hook = client.server.chat_model.model.lm_head.register_forward_pre_hook(self.step)

    def step(self, *_):
        self.count += 1
        time.sleep(self.pause)

    def wait_for_end(self):
        """Wait until the generation in progress has ended."""
        deadline = time.monotonic() + 10
        while not self.client.server.stopped.is_set():
            assert time.monotonic() < deadline, 'it goes on'
            time.sleep(0.02)


@pytest.mark.parametrize('stream', [False, True])
def test_generation_ends_when_its_connection_is_closed(plain, stream):
    steps = Steps(plain, 0.005)
    fields = {'model': 'toy', 'prompt': 'ba', 'max_tokens': 100_000}
    try:
        if stream:
            chunks = plain.completions.create(**fields, stream=True)
            next(chunks)
            chunks.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                plain.with_options(timeout=0.3).completions.create(**fields)
        steps.wait_for_end()
        assert 0 < steps.count < 2000
        # It serves on
        assert plain.completions.create(**{**fields, 'max_tokens': 3}).usage.completion_tokens == 3
    finally:
        steps.hook.remove()


def test_one_generation_at_a_time(plain):
    fields = {'model': 'toy', 'prompt': 'ba', **GREEDY}
    alone = plain.completions.create(**fields, max_tokens=10).choices[0].text
    endless = plain.completions.create(**fields, max_tokens=100_000, stream=True)
    next(endless)
    texts = []
    threads = [threading.Thread(target=lambda: texts.append(
        plain.completions.create(**fields, max_tokens=10).choices[0].text)) for _ in range(3)]
    for thread in threads:
        thread.start()
    next(endless)
    assert texts == []
    endless.close()
    for thread in threads:
        thread.join(20)
    assert texts == [alone] * 3


@pytest.mark.parametrize('stream', [False, True])
def test_failing_model_is_an_error_and_the_server_lives_on(plain, stream):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    fields = {'model': 'toy', 'prompt': 'ba', 'max_tokens': 3, 'stream': stream}
    hook = plain.server.chat_model.model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(openai.APIError, match='out of memory'):
        list(plain.completions.create(**fields))
    hook.remove()
    assert list(plain.completions.create(**fields))


def test_too_many_waiting_requests_are_refused(plain, monkeypatch):
    monkeypatch.setattr(server_module, 'MAX_WAITING', -1)
    with pytest.raises(openai.InternalServerError, match='try again later') as caught:
        plain.completions.create(model='toy', prompt='ba')
    assert caught.value.status_code == 503
