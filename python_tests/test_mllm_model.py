"""The multimodal model: where embeddings go, generation against the uncached computation, files, packed rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mllm_worlds import World, weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from aniso_ext.errors import InputError
from aniso_ext.mllm import AnisoMLLMConfig, AnisoMLLMForCausalLM, prompt_tokens, small_language_model

WORLD = World()
BOTH = pytest.mark.parametrize("family", ["llama", "qwen2"])
IMAGE = WORLD.tokenizer.convert_tokens_to_ids("<image>")


def prompts(model: AnisoMLLMForCausalLM, count: int) -> torch.Tensor:
    tokens = prompt_tokens(
        WORLD.tokenizer, "<image>\nWhat?", image_token_id=IMAGE, visual_tokens=model.config.visual_tokens
    )
    return torch.tensor([tokens] * count)


def rows(count: int) -> torch.Tensor:
    return torch.from_numpy(WORLD.embeddings[:count])


@BOTH
def test_projected_embeddings_take_the_places_of_the_image_tokens(family: str) -> None:
    model = WORLD.model(family, visual_tokens=3).eval()
    given = torch.tensor([[7, IMAGE, IMAGE, IMAGE, 9, 11], [IMAGE, IMAGE, IMAGE, 8, 12, 13]])
    table = model.get_input_embeddings().weight
    first, last = model.projector.first, model.projector.last
    scaled = rows(2) * WORLD.width**0.5
    visual = torch.nn.functional.gelu(scaled @ first.weight.T + first.bias) @ last.weight.T + last.bias
    visual = visual.reshape(2, 3, -1)
    by_hand = torch.stack(
        [torch.cat((table[[7]], visual[0], table[[9, 11]])), torch.cat((visual[1], table[[8, 12, 13]]))]
    )
    ours = model(given, embeddings=rows(2)).logits
    theirs = model.language_model(inputs_embeds=by_hand).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@BOTH
@pytest.mark.parametrize("visual_tokens", [1, 2])
def test_generation_with_a_cache_is_greedy_decoding_without_one(family: str, visual_tokens: int) -> None:
    model = WORLD.model(family, visual_tokens=visual_tokens).eval()
    start = prompts(model, 3)
    generated = model.generate(
        start, attention_mask=torch.ones_like(start), embeddings=rows(3), max_new_tokens=6, do_sample=False,
        eos_token_id=-1,
    )  # fmt: skip
    expected = start
    for _ in range(6):
        following = model(expected, embeddings=rows(3), use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, following), dim=1)
    assert torch.equal(generated, expected)


def test_padding_on_the_left_does_not_change_what_is_generated() -> None:
    model = WORLD.model().eval()
    start = prompts(model, 2)
    padded = torch.cat((torch.zeros(2, 5, dtype=torch.long), start), dim=1)
    mask = torch.cat((torch.zeros(2, 5, dtype=torch.long), torch.ones_like(start)), dim=1)
    options = {"embeddings": rows(2), "max_new_tokens": 5, "do_sample": False}
    plain = model.generate(start, attention_mask=torch.ones_like(start), **options)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 5:], plain)


def test_beams_keep_each_prompt_with_its_embedding() -> None:
    model = WORLD.model().eval()
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    start = prompts(model, 2)
    together = model.generate(start, attention_mask=torch.ones_like(start), embeddings=rows(2), **options)
    for number in range(2):
        one = start[number : number + 1]
        alone = model.generate(
            one, attention_mask=torch.ones_like(one), embeddings=rows(2)[number : number + 1], **options
        )
        assert torch.equal(together[number : number + 1, : alone.shape[1]], alone)


@BOTH
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_computes_the_same_and_keeps_tied_weights_tied(family: str, tied: bool, tmp_path: Path) -> None:
    model = WORLD.model(family, tie_word_embeddings=tied).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, AnisoMLLMForCausalLM)
    start = prompts(model, 2)
    assert torch.equal(again(start, embeddings=rows(2)).logits, model(start, embeddings=rows(2)).logits)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert (tmp_path / "model.safetensors").is_file()


def test_packed_samples_are_computed_as_if_alone() -> None:
    model = WORLD.model(visual_tokens=2).train()
    samples = [torch.tensor([5, IMAGE, IMAGE, 9, 10]), torch.tensor([IMAGE, IMAGE, 8]), torch.tensor([6, IMAGE, IMAGE])]
    packed = torch.cat((*samples, torch.zeros(2, dtype=torch.long)))[None]
    positions = torch.cat((*(torch.arange(len(sample)) for sample in samples), torch.zeros(2, dtype=torch.long)))[None]
    for attention in ("sdpa", "eager"):
        model.language_model.set_attn_implementation(attention)
        logits = model(packed, position_ids=positions, embeddings=rows(3)).logits[0]
        start = 0
        for number, sample in enumerate(samples):
            alone = model(sample[None], embeddings=rows(3)[number : number + 1], use_cache=False).logits[0]
            # two layers of float32 at width 64; a sample that saw another would be off by the size of the logits
            torch.testing.assert_close(logits[start : start + len(sample)], alone, rtol=0, atol=2e-5)
            start += len(sample)


def test_gradient_checkpointing_leaves_the_gradients_as_they_are() -> None:
    given = prompts(WORLD.model(), 2)
    gradients = []
    for checkpointing in (False, True):
        model = WORLD.model().train()
        if checkpointing:
            # later versions of transformers deprecate the old name
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.language_model.requires_grad_(False)
        model(given, labels=given, embeddings=rows(2), use_cache=False).loss.backward()
        gradients.append(model.projector.first.weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_messages_name_widths_and_counts() -> None:
    model = WORLD.model().eval()
    start = prompts(model, 2)
    with pytest.raises(InputError, match=r"shape \[2, 8\], but the projector takes \[n, 16\].*encoder"):
        model(start, embeddings=torch.zeros(2, 8))
    with pytest.raises(InputError, match="2 image tokens in input_ids, but 3 embeddings"):
        model(start, embeddings=rows(3))
    with pytest.raises(InputError, match="2 prompts but 3 embeddings"):
        model.generate(start, embeddings=rows(3))
    with pytest.raises(InputError, match="visual_tokens must be at least 1"):
        AnisoMLLMConfig(visual_tokens=0)


def test_a_language_model_keeps_its_weights() -> None:
    language_model = small_language_model(vocab_size=len(WORLD.tokenizer))
    before = weights(language_model)
    model = AnisoMLLMForCausalLM.from_language_model(language_model, WORLD.tokenizer, embedding_width=4)
    after = weights(model.language_model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_language_model_that_does_not_know_the_image_gets_a_row_for_it() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    language_model = small_language_model(vocab_size=2)
    before = language_model.get_input_embeddings().weight.clone()
    model = AnisoMLLMForCausalLM.from_language_model(language_model, tokenizer, embedding_width=4)
    assert model.config.image_token_id == 2 == tokenizer("<image>").input_ids[0]
    assert torch.equal(model.get_input_embeddings().weight[:2], before)
    assert model(torch.tensor([[2, 1]]), embeddings=torch.ones(1, 4)).logits.shape == (1, 2, 3)


def test_a_projector_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = WORLD.model().projector.first.weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(WORLD.model().projector.first.weight, first)


def test_the_package_loads_no_transformers_before_it_is_used() -> None:
    program = "import sys, json, aniso_ext.mllm as m; dir(m); print(json.dumps('transformers' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
