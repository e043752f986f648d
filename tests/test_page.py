"""
A model as one HTML file: the model in JavaScript computes what ours does, and the page works.

    pytest -n 0 tests/test_page.py      needs node; the tests in a browser chromium and playwright
"""
import json
import random
import re
import shutil
import subprocess

import pytest
import torch
from conftest import CHECKOUT, Project
from torch.nn import functional as F

from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig
from pocket import checkpoint, page
from pocket.chat import ChatModel
from pocket.errors import UserError
from pocket.generate import filter_min_p, filter_top_p, penalize_repetition, sort_top_k
from pocket.template import ChatTemplate, JinjaTemplate
from pocket.tokenizer import make_tokenizer

BARD = CHECKOUT / 'pocket' / 'bundled' / 'shakespeare' / 'best.pt'
TEXT = 'ROMEO:\nWhat light is this, that through yon window breaks?\n\nJULIET:\nGood night, my lord.\n'
STRANGE = "It's 12345 o'clock…\n\n  naïve ¿ΣΑΣ? 你好，世界 \t\r\n🙂👍🏽 ½x²  don'T I'LL \ufeff\x85\u3000ſ'ſ end  "
TEMPLATE = ChatTemplate(turn='{speaker}: {text}', separator='<sep>', bos='<bos>', max_turns=3,
                        user='you', assistant='bot', reply_prefix='bot: ')

# What node is asked: a list of [name, arguments], answered by a list. The payload is in a file
DRIVER = '''
const {Engine, makeKernels, nextTokens, plainKernels} = require(process.argv[1])
const {readFileSync} = require('fs')
const questions = {
  logits: (engine, ids) => [...engine.logits(ids)],
  generate: (engine, ids, settings) => [...engine.generate(ids, settings)],
  encode: (engine, text) => engine.tok.encode(text),
  decode: (engine, ids) => engine.tok.decode(ids),
  stream: (engine, ids) => [...ids, null].map(engine.tok.streamDecoder()),
  prompt: (engine, prompt, maxNewTokens) => engine.encode(prompt, maxNewTokens),
  look: (engine, ids, request) => {
    const look = engine.look(ids, request)
    return {...look, attention: look.attention.map(weights => [...weights])}
  },
  loss: (engine, ids) => ids.slice(1).map((id, t) => {  // in nats, of each token but the first
    const logits = engine.logits(ids.slice(0, t + 1))
    const max = Math.max(...logits)
    const sum = logits.reduce((sum, value) => sum + Math.exp(value - max), 0)
    return Math.log(sum) + max - logits[id]
  }),
  next: (_, logits, ...more) => {
    const {ids, probabilities} = nextTokens(Float32Array.from(logits), ...more)
    return {ids: [...ids], probabilities: [...probabilities]}
  },
  split: (_, pattern, text) => text.match(RegExp(pattern, 'gu')),
  kernels: (_, type, x, w, rows, cols, skip) => {
    const memory = new WebAssembly.Memory({initial: 1})
    const bytes = type === 'int8' ? new Int8Array(memory.buffer) : new Float32Array(memory.buffer)
    const floats = new Float32Array(memory.buffer)
    const [xAt, wAt, yAt] = [16384, 0, 32768]
    bytes.set(w)
    floats.set(x, xAt / 4)
    return [plainKernels(memory.buffer), makeKernels(memory)].map(kernels => {
      floats.fill(0, yAt / 4)
      kernels[type](xAt, wAt, yAt, rows, cols, skip)
      return [...floats.slice(yAt / 4, yAt / 4 + rows + 1)]
    })
  },
}
async function main() {
  const {payload, asked} = JSON.parse(readFileSync(0, 'utf8'))
  const engine = payload && await Engine.load(readFileSync(payload))
  const answers = asked.map(([name, ...args]) => questions[name](engine, ...args))
  process.stdout.write(JSON.stringify(answers))
}
main()
'''


def ask(payload, *asked):
    """Ask the model in JavaScript; payload: the path of its payload, or None."""
    node = shutil.which('node')
    if node is None:
        pytest.skip('there is no node')
    engine = CHECKOUT / 'pocket' / 'page_engine.js'
    request = json.dumps({'payload': payload and str(payload), 'asked': asked})
    done = subprocess.run([node, '-e', DRIVER, str(engine)], input=request, capture_output=True,
                          text=True, encoding='utf-8', timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pack(path, model, tok, template=None, weights='float32'):
    """Write a payload to ask."""
    path.write_bytes(page.pack(model, tok, template, weights, {}))
    return path


def make_model(seed=0, **switches):
    """A small random GPT, decided enough that rounding does not change its first choice."""
    torch.manual_seed(seed)
    config = dict(vocab_size=50, block_size=24, n_layer=2, n_head=4, n_embd=40, bias=False)
    model = GPT(GPTConfig(**config | switches)).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter) * 0.3
        parameter.data = 1 + noise if name.endswith('norm.weight') or '.ln_' in name else noise
    return model


def byte_model(**switches):
    """A small random GPT with a byte tokenizer, which has the special tokens of chats."""
    tok = make_tokenizer('byte', special_tokens=('eos', 'bos', 'sep'))
    return make_model(vocab_size=tok.vocab_size + 5, **switches), tok


@pytest.fixture(scope='module')
def bard():
    return checkpoint.build(checkpoint.load(BARD), BARD)


# ---- The model


@pytest.mark.parametrize('type', ['int8', 'float32'])
@pytest.mark.parametrize('rows, cols, skip', [(1, 16, 0), (7, 48, 0), (3, 32, 64)])
def test_kernels_give_the_sums_of_the_plain_ones(type, rows, cols, skip):
    rng = random.Random(0)
    size = 1 if type == 'int8' else 4
    x = [rng.uniform(-1, 1) for _ in range(cols)]
    w = [rng.randint(-127, 127) for _ in range(rows * (cols + skip // size))]
    [[plain, fast]] = ask(None, ['kernels', type, x, w, rows, cols, skip])
    assert plain[:rows] == pytest.approx(fast[:rows], rel=1e-4, abs=1e-3)
    assert any(plain) and plain[rows] == fast[rows] == 0  # nothing is written beyond
    wide = torch.tensor(w, dtype=torch.float).view(rows, -1)[:, :cols]
    assert torch.tensor(fast[:rows]).allclose(wide @ torch.tensor(x), atol=1e-3)


SWITCHES = {
    'gpt2': dict(bias=True, head_bias=True),
    'paper': dict(pos='sinusoidal', norm_position='post', act='relu', bias=True, n_embd=42, n_head=3,
                  tie_weights=False),
    'modern': dict(pos='rotary', norm='rmsnorm', act='relu2', qk_norm=True, token_shift=True,
                   tie_weights=False, softcap=15.0),
    'nanogpt': dict(act='gelu_erf', attn_bias=True, token_shift=True, norm_position='post'),
    'llama': dict(pos='rotary', norm='rmsnorm', act='swiglu', n_kv_head=2, rope_theta=500.0,
                  norm_eps=1e-3, n_inner=56, rope_scaling={
                      'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
                      'high_freq_factor': 4.0, 'original_max_position_embeddings': 12}),
    'qwen2': dict(pos='rotary', norm='rmsnorm', act='swiglu', qkv_bias=True, n_kv_head=1,
                  rope_scaling={'rope_type': 'linear', 'factor': 2.0}),
    'qwen3': dict(pos='rotary', norm='rmsnorm', qk_norm='rmsnorm', head_dim=18, n_kv_head=2,
                  act='swiglu', tie_weights=False),
}


@pytest.mark.parametrize('name', SWITCHES)
def test_same_logits_and_text_with_every_switch(tmp_path, name):
    model = make_model(**SWITCHES[name])
    tok = make_tokenizer('char', ['abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWX'])
    prompt = tok.encode('someWORDS')
    read = tok.encode('abcdeXWVUTSvwxyz')  # begins otherwise: the cache has to forget
    # The penalty makes the text more than a repetition
    [mine] = model.generate([prompt], 200, temperature=0.0, repetition_penalty=2.0)
    with torch.no_grad():
        logits = [model(torch.tensor([ids]))[0][0, -1] for ids in (prompt, read, read[:3])]

    *theirs, text = ask(
        pack(tmp_path / 'payload', model, tok),
        *(['logits', ids] for ids in (prompt, read, read[:3])),
        ['generate', prompt, {'temperature': 0, 'max_new_tokens': 200, 'repetition_penalty': 2}],
    )
    for ours, other in zip(logits, theirs):
        assert torch.tensor(other).allclose(ours, atol=1e-3), (ours - torch.tensor(other)).abs().max()
    assert len(set(text)) > 3
    assert prompt + text == mine


@pytest.mark.slow
def test_bundled_model_in_float32_and_in_int8(tmp_path, bard):
    model, tok = bard
    ids = tok.encode(TEXT)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0][0]
    loss = F.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()
    [greedy] = model.generate([ids[:7]], 200, temperature=0.0)

    exact, text = ask(pack(tmp_path / 'float32', model, tok), ['logits', ids],
                      ['generate', ids[:7], {'temperature': 0, 'max_new_tokens': 200}])
    assert torch.tensor(exact).allclose(logits[-1], atol=1e-3)
    assert ids[:7] + text == greedy

    [losses] = ask(pack(tmp_path / 'int8', model, tok, weights='int8'), ['loss', ids])
    in_int8 = sum(losses) / len(losses)
    assert in_int8 == pytest.approx(loss, abs=0.02)  # 0.02 nats are 2 % of perplexity
    assert in_int8 != pytest.approx(loss, abs=1e-6)


def test_file_is_little_larger_than_the_weights(tmp_path, bard):
    model, tok = bard
    page.export_page(model, tok, None, tmp_path / 'bard.html')
    assert (tmp_path / 'bard.html').stat().st_size < 1.4 * model.num_params()
    again = tmp_path / 'again.html'
    page.export_page(model, tok, None, again, name='bard')
    assert again.read_bytes() == (tmp_path / 'bard.html').read_bytes()


# ---- Text and ids

PATTERNS = {
    'gpt2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    'cl100k': (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
               r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"),
    'o200k': (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
              r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+"),
}


def random_texts(seed, count):
    """Texts of characters that tokenizers treat differently."""
    rng = random.Random(seed)
    alphabet = " \n\r\t\x85\xa0\u2003\u3000\ufeff'’.,!?/-_aszTSDLlVvEeRrMmÄéßſΣσжя你のกา\u0301123٣½²Ⅷ🙂👍🏽"
    return [''.join(rng.choices(alphabet, k=rng.randint(0, 30))) for _ in range(count)]


@pytest.mark.parametrize('name', PATTERNS)
def test_words_are_cut_as_in_python(name):
    import regex
    texts = [STRANGE, *random_texts(1, 300)]
    asked = [['split', page.to_javascript(PATTERNS[name]), text] for text in texts]
    for text, words in zip(texts, ask(None, *asked)):
        assert (words or []) == regex.findall(PATTERNS[name], text), repr(text)


@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe'])
def test_same_ids_and_same_text(tmp_path, kind):
    texts = [STRANGE, '', TEXT, *random_texts(2, 40)]
    tok = make_tokenizer(kind, [*texts, STRANGE * 3, TEXT * 3], 400, ('eos', 'bos'))
    model = make_model(vocab_size=tok.vocab_size)
    rng = random.Random(3)
    ids = [rng.choices(range(tok.vocab_size), k=20) for _ in range(40)]  # not always valid UTF-8

    answers = ask(pack(tmp_path / 'payload', model, tok), *(['encode', text] for text in texts),
                  *(['decode', some] for some in ids), ['stream', ids[0]],
                  ['prompt', {'text': ''}, 10])
    n = len(texts)
    assert answers[:n] == [tok.encode(text) for text in texts]
    assert answers[n:-2] == [tok.decode(some) for some in ids]
    assert ''.join(answers[-2]) == tok.decode(ids[0])
    assert answers[-1] == {'ids': tok.encode_prompt(''), 'unknown': []}


def test_real_encoding_with_its_special_tokens(tmp_path):
    try:
        tok = make_tokenizer('cl100k_base')
    except UserError as e:
        pytest.skip(str(e))
    model = make_model(vocab_size=tok.vocab_size, n_embd=8, n_layer=1)
    texts = [STRANGE, TEXT, '<|endoftext|>', *random_texts(4, 100)]
    answers = ask(pack(tmp_path / 'payload', model, tok), *(['encode', text] for text in texts))
    assert answers == [tok.encode(text) for text in texts]


def test_unknown_characters_are_left_out_and_named(tmp_path):
    tok = make_tokenizer('char', ['abc '])
    payload = pack(tmp_path / 'payload', make_model(vocab_size=tok.vocab_size), tok)
    [answer] = ask(payload, ['prompt', {'text': 'a é🙂bé'}, 10])
    assert answer == {'ids': tok.encode('a b'), 'unknown': ['é', '🙂']}


def test_same_prompts_for_conversations(tmp_path):
    model, tok = byte_model(block_size=64)
    chat = ChatModel(model, tok, TEMPLATE)
    conversations = [
        [['you', 'Hi.']],
        [['you', 'Hi.'], ['bot', 'Hello {text}!'], ['you', 'Who are {speaker}?']],
        [['you', 'one'], ['bot', 'two'], ['you', 'three'], ['bot', 'four'], ['you', '$& five']],
        [['you', 'much too long ' * 20]],
    ]
    asked = []
    mine = []
    for turns in conversations:
        for max_new_tokens in (5, 500):
            asked.append(['prompt', {'turns': turns}, max_new_tokens])
            settings = chat.settings.__class__(max_new_tokens=max_new_tokens)
            earlier = [tuple(turn) for turn in turns[:-1]]
            mine.append(chat.encode_prompt(turns[-1][1], earlier, settings))
    answers = ask(pack(tmp_path / 'payload', model, tok, TEMPLATE), *asked)
    assert [answer['ids'] for answer in answers] == mine


# ---- The next token


@pytest.mark.parametrize('settings', [
    {}, {'temperature': 0.7}, {'top_k': 5}, {'top_p': 0.6}, {'min_p': 0.2},
    {'repetition_penalty': 1.5}, {'temperature': 1.3, 'top_k': 9, 'top_p': 0.8, 'min_p': 0.1,
                                  'repetition_penalty': 1.2},
    {'top_k': 1}, {'top_k': 1000, 'top_p': 1.0},
])
def test_same_probabilities_of_the_next_token(settings):
    torch.manual_seed(0)
    logits = torch.randn(1, 30) * 2
    seen = [3, 4, 4, 8]
    banned = [0, 7]
    expected = logits.index_fill(1, torch.tensor(banned), -torch.inf)
    if 'repetition_penalty' in settings:
        mask = torch.zeros(1, 30, dtype=torch.bool).index_fill(1, torch.tensor(seen), True)
        expected = penalize_repetition(expected, mask, settings['repetition_penalty'])
    expected, ids = sort_top_k(expected / settings.get('temperature', 1), settings.get('top_k'))
    expected = expected.softmax(-1)
    if 'top_p' in settings:
        expected = filter_top_p(expected, settings['top_p'])
    if 'min_p' in settings:
        expected = filter_min_p(expected, settings['min_p'])
    expected = torch.zeros(1, 30).scatter(1, ids, expected / expected.sum())[0]

    [answer] = ask(None, ['next', logits[0].tolist(), {'temperature': 1, **settings}, seen, banned])
    theirs = torch.zeros(30)
    theirs[answer['ids']] = torch.tensor(answer['probabilities'], dtype=torch.float)
    assert theirs.allclose(expected, atol=1e-5)


def test_seeds_repeat_and_replies_end(tmp_path):
    model, tok = byte_model()
    banned = set(tok.special_tokens.values()) - {tok.eos_id} | set(range(tok.vocab_size, 264))
    model.lm_head.weight.data[tok.eos_id] = 0  # sometimes the reply ends
    sample = {'temperature': 3, 'max_new_tokens': 200}
    answers = ask(pack(tmp_path / 'payload', model, tok, TEMPLATE),
                  *(['generate', [1, 2], {**sample, 'seed': seed}] for seed in (1, 1, 2, *range(30))))
    assert answers[0] == answers[1] != answers[2]
    for ids in answers:
        assert not banned & set(ids)
        assert tok.eos_id not in ids[:-1]
    assert any(ids[-1] == tok.eos_id for ids in answers)


def test_draws_follow_the_probabilities(tmp_path):
    model, tok = byte_model()
    settings = {'temperature': 1, 'top_k': 4, 'max_new_tokens': 1}
    look, *drawn = ask(
        pack(tmp_path / 'payload', model, tok),
        ['look', [65], {'settings': settings, 'layer': 0, 'head': 0}],
        *(['generate', [65], {**settings, 'seed': seed}] for seed in range(1000)))
    for token in look['next']:
        share = drawn.count([token['id']]) / 1000
        assert share == pytest.approx(token['probability'], abs=0.06)


def test_look_shows_where_a_head_looks(tmp_path):
    model, tok = byte_model(pos='rotary', qk_norm=True, n_kv_head=2)
    ids = list(b'Where?')
    weights = []

    def compute_weights(module, args):
        q, k, _ = module.project_self(args[0], args[3], None)
        k = k.repeat_interleave(2, dim=1)
        scores = q @ k.transpose(-2, -1) / module.head_dim ** 0.5
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        weights.append(scores.masked_fill(~mask, -torch.inf).softmax(-1))

    model.transformer.h[1].attn.register_forward_pre_hook(compute_weights)
    with torch.no_grad():
        model(torch.tensor([ids]))
    [look] = ask(pack(tmp_path / 'payload', model, tok),
                 ['look', ids, {'settings': {'temperature': 1}, 'layer': 1, 'head': 3}])
    assert [token['text'] for token in look['tokens']] == list('Where?')
    for t, row in enumerate(look['attention']):
        row = torch.tensor(row, dtype=torch.float)
        assert row.allclose(weights[0][0, 3, t, :t + 1], atol=1e-4)


# ---- What pages can't do


def test_what_a_page_cannot_run_is_refused_by_name(tmp_path):
    model, tok = byte_model()
    target = tmp_path / 'page.html'
    tiny = dict(vocab_size=tok.vocab_size, block_size=8, n_layer=1, n_head=1, n_embd=8)
    adaptive = GPT(GPTConfig(**tiny, cutoffs=(100,), tie_weights=False))
    translator = Seq2Seq(Seq2SeqConfig(**tiny))
    pieces = make_tokenizer('sentencepiece', [TEXT * 20], 300)
    for message, *args in [
        ('adaptive softmax', adaptive, tok, None, target),
        ('Seq2Seq', translator, tok, None, target),
        ('sentencepiece', model, pieces, None, target),
        ('int8 or float32', model, tok, None, target, 'int4'),
    ]:
        with pytest.raises(UserError, match=message):
            page.export_page(*args)
    pytest.importorskip('jinja2')
    with pytest.raises(UserError, match='Jinja'):
        page.export_page(model, tok, JinjaTemplate('{{ messages }}'), target)
    assert not target.exists()


def test_export_command(tmp_path):
    project = Project(tmp_path / 'project')
    out, _ = project.run('-m', 'pocket.export', f'--out_dir={BARD.parent}', '--to=bard.html')
    written = (project.root / 'bard.html').read_text(encoding='utf-8')
    assert 'bard.html' in out and '<title>bard' in written
    assert project.fails('-m', 'pocket.export', f'--out_dir={BARD.parent}', '--to=bard.html')


# ---- The page


@pytest.fixture(scope='module')
def chromium():
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    names = ('chromium', 'chromium-browser', 'google-chrome')
    paths = [path for path in map(shutil.which, names) if path]
    if not paths:
        pytest.skip('there is no chromium')
    flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
             '--disable-background-networking', '--disable-component-update', '--disable-sync']
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=paths[0], args=flags)
        yield browser
        browser.close()


class Tab:
    """A page from a file, which must ask for nothing else and complain about nothing."""

    def __init__(self, browser, path, **context):
        self.page = browser.new_context(**context).new_page()
        self.requests = []
        self.complaints = []
        self.page.on('request', lambda request: self.requests.append(request.url))
        self.page.on('console', lambda message: self.complaints.append(message.text))
        self.page.on('pageerror', lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector('#next button', timeout=10000)

    def settle(self):
        """Wait until nothing is generated, and the answer to the newest look is shown."""
        self.page.wait_for_function('!generating && seen && seen.number === looks')

    def set(self, name, value):
        self.page.evaluate('document.querySelector("details").open = true')
        self.page.fill(f'#{name}', str(value))

    def done(self):
        own = [url for url in self.requests if not url.startswith(('file:', 'blob:', 'data:'))]
        assert not own and not self.complaints
        self.page.context.close()


@pytest.mark.slow
def test_document_in_a_browser(tmp_path, chromium, bard):
    model, tok = bard
    target = tmp_path / 'bard.html'
    page.export_page(model, tok, None, target, weights='float32', start='ROMEO:\n')
    [ids] = model.generate([tok.encode('JULIET:\n')], 100, temperature=0.0)

    tab = Tab(chromium, target, viewport={'width': 390, 'height': 800})
    assert tab.page.input_value('#text') == 'ROMEO:\n'
    assert tab.page.evaluate('document.documentElement.scrollWidth') <= 390
    assert tab.page.inner_text('#tokens').split()[:2] == ['R', '30']
    tab.set('temperature', 0)
    tab.set('max_new_tokens', 100)
    tab.page.fill('#text', 'JULIET:\n')
    tab.page.press('#text', 'Enter')
    tab.settle()
    assert tab.page.input_value('#text') == tok.decode(ids)

    # Tokens have ids; a choice among the next ones is appended
    tab.page.fill('#text', 'To b')
    tab.settle()
    assert tab.page.inner_text('#tokens').split() == ['T', '32', 'o', '53', '␣', '1', 'b', '40']
    first = tab.page.locator('#next button').first
    assert re.match(r'Take e, \d+ %', first.get_attribute('aria-label'))
    first.press('Enter')
    tab.settle()
    assert tab.page.input_value('#text') == 'To be'
    assert tab.page.locator('#tokens button').last.inner_text().startswith('e')

    # Arrow keys walk through the tokens, whose attention is described
    tab.page.locator('#looks button').last.focus()
    tab.page.keyboard.press('ArrowLeft')
    tab.page.wait_for_function('document.activeElement.textContent === "b"')
    assert tab.page.inner_text('#summary').startswith('“b” looks most at')
    assert 'head 1' in tab.page.get_attribute('#map', 'aria-label')
    tab.page.select_option('#head', '2')
    tab.settle()
    assert 'head 2' in tab.page.get_attribute('#map', 'aria-label')

    # What is wrong is said
    tab.page.fill('#text', 'To é')
    tab.settle()
    assert 'é' in tab.page.inner_text('#problem')
    tab.set('top_k', 'many')
    tab.page.wait_for_function('$("problem").textContent.includes("top_k must be a whole number")')

    # A long generation can be stopped, and tried again
    tab.set('top_k', '')
    tab.set('temperature', 1)
    tab.set('max_new_tokens', 1000000)
    tab.page.click('#send')
    tab.page.wait_for_function('tail.length > 50')
    tab.page.keyboard.press('Escape')
    tab.settle()
    assert tab.page.inner_text('#status') == 'stopped'
    text = tab.page.input_value('#text')
    tab.set('max_new_tokens', 5)
    tab.page.click('#again')
    tab.settle()
    assert tab.page.input_value('#text') != text
    assert len(tab.page.input_value('#text')) == len('To é') + 5
    tab.done()


def test_conversation_in_a_browser(tmp_path, chromium):
    model, tok = byte_model(block_size=64)
    target = tmp_path / 'bot.html'
    links = [('Bard', 'bard.html'), ('Code', page.CODE)]
    page.export_page(model, tok, TEMPLATE, target, weights='float32', links=links, about='A bot.',
                     examples=['Hi.'], settings={'temperature': 0.5})
    chat = ChatModel(model, tok, TEMPLATE, temperature=0.0, top_k=None, max_new_tokens=12)
    replied = [chat('Hi.').strip()]
    replied.append(chat('Bye.', turns=[('you', 'Hi.'), ('bot', replied[0])]).strip())

    tab = Tab(chromium, target, color_scheme='dark')
    assert tab.page.get_attribute('#links a', 'href') == 'bard.html'  # the only one, from a file
    assert tab.page.inner_text('#hello') == 'A bot.'
    assert tab.page.input_value('#temperature') == '0.5'
    tab.set('temperature', 0)
    tab.set('max_new_tokens', 12)
    tab.page.click('#examples button')
    tab.settle()
    assert not tab.page.is_visible('#examples')
    tab.page.fill('#text', 'Bye.')
    tab.page.click('#send')
    tab.settle()
    shown = tab.page.locator('#log li span').all_text_contents()
    assert [text.strip() for text in shown] == ['Hi.', replied[0], 'Bye.', replied[1]]

    # A token that is taken begins the reply, which can be continued
    tab.page.fill('#text', 'So?')
    tab.settle()
    tab.page.locator('#next button').nth(1).click()
    tab.settle()
    assert tab.page.evaluate('tail.length') == 1 and tab.page.input_value('#text') == ''
    assert tab.page.inner_text('#send') == 'Continue'
    tab.page.click('#send')
    tab.settle()
    assert 1 < tab.page.evaluate('tail.length') <= 13
    tab.page.click('#new')
    assert tab.page.locator('#log li').count() == 0
    tab.page.click('#undo')
    assert tab.page.locator('#log li').count() == 6
    tab.done()


def test_the_command_for_our_own_pages_takes_no_options(project):
    """Whoever names a run there would find the pages in docs/ written anew instead."""
    assert 'python -m pocket.export' in project.fails('-m', 'pocket.page', '--out_dir=out/toy')
    assert not (project.root / 'docs').exists()
