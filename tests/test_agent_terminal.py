"""`k2lab agent` as people use it: in a terminal of its own, and from a pipe."""

import io
import json
import os
import re
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pexpect
import pytest
from test_agent import Server, say, tool_call, use

from k2lab.cli import main
from k2lab.lab.config import LabError
from k2lab.models.load import open_tokenizer, smoke_model
from k2lab.serving.talk import PRIMES, SHARES, TWINS
from k2lab.tasks.sandbox import why_not
from k2lab.text.masks import row_examples
from k2lab.text.rows import read_rows

ROOT = Path(__file__).resolve().parents[1]
UP, LEFT, CTRL_C, CTRL_D = '\x1b[A', '\x1b[D', '\x03', '\x04'
KEY = 'a-key-of-the-test-83hf72hq01'
TOOLS = '''
import sys
import time


def double(n: int) -> int:
    "Twice a number."
    return 2 * n


def odd(what: str):
    "Do something odd."
    if what == 'raise':
        raise KeyError('gone')
    if what == 'exit':
        sys.exit(7)
    if what == 'hang':
        time.sleep(60)
    return dict(huge='x' * 10**7, object={1, object}, half='half \\ud83d', bell='\\x1b[2J\\x07')[what]
'''


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A folder for runs and files; what the command needs in its environment is set."
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('K2LAB_API_KEY', KEY)
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.delenv('NO_COLOR', raising=False)
    (tmp_path / 'mine.py').write_text(TOOLS)
    return tmp_path


@pytest.fixture
def address():
    "Start a server that says the given turns, one a request; its address and what it was asked."
    servers = []

    def start(*turns):
        kind = type('Turns', (Server,), dict(turns=list(turns), seen=[]))
        server = ThreadingHTTPServer(('127.0.0.1', 0), kind)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f'http://127.0.0.1:{server.server_port}/v1', kind.seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Terminal:
    "A `k2lab` command in a terminal of its own."

    def __init__(self, *words):
        self.child = pexpect.spawn(
            sys.executable,
            ['-m', 'k2lab', *words],
            cwd=ROOT,
            encoding='utf-8',
            timeout=60,
            dimensions=(40, 160),
        )

    def see(self, text: str) -> str:
        "What is shown until `text` is, without codes of the terminal."
        self.child.expect_exact(text)
        return re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', self.child.before).replace('\r', '')

    def type(self, keys: str) -> str:
        "Type, and wait for the next prompt."
        self.child.send(keys)
        return self.see('you: ')

    def end(self) -> int:
        self.child.send(CTRL_D)
        self.child.expect(pexpect.EOF)
        self.last = self.child.before
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def terminal(home):
    opened = []

    def start(*words):
        opened.append(Terminal(*words))
        return opened[-1]

    yield start
    for one in opened:
        one.child.close(force=True)


def pipe(home, text: str | bytes, *words):
    "The command with questions from a pipe."
    text = text.encode() if isinstance(text, str) else text
    words = [sys.executable, '-m', 'k2lab', 'agent', *words]
    done = subprocess.run(words, input=text, cwd=ROOT, capture_output=True, timeout=120)
    assert b'Traceback' not in done.stderr, done.stderr.decode()
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def kept(home) -> list[dict]:
    "The rows of the one talk that was kept, each read by the lab and trainable."
    [path] = (home / 'runs' / 'conversations').glob('*.jsonl')
    assert path.with_suffix('.html').read_text().startswith('<!doctype html>')
    rows, tok = read_rows(path, 'messages'), open_tokenizer(smoke_model('k2'))
    assert all(row_examples(tok, row) for row in rows)
    return rows


def test_the_first_minute_is_a_conversation_with_tools(home, terminal):
    here = terminal('agent')
    assert 'recorded model' in here.see(PRIMES.question)
    first = here.see('k2: ')
    assert '→ python' in first and ('← 24133' in first or why_not())
    here.see('you: ')
    here.type('\r')  # Enter: the tour shows its question behind a prompt of its own
    second = here.see('you: ')
    assert TWINS.question in second and ('← 25' in second or why_not())  # variables stay
    here.type('\r')
    third = here.see('you: ')
    assert SHARES.question in third and '→ share(part=8, whole=384)' in third
    assert '← 2.08 %' in third and '3.21 % take part' in third
    assert 'recording' in here.type('Who are you?\r')
    assert here.end() == 0 and 'to train on' in here.last
    [row] = kept(home)
    assert [m['role'] for m in row['messages']].count('tool') == 4
    assert [t['function']['name'] for t in row['tools']] == ['python', 'share']


def test_arrow_keys_edit_and_earlier_questions_come_back(home, terminal, address):
    url, seen = address(say('All done.'))
    words = 'agent', '--endpoint', url, '--model', 'm'
    here = terminal(*words)
    here.see('you: ')
    here.type(f'ac{LEFT}b\r')
    here.type(f'{UP}d\r')
    assert [m['content'] for m in seen[-1]['messages'] if m['role'] == 'user'] == ['abc', 'abcd']
    assert '/clear' in here.type('/cl\t\r')
    here.end()
    history = home / 'runs' / 'conversations' / '.history'
    assert history.stat().st_mode & 0o77 == 0
    here = terminal(*words)
    here.see('you: ')
    here.type(f'{UP}{UP}\r')
    assert seen[-1]['messages'] == [dict(role='user', content='abcd')]
    here.type(f'my key is {KEY}\r')
    here.end()
    assert KEY not in history.read_text() and 'abcd' in history.read_text()
    assert KEY not in ''.join(p.read_text() for p in history.parent.glob('*.*'))


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(home, terminal, address):
    url, seen = address('trickle', say('All done.'))
    here = terminal('agent', '--endpoint', url, '--model', 'm')
    here.see('you: ')
    here.child.send('A long story?\r')
    here.see('x x x')
    assert '[interrupted]' in here.type(CTRL_C)
    assert 'All done.' in here.type('Shorter?\r')
    story = seen[-1]['messages']
    assert [m['role'] for m in story] == ['user', 'assistant', 'user']
    assert story[1]['content'].startswith('x x x') and 'train' not in story[1]
    assert 'Ctrl-D ends' in here.type('half a line' + CTRL_C)
    assert here.end() == 0
    [row] = kept(home)
    assert [m.get('train', True) for m in row['messages']] == [True, False, True, True]


def test_ctrl_c_stops_a_tool(home, terminal, address):
    hang = tool_call(name='odd', arguments='{"what": "hang"}')
    url, seen = address(use(hang), say('All done.'))
    here = terminal('agent', '--endpoint', url, '--model', 'm', '--tools', str(home / 'mine.py'))
    here.see('you: ')
    here.child.send('Go!\r')
    here.see("→ odd(what='hang')")
    assert '[interrupted]' in here.type(CTRL_C)
    assert 'All done.' in here.type('And now?\r')
    assert [m['content'] for m in seen[-1]['messages'] if m['role'] == 'tool'] == [
        'error: interrupted'
    ]
    assert here.end() == 0


def test_clear_forgets_and_save_writes(home, terminal, address):
    url, seen = address(say('One.'), say('Two.'), say('Three.'))
    here = terminal('agent', '--endpoint', url, '--model', 'm', '--system', 'Be brief.')
    here.see('you: ')
    here.type('first\r')
    assert 'forgotten' in here.type('/clear\r')
    here.type('second\r')
    assert [m['content'] for m in seen[-1]['messages']] == ['Be brief.', 'second']
    assert f'{home}/talk.html to read' in here.type(f'/save {home}/talk\r')
    rows = read_rows(home / 'talk.jsonl', 'messages')
    assert [r['messages'][1]['content'] for r in rows] == ['first', 'second']
    (home / 'other.html').write_text('mine')
    assert 'is there already' in here.type(f'/save {home}/other.jsonl\r')
    assert 'the path is too long' in here.type(f'/save {home}/{"x" * 300}\r')
    assert 'a file is in the way' in here.type(f'/save {home}/other.html/deeper\r')
    assert 'no command /nonsense' in here.type('/nonsense\r')
    assert (home / 'other.html').read_text() == 'mine' and here.end() == 0
    assert [len(r['messages']) for r in kept(home)] == [3, 3]


ODD = {
    'raise': "error: KeyError: 'gone'",
    'exit': 'error: SystemExit: 7',
    'huge': 'characters left out',
    'object': "<class 'object'>",
    'half': 'half \\ud83d',
    'bell': '[2J',
}


def test_functions_of_ones_own_are_tools_and_may_do_anything(home, address):
    calls = [tool_call(name='double', arguments='{"n": "21"}')]
    calls += [
        tool_call(name='odd', index=i, arguments=json.dumps(dict(what=what)))
        for i, what in enumerate(ODD, 1)
    ]
    url, seen = address(use(*calls), say('All done.'))
    words = '--endpoint', url, '--model', 'm', '--tools', str(home / 'mine.py')
    code, out, _ = pipe(home, 'Go!\n/tools\n', *words)
    assert code == 0 and 'All done.' in out and '\x1b' not in out and '\x07' not in out
    assert 'double(n)  Twice a number.  [your code, not in the sandbox]' in out
    results = [m['content'] for m in seen[-1]['messages'] if m['role'] == 'tool']
    assert results[0] == '42' and max(map(len, results)) < 30_000
    assert all(wanted in got for got, wanted in zip(results[1:], ODD.values(), strict=True))
    schema = seen[0]['tools'][1]['function']['parameters']
    assert schema['properties'] == {'n': {'type': 'integer'}} and schema['required'] == ['n']
    assert len(kept(home)[0]['messages']) == 2 + len(calls) + 1


def test_a_function_that_hangs_is_stopped_by_the_limit_of_the_question(home, address):
    hang = tool_call(name='odd', arguments='{"what": "hang"}')
    url, seen = address(use(hang, tool_call(name='double', index=1, arguments='{"n": 1}')))
    words = '--endpoint', url, '--model', 'm', '--tools', str(home / 'mine.py'), '--seconds', '1'
    code, out, _ = pipe(home, 'Go!\n', *words)
    assert code == 1 and 'error: TimeoutError: no result after' in out
    assert 'error: the time for this question is over' in out and '[stopped: time limit]' in out


def test_a_pipe_gets_plain_text_and_its_exit_code_tells(home, address):
    url, seen = address(say('half \ud83d and \u2028'), (503, dict(error='busy')))
    code, out, err = pipe(home, b'caf\xe9\n', '--endpoint', url, '--model', 'm', '--turns', '1')
    assert code == 0 and out.startswith('\nyou: caf\\xe9\nk2: half \\ud83d') and 'kept:' in err
    refused, _ = address((400, dict(error=dict(message='no'))))
    code, out, _ = pipe(home, 'One?\n', '--endpoint', refused, '--model', 'm')
    assert code == 1 and '400 no; the question is forgotten' in out


def test_an_empty_pipe_plays_the_whole_tour(home):
    code, out, _ = pipe(home, '')
    assert code == 0 and out.count('\nyou: ') == 5 and '← 3.21 %' in out
    assert len(kept(home)) == 1
    code, out, err = pipe(home, '/exit\n')
    assert (code, out) == (0, '\n') and 'nothing was asked' in err
    assert len(list((home / 'runs' / 'conversations').glob('*.html'))) == 1


def test_what_cannot_work_is_refused_in_one_line(home, address, monkeypatch, capsys):
    url, seen = address(say('Hello.'))
    closed = 'http://127.0.0.1:9/v1'
    (home / 'bare.py').write_text('def go(to):\n    "Go."\n')
    (home / 'syntax.py').write_text('def go(:\n')
    (home / 'python.py').write_text('def python(code: str) -> str:\n    "Run."\n')
    (home / 'empty').mkdir()
    cases = {
        ('--endpoint', closed, '--model', 'm'): 'is the server up?',
        ('--endpoint', 'ftp://x', '--model', 'm'): 'an address begins with http',
        ('--endpoint', 'http://[::1', '--model', 'm'): 'http://[::1',
        ('--endpoint', url): 'which model? give --model NAME',
        ('--endpoint', url, 'k2_think_dpo'): 'not both',
        ('--model', 'm'): '--model belongs to --endpoint',
        ('--turns', '0'): '--turns takes a whole number above 0',
        ('--seconds', 'nan'): '--seconds takes a number above 0',
        ('--key-env', 'sk-secret'): 'never the key',
        ('--tools', str(home / 'none.py')): 'there is no such file',
        ('--tools', str(home / 'bare.py')): "bare.py:1: go: its parameter 'to' has no type",
        ('--tools', str(home / 'syntax.py')): 'syntax.py:1: SyntaxError',
        ('--tools', str(home / 'python.py')): 'python is the name of the sandboxed tool',
        (str(home / 'empty'),): 'it has no config.json',
        ('k2_think_dpo', '--scale', 'nano'): 'is not there yet at nano: run `k2lab',
        ('Kimi-K3',): "unknown name 'Kimi-K3'",
    }
    monkeypatch.setattr(sys, 'stdin', io.StringIO('One?\n'))
    for words, line in cases.items():
        with pytest.raises(LabError) as e:
            main(['agent', *words])
        assert line in str(e.value) and '\n' not in str(e.value), words
        assert 'sk-secret' not in str(e.value)
    assert seen == [] and capsys.readouterr().out == ''
    code, out, err = pipe(home, 'One?\n', '--turns', 'x')
    assert (code, out) == (2, '') and len(err.strip().split('\n')) == 1


class Listing(Server):
    "A server that tells its models, to those who have the key."

    def do_GET(self):
        at_v1 = self.path == '/v1/models'
        known = self.headers['authorization'] == f'Bearer {KEY}'
        self.head(404 if not at_v1 else 200 if known else 401, 'application/json')
        models = [dict(id=name, max_model_len=400) for name in self.names]
        self.wfile.write(json.dumps(dict(data=models if known else [])).encode())


@pytest.fixture
def listing(address, monkeypatch):
    def start(*names):
        Listing.names = names
        monkeypatch.setattr('test_agent_terminal.Server', Listing)
        url, seen = address(say('Hello.'))
        return url, seen

    return start


def test_the_server_is_asked_for_its_models_first(home, listing, monkeypatch):
    url, seen = listing('kimi')
    code, out, _ = pipe(home, 'One?\n', '--endpoint', url)
    assert code == 0 and 'Hello.' in out
    assert seen[-1]['model'] == 'kimi' and seen[-1]['max_tokens'] == 200
    code, _, err = pipe(home, '', '--endpoint', url, '--model', 'kimmi')
    assert code == 2 and "it has no model 'kimmi'; it has kimi" in err
    code, _, err = pipe(home, '', '--endpoint', url.removesuffix('/v1'), '--model', 'kimi')
    assert code == 2 and f'the address of the API is {url}' in err
    Listing.names = 'a', 'b'
    code, _, err = pipe(home, '', '--endpoint', url)
    assert code == 2 and 'which model? give --model NAME: a, b' in err
    monkeypatch.setenv('OTHER_KEY', 'wrong')
    code, _, err = pipe(home, '', '--endpoint', url, '--key-env', 'OTHER_KEY')
    assert code == 2 and 'it wants a key; put it into $OTHER_KEY' in err and 'wrong' not in err


def test_a_full_disk_costs_the_transcript_and_nothing_else(home, terminal, address):
    url, _ = address(say('One.'))
    folder = home / 'runs' / 'conversations'
    here = terminal('agent', '--endpoint', url, '--model', 'm')
    here.see('you: ')
    [page] = folder.glob('*.html')
    page.unlink()
    page.mkdir()
    (page / 'full').touch()
    said = here.type('first\r')
    assert 'One.' in said and '[the transcript is not written: ' in said
    assert here.end() == 0


@pytest.mark.slow
def test_a_checkpoint_answers_through_its_own_server(home):
    code, out, err = pipe(home, 'Hello!\n', 'k2_think_dpo', '--scale', 'smoke', '--tokens', '8')
    assert '\nyou: Hello!\n' in out and 'starting a server for k2_think_dpo (smoke:k2)' in err
    assert code in (0, 1)  # a random model may be cut off
    assert os.listdir(home / 'runs' / 'conversations')


def test_the_stage_in_a_terminal_falls_back_to_the_recorded_model(home, terminal):
    here = terminal('agentic_demo', '--scale', 'nano', '--campaign', 'fresh')
    start = here.see('you: ')
    assert 'k2lab run_dpo_reasoning --scale nano --campaign fresh` first' in start
    here.child.send('\r')
    here.see('sum of the first 100 primes')
    here.see('you: ')
    assert here.end() == 0
    [folder] = (home / 'runs' / 'fresh').iterdir()
    assert json.loads((folder / 'run.json').read_text())['status'] == 'complete'
    assert (folder / 'transcript.jsonl').exists() and (folder / 'conversation.html').exists()
