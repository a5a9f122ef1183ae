"""The command `k2lab agent`: its options, checked before anything is opened."""

import re

from k2lab.cli.running import CAMPAIGN, SCALE
from k2lab.cli.words import Command, Option
from k2lab.lab.config import SCALES, LabError, one_of


def agent(words: list, options: dict) -> int:
    "Talk with an agent; 1 if a question from a pipe has no whole answer."
    numbers = check_request(words, options)
    from k2lab.cli.agent_talk import hold

    return hold(words[0] if words else '', options | numbers)


def check_request(words: list, options: dict) -> dict:
    "The numbers among the options; `LabError` for options that do not fit together."
    if words and options['endpoint']:
        raise LabError('agent: give a checkpoint or --endpoint, not both')
    if options['model'] and not options['endpoint']:
        raise LabError(
            f"agent: --model belongs to --endpoint; a checkpoint is `k2lab agent {options['model']}`"
        )
    if options['key-env'] and not re.fullmatch(r'[A-Za-z_]\w*', options['key-env']):
        raise LabError(
            'agent: --key-env is the NAME of the variable that holds the key, never the key'
        )
    if options['scale']:
        one_of('scale', options['scale'], SCALES)
    return dict(
        turns=number(options, 'turns', int, 8),
        tokens=number(options, 'tokens', int, 4096),
        seconds=number(options, 'seconds', float, 300),
        temperature=number(options, 'temperature', float, None, least=0),
    )


def number(options: dict, name: str, kind: type, usual, least: float = 1e-3):
    "A number among the options; `LabError` for what is none, or too small."
    text = options[name]
    if text is None:
        return usual
    try:
        value = kind(text)
    except ValueError:
        value = float('nan')
    if not least <= value < 1e9:
        what = (
            'a whole number above 0'
            if kind is int
            else 'a number from 0 on'
            if not least
            else 'a number above 0'
        )
        raise LabError(f"agent: --{name} takes {what}, this is '{text}'")
    return value


AGENT = Command(
    agent,
    'talk with a model that uses tools: a recorded one, one at an address, or a checkpoint',
    '[CHECKPOINT]',
    (
        Option(
            'endpoint',
            'the address of an OpenAI-compatible server; alone, that of configs/env.yaml',
            '[URL]',
            alone='env',
        ),
        Option('model', 'the name that the server gives the model', 'NAME'),
        Option('key-env', 'the NAME of the variable with the key (K2LAB_API_KEY)', 'NAME'),
        Option(
            'tools',
            'a Python file with functions of your own; they run as you, not in the sandbox',
            'FILE.py',
        ),
        Option('system', 'the system text', 'TEXT'),
        Option('temperature', 'of sampling', 'T'),
        Option('turns', 'most replies of the model to one question (8)', 'N'),
        Option('tokens', 'most generated tokens for one question (4096)', 'N'),
        Option('seconds', 'most seconds for one question (300)', 'N'),
        SCALE,
        CAMPAIGN,
    ),
    'k2lab agent --endpoint http://127.0.0.1:8000/v1 --model NAME',
)
