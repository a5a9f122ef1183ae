"""`k2lab agent`: a talk with a model that uses tools, in this terminal: the model, the tools, what is kept."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from k2lab.cli.making import check_reachable
from k2lab.lab.config import SCALES, LabError, lab_path, load_env, one_of, root, setting
from k2lab.lab.files import one_line, scrub
from k2lab.serving.agent import Limits
from k2lab.serving.client import Teacher
from k2lab.serving.talk import (
    COMMANDS,
    TOUR,
    Agent,
    Lines,
    Recorded,
    Talk,
    new_transcript,
    python_tools,
    recorded_model,
    share,
)
from k2lab.serving.tools import tools_in, toolset
from k2lab.serving.transcripts import Transcript

WAIT = 10  # seconds for a server to say which models it has
MOST = 2**20  # bytes of what it says
PAUSE = 0.02  # seconds between the pieces of a recorded answer
HELP = '/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.'
RECORDED = """A recorded model with real tools: sandboxed python, and a typed function. Enter goes on.
With a model of your own: k2lab agent --endpoint http://127.0.0.1:8000/v1 --model NAME
or a checkpoint:          k2lab agent k2_think_dpo"""


@dataclass
class Model:
    "A model to talk to, and what goes with it."

    teacher: Teacher
    hello: str
    system: str = ''
    window: int = 0  # tokens; 0: unknown
    tour: tuple[Recorded, ...] = ()
    options: dict = field(default_factory=dict)  # of each request


def talk_with_agent(words: list, options: dict) -> int:
    "Talk with an agent; 1 if a question from a pipe has no whole answer."
    options, name = options | check_request(words, options), words[0] if words else ''
    own = own_tools(options['tools'])
    lines = Lines(COMMANDS, history_file())
    with open_model(name, options, lines.typed) as model:
        shares = toolset([share]) if model.tour and 'share' not in own else {}
        chosen = model.options | (
            {} if options['temperature'] is None else dict(temperature=options['temperature'])
        )
        made = Agent(
            model.teacher,
            python_tools() | shares | own,
            fitted(options, model.window),
            model.system if options['system'] is None else options['system'],
            open_transcript(),
            **chosen,
        )
        talk = Talk(made, lines, tour=model.tour, own=own, echo=not lines.typed)
        return converse(talk, model.hello, lines.typed)


def converse(talk: Talk, hello: str, typed: bool) -> int:
    "Hold the conversation; 1 if it came from a pipe and an answer is not whole."
    try:
        if typed:
            print(hello, HELP, *notices(talk), sep='\n')
            talk.go_on()
        talk.run()
        while not talk.taken and talk.tour and not typed:  # an empty pipe: the whole tour
            talk.go_on()
    finally:
        print()
        print(kept(talk), file=sys.stdout if typed else sys.stderr)
    return int(bool(talk.unanswered) and not typed)


def notices(talk: Talk) -> Iterator[str]:
    "What a user should know before the first question."
    from k2lab.tasks.sandbox import why_not

    if why := why_not():
        yield f'The tool python will not run code here: {why}.'
    if talk.own:
        yield f'Your own tools run in this process, not in the sandbox: {", ".join(sorted(talk.own))}.'
    if not talk.agent.transcript:
        yield 'The conversation is not kept: no folder for it can be written.'


def kept(talk: Talk) -> str:
    "Where the conversation is kept; an empty one is removed."
    transcript = talk.agent.transcript
    if not transcript:
        return 'not kept'
    page = transcript.path.with_name(f'{transcript.path.name}.html')
    if not talk.asked:
        page.unlink(missing_ok=True)
        return 'nothing was asked'
    if talk.agent.unwritten:
        return talk.agent.unwritten
    rows = len(transcript.rows) - len(transcript.faults())
    more = f'; to train on: {page.with_suffix(".jsonl")}' if rows > 0 else ''
    return f'kept: {page}{more}'


# ---- what is asked for ---------------------------------------------------------------------------


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


def own_tools(path: str | None) -> dict:
    "The tools of the user's file, none without one."
    tools = tools_in(path) if path else {}
    if 'python' in tools:
        raise LabError(f'{path}: python is the name of the sandboxed tool; rename yours')
    return tools


def fitted(options: dict, window: int) -> Limits:
    "The limits of the options, with no more tokens for an answer than half of the model's window."
    tokens = min(options['tokens'], window // 2) if window else options['tokens']
    return Limits(options['turns'], tokens, options['seconds'])


# ---- where a conversation is kept ----------------------------------------------------------------


def talks_folder() -> Path:
    "The folder of conversations: in the runs of the lab around here, else in this folder."
    try:
        return lab_path('runs') / 'conversations'
    except LabError:
        return Path('conversations')


def history_file() -> Path:
    "The file with the questions of earlier days."
    return talks_folder() / '.history'


def open_transcript() -> Transcript | None:
    "A new transcript; None where none can be written."
    try:
        return new_transcript(talks_folder())
    except OSError:
        return None


# ---- the model -----------------------------------------------------------------------------------


@contextlib.contextmanager
def open_model(name: str, options: dict, typed: bool) -> Iterator[Model]:
    "The model that is asked for, ready to answer, while the block runs."
    if name:
        with checkpoint(name, options) as model:
            yield model
    elif options['endpoint']:
        yield endpoint(options)
    else:
        teacher = recorded_model(pause=PAUSE if typed else 0)
        yield Model(teacher, RECORDED, tour=TOUR)


def endpoint(options: dict) -> Model:
    "The model at an address; `LabError` if nobody answers there, or if it has no such model."
    key = dict(key_env=options['key-env']) if options['key-env'] else {}
    if options['endpoint'] == 'env':
        told = load_env(options['scale'] or setting('lab', 'scale'))['endpoint'] | key
        teacher = Teacher(**told | (dict(model=options['model']) if options['model'] else {}))
    else:
        teacher = Teacher(options['endpoint'], options['model'] or '', **key)
    models = served_models(teacher)
    teacher.model = teacher.model or only_one(teacher, models)
    if models and teacher.model not in models:
        raise LabError(
            f'{scrub(teacher.base_url)}: it has no model {teacher.model!r}; it has {one_line(", ".join(models))}'
        )
    hello = f'{teacher.model} at {scrub(teacher.base_url)}.'
    return Model(teacher, hello, window=models.get(teacher.model, 0))


def only_one(teacher: Teacher, models: dict[str, int]) -> str:
    "The server's model if it has one; `LabError` if one has to be chosen."
    if len(models) != 1:
        which = (
            f': {one_line(", ".join(models))}' if models else ', and it does not say which it has'
        )
        raise LabError(f'{scrub(teacher.base_url)}: which model? give --model NAME{which}')
    return next(iter(models))


def served_models(teacher: Teacher) -> dict[str, int]:
    "`{name: window in tokens, or 0}` of a server's models, {} if it does not tell; `LabError` if nobody is there."
    status, body = asked(teacher, '/models')
    where = scrub(teacher.base_url)
    if status in (401, 403):
        raise LabError(f'{where}: {status}, it wants a key; put it into ${teacher.key_env}')
    if status == 404 and not teacher.base_url.endswith('/v1'):
        if asked(teacher, '/v1/models')[0] == 200:
            raise LabError(f'{where}: the address of the API is {where}/v1')
    try:
        found = json.loads(body)['data']
        return {str(m['id']): int(m.get('max_model_len') or 0) for m in found}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def asked(teacher: Teacher, path: str) -> tuple[int, bytes]:
    "The status and the first bytes of what a server answers at a path; `LabError` if there is no answer."
    import httpx

    try:
        with httpx.stream(
            'GET', teacher.base_url + path, headers=teacher.headers(), timeout=WAIT
        ) as response:
            return response.status_code, next(response.iter_bytes(MOST), b'')
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, ValueError) as e:
        why = one_line(scrub(str(e))) or type(e).__name__
        raise LabError(f'{scrub(teacher.base_url)}: no answer ({why}); is the server up?') from None


@contextlib.contextmanager
def checkpoint(name: str, options: dict) -> Iterator[Model]:
    "The lab's own server for a checkpoint, by its name, folder or hub id, while the block runs."
    from k2lab.launch_teacher_vllm import Config, serving

    scale = options['scale'] or (setting('lab', 'scale') if in_lab() else 'full')
    place, origin = place_for(name, scale, options['campaign'])
    served_name = Path(name).name.partition('@')[0]
    print(f'starting a server for {served_name} ({origin}) ...', file=sys.stderr)
    log = talks_folder() / f'.server-{os.getpid()}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    with serving(Config(model=served_name), place, log) as served:
        teacher = served.teacher()
        system = load_env(scale)['system'] if in_lab() else ''
        window = served_models(teacher).get(served_name, 0)
        hello = f'{served_name} ({origin}), ready in {served.ready_s:.0f} s.'
        yield Model(teacher, hello, system, window, options=dict(temperature=0.6))
    log.unlink(missing_ok=True)


def in_lab() -> bool:
    "Whether there is a lab around here."
    try:
        return bool(root())
    except LabError:
        return False


def place_for(name: str, scale: str, campaign: str | None) -> tuple[str | Path, str]:
    "Where a checkpoint lies, and that in words; `LabError` if it is not there."
    if Path(name).is_dir():
        if not (Path(name) / 'config.json').exists():
            raise LabError(f'{name}: is no checkpoint, it has no config.json')
        return Path(name).resolve(), 'a folder'
    if not in_lab():
        check_reachable(name)
        return name, 'from the hub'
    from k2lab.lab.names import parent_of, place_of

    campaign = campaign or campaign_with(name, scale)
    folder = lab_path('runs') / campaign / 'agent'
    job = SimpleNamespace(campaign=campaign, scale=scale, env=load_env(scale), folder=folder)
    parent = parent_of(job, name)
    origin = f'{parent["campaign"]}/{parent["run"]}' if parent['run'] else str(parent['place'])
    return place_of(parent), origin


def campaign_with(name: str, scale: str) -> str:
    "The campaign with the newest promoted run that saved a name, `scratch` if none did."
    from k2lab.lab.records import read_run, saved_by, started_at, visible_folders

    bare = name.partition('@')[0]
    found = filter(
        None, (saved_by(home, bare, scale) for home in visible_folders(lab_path('runs')))
    )
    newest = max(found, key=lambda folder: started_at(read_run(folder)), default=None)
    return newest.parent.name if newest else 'scratch'
