"""olmoe_jax: train, keep, port and look inside open Mixture-of-Experts language models in JAX.

    import olmoe_jax
    model, params = olmoe_jax.load("runs/demo")
    out = model.apply({"params": params}, input_ids, return_routing=True)

Names are imported when first used: preparing data must not wait for JAX, nor a model for Orbax.
"""

import importlib

# Public name → the module that defines it; None: the name is a module itself.
_PUBLIC = {
    "Config": "config",
    "ModelConfig": "config",
    "RoutingOverride": "model.routing",
    "Transformer": "model.transformer",
    "accounting": None,
    "load": "loading",
    "presets": None,
}

__all__ = sorted(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'olmoe_jax' has no attribute {name!r}")
    module = importlib.import_module(f"olmoe_jax.{_PUBLIC[name] or name}")
    return getattr(module, name) if _PUBLIC[name] else module


def __dir__():
    return __all__
