"""`k2lab serve` with real processes: whose port it is, who may reach it, where the key goes, and that nothing is left.

A script that speaks as much HTTP as is needed stands in for vLLM, so that starts take no time; `embedded` is real."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from k2lab.cli import main
from k2lab.lab import locks
from k2lab.lab.config import LabError
from k2lab.launch_teacher_vllm import Config, Served, running, serving, stay
from k2lab.models.load import shipped
from k2lab.serving.address import Address, check_port, free_port, is_ours

STAND_IN = r"""#!PYTHON
import json, os, signal, socket, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
if sys.argv[1] == '-c':   # asked for its device
    print('device: cpu'); sys.exit()
mode, told = os.environ.get('MODE', ''), dict(zip(sys.argv[1:], sys.argv[2:]))
print('words', json.dumps(sys.argv), flush=True)
worker = subprocess.Popen(['env', '-i', 'sleep', '300'], start_new_session=True)
with open(os.environ['PIDS'], 'w') as out: print(os.getpid(), worker.pid, file=out)
if mode == 'deaf': signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == 'loads': time.sleep(300)
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *rest): pass
    def do_GET(self):
        known = self.headers.get('authorization') == 'Bearer ' + os.environ['VLLM_API_KEY']
        self.send_response(200 if known or self.path == '/health' else 401); self.end_headers()
        if self.path == '/stream':
            while True: self.wfile.write(b'data: {}\n\n'); time.sleep(.02)
        self.wfile.write(b'{"data": [{"id": "n"}]}')
class Server(ThreadingHTTPServer):
    daemon_threads, allow_reuse_port = True, True   # as vLLM does
    address_family = socket.AF_INET6 if ':' in told['--host'] else socket.AF_INET
server = Server((told['--host'], int(told['--port'])), Handler)
if mode == 'dies': threading.Timer(1, lambda: (print('out of luck', flush=True), os._exit(7))).start()
server.serve_forever()
"""
ADDRESSES = ('127.0.0.1', '127.0.0.3', '0.0.0.0', '::1', '::')


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    "A folder with the stand-in, where runs go too; no key is told."
    python = tmp_path / 'python'
    python.write_text(STAND_IN.replace('PYTHON', sys.executable))
    python.chmod(0o755)
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    monkeypatch.setenv('PIDS', str(tmp_path / 'pids'))
    monkeypatch.delenv('K2LAB_API_KEY', raising=False)
    return tmp_path


def config(home: Path, **more) -> Config:
    return Config(engine='vllm', family='qwen', python=str(home / 'python'), **more)


class Stranger:
    "A program that listens at an address and notes what it is sent."

    def __init__(self, ip: str, port: int = 0, shared: bool = False):
        self.heard, self.socket = (
            b'',
            socket.socket(socket.AF_INET6 if ':' in ip else socket.AF_INET),
        )
        if self.socket.family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if shared:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.socket.bind((ip, port))
        self.socket.listen(8)
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                client.settimeout(2)
                with client, contextlib.suppress(OSError):
                    self.heard += client.recv(4096)

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(5)


# ---- whose port ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('theirs', ADDRESSES)
@pytest.mark.parametrize('ours', ['127.0.0.1', '::1', '0.0.0.0', 'localhost'])
def test_a_port_that_somebody_has_at_any_address_is_refused(theirs, ours, home):
    with Stranger(theirs) as other:
        words = ['serve', 'Kimi-K2-Base', '--host', ours, '--port', str(other.port), '--public']
        with pytest.raises(LabError, match=f'port {other.port} is taken by another program'):
            main(words)
        with (
            pytest.raises(LabError, match='is taken'),
            serving(
                config(home, host=ours, port=other.port, public=True), shipped('qwen'), home / 'log'
            ),
        ):
            pytest.fail('it started')
    assert other.heard == b'' and not (home / 'pids').exists() and not (home / 'runs').exists()


@pytest.mark.parametrize('port', ['70000', '-1', '8000.5', 'http', 'nan', 'inf'])
def test_a_number_that_is_no_port_is_refused(port, home):
    with pytest.raises(LabError, match='port'):
        main(['serve', 'Kimi-K2-Base', '--port', port])


def test_a_port_that_is_lost_while_the_model_loads(home, monkeypatch):
    "The stranger answers /health, and gets no key and no other word."
    monkeypatch.setenv('MODE', 'loads')
    port = free_port('127.0.0.1')
    with contextlib.ExitStack() as later:
        strangers = []

        def late():
            while not (home / 'pids').exists():
                time.sleep(0.05)
            strangers.append(later.enter_context(Stranger('127.0.0.1', port)))

        threading.Thread(target=late, daemon=True).start()
        with (
            pytest.raises(LabError, match=f'lost port {port} to another program'),
            serving(config(home, port=port), shipped('qwen'), home / 'server.log'),
        ):
            pytest.fail('it talks to a stranger')
    assert strangers[0].heard == b'' and left(home) == []


def test_a_port_that_is_shared_is_not_ours(home):
    "vLLM lets several programs of one user listen at one port; the kernel deals the clients out to them."
    with serving(config(home), shipped('qwen'), home / 'server.log') as served:
        port = int(served.url.rpartition(':')[2])
        place, pid = Address('127.0.0.1', port), served.process.pid
        assert is_ours(place, pid) is True
        with Stranger('127.0.0.1', port, shared=True):
            assert is_ours(place, pid) is False
        assert is_ours(place, os.getpid()) is True  # the server is a child of ours


def test_no_proxy_hears_of_it(home, monkeypatch):
    with Stranger('127.0.0.1') as proxy:
        for name in ('HTTP_PROXY', 'http_proxy', 'ALL_PROXY', 'all_proxy'):
            monkeypatch.setenv(name, f'http://127.0.0.1:{proxy.port}')
        for name in ('NO_PROXY', 'no_proxy'):
            monkeypatch.delenv(name, raising=False)
        with serving(config(home), shipped('qwen'), home / 'server.log') as served:
            with pytest.raises(LabError, match='501|405|404'):  # it knows GET alone
                served.teacher(retries=0).chat([dict(role='user', content='?')])
    assert proxy.heard == b''


# ---- who may reach it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'host', ['0.0.0.0', '::', '0', '192.168.1.2', 'myhost', '[::]', '::ffff:1.2.3.4']
)
def test_other_machines_only_where_it_is_said(host, home):
    with pytest.raises(LabError, match='add --public if they are to'):
        main(['serve', 'Kimi-K2-Base', '--host', host, '--port', '0'])
    with pytest.raises(LabError, match='public=true'):
        Config(host=host)


def test_hosts_that_are_none(home):
    with pytest.raises(LabError, match="host: ' ' is no address"):
        Config(host=' ')
    with pytest.raises(LabError, match='no.such.host.invalid is unknown here'):
        main(['serve', 'x', '--host', 'no.such.host.invalid', '--public'])
    with pytest.raises(LabError, match='192.0.2.1: Cannot assign'):
        main(['serve', 'x', '--host', '192.0.2.1', '--public'])


# ---- the command -----------------------------------------------------------------------------------------------


def left(home: Path, seconds: float = 12) -> list[int]:
    "The processes of the stand-in that are alive after so many seconds."
    pids = [int(word) for word in (home / 'pids').read_text().split()]
    assert len(pids) == 2
    until = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.05)
    return alive(pids)


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


@contextlib.contextmanager
def command(home: Path, *words: str, **env: str):
    "A running `k2lab serve`; it is killed at the end."
    process = subprocess.Popen(
        [sys.executable, '-m', 'k2lab', 'serve', *words],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=open(home / 'said', 'w'),
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def stand_in(home: Path, *words: str) -> list[str]:
    return [str(shipped('qwen')), '--python', str(home / 'python'), '--port', '0', *words]


def told(process: subprocess.Popen) -> dict:
    "What `--json` printed when the server was up."
    assert process.stdout
    return json.loads(process.stdout.readline())


@pytest.mark.parametrize('number', ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGKILL', 'SIGQUIT'])
def test_no_signal_leaves_a_process_in_the_middle_of_a_stream(number, home):
    with command(home, *stand_in(home, '--json')) as process:
        about = told(process)
        key = Path(about['key_file']).read_text()
        headers = {'authorization': f'Bearer {key}'}
        url = about['base_url'].removesuffix('/v1')
        with httpx.stream('GET', f'{url}/stream', headers=headers, trust_env=False) as stream:
            assert next(stream.iter_bytes())
            process.send_signal(getattr(signal, number))
            code = process.wait(40)
            assert left(home) == []
    assert code == (0 if number in ('SIGINT', 'SIGTERM', 'SIGHUP') else -getattr(signal, number))
    check_port('127.0.0.1', int(url.rpartition(':')[2]))
    if code == 0:
        assert f'stopped by {number}' in (home / 'said').read_text()
        assert not Path(about['key_file']).exists()


def test_a_server_that_does_not_listen_to_reason(home):
    with command(home, *stand_in(home, '--json'), MODE='deaf') as process:
        told(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and left(home, 1) == []


def test_stopped_while_it_loads(home):
    with command(home, *stand_in(home), MODE='loads') as process:
        while not (home / 'pids').exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 128 + signal.SIGTERM and left(home) == []
    assert 'loading' in (home / 'said').read_text()


def test_a_server_that_ends_by_itself(home):
    with command(home, *stand_in(home, '--json'), MODE='dies') as process:
        told(process)
        assert process.wait(40) == 1 and left(home) == []
    assert 'the server ended with code 7: out of luck' in (home / 'said').read_text()


@pytest.mark.parametrize('own', ['', 'sesame-of-mine'])
def test_where_the_key_is(own, home):
    more = dict(A_KEY=own) if own else {}
    with command(home, *stand_in(home, '--key-env', 'A_KEY'), **more) as process:
        lines = [process.stdout.readline() for _ in range(7)] if process.stdout else []
        text = ''.join(lines)
        base_url = next(line.split()[1] for line in lines if 'base_url' in line)
        server = psutil.Process(int((home / 'pids').read_text().split()[0]))
        shown = ' '.join(server.cmdline())
        if own:
            key = own
            assert 'in $A_KEY' in text and 'OPENAI_API_KEY="$A_KEY"' in text
        else:
            file = Path(
                next(line for line in lines if line.startswith('  key')).split()[2].rstrip(',')
            )
            key = file.read_text()
            assert file.stat().st_mode & 0o777 == 0o600 and len(key) == 32
            assert f'OPENAI_API_KEY="$(cat {file})"' in text
        models = httpx.get(
            f'{base_url}/models', headers={'authorization': f'Bearer {key}'}, trust_env=False
        )
        assert models.status_code == 200
        log = Path(next(line for line in lines if line.startswith('  log')).split()[1])
        written = [text, shown, log.read_text(), (home / 'said').read_text()]
        assert [key in part for part in written] == [False] * 4
        process.send_signal(signal.SIGINT)
        process.wait(40)
    kept = [p for p in (home / 'runs').rglob('*') if p.is_file() and key.encode() in p.read_bytes()]
    assert kept == []


def test_a_key_that_no_header_carries(home, monkeypatch):
    monkeypatch.setenv('A_KEY', 'one two')
    with pytest.raises(LabError, match='A_KEY: a key is printable ASCII'):
        main(['serve', *stand_in(home, '--key-env', 'A_KEY')])
    assert 'one two' not in ''.join(p.read_text() for p in (home / 'runs').rglob('*.log'))


# ---- options of vLLM -------------------------------------------------------------------------------------------


def test_options_of_vllm_arrive(home):
    with command(
        home, *stand_in(home, '--json', '--', '--max-model-len=512', '--no-enforce-eager')
    ) as process:
        words = json.loads(
            Path(told(process)['log']).read_text().splitlines()[0].removeprefix('words ')
        )
    assert ['--max-model-len', '512', '--no-enforce-eager'] == words[-3:]
    assert words[words.index('--tool-call-parser') + 1] == 'hermes'
    assert words[words.index('--served-model-name') + 1] == 'qwen-nano-base'
    room = int(words[words.index('--kv-cache-memory-bytes') + 1])  # vLLM would take nearly all
    assert 0 < room < psutil.virtual_memory().total / 4


@pytest.mark.parametrize(
    'word, why',
    [
        ('--trust-remote-code', 'trust_remote_code would run code'),
        ('--trust_remote_code=true', 'trust_remote_code would run code'),
        ('--api-key=sesame', 'would show the key'),
        ('--trust', 'trust_remote_code would run code'),
        ('--api-k=sesame', 'would show the key'),
        ('--hos=0.0.0.0', 'hos is the field'),
        ('--conf=a.yaml', 'conf is a file of further options'),
        ('--host=0.0.0.0', 'host is the field'),
        ('--port=1', 'port is the field'),
        ('--config=a.yaml', 'config is a file of further options'),
        ('--uds=a', 'uds is no address'),
        ('-tp', "'-tp': after -- stand options of vLLM by their long names"),
        ('8192', "'8192'"),
        ('--a b', "'a b' is no name of an option"),
    ],
)
def test_options_of_vllm_that_are_refused(word, why, home):
    with pytest.raises(LabError, match=why) as e:
        main(['serve', *stand_in(home, '--', word)])
    assert 'sesame' not in str(e.value) and not (home / 'runs').exists()


@pytest.mark.parametrize(
    'words', [['--engine', 'embedded', '--', '--seed', '1'], ['--engine', 'sglang']]
)
def test_engines_that_do_not_fit(words, home):
    with pytest.raises(LabError, match="for vLLM; leave them out|unknown engine 'sglang'"):
        main(['serve', 'Kimi-K2-Base', '--port', '0', *words])


def test_an_interpreter_without_vllm(home):
    (home / 'python').write_text('#!/bin/sh\necho no module named vllm >&2\nexit 1\n')
    with pytest.raises(LabError, match='does not import it .no module named vllm'):
        main(['serve', *stand_in(home)])
    with pytest.raises(LabError, match='/no/python: no such program'):
        main(['serve', 'Kimi-K2-Base', '--port', '0', '--python', '/no/python'])


# ---- names -----------------------------------------------------------------------------------------------------


def test_names_that_lead_nowhere(home, monkeypatch):
    for name, why in (
        ('Kimi-K2-Bass', "did you mean 'Kimi-K2-Base'"),
        ('k2_think_dpo', 'run `k2lab run_dpo_reasoning'),
        ('/no/such/folder', '/no/such/folder'),
    ):
        with pytest.raises(LabError, match=why) as e:
            main(['serve', name, '--port', '0', '--scale', 'nano'])
        assert '\n' not in str(e.value)
    monkeypatch.setenv('K2LAB_ROOT', '/no/lab')
    with pytest.raises(LabError, match='no such folder, no hub id .* no lab here knows names'):
        main(['serve', 'Kimi-K2-Base', '--port', '0'])


def test_a_model_that_does_not_fit_is_not_fetched(home):
    with pytest.raises(LabError, match='Kimi-K2-Thinking does not fit: .*--anyway'):
        main(
            ['serve', 'Kimi-K2-Thinking', '--scale', 'full', '--port', '0', '--engine', 'embedded']
        )


# ---- the lab's own server --------------------------------------------------------------------------------------


@pytest.mark.parametrize('host', ['127.0.0.1', '::1'])
def test_the_embedded_server_answers_and_goes(host, home):
    with command(
        home, 'Kimi-K2-Base', '--scale', 'smoke', '--port', '0', '--host', host, '--json'
    ) as process:
        about = told(process)
        assert about['engine'] == 'embedded' and about['model'] == 'Kimi-K2-Base'
        headers = {'authorization': f'Bearer {Path(about["key_file"]).read_text()}'}
        body = dict(
            model='Kimi-K2-Base', messages=[dict(role='user', content='hello')], max_tokens=900
        )
        ask = dict(json=body | dict(stream=True), headers=headers, timeout=60, trust_env=False)
        with httpx.stream('POST', f'{about["base_url"]}/chat/completions', **ask) as stream:
            assert stream.status_code == 200 and next(stream.iter_bytes())
            ours = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        assert alive([p.pid for p in ours]) == []


# ---- what it stands on -----------------------------------------------------------------------------------------


def test_a_command_that_ends_at_once_is_noticed(home):
    "Its supervisor once lost the exit code of a command that was faster, and waited for ever."
    for _ in range(3):
        with running(['sh', '-c', 'exit 3'], 'key', home / 'log') as process:
            assert process.wait(30) == 3


def test_a_server_dies_with_its_keeper(home):
    code = (
        'import sys, time\nfrom pathlib import Path\n'
        'from k2lab.launch_teacher_vllm import Config, serving\n'
        f'cfg, place = Config(engine="vllm", python={str(home / "python")!r}), Path({str(shipped("qwen"))!r})\n'
        f'with serving(cfg, place, Path({str(home / "server.log")!r})): print(flush=True); time.sleep(60)'
    )
    keeper = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
    assert keeper.stdout
    keeper.stdout.readline()
    keeper.kill()
    keeper.wait()
    assert left(home) == []
    locks.sweep()


def test_a_stage_notices_that_its_server_is_gone(home, monkeypatch):
    monkeypatch.setenv('MODE', 'dies')
    job = type('Job', (), dict(log=lambda self, **row: None))()
    with serving(config(home), shipped('qwen'), home / 'server.log') as served:
        assert isinstance(served, Served)
        with pytest.raises(LabError, match='the server ended with code 7 while it was up'):
            stay(job, served, 60)
