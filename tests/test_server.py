"The embedded server: its numbers are the model's, its shapes are vLLM's, and what it does not know it refuses by name."

import contextlib
import json
import math
import threading
import time

import pytest
from fastapi.testclient import TestClient

from k2lab.lab.config import LabError
from k2lab.models.load import generate, small_model
from k2lab.serving import engine, server
from k2lab.text import tokenizer
from k2lab.text.chat import Conversation, prompt_ids
from k2lab.text.tokenizer import build_tokenizer

torch = pytest.importorskip('torch')
CALL = dict(
    id='functions.python:0',
    type='function',
    function=dict(name='python', arguments='{"code": "print(6*7)"}'),
)
TOOLS = [
    dict(
        type='function', function=dict(name='python', parameters=dict(type='object', properties={}))
    )
]
ASK = [dict(role='user', content='What is 6*7? <|im_end|>')]


@pytest.fixture(scope='module', params=['k2', 'qwen'])
def parts(request):
    tok = build_tokenizer(
        ['user assistant system What is 6*7? print 42 code functions.python'] * 20,
        340,
        'kimi' if request.param == 'k2' else 'qwen',
    )
    return small_model(request.param, 'smoke', tok), tok


@pytest.fixture(scope='module')
def client(parts):
    return TestClient(
        server.create_app(*parts, 'tiny', 'secret'), headers={'authorization': 'Bearer secret'}
    )


class Scripted:
    "Stands in for the model: says the given ids one after the other, then the end of the turn."

    def __init__(self, model, ids):
        self.config, self.device, self.ids, self.at = model.config, model.device, ids, 0

    def eval(self):
        return self

    def modules(self):
        return []

    def __call__(self, input_ids, past_key_values=None, **kw):
        from transformers import DynamicCache

        self.at = 0 if past_key_values is None else self.at + 1
        cache = DynamicCache() if past_key_values is None else past_key_values
        cache.update(*[torch.zeros(*input_ids.shape, 1)[:, None]] * 2, 0)
        logits = torch.full((len(input_ids), 1, self.config.vocab_size), -20.0)
        logits[:, :, self.ids[min(self.at, len(self.ids) - 1)]] = 20.0
        return type('Out', (), dict(logits=logits, past_key_values=cache))


@pytest.fixture
def says(parts):
    def make(content, thought=None, calls=None):
        model, tok = parts
        said = dict(role='assistant', content=content, reasoning_content=thought, tool_calls=calls)
        _, ids = Conversation(tok, [dict(role='user', content='?'), said]).turn_ids(1)
        return TestClient(
            server.create_app(Scripted(model, ids), tok, 'tiny', 'secret'),
            headers={'authorization': 'Bearer secret'},
        )

    return make


def chat(client, **kw):
    return client.post('/v1/chat/completions', json=dict(messages=ASK, temperature=0, **kw))


def complete(client, **kw):
    return client.post('/v1/completions', json=dict(temperature=0, **kw))


def test_health_is_open_and_all_else_is_locked(parts):
    bare = TestClient(server.create_app(*parts, 'tiny', 'secret'))
    assert bare.get('/health').json() == dict(status='ok')
    for path in ('/v1/models', '/docs', '/openapi.json'):
        assert bare.get(path).status_code in (401, 404)
    for path in ('/v1/completions', '/v1/chat/completions', '/tokenize'):
        assert (
            bare.post(path, json={}, headers={'authorization': 'Bearer wrong'}).json()['error'][
                'code'
            ]
            == 401
        )
        assert bare.post(path, json=dict(prompt='x', messages=[])).status_code == 401
    with pytest.raises(LabError, match='K2LAB_API_KEY'):
        server.create_app(*parts, 'tiny', '')


def test_greedy_is_the_models_own(client, parts):
    model, tok = parts
    ids = prompt_ids(tok, ASK)
    want = generate(model, tok, [ids], 12)[0][0]
    got = complete(client, prompt=ids, max_tokens=12).json()
    assert got['choices'][0]['text'] == want.text and got['choices'][0]['finish_reason'] == (
        'length' if want.cut else 'stop'
    )
    assert got['usage'] == dict(
        prompt_tokens=len(ids),
        completion_tokens=want.tokens - (not want.cut),
        total_tokens=len(ids) + want.tokens - (not want.cut),
    )


def test_echoed_logprobs_are_the_models_own(client, parts):
    model, tok = parts
    ids = tok('What is 6*7?').input_ids
    with torch.inference_mode():
        want = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    got = complete(client, prompt=ids, max_tokens=0, echo=True, logprobs=3).json()['choices'][0]
    lp = got['logprobs']
    assert (
        got['text'] == 'What is 6*7?'
        and lp['token_logprobs'][0] is None
        and lp['top_logprobs'][0] is None
    )
    assert lp['token_logprobs'][1:] == pytest.approx(
        [float(want[i, t]) for i, t in enumerate(ids[1:])], abs=1e-4
    )
    assert (
        lp['text_offset'] == [sum(map(len, lp['tokens'][:k])) for k in range(len(ids))]
        and ''.join(lp['tokens']) == 'What is 6*7?'
    )
    named = complete(
        client,
        prompt='What is 6*7?',
        max_tokens=0,
        echo=True,
        logprobs=3,
        return_tokens_as_token_ids=True,
    ).json()['choices'][0]['logprobs']
    assert named['tokens'] == [f'token_id:{i}' for i in ids] and all(
        3 <= len(t) <= 4 for t in named['top_logprobs'][1:]
    )
    assert all(
        named['top_logprobs'][k][f'token_id:{i}'] == named['token_logprobs'][k]
        for k, i in enumerate(ids)
        if k
    )


def test_echoed_tokens_hold_the_one_that_ended_the_answer(client, parts, monkeypatch):
    "Who reads a prompt's log-probabilities from an echo cuts off what was generated, one token."
    ids = parts[1]('What is 6*7?').input_ids
    (said,) = complete(
        client, prompt=ids, max_tokens=1, logprobs=1, return_tokens_as_token_ids=True
    ).json()['choices']
    end = said['logprobs']['tokens'][0]
    monkeypatch.setattr(engine, 'end_ids', lambda tok: [int(end[9:])])
    app = server.create_app(*parts, 'tiny', 'secret')
    other = TestClient(app, headers={'authorization': 'Bearer secret'})
    asked = dict(max_tokens=1, echo=True, logprobs=1, return_tokens_as_token_ids=True)
    (got,) = complete(other, prompt=ids, **asked).json()['choices']
    assert got['logprobs']['tokens'] == [*(f'token_id:{i}' for i in ids), end]
    assert (got['text'], got['finish_reason']) == ('What is 6*7?', 'stop')


def test_generated_logprobs_do_not_depend_on_temperature(client, parts):
    cold = complete(client, prompt='What', max_tokens=4, logprobs=2).json()['choices'][0][
        'logprobs'
    ]
    again = complete(client, prompt='What', max_tokens=4, logprobs=2, echo=True).json()['choices'][
        0
    ]['logprobs']
    assert again['token_logprobs'][-len(cold['tokens']) :] == pytest.approx(
        cold['token_logprobs'], abs=1e-4
    )
    assert (
        all(
            max(t.values()) == pytest.approx(lp)
            for t, lp in zip(cold['top_logprobs'], cold['token_logprobs'])
        )
        and sum(map(math.exp, cold['top_logprobs'][0].values())) < 1.001
    )


def test_n_seed_and_batches(client):
    ask = dict(prompt=['What', 'is'], n=3, max_tokens=6, temperature=1.0, seed=5)
    post = lambda **kw: [
        c['text'] for c in client.post('/v1/completions', json=ask | kw).json()['choices']
    ]
    assert (
        post() == post()
        and len(post()) == 6
        and len(set(post()[:3])) > 1
        and post() != post(seed=6)
    )
    assert post(top_p=1e-6) == [
        c['text']
        for p in ask['prompt']
        for c in complete(client, prompt=p, n=3, max_tokens=6).json()['choices']
    ]


def test_stop_strings(says, parts):
    client = says('one two three')
    empty = '<think></think>' if '<think>' in parts[1].get_added_vocab() else ''
    got = complete(client, prompt='x', max_tokens=50, stop=[' three', ' two']).json()['choices'][0]
    assert got['text'] == f'{empty}one' and got['finish_reason'] == 'stop'
    whole = complete(client, prompt='x', max_tokens=50).json()['choices'][0]['text']
    assert whole == f'{empty}one two three'
    assert (
        complete(client, prompt='x', max_tokens=2).json()['choices'][0]['finish_reason'] == 'length'
    )


def test_a_forged_turn_stays_text(client, parts):
    _, tok = parts
    messages = client.post('/tokenize', json=dict(messages=ASK)).json()
    assert messages['tokens'] == prompt_ids(tok, ASK) and messages['count'] == len(
        messages['tokens']
    )
    assert (
        messages['tokens'].count(tok.convert_tokens_to_ids('<|im_end|>')) == 2
    )  # the default system turn's and the user's, not the typed one
    assert client.post('/tokenize', json=dict(prompt='<|im_end|>')).json()['tokens'] == [
        tok.convert_tokens_to_ids('<|im_end|>')
    ]


def test_chat_message(says, parts):
    got = chat(says('é 42', 'Easy.')).json()
    assert got['object'] == 'chat.completion' and got['model'] == 'tiny'
    assert got['choices'] == [
        dict(
            index=0,
            message=dict(
                role='assistant', content='é 42', reasoning='Easy.', reasoning_content='Easy.'
            ),
            logprobs=None,
            finish_reason='stop',
            stop_reason=None,
        )
    ]


def test_tool_call_message(says, parts):
    got = chat(says('', 'Run it.', [CALL]), tools=TOOLS).json()['choices'][0]
    assert (
        got['finish_reason'] == 'tool_calls'
        and got['message']['tool_calls'] == [CALL]
        and got['message']['content'] is None
        and got['message']['reasoning_content'] == 'Run it.'
    )


def events(response):
    lines = [l.removeprefix('data: ') for l in response.text.split('\n\n') if l]
    assert lines[-1] == '[DONE]' and response.headers['content-type'].startswith(
        'text/event-stream'
    )
    return [json.loads(l) for l in lines[:-1]]


@pytest.mark.parametrize('content,calls', [('😀 é 42 < 43', None), ('', [CALL]), ('See', [CALL])])
def test_a_stream_says_the_same(says, parts, content, calls):
    client = says(content, 'Hm </ x', calls)
    whole = chat(client, tools=TOOLS).json()
    chunks = events(chat(client, tools=TOOLS, stream=True, stream_options=dict(include_usage=True)))
    deltas = [c['choices'][0]['delta'] for c in chunks[:-1]]
    assert ''.join(d.get('content', '') for d in deltas) == (
        whole['choices'][0]['message']['content'] or ''
    )
    assert (
        ''.join(d.get('reasoning_content', '') for d in deltas)
        == whole['choices'][0]['message']['reasoning_content']
    )
    assert [
        {k: v for k, v in c.items() if k != 'index'}
        for d in deltas
        for c in d.get('tool_calls', [])
    ] == (calls or [])
    assert (
        chunks[-2]['choices'][0]['finish_reason'] == whole['choices'][0]['finish_reason']
        and chunks[-1]['usage'] == whole['usage']
        and chunks[-1]['choices'] == []
    )
    assert not any(
        '�' in json.dumps(d, ensure_ascii=False)
        or '<think' in json.dumps(d)
        or '<|tool' in json.dumps(d)
        for d in deltas
    )
    assert len(deltas) > 3 and deltas[0] == dict(role='assistant', content='')


@pytest.mark.parametrize(
    'path,body,word',
    [
        ('completions', dict(prompt='x', top_j=3), 'unsupported field top_j'),
        (
            'completions',
            dict(prompt='x', best_off=2, absence_penalty=1),
            'absence_penalty, best_off',
        ),
        ('completions', dict(prompt='x', best_of=2), 'best_of: only 1 here, not 2'),
        ('completions', dict(), 'prompt'),
        ('completions', dict(prompt='x', temperature=-1), 'temperature'),
        ('completions', dict(prompt='x', logprobs=21), 'logprobs'),
        ('completions', dict(prompt=[10**6]), '1000000 is not in the vocabulary'),
        ('completions', dict(prompt='x', max_tokens=10**5), 'do not fit'),
        ('completions', dict(prompt=''), 'prompt: an empty prompt'),
        ('chat/completions', dict(messages=ASK, response_format={}), 'response_format'),
        ('chat/completions', dict(messages=ASK, tool_choice='required'), 'tool_choice'),
        ('chat/completions', dict(messages=[dict(role='robot', content='x')]), "not 'robot'"),
        ('chat/completions', dict(messages=ASK, stream=True, max_tokens=10**5), 'do not fit'),
    ],
)
def test_refusals_are_named(client, path, body, word):
    got = client.post(f'/v1/{path}', json=body)
    assert (
        got.status_code == 400
        and word in got.json()['error']['message']
        and set(got.json()['error']) == {'message', 'type', 'param', 'code'}
    )


def test_another_models_name(client):
    assert (
        complete(client, prompt='x', model='gpt').status_code == 404
        and client.get('/v1/models').json()['data'][0]['id'] == 'tiny'
    )
    assert complete(client, prompt='x', model='tiny', max_tokens=1).status_code == 200


@contextlib.contextmanager
def listening(app):
    "A real server on a real port, in a thread."
    import uvicorn

    run = uvicorn.Server(uvicorn.Config(app, port=0, log_level='error'))
    thread = threading.Thread(target=run.run)
    thread.start()
    while not run.started:
        time.sleep(0.01)
    try:
        yield 'http://127.0.0.1:%d' % run.servers[0].sockets[0].getsockname()[1]
    finally:
        run.should_exit = True
        thread.join()


def test_the_labs_client_speaks_to_it(says, client, parts, monkeypatch):
    "The contract between `k2lab.serving.client` and the server, over the real wire format."
    from k2lab.serving.client import Teacher

    monkeypatch.setenv('A_KEY', 'secret')
    scripted = says('See', 'Hm.', [CALL])
    with listening(scripted.app) as url:
        script_speaks(Teacher(f'{url}/v1', 'tiny', 'A_KEY'))
    with listening(client.app) as url:
        server_speaks(Teacher(f'{url}/v1', 'tiny', 'A_KEY', retries=0), parts[1], monkeypatch)


def script_speaks(teacher):
    reply = teacher.chat(ASK, TOOLS, temperature=0)
    *pieces, (kind, streamed) = teacher.stream(
        ASK, TOOLS, temperature=0, stream_options=dict(include_usage=True)
    )
    assert (
        kind == 'reply'
        and streamed == reply
        and reply['tool_calls'] == [CALL]
        and reply['finish'] == 'tool_calls'
        and ''.join(t for k, t in pieces if k == 'content') == 'See'
    )


def server_speaks(plain, tok, monkeypatch):
    from k2lab.serving.client import PROBES, check_parity, token_number

    assert check_parity(plain, tok) == len(PROBES) == 4
    other = build_tokenizer(['What is it?'] * 5, 340, tokenizer.family_of(tok))
    with pytest.raises(
        LabError,
        match='token .* of conversation 1 is not the lab.s; server .*another template or tokenizer',
    ):
        check_parity(plain, other)
    (choice,) = plain.complete('What is', temperature=0, max_tokens=3, logprobs=2)
    assert tok.decode([token_number(t) for t in choice['logprobs']['tokens']]) == choice['text']
    with pytest.raises(LabError, match='unsupported field top_j'):
        plain.chat(ASK, top_j=1)
    monkeypatch.delenv('A_KEY')
    with pytest.raises(LabError, match='A_KEY, which is not set'):
        plain.chat(ASK)
