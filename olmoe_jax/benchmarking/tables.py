"""What a suite prints: aligned tables, and the environment in one line."""

SHOWN = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint")  # packages that speed depends on


def environment_line(found: dict) -> str:
    """The environment as one line."""
    versions = found["packages"]
    packages = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
    variables = "".join(f"; {name}={value}" for name, value in found["variables"].items())
    return (
        f"{found['processor']}, {found['cores']} of {found['cores_of_machine']} cores, "
        f"{found['memory_gb']:.0f} GB; {found['platform']}; Python {found['python']}, "
        f"{packages}{variables}"
    )


def table(rows) -> str:
    """Rows of strings, the first the header, as aligned text: first column left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{w}}" for cell, w in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)


def footer(result) -> str:
    """What a result rests on: foreign load and rounds (`Rounds.account`), and the environment."""
    loads = [x for x in result["foreign_loads"] if x is not None]
    foreign = f"at most {max(loads):.1%} of all CPU time" if loads else "unknown (no /proc)"
    return (
        f"foreign load: {foreign}; rounds discarded (above {result['foreign_limit']:.0%}): "
        f"{result['rounds_discarded']}; kept although disturbed: {result['rounds_disturbed']}\n"
        f"{environment_line(result['environment'])}"
    )
