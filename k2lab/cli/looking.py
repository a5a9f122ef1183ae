"""Commands that look at single runs: show and compare."""

from pathlib import Path

from k2lab.cli.progress import begun, outcome, wall
from k2lab.cli.tables import text_table
from k2lab.lab.display import clock, short
from k2lab.lab.files import as_json


def show_run(words: list, options: dict) -> int:
    "Tell what a run did."
    from k2lab.lab.records import find_run, read_run

    record = read_run(find_run(words[0]))
    if options['json']:
        print(as_json(record))
        return 0
    print(attempts(record) + run_text(record) + marks(record))
    for title, rows in parts(record):
        print(f'\n{title}')
        print(text_table([], [[f'  {k}', v] for k, v in rows]))
    return 0


FILES = {'notebook': 'notebook.ipynb', 'report': 'report.html', 'log': 'log.txt'}


def parts(record: dict) -> list[tuple[str, list]]:
    "The parts of a record as `(title, rows)`: files, times, config, parents, and what else it read."
    folder, at = Path(record['folder']), begun(record)
    files = [(name, folder / file) for name, file in FILES.items() if (folder / file).exists()]
    times = [('started', f'{at.astimezone():%Y-%m-%d %H:%M:%S %z}')] if at else []
    took = clock(wall(record)) + (' so far' if record['status'] == 'running' else '')
    parents = [(p['name'], p.get('run') or p.get('place')) for p in record['parents']]
    shown = [
        ('files', files),
        ('time', [*times, ('wall', took)]),
        ('config', list(record['config'].items())),
        ('parents', parents),
        *(
            (title, list(record.get(title, {}).items()))
            for title in ('code', 'hardware', 'versions')
        ),
        *inputs_shown(record.get('inputs', {})),
    ]
    return [(title, rows) for title, rows in shown if rows]


COUNTED = ('code', 'package')  # too many to list


def inputs_shown(inputs: dict) -> list[tuple[str, list]]:
    "The recorded inputs that the config and the parents do not show yet; the longest kinds are counted."
    kinds = {k: v for k, v in inputs.items() if k not in ('config', 'data') and k not in COUNTED}
    counted = [(k, f'{len(inputs[k])}, listed by --json') for k in COUNTED if k in inputs]
    rows = [(f'{kind} {k}', v) for kind, values in kinds.items() for k, v in values.items()]
    return [('inputs', [*rows, *counted])]


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


def difference_text(difference: tuple) -> str:
    "One difference in words."
    kind, name, a, b = difference
    cut = lambda v: short(v) if not isinstance(v, str) or len(v) < 20 else v[:12] + '…'
    return f'{kind} {name}: {cut(a)} -> {cut(b)}'


def compared(a: Path, b: Path) -> dict[str, list[tuple]]:
    "`{'inputs': differences, 'results': differences}` of two runs."
    from k2lab.lab.reproduce import differences, inputs, results, with_env

    first, second = with_env(a), with_env(b)
    return {
        'inputs': differences(inputs(first), inputs(second)),
        'results': differences(results(first), results(second)),
    }


def diff(words: list, options: dict) -> int:
    "Say what differs between two runs; 1 if anything does."
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
    ]
    lines += [
        f"  {name}: {save['bytes'] / 2**20:.2f} MiB in {save['files']} files"
        for name, save in record['saves'].items()
    ]
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
