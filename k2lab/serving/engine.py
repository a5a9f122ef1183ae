"""One thread that computes the answers of all requests: rows of several requests in one batch, or batches in turn.

After each token every request may leave, and a new one may enter. Requests share a batch where that changes no answer
but by rounding in float32; where it would (16 bits, a cache that is no plain list of keys), they take turns.
"""

import secrets
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from functools import partial
from typing import Any

from k2lab.lab.config import LabError
from k2lab.models.mla import from_latents
from k2lab.serving.drafts import Draft, Odds, Rules, choose, odds, packed_odds
from k2lab.serving.protocol import Refused, one_line, shown
from k2lab.text.chat import encode, end_ids, prompt_ids
from k2lab.training.metrics import reduced_logits

ROWS = 64  # answers that are computed at the same time; others wait
IDLE_S = 60  # seconds after which a thread without work ends


@dataclass(frozen=True)
class News:
    "What one step added to an answer: its index, text, tokens so far, and why it ended if it did."

    index: int
    text: str
    count: int
    finish: str | None


class Run:
    "One prompt and the answers to it. `done` gives the list of drafts; who cancels it leaves."

    def __init__(self, ids: list[int], ask, limit: int, rules: Rules | None = None):
        self.ids, self.ask, self.limit, self.rules = ids, ask, limit, rules or Rules()
        self.drafts: list[Draft] = []
        self.before: list[Odds | None] = []  # of the prompt's tokens, when they are echoed
        self.done: Future = Future()
        self.on_news: Callable[[News], None] | None = None  # called by the engine's thread
        self.told: list[int] = []  # pieces of each draft that were sent

    def begin(self, engine):
        "Make the drafts; each has a generator of its own, so that no answer depends on the others."
        import torch

        seed = secrets.randbits(62) if self.ask.seed is None else self.ask.seed
        for i in range(self.ask.n):
            generator = torch.Generator(engine.model.device)
            generator.manual_seed(((seed + i + 2**63) % 2**64) - 2**63)
            stops = self.ask.stop
            self.drafts.append(Draft(engine.tok, engine.ends, stops, self.rules, generator))
        self.told = [0] * self.ask.n

    def take(self, logits):
        "Add the next token to each draft that has a row of `logits`, in order."
        import torch

        rows = [d for d in self.drafts if not d.finish]
        tokens, top = choose(logits, rows, self.ask), self.ask.top
        kept: list[Any] = [None] * len(rows)
        if top is not None:
            kept = odds(packed_odds(logits, torch.tensor(tokens, device=logits.device), top))
        for draft, token, one in zip(rows, tokens, kept):
            draft.add(token, one)
            if not draft.finish and len(draft.ids) >= self.limit:
                draft.close('length')
        self.tell()

    def tell(self):
        "Pass on what is new."
        if not (tell := self.on_news):
            return
        for i, draft in enumerate(self.drafts):
            new = draft.pieces[self.told[i] :]
            if self.told[i] >= 0 and (any(new) or draft.finish):
                tell(News(i, ''.join(new), len(draft.ids), draft.finish))
                self.told[i] = -1 if draft.finish else len(draft.pieces)

    def live(self) -> list[Draft]:
        "The drafts that go on; none if nobody waits for them any more."
        return [] if self.done.done() else [d for d in self.drafts if not d.finish]

    def end(self, error: BaseException | None = None):
        "Hand over the drafts, or the reason why there are none."
        try:
            self.done.set_exception(error) if error else self.done.set_result(self.drafts)
        except InvalidStateError:
            pass  # nobody waits any more


class Batch:
    "Rows of one or more runs that are computed together, in the order of their runs; padded on the left."

    def __init__(self, run: Run, cache):
        self.runs, self.rows, self.cache = [run], list(run.drafts), cache
        self.tokens = last_tokens(self.rows)  # those that the model has not read yet
        self.pads = [0] * len(self.rows)  # cached positions before each row's first
        self.length = len(run.ids)  # of the cache
        self.drop()

    def drop(self):
        "Let the rows go that have ended or that nobody waits for."
        live = {id(d) for run in self.runs for d in run.live()}
        keep = [i for i, row in enumerate(self.rows) if id(row) in live]
        if len(keep) < len(self.rows):
            self._keep(keep)
            self.runs = [run for run in self.runs if run.live()]

    def _keep(self, keep: list[int]):
        import torch

        self.rows = [self.rows[i] for i in keep]
        self.tokens = [self.tokens[i] for i in keep]
        self.pads = [self.pads[i] for i in keep]
        if keep:
            self.cache.batch_select_indices(torch.tensor(keep))
            self._cut(min(self.pads))

    def _cut(self, n: int):
        "Take away the first `n` positions of the cache, which no row uses."
        if n:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[..., n:, :], layer.values[..., n:, :]
            self.pads, self.length = [p - n for p in self.pads], self.length - n

    def join(self, other: 'Batch'):
        "Take in the rows of another batch."
        import torch

        length, layers = max(self.length, other.length), self.cache.layers
        both = lambda *parts: torch.cat([padded(part, length) for part in parts])
        joined = [
            (both(a.keys, b.keys), both(a.values, b.values))
            for a, b in zip(layers, other.cache.layers)
        ]
        for layer, (keys, values) in zip(layers, joined):
            layer.keys, layer.values = keys, values
        self.pads = [p + length - b.length for b in (self, other) for p in b.pads]
        self.length, self.rows = length, self.rows + other.rows
        self.runs, self.tokens = self.runs + other.runs, self.tokens + other.tokens

    def places(self, device) -> dict:
        "The mask and positions for the next token, where rows are padded."
        import torch

        if not any(self.pads):
            return {}
        pads = torch.tensor(self.pads, device=device)[:, None]
        mask = torch.arange(self.length + 1, device=device)[None] >= pads
        return dict(attention_mask=mask.long(), position_ids=self.length - pads)

    def step(self, model):
        "One more token for each row."
        import torch

        last = torch.tensor(self.tokens, device=model.device)[:, None]
        places = self.places(model.device)
        out = model(
            input_ids=last, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **places
        )
        self.cache, self.length = out.past_key_values, self.length + 1
        logits, at = out.logits[:, -1], 0
        for run in self.runs:
            n = sum(not draft.finish for draft in run.drafts)
            run.take(logits[at : at + n])
            at += n
        self.tokens = last_tokens(self.rows)


def last_tokens(rows: list[Draft]) -> list[int]:
    "The newest token of each draft; any for those that ended before their first."
    return [(row.ids or [0])[-1] for row in rows]


def padded(part, length: int):
    "A layer's keys or values [rows, heads, positions, size] with zeros before them, up to a length."
    import torch

    return torch.nn.functional.pad(part, (0, 0, length - part.shape[-2], 0))


def shareable(cache) -> bool:
    "Whether rows of several requests may lie in one cache: keys of all positions, in float32."
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer and layer.dtype == torch.float32 for layer in cache.layers
    )


class Engine:
    "A model, its tokenizer, and the thread that computes with them while there is work."

    def __init__(self, model, tok, name: str):
        self.model, self.tok, self.name = model.eval(), tok, name
        self.ends, self.length = set(end_ids(tok)), model.config.max_position_embeddings
        self.attention = model.config._attn_implementation  # another while it computes from latents
        self.waiting: deque[Run] = deque()
        self.batches: list[Batch] = []
        self.changed, self.running = threading.Condition(), False

    def submit(self, run: Run) -> Run:
        "Queue a run."
        with self.changed:
            self.waiting.append(run)
            self.changed.notify()
            if not self.running:
                self.running = True
                threading.Thread(target=self._work, name='engine', daemon=True).start()
        return run

    def _more(self) -> bool:
        "Whether there is work, after waiting for some; False ends the thread."
        with self.changed:
            some = lambda: bool(self.waiting or self.batches)
            self.running = self.changed.wait_for(some, IDLE_S)
            return self.running

    def _work(self):
        import torch

        while self._more():
            with torch.inference_mode(), from_latents(self.model):
                while self.waiting or self.batches:
                    self._round()

    def _round(self):
        "Let a request in, and compute one token for all."
        self._admit()
        for batch in self.batches:
            self._step(batch)
        self.batches = [batch for batch in self.batches if batch.rows]

    def _admit(self):
        "Let the next request in, if there is room."
        with self.changed:
            while self.waiting and self.waiting[0].done.done():
                self.waiting.popleft()
            used = sum(len(batch.rows) for batch in self.batches)
            if not self.waiting or (used and used + self.waiting[0].ask.n > ROWS):
                return
            run = self.waiting.popleft()
        try:
            self._begin(run)
        except Exception as error:  # whatever the model raises, the next request is served
            run.end(error)

    def _begin(self, run: Run):
        "Read a prompt, and put the run's rows into a batch."
        import torch

        run.begin(self)
        if run.ask.top is not None and getattr(run.ask, 'echo', False):
            run.before = [None, *self.prompt_odds(run.ids, run.ask.top)]
        if not run.limit:
            for draft in run.drafts:
                draft.close('length')
            run.tell()
            return run.end()
        row = torch.tensor([run.ids], device=self.model.device)
        out = self.model(input_ids=row, use_cache=True, logits_to_keep=1)
        run.take(out.logits[:, -1].expand(run.ask.n, -1))
        self._place(run, out.past_key_values)

    def _place(self, run: Run, cache):
        "A batch for the rows of a run that go on."
        if not run.live():
            return run.end()
        if run.ask.n > 1:
            cache.batch_repeat_interleave(run.ask.n)
        batch = Batch(run, cache)
        if shareable(cache):
            for other in self.batches:
                if shareable(other.cache):
                    return other.join(batch)
        self.batches.append(batch)

    def _step(self, batch: Batch):
        "The next token of a batch; a run that has ended is handed over."
        try:
            batch.drop()
            if batch.rows:
                runs = batch.runs
                batch.step(self.model)
                batch.drop()
                for run in runs:
                    if not run.live():
                        run.end()
        except Exception as error:
            for run in batch.runs:
                run.end(error)
            batch.rows, batch.runs = [], []

    def prompt_odds(self, ids: list[int], top: int) -> list[Odds]:
        "The odds of each prompt token after the first."
        import torch

        row = torch.tensor([ids], device=self.model.device)
        packed = reduced_logits(self.model, row, reduce=partial(packed_odds, top=top))
        return odds(packed[0, :-1])

    def prompt(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        "Token ids of a conversation, generation prompt included; what a user typed never becomes a control token."
        try:
            return prompt_ids(self.tok, messages, tools or None)
        except LabError as e:
            raise Refused(400, one_line(str(e)), 'messages') from None
        except Exception as e:  # templates are code: what they make of odd values is not known
            why = one_line(f'{type(e).__name__}: {e}')
            raise Refused(
                400, f'the chat template cannot print these messages or tools: {why}', 'messages'
            ) from None

    def tokens(self, prompt: str | list[int]) -> list[int]:
        "The ids of a raw prompt; as in vLLM, control tokens in its text count."
        ids = encode(self.tok, prompt) if isinstance(prompt, str) else prompt
        bad = [i for i in ids if not 0 <= i < len(self.tok)]
        if bad:
            raise Refused(
                400, f'token id {shown(bad[0])} is not in the vocabulary of {len(self.tok)}'
            )
        return ids

    def known(self, model: str | None):
        "`Refused` with 404 for another model's name."
        if model not in (None, self.name):
            raise Refused(404, f'no model {shown(model)}; this server has {self.name!r}', 'model')

    def limit(self, ids: list[int], ask, default: int | None) -> int:
        "How many tokens may follow a prompt; `Refused` if prompt and answer do not fit the window."
        room = self.length - len(ids)
        wanted = ask.most if ask.most is not None else max(1, min(default or room, room))
        if not ids or wanted > room:
            raise Refused(
                400,
                f"This model's maximum context length is {self.length} tokens. However, the prompt has "
                f'{len(ids)} tokens and {wanted} are to be generated, which do not fit.',
                'messages' if hasattr(ask, 'messages') else 'prompt',
            )
        return wanted
