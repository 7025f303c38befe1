"""Chat templates: targets against hand-written expectations, and templates that cannot be handled."""

from __future__ import annotations

import pytest
from mllm_worlds import World

from aniso_ext.errors import InputError
from aniso_ext.mllm import prompt_tokens
from aniso_ext.mllm.templates import encode_conversation, expand_images

WORLD = World()
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": "a red star"},
    {"role": "user", "content": "And this?"},
    {"role": "assistant", "content": "a blue circle"},
]
# as in Qwen2's, without marks of what the assistant says
CHATML = (
    "{% for message in messages %}<|user|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
# as in Llama 2's: no token before an answer, the end of the sequence after it
INSTRUCT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}<|end|>"
    "{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)


def tokenizer(template: str | None = None):
    made = World(rows=4).tokenizer
    if template is not None:
        made.chat_template = template
    return made


def said(made, turns=TURNS) -> list[str]:
    """The text of each run of targets."""
    tokens, targets = encode_conversation(made, turns)
    runs, current = [], []
    for token, target in zip([*tokens, 0], [*targets, False], strict=True):
        if target:
            current.append(token)
        elif current:
            runs.append(made.decode(current, skip_special_tokens=False))
            current = []
    return runs


def test_a_template_with_marks_gives_what_it_marks() -> None:
    assert said(tokenizer()) == ["a red star<|end|>", "a blue circle<|end|>"]


def test_a_template_without_marks_gives_answers_up_to_their_end_token() -> None:
    assert said(tokenizer(CHATML)) == ["a red star<|end|>", "a blue circle<|end|>"]


def test_an_answer_without_a_prompt_token_keeps_its_leading_space() -> None:
    assert said(tokenizer(INSTRUCT), TURNS[1:]) == [" a red star<|end|>", " a blue circle<|end|>"]


def test_an_end_token_that_is_not_registered_as_special_ends_an_answer() -> None:
    made = tokenizer(CHATML.replace("<|end|>", "<|stop|>"))
    made.add_tokens(["<|stop|>"])
    assert made.convert_tokens_to_ids("<|stop|>") not in made.all_special_ids
    assert said(made) == ["a red star<|stop|>", "a blue circle<|stop|>"]


def test_added_and_special_tokens_within_an_answer_do_not_cut_it() -> None:
    made = tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    made.add_tokens(["<|colour|>"])
    turns = [TURNS[1], {"role": "assistant", "content": "a <|colour|>red<|end|> star"}]
    assert said(made, turns) == ["a <|colour|>red<|end|> star\n"]


def test_the_whole_rendering_is_hand_written() -> None:
    made = tokenizer(CHATML)
    tokens, _ = encode_conversation(made, TURNS[1:3])
    expected = "<|user|>user\n<image>\nWhat is it?<|end|>\n<|user|>assistant\na red star<|end|>\n"
    assert made.decode(tokens, skip_special_tokens=False) == expected
    assert tokens == made(expected, add_special_tokens=False).input_ids


def test_characters_of_several_bytes_are_whole_targets() -> None:
    turns = [TURNS[1], {"role": "assistant", "content": "Größe 12 €, 猫"}]
    assert said(tokenizer(CHATML), turns) == ["Größe 12 €, 猫<|end|>"]
    assert said(tokenizer(), turns) == ["Größe 12 €, 猫<|end|>"]


def test_marks_that_end_with_such_a_character_take_all_of_it() -> None:
    marked = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}\n{% endfor %}"
    assert said(tokenizer(marked), [{"role": "assistant", "content": "12 猫"}]) == ["12 猫"]


def test_a_prompt_ends_where_the_assistant_begins() -> None:
    made = tokenizer(CHATML)
    image = made.convert_tokens_to_ids("<image>")
    tokens = prompt_tokens(made, "<image>\nWhat?", image_token_id=image, visual_tokens=3)
    assert tokens.count(image) == 3
    text = made.decode([token for token in tokens if token != image], skip_special_tokens=False)
    assert text == "<|user|>user\n\nWhat?<|end|>\n<|user|>assistant\n"


def test_images_are_expanded_with_their_marks() -> None:
    assert expand_images([5, 9, 6], 9, 2) == [5, 9, 9, 6]
    assert expand_images([5, 9, 6], 9, 2, like=[True, False, True]) == [True, False, False, True]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{% if loop.last %}!{% endif %}{{ m['content'] }}<|end|>{% endfor %}", "differently"),
        ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}", "not show"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation .roles must alternate.*reorder"),
        ("{% if false %}{% generation %}{% endgeneration %}{% endif %}{{ messages[0]['content'] }}", "every target"),
    ],
)
def test_templates_that_cannot_be_handled_are_refused(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_conversation(tokenizer(template), TURNS)


def test_no_template_names_the_remedy() -> None:
    made = tokenizer()
    made.chat_template = None
    with pytest.raises(InputError, match=r"no chat template: set tokenizer.chat_template"):
        encode_conversation(made, TURNS)
