"""A task for each public client, against a server of the scripted checkpoint:

    python clients.py openai|litellm|lm_eval|inspect_ai|smolagents URL/v1 MODEL FOLDER     the key is in $K2LAB_API_KEY

Each calls a tool and reads its result, streams, and asks for log-probabilities, as far as the client can. The last
line is what it got, as JSON. It runs in an environment of its own: nothing of the lab is imported.
"""

import json
import math
import os
import sys
from pathlib import Path

KEY = os.environ['K2LAB_API_KEY']
QUESTION = 'What is 2 + 3?'
ASK = [dict(role='user', content=QUESTION)]
HELLO = [dict(role='user', content='Hello')]
PROPERTIES = dict(a=dict(type='integer'), b=dict(type='integer'))
ADD = dict(
    name='add',
    description='Adds.',
    parameters=dict(type='object', properties=PROPERTIES, required=['a', 'b']),
)
TOOLS = [dict(type='function', function=ADD)]


def results(calls) -> list[dict]:
    "The messages with the results of calls."
    sums = [(call.id, json.loads(call.function.arguments)) for call in calls]
    return [
        dict(role='tool', tool_call_id=i, content=str(told['a'] + told['b'])) for i, told in sums
    ]


def conversation(turn) -> str:
    "The answer after a tool was called; `turn(messages)` gives the next message of the assistant."
    first = turn(ASK)
    assert first.tool_calls and not first.content, first
    last = turn([*ASK, first, *results(first.tool_calls)])
    assert not last.tool_calls, last
    return last.content


def certainty(entries) -> int:
    "How many log-probabilities there are; each is one, and the likeliest beside it is not less likely."
    assert all(e.logprob <= 0 and e.top_logprobs[0].logprob >= e.logprob - 1e-6 for e in entries)
    return len(entries)


def with_openai(url: str, model: str, folder: Path) -> dict:
    import openai

    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    common = dict(model=model, temperature=0, max_completion_tokens=64)
    whole = lambda messages: client.chat.completions.create(
        messages=messages, tools=TOOLS, **common
    )

    def streamed(messages):
        with client.chat.completions.stream(messages=messages, tools=TOOLS, **common) as stream:
            return stream.get_final_completion().choices[0].message

    pieces = client.chat.completions.create(messages=HELLO, stream=True, **common)
    told = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=2, **common)
    plain = client.completions.create(
        model=model, prompt='Count up', max_tokens=3, temperature=0, logprobs=1
    )
    assert plain.choices[0].logprobs and len(plain.choices[0].logprobs.token_logprobs) == 3
    assert [m.id for m in client.models.list()] == [model]
    return {
        'tools': conversation(lambda messages: whole(messages).choices[0].message),
        'streamed tools': conversation(streamed),
        'stream': ''.join(p.choices[0].delta.content or '' for p in pieces if p.choices),
        'log-probabilities': certainty(told.choices[0].logprobs.content),
    }


def with_litellm(url: str, model: str, folder: Path) -> dict:
    import litellm

    litellm.suppress_debug_info = True
    common = dict(api_base=url, api_key=KEY, num_retries=0, temperature=0, max_tokens=64)
    name = f'hosted_vllm/{model}'
    whole = lambda messages: litellm.completion(name, messages, tools=TOOLS, **common)

    def streamed(messages):
        chunks = list(litellm.completion(name, messages, tools=TOOLS, stream=True, **common))
        return litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message

    pieces = litellm.completion(f'openai/{model}', HELLO, stream=True, **common)
    told = litellm.completion(f'openai/{model}', HELLO, logprobs=True, top_logprobs=2, **common)
    texts = litellm.completion(f'text-completion-openai/{model}', HELLO, stream=True, **common)
    assert ''.join(p.choices[0].delta.content or '' for p in texts)
    return {
        'tools': conversation(lambda messages: whole(messages).choices[0].message),
        'streamed tools': conversation(streamed),
        'stream': ''.join(p.choices[0].delta.content or '' for p in pieces),
        'log-probabilities': certainty(told.choices[0].logprobs.content),
    }


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
"""
CHOICES = """doc_to_target: 0
doc_to_choice: ["One two", " ten nine"]
metric_list: [{metric: acc}]"""
WRITTEN = """doc_to_target: "One two three"
generation_kwargs: {until: [" four"], max_gen_toks: 16}
metric_list: [{metric: exact_match}]"""


def with_lm_eval(url: str, model: str, folder: Path) -> dict:
    os.environ['OPENAI_API_KEY'] = KEY
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = Path('rows.jsonl').absolute()
    rows.write_text(
        ''.join(json.dumps(dict(question=q)) + '\n' for q in ('Count up', 'Go', 'Begin'))
    )
    for name, kind, more in (
        ('chosen', 'multiple_choice', CHOICES),
        ('written', 'generate_until', WRITTEN),
    ):
        text = TASK.format(name=name, rows=rows, kind=kind, more=more)
        Path(f'{name}.yaml').write_text(text)
    told = dict(model=model, base_url=f'{url}/completions', tokenizer=str(folder))
    told |= dict(tokenizer_backend='huggingface', num_concurrent=2, max_length=4096, max_retries=1)
    found = lm_eval.simple_evaluate(
        'local-completions', model_args=told, tasks=['chosen', 'written'],
        task_manager=TaskManager(include_path='.', include_defaults=False), log_samples=True,
    )  # fmt: skip
    chosen, written = (found['results'][name] for name in ('chosen', 'written'))
    sure = [pair[0] for s in found['samples']['chosen'] for pair in s['filtered_resps']]
    assert len(sure) == 6 and all(isinstance(p, float) and math.isfinite(p) for p in sure)
    return {
        'accuracy': chosen['acc,none'],
        'generated': written['exact_match,none'],
        'log-probabilities': len(sure),
    }


def with_inspect_ai(url: str, model: str, folder: Path) -> dict:
    os.environ |= dict(LAB_BASE_URL=url, LAB_API_KEY=KEY)
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate, use_tools
    from inspect_ai.tool import tool

    @tool
    def add():
        async def execute(a: int, b: int):
            """Adds.

            Args:
                a: first
                b: second
            """
            return str(a + b)

        return execute

    task = Task(
        dataset=[Sample(input=QUESTION, target='5')],
        solver=[use_tools(add()), generate()],
        scorer=includes(),
    )
    options = dict(logprobs=True, top_logprobs=2, temperature=0, max_tokens=64, max_retries=0)
    (log,) = eval(task, model=f'openai-api/lab/{model}', display='none', log_dir='logs', **options)
    assert log.status == 'success', log.error
    output = log.samples[0].output
    return {
        'tools': output.completion,
        'accuracy': log.results.scores[0].metrics['accuracy'].value,
        'log-probabilities': certainty(output.choices[0].logprobs.content),
    }


def with_smolagents(url: str, model: str, folder: Path) -> dict:
    from smolagents import OpenAIServerModel, ToolCallingAgent, tool

    @tool
    def add(a: int, b: int) -> int:
        """Adds.

        Args:
            a: first
            b: second
        """
        return a + b

    def agent(**more):
        served = OpenAIServerModel(
            model_id=model, api_base=url, api_key=KEY, max_tokens=64, temperature=0
        )
        return ToolCallingAgent(tools=[add], model=served, max_steps=4, verbosity_level=0, **more)

    def run(one) -> str:
        answer = one.run(QUESTION)
        called = [
            c.name for step in one.memory.steps for c in getattr(step, 'tool_calls', None) or []
        ]
        assert called == ['add', 'final_answer'], called
        return str(answer)

    hello = [dict(role='user', content=[dict(type='text', text='Hello')])]
    served = agent().model
    told = served.generate(hello, logprobs=True, top_logprobs=2)
    return {
        'tools': run(agent()),
        'streamed tools': run(agent(stream_outputs=True)),
        'stream': ''.join(d.content or '' for d in served.generate_stream(hello)),
        'log-probabilities': certainty(told.raw.choices[0].logprobs.content),
    }


if __name__ == '__main__':
    name, url, model, folder = sys.argv[1:]
    found = globals()[f'with_{name}'](url, model, Path(folder))
    print()  # what a client wrote may lack its line end
    print(json.dumps(found, ensure_ascii=False))
