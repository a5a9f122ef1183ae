"The attacks of `sandbox_attacks.py`, at every version of Landlock, with each kind of walls, as root and as another."

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sandbox_attacks import attacks
from sandbox_host import has_walls, not_contained, put_up

from k2lab.tasks import sandbox

ROOT = Path(__file__).parents[1]
LIBC = ctypes.CDLL(None, use_errno=True)
WHY = sandbox.why_not()
jailed = pytest.mark.skipif(bool(WHY), reason=WHY)
FIRST = [('bare', 3), ('namespaces', 3)]
OTHERS = [('bare', n) for n in (4, 5, 6, 7)] + [('bwrap', 3), ('both', 3)]
CAPS = FIRST + [pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS]


@jailed
@pytest.mark.parametrize('walls,landlock', CAPS)
def test_all_attacks_are_contained(walls, landlock):
    "Locks alone hold at every version of Landlock; with walls at the weakest."
    if not has_walls(walls):
        pytest.skip(f'no {walls} here')
    with put_up(walls, landlock):
        if sandbox.why_not():
            pytest.skip(sandbox.why_not())
        assert sandbox.offered() == min(landlock, sandbox.landlock_version(LIBC))
        assert not not_contained(attacks())


def interpreter_of(user: int) -> str:
    "A Python that another user can start and that finds this package, or an empty string."
    for program in (sys.executable, '/usr/bin/python3'):
        command = [program, '-c', 'import k2lab.tasks.sandbox']
        try:
            if not subprocess.run(command, user=user, capture_output=True, cwd=ROOT).returncode:
                return program
        except OSError:
            continue
    return ''


@jailed
@pytest.mark.parametrize('walls,landlock', [('bare', 3), ('namespaces', 3), ('bwrap', 3)])
@pytest.mark.slow
def test_all_attacks_are_contained_of_a_plain_user(walls, landlock):
    if os.getuid():
        pytest.skip('this user is a plain one: the test above was it')
    program = interpreter_of(65534)
    if not program:
        pytest.skip('no Python that user 65534 can start')
    command = [program, str(ROOT / 'tests' / 'sandbox_host.py'), walls, str(landlock)]
    plain = dict(user=65534, group=65534, extra_groups=[], cwd='/')
    done = subprocess.run(command, capture_output=True, text=True, **plain)
    if done.returncode == 2:
        pytest.skip(done.stdout)
    assert done.stdout == f'{len(attacks())} of {len(attacks())} contained\n', done


def test_the_attacks_are_data():
    names = [(a.group, a.name) for a in attacks()]
    assert len(names) == len(set(names)) >= 80
    assert all('ESC' in a.program or 'expect_refused' in a.program or a.status for a in attacks())
    for attack in attacks():
        compile(attack.program, attack.name, 'exec')
