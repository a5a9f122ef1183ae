"""The embedded server on the wire: clients that leave, streams that equal whole answers, stop strings, limits."""

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from test_server import listening

from k2lab.models.load import open_model, open_tokenizer, shipped, small_model
from k2lab.serving import drafts, engine, protocol, server
from k2lab.serving.drafts import Detokenizer, Rules, StopStrings
from k2lab.text.tokenizer import build_tokenizer

torch = pytest.importorskip('torch')
KEY = {'authorization': 'Bearer secret'}
USER = [dict(role='user', content='What is 6*7?')]
TOOLS = [
    dict(type='function', function=dict(name=name, parameters=dict(type='object', properties={})))
    for name in ('look', 'look_up')
]
CHAT, COMPLETE = '/v1/chat/completions', '/v1/completions'


@pytest.fixture(scope='module', params=['k2', 'qwen'])
def parts(request):
    words = 'user assistant system What is 6*7? print 42 code functions.look 😀 é'
    family = 'kimi' if request.param == 'k2' else 'qwen'
    tok = build_tokenizer([words] * 20, 340, family)
    return small_model(request.param, 'smoke', tok), tok


@pytest.fixture(scope='module')
def client(parts):
    return TestClient(server.create_app(*parts, 'tiny', 'secret'), headers=KEY)


@pytest.fixture(scope='module')
def nano():
    "The nano model, whose window is 1,024 tokens and whose answers are long."
    place = shipped('k2')
    return open_model(place), open_tokenizer(place)


def events(response) -> list[dict]:
    lines = [line.removeprefix('data: ') for line in response.text.split('\n\n') if line]
    assert response.status_code == 200 and lines[-1] == '[DONE]'
    return [json.loads(line) for line in lines[:-1]]


# ---- clients that leave


def asking(url: str, body: dict, path: str = CHAT) -> socket.socket:
    "A connection that has sent a request."
    host, port = url.removeprefix('http://').split(':')
    data = json.dumps(body).encode()
    lines = [f'POST {path} HTTP/1.1', 'Host: x', 'Authorization: Bearer secret']
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        '\r\n'.join([*lines, f'Content-Length: {len(data)}', '', '']).encode() + data
    )
    return connection


@contextlib.contextmanager
def engine_of(monkeypatch, model, tok):
    "The address of a real server and its engine."
    made = []
    real = server.Engine
    monkeypatch.setattr(server, 'Engine', lambda *a: made.append(real(*a)) or made[0])
    with listening(server.create_app(model, tok, 'tiny', 'secret')) as url:
        yield url, made[0]


def idle(engine, seconds: float = 5) -> bool:
    "Whether an engine computes nothing any more, soon."
    until = time.monotonic() + seconds
    while engine.batches and time.monotonic() < until:
        time.sleep(0.005)
    return not engine.batches


@pytest.mark.parametrize('stream', [True, False])
def test_a_client_that_leaves_frees_the_server(nano, monkeypatch, stream):
    long = dict(messages=USER, stream=stream, max_tokens=900, temperature=1.0, n=2)
    with engine_of(monkeypatch, *nano) as (url, busy):
        for _ in range(5):
            with asking(url, long) as connection:
                if stream:
                    assert b'200 OK' in connection.recv(400)
                until = time.monotonic() + 20
                while not busy.batches and time.monotonic() < until:
                    time.sleep(0.005)
                (batch,) = busy.batches
                drafts = batch.rows
            assert idle(busy) and all(len(d.ids) < 890 for d in drafts)


def test_a_stream_that_nobody_reads_holds_nobody_up(nano, monkeypatch):
    import httpx

    long = dict(messages=USER, stream=True, max_tokens=900, temperature=1.9, n=4)
    with engine_of(monkeypatch, *nano) as (url, busy), asking(url, long):
        began = time.monotonic()
        got = httpx.post(
            url + COMPLETE, headers=KEY, json=dict(prompt='a', max_tokens=1), timeout=60
        )
        assert got.status_code == 200 and time.monotonic() - began < 20


@pytest.mark.slow
def test_sigterm_in_the_middle_of_a_stream_ends_the_process():
    words = [sys.executable, '-m', 'k2lab.serving.server', str(shipped('k2')), '--name', 'n']
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, 'K2LAB_API_KEY': 'secret'}
    process = subprocess.Popen([*words, '--port', str(port)], env=env, stderr=subprocess.DEVNULL)
    try:
        body, until = dict(messages=USER, stream=True, n=8, max_tokens=900), time.monotonic() + 120
        while True:
            try:
                connection = asking(f'http://127.0.0.1:{port}', body)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.2)
        with connection:
            assert b'200 OK' in connection.recv(400)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


# ---- several at once


def test_requests_at_once_are_answered_as_one_alone(nano, monkeypatch):
    import httpx

    kinds = [dict(temperature=0), dict(temperature=1.0, seed=5), dict(temperature=0.7, seed=6, n=3)]
    asks = [
        dict(prompt='def graph' * (1 + 9 * i), max_tokens=16 + 8 * i, stop=['\n\n']) | kind
        for i, kind in enumerate(kinds * 2)
    ]
    with engine_of(monkeypatch, *nano) as (url, busy), httpx.Client(headers=KEY) as web:
        texts = lambda ask: [
            c['text'] for c in web.post(url + COMPLETE, json=ask, timeout=120).json()['choices']
        ]
        alone, most = [texts(ask) for ask in asks], []
        real = engine.Batch.step
        monkeypatch.setattr(
            engine.Batch, 'step', lambda b, model: most.append(len(b.runs)) or real(b, model)
        )
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(texts, asks)) == alone
        assert max(most) > 1 and idle(busy)


def test_rows_that_may_not_share_a_batch_take_turns(nano, monkeypatch):
    monkeypatch.setattr(engine, 'shareable', lambda cache: False)
    own = engine.Engine(*nano, 'tiny')
    ask = protocol.CompletionAsk.model_validate(dict(prompt='x', temperature=0.0))
    runs = [own.submit(engine.Run([5, 6, 7 + i], ask, 12)) for i in range(3)]
    taken = [run.done.result(60)[0].ids for run in runs]
    monkeypatch.undo()
    shared = [own.submit(engine.Run([5, 6, 7 + i], ask, 12)) for i in range(3)]
    assert [run.done.result(60)[0].ids for run in shared] == taken and idle(own)


def test_16_bits_are_not_shared(nano):
    cache = lambda model: model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    assert engine.shareable(cache(nano[0]))
    assert not engine.shareable(cache(open_model(shipped('k2')).bfloat16()))


def test_a_model_that_fails_fails_one_request(parts):
    app = server.create_app(*parts, 'tiny', 'secret')
    web = TestClient(app, headers=KEY, raise_server_exceptions=False)
    real = type(parts[0]).forward
    broken = lambda self, input_ids, **kw: (
        1 / 0 if input_ids.shape[1] == 3 else real(self, input_ids=input_ids, **kw)
    )
    type(parts[0]).forward = broken
    try:
        got = web.post(COMPLETE, json=dict(prompt=[1, 2, 3]))
        assert got.status_code == 500 and 'ZeroDivisionError' in got.json()['error']['message']
        got = web.post(COMPLETE, json=dict(prompt=[1, 2, 3], stream=True)).text.split('\n\n')
        assert 'ZeroDivisionError' in json.loads(got[0][6:])['error']['message']
        assert web.post(COMPLETE, json=dict(prompt=[1, 2], max_tokens=2)).status_code == 200
    finally:
        type(parts[0]).forward = real


# ---- text and stop strings


def test_text_comes_without_half_characters_and_is_the_whole(parts):
    tok = parts[1]
    texts = ['a 😀😀 é\u2028x', '👩‍👩‍👧 e\u0301', 'print(42)\n\n  x', '\ufffd end \ufffd']
    rows = [tok(text).input_ids for text in texts]
    random.seed(3)
    rows += [random.choices(range(len(tok)), k=60) for _ in range(20)]
    for ids in rows:
        text = Detokenizer(tok)
        pieces = [text.feed(i) for i in ids]
        assert ''.join([*pieces, text.close()]) == tok.decode(ids)
    text = Detokenizer(tok)
    assert not any('\ufffd' in text.feed(i) for i in rows[0])


def test_only_new_tokens_are_decoded(parts):
    tok, lengths = parts[1], []

    class Counting:
        def decode(self, ids):
            lengths.append(len(ids))
            return tok.decode(ids)

    text = Detokenizer(Counting())
    for i in tok('print 42 code ' * 200).input_ids:
        text.feed(i)
    assert max(lengths) <= 4


def first_stop(pieces: list[str], stops: list[str]) -> str:
    "The text before the first stop string that is complete, by looking at all of the text after each piece."
    text = ''
    for piece in pieces:
        text += piece
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)]
    return text


def test_stop_strings_never_leak():
    texts = ['aab', 'abcabcabd', 'aaaa', 'xabab', 'abab\u2028c', '😀ab']
    stopping = [['ab'], ['abd', 'ca'], ['aaa', 'b'], ['babb', 'abab'], ['b\u2028', 'c'], ['aab']]
    for text, stops in itertools.product(texts, stopping):
        for cuts in itertools.product([0, 1], repeat=len(text) - 1):
            at = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(text)]
            pieces = [text[a:b] for a, b in zip(at, at[1:])]
            reader, said = StopStrings(stops), []
            for piece in pieces:
                said.append(reader.feed(piece))
                assert not any(stop in ''.join(said) for stop in stops)
            whole = ''.join([*said, '' if reader.hit else reader.close()])
            assert whole == first_stop(pieces, stops)


def said_of(chunks: list, index: int = 0) -> dict:
    "The message that a stream of chunks tells."
    message = dict(content='', reasoning='', calls=[], finish=None)
    for choice in (c for chunk in chunks for c in chunk['choices'] if c['index'] == index):
        delta = choice['delta']
        assert delta.get('reasoning') == delta.get('reasoning_content')
        message['content'] += delta.get('content') or ''
        message['reasoning'] += delta.get('reasoning') or ''
        message['calls'] += delta.get('tool_calls') or []
        message['finish'] = choice['finish_reason'] or message['finish']
    return message


def told(choice: dict) -> dict:
    message = choice['message']
    calls = [dict(c, index=i) for i, c in enumerate(message.get('tool_calls') or [])]
    return dict(
        content=message['content'] or '',
        reasoning=message.get('reasoning') or '',
        calls=calls,
        finish=choice['finish_reason'],
    )


def test_a_stop_string_acts_in_streams_as_in_whole_answers(nano):
    web = TestClient(server.create_app(*nano, 'tiny', 'secret'), headers=KEY)
    ask = dict(messages=USER, temperature=0, max_tokens=60)
    full = web.post(CHAT, json=ask).json()['choices'][0]['message']
    text = (full.get('reasoning') or '') + full['content']
    assert len(text) > 30
    for at, long in itertools.product(range(0, len(text) - 8, 5), (1, 3, 8)):
        stops = [text[at : at + long], 'never', text[at + 2 : at + 2 + long]]
        whole = web.post(CHAT, json=ask | dict(stop=stops)).json()['choices'][0]
        chunks = events(web.post(CHAT, json=ask | dict(stop=stops, stream=True)))
        assert said_of(chunks) == told(whole)
        assert whole['finish_reason'] == 'stop' and whole['stop_reason'] in stops
        assert not any(s in told(whole)['content'] + told(whole)['reasoning'] for s in stops)


# ---- streams say what whole answers say


@pytest.mark.parametrize('more', [{}, dict(echo=True), dict(echo=True, max_tokens=0)])
def test_a_stream_of_completions_says_the_same(client, more):
    ask = dict(prompt=['What is', '42 😀'], n=2, seed=3, max_tokens=9, logprobs=2) | more
    whole = client.post(COMPLETE, json=ask).json()
    options = dict(stream=True, stream_options=dict(include_usage=True))
    *chunks, last = events(client.post(COMPLETE, json=ask | options))
    assert last['usage'] == whole['usage'] and last['choices'] == []
    for choice in whole['choices']:
        mine = [c for ch in chunks for c in ch['choices'] if c['index'] == choice['index']]
        assert ''.join(c['text'] for c in mine) == choice['text']
        assert mine[-1]['finish_reason'] == choice['finish_reason'] and choice['finish_reason']
        for key, values in choice['logprobs'].items():
            assert sum((c['logprobs'][key] for c in mine), []) == values
    assert {c['object'] for c in chunks} == {'text_completion'}


def test_chat_logprobs_are_those_of_a_completion(client, parts):
    ask = dict(temperature=0, max_tokens=6)
    ids = client.post('/tokenize', json=dict(messages=USER)).json()['tokens']
    plain = client.post(COMPLETE, json=ask | dict(prompt=ids, logprobs=2)).json()['choices'][0]
    options = ask | dict(messages=USER, logprobs=True, top_logprobs=2)
    (whole,) = client.post(CHAT, json=options).json()['choices']
    rows = whole['logprobs']['content']
    assert [r['token'] for r in rows] == plain['logprobs']['tokens']
    assert [r['logprob'] for r in rows] == pytest.approx(plain['logprobs']['token_logprobs'])
    assert all(len(r['top_logprobs']) == 2 and r['bytes'] for r in rows)
    chunks = events(client.post(CHAT, json=options | dict(stream=True)))
    blocks = [c['logprobs'] for chunk in chunks for c in chunk['choices'] if c.get('logprobs')]
    assert [row for block in blocks for row in block['content']] == rows
    bare = client.post(CHAT, json=dict(messages=USER, max_tokens=2, logprobs=True)).json()
    assert bare['choices'][0]['logprobs']['content'][0]['top_logprobs'] == []


def test_log_probabilities_are_computed_only_when_asked(client, monkeypatch):
    monkeypatch.setattr(engine, 'packed_odds', None)
    assert client.post(COMPLETE, json=dict(prompt='x', max_tokens=2)).status_code == 200
    assert client.post(CHAT, json=dict(messages=USER, max_tokens=2)).status_code == 200
    with pytest.raises(Exception, match='not callable'):
        own = engine.Engine(*nano_like(client), 'tiny')
        ask = protocol.CompletionAsk.model_validate(dict(prompt='x', logprobs=0))
        own.submit(engine.Run([1, 2], ask, 2)).done.result(60)


def nano_like(client):
    tok = build_tokenizer(['What is 6*7?'] * 5, 340, 'qwen')
    return small_model('qwen', 'smoke', tok), tok


def test_several_answers_in_one_stream(client):
    ask = dict(messages=USER, n=3, seed=1, max_tokens=8, temperature=1.3, tools=TOOLS)
    whole = client.post(CHAT, json=ask).json()['choices']
    chunks = events(client.post(CHAT, json=ask | dict(stream=True)))
    assert [said_of(chunks, i) for i in range(3)] == [told(c) for c in whole]
    first = [c['choices'][0] for c in chunks[:3]]
    assert [(c['index'], c['delta']['role']) for c in first] == [(i, 'assistant') for i in range(3)]


def test_each_of_n_answers_has_its_own_seed(client):
    texts = lambda **kw: [
        c['text']
        for c in client.post(COMPLETE, json=dict(prompt='What', max_tokens=9) | kw).json()[
            'choices'
        ]
    ]
    together = texts(n=3, seed=5)
    assert together == [*texts(seed=5), *texts(seed=6), *texts(seed=7)] and len(set(together)) > 1
    assert texts(seed=2**63 - 1, n=2) and texts(seed=-(2**63))


# ---- what is enforced


def test_sampling_limits(client):
    texts = lambda **kw: client.post(
        COMPLETE, json=dict(prompt='What', max_tokens=9, seed=4, **kw)
    ).json()['choices'][0]['text']
    greedy = texts(temperature=0)
    assert texts(top_k=1) == texts(top_p=5e-324) == texts(temperature=1e-320) == greedy
    assert texts(top_k=-1) == texts(top_k=0) == texts() != greedy
    assert isinstance(texts(temperature=1e300), str)


def test_a_call_can_be_demanded_or_forbidden(client, parts):
    tok = parts[1]
    ask = dict(messages=USER, tools=TOOLS, temperature=0, max_tokens=60, logprobs=True)
    post = lambda **kw: client.post(
        CHAT, json=ask | kw | dict(return_tokens_as_token_ids=True)
    ).json()['choices'][0]
    ids = lambda choice: [int(r['token'][9:]) for r in choice['logprobs']['content']]
    named = dict(type='function', function=dict(name='look_up'))
    k2 = '<|tool_call_begin|>' in tok.get_added_vocab()
    assert tok.decode(ids(post(tool_choice=named))).startswith(
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.look_up:0<|tool_call_argument_begin|>'
        if k2
        else '<tool_call>\n{"name": "look_up", "arguments":'
    )
    begun = tok.decode(ids(post(tool_choice='required')))
    assert any(f'{name}:0<' in begun or f'"{name}", "arg' in begun for name in ('look', 'look_up'))
    marks = {tok.convert_tokens_to_ids(t) for t in server.CALL_TOKENS}
    loose = [post(tool_choice='none', temperature=2.0, seed=s, max_tokens=60) for s in range(5)]
    assert not any(marks & set(ids(choice)) for choice in loose)


def test_rules_choose_among_beginnings():
    rules = Rules([[7, 1, 2], [7, 1, 3, 4], [7, 5]])
    steps = [[], [7], [7, 1], [7, 1, 3], [7, 5], [7, 5, 9], [7, 1, 2]]
    assert [rules.allowed(ids) for ids in steps] == [[7], [1, 5], [2, 3], [4], [], [], []]
    logits = torch.zeros(1, 10)
    logits[0, 8] = 5.0
    draft = drafts.Draft(None, set(), [], rules, None)
    assert drafts.obeying(logits, [draft]).argmax().item() == 7


@pytest.mark.parametrize('long', ['word ' * 5000, 'word ' * 1000])
@pytest.mark.parametrize('limit', [{}, dict(max_tokens=5)])
@pytest.mark.parametrize('stream', [False, True])
def test_a_prompt_beyond_the_window_is_refused_before_the_first_byte(nano, long, limit, stream):
    app = server.create_app(*nano, 'tiny', 'secret')
    web = TestClient(app, headers=KEY)
    ids = nano[1](long).input_ids
    talk = [dict(role='user', content=long)]
    for path, body in (
        (CHAT, dict(messages=talk)),
        (CHAT, dict(messages=talk, tools=TOOLS, n=2)),
        (COMPLETE, dict(prompt=long)),
        (COMPLETE, dict(prompt=ids)),
        (COMPLETE, dict(prompt=['a', long])),
        (COMPLETE, dict(prompt=[[1], ids], echo=True, logprobs=1)),
    ):
        got = web.post(path, json=body | limit | dict(stream=stream))
        assert got.status_code == 400 and 'do not fit' in got.json()['error']['message'], path
    full = ids[:1024]
    asked = lambda n, **kw: web.post(COMPLETE, json=dict(prompt=full[:n], stream=stream, **kw))
    assert asked(1024).status_code == 400 and asked(1023).status_code == 200
    assert asked(1024, max_tokens=0, echo=True).status_code == 200


# ---- the door


def raw(client, body: bytes, path: str = COMPLETE, **headers):
    return client.post(path, content=body, headers=headers)


@pytest.mark.parametrize(
    'body,word',
    [
        (b'{"prompt": ', 'no JSON'),
        (b'', 'no JSON'),
        (b'[1]', 'no JSON object'),
        (b'null', 'no JSON object'),
        (b'{"prompt": "x", "temperature": NaN}', 'no JSON'),
        (b'{"prompt": "x", "temperature": 1e999}', ''),
        (b'{"prompt": "\xff"}', 'no JSON'),
        (b'{"prompt": "\\ud800"}', 'surrogate'),
        (b'{"prompt": "x", "stop": "\\udc00"}', 'surrogate'),
        (b'{"prompt": ' + b'[' * 100_000 + b']' * 100_000 + b'}', ''),
        (b'{"prompt": "x", "max_tokens": 1' + b'0' * 5000 + b'}', ''),
        (b'{"prompt": "x", "x\\ny": 1}', 'unsupported field'),
    ],
)
def test_bodies_that_are_no_request(client, body, word):
    got = raw(client, body)
    message = got.json()['error']['message']
    assert got.status_code == 400 and word in message and '\n' not in message


def test_tools_nested_deeper_than_python_recurses(client):
    deep = b'{"type":"object","properties":{"a":' * 400 + b'{}' + b'}}' * 400
    body = (
        b'{"messages":[{"role":"user","content":"x"}],"max_tokens":1,"tools":[{"type":"function",'
    )
    got = raw(client, body + b'"function":{"name":"f","parameters":' + deep + b'}}]}', CHAT)
    assert got.status_code in (200, 400) and (got.status_code == 200 or got.json()['error'])


def test_a_body_is_bounded_and_the_key_comes_first(client, monkeypatch):
    read = []
    real = server.body_of

    async def seen(request):
        read.append(1)
        return await real(request)

    monkeypatch.setattr(server, 'body_of', seen)
    monkeypatch.setattr(server, 'MOST_BYTES', 10_000)
    big = json.dumps(dict(prompt='x' * 20_000)).encode()
    assert raw(client, big, authorization='Bearer no').status_code == 401 and not read
    assert raw(client, b'{"prompt": ', authorization='').status_code == 401 and not read
    got = raw(client, big)
    assert got.status_code == 413 and 'larger than' in got.json()['error']['message']
    chunked = client.post(COMPLETE, content=(big[i : i + 99] for i in range(0, len(big), 99)))
    assert chunked.status_code == 413 and len(read) == 2


@pytest.mark.parametrize(
    'header,status',
    [
        ('Bearer secret', 200),
        ('bearer secret', 200),
        ('BEARER  secret', 200),
        ('Bearer secre', 401),
        ('Bearer secrets', 401),
        ('Basic secret', 401),
        ('secret', 401),
        ('', 401),
        ('Bearer', 401),
    ],
)
def test_the_key(client, header, status):
    got = client.get('/v1/models', headers=dict(authorization=header))
    assert got.status_code == status and (status == 200 or got.json()['error']['code'] == 401)


def test_errors_of_paths_have_the_shape(client):
    for method, path, status in (
        ('POST', '/v1/embeddings', 404),
        ('GET', '/v1', 404),
        ('POST', '/v1/completions/', 404),
        ('GET', '/v1/chat/completions', 405),
        ('DELETE', '/v1/models', 405),
        ('GET', '/v1/models/gpt', 404),
        ('GET', '/v1/models/a/b%00c', 404),
        ('GET', '/docs', 404),
    ):
        error = client.request(method, path).json()['error']
        assert error['code'] == status and '\n' not in error['message'], path


def test_the_small_routes(client, parts):
    from k2lab import __version__

    (card,) = client.get('/v1/models').json()['data']
    assert (
        client.get('/v1/models/tiny').json() == card and abs(card['created'] - time.time()) < 3600
    )
    assert client.get('/version').json() == dict(version=__version__)
    got = client.post('/tokenize', json=dict(prompt='6*7?', return_token_strs=True)).json()
    assert len(got['token_strs']) == got['count'] == len(got['tokens'])
    back = client.post('/detokenize', json=dict(tokens=got['tokens'])).json()
    assert back == dict(prompt='6*7?')
    for path, body in (
        ('/tokenize', dict(prompt='x', model='gpt')),
        ('/detokenize', dict(tokens=[1], model='gpt')),
    ):
        assert client.post(path, json=body).status_code == 404
    assert client.post('/detokenize', json=dict(tokens=[10**6])).status_code == 400


def test_a_developer_speaks_as_the_system(client):
    ids = lambda role: client.post(
        '/tokenize', json=dict(messages=[dict(role=role, content='Be brief.'), *USER])
    ).json()['tokens']
    assert ids('developer') == ids('system')


NEUTRAL = dict(
    frequency_penalty=0, presence_penalty=0.0, repetition_penalty=1, n=1, user='me', top_k=0,
    response_format=dict(type='text'), logit_bias={}, stop=[], seed=1, min_p=0, best_of=None,
)  # fmt: skip


def test_neutral_values_change_nothing_and_others_are_refused(client):
    post = lambda **kw: client.post(CHAT, json=dict(messages=USER, max_tokens=5, seed=1) | kw)
    bare = post().json()['choices']
    more = dict(tools=[], tool_choice='none', parallel_tool_calls=True, store=False, functions=None)
    assert (
        post(**{k: v for k, v in NEUTRAL.items() if k != 'best_of'}, **more).json()['choices']
        == bare
    )
    assert post(max_completion_tokens=5).json()['choices'] == bare
    for name, value in (
        ('frequency_penalty', 0.1),
        ('response_format', dict(type='json_object')),
        ('logit_bias', {'5': 1}),
        ('best_of', None),
        ('tool_choice', 'required'),
        ('top_logprobs', 2),
        ('stream_options', dict(include_usage=True)),
        ('max_completion_tokens', 6),
        ('max_tokens', 0),
    ):
        got = post(**{name: value})
        assert got.status_code == 400 and name in got.json()['error']['message'], name


def test_several_threads_tokenize_at_once(client):
    body = dict(messages=USER, tools=TOOLS)
    ask = lambda _: client.post('/tokenize', json=body).json().get('count')
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(40)))) == 1 and threading.active_count() < 60


# ---- calls


def scripted(parts, text: str, **options):
    "A client of a model that says a text, control tokens as such."
    from test_server import Scripted

    model, tok = parts
    ids = [*tok(text, add_special_tokens=False).input_ids, tok.convert_tokens_to_ids('<|im_end|>')]
    return TestClient(
        server.create_app(Scripted(model, ids), tok, 'tiny', 'secret'), headers=KEY, **options
    )


def call_text(tok, name: str, number: int) -> str:
    if '<|tool_call_begin|>' in tok.get_added_vocab():
        return (
            f'<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>'
            '{"x": 1}<|tool_call_end|>'
        )
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"x": 1}}}}\n</tool_call>'


@pytest.mark.parametrize(
    'names,options,called',
    [
        (['look', 'look_up'], {}, ['look', 'look_up']),
        (['look', 'look_up'], dict(parallel_tool_calls=False), ['look']),
        (['other'], {}, []),
        (['look'], dict(tools=[]), []),
        (['look', 'look'], dict(stop=['{"x"']), []),
    ],
)
def test_calls_are_told_alike_whole_and_streamed(parts, names, options, called):
    tok = parts[1]
    calls = ''.join(call_text(tok, name, i) for i, name in enumerate(names))
    web = scripted(parts, f'See 😀. {calls}')
    ask = dict(messages=USER, tools=TOOLS, temperature=0, max_tokens=400) | options
    (whole,) = web.post(CHAT, json=ask).json()['choices']
    assert said_of(events(web.post(CHAT, json=ask | dict(stream=True)))) == told(whole)
    found = whole['message'].get('tool_calls') or []
    assert [c['function']['name'] for c in found] == called
    assert whole['finish_reason'] == ('tool_calls' if called else 'stop')
    if called:
        assert whole['message']['content'] == 'See 😀.'
        assert {c['function']['arguments'] for c in found} == {'{"x": 1}'}
    elif not options.get('stop'):
        assert names[0] in whole['message']['content']  # no declared tool: the text stays whole


def test_a_thought_that_the_prompt_opens_is_streamed_as_one(parts, monkeypatch):
    from k2lab.serving import responses

    monkeypatch.setattr(responses, 'opened_thought', lambda prompt: '<think>')
    web = scripted(parts, '6 times 7</think>42')
    ask = dict(messages=USER, temperature=0, max_tokens=60)
    (whole,) = web.post(CHAT, json=ask).json()['choices']
    assert whole['message']['reasoning'] == '6 times 7' and whole['message']['content'] == '42'
    chunks = events(web.post(CHAT, json=ask | dict(stream=True)))
    assert said_of(chunks) == told(whole) and len(chunks) > 4
    (cut,) = web.post(CHAT, json=ask | dict(stop='times')).json()['choices']
    assert (cut['message']['reasoning'], cut['message']['content']) == ('6 ', '')
