"""The same requests to any server of the scripted checkpoint, and what it answers, without what changes by the call.

python tests/contract/wire.py URL MODEL > answers.json       the key is in $K2LAB_API_KEY
"""

import json
import os
import sys
from collections.abc import Iterator

import httpx

COMPLETE, CHAT, TOKENIZE = '/v1/completions', '/v1/chat/completions', '/tokenize'
ASK = [dict(role='user', content='What is 2 + 3?')]
LONG = [dict(role='user', content='word ' * 9000)]
NUMBER = dict(type='integer')


def tool(name: str, **properties) -> dict:
    "A declared tool."
    schema = dict(type='object', properties=properties, required=list(properties))
    return dict(type='function', function=dict(name=name, description=name, parameters=schema))


TOOLS = [tool('add', a=NUMBER, b=NUMBER)]
NAMED = dict(type='function', function=dict(name='add'))
CALL = dict(id='call_1', type='function', function=dict(name='add', arguments='{"a": 2, "b": 3}'))
RESULT = dict(role='tool', tool_call_id='call_1', content='5')
SAID = dict(role='assistant', content=None, tool_calls=[CALL])
USAGE = dict(stream=True, stream_options=dict(include_usage=True))


def complete(**more) -> tuple:
    "A request to /v1/completions; a field that is None is left out."
    body = dict(model='M', prompt='Count up', max_tokens=6, temperature=0) | more
    return 'POST', COMPLETE, {k: v for k, v in body.items() if v is not None}


def chat(**more) -> tuple:
    "A request to /v1/chat/completions; a field that is None is left out."
    body = dict(model='M', messages=ASK, max_tokens=40, temperature=0) | more
    return 'POST', CHAT, {k: v for k, v in body.items() if v is not None}


def said(content, **more) -> tuple:
    "A request with one message of the user."
    return chat(messages=[dict(role='user', content=content)], **more)


CASES = {
    'health': ('GET', '/health'),
    'version': ('GET', '/version'),
    'models': ('GET', '/v1/models'),
    'no such path': ('POST', '/v1/nothing', {}),
    'wrong method': ('GET', CHAT),
    'no key': ('GET', '/v1/models', None, {'authorization': ''}),
    'wrong key': (*chat(), {'authorization': 'Bearer wrong'}),
    'malformed JSON without a key': ('POST', CHAT, b'{"messages": ', {'authorization': ''}),
    'malformed JSON': ('POST', CHAT, b'{"messages": '),
    'a body that is no object': ('POST', CHAT, [1]),
    'completion': complete(),
    'completion of token ids': complete(prompt=[5, 6, 7]),
    'completions of two prompts': complete(prompt=['Count up', 'Go']),
    'completion, n 2': complete(n=2, temperature=0.1, seed=1),
    'completion, n 2, greedy': complete(n=2),
    'completion to its end': complete(max_tokens=40),
    'completion, default length': complete(max_tokens=None, prompt='x'),
    'completion, log-probabilities': complete(logprobs=2),
    'completion, log-probabilities 0': complete(logprobs=0),
    'completion, tokens as ids': complete(logprobs=1, return_tokens_as_token_ids=True),
    'completion, echo': complete(echo=True, max_tokens=2),
    'completion, echo and log-probabilities': complete(echo=True, logprobs=1, max_tokens=1),
    'completion, echo of a prompt alone': complete(echo=True, logprobs=1, max_tokens=0),
    'completion, stop': complete(stop=[' three'], max_tokens=20),
    'completion, stop within a token': complete(stop='hre', max_tokens=20),
    'completion, stop in a stream': complete(stop=['ee fo'], max_tokens=20, stream=True),
    'completion, stream': complete(stream=True),
    'completion, stream and usage': complete(**USAGE),
    'completion, stream, log-probabilities': complete(stream=True, logprobs=1),
    'completion, neutral': complete(presence_penalty=0, frequency_penalty=0, user='me', seed=1),
    'completion, empty prompt': complete(prompt=''),
    'completion, no prompt': complete(prompt=None),
    'completion, negative token id': complete(prompt=[-1]),
    'completion, token id out of range': complete(prompt=[10**6]),
    'completion, prompt too long': complete(prompt='word ' * 9000),
    'completion, answer too long': complete(max_tokens=10**5),
    'completion, too many log-probabilities': complete(logprobs=21),
    'completion, temperature -1': complete(temperature=-1),
    'completion, temperature text': complete(temperature='hot'),
    'completion, temperature NaN': (
        'POST',
        COMPLETE,
        b'{"model": "M", "prompt": "x", "temperature": NaN}',
    ),
    'completion, top_p 0': complete(top_p=0),
    'completion, n 0': complete(n=0),
    'completion, wrong model': complete(model='gpt'),
    'completion, stream_options without stream': complete(stream_options=dict(include_usage=True)),
    'chat': chat(),
    'chat, no length': chat(max_tokens=None),
    'chat, cut': chat(max_tokens=3),
    'chat, max_completion_tokens': chat(max_tokens=None, max_completion_tokens=3),
    'chat, n 2': chat(n=2, temperature=0.1, seed=1),
    'chat, n 2 in a stream': chat(n=2, stream=True, temperature=0.1, seed=1),
    'chat, n 2, greedy': chat(n=2),
    'chat, stream': chat(stream=True),
    'chat, stream and usage': chat(**USAGE),
    'chat, stream, cut': chat(stream=True, max_tokens=3),
    'chat, stop': chat(stop=[' three']),
    'chat, stop across tokens': chat(stop=['ee fo']),
    'chat, stop in a stream': chat(stop=['ee fo'], stream=True),
    'chat, two stops in a stream': chat(stop=['ee fox', 'four'], stream=True),
    'chat, log-probabilities': chat(logprobs=True, top_logprobs=2, max_tokens=4),
    'chat, log-probabilities in a stream': chat(
        logprobs=True, top_logprobs=2, max_tokens=4, stream=True
    ),
    'chat, log-probabilities without any beside': chat(logprobs=True, max_tokens=4),
    'chat, neutral': chat(
        presence_penalty=0, frequency_penalty=0, user='me', n=1, response_format=dict(type='text')
    ),
    'chat, developer': chat(messages=[dict(role='developer', content='Be brief.'), *ASK]),
    'chat, parts': said([dict(type='text', text='What is'), dict(type='text', text=' 2 + 3?')]),
    'chat, tool called': chat(tools=TOOLS),
    'chat, tool called in a stream': chat(tools=TOOLS, stream=True),
    'chat, tool result': chat(tools=TOOLS, messages=[*ASK, SAID, RESULT]),
    'chat, tool result in a stream': chat(tools=TOOLS, messages=[*ASK, SAID, RESULT], stream=True),
    'chat, tool_choice none': chat(tools=TOOLS, tool_choice='none', max_tokens=4),
    'chat, tool_choice auto': chat(tools=TOOLS, tool_choice='auto'),
    'chat, tool_choice required': chat(tools=TOOLS, tool_choice='required'),
    'chat, tool_choice required in a stream': chat(
        tools=TOOLS, tool_choice='required', stream=True
    ),
    'chat, tool_choice named': chat(tools=TOOLS, tool_choice=NAMED),
    'chat, parallel_tool_calls false': chat(tools=TOOLS, parallel_tool_calls=False),
    'chat, required without tools': chat(tool_choice='required'),
    'chat, named without tools': chat(tool_choice=NAMED),
    'chat, another tool named': chat(tools=TOOLS, tool_choice=dict(NAMED, function=dict(name='b'))),
    'chat, prompt too long': chat(messages=LONG),
    'chat, prompt too long, no length': chat(messages=LONG, max_tokens=None),
    'chat, prompt too long in a stream': chat(messages=LONG, stream=True),
    'chat, answer too long': chat(max_tokens=10**5),
    'chat, wrong model': chat(model='gpt'),
    'chat, no messages': chat(messages=None),
    'chat, empty messages': chat(messages=[]),
    'chat, messages text': chat(messages='hello'),
    'chat, message text': chat(messages=['hello']),
    'chat, no role': chat(messages=[dict(content='x')]),
    'chat, content a number': said(5),
    'chat, content a list of texts': said(['hi']),
    'chat, part without text': said([dict(type='text')]),
    'chat, image part': said([dict(type='image_url', image_url=dict(url='x'))]),
    'chat, call without function': chat(
        messages=[*ASK, dict(SAID, tool_calls=[dict(id='a')]), RESULT]
    ),
    'chat, tool_calls text': chat(messages=[*ASK, dict(SAID, tool_calls='abc')]),
    'chat, tool without function': chat(tools=[dict(type='function')]),
    'chat, temperature -1': chat(temperature=-1),
    'chat, n 0': chat(n=0),
    'chat, max_tokens text': chat(max_tokens='many'),
    'chat, top_logprobs without logprobs': chat(top_logprobs=2),
    'chat, too many top_logprobs': chat(logprobs=True, top_logprobs=21),
    'chat, stream_options without stream': chat(stream_options=dict(include_usage=True)),
    'chat, seed out of range': chat(seed=2**70),
    'chat, stop a number': chat(stop=5),
    'tokenize a text': ('POST', TOKENIZE, dict(model='M', prompt='What is 2?')),
    'tokenize messages': ('POST', TOKENIZE, dict(model='M', messages=ASK, tools=TOOLS)),
    'tokenize nothing': ('POST', TOKENIZE, dict(model='M')),
    'detokenize': ('POST', '/detokenize', dict(model='M', tokens=[5, 6, 7])),
}
VOLATILE = {'id', 'created', 'system_fingerprint', 'version', 'message', 'root'}


def masked(value, key: str = ''):
    "A value as it is in every call: no ids and times, probabilities to three digits."
    if key in VOLATILE and not isinstance(value, dict):
        return type(value).__name__
    if isinstance(value, dict):
        return {k: masked(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [masked(v) for v in value]
    return round(value, 3) + 0.0 if isinstance(value, float) else value


def paths(value, place: str = '') -> Iterator[tuple[str, str]]:
    "`(path, kind)` of everything in a value; items of a list share a path."
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, f'{place}.{key}' if place else key)
        if not value:
            yield place, 'object'
    elif isinstance(value, list):
        for inner in value:
            yield from paths(inner, f'{place}[]')
        if not value:
            yield place, 'list'
    else:
        yield place, 'null' if value is None else type(value).__name__


def put_together(events: list[dict]) -> dict:
    "What the pieces of a stream say as a whole, and the keys that any of them has."
    keys, choices, usage = set(), {}, None
    for event in events:
        keys |= set(paths(masked(event)))
        usage = event.get('usage') or usage
        for choice in event.get('choices', []):
            one = choices.setdefault(choice['index'], dict(text='', calls='', names=[], finish=[]))
            delta = choice.get('delta') or {}
            one['text'] += choice.get('text') or delta.get('content') or ''
            for call in delta.get('tool_calls') or []:
                one['calls'] += (call.get('function') or {}).get('arguments') or ''
                one['names'] += filter(None, [(call.get('function') or {}).get('name')])
            one['finish'] += filter(None, [choice.get('finish_reason')])
    first = [sorted(d) for e in events[:1] for c in e.get('choices', []) if (d := c.get('delta'))]
    kept = {str(index): choice for index, choice in sorted(choices.items())}
    return dict(keys=sorted(map(list, keys)), choices=kept, usage=usage, first=first)


def events_of(text: str) -> tuple[list[dict], bool]:
    "The JSON objects of a stream, and whether it ends as OpenAI's do."
    lines = [
        line.removeprefix('data:').strip() for line in text.split('\n') if line.startswith('data:')
    ]
    return [json.loads(line) for line in lines if line != '[DONE]'], lines[-1:] == ['[DONE]']


def answer(client: httpx.Client, model: str, case: tuple) -> dict:
    "What a server answers to a case."
    method, path, body, headers = (*case, None, None)[:4]
    if isinstance(body, dict) and body.get('model') == 'M':
        body = dict(body, model=model)
    sent = (
        dict(content=body.replace(b'"M"', json.dumps(model).encode()))
        if isinstance(body, bytes)
        else {}
    )
    if body is not None and not sent:
        sent = dict(json=body)
    headers = {'content-type': 'application/json'} | (headers or {})
    got = client.request(method, path, headers=headers, **sent)
    if got.headers.get('content-type', '').startswith('text/event-stream'):
        events, done = events_of(got.text)
        return dict(status=got.status_code, stream=put_together(events), done=done)
    try:
        return dict(status=got.status_code, body=masked(got.json()))
    except ValueError:
        return dict(status=got.status_code, text=got.text[:40])


def client_for(url: str, key: str) -> httpx.Client:
    "A client with the key."
    headers = {'authorization': f'Bearer {key}'}
    return httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False)


def record(url: str, key: str, model: str, names=tuple(CASES)) -> dict:
    "`{case: answer}`."
    with client_for(url, key) as client:
        return {name: answer(client, model, CASES[name]) for name in names}


if __name__ == '__main__':
    found = record(sys.argv[1], os.environ['K2LAB_API_KEY'], sys.argv[2])
    print(json.dumps(found, indent=1, ensure_ascii=False))
