"""Commands that change what is said about a run: promote, tag, note."""

import re
from datetime import datetime, timezone
from pathlib import Path

from k2lab.cli.progress import outcome
from k2lab.lab.config import LabError, one_of


def promote_run(words: list, options: dict) -> int:
    "Let a run that failed its gate take over the names of what it saved."
    from k2lab.lab.records import promote, saved_by

    record = promote(words[0], options['because'] or '')
    folder = Path(record['folder'])
    print(f'{folder.parent.name}/{folder.name}: {outcome(record)}')
    for name in record['saves']:
        now = saved_by(folder.parent, name, record['scale'])
        print(f'  {name} means {now.name if now else "nothing"}')
    return 0


def tag_run(words: list, options: dict) -> int:
    "Give a run a tag, or take it away."
    from k2lab.lab.records import amending, find_run

    folder, tag = find_run(words[0]), words[1]
    if not re.fullmatch(r'[^\W_][\w.-]*', tag) or len(tag) > 40:
        raise LabError(f"tag '{tag[:40]}': use up to 40 letters, digits, '-', '_' and '.'")
    with amending(folder) as record:
        tags = record.get('tags', [])
        others = [t for t in tags if t != tag]
        if options['remove']:
            one_of('tag', tag, tags, folder.name)
        record['tags'] = others if options['remove'] else [*others, tag]
    print(f"{folder.parent.name}/{folder.name}: {', '.join(record['tags']) or 'no tags'}")
    return 0


def note_run(words: list, options: dict) -> int:
    "Add a note to a run."
    from k2lab.lab.records import amending, find_run

    folder, text = find_run(words[0]), ' '.join(words[1].split())
    if not text:
        raise LabError(f'note {folder.name}: say what: `k2lab note {folder.name} "..."`')
    now = datetime.now(timezone.utc).isoformat(timespec='seconds')
    with amending(folder) as record:
        record['notes'] = [*record.get('notes', []), {'text': text, 'at': now}]
    count = len(record['notes'])
    print(f'{folder.parent.name}/{folder.name}: {count} note{"s" if count > 1 else ""}')
    return 0
