"""No process outlives its run, however it tries; nobody else's process is touched; nothing stays in TMPDIR.

Seventeen kinds of disobedient children are started by a stand-in for the kernel. Each holds a FIFO open
that the test reads: the end of the file says that no process of that kind is left, whatever it calls
itself and whoever its parent is. `make test` kills some sets of victims, `make test-faults` all of them."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from k2lab.lab import locks
from k2lab.lab.config import LabError
from k2lab.lab.records import read_run
from k2lab.lab.runner import execute

FULL = os.environ.get('K2LAB_FAULTS') == 'full'
linux = pytest.mark.skipif(sys.platform != 'linux', reason='adopting orphans needs Linux')

KERNEL = r'''
import ctypes, os, signal, subprocess, sys, threading, time
from pathlib import Path
fifos = Path(sys.argv[1])
libc = ctypes.CDLL(None)

def sleep():
    os.write(held, b'.')
    time.sleep(60)

def own_session(): os.setsid(); sleep()

def renamed():   # what setproctitle does in vLLM's and Ray's workers: the environment can no longer be read
    os.setsid()
    fields = open('/proc/self/stat').read().rpartition(')')[2].split()
    start, end = (int(fields[n - 3]) for n in (50, 51))
    title = b'VLLM::EngineCore'
    ctypes.memmove(start, title + bytes(end - start - len(title)), end - start)
    libc.prctl(15, title, 0, 0, 0)
    assert b'K2LAB_GUARD' not in open('/proc/self/environ', 'rb').read()
    sleep()

def bare(*words):
    os.write(held, b'.')
    os.execvp(words[0], [*words])

def env_i(): bare('env', '-i', 'sleep', '60')
def nohup(): bare('sh', '-c', 'nohup setsid env -i sleep 60 >&- 2>&- &')

def double_fork():
    if os.fork(): os._exit(0)
    os.setsid()
    if os.fork(): os._exit(0)
    os.chdir('/'); os.close(0); os.close(1); os.close(2)
    sleep()

def deaf():
    for n in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP, 32, 33}: signal.signal(n, signal.SIG_IGN)
    sleep()

def stopped(): os.setsid(); os.write(held, b'.'); os.kill(os.getpid(), signal.SIGSTOP); time.sleep(60)

def cleared():   # no mark, and a parent that is gone
    if os.fork(): os._exit(0)
    os.setsid(); bare('env', '-u', 'K2LAB_GUARD', 'sleep', '60')

def hopper():   # a new process id again and again
    os.setsid(); os.write(held, b'.')
    while True:
        try:
            if os.fork(): os._exit(0)
        except OSError: pass
        time.sleep(.0005)

def breeder():   # new children all the time, the more so while it is ended
    os.setsid(); os.write(held, b'.')
    for n in range(100):
        if n > 10: time.sleep(.05)
        if not os.fork():
            os.setsid(); time.sleep(60)

def adopter():   # keeps orphans to itself
    libc.prctl(36, 1, 0, 0, 0)
    if not os.fork():
        if os.fork(): os._exit(0)
        os.setsid(); sleep()
    time.sleep(60)

def twins():   # each starts the other again when it ends
    os.setsid(); os.write(held, b'.')
    while True:
        end, other = os.pipe()
        if os.fork():
            os.close(other); os.read(end, 1); os.close(end)   # the other has ended: start it again
        else:
            os.close(end)   # holds `other` as long as it lives
            mine = os.getppid()
            while os.getppid() == mine: time.sleep(.001)

def zombies():   # never collects its children
    for _ in range(5):
        if not os.fork(): os._exit(0)
    sleep()

def sibling():   # a child of the kernel's parent
    made = libc.syscall(56, 0x8000 | signal.SIGCHLD, 0, 0, 0, 0)   # clone with CLONE_PARENT
    if made: os._exit(0)
    libc.setsid(); sleep()

def threads():
    start = lambda: subprocess.Popen(['sleep', '60'], pass_fds=[held], start_new_session=True, env={})
    threading.Thread(target=start).start(); sleep()

def namespace(): bare('unshare', '--pid', '--fork', 'setsid', 'sleep', '60')

def moved():   # leaves its control group
    for top in ('/sys/fs/cgroup/unified', '/sys/fs/cgroup'):
        try: open(top + '/cgroup.procs', 'w').write('0')
        except OSError: pass
    own_session()

KINDS = [own_session, renamed, env_i, nohup, double_fork, deaf, stopped, cleared, hopper, breeder, adopter,
         twins, zombies, sibling, threads, namespace, moved]
if __name__ == '__main__':
    for kind in KINDS:
        held = os.open(fifos/kind.__name__, os.O_WRONLY)
        os.set_inheritable(held, True)
        if not os.fork():
            if kind in (own_session, env_i, double_fork): os.environ.pop('K2LAB_GUARD')
            kind(); os._exit(0)
        os.close(held)
    (fifos/'ready').touch()
    if sys.argv[2] == 'ends': sys.exit()
    time.sleep(60)
'''
KINDS = [line.split('(')[0][4:] for line in KERNEL.splitlines() if line.startswith('def ')]
KINDS = [kind for kind in KINDS if kind not in ('sleep', 'bare')]

RUNNER = '''
import subprocess, sys
from k2lab.lab import locks
if sys.argv[1] == 'without': locks.own_group = lambda: None
own = subprocess.Popen(['sleep', '60'], stdin=subprocess.DEVNULL)   # a child of the runner's own
print(own.pid, flush=True)
with locks.guarded() as guard:
    print(guard.folder, flush=True)
    command = guard.command([sys.executable, *sys.argv[2:]])
    subprocess.Popen(command, stdin=guard.line).wait()
print('ended', flush=True)
'''


def may_group() -> bool:
    "Whether this process may make a control group."
    if group := locks.new_group(f'k2lab-run-probe-{os.getpid()}'):
        locks.end_group(group)
    return group is not None


def may_mount() -> bool:
    "Whether this process may mount a file system."
    return sys.platform == 'linux' and subprocess.run(['unshare', '-m', 'true']).returncode == 0


def holds(fifo: int) -> bool:
    "Whether a process still holds the other end of an open FIFO."
    with contextlib.suppress(BlockingIOError):
        while os.read(fifo, 4096):
            pass
        return False
    return True


def gone(folder: Path) -> list[str]:
    "What is left of a guard."
    groups = [folder.name] if own and (own / folder.name).exists() else []
    return [*groups, *(['folder'] if folder.exists() else [])]


own = locks.own_group()


class Trial:
    "A runner whose kernel has started one child of each kind."

    def __init__(self, home: Path, groups: str, end: str):
        home.mkdir()
        for kind in KINDS:
            os.mkfifo(home / kind)
        self.fifos = {kind: os.open(home / kind, os.O_RDONLY | os.O_NONBLOCK) for kind in KINDS}
        (home / 'kernel.py').write_text(KERNEL)
        words = [sys.executable, '-c', RUNNER, groups, str(home / 'kernel.py'), str(home), end]
        self.runner = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.runner.stdout
        self.child = psutil.Process(int(self.runner.stdout.readline()))
        self.folder = Path(self.runner.stdout.readline().strip())
        self.wait(lambda: (home / 'ready').exists() or self.runner.poll() is not None, 60)
        self.processes = {'runner': psutil.Process(self.runner.pid)} if end != 'ends' else {}
        for name in ('first', 'second', 'third', 'kernel') if end != 'ends' else ():
            above = list(self.processes.values())[-1]
            self.processes[name] = [p for p in above.children() if p != self.child][0]

    def wait(self, what, seconds: float = 10.0) -> float:
        "The seconds until `what()` held, at most so many."
        began = time.monotonic()
        while not what() and time.monotonic() - began < seconds:
            time.sleep(0.02)
        return time.monotonic() - began

    def begun(self):
        "Wait until each kind of child has said that it lives."
        for kind, fifo in self.fifos.items():
            spoken = lambda fifo=fifo: self.said(fifo)
            assert self.wait(spoken, 30) < 30, kind
        assert [kind for kind, fifo in self.fifos.items() if not holds(fifo)] == []

    def said(self, fifo: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(fifo, 1))
        return False

    def kill(self, victims):
        "Kill the victims at one time: none of them can act after the first is dead."
        for name in victims:
            self.processes[name].suspend()
        for name in victims:
            self.processes[name].kill()

    def survivors(self, seconds: float = 10.0) -> list[str]:
        "The kinds of which a process is left after so many seconds, and what is left of the guard."
        left = lambda: [kind for kind, fifo in self.fifos.items() if holds(fifo)]
        self.seconds = self.wait(lambda: not left() and not gone(self.folder), seconds)
        return left() + gone(self.folder)

    def close(self):
        for p in (*self.processes.values(), self.child):
            with contextlib.suppress(psutil.Error):
                p.kill()
        self.runner.wait()
        locks.clear(self.folder)
        for fifo in self.fifos.values():
            os.close(fifo)


@contextlib.contextmanager
def trial(home: Path, groups: str, end: str = 'waits'):
    "A trial that leaves nothing."
    tried = Trial(home, groups, end)
    try:
        yield tried
    finally:
        tried.close()


SINGLE = ['runner', 'kernel', 'first', 'second', 'third']
ALL = [(v,) for v in SINGLE] + list(itertools.combinations(SINGLE, 2))
QUICK = [('runner',), ('kernel',), ('runner', 'first'), ('second', 'third')]
GROUPS = ['with', 'without']


@linux
@pytest.mark.parametrize('groups', GROUPS)
@pytest.mark.parametrize('victims', ALL if FULL else QUICK, ids='-'.join)
def test_nobody_survives_a_kill(tmp_path, groups, victims):
    if groups == 'with' and not may_group():
        pytest.skip('no control group may be made here')
    with trial(tmp_path / 'trial', groups) as tried:
        tried.begun()
        assert (own is not None and (own / tried.folder.name).exists()) == (groups == 'with')
        tried.kill(victims)
        left = tried.survivors()
        print(f'\n{groups} groups, {victims}: all gone after {tried.seconds:.2f} s')
        assert left == []
        assert tried.child.is_running() and tried.child.status() != psutil.STATUS_ZOMBIE


@linux
@pytest.mark.parametrize('groups', GROUPS)
def test_nobody_survives_the_end_of_a_run(tmp_path, groups):
    if groups == 'with' and not may_group():
        pytest.skip('no control group may be made here')
    with trial(tmp_path / 'trial', groups, 'ends') as tried:
        assert tried.survivors() == []
        print(f'\n{groups} groups: all gone {tried.seconds:.2f} s after the end')


LINKS = ('first', 'second', 'third')


@linux
def test_a_control_group_holds_without_any_supervisor(tmp_path):
    if not may_group():
        pytest.skip('no control group may be made here')
    with trial(tmp_path / 'trial', 'with') as tried:
        tried.begun()
        tried.kill(LINKS)
        assert tried.survivors() == []


@linux
def test_the_next_command_ends_what_no_supervisor_could(tmp_path, monkeypatch):
    if not may_group():
        pytest.skip('no control group may be made here')
    apart = tempfile.TemporaryDirectory()  # where no other test's command sweeps
    monkeypatch.setenv('TMPDIR', apart.name)
    with apart, trial(tmp_path / 'trial', 'with') as tried:
        tried.begun()
        tried.kill(('runner', *LINKS))
        assert len(tried.survivors(0.5)) > 10  # so the test can tell
        locks.sweep()
        assert tried.survivors() == []


def sleeper(**environment) -> subprocess.Popen:
    "A process of this user that sleeps."
    return subprocess.Popen(['sleep', '60'], env={**os.environ, **environment})


def test_living_runs_and_foreign_folders_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, 'places', lambda: [str(tmp_path)])
    with locks.guarded() as guard:
        mine = sleeper(K2LAB_GUARD=str(guard.folder))
        elsewhere = tmp_path / 'k2lab-run-elsewhere'
        elsewhere.mkdir()
        (elsewhere / '.owner').write_text(json.dumps(dict(locks.owner(), host='another')))
        killed = tmp_path / 'k2lab-run-killed'
        killed.mkdir()
        (killed / '.owner').write_text(json.dumps(locks.owner()))
        theirs, other = sleeper(K2LAB_GUARD=str(killed)), sleeper(K2LAB_GUARD='k2lab-run-killed')
        locks.sweep()
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
            [guard.folder.name, elsewhere.name]
        )
        assert (mine.poll(), theirs.wait(5), other.poll()) == (None, -signal.SIGKILL, None)
    assert (mine.wait(5), other.poll()) == (-signal.SIGKILL, None)
    other.kill()
    other.wait()


def test_a_process_id_used_again_is_spared(monkeypatch):
    stranger = sleeper()
    known = psutil.Process(stranger.pid)
    monkeypatch.setattr(known, '_ident', (known.pid, known.create_time() - 100))
    monkeypatch.setattr(locks, 'alive', lambda mark: [known])
    locks.reap('any', limit=0.1)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_what_may_not_be_ended_is_returned(monkeypatch):
    monkeypatch.setattr(locks, 'children', lambda: [1, 2])
    monkeypatch.setattr(locks, 'collect', dict)
    monkeypatch.setattr(locks.os, 'kill', refuse)
    began = time.monotonic()
    assert locks.end_children() == [1, 2] and time.monotonic() - began < 1


def refuse(pid, number):
    raise PermissionError(1, 'Operation not permitted')


# ---- the folder of a guard -----------------------------------------------------------------------

LEAVER = '''
import os, subprocess, sys
child = ['env', '-i', 'sleep', '60']
print('left', subprocess.Popen(child, start_new_session=True).pid, os.environ.get('TMPDIR'), flush=True)
'''


def test_a_run_leaves_no_child_and_a_long_TMPDIR_does(lab, tmp_path, monkeypatch):
    long = tmp_path / ('scratch' * 20)
    long.mkdir()
    monkeypatch.setenv('TMPDIR', str(long))
    multi = "from multiprocessing import Manager\nwith Manager() as m: print(list(m.list([1])))"
    cells = ["job = start('{stage}', scale, run, changes)", 'launch(train, job)', LEAVER, multi]
    lab.stage(20, 'train_toy', 'saves: k2_toy\n', cells=[*cells, 'job.finish()'])
    folder = execute('train_toy', campaign='c')
    record, log = read_run(folder), (folder / 'log.txt').read_text()
    assert (record['status'], record['reason']) == ('complete', '')
    word, pid, place = next(line.split() for line in log.splitlines() if line.startswith('left'))
    assert len(place) < locks.LONG and '[1]' in log
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(int(pid))
    assert list(long.iterdir()) == [] and not os.path.lexists(Path(place).parent)


def test_a_folder_for_sockets_is_found(tmp_path, monkeypatch):
    long, closed, short = (tmp_path / name for name in ('x' * 110, 'closed', 'short'))
    long.mkdir()
    short.mkdir()
    closed.write_text('a file')
    told = [str(long), str(tmp_path / 'missing'), str(closed), str(short)]
    monkeypatch.setattr(locks, 'places', lambda: told)
    folder, file = locks.new_folder()
    file.close()
    assert folder.parent == short and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(locks, 'places', lambda: told[:3])
    with pytest.raises(LabError, match='path too long.*No such file.*Not a directory.*set TMPDIR'):
        locks.new_folder()
    assert list(long.iterdir()) == []


@pytest.mark.skipif(not may_mount(), reason='a full file system is made by root')
def test_a_full_place_is_passed_over(tmp_path, monkeypatch):
    full = tmp_path / 'full'
    full.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=16k', 'tmpfs', full], check=True)
    try:
        monkeypatch.setattr(locks, 'places', lambda: [str(full), str(tmp_path)])
        folder, file = locks.new_folder()
        file.close()
        assert folder.parent == tmp_path and list(full.iterdir()) == []
    finally:
        subprocess.run(['umount', full], check=True)


def test_a_run_without_a_place_leaves_nothing(lab, monkeypatch):
    monkeypatch.setattr(locks, 'places', lambda: ['/nowhere'])
    with pytest.raises(LabError, match='no place for the sockets of a kernel: /nowhere'):
        execute('train_toy', campaign='c')
    assert not (lab.runs / 'c').exists()


def test_a_kernel_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, 'places', lambda: [str(tmp_path)])
    with locks.guarded() as guard, pytest.raises(LabError, match='/no/python: no such program'):
        guard.command(['/no/python', '-m', 'ipykernel_launcher'])


def test_what_is_pressed_reaches_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, 'places', lambda: [str(tmp_path)])
    code = (
        'import signal, time\n'
        'signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # a shell may have it ignored
        'try: print(1, flush=True); time.sleep(60)\nexcept KeyboardInterrupt: exit(7)'
    )
    with locks.guarded() as guard:
        words = guard.command([sys.executable, '-c', code])
        started = subprocess.Popen(
            words, stdin=guard.line, stdout=subprocess.PIPE, start_new_session=True
        )
        assert started.stdout and started.stdout.readline()
        os.killpg(started.pid, signal.SIGINT)
        assert started.wait(10) == 7
