"""The program of the sandbox's child: walls, locks, and the loop that runs the code.

It is started as `python -I jail.py CONFIG` by [`sandbox.py`](sandbox.py). The first process builds the
walls and watches; the process that it forks locks itself in and runs the code. The watching process is
not locked, shares nothing with the code but ends of pipes, and kills it when a limit is passed or when
the keeper (the process that called `run_python`) is gone."""

# The standard library only, and little of it: this is the time that every call of `run_python` pays.
import ast
import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import stat
import struct
import sys
import traceback
import types

LOCKED = b'locked\n'  # what the child reports once its locks hold
HOME = '/sandbox'  # the one folder of the code, where there are walls
FILES = 1000  # at most so many files and folders
THREADS = 256  # and so many threads: each costs memory of the kernel that RLIMIT_AS does not count
REFUSED = (
    'The sandbox refuses processes, sockets, signals to others and files outside its own folder.'
)
LANDLOCK = 7  # the newest version of Landlock that is known here
LAST = 450  # calls with higher numbers did not exist when the table below was written: ENOSYS
CLONE3 = 435
EPERM, ENOSYS, ENOTTY, EOPNOTSUPP = 1, 38, 25, 95

# ---- system calls ----------------------------------------------------------------------------------

ARCHITECTURES = {'x86_64': (0, 0xC000003E), 'aarch64': (1, 0xC00000B7)}
# Allowed system calls: name, number on x86_64, on aarch64 (asm-generic); - where there is none.
# All others are refused: what is not needed by a computation in one process cannot be misused by it.
CALLS = """
read 0 63|write 1 64|open 2 -|close 3 57|stat 4 -|fstat 5 80|lstat 6 -|poll 7 -|lseek 8 62
mmap 9 222|mprotect 10 226|munmap 11 215|brk 12 214|mremap 25 216|msync 26 227|mincore 27 232
madvise 28 233|pkey_mprotect 329 288|pkey_alloc 330 289|pkey_free 331 290|get_mempolicy 239 236
rt_sigaction 13 134|rt_sigprocmask 14 135|rt_sigreturn 15 139|rt_sigpending 127 136
rt_sigtimedwait 128 137|rt_sigsuspend 130 133|sigaltstack 131 132|pause 34 -
pread64 17 67|pwrite64 18 68|readv 19 65|writev 20 66|preadv 295 69|pwritev 296 70
preadv2 327 286|pwritev2 328 287|sendfile 40 71|access 21 -|faccessat 269 48|faccessat2 439 439
pipe 22 -|pipe2 293 59|dup 32 23|dup2 33 -|dup3 292 24|close_range 436 436
select 23 -|pselect6 270 72|ppoll 271 73|epoll_create 213 -|epoll_create1 291 20|epoll_ctl 233 21
epoll_wait 232 -|epoll_pwait 281 22|epoll_pwait2 441 441|eventfd 284 -|eventfd2 290 19
signalfd 282 -|signalfd4 289 74|timerfd_create 283 85|timerfd_settime 286 86|timerfd_gettime 287 87
nanosleep 35 101|clock_nanosleep 230 115|clock_gettime 228 113|clock_getres 229 114
gettimeofday 96 169|time 201 -|times 100 153|getitimer 36 102|setitimer 38 103|alarm 37 -
sched_yield 24 124|sched_getparam 143 121|sched_getscheduler 145 120|sched_getattr 315 275
sched_get_priority_max 146 125|sched_get_priority_min 147 126|sched_rr_get_interval 148 127
sched_getaffinity 204 123|getcpu 309 168|getpriority 140 141
getpid 39 172|getppid 110 173|gettid 186 178|getpgrp 111 -|getpgid 121 155|getsid 124 156
getuid 102 174|getgid 104 176|geteuid 107 175|getegid 108 177|getgroups 115 158
getresuid 118 148|getresgid 120 150|capget 125 90|uname 63 160|sysinfo 99 179|umask 95 166
getrlimit 97 163|getrusage 98 165|getrandom 318 278|membarrier 324 283|arch_prctl 158 -
futex 202 98|futex_waitv 449 449|set_tid_address 218 96|set_robust_list 273 99|rseq 334 293
restart_syscall 219 128|exit 60 93|exit_group 231 94|wait4 61 260|waitid 247 95
openat 257 56|openat2 437 437|creat 85 -|mkdir 83 -|mkdirat 258 34|rmdir 84 -|unlink 87 -
unlinkat 263 35|rename 82 -|renameat 264 38|renameat2 316 276|link 86 -|linkat 265 37
symlink 88 -|symlinkat 266 36|readlink 89 -|readlinkat 267 78|truncate 76 45|ftruncate 77 46
fsync 74 82|fdatasync 75 83|fadvise64 221 223|getdents 78 -|getdents64 217 61
getcwd 79 17|chdir 80 49|fchdir 81 50|newfstatat 262 79|statx 332 291|statfs 137 43|fstatfs 138 44
getxattr 191 8|lgetxattr 192 9|fgetxattr 193 10|listxattr 194 11|llistxattr 195 12
flistxattr 196 13|recvfrom 45 207|shutdown 48 210|getsockname 51 204|getpeername 52 205
getsockopt 55 209
"""
# Allowed where the walls stand: then the only files that can be changed are the code's own.
ATTRIBUTES = """
chmod 90 -|fchmod 91 52|fchmodat 268 53|chown 92 -|fchown 93 55|lchown 94 -|fchownat 260 54
utime 132 -|utimes 235 -|futimesat 261 -|utimensat 280 88
"""
# Allowed with certain arguments: see `rules`.
GUARDED = """
clone 56 220|kill 62 129|tgkill 234 131|fcntl 72 25|ioctl 16 29|prctl 157 167|prlimit64 302 261
socketpair 53 199|sendto 44 206|fallocate 285 47
"""
# The jail itself makes these calls, before its filter holds.
OWN = {
    'x86_64': dict(seccomp=317, capset=126, pivot_root=155, mount_setattr=442),
    'aarch64': dict(seccomp=277, capset=91, pivot_root=41, mount_setattr=442),
}


def numbers(table: str, machine: str) -> dict:
    "Names and numbers of a table's system calls on this machine."
    column = ARCHITECTURES[machine][0] + 1
    entries = [entry.split() for line in table.split('\n') if line for entry in line.split('|')]
    return {entry[0]: int(entry[column]) for entry in entries if entry[column] != '-'}


def word(argument: int, value: int, mask: int = 0xFFFFFFFF) -> tuple:
    "The condition that an argument's lower 32 bits, masked, are this value."
    return 16 + 8 * argument, mask, value


def null(argument: int) -> list:
    "The conditions that a pointer is null: both halves of its 64 bits."
    return [word(argument, 0), (20 + 8 * argument, 0xFFFFFFFF, 0)]


def any_of(values: tuple, argument: int = 1) -> list:
    "The alternatives that allow each of these values of an argument."
    return [([word(argument, value)], None) for value in values]


def rules(pid: int) -> dict:
    """For each guarded call: what it gives by default, and alternatives of conditions and what they give.

    None allows the call; a number is the error that it returns, 0 a success of a call that is not made."""
    this = [([word(0, pid)], None)]  # signals to this process only
    # threads of this process, in no namespace of their own
    thread = [([word(0, 0x00010000, 0x7E030000)], None)]
    # no owner and no signal of descriptors, no leases, no sizes of pipes; locks are granted without
    # being made: one process has nobody to exclude, and each real one costs memory of the kernel
    descriptors = any_of((0, 1, 2, 3, 5, 1030, 1032, 1034))
    no_async = [([word(1, 4), word(2, 0, 0x2000)], None)]
    locks = [([word(1, command)], 0) for command in (6, 7)]
    terminals = any_of(
        (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
    )  # ask, wait or not, on exec
    own_name = any_of((2, 3, 15, 16, 23, 39, 0x53564D41), 0)  # no PDEATHSIG, no DUMPABLE
    stream_pair = [([word(0, 1), word(1, 1, 0xF)], None)]  # asyncio has one; it reaches nobody else
    return {
        'clone': (EPERM, thread),
        'kill': (EPERM, this),
        'tgkill': (EPERM, this),
        'fcntl': (EPERM, descriptors + no_async + locks),
        'ioctl': (ENOTTY, terminals),
        'prctl': (EPERM, own_name),
        'prlimit64': (EPERM, [([word(0, 0), *null(2)], None)]),  # ask only, about itself only
        'socketpair': (EPERM, stream_pair),
        'sendto': (EPERM, [(null(4), None)]),  # to the other end of a pair, never to an address
        'fallocate': (EOPNOTSUPP, []),  # the C library writes zeros instead
    }


def guard(number: int, default: int, alternatives: list) -> list:
    "The instructions for one guarded call: the first alternative whose conditions hold decides."
    load, mask_with, equal, give, allow, error = 0x20, 0x54, 0x15, 0x06, 0x7FFF0000, 0x00050000
    code = []
    for conditions, result in alternatives:
        for at, (offset, mask, value) in enumerate(conditions):
            left = 3 * (len(conditions) - at - 1) + 1  # to the next alternative
            code += [(load, offset), (mask_with, mask), (equal, value, 0, left)]
        code += [(give, allow if result is None else error | result)]
    code += [(give, error | default)]
    return [(equal, number, 0, len(code)), *code]


def filter_program(machine: str, pid: int, walled: bool) -> list:
    """The seccomp filter as packed BPF instructions, for the process `pid`.

    A wrong architecture is killed; what the tables do not allow gets EPERM, unknown calls and clone3
    ENOSYS, for which the C library has another way."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, error, kill, (_, arch) = 0x7FFF0000, 0x00050000, 0x80000000, ARCHITECTURES[machine]
    code = [(load, 4), (equal, arch, 1, 0), (give, kill), (load, 0)]
    if machine == 'x86_64':
        code += [(at_least, 0x40000000, 0, 1), (give, kill)]  # the x32 way around the numbers
    code += [(equal, CLONE3, 0, 1), (give, error | ENOSYS)]
    code += [(at_least, LAST + 1, 0, 1), (give, error | ENOSYS)]
    for number in numbers(CALLS + (ATTRIBUTES if walled else ''), machine).values():
        code += [(equal, number, 0, 1), (give, allow)]
    for name, number in numbers(GUARDED, machine).items():
        code += guard(number, *rules(pid)[name])
    code += [(give, error | EPERM)]
    return [struct.pack('HBBI', c, *(jumps or (0, 0)), k) for c, k, *jumps in code]


def must(result: int, what: str):
    "Raise the C library's error if a call failed."
    if result < 0:
        raise OSError(ctypes.get_errno(), f'{what}: {os.strerror(ctypes.get_errno())}')
    return result


# ---- the walls: a file system, processes and names of its own --------------------------------------

RECURSIVE, PRIVATE, BIND, NOSUID, NODEV, DETACH = 0x4000, 1 << 18, 0x1000, 2, 4, 2
NAMESPACES = 0x7C020000  # user, mounts, processes, network, System V and message queues, host name


def mount(libc, source: str, target: str, kind: str, flags: int, options: str = ''):
    "The mount call, with errors raised."
    words = (w.encode() or None for w in (source, target, kind))
    must(libc.mount(*words, ctypes.c_ulong(flags), options.encode() or None), f'mount {target}')


def read_only(libc, machine: str, path: str, flags: int):
    "Make the mount at a path and all mounts below it read-only, with more flags."
    attributes = struct.pack('QQQQ', 1 | flags, 0, 0, 0)
    must(
        libc.syscall(
            OWN[machine]['mount_setattr'],
            -100,
            path.encode(),
            0x8000,
            attributes,
            ctypes.c_size_t(32),
        ),
        f'read-only {path}',
    )


def unshare(libc):
    "Enter new namespaces, in which this user stays the same user."
    uid, gid = os.getuid(), os.getgid()
    must(libc.unshare(NAMESPACES), 'namespaces')
    for name, text in (
        ('setgroups', 'deny'),
        ('uid_map', f'{uid} {uid} 1'),
        ('gid_map', f'{gid} {gid} 1'),
    ):
        with open(f'/proc/self/{name}', 'w') as f:
            f.write(text)
    libc.sethostname(b'sandbox', 7)


def show(libc, machine: str, real: str, path: str):
    "Show a file or folder of the old root at its path in the new one, read-only."
    if os.path.lexists(path) or not os.path.lexists(old := '/.old' + real):
        return
    if os.path.isdir(old):
        os.makedirs(path)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT, 0o444))
    mount(libc, old, path, '', BIND | RECURSIVE)
    read_only(libc, machine, path, NOSUID | (0 if path.startswith('/dev/') else NODEV))


def new_root(libc, machine: str, config: dict):
    """Put this process under a root of its own, where only the interpreter's files are in sight.

    Processes that it starts afterwards are in a PID namespace of their own."""
    shown = [(os.path.realpath(p), p) for p in sorted(config['read']) if os.path.exists(p)]
    unshare(libc)
    mount(libc, '', '/', '', RECURSIVE | PRIVATE)
    mount(libc, 'root', '/tmp', 'tmpfs', NOSUID | NODEV, 'mode=755')
    os.mkdir('/tmp/.old')
    must(libc.syscall(OWN[machine]['pivot_root'], b'/tmp', b'/tmp/.old'), 'pivot_root')
    os.chdir('/')
    for real, path in shown:
        show(libc, machine, real, path)
    os.mkdir(HOME)
    size = f'size={config["disk"]},nr_inodes={FILES + 1},mode=700'
    mount(libc, 'sandbox', HOME, 'tmpfs', NOSUID | NODEV, size)
    must(libc.umount2(b'/.old', DETACH), 'umount')
    os.rmdir('/.old')
    attributes = struct.pack('QQQQ', 1, 0, 0, 0)
    must(
        libc.syscall(OWN[machine]['mount_setattr'], -100, b'/', 0, attributes, ctypes.c_size_t(32)),
        'read-only /',
    )


def become_first():
    "Go on as the first process of the new PID namespace; when it ends, all in there end."
    if pid := os.fork():
        os.waitpid(pid, 0)
        os._exit(0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


# ---- the locks -------------------------------------------------------------------------------------


def allow_path(libc, ruleset: int, path: str, rights: int):
    "Add a rule to a Landlock ruleset: these rights on a file, or on everything under a folder."
    of_a_file = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14  # execute, write, read, truncate
    allowed = rights & (-1 if os.path.isdir(path) else of_a_file)
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.c_char_p(struct.pack('=Qi', allowed, handle))
    result = libc.syscall(445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
    must(result, f'landlock {path}')
    os.close(handle)


def landlock(libc, version: int, read: list, write: list):
    """Let this process read only files under `read` and change only those under `write`.

    TCP, and signals or abstract sockets to other processes, are refused where this version can."""
    files = (
        (1 << 13) - 1
        | (1 << 13 if version >= 2 else 0)
        | (1 << 14 if version >= 3 else 0)
        | (1 << 15 if version >= 5 else 0)
    )
    words = struct.pack('QQQ', files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = must(
        libc.syscall(444, ctypes.c_char_p(words), ctypes.c_size_t(size), ctypes.c_uint32(0)),
        'landlock',
    )
    readable = 1 << 0 | 1 << 2 | 1 << 3
    for paths, rights in ((read, readable), (['/dev/null'], 1 << 1), (write, files & ~1)):
        for path in filter(os.path.exists, paths):
            allow_path(libc, ruleset, path, rights & files)
    must(libc.syscall(446, ctypes.c_int(ruleset), ctypes.c_uint32(0)), 'landlock')
    os.close(ruleset)


def seccomp(libc, machine: str, walled: bool):
    "Install the filter for all threads of this process."

    class Program(ctypes.Structure):
        _fields_ = [('length', ctypes.c_ushort), ('filter', ctypes.c_char_p)]

    code = filter_program(machine, os.getpid(), walled)
    program = Program(len(code), b''.join(code))
    words = (ctypes.c_ulong(1), ctypes.c_ulong(1), ctypes.byref(program))
    must(libc.syscall(OWN[machine]['seccomp'], *words), 'seccomp')


def limits(config: dict):
    "Memory, CPU seconds, size and number of files, no core dumps."
    import resource

    values = [
        (resource.RLIMIT_AS, config['memory']),
        (resource.RLIMIT_FSIZE, config['disk']),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ]
    if config['cpu']:
        values.append((resource.RLIMIT_CPU, config['cpu']))
    for kind, value in values:
        resource.setrlimit(kind, (value, value))


def drop_powers(libc, machine: str):
    """Give up all capabilities for good, and gain none by exec.

    Root without capabilities is just another user."""
    for number in range(64):
        libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP; fails harmlessly for a user who has none
    libc.prctl(47, 4, 0, 0, 0)  # ambient ones
    header, none = struct.pack('Ii', 0x20080522, 0), struct.pack('6I', *[0] * 6)
    must(libc.syscall(OWN[machine]['capset'], header, none), 'capset')
    must(libc.prctl(38, 1, 0, 0, 0), 'no_new_privs')


def attempts(libc, config: dict) -> dict:
    "What must fail once the locks hold, by name: each a function that raises OSError."
    import fcntl
    import socket

    def process():
        if os.fork() == 0:
            os._exit(0)

    return dict(
        socket=socket.socket,
        process=process,
        signal=lambda: os.kill(os.getppid(), 0),
        owner=lambda: fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid()),
        orphan=lambda: must(libc.prctl(1, 0, 0, 0, 0), 'PR_SET_PDEATHSIG'),
        mode=lambda: os.chmod(os.__file__, 0o644),
        write=lambda: os.close(os.open(os.__file__, os.O_WRONLY)),
        folder=lambda: os.mkdir('/k2lab-sandbox'),
        file=lambda: os.close(os.open(config['canary'], os.O_RDONLY)),
    )


def prove(libc, config: dict):
    "Try what must fail. Raises if one of it succeeds."
    for name, attempt in attempts(libc, config).items():
        try:
            attempt()
        except OSError as e:
            absent = name == 'file' and e.errno == errno.ENOENT  # behind walls it is not even there
            if absent or e.errno in (errno.EPERM, errno.EACCES, errno.EROFS):
                continue
            raise OSError(f'the lock against {name} cannot be tried: {e}') from e
        raise OSError(f'the lock against {name} does not hold')


def lock_down(config: dict, parent: int):
    "Lock this process in; raises OSError if a lock cannot be set or does not hold."
    if config['unsafe']:
        limits(config)
        return
    libc, machine = ctypes.CDLL(None, use_errno=True), config['machine']
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # it died before
    limits(config)
    drop_powers(libc, machine)
    landlock(libc, config['landlock'], config['read'], [config['work']])
    seccomp(libc, machine, config['namespaces'])
    prove(libc, config)
    use_semaphores()
    if not config['namespaces']:
        grant_what_is()


class Semaphore:
    """What `multiprocessing` builds its locks on, for a process that can have no other one.

    The C library's semaphores are files in /dev/shm, which is not the code's own."""

    SEM_VALUE_MAX = 2**31 - 1

    def __init__(self, kind: int, value: int, maxvalue: int, name: str, unlink: bool):
        import threading

        self.kind, self.maxvalue, self.handle = kind, maxvalue, 0
        self.name = None if unlink else name
        self.value, self.owner, self.depth = value, 0, 0
        self.changed, self.me = threading.Condition(), threading.get_ident

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        "Take one; a recursive lock (kind 0) that this thread holds is only counted."
        with self.changed:
            if not (self.kind == 0 and self._is_mine()):
                wait = timeout if block else 0
                if not self.changed.wait_for(lambda: self.value, wait):
                    return False
                self.value -= 1
            self.owner, self.depth = self.me(), self.depth + 1
            return True

    def release(self):
        "Give one back. AssertionError or ValueError as the C library's."
        with self.changed:
            if self.kind == 0 and not self._is_mine():
                raise AssertionError('attempt to release recursive lock not owned by thread')
            if self.kind and self.value >= self.maxvalue:
                raise ValueError('semaphore or lock released too many times')
            self.depth -= 1
            if self.kind or not self.depth:
                self.value += 1
                self.changed.notify()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_):
        self.release()

    def _is_mine(self) -> bool:
        return self.depth > 0 and self.owner == self.me()

    def _count(self) -> int:
        return self.depth

    def _get_value(self) -> int:
        return self.value

    def _is_zero(self) -> bool:
        return not self.value

    def _after_fork(self):
        self.depth = 0


def use_semaphores():
    "Let `multiprocessing` build its locks without files."
    import _multiprocessing

    _multiprocessing.SemLock = Semaphore


def grant_what_is():
    "Let `os.chmod` succeed where the mode is already what is asked, as after every `shutil.copy`."
    real = os.chmod

    def chmod(path, mode, *, dir_fd=None, follow_symlinks=True):
        try:
            real(path, mode, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
        except PermissionError:
            info = os.stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
            if stat.S_IMODE(info.st_mode) != mode:
                raise

    os.chmod = chmod


# ---- the code --------------------------------------------------------------------------------------


def play(code: str, scope: dict):
    "Execute the code as a module; the value of a last expression is printed, as at the prompt."
    tree = ast.parse(code, '<tool>')
    end, last = tree.body[-1] if tree.body else None, None
    if isinstance(end, ast.Expr):
        tree.body.pop()
        last = ast.Expression(end.value)
    exec(compile(tree, '<tool>', 'exec'), scope)
    value = eval(compile(last, '<tool>', 'eval'), scope) if last else None
    if value is not None:
        print(repr(value))


def print_error(error: BaseException):
    "Print an exception's traceback to stderr, without the frames of this file."
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename != '<tool>':
        trace = trace.tb_next
    traceback.print_exception(error.with_traceback(trace))
    if isinstance(error, PermissionError):
        print(REFUSED, file=sys.stderr)


def kind_of(error: BaseException) -> str:
    "'memory', 'disk' or 'error': the limit that an exception tells of."
    if isinstance(error, MemoryError) or 'allocate memory' in str(error):
        return 'memory'
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in full or 'disk is full' in str(error):
        return 'disk'
    return 'error'


def run_call(code: str, scope: dict) -> str:
    "The status after running the code in a scope: 'ok', 'error', 'memory' or 'disk'."
    try:
        play(code.encode('utf-8', 'backslashreplace').decode(), scope)
        return 'ok'
    except SystemExit as e:
        if e.code is None or type(e.code) is int and e.code == 0:
            return 'ok'
        if not isinstance(e.code, int):
            print(e.code, file=sys.stderr)
        return 'error'
    except BaseException as e:
        print_error(e)
        return kind_of(e)


def safe_call(code: str, scope: dict) -> str:
    "`run_call`, also where an exception cannot be printed or a stream not be flushed."
    try:
        status = run_call(code, scope)
    except BaseException as e:
        status = 'error'
        with contextlib.suppress(BaseException):
            os.write(2, f'{type(e).__name__} while an error was printed\n'.encode())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    return status


def fresh_streams(kept: list):
    "Put the pipes back to where standard output and errors are, whatever the last call did with them."
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(kept[number - 1], number)
        stream = open(
            number, 'w', encoding='utf-8', errors='backslashreplace', buffering=1, closefd=False
        )
        setattr(sys, name, stream)
        setattr(sys, f'__{name}__', stream)


def serve(calls: int, report: int) -> int:
    "Run each call that is read, in one scope, and report its status. The exit code after the last one."
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    kept, status = [os.dup(1), os.dup(2)], 'ok'
    with contextlib.suppress(OSError):  # the code closed one of these pipes: its exit code tells
        for line in open(calls, 'rb'):
            call = json.loads(line)
            fresh_streams(kept)
            status = safe_call(call['code'], vars(main))
            os.write(report, f'{call["key"]} {status}\n'.encode())
    return 0 if status == 'ok' else 1


def jail(config: dict, parent: int, secret: list):
    "The locked process: lock, report, run the code."
    for fd in secret:
        os.close(fd)
    calls = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(config['work'])
    sys.argv[:] = ['<tool>']
    lock_down(config, parent)
    os.write(config['report'], LOCKED)
    sys.exit(serve(calls, config['report']))


# ---- the watch -------------------------------------------------------------------------------------


def number_in(proc: int, handle: int) -> str:
    "The number that the process behind a pidfd has in this /proc, which may be of another namespace."
    with open(os.open(f'self/fdinfo/{handle}', os.O_RDONLY, dir_fd=proc)) as f:
        return next(line.split()[1] for line in f if line.startswith('Pid:'))


def threads_of(proc: int, number: str) -> int:
    "How many threads a process has."
    try:
        with open(os.open(f'{number}/status', os.O_RDONLY, dir_fd=proc)) as f:
            return next(int(line.split()[1]) for line in f if line.startswith('Threads:'))
    except OSError:
        return 0  # it has ended


def used(info: os.stat_result) -> int:
    "The bytes that a file takes on the disk."
    return info.st_blocks * 512


def folder_size(folder: str, most: int) -> int:
    """Bytes on the disk under a folder; stops counting beyond `most` bytes or 1,000 files.

    What cannot be counted (unreadable, too deep for a path) counts as too much."""
    total, count, folders = 0, 0, [folder]
    while folders:
        try:
            for entry in os.scandir(folders.pop()):
                count += 1
                info = entry.stat(follow_symlinks=False)
                total += used(info)
                if stat.S_ISDIR(info.st_mode):
                    folders.append(entry.path)
                if total > most or count > FILES:
                    return most + 1
        except (FileNotFoundError, NotADirectoryError):
            continue  # deleted meanwhile
        except OSError:
            return most + 1
    return total


def held_size(proc: int, number: str, folder: str, most: int) -> int:
    "Bytes of a folder's files that a process holds and no folder shows; a mapped one counts as too much."
    total = 0
    with contextlib.suppress(OSError):  # it has ended
        for fd in os.listdir(held := os.open(f'{number}/fd', os.O_RDONLY, dir_fd=proc)):
            with contextlib.suppress(OSError):
                info = os.stat(fd, dir_fd=held)
                total += used(info) if not info.st_nlink and stat.S_ISREG(info.st_mode) else 0
        os.close(held)
        with open(os.open(f'{number}/maps', os.O_RDONLY, dir_fd=proc), errors='replace') as f:
            gone = [line for line in f if f' {folder}/' in line and line.endswith(' (deleted)\n')]
        total += most + 1 if gone else 0
    return total


def walled(config: dict) -> bool:
    "Whether the code's folder is a file system of its own, in memory."
    return config['namespaces'] or config['bwrap']


def too_much_disk(config: dict, proc: int, number: str) -> bool:
    "Whether the code holds more disk than it may; behind walls the kernel bounds the bytes."
    if walled(config):
        info = os.statvfs(config['work'])
        config['peak'] = max(config['peak'], 1 - info.f_bavail / info.f_blocks)
        return info.f_files - info.f_ffree > FILES + 1
    size = folder_size(config['work'], config['disk'])
    return size + held_size(proc, number, config['work'], config['disk']) > config['disk']


def over(config: dict, proc: int, number: str) -> str:
    "Which limit the code has passed: 'disk', 'memory' or ''."
    if threads_of(proc, number) > THREADS:
        return 'memory'
    return 'disk' if too_much_disk(config, proc, number) else ''


def obey(control: int, pid: int) -> str:
    "Read the keeper's commands: 1 lets the code run, 0 stops it until the next call. The last one, or ''."
    commands = os.read(control, 64).decode()[-1:]
    if commands:
        os.kill(pid, signal.SIGCONT if commands == '1' else signal.SIGSTOP)
    return commands


def delete_folder(folder: str):
    """Delete a folder with all that is in it: names of any bytes, any depth, no rights.

    Folders in folders are moved up and opened one at a time, so depth costs neither stack nor path."""
    os.chmod(folder, 0o700)
    top, mark = os.open(folder, os.O_RDONLY | os.O_DIRECTORY), os.urandom(8).hex()
    waiting = os.listdir(top)
    for name in waiting:
        if not stat.S_ISDIR(os.lstat(name, dir_fd=top).st_mode):
            os.unlink(name, dir_fd=top)
            continue
        os.chmod(name, 0o700, dir_fd=top)
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
        for child in os.listdir(inner):
            if stat.S_ISDIR(os.lstat(child, dir_fd=inner).st_mode):
                os.chmod(child, 0o700, dir_fd=inner)
            waiting.append(f'{mark}-{len(waiting)}')
            os.rename(child, waiting[-1], src_dir_fd=inner, dst_dir_fd=top)
        os.close(inner)
        os.rmdir(name, dir_fd=top)
    os.close(top)
    os.rmdir(folder)


def watch(config: dict, pid: int, proc: int) -> str:
    "Wait for the jailed process, and kill it when it passes a limit or the keeper is gone. Why, or ''."
    child, poll, command, trouble = os.pidfd_open(pid), select.poll(), '1', ''
    number = number_in(proc, child)
    for fd in (child, config['keeper'], config['control']):
        poll.register(fd, select.POLLIN)
    while not trouble:
        ready = {fd for fd, _ in poll.poll(50 if command == '1' else None)}
        if child in ready:
            return ''
        if config['control'] in ready:
            command = obey(config['control'], pid)
        gone = not command or config['keeper'] in ready
        trouble = 'closed' if gone else over(config, proc, number)
    os.kill(pid, signal.SIGKILL)
    return trouble


def watch_unsafe(config: dict, pid: int) -> tuple:
    "The same on any system, by looking every 20 ms at the disk and the pipe; with what `wait4` gives."
    command = '1'
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if select.select([config['control']], [], [], 0.02)[0]:
            command = obey(config['control'], pid)
        full = folder_size(config['work'], config['disk']) > config['disk']
        if full or not command:
            os.kill(pid, signal.SIGKILL)
            return 'disk' if full else 'closed', os.wait4(pid, 0)
    return '', ended


def verdict(config: dict, pid: int, proc: int) -> dict:
    "How the jailed process ended: its exit code or signal, its CPU seconds, and the limit it passed."
    if config['unsafe']:
        trouble, (_, state, usage) = watch_unsafe(config, pid)
    else:
        trouble = watch(config, pid, proc)
        _, state, usage = os.wait4(pid, 0)
    # a write to a mapped file for which there is no room ends in SIGBUS; the room is free again by now
    full = os.WIFSIGNALED(state) and os.WTERMSIG(state) == signal.SIGBUS and config['peak'] > 0.5
    return dict(
        over=trouble or ('disk' if full else ''),
        signal=os.WTERMSIG(state) if os.WIFSIGNALED(state) else 0,
        exit=os.WEXITSTATUS(state) if os.WIFEXITED(state) else 0,
        seconds=usage.ru_utime + usage.ru_stime,
    )


def main():
    "Build the walls, start the jailed process, watch it, and report how it ended."
    config = json.loads(sys.argv[1]) | dict(peak=0.0)
    proc = -1 if config['unsafe'] else os.open('/proc', os.O_RDONLY)
    if config['namespaces']:
        new_root(ctypes.CDLL(None, use_errno=True), config['machine'], config)
        if config['probe']:
            return
        become_first()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        mine = [proc, config.get('keeper', -1), config['control'], config['verdict']]
        jail(config, parent, [fd for fd in mine if fd >= 0])
    said = verdict(config, pid, proc)
    if said['over'] == 'closed' and not walled(config):
        with contextlib.suppress(OSError):  # the keeper, if it lives, is at it too
            delete_folder(config['work'])
    with contextlib.suppress(BrokenPipeError):
        os.write(config['verdict'], json.dumps(said).encode())
    os._exit(0)


if __name__ == '__main__':
    main()
