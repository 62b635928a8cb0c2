"""Against logits of the loaded model, summed document by document in NumPy."""

import collections
import math

import jax
import numpy as np
import pytest

from olmoe_jax import loading
from olmoe_jax.data import pipeline
from olmoe_jax.studies import documents, results


def test_losses_are_the_models_by_the_document_of_each_target(finished):
    plan, _ = finished
    path, config = plan.path("good", 1), plan.config("good", 1)
    model, params = loading.load(path)
    data = pipeline.open(config.data.path)
    nats, targets = collections.Counter(), collections.Counter()
    for batch in pipeline.validation_batches(data, num_windows=10, batch_size=4):
        logits = model.apply({"params": params}, batch["tokens"]).logits
        log_probs = np.asarray(jax.nn.log_softmax(logits.astype(np.float32)), np.float64)
        for row in range(4):
            for i in range(1, batch["tokens"].shape[1]):
                if batch["loss_mask"][row, i]:
                    document = int(batch["documents"][row, i])
                    nats[document] -= log_probs[row, i - 1, batch["tokens"][row, i]]
                    targets[document] += 1
    found = results.read_documents(path)
    assert sorted(nats) == found["documents"].tolist()
    assert [targets[d] for d in sorted(nats)] == found["targets"].tolist()
    np.testing.assert_allclose(found["nats"], [nats[d] for d in sorted(nats)], rtol=1e-4)


def test_they_add_up_to_the_validation_loss_and_are_not_measured_twice(finished):
    plan, _ = finished
    path = plan.path("worse", 2)
    found = results.read_documents(path)
    final = results.read_run(path, "worse", 2).final("validation/loss")
    assert found["nats"].sum() / found["targets"].sum() == pytest.approx(final, rel=1e-5)
    assert math.isfinite(final)
    documents.measure(path, None, None)  # would need both, were there anything to do
