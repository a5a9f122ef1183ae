"""Measurements with a peer beside them, interleaved in one run: `python -m k2lab.bench NAME`."""

import sys
from k2lab.lab.config import LabError, one_of
from k2lab.bench.corpus import chain, corpus, shards
from k2lab.bench.privacy import privacy
from k2lab.bench.quality import quality
from k2lab.bench.runner import run
from k2lab.bench.tokens import tokens
from k2lab.bench.training import train


BENCHES = {
    'run': run,
    'train': train,
    'corpus': corpus,
    'shards': shards,
    'privacy': privacy,
    'quality': quality,
    'tokens': tokens,
    'chain': chain,
}


if __name__ == '__main__':
    try:
        BENCHES[one_of('bench', sys.argv[1] if len(sys.argv) > 1 else '', BENCHES)](*sys.argv[2:])
    except LabError as e:
        sys.exit(f'k2lab.bench: {e}')
