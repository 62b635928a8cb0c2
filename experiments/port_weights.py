"""Weights in and out: Hugging Face and the original OLMo training format ↔ checkpoints of ours.

    python -m experiments.port_weights --input=OLMoE-1B-7B-0924 --output=olmoe --to=orbax --verify
    python -m experiments.port_weights --input=runs/demo --output=demo_hf --to=huggingface --verify

`--input` is a Hugging Face folder, an original training checkpoint (config.yaml beside its
weights), a run's workdir (its newest checkpoint), one checkpoint, or a folder of revisions
(`step5000-tokens20B/`, …), which are ported in order. If the command is killed, run it again: it
keeps what is finished.
"""

import os
import shlex

from absl import flags

from experiments import app
from olmoe_jax import config as config_lib
from olmoe_jax.checkpoints import manifest
from olmoe_jax.porting import port, verification

_INPUT = flags.DEFINE_string("input", None, "Directory of the model, or of several revisions.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to create.")
_TO = flags.DEFINE_enum("to", None, port.TO, "Format to write.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, config_lib.DTYPE_NAMES, "Cast to this; without it every tensor keeps its dtype."
)
_VERIFY = flags.DEFINE_bool("verify", False, "Read the result back and compare it with the input.")
_STRICT = flags.DEFINE_bool("strict", False, "Refuse weights that hold NaN.")

ROWS = 12  # of the table on the terminal; all of it is in the manifest


def main(argv):
    """Ports, verifies, and prints the table and the lines to paste next."""
    del argv
    for flag in (_INPUT, _OUTPUT, _TO):
        if flag.value is None:
            raise ValueError(f"--{flag.name} is required")
    app.tune_allocator()  # slabs of equal size come and go
    results, claims = [], {}
    pairs = port.pairs(_INPUT.value, _OUTPUT.value, to=_TO.value)
    if len(pairs) > 1:
        port.check_all(pairs, dtype=_DTYPE.value)
    for source, target in pairs:
        if len(pairs) > 1 and os.path.exists(target):  # whole, as it has its name
            _say(f"{target}: is there already")
            if _VERIFY.value:
                claims[target] = _verify(source, target)
            continue
        result = port.port(
            source, target, to=_TO.value, dtype=_DTYPE.value, strict=_STRICT.value, announce=_say
        )
        results.append(result)
        kept = f" ({result.bytes_kept / 1e9:.2f} GB kept)" if result.bytes_kept else ""
        _say(
            f"{result.path}: {result.tensors:,} tensors, {result.bytes / 1e9:.2f} GB{kept} in "
            f"{result.seconds:.1f} s"
        )
        if _VERIFY.value:
            claims[result.path] = _verify(source, result.path)
    _show_table(pairs[-1][1])
    _show_next(pairs[-1][1])
    app.write_json({"results": results, "claims": claims})


def _verify(source, target):
    claims = verification.verify(source, target, announce=_say)
    for claim in claims:
        _say(claim if claim.startswith("not checked") else f"verified: {claim}")
    return claims


def _say(line):
    print(line, flush=True)


def _show_table(path):
    table = port.table(path)
    first, second = (max(len(row[i]) for row in table[:ROWS]) for i in (0, 1))
    print(f"\n{'tensor':<{first}}  {'file':<{second}}  sha256")
    for name, file, sha256 in table[:ROWS]:
        print(f"{name:<{first}}  {file:<{second}}  {sha256[:16]}…")
    if len(table) > ROWS:
        where = os.path.join(path, manifest.FOLDER, "process_0.json")
        print(f"… {len(table) - ROWS:,} more in {where}")


def _show_next(output):
    print("\nnext:")
    if _TO.value == port.HUGGING_FACE:
        print("  from transformers import AutoModelForCausalLM")
        print(f'  model = AutoModelForCausalLM.from_pretrained("{output}")')
    print(f'  import numpy, olmoe_jax; model, params = olmoe_jax.load("{output}")')
    apply = 'model.apply({"params": params}, numpy.array([[5, 3, 7]]), return_routing=True)'
    print(f"  out = {apply}  # out.logits, out.routing")
    print(f'  {app.python()} -m experiments.generate --model={shlex.quote(output)} --prompt="The "')


if __name__ == "__main__":
    app.run(main, flags_with_json=True)
