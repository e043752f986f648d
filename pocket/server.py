"""
The server behind sample.py --web: it lets the page in chat.html talk to a ChatModel.

    GET /            the page; what it shows is embedded in it as JSON: see page_data()
    POST /generate   {"settings": {"temperature": "0.5", …}, "text": "…"} and, in a conversation,
                     "turns": [[speaker, text], …] so far, and "user": who says the text

The answer is one JSON object per line, sent while the model generates: {"text": a piece}, …, and
finally {"end": true} or {"error": a sentence}. Without "text" the settings are only checked: the
answer is {} or {"error": a sentence}.

The page keeps the conversation, the server keeps nothing. It generates one text at a time: a
request that comes meanwhile is first told {"wait": true}. A generation ends when its connection is
closed.

Any website that is open in the same browser could send requests here. So a request is refused if
its Origin is another page, or its Host a name that is not ours (DNS rebinding).
"""
import asyncio
import errno
import json
import os
import re
import socket
import sys
import threading
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from pocket.chat import PRESETS, SAMPLING_OPTIONS, parse_seed, update_settings
from pocket.configurator import read_options
from pocket.errors import UserError
from pocket.files import ROOT

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import HTMLResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route
except ImportError:
    raise UserError('the page needs two more packages: pip install starlette uvicorn') from None

PAGE = ROOT / 'pocket' / 'chat.html'
MAX_REQUEST_BYTES = 2**20


def listen(host, port):
    """A listening socket. Raises UserError if that is impossible.

    Says so on stderr if other machines can reach it.
    """
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as e:
        reason = e.args[-1].split(' (')[0]
        advice = '--host or --port'
        if getattr(e, 'errno', None) == errno.EADDRINUSE:
            advice = f'--port={port % 65535 + 1}'
        raise UserError(f'cannot listen on port {port} of {host} ({reason}): '
                        f'choose another {advice}') from None

    address = sock.getsockname()[0]
    if not address.startswith(('127.', '::1')):
        print(f'--host={host}: anyone who can reach this machine can use the model, '
              'there is no password', file=sys.stderr)
    return sock


def url_of(sock):
    """The URL that a browser on this machine reaches a listening socket under."""
    host, port = sock.getsockname()[:2]
    if host == '0.0.0.0':
        host = '127.0.0.1'
    if ':' in host:     # IPv6
        host = f'[{host}]'
    return f'http://{host}:{port}/'


def page_data(chat_model, seed, start):
    """What the page has to know about the model and its settings, as JSON can hold it."""
    speakers = None     # a model of plain text has none
    template = chat_model.template
    if template:
        speakers = {'user': template.user, 'assistant': template.assistant}

    # A setting is explained as sample.py --help explains it
    options = read_options((ROOT / 'sample.py').read_text('utf-8'))
    return {
        'name': str(chat_model.name),
        'num_params': chat_model.model.num_params(),
        'speakers': speakers,
        'start': start,
        'settings': {**asdict(chat_model.settings), 'seed': seed},
        'presets': PRESETS,
        'sampling_options': SAMPLING_OPTIONS,   # a beam search uses none of them
        'comments': {option.name: option.comment for option in options if option.name},
    }


def json_line(event):
    """A dict as one line of JSON."""
    return json.dumps(event) + '\n'


def answer_user_error(request, error):
    """The answer to a request that raised a UserError: the page shows its sentence."""
    return PlainTextResponse(json_line({'error': str(error)}))


class ChatServer:
    """Serves a ChatModel on a listening socket.

    host: our name, as given to listen(). seed, start: what the page begins with.
    """

    def __init__(self, chat_model, sock, host, seed=None, start=''):
        self.chat_model = chat_model
        self.sock = sock
        self.host = host
        self.data = page_data(chat_model, seed, start)

        # The model runs in a thread of its own, so that the server can answer meanwhile
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.turn = asyncio.Lock()          # held by the request whose text is generated
        self.stopped = threading.Event()    # set when nobody waits for that text any more

        # The head runs once per step: a hook on it can end a beam search too, which yields nothing
        # until it is done
        chat_model.model.lm_head.register_forward_pre_hook(self.check_stopped)

        routes = [
            Route('/', self.page),
            Route('/generate', self.generate, methods=['POST']),
        ]
        app = Starlette(routes=routes, exception_handlers={UserError: answer_user_error})
        config = uvicorn.Config(app, ws='none', log_level='error', timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)

    def run(self):
        """Open the page in a browser, if there is one, and serve it until Ctrl-C."""
        url = url_of(self.sock)
        print(f'{self.chat_model.name} is at {url} (Ctrl-C stops it)', flush=True)
        has_display = any(name in os.environ for name in ('DISPLAY', 'WAYLAND_DISPLAY', 'BROWSER'))
        if sys.platform != 'linux' or has_display:
            threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()
        self.server.run([self.sock])

    # ---- Requests

    def refuse_other_pages(self, request):
        """Raise HTTPException if a request comes from a page that is not ours."""
        host = request.headers.get('host', '')
        is_address = re.fullmatch(r'(localhost|[\d.]+|\[[\da-f:.]+\])(:\d+)?', host)
        is_our_name = re.sub(r':\d+$', '', host) == self.host
        origin = request.headers.get('origin')
        is_our_page = origin is None or origin == f'http://{host}'
        if not (is_address or is_our_name) or not is_our_page:
            raise HTTPException(403, f'refused: this server answers its own page, '
                                     f'not {origin or host}')

    async def page(self, request):
        """GET /"""
        self.refuse_other_pages(request)
        html = PAGE.read_text('utf-8')      # every time: edit it and reload

        # JSON within HTML: no text in it may end the element that it stands in
        data = json.dumps(self.data).replace('<', '\\u003c')
        html = html.replace('{"page": "data"}', data)

        # The browser runs the page's own script and style, known by this nonce, and nothing else
        nonce = os.urandom(16).hex()
        html = html.replace('<style>', f'<style nonce="{nonce}">', 1)
        html = html.replace('<script>', f'<script nonce="{nonce}">', 1)
        policy = (f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
                  "connect-src 'self'; img-src data:; "
                  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        headers = {'Cache-Control': 'no-store', 'Content-Security-Policy': policy}
        return HTMLResponse(html, headers=headers)

    async def generate(self, request):
        """POST /generate"""
        self.refuse_other_pages(request)
        asked = await self.read_request(request)
        seed = parse_seed(asked['settings'].pop('seed', None))
        update_settings(self.chat_model.settings, asked['settings'])    # raises UserError
        if asked['text'] is None:
            return PlainTextResponse(json_line({}))
        pieces = self.chat_model.stream(asked['text'], asked['turns'], seed, asked['user'],
                                        **asked['settings'])
        return StreamingResponse(self.stream_lines(pieces))

    async def read_request(self, request):
        """What a request asks for: {settings: dict, text: str or None, turns: list of pairs, user}.

        Raises HTTPException if it is too long or asks for nothing that makes sense.
        """
        length = int(request.headers.get('content-length', 0))
        if 'transfer-encoding' in request.headers or length > MAX_REQUEST_BYTES:
            raise HTTPException(413, 'the request is longer than 1 MB: start a new text or chat')
        try:
            body = {'turns': [], 'user': '', **await request.json()}
            asked = {
                'settings': dict(body['settings']),
                'text': body.get('text'),
                'turns': [(speaker, text) for speaker, text in body['turns']],
                'user': body['user'],
            }
            # Is all of it text, and all of the text Unicode? join() and encode() raise if not
            texts = [asked['user'], *(''.join(turn) for turn in asked['turns'])]
            if 'text' in body:
                texts.append(asked['text'])
            ''.join(texts).encode()
        except (ValueError, TypeError, KeyError, RecursionError):
            raise HTTPException(400, 'expected {"settings": {}, "text": "…", '
                                     '"turns": [["you", "…"]]}') from None
        return asked

    # ---- Generating

    async def stream_lines(self, pieces):
        """Generate, and yield the lines of JSON. If it is closed early, the generation ends."""
        loop = asyncio.get_running_loop()
        if self.turn.locked():
            yield json_line({'wait': True})
        async with self.turn:
            try:
                # There is one thread: once it gets here, the generation before has ended
                await loop.run_in_executor(self.thread, self.stopped.clear)
                while True:
                    piece = await loop.run_in_executor(self.thread, next, pieces, None)
                    if piece is None:
                        break
                    yield json_line({'text': piece})
                yield json_line({'end': True})
            except UserError as e:
                yield json_line({'error': str(e)})
            finally:
                self.stopped.set()
                self.thread.submit(pieces.close)

    def check_stopped(self, *_):
        """Called before every step of the model: ends a generation that nobody waits for."""
        if self.stopped.is_set() or self.server.should_exit:
            raise UserError('the server has shut down')
