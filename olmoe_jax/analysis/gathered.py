"""Traces in files, ours or of other programs, gathered by model, checkpoint and domain."""

import dataclasses
import glob
import os
import pathlib

from olmoe_jax.analysis import analyses, counting, exchange, sinks

SCORES = ("logits", "probabilities", "renormalised")
MODEL = "traces"  # name of the model where the files do not say one


def read(patterns, *, scores="logits", **options):
    """Recordings of the traces in files.

    Args:
      patterns: globs of files that `exchange.read` takes, and of directories of traces.
      scores: what the files hold. "logits": router_logits are such, and weights are softmax values.
        "probabilities": router_logits are probabilities. "renormalised": weights were divided by
        their sum, and are left out.
      options: num_experts, k of `foreign.make`, where the files do not say it.
    Returns:
      model → analyses.Recordings of its checkpoints, by step. A file that does not say its domain
      is one, by the file's name.
    Raises:
      FileNotFoundError: nothing matches. ValueError: a file is none of the forms, two files are of
      one domain, or checkpoints have different domains.
    """
    options["probabilities"] = scores == "probabilities"
    options["ignore_weights"] = scores == "renormalised"
    found = {}
    for pattern in patterns:
        paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not paths:
            raise FileNotFoundError(f"{pattern}: no file matches")
        for path in map(pathlib.Path, paths):
            trace = exchange.read(path, **options)
            info = trace.info
            names = {"model": info.model or MODEL, "domain": info.domain or path.stem}
            trace = dataclasses.replace(trace, info=dataclasses.replace(info, **names))
            domains = found.setdefault(names["model"], {}).setdefault(
                (info.step if info.step is not None else -1, info.checkpoint), {}
            )
            if names["domain"] in domains:
                raise ValueError(
                    f"{path}: a second trace of {names['model']} on {names['domain']}; rename it"
                )
            domains[names["domain"]] = trace
    return {model: _recordings(model, of_steps) for model, of_steps in found.items()}


def _recordings(model, of_steps):
    domains = {tuple(sorted(traces)) for traces in of_steps.values()}
    if len(domains) > 1:
        raise ValueError(f"{model}: its checkpoints have traces of different domains")
    return [
        analyses.Recording(
            {domain: counting.count(trace) for domain, trace in sorted(of_steps[key].items())},
            dict(sorted(of_steps[key].items())),
        )
        for key in sorted(of_steps)
    ]


def export(models, folder, form) -> None:
    """Writes traces as FOLDER/MODEL/CHECKPOINT/DOMAIN.form, in place of what is there.

    Args:
      models: model → Recordings, as `read` returns.
      form: "npz", "csv" or "jsonl".
    """
    for model, recordings in models.items():
        for recording in recordings:
            for trace in recording.traces.values():
                where = pathlib.Path(folder) / model / (trace.info.checkpoint or "model")
                where.mkdir(parents=True, exist_ok=True)
                path = sinks.trace_folder(where, trace.info.domain)
                path = path.with_name(f"{path.name}.{form}")
                path.unlink(missing_ok=True)
                exchange.write(path, trace)
