"""Keeps what Orbax prints off the console: what a person must know, our errors say."""

import functools
import logging
import sys

from absl import logging as absl_logging


@functools.cache
def silence_orbax():
    """Drops Orbax's log lines, unless absl's verbosity is at debug, and its last words.

    After a failed read or write it closes its event loop while others are under way; each of those
    then puts a traceback on the console.
    """
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    sys.unraisablehook = functools.partial(_unless_of_orbax, sys.unraisablehook)


def _is_not_of_orbax(record) -> bool:
    return "/orbax/" not in record.pathname.replace("\\", "/") or absl_logging.get_verbosity() > 0


def _unless_of_orbax(hook, unraisable):
    """`hook(unraisable)`, but for closed event loops and abandoned coroutines of Orbax."""
    code = getattr(unraisable.object, "cr_code", None)
    of_orbax = code is not None and "/orbax/" in code.co_filename.replace("\\", "/")
    closed = isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(
        unraisable.exc_value
    )
    if absl_logging.get_verbosity() > 0 or not (of_orbax or closed):
        hook(unraisable)
