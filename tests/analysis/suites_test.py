import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import checkpoints, config
from olmoe_jax.analysis import suites
from tests.analysis import models
from tests.porting import tiny


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    run = config.Config(
        model=tiny.MODEL,
        data=config.DataConfig(sequence_length=16),
        training=config.TrainingConfig(batch_size=100),
    )
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), checkpoints.abstract_params(tiny.MODEL))
    with checkpoints.Checkpoints(folder, run) as kept:
        for step in (0, 2, 11):
            kept.save_params(step, params)
    return folder


def test_a_workdir_gives_all_its_checkpoints(workdir):
    found = suites.checkpoints_of(workdir)
    assert [(c.name, c.step, c.tokens, c.model) for c in found] == [
        ("step0-tokens0K", 0, 0, "first"),
        ("step2-tokens3K", 2, 3200, "first"),
        ("step11-tokens17K", 11, 17600, "first"),
    ]
    assert [c.path for c in found] == [workdir / "checkpoints" / c.name for c in found]
    assert suites.one(workdir) == found[-1]
    assert suites.one(found[1].path) == found[1]
    assert suites.checkpoints_of(found[1].path) == [found[1]]


def test_revisions_and_single_folders(tmp_path):
    for name in ("step11000-tokens46B", "step2-tokens8M"):
        models.folder(tmp_path / "suite" / name)
    found = suites.checkpoints_of(tmp_path / "suite")
    assert [tuple(c[:3]) for c in found] == [
        ("step2-tokens8M", 2, 8 * 10**6),
        ("step11000-tokens46B", 11000, 46 * 10**9),
    ]
    assert {c.model for c in found} == {"suite"}
    single = models.folder(tmp_path / "alone")
    assert suites.checkpoints_of(single) == [suites.Checkpoint("", None, None, single, "alone")]
    with pytest.raises(FileNotFoundError):
        suites.checkpoints_of(tmp_path / "none")
    assert np.all([c.path.is_dir() for c in found])
