"""What the benchmarks share: texts, peers, turns and their tables."""

import json, math, os, random, re, statistics, subprocess, sys, sysconfig, time
from pathlib import Path


def median_and_range(values: list, digits: int = 2) -> str:
    "`median (lowest to highest)`."
    return f'{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})'


TRAINER_OPTIONS = dict(
    per_device_train_batch_size=8,
    learning_rate=1e-4,
    num_train_epochs=1,
    logging_steps=1000,
    save_strategy='no',
    gradient_checkpointing=False,
)


def texts(n: int, shape: str) -> list:
    "n seeded question-and-answer rows: of `even` length, or `mixed` (log-normal), many short and few long, as instruction sets are."
    rng = random.Random(0)
    words = 'the graph has nodes and edges so 12 + 30 = 42 and neighbors of a are b c path sum first then answer'.split()
    size = (
        (lambda: 60)
        if shape == 'even'
        else (lambda: min(700, 1 + int(rng.lognormvariate(math.log(40), 1.1))))
    )
    return [
        dict(
            prompt=' '.join(rng.choices(words, k=8)),
            response=' '.join(rng.choices(words, k=size())),
        )
        for _ in range(n)
    ]


DOCSTRING = re.compile(r'(?:"""|\'\'\')(.{200,}?)(?:"""|\'\'\')', re.S)


COPY_KINDS = ('copy', 'format', 'words', 'cut', 'boilerplate', 'far')


def installed_texts(megabytes: float, pages: bool = False) -> list:
    "Docstrings (or all docstrings of a file as one page) and documents of the installed packages and the standard library, no two equal, in a seeded order, at most `megabytes` of them."
    found = {}
    for folder in (sysconfig.get_path('purelib'), sysconfig.get_path('stdlib')):
        for path in sorted(Path(folder).rglob('*')):
            if path.suffix not in ('.py', '.md', '.rst', '.txt') or not path.is_file():
                continue
            text = path.read_text('utf-8', 'ignore')
            said = DOCSTRING.findall(text) if path.suffix == '.py' else [text]
            found.update(dict.fromkeys(['\n\n'.join(said)] if pages and said else said))
    texts, room = sorted(found), megabytes * 1e6
    random.Random(7).shuffle(texts)
    return [text for text in texts if (room := room - len(text.encode())) > 0]


def eval_passages(texts: list, known: list) -> list:
    "Passages of 40 to 60 words from texts that share no run of 13 words with the known ones."
    import pyarrow as pa
    from k2lab.corpus.duplicates import found_runs, run_index

    passages = [
        ' '.join(re.findall(r'\w+', text)[5 : 45 + len(text) % 20])
        for text in texts
        if len(text.split()) > 100
    ]
    index, owners, _, lengths = run_index(passages)
    shared = {
        i
        for places in found_runs(pa.array(known), index, lengths).values()
        for place in places
        for i in owners[place]
    }
    return [passage for i, passage in enumerate(passages) if i not in shared]


def peer_python(module: str) -> str:
    "The interpreter of $K2LAB_PEERS (several, parted as in $PATH) that can import a module, or ''."
    for python in filter(None, os.environ.get('K2LAB_PEERS', '').split(os.pathsep)):
        if not subprocess.run([python, '-c', f'import {module}'], capture_output=True).returncode:
            return python
    return ''


def by_peer(name: str, *told) -> tuple:
    "The same of a peer, in its own process; (None, why) when it cannot run."
    python = peer_python(
        'datatrove' if name.startswith('datatrove') else name.removesuffix('_verified')
    )
    if not python:
        return None, 'not installed (K2LAB_PEERS names no Python that has it)'
    done = subprocess.run(
        [python, str(Path(__file__).with_name('peers.py')), name, *told],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': ''},
    )
    if done.returncode:
        return None, done.stderr.strip().splitlines()[-1]
    said = json.loads(done.stdout.splitlines()[-1])
    return said['seconds'], said['kept']


def in_turns(path: str, work: dict, rounds: int, exam_path: str) -> dict:
    "{name: [(CPU seconds, rows kept) of each round]} of our operators and all peers, one after another in each round."
    peers = dict.fromkeys(peer for _, beside in work.values() for peer in beside)
    out = {name: [] for name in [*work, *peers]}
    for what, (operator, _) in work.items():
        by_us(operator, path)  # machine code is made before anything is timed
    for i in range(rounds):
        for what, (operator, _) in work.items():
            out[what].append(by_us(operator, path))
        for peer in peers:
            if i == 0 or out[peer][0][0] is not None:
                out[peer].append(
                    by_peer(peer, path, *([exam_path] if 'decontaminate' in peer else []))
                )
        print(f'round {i + 1} of {rounds}', file=sys.stderr)
    return out


def cpu_seconds(work) -> float:
    "CPU seconds that a call takes in this process."
    began = time.process_time()
    work()
    return time.process_time() - began


def as_jsonl(texts: list, folder: str) -> str:
    "A file with a row for each text, numbered from 0."
    path = f'{folder}/corpus.jsonl'
    with open(path, 'w') as out:
        out.writelines(
            json.dumps(dict(id=str(i), text=text)) + '\n' for i, text in enumerate(texts)
        )
    return path


def print_peers(ours: list, peers: dict):
    "Prints how much longer the peers took: {name: [(seconds or None, rows kept or why not)]}."
    for name, times in peers.items():
        if times[0][0] is None:
            print(f'  {name}: did not run: {times[0][1]}')
        else:
            print(
                f'  {name}: {median_and_range([t[0] for t in times])} s, {statistics.median(t[0] for t in times) / statistics.median(ours):.1f} times as long',
                flush=True,
            )


def plainly(work):
    "A call without compiled kernels, so that the twins in plain Python do the work."
    from k2lab.corpus import signals

    real, signals.compiled = signals.compiled, lambda kernel: None
    try:
        return work()
    finally:
        signals.compiled = real


def by_us(work, path: str) -> tuple:
    "(CPU seconds, rows kept) of an operator of ours, from the JSONL file to the table that is kept."
    import pyarrow.json

    began = time.process_time()
    table = pyarrow.json.read_json(
        path, pyarrow.json.ReadOptions(use_threads=False, block_size=1 << 26)
    )
    kept = work(table)[0]
    return time.process_time() - began, kept['id'].to_pylist()
