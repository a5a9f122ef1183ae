"""The answers of the embedded server in vLLM's shapes, whole and as server-sent events.

Both are made of the same pieces by the same reader of replies; a stream is never told anything that a whole answer
does not hold."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from itertools import accumulate
from typing import Any

from k2lab.serving.drafts import Draft, Odds
from k2lab.serving.engine import Engine, News, Run
from k2lab.serving.protocol import Refused, one_line
from k2lab.text.calls import ReplyReader, joined, message_of
from k2lab.text.chat import opened_thought


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


def logprobs_block(engine: Engine, ask, ids: list, kept: list, start: int = 0) -> dict:
    "OpenAI's `logprobs` of a completion for `ids`, chosen tokens among the top; None for a first token's `Odds`."
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


def named_twice(message: dict) -> dict:
    "A message or a part of one with its thoughts under the present name and the one before January 2026."
    for one, other in (('reasoning', 'reasoning_content'), ('reasoning_content', 'reasoning')):
        if one in message:
            return message | {other: message[one]}
    return message


class Message:
    "One answer to a conversation as it is told."

    def __init__(self, engine: Engine, run: Run, index: int):
        self.engine, self.run, self.index, self.count = engine, run, index, 0
        opened = bool(opened_thought(engine.tok.decode(run.ids[-8:])))
        self.reader = ReplyReader([] if run.ask.tool_choice == 'none' else run.ask.tools, opened)
        self.calls = False

    def deltas(self, text: str, finish: str | None) -> list[dict]:
        "What a piece of text adds."
        found = [*self.reader.feed(text), *(self.reader.close() if finish else [])]
        self.calls = self.calls or any(d.get('tool_calls') for d in found)
        return found

    def logprobs(self, draft: Draft, count: int) -> dict | None:
        "The log-probabilities of the tokens that came since the last call."
        if self.run.ask.top is None:
            return None
        at, self.count = self.count, count
        return content_logprobs(
            self.engine, self.run.ask, draft.ids[at:count], draft.odds[at:count]
        )

    def ending(self, draft: Draft) -> dict:
        "Why the answer ended, and what of it was neither thought, content nor call."
        reason = 'tool_calls' if self.calls else draft.finish
        left = dict(unread=self.reader.unread) if self.reader.unread else {}
        return dict(finish_reason=reason, stop_reason=draft.stop_reason) | left

    def parts(self, text: str, draft: Draft, count: int, finish: str | None) -> Iterator[dict]:
        "The choices of chunks for a piece of text."
        deltas = [named_twice(delta) for delta in self.deltas(text, finish)]
        logprobs = self.logprobs(draft, count) if deltas or finish else None
        for delta in [*deltas, *([{}] if finish else [])]:
            end = self.ending(draft) if finish and not delta else dict(finish_reason=None)
            yield dict(index=self.index, delta=delta, logprobs=logprobs) | end
            logprobs = None

    def whole(self, draft: Draft) -> dict:
        "The choice of a whole answer."
        message = named_twice(message_of(joined(self.deltas(draft.text, draft.finish))))
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
