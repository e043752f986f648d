"""sample.py --web: what its server answers and refuses, and the page in a real browser."""
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import threading
import time

import pytest
import requests
from conftest import CHECKOUT, TINY, Project, make_pairs

from pocket import chat
from pocket import server as server_module

pytest.importorskip('uvicorn', reason='pip install uvicorn')
pytest.importorskip('starlette', reason='pip install starlette')

SHORT = {'max_new_tokens': 30}
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@contextlib.contextmanager
def serving(project, *args, env=()):
    """A running `sample.py --web`, as a Process with .url."""
    process = project.start('sample.py', '--web', '--port=0', '--device=cpu', *args, env={'BROWSER': 'true', **dict(env)})
    said = process.stdout.readline()
    assert ' is at http://127.0.0.1:' in said, said + process.stderr.read()
    process.url = re.search(r'http://\S+/', said)[0]
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


def until(true, tries=200):
    for _ in range(tries):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError('it never came to that')


def ask(server, text=None, headers=None, **asked):
    """The events that a request is answered with."""
    asked = {'settings': SHORT, **({} if text is None else {'text': text}), **asked}
    answer = requests.post(server.url + 'write', data=json.dumps(asked), headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def written(events):
    assert events[-1] == {'end': True} and all(event.keys() == {'text'} for event in events[:-1])
    return ''.join(event['text'] for event in events[:-1])


def test_writes_what_sample_py_writes(trained, server):
    out, _ = trained.run('sample.py', '--start=ba', '--max_new_tokens=30', '--device=cpu')
    events = ask(server, 'ba', settings={**SHORT, 'seed': 1337})
    assert 'ba' + written(events) + '\n' == out and len(events) > 20
    assert written(ask(server, 'ba', settings={**SHORT, 'temperature': '0'})) == written(ask(server, 'ba', settings={**SHORT, 'top_k': 1}))
    assert len(written(ask(server, 'ba', settings={'max_new_tokens': '5', 'num_beams': 2}))) == 5


@pytest.mark.parametrize('settings, said', [
    ({'temperature': 'warm'}, "temperature must be a number, got 'warm'; it stays 0.8"), ({'temperature': -1}, 'temperature must be 0'), ({'top_p': 7}, 'top_p must be'),
    ({'max_new_tokens': 0}, 'from 1 to'), ({'max_new_tokens': 2**45}, 'from 1 to'), ({'temperature': float('inf')}, 'temperature must be'),
        ({'num_beams': 2, 'length_penalty': 1e9}, 'from -10 to 10'), ({'num_beams': 2, 'top_k': 5}, 'num_beams=2 searches'), ({'heat': 1}, "unknown setting 'heat'"),
    ({'top_k': [1]}, 'top_k must be'), ({'temperature': float('nan')}, 'temperature must be'), ({'seed': 'x'}, 'seed must be'), ({'seed': 2**64}, 'seed must be')])
def test_wrong_settings_are_explained(server, settings, said):
    for text in (None, 'ba'):  # when they are chosen, and when they are used
        event, = ask(server, text, settings=settings)
        assert said in event['error']


def test_right_settings_and_unknown_characters(server):
    assert ask(server, settings={'temperature': '0.5', 'top_k': 'None', 'top_p': None, 'seed': '5'}) == [{}]
    event, = ask(server, 'ba ß')
    assert "does not know 'ß' (U+00DF)" in event['error']


@pytest.mark.parametrize('body', [
    b'{"settings": ', b'[]', b'7', b'{}', b'{"settings": 5}', b'{"settings": {}, "text": 5}', b'{"settings": {}, "text": "a", "turns": ["long"]}', b'\xff',
    b'{"settings": {}, "text": "a", "turns": [["you", 3]]}', b'{"settings": {}, "text": "\\ud800"}', b'[' * 100_000, b''])
def test_malformed_requests(server, body):
    answer = requests.post(server.url + 'write', data=body, timeout=10)
    assert answer.status_code == 400 and 'expected is {"settings"' in answer.text


def test_requests_have_an_end(server):
    assert requests.post(server.url + 'write', data=b' ' * 2**21, timeout=10).status_code == 413
    assert requests.post(server.url + 'write', data=iter([b' ']), timeout=10).status_code == 413  # chunked: of no known length


@pytest.mark.parametrize('headers', [
    {'Host': 'evil.example'}, {'Host': 'evil.example:8000'}, {'Host': '127.0.0.1.evil.example'}, {'Host': ''}, {'Origin': 'http://evil.example'}, {'Origin': 'null'},
    {'Origin': 'http://127.0.0.1:1'}, {'Host': 'localhost', 'Origin': 'http://127.0.0.1'}])
def test_other_pages_are_refused(server, headers):
    for answer in (requests.get(server.url, headers=headers, timeout=10), requests.post(server.url + 'write', json={'settings': {}}, headers=headers, timeout=10)):
        assert answer.status_code == 403 and 'refused' in answer.text and 'model' not in answer.text


def test_own_page_is_answered(server):
    port = server.url.split(':')[2].strip('/')
    for host in ('localhost', '127.0.0.1', '[::1]', '192.168.1.5'):
        assert ask(server, headers={'Host': f'{host}:{port}', 'Origin': f'http://{host}:{port}'}) == [{}]
    page = requests.get(server.url, timeout=10)
    assert "default-src 'none'" in page.headers['Content-Security-Policy'] and "connect-src 'self'" in page.headers['Content-Security-Policy']
    assert not re.search(r'(src|href)="(?!data:)', page.text) and '"settings": {"temperature": 0.8' in page.text
    assert requests.get(server.url + 'write', timeout=10).status_code == 405


class Slow:
    """A page in this process, whose model counts its steps, and takes them while `go` is set."""

    def __init__(self, trained, monkeypatch):
        monkeypatch.setenv('BROWSER', 'true')
        self.pause, self.sock, self.steps, self.go = 0, server_module.listen('127.0.0.1', 0), 0, threading.Event()
        writer = chat.load(trained.root / 'out' / 'toy', device='cpu')
        writer.model.register_forward_pre_hook(self.step)
        self.page = server_module.Page(writer, self.sock, '127.0.0.1')
        self.thread = threading.Thread(target=self.page.run)
        self.thread.start()

    def step(self, *_):
        self.steps += 1
        assert self.go.wait(20)
        time.sleep(self.pause)

    def ask(self, **settings):
        """An open connection, and its answer, of which nothing is read yet."""
        connection = http.client.HTTPConnection(*self.sock.getsockname())
        connection.request('POST', '/write', json.dumps({'text': 'ba', 'settings': settings}))
        return connection, connection.getresponse()

    def at_rest(self):
        """Wait until it writes nothing, and nobody waits; how many steps were taken by then."""
        until(self.page.stopped.is_set)
        self.go.set()
        self.page.thread.submit(int).result(20)  # the thread that writes has come to that
        return self.steps


@pytest.fixture
def slow(trained, monkeypatch):
    s = Slow(trained, monkeypatch)
    yield s
    s.go.set()
    s.page.server.should_exit = True
    s.thread.join(10)
    assert not s.thread.is_alive()


@pytest.mark.parametrize('settings', [{'max_new_tokens': 100_000}, {'max_new_tokens': 15, 'num_beams': 2}])
def test_writing_ends_with_its_connection(slow, settings):
    connection, answer = slow.ask(**settings)
    until(lambda: slow.steps)  # it is amid the first one
    answer.close()
    connection.close()
    assert slow.at_rest() <= 2
    assert slow.ask(max_new_tokens=2)[1].read().splitlines()[-1] == b'{"end": true}'  # and it goes on to serve


def test_one_text_at_a_time(slow):
    slow.go.set()
    connection, first = slow.ask(max_new_tokens=100_000)
    first.readline()
    (left, second), (_, third) = slow.ask(max_new_tokens=3), slow.ask(max_new_tokens=3)
    assert second.readline() == third.readline() == b'{"wait": true}\n'
    left.close()  # who waits may leave
    second.close()
    assert b'text' in first.readline()
    connection.close()
    first.close()
    assert json.loads(third.read().splitlines()[-1]) == {'end': True}


@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
@pytest.mark.parametrize('busy', [False, True])
def test_ctrl_c(trained, busy):
    with serving(trained) as process:
        if busy:
            answer = requests.post(process.url + 'write', json={'text': 'ba', 'settings': {'max_new_tokens': 100_000}}, stream=True, timeout=10)
            next(answer.iter_lines())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode in (0, 130) and 'Traceback' not in err and len(err.strip().splitlines()) <= 1


def test_port_that_is_taken(trained, server):
    port = server.url.split(':')[2].strip('/')
    assert f'cannot listen on port {port}' in (err := trained.fails('sample.py', '--web', f'--port={port}')) and '--port=' in err
    assert 'cannot listen on port 99999' in trained.fails('sample.py', '--web', '--port=99999')


def test_what_is_reached_from_elsewhere_is_said(capsys):
    from pocket.server import listen
    listen('127.0.0.1', 0).close()
    assert capsys.readouterr().err == ''
    listen('0.0.0.0', 0).close()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_without_the_packages(project):
    (project.root / 'uvicorn.py').write_text('raise ImportError', encoding='utf-8')
    assert 'pip install starlette uvicorn' in project.fails('sample.py', '--web')


@pytest.mark.skipif(os.name == 'nt', reason='a shell script')
def test_opens_a_browser(trained, tmp_path):
    (tmp_path / 'browser').write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/visited.tmp && mv {tmp_path}/visited.tmp {tmp_path}/visited', encoding='utf-8')
    (tmp_path / 'browser').chmod(0o755)
    with serving(trained, env={'BROWSER': f'{tmp_path}/browser %s'}) as process:
        until((tmp_path / 'visited').exists)
        assert (tmp_path / 'visited').read_text().strip() == process.url


@pytest.fixture(scope='module')
def talked(tmp_path_factory):
    """A project with a model of conversations, out/talk."""
    p = Project(tmp_path_factory.mktemp('talked'))
    make_pairs(p.root)
    args = [a for a in TINY if not a.startswith(('--dataset', '--batch_size', '--block_size'))]
    p.run('train.py', *args, '--dataset=talk', '--arch=seq2seq', '--block_size=40', '--src_block_size=60', '--batch_tokens=300', '--out_dir=out/talk')
    return p


def test_conversation(talked):
    here = chat.load(talked.root / 'out' / 'talk', device='cpu')
    turns = [['U', 'ba dodo'], ['B', 'dodo.']]
    with serving(talked, '--out_dir=out/talk', '--seed=5') as process:
        settings = {**SHORT, 'temperature': 1.5, 'seed': 5}
        for more in ({}, {'turns': turns}, {'turns': turns, 'you': 'B'}):
            assert written(ask(process, 'kilo', settings=settings, **more)) == ''.join(here.pieces('kilo', **more, **settings))
        event, = ask(process, 'kilo', turns=[['U', 'ß'], ['B', 'ba']])
        assert "does not know 'ß'" in event['error']


# ---- The page itself


@pytest.fixture(scope='module')
def chromium():
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    if not CHROMIUM:
        pytest.skip('there is no chromium, chromium-browser or google-chrome here')
    flags = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=flags.split())
        yield browser
        browser.close()


class Tab:
    """A page in a browser: everything that it asks for or complains about is remembered."""

    def __init__(self, browser, url, **context):
        self.asked, self.complaints = [], []
        self.page = browser.new_context(**context).new_page()
        self.page.set_default_timeout(20_000)
        self.page.on('request', lambda request: self.asked.append(request.url))
        self.page.on('console', lambda message: self.complaints.append(message.text))
        self.page.on('pageerror', lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
        self.url = url

    def until(self, expression):
        """The expression's value, once it is true. Playwright's own wait_for_function runs into the page's policy."""
        for _ in range(600):
            if value := self.page.evaluate(expression):
                return value
            time.sleep(0.05)
        raise TimeoutError(expression)

    def set(self, name, value):
        with self.page.expect_response('**/write'):
            self.page.fill(f'#{name}', value)
            self.page.keyboard.press('Enter')

    def close(self):
        assert self.complaints == [] and all(url.startswith(self.url) for url in self.asked), (self.complaints, self.asked)
        self.page.context.close()


def test_document_in_a_browser(chromium, trained):
    with serving(trained) as process:
        tab = Tab(chromium, process.url)
        page, text = tab.page, lambda: tab.page.input_value('#text')
        assert page.inner_text('h1') == 'toy' and 'M parameters' in page.inner_text('header')

        tab.set('max_new_tokens', '40')
        page.fill('#text', 'ba ')
        page.press('#text', 'Enter')  # writes
        page.wait_for_selector('#again')
        assert len(once := text()) == 43 and once.startswith('ba ') and page.locator('#words .mine').inner_text() == 'ba '
        page.press('#text', 'Control+End')
        page.press('#text', 'Shift+Enter')  # a new line
        assert text() == once + '\n'
        page.click('#send')
        page.wait_for_selector('#again')
        assert len(text()) == 84 and text().startswith(once + '\n')
        twice = text()
        page.click('#again')
        page.wait_for_selector('#stop', state='hidden')
        assert len(text()) == 84 and text().startswith(once + '\n') and text() != twice

        tab.set('temperature', 'warm')
        page.wait_for_selector('.bad')
        assert page.inner_text('.bad small') == "temperature must be a number, got 'warm'; it stays 0.8" and page.input_value('#temperature') == '0.8'
        tab.set('temperature', '0')
        page.wait_for_selector('.bad', state='detached')
        tab.set('num_beams', '2')
        page.wait_for_selector('#temperature:disabled')
        page.click('text=greedy')
        tab.until('document.getElementById("num_beams").value === "1"')

        kept = text()
        page.reload()
        assert text() == kept and page.input_value('#temperature') == '0' and page.locator('#words').inner_text().strip() == kept.strip()
        page.click('#new')
        assert text() == '' and not page.locator('#words .mine').count()
        page.fill('#text', '<b>ß</b>')
        page.click('#send')
        page.wait_for_selector('#error:not(:empty)')
        assert "does not know" in page.inner_text('#error') and text() == '<b>ß</b>' and not page.locator('#words b').count()
        tab.close()


def test_streams_and_stops_in_a_browser(chromium, slow):
    slow.pause = 0.02  # about as fast as a model of some size
    slow.go.set()
    tab = Tab(chromium, f'http://127.0.0.1:{slow.sock.getsockname()[1]}/')
    tab.set('max_new_tokens', '100000')
    tab.page.click('#send')
    length = 0
    for _ in range(3):  # it grows while it is written
        length = tab.until(f'({length + 1} < words.textContent.length) && words.textContent.length')
    tab.page.keyboard.press('Escape')
    tab.page.wait_for_selector('#stop', state='hidden')
    steps = slow.at_rest()
    time.sleep(0.2)
    assert slow.steps == steps and length <= len(tab.page.input_value('#text')) + 1 <= steps + 2
    tab.close()


def test_conversation_in_a_browser(chromium, talked):
    with serving(talked, '--out_dir=out/talk', '--max_new_tokens=20', '--start=gimme') as process:
        tab = Tab(chromium, process.url, viewport={'width': 380, 'height': 600}, color_scheme='dark')
        page, log = tab.page, lambda: tab.page.locator('#log li').all_inner_texts()
        assert page.input_value('#text') == 'gimme' and page.is_hidden('#settings')
        page.press('#text', 'Enter')
        page.wait_for_selector('#again')
        page.fill('#text', 'kilo')
        page.click('#send')
        tab.until('document.querySelectorAll("#log li").length === 4')
        page.wait_for_selector('#again')
        said = log()
        assert said[0] == 'U\ngimme' and said[2] == 'U\nkilo' and said[1].startswith('B\n') and page.input_value('#text') == ''
        page.fill('#text', 'ß')
        page.click('#send')
        page.wait_for_selector('#error:not(:empty)')
        assert log() == said and page.input_value('#text') == 'ß'  # to be mended
        page.reload()
        assert log() == said
        width = page.evaluate('document.documentElement.scrollWidth')
        assert width == 380  # nothing sticks out
        process.kill()
        process.wait(10)
        page.fill('#text', 'ba')
        page.click('#send')
        page.wait_for_selector('#error:not(:empty)')
        assert 'does not answer' in page.inner_text('#error') and log() == said
        page.click('#new')
        assert log() == []
        tab.complaints = [text for text in tab.complaints if 'ERR_CONNECTION' not in text]
        tab.close()


@pytest.mark.skipif('CHAT_PNG' not in os.environ, reason='draws the picture in README: CHAT_PNG=docs/chat.png CHAT_RUN=out/NAME pytest -k picture')
def test_picture(chromium, tmp_path):
    p = Project(tmp_path)
    shutil.copytree(os.environ['CHAT_RUN'], p.root / 'out' / 'shakespeare')
    with serving(p, '--out_dir=out/shakespeare', '--temperature=0.7', '--top_p=0.95', '--max_new_tokens=400', '--seed=2') as process:
        tab = Tab(chromium, process.url, viewport={'width': 920, 'height': 600})
        tab.page.fill('#text', 'ROMEO:\n')
        tab.page.click('#send')
        tab.page.wait_for_selector('#again', timeout=120_000)
        tab.page.screenshot(path=CHECKOUT / os.environ['CHAT_PNG'])
        tab.close()
