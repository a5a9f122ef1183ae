"The sandbox under attack. Each attack runs as it would from a model: as code."

import os
import platform
import socket
import threading
from pathlib import Path

import pytest

from k2lab.lab.config import LabError
from k2lab.tasks import jail as jailed_program
from k2lab.tasks import sandbox
from k2lab.tasks.sandbox import run_python

WHY = sandbox.why_not()
jailed = pytest.mark.skipif(bool(WHY), reason=WHY)
# bubblewrap around it, namespaces of its own
WALLS = {'bare': (False, False), 'namespaces': (False, True), 'bwrap': (True, False), 'both': (True, True)}
HAS = {
    name
    for name, (bwrap, own) in WALLS.items()
    if (not bwrap or sandbox.has_bwrap()) and (not own or sandbox.has_namespaces(bwrap))
}


def put_up(monkeypatch, walls: str):
    "Let the sandbox use these walls, or skip the test where the machine does not have them."
    if walls not in HAS:
        pytest.skip(f'no {walls} here')
    bwrap, own = WALLS[walls]
    monkeypatch.setattr(sandbox, 'has_bwrap', lambda: bwrap)
    monkeypatch.setattr(sandbox, 'has_namespaces', lambda bwrap=False: own)
    if sandbox.why_not():
        pytest.skip(sandbox.why_not())


@pytest.fixture(params=WALLS)
def jail(request, monkeypatch):
    "The jail with each kind of walls around it, and without: the inner locks must hold alone."
    put_up(monkeypatch, request.param)
    return request.param


def refused(code, **kw):
    "Run code that must end in PermissionError, or find nothing there."
    got = run_python(code, **kw)
    assert got['status'] == 'error' and any(
        e in got['stderr']
        for e in (
            'PermissionError',
            'FileNotFoundError',
            'cross-device',
            'Operation not permitted',
            'Read-only file system',
        )
    ), got
    return got


@jailed
def test_it_computes(jail):
    assert run_python('print(6 * 7)') == dict(stdout='42\n', stderr='', status='ok')
    assert (
        run_python('x = [1, 2]\nsum(x)')['stdout'] == '3\n'
        and run_python('')['status'] == 'ok'
        and run_python('print("é😀")')['stdout'] == 'é😀\n'
    )
    code = (
        "open('a.txt', 'w').write('hi'); import os; os.rename('a.txt', 'b.txt'); "
        "print(open('b.txt').read(), os.listdir())"
    )
    assert run_python(code)['stdout'] == "hi ['b.txt']\n"
    assert (
        run_python(
            'import threading\nt = threading.Thread(target=print, args=("there",)); t.start(); t.join()'
        )['stdout']
        == 'there\n'
    )
    assert (
        run_python(
            'import math, json, re, datetime, random, fractions, decimal, statistics, collections\nmath.comb(5, 2)'
        )['stdout']
        == '10\n'
    )
    assert (
        run_python('from dataclasses import dataclass\n@dataclass\nclass A: x: int\nA(3)')['stdout']
        == 'A(x=3)\n'
    )


@jailed
def test_errors_are_the_codes_own(jail):
    got = run_python('def f(): 1/0\nf()')
    assert (
        got['status'] == 'error'
        and 'ZeroDivisionError' in got['stderr']
        and 'sandbox.py' not in got['stderr']
        and 'line 1, in f' in got['stderr']
    )
    assert (
        'SyntaxError' in run_python('1 +')['stderr']
        and run_python('import sys; sys.exit(5)')['status'] == 'error'
        and run_python('raise SystemExit')['status'] == 'ok'
    )
    assert run_python('input()')['stderr'].strip().endswith('EOFError: EOF when reading a line')


@jailed
@pytest.mark.parametrize(
    'code',
    [
        "socket.create_connection(('127.0.0.1', PORT), 1)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_UNIX)",
        "socket.socketpair(type=socket.SOCK_DGRAM)",
        "socket.socketpair()[0].connect('/dev/log')",
        "socket.socketpair()[0].sendmsg([b'x'], [], 0, '/dev/log')",
        "socket.socketpair()[0].sendto(b'x', '/dev/log')",
        "socket.getaddrinfo('example.org', 80); socket.socket()",
    ],
)
def test_no_network(jail, code):
    server = socket.create_server(('127.0.0.1', 0))
    server.settimeout(0.2)
    got = run_python('import socket\n' + code.replace('PORT', str(server.getsockname()[1])))
    assert got['status'] == 'error' and (
        'PermissionError' in got['stderr'] or 'gaierror' in got['stderr']
    ), got
    with pytest.raises(TimeoutError):
        server.accept()
    server.close()


@jailed
@pytest.mark.parametrize(
    'code',
    [
        "open('/etc/passwd').read()",
        "open('/etc/hostname').read()",
        "os.listdir('/')",
        "os.listdir('/etc')",
        "os.listdir(os.path.expanduser('~root'))",
        "open('/proc/%d/environ' % os.getppid(), 'rb').read()",
        "open('/proc/self/mem', 'rb').read(1)",
        "open('/tmp/pwned', 'w')",
        "open('../pwned', 'w')",
        "open(os.__file__, 'a')",
        "os.unlink(os.__file__)",
        "os.mkdir('/tmp/pwned.d')",
        "os.symlink('/etc/passwd', 'p'); open('p').read()",
        "os.link('/etc/hostname', 'p'); open('p').read()",
        "os.rename(os.__file__, 'p')",
        "os.truncate(os.__file__, 0)",
        "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
        "open('/dev/mem', 'rb')",
        "os.chroot('.')",
    ],
)
def test_no_files_of_others(jail, code):
    refused('import os\n' + code)
    assert not any(Path(p).exists() for p in ('/tmp/pwned', '/tmp/pwned.d', '/pwned'))


@jailed
def test_not_even_the_modes_and_times_of_my_files(jail, tmp_path):
    """Landlock does not cover chmod, chown, utime and extended attributes.

    Without seccomp an owner could open files to the world, or lock himself out."""
    mine = tmp_path / 'mine'
    mine.write_text('x')
    mine.chmod(0o600)
    before = mine.stat()
    for code in (
        'os.chmod(p, 0o777)',
        'os.chown(p, 1, 1)',
        'os.utime(p, (1, 1))',
        "os.setxattr(p, 'user.a', b'1')",
        'os.truncate(p, 0)',
        'open(p)',
        'os.unlink(p)',
        'os.chmod(os.__file__, 0o600)',
        'os.fchmod(os.open(os.__file__, os.O_RDONLY), 0o600)',
        *(["os.fchmod(os.open('.', os.O_RDONLY), 0o777)"] if jail in ('bare', 'bwrap') else []),
        'os.fchmod(0, 0o777)',
        "os.chmod('/dev/null', 0o777)",
        "os.utime('/dev/null', (1, 1))",
        "os.chown('/dev/null', os.getuid(), os.getgid())",
    ):
        refused(f'import os\np = {str(mine)!r}\n' + code)
    after = mine.stat()
    assert (after.st_mode, after.st_uid, after.st_size, after.st_mtime) == (
        before.st_mode,
        before.st_uid,
        before.st_size,
        before.st_mtime,
    )


@jailed
@pytest.mark.parametrize(
    'code',
    [
        "os.fork()",
        "os.system('true') and os.fork()",
        "subprocess.run(['/bin/true'])",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.kill(os.getppid(), 0)",
        "os.kill(1, 0)",
        "os.setsid()",
        "os.memfd_create('x')",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.sched_setaffinity(os.getppid(), {0})",
        "os.unshare(0) if hasattr(os, 'unshare') else os.fork()",
        "os.pidfd_open(os.getppid())",
        "resource.prlimit(0, resource.RLIMIT_AS, (1 << 40, 1 << 40))",
        "multiprocessing.Process(target=print).start()",
    ],
)
def test_no_processes_signals_or_limits(jail, code):
    refused('import os, subprocess, resource, multiprocessing, signal\n' + code)


@jailed
def test_no_way_around_python(jail):
    "The kernel refuses raw system calls too: mount, unshare, ptrace, bpf, io_uring, shared memory, keys."
    calls = dict(
        x86_64=[165, 272, 101, 321, 425, 29, 250, 57, 435],
        aarch64=[40, 97, 117, 280, 425, 194, 219, 220, 435],
    )[platform.machine()]
    got = run_python(
        'import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n'
        f'[(c.syscall(n, 0, 0, 0, 0, 0), ctypes.get_errno()) for n in {calls} + [451, 999]]'
    )
    assert (
        got['status'] == 'ok'
        and {r for r, _ in eval(got['stdout'])} == {-1}
        and {e for _, e in eval(got['stdout'])} == {1, 38}
    ), got
    got = run_python(
        'import ctypes, os\nc = ctypes.CDLL(None)\n'
        'os.setuid(0) if os.getuid() else print(c.prctl(24, 0, 0, 0, 0), open("/proc/self/status").read())'
    )
    assert got['status'] == 'error'


@jailed
def test_nothing_of_mine_leaks_in(jail, monkeypatch):
    monkeypatch.setenv('K2LAB_API_KEY', 'sesame')
    assert 'sesame' not in run_python('import os; print(dict(os.environ))')['stdout']
    with open(__file__) as mine:
        os.set_inheritable(mine.fileno(), True)
        got = run_python(
            'import os\nprint([f for f in range(3, 64) if os.path.exists(f"/dev/fd/{f}")])\n'
            f'os.read({mine.fileno()}, 10)'
        )
        assert got['status'] == 'error' and 'Bad file descriptor' in got['stderr']


@jailed
@pytest.mark.parametrize(
    'code,status',
    [
        ('x = bytearray(3 << 30)', 'memory'),
        ('x = []\nwhile True: x.append("y" * 10**6)', 'memory'),
        ('while True: pass', 'timeout'),
        ('import time; time.sleep(60)', 'timeout'),
        ('import os, time\nos.close(1); os.close(2)\ntime.sleep(60)', 'timeout'),
        ('while True: print("x" * 1000)', 'output'),
        ('import sys\nwhile True: sys.stderr.write("x" * 1000)', 'output'),
        ('f = open("big", "wb")\nwhile True: f.write(b"x" * 10**6)', 'disk'),
        ('i = 0\nwhile True:\n  open(str(i), "w").write("x"); i += 1', 'disk'),
        ('import os\nos._exit(9)', 'error'),
        ('import ctypes; ctypes.string_at(0)', 'killed'),
    ],
)
def test_it_ends(jail, code, status):
    got = run_python(code, timeout=2)
    assert (
        got['status'] == status
        or (status == 'disk' and got['status'] in ('disk', 'error'))
        and ('OSError' in got['stderr'] or got['status'] == 'disk')
    ), got
    assert len(got['stdout']) + len(got['stderr']) <= 20_000


@jailed
def test_a_bomb_of_threads_ends(jail):
    code = (
        'import threading, time\nn = 0\ntry:\n'
        '  while n < 5000: threading.Thread(target=time.sleep, args=(20,), daemon=True).start(); n += 1\n'
        'except BaseException as e: print("stopped")\n'
    )
    assert run_python(code, timeout=3)['status'] in ('ok', 'timeout', 'memory', 'error')


@jailed
def test_nothing_stays_behind(jail, monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.tempfile, 'tempdir', str(tmp_path))
    before = threading.active_count(), len(os.listdir('/proc/self/fd'))
    for code in ('open("a", "w").write("x")', 'while True: pass', '1/0'):
        run_python(code, timeout=1)
    assert (
        os.listdir(tmp_path) == []
        and (threading.active_count(), len(os.listdir('/proc/self/fd'))) == before
    )


def test_it_fails_closed(monkeypatch):
    monkeypatch.setattr(sandbox, 'why_not', lambda: 'this kernel has no Landlock')
    with pytest.raises(LabError, match='no Landlock.*allow_unsafe=True'):
        run_python('1')
    assert run_python('6 * 7', allow_unsafe=True)['stdout'] == '42\n'


@jailed
def test_a_lock_that_does_not_hold_is_noticed(monkeypatch):
    "With one lock left out of the child's program, the child finds out before it runs a line."
    put_up(monkeypatch, 'bare')
    text = Path(jailed_program.__file__).read_text()
    calls = (
        "    landlock(libc, config['landlock'], config['read'], [config['work']])\n",
        "    seccomp(libc, machine, config['namespaces'])\n",
    )
    for without in calls:
        assert without in text
        broken = Path(sandbox.tempfile.mkdtemp()) / 'jail.py'
        broken.write_text(text.replace(without, ''))
        monkeypatch.setattr(jailed_program, '__file__', str(broken))
        with pytest.raises(LabError, match='could not be set up.*does not hold'):
            run_python('print("free")')
        broken.unlink()
        broken.parent.rmdir()


def test_other_machines_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox.sys, 'platform', 'darwin')
    assert 'needs Linux' in sandbox.why_not()
    monkeypatch.undo()
    monkeypatch.setattr(sandbox.platform, 'machine', lambda: 'riscv64')
    monkeypatch.setattr(sandbox.sys, 'platform', 'linux')
    assert 'riscv64' in sandbox.why_not()


