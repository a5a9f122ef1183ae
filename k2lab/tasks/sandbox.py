"""Run a model's Python code where it can do no harm.

`run_python` runs it once, in a fresh process; `PythonSession` keeps the process, so that variables stay.
The code gets no network and none of your files; time, memory, disk, threads and output are bounded, and
it ends with the process that asked for it. Two kinds of isolation hold at once where the machine allows:

- **Locks**, always: seccomp allows only the system calls that a computation in one process needs (no
  sockets, no processes, no signals to others by any route), Landlock (the kernel's file rules) allows to
  read the Python installation and to write one folder, all capabilities are dropped, and limits are set.
  Before the child runs any of the code it tries the locks, and stops if one does not hold.
- **Walls**, where user namespaces or `bwrap` work: a file system in which only the interpreter's files
  are in sight, with a folder in memory for the code whose size the kernel bounds; processes and a host
  name of its own.

Without walls the sandbox holds with these differences. The disk is looked at every 50 ms, so a program
can write more for that long before it is stopped. `os.chmod` and `os.utime` cannot change a file. The
code cannot read other files, but `os.stat` tells whether they exist, their sizes and times; `os.uname`
tells the host's name, and process numbers are the host's.

Where the machine offers no locks (macOS, old kernels), `run_python` refuses, except with
`allow_unsafe=True`. Not covered: the CPU's side channels and bugs of the kernel. Use a virtual machine
for hostile code.
"""

import contextlib
import ctypes
import functools
import json
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

from . import jail
from .jail import ARCHITECTURES, HOME, LANDLOCK, LOCKED, delete_folder

SET_UP = 60  # seconds for the child to lock itself in, on a machine that is busy
PATIENCE = 2  # seconds for it to end by itself before it is killed

# ---- what the machine offers -----------------------------------------------------------------------


def landlock_version(libc) -> int:
    "The kernel's Landlock version, 0 without."
    return max(0, libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def offered() -> int:
    "The Landlock version that the child is told to use: the kernel's, or the newest that is known here."
    return min(landlock_version(ctypes.CDLL(None, use_errno=True)), LANDLOCK)


def readable() -> list:
    "What the interpreter has to read: itself, its packages, the system's libraries."
    own = [sys.prefix, sys.base_prefix, str(Path(os.path.realpath(sys.executable)).parents[1])]
    system = '/usr/lib /usr/lib64 /lib /lib64 /usr/share/zoneinfo /etc/ld.so.cache'.split()
    devices = '/dev/null /dev/zero /dev/urandom'.split()
    return [*dict.fromkeys(own), *system, *devices, '/proc/cpuinfo', jail.__file__]


def wrapped(command: list, disk: int) -> list:
    "The command inside bubblewrap, where only the interpreter's files and a folder in memory are in sight."
    own = '--unshare-all --as-pid-1 --hostname sandbox --cap-drop ALL --proc /proc --dev /dev --tmpfs /tmp'
    # root may map itself into namespaces of its own only with this one; the jail drops it
    root = ['--cap-add', 'CAP_SETFCAP'] if not os.getuid() else []
    paths = [path for path in readable() if not path.startswith(('/dev/', '/proc/'))]
    shown = [word for path in paths for word in ('--ro-bind-try', path, path)]
    memory = f'--size {disk} --tmpfs {HOME} --chdir {HOME}'
    bwrap = shutil.which('bwrap') or 'bwrap'
    return [bwrap, *own.split(), *root, *shown, *memory.split(), '--', *command]


def child_command(config: dict) -> list:
    "The command line of the child."
    command = [sys.executable, '-I', '-B', '-X', 'utf8', jail.__file__, json.dumps(config)]
    return wrapped(command, config['disk']) if config['bwrap'] else command


def works(command: list) -> bool:
    "Whether a command ends well."
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return not subprocess.run(command, capture_output=True, timeout=SET_UP).returncode
    return False


@functools.cache
def has_bwrap() -> bool:
    "Whether bubblewrap is installed and may make its namespaces here."
    return bool(shutil.which('bwrap')) and works(
        wrapped([sys.executable, '-I', '-S', '-c', ''], 1 << 20)
    )


@functools.cache
def has_namespaces(bwrap: bool = False) -> bool:
    "Whether the child may build its own walls: user namespaces work here (inside bubblewrap, if so asked)."
    config = dict(probe=True, namespaces=True, bwrap=bwrap, unsafe=False, disk=1 << 20)
    return works(child_command(config | dict(read=readable(), machine=platform.machine())))


GET_WALLS = (
    'allow user namespaces (kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces '
    'above 0; in Docker --security-opt seccomp=unconfined) or install bubblewrap'
)


def why_not() -> str:
    "Why code cannot be isolated on this machine, or an empty string."
    if sys.platform != 'linux':
        return f'the sandbox needs Linux (Landlock and seccomp); this is {sys.platform}'
    if platform.machine() not in ARCHITECTURES:
        return f"no table of system calls for {platform.machine()}; there are {', '.join(ARCHITECTURES)}"
    version = offered()
    if version < 1:
        return 'this kernel has no Landlock (Linux 5.13 or newer, enabled: lsm=landlock,...)'
    if version < 3 and not has_bwrap() and not has_namespaces():
        return (
            f'this kernel has Landlock {version}, which cannot stop truncation of files: '
            f'Linux 6.2 is needed, or {GET_WALLS}'
        )
    return ''


# ---- a process of the sandbox ----------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    "What the code may use."

    timeout: float = 5  # seconds of each call
    memory_mb: int = 256
    max_output: int = 10_000  # bytes of standard output and errors together, of each call
    disk_mb: int = 32
    allow_unsafe: bool = False  # run without isolation where there is none


def settings_of(limits: Limits, once: bool) -> dict:
    "What the child is told, without its descriptors. `LabError` if code cannot be isolated here."
    from k2lab.lab.config import LabError

    why = why_not()
    if why and not limits.allow_unsafe:
        raise LabError(f'{why}. allow_unsafe=True runs the code without isolation')
    bwrap = not why and has_bwrap()
    return dict(
        probe=False,
        unsafe=bool(why),
        bwrap=bwrap,
        namespaces=not why and has_namespaces(bwrap),
        landlock=0 if why else offered(),
        machine=platform.machine(),
        read=readable(),
        memory=limits.memory_mb << 20,
        disk=limits.disk_mb << 20,
        cpu=int(limits.timeout) + 2 if once else 0,
    )


SENT = ('calls', 'control')  # pipes that the keeper writes to; it reads the others
PIPES = (*SENT, 'stdout', 'stderr', 'report', 'verdict')
STATUSES = ('ok', 'error', 'memory', 'disk')  # what the child can report


def spawn(config: dict, theirs: dict) -> subprocess.Popen:
    "Start the child in a process group of its own, with a bare environment and its ends of the pipes."
    env = dict(PATH='/usr/bin:/bin', HOME=config['work'], TMPDIR=config['work'], LANG='C.UTF-8')
    env |= dict(OPENBLAS_NUM_THREADS='1', OMP_NUM_THREADS='1', USER='sandbox', LOGNAME='sandbox')
    handed = [theirs[n] for n in ('report', 'verdict', 'control', 'keeper') if n in theirs]
    return subprocess.Popen(
        child_command(config),
        stdin=theirs['calls'],
        stdout=theirs['stdout'],
        stderr=theirs['stderr'],
        cwd='/',
        env=env,
        start_new_session=True,
        pass_fds=handed,
    )


class Worker:
    "A child that runs code, from its start to its end, and this process's ends of the pipes to it."

    def __init__(self, config: dict):
        self.config, self.locked, self.process = config, False, None
        self.folder, self.ends = '', dict[str, int]()
        self.canary = None  # a file that the jail must not be able to read
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self):
        "Make the pipes, and a folder where there are no walls, and start the child."
        config, theirs = self.config, {}
        try:
            for name in PIPES:
                reads, writes = os.pipe()
                mine, theirs[name] = (writes, reads) if name in SENT else (reads, writes)
                os.set_blocking(mine, False)
                self.ends[name] = mine
            if not config['unsafe']:
                theirs['keeper'] = os.pidfd_open(os.getpid())
                self.canary = tempfile.NamedTemporaryFile()
            if not (config['namespaces'] or config['bwrap']):
                self.folder = os.path.realpath(tempfile.mkdtemp(prefix='k2lab-'))
            config |= theirs | dict(
                work=self.folder or HOME, canary=getattr(self.canary, 'name', '')
            )
            self.process = spawn(config, theirs)
        finally:
            for fd in theirs.values():
                os.close(fd)

    def has_ended(self) -> bool:
        "Whether the child is gone. It is not reaped yet, so that its number stays that of its group."
        if sys.platform != 'linux' and self.process:
            return self.process.poll() is not None
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        with contextlib.suppress(ChildProcessError):  # reaped: this process ignores SIGCHLD
            return self.process is None or os.waitid(os.P_PID, self.process.pid, flags) is not None
        return True

    def close(self):
        """End the child and whatever is in its process group, and leave nothing of it behind.

        The watching process ends the code when its pipe is closed, and reaps it: where nobody reaps
        orphans, as in many containers, a kill of the whole group would leave some."""
        for name in SENT:
            if name in self.ends:
                os.close(self.ends.pop(name))
        if self.process:
            deadline = time.monotonic() + PATIENCE
            while not self.has_ended() and time.monotonic() < deadline:
                time.sleep(0.002)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.clear()

    def drop_canary(self):
        "Delete the file that the jail has tried to read."
        if self.canary:
            self.canary.close()
        self.canary = None

    def clear(self):
        "Close the other pipes and delete the files."
        for fd in self.ends.values():
            os.close(fd)
        self.drop_canary()
        if self.folder:
            with contextlib.suppress(OSError):
                delete_folder(self.folder)
        self.ends, self.process, self.folder = {}, None, ''


def status_of(verdict: dict, reply: str, cpu: float) -> str:
    """The status after the child's end: from the watching process first, then from the child's report.

    `verdict` is empty if the watching process was killed as well."""
    number = verdict.get('signal', signal.SIGKILL)
    if verdict.get('over') in ('disk', 'memory'):
        return verdict['over']
    spent = 0 < cpu <= verdict.get('seconds', 0)
    if number == signal.SIGXCPU or number == signal.SIGKILL and spent:
        return 'timeout'
    if number:
        return 'disk' if number == signal.SIGXFSZ else 'killed'
    return reply if reply not in ('', 'ok') else 'error' if verdict['exit'] else 'ok'


@dataclass(frozen=True)
class Outcome:
    "What came of a call: output, status, and whether the child is ready for another."

    stdout: str
    stderr: str
    status: str
    lives: bool


class Call:
    """One piece of code on its way through a worker: what is still to be sent, and what came back.

    The child's report is written next to code that may forge it. It is bounded, and it counts only where
    nothing that this process or the watching process saw says otherwise."""

    def __init__(self, worker: Worker, code: str, limits: Limits, last: bool):
        self.worker, self.limits, self.last = worker, limits, last
        self.key = os.urandom(8).hex()
        self.unsent = json.dumps(dict(key=self.key, code=code)).encode() + b'\n'
        self.got = {name: bytearray() for name in PIPES if name not in SENT}
        self.open = set(self.got)
        self.deadline = time.monotonic() + (limits.timeout if worker.locked else SET_UP)

    def command(self, what: bytes):
        "Tell the watching process to let the code run (1) or to stop it (0)."
        with contextlib.suppress(BrokenPipeError):  # it is gone: the end of its pipe tells
            os.write(self.worker.ends['control'], what)

    def send(self):
        "Write as much of the code as the pipe takes."
        try:
            self.unsent = self.unsent[os.write(self.worker.ends['calls'], self.unsent) :]
        except BrokenPipeError:  # the child is gone: its verdict tells
            self.unsent = b''

    def take(self, name: str) -> bool:
        "Append what a pipe has; False if it had nothing."
        try:
            data = os.read(self.worker.ends[name], 65536)
        except BlockingIOError:
            return False
        if not data:
            self.open.discard(name)
        elif name == 'report' and not self.worker.locked:
            self.start_clock(data)
        else:
            self.got[name] += data
        return bool(data)

    def start_clock(self, data: bytes):
        "The child has locked itself in: the seconds of the code begin."
        if data.startswith(LOCKED):
            self.worker.locked = True
            self.worker.drop_canary()
            self.deadline = time.monotonic() + self.limits.timeout
            self.got['report'] += data[len(LOCKED) :]

    def reply(self) -> str:
        "The status that the child reports for this call, or ''."
        said = (s for s in STATUSES if f'{self.key} {s}\n'.encode() in self.got['report'])
        return next(said, '')

    def trouble(self) -> str:
        "'output' or 'timeout' if this call has passed a limit that is held here."
        sizes = {name: len(got) for name, got in self.got.items()}
        if sizes['stdout'] + sizes['stderr'] > self.limits.max_output or sizes['report'] > 1 << 16:
            return 'output'
        return 'timeout' if time.monotonic() > self.deadline else ''

    def handle(self, pick, name: str):
        "Send to or take from the pipe that is ready, and forget it when it is done with."
        handle = self.worker.ends[name]
        if name != 'calls':
            self.take(name)
            if name not in self.open:
                pick.unregister(handle)
            return
        self.send()
        if not self.unsent:
            pick.unregister(handle)
            if self.last:
                os.close(self.worker.ends.pop('calls'))

    def has_ended(self) -> bool:
        "Whether the child is gone; its pipe alone may be held open by a copy that another thread forked."
        return 'verdict' not in self.open or self.worker.has_ended()

    def follow(self) -> str:
        "Exchange until the child has replied, or ended if this is its last call. The limit it passed, or ''."
        with selectors.DefaultSelector() as pick:
            for name in self.open:
                pick.register(self.worker.ends[name], selectors.EVENT_READ, name)
            pick.register(self.worker.ends['calls'], selectors.EVENT_WRITE, 'calls')
            while not (trouble := self.trouble()):
                if self.has_ended() or not self.last and self.reply():
                    break
                left = max(0, self.deadline - time.monotonic())
                for key, _ in pick.select(min(left + 0.001, 0.5)):
                    self.handle(pick, key.data)
        return trouble

    def drain(self) -> str:
        "Take what the pipes still hold. 'output' if that is too much."
        for name in sorted(self.open):
            while name in self.open and self.trouble() != 'output' and self.take(name):
                continue
        return 'output' if self.trouble() == 'output' else ''

    def run(self) -> Outcome:
        "Send the code, collect what it writes, and say what happened. `LabError` if no lock was set."
        self.command(b'1')
        trouble = self.follow()
        self.command(b'0')
        trouble = self.drain() or trouble
        out, err = (self.text(name) for name in ('stdout', 'stderr'))
        if not self.worker.locked:
            raise set_up_failed(err)
        ended, reply = self.has_ended(), self.reply()
        if ended and not trouble:
            verdict = json.loads(self.got['verdict'] or '{}')
            trouble = status_of(verdict, reply, self.worker.config['cpu'])
            if not self.last and trouble == 'ok':
                trouble = 'error'
        return Outcome(
            out, err, trouble or reply, lives=not (ended or trouble or reply == 'memory')
        )

    def text(self, name: str) -> str:
        "What was written to a pipe, up to the limit; bytes that are no UTF-8 are replaced visibly."
        return bytes(self.got[name][: self.limits.max_output]).decode(errors='replace')


def set_up_failed(err: str):
    "The `LabError` for a child that did not lock itself in, with the last line that it wrote."
    from k2lab.lab.config import LabError

    last = err.strip().split('\n')[-1] or f'no answer within {SET_UP} s'
    return LabError(f'the sandbox could not be set up: {last}')


def run_python(
    code: str,
    timeout: float = 5,
    memory_mb: int = 256,
    max_output: int = 10_000,
    disk_mb: int = 32,
    allow_unsafe: bool = False,
) -> dict:
    """`{'stdout', 'stderr', 'status'}` of Python code run in a fresh process of the sandbox.

    `timeout` is in seconds from when the process is ready; `max_output` in bytes. `status` is 'ok',
    'error', 'timeout', 'memory', 'output', 'disk' or 'killed'. `LabError` if the code cannot be isolated
    on this machine."""
    limits = Limits(timeout, memory_mb, max_output, disk_mb, allow_unsafe)
    worker = Worker(settings_of(limits, once=True))
    try:
        done = Call(worker, code, limits, last=True).run()
    finally:
        worker.close()
    return dict(stdout=done.stdout, stderr=done.stderr, status=done.status)


# ---- a session -------------------------------------------------------------------------------------

LOST = 'the next call starts afresh, without the variables and imports of earlier ones'


def end_worker(held: list, owner: int):
    "Close the worker in a list of at most one, unless this is a forked copy of the process it belongs to."
    while held and os.getpid() == owner:
        held.pop().close()


class PythonSession:
    """A process of the sandbox that is kept between calls: variables, imports and files stay.

    `run` starts it when it is needed. It ends with `close()`, at the end of a `with` block, or with this
    process, however that ends. Between calls it stands still. After a time-out, too much memory, output
    or disk, or a crash, the next call starts a new one, and the result's `note` says so. Threads may
    share a session: their calls run one after the other."""

    def __init__(
        self,
        timeout: float = 5,
        memory_mb: int = 256,
        max_output: int = 10_000,
        disk_mb: int = 32,
        allow_unsafe: bool = False,
    ):
        self.limits = Limits(timeout, memory_mb, max_output, disk_mb, allow_unsafe)
        self.lock, self.owner, self.held = threading.RLock(), os.getpid(), []
        self.finish = weakref.finalize(self, end_worker, self.held, self.owner)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        "End the process; a call that is running in another thread is waited for."
        with self.lock:
            self.finish()

    def run(self, code: str, timeout: float | None = None) -> dict:
        """`{'stdout', 'stderr', 'status', 'note'}` of code that sees what earlier calls defined.

        `status` as in `run_python`; `timeout` in seconds, the session's own if None; `note` is empty as
        long as the variables are kept. `LabError` after `close()`, in a forked copy of this process, or if
        code cannot be isolated on this machine."""
        with self.lock:
            self.check()
            note = self.replace_dead()
            limits = self.limits if timeout is None else replace(self.limits, timeout=timeout)
            if not self.held:
                self.held.append(Worker(settings_of(limits, once=False)))
            try:
                done = Call(self.held[0], code, limits, last=False).run()
            except BaseException:
                end_worker(self.held, self.owner)
                raise
            if not done.lives:
                end_worker(self.held, self.owner)
                note = f'the process ended ({done.status}): {LOST}'
            return dict(stdout=done.stdout, stderr=done.stderr, status=done.status, note=note)

    def check(self):
        "`LabError` if this session cannot be used (any more, or here)."
        from k2lab.lab.config import LabError

        if not self.finish.alive:
            raise LabError('this PythonSession is closed; make a new one')
        if os.getpid() != self.owner:
            raise LabError(
                f'this PythonSession belongs to process {self.owner}; make one in each process'
            )

    def replace_dead(self) -> str:
        "A note if the process ended between two calls."
        if not self.held or not self.held[0].has_ended():
            return ''
        end_worker(self.held, self.owner)
        return 'the process had ended since the last call: this one started afresh'
