"""A small OpenAI-compatible server for small models: FastAPI in front of transformers.

It speaks the part of vLLM's wire format that the lab uses, on a machine without a GPU:
completions (text or token ids, echo, log-probabilities, n, stop), chat (tools, reasoning,
streaming), /tokenize, /v1/models, /health. Unknown fields are refused by name, never ignored.
One request is computed at a time. `python -m k2lab.serving.server PLACE --name NAME`, with the key in $K2LAB_API_KEY.
"""

import argparse
import json
import os
import secrets
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from k2lab.lab.config import LabError
from k2lab.models.placement import device_for, placement_of
from k2lab.text.calls import reply_message
from k2lab.text.chat import end_ids, prompt_ids
from k2lab.training.metrics import reduced_logits

TAGS = ('<think>', '</think>', '<|tool_calls_section_begin|>', '<tool_call>')


class Ask(BaseModel):
    "The fields that both kinds of request share."

    model_config = ConfigDict(extra='forbid')
    model: str | None = None
    n: int = Field(1, ge=1, le=64)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=0)
    stop: str | list[str] = []
    seed: int | None = None


class CompletionAsk(Ask):
    "A request to /v1/completions."

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    # 'token_id:17' for a token's text: pieces of a character have no text of their own
    return_tokens_as_token_ids: bool = False
    stream: Literal[False] = False


class StreamOptions(BaseModel):
    "What a stream carries besides text."

    model_config = ConfigDict(extra='forbid')
    include_usage: bool = False


class ChatAsk(Ask):
    "A request to /v1/chat/completions."

    messages: list[dict]
    tools: list[dict] | None = None
    tool_choice: Literal['auto'] = 'auto'
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class TokenizeAsk(BaseModel):
    "A request to /tokenize: a text, or messages with the generation prompt after them."

    model_config = ConfigDict(extra='forbid')
    model: str | None = None
    prompt: str | None = None
    messages: list[dict] | None = None
    tools: list[dict] | None = None
    add_generation_prompt: Literal[True] = True


@dataclass(frozen=True)
class Odds:
    "What is kept of a token's log-probabilities, of which K2's vocabulary has 163,840."

    own: float  # of the token itself
    best: dict[int, float]  # of the likeliest tokens


def odds(packed) -> list[Odds]:
    "The odds in rows of `packed_odds`."
    top, rows = packed.shape[-1] // 2, packed.tolist()
    return [Odds(r[0], dict(zip(map(int, r[1 + top :]), r[1 : 1 + top]))) for r in rows]


def packed_odds(logits, ids, top: int):
    "`[..., 1 + 2 top]` in float64 from logits [..., vocabulary]: of the ids [...], of the best, and which these are."
    import torch

    logp = torch.log_softmax(logits.float(), -1)  # as in vLLM: before temperature
    best = logp.topk(top)
    own = logp.gather(-1, ids[..., None])
    return torch.cat([own.double(), best.values.double(), best.indices.double()], -1)


class Draft:
    "One answer while it grows."

    def __init__(self, tok, ends, stop):
        self.tok, self.ends, self.stop = tok, ends, [stop] if isinstance(stop, str) else stop
        self.ids, self.odds, self.text, self.finish = [], [], '', None
        self.end: tuple = ()  # the token that ended the answer, and its odds

    def add(self, token: int, odds: Odds | None):
        "Take the next token and its odds, if they were asked for, or end here."
        if token in self.ends:
            self.finish, self.end = 'stop', (token, odds)
            return
        self.ids.append(token)
        self.odds.append(odds)
        self.text = self.tok.decode(self.ids)
        at = min((i for i in map(self.text.find, self.stop) if i >= 0), default=None)
        if at is not None:
            self.text, self.finish = self.text[:at], 'stop'


def choose(logits, ask: Ask, generator):
    "One token for each row of `logits` [n, vocabulary]: the best at temperature 0, else sampled from the `top_p` part."
    import torch

    if ask.temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.float() / ask.temperature, -1)
    ordered, index = p.sort(-1, descending=True)
    ordered = ordered * (
        ordered.cumsum(-1) - ordered < ask.top_p
    )  # drop a token when those before it already hold top_p
    return index.gather(-1, torch.multinomial(ordered, 1, generator=generator)).squeeze(-1)


def write(engine, ids: list, ask: Ask, limit: int):
    "Grow `ask.n` drafts after the prompt `ids`, one token at a time; yields the list of drafts after each."
    import torch

    generator = torch.Generator(engine.model.device)
    generator.manual_seed(secrets.randbits(62) if ask.seed is None else ask.seed)
    drafts, cache = [Draft(engine.tok, engine.ends, ask.stop) for _ in range(ask.n)], None
    top = ask.logprobs if isinstance(ask, CompletionAsk) else None
    step = torch.tensor([ids] * ask.n, device=engine.model.device)
    with engine.lock:
        for _ in range(limit):
            with torch.inference_mode():
                out = engine.model(
                    input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            logits, cache = out.logits[:, -1], out.past_key_values
            new = choose(logits, ask, generator)
            kept = [None] * ask.n if top is None else odds(packed_odds(logits, new, top))
            for draft, token, one in zip(drafts, new.tolist(), kept):
                if not draft.finish:
                    draft.add(token, one)
            yield drafts
            if all(d.finish for d in drafts):
                break
            step = new[:, None]
    for d in drafts:
        d.finish = d.finish or 'length'
    yield drafts


class Engine:
    "A model, its tokenizer, and what the routes need to know about them."

    def __init__(self, model, tok, name: str):
        self.model, self.tok, self.name, self.lock = model.eval(), tok, name, threading.Lock()
        self.ends, self.length = set(end_ids(tok)), model.config.max_position_embeddings

    def prompt(self, messages, tools=None) -> list:
        "Token ids of a conversation, generation prompt included; what a user typed never becomes a control token."
        return prompt_ids(self.tok, messages, tools)

    def limit(self, ids: list, ask: Ask, default: int | None) -> int:
        "How many tokens may follow the prompt; 404 for another model's name, 400 if prompt and answer do not fit."
        if ask.model not in (None, self.name):
            raise HTTPException(404, f'no model {ask.model!r}; this server has {self.name!r}')
        room = self.length - len(ids)
        wanted = ask.max_tokens if ask.max_tokens is not None else min(default or room, room)
        if not ids or wanted > room:
            raise HTTPException(
                400,
                f'{len(ids)} prompt tokens and {wanted} to generate do not fit: from 1 to {self.length} in all',
            )
        return wanted

    def prompt_odds(self, ids: list, top: int) -> list[Odds]:
        "The odds of each prompt token after the first."
        import torch

        row = torch.tensor([ids], device=self.model.device)
        with self.lock:
            packed = reduced_logits(self.model, row, reduce=partial(packed_odds, top=top))
        return odds(packed[0, :-1])

    def usage(self, prompt: int, new: int) -> dict:
        "OpenAI's token counts."
        return dict(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)


def token_texts(engine, ids: list, as_ids: bool) -> list:
    "How the answer names tokens: by their text or, always exact, by id."
    return [f'token_id:{i}' if as_ids else engine.tok.decode([i]) for i in ids]


def logprobs_block(engine, ask: CompletionAsk, ids: list, kept: list) -> dict:
    "OpenAI's `logprobs` object for `ids`, chosen tokens among the top; the odds of a first token are None."
    texts = token_texts(engine, ids, ask.return_tokens_as_token_ids)
    tops, chosen = [], []
    for text, one in zip(texts, kept):
        if one is None:
            tops.append(None)
            chosen.append(None)
            continue
        best = token_texts(engine, list(one.best), ask.return_tokens_as_token_ids)
        chosen.append(one.own)
        tops.append({**dict(zip(best, one.best.values())), text: one.own})
    offsets = [sum(map(len, texts[:k])) for k in range(len(texts))]
    return dict(tokens=texts, token_logprobs=chosen, top_logprobs=tops, text_offset=offsets)


def completion_choice(
    engine, ask: CompletionAsk, index: int, prompt: list, before: list, draft: Draft
) -> dict:
    "One choice of a completion; `before` holds the odds of the prompt's tokens when they are echoed."
    text, ids, kept = draft.text, draft.ids, draft.odds
    if ask.echo:
        text, ids, kept = engine.tok.decode(prompt) + text, prompt + ids, before + kept
        if draft.end:  # as in vLLM: who reads echoed tokens counts on all that were generated
            ids, kept = [*ids, draft.end[0]], [*kept, draft.end[1]]
    logprobs = None if ask.logprobs is None else logprobs_block(engine, ask, ids, kept)
    return dict(index=index, text=text, logprobs=logprobs, finish_reason=draft.finish)


def complete(engine, ask: CompletionAsk) -> dict:
    "The answer to /v1/completions."
    prompts: Any = (
        [ask.prompt]
        if isinstance(ask.prompt, str) or (ask.prompt and isinstance(ask.prompt[0], int))
        else ask.prompt
    )
    ids = [
        engine.tok(p, add_special_tokens=False).input_ids if isinstance(p, str) else p
        for p in prompts
    ]  # as in vLLM, control tokens in a raw prompt count
    bad = [i for p in ids for i in p if not 0 <= i < len(engine.tok)]
    if bad:
        raise HTTPException(400, f'token id {bad[0]} is not in the vocabulary of {len(engine.tok)}')
    choices, new, limits = [], 0, [engine.limit(p, ask, 16) for p in ids]
    for p, limit in zip(ids, limits):
        before = (
            [None, *engine.prompt_odds(p, ask.logprobs)]
            if ask.echo and ask.logprobs is not None
            else [None] * len(p)
        )
        *_, drafts = write(engine, p, ask, limit)
        for d in drafts:
            choices.append(completion_choice(engine, ask, len(choices), p, before, d))
        new += sum(len(d.ids) for d in drafts)
    return head('text_completion', engine) | dict(
        choices=choices, usage=engine.usage(sum(map(len, ids)), new)
    )


def head(kind: str, engine) -> dict:
    "What every answer begins with."
    return dict(
        id=f'k2lab-{secrets.token_hex(8)}', object=kind, created=int(time.time()), model=engine.name
    )


def chat(engine, ask: ChatAsk, ids: list, limit: int) -> dict:
    "The answer to /v1/chat/completions."
    *_, drafts = write(engine, ids, ask, limit)
    choices = []
    for i, d in enumerate(drafts):
        message = reply_message(d.text)
        choices.append(
            dict(
                index=i,
                message=message,
                finish_reason='tool_calls' if message.get('tool_calls') else d.finish,
            )
        )
    return head('chat.completion', engine) | dict(
        choices=choices, usage=engine.usage(len(ids), sum(len(d.ids) for d in drafts))
    )


def settled(text: str) -> dict:
    "`{'reasoning_content', 'content'}` that no later token can change: no half characters or tags."
    text = text.rstrip('\ufffd')
    held = max((n for tag in TAGS for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)
    text = text[: len(text) - held] if held else text
    for tag in TAGS[2:]:
        text = text.partition(tag)[0]
    message = reply_message(text.rstrip())
    return {k: message.get(k) or '' for k in ('reasoning_content', 'content')}


def deltas(engine, ids: list, ask: ChatAsk, limit: int):
    "The pieces of a streamed answer: `(delta, finish_reason)`, then `(None, new tokens)`."
    sent = dict(reasoning_content='', content='')
    yield dict(role='assistant'), None
    for (draft,) in write(engine, ids, ask, limit):
        now = reply_message(draft.text) if draft.finish else settled(draft.text)
        for key, old in sent.items():
            new = now.get(key) or ''
            if len(new) > len(old):
                yield {key: new[len(old) :]}, None
                sent[key] = new
        if draft.finish:
            break
    calls = [dict(c, index=i) for i, c in enumerate(now.get('tool_calls', []))]
    yield (dict(tool_calls=calls) if calls else {}), 'tool_calls' if calls else draft.finish
    yield None, len(draft.ids)


def stream_chat(engine, ask: ChatAsk, ids: list, limit: int):
    "Server-sent events of a streamed answer."
    base = head('chat.completion.chunk', engine)
    event = lambda **kw: f'data: {json.dumps(base | kw, ensure_ascii=False)}\n\n'
    for delta, end in deltas(engine, ids, ask, limit):
        if delta is not None:
            yield event(choices=[dict(index=0, delta=delta, finish_reason=end)])
        elif ask.stream_options.include_usage:
            yield event(choices=[], usage=engine.usage(len(ids), end))
    yield 'data: [DONE]\n\n'


def complaint(status: int, message: str) -> JSONResponse:
    "An error in OpenAI's shape."
    return JSONResponse(
        dict(error=dict(message=message, type='invalid_request_error', code=status)), status
    )


def invalid(errors: list) -> str:
    "One line for a request that does not fit: unknown fields first, by name."
    unknown = sorted({str(e['loc'][-1]) for e in errors if e['type'] == 'extra_forbidden'})
    if unknown:
        return f"unsupported field {', '.join(unknown)}"
    return '; '.join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in errors)


def create_app(model, tok, name: str, key: str) -> FastAPI:
    "The web application for one model. Every route but /health wants `Authorization: Bearer <key>`."
    if not key:
        raise LabError('the server needs a key; set K2LAB_API_KEY')
    engine, app = (
        Engine(model, tok, name),
        FastAPI(title='K2 Lab', docs_url=None, redoc_url=None, openapi_url=None),
    )
    app.exception_handler(HTTPException)(lambda _, e: complaint(e.status_code, e.detail))
    app.exception_handler(LabError)(lambda _, e: complaint(400, str(e)))
    app.exception_handler(RequestValidationError)(lambda _, e: complaint(400, invalid(e.errors())))

    def known(request: Request):
        if not secrets.compare_digest(
            request.headers.get('authorization', '').encode(), f'Bearer {key}'.encode()
        ):
            raise HTTPException(401, 'wrong or missing key')

    add_routes(app, engine, [Depends(known)])
    return app


def add_routes(app: FastAPI, engine: Engine, guard: list):
    "The routes; `guard` is what all but /health depend on."

    @app.get('/health')
    def health():
        return dict(status='ok')

    @app.get('/v1/models', dependencies=guard)
    def models():
        about = dict(id=engine.name, object='model', owned_by='k2lab', max_model_len=engine.length)
        return dict(object='list', data=[about | dict(placement=placement_of(engine.model))])

    @app.post('/v1/completions', dependencies=guard)
    def completions(ask: CompletionAsk):
        return complete(engine, ask)

    @app.post('/v1/chat/completions', dependencies=guard)
    def chat_completions(ask: ChatAsk):
        if ask.stream and ask.n > 1:
            raise HTTPException(400, 'n must be 1 in a stream')
        ids = engine.prompt(ask.messages, ask.tools)
        limit = engine.limit(
            ids, ask, None
        )  # before the first byte of a stream, while an error can still be one
        return (
            StreamingResponse(stream_chat(engine, ask, ids, limit), media_type='text/event-stream')
            if ask.stream
            else chat(engine, ask, ids, limit)
        )

    @app.post('/tokenize', dependencies=guard)
    def tokenize(ask: TokenizeAsk):
        if (ask.prompt is None) == (ask.messages is None):
            raise HTTPException(400, 'give either prompt or messages')
        ids = (
            engine.prompt(ask.messages, ask.tools)
            if ask.prompt is None
            else engine.tok(ask.prompt, add_special_tokens=False).input_ids
        )
        return dict(tokens=ids, count=len(ids), max_model_len=engine.length)


def serve(place, name: str, host: str = '127.0.0.1', port: int = 8000, key: str = ''):
    "Serve the checkpoint at `place` until stopped (SIGTERM or Ctrl-C)."
    import uvicorn

    from k2lab.models.load import as_stored, open_model, open_tokenizer

    device = device_for()
    model = open_model(place, as_stored(place, device), device)
    uvicorn.run(
        create_app(model, open_tokenizer(place), name, key),
        host=host,
        port=port,
        log_level='warning',
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
