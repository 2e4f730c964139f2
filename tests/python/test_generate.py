"""Text that `generate` writes, token by token that of transformers."""
import json

import pytest
import torch

from support import PROBLEMS, SMOLLM2, engine, model, tokenizer

NEW = 32
QUESTIONS = [
    "What is the capital of France?", "Write a haiku about the sea.", "def fibonacci(n):", "List three primes.",
    "Wer war Johann Sebastian Bach?", "Translate 'good morning' into Spanish.", "2 + 2 =", "Once upon a time",
    "Explain photosynthesis in one sentence.", "日本の首都はどこですか", "🙂", "SELECT name FROM", "a",
]


@pytest.fixture(scope="module")
def prompts():
    lines = PROBLEMS.read_text().splitlines()[: 50 - len(QUESTIONS)]
    return QUESTIONS + [json.loads(line)["problem"] for line in lines]


def written(prompts, *more):
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    out = engine("generate", "--model", SMOLLM2, "--temperature", 0, "--max-new-tokens", NEW, "--json", *given, *more)
    return [json.loads(line) for line in out.splitlines()]


@torch.no_grad()
def greedy(lm, ids):
    out = lm.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, use_cache=True)
    return out[0, len(ids):].tolist()


@torch.no_grad()
def test_greedy_tokens_of_50_prompts_are_those_of_transformers(prompts):
    """Through the chat template; a prompt's ids, its template and the batch it is in have a part in it. Each token must be
    the most likely one after those before it, of which one pass over the whole text tells as much as decoding."""
    tok, lm = tokenizer(SMOLLM2), model(SMOLLM2)
    found = written(prompts, "--dtype", "f32")
    assert len(found) == len(prompts) == 50
    for prompt, ours in zip(prompts, found):
        text = tok.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        ids, tokens = tok(text, add_special_tokens=False)["input_ids"], ours["tokens"]
        logits = lm(torch.tensor([ids + tokens]), logits_to_keep=len(tokens) + 1).logits
        assert ours["prompt_tokens"] == len(ids)
        assert tokens == logits[0, :-1].argmax(-1).tolist(), f"{prompt!r}: {ours['text']!r}"
        assert ours["text"] == tok.decode(tokens, skip_special_tokens=True)
        assert tok.eos_token_id not in tokens[:-1]
        ended = tokens[-1] == tok.eos_token_id
        assert ours["finish"] == ("stop" if ended else "length")
        assert ended or len(tokens) == NEW


def test_weights_left_in_bfloat16_write_what_float32_writes(prompts):
    """Decoding widens them exactly; the prompt's own products may be in bfloat16, which turns none of these near ties."""
    few = prompts[:6]
    assert [o["tokens"] for o in written(few)] == [o["tokens"] for o in written(few, "--dtype", "f32")]


def test_a_raw_prompt_is_encoded_as_transformers_does(prompts):
    tok, lm = tokenizer(SMOLLM2), model(SMOLLM2)
    for prompt, ours in zip(prompts[6:9], written(prompts[6:9], "--raw")):
        ids = tok(prompt)["input_ids"]
        assert ours["prompt_tokens"] == len(ids)
        assert ours["tokens"] == greedy(lm, ids)
