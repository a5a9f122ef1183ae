"""Servers and tools that misbehave: no traceback, limits that hold, and a history that servers and trainings take."""

import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from k2lab.models.load import open_tokenizer, smoke_model
from k2lab.serving.agent import PYTHON, Limits, chat_loop, printer, run_call
from k2lab.serving.client import Teacher
from k2lab.serving.transcripts import page, row_fault, row_of
from k2lab.text.calls import K2_ID
from k2lab.text.masks import row_examples

USAGE = dict(choices=[], usage=dict(prompt_tokens=5, completion_tokens=5, total_tokens=10))


def piece(delta=None, finish=None, index=0) -> dict:
    return dict(choices=[dict(index=index, delta=delta, finish_reason=finish)])


def tool_call(code='print(1)', index=0, id=None, name='python', arguments=None) -> dict:
    arguments = json.dumps(dict(code=code)) if arguments is None else arguments
    return dict(
        index=index,
        id=id or f'functions.{name}:{index}',
        function=dict(name=name, arguments=arguments),
    )


END = [piece({}, 'stop'), USAGE, '[DONE]']
CALLED = [piece({}, 'tool_calls'), USAGE, '[DONE]']


def say(*texts) -> list:
    return [piece(dict(content=t)) for t in texts] + END


def use(*calls) -> list:
    return [piece(dict(tool_calls=[c])) for c in calls] + CALLED


DONE = say('All ', 'done.')
PART = piece(dict(content='So'))
# what the server says, turn by turn; then the roles of the conversation after the question
CASES = {
    'two calls': (
        [use(tool_call(), tool_call('print(2)', 1)), DONE],
        'assistant tool tool assistant',
    ),
    'fragments': (
        [
            [
                piece(dict(tool_calls=[tool_call(arguments='')])),
                piece(dict(tool_calls=[dict(index=0, function=dict(arguments='{"code": "7"}'))])),
                *CALLED,
            ],
            DONE,
        ],
        'assistant tool assistant',
    ),
    'foreign ids': (
        [use(tool_call(id='call_a'), tool_call('2', 1, 'call_b')), DONE],
        'assistant tool tool assistant',
    ),
    'one id for all': (
        [use(tool_call(), tool_call('2', 1, 'functions.python:0')), use(tool_call()), DONE],
        'assistant tool tool assistant tool assistant',
    ),
    'unknown tool': (
        [use(tool_call(name='web', arguments='{}')), DONE],
        'assistant tool assistant',
    ),
    'a tool without a name': ([use(tool_call(name='', id='x')), DONE], 'assistant tool assistant'),
    'a name with spaces': (
        [use(tool_call(name='my tool', id='x')), DONE],
        'assistant tool assistant',
    ),
    'arguments not JSON': (
        [use(tool_call(arguments='{"code": "print(1)')), DONE],
        'assistant tool assistant',
    ),
    'arguments a list': ([use(tool_call(arguments='[1]')), DONE], 'assistant tool assistant'),
    'arguments deep': ([use(tool_call(arguments='[' * 50_000)), DONE], 'assistant tool assistant'),
    'arguments an object': (
        [use(tool_call(arguments=dict(code='print(1)'))), DONE],
        'assistant tool assistant',
    ),
    'arguments null': (
        [use(dict(index=0, id='a', function=dict(name='python', arguments=None))), DONE],
        'assistant tool assistant',
    ),
    'function null': (
        [use(dict(index=0, id='a', function=None)), DONE],
        'assistant tool assistant',
    ),
    'history refused': (
        [use(tool_call(arguments='{"code')), (400, dict(error=dict(message='no JSON')))],
        'assistant tool assistant',
    ),
    'an error inside': ([[PART, dict(error=dict(message='engine died', code=500))]], ''),
    'a garbled piece': ([[PART, '{"choices": [{"ind', *END]], ''),
    'breaks off': ([[PART]], ''),
    'no choices': ([[PART, dict(object='ping'), *END]], 'assistant'),
    'delta missing': ([[dict(choices=[dict(index=0)]), piece(None), PART, *END]], 'assistant'),
    'choices null': ([[dict(choices=None), PART, *END]], 'assistant'),
    'content a number': ([[piece(dict(content=3)), *END]], ''),
    'another answer in the stream': (
        [[PART, piece(dict(content='no'), index=1), *END]],
        'assistant',
    ),
    'usage odd': ([[PART, dict(choices=[], usage='many'), *END[:1]]], 'assistant'),
    'nothing at all': ([END], 'assistant'),
    'separators': ([say('one\u2028two\x85three')], 'assistant'),
    'half a character': ([say('half \ud83d')], 'assistant'),
    'control characters': ([say('\x1b[2Jgone\x07')], 'assistant'),
    'endless calls': ([use(tool_call())] * 20, ' '.join(['assistant tool'] * 4)),
    'a page': ([(200, '<html>')], ''),
    'a refusal': ([(400, dict(error='no'))], ''),
    'a wrong key': ([(401, dict(error=dict(message='key')))], ''),
    'down': ([(503, dict(error=dict(message='busy')))], ''),
    'trickle': (['trickle'], 'assistant'),
    'hang': (['hang'], 'assistant'),
    'hang at the start': (['silent'], 'assistant'),
    'no max_tokens': (['flood'], 'assistant'),
    'a tool raises KeyError': ([use(tool_call('raise')), DONE], 'assistant tool assistant'),
    'a tool returns a set': ([use(tool_call('set')), DONE], 'assistant tool assistant'),
    'a tool returns nothing': ([use(tool_call('none')), DONE], 'assistant tool assistant'),
    'a tool returns half a character': ([use(tool_call('half')), DONE], 'assistant tool assistant'),
    'a tool returns a megabyte': ([use(tool_call('long')), DONE], 'assistant tool assistant'),
    'a tool ends the process': ([use(tool_call('exit')), DONE], 'assistant tool assistant'),
}


def raw(*lines) -> bytes:
    "An answer of a server, byte for byte, as a stream of events."
    texts = (x if isinstance(x, str) else f'data: {json.dumps(x)}' for x in lines)
    return '\n\n'.join(texts).encode('utf-8', 'surrogatepass') + b'\n\n'


def spent(tokens) -> dict:
    return dict(choices=[], usage=dict(completion_tokens=tokens))


STOP = [piece({}, 'stop'), 'data: [DONE]']
A_CALL = 'assistant tool assistant'
MORE = {
    'a list for a piece': ([raw([1], PART, *STOP)], ''),
    'a number for a piece': ([raw('data: 7', PART, *STOP)], ''),
    'null for a piece': ([raw('data: null', PART, *STOP)], ''),
    'a choice that is a text': ([raw(dict(choices=['So']), PART, *STOP)], 'assistant'),
    'a finish that is a number': ([raw(piece(dict(content='So'), 7), *STOP)], 'assistant'),
    'a delta that is a list': ([raw(piece(['So']), PART, *STOP)], 'assistant'),
    'an index that is a text': ([raw(piece(dict(content='no'), index='0'), PART, *STOP)], 'assistant'),
    'calls as an object': ([raw(piece(dict(tool_calls={'0': 1})), PART, *STOP)], 'assistant'),
    'calls that are null': ([raw(piece(dict(tool_calls=[None, 3])), PART, *STOP)], 'assistant'),
    'a call with a name that is a number': (
        [raw(piece(dict(tool_calls=[dict(index=0, function=dict(name=3))])), *STOP), DONE],
        A_CALL,
    ),
    'a call with an id that is a number': (
        [raw(piece(dict(tool_calls=[dict(tool_call(), id=9)])), *STOP), DONE],
        A_CALL,
    ),
    'a call with an index that is a text': ([use(tool_call(index='a', id='x')), DONE], A_CALL),
    'a call at index 1000000': ([use(tool_call(index=10**6)), DONE], A_CALL),
    'a name in two pieces': (
        [
            [
                piece(dict(tool_calls=[tool_call(name='pyt', arguments='')])),
                piece(dict(tool_calls=[dict(index=0, function=dict(name='hon', arguments='{}'))])),
                *CALLED,
            ],
            DONE,
        ],
        A_CALL,
    ),
    'a name of another script': ([use(tool_call(name='питон', id='x')), DONE], A_CALL),
    'a name with a dot': ([use(tool_call(name='a.b', id='x')), DONE], A_CALL),
    'arguments that are a number': ([use(tool_call(arguments=7)), DONE], A_CALL),
    'arguments with NaN': ([use(tool_call(arguments='{"code": NaN}')), DONE], A_CALL),
    'arguments with a large number': ([use(tool_call(arguments='{"code": 1e999}')), DONE], A_CALL),
    'arguments with half a character': ([use(tool_call('"\ud83d"')), DONE], A_CALL),
    'arguments with a zero byte': ([use(tool_call('a\0b')), DONE], A_CALL),
    'a key twice': ([use(tool_call(arguments='{"code": "1", "code": "2"}')), DONE], A_CALL),
    'forty calls': (
        [use(*(tool_call(index=i) for i in range(40))), DONE],
        ' '.join(['assistant', *['tool'] * 40, 'assistant']),
    ),
    'a call and a text': ([[PART, *use(tool_call())], DONE], A_CALL),
    'a call that ends with stop': (
        [[piece(dict(tool_calls=[tool_call()])), *END], DONE],
        A_CALL,
    ),
    'a call that is cut off': (
        [[piece(dict(tool_calls=[tool_call(arguments='{"co')])), piece({}, 'length')], DONE],
        A_CALL,
    ),
    'thoughts alone': ([[piece(dict(reasoning_content='Hm')), *END]], 'assistant'),
    'thoughts that are cut off': (
        [[piece(dict(reasoning='Hm')), piece({}, 'length'), *END[1:]]],
        'assistant',
    ),
    'thoughts that are a number': ([[piece(dict(reasoning_content=3)), *END]], ''),
    'white space alone': ([say(' ', '\n')], 'assistant'),
    'a role that is another': ([raw(piece(dict(role='tool', content='So')), *STOP)], 'assistant'),
    'comments and names of events': ([raw(': ping', 'event: x', PART, 'id: 3', *STOP)], 'assistant'),
    'carriage returns': ([raw(PART, *STOP).replace(b'\n', b'\r\n')], 'assistant'),
    'no space after the colon': ([raw(PART, *STOP).replace(b'data: ', b'data:')], 'assistant'),
    'an end that comes twice': ([raw(PART, *STOP, *STOP)], 'assistant'),
    'text after the end': ([raw(PART, *STOP, 'data: {"x')], ''),
    'bytes that are no text': ([b'data: {"choices": [{"delta": {"content": "\xff\xfe"}}]}\n\n'], ''),
    'a stream of nothing': ([b''], ''),
    'usage that is negative': ([[PART, *END[:1], spent(-5)]], 'assistant'),
    'usage that is huge': ([[*use(tool_call())[:-2], spent(10**30)]], 'assistant tool'),
    'an error as text': ([raw(dict(error='engine died'))], ''),
    'a redirect': ([(302, 'elsewhere')], ''),
    'no content': ([(204, '')], ''),
    'not found': ([(404, dict(detail='Not Found'))], ''),
    'a teapot': ([(418, 'short and stout')], ''),
    'a status alone': ([(500, '')], ''),
    'markup of calls as text': ([say('<|tool_call_begin|>functions.x:0')], 'assistant'),
    'control tokens as text': ([say('<|im_end|><|im_user|>system')], 'assistant'),
}  # fmt: skip
CASES |= MORE


class Server(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    turns: list = []
    seen: list = []

    def log_message(self, *args):
        pass

    def head(self, status=200, kind='text/event-stream'):
        self.send_response(status)
        self.send_header('content-type', kind)
        self.send_header('connection', 'close')
        self.end_headers()

    def stream(self, pieces, pause=0.0):
        for e in pieces:
            line = e if isinstance(e, str) else json.dumps(e, ensure_ascii=False)
            self.wfile.write(f'data: {line}\n\n'.encode('utf-8', 'surrogatepass'))
            self.wfile.flush()
            time.sleep(pause)

    def do_POST(self):
        self.seen.append(json.loads(self.rfile.read(int(self.headers['content-length']))))
        turn = self.turns[min(len(self.seen), len(self.turns)) - 1]
        self.close_connection = True
        try:
            if isinstance(turn, tuple):
                self.head(turn[0], 'application/json')
                self.wfile.write(
                    (turn[1] if isinstance(turn[1], str) else json.dumps(turn[1])).encode()
                )
            elif isinstance(turn, bytes):
                self.head()
                self.wfile.write(turn)
            elif turn == 'silent':
                time.sleep(5)
            else:
                self.head()
                if turn == 'hang':
                    time.sleep(5)
                many = (
                    {'trickle': (500, 0.05), 'flood': (6000, 0)}.get(turn, (0, 0))
                    if isinstance(turn, str)
                    else None
                )
                self.stream(
                    turn if many is None else [piece(dict(content='x '))] * many[0],
                    many[1] if many else 0,
                )
        except OSError:
            pass


def tool(code: str):
    "A tool that does what a code word says."
    if code == 'raise':
        return {}['no such key']
    if code == 'exit':
        raise RuntimeError('as if it ended')
    return dict(set={1, 2}, none=None, half='half \ud83d', long='x' * 10**6).get(code, 'printed')


@pytest.fixture(scope='module')
def tok():
    "The tokenizer of the lab's smallest model; what a first request imports is imported by now."
    import httpx

    assert httpx.Client()
    return open_tokenizer(smoke_model('k2'))


@pytest.fixture
def talk():
    "Ask a server of the given turns one or more questions: the conversation, what was kept, and the last words shown."
    servers = []

    def go(turns, questions=('q1',), seconds=1.0, tokens=4096, turns_of_model=4):
        kind = type('Turns', (Server,), dict(turns=list(turns), seen=[]))
        server = ThreadingHTTPServer(('127.0.0.1', 0), kind)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        out, ends, kept, asked = io.StringIO(), [], [], iter(questions)
        shown = printer(out)

        def show(kind, text):
            shown(kind, text)
            if kind == 'end':
                ends.append(text)

        teacher = Teacher(f'http://127.0.0.1:{server.server_port}/v1', 'm', retries=1, pause=0.01)
        messages = chat_loop(
            teacher,
            {'python': (PYTHON, tool)},
            Limits(turns_of_model, tokens, seconds),
            'sys',
            ask=lambda: next(asked, 'exit'),
            show=show,
            keep=lambda messages: kept.append(json.dumps(messages)),
        )
        return messages, kept, ends, kind.seen, out.getvalue()

    yield go
    for server in servers:
        server.shutdown()
        server.server_close()


def sound(messages: list):
    "Whether vLLM takes a history: each call has an id of K2's, once, its result, and an object as arguments."
    calls = [c for m in messages for c in m.get('tool_calls') or []]
    assert all(isinstance(json.loads(c['function']['arguments']), dict) for c in calls)
    assert all(K2_ID.fullmatch(c['id']) for c in calls) and len({c['id'] for c in calls}) == len(
        calls
    )
    assert [c['id'] for c in calls] == [m['tool_call_id'] for m in messages if m['role'] == 'tool']
    assert all(isinstance(m['content'], str) and len(m['content']) < 30_000 for m in messages)


@pytest.mark.parametrize('case', CASES)
def test_no_server_and_no_tool_ends_the_conversation(case, talk, tok):
    turns, roles = CASES[case]
    began = time.monotonic()
    messages, kept, ends, _, screen = talk(turns)
    assert time.monotonic() - began < 4 and len(ends) >= 1
    assert ' '.join(m['role'] for m in messages) == (f'system user {roles}' if roles else 'system')
    assert json.loads(kept[-1]) == messages and '\x07' not in screen
    sound(messages)
    row = row_of(messages, [PYTHON])
    if any(m['role'] == 'assistant' and m.get('train', True) for m in messages):
        fault = row_fault(row)
        assert (
            not fault or 'markup' in fault
        )  # what spells a call, and is none, is the reader's to refuse
        assert fault or row_examples(tok, row)
    assert page([row], 'talk').encode()


def test_the_next_question_goes_on_after_each_kind_of_trouble(talk):
    broken = [[PART, '{"cho'], use(tool_call('raise')), (400, dict(error='no')), DONE]
    messages, _, ends, seen, _ = talk(broken, ['q1', 'q2', 'q3'])
    assert [m['content'] for m in messages if m['role'] == 'user'] == ['q2', 'q3']
    assert messages[-1]['content'] == 'All done.' and ends[-1] == ''
    sound(messages)


def test_a_full_window_leaves_out_the_oldest_questions_and_says_so(talk):
    full = (400, dict(error=dict(message='the prompt is too long')))
    messages, _, ends, seen, _ = talk([DONE, DONE, full, full, DONE], ['q1', 'q2', 'q3'])
    sent = [[m['content'] for m in r['messages'] if m['role'] == 'user'] for r in seen]
    assert sent == [['q1'], ['q1', 'q2'], ['q1', 'q2', 'q3'], ['q2', 'q3'], ['q3']]
    assert all(r['messages'][0]['role'] == 'system' for r in seen)
    assert [m['content'] for m in messages if m['role'] == 'user'] == ['q1', 'q2', 'q3']
    assert '[4 older messages are left out, 4096 tokens asked for]' in ends
    _, _, ends, seen, _ = talk([full, full, DONE])
    assert [r['max_tokens'] for r in seen] == [4096, 2048, 1024] and ends[-1] == ''


def test_limits_hold_inside_a_reply(talk):
    messages, _, ends, _, _ = talk(['trickle'], seconds=0.5)
    assert ends == ['[stopped: time limit]'] and messages[-1]['content'].startswith('x x')
    messages, _, ends, _, _ = talk(['flood'], tokens=50, seconds=20)
    assert ends == ['[the answer was cut off by the token limit]']
    assert len(messages[-1]['content']) <= 2 * 52


def test_a_schema_of_any_kind_is_taken():
    anything = dict(function=dict(name='f', parameters=dict(properties=dict(code=True))))
    one = tool_call(arguments='{"code": 3}')
    assert run_call(one, {'python': (anything, lambda code: code)}) == '3'
    assert run_call(one, {'python': (dict(function=dict(name='f')), tool)}).startswith('error: ')
