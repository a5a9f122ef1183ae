"""One contract for both servers: the embedded one answers as vLLM does, but for what `DIFFERENT` lists and justifies.

vLLM's answers are kept in `vllm.json`. Where vLLM is installed they are compared with what it says now:
`K2LAB_VLLM=/path/to/python pytest tests/contract`; with K2LAB_WRITE=1 they are written anew."""

import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from scripted import NUMBERS, SUM, write_checkpoint
from wire import CASES, client_for, events_of, record

from k2lab.launch_teacher_vllm import Config, Served, serving

HERE = Path(__file__).parent
KEPT = HERE / 'vllm.json'
MODEL = 'scripted'
PYTHON = os.environ.get('K2LAB_VLLM') or (
    sys.executable if importlib.util.find_spec('vllm') else ''
)
# float32, small caches; the lab's own server has no more than 20 log-probabilities either
OPTIONS = dict(dtype='float32', max_num_seqs=8, enforce_eager=True, kv_cache_memory_bytes=2**28)
CLIENTS = os.environ.get('K2LAB_CLIENTS') or sys.executable


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    "The scripted checkpoint."
    return write_checkpoint(tmp_path_factory.mktemp('contract') / MODEL)


def config(engine: str) -> Config:
    more = dict(python=PYTHON, vllm=OPTIONS) if engine == 'vllm' else {}
    return Config(model=MODEL, engine=engine, family='qwen', ready_s=1500, **more)  # type: ignore


@pytest.fixture(scope='module', params=['embedded', 'vllm'])
def served(request, checkpoint) -> Iterator[Served]:
    "Each of the two servers, one after the other."
    if request.param == 'vllm' and not PYTHON:
        pytest.skip('no interpreter with vLLM: K2LAB_VLLM names none')
    log = checkpoint.parent / f'{request.param}.log'
    with serving(config(request.param), checkpoint, log) as server:
        yield server


def engine_of(served: Served) -> str:
    "Which of the two it is, by its own word."
    with client_for(served.url, served.key) as client:
        return {'k2lab': 'embedded'}.get(
            client.get('/v1/models').json()['data'][0]['owned_by'], 'vllm'
        )


# ---- the same requests -----------------------------------------------------------------------------------------


def flat(value, place: str = '') -> dict:
    "`{path: value}` of everything in an answer."
    if isinstance(value, dict) and value:
        return {
            k: v for key, inner in value.items() for k, v in flat(inner, f'{place}.{key}').items()
        }
    if isinstance(value, list) and value:
        return {
            k: v for i, inner in enumerate(value) for k, v in flat(inner, f'{place}[{i}]').items()
        }
    return {place: value}


def comparable(answer: dict) -> dict:
    "An answer as `{path: value}`; the keys of a stream's pieces are a path each."
    answer = json.loads(json.dumps(answer))
    keys = answer.get('stream', {}).pop('keys', [])
    return flat(answer) | {f'.pieces.{path}': kind for path, kind in keys}


def differences(ours: dict, theirs: dict) -> dict[str, tuple]:
    "`{path: (ours, theirs)}`; what one side does not have is `absent`."
    a, b = comparable(ours), comparable(theirs)
    pairs = {path: (a.get(path, 'absent'), b.get(path, 'absent')) for path in {**a, **b}}
    return {path: pair for path, pair in sorted(pairs.items()) if not same(*pair)}


def same(a, b) -> bool:
    "Whether two values are equal; probabilities are, within what float32 rounds."
    numbers = isinstance(a, float) and isinstance(b, float)
    return abs(a - b) <= 2e-3 * max(1, abs(a)) if numbers else a == b


HALF = '\ufffd'  # what stands for a part of a character


def unused(ours, theirs) -> bool:
    "Whether vLLM alone has a field, and has nothing in it."
    return ours == 'absent' and theirs in (None, 'null')


def counted(ours, theirs) -> bool:
    "Whether vLLM counts one token more for each answer, of which there are two at most."
    return isinstance(ours, int) and theirs - ours in (1, 2)


def anything(ours, theirs) -> bool:
    return True


# (case, path, which values, why the lab's server may differ there); cases and paths are patterns
DIFFERENT = [
    (
        'tool_choice named',
        r'finish_reason$',
        lambda a, b: (a, b) == ('tool_calls', 'stop'),
        'the lab says tool_calls wherever a tool is called; vLLM says stop if it was named',
    ),
    (
        'tool_choice|parallel',
        r'message\.content$',
        lambda a, b: (a, b) == (None, ''),
        'beside a forced call vLLM has an empty text, the lab null as beside any other call',
    ),
    ('', '', unused, "fields of OpenAI's API and of vLLM's extensions that say nothing"),
    ('', r'system_fingerprint$', anything, "names a build of vLLM's"),
    ('^health$', r'\.(body|text)', anything, 'vLLM answers without a body'),
    ('^models$', r'permission|owned_by|placement', anything, 'the lab says where it computes'),
    (
        'no such path|wrong method|no key|wrong key|without a key',
        r'\.body\.',
        anything,
        "vLLM has other shapes here; the lab has OpenAI's error shape everywhere",
    ),
    ('', r'\.error\.type$', lambda a, b: a == 'invalid_request_error', "OpenAI's name for it"),
    ('', r'\.error\.param$', anything, 'the field as the request spells it'),
    (
        'n 2, greedy',
        '',
        anything,
        'vLLM refuses several greedy answers; the lab gives n equal ones',
    ),
    (
        '',
        r'usage\.(completion|total)_tokens$',
        counted,
        'vLLM counts the token that ends an answer',
    ),
    (
        'chat, parts',
        r'usage',
        lambda a, b: b - a in (1, 2),
        'vLLM puts a line end between parts; the lab prints what was sent',
    ),
    (
        'tool_choice none',
        r'message\.content|usage',
        anything,
        'vLLM lets the model write a call as text; the lab rules calls out',
    ),
    (
        '',
        rf'logprobs.*(top_logprobs\[\d*\]\.{HALF}?|\.bytes(\[\d*\])?)$',
        lambda a, b: 'absent' in (a, b),
        'a token that is a part of a character: vLLM names it by an empty text, the lab by U+FFFD',
    ),
    (
        '',
        r'\.text$|choices\.0\.text$|\.token$|\.tokens\[\d+\]$',
        lambda a, b: str(a).endswith(HALF) and a == f'{b}{HALF}',
        'text that ends within a character: vLLM drops its bytes, the lab shows U+FFFD',
    ),
    ('echo', r'prompt_logprobs', anything, "vLLM tells an echoed prompt's log-probabilities twice"),
    (
        'stream',
        r'^\.pieces\.choices\[\]\.delta$',
        anything,
        "vLLM's last text and the reason for the end are one piece",
    ),
]


def reason(case: str, path: str, pair: tuple) -> str:
    "Why an answer may differ from vLLM's at a path; '' if it may not."
    fits = lambda name, place, values: (
        re.search(name, case) and re.search(place, path) and values(*pair)
    )
    return next((why for *rule, why in DIFFERENT if fits(*rule)), '')


def unexplained(ours: dict, theirs: dict) -> list[tuple]:
    "The differences without a reason."
    return [
        (case, path, pair)
        for case in CASES
        for path, pair in differences(ours[case], theirs[case]).items()
        if not reason(case, path, pair)
    ]


@pytest.fixture(scope='module')
def kept() -> dict:
    "vLLM's answers as they were recorded."
    if os.environ.get('K2LAB_WRITE'):
        return {}
    return json.loads(KEPT.read_text(encoding='utf-8'))['answers']


def test_the_same_requests_get_the_same_answers(served, kept):
    now = record(served.url, served.key, MODEL)
    if engine_of(served) == 'vllm':
        if os.environ.get('K2LAB_WRITE'):
            with client_for(served.url, served.key) as client:
                version = client.get('/version').json()['version']
            body = dict(vllm=version, answers=now)
            KEPT.write_text(json.dumps(body, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
            return
        found = {case: differences(now[case], kept[case]) for case in CASES}
        assert {case: d for case, d in found.items() if d} == {}
    else:
        assert unexplained(now, kept) == []
        found = [
            (case, *one) for case in CASES for one in differences(now[case], kept[case]).items()
        ]
        unused_rules = {why for *_, why in DIFFERENT} - {reason(*one) for one in found}
        assert unused_rules == set()  # the list does not grow stale


def test_a_difference_would_be_seen():
    ours = dict(status=200, body=dict(choices=[dict(text='a', logprob=-1.0)]))
    theirs = dict(status=400, body=dict(choices=[dict(text='a', logprob=-1.01, more=None)]))
    assert differences(ours, ours) == {}
    assert reason('chat', '.body.usage.total_tokens', (9, 10)) != ''
    assert reason('chat', '.body.usage.total_tokens', (9, 12)) == ''
    assert (
        reason('chat', '.body.more', ('absent', 5)) == reason('chat', '.status', (200, 400)) == ''
    )
    assert differences(ours, theirs) == {
        '.body.choices[0].logprob': (-1.0, -1.01),
        '.body.choices[0].more': ('absent', None),
        '.status': (200, 400),
    }


# ---- rude clients ----------------------------------------------------------------------------------------------

FOREVER = [dict(role='user', content='Go on forever')]


def body(**more) -> dict:
    return dict(model=MODEL, messages=FOREVER, max_tokens=4000, temperature=0) | more


def short(client: httpx.Client) -> float:
    "The seconds that a request for two tokens takes."
    began = time.monotonic()
    got = client.post('/v1/completions', json=dict(model=MODEL, prompt='a', max_tokens=2))
    assert got.status_code == 200
    return time.monotonic() - began


@pytest.mark.parametrize('stream', [True, False])
def test_clients_that_leave_do_no_harm(served, stream):
    with client_for(served.url, served.key) as client:
        short(client)
        waits = []
        for _ in range(10):
            with contextlib.suppress(httpx.ReadTimeout):
                ask = dict(json=body(stream=stream), timeout=httpx.Timeout(10, read=0.5))
                with client.stream('POST', '/v1/chat/completions', **ask) as got:
                    next(got.iter_bytes())
            waits.append(short(client))
    print(f'{engine_of(served)}: after each client that left {max(waits):.2f} s at most')
    assert max(waits) < 5


def test_a_reader_that_does_not_read(served):
    host, port = served.url.removeprefix('http://').split(':')
    sent = json.dumps(body(stream=True)).encode()
    head = (
        f'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.key}\r\n'
        f'Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n'
    )
    with socket.socket() as slow, client_for(served.url, served.key) as client:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect((host, int(port)))
        slow.sendall(head.encode() + sent)
        assert max(short(client) for _ in range(5)) < 5


def test_many_at_once(served):
    "Each gets its own answer."
    asked = [dict(role='user', content='Hello'), *FOREVER]
    results = []

    def ask(message: dict):
        with client_for(served.url, served.key) as client:
            got = client.post('/v1/chat/completions', json=body(messages=[message], max_tokens=20))
            results.append((message['content'], got.json()['choices'][0]['message']['content']))

    threads = [threading.Thread(target=ask, args=(asked[i % 2],)) for i in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    want = {'Hello': ''.join(NUMBERS), 'Go on forever': ' tick tock' * 10}
    assert sorted(results) == sorted(
        (asked[i % 2]['content'], want[asked[i % 2]['content']]) for i in range(8)
    )


def test_a_stream_comes_in_pieces(served):
    with client_for(served.url, served.key) as client:
        got = client.post('/v1/chat/completions', json=body(max_tokens=8, stream=True))
    events, done = events_of(got.text)
    assert done and len(events) >= 8


# ---- real clients ----------------------------------------------------------------------------------------------


def has(package: str) -> bool:
    "Whether the interpreter of the clients has a package."
    code = f'import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)'
    return subprocess.run([CLIENTS, '-c', code]).returncode == 0


@pytest.mark.parametrize('package', ['openai', 'litellm', 'lm_eval', 'inspect_ai', 'smolagents'])
def test_a_client_finishes_its_task(served, checkpoint, package, tmp_path):
    if not has(package):
        pytest.skip(f'{package} is not installed: pip install "k2lab[clients]", or K2LAB_CLIENTS')
    words = [CLIENTS, str(HERE / 'clients.py'), package, f'{served.url}/v1', MODEL, str(checkpoint)]
    environment = os.environ | dict(K2LAB_API_KEY=served.key, HOME=str(tmp_path))
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f'{engine_of(served)}, {package}: {found}')
    want = ''.join(SUM)
    if package in ('openai', 'litellm'):
        assert found['tools'] == found['streamed tools'] == want
        assert found['stream'] == ''.join(NUMBERS)
    if package == 'inspect_ai':
        assert found['tools'] == want and found['accuracy'] == 1
    if package == 'smolagents':
        assert found['tools'] == found['streamed tools'] == '5'
        assert found['stream'] == ''.join(NUMBERS)
    if package == 'lm_eval':
        assert found['accuracy'] == 1 and found['generated'] == 1
    assert found['log-probabilities'] > 0
