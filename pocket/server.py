"""
The server behind sample.py --web: the page in chat.html, and OpenAI's API in pocket/api.py.

    GET /            the page; what it shows is embedded in it as JSON: see page_data()
    GET /data        that JSON alone, for a page that had to ask for the key first
    POST /generate   {"settings": {"temperature": "0.5", …}, "text": "…"} and, in a conversation,
                     "turns": [[speaker, text], …] so far, and "user": who says the text
    /v1/…            see pocket/api.py

The answer to /generate is one JSON object per line, sent while the model generates:
{"text": a piece}, …, and finally {"end": true} or {"error": a sentence}. Without "text" the
settings are only checked: the answer is {} or {"error": a sentence}.

The page keeps the conversation, the server keeps nothing. It generates one text at a time: a
request that comes meanwhile is first told {"wait": true}. A generation ends when its connection is
closed.

Who may ask:

- Any website that is open in the same browser could send requests here. So a request is refused if
  its Origin is another page, or its Host a name that is not ours (DNS rebinding).
- With an API key, every request but the one for the empty page must carry it. Other machines are
  let in with a key only.
- Requests, texts, beams and the number of those who wait are limited, and whoever is too slow to
  send or to read is disconnected, so that nobody can keep the model from the others.
"""
import asyncio
import errno
import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import threading
import traceback
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from copy import copy
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

from pocket.chat import PRESETS, SAMPLING_OPTIONS, parse_seed, update_settings
from pocket.configurator import convert, read_options
from pocket.errors import OUT_OF_MEMORY, UserError
from pocket.files import ROOT
from pocket.template import ChatTemplate

try:
    import h11
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError:
    raise UserError('the page needs two more packages: pip install starlette uvicorn') from None

from pocket import api

PAGE = ROOT / 'pocket' / 'chat.html'

# Limits, so that one client cannot keep the model, or the memory, from all others. Whoever starts
# sample.py with more tokens or beams than these may also use them.
MAX_REQUEST_BYTES = 2**20
MAX_NEW_TOKENS = 100_000
MAX_BEAMS = 16          # each beam has a cache of its own
MAX_WAITING = 32        # requests that wait for the model
MAX_UNREAD = 256        # events that may wait for a client that reads slowly
MAX_CONNECTIONS = 500
SLOW_CLIENT_SECONDS = 20    # to send the headers, to send the body, to read part of the answer
SEND_BUFFER_BYTES = 2**14   # what may lie unread in the kernel, and in asyncio, before that counts

# What the page proposes to begin with. A model without an entry here gets the last one.
CHAT_EXAMPLES = {
    'plunkett': ('Hello, who are you?', 'How did you get lost?', 'Do you like the rain?'),
    '': ('Hello, how are you?', 'What is the capital of France?', 'Tell me a short story.'),
}
TEXT_EXAMPLES = {
    'shakespeare': ('ROMEO:\n', 'JULIET:\n', 'To be, or not to be'),
    'stdlib': ('def main():\n', 'import os\n', 'class Stack:\n'),
    '': ('Once upon a time', 'The ', 'I think that '),
}


# ---- The address


def listen(host, port, api_key=None):
    """A listening socket.

    Raises UserError if that is impossible, or if it would let other machines in without a key.
    """
    if api_key is not None and not re.fullmatch('[!-~]+', api_key):
        raise UserError(f'--api_key={api_key} must be letters, digits and punctuation of ASCII, '
                        f'without spaces, such as --api_key={secrets.token_hex(12)}')

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

    address = sock.getsockname()[0].split('%')[0]  # an IPv6 address may name an interface
    if not ipaddress.ip_address(address).is_loopback and api_key is None:
        sock.close()
        raise UserError(f'--host={host} lets other machines in, and they should need a key: add '
                        f'--api_key={secrets.token_hex(12)} (or a key of your own)')
    return sock


def url_of(sock):
    """The URL that a browser on this machine reaches a listening socket under."""
    host, port = sock.getsockname()[:2]
    if host == '0.0.0.0':
        host = '127.0.0.1'
    if host == '::':
        host = '::1'
    if ':' in host:     # IPv6
        host = f'[{host}]'
    return f'http://{host}:{port}/'


class Connection(H11Protocol):
    """A connection of uvicorn's, with a limit on how long its client may take.

    A client that sends headers byte by byte, or does not read what it has asked for, is
    disconnected. (Request bodies have a limit of their own: see ChatServer.read_body.)
    """

    unsent_headers = None   # timers that run while the client keeps us waiting
    unread_answer = None

    def connection_made(self, transport):
        super().connection_made(transport)
        # By default, the kernel takes megabytes: all that a model generates in an hour
        sock = transport.get_extra_info('socket')
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        transport.set_write_buffer_limits(high=SEND_BUFFER_BYTES)
        self.watch_headers()

    def data_received(self, data):
        super().data_received(data)
        self.watch_headers()

    def watch_headers(self):
        """Start the timer when headers are due or begin to come, and stop it when they are here."""
        incomplete = self.conn.their_state is h11.IDLE
        if incomplete and self.unsent_headers is None:
            self.unsent_headers = self.loop.call_later(SLOW_CLIENT_SECONDS, self.transport.abort)
        elif not incomplete and self.unsent_headers is not None:
            self.unsent_headers.cancel()
            self.unsent_headers = None

    def pause_writing(self):
        """Called when too much of the answer lies unread."""
        super().pause_writing()
        self.unread_answer = self.loop.call_later(SLOW_CLIENT_SECONDS, self.transport.abort)

    def resume_writing(self):
        """Called when the client has read most of it."""
        super().resume_writing()
        self.unread_answer.cancel()

    def connection_lost(self, exc):
        super().connection_lost(exc)
        for timer in (self.unsent_headers, self.unread_answer):
            if timer is not None:
                timer.cancel()


class Server(uvicorn.Server):
    """uvicorn's server, which calls a function once it serves, and Ctrl-C ends it properly."""

    def __init__(self, config, on_start):
        super().__init__(config)
        self.on_start = on_start

    async def startup(self, sockets=None):
        await super().startup(sockets)
        self.on_start()


# ---- What the page shows


def model_title(name):
    """What a model is called: the run for out/RUN/best.pt, the folder's name for a folder.

    >>> model_title('out/shakespeare_char/best.pt'), model_title('HuggingFaceTB/SmolLM2-135M')
    ('shakespeare_char', 'HuggingFaceTB/SmolLM2-135M')
    """
    path = Path(str(name))
    if path.suffix == '.pt':
        return path.parent.name or path.stem
    if path.is_dir():
        return path.absolute().name
    return str(name)


def examples(chat_model):
    """Prompts to click at: those that the tokenizer can encode."""
    name = str(chat_model.name)
    known = CHAT_EXAMPLES if chat_model.template else TEXT_EXAMPLES
    proposed = next(texts for word, texts in known.items() if word in name)

    strict = copy(chat_model)
    strict.drop_unknown = False
    possible = []
    for text in proposed:
        try:
            possible.append(strict.encodable(text))
        except UserError:   # it has characters that the tokenizer does not know
            continue
    return possible


def page_data(chat_model, seed, start):
    """What the page has to know about the model and its settings, as JSON can hold it."""
    speakers = None     # a model of plain text has none
    template = chat_model.template
    if template:
        speakers = {
            'user': template.user,
            'assistant': template.assistant,
            'free': isinstance(template, ChatTemplate),     # may a person speak as somebody else?
        }

    # Where it lies on this machine is nobody's business
    name = str(chat_model.name)
    title = model_title(name)
    if Path(name).is_absolute():
        name = title

    settings = {**asdict(chat_model.settings), 'seed': seed}
    settings['drop_unknown'] = str(chat_model.drop_unknown)

    # A setting is explained as sample.py --help explains it
    options = read_options((ROOT / 'sample.py').read_text('utf-8'))
    return {
        'name': name,
        'title': title,
        'num_params': chat_model.model.num_params(),
        'speakers': speakers,
        'start': start,
        'examples': examples(chat_model),
        'settings': settings,
        'presets': PRESETS,
        'sampling_options': SAMPLING_OPTIONS,   # a beam search uses none of them
        'comments': {option.name: option.comment for option in options if option.name},
    }


# ---- Answers to what went wrong


def json_line(event):
    """A dict as one line of JSON."""
    return json.dumps(event) + '\n'


def is_api(request):
    """Whether a request is for OpenAI's API, whose errors have a form of their own."""
    return request.url.path.startswith('/v1/')


def answer_user_error(request, error):
    """The answer to a request that raised a UserError: the page shows its sentence."""
    if is_api(request):
        return api.error_response(400, str(error), param=getattr(error, 'param', None))
    return PlainTextResponse(json_line({'error': for_the_page(error)}))


def answer_http_exception(request, error):
    """The answer to a request that was refused."""
    if is_api(request):
        return api.error_response(error.status_code, error.detail, headers=error.headers)
    return PlainTextResponse(error.detail, error.status_code, error.headers)


def answer_nobody(request, error):
    """The client has hung up: whatever is sent gets lost."""
    return PlainTextResponse('', 400)


def for_the_page(error):
    """The sentence of a UserError, with a remedy that a page has."""
    return str(error).replace('start with --drop_unknown', 'set drop_unknown to True in Settings')


def explain_failure(error):
    """A sentence on an exception that nobody expected; a bug is also shown in the terminal."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(phrase in text for phrase in OUT_OF_MEMORY):
        return 'out of memory: shorten the text, or ask for fewer tokens or beams'
    traceback.print_exception(error)
    return 'the model failed: the terminal that runs sample.py says why'


# ---- The server


async def until_read(queue):
    """Wait until somebody has taken events out of a queue."""
    while queue.qsize() > MAX_UNREAD:
        await asyncio.sleep(0.01)


class ChatServer:
    """Serves a ChatModel on a listening socket.

    host: our name, as given to listen(). seed, start: what the page begins with. api_key: what
    requests must carry, if not None.
    """

    def __init__(self, chat_model, sock, host, seed=None, start='', api_key=None):
        self.chat_model = chat_model
        self.sock = sock
        self.host = host
        self.api_key = api_key
        self.data = page_data(chat_model, seed, start)

        # The model runs in a thread of its own, so that the server can answer meanwhile
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.turn = asyncio.Lock()          # held by the request whose text is generated
        self.num_asking = 0                 # requests that generate or wait
        self.stopped = threading.Event()    # set when nobody waits for that text any more

        # The head runs once per step: a hook on it can end a beam search too, which yields nothing
        # until it is done
        chat_model.model.lm_head.register_forward_pre_hook(self.check_stopped)

        routes = [
            Route('/', self.page),
            Route('/data', self.get_data),
            Route('/generate', self.generate, methods=['POST']),
            *api.routes(self),
        ]
        handlers = {
            UserError: answer_user_error,
            HTTPException: answer_http_exception,
            ClientDisconnect: answer_nobody,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        config = uvicorn.Config(app, http=Connection, ws='none', lifespan='off', log_level='error',
                                limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=1)
        self.server = Server(config, self.announce)

    def run(self):
        """Open the page in a browser, if there is one, and serve it until Ctrl-C."""
        self.server.run([self.sock])

    def announce(self):
        """Say where the page is, and open it in a browser, if there is one."""
        url = url_of(self.sock)
        page_url = url
        if self.api_key is not None:
            page_url = f'{url}#key={quote(self.api_key)}'   # no browser sends what follows the #
        print(f'{self.chat_model.name} is at {page_url} (Ctrl-C stops it)', flush=True)
        print(f'OpenAI API for programs: {url}v1', flush=True)

        has_display = any(name in os.environ for name in ('DISPLAY', 'WAYLAND_DISPLAY', 'BROWSER'))
        if sys.platform != 'linux' or has_display:
            threading.Thread(target=webbrowser.open, args=[page_url], daemon=True).start()

    # ---- Guards

    def check_request(self, request):
        """Raise HTTPException if a request comes from elsewhere, or without the key."""
        self.refuse_other_pages(request)
        if self.api_key is None:
            return
        scheme, _, key = request.headers.get('authorization', '').partition(' ')
        right = secrets.compare_digest(key.strip().encode(), self.api_key.encode())
        if scheme.lower() != 'bearer' or not right:
            raise HTTPException(401, 'missing or wrong API key: send the header "Authorization: '
                                     'Bearer KEY" with the key that sample.py was started with',
                                headers={'WWW-Authenticate': 'Bearer'})

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

    async def read_body(self, request):
        """What a request carries, as bytes. Raises HTTPException if it is too long or too slow."""
        length = int(request.headers.get('content-length', 0))
        if 'transfer-encoding' in request.headers or length > MAX_REQUEST_BYTES:
            raise HTTPException(413, 'the request is longer than 1 MB: start a new text or chat')
        try:
            return await asyncio.wait_for(request.body(), SLOW_CLIENT_SECONDS)
        except asyncio.TimeoutError:
            raise HTTPException(408, f'the request did not arrive within {SLOW_CLIENT_SECONDS} '
                                     'seconds', headers={'Connection': 'close'}) from None

    def check_limits(self, settings):
        """Raise UserError if a generation with these Settings would take too much."""
        started_with = self.chat_model.settings
        limits = {
            'max_new_tokens': max(MAX_NEW_TOKENS, started_with.max_new_tokens),
            'num_beams': max(MAX_BEAMS, started_with.num_beams),
        }
        for name, limit in limits.items():
            value = getattr(settings, name)
            if value > limit:
                raise UserError(f'{name} must be from 1 to {limit:,} here, got {value:,}: '
                                f'for more, start sample.py with --{name}={value}')

    def check_queue(self):
        """Raise HTTPException if too many requests wait already."""
        if self.num_asking > MAX_WAITING:
            raise HTTPException(503, f'{MAX_WAITING} requests are waiting already: try again later')

    # ---- The page

    async def page(self, request):
        """GET /"""
        self.refuse_other_pages(request)
        html = PAGE.read_text('utf-8')      # every time: edit it and reload

        # JSON within HTML: no text in it may end the element that it stands in. Whoever needs a key
        # gets no data yet: the page asks for the key, then for /data.
        data = None if self.api_key is not None else self.data
        html = html.replace('{"page": "data"}', json.dumps(data).replace('<', '\\u003c'))

        # The browser runs the page's own script and style, known by this nonce, and nothing else
        nonce = os.urandom(16).hex()
        html = html.replace('<style>', f'<style nonce="{nonce}">', 1)
        html = html.replace('<script>', f'<script nonce="{nonce}">', 1)
        policy = (f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
                  "connect-src 'self'; img-src data:; "
                  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        headers = {
            'Cache-Control': 'no-store',
            'Content-Security-Policy': policy,
            'Referrer-Policy': 'no-referrer',
            'X-Content-Type-Options': 'nosniff',
        }
        return HTMLResponse(html, headers=headers)

    async def get_data(self, request):
        """GET /data"""
        self.check_request(request)
        return JSONResponse(self.data, headers={'Cache-Control': 'no-store'})

    async def generate(self, request):
        """POST /generate"""
        self.check_request(request)
        asked = await self.read_request(request)
        seed = parse_seed(asked['settings'].pop('seed', None))
        model = self.model_for(asked['settings'].pop('drop_unknown', None))
        self.check_limits(update_settings(model.settings, asked['settings']))
        if asked['text'] is None:
            return PlainTextResponse(json_line({}))

        self.check_queue()
        pieces = model.stream(asked['text'], asked['turns'], seed, asked['user'],
                              **asked['settings'])
        return StreamingResponse(self.stream_lines(pieces))

    def model_for(self, drop_unknown):
        """The ChatModel with drop_unknown as a request asks for it, if it does."""
        if drop_unknown is None:
            return self.chat_model
        model = copy(self.chat_model)   # the weights are shared
        try:
            model.drop_unknown = convert(drop_unknown, bool)
        except ValueError:
            raise UserError(f'drop_unknown must be True or False, got {drop_unknown!r}') from None
        return model

    async def read_request(self, request):
        """What a request asks for: {settings: dict, text: str or None, turns: list of pairs, user}.

        Raises HTTPException if it asks for nothing that makes sense.
        """
        content = await self.read_body(request)
        try:
            body = {'turns': [], 'user': '', **json.loads(content)}
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

    async def stream_lines(self, pieces):
        """Generate, and yield the lines of JSON. If it is closed early, the generation ends."""
        async with aclosing(self.events(pieces)) as events:
            async for event in events:
                event.pop('status', None)
                yield json_line(event)

    # ---- Generating, for the page and for OpenAI's API

    async def events(self, pieces):
        """Run a generation, a generator of pieces of text, when it is its turn.

        Yields {'wait': True} if there is another one in progress, {'text': a piece}, …, and finally
        {'end': True} or {'error': a sentence, 'status': of HTTP}. If this is closed early, the
        generation ends.
        """
        # Events wait here for a client that reads slowly; not many, and not long
        queue = asyncio.Queue()
        self.num_asking += 1
        task = asyncio.create_task(self.run_generation(pieces, queue))
        try:
            while True:
                event = await queue.get()
                yield event
                if 'end' in event or 'error' in event:
                    return
        finally:
            task.cancel()
            self.num_asking -= 1

    async def run_generation(self, pieces, queue):
        """Wait for our turn, then run the generation in its thread and put its events in a queue.

        If nobody takes them out, the generation ends: others are waiting for their turn.
        """
        loop = asyncio.get_running_loop()
        send = queue.put_nowait
        if self.turn.locked():
            send({'wait': True})
        async with self.turn:
            try:
                # There is one thread: once it gets here, the generation before has ended
                await loop.run_in_executor(self.thread, self.stopped.clear)
                while True:
                    piece = await loop.run_in_executor(self.thread, next, pieces, None)
                    if piece is None:
                        break
                    send({'text': piece})
                    if queue.qsize() > MAX_UNREAD:
                        await asyncio.wait_for(until_read(queue), SLOW_CLIENT_SECONDS)
                send({'end': True})
            except asyncio.TimeoutError:
                send({'error': 'nobody reads what is generated', 'status': 408})
            except UserError as e:
                send({'error': for_the_page(e), 'status': 400})
            except Exception as e:
                send({'error': explain_failure(e), 'status': 500})
            finally:
                self.stopped.set()
                self.thread.submit(pieces.close)

    def check_stopped(self, *_):
        """Called before every step of the model: ends a generation that nobody waits for."""
        if self.stopped.is_set() or self.server.should_exit:
            raise UserError('the server has shut down')
