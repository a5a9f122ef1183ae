"""Attacks on the sandbox, as data: what a program tries, and what it means that it is contained.

Every program prints ESC when it got what it tried for. An attack is contained when ESC and CANARY are not
printed, the status is one of `status` (any, if there are none), and the host is as before: the process
`{pid}` got no signal, `{folder}` and its file `{canary}` are unchanged, and nothing of the child is left.

`call(NAME, ...)` makes a system call and gives what it returned: below 0 where it was refused."""

from dataclasses import dataclass

PRELUDE = r'''
import ctypes, errno, fcntl, os, signal, stat, struct, sys, threading, time
c = ctypes.CDLL(None, use_errno=True)
N = dict(kill=(62, 129), tkill=(200, 130), tgkill=(234, 131), rt_sigqueueinfo=(129, 138),
    rt_tgsigqueueinfo=(297, 240), pidfd_send_signal=(424, 424), pidfd_open=(434, 434),
    pidfd_getfd=(438, 438), fcntl=(72, 25), ioctl=(16, 29), timer_create=(222, 107), mq_open=(240, 180),
    mq_notify=(244, 184), prctl=(157, 167), setsid=(112, 157), setpgid=(109, 154), ptrace=(101, 117),
    prlimit64=(302, 261), clone=(56, 220), clone3=(435, 435), seccomp=(317, 277), kcmp=(312, 272),
    fallocate=(285, 47), memfd_create=(319, 279), memfd_secret=(447, 447), copy_file_range=(326, 285),
    shmget=(29, 194), msgget=(68, 186), semget=(64, 190), setxattr=(188, 5), splice=(275, 76),
    vmsplice=(278, 75), tee=(276, 77), io_setup=(206, 0), io_uring_setup=(425, 425), mount=(165, 40),
    unshare=(272, 97), setns=(308, 268), process_vm_writev=(311, 271), sync=(162, 81), bpf=(321, 280),
    userfaultfd=(323, 282), perf_event_open=(298, 241), mknodat=(259, 33), flock=(73, 32),
    open_tree=(428, 428), setuid=(105, 146), setfsuid=(122, 151), setpriority=(141, 140),
    process_madvise=(440, 440), inotify_init1=(294, 26), fanotify_init=(300, 262), keyctl=(250, 219),
    add_key=(248, 217), personality=(135, 92), landlock_restrict_self=(446, 446), swapon=(167, 224),
    open_by_handle_at=(304, 265), name_to_handle_at=(303, 264), socket=(41, 198), mlockall=(151, 230),
    sched_setaffinity=(203, 122), get_robust_list=(274, 100), sethostname=(170, 161),
    adjtimex=(159, 171), execve=(59, 221), setsockopt=(54, 208), sendmsg=(46, 211))
column = 0 if os.uname().machine == 'x86_64' else 1
def call(name, *arguments):
    words = [a if not isinstance(a, int) else ctypes.c_long(a) for a in arguments]
    return c.syscall(ctypes.c_long(N[name][column]), *words)
def expect_refused(*results):
    if any(r >= 0 for r in results): print('ESC', results)
MB = 1 << 20
'''


@dataclass(frozen=True)
class Attack:
    "A program, what it means that it is contained, the statuses that say so, and options of the run."

    group: str
    name: str
    contained: str
    code: str
    status: tuple = ()
    options: tuple = ()  # pairs of name and value

    @property
    def program(self) -> str:
        return PRELUDE + self.code.strip('\n') + '\n'


NO_SIGNAL = 'the host process gets no signal'
BOUNDED = 'no more than twice the 32 MB can be held'
RETURNS = 'a result is returned, with the status of what happened, and nothing is left'
MEMORY = 'no more than the limit can be used'
REFUSED = 'the call is refused'
ERROR, KILLED, DISK = ('error',), ('killed',), ('disk',)

# name, code; each tries to have the host process {pid} signalled
SIGNALS = [
    ('kill', 'expect_refused(call("kill", {pid}, 15), call("kill", {pid}, 0))'),
    ('kill with high bits set', 'expect_refused(call("kill", {pid} | 1 << 32, 15))'),
    ('kill a process group', 'expect_refused(call("kill", -{pid}, 15), call("kill", 0, 15))'),
    ('kill everybody', 'expect_refused(call("kill", -1, 15), call("kill", 1, 15))'),
    ('tkill', 'expect_refused(call("tkill", {pid}, 15), call("tkill", os.getpid(), 0))'),
    ('tgkill', 'expect_refused(call("tgkill", {pid}, {pid}, 15))'),
    (
        'tgkill with the own group and a foreign thread',
        'expect_refused(call("tgkill", os.getpid(), {pid}, 15))',
    ),
    (
        'rt_sigqueueinfo',
        'i = ctypes.create_string_buffer(struct.pack("iii", 15, 0, -1), 128)\n'
        'expect_refused(call("rt_sigqueueinfo", {pid}, 15, i), '
        'call("rt_tgsigqueueinfo", {pid}, {pid}, 15, i))',
    ),
    (
        'a signal through a pidfd',
        'p = call("pidfd_open", {pid}, 0)\nexpect_refused(p)\n'
        'expect_refused(*[call("pidfd_send_signal", f, 15, None, 0) for f in range(64)])',
    ),
    (
        'F_SETOWN and O_ASYNC on a pipe',
        'r, w = os.pipe()\n'
        'a = c.fcntl(r, 8, {pid}), c.fcntl(r, 10, 15), c.fcntl(r, 4, 0x2000)\nos.write(w, b"x")\n'
        'expect_refused(*a)',
    ),
    (
        'F_SETOWN_EX on standard output',
        'e = struct.pack("ii", 1, {pid})\nexpect_refused(c.fcntl(1, 15, e), c.fcntl(1, 8, -{pid}))',
    ),
    (
        'F_SETFL with O_ASYNC among others and high bits',
        'r, w = os.pipe()\nexpect_refused(call("fcntl", r, 4 | 1 << 32, 0x2800), call("fcntl", r, 4, 0x2000))',
    ),
    (
        'a pair of sockets with an owner by ioctl',
        'import socket\na, b = socket.socketpair()\np = ctypes.byref(ctypes.c_int({pid}))\n'
        'one = ctypes.byref(ctypes.c_int(1))\n'
        'expect_refused(*[c.ioctl(a.fileno(), n, p) for n in (0x8901, 0x8902)], c.ioctl(a.fileno(), 0x5452, one))\n'
        'b.send(b"x")',
    ),
    (
        'directory notification (F_NOTIFY) and leases',
        'd = os.open(".", os.O_RDONLY)\nopen("f", "w")\nf = os.open("f", os.O_RDONLY)\n'
        'expect_refused(c.fcntl(d, 1026, 0x8000001f), c.fcntl(f, 1024, 1), c.fcntl(f, 10, 15))',
    ),
    (
        'a timer that signals a foreign thread',
        't = ctypes.c_int()\ne = ctypes.create_string_buffer(struct.pack("qiii", 0, 15, 4, {pid}), 64)\n'
        'expect_refused(call("timer_create", 1, e, ctypes.byref(t)))',
    ),
    (
        'a message queue that notifies',
        'q = call("mq_open", b"k2", 0o102, 0o600, None)\n'
        'e = ctypes.create_string_buffer(struct.pack("qii", 0, 15, 0), 64)\nexpect_refused(q, call("mq_notify", 3, e))',
    ),
    (
        'a CPU limit for the host',
        'l = struct.pack("QQ", 0, 0)\nexpect_refused(call("prlimit64", {pid}, 0, l, None), '
        'call("prlimit64", 0, 0, l, None), call("prlimit64", {pid}, 0, None, ctypes.create_string_buffer(16)))',
    ),
    (
        'a sibling whose end kills the parent',
        'f = 0x8000 | 9\nr = call("clone", f, 0, 0, 0, 0)\nif r == 0: os._exit(0)\nexpect_refused(r)',
    ),
    (
        'clone3 with an exit signal',
        'a = struct.pack("8Q", 0x8000, 0, 0, 0, 9, 0, 0, 0)\nr = call("clone3", a, 64)\n'
        'if r == 0: os._exit(0)\nexpect_refused(r)',
    ),
    (
        'the death signal of the parent',
        'expect_refused(*[call("prctl", 1, s, 0, 0, 0) for s in (0, 1, 15)], call("prctl", 36, 1, 0, 0, 0), '
        'call("prctl", 4, 0, 0, 0, 0))',
    ),
    (
        'the host\'s process group and session',
        'expect_refused(call("setpgid", 0, {pid}), call("setpgid", {pid}, 0), call("setpgid", 0, 0), call("setsid"))',
    ),
    (
        'terminal input and groups (TIOCSTI, TIOCSPGRP, TIOCSCTTY, TIOCLINUX)',
        'b = ctypes.create_string_buffer(b"\\x03", 8)\n'
        'for f in range(64):\n'
        '  expect_refused(*[c.ioctl(f, n, b) for n in (0x5412, 0x5410, 0x540E, 0x541C, 0x5422, 0x5423)])\n'
        'for p in ("/dev/tty", "/dev/console", "/dev/ptmx", "/dev/tty0"):\n'
        '  try: os.open(p, os.O_RDWR); print("ESC", p)\n'
        '  except OSError: pass',
    ),
    (
        'ptrace and foreign memory',
        'expect_refused(call("ptrace", 16, {pid}, 0, 0), call("ptrace", 0x4206, {pid}, 0, 0), call("ptrace", 0, 0, 0, 0), '
        'call("process_vm_writev", {pid}, None, 0, None, 0, 0), call("kcmp", {pid}, {pid}, 0, 0, 0), '
        'call("get_robust_list", {pid}, None, None))',
    ),
    (
        'from another thread, with a mask and a handler',
        'def go(): expect_refused(call("kill", {pid}, 15), c.fcntl(1, 8, {pid}))\n'
        'signal.signal(signal.SIGTERM, lambda *_: None)\nt = threading.Thread(target=go); t.start(); t.join()',
    ),
    (
        'priority, affinity and memory of the host',
        'm = struct.pack("Q", 1)\nexpect_refused(call("setpriority", 0, {pid}, 19), '
        'call("sched_setaffinity", {pid}, 8, m), call("process_madvise", 3, None, 0, 20, 0))',
    ),
]

# name, code, statuses; ESC where more than 64 MB are held at once
DISKS = [
    (
        'unlinked files that stay open',
        'k = []\nfor i in range(50):\n'
        '  f = open(f"f{i}", "wb"); os.unlink(f"f{i}"); k.append(f)\n'
        '  f.write(b"x" * 8 * MB); f.flush(); time.sleep(.02)\n'
        '  if i > 8: print("ESC", i)',
        ('disk',),
    ),
    (
        'unlinked, mapped and closed',
        'import mmap\nk = []\nfor i in range(50):\n'
        '  f = open(f"f{i}", "w+b"); f.truncate(8 * MB); m = mmap.mmap(f.fileno(), 8 * MB); f.close()\n'
        '  os.unlink(f"f{i}"); m[::4096] = b"x" * 2048; k.append(m); time.sleep(.02)\n'
        '  if i > 8: print("ESC", i)',
        ('disk',),
    ),
    (
        'a sparse file that is written by mapping',
        'import mmap\nk = []\nfor i in range(6):\n  f = open(f"f{i}", "w+b"); f.truncate(30 * MB)\n'
        '  m = mmap.mmap(f.fileno(), 30 * MB); m[::4096] = b"x" * 7680; k.append(m); time.sleep(.1)\n'
        'print("ESC")',
        ('disk',),
    ),
    (
        'preallocated files',
        'k = []\nfor i in range(40):\n'
        '  f = os.open(f"f{i}", os.O_CREAT | os.O_RDWR); k.append(f)\n'
        '  if call("fallocate", f, 0, 0, 30 * MB) == 0 and i > 2: print("ESC", i)',
        (),
    ),
    (
        'posix_fallocate',
        'for i in range(40):\n  f = os.open(f"f{i}", os.O_CREAT | os.O_RDWR); os.posix_fallocate(f, 0, 30 * MB); '
        'os.close(f); time.sleep(.06)\n'
        '  if i > 2: print("ESC", i)',
        ('disk',),
    ),
    (
        'memory files and shared memory of System V',
        'expect_refused(call("memfd_create", b"x", 0), call("memfd_secret", 0), call("shmget", 0, 64 * MB, 0o1600), '
        'call("msgget", 0, 0o1600), call("semget", 0, 4, 0o1600))',
        ('ok',),
    ),
    (
        'files without names (O_TMPFILE)',
        'k = []\nfor i in range(50):\n  f = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600); k.append(f)\n'
        '  os.write(f, b"x" * 8 * MB); time.sleep(.02)\n'
        '  if i > 8: print("ESC", i)',
        ('disk', 'error'),
    ),
    (
        'folders that cannot be read',
        'for i in range(20):\n  os.mkdir(f"d{i}"); f = open(f"d{i}/f", "wb"); f.write(b"x" * 8 * MB); f.flush()\n'
        '  os.rename(f"d{i}", f"e{i}"); os.umask(0o777); os.mkdir(f"n{i}"); os.umask(0o022); time.sleep(.02)\n'
        '  if i > 8: print("ESC", i)',
        ('disk',),
    ),
    (
        'unreadable folders around the files',
        'os.mkdir("d", 0o300)\nfor i in range(20):\n  f = open(f"d/f{i}", "wb"); f.write(b"x" * 8 * MB); f.flush()\n'
        '  time.sleep(.02)\n  if i > 8: print("ESC", i)',
        ('disk',),
    ),
    (
        'inodes by empty files',
        'for i in range(200000):\n  os.close(os.open(f"f{i}", os.O_CREAT | os.O_WRONLY))\nprint("ESC")',
        ('disk',),
    ),
    ('inodes by folders', 'for i in range(200000): os.mkdir(f"d{i}")\nprint("ESC")', ('disk',)),
    (
        'inodes by symbolic links of 4,000 bytes',
        'for i in range(200000): os.symlink("x" * 4000, f"s{i}")\nprint("ESC")',
        ('disk',),
    ),
    (
        'a million hard links',
        'open("a", "w")\nfor i in range(200000): os.link("a", f"l{i}" + "x" * 200)\nprint("ESC")',
        ('disk', 'error'),
    ),
    (
        'folders in folders, each with a file',
        'for i in range(3000):\n  os.mkdir("d"); open("f", "w").write("x" * 4096); os.chdir("d")\nprint("ESC")',
        ('disk',),
    ),
    (
        '/dev/shm, /tmp and the root',
        'for p in ("/dev/shm/zz", "/tmp/zz", "/var/tmp/zz", "/zz", "/dev/zz", "../zz", "/run/zz", "/proc/zz"):\n'
        '  try: open(p, "w"); print("ESC", p)\n'
        '  except OSError: pass\n'
        '  try: os.mkdir(p); print("ESC", p)\n'
        '  except OSError: pass',
        ('ok',),
    ),
    (
        'extended attributes',
        'open("f", "w")\nexpect_refused(*[call("setxattr", b"f", b"user.%d" % i, b"x" * 60000, 60000, 0) for i in range(9)])',
        ('ok',),
    ),
    (
        'copies inside the kernel',
        'open("a", "wb").write(b"x" * 8 * MB)\na = os.open("a", os.O_RDONLY)\nfor i in range(50):\n'
        '  b = os.open(f"b{i}", os.O_CREAT | os.O_WRONLY)\n'
        '  os.sendfile(b, a, 0, 8 * MB); os.close(b); time.sleep(.02)\n'
        '  if i > 8: print("ESC", i)',
        ('disk',),
    ),
    (
        'copy_file_range, splice, vmsplice, tee',
        'open("a", "wb").write(b"x" * 4096)\na = os.open("a", os.O_RDWR)\nr, w = os.pipe()\n'
        'expect_refused(call("copy_file_range", a, 0, a, 0, 4096, 0), call("splice", a, 0, w, 0, 4096, 0), '
        'call("tee", r, w, 4096, 0), call("vmsplice", w, None, 0, 0))',
        ('ok',),
    ),
    (
        'file locks without end',
        'f = os.open("a", os.O_CREAT | os.O_RDWR)\nfor i in range(200000):\n'
        '  fcntl.fcntl(f, 6, struct.pack("hhqqi", 1, 0, 2 * i, 1, 0))\n'
        'l = fcntl.fcntl(f, 5, struct.pack("hhqqi", 1, 0, 0, 0, 0))\nprint("ESC" if struct.unpack("hhqqi", l)[0] != 2 else "none")',
        ('ok',),
    ),
    (
        'pipes of a megabyte',
        'k = [os.pipe() for _ in range(20)]\nexpect_refused(*[c.fcntl(w, 1031, MB) for _, w in k])',
        ('ok',),
    ),
    (
        'sync and swap of the host',
        'expect_refused(call("swapon", b"f", 0), call("mount", b"none", b".", b"tmpfs", 0, None), '
        'call("inotify_init1", 0), call("fanotify_init", 0, 0), call("keyctl", 0, -3, 1), '
        'call("add_key", b"user", b"k", b"x", 1, -3))\nr = call("sync")\nprint("ESC" if r == 0 else "")',
        ('ok',),
    ),
]

# name, code, statuses
HOSTS = [
    (
        'a tower of folders that no path reaches',
        'try:\n  for i in range(900): os.mkdir("d" * 200); os.chdir("d" * 200)\n'
        'except OSError: pass\nprint("end")',
        ('ok', 'disk'),
    ),
    (
        'names of all bytes',
        'for b in range(1, 256):\n  if b != 47: open(bytes([b]) * 3, "w")\n'
        'open(b"\\xff" * 255, "w"); open(b"a\\nb\\r\\x1b[2J", "w"); os.mkdir(b"\\xc3("); print("end")',
        ('ok',),
    ),
    (
        'no rights on anything',
        'os.umask(0o777)\nos.mkdir("a"); os.close(os.open("f", os.O_CREAT, 0))\nos.umask(0)\n'
        'os.mkdir("b"); os.mkdir("b/c"); open("b/c/f", "w"); os.mkdir("b/d", 0)\nprint("end")',
        ('ok', 'disk'),
    ),
    (
        'a work folder without rights',
        'try: os.chmod(".", 0)\nexcept OSError: pass\nprint("end")',
        ('ok',),
    ),
    (
        'FIFOs, sockets and devices',
        'expect_refused(call("mknodat", -100, b"f", stat.S_IFIFO | 0o600, 0), call("mknodat", -100, b"s", stat.S_IFSOCK, 0), '
        'call("mknodat", -100, b"d", stat.S_IFCHR | 0o666, 0x103))',
        ('ok',),
    ),
    (
        'symbolic links out, in circles, and over the work folder',
        'os.symlink("{folder}", "out"); os.symlink("loop", "loop"); os.symlink("/", "root")\n'
        'w = os.getcwd()\ntry: os.rmdir(w); os.symlink("{folder}", w); print("ESC")\n'
        'except OSError: pass',
        ('ok',),
    ),
    (
        'the work folder moved away',
        'w = os.getcwd()\nfor to in ("../moved", "/tmp/moved", "{folder}/moved"):\n'
        '  try: os.rename(w, to); print("ESC")\n'
        '  except OSError: pass',
        ('ok',),
    ),
    (
        'a forged report of success',
        'for f in range(3, 64):\n  for t in (b"locked\\n", b"ok\\n", b"0 ok\\n"):\n'
        '    try: os.write(f, t)\n    except OSError: pass\nraise ValueError',
        ERROR,
    ),
    (
        'a forged report with the true key',
        'f = sys._getframe()\nwhile not isinstance(f.f_locals.get("call"), dict): f = f.f_back\n'
        'key = f.f_locals["call"]["key"]\n'
        'for d in range(3, 64):\n  try: os.write(d, (key + " ok\\n").encode())\n  except OSError: pass\nos._exit(7)',
        ERROR,
    ),
    (
        'a megabyte of nested brackets as report',
        'for f in range(3, 64):\n  try: os.set_blocking(f, False); os.write(f, b"[" * 65536)\n  except OSError: pass',
        ('ok', 'output'),
    ),
    (
        'endless report',
        'def flood(f):\n  try:\n    while True: os.write(f, b"x" * 4096)\n  except OSError: pass\n'
        'for f in range(3, 64): threading.Thread(target=flood, args=(f,), daemon=True).start()\ntime.sleep(9)',
        ('output', 'timeout'),
    ),
    (
        'a verdict of its own',
        'for f in range(3, 64):\n  try: os.write(f, b\'{"over": "", "signal": 0, "exit": 0, "seconds": 0}\')\n'
        '  except OSError: pass\nos._exit(5)',
        ERROR,
    ),
    ('closed descriptors', 'os.closerange(0, 64)\nos._exit(0)', ('ok',)),
    (
        'descriptors put over others',
        'r, w = os.pipe()\nfor f in range(3, 60):\n  try: os.dup2(w, f)\n  except OSError: pass\nprint("end")',
        (),
    ),
    ('an exit code like that of a signal', 'sys.exit(137)', ERROR),
    ('an exit code like that of too much memory', 'os._exit(3)', ERROR),
    ('an exit code like that of too much time', 'os._exit(128 + 24)', ERROR),
    ('an error, then a good end', 'import atexit\natexit.register(os._exit, 0)\n1/0', ERROR),
    ('a good end that fails', 'import atexit\natexit.register(os._exit, 1)', ERROR),
    ('a signal to itself', 'os.kill(os.getpid(), signal.SIGKILL)', KILLED),
    ('abort', 'os.abort()', KILLED),
    ('a bus error of its own', 'os.kill(os.getpid(), signal.SIGBUS)', KILLED),
    (
        'an exception that cannot be printed',
        'class E(Exception):\n  def __str__(s): raise MemoryError\n  __repr__ = __str__\nraise E',
        ERROR,
    ),
    (
        'an exception whose text never ends',
        'class E(Exception):\n  def __str__(s): return "x" * 10**7\nraise E',
        ('output',),
    ),
    (
        'an exit with a strange code',
        'class C(int):\n  def __eq__(s, o): raise KeyboardInterrupt\n  __str__ = __repr__ = __eq__\nsys.exit(C(0))',
        ERROR,
    ),
    (
        'streams that raise',
        'class S:\n  def write(s, *a): raise SystemError\n  flush = write\nsys.stdout = sys.stderr = S()\n1/0',
        ERROR,
    ),
    (
        'builtins and modules torn out',
        'import builtins\nfor m in list(sys.modules): sys.modules[m] = None\nbuiltins.print = builtins.open = None\n1/0',
        ERROR,
    ),
    ('interrupted by itself', 'signal.raise_signal(signal.SIGINT)', ERROR),
    (
        'lone surrogates and separators in an error',
        'raise ValueError("\\ud800 \\u2028 \\u2029 \\x85 \\x0b \\x0c \\x1c \\x1d \\x1e \\udfff")',
        ERROR,
    ),
    ('a deep expression', 'eval("-" * 100000 + "1")', ('error', 'memory')),
    (
        'another filter over the first one',
        'p = ctypes.create_string_buffer(struct.pack("HHIQ", 0, 0, 0, 0))\n'
        'expect_refused(call("seccomp", 1, 8, p), call("prctl", 22, 2, p, 0, 0), call("landlock_restrict_self", 3, 0))',
        ('ok',),
    ),
    (
        'the 32-bit way into the kernel',
        'import mmap\nif column: os.kill(os.getpid(), 9)\n'
        'm = mmap.mmap(-1, 4096, prot=7)\nm.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")\n'
        'f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\nprint("ESC", f())',
        KILLED,
    ),
    (
        'the x32 numbers',
        'if column: os.kill(os.getpid(), 9)\nprint("ESC", c.syscall(ctypes.c_long(0x40000000 | 39)))',
        KILLED,
    ),
    (
        'rights of the host\'s null device',
        'for f in (os.open("/dev/null", os.O_RDWR), 0):\n'
        '  for go in (lambda: os.fchmod(f, 0o600), lambda: os.fchown(f, os.getuid(), os.getgid()), lambda: os.utime(f, (1, 1))):\n'
        '    try: go(); print("ESC")\n'
        '    except OSError: pass',
        ('ok',),
    ),
    (
        'files of the host through the descriptors of the start',
        'for f in range(64):\n  try: d = os.open("{canary}", os.O_RDONLY, dir_fd=f); print("ESC", f)\n  except OSError: pass\n'
        'for f in range(64):\n  try: os.fchdir(f); print("ESC" if os.path.exists("self/status") else "")\n  except OSError: pass',
        ('ok',),
    ),
    (
        'new users and namespaces',
        'expect_refused(*[call("unshare", f) for f in (0x10000000, 0x20000, 0x40000000, 0x8000000)], call("setns", 3, 0), '
        'call("setuid", 1), call("open_tree", -100, b"/", 1), call("sethostname", b"x", 1), call("personality", 0x40000))',
        ('ok',),
    ),
    (
        'handles, keys, programs of the kernel',
        'b = ctypes.create_string_buffer(128)\nexpect_refused(call("open_by_handle_at", 3, b, 0), '
        'call("name_to_handle_at", -100, b"/", b, b, 0), call("bpf", 0, b, 128), call("userfaultfd", 1), '
        'call("perf_event_open", b, 0, -1, -1, 0), call("io_uring_setup", 4, b), call("adjtimex", b), call("flock", 1, 2))',
        ('ok',),
    ),
    (
        'a program, by all calls that start one',
        'import subprocess\nfor go in (lambda: os.execv("/usr/bin/true", ["t"]), os.fork, os.forkpty, lambda: os.system("true") and 1/0,\n'
        '    lambda: subprocess.run(["/usr/bin/true"]), lambda: os.posix_spawn("/usr/bin/true", ["t"], {})):\n'
        '  try: go(); print("ESC")\n'
        '  except (OSError, ZeroDivisionError): pass',
        ('ok',),
    ),
    (
        'descriptors sent through a pair',
        'import socket\na, b = socket.socketpair()\ntry: socket.send_fds(a, [b"x"], [1]); print("ESC")\n'
        'except OSError: pass\n'
        'try: a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24); print("ESC")\n'
        'except OSError: pass',
        ('ok',),
    ),
    (
        'sockets of all families',
        'expect_refused(*[call("socket", f, t, 0) for f in (1, 2, 10, 16, 17, 38, 40) for t in (1, 2, 3)])',
        ('ok',),
    ),
]

# name, code, statuses
MEMORIES = [
    (
        'threads with small stacks',
        'threading.stack_size(32768)\nn = 0\nwhile n < 6000:\n  threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); n += 1\n'
        'print("ESC")',
        ('memory', 'error'),
    ),
    (
        'threads that start threads',
        'threading.stack_size(65536)\ndef go():\n  while True:\n    try: threading.Thread(target=go, daemon=True).start()\n'
        '    except RuntimeError: time.sleep(.01)\ngo()',
        ('memory', 'timeout', 'killed'),
    ),
    (
        'anonymous shared memory',
        'import mmap\nk = []\nfor i in range(64): m = mmap.mmap(-1, 8 * MB); m[::4096] = b"x" * 2048; k.append(m)\nprint("ESC")',
        ('memory', 'error'),
    ),
    (
        'mappings that reserve nothing',
        'c.mmap.restype = ctypes.c_void_p\nn = sum((c.mmap(None, ctypes.c_size_t(8 * MB), 3, 0x4022, -1, ctypes.c_long(0)) or 0) '
        '!= ctypes.c_void_p(-1).value for _ in range(100))\nif n > 32: print("ESC", n)',
        ('ok',),
    ),
    (
        'mappings of a file, larger than the memory',
        'import mmap\nf = open("f", "w+b"); f.truncate(30 * MB)\nk = [mmap.mmap(f.fileno(), 30 * MB) for _ in range(20)]\nprint("ESC")',
        ('memory', 'error'),
    ),
    (
        'children that have memory of their own',
        'for i in range(50):\n  if call("clone", 17, 0, 0, 0, 0) >= 0: print("ESC")',
        ('ok',),
    ),
    ('a limit raised again', 'import resource\ntry: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print("ESC")\nexcept (OSError, ValueError): pass', ('ok',)),
    ('locked memory', 'expect_refused(call("mlockall", 3), call("io_setup", 1000, ctypes.create_string_buffer(8)))', ('ok',)),
    ('a list without end', 'k = []\nwhile True: k.append(bytearray(MB))', ('memory',)),
    ('one large array, and on', 'try: bytearray(1 << 40)\nexcept MemoryError: print("refused")', ('ok',)),
]


def attacks() -> list[Attack]:
    "All attacks."
    few = (('timeout', 4),)
    return [
        *(Attack('signal', n, NO_SIGNAL, code, ('ok', 'error'), few) for n, code in SIGNALS),
        *(Attack('disk', n, BOUNDED, code, status, (('timeout', 12),)) for n, code, status in DISKS),
        *(Attack('host', n, RETURNS, code, status, few) for n, code, status in HOSTS),
        *(Attack('memory', n, MEMORY, code, status, few) for n, code, status in MEMORIES),
    ]
