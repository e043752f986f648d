"""
sample.py --web: what its server answers and refuses, and the page in a real browser. OpenAI's API
has tests of its own: test_api.py.

    pytest -n 0 tests/test_server.py                                    the browser tests need chromium and playwright
    CHAT_PNG=docs/chat.png CHAT_MODEL=smollm2 pytest -n 0 tests/test_server.py -k picture     draws README's picture
"""
import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import threading
import time

import pytest
import requests
from conftest import CHECKOUT, TINY, Project, make_pairs

from pocket import chat
from pocket.errors import UserError

pytest.importorskip('uvicorn', reason='pip install uvicorn')
pytest.importorskip('starlette', reason='pip install starlette')

from pocket import server as server_module

SHORT = {'max_new_tokens': 30}
POSIX_ONLY = pytest.mark.skipif(os.name == 'nt', reason='signals and shell scripts of POSIX')


@contextlib.contextmanager
def serving(project, *args, env=None):
    """A running `sample.py --web`, as a process with the attribute url."""
    env = {'BROWSER': 'true', **(env or {})}
    process = project.start('sample.py', '--web', '--port=0', '--device=cpu', *args, env=env)
    line = process.stdout.readline()
    assert ' is at http://127.0.0.1:' in line, line + process.stderr.read()
    process.url = re.search(r'http://\S+/', line)[0]
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)


@pytest.fixture(scope='module')
def server(trained):
    with serving(trained) as process:
        yield process


def wait_until(condition, seconds=10):
    """Wait until condition() is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'it never came to that'
        time.sleep(0.05)


def ask(server, text=None, headers=None, **request):
    """POST /generate; returns the events of the answer. text None: the settings are only checked."""
    request = {'settings': SHORT, **request}
    if text is not None:
        request['text'] = text
    answer = requests.post(server.url + 'generate', data=json.dumps(request), headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def generated(events):
    """The text of a generation that came to its end."""
    *pieces, end = events
    assert end == {'end': True}
    assert all(piece.keys() == {'text'} for piece in pieces)
    return ''.join(piece['text'] for piece in pieces)


# ---- Answers


def test_server_generates_what_sample_py_prints(trained, server):
    out, _ = trained.run('sample.py', '--start=ba', '--max_new_tokens=30', '--device=cpu')
    events = ask(server, 'ba', settings={**SHORT, 'seed': 1337})
    assert 'ba' + generated(events) + '\n' == out
    assert len(events) > 20     # it comes in pieces


def test_settings_of_a_request_are_used(server):
    greedy = generated(ask(server, 'ba', settings={**SHORT, 'temperature': '0'}))
    top_1 = generated(ask(server, 'ba', settings={**SHORT, 'top_k': 1}))
    assert greedy == top_1
    assert len(generated(ask(server, 'ba', settings={'max_new_tokens': '5', 'num_beams': 2}))) == 5


def test_right_settings_are_accepted(server):
    assert ask(server, settings={'temperature': '0.5', 'top_k': 'None', 'top_p': None, 'seed': '5'}) == [{}]


@pytest.mark.parametrize('settings, message', [
    ({'temperature': 'warm'}, "temperature must be a number, got 'warm'; it stays 0.8"),
    ({'temperature': -1}, 'temperature must be 0'),
    ({'temperature': float('inf')}, 'temperature must be'),
    ({'temperature': float('nan')}, 'temperature must be'),
    ({'top_p': 7}, 'top_p must be'),
    ({'top_k': [1]}, 'top_k must be'),
    ({'max_new_tokens': 0}, 'from 1 to'),
    ({'max_new_tokens': 2**45}, 'from 1 to'),
    ({'max_new_tokens': 100_001}, 'from 1 to 100,000 here'),
    ({'num_beams': 17}, 'from 1 to 16 here'),
    ({'drop_unknown': 'maybe'}, 'drop_unknown must be True or False'),
    ({'drop_unknown': [1]}, 'drop_unknown must be True or False'),
    ({'num_beams': 2, 'length_penalty': 1e9}, 'from -10 to 10'),
    ({'num_beams': 2, 'top_k': 5}, 'num_beams=2 searches'),
    ({'heat': 1}, "unknown setting 'heat'"),
    ({'seed': 'x'}, 'seed must be'),
    ({'seed': 2**64}, 'seed must be'),
])
def test_wrong_setting_is_explained(server, settings, message):
    for text in (None, 'ba'):   # when it is chosen, and when it is used
        event, = ask(server, text, settings=settings)
        assert message in event['error']


def test_unknown_character_is_explained(server):
    event, = ask(server, 'ba ß')
    assert "does not know 'ß' (U+00DF)" in event['error']
    assert 'drop_unknown' in event['error'] and '--' not in event['error']   # a page has no options

    without = generated(ask(server, 'ba ß', settings={**SHORT, 'seed': 1, 'drop_unknown': 'true'}))
    assert without == generated(ask(server, 'ba ', settings={**SHORT, 'seed': 1}))
    event, = ask(server, 'ba ß')    # it was for that request alone
    assert 'error' in event


# ---- Refusals


@pytest.mark.parametrize('body', [
    b'', b'{"settings": ', b'[]', b'7', b'{}', b'\xff', b'[' * 100_000,
    b'{"settings": 5}',
    b'{"settings": {}, "text": 5}',
    b'{"settings": {}, "text": null}',
    b'{"settings": {}, "text": "\\ud800"}',
    b'{"settings": {}, "text": "a", "turns": ["long"]}',
    b'{"settings": {}, "text": "a", "turns": [["you", 3]]}',
    b'{"settings": {}, "text": "a", "user": 3}',
])
def test_malformed_request_is_refused(server, body):
    answer = requests.post(server.url + 'generate', data=body, timeout=10)
    assert answer.status_code == 400
    assert 'expected {"settings"' in answer.text


def test_long_request_is_refused(server):
    url = server.url + 'generate'
    assert requests.post(url, data=b' ' * 2**21, timeout=10).status_code == 413
    of_unknown_length = iter([b' '])    # sent in chunks
    assert requests.post(url, data=of_unknown_length, timeout=10).status_code == 413


@pytest.mark.parametrize('headers', [
    {'Host': 'evil.example'},
    {'Host': 'evil.example:8000'},
    {'Host': '127.0.0.1.evil.example'},
    {'Host': ''},
    {'Origin': 'http://evil.example'},
    {'Origin': 'null'},
    {'Origin': 'http://127.0.0.1:1'},
    {'Host': 'localhost', 'Origin': 'http://127.0.0.1'},
])
def test_other_pages_are_refused(server, headers):
    page = requests.get(server.url, headers=headers, timeout=10)
    answer = requests.post(server.url + 'generate', json={'settings': {}}, headers=headers, timeout=10)
    for refusal in (page, answer):
        assert refusal.status_code == 403
        assert 'refused' in refusal.text and 'model' not in refusal.text


def test_own_page_is_answered_under_all_its_names(server):
    port = server.url.split(':')[2].strip('/')
    for host in ('localhost', '127.0.0.1', '[::1]', '192.168.1.5'):
        assert ask(server, headers={'Host': f'{host}:{port}', 'Origin': f'http://{host}:{port}'}) == [{}]
    assert requests.get(server.url + 'generate', timeout=10).status_code == 405


def test_page_holds_the_settings_and_loads_nothing_else(server):
    page = requests.get(server.url, timeout=10)
    assert '"settings": {"temperature": 0.8' in page.text
    policy = page.headers['Content-Security-Policy']
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert not re.search(r'(src|href)="(?!data:)', page.text)


def test_requests_need_the_key(trained):
    with serving(trained, '--api_key=sesame') as process:
        page = requests.get(process.url, timeout=10)
        assert page.status_code == 200 and 'toy' not in page.text   # it tells nothing

        right = {'Authorization': 'Bearer sesame'}
        wrong = [{}, {'Authorization': 'Bearer sesam'}, {'Authorization': 'sesame'},
                 {'Authorization': 'Basic sesame'}, {'Authorization': 'Bearer schlüssel'.encode()}]
        for headers in wrong:
            for path in ('data', 'v1/models'):
                assert requests.get(process.url + path, headers=headers, timeout=10).status_code == 401
            for path in ('generate', 'v1/completions'):
                answer = requests.post(process.url + path, json={'settings': {}}, headers=headers, timeout=10)
                assert answer.status_code == 401
        assert ask(process, headers=right) == [{}]
        assert requests.get(process.url + 'data', headers=right, timeout=10).json()['title'] == 'toy'
        evil = {**right, 'Origin': 'http://evil.example'}
        assert requests.get(process.url + 'data', headers=evil, timeout=10).status_code == 403


# ---- One generation at a time, and its end


class SlowServer:
    """A ChatServer in this process, whose model counts its steps, and takes them only while `go` is set."""

    def __init__(self, trained):
        self.pause = 0
        self.steps = 0
        self.go = threading.Event()
        chat_model = chat.load(trained.root / 'out' / 'toy', device='cpu')
        chat_model.model.lm_head.register_forward_pre_hook(self.step)   # called once per step
        self.sock = server_module.listen('127.0.0.1', 0)
        self.url = server_module.url_of(self.sock)
        self.server = server_module.ChatServer(chat_model, self.sock, '127.0.0.1')
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    def step(self, *_):
        self.steps += 1
        assert self.go.wait(20)
        time.sleep(self.pause)

    def ask(self, **settings):
        """An open connection, and its answer, of which nothing is read yet."""
        connection = http.client.HTTPConnection(*self.sock.getsockname())
        connection.request('POST', '/generate', json.dumps({'text': 'ba', 'settings': settings}))
        return connection, connection.getresponse()

    def steps_when_idle(self):
        """Wait until nothing is generated and no request waits; returns how many steps were taken by then."""
        wait_until(self.server.stopped.is_set)
        self.go.set()
        self.server.thread.submit(int).result(20)   # once the thread does this, it has ended the generation
        return self.steps


@pytest.fixture
def slow(trained, monkeypatch):
    monkeypatch.setenv('BROWSER', 'true')
    slow = SlowServer(trained)
    yield slow
    slow.go.set()
    slow.server.server.should_exit = True
    slow.thread.join(10)
    assert not slow.thread.is_alive()


@pytest.mark.parametrize('settings', [{'max_new_tokens': 100_000}, {'max_new_tokens': 15, 'num_beams': 2}])
def test_generation_ends_when_its_connection_is_closed(slow, settings):
    connection, answer = slow.ask(**settings)
    wait_until(lambda: slow.steps)      # it is in the middle of the first step
    answer.close()
    connection.close()
    assert slow.steps_when_idle() <= 2

    _, answer = slow.ask(max_new_tokens=2)
    assert answer.read().splitlines()[-1] == b'{"end": true}'   # it serves on


def test_one_generation_at_a_time(slow):
    slow.go.set()
    connection, first = slow.ask(max_new_tokens=100_000)
    first.readline()
    impatient_connection, impatient = slow.ask(max_new_tokens=3)
    _, patient = slow.ask(max_new_tokens=3)
    assert impatient.readline() == b'{"wait": true}\n'
    assert patient.readline() == b'{"wait": true}\n'
    impatient_connection.close()    # a request that waits may give up
    impatient.close()
    assert b'text' in first.readline()
    connection.close()
    first.close()
    assert json.loads(patient.read().splitlines()[-1]) == {'end': True}


# ---- Clients that are slow, and a machine that is too small


@pytest.fixture
def impatient(monkeypatch):
    """The server disconnects whoever keeps it waiting for a quarter of a second."""
    monkeypatch.setattr(server_module, 'SLOW_CLIENT_SECONDS', 0.25)


def connect(slow):
    """A connection to the server, as a socket whose buffer for what it does not read is small."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.settimeout(10)
    sock.connect(slow.sock.getsockname())
    return sock


HEADERS = b'POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n'


@pytest.mark.parametrize('sent, answer', [
    (b'', b''),
    (b'POST /gen', b''),
    (HEADERS[:-2], b''),
    (HEADERS + b'{"settings"', b'HTTP/1.1 408'),
])
def test_slow_client_is_disconnected(impatient, slow, capfd, sent, answer):
    with connect(slow) as sock:
        sock.sendall(sent)
        try:
            received = sock.makefile('rb').read()
        except ConnectionResetError:
            received = b''
        assert received.startswith(answer) and bool(received) == bool(answer)
    assert capfd.readouterr().err == ''


def test_client_that_leaves_in_the_middle_of_its_request(slow, capfd):
    for sent in (HEADERS[:30], HEADERS, HEADERS + b'{"settings"'):
        with connect(slow) as sock:
            sock.sendall(sent)
    slow.go.set()
    assert slow.ask(max_new_tokens=2)[1].read().endswith(b'{"end": true}\n')
    assert capfd.readouterr().err == ''


def test_client_that_never_reads_does_not_block_others(impatient, slow, monkeypatch):
    monkeypatch.setattr(server_module, 'MAX_UNREAD', 5)

    async def read_one_and_ignore_the_other():
        ignored = slow.server.events('a' for _ in range(10**9))   # it would never end
        assert await anext(ignored) == {'text': 'a'}
        events = [event async for event in slow.server.events(iter('bc'))]
        await ignored.aclose()
        return events

    events = asyncio.run(asyncio.wait_for(read_one_and_ignore_the_other(), 20))
    assert events == [{'wait': True}, {'text': 'b'}, {'text': 'c'}, {'end': True}]


def test_client_that_never_reads_is_disconnected(impatient, slow, monkeypatch):
    monkeypatch.setattr(server_module, 'SEND_BUFFER_BYTES', 2048)
    slow.go.set()
    body = json.dumps({'text': 'ba', 'settings': {'max_new_tokens': 100_000}}).encode()
    with connect(slow) as sock:
        sock.sendall(HEADERS.replace(b'1000', str(len(body)).encode()) + body)
        wait_until(lambda: slow.steps)
        assert slow.ask(max_new_tokens=3)[1].read().endswith(b'{"end": true}\n')
        assert slow.steps < 50_000


def test_too_many_waiting_requests_are_refused(slow, monkeypatch):
    monkeypatch.setattr(server_module, 'MAX_WAITING', 1)
    connections = [slow.ask(max_new_tokens=2)]
    wait_until(lambda: slow.steps)
    connections.append(slow.ask(max_new_tokens=2))
    assert connections[1][1].readline() == b'{"wait": true}\n'
    _, answer = slow.ask(max_new_tokens=2)
    assert answer.status == 503 and b'try again later' in answer.read()
    slow.go.set()
    for _, answer in connections:
        assert answer.read().endswith(b'{"end": true}\n')


@pytest.mark.parametrize('error, sentence, traceback', [
    (MemoryError(), 'out of memory', False),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 'out of memory', False),
    (RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB'), 'out of memory', False),
    (ZeroDivisionError('oh'), 'the model failed', True),
])
def test_failing_model_is_one_sentence_and_the_server_lives_on(slow, capfd, error, sentence, traceback):
    def fail(*_):
        raise error

    slow.go.set()
    hook = slow.server.chat_model.model.lm_head.register_forward_pre_hook(fail)
    event = json.loads(slow.ask()[1].read())
    assert sentence in event['error'] and event.keys() == {'error'}
    hook.remove()
    assert slow.ask(max_new_tokens=2)[1].read().endswith(b'{"end": true}\n')
    assert ('Traceback' in capfd.readouterr().err) == traceback


# ---- The process


@POSIX_ONLY
@pytest.mark.parametrize('busy', [False, True])
def test_ctrl_c_ends_the_server(trained, busy):
    with serving(trained) as process:
        if busy:
            request = {'text': 'ba', 'settings': {'max_new_tokens': 100_000}}
            answer = requests.post(process.url + 'generate', json=request, stream=True, timeout=10)
            next(answer.iter_lines())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode in (0, 130)
    assert 'Traceback' not in err and len(err.strip().splitlines()) <= 1


def test_port_that_cannot_be_had(trained, server):
    port = server.url.split(':')[2].strip('/')
    err = trained.fails('sample.py', '--web', f'--port={port}')
    assert f'cannot listen on port {port}' in err and '--port=' in err
    assert 'cannot listen on port 99999' in trained.fails('sample.py', '--web', '--port=99999')


def test_server_that_others_can_reach_wants_a_key(trained):
    for host in ('127.0.0.1', 'localhost'):
        server_module.listen(host, 0).close()
    server_module.listen('0.0.0.0', 0, api_key='sesame').close()
    err = trained.fails('sample.py', '--web', '--port=0', '--host=0.0.0.0')
    advice = re.search(r'--api_key=(\w{16,})', err)
    assert advice and '--host=0.0.0.0' in err
    server_module.listen('0.0.0.0', 0, api_key=advice[1]).close()


@pytest.mark.parametrize('key', ['', 'open sesame', 'schlüssel', 'a\nb'])
def test_key_that_no_header_can_carry(key):
    with pytest.raises(UserError, match='--api_key'):
        server_module.listen('127.0.0.1', 0, api_key=key)


@pytest.mark.parametrize('option', ['--host=127.0.0.1', '--port=8000', '--api_key=sesame'])
def test_options_of_the_page_need_the_page(trained, option):
    assert 'add --web' in trained.fails('sample.py', option)


def test_missing_packages_are_named(project):
    (project.root / 'uvicorn.py').write_text('raise ImportError', encoding='utf-8')
    assert 'pip install starlette uvicorn' in project.fails('sample.py', '--web')


@POSIX_ONLY
def test_page_is_opened_in_a_browser(trained, tmp_path):
    visited = tmp_path / 'visited'
    browser = tmp_path / 'browser'
    browser.write_text(f'#!/bin/sh\necho "$1" > {visited}.tmp && mv {visited}.tmp {visited}', encoding='utf-8')
    browser.chmod(0o755)
    with serving(trained, env={'BROWSER': f'{browser} %s'}) as process:
        wait_until(visited.exists)
        assert visited.read_text().strip() == process.url


# ---- Conversations


@pytest.fixture(scope='module')
def chatty(tmp_path_factory):
    """A project with a model of conversations, out/talk."""
    p = Project(tmp_path_factory.mktemp('chatty'))
    make_pairs(p.root)
    not_for_pairs = ('--dataset', '--batch_size', '--block_size')
    args = [option for option in TINY if not option.startswith(not_for_pairs)]
    p.run('train.py', *args, '--dataset=talk', '--arch=seq2seq', '--block_size=40', '--src_block_size=60',
          '--batch_tokens=300', '--out_dir=out/talk')
    return p


def test_server_replies_what_a_chat_model_replies(chatty):
    here = chat.load(chatty.root / 'out' / 'talk', device='cpu')
    turns = [['U', 'ba dodo'], ['B', 'dodo.']]
    settings = {**SHORT, 'temperature': 1.5, 'seed': 5}
    with serving(chatty, '--out_dir=out/talk', '--seed=5') as process:
        for more in ({}, {'turns': turns}, {'turns': turns, 'user': 'B'}):
            reply = generated(ask(process, 'kilo', settings=settings, **more))
            assert reply == ''.join(here.stream('kilo', **more, **settings))

        event, = ask(process, 'kilo', turns=[['U', 'ß'], ['B', 'ba']])
        assert "does not know 'ß'" in event['error']


# ---- The page


@pytest.fixture(scope='module')
def chromium():
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    names = ('chromium', 'chromium-browser', 'google-chrome')
    paths = [path for path in map(shutil.which, names) if path]
    if not paths:
        pytest.skip(f'no browser: there is none of {", ".join(names)}')
    flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
             '--disable-background-networking', '--disable-component-update', '--disable-sync']
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=paths[0], args=flags)
        yield browser
        browser.close()


class Tab:
    """A page in a browser; it remembers everything that the page requests or complains about."""

    def __init__(self, browser, url, **context):
        self.url = url.split('#')[0]
        self.requests = []
        self.complaints = []
        self.page = browser.new_context(**context).new_page()
        self.page.set_default_timeout(20_000)
        self.page.on('request', lambda request: self.requests.append(request.url))
        self.page.on('console', lambda message: self.complaints.append(message.text))
        self.page.on('pageerror', lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def text(self):
        """What is in the editor."""
        return self.page.input_value('#text')

    def turns(self):
        """The turns of the conversation, as they are shown."""
        return self.page.locator('#log li').all_inner_texts()

    def wait_for(self, expression):
        """The value of a JavaScript expression, once it is true. Playwright's own way conflicts with the page's policy."""
        for _ in range(600):
            value = self.page.evaluate(expression)
            if value:
                return value
            time.sleep(0.05)
        raise TimeoutError(expression)

    def set(self, name, value):
        """Type a setting, and wait until the server has checked it."""
        with self.page.expect_response('**/generate'):
            self.page.fill(f'#{name}', value)
            self.page.keyboard.press('Enter')

    def close(self):
        assert self.complaints == []
        server = self.url.partition('#')[0]
        assert all(url.startswith(server) for url in self.requests), self.requests
        self.page.context.close()


def test_document_in_a_browser(chromium, trained):
    with serving(trained) as process:
        tab = Tab(chromium, process.url)
        page = tab.page
        assert page.inner_text('h1') == 'toy' and 'M parameters' in page.inner_text('header')

        # Enter generates
        tab.set('max_new_tokens', '40')
        page.fill('#text', 'ba ')
        page.press('#text', 'Enter')
        page.wait_for_selector('#again')
        once = tab.text()
        assert len(once) == 43 and once.startswith('ba ')
        assert page.locator('#words .mine').inner_text() == 'ba '

        # Shift+Enter starts a new line, the button generates
        page.press('#text', 'Control+End')
        page.press('#text', 'Shift+Enter')
        assert tab.text() == once + '\n'
        page.click('#send')
        page.wait_for_selector('#again')
        twice = tab.text()
        assert len(twice) == 84 and twice.startswith(once + '\n')

        # Try again replaces what was generated last
        page.click('#again')
        page.wait_for_selector('#stop', state='hidden')
        assert len(tab.text()) == 84 and tab.text().startswith(once + '\n')
        assert tab.text() != twice

        # Settings
        tab.set('temperature', 'warm')
        page.wait_for_selector('.bad')
        assert page.inner_text('.bad small') == "temperature must be a number, got 'warm'; it stays 0.8"
        assert page.input_value('#temperature') == '0.8'
        tab.set('temperature', '0')
        page.wait_for_selector('.bad', state='detached')
        tab.set('num_beams', '2')
        page.wait_for_selector('#temperature:disabled')
        page.click('text=greedy')
        tab.wait_for('document.getElementById("num_beams").value === "1"')

        # One live region, and it says what was wrong with a setting
        assert page.locator('[role=status], [role=alert], [role=log], [aria-live]').count() == 1
        tab.set('top_p', '7')
        page.wait_for_selector('.bad')
        assert 'top_p must be' in page.inner_text('[role=status]')

        # A reload keeps text and settings
        kept = tab.text()
        page.reload()
        assert tab.text() == kept and page.locator('#words').inner_text().strip() == kept.strip()
        assert page.input_value('#temperature') == '0'

        # New text; what is typed is never HTML, and is kept if the model cannot read it
        page.click('#new')
        assert tab.text() == '' and not page.locator('#words .mine').count()
        page.fill('#text', '<b>ß</b>')
        page.click('#send')
        page.wait_for_selector('#error:not(:empty)')
        assert 'does not know' in page.inner_text('#error')
        assert tab.text() == '<b>ß</b>' and not page.locator('#words b').count()

        # What it cannot read can be left out
        with page.expect_response('**/generate'):
            page.check('#drop_unknown')
        page.fill('#text', 'baß')
        page.click('#send')
        page.wait_for_selector('#again')
        assert tab.text().startswith('baß') and len(tab.text()) == 43
        tab.close()


MARKDOWN = """# A *title*
Some **bold <i>text</i>**, `code <b>`, _italics_, snake_case_name and 2 * 3 * 4.
Next line. <img src=x onerror="document.title = 'gotcha'"> <script>document.title = 'gotcha'</script>

1. one
2. two with [a link](https://example.com/a)
   - nested [not one](javascript:document.title='gotcha')

```html
<b>*as it is*</b>
```
> quoted

| a | b |
|---|:-:|
| c | **d** |

**unfinished `as long as it is generated"""


def test_replies_are_markdown_but_never_html(chromium, chatty):
    with serving(chatty, '--out_dir=out/talk') as process:
        tab = Tab(chromium, process.url)
        page = tab.page
        page.evaluate("""text => {
            items = [{mine: true, name: 'U', text}, {mine: false, name: 'B', text}]
            show()
        }""", MARKDOWN)

        mine, reply = page.locator('#log > li .said').all()
        assert mine.text_content() == MARKDOWN      # what a person says stays as it is
        assert not mine.locator('*').count()
        assert not page.locator('#log :is(i, img, script)').count() and page.title() == 'talk'

        def texts(selector):
            return reply.locator(selector).all_text_contents()

        assert texts('h3') == ['A title'] and texts('h3 em') == ['title']
        assert texts('p strong') == ['bold <i>text</i>']
        assert texts('p code') == ['code <b>'] and texts('p em') == ['italics']
        assert 'snake_case_name and 2 * 3 * 4.\nNext line. <img src=x' in texts('p')[0]
        assert texts('ol li') == ['one', 'two with a link']
        assert texts('ul.nested li') == ["nested [not one](javascript:document.title='gotcha')"]
        links = reply.locator('a').all()
        assert [link.get_attribute('href') for link in links] == ['https://example.com/a']
        assert links[0].get_attribute('rel') == 'noopener noreferrer'
        assert texts('pre code') == ['<b>*as it is*</b>'] and texts('blockquote') == ['quoted']
        assert texts('th') == ['a', 'b'] and texts('td') == ['c', 'd'] and texts('td strong') == ['d']
        assert texts('p')[-1] == '**unfinished `as long as it is generated'

        # Nothing that a model repeats for ever makes the page slow
        for piece in ('*', '**a ', '`', '_a', '[', '[a](https://a', '|', '- ', '#', '> ', '| ', '-|', ' ', '1. \n'):
            text = (piece * 20_000)[:20_000]
            milliseconds = page.evaluate("""text => {
                const before = performance.now()
                const shown = make('div', '')
                shown.append(...markdown(text))
                return performance.now() - before
            }""", text)
            assert milliseconds < 3000, piece
        tab.close()


def test_examples_new_chat_and_undo_in_a_browser(chromium, chatty, monkeypatch):
    with serving(chatty, '--out_dir=out/talk', '--max_new_tokens=5') as process:
        tab = Tab(chromium, process.url, viewport={'width': 380, 'height': 600})
        page = tab.page

        # Its tokenizer knows none of the examples; so here is one
        assert not page.locator('#examples button').count()
        page.evaluate("model.examples = ['kilo ba']; makeExamples()")
        page.click('#examples button')
        page.wait_for_selector('#again')
        turns = tab.turns()
        assert turns[0] == 'U\nkilo ba' and len(turns) == 2 and page.is_hidden('#hello')

        # A new chat can be undone, until something is said in it
        page.fill('#text', 'draft')
        page.click('#new')
        assert tab.turns() == [] and page.is_visible('#hello')
        page.click('#undo')
        assert tab.turns() == turns and tab.text() == 'draft' and page.is_hidden('#undo')
        page.click('#new')
        page.fill('#text', 'ba')
        page.press('#text', 'Enter')
        page.wait_for_selector('#again')
        assert page.is_hidden('#undo') and len(tab.turns()) == 2

        # On a phone the settings cover the page, and can be closed
        assert page.is_hidden('#settings')
        page.click('#tune')
        assert page.is_visible('#temperature')
        page.click('#close')
        assert page.is_hidden('#settings')
        page.click('#tune')
        page.keyboard.press('Escape')
        assert page.is_hidden('#settings') and page.get_attribute('#tune', 'aria-expanded') == 'false'

        # The placeholder fits; who types sees a ring
        page.click('#new')
        page.fill('#text', '')
        assert page.evaluate('words.scrollWidth <= words.clientWidth')
        assert page.evaluate("getComputedStyle(words, '::before').content") == '"Say something"'
        page.focus('#text')
        assert page.evaluate("getComputedStyle(document.getElementById('editor')).outlineStyle") == 'solid'
        tab.close()


def test_page_asks_for_the_key(chromium, trained):
    with serving(trained, '--api_key=open&sesame', '--max_new_tokens=5') as process:
        tab = Tab(chromium, process.url)
        page = tab.page
        page.wait_for_selector('#lock:not([hidden])')
        for key in ('schlüssel', 'open'):
            page.fill('#key', key)
            page.press('#key', 'Enter')
            page.wait_for_selector('#lock_error:not(:empty)')
        page.fill('#key', 'open&sesame')
        page.click('#unlock')
        tab.wait_for('model && document.getElementById("lock").hidden')
        assert page.inner_text('h1') == 'toy'
        page.fill('#text', 'ba')
        page.click('#send')
        page.wait_for_selector('#again')
        page.reload()       # the tab remembers the key
        tab.wait_for('model && document.getElementById("lock").hidden')
        tab.complaints = [text for text in tab.complaints if '401' not in text]
        tab.close()

        # As sample.py prints it
        tab = Tab(chromium, process.url + '#key=open%26sesame')
        tab.wait_for('model && document.getElementById("lock").hidden')
        assert tab.page.url == process.url      # nobody can read it there
        tab.close()


def test_text_grows_and_stops_in_a_browser(chromium, slow):
    slow.pause = 0.02   # about as fast as a model of some size
    slow.go.set()
    tab = Tab(chromium, slow.url)
    tab.set('max_new_tokens', '100000')
    tab.page.click('#send')
    length = 0
    for _ in range(3):      # it grows while it is generated
        length = tab.wait_for(f'({length + 1} < words.textContent.length) && words.textContent.length')
    tab.page.keyboard.press('Escape')
    tab.page.wait_for_selector('#stop', state='hidden')
    steps = slow.steps_when_idle()
    time.sleep(0.2)
    assert slow.steps == steps
    assert length <= len(tab.text()) + 1 <= steps + 2
    tab.close()


def test_conversation_in_a_browser(chromium, chatty):
    with serving(chatty, '--out_dir=out/talk', '--max_new_tokens=20', '--start=gimme') as process:
        tab = Tab(chromium, process.url, viewport={'width': 380, 'height': 600}, color_scheme='dark')
        page = tab.page
        assert tab.text() == 'gimme' and page.is_hidden('#settings')

        # Two turns and their replies
        page.press('#text', 'Enter')
        page.wait_for_selector('#again')
        page.fill('#text', 'kilo')
        page.click('#send')
        tab.wait_for('document.querySelectorAll("#log li").length === 4')
        page.wait_for_selector('#again')
        turns = tab.turns()
        assert turns[0] == 'U\ngimme' and turns[2] == 'U\nkilo' and turns[1].startswith('B\n')
        assert tab.text() == ''

        # What the model cannot read comes back, to be corrected
        page.fill('#text', 'ß')
        page.click('#send')
        page.wait_for_selector('#error:not(:empty)')
        assert tab.turns() == turns and tab.text() == 'ß'

        # A reload keeps the conversation; nothing is wider than the screen
        page.reload()
        assert tab.turns() == turns
        assert page.evaluate('document.documentElement.scrollWidth') == 380

        # The server is gone
        process.kill()
        process.wait(10)
        page.fill('#text', 'ba')
        page.click('#send')
        page.wait_for_selector('#error:not(:empty)')
        assert 'does not answer' in page.inner_text('#error') and tab.turns() == turns
        page.click('#new')
        assert tab.turns() == []
        tab.complaints = [text for text in tab.complaints if 'ERR_CONNECTION' not in text]
        tab.close()


@pytest.mark.skipif('CHAT_PNG' not in os.environ, reason="draws README's picture: see the top of this file")
def test_picture_for_the_readme(chromium, tmp_path):
    options = [f'--init_from={os.environ["CHAT_MODEL"]}', '--temperature=0.3',
               '--repetition_penalty=1.1', '--max_new_tokens=120']
    with serving(Project(tmp_path), *options) as process:
        tab = Tab(chromium, process.url, viewport={'width': 920, 'height': 640})
        for question in ('What is the capital of France?', 'Write a Python function that adds two numbers.'):
            tab.page.fill('#text', question)
            tab.page.click('#send')
            tab.page.wait_for_selector('#again', timeout=120_000)
        tab.page.screenshot(path=CHECKOUT / os.environ['CHAT_PNG'])
        tab.close()
