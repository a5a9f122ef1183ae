"""The command line of the benchmarks: a mistake is one line, and the help lists what is valid."""

import inspect
import random
import re
import subprocess
import sys

import pytest

from k2lab.bench import __main__ as bench
from k2lab.bench.privacy import filled, sample_letters

USAGE = 'usage: python -m k2lab.bench corpus [-h] [megabytes] [rounds]'


def test_the_command_line_starts():
    command = [sys.executable, '-m', 'k2lab.bench']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
    assert 'no benchmark named; valid: run, train, corpus, shards' in done.stderr


@pytest.mark.parametrize(
    'words, line',
    [
        ([], 'no benchmark named; valid: run, train, corpus'),
        ([''], "unknown benchmark ''; valid: run, train"),
        (['corpsu'], "unknown benchmark 'corpsu' (did you mean 'corpus'?); valid: run, train"),
        (['train', 'x'], "rounds: expected a whole number above 0, such as 3, not 'x'"),
        (['train', '0'], "expected a whole number above 0, such as 3, not '0'"),
        (['run', '2.5'], "expected a whole number above 0, such as 3, not '2.5'"),
        (['run', '²'], "expected a whole number above 0, such as 3, not '²'"),
        (['corpus', 'twenty'], "megabytes: expected a number above 0, such as 20, not 'twenty'"),
        (['corpus', 'nan'], "expected a number above 0, such as 20, not 'nan'"),
        (['corpus', 'inf'], "expected a number above 0, such as 20, not 'inf'"),
        (['corpus', '-3'], "expected a number above 0, such as 20, not '-3'"),
        (['corpus', '20', '3', '4'], f'unrecognized arguments: 4; {USAGE}'),
        (['corpus', '--size', '3'], f'unrecognized arguments: --size; {USAGE}'),
    ],
)
def test_mistakes_are_one_line(words, line, capsys):
    assert bench.main(words) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('k2lab.bench: ') and err.count('\n') == 1
    assert line in err


def test_help_lists_the_benchmarks(capsys):
    assert bench.main(['--help']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if re.match(r'  \w', line)] == list(bench.BENCHMARKS)
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize('name', bench.BENCHMARKS)
def test_help_of_a_benchmark_lists_its_arguments(name, capsys):
    with pytest.raises(SystemExit) as e:
        bench.main([name, '--help'])
    text = capsys.readouterr().out
    asked = inspect.signature(bench.BENCHMARKS[name][0]).parameters
    assert e.value.code == 0 and asked and all(key in text for key in asked) and 'default: ' in text


@pytest.mark.parametrize(
    'words, arguments',
    [
        (['run'], dict(rounds=5)),
        (['train', '2'], dict(rounds=2)),
        (['shards'], dict(megabytes=60, rounds=3)),
        (['chain', '0.5', '1'], dict(megabytes=0.5, rounds=1)),
    ],
)
def test_arguments_arrive_as_numbers(words, arguments):
    assert bench.request(words) == (bench.BENCHMARKS[words[0]][0], arguments)


def test_a_failed_benchmark_is_one_line(monkeypatch, capsys):
    def fails(rounds: int = 5):
        raise bench.LabError('accelerate launch ended with code 1')

    monkeypatch.setitem(bench.BENCHMARKS, 'run', (fails, 'nothing'))
    assert bench.main(['run']) == 1
    assert capsys.readouterr().err == 'k2lab.bench: accelerate launch ended with code 1\n'


def test_templates_of_private_values():
    rng = random.Random(0)
    assert filled('a-<area>-<7:8>', rng, area='23') == 'a-23-7'
    number, word = filled('<digit*4> <hex*3>', rng).split()
    assert number.isdigit() and len(number) == 4
    assert len(word) == 3 and set(word) <= set('0123456789abcdef')


def test_private_parts_are_where_they_are_said_to_be():
    for text, parts in sample_letters(20, 1):
        for start, end, kind in parts:
            value = text.encode()[start:end].decode()
            assert value and ('@' in value) == (kind == 'EMAIL')
