"""Quality rules against datatrove's filters: `python -m k2lab.bench quality`."""

import tempfile
from collections.abc import Callable

from k2lab.bench.harness import (
    Timing,
    as_jsonl,
    by_peer,
    cpu_seconds,
    installed_texts,
    megabytes_of,
    print_peers,
    speed,
)

WEB_PEERS, C4_PEERS = ('datatrove_quality', 'datatrove_quality_split'), ('datatrove_c4',)


def without_kernels(work: Callable):
    "What a call returns without compiled kernels, so that the versions in plain Python run."
    from k2lab.corpus import signals

    real, signals.compiled = signals.compiled, lambda kernel: None
    try:
        return work()
    finally:
        signals.compiled = real


def web_rules(column) -> list[int]:
    "Numbers of the texts that pass the rules of Gopher and FineWeb."
    import numpy as np

    from k2lab.corpus.quality import FINEWEB, GOPHER, broken, signals

    values = signals(column)
    passed = (broken(values, GOPHER)[0] < 0) & (broken(values, FINEWEB)[0] < 0)
    return np.flatnonzero(passed).tolist()


def print_decisions(table, size: float) -> list[int]:
    "Print how many texts pass each set of rules, with and without kernels; returns `web_rules`."
    from k2lab.corpus.quality import c4_lines, drop_poor

    kept, pages, domain = web_rules(table['text']), c4_lines(table), drop_poor(table)
    same = [
        kept == without_kernels(lambda: web_rules(table['text'])),
        pages[0].equals(without_kernels(lambda: c4_lines(table))[0]),
        domain[1] == without_kernels(lambda: drop_poor(table)[1]),
    ]
    print(
        f'{size:.1f} MB, {len(table)} texts: {len(kept)} pass the rules of Gopher and FineWeb, '
        f'{len(pages[0])} those of C4, {len(domain[0])} those for a domain; '
        f'the same without kernels: {same}',
        flush=True,
    )
    return kept


def timed_round(table, path: str) -> dict[str, Timing]:
    "One measurement of our two sets of rules and of each peer."
    from k2lab.corpus.quality import c4_lines

    ours: dict[str, Timing] = {
        'Gopher and FineWeb': (cpu_seconds(lambda: web_rules(table['text'])), None),
        'C4': (cpu_seconds(lambda: c4_lines(table)), None),
    }
    return ours | {peer: by_peer(peer, path) for peer in WEB_PEERS + C4_PEERS}


def print_speeds(times: list[dict[str, Timing]], size: float):
    "Print our speed and that of the peers."
    for rules, peers in {'Gopher and FineWeb': WEB_PEERS, 'C4': C4_PEERS}.items():
        ours = [one[rules][0] or 0 for one in times]
        print(f'{rules}: {speed(size, ours)}')
        print_peers(ours, {peer: [one[peer] for one in times] for peer in peers})


def quality(megabytes: float = 20, rounds: int = 3):
    "Print the speed of `k2lab.corpus.quality` on one core against datatrove's filters, and how often decisions differ."
    import pyarrow as pa

    texts = installed_texts(megabytes)
    table, size = pa.table(dict(text=texts)), megabytes_of(texts)
    kept = print_decisions(table, size)
    with tempfile.TemporaryDirectory() as folder:
        path = as_jsonl(texts, folder)
        times = [timed_round(table, path) for _ in range(rounds)]
    print_speeds(times, size)
    for peer in WEB_PEERS:
        seconds, theirs = times[0][peer]
        if seconds is not None:
            print(f'{peer} keeps {len(theirs)}; it differs on {len(set(kept) ^ set(theirs))}')
