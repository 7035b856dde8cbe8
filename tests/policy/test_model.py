"""The policy: scoring, loading, saving, and what it refuses."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from npo_cli.config.recipe import ModelSettings
from npo_cli.errors import NpoError
from npo_cli.policy.logprobs import has_plain_head
from npo_cli.policy.model import Policy, check_prompt_support, load_policy
from npo_cli.policy.model_folder import find_model
from npo_cli.policy.packing import TokenRow
from npo_cli.types.rollouts import ImageRef, Message, Prompt
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
def test_policy_scores_by_the_models_own_logits_capped_or_not(tmp_path, model, plain, temperature):
    policy = load_saved_policy(save_model(model, tmp_path / "model"), attention="eager")
    assert policy.plain_head is plain
    with torch.no_grad():
        scores = policy.score(ROWS, temperature=temperature, chunk_tokens=2)
    for row, (logps_T, mask_T) in zip(ROWS, zip(scores.logps_NT, scores.logps_NT != 0, strict=True), strict=True):
        assert logps_T[mask_T].tolist() == pytest.approx(expected(policy, row, temperature), abs=1e-5)


def test_has_plain_head_leaves_the_model_unchanged():
    model = qwen()
    before = model(torch.tensor([[1, 2, 3]])).logits
    assert has_plain_head(model)
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)


def test_policy_score_has_entropy_and_collision_probability(tmp_path):
    policy = load_saved_policy(save_model(qwen(), tmp_path / "model"))
    with torch.no_grad():
        scores = policy.score(ROWS[1:2], temperature=1.0, chunk_tokens=8, columns=["entropies", "collisions"])
        law_W = torch.softmax(policy.model(torch.tensor([[7]])).logits[0, 0], -1)
    assert scores.entropies_NT.item() == pytest.approx(-(law_W * law_W.log()).sum().item(), abs=1e-5)
    assert scores.collisions_NT.item() == pytest.approx(law_W.square().sum().item(), abs=1e-6)


def test_saved_policy_opens_in_transformers_with_the_same_weights(tmp_path):
    policy = load_policy(ModelSettings(threads=1))
    policy.save(tmp_path / "out")
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([policy.encode(Prompt(prompt_id="p", answer="3", text="1+2="))])
    assert torch.equal(model(ids).logits, policy.model(ids).logits)
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert load_policy(ModelSettings(path=str(tmp_path / "out"))).tokenizer_digest == policy.tokenizer_digest


def test_policy_end_tokens_come_from_the_generation_config_or_the_tokenizer(tmp_path):
    model = qwen()
    model.generation_config.eos_token_id = [15, 3]
    assert load_saved_policy(save_model(model, tmp_path / "two")).eos_ids == (15, 3)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    assert load_saved_policy(save_model(model, tmp_path / "none")).eos_ids == (15,)


def test_policy_digest_depends_on_the_weights(tmp_path):
    first, same, other = (
        load_saved_policy(save_model(qwen(seed=seed), tmp_path / str(n))) for n, seed in enumerate((0, 0, 1))
    )
    assert first.digest == same.digest != other.digest


def test_policy_without_a_chat_template_refuses_chat_prompts():
    policy = load_policy(ModelSettings(threads=1))
    chat = Prompt(prompt_id="c", answer="3", messages=(Message(role="user", content="1+2="),))
    with pytest.raises(NpoError, match="the tokenizer has no chat template"):
        check_prompt_support(policy, [chat], "micro-base")
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}="
    check_prompt_support(policy, [chat], "micro-base")
    assert policy.encode(chat) == tuple(policy.tokenizer("1+2==").input_ids)


def test_load_policy_names_a_folder_without_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NpoError, match="has no model"):
        load_saved_policy(tmp_path / "empty")
    folder = save_model(qwen(), tmp_path / "headless")
    (folder / "config.json").unlink()
    with pytest.raises(NpoError, match="headless"):
        load_saved_policy(folder)


def test_load_policy_refuses_an_attention_that_would_leave_out_the_softcap(tmp_path):
    folder = save_model(gemma(cap=None), tmp_path / "model")
    with pytest.raises(NpoError, match="sdpa attention cannot cap attention logits") as refused:
        load_saved_policy(folder)
    assert refused.value.hint == "model.attention=eager"


def gradient_of(policy: Policy) -> tuple[list[torch.Tensor], int]:
    """The gradient of the summed log-probabilities, and how often the inside of the first layer ran for it."""
    runs = []
    hook = policy.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    policy.score(ROWS, temperature=1.0, chunk_tokens=2).logps_NT.sum().backward()
    hook.remove()
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    return [parameter.grad.clone() for parameter in trained], len(runs)


def test_gradient_checkpointing_gives_the_same_gradient():
    kept, once = gradient_of(load_policy(ModelSettings()))
    recomputed, twice = gradient_of(load_policy(ModelSettings(gradient_checkpointing=True)))
    assert (once, twice) == (1, 2)
    for mine, theirs in zip(recomputed, kept, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_policy_has_no_dropout_even_with_gradient_checkpointing(tmp_path):
    folder = save_model(qwen(), tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    assert '"attention_dropout": 0.5' in config.read_text()
    policy = load_policy(ModelSettings(path=str(folder), gradient_checkpointing=True))
    first, second = (policy.score(ROWS, temperature=1.0, chunk_tokens=9).logps_NT for _ in range(2))
    assert torch.equal(first, second)
    assert not policy.model.training


def test_load_policy_with_a_folder_takes_its_weights_and_checks_them(tmp_path):
    base, other = (save_model(qwen(seed=seed), tmp_path / str(seed)) for seed in (0, 1))
    settings = ModelSettings(path=str(base), threads=1)
    assert load_policy(settings, other).digest == load_saved_policy(other).digest
    policy = load_policy(settings)
    policy.load(other)
    digest = policy.digest
    assert digest == load_saved_policy(other).digest
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"surplus": torch.zeros(1)}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NpoError, match="tensor extra: surplus"):
        policy.load(other)
    assert policy.digest == digest


def test_load_policy_refuses_a_base_with_missing_tensors(tmp_path):
    folder = save_model(qwen(), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NpoError, match=r"tensor missing: model\.norm\.weight"):
        load_saved_policy(folder)


def test_load_policy_refuses_a_tokenizer_with_more_tokens_than_embeddings(tmp_path):
    folder = save_model(qwen(), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one>", "<two>", "<three>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(NpoError, match="more tokens than the model has embeddings"):
        load_saved_policy(folder)


def test_load_policy_in_mixed_precision_keeps_float32_weights():
    policy = load_policy(ModelSettings(threads=1, compute_dtype="bfloat16"))
    assert policy.compute_dtype == torch.bfloat16
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}


def test_find_model_accepts_folders_bundled_models_and_hub_ids(tmp_path, monkeypatch):
    assert find_model("micro-base").name == "micro-base"
    assert find_model(str(tmp_path)) == tmp_path
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_model("organization/model") == "organization/model"
    for path in ("./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere", "models/a/b", ""):
        with pytest.raises(NpoError, match=r"there is no folder /|model.path= is not a folder"):
            find_model(path)
    with pytest.raises(NpoError, match="neither a folder nor a bundled model") as caught:
        find_model("micro_base")
    assert caught.value.hint == "set model.path=micro-base"


def test_model_that_is_no_folder_and_not_on_the_hub_is_refused_with_both_readings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NpoError) as caught:
        load_policy(ModelSettings(path="models/mine"))
    assert caught.value.message.startswith(
        f"model.path=models/mine: there is no folder {tmp_path}/models/mine, and as an id on the hub it cannot be "
    )


def test_policy_without_vision_refuses_prompts_with_images():
    policy = load_policy(ModelSettings(threads=1))
    image = ImageRef(location="a.png", sha256="0", width=1, height=1, data=None)
    prompt = Prompt(prompt_id="p", text="<image>?", answer="1", images=(image,))
    with pytest.raises(NpoError, match="micro-base is a text-only model"):
        check_prompt_support(policy, [prompt], "micro-base")


def test_encode_response_splits_special_tokens():
    policy = load_policy(ModelSettings(threads=1))
    end = policy.tokenizer.convert_ids_to_tokens(policy.end_id)
    assert policy.end_id not in policy.encode_response(end)
    assert policy.end_id in policy.eos_ids
