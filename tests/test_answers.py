"""Servers that break, garble, refuse, stay away: each prompt is one row or one reject, and nothing paid for is lost."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from k2lab.lab.config import LabError
from k2lab.lab.files import as_json, read_lines
from k2lab.serving.answers import Writer, asked, read_answers, rejects_of, sample_rows
from k2lab.serving.client import Refused, Teacher, Unanswered

KINDS = 'drop e500 e503 e429 cut badjson html nochoices errbody nullcontent number'.split()
SEPARATORS = '\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r'
HALF = 'half \ud83d of a character'


def good(text: str, **more) -> dict:
    "An answer of the wire format."
    return dict(
        choices=[dict(index=0, message=dict(content=text), finish_reason='stop')], usage={}, **more
    )


class Rough(BaseHTTPRequestHandler):
    "A server that breaks a share of its answers in every way of KINDS, and refuses prompts that begin with `refused`."

    protocol_version = 'HTTP/1.1'
    rng, share = random.Random(1), 0.3

    def log_message(self, *args):
        pass

    def say(self, status: int, data: bytes, length: int | None = None):
        self.send_response(status)
        self.send_header('content-length', str(len(data) if length is None else length))
        self.send_header('retry-after', '0')
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['content-length'])))
        prompt = body['messages'][-1]['content']
        kind = self.rng.choice(KINDS) if self.rng.random() < self.share else 'good'
        answer = json.dumps(good(f'answer to {prompt}')).encode()
        if prompt.startswith('refused'):
            return self.say(400, b'{"error": {"message": "not allowed"}}')
        if kind in ('drop', 'cut'):
            self.close_connection = True
            if kind == 'cut':
                self.say(200, answer[:20], len(answer))
            return self.connection.close()
        said = dict(
            e500=(500, b'boom'),
            e503=(503, b'{"error": "overloaded"}'),
            e429=(429, b'{"error": {"message": "slow down"}}'),
            badjson=(200, answer[:-7]),
            html=(200, b'<html>502 bad gateway</html>'),
            nochoices=(200, b'{"choices": [], "usage": null}'),
            errbody=(200, b'{"error": {"message": "upstream overloaded", "code": 502}}'),
            nullcontent=(
                200,
                b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}',
            ),
            number=(200, b'{"choices": [{"message": {"content": 7}}]}'),
        )
        return self.say(*said.get(kind, (200, answer)))


@pytest.fixture
def rough():
    "The address of a rough server."
    server = ThreadingHTTPServer(('127.0.0.1', 0), Rough)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/v1'
    server.shutdown()
    server.server_close()


def ask(url: str, prompts: list, path: Path):
    sample_rows(Teacher(url, 'm', pause=0.01), prompts, path, workers=8, temperature=0)


def test_every_prompt_is_one_row_or_one_reject_through_trouble_and_kills(rough, tmp_path):
    prompts = [f'{"refused" if i % 50 == 7 else "prompt"} {i}' for i in range(500)]
    path, rng = tmp_path / 'answers.jsonl', random.Random(2)
    for n in (100, 200, 300):
        child = multiprocessing.get_context('fork').Process(target=ask, args=(rough, prompts, path))
        child.start()
        while child.is_alive() and (
            not path.exists() or path.read_bytes().count(b'\n') < n + rng.randrange(40)
        ):
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    with open(path, 'ab') as file:
        file.write(b'{"asked": "torn", "pro')  # as a kill in the middle of a line leaves it
    ask(rough, prompts, path)
    rows, rejects = read_lines(path), read_lines(rejects_of(path))
    assert sorted([r['prompt'] for r in rows] + [r['prompt'] for r in rejects]) == sorted(prompts)
    assert {r['prompt'] for r in rejects} == {p for p in prompts if p.startswith('refused')}
    assert all('400 not allowed' in r['reason'] and r['final'] for r in rejects)
    assert all(r['replies'][0]['text'] == f'answer to {r["prompt"]}' for r in rows)


def answering(body, status: int = 200, **more) -> Teacher:
    "A teacher whose server always says the same."
    content = body if isinstance(body, bytes) else as_json(body).encode()
    transport = httpx.MockTransport(lambda request: httpx.Response(status, content=content))
    return Teacher('http://script/v1', 'm', pause=0, retries=1, transport=transport, **more)


WRONG = {
    'html': b'<html>',
    'half': b'{"choices": [',
    'a list': [],
    'a number': 3,
    'null': None,
    'no choices': dict(choices=None),
    'choices of another kind': dict(choices=[3]),
    'no message': dict(choices=[dict(message=None)]),
    'an empty message': dict(choices=[dict(message=dict(content=None))]),
    'content of another kind': dict(choices=[dict(message=dict(content={'a': 1}))]),
    'parts of another kind': dict(choices=[dict(message=dict(content=[dict(text=3)]))]),
    'an error': dict(error=dict(message='overloaded', code=502)),
    'an error that is a text': dict(error='overloaded'),
    'not UTF-8': b'{"choices": [{"message": {"content": "\xff\xfe"}}]}',
    'deep': b'[' * 100_000,
}


@pytest.mark.parametrize('body', WRONG.values(), ids=WRONG)
def test_a_body_that_is_no_answer_is_one_line_and_one_reject(body, tmp_path):
    with pytest.raises(Unanswered, match=r'^http://script/v1: 200 with '):
        answering(body).chat([])
    path = tmp_path / 'a.jsonl'
    assert sample_rows(answering(body), ['one'], path) == []
    (reject,) = read_lines(rejects_of(path))
    assert (reject['prompt'], reject['final']) == ('one', False) and '\n' not in reject['reason']
    assert len(sample_rows(answering(good('at last')), ['one'], path)) == 1
    assert read_lines(rejects_of(path)) == []


KINDS_OF_ERROR = [
    (400, None, Refused),
    (422, None, Refused),
    (200, dict(error=dict(message='too long', code=400)), Refused),
    (500, None, Unanswered),
    (401, None, LabError),
    (404, None, LabError),
]


@pytest.mark.parametrize(('status', 'body', 'kind'), KINDS_OF_ERROR)
def test_what_concerns_one_prompt_is_told_from_what_concerns_all(status, body, kind):
    with pytest.raises(LabError) as error:
        answering(body or dict(error=dict(message='why')), status).chat([])
    assert type(error.value) is kind and str(error.value).startswith('http://script/v1: ')


def test_a_server_that_is_down_stops_the_rest_and_keeps_what_came(tmp_path):
    answers, calls = [good('yes')] * 3, []

    def respond(request):
        calls.append(1)
        return httpx.Response(200, json=answers.pop()) if answers else httpx.Response(503)

    teacher = Teacher(
        'http://s/v1', 'm', pause=0, retries=1, transport=httpx.MockTransport(respond)
    )
    path = tmp_path / 'a.jsonl'
    with pytest.raises(
        LabError, match='8 prompts in a row got no answer, and the rest was not asked'
    ):
        sample_rows(teacher, [str(i) for i in range(100)], path, workers=2)
    assert len(read_answers(path)) == 3 and len(calls) < 40
    assert len(sample_rows(answering(good('yes')), [str(i) for i in range(100)], path)) == 100


def test_one_writer_for_a_file_and_a_damaged_line_is_named(tmp_path):
    path = tmp_path / 'a.jsonl'
    with Writer(path), pytest.raises(LabError, match='another process is writing'):
        sample_rows(answering(good('yes')), ['one'], path)
    sample_rows(answering(good('yes')), ['one', 'two'], path, workers=1)
    lines = path.read_bytes().split(b'\n')
    path.write_bytes(lines[0][:20] + b'\n' + lines[1] + b'\n')
    with pytest.raises(LabError, match=r'a.jsonl:1: not JSON .* mend or delete the line'):
        sample_rows(answering(good('yes')), ['one', 'two'], path)


def test_a_file_that_holds_something_else_is_refused_and_kept(tmp_path):
    path = tmp_path / 'rows.jsonl'
    for line in ('{"prompt": "one", "response": "two"}\n', '3\n', 'notes of mine'):
        path.write_text(line)
        with pytest.raises(LabError, match='not a file of answers|its last line is no answer'):
            sample_rows(answering(good('yes')), ['one'], path)
        assert path.read_text() == line


def test_a_hundred_thousand_rows_are_taken_up_in_seconds(tmp_path):
    prompts, path = [f'prompt {i}' for i in range(100_000)], tmp_path / 'a.jsonl'
    row = lambda p: dict(
        asked=asked('m', p, '', 1, {}),
        prompt=p,
        model='m',
        replies=[dict(text='4', finish='stop', tokens=1)],
    )
    path.write_text(''.join(as_json(row(p)) + '\n' for p in prompts))
    began = time.process_time()
    assert len(sample_rows(answering(b'never asked'), prompts, path)) == 100_000
    assert time.process_time() - began < 20  # it was 16 hours; 10 s are asked, on a quiet machine


@pytest.mark.parametrize('odd', [*SEPARATORS, HALF, '\x00', '😀'], ids=ascii)
def test_any_character_goes_through_client_and_file(odd, tmp_path):
    text, path = f'one{odd}two', tmp_path / 'a.jsonl'
    seen = []

    def respond(request):
        body = json.loads(request.content)
        seen.append(body['messages'][-1]['content'])
        if body.get('stream'):
            chunk = dict(choices=[dict(delta=dict(content=text), finish_reason='stop')])
            return httpx.Response(200, content=f'data: {as_json(chunk)}\n\n'.encode())
        return httpx.Response(200, content=as_json(good(text)).encode())

    teacher = Teacher('http://s/v1', 'm', transport=httpx.MockTransport(respond))
    (row,) = sample_rows(teacher, [text], path)
    assert row['replies'][0]['text'] == text == seen[0]
    assert sample_rows(None, [text], path, model='m') == [row]
    *_, (kind, reply) = teacher.stream([dict(role='user', content=text)])
    assert (kind, reply['content']) == ('reply', text)


def streamed(*chunks) -> Teacher:
    lines = [c if isinstance(c, str) else as_json(c) for c in chunks]
    return answering(''.join(f'data: {line}\r\n\r\n' for line in lines).encode())


def piece(**delta) -> dict:
    return dict(choices=[dict(index=0, delta=delta, finish_reason=None)])


END = dict(choices=[dict(index=0, delta={}, finish_reason='stop')])
CALL = dict(id='a', function=dict(name='f', arguments='{'))
ODD_PIECES = {
    'usage only': dict(choices=[], usage=dict(total_tokens=1)),
    'choices null': dict(choices=None),
    'choices of another kind': dict(choices=[None, 3, 'x']),
    'delta null': dict(choices=[dict(delta=None)]),
    'another answer': dict(choices=[dict(index=1, delta=dict(content='not mine'))]),
    'nulls': piece(content=None, reasoning_content=None, tool_calls=None),
    'calls of another kind': piece(tool_calls=[None, 'x', 3]),
    'no object of usage': dict(choices=[], usage=7),
}


@pytest.mark.parametrize('odd', ODD_PIECES.values(), ids=ODD_PIECES)
def test_a_piece_with_missing_or_odd_fields_says_nothing(odd):
    *_, (_, reply) = streamed(piece(content='a'), odd, piece(content='b'), END).stream([])
    assert (reply['content'], reply['tool_calls'], reply['finish']) == ('ab', [], 'stop')


BROKEN = {
    'an error': dict(error=dict(message='overloaded')),
    'no JSON': '{"choices": [',
    'a list': [],
    'no end': piece(content='b'),
    'text of another kind': piece(content={'a': 1}),
}


@pytest.mark.parametrize('odd', BROKEN.values(), ids=BROKEN)
def test_a_broken_stream_is_one_line(odd):
    pieces = streamed(piece(content='a'), odd).stream([])
    assert next(pieces) == ('content', 'a')
    with pytest.raises(Unanswered, match=r'^http://script/v1: the stream broke off'):
        list(pieces)


def test_calls_are_joined_by_index_or_by_id_and_arguments_may_be_objects():
    calls = [
        [dict(index=7, id='a', function=dict(name='f', arguments='{"x"'))],
        [
            dict(index=7, function=dict(arguments=': 1}')),
            dict(index=0, id='b', function=dict(name='g', arguments={'y': 2})),
        ],
        [dict(id='c', function=dict(name='h'))],
        [dict(function=dict(arguments='{}'))],
        [dict(index=10**12, id='d', function=None)],
    ]
    *_, (_, reply) = streamed(*(piece(tool_calls=c) for c in calls), END).stream([])
    got = [
        (c['id'], c['function']['name'], c['function']['arguments']) for c in reply['tool_calls']
    ]
    assert got == [('a', 'f', '{"x": 1}'), ('b', 'g', '{"y": 2}'), ('c', 'h', '{}'), ('d', '', '')]
    assert all(set(c) == {'id', 'type', 'function'} for c in reply['tool_calls'])


def test_an_answer_without_an_end_and_an_address_that_is_none():
    with pytest.raises(Unanswered, match='more than 64 MiB'):
        answering(b' ' * (2**26 + 1)).chat([])
    with pytest.raises(LabError, match=r"base_url 'localhost:8000': an address begins with http"):
        Teacher('localhost:8000', 'm')
