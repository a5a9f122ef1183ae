"""Quality rules against datatrove's filters: `python -m k2lab.bench quality`."""

import statistics, tempfile
from k2lab.bench.harness import (
    as_jsonl,
    by_peer,
    cpu_seconds,
    installed_texts,
    median_and_range,
    plainly,
    print_peers,
)


def web_rules(column) -> list:
    "Numbers of the texts that keep the rules of Gopher and FineWeb."
    from k2lab.corpus.quality import FINEWEB, GOPHER, broken, signals
    import numpy as np

    found = signals(column)
    return np.flatnonzero((broken(found, GOPHER)[0] < 0) & (broken(found, FINEWEB)[0] < 0)).tolist()


def quality(megabytes: str = '20', rounds: str = '3'):
    "Speed of `k2lab.corpus.quality` on one core against datatrove's filters, on installed texts; decisions against those of the twins and of datatrove."
    import pyarrow as pa
    from k2lab.corpus.quality import c4_lines, drop_poor

    texts = installed_texts(float(megabytes))
    table, size = pa.table(dict(text=texts)), sum(len(text.encode()) for text in texts) / 1e6
    kept, pages = web_rules(table['text']), c4_lines(table)
    same = [
        kept == plainly(lambda: web_rules(table['text'])),
        pages[0].equals(plainly(lambda: c4_lines(table))[0]),
        drop_poor(table)[1] == plainly(lambda: drop_poor(table)[1]),
    ]
    print(
        f'{size:.1f} MB, {len(texts)} texts: {len(kept)} keep the rules of Gopher and FineWeb, {len(pages[0])} those of C4, {len(drop_poor(table)[0])} those for a domain; as the twins decide: {same}',
        flush=True,
    )
    peers = ['datatrove_quality', 'datatrove_quality_split', 'datatrove_c4']
    with tempfile.TemporaryDirectory() as folder:
        path = as_jsonl(texts, folder)
        times = [
            (
                cpu_seconds(lambda: web_rules(table['text'])),
                cpu_seconds(lambda: c4_lines(table)),
                {peer: by_peer(peer, path) for peer in peers},
            )
            for _ in range(int(rounds))
        ]
    for i, (what, beside) in enumerate({'Gopher and FineWeb': peers[:2], 'C4': peers[2:]}.items()):
        ours = [t[i] for t in times]
        print(f'{what}: {median_and_range(ours)} s, {size / statistics.median(ours):.0f} MB/s')
        print_peers(ours, {peer: [t[2][peer] for t in times] for peer in beside})
    for peer in peers[:2]:
        if times[0][2][peer][0] is not None:
            print(
                f'{peer} keeps {len(times[0][2][peer][1])}; it decides otherwise on {len(set(kept) ^ set(times[0][2][peer][1]))}'
            )
