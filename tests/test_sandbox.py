"The sandbox under attack. Each attack runs as it would from a model: as code."

import os
import platform
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sandbox_host import WALLS, has_walls, put_up

from k2lab.lab.config import LabError
from k2lab.tasks import jail as jailed_program, sandbox
from k2lab.tasks.sandbox import PythonSession, run_python

WHY = sandbox.why_not()
jailed = pytest.mark.skipif(bool(WHY), reason=WHY)
HAS = {name for name in WALLS if has_walls(name)}


def need(walls: str):
    "Skip the test where the machine does not have these walls."
    if walls not in HAS:
        pytest.skip(f'no {walls} here: see why_not() and GET_WALLS')


@pytest.fixture(params=WALLS)
def jail(request):
    "The jail with each kind of walls around it, and without: the inner locks must hold alone."
    need(request.param)
    with put_up(request.param):
        if sandbox.why_not():
            pytest.skip(sandbox.why_not())
        yield request.param


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
    monkeypatch.setattr(sandbox, 'has_bwrap', lambda: False)
    monkeypatch.setattr(sandbox, 'has_namespaces', lambda bwrap=False: False)
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


# ---- the filter, on both architectures -------------------------------------------------------------

ROOT = Path(__file__).parents[1]
ALLOW, KILL = 0x7FFF0000, 0x80000000


def answer(program: list, arch: int, number: int, *arguments: int) -> int:
    "What a filter gives for a system call: a small interpreter of classic BPF."
    padded = [a % (1 << 64) for a in (*arguments, *[0] * (6 - len(arguments)))]
    data = struct.pack('<IIQ6Q', number, arch, 0, *padded)
    at, word = 0, 0
    while True:
        code, yes, no, value = struct.unpack('HBBI', program[at])
        at += 1
        if code == 0x20:
            word = struct.unpack_from('<I', data, value)[0]
        elif code == 0x54:
            word &= value
        elif code in (0x15, 0x35):
            at += yes if (word == value if code == 0x15 else word >= value) else no
        elif code == 0x06:
            return value
        else:
            raise ValueError(f'instruction {code:#x} is not known')


def asked(machine: str, name: str, *arguments: int, namespaces: bool = True) -> object:
    "'ok', 'kill' or the error that a process with number 77 gets for a call."
    tables = jailed_program.CALLS + jailed_program.ATTRIBUTES + jailed_program.GUARDED
    number = jailed_program.numbers(tables, machine)[name]
    program = jailed_program.filter_program(machine, 77, namespaces)
    given = answer(program, jailed_program.ARCHITECTURES[machine][1], number, *arguments)
    return {ALLOW: 'ok', KILL: 'kill'}.get(given, given - 0x50000)


@pytest.mark.parametrize('machine', jailed_program.ARCHITECTURES)
def test_the_filter_decides_by_arguments(machine):
    ask = lambda name, *arguments, **kw: asked(machine, name, *arguments, **kw)
    high = 1 << 32
    assert [ask('kill', 77, 9), ask('kill', 78, 9), ask('kill', -77, 9), ask('kill', 0)] == [
        'ok',
        1,
        1,
        1,
    ]
    assert [ask('tgkill', 77, 78, 9), ask('tgkill', 78, 77, 9), ask('tgkill', -1)] == ['ok', 1, 1]
    thread = 0x3D0F00
    namespaces = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
    assert ask('clone', thread) == 'ok' and {ask('clone', thread | n) for n in namespaces} == {1}
    assert {ask('clone', f) for f in (17, 0, 0x8000 | 9, 0x4100 | 17)} == {1}
    assert {ask('fcntl', 3, c) for c in (0, 1, 2, 3, 5, 1030, 1032, 1034)} == {'ok'}
    assert {ask('fcntl', 3, c, 78) for c in (8, 10, 15, 1024, 1026, 1031, 1033, 37, 38)} == {1}
    assert {ask('fcntl', 3, 6), ask('fcntl', 3, 7)} == {0}
    assert [
        ask('fcntl', 3, 4, 0x800),
        ask('fcntl', 3, 4, 0x2000),
        ask('fcntl', 3, 4 | high, 0x2800),
    ] == ['ok', 1, 1]
    assert ask('ioctl', 1, 0x5401) == 'ok'
    assert {ask('ioctl', 1, c) for c in (0x5412, 0x5410, 0x8901, 0x8902, 0x5452, 0x40049409)} == {
        25
    }
    assert [
        ask('prctl', 15),
        ask('prctl', 1),
        ask('prctl', 4),
        ask('prctl', 22),
        ask('prctl', 36),
    ] == ['ok', 1, 1, 1, 1]
    assert [
        ask('prlimit64', 0, 3, 0, 5),
        ask('prlimit64', 0, 3, high),
        ask('prlimit64', 5, 3, 0),
    ] == ['ok', 1, 1]
    assert [ask('socketpair', 1, 1), ask('socketpair', 1, 0x80801), ask('socketpair', 1, 2)] == [
        'ok',
        'ok',
        1,
    ]
    assert [ask('socketpair', 2, 1), ask('socketpair', 1, 5)] == [1, 1]
    assert [
        ask('sendto', 3, 4, 5, 0, 0, 0),
        ask('sendto', 3, 4, 5, 0, 9),
        ask('sendto', 3, 4, 5, 0, high),
    ] == ['ok', 1, 1]
    assert ask('fallocate', 3, 0, 0, 4096) == 95
    assert [ask('fchmodat'), ask('fchmodat', namespaces=False), ask('read')] == ['ok', 1, 'ok']


@pytest.mark.parametrize('machine', jailed_program.ARCHITECTURES)
def test_the_filter_refuses_what_the_tables_do_not_name(machine):
    program, arch = (
        jailed_program.filter_program(machine, 77, True),
        jailed_program.ARCHITECTURES[machine][1],
    )
    tables = jailed_program.CALLS + jailed_program.ATTRIBUTES + jailed_program.GUARDED
    named = set(jailed_program.numbers(tables, machine).values())
    assert {answer(program, arch, n) for n in set(range(451)) - named - {435}} == {0x50001}
    assert {answer(program, arch, n) for n in (435, 451, 999, 0x3FFFFFFF)} == {0x50026}
    assert answer(program, 0x40000003, 20) == answer(program, 0x40000028, 20) == KILL
    assert machine != 'x86_64' or answer(program, arch, 0x40000000) == KILL
    assert len(program) < 4096


HEADERS = dict(
    x86_64='/usr/include/x86_64-linux-gnu/asm/unistd_64.h',
    aarch64='/usr/include/asm-generic/unistd.h',
)


@pytest.mark.parametrize('machine', HEADERS)
def test_the_tables_are_the_kernels(machine):
    path = Path(HEADERS[machine])
    if not path.exists():
        pytest.skip(f'no {path} here (package linux-libc-dev)')
    text = path.read_text()
    real = {n: int(k) for n, k in re.findall(r'#define __NR(?:3264)?_(\w+) (\d+)', text)}
    real |= {'newfstatat': real.get('fstatat', real.get('newfstatat'))}
    for table in (jailed_program.CALLS, jailed_program.ATTRIBUTES, jailed_program.GUARDED):
        named = jailed_program.numbers(table, machine)
        assert named == {name: real[name] for name in named}
        missing = set(jailed_program.numbers(table, 'x86_64')) - set(named)
        assert not missing & set(real), 'a call that this machine has, with no number'
    assert jailed_program.OWN[machine] == {name: real[name] for name in jailed_program.OWN[machine]}
    assert real['clone3'] == jailed_program.CLONE3


# ---- a session ------------------------------------------------------------------------------------


@jailed
def test_a_session_keeps_what_calls_define(jail):
    with PythonSession() as session:
        assert session.run('import math\nx = 41\nopen("a.txt", "w").write("hi")')['stdout'] == '2\n'
        assert session.run('x += 1\nmath.sqrt(x * 42)') == dict(
            stdout='42.0\n', stderr='', status='ok', note=''
        )
        assert (
            session.run('def f(): return x\nclass A: pass\nprint(open("a.txt").read())')['stdout']
            == 'hi\n'
        )
        code = 'import pickle; x = 7; print(f(), type(pickle.loads(pickle.dumps(A()))).__name__)'
        assert session.run(code)['stdout'] == '7 A\n'
        got = session.run('1/0')
        assert got['status'] == 'error' and 'ZeroDivisionError' in got['stderr'] and not got['note']
        assert session.run('import sys; sys.exit(3)') | dict(stderr='') == dict(
            stdout='', stderr='', status='error', note=''
        )
        assert session.run('f()')['stdout'] == '7\n'


@jailed
@pytest.mark.parametrize(
    'code,status',
    [
        ('while True: pass', 'timeout'),
        ('x = bytearray(3 << 30)', 'memory'),
        ('while True: print("y" * 1000)', 'output'),
        ('import ctypes; ctypes.string_at(0)', 'killed'),
        ('import os; os._exit(0)', 'error'),
        ('import os; os.closerange(3, 64)', 'error'),
        ('import os; os.close(0); os.closerange(0, 64)', 'error'),
    ],
)
def test_a_session_starts_afresh_and_says_so(jail, code, status):
    with PythonSession(timeout=3) as session:
        session.run('kept = 1')
        got = session.run(code, timeout=1)
        if 'closerange' in code and not got['note']:  # seen when the next call cannot be read
            got = session.run('1')
        assert (
            got['status'] in (status, 'ok')
            and 'without the variables' in got['note']
            or 'afresh' in got['note']
        )
        assert session.run('kept')['stderr'].strip().endswith("name 'kept' is not defined")
        assert session.run('6 * 7') == dict(stdout='42\n', stderr='', status='ok', note='')


@jailed
def test_a_second_call_costs_a_tenth_of_the_first():
    def seconds(session):
        start = time.perf_counter()
        assert session.run('print(1)')['stdout'] == '1\n'
        return time.perf_counter() - start

    with PythonSession() as session:
        first = seconds(session)
        assert min(seconds(session) for _ in range(5)) <= first / 10


@jailed
def test_a_session_stands_still_between_calls(jail):
    with PythonSession() as session:
        code = 'import threading, time\nn = 0\ndef go():\n  global n\n  while True: n += 1; time.sleep(.001)\n'
        session.run(code + 'threading.Thread(target=go, daemon=True).start(); time.sleep(.1)')
        before = int(session.run('n')['stdout'])
        time.sleep(0.8)
        after = int(session.run('n')['stdout'])
        assert 0 < before and after - before < 300


@jailed
def test_a_session_that_died_in_between_says_so():
    with PythonSession() as session:
        session.run('x = 1')
        os.killpg(session.held[0].process.pid, signal.SIGKILL)
        session.held[0].process.wait()
        got = session.run('6 * 7')
        assert got['stdout'] == '42\n' and 'afresh' in got['note']


@jailed
def test_a_session_lives_longer_than_the_thread_that_began_it(jail):
    with PythonSession() as session:
        thread = threading.Thread(target=session.run, args=('x = 42',))
        thread.start()
        thread.join()
        time.sleep(0.2)
        assert session.run('x') == dict(stdout='42\n', stderr='', status='ok', note='')
        threads = [threading.Thread(target=session.run, args=('x += 1',)) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert session.run('x')['stdout'] == '46\n'


@jailed
def test_a_session_is_refused_when_closed_and_in_a_copy_of_the_process(monkeypatch):
    session = PythonSession()
    session.run('x = 1')
    monkeypatch.setattr(sandbox.os, 'getpid', lambda: 1)
    with pytest.raises(LabError, match='belongs to process'):
        session.run('x')
    session.close()
    monkeypatch.undo()
    session.close()
    with pytest.raises(LabError, match='is closed'):
        session.run('x')
    monkeypatch.setattr(sandbox, 'why_not', lambda: 'this kernel has no Landlock')
    with pytest.raises(LabError, match='no Landlock.*allow_unsafe=True'):
        PythonSession().run('1')
    with PythonSession(allow_unsafe=True) as unsafe:
        assert unsafe.run('x = 5')['status'] == 'ok' and unsafe.run('x')['stdout'] == '5\n'
        assert unsafe.run('while True: pass', timeout=0.5)['status'] == 'timeout'


@jailed
def test_a_session_leaves_nothing(jail, monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.tempfile, 'tempdir', str(tmp_path))
    before = len(os.listdir('/proc/self/fd'))
    with PythonSession() as session:
        session.run('open("a", "w").write("x")')
        family = tree(session.held[0].process.pid)
        assert len(family) > 1
    assert (
        not alive(family)
        and len(os.listdir('/proc/self/fd')) == before
        and not os.listdir(tmp_path)
    )
    session = PythonSession()
    session.run('1')
    family = tree(session.held[0].process.pid)
    del session
    assert not alive(family) and len(os.listdir('/proc/self/fd')) == before


def tree(pid: int) -> list:
    "A process and its descendants, each as its number and its start."
    found = [pid]
    for one in found:
        for task in Path(f'/proc/{one}/task').glob('*/children'):
            found += map(int, task.read_text().split())
    return [(p, start_of(p)) for p in found]


def start_of(pid: int) -> str:
    "When a process was started, or '' if it is gone or waits to be reaped."
    try:
        words = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ''
    return '' if words[0] in 'ZX' else words[19]


def alive(family: list) -> list:
    "Those of a family that still run after at most five seconds."
    deadline = time.monotonic() + 5
    while left := [p for p, start in family if start and start_of(p) == start]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.02)
    return []


STAY = [
    'import time; time.sleep(99)',
    'while True: pass',
    'import signal, time\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n  except Exception: pass\n'
    'time.sleep(99)',
    'import ctypes, os, time\nc = ctypes.CDLL(None)\nc.prctl(1, 0, 0, 0, 0); c.setsid(); c.setpgid(0, 0); c.setuid(1)\n'
    'try: os.fork() or os.fork()\nexcept OSError: pass\nos.closerange(0, 64); time.sleep(99)',
]
KEEPER = """
import sys
from k2lab.tasks.sandbox import PythonSession, run_python
from sandbox_host import put_up
with put_up(sys.argv[1]):
    if sys.argv[2] == 'session':
        session = PythonSession(timeout=99)
        session.run('1')
        print('ready', flush=True)
        if sys.argv[3]:
            session.run(sys.argv[3])
        else:
            sys.stdin.read()
    else:
        print('ready', flush=True)
        run_python(sys.argv[3], timeout=99)
"""


@jailed
@pytest.mark.parametrize('how', ['session', 'once'])
@pytest.mark.parametrize('code', ['', *STAY], ids=['idle', 'sleeps', 'spins', 'ignores', 'escapes'])
def test_nothing_survives_the_keeper(jail, how, code, tmp_path):
    if not code and how == 'once':
        pytest.skip('a process that runs once is never idle')
    env = os.environ | dict(PYTHONPATH=f'{ROOT}:{ROOT / "tests"}', TMPDIR=str(tmp_path))
    command = [sys.executable, '-c', KEEPER, jail, how, code]
    keeper = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert keeper.stdout.readline() == b'ready\n'
    time.sleep(1.5 if how == 'once' else 0.3)
    family = tree(keeper.pid)
    assert len(family) > 2
    keeper.kill()
    keeper.communicate()
    assert not alive(family) and not os.listdir(tmp_path)


REAPER = """
import ctypes, os, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come here, as to the first of a container
from k2lab.tasks.sandbox import PythonSession, run_python
from sandbox_host import put_up
with put_up(sys.argv[1]):
    run_python('while True: pass', timeout=.3)
    run_python('while True: print("x" * 1000)')
    run_python('1')
    with PythonSession() as session:
        session.run('while True: print("x" * 1000)')
        session.run('1')
time.sleep(.3)
try:
    print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print('none')
"""


@jailed
def test_no_orphan_is_left_to_be_reaped(jail):
    env = os.environ | dict(PYTHONPATH=f'{ROOT}:{ROOT / "tests"}')
    done = subprocess.run([sys.executable, '-c', REAPER, jail], env=env, capture_output=True)
    assert done.stdout == b'none\n', done


@jailed
def test_the_code_dies_with_the_process_that_watches_it(jail):
    with PythonSession() as session:
        session.run('1')
        family = tree(session.held[0].process.pid)
        os.kill(family[-2][0], signal.SIGKILL)
        assert not alive(family[-2:])
        assert 'afresh' in session.run('1')['note']


# ---- what ordinary code does -----------------------------------------------------------------------

EVERYDAY = {
    'null device': 'import os\nopen(os.devnull, "w").write("x")',
    'asyncio': 'import asyncio\nasync def f():\n  await asyncio.sleep(.01); return 5\nasyncio.run(f())',
    'asyncio threads': 'import asyncio\nasyncio.run(asyncio.to_thread(abs, -5))',
    'copy': 'import shutil\nopen("a", "w").write("x")\nshutil.copy("a", "b")\nopen("b").read()',
    'lock': 'import multiprocessing as m\nwith m.Lock(): pass\nwith m.RLock(): pass\nm.Semaphore(2).acquire()',
    'user': 'import getpass\ngetpass.getuser()',
    'database': 'import sqlite3\nc = sqlite3.connect("a.db")\nc.execute("create table t(a)")\nc.commit()',
    'temporary files': 'import tempfile\nwith tempfile.TemporaryDirectory() as d: open(d + "/x", "w")',
    'archive': 'import zipfile\nz = zipfile.ZipFile("a.zip", "w"); z.writestr("x", "y"); z.close()\n'
    'zipfile.ZipFile("a.zip").extract("x")',
    'threads': 'from concurrent.futures import ThreadPoolExecutor as T\nlist(T(8).map(abs, [-1]))',
    'pickle of an own class': 'import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))',
    'limits': 'import resource\nresource.getrlimit(resource.RLIMIT_NOFILE)',
    'mapped file': 'import mmap\nf = open("a", "w+b"); f.truncate(4096)\nm = mmap.mmap(f.fileno(), 0)\n'
    'm[0] = 1; m.flush()',
    'timer': 'import signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\n'
    'signal.setitimer(signal.ITIMER_REAL, .01); signal.pause()',
    'shelf of big numbers': 'len(str(2**9000)), 2**200 % 7',
    'time zones': 'import zoneinfo\nzoneinfo.ZoneInfo("Europe/Rome")',
    'working folder': 'import os\nos.makedirs("x/y"); os.chdir("x"); os.listdir()',
}


@jailed
@pytest.mark.parametrize('name', EVERYDAY)
def test_everyday_code_works(jail, name):
    got = run_python(EVERYDAY[name], timeout=20)
    assert got['status'] == 'ok' and not got['stderr'], got


@jailed
@pytest.mark.parametrize('package', ['numpy', 'torch', 'pandas', 'sympy', 'matplotlib.pyplot'])
def test_packages_can_be_imported(package):
    pytest.importorskip(package)
    assert run_python(f'import {package}', timeout=120, memory_mb=2048) == dict(
        stdout='', stderr='', status='ok'
    )


@jailed
def test_the_mode_of_an_own_file_can_be_changed_behind_walls(jail):
    code = 'import os, shutil\nopen("a", "w"); os.chmod("a", 0o640); os.utime("a", (5, 5)); shutil.copy2("a", "b")\n'
    got = run_python(code + 's = os.stat("b")\nprint(oct(s.st_mode), s.st_mtime)')
    if jail in ('namespaces', 'both'):
        assert got['stdout'] == '0o100640 5.0\n'
    else:
        assert got['status'] == 'error' and 'The sandbox refuses' in got['stderr']


@jailed
@pytest.mark.parametrize(
    'code',
    [
        'import subprocess; subprocess.run(["ls"])',
        'import os; os.fork()',
        'import socket; socket.socket()',
    ],
)
def test_a_refusal_is_told(jail, code):
    assert 'The sandbox refuses processes, sockets' in refused(code)['stderr'].split('\n')[-2]


@jailed
@pytest.mark.parametrize(
    'mark',
    [
        '\x0b',
        '\x0c',
        '\x1c',
        '\x1d',
        '\x1e',
        '\x85',
        '\u2028',
        '\u2029',
        '\ud800',
        '\udfff',
        '\0',
        '\r',
    ],
)
def test_all_characters_pass(mark):
    "In code, output and error text: unharmed, or replaced visibly where no bytes stand for them."
    seen = mark if not '\ud800' <= mark <= '\udfff' else f'\\u{ord(mark):x}'
    with PythonSession() as session:
        for run in (run_python, session.run):
            if mark not in '\0\r':
                got = run(f'x = "a{mark}b"\nprint(x, len(x))')
                assert got['stdout'] == f'a{seen}b 3\n', got
            got = run(f'x = "a" + chr({ord(mark)}) + "b"\nprint(x)\nraise ValueError(x)')
            assert got['stdout'] == f'a{seen}b\n' and got['stderr'].endswith(
                f'ValueError: a{seen}b\n'
            ), got
            assert run(f'1{mark}+')['status'] == 'error'


# ---- the keeper ------------------------------------------------------------------------------------


@jailed
def test_a_long_program_and_much_output_pass(jail):
    code = '#' + 'x' * 400_000 + '\nprint("y" * 90_000)'
    assert run_python(code, max_output=100_000)['stdout'] == 'y' * 90_000 + '\n'
    assert run_python(code, max_output=80_000) | dict(stdout='') == dict(
        stdout='', stderr='', status='output'
    )


@jailed
def test_what_was_printed_before_a_time_out_is_kept(jail):
    assert run_python('print("before")\nwhile True: pass', timeout=1) == dict(
        stdout='before\n', stderr='', status='timeout'
    )


@jailed
def test_a_copy_of_this_process_that_holds_the_pipes_delays_nothing(monkeypatch):
    "Another thread may fork between the pipes' making and their closing: no end of a pipe is seen then."
    real, copies = sandbox.spawn, []

    def spawn(config, theirs):
        process = real(config, theirs)
        copies.append(subprocess.Popen(['sleep', '60'], pass_fds=list(theirs.values())))
        return process

    monkeypatch.setattr(sandbox, 'spawn', spawn)
    assert run_python('print(1)', timeout=20) == dict(stdout='1\n', stderr='', status='ok')
    assert run_python('1/0', timeout=20)['status'] == 'error'
    for copy in copies:
        assert copy.poll() is None
        copy.kill()
        copy.wait()


def test_a_folder_of_any_depth_and_any_names_is_deleted(tmp_path):
    here, folder = os.getcwd(), tmp_path / 'folder'
    folder.mkdir()
    os.chdir(folder)
    try:
        for _ in range(1500):
            os.mkdir('d' * 100)
            os.chdir('d' * 100)
            os.close(os.open(b'\xff\n', os.O_CREAT | os.O_WRONLY, 0))
    finally:
        os.chdir(here)
    os.mkdir(folder / 'none', 0)
    os.symlink(here, folder / 'out')
    os.chmod(folder, 0)
    jailed_program.delete_folder(str(folder))
    assert not os.listdir(tmp_path) and os.listdir(here)


@pytest.mark.parametrize(
    'verdict,reply,cpu,status',
    [
        (dict(over='', signal=0, exit=0, seconds=1), 'ok', 7, 'ok'),
        (dict(over='', signal=0, exit=1, seconds=1), 'ok', 7, 'error'),
        (dict(over='', signal=0, exit=0, seconds=1), 'error', 7, 'error'),
        (dict(over='', signal=0, exit=1, seconds=1), 'memory', 7, 'memory'),
        (dict(over='', signal=9, exit=0, seconds=1), 'ok', 7, 'killed'),
        (dict(over='', signal=9, exit=0, seconds=7.01), '', 7, 'timeout'),
        (dict(over='', signal=24, exit=0, seconds=7.01), '', 7, 'timeout'),
        (dict(over='', signal=9, exit=0, seconds=99), '', 0, 'killed'),
        (dict(over='', signal=25, exit=0, seconds=1), '', 7, 'disk'),
        (dict(over='disk', signal=9, exit=0, seconds=1), 'ok', 7, 'disk'),
        (dict(over='memory', signal=9, exit=0, seconds=1), 'ok', 7, 'memory'),
        ({}, 'ok', 7, 'killed'),
    ],
)
def test_the_status_is_what_the_watching_process_saw(verdict, reply, cpu, status):
    assert sandbox.status_of(verdict, reply, cpu) == status


def test_old_kernels_are_told_how(monkeypatch):
    monkeypatch.setattr(sandbox.sys, 'platform', 'linux')
    monkeypatch.setattr(sandbox, 'has_bwrap', lambda: False)
    monkeypatch.setattr(sandbox, 'has_namespaces', lambda bwrap=False: False)
    for version, words in (
        (0, 'no Landlock'),
        (2, 'Landlock 2.*Linux 6.2 is needed, or allow user namespaces'),
    ):
        monkeypatch.setattr(sandbox, 'landlock_version', lambda libc, version=version: version)
        with pytest.raises(LabError, match=words):
            run_python('1')
    monkeypatch.setattr(sandbox, 'landlock_version', lambda libc: 3)
    assert sandbox.why_not() == '' or platform.machine() not in sandbox.ARCHITECTURES
