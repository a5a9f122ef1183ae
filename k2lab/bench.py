"""Measurements with a peer beside them, interleaved in one run: `python -m k2lab.bench NAME`."""
import json, math, os, random, re, statistics, subprocess, sys, sysconfig, tempfile, time, warnings
from datetime import datetime
from pathlib import Path

from k2lab.core import LabError, lab_path, one_of, root

STAGE, WORDS = 'train_sft_domain', {'trainer.max_steps': '150', 'trainer.num_train_epochs': '40'}


def median_and_range(values:list, digits:int=2) -> str:
    "`median (lowest to highest)`."
    return f'{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})'


def step_seconds(folder) -> float:
    "Seconds of one training step of a run, by its record."
    from k2lab.job import read_record
    told = read_record(folder)['training']['train']
    return told['seconds']/told['steps']


def by_runner(campaign:str) -> tuple:
    "`(wall seconds, seconds of a step)` of the stage as the lab runs it: notebook, papermill, record."
    from k2lab.run import execute
    began = time.monotonic()
    folder = execute(STAGE, 'smoke', campaign, WORDS)
    return time.monotonic() - began, step_seconds(folder)


def by_accelerate(campaign:str) -> tuple:
    "The same for a bare `accelerate launch` of the same work."
    from k2lab.job import prepare
    job = prepare(STAGE, 'smoke', campaign, WORDS)
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', str(lab_path('configs')/'accelerate'/'cpu.yaml'), '--num_processes', '1', '-m', 'k2lab', 'work', str(job.folder)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=root(), capture_output=True, text=True)
    if done.returncode: raise LabError(f'accelerate launch ended with code {done.returncode}: {done.stderr.strip().splitlines()[-1]}')
    return time.monotonic() - began, step_seconds(job.folder)


def run(rounds:int=5):
    "What the runner costs over a bare `accelerate launch` of the same training: seconds in all, and share of a step."
    os.environ['OMP_NUM_THREADS'] = '1'      # accelerate would set it for its own processes, and only there
    campaign = f'bench-{datetime.now():%Y%m%d-%H%M%S}'
    pairs = []
    for i in range(rounds):
        pairs.append((by_runner(campaign), by_accelerate(campaign)))
        print(f'round {i+1} of {rounds}: runner {pairs[-1][0][0]:.1f} s, accelerate launch {pairs[-1][1][0]:.1f} s', file=sys.stderr)
    wall, step = [a[0] - b[0] for a, b in pairs], [100*(a[1]/b[1] - 1) for a, b in pairs]
    print(f'{STAGE} at smoke, {WORDS["trainer.max_steps"]} steps, {rounds} rounds in turns')
    print(f'the runner adds {median_and_range(wall)} s to a run, and {median_and_range(step, 1)} % to a step of {1000*statistics.median(b[1] for _, b in pairs):.1f} ms')


# ---- train: our stages against plain TRL scripts ------------------------------------------------------------------------------

TOLD = dict(per_device_train_batch_size=8, learning_rate=1e-4, num_train_epochs=1, logging_steps=1000, save_strategy='no', gradient_checkpointing=False)


def texts(n:int, shape:str) -> list:
    "n seeded question-and-answer rows: of `even` length, or `mixed` (log-normal), many short and few long, as instruction sets are."
    rng = random.Random(0)
    words = 'the graph has nodes and edges so 12 + 30 = 42 and neighbors of a are b c path sum first then answer'.split()
    size = (lambda: 60) if shape == 'even' else (lambda: min(700, 1 + int(rng.lognormvariate(math.log(40), 1.1))))
    return [dict(prompt=' '.join(rng.choices(words, k=8)), response=' '.join(rng.choices(words, k=size()))) for _ in range(n)]


def opened():
    "`(model, tokenizer)` of the nano K2, threads as the machine has them."
    from k2lab.model import open_model, open_tokenizer, shipped
    return open_model(shipped('k2')), open_tokenizer(shipped('k2'))


def timed(work) -> float:
    "Seconds that a call takes."
    began = time.monotonic()
    work()
    return time.monotonic() - began


def plain_sft(rows:list) -> dict:
    "SFT as a script on TRL does it: its trainer, its collator, its order."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from k2lab.tokens import encode_rows
    model, tok = opened()
    data = Dataset.from_list([dict(input_ids=e['input_ids'], labels=[i if m else -100 for i, m in zip(*e.values())]) for e in encode_rows(tok, rows)[0]])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(model, SFTConfig(folder, **TOLD, max_length=None, use_cpu=not on_gpu(), bf16=on_gpu(), report_to='none', disable_tqdm=True), train_dataset=data, processing_class=tok)
        seconds = timed(trainer.train)
    return dict(seconds=seconds, tokens=sum(map(len, data['input_ids'])))


def ours_sft(rows:list, room:int=0, **told) -> dict:
    "SFT as a stage of the lab does it; packed into rows of `room` tokens if that is not 0."
    from k2lab.fit import fit_sft
    from k2lab.job import start
    from k2lab.tokens import encode_rows
    model, tok = opened()
    job = start(STAGE, 'smoke', campaign=CAMPAIGN)
    fit_sft(job, model, tok, encode_rows(tok, rows)[0], {**TOLD, **told}, room=room)
    done = job.record['training']['train']
    return dict(seconds=done['seconds'], tokens=done['tokens'])


def pairs_of(rows:list) -> list:
    "Preference pairs of the rows: half of the answer is better than all of it."
    return [dict(prompt=r['prompt'], chosen=r['response'][:len(r['response'])//2], rejected=r['response']) for r in rows]


def plain_dpo(rows:list) -> dict:
    "DPO as a script on TRL does it, on the same text with the same end of turn."
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from k2lab.chat import pair_spans, text_of
    (model, tok), (reference, _) = opened(), opened()
    tok.eos_token = '<|im_end|>'
    data = [dict(zip(('prompt', 'chosen', 'rejected'), (text_of(s).removesuffix('<|im_end|>') for s in pair_spans(r)))) for r in pairs_of(rows)]
    for d, r in zip(data, pairs_of(rows)): d['prompt'] = text_of(pair_spans(r)[0])
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(model, reference, DPOConfig(folder, **TOLD, max_length=None, use_cpu=not on_gpu(), bf16=on_gpu(), report_to='none', disable_tqdm=True), train_dataset=Dataset.from_list(data), processing_class=tok)
        tokens = sum(2*len(r['prompt_ids']) + len(r['chosen_ids']) + len(r['rejected_ids']) for r in trainer.train_dataset)
        seconds = timed(trainer.train)
    return dict(seconds=seconds, tokens=tokens)


def ours_dpo(rows:list) -> dict:
    "DPO as the lab's stage does it."
    from k2lab.chat import encode, pair_spans
    from k2lab.fit import fit_dpo
    from k2lab.job import start
    (model, tok), (reference, _) = opened(), opened()
    data = [dict(zip(('prompt_ids', 'chosen_ids', 'rejected_ids'), (encode(tok, s)[0] for s in pair_spans(r)))) for r in pairs_of(rows)]
    job = start(STAGE, 'smoke', campaign=CAMPAIGN)
    fit_dpo(job, model, reference, tok, data, TOLD)
    done = job.record['training']['train']
    return dict(seconds=done['seconds'], tokens=done['tokens'])


CAMPAIGN = 'bench-train'
SAME = dict(train_sampling_strategy='random')
TRAIN = {'SFT, rows of one length, equal settings': ('even', 240, plain_sft, lambda rows: ours_sft(rows, **SAME)),
         'SFT, rows of mixed length, as the lab packs them': ('mixed', 240, plain_sft, lambda rows: ours_sft(rows, room=1024, per_device_train_batch_size=1)),
         'DPO, equal settings': ('even', 80, plain_dpo, ours_dpo)}


def on_gpu() -> bool:
    "Whether there is a GPU."
    import torch
    return torch.cuda.is_available()


def one_training(name:str, ours:bool) -> dict:
    "Tokens, seconds and peak memory of one side of a comparison; meant for a process of its own."
    from k2lab.job import peak_gib
    shape, n, plain, lab = TRAIN[name]
    return dict((lab if ours else plain)(texts(n, shape)), peak_gib=peak_gib())


def train(rounds:int=5):
    "Tokens per second and peak memory of the lab's training against plain TRL scripts, same model, rows and tokens."
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    alone = lambda *call: ProcessPoolExecutor(1, mp_context=get_context('spawn')).submit(one_training, *call).result()
    for name in TRAIN:
        pairs = [(alone(name, True), alone(name, False)) for _ in range(rounds)]
        speed = lambda side: [p[side]['tokens']/p[side]['seconds'] for p in pairs]
        print(f'{name}: {median_and_range(speed(0), 0)} tokens/s against {median_and_range(speed(1), 0)}: {median_and_range([a/b for a, b in zip(speed(0), speed(1))])} times as fast; '
              f'peak {pairs[0][0]["peak_gib"]:.2f} against {pairs[0][1]["peak_gib"]:.2f} GiB; {pairs[0][0]["tokens"]} and {pairs[0][1]["tokens"]} tokens', flush=True)


# ---- corpus: finding duplicates and contamination, against the tools that do the same -----------------------------------------

DOCSTRING = re.compile(r'(?:"""|\'\'\')(.{200,}?)(?:"""|\'\'\')', re.S)
KINDS = ('copy', 'format', 'words', 'cut', 'boilerplate', 'far')


def installed_texts(megabytes:float, pages:bool=False) -> list:
    "Docstrings (or all docstrings of a file as one page) and documents of the installed packages and the standard library, no two equal, in a seeded order, at most `megabytes` of them."
    found = {}
    for folder in (sysconfig.get_path('purelib'), sysconfig.get_path('stdlib')):
        for path in sorted(Path(folder).rglob('*')):
            if path.suffix not in ('.py', '.md', '.rst', '.txt') or not path.is_file(): continue
            text = path.read_text('utf-8', 'ignore')
            said = DOCSTRING.findall(text) if path.suffix == '.py' else [text]
            found.update(dict.fromkeys(['\n\n'.join(said)] if pages and said else said))
    texts, room = sorted(found), megabytes*1e6
    random.Random(7).shuffle(texts)
    return [text for text in texts if (room := room - len(text.encode())) > 0]


def copied(text:str, kind:str, rng) -> str:
    "A text once more: as it is, or changed in one of the ways in which near-copies come about; `far` is changed too much to be one."
    words = text.split(' ')
    if kind == 'format': return ' '.join(text.upper().split())
    if kind == 'cut': return text[:int(.88*len(text))]
    if kind == 'boilerplate': return text + f'\nCopyright of revision {rng.random()}. All rights are reserved by their owners.'
    for i in rng.sample(range(len(words)), int(dict(copy=0, words=.015, far=.2)[kind]*len(words))): words[i] = rng.choice(words)
    return ' '.join(words)


def leaked(text:str, kind:str, host:str) -> str:
    "A host document with an evaluation text in it: `verbatim`, in `upper` case, or `partial`, 26 words of it."
    words = text.split(' ')
    return f'{host}\n{dict(verbatim=text, upper=text.upper(), partial=" ".join(words[2:28]))[kind]}\nend'


def exam_texts(texts:list, known:list) -> list:
    "Passages of 40 to 60 words from texts that share no run of 13 words with the known ones."
    import pyarrow as pa
    from k2lab.duplicates import found_runs, run_index
    passages = [' '.join(re.findall(r'\w+', text)[5:45 + len(text) % 20]) for text in texts if len(text.split()) > 100]
    index, owners, _, lengths = run_index(passages)
    shared = {i for places in found_runs(pa.array(known), index, lengths).values() for place in places for i in owners[place]}
    return [passage for i, passage in enumerate(passages) if i not in shared]


def made_corpus(megabytes:float, pages:bool=False) -> tuple:
    "`(texts, {row: (kind, row it was made from)}, exam, {row: kind of leak})`: installed texts with a tenth injected copies and some leaked evaluation texts."
    rng, texts = random.Random(11), installed_texts(megabytes + 2, pages)
    aside, base = texts[:600], texts[600:]
    exam = exam_texts(aside, base)[:300]
    made = [(text, None, i) for i, text in enumerate(base)]
    made += [(copied(base[i], kind, rng), kind, i) for i in rng.sample(range(len(base)), len(base)//10) for kind in [rng.choice(KINDS)]]
    made += [(leaked(text, kind, base[rng.randrange(len(base))][:300] + str(rng.random())), f'leak {kind}', i) for i, text in enumerate(exam) for kind in [('verbatim', 'upper', 'partial')[i % 3]]]
    rng.shuffle(made)
    place = {source: row for row, (_, kind, source) in enumerate(made) if kind is None}
    copies = {row: (kind, place[source]) for row, (_, kind, source) in enumerate(made) if kind in KINDS}
    return [text for text, _, _ in made], copies, exam, {row: kind for row, (_, kind, _) in enumerate(made) if kind and kind not in KINDS}


def true_pairs(texts:list, least:float=.7):
    "(left, right, Jaccard) of all pairs of texts of at least that Jaccard similarity, found exactly: two such texts share one of their (1 - least) rarest runs."
    import numpy as np, pyarrow as pa
    from k2lab.duplicates import run_sets
    from k2lab.kernels import jaccards
    runs, ends = run_sets(pa.array(texts, pa.large_string()), 5)
    doc, (_, of, spread) = np.repeat(np.arange(len(texts)), np.diff(ends)), np.unique(runs, return_inverse=True, return_counts=True)
    order = np.lexsort((of, spread[of], doc))
    rank = np.arange(len(doc)) - ends[doc]
    rare = order[rank < (1 - least)*np.diff(ends)[doc] + 1]
    rare = rare[np.argsort(of[rare], kind='stable')]
    pairs = [np.empty(0, np.int64)]
    for apart in range(1, int(np.bincount(of[rare]).max())):
        same = of[rare][apart:] == of[rare][:-apart]
        low, high = np.sort(np.stack((doc[rare][:-apart][same], doc[rare][apart:][same])), axis=0)
        pairs.append(np.unique(low*len(texts) + high))
    left, right = np.divmod(np.unique(np.concatenate(pairs)), len(texts))
    found = jaccards(runs, ends, left, right)
    return left[found >= least], right[found >= least], found[found >= least]


def judged(kept:list, n:int, pairs:tuple) -> str:
    "Recall over the pairs of Jaccard 0.8 and more (one of the two is gone), precision over the rows removed: a row 0.7 like it exists, and one is kept."
    import numpy as np
    stays = np.isin(np.arange(n), kept)
    left, right, found = pairs
    close, gone = found >= .8, np.flatnonzero(~stays)
    near = np.union1d(left, right)
    kept_for = np.union1d(left[stays[right]], right[stays[left]])
    return f'removed {len(gone)}, recall {np.mean(~(stays[left] & stays[right])[close]):.4f}, precision {np.isin(gone, near).mean():.4f}, with one kept {np.isin(gone, kept_for).mean():.4f}'


def by_us(work, path:str) -> tuple:
    "(CPU seconds, rows kept) of an operator of ours, from the JSONL file to the table that is kept."
    import pyarrow.json
    began = time.process_time()
    table = pyarrow.json.read_json(path, pyarrow.json.ReadOptions(use_threads=False, block_size=1 << 26))
    kept = work(table)[0]
    return time.process_time() - began, kept['id'].to_pylist()


def peer_python(module:str) -> str:
    "The interpreter of $K2LAB_PEERS (several, parted as in $PATH) that can import a module, or ''."
    for python in filter(None, os.environ.get('K2LAB_PEERS', '').split(os.pathsep)):
        if not subprocess.run([python, '-c', f'import {module}'], capture_output=True).returncode: return python
    return ''


def by_peer(name:str, *told) -> tuple:
    "The same of a peer, in its own process; (None, why) when it cannot run."
    python = peer_python('datatrove' if name.startswith('datatrove') else name.removesuffix('_verified'))
    if not python: return None, 'not installed (K2LAB_PEERS names no Python that has it)'
    done = subprocess.run([python, str(Path(__file__).with_name('peers.py')), name, *told], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': ''})
    if done.returncode: return None, done.stderr.strip().splitlines()[-1]
    said = json.loads(done.stdout.splitlines()[-1])
    return said['seconds'], said['kept']


def corpus_work(exam:list) -> dict:
    "What is measured: {what: (our operator, peers beside it)}."
    from k2lab.duplicates import drop_contaminated, drop_copies, drop_near
    return {'exact copies': (drop_copies, []), 'near-copies, keys only': (lambda t: drop_near(t, least=0, alarm=1), ['datatrove', 'text_dedup', 'datasketch']),
            'near-copies, verified': (lambda t: drop_near(t, alarm=1), ['text_dedup_verified', 'datasketch']), 'decontamination': (lambda t: drop_contaminated(t, exam), ['datatrove_decontaminate'])}


def in_turns(path:str, work:dict, rounds:int, exam_path:str) -> dict:
    "{name: [(CPU seconds, rows kept) of each round]} of our operators and all peers, one after another in each round."
    peers = dict.fromkeys(peer for _, beside in work.values() for peer in beside)
    out = {name: [] for name in [*work, *peers]}
    for what, (operator, _) in work.items(): by_us(operator, path)      # machine code is made before anything is timed
    for i in range(rounds):
        for what, (operator, _) in work.items(): out[what].append(by_us(operator, path))
        for peer in peers:
            if i == 0 or out[peer][0][0] is not None: out[peer].append(by_peer(peer, path, *([exam_path] if 'decontaminate' in peer else [])))
        print(f'round {i+1} of {rounds}', file=sys.stderr)
    return out


def told_corpus(work:dict, times:dict, texts:list, leaks:dict, pairs:tuple):
    "Prints speed, ratios and quality."
    size = sum(len(text.encode()) for text in texts)/1e6
    share = lambda kind, kept: sum(leaks[row] == kind for row in leaks.keys() - set(kept))/list(leaks.values()).count(kind)
    def quality(what, kept):
        if what.startswith('near'): return judged(kept, len(texts), pairs)
        recall = [f'recall {kind} {share(kind, kept):.3f}' for kind in sorted(set(leaks.values()))] if what == 'decontamination' else []
        return ', '.join([f'removed {len(texts) - len(kept)}', *recall])
    for what, (_, peers) in work.items():
        ours = [seconds for seconds, _ in times[what]]
        print(f'{what}: {median_and_range(ours)} s, {size/statistics.median(ours):.0f} MB/s; {quality(what, times[what][0][1])}')
        for peer in peers:
            if times[peer][0][0] is None: print(f'  {peer}: did not run: {times[peer][0][1]}'); continue
            theirs = [seconds for seconds, _ in times[peer]]
            print(f'  {peer}: {median_and_range(theirs)} s, {statistics.median(theirs)/statistics.median(ours):.0f} times as long; {quality(what, times[peer][0][1])}')


def corpus(megabytes:str='20', rounds:str='3'):
    "Speed and quality of `k2lab.duplicates` on one core, on texts of the installed packages with injected copies and leaks."
    from k2lab.duplicates import drop_copies
    texts, copies, exam, leaks = made_corpus(float(megabytes))
    pairs = true_pairs(texts)
    with tempfile.TemporaryDirectory() as folder:
        path, exam_path = f'{folder}/corpus.jsonl', f'{folder}/exam.json'
        with open(path, 'w') as out: out.writelines(json.dumps(dict(id=i, text=text)) + '\n' for i, text in enumerate(texts))
        with open(exam_path, 'w') as out: json.dump(exam, out)
        print(f'{sum(len(t.encode()) for t in texts)/1e6:.1f} MB, {len(texts)} texts, {len(copies)} copies of {len(KINDS)} kinds and {len(leaks)} leaks injected, {len(pairs[0])} pairs of Jaccard 0.7 and more', flush=True)
        work = corpus_work(exam)
        told_corpus(work, in_turns(path, work, int(rounds), exam_path), texts, leaks, pairs)


# ---- shards: reading and writing ----------------------------------------------------------------------------------------------

def copy_seconds(path:str) -> float:
    "CPU seconds from a JSONL file through Arrow tables to shards with their manifests and hashes, imports excluded."
    from k2lab.units import Plan, plan_units, run_units
    with tempfile.TemporaryDirectory() as at:
        Path(at, 'one.jsonl').write_text('{"text": "what is imported on the way is there now"}')
        run_units(plan_units(f'{at}/one.jsonl'), Plan(), f'{at}/one')
        began = time.process_time()
        run_units(plan_units(path), Plan(), f'{at}/all')
        return time.process_time() - began


def copied_by_us(path:str) -> float:
    "The same in a process of its own, as the peer has one: in a heap full of texts every line would be a cache miss."
    return float(subprocess.run([sys.executable, '-c', f'from k2lab.bench import copy_seconds; print(copy_seconds({path!r}))'], capture_output=True, text=True, check=True).stdout)


def shards(megabytes:str='60', rounds:str='3'):
    "Speed of reading and writing JSONL on one core, on texts of the installed packages, short ones and ones of about 5 kB."
    texts = installed_texts(float(megabytes))
    with tempfile.TemporaryDirectory() as folder:
        for name, each in (('as they are', 1), ('joined by threes', 3)):
            path = f'{folder}/{each}.jsonl'
            with open(path, 'w') as out: out.writelines(json.dumps(dict(text='\n'.join(texts[i:i+each]), source='installed'), ensure_ascii=False) + '\n' for i in range(0, len(texts), each))
            size, times = os.path.getsize(path)/1e6, [(copied_by_us(path), *by_peer('datatrove_copy', path)) for _ in range(int(rounds))]
            ours = [t[0] for t in times]
            print(f'{name}, {len(texts)//each} texts, {size:.0f} MB: {median_and_range(ours)} s, {size/statistics.median(ours):.0f} MB/s')
            if times[0][1] is None: print(f'  datatrove: did not run: {times[0][2]}')
            else: print(f'  datatrove: {median_and_range([t[1] for t in times])} s, {statistics.median(t[1] for t in times)/statistics.median(ours):.1f} times as long', flush=True)


# ---- privacy: private parts, on letters whose private parts are known ---------------------------------------------------------

def drawn(rng, n:int, letters:str='ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789') -> str:
    "n random letters."
    return ''.join(rng.choices(letters, k=n))


def digits(rng, n:int) -> str:
    "n random digits."
    return drawn(rng, n, '0123456789')


def with_check(head:str) -> str:
    "Digits with the check digit (Luhn) that makes them a card number."
    from k2lab.privacy import luhn
    return head + next(d for d in '0123456789' if luhn((head + d).encode()))


def iban_of(rng) -> str:
    "An IBAN, in fours or in one piece."
    from k2lab.privacy import mod97
    country, head = rng.choice([('DE', digits(rng, 18)), ('FR', digits(rng, 10) + rng.choice('AKZ') + digits(rng, 12)), ('GB', 'WEST' + digits(rng, 14)), ('NL', 'ABNA' + digits(rng, 10)), ('NO', digits(rng, 11))])
    whole = next(f'{country}{i:02}{head}' for i in range(2, 99) if mod97(f'{country}{i:02}{head}'.encode()))
    return whole if rng.random() < .5 else ' '.join(whole[i:i+4] for i in range(0, len(whole), 4))


def card_of(rng) -> str:
    "A card number, in one piece or in groups."
    head = rng.choice(['4', '51', '55', '2345', '37', '6011', '36'])
    whole = with_check(head + digits(rng, {'37': 14, '36': 13}.get(head, 15) - len(head)))
    mark = rng.choice(['', ' ', '-'])
    return mark.join(whole[i:i+4] for i in range(0, 16, 4)) if len(whole) == 16 else mark.join((whole[:4], whole[4:10], whole[10:]))


def private_value(kind:str, rng) -> tuple:
    "(what stands before, the private part, what stands after) of a kind; a tenth of the telephone numbers has nothing to be known by."
    name, n = rng.choice(['ada', 'j.müller', 'Chen_Wei', "o'neil", 'r2-d2+spam', 'K.Sato']), lambda k: digits(rng, k)
    host = rng.choice(['lovelace.org', 'uni-ulm.de', 'mail.keio.ac.jp', 'proton.me', 'straßen.de', 'acme.technology'])
    area = f'{rng.randrange(2, 10)}{n(2)}'
    pick = dict(EMAIL=[('', f'{name}@{host}', ''), ('<', f'{name}@{host}', '>'), ('mailto:', f'{name}@{host}', '')],
                PHONE=[('', f'+49 {rng.randrange(150, 180)} {n(7)}', ''), ('', f'+1-{area}-{area}-{n(4)}', ''), ('', f'({area}) {area}-{n(4)}', ''), ('tel. ', f'0{rng.randrange(100, 999)} {n(6)}', ''), ('', f'+33 6 {n(2)} {n(2)} {n(2)} {n(2)}', ''), ('', f'+86{rng.randrange(10**10, 2*10**10)}', ''),
                       ('', f'{area}-{area}-{n(4)}', ''), ('Phone: ', f'{area} {area} {n(4)}', ''), ('Fax ', f'(0{n(3)}) {n(3)} {n(3)}', ''), ('reach me at ', f'020 {rng.randrange(1000, 9999)} {n(4)}', '')],
                IP=[('', '.'.join(str(x) for x in (rng.choice([23, 93, 141, 185, 217]), *rng.choices(range(256), k=3))), after) for after in ('', ':8080')] + [('[', f'2a0{rng.randrange(1, 9)}:{drawn(rng, 3, "abcdef123")}:{drawn(rng, 4, "abcdef123")}::{drawn(rng, 2, "abcdef123")}', ']')],
                IBAN=[('', iban_of(rng), '')], CARD=[('', card_of(rng), ''), ('number=', card_of(rng), '')], SSN=[('SSN ', f'{rng.randrange(100, 600)}-{rng.randrange(10, 99)}-{rng.randrange(1000, 9999)}', ''), ('', f'{rng.randrange(100, 600)}-{rng.randrange(10, 99)}-{rng.randrange(1000, 9999)}', '')],
                TOKEN=[('', f'ghp_{drawn(rng, 36)}', ''), ('', f'hf_{drawn(rng, 34)}', ''), ('key ', f'sk-proj-{drawn(rng, 48)}', ''), ('', f'AKIA{drawn(rng, 16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")}', ''), ('aws_secret_access_key = ', drawn(rng, 40), ''), ('"api_key": "', drawn(rng, 32, '0123456789abcdef'), '"')],
                CREDENTIALS=[('postgres://', f'{drawn(rng, 5)}:{drawn(rng, 12)}', '@db.host.org/x')])
    return rng.choice(pick[kind])


def decoy(rng) -> str:
    "Something that looks private and is not."
    n = lambda k: digits(rng, k)
    octets = '.'.join(str(rng.randrange(1, 99)) for _ in range(4))
    return rng.choice([f'Version {octets}', f'numpy=={octets}', f'lib-{octets}.tar.gz', f'OID 1.3.6.1.4.{octets}', f'192.168.{rng.randrange(256)}.{rng.randrange(256)}', f'10.0.{rng.randrange(256)}.1', f'ISBN 978-{n(1)}-{n(4)}-{n(4)}-{n(1)}', f'commit {drawn(rng, 40, "0123456789abcdef")}',
                       f'id {n(16)}', f'the number {n(16)}', f'{n(4)}-{rng.randrange(10, 13)}-{rng.randrange(10, 29)}', 'user@example.com', 'icon@2x.png', 'git@github.com:a/b.git', 'a@b.dot(c)', f'π = 3.{n(16)}', f'order no. {n(10)}', 'AKIAIOSFODNN7EXAMPLE', 'sk-your-key-goes-here-and-nowhere',
                       'http://user:password@host/', f'{n(3)}-{n(3)}-{n(3)}', f'{n(2)}:{n(2)}:{n(2)}', f'{n(3)} {n(3)} {n(4)}', f'-{n(10)} to +2147483647', f'part {n(3)}-{n(2)}-{n(4)}', f'std::vector<{n(2)}>', f'{rng.randrange(10**12, 10**13)} ms', f'GB{n(2)}WEST{n(13)}'])


def letters(n:int, seed:int=0) -> list:
    "n texts with what is private in them: [(text, [(start, end, kind)])], in bytes; half of the numbers in them are decoys."
    rng, out = random.Random(seed), []
    fill = 'please find the report of last week about the new release and send what you think of it to the others before we meet'.split()
    for _ in range(n):
        text, parts = '', []
        for _ in range(rng.randrange(1, 5)):
            text += ' '.join(rng.sample(fill, rng.randrange(3, 9))) + ' '
            kind = rng.choice(['EMAIL', 'PHONE', 'IP', 'IBAN', 'CARD', 'SSN', 'TOKEN', 'CREDENTIALS'])
            before, value, after = private_value(kind, rng) if rng.random() < .5 else (decoy(rng), '', '')
            start = len((text + before).encode())
            if value: parts.append((start, start + len(value.encode()), kind))
            text += before + value + after + rng.choice(['. ', ', ', '\n', ' '])
        out.append((text, parts))
    return out


def scored(labelled:list, find) -> tuple:
    "(right, wrong, missed) of a function from bytes to private parts, by exact places and kinds."
    pairs = [(set(parts), set(find(text.encode()))) for text, parts in labelled]
    return sum(len(a & b) for a, b in pairs), sum(len(b - a) for a, b in pairs), sum(len(a - b) for a, b in pairs)


def by_re(work):
    "A call with re2 hidden, so that `re` looks for the same patterns."
    from k2lab import privacy
    real = sys.modules.get('re2')
    sys.modules['re2'] = None
    privacy.engine.cache_clear()
    try:
        with warnings.catch_warnings(action='ignore'): return work()
    finally:
        sys.modules.pop('re2')
        if real: sys.modules['re2'] = real
        privacy.engine.cache_clear()


def cpu_seconds(work) -> float:
    "CPU seconds that a call takes in this process."
    began = time.process_time()
    work()
    return time.process_time() - began


def privacy(megabytes:str='20', rounds:str='3'):
    "Speed of `k2lab.privacy` on one core against plain `re` and datatrove's formatter, on installed texts with letters among them; precision and recall on the letters."
    import pyarrow as pa
    from k2lab.privacy import private, redact
    labelled = letters(4000, 1)
    texts = installed_texts(float(megabytes)) + [text for text, _ in labelled[:600]]
    random.Random(2).shuffle(texts)
    table, size = pa.table(dict(text=texts)), sum(len(text.encode()) for text in texts)/1e6
    counts = redact(table)[1]
    print(f'{size:.1f} MB, {len(texts)} texts, {counts["changed"]} with private parts: {counts["redacted"]}', flush=True)
    def ours_warm():
        redact(table.slice(0, 1000))
        return cpu_seconds(lambda: redact(table))
    with tempfile.TemporaryDirectory() as folder:
        path = as_jsonl(texts, folder)
        times = [(ours_warm(), by_re(ours_warm), by_peer('datatrove_pii', path)) for _ in range(int(rounds))]
    ours = [t[0] for t in times]
    print(f'redact: {median_and_range(ours)} s, {size/statistics.median(ours):.0f} MB/s')
    told_peers(ours, {'plain re, same patterns': [(t[1], None) for t in times], "datatrove's formatter, mail and IPv4 only": [t[2] for t in times]})
    right, wrong, missed = scored(labelled, private)
    print(f'{len(labelled)} letters: precision {right/(right + wrong):.4f}, recall {right/(right + missed):.4f}, F1 {2*right/(2*right + wrong + missed):.4f} (letters and patterns have one author)')


def as_jsonl(texts:list, folder:str) -> str:
    "A file with a row for each text, numbered from 0."
    path = f'{folder}/corpus.jsonl'
    with open(path, 'w') as out: out.writelines(json.dumps(dict(id=str(i), text=text)) + '\n' for i, text in enumerate(texts))
    return path


def told_peers(ours:list, peers:dict):
    "Prints how much longer the peers took: {name: [(seconds or None, rows kept or why not)]}."
    for name, times in peers.items():
        if times[0][0] is None: print(f'  {name}: did not run: {times[0][1]}')
        else: print(f'  {name}: {median_and_range([t[0] for t in times])} s, {statistics.median(t[0] for t in times)/statistics.median(ours):.1f} times as long', flush=True)


# ---- quality: the rules of Gopher, FineWeb and C4 -------------------------------------------------------------------------------

def plainly(work):
    "A call without compiled kernels, so that the twins in plain Python do the work."
    from k2lab import signals
    real, signals.compiled = signals.compiled, lambda kernel: None
    try: return work()
    finally: signals.compiled = real


def web_rules(column) -> list:
    "Numbers of the texts that keep the rules of Gopher and FineWeb."
    from k2lab.quality import FINEWEB, GOPHER, broken, signals
    import numpy as np
    found = signals(column)
    return np.flatnonzero((broken(found, GOPHER)[0] < 0) & (broken(found, FINEWEB)[0] < 0)).tolist()


def quality(megabytes:str='20', rounds:str='3'):
    "Speed of `k2lab.quality` on one core against datatrove's filters, on installed texts; decisions against those of the twins and of datatrove."
    import pyarrow as pa
    from k2lab.quality import c4_lines, drop_poor
    texts = installed_texts(float(megabytes))
    table, size = pa.table(dict(text=texts)), sum(len(text.encode()) for text in texts)/1e6
    kept, pages = web_rules(table['text']), c4_lines(table)
    same = [kept == plainly(lambda: web_rules(table['text'])), pages[0].equals(plainly(lambda: c4_lines(table))[0]), drop_poor(table)[1] == plainly(lambda: drop_poor(table)[1])]
    print(f'{size:.1f} MB, {len(texts)} texts: {len(kept)} keep the rules of Gopher and FineWeb, {len(pages[0])} those of C4, {len(drop_poor(table)[0])} those for a domain; as the twins decide: {same}', flush=True)
    peers = ['datatrove_quality', 'datatrove_quality_split', 'datatrove_c4']
    with tempfile.TemporaryDirectory() as folder:
        path = as_jsonl(texts, folder)
        times = [(cpu_seconds(lambda: web_rules(table['text'])), cpu_seconds(lambda: c4_lines(table)), {peer: by_peer(peer, path) for peer in peers}) for _ in range(int(rounds))]
    for i, (what, beside) in enumerate({'Gopher and FineWeb': peers[:2], 'C4': peers[2:]}.items()):
        ours = [t[i] for t in times]
        print(f'{what}: {median_and_range(ours)} s, {size/statistics.median(ours):.0f} MB/s')
        told_peers(ours, {peer: [t[2][peer] for t in times] for peer in beside})
    for peer in peers[:2]:
        if times[0][2][peer][0] is not None: print(f'{peer} keeps {len(times[0][2][peer][1])}; it decides otherwise on {len(set(kept) ^ set(times[0][2][peer][1]))}')


# ---- tokens: encoding and chaining documents --------------------------------------------------------------------------------------

def kimi():
    "The tokenizer of the folder $K2LAB_KIMI, Kimi's own, or the one that ships with the lab."
    from k2lab.model import shipped
    from k2lab.tokenizer import tokenizer_in
    return tokenizer_in(os.environ.get('K2LAB_KIMI') or shipped('k2'))


def in_rows(ids, length:int=4096) -> bytes:
    "SHA-256 of a stream of ids cut into rows; the last one is left out."
    import hashlib, numpy as np
    rows = np.asarray(ids, np.uint32)[:len(ids)//length*length].reshape(-1, length)
    return hashlib.sha256(rows.tobytes()).digest()


def encoders(tok, texts:list) -> dict:
    "{name: a call that makes a new engine and gives a call that encodes and chains the texts, to the hash of the rows}; each does what its documents show for many texts."
    from itertools import chain
    from unittest.mock import patch
    from k2lab.fast_tokens import ENGINES, encoder, stream
    from k2lab.tokenizer import plain_tokenizer
    chained = lambda lists: in_rows([i for ids in lists for i in chain(ids, (tok.eos_token_id,))])
    def ours():
        encoder.cache_clear()
        encoder(tok).left = 0      # compared already
        return lambda: in_rows(stream(tok, texts, tok.eos_token_id))
    def by_tokenizers():
        plain_tokenizer.cache_clear()
        plain = plain_tokenizer(tok)
        return lambda: chained(one.ids for one in plain.encode_batch_fast(texts, add_special_tokens=False))
    def by_tiktoken():
        with patch('k2lab.fast_tokens.flat', lambda lists: lists): encode = ENGINES['tiktoken'](plain_tokenizer(tok))
        def work():
            with patch('k2lab.fast_tokens.flat', lambda lists: lists): return chained(encode(texts))
        return work
    return dict(ours=ours, tokenizers=by_tokenizers, tiktoken=by_tiktoken)


def tokens(megabytes:str='20', rounds:str='3'):
    "Speed of `k2lab.fast_tokens.stream` on one core against Hugging Face's tokenizers and tiktoken, ids compared; Kimi's vocabulary if $K2LAB_KIMI names its folder."
    os.environ.update(RAYON_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')
    from k2lab.fast_tokens import Encoder
    tok, texts = kimi(), installed_texts(float(megabytes))
    work, size = encoders(tok, texts), sum(len(text.encode()) for text in texts)/1e6
    checked = cpu_seconds(lambda: Encoder(tok)(texts[:1000]))
    print(f'{size:.1f} MB, {len(texts)} texts, {len(tok)} tokens in the vocabulary; to open the engine and compare it on 1,000 texts takes {checked:.1f} s', flush=True)
    times, hashes = [], set()
    for _ in range(int(rounds)):
        calls = {name: make() for name, make in work.items()}
        times.append({name: cpu_seconds(lambda: hashes.add(call())) for name, call in calls.items()})
    ours = [t['ours'] for t in times]
    print(f'encoded and chained: {median_and_range(ours)} s, {size/statistics.median(ours):.0f} MB/s; the same rows of ids from all: {len(hashes) == 1}')
    told_peers(ours, {name: [(t[name], None) for t in times] for name in work if name != 'ours'})


# ---- chain: from JSON lines to a corpus ---------------------------------------------------------------------------------------------

def chain_of(path:str, exam_path:str, tokenizer:str, folder:str) -> tuple:
    "(steps, rows kept, tokens) of the lab's chain: Gopher's rules, private data, copies, near copies, evaluation texts, JSON lines, tokens."
    from k2lab.fast_tokens import stream
    from k2lab.refine import Refining, clear, refine, tables_of, tokenizer_at, unique
    from k2lab.rows import publishing
    from k2lab.shards import Lines
    told, tok = Refining(quality='gopher', least=1, alarm=1), tokenizer_at(tokenizer)
    made = refine([dict(files=path, licence='unknown')], ['bench'], told, folder)
    index, steps = unique(made, told)
    index, last = clear(made, index, dict(exam=json.load(open(exam_path))))
    rows, count = [], 0
    with publishing(Path(folder)/'out.jsonl') as part, publishing(Path(folder)/'out.bin') as ids:
        out = Lines(part, made.texts.schema)
        for table in tables_of(made, index):
            out.write(table)
            chained = stream(tok, table['text'].to_pylist(), tok.eos_token_id)
            ids.write(chained.tobytes())
            count += len(chained)
            rows += [json.loads(more)['id'] for more in table['extra'].to_pylist()]
        out.close()
    return [*made.steps, *steps, last], rows, count


def one_chain(path:str, exam_path:str, tokenizer:str) -> dict:
    "CPU seconds, peak memory and rows kept of the lab's chain; meant for a process of its own. Machine code is made and the tokenizer's engine compared on a part of the file first."
    from k2lab.fast_tokens import encoder
    from k2lab.job import peak_gib
    from k2lab.refine import tokenizer_at
    os.environ.update(RAYON_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', OMP_NUM_THREADS='1')
    with tempfile.TemporaryDirectory() as folder:
        with open(path, 'rb') as whole, open(f'{folder}/part.jsonl', 'wb') as part: part.writelines(line for line, _ in zip(whole, range(4000)))
        chain_of(f'{folder}/part.jsonl', exam_path, tokenizer, f'{folder}/warm')
        encoder(tokenizer_at(tokenizer)).left = 0
        began = time.process_time()
        steps, rows, count = chain_of(path, exam_path, tokenizer, f'{folder}/work')
        return dict(seconds=time.process_time() - began, peak_gib=peak_gib(), steps=steps, rows=rows, tokens=count)


def chain(megabytes:str='20', rounds:str='3'):
    "From JSON lines to a corpus and its tokens on one core, against datatrove's blocks for the same steps, with and without its own word tokenizer; CPU seconds. Documents are pages: the docstrings of a file."
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    from k2lab.corpus import conserved, funnel
    from k2lab.model import shipped
    texts, _, exam, leaks = made_corpus(float(megabytes), pages=True)
    tokenizer, peers = os.environ.get('K2LAB_KIMI') or str(shipped('k2')), ['datatrove_chain', 'datatrove_chain_split']
    with tempfile.TemporaryDirectory() as folder:
        path, exam_path = f'{folder}/corpus.jsonl', f'{folder}/exam.json'
        with open(path, 'w') as out: out.writelines(json.dumps(dict(id=i, text=text, source='bench')) + '\n' for i, text in enumerate(texts))
        with open(exam_path, 'w') as out: json.dump(exam, out)
        size, alone = os.path.getsize(path)/1e6, lambda: ProcessPoolExecutor(1, mp_context=get_context('spawn')).submit(one_chain, path, exam_path, tokenizer).result()
        runs = [(alone(), {peer: by_peer(peer, path, exam_path, f'{shipped("k2")}/tokenizer.json') for peer in peers}) for _ in range(int(rounds))]
    ours, first = [run['seconds'] for run, _ in runs], runs[0][0]
    print(f'{size:.1f} MB: {median_and_range(ours)} s, {size/statistics.median(ours):.1f} MB/s, peak {max(run["peak_gib"] for run, _ in runs):.2f} GiB, {len(first["rows"])} of {len(texts)} documents kept, {first["tokens"]} tokens; '
          f'books balance: {not conserved(first["steps"])}; leaks left: {len(leaks.keys() & set(first["rows"]))} of {len(leaks)}')
    for step in funnel(first['steps']): print('  ', *step)
    told_peers(ours, {peer: [run[1][peer] for run in runs] for peer in peers})


BENCHES = {'run': run, 'train': train, 'corpus': corpus, 'shards': shards, 'privacy': privacy, 'quality': quality, 'tokens': tokens, 'chain': chain}

if __name__ == '__main__':
    try: BENCHES[one_of('bench', sys.argv[1] if len(sys.argv) > 1 else '', BENCHES)](*sys.argv[2:])
    except LabError as e: sys.exit(f'k2lab.bench: {e}')
