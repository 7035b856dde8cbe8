"""One rank of a job that torchrun started in a test: saves an FSDP2 model in shards as other trainers do.

After each of two optimizer steps: torch.distributed.checkpoint as prime-rl (`{"app": {"model", "optimizers", ...}}`)
and accelerate (`{"model"}`) call it, and a file per rank as verl writes it; rank 0 writes the whole tensors too.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from npo_cli.policy.model_folder import MICRO_BASE_FOLDER


def save_all(home: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    weights, moments = get_state_dict(model, [optimizer])
    app = {"model": weights, "optimizers": moments, "progress": {"step": step, "total_tokens": 8 * step}}
    dcp.save({"app": app}, checkpoint_id=home / "prime-rl" / "checkpoints" / f"step_{step}" / "trainer")
    dcp.save({"model": weights}, checkpoint_id=home / "trl" / f"checkpoint-{step}" / "pytorch_model_fsdp_0")
    actor = home / "verl" / f"global_step_{step}" / "actor"
    actor.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), actor / f"model_world_size_{size}_rank_{rank}.pt")
    whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    if rank == 0:
        model.config.save_pretrained(actor / "huggingface")
        AutoTokenizer.from_pretrained(MICRO_BASE_FOLDER).save_pretrained(actor / "huggingface")
        (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": size}))
        save_file({name: tensor.clone() for name, tensor in whole.items()}, home / f"whole-{step}.safetensors")
    dist.barrier()


def main(home: Path) -> None:
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(MICRO_BASE_FOLDER)
    model.config.max_position_embeddings = 100
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in (1, 2):
        model(torch.arange(8)[None]).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        save_all(home, step, model, optimizer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
