"""Notebook-first research workbench for post-training on top of Kimi K2

Modules:

- `k2lab.bench.peers`: Other tools at the work that `python -m k2lab.bench` measures, each as its own documents show it.
- `k2lab.corpus.formulas`: Puts the TeX of each formula of an html page in its place, once.
- `k2lab.corpus.kernels`: Compiled kernels over UTF-8 bytes that find duplicates and contamination, each with a twin in plain Python that defines the result.
- `k2lab.corpus.signals`: Compiled kernels that compute the counts of quality rules, each with a twin in plain Python that defines the result.
- `k2lab.serving.engine`: One thread that computes the answers of all requests: rows of several requests in one batch, or batches in turn.
- `k2lab.serving.protocol`: The requests that the embedded server takes, field by field, and the one line for a request that it refuses.
- `k2lab.serving.responses`: The answers of the embedded server in vLLM's shapes, whole and as server-sent events.
- `k2lab.serving.server`: A small OpenAI-compatible server for small models: FastAPI in front of transformers.
- `k2lab.tasks.jail`: The program of the sandbox's child: walls, locks, and the loop that runs the code.
- `k2lab.tasks.sandbox`: Run a model's Python code where it can do no harm.
- `k2lab.text.typescript`: Declarations of tools in the notation like TypeScript that Kimi K2.5 and K2.6 are trained on."""

__version__ = "0.1.0"
