"""A Qwen2 checkpoint whose weights are written by hand, so that it says the same words in every engine.

Each token of its script has a direction of its own in the embedding, and the head maps that direction to the token
that follows. Four attention heads look for marks in the prompt (tools, a result, another tool's name, a word of the
user) and shift which token begins the answer. So it calls a tool, reads the result and answers, after any prompt:

    no tools                          One two three four 😀 five six seven eight nine ten
    ... and the word `forever`        tick tock tick tock ..., without an end
    tools, no result yet              a call of add(a=2, b=3)
    tools and a result                The sum of both is 5.
    ... and the tool `final_answer`   a call of final_answer(answer='5')

Where a grammar asks for a JSON list of calls (older vLLM, `tool_choice: required`), it writes the same calls as that.
"""

from pathlib import Path

START, CALL, END = '\n', '<tool_call>', '<|im_end|>'
ADD, FINAL = '{"name": "add", "arguments":', '{"name": "final_answer", "arguments":'
LISTED_ADD, LISTED_FINAL = (f'[{one.replace("arguments", "parameters")}' for one in (ADD, FINAL))
CLOSE = '</tool_call>'
NUMBERS = 'One| two| three| four| 😀| five| six| seven| eight| nine| ten'.split('|')
ADDED = [' {"a": 2,', ' "b": 3}}']
FINAL_ARGUMENTS = [' {"answer":', ' "5"}}']
SUM = ['The sum', ' of both', ' is 5', '.']
CLOCK = [' tick', ' tock']
CHAINS = [
    [*NUMBERS, END],
    [*SUM, END],
    [*CLOCK, CLOCK[0]],
    [ADD, *ADDED, CLOSE, END],
    [FINAL, *FINAL_ARGUMENTS, CLOSE],
    [LISTED_ADD, ADDED[0]],
    [LISTED_FINAL, FINAL_ARGUMENTS[0]],
]
# what the heads look for; smolagents writes a result as text, after `Calling tools:`
MARKS = [['<tools>'], ['<tool_response>', 'Calling'], ['_answer'], [' forever']]
# what begins an answer, and how much more or less each mark makes of it
BEGIN = {
    NUMBERS[0]: (23, [-7, 0, 0, 0]),
    CALL: (20, [0, 0, 0, 0]),
    SUM[0]: (8, [0, 16, -8, 0]),
    CLOCK[0]: (10, [0, 0, 0, 18]),
    LISTED_ADD: (12, [0, 0, 0, 0]),
    LISTED_FINAL: (0, [0, 8, 8, 0]),
    ADD: (11, [0, 0, 0, 0]),  # where a server has written `<tool_call>` and a line end itself
    FINAL: (3, [0, 5, 5, 0]),
}
CALLED = {ADD: (40, [0, 0, 0, 0]), FINAL: (32, [0, 5, 5, 0])}  # after <tool_call>
FIRST = 10  # of the directions that tokens have; those before are marks, flags and one for all other tokens
OTHER = 8
WIDTH, HEADS, SIZE, WINDOW = 128, 4, 32, 8192


def script_tokens() -> list[str]:
    "The tokens of the script, in their order, each once."
    return list(dict.fromkeys(token for chain in CHAINS for token in chain))


def write_tokenizer():
    "A small tokenizer that has each piece of the script as one token."
    from tokenizers import AddedToken

    from k2lab.text.tokenizer import build_tokenizer

    words = 'user assistant system final_answer add forever One two three tools a b 2 3 5'
    lines = [f'{words} forever: the final_answer is 5\nCalling tools:\n'] * 50
    tok = build_tokenizer(lines, 400, 'qwen')
    plain = [t for t in script_tokens() if t not in tok.get_vocab() and t != ' 😀']
    tok.eos_token = END  # as in Qwen's chat models
    tok.add_tokens([AddedToken(t, normalized=False) for t in [*plain, MARKS[0][0], MARKS[1][0]]])
    return tok


def ids_of(tok, piece: str) -> list[int]:
    "The ids of a piece of the script; several for a character that is no token."
    ids = tok(piece, add_special_tokens=False).input_ids
    assert len(ids) == 1 or piece == ' 😀', (piece, ids)
    return ids


def write_checkpoint(folder: Path) -> Path:
    "Write the checkpoint to a folder; the folder."
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from k2lab.models.load import save_checkpoint

    tok = write_tokenizer()
    end = tok.convert_tokens_to_ids(END)
    config = Qwen2Config(
        vocab_size=len(tok), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=WINDOW,
        rope_parameters=dict(rope_type='default', rope_theta=1e12), tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=end, pad_token_id=tok.convert_tokens_to_ids('<|endoftext|>'),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        write_weights(model, tok)
    save_checkpoint(model, tok, folder)
    return folder


def write_weights(model, tok):
    "Set every weight."
    import torch

    layer, head = model.model.layers[0], model.lm_head.weight
    for name, p in model.named_parameters():
        p.fill_(1.0 if 'norm' in name else 0.0)
    torch.nn.init.normal_(head, std=0.05)  # no two tokens are equally likely
    write_heads(layer.self_attn)
    follow = transitions(tok)
    at = {token: FIRST + n for n, token in enumerate(dict.fromkeys(t for t, _ in follow))}
    assert FIRST + len(at) <= WIDTH
    embedding = model.model.embed_tokens.weight
    embedding[:, OTHER] = 1
    for token, place in at.items():
        embedding[token] = 0
        embedding[token, place] = 1
    for i, mark in ((i, mark) for i, marks in enumerate(MARKS) for mark in marks):
        (token,) = tok(mark, add_special_tokens=False).input_ids
        assert token not in at, mark
        embedding[token] = 0
        embedding[token, i] = 1
    for (token, then), (weight, flags) in follow.items():
        head[then, at[token]] = weight
        for i, shift in enumerate(flags):
            if shift:
                head[then, 4 + i] = shift
    head[ids_of(tok, NUMBERS[0])[0], OTHER] = 40


def write_heads(attention):
    "Head i writes 1 to direction 4 + i if mark i stands anywhere before, else 0."
    scale = WIDTH**0.5  # what the norm makes of a direction of length 1
    for i in range(HEADS):
        still = i * SIZE + SIZE // 2 - 1  # of the rotary pair that turns least
        attention.q_proj.bias[still] = 20
        attention.k_proj.weight[still, i] = 60 / scale
        attention.v_proj.weight[i * SIZE, i] = 1 / scale
        attention.o_proj.weight[4 + i, i * SIZE] = 1


def transitions(tok) -> dict:
    "`{(token, token that may follow): (weight, shift by each mark)}`."
    found = {}
    for chain in CHAINS:
        ids = [i for piece in chain for i in ids_of(tok, piece)]
        found |= {pair: (40, [0] * 4) for pair in zip(ids, ids[1:])}
    one = lambda piece: ids_of(tok, piece)[0]
    found |= {(one(START), one(piece)): how for piece, how in BEGIN.items()}
    found |= {(one(CALL), one(piece)): how for piece, how in CALLED.items()}
    for last in (ADDED[-1], FINAL_ARGUMENTS[-1]):  # where a grammar forbids what is likelier
        found[one(last), one(']')] = (20, [0] * 4)
    found[one(']'), one(END)] = (40, [0] * 4)
    return found
