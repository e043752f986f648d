"""
OpenAI's API for the server of sample.py --web, as their client and many tools speak it.

    from openai import OpenAI
    client = OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='none')
    model = client.models.list().data[0].id
    client.chat.completions.create(model=model, messages=[{'role': 'user', 'content': 'Hello.'}])
    client.completions.create(model=model, prompt='ROMEO:')         # for a model of plain text

    GET  /v1/models, /v1/models/NAME
    POST /v1/chat/completions   temperature, top_p, max_completion_tokens (or max_tokens), stop,
    POST /v1/completions        seed, stream, stream_options; as in vLLM also top_k, min_p and
                                repetition_penalty

What a request leaves out is as sample.py was started. What OpenAI has and we do not (n > 1, tools,
logprobs, …) is refused by name. The server generates one text at a time: the others wait.
"""
import asyncio
import json
import time
import uuid
from contextlib import aclosing
from dataclasses import replace

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from pocket.chat import SAMPLING_OPTIONS, Detokenizer, parse_seed, update_settings
from pocket.errors import UserError
from pocket.template import ChatTemplate, JinjaTemplate

ROLES = {'system': 'system', 'developer': 'system', 'user': 'user', 'assistant': 'assistant'}
MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 1000  # characters

# What we do not have, and the value that asks for nothing
NOT_SUPPORTED = {
    'n': 1, 'best_of': 1, 'echo': False, 'suffix': '', 'logprobs': False, 'top_logprobs': 0,
    'presence_penalty': 0, 'frequency_penalty': 0, 'logit_bias': {}, 'tools': [], 'functions': [],
    'response_format': {'type': 'text'}, 'modalities': ['text'],
}


# ---- Errors


class RequestError(UserError):
    """Something in a request that makes no sense. param: the name of its field."""

    def __init__(self, message, param=None):
        super().__init__(message)
        self.param = param


def error_body(status, message, param=None):
    """An error as OpenAI describes it."""
    codes = {401: 'invalid_api_key', 404: 'not_found', 503: 'overloaded'}
    kind = 'server_error' if status >= 500 else 'invalid_request_error'
    return {'error': {
        'message': message, 'type': kind, 'param': param, 'code': codes.get(status),
    }}


def error_response(status, message, param=None, headers=None):
    """An error as the answer to a request."""
    return JSONResponse(error_body(status, message, param), status, headers)


# ---- What a request asks for


def read_fields(content):
    """The fields of a request: a dict without those that are null. Raises RequestError."""
    try:
        body = json.loads(content)
        json.dumps(body, ensure_ascii=False).encode()   # is all of it Unicode?
    except (ValueError, RecursionError):
        raise RequestError('the request must be JSON, in UTF-8') from None
    if not isinstance(body, dict):
        raise RequestError('the request must be a JSON object, {"model": …}')

    fields = {name: value for name, value in body.items() if value is not None}
    for name, nothing in NOT_SUPPORTED.items():
        if name in fields and fields[name] != nothing:
            raise RequestError(f'{name}={fields[name]!r} is not supported: omit it', name)
    return fields


def read_settings(fields, settings):
    """The Settings of a generation: settings, with what a request changes. Raises RequestError."""
    # A beam search neither samples nor streams, which is what this API is about
    settings = replace(settings, num_beams=1)
    for name in SAMPLING_OPTIONS:
        if name in fields:
            try:
                settings = update_settings(settings, {name: fields[name]})
            except UserError as e:
                sentence = str(e).partition('; it stays')[0]    # which is for people in a chat
                raise RequestError(sentence, name) from None

    for name in ('max_tokens', 'max_completion_tokens'):    # the old name and the new one
        if name in fields:
            value = fields[name]
            if type(value) is not int or value < 1:
                raise RequestError(f'{name} must be a whole number from 1, got {value!r}', name)
            settings = replace(settings, max_new_tokens=value)
    return settings


def read_stop(fields):
    """The stop strings of a request: a list. Raises RequestError."""
    stop = fields.get('stop', [])
    if isinstance(stop, str):
        stop = [stop]
    wrong = RequestError(f'stop must be a string or a list of up to {MAX_STOP_STRINGS} strings, '
                         f'each of up to {MAX_STOP_LENGTH:,} characters', 'stop')
    if not isinstance(stop, list) or len(stop) > MAX_STOP_STRINGS:
        raise wrong
    for text in stop:
        if not isinstance(text, str) or len(text) > MAX_STOP_LENGTH:
            raise wrong
    return [text for text in stop if text]


def read_bool(fields, name):
    """A field that is true or false (if it is missing). Raises RequestError."""
    value = fields.get(name, False)
    if type(value) is not bool:
        raise RequestError(f'{name} must be true or false, got {value!r}', name)
    return value


def read_messages(fields):
    """The messages of a request as [{'role': …, 'content': str}]. Raises RequestError."""
    messages = fields.get('messages')
    if not isinstance(messages, list) or not messages:
        raise RequestError('messages must be a list, [{"role": "user", "content": "…"}]',
                           'messages')
    read = []
    for i, message in enumerate(messages):
        param = f'messages[{i}]'
        if not isinstance(message, dict) or message.get('role') not in list(ROLES):
            role = message.get('role') if isinstance(message, dict) else message
            raise RequestError(f'{param} must have one of the roles {", ".join(ROLES)}, '
                               f'got {role!r}', param)
        content = read_content(message.get('content'), param)
        read.append({'role': ROLES[message['role']], 'content': content})

    if all(message['role'] == 'system' for message in read):
        raise RequestError('messages must have one from the user, to reply to', 'messages')
    return read


def read_content(content, param):
    """The text of a message, which may also come in parts. Raises RequestError."""
    if isinstance(content, str):
        return content
    wrong = RequestError(f'{param} must have text as its content: "…" or '
                         '[{"type": "text", "text": "…"}]', param)
    if not isinstance(content, list):
        raise wrong
    text = ''
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get('text'), str):
            raise wrong
        text += part['text']
    return text


def encode_chat(model, messages, settings):
    """Ids of what the model reads before it replies to messages. Raises UserError."""
    if isinstance(model.template, JinjaTemplate):
        if model.system is not None and messages[0]['role'] != 'system':
            messages = [{'role': 'system', 'content': model.system}, *messages]
        return model.encode_messages(messages, settings)

    # A ChatTemplate has no system messages
    names = {'user': model.template.user, 'assistant': model.template.assistant}
    turns = [(names[message['role']], message['content'])
             for message in messages if message['role'] in names]
    *earlier, (speaker, text) = turns
    return model.encode_prompt(text, earlier, settings, speaker)


def encode_text(model, prompt, settings):
    """Ids of a text to be continued. Raises UserError."""
    if isinstance(model.template, ChatTemplate):
        raise RequestError('this model was trained on conversations, it continues no text: '
                           'use /v1/chat/completions')
    if isinstance(model.template, JinjaTemplate):
        return model.tok.encode_with_specials(prompt)
    return model.encode_prompt(prompt, (), settings)


# ---- Generating


class Generation:
    """One generation, and what an answer has to say about it.

    prompt: the ids that the model reads. finish_reason: 'stop' if the model or a stop string ended
    the text, 'length' if it was as long as allowed. completion_tokens: tokens generated, without
    the one that ends a text.
    """

    def __init__(self, model, prompt, settings, seed, stop):
        self.model = model
        self.prompt = prompt
        self.settings = settings
        self.seed = seed
        self.stop = [*model.stop, *stop]
        self.completion_tokens = 0
        self.finish_reason = 'length'

    def pieces(self):
        """Generate the text, piece by piece."""
        at_start = isinstance(self.model.template, ChatTemplate)  # no spaces before a reply
        for piece in self.decoded_pieces():
            if at_start:
                piece = piece.lstrip()
            if piece:
                at_start = False
                yield piece

    def decoded_pieces(self):
        """The same, some of them empty."""
        detokenizer = Detokenizer(self.model.tok, self.stop)
        for (token_id,) in self.model.next_tokens([self.prompt], self.settings, self.seed):
            if token_id < 0:
                break
            if token_id in self.model.eos_ids:
                self.finish_reason = 'stop'
                break
            self.completion_tokens += 1
            yield detokenizer.add(token_id)
            if detokenizer.stopped:
                break
        yield detokenizer.finish()
        if detokenizer.stopped:
            self.finish_reason = 'stop'

    def usage(self):
        """How many tokens were read and generated."""
        return {
            'prompt_tokens': len(self.prompt),
            'completion_tokens': self.completion_tokens,
            'total_tokens': len(self.prompt) + self.completion_tokens,
        }


async def unless_disconnected(request, work):
    """The result of a coroutine, which is canceled if the client hangs up: ClientDisconnect."""
    async def hang_up():
        while (await request.receive())['type'] != 'http.disconnect':
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(hang_up())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0] not in done:
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


# ---- Answers


class ChatForm:
    """How /v1/chat/completions writes its answers."""
    id_prefix = 'chatcmpl-'
    whole = 'chat.completion'
    chunk = 'chat.completion.chunk'

    def choice(self, text):
        return {'message': {'role': 'assistant', 'content': text, 'refusal': None}}

    def first(self):
        return {'delta': {'role': 'assistant', 'content': ''}}

    def piece(self, text):
        return {'delta': {'content': text}}

    def last(self):
        return {'delta': {}}


class TextForm:
    """How /v1/completions writes its answers."""
    id_prefix = 'cmpl-'
    whole = 'text_completion'
    chunk = 'text_completion'

    def choice(self, text):
        return {'text': text}

    def first(self):
        return None

    def piece(self, text):
        return {'text': text}

    def last(self):
        return {'text': ''}


def sse(event):
    """A dict as one of the events that a server sends."""
    return f'data: {json.dumps(event)}\n\n'


class Api:
    """The routes of /v1 for a ChatServer, which checks requests and runs generations."""

    def __init__(self, server):
        self.server = server
        self.model = server.chat_model
        self.name = server.data['title']
        self.created = int(time.time())

    def describe_model(self):
        """The one model that there is."""
        return {'id': self.name, 'object': 'model', 'created': self.created,
                'owned_by': 'pocketGPT'}

    def check_model(self, name):
        """Raise HTTPException if a request is for another model."""
        # The checkpoint's path is just as right as the name that we list
        if name not in (self.name, str(self.model.name)):
            raise HTTPException(404, f'the model {name!r} does not exist: here is {self.name!r}')

    async def list_models(self, request):
        """GET /v1/models"""
        self.server.check_request(request)
        return JSONResponse({'object': 'list', 'data': [self.describe_model()]})

    async def get_model(self, request):
        """GET /v1/models/NAME"""
        self.server.check_request(request)
        self.check_model(request.path_params['name'])
        return JSONResponse(self.describe_model())

    async def chat_completions(self, request):
        """POST /v1/chat/completions"""
        fields = await self.read(request)
        if self.model.template is None:
            raise RequestError(f'{self.name} is a model of plain text, without a chat template: '
                               'use /v1/completions', 'messages')
        return await self.answer(request, fields, ChatForm(), encode_chat, read_messages(fields))

    async def completions(self, request):
        """POST /v1/completions"""
        fields = await self.read(request)
        prompt = fields.get('prompt', '')
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise RequestError('prompt must be one string', 'prompt')
        return await self.answer(request, fields, TextForm(), encode_text, prompt)

    async def read(self, request):
        """The fields of a request that may be answered. Raises what the server answers instead."""
        self.server.check_request(request)
        fields = read_fields(await self.server.read_body(request))
        if 'model' in fields:
            self.check_model(fields['model'])
        return fields

    async def answer(self, request, fields, form, encode, prompt):
        """The answer to a request, as a whole or as a stream."""
        settings = read_settings(fields, self.model.settings)
        try:
            self.server.check_limits(settings)
        except UserError as e:
            raise RequestError(str(e), 'max_tokens') from None
        try:
            seed = parse_seed(fields.get('seed'))
        except UserError as e:
            raise RequestError(str(e), 'seed') from None
        stop = read_stop(fields)
        stream = read_bool(fields, 'stream')
        options = fields.get('stream_options', {})
        if not isinstance(options, dict):
            raise RequestError('stream_options must be {"include_usage": true}', 'stream_options')
        include_usage = read_bool(options, 'include_usage')
        self.server.check_queue()

        # Encoding a long text takes a while, in which the server can do something else
        ids = await asyncio.to_thread(encode, self.model, prompt, settings)
        generation = Generation(self.model, ids, settings, seed, stop)
        head = {'id': form.id_prefix + uuid.uuid4().hex, 'created': int(time.time()),
                'model': self.name}
        if stream:
            return StreamingResponse(self.stream(generation, head, form, include_usage),
                                     media_type='text/event-stream',
                                     headers={'Cache-Control': 'no-store'})
        return await unless_disconnected(request, self.whole_answer(generation, head, form))

    async def whole_answer(self, generation, head, form):
        """The answer once the text is complete."""
        text = ''
        async with aclosing(self.server.events(generation.pieces())) as events:
            async for event in events:
                if 'error' in event:
                    return error_response(event['status'], event['error'])
                text += event.get('text', '')
        choice = {'index': 0, **form.choice(text), 'logprobs': None,
                  'finish_reason': generation.finish_reason}
        return JSONResponse({**head, 'object': form.whole, 'choices': [choice],
                             'usage': generation.usage()})

    async def stream(self, generation, head, form, include_usage):
        """Yields the answer in chunks, while the text is generated."""
        head = {**head, 'object': form.chunk}
        if include_usage:
            head['usage'] = None    # until the last chunk

        def chunk(content, finish_reason=None):
            choice = {'index': 0, **content, 'logprobs': None, 'finish_reason': finish_reason}
            return sse({**head, 'choices': [choice]})

        if form.first() is not None:
            yield chunk(form.first())
        async with aclosing(self.server.events(generation.pieces())) as events:
            async for event in events:
                if 'error' in event:
                    yield sse(error_body(event['status'], event['error']))
                    return
                if 'wait' in event:
                    yield ': another text is being generated\n\n'   # a comment, for the impatient
                if 'text' in event:
                    yield chunk(form.piece(event['text']))

        yield chunk(form.last(), generation.finish_reason)
        if include_usage:
            yield sse({**head, 'choices': [], 'usage': generation.usage()})
        yield 'data: [DONE]\n\n'


def routes(server):
    """The routes of OpenAI's API."""
    api = Api(server)
    return [
        Route('/v1/models', api.list_models),
        Route('/v1/models/{name:path}', api.get_model),
        Route('/v1/chat/completions', api.chat_completions, methods=['POST']),
        Route('/v1/completions', api.completions, methods=['POST']),
    ]
