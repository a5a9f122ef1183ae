"""The host of the attacks on the sandbox: a process that must get no signal, a folder that must stay as it is.

`python tests/sandbox_host.py [WALLS [LANDLOCK [WORDS OF A NAME]]]` runs the attacks and prints what is
not contained; it needs nothing but Python, so that it also runs as another user."""

import contextlib
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from sandbox_attacks import Attack, attacks  # noqa: E402

from k2lab.tasks import sandbox  # noqa: E402

# bubblewrap around it, namespaces of its own
WALLS = {
    'bare': (False, False),
    'namespaces': (False, True),
    'bwrap': (True, False),
    'both': (True, True),
}
VICTIM = """
import signal, sys
everything = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
signal.pthread_sigmask(signal.SIG_BLOCK, everything)
print('ready', flush=True)
while True:
    print(signal.sigwait(everything), flush=True)
"""


def has_walls(walls: str) -> bool:
    "Whether this machine offers these walls."
    bwrap, own = WALLS[walls]
    return (not bwrap or sandbox.has_bwrap()) and (not own or sandbox.has_namespaces(bwrap))


@contextlib.contextmanager
def put_up(walls: str, landlock: int | None = None):
    "Let the sandbox use these walls, and Landlock up to this version."
    names = ('has_bwrap', 'has_namespaces', 'landlock_version')
    before = {name: getattr(sandbox, name) for name in names}
    bwrap, own = WALLS[walls]
    sandbox.has_bwrap, sandbox.has_namespaces = lambda: bwrap, lambda bwrap=False: own
    if landlock:
        real = before['landlock_version']
        sandbox.landlock_version = lambda libc: min(landlock, real(libc))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(sandbox, name, value)


class Host:
    "A process and a folder that attacks are aimed at."

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix='canary-'))
        self.canary = self.folder / 'canary.txt'
        self.canary.write_text('CANARY-7431\n')
        self.canary.chmod(0o640)
        self.victim = subprocess.Popen(
            [sys.executable, '-I', '-c', VICTIM], stdout=subprocess.PIPE, start_new_session=True
        )
        assert self.victim.stdout.readline() == b'ready\n'
        os.set_blocking(self.victim.stdout.fileno(), False)
        self.state = self.look()

    def look(self) -> list:
        "What must not change: the files with their modes and times, the victim's priority and limits."
        paths = (self.folder, self.canary, Path('/dev/null'))
        pid = self.victim.pid
        files = [(s.st_mode, s.st_uid, s.st_nlink) for s in map(os.stat, paths)]
        limits = Path(f'/proc/{pid}/limits').read_text() if self.victim.poll() is None else 'dead'
        return [
            files,
            sorted(os.listdir(self.folder)),
            self.canary.read_text(),
            limits,
            os.getpgid(pid),
        ]

    def harm(self) -> str:
        "What an attack has done, or an empty string."
        if self.victim.poll() is not None:
            return f'the process ended: {self.victim.returncode}'
        if got := self.victim.stdout.read():
            return f'the process got {got}'
        return '' if self.look() == self.state else f'changed: {self.look()}'

    def close(self):
        self.victim.kill()
        self.victim.communicate()
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()

    def run(self, attack: Attack) -> str:
        "Why an attack is not contained, or an empty string."
        code = attack.program
        for name, value in (
            ('pid', self.victim.pid),
            ('canary', self.canary),
            ('folder', self.folder),
        ):
            code = code.replace('{%s}' % name, str(value))
        try:
            got = sandbox.run_python(code, timeout=attack.seconds)
        except Exception as e:
            return f'{type(e).__name__}: {e}'
        if any(word in got['stdout'] for word in ('ESC', 'CANARY')):
            return f'escaped: {got}'
        if attack.status and got['status'] not in attack.status:
            return f'{got["status"]}, not {" or ".join(attack.status)}: {got}'
        return self.harm()


def not_contained(chosen: list[Attack], workers: int = 3) -> dict[str, str]:
    "The attacks that are not contained, each with the reason; three run at a time."
    host = Host()
    try:
        with ThreadPoolExecutor(workers) as pool:
            reasons = list(pool.map(host.run, chosen))
    finally:
        host.close()
    return {f'{a.group}: {a.name}': why for a, why in zip(chosen, reasons, strict=True) if why}


def main(walls: str = 'bare', landlock: str = '7', *words: str) -> int:
    "Run the attacks whose names hold one of the words, print what is not contained, and count."
    chosen = [a for a in attacks() if not words or any(w in f"{a.group}: {a.name}" for w in words)]
    if not has_walls(walls):
        print(f'no {walls} here')
        return 2
    with put_up(walls, int(landlock)):
        failed = not_contained(chosen)
    for name, why in failed.items():
        print(name, '|', why[:600])
    print(len(chosen) - len(failed), 'of', len(chosen), 'contained')
    return bool(failed)


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
