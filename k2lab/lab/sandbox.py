"""Run a model's Python code where it can do no harm: no network, no files of yours, bounded time, memory, disk and output.

The code runs in a fresh interpreter that first locks itself in, for good: resource limits, no capabilities, Landlock (the kernel's file rules: read the Python
installation, write one empty folder) and seccomp (system calls that open sockets, start processes, signal others or change files' owners and modes are refused).
Before it runs a line of yours it tries the locks; one that does not hold stops it. Where `bwrap` works the whole is wrapped in it as well, so that other files cannot
even be seen. Where the machine offers neither (macOS, old kernels), `run_python` refuses, unless told `allow_unsafe=True`.

Not covered: the CPU's side channels, and bugs of the kernel. For code of hostile strangers use a virtual machine.
"""

# This file is also the child's program (`python -I sandbox.py CONFIG`), so the top imports the standard library only.
import ast, ctypes, functools, json, os, platform, selectors, shutil, signal, struct, subprocess, sys, tempfile, time, traceback
from pathlib import Path

LOCKED = b'locked'  # what the child reports once its locks hold
CLONE, CLONE3, LAST = (
    'clone',
    435,
    450,
)  # calls numbered above LAST did not exist when this table was written: refused

# ---- the locks (child) ------------------------------------------------------------------------------------------------------

ARCHITECTURES = {'x86_64': (0, 0xC000003E), 'aarch64': (1, 0xC00000B7)}
# refused system calls: name, number on x86_64, on aarch64 (asm-generic); - where there is none
CALLS = """
socket 41 198|connect 42 203|accept 43 202|sendto 44 206|sendmsg 46 211|recvmsg 47 212|bind 49 200|listen 50 201|socketpair 53 199|accept4 288 242|recvmmsg 299 243|sendmmsg 307 269
fork 57 -|vfork 58 -|execve 59 221|execveat 322 281|unshare 272 97|setns 308 268|setsid 112 157|setpgid 109 154
kill 62 129|tkill 200 130|tgkill 234 131|rt_sigqueueinfo 129 138|rt_tgsigqueueinfo 297 240|pidfd_send_signal 424 424|pidfd_open 434 434|pidfd_getfd 438 438
ptrace 101 117|process_vm_readv 310 270|process_vm_writev 311 271|kcmp 312 272|process_madvise 440 440|process_mrelease 448 448
chmod 90 -|fchmod 91 52|fchmodat 268 53|chown 92 -|fchown 93 55|lchown 94 -|fchownat 260 54|utime 132 -|utimes 235 -|futimesat 261 -|utimensat 280 88
setxattr 188 5|lsetxattr 189 6|fsetxattr 190 7|removexattr 197 14|lremovexattr 198 15|fremovexattr 199 16|mknod 133 -|mknodat 259 33|flock 73 32
mount 165 40|umount2 166 39|pivot_root 155 41|chroot 161 51|open_tree 428 428|move_mount 429 429|fsopen 430 430|fsconfig 431 431|fsmount 432 432|fspick 433 433|mount_setattr 442 442
name_to_handle_at 303 264|open_by_handle_at 304 265|inotify_init 253 -|inotify_init1 294 26|inotify_add_watch 254 27|fanotify_init 300 262|fanotify_mark 301 263|quotactl 179 60|quotactl_fd 443 443
shmget 29 194|shmat 30 196|shmctl 31 195|semget 64 190|semop 65 193|semctl 66 191|semtimedop 220 192|msgget 68 186|msgsnd 69 189|msgrcv 70 188|msgctl 71 187
mq_open 240 180|mq_unlink 241 181|add_key 248 217|request_key 249 218|keyctl 250 219|memfd_create 319 279|memfd_secret 447 447
setpriority 141 140|ioprio_set 251 30|sched_setparam 142 118|sched_setscheduler 144 119|sched_setaffinity 203 122|sched_setattr 314 274|migrate_pages 256 238|move_pages 279 239
setrlimit 160 164|prlimit64 302 261|personality 135 92|io_uring_setup 425 425|io_uring_enter 426 426|io_uring_register 427 427|bpf 321 280|userfaultfd 323 282|perf_event_open 298 241
syslog 103 116|acct 163 89|swapon 167 224|swapoff 168 225|reboot 169 142|init_module 175 105|finit_module 313 273|delete_module 176 106|kexec_load 246 104|kexec_file_load 320 294
settimeofday 164 170|clock_settime 227 112|adjtimex 159 171|clock_adjtime 305 266|sethostname 170 161|setdomainname 171 162|iopl 172 -|ioperm 173 -|modify_ldt 154 -|vhangup 153 58
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


def landlock(libc, read: list, write: list):
    "From here on only the files under `read` can be read and only those under `write` changed; no TCP, no signals or abstract sockets to others."
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
    of_a_file = (
        1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
    )  # execute, write, read, truncate, ioctl
    for paths, rights in ((read, 1 << 0 | 1 << 2 | 1 << 3), (write, files & ~1)):
        for path in filter(os.path.exists, paths):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights & files & (-1 if os.path.isdir(path) else of_a_file)
            must(
                libc.syscall(
                    445,
                    ctypes.c_int(ruleset),
                    ctypes.c_int(1),
                    ctypes.c_char_p(struct.pack('=Qi', allowed, place)),
                    ctypes.c_uint32(0),
                ),
                f'landlock {path}',
            )
            os.close(place)
    must(libc.syscall(446, ctypes.c_int(ruleset), ctypes.c_uint32(0)), 'landlock')
    os.close(ruleset)


def filter_program(machine: str) -> list:
    "The seccomp filter as packed BPF instructions: wrong architecture dies, refused calls get EPERM, unknown ones ENOSYS, new processes EPERM, threads pass."
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, error, kill, (_, arch) = 0x7FFF0000, 0x00050000, 0x80000000, ARCHITECTURES[machine]
    code = [(load, 4), (equal, arch, 1, 0), (give, kill), (load, 0)]
    if machine == 'x86_64':
        code += [(at_least, 0x40000000, 0, 1), (give, kill)]  # the x32 way around the numbers
    code += [
        (equal, CLONE3, 0, 1),
        (give, error | 38),
        (at_least, LAST + 1, 0, 1),
        (give, error | 38),
    ]  # ENOSYS: the C library then falls back to clone
    for number in refused(machine):
        code += [(equal, number, 0, 1), (give, error | 1)]
    code += [
        (equal, OWN[machine]['clone'], 0, 3),
        (load, 16),
        (bits, 0x10000, 1, 0),
        (give, error | 1),
        (give, allow),
    ]  # CLONE_THREAD
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

    told = (
        (resource.RLIMIT_AS, config['memory']),
        (resource.RLIMIT_CPU, config['cpu']),
        (resource.RLIMIT_FSIZE, config['disk']),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    )
    for kind, value in told:
        resource.setrlimit(kind, (value, value))


def drop_powers(libc, machine: str):
    "No capability now or later, no gain by exec, death with the parent. Root without capabilities is just another user."
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
    last = (
        ast.Expression(tree.body.pop().value)
        if tree.body and isinstance(tree.body[-1], ast.Expr)
        else None
    )
    exec(compile(tree, '<tool>', 'exec'), scope)
    value = eval(compile(last, '<tool>', 'eval'), scope) if last else None
    if value is not None:
        print(repr(value))


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
        trace = e.__traceback__
        while trace and trace.tb_frame.f_code.co_filename != '<tool>':
            trace = trace.tb_next  # our own frames say nothing to the reader
        traceback.print_exception(e.with_traceback(trace))
        sys.stdout.flush()
        os._exit(3 if isinstance(e, MemoryError) else 1)


# ---- the keeper (parent) ----------------------------------------------------------------------------------------------------


@functools.cache
def has_bwrap() -> bool:
    "Whether bubblewrap is installed and may make its namespaces here."
    if not shutil.which('bwrap'):
        return False
    return (
        subprocess.run(
            ['bwrap', '--unshare-all', '--ro-bind', '/', '/', 'true'], capture_output=True
        ).returncode
        == 0
    )


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
        return f'this kernel has Landlock {version}, which cannot stop truncation of files: Linux 6.2 or bwrap is needed'
    return ''


def readable() -> list:
    "What the interpreter has to read: itself, its packages, the system's libraries."
    own = [sys.prefix, sys.base_prefix, str(Path(os.path.realpath(sys.executable)).parents[1])]
    return [
        *dict.fromkeys(own),
        '/usr/lib',
        '/usr/lib64',
        '/lib',
        '/lib64',
        '/usr/share/zoneinfo',
        '/etc/ld.so.cache',
        '/dev/null',
        '/dev/zero',
        '/dev/urandom',
        __file__,
    ]


def wrapped(command: list, work: str) -> list:
    "The command inside bubblewrap: own namespaces, nothing but the interpreter's files and the work folder in sight."
    shown = [
        word
        for path in readable()
        if not path.startswith('/dev')
        for word in ('--ro-bind-try', path, path)
    ]
    return [
        shutil.which('bwrap'),
        '--unshare-all',
        '--die-with-parent',
        '--cap-drop',
        'ALL',
        '--proc',
        '/proc',
        '--dev',
        '/dev',
        '--tmpfs',
        '/tmp',
        *shown,
        '--bind',
        work,
        work,
        '--chdir',
        work,
        '--',
        *command,
    ]


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


def follow(process, seconds: float, most: int, work: str, disk: int) -> tuple:
    "Collect (stdout, stderr, trouble) until the process ends; trouble is 'timeout', 'output', 'disk' or ''."
    texts, deadline, look, trouble = (
        {process.stdout: bytearray(), process.stderr: bytearray()},
        time.monotonic() + seconds,
        0.0,
        '',
    )
    with selectors.DefaultSelector() as pick:
        for pipe in texts:
            pick.register(pipe, selectors.EVENT_READ)
        while not trouble and (pick.get_map() or process.poll() is None):
            now = time.monotonic()
            if now > look and folder_size(work, disk) > disk:
                trouble = 'disk'
            if now > look:
                look = now + 0.25
            if not pick.get_map():
                time.sleep(0.01)  # it closed its output and goes on
            for key, _ in pick.select(0.05):
                data = os.read(key.fd, 65536)
                texts[key.fileobj].extend(data)
                if not data:
                    pick.unregister(key.fileobj)
            if sum(map(len, texts.values())) > most:
                trouble = 'output'
            elif now > deadline:
                trouble = 'timeout'
    return bytes(texts[process.stdout][:most]), bytes(texts[process.stderr][:most]), trouble


def status_of(code: int, trouble: str) -> str:
    "'ok', 'error', 'memory', 'timeout', 'output', 'disk' or 'killed', from the exit code and what the keeper saw."
    if trouble:
        return trouble
    code = 128 - code if code > 128 else code  # bwrap passes a signal on as 128 + its number
    return {0: 'ok', 3: 'memory', -signal.SIGXCPU: 'timeout', -signal.SIGXFSZ: 'disk'}.get(
        code, 'error' if code > 0 else 'killed'
    )


def start_child(config: dict, code: str):
    "(process, what it reported): the child, started and fed."
    report, config['report'] = os.pipe()
    command = [sys.executable, '-I', '-B', '-X', 'utf8', __file__, json.dumps(config)]
    if config['bwrap']:
        command = wrapped(command, config['work'])
    env = dict(
        PATH='/usr/bin:/bin',
        HOME=config['work'],
        TMPDIR=config['work'],
        LANG='C.UTF-8',
        OPENBLAS_NUM_THREADS='1',
        OMP_NUM_THREADS='1',
    )
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd='/',
            env=env,
            start_new_session=True,
            pass_fds=[config['report']],
        )
    finally:
        os.close(config['report'])
    try:
        process.stdin.write(code.encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died before it read; its report tells
    return process, report


def kill_child(process):
    "Kill the child and whatever is in its group, and wait for it."
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for pipe in (process.stdout, process.stderr):
        pipe.close()


def run_python(
    code: str,
    timeout: float = 5,
    memory_mb: int = 256,
    max_output: int = 10_000,
    disk_mb: int = 32,
    allow_unsafe: bool = False,
) -> dict:
    "{'stdout', 'stderr', 'status'} of Python code run in the jail; status is 'ok', 'error', 'timeout', 'memory', 'output', 'disk' or 'killed'. `LabError` where it cannot be isolated."
    from k2lab.lab.config import LabError

    trouble = why_not()
    if trouble and not allow_unsafe:
        raise LabError(f'{trouble}. allow_unsafe=True runs the code without isolation')
    work, canary = (
        tempfile.mkdtemp(prefix='k2lab-'),
        tempfile.NamedTemporaryFile(),
    )  # the canary is a file the jail must not be able to read
    config = dict(
        work=os.path.realpath(work),
        canary=canary.name,
        read=readable(),
        memory=memory_mb << 20,
        cpu=int(timeout) + 2,
        disk=disk_mb << 20,
        unsafe=bool(trouble),
        bwrap=not trouble and has_bwrap(),
    )
    try:
        process, report = start_child(config, code)
        try:
            out, err, seen = follow(process, timeout, max_output, work, disk_mb << 20)
        finally:
            kill_child(process)
        locked = os.read(report, 16)
        os.close(report)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        canary.close()
    if locked != LOCKED and seen != 'timeout':
        raise LabError(
            f"the sandbox could not be set up: {err.decode(errors='replace').strip().splitlines()[-1:] or process.returncode}"
        )
    return dict(
        stdout=out.decode(errors='replace'),
        stderr=err.decode(errors='replace'),
        status=status_of(process.returncode, seen),
    )


if __name__ == '__main__':
    child()
