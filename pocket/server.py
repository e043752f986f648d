"""
The page of sample.py --web: a small server, on Starlette and uvicorn, between chat.html and a Talk.

GET / is the page, and in it, as JSON, what it shows. POST /write with {"settings": {"temperature": "0.5", …}} is answered {} if
they make sense, else {"error": a sentence}. With "text" and, in a conversation, "turns": [[speaker, text], …] before it and
"you", who says it, that is gone on with, in lines of JSON as it is written: {"text": a piece}, at last {"end": true} or
{"error": …}. The page keeps the conversation, the server nothing. It writes one text at a time: who comes meanwhile is told
{"wait": true}. Writing ends when its connection does. Any page open in the same browser could send requests here, so those of
others are refused: their Origin tells, or a Host that is a name we don't go by (DNS rebinding).
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

from pocket.chat import PRESETS, SAMPLING, change, check_seed
from pocket.configurator import read_options
from pocket.errors import UserError
from pocket.files import ROOT

try:
    import uvicorn
    from starlette import applications, exceptions, responses, routing
except ImportError:
    raise UserError('the page needs two more packages: pip install starlette uvicorn') from None


def listen(host, port):
    """A listening socket. Raises UserError where there can't be one; says so where other machines can reach it."""
    try:
        sock = socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET)
    except (OSError, OverflowError) as e:
        other = f'--port={port % 65535 + 1}' if getattr(e, 'errno', 0) == errno.EADDRINUSE else '--host or --port'
        raise UserError(f'cannot listen on port {port} of {host} ({e.args[-1].split(" (")[0]}): choose another {other}') from None
    if not sock.getsockname()[0].startswith(('127.', '::1')):
        print(f'--host={host}: whoever can reach this machine can use the model, there is no password', file=sys.stderr)
    return sock


class Page:
    """A Talk behind a listening socket. host: the name it was told to go by; seed, start: what the page begins with."""

    def __init__(self, talk, sock, host, seed=None, start=''):
        self.talk, self.sock, self.host = talk, sock, host
        self.thread, self.turn, self.stopped = ThreadPoolExecutor(1), asyncio.Lock(), threading.Event()
        talk.model.register_forward_pre_hook(self.go_on)  # so that a beam search, silent to its end, can be stopped as well
        self.about = {'name': str(talk.name), 'size': talk.model.num_params(), 'style': talk.style, 'start': start,
                      'settings': {**talk.settings, 'seed': seed}, 'presets': PRESETS, 'sampling': SAMPLING, 'comments': {
                          name: comment for name, _, comment in read_options((ROOT / 'sample.py').read_text('utf-8'))}}
        routes = [routing.Route('/', self.page), routing.Route('/write', self.write, methods=['POST'])]
        app = applications.Starlette(routes=routes, exception_handlers={
            UserError: lambda request, e: responses.PlainTextResponse(json.dumps({'error': str(e)}) + '\n')})
        self.server = uvicorn.Server(uvicorn.Config(app, ws='none', log_level='error', timeout_graceful_shutdown=1))

    def run(self):
        """Open the page in a browser where there is one, and serve until Ctrl-C."""
        host, port = self.sock.getsockname()[:2]
        url = f'http://{"127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host}:{port}/'
        print(f'{self.talk.name} is at {url} (Ctrl-C ends it)', flush=True)
        if sys.platform != 'linux' or any(name in os.environ for name in ('DISPLAY', 'WAYLAND_DISPLAY', 'BROWSER')):
            threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()
        self.server.run([self.sock])

    def go_on(self, *_):
        """Called before every step of the model: ends the writing where nobody waits for it."""
        if self.stopped.is_set() or self.server.should_exit:
            raise UserError('the server has ended')

    def guard(self, request):
        """Refuse what another page has sent: that has a name where ours has an address."""
        host, origin = request.headers.get('host', ''), request.headers.get('origin')
        address = re.fullmatch(r'(localhost|[\d.]+|\[[\da-f:.]+\])(:\d+)?', host)
        if not address and re.sub(r':\d+$', '', host) != self.host or origin not in (None, f'http://{host}'):
            raise exceptions.HTTPException(403, f'refused: this server answers its own page, not {origin or host}')

    async def page(self, request):
        self.guard(request)
        about, key = json.dumps(self.about).replace('<', '\\u003c'), os.urandom(16).hex()
        html = (ROOT / 'pocket' / 'chat.html').read_text('utf-8').replace('{"about": "us"}', about)  # read each time: edit it and reload
        html = html.replace('<style>', f'<style nonce="{key}">', 1).replace('<script>', f'<script nonce="{key}">', 1)
        return responses.HTMLResponse(html, headers={'Cache-Control': 'no-store', 'Content-Security-Policy': (
            f"default-src 'none'; style-src 'nonce-{key}'; script-src 'nonce-{key}'; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")})

    async def write(self, request):
        self.guard(request)
        if 'transfer-encoding' in request.headers or int(request.headers.get('content-length', 0)) > 2**20:
            raise exceptions.HTTPException(413, 'this is longer than the 1 MB that a request may have: begin anew')
        try:
            asked = {'turns': [], 'you': '', **await request.json()}
            settings, turns = dict(asked['settings']), [(speaker, text) for speaker, text in asked['turns']]
            ''.join([asked.get('text', ''), asked['you'], *map(''.join, turns)]).encode()  # is it text, and all of it Unicode?
        except (ValueError, TypeError, KeyError, RecursionError):
            raise exceptions.HTTPException(400, 'expected is {"settings": {}, "text": "…", "turns": [["you", "…"]]}') from None
        seed = check_seed(settings.pop('seed', None))
        change(self.talk.settings, settings)
        return responses.PlainTextResponse('{}\n') if 'text' not in asked else responses.StreamingResponse(
            self.lines(self.talk.pieces(asked['text'], turns, seed, asked['you'], **settings)))

    async def lines(self, pieces):
        """Have them written, and yield lines of JSON as they are. Closed early, that ends the writing."""
        if self.turn.locked():
            yield '{"wait": true}\n'
        async with self.turn:
            work = asyncio.get_running_loop().run_in_executor
            try:
                await work(self.thread, self.stopped.clear)  # there is one thread: whatever went before is over now
                while (piece := await work(self.thread, next, pieces, None)) is not None:
                    yield json.dumps({'text': piece}) + '\n'
                yield '{"end": true}\n'
            except UserError as e:
                yield json.dumps({'error': str(e)}) + '\n'
            finally:
                self.stopped.set()
                self.thread.submit(pieces.close)
