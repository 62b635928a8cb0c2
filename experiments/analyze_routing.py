"""What a router does: records any model on any text, runs the analyses, says what they come to.

    python -m experiments.analyze_routing --model=runs/demo --output=routing
    python -m experiments.analyze_routing --model=OLMoE-1B-7B --data='text/*.txt' --output=routing
    python -m experiments.analyze_routing --routing_dump=routing_output --output=routing

--model: directories of any kind that `olmoe_jax.load` takes, comma-separated; of a run, or of a
folder of revisions, all checkpoints. --data: a prepared data set, or text files, one domain each;
without it the validation data of the (first) run. A model that does not fit in memory is read layer
by layer. What is recorded stays in OUTPUT/traces/MODEL/CHECKPOINT/DOMAIN and is not recorded again.
OUTPUT/report.html shows what was found, OUTPUT/figures/ holds its charts as pictures and CSV; the
numbers are in JSON files, which `olmoe_jax/analysis/results.py` explains. --prompt="a text" shows
the experts of each of its tokens. A stopped run goes on with the same command.
"""

import functools
import os
import pathlib

from absl import flags

from experiments import app

_MODEL = flags.DEFINE_list("model", None, "Directories of models, comma-separated.")
_DATA = flags.DEFINE_list(
    "data", None, "A prepared data set, or files of text: globs; default: the data of the run."
)
_DUMP = flags.DEFINE_string("routing_dump", None, "Released dumps instead of --model and --data.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for traces and results.", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer.json; default: the model's.")
_SPLIT = flags.DEFINE_string("split", "validation", "Of prepared data: validation or train.")
_CONTEXT = flags.DEFINE_integer("context_length", None, "Tokens run together; default 2,048, or "
                                "what the model has been trained on.")  # fmt: skip
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 204_800, "Of each domain, as the paper; 0: all.")
_PRECISION = flags.DEFINE_enum(
    "precision", "float32", ("float32", "bfloat16"),
    "Of the router's product: bfloat16 is what a Hugging Face model in bfloat16 does.",
)  # fmt: skip
_KEEP = flags.DEFINE_bool(
    "keep_traces", True, "Keep every token's experts; without them no saturation and no matching."
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
_FORMAT = flags.DEFINE_enum(
    "output_format",
    "html",
    ("html", "none"),
    "html: also report.html and figures/; none: numbers only.",
)
_NO_TOKENIZER = "{} has no tokenizer: name its tokenizer.json with --tokenizer"


def main(argv):
    """Flags → recordings → analyses → files and words."""
    del argv
    if (_DUMP.value is None) == (_MODEL.value is None):
        raise ValueError("give --model with --data, or --routing_dump")
    if _DUMP.value is not None and _DATA.value is not None:
        raise ValueError("--data says which text a --model is to read: --routing_dump needs none")
    if _DUMP.value is not None and _PROMPT.value:
        raise ValueError("--prompt needs a --model to read it: --routing_dump has none")
    from olmoe_jax.analysis import analyses, page, prompt, results

    output = pathlib.Path(os.path.expanduser(_OUTPUT.value))
    prompts = _route_prompts()
    models, tokenizer = _read_dumps() if _DUMP.value is not None else _record(output)
    decode = None if tokenizer is None else lambda token: tokenizer.decode([token])
    found = {}
    for name, recordings in models.items():
        found[name] = analyses.find(
            recordings, total_steps=_TOTAL_STEPS.value, decode=decode,
            definition=_COACTIVATION.value,
        )  # fmt: skip
    last = {name: recordings[-1].traces for name, recordings in models.items()}
    between = analyses.write_all(found, output, traces=last, decode=decode)
    content = {
        "models": {
            name: {"sentences": one.sentences, "notes": one.notes} for name, one in found.items()
        },
        "between": between,
    }
    results.write(output / "summary.json", content)
    for name, routed in prompts.items():
        folder = output / name if len(models) > 1 else output
        results.write(folder / "prompt.json", prompt.to_json(routed))
    for name, one in found.items():
        print(f"\n{name}")
        print("\n".join(f"  {line}" for line in one.sentences))
        print("\n".join(f"  note: {line}" for line in one.notes))
    print("\n".join(f"  {line}" for line in between))
    if _FORMAT.value == "html":
        page.write(output, found, between, decode=decode, prompts=prompts)
        print(f"page: {output / page.PATH}")
    print(f"numbers: {output}")
    app.write_json(content)


def _read_dumps():
    from olmoe_jax.analysis import analyses, dumps
    from olmoe_jax.data import tokenizer as tokenizer_lib

    models = {
        name: [analyses.Recording(dumps.read(folder, model=name), {})]
        for name, folder in dumps.models(_DUMP.value).items()
    }
    tokenizer = None if _TOKENIZER.value is None else tokenizer_lib.load(_TOKENIZER.value)
    return models, tokenizer


def _route_prompts():
    """Model → prompt.Routed of every --prompt, through its last checkpoint."""
    from olmoe_jax.analysis import prompt, suites

    found = {}
    for directory in _MODEL.value if _PROMPT.value else ():
        last = suites.checkpoints_of(directory)[-1]
        tokenizer = _tokenizer(last.path)
        if tokenizer is None:
            raise ValueError(_NO_TOKENIZER.format(last.path))
        found[last.model] = prompt.route(last, _PROMPT.value, tokenizer, precision=_PRECISION.value)
    return found


def _record(output):
    """({model: Recordings}, Tokenizer or None)."""
    from olmoe_jax.analysis import analyses, counts, recording, suites

    found = {}
    for directory in _MODEL.value:
        every = suites.checkpoints_of(directory)
        if every[0].model in found:
            raise ValueError(f"--model: two of the name {every[0].model}: rename one directory")
        found[every[0].model] = every
    models, first, said = {}, None, set()

    def announce(line):
        if line not in said:  # every checkpoint reads the same text
            said.add(line)
            print(line, flush=True)

    for name, every in found.items():
        tokenizer, texts = _texts(every[-1].path)
        first = first or tokenizer
        models[name] = []
        for checkpoint in every:
            print(f"recording {name} {checkpoint.name}".rstrip(), flush=True)
            folder = output / "traces" / name / (checkpoint.name or "model")
            # Which tokens went where is asked of the last one only, and is half of the counting.
            count = functools.partial(counts.Counter, vocabulary=checkpoint is every[-1])
            recorded = list(
                recording.record(
                    checkpoint, texts, folder if _KEEP.value else None, accumulate=count,
                    precision=_PRECISION.value, announce=announce,
                )
            )  # fmt: skip
            parts = {one.info.domain: one.accumulated.result() for one in recorded}
            traces = {one.info.domain: one.trace for one in recorded if one.trace is not None}
            models[name].append(analyses.Recording(parts, traces))
    return models, first


def _texts(model):
    """(Tokenizer or None, Texts) for one model."""
    from olmoe_jax.analysis import texts
    from olmoe_jax.porting import sources

    longest = sources.open_source(model).config.model.max_length
    limits = {
        "context_length": _CONTEXT.value or min(texts.CONTEXT_LENGTH, longest),
        "max_tokens": _MAX_TOKENS.value or None,
    }
    tokenizer = _tokenizer(model)
    data = _DATA.value or [_data_of_run()]
    if len(data) == 1 and os.path.isdir(os.path.expanduser(data[0])):
        found = texts.from_prepared(data[0], split=_SPLIT.value, **limits)
        return tokenizer or found[0].tokenizer, found
    if tokenizer is None:
        raise ValueError(_NO_TOKENIZER.format(model))
    return tokenizer, texts.from_files(data, tokenizer, **limits)


def _tokenizer(model):
    """That of --tokenizer, else the model's own, or None."""
    from olmoe_jax import generation
    from olmoe_jax.data import tokenizer as tokenizer_lib

    if _TOKENIZER.value is not None:
        return tokenizer_lib.load(_TOKENIZER.value)
    return generation.find_tokenizer(model)


def _data_of_run():
    from olmoe_jax import generation

    found = generation.data_path(pathlib.Path(os.path.expanduser(_MODEL.value[0])))
    if found is None:
        raise ValueError(f"{_MODEL.value[0]} is no run, whose data could be read: give --data")
    return str(found)


if __name__ == "__main__":
    app.run(main, flags_with_json=True)
