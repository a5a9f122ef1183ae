"""Rows as aligned text that fits the terminal."""

import itertools
import shutil
import textwrap
import unicodedata
from collections.abc import Iterable

from k2lab.lab.display import short


def wide(text: str) -> int:
    "The columns that a text takes on a terminal: two for an ideograph, none for a combining mark."
    if text.isascii():
        return len(text)
    double = sum(unicodedata.east_asian_width(c) in 'WF' for c in text)
    return len(text) + double - sum(bool(unicodedata.combining(c)) for c in text)


def cut(text: str, width: int) -> str:
    "A text of at most `width` columns; what was cut off is shown as `…`."
    if wide(text) <= width:
        return text
    while text and wide(text) >= width:
        text = text[:-1]
    return f'{text.rstrip()}…'


def cut_name(text: str, width: int) -> str:
    "As `cut`, but of `name 0.500 -> 0.750` the numbers stay, with as much of the name as there is room for."
    name, _, numbers = text.partition(' ')
    room = width - wide(numbers) - 1
    if wide(text) <= width or room < -1:
        return cut(text, width)
    return f'{cut(name, room)} {numbers}' if room > 3 else numbers


def text_table(header: list, rows: list) -> str:
    "Rows as aligned text, under a header unless it is empty."
    cells = [[one_line(c) for c in row] for row in ([header] if header else []) + rows]
    width = [max(map(wide, column)) for column in zip(*cells)]
    return '\n'.join(aligned(row, width) for row in cells)


def one_line(value) -> str:
    "A cell's value as one line of text."
    text = short(value)
    return text if text.isprintable() else ''.join(c if c.isprintable() else ' ' for c in text)


def aligned(row: Iterable[str], width: list[int]) -> str:
    "One row of a table, each cell filled up to its width."
    return '  '.join(cell + ' ' * (w - wide(cell)) for cell, w in zip(row, width)).rstrip()


# what is shortened first where a table is too wide, and down to what width; the name of a run comes last
SHORTENED = (
    *(('status', 24), ('reason', 12), ('note', 12), ('measure', 24), ('parents', 13)),
    *(
        ('campaign', 10),
        ('status', 12),
        ('tag', 8),
        ('measure', 14),
        ('status', 9),
        ('campaign', 6),
    ),
)


def narrowed(header: list[str], width: list[int], room: int) -> list[int]:
    "The widths of a table's columns, so that all of them fit into `room`."
    width, over = list(width), sum(width) + 2 * len(width) - 2 - room
    for name, least in SHORTENED:
        if name in header and over > 0:
            at = header.index(name)
            less = max(0, min(over, width[at] - least))
            width[at], over = width[at] - less, over - less
    while over > 0 and max(width) > 1:
        width[width.index(max(width))] -= 1
        over -= 1
    return width


def fitting_table(header: list[str], rows: list[list], room: int = 0) -> str:
    "Rows as a table that fits into `room` columns, or the terminal's (80 where there is none)."
    cells = [header, *([one_line(c) for c in row] for row in rows)]
    room = room or shutil.get_terminal_size().columns
    width = narrowed(header, [max(map(wide, column)) for column in zip(*cells)], room)
    cutting = [cut_name if name == 'measure' else cut for name in header]
    shortened = ([to(c, w) for to, c, w in zip(cutting, row, width)] for row in cells)
    return '\n'.join(aligned(row, width) for row in shortened)


def text_width() -> int:
    "The columns of a text to read: the terminal's (80 where there is none), at most 100."
    return min(100, shutil.get_terminal_size().columns)


def wrapped_table(rows: list[tuple[str, str, str]]) -> str:
    "Three columns as text that fits the terminal; long meanings and values are wrapped."
    first = max(len(row[0]) for row in rows) + 2
    last = min(max(len(row[2]) for row in rows), 30)
    middle = min(max(len(row[1]) for row in rows) + 2, max(24, text_width() - first - last))
    lines = []
    for name, meaning, value in rows:
        columns = textwrap.wrap(meaning, middle - 2), textwrap.wrap(value, max(last, 1))
        for head, left, right in itertools.zip_longest([name], *columns, fillvalue=''):
            lines.append(f'{head:{first}}{left:{middle}}{right}'.rstrip())
    return '\n'.join(lines)
