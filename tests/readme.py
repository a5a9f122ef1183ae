"""README.md from the index notebook, and its measured figures from the reports that are kept in
runs/evidence. `--write` generates it; without, a stale README fails.
"""

import json
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / 'runs/evidence'
LINK = re.compile(r'(?<=\]\()(?!\w+:|#)([^)#]+)')
MEASURED = '<!-- measured -->'  # the place in the index notebook where the figures go


def from_root(cell: str) -> str:
    "A markdown cell whose relative links, outside fenced code, start at the root instead of `nbs/`."
    parts = cell.split('```')
    prose = [LINK.sub(lambda m: posixpath.normpath(f'nbs/{m[1]}'), part) for part in parts[::2]]
    parts[::2] = prose
    return '```'.join(parts)


def table(header: list, rows: list) -> str:
    "A table in Markdown."
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in lines)


def value(score: dict | None) -> str:
    "A score with its interval, a dagger if it is of the development side."
    from k2lab.reports.results import with_interval

    if not score:
        return '-'
    own = score['value']
    text = with_interval(dict(own, measure=score['measure'], after=own['value']))
    return text + ('' if score['side'] == 'evaluation' else ' †')


MAIN = ('domain_questions', 'reasoning_verified', 'domain_bits_per_byte', 'general_bits_per_byte')


def score_table(report: dict) -> str:
    "The main measures by checkpoints; the report has the others."
    from k2lab.reports.results import about

    found = {(s['measure'], s['checkpoint']): s for s in report['scores']}
    measures = [m for m in MAIN if m in {at[0] for at in found}]
    names = list(dict.fromkeys(at[1] for at in found))
    order = [m['name'] for m in report['campaigns'][0]['models']]
    names.sort(key=lambda n: order.index(n) if n in order else len(order))  # bases first
    rows = [[about(m).label, *(value(found.get((m, n))) for n in names)] for m in measures]
    return table(['', *names], rows)


def picture(folder: Path, where: str) -> list[str]:
    "The picture of a report, if one was taken."
    says = 'The top of the report: result and loss in a sentence, then checkpoints by measures'
    return [f'![{says}]({where}/report.png)'] if (folder / 'report.png').exists() else []


def missed(goals: list[dict]) -> str:
    "The goals that were not reached and those of which it cannot be said, with their values."
    said = lambda verdict: [
        f'{g["says"]} ({g["reached"]})' for g in goals if g['verdict'] == verdict
    ]
    kinds = {v: said(v) for v in ('not reached', 'cannot be said', 'not measured')}
    return '\n'.join(f'- {v.capitalize()}: {"; ".join(some)}.' for v, some in kinds.items() if some)


def measured(folder: Path) -> str:
    "What the reports that are kept in a folder say: lead, scores with intervals, goals."
    parts = []
    for path in sorted(folder.glob('*/report.json')):
        report = json.loads(path.read_text(encoding='utf-8'))
        where = posixpath.join('runs/evidence', path.parent.name)
        campaigns = ', '.join(c['campaign'] for c in report['campaigns'])
        facts = report['facts']
        parts += [
            f'**{campaigns}** (scale {report["scale"]}, seed {facts["seed"]}; {facts["hardware"]}; '
            f'{facts["wall time of all runs"]}). {report["lead"]} {report["goals_reached"]}',
            *picture(path.parent, where),
            score_table(report),
            missed(report['goals']),
            f'[Its pages, notebooks and numbers]({where}/README.md).',
        ]
    return '\n\n'.join(parts) or 'No report is kept in runs/evidence yet.'


def readme() -> str:
    "The text of README.md: the markdown cells of nbs/index.ipynb, with the measured figures."
    cells = json.loads((ROOT / 'nbs/index.ipynb').read_text())['cells']
    if any(cell['cell_type'] != 'markdown' for cell in cells):
        raise SystemExit('nbs/index.ipynb: only markdown cells can be part of README.md')
    text = '\n\n'.join(from_root(''.join(cell['source']).strip()) for cell in cells) + '\n'
    return text.replace(MEASURED, measured(EVIDENCE))


if __name__ == '__main__':
    if '--write' in sys.argv[1:]:
        (ROOT / 'README.md').write_text(readme())
    elif (ROOT / 'README.md').read_text() != readme():
        sys.exit('README.md is not the index notebook: python tests/readme.py --write')
