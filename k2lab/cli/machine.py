"""Commands that look at this machine: whether a scale can run on it."""

from k2lab.lab.config import SCALES, one_of, setting
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
