"""How a run is doing, in one line."""

import shutil
import sys
import time
from datetime import datetime, timezone

from k2lab.lab.display import clock, describe


class Progress:
    "One line about the stage at work: rewritten in place on a terminal, a plain line every half minute elsewhere."

    def __init__(self, stage: str, i: int = 1, n: int = 1):
        self.head = f'[{i}/{n}] {stage}' if n > 1 else stage
        self.began, self.printed, self.tty = time.monotonic(), 0, sys.stderr.isatty()

    def __call__(self, row: dict):
        "Show one line of metrics.jsonl; it stays if it says so."
        if row.get('stays'):
            self.note(describe(row))
        else:
            self.say(f'{self.head}  {describe(row)}')

    def say(self, text: str):
        "Put `text` on the line, or print it when enough time has passed."
        if self.tty:
            sys.stderr.write('\r\x1b[K' + text[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
        elif time.monotonic() - self.printed > 30 or not self.printed:
            print(text, file=sys.stderr, flush=True)
            self.printed = time.monotonic()

    def note(self, text: str):
        "Leave a line that stays."
        sys.stderr.write(('\r\x1b[K' if self.tty else '') + f'{self.head}  {text}\n')
        sys.stderr.flush()

    def end(self, record: dict):
        "Leave one final line about the run."
        self.note(f'{outcome(record)}  {clock(wall(record))}')


def begun(record: dict) -> datetime | None:
    "When a run started, or was resumed; None if its record does not say."
    resumed = [attempt.get('resumed') for attempt in record.get('attempts', [])]
    try:
        at = datetime.fromisoformat((resumed or [record.get('started')])[-1])
    except (TypeError, ValueError):
        return None
    return at if at.tzinfo else at.replace(tzinfo=timezone.utc)


def wall(record: dict) -> float:
    "The seconds that a run took; for one that is running, those it has taken so far."
    at = begun(record)
    if record['status'] == 'running' and at:
        return max(0.0, (datetime.now(timezone.utc) - at).total_seconds())
    return record.get('wall_s') or 0


def outcome(record: dict) -> str:
    "The status of a run: its reason, since when it runs, or where it stands in the queue of a cluster."
    if record['status'] == 'prepared' and 'slurm' in record and shutil.which('squeue'):
        from k2lab.lab.slurm import waiting

        return waiting(record['folder']) or 'prepared: Slurm does not have it any more'
    if record['status'] == 'running' and not record.get('edited') and (at := begun(record)):
        here, today = at.astimezone(), datetime.now(timezone.utc).astimezone()
        same_day = here.date() == today.date()
        return f"running since {here:{'%H:%M' if same_day else '%Y-%m-%d %H:%M'}}"
    from k2lab.lab.records import standing

    return standing(record)
