"""What a suite is told."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of `experiments.benchmark`.

    Attributes:
      rounds: undisturbed rounds; at most as many disturbed ones are repeated.
      scratch: a folder for files; left as it was.
      preset, num_layers: of the suites `port` and `recording`; shards: of `port`.
      peer_python: interpreter of an environment that holds the peer; None: no peer.
      dtype: of the suites that compute: parameters, moments and products.
      expert_backend: how our experts are computed (`model.expert_backend`); None: "auto", and in
        the suites `moe_layer` and `experts` every one that runs here.
      shape: of the suite `moe_layer`.
      allocator_tuned: whether this process keeps large freed blocks (`app.tune_allocator`): peers
        that are to have the same allocator then get the same settings.
    """

    rounds: int = 3
    scratch: str = "runs/benchmark"
    preset: str = "olmoe-1b-7b"
    num_layers: int | None = None
    shards: int = 3
    peer_python: str | None = None
    dtype: str = "float32"
    expert_backend: str | None = None
    shape: str = "a"
    allocator_tuned: bool = False
