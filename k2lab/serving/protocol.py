"""The requests that the embedded server takes, field by field, and the one line for a request that it refuses.

Fields have vLLM's names, types and limits. A field that the server does not act on is taken at its neutral
value only, and an unknown one is refused by its name: nothing that was asked for is ignored. `null` is a field
left out.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

MOST_BYTES = 2**24  # of a request's body
Text = Annotated[str, Field(min_length=1)]


class Refused(Exception):
    "A request that is refused: the HTTP status, one line, and the field that it is about."

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param


def shown(value) -> str:
    "A value as a message quotes it: short, on one line."
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:56]}...{text[-1]}'


def one_line(text: str) -> str:
    "A text on one line of at most 400 characters."
    text = ' '.join(text.split())
    return text if len(text) <= 400 else f'{text[:397]}...'


class Fields(BaseModel):
    "Fields that are checked as JSON has them: no number for a text, no text for a number, no unknown name."

    model_config = ConfigDict(extra='forbid', strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple]] = {}  # fields without an effect here, and their only values

    @model_validator(mode='before')
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        "The fields that say something; `ValueError` for another value where only a neutral one is taken."
        if not isinstance(given, dict):
            return given
        for name, values in cls.neutral.items():
            if name in given and given[name] is not None and given[name] not in values:
                valid = ' or '.join(map(shown, values)) or 'null'
                raise ValueError(f'{name}: only {valid} here, not {shown(given[name])}')
        known = cls.model_fields.keys() | cls.neutral.keys()
        said = {k: v for k, v in given.items() if v is not None or k not in known}
        return {k: v for k, v in said.items() if k not in cls.neutral}


def wrapped(kind: type):
    "A validator that takes one of a kind for a list of one."
    return BeforeValidator(lambda value: [value] if isinstance(value, kind) else value)


class StreamOptions(Fields):
    "What a stream carries besides text."

    neutral = dict(continuous_usage_stats=(False,), include_obfuscation=(False,))
    include_usage: bool = False


class Ask(Fields):
    "The fields that both kinds of request share."

    neutral = dict(
        frequency_penalty=(0,),
        presence_penalty=(0,),
        repetition_penalty=(1,),
        length_penalty=(1,),
        min_p=(0,),
        min_tokens=(0,),
        logit_bias=({},),
        bad_words=([],),
        stop_token_ids=([],),
        allowed_token_ids=(),
        logits_processors=(),
        ignore_eos=(False,),
        use_beam_search=(False,),
        include_stop_str_in_output=(False,),
        skip_special_tokens=(False,),
        spaces_between_special_tokens=(True,),
        truncate_prompt_tokens=(),
        prompt_logprobs=(),
        structured_outputs=(),
        response_format=(dict(type='text'),),
        priority=(0,),
        return_token_ids=(False,),
    )
    model: str | None = None
    n: int = Field(1, ge=1, le=64)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)  # 0 and -1: all tokens
    max_tokens: int | None = Field(None, ge=0)
    stop: Annotated[list[Text], wrapped(str), Field(max_length=64)] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # who asks: for the logs of others, no part of the answer
    # 'token_id:17' for a token's text: pieces of a character have no text of their own
    return_tokens_as_token_ids: bool = False

    @property
    def top(self) -> int | None:
        "How many of the likeliest tokens go with each token's log-probability; None if none was asked for."
        raise NotImplementedError

    @property
    def most(self) -> int | None:
        "How many tokens may be generated; None if the request does not say."
        return self.max_tokens

    @model_validator(mode='after')
    def _options_of_a_stream(self):
        if self.stream_options and not self.stream:
            raise ValueError('stream_options: only with stream=true')
        return self

    @property
    def usage_in_stream(self) -> bool:
        "Whether a stream ends with the token counts."
        return bool(self.stream_options and self.stream_options.include_usage)


def _is_prompt(value) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(type(i) is int for i in value)
    )


def _prompts(value) -> list:
    "A list of prompts; `ValueError` for anything but a text, a list of token ids, or a list of these."
    prompts = [value] if _is_prompt(value) and value != [] else value
    if not isinstance(prompts, list) or not all(map(_is_prompt, prompts)):
        raise ValueError('give a text, a list of token ids, or a list of texts or of such lists')
    if not prompts or not all(prompts):
        raise ValueError('an empty prompt; give one token or more')
    return prompts


class CompletionAsk(Ask):
    "A request to /v1/completions."

    neutral = Ask.neutral | dict(best_of=(1,), suffix=('',), add_special_tokens=(True, False))
    prompt: Annotated[Any, AfterValidator(_prompts)]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def top(self) -> int | None:
        return self.logprobs

    @model_validator(mode='after')
    def _something_to_say(self):
        if self.max_tokens == 0 and not self.echo:
            raise ValueError('max_tokens: 0 only with echo=true; give 1 or more')
        return self


class Part(Fields):
    "A part of a message's content."

    type: Literal['text']
    text: str


def _text_or_object(value):
    if not isinstance(value, (str, dict)):
        raise ValueError('give a JSON text or an object')
    return value


class Function(Fields):
    "What a call names: a function, and its arguments as JSON text or as an object."

    name: Text
    arguments: Annotated[Any, AfterValidator(_text_or_object)]
    parsed_arguments: Any = None  # the openai client's own reading of them, which it sends back


class Call(Fields):
    "A tool call of an earlier turn."

    id: str | None = None
    type: Literal['function'] = 'function'
    index: int | None = None  # left by clients that put streamed pieces together
    function: Function

    def plain(self) -> dict:
        "The call as the lab's conversations have it."
        called = dict(name=self.function.name, arguments=self.function.arguments)
        return ({} if self.id is None else dict(id=self.id)) | dict(type=self.type, function=called)


def _parts(value):
    return [dict(type='text', text=value)] if isinstance(value, str) else value


class Message(Fields):
    "A message of the conversation."

    neutral = dict(refusal=('',), annotations=([],), audio=(), function_call=(), parsed=())
    role: Literal['system', 'developer', 'user', 'assistant', 'tool']
    content: Annotated[list[Part], BeforeValidator(_parts)] | None = None
    name: str | None = None
    tool_calls: list[Call] = []
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None

    def plain(self) -> dict:
        "The message as the lab's conversations have it."
        role = 'system' if self.role == 'developer' else self.role  # OpenAI's present name for it
        content = None if self.content is None else ''.join(p.text for p in self.content)
        rest = self.model_dump(exclude_none=True, exclude={'role', 'content', 'tool_calls'})
        calls = [call.plain() for call in self.tool_calls]
        return dict(role=role, content=content, **rest) | (dict(tool_calls=calls) if calls else {})


class Declared(Fields):
    "A function that the model may call; the template prints further keys as they are."

    model_config = ConfigDict(extra='allow', strict=True, allow_inf_nan=False)
    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Fields):
    "A tool: a function under its type."

    model_config = ConfigDict(extra='allow', strict=True, allow_inf_nan=False)
    type: Literal['function']
    function: Declared


class Named(Fields):
    "The name of a tool."

    name: Text


class Chosen(Fields):
    "The tool that must be called."

    type: Literal['function'] = 'function'
    function: Named


def fitting(kind: type[Fields], value) -> Any:
    "A value read as a kind; `ValueError` with one line if it does not fit."
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        raise ValueError('; '.join(_lines(e))) from None


def _given(value):
    "A tool as it was given, once it has been checked: templates print its keys in their order."
    return fitting(Tool, value) and value


def _choice(value):
    if isinstance(value, dict):
        return fitting(Chosen, value).function
    if value not in ('none', 'auto', 'required'):
        raise ValueError("give 'none', 'auto', 'required' or one tool by name")
    return value


class ChatAsk(Ask):
    "A request to /v1/chat/completions."

    neutral = Ask.neutral | dict(
        store=(False,),
        metadata=({},),
        service_tier=('auto', 'default'),
        modalities=(['text'],),
        audio=(),
        prediction=(),
        web_search_options=(),
        verbosity=(),
        reasoning_effort=(),
        functions=(),
        function_call=(),
        documents=(),
        chat_template=(),
        chat_template_kwargs=({},),
        mm_processor_kwargs=({},),
        echo=(False,),
        add_generation_prompt=(True,),
        continue_final_message=(False,),
        add_special_tokens=(False,),
        include_reasoning=(True,),
    )
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    tools: list[Annotated[dict[str, Any], BeforeValidator(_given)]] = []
    tool_choice: Annotated[Any, AfterValidator(_choice)] = 'auto'
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @property
    def top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def conversation(self) -> list[dict]:
        "The messages as the lab's conversations have them."
        return [m.plain() for m in self.messages]

    @property
    def must_call(self) -> list[str]:
        "The names of the tools of which one must be called; none if the model decides."
        if isinstance(self.tool_choice, Named):
            return [self.tool_choice.name]
        return [t['function']['name'] for t in self.tools] * (self.tool_choice == 'required')

    @model_validator(mode='after')
    def _fields_fit_together(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError('top_logprobs: only with logprobs=true')
        if {self.max_tokens, self.max_completion_tokens} - {None, self.most}:
            raise ValueError('max_tokens: differs from max_completion_tokens; give one of them')
        names = [t['function']['name'] for t in self.tools]
        if self.tool_choice == 'required' and not names:
            raise ValueError('tool_choice: required, but there are no tools')
        if isinstance(self.tool_choice, Named) and self.tool_choice.name not in names:
            raise ValueError(
                f'tool_choice: no tool {self.tool_choice.name!r}; there are {", ".join(names) or "none"}'
            )
        return self


class TokenizeAsk(Fields):
    "A request to /tokenize: a text, or messages with the generation prompt after them."

    neutral = dict(
        add_generation_prompt=(True,),
        continue_final_message=(False,),
        add_special_tokens=(True, False),
        chat_template=(),
        chat_template_kwargs=({},),
        mm_processor_kwargs=({},),
    )
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Annotated[dict[str, Any], BeforeValidator(_given)]] = []
    return_token_strs: bool = False

    @model_validator(mode='after')
    def _one_of_both(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError('give either prompt or messages')
        return self


class DetokenizeAsk(Fields):
    "A request to /detokenize."

    model: str | None = None
    tokens: list[int]


def _lines(error: ValidationError) -> Iterator[str]:
    "A line for each thing that is wrong."
    for e in error.errors(include_url=False, include_context=False):
        place, said = '.'.join(map(str, e['loc'])), e['msg'].removeprefix('Value error, ')
        if e['type'] not in ('value_error', 'missing', 'too_long', 'too_short'):
            said += f', not {shown(e["input"])}'
        yield f'{place}: {said}' if place else said


def refusal(error: ValidationError) -> Refused:
    "The refusal of a request that does not fit: unknown fields first, by name."
    errors = error.errors(include_url=False, include_context=False)
    unknown = sorted(
        {'.'.join(map(str, e['loc'])) for e in errors if e['type'] == 'extra_forbidden'}
    )
    if unknown:
        return Refused(400, one_line(f'unsupported field {", ".join(unknown)}'), unknown[0])
    lines = list(_lines(error))
    more = f' (and {len(lines) - 3} more)' if len(lines) > 3 else ''
    return Refused(400, one_line('; '.join(lines[:3])) + more, lines[0].partition(':')[0])


def read(kind: type[Fields], body: bytes) -> Any:
    "The request in a body; `Refused` for one that is none."
    import orjson

    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise Refused(400, one_line(f'the body is no JSON: {e}')) from None
    if not isinstance(value, dict):
        raise Refused(400, 'the body is no JSON object')
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        raise refusal(e) from None
