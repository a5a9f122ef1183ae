"""Every field of every request at its smallest, empty and largest values, and of the wrong type: served or refused."""

import copy
import json

import pytest
from fastapi.testclient import TestClient

from k2lab.models.load import small_model
from k2lab.serving import protocol, server
from k2lab.text.tokenizer import build_tokenizer

torch = pytest.importorskip('torch')
TOOL = dict(
    type='function',
    function=dict(name='look', description='x', parameters=dict(type='object', properties={})),
)
CALL = dict(id='functions.look:0', type='function', function=dict(name='look', arguments='{}'))
TALK = [
    dict(role='system', content='Be brief.'),
    dict(role='user', content=[dict(type='text', text='hi')], name='me'),
    dict(role='assistant', content='x', reasoning_content='y', tool_calls=[CALL]),
    dict(role='tool', name='look', tool_call_id='functions.look:0', content='1'),
]
VALUES = [
    *(None, '', 'x', '\x00', '\u2028', '😀' * 3, 'x' * 5000, '<|im_end|>', '\U0010f000'),
    *(0, 1, -1, 2, 0.5, -0.5, 1e-320, 1e-9, 1e300, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 2**70),
    *(True, False, [], {}, [None], [''], ['x'], ['x'] * 200, [1], [-1], [2**63], [[]], [[1]]),
    *([{}], dict(x=1), dict(type='text'), dict(type='x'), dict(type='function'), [[[[]]]]),
    dict(type='function', function=dict(name='look')),
    [dict(role='user')],
    [dict(type='text', text='x')],
]
REQUESTS = {
    '/v1/completions': (
        protocol.CompletionAsk,
        dict(prompt='What is', max_tokens=2, temperature=0.7, logprobs=1),
    ),
    '/v1/chat/completions': (
        protocol.ChatAsk,
        dict(messages=TALK, tools=[TOOL], max_tokens=2, temperature=0.7),
    ),
    '/tokenize': (protocol.TokenizeAsk, dict(messages=TALK, tools=[TOOL])),
    '/detokenize': (protocol.DetokenizeAsk, dict(tokens=[1])),
}


@pytest.fixture(scope='module')
def client():
    words = 'user assistant system What is 6*7? print 42 code functions.look Be brief.'
    tok = build_tokenizer([words] * 20, 340, 'kimi')
    app = server.create_app(small_model('k2', 'smoke', tok), tok, 'tiny', 'secret')
    return TestClient(app, headers={'authorization': 'Bearer secret'})


def places(value, at=()):
    "The paths to all values inside a value."
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in inside:
        yield (*at, key)
        if isinstance(one, (dict, list)):
            yield from places(one, (*at, key))


def put(body, path, value):
    "A copy of a body with another value at a path."
    body = copy.deepcopy(body)
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return body


def fault(got) -> str | None:
    "What is wrong with a response, or None."
    if 400 <= got.status_code < 500:
        error = got.json().get('error', {})
        lines = str(error.get('message') or '\n').splitlines()
        fits = set(error) == {'message', 'type', 'param', 'code'}
        return None if fits and len(lines) == 1 and len(lines[0]) < 450 else 'not in the shape'
    if got.status_code != 200:
        return f'status {got.status_code}'
    if got.headers['content-type'].startswith('text/event-stream'):
        lines = got.text.split('\n\n')
        return None if lines[-2:] == ['data: [DONE]', ''] and len(lines) > 2 else 'an empty stream'
    answer = got.json()
    if 'usage' in answer and not (answer['choices'] and answer['usage']['total_tokens']):
        return 'an empty answer'
    return None


@pytest.mark.slow  # thousands of requests
@pytest.mark.parametrize('path', REQUESTS)
def test_each_field_at_each_value_is_served_or_refused(client, path):
    kind, body = REQUESTS[path]
    fields = [(name,) for name in kind.model_fields.keys() | kind.neutral.keys()]
    served = refused = 0
    for place in sorted({*fields, *places(body)}, key=str):
        for value in VALUES:
            asked = put(body, place, value)
            got = client.post(path, content=json.dumps(asked))
            assert not (wrong := fault(got)), (place, value, wrong, got.text[:300])
            served, refused = served + (got.status_code == 200), refused + (got.status_code != 200)
    assert served > 3 * len(body) and refused > 20 * len(body)
