"""Commands that look at single runs: show and compare."""

from pathlib import Path

from k2lab.cli.progress import begun, outcome, wall
from k2lab.cli.tables import text_table
from k2lab.lab.display import clock
from k2lab.lab.files import as_json


def show_run(words: list, options: dict) -> int:
    "Tell what a run did."
    from k2lab.lab.inputs import change_text
    from k2lab.lab.records import find_run, read_run

    record = read_run(find_run(words[0]))
    if options['json']:
        print(as_json(record))
        return 0
    print(attempts(record) + run_text(record) + marks(record))
    for change in record.get('inputs_changed', []):
        print(f'  changed: {change_text(change)}')
    for title, rows in parts(record):
        print(f'\n{title}')
        print(text_table([], [[f'  {k}', v] for k, v in rows]))
    return 0


FILES = {'notebook': 'notebook.ipynb', 'report': 'report.html', 'log': 'log.txt'}


def placed(entry: dict) -> str:
    "Where a phase of a run had its model: `k2_reason_sft on cuda:0 in bfloat16, sdpa, at most 11.2 GiB`."
    peak = f', at most {entry["gpu_peak_gib"]} GiB' if 'gpu_peak_gib' in entry else ''
    return f'{entry["model"]} on {entry["device"]} in {entry["dtype"]}, {entry["attention"]}{peak}'


def parts(record: dict) -> list[tuple[str, list]]:
    "The parts of a record as `(title, rows)`: files, times, placement, config, parents, and what else it read."
    folder, at = Path(record['folder']), begun(record)
    files = [(name, folder / file) for name, file in FILES.items() if (folder / file).exists()]
    times = [('started', f'{at.astimezone():%Y-%m-%d %H:%M:%S %z}')] if at else []
    took = clock(wall(record)) + (' so far' if record['status'] == 'running' else '')
    parents = [(p['name'], p.get('run') or p.get('place')) for p in record['parents']]
    shown = [
        ('files', files),
        ('time', [*times, ('wall', took)]),
        ('placement', [(name, placed(p)) for name, p in record.get('placement', {}).items()]),
        ('memory', memory(record)),
        ('config', list(record['config'].items())),
        ('parents', parents),
        *origin_shown(record),
    ]
    return [(title, rows) for title, rows in shown if rows]


def memory(record: dict) -> list[tuple[str, str]]:
    "What a run was planned to take by phase, and what it took up to there, in GiB; nothing of one without a plan."
    plan = record.get('plan') or {}
    measured = plan.get('measured', {})
    rows = [
        (
            phase,
            f'{size:.2f} GiB planned'
            + (f', {measured[phase]:.2f} measured' if phase in measured else ''),
        )
        for phase, size in plan.get('gib', {}).items()
    ]
    return rows + ([('unknown', plan['unknown'])] if 'unknown' in plan else [])


def origin_shown(record: dict) -> list[tuple[str, list]]:
    "Where a run came from: its commit, what else it read, and its packages or those that an earlier version kept."
    from k2lab.lab.inputs import provenance_of

    origin, inputs = provenance_of(record), record.get('inputs', {})
    if not inputs:
        titles = {'git': 'code', 'host': 'hardware', 'package': 'versions'}
        return [(title, list(origin[kind].items())) for kind, title in titles.items()]
    counted = [(k, f'{len(inputs[k])}, listed by --json') for k in ('code', 'package')]
    listed = [k for k in inputs if k not in ('config', 'data', 'code', 'package')]
    rows = [(f'{kind} {name}', value) for kind in listed for name, value in inputs[kind].items()]
    return [('code', list(origin['git'].items())), ('inputs', [*rows, *counted])]


def marks(record: dict) -> str:
    "The tags and notes of a run as lines of text."
    tags, notes = record.get('tags', []), record.get('notes', [])
    lines = [f'  tags: {", ".join(tags)}'] if tags else []
    lines += [f"  note of {note['at'][:16].replace('T', ' ')}: {note['text']}" for note in notes]
    return ''.join(f'\n{line}' for line in lines)


def attempts(record: dict) -> str:
    "What became of the earlier attempts of a run, as lines of text."
    lines = []
    for a in record.get('attempts', []):
        lines.append(
            f"  {a['ended']} ({a['reason']}), resumed "
            + (
                ' and '.join(
                    f'{phase} from step {step}' for phase, step in a.get('from', {}).items()
                )
                or 'from the start'
            )
        )
        lines += [f'    not taken: {reason}' for reason in a['set_aside']] + [
            f'    changed since: {what}' for what in a['differs']
        ]
    return ''.join(f'{line}\n' for line in lines)


def compared(a: Path, b: Path) -> dict[str, list[tuple]]:
    "`{'inputs': differences, 'results': differences}` of two runs."
    from k2lab.lab.records import read_run
    from k2lab.lab.reproduce import input_differences, result_differences

    first, second = read_run(a), read_run(b)
    return {
        'inputs': input_differences(first, second),
        'results': result_differences(first, second),
    }


def diff(words: list, options: dict) -> int:
    "Say what differs between two runs; 1 if anything does."
    from k2lab.lab.inputs import difference_text
    from k2lab.lab.records import find_run

    a, b = map(find_run, words)
    found = compared(a, b)
    if options['json']:
        names = [f'{f.parent.name}/{f.name}' for f in (a, b)]
        as_rows = lambda rows: [dict(zip(('kind', 'name', 'a', 'b'), row)) for row in rows]
        print(as_json({'a': names[0], 'b': names[1], **{k: as_rows(v) for k, v in found.items()}}))
    else:
        for title, rows in found.items():
            print(f'{title}: {len(rows) or "nothing"} differ{"" if len(rows) > 1 else "s"}')
            print(''.join(f'  {difference_text(row)}\n' for row in rows), end='')
    return int(any(found.values()))


def run_text(record: dict) -> str:
    "A run's outcome, its measures, failed checks and what it saved, as text."
    from k2lab.lab.records import campaign_of

    lines = [
        f"{campaign_of(record)}/{Path(record['folder']).name}: {outcome(record)}",
        f"  in {record['folder']}",
        *([f"  clock: {record['clock']}"] if 'clock' in record else []),
        *(f'  warning: {text}' for text in record.get('warnings', [])),
    ]
    lines += [
        f"  {name}: {save['bytes'] / 2**20:.2f} MiB in {save['files']} files"
        for name, save in record['saves'].items()
    ]
    lines += [f'  no {name}: {why}' for name, why in record.get('not_saved', {}).items()]
    if record['metrics']:
        lines += [
            '',
            text_table(
                ['measure', 'before', 'after', 'n', 'cut'],
                [
                    [m.get(k) for k in ('measure', 'before', 'after', 'n', 'cut')]
                    for m in record['metrics']
                ],
            ),
        ]
    failed = [f"  check failed: {c['name']} {c['detail']}" for c in record['checks'] if not c['ok']]
    gate = gate_text(record)
    return '\n'.join(lines + failed + (['', gate.rstrip()] if gate else []))


def gate_text(record: dict) -> str:
    "The gate of a run as lines of text, and how to promote it where it failed; empty without a gate."
    from k2lab.lab.records import promoted
    from k2lab.lab.show import gate_shown

    gate = record.get('gate')
    if not (gate and gate['lines']):
        return ''
    run, table = Path(record['folder']).name, gate_shown(gate['lines'])
    text = f"gate of {run}: {'passed' if gate['passed'] else 'failed'}\n"
    text += text_table(table.header, table.rows) + '\n'
    way = f'`k2lab promote {run} --because "..."` lets it take over {", ".join(record["saves"])}\n'
    return text + ('' if promoted(record) else way)
