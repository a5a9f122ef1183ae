"""Run a model's Python code where it can do no harm.

It gets no network and none of your files; time, memory, disk and output are bounded. The code runs in a
fresh interpreter that first locks itself in, for good: resource limits, no capabilities, Landlock and
seccomp. Landlock is the kernel's file rules: read the Python installation, write one empty folder.
Seccomp refuses system calls that open sockets, start processes, signal others or change the owner or
mode of files. Before the child runs any of the code it tries the locks, and stops if one does not hold.
Where `bwrap` works, all of it is wrapped in that as well, so that other files cannot even be seen.
Where the machine offers neither (macOS, old kernels), `run_python` refuses, except with
`allow_unsafe=True`.

Not covered: the CPU's side channels and bugs of the kernel. Use a virtual machine for hostile code.
"""

# This file is also the child's program (`python -I sandbox.py CONFIG`), so the top imports the standard library only.
import ast
import contextlib
import ctypes
import functools
import json
import os
import platform
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

LOCKED = b'locked'  # what the child reports once its locks hold
CLONE3 = 435
LAST = 450  # calls with higher numbers did not exist when the table below was written: refused

# ---- the locks (child) ---------------------------------------------------------------------------

ARCHITECTURES = {'x86_64': (0, 0xC000003E), 'aarch64': (1, 0xC00000B7)}
# refused system calls: name, number on x86_64, on aarch64 (asm-generic); - where there is none
CALLS = """
socket 41 198|connect 42 203|accept 43 202|sendto 44 206|sendmsg 46 211|recvmsg 47 212|bind 49 200
listen 50 201|socketpair 53 199|accept4 288 242|recvmmsg 299 243|sendmmsg 307 269
fork 57 -|vfork 58 -|execve 59 221|execveat 322 281|unshare 272 97|setns 308 268|setsid 112 157
setpgid 109 154
kill 62 129|tkill 200 130|tgkill 234 131|rt_sigqueueinfo 129 138|rt_tgsigqueueinfo 297 240
pidfd_send_signal 424 424|pidfd_open 434 434|pidfd_getfd 438 438
ptrace 101 117|process_vm_readv 310 270|process_vm_writev 311 271|kcmp 312 272
process_madvise 440 440|process_mrelease 448 448
chmod 90 -|fchmod 91 52|fchmodat 268 53|chown 92 -|fchown 93 55|lchown 94 -|fchownat 260 54
utime 132 -|utimes 235 -|futimesat 261 -|utimensat 280 88
setxattr 188 5|lsetxattr 189 6|fsetxattr 190 7|removexattr 197 14|lremovexattr 198 15
fremovexattr 199 16|mknod 133 -|mknodat 259 33|flock 73 32
mount 165 40|umount2 166 39|pivot_root 155 41|chroot 161 51|open_tree 428 428|move_mount 429 429
fsopen 430 430|fsconfig 431 431|fsmount 432 432|fspick 433 433|mount_setattr 442 442
name_to_handle_at 303 264|open_by_handle_at 304 265|inotify_init 253 -|inotify_init1 294 26
inotify_add_watch 254 27|fanotify_init 300 262|fanotify_mark 301 263|quotactl 179 60
quotactl_fd 443 443
shmget 29 194|shmat 30 196|shmctl 31 195|semget 64 190|semop 65 193|semctl 66 191|semtimedop 220 192
msgget 68 186|msgsnd 69 189|msgrcv 70 188|msgctl 71 187
mq_open 240 180|mq_unlink 241 181|add_key 248 217|request_key 249 218|keyctl 250 219
memfd_create 319 279|memfd_secret 447 447
setpriority 141 140|ioprio_set 251 30|sched_setparam 142 118|sched_setscheduler 144 119
sched_setaffinity 203 122|sched_setattr 314 274|migrate_pages 256 238|move_pages 279 239
setrlimit 160 164|prlimit64 302 261|personality 135 92|io_uring_setup 425 425|io_uring_enter 426 426
io_uring_register 427 427|bpf 321 280|userfaultfd 323 282|perf_event_open 298 241
syslog 103 116|acct 163 89|swapon 167 224|swapoff 168 225|reboot 169 142|init_module 175 105
finit_module 313 273|delete_module 176 106|kexec_load 246 104|kexec_file_load 320 294
settimeofday 164 170|clock_settime 227 112|adjtimex 159 171|clock_adjtime 305 266
sethostname 170 161|setdomainname 171 162|iopl 172 -|ioperm 173 -|modify_ldt 154 -|vhangup 153 58
"""
OWN = {
    'x86_64': dict(clone=56, seccomp=317, capset=126),
    'aarch64': dict(clone=220, seccomp=277, capset=91),
}  # calls that the jail itself uses


def refused(machine: str) -> list:
    "The numbers of the refused system calls on this machine."
    column = ARCHITECTURES[machine][0] + 1
    numbers = [
        entry.split()[column] for line in CALLS.split('\n') if line for entry in line.split('|')
    ]
    return [int(n) for n in numbers if n != '-']


def must(result: int, what: str):
    "Raise the C library's error if a call failed."
    if result < 0:
        raise OSError(ctypes.get_errno(), f'{what}: {os.strerror(ctypes.get_errno())}')
    return result


def landlock_version(libc) -> int:
    "The kernel's Landlock version, 0 without."
    return max(0, libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def allow_path(libc, ruleset: int, path: str, rights: int):
    "Add a rule to a Landlock ruleset: these rights on a file, or on everything under a folder."
    of_a_file = (
        1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
    )  # execute, write, read, truncate, ioctl
    allowed = rights & (-1 if os.path.isdir(path) else of_a_file)
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.c_char_p(struct.pack('=Qi', allowed, handle))
    result = libc.syscall(445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
    must(result, f'landlock {path}')
    os.close(handle)


def landlock(libc, read: list, write: list):
    """Let this process read only files under `read` and change only those under `write`.

    TCP, and signals or abstract sockets to other processes, are refused where the kernel can."""
    version = landlock_version(libc)
    files = (
        (1 << 13) - 1
        | (1 << 13 if version >= 2 else 0)
        | (1 << 14 if version >= 3 else 0)
        | (1 << 15 if version >= 5 else 0)
    )
    rules = struct.pack('QQQ', files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = must(
        libc.syscall(444, ctypes.c_char_p(rules), ctypes.c_size_t(size), ctypes.c_uint32(0)),
        'landlock',
    )
    for paths, rights in ((read, 1 << 0 | 1 << 2 | 1 << 3), (write, files & ~1)):
        for path in filter(os.path.exists, paths):
            allow_path(libc, ruleset, path, rights & files)
    must(libc.syscall(446, ctypes.c_int(ruleset), ctypes.c_uint32(0)), 'landlock')
    os.close(ruleset)


def filter_program(machine: str) -> list:
    """The seccomp filter as packed BPF instructions.

    A wrong architecture is killed, refused calls and new processes get EPERM, unknown calls get ENOSYS;
    threads pass."""
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, error, kill, (_, arch) = 0x7FFF0000, 0x00050000, 0x80000000, ARCHITECTURES[machine]
    code = [(load, 4), (equal, arch, 1, 0), (give, kill), (load, 0)]
    if machine == 'x86_64':
        code += [(at_least, 0x40000000, 0, 1), (give, kill)]  # the x32 way around the numbers
    enosys = (give, error | 38)  # the C library then falls back to clone
    code += [(equal, CLONE3, 0, 1), enosys, (at_least, LAST + 1, 0, 1), enosys]
    for number in refused(machine):
        code += [(equal, number, 0, 1), (give, error | 1)]
    thread = (bits, 0x10000, 1, 0)  # CLONE_THREAD
    code += [(equal, OWN[machine]['clone'], 0, 3), (load, 16), thread]
    code += [(give, error | 1), (give, allow)]
    return [struct.pack('HBBI', c, *(jumps or (0, 0)), k) for c, k, *jumps in code]


def seccomp(libc, machine: str):
    "Install the filter for all threads of this process."

    class Program(ctypes.Structure):
        _fields_ = [('length', ctypes.c_ushort), ('filter', ctypes.c_char_p)]

    code = filter_program(machine)
    program = Program(len(code), b''.join(code))
    must(
        libc.syscall(
            OWN[machine]['seccomp'], ctypes.c_ulong(1), ctypes.c_ulong(1), ctypes.byref(program)
        ),
        'seccomp',
    )


def limits(config: dict):
    "Memory, CPU seconds, size and number of files, no core dumps."
    import resource

    values = (
        (resource.RLIMIT_AS, config['memory']),
        (resource.RLIMIT_CPU, config['cpu']),
        (resource.RLIMIT_FSIZE, config['disk']),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    )
    for kind, value in values:
        resource.setrlimit(kind, (value, value))


def drop_powers(libc, machine: str):
    """Give up all capabilities for good, gain none by exec, and die with the parent.

    Root without capabilities is just another user."""
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    for number in range(64):
        libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP; fails harmlessly for a user who has none
    libc.prctl(47, 4, 0, 0, 0)  # ambient ones
    must(
        libc.syscall(
            OWN[machine]['capset'], struct.pack('Ii', 0x20080522, 0), struct.pack('6I', *[0] * 6)
        ),
        'capset',
    )
    must(libc.prctl(38, 1, 0, 0, 0), 'no_new_privs')


def prove(config: dict):
    "Try what must fail: a socket, a process, another's file, a changed mode. Raises if one succeeds."
    import socket

    def process():
        if os.fork() == 0:
            os._exit(0)

    tries = dict(
        socket=socket.socket,
        process=process,
        signal=lambda: os.kill(os.getppid(), 0),
        mode=lambda: os.chmod(config['work'], 0o700),
        file=lambda: open(config['canary']).read(),
    )
    for name, attempt in tries.items():
        try:
            attempt()
        except PermissionError:
            continue
        except FileNotFoundError:
            if name == 'file':
                continue  # bwrap: it is not even there
        raise OSError(f'the lock against {name} does not hold')


def lock_down(config: dict):
    "Lock this process in; raises OSError if a lock cannot be set or does not hold."
    limits(config)
    if config['unsafe']:
        return
    libc, machine = ctypes.CDLL(None, use_errno=True), platform.machine()
    drop_powers(libc, machine)
    landlock(libc, config['read'], [config['work']])
    seccomp(libc, machine)
    prove(config)


def play(code: str):
    "Execute the code as a module; the value of a last expression is printed, as at the prompt."
    scope, tree = {'__name__': '__main__'}, ast.parse(code, '<tool>')
    end, last = tree.body[-1] if tree.body else None, None
    if isinstance(end, ast.Expr):
        tree.body.pop()
        last = ast.Expression(end.value)
    exec(compile(tree, '<tool>', 'exec'), scope)
    value = eval(compile(last, '<tool>', 'eval'), scope) if last else None
    if value is not None:
        print(repr(value))


def print_error(error: Exception):
    "Print an exception's traceback to stderr, without the frames of this file."
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename != '<tool>':
        trace = trace.tb_next
    traceback.print_exception(error.with_traceback(trace))


def child():
    "The child's program: lock, report, run the code from stdin."
    config, code = json.loads(sys.argv[1]), sys.stdin.buffer.read().decode()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(config['work'])
    platform.machine()  # cached now: it must not need the system later
    lock_down(config)
    os.write(config['report'], LOCKED)
    os.close(config['report'])
    try:
        play(code)
    except Exception as e:
        print_error(e)
        sys.stdout.flush()
        os._exit(3 if isinstance(e, MemoryError) else 1)


# ---- the keeper (parent) -------------------------------------------------------------------------


@functools.cache
def has_bwrap() -> bool:
    "Whether bubblewrap is installed and may make its namespaces here."
    if not shutil.which('bwrap'):
        return False
    command = ['bwrap', '--unshare-all', '--ro-bind', '/', '/', 'true']
    return subprocess.run(command, capture_output=True).returncode == 0


def why_not() -> str:
    "Why code cannot be isolated on this machine, or an empty string."
    if sys.platform != 'linux':
        return f'the sandbox needs Linux (Landlock and seccomp); this is {sys.platform}'
    if platform.machine() not in ARCHITECTURES:
        return f"no table of system calls for {platform.machine()}; there are {', '.join(ARCHITECTURES)}"
    version = landlock_version(ctypes.CDLL(None, use_errno=True))
    if version < 1:
        return 'this kernel has no Landlock (Linux 5.13 or newer, enabled)'
    if version < 3 and not has_bwrap():
        return (
            f'this kernel has Landlock {version}, which cannot stop truncation of files: '
            'Linux 6.2 or bwrap is needed'
        )
    return ''


def readable() -> list:
    "What the interpreter has to read: itself, its packages, the system's libraries."
    own = [sys.prefix, sys.base_prefix, str(Path(os.path.realpath(sys.executable)).parents[1])]
    system = '/usr/lib /usr/lib64 /lib /lib64 /usr/share/zoneinfo /etc/ld.so.cache'.split()
    devices = '/dev/null /dev/zero /dev/urandom'.split()
    return [*dict.fromkeys(own), *system, *devices, __file__]


def wrapped(command: list, work: str) -> list:
    "The command inside bubblewrap, where only the interpreter's files and the work folder are in sight."
    own = '--unshare-all --die-with-parent --cap-drop ALL --proc /proc --dev /dev --tmpfs /tmp'
    paths = [path for path in readable() if not path.startswith('/dev')]
    shown = [word for path in paths for word in ('--ro-bind-try', path, path)]
    place = ['--bind', work, work, '--chdir', work]
    return [shutil.which('bwrap') or 'bwrap', *own.split(), *shown, *place, '--', *command]


def folder_size(folder: str, most: int) -> int:
    "Bytes under a folder; stops counting beyond `most` bytes or 1,000 files, which counts as too much."
    total = 0
    for count, path in enumerate(Path(folder).rglob('*')):
        try:
            total += path.lstat().st_size
        except FileNotFoundError:
            continue  # deleted meanwhile
        if total > most or count > 1000:
            return most + 1
    return total


@dataclass(frozen=True)
class Outcome:
    "What a process wrote, and why it was stopped: 'timeout', 'output', 'disk' or ''."

    stdout: bytes
    stderr: bytes
    trouble: str


def read_ready(pick, texts: dict):
    "Append what the pipes have to their buffers, and forget pipes that were closed."
    if not pick.get_map():
        time.sleep(0.01)  # the process closed its output and goes on
    for key, _ in pick.select(0.05):
        data = os.read(key.fd, 65536)
        texts[key.fileobj].extend(data)
        if not data:
            pick.unregister(key.fileobj)


def follow(process, seconds: float, most: int, work: str, disk: int) -> Outcome:
    "Collect the output until the process ends, or until a limit (seconds, bytes) is passed."
    texts = {process.stdout: bytearray(), process.stderr: bytearray()}
    deadline, look, trouble = time.monotonic() + seconds, 0.0, ''
    with selectors.DefaultSelector() as pick:
        for pipe in texts:
            pick.register(pipe, selectors.EVENT_READ)
        while not trouble and (pick.get_map() or process.poll() is None):
            now = time.monotonic()
            if now > look:
                trouble = 'disk' if folder_size(work, disk) > disk else ''
                look = now + 0.25
            read_ready(pick, texts)
            if sum(map(len, texts.values())) > most:
                trouble = 'output'
            elif now > deadline:
                trouble = 'timeout'
    out, err = (bytes(text[:most]) for text in texts.values())
    return Outcome(out, err, trouble)


def status_of(code: int, trouble: str) -> str:
    "'ok', 'error', 'memory', 'timeout', 'output', 'disk' or 'killed', from the exit code and what the keeper saw."
    if trouble:
        return trouble
    code = 128 - code if code > 128 else code  # bwrap passes a signal on as 128 + its number
    return {0: 'ok', 3: 'memory', -signal.SIGXCPU: 'timeout', -signal.SIGXFSZ: 'disk'}.get(
        code, 'error' if code > 0 else 'killed'
    )


def spawn(command: list, work: str, report: int) -> subprocess.Popen:
    "Start the child in its own process group, with a bare environment and the pipe it reports to."
    env = dict(PATH='/usr/bin:/bin', HOME=work, TMPDIR=work, LANG='C.UTF-8')
    env |= dict(OPENBLAS_NUM_THREADS='1', OMP_NUM_THREADS='1')
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd='/',
        env=env,
        start_new_session=True,
        pass_fds=[report],
    )


def start_child(config: dict, code: str) -> tuple[subprocess.Popen, int]:
    "The started child, which has been sent its code, and the end of the pipe to read its report from."
    report, config['report'] = os.pipe()
    command = [sys.executable, '-I', '-B', '-X', 'utf8', __file__, json.dumps(config)]
    if config['bwrap']:
        command = wrapped(command, config['work'])
    try:
        process = spawn(command, config['work'], config['report'])
    finally:
        os.close(config['report'])
    with contextlib.suppress(BrokenPipeError):  # the child died before it read; its report is empty
        if process.stdin:
            process.stdin.write(code.encode())
            process.stdin.close()
    return process, report


def kill_child(process):
    "Kill the child and whatever is in its group, and wait for it."
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        pipe.close()


def run_child(config: dict, code: str, timeout: float, most: int) -> tuple[Outcome, int, bytes]:
    "What the child wrote, its exit code, and what it reported about its locks."
    process, report = start_child(config, code)
    try:
        outcome = follow(process, timeout, most, config['work'], config['disk'])
    finally:
        kill_child(process)
    locked = os.read(report, 16)
    os.close(report)
    return outcome, process.returncode, locked


def run_python(
    code: str,
    timeout: float = 5,
    memory_mb: int = 256,
    max_output: int = 10_000,
    disk_mb: int = 32,
    allow_unsafe: bool = False,
) -> dict:
    """`{'stdout', 'stderr', 'status'}` of Python code run in the sandbox, `timeout` in seconds.

    `status` is 'ok', 'error', 'timeout', 'memory', 'output', 'disk' or 'killed'.
    `LabError` if the code cannot be isolated on this machine."""
    from k2lab.lab.config import LabError

    unsafe = why_not()
    if unsafe and not allow_unsafe:
        raise LabError(f'{unsafe}. allow_unsafe=True runs the code without isolation')
    config = dict(read=readable(), memory=memory_mb << 20, cpu=int(timeout) + 2, disk=disk_mb << 20)
    config |= dict(unsafe=bool(unsafe), bwrap=not unsafe and has_bwrap())
    work = os.path.realpath(tempfile.mkdtemp(prefix='k2lab-'))
    try:
        with (
            tempfile.NamedTemporaryFile() as canary
        ):  # a file that the jail must not be able to read
            config |= dict(work=work, canary=canary.name)
            outcome, exit_code, locked = run_child(config, code, timeout, max_output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    out, err = (b.decode(errors='replace') for b in (outcome.stdout, outcome.stderr))
    if locked != LOCKED and outcome.trouble != 'timeout':
        reason = err.strip().splitlines()[-1:] or exit_code
        raise LabError(f'the sandbox could not be set up: {reason}')
    return dict(stdout=out, stderr=err, status=status_of(exit_code, outcome.trouble))


if __name__ == '__main__':
    child()
