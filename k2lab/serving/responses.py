"""The answers of the embedded server in vLLM's shapes, whole and as server-sent events.

Both are made of the same pieces by the same reader of replies; a stream is never told anything that a whole answer
does not hold."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from itertools import accumulate
from typing import Any

from k2lab.serving.client import join_calls
from k2lab.serving.drafts import Draft, Odds
from k2lab.serving.engine import Engine, News, Run
from k2lab.serving.protocol import Refused, one_line
from k2lab.text.chat import opened_thought, reply_message


def head(kind: str, engine: Engine) -> dict:
    "What every answer begins with."
    made = dict(id=f'k2lab-{secrets.token_hex(8)}', object=kind, created=int(time.time()))
    return made | dict(model=engine.name)


def usage(runs: list[Run]) -> dict:
    "OpenAI's token counts; the token that ends an answer is not counted."
    prompt = sum(len(run.ids) for run in runs)
    new = sum(len(draft.ids) for run in runs for draft in run.drafts)
    return dict(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)


def error_body(status: int, message: str, param: str | None = None) -> dict:
    "An error in OpenAI's shape."
    kind = 'internal_error' if status >= 500 else 'invalid_request_error'
    return dict(error=dict(message=message, type=kind, param=param, code=status))


def failure(error: BaseException) -> Refused:
    "What a client is told about an answer that could not be computed."
    return Refused(500, one_line(f'the model failed: {type(error).__name__}: {error}'))


def token_text(engine: Engine, token: int, as_id: bool) -> str:
    "How an answer names a token: by its text or, always exact, by id."
    return f'token_id:{token}' if as_id else engine.tok.decode([token])


def logprobs_block(engine: Engine, ask, ids: list, kept: list[Odds | None], start: int = 0) -> dict:
    "OpenAI's `logprobs` of a completion for `ids`, chosen tokens among the top; None for a first token's odds."
    name = lambda token: token_text(engine, token, ask.return_tokens_as_token_ids)
    texts, tops, chosen = [name(i) for i in ids], [], []
    for text, one in zip(texts, kept):
        best = one and {name(i): p for i, p in one.best.items()} | {text: one.own}
        tops.append(best)
        chosen.append(one and one.own)
    offsets = [*accumulate(map(len, texts), initial=start)][: len(ids)]
    return dict(tokens=texts, token_logprobs=chosen, top_logprobs=tops, text_offset=offsets)


def content_logprobs(engine: Engine, ask, ids: list, kept: list[Odds]) -> dict:
    "OpenAI's `logprobs` of a chat answer for `ids`."

    def entry(token: int, p: float) -> dict:
        text, real = token_text(engine, token, ask.return_tokens_as_token_ids), [token]
        return dict(token=text, logprob=p, bytes=list(engine.tok.decode(real).encode()))

    return dict(
        content=[
            entry(i, one.own) | dict(top_logprobs=[entry(*pair) for pair in one.best.items()])
            for i, one in zip(ids, kept)
        ]
    )


class Choice:
    "One answer of a completion as it is told, from its prompt's echo on."

    def __init__(self, engine: Engine, run: Run, index: int):
        self.engine, self.run, self.index = engine, run, index
        self.count = self.letters = 0  # tokens and characters of token names that were told
        self.begun = False

    def part(self, text: str, draft: Draft, count: int, finish: str | None) -> dict:
        "What came since the last part, up to `count` tokens."
        ask, first, self.begun = self.run.ask, not self.begun, True
        ids, kept = draft.ids[self.count : count], draft.odds[self.count : count]
        if ask.echo and first:
            text = self.engine.tok.decode(self.run.ids) + text
            ids, kept = self.run.ids + ids, [*self.run.before, *kept]
        if ask.echo and finish and draft.end:
            # as in vLLM: who reads echoed tokens counts on all that were generated
            ids, kept = [*ids, draft.end[0]], [*kept, draft.end[1]]
        block = None
        if ask.top is not None:
            block = logprobs_block(self.engine, ask, ids, kept, self.letters)
            self.letters += sum(map(len, block['tokens']))
        self.count = count
        said = dict(index=self.index, text=text, logprobs=block, finish_reason=finish)
        return said | dict(stop_reason=draft.stop_reason if finish else None)


class Message:
    "One answer to a conversation as it is told."

    def __init__(self, engine: Engine, run: Run, index: int):
        self.engine, self.run, self.index, self.count = engine, run, index, 0
        self.reader, self.calls = reply_reader(run.ask.tools), False
        opened = opened_thought(engine.tok.decode(run.ids[-8:]))
        self.waiting = self._read(opened) if opened else []

    def _read(self, text: str) -> list[dict]:
        return self.reader.feed(text) if text else []

    def deltas(self, text: str, finish: str | None) -> list[dict]:
        "What a piece of text adds, thoughts under both names."
        found = [*self.waiting, *self._read(text), *(self.reader.close() if finish else [])]
        self.waiting = []
        self.calls = self.calls or any(d.get('tool_calls') for d in found)
        return [d | dict(reasoning_content=d['reasoning']) if 'reasoning' in d else d for d in found]

    def logprobs(self, draft: Draft, count: int) -> dict | None:
        "The log-probabilities of the tokens that came since the last call."
        if self.run.ask.top is None:
            return None
        at, self.count = self.count, count
        return content_logprobs(
            self.engine, self.run.ask, draft.ids[at:count], draft.odds[at:count]
        )

    def ending(self, draft: Draft) -> dict:
        "Why the answer ended."
        reason = 'tool_calls' if self.calls else draft.finish
        return dict(finish_reason=reason, stop_reason=draft.stop_reason)

    def parts(self, text: str, draft: Draft, count: int, finish: str | None) -> Iterator[dict]:
        "The choices of chunks for a piece of text."
        deltas = self.deltas(text, finish)
        logprobs = self.logprobs(draft, count) if deltas or finish else None
        for delta in [*deltas, *([{}] if finish else [])]:
            end = self.ending(draft) if finish and not delta else dict(finish_reason=None)
            yield dict(index=self.index, delta=delta, logprobs=logprobs) | end
            logprobs = None

    def whole(self, draft: Draft) -> dict:
        "The choice of a whole answer."
        message, calls = dict(role='assistant', content=None), []
        for delta in self.deltas(draft.text, draft.finish):
            for key, value in delta.items():
                if key == 'tool_calls':
                    join_calls(calls, value)
                else:
                    message[key] = (message.get(key) or '') + value
        if calls:
            message['tool_calls'] = [{k: v for k, v in c.items() if k != 'index'} for c in calls]
        elif message['content'] is None:
            message['content'] = ''
        logprobs = self.logprobs(draft, len(draft.ids))
        return dict(index=self.index, message=message, logprobs=logprobs) | self.ending(draft)


def numbered(runs: list[Run]) -> Iterator[tuple[int, Run, Draft]]:
    "The drafts of finished runs, numbered over all of them."
    drafts = [(run, draft) for run in runs for draft in run.drafts]
    return ((i, *pair) for i, pair in enumerate(drafts))


def completion(engine: Engine, runs: list[Run]) -> dict:
    "A whole answer to /v1/completions."
    choices = [
        Choice(engine, run, i).part(draft.text, draft, len(draft.ids), draft.finish)
        for i, run, draft in numbered(runs)
    ]
    return head('text_completion', engine) | dict(choices=choices, usage=usage(runs))


def chat_completion(engine: Engine, runs: list[Run]) -> dict:
    "A whole answer to /v1/chat/completions."
    choices = [Message(engine, run, i).whole(draft) for i, run, draft in numbered(runs)]
    return head('chat.completion', engine) | dict(choices=choices, usage=usage(runs))


def event(data) -> str:
    "A server-sent event; ASCII only, since many clients take U+2028 for the end of a line."
    return f'data: {data if isinstance(data, str) else json.dumps(data)}\n\n'


async def stream(engine: Engine, runs: list[Run], news: AsyncIterator) -> AsyncIterator[str]:
    "The events of a streamed answer, from the `(number of the run, News)` of its runs."
    chat = hasattr(runs[0].ask, 'messages')
    base = head('chat.completion.chunk' if chat else 'text_completion', engine)
    chunk = lambda *choices, **more: event(base | dict(choices=list(choices)) | more)
    n, kind = runs[0].ask.n, Message if chat else Choice
    told: Any = [kind(engine, run, k * n + i) for k, run in enumerate(runs) for i in range(n)]
    for i in range(len(told) if chat else 0):
        yield chunk(dict(index=i, delta=dict(role='assistant', content=''), finish_reason=None))
    async for k, one in news:
        for part in parts(told[k * n + one.index], runs[k].drafts[one.index], one):
            yield chunk(part)
    if error := next((e for run in runs if (e := run.done.exception())), None):
        yield event(error_body(500, str(failure(error))))
    elif runs[0].ask.usage_in_stream:
        yield chunk(usage=usage(runs))
    yield event('[DONE]')


def parts(told: Choice | Message, draft: Draft, one: News) -> Iterator[dict]:
    "The choices of chunks for what one step added."
    how = (one.text, draft, one.count, one.finish)
    return iter([told.part(*how)]) if isinstance(told, Choice) else told.parts(*how)


TAGS = ('<think>', '</think>', '<|tool_calls_section_begin|>', '<tool_call>')


def settled(text: str) -> dict:
    "`{'reasoning', 'content'}` that no later token can change: no half tags."
    held = max((n for tag in TAGS for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)
    text = text[: len(text) - held] if held else text
    for tag in TAGS[2:]:
        text = text.partition(tag)[0]
    message = reply_message(text.rstrip())
    return dict(
        reasoning=message.get('reasoning_content') or '', content=message.get('content') or ''
    )


class Reader:
    "Reads a reply that comes in pieces."

    def __init__(self):
        self.text, self.sent = '', dict(reasoning='', content='')

    def _new(self, now: dict) -> list[dict]:
        found = []
        for key, old in self.sent.items():
            new = now.get(key) or ''
            if len(new) > len(old):
                found.append({key: new[len(old) :]})
                self.sent[key] = new
        return found

    def feed(self, text: str) -> list[dict]:
        self.text += text
        return self._new(settled(self.text))

    def close(self) -> list[dict]:
        message = reply_message(self.text)
        now = dict(reasoning=message.get('reasoning_content'), content=message.get('content'))
        calls = [dict(c, index=i) for i, c in enumerate(message.get('tool_calls', []))]
        return [*self._new(now), *([dict(tool_calls=calls)] if calls else [])]


def reply_reader(tools: list[dict]):
    "What turns the text of a reply into OpenAI's deltas, piece by piece."
    return Reader()
