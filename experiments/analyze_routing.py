"""What a router does: records any model on any text, runs the analyses, says what they come to.

    python -m experiments.analyze_routing --model=runs/demo --output=routing
    python -m experiments.analyze_routing --model=OLMoE-1B-7B --data='text/*.txt' --output=routing
    python -m experiments.analyze_routing --routing_dump=routing_output --output=routing
    python -m experiments.analyze_routing --traces='served/*.npy' --num_experts=64 --output=routing

--model: directories of any kind that `olmoe_jax.load` takes, comma-separated; of a run, or of a
folder of revisions, all checkpoints. --data: a prepared data set, or text files, one domain each;
without it the validation data of the (first) run. A model that does not fit in memory is read layer
by layer. What is recorded stays in OUTPUT/traces/MODEL/CHECKPOINT/DOMAIN, with its counts, and is
neither recorded nor counted again. --traces: what other programs recorded, a domain per file
(`olmoe_jax/analysis/exchange.py` says in which forms). --interventions=N asks what the loss becomes
without the N experts that stand out most in each domain. --prompt="a text" shows the experts of
each of its tokens.
OUTPUT/report.html shows what was found, OUTPUT/figures/ holds its charts as pictures and CSV; the
numbers are in JSON files, which `olmoe_jax/analysis/results.py` explains. They take the place of
a former run's. A stopped run goes on with the same command.
"""

import dataclasses
import os
import pathlib

from absl import flags

from experiments import app

_MODEL = flags.DEFINE_list("model", None, "Directories of models, comma-separated.")
_DATA = flags.DEFINE_list(
    "data", None, "A prepared data set, or files of text: globs; default: the data of the run."
)
_DUMP = flags.DEFINE_string("routing_dump", None, "Released dumps instead of --model and --data.")
_TRACES = flags.DEFINE_list("traces", None, "Files of traces instead of --model: globs.")
_NUM_EXPERTS = flags.DEFINE_integer("num_experts", None, "Of --traces that do not say it.")
_K = flags.DEFINE_integer(
    "num_experts_per_token", None, "Of --traces that hold router logits and no experts."
)
_SCORES = flags.DEFINE_enum(
    "trace_scores", "logits", ("logits", "probabilities", "renormalised"),
    "What --traces hold: router_logits, or probabilities under that name; renormalised: weights "
    "that were divided by their sum, which are left out.",
)  # fmt: skip
_EXPORT = flags.DEFINE_enum(
    "export", None, ("npz", "csv", "jsonl"), "Also write the traces in this form: OUTPUT/export."
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory for traces and results.", required=True)
_TOKENIZER = flags.DEFINE_list(
    "tokenizer", None, "tokenizer.json; default: the model's. Of models with different ones: "
    "MODEL=tokenizer.json,MODEL=…"
)  # fmt: skip
_SPLIT = flags.DEFINE_string("split", "validation", "Of prepared data: validation or train.")
_CONTEXT = flags.DEFINE_integer("context_length", None, "Tokens run together; default 2,048, or "
                                "what the model has been trained on.")  # fmt: skip
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 204_800, "Of each domain, as the paper; 0: all.")
_PRECISION = flags.DEFINE_enum(
    "precision", "float32", ("float32", "bfloat16"),
    "Of the router's product: bfloat16 is what a Hugging Face model in bfloat16 does.",
)  # fmt: skip
_KEEP = flags.DEFINE_bool(
    "keep_traces",
    True,
    "Keep every token's experts; if not, those of a checkpoint are deleted "
    "once it is counted, and a stopped run goes on from the counts; at the end all are deleted.",
)
_TOTAL_STEPS = flags.DEFINE_integer(
    "total_steps", None, "Of the whole training, if it went on behind the last checkpoint."
)
_COACTIVATION = flags.DEFINE_enum(
    "coactivation", "paper", ("paper", "adjacent"), "adjacent: as in the paper's released script."
)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "A text whose tokens the report shows with their experts; may be repeated."
)
_INTERVENTIONS = flags.DEFINE_integer(
    "interventions", 0, "Experts per domain that are muted and routed around, to see what the loss "
    "becomes; as many random ones beside them; and random routing. It takes 6 experts over all "
    "domains to tell an effect from chance. 0: none."
)  # fmt: skip
_INTERVENTION_TOKENS = flags.DEFINE_integer(
    "intervention_tokens", 16_384, "Of each domain, on which interventions are measured."
)
_FORMAT = flags.DEFINE_enum(
    "output_format",
    "html",
    ("html", "none"),
    "html: also report.html and figures/; none: numbers only.",
)
_NO_TOKENIZER = "{} has no tokenizer: name its tokenizer.json with --tokenizer"

TRACES, UNKEPT = "traces", "traces.unkept"  # folders of the output

# Flags that only one source, or every source but one, has a use for.
_ONLY_WITH = {
    "model": (
        "data", "split", "context_length", "max_tokens", "precision", "keep_traces", "prompt",
        "interventions", "intervention_tokens",
    ),
    "traces": ("num_experts", "num_experts_per_token", "trace_scores"),
}  # fmt: skip
_NOT_WITH_DUMPS = {
    "export": "has no traces",
    "total_steps": "has one checkpoint",
    "coactivation": "has no pairs of experts",
}


def main(argv):
    """Flags → recordings → analyses → files and words."""
    del argv
    _check_flags()
    from olmoe_jax.analysis import analyses, gathered, page, prompt, results, sessions

    output = pathlib.Path(os.path.expanduser(_OUTPUT.value))
    prompts, recorded = _route_prompts(), {}
    if _DUMP.value is not None:
        models = _read_dumps()
    elif _TRACES.value is not None:
        models = _read_traces()
    else:
        models, recorded = _record(output)
    if _EXPORT.value:
        gathered.export(models, output / "export", _EXPORT.value)
    _check_tokenizers(models)
    found = {}
    for name, recordings in models.items():
        found[name] = analyses.find(
            recordings, total_steps=_TOTAL_STEPS.value, decode=_decoder(name, recorded),
            definition=_COACTIVATION.value,
            settled=recorded[name].settled if name in recorded else None,
        )  # fmt: skip
        if _INTERVENTIONS.value:
            found[name] = _intervene(found[name], recorded[name])
    results.clear(output, models)
    page.clear(output)
    last = {name: recordings[-1].traces for name, recordings in models.items()}
    weights = {name: one.checkpoints[-1].path for name, one in recorded.items()}
    between = analyses.write_all(found, output, traces=last, weights=weights)
    for name, one in recorded.items():
        folder = output / name if len(models) > 1 else output
        said = analyses.write_siblings(one.checkpoints, folder)
        found[name] = dataclasses.replace(found[name], sentences=(*found[name].sentences, *said))
    content = {
        "models": {
            name: {"sentences": one.sentences, "notes": one.notes} for name, one in found.items()
        },
        "between": between,
    }
    results.write(output / f"{results.SUMMARY}.json", content)
    for name, routed in prompts.items():
        folder = output / name if len(models) > 1 else output
        results.write(folder / "prompt.json", prompt.to_json(routed))
    for name, one in found.items():
        print(f"\n{name}")
        print("\n".join(f"  {line}" for line in one.sentences))
        print("\n".join(f"  note: {line}" for line in one.notes))
    print("\n".join(f"  {line}" for line in between))
    if _FORMAT.value == "html":
        page.write(output, found, between, prompts=prompts)
        print(f"page: {output / page.PATH}")
    print(f"numbers: {output}")
    app.write_json(content)
    if not _KEEP.value:
        sessions.delete(output / UNKEPT)


def _check_flags():
    """Refuses flags that contradict each other, and those that would be passed over."""
    sources = [one for one in ("model", "routing_dump", "traces") if flags.FLAGS[one].present]
    if len(sources) != 1:
        raise ValueError("give --model with --data, or --routing_dump, or --traces")
    (source,) = sources
    for needed, names in _ONLY_WITH.items():
        for name in names if needed != source else ():
            if flags.FLAGS[name].present:
                raise ValueError(f"--{name} has no effect with --{source}: it needs --{needed}")
    for name, why in _NOT_WITH_DUMPS.items() if source == "routing_dump" else ():
        if flags.FLAGS[name].present:
            raise ValueError(f"--{name} has no effect with --routing_dump, which {why}")
    if _EXPORT.value and not _KEEP.value:
        raise ValueError("--export needs the traces that --nokeep_traces deletes")
    if _SPLIT.present and _DATA.value is not None and not _is_prepared(_DATA.value):
        raise ValueError("--split has no effect on files of text: it needs prepared --data")
    if _INTERVENTIONS.value < 0:
        raise ValueError(f"--interventions={_INTERVENTIONS.value}: must be 0 or more")
    if _INTERVENTION_TOKENS.present and not _INTERVENTIONS.value:
        raise ValueError("--intervention_tokens has no effect without --interventions")
    if _INTERVENTION_TOKENS.value < 2:
        raise ValueError(f"--intervention_tokens={_INTERVENTION_TOKENS.value}: must be 2 or more")


def _read_dumps():
    from olmoe_jax.analysis import analyses, dumps

    return {
        name: [analyses.Recording(dumps.read(folder, model=name), {})]
        for name, folder in dumps.models(_DUMP.value).items()
    }


def _read_traces():
    from olmoe_jax.analysis import gathered

    return gathered.read(
        _TRACES.value, scores=_SCORES.value, num_experts=_NUM_EXPERTS.value, k=_K.value
    )


def _decoder(name, recorded):
    """Token id → text of the model `name`, or None."""
    tokenizer = recorded[name].tokenizer if name in recorded else _named_tokenizer(name)
    return None if tokenizer is None else lambda token: tokenizer.decode([token])


def _named_tokenizer(name):
    """What --tokenizer says of the model `name`, or None."""
    from olmoe_jax.data import tokenizer as tokenizer_lib

    by_name, common = _tokenizer_files()
    path = by_name.get(name, common)
    return None if path is None else tokenizer_lib.load(path)


def _tokenizer_files():
    """--tokenizer: ({model: file}, file of all other models or None)."""
    by_name, common = {}, None
    for entry in _TOKENIZER.value or ():
        name, is_named, path = entry.partition("=")
        if is_named and "/" not in name:
            by_name[name] = path
        else:
            common = entry
    return by_name, common


def _check_tokenizers(models):
    """Refuses --tokenizer=MODEL=FILE of a model that there is not."""
    by_name, common = _tokenizer_files()
    for name in by_name:
        if name not in models:
            raise ValueError(f"--tokenizer={name}=…: no such model; there are {', '.join(models)}")
    if common is not None and len(models) > 1 + len(by_name):
        _announce(
            f"note: tokens of more than one model are read with {common}; "
            "--tokenizer=MODEL=FILE,… gives each its own"
        )


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """Of one model: its suites.Checkpoints, the texts, Tokenizer and saturation.Saturation or
    None."""

    checkpoints: list
    texts: list
    tokenizer: object
    settled: object


def _route_prompts():
    """Model → prompt.Routed of every --prompt, through its last checkpoint."""
    from olmoe_jax.analysis import prompt, suites

    found = {}
    for directory in _MODEL.value if _PROMPT.value else ():
        last = suites.checkpoints_of(directory)[-1]
        tokenizer = _tokenizer(last)
        if tokenizer is None:
            raise ValueError(_NO_TOKENIZER.format(last.path))
        found[last.model] = prompt.route(last, _PROMPT.value, tokenizer, precision=_PRECISION.value)
    return found


def _record(output):
    """({model: Recordings}, {model: _Recorded})."""
    from olmoe_jax.analysis import intervening, sessions, suites

    found = {}
    for directory in _MODEL.value:
        every = suites.checkpoints_of(directory)
        if every[0].model in found:
            raise ValueError(f"--model: two of the name {every[0].model}: rename one directory")
        found[every[0].model] = every
    _check_tokenizers(found)
    models, recorded = {}, {}
    for name, every in found.items():
        tokenizer, texts = _texts(every[-1])
        if _INTERVENTIONS.value:
            intervening.open_job(every[-1], texts, precision=_PRECISION.value)  # or refuses
            for line in _doubts(texts):
                _announce(line)
        models[name], settled = sessions.record(
            every, texts, output / (TRACES if _KEEP.value else UNKEPT) / name, keep=_KEEP.value,
            total_steps=_TOTAL_STEPS.value, precision=_PRECISION.value, announce=_announce,
        )  # fmt: skip
        recorded[name] = _Recorded(every, texts, tokenizer, settled)
    return models, recorded


def _doubts(texts):
    """Why effects of interventions on these texts could not be told from chance."""
    from olmoe_jax.analysis import interventions

    number, enough = _INTERVENTIONS.value, interventions.enough(len(texts))
    if number < enough:
        domains = "one domain" if len(texts) == 1 else f"each of {len(texts)} domains"
        yield (
            f"note: --interventions={number} in {domains}: too few experts to tell an effect from "
            f"chance; --interventions={enough} would do"
        )
    single = [one.domain for one in texts if one.documents[: _INTERVENTION_TOKENS.value][-1] == 0]
    if single:
        yield (
            f"note: one document in {', '.join(single)}: effects of interventions cannot be told "
            "from chance; take more text (in files of text a line <|endoftext|> ends a document)"
        )


def _announce(line):
    print(line, flush=True)


def _intervene(found, recorded):
    from olmoe_jax.analysis import analyses, intervening, interventions

    chosen = interventions.plan(found.domains, _INTERVENTIONS.value)
    effects = intervening.run(
        recorded.checkpoints[-1], recorded.texts, chosen, max_tokens=_INTERVENTION_TOKENS.value,
        precision=_PRECISION.value, announce=_announce,
    )  # fmt: skip
    return analyses.with_interventions(found, effects)


def _texts(checkpoint):
    """(Tokenizer or None, Texts) for one suites.Checkpoint."""
    from olmoe_jax.analysis import texts
    from olmoe_jax.porting import sources

    longest = sources.open_source(checkpoint.path).config.model.max_length
    limits = {
        "context_length": _CONTEXT.value or min(texts.CONTEXT_LENGTH, longest),
        "max_tokens": _MAX_TOKENS.value or None,
    }
    tokenizer = _tokenizer(checkpoint)
    data = _DATA.value or [_data_of_run()]
    if _is_prepared(data):
        found = texts.from_prepared(data[0], split=_SPLIT.value, **limits)
        return tokenizer or found[0].tokenizer, found
    if tokenizer is None:
        raise ValueError(_NO_TOKENIZER.format(checkpoint.path))
    return tokenizer, texts.from_files(data, tokenizer, **limits)


def _is_prepared(data):
    """Whether --data is a folder; else it is files of text."""
    return len(data) == 1 and os.path.isdir(os.path.expanduser(data[0]))


def _tokenizer(checkpoint):
    """That of --tokenizer, else the model's own, or None."""
    from olmoe_jax import generation

    return _named_tokenizer(checkpoint.model) or generation.find_tokenizer(checkpoint.path)


def _data_of_run():
    from olmoe_jax import generation

    found = generation.data_path(pathlib.Path(os.path.expanduser(_MODEL.value[0])))
    if found is None:
        raise ValueError(f"{_MODEL.value[0]} is no run, whose data could be read: give --data")
    return str(found)


if __name__ == "__main__":
    app.run(main, flags_with_json=True)
