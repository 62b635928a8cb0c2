"""What a study's report says of its routers, held against the analyses made by hand."""

import dataclasses
import shutil

import numpy as np
import pytest

from olmoe_jax.analysis import counting, domains, recording, suites, texts
from olmoe_jax.studies import report, results, routing


def _quiet(line):
    del line


def _text(plan, arm):
    found = texts.from_prepared(plan.configs[arm].data.path, context_length=16, announce=_quiet)
    return found


def test_the_report_says_what_the_analyses_say(finished):
    plan, content = finished
    row = content["routing"]["good"]
    ids, distances = {}, []
    for seed in plan.seeds:
        for one in suites.checkpoints_of(plan.path("good", seed)):
            parts, kept = [], []
            for found in recording.record(
                one, _text(plan, "good"), accumulate=_Both, announce=_quiet
            ):
                parts.append(found.accumulated.counter.result())
                kept += found.accumulated.ids
            ids[seed, one.step] = np.concatenate(kept)[:, 0]
        one = domains.specialisation(parts).topk
        distances.append((one.specific, one.specific_chance, one.tv.value))
        loads = np.stack([part.topk for part in parts]).astype(float)  # [domains, layers, experts]
        shares = loads / loads.sum(-1, keepdims=True)
        by_hand = 0.5 * np.abs(shares - shares.mean(0)).sum(-1)
        np.testing.assert_allclose(one.specific, by_hand.T)
    found = [row[name] for name in ("specialisation", "specialisation_chance", "imbalance")]
    assert found == pytest.approx(np.mean(distances, (0, 2, 3)))
    assert row["saturation_chance"] == 2 / 4 and row["domains"] == ["a", "b", "c"]
    assert row["tokens"] == sum(len(one.tokens) for one in _text(plan, "good"))
    assert list(row["saturation"]) == ["0.33"]  # of steps 4, 8 and 12 next to 10, 20 and 40 %
    same = [
        np.mean([len(set(a) & set(b)) / 2
                 for a, b in zip(ids[seed, 4], ids[seed, 12], strict=True)])
        for seed in plan.seeds
    ]  # fmt: skip
    assert row["saturation"]["0.33"] == pytest.approx(np.mean(same))
    assert 0 <= row["matching"] <= 1 and 0 <= row["matching_chance"] <= 1


class _Both:
    """Counts, and the ids themselves."""

    def __init__(self, info):
        self.counter, self.ids = counting.Counter(info, vocabulary=False), []

    def add(self, block):
        self.counter.add(block)
        self.ids.append(block.expert_ids)


def _traced(plan, seed):
    """Steps of which there are traces, with those that are there twice."""
    folder = plan.workdir / routing.FOLDER / f"good/seed_{seed}"
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


def _found(plan):
    return {(arm, seed): results.read_run(plan.path(arm, seed), arm, seed)
            for arm in plan.configs for seed in plan.seeds}  # fmt: skip


def test_traces_are_kept_and_dense_arms_left_out(finished, monkeypatch):
    plan, content = finished
    assert "Inside the routers" in (plan.workdir / report.PAGE).read_text()
    assert _traced(plan, 1) == ["12", "4"]
    found = _found(plan)
    monkeypatch.setattr(recording.layerwise, "apply_layer", None)  # nothing is computed again
    assert routing.measure(plan, found, announce=_quiet) == content["routing"]
    base = plan.configs["good"]
    dense = dataclasses.replace(
        base, model=dataclasses.replace(base.model, num_experts=0, num_experts_per_token=0)
    )
    other = dataclasses.replace(base, model=dataclasses.replace(base.model, router="expert_choice"))
    changed = dataclasses.replace(plan, configs={"good": dense, "worse": other})
    assert routing.measure(changed, found, announce=_quiet) == {
        "good": {"left_out": "dense"},
        "worse": {"left_out": "a token's experts depend on the batch"},
    }


def test_a_run_made_again_and_a_moved_workdir_are_traced_anew(finished, tmp_path):
    plan, content = finished
    moved = dataclasses.replace(plan, workdir=tmp_path / "moved")
    shutil.copytree(plan.workdir, moved.workdir)
    assert routing.measure(moved, _found(moved), announce=_quiet) == content["routing"]
    for arm in plan.configs:  # seed 1 is now what seed 2 was
        shutil.rmtree(moved.path(arm, 1))
        shutil.copytree(moved.path(arm, 2), moved.path(arm, 1))
    again = routing.measure(moved, _found(moved), announce=_quiet)
    assert again["good"]["matching"] > content["routing"]["good"]["matching"]
    assert _traced(moved, 1) == ["12", "4"]  # the old ones are gone
