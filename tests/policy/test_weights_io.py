"""A checkpoint goes into the live model whole or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npo_cli.errors import NpoError
from npo_cli.policy import weights_io
from npo_cli.policy.weights_io import (
    hold_weights,
    load_weights,
    read_saved,
    read_tensors,
    tied_names,
    weights_digest,
)
from tests.policy.models import qwen, save_model

NORM = "model.layers.0.mlp.down_proj.weight"


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


def nan_in(name: str) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[3] = float("nan")

    return change


DAMAGES = {
    "missing": (lambda tensors: tensors.pop(NORM), NORM),
    "extra": (lambda tensors: tensors.update(stranger=torch.zeros(2)), "stranger"),
    "of another shape": (lambda tensors: tensors.update({NORM: torch.zeros(3, 3)}), NORM),
    "not finite": (nan_in(NORM), NORM),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_load_weights_that_do_not_match_leave_the_model_unchanged(tmp_path, kind):
    change, name = DAMAGES[kind]
    folder = changed(save_model(qwen(seed=1), tmp_path / "bad"), change)
    live = qwen(seed=0)
    before = weights_digest(live)
    with pytest.raises(NpoError) as caught:
        load_weights(live, folder)
    assert caught.value.message == f"{folder}: tensor {kind}: {name}"
    assert "npo index" in caught.value.hint
    assert weights_digest(live) == before


def test_load_weights_counts_missing_tensors(tmp_path):
    def pop_five(tensors: dict[str, Tensor]) -> None:
        for name in sorted(name for name in tensors if "layers" in name)[:5]:
            tensors.pop(name)

    folder = changed(save_model(qwen(), tmp_path / "bad"), pop_five)
    with pytest.raises(NpoError, match=r"tensor missing: \S+, \S+, \S+ and 2 more"):
        load_weights(qwen(), folder)


def test_load_weights_names_a_damaged_file(tmp_path):
    folder = save_model(qwen(), tmp_path / "cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(NpoError, match=r"model\.safetensors cannot be read"):
        load_weights(qwen(), folder)
    path.unlink()
    with pytest.raises(NpoError, match=r"has no model\*\.safetensors"):
        read_tensors(folder)


def test_load_weights_of_a_tied_model_needs_one_name(tmp_path):
    source, live = qwen(seed=1), qwen(seed=0)
    assert tied_names(live) == [{"model.embed_tokens.weight", "lm_head.weight"}]
    folder = save_model(source, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_weights(live, folder)
    assert weights_digest(live) == weights_digest(source)
    assert torch.equal(live.lm_head.weight, source.model.embed_tokens.weight)
    changed(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    other = qwen(seed=2)
    load_weights(other, folder)
    assert weights_digest(other) == weights_digest(source)
    changed(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(NpoError, match=r"tensor missing: lm_head\.weight, model\.embed_tokens\.weight"):
        load_weights(other, folder)


def test_load_weights_of_an_untied_model_needs_both_tensors(tmp_path):
    live = qwen(tied=False)
    assert tied_names(live) == []
    folder = save_model(live, tmp_path / "untied")
    changed(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(NpoError, match=r"tensor missing: lm_head\.weight($|\n)"):
        load_weights(live, folder)


def test_load_weights_reads_shards(tmp_path):
    source, live = qwen(tied=False, seed=1), qwen(tied=False)
    folder = save_model(source, tmp_path / "shards", max_shard_size="6KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    load_weights(live, folder)
    assert weights_digest(live) == weights_digest(source)
    first = sorted(folder.glob("model-*.safetensors"))[0]
    names = sorted(load_file(first))
    first.unlink()
    with pytest.raises(NpoError, match=f"tensor missing: .*{names[0]}"):
        load_weights(live, folder)


def test_load_weights_copies_in_place(tmp_path):
    live = qwen()
    parameter = live.model.embed_tokens.weight
    load_weights(live, save_model(qwen(seed=1), tmp_path / "new"))
    assert live.model.embed_tokens.weight is parameter
    assert parameter.requires_grad


def test_held_weights_are_read_once_for_each_state_of_the_files(tmp_path, monkeypatch):
    folder, reads = tmp_path / "step", []
    folder.mkdir()
    path = folder / "model.safetensors"
    save_file({"w": torch.ones(2)}, path)
    load_file = weights_io.load_file
    monkeypatch.setattr(weights_io, "load_file", lambda file: reads.append(file) or load_file(file))
    with hold_weights():
        first = read_saved(folder)
        with hold_weights():  # the outer block goes on
            assert read_saved(folder) is first
        assert read_saved(folder) is first
        path.unlink()
        save_file({"w": torch.full((2,), float("inf"))}, path)
        changed = read_saved(folder)
        assert changed.tensors["w"].tolist() == [float("inf")] * 2
        assert changed.bad_values["not finite"] == ["w"]
    assert len(reads) == 2
    read_saved(folder)
    assert len(reads) == 3


def test_held_weights_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_io, "MAX_HELD_BYTES", 20)
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")  # 8 bytes
    with hold_weights():
        first = read_saved(folders[0])
        for folder in folders[1:]:
            read_saved(folder)
        assert read_saved(folders[0]) is not first
