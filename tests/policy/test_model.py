"""The policy: which way it scores, and what its folders are to others."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from npo_cli.config.recipe import ModelSettings
from npo_cli.errors import NpoError
from npo_cli.policy.logprobs import TokenRow, has_plain_head
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.prompt_checks import check_chat_template
from npo_cli.types.rollouts import Message, Prompt
from tests.policy.models import gemma, load_saved_policy, qwen, save_model

ROWS = (
    TokenRow(prompt_ids=(1, 2, 3), response_ids=(4, 5, 6, 15)),
    TokenRow(prompt_ids=(7,), response_ids=(8,)),
    TokenRow(prompt_ids=(9, 1), response_ids=(2, 3)),
)


def expected(policy: Policy, row: TokenRow, temperature: float) -> list[float]:
    """The model's own logits of this row alone, softmaxed by hand."""
    with torch.no_grad():
        logits_LW = policy.model(torch.tensor([[*row.prompt_ids, *row.response_ids]])).logits[0]
    logps_LW = torch.log_softmax(logits_LW / temperature, -1)
    first = len(row.prompt_ids) - 1
    return [logps_LW[first + place, token].item() for place, token in enumerate(row.response_ids)]


@pytest.mark.parametrize(
    ("model", "plain"),
    [
        (qwen(), True),
        (qwen(tied=False), True),
        (gemma(cap=None), True),
        (gemma(cap=0.05), False),
        (gemma(cap=30.0), False),
    ],
    ids=["tied", "untied", "gemma uncapped", "gemma capped low", "gemma capped far above its logits"],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_response_is_scored_by_the_models_own_logits_capped_or_not(tmp_path, model, plain, temperature):
    policy = load_saved_policy(save_model(model, tmp_path / "model"))
    assert policy.plain_head is plain
    with torch.no_grad():
        scores = policy.score(ROWS, temperature=temperature, chunk_tokens=2)
    for row, (logps_T, mask_T) in zip(ROWS, zip(scores.logps_NT, scores.logps_NT != 0, strict=True), strict=True):
        assert logps_T[mask_T].tolist() == pytest.approx(expected(policy, row, temperature), abs=1e-5)


def test_the_look_at_the_head_leaves_no_trace():
    model = qwen()
    before = model(torch.tensor([[1, 2, 3]])).logits
    assert has_plain_head(model)
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)


def test_a_scored_row_says_entropy_and_collision_of_its_law(tmp_path):
    policy = load_saved_policy(save_model(qwen(), tmp_path / "model"))
    with torch.no_grad():
        scores = policy.score(ROWS[1:2], temperature=1.0, chunk_tokens=8)
        law_W = torch.softmax(policy.model(torch.tensor([[7]])).logits[0, 0], -1)
    assert scores.entropies_NT.item() == pytest.approx(-(law_W * law_W.log()).sum().item(), abs=1e-5)
    assert scores.collisions_NT.item() == pytest.approx(law_W.square().sum().item(), abs=1e-6)


def test_a_saved_policy_opens_as_it_is_with_the_same_weights_and_words(tmp_path):
    policy = load_policy(ModelSettings(threads=1))
    policy.save(tmp_path / "out")
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([policy.encode(Prompt(prompt_id="p", answer="3", text="1+2="))])
    assert torch.equal(model(ids).logits, policy.model(ids).logits)
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert load_policy(ModelSettings(path=str(tmp_path / "out"))).tokenizer_digest == policy.tokenizer_digest


def test_end_tokens_are_the_generation_configs_then_the_tokenizers(tmp_path):
    model = qwen()
    model.generation_config.eos_token_id = [15, 3]
    assert load_saved_policy(save_model(model, tmp_path / "two")).eos_ids == (15, 3)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    assert load_saved_policy(save_model(model, tmp_path / "none")).eos_ids == (15,)


def test_two_policies_with_other_weights_have_other_digests(tmp_path):
    first, same, other = (
        load_saved_policy(save_model(qwen(seed=seed), tmp_path / str(n))) for n, seed in enumerate((0, 0, 1))
    )
    assert first.digest == same.digest != other.digest


def test_chat_prompts_without_a_template_are_refused():
    policy = load_policy(ModelSettings(threads=1))
    chat = Prompt(prompt_id="c", answer="3", messages=(Message(role="user", content="1+2="),))
    with pytest.raises(NpoError, match="the tokenizer has no chat template"):
        check_chat_template(policy, [chat], "micro-base")
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}="
    check_chat_template(policy, [chat], "micro-base")
    assert policy.encode(chat) == tuple(policy.tokenizer("1+2==").input_ids)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NpoError, match="no tokenizer could be loaded"):
        load_saved_policy(tmp_path / "empty")
    folder = save_model(qwen(), tmp_path / "headless")
    (folder / "config.json").unlink()
    with pytest.raises(NpoError, match="headless"):
        load_saved_policy(folder)


def gradient_of(policy: Policy) -> tuple[list[torch.Tensor], int]:
    """The gradient of the summed log-probabilities, and how often the first layer ran for it."""
    runs = []
    hook = policy.model.base_model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    policy.score(ROWS, temperature=1.0, chunk_tokens=2).logps_NT.sum().backward()
    hook.remove()
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    return [parameter.grad.clone() for parameter in trained], len(runs)


def test_gradient_checkpointing_runs_each_layer_twice_for_the_same_gradient():
    kept, once = gradient_of(load_policy(ModelSettings()))
    recomputed, twice = gradient_of(load_policy(ModelSettings(gradient_checkpointing=True)))
    assert (once, twice) == (1, 2)
    for mine, theirs in zip(recomputed, kept, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_dropout_is_out_of_the_model_even_while_activations_are_recomputed(tmp_path):
    folder = save_model(qwen(), tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    assert '"attention_dropout": 0.5' in config.read_text()
    policy = load_policy(ModelSettings(path=str(folder), gradient_checkpointing=True))
    first, second = (policy.score(ROWS, temperature=1.0, chunk_tokens=9).logps_NT for _ in range(2))
    assert torch.equal(first, second)
    assert not policy.model.training
