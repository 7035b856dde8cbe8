"""One rank of a job that torchrun started in a test: an engine with weights of its own, which rank 0 alone opens."""

import json
import sys

from npo_cli.distributed.launch import read_launch_info
from npo_cli.distributed.process_group import current_group, join_job
from npo_cli.inference.base import Engine, LogprobRequest, Sample
from npo_cli.policy.model import load_policy
from npo_cli.policy.weights_io import tensors_digest
from npo_cli.session import distributed
from npo_cli.session.distributed import GatheredWeights, MainRankEngine, shard_policy
from npo_cli.session.session import make_adapter_port
from tests.helpers.runs import tiny_recipe


class FakeServer(Engine):
    """Answers each request with the digest of the weights that it was sent."""

    reproducibility_warning = "fake"

    def __init__(self, adapters) -> None:
        self.adapters, self.digest, self.num_calls = adapters, "", 0

    def update_weights(self, model, *, version: str) -> None:
        self.version = version
        tensors = model.state_dict() if self.adapters is None else self.adapters.read_adapters()
        self.digest = tensors_digest(tensors)

    def generate(self, requests, *, temperature: float, max_new_tokens: int) -> list[Sample]:
        self.num_calls += 1
        return [f"{request} {self.digest} {self.num_calls}" for request in requests]

    def compute_logps(self, requests: list[LogprobRequest]) -> list[tuple[float, ...]]:
        return [(float(current_group().rank),) for _ in requests]


def try_engine(overrides: list[str]) -> dict[str, object]:
    recipe = tiny_recipe(*overrides)
    whole = load_policy(recipe.model)
    expected = tensors_digest(whole.tensors if whole.adapters is None else whole.adapter_weights)
    policy = shard_policy(whole, recipe, folder=None)
    weights = GatheredWeights(policy)
    adapters = policy.adapters and make_adapter_port(policy, policy.adapters, weights=weights)
    distributed.open_engine = lambda settings, handle: FakeServer(adapters)
    engine = MainRankEngine(recipe.engine, None, weights)
    for version in ("first", "second"):
        engine.update_weights(policy.model, version=version)
    outcome = {
        "expected": expected,
        "samples": engine.generate(["a", "b"], temperature=1.0, max_new_tokens=1),
        "logps": engine.compute_logps([None]),
        "version": engine.version,
        "warning": engine.reproducibility_warning,
        "is_open": engine.engine is not None,
    }
    return {name: current_group().gather(value, phase="report") for name, value in outcome.items()}


if __name__ == "__main__":
    launch = read_launch_info()
    assert launch is not None, "torchrun sets the environment"
    with join_job(launch) as joined:
        outcomes = try_engine(sys.argv[1:])
        if joined.is_main:
            sys.stdout.write(json.dumps(outcomes) + "\n")
