"""Duplicates, readers and the whole way from files to tokens against other tools: `python -m k2lab.bench corpus`, `shards`, `chain`."""

import json, os, random, statistics, subprocess, sys, tempfile, time
from pathlib import Path
from k2lab.bench.harness import (
    COPY_KINDS,
    by_peer,
    eval_passages,
    in_turns,
    installed_texts,
    median_and_range,
    print_peers,
)


def altered_copy(text: str, kind: str, rng) -> str:
    "A text once more: as it is, or changed in one of the ways in which near-copies come about; `far` is changed too much to be one."
    words = text.split(' ')
    if kind == 'format':
        return ' '.join(text.upper().split())
    if kind == 'cut':
        return text[: int(0.88 * len(text))]
    if kind == 'boilerplate':
        return (
            text
            + f'\nCopyright of revision {rng.random()}. All rights are reserved by their owners.'
        )
    for i in rng.sample(
        range(len(words)), int(dict(copy=0, words=0.015, far=0.2)[kind] * len(words))
    ):
        words[i] = rng.choice(words)
    return ' '.join(words)


def leaked(text: str, kind: str, host: str) -> str:
    "A host document with an evaluation text in it: `verbatim`, in `upper` case, or `partial`, 26 words of it."
    words = text.split(' ')
    return f'{host}\n{dict(verbatim=text, upper=text.upper(), partial=" ".join(words[2:28]))[kind]}\nend'


def made_corpus(megabytes: float, pages: bool = False) -> tuple:
    "`(texts, {row: (kind, row it was made from)}, exam, {row: kind of leak})`: installed texts with a tenth injected copies and some leaked evaluation texts."
    rng, texts = random.Random(11), installed_texts(megabytes + 2, pages)
    aside, base = texts[:600], texts[600:]
    exam = eval_passages(aside, base)[:300]
    made = [(text, None, i) for i, text in enumerate(base)]
    made += [
        (altered_copy(base[i], kind, rng), kind, i)
        for i in rng.sample(range(len(base)), len(base) // 10)
        for kind in [rng.choice(COPY_KINDS)]
    ]
    made += [
        (
            leaked(text, kind, base[rng.randrange(len(base))][:300] + str(rng.random())),
            f'leak {kind}',
            i,
        )
        for i, text in enumerate(exam)
        for kind in [('verbatim', 'upper', 'partial')[i % 3]]
    ]
    rng.shuffle(made)
    place = {source: row for row, (_, kind, source) in enumerate(made) if kind is None}
    copies = {
        row: (kind, place[source])
        for row, (_, kind, source) in enumerate(made)
        if kind in COPY_KINDS
    }
    return (
        [text for text, _, _ in made],
        copies,
        exam,
        {row: kind for row, (_, kind, _) in enumerate(made) if kind and kind not in COPY_KINDS},
    )


def true_pairs(texts: list, least: float = 0.7):
    "(left, right, Jaccard) of all pairs of texts of at least that Jaccard similarity, found exactly: two such texts share one of their (1 - least) rarest runs."
    import numpy as np, pyarrow as pa
    from k2lab.corpus.duplicates import run_sets
    from k2lab.corpus.kernels import jaccards

    runs, ends = run_sets(pa.array(texts, pa.large_string()), 5)
    doc, (_, of, spread) = (
        np.repeat(np.arange(len(texts)), np.diff(ends)),
        np.unique(runs, return_inverse=True, return_counts=True),
    )
    order = np.lexsort((of, spread[of], doc))
    rank = np.arange(len(doc)) - ends[doc]
    rare = order[rank < (1 - least) * np.diff(ends)[doc] + 1]
    rare = rare[np.argsort(of[rare], kind='stable')]
    pairs = [np.empty(0, np.int64)]
    for apart in range(1, int(np.bincount(of[rare]).max())):
        same = of[rare][apart:] == of[rare][:-apart]
        low, high = np.sort(np.stack((doc[rare][:-apart][same], doc[rare][apart:][same])), axis=0)
        pairs.append(np.unique(low * len(texts) + high))
    left, right = np.divmod(np.unique(np.concatenate(pairs)), len(texts))
    found = jaccards(runs, ends, left, right)
    return left[found >= least], right[found >= least], found[found >= least]


def recall_and_precision(kept: list, n: int, pairs: tuple) -> str:
    "Recall over the pairs of Jaccard 0.8 and more (one of the two is gone), precision over the rows removed: a row 0.7 like it exists, and one is kept."
    import numpy as np

    stays = np.isin(np.arange(n), kept)
    left, right, found = pairs
    close, gone = found >= 0.8, np.flatnonzero(~stays)
    near = np.union1d(left, right)
    kept_for = np.union1d(left[stays[right]], right[stays[left]])
    return f'removed {len(gone)}, recall {np.mean(~(stays[left] & stays[right])[close]):.4f}, precision {np.isin(gone, near).mean():.4f}, with one kept {np.isin(gone, kept_for).mean():.4f}'


def corpus_work(exam: list) -> dict:
    "What is measured: {what: (our operator, peers beside it)}."
    from k2lab.corpus.duplicates import drop_contaminated, drop_copies, drop_near

    return {
        'exact copies': (drop_copies, []),
        'near-copies, keys only': (
            lambda t: drop_near(t, least=0, alarm=1),
            ['datatrove', 'text_dedup', 'datasketch'],
        ),
        'near-copies, verified': (
            lambda t: drop_near(t, alarm=1),
            ['text_dedup_verified', 'datasketch'],
        ),
        'decontamination': (lambda t: drop_contaminated(t, exam), ['datatrove_decontaminate']),
    }


def print_corpus(work: dict, times: dict, texts: list, leaks: dict, pairs: tuple):
    "Prints speed, ratios and quality."
    size = sum(len(text.encode()) for text in texts) / 1e6
    share = lambda kind, kept: (
        sum(leaks[row] == kind for row in leaks.keys() - set(kept))
        / list(leaks.values()).count(kind)
    )

    def quality(what, kept):
        if what.startswith('near'):
            return recall_and_precision(kept, len(texts), pairs)
        recall = (
            [f'recall {kind} {share(kind, kept):.3f}' for kind in sorted(set(leaks.values()))]
            if what == 'decontamination'
            else []
        )
        return ', '.join([f'removed {len(texts) - len(kept)}', *recall])

    for what, (_, peers) in work.items():
        ours = [seconds for seconds, _ in times[what]]
        print(
            f'{what}: {median_and_range(ours)} s, {size / statistics.median(ours):.0f} MB/s; {quality(what, times[what][0][1])}'
        )
        for peer in peers:
            if times[peer][0][0] is None:
                print(f'  {peer}: did not run: {times[peer][0][1]}')
                continue
            theirs = [seconds for seconds, _ in times[peer]]
            print(
                f'  {peer}: {median_and_range(theirs)} s, {statistics.median(theirs) / statistics.median(ours):.0f} times as long; {quality(what, times[peer][0][1])}'
            )


def corpus(megabytes: str = '20', rounds: str = '3'):
    "Speed and quality of `k2lab.corpus.duplicates` on one core, on texts of the installed packages with injected copies and leaks."
    texts, copies, exam, leaks = made_corpus(float(megabytes))
    pairs = true_pairs(texts)
    with tempfile.TemporaryDirectory() as folder:
        path, exam_path = f'{folder}/corpus.jsonl', f'{folder}/exam.json'
        with open(path, 'w') as out:
            out.writelines(json.dumps(dict(id=i, text=text)) + '\n' for i, text in enumerate(texts))
        with open(exam_path, 'w') as out:
            json.dump(exam, out)
        print(
            f'{sum(len(t.encode()) for t in texts) / 1e6:.1f} MB, {len(texts)} texts, {len(copies)} copies of {len(COPY_KINDS)} kinds and {len(leaks)} leaks injected, {len(pairs[0])} pairs of Jaccard 0.7 and more',
            flush=True,
        )
        work = corpus_work(exam)
        print_corpus(work, in_turns(path, work, int(rounds), exam_path), texts, leaks, pairs)


def copy_seconds(path: str) -> float:
    "CPU seconds from a JSONL file through Arrow tables to shards with their manifests and hashes, imports excluded."
    from k2lab.corpus.units import Plan, plan_units, run_units

    with tempfile.TemporaryDirectory() as at:
        Path(at, 'one.jsonl').write_text('{"text": "what is imported on the way is there now"}')
        run_units(plan_units(f'{at}/one.jsonl'), Plan(), f'{at}/one')
        began = time.process_time()
        run_units(plan_units(path), Plan(), f'{at}/all')
        return time.process_time() - began


def copied_by_us(path: str) -> float:
    "The same in a process of its own, as the peer has one: in a heap full of texts every line would be a cache miss."
    return float(
        subprocess.run(
            [
                sys.executable,
                '-c',
                f'from k2lab.bench import copy_seconds; print(copy_seconds({path!r}))',
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def shards(megabytes: str = '60', rounds: str = '3'):
    "Speed of reading and writing JSONL on one core, on texts of the installed packages, short ones and ones of about 5 kB."
    texts = installed_texts(float(megabytes))
    with tempfile.TemporaryDirectory() as folder:
        for name, each in (('as they are', 1), ('joined by threes', 3)):
            path = f'{folder}/{each}.jsonl'
            with open(path, 'w') as out:
                out.writelines(
                    json.dumps(
                        dict(text='\n'.join(texts[i : i + each]), source='installed'),
                        ensure_ascii=False,
                    )
                    + '\n'
                    for i in range(0, len(texts), each)
                )
            size, times = (
                os.path.getsize(path) / 1e6,
                [
                    (copied_by_us(path), *by_peer('datatrove_copy', path))
                    for _ in range(int(rounds))
                ],
            )
            ours = [t[0] for t in times]
            print(
                f'{name}, {len(texts) // each} texts, {size:.0f} MB: {median_and_range(ours)} s, {size / statistics.median(ours):.0f} MB/s'
            )
            if times[0][1] is None:
                print(f'  datatrove: did not run: {times[0][2]}')
            else:
                print(
                    f'  datatrove: {median_and_range([t[1] for t in times])} s, {statistics.median(t[1] for t in times) / statistics.median(ours):.1f} times as long',
                    flush=True,
                )


def chain_of(path: str, exam_path: str, tokenizer: str, folder: str) -> tuple:
    "(steps, rows kept, tokens) of the lab's chain: Gopher's rules, private data, copies, near copies, evaluation texts, JSON lines, tokens."
    from k2lab.text.encoder import encode_stream
    from k2lab.corpus.pipeline import (
        Refining,
        without_contaminated,
        refine,
        tables_of,
        tokenizer_at,
        unique,
    )
    from k2lab.text.rows import publishing
    from k2lab.corpus.writers import Lines

    told, tok = Refining(quality='gopher', min_chars=1, max_cluster_share=1), tokenizer_at(tokenizer)
    made = refine([dict(files=path, licence='unknown')], ['bench'], told, folder)
    index, steps = unique(made, told)
    index, last = without_contaminated(made, index, dict(exam=json.load(open(exam_path))))
    rows, count = [], 0
    with (
        publishing(Path(folder) / 'out.jsonl') as part,
        publishing(Path(folder) / 'out.bin') as ids,
    ):
        out = Lines(part, made.texts.schema)
        for table in tables_of(made, index):
            out.write(table)
            chained = encode_stream(tok, table['text'].to_pylist(), tok.eos_token_id)
            ids.write(chained.tobytes())
            count += len(chained)
            rows += [json.loads(more)['id'] for more in table['extra'].to_pylist()]
        out.close()
    return [*made.steps, *steps, last], rows, count


def one_chain(path: str, exam_path: str, tokenizer: str) -> dict:
    "CPU seconds, peak memory and rows kept of the lab's chain; meant for a process of its own. Machine code is made and the tokenizer's engine compared on a part of the file first."
    from k2lab.text.encoder import encoder
    from k2lab.lab.provenance import peak_gib
    from k2lab.corpus.pipeline import tokenizer_at

    os.environ.update(RAYON_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', OMP_NUM_THREADS='1')
    with tempfile.TemporaryDirectory() as folder:
        with open(path, 'rb') as whole, open(f'{folder}/part.jsonl', 'wb') as part:
            part.writelines(line for line, _ in zip(whole, range(4000)))
        chain_of(f'{folder}/part.jsonl', exam_path, tokenizer, f'{folder}/warm')
        encoder(tokenizer_at(tokenizer)).left = 0
        began = time.process_time()
        steps, rows, count = chain_of(path, exam_path, tokenizer, f'{folder}/work')
        return dict(
            seconds=time.process_time() - began,
            peak_gib=peak_gib(),
            steps=steps,
            rows=rows,
            tokens=count,
        )


def chain(megabytes: str = '20', rounds: str = '3'):
    "From JSON lines to a corpus and its tokens on one core, against datatrove's blocks for the same steps, with and without its own word tokenizer; CPU seconds. Documents are pages: the docstrings of a file."
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    from k2lab.corpus.operators import conserved, funnel
    from k2lab.models.load import shipped

    texts, _, exam, leaks = made_corpus(float(megabytes), pages=True)
    tokenizer, peers = (
        os.environ.get('K2LAB_KIMI') or str(shipped('k2')),
        ['datatrove_chain', 'datatrove_chain_split'],
    )
    with tempfile.TemporaryDirectory() as folder:
        path, exam_path = f'{folder}/corpus.jsonl', f'{folder}/exam.json'
        with open(path, 'w') as out:
            out.writelines(
                json.dumps(dict(id=i, text=text, source='bench')) + '\n'
                for i, text in enumerate(texts)
            )
        with open(exam_path, 'w') as out:
            json.dump(exam, out)
        size, alone = (
            os.path.getsize(path) / 1e6,
            lambda: (
                ProcessPoolExecutor(1, mp_context=get_context('spawn'))
                .submit(one_chain, path, exam_path, tokenizer)
                .result()
            ),
        )
        runs = [
            (
                alone(),
                {
                    peer: by_peer(peer, path, exam_path, f'{shipped("k2")}/tokenizer.json')
                    for peer in peers
                },
            )
            for _ in range(int(rounds))
        ]
    ours, first = [run['seconds'] for run, _ in runs], runs[0][0]
    print(
        f'{size:.1f} MB: {median_and_range(ours)} s, {size / statistics.median(ours):.1f} MB/s, peak {max(run["peak_gib"] for run, _ in runs):.2f} GiB, {len(first["rows"])} of {len(texts)} documents kept, {first["tokens"]} tokens; '
        f'books balance: {not conserved(first["steps"])}; leaks left: {len(leaks.keys() & set(first["rows"]))} of {len(leaks)}'
    )
    for step in funnel(first['steps']):
        print('  ', *step)
    print_peers(ours, {peer: [run[1][peer] for run in runs] for peer in peers})
