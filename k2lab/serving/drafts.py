"""One answer while it grows: text from tokens without half characters, stop strings that never leak, the next token.

What a stream sends and what a whole answer holds come from the same pieces, so they are equal.
"""

from dataclasses import dataclass, field
from typing import Any


class Detokenizer:
    """The text of tokens that come one by one, a piece at a time; no piece ends within a character.

    Two windows of ids are decoded, as in vLLM and TGI: the tokens since the last whole character, and those with the
    few before them, on which white space may depend. `tokenizers.DecodeStream` raises on bytes that are no text."""

    def __init__(self, tok):
        self.tok, self.ids = tok, []
        self.before = self.start = 0  # where the windows begin
        self.sent = 0  # characters of the window that were given

    def feed(self, token: int) -> str:
        "The text that is final with this token; often one character behind."
        self.ids.append(token)
        text = self._window()
        open_bytes = len(text) - len(text.rstrip('\ufffd'))  # a character may lack its end
        piece = text[self.sent : len(text) - min(open_bytes, 3)]
        self.sent += len(piece)
        if not open_bytes:
            self.before, self.start, self.sent = self.start, len(self.ids), 0
        return piece

    def _window(self) -> str:
        known = self.tok.decode(self.ids[self.before : self.start])
        return self.tok.decode(self.ids[self.before :])[len(known) :]

    def close(self) -> str:
        "What is left at the end: a character that was never finished."
        return self._window()[self.sent :]


class StopStrings:
    "Text up to the first stop string; what may be the beginning of one is held back."

    def __init__(self, stops: list[str]):
        self.stops, self.held, self.hit = stops, '', None

    def feed(self, text: str) -> str:
        "The text that no later text can turn into a stop string; after a hit nothing comes."
        if not self.stops or self.hit:
            return '' if self.hit else text
        text = self.held + text
        found = [(at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.hit = min(found)
            self.held = ''
            return text[:at]
        cut = len(text) - max(self._begun(text, stop) for stop in self.stops)
        self.held = text[cut:]
        return text[:cut]

    def _begun(self, text: str, stop: str) -> int:
        "How many characters at the end of a text begin a stop string."
        most = min(len(text), len(stop) - 1)
        return next((n for n in range(most, 0, -1) if stop.startswith(text[-n:])), 0)

    def close(self) -> str:
        "What was held back and is text after all."
        held, self.held = self.held, ''
        return held


@dataclass(frozen=True)
class Odds:
    "What is kept of a token's log-probabilities, of which K2's vocabulary has 163,840."

    own: float  # of the token itself
    best: dict[int, float]  # of the likeliest tokens


LEAST = -9999.0  # as in vLLM: JSON has no infinity


def odds(packed) -> list[Odds]:
    "The odds in rows of `packed_odds`."
    top, rows = packed.shape[-1] // 2, packed.clamp(min=LEAST).tolist()
    return [Odds(r[0], dict(zip(map(int, r[1 + top :]), r[1 : 1 + top]))) for r in rows]


def packed_odds(logits, ids, top: int):
    "`[..., 1 + 2 top]` in float64 from logits [..., vocabulary]: of the ids [...], of the best, and which these are."
    import torch

    logp = torch.log_softmax(logits.float(), -1)  # as in vLLM: before temperature
    best = logp.topk(min(top, logp.shape[-1]))
    own = logp.gather(-1, ids[..., None])
    return torch.cat([own.double(), best.values.double(), best.indices.double()], -1)


@dataclass
class Rules:
    "Which tokens an answer must, may and may not have."

    beginnings: list[list[int]] = field(default_factory=list)  # it starts with one of these
    banned: list[int] = field(default_factory=list)
    last: set[int] = field(default_factory=set)  # each is a part of the answer and ends it

    def allowed(self, ids: list[int]) -> list[int]:
        "The only ids that may follow `ids`, or none if any may."
        if any(ids[: len(b)] == b for b in self.beginnings):
            return []
        n = len(ids)
        return sorted({b[n] for b in self.beginnings if len(b) > n and b[:n] == ids})


class Draft:
    "One answer while it grows."

    def __init__(self, tok, ends: set[int], stops: list[str], rules: Rules, generator: Any):
        self.ends, self.rules, self.generator = ends, rules, generator
        self.detokenizer, self.stops = Detokenizer(tok), StopStrings(stops)
        self.ids: list[int] = self.detokenizer.ids
        self.odds: list[Odds] = []  # of the ids, if they were asked for
        self.end: tuple[int, Odds | None] | None = None  # the token that ended the answer
        self.pieces: list[str] = []
        self.finish: str | None = None
        self.stop_reason: str | None = None

    @property
    def text(self) -> str:
        "The text so far."
        return ''.join(self.pieces)

    def add(self, token: int, odds: Odds | None = None):
        "Take the next token and its odds, if they were asked for, or end here."
        if token in self.ends:
            self.end = (token, odds)
            return self.close('stop')
        if odds:
            self.odds.append(odds)
        self._say(self.detokenizer.feed(token))
        if self.stops.hit:
            self.finish, self.stop_reason = 'stop', self.stops.hit
        elif token in self.rules.last:
            self.close('stop')

    def _say(self, text: str):
        if piece := self.stops.feed(text):
            self.pieces.append(piece)

    def close(self, finish: str):
        "End the answer for a reason; what was held back belongs to it unless it completes a stop string."
        self._say(self.detokenizer.close())
        if self.stops.hit:
            self.finish, self.stop_reason = 'stop', self.stops.hit
            return
        self.pieces.append(self.stops.close())
        self.finish = finish


def only(logits, ids: list[int]):
    "Logits with all tokens but some impossible."
    import torch

    return torch.full_like(logits, float('-inf')).index_copy(
        -1, torch.tensor(ids, device=logits.device), logits[..., ids]
    )


def obeying(logits, drafts: list[Draft]):
    "Logits [rows, vocabulary] in float32 with the tokens that the rules of each row's draft exclude impossible."
    logits = logits.float()
    for i, draft in enumerate(drafts):
        if draft.rules.banned:
            logits[i, draft.rules.banned] = float('-inf')
        if allowed := draft.rules.allowed(draft.ids):
            logits[i] = only(logits[i], allowed)
    return logits


def choose(logits, drafts: list[Draft], ask) -> list[int]:
    """One token for each row of `logits` [rows, vocabulary]: the best below a temperature of 1e-5, else sampled.

    Sampled from the `top_k` likeliest, and of these from the first that together hold `top_p`, by its generator."""
    import torch

    logits = obeying(logits.clone(), drafts)
    if ask.temperature < 1e-5:  # as in vLLM
        return logits.argmax(-1).tolist()
    logits = logits - logits.amax(-1, keepdim=True)
    p = torch.softmax((logits.double() / ask.temperature), -1)
    ordered, index = p.sort(-1, descending=True)
    # a token is dropped when those before it already hold top_p
    kept = ordered.cumsum(-1) - ordered < ask.top_p
    kept[:, 0] = True
    if ask.top_k > 0:
        kept[:, ask.top_k :] = False
    ordered = ordered * kept
    drawn = [torch.multinomial(row, 1, generator=d.generator) for row, d in zip(ordered, drafts)]
    return index.gather(-1, torch.stack(drawn)).squeeze(-1).tolist()
