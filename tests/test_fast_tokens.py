"""Whatever engine encodes, the ids are the tokenizer's own."""

import random
import sys
import unicodedata

import numpy as np
import pyarrow as pa
import pytest

from k2lab.models.load import open_tokenizer, shipped
from k2lab.text import encoder as engines
from k2lab.text.encoder import ENGINES, NASTY, Encoder, count_tokens, encode_stream, encoder
from k2lab.text.masks import concatenate
from k2lab.text.tokenizer import plain_tokenizer

TOKS = {kind: open_tokenizer(shipped(kind)) for kind in ('k2', 'qwen')}


def wild(seed: int, n: int) -> list:
    "n texts of code points of all planes, of scripts, marks, digits and white space."
    rng = random.Random(seed)
    pools = [
        range(32, 127),
        range(0xA0, 0x250),
        range(0x300, 0x370),
        range(0x4E00, 0x9FFF),
        range(0xE01, 0xE5C),
        range(0x1F300, 0x1FAFF),
        range(0x3041, 0x30FF),
        range(0x600, 0x6FF),
        [9, 10, 13, 32, 0x3000, 0x2028],
        range(48, 58),
        range(0x110000),
    ]
    draw = lambda: chr(rng.choice(rng.choice(pools)))
    return [
        ''.join(
            c for c in (draw() for _ in range(rng.randrange(80))) if unicodedata.category(c) != 'Cs'
        )
        for _ in range(n)
    ]


def own(tok, texts: list) -> list:
    return [
        one.ids for one in plain_tokenizer(tok).encode_batch_fast(texts, add_special_tokens=False)
    ]


def parts(found) -> list:
    return [found[0][a:b].tolist() for a, b in zip(found[1], found[1][1:])]


@pytest.mark.parametrize('kind', TOKS)
@pytest.mark.parametrize('name', ENGINES)
def test_an_engine_gives_the_tokenizers_ids(kind, name):
    pytest.importorskip(name, reason=f'{name} is not installed')
    if (kind, name) == ('qwen', 'tiktoken'):
        with pytest.raises(ValueError, match='no normaliser'):
            ENGINES[name](plain_tokenizer(TOKS[kind]))
        return
    work, texts = ENGINES[name](plain_tokenizer(TOKS[kind])), NASTY + wild(0, 3000)
    wrong = [
        text for text, a, b in zip(texts, parts(work(texts)), own(TOKS[kind], texts)) if a != b
    ]
    assert not wrong, (len(wrong), wrong[0])


def test_control_tokens_in_a_document_are_plain_text():
    ids = parts(encoder(TOKS['k2'])(['<|im_end|>']))[0]
    assert len(ids) > 1 and TOKS['k2'].convert_tokens_to_ids('<|im_end|>') not in ids


def test_an_engine_that_is_wrong_once_is_not_used_and_this_is_said(monkeypatch):
    tok = TOKS['k2']
    for trip in (NASTY[8], 'an ordinary page with one odd word'):

        def lying(engine, trip=trip):
            honest = engines.by_tokenizers(engine)
            return lambda batch: honest([text + '!' * (text == trip) for text in batch])

        monkeypatch.setattr(engines, 'ENGINES', dict(lying=lying))
        texts = ['one', 'an ordinary page with one odd word', 'two']
        with pytest.warns(UserWarning, match='lying is not used: it gives other token ids for'):
            one = Encoder(tok)
            found = one(texts)
        assert one.name == 'tokenizers' and parts(found) == own(tok, texts)


def test_the_first_thousand_texts_are_compared_and_no_more(monkeypatch):
    compared = []
    monkeypatch.setattr(engines, 'ENGINES', dict(same=engines.by_tokenizers))
    one = Encoder(TOKS['k2'])
    own_way = one.own
    one.own = lambda texts: compared.append(len(texts)) or own_way(texts)
    for _ in range(4):
        one([f'page {i}' for i in range(420)])
    assert one.name == 'same' and sum(compared) == 1000 and max(compared) == 50


def test_without_fast_engines_the_tokenizer_does_it(monkeypatch):
    for name in ENGINES:
        monkeypatch.setitem(sys.modules, name, None)
    one = Encoder(TOKS['k2'])
    assert one.name == 'tokenizers' and parts(one(NASTY)) == own(TOKS['k2'], NASTY)


def test_a_stream_has_an_end_after_each_document():
    tok, texts = TOKS['k2'], ['', 'a graph', 'an edge and a node', '']
    by_hand = [i for ids in own(tok, texts) for i in [*ids, tok.eos_token_id]]
    assert encode_stream(tok, texts, tok.eos_token_id).tolist() == by_hand
    rows = concatenate(tok, texts, 3)
    assert [i for row in rows for i in row['input_ids']] == by_hand and all(
        len(row['input_ids']) == 3 for row in rows[:-1]
    )


def test_tokens_are_counted_in_a_column():
    table = pa.table(dict(text=pa.chunked_array([['a graph', ''], ['edge']])))
    assert count_tokens(table, TOKS['k2'])['tokens'].to_pylist() == [
        len(ids) for ids in own(TOKS['k2'], ['a graph', '', 'edge'])
    ]


def test_no_text_is_no_token():
    ids, ends = encoder(TOKS['k2'])([])
    assert ids.dtype == np.uint32 and len(ids) == 0 and ends.tolist() == [0]
