"""Commands that look at runs: list, show, compare."""

from pathlib import Path

from k2lab.cli.progress import outcome
from k2lab.cli.words import parse
from k2lab.lab.config import LabError
from k2lab.lab.display import clock, short


def show_runs(words: list) -> int:
    "List the runs."
    from k2lab.lab.records import campaign_of, runs

    options, rest = parse(words, 'campaign')
    extra = rest[1:] if rest and not rest[0].startswith('-') and not options['campaign'] else rest
    if extra:
        raise LabError(f"runs does not take '{extra[0]}'; it takes one campaign")
    found = runs(options['campaign'] or (rest[0] if rest else None))
    rows = [
        [
            campaign_of(r),
            Path(r['folder']).name,
            r['scale'],
            r['seed'],
            clock(r.get('wall_s') or 0),
            key_metric(r),
            parents(r),
            outcome(r),
        ]
        for r in found
    ]
    print(
        text_table(
            ['campaign', 'run', 'scale', 'seed', 'wall', 'measure', 'parents', 'status'], rows
        )
        if rows
        else 'no runs yet'
    )
    return 0


def key_metric(record: dict) -> str:
    "A run's first measure, before and after."
    m = next(iter(record['metrics']), None)
    return f"{m['measure']} {short(m['before'])} -> {short(m['after'])}" if m else '-'


def parents(record: dict) -> str:
    "The runs a run read from, by day and number."
    found = dict.fromkeys('-'.join(p['run'].split('-')[:3]) for p in record['parents'] if p['run'])
    return ', '.join(found) or '-'


def show_run(words: list) -> int:
    "Tell what a run did."
    from k2lab.lab.inputs import change_text, provenance_of
    from k2lab.lab.records import find_run, read_run

    if len(words) != 1:
        raise LabError('show needs one run; `k2lab runs` lists them')
    record = read_run(find_run(words[0]))
    print(attempts(record) + run_text(record))
    for change in record.get('inputs_changed', []):
        print(f'  changed: {change_text(change)}')
    origin = provenance_of(record)
    for title, rows in (
        ('config', record['config'].items()),
        ('parents', [(p['name'], p['run'] or p['place']) for p in record['parents']]),
        ('code', origin['git'].items()),
        ('hardware', origin['host'].items()),
        ('versions', origin['package'].items()),
    ):
        print(f'\n{title}')
        print(text_table([], [[f'  {k}', v] for k, v in rows]))
    return 0


def the_run(words: list, command: str) -> str:
    "The one run that a command names."
    if len(words) == 1:
        return words[0]
    raise LabError(f'{command} needs one run; `k2lab runs` lists them')


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


def diff(words: list) -> int:
    "Say what differs between two runs."
    from k2lab.lab.inputs import difference_text
    from k2lab.lab.records import find_run, read_run
    from k2lab.lab.reproduce import input_differences, result_differences

    if len(words) != 2:
        raise LabError('diff needs two runs; `k2lab runs` lists them')
    a, b = (read_run(find_run(w)) for w in words)
    for title, differences in (('inputs', input_differences), ('results', result_differences)):
        found = differences(a, b)
        print(
            f'{title}: {len(found) or "nothing"} differs'
            if len(found) < 2
            else f'{title}: {len(found)} differ'
        )
        for one in found:
            print('  ' + difference_text(one))
    return 0


def text_table(header: list, rows: list) -> str:
    "Rows as aligned text, under a header unless it is empty."
    cells = [[short(c) for c in row] for row in ([header] if header else []) + rows]
    wide = [max(map(len, column)) for column in zip(*cells)]
    return '\n'.join('  '.join(c.ljust(w) for c, w in zip(row, wide)).rstrip() for row in cells)


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
