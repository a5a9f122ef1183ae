"""Attacks on the sandbox, read from `data/sandbox_attacks.txt`, and what it means that one is contained.

Every program prints ESC when it got what it tried for. An attack is contained when ESC and CANARY are not
printed, the status is one of `status` (any, if there are none), and the host is as before: the process
`{pid}` got no signal, `{folder}` and its file `{canary}` are unchanged, and nothing of the child is left.

`call(NAME, ...)` makes a system call and gives what it returned: below 0 where it was refused."""

from dataclasses import dataclass
from pathlib import Path

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
    "A program, what it means that it is contained, the statuses that say so, and its seconds."

    group: str
    name: str
    contained: str
    code: str
    status: tuple
    seconds: float

    @property
    def program(self) -> str:
        return PRELUDE + self.code.strip('\n') + '\n'


# What it means that an attack of a group is contained, and for how many seconds it may run.
GROUPS = {
    'signal': ('the host process gets no signal', 4),
    'disk': ('no more than twice the 32 MB can be held', 12),
    'host': ('a result with the right status is returned, and nothing is harmed or left', 4),
    'memory': ('no more than the limit can be used', 12),
}
TEXT = Path(__file__).parent / 'data' / 'sandbox_attacks.txt'


def attacks() -> list[Attack]:
    "All attacks of the file: a line `#### group | name | statuses` before each program."
    found = []
    for block in TEXT.read_text().split('#### ')[1:]:
        title, _, code = block.partition('\n')
        group, name, status = title.split(' | ')
        contained, seconds = GROUPS[group]
        statuses = () if status == 'any' else tuple(status.split(', '))
        found.append(Attack(group, name, contained, code, statuses, seconds))
    return found
