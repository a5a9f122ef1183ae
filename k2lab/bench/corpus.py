"""Duplicates and decontamination against other tools: `python -m k2lab.bench corpus`."""

import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from k2lab.bench.harness import (
    Timing,
    by_peer,
    installed_texts,
    median_and_range,
    megabytes_of,
    speed,
    write_lines,
)

COPY_KINDS = ('copy', 'format', 'words', 'cut', 'boilerplate', 'far')
LEAK_KINDS = ('verbatim', 'upper', 'partial')
WORDS_CHANGED = dict(copy=0, words=0.015, far=0.2)


def eval_passages(texts: list[str], known: list[str]) -> list[str]:
    "Passages of 40 to 60 words from texts that share no run of 13 words with the known ones."
    import pyarrow as pa

    from k2lab.corpus.duplicates import held_by, matching_runs, run_index

    long = [text for text in texts if len(text.split()) > 100]
    passages = [' '.join(re.findall(r'\w+', text)[5 : 45 + len(text) % 20]) for text in long]
    index = run_index(passages)
    held = held_by(index, *matching_runs(pa.array(known), index))
    shared = {*index.texts[held.reading].tolist()}
    return [passage for i, passage in enumerate(passages) if i not in shared]


def altered_copy(text: str, kind: str, rng: random.Random) -> str:
    "A copy of a text, changed in one of the ways in which near-copies arise; `far` is too different to be one."
    if kind == 'format':
        return ' '.join(text.upper().split())
    if kind == 'cut':
        return text[: int(0.88 * len(text))]
    if kind == 'boilerplate':
        return f'{text}\nCopyright of revision {rng.random()}. All rights are reserved by their owners.'
    words = text.split(' ')
    for i in rng.sample(range(len(words)), int(WORDS_CHANGED[kind] * len(words))):
        words[i] = rng.choice(words)
    return ' '.join(words)


def leaked(text: str, kind: str, host: str) -> str:
    "A host document with an evaluation text in it: `verbatim`, in `upper` case, or `partial`, 26 words of it."
    partial = ' '.join(text.split(' ')[2:28])
    return f'{host}\n{dict(verbatim=text, upper=text.upper(), partial=partial)[kind]}\nend'


class Row(NamedTuple):
    "A text, how it was made (None: an installed text) and the number of the text it was made from."

    text: str
    kind: str | None
    source: int


@dataclass(frozen=True)
class InjectedCorpus:
    "Texts, `{row: (kind, row of the original)}` of copies, evaluation texts, `{row: kind}` of leaks."

    texts: list[str]
    copies: dict[int, tuple[str, int]]
    exam: list[str]
    leaks: dict[int, str]


def copies_of(base: list[str], rng: random.Random) -> Iterator[Row]:
    "Altered copies of a tenth of the texts."
    for i in rng.sample(range(len(base)), len(base) // 10):
        kind = rng.choice(COPY_KINDS)
        yield Row(altered_copy(base[i], kind, rng), kind, i)


def leaks_of(exam: list[str], base: list[str], rng: random.Random) -> Iterator[Row]:
    "Each evaluation text inside a document."
    for i, text in enumerate(exam):
        kind = LEAK_KINDS[i % 3]
        host = base[rng.randrange(len(base))][:300] + str(rng.random())
        yield Row(leaked(text, kind, host), f'leak {kind}', i)


def injected(rows: list[Row], exam: list[str]) -> InjectedCorpus:
    "The rows as a corpus with the places of its copies and leaks."
    place = {row.source: i for i, row in enumerate(rows) if row.kind is None}
    copies: dict[int, tuple[str, int]] = {}
    leaks: dict[int, str] = {}
    for i, (_, kind, source) in enumerate(rows):
        if kind in COPY_KINDS:
            copies[i] = kind, place[source]
        elif kind:
            leaks[i] = kind
    return InjectedCorpus([row.text for row in rows], copies, exam, leaks)


def made_corpus(megabytes: float, pages: bool = False) -> InjectedCorpus:
    "Installed texts with a tenth of injected copies and up to 300 leaked evaluation texts."
    rng, texts = random.Random(11), installed_texts(megabytes + 2, pages)
    aside, base = texts[:600], texts[600:]
    exam = eval_passages(aside, base)[:300]
    rows = [Row(text, None, i) for i, text in enumerate(base)]
    rows += copies_of(base, rng)
    rows += leaks_of(exam, base, rng)
    rng.shuffle(rows)
    return injected(rows, exam)


def write_exam(exam: list[str], folder: str) -> str:
    "Write the evaluation texts as a JSON list; returns the path."
    path = f'{folder}/exam.json'
    with open(path, 'w') as out:
        json.dump(exam, out)
    return path


class Pairs(NamedTuple):
    "Pairs of similar texts as arrays: row numbers and Jaccard similarity."

    left: Any
    right: Any
    jaccard: Any


def candidates(rare, doc, of, n: int):
    "Unique `(left, right)` rows of the pairs that share one of the rare runs, of n texts."
    import numpy as np

    pairs = [np.empty(0, np.int64)]
    for apart in range(1, int(np.bincount(of[rare]).max())):
        same = of[rare][apart:] == of[rare][:-apart]
        low, high = np.sort(np.stack((doc[rare][:-apart][same], doc[rare][apart:][same])), axis=0)
        pairs.append(np.unique(low * n + high))
    return np.divmod(np.unique(np.concatenate(pairs)), n)


def true_pairs(texts: list[str], least: float = 0.7) -> Pairs:
    "All pairs of at least that Jaccard similarity, exactly: two such texts share one of their (1 - least) rarest runs."
    import numpy as np
    import pyarrow as pa

    from k2lab.corpus.duplicates import run_sets
    from k2lab.corpus.kernels import jaccards

    runs, ends = run_sets(pa.array(texts, pa.large_string()), 5)
    doc = np.repeat(np.arange(len(texts)), np.diff(ends))
    _, of, spread = np.unique(runs, return_inverse=True, return_counts=True)
    order = np.lexsort((of, spread[of], doc))
    rank = np.arange(len(doc)) - ends[doc]
    rare = order[rank < (1 - least) * np.diff(ends)[doc] + 1]
    rare = rare[np.argsort(of[rare], kind='stable')]
    left, right = candidates(rare, doc, of, len(texts))
    similarity = jaccards(runs, ends, left, right)
    close = similarity >= least
    return Pairs(left[close], right[close], similarity[close])


def recall_and_precision(kept: list[int], n: int, pairs: Pairs) -> str:
    "Recall over pairs of Jaccard 0.8 (one is removed), precision over removed rows (a row 0.7 like it is kept)."
    import numpy as np

    stays = np.isin(np.arange(n), kept)
    left, right, jaccard = pairs
    removed = np.flatnonzero(~stays)
    recall = np.mean(~(stays[left] & stays[right])[jaccard >= 0.8])
    precision = np.isin(removed, np.union1d(left, right)).mean()
    kept_for = np.union1d(left[stays[right]], right[stays[left]])
    one_kept = np.isin(removed, kept_for).mean()
    return (
        f'removed {len(removed)}, recall {recall:.4f}, '
        f'precision {precision:.4f}, with one kept {one_kept:.4f}'
    )


class Task(NamedTuple):
    "An operator of ours and the peers measured beside it."

    operator: Callable
    peers: tuple[str, ...]


def corpus_tasks(exam: list[str]) -> dict[str, Task]:
    "What is measured, by name."
    from k2lab.corpus.duplicates import drop_contaminated, drop_copies, drop_near

    by_keys = lambda table: drop_near(table, least=0, max_share=1)
    verified = lambda table: drop_near(table, max_share=1)
    clean = lambda table: drop_contaminated(table, exam)
    return {
        'exact copies': Task(drop_copies, ()),
        'near-copies, keys only': Task(by_keys, ('datatrove', 'text_dedup', 'datasketch')),
        'near-copies, verified': Task(verified, ('text_dedup_verified', 'datasketch')),
        'decontamination': Task(clean, ('datatrove_decontaminate',)),
    }


def by_us(operator: Callable, path: str) -> Timing:
    "The measurement of an operator of ours, from the JSONL file to the table that is kept."
    import pyarrow.json

    began = time.process_time()
    options = pyarrow.json.ReadOptions(use_threads=False, block_size=1 << 26)
    kept = operator(pyarrow.json.read_json(path, options))[0]
    return time.process_time() - began, kept['id'].to_pylist()


def in_turns(
    path: str, tasks: dict[str, Task], rounds: int, exam_path: str
) -> dict[str, list[Timing]]:
    "The measurements of our operators and of all peers, one after another in each round."
    peers = dict.fromkeys(peer for task in tasks.values() for peer in task.peers)
    out: dict[str, list[Timing]] = {name: [] for name in [*tasks, *peers]}
    for task in tasks.values():
        by_us(task.operator, path)  # compiles the kernels before anything is timed
    for i in range(rounds):
        for name, task in tasks.items():
            out[name].append(by_us(task.operator, path))
        for peer in peers:
            if i == 0 or out[peer][0][0] is not None:
                exam = [exam_path] if 'decontaminate' in peer else []
                out[peer].append(by_peer(peer, path, *exam))
        print(f'round {i + 1} of {rounds}', file=sys.stderr)
    return out


def removal_quality(task: str, kept: list[int], made: InjectedCorpus, pairs: Pairs) -> str:
    "How right the removals of a task were, in words."
    if task.startswith('near'):
        return recall_and_precision(kept, len(made.texts), pairs)
    parts = [f'removed {len(made.texts) - len(kept)}']
    if task == 'decontamination':
        kinds, gone = list(made.leaks.values()), made.leaks.keys() - set(kept)
        for kind in sorted(set(kinds)):
            share = sum(made.leaks[row] == kind for row in gone) / kinds.count(kind)
            parts.append(f'recall {kind} {share:.3f}')
    return ', '.join(parts)


def print_corpus(
    tasks: dict[str, Task], times: dict[str, list[Timing]], made: InjectedCorpus, pairs: Pairs
):
    "Print speed, ratios and quality."
    size = megabytes_of(made.texts)
    for name, task in tasks.items():
        ours = [seconds or 0 for seconds, _ in times[name]]
        quality = removal_quality(name, times[name][0][1], made, pairs)
        print(f'{name}: {speed(size, ours)}; {quality}')
        for peer in task.peers:
            first, kept = times[peer][0]
            if first is None:
                print(f'  {peer}: did not run: {kept}')
                continue
            theirs = [seconds for seconds, _ in times[peer] if seconds is not None]
            ratio = statistics.median(theirs) / statistics.median(ours)
            quality = removal_quality(name, kept, made, pairs)
            print(f'  {peer}: {median_and_range(theirs)} s, {ratio:.0f} times as long; {quality}')


def corpus(megabytes: float = 20, rounds: int = 3):
    "Print speed and quality of `k2lab.corpus.duplicates` on one core, on texts with injected copies and leaks."
    made = made_corpus(megabytes)
    pairs = true_pairs(made.texts)
    rows = [dict(id=i, text=text) for i, text in enumerate(made.texts)]
    with tempfile.TemporaryDirectory() as folder:
        path = write_lines(f'{folder}/corpus.jsonl', rows)
        exam_path = write_exam(made.exam, folder)
        print(
            f'{megabytes_of(made.texts):.1f} MB, {len(made.texts)} texts, '
            f'{len(made.copies)} copies of {len(COPY_KINDS)} kinds '
            f'and {len(made.leaks)} leaks injected, '
            f'{len(pairs.left)} pairs of Jaccard 0.7 and more',
            flush=True,
        )
        tasks = corpus_tasks(made.exam)
        times = in_turns(path, tasks, rounds, exam_path)
        print_corpus(tasks, times, made, pairs)
