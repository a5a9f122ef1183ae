"""Measurements with a peer beside them, interleaved in one run: `python -m k2lab.bench NAME`."""

import argparse
import inspect
import math
import sys
from collections.abc import Callable
from typing import NoReturn

from k2lab.bench.chain import chain
from k2lab.bench.corpus import corpus
from k2lab.bench.plan import plan
from k2lab.bench.privacy import privacy
from k2lab.bench.quality import quality
from k2lab.bench.readers import shards
from k2lab.bench.runner import run
from k2lab.bench.scores import scores
from k2lab.bench.sharded import sharded
from k2lab.bench.tokens import tokens
from k2lab.bench.training import train
from k2lab.bench.volume import volume
from k2lab.lab.config import LabError, did_you_mean

BENCHMARKS: dict[str, tuple[Callable, str]] = {
    'run': (run, 'what the runner adds to a bare `accelerate launch`'),
    'train': (train, 'SFT and DPO against plain TRL scripts'),
    'corpus': (corpus, 'duplicates and decontamination against other tools'),
    'shards': (shards, 'reading and writing JSONL against datatrove'),
    'privacy': (privacy, 'redaction of private data against plain `re` and datatrove'),
    'quality': (quality, "quality rules against datatrove's filters"),
    'tokens': (tokens, 'the encoder against tokenizers and tiktoken'),
    'scores': (scores, "the lab's questions asked by lm-eval, beside the lab's own score"),
    'sharded': (sharded, 'the memory of two processes that train a model together'),
    'plan': (plan, "the plan's memory against what processes take"),
    'chain': (chain, 'from JSON lines to tokens against datatrove'),
    'volume': (volume, 'time and memory of prepare_corpus on a corpus of any size'),
}


def megabytes(text: str) -> float:
    "A positive size; `ArgumentTypeError` for anything else."
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if 0 < size < math.inf:
        return size
    raise argparse.ArgumentTypeError(f"expected a number above 0, such as 20, not '{text}'")


def rounds(text: str) -> int:
    "A positive number of rounds; `ArgumentTypeError` for anything else."
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number above 0, such as 3, not '{text}'")


OPTIONS = {
    'campaign': (str, 'campaign in which a demo was run'),
    'megabytes': (megabytes, 'size of the measured texts'),
    'cases': (str, 'only the cases with this in their names'),
    'rounds': (rounds, 'how often each side is measured, in turns'),
}


class Parser(argparse.ArgumentParser):
    "A parser that raises a `LabError` of one line, with the usage in it, instead of exiting."

    def error(self, message: str) -> NoReturn:
        "Raise the message as a `LabError`."
        raise LabError(f'{message}; {" ".join(self.format_usage().split())}')


def parser_of(name: str) -> Parser:
    "The parser of one benchmark: each argument of its function is an optional positional."
    function, summary = BENCHMARKS[name]
    parser = Parser(
        f'python -m k2lab.bench {name}',
        description=f'Measure {summary}.',
        allow_abbrev=False,
    )
    for key, argument in inspect.signature(function).parameters.items():
        kind, meaning = OPTIONS[key]
        text = f'{meaning} (default: {argument.default})'
        parser.add_argument(key, nargs='?', type=kind, default=argument.default, help=text)
    return parser


def usage() -> str:
    "What `python -m k2lab.bench --help` prints."
    lines = [f'  {name:8} {summary}' for name, (_, summary) in BENCHMARKS.items()]
    return '\n'.join(
        [
            'usage: python -m k2lab.bench NAME [ARGUMENT ...]',
            '       python -m k2lab.bench NAME --help',
            '',
            'benchmarks:',
            *lines,
            '',
            'Other tools are measured if $K2LAB_PEERS names Python interpreters that have them.',
        ]
    )


def request(words: list[str]) -> tuple[Callable, dict]:
    "The benchmark that a command line asks for, and its arguments; `LabError` if it is wrong."
    valid = ', '.join(BENCHMARKS)
    if not words:
        raise LabError(f'no benchmark named; valid: {valid}')
    name = words[0]
    if name not in BENCHMARKS:
        raise LabError(
            f"unknown benchmark '{name}'{did_you_mean(name, BENCHMARKS)}; valid: {valid}"
        )
    return BENCHMARKS[name][0], vars(parser_of(name).parse_args(words[1:]))


def main(words: list[str]) -> int:
    "Run one benchmark; 0 if it was done, 1 if it failed, 2 for a mistake in the command line."
    if words[:1] in (['-h'], ['--help'], ['help']):
        print(usage())
        return 0
    code = 2
    try:
        benchmark, arguments = request(words)
        code = 1
        benchmark(**arguments)
    except LabError as e:
        print(f'k2lab.bench: {e}', file=sys.stderr)
        return code
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
