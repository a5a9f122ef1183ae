"""The whole way from JSON lines to tokens against datatrove: `python -m k2lab.bench chain`."""

import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from k2lab.bench.corpus import InjectedCorpus, made_corpus, write_exam
from k2lab.bench.harness import (
    Timing,
    by_peer,
    in_new_process,
    median_and_range,
    print_peers,
    write_lines,
)

PEERS = ('datatrove_chain', 'datatrove_chain_split')


@dataclass(frozen=True)
class Outcome:
    "What the lab's chain kept: counts of each step, ids of the documents, and tokens; its cost."

    steps: list
    rows: list
    tokens: int
    seconds: float = 0.0
    peak_gib: float = 0.0


def write_chain(made, index, tok, folder: str) -> tuple[list, int]:
    "Write the documents and their tokens; returns the ids of the documents and the number of tokens."
    from k2lab.corpus.pipeline import tables_of
    from k2lab.corpus.writers import Lines
    from k2lab.text.encoder import encode_stream
    from k2lab.text.rows import publishing

    rows, count, place = [], 0, Path(folder)
    with publishing(place / 'out.jsonl') as part, publishing(place / 'out.bin') as ids:
        out = Lines(part, made.texts.schema)
        for table in tables_of(made, index):
            out.write(table)
            stream = encode_stream(tok, table['text'].to_pylist(), tok.eos_token_id)
            ids.write(stream.tobytes())
            count += len(stream)
            rows += [json.loads(more)['id'] for more in table['extra'].to_pylist()]
        out.close()
    return rows, count


def chain_of(path: str, exam_path: str, tokenizer: str, folder: str) -> Outcome:
    "The lab's chain: Gopher's rules, private data, copies, near-copies, evaluation texts, JSON lines, tokens."
    from k2lab.corpus.pipeline import Refining, refine, tokenizer_at, unique, without_contaminated

    options = Refining(quality='gopher', min_chars=1, max_cluster_share=1)
    tok = tokenizer_at(tokenizer)
    made = refine([dict(files=path, licence='unknown')], ['bench'], options, folder)
    index, steps = unique(made, options)
    exam = json.loads(Path(exam_path).read_text())
    index, last = without_contaminated(made, index, dict(exam=exam))
    rows, count = write_chain(made, index, tok, folder)
    return Outcome([*made.steps, *steps, last], rows, count)


def first_lines(path: str, n: int, part: str) -> str:
    "Write the first n lines of a file to another; returns its path."
    with open(path, 'rb') as whole, open(part, 'wb') as out:
        out.writelines(line for line, _ in zip(whole, range(n)))
    return part


def one_chain(path: str, exam_path: str, tokenizer: str) -> Outcome:
    "CPU seconds and peak memory of the chain, in a process of its own; a part of the file compiles the kernels first."
    from k2lab.corpus.pipeline import tokenizer_at
    from k2lab.lab.provenance import peak_gib
    from k2lab.text.encoder import encoder

    os.environ.update(RAYON_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', OMP_NUM_THREADS='1')
    with tempfile.TemporaryDirectory() as folder:
        part = first_lines(path, 4000, f'{folder}/part.jsonl')
        chain_of(part, exam_path, tokenizer, f'{folder}/warm')
        encoder(tokenizer_at(tokenizer)).left = 0
        began = time.process_time()
        outcome = chain_of(path, exam_path, tokenizer, f'{folder}/work')
        seconds = time.process_time() - began
        return replace(outcome, seconds=seconds, peak_gib=peak_gib())


def timed_round(path: str, exam_path: str) -> tuple[Outcome, dict[str, Timing]]:
    "One measurement of our chain and of each peer."
    from k2lab.models.load import shipped

    tokenizer = os.environ.get('K2LAB_KIMI') or str(shipped('k2'))
    ours = in_new_process(one_chain, path, exam_path, tokenizer)
    theirs = f'{shipped("k2")}/tokenizer.json'
    return ours, {peer: by_peer(peer, path, exam_path, theirs) for peer in PEERS}


def print_chain(outcomes: list[Outcome], made: InjectedCorpus, size: float):
    "Print speed, memory and what the chain kept."
    from k2lab.corpus.operators import conserved, funnel

    seconds, first = [one.seconds for one in outcomes], outcomes[0]
    rate = size / statistics.median(seconds)
    peak = max(one.peak_gib for one in outcomes)
    left = len(made.leaks.keys() & set(first.rows))
    print(
        f'{size:.1f} MB: {median_and_range(seconds)} s, {rate:.1f} MB/s, peak {peak:.2f} GiB, '
        f'{len(first.rows)} of {len(made.texts)} documents kept, {first.tokens} tokens; '
        f'rows in equal rows out plus removed: {not conserved(first.steps)}; '
        f'leaks left: {left} of {len(made.leaks)}'
    )
    for step in funnel(first.steps):
        print('  ', *step)


def chain(megabytes: float = 20, rounds: int = 3):
    "Print the cost from JSON lines to tokens on one core, against datatrove's blocks for the same steps."
    made = made_corpus(megabytes, pages=True)
    rows = [dict(id=i, text=text, source='bench') for i, text in enumerate(made.texts)]
    with tempfile.TemporaryDirectory() as folder:
        path = write_lines(f'{folder}/corpus.jsonl', rows)
        exam_path = write_exam(made.exam, folder)
        times = [timed_round(path, exam_path) for _ in range(rounds)]
        size = os.path.getsize(path) / 1e6
    outcomes = [ours for ours, _ in times]
    print_chain(outcomes, made, size)
    ours = [one.seconds for one in outcomes]
    print_peers(ours, {peer: [peers[peer] for _, peers in times] for peer in PEERS})
