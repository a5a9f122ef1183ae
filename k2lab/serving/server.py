"""A small OpenAI-compatible server for small models: FastAPI in front of transformers.

It speaks vLLM's wire format on a machine without a GPU: completions and chat, whole and streamed, with
log-probabilities and tools, /tokenize, /detokenize, /v1/models, /version, /health. What a request asks for is done or
refused by name. A client that leaves frees the server within one token; requests share batches where no answer changes.
`python -m k2lab.serving.server PLACE --name NAME`, with the key in $K2LAB_API_KEY.
"""

import argparse
import asyncio
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from k2lab.lab.config import LabError
from k2lab.models.placement import device_for, placement_of
from k2lab.serving import responses
from k2lab.serving.drafts import Rules
from k2lab.serving.engine import Engine, Run
from k2lab.serving.protocol import (
    MOST_BYTES,
    ChatAsk,
    CompletionAsk,
    DetokenizeAsk,
    Refused,
    TokenizeAsk,
    read,
)
from k2lab.text.chat import encode, opened_thought

CALL_TOKENS = ('<|tool_calls_section_begin|>', '<|tool_call_begin|>', '<tool_call>')
CALL_ENDS = ('<|tool_call_end|>', '</tool_call>')


def complaint(status: int, message: str, param: str | None = None, headers=None) -> JSONResponse:
    "An error in OpenAI's shape."
    return JSONResponse(responses.error_body(status, message, param), status, headers)


class Guard:
    "Asks for the key before a request goes further, and so before its body is read; /health is open."

    def __init__(self, app, key: str):
        self.app, self.key = app, key.encode()

    async def __call__(self, scope, receive, send):
        if scope['type'] == 'http' and scope['path'] != '/health' and not self.knows(scope):
            refused = complaint(401, 'wrong or missing key', None, {'www-authenticate': 'Bearer'})
            return await refused(scope, receive, send)
        await self.app(scope, receive, send)

    def knows(self, scope) -> bool:
        "Whether a request carries the key."
        given = dict(scope['headers']).get(b'authorization', b'')
        scheme, _, key = given.partition(b' ')
        return scheme.lower() == b'bearer' and secrets.compare_digest(key.strip(), self.key)


async def body_of(request: Request) -> bytes:
    "The body of a request; `Refused` for one that is too large, without reading it to its end."
    too_large = Refused(413, f'the body is larger than {MOST_BYTES // 2**20} MiB')
    length = request.headers.get('content-length', '0')
    if len(length) > 12 or (length.isdecimal() and int(length) > MOST_BYTES):
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise too_large
    return b''.join(parts)


def call_beginning(engine: Engine, name: str, number: int) -> list[int]:
    "The tokens with which a call of a tool begins, K2's or Qwen's; `Refused` for other models and odd names."
    known = engine.tok.get_added_vocab()
    if not re.fullmatch(r'[\w.-]+', name):
        raise Refused(400, f'tool_choice: a tool called {name!r} cannot be forced', 'tool_choice')
    if '<|tool_call_begin|>' in known:
        begin, end = CALL_TOKENS[:2], ['<|tool_call_argument_begin|>']
        said = encode(engine.tok, f'functions.{name}:{number}')
        return [*(known[t] for t in begin), *said, *(known[t] for t in end)]
    if '<tool_call>' in known:
        said = encode(engine.tok, f'\n{{"name": "{name}", "arguments":')
        return [known['<tool_call>'], *said]
    raise Refused(
        400, "tool_choice: this model's tool calls have no mark; give 'auto'", 'tool_choice'
    )


def rules_of(engine: Engine, ask: ChatAsk, ids: list[int]) -> Rules:
    "What `tool_choice` and `parallel_tool_calls` demand of an answer's tokens."
    if not ask.tools:
        return Rules()
    known = engine.tok.get_added_vocab()
    ids_of = lambda tokens: [known[t] for t in tokens if t in known]
    if ask.tool_choice == 'none':
        return Rules(banned=ids_of(CALL_TOKENS))
    number = sum(len(m.tool_calls) for m in ask.messages)
    close = '</think>' if opened_thought(engine.tok.decode(ids[-8:])) else ''
    before = encode(engine.tok, close) if close else []
    beginnings = [[*before, *call_beginning(engine, n, number)] for n in ask.must_call]
    one = not ask.parallel_tool_calls or not isinstance(ask.tool_choice, str)
    return Rules(beginnings, last=set(ids_of(CALL_ENDS)) if one else set())


def completion_runs(engine: Engine, ask: CompletionAsk) -> list[Run]:
    "A run for each prompt."
    engine.known(ask.model)
    prompts = [engine.tokens(prompt) for prompt in ask.prompt]
    limits = [engine.limit(ids, ask, 16) for ids in prompts]
    return [Run(ids, ask, limit) for ids, limit in zip(prompts, limits)]


def chat_runs(engine: Engine, ask: ChatAsk) -> list[Run]:
    "The run of a conversation."
    engine.known(ask.model)
    ids = engine.prompt(ask.conversation, ask.tools)
    limit = engine.limit(ids, ask, None)
    return [Run(ids, ask, limit, rules_of(engine, ask, ids))]


def tokenized(engine: Engine, ask: TokenizeAsk) -> dict:
    "The answer to /tokenize."
    engine.known(ask.model)
    if ask.messages is None:
        ids = engine.tokens(ask.prompt or '')
    else:
        ids = engine.prompt([m.plain() for m in ask.messages], ask.tools)
    names = engine.tok.convert_ids_to_tokens(ids) if ask.return_token_strs else None
    return dict(count=len(ids), max_model_len=engine.length, tokens=ids, token_strs=names)


def detokenized(engine: Engine, ask: DetokenizeAsk) -> dict:
    "The answer to /detokenize."
    engine.known(ask.model)
    return dict(prompt=engine.tok.decode(engine.tokens(ask.tokens)))


def leave(runs: list[Run]):
    "Stop computing answers that nobody waits for; those that are done stay so."
    for run in runs:
        run.done.cancel()


async def left(request: Request):
    "Returns when the client has gone."
    while (await request.receive())['type'] != 'http.disconnect':
        pass


async def finished(runs: list[Run]):
    "Returns when all runs are done; raises what ended one."
    for run in runs:
        await asyncio.wrap_future(run.done)


async def whole(engine: Engine, request: Request, runs: list[Run], shape: Callable):
    "A whole answer, or none for a client that leaves before."
    for run in runs:
        engine.submit(run)
    answers = asyncio.ensure_future(finished(runs))
    gone = asyncio.ensure_future(left(request))
    try:
        await asyncio.wait([answers, gone], return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            return complaint(499, 'the client has gone')
        if error := answers.exception():
            raise responses.failure(error)
        return JSONResponse(await run_in_threadpool(shape, engine, runs))
    finally:
        gone.cancel()
        answers.cancel()
        leave(runs)


class Stream(StreamingResponse):
    "Server-sent events; when the client leaves or the server stops, so do the runs."

    def __init__(self, engine: Engine, runs: list[Run]):
        self.runs = runs
        super().__init__(
            responses.stream(engine, runs, news_of(engine, runs)), media_type='text/event-stream'
        )

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            leave(self.runs)


async def news_of(engine: Engine, runs: list[Run]) -> AsyncIterator:
    "`(number of the run, News)` as the engine's thread tells them, until all runs have ended."
    loop, queue = asyncio.get_running_loop(), asyncio.Queue()

    def tell(item):
        try:
            loop.call_soon_threadsafe(queue.put_nowait, item)
        except RuntimeError:  # the loop is closed: the server stops
            pass

    for k, run in enumerate(runs):
        run.on_news = lambda one, k=k: tell((k, one))
        run.done.add_done_callback(lambda _: tell(None))
        engine.submit(run)
    ended = 0
    while ended < len(runs):
        item = await queue.get()
        if item is None:
            ended += 1
        else:
            yield item


async def asked(engine: Engine, kind: type, work: Callable, request: Request):
    "The answer to a request that needs no model."
    body = await body_of(request)
    return JSONResponse(await run_in_threadpool(lambda: work(engine, read(kind, body))))


async def answered(engine: Engine, kind: type, plan: Callable, shape: Callable, request: Request):
    "The answer to a request to the model, whole or as a stream; refused before its first byte."
    body = await body_of(request)
    runs = await run_in_threadpool(lambda: plan(engine, read(kind, body)))
    if runs[0].ask.stream:
        return Stream(engine, runs)
    return await whole(engine, request, runs, shape)


def create_app(model, tok, name: str, key: str) -> FastAPI:
    "The web application for one model. Every route but /health wants `Authorization: Bearer <key>`."
    if not key:
        raise LabError('the server needs a key; set K2LAB_API_KEY')
    app = FastAPI(
        title='K2 Lab', docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.add_middleware(Guard, key=key)
    app.exception_handler(Refused)(lambda _, e: complaint(e.status, str(e), e.param))
    app.exception_handler(ClientDisconnect)(lambda _, e: complaint(499, 'the client has gone'))
    app.exception_handler(HTTPException)(
        lambda request, e: complaint(
            e.status_code, f'{request.method} {request.url.path}: {e.detail}', None, e.headers
        )
    )
    app.exception_handler(Exception)(
        lambda _, e: complaint(500, f'{type(e).__name__} in the server')
    )
    add_routes(app, Engine(model, tok, name))
    return app


def add_routes(app: FastAPI, engine: Engine):
    "The routes."
    began = int(time.time())

    def card() -> dict:
        about = dict(id=engine.name, object='model', created=began, owned_by='k2lab')
        about |= dict(root=engine.name, parent=None, max_model_len=engine.length)
        return about | dict(placement=placement_of(engine.model) | dict(attention=engine.attention))

    @app.get('/health')
    def health():
        return dict(status='ok')

    @app.get('/version')
    def version():
        from k2lab import __version__

        return dict(version=__version__)

    @app.get('/v1/models')
    def models():
        return dict(object='list', data=[card()])

    @app.get('/v1/models/{name:path}')
    def model(name: str):
        engine.known(name)
        return card()

    for path, kind, work in (
        ('/tokenize', TokenizeAsk, tokenized),
        ('/detokenize', DetokenizeAsk, detokenized),
    ):
        app.add_route(path, partial(asked, engine, kind, work), methods=['POST'])
    for path, kind, plan, shape in (
        ('/v1/completions', CompletionAsk, completion_runs, responses.completion),
        ('/v1/chat/completions', ChatAsk, chat_runs, responses.chat_completion),
    ):
        app.add_route(path, partial(answered, engine, kind, plan, shape), methods=['POST'])


def serve(place, name: str, host: str = '127.0.0.1', port: int = 8000, key: str = ''):
    "Serve the checkpoint at `place` until stopped (SIGTERM or Ctrl-C), also in the middle of an answer."
    import uvicorn

    from k2lab.models.load import as_stored, open_model, open_tokenizer

    device = device_for()
    model = open_model(place, as_stored(place, device), device)
    uvicorn.run(
        create_app(model, open_tokenizer(place), name, key),
        host=host,
        port=port,
        log_level='warning',
        timeout_graceful_shutdown=0,  # answers that are under way are cut off
    )


def main(words=None):
    "The command line of `python -m k2lab.serving.server`."
    from pathlib import Path

    ask = argparse.ArgumentParser(
        prog='python -m k2lab.serving.server',
        description='Serve a small model with an OpenAI-compatible API; the key comes from $K2LAB_API_KEY.',
    )
    ask.add_argument('place', help='folder of a checkpoint, or a hub id')
    for flag, default, kind in (
        ('name', 'k2lab', str),
        ('host', '127.0.0.1', str),
        ('port', 8000, int),
    ):
        ask.add_argument(f'--{flag}', default=default, type=kind)
    got = ask.parse_args(words)
    serve(
        Path(got.place) if Path(got.place).exists() else got.place,
        got.name,
        got.host,
        got.port,
        os.environ.get('K2LAB_API_KEY', ''),
    )


if __name__ == '__main__':
    main()
