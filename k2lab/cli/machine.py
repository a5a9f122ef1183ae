"""Commands that look at this machine: whether a scale can run on it, whether its numbers are right, how fast it is."""

from k2lab.cli.tables import wrapped_table
from k2lab.lab.config import SCALES, LabError, one_of, setting
from k2lab.lab.files import as_json


def doctor(words: list, options: dict) -> int:
    "Print a line for each check of a scale; 1 if the scale cannot run here."
    from k2lab.scale.doctor import as_report, examine, verdict

    scale = one_of('scale', options['scale'] or setting('lab', 'scale'), SCALES)
    findings = examine(scale)
    report = as_report(scale, findings)
    if options['json']:
        print(as_json(report))
    else:
        print(*findings, verdict(scale, findings), sep='\n')
    return int(not report['can_run'])


def selftest(words: list, options: dict) -> int:
    "Test and measure the GPU or the CPU of this machine; 1 if a block fails."
    from k2lab.scale import selftest as s

    named = options['blocks']
    only = tuple(filter(None, named.replace(' ', '').split(','))) if named else ()
    if named is not None and not only:
        raise LabError(f"--blocks names no block; there are: {', '.join(s.BLOCKS)}")
    tell = lambda line: None if options['json'] else print(line, flush=True)
    record = s.selftest(words[0], only=only, tell=tell)
    if options['json']:
        print(as_json(record))
    else:
        print(f'\n{selftest_text(record)}')
    return int(record['status'] != 'complete')


def selftest_text(record: dict) -> str:
    "The table of a self-test as text, and where its run is."
    from k2lab.lab.records import standing
    from k2lab.scale.selftest import lines_of

    lines = [(block, what, value) for block, what, value in lines_of(record['selftest'])]
    return f"{wrapped_table(lines)}\n{record['folder']}: {standing(record)}"
